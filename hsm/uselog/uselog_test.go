package uselog_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/hsm"
	"yinjian/hsm/uselog"
)

func TestMain(m *testing.M) {
	uselog.SetFileUses(100)
	os.Exit(m.Run())
}

func open(t testing.TB, dir string) *uselog.Log {
	t.Helper()
	l, err := uselog.Open(dir, "staff", uselog.Hash{1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func add(t testing.TB, l *uselog.Log, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := l.Add(fmt.Sprintf("key/%d", i%3), hsm.SignRSASHA256, make([]byte, 32), fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
}

// read answers the numbers of the uses that are new.
func read(t *testing.T, r *uselog.Reader) (numbers []uint64, err error) {
	t.Helper()
	err = r.Next(func(rec uselog.Record) error {
		if rec.Kind == uselog.Use {
			numbers = append(numbers, rec.Number)
		}
		return nil
	})
	return numbers, err
}

func reader(t *testing.T, dir string, from *uselog.Position) *uselog.Reader {
	t.Helper()
	r, err := uselog.OpenReader(dir, "staff", from)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func oneTo(from, to uint64) (out []uint64) {
	for n := from; n <= to; n++ {
		out = append(out, n)
	}
	return out
}

func uses(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "staff-*.uses"))
	if err != nil || len(names) == 0 {
		t.Fatalf("files: %v, %v", names, err)
	}
	return names
}

// A log is read while it grows over several files, from a kept position, and after the worker was started again; files
// that were read can go.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	r := reader(t, dir, nil)
	if got, err := read(t, r); len(got) != 0 || err != nil {
		t.Fatalf("before there is a log: %v, %v", got, err)
	}
	l := open(t, dir)
	add(t, l, 0, 150)
	if got, err := read(t, r); !slices.Equal(got, oneTo(1, 150)) || err != nil {
		t.Fatalf("read %d uses, %v", len(got), err)
	}
	at := r.Position()
	add(t, l, 150, 155)
	l.Close()
	l = open(t, dir)
	add(t, l, 155, 350)
	if err := r.Prune(); err != nil {
		t.Fatal(err)
	}
	if n := len(uses(t, dir)); n != 3 {
		t.Errorf("%d files after pruning, want 3", n)
	}
	for _, r := range []*uselog.Reader{r, reader(t, dir, &at)} {
		if got, err := read(t, r); !slices.Equal(got, oneTo(151, 350)) || err != nil {
			t.Errorf("read %v, %v", got, err)
		}
		if c := r.Counters(); c["key/0"] != 117 || c["key/1"] != 117 || c["key/2"] != 116 {
			t.Errorf("counters %v", c)
		}
	}
}

// Goroutines may add at once, and a reader beside them sees each use once.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	r := reader(t, dir, nil)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() { add(t, l, g*100, g*100+100) })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	var all []uint64
	for last := false; !last; {
		select {
		case <-done:
			last = true
		default:
		}
		got, err := read(t, r)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, got...)
	}
	if !slices.Equal(all, oneTo(1, 800)) {
		t.Errorf("read %d uses", len(all))
	}
}

// The three forms in which a module and the product give one signature have one digest.
func TestDigest(t *testing.T) {
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for range 200 { // some have a short r or s
		der, err := key.Sign(rand.Reader, make([]byte, 32), nil)
		if err != nil {
			t.Fatal(err)
		}
		r, s, err := hsm.NormalizeSM2(der)
		if err != nil {
			t.Fatal(err)
		}
		raw := append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		if uselog.Digest(hsm.SignSM2E, der) != uselog.Digest(hsm.SignSM2E, raw) {
			t.Fatalf("%x and %x have two digests", der, raw)
		}
	}
}

// One process writes.
func TestOneWriter(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	if l, err := uselog.Open(dir, "staff", uselog.Hash{}); err == nil {
		l.Close()
		t.Error("opened twice")
	}
}

// What a power cut leaves of a last record is no damage.
func TestTornTail(t *testing.T) {
	for name, tail := range map[string][]byte{
		"half a record": {0, 150, 4, 1, 0}, "zeros": make([]byte, 4096), "half a record and zeros": append([]byte{0, 150, 4, 1, 0, 0, 0, 7}, make([]byte, 4096)...),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			add(t, l, 0, 10)
			l.Close()
			r := reader(t, dir, nil)
			if _, err := read(t, r); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(uses(t, dir)[0], os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			f.Write(tail)
			f.Close()
			add(t, open(t, dir), 10, 15)
			if got, err := read(t, r); !slices.Equal(got, oneTo(11, 15)) || err != nil {
				t.Errorf("read %v, %v", got, err)
			}
		})
	}
}

// Each way of changing the files behind the reader's back is named, and the log goes on.
func TestDamage(t *testing.T) {
	edit := func(at int) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			name := uses(t, dir)[0]
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			b[at] ^= 1
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	size := func(t *testing.T, dir string) int64 {
		st, err := os.Stat(uses(t, dir)[0])
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	for name, tt := range map[string]struct {
		change func(t *testing.T, dir string)
		what   string
	}{
		"edited":    {edit(1000), "changed"},
		"beginning": {edit(3), "missing"}, // set aside by the worker
		"cut":       {func(t *testing.T, dir string) { os.Truncate(uses(t, dir)[0], size(t, dir)-100) }, "changed"},
		"deleted":   {func(t *testing.T, dir string) { os.Remove(uses(t, dir)[0]) }, "changed"},
		"another's chain": {func(t *testing.T, dir string) {
			other := t.TempDir()
			add(t, open(t, other), 100, 150)
			b, _ := os.ReadFile(uses(t, other)[0])
			os.WriteFile(uses(t, dir)[0], b, 0o600)
		}, "changed"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			add(t, l, 0, 50)
			l.Close()
			r := reader(t, dir, nil)
			if _, err := read(t, r); err != nil {
				t.Fatal(err)
			}
			at := r.Position()
			tt.change(t, dir)
			add(t, open(t, dir), 50, 60)
			_, err := uselog.OpenReader(dir, "staff", &at)
			var d *uselog.Damage
			if !errors.As(err, &d) || d.Number != 50 {
				t.Fatalf("OpenReader = %v, want a damage at use 50", err)
			}
			if name == "beginning" || name == "deleted" {
				// The worker began anew; a file of the same name may be there.
				return
			}
			if d.What != tt.what {
				t.Errorf("what = %q, want %q", d.What, tt.what)
			}
			fresh := reader(t, dir, nil)
			got, err := read(t, fresh)
			if errors.As(err, &d) { // told once
				var more []uint64
				more, err = read(t, fresh)
				got = append(got, more...)
			}
			if err != nil || len(got) < 10 {
				t.Errorf("read anew: %d uses, %v", len(got), err)
			}
		})
	}
}

// A log that cannot be written to says so, loses nothing it had, and goes on when there is room.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	add(t, l, 0, 10)
	st, err := os.Stat(uses(t, dir)[0])
	if err != nil {
		t.Fatal(err)
	}
	var had syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &had); err != nil {
		t.Fatal(err)
	}
	limit := had
	limit.Cur = uint64(st.Size()) + 300 // part of the next record fits; Go's runtime turns SIGXFSZ into EFBIG
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	err = l.Add(strings.Repeat("k", 255), hsm.SignSM2E, make([]byte, 32), []byte("x"))
	if rerr := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &had); rerr != nil {
		t.Fatal(rerr)
	}
	if !errors.Is(err, syscall.EFBIG) {
		t.Fatalf("Add = %v, want EFBIG", err)
	}
	add(t, l, 10, 11) // shorter than what the other had left
	if got, err := read(t, reader(t, dir, nil)); !slices.Equal(got, oneTo(1, 11)) || err != nil {
		t.Errorf("read %v, %v", got, err)
	}
}

// What is read from a file may be anything.
func FuzzReader(f *testing.F) {
	seed := f.TempDir()
	l := open(f, seed)
	add(f, l, 0, 3)
	l.Close()
	names, _ := filepath.Glob(filepath.Join(seed, "*.uses"))
	b, err := os.ReadFile(names[0])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(bytes.Repeat([]byte{0}, 200))
	dir := f.TempDir()
	name := filepath.Join(dir, filepath.Base(names[0]))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		r := reader(t, dir, nil)
		if _, err := read(t, r); err != nil {
			var d *uselog.Damage
			if !errors.As(err, &d) {
				t.Fatal(err)
			}
		}
		at := r.Position()
		if _, err := uselog.OpenReader(dir, "staff", &at); err != nil && at.Offset > 0 {
			t.Errorf("a position that was read does not open: %v", err)
		}
	})
}

func BenchmarkAdd(b *testing.B) {
	uselog.SetFileUses(1 << 16)
	l := open(b, b.TempDir())
	key, _ := sm2.GenerateKey(rand.Reader)
	sig, err := key.Sign(rand.Reader, make([]byte, 32), nil)
	if err != nil {
		b.Fatal(err)
	}
	digest := make([]byte, 32)
	b.ResetTimer()
	for b.Loop() {
		if err := l.Add("signer/D001/sm2", hsm.SignSM2E, digest, sig); err != nil {
			b.Fatal(err)
		}
	}
}

// What was added is synced soon, also where a sync fails at first, and a file before the next one takes its place.
func TestSync(t *testing.T) { // not parallel: it changes how logs are synced
	var mu sync.Mutex
	synced := map[string]int64{} // sizes
	failures := 2
	undo := uselog.SetSync(5*time.Millisecond, func(f *os.File) error {
		mu.Lock()
		defer mu.Unlock()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if len(synced) > 0 && failures > 0 {
			failures--
			return syscall.EIO
		}
		synced[filepath.Base(f.Name())] = st.Size()
		return nil
	})
	defer undo()
	dir := t.TempDir()
	l := open(t, dir)
	size := func(name string) (int64, int64) {
		st, err := os.Stat(filepath.Join(dir, strings.TrimSuffix(name, ".new")))
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		defer mu.Unlock()
		return synced[name], st.Size()
	}
	first := fmt.Sprintf("staff-%020d.uses.new", 0) // as it was opened
	if got, want := size(first); got != want {
		t.Errorf("%d of %d bytes are on the disk, and the log is open", got, want)
	}
	add(t, l, 0, 10)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		got, want := size(first)
		if got == want {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d bytes are on the disk", got, want)
		}
	}
	add(t, l, 10, 101)
	if got, want := size(first); got != want {
		t.Errorf("%d of %d bytes are on the disk, and there is a second file", got, want)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	second := fmt.Sprintf("staff-%020d.uses.new", 100)
	if got, want := size(second); got != want {
		t.Errorf("%d of %d bytes are on the disk, and the log is closed", got, want)
	}
}

// A reader's memory is used again: what comes after much, or after little, is read as it was written.
func TestReaderMemory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l, err := uselog.Open(dir, "staff", uselog.Hash{1})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, err := uselog.OpenReader(dir, "staff", nil)
	if err != nil {
		t.Fatal(err)
	}
	written := 0
	for _, n := range []int{3, 40, 1, 2 * uselog.MaxBuffer / 300, 2, 7} { // a record has some 380 bytes here
		var want, got []string
		for range n {
			written++
			label := fmt.Sprintf("%d/%s", written, strings.Repeat("k", 240))
			want = append(want, label)
			if err := l.Add(label, hsm.SignSM2E, make([]byte, 32), fmt.Append(nil, written)); err != nil {
				t.Fatal(err)
			}
		}
		err := r.Next(func(rec uselog.Record) error {
			if rec.Kind == uselog.Use {
				got = append(got, rec.Label)
			}
			return nil
		})
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("of %d: %d records, %v", n, len(got), err)
		}
	}
}
