package audit

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/ntp"
)

// Limits of format version 1. They are part of the format: an entry beyond them does not parse.
const (
	MaxEntryBytes   = 256 << 10 // the whole DER value
	MaxNameBytes    = 64        // node, kind, names of fields and payloads
	MaxSubjectBytes = 256       // actor, object
	MaxTextBytes    = 4096      // a field's text or octets
	MaxFields       = 64
	MaxPayloads     = 64
	MaxPayloadBytes = 16 << 20 // one payload
	MaxDraftBytes   = 24 << 20 // all payloads of one draft that do not recur
	MaxSharedBytes  = 96 << 20 // and those that do (Attachment.Shared): lists of four CAs can have 8 MiB each

	maxStateBytes      = 32
	maxProvenanceBytes = 512
	maxMediaTypeBytes  = 128
)

// An Epoch is 64 random bits drawn when a journal is made and at every restore of one, so that entries written after
// a restore never share the key (node, epoch, sequence) with entries that the restore lost.
type Epoch [8]byte

// String is the epoch as 16 lower-case hexadecimal digits.
func (e Epoch) String() string { return hex.EncodeToString(e[:]) }

// ParseEpoch reads what [Epoch.String] gives.
func ParseEpoch(s string) (Epoch, error) {
	var e Epoch
	if len(s) != 16 || strings.ToLower(s) != s {
		return e, errors.New("audit: an epoch is 16 lower-case hexadecimal digits")
	}
	_, err := hex.Decode(e[:], []byte(s))
	if err != nil {
		return Epoch{}, fmt.Errorf("audit: epoch: %w", err)
	}
	return e, nil
}

// An Entry is one leaf of the journal, format version 1:
//
//	Entry ::= SEQUENCE {
//	  version   INTEGER (1),
//	  node      UTF8String,                 -- [a-z0-9._-], 1..64
//	  epoch     OCTET STRING (SIZE (8)),
//	  sequence  INTEGER (0..2^63-1),        -- index of the leaf in the node's tree
//	  time      SEQUENCE {
//	    utcMicros   INTEGER,                -- microseconds since 1970-01-01T00:00:00Z, leap seconds not counted
//	    boundMicros INTEGER (0..2^63-1),    -- |true time - utcMicros| <= boundMicros
//	    state       UTF8String,             -- ntp.State
//	    provenance  UTF8String },
//	  kind      UTF8String,                 -- [a-z0-9./_-], 1..64
//	  actor     UTF8String,
//	  object    UTF8String,
//	  ref       OCTET STRING (SIZE (0 | 32)),
//	  fields    SEQUENCE OF SEQUENCE { name UTF8String,
//	                value CHOICE { UTF8String, INTEGER (-2^63..2^63-1), OCTET STRING, BOOLEAN } },
//	  payloads  SEQUENCE OF SEQUENCE { name UTF8String, mediaType UTF8String, size INTEGER, sm3 OCTET STRING (SIZE (32)) } }
//
// in DER (ITU-T X.690). fields and payloads are ascending by the bytes of name and names are unique in each, so that
// an entry has one encoding and [ParseEntry] accepts only that. New kinds of entry add fields; the format stays.
type Entry struct {
	Node     string
	Epoch    Epoch
	Sequence uint64
	Time     Time
	Kind     string
	Actor    string // who did it
	Object   string // to what
	Ref      []byte // record id or id of an intent, 32 bytes; nil when there is none
	Fields   []Field
	Payloads []Payload
}

// Time is a reading as an entry or a checkpoint keeps it, in whole microseconds.
type Time struct {
	Micros      int64 // since 1970-01-01T00:00:00Z
	BoundMicros int64
	State       ntp.State
	Provenance  string
}

// TimeOf rounds r to microseconds: Micros down, BoundMicros up by as much as keeps the bound true.
func TimeOf(r ntp.Reading) Time {
	micros := r.Time.UnixMicro()
	cut := r.Time.Sub(time.UnixMicro(micros))
	bound := r.Bound
	if bound > math.MaxInt64-2*time.Microsecond {
		bound = math.MaxInt64 - 2*time.Microsecond
	}
	bound = max(bound, 0) + cut
	return Time{
		Micros:      micros,
		BoundMicros: int64((bound + time.Microsecond - 1) / time.Microsecond),
		State:       r.State,
		Provenance:  r.Provenance,
	}
}

// UTC is the time without its bound.
func (t Time) UTC() time.Time { return time.UnixMicro(t.Micros).UTC() }

// A Field is one named value of an entry.
type Field struct {
	Name  string // [a-z0-9./_-], 1..64; "journal." is kept for the journal itself
	Value Value
}

// A Value is one of [Text], [Int], [Octets] and [Bool].
type Value interface{ isValue() }

type (
	Text   string // UTF8String without NUL, at most MaxTextBytes
	Int    int64  // INTEGER
	Octets []byte // OCTET STRING, at most MaxTextBytes
	Bool   bool   // BOOLEAN
)

func (Text) isValue()   {}
func (Int) isValue()    {}
func (Octets) isValue() {}
func (Bool) isValue()   {}

// A Payload describes bytes that are kept beside the entry and committed to by it.
type Payload struct {
	Name      string
	MediaType string
	Size      int64
	SM3       Hash
}

// Field is the value of that name, or nil.
func (e *Entry) Field(name string) Value {
	i, ok := slices.BinarySearchFunc(e.Fields, name, func(f Field, n string) int { return strings.Compare(f.Name, n) })
	if !ok {
		return nil
	}
	return e.Fields[i].Value
}

// Text is the text field of that name, or "".
func (e *Entry) Text(name string) string {
	t, _ := e.Field(name).(Text)
	return string(t)
}

// Payload is the payload of that name.
func (e *Entry) Payload(name string) (Payload, bool) {
	i, ok := slices.BinarySearchFunc(e.Payloads, name, func(p Payload, n string) int { return strings.Compare(p.Name, n) })
	if !ok {
		return Payload{}, false
	}
	return e.Payloads[i], true
}

// Change answers the ordinal of a change of state among all of this journal's, from 0; false for an entry that is none.
func (e *Entry) Change() (uint64, bool) {
	n, ok := e.Field(fieldChange).(Int)
	return uint64(n), ok && n >= 0
}

// fieldChange is set by the journal in entries whose draft had State set: the count of such entries before this one.
// A flag in a table could be cleared unseen; an ordinal in the leaf cannot.
const fieldChange = "journal.change"

// Marshal is the entry's DER. It fails on an entry outside the format's limits.
func (e *Entry) Marshal() ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	return e.encode()
}

// encode is Marshal of what was checked.
func (e *Entry) encode() ([]byte, error) {
	n := e.sizes()
	if n.whole > MaxEntryBytes {
		return nil, fmt.Errorf("audit: entry of %d bytes, at most %d are allowed", n.whole, MaxEntryBytes)
	}
	b := make([]byte, 0, n.whole)
	b = appendHeader(b, asn1.SEQUENCE, n.body)
	b = appendInt(b, 1)
	b = appendText(b, e.Node)
	b = appendOctets(b, e.Epoch[:])
	b = appendInt(b, int64(e.Sequence))
	b = appendHeader(b, asn1.SEQUENCE, n.time)
	b = appendInt(b, e.Time.Micros)
	b = appendInt(b, e.Time.BoundMicros)
	b = appendText(b, string(e.Time.State))
	b = appendText(b, e.Time.Provenance)
	b = appendText(b, e.Kind)
	b = appendText(b, e.Actor)
	b = appendText(b, e.Object)
	b = appendOctets(b, e.Ref)
	b = appendHeader(b, asn1.SEQUENCE, n.fields)
	for i := range e.Fields {
		f := &e.Fields[i]
		b = appendHeader(b, asn1.SEQUENCE, f.size())
		b = appendText(b, f.Name)
		switch v := f.Value.(type) {
		case Text:
			b = appendText(b, string(v))
		case Int:
			b = appendInt(b, int64(v))
		case Octets:
			b = appendOctets(b, v)
		case Bool:
			b = append(b, byte(asn1.BOOLEAN), 1, boolOctet(v))
		}
	}
	b = appendHeader(b, asn1.SEQUENCE, n.payloads)
	for i := range e.Payloads {
		p := &e.Payloads[i]
		b = appendHeader(b, asn1.SEQUENCE, p.size())
		b = appendText(b, p.Name)
		b = appendText(b, p.MediaType)
		b = appendInt(b, p.Size)
		b = appendOctets(b, p.SM3[:])
	}
	return b, nil
}

// The encoder is written out, with all lengths first, because each entry is encoded while others wait for the same
// commit; cryptobyte's nested builders take five times as long.

// entrySizes are lengths of contents octets; whole includes the outer header.
type entrySizes struct{ time, fields, payloads, body, whole int }

func (e *Entry) sizes() (n entrySizes) {
	n.time = intSize(e.Time.Micros) + intSize(e.Time.BoundMicros) + elementSize(len(e.Time.State)) + elementSize(len(e.Time.Provenance))
	for i := range e.Fields {
		n.fields += elementSize(e.Fields[i].size())
	}
	for i := range e.Payloads {
		n.payloads += elementSize(e.Payloads[i].size())
	}
	n.body = intSize(1) + elementSize(len(e.Node)) + elementSize(len(e.Epoch)) + intSize(int64(e.Sequence)) + elementSize(n.time) +
		elementSize(len(e.Kind)) + elementSize(len(e.Actor)) + elementSize(len(e.Object)) + elementSize(len(e.Ref)) +
		elementSize(n.fields) + elementSize(n.payloads)
	n.whole = elementSize(n.body)
	return n
}

func (f *Field) size() int {
	n := elementSize(len(f.Name))
	switch v := f.Value.(type) {
	case Text:
		n += elementSize(len(v))
	case Int:
		n += intSize(int64(v))
	case Octets:
		n += elementSize(len(v))
	case Bool:
		n += elementSize(1)
	}
	return n
}

func (p *Payload) size() int {
	return elementSize(len(p.Name)) + elementSize(len(p.MediaType)) + intSize(p.Size) + elementSize(len(p.SM3))
}

// elementSize is the length of an element with n octets of contents, tag and length included.
func elementSize(n int) int {
	size := 2 + n
	if n >= 0x80 {
		for l := n; l > 0; l >>= 8 {
			size++
		}
	}
	return size
}

// intOctets is how many octets of two's complement v needs.
func intOctets(v int64) int {
	n := 1
	for ; v > 127 || v < -128; v >>= 8 {
		n++
	}
	return n
}

func intSize(v int64) int { return elementSize(intOctets(v)) }

func appendHeader(b []byte, tag asn1.Tag, n int) []byte {
	b = append(b, byte(tag))
	if n < 0x80 {
		return append(b, byte(n))
	}
	octets := elementSize(n) - n - 2
	b = append(b, 0x80|byte(octets))
	for i := octets - 1; i >= 0; i-- {
		b = append(b, byte(n>>(8*i)))
	}
	return b
}

func appendInt(b []byte, v int64) []byte {
	n := intOctets(v)
	b = appendHeader(b, asn1.INTEGER, n)
	for i := n - 1; i >= 0; i-- {
		b = append(b, byte(v>>(8*i)))
	}
	return b
}

func boolOctet(v Bool) byte {
	if v {
		return 0xff
	}
	return 0
}

func appendText(b []byte, s string) []byte {
	return append(appendHeader(b, asn1.UTF8String, len(s)), s...)
}

func appendOctets(b, v []byte) []byte {
	return append(appendHeader(b, asn1.OCTET_STRING, len(v)), v...)
}

// ParseEntry reads the DER of one entry. What it accepts, Marshal gives back byte for byte.
func ParseEntry(der []byte) (*Entry, error) {
	if len(der) > MaxEntryBytes {
		return nil, fmt.Errorf("audit: entry of %d bytes, at most %d are allowed", len(der), MaxEntryBytes)
	}
	e := new(Entry)
	if err := e.parse(der); err != nil {
		return nil, err
	}
	// cryptobyte is strict about lengths and integers; encoding again settles every question that it might leave.
	again, err := e.Marshal()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, der) {
		return nil, errors.New("audit: entry is not in its canonical encoding")
	}
	return e, nil
}

func (e *Entry) parse(der []byte) error {
	bad := func(what string) error { return fmt.Errorf("audit: entry: malformed %s", what) }
	in := cryptobyte.String(der)
	var s, tm, list cryptobyte.String
	var version int64
	if !in.ReadASN1(&s, asn1.SEQUENCE) || !in.Empty() {
		return bad("outer SEQUENCE")
	}
	if !s.ReadASN1Integer(&version) {
		return bad("version")
	}
	if version != 1 {
		return fmt.Errorf("audit: entry: version %d is not known", version)
	}
	var epoch, ref cryptobyte.String
	var state string
	if !readText(&s, &e.Node) || !s.ReadASN1(&epoch, asn1.OCTET_STRING) || len(epoch) != len(e.Epoch) {
		return bad("node or epoch")
	}
	copy(e.Epoch[:], epoch)
	if !s.ReadASN1Integer(&e.Sequence) {
		return bad("sequence")
	}
	if !s.ReadASN1(&tm, asn1.SEQUENCE) || !tm.ReadASN1Integer(&e.Time.Micros) || !tm.ReadASN1Integer(&e.Time.BoundMicros) ||
		!readText(&tm, &state) || !readText(&tm, &e.Time.Provenance) || !tm.Empty() {
		return bad("time")
	}
	e.Time.State = ntp.State(state)
	if !readText(&s, &e.Kind) || !readText(&s, &e.Actor) || !readText(&s, &e.Object) {
		return bad("kind, actor or object")
	}
	if !s.ReadASN1(&ref, asn1.OCTET_STRING) {
		return bad("ref")
	}
	if len(ref) > 0 {
		e.Ref = slices.Clone([]byte(ref))
	}
	if !s.ReadASN1(&list, asn1.SEQUENCE) {
		return bad("fields")
	}
	for !list.Empty() {
		var one cryptobyte.String
		var f Field
		if len(e.Fields) == MaxFields || !list.ReadASN1(&one, asn1.SEQUENCE) || !readText(&one, &f.Name) ||
			!readValue(&one, &f.Value) || !one.Empty() {
			return bad("field")
		}
		e.Fields = append(e.Fields, f)
	}
	if !s.ReadASN1(&list, asn1.SEQUENCE) || !s.Empty() {
		return bad("payloads")
	}
	for !list.Empty() {
		var one, sum cryptobyte.String
		var p Payload
		if len(e.Payloads) == MaxPayloads || !list.ReadASN1(&one, asn1.SEQUENCE) || !readText(&one, &p.Name) ||
			!readText(&one, &p.MediaType) || !one.ReadASN1Integer(&p.Size) || !one.ReadASN1(&sum, asn1.OCTET_STRING) ||
			len(sum) != len(p.SM3) || !one.Empty() {
			return bad("payload")
		}
		copy(p.SM3[:], sum)
		e.Payloads = append(e.Payloads, p)
	}
	return nil
}

func readText(s *cryptobyte.String, out *string) bool {
	var v cryptobyte.String
	if !s.ReadASN1(&v, asn1.UTF8String) {
		return false
	}
	*out = string(v)
	return true
}

func readValue(s *cryptobyte.String, out *Value) bool {
	switch {
	case s.PeekASN1Tag(asn1.UTF8String):
		var t string
		if !readText(s, &t) {
			return false
		}
		*out = Text(t)
	case s.PeekASN1Tag(asn1.INTEGER):
		var n int64
		if !s.ReadASN1Integer(&n) {
			return false
		}
		*out = Int(n)
	case s.PeekASN1Tag(asn1.OCTET_STRING):
		var o cryptobyte.String
		if !s.ReadASN1(&o, asn1.OCTET_STRING) {
			return false
		}
		*out = Octets(append([]byte{}, o...))
	case s.PeekASN1Tag(asn1.BOOLEAN):
		var b bool
		if !s.ReadASN1Boolean(&b) {
			return false
		}
		*out = Bool(b)
	default:
		return false
	}
	return true
}

// check holds the limits, for what is encoded and for what is parsed alike.
func (e *Entry) check() error {
	bad := func(what string) error { return fmt.Errorf("audit: entry: %s outside the format's limits", what) }
	switch {
	case !isName(e.Node) || strings.Contains(e.Node, "/"):
		return bad("node")
	case e.Sequence > math.MaxInt64:
		return bad("sequence")
	case e.Time.BoundMicros < 0:
		return bad("time bound")
	case !isText(string(e.Time.State), maxStateBytes) || !isText(e.Time.Provenance, maxProvenanceBytes):
		return bad("time state or provenance")
	case !isName(e.Kind):
		return bad("kind")
	case !isText(e.Actor, MaxSubjectBytes):
		return bad("actor")
	case !isText(e.Object, MaxSubjectBytes):
		return bad("object")
	case len(e.Ref) != 0 && len(e.Ref) != 32:
		return bad("ref")
	case len(e.Fields) > MaxFields:
		return bad("number of fields")
	case len(e.Payloads) > MaxPayloads:
		return bad("number of payloads")
	}
	for i, f := range e.Fields {
		if !isName(f.Name) {
			return bad(fmt.Sprintf("name of field %d", i))
		}
		if i > 0 && e.Fields[i-1].Name >= f.Name {
			return bad(fmt.Sprintf("order of fields at %q", f.Name))
		}
		switch v := f.Value.(type) {
		case Text:
			if !isText(string(v), MaxTextBytes) {
				return bad(fmt.Sprintf("field %q", f.Name))
			}
		case Octets:
			if len(v) > MaxTextBytes {
				return bad(fmt.Sprintf("field %q", f.Name))
			}
		case Int, Bool:
		default:
			return bad(fmt.Sprintf("type of field %q", f.Name))
		}
	}
	for i, p := range e.Payloads {
		if !isName(p.Name) || !isText(p.MediaType, maxMediaTypeBytes) || p.Size < 0 || p.Size > MaxPayloadBytes {
			return bad(fmt.Sprintf("payload %q", p.Name))
		}
		if i > 0 && e.Payloads[i-1].Name >= p.Name {
			return bad(fmt.Sprintf("order of payloads at %q", p.Name))
		}
	}
	return nil
}

func isName(s string) bool {
	if s == "" || len(s) > MaxNameBytes {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '/' || c == '_' || c == '-') {
			return false
		}
	}
	return true
}

func isText(s string, limit int) bool {
	return len(s) <= limit && utf8.ValidString(s) && !strings.Contains(s, "\x00")
}
