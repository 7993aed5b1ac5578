#!/bin/sh
# 移除之后：程序没有了，数据与用户留着，彻底清除（purge）也是：日志是证据，由人决定去留。
# After a removal: data and user stay, after a purge too. deb: remove, purge; rpm: 0; install.sh: remove.
set -eu
case "${1:-}" in
remove | purge | 0) ;;
*) exit 0 ;;
esac
[ ! -d /run/systemd/system ] || systemctl daemon-reload
# 空目录没有什么可留 (nothing to keep in an empty one)。
if [ -d /var/lib/yinjian ] && ! rmdir /var/lib/yinjian 2>/dev/null; then
	cat <<'TEXT'
印鉴：程序已移除，数据没有动：/var/lib/yinjian，属主 yinjian。
其中的日志是证据，保存期限见所在单位的规定；重新安装即可接着用。确认不再需要，由 root 自行删除。
Yinjian: the programs are gone, the data is untouched: /var/lib/yinjian, owned by yinjian. Its journal is evidence;
installing again takes it up. Whoever no longer needs it deletes it by hand.
TEXT
fi
