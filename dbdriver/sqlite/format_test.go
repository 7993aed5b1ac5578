package sqlite_test

import (
	"archive/tar"
	"compress/gzip"
	"crypto"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// format1 unpacks a journal that was written when segments had format 1, by [written], and answers its folder and the
// log's key.
func format1(t *testing.T) (string, crypto.PublicKey) {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "format1.tar.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "journal")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var key crypto.PublicKey
	for in := tar.NewReader(z); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return dir, key
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(h.Name) == "log.pub" {
			point, err := hex.DecodeString(strings.TrimSpace(string(data)))
			if err != nil {
				t.Fatal(err)
			}
			if key, err = sm2.NewPublicKey(point); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(h.Name)), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func formatOf(t *testing.T, dir, file string) (n int) {
	t.Helper()
	db := raw(t, filepath.Join(dir, file))
	defer db.Close()
	if err := db.QueryRow(`SELECT format_no FROM yj_segment`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// A journal of format 1 is read as it is, goes on in format 2 until its active segment is full, then in the present one, and
// its sealed segments stay untouched.
func TestFormat1(t *testing.T) {
	t.Parallel()
	dir, key := format1(t)
	if r := verify(t, dir, audit.Options{LogKey: key}); !r.OK() || r.Uncovered != 0 || r.Entries != 131 || r.Payloads != 256 {
		t.Fatalf("as it was: %+v", r)
	}
	if n := formatOf(t, dir, seg3); n != 1 {
		t.Fatalf("reading only has brought it to format %d", n)
	}
	sealed := map[string]string{}
	for _, f := range []string{seg1, seg2} {
		b, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		sealed[f] = string(b)
	}

	j := start(t, openStore(t, dir, segments50), nil)
	appendN(t, j.Journal, 128, 40)                       // over the end of the third segment
	for _, i := range []int{3, 60, 127, 128, 150, 167} { // of a sealed segment, of the upgraded one before and after, of the fourth
		found, err := j.ByRef(t.Context(), refOf(i))
		if err != nil || len(found) != 1 {
			t.Fatalf("entry %d: %d, %v", i, len(found), err)
		}
		for name, want := range map[string]string{"signature": "signature value " + num(uint64(i)), "certificate": "certificate " + num(uint64(i%7))} {
			if data, err := j.Payload(t.Context(), &found[0].Entry, name); err != nil || string(data) != want {
				t.Errorf("entry %d: %s %q, %v", i, name, data, err)
			}
		}
	}
	j.stop()
	for f, was := range sealed {
		if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || string(b) != was {
			t.Errorf("%s was changed (%v)", f, err)
		}
	}
	for file, want := range map[string]int{seg1: 1, seg2: 1, seg3: 2, "journal-000004.db": 3} {
		if n := formatOf(t, dir, file); n != want {
			t.Errorf("%s has format %d, want %d", file, n, want)
		}
	}
	if r := verify(t, dir, audit.Options{LogKey: key}); !r.OK() || r.Payloads != 256+80 {
		t.Errorf("afterwards: %s, %+v", list(r), r)
	}
}

// Each format has its own schema: what the one has is a change in the other.
func TestFormat1Changed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ file, do, want string }{
		"a sealed one has the later column": {seg2, `ALTER TABLE yj_entry ADD COLUMN own_data BLOB`, "table yj_entry was changed"},
		"a sealed one calls itself later":   {seg2, `UPDATE yj_segment SET format_no = 2`, "table yj_entry was changed"},
		"a trigger in the active one":       {seg3, `CREATE TRIGGER t BEFORE INSERT ON yj_entry BEGIN SELECT 1; END`, `trigger "t" on "yj_entry" was added`},
		"a format to come":                  {seg3, `UPDATE yj_segment SET format_no = 4`, "segment format is not known: 4"},
		"no format":                         {seg3, `UPDATE yj_segment SET format_no = 0`, "segment format is not known: 0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, _ := format1(t)
			db := raw(t, filepath.Join(dir, c.file))
			if _, err := db.Exec(c.do); err != nil {
				t.Fatal(err)
			}
			db.Close()
			before := formatOf(t, dir, c.file)
			s, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: dir})
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("OpenJournal = %v, want %q", err, c.want)
			}
			if n := formatOf(t, dir, c.file); n != before {
				t.Errorf("it has format %d now", n)
			}
		})
	}
}
