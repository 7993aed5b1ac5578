#!/bin/sh
# Writes the sources as they are handed over, byte for byte the same for the same commit: what is committed, the modules'
# sources (vendor/), the list of parts, and digests of every file. See docs/source.md.
#   packaging/dev/source-bundle.sh [folder]     default build
set -eu
out=${1:-build}
commit=$(git rev-parse --verify HEAD) || { echo "只能在 git 工作目录中制作 only in a git checkout" >&2; exit 1; }
name=yinjian-source-$(git describe --always --abbrev=12)
[ -z "$(git status --porcelain)" ] || echo "注意：未提交的改动不在其内 note: what is not committed is not in it" >&2
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git archive --prefix="$name/" "$commit" | tar -x -C "$work"
(
	cd "$work/$name"
	go run ./packaging/docs sbom >sbom.cdx.json
	go mod vendor
	echo "$commit" >COMMIT
	# A name with a space would not be found by what reads the list, which ends this.
	find . -type f ! -name SHA256SUMS ! -name SM3SUMS | LC_ALL=C sort >"$work/list"
	xargs sha256sum <"$work/list" >SHA256SUMS
	xargs openssl dgst -sm3 -r <"$work/list" | sed 's/ \*/  /' >SM3SUMS
)
# gzip is given no name and no time; tar no owner, no order of the disk's and no umask.
tar -C "$work" --sort=name --format=ustar --mtime="@$(git log -1 --format=%ct "$commit")" --owner=0 --group=0 --numeric-owner \
	--mode='u=rwX,go=rX' -cf "$work/tar" "$name"
gzip -9 -n <"$work/tar" >"$out/$name.tar.gz"
cd "$out"
sha256sum "$name.tar.gz" | tee "$name.tar.gz.sha256"
openssl dgst -sm3 -r "$name.tar.gz" | sed 's/ \*/  /' | tee "$name.tar.gz.sm3"
