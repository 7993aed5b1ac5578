#!/bin/sh
# Installs what the named step needs from Debian, and says so. Does nothing when everything is there.
#   packaging/dev/deps.sh build|demo|test|bench|load|image|image-arm64|packages
# As root it calls apt-get, with sudo where sudo works without asking; otherwise it prints the one command to run.
set -eu
step=${1:?usage: deps.sh build|demo|test|bench|load|image|image-arm64|packages}

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
		echo "squashfs-tools /usr/bin/mksquashfs"
		echo "softhsm2 /usr/lib/softhsm/libsofthsm2.so"
		echo "swtpm /usr/bin/swtpm"
		echo "rpm /usr/bin/rpmbuild"
		echo "createrepo-c /usr/bin/createrepo_c"
		echo "dnf /usr/bin/dnf"
		echo "dnf-plugins-core /usr/lib/python3/dist-packages/dnf-plugins/download.py"
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
		need units
		;;
	bench) # what is measured beside us: PostgreSQL, openssl ts; a volume of its own for the soak
		need demo
		echo "e2fsprogs /usr/sbin/mkfs.ext4"
		ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || echo "postgresql /usr/lib/postgresql/initdb"
		;;
	load) # loaders beside our own: JMeter here, k6 below
		need demo
		echo "jmeter /usr/share/jmeter/bin/ApacheJMeter.jar"
		echo "jmeter-java /usr/share/jmeter/lib/ext/ApacheJMeter_java.jar"
		command -v python3 >/dev/null 2>&1 || echo "python3 /usr/bin/python3"
		command -v javac >/dev/null 2>&1 || echo "default-jdk-headless /usr/bin/javac"
		;;
	units) # judges of packaging's units, rules and of what the image is made of
		echo "systemd /usr/bin/systemd-analyze"
		echo "nftables /usr/sbin/nft"
		echo "systemd-boot-efi /usr/lib/systemd/boot/efi/linuxx64.efi.stub"
		echo "sbsigntool /usr/bin/sbverify"
		echo "efitools /usr/bin/sign-efi-sig-list"
		echo "cryptsetup-bin /usr/sbin/veritysetup"
		echo "fdisk /usr/sbin/sfdisk"
		;;
	image)
		need build
		need units
		echo "openssl /usr/bin/openssl"
		echo "osslsigncode /usr/bin/osslsigncode"
		echo "squashfs-tools /usr/bin/mksquashfs"
		echo "kmod /usr/sbin/depmod"
		echo "xz-utils /usr/bin/xz"
		echo "dosfstools /usr/sbin/mkfs.vfat"
		echo "mtools /usr/bin/mcopy"
		echo "curl /usr/bin/curl"
		echo "iputils-ping /bin/ping"
		echo "xorriso /usr/bin/xorriso"
		echo "cpio /usr/bin/cpio"
		echo "qemu-system-x86 /usr/bin/qemu-system-x86_64"
		echo "ovmf /usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
		echo "swtpm /usr/bin/swtpm"
		echo "swtpm-tools /usr/bin/swtpm_setup"
		# What stands outside of a virtual machine: its tokens are made by pkcs11-tool, its database is PostgreSQL's.
		echo "opensc /usr/bin/pkcs11-tool"
		echo "softhsm2 /usr/lib/softhsm/libsofthsm2.so" # a maker's library, in a pack
		ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || echo "postgresql /usr/lib/postgresql/initdb"
		echo "rpm /usr/bin/rpmbuild"
		echo "createrepo-c /usr/bin/createrepo_c"
		echo "dnf /usr/bin/dnf"
		echo "dnf-plugins-core /usr/lib/python3/dist-packages/dnf-plugins/download.py"
		;;
	image-arm64) # the image for arm64, and the emulated machine for it: of the long suite alone
		need image
		echo "gcc-aarch64-linux-gnu /usr/bin/aarch64-linux-gnu-gcc"
		echo "libc6-dev-arm64-cross /usr/aarch64-linux-gnu/include/stdio.h"
		echo "qemu-system-arm /usr/bin/qemu-system-aarch64"
		echo "qemu-efi-aarch64 /usr/share/AAVMF/AAVMF_CODE.fd"
		;;
	packages)
		need build
		echo "mmdebstrap /usr/bin/mmdebstrap"
		echo "systemd-container /usr/bin/systemd-nspawn"
		echo "gcc-aarch64-linux-gnu /usr/bin/aarch64-linux-gnu-gcc"
		echo "libc6-dev-arm64-cross /usr/aarch64-linux-gnu/include/stdio.h"
		echo "qemu-user-static /usr/bin/qemu-aarch64-static"
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
if [ -d vendor ]; then
	echo "==> Go 模块在 vendor/ 内 modules are in vendor/"
elif [ ! -e build/.modules ] || [ go.sum -nt build/.modules ]; then
	echo "==> 下载 Go 模块 downloading Go modules"
	go mod download
	mkdir -p build && touch build/.modules
fi
# Programs of others that are held beside ours, from Go's module proxy. Without it what needs them is named as not measured.
other() { # other NAME MODULE
	[ -x "build/$1" ] && return
	echo "==> 构建 building $1"
	GOBIN="$PWD/build" GOFLAGS= go install "$2" || echo "==> $1 没有构建成，不与它比较 $1 could not be built: not measured beside it" >&2
}
if [ "$step" = load ]; then
	command -v k6 >/dev/null 2>&1 || other k6 go.k6.io/k6@v1.8.1
fi
