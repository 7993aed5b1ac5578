package account

import (
	"context"
	"crypto/rand"
	"strings"
	"unicode"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/crypto/pbkdf2"
)

// A FirstPassword is a password that is drawn before there is a cipher machine to make its verifier: stretched, as the verifier
// wants it. It has to be changed at the first login.
type FirstPassword struct {
	Salt       []byte `json:"salt"`
	Iterations int    `json:"iterations"`
	Stretched  []byte `json:"stretched"` // PBKDF2-HMAC-SM3, 32 bytes
}

// firstAlphabet leaves out what is read for something else.
const firstAlphabet = "23456789abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ"

// NewFirstPassword draws a password of some 92 bits, in groups of four, and what is kept of it.
func NewFirstPassword() (string, *FirstPassword) {
	text := drawFirst()
	p := &FirstPassword{Salt: make([]byte, 16), Iterations: passwordIterations}
	rand.Read(p.Salt) // never fails (crypto/rand)
	p.Stretched = pbkdf2.Key([]byte(text), p.Salt, p.Iterations, 32, sm3.New)
	return text, p
}

func drawFirst() string {
	for {
		var b strings.Builder
		for n := 0; n < 16; {
			var one [1]byte
			rand.Read(one[:])
			if int(one[0]) >= 256/len(firstAlphabet)*len(firstAlphabet) { // each letter as likely
				continue
			}
			if n > 0 && n%4 == 0 {
				b.WriteByte('-')
			}
			b.WriteByte(firstAlphabet[int(one[0])%len(firstAlphabet)])
			n++
		}
		s := b.String()
		if strings.ContainsFunc(s, unicode.IsLower) && strings.ContainsFunc(s, unicode.IsUpper) && strings.ContainsFunc(s, unicode.IsDigit) {
			return s // as every other password of an administrator's is
		}
	}
}

// verifier has the cipher machine make the verifier of an administrator's password.
func (p *FirstPassword) verifier(ctx context.Context, m *macs, id string) (*PINVerifier, error) {
	v := &PINVerifier{Salt: p.Salt, Iterations: p.Iterations}
	var err error
	if v.MACKey, err = m.present(ctx, PINKeyLabel); err != nil {
		return nil, err
	}
	v.Tag, err = v.tagOfStretched(ctx, m, passwordDomain, id, p.Stretched)
	return v, err
}
