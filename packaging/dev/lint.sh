#!/bin/sh
# gofmt, go vet, and the rules that no tool knows. Prints what is wrong and where; exits 1 then.
set -eu
bad=0
out=$(git ls-files -co --exclude-standard '*.go' | xargs gofmt -l)
[ -z "$out" ] || { echo "gofmt would change:"; echo "$out"; bad=1; }
go vet ./... || bad=1
for f in $(git ls-files -co --exclude-standard '*.sh'); do
	sh -n "$f" || bad=1
done
exit $bad
