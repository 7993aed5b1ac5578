package appliance_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/appliance"
	"yinjian/hsm"
)

// A deadToken answers nobody until it is woken; it then signs with its key.
type deadToken struct {
	hsm.Token
	key    *rsa.PrivateKey
	asked  chan struct{} // one value for each call
	awake  chan struct{} // closed when it answers
	broken error
}

func (d *deadToken) Do(ctx context.Context, _ string, _ hsm.Operation, data []byte) ([]byte, error) {
	d.asked <- struct{}{}
	select {
	case <-d.awake:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if d.broken != nil {
		return nil, d.broken
	}
	return rsa.SignPSS(rand.Reader, d.key, crypto.SHA256, data, &rsa.PSSOptions{SaltLength: 32})
}

var listenerKeys = sync.OnceValue(func() (keys [2]*rsa.PrivateKey) {
	for i := range keys {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			panic(err)
		}
		keys[i] = k
	}
	return keys
})

func newDeadToken(t *testing.T, most int, deadline time.Duration) (*deadToken, *appliance.HandshakeKey) {
	t.Helper()
	d := &deadToken{key: listenerKeys()[0], asked: make(chan struct{}, 1000), awake: make(chan struct{})}
	key, err := hsm.KeyOf(d, hsm.KeyInfo{Label: "tls/api", Algorithm: hsm.RSA2048, Public: &d.key.PublicKey}, true)
	if err != nil {
		t.Fatal(err)
	}
	return d, appliance.NewHandshakeKey(key, deadline, most)
}

var pss = &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash}

// A cipher machine that does not answer holds up a bounded number of handshakes; one more is refused while they wait,
// and all are served when it answers again.
func TestHandshakesDoNotPileUp(t *testing.T) {
	t.Parallel()
	const most = 3
	d, key := newDeadToken(t, most, time.Hour)
	digest := sha256.Sum256([]byte("handshake"))
	var waiting sync.WaitGroup
	for range most {
		waiting.Go(func() {
			sig, err := key.Sign(nil, digest[:], pss)
			if err != nil || rsa.VerifyPSS(&d.key.PublicKey, crypto.SHA256, digest[:], sig, pss) != nil {
				t.Errorf("Sign = %x, %v", sig, err)
			}
		})
	}
	for range most {
		<-d.asked
	}
	for range 10 {
		if _, err := key.Sign(nil, digest[:], pss); !errors.Is(err, appliance.ErrHandshakes) {
			t.Errorf("a handshake too many: %v", err)
		}
	}
	if len(d.asked) != 0 {
		t.Error("the cipher machine was asked for a handshake too many")
	}
	close(d.awake)
	waiting.Wait()
	if _, err := key.Sign(nil, digest[:], pss); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A handshake ends with its deadline, and what went wrong is said until one succeeds.
func TestHandshakeDeadline(t *testing.T) {
	t.Parallel()
	d, key := newDeadToken(t, 1, time.Millisecond)
	l := appliance.NewListenerIdentity(key)
	if w := l.Warnings(); len(w) != 0 {
		t.Errorf("without a certificate: %v", w)
	}
	if err := l.Use([][]byte{selfSigned(t, listenerKeys()[0])}); err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("handshake"))
	if _, err := key.Sign(nil, digest[:], pss); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Sign = %v, want its deadline", err)
	}
	if w := strings.Join(l.Warnings(), "\n"); !strings.Contains(w, "TLS 握手") || !strings.Contains(w, "deadline") {
		t.Errorf("warnings = %q", w)
	}
	close(d.awake)
	d.broken = hsm.ErrUnavailable
	if _, err := key.Sign(nil, digest[:], pss); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Sign = %v, want what the token said", err)
	}
	d.broken = nil
	for range 100 { // the deadline is short for a real signature
		if _, err := key.Sign(nil, digest[:], pss); err == nil {
			break
		}
	}
	if w := l.Warnings(); len(w) != 0 {
		t.Errorf("warnings after a success: %v", w)
	}
}

func selfSigned(t *testing.T, key *rsa.PrivateKey) []byte {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// A certificate of a key that is not the listener's never takes the place of one that is.
func TestListenerRefusesForeignCertificate(t *testing.T) {
	t.Parallel()
	_, key := newDeadToken(t, 1, time.Hour)
	l := appliance.NewListenerIdentity(key)
	for name, chain := range map[string][][]byte{"another key's": {selfSigned(t, listenerKeys()[1])}, "no certificate": {{0x30, 0}}} {
		if err := l.Use(chain); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if err := l.Use([][]byte{selfSigned(t, listenerKeys()[0])}); err != nil {
		t.Errorf("its own: %v", err)
	}
}
