#!/bin/sh
# 无界面运行：run.sh -Jtarget=… [-Jusers=500 -Jseconds=60 -Jramp=10 -Jthink=0] -l 结果.jtl
# Runs the plan without a window. JMETER_HOME: upstream's JMeter; without it Debian's, see DebianJMeter.java.
set -eu
here=$(dirname "$0")
jar=${YINJIAN_JMETER_JAR:-$here/../../../build/yinjian-jmeter.jar}
kept=-Dhttp.maxConnections=2000 # connections that Java keeps, five without it: each user has one
csv="-Jjmeter.save.saveservice.output_format=csv -Jjmeter.save.saveservice.print_field_names=true"
if [ -n "${JMETER_HOME:-}" ]; then
	# shellcheck disable=SC2086 # a list of words is meant
	JVM_ARGS="${JVM_ARGS:-} $kept" exec "$JMETER_HOME/bin/jmeter" -n -t "$here/mix.jmx" -Juser.classpath="$jar" $csv "$@"
fi
home=/usr/share/jmeter
# shellcheck disable=SC2086
exec java ${JVM_ARGS:-} $kept -Djava.awt.headless=true -Djmeter.home=$home -cp "$jar:$home/bin/ApacheJMeter.jar:$home/lib/*:$home/lib/ext/*" \
	DebianJMeter -n -t "$here/mix.jmx" -q $home/bin/user.properties $csv "$@"
