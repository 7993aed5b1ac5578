#!/bin/sh
# sign.sh sends one authenticated request to the appliance with nothing but curl and OpenSSL 1.1.1 or later, and sends it
# again while that may help and is safe: an example of docs/api-auth.md and docs/clients/README.md, and run by the tests.
#
#   usage: sign.sh METHOD URL [BODY-FILE] [curl option ...]
#          sign.sh header METHOD URL [BODY-FILE]
#
# YINJIAN_KEY_FILE names the application's credentials (credentials/<application>.json, as the appliance wrote it), or a
# file with nothing but the key in 64 hexadecimal digits; then YINJIAN_APP holds the application's id. Options for curl
# that are needed or useful:
#
#   --cacert tls-ca.pem                             the CA that the appliance's TLS certificate is under
#   -H 'Idempotency-Key: visit-4711-discharge'      with POST /v1/sign; the same for a retry
#
# The answer goes to standard output, a refusal (problem+json) too, and then its reason to standard error. Exits 0, 2
# (misused), 3 (refused or not sent: nothing was signed) or 4 (outcome unknown: run it again with the same Idempotency-Key).
#
# curl's --retry would send the same nonce again, which the appliance refuses: the loop below signs each attempt anew.
# Times, in seconds: YINJIAN_CONNECT_SECONDS (5), YINJIAN_ATTEMPT_SECONDS (45; the appliance may take 30),
# YINJIAN_TOTAL_SECONDS (120). A PIN (/v1/authorizations) is sent once only, since a wrong one counts.
#
# `header` prints the Authorization header and sends nothing; YINJIAN_TIME and YINJIAN_NONCE may fix what is otherwise
# fresh, for comparing your own code with it.
#
# The key is never printed, and is no program's argument: HMAC (RFC 2104) is put together here from two runs of SM3, with
# the printf that is built into dash, bash and busybox.
set +x
set -eu

fail() {
    printf 'sign.sh: %s\n' "$1" >&2
    exit 2
}

send=true
if [ "${1:-}" = header ]; then
    send=false
    shift
fi
[ $# -ge 2 ] || fail 'usage: sign.sh [header] METHOD URL [BODY-FILE] [curl option ...]'
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

# 3. The string to sign, and the header of one attempt.
rest=${url#*://}
host=$(printf %s "${rest%%/*}" | tr 'A-Z' 'a-z')
case $url in https://*) host=${host%:443} ;; esac # as curl writes the Host header
target=/${rest#*/}
path=${target%%\?*}
query=
case $target in *\?*) query=$(printf %s "${target#*\?}" | tr '&' '\n' | LC_ALL=C sort | paste -sd '&' -) ;; esac
body_sm3=$(openssl dgst -sm3 -r "$body" | cut -d ' ' -f 1)

authorization() { # TIME NONCE
    sig=$({
        printf "$opad"
        {
            printf "$ipad"
            printf '%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s' \
                YJ1-HMAC-SM3 "$method" "$path" "$query" "$host" "$app" "$1" "$2" "$body_sm3"
        } | openssl dgst -sm3 -binary
    } | openssl dgst -sm3 -binary | openssl base64 -A)
    printf 'YJ1-HMAC-SM3 app=%s,time=%s,nonce=%s,sig=%s' "$app" "$1" "$2" "$sig"
}

now() { # milliseconds, where date knows them: whole seconds lie before the start of an appliance just started
    time=$(date +%s%3N)
    case $time in *[!0-9]* | ??????????????*) time=$(date +%s)000 ;; esac
    printf %s "$time"
}

if [ $send = false ]; then
    authorization "${YINJIAN_TIME:-$(now)}" "${YINJIAN_NONCE:-$(openssl rand -hex 16)}"
    echo
    exit
fi

# 4. The attempts: the same body and Idempotency-Key, a new time and nonce.
if [ "$body" != /dev/null ]; then
    set -- -H 'Content-Type: application/json' --data-binary "@$body" "$@"
fi
total=${YINJIAN_TOTAL_SECONDS:-120}
each=${YINJIAN_ATTEMPT_SECONDS:-45}
begun=$(date +%s)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 4' HUP INT TERM
unknown=false # whether any attempt so far may have signed
attempt=0 pause=200
while :; do
    attempt=$((attempt + 1))
    left=$((total - $(date +%s) + begun))
    [ "$left" -ge 1 ] || left=1
    [ "$each" -le "$left" ] || each=$left
    : >"$dir/answer" >"$dir/head" # nothing of an earlier attempt
    # -w: the status, when TLS was ready (0 if never: then nothing was sent), the answer's type.
    got=$(curl -sS --tlsv1.3 --connect-timeout "${YINJIAN_CONNECT_SECONDS:-5}" --max-time "$each" -X "$method" \
        -H "Authorization: $(authorization "$(now)" "$(openssl rand -hex 16)")" "$@" \
        -o "$dir/answer" -D "$dir/head" -w '%{http_code} %{time_appconnect} %{content_type}' "$url" 2>"$dir/why") && code=0 || code=$?
    status=${got%% *} type=${got#* * } after=0
    case $code in
    0)
        case $status in 2??) cat "$dir/answer" && exit 0 ;; esac
        case $type in
        application/problem+json*)
            retry=$(sed -n 's/.*"retry":"\([a-z-]*\)".*/\1/p' "$dir/answer")
            # A nonce is known that was used once only: something in between sent the request twice, and one copy came through.
            ! grep -q '"code":"replayed_request"' "$dir/answer" || unknown=true
            ;;
        *) # something in between answers
            case $status in 429) retry=later ;; 50[234]) retry=same-key ;; *) retry=never ;; esac
            case $status in 4??) ;; *) unknown=true ;; esac
            ;;
        esac
        [ "$retry" != same-key ] || unknown=true
        after=$(tr -d '\r' <"$dir/head" | sed -n 's/^[Rr]etry-[Aa]fter: *\([0-9]\{1,6\}\)$/\1/p')
        ;;
    51 | 58 | 59 | 60 | 66 | 77 | 82 | 83 | 90 | 91) retry=never ;; # a wrong certificate or host name, a CA file that is none
    5 | 6 | 7 | 35) retry=later ;;                                  # no connection, or its handshake was cut off
    16 | 18 | 28 | 5[256] | 92 | 95 | 96)
        retry=same-key
        case $got in *' 0.000000 '*) ;; *) unknown=true ;; esac
        ;;
    *) retry=never ;; # an option that curl does not know, a full disk
    esac
    # Pauses double from 200 ms to 5 s, between half and whole at random, and are never shorter than Retry-After.
    wait=$((pause / 2 + $(od -An -N2 -tu2 /dev/urandom) % (pause / 2 + 1)))
    [ "$wait" -ge "$((${after:-0} * 1000))" ] || wait=$((after * 1000))
    pause=$((pause * 2))
    [ $pause -le 5000 ] || pause=5000
    case $retry in resign | same-key | later) ;; *) break ;; esac
    [ "$path" != /v1/authorizations ] && [ $attempt -lt 8 ] || break
    [ "$(($(date +%s) - begun + wait / 1000))" -lt "$total" ] || break
    sleep "$((wait / 1000)).$(printf %03d $((wait % 1000)))"
done

# 5. It did not succeed: why, and whether it may have been signed.
if [ "$code" = 0 ]; then
    cat "$dir/answer"
    printf 'sign.sh: refused, status %s: %s\n' "$status" \
        "$(sed -n 's/.*"detail":"\([^"]*\)".*"code":"\([^"]*\)".*"next":"\([^"]*\)".*/\2: \1; \3/p' "$dir/answer")" >&2
else
    printf 'sign.sh: no answer after %s attempts: %s\n' $attempt "$(cat "$dir/why")" >&2
fi
[ $unknown = false ] || {
    printf 'sign.sh: %s\n' '结果未知，请用同一个 Idempotency-Key 重试 (outcome unknown, run again with the same key)' >&2
    exit 4
}
exit 3
