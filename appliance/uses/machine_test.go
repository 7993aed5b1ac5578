package uses_test

import (
	"os"
	"path/filepath"
	"testing"

	"yinjian/hsm"
	"yinjian/hsm/uselog"
)

// A machine that is added while the appliance runs has a log of its own, which is found and held against the journal
// like the others; the signatures that prove its health are counted and need no entry; its log is missed when it is gone.
func TestMachineAdded(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.record(1)
	r := b.reconciler(atOnce)
	b.pass(r, false)
	log, err := uselog.Open(b.dir, "staff.b", b.life)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	add := func(label string, n byte) []byte {
		t.Helper()
		sig := []byte{1, n}
		if err := log.Add(label, hsm.SignRSASHA256, make([]byte, 32), sig); err != nil {
			t.Fatal(err)
		}
		return sig
	}
	b.append(entry(add("staff/D2", 1)))
	add(hsm.HealthPrefix+"probe", 2)
	if err := r.Follow(t.Context()); err != nil { // it sees the machine before its entries
		t.Fatal(err)
	}
	s := b.pass(r, false)
	if c := s.Slots["staff.b"]; c.Uses != 2 || c.Entries != 1 || c.Health != 1 || s.Open != 0 || s.Alarms != 0 {
		t.Errorf("summary %+v", s)
	}
	add(hsm.HealthPrefix+"probe", 3)
	before := b.journal.Size()
	if b.pass(r, false); b.journal.Size() != before {
		t.Error("a proof of health alone made an entry")
	}
	add("staff/D2", 4)
	if s := b.pass(r, false); s.Alarms != 1 || s.Slots["staff.b"].Unaccounted != 1 {
		t.Errorf("a signature without an entry: %+v", s)
	}
	if v := b.verify(); !v.OK() || len(v.Named) != 1 || v.Named[0].Slot != "staff.b" {
		t.Errorf("verify: %+v", v)
	}
	b.pass(r, true)
	log.Close()
	files, _ := filepath.Glob(filepath.Join(b.dir, "staff.b-*")) // the pattern is well-formed
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	if v := b.verify(); v.OK() || v.Broken[0].Slot != "staff.b" {
		t.Errorf("without its log: %+v", v.Broken)
	}
}
