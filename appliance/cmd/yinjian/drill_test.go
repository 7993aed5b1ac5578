package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance"
)

// TestDrill is the drill of a disaster beside the appliance that it stands for, which goes on as if there were none.
func TestDrill(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	c := m.register(t, "his", "--consent", "app-asserted")
	shares := m.custodians(t, "2026 年")
	for i := range 5 {
		key := fmt.Sprintf("record-%d", i)
		if _, err := c.Sign(t.Context(), key, asserted("D1", key)); err != nil {
			t.Fatal(err)
		}
	}
	file := m.backup(t)
	before := m.state(t)
	scratch := tempDir(t)
	args := func(n int, file string) []string {
		return opens(shares, n, two("drill", "restore", "--dir", dir, "--scratch", scratch, "-o", "json", file)...)
	}
	o := mustRun(t, args(2, file)...)
	var report struct {
		RestoredMS int64  `json:"restored_ms"`
		SignedMS   int64  `json:"signed_ms"`
		NewVerdict string `json:"new_verdict"`
		OldVerdict string `json:"old_verdict"`
		OldSame    bool   `json:"old_same"`
		Proved     bool
		Epoch      string
		NewRecord  string `json:"new_record"`
	}
	if err := json.Unmarshal([]byte(o.stdout), &report); err != nil || report.NewVerdict != "valid" || !report.OldSame || !report.Proved || report.RestoredMS <= 0 || report.SignedMS <= report.RestoredMS {
		t.Errorf("%+v, %v", report, err)
	}
	if left, _ := os.ReadDir(scratch); len(left) > 0 {
		t.Errorf("the drill left %v", left)
	}
	receipt := glob(t, filepath.Join(dir, "reports", "drill-restore-*.receipt.json"))[0]
	page := strings.TrimSuffix(receipt, ".receipt.json")
	mustRun(t, "report", "verify", "--log-key", filepath.Join(dir, "log.pem"), "--receipt", receipt, page+".json", page+".html")
	m.changeOf(t, "/admin/v1/reports", "report.filed", "drill/restore", "", `"outcome":"passed"`)
	// What cannot be opened is a drill that failed, and filed as such.
	refused(t, 1, []string{"只有 1 份"}, args(1, file)...)
	refused(t, 1, []string{"备份文件已损坏"}, args(2, damaged(t, file))...)
	// Of a backup without the cipher machine's keys nothing is started.
	bare := filepath.Join(tempDir(t), "bare.yjb")
	mustRun(t, two("backup", "create", "--dir", dir, "--to", bare)...)
	refused(t, 1, []string{"--softtoken"}, args(2, bare)...)
	if left, _ := os.ReadDir(scratch); len(left) > 0 {
		t.Errorf("drills that failed left %v", left)
	}

	// The production journal has the reports and nothing else of it; no record of the drill is in it or its projection.
	after := m.state(t)
	if after.State != "operational" || after.HSM["staff"].Restarts != before.HSM["staff"].Restarts {
		t.Errorf("the appliance was disturbed: %+v", after)
	}
	m.mustBeClean(t)
	kinds := map[string]int{}
	m.stop(t)
	for _, e := range entries(t, dir, "backup.drill", "sign.v1", "journal.epoch", "appliance.started", "backup.restored") {
		kinds[e.Kind]++
		if e.Kind == "backup.drill" {
			if v := e.Field("passed"); v == nil {
				t.Error("a report without its result")
			}
		}
		if e.Epoch.String() == report.Epoch {
			t.Error("an entry of the drill's epoch")
		}
	}
	if kinds["backup.drill"] != 4 || kinds["sign.v1"] != 5 || kinds["journal.epoch"] != 1 || kinds["appliance.started"] != 1 || kinds["backup.restored"] != 0 {
		t.Errorf("entries by kind: %v", kinds)
	}
	if a, err := appliance.LoadConfig(dir); err != nil || a.Preserve.Off {
		t.Errorf("the configuration was changed: %v", err)
	}
	if o := command(t, nil, "grep", "-rlF", report.NewRecord, dir); strings.TrimSpace(o.stdout) != "" && !strings.Contains(o.stdout, "journal") {
		t.Errorf("the drill's record is in %s", o.stdout)
	}
}

// damaged is a copy of a file with one bit changed in the middle, and its receipt.
func damaged(t *testing.T, file string) string {
	t.Helper()
	b := []byte(readFile(t, file))
	b[len(b)/2] ^= 1
	name := filepath.Join(tempDir(t), "damaged.yjb")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name+".receipt.json", []byte(readFile(t, file+".receipt.json")), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}
