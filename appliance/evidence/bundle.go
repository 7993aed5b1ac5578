package evidence

import "encoding/json"

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
	Value     []byte `json:"value"` // DER of SM2Signature or PKCS#1 value; or the CMS
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
	// CheckpointSignature is SM2 over the note's text.
	CheckpointSignature []byte `json:"checkpoint_signature"`
	CheckpointToken     []byte `json:"checkpoint_token,omitempty"`
}

// Encode is the bundle as a file.
func (b *Bundle) Encode() ([]byte, error) { return json.MarshalIndent(b, "", "  ") }
