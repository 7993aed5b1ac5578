#!/bin/sh
# 依次测量各部分，一部分测不成，其余照测，最后指出；各部分用时写入 bench/results/parts.md。make bench 调用，在仓库根目录运行。
# Measures one part after the other; where one cannot be measured the others are, it is named at the end, and this ends with 1. How long
# each took goes to bench/results/parts.md. EACH, FEW: seconds of a case in a round (0.6, and 1 where a case is slow); TSA_PEER: flags of
# bench-tsa that name another peer than sigstore's timestamp-server, which is used where it lies in build; USERS, LOAD, LOADFLAGS: of the part load, as of make load. PARTS: those alone.
set -u
results=bench/results
each=${EACH:-600ms} few=${FEW:-1s}
mkdir -p out "$results"
failed='' table='' begun=$(date +%s)

part() { # part NAME COMMAND…
	name=$1
	shift
	case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
	echo "==> $name: $(date -u +%T)"
	at=$(date +%s)
	word=测得
	"$@" || { word='**未测成 failed**'; failed="$failed $name"; }
	table="$table| $name | $(($(date +%s) - at)) | $word |
"
}

peer=${TSA_PEER:-}
if [ -z "$peer" ] && [ -x build/timestamp-server ]; then
	# Its log goes to a file, as that of a service that has to account for what it stamped does.
	set -- --peer "build/timestamp-server serve --host 127.0.0.1 --port 38471 --timestamp-signer memory --disable-ntp-monitoring >out/peer.log 2>&1" --peer-url http://127.0.0.1:38471/api/v1/timestamp
elif [ -n "$peer" ]; then
	eval "set -- $peer" # a list of flags, quoted as for the shell
else
	echo "没有 build/timestamp-server，也没有 TSA_PEER：时间戳服务只与 openssl ts 相比 (no peer but openssl ts)"
	set --
fi

part sign build/yinjian bench --dir out/bench --results $results --each "$each" --profile 5s
part tsa build/yinjian bench-tsa --dir out/bench-tsa --results $results --each "$each" --profile 3s "$@"
part pool build/yinjian bench-pool --dir out/bench-pool --results $results --each "$each"
part price build/yinjian bench-price --dir out/bench-price --results $results --each "$each" --page docs/price-list.md
part database build/yinjian bench-database --dir out/bench-database --results $results # of what is signed in a second the shipper's rate cannot be told
part console build/yinjian bench-console --dir out/bench-console --results $results --rounds 3 --each "$few"
part growth build/yinjian bench-growth --dir out/bench-growth --results $results --name growth-million --entries 10000,1000000
part load build/yinjian bench-load --dir out/load --results $results --users "${USERS:-500}" --long "${LOAD:-10m}" ${LOADFLAGS:-} # as make load
part capacity build/yinjian bench-capacity --results $results --page docs/capacity.md
part targets build/yinjian bench-targets --results $results
part buyer build/yinjian bench-buyer --results $results --readme README.md,README.zh-CN.md

{
	printf '# How long `make bench` took\n\n由程序写出 (written by the program)。%s，版本 revision %s\n\n| 部分 part | 秒 s | |\n| --- | ---: | --- |\n' "$(date -u +%FT%TZ)" "${YINJIAN_REVISION:-unknown}"
	printf '%s| 合计 all | %d | |\n' "$table" "$(($(date +%s) - begun))"
} >$results/parts.md
cat $results/parts.md
[ -z "$failed" ] || {
	echo "未测成 failed:$failed" >&2
	exit 1
}
