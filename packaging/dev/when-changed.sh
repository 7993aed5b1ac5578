#!/bin/sh
# Runs a slow suite when anything that it depends on is not as it was when it passed last: when-changed.sh image|packages [always]
#
#	image     make image-test: the sealed image in virtual machines
#	packages  make cross packages-test: programs for other processors, and the packages in containers, as root
#
# What they depend on are the files that the programs are built of (as go list names them, those for other processors too),
# everything of packaging/ but its documentation's tools, of iso/ for the image, the module of the software cipher machine,
# the versions of what is built in, and the Makefile; not the text of the changelog and the pages that packages carry. Their
# digest stands in iso/vmtest/passed and packaging/packages/passed, which are committed: they are written here, after the
# suite has passed and nothing of it was skipped but what the long suite has, and by nothing else. What a suite took is
# shown, not kept: it says more of the machine.
set -eu
cd "$(dirname -- "$0")/../.."
suite=${1:-}
case $suite in
image) targets=image-test record=iso/vmtest/passed also=./iso/... folder=iso ;;
packages) targets='cross packages-test' record=packaging/packages/passed also='./packaging/packages ./iso/init ./iso/install ./iso/console ./iso/power ./iso/paint' folder= ;;
*)
	echo "usage: when-changed.sh image|packages [always]" >&2
	exit 2
	;;
esac

digest() {
	{
		go list -deps -f '{{if .Module}}{{if .Module.Main}}{{$dir := .Dir}}{{range .GoFiles}}{{$dir}}/{{.}}
{{end}}{{range .IgnoredGoFiles}}{{$dir}}/{{.}}
{{end}}{{range .CgoFiles}}{{$dir}}/{{.}}
{{end}}{{range .EmbedFiles}}{{$dir}}/{{.}}
{{end}}{{end}}{{end}}' ./appliance/cmd/yinjian ./appliance/cmd/yinjian-verify $also | sed "s|^$PWD/||"
		find $folder packaging hsm/softtoken/module -type f ! -name passed ! -path 'packaging/docs/*' ! -name '*.md'
		printf '%s\n' Makefile LICENSE go.mod go.sum
	} | sed '/^$/d' | LC_ALL=C sort -u | while read -r file; do sha256sum -- "$file"; done | sha256sum | cut -d ' ' -f 1
}

now=$(digest)
if [ "${2:-}" != always ] && [ -f $record ] && [ "$(cat $record)" = "$now" ]; then
	echo "$suite: nothing that it or its tests depend on has changed since they passed ($record)"
	exit 0
fi
said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
{ make --no-print-directory $targets && touch "$said/passed"; } 2>&1 | tee "$said/log"
[ -f "$said/passed" ]
if [ "$(grep -c -e '--- SKIP: ' "$said/log")" != "$(grep -c 'YINJIAN_LONG is not set' "$said/log")" ]; then
	echo "$suite: passed, and not recorded: something was skipped"
	exit 0
fi
# What was changed while it ran has not been tried.
if [ "$(digest)" = "$now" ]; then
	echo "$now" > $record
fi
