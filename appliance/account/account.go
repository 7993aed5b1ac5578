// Package account keeps the directory: applications, signers with their keys and certificates, and consent.
//
// The journal is the directory's truth. Every change is an entry (intent and outcome) whose payload is the whole new
// object with version = last + 1; at start the directory is rebuilt by replaying those entries, each checked against
// the signed checkpoint. The outcome bears the intent's reference, which is unique, so that an outcome whose writing is
// in doubt can be told from one that never was. Refusals are [*problem.Problem]. Nothing secret is stored: an application's HMAC key and a signer's PIN verifier are both
// derived with a key inside the cipher machine.
package account

import (
	"math/big"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/evidence"
)

// Rights of an application.
const (
	RightSign        = "sign"
	RightVerify      = "verify"
	RightTimestamp   = "timestamp"
	RightEvidenceAny = "evidence.any" // read other applications' records
)

// Stamp policies.
const (
	StampRequired = "required"
	StampNone     = "none"
)

// An Application is a business system that calls the API.
type Application struct {
	Version int               `json:"version"`
	ID      string            `json:"id"` // [a-z0-9-]{2,32}
	Name    string            `json:"name"`
	Campus  string            `json:"campus"`
	Rights  []string          `json:"rights"`
	Stamp   string            `json:"stamp"`   // StampRequired or StampNone
	Consent []evidence.Method `json:"consent"` // methods that suffice, any one of them
	Test    bool              `json:"test"`    // records are marked as tests
	// Production refuses signers that are there for tests.
	Production bool `json:"production,omitempty"`
	Rate       int  `json:"rate,omitempty"`  // requests a second; 0: what the configuration says
	Burst      int  `json:"burst,omitempty"` // requests at once; 0: twice the rate, or what the configuration says
	// HSMRate and HSMSessions are signatures a second and at once; 0: what the configuration says.
	HSMRate     int `json:"hsm_rate,omitempty"`
	HSMSessions int `json:"hsm_sessions,omitempty"`
	// Client, if set, is which TLS client certificates it has to show.
	Client  *ClientBinding `json:"client,omitempty"`
	Stopped bool           `json:"stopped"`
	KeySalt []byte         `json:"key_salt"` // the HMAC key is derived from it inside the cipher machine
	MACKey  *MACKey        `json:"mac_key,omitempty"`
	// KeySealed, if set, is the HMAC key sealed under what is derived from KeySalt: it was another machine's before.
	KeySealed []byte    `json:"key_sealed,omitempty"`
	ChangedBy string    `json:"changed_by"`
	ChangedAt time.Time `json:"changed_at"`
}

// Has reports whether the application has the right.
func (a *Application) Has(right string) bool {
	for _, r := range a.Rights {
		if r == right {
			return true
		}
	}
	return false
}

// A Signer is a member of staff.
type Signer struct {
	Version    int          `json:"version"`
	ID         string       `json:"id"` // staff number, [A-Za-z0-9-]{2,32}
	Name       string       `json:"name"`
	Department string       `json:"department"`
	Campus     string       `json:"campus"`
	Role       string       `json:"role,omitempty"` // the post; the role in which one signs is the application's to say
	Test       bool         `json:"test,omitempty"` // an account for tests, for ever: its records are marked, and count in no statistics
	Keys       []SignerKey  `json:"keys"`
	PIN        *PINVerifier `json:"pin,omitempty"`
	Sealing    *Sealing     `json:"sealing,omitempty"` // of custody keys
	Stopped    bool         `json:"stopped"`
	ChangedBy  string       `json:"changed_by"`
	ChangedAt  time.Time    `json:"changed_at"`
}

// A SignerKey is one key pair in the staff slot with its certificate. In a [Signer] the certificate is the one of its
// enrolment, if it had one; later ones have entries of their own. From [Service.ActiveSigner] it is the one to sign with.
type SignerKey struct {
	Label       string `json:"label"` // CKA_LABEL
	Algorithm   string `json:"algorithm"`
	Certificate []byte `json:"certificate,omitempty"` // DER
	PublicKey   []byte `json:"public_key,omitempty"`  // SubjectPublicKeyInfo, DER, of a key without a certificate
	// Wrapped is the private half of a custody key; nil: it is in the staff slot under Label.
	Wrapped *Wrapped `json:"wrapped,omitempty"`
	// Node is the appliance whose staff slot has a resident key; "": the one whose entry this is.
	Node string `json:"node,omitempty"`

	Chain [][]byte              `json:"-"` // above Certificate, issuer first; of ActiveSigner
	Path  []*smx509.Certificate `json:"-"` // Certificate and Chain, parsed; of ActiveSigner
}

// A PINVerifier checks a PIN without being able to yield it: Tag = HMAC-SM3, with a key that never leaves the cipher
// machine, over PBKDF2-HMAC-SM3(PIN, Salt, Iterations) and the signer's id.
type PINVerifier struct {
	Salt       []byte  `json:"salt"`
	Iterations int     `json:"iterations"`
	Tag        []byte  `json:"tag"`
	MACKey     *MACKey `json:"mac_key,omitempty"`
}

// A Grant is the answer to a request for an authorisation.
type Grant struct {
	ID        string
	Method    evidence.Method
	Signer    string
	Remaining int
	NotAfter  time.Time
}

// A GrantRequest asks for an authorisation by the signer's PIN: one-time, bound to Digests (1–500), or an activation
// for Count signatures (1–500) until Seconds from now (1–14400).
type GrantRequest struct {
	Signer          string
	PIN             string
	DigestAlgorithm string   // of all Digests: "SM3", also when left out, or "SHA-256"
	Digests         [][]byte // 32 bytes each; one-time
	Count           int
	Seconds         int
}

// A CertificateStatus is what the directory knows of one certificate.
type CertificateStatus struct {
	Serial      string // hex, lower case
	Certificate []byte // DER
	Chain       [][]byte
	Profile     string // "staff", "tsa", "log", "tls", "ca"
	Owner       string
	Status      string // "good" or "revoked"
	RevokedAt   time.Time
	Reason      string

	issuer string   // RawIssuer
	number *big.Int // Serial
}
