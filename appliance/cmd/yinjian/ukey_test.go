package main_test

import (
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
)

// A token stands for a UKey: the software cipher machine, answering to vendors' profiles.
type token struct {
	state, phrase, module, args string
	daemon                      *exec.Cmd
}

func startToken(t *testing.T) *token {
	t.Helper()
	dir := tempDir(t)
	k := &token{state: filepath.Join(dir, "state"), phrase: pinFile(t, "correct horse battery"), module: filepath.Join(dir, "ukey.so")} // another name: a C_Initialize of its own
	b, err := os.ReadFile(built.module)
	if err == nil {
		err = os.WriteFile(k.module, b, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.args = "socket='" + filepath.Join(k.state, "p11.sock") + "'"
	k.as(t, "")
	t.Cleanup(func() { _ = k.daemon.Process.Kill(); _ = k.daemon.Wait() })
	return k
}

// as starts it again, answering to a profile.
func (k *token) as(t *testing.T, profile string) {
	t.Helper()
	if k.daemon != nil {
		_ = k.daemon.Process.Kill()
		_ = k.daemon.Wait()
	}
	k.daemon = exec.Command(built.binary, "softtoken", "--state", k.state, "--passphrase-file", k.phrase, "--impersonate", profile, "--slots", "7")
	k.daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := k.daemon.Start(); err != nil {
		t.Fatal(err)
	}
	if err := appliance.WaitForSocket(t.Context(), filepath.Join(k.state, "p11.sock"), patience); err != nil {
		t.Fatal(err)
	}
}

// make puts keys into a token with that label, and answers a certificate of the first.
func (k *token) make(t *testing.T, profile, label, pin string, keys ...string) []byte {
	t.Helper()
	if _, err := pkcs11.Provision(pkcs11.ProvisionConfig{Module: k.module, ModuleArgs: k.args, Slot: pkcs11.AnySlot, Label: label, SOPIN: []byte("officer-pin"), UserPIN: []byte(pin)}); err != nil {
		t.Fatal(err)
	}
	open, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: k.module, ModuleArgs: k.args, TokenLabel: label, PIN: []byte(pin), Profile: hsmtest.Profile(t, profile), Log: hsmtest.Quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	for _, name := range keys {
		if _, err := open.GenerateKey(t.Context(), hsm.KeySpec{Label: name, Algorithm: hsm.SM2}); err != nil {
			t.Fatal(err)
		}
	}
	key, err := hsm.NewKey(t.Context(), open, keys[0], true)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &smx509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: label}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := smx509.CreateCertificate(rand.Reader, template, template, key.Public(), ca)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// An administrator's login is signed by a UKey through its vendor's module, whatever numbers the vendor uses; a PIN that is
// refused was presented once, and the last try is nobody's to spend by mistake.
func TestUKey(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	li := m.clerk(t, "li", "Aq-guanli-2026")
	mustRun(t, "admin", "bootstrap", "--dir", dir, "--system", "zhang:张三:"+pinFile(t, "Xt-guanli-2026"), "--security", "li:李四:"+pinFile(t, li.password), "--audit", "wang:王五:"+pinFile(t, "Sj-guanli-2026"))
	k := startToken(t)
	const pin = "ukey-pin-1"
	cert := filepath.Join(tempDir(t), "li.pem")
	login := func(pin string, more ...string) []string {
		return append([]string{"login", "--name", "li", "--password-file", pinFile(t, li.password), "--module", k.module, "--module-args", k.args, "--pin-file", pinFile(t, pin)}, more...)
	}
	for i, profile := range []string{"sansec", "sansec-der", "tass", "koal", "westone", "neutral"} {
		k.as(t, profile)
		label := "ukey-" + profile
		if err := os.WriteFile(cert, k.make(t, profile, label, pin, "login", "encrypt"), 0o600); err != nil {
			t.Fatal(err)
		}
		mustRun(t, "admin", "certificate", "li", "--dir", dir, "--file", cert)
		args := login(pin, "--key-label", "login", "--profile", profile)
		if i > 0 {
			li.refused(t, fmt.Sprintf("%d 个符合的令牌", i+1), args...)
			args = append(args, "--token-label", label)
		}
		li.must(t, args...)
		li.must(t, "admin", "list")
	}
	login = func(pin string, more ...string) []string {
		return append([]string{"login", "--name", "li", "--password-file", pinFile(t, li.password), "--module", k.module, "--module-args", k.args, "--pin-file", pinFile(t, pin), "--token-label", "ukey-neutral"}, more...)
	}
	li.refused(t, "2 个 SM2 密钥", login(pin)...)
	li.refused(t, "login_failed", login(pin, "--key-label", "encrypt")...) // another key than the certificate's

	// Nine wrong PINs in as many commands: each presented it once, and the tenth, which would lock the token, is not presented.
	for range 9 {
		li.refused(t, "只出示了一次", login("wrong-pin-7", "--key-label", "login")...)
	}
	li.refused(t, "只剩最后一次", login(pin, "--key-label", "login")...)
	infos, err := pkcs11.ListSlots(k.module, k.args)
	slot := slices.IndexFunc(infos, func(i hsm.TokenInfo) bool { return i.Label == "ukey-neutral" })
	if err != nil || slot < 0 || !infos[slot].UserPINFinalTry || infos[slot].UserPINLocked {
		t.Fatalf("the token says %+v, %v", infos, err)
	}
	// The PIN is entered with the vendor's program.
	enter := func(pin string) outcome {
		return command(t, []string{"YINJIAN_P11_SOCKET=" + filepath.Join(k.state, "p11.sock")}, "pkcs11-tool", "--module", k.module, "--token-label", "ukey-neutral", "--login", "--pin", pin, "-O")
	}
	need(t, "pkcs11-tool")
	if o := enter(pin); o.code != 0 {
		t.Fatal(o)
	}
	li.must(t, login(pin, "--key-label", "login")...)
	bySlot := []string{"login", "--name", "li", "--password-file", pinFile(t, li.password), "--module", k.module, "--module-args", k.args, "--pin-file", pinFile(t, pin), "--key-label", "login", "--slot"}
	li.must(t, append(bySlot, fmt.Sprintf("%#x", infos[slot].Slot))...)
	li.refused(t, "0 个符合的令牌", append(bySlot, "77")...)
	// At the console's login the signature is a file, made on the administrator's own machine.
	a := m.admin()
	defer a.Close()
	challenge, err := a.LoginChallenge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(tempDir(t), "sig")
	sign := []string{"ukey", "sign", "--module", k.module, "--module-args", k.args, "--token-label", "ukey-neutral", "--key-label", "login", "--pin-file", pinFile(t, pin), "--out", out, "--challenge"}
	refused(t, 2, []string{"--challenge"}, append(sign, "AAAA")...)
	mustRun(t, append(sign, base64.StdEncoding.EncodeToString(challenge))...)
	if in, err := a.Login(t.Context(), wire.Login{Name: "li", Password: li.password, Challenge: challenge, Signature: []byte(readFile(t, out))}); err != nil || in.Session == "" {
		t.Errorf("with the file: %v", err)
	}
	// Locked.
	for range 10 {
		enter("wrong-pin-7")
	}
	li.refused(t, "已锁定", login(pin)...)
	if o := li.run(t, append(login(pin), "--key", cert)...); o.code != 2 || !strings.Contains(o.stderr, "module") {
		t.Errorf("a UKey and a file: %v", o)
	}
	m.stop(t)
}
