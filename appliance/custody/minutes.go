package custody

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/sm2"
)

// Minutes (记录) say what a key ceremony did. They hold no secret.
type Minutes struct {
	Body MinutesBody `json:"body"`
	// Signature is by the check key over the body as it stands here, byte for byte: SM2 with SM3, DER.
	Signature []byte `json:"signature"`

	raw []byte // the body
}

// A MinutesBody is what is signed.
type MinutesBody struct {
	Version    int    `json:"version"`
	Name       string `json:"name"`
	At         string `json:"at"` // the machine's clock, RFC 3339; the journal's entry has trusted time
	KEK        string `json:"kek"`
	CheckValue string `json:"kek_check_value"` // KCV, see CheckValue
	// MACs are the MAC keys that were derived from the same secret and brought to the machines' log slots, if any were.
	MACs       []MACKey  `json:"mac_keys,omitempty"`
	Machines   []Place   `json:"machines"`
	Custodians Holders   `json:"custodians"`
	Officers   *Officers `json:"officers,omitempty"`
	CheckKey   CheckKey  `json:"check_key"`
	Present    []string  `json:"present"` // who attended
}

// A Place is a token that the wrapping key was brought to.
type Place struct {
	Name         string `json:"name"`
	Token        string `json:"token"`
	Serial       string `json:"serial"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	// Log is the token of the log slot that got the MAC keys; nil: the wrapping key alone was brought.
	Log *Place `json:"log,omitempty"`
}

// Holders are those among whom a secret was shared.
type Holders struct {
	Threshold   int         `json:"threshold"`
	Names       []string    `json:"names"` // share 1 first
	Commitments Commitments `json:"commitments"`
}

// Officers have the key to what is sealed under forgotten PINs.
type Officers struct {
	Holders
	Point []byte `json:"point"` // their public point
}

// A CheckKey is a key pair that was made under the wrapping key on the first machine and signed the minutes on the last one:
// whichever machine can use it holds the same wrapping key, which need not be shown for that. It signs nothing else.
type CheckKey struct {
	Label string `json:"label"`
	Point []byte `json:"point"` // SM2, uncompressed
	Blob  []byte `json:"blob"`  // wrapped
}

// Sign completes the minutes: sign is asked once for a signature over the body.
func (m *Minutes) Sign(sign func(body []byte) ([]byte, error)) ([]byte, error) {
	raw, err := json.Marshal(m.Body)
	if err != nil {
		return nil, err
	}
	m.raw = raw
	if m.Signature, err = sign(raw); err != nil {
		return nil, err
	}
	if err := m.Verify(); err != nil {
		return nil, err
	}
	return json.Marshal(m)
}

// Verify checks the signature with the check key's public half.
func (m *Minutes) Verify() error {
	pub, err := pointKey(m.Body.CheckKey.Point)
	if err != nil {
		return err
	}
	if !sm2.VerifyASN1WithSM2(pub, nil, m.raw, m.Signature) {
		return errors.New("记录的签名不符 (the signature of the minutes does not verify)")
	}
	return nil
}

// ParseMinutes reads minutes and verifies their signature.
func ParseMinutes(b []byte) (*Minutes, error) {
	var outer struct {
		Body      json.RawMessage `json:"body"`
		Signature []byte          `json:"signature"`
	}
	if err := strictJSON(b, &outer); err != nil {
		return nil, fmt.Errorf("不是仪式记录 (not minutes): %w", err)
	}
	m := &Minutes{Signature: outer.Signature, raw: outer.Body}
	if err := strictJSON(outer.Body, &m.Body); err != nil {
		return nil, fmt.Errorf("不是仪式记录 (not minutes): %w", err)
	}
	if m.Body.Version != 1 {
		return nil, fmt.Errorf("仪式记录的版本 %d 未知 (unknown version)", m.Body.Version)
	}
	return m, m.Verify()
}

func strictJSON(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if dec.More() {
		return errors.New("more follows")
	}
	return nil
}
