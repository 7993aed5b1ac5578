package custody

import (
	"crypto/hmac"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/sm3"
)

// A DevicePINs is the cipher machines' PINs as they lie on the disk of an appliance that unlocks itself: sealed (SM4-GCM) under
// a key from a secret that a device of the machine keeps, and bound to the [LockedPINs] that people open where the device does
// not give it: with others in their place it opens nothing, for a cipher machine may have other PINs by then.
type DevicePINs struct {
	Format string          `json:"format"`
	Locked []byte          `json:"locked_sm3"` // SM3 of the file of the LockedPINs
	Device json.RawMessage `json:"device"`     // what the device needs to give its secret
	PINs   []byte          `json:"pins"`
}

const deviceFormat = "yinjian-device-pins/1"

// NewDeviceSecret draws a secret for a device to keep.
func NewDeviceSecret() []byte {
	secret := make([]byte, SecretSize)
	rand.Read(secret) // never fails (crypto/rand)
	return secret
}

// SealToDevice seals pins, by slot, under the secret that device opens.
func SealToDevice(pins map[string][]byte, locked [sm3.Size]byte, device any, secret []byte) (*DevicePINs, error) {
	d := &DevicePINs{Format: deviceFormat, Locked: locked[:]}
	var err error
	if d.Device, err = json.Marshal(device); err != nil {
		return nil, err
	}
	body, err := json.Marshal(pins)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	key := deviceKey(secret)
	defer clear(key)
	d.PINs, err = Seal(key, body, d.name())
	return d, err
}

func deviceKey(secret []byte) []byte {
	m := hmac.New(sm3.New, secret)
	m.Write([]byte("yinjian/device-pins/v1\x00"))
	return m.Sum(nil)[:keySize]
}

func (d *DevicePINs) name() string {
	return "yinjian/device-pins/v1\x00" + hex.EncodeToString(d.Locked)
}

// ParseDevicePINs reads a bundle.
func ParseDevicePINs(b []byte) (*DevicePINs, error) {
	d := new(DevicePINs)
	if err := json.Unmarshal(b, d); err != nil {
		return nil, fmt.Errorf("custody: a device's PINs: %w", err)
	}
	if d.Format != deviceFormat || len(d.Locked) != sm3.Size || len(d.Device) == 0 {
		return nil, errors.New("无人值守口令包的内容不对 (custody: this is no bundle of PINs for a device)")
	}
	return d, nil
}

// Open opens the bundle. It fails with [ErrSealed] for another secret. The caller wipes the PINs.
func (d *DevicePINs) Open(secret []byte) (map[string][]byte, error) {
	key := deviceKey(secret)
	defer clear(key)
	body, err := Open(key, d.PINs, d.name())
	if err != nil {
		return nil, err
	}
	defer clear(body)
	var pins map[string][]byte
	if err := json.Unmarshal(body, &pins); err != nil {
		return nil, fmt.Errorf("custody: a device's PINs: %w", err)
	}
	return pins, nil
}
