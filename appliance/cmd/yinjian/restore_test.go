package main_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

// TestTwoRestores begins a restore while another is under way to the same folder: it leaves what the first has written.
func TestTwoRestores(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	written := filepath.Join(dir, "log.pem")
	mark, err := os.Create(filepath.Join(dir, appliance.RestoreUnfinished))
	if err == nil {
		err = os.WriteFile(written, []byte("restored"), 0o600)
	}
	if err == nil {
		err = unix.Flock(int(mark.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"restore", "--dir", dir, filepath.Join(tempDir(t), "none.yjb"), "--confirmed-by", "甲", "--confirmed-by", "乙"}
	refused(t, 1, []string{"另一个 restore"}, args...)
	if _, err := os.Stat(written); err != nil {
		t.Error(err)
	}
	mark.Close()
	refused(t, 1, []string{"none.yjb"}, args...) // what one that was cut off left goes
	if _, err := os.Stat(written); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}

// TestRestoredCopy puts an old copy of the journal back, taken while the appliance ran or after it was stopped, when more
// was signed since. Without the operator's word it is refused; with it a new epoch begins, no serial and no (epoch,
// sequence) stands for two things, and everybody who kept something of the newer history names it.
func TestRestoredCopy(t *testing.T) {
	t.Parallel()
	for _, running := range []bool{true, false} {
		t.Run(map[bool]string{true: "copied while running", false: "copied when stopped"}[running], func(t *testing.T) {
			t.Parallel()
			dir := initAppliance(t, startTimeServer(t))
			journal, old, newer := filepath.Join(dir, "journal"), filepath.Join(tempDir(t), "old"), filepath.Join(tempDir(t), "newer")
			m := serve(t, dir)
			m.trusted(t)
			m.enrol(t, "D1", "")
			c := m.register(t, "his", "--consent", "app-asserted")
			made := map[string]*wire.SignResult{}
			signs := func(from, n int) {
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
			evidenceOf := func(key string) string {
				t.Helper()
				b, err := c.Evidence(t.Context(), made[key].RecordID)
				if err != nil {
					t.Fatal(err)
				}
				name := filepath.Join(tempDir(t), "evidence.json")
				if err := os.WriteFile(name, b, 0o600); err != nil {
					t.Fatal(err)
				}
				return name
			}
			judged := func(key, file string) {
				t.Helper()
				document := filepath.Join(filepath.Dir(file), "document")
				if err := os.WriteFile(document, documentOf(key), 0o600); err != nil {
					t.Fatal(err)
				}
				mustRun(t, "verify", "--anchors", dir, "--log-key", filepath.Join(dir, "log.pem"), "--document", document, file)
			}

			// 1. The copy, and what is signed after it.
			signs(0, 5)
			early := evidenceOf("record-0")
			if running {
				replace(t, old, journal)
			}
			m.stop(t)
			if !running {
				replace(t, old, journal)
			}
			m = serve(t, dir)
			m.trusted(t)
			c = m.client(t, "his")
			signs(5, 12)
			late := evidenceOf("record-16")
			m.mustBeClean(t) // all of it is in the projection, which is kept
			m.stop(t)
			replace(t, newer, journal)

			// 2. Put back without a word: refused, and again.
			replace(t, journal, old)
			refusesToServe(t, dir, "journal.head")
			refusesToServe(t, dir, "journal.head")
			refused(t, 1, []string{}, "audit", "verify", "--dir", dir, "--known", late)

			// 3. With it.
			if err := os.WriteFile(filepath.Join(dir, "restored"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			m = serve(t, dir)
			m.trusted(t)
			c = m.client(t, "his")
			signs(20, 12)
			if made["record-20"].Epoch == made["record-16"].Epoch {
				t.Error("no new epoch after the restore")
			}
			judged("record-0", early)
			judged("record-16", late) // acknowledged and lost by the restore: its evidence stands by itself
			judged("record-20", evidenceOf("record-20"))
			_, err := c.Evidence(t.Context(), made["record-16"].RecordID)
			wantCode(t, err, "not_found")
			// Who kept something of the newer history names it: the projection's rows, a checkpoint.
			o := yinjian(t, "db", "compare", "--dir", dir, "-o", "json")
			if o.code != 1 || !strings.Contains(o.stdout, string(audit.RowBeyondJournal)) {
				t.Errorf("db compare: %v", o)
			}
			if o := yinjian(t, "audit", "verify", "--dir", dir, "--known", late); o.code != 1 || !strings.Contains(o.stdout, "✗") {
				t.Errorf("audit verify --known: %v", o)
			}
			if o := yinjian(t, "audit", "verify", "--dir", dir, "--known", early); o.code != 0 {
				t.Errorf("audit verify with a checkpoint from before the copy: %v", o)
			}
			m.stop(t)
			// 4. Both histories together.
			noneTwice(t, newer, journal)
		})
	}
}

// noneTwice reads journals that have a beginning in common: each (epoch, sequence) is one entry, each serial one token.
func noneTwice(t *testing.T, dirs ...string) {
	t.Helper()
	leaves, serials := map[string][]byte{}, map[string]string{}
	for _, dir := range dirs {
		store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: dir, ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		segments, err := store.Segments(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, segment := range segments {
			err := store.Rows(t.Context(), segment.Number, 0, func(r audit.Row) error {
				e, err := audit.ParseEntry(r.DER)
				if err != nil {
					return err
				}
				place := fmt.Sprint(e.Epoch, " ", e.Sequence)
				if leaf := leaves[place]; leaf != nil && !bytes.Equal(leaf, r.Leaf) {
					t.Errorf("%s stands for two entries", place)
				}
				leaves[place] = r.Leaf
				for _, name := range []string{"token.serial", "serial"} {
					if v, ok := e.Field(name).(audit.Octets); ok {
						serial := hex.EncodeToString(v)
						if at := serials[serial]; at != "" && at != place {
							t.Errorf("serial %s at %s and at %s", serial, at, place)
						}
						serials[serial] = place
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(serials) < 20 {
		t.Errorf("%d serials: %v", len(serials), slices.Collect(maps.Keys(serials)))
	}
}

// TestForkAlarm: whoever puts back an old copy with the head file of that time is not refused, there is nothing on the
// machine that tells. The projection does: it has other entries under the same numbers, and says so for ever.
func TestForkAlarm(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	old := filepath.Join(tempDir(t), "old")
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	var c *client.Client
	signs := func(name string, n int) {
		t.Helper()
		for i := range n {
			key := fmt.Sprintf("%s-%d", name, i)
			if _, err := c.Sign(t.Context(), key, asserted("D1", key)); err != nil {
				t.Fatal(err)
			}
		}
	}
	c = m.register(t, "his", "--consent", "app-asserted")
	signs("before", 2)
	m.stop(t)
	head, err := os.ReadFile(filepath.Join(dir, "journal.head"))
	if err != nil {
		t.Fatal(err)
	}
	replace(t, old, filepath.Join(dir, "journal"))
	m = serve(t, dir)
	m.trusted(t)
	c = m.client(t, "his")
	signs("newer", 3)
	m.mustBeClean(t)
	m.stop(t)

	replace(t, filepath.Join(dir, "journal"), old)
	if err := os.WriteFile(filepath.Join(dir, "journal.head"), head, 0o600); err != nil {
		t.Fatal(err)
	}
	m = serve(t, dir)
	m.trusted(t)
	eventually(t, readyWithin, "the fork alarm", func() bool { return strings.Contains(strings.Join(m.state(t).Warnings, " "), "fork") })
	if o := yinjian(t, "db", "compare", "--dir", dir, "-o", "json"); o.code != 1 || !strings.Contains(o.stdout, string(audit.RowFork)) {
		t.Errorf("db compare: %v", o)
	}
	m.stop(t)
}
