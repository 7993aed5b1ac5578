#!/bin/sh
# 安装或升级软件密码机之后：用户、状态目录、存储口令；不启动。参数同 postinstall.sh。
# After the software cipher machine was installed or upgraded; nothing is started.
set -eu
upgrade=no
case "${1:-}" in
configure) [ -z "${2:-}" ] || upgrade=yes ;;
1) ;;
2) upgrade=yes ;;
*) exit 0 ;;
esac
systemd-sysusers yinjian-evaluation.conf
dir=/var/lib/yinjian-softtoken
if [ ! -e "$dir/passphrase" ]; then
	mkdir -p -m 0700 "$dir"
	(umask 077 && od -An -N16 -tx1 /dev/urandom | tr -d ' ' >"$dir/passphrase")
	chown -R yinjian-hsm:yinjian-hsm "$dir"
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	[ "$upgrade" = no ] || systemctl try-restart yinjian-softtoken.service || echo "印鉴：软件密码机没有重新启动 (the software cipher machine did not come up again)" >&2
fi
echo "印鉴：软件密码机仅供评估，不是认证产品 (evaluation only, not a certified product)。"
