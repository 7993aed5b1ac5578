#!/bin/sh
# example.sh does everything that an application does, in its order, with sign.sh beside it: consent by PIN, signatures
# over content and over a digest, evidence, verification, a time-stamp, and the same act again. Run by the tests.
#
#   usage: example.sh KEY-FILE URL CA-FILE SIGNER PIN-FILE DOCUMENT
set -eu
[ $# -eq 6 ] || {
    echo 'usage: example.sh KEY-FILE URL CA-FILE SIGNER PIN-FILE DOCUMENT' >&2
    exit 2
}
export YINJIAN_KEY_FILE="$1"
api=$2 ca=$3 signer=$4 pin_file=$5 document=$6
dir=$(mktemp -d) # for this user alone: the PIN is in it for a moment
trap 'rm -rf "$dir"' EXIT

call() { # METHOD PATH [curl option ...], the body from standard input
    method=$1 path=$2
    shift 2
    cat >"$dir/body"
    sh "$(dirname "$0")/sign.sh" "$method" "$api$path" "$dir/body" "$@" --cacert "$ca"
}
member() { # NAME FILE: a string of the answer's top level that holds no quotation mark
    sed -n 's/.*[{,]"'"$1"'":"\{0,1\}\([^",}]*\).*/\1/p' "$2"
}

visit=example-$(openssl rand -hex 8) # yours: the record's number and version, stored before the call
pin=$(tr -d '\r\n' <"$pin_file" | sed 's/["\\]/\\&/g')
digest=$(openssl dgst -sm3 -binary "$document" | openssl base64 -A)
content=$(openssl base64 -A -in "$document")
about='"document":{"id":"'$visit'","type":"discharge-summary","media_type":"application/xml"},"role":"主治医师"'

# 1. Consent by PIN, bound to this document: SM3 for SM2.
call POST /v1/authorizations >"$dir/once" <<END
{"signer":"$signer","pin":"$pin","digests":["$digest"]}
END
once=$(member id "$dir/once")
echo "authorization $once"

# 2. A raw SM2 signature, over content.
call POST /v1/sign -H "Idempotency-Key: $visit-raw" >"$dir/raw" <<END
{"signer":"$signer","algorithm":"SM2","form":"raw","content":"$content",$about,"consent":{"authorization_id":"$once"}}
END
echo "raw $(member record_id "$dir/raw")"

# 3. Two CMS, of a digest alone and with the content inside; consent for two signatures within ten minutes.
call POST /v1/authorizations >"$dir/twice" <<END
{"signer":"$signer","pin":"$pin","count":2,"seconds":600}
END
common='"signer":"'$signer'","algorithm":"SM2","form":"cms",'$about',"consent":{"authorization_id":"'$(member id "$dir/twice")'"}'
call POST /v1/sign -H "Idempotency-Key: $visit-cms" >"$dir/cms" <<END
{$common,"digest":{"algorithm":"SM3","value":"$digest"}}
END
record=$(member record_id "$dir/cms")
echo "cms $record"
inside='{'$common',"content":"'$content'","detached":false}'
printf %s "$inside" | call POST /v1/sign -H "Idempotency-Key: $visit-cms-content" >"$dir/inside"
echo "cms-content $(member record_id "$dir/inside")"

# 4. The evidence, to be stored beside the record, and the appliance's opinion of it and of the CMS.
sh "$(dirname "$0")/sign.sh" GET "$api/v1/evidence/$record" --cacert "$ca" >"$dir/evidence"
echo "evidence $(wc -c <"$dir/evidence" | tr -d ' ') bytes"
{
    printf '{"document":"%s","evidence":' "$content"
    cat "$dir/evidence"
    printf '}'
} | call POST /v1/verify >"$dir/report"
echo "verify evidence $(member verdict "$dir/report")"
printf '{"document":"%s","cms":"%s"}' "$content" "$(member signature "$dir/cms")" | call POST /v1/verify >"$dir/report"
echo "verify cms $(member verdict "$dir/report")"

# 5. A time-stamp by itself.
printf '{"digest":{"algorithm":"SM3","value":"%s"}}' "$digest" | call POST /v1/timestamp >"$dir/stamp"
echo "timestamp $(member gen_time "$dir/stamp")"

# 6. The same act again gives the same record.
printf %s "$inside" | call POST /v1/sign -H "Idempotency-Key: $visit-cms-content" >"$dir/again"
echo "again $(member record_id "$dir/again") replayed $(member replayed "$dir/again")"
