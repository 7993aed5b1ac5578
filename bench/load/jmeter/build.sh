#!/bin/sh
# 编译 JMeter 的 Java 请求与 Java 客户端：build.sh 输出.jar  (JMETER_HOME 缺省为 Debian 的 /usr/share/jmeter)
# Compiles the Java request and the Java client into one jar, which belongs into JMeter's lib/ext.
set -eu
jar=${1:?usage: build.sh out.jar}
here=$(dirname "$0")
home=${JMETER_HOME:-/usr/share/jmeter}
classes=$(mktemp -d)
trap 'rm -rf "$classes"' EXIT
sources="$here/YinjianSampler.java $here/../../../docs/clients/YinjianClient.java"
[ -n "${JMETER_HOME:-}" ] || sources="$sources $here/DebianJMeter.java"
# shellcheck disable=SC2086 # a list of words is meant
javac -encoding UTF-8 -nowarn -d "$classes" -cp "$home/lib/ext/*:$home/lib/*:/usr/share/java/*" $sources
mkdir -p "$(dirname "$jar")"
(cd "$classes" && jar cf out.jar ./*.class) && mv "$classes/out.jar" "$jar"
