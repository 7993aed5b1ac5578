package softtoken_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"github.com/miekg/pkcs11"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
	"yinjian/hsm/softtoken"
)

// sm2Public reads the public key from CKA_EC_POINT.
func sm2Public(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, pub pkcs11.ObjectHandle) *ecdsa.PublicKey {
	t.Helper()
	point := value(t, p, s, pub, pkcs11.CKA_EC_POINT)
	if len(point) != 67 || point[0] != 4 || point[1] != 65 {
		t.Fatalf("CKA_EC_POINT = %x, want an OCTET STRING of 65 bytes", point)
	}
	key, err := sm2.NewPublicKey(point[2:])
	must(t, err)
	return key
}

func derOf(raw []byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1BigInt(new(big.Int).SetBytes(raw[:32]))
		b.AddASN1BigInt(new(big.Int).SetBytes(raw[32:]))
	})
	return b.BytesOrPanic()
}

func TestSM2SignsDigest(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	e := sm3.Sum([]byte("e"))
	for name, row := range map[string]struct {
		gen    uint
		sign   uint
		params bool
		kind   uint
	}{
		"PKCS#11's own numbers": {pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKM_ECDSA, true, pkcs11.CKK_EC},
		"neutral numbers":       {softtoken.CKMNeutralSM2KeyPairGen, softtoken.CKMNeutralSM2, false, softtoken.CKKNeutralSM2},
	} {
		t.Run(name, func(t *testing.T) {
			templ := []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, name)}
			if row.params {
				templ = append(templ, attr(pkcs11.CKA_EC_PARAMS, sm2OID))
			}
			pub, priv, err := p.GenerateKeyPair(s, mech(row.gen, nil), templ, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, name)})
			must(t, err)
			if got := value(t, p, s, priv, pkcs11.CKA_KEY_TYPE); string(got) != string(attr(0, row.kind).Value) {
				t.Errorf("CKA_KEY_TYPE = %x, want %#x", got, row.kind)
			}
			sig := mustSign(t, p, s, mech(row.sign, nil), priv, e[:])
			if len(sig) != 64 {
				t.Fatalf("signature of %d bytes, want r ‖ s", len(sig))
			}
			key := sm2Public(t, p, s, pub)
			if !sm2.VerifyASN1(key, e[:], derOf(sig)) {
				t.Error("gmsm refuses the signature")
			}
			must(t, p.VerifyInit(s, mech(row.sign, nil), pub))
			must(t, p.Verify(s, e[:], sig))
			sig[5] ^= 1
			must(t, p.VerifyInit(s, mech(row.sign, nil), pub))
			wantRV(t, "C_Verify of a changed signature", p.Verify(s, e[:], sig), pkcs11.CKR_SIGNATURE_INVALID)
			must(t, p.VerifyInit(s, mech(row.sign, nil), pub))
			wantRV(t, "C_Verify of a short signature", p.Verify(s, e[:], sig[:63]), pkcs11.CKR_SIGNATURE_LEN_RANGE)
			_, err = sign(p, s, mech(row.sign, nil), priv, e[:31])
			wantRV(t, "C_Sign of 31 bytes", err, pkcs11.CKR_DATA_LEN_RANGE)
		})
	}
}

// TestSM2SignsMessageForOpenSSL has OpenSSL verify what the token hashed and signed, with the default ID and another.
func TestSM2SignsMessageForOpenSSL(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pub, priv := generateSM2(t, p, s, "k")
	der, err := smx509.MarshalPKIXPublicKey(sm2Public(t, p, s, pub))
	must(t, err)
	dir := t.TempDir()
	keyFile, msgFile, sigFile := filepath.Join(dir, "k.pem"), filepath.Join(dir, "m"), filepath.Join(dir, "s")
	must(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600))
	message := []byte(strings.Repeat("病历 ", 50_000)) // longer than one piece of the module's
	must(t, os.WriteFile(msgFile, message, 0o600))
	for id, param := range map[string][]byte{"1234567812345678": nil, "ALICE123@YAHOO.COM": []byte("ALICE123@YAHOO.COM")} {
		once := mustSign(t, p, s, mech(softtoken.CKMNeutralSM2SM3, param), priv, message)
		must(t, p.SignInit(s, mech(softtoken.CKMNeutralSM2SM3, param), priv))
		must(t, p.SignUpdate(s, message[:100_001]))
		must(t, p.SignUpdate(s, nil))
		must(t, p.SignUpdate(s, message[100_001:]))
		parts, err := p.SignFinal(s)
		must(t, err)
		for _, sig := range [][]byte{once, parts} {
			must(t, os.WriteFile(sigFile, derOf(sig), 0o600))
			out := tool(t, nil, "openssl", "dgst", "-sm3", "-verify", keyFile, "-sigopt", "distid:"+id, "-signature", sigFile, msgFile)
			if !strings.Contains(out, "Verified OK") {
				t.Errorf("openssl with ID %s: %s", id, out)
			}
			must(t, p.VerifyInit(s, mech(softtoken.CKMNeutralSM2SM3, param), pub))
			must(t, p.VerifyUpdate(s, message[:7]))
			must(t, p.VerifyUpdate(s, message[7:]))
			must(t, p.VerifyFinal(s, sig))
		}
		must(t, p.VerifyInit(s, mech(softtoken.CKMNeutralSM2SM3, []byte("someone else")), pub))
		wantRV(t, "C_Verify with another ID", p.Verify(s, message, once), pkcs11.CKR_SIGNATURE_INVALID)
	}
}

// TestSM2Vector is GB/T 32918.5-2017 annex A (the recommended curve, ID 1234567812345678): d, e and the published
// signature.
func TestSM2Vector(t *testing.T) {
	t.Parallel()
	d := unhex(t, "3945208F7B2144B13F36E38AC6D39F95889393692860B51A42FB81EF4DF7C5B8")
	point := unhex(t, "04"+"09F9DF311E5421A150DD7D161E4BC5C672179FAD1833FC076BB08FF356F35020"+"CCEA490CE26775A52DC6EA718CC1AA600AED05FBF35E084A6632F6072DA9AD13")
	published := unhex(t, "F5A03B0648D2C4630EEAC513E1BB81A15944DA3827D5B74143AC7EACEEE720B3"+"B1B6AA29DF212FD8763182BC0D421CA1BB9038FD1F7F42D4840B69C485BBC1AA")
	message, id := []byte("message digest"), []byte("1234567812345678")
	sig, e, err := softtoken.SignSM2Message(d, id, message)
	must(t, err)
	if want := "f0b43e94ba45accaace692ed534382eb17e6ab5a19ce7b31f4486fdfc0d28640"; hex.EncodeToString(e) != want {
		t.Errorf("e = %x, want %s", e, want)
	}
	if rv := softtoken.VerifySM2Message(point, id, message, sig); rv != 0 {
		t.Errorf("own signature: CKR %#x", rv)
	}
	if rv := softtoken.VerifySM2Message(point, id, message, published); rv != 0 {
		t.Errorf("published signature: CKR %#x", rv)
	}
	if rv := softtoken.VerifySM2Message(point, id, []byte("message digesu"), published); rv != 0xC0 {
		t.Errorf("another message: CKR %#x, want CKR_SIGNATURE_INVALID", rv)
	}
}

func TestRSAVerifiesOutside(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pubHandle, priv := generateRSA(t, p, s, "rsa")
	pub := &rsa.PublicKey{
		N: new(big.Int).SetBytes(value(t, p, s, pubHandle, pkcs11.CKA_MODULUS)),
		E: int(new(big.Int).SetBytes(value(t, p, s, pubHandle, pkcs11.CKA_PUBLIC_EXPONENT)).Int64()),
	}
	message := []byte("message")
	sum := sha256.Sum256(message)
	info := append(unhex(t, "3031300d060960864801650304020105000420"), sum[:]...) // RFC 8017 §9.2 note 1
	hashed := mustSign(t, p, s, mech(pkcs11.CKM_SHA256_RSA_PKCS, nil), priv, message)
	padded := mustSign(t, p, s, mech(pkcs11.CKM_RSA_PKCS, nil), priv, info)
	if string(hashed) != string(padded) {
		t.Error("CKM_SHA256_RSA_PKCS and CKM_RSA_PKCS over the DigestInfo differ")
	}
	if err := rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], hashed); err != nil {
		t.Errorf("crypto/rsa: %v", err)
	}
	for number, data := range map[uint][]byte{pkcs11.CKM_SHA256_RSA_PKCS: message, pkcs11.CKM_RSA_PKCS: info} {
		must(t, p.VerifyInit(s, mech(number, nil), pubHandle))
		must(t, p.Verify(s, data, hashed))
	}
	_, err := sign(p, s, mech(pkcs11.CKM_RSA_PKCS, nil), priv, make([]byte, 246))
	wantRV(t, "C_Sign of 246 bytes", err, pkcs11.CKR_DATA_LEN_RANGE)

	der, err := x509.MarshalPKIXPublicKey(pub)
	must(t, err)
	dir := t.TempDir()
	keyFile, msgFile, sigFile := filepath.Join(dir, "k.pem"), filepath.Join(dir, "m"), filepath.Join(dir, "s")
	must(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600))
	must(t, os.WriteFile(msgFile, message, 0o600))
	must(t, os.WriteFile(sigFile, hashed, 0o600))
	if out := tool(t, nil, "openssl", "dgst", "-sha256", "-verify", keyFile, "-signature", sigFile, msgFile); !strings.Contains(out, "Verified OK") {
		t.Error(out)
	}
}

// TestSM3Vectors are GB/T 32905-2016 annex A.
func TestSM3Vectors(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	for message, want := range map[string]string{
		"abc":                      "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0",
		strings.Repeat("abcd", 16): "debe9ff92275b8a138604889c18e5a4d6fdb70e5387e5765293dcba39c0c5732",
	} {
		must(t, p.DigestInit(s, mech(softtoken.CKMNeutralSM3, nil)))
		got, err := p.Digest(s, []byte(message))
		must(t, err)
		must(t, p.DigestInit(s, mech(softtoken.CKMNeutralSM3, nil)))
		must(t, p.DigestUpdate(s, []byte(message[:1])))
		must(t, p.DigestUpdate(s, []byte(message[1:])))
		parts, err := p.DigestFinal(s)
		must(t, err)
		if hex.EncodeToString(got) != want || hex.EncodeToString(parts) != want {
			t.Errorf("SM3(%q) = %x, %x, want %s", message, got, parts, want)
		}
	}
	must(t, p.DigestInit(s, mech(pkcs11.CKM_SHA256, nil)))
	got, err := p.Digest(s, []byte("abc"))
	must(t, err)
	if want := sha256.Sum256([]byte("abc")); string(got) != string(want[:]) {
		t.Errorf("SHA-256 = %x", got)
	}
}

// TestHMACSM3Vectors compares the computation with OpenSSL, since PKCS#11 cannot bring the key in, and then the
// token's own signing and verifying with a key that it made.
func TestHMACSM3(t *testing.T) {
	t.Parallel()
	key, data := []byte("0123456789abcdef0123456789abcdef"), []byte("data")
	out := tool(t, data, "openssl", "mac", "-digest", "SM3", "-macopt", "hexkey:"+hex.EncodeToString(key), "-in", "-", "HMAC")
	if want := strings.ToLower(strings.TrimSpace(out)); hex.EncodeToString(softtoken.HMACSM3(key, data)) != want {
		t.Errorf("HMAC-SM3 = %x, openssl says %s", softtoken.HMACSM3(key, data), want)
	}
	_, p, s := loggedIn(t)
	h := generateSecret(t, p, s, "mac")
	m := mech(softtoken.CKMNeutralHMACSM3, nil)
	mac := mustSign(t, p, s, m, h, data)
	if len(mac) != 32 || string(mac) != string(mustSign(t, p, s, m, h, data)) {
		t.Errorf("MAC = %x, not 32 bytes or not the same twice", mac)
	}
	must(t, p.VerifyInit(s, m, h))
	must(t, p.Verify(s, data, mac))
	must(t, p.VerifyInit(s, m, h))
	wantRV(t, "C_Verify of other data", p.Verify(s, []byte("date"), mac), pkcs11.CKR_SIGNATURE_INVALID)
	must(t, p.VerifyInit(s, m, h))
	wantRV(t, "C_Verify of a short MAC", p.Verify(s, data, mac[:16]), pkcs11.CKR_SIGNATURE_LEN_RANGE)
}

func TestRandom(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	seen := map[string]bool{}
	for _, n := range []int{1, 32, 1024, 200_000} {
		b, err := p.GenerateRandom(s, n)
		must(t, err)
		if len(b) != n || n >= 32 && (seen[string(b[:32])] || string(b[:32]) == string(make([]byte, 32))) {
			t.Errorf("C_GenerateRandom(%d): %d bytes, or not random", n, len(b))
		}
		if n >= 32 {
			seen[string(b[:32])] = true
		}
	}
	must(t, p.SeedRandom(s, []byte("seed")))
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	must(t, err)
	return b
}

func verifyRaw(key *ecdsa.PublicKey, e, sig []byte) bool {
	return len(sig) == 64 && sm2.VerifyASN1(key, e, derOf(sig))
}

// findPrivate is find for goroutines, which must not end the test.
func findPrivate(p *pkcs11.Ctx, s pkcs11.SessionHandle) ([]pkcs11.ObjectHandle, error) {
	if err := p.FindObjectsInit(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)}); err != nil {
		return nil, err
	}
	all, _, err := p.FindObjects(s, 10)
	if ferr := p.FindObjectsFinal(s); err == nil {
		err = ferr
	}
	return all, err
}

// TestVendorNumbers runs the same engine under another table: other numbers, another key type, DER.
func TestVendorNumbers(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.prepare = (*softtoken.Server).UseVendorNumbers
	m.start(t)
	p := m.module(t)
	initToken(t, p, 0, "vendor")
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	pub, priv, err := p.GenerateKeyPair(s, mech(0x80008001, nil), nil, nil)
	must(t, err)
	key := sm2Public(t, p, s, pub)
	e := sm3.Sum([]byte("e"))
	sig := mustSign(t, p, s, mech(0x80008104, nil), priv, e[:])
	if !sm2.VerifyASN1(key, e[:], sig) {
		t.Errorf("DER signature %x does not verify", sig)
	}
	must(t, p.VerifyInit(s, mech(0x80008104, nil), pub))
	must(t, p.Verify(s, e[:], sig))
	sig = mustSign(t, p, s, mech(0x80008101, nil), priv, []byte("message"))
	if !sm2.VerifyASN1WithSM2(key, []byte("1234567812345678"), []byte("message"), sig) {
		t.Errorf("DER signature %x over a message does not verify", sig)
	}
	must(t, p.VerifyInit(s, mech(0x80008101, nil), pub))
	wantRV(t, "C_Verify of another message", p.Verify(s, []byte("other"), sig), pkcs11.CKR_SIGNATURE_INVALID)
	wantRV(t, "a number of the neutral table", p.SignInit(s, mech(softtoken.CKMNeutralSM2, nil), priv), pkcs11.CKR_MECHANISM_INVALID)
}
