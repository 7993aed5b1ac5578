#!/bin/sh
# 安装或升级之后：服务用户、数据目录、让 systemd 重读单元；升级时正在运行的服务重启一次。
# After an installation or an upgrade. deb: configure [old version]; rpm: 1, or 2 for an upgrade; install.sh: as deb.
set -eu
upgrade=no
case "${1:-}" in
configure) [ -z "${2:-}" ] || upgrade=yes ;;
1) ;;
2) upgrade=yes ;;
*) exit 0 ;; # dpkg 撤销失败的操作时 (dpkg undoes something that failed)
esac
systemd-sysusers yinjian.conf
# 数据目录不属于任何软件包，移除时因此留下 (no package owns the data: removal leaves it)。
if [ ! -d /var/lib/yinjian ]; then
	mkdir -m 0700 /var/lib/yinjian
	chown yinjian:yinjian /var/lib/yinjian
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	if [ "$upgrade" = yes ]; then
		# 停机先处理完在途请求；新旧程序不混用 (what is under way is finished; old and new programs are never mixed).
		systemctl try-restart yinjian.service || echo "印鉴：服务没有重新启动，请看 systemctl status yinjian (the service did not come up again)" >&2
	fi
fi
if [ "$upgrade" = no ]; then
	echo "印鉴：已安装，没有启动任何服务。下一步见 /usr/share/doc/yinjian/packages.md (installed, nothing was started)。"
	echo "内核参数与不装入的模块（90-yinjian.conf、yinjian.conf）下次开机起作用 (kernel parameters take effect at the next boot)。"
fi
