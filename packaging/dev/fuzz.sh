#!/bin/sh
# Runs every fuzz target for the given time each: packaging/dev/fuzz.sh 30s
set -eu
time=${1:-10s}
grep -rl --include='*_test.go' '^func Fuzz' . | sort | while read -r file; do
	dir=$(dirname "$file")
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file" | while read -r target; do
		echo "==> $dir $target ($time)"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$dir"
	done
done
