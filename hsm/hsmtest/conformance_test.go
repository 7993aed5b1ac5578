package hsmtest_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/pool"
	"yinjian/hsm/worker"
)

// TestMain is three programs: the tests, the software cipher machine, and a slot's worker.
func TestMain(m *testing.M) {
	hsmtest.Daemon()
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		if err := drive(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// drive is a slot's worker, as the appliance has it.
func drive() error {
	conn, err := worker.Inherited()
	if err != nil {
		return err
	}
	return worker.Serve(context.Background(), conn, func(ctx context.Context, p worker.StartParams) (hsm.Token, error) {
		profile, err := pkcs11.ProfileByName(p.Profile)
		if err != nil {
			return nil, err
		}
		return pkcs11.Open(ctx, pkcs11.Config{Module: p.Module, ModuleArgs: p.ModuleArgs, TokenLabel: p.TokenLabel, PIN: p.PIN,
			Profile: profile, MaxSessions: p.MaxSessions, BeforeLogin: p.BeforeLogin, Log: hsmtest.Quiet()})
	})
}

// subject is a token in this process.
func subject(cfg pkcs11.Config) hsmtest.Subject {
	return hsmtest.Subject{
		Label: cfg.TokenLabel, Counts: cfg.Profile.UseCounter != 0,
		Algorithms: slices.Sorted(maps.Keys(cfg.Profile.Keys)), Operations: slices.Sorted(maps.Keys(cfg.Profile.Operations)),
		Open: func(t testing.TB) hsm.Token {
			t.Helper()
			tok, err := pkcs11.Open(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			return tok
		},
	}
}

// byWorker is the same token behind a worker of that class.
func byWorker(cfg pkcs11.Config, class hsm.SlotClass, env []string) hsmtest.Subject {
	s := subject(cfg)
	s.Operations = slices.DeleteFunc(s.Operations, func(op hsm.Operation) bool { return class.Check(op) != nil })
	s.Open = func(t testing.TB) hsm.Token {
		t.Helper()
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		w, err := worker.Start(worker.Config{Command: []string{self, "worker"}, Env: env, Class: class, Log: hsmtest.Quiet(),
			Params: worker.StartParams{Module: cfg.Module, ModuleArgs: cfg.ModuleArgs, TokenLabel: cfg.TokenLabel, PIN: cfg.PIN,
				Profile: cfg.Profile.Name, MaxSessions: cfg.MaxSessions}})
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	return s
}

// twin has pkcs11-tool make the second key, in a process of its own.
func twin(cfg pkcs11.Config, env ...string) func(testing.TB, string) {
	return func(t testing.TB, label string) {
		t.Helper()
		cmd := exec.Command("pkcs11-tool", "--module", cfg.Module, "--token-label", cfg.TokenLabel, "--login", "--pin", string(cfg.PIN),
			"--keypairgen", "--key-type", "rsa:2048", "--label", label)
		cmd.Env = append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("pkcs11-tool: %v\n%s", err, out)
		}
	}
}

// TestSoftToken: our module in this process and behind a worker, where each slot class does its own work alone.
func TestSoftToken(t *testing.T) {
	t.Parallel()
	m := hsmtest.NewMachine(t)
	value := make([]byte, pkcs11.KEKSize)
	rand.Read(value)
	if err := pkcs11.InstallKEK(pkcs11.KEKConfig{Module: m.Module, ModuleArgs: m.Config.ModuleArgs, TokenLabel: m.Config.TokenLabel,
		Profile: m.Config.Profile, Label: "kek", Value: value, SOPIN: []byte(hsmtest.SOPIN), UserPIN: m.Config.PIN}); err != nil {
		t.Fatal(err)
	}
	conform := func(name string, s hsmtest.Subject) {
		t.Run(name, func(t *testing.T) {
			s.KEK, s.Twin = "kek", twin(m.Config, "YINJIAN_P11_SOCKET="+filepath.Join(m.Root, "state", "p11.sock"))
			if !slices.Contains(s.Operations, hsm.SignRSASHA256) {
				s.Twin = nil
			}
			hsmtest.Conform(t, s)
		})
	}
	conform("in process", subject(m.Config))
	for _, class := range []hsm.SlotClass{hsm.Staff, hsm.Log} {
		conform("worker, "+string(class), byWorker(m.Config, class, nil))
	}
}

// A pooled is a pool with its workers, as the appliance has them.
type pooled struct {
	*pool.Pool
	workers []*worker.Client
}

func (p pooled) Close() error {
	err := p.Pool.Close()
	for _, w := range p.workers {
		err = errors.Join(err, w.Close())
	}
	return err
}

// TestPool: two machines behind a pool are one token.
func TestPool(t *testing.T) {
	t.Parallel()
	one, two := hsmtest.NewMachine(t), hsmtest.NewMachine(t)
	s := byWorker(one.Config, hsm.Staff, nil)
	s.Lent = true
	s.Open = func(t testing.TB) hsm.Token {
		t.Helper()
		p := pooled{Pool: pool.New(pool.Config{Class: hsm.Staff, Now: func() time.Time { return time.Time{} }, Log: hsmtest.Quiet()})}
		for i, m := range []*hsmtest.Machine{one, two} {
			w := byWorker(m.Config, hsm.Staff, nil).Open(t).(*worker.Client)
			p.workers = append(p.workers, w)
			if err := p.Add(t.Context(), pool.Machine{Name: fmt.Sprint("machine ", i), Token: w, Weight: 1, Sessions: m.Config.MaxSessions}); err != nil {
				t.Fatal(err)
			}
		}
		return p
	}
	hsmtest.Conform(t, s)
}

// TestImpersonated: the software cipher machine answers to each shipped profile in turn, and to one with few sessions and
// functions that are not there.
func TestImpersonated(t *testing.T) {
	t.Parallel()
	m := hsmtest.NewMachine(t)
	for _, name := range profiles.Names() {
		if name == "softhsm2" || name == "neutral" { // its match asks for the real one; it is the machine's own
			continue
		}
		t.Run(name, func(t *testing.T) {
			m.As(t, name)
			hsmtest.Conform(t, subject(m.Config))
		})
	}
	t.Run("few", func(t *testing.T) {
		text, err := os.ReadFile("../pkcs11/profiles/tass.toml")
		if err != nil {
			t.Fatal(err)
		}
		few := strings.NewReplacer(`name = "tass"`, `name = "few"`, "[keys.sm2]",
			"[machine]\nmax_sessions = 3\nread_write = true\nlogin_user = 0x80000007\nuse_counter = 0x80000077\n"+
				"avoid = [\"C_GenerateRandom\", \"C_GetSessionInfo\", \"C_GetMechanismList\"]\n\n[keys.sm2]").Replace(string(text))
		file := filepath.Join(t.TempDir(), "few.toml")
		if err := os.WriteFile(file, []byte(few), 0o600); err != nil {
			t.Fatal(err)
		}
		m.As(t, file)
		s := subject(m.Config)
		s.NoRandom = true
		hsmtest.Conform(t, s)
	})
}

// TestSoftHSM2: the real thing, in this process and behind a worker.
func TestSoftHSM2(t *testing.T) {
	s := hsmtest.NewSoftHSM2(t, "conforms")
	cfg := pkcs11.Config{Module: hsmtest.SoftHSMModule, TokenLabel: s.Label, PIN: []byte(s.PIN), Profile: hsmtest.Profile(t, "softhsm2"),
		MaxSessions: 8, Log: hsmtest.Quiet()}
	for _, e := range s.Env {
		if conf, ok := strings.CutPrefix(e, "SOFTHSM2_CONF="); ok {
			t.Setenv("SOFTHSM2_CONF", conf) // read once, at the first C_Initialize
		}
	}
	for name, subject := range map[string]hsmtest.Subject{"in process": subject(cfg), "worker": byWorker(cfg, hsm.TLS, s.Env)} {
		t.Run(name, func(t *testing.T) {
			subject.Twin, subject.Fragile = twin(cfg, s.Env...), true
			hsmtest.Conform(t, subject)
		})
	}
}

// TestOpenCryptoki: the software token of openCryptoki.
func TestOpenCryptoki(t *testing.T) {
	label, pin, inside := hsmtest.OpenCryptoki(t)
	if !inside {
		return
	}
	cfg := pkcs11.Config{Module: hsmtest.OpenCryptokiModule, TokenLabel: label, PIN: []byte(pin), Profile: hsmtest.Profile(t, "opencryptoki"),
		MaxSessions: 8, Log: hsmtest.Quiet()}
	t.Run("conforms", func(t *testing.T) {
		s := subject(cfg)
		s.Twin, s.Fragile = twin(cfg), true
		hsmtest.Conform(t, s)
	})

	// A profile that does not fit is refused before the PIN is presented.
	cfg.Profile = hsmtest.Profile(t, "neutral")
	cfg.BeforeLogin = func() { t.Error("PIN presented") }
	if _, err := pkcs11.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "operations.hmac-sm3: 密码机没有机制 0xfffff009") {
		t.Errorf("the neutral profile: %v", err)
	}
}
