package tsa

import (
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"time"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

const maxSerialBits = 160 // RFC 3161 §2.4.2: users must be ready for so much

// encodeHead is TSTInfo's beginning, the same in every token of a unit.
func encodeHead(policy asn1.ObjectIdentifier) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1Int64(1)
	b.AddASN1ObjectIdentifier(policy)
	return b.Bytes()
}

// encodeInfo is the DER of TSTInfo:
//
//	TSTInfo ::= SEQUENCE { version, policy, messageImprint, serialNumber, genTime, accuracy OPTIONAL,
//	  ordering DEFAULT FALSE, nonce OPTIONAL, tsa [0] OPTIONAL, extensions [1] OPTIONAL }
//
// ordering is false unless the unit promises it: several sessions sign at once. tsa, which repeats what the certificate
// says, is in tail if it is wanted.
func (t *Token) encodeInfo(head, tail []byte) ([]byte, error) {
	if t.Imprint.raw == nil {
		return nil, errors.New("no imprint")
	}
	if t.Nonce != nil && t.Nonce.BitLen() > 8*maxNonceBytes {
		return nil, fmt.Errorf("nonce of %d bits", t.Nonce.BitLen())
	}
	if year := t.GenTime.Year(); year < 1970 || year > 9999 {
		return nil, fmt.Errorf("genTime %v", t.GenTime)
	}
	const room = 4 // for the header, whose length is known last
	b := append(make([]byte, room, 256), head...)
	b = append(b, t.Imprint.raw...)
	b = appendInteger(b, t.Serial)

	// RFC 3161 §2.4.2: Z, and ".999" drops trailing zeros and the point with them
	at := len(b) + 2
	b = t.GenTime.AppendFormat(append(b, byte(der.GeneralizedTime), 0), "20060102150405.999Z")
	b[at-1] = byte(len(b) - at)

	at = len(b) + 2
	b = append(b, byte(der.SEQUENCE), 0)
	if seconds := t.Accuracy / time.Second; seconds > 0 {
		b = appendSmall(b, der.INTEGER, int(seconds))
	}
	if millis := t.Accuracy % time.Second / time.Millisecond; millis > 0 {
		b = appendSmall(b, 0x80, int(millis))
	}
	b[at-1] = byte(len(b) - at)

	if t.Ordering {
		b = append(b, byte(der.BOOLEAN), 1, 0xff)
	}
	if t.Nonce != nil {
		b = appendInteger(b, t.Nonce)
	}
	b = append(b, tail...)
	var header [room]byte
	h := appendHeader(header[:0], len(b)-room)
	b = b[room-len(h):]
	copy(b, h)
	return b, nil
}

// encodeName is the field tsa: [0] EXPLICIT of GeneralName's directoryName.
func encodeName(subject []byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(0xa0, func(b *cryptobyte.Builder) {
		b.AddASN1(0xa4, func(b *cryptobyte.Builder) { b.AddBytes(subject) })
	})
	return b.BytesOrPanic()
}

// appendHeader writes the header of a SEQUENCE; a token is far below 16 MiB.
func appendHeader(b []byte, content int) []byte {
	switch {
	case content > 0xffff:
		return append(b, byte(der.SEQUENCE), 0x83, byte(content>>16), byte(content>>8), byte(content))
	case content > 0xff:
		return append(b, byte(der.SEQUENCE), 0x82, byte(content>>8), byte(content))
	case content > 0x7f:
		return append(b, byte(der.SEQUENCE), 0x81, byte(content))
	}
	return append(b, byte(der.SEQUENCE), byte(content))
}

// appendInteger writes an INTEGER; serial numbers and nonces are far below 127 octets.
func appendInteger(b []byte, n *big.Int) []byte {
	// two's complement: a negative number is -n-1 with each bit turned round
	flip := byte(0)
	if n.Sign() < 0 {
		n, flip = new(big.Int).Not(n), 0xff
	}
	octets := n.BitLen()/8 + 1 // one bit more, for the sign
	at := len(b) + 2
	b = slices.Grow(append(b, byte(der.INTEGER), byte(octets)), octets)[:at+octets]
	n.FillBytes(b[at:])
	for i := range b[at:] {
		b[at+i] ^= flip
	}
	return b
}

// appendSmall writes an INTEGER in [0, 32767] under a tag.
func appendSmall(b []byte, tag der.Tag, n int) []byte {
	if n > 0x7f {
		return append(b, byte(tag), 2, byte(n>>8), byte(n))
	}
	return append(b, byte(tag), 1, byte(n))
}

var errTSTInfo = errors.New("tsa: not DER of a TSTInfo")

// parseInfo fills t from a TSTInfo. Critical extensions are refused, since none is known here.
func (t *Token) parseInfo(in []byte) error {
	s := cryptobyte.String(in)
	var body, version, serial, text cryptobyte.String
	if !s.ReadASN1(&body, der.SEQUENCE) || !s.Empty() || !readInteger(&body, &version) {
		return errTSTInfo
	}
	if len(version) != 1 || version[0] != 1 {
		return fmt.Errorf("tsa: TSTInfo version %x, want 1", []byte(version))
	}
	if !body.ReadASN1ObjectIdentifier(&t.Policy) {
		return fmt.Errorf("policy: %w", errTSTInfo)
	}
	imprint, err := readImprint(&body)
	if err != nil {
		return fmt.Errorf("tsa: TSTInfo: %v", err) // not a RequestError here: no request is at fault
	}
	t.Imprint = imprint
	if !readInteger(&body, &serial) {
		return fmt.Errorf("serialNumber: %w", errTSTInfo)
	}
	if t.Serial = signedInteger(serial); t.Serial.Sign() < 0 || t.Serial.BitLen() > maxSerialBits {
		return fmt.Errorf("serialNumber negative or too long: %w", errTSTInfo)
	}
	if !body.ReadASN1(&text, der.GeneralizedTime) {
		return fmt.Errorf("genTime: %w", errTSTInfo)
	}
	var ok bool
	if t.GenTime, ok = parseGeneralizedTime(text); !ok {
		return fmt.Errorf("genTime: %w", errTSTInfo)
	}
	if body.PeekASN1Tag(der.SEQUENCE) {
		if t.Accuracy, ok = readAccuracy(&body); !ok {
			return fmt.Errorf("accuracy: %w", errTSTInfo)
		}
	}
	if body.PeekASN1Tag(der.BOOLEAN) { // DEFAULT FALSE: DER leaves FALSE out
		if !body.ReadASN1Boolean(&t.Ordering) || !t.Ordering {
			return fmt.Errorf("ordering: %w", errTSTInfo)
		}
	}
	if body.PeekASN1Tag(der.INTEGER) {
		var nonce cryptobyte.String
		if !readInteger(&body, &nonce) || len(nonce) > maxNonceBytes {
			return fmt.Errorf("nonce: %w", errTSTInfo)
		}
		t.Nonce = signedInteger(nonce)
	}
	if body.PeekASN1Tag(0xa0) { // tsa [0] EXPLICIT GeneralName: a hint, the signature says who it was
		var name, any cryptobyte.String
		if !body.ReadASN1(&name, 0xa0) || !name.ReadAnyASN1Element(&any, nil) || !name.Empty() {
			return fmt.Errorf("tsa: %w", errTSTInfo)
		}
	}
	if body.PeekASN1Tag(0xa1) {
		if err := checkExtensions(&body); err != nil {
			return err
		}
	}
	if !body.Empty() {
		return errTSTInfo
	}
	return nil
}

// checkExtensions takes [1] IMPLICIT Extensions off s.
func checkExtensions(s *cryptobyte.String) error {
	var extensions cryptobyte.String
	if !s.ReadASN1(&extensions, 0xa1) || extensions.Empty() {
		return fmt.Errorf("extensions: %w", errTSTInfo)
	}
	for !extensions.Empty() {
		var e, value cryptobyte.String
		var oid asn1.ObjectIdentifier
		critical := false
		if !extensions.ReadASN1(&e, der.SEQUENCE) || !e.ReadASN1ObjectIdentifier(&oid) ||
			e.PeekASN1Tag(der.BOOLEAN) && !(e.ReadASN1Boolean(&critical) && critical) ||
			!e.ReadASN1(&value, der.OCTET_STRING) || !e.Empty() {
			return fmt.Errorf("extensions: %w", errTSTInfo)
		}
		if critical {
			return fmt.Errorf("tsa: TSTInfo has the critical extension %v, unknown here", oid)
		}
	}
	return nil
}

// readAccuracy takes Accuracy ::= SEQUENCE { seconds INTEGER OPTIONAL, millis [0] INTEGER (1..999) OPTIONAL,
// micros [1] INTEGER (1..999) OPTIONAL } off s.
func readAccuracy(s *cryptobyte.String) (time.Duration, bool) {
	var seq cryptobyte.String
	if !s.ReadASN1(&seq, der.SEQUENCE) {
		return 0, false
	}
	var total time.Duration
	for _, part := range []struct {
		tag      der.Tag
		low, max int64
		unit     time.Duration
	}{
		{der.INTEGER, 0, 1 << 31, time.Second}, // beyond a century nobody means it, and Duration ends at three
		{0x80, 1, 999, time.Millisecond},
		{0x81, 1, 999, time.Microsecond},
	} {
		if !seq.PeekASN1Tag(part.tag) {
			continue
		}
		var n int64
		if !seq.ReadASN1Int64WithTag(&n, part.tag) || n < part.low || n > part.max {
			return 0, false
		}
		total += time.Duration(n) * part.unit
	}
	return total, seq.Empty()
}

// parseGeneralizedTime reads YYYYMMDDhhmmss[.s…]Z with at most nine digits and no trailing zero of the fraction (RFC 3161
// §2.4.2). The sixtieth second of a leap second is refused: no stamp of ours is made in it.
func parseGeneralizedTime(text []byte) (time.Time, bool) {
	s := string(text)
	if len(s) < 15 || s[len(s)-1] != 'Z' {
		return time.Time{}, false
	}
	s = s[:len(s)-1]
	for i, c := range s {
		if (c < '0' || c > '9') && i != 14 {
			return time.Time{}, false
		}
	}
	nanos := 0
	if fraction := s[14:]; fraction != "" {
		if len(fraction) < 2 || len(fraction) > 10 || fraction[0] != '.' || fraction[len(fraction)-1] == '0' {
			return time.Time{}, false
		}
		nanos, _ = strconv.Atoi((fraction[1:] + "00000000")[:9])
	}
	field := func(from, to int) int {
		n, _ := strconv.Atoi(s[from:to])
		return n
	}
	t := time.Date(field(0, 4), time.Month(field(4, 6)), field(6, 8), field(8, 10), field(10, 12), field(12, 14), nanos, time.UTC)
	// time.Date normalises the 30th of February; then the two texts differ
	return t, t.Format("20060102150405") == s[:14]
}
