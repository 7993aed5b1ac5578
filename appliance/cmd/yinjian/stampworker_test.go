package main_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"yinjian/appliance"
	"yinjian/hsm/uselog"
)

// usesOf counts a slot's signatures.
func usesOf(t *testing.T, dir, slot string) (n int) {
	t.Helper()
	r, err := uselog.OpenReader(appliance.UsesDir(dir), slot, nil)
	if err == nil {
		err = r.Next(func(rec uselog.Record) error {
			if rec.Kind == uselog.Use {
				n++
			}
			return nil
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestTimestampWorker kills the process that stamps, its time source silent. From its own anchor it goes on in Holdover, and
// signatures go on; with any other it is cold, and signatures that need a stamp are refused before anything is signed, though
// the appliance's own time is as good as before.
func TestTimestampWorker(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir, other := initAppliance(t, server), initAppliance(t, server)
	n := serve(t, other)
	n.trusted(t)
	n.stop(t)
	foreign, err := os.ReadFile(filepath.Join(other, "run", "time-tsa-main.json"))
	if err != nil {
		t.Fatal(err)
	}
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	anchor := filepath.Join(dir, "run", "time-tsa-main.json")
	eventually(t, readyWithin, "the worker's anchor", func() bool { _, err := os.Stat(anchor); return err == nil })
	good, err := os.ReadFile(anchor)
	if err != nil {
		t.Fatal(err)
	}
	server.silent.Store(true)

	// killed replaces the worker, and waits until the next one, which finds this anchor, is in that state; one that is to be
	// cold says that it has refused it.
	killed := func(what string, file []byte, want string) {
		t.Helper()
		refusals := func() int {
			b, err := os.ReadFile(m.log)
			if err != nil {
				t.Fatal(err)
			}
			return bytes.Count(b, []byte("time starts cold"))
		}
		already := refusals()
		before := m.state(t).HSM["tsa"]
		p, _, ok := readProcess(before.PID)
		if !ok {
			t.Fatalf("no process %d", before.PID)
		}
		p.signal(t, syscall.SIGSTOP) // it must not write its own over this one
		if err := os.WriteFile(anchor, file, 0o600); err != nil {
			t.Fatal(err)
		}
		p.signal(t, syscall.SIGKILL)
		eventually(t, workerReturns, what+": another timestamp worker's clock is "+want, func() bool {
			s := m.state(t)
			return s.HSM["tsa"].PID != before.PID && s.HSM["tsa"].Phase == "ready" && len(s.Time.Workers) == 1 && s.Time.Workers[0].State == want &&
				(want != "cold" || refusals() > already)
		})
	}
	killed("its own", good, "holdover")
	if _, err := his.Sign(t.Context(), "holdover", asserted("D1", "holdover")); err != nil {
		t.Errorf("in holdover: %v", err)
	}
	signed := usesOf(t, dir, "staff")
	for what, file := range map[string][]byte{
		"foreign": foreign, "forged": bytes.Replace(good, []byte(`"utc":"20`), []byte(`"utc":"19`), 1), "garbage": []byte("{}"),
		"earlier-boot": bytes.Replace(good, []byte(`"boot_id":"`), []byte(`"boot_id":"0`), 1),
	} {
		if bytes.Equal(file, good) {
			t.Fatalf("%s: the test changes nothing", what)
		}
		killed(what, file, "cold")
		_, err := his.Sign(t.Context(), what, asserted("D1", what))
		wantCode(t, err, "time_untrusted")
		if s := m.state(t); s.Ready || !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, "时间戳进程") }) {
			t.Errorf("%s: ready %v, warnings %q", what, s.Ready, s.Warnings)
		}
	}
	if n := usesOf(t, dir, "staff"); n != signed {
		t.Errorf("%d signatures were made that could not be stamped", n-signed)
	}
	server.silent.Store(false)
	m.trusted(t)
	if _, err := his.Sign(t.Context(), "again", asserted("D1", "again")); err != nil {
		t.Error(err)
	}
	m.mustBeClean(t)
	m.stop(t)
	audited(t, dir)
}
