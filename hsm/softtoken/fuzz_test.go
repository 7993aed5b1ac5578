package softtoken_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/softtoken"
)

// frames are one request of every shape, with arguments that are right in form.
func frames() [][]byte {
	var all [][]byte
	for call, shape := range softtoken.Shapes() {
		b := binary.BigEndian.AppendUint32(nil, call)
		for _, c := range shape {
			switch c {
			case 'q':
				b = binary.BigEndian.AppendUint64(b, 0)
			case 's':
				b = append(b, 0, 0, 0, 4, 'd', 'a', 't', 'a')
			case 'A':
				b = append(b, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x11, 0, 0, 0, 1, 'v')
			case 'T':
				b = append(b, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x11)
			case 'M':
				b = append(b, 0, 0, 0, 0, 0xff, 0xff, 0xf0, 3, 0, 0, 0, 2, 'i', 'd')
			}
		}
		all = append(all, b)
	}
	return all
}

// FuzzRequest: what parses has one encoding.
func FuzzRequest(f *testing.F) {
	for _, b := range frames() {
		f.Add(b)
	}
	f.Add([]byte{})
	f.Add([]byte{0, 0, 0, 0x14, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		again, known, err := softtoken.ParseRequest(b)
		if err == nil && known && !bytes.Equal(again, b) {
			t.Errorf("%x is encoded again as %x", b, again)
		}
	})
}

// FuzzServe: whatever parses is answered, with and without a session, and the answer is a whole frame.
func FuzzServe(f *testing.F) {
	for _, b := range frames() {
		f.Add(b, true)
		f.Add(b, false)
	}
	m := newMachine(f)
	p := m.module(f)
	initToken(f, p, 0, "a")
	f.Fuzz(func(t *testing.T, b []byte, inSession bool) {
		reply, err := m.server.ServeFrame(b, inSession)
		if err != nil || reply == nil {
			return
		}
		if len(reply) < 12 || int(binary.BigEndian.Uint32(reply)) != len(reply)-4 {
			t.Errorf("%x is answered with %x", b, reply)
		}
	})
}

// FuzzRecord: what is inside a seal is read with care too, and has one encoding.
func FuzzRecord(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{1, 0, 0, 0, 0, 0, 20}, make([]byte, 20)...))
	for _, b := range softtoken.SampleRecords() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, again := range softtoken.DecodeRecords(b) {
			if !bytes.Equal(again, b) {
				t.Errorf("%x is encoded again as %x", b, again)
			}
		}
	})
}

// FuzzImpersonate: the machine answers to a vendor's profile or refuses it, however it is written.
func FuzzImpersonate(f *testing.F) {
	for _, name := range profiles.Names() {
		b, err := os.ReadFile(filepath.Join("..", "pkcs11", "profiles", name+".toml"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	path := filepath.Join(f.TempDir(), "profile.toml")
	f.Fuzz(func(t *testing.T, b []byte) {
		must(t, os.WriteFile(path, b, 0o600))
		_, wrong := profiles.Load(path)
		if err := softtoken.Impersonate(path); wrong != nil && err == nil {
			t.Fatalf("answers to a file that is no profile: %v", wrong)
		}
	})
}
