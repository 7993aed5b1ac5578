#!/bin/sh
# 移除软件密码机之前停下它；密钥留在 /var/lib/yinjian-softtoken。
# Before a removal it is stopped; its keys stay.
set -eu
case "${1:-}" in
remove | 0) ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	systemctl stop yinjian-softtoken.service
fi
systemctl --quiet disable yinjian-softtoken.service
echo "印鉴：软件密码机的密钥没有动 (its keys stay): /var/lib/yinjian-softtoken"
