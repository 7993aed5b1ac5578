package main_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/appliance"
)

// refusesToServe starts serve and wants it to end by itself with words.
func refusesToServe(t *testing.T, dir, words string) {
	t.Helper()
	m := launch(t, dir, "--once")
	select {
	case <-m.ended:
	case <-time.After(patience):
		t.Fatalf("serve runs on, want a refusal with %q", words)
	}
	if o := m.outcome(); o.code != 1 || !strings.Contains(o.stderr, words) {
		t.Errorf("serve = %d, %s; want 1 and %q", o.code, lastLines([]byte(o.stderr), 5), words)
	}
}

// replace puts a copy of one folder where another is.
func replace(t *testing.T, dst, src string) {
	t.Helper()
	if err := os.RemoveAll(dst); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dst, os.DirFS(src)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dst, 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dst, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.Chmod(f, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A journal that is older than it was, or gone, is not what the appliance goes on from by itself.
func TestJournalPutBack(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	journal, old := filepath.Join(dir, "journal"), filepath.Join(tempDir(t), "old")
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	if _, err := his.Sign(t.Context(), "first", asserted("D1001", "first")); err != nil {
		t.Fatal(err)
	}
	m.stop(t)
	replace(t, old, journal)

	m = serve(t, dir)
	m.trusted(t)
	second, err := m.client(t, "his").Sign(t.Context(), "second", asserted("D1001", "second"))
	if err != nil {
		t.Fatal(err)
	}
	m.stop(t)
	saved := filepath.Join(tempDir(t), "saved")
	replace(t, saved, journal)

	// 1. Put back to the state before the second signature.
	replace(t, journal, old)
	refusesToServe(t, dir, "journal.head")

	// 2. Deleted, and begun anew under the same name.
	if err := os.RemoveAll(journal); err != nil {
		t.Fatal(err)
	}
	refusesToServe(t, dir, "日志是空的")

	// 3. The right journal, but nobody knows any more how long it was.
	replace(t, journal, saved)
	head, err := os.ReadFile(filepath.Join(dir, "journal.head"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "journal.head")); err != nil {
		t.Fatal(err)
	}
	refusesToServe(t, dir, "缺少该文件")

	// 4. A head that somebody wrote himself.
	forged := strings.Replace(string(head), `"size":`, `"size":1`, 1)
	if err := os.WriteFile(filepath.Join(dir, "journal.head"), []byte(forged), 0o600); err != nil {
		t.Fatal(err)
	}
	refusesToServe(t, dir, "校验码不对")

	// 5. An operator who has put a backup back says so; a new epoch begins, and all is there.
	if err := os.WriteFile(filepath.Join(dir, "restored"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m = serve(t, dir)
	m.trusted(t)
	c := m.client(t, "his")
	if _, err := c.Evidence(t.Context(), second.RecordID); err != nil {
		t.Error(err)
	}
	third, err := c.Sign(t.Context(), "third", asserted("D1001", "third"))
	if err != nil {
		t.Fatal(err)
	}
	if third.Epoch == second.Epoch || third.Sequence <= second.Sequence {
		t.Errorf("after the restore: epoch %s, sequence %d; before: %s, %d", third.Epoch, third.Sequence, second.Epoch, second.Sequence)
	}
	m.mustBeClean(t)
	m.stop(t)

	// 6. Others may not read what is secret.
	if err := os.Chmod(filepath.Join(dir, "secrets", "tls.pin"), 0o644); err != nil {
		t.Fatal(err)
	}
	refusesToServe(t, dir, "chmod 600")
}

// A power cut during init leaves a mark, which both commands know.
func TestInitUnfinished(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	if err := os.WriteFile(filepath.Join(dir, ".init-unfinished"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refusesToServe(t, dir, "init 没有完成")
	refused(t, 2, []string{"init 没有完成"}, "init", "--dir", dir, "--simulated-beidou")
}

// What init made is on the disk before its mark goes: a power cut right after it would leave files without content.
func TestInitReachesTheDisk(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	trace := filepath.Join(tempDir(t), "trace")
	cmd := exec.Command(strace, "-f", "-o", trace, "-e", "trace=syncfs,unlink,unlinkat", built.init, "init", "--dir", filepath.Join(tempDir(t), "a"), "--simulated-beidou")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	calls, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	before, _, ok := strings.Cut(string(calls), appliance.InitUnfinished)
	if !ok || !strings.Contains(before, "syncfs(") {
		t.Errorf("the mark goes before what was made is on the disk: %s", calls)
	}
}

// run/ may be lost: it is made again. What a kill has left of a file that was being written is removed.
func TestRunFolderLost(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	if err := os.RemoveAll(filepath.Join(dir, "run")); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(dir, ".journal.head-123456789.part")
	if err := os.WriteFile(left, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := serve(t, dir)
	m.trusted(t)
	if _, err := os.Stat(left); err == nil {
		t.Errorf("%s is still there", left)
	}
	m.stop(t)
}

// A projection that cannot be opened stops no signature, and says so; deleted, it is fed again from the journal.
func TestProjectionDamaged(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	if _, err := his.Sign(t.Context(), "first", asserted("D1001", "first")); err != nil {
		t.Fatal(err)
	}
	m.stop(t)
	central := filepath.Join(dir, "central.db")
	if err := os.WriteFile(central, []byte(strings.Repeat("not a database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}

	m = serve(t, dir)
	m.trusted(t)
	if _, err := m.client(t, "his").Sign(t.Context(), "second", asserted("D1001", "second")); err != nil {
		t.Errorf("with a damaged projection: %v", err)
	}
	refused(t, 1, []string{"db rebuild"}, "db", "compare", "--dir", dir)
	refused(t, 1, []string{"--replace benbu-1"}, "db", "rebuild", "--dir", dir, "--reason", "坏盘")
	if o := mustRun(t, "db", "rebuild", "--dir", dir, "--reason", "坏盘", "--replace", "benbu-1"); !strings.Contains(o.stdout, central+".damaged-") || !strings.Contains(o.stdout, "与日志一致") {
		t.Errorf("rebuild: %v", o)
	}
	aside, err := filepath.Glob(central + ".damaged-*")
	if err != nil || len(aside) != 1 {
		t.Errorf("set aside: %v, %v", aside, err)
	}
	m.mustBeClean(t)
	m.stop(t)

	// Without the file there is nothing to rebuild: it is made anew.
	if err := os.Remove(central); err != nil {
		t.Fatal(err)
	}
	m = serve(t, dir)
	m.trusted(t)
	m.mustBeClean(t)
	m.stop(t)
}
