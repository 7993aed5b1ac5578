#!/bin/sh
# Feeds the module replies under clang's libFuzzer with the address and undefined-behaviour sanitizers, beginning with
# the recorded corpus: fuzz_replies.sh 30s|2000x. What it finds is written to the folder it runs in.
set -eu
time=${1:?usage: fuzz_replies.sh 30s|2000x}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
case $time in
*x) limit=-runs=${time%x} ;;
*s) limit=-max_total_time=${time%s} ;;
*) echo "fuzz_replies.sh: $time is neither seconds (30s) nor inputs (2000x)" >&2; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/found"
# shellcheck disable=SC2046
clang -g -O1 -std=c11 -DLIBFUZZER -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread \
	$(pkg-config --cflags p11-kit-1) -o "$work/fuzz" "$here/fuzz_replies.c" "$here"/../module/*.c
"$work/fuzz" "$limit" -max_len=8192 -timeout=20 -print_final_stats=1 -artifact_prefix="$PWD/" "$work/found" "$here/replies-corpus"
# What reaches new code is worth keeping: copy it from here by hand when the module has changed.
if [ -n "${KEEP:-}" ]; then cp "$work/found"/* "$KEEP/"; fi
