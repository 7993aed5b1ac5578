package evidence

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

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

const (
	// MaxDigests is how many documents one authorisation can be bound to, and how many uses an activation can have.
	MaxDigests = 500
	// maxAuthorization is above what MaxDigests digests and the longest proof add up to.
	maxAuthorization = 64 << 10
)

// A Digest is a document's digest; one without its algorithm says nothing.
type Digest struct {
	Algorithm string // "SM3" or "SHA-256"
	Value     string // 32 bytes, lower-case hex
}

// An Authorization is one act of consent. Its exact bytes as stored (JSON) are what the leaf and the signed attribute
// commit to: SM3 over them is the authorisation hash. It never holds the PIN.
type Authorization struct {
	Version     int    `json:"version"` // 1
	ID          string `json:"id"`      // 128 random bits, hex
	Method      Method `json:"method"`
	Level       int    `json:"level"` // 1 asserted, 2 knowledge of a PIN
	Subject     string `json:"subject"`
	Application string `json:"application"`
	Nonce       string `json:"nonce"` // 128 random bits, hex
	// Digests of the documents (hex), all by DigestAlgorithm ("SM3" or "SHA-256"), bind a one-time authorisation; an
	// activation has Count and NotAfter instead. 32 bytes alone do not say which document they are of: without the
	// algorithm, consent to one document would reach another whose digest by the other algorithm has the same value, and
	// whoever may send a digest can choose it.
	DigestAlgorithm string   `json:"digest_algorithm,omitempty"`
	Digests         []string `json:"digests,omitempty"`
	Count           int      `json:"count,omitempty"`
	GrantedAt       string   `json:"granted_at"` // RFC 3339, UTC, from the trusted clock
	NotAfter        string   `json:"not_after,omitempty"`
	// Proof says what stands behind the consent: for app-asserted the application's own words, for signer-pin
	// "pin verified in cipher machine, key <label>".
	Proof string `json:"proof"`
}

// Bytes is the stored form.
func (a *Authorization) Bytes() ([]byte, error) { return json.Marshal(a) }

// HashAuthorization is the authorisation hash over stored bytes.
func HashAuthorization(stored []byte) [32]byte { return sm3.Sum(stored) }

// ParseAuthorization reads stored bytes. It takes only what [Authorization.Bytes] writes, byte for byte, so that an
// authorisation does not say one thing to a person who reads its text and another to a program.
func ParseAuthorization(stored []byte) (*Authorization, error) {
	if len(stored) > maxAuthorization {
		return nil, fmt.Errorf("evidence: authorisation of %d bytes, at most %d are read", len(stored), maxAuthorization)
	}
	var a Authorization
	if err := json.Unmarshal(stored, &a); err != nil {
		return nil, fmt.Errorf("evidence: authorisation: %w", err)
	}
	if a.Version != 1 {
		return nil, fmt.Errorf("evidence: authorisation version %d, this release reads 1", a.Version)
	}
	if err := a.check(); err != nil {
		return nil, fmt.Errorf("evidence: authorisation: %w", err)
	}
	again := encodings.Get().(*bytes.Buffer)
	defer func() { again.Reset(); encodings.Put(again) }()
	if err := json.NewEncoder(again).Encode(&a); err != nil { // as Bytes does, and a line feed
		return nil, fmt.Errorf("evidence: authorisation: %w", err)
	}
	if !bytes.Equal(bytes.TrimSuffix(again.Bytes(), []byte("\n")), stored) {
		return nil, errors.New("evidence: authorisation is not in its one encoding")
	}
	return &a, nil
}

// encodings are buffers for what is compared and thrown away.
var encodings = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func (a *Authorization) check() error {
	granted, err := parseTime(a.GrantedAt)
	switch {
	case !isHex(a.ID, 16) || !isHex(a.Nonce, 16):
		return errors.New("id and nonce must be 128 bits in lower-case hexadecimal")
	case a.Method == "" || a.Level < 1 || a.Subject == "" || a.Application == "":
		return errors.New("method, level, subject and application must be there")
	case err != nil:
		return fmt.Errorf("granted_at: %w", err)
	case (len(a.Digests) > 0) == (a.Count != 0):
		return errors.New("either digests or a count must be there")
	case len(a.Digests) > 0 && a.DigestAlgorithm != nameSM3 && a.DigestAlgorithm != nameSHA256:
		return errors.New("digests must be by SM3 or SHA-256, and say which")
	case len(a.Digests) == 0 && a.DigestAlgorithm != "":
		return errors.New("a digest algorithm without digests")
	case len(a.Digests) > MaxDigests || a.Count < 0 || a.Count > MaxDigests:
		return fmt.Errorf("more than %d uses", MaxDigests)
	case a.Count > 0 && a.NotAfter == "":
		return errors.New("an activation without an end")
	}
	var seen map[string]bool // none for one digest, as most have
	if len(a.Digests) > 1 {
		seen = make(map[string]bool, len(a.Digests))
	}
	for _, d := range a.Digests {
		if !isHex(d, 32) || seen[d] {
			return errors.New("digests must be 32 bytes each in lower-case hexadecimal, and none twice")
		}
		if seen != nil {
			seen[d] = true
		}
	}
	if a.NotAfter != "" {
		end, err := parseTime(a.NotAfter)
		if err != nil {
			return fmt.Errorf("not_after: %w", err)
		}
		if end.Before(granted) {
			return errors.New("it ends before it was granted")
		}
	}
	return nil
}

func parseTime(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err == nil && t.UTC().Format(time.RFC3339Nano) != s {
		err = errors.New("time is not UTC in its one spelling")
	}
	return t, err
}

// isHex reports whether s is n bytes in lower-case hexadecimal.
func isHex(s string, n int) bool {
	return len(s) == 2*n && strings.Trim(s, "0123456789abcdef") == ""
}

// covers reports whether the authorisation reaches a document: by its digest of that algorithm, or as an activation,
// which only the signer himself can give.
func (a *Authorization) covers(d Digest) bool {
	if a.Count > 0 {
		return a.Method != AppAsserted
	}
	return a.DigestAlgorithm == d.Algorithm && slices.Contains(a.Digests, d.Value)
}
