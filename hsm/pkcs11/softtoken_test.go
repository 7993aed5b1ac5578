package pkcs11_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/softtoken"
)

// A machine is a software cipher machine in a process of its own.
type machine struct {
	root, module string
	profile      string // that the daemon answers to; "": its own
	process      *exec.Cmd
	cfg          pkcs11.Config
}

// newMachine builds the module, under a name of its own so that it has its own C_Initialize, starts the daemon and
// provisions a token.
func newMachine(t testing.TB) *machine {
	t.Helper()
	m := placeMachine(t)
	if err := os.WriteFile(filepath.Join(m.root, "passphrase"), []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.run(t)
	pc := pkcs11.ProvisionConfig{Module: m.module, ModuleArgs: m.cfg.ModuleArgs, Slot: pkcs11.AnySlot, Label: "staff",
		SOPIN: []byte("officer-pin"), UserPIN: m.cfg.PIN}
	for _, want := range []string{"created", "existing"} {
		if res, err := pkcs11.Provision(pc); err != nil || res.Outcome != want {
			t.Fatalf("Provision = %+v, %v; want %s", res, err, want)
		}
	}
	return m
}

// placeMachine makes a machine's folder, with the module alone.
func placeMachine(t testing.TB) *machine {
	t.Helper()
	for _, tool := range []string{"cc", "pkg-config"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed; the module cannot be built", tool)
		}
	}
	root, err := os.MkdirTemp("", "yj") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	m := &machine{root: root, module: filepath.Join(root, "p11.so")}
	built, err := hsmtest.SoftModule()
	if err == nil {
		err = os.WriteFile(m.module, built, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.kill() })
	m.cfg = pkcs11.Config{Module: m.module, ModuleArgs: "socket='" + filepath.Join(root, "state", "p11.sock") + "'",
		TokenLabel: "staff", PIN: []byte("user-pin"), Profile: shipped("neutral"), MaxSessions: 8, Log: quiet()}
	return m
}

// daemonProgram is this program; under the race detector, which YINJIAN_LONG=1 goes with, one without it: a login's
// stretching of the PIN takes seconds with it, and the daemon has tests of its own.
var daemonProgram = sync.OnceValues(func() (string, error) {
	if os.Getenv("YINJIAN_LONG") == "" {
		return os.Executable()
	}
	program := filepath.Join(scratch, "daemon")
	if out, err := exec.Command("go", "test", "-c", "-o", program, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return program, nil
})

// scratch is a folder for all tests of a run.
var scratch string

func (m *machine) run(t testing.TB) {
	t.Helper()
	program, err := daemonProgram()
	if err != nil {
		t.Fatal(err)
	}
	m.process = exec.Command(program, "daemon", m.root, m.profile)
	m.process.Stderr = os.Stderr
	out, err := m.process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.process.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("daemon said %q, %v", line, err)
	}
}

func (m *machine) kill() {
	if m.process == nil {
		return
	}
	_ = m.process.Process.Kill()
	_ = m.process.Wait()
}

// signSM2 signs through hsm.Key without its own check, so that gmsm's verdict here counts.
func signSM2(ctx context.Context, key *hsm.Key, text string) error {
	sig, err := key.SignMessage(ctx, []byte(text))
	if err != nil {
		return err
	}
	if !sm2.VerifyASN1WithSM2(key.Public().(*ecdsa.PublicKey), nil, []byte(text), sig) {
		return errors.New("gmsm does not verify the signature")
	}
	return nil
}

func newKey(t *testing.T, tok hsm.Token, label string) *hsm.Key {
	t.Helper()
	key, err := hsm.NewKey(t.Context(), tok, label, false)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestSoftToken: what hsm/hsmtest does not hold against every module: a certificate request by crypto.Signer, and MACs that
// C_Verify of another session judges.
func TestSoftToken(t *testing.T) {
	m := newMachine(t)
	tok := open(t, m.cfg)
	ctx := t.Context()

	for _, a := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048, hsm.HMACSM3} {
		generate(t, tok, string(a), a)
	}
	key := newKey(t, tok, string(hsm.SM2))
	signPSS(t, tok, string(hsm.RSA2048))

	// gmsm makes and checks a certificate request through crypto.Signer.
	der, err := smx509.CreateCertificateRequest(rand.Reader, &smx509.CertificateRequest{Subject: pkix.Name{CommonName: "王医生"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := smx509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := csr.CheckSignature(); err != nil {
		t.Errorf("CSR: %v", err)
	}

	// The token takes no secret key from outside, so the judge of a MAC here is its C_Verify over another session, and
	// that the MAC depends on every byte; softtoken compares the computation with OpenSSL.
	other := p11.New(m.module)
	s, err := other.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_LABEL, string(hsm.HMACSM3))}); err != nil {
		t.Fatal(err)
	}
	found, _, err := other.FindObjects(s, 2)
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	if err := other.FindObjectsFinal(s); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, n := range []int{0, 1, 63, 64, 65, 512 << 10} {
		data := bytes.Repeat([]byte{0xA5}, n)
		mac, err := tok.Do(ctx, string(hsm.HMACSM3), hsm.MACSM3, data)
		if err != nil || len(mac) != 32 {
			t.Errorf("HMAC-SM3 over %d bytes = %x, %v", n, mac, err)
			continue
		}
		if m, ok := seen[string(mac)]; ok {
			t.Errorf("%d and %d bytes have the same MAC", m, n)
		}
		seen[string(mac)] = n
		if err := other.VerifyInit(s, []*p11.Mechanism{p11.NewMechanism(softtoken.CKMNeutralHMACSM3, nil)}, found[0]); err != nil {
			t.Fatal(err)
		}
		if err := other.Verify(s, data, mac); err != nil {
			t.Errorf("C_Verify of the MAC over %d bytes: %v", n, err)
		}
	}
}

// TestSoftTokenLocked: our token counts wrong PINs. One Open spends one try; a token that says it is locked is not
// asked again.
func TestSoftTokenLocked(t *testing.T) {
	m := newMachine(t)
	var logins int
	m.cfg.BeforeLogin = func() { logins++ }
	m.cfg.PIN = []byte("not-the-pin")
	for tries := 1; ; tries++ {
		if tries > 20 {
			t.Fatal("the token does not lock")
		}
		_, err := pkcs11.Open(t.Context(), m.cfg)
		if !errors.Is(err, hsm.ErrNeedsOperator) {
			t.Fatalf("Open = %v, want ErrNeedsOperator", err)
		}
		if strings.Contains(err.Error(), "C_GetTokenInfo: CKR_PIN_LOCKED") {
			if logins != tries-1 {
				t.Errorf("PIN presented %d times in %d Opens before the token said it was locked", logins, tries-1)
			}
			break
		}
	}
	m.cfg.PIN = []byte("user-pin")
	if _, err := pkcs11.Open(t.Context(), m.cfg); !errors.Is(err, hsm.ErrNeedsOperator) {
		t.Errorf("right PIN on a locked token: %v", err)
	}
}

// TestSoftTokenAway: with no daemon, Open fails in the class of a lost connection, with no PIN presented.
func TestSoftTokenAway(t *testing.T) {
	m := newMachine(t)
	m.kill()
	m.cfg.BeforeLogin = func() { t.Error("PIN presented to nobody") }
	if _, err := pkcs11.Open(t.Context(), m.cfg); hsm.ClassifyError(err) != hsm.ClassReconnect {
		t.Errorf("Open = %v", err)
	}
	m.cfg.BeforeLogin = nil
	m.run(t)
	var wg sync.WaitGroup
	tok := open(t, m.cfg)
	for range 8 {
		wg.Go(func() {
			if _, err := tok.Random(t.Context(), 32); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
