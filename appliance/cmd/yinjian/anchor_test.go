package main_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestTimeAnchor restarts an appliance whose time source is silent: with its own anchor of the same boot it signs at
// once, in Holdover with a bound that has grown; with any other it is cold, says so, and refuses.
func TestTimeAnchor(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir, other := initAppliance(t, server), initAppliance(t, server)
	anchor := filepath.Join(dir, "run", "time.json")
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	if _, err := his.Sign(t.Context(), "trusted", asserted("D1", "trusted")); err != nil {
		t.Fatal(err)
	}
	// It is there soon, not only after an orderly stop.
	eventually(t, 30*time.Second, "an anchor", func() bool { _, err := os.Stat(anchor); return err == nil })
	m.kill(t)
	var saved struct {
		Snapshot struct {
			Bound time.Duration `json:"bound_ns"`
		} `json:"snapshot"`
	}
	if b, err := os.ReadFile(anchor); err != nil {
		t.Fatal(err)
	} else if err := json.Unmarshal(b, &saved); err != nil || saved.Snapshot.Bound <= 0 {
		t.Fatalf("%v: %s", err, b)
	}
	n := serve(t, other)
	n.trusted(t)
	n.stop(t)
	server.silent.Store(true)

	// 1. The same boot. After a second the bound has grown by 50 ppm of it.
	started := time.Now()
	m = serve(t, dir)
	if s := m.state(t).Time.State; s != "holdover" {
		t.Errorf("time is %s, want holdover", s)
	}
	var after int64
	eventually(t, 30*time.Second, "a signature in holdover", func() bool { // a request's time must lie after the last run's
		r, err := m.client(t, "his").Sign(t.Context(), "holdover", asserted("D1", "holdover"))
		if err == nil {
			after = r.AccuracyUS
		}
		return err == nil
	})
	if after <= saved.Snapshot.Bound.Microseconds() {
		t.Errorf("accuracy %d µs in holdover, of an anchor known to %v", after, saved.Snapshot.Bound)
	}
	t.Logf("signed %v after the start; an anchor known to %v, accuracy %d µs", time.Since(started), saved.Snapshot.Bound, after)
	m.stop(t)
	good, err := os.ReadFile(anchor)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(filepath.Join(other, "run", "time.json"))
	if err != nil {
		t.Fatal(err)
	}

	// 2. What is not its own, whole anchor. Each would be signed by if it were believed.
	edited := func(change func(s map[string]any)) []byte {
		var file struct {
			Snapshot map[string]any `json:"snapshot"`
			MAC      []byte         `json:"mac"`
		}
		if err := json.Unmarshal(good, &file); err != nil || file.Snapshot["utc"] == nil {
			t.Fatalf("%v: %s", err, good)
		}
		change(file.Snapshot)
		b, err := json.Marshal(file)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var bare struct{ Snapshot json.RawMessage }
	if err := json.Unmarshal(good, &bare); err != nil {
		t.Fatal(err)
	}
	cold := func(what string, launch func() *machine) {
		t.Helper()
		m := launch()
		if s := m.state(t).Time.State; s == "holdover" || s == "trusted" {
			t.Errorf("%s: time is %s", what, s)
		}
		if w := m.state(t).Time.Workers; what == "other-boot" && (len(w) != 1 || w[0].State != "cold") { // in the same boot it has an anchor of its own
			t.Errorf("%s: the timestamp worker's time is %+v", what, w)
		}
		_, err := m.client(t, "his").Sign(t.Context(), what, asserted("D1", what))
		wantCode(t, err, "time_untrusted")
		if b, err := os.ReadFile(m.log); err != nil || !bytes.Contains(b, []byte("time starts cold")) {
			t.Errorf("%s: the log does not say that time starts cold", what)
		}
		m.stop(t)
	}
	bad := map[string][]byte{
		"truncated": good[:len(good)/2], "other-machine": foreign,
		"hour-later": edited(func(s map[string]any) { s["utc"] = time.Now().Add(time.Hour).UTC().Format(time.RFC3339Nano) }),
	}
	if os.Getenv("YINJIAN_LONG") != "" {
		bad["empty"], bad["garbage"], bad["without-MAC"] = nil, []byte("garbage"), bare.Snapshot
	}
	for what, b := range bad {
		if err := os.WriteFile(anchor, b, 0o600); err != nil {
			t.Fatal(err)
		}
		cold(what, func() *machine { return serve(t, dir) })
	}

	// 3. Its own, after the machine was booted again.
	if err := os.WriteFile(anchor, good, 0o600); err != nil {
		t.Fatal(err)
	}
	boot := filepath.Join(tempDir(t), "boot_id")
	if err := os.WriteFile(boot, []byte("01234567-89ab-4cde-8f01-23456789abcd\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(filepath.Dir(boot), "serve")
	text := "#!/bin/sh\nexec unshare -m sh -c 'mount --bind " + boot + " /proc/sys/kernel/random/boot_id && exec " + built.binary + " \"$@\"' serve \"$@\"\n"
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("unshare", "-m", "mount", "--bind", boot, "/proc/sys/kernel/random/boot_id").CombinedOutput(); err != nil {
		t.Logf("not tried: another boot (unshare, mount): %v %s", err, strings.TrimSpace(string(out)))
	} else {
		cold("other-boot", func() *machine {
			m := launchBinary(t, script, dir)
			m.await(t)
			return m
		})
	}

	// 4. When a source answers again, all is well.
	server.silent.Store(false)
	m = serve(t, dir)
	m.trusted(t)
	m.mustBeClean(t)
	m.stop(t)
}
