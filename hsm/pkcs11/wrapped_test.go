package pkcs11_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	p11 "github.com/miekg/pkcs11"
	"golang.org/x/sync/errgroup"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

// install puts a wrapping key on the token of cfg.
func install(t testing.TB, cfg pkcs11.Config, so, label string, value []byte) {
	t.Helper()
	if err := pkcs11.InstallKEK(kekConfig(cfg, so, label, value)); err != nil {
		t.Fatal(err)
	}
}

func kekConfig(cfg pkcs11.Config, so, label string, value []byte) pkcs11.KEKConfig {
	return pkcs11.KEKConfig{Module: cfg.Module, ModuleArgs: cfg.ModuleArgs, TokenLabel: cfg.TokenLabel, Profile: cfg.Profile,
		Label: label, Value: value, SOPIN: []byte(so), UserPIN: cfg.PIN}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func generateWrapped(t testing.TB, tok hsm.Token, label string, alg hsm.Algorithm, kek string) *hsm.WrappedKey {
	t.Helper()
	info, blob, err := tok.GenerateWrapped(t.Context(), hsm.KeySpec{Label: label, Algorithm: alg}, kek)
	if err != nil {
		t.Fatal(err)
	}
	if info.Label != label || !info.Sensitive || !info.Extractable || info.NeverExtractable {
		t.Errorf("GenerateWrapped = %+v", info)
	}
	w, err := hsm.NewWrappedKey(label, alg, info.Public, kek, blob)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func wrappedKey(t testing.TB, tok hsm.Token, w *hsm.WrappedKey) *hsm.Key {
	t.Helper()
	key, err := hsm.KeyOfWrapped(tok, w)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// objectsOf counts the objects of a class that this process sees on the token.
func objectsOf(t testing.TB, m *machine, tok *pkcs11.Token, class uint) int {
	t.Helper()
	other := p11.New(m.module)
	s, err := other.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer other.CloseSession(s)
	if err := other.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, class)}); err != nil {
		t.Fatal(err)
	}
	n := 0
	for {
		found, _, err := other.FindObjects(s, 100)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) == 0 {
			break
		}
		n += len(found)
	}
	if err := other.FindObjectsFinal(s); err != nil {
		t.Fatal(err)
	}
	return n
}

// cannotLeave looks at an unwrapped key from outside the driver: its attributes, and that the trusted key itself does not wrap
// it again.
func cannotLeave(t *testing.T, m *machine, tok *pkcs11.Token) {
	t.Helper()
	ctx := p11.New(m.module)
	s, err := ctx.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer ctx.CloseSession(s)
	find := func(class uint) p11.ObjectHandle {
		t.Helper()
		if err := ctx.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, class)}); err != nil {
			t.Fatal(err)
		}
		found, _, err := ctx.FindObjects(s, 1)
		if err = errors.Join(err, ctx.FindObjectsFinal(s)); err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		return found[0]
	}
	key, kek := find(p11.CKO_PRIVATE_KEY), find(p11.CKO_SECRET_KEY)
	for typ, want := range map[uint]byte{p11.CKA_SENSITIVE: 1, p11.CKA_EXTRACTABLE: 0, p11.CKA_TOKEN: 0, p11.CKA_PRIVATE: 1, p11.CKA_SIGN: 1, p11.CKA_DECRYPT: 0, p11.CKA_UNWRAP: 0} {
		a, err := ctx.GetAttributeValue(s, key, []*p11.Attribute{p11.NewAttribute(typ, nil)})
		if err != nil || len(a) != 1 || !bytes.Equal(a[0].Value, []byte{want}) {
			t.Errorf("attribute %#x of an unwrapped key: %v, %v; want %d", typ, a, err, want)
		}
	}
	if _, err := ctx.GetAttributeValue(s, key, []*p11.Attribute{p11.NewAttribute(p11.CKA_VALUE, nil)}); err != p11.Error(p11.CKR_ATTRIBUTE_SENSITIVE) {
		t.Errorf("reading an unwrapped key: %v", err)
	}
	gcm := p11.NewGCMParams(nil, nil, 128)
	defer gcm.Free()
	if _, err := ctx.WrapKey(s, []*p11.Mechanism{p11.NewMechanism(0xFFFFF00B, gcm)}, kek, key); err != p11.Error(p11.CKR_KEY_UNEXTRACTABLE) {
		t.Errorf("wrapping an unwrapped key: %v", err)
	}
}

// TestWrapped: keys that are wrapped sign, gmsm and crypto/rsa verifying, and leave nothing on the token; a cache of a few
// holds under many signers, and a restarted machine costs no more than unwrapping again.
func TestWrapped(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	kek := randomBytes(16)
	install(t, m.cfg, "officer-pin", "kek/1", kek)
	if err := pkcs11.InstallKEK(kekConfig(m.cfg, "officer-pin", "kek/1", kek)); !errors.Is(err, hsm.ErrKeyExists) {
		t.Errorf("a second wrapping key with the label: %v", err)
	}
	if err := pkcs11.InstallKEK(kekConfig(m.cfg, "officer-pin", "kek/2", kek[:15])); err == nil {
		t.Error("a wrapping key of 15 bytes was taken")
	}
	cfg := m.cfg
	cfg.WrappedKeys = 4
	tok := open(t, cfg)
	defer tok.Close()
	ctx := t.Context()

	var keys []*hsm.Key
	var wrapped []*hsm.WrappedKey
	for i := range 12 {
		w := generateWrapped(t, tok, fmt.Sprintf("staff/%d", i), hsm.SM2, "kek/1")
		wrapped, keys = append(wrapped, w), append(keys, wrappedKey(t, tok, w))
	}
	if n := objectsOf(t, m, tok, p11.CKO_PRIVATE_KEY) + objectsOf(t, m, tok, p11.CKO_PUBLIC_KEY); n != 0 {
		t.Errorf("%d objects were left by generating wrapped keys", n)
	}
	everyone := func() {
		t.Helper()
		var g errgroup.Group
		for i := range 32 {
			g.Go(func() error {
				for j := range 12 {
					if err := signSM2(ctx, keys[(i+j)%len(keys)], fmt.Sprint(i, j)); err != nil {
						return err
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	everyone()
	if n := objectsOf(t, m, tok, p11.CKO_PRIVATE_KEY); n == 0 || n > cfg.WrappedKeys {
		t.Errorf("%d keys are unwrapped, want 1 to %d", n, cfg.WrappedKeys)
	}
	if keys, err := tok.Keys(ctx); err != nil || len(keys) != 1 || keys[0].Algorithm != hsm.SM4 || !keys[0].Trusted || !keys[0].Sensitive || keys[0].Extractable {
		t.Errorf("Keys = %+v, %v; want the wrapping key alone, session objects must not be listed", keys, err)
	}
	cannotLeave(t, m, tok)
	m.kill()
	m.run(t)
	everyone()

	// By its digest alone a key is used while it is unwrapped, under its own label, and not after it was forgotten.
	e := randomBytes(32)
	if _, err := tok.DoWrapped(ctx, wrapped[0], hsm.SignSM2E, e); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.DoWrapped(ctx, hsm.WrappedRef(wrapped[0].Digest(), "staff/0"), hsm.SignSM2E, e); err != nil {
		t.Errorf("by digest: %v", err)
	}
	if _, err := tok.DoWrapped(ctx, hsm.WrappedRef(wrapped[0].Digest(), "staff/1"), hsm.SignSM2E, e); !errors.Is(err, hsm.ErrNotCached) {
		t.Errorf("by digest, under another's label: %v", err)
	}
	if err := tok.ForgetWrapped(ctx, wrapped[0].Digest()); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.DoWrapped(ctx, hsm.WrappedRef(wrapped[0].Digest(), "staff/0"), hsm.SignSM2E, e); !errors.Is(err, hsm.ErrNotCached) {
		t.Errorf("by digest, after it was forgotten: %v", err)
	}

	r := wrappedKey(t, tok, generateWrapped(t, tok, "staff/rsa", hsm.RSA2048, "kek/1"))
	if _, err := r.SignMessage(ctx, []byte("x")); err != nil {
		t.Errorf("RSA: %v", err)
	}
	for name, f := range map[string]func() error{
		"HMAC":     func() error { _, err := tok.DoWrapped(ctx, wrapped[0], hsm.MACSM3, e); return err },
		"31 bytes": func() error { _, err := tok.DoWrapped(ctx, wrapped[0], hsm.SignSM2E, e[1:]); return err },
		"no wrapping key": func() error {
			_, _, err := tok.GenerateWrapped(ctx, hsm.KeySpec{Label: "x", Algorithm: hsm.SM2}, "kek/9")
			return err
		},
		"a secret key": func() error {
			_, _, err := tok.GenerateWrapped(ctx, hsm.KeySpec{Label: "x", Algorithm: hsm.HMACSM3}, "kek/1")
			return err
		},
		"RSA with an SM2 e": func() error { _, err := tok.DoWrapped(ctx, wrapped[0], hsm.SignRSASHA256, e); return err },
	} {
		if f() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestWrappedAltered: no byte of a blob, of a name or of another key's blob can be changed and another key's signature be
// had. Under SM4-GCM the machine refuses each; under SM4-CBC it does not see a change that leaves the private key what it
// is, and the trial of each unwrapped key refuses the others.
func TestWrappedAltered(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	cbc := filepath.Join(t.TempDir(), "cbc.toml")
	text, err := os.ReadFile("profiles/neutral.toml")
	if err != nil {
		t.Fatal(err)
	}
	gcm := "[operations.sm4-gcm-wrap]\nmechanism = 0xFFFFF00B\nparameter = \"gcm-token-iv\""
	if !bytes.Contains(text, []byte(gcm)) {
		t.Fatal("the neutral profile has another wrapping")
	}
	text = bytes.Replace(text, []byte(gcm), []byte("[operations.sm4-cbc-pad-wrap]\nmechanism = 0xFFFFF00A\nparameter = \"iv\""), 1)
	text = bytes.Replace(text, []byte(`name = "neutral"`), []byte(`name = "cbc"`), 1)
	if err := os.WriteFile(cbc, text, 0o600); err != nil {
		t.Fatal(err)
	}
	install(t, m.cfg, "officer-pin", "kek", randomBytes(16))
	for _, profile := range []string{"neutral", cbc} {
		t.Run(filepath.Base(profile), func(t *testing.T) {
			cfg := m.cfg
			cfg.Profile = shipped(profile)
			tok := open(t, cfg)
			defer tok.Close()
			mine, other := generateWrapped(t, tok, "mine", hsm.SM2, "kek"), generateWrapped(t, tok, "other", hsm.SM2, "kek")
			if err := signSM2(t.Context(), wrappedKey(t, tok, mine), "x"); err != nil {
				t.Fatal(err)
			}
			before, harmless := tok.Generation(), 0
			refuse := func(what string, w *hsm.WrappedKey, err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
				e := randomBytes(32)
				if out, err := tok.DoWrapped(t.Context(), w, hsm.SignSM2E, e); err == nil {
					r, v, err := hsm.NormalizeSM2(out)
					if err != nil || profile == "neutral" || !sm2.Verify(mine.Public.(*ecdsa.PublicKey), e, r, v) {
						t.Errorf("%s: a signature", what)
					}
					harmless++
				} else if hsm.ClassifyError(err) != hsm.ClassPermanent {
					t.Errorf("%s: %v", what, err)
				}
			}
			altered := func(w hsm.WrappedKey) (*hsm.WrappedKey, error) {
				return hsm.NewWrappedKey(w.Label, w.Algorithm, w.Public, w.KEK, w.Blob)
			}
			for i := range mine.Blob {
				w := *mine
				w.Blob = bytes.Clone(mine.Blob)
				w.Blob[i] ^= 1 << mrand.IntN(8)
				a, err := altered(w)
				refuse(fmt.Sprintf("byte %d of the blob", i), a, err)
			}
			if harmless == len(mine.Blob) {
				t.Error("no change of a byte was refused")
			}
			w := *mine
			w.Blob = other.Blob
			a, err := altered(w)
			refuse("another's blob", a, err)
			w = *mine
			w.Public = other.Public
			a, err = altered(w)
			refuse("another's public key", a, err)
			w = *mine
			w.Blob = mine.Blob[:len(mine.Blob)-1]
			a, err = altered(w)
			refuse("a byte less", a, err)
			if profile == "neutral" { // CBC has no additional data
				w = *mine
				w.Label = "Mine"
				a, err = altered(w)
				refuse("another's name", a, err)
			}
			if n := tok.Generation(); n != before {
				t.Errorf("altered blobs cost %d reconnects", n-before)
			}
			if err := signSM2(t.Context(), wrappedKey(t, tok, mine), "y"); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestWrappingKeyMustBeTrusted: nothing is wrapped under a key that the security officer has not marked, and the marked one
// does not leave, pkcs11-tool trying.
func TestWrappingKeyMustBeTrusted(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	install(t, m.cfg, "officer-pin", "kek", randomBytes(16))
	tok := open(t, m.cfg)
	defer tok.Close()
	ctx := p11.New(m.module) // the same C_Initialize and login
	s, err := ctx.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err == nil {
		_, err = ctx.CreateObject(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, p11.CKO_SECRET_KEY), p11.NewAttribute(p11.CKA_KEY_TYPE, 0xFFFFF002),
			p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_WRAP, true), p11.NewAttribute(p11.CKA_UNWRAP, true),
			p11.NewAttribute(p11.CKA_LABEL, "mine"), p11.NewAttribute(p11.CKA_VALUE, randomBytes(16))})
	}
	if err = errors.Join(err, ctx.CloseSession(s)); err != nil {
		t.Fatal(err)
	}
	_, _, err = tok.GenerateWrapped(t.Context(), hsm.KeySpec{Label: "x", Algorithm: hsm.SM2}, "mine")
	if !errors.Is(err, hsm.ErrNoWrapping) || !strings.Contains(err.Error(), "CKA_TRUSTED") {
		t.Errorf("under a key that is not trusted: %v", err)
	}
	w := generateWrapped(t, tok, "x", hsm.SM2, "kek")
	moved, err := hsm.NewWrappedKey(w.Label, w.Algorithm, w.Public, "mine", w.Blob)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tok.DoWrapped(t.Context(), moved, hsm.SignSM2E, randomBytes(32)); !errors.Is(err, hsm.ErrNoWrapping) {
		t.Errorf("unwrapping under it: %v", err)
	}

	tool, err := exec.LookPath("pkcs11-tool")
	if err != nil {
		t.Skip("pkcs11-tool is not installed (Debian opensc)")
	}
	if err := os.WriteFile(m.module+".conf", []byte("socket="+filepath.Join(m.root, "state", "p11.sock")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		cmd := exec.CommandContext(context.Background(), tool, append([]string{"--module", m.module, "--token-label", "staff", "--login", "--pin", string(m.cfg.PIN)}, args...)...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("-O", "--type", "secrkey"); err != nil || !strings.Contains(out, "kek") {
		t.Fatalf("listing: %v\n%s", err, out)
	}
	if out, err := run("--read-object", "--type", "secrkey", "--label", "kek"); err == nil || !strings.Contains(out, "CKR_ATTRIBUTE_SENSITIVE") && !strings.Contains(out, "sensitive") {
		t.Errorf("reading the wrapping key: %v\n%s", err, out)
	}
}

// TestWrappingKeyIsNotLeftBehind: where the security officer's step fails, the wrapping key goes, and the next attempt is not
// in its own way; a key that was there under the label stays.
func TestWrappingKeyIsNotLeftBehind(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	if err := pkcs11.InstallKEK(kekConfig(m.cfg, "not-the-officer", "kek", randomBytes(16))); err == nil || errors.Is(err, hsm.ErrKeyExists) {
		t.Errorf("with a wrong officer's PIN: %v", err)
	}
	value := randomBytes(16)
	install(t, m.cfg, "officer-pin", "kek", value)
	tok := open(t, m.cfg)
	w := generateWrapped(t, tok, "x", hsm.SM2, "kek")
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	for _, so := range []string{"not-the-officer", "officer-pin"} {
		if err := pkcs11.InstallKEK(kekConfig(m.cfg, so, "kek", randomBytes(16))); !errors.Is(err, hsm.ErrKeyExists) {
			t.Errorf("over a key that is there: %v", err)
		}
	}
	tok = open(t, m.cfg)
	defer tok.Close()
	if _, err := tok.DoWrapped(t.Context(), w, hsm.SignSM2E, randomBytes(32)); err != nil {
		t.Errorf("the key that was there: %v", err)
	}
}

// TestWrappedNotHere: a machine whose profile names no wrapping operation says so, before anything is asked of it.
func TestWrappedNotHere(t *testing.T) {
	cfg := newToken(t)
	if err := pkcs11.InstallKEK(kekConfig(cfg, string(soPIN), "kek", randomBytes(16))); !errors.Is(err, hsm.ErrNoWrapping) {
		t.Errorf("InstallKEK on SoftHSM2: %v", err)
	}
	tok := open(t, cfg)
	defer tok.Close()
	if _, _, err := tok.GenerateWrapped(t.Context(), hsm.KeySpec{Label: "x", Algorithm: hsm.RSA2048}, "kek"); !errors.Is(err, hsm.ErrNoWrapping) {
		t.Errorf("GenerateWrapped on SoftHSM2: %v", err)
	}
}
