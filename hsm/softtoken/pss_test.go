package softtoken_test

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
)

// TestPSSVerifiesOutside has OpenSSL verify the token's RSASSA-PSS, and the token OpenSSL's way of saying what it takes.
func TestPSSVerifiesOutside(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pubHandle, priv := generateRSA(t, p, s, "tls")
	pub := &rsa.PublicKey{N: new(big.Int).SetBytes(value(t, p, s, pubHandle, pkcs11.CKA_MODULUS)), E: 65537}
	pss := mech(pkcs11.CKM_RSA_PKCS_PSS, pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 32))
	message := []byte("handshake")
	sum := sha256.Sum256(message)

	der, err := x509.MarshalPKIXPublicKey(pub)
	must(t, err)
	dir := t.TempDir()
	keyFile, msgFile, sigFile := filepath.Join(dir, "k.pem"), filepath.Join(dir, "m"), filepath.Join(dir, "s")
	must(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600))
	must(t, os.WriteFile(msgFile, message, 0o600))
	first := mustSign(t, p, s, pss, priv, sum[:])
	again := mustSign(t, p, s, pss, priv, sum[:])
	if string(first) == string(again) {
		t.Error("two signatures are the same: there is no salt")
	}
	for _, sig := range [][]byte{first, again} {
		must(t, os.WriteFile(sigFile, sig, 0o600))
		out := tool(t, nil, "openssl", "dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32",
			"-sigopt", "rsa_mgf1_md:sha256", "-verify", keyFile, "-signature", sigFile, msgFile)
		if !strings.Contains(out, "Verified OK") {
			t.Error(out)
		}
		must(t, p.VerifyInit(s, pss, pubHandle))
		must(t, p.Verify(s, sum[:], sig))
	}
	first[7] ^= 1
	must(t, p.VerifyInit(s, pss, pubHandle))
	wantRV(t, "C_Verify of a changed signature", p.Verify(s, sum[:], first), pkcs11.CKR_SIGNATURE_INVALID)
	must(t, p.VerifyInit(s, pss, pubHandle))
	wantRV(t, "C_Verify of a short signature", p.Verify(s, sum[:], again[:255]), pkcs11.CKR_SIGNATURE_LEN_RANGE)
	other := sha256.Sum256([]byte("other"))
	must(t, p.VerifyInit(s, pss, pubHandle))
	wantRV(t, "C_Verify of another digest", p.Verify(s, other[:], again), pkcs11.CKR_SIGNATURE_INVALID)
	// The padding is part of what is verified: PKCS#1 is no PSS.
	plain := mustSign(t, p, s, mech(pkcs11.CKM_SHA256_RSA_PKCS, nil), priv, message)
	must(t, p.VerifyInit(s, pss, pubHandle))
	wantRV(t, "C_Verify of a PKCS#1 signature", p.Verify(s, sum[:], plain), pkcs11.CKR_SIGNATURE_INVALID)
	if rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], again) == nil {
		t.Error("PSS verifies as PKCS#1")
	}
}

// TestPSSParameters: TLS 1.3's parameters and no others (PKCS#11 v2.40 mechanisms §2.1.10).
func TestPSSParameters(t *testing.T) {
	t.Parallel()
	_, p, s := loggedIn(t)
	pub, priv := generateRSA(t, p, s, "tls")
	_, sm2Key := generateSM2(t, p, s, "sm2")
	good := pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 32)
	pss := func(param []byte) []*pkcs11.Mechanism { return mech(pkcs11.CKM_RSA_PKCS_PSS, param) }
	for name, param := range map[string][]byte{
		"none":                     nil,
		"one byte short":           good[:23],
		"one byte more":            append(append([]byte{}, good...), 0),
		"SHA-1":                    pkcs11.NewPSSParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, 20),
		"SHA-384":                  pkcs11.NewPSSParams(pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384, 48),
		"hash that is a signature": pkcs11.NewPSSParams(pkcs11.CKM_SHA256_RSA_PKCS, pkcs11.CKG_MGF1_SHA256, 32),
		"mask with SHA-1":          pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA1, 32),
		"mask with SHA-384":        pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA384, 32),
		"no mask":                  pkcs11.NewPSSParams(pkcs11.CKM_SHA256, 0, 32),
		"no salt":                  pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 0),
		"short salt":               pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 31),
		"long salt":                pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 222),
		"endless salt":             pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, ^uint(0)),
	} {
		wantRV(t, "C_SignInit, "+name, p.SignInit(s, pss(param), priv), pkcs11.CKR_MECHANISM_PARAM_INVALID)
		wantRV(t, "C_VerifyInit, "+name, p.VerifyInit(s, pss(param), pub), pkcs11.CKR_MECHANISM_PARAM_INVALID)
	}
	for _, n := range []int{0, 20, 31, 33, 48} {
		_, err := sign(p, s, pss(good), priv, make([]byte, n))
		wantRV(t, "C_Sign of a digest of "+itoa(n)+" bytes", err, pkcs11.CKR_DATA_LEN_RANGE)
	}
	wantRV(t, "C_SignInit with an SM2 key", p.SignInit(s, pss(good), sm2Key), pkcs11.CKR_KEY_TYPE_INCONSISTENT)
	wantRV(t, "C_SignInit with a public key", p.SignInit(s, pss(good), pub), pkcs11.CKR_KEY_TYPE_INCONSISTENT)
	must(t, p.SignInit(s, pss(good), priv))
	wantRV(t, "C_SignUpdate", p.SignUpdate(s, make([]byte, 32)), pkcs11.CKR_OPERATION_NOT_INITIALIZED)
	wantRV(t, "PKCS#1 with PSS parameters", p.SignInit(s, mech(pkcs11.CKM_RSA_PKCS, good), priv), pkcs11.CKR_MECHANISM_PARAM_INVALID)
}
