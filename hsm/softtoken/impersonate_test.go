package softtoken_test

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"
	"github.com/miekg/pkcs11"

	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/softtoken"
)

// TestImpersonatedCiphers: what a vendor's profile says of SM2 and SM4 encryption and of SM3 holds on the machine that
// answers to it; gmsm judges. hsm/pkcs11 tests the signatures.
func TestImpersonatedCiphers(t *testing.T) {
	for _, name := range profiles.Names() {
		file, err := profiles.Load(name)
		if err != nil {
			t.Fatal(err)
		}
		if file.Tried != "no" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			m := newFolder(t)
			m.cfg.Impersonate = name
			m.start(t)
			p := m.module(t)
			initToken(t, p, 0, name)
			s := openRW(t, p, 0)
			must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
			ti, err := p.GetTokenInfo(0)
			if must(t, err); !strings.Contains(ti.ManufacturerID, "EVALUATION ONLY") {
				t.Errorf("it says it is by %q", ti.ManufacturerID)
			}
			impersonatedSM4(t, p, s, file)
			impersonatedSM2(t, p, s, file)
			if op := file.Operations[profiles.SM3]; op != nil {
				must(t, p.DigestInit(s, mech(uint(*op.Mechanism), nil)))
				got, err := p.Digest(s, []byte("abc"))
				if want := sm3.Sum([]byte("abc")); err != nil || !bytes.Equal(got, want[:]) {
					t.Errorf("SM3 = %x, %v", got, err)
				}
			}
			// A number of our own that the vendor does not have.
			wantRV(t, "C_DigestInit with a number that is not the vendor's", p.DigestInit(s, mech(softtoken.CKMNeutralSM3, nil)), pkcs11.CKR_MECHANISM_INVALID)
		})
	}
}

func impersonatedSM4(t *testing.T, p *pkcs11.Ctx, s pkcs11.SessionHandle, file *profiles.Profile) {
	t.Helper()
	k, cbc := file.Keys[profiles.KeySM4], file.Operations[profiles.SM4CBC]
	if k == nil || cbc == nil {
		return
	}
	secret, iv, plain := make([]byte, 16), make([]byte, 16), make([]byte, 48)
	for _, b := range [][]byte{secret, iv, plain} {
		rand.Read(b)
	}
	made, err := p.GenerateKey(s, mech(uint(*k.Mechanism), nil), []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "made")})
	must(t, err)
	if got := binary.NativeEndian.Uint64(value(t, p, s, made, pkcs11.CKA_KEY_TYPE)); got != uint64(*k.KeyType) {
		t.Errorf("CKA_KEY_TYPE %#x, want %#x", got, uint64(*k.KeyType))
	}
	known, err := p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		attr(pkcs11.CKA_KEY_TYPE, uint(*k.KeyType)), attr(pkcs11.CKA_VALUE, secret)})
	must(t, err)
	must(t, p.EncryptInit(s, mech(uint(*cbc.Mechanism), iv), known))
	got, err := p.Encrypt(s, plain)
	must(t, err)
	block, err := sm4.NewCipher(secret)
	must(t, err)
	want := make([]byte, len(plain))
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(want, plain)
	if !bytes.Equal(got, want) {
		t.Errorf("SM4-CBC = %x, want %x", got, want)
	}
}

func impersonatedSM2(t *testing.T, p *pkcs11.Ctx, s pkcs11.SessionHandle, file *profiles.Profile) {
	t.Helper()
	k, op := file.Keys[profiles.KeySM2], file.Operations[profiles.SM2Encrypt]
	if k == nil || op == nil {
		return
	}
	typ := attr(pkcs11.CKA_KEY_TYPE, uint(*k.KeyType))
	public := []*pkcs11.Attribute{attr(pkcs11.CKA_ENCRYPT, true)}
	private := []*pkcs11.Attribute{attr(pkcs11.CKA_DECRYPT, true)}
	// Without what the vendor wants, it is refused as the vendor would.
	if _, _, err := p.GenerateKeyPair(s, mech(uint(*k.Mechanism), nil), public, private); err == nil {
		t.Error("C_GenerateKeyPair passed without CKA_KEY_TYPE")
	}
	public, private = append(public, typ), append(private, typ)
	if *k.SendECParams {
		public = append(public, attr(pkcs11.CKA_EC_PARAMS, []byte(k.ECParams)))
	}
	pub, priv, err := p.GenerateKeyPair(s, mech(uint(*k.Mechanism), nil), public, private)
	must(t, err)
	key := sm2Public(t, p, s, pub)
	plain := []byte("a message for the token")
	sealed, err := sm2.Encrypt(rand.Reader, key, plain, sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2))
	if op.Output == profiles.OutputDER {
		sealed, err = sm2.EncryptASN1(rand.Reader, key, plain)
	}
	must(t, err)
	must(t, p.DecryptInit(s, mech(uint(*op.Mechanism), nil), priv))
	if got, err := p.Decrypt(s, sealed); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("SM2 decryption = %q, %v", got, err)
	}
	if _, has := tryValue(p, s, priv, pkcs11.CKA_EC_POINT); has != (k.PointOn == "both") {
		t.Errorf("CKA_EC_POINT on the private key: %v, the profile says %s", has, k.PointOn)
	}
}

// tryValue reads an attribute that may not be there.
func tryValue(p *pkcs11.Ctx, s pkcs11.SessionHandle, o pkcs11.ObjectHandle, typ uint) ([]byte, bool) {
	got, err := p.GetAttributeValue(s, o, []*pkcs11.Attribute{attr(typ, nil)})
	if err != nil || len(got) != 1 {
		return nil, false
	}
	return got[0].Value, true
}

// TestImpersonateRefused: a profile that is not there, or that this machine cannot stand for.
func TestImpersonateRefused(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.cfg.Impersonate = "nobody"
	if _, err := softtoken.Open(m.cfg); err == nil || !strings.Contains(err.Error(), `"nobody"`) {
		t.Errorf("Open = %v", err)
	}
	file := filepath.Join(m.root, "p.toml")
	text := "name = \"p\"\nsources = [\"x\"]\ntried = \"no\"\n[machine]\nlogin = \"none\"\n[keys.rsa-2048]\nmechanism = 0\nkey_type = 0\n" +
		"send_key_type = false\n[operations.rsa-pkcs1-sha256]\nmechanism = 1\ninput = \"digest-info\"\nparameter = \"none\"\n"
	must(t, os.WriteFile(file, []byte(text), 0o600))
	m.cfg.Impersonate = file
	if _, err := softtoken.Open(m.cfg); err == nil || !strings.Contains(err.Error(), "machine.login") {
		t.Errorf("Open = %v", err)
	}
	// Service time and sessions are the profile's.
	text = strings.Replace(text, `login = "none"`, "service_time = \"30ms\"\nmax_sessions = 2", 1)
	must(t, os.WriteFile(file, []byte(text), 0o600))
	m.start(t)
	p := m.module(t)
	initToken(t, p, 0, "p")
	s := openRW(t, p, 0)
	openRW(t, p, 0)
	_, err := p.OpenSession(0, pkcs11.CKF_SERIAL_SESSION)
	wantRV(t, "the third session", err, pkcs11.CKR_SESSION_COUNT)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	_, priv := generateRSA(t, p, s, "k")
	begun := time.Now()
	mustSign(t, p, s, mech(1, nil), priv, []byte("x"))
	if took := time.Since(begun); took < 30*time.Millisecond {
		t.Errorf("a signature after %v, the profile's service time is 30ms", took)
	}
}
