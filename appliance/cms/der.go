package cms

import (
	"bytes"
	"encoding/asn1"
	"math/bits"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

const (
	classBits   der.Tag = 0xc0 // all zero in universal tags
	constructed der.Tag = 0x20

	tagImplicit0 der.Tag = 0x80 // [0] of a primitive
	tagContext0  der.Tag = 0xa0 // [0] of something constructed, implicit or explicit
	tagContext1  der.Tag = 0xa1
	tagContext4  der.Tag = 0xa4 // GeneralName's directoryName

	maxDepth   = 64      // certificates nest about ten deep
	maxContent = 1 << 30 // bytes; one message is held in memory several times
)

// An AlgorithmIdentifier is RFC 5280 §4.1.1.2's.
type AlgorithmIdentifier struct {
	OID        asn1.ObjectIdentifier
	Parameters []byte // DER, nil where absent
	raw        []byte
}

func newAlgorithm(oid asn1.ObjectIdentifier, parameters []byte) AlgorithmIdentifier {
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		b.AddBytes(parameters)
	})
	return AlgorithmIdentifier{OID: oid, Parameters: parameters, raw: b.BytesOrPanic()}
}

// parameterless reports whether the parameters are absent or NULL. Both are met for every algorithm here: RFC 5754 wants
// digests without, RSA with NULL, and asks readers to take either.
func (a AlgorithmIdentifier) parameterless() bool {
	return a.Parameters == nil || bytes.Equal(a.Parameters, derNULL)
}

// same compares as RFC 6211 §2 needs it: absent and NULL parameters are the same thing.
func (a AlgorithmIdentifier) same(b AlgorithmIdentifier) bool {
	if !a.OID.Equal(b.OID) {
		return false
	}
	return bytes.Equal(a.Parameters, b.Parameters) || a.parameterless() && b.parameterless()
}

var derNULL = []byte{5, 0}

// readAlgorithm takes an AlgorithmIdentifier off s. An implicit tag may stand in for SEQUENCE's.
func readAlgorithm(s *cryptobyte.String, tag der.Tag, out *AlgorithmIdentifier) bool {
	var element, body, parameters cryptobyte.String
	if !s.ReadASN1Element(&element, tag) {
		return false
	}
	out.raw = element
	if !element.ReadASN1(&body, tag) || !body.ReadASN1ObjectIdentifier(&out.OID) {
		return false
	}
	if body.Empty() {
		return true
	}
	if !body.ReadAnyASN1Element(&parameters, nil) || !body.Empty() {
		return false
	}
	out.Parameters = parameters
	return true
}

// readSetOf splits the body of a SET OF and insists on DER's order (X.690 §11.6): as encodings, ascending. Equal elements
// are legal. No encoding is a prefix of another, so that comparing bytes is comparing with zero padding.
func readSetOf(body cryptobyte.String) (elements [][]byte, ok bool) {
	elements, ok = readElements(body)
	if !ok || !slices.IsSortedFunc(elements, bytes.Compare) {
		return nil, false
	}
	return elements, true
}

// readElements is readSetOf for any order.
func readElements(body cryptobyte.String) (elements [][]byte, ok bool) {
	for !body.Empty() {
		var element cryptobyte.String
		if !body.ReadAnyASN1Element(&element, nil) {
			return nil, false
		}
		elements = append(elements, element)
	}
	return elements, true
}

// sortSetOf puts encodings in DER's order, in place.
func sortSetOf(elements [][]byte) { slices.SortFunc(elements, bytes.Compare) }

func addAll(b *cryptobyte.Builder, elements [][]byte) {
	for _, e := range elements {
		b.AddBytes(e)
	}
}

// size is the length of an element with so many octets of content.
func size(content int) int { return 2 + lengthOctets(content) + content }

// lengthOctets is how many octets follow the first of DER's length octets.
func lengthOctets(content int) int {
	if content <= 0x7f {
		return 0
	}
	return (bits.Len(uint(content)) + 7) / 8
}

// appendHeader writes identifier and length of an element with so many octets of content.
func appendHeader(b []byte, tag der.Tag, content int) []byte {
	n := lengthOctets(content)
	if n == 0 {
		return append(b, byte(tag), byte(content))
	}
	b = append(b, byte(tag), 0x80|byte(n))
	for n--; n >= 0; n-- {
		b = append(b, byte(content>>(8*n)))
	}
	return b
}

func appendElement(b []byte, tag der.Tag, content []byte) []byte {
	return append(appendHeader(b, tag, len(content)), content...)
}

// appendOID writes a valid OBJECT IDENTIFIER.
func appendOID(b []byte, oid asn1.ObjectIdentifier) []byte {
	content := make([]byte, 0, 32)
	for i, arc := range oid {
		switch i {
		case 0:
			continue
		case 1:
			arc += 40 * oid[0]
		}
		for n := (bits.Len(uint(arc)|1) - 1) / 7; n > 0; n-- {
			content = append(content, 0x80|byte(arc>>(7*n)))
		}
		content = append(content, byte(arc)&0x7f)
	}
	return appendElement(b, der.OBJECT_IDENTIFIER, content)
}

func sizeOID(oid asn1.ObjectIdentifier) int {
	var b [40]byte
	return len(appendOID(b[:0], oid))
}

func appendAll(b []byte, elements [][]byte) []byte {
	for _, e := range elements {
		b = append(b, e...)
	}
	return b
}

func sizeAll(elements [][]byte) (n int) {
	for _, e := range elements {
		n += len(e)
	}
	return n
}

// checkDER walks every element of in and refuses what BER allows and DER does not, as far as it shows without a schema:
// long lengths, indefinite lengths, constructed strings, loose integers, booleans and bit strings. cryptobyte checks the
// headers. High tag numbers are refused: nothing in our formats uses them.
func checkDER(in cryptobyte.String, depth int) bool {
	if depth > maxDepth {
		return false
	}
	for !in.Empty() {
		var body cryptobyte.String
		var tag der.Tag
		if !in.ReadAnyASN1(&body, &tag) {
			return false
		}
		if tag&classBits == 0 && !checkUniversal(tag, body) {
			return false
		}
		if tag&constructed != 0 && !checkDER(body, depth+1) {
			return false
		}
	}
	return true
}

func checkUniversal(tag der.Tag, body []byte) bool {
	switch tag {
	case der.SEQUENCE, der.SET:
		return true
	case der.SEQUENCE &^ constructed, der.SET &^ constructed, 0: // primitive where constructed is due; end-of-contents
		return false
	case der.BOOLEAN:
		return len(body) == 1 && (body[0] == 0 || body[0] == 0xff)
	case der.INTEGER, der.ENUM:
		return len(body) == 1 ||
			len(body) > 1 && (body[0] != 0 || body[1]&0x80 != 0) && (body[0] != 0xff || body[1]&0x80 == 0)
	case der.NULL:
		return len(body) == 0
	case der.OBJECT_IDENTIFIER:
		return len(body) > 0 && body[len(body)-1]&0x80 == 0
	case der.BIT_STRING:
		if len(body) == 0 || body[0] > 7 {
			return false
		}
		if len(body) == 1 {
			return body[0] == 0
		}
		return body[len(body)-1]&(1<<body[0]-1) == 0
	}
	return tag&constructed == 0 // strings and times
}

// oneElement reports whether der is exactly one well-formed DER element.
func oneElement(in []byte) bool {
	s := cryptobyte.String(in)
	var element cryptobyte.String
	return s.ReadAnyASN1Element(&element, nil) && s.Empty() && checkDER(element, 0)
}
