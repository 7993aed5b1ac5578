package appliance

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/hsm"
)

// tlsLabel is the listener's key in the tls slot.
const tlsLabel = "tls/api"

const (
	kindTLSKeyIntent = "appliance.tls_key/intent"
	kindTLSKey       = "appliance.tls_key/outcome"
)

// A listenerIdentity is what the API's listener proves itself with: its keys, and the certificate of one of them. The
// certificate may be replaced while the listener serves.
type listenerIdentity struct {
	slot        *handshakeKey // the key in the cipher machine; nil without hsm.slots.tls
	file        crypto.Signer // the key in secrets/tls.key; nil without that file
	certificate atomic.Pointer[tls.Certificate]
}

// key is the one for a new certificate: the cipher machine's, where there is one.
func (l *listenerIdentity) key() crypto.Signer {
	if l.slot != nil {
		return l.slot
	}
	return l.file
}

// use has handshakes from now on answered with chain (DER, the listener's own certificate first), whose key must be one
// of the listener's, or of more. Connections and sessions that stand go on.
func (l *listenerIdentity) use(chain [][]byte, more ...*handshakeKey) error {
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("TLS certificate: %w", err)
	}
	if l.slot != nil {
		more = append(more, l.slot)
	}
	for _, key := range more {
		if isOf(leaf.PublicKey, key) {
			l.certificate.Store(&tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf,
				SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.PSSWithSHA256, tls.PKCS1WithSHA256}})
			return nil
		}
	}
	switch {
	case isOf(leaf.PublicKey, l.file):
		l.certificate.Store(&tls.Certificate{Certificate: chain, PrivateKey: l.file, Leaf: leaf})
	default:
		return errors.New("TLS 证书的公钥不属于本机：密码机 tls 槽位与 secrets/tls.key 中都没有它的私钥 (the TLS certificate is for none of the listener's keys: neither the tls slot nor secrets/tls.key has it)")
	}
	return nil
}

// state is the certificate that handshakes are answered with; nil before there is one.
func (l *listenerIdentity) state() *servedCertificate {
	c := l.certificate.Load()
	if c == nil {
		return nil
	}
	sum := sha256.Sum256(c.Certificate[0])
	return &servedCertificate{Fingerprint: hex.EncodeToString(sum[:]), NotAfter: c.Leaf.NotAfter.UTC().Format(time.RFC3339)}
}

// warnings says what an operator should know of the key in use.
func (l *listenerIdentity) warnings() []string {
	c := l.certificate.Load()
	if c == nil {
		return nil
	}
	if c.PrivateKey == l.file {
		return []string{"TLS 私钥是文件，不在密码机内 (the TLS key is a file, not in the cipher machine)"}
	}
	key, _ := c.PrivateKey.(*handshakeKey) // the only other kind
	if failure := key.failure.Load(); failure != nil {
		return []string{"上一次 TLS 握手未得到密码机签名，新连接可能不成，已有连接不受影响 (the last TLS handshake got no signature: new connections may fail, open ones go on): " + *failure}
	}
	return nil
}

// isOf says whether pub is the public half of key, which may be nil.
func isOf(pub crypto.PublicKey, key crypto.Signer) bool {
	p, ok := pub.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key != nil && p.Equal(key.Public())
}

var errHandshakes = errors.New("appliance: too many TLS handshakes wait for the cipher machine")

// A handshakeKey is the listener's key in the cipher machine as crypto/tls uses it: each signature has a deadline, and
// the number of those that wait is bounded. Only full handshakes use it; a resumed session (RFC 8446 §2.2) does not.
type handshakeKey struct {
	key      *hsm.Key
	deadline time.Duration
	room     chan struct{}
	failure  atomic.Pointer[string] // why the last signature was not made, nil when it was
}

func newHandshakeKey(key *hsm.Key, deadline time.Duration, most int) *handshakeKey {
	return &handshakeKey{key: key, deadline: deadline, room: make(chan struct{}, most)}
}

func (k *handshakeKey) Public() crypto.PublicKey { return k.key.Public() }

// Sign satisfies crypto.Signer, for SHA-256 with RSASSA-PSS or PKCS#1.
func (k *handshakeKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	select {
	case k.room <- struct{}{}:
		defer func() { <-k.room }()
	default:
		return nil, errHandshakes
	}
	ctx, cancel := context.WithTimeout(context.Background(), k.deadline) // crypto.Signer has none
	defer cancel()
	sig, err := k.key.SignContext(ctx, digest, opts)
	if err != nil {
		text := err.Error()
		k.failure.Store(&text)
		return nil, err
	}
	k.failure.Store(nil)
	return sig, nil
}

// loadTLSKeys finds the listener's keys. The slot's is made by a birth, and in an appliance that was born with its key
// in a file: the file's goes on serving until there is a certificate for the other.
func (a *Appliance) loadTLSKeys(ctx context.Context) error {
	var err error
	if a.listener.file, err = readTLSKey(a.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	t, ok := a.tokens[hsm.TLS]
	if !ok {
		if err != nil {
			err = fmt.Errorf("配置中没有 hsm.slots.tls，因此需要文件私钥 (there is no hsm.slots.tls, so the key has to be a file): %w", err)
		}
		return err
	}
	info, _, err := ensureKey(ctx, t, tlsLabel, hsm.RSA2048, a.identity == nil)
	if errors.Is(err, hsm.ErrKeyNotFound) && a.identity.bornWith(a.listener.file) {
		info, err = a.makeTLSKey(ctx, t)
	}
	if err != nil {
		return err
	}
	key, err := hsm.KeyOf(t, info, *a.cfg.HSM.VerifyFresh)
	if err != nil {
		return err
	}
	a.listener.slot = newHandshakeKey(key, time.Duration(a.cfg.HSM.CallDeadline), api.MaxHandshakes)
	return nil
}

// makeTLSKey makes the slot's key in an appliance that was born without it, and journals that: intent, then outcome.
func (a *Appliance) makeTLSKey(ctx context.Context, t hsm.Token) (hsm.KeyInfo, error) {
	if _, err := a.journal.Append(ctx, audit.Draft{Kind: kindTLSKeyIntent, Actor: "appliance", Object: tlsLabel}); err != nil {
		return hsm.KeyInfo{}, err
	}
	info, _, err := ensureKey(ctx, t, tlsLabel, hsm.RSA2048, true)
	if err != nil {
		return info, err
	}
	spki, err := smx509.MarshalPKIXPublicKey(info.Public)
	if err != nil {
		return info, err
	}
	_, err = a.journal.Append(ctx, audit.Draft{
		Kind: kindTLSKey, Actor: "appliance", Object: tlsLabel, State: true, Fields: []audit.Field{{Name: "spki", Value: audit.Octets(spki)}},
	})
	return info, err
}

// bornWith says whether the listener's first certificate is for this key.
func (id *identity) bornWith(key crypto.Signer) bool {
	cert, err := x509.ParseCertificate(id.TLSCert)
	return err == nil && isOf(cert.PublicKey, key)
}

// readTLSKey reads the key of an appliance without a tls slot.
func readTLSKey(dir string) (crypto.Signer, error) {
	b, err := os.ReadFile(filepath.Join(dir, "secrets", "tls.key"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("secrets/tls.key: not PEM")
	}
	key, err := smx509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("secrets/tls.key: %w", err)
	}
	s, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("secrets/tls.key: not a signing key")
	}
	return s, nil
}
