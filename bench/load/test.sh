#!/bin/sh
# 三种施压工具各跑一次(少量用户、10 秒)，对同一台评估设备：bench/load/test.sh [用户数 users] [秒 seconds]
# The three loaders, one after the other, against one evaluation appliance. Each has to end without an error. make load-test.
set -eu
cd "$(dirname "$0")/../.."
users=${1:-5}
seconds=${2:-10}
out=out/load-test
mkdir -p "$out"
rm -f "$out/target.json"
mkfifo "$out/hold.$$"
build/yinjian bench-load --dir "$out/appliance" --signers 8 --target "$PWD/$out/target.json" <"$out/hold.$$" >"$out/appliance.log" 2>&1 &
appliance=$!
exec 3>"$out/hold.$$"
rm "$out/hold.$$"
# The appliance ends in order when its input does.
trap 'exec 3>&-; wait $appliance || true' EXIT
while [ ! -e "$out/target.json" ]; do
	kill -0 $appliance 2>/dev/null || { cat "$out/appliance.log" >&2; exit 1; }
	sleep 0.2
done
failed=0

echo "==> Go: yinjian bench-loader"
build/yinjian bench-loader "$out/target.json" --users "$users" --warm-up 2s --for "${seconds}s" >"$out/go.json"
python3 - "$out/go.json" <<'PY' || failed=1
import json, sys
r = json.load(open(sys.argv[1]))
for name, c in r["classes"].items():
    print(f'{name:10} {c["requests"]:6} requests  p50 {c["p50_ms"]:.1f}  p99 {c["p99_ms"]:.1f} ms  errors {c["errors"]}')
sys.exit(0 if r["all"]["requests"] and not r["all"]["errors"] else 1)
PY

if command -v build/k6 >/dev/null 2>&1; then k6=build/k6; else k6=$(command -v k6 || true); fi
if [ -n "$k6" ]; then
	echo "==> k6"
	SSL_CERT_FILE="$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["ca"])' "$out/target.json")" TARGET="$PWD/$out/target.json" \
		USERS="$users" WARM_UP=2 SECONDS="$seconds" "$k6" run --quiet --summary-export "$out/k6.json" bench/load/k6/mix.js || failed=1
else
	echo "==> 没有 k6，跳过 k6 is missing: packaging/dev/deps.sh load"
fi

if command -v jmeter >/dev/null 2>&1; then
	echo "==> JMeter"
	bench/load/jmeter/build.sh build/yinjian-jmeter.jar
	rm -f "$out/jmeter.jtl"
	bench/load/jmeter/run.sh -Jtarget="$PWD/$out/target.json" -Jusers="$users" -Jramp=1 -Jseconds="$seconds" -l "$out/jmeter.jtl" -j "$out/jmeter.log" >/dev/null
	python3 - "$out/jmeter.jtl" <<'PY' || failed=1
import collections, csv, sys
took, bad = collections.defaultdict(list), collections.Counter()
for row in csv.DictReader(open(sys.argv[1])):
    took[row["label"]].append(int(row["elapsed"]))
    if row["success"] != "true":
        bad[row["responseCode"] + " " + row["responseMessage"]] += 1
for label, all in sorted(took.items()):
    all.sort()
    print(f'{label:10} {len(all):6} requests  p50 {all[len(all) // 2]}  p99 {all[len(all) * 99 // 100]} ms')
print("errors", dict(bad))
sys.exit(0 if len(took) == 4 and not bad else 1)
PY
else
	echo "==> 没有 JMeter，跳过 JMeter is missing: packaging/dev/deps.sh load"
fi
exit $failed
