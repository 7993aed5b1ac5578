package softtoken_test

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm4"
	"github.com/emmansun/gmsm/smx509"
	"github.com/miekg/pkcs11"
	"yinjian/hsm/softtoken"
)

// FuzzCiphers: a user's calls with keys that there are, in any order, with any parameter, data and room, are answered
// with whole frames, and none with more than there is room for. Each call is taken from the input: what to do, the
// mechanism, the room, a length and the data.
func FuzzCiphers(f *testing.F) {
	mechanisms := []uint64{softtoken.CKMNeutralSM4ECB, softtoken.CKMNeutralSM4CBC, softtoken.CKMNeutralSM4CBCPad, softtoken.CKMNeutralSM4GCM,
		softtoken.CKMNeutralSM2Crypt, softtoken.CKMNeutralSM2CryptDER, softtoken.CKMNeutralSM4CMAC, softtoken.CKMNeutralSM4KeyGen}
	for i := range byte(8) {
		f.Add([]byte{0, i, 0, 0, 1, i, 64, 3, 'a', 'b', 'c', 2, i, 64, 16, 1, 2, 3})
		f.Add([]byte{4, i, 0, 0, 5, i, 64, 16, 9, 9, 6, i, 64, 0, 8, i, 255, 0, 9, i, 0, 60, 1, 10, i, 0, 0})
	}
	m := newMachine(f)
	p := m.module(f)
	initToken(f, p, 0, "a")
	s := openRW(f, p, 0)
	must(f, p.Login(s, pkcs11.CKU_USER, userPIN))
	generateSM4(f, p, s, "data", attr(pkcs11.CKA_EXTRACTABLE, true))
	generateSM4(f, p, s, "kek", kek...)
	generateSM2Crypt(f, p, s, "pair")
	calls := []uint32{29, 30, 31, 32, 33, 34, 35, 36, 60, 61, 21, 25}
	f.Fuzz(func(t *testing.T, b []byte) {
		var frames [][]byte
		var rooms []int
		for len(b) >= 4 && len(frames) < 12 {
			call, number, room, n := calls[int(b[0])%len(calls)], mechanisms[int(b[1])%len(mechanisms)], uint64(b[2]), min(int(b[3]), len(b)-4)
			data := b[4 : 4+n]
			key, other := uint64(b[1]>>4)%5, uint64(b[0]>>4)%5
			b = b[4+n:]
			if room == 255 {
				room = ^uint64(0)
			}
			frame := binary.BigEndian.AppendUint32(nil, call)
			for _, shape := range softtoken.Shapes()[call] {
				switch shape {
				case 'M':
					param := data
					if number == softtoken.CKMNeutralSM4CBC || number == softtoken.CKMNeutralSM4CBCPad {
						param = make([]byte, 16)
					} else if number == softtoken.CKMNeutralSM4GCM && n == 0 {
						param = append(append([]byte{0, 0, 0, 12}, make([]byte, 16)...), 0, 0, 0, 0, 0, 0, 0, 128)
					}
					frame = binary.BigEndian.AppendUint64(frame, number)
					frame = append(binary.BigEndian.AppendUint32(frame, uint32(len(param))), param...)
				case 's':
					frame = append(binary.BigEndian.AppendUint32(frame, uint32(len(data))), data...)
				case 'A':
					frame = binary.BigEndian.AppendUint32(frame, 1)
					frame = binary.BigEndian.AppendUint64(frame, uint64(room))
					frame = append(binary.BigEndian.AppendUint32(frame, uint32(len(data))), data...)
				case 'q':
					v := room
					if call == 29 || call == 33 || call == 21 || call == 25 || call == 61 {
						v = key
					} else if call == 60 && len(frame) < 60 {
						v = other
					}
					frame = binary.BigEndian.AppendUint64(frame, v)
				}
			}
			frames, rooms = append(frames, frame), append(rooms, int(min(room, 255)))
		}
		for i, reply := range m.server.ServeAsUser(userPIN, frames) {
			if len(reply) < 12 || int(binary.BigEndian.Uint32(reply)) != len(reply)-4 {
				t.Fatalf("%x is answered with %x", frames[i], reply)
			}
			call := binary.BigEndian.Uint32(frames[i])
			if call >= 30 && call <= 36 && call != 33 && len(reply) > 12 && reply[12] == 1 && rooms[i] < 255 && len(reply)-17 > rooms[i] {
				t.Errorf("%x: %d bytes where there is room for %d", frames[i], len(reply)-17, rooms[i])
			}
		}
	})
}

// FuzzUnwrap: whatever a wrapped key holds, what is taken is a key that works and holds what its template says.
func FuzzUnwrap(f *testing.F) {
	m := newMachine(f)
	p := m.module(f)
	initToken(f, p, 0, "a")
	s := openRW(f, p, 0)
	must(f, p.Login(s, pkcs11.CKU_USER, userPIN))
	outer := importSM4(f, p, s, sm4Key, kek...)
	key, err := sm2.NewPrivateKey(bytes.Repeat([]byte{7}, 32))
	must(f, err)
	pkcs8, err := smx509.MarshalPKCS8PrivateKey(key)
	must(f, err)
	f.Add(pkcs8, byte(0))
	f.Add(pkcs8, byte(1))
	f.Add(sm4Key, byte(2))
	f.Add(sm4Key, byte(3))
	f.Add(pkcs8[:60], byte(0))
	kinds := []struct {
		class, keyType uint
		m              []*pkcs11.Mechanism
	}{
		{pkcs11.CKO_PRIVATE_KEY, softtoken.CKKNeutralSM2, mech(softtoken.CKMNeutralSM2, nil)},
		{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_RSA, mech(pkcs11.CKM_SHA256_RSA_PKCS, nil)},
		{pkcs11.CKO_SECRET_KEY, softtoken.CKKNeutralSM4, mech(softtoken.CKMNeutralSM4CMAC, nil)},
		{pkcs11.CKO_SECRET_KEY, pkcs11.CKK_GENERIC_SECRET, mech(softtoken.CKMNeutralHMACSM3, nil)},
	}
	f.Fuzz(func(t *testing.T, plain []byte, which byte) {
		kind := kinds[int(which)%len(kinds)]
		h, err := p.UnwrapKey(s, gcm(nil, nil), outer, wrapOutside(t, plain), []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, kind.class),
			attr(pkcs11.CKA_KEY_TYPE, kind.keyType), attr(pkcs11.CKA_SIGN, true), attr(pkcs11.CKA_EXTRACTABLE, true)})
		if err != nil {
			wantRV(t, "C_UnwrapKey", err, pkcs11.CKR_WRAPPED_KEY_INVALID)
			return
		}
		mustSign(t, p, s, kind.m, h, bytes.Repeat([]byte{7}, 32))
		wrapped, err := p.WrapKey(s, gcm(nil, nil), outer, h)
		must(t, err)
		if back := unwrapOutside(t, wrapped); kind.class == pkcs11.CKO_SECRET_KEY && !bytes.Equal(back, plain) {
			t.Errorf("%x comes back as %x", plain, back)
		}
		must(t, p.DestroyObject(s, h))
	})
}

// unwrapOutside is the inverse of wrapOutside.
func unwrapOutside(t testing.TB, wrapped []byte) []byte {
	t.Helper()
	block, err := sm4.NewCipher(sm4Key)
	must(t, err)
	aead, err := cipher.NewGCM(block)
	must(t, err)
	plain, err := aead.Open(nil, wrapped[:12], wrapped[12:], nil)
	must(t, err)
	return plain
}
