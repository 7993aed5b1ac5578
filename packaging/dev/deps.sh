#!/bin/sh
# Installs what the named step needs from Debian, and says so. Does nothing when everything is there.
#   packaging/dev/deps.sh build|demo|test
# As root it calls apt-get, with sudo where sudo works without asking; otherwise it prints the one command to run.
set -eu
step=${1:?usage: deps.sh build|demo|test}

# One package a line, and a file that shows that it is installed (faster than dpkg, and true for other sources too).
need() {
	case $1 in
	build)
		echo "gcc /usr/bin/gcc"
		echo "libc6-dev /usr/include/stdio.h"
		echo "pkg-config /usr/bin/pkg-config"
		echo "libp11-kit-dev /usr/include/p11-kit-1/p11-kit/pkcs11.h"
		;;
	demo)
		need build
		echo "openssl /usr/bin/openssl"
		echo "chrony /usr/sbin/chronyd"
		echo "gpsd /usr/sbin/gpsd"
		;;
	test)
		need demo
		echo "softhsm2 /usr/lib/softhsm/libsofthsm2.so"
		echo "opensc /usr/bin/pkcs11-tool"
		echo "opencryptoki /usr/sbin/pkcsslotd"
		echo "curl /usr/bin/curl"
		echo "strace /usr/bin/strace"
		echo "gpsd-clients /usr/bin/gpsdecode"
		echo "osslsigncode /usr/bin/osslsigncode"
		echo "chromium /usr/bin/chromium"
		echo "fonts-wqy-microhei /usr/share/fonts/truetype/wqy/wqy-microhei.ttc"
		# Its service is not wanted either: the tests start their own.
		echo "rsyslog /usr/sbin/rsyslogd"
		echo "rsyslog-gnutls /usr/share/doc/rsyslog-gnutls/copyright"
		# Its service is not wanted: the tests make clusters of their own.
		ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || echo "postgresql /usr/lib/postgresql/initdb"
		command -v python3 >/dev/null 2>&1 || echo "python3 /usr/bin/python3"
		echo "libbcprov-java /usr/share/java/bcprov.jar"
		echo "libbcpkix-java /usr/share/java/bcpkix.jar"
		echo "libbcutil-java /usr/share/java/bcutil.jar"
		command -v javac >/dev/null 2>&1 && command -v jarsigner >/dev/null 2>&1 || echo "default-jdk-headless /usr/bin/jarsigner"
		echo "mono-mcs /usr/bin/mcs"
		echo "mono-runtime /usr/bin/mono"
		echo "libmono-btls-interface4.0-cil /usr/lib/mono/4.5/Mono.Btls.Interface.dll"
		;;
	esac
}

missing=$(need "$step" | while read -r package file; do
	[ -e "$file" ] || printf '%s ' "$package"
done)
if [ -n "$missing" ]; then
	echo "==> 安装所需软件包 installing Debian packages: $missing"
	if [ "$(id -u)" = 0 ]; then
		sudo=
	elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
		sudo="sudo -n"
	else
		echo "需要管理员权限，请先运行 root is needed, run first:" >&2
		echo "    sudo apt-get install --no-install-recommends $missing" >&2
		exit 1
	fi
	$sudo apt-get update -qq
	# shellcheck disable=SC2086 # a list of words is meant
	DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
	left=$(need "$step" | while read -r package file; do
		[ -e "$file" ] || printf '%s ' "$package"
	done)
	[ -z "$left" ] || {
		# Tests that miss their peer are skipped; nobody should take that for a pass.
		echo "仍缺 still missing after the installation: $left" >&2
		exit 1
	}
	# The demo runs chronyd and gpsd of its own on loopback; the packages' services are not wanted for it, but a
	# machine that had them keeps them: nothing is stopped here.
else
	echo "==> 所需软件包齐全 Debian packages for '$step': all present"
fi
command -v go >/dev/null 2>&1 || {
	echo "找不到 go：请安装 go.mod 所写版本 Go is missing: install the version that go.mod names" >&2
	exit 1
}
if [ ! -e build/.modules ] || [ go.sum -nt build/.modules ]; then
	echo "==> 下载 Go 模块 downloading Go modules"
	go mod download
	mkdir -p build && touch build/.modules
fi
