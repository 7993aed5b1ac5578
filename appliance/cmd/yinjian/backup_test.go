package main_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/custody"
)

// custodians makes three custodians of the appliance's backups, any two of whom open them, and answers their shares.
func (m *machine) custodians(t *testing.T, name string) []string {
	t.Helper()
	folder := tempDir(t)
	var b strings.Builder
	fmt.Fprintf(&b, "name = %q\nrecord = \"custodians.json\"\nthreshold = 2\n", name)
	var shares []string
	for i, holder := range []string{"张三", "李四", "王五"} {
		fmt.Fprintf(&b, "[[custodian]]\nname = %q\nshare = \"share-%d.txt\"\n", holder, i+1)
		shares = append(shares, filepath.Join(folder, fmt.Sprintf("share-%d.txt", i+1)))
	}
	file := filepath.Join(folder, "custodians.toml")
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "backup", "custodians", file, "--dir", m.dir, "--confirmed-by", "甲", "--confirmed-by", "乙")
	return shares
}

// two are the flags of a two-person act.
func two(args ...string) []string {
	return append(args, "--confirmed-by", "甲", "--confirmed-by", "乙")
}

// opens are the flags for the first n shares.
func opens(shares []string, n int, args ...string) []string {
	for _, s := range shares[:n] {
		args = append(args, "--share", s)
	}
	return args
}

// backup makes one and answers its file.
func (m *machine) backup(t *testing.T, more ...string) string {
	t.Helper()
	file := filepath.Join(tempDir(t), "b.yjb")
	mustRun(t, two(append([]string{"backup", "create", "--dir", m.dir, "--to", file, "--softtoken"}, more...)...)...)
	return file
}

// handSecrets puts the files that no backup has back.
func handSecrets(t *testing.T, from, to string) {
	t.Helper()
	for _, folder := range []string{"secrets", "credentials"} {
		if _, err := os.Stat(filepath.Join(from, folder)); err != nil {
			continue // nobody was registered
		}
		if err := os.MkdirAll(filepath.Join(to, folder), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(filepath.Join(to, folder), os.DirFS(filepath.Join(from, folder))); err != nil {
			t.Fatal(err)
		}
		names, _ := filepath.Glob(filepath.Join(to, folder, "*"))
		for _, name := range names {
			if err := os.Chmod(name, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestBackup is a backup from its custodians to an appliance that goes on from it, and what that one lost.
func TestBackup(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t), "--listen", freePort(t))
	configure(t, dir, func(c *appliance.Config) { c.Policy.SegmentEntries = 30 })
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "482913")
	c := m.register(t, "his", "--consent", "app-asserted")
	made := map[string]*wire.SignResult{}
	signs := func(c *client.Client, from, n int) {
		t.Helper()
		for i := from; i < from+n; i++ {
			key := fmt.Sprintf("record-%d", i)
			r, err := c.Sign(t.Context(), key, asserted("D1", key))
			if err != nil {
				t.Fatal(err)
			}
			made[key] = r
		}
	}

	// 1. Nobody to seal to; then three, of whom one person alone is not believed.
	refused(t, 1, []string{"备份保管人"}, two("backup", "create", "--dir", dir, "--to", filepath.Join(tempDir(t), "x"))...)
	shares := m.custodians(t, "2026 年")
	// A record that has their set and names and somebody else's key is not believed: what is sealed to it only he could open.
	record := map[string]any{}
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(filepath.Dir(shares[0]), "custodians.json"))), &record); err != nil {
		t.Fatal(err)
	}
	set := func() error {
		b, err := json.Marshal(record)
		if err != nil {
			t.Fatal(err)
		}
		a := m.admin()
		defer a.Close()
		_, err = a.SetCustodians(t.Context(), wire.SetCustodians{Record: b, Persons: []string{"甲", "乙"}})
		return err
	}
	_, theirs := custody.NewPair()
	record["point"] = theirs
	if err := set(); err == nil || !strings.Contains(err.Error(), "公钥") {
		t.Errorf("somebody else's key: %v", err)
	}
	refused(t, 2, []string{"不同的两人"}, "backup", "create", "--dir", dir, "--to", filepath.Join(tempDir(t), "x"), "--confirmed-by", "甲", "--confirmed-by", "甲")
	signs(c, 0, 40)
	whole := m.backup(t)
	signs(c, 40, 60)
	// The next one while signatures are made: each is in it, or will be named as lost.
	stop, stopped := make(chan struct{}), make(chan map[string]*wire.SignResult)
	go func() {
		during := map[string]*wire.SignResult{}
		defer func() { stopped <- during }()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			key := fmt.Sprintf("during-%d", i)
			r, err := c.Sign(t.Context(), key, asserted("D1", key))
			if err != nil {
				t.Error(err)
				return
			}
			during[key] = r
		}
	}()
	more := m.backup(t, "--incremental", "--rate", "1")
	close(stop)
	during := <-stopped
	maps.Copy(made, during)
	refused(t, 1, []string{"已存在"}, two("backup", "create", "--dir", dir, "--to", whole)...)

	// 2. What it says, and what is found when it is opened.
	if o := mustRun(t, "backup", "show", more); !strings.Contains(o.stdout, "接续") || !strings.Contains(o.stdout, "张三、李四、王五 中任 2 名") {
		t.Errorf("backup show: %v", o)
	}
	verify := func(n int, more ...string) []string {
		return opens(shares, n, append([]string{"backup", "verify"}, more...)...)
	}
	var found struct {
		Entries   uint64
		Files     int
		Proved    bool
		OwnLogKey bool `json:"own_log_key"`
		Absent    []string
	}
	o := mustRun(t, two(verify(2, more, whole, "--dir", dir, "-o", "json")...)...)
	if err := json.Unmarshal([]byte(o.stdout), &found); err != nil || !found.Proved || found.OwnLogKey || found.Files != 2 || found.Entries < 100 || !slices.Contains(found.Absent, "secrets/staff.pin") {
		t.Errorf("backup verify: %+v, %v", found, err)
	}
	refused(t, 1, []string{"只有 1 份，需要 2 份"}, verify(1, whole)...)
	refused(t, 1, []string{"没有完整备份"}, verify(2, more)...)
	for name, forbidden := range secretsOf(t, dir) {
		b := readFile(t, whole)
		if strings.Contains(b, forbidden) {
			t.Errorf("the backup has %s in clear", name)
		}
	}
	var state struct {
		Last       struct{ ID string }
		Unfinished map[string]string
	}
	m.changeOf(t, "/admin/v1/backups/custodians", "backup.custodians", "", "", `"holders":["张三","李四","王五"]`)
	m.changeOf(t, "/admin/v1/backups", "backup.export/outcome", "", "", `"persons":"甲、乙"`) // begun and ended, one change
	m.changeOf(t, "/admin/v1/backups/:id/outcome", "backup.export/outcome", "", "", `"backup.entries":`)
	m.changeOf(t, "/admin/v1/backups/reports", "backup.verified", "", "", `"passed":true`)
	list := mustRun(t, "backup", "list", "--dir", dir, "-o", "json")
	if err := json.Unmarshal([]byte(list.stdout), &state); err != nil || state.Last.ID == "" || len(state.Unfinished) > 0 {
		t.Errorf("backup list: %v", list)
	}

	// 3. What is signed now is in no backup. The original goes down for good.
	signs(c, 100, 5)
	captured := m.handmade(t, m.stranger(t, false), "his", "captured", asserted("D1", "captured"))
	if resp, body := captured(t); resp.StatusCode != 200 {
		t.Fatal(resp.Status, body)
	}
	m.mustBeClean(t)
	if m.state(t).State != "operational" {
		t.Error("the appliance does not run on")
	}
	m.stop(t)

	// 4. Only a blank folder is restored to.
	refused(t, 2, []string{"不是空目录"}, opens(shares, 2, two("restore", "--dir", dir, whole, more)...)...)
	other := filepath.Join(tempDir(t), "other")
	restored := mustRun(t, opens(shares, 2, two("restore", "--dir", other, whole, more, "--log-key", filepath.Join(dir, "log.pem"))...)...)
	if !strings.Contains(restored.stdout, "secrets/staff.pin") || !strings.Contains(restored.stdout, "原设备已停用") {
		t.Errorf("restore says: %v", restored)
	}
	for name, forbidden := range secretsOf(t, dir) {
		if o := command(t, nil, "grep", "-rlF", "--", forbidden, other); o.code != 1 {
			t.Errorf("%s is in the restored folder: %v", name, o)
		}
	}
	refusesToServe(t, other, "secrets/staff.pin")
	handSecrets(t, dir, other)
	// As a restore that took five minutes: until then requests would be refused that the original may have let through.
	var mark appliance.Restored
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(other, "restored"))), &mark); err != nil || !mark.Proved {
		t.Fatalf("%+v, %v", mark, err)
	}
	begun, err := time.Parse(time.RFC3339, mark.Begun)
	if err != nil {
		t.Fatal(err)
	}
	mark.Begun = begun.Add(-5 * time.Minute).Format(time.RFC3339)
	if err := appliance.WriteRestored(other, mark); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "central.db"), filepath.Join(other, "central.db")); err != nil { // as a database of its own would have survived
		t.Fatal(err)
	}
	r := serve(t, other)
	r.trusted(t)
	c = r.client(t, "his")

	if resp, body := captured(t); resp.StatusCode != 401 || !strings.Contains(body, "clock_skew") {
		t.Errorf("what the original had let through, once more: %s %s", resp.Status, body)
	}

	// 5. It goes on: a new epoch, the keys of before, what was signed before.
	evidence, err := c.Evidence(t.Context(), made["record-7"].RecordID)
	if err != nil {
		t.Fatal(err)
	}
	file, document := filepath.Join(tempDir(t), "evidence.json"), filepath.Join(tempDir(t), "document")
	if err := os.WriteFile(file, evidence, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(document, documentOf("record-7"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "verify", "--anchors", dir, "--log-key", filepath.Join(dir, "log.pem"), "--document", document, file)
	again, err := c.Sign(t.Context(), "record-7", asserted("D1", "record-7")) // its key is in the backup
	if err != nil || again.RecordID != made["record-7"].RecordID || again.Sequence != made["record-7"].Sequence || !again.Replayed {
		t.Errorf("the same key again: %+v, %v", again, err)
	}
	late, err := c.Sign(t.Context(), "record-102", asserted("D1", "record-102")) // its key is not
	if err != nil || late.RecordID != made["record-102"].RecordID || late.Epoch == made["record-102"].Epoch {
		t.Errorf("a key of after the backup: %+v, %v", late, err)
	}

	// 6. What it lost is named, from the database's rows.
	var lost struct {
		Summary struct {
			Signatures int
			Reaches    bool
		}
		Missing []struct {
			RecordID string `json:"record_id"`
		}
	}
	eventually(t, readyWithin, "what was lost is named", func() bool {
		o := yinjian(t, "backup", "missing", "--dir", other, "-o", "json")
		return o.code == 0 && json.Unmarshal([]byte(o.stdout), &lost) == nil
	})
	named := map[string]bool{}
	for _, l := range lost.Missing {
		named[l.RecordID] = true
	}
	inJournal := map[string]bool{}
	for _, e := range entries(t, other, "sign.v1") {
		if e.Epoch.String() == made["record-7"].Epoch {
			inJournal[hex.EncodeToString(e.Ref)] = true
		}
	}
	after := 6 // the five, and the captured one
	for key, r := range made {
		if inJournal[r.RecordID] == named[r.RecordID] {
			t.Errorf("%s: in the journal %v, named as lost %v", key, inJournal[r.RecordID], named[r.RecordID])
		}
		if during[key] != nil && named[r.RecordID] {
			after++
		}
	}
	if !lost.Summary.Reaches || lost.Summary.Signatures != after || len(inJournal) < 100 {
		t.Errorf("lost: %+v, want %d", lost.Summary, after)
	}
	t.Logf("%d were signed while the backup was made, %d of them after it", len(during), after-6)
	if w := strings.Join(r.state(t).Warnings, "\n"); !strings.Contains(w, fmt.Sprintf("签名 %d 条", after)) {
		t.Errorf("warnings: %s", w)
	}
	t.Logf("warnings: %s", strings.Join(r.state(t).Warnings, "\n"))
	if o := yinjian(t, "audit", "verify", "--dir", other); !strings.Contains(o.stdout, "未发现改动") {
		t.Errorf("audit verify: %v", o)
	}
	r.stop(t)
	// 7. Both histories together.
	noneTwice(t, filepath.Join(dir, "journal"), filepath.Join(other, "journal"))
}

// secretsOf are the contents of the files that hold secrets.
func secretsOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	names, _ := filepath.Glob(filepath.Join(dir, "secrets", "*"))
	for _, name := range names {
		out[filepath.Base(name)] = strings.TrimSpace(readFile(t, name))
	}
	var credential struct {
		Key string `json:"key_hex"`
	}
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(dir, "credentials", "his.json"))), &credential); err != nil || len(out) < 5 {
		t.Fatalf("%v: %d secrets", err, len(out))
	}
	out["credential"] = credential.Key
	return out
}
