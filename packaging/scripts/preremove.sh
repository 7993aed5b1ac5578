#!/bin/sh
# 移除之前停下服务；升级不停（升级之后重启）。停不下来就不移除。
# Before a removal the service is stopped; one that cannot be stopped is not removed. deb: remove; rpm: 0; install.sh: remove.
set -eu
case "${1:-}" in
remove | 0) ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	systemctl stop yinjian.service
fi
systemctl --quiet disable yinjian.service
