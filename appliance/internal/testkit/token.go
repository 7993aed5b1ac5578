package testkit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"sort"
	"strings"
	"sync"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/hsm"
)

// A Token is an hsm.Token with its keys in memory. Methods that are not here panic.
type Token struct {
	hsm.Token

	mu        sync.Mutex
	keys      map[string]any                     // guarded by mu, by label: *sm2.PrivateKey, *rsa.PrivateKey or []byte
	before    func(call, label string) error     // guarded by mu
	after     func(call, label string) error     // guarded by mu
	spoil     func(info hsm.KeyInfo) hsm.KeyInfo // guarded by mu
	calls     map[string]int                     // guarded by mu, by call
	abandoned []hsm.KeySpec                      // guarded by mu: keys that Land makes

	wrapping cipher.AEAD         // the one wrapping key
	cached   map[[32]byte]string // guarded by mu: unwrapped keys, by digest, to the label they are under in keys
}

// NewToken is a token without keys.
func NewToken() *Token {
	key := make([]byte, 16)
	rand.Read(key)
	block, err := sm4.NewCipher(key)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return &Token{keys: map[string]any{}, calls: map[string]int{}, wrapping: aead, cached: map[[32]byte]string{}}
}

// Import brings a MAC key in, as a ceremony does.
func (t *Token) Import(label string, value []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys[label] = bytes.Clone(value)
}

// ShareKEK gives the token the wrapping key of another one.
func (t *Token) ShareKEK(with *Token) { t.wrapping = with.wrapping }

// Before has f decide, before a call does anything, whether it fails; nil: none does. f runs without locks held.
func (t *Token) Before(f func(call, label string) error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.before = f
}

// After has f decide whether the answer of a call that was done is lost.
func (t *Token) After(f func(call, label string) error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.after = f
}

// Spoil has f change how new keys are described.
func (t *Token) Spoil(f func(hsm.KeyInfo) hsm.KeyInfo) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.spoil = f
}

// Land makes the keys whose callers had gone before they were made.
func (t *Token) Land(ctx context.Context) error {
	t.mu.Lock()
	late := t.abandoned
	t.abandoned = nil
	t.mu.Unlock()
	for _, spec := range late {
		if _, err := t.GenerateKey(ctx, spec); err != nil {
			return err
		}
	}
	return nil
}

// Calls counts the calls of a name.
func (t *Token) Calls(name string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.calls[name]
}

// CallsOn counts those of one key: other keys of a token are used beside the test, as for a checkpoint.
func (t *Token) CallsOn(name, label string) int { return t.Calls(name + " " + label) }

func (t *Token) enter(call, label string) error {
	t.mu.Lock()
	t.calls[call]++
	t.calls[call+" "+label]++
	f := t.before
	t.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(call, label)
}

func (t *Token) leave(call, label string) error {
	t.mu.Lock()
	f := t.after
	t.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(call, label)
}

// RSA keys are slow to make: there is one for CAs, one for timestamp units and one that all signers share.
var rsaKeys = [3]func() *rsa.PrivateKey{sync.OnceValue(newRSA), sync.OnceValue(newRSA), sync.OnceValue(newRSA)}

func newRSA() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
}

// GenerateKey makes a key.
func (t *Token) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error) {
	if err := t.enter("GenerateKey", spec.Label); err != nil {
		return hsm.KeyInfo{}, err
	}
	if err := ctx.Err(); err != nil { // a worker goes on without its caller
		t.mu.Lock()
		defer t.mu.Unlock()
		t.abandoned = append(t.abandoned, spec)
		return hsm.KeyInfo{}, err
	}
	var key any
	var err error
	switch spec.Algorithm {
	case hsm.SM2:
		key, err = sm2.GenerateKey(rand.Reader)
	case hsm.RSA2048:
		i := 2
		if strings.HasPrefix(spec.Label, "ca/") {
			i = 0
		} else if strings.HasPrefix(spec.Label, "tsa/") {
			i = 1
		}
		key = rsaKeys[i]()
	case hsm.HMACSM3:
		b := make([]byte, 32)
		_, err = rand.Read(b)
		key = b
	default:
		err = fmt.Errorf("testkit: algorithm %q", spec.Algorithm)
	}
	if err != nil {
		return hsm.KeyInfo{}, err
	}
	t.mu.Lock()
	if t.keys[spec.Label] != nil {
		t.mu.Unlock()
		return hsm.KeyInfo{}, hsm.ErrKeyExists
	}
	t.keys[spec.Label] = key
	t.mu.Unlock()
	if err := t.leave("GenerateKey", spec.Label); err != nil {
		return hsm.KeyInfo{}, err
	}
	return t.FindKey(context.Background(), spec.Label)
}

// GenerateWrapped makes a key and forgets it; the wrapping key has any label.
func (t *Token) GenerateWrapped(ctx context.Context, spec hsm.KeySpec, _ string) (hsm.KeyInfo, []byte, error) {
	info, err := t.GenerateKey(ctx, spec)
	if err != nil {
		return info, nil, err
	}
	t.mu.Lock()
	key := t.keys[spec.Label]
	delete(t.keys, spec.Label)
	t.mu.Unlock()
	der, err := smx509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return info, nil, err
	}
	aad, err := hsm.WrappingAAD(spec.Label, spec.Algorithm, info.Public)
	if err != nil {
		return info, nil, err
	}
	nonce := make([]byte, 12)
	rand.Read(nonce)
	info.Extractable, info.NeverExtractable = true, false
	return info, t.wrapping.Seal(nonce, nonce, der, aad), nil
}

// DoWrapped unwraps the key, once, and signs with it.
func (t *Token) DoWrapped(ctx context.Context, w *hsm.WrappedKey, op hsm.Operation, data []byte) ([]byte, error) {
	if err := t.enter("DoWrapped", w.Label); err != nil {
		return nil, err
	}
	digest := w.Digest()
	hidden := fmt.Sprintf("\x00unwrapped/%x", digest)
	t.mu.Lock()
	_, have := t.cached[digest]
	t.mu.Unlock()
	if !have {
		aad, err := hsm.WrappingAAD(w.Label, w.Algorithm, w.Public)
		if err != nil || len(w.Blob) < 12 {
			return nil, hsm.ErrNotCached
		}
		der, err := t.wrapping.Open(nil, w.Blob[:12], w.Blob[12:], aad)
		if err != nil {
			return nil, &hsm.Error{Call: "C_UnwrapKey", RV: 0x110}
		}
		key, err := smx509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return nil, err
		}
		t.mu.Lock()
		t.keys[hidden], t.cached[digest] = key, hidden
		t.mu.Unlock()
	}
	return t.Do(ctx, hidden, op, data)
}

// ForgetWrapped forgets an unwrapped key.
func (t *Token) ForgetWrapped(_ context.Context, digest [32]byte) error {
	if err := t.enter("ForgetWrapped", ""); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.keys, t.cached[digest])
	delete(t.cached, digest)
	return nil
}

// Unwrapped counts the wrapped keys that are unwrapped.
func (t *Token) Unwrapped() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.cached)
}

// FindKey describes a key.
func (t *Token) FindKey(_ context.Context, label string) (hsm.KeyInfo, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	info := hsm.KeyInfo{Label: label, Sensitive: true, NeverExtractable: true}
	switch k := t.keys[label].(type) {
	case *sm2.PrivateKey:
		info.Algorithm, info.Public = hsm.SM2, &k.PublicKey
	case *rsa.PrivateKey:
		info.Algorithm, info.Public = hsm.RSA2048, &k.PublicKey
	case []byte:
		info.Algorithm = hsm.HMACSM3
	default:
		return info, hsm.ErrKeyNotFound
	}
	if t.spoil != nil {
		info = t.spoil(info)
	}
	return info, nil
}

// Keys lists all, by label.
func (t *Token) Keys(ctx context.Context) ([]hsm.KeyInfo, error) {
	if err := t.enter("Keys", ""); err != nil {
		return nil, err
	}
	var out []hsm.KeyInfo
	for _, label := range t.Labels() {
		info, err := t.FindKey(ctx, label)
		if err != nil {
			return nil, err
		}
		out = append(out, info)
	}
	return out, nil
}

// Labels lists the keys there are.
func (t *Token) Labels() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := []string{}
	for l := range t.keys {
		if !strings.HasPrefix(l, "\x00") { // a session object
			out = append(out, l)
		}
	}
	sort.Strings(out)
	return out
}

// DestroyKey forgets a key.
func (t *Token) DestroyKey(_ context.Context, label string) error {
	if err := t.enter("DestroyKey", label); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.keys[label] == nil {
		return hsm.ErrKeyNotFound
	}
	delete(t.keys, label)
	return nil
}

// Do signs or computes a MAC.
func (t *Token) Do(ctx context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	if err := t.enter("Do", label); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	key := t.keys[label]
	t.mu.Unlock()
	var out []byte
	var err error
	switch k := key.(type) {
	case *sm2.PrivateKey:
		if op != hsm.SignSM2E {
			return nil, &hsm.Error{Call: "C_SignInit", RV: 0x63}
		}
		out, err = sm2.SignASN1(rand.Reader, k, data, nil)
	case *rsa.PrivateKey:
		if op != hsm.SignRSASHA256 {
			return nil, &hsm.Error{Call: "C_SignInit", RV: 0x63}
		}
		out, err = rsa.SignPKCS1v15(nil, k, crypto.SHA256, data)
	case []byte:
		if op != hsm.MACSM3 {
			return nil, &hsm.Error{Call: "C_SignInit", RV: 0x63}
		}
		h := hmac.New(sm3.New, k)
		h.Write(bytes.Clone(data))
		out = h.Sum(nil)
	default:
		return nil, hsm.ErrKeyNotFound
	}
	if err != nil {
		return nil, err
	}
	return out, t.leave("Do", label)
}

// MAC satisfies account.MAC.
func (t *Token) MAC(ctx context.Context, label string, data []byte) ([]byte, error) {
	return t.Do(ctx, label, hsm.MACSM3, data)
}
