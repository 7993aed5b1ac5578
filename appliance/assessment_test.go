package appliance_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"yinjian/appliance"
	"yinjian/appliance/assess/trial"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/dbdriver/sqlite"
)

// The drill on a copy of a segment finds the bit that it flipped; a flip that is not found makes it fail, and the journal itself is not
// touched.
func TestDrillOfASegment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(dir, "journal")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := appliance.DrillSegment(t.Context(), store, dir, true); !appliance.NotEvidenced(err) {
		t.Errorf("an empty journal: %v", err)
	}
	j := openJournal(t, store)
	for i := range 9 {
		if _, err := j.Append(t.Context(), audit.Draft{Kind: "test.v1", Actor: "test", Object: strings.Repeat("x", i+1), Payloads: []audit.Attachment{
			{Name: "own", MediaType: "text/plain", Data: []byte{byte(i)}}, {Name: "shared", MediaType: "text/plain", Data: []byte("shared"), Shared: true},
		}}); err != nil {
			t.Fatal(err)
		}
	}
	before := filesOf(t, filepath.Join(dir, "journal"))
	if err := appliance.DrillSegment(t.Context(), store, dir, true); err != nil {
		t.Error(err)
	}
	if err := appliance.DrillSegment(t.Context(), store, dir, false); err == nil || appliance.NotEvidenced(err) {
		t.Errorf("nothing was flipped: %v", err)
	}
	if !bytes.Equal(before, filesOf(t, filepath.Join(dir, "journal"))) {
		t.Error("the journal was changed")
	}
	if left, err := filepath.Glob(filepath.Join(dir, "run", "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func filesOf(t *testing.T, dir string) []byte {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.db*"))
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	var all []byte
	for _, name := range names {
		if strings.HasSuffix(name, "-shm") { // SQLite's own memory
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return all
}

// The process that tests random numbers takes a set's bytes and no others.
func TestServeRandomTests(t *testing.T) {
	t.Parallel()
	zeros := make([]byte, trial.Periodic.Bytes())
	for name, in := range map[string]string{"no set": string(zeros), "another set": "other\n" + string(zeros), "too short": "periodic\n" + string(zeros[1:]), "too long": "periodic\n" + string(zeros) + "0"} {
		if err := appliance.ServeRandomTests(strings.NewReader(in), io.Discard); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	var out bytes.Buffer
	if err := appliance.ServeRandomTests(strings.NewReader("periodic\n"+string(zeros)), &out); err != nil || !strings.Contains(out.String(), `"passed":false`) {
		t.Errorf("%s, %v", &out, err)
	}
}

func openJournal(t *testing.T, store *sqlite.Journal) *audit.Journal {
	t.Helper()
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	j, err := audit.Open(t.Context(), audit.Config{Store: store, Node: "benbu-1", Clock: testkit.NewClock(), Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- j.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return j
}
