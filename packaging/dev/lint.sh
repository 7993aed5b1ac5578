#!/bin/sh
# gofmt, go vet, and the syntax of shell scripts. Prints what is wrong and where; exits 1 then.
set -eu
bad=0
files() { # tracked and new files in a checkout, all files in an unpacked archive
	git ls-files -co --exclude-standard "$1" 2>/dev/null || find . -path ./out -prune -o -path ./build -prune -o -path ./vendor -prune -o -name "$1" -print
}
out=$(files '*.go' | xargs gofmt -l)
[ -z "$out" ] || { echo "gofmt would change:"; echo "$out"; bad=1; }
go vet ./... || bad=1
for f in $(files '*.sh'); do
	sh -n "$f" || bad=1
done
exit $bad
