// Package wire is what travels between a business system and the appliance: the JSON of every route, and the string
// that a request's MAC covers. It is shared by api and api/client and depends on neither. The contract for other
// languages is openapi.json, served by the appliance; docs/api-auth.md describes the MAC.
//
// Byte strings are base64 (RFC 4648 §4, padded, no line breaks); times are RFC 3339 in UTC; a field that does not
// apply is left out, null is refused.
package wire

import "encoding/json"

// A SignRequest is the body of POST /v1/sign. The Idempotency-Key travels as a header.
type SignRequest struct {
	Signer    string   `json:"signer"`             // staff number, [A-Za-z0-9-]{2,32}
	Algorithm string   `json:"algorithm"`          // "SM2" or "RSA-2048"
	Form      string   `json:"form"`               // "raw" or "cms"
	Detached  *bool    `json:"detached,omitempty"` // cms only; true when left out. raw is always detached
	Content   []byte   `json:"content,omitempty"`  // content or digest, exactly one
	Digest    *Digest  `json:"digest,omitempty"`   // cms only
	Document  Document `json:"document"`
	Role      string   `json:"role"` // signer's role at signing, 1–64 bytes
	Consent   Consent  `json:"consent"`
}

// A Digest is a document's digest.
type Digest struct {
	Algorithm string `json:"algorithm"` // "SM3" or "SHA-256"
	Value     []byte `json:"value"`     // 32 bytes
}

// A Document describes what is signed. No patient's name belongs in any field.
type Document struct {
	ID        string `json:"id"`         // 1–128 bytes
	Type      string `json:"type"`       // 1–64 bytes
	MediaType string `json:"media_type"` // 1–127 bytes
}

// Consent names an authorisation, or carries the application's assertion.
type Consent struct {
	AuthorizationID string `json:"authorization_id,omitempty"` // 32 hex digits
	Method          string `json:"method,omitempty"`           // "app-asserted", with assertion
	Assertion       string `json:"assertion,omitempty"`        // 1–512 bytes
}

// A SignResult is the answer of POST /v1/sign.
type SignResult struct {
	RecordID     string   `json:"record_id"` // 64 hex digits
	Algorithm    string   `json:"algorithm"`
	Form         string   `json:"form"`
	Signature    []byte   `json:"signature"`          // DER of SM2Signature, PKCS#1 value, or CMS
	Certificates [][]byte `json:"certificates"`       // signer's first, DER
	Token        []byte   `json:"token,omitempty"`    // TimeStampToken, DER
	GenTime      string   `json:"gen_time,omitempty"` // of the token
	AccuracyUS   int64    `json:"accuracy_us,omitempty"`
	Provenance   string   `json:"provenance"` // who vouched for the time
	Node         string   `json:"node"`
	Epoch        string   `json:"epoch"` // hex
	Sequence     uint64   `json:"sequence"`
	Replayed     bool     `json:"replayed"` // an earlier result of the same Idempotency-Key
}

// A VerifyRequest is the body of POST /v1/verify. Exactly one of evidence, cms, token and raw is given; document or
// digest at most one.
type VerifyRequest struct {
	Evidence json.RawMessage `json:"evidence,omitempty"` // the bundle as an object
	CMS      []byte          `json:"cms,omitempty"`      // DER
	Token    []byte          `json:"token,omitempty"`    // TimeStampToken or TimeStampResp, DER
	Raw      *RawSignature   `json:"raw,omitempty"`
	Document []byte          `json:"document,omitempty"`
	Digest   *Digest         `json:"digest,omitempty"`
}

// A RawSignature is a signature value with the certificate it should verify with.
type RawSignature struct {
	Algorithm   string   `json:"algorithm"`
	Value       []byte   `json:"value"`
	Certificate []byte   `json:"certificate"`     // DER
	Chain       [][]byte `json:"chain,omitempty"` // DER, at most 8
	Token       []byte   `json:"token,omitempty"` // over the signature value
}

// A TimestampRequest is the body of POST /v1/timestamp: a digest, or up to some 48 KiB of data of which the appliance
// takes the SM3 digest.
type TimestampRequest struct {
	Unit   string  `json:"unit,omitempty"` // the first unit when left out
	Digest *Digest `json:"digest,omitempty"`
	Data   []byte  `json:"data,omitempty"`
}

// A Timestamp is the answer of POST /v1/timestamp. All but the token repeats what the token says.
type Timestamp struct {
	Unit       string `json:"unit"`
	Token      []byte `json:"token"`  // TimeStampToken, DER
	Serial     string `json:"serial"` // hex
	Policy     string `json:"policy"` // dotted OID
	GenTime    string `json:"gen_time"`
	AccuracyUS int64  `json:"accuracy_us,omitempty"`
}

// An AuthorizationRequest is the body of POST /v1/authorizations: digests for a one-time authorisation, or count and
// seconds for an activation. The digests are those that the signatures will use: SM3 for SM2, SHA-256 for RSA-2048.
type AuthorizationRequest struct {
	Signer string `json:"signer"`
	PIN    string `json:"pin"`
	// DigestAlgorithm is that of all digests: "SM3", also when left out, or "SHA-256"; refused without digests.
	DigestAlgorithm string   `json:"digest_algorithm,omitempty"`
	Digests         [][]byte `json:"digests,omitempty"` // 1–500 of 32 bytes
	Count           int      `json:"count,omitempty"`   // 1–500
	Seconds         int      `json:"seconds,omitempty"` // 1–14400
}

// A Grant is the answer of POST /v1/authorizations.
type Grant struct {
	ID        string `json:"id"`
	Method    string `json:"method"`
	Signer    string `json:"signer"`
	Remaining int    `json:"remaining"`
	NotAfter  string `json:"not_after"`
}

// A CertificateStatus is the answer of GET /v1/certs/{serial}.
type CertificateStatus struct {
	Serial      string   `json:"serial"` // hex, lower case
	Certificate []byte   `json:"certificate"`
	Chain       [][]byte `json:"chain"`
	Profile     string   `json:"profile"`
	Owner       string   `json:"owner"`
	Status      string   `json:"status"` // "good" or "revoked"
	RevokedAt   string   `json:"revoked_at,omitempty"`
	Reason      string   `json:"reason,omitempty"`
}

// Readiness is the answer of GET /health/ready, with status 200 or 503.
type Readiness struct {
	Ready   bool     `json:"ready"`
	Reasons []string `json:"reasons"` // why not; Chinese first
}

// Liveness is the answer of GET /health/alive.
type Liveness struct {
	Alive   bool   `json:"alive"`
	Version string `json:"version"`
}

// A Retry says whether it makes sense to send a refused request again. Each time it is signed anew, with a new nonce and
// time; POST /v1/sign keeps its Idempotency-Key, which makes every repetition safe. docs/errors.md has it for each code.
type Retry string

const (
	RetryNever    Retry = "never"    // nothing was signed, and as it stands the request is refused again: change it
	RetryResign   Retry = "resign"   // at once, with a new nonce and the right time
	RetrySameKey  Retry = "same-key" // the outcome is unknown: after a pause, with the same Idempotency-Key, until it is known
	RetryLater    Retry = "later"    // nothing was signed: after Retry-After
	RetryOperator Retry = "operator" // nothing was signed, and nothing will be until a person has acted; then as it stands
)

// A Problem is the body of every refusal, application/problem+json (RFC 9457).
type Problem struct {
	Type      string `json:"type"`                 // urn:yinjian:problem:<code>
	Title     string `json:"title"`                // the same for every problem of a code
	Status    int    `json:"status"`               // HTTP status
	Detail    string `json:"detail"`               // reason, Chinese first
	Instance  string `json:"instance"`             // urn:yinjian:request:<id>, also in X-Request-ID and in the appliance's log
	Code      string `json:"code"`                 // stable; programs switch on it
	Field     string `json:"field,omitempty"`      // the field at fault: "document.id", "header.Idempotency-Key", "path.id"
	Next      string `json:"next"`                 // what to do, Chinese first
	Retry     Retry  `json:"retry"`                // what to do, for programs
	TriesLeft *int   `json:"tries_left,omitempty"` // with pin_wrong
	STF       string `json:"stf,omitempty"`        // of /v1/stf: GM/T 0033's number, "0x04000007"
}
