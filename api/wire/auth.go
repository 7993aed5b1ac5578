package wire

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
)

// Scheme opens the Authorization header and the string to sign. A change of what is signed needs a new scheme.
const Scheme = "YJ1-HMAC-SM3"

// An Authorization is the parsed header
//
//	Authorization: YJ1-HMAC-SM3 app=<id>,time=<time>,nonce=<nonce>,sig=<base64>
//
// with exactly these parameters in this order, one space after the scheme and none elsewhere.
type Authorization struct {
	App   string    // [a-z0-9-]{2,32}
	Time  string    // as sent, because this text is signed: 13 digits of Unix milliseconds, or RFC 3339
	At    time.Time // what Time says, UTC
	Nonce string    // [A-Za-z0-9_-]{16,64}
	MAC   []byte    // 32 bytes
}

// String is the header's value.
func (a *Authorization) String() string {
	return Scheme + " app=" + a.App + ",time=" + a.Time + ",nonce=" + a.Nonce + ",sig=" + base64.StdEncoding.EncodeToString(a.MAC)
}

// ParseAuthorization reads the header's value. Only the one spelling that [Authorization.String] writes is taken.
func ParseAuthorization(header string) (*Authorization, error) {
	const longest = len(Scheme) + len(" app=,time=,nonce=,sig=") + 32 + 35 + 64 + 44
	if len(header) > longest {
		return nil, errors.New("wire: authorization: header too long")
	}
	rest, ok := strings.CutPrefix(header, Scheme+" ")
	if !ok {
		return nil, fmt.Errorf("wire: authorization: scheme is not %s", Scheme)
	}
	parts := strings.Split(rest, ",")
	names := [...]string{"app=", "time=", "nonce=", "sig="}
	if len(parts) != len(names) {
		return nil, errors.New("wire: authorization: want app, time, nonce and sig")
	}
	for i, name := range names {
		if parts[i], ok = strings.CutPrefix(parts[i], name); !ok {
			return nil, fmt.Errorf("wire: authorization: parameter %d is not %s", i+1, strings.TrimSuffix(name, "="))
		}
	}
	a := &Authorization{App: parts[0], Time: parts[1], Nonce: parts[2]}
	if !between(a.App, 2, 32, "abcdefghijklmnopqrstuvwxyz0123456789-") {
		return nil, errors.New("wire: authorization: app is not [a-z0-9-]{2,32}")
	}
	if !between(a.Nonce, 16, 64, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") {
		return nil, errors.New("wire: authorization: nonce is not [A-Za-z0-9_-]{16,64}")
	}
	var err error
	if a.At, err = parseTime(a.Time); err != nil {
		return nil, err
	}
	if len(parts[3]) != 44 {
		return nil, errors.New("wire: authorization: sig is not base64 of 32 bytes")
	}
	if a.MAC, err = base64.StdEncoding.Strict().DecodeString(parts[3]); err != nil || len(a.MAC) != sm3.Size {
		return nil, errors.New("wire: authorization: sig is not base64 of 32 bytes")
	}
	return a, nil
}

func parseTime(s string) (time.Time, error) {
	if between(s, 13, 13, "0123456789") {
		ms, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return time.Time{}, fmt.Errorf("wire: authorization: time: %v", err)
		}
		return time.UnixMilli(ms).UTC(), nil
	}
	if len(s) > 35 {
		return time.Time{}, errors.New("wire: authorization: time too long")
	}
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}, errors.New("wire: authorization: time is neither 13 digits of Unix milliseconds nor RFC 3339")
	}
	// The replay window counts Unix milliseconds; nobody sends a request outside these years.
	if at = at.UTC(); at.Year() < 2001 || at.Year() > 2286 {
		return time.Time{}, errors.New("wire: authorization: time out of range")
	}
	return at, nil
}

func between(s string, least, most int, alphabet string) bool {
	if len(s) < least || len(s) > most {
		return false
	}
	for i := range len(s) {
		if strings.IndexByte(alphabet, s[i]) < 0 {
			return false
		}
	}
	return true
}

// A Signable is what the MAC covers of one request.
type Signable struct {
	Method string // upper case, as in the request line
	Path   string // as in the request line: percent-encoding untouched, without "?" and query
	Query  string // what follows "?", untouched; may be empty
	Host   string // the Host header, with its port if it has one
	Body   []byte // all of it, empty without one
}

// StringToSign is the exact byte string that HMAC-SM3 is computed over: nine lines joined by one line feed, without a
// line feed at the end:
//
//	YJ1-HMAC-SM3
//	method
//	path
//	canonical query
//	host, ASCII upper case letters made lower case
//	app
//	time
//	nonce
//	lower-case hex of SM3(body)
//
// The canonical query is the query as sent, split at "&", the pieces sorted bytewise and joined by "&" again; nothing
// is decoded or re-encoded. Without a query the line is empty. Time and nonce are the texts of the header.
func StringToSign(r Signable, app, at, nonce string) string {
	digest := sm3.Sum(r.Body)
	return strings.Join([]string{
		Scheme, r.Method, r.Path, canonicalQuery(r.Query), lowerASCII(r.Host), app, at, nonce, hex.EncodeToString(digest[:]),
	}, "\n")
}

func canonicalQuery(raw string) string {
	if !strings.Contains(raw, "&") {
		return raw
	}
	pieces := strings.Split(raw, "&")
	slices.Sort(pieces)
	return strings.Join(pieces, "&")
}

func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

// MAC is HMAC-SM3 (GB/T 15852.2, RFC 2104 construction) of the string to sign, 32 bytes.
func MAC(key []byte, r Signable, app, at, nonce string) []byte {
	return MACOf(key, StringToSign(r, app, at, nonce))
}

// MACOf is HMAC-SM3 of a string to sign. RFC 2104 §2 is written out: crypto/hmac asks for memory eight times, for each request.
func MACOf(key []byte, text string) []byte {
	if len(key) > sm3.BlockSize {
		sum := sm3.Sum(key)
		key = sum[:]
	}
	var room [sm3.BlockSize + 512]byte // longer than nearly every text
	inner := room[:sm3.BlockSize]
	var outer [sm3.BlockSize + sm3.Size]byte
	copy(inner, key)
	copy(outer[:], key)
	for i := range sm3.BlockSize {
		inner[i] ^= 0x36
		outer[i] ^= 0x5c
	}
	sum := sm3.Sum(append(inner, text...))
	copy(outer[sm3.BlockSize:], sum[:])
	mac := sm3.Sum(outer[:])
	return mac[:]
}
