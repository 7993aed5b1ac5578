package stamping

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"yinjian/ntp"
)

// Requests begin with a byte that says what is asked:
//
//	askToken   | unit | SM3 of label and chain (32) | serial | TimeStampReq | label | u8 certificates | certificates …
//	askState   |
//	askRequest | label | CertificationRequestInfo
//	askReadmit |
//
// Label and chain come along only when they were asked for. Strings are u32 length and bytes, integers big-endian.
const (
	askToken byte = iota + 1
	askState
	askRequest
	askReadmit
)

// Answers begin with a byte that says what came of it:
//
//	answerToken     | reading | signature
//	answerState     | reading
//	answerSignature | signature
//	answerNoTime    | reading | why
//	answerNotValid  | reading | why
//	answerNoChain   |                  the unit's label and chain are wanted
//	answerRefused   | u32 PKIFailureInfo | why
//
// A reading is u64 Unix nanoseconds (0: none) | u64 bound, nanoseconds | state | provenance.
const (
	answerToken byte = iota + 1
	answerState
	answerSignature
	answerNoTime
	answerNotValid
	answerNoChain
	answerRefused
)

// maxPart bounds each string; hsm/worker bounds the whole.
const maxPart = 64 << 10

// maxCertificates bounds a unit's chain.
const maxCertificates = 8

var errFrame = errors.New("tsa/stamping: malformed message")

func addPart[T string | []byte](b []byte, v T) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...)
}

func addReading(b []byte, r ntp.Reading) []byte {
	nanos := uint64(0)
	if !r.Time.IsZero() {
		nanos = uint64(r.Time.UnixNano())
	}
	b = binary.BigEndian.AppendUint64(b, nanos)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Bound))
	return addPart(addPart(b, string(r.State)), r.Provenance)
}

// A parts takes a message apart. After the first misfit everything it answers is zero, and done answers errFrame.
type parts struct {
	b   []byte
	bad bool
}

func (p *parts) take(n int) []byte {
	if p.bad || n > len(p.b) {
		p.bad = true
		return nil
	}
	v := p.b[:n:n]
	p.b = p.b[n:]
	return v
}

func (p *parts) u8() byte {
	if v := p.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (p *parts) u32() uint32 {
	if v := p.take(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

func (p *parts) u64() uint64 {
	if v := p.take(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// part borrows the message.
func (p *parts) part() []byte {
	n := p.u32()
	if n > maxPart {
		p.bad = true
		return nil
	}
	return p.take(int(n))
}

func (p *parts) reading() ntp.Reading {
	var r ntp.Reading
	if nanos := p.u64(); nanos != 0 {
		r.Time = time.Unix(0, int64(nanos)).UTC()
	}
	r.Bound, r.State, r.Provenance = time.Duration(p.u64()), ntp.State(p.part()), string(p.part())
	return r
}

func (p *parts) done() error {
	if p.bad || len(p.b) > 0 {
		return errFrame
	}
	return nil
}

// Signature answers the signature in an answer, nil if there is none, for whoever has to give account of one that nobody
// waited for.
func Signature(answer []byte) []byte {
	p := parts{b: answer}
	switch p.u8() {
	case answerToken:
		p.reading()
	case answerSignature:
	default:
		return nil
	}
	made := p.part()
	if p.done() != nil {
		return nil
	}
	return made
}

// unexpected is an answer that is none to what was asked.
func unexpected(kind byte) error { return fmt.Errorf("%w: answer %d", errFrame, kind) }
