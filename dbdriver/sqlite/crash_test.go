package sqlite_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// children are what this binary can be instead of a test, named by YJ_CHILD.
var children = map[string]func(){"append": childAppend, "sequence": childSequence, "close": childClose, "limit": childLimit}

// TestMain lets this binary be the child that is killed.
func TestMain(m *testing.M) {
	if child := children[os.Getenv("YJ_CHILD")]; child != nil {
		child()
		return
	}
	os.Exit(m.Run())
}

var childStore *sqlite.Journal

// childJournal opens a journal and runs it. With YJ_STEP it kills itself at the n-th time that step is reached.
func childJournal() *audit.Journal {
	cfg := sqlite.JournalConfig{Dir: os.Getenv("YJ_DIR"), SegmentEntries: 50}
	if n, err := strconv.Atoi(os.Getenv("YJ_SEGMENT")); err == nil {
		cfg.SegmentEntries = n
	}
	if step := os.Getenv("YJ_STEP"); step != "" {
		sqlite.SetFault(&cfg, func(s string) {
			if s == step {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		})
	}
	store, err := sqlite.OpenJournal(context.Background(), cfg)
	childStore = store
	signer := audit.CheckpointSigner(childKey())
	if os.Getenv("YJ_NOKEY") != "" {
		signer = nil
	}
	var sealer audit.MAC
	if os.Getenv("YJ_SEAL") != "" {
		sealer = childSeal
	}
	if err == nil {
		var j *audit.Journal
		j, err = audit.Open(context.Background(), audit.Config{
			Store: store, Node: "east", Clock: newClock(), Log: quiet(), Checkpointer: signer, CheckpointEvery: 10 * time.Millisecond, Sealer: sealer,
		})
		if err == nil {
			go j.Run(context.Background())
			return j
		}
	}
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(3)
	return nil
}

// childKey is the same in each process: the checkpoints of all runs are checked with it.
func childKey() logKey { return fixedKey }

// childSequence appends a few entries one after the other, over the end of a segment, and writes a line for each.
func childSequence() {
	j := childJournal()
	for i := range 12 {
		r, err := j.Append(context.Background(), signDraft(i))
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(3)
		}
		fmt.Fprintf(os.Stdout, "ack %d %s\n", r.Sequence, r.LeafHash)
	}
	os.Exit(0)
}

// childClose appends and closes, and is killed in there.
func childClose() {
	j := childJournal()
	for i := range 30 {
		r, err := j.Append(context.Background(), signDraft(1000+i))
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(3)
		}
		fmt.Fprintf(os.Stdout, "ack %d %s\n", r.Sequence, r.LeafHash)
	}
	childStore.Close()
	os.Exit(3)
}

// childAppend appends with eight goroutines until it is killed, and writes a line for each receipt.
func childAppend() {
	j := childJournal()
	base, _ := strconv.Atoi(os.Getenv("YJ_BASE"))
	var mu sync.Mutex
	var n atomic.Int64
	for range 8 {
		go func() {
			for {
				i := base + int(n.Add(1))
				d := signDraft(i)
				d.State = i%9 == 0
				r, err := j.Append(context.Background(), d)
				if err != nil {
					fmt.Fprintln(os.Stderr, "child:", err)
					os.Exit(3)
				}
				mu.Lock()
				fmt.Fprintf(os.Stdout, "ack %d %s\n", r.Sequence, r.LeafHash)
				mu.Unlock()
			}
		}()
	}
	select {}
}

func child(t *testing.T, what, dir string, env ...string) (*exec.Cmd, io.ReadCloser) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), append(env, "YJ_CHILD="+what, "YJ_DIR="+dir)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		if t.Failed() && stderr.Len() > 0 {
			t.Logf("child: %s", stderr.String())
		}
	})
	return cmd, out
}

// readAcks adds the lines that the child got out before it died.
func readAcks(t *testing.T, out io.Reader, acks map[uint64]string, each func(n int)) {
	t.Helper()
	lines := bufio.NewScanner(out)
	for n := 1; lines.Scan(); n++ {
		var seq uint64
		var leaf string
		if _, err := fmt.Sscanf(lines.Text(), "ack %d %s", &seq, &leaf); err != nil || len(leaf) != 64 {
			continue // the kill cut the line
		}
		if old, ok := acks[seq]; ok && old != leaf {
			t.Errorf("sequence %d was acknowledged for two entries", seq)
		}
		acks[seq] = leaf
		each(n)
	}
}

// settled opens the journal as the next start of the appliance does, and checks that each acknowledged entry is there
// and that nothing is wrong.
func settled(t *testing.T, dir string, length int, acks map[uint64]string) *audit.Report {
	t.Helper()
	j := start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = length }),
		func(c *audit.Config) { c.Checkpointer = childKey() })
	seen := map[uint64]string{}
	if err := j.Range(t.Context(), 0, func(r audit.Record) error {
		if _, twice := seen[r.Sequence]; twice {
			t.Errorf("sequence %d is there twice", r.Sequence)
		}
		seen[r.Sequence] = r.LeafHash.String()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for seq, leaf := range acks {
		if seen[seq] != leaf {
			t.Errorf("acknowledged entry %d: stored leaf %q, acknowledged %q", seq, seen[seq], leaf)
		}
	}
	if err := j.State(t.Context(), func(audit.Record) error { return nil }); err != nil {
		t.Errorf("State: %v", err)
	}
	j.stop()
	r := verify(t, dir, audit.Options{LogKey: childKey().Public()})
	if !r.OK() || r.Uncovered != 0 {
		t.Errorf("after the kill: %d uncovered, findings%s", r.Uncovered, list(r))
	}
	return r
}

func TestKillUnderLoad(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	acks := map[uint64]string{}
	const kills = 24
	for k := range kills {
		cmd, out := child(t, "append", dir, fmt.Sprintf("YJ_BASE=%d", (k+1)*1_000_000))
		// The kill comes a random while after a random number of receipts; in every fourth run during opening.
		after := 1 + rnd.IntN(120)
		delay := time.Duration(rnd.IntN(3000)) * time.Microsecond
		if k%4 == 3 {
			go func() { time.Sleep(delay * 10); cmd.Process.Kill() }()
		}
		readAcks(t, out, acks, func(n int) {
			if n == after {
				time.Sleep(delay)
				cmd.Process.Kill()
			}
		})
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() == 3 {
			t.Fatalf("run %d ended by itself: %v", k, err)
		}
		if k%6 == 5 {
			settled(t, dir, 50, acks)
		}
	}
	r := settled(t, dir, 50, acks)
	t.Logf("%d kills, %d acknowledged entries, %d in %d segments", kills, len(acks), r.Entries, r.Segments)
	if len(acks) < kills {
		t.Errorf("only %d acknowledged entries: the test killed too early to mean anything", len(acks))
	}
}

// The process dies at each step of rolling to a new segment; the next start completes it.
func TestKillWhileRolling(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"roll/sealed", "roll/finished", "create/built", "create/renamed", "create/opened"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			// The first segment is made without the fault, so that the step is one of rolling.
			j := start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 20 }), func(c *audit.Config) { c.Checkpointer = childKey() })
			appendN(t, j.Journal, 0, 5)
			j.stop()
			acks := map[uint64]string{}
			cmd, out := child(t, "append", dir, "YJ_BASE=1000", "YJ_SEGMENT=20", "YJ_STEP="+step)
			readAcks(t, out, acks, func(int) {})
			if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() == 3 {
				t.Fatalf("the child did not die at %s: %v", step, err)
			}
			r := settled(t, dir, 20, acks)
			if r.Segments != 2 && r.Segments != 1 {
				t.Errorf("%d segments", r.Segments)
			}
			j = start(t, openStore(t, dir, func(c *sqlite.JournalConfig) { c.SegmentEntries = 20 }), func(c *audit.Config) { c.Checkpointer = childKey() })
			appendN(t, j.Journal, 5000, 30)
			j.stop()
			if r := settled(t, dir, 20, acks); r.Segments != 3 {
				t.Errorf("%d segments after going on, want 3", r.Segments)
			}
		})
	}
}

// The process dies while it closes the journal, also while SQLite folds the log into the file.
func TestKillWhileClosing(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"close/begun", "close/files"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			acks := map[uint64]string{}
			cmd, out := child(t, "close", dir, "YJ_SEGMENT=20", "YJ_STEP="+step)
			readAcks(t, out, acks, func(int) {})
			if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() == 3 {
				t.Fatalf("the child did not die at %s: %v", step, err)
			}
			if len(acks) != 30 {
				t.Errorf("%d receipts", len(acks))
			}
			settled(t, dir, 20, acks)
		})
	}
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	// At the n-th write to a segment's file, which is one of folding or of making the next segment.
	for _, n := range []int{1, 30, 60, 75, 90} {
		t.Run(fmt.Sprint("write ", n), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "journal")
			acks := map[uint64]string{}
			cmd := exec.Command(strace, "-f", "-o", filepath.Join(t.TempDir(), "trace"), "-P", filepath.Join(dir, seg1), "-P", filepath.Join(dir, seg2),
				"-e", "trace=pwrite64,ftruncate,fdatasync,fsync", "-e", fmt.Sprintf("inject=pwrite64,ftruncate:signal=KILL:when=%d", n), os.Args[0], "-test.run=^$")
			cmd.Env = append(os.Environ(), "YJ_CHILD=close", "YJ_DIR="+dir, "YJ_SEGMENT=20", "YJ_STEP=close/files")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			readAcks(t, out, acks, func(int) {})
			if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() == 3 {
				t.Fatalf("the child was not killed: %v", err)
			}
			t.Logf("%d receipts before write %d", len(acks), n)
			settled(t, dir, 20, acks)
		})
	}
}

// childLimit appends until the file size limit refuses it, raises the limit and goes on.
func childLimit() {
	signal.Ignore(syscall.SIGXFSZ)
	j := childJournal()
	limit := func(n uint64) {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: n, Max: unix.RLIM_INFINITY}); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(3)
		}
	}
	report := func(r audit.Receipt) { fmt.Printf("ack %d %s\n", r.Sequence, r.LeafHash) }
	limit(400 << 10)
	big := make([]byte, 20<<10)
	for i := 0; ; i++ {
		d := signDraft(i)
		big[0], big[1] = byte(i), byte(i>>8)
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "big", MediaType: "application/octet-stream", Data: big})
		r, err := j.Append(context.Background(), d)
		if err == nil {
			report(r)
			continue
		}
		if !errors.Is(err, audit.ErrJournalUnwritable) {
			fmt.Fprintln(os.Stderr, "child: refused with", err)
			os.Exit(3)
		}
		fmt.Println("refused", err)
		// The same draft again: still refused, not a duplicate.
		if _, err := j.Append(context.Background(), d); !errors.Is(err, audit.ErrJournalUnwritable) {
			fmt.Fprintln(os.Stderr, "child: second refusal is", err)
			os.Exit(3)
		}
		limit(unix.RLIM_INFINITY)
		if r, err = j.Append(context.Background(), d); err != nil {
			fmt.Fprintln(os.Stderr, "child: after the limit was lifted:", err)
			os.Exit(3)
		}
		report(r)
		fmt.Println("recovered")
		os.Exit(0)
	}
}

func TestWriteFailure(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	acks := map[uint64]string{}
	cmd, out := child(t, "limit", dir, "YJ_SEGMENT=100000")
	all, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("child: %v\n%s", err, all)
	}
	text := string(all)
	readAcks(t, strings.NewReader(text), acks, func(int) {})
	if !strings.Contains(text, "refused") || !strings.Contains(text, "recovered") || len(acks) < 5 {
		t.Fatalf("child said:\n%s", text)
	}
	settled(t, dir, 100000, acks)
}

// A file system that is really full: a small tmpfs.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mounting a tmpfs (mount(2), CAP_SYS_ADMIN): %v", err)
	}
	t.Cleanup(func() { unix.Unmount(mount, unix.MNT_DETACH) })
	dir := filepath.Join(mount, "journal")
	j := start(t, openStore(t, dir, nil), func(c *audit.Config) { c.Checkpointer = childKey() })
	ballast := filepath.Join(mount, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 300<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	acks := map[uint64]string{}
	var refusal error
	for i := 0; refusal == nil; i++ {
		if i == 10000 {
			t.Fatal("the file system did not become full")
		}
		d := signDraft(i)
		d.Payloads[0].Data = append(make([]byte, 10<<10), byte(i), byte(i>>8))
		r, err := j.Append(t.Context(), d)
		if refusal = err; err == nil {
			acks[r.Sequence] = r.LeafHash.String()
		}
	}
	if !errors.Is(refusal, audit.ErrJournalUnwritable) || !strings.Contains(refusal.Error(), "full") {
		t.Errorf("Append on a full disk = %v, want %v that says so", refusal, audit.ErrJournalUnwritable)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	r, err := j.Append(t.Context(), signDraft(20000))
	if err != nil {
		t.Fatalf("Append after room was made = %v", err)
	}
	acks[r.Sequence] = r.LeafHash.String()
	if c, err := j.WaitCheckpoint(t.Context(), r.Sequence); err != nil {
		t.Errorf("no checkpoint after the disk had been full: %v", err)
	} else if audit.VerifyCheckpoint(childKey().Public(), &c) != nil {
		t.Error("the checkpoint after the disk had been full does not verify")
	}
	if uint64(len(acks)) != r.Sequence {
		t.Errorf("%d acknowledged entries, the last has sequence %d", len(acks), r.Sequence)
	}
	j.stop()
	settled(t, dir, 1000000, acks)
}

// Between the write of an entry and its acknowledgement there is an fsync: seen from outside the process.
func TestSyncedBeforeAcknowledged(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	dir := filepath.Join(t.TempDir(), "journal")
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-y", "-s", "12", "-o", trace, "-e", "trace=write,pwrite64,fsync,fdatasync", os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), "YJ_CHILD=append", "YJ_DIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // the group that this test made
	readAcks(t, out, map[uint64]string{}, func(n int) {
		if n == 30 {
			stop()
		}
	})
	stop()
	cmd.Wait()
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	// Eight clients wait for their receipts, so one commit carries at most eight: never may there be more receipts than
	// eight times the syncs of the log before them.
	syncs, writes, acks := 0, 0, 0
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.Contains(line, "/refs.db"): // the index of references; no receipt depends on it
		case strings.Contains(line, "pwrite64(") && strings.Contains(line, ".db-wal"):
			writes++
		case (strings.Contains(line, "fdatasync(") || strings.Contains(line, "fsync(")) && strings.Contains(line, ".db-wal"):
			syncs++
		case strings.Contains(line, `write(1<`) && strings.Contains(line, `"ack `):
			acks++
			if acks > 8*syncs || writes == 0 {
				t.Fatalf("acknowledgement %d after %d syncs of the log and %d writes", acks, syncs, writes)
			}
		}
	}
	if acks == 0 || syncs == 0 {
		t.Fatalf("strace saw %d acknowledgements and %d syncs", acks, syncs)
	}
	t.Logf("%d acknowledgements, %d syncs, %d writes of the log", acks, syncs, writes)
}

// One append after the other, so that nothing is hidden by other people's syncs: before each receipt the log was
// written, then synced, and nothing of it was written after that sync. A new file's folder is synced before the first
// receipt that depends on it.
func TestEachReceiptFollowsItsOwnSync(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	dir := filepath.Join(t.TempDir(), "journal")
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-y", "-s", "12", "-o", trace, "-e", "trace=openat,rename,renameat,renameat2,write,pwrite64,fsync,fdatasync", os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), "YJ_CHILD=sequence", "YJ_DIR="+dir, "YJ_SEGMENT=5", "YJ_NOKEY=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	acks, folders := 0, 0
	written, synced := 0, false // of the log since the last receipt
	unsettled := ""             // a file whose folder is not synced
	pending := map[string]string{}
	for line := range strings.Lines(string(text)) {
		pid, call, _ := strings.Cut(strings.TrimSpace(line), " ")
		call = strings.TrimSpace(call)
		if strings.HasSuffix(call, "<unfinished ...>") { // counts when it returns
			pending[pid] = call
			if !strings.HasPrefix(call, "write(1<") {
				continue
			}
		} else if strings.HasPrefix(call, "<... ") {
			began := pending[pid]
			delete(pending, pid)
			if strings.HasPrefix(began, "write(1<") {
				continue
			}
			call = began + call
		}
		if strings.Contains(call, "/refs.db") {
			continue // the index of references is made anew when it is lost; no receipt depends on it
		}
		log := strings.Contains(call, ".db-wal>")
		sync := strings.HasPrefix(call, "fsync(") || strings.HasPrefix(call, "fdatasync(")
		switch {
		case strings.HasPrefix(call, "openat(") && strings.Contains(call, ".db-wal\"") && strings.Contains(call, "O_CREAT") && !strings.Contains(call, "= -1"),
			strings.HasPrefix(call, "rename") && strings.Contains(call, ".db\""):
			unsettled = call
		case sync && strings.Contains(call, "<"+dir+">"):
			folders++
			unsettled = ""
		case strings.HasPrefix(call, "pwrite64(") && log:
			written++
			synced = false
		case sync && log:
			synced = written > 0
		case strings.HasPrefix(call, "write(1<") && strings.Contains(call, `"ack `):
			acks++
			if written == 0 || !synced {
				t.Errorf("receipt %d: %d writes of the log since the one before, synced after the last: %v", acks, written, synced)
			}
			if unsettled != "" {
				t.Errorf("receipt %d before the folder was synced after %s", acks, unsettled)
			}
			written, synced = 0, false
		}
	}
	if acks != 12 || folders < 3 {
		t.Errorf("strace saw %d receipts and %d syncs of the folder", acks, folders)
	}
}

// A copy that ends with a sealed segment goes on in a new epoch: neither its announcement nor the segment's seal stands under a
// number that the epoch before gives to another entry.
func TestNewEpochBehindASealedSegment(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	dir, other := filepath.Join(top, "journal"), filepath.Join(top, "restored")
	four := func(c *sqlite.JournalConfig) { c.SegmentEntries = 4 }
	j := start(t, openStore(t, dir, four), nil)
	appendN(t, j.Journal, 0, 4) // the first three behind the announcement of the first epoch fill a segment
	j.stop()
	if err := os.MkdirAll(other, 0o700); err != nil {
		t.Fatal(err)
	}
	full, err := os.ReadFile(filepath.Join(dir, seg1))
	if err == nil {
		err = os.WriteFile(filepath.Join(other, seg1), full, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	leaves := map[string][]byte{}
	for _, d := range []string{dir, other} {
		j := start(t, openStore(t, d, four), func(c *audit.Config) {
			clock := newClock()
			clock.now = clock.now.Add(time.Duration(len(leaves)) * time.Hour) // a restore is later
			c.Clock, c.NewEpoch = clock, d == other
		})
		appendN(t, j.Journal, 4, 6)
		err := j.Range(t.Context(), 0, func(r audit.Record) error {
			place := fmt.Sprint(r.Epoch, " ", r.Sequence)
			if had := leaves[place]; had != nil && !bytes.Equal(had, r.LeafHash[:]) {
				t.Errorf("%s: %s stands for two entries, here %s", filepath.Base(d), place, r.Entry.Kind)
			}
			leaves[place] = bytes.Clone(r.LeafHash[:])
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		j.stop()
		if r := verify(t, d, audit.Options{}); !r.OK() {
			t.Errorf("%s: %s", filepath.Base(d), list(r))
		}
	}
}
