package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	p11 "github.com/miekg/pkcs11"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

var (
	userPIN = []byte("123456")
	soPIN   = []byte("87654321")
)

// TestMain gives SoftHSM2 a token folder of its own: it reads SOFTHSM2_CONF at C_Initialize, once for the process.
func TestMain(m *testing.M) {
	hsmtest.Daemon()
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(drive())
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "softhsm")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	scratch = dir
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		panic(err)
	}
	text := "directories.tokendir = " + dir + "/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		panic(err)
	}
	os.Setenv("SOFTHSM2_CONF", conf)
	return m.Run()
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// shipped answers the shipped profile of that name.
func shipped(name string) pkcs11.Profile {
	p, err := pkcs11.ProfileByName(name)
	if err != nil {
		panic(err)
	}
	return p
}

func needSoftHSM(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(softHSM); err != nil {
		t.Skip("SoftHSM2 is not installed (Debian softhsm2)")
	}
}

var (
	provisioning sync.Mutex
	made         int // guarded by provisioning: tokens so far
)

// newToken provisions a token and answers a Config for it.
func newToken(t testing.TB) pkcs11.Config {
	t.Helper()
	needSoftHSM(t)
	provisioning.Lock()
	defer provisioning.Unlock()
	made++
	label := fmt.Sprintf("token %d", made)
	res, err := pkcs11.Provision(pkcs11.ProvisionConfig{Module: softHSM, Slot: pkcs11.AnySlot, Label: label,
		SOPIN: soPIN, UserPIN: userPIN})
	if err != nil {
		t.Fatal(err)
	}
	if res.Outcome != "created" {
		t.Fatalf("outcome %q, want created", res.Outcome)
	}
	return pkcs11.Config{Module: softHSM, TokenLabel: label, PIN: userPIN, Profile: shipped("softhsm2"), MaxSessions: 8, Log: quiet()}
}

func open(t testing.TB, cfg pkcs11.Config) *pkcs11.Token {
	t.Helper()
	tok, err := pkcs11.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tok.Close() })
	return tok
}

func generate(t testing.TB, tok hsm.Token, label string, a hsm.Algorithm) hsm.KeyInfo {
	t.Helper()
	info, err := tok.GenerateKey(t.Context(), hsm.KeySpec{Label: label, Algorithm: a})
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func signRSA(ctx context.Context, tok hsm.Token, info hsm.KeyInfo, text string) error {
	sum := sha256.Sum256([]byte(text))
	sig, err := tok.Do(ctx, info.Label, hsm.SignRSASHA256, sum[:])
	if err != nil {
		return err
	}
	return rsa.VerifyPKCS1v15(info.Public.(*rsa.PublicKey), crypto.SHA256, sum[:], sig)
}

// signPSS signs through crypto.Signer as crypto/tls does, without the key's own check; OpenSSL judges.
func signPSS(t *testing.T, tok hsm.Token, label string) {
	t.Helper()
	key, err := hsm.NewKey(t.Context(), tok, label, false)
	if err != nil {
		t.Fatal(err)
	}
	message := []byte("handshake")
	sum := sha256.Sum256(message)
	sig, err := key.Sign(nil, sum[:], &rsa.PSSOptions{Hash: crypto.SHA256, SaltLength: rsa.PSSSaltLengthEqualsHash})
	if err != nil {
		t.Errorf("PSS: %v", err)
		return
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"key": der, "sig": sig, "message": message} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("openssl", "dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32", "-keyform", "DER",
		"-verify", filepath.Join(dir, "key"), "-signature", filepath.Join(dir, "sig"), filepath.Join(dir, "message")).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("openssl is not installed")
	}
	if err != nil || !strings.Contains(string(out), "Verified OK") {
		t.Errorf("openssl on PSS: %v\n%s", err, out)
	}
}

// TestPINIsCopied: the caller wipes its own copy, and OpenSSL judges what the token signs. What hsm.Token promises is held
// against SoftHSM2, and the others, by hsm/hsmtest.
func TestPINIsCopied(t *testing.T) {
	cfg := newToken(t)
	pin := bytes.Clone(userPIN)
	cfg.PIN = pin
	tok := open(t, cfg)
	clear(pin)
	generate(t, tok, "院长", hsm.RSA2048)
	signPSS(t, tok, "院长")
	tok.Reconnect()
	signPSS(t, tok, "院长")
}

func second2[T any](_ T, err error) error { return err }

func TestOpenCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := pkcs11.Open(ctx, pkcs11.Config{Module: softHSM, TokenLabel: "x", Log: quiet()}); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with a cancelled ctx: %v", err)
	}
}

func TestConcurrentSigning(t *testing.T) {
	cfg := newToken(t)
	var logins atomic.Int32
	cfg.BeforeLogin = func() { logins.Add(1) }
	tok := open(t, cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	g, ctx := errgroup.WithContext(t.Context())
	stop := make(chan struct{})
	for i := range 16 {
		g.Go(func() error {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return nil
				default:
				}
				if err := signRSA(ctx, tok, info, fmt.Sprint(i, n)); err != nil {
					return fmt.Errorf("goroutine %d, signature %d: %w", i, n, err)
				}
			}
		})
	}
	// Reconnects below the load: nobody notices, and each logs in once.
	for range 5 {
		tok.Reconnect()
	}
	close(stop)
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := logins.Load(); got != 6 {
		t.Errorf("%d logins, want 1 + 5", got)
	}
}

// raw is another view of the module: it shares sessions and login with ours (PKCS#11: one instance a process).
func raw(t *testing.T) *p11.Ctx {
	t.Helper()
	ctx := p11.New(softHSM)
	if ctx == nil {
		t.Fatal("miekg/pkcs11 cannot load SoftHSM2")
	}
	return ctx
}

func slotOf(t testing.TB, tok *pkcs11.Token) uint {
	t.Helper()
	info, err := tok.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info.Slot
}

// TestDisturbed pulls the ground away in the ways SoftHSM2 allows, then asks 16 goroutines to sign at once.
func TestDisturbed(t *testing.T) {
	cfg := newToken(t)
	var logins atomic.Int32
	cfg.BeforeLogin = func() { logins.Add(1) }
	tok := open(t, cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	other := raw(t)
	for _, c := range []struct {
		name    string
		disturb func() error
		logins  int32
	}{
		{"logout", func() error {
			slot := slotOf(t, tok)
			s, err := other.OpenSession(slot, p11.CKF_SERIAL_SESSION)
			if err != nil {
				return err
			}
			defer other.CloseSession(s)
			return other.Logout(s)
		}, 1},
		{"sessions closed", func() error { return other.CloseAllSessions(slotOf(t, tok)) }, 1},
		{"finalised", other.Finalize, 1},
		{"nothing", func() error { return nil }, 0},
	} {
		if err := signRSA(t.Context(), tok, info, "before"); err != nil {
			t.Fatalf("%s: before: %v", c.name, err)
		}
		if err := c.disturb(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		was := logins.Load()
		g, ctx := errgroup.WithContext(t.Context())
		for i := range 16 {
			g.Go(func() error { return signRSA(ctx, tok, info, fmt.Sprint(i)) })
		}
		if err := g.Wait(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := logins.Load() - was; got != c.logins {
			t.Errorf("%s: %d logins, want %d", c.name, got, c.logins)
		}
	}
	// Logged out, private keys are invisible. That is not "no such key", and the label stays taken.
	s, err := other.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer other.CloseSession(s)
	for name, f := range map[string]func() error{
		"FindKey": func() error { return second2(tok.FindKey(t.Context(), "k")) },
		"Keys": func() error {
			keys, err := tok.Keys(t.Context())
			if err == nil && len(keys) != 1 {
				err = fmt.Errorf("%d keys", len(keys))
			}
			return err
		},
		"GenerateKey": func() error {
			_, err := tok.GenerateKey(t.Context(), hsm.KeySpec{Label: "k", Algorithm: hsm.RSA2048})
			if errors.Is(err, hsm.ErrKeyExists) {
				return nil
			}
			return fmt.Errorf("%v, want ErrKeyExists", err)
		},
	} {
		if err := other.Logout(s); err != nil {
			t.Fatal(err)
		}
		if err := f(); err != nil {
			t.Errorf("%s when logged out: %v", name, err)
		}
	}
	if err := other.Logout(s); err != nil {
		t.Fatal(err)
	}
	if err := tok.DestroyKey(t.Context(), "k"); err != nil {
		t.Errorf("DestroyKey when logged out: %v", err)
	}
	if keys, err := tok.Keys(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("after DestroyKey: %v, %v", keys, err)
	}
}

func TestWrongPINIsTriedOnce(t *testing.T) {
	cfg := newToken(t)
	cfg.PIN = []byte("000000")
	logins := 0
	cfg.BeforeLogin = func() { logins++ }
	if _, err := pkcs11.Open(t.Context(), cfg); !errors.Is(err, hsm.ErrNeedsOperator) || hsm.ClassifyError(err) != hsm.ClassFatal {
		t.Errorf("Open = %v, want ErrNeedsOperator", err)
	}
	if logins != 1 {
		t.Errorf("PIN presented %d times, want 1", logins)
	}
	cfg.PIN = userPIN
	open(t, cfg)
}

// TestChangedPINLatches changes the PIN behind our back: the reconnect presents the old one once, and never again.
func TestChangedPINLatches(t *testing.T) {
	cfg := newToken(t)
	var logins atomic.Int32
	cfg.BeforeLogin = func() { logins.Add(1) }
	tok := open(t, cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	other := raw(t)
	s, err := other.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.SetPIN(s, string(userPIN), "654321"); err != nil {
		t.Fatal(err)
	}
	if err := other.Finalize(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if err := signRSA(t.Context(), tok, info, fmt.Sprint(i)); !errors.Is(err, hsm.ErrNeedsOperator) {
				t.Errorf("Do = %v, want ErrNeedsOperator", err)
			}
		})
	}
	wg.Wait()
	for range 3 {
		if _, err := tok.Random(t.Context(), 8); !errors.Is(err, hsm.ErrNeedsOperator) {
			t.Errorf("Random = %v, want ErrNeedsOperator", err)
		}
	}
	if got := logins.Load(); got != 2 {
		t.Errorf("PIN presented %d times, want once at Open and once at the reconnect", got)
	}
}

func TestOpenErrors(t *testing.T) {
	cfg := newToken(t)
	tok := open(t, cfg)
	again := cfg
	if _, err := pkcs11.Open(t.Context(), again); err == nil || !strings.Contains(err.Error(), "open in this process") {
		t.Errorf("second Token on one token: %v", err)
	}
	again.TokenLabel = "no such token"
	if _, err := pkcs11.Open(t.Context(), again); hsm.ClassifyError(err) != hsm.ClassReconnect {
		t.Errorf("missing token: %v, want the class of a lost connection", err)
	}
	again = cfg
	again.TokenLabel, again.ModuleArgs = "other", "x=y"
	if _, err := pkcs11.Open(t.Context(), again); err == nil || !strings.Contains(err.Error(), "other arguments") {
		t.Errorf("other arguments: %v", err)
	}
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	if err := tok.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := tok.Random(t.Context(), 8); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	// SoftHSM2 refuses a pReserved: the only proof here that it arrives.
	cfg.ModuleArgs = "x=y"
	if _, err := pkcs11.Open(t.Context(), cfg); hsm.ClassifyError(err) != hsm.ClassPermanent {
		t.Errorf("SoftHSM2 with arguments: %v, want CKR_ARGUMENTS_BAD", err)
	}
	cfg.ModuleArgs = ""
	open(t, cfg)
}

func TestProvision(t *testing.T) {
	cfg := newToken(t)
	tok := open(t, cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	pc := pkcs11.ProvisionConfig{Module: softHSM, Slot: pkcs11.AnySlot, Label: cfg.TokenLabel, SOPIN: []byte("wrong000"), UserPIN: []byte("wrong")}
	res, err := pkcs11.Provision(pc)
	if err != nil || res.Outcome != "existing" {
		t.Errorf("Provision of an existing token = %+v, %v", res, err)
	}
	slots, err := pkcs11.ListSlots(softHSM, "")
	if err != nil {
		t.Fatal(err)
	}
	index := -1
	for i, s := range slots {
		if s.Label == cfg.TokenLabel {
			index = i
		}
	}
	if index < 0 || slots[index].Slot != res.Slot || slots[index].Serial != res.Serial {
		t.Fatalf("ListSlots does not show slot %d: %+v", res.Slot, slots)
	}
	// An occupied slot is never initialised again.
	pc.Slot, pc.Label = index, "new"
	if _, err := pkcs11.Provision(pc); err == nil || !strings.Contains(err.Error(), "left alone") {
		t.Errorf("Provision over an existing token: %v", err)
	}
	pc.Slot = len(slots)
	if _, err := pkcs11.Provision(pc); err == nil {
		t.Error("Provision with a slot index past the end passed")
	}
	for _, label := range []string{"", strings.Repeat("x", 33), " x", "x\x00"} {
		bad := pc
		bad.Label = label
		if _, err := pkcs11.Provision(bad); err == nil {
			t.Errorf("label %q passed", label)
		}
	}
	if err := signRSA(t.Context(), tok, info, "still there"); err != nil {
		t.Error(err)
	}
}

// TestProvisionInterrupted stops between C_InitToken and C_InitPIN, as a power cut would.
func TestProvisionInterrupted(t *testing.T) {
	needSoftHSM(t)
	other := raw(t)
	if err := other.Initialize(); err != nil {
		t.Fatal(err)
	}
	slots, err := other.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	provisioning.Lock()
	made++
	label := fmt.Sprintf("interrupted %d", made)
	provisioning.Unlock()
	if err := other.InitToken(slots[len(slots)-1], string(soPIN), label); err != nil {
		t.Fatal(err)
	}
	if err := other.Finalize(); err != nil {
		t.Fatal(err)
	}
	pc := pkcs11.ProvisionConfig{Module: softHSM, Slot: pkcs11.AnySlot, Label: label, SOPIN: []byte("wrong000"), UserPIN: userPIN}
	if _, err := pkcs11.Provision(pc); !errors.Is(err, hsm.ErrNeedsOperator) {
		t.Errorf("wrong SO PIN: %v, want ErrNeedsOperator", err)
	}
	pc.SOPIN = soPIN
	for _, want := range []string{"completed", "existing"} {
		if res, err := pkcs11.Provision(pc); err != nil || res.Outcome != want {
			t.Errorf("Provision = %+v, %v; want %s", res, err, want)
		}
	}
	open(t, pkcs11.Config{Module: softHSM, TokenLabel: label, PIN: userPIN, Profile: shipped("softhsm2"), Log: quiet()})
}

// hmacProfile stands in for HMAC-SM3 with SHA-256, which SoftHSM2 has.
var hmacProfile = pkcs11.Profile{Name: "hmac",
	Operations: map[hsm.Operation]pkcs11.Mechanism{hsm.MACSM3: {Type: p11.CKM_SHA256_HMAC, Output: pkcs11.OutputMAC32}},
	Keys: map[hsm.Algorithm]pkcs11.KeyTemplate{hsm.HMACSM3: {Secret: true, Generate: p11.CKM_GENERIC_SECRET_KEY_GEN,
		KeyType: p11.CKK_GENERIC_SECRET, ValueLen: 32}}}

func TestSecretKey(t *testing.T) {
	cfg := newToken(t)
	cfg.Profile = hmacProfile
	tok := open(t, cfg)
	// SoftHSM2 takes the key from outside, and the answer shows that the mechanism is another: nothing stays.
	if err := tok.ImportMAC(t.Context(), "brought", make([]byte, pkcs11.MACSize)); err == nil || !strings.Contains(err.Error(), "does not answer HMAC-SM3") {
		t.Errorf("ImportMAC with HMAC-SHA-256 for a mechanism: %v", err)
	}
	if _, err := tok.FindKey(t.Context(), "brought"); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("the key stayed: %v", err)
	}
	info := generate(t, tok, "mac", hsm.HMACSM3)
	if info.Public != nil || !info.Sensitive || info.Extractable || info.Algorithm != hsm.HMACSM3 {
		t.Errorf("GenerateKey = %+v", info)
	}
	mac, err := tok.Do(t.Context(), "mac", hsm.MACSM3, []byte("row"))
	if err != nil || len(mac) != 32 {
		t.Errorf("Do = %x, %v", mac, err)
	}
	if _, err := tok.Do(t.Context(), "mac", hsm.MACSM3, make([]byte, 512<<10+1)); hsm.ClassifyError(err) != hsm.ClassPermanent {
		t.Errorf("too much data: %v", err)
	}
	// A key whose value is known, so that crypto/hmac can judge; and a second of the same label.
	other, value := raw(t), make([]byte, 32)
	rand.Read(value)
	s, err := other.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	create := func() {
		if _, err := other.CreateObject(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)),
			p11.NewAttribute(p11.CKA_KEY_TYPE, uint(p11.CKK_GENERIC_SECRET)), p11.NewAttribute(p11.CKA_TOKEN, true),
			p11.NewAttribute(p11.CKA_SIGN, true), p11.NewAttribute(p11.CKA_LABEL, "known"),
			p11.NewAttribute(p11.CKA_VALUE, value)}); err != nil {
			t.Fatal(err)
		}
	}
	create()
	for _, n := range []int{0, 1, 64, 512 << 10} {
		data := bytes.Repeat([]byte{0x5A}, n)
		h := hmac.New(sha256.New, value)
		h.Write(data)
		if mac, err := tok.Do(t.Context(), "known", hsm.MACSM3, data); err != nil || !bytes.Equal(mac, h.Sum(nil)) {
			t.Errorf("HMAC over %d bytes = %x, %v; crypto/hmac has %x", n, mac, err, h.Sum(nil))
		}
	}
	create()
	if _, err := tok.FindKey(t.Context(), "known"); !errors.Is(err, hsm.ErrKeyAmbiguous) {
		t.Errorf("FindKey = %v, want ErrKeyAmbiguous", err)
	}
	if err := tok.DestroyKey(t.Context(), "known"); !errors.Is(err, hsm.ErrKeyAmbiguous) {
		t.Errorf("DestroyKey = %v, want ErrKeyAmbiguous", err)
	}
}

// TestExtractableKeyIsDestroyed uses a profile that asks for what must not be.
func TestExtractableKeyIsDestroyed(t *testing.T) {
	cfg := newToken(t)
	p := shipped("softhsm2")
	k := p.Keys[hsm.RSA2048]
	k.Private = []pkcs11.Attribute{{Type: p11.CKA_EXTRACTABLE, Value: []byte{1}}}
	p.Keys = map[hsm.Algorithm]pkcs11.KeyTemplate{hsm.RSA2048: k}
	cfg.Profile = p
	tok := open(t, cfg)
	if _, err := tok.GenerateKey(t.Context(), hsm.KeySpec{Label: "k", Algorithm: hsm.RSA2048}); err == nil {
		t.Error("an extractable key was accepted")
	}
	if _, err := tok.FindKey(t.Context(), "k"); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("FindKey = %v, want ErrKeyNotFound", err)
	}
	if err := tok.DestroyKey(t.Context(), "k"); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("a public half stayed behind: %v", err)
	}
}

// A control is the control file of testdata/faulty.c, as the module has it in memory too.
type control []byte

// Functions of the list that testdata/faulty.c watches.
const (
	fnInitialize, fnFinalize, fnSlotList, fnTokenInfo, fnOpenSession = 0, 1, 4, 6, 12
	fnSessionInfo, fnLogin, fnDestroy, fnFindInit                    = 15, 18, 22, 26
	fnSignInit, fnSign, fnGeneratePair                               = 42, 43, 59
)

// Fields of a function in the control file, and what its act may be instead of an answer.
const (
	fieldRV, fieldTimes, fieldAfter, fieldCalls, fieldValue, fieldAct, fieldUntil, fieldMet, controlFields = 0, 1, 2, 3, 4, 5, 6, 7, 8
	actAnswer, actCrash, actHang, actLogout, actSpoil                                                      = 0, 1, 2, 3, 4
)

// newControl makes the file, for functions of the list and further ones that a test numbers after them.
func newControl(t *testing.T, path string) control {
	t.Helper()
	const size = 80 * controlFields * 8
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := mapControl(path, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Munmap(c) })
	return c
}

func mapControl(path string, size int) (control, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return syscall.Mmap(int(file.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
}

func (c control) field(fn, field int) *int64 {
	return (*int64)(unsafe.Pointer(&c[(fn*controlFields+field)*8]))
}

func (c control) set(fn int, times int64, fields map[int]int64) {
	atomic.StoreInt64(c.field(fn, fieldTimes), 0)
	for _, f := range []int{fieldRV, fieldAfter, fieldAct, fieldUntil, fieldMet} {
		atomic.StoreInt64(c.field(fn, f), fields[f])
	}
	atomic.StoreInt64(c.field(fn, fieldTimes), times)
}

// clear ends every fault.
func (c control) clear() {
	for fn := range len(c) / controlFields / 8 {
		c.set(fn, 0, nil)
	}
}

// inject lets the next times calls of fn answer rv, after doing their work or instead.
func (c control) inject(fn int, rv uint, times int64, after bool) {
	fields := map[int]int64{fieldRV: int64(rv)}
	if after {
		fields[fieldAfter] = 1
	}
	c.set(fn, times, fields)
}

func (c control) calls(fn int) int64 { return atomic.LoadInt64(c.field(fn, fieldCalls)) }

func (c control) met(fn int) int64 { return atomic.LoadInt64(c.field(fn, fieldMet)) }

// A faulty is the module of testdata/faulty.c with its control file.
type faulty struct {
	cfg pkcs11.Config
	control
	logins *atomic.Int32
}

func compile(t *testing.T, out string, defines ...string) {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler (cc)")
	}
	args := append(defines, "-shared", "-fPIC", "-o", out, "testdata/faulty.c", "-ldl")
	if text, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, text)
	}
}

// newFaulty provisions a token in SoftHSM2, and puts the faulty module before a copy of it (a copy has its own
// C_Initialize).
func newFaulty(t *testing.T) *faulty {
	t.Helper()
	cfg := newToken(t)
	dir := t.TempDir()
	lib, err := os.ReadFile(softHSM)
	if err != nil {
		t.Fatal(err)
	}
	copied, module, path := dir+"/softhsm.so", dir+"/faulty.so", dir+"/control"
	if err := os.WriteFile(copied, lib, 0o700); err != nil {
		t.Fatal(err)
	}
	compile(t, module)
	f := &faulty{cfg: cfg, control: newControl(t, path), logins: new(atomic.Int32)}
	f.cfg.Module, f.cfg.ModuleArgs = module, path+"="+copied
	f.cfg.BeforeLogin = func() { f.logins.Add(1) }
	return f
}

// TestErrorClasses injects each class of answer into C_Sign or C_SignInit and counts what is done about it.
func TestErrorClasses(t *testing.T) {
	f := newFaulty(t)
	tok := open(t, f.cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	if err := signRSA(t.Context(), tok, info, "warm"); err != nil {
		t.Fatal(err)
	}
	counted := []int{fnInitialize, fnOpenSession, fnLogin, fnSignInit, fnSign}
	for _, c := range []struct {
		name  string
		fn    int
		rv    uint
		times int64
		class hsm.Class // of the error; ClassUnknown and rv 0: success
		done  [5]int64  // calls of Initialize, OpenSession, Login, SignInit, Sign that it takes
		pool  int       // sessions afterwards
	}{
		{"no fault", fnSign, 0, 0, 0, [5]int64{0, 0, 0, 1, 1}, 8},
		{"permanent", fnSign, 0x21, 1, hsm.ClassPermanent, [5]int64{0, 0, 0, 1, 1}, 8},
		{"session", fnSign, 0xB3, 1, 0, [5]int64{0, 1, 0, 2, 2}, 8},
		{"session twice", fnSignInit, 0x90, 2, 0, [5]int64{1, 1, 1, 3, 1}, 8},
		{"session three times", fnSignInit, 0x90, 3, hsm.ClassSession, [5]int64{1, 1, 1, 3, 0}, 8},
		{"refind", fnSignInit, 0x82, 1, 0, [5]int64{0, 2, 0, 2, 1}, 8},
		{"login", fnSign, 0x101, 1, 0, [5]int64{0, 1, 1, 2, 2}, 8},
		{"reconnect", fnSign, 0x30, 1, 0, [5]int64{1, 2, 1, 2, 2}, 8},
		{"vague, once", fnSign, 0x05, 1, 0, [5]int64{0, 1, 0, 2, 2}, 8},
		{"unknown number, once", fnSign, 0x80000001, 1, 0, [5]int64{0, 1, 0, 2, 2}, 8},
		{"backpressure", fnSign, 0x31, 1, 0, [5]int64{0, 1, 0, 2, 2}, 7},
		{"after backpressure", fnSign, 0, 0, 0, [5]int64{0, 0, 0, 1, 1}, 7},
		{"reconnect restores the pool", fnSign, 0x32, 1, 0, [5]int64{1, 2, 1, 2, 2}, 8},
	} {
		var was [5]int64
		for i, fn := range counted {
			was[i] = f.calls(fn)
		}
		tok.EndBackoff()
		f.inject(c.fn, c.rv, c.times, false)
		err := signRSA(t.Context(), tok, info, c.name)
		if c.class == 0 && err != nil || c.class != 0 && hsm.ClassifyError(err) != c.class {
			t.Errorf("%s: %v, want class %v", c.name, err, c.class)
		}
		for i, fn := range counted {
			was[i] = f.calls(fn) - was[i]
		}
		want := c.done
		if strings.HasPrefix(c.name, "session ") || c.name == "refind" {
			// How many sessions are opened depends on what the row before left in the pool.
			want[1] = was[1]
		}
		if was != want {
			t.Errorf("%s: calls of Initialize, OpenSession, Login, SignInit, Sign: %v, want %v", c.name, was, want)
		}
		if got := tok.Sessions(); got != c.pool {
			t.Errorf("%s: %d sessions afterwards, want %d", c.name, got, c.pool)
		}
		f.inject(c.fn, 0, 0, false)
		// Leave one idle session for the next row.
		if err := signRSA(t.Context(), tok, info, "between"); err != nil {
			t.Fatalf("after %s: %v", c.name, err)
		}
	}
	// Fatal, in the midst of work: latched.
	f.inject(fnSign, 0xA3, 1, false)
	if err := signRSA(t.Context(), tok, info, "expired"); !errors.Is(err, hsm.ErrNeedsOperator) {
		t.Errorf("CKR_PIN_EXPIRED: %v", err)
	}
	signs := f.calls(fnSign)
	if err := signRSA(t.Context(), tok, info, "latched"); !errors.Is(err, hsm.ErrNeedsOperator) || f.calls(fnSign) != signs {
		t.Errorf("after CKR_PIN_EXPIRED: %v, %d more C_Sign", err, f.calls(fnSign)-signs)
	}
}

// TestVagueErrorsReconnectWhenRepeated: one CKR_GENERAL_ERROR costs a session, two cost the connection.
func TestVagueErrorsReconnectWhenRepeated(t *testing.T) {
	f := newFaulty(t)
	tok := open(t, f.cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	gen := tok.Generation()
	f.inject(fnSign, hsm.CKR_GENERAL_ERROR, 2, false)
	if err := signRSA(t.Context(), tok, info, "x"); hsm.ClassifyError(err) != hsm.ClassReconnect {
		t.Errorf("twice CKR_GENERAL_ERROR: %v", err)
	}
	if err := signRSA(t.Context(), tok, info, "y"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if got := tok.Generation(); got != gen+1 {
		t.Errorf("%d reconnects, want 1", got-gen)
	}
}

// TestBreaker: while the device is away, calls are refused at once; when it is back, the next call finds it.
func TestBreaker(t *testing.T) {
	f := newFaulty(t)
	tok := open(t, f.cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	f.inject(fnSign, 0x32, 1, false)
	f.inject(fnInitialize, 0x30, 2, false)
	if err := signRSA(t.Context(), tok, info, "away"); !errors.Is(err, hsm.ErrUnavailable) || hsm.ClassifyError(err) != hsm.ClassReconnect {
		t.Errorf("device away: %v, want ErrUnavailable with its cause", err)
	}
	tries := f.calls(fnInitialize)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if err := signRSA(t.Context(), tok, info, "open breaker"); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("breaker open: %v", err)
			}
		})
	}
	wg.Wait()
	if got := f.calls(fnInitialize) - tries; got != 0 {
		t.Errorf("breaker open, yet %d C_Initialize", got)
	}
	tok.EndBackoff()
	if err := signRSA(t.Context(), tok, info, "still away"); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("still away: %v", err)
	}
	tok.EndBackoff()
	for range 16 {
		wg.Go(func() {
			if err := signRSA(t.Context(), tok, info, "back"); err != nil {
				t.Errorf("device back: %v", err)
			}
		})
	}
	wg.Wait()
	if got := f.logins.Load(); got != 2 {
		t.Errorf("%d logins, want 2", got)
	}
}

// TestGenerateIsNotRetried: the key landed and the answer was lost. A second generation would leave two.
func TestGenerateIsNotRetried(t *testing.T) {
	for name, landed := range map[string]bool{"not done": false, "done, answer lost": true} {
		t.Run(name, func(t *testing.T) {
			f := newFaulty(t)
			tok := open(t, f.cfg)
			f.inject(fnGeneratePair, 0xB3, 1, landed)
			if _, err := tok.GenerateKey(t.Context(), hsm.KeySpec{Label: "k", Algorithm: hsm.RSA2048}); hsm.ClassifyError(err) != hsm.ClassSession {
				t.Errorf("GenerateKey = %v", err)
			}
			if got := f.calls(fnGeneratePair); got != 1 {
				t.Errorf("C_GenerateKeyPair called %d times", got)
			}
			_, err := tok.FindKey(t.Context(), "k")
			if landed != (err == nil) {
				t.Errorf("FindKey = %v", err)
			}
			// Before C_GenerateKeyPair nothing has been done: a lost session there costs another try.
			f.inject(fnOpenSession, 0x32, 1, false)
			if _, err := tok.GenerateKey(t.Context(), hsm.KeySpec{Label: "other", Algorithm: hsm.RSA2048}); err != nil {
				t.Errorf("device lost before the generation: %v", err)
			}
		})
	}
}

func TestDestroyIsNotRetried(t *testing.T) {
	f := newFaulty(t)
	tok := open(t, f.cfg)
	generate(t, tok, "k", hsm.RSA2048)
	// The private half goes, then the power: the next DestroyKey clears what stayed behind.
	f.inject(fnDestroy, 0x05, 1, true)
	if err := tok.DestroyKey(t.Context(), "k"); err == nil {
		t.Error("DestroyKey passed")
	}
	if got := f.calls(fnDestroy); got != 1 {
		t.Errorf("C_DestroyObject called %d times, want 1", got)
	}
	if _, err := tok.FindKey(t.Context(), "k"); !errors.Is(err, hsm.ErrKeyNotFound) {
		t.Errorf("FindKey = %v", err)
	}
	if _, err := tok.GenerateKey(t.Context(), hsm.KeySpec{Label: "k", Algorithm: hsm.RSA2048}); !errors.Is(err, hsm.ErrKeyExists) {
		t.Errorf("GenerateKey beside a left-over public half: %v", err)
	}
	if err := tok.DestroyKey(t.Context(), "k"); err != nil {
		t.Error(err)
	}
	generate(t, tok, "k", hsm.RSA2048)
}

// TestSmallTokens: a token says how many sessions it has; one of them keeps the login.
func TestSmallTokens(t *testing.T) {
	for most, want := range map[int64]int{1: 1, 2: 1, 3: 2, 9: 8, 100: 8, 0xFFFFFFFF: 8} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			f := newFaulty(t)
			atomic.StoreInt64(f.field(fnTokenInfo, fieldValue), most)
			tok := open(t, f.cfg)
			if got := tok.Sessions(); got != want {
				t.Fatalf("%d sessions, want %d", got, want)
			}
			info := generate(t, tok, "k", hsm.RSA2048)
			g, ctx := errgroup.WithContext(t.Context())
			for i := range 8 {
				g.Go(func() error { return signRSA(ctx, tok, info, fmt.Sprint(i)) })
			}
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
			tok.Reconnect()
			if err := signRSA(t.Context(), tok, info, "again"); err != nil {
				t.Error(err)
			}
			if opened := f.calls(fnOpenSession); most <= 3 && opened > 2*(most+2) {
				t.Errorf("%d sessions opened", opened)
			}
		})
	}
}

// TestSessionCount: the token has fewer sessions than it says. The pool shrinks to what there is.
func TestSessionCount(t *testing.T) {
	f := newFaulty(t)
	tok := open(t, f.cfg)
	info := generate(t, tok, "k", hsm.RSA2048)
	if err := signRSA(t.Context(), tok, info, "first"); err != nil {
		t.Fatal(err)
	}
	f.inject(fnOpenSession, 0xB1, 1<<40, false)
	g, ctx := errgroup.WithContext(t.Context())
	for i := range 64 {
		g.Go(func() error {
			err := signRSA(ctx, tok, info, fmt.Sprint(i))
			if hsm.ClassifyError(err) == hsm.ClassBackpressure {
				return nil // asked twice while the only session was out
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if got := tok.Sessions(); got < 1 || got > 8 {
		t.Errorf("%d sessions left", got)
	}
	if err := signRSA(t.Context(), tok, info, "alone"); err != nil {
		t.Errorf("the session that there is: %v", err)
	}
}

// TestUnansweredLogin: an answer that says nothing about the PIN does not latch, and the PIN is not presented again.
func TestUnansweredLogin(t *testing.T) {
	f := newFaulty(t)
	f.inject(fnLogin, 0x30, 1, false)
	if _, err := pkcs11.Open(t.Context(), f.cfg); hsm.ClassifyError(err) != hsm.ClassReconnect || errors.Is(err, hsm.ErrNeedsOperator) {
		t.Errorf("C_Login without an answer: %v", err)
	}
	if got := f.logins.Load(); got != 1 {
		t.Errorf("PIN presented %d times, want 1", got)
	}
	open(t, f.cfg)
}

func TestModulesRefused(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data []byte, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	built := func(name string, defines ...string) string {
		path := filepath.Join(dir, name)
		compile(t, path, defines...)
		return path
	}
	wrongMachine := make([]byte, 64)
	copy(wrongMachine, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(wrongMachine[16:], 3)
	binary.LittleEndian.PutUint16(wrongMachine[18:], 8)
	binary.LittleEndian.PutUint32(wrongMachine[20:], 1)
	binary.LittleEndian.PutUint16(wrongMachine[52:], 64)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ path, want string }{
		"relative":          {"libsofthsm2.so", "libsofthsm2.so"},
		"missing":           {dir + "/none.so", "no such file"},
		"folder":            {dir, "regular file"},
		"empty":             {write("empty.so", nil, 0o600), "EOF"},
		"text":              {write("text.so", []byte("INPUT(-lsofthsm2)"), 0o600), "bad magic"},
		"truncated":         {write("cut.so", []byte("\x7fELF\x02\x01\x01"), 0o600), "EOF"},
		"other machine":     {write("mips.so", wrongMachine, 0o600), "want a shared library for"},
		"program":           {self, ""},
		"anyone may write":  {write("open.so", []byte{}, 0o666), "writable by everyone"},
		"not PKCS#11":       {built("plain.so", "-DC_GetFunctionList=other"), "not a PKCS#11 module"},
		"list refused":      {built("refuse.so", "-DFAULTY_LIST=0x30"), "C_GetFunctionList: CKR_DEVICE_ERROR"},
		"C_Sign missing":    {built("nosign.so", "-DMISSING=43"), "function 43"},
		"unresolved symbol": {built("unresolved.so", "-DC_GetFunctionList=C_GetFunctionList", "-Dmmap=no_such_function"), "dlopen"},
	} {
		_, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: c.path, TokenLabel: "x", PIN: userPIN, Log: quiet()})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestECPoint(t *testing.T) {
	// The public key of GB/T 32918.5-2017 annex A.2.
	const x, y = "09F9DF311E5421A150DD7D161E4BC5C672179FAD1833FC076BB08FF356F35020", "CCEA490CE26775A52DC6EA718CC1AA600AED05FBF35E084A6632F6072DA9AD13"
	xy := make([]byte, 64)
	if _, err := fmt.Sscanf(x+y, "%x", &xy); err != nil {
		t.Fatal(err)
	}
	point := append([]byte{4}, xy...)
	off := bytes.Clone(point)
	off[64] ^= 1
	for name, c := range map[string]struct {
		in []byte
		ok bool
	}{
		"OCTET STRING": {append([]byte{4, 65}, point...), true},
		"bare point":   {point, true},
		"coordinates":  {xy, true},
		"off curve":    {off, false},
		"empty":        {nil, false},
		"infinity":     {[]byte{0}, false},
		"trailing":     {append(append([]byte{4, 65}, point...), 0), false},
		"compressed":   {append([]byte{3}, xy[:32]...), false},
	} {
		if _, err := pkcs11.ECPoint(c.in); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLongRSAKey: a key of 3072 bits is made under the profile's RSA template, found as what it is, and signs.
func TestLongRSAKey(t *testing.T) {
	cfg := newToken(t)
	tok := open(t, cfg)
	if info := generate(t, tok, "long", hsm.RSA3072); info.Algorithm != hsm.RSA3072 {
		t.Errorf("GenerateKey = %+v", info)
	}
	generate(t, tok, "short", hsm.RSA2048)
	for label, bits := range map[string]int{"long": 3072, "short": 2048} {
		info, err := tok.FindKey(t.Context(), label)
		if err != nil {
			t.Fatal(err)
		}
		if pub, ok := info.Public.(*rsa.PublicKey); !ok || pub.N.BitLen() != bits || info.Algorithm != hsm.Algorithm(fmt.Sprintf("RSA-%d", bits)) {
			t.Errorf("%s: FindKey = %+v, want %d bits", label, info, bits)
		}
		key, err := hsm.KeyOf(tok, info, true)
		if err != nil {
			t.Fatal(err)
		}
		if sig, err := key.SignMessage(t.Context(), []byte("x")); err != nil || len(sig) != bits/8 {
			t.Errorf("%s: a signature of %d bytes, %v", label, len(sig), err)
		}
	}
}
