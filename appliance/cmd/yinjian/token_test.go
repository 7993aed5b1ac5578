package main_test

import (
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Tokens of checkpoints are checked against the units' certificates: one that was replaced or exchanged for another
// checkpoint's is found in a copy of the files, and what cannot be told is said.
func TestCheckpointTokens(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	stamped := func() (n int) {
		db, err := sql.Open("sqlite3", "file:"+filepath.Join(dir, "journal", "journal-000001.db")+"?mode=ro")
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.QueryRow(`SELECT COUNT(*) FROM yj_checkpoint_token`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, key := range []string{"first", "second"} {
		before := stamped()
		if _, err := his.Sign(t.Context(), key, asserted("D1001", key)); err != nil {
			t.Fatal(err)
		}
		eventually(t, 30*time.Second, "a further checkpoint is stamped", func() bool { return stamped() > before })
	}
	m.stop(t)

	const (
		lowest  = `(SELECT MIN(tree_size) FROM yj_checkpoint_token)`
		highest = `(SELECT MAX(tree_size) FROM yj_checkpoint_token)`
	)
	for name, c := range map[string]struct {
		stmts   []string
		without []string // files removed beside the log's key
		flags   []string
		code    int
		words   []string
	}{
		"untouched": {words: []string{"未发现改动", "核验通过 good"}},
		"no certificate of a unit": {
			without: []string{"tsa-sm2.pem", "tsa-rsa.pem"}, words: []string{"未发现改动", "时间戳证书未核对"},
		},
		"another's certificate": {flags: []string{"--tsa", filepath.Join(dir, "tsa-rsa.pem")}, code: 1, words: []string{"token-invalid", "none of the units"}},
		"bytes":                 {stmts: []string{`UPDATE yj_checkpoint_token SET token_der = x'3003020100' WHERE tree_size = ` + highest}, code: 1, words: []string{"token-invalid"}},
		"another checkpoint's": {
			stmts: []string{`UPDATE yj_checkpoint_token SET token_der = (SELECT token_der FROM yj_checkpoint_token WHERE tree_size = ` + lowest + `) WHERE tree_size = ` + highest},
			code:  1, words: []string{"token-invalid"},
		},
		"a byte of the signature": {
			stmts: []string{`UPDATE yj_checkpoint_token SET token_der = CAST(substr(token_der, 1, length(token_der) - 1) || x'5A' AS BLOB) WHERE tree_size = ` + highest},
			code:  1, words: []string{"token-invalid"},
		},
		// The first, for the last may be younger than the last word on uses, and then is missed there.
		"deleted": {stmts: []string{`DELETE FROM yj_checkpoint_token WHERE tree_size = ` + lowest}, words: []string{"have no timestamp token, the first of size"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			copied := tempDir(t)
			for _, folder := range []string{"journal", "uses"} {
				if err := os.CopyFS(filepath.Join(copied, folder), os.DirFS(filepath.Join(dir, folder))); err != nil {
					t.Fatal(err)
				}
			}
			for _, f := range []string{"log.pem", "tsa-sm2.pem", "tsa-rsa.pem"} {
				b, err := os.ReadFile(filepath.Join(dir, f))
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(strings.Join(c.without, " "), f) {
					if err := os.WriteFile(filepath.Join(copied, f), b, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			db, err := sql.Open("sqlite3", filepath.Join(copied, "journal", "journal-000001.db"))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range c.stmts {
				res, err := db.Exec(s)
				if err != nil {
					t.Fatal(err)
				}
				if n, _ := res.RowsAffected(); n != 1 {
					t.Fatalf("%s: %d rows", s, n)
				}
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			o := yinjian(t, append([]string{"audit", "verify", "--dir", copied}, c.flags...)...)
			if o.code != c.code {
				t.Errorf("%v; want exit %d", o, c.code)
			}
			for _, w := range c.words {
				if !strings.Contains(o.stdout, w) {
					t.Errorf("%v; want %q", o, w)
				}
			}
		})
	}
}
