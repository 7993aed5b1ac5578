package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/appliance"
)

// One of two campuses has a drill, of which the other hears nothing, is lost, and is restored: the other takes nothing of it
// until both are paired anew, and is no worse for it; then each has the other's directory again.
func TestRestoreOfACampus(t *testing.T) {
	longOnly(t)
	t.Parallel()
	l, a, b := twoCampuses(t)
	shares := a.custodians(t, "2026 年")
	his := a.client(t, "his")
	signs := func(name string, n int) {
		t.Helper()
		for i := range n {
			key := fmt.Sprintf("%s-%d", name, i)
			if _, err := his.Sign(t.Context(), key, asserted("A1001", key)); err != nil {
				t.Fatal(err)
			}
		}
	}
	signs("kept", 3)
	file := a.backup(t)
	mustRun(t, opens(shares, 2, two("drill", "restore", "--dir", a.place, "--scratch", tempDir(t), file)...)...)
	if p := b.peer(t); !p.Up || p.Split != "" {
		t.Errorf("after the drill the other campus says %+v", p)
	}
	signs("lost", 4)
	size := a.state(t).Journal.Entries
	eventually(t, time.Minute, "B has seen what was signed", func() bool { return b.peer(t).Given >= size })
	eventually(t, time.Minute, "everything is shipped", func() bool { return a.state(t).Projection.Lag == 0 })
	a.stop(t)

	other := filepath.Join(tempDir(t), "other")
	mustRun(t, opens(shares, 2, two("restore", "--dir", other, file, "--log-key", filepath.Join(a.place, "log.pem"))...)...)
	handSecrets(t, a.place, other)
	var mark appliance.Restored
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(other, "restored"))), &mark); err != nil {
		t.Fatal(err)
	}
	mark.Begun = "2026-01-01T00:00:00Z" // long enough ago for requests
	if err := appliance.WriteRestored(other, mark); err != nil {
		t.Fatal(err)
	}
	r := launchBinary(t, l.inside(t, a.i, built.binary), other)
	r.await(t)
	r.trusted(t)
	var lost struct{ Summary struct{ Signatures int } }
	eventually(t, readyWithin, "what was lost is named", func() bool {
		o := yinjian(t, "backup", "missing", "--dir", other, "-o", "json")
		return o.code == 0 && json.Unmarshal([]byte(o.stdout), &lost) == nil
	})
	if lost.Summary.Signatures != 4 {
		t.Errorf("%d signatures are named as lost, want 4", lost.Summary.Signatures)
	}
	eventually(t, time.Minute, "the other campus says that it has to be paired anew", func() bool { return strings.Contains(b.peer(t).Error, "paired anew") })
	if p := b.peer(t); p.Split != "" {
		t.Errorf("a restore that was announced is called two histories: %s", p.Split)
	}
	if s := b.state(t); !s.Ready {
		t.Errorf("the other campus does not sign: %v", s.Warnings)
	}
	pairUp(t, r, b.machine)
	his = r.client(t, "his")
	signs("after", 2)
	r.enrol(t, "A1003", "")
	emr := b.client(t, "emr")
	eventually(t, time.Minute, "B knows who was enrolled since", func() bool {
		_, err := emr.Sign(t.Context(), "new", asserted("A1003", "new"))
		return err == nil || !strings.Contains(err.Error(), "signer_unknown")
	})
	if _, err := os.Stat(filepath.Join(other, "restored")); err == nil {
		t.Error("the mark of the restore is still there")
	}
}
