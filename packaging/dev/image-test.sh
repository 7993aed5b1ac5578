#!/bin/sh
# Runs make image-test when anything that it depends on is not as it was when it passed last: image-test.sh [always]
#
# What it depends on are the files that the image's programs are built of (as go list names them), everything of iso/ and
# of packaging/ but its documentation's tools, the module of the software cipher machine, and the versions of what is
# built in. Their digest stands in iso/vmtest/passed, which is committed: it is written here, after the suite has passed,
# and by nothing else. What the suite took is shown, not kept: it says more of the machine than of the image.
set -eu
cd "$(dirname -- "$0")/../.."
record=iso/vmtest/passed

digest() {
	{
		go list -deps -f '{{if .Module}}{{if .Module.Main}}{{$dir := .Dir}}{{range .GoFiles}}{{$dir}}/{{.}}
{{end}}{{range .CgoFiles}}{{$dir}}/{{.}}
{{end}}{{range .EmbedFiles}}{{$dir}}/{{.}}
{{end}}{{end}}{{end}}' ./appliance/cmd/yinjian ./appliance/cmd/yinjian-verify ./iso/... | sed "s|^$PWD/||"
		find iso packaging hsm/softtoken/module -type f ! -path $record ! -path 'packaging/docs/*' ! -name '*.md'
		echo go.mod
		echo go.sum
	} | sed '/^$/d' | LC_ALL=C sort -u | while read -r file; do sha256sum -- "$file"; done | sha256sum | cut -d ' ' -f 1
}

now=$(digest)
if [ "${1:-}" != always ] && [ -f $record ] && [ "$(cat $record)" = "$now" ]; then
	echo "image-test: nothing that the image or its tests depend on has changed since they passed ($record)"
	exit 0
fi
make --no-print-directory image-test
# What was changed while it ran has not been tried.
if [ "$(digest)" = "$now" ]; then
	echo "$now" > $record
fi
