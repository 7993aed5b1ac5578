#!/bin/sh
# 没有 deb、rpm 的系统上安装、升级、移除；规则同软件包：设定文件改过的不覆盖，数据不动。
# Installs, upgrades and removes where there is neither dpkg nor rpm, by the packages' rules. As root:
#   ./install.sh install [--evaluation]     --evaluation：连同软件密码机，仅供评估 (with the software cipher machine)
#   ./install.sh remove
set -eu
umask 022
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
list=/usr/lib/yinjian/installed # SHA-256 与路径，移除时以此为准 (what remove goes by)
say() { echo "印鉴：$*"; }
fail() { echo "印鉴：$*" >&2; exit 1; }
digest() { sha256sum <"$1" | cut -d' ' -f1; }
was() { [ ! -e "$list" ] || sed -n "s|^\([0-9a-f]*\)  $1\$|\1|p" "$list"; } # 上次装的内容 (what was put there last)

[ "$(id -u)" = 0 ] || fail "请用 root 运行 (run it as root)"
if dpkg-query -W -f '${Status}' yinjian 2>/dev/null | grep -q ' installed$' || rpm -q yinjian >/dev/null 2>&1; then
	fail "本机已由软件包安装，请用 dpkg、rpm (installed by a package: use dpkg or rpm)"
fi

install_one() { # from, path：整个换上，正在运行的旧程序不受影响 (whole, beside what runs)
	mkdir -p "$(dirname "$2")"
	cp -P "$1" "$2.yinjian-new"
	mv -T "$2.yinjian-new" "$2"
}

case "${1:-}" in
install)
	trees="$here/root"
	[ "${2:-}" != --evaluation ] || trees="$trees $here/evaluation"
	old=
	[ ! -e "$list" ] || old=yes
	fresh=$(mktemp)
	trap 'rm -f "$fresh"' EXIT
	for tree in $trees; do
		(cd "$tree" && find . ! -type d | LC_ALL=C sort) | while read -r name; do
			path=${name#.}
			new=-
			[ -L "$tree$path" ] || new=$(digest "$tree$path")
			case $path in
			/etc/*)
				if [ -e "$path" ] && [ "$(digest "$path")" != "$new" ] && [ "$(digest "$path")" != "$(was "$path")" ]; then
					say "$path 改过，保留；新的在 $path.new (was changed and stays; the new one is beside it)"
					cp "$tree$path" "$path.new"
					echo "$new  $path" >>"$fresh"
					continue
				fi
				;;
			esac
			install_one "$tree$path" "$path"
			echo "$new  $path" >>"$fresh"
		done
	done
	if [ -n "$old" ]; then
		# 新版不再有的文件 (files that the new version no longer has)
		cut -d' ' -f3 "$list" | while read -r path; do
			grep -q "  $path\$" "$fresh" || case $path in /etc/*) ;; *) rm -f "$path" ;; esac
		done
	fi
	install_one "$fresh" "$list"
	chmod 0644 "$list"
	sh "$here/scripts/postinstall.sh" configure $old
	[ "${2:-}" != --evaluation ] || sh "$here/scripts/evaluation-postinstall.sh" configure $old
	;;
remove)
	[ -e "$list" ] || fail "没有由本程序安装过 (nothing was installed by this)"
	[ ! -e /usr/lib/systemd/system/yinjian-softtoken.service ] || sh "$here/scripts/evaluation-preremove.sh" remove
	sh "$here/scripts/preremove.sh" remove
	cut -d' ' -f3 "$list" | while read -r path; do
		case $path in
		/etc/*) say "$path 保留 (stays)" ;;
		*) rm -f "$path" ;;
		esac
	done
	rm -f "$list"
	for dir in /usr/lib/yinjian /usr/share/yinjian/time /usr/share/yinjian /usr/share/doc/yinjian /usr/share/doc/yinjian-evaluation; do
		[ ! -d "$dir" ] || find "$dir" -depth -type d -exec rmdir {} + 2>/dev/null || true
	done
	sh "$here/scripts/postremove.sh" remove
	;;
*)
	fail "用法 usage: ./install.sh install [--evaluation] | remove"
	;;
esac
