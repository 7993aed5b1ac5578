package hsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509/pkix"
	stdasn1 "encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/hsm"
)

// A fakeToken holds keys in memory; spoil may change or refuse an answer.
type fakeToken struct {
	hsm.Token
	sm2   *sm2.PrivateKey
	rsa   *rsa.PrivateKey
	raw   bool
	spoil func([]byte) ([]byte, error)

	mu   sync.Mutex
	seen [][]byte // guarded by mu: what Do was asked to sign
}

func (f *fakeToken) FindKey(_ context.Context, label string) (hsm.KeyInfo, error) {
	switch label {
	case "sm2":
		return hsm.KeyInfo{Label: label, Algorithm: hsm.SM2, Public: &f.sm2.PublicKey}, nil
	case "rsa":
		return hsm.KeyInfo{Label: label, Algorithm: hsm.RSA2048, Public: &f.rsa.PublicKey}, nil
	case "mac":
		return hsm.KeyInfo{Label: label, Algorithm: hsm.HMACSM3}, nil
	}
	return hsm.KeyInfo{}, hsm.ErrKeyNotFound
}

func (f *fakeToken) Do(ctx context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.seen = append(f.seen, bytes.Clone(data))
	f.mu.Unlock()
	var sig []byte
	var err error
	switch {
	case label == "sm2" && op == hsm.SignSM2E:
		sig, err = sm2.SignASN1(rand.Reader, f.sm2, data, nil)
		if f.raw && err == nil {
			r, s, perr := hsm.NormalizeSM2(sig)
			if perr != nil {
				return nil, perr
			}
			sig = append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		}
	case label == "rsa" && op == hsm.SignRSASHA256:
		sig, err = rsa.SignPKCS1v15(rand.Reader, f.rsa, crypto.SHA256, data)
	case label == "rsa" && op == hsm.SignRSAPSSSHA256:
		sig, err = rsa.SignPSS(rand.Reader, f.rsa, crypto.SHA256, data, &rsa.PSSOptions{SaltLength: 32})
	default:
		return nil, &hsm.Error{Call: "C_SignInit", RV: 0x63}
	}
	if err == nil && f.spoil != nil {
		sig, err = f.spoil(sig)
	}
	return sig, err
}

var keys = sync.OnceValue(func() *fakeToken {
	s, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return &fakeToken{sm2: s, rsa: r}
})

func token(raw bool, spoil func([]byte) ([]byte, error)) *fakeToken {
	return &fakeToken{sm2: keys().sm2, rsa: keys().rsa, raw: raw, spoil: spoil}
}

func TestKeySignsMessage(t *testing.T) {
	t.Parallel()
	message := []byte("处方 0001")
	for _, raw := range []bool{false, true} {
		tok := token(raw, nil)
		k, err := hsm.NewKey(t.Context(), tok, "sm2", true)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := k.SignMessage(t.Context(), message)
		if err != nil {
			t.Fatal(err)
		}
		if !sm2.VerifyASN1WithSM2(&tok.sm2.PublicKey, nil, message, sig) {
			t.Errorf("raw=%v: gmsm does not verify SM2 with the default ID", raw)
		}
		// The token sees e = SM3(ZA ‖ M), never the message (GM/T 0003.2-2012 §6.1).
		e, err := sm2.CalculateSM2Hash(&tok.sm2.PublicKey, message, []byte(hsm.DefaultSM2ID))
		if err != nil {
			t.Fatal(err)
		}
		if got := tok.seen[0]; !bytes.Equal(got, e) {
			t.Errorf("token was given %x, want e = %x", got, e)
		}
	}
	tok := token(false, nil)
	k, err := hsm.NewKey(t.Context(), tok, "rsa", true)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := k.SignMessage(t.Context(), message)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(message)
	if err := rsa.VerifyPKCS1v15(&tok.rsa.PublicKey, crypto.SHA256, sum[:], sig); err != nil {
		t.Errorf("crypto/rsa: %v", err)
	}
}

func TestKeySignOptions(t *testing.T) {
	t.Parallel()
	tok := token(false, nil)
	k, err := hsm.NewKey(t.Context(), tok, "sm2", true)
	if err != nil {
		t.Fatal(err)
	}
	message := []byte("message")
	digest := sm3.Sum(message)
	for name, c := range map[string]struct {
		in      []byte
		opts    crypto.SignerOpts
		wantErr bool
		message bool
	}{
		"default ID":         {message, sm2.DefaultSM2SignerOpts, false, true},
		"default ID, spelt":  {message, sm2.NewSM2SignerOption(true, []byte(hsm.DefaultSM2ID)), false, true},
		"e, gmsm's option":   {digest[:], sm2.NewSM2SignerOption(false, nil), false, false},
		"e, no option":       {digest[:], nil, false, false},
		"e, crypto.Hash":     {digest[:], crypto.Hash(0), false, false},
		"another ID":         {message, sm2.NewSM2SignerOption(true, []byte("alice")), true, false},
		"message without ID": {message, crypto.Hash(0), true, false},
		"short digest":       {digest[:31], nil, true, false},
		"long digest":        {append(digest[:], 0), nil, true, false},
		"empty":              {nil, nil, true, false},
	} {
		sig, err := k.Sign(nil, c.in, c.opts)
		if (err != nil) != c.wantErr {
			t.Errorf("%s: error %v, want error %v", name, err, c.wantErr)
			continue
		}
		if c.wantErr {
			continue
		}
		if c.message && !sm2.VerifyASN1WithSM2(&tok.sm2.PublicKey, nil, c.in, sig) ||
			!c.message && !sm2.VerifyASN1(&tok.sm2.PublicKey, c.in, sig) {
			t.Errorf("%s: signature does not verify", name)
		}
	}
	k, err = hsm.NewKey(t.Context(), tok, "rsa", true)
	if err != nil {
		t.Fatal(err)
	}
	for name, opts := range map[string]crypto.SignerOpts{
		"nil": nil, "SHA-384": crypto.SHA384, "PSS with SHA-384": &rsa.PSSOptions{Hash: crypto.SHA384, SaltLength: rsa.PSSSaltLengthEqualsHash},
		"PSS, salt as long as may be": &rsa.PSSOptions{Hash: crypto.SHA256}, "PSS, short salt": &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: 20},
		"PSS without a hash": &rsa.PSSOptions{SaltLength: 32},
	} {
		if _, err := k.Sign(nil, digest[:], opts); err == nil {
			t.Errorf("RSA with %s signed", name)
		}
	}
	for _, salt := range []int{rsa.PSSSaltLengthEqualsHash, 32} {
		opts := &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: salt}
		sig, err := k.Sign(nil, digest[:], opts)
		if err != nil || rsa.VerifyPSS(&tok.rsa.PublicKey, crypto.SHA256, digest[:], sig, &rsa.PSSOptions{SaltLength: 32}) != nil {
			t.Errorf("PSS with salt %d: %x, %v", salt, sig, err)
		}
		if _, err := k.Sign(nil, digest[:31], opts); err == nil {
			t.Error("PSS over 31 bytes signed")
		}
		spoilt, err := hsm.NewKey(t.Context(), token(false, func(sig []byte) ([]byte, error) {
			return rsa.SignPKCS1v15(nil, keys().rsa, crypto.SHA256, digest[:]) // good, in the other padding
		}), "rsa", true)
		if err != nil {
			t.Fatal(err)
		}
		if sig, err := spoilt.Sign(nil, digest[:], opts); !errors.Is(err, hsm.ErrBadSignature) {
			t.Errorf("PKCS#1 for PSS = %x, %v; want ErrBadSignature", sig, err)
		}
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.SignContext(done, digest[:], crypto.SHA256); !errors.Is(err, context.Canceled) {
		t.Errorf("SignContext whose context has ended: %v", err)
	}
}

func TestBadSignatureIsWithheld(t *testing.T) {
	t.Parallel()
	digest := sha256.Sum256([]byte("x"))
	flip := func(sig []byte) ([]byte, error) {
		sig = bytes.Clone(sig)
		sig[len(sig)-1] ^= 1
		return sig, nil
	}
	for _, label := range []string{"sm2", "rsa"} {
		k, err := hsm.NewKey(t.Context(), token(true, flip), label, true)
		if err != nil {
			t.Fatal(err)
		}
		if sig, err := k.SignDigest(t.Context(), digest[:]); !errors.Is(err, hsm.ErrBadSignature) || sig != nil {
			t.Errorf("%s: SignDigest = %x, %v; want nothing and ErrBadSignature", label, sig, err)
		}
	}
	// Without verification only the form is judged.
	k, err := hsm.NewKey(t.Context(), token(true, flip), "sm2", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.SignDigest(t.Context(), digest[:]); err != nil {
		t.Errorf("unverified SignDigest = %v", err)
	}
	for name, answer := range map[string][]byte{"empty": nil, "short": make([]byte, 63), "zero": make([]byte, 64)} {
		k, err := hsm.NewKey(t.Context(), token(true, func([]byte) ([]byte, error) { return answer, nil }), "sm2", false)
		if err != nil {
			t.Fatal(err)
		}
		if sig, err := k.SignDigest(t.Context(), digest[:]); err == nil {
			t.Errorf("%s answer passed as %x", name, sig)
		}
	}
}

func TestNewKeyRefuses(t *testing.T) {
	t.Parallel()
	tok := token(false, nil)
	if _, err := hsm.NewKey(t.Context(), tok, "none", true); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("missing key: %v", err)
	}
	if _, err := hsm.NewKey(t.Context(), tok, "mac", true); err == nil {
		t.Error("a secret key passed as a signer")
	}
	small := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}
	if _, err := hsm.KeyOf(tok, hsm.KeyInfo{Public: small}, true); err == nil {
		t.Error("a 1024-bit RSA key passed")
	}
}

// TestCertificates lets gmsm's smx509 sign through crypto.Signer, and verify what came out.
func TestCertificates(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	for _, label := range []string{"sm2", "rsa"} {
		k, err := hsm.NewKey(t.Context(), token(true, nil), label, true)
		if err != nil {
			t.Fatal(err)
		}
		der, err := smx509.CreateCertificateRequest(rand.Reader,
			&smx509.CertificateRequest{Subject: pkix.Name{CommonName: "测试"}}, k)
		if err != nil {
			t.Fatalf("%s: %v", label, err)
		}
		csr, err := smx509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := csr.CheckSignature(); err != nil {
			t.Errorf("%s: CSR: %v", label, err)
		}
		template := &smx509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "根"},
			NotBefore: now, NotAfter: now.AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true}
		der, err = smx509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
		if err != nil {
			t.Fatalf("%s: %v", label, err)
		}
		cert, err := smx509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignatureFrom(cert); err != nil {
			t.Errorf("%s: certificate: %v", label, err)
		}
		if label == "sm2" && cert.SignatureAlgorithm != smx509.SM2WithSM3 {
			t.Errorf("signature algorithm %v, want SM2-SM3", cert.SignatureAlgorithm)
		}
	}
}

// exampleR and exampleS are the signature of GB/T 32918.5-2017 annex A.2 (sm2p256v1, ID 1234567812345678).
const (
	exampleR = "F5A03B0648D2C4630EEAC513E1BB81A15944DA3827D5B74143AC7EACEEE720B3"
	exampleS = "B1B6AA29DF212FD8763182BC0D421CA1BB9038FD1F7F42D4840B69C485BBC1AA"
)

func hexInt(t testing.TB, s string) *big.Int {
	t.Helper()
	v, ok := new(big.Int).SetString(s, 16)
	if !ok {
		t.Fatalf("not a hexadecimal number: %s", s)
	}
	return v
}

func raw64(r, s *big.Int) []byte {
	return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
}

// What is written out for speed is what encoding/asn1 writes, for numbers of every length and with every first bit.
func TestMarshalSM2(t *testing.T) {
	t.Parallel()
	top := new(big.Int).Sub(sm2.P256().Params().N, big.NewInt(1))
	numbers := []*big.Int{top}
	for bits := range uint(255) {
		n := new(big.Int).Lsh(big.NewInt(1), bits)
		numbers = append(numbers, n, new(big.Int).Sub(new(big.Int).Lsh(n, 1), big.NewInt(1)))
	}
	for i, r := range numbers {
		s := numbers[len(numbers)-1-i]
		got, err := hsm.MarshalSM2(r, s)
		want, werr := stdasn1.Marshal(struct{ R, S *big.Int }{r, s})
		if err != nil || werr != nil || !bytes.Equal(got, want) {
			t.Fatalf("%x, %x: %x, %v; want %x, %v", r, s, got, err, want, werr)
		}
	}
}

func TestNormalizeSM2(t *testing.T) {
	t.Parallel()
	n := sm2.P256().Params().N
	one, r, s := big.NewInt(1), hexInt(t, exampleR), hexInt(t, exampleS)
	top := new(big.Int).Sub(n, one)
	der := func(r, s *big.Int) []byte {
		b, err := hsm.MarshalSM2(r, s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// 2 + 2+29 + 2+29 = 64 bytes of DER, as long as the raw form.
	short := new(big.Int).Lsh(big.NewInt(0x41), 28*8)
	if l := len(der(short, short)); l != 64 {
		t.Fatalf("DER of %d bytes, want 64", l)
	}
	for name, c := range map[string]struct {
		in   []byte
		r, s *big.Int // nil: an error is wanted
	}{
		"raw":                 {raw64(r, s), r, s},
		"DER":                 {der(r, s), r, s},
		"DER of 64 bytes":     {der(short, short), short, short},
		"raw, smallest":       {raw64(one, one), one, one},
		"raw, largest":        {raw64(top, top), top, top},
		"DER, largest":        {der(top, one), top, one},
		"raw, r = 0":          {raw64(new(big.Int), s), nil, nil},
		"raw, s = 0":          {raw64(r, new(big.Int)), nil, nil},
		"raw, r = n":          {raw64(n, s), nil, nil},
		"raw, s = n":          {raw64(r, n), nil, nil},
		"DER, r = 0":          {der(new(big.Int), s), nil, nil},
		"DER, s = n":          {der(r, n), nil, nil},
		"DER, r negative":     {der(new(big.Int).Neg(r), s), nil, nil},
		"DER, trailing byte":  {append(der(r, s), 0), nil, nil},
		"DER, truncated":      {der(r, s)[:len(der(r, s))-1], nil, nil},
		"DER, long form":      {append([]byte{0x30, 0x81, 0x06}, der(one, one)[2:]...), nil, nil},
		"DER, padded integer": {[]byte{0x30, 7, 2, 2, 0, 1, 2, 1, 1}, nil, nil},
		"DER, three integers": {[]byte{0x30, 9, 2, 1, 1, 2, 1, 1, 2, 1, 1}, nil, nil},
		"empty":               {nil, nil, nil},
		"63 bytes":            {raw64(r, s)[:63], nil, nil},
		"65 bytes":            {append(raw64(r, s), 0), nil, nil},
	} {
		gr, gs, err := hsm.NormalizeSM2(c.in)
		if c.r == nil {
			if err == nil {
				t.Errorf("%s: passed as %x, %x", name, gr, gs)
			}
			continue
		}
		if err != nil || gr.Cmp(c.r) != 0 || gs.Cmp(c.s) != 0 {
			t.Errorf("%s: %x, %x, %v", name, gr, gs, err)
		}
	}
}

// TestPublishedSignature verifies the example of GB/T 32918.5-2017 annex A.2 through the same path that a token's
// answer takes.
func TestPublishedSignature(t *testing.T) {
	t.Parallel()
	pub := &ecdsa.PublicKey{Curve: sm2.P256(),
		X: hexInt(t, "09F9DF311E5421A150DD7D161E4BC5C672179FAD1833FC076BB08FF356F35020"),
		Y: hexInt(t, "CCEA490CE26775A52DC6EA718CC1AA600AED05FBF35E084A6632F6072DA9AD13")}
	answer := raw64(hexInt(t, exampleR), hexInt(t, exampleS))
	tok := &fixedToken{answer: answer}
	k, err := hsm.KeyOf(tok, hsm.KeyInfo{Label: "annex", Algorithm: hsm.SM2, Public: pub}, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.SignMessage(t.Context(), []byte("message digest")); err != nil {
		t.Errorf("the annex's signature: %v", err)
	}
	if _, err := k.SignMessage(t.Context(), []byte("message digesT")); !errors.Is(err, hsm.ErrBadSignature) {
		t.Errorf("the annex's signature over another message: %v", err)
	}
	wantE := hexInt(t, "F0B43E94BA45ACCAACE692ED534382EB17E6AB5A19CE7B31F4486FDFC0D28640")
	if got := new(big.Int).SetBytes(tok.data); got.Cmp(wantE) != 0 {
		t.Errorf("e = %x, want %x", got, wantE)
	}
}

type fixedToken struct {
	hsm.Token
	answer, data []byte
	calls        int
}

func (f *fixedToken) Do(_ context.Context, _ string, _ hsm.Operation, data []byte) ([]byte, error) {
	if f.calls++; f.calls == 1 {
		f.data = data
	}
	return f.answer, nil
}

func FuzzNormalizeSM2(f *testing.F) {
	r, s := hexInt(f, exampleR), hexInt(f, exampleS)
	der, err := hsm.MarshalSM2(r, s)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range [][]byte{raw64(r, s), der, der[:70], {0x30, 0}, {0x30, 6, 2, 1, 1, 2, 1, 1}, make([]byte, 64), nil} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r, s, err := hsm.NormalizeSM2(in)
		if err != nil {
			return
		}
		n := sm2.P256().Params().N
		if r.Sign() <= 0 || s.Sign() <= 0 || r.Cmp(n) >= 0 || s.Cmp(n) >= 0 {
			t.Fatalf("out of range: %x, %x", r, s)
		}
		der, err := hsm.MarshalSM2(r, s)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(in, der) && !bytes.Equal(in, raw64(r, s)) {
			t.Fatalf("%x is neither form of %x, %x", in, r, s)
		}
	})
}

func TestErrors(t *testing.T) {
	t.Parallel()
	for rv, want := range map[uint]string{0xA0: "CKR_PIN_INCORRECT", 0x32: "CKR_DEVICE_REMOVED", 0x80000123: "CKR 0x80000123"} {
		if got := hsm.RVName(rv); got != want {
			t.Errorf("RVName(%#x) = %q, want %q", rv, got, want)
		}
	}
	refused := fmt.Errorf("opening: %w", &hsm.Error{Call: "C_Login", RV: hsm.CKR_PIN_LOCKED})
	if !errors.Is(refused, hsm.ErrNeedsOperator) {
		t.Error("CKR_PIN_LOCKED is not ErrNeedsOperator")
	}
	if want := "opening: hsm: C_Login: CKR_PIN_LOCKED"; refused.Error() != want {
		t.Errorf("message %q, want %q", refused, want)
	}
	if errors.Is(&hsm.Error{Call: "C_Sign", RV: 0x32}, hsm.ErrNeedsOperator) {
		t.Error("CKR_DEVICE_REMOVED is ErrNeedsOperator")
	}
	for rv, want := range map[uint]hsm.Class{0x07: hsm.ClassPermanent, 0xB3: hsm.ClassSession, 0x60: hsm.ClassRefind,
		0x101: hsm.ClassLogin, 0x30: hsm.ClassReconnect, 0xB1: hsm.ClassBackpressure, 0xA3: hsm.ClassFatal,
		0x80000001: hsm.ClassUnknown} {
		if got := hsm.ClassifyError(fmt.Errorf("x: %w", &hsm.Error{Call: "C_Sign", RV: rv})); got != want {
			t.Errorf("class of %#x = %v, want %v", rv, got, want)
		}
	}
	if got := hsm.ClassifyError(errors.New("other")); got != hsm.ClassUnknown {
		t.Errorf("class of a plain error = %v", got)
	}
}
