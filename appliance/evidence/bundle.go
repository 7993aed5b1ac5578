package evidence

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The formats and versions that a bundle names: the second has an evidence record, the third the cosignature of another
// campus, the fourth both, and nothing else is different.
const (
	Format                 = "yinjian-evidence/1"
	FormatArchived         = "yinjian-evidence/2"
	FormatCosigned         = "yinjian-evidence/3"
	FormatArchivedCosigned = "yinjian-evidence/4"
)

func formatOf(archived, cosigned bool) string {
	switch {
	case archived && cosigned:
		return FormatArchivedCosigned
	case cosigned:
		return FormatCosigned
	case archived:
		return FormatArchived
	}
	return Format
}

// format is the one for what the bundle has.
func (b *Bundle) format() string {
	return formatOf(len(b.EvidenceRecord) > 0, len(b.Journal.Cosigned) > 0)
}

// A Bundle is one record's evidence: everything that somebody needs, years later and without the appliance, to judge
// one signature. Byte strings are base64 (standard, padded) in JSON. The document itself is never inside.
type Bundle struct {
	Format    string    `json:"format"`
	RecordID  string    `json:"record_id"` // hex of 32 bytes
	Record    Record    `json:"record"`
	Signature Signature `json:"signature"`
	// Certificates of all chains (signer, TSA), DER; CRLs that were fresh at signing, DER.
	Certificates [][]byte `json:"certificates"`
	CRLs         [][]byte `json:"crls"`
	// Authorization is the stored authorisation, byte for byte.
	Authorization []byte  `json:"authorization"`
	Token         []byte  `json:"token,omitempty"` // RFC 3161 TimeStampToken, DER
	Journal       Journal `json:"journal"`
	// EvidenceRecord is an RFC 4998 EvidenceRecord over [Bundle.Members], DER: archive timestamps that outlive the token's
	// certificate and algorithms.
	EvidenceRecord []byte `json:"evidence_record,omitempty"`
}

// Record describes the act as the leaf commits to it.
type Record struct {
	Application     string `json:"application"`
	Campus          string `json:"campus"`
	Signer          string `json:"signer"`
	Department      string `json:"department"` // at signing time
	Role            string `json:"role"`
	DocumentType    string `json:"document_type"`
	DocumentID      string `json:"document_id"` // the hospital's record number
	MediaType       string `json:"media_type"`
	Size            int64  `json:"size"`             // bytes; -1 when only the digest was given
	DigestAlgorithm string `json:"digest_algorithm"` // "SM3" or "SHA-256"
	Digest          string `json:"digest"`           // hex
	Test            bool   `json:"test,omitempty"`
	// StampPolicy is "required" or "none" (the application's policy at signing).
	StampPolicy string `json:"stamp_policy"`
	// TimeProvenance repeats who vouched for the time, with the bound in microseconds.
	TimeProvenance string `json:"time_provenance"`
	TimeBoundUS    int64  `json:"time_bound_us"`
}

// Signature is the signature itself.
type Signature struct {
	Algorithm string `json:"algorithm"` // "SM2" or "RSA-2048"
	Form      string `json:"form"`      // "raw" or "cms"
	Detached  bool   `json:"detached"`
	// Value is the DER of SM2Signature or the PKCS#1 value; or the CMS, without the content even if the caller was
	// given one with it (then Detached is false): what was signed is the same.
	Value []byte `json:"value"`
}

// Journal places the record in the transparency log.
type Journal struct {
	Node       string   `json:"node"`
	Epoch      string   `json:"epoch"` // hex
	Sequence   uint64   `json:"sequence"`
	Leaf       []byte   `json:"leaf"` // canonical entry, DER
	TreeSize   uint64   `json:"tree_size"`
	Inclusion  [][]byte `json:"inclusion"`
	Checkpoint []byte   `json:"checkpoint"` // the signed note's text
	// CheckpointSignature is SM2 over the note's text, CheckpointToken a timestamp token over that signature, if the
	// checkpoint had one when the bundle was made.
	CheckpointSignature []byte `json:"checkpoint_signature"`
	CheckpointToken     []byte `json:"checkpoint_token,omitempty"`
	// Cosigned is the text in which another campus says that it has seen the checkpoint, which is its end; Cosignature is
	// that campus's log key's SM2 signature over it. Both, or neither ([audit.Cosignature]).
	Cosigned    []byte `json:"cosigned,omitempty"`
	Cosignature []byte `json:"cosignature,omitempty"`
}

// WithRecord is the same bundle with an evidence record over its members, in the format that has one.
func (b *Bundle) WithRecord(record []byte) *Bundle {
	other := *b
	other.EvidenceRecord = record
	other.Format = other.format()
	return &other
}

// Encode is the bundle as a file.
func (b *Bundle) Encode() ([]byte, error) { return json.MarshalIndent(b, "", "  ") }

// MaxBundle bounds a bundle's size in bytes; content is never inside, certificates and CRLs are.
const MaxBundle = 64 << 20

// A FormatError says that a file is no bundle, and at which of its members that shows.
type FormatError struct {
	Member string // as "journal.inclusion.0"; "" for the file itself
	Err    error
}

func (e *FormatError) Error() string {
	if e.Member == "" {
		return "evidence: " + e.Err.Error()
	}
	return "evidence: " + e.Member + ": " + e.Err.Error()
}

func (e *FormatError) Unwrap() error { return e.Err }

// Parse reads a bundle, strictly: unknown and missing names, a name twice or in capitals, trailing data, and another
// spelling of a number or of base64 are errors. A bundle of a later format is not half-read, and nothing in the file
// can mean one thing to this program and another to the next. Only what JSON itself calls the same is free: the order of
// names, white space, and how a character of a string is escaped. What is wrong is told as a *[FormatError].
func Parse(data []byte) (*Bundle, error) {
	if len(data) > MaxBundle {
		return nil, &FormatError{"", fmt.Errorf("bundle of %d bytes, at most %d are read", len(data), MaxBundle)}
	}
	tree, err := parseTree(data)
	if err != nil {
		return nil, err
	}
	// Before anything else: a later format has names that this release does not know.
	o, _ := tree.(map[string]any)
	_, archived := o["evidence_record"]
	journal, _ := o["journal"].(map[string]any)
	_, cosigned := journal["cosigned"]
	_, cosignature := journal["cosignature"]
	if cosigned != cosignature {
		return nil, &FormatError{"journal", errors.New("a cosignature and its text belong together")}
	}
	want := formatOf(archived, cosigned)
	if o["format"] != want {
		return nil, &FormatError{"format", fmt.Errorf("not a bundle of format %q", want)}
	}
	// encoding/json takes names in any case, base64 with loose ends, null for anything. What stands there must be what is
	// understood.
	if err := spelt(reflect.TypeFor[Bundle](), tree, ""); err != nil {
		return nil, err
	}
	var b Bundle
	if err := json.Unmarshal(data, &b); err != nil {
		return nil, &FormatError{"", err}
	}
	return &b, nil
}

// spelt holds a tree against the type that it will be read into: each name known and there, each value in the one
// spelling that encoding/json writes.
func spelt(want reflect.Type, got any, path string) error {
	bad := func(format string, args ...any) error { return &FormatError{path, fmt.Errorf(format, args...)} }
	switch want.Kind() {
	case reflect.Struct:
		object, ok := got.(map[string]any)
		if !ok {
			return bad("must be an object")
		}
		known := map[string]bool{}
		for i := range want.NumField() {
			name, option, _ := strings.Cut(want.Field(i).Tag.Get("json"), ",")
			known[name] = true
			v, there := object[name]
			switch {
			case there:
				if err := spelt(want.Field(i).Type, v, join(path, name)); err != nil {
					return err
				}
				if option == "omitempty" && (v == "" || v == false) {
					return &FormatError{join(path, name), errors.New("empty: then it must be left out")}
				}
			case option != "omitempty":
				return &FormatError{join(path, name), errors.New("missing")}
			}
		}
		for _, name := range slices.Sorted(maps.Keys(object)) {
			if !known[name] {
				return &FormatError{join(path, name), errors.New("unknown name")}
			}
		}
		return nil
	case reflect.Slice:
		if want.Elem().Kind() == reflect.Uint8 {
			text, ok := got.(string)
			data, err := base64.StdEncoding.Strict().DecodeString(text)
			if !ok || err != nil || base64.StdEncoding.EncodeToString(data) != text {
				return bad("must be base64 in its one spelling")
			}
			return nil
		}
		list, ok := got.([]any)
		if !ok {
			return bad("must be a list")
		}
		for i, v := range list {
			if err := spelt(want.Elem(), v, join(path, strconv.Itoa(i))); err != nil {
				return err
			}
		}
		return nil
	case reflect.String:
		if _, ok := got.(string); !ok {
			return bad("must be a string")
		}
	case reflect.Bool:
		if _, ok := got.(bool); !ok {
			return bad("must be true or false")
		}
	case reflect.Int64:
		text, _ := got.(json.Number)
		if n, err := strconv.ParseInt(text.String(), 10, 64); err != nil || strconv.FormatInt(n, 10) != text.String() {
			return bad("must be a whole number in its one spelling")
		}
	case reflect.Uint64:
		text, _ := got.(json.Number)
		if n, err := strconv.ParseUint(text.String(), 10, 64); err != nil || strconv.FormatUint(n, 10) != text.String() {
			return bad("must be a whole number in its one spelling")
		}
	}
	return nil
}

// join is the path of a member; a name from a stranger's file is cut to what can be shown.
func join(path, name string) string {
	const shown = 40
	if len(name) > shown {
		name = name[:shown] + "…"
	}
	return strings.TrimPrefix(path+"."+name, ".")
}

// parseTree reads JSON into maps, slices, strings, numbers by their text, and bools. A name given twice is an error.
func parseTree(data []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	p := treeParser{data, dec}
	v, err := p.value("", 0)
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, &FormatError{"", errors.New("data after the bundle")}
	}
	return v, nil
}

// maxDepth is what a bundle has: file, part, list, element.
const maxDepth = 4

type treeParser struct {
	data []byte
	dec  *json.Decoder
}

// token is the next one, of the member at path. encoding/json would put U+FFFD where a string is not UTF-8.
func (p *treeParser) token(path string) (json.Token, error) {
	before := p.dec.InputOffset()
	token, err := p.dec.Token()
	switch {
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	case err == nil && !utf8.Valid(p.data[before:p.dec.InputOffset()]):
		err = errors.New("not UTF-8")
	}
	if err != nil {
		return nil, &FormatError{path, err}
	}
	return token, nil
}

func (p *treeParser) value(path string, depth int) (any, error) {
	if depth > maxDepth {
		return nil, &FormatError{path, errors.New("nested too deeply")}
	}
	token, err := p.token(path)
	if err != nil {
		return nil, err
	}
	switch token {
	case json.Delim('{'):
		object := map[string]any{}
		for p.dec.More() {
			token, err := p.token(path)
			if err != nil {
				return nil, err
			}
			name, _ := token.(string) // the decoder has seen to it
			if _, twice := object[name]; twice {
				return nil, &FormatError{join(path, name), errors.New("given twice")}
			}
			if object[name], err = p.value(join(path, name), depth+1); err != nil {
				return nil, err
			}
		}
		_, err = p.token(path)
		return object, err
	case json.Delim('['):
		list := []any{}
		for p.dec.More() {
			v, err := p.value(join(path, strconv.Itoa(len(list))), depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = p.token(path)
		return list, err
	}
	return token, nil
}
