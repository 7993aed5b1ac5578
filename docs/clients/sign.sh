#!/bin/sh
# sign.sh sends one authenticated request to the appliance with nothing but curl and OpenSSL 1.1.1 or later: an
# example of docs/api-auth.md, and run by the tests.
#
#   usage: sign.sh METHOD URL [BODY-FILE] [curl option ...]
#
# YINJIAN_KEY_FILE names the application's credentials (credentials/<application>.json, as the appliance wrote it), or a
# file with nothing but the key in 64 hexadecimal digits; then YINJIAN_APP holds the application's id. The answer goes to
# standard output. Options for curl that are needed or useful:
#
#   --cacert tls-ca.pem                             the CA that the appliance's TLS certificate is under
#   -H 'Idempotency-Key: visit-4711-discharge'      with POST /v1/sign; the same for a retry
#
# The key is never printed, and is no program's argument: HMAC (RFC 2104) is put together here from two runs of SM3, with
# the printf that is built into dash, bash and busybox.
set +x
set -eu

fail() {
    printf 'sign.sh: %s\n' "$1" >&2
    exit 2
}

[ $# -ge 2 ] || fail 'usage: sign.sh METHOD URL [BODY-FILE] [curl option ...]'
method=$1 url=$2
shift 2
body=/dev/null
case ${1:--} in
-*) ;;
*)
    [ -f "$1" ] || fail "no such file: $1"
    body=$1
    shift
    ;;
esac

# 1. The key. What is wrong with it is said without showing it.
file=${YINJIAN_KEY_FILE:-}
[ -n "$file" ] && [ -r "$file" ] || fail 'YINJIAN_KEY_FILE names no file that can be read'
text=$(tr -d ' \t\r\n' <"$file")
app=${YINJIAN_APP:-}
case $text in
'{'*)
    owner=$(printf %s "$text" | sed -n 's/.*[{,]"application":"\([a-z0-9-]*\)"[,}].*/\1/p')
    text=$(printf %s "$text" | sed -n 's/.*[{,]"key_hex":"\([^"]*\)"[,}].*/\1/p')
    [ -n "$owner" ] || fail "$file names no application"
    [ "${app:-$owner}" = "$owner" ] || fail "$file is of application $owner, YINJIAN_APP is $app"
    app=$owner
    ;;
esac
[ -n "$app" ] || fail 'YINJIAN_APP must hold the application: the key file does not name it'
case $text in
*[!0-9A-Fa-f]*) fail "$file holds no key: 64 hexadecimal digits are wanted" ;;
esac
[ ${#text} -eq 64 ] || fail "$file holds no key: 64 hexadecimal digits are wanted"

# 2. RFC 2104: the key, filled up with zeros to SM3's block of 64 bytes, XOR 0x36 and XOR 0x5c, as printf's octal.
ipad= opad= i=0
while [ $i -lt 64 ]; do
    byte=0
    if [ -n "$text" ]; then
        rest=${text#??}
        byte=$((0x${text%"$rest"}))
        text=$rest
    fi
    x=$((byte ^ 0x36)) y=$((byte ^ 0x5c))
    ipad=$ipad\\$((x >> 6))$((x >> 3 & 7))$((x & 7))
    opad=$opad\\$((y >> 6))$((y >> 3 & 7))$((y & 7))
    i=$((i + 1))
done

# 3. The string to sign.
rest=${url#*://}
host=$(printf %s "${rest%%/*}" | tr 'A-Z' 'a-z')
target=/${rest#*/}
path=${target%%\?*}
query=
case $target in *\?*) query=$(printf %s "${target#*\?}" | tr '&' '\n' | LC_ALL=C sort | paste -sd '&' -) ;; esac
time=$(date +%s%3N) # milliseconds, where date knows them: whole seconds lie before the start of an appliance just started
case $time in *[!0-9]* | ??????????????*) time=$(date +%s)000 ;; esac
nonce=$(openssl rand -hex 16)
body_sm3=$(openssl dgst -sm3 -r "$body" | cut -d ' ' -f 1)

sig=$({
    printf "$opad"
    {
        printf "$ipad"
        printf '%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s' \
            YJ1-HMAC-SM3 "$method" "$path" "$query" "$host" "$app" "$time" "$nonce" "$body_sm3"
    } | openssl dgst -sm3 -binary
} | openssl dgst -sm3 -binary | openssl base64 -A)

if [ "$body" != /dev/null ]; then
    set -- -H 'Content-Type: application/json' --data-binary "@$body" "$@"
fi
exec curl -sS --tlsv1.3 -X "$method" \
    -H "Authorization: YJ1-HMAC-SM3 app=$app,time=$time,nonce=$nonce,sig=$sig" "$@" "$url"
