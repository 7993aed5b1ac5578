package tsa

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"fmt"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// A Failure is a bit of PKIFailureInfo (RFC 3161 §2.4.2).
type Failure int

const (
	BadAlg              Failure = 0  // hash algorithm unknown or refused
	BadRequest          Failure = 2  // version or transaction not supported
	BadDataFormat       Failure = 5  // not the DER of a TimeStampReq
	TimeNotAvailable    Failure = 14 // the time source
	UnacceptedPolicy    Failure = 15
	UnacceptedExtension Failure = 16
	AddInfoNotAvailable Failure = 17 // never sent
	SystemFailure       Failure = 25
)

var failureNames = map[Failure]string{
	BadAlg: "badAlg", BadRequest: "badRequest", BadDataFormat: "badDataFormat", TimeNotAvailable: "timeNotAvailable",
	UnacceptedPolicy: "unacceptedPolicy", UnacceptedExtension: "unacceptedExtension",
	AddInfoNotAvailable: "addInfoNotAvailable", SystemFailure: "systemFailure",
}

// String is the name that RFC 3161 gives.
func (f Failure) String() string {
	if name, ok := failureNames[f]; ok {
		return name
	}
	return fmt.Sprintf("failure(%d)", int(f))
}

// A RequestError is the requester's fault and safe to show to them.
type RequestError struct {
	Failure Failure
	Detail  string
}

func (e *RequestError) Error() string { return "tsa: " + e.Failure.String() + ": " + e.Detail }

// PKIStatus values (RFC 3161 §2.4.2).
const (
	StatusGranted         = 0
	StatusGrantedWithMods = 1
	StatusRejection       = 2
	maxStatus             = 5
)

const maxFailures = 64 // bits of PKIFailureInfo; RFC 4210 has 27

// encodeGranted is a TimeStampResp with a token, which is appended last so that both share one array.
func encodeGranted(size int, token func([]byte) []byte) (response, tokenDER []byte) {
	status := [...]byte{0x30, 3, 2, 1, StatusGranted}
	b := appendHeader(make([]byte, 0, 5+len(status)+size), len(status)+size)
	b = append(b, status[:]...)
	at := len(b)
	b = token(b)
	return b, b[at:]
}

// encodeRejection is a TimeStampResp without token. failInfo is a named bit list: DER drops the trailing zero bits.
func encodeRejection(f Failure, text string) []byte {
	bits := make([]byte, f/8+1)
	bits[f/8] = 0x80 >> (f % 8)
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1Int64(StatusRejection)
			b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1(der.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte(text)) })
			})
			b.AddASN1(der.BIT_STRING, func(b *cryptobyte.Builder) {
				b.AddUint8(uint8(7 - f%8))
				b.AddBytes(bits)
			})
		})
	})
	return b.BytesOrPanic()
}

// Reject encodes a rejection, for a transport that has to refuse before a request is read (too large, over quota).
func Reject(f Failure, text string) []byte {
	if _, ok := failureNames[f]; !ok {
		f = SystemFailure
	}
	return encodeRejection(f, text)
}

// A Response is a TimeStampResp.
type Response struct {
	Status   int      // StatusGranted …
	Text     []string // statusString
	Failures []Failure
	Token    *Token // nil unless granted
}

// Err is nil for a granted response.
func (r *Response) Err() error {
	if r.Token != nil {
		return nil
	}
	return fmt.Errorf("tsa: refused with status %d %v %q", r.Status, r.Failures, r.Text)
}

// ParseResponse reads a DER TimeStampResp, its token included. A token is there exactly when the status is granted or
// grantedWithMods; nothing is verified yet.
func ParseResponse(in []byte) (*Response, error) {
	broken := errors.New("tsa: not DER of a TimeStampResp")
	s := cryptobyte.String(bytes.Clone(in))
	var body, info, status cryptobyte.String
	if !s.ReadASN1(&body, der.SEQUENCE) || !s.Empty() || !body.ReadASN1(&info, der.SEQUENCE) || !readInteger(&info, &status) {
		return nil, broken
	}
	if len(status) != 1 || status[0] > maxStatus {
		return nil, fmt.Errorf("tsa: status %x is unknown", []byte(status))
	}
	r := &Response{Status: int(status[0])}
	if info.PeekASN1Tag(der.SEQUENCE) { // PKIFreeText ::= SEQUENCE SIZE (1..MAX) OF UTF8String
		var texts cryptobyte.String
		if !info.ReadASN1(&texts, der.SEQUENCE) || texts.Empty() {
			return nil, broken
		}
		for !texts.Empty() {
			var text cryptobyte.String
			if !texts.ReadASN1(&text, der.UTF8String) || !utf8.Valid(text) {
				return nil, broken
			}
			r.Text = append(r.Text, string(text))
		}
	}
	if !info.Empty() {
		var bits asn1.BitString
		if !info.ReadASN1BitString(&bits) || !info.Empty() || bits.BitLength > maxFailures {
			return nil, broken
		}
		for i := range bits.BitLength {
			if bits.At(i) == 1 {
				r.Failures = append(r.Failures, Failure(i))
			}
		}
		if len(bits.Bytes) > 0 && bits.At(bits.BitLength-1) == 0 { // a named bit list, not trimmed
			return nil, broken
		}
	}
	if granted := r.Status <= StatusGrantedWithMods; granted == body.Empty() || granted && len(r.Failures) > 0 {
		return nil, fmt.Errorf("tsa: status %d does not fit the rest of the response", r.Status)
	}
	if body.Empty() {
		return r, nil
	}
	var token cryptobyte.String
	if !body.ReadASN1Element(&token, der.SEQUENCE) || !body.Empty() {
		return nil, broken
	}
	var err error
	r.Token, err = ParseToken(token)
	if err != nil {
		return nil, err
	}
	return r, nil
}
