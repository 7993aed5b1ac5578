package audit_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
)

// logKey is an SM2 key in memory, whose failures a callback decides.
type logKey struct {
	*sm2.PrivateKey
	fail *atomic.Pointer[error]
	n    *atomic.Int64
}

func newLogKey(t testing.TB) logKey {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return logKey{k, new(atomic.Pointer[error]), new(atomic.Int64)}
}

func (k logKey) SignMessage(_ context.Context, m []byte) ([]byte, error) {
	k.n.Add(1)
	if err := k.fail.Load(); err != nil {
		return nil, *err
	}
	return k.PrivateKey.SignWithSM2(rand.Reader, nil, m)
}

func (k logKey) Public() crypto.PublicKey { return &k.PublicKey }

func TestCheckpointIsVerifiedByOpenSSL(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	key := newLogKey(t)
	j := startMem(t, newMemStore(), func(c *audit.Config) { c.Checkpointer = key })
	r, err := j.Append(t.Context(), draft(1))
	if err != nil {
		t.Fatal(err)
	}
	c, err := j.WaitCheckpoint(t.Context(), r.Sequence)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := smx509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{
		"log.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), "note": c.Note, "note.sig": c.Signature,
		"other": append(bytes.Clone(c.Note), '\n'),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	verify := func(file string) string {
		cmd := exec.Command(openssl, "dgst", "-sm3", "-verify", "log.pem", "-sigopt", "distid:1234567812345678", "-signature", "note.sig", file)
		cmd.Dir = dir
		out, _ := cmd.CombinedOutput() // what it says is looked at
		return string(out)
	}
	if got := verify("note"); !strings.Contains(got, "Verified OK") {
		t.Errorf("openssl says %q of\n%s", got, c.Note)
	}
	if got := verify("other"); strings.Contains(got, "Verified OK") {
		t.Errorf("openssl says %q of another text", got)
	}
}

const note = `yinjian/journal/east/0102030405060708
378000
cqcFuTDP/3TUb9SP67Q0VP5rZFLdbZWP5T7+rnb1Vbc=
time 2026-03-01T08:00:00.123456Z
bound 3001
clock trusted
changes 12
previous 377990 JVpkhrHFqJjvjMZ2wZLo8kc1JQBN2GQ06QXz7Q2d3FA=
`

func TestParseCheckpoint(t *testing.T) {
	t.Parallel()
	c, err := audit.ParseCheckpoint([]byte(note), []byte("sig"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Node != "east" || c.Epoch.String() != "0102030405060708" || c.Size != 378000 || c.Time.BoundMicros != 3001 ||
		!c.Time.UTC().Equal(time.Date(2026, 3, 1, 8, 0, 0, 123456000, time.UTC)) || c.Changes != 12 || c.PreviousSize != 377990 {
		t.Errorf("ParseCheckpoint = %+v", c)
	}
	for name, edit := range map[string][2]string{
		"no line feed at the end": {"FA=\n", "FA="},
		"another line":            {"FA=\n", "FA=\nx\n"},
		"CR LF":                   {"trusted\n", "trusted\r\n"},
		"origin":                  {"yinjian/", "Yinjian/"},
		"no epoch":                {"/0102030405060708", ""},
		"upper-case epoch":        {"0102030405060708", "0102030405060A08"},
		"leading zero":            {"\n378000\n", "\n0378000\n"},
		"plus sign":               {"\n378000\n", "\n+378000\n"},
		"negative":                {"\n378000\n", "\n-1\n"},
		"beyond int64":            {"\n378000\n", "\n9223372036854775808\n"},
		"root's spare bits":       {"Vbc=", "Vbd="},
		"root unpadded":           {"Vbc=", "Vbc"},
		"five decimals":           {".123456Z", ".12345Z"},
		"offset":                  {"456Z", "456+00:00"},
		"30 February":             {"2026-03-01", "2026-02-30"},
		"bound":                   {"bound 3001", "bound -1"},
		"clock":                   {"clock trusted", "clock Trusted"},
		"two spaces":              {"bound 3001", "bound  3001"},
		"changes beyond size":     {"changes 12", "changes 378001"},
		"previous is later":       {"377990", "378001"},
		"previous is the same":    {"377990", "378000"},
		"previous 0 with a hash":  {"previous 377990", "previous 0"},
		"previous without a hash": {" JVpkhrHFqJjvjMZ2wZLo8kc1JQBN2GQ06QXz7Q2d3FA=", ""},
		"too long":                {"east", strings.Repeat("e", 1100)},
	} {
		in := strings.Replace(note, edit[0], edit[1], 1)
		if in == note {
			t.Fatalf("%s: nothing was changed", name)
		}
		if _, err := audit.ParseCheckpoint([]byte(in), nil); err == nil {
			t.Errorf("%s: ParseCheckpoint = nil, want an error", name)
		}
	}
	first := strings.Replace(note, "previous 377990 JVpkhrHFqJjvjMZ2wZLo8kc1JQBN2GQ06QXz7Q2d3FA=", "previous 0 -", 1)
	if _, err := audit.ParseCheckpoint([]byte(first), nil); err != nil {
		t.Errorf("the first checkpoint: %v", err)
	}
}

func TestVerifyCheckpointRefuses(t *testing.T) {
	t.Parallel()
	key, other := newLogKey(t), newLogKey(t)
	sig, err := key.SignMessage(t.Context(), []byte(note))
	if err != nil {
		t.Fatal(err)
	}
	good := func() *audit.Checkpoint {
		c, err := audit.ParseCheckpoint([]byte(note), sig)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if err := audit.VerifyCheckpoint(key.Public(), good()); err != nil {
		t.Fatal(err)
	}
	if audit.VerifyCheckpoint(other.Public(), good()) == nil {
		t.Error("another key's signature was taken")
	}
	if audit.VerifyCheckpoint("no key", good()) == nil {
		t.Error("something that is no key was taken")
	}
	c := good()
	c.Size++
	if audit.VerifyCheckpoint(key.Public(), c) == nil {
		t.Error("a field that differs from the text was taken")
	}
	c = good()
	c.Note = bytes.Replace(c.Note, []byte("3001"), []byte("3002"), 1)
	c.Time.BoundMicros = 3002
	if audit.VerifyCheckpoint(key.Public(), c) == nil {
		t.Error("another text was taken")
	}
}

func FuzzParseCheckpoint(f *testing.F) {
	f.Add([]byte(note))
	f.Add([]byte(strings.Replace(note, "previous 377990 JVpkhrHFqJjvjMZ2wZLo8kc1JQBN2GQ06QXz7Q2d3FA=", "previous 0 -", 1)))
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := audit.ParseCheckpoint(in, nil)
		if err == nil && !bytes.Equal(c.Note, in) {
			t.Errorf("%q was kept as %q", in, c.Note)
		}
	})
}

type stamper struct{ fail *atomic.Bool }

func (s stamper) Stamp(_ context.Context, data []byte) ([]byte, error) {
	if s.fail.Load() {
		return nil, errors.New("no time")
	}
	return append([]byte("token over "), data...), nil
}

// busy is a stamper and a log key whose cipher machine answers when the journal was told to stop, unless its caller went
// away before.
type busy struct {
	logKey
	begun, stopped chan struct{}
}

func (h busy) wait(ctx context.Context) error {
	select {
	case h.begun <- struct{}{}:
	default:
	}
	<-h.stopped
	select {
	case <-ctx.Done():
	case <-time.After(200 * time.Millisecond): // the stop has long come through
	}
	return ctx.Err()
}

func (h busy) Stamp(ctx context.Context, _ []byte) ([]byte, error) {
	return []byte("token"), h.wait(ctx)
}

func (h busy) SignMessage(ctx context.Context, m []byte) ([]byte, error) {
	if err := h.wait(ctx); err != nil {
		return nil, err
	}
	return h.logKey.SignMessage(ctx, m)
}

// What the cipher machine is making when the journal stops is waited for and stored: nothing could give account of it
// afterwards.
func TestStopWaitsForTheCipherMachine(t *testing.T) {
	t.Parallel()
	for _, stamping := range []bool{true, false} {
		store, key := newMemStore(), newLogKey(t)
		h := busy{logKey: key, begun: make(chan struct{}, 1), stopped: make(chan struct{})}
		j := openMem(t, store, func(c *audit.Config) {
			c.Checkpointer = key
			if !stamping {
				c.Checkpointer = h
			}
		})
		if stamping {
			j.SetStamper(h)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- j.Run(ctx) }()
		<-h.begun
		cancel()
		close(h.stopped)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		c, err := store.LastCheckpoint(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if stamping && string(c.Token) != "token" {
			t.Errorf("the token that was under way is not stored: %q", c.Token)
		}
		if n := key.n.Load(); n != 1 {
			t.Errorf("stamping %t: %d checkpoints signed, want the one that was under way", stamping, n)
		}
	}
}

// Neither a cipher machine that is locked nor one that fails holds an append up; checkpoints follow when it answers.
func TestCheckpointsFollow(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	j := startMem(t, store, nil)
	r, err := j.Append(t.Context(), draft(1))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := j.WaitCheckpoint(ctx, r.Sequence); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitCheckpoint without a key = %v, want %v", err, context.DeadlineExceeded)
	}
	key := newLogKey(t)
	j.SetCheckpointer(key)
	c, err := j.WaitCheckpoint(t.Context(), r.Sequence)
	if err != nil || c.PreviousSize != 0 {
		t.Fatalf("WaitCheckpoint = %+v, %v", c, err)
	}
	// Stamps: a stamper that comes later stamps the last checkpoint.
	var fail atomic.Bool
	j.SetStamper(stamper{&fail})
	waitFor(t, func() bool { c, _ := j.LastCheckpoint(); return c.Token != nil })
	if c, _ := j.LastCheckpoint(); string(c.Token) != "token over "+string(c.Signature) {
		t.Errorf("token = %q", c.Token)
	}
	fail.Store(true)
	failing := errors.New("cipher machine away")
	key.fail.Store(&failing)
	for i := range 10 {
		if r, err = j.Append(t.Context(), draft(i)); err != nil {
			t.Fatalf("Append while nothing is signed: %v", err)
		}
	}
	if _, err := j.WaitCheckpoint(t.Context(), r.Sequence); !errors.Is(err, audit.ErrNoCheckpoint) {
		t.Errorf("WaitCheckpoint = %v, want %v", err, audit.ErrNoCheckpoint)
	}
	key.fail.Store(nil)
	d, err := j.WaitCheckpoint(t.Context(), r.Sequence)
	if err != nil || d.PreviousSize != c.Size || d.PreviousHash != audit.Sum(c.Note) {
		t.Errorf("WaitCheckpoint = %+v, %v, want one after size %d", d, err, c.Size)
	}
	if got, err := j.CheckpointFor(t.Context(), 0); err != nil || got.Size != c.Size {
		t.Errorf("CheckpointFor(0) = %d, %v, want %d", got.Size, err, c.Size)
	}
	// None when idle.
	n := key.n.Load()
	time.Sleep(50 * time.Millisecond)
	if got := key.n.Load(); got != n {
		t.Errorf("%d signatures while idle", got-n)
	}
	rep, err := audit.Verify(t.Context(), store, audit.Options{LogKey: key.Public()})
	if err != nil || !rep.OK() || rep.Tokens != 1 || rep.Uncovered != 0 {
		t.Errorf("Verify = %+v, %v", rep, err)
	}
}

// A key that signs something else never gets its checkpoint stored.
func TestBadSignatureIsWithheld(t *testing.T) {
	t.Parallel()
	store := newMemStore()
	key := newLogKey(t)
	j := startMem(t, store, func(c *audit.Config) { c.Checkpointer = liar{key} })
	if _, err := j.Append(t.Context(), draft(1)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return key.n.Load() > 0 })
	if _, err := j.LastCheckpoint(); !errors.Is(err, audit.ErrNotFound) {
		t.Errorf("LastCheckpoint = %v, want %v", err, audit.ErrNotFound)
	}
}

type liar struct{ logKey }

func (l liar) SignMessage(ctx context.Context, m []byte) ([]byte, error) {
	return l.logKey.SignMessage(ctx, append([]byte("x"), m...))
}

// FuzzParseSeal: what parses is what was written.
func FuzzParseSeal(f *testing.F) {
	f.Add(make([]byte, 96))
	f.Add(audit.Seal{Segment: 3, First: 1, Last: 1 << 40, Count: 9, Root: audit.Hash{1}, Leaves: audit.Hash{2}}.Marshal())
	f.Add(bytes.Repeat([]byte{0xff}, 96))
	f.Fuzz(func(t *testing.T, in []byte) {
		if s, err := audit.ParseSeal(in); err == nil && !bytes.Equal(s.Marshal(), in) {
			t.Errorf("%x becomes %x", in, s.Marshal())
		}
	})
}

// A change of state has its checkpoint at once where another appliance waits for it, and other entries wait.
func TestPromptCheckpoint(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	j := startMem(t, newMemStore(), func(c *audit.Config) { c.Checkpointer = key })
	if _, err := j.WaitCheckpoint(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	j.SetCheckpointEvery(time.Hour)
	j.SetPrompt(true)
	change := func() error {
		t.Helper()
		d := draft(1)
		d.State = true
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		_, err = j.WaitCheckpoint(t.Context(), r.Sequence)
		return err
	}
	for range 3 {
		if err := change(); err != nil {
			t.Fatalf("a change of state: %v", err)
		}
	}
	r, err := j.Append(t.Context(), draft(1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.WaitCheckpoint(t.Context(), r.Sequence); !errors.Is(err, audit.ErrNoCheckpoint) {
		t.Errorf("another entry: %v, want %v", err, audit.ErrNoCheckpoint)
	}
	j.SetPrompt(false)
	if err := change(); !errors.Is(err, audit.ErrNoCheckpoint) {
		t.Errorf("a change that nobody waits for: %v, want %v", err, audit.ErrNoCheckpoint)
	}
}

// Changes are had from a number on.
func TestChangesFrom(t *testing.T) {
	t.Parallel()
	j := startMem(t, newMemStore(), nil)
	for i := range 9 {
		d := draft(i)
		d.State = i%2 == 1
		if _, err := j.Append(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	if n := j.Changed(); n != 5 { // that of the epoch is one
		t.Errorf("Changed = %d, want 5", n)
	}
	for from, want := range map[uint64]string{0: "[0 2 4 6]", 1: "[2 4 6]", 2: "[2 4 6]", 5: "[6]", 7: "[]"} {
		got := []uint64{}
		if err := j.Changes(t.Context(), from, 8, func(r audit.Record) error { got = append(got, r.Sequence); return nil }); err != nil || fmt.Sprint(got) != want {
			t.Errorf("Changes from %d = %v, %v, want %s", from, got, err, want)
		}
	}
}
