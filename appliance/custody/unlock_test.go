package custody_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"testing"

	"yinjian/appliance/custody"
)

// Any two of three open the PINs, one does not, and what was changed in the file opens nothing.
func TestLockedPINs(t *testing.T) {
	t.Parallel()
	pins := map[string][]byte{"main/staff": []byte("31415926"), "main/log": []byte("27182818")}
	holders := []string{"张三", "李四", "王五"}
	words := [][]byte{[]byte("sand-and-water-1"), []byte("horse-battery-2"), []byte("correct-staple-3")}
	locked, err := custody.LockPINs(pins, holders, words, 2)
	if err != nil {
		t.Fatal(err)
	}
	file, err := json.Marshal(locked)
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		if bytes.Contains(file, pin) {
			t.Errorf("the file holds %s", pin)
		}
	}
	read, err := custody.ParseLockedPINs(file)
	if err != nil {
		t.Fatal(err)
	}
	var shares []custody.Share
	for i, name := range holders {
		if _, err := read.Share(name, words[(i+1)%3]); !errors.Is(err, custody.ErrSealed) {
			t.Errorf("%s with another's passphrase: %v", name, err)
		}
		s, err := read.Share(name, words[i])
		if err != nil {
			t.Fatal(err)
		}
		shares = append(shares, s)
	}
	for _, two := range [][]custody.Share{{shares[0], shares[1]}, {shares[2], shares[0]}, {shares[1], shares[2]}} {
		got, err := read.Open(two)
		if err != nil || !maps.EqualFunc(got, pins, bytes.Equal) {
			t.Errorf("Open = %q, %v", got, err)
		}
	}
	if _, err := read.Open(shares[:1]); err == nil {
		t.Error("one opens them")
	}
	if _, err := read.Open([]custody.Share{shares[0], shares[0]}); err == nil {
		t.Error("the same twice opens them")
	}
	// What belongs to another place, or was changed, opens nothing.
	moved := *read
	moved.Holders = append([]custody.UnlockHolder(nil), read.Holders...)
	moved.Holders[0], moved.Holders[1] = moved.Holders[1], moved.Holders[0]
	if _, err := moved.Share("张三", words[0]); !errors.Is(err, custody.ErrSealed) {
		t.Errorf("a share in another place: %v", err)
	}
	changed := *read
	changed.PINs = bytes.Clone(read.PINs)
	changed.PINs[len(changed.PINs)-1] ^= 1
	if _, err := changed.Open(shares[:2]); !errors.Is(err, custody.ErrSealed) {
		t.Errorf("changed PINs: %v", err)
	}
	for name, change := range map[string]func(*custody.LockedPINs){
		"fewer needed":      func(l *custody.LockedPINs) { l.Threshold = 1 },
		"cheap":             func(l *custody.LockedPINs) { l.Holders[1].Iterations = 1 },
		"costly for ever":   func(l *custody.LockedPINs) { l.Holders[1].Iterations = 1 << 40 },
		"another format":    func(l *custody.LockedPINs) { l.Format = "yinjian-unlock/2" },
		"too few holders":   func(l *custody.LockedPINs) { l.Holders = l.Holders[:1] },
		"a salt that fails": func(l *custody.LockedPINs) { l.Holders[0].Salt = nil },
	} {
		l, err := custody.ParseLockedPINs(file)
		if err != nil {
			t.Fatal(err)
		}
		change(l)
		b, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := custody.ParseLockedPINs(b); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestCheckUnlock(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		holders   []string
		threshold int
		good      bool
	}{
		"two of three":   {[]string{"甲", "乙", "丙"}, 2, true},
		"one of three":   {[]string{"甲", "乙", "丙"}, 1, false},
		"all of three":   {[]string{"甲", "乙", "丙"}, 3, false},
		"two of two":     {[]string{"甲", "乙"}, 2, false},
		"twice the same": {[]string{"甲", "乙", "甲"}, 2, false},
		"no name":        {[]string{"甲", "乙", ""}, 2, false},
	} {
		if err := custody.CheckUnlock(c.holders, c.threshold); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The device's secret opens the PINs, another does not, and neither do those of other locked PINs.
func TestDevicePINs(t *testing.T) {
	t.Parallel()
	pins := map[string][]byte{"main/staff": []byte("31415926"), "main/log": []byte("27182818")}
	secret := custody.NewDeviceSecret()
	sealed, err := custody.SealToDevice(pins, [32]byte{1}, map[string]int{"pcr": 7}, secret)
	if err != nil {
		t.Fatal(err)
	}
	file, err := json.Marshal(sealed)
	if err != nil || bytes.Contains(file, pins["main/log"]) {
		t.Fatalf("%s, %v", file, err)
	}
	read, err := custody.ParseDevicePINs(file)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := read.Open(secret); err != nil || !maps.EqualFunc(got, pins, bytes.Equal) || string(read.Device) != `{"pcr":7}` {
		t.Errorf("Open = %q, %v; device %s", got, err, read.Device)
	}
	if _, err := read.Open(custody.NewDeviceSecret()); !errors.Is(err, custody.ErrSealed) {
		t.Errorf("another secret: %v", err)
	}
	read.Locked[0] ^= 1
	if _, err := read.Open(secret); !errors.Is(err, custody.ErrSealed) {
		t.Errorf("for other locked PINs: %v", err)
	}
	if _, err := custody.ParseDevicePINs([]byte(`{"format":"yinjian-device-pins/2"}`)); err == nil {
		t.Error("another format was read")
	}
}
