package main_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/uses"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
	"yinjian/hsm/worker"
)

// usesReport is what audit verify says of the keys' uses, and its exit.
func usesReport(t *testing.T, dir string) (*uses.Report, int) {
	t.Helper()
	o := yinjian(t, "audit", "verify", "--dir", dir, "-o", "json")
	var r struct{ Uses *uses.Report }
	if err := json.Unmarshal([]byte(o.stdout), &r); err != nil || r.Uses == nil {
		t.Fatalf("audit verify: %v: %v", err, o)
	}
	return r.Uses, o.code
}

// balanced wants each key's signatures to be the sum of what accounts for them.
func balanced(t *testing.T, r *uses.Report) {
	t.Helper()
	for _, k := range r.Keys {
		if k.Uses != k.Before+k.Entries+k.Checkpoints+k.Discarded+k.Unaccounted+k.Open {
			t.Errorf("key %s: the counts do not add up: %+v", k.Key, k.Count)
		}
	}
}

// stolen signs with the slot's PIN and our own worker program, behind the appliance's back, and as one of staff keys, which
// sign what they are given. folder takes the log of uses;
// life is what the worker says it belongs to.
func stolen(t *testing.T, dir, folder string, class hsm.SlotClass, life [32]byte, times int) (label string) {
	t.Helper()
	defer startSofttoken(t, dir)()
	cfg, err := appliance.LoadConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	slot := cfg.HSM.Slots[string(class)]
	pin, err := appliance.ReadSecret(slot.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(t.Output())
	c, err := worker.Start(worker.Config{
		Command: []string{built.binary, "worker"}, Class: hsm.Staff, Log: log,
		Params: worker.StartParams{
			Module: cfg.HSM.Module, ModuleArgs: "socket='" + appliance.SofttokenSocket(dir) + "'", TokenLabel: slot.TokenLabel,
			PIN: pin, Profile: cfg.HSM.Profile, MaxSessions: 1, Uses: worker.UseLog{Dir: folder, Slot: string(class), Life: life},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	keys, err := c.Keys(t.Context())
	i := slices.IndexFunc(keys, func(k hsm.KeyInfo) bool { return k.Algorithm == hsm.SM2 })
	if err != nil || i < 0 {
		t.Fatalf("keys: %v, %v", keys, err)
	}
	for range times {
		if _, err := c.Do(t.Context(), keys[i].Label, hsm.SignSM2E, make([]byte, 32)); err != nil {
			t.Fatal(err)
		}
	}
	return keys[i].Label
}

// startSofttoken runs the software cipher machine alone; the answer stops it.
func startSofttoken(t *testing.T, dir string) (stop func()) {
	t.Helper()
	soft := exec.Command(built.binary, "softtoken", "--dir", dir)
	soft.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := soft.Start(); err != nil {
		t.Fatal(err)
	}
	if err := appliance.WaitForSocket(t.Context(), appliance.SofttokenSocket(dir), patience); err != nil {
		t.Fatal(err)
	}
	return func() {
		_ = soft.Process.Signal(syscall.SIGTERM)
		_ = soft.Wait()
	}
}

// toolSigns has pkcs11-tool sign with the signer's RSA key, times times, and answers the key's label.
func toolSigns(t *testing.T, dir string, r *uses.Report, times int) (label string) {
	t.Helper()
	defer startSofttoken(t, dir)()
	i := slices.IndexFunc(r.Keys, func(k uses.KeyCount) bool { return k.Slot == "staff" && strings.HasSuffix(k.Key, "RSA-2048") })
	cfg, err := appliance.LoadConfig(dir)
	if err != nil || i < 0 {
		t.Fatal(err, r.Keys)
	}
	slot := cfg.HSM.Slots["staff"]
	pin, err := appliance.ReadSecret(slot.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	document := filepath.Join(tempDir(t), "m")
	if err := os.WriteFile(document, []byte("借条"), 0o600); err != nil {
		t.Fatal(err)
	}
	tool := func(args ...string) string {
		o := command(t, []string{"YINJIAN_P11_SOCKET=" + appliance.SofttokenSocket(dir)}, append([]string{"pkcs11-tool", "--module", cfg.HSM.Module,
			"--token-label", slot.TokenLabel, "--login", "--pin", string(pin)}, args...)...)
		if o.code != 0 {
			t.Fatalf("pkcs11-tool: %v", o)
		}
		return o.stdout
	}
	// It chooses the key to sign with by the identifier alone.
	id := regexp.MustCompile(`label: +` + regexp.QuoteMeta(r.Keys[i].Key) + `\s+ID: +([0-9a-f]+)`).FindStringSubmatch(tool("-O", "--type", "privkey"))
	if id == nil {
		t.Fatal("pkcs11-tool does not list " + r.Keys[i].Key)
	}
	for range times {
		tool("--sign", "-m", "SHA256-RSA-PKCS", "--id", id[1], "-i", document, "-o", document+".sig")
	}
	return r.Keys[i].Key
}

// lastLife is the life that the journal's last start announced.
func lastLife(t *testing.T, dir string) (life [32]byte) {
	t.Helper()
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	size, _, err := store.Head(t.Context())
	if err == nil {
		err = audit.Scan(t.Context(), store, 0, size, func(r audit.Record) error {
			if v, ok := r.Entry.Field(uses.FieldLife).(audit.Octets); ok {
				copy(life[:], v)
			}
			return nil
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return life
}

// stampedTo is how many entries are under the last checkpoint, if it has its token.
func stampedTo(t *testing.T, dir string) uint64 {
	t.Helper()
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	c, err := store.LastCheckpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if c.Token == nil {
		return 0
	}
	return c.Size
}

// warned says whether the state warns of uses.
func (m *machine) warned(t *testing.T) bool {
	return slices.ContainsFunc(m.state(t).Warnings, func(w string) bool { return strings.Contains(w, "密钥使用告警") })
}

// Every signature of an ordinary life is accounted for; one that a holder of the PIN had made with the worker's program
// is named: before the next start by audit verify, from then on by the journal.
func TestStolenSignature(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	m := serve(t, dir)
	m.trusted(t)
	app := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "")
	for i := range 4 {
		q := asserted("D1", fmt.Sprint("k", i))
		q.Algorithm = []string{"SM2", "RSA-2048"}[i%2]
		if i > 1 {
			q.Form = "cms"
		}
		if _, err := app.Sign(t.Context(), q.Document.ID, q); err != nil {
			t.Fatal(err)
		}
	}
	mustRun(t, "crl", "publish", "--dir", dir)
	if r, code := usesReport(t, dir); code != 0 || !r.OK() || len(r.Named) != 0 || len(r.Keys) < 6 {
		t.Errorf("beside the running appliance: exit %d, %+v", code, r)
	} else {
		balanced(t, r)
	}

	// A cipher machine that signs and a timestamp unit that does not answer: the signature is thrown away, and said so.
	// A checkpoint's token that is under way then takes the worker with it, and the signature gets its token from the next
	// one: once more.
	for n := 1; ; n++ {
		eventually(t, 20*time.Second, "the last checkpoint is stamped", func() bool {
			s := m.state(t)
			return s.HSM["tsa"].Phase == "ready" && stampedTo(t, dir) == s.Journal.Entries
		})
		if err := syscall.Kill(m.state(t).HSM["tsa"].PID, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		record := fmt.Sprint("unstamped-", n)
		if _, err := app.Sign(t.Context(), record, asserted("D1", record)); err != nil {
			break
		}
		if n == 5 {
			t.Fatal("signed each time")
		}
	}
	eventually(t, 20*time.Second, "the unstamped signature is noted as thrown away", func() bool {
		r, _ := usesReport(t, dir)
		return slices.ContainsFunc(r.Keys, func(k uses.KeyCount) bool { return k.Slot == "staff" && k.Discarded == 1 })
	})
	m.stop(t)
	r, code := usesReport(t, dir)
	if code != 0 || !r.OK() || len(r.Named) != 0 { // the worker that was stopped had signed nothing
		t.Fatalf("after a stop: exit %d, %+v", code, r)
	}
	balanced(t, r)

	// The same folder, another life.
	key := stolen(t, dir, appliance.UsesDir(dir), hsm.Staff, [32]byte{1}, 2)
	r, code = usesReport(t, dir)
	if code != 1 || len(r.Open) != 2 || r.Open[0].Key != key || r.Open[0].Reason != uses.Foreign {
		t.Errorf("after the theft: exit %d, open %+v", code, r.Open)
	}
	m = serve(t, dir)
	if !m.warned(t) {
		t.Error("the state does not warn")
	}
	m.raises(t, alarm.UnaccountedUse)
	if b, _ := os.ReadFile(m.log); !strings.Contains(string(b), "ALARM") {
		t.Error("the log has no alarm")
	}
	m.stop(t)
	r, _ = usesReport(t, dir)
	if !r.OK() || len(r.Named) != 2 || r.Named[0].Key != key || r.Named[0].Reason != uses.Foreign || r.Named[0].Sequence == 0 {
		t.Errorf("after the next start: %+v", r.Named)
	}
	balanced(t, r)

	// In the name of the start that has just ended: its life stands in the journal, for anybody to read. And past the
	// worker, by a program of the thief's own, and by ours with a log elsewhere: the machine's own count tells how often.
	need(t, "pkcs11-tool")
	life := lastLife(t, dir)
	stolen(t, dir, appliance.UsesDir(dir), hsm.TSA, life, 1)
	tool := toolSigns(t, dir, r, 3)
	other := stolen(t, dir, tempDir(t), hsm.CA, life, 2)
	m = serve(t, dir)
	m.stop(t)
	r, _ = usesReport(t, dir)
	if len(r.Named) != 3 || r.Named[2].Slot != "tsa" || r.Named[2].Reason != uses.Stopped {
		t.Errorf("signed in the name of a start that had ended: %+v", r.Named)
	}
	more := map[string]int64{}
	for _, d := range r.Apart {
		if d.Reason == uses.Ended && strings.HasPrefix(d.Key, "tsa/") {
			continue // the machine may have signed for the worker that was stopped
		}
		more[d.Key] = d.More
		if d.Reason != uses.Past {
			t.Errorf("%+v", d)
		}
	}
	if len(more) != 2 || more[tool] != 3 || more[other] != 2 {
		t.Errorf("signed past the worker: %+v", r.Apart)
	}
	balanced(t, r)
	if o := yinjian(t, "audit", "verify", "--dir", dir); !strings.Contains(o.stdout, "多 3 次") || !strings.Contains(o.stdout, tool) {
		t.Errorf("audit verify: %v", o)
	}

	// A log of uses that was put back, cut, changed or removed is named; what is told of it stays told.
	names, err := filepath.Glob(filepath.Join(dir, "uses", "staff-*.uses"))
	if err != nil || len(names) != 1 {
		t.Fatalf("%v, %v", names, err)
	}
	had, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	damages := 0
	type change struct {
		what string
		f    func() error
	}
	changes := []change{
		{"cut", func() error { return os.WriteFile(names[0], had[:len(had)/2], 0o600) }},
		{"edited", func() error {
			b, err := os.ReadFile(names[0])
			if err == nil {
				b[len(b)/3]++
				err = os.WriteFile(names[0], b, 0o600)
			}
			return err
		}},
		{"removed", func() error { return os.RemoveAll(filepath.Join(dir, "uses")) }},
	}
	if os.Getenv("YINJIAN_LONG") == "" {
		changes = changes[1:2]
	}
	for _, change := range changes {
		if err := change.f(); err != nil {
			t.Fatal(err)
		}
		if r, code := usesReport(t, dir); code != 1 || len(r.Broken) == 0 {
			t.Errorf("%s: exit %d, broken %+v", change.what, code, r.Broken)
		}
		m = serve(t, dir)
		if !m.warned(t) {
			t.Errorf("%s: the state does not warn", change.what)
		}
		m.stop(t)
		r, code := usesReport(t, dir)
		if code != 0 || len(r.Damages) <= damages {
			t.Errorf("%s: after the next start: exit %d, open %+v, broken %+v, damages %+v", change.what, code, r.Open, r.Broken, r.Damages)
		}
		damages = len(r.Damages)
	}
	if o := yinjian(t, "audit", "verify", "--dir", dir); !strings.Contains(o.stdout, "未发现改动") || !strings.Contains(o.stdout, "均已在日志中指名") || o.code != 0 {
		t.Errorf("audit verify: %v", o)
	}
}

// What a kill leaves between signature and record is named at the next start, and nothing else is.
func TestUsesAfterKill(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	m := serve(t, dir)
	m.trusted(t)
	app := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "", "--algorithms", "SM2")
	rounds := 1
	if os.Getenv("YINJIAN_LONG") != "" {
		rounds = 10
	}
	for round := range rounds {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					q := asserted("D1", fmt.Sprintf("k%d-%d-%d", round, w, i))
					if _, err := app.Sign(ctx, q.Document.ID, q); err != nil {
						time.Sleep(20 * time.Millisecond) // after a start, requests of its first second are taken for old ones
					}
				}
			})
		}
		had := m.state(t).Journal.Entries
		eventually(t, time.Minute, "there is a load", func() bool { return m.state(t).Journal.Entries > had+100 })
		m.kill(t)
		cancel()
		wg.Wait()
		m = serve(t, dir)
		m.trusted(t)
		r, code := usesReport(t, dir)
		if !r.OK() || len(r.Broken)+len(r.Damages) != 0 {
			t.Errorf("round %d: exit %d, %+v", round, code, r)
		}
		for _, n := range r.Named {
			if n.Reason != uses.Ended {
				t.Errorf("round %d: %+v", round, n)
			}
		}
		for _, d := range r.Apart {
			if d.Reason != uses.Ended {
				t.Errorf("round %d: %+v", round, d)
			}
		}
		balanced(t, r)
		if m.warned(t) {
			t.Errorf("round %d: a kill is taken for an attack", round)
		}
		app = m.client(t, "his")
	}
	m.stop(t)
}
