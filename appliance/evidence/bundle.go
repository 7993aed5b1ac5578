package evidence

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
)

// Format is the format and version that a bundle names.
const Format = "yinjian-evidence/1"

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
}

// Encode is the bundle as a file.
func (b *Bundle) Encode() ([]byte, error) { return json.MarshalIndent(b, "", "  ") }

// MaxBundle bounds a bundle's size in bytes; content is never inside, certificates and CRLs are.
const MaxBundle = 64 << 20

// Parse reads a bundle, strictly: unknown and missing names, a name twice or in capitals, trailing data, and another
// spelling of a number or of base64 are errors. A bundle of a later format is not half-read, and nothing in the file
// can mean one thing to this program and another to the next. Order of names and white space are free.
func Parse(data []byte) (*Bundle, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("evidence: bundle of %d bytes, at most %d are read", len(data), MaxBundle)
	}
	tree, err := parseTree(data)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	// Before anything else: a later format has names that this release does not know.
	if o, ok := tree.(map[string]any); !ok || o["format"] != Format {
		return nil, fmt.Errorf("evidence: not a bundle of format %q", Format)
	}
	var b Bundle
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&b); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	// encoding/json takes names in any case, base64 with loose ends, null for anything. What was understood must be what
	// stands there.
	again, err := json.Marshal(&b)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	understood, err := parseTree(again)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if !reflect.DeepEqual(tree, understood) {
		return nil, errors.New("evidence: a name is missing or misspelt, or a value is not in its one spelling")
	}
	return &b, nil
}

// parseTree reads JSON into maps, slices, strings, numbers by their text, and bools. A name given twice is an error.
func parseTree(data []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	v, err := parseValue(dec, 0)
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("data after the bundle")
	}
	return v, nil
}

// maxDepth is what a bundle has: file, part, list, element.
const maxDepth = 4

func parseValue(dec *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, errors.New("nested too deeply")
	}
	token, err := dec.Token()
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	switch token {
	case json.Delim('{'):
		object := map[string]any{}
		for dec.More() {
			token, err := dec.Token()
			if err != nil {
				return nil, err
			}
			name, _ := token.(string) // the decoder has seen to it
			if _, twice := object[name]; twice {
				return nil, fmt.Errorf("%.40q is given twice", name)
			}
			if object[name], err = parseValue(dec, depth+1); err != nil {
				return nil, err
			}
		}
		_, err = dec.Token()
		return object, err
	case json.Delim('['):
		list := []any{}
		for dec.More() {
			v, err := parseValue(dec, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = dec.Token()
		return list, err
	}
	return token, nil
}
