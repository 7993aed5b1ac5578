package sqlite_test

import (
	"bufio"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

func init() { children["faults"] = childFaults }

// A fault is one thing that goes wrong: the K-th call (from 1) of a class, in a phase of the program.
type fault struct {
	Class  string // "write wal", "sync db", …
	Phase  string // open, append, close
	K      int
	Action string // EIO, ENOSPC, kill; EIO-stays: that and every later one; short: half of a write, then ENOSPC;
	// kill after EIO: that fails and the process dies at the next
}

func (f fault) String() string { return fmt.Sprintf("%s %s/%s/%d", f.Action, f.Phase, f.Class, f.K) }

// classOf names what a call does to which kind of file.
func classOf(c *call) string {
	kind := "folder"
	switch name := c.Path; {
	case name == ".":
	case strings.HasPrefix(name, "refs."):
		kind = "index"
	case strings.HasSuffix(name, ".lock"):
		kind = "lock"
	case strings.Contains(name, ".tmp-"):
		kind = "tmp-journal"
	case strings.HasSuffix(name, ".tmp"):
		kind = "tmp"
	default:
		_, kind, _ = strings.Cut(regexp.MustCompile(`^journal-\d+\.`).ReplaceAllString(name, ""), "-")
		if kind == "" {
			kind = "db"
		}
	}
	return c.Op + " " + kind
}

const (
	faultEntries = 24
	faultSegment = 10
)

// childFaults opens the journal, appends a fixed series over the ends of segments, with batches, checkpoints and seals,
// and closes it. What it says on standard output: "ack", "refused" (and nothing was recorded), "unknown", "failed" (for
// good), "done". Every error has to be one that has a name.
func childFaults() {
	dir := os.Getenv("YJ_DIR")
	var mu sync.Mutex
	var f fault
	if text := os.Getenv("YJ_FAULT"); text != "" {
		if err := json.Unmarshal([]byte(text), &f); err != nil {
			panic(err)
		}
	}
	phase, seen, struck, shorted, armed := "open", 0, false, "", false
	in := &interceptor{dir: dir, decide: func(c *call) verdict {
		mu.Lock()
		defer mu.Unlock()
		c.Phase = phase
		if armed { // the call after the one that failed
			return verdict{kill: true}
		}
		if c.Path == shorted { // the rest of the write that was cut short
			shorted = ""
			return verdict{errno: syscall.ENOSPC}
		}
		stays := struck && f.Action == "EIO-stays"
		if !stays {
			if struck || classOf(c) != f.Class || phase != f.Phase {
				return verdict{}
			}
			if seen++; seen != f.K {
				return verdict{}
			}
			struck = true
			fmt.Println("struck", f)
		}
		switch f.Action {
		case "ENOSPC":
			return verdict{errno: syscall.ENOSPC}
		case "kill":
			return verdict{kill: true}
		case "kill after EIO":
			armed = true
		case "short":
			shorted = c.Path
			return verdict{short: true}
		}
		return verdict{errno: syscall.EIO}
	}}
	enter := func(p string) {
		mu.Lock()
		phase = p
		mu.Unlock()
	}
	exit := func(code int, words ...any) {
		fmt.Println(words...)
		os.Exit(code)
	}
	if name := os.Getenv("YJ_RECORD"); name != "" {
		log, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			panic(err)
		}
		in.log = log
	}
	if err := in.install(); err != nil {
		exit(9, "no interception:", err)
	}

	ctx := context.Background()
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: dir, SegmentEntries: faultSegment})
	if err != nil {
		exit(4, "open:", err)
	}
	j, err := audit.Open(ctx, audit.Config{
		Store: store, Node: "east", Clock: newClock(), Log: quiet(), Checkpointer: fixedKey, LogKeys: []crypto.PublicKey{fixedKey.Public()},
		CheckpointEvery: 5 * time.Millisecond, Sealer: childSeal, NewEpoch: os.Getenv("YJ_EPOCH") != "",
	})
	if err != nil {
		exit(4, "open:", err)
	}
	run, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- j.Run(run) }()

	enter("append")
	base, _ := strconv.Atoi(os.Getenv("YJ_BASE"))
	one := func(i int) {
		d := signDraft(base + i)
		d.State = i%7 == 0
		d.Payloads[0].Data = append(make([]byte, 3000), fmt.Sprint(base+i)...)
		unknown := false
		for range 4 {
			r, err := j.Append(ctx, d)
			var twice *audit.DuplicateRefError
			switch {
			case errors.As(err, &twice):
				if !unknown {
					exit(3, "recorded, although it was refused as not recorded:", base+i)
				}
				rec, err := j.ByRef(ctx, d.Ref)
				if err != nil {
					exit(3, "reading what was recorded:", err)
				}
				r = rec[0]
			case errors.Is(err, audit.ErrJournalFailed):
				exit(5, "failed", err)
			case errors.Is(err, audit.ErrOutcomeUnknown):
				unknown = true
				fmt.Println("unknown", base+i, err)
				continue
			case errors.Is(err, audit.ErrJournalUnwritable):
				fmt.Println("refused", base+i, err)
				continue
			case err != nil:
				exit(3, "an error without a name:", err)
			}
			in.receipt(r.Sequence, r.LeafHash.String())
			fmt.Printf("ack %d %s\n", r.Sequence, r.LeafHash)
			return
		}
	}
	for i := 0; i < faultEntries; {
		var batch sync.WaitGroup
		for range min(1+i%3, faultEntries-i) {
			n := i
			batch.Go(func() { one(n) })
			i++
		}
		batch.Wait()
	}
	enter("close")
	stop()
	if err := <-ran; err != nil {
		exit(3, "an error without a name: run:", err)
	}
	if err := store.Close(); err != nil {
		fmt.Println("close:", err)
	}
	exit(0, "done")
}

// A faulty is how a run of childFaults ended.
type faulty struct {
	text   string
	code   int // -1: killed
	struck bool
	acks   map[uint64]string
}

func runFaulty(t *testing.T, dir string, f fault, env ...string) faulty {
	t.Helper()
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), append(env, "YJ_CHILD=faults", "YJ_DIR="+dir, "YJ_FAULT="+string(text))...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	late := time.AfterFunc(2*time.Minute, func() { cmd.Process.Signal(syscall.SIGQUIT) }) // where it hangs
	out, err := cmd.CombinedOutput()
	if !late.Stop() {
		t.Errorf("%v: it hangs", f)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	r := faulty{text: string(out), code: cmd.ProcessState.ExitCode(), acks: map[uint64]string{}}
	r.struck = strings.Contains(r.text, "struck ")
	if r.code == 9 {
		t.Skip(strings.TrimSpace(r.text))
	}
	readAcks(t, strings.NewReader(r.text), r.acks, func(int) {})
	return r
}

// reopened opens the journal as the next start does, wants every acknowledged entry in it, appends to it, closes it and
// verifies the files.
func reopened(dir string, acks map[uint64]string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: dir, SegmentEntries: faultSegment})
	if err != nil {
		return err
	}
	defer store.Close()
	j, err := audit.Open(ctx, audit.Config{
		Store: store, Node: "east", Clock: newClock(), Log: quiet(), Checkpointer: fixedKey, LogKeys: []crypto.PublicKey{fixedKey.Public()},
		CheckpointEvery: 5 * time.Millisecond, Sealer: childSeal,
	})
	if err != nil {
		return err
	}
	run, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- j.Run(run) }()
	defer stop()
	leaves := map[uint64]string{}
	if err := j.Range(ctx, 0, func(r audit.Record) error { leaves[r.Sequence] = r.LeafHash.String(); return nil }); err != nil {
		return err
	}
	for seq, leaf := range acks {
		if leaves[seq] != leaf {
			return fmt.Errorf("entry %d was acknowledged as %s and is %q; there are %d", seq, leaf, leaves[seq], len(leaves))
		}
	}
	if err := j.State(ctx, func(audit.Record) error { return nil }); err != nil {
		return err
	}
	for i := range 2 {
		if _, err := j.Append(ctx, signDraft(9_000_000+i)); err != nil {
			return fmt.Errorf("going on: %w", err)
		}
	}
	stop()
	if err := <-ran; err != nil {
		return err
	}
	if err := store.Close(); err != nil {
		return err
	}
	ro, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: dir, ReadOnly: true})
	if err != nil {
		return err
	}
	defer ro.Close()
	report, err := audit.Verify(ctx, ro, audit.Options{LogKey: fixedKey.Public(), Sealer: childSeal})
	if err != nil {
		return err
	}
	if !report.OK() || report.Uncovered != 0 || report.Entries != uint64(len(leaves))+2 && report.Entries != uint64(len(leaves))+3 { // a segment's seal
		return fmt.Errorf("%d entries of %d, %d uncovered, findings %v", report.Entries, len(leaves)+2, report.Uncovered, report.Findings)
	}
	return nil
}

// record runs the series untouched and answers its calls.
func record(t *testing.T, dir string, env ...string) []call {
	t.Helper()
	name := filepath.Join(t.TempDir(), "calls")
	r := runFaulty(t, dir, fault{}, append(env, "YJ_RECORD="+name)...)
	if r.code != 0 || len(r.acks) != faultEntries {
		t.Fatalf("the untouched run: exit %d\n%s", r.code, r.text)
	}
	return readCalls(t, name)
}

func readCalls(t *testing.T, name string) (calls []call) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for d := json.NewDecoder(bufio.NewReader(f)); ; {
		var c call
		if err := d.Decode(&c); errors.Is(err, io.EOF) {
			return calls
		} else if err != nil {
			t.Fatal(err)
		}
		calls = append(calls, c)
	}
}

// seeded answers a generator; YINJIAN_SEED repeats it.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("YINJIAN_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("YINJIAN_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 5))
}

// TestEachCallFails fails the journal's calls in turn, or kills the process at them: every one with YINJIAN_LONG=1, else
// one of each class and phase in each way, and each write of one commit. What was acknowledged is there at the next
// start, which nothing blocks; what was refused as not recorded is not recorded by the same process; one error that
// passes does not keep a draft from being recorded in the end.
func TestEachCallFails(t *testing.T) {
	t.Parallel()
	rnd := seeded(t)
	// 1. What calls there are: those of a new journal, and of one that is opened again.
	first := filepath.Join(t.TempDir(), "journal")
	opened := filepath.Join(t.TempDir(), "journal")
	if r := runFaulty(t, opened, fault{Class: "sync wal", Phase: "append", K: 20, Action: "kill"}); r.code != -1 || len(r.acks) == 0 {
		t.Fatalf("the journal to go on with: exit %d\n%s", r.code, r.text)
	}
	again := filepath.Join(t.TempDir(), "journal")
	copyDir(t, opened, again)
	type series struct {
		name, dir string // dir: what it begins with; "": nothing
		env       []string
		calls     []call
	}
	all := []*series{{"new", "", nil, record(t, first)}, {"restored", opened, []string{"YJ_EPOCH=1", "YJ_BASE=1000"}, nil}}
	all[1].calls = record(t, again, all[1].env...)

	// 2. Which of them fail.
	type job struct {
		*series
		fault
	}
	var jobs []job
	actions := []string{"EIO", "ENOSPC", "kill", "EIO-stays", "short"}
	for _, s := range all {
		counts := map[[2]string]int{} // by class and phase
		for i := range s.calls {
			if c := &s.calls[i]; c.Op != "ack" {
				counts[[2]string{classOf(c), c.Phase}]++
			}
		}
		for at, n := range counts {
			for _, action := range actions {
				switch {
				case action == "short" && !strings.HasPrefix(at[0], "write"):
				case os.Getenv("YINJIAN_LONG") != "":
					// SQLite knows a full disk by its writes alone; elsewhere ENOSPC is an error like EIO.
					step := 4
					if action == "EIO" || action == "kill" || action == "ENOSPC" && strings.HasPrefix(at[0], "write") {
						step = 1
					}
					for k := rnd.IntN(min(step, n)); k < n; k += step {
						jobs = append(jobs, job{s, fault{at[0], at[1], k + 1, action}})
					}
				default:
					jobs = append(jobs, job{s, fault{at[0], at[1], 1 + rnd.IntN(n), action}})
				}
			}
		}
		if os.Getenv("YINJIAN_LONG") == "" {
			for k := range 12 { // every write of the log within a commit of three
				jobs = append(jobs, job{s, fault{"write wal", "append", 40 + k, []string{"EIO", "kill", "short"}[k%3]}})
			}
			// A rollback journal that cannot be removed once kept the journal from being read until the next start.
			jobs = append(jobs, job{s, fault{"unlink journal", "append", 1, "EIO"}})
		}
	}

	// 3. Each, in a folder of its own.
	var mu sync.Mutex
	ends := map[string]int{}
	work := make(chan job)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for w := range work {
				dir := filepath.Join(t.TempDir(), "journal")
				if w.dir != "" {
					copyDir(t, w.dir, dir)
				}
				r := runFaulty(t, dir, w.fault, w.env...)
				end := map[int]string{-1: "killed", 0: "went on", 4: "refused to open", 5: "closed for writing"}[r.code]
				switch {
				case end == "", end == "killed" && w.Action != "kill":
					t.Errorf("%s: %v: exit %d\n%s", w.name, w.fault, r.code, r.text)
				case !r.struck: // what is sealed and signed when differs from run to run
					end = "not reached"
				case end == "went on" && len(r.acks) != faultEntries && w.Action != "EIO-stays":
					t.Errorf("%s: %v: %d of %d entries were recorded in the end\n%s", w.name, w.fault, len(r.acks), faultEntries, r.text)
				}
				if err := reopened(dir, r.acks); err != nil {
					t.Errorf("%s: %v: the next start: %v\n%s", w.name, w.fault, err, r.text)
				}
				mu.Lock()
				ends[w.Action+": "+end]++
				mu.Unlock()
				os.RemoveAll(dir)
			}
		})
	}
	for _, w := range jobs {
		work <- w
	}
	close(work)
	workers.Wait()
	for _, end := range slices.Sorted(maps.Keys(ends)) {
		t.Logf("%-32s %d", end, ends[end])
	}
}
