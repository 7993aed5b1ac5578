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
	return e.appendTo(make([]byte, 0, n.whole), n), nil
}

// appendTo appends the encoding of what was checked, whose sizes are n.
func (e *Entry) appendTo(b []byte, n entrySizes) []byte {
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
	return b
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
	e, err := readEntry(der, false)
	if err != nil {
		return nil, err
	}
	// The reader is strict about lengths and integers; encoding again settles every question that it might leave.
	n := e.sizes()
	if n.whole != len(der) {
		return nil, errNotCanonical
	}
	again := scratch.Get().(*[]byte)
	defer scratch.Put(again)
	*again = e.appendTo((*again)[:0], n)
	if !bytes.Equal(*again, der) {
		return nil, errNotCanonical
	}
	return e, nil
}

// readEntry reads what ParseEntry reads, and refuses what it refuses. lean checks the fields that are not the journal's own
// and leaves them out, which halves the time: the entry cannot be encoded then.
func readEntry(der []byte, lean bool) (*Entry, error) {
	if len(der) > MaxEntryBytes {
		return nil, fmt.Errorf("audit: entry of %d bytes, at most %d are allowed", len(der), MaxEntryBytes)
	}
	e := new(Entry)
	if err := e.parse(der, lean); err != nil {
		return nil, err
	}
	if err := e.check(); err != nil {
		return nil, err
	}
	return e, nil
}

var errNotCanonical = errors.New("audit: entry is not in its canonical encoding")

// parse reads names and texts as parts of one string: a verification reads every entry that there is, and a string for
// each took most of its time.
func (e *Entry) parse(der []byte, lean bool) error {
	bad := func(what string) error { return fmt.Errorf("audit: entry: malformed %s", what) }
	in := derText(der)
	s, ok := in.element(asn1.SEQUENCE)
	if !ok || in != "" {
		return bad("outer SEQUENCE")
	}
	version, ok := s.integer()
	if !ok {
		return bad("version")
	}
	if version != 1 {
		return fmt.Errorf("audit: entry: version %d is not known", version)
	}
	node, ok1 := s.element(asn1.UTF8String)
	epoch, ok2 := s.element(asn1.OCTET_STRING)
	if !ok1 || !ok2 || len(epoch) != len(e.Epoch) {
		return bad("node or epoch")
	}
	e.Node = string(node)
	copy(e.Epoch[:], epoch)
	sequence, ok := s.integer()
	if !ok || sequence < 0 {
		return bad("sequence")
	}
	e.Sequence = uint64(sequence)
	tm, ok := s.element(asn1.SEQUENCE)
	if !ok {
		return bad("time")
	}
	e.Time.Micros, ok = tm.integer()
	e.Time.BoundMicros, ok1 = tm.integer()
	state, ok2 := tm.element(asn1.UTF8String)
	provenance, ok3 := tm.element(asn1.UTF8String)
	if !ok || !ok1 || !ok2 || !ok3 || tm != "" {
		return bad("time")
	}
	e.Time.State, e.Time.Provenance = ntp.State(state), string(provenance)
	kind, ok := s.element(asn1.UTF8String)
	actor, ok1 := s.element(asn1.UTF8String)
	object, ok2 := s.element(asn1.UTF8String)
	if !ok || !ok1 || !ok2 {
		return bad("kind, actor or object")
	}
	e.Kind, e.Actor, e.Object = string(kind), string(actor), string(object)
	ref, ok := s.element(asn1.OCTET_STRING)
	if !ok {
		return bad("ref")
	}
	if len(ref) > 0 {
		e.Ref = []byte(ref)
	}
	list, ok := s.element(asn1.SEQUENCE)
	if !ok {
		return bad("fields")
	}
	if n := list.elements(); n > 0 && !lean {
		e.Fields = make([]Field, 0, min(n, MaxFields))
	}
	before := derText("")
	for n := 0; list != ""; n++ {
		one, ok := list.element(asn1.SEQUENCE)
		if n == MaxFields || !ok {
			return bad("field")
		}
		name, ok := one.element(asn1.UTF8String)
		if !ok {
			return bad("field")
		}
		if lean && !strings.HasPrefix(string(name), "journal.") {
			if name <= before || !isName(string(name)) || !one.isValue() {
				return bad("field")
			}
			before = name
			continue
		}
		value, ok := one.value()
		if !ok || name <= before || one != "" {
			return bad("field")
		}
		before = name
		e.Fields = append(e.Fields, Field{string(name), value})
	}
	if list, ok = s.element(asn1.SEQUENCE); !ok || s != "" {
		return bad("payloads")
	}
	if n := list.elements(); n > 0 {
		e.Payloads = make([]Payload, 0, min(n, MaxPayloads))
	}
	for list != "" {
		one, ok := list.element(asn1.SEQUENCE)
		if len(e.Payloads) == MaxPayloads || !ok {
			return bad("payload")
		}
		name, ok := one.element(asn1.UTF8String)
		media, ok1 := one.element(asn1.UTF8String)
		size, ok2 := one.integer()
		sum, ok3 := one.element(asn1.OCTET_STRING)
		if !ok || !ok1 || !ok2 || !ok3 || len(sum) != len(Hash{}) || one != "" {
			return bad("payload")
		}
		e.Payloads = append(e.Payloads, Payload{string(name), string(media), size, Hash([]byte(sum))})
	}
	return nil
}

// derText is DER that is being read. Lengths and integers must be the shortest there are (ITU-T X.690 §10.1, §8.3.2).
type derText string

// element takes one element's contents.
func (s *derText) element(tag asn1.Tag) (derText, bool) {
	t := *s
	if len(t) < 2 || t[0] != byte(tag) {
		return "", false
	}
	n, head := int(t[1]), 2
	if n >= 0x80 {
		octets := n & 0x7f
		if octets < 1 || octets > 3 || len(t) < 2+octets || t[2] == 0 { // an entry has 256 KiB
			return "", false
		}
		n = 0
		for _, c := range []byte(t[2 : 2+octets]) {
			n = n<<8 | int(c)
		}
		if n < 0x80 {
			return "", false
		}
		head += octets
	}
	if len(t)-head < n {
		return "", false
	}
	*s = t[head+n:]
	return t[head : head+n], true
}

// elements counts those that stand next to each other, up to what is none.
func (s derText) elements() (n int) {
	for s != "" {
		if _, ok := s.element(asn1.Tag(s[0])); !ok {
			break
		}
		n++
	}
	return n
}

func (s *derText) integer() (int64, bool) {
	v, ok := s.element(asn1.INTEGER)
	if !ok || len(v) < 1 || len(v) > 8 || len(v) > 1 && (v[0] == 0 && v[1] < 0x80 || v[0] == 0xff && v[1] >= 0x80) {
		return 0, false
	}
	n := int64(int8(v[0]))
	for i := 1; i < len(v); i++ {
		n = n<<8 | int64(v[i])
	}
	return n, true
}

// isValue reports whether s is a field's value within the format's limits, and nothing else.
func (s derText) isValue() bool {
	if s == "" {
		return false
	}
	tag := asn1.Tag(s[0])
	if tag == asn1.INTEGER {
		_, ok := s.integer()
		return ok && s == ""
	}
	v, ok := s.element(tag)
	if !ok || s != "" {
		return false
	}
	switch tag {
	case asn1.UTF8String:
		return isText(string(v), MaxTextBytes)
	case asn1.OCTET_STRING:
		return len(v) <= MaxTextBytes
	case asn1.BOOLEAN:
		return v == "\xff" || v == "\x00"
	}
	return false
}

func (s *derText) value() (Value, bool) {
	if *s == "" {
		return nil, false
	}
	switch tag := asn1.Tag((*s)[0]); tag {
	case asn1.UTF8String:
		v, ok := s.element(tag)
		return Text(v), ok
	case asn1.INTEGER:
		n, ok := s.integer()
		return Int(n), ok
	case asn1.OCTET_STRING:
		v, ok := s.element(tag)
		return Octets(v), ok
	case asn1.BOOLEAN:
		v, ok := s.element(tag)
		return Bool(v == "\xff"), ok && (v == "\xff" || v == "\x00")
	}
	return nil, false
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
