package evidence

import (
	"encoding/json"
	"fmt"

	"github.com/emmansun/gmsm/sm3"
)

// Method is how a signer's consent was given.
type Method string

const (
	// AppAsserted: the application vouches that the signer consented. A verdict says "asserted, not proved".
	AppAsserted Method = "app-asserted"
	// SignerPIN: the signer's PIN was checked with a key inside the cipher machine.
	SignerPIN Method = "signer-pin"
)

// An Authorization is one act of consent. Its exact bytes as stored (JSON) are what the leaf and the signed attribute
// commit to: SM3 over them is the authorisation hash. It never holds the PIN.
type Authorization struct {
	Version     int    `json:"version"` // 1
	ID          string `json:"id"`      // 128 random bits, hex
	Method      Method `json:"method"`
	Level       int    `json:"level"` // 1 asserted, 2 knowledge of a PIN
	Subject     string `json:"subject"`
	Application string `json:"application"`
	Nonce       string `json:"nonce"`
	// Digests (SM3 or SHA-256 of the documents, hex) bind a one-time authorisation; an activation has Count and
	// NotAfter instead.
	Digests   []string `json:"digests,omitempty"`
	Count     int      `json:"count,omitempty"`
	GrantedAt string   `json:"granted_at"` // RFC 3339, UTC, from the trusted clock
	NotAfter  string   `json:"not_after,omitempty"`
	// Proof says what stands behind the consent: for app-asserted the application's own words, for signer-pin
	// "pin verified in cipher machine, key <label>".
	Proof string `json:"proof"`
}

// Bytes is the stored form.
func (a *Authorization) Bytes() ([]byte, error) { return json.Marshal(a) }

// HashAuthorization is the authorisation hash over stored bytes.
func HashAuthorization(stored []byte) [32]byte { return sm3.Sum(stored) }

// ParseAuthorization reads stored bytes.
func ParseAuthorization(stored []byte) (*Authorization, error) {
	var a Authorization
	if err := json.Unmarshal(stored, &a); err != nil {
		return nil, fmt.Errorf("evidence: authorisation: %w", err)
	}
	if a.Version != 1 {
		return nil, fmt.Errorf("evidence: authorisation version %d, this release reads 1", a.Version)
	}
	return &a, nil
}
