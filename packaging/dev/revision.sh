#!/bin/sh
# 测量的是哪个版本：git describe，有未提交的改动时加 -dirty。测量自己写出的文件(结果、文档、图)不算改动。没有 git 时为 unknown。
# Which revision is measured. What measurements write themselves (results, pages, pictures) does not make it dirty: one after the other, all
# of them are of the same revision.
set -u
revision=$(git describe --always --abbrev=9 2>/dev/null) || {
	echo unknown
	exit 0
}
[ -z "$(git status --porcelain -- . ':(exclude)bench/results' ':(exclude)*.md' ':(exclude)*.svg' 2>/dev/null)" ] || revision=$revision-dirty
echo "$revision"
