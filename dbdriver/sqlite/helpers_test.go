package sqlite_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"database/sql"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp"
)

// quiet is a logger for tests that expect errors to be logged.
func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// steps is a clock that moves by a millisecond with each reading.
type steps struct {
	mu  sync.Mutex
	now time.Time
	// cold makes it a clock that was not trusted yet, and shows no date.
	cold bool
}

func newClock() *steps {
	return &steps{now: time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC)}
}

func (c *steps) Now() ntp.Reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(time.Millisecond)
	if c.cold {
		return ntp.Reading{State: ntp.Cold}
	}
	return ntp.Reading{Time: c.now, Bound: 3 * time.Millisecond, State: ntp.Trusted, Provenance: "test"}
}

func (c *steps) set(cold bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cold = cold
}

func (c *steps) jump(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// logKey is an SM2 key in memory, as CheckpointSigner.
type logKey struct{ *sm2.PrivateKey }

func newLogKey(t testing.TB) logKey {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return logKey{k}
}

func (k logKey) SignMessage(_ context.Context, m []byte) ([]byte, error) {
	return k.PrivateKey.SignWithSM2(rand.Reader, nil, m)
}

func (k logKey) Public() crypto.PublicKey { return &k.PublicKey }

// nodeNo is the number of an inner node in a segment's file: levels 1 to 6 first, then 7 to 12, …; in each by the last leaf.
func nodeNo(level, index int) string {
	return fmt.Sprint(uint64((level-1)/6)*0x200000000000000 + uint64((index+1)<<level-1)*64 + uint64(level))
}

// running is a journal over a store, with Run in the background.
type running struct {
	*audit.Journal
	store *sqlite.Journal
	stop  func()
}

func start(t testing.TB, store *sqlite.Journal, change func(*audit.Config)) *running {
	t.Helper()
	cfg := audit.Config{
		Store: store, Node: "east", Clock: newClock(), Log: quiet(), CheckpointEvery: 5 * time.Millisecond,
	}
	if change != nil {
		change(&cfg)
	}
	j, err := audit.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- j.Run(ctx) }()
	var once sync.Once
	r := &running{Journal: j, store: store}
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run = %v", err)
			}
			if err := store.Close(); err != nil {
				t.Errorf("closing store: %v", err)
			}
		})
	}
	t.Cleanup(r.stop)
	return r
}

func openStore(t testing.TB, dir string, change func(*sqlite.JournalConfig)) *sqlite.Journal {
	t.Helper()
	cfg := sqlite.JournalConfig{Dir: dir}
	if change != nil {
		change(&cfg)
	}
	s, err := sqlite.OpenJournal(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func refOf(i int) []byte {
	h := sm3.Sum(fmt.Appendf(nil, "record %d", i))
	return h[:]
}

// signDraft is like a signature's entry.
func signDraft(i int) audit.Draft {
	return audit.Draft{
		Kind: "sign.v1", Actor: "app/emr", Object: fmt.Sprintf("signer/%d", i%7), Ref: refOf(i), Unique: true,
		Fields: []audit.Field{
			{Name: audit.FieldApplication, Value: audit.Text("emr")}, {Name: audit.FieldSigner, Value: audit.Text(fmt.Sprintf("staff-%d", i%7))},
			{Name: audit.FieldDepartment, Value: audit.Text("心内科")}, {Name: "document.size", Value: audit.Int(i)},
		},
		Payloads: []audit.Attachment{
			{Name: "signature", MediaType: "application/cms", Data: fmt.Appendf(nil, "signature value %d", i)},
			{Name: "certificate", MediaType: "application/pkix-cert", Data: fmt.Appendf(nil, "certificate %d", i%7), Shared: true},
		},
	}
}

func appendN(t testing.TB, j *audit.Journal, from, n int) (last audit.Receipt) {
	t.Helper()
	for i := from; i < from+n; i++ {
		var err error
		if last, err = j.Append(t.Context(), signDraft(i)); err != nil {
			t.Fatalf("Append %d: %v", i, err)
		}
	}
	return last
}

// verify reads a folder as the offline verifier does.
func verify(t testing.TB, dir string, opt audit.Options) *audit.Report {
	t.Helper()
	s := openStore(t, dir, func(c *sqlite.JournalConfig) { c.ReadOnly = true })
	defer s.Close()
	r, err := audit.Verify(t.Context(), s, opt)
	if err != nil {
		t.Fatalf("Verify: %v", err)
	}
	opt.Workers = 3
	if several, err := audit.Verify(t.Context(), s, opt); err != nil || !reflect.DeepEqual(several, r) {
		t.Errorf("by three goroutines: %+v, %v\nby one: %+v", several, err, r)
	}
	return r
}

// edit runs statements on one file behind the journal's back.
func edit(t testing.TB, dir, file string, stmts ...string) {
	t.Helper()
	db, err := sql.Open("sqlite3", filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, s := range stmts {
		res, err := db.Exec(s)
		if err != nil {
			t.Fatalf("%s: %v", s, err)
		}
		if n, _ := res.RowsAffected(); n == 0 {
			t.Fatalf("%s: no row was touched", s)
		}
	}
}

// raw opens a file as anybody could.
func raw(t testing.TB, file string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite3", file)
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	return db
}

func num(n uint64) string { return fmt.Sprint(n) }

func copyDir(t testing.TB, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// fixedKey is the key of the journals that several processes write.
var fixedKey = func() logKey {
	k, err := sm2.NewPrivateKey(bytes.Repeat([]byte{0x5A}, 32))
	if err != nil {
		panic(err)
	}
	return logKey{k}
}()
