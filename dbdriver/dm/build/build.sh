#!/bin/sh
# Builds yinjian with DM's driver.
#   dbdriver/dm/build/build.sh OUT               with the driver from the module proxy
#   dbdriver/dm/build/build.sh OUT DIR           with the driver from DM's installation media, unpacked in DIR
#   dbdriver/dm/build/build.sh --standin OUT     compile check: the program refuses to start
# The files in this folder are not changed: go.mod and go.sum of the build are made in a temporary folder, with the
# checksums of the program's own modules. GO names another go command.
set -eu
cd "$(dirname "$0")"
go=${GO:-go}
mod=go.mod
[ "${1:-}" != --standin ] || { mod=go.standin.mod; shift; }
out=${1:?usage: build.sh [--standin] OUT [DIR]}
case $out in /*) ;; *) out=$OLDPWD/$out ;; esac
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT INT TERM
cp "$mod" "$tmp/dm.mod"
cp ../../../go.sum "$tmp/dm.sum"
if [ -n "${2:-}" ]; then
	case $2 in /*) dir=$2 ;; *) dir=$OLDPWD/$2 ;; esac
	[ -e "$dir/go.mod" ] || { cp -R "$dir" "$tmp/driver"; dir=$tmp/driver; printf 'module gitee.com/chunanyong/dm\n\ngo 1.18\n' >"$dir/go.mod"; }
	"$go" mod edit -replace "gitee.com/chunanyong/dm=$dir" "$tmp/dm.mod"
	# On the media the driver's packages may call one another dm/….
	if grep -rq --include='*.go' '"dm/' "$dir"; then
		cp -R "$dir" "$tmp/dm"
		printf 'module dm\n\ngo 1.18\n' >"$tmp/dm/go.mod"
		"$go" mod edit -require dm@v0.0.0 -replace "dm=$tmp/dm" "$tmp/dm.mod"
	fi
elif [ "$mod" = go.mod ] && ! "$go" mod download -modfile="$tmp/dm.mod" gitee.com/chunanyong/dm; then
	echo "DM 驱动 gitee.com/chunanyong/dm 取不到；请换模块代理(GOPROXY)，或用安装介质中的驱动：build.sh OUT DIR" >&2
	echo "(DM's driver cannot be reached: set GOPROXY, or give the folder of the driver from DM's media; nothing was built)" >&2
	exit 1
fi
"$go" build -mod=mod -modfile="$tmp/dm.mod" -overlay=overlay.json -trimpath -o "$out" yinjian/appliance/cmd/yinjian
