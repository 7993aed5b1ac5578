package softtoken_test

import (
	"bytes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm4"
	"github.com/emmansun/gmsm/smx509"
	"github.com/miekg/pkcs11"
	"yinjian/hsm/softtoken"
)

// Of both examples of GB/T 32907-2016 the key, which is the plaintext too.
var sm4Key, _ = hex.DecodeString("0123456789abcdeffedcba9876543210")

// gcm is SM4-GCM with the parameters of CK_GCM_PARAMS.
func gcm(iv, aad []byte) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(softtoken.CKMNeutralSM4GCM, pkcs11.NewGCMParams(iv, aad, 128))}
}

func generateSM4(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, label string, uses ...*pkcs11.Attribute) pkcs11.ObjectHandle {
	t.Helper()
	h, err := p.GenerateKey(s, mech(softtoken.CKMNeutralSM4KeyGen, nil), append(uses, attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label)))
	if err != nil {
		t.Fatalf("C_GenerateKey: %v", err)
	}
	return h
}

// importSM4 brings a key in the clear, for vectors.
func importSM4(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, value []byte, uses ...*pkcs11.Attribute) pkcs11.ObjectHandle {
	t.Helper()
	h, err := p.CreateObject(s, append(uses, attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM4), attr(pkcs11.CKA_VALUE, value)))
	if err != nil {
		t.Fatalf("C_CreateObject: %v", err)
	}
	return h
}

func encrypt(p *pkcs11.Ctx, s pkcs11.SessionHandle, m []*pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte) ([]byte, error) {
	if err := p.EncryptInit(s, m, key); err != nil {
		return nil, err
	}
	return p.Encrypt(s, data)
}

func decrypt(p *pkcs11.Ctx, s pkcs11.SessionHandle, m []*pkcs11.Mechanism, key pkcs11.ObjectHandle, data []byte) ([]byte, error) {
	if err := p.DecryptInit(s, m, key); err != nil {
		return nil, err
	}
	return p.Decrypt(s, data)
}

// inParts runs an operation in parts of n bytes.
func inParts(s pkcs11.SessionHandle, data []byte, n int, update func(pkcs11.SessionHandle, []byte) ([]byte, error), final func(pkcs11.SessionHandle) ([]byte, error)) (all []byte, err error) {
	for len(data) > 0 {
		part := data[:min(n, len(data))]
		data = data[len(part):]
		out, err := update(s, part)
		if err != nil {
			return nil, err
		}
		all = append(all, out...)
	}
	out, err := final(s)
	return append(all, out...), err
}

// TestSM4Vectors: the example of GB/T 32907-2016 Annex A.1, and those of GCM in RFC 8998 Appendix A.1 and of CMAC by OpenSSL.
func TestSM4Vectors(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	key := importSM4(t, p, s, sm4Key)
	out, err := encrypt(p, s, mech(softtoken.CKMNeutralSM4ECB, nil), key, sm4Key)
	must(t, err)
	if want := unhex(t, "681edf34d206965e86b3e94f536e4246"); !bytes.Equal(out, want) {
		t.Errorf("SM4 = %x, want %x", out, want)
	}
	iv, aad := unhex(t, "00001234567800000000abcd"), unhex(t, "feedfacedeadbeeffeedfacedeadbeefabaddad2")
	plain := unhex(t, "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccddddddddddddddddeeeeeeeeeeeeeeeeffffffffffffffffeeeeeeeeeeeeeeeeaaaaaaaaaaaaaaaa")
	want := unhex(t, "17f399f08c67d5ee19d0dc9969c4bb7d5fd46fd3756489069157b282bb200735d82710ca5c22f0ccfa7cbf93d496ac15a56834cbcf98c397b4024a2691233b8d"+
		"83de3541e4c2b58177e065a9bf7b62ec")
	out, err = encrypt(p, s, gcm(iv, aad), key, plain)
	must(t, err)
	if !bytes.Equal(out, want) {
		t.Errorf("SM4-GCM = %x, want %x", out, want)
	}
	for _, n := range []int{1, 16, 17, 100} {
		must(t, p.DecryptInit(s, gcm(iv, aad), key))
		if back, err := inParts(s, want, n, p.DecryptUpdate, p.DecryptFinal); err != nil || !bytes.Equal(back, plain) {
			t.Errorf("SM4-GCM in parts of %d = %x, %v", n, back, err)
		}
	}
	want[3] ^= 1
	_, err = decrypt(p, s, gcm(iv, aad), key, want)
	wantRV(t, "an altered ciphertext", err, pkcs11.CKR_ENCRYPTED_DATA_INVALID)
	_, err = p.Decrypt(s, want)
	wantRV(t, "C_Decrypt after it", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
}

// What OpenSSL encrypts is decrypted here and the other way round, whole and in parts of any length.
func TestSM4WithOpenSSL(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	key := importSM4(t, p, s, sm4Key)
	mac := importSM4(t, p, s, sm4Key, attr(pkcs11.CKA_SIGN, true), attr(pkcs11.CKA_VERIFY, true))
	iv := unhex(t, "000102030405060708090a0b0c0d0e0f")
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	for _, row := range []struct {
		name string
		m    []*pkcs11.Mechanism
		args []string
	}{
		{"ECB", mech(softtoken.CKMNeutralSM4ECB, nil), []string{"-sm4-ecb", "-nopad"}},
		{"CBC", mech(softtoken.CKMNeutralSM4CBC, iv), []string{"-sm4-cbc", "-nopad", "-iv", hex.EncodeToString(iv)}},
		{"CBC with padding", mech(softtoken.CKMNeutralSM4CBCPad, iv), []string{"-sm4-cbc", "-iv", hex.EncodeToString(iv)}},
	} {
		for _, size := range []int{0, 16, 64, 100_000 / 16 * 16, 5, 31} {
			if size%16 != 0 && row.name != "CBC with padding" {
				_, err := encrypt(p, s, row.m, key, make([]byte, size))
				wantRV(t, row.name+" of half a block", err, pkcs11.CKR_DATA_LEN_RANGE)
				_, err = decrypt(p, s, row.m, key, make([]byte, size))
				wantRV(t, row.name+" of half a block, decrypting", err, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE)
				continue
			}
			plain := make([]byte, size)
			rand.Read(plain)
			must(t, os.WriteFile(in, plain, 0o600))
			tool(t, nil, "openssl", append([]string{"enc", "-e", "-K", hex.EncodeToString(sm4Key), "-in", in, "-out", out}, row.args...)...)
			want, err := os.ReadFile(out)
			must(t, err)
			if size > 0 || row.name == "CBC with padding" {
				got, err := encrypt(p, s, row.m, key, plain)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s of %d bytes: %x, %v, OpenSSL: %x", row.name, size, got, err, want)
				}
				back, err := decrypt(p, s, row.m, key, want)
				if err != nil || !bytes.Equal(back, plain) {
					t.Errorf("%s of %d bytes, decrypted: %x, %v", row.name, size, back, err)
				}
			}
			for _, n := range []int{1, 15, 16, 33, 4096} {
				if size/n > 200 {
					continue
				}
				must(t, p.EncryptInit(s, row.m, key))
				if got, err := inParts(s, plain, n, p.EncryptUpdate, p.EncryptFinal); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s of %d bytes in parts of %d: %x, %v, OpenSSL: %x", row.name, size, n, got, err, want)
				}
				must(t, p.DecryptInit(s, row.m, key))
				if back, err := inParts(s, want, n, p.DecryptUpdate, p.DecryptFinal); err != nil || !bytes.Equal(back, plain) {
					t.Errorf("%s of %d bytes in parts of %d, decrypted: %x, %v", row.name, size, n, back, err)
				}
			}
		}
	}
	for _, size := range []int{0, 1, 16, 17, 1000} {
		data := make([]byte, size)
		rand.Read(data)
		must(t, os.WriteFile(in, data, 0o600))
		want := unhex(t, string(bytes.TrimSpace([]byte(tool(t, nil, "openssl", "mac", "-cipher", "SM4-CBC", "-macopt", "hexkey:"+hex.EncodeToString(sm4Key), "-in", in, "CMAC")))))
		got := mustSign(t, p, s, mech(softtoken.CKMNeutralSM4CMAC, nil), mac, data)
		if !bytes.Equal(got, want) {
			t.Errorf("CMAC of %d bytes = %x, OpenSSL: %x", size, got, want)
		}
		must(t, p.VerifyInit(s, mech(softtoken.CKMNeutralSM4CMAC, nil), mac))
		if size > 0 {
			must(t, p.VerifyUpdate(s, data))
		}
		got[0] ^= 1
		wantRV(t, "another CMAC", p.VerifyFinal(s, got), pkcs11.CKR_SIGNATURE_INVALID)
	}
}

// Wrong parameters, keys, states; keys that are for one thing.
func TestCipherRefusals(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	key := generateSM4(t, p, s, "d")
	enc := generateSM4(t, p, s, "e", attr(pkcs11.CKA_ENCRYPT, true))
	mac := generateSM4(t, p, s, "m", attr(pkcs11.CKA_SIGN, true))
	hmac := generateSecret(t, p, s, "h")
	pub, priv := generateSM2(t, p, s, "k")
	iv, nonce := make([]byte, 16), make([]byte, 12)
	ecb, cbc := mech(softtoken.CKMNeutralSM4ECB, nil), mech(softtoken.CKMNeutralSM4CBC, iv)
	sm2crypt := mech(softtoken.CKMNeutralSM2Crypt, nil)
	for name, row := range map[string]struct {
		m    []*pkcs11.Mechanism
		key  pkcs11.ObjectHandle
		want uint
	}{
		"ECB with a parameter":    {mech(softtoken.CKMNeutralSM4ECB, iv), key, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"CBC without an IV":       {mech(softtoken.CKMNeutralSM4CBC, nil), key, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"CBC with a short IV":     {mech(softtoken.CKMNeutralSM4CBC, iv[:15]), key, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"GCM without parameters":  {mech(softtoken.CKMNeutralSM4GCM, nil), key, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"GCM with an IV of 16":    {gcm(iv, nil), key, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"GCM with a short tag":    {[]*pkcs11.Mechanism{pkcs11.NewMechanism(softtoken.CKMNeutralSM4GCM, pkcs11.NewGCMParams(nonce, nil, 96))}, key, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"GCM's parameters cut":    {mech(softtoken.CKMNeutralSM4GCM, nonce), key, pkcs11.CKR_MECHANISM_PARAM_INVALID},
		"AES":                     {mech(pkcs11.CKM_AES_ECB, nil), key, pkcs11.CKR_MECHANISM_INVALID},
		"a mechanism that signs":  {mech(softtoken.CKMNeutralSM4CMAC, nil), mac, pkcs11.CKR_MECHANISM_INVALID},
		"a key that is none":      {ecb, 1, pkcs11.CKR_KEY_HANDLE_INVALID},
		"a key of HMAC":           {ecb, hmac, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"a public key":            {ecb, pub, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"SM2 with an SM4 key":     {sm2crypt, key, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"SM2 with a private key":  {sm2crypt, priv, pkcs11.CKR_KEY_TYPE_INCONSISTENT},
		"SM2 key that verifies":   {sm2crypt, pub, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED},
		"SM4 key that is for MAC": {ecb, mac, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED},
	} {
		wantRV(t, name, p.EncryptInit(s, row.m, row.key), row.want)
	}
	wantRV(t, "C_DecryptInit with a key that encrypts", p.DecryptInit(s, ecb, enc), pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
	wantRV(t, "C_SignInit CMAC with a key for data", p.SignInit(s, mech(softtoken.CKMNeutralSM4CMAC, nil), key), pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
	wantRV(t, "C_SignInit HMAC with SM4's key", p.SignInit(s, mech(softtoken.CKMNeutralHMACSM3, nil), mac), pkcs11.CKR_KEY_TYPE_INCONSISTENT)
	wantRV(t, "C_SignInit CMAC with HMAC's key", p.SignInit(s, mech(softtoken.CKMNeutralSM4CMAC, nil), hmac), pkcs11.CKR_KEY_TYPE_INCONSISTENT)
	for name, templ := range map[string][]*pkcs11.Attribute{
		"decrypts and wraps":  {attr(pkcs11.CKA_DECRYPT, true), attr(pkcs11.CKA_WRAP, true)},
		"encrypts and signs":  {attr(pkcs11.CKA_ENCRYPT, true), attr(pkcs11.CKA_SIGN, true)},
		"verifies and wraps":  {attr(pkcs11.CKA_VERIFY, true), attr(pkcs11.CKA_UNWRAP, true)},
		"not sensitive":       {attr(pkcs11.CKA_SENSITIVE, false)},
		"not private":         {attr(pkcs11.CKA_PRIVATE, false)},
		"of another key type": {attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES)},
	} {
		_, err := p.GenerateKey(s, mech(softtoken.CKMNeutralSM4KeyGen, nil), templ)
		wantRV(t, "a key that is "+name, err, pkcs11.CKR_TEMPLATE_INCONSISTENT)
	}
	_, err := p.GenerateKey(s, mech(softtoken.CKMNeutralSM4KeyGen, nil), []*pkcs11.Attribute{attr(pkcs11.CKA_VALUE_LEN, 32)})
	wantRV(t, "an SM4 key of 32 bytes", err, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID)
	_, err = p.GenerateKey(s, mech(softtoken.CKMNeutralSM4KeyGen, nil), []*pkcs11.Attribute{attr(pkcs11.CKA_TRUSTED, true)})
	wantRV(t, "a key that the user trusts", err, pkcs11.CKR_ATTRIBUTE_READ_ONLY)

	_, err = p.Encrypt(s, iv)
	wantRV(t, "C_Encrypt without an operation", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	must(t, p.EncryptInit(s, cbc, key))
	wantRV(t, "C_EncryptInit again", p.EncryptInit(s, cbc, key), pkcs11.CKR_OPERATION_ACTIVE)
	must(t, p.DecryptInit(s, cbc, key)) // is an operation of its own
	_, err = p.EncryptUpdate(s, iv)
	must(t, err)
	_, err = p.Encrypt(s, iv)
	wantRV(t, "C_Encrypt after C_EncryptUpdate", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	_, err = p.EncryptFinal(s)
	wantRV(t, "C_EncryptFinal after that", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	_, err = p.DecryptUpdate(s, iv[:5])
	must(t, err)
	_, err = p.DecryptFinal(s)
	wantRV(t, "C_DecryptFinal of half a block", err, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE)
	_, err = decrypt(p, s, mech(softtoken.CKMNeutralSM4CBCPad, iv), key, iv)
	wantRV(t, "wrong padding", err, pkcs11.CKR_ENCRYPTED_DATA_INVALID)
	uneven, err := encrypt(p, s, cbc, key, append(make([]byte, 14), 1, 2))
	must(t, err)
	_, err = decrypt(p, s, mech(softtoken.CKMNeutralSM4CBCPad, iv), key, uneven)
	wantRV(t, "padding of two different bytes", err, pkcs11.CKR_ENCRYPTED_DATA_INVALID)

	must(t, p.EncryptInit(s, cbc, key))
	must(t, p.Logout(s))
	_, err = p.Encrypt(s, iv)
	wantRV(t, "C_Encrypt after a logout", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	wantRV(t, "C_EncryptInit after a logout", p.EncryptInit(s, cbc, key), pkcs11.CKR_KEY_HANDLE_INVALID)
	_, err = p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM4), attr(pkcs11.CKA_VALUE, sm4Key)})
	wantRV(t, "a secret key after a logout", err, pkcs11.CKR_USER_NOT_LOGGED_IN)
}

// A key from outside says so for ever, and lies no more open than others.
func TestImportedSecretKey(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	key := importSM4(t, p, s, sm4Key)
	for typ, want := range map[uint]byte{
		pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_ALWAYS_SENSITIVE: 0, pkcs11.CKA_EXTRACTABLE: 0, pkcs11.CKA_NEVER_EXTRACTABLE: 0,
		pkcs11.CKA_LOCAL: 0, pkcs11.CKA_TRUSTED: 0, pkcs11.CKA_ENCRYPT: 1, pkcs11.CKA_WRAP: 0, pkcs11.CKA_SIGN: 0,
	} {
		if v := value(t, p, s, key, typ); !bytes.Equal(v, []byte{want}) {
			t.Errorf("attribute %#x = %x, want %d", typ, v, want)
		}
	}
	_, err := p.GetAttributeValue(s, key, []*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, nil)})
	wantRV(t, "CKA_VALUE", err, pkcs11.CKR_ATTRIBUTE_SENSITIVE)
	base := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM4)}
	for name, row := range map[string]struct {
		more []*pkcs11.Attribute
		want uint
	}{
		"no value":         {nil, pkcs11.CKR_TEMPLATE_INCOMPLETE},
		"15 bytes":         {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key[:15])}, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
		"two values":       {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key), attr(pkcs11.CKA_VALUE, sm4Key)}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"a length":         {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key), attr(pkcs11.CKA_VALUE_LEN, 16)}, pkcs11.CKR_ATTRIBUTE_READ_ONLY},
		"local":            {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key), attr(pkcs11.CKA_LOCAL, true)}, pkcs11.CKR_ATTRIBUTE_READ_ONLY},
		"trusted":          {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key), attr(pkcs11.CKA_TRUSTED, true)}, pkcs11.CKR_ATTRIBUTE_READ_ONLY},
		"not sensitive":    {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key), attr(pkcs11.CKA_SENSITIVE, false)}, pkcs11.CKR_TEMPLATE_INCONSISTENT},
		"always sensitive": {[]*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, sm4Key), attr(pkcs11.CKA_ALWAYS_SENSITIVE, true)}, pkcs11.CKR_ATTRIBUTE_READ_ONLY},
	} {
		_, err := p.CreateObject(s, append(base[:2:2], row.more...))
		wantRV(t, name, err, row.want)
	}
}

// generateSM2Crypt makes an SM2 pair for encryption.
func generateSM2Crypt(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) (pub, priv pkcs11.ObjectHandle) {
	t.Helper()
	pub, priv, err := p.GenerateKeyPair(s, mech(softtoken.CKMNeutralSM2KeyPairGen, nil),
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ENCRYPT, true)},
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_DECRYPT, true)})
	must(t, err)
	return pub, priv
}

// Each ciphertext of one byte can be decrypted, those too whose first key stream was zero, one in 256.
func TestSM2EncryptsOneByte(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pub, priv := generateSM2Crypt(t, p, s, "k")
	for i := range 2000 {
		m := mech(softtoken.CKMNeutralSM2Crypt, nil)
		if i%2 == 0 {
			m = mech(softtoken.CKMNeutralSM2CryptDER, nil)
		}
		plain := []byte{byte(i)}
		out, err := encrypt(p, s, m, pub, plain)
		must(t, err)
		if back, err := decrypt(p, s, m, priv, out); err != nil || !bytes.Equal(back, plain) {
			t.Fatalf("the %d-th: %x decrypts to %x, %v", i, out, back, err)
		}
	}
}

// SM2 ciphertexts of gmsm and of OpenSSL are decrypted, in the mechanism's encoding and no other, and nothing altered is.
func TestSM2Decrypts(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pub, priv := generateSM2Crypt(t, p, s, "k")
	public := sm2Public(t, p, s, pub)
	raw, der := mech(softtoken.CKMNeutralSM2Crypt, nil), mech(softtoken.CKMNeutralSM2CryptDER, nil)
	for _, size := range []int{16, 31, 32, 33, 300, 5000} { // shorter ones gmsm spoils now and then, see counted
		plain := make([]byte, size)
		rand.Read(plain)
		fromRaw, err := sm2.Encrypt(rand.Reader, public, plain, sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2))
		must(t, err)
		fromDER, err := sm2.EncryptASN1(rand.Reader, public, plain)
		must(t, err)
		ssl := opensslSM2Encrypt(t, public, plain)
		for name, row := range map[string]struct {
			m  []*pkcs11.Mechanism
			in []byte
		}{"gmsm raw": {raw, fromRaw}, "gmsm DER": {der, fromDER}, "OpenSSL": {der, ssl}} {
			if back, err := decrypt(p, s, row.m, priv, row.in); err != nil || !bytes.Equal(back, plain) {
				t.Errorf("%s, %d bytes: %x, %v", name, size, back, err)
			}
			other := der
			if row.m[0] == der[0] {
				other = raw
			}
			if _, err := decrypt(p, s, other, priv, row.in); err == nil {
				t.Errorf("%s, %d bytes: decrypted in the other encoding", name, size)
			}
			for _, at := range []int{10, len(row.in) / 2, len(row.in) - 1} {
				bad := bytes.Clone(row.in)
				bad[at] ^= 1
				_, err := decrypt(p, s, row.m, priv, bad)
				wantRV(t, name+", altered", err, pkcs11.CKR_ENCRYPTED_DATA_INVALID)
			}
		}
		for _, row := range []struct {
			m []*pkcs11.Mechanism
			n int
		}{{raw, size + 97}, {der, 0}} {
			out, err := encrypt(p, s, row.m, pub, plain)
			must(t, err)
			if row.n != 0 && len(out) != row.n {
				t.Errorf("a ciphertext of %d bytes, want %d", len(out), row.n)
			}
			if back, err := decrypt(p, s, row.m, priv, out); err != nil || !bytes.Equal(back, plain) {
				t.Errorf("%d bytes there and back: %x, %v", size, back, err)
			}
		}
	}
	_, err := encrypt(p, s, raw, pub, nil)
	wantRV(t, "nothing to encrypt", err, pkcs11.CKR_DATA_LEN_RANGE)
	_, err = decrypt(p, s, raw, priv, make([]byte, 97))
	wantRV(t, "nothing to decrypt", err, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE)
	must(t, p.EncryptInit(s, raw, pub))
	_, err = p.EncryptUpdate(s, []byte("part"))
	wantRV(t, "C_EncryptUpdate", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	wantRV(t, "C_SignInit with a key that decrypts", p.SignInit(s, mech(softtoken.CKMNeutralSM2, nil), priv), pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
}

// opensslSM2Encrypt encrypts with OpenSSL's pkeyutl.
func opensslSM2Encrypt(t testing.TB, public *ecdsa.PublicKey, plain []byte) []byte {
	t.Helper()
	spki, err := smx509.MarshalPKIXPublicKey(public)
	must(t, err)
	dir := t.TempDir()
	key, in, out := filepath.Join(dir, "k"), filepath.Join(dir, "in"), filepath.Join(dir, "out")
	must(t, os.WriteFile(key, spki, 0o600))
	must(t, os.WriteFile(in, plain, 0o600))
	tool(t, nil, "openssl", "pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-inkey", key, "-in", in, "-out", out)
	b, err := os.ReadFile(out)
	must(t, err)
	return b
}

// importSM2 brings a private key that is known, for vectors: wrapped, as no private key comes otherwise.
func importSM2(t testing.TB, p *pkcs11.Ctx, s pkcs11.SessionHandle, d []byte, uses ...*pkcs11.Attribute) pkcs11.ObjectHandle {
	t.Helper()
	key, err := sm2.NewPrivateKey(d)
	must(t, err)
	pkcs8, err := smx509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	h, err := p.UnwrapKey(s, gcm(nil, nil), importSM4(t, p, s, sm4Key, attr(pkcs11.CKA_UNWRAP, true)), wrapOutside(t, pkcs8),
		append(uses, attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, softtoken.CKKNeutralSM2)))
	must(t, err)
	return h
}

// wrapOutside wraps under sm4Key as the token does, by the libraries alone.
func wrapOutside(t testing.TB, plain []byte) []byte {
	t.Helper()
	block, err := sm4.NewCipher(sm4Key)
	must(t, err)
	aead, err := cipher.NewGCM(block)
	must(t, err)
	nonce := make([]byte, 12)
	rand.Read(nonce)
	return append(nonce, aead.Seal(nil, nonce, plain, nil)...)
}

// TestSM2CryptVector: the example of GB/T 32918.5-2017 Annex C, and its key with Bouncy Castle, both ways.
func TestSM2CryptVector(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	d := "3945208f7b2144b13f36e38ac6d39f95889393692860b51a42fb81ef4df7c5b8"
	priv := importSM2(t, p, s, unhex(t, d), attr(pkcs11.CKA_DECRYPT, true))
	raw := mech(softtoken.CKMNeutralSM2Crypt, nil)
	plain := []byte("encryption standard")
	out, err := decrypt(p, s, raw, priv, unhex(t, "04"+"04ebfc718e8d1798620432268e77feb6415e2ede0e073c0f4f640ecd2e149a73"+
		"e858f9d81e5430a57b36daab8f950a3c64e6ee6a63094d99283aff767e124df0"+
		"59983c18f809e262923c53aec295d30383b54e39d609d160afcb1908d0bd8766"+"21886ca989ca9c7d58087307ca93092d651efa"))
	if err != nil || !bytes.Equal(out, plain) {
		t.Errorf("the example is decrypted to %q, %v", out, err)
	}

	jar := "/usr/share/java/bcprov.jar"
	if _, err := os.Stat(jar); err != nil {
		t.Skip("Bouncy Castle is not installed")
	}
	key, err := sm2.NewPrivateKey(unhex(t, d))
	must(t, err)
	point := append([]byte{4, 65, 4}, append(key.X.FillBytes(make([]byte, 32)), key.Y.FillBytes(make([]byte, 32))...)...)
	pub, err := p.CreateObject(s, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
		attr(pkcs11.CKA_EC_PARAMS, sm2OID), attr(pkcs11.CKA_EC_POINT, point), attr(pkcs11.CKA_ENCRYPT, true)})
	must(t, err)
	ours, err := encrypt(p, s, raw, pub, plain)
	must(t, err)
	dir := t.TempDir()
	in, ciphertext := filepath.Join(dir, "p"), filepath.Join(dir, "c")
	must(t, os.WriteFile(in, plain, 0o600))
	must(t, os.WriteFile(ciphertext, ours, 0o600))
	lines := strings.Fields(tool(t, nil, "java", "-cp", jar, "testdata/SM2Crypt.java", hex.EncodeToString(point[2:]), in, d, ciphertext))
	if len(lines) != 2 {
		t.Fatalf("Java says %q", lines)
	}
	if got := unhex(t, lines[1]); !bytes.Equal(got, plain) {
		t.Errorf("Bouncy Castle decrypts ours to %q", got)
	}
	if out, err := decrypt(p, s, raw, priv, unhex(t, lines[0])); err != nil || !bytes.Equal(out, plain) {
		t.Errorf("Bouncy Castle's is decrypted to %q, %v", out, err)
	}
}

// How much goes into one call, and that parts have no end but where all is kept.
func TestCipherLimits(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	key := importSM4(t, p, s, sm4Key)
	iv, nonce := make([]byte, 16), make([]byte, 12)
	const most = 1<<20 - 4096
	plain := make([]byte, 3<<20)
	rand.Read(plain)
	block, err := sm4.NewCipher(sm4Key)
	must(t, err)
	want := make([]byte, len(plain))
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(want, plain)
	cbc := mech(softtoken.CKMNeutralSM4CBC, iv)
	must(t, p.EncryptInit(s, cbc, key))
	if got, err := inParts(s, plain, 300_001, p.EncryptUpdate, p.EncryptFinal); err != nil || !bytes.Equal(got, want) {
		t.Errorf("three megabytes in parts: %d bytes, %v", len(got), err)
	}
	if got, err := encrypt(p, s, cbc, key, plain[:most]); err != nil || !bytes.Equal(got, want[:most]) {
		t.Errorf("the most at once: %d bytes, %v", len(got), err)
	}
	for _, size := range []int{most + 128, 1<<20 - 16, 1 << 20, len(plain)} {
		_, err := encrypt(p, s, cbc, key, plain[:size])
		wantRV(t, "more than that", err, pkcs11.CKR_DATA_LEN_RANGE)
		_, err = p.Encrypt(s, iv)
		wantRV(t, "C_Encrypt after it", err, pkcs11.CKR_OPERATION_NOT_INITIALIZED)
		_, err = decrypt(p, s, cbc, key, plain[:size])
		wantRV(t, "more than that to decrypt", err, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE)
	}
	sealed, err := encrypt(p, s, gcm(nonce, nil), key, plain[:most])
	must(t, err)
	_, err = decrypt(p, s, gcm(nonce, nil), key, sealed)
	wantRV(t, "what GCM encrypts at most, and its tag", err, pkcs11.CKR_OK)
	must(t, p.EncryptInit(s, gcm(nonce, nil), key))
	_, err = inParts(s, plain, 300_000, p.EncryptUpdate, p.EncryptFinal)
	wantRV(t, "three megabytes with GCM", err, pkcs11.CKR_DATA_LEN_RANGE)
}
