package sign

import (
	"time"

	"yinjian/appliance/evidence"
)

// A Request asks for one signature. Each field says the rules that bind it; [Service.Sign] checks them all.
type Request struct {
	IdempotencyKey string // 1–128 visible ASCII; scope: application
	Signer         string // staff number
	Algorithm      string // "SM2" or "RSA-2048"
	Form           string // "raw" or "cms"
	Detached       bool   // cms only; raw is always detached
	Content        []byte // or Digest; exactly one. Not kept: it is the memory of whoever asks, until Sign answers
	Digest         *Digest
	Document       Document
	Role           string // signer's role at signing: "attending", …
	Consent        Consent
}

// A Digest is a document's digest computed by the caller; CMS only (a raw SM2 signature needs content, because
// e = SM3(ZA ‖ M) cannot be had from SM3(M)).
type Digest struct {
	Algorithm string // "SM3" with SM2, "SHA-256" with RSA-2048
	Value     []byte // 32 bytes
}

// A Document describes what is signed. No patient's name belongs in any field.
type Document struct {
	ID        string // the hospital's record number, 1–128 bytes
	Type      string // "discharge-summary", …; 1–64 bytes
	MediaType string // 1–127 bytes
}

// Consent is how the signer agreed: an authorisation's id, or the application's assertion.
type Consent struct {
	AuthorizationID string
	Method          evidence.Method // with an empty id: app-asserted
	Assertion       string          // the application's own words, 1–512 bytes, with app-asserted
}

// A Result is what was signed and where it stands in the journal. A retry with the same key gives an equal one.
type Result struct {
	RecordID     string // hex of 32 bytes
	Algorithm    string
	Form         string
	Signature    []byte   // DER of SM2Signature, PKCS#1 value, or CMS
	Certificates [][]byte // signer's first, DER
	Token        []byte   // TimeStampToken, DER; nil under policy "none"
	GenTime      time.Time
	Accuracy     time.Duration
	Provenance   string
	Node         string
	Epoch        string // hex
	Sequence     uint64
	Replayed     bool // true when this is an earlier result of the same key
}

// A VerifyRequest asks for a verdict. Exactly one of Evidence, CMS, Token or Raw is set.
type VerifyRequest struct {
	Evidence []byte // bundle, JSON
	CMS      []byte // DER
	Token    []byte // TimeStampToken or TimeStampResp, DER
	Raw      *RawSignature
	// Document is the signed content; for a token, what was stamped. May be absent: the digest check is then
	// "not checked". Digest may stand in for it, for CMS and tokens.
	Document []byte
	Digest   *Digest
}

// A RawSignature is a signature value with the certificate it should verify with.
type RawSignature struct {
	Algorithm   string
	Value       []byte
	Certificate []byte   // DER
	Chain       [][]byte // DER, optional
	Token       []byte   // over the signature value, optional
}
