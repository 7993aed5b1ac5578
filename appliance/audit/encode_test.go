package audit_test

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"testing"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/audit"
)

// reference encodes an entry with cryptobyte, which works lengths out by itself.
func reference(e *audit.Entry) []byte {
	text := func(b *cryptobyte.Builder, s string) {
		b.AddASN1(asn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte(s)) })
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		text(b, e.Node)
		b.AddASN1OctetString(e.Epoch[:])
		b.AddASN1Uint64(e.Sequence)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1Int64(e.Time.Micros)
			b.AddASN1Int64(e.Time.BoundMicros)
			text(b, string(e.Time.State))
			text(b, e.Time.Provenance)
		})
		text(b, e.Kind)
		text(b, e.Actor)
		text(b, e.Object)
		b.AddASN1OctetString(e.Ref)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, f := range e.Fields {
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					text(b, f.Name)
					switch v := f.Value.(type) {
					case audit.Text:
						text(b, string(v))
					case audit.Int:
						b.AddASN1Int64(int64(v))
					case audit.Octets:
						b.AddASN1OctetString(v)
					case audit.Bool:
						b.AddASN1Boolean(bool(v))
					}
				})
			}
		})
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, p := range e.Payloads {
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					text(b, p.Name)
					text(b, p.MediaType)
					b.AddASN1Int64(p.Size)
					b.AddASN1OctetString(p.SM3[:])
				})
			}
		})
	})
	return b.BytesOrPanic()
}

// Lengths and integers change their form at these values; another encoder has to agree at each.
func TestEncodingAtBoundaries(t *testing.T) {
	t.Parallel()
	check := func(what string, e audit.Entry) {
		t.Helper()
		got, err := e.Marshal()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if want := reference(&e); !bytes.Equal(got, want) {
			t.Errorf("%s: %x, want %x", what, got, want)
		}
		if _, err := audit.ParseEntry(got); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for n := range 300 {
		e := sampleEntry()
		e.Fields[0].Value = audit.Text(strings.Repeat("x", n))
		check(fmt.Sprintf("text of %d", n), e)
	}
	for _, fields := range []int{1, 15, 16, 63} { // up to three octets of length
		e := sampleEntry()
		e.Fields = nil
		for i := range fields {
			e.Fields = append(e.Fields, audit.Field{Name: fmt.Sprintf("f%02d", i), Value: audit.Octets(make([]byte, audit.MaxTextBytes-i))})
		}
		if fields == 63 {
			e.Fields = e.Fields[:60]
		}
		check(fmt.Sprintf("%d fields", fields), e)
	}
	for shift := range 63 {
		for _, d := range []int64{-1, 0, 1} {
			for _, sign := range []int64{1, -1} {
				e := sampleEntry()
				e.Fields[4].Value = audit.Int(sign * (int64(1)<<shift + d))
				e.Time.Micros = sign * (int64(1)<<shift + d)
				check(fmt.Sprintf("integer %d", e.Time.Micros), e)
			}
		}
	}
	e := sampleEntry()
	e.Sequence, e.Payloads[0].Size = math.MaxInt64, audit.MaxPayloadBytes
	check("greatest sequence", e)
}
