package custody

import (
	"crypto/hmac"
	"fmt"

	"github.com/emmansun/gmsm/sm3"
)

// MACSize is how many bytes a MAC key has.
const MACSize = 32

// MACLabel is the label (CKA_LABEL) of the MAC key for a use that the ceremony of a wrapping key makes. Every campus where
// the custodians have been has the same key under it; the label without the wrapping key's is each machine's own.
func MACLabel(use, kek string) string { return use + "@" + kek }

// MACOf derives the MAC key of a label (32 bytes) from the secret that custodians share: HMAC-SM3 under that secret, so that
// neither it, nor the wrapping key, nor another label's key can be told from the key. The caller wipes it.
func MACOf(secret []byte, label string) []byte {
	h := hmac.New(sm3.New, secret)
	h.Write([]byte("yinjian/mac/v1\x00"))
	h.Write([]byte(label))
	return h.Sum(nil)
}

// MACCheckMessage is what a MAC key answers when it is asked for its check value. Nothing else that is authenticated begins
// as it does.
func MACCheckMessage(label string) []byte { return []byte("yinjian/mac-check/v1\x00" + label) }

// MACCheckValue is a MAC key's check value: the first 8 bytes of its answer to MACCheckMessage, in hexadecimal.
func MACCheckValue(answer []byte) (string, error) {
	if len(answer) != sm3.Size {
		return "", fmt.Errorf("custody: HMAC-SM3 of %d bytes", len(answer))
	}
	return fmt.Sprintf("%X", answer[:8]), nil
}

// MACKey is a MAC key of a ceremony, as the minutes name it.
type MACKey struct {
	Label      string `json:"label"`
	CheckValue string `json:"check_value"`
}

// MACKeyOf answers what the minutes say of a label's key.
func MACKeyOf(secret []byte, label string) (MACKey, error) {
	key := MACOf(secret, label)
	defer clear(key)
	h := hmac.New(sm3.New, key)
	h.Write(MACCheckMessage(label))
	v, err := MACCheckValue(h.Sum(nil))
	return MACKey{label, v}, err
}
