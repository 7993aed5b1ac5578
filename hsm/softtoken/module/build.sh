#!/bin/sh
# Builds the PKCS#11 module of the software cipher machine: build.sh OUT
#
# Needs a C compiler and p11-kit's header (Debian: libp11-kit-dev, pkg-config). CC chooses the compiler; CFLAGS, by
# default -O2 -g, may add sanitizers. Only C_GetFunctionList is exported, and the result links libc alone;
# OpenSSL's libssl.so.3 is loaded where a daemon on another machine is configured.
set -eu

out=${1:?usage: build.sh OUT}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
headers=$(pkg-config --cflags p11-kit-1)

mkdir -p -- "$(dirname -- "$out")"
# The new file takes the old one's place whole: a process that has the old one mapped keeps it.
# shellcheck disable=SC2086
${CC:-gcc} ${CFLAGS:--O2 -g} -std=c11 -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes \
    -fPIC -fvisibility=hidden -fstack-protector-strong -D_FORTIFY_SOURCE=2 $headers \
    -shared -Wl,-z,relro,-z,now -Wl,-Bsymbolic -Wl,--no-undefined -Wl,-soname,libyinjian-p11.so \
    -o "$out.new" \
    "$here/cryptoki.c" "$here/unsupported.c" "$here/state.c" "$here/link.c" "$here/frame.c" "$here/tls.c" "$here/config.c" \
    ${LDFLAGS:-} -pthread
mv -- "$out.new" "$out"
