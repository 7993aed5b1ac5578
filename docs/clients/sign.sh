#!/bin/sh
# sign.sh sends one authenticated request to the appliance with nothing but curl and OpenSSL 1.1.1 or later: an
# example of docs/api-auth.md, and run by the tests.
#
#   usage: sign.sh METHOD URL [BODY-FILE] [curl option ...]
#
# YINJIAN_APP holds the application's id, YINJIAN_KEY_FILE names a file with the key in hex. The answer goes to
# standard output. Pass an Idempotency-Key with: -H 'Idempotency-Key: visit-4711-discharge'.
#
# The key appears among openssl's arguments, where other users of this machine can read it: fit for trying out, not
# for production.
set -eu

method=$1 url=$2
shift 2
body=/dev/null
if [ $# -gt 0 ] && [ -f "$1" ]; then
    body=$1
    shift
fi

rest=${url#*://}
host=$(printf %s "${rest%%/*}" | tr 'A-Z' 'a-z')
target=/${rest#*/}
path=${target%%\?*}
query=
case $target in *\?*) query=$(printf %s "${target#*\?}" | tr '&' '\n' | LC_ALL=C sort | paste -sd '&' -) ;; esac

time=$(date +%s)000
nonce=$(openssl rand -hex 16)
body_sm3=$(openssl dgst -sm3 -r "$body" | cut -d ' ' -f 1)
key=$(cat "$YINJIAN_KEY_FILE")

sig=$(printf '%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s' \
    YJ1-HMAC-SM3 "$method" "$path" "$query" "$host" "$YINJIAN_APP" "$time" "$nonce" "$body_sm3" |
    openssl dgst -sm3 -mac HMAC -macopt "hexkey:$key" -binary | openssl base64 -A)

if [ "$body" != /dev/null ]; then
    set -- -H 'Content-Type: application/json' --data-binary "@$body" "$@"
fi
exec curl -sS --tlsv1.3 -X "$method" \
    -H "Authorization: YJ1-HMAC-SM3 app=$YINJIAN_APP,time=$time,nonce=$nonce,sig=$sig" "$@" "$url"
