package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/dbtest"
)

// killedAfter starts a subcommand and kills it at a random moment; it may have ended before.
func killedAfter(t *testing.T, most time.Duration, args ...string) {
	t.Helper()
	cmd := exec.Command(built.binary, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(rand.N(most)) // the moment is what is tried
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// TestBackupFaults: what goes wrong while a backup is made or restored leaves nothing that looks whole and nothing in the
// way of the next try, and is said; the appliance signs on.
func TestBackupFaults(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Policy.SegmentEntries = 40 })
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	c := m.register(t, "his", "--consent", "app-asserted")
	shares := m.custodians(t, "2026 年")
	signed := 0
	signs := func(n int) {
		t.Helper()
		for range n {
			key := fmt.Sprintf("record-%d", signed)
			if _, err := c.Sign(t.Context(), key, asserted("D1", key)); err != nil {
				t.Fatal(err)
			}
			signed++
		}
	}
	signs(100)
	rounds := 4
	if os.Getenv("YINJIAN_LONG") != "" {
		rounds = 60
	}
	opensTo := func(to string, files ...string) []string {
		return opens(shares, 2, two(append([]string{"restore", "--dir", to}, files...)...)...)
	}

	// 1. kill -9 while one is made. A file of its name is whole.
	file := filepath.Join(tempDir(t), "killed.yjb")
	create := two("backup", "create", "--dir", dir, "--to", file, "--softtoken", "--rate", "1")
	began := time.Now()
	mustRun(t, two("backup", "create", "--dir", dir, "--to", file+".first", "--softtoken", "--rate", "1")...)
	took := time.Since(began)
	whole, parts := 0, 0
	for range rounds {
		killedAfter(t, took, create...)
		signs(1)
		if _, err := os.Stat(file); err == nil {
			whole++
			// The outcome may not have been journalled: then there is no receipt, and it is not taken without a word.
			if _, err := os.Stat(file + ".receipt.json"); err != nil {
				refused(t, 1, []string{"回执"}, opens(shares, 2, "backup", "verify", file)...)
			}
			mustRun(t, opens(shares, 2, "backup", "verify", file, "--without-receipt")...)
			os.Remove(file)
			os.Remove(file + ".receipt.json")
		} else if b, err := os.ReadFile(file + ".partial"); err == nil && len(b) > 0 {
			// All was written, and only its name was not there yet; or it is known for a part.
			if o := yinjian(t, opens(shares, 2, "backup", "verify", "--without-receipt", file+".partial")...); o.code != 0 {
				parts++
				if !strings.Contains(o.stderr, "备份文件已损坏") {
					t.Errorf("a part: %v", o)
				}
			}
		}
	}
	t.Logf("of %d that were killed, each of %v, %d were whole and %d left a part", rounds, took, whole, parts)
	mustRun(t, create...)
	if left, _ := os.ReadDir(filepath.Join(dir, "run", "backup")); len(left) != 1 {
		t.Errorf("the scratch folder has %v", left)
	}
	if _, err := os.Stat(file + ".partial"); err == nil {
		t.Error("a partial file is left beside the whole one")
	}
	mustRun(t, opens(shares, 2, "backup", "verify", file, "--log-key", filepath.Join(dir, "log.pem"))...)

	// The appliance is killed while its backup is made: the file may be whole, and nobody vouches for it.
	orphan := filepath.Join(tempDir(t), "orphan.yjb")
	var said bytes.Buffer
	making := exec.Command(built.binary, two("backup", "create", "--dir", dir, "--to", orphan, "--softtoken", "--rate", "1")...)
	making.Stderr = &said
	if err := making.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the backup has begun", func() bool { _, err := os.Stat(orphan + ".partial"); return err == nil })
	m.kill(t)
	if err := making.Wait(); err == nil || !strings.Contains(said.String(), "日志里没有") {
		t.Errorf("a backup whose appliance was killed: %v, %s", err, &said)
	}
	if _, err := os.Stat(orphan); err == nil {
		refused(t, 1, []string{"回执"}, opens(shares, 2, "backup", "verify", orphan)...)
		mustRun(t, opens(shares, 2, "backup", "verify", "--without-receipt", orphan)...)
	}
	m = serve(t, dir)
	m.trusted(t)
	c = m.client(t, "his")

	// 2. kill -9 while it is restored. Nobody serves what is not whole, and the next try begins anew.
	other := filepath.Join(tempDir(t), "other")
	began = time.Now()
	mustRun(t, opensTo(other, file)...)
	took = time.Since(began)
	unfinished := 0
	for range rounds {
		if err := os.RemoveAll(other); err != nil {
			t.Fatal(err)
		}
		killedAfter(t, took, opensTo(other, file)...)
		if _, err := os.Stat(filepath.Join(other, appliance.RestoreUnfinished)); err == nil {
			unfinished++
			if _, err := os.Stat(filepath.Join(other, "config.toml")); err == nil {
				refused(t, 1, []string{"上次 restore 没有完成"}, "serve", "--dir", other)
			}
			mustRun(t, opensTo(other, file)...)
		} else if _, err := os.Stat(filepath.Join(other, "restored")); err == nil {
			refused(t, 2, []string{"不是空目录"}, opensTo(other, file)...)
		} else {
			mustRun(t, opensTo(other, file)...)
		}
	}
	t.Logf("%d of %d restores were cut off half way, of %v", unfinished, rounds, took)

	// 3. No room: nothing is left behind, and the journal says that it failed.
	small := filepath.Join(tempDir(t), "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	tmpfs(t, small, "size=300k")
	refused(t, 1, []string{"目标磁盘已满"}, two("backup", "create", "--dir", dir, "--to", filepath.Join(small, "b.yjb"))...)
	if left, _ := os.ReadDir(small); len(left) > 0 {
		t.Errorf("left on the full disk: %v", left)
	}
	refused(t, 1, []string{"磁盘已满"}, opensTo(filepath.Join(small, "a"), file)...)
	if left, _ := os.ReadDir(filepath.Join(small, "a")); len(left) > 0 {
		t.Errorf("left of the restore: %v", left)
	}

	noRoomForRestore(t, file, shares)

	// 4. What somebody else would like to have restored.
	for name, one := range map[string]struct {
		file string
		word string
	}{
		"one bit":      {damaged(t, file), "备份文件已损坏"},
		"a receipt of": {withReceipt(t, file, file+".first"), "回执是另一个文件的"},
	} {
		to := filepath.Join(tempDir(t), "to")
		refused(t, 1, []string{one.word}, opensTo(to, one.file)...)
		if left, _ := os.ReadDir(to); len(left) > 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	refused(t, 1, []string{"没有份额"}, two("restore", "--dir", filepath.Join(tempDir(t), "to"), file)...)

	// 5. The cipher machine is another one, or has lost its keys.
	stranger := initAppliance(t, startTimeServer(t))
	bare := filepath.Join(tempDir(t), "bare.yjb")
	mustRun(t, two("backup", "create", "--dir", dir, "--to", bare)...)
	foreign := filepath.Join(tempDir(t), "foreign")
	mustRun(t, opens(shares, 2, two("restore", "--dir", foreign, bare)...)...)
	replace(t, filepath.Join(foreign, "softtoken"), filepath.Join(stranger, "softtoken"))
	handSecrets(t, stranger, foreign)
	refusesToServe(t, foreign, "厂商的办法恢复密钥")

	// What failed or was killed is listed, and the appliance has not noticed.
	var list struct{ Unfinished map[string]time.Time }
	o := mustRun(t, "backup", "list", "--dir", dir, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &list); err != nil || whole < rounds && len(list.Unfinished) == 0 {
		t.Errorf("backup list: %v, %v", o, err)
	}
	m.custodiansReplaced(t, file, shares)
	signs(1)
	m.mustBeClean(t)
	m.stop(t)
	if n := len(entries(t, dir, "backup.export/failed")); n != 1 {
		t.Errorf("%d failures are journalled, want 1", n)
	}
	if n := len(entries(t, dir, "sign.v1")); n != signed {
		t.Errorf("%d signatures, want %d", n, signed)
	}
}

// noRoomForRestore restores to disks that are full a little later each time, until there is room: each is refused for that, none
// leaves what could be served, and the same folder takes the next try.
func noRoomForRestore(t *testing.T, file string, shares []string) {
	t.Helper()
	const whole = 64 << 20
	disk := filepath.Join(tempDir(t), "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	tmpfs(t, disk, fmt.Sprint("size=", whole))
	to := filepath.Join(disk, "a")
	restored := func() outcome { return yinjian(t, opens(shares, 2, two("restore", "--dir", to, file)...)...) }
	step := int64(64 << 10)
	if os.Getenv("YINJIAN_LONG") != "" {
		step = 4 << 10 // of a page
	}
	refusals := 0
	for least, most := int64(0), int64(whole/8); most-least > step; {
		leave := (least + most) / 2
		free := fill(t, disk, leave)
		o := restored()
		free()
		if o.code == 0 {
			most = leave
			if err := os.RemoveAll(to); err != nil {
				t.Fatal(err)
			}
			continue
		}
		least = leave
		refusals++
		if o.code != 1 || !strings.Contains(o.stderr, "磁盘已满") {
			t.Errorf("with %d bytes left: %v", leave, o)
		}
		if left, _ := os.ReadDir(to); len(left) > 0 {
			refusesToServe(t, to, "上次 restore 没有完成")
		}
	}
	if refusals == 0 { // how many there are hangs on how much a restore needs
		t.Error("never refused")
	}
	if err := os.RemoveAll(to); err != nil { // a refused one leaves its part, whose room the next one has
		t.Fatal(err)
	}
	free := fill(t, disk, step/2)
	if o := restored(); o.code != 1 {
		t.Errorf("on a full disk: %v", o)
	}
	free()
	mustRun(t, opens(shares, 2, two("restore", "--dir", to, file)...)...)
	if _, err := os.Stat(filepath.Join(to, appliance.RestoreUnfinished)); err == nil {
		t.Error("what was restored bears the mark of what was not")
	}
	if o := yinjian(t, "audit", "verify", "--dir", to); !strings.Contains(o.stdout, "未发现改动") {
		t.Errorf("what was restored at last: %v", o)
	}
	t.Logf("a restore was refused for its disk %d times", refusals)
}

// custodiansReplaced makes another set of custodians: what was sealed to the first stays with them.
func (m *machine) custodiansReplaced(t *testing.T, old string, first []string) {
	t.Helper()
	second := m.custodians(t, "2027 年")
	refused(t, 1, []string{"保管人换过了"}, two("backup", "create", "--dir", m.dir, "--to", filepath.Join(tempDir(t), "x"), "--incremental")...)
	file := m.backup(t)
	mustRun(t, opens(second, 2, "backup", "verify", file)...)
	mustRun(t, opens(first, 2, "backup", "verify", old)...)
	refused(t, 1, []string{"套号"}, opens(first, 2, "backup", "verify", file)...)
	refused(t, 1, []string{"套号"}, opens(second, 2, "backup", "verify", old)...)
	refused(t, 1, []string{"套号"}, "backup", "verify", old, "--share", first[0], "--share", second[1])
	mustRun(t, "backup", "list", "--dir", m.dir)
}

// withReceipt is a backup with another one's receipt.
func withReceipt(t *testing.T, file, of string) string {
	t.Helper()
	name := filepath.Join(tempDir(t), "b.yjb")
	for to, from := range map[string]string{name: file, name + ".receipt.json": of + ".receipt.json"} {
		if err := os.WriteFile(to, []byte(readFile(t, from)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return name
}

// TestRestoreBesideTheOriginal runs an appliance from an old backup while its original goes on, on one central database: no
// place and no serial stands for two things, and both are told of the other.
func TestRestoreBesideTheOriginal(t *testing.T) {
	t.Parallel()
	pg := dbtest.StartPostgres(t)
	name := pg.Fresh(t)
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(cfg *appliance.Config) { cfg.Database.DSN = pg.DSN(name) })
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	signs := func(c *client.Client, from, n int) {
		t.Helper()
		for i := from; i < from+n; i++ {
			key := fmt.Sprintf("record-%d", i)
			if _, err := c.Sign(t.Context(), key, asserted("D1", key)); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := m.register(t, "his", "--consent", "app-asserted")
	shares := m.custodians(t, "2026 年")
	signs(c, 0, 15)
	file := m.backup(t)
	signs(c, 15, 12)
	m.mustBeClean(t)

	other := filepath.Join(tempDir(t), "other")
	mustRun(t, opens(shares, 2, two("restore", "--dir", other, file, "--log-key", filepath.Join(dir, "log.pem"))...)...)
	handSecrets(t, dir, other)
	r := serve(t, other)
	r.trusted(t)
	// For five minutes it refuses what the original may have let through.
	_, err := r.client(t, "his").Sign(t.Context(), "early", asserted("D1", "early"))
	wantCode(t, err, "clock_skew")
	var lost struct{ Summary struct{ Signatures int } }
	eventually(t, readyWithin, "what was lost is named", func() bool {
		o := yinjian(t, "backup", "missing", "--dir", other, "-o", "json")
		return o.code == 0 && json.Unmarshal([]byte(o.stdout), &lost) == nil
	})
	if lost.Summary.Signatures != 12 {
		t.Errorf("%d signatures are named as lost, want 12", lost.Summary.Signatures)
	}
	// The original goes on, and the restored one is told so.
	for i := 100; ; i++ {
		if strings.Contains(strings.Join(r.state(t).Warnings, "\n"), "原设备还在运行") {
			break
		}
		if i == 400 {
			t.Fatal("no fork alarm")
		}
		signs(c, i, 1)
		time.Sleep(200 * time.Millisecond) // the rate of a quiet ward
	}
	r.enrol(t, "D2", "")
	shipped := func(m *machine) {
		t.Helper()
		eventually(t, time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	}
	shipped(m)
	shipped(r)
	if o := yinjian(t, "db", "compare", "--dir", other, "-o", "json"); o.code != 1 || !strings.Contains(o.stdout, string(audit.RowBeyondJournal)) {
		t.Errorf("db compare at the restored: %v", o)
	}
	if o := yinjian(t, "db", "compare", "--dir", dir, "-o", "json"); o.code != 1 || !strings.Contains(o.stdout, string(audit.RowAdded)) {
		t.Errorf("db compare at the original: %v", o)
	}
	m.stop(t)
	r.stop(t)
	noneTwice(t, filepath.Join(dir, "journal"), filepath.Join(other, "journal"))
}
