package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/emmansun/gmsm/sm2"
	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// A cipherTrial is an encryption of whole blocks that a profile names, for self-tests alone.
type cipherTrial struct {
	name            string // of the profile's operation
	number, keyType uint
}

var (
	errNotOffered = errors.New("厂商档案没有此算法，或令牌不提供 (the vendor profile names none, or the token lacks it)")
	errNoImport   = errors.New("令牌不接受已知值的密钥，无从核对 (the token takes no key of a known value, so there is nothing to compare)")
	errWrong      = errors.New("答案与向量不符 (the answer is not the vector's)")
	errUnverified = errors.New("签名在令牌外验证不过 (the signature does not verify outside the token)")
)

// The published vectors of [Token.SelfTest].
const (
	sm3Source    = "GB/T 32905-2016 附录 A.1：\"abc\""
	sm3Answer    = "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"
	sha256Source = "FIPS 180-4，NIST 示例：\"abc\""
	sha256Answer = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	hmacSource   = "GM/T 0042-2015 附录 D.3"
	hmacKey      = "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20"
	hmacText     = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"
	hmacAnswer   = "ca05e144ed05d1857840d1f318a4a8669e559fc8391f414485bfdf7bb408963a"
	sm4Key       = "0123456789abcdeffedcba9876543210"
	ecbSource    = "GB/T 32907-2016 附录 A.1"
	ecbAnswer    = "681edf34d206965e86b3e94f536e4246"
	cbcSource    = "draft-ribose-cfrg-sm4-10 A.2.2.1"
	cbcIV        = "000102030405060708090a0b0c0d0e0f"
	cbcText      = "aaaaaaaabbbbbbbbccccccccddddddddeeeeeeeeffffffffaaaaaaaabbbbbbbb"
	cbcAnswer    = "78ebb11cc40b0a48312aaeb2040244cb4cb7016951909226979b0d15dc6a8f6d"
	outside      = "令牌内签名，令牌外验证 (signed in the token with a throw-away key, verified outside)"
)

// SelfTest implements [hsm.SelfTester]. It works in a session of its own, with session objects that are destroyed: what
// they sign is random and leaves no trace. An algorithm that is refused is named as unavailable, and is no reason to repair the
// connection.
func (t *Token) SelfTest(ctx context.Context) ([]hsm.SelfTest, error) {
	var out []hsm.SelfTest
	err := t.run(ctx, true, func(s p11.SessionHandle, _ uint64) error {
		if err := t.loggedIn(s); err != nil {
			return err
		}
		out = nil
		try := func(algorithm, basis string, f func() error) {
			begun := time.Now() // interval
			err := f()
			r := hsm.SelfTest{Algorithm: algorithm, Result: hsm.SelfTestPassed, Basis: basis, TookUS: time.Since(begun).Microseconds()}
			switch {
			case errors.Is(err, errWrong) || errors.Is(err, errUnverified):
				r.Result, r.Detail = hsm.SelfTestFailed, err.Error()
			case err != nil:
				r.Result, r.Detail = hsm.SelfTestUnavailable, err.Error()
			}
			out = append(out, r)
		}
		try("SM3", sm3Source, func() error { return t.digestTrial(s, t.cfg.Profile.sm3, sm3Answer) })
		try("SHA-256", sha256Source, func() error { return t.digestTrial(s, p11.CKM_SHA256, sha256Answer) })
		try("HMAC-SM3", hmacSource, func() error { return t.macTrial(s) })
		for _, mode := range []struct{ operation, name, source, iv, text, answer string }{
			{profiles.SM4ECB, "SM4-ECB", ecbSource, "", sm4Key, ecbAnswer},
			{profiles.SM4CBC, "SM4-CBC", cbcSource, cbcIV, cbcText, cbcAnswer},
		} {
			try(mode.name, mode.source, func() error { return t.cipherTrial(s, mode.operation, mode.iv, mode.text, mode.answer) })
		}
		try("SM2", outside, func() error { return t.pairTrial(s, hsm.SM2, hsm.SignSM2E) })
		try("RSA-2048", outside, func() error { return t.pairTrial(s, hsm.RSA2048, hsm.SignRSASHA256) })
		out = append(out, t.sm1Trial())
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: self-test: %w", err)
	}
	return out, nil
}

// sm1Trial says whether the profile names SM1. It is not published: there is no vector to hold an answer against, and it is
// never emulated.
func (t *Token) sm1Trial() hsm.SelfTest {
	out := hsm.SelfTest{Algorithm: "SM1", Result: hsm.SelfTestUnavailable, Basis: "算法未公开，没有向量 (not published: there is no vector)", Detail: errNotOffered.Error()}
	if t.cfg.Profile.sm1 {
		out.Detail = "厂商档案有 SM1，可用 yinjian hsm probe 试其加解密往返 (the profile names it; yinjian hsm probe tries a round trip)"
	}
	return out
}

func unhex(text string) []byte {
	b, err := hex.DecodeString(text)
	if err != nil {
		panic(err) // our own constants
	}
	return b
}

// digestTrial has the token hash "abc".
func (t *Token) digestTrial(s p11.SessionHandle, number uint, want string) error {
	if number == 0 || !t.lib.has(fnDigestInit) || !t.lib.has(fnDigest) {
		return errNotOffered
	}
	if err := t.lib.ctx.DigestInit(s, []*p11.Mechanism{p11.NewMechanism(number, nil)}); err != nil {
		return call("C_DigestInit", err)
	}
	got, err := t.lib.ctx.Digest(s, []byte("abc"))
	return compared(got, call("C_Digest", err), want)
}

func compared(got []byte, err error, want string) error {
	if err == nil && !bytes.Equal(got, unhex(want)) {
		err = fmt.Errorf("%w：%x", errWrong, got)
	}
	return err
}

// known brings a vector's key, which is no secret, for as long as f runs.
func (t *Token) known(s p11.SessionHandle, keyType uint, value []byte, use uint, f func(p11.ObjectHandle) error) error {
	if !t.lib.has(fnCreateObject) {
		return errNoImport
	}
	h, err := t.lib.ctx.CreateObject(s, []*p11.Attribute{
		p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)), p11.NewAttribute(p11.CKA_KEY_TYPE, keyType), p11.NewAttribute(p11.CKA_TOKEN, false),
		p11.NewAttribute(p11.CKA_LABEL, ProbeLabel), p11.NewAttribute(p11.CKA_VALUE, value), p11.NewAttribute(use, true),
	})
	if err != nil {
		return fmt.Errorf("%w: %w", errNoImport, call("C_CreateObject", err))
	}
	err = f(h)
	if derr := t.lib.ctx.DestroyObject(s, h); derr != nil && err == nil {
		err = call("C_DestroyObject", derr)
	}
	return err
}

func (t *Token) macTrial(s p11.SessionHandle) error {
	m, ok := t.cfg.Profile.Operations[hsm.MACSM3]
	if !ok {
		return errNotOffered
	}
	return t.known(s, t.cfg.Profile.Keys[hsm.HMACSM3].KeyType, unhex(hmacKey), p11.CKA_SIGN, func(h p11.ObjectHandle) error {
		got, err := t.lib.sign(s, m, h, []byte(hmacText+hmacText))
		if err == nil && !hmac.Equal(got, unhex(hmacAnswer)) {
			err = errWrong
		}
		return err
	})
}

func (t *Token) cipherTrial(s p11.SessionHandle, operation, iv, text, want string) error {
	for _, c := range t.cfg.Profile.ciphers {
		if c.name != operation || !t.lib.has(fnEncryptInit) || !t.lib.has(fnEncrypt) {
			continue
		}
		return t.known(s, c.keyType, unhex(sm4Key), p11.CKA_ENCRYPT, func(h p11.ObjectHandle) error {
			if err := t.lib.ctx.EncryptInit(s, []*p11.Mechanism{mechanismOf(c.number, unhex(iv))}, h); err != nil {
				return call("C_EncryptInit", err)
			}
			got, err := t.lib.ctx.Encrypt(s, unhex(text))
			return compared(got, call("C_Encrypt", err), want)
		})
	}
	return errNotOffered
}

// pairTrial makes a pair, has it sign random bytes, and verifies that here.
func (t *Token) pairTrial(s p11.SessionHandle, algorithm hsm.Algorithm, op hsm.Operation) (err error) {
	template, makes := t.cfg.Profile.Keys[algorithm]
	m, signs := t.cfg.Profile.Operations[op]
	if !makes || !signs {
		return errNotOffered
	}
	id := make([]byte, 16)
	rand.Read(id) // never fails (crypto/rand)
	public, private := template.templates("", id)
	without := KeyTemplate{Omit: []uint{p11.CKA_LABEL}}
	session := []Attribute{{Type: p11.CKA_TOKEN, Value: p11.NewAttribute(p11.CKA_TOKEN, false).Value}}
	pub, priv, err := t.lib.ctx.GenerateKeyPair(s, []*p11.Mechanism{p11.NewMechanism(template.Generate, nil)}, without.finish(public, session), without.finish(private, session))
	if err != nil {
		return call("C_GenerateKeyPair", err)
	}
	defer func() {
		for _, h := range []p11.ObjectHandle{priv, pub} {
			if derr := t.lib.ctx.DestroyObject(s, h); derr != nil && err == nil {
				err = call("C_DestroyObject", derr)
			}
		}
	}()
	info, err := t.keyInfo(s, priv, false, map[string][]p11.ObjectHandle{halfKey(id, ""): {pub}})
	if err != nil {
		return err
	}
	digest := make([]byte, 32)
	rand.Read(digest) // never fails (crypto/rand)
	sig, err := t.lib.sign(s, m, priv, m.input(digest))
	if err != nil {
		return err
	}
	verifies := func(digest []byte) bool {
		switch pub := info.Public.(type) {
		case *ecdsa.PublicKey:
			r, v, err := hsm.NormalizeSM2(sig)
			return err == nil && sm2.Verify(pub, digest, r, v)
		case *rsa.PublicKey:
			return rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest, sig) == nil
		}
		return false
	}
	other := bytes.Clone(digest)
	other[0] ^= 1
	if !verifies(digest) || verifies(other) {
		return errUnverified
	}
	return nil
}
