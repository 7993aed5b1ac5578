#!/bin/sh
# Runs every fuzz target (packaging/dev/README.md lists them) for the given time or number of inputs each, and ends at the first that finds something:
#   packaging/dev/fuzz.sh 30s      packaging/dev/fuzz.sh 2000x
set -eu
time=${1:-10s}
# Seeds are whole bundles and messages; minimising an interesting one takes longer than finding it.
grep -rl --include='*_test.go' '^func Fuzz' . | sort | while read -r file; do
	dir=$(dirname "$file")
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file" | while read -r target; do
		echo "==> $dir $target ($time)"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$dir" >"${TMPDIR:-/tmp}/fuzz.$$" 2>&1 || {
			cat "${TMPDIR:-/tmp}/fuzz.$$"
			exit 1
		}
		tail -n 1 "${TMPDIR:-/tmp}/fuzz.$$"
	done
done
rm -f "${TMPDIR:-/tmp}/fuzz.$$"
# The C module's reading of replies, by coverage too.
if command -v clang >/dev/null 2>&1; then
	echo "==> hsm/softtoken/module replies ($time)"
	hsm/softtoken/testdata/fuzz_replies.sh "$time" >"${TMPDIR:-/tmp}/fuzz.$$" 2>&1 || {
		cat "${TMPDIR:-/tmp}/fuzz.$$"
		exit 1
	}
	grep '^Done' "${TMPDIR:-/tmp}/fuzz.$$"
	rm -f "${TMPDIR:-/tmp}/fuzz.$$"
else
	echo "==> clang is not installed: the module's replies are fuzzed by hsm/softtoken's TestModuleReplies alone" >&2
fi
