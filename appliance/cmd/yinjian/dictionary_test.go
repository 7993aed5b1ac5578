package main_test

import (
	"encoding/csv"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
	"yinjian/dbdriver/dbtest"
)

// The page of the documents is what the program writes, and a database that the program made is as it says; departures are
// named.
func TestDictionary(t *testing.T) {
	t.Parallel()
	page := readFile(t, filepath.Join("..", "..", "..", "docs", "data-dictionary.md"))
	if out := mustRun(t, "db", "dictionary"); out.stdout != page {
		t.Error("docs/data-dictionary.md is not what `yinjian db dictionary` writes: write it anew with --out docs/data-dictionary.md")
	}
	if out := mustRun(t, "reference"); out.stdout != readFile(t, filepath.Join("..", "..", "..", "docs", "cli.md")) {
		t.Error("docs/cli.md is not what `yinjian reference` writes: run make docs")
	}
	file := filepath.Join(t.TempDir(), "d.csv")
	mustRun(t, "db", "dictionary", "--format", "csv", "--out", file)
	lines, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(readFile(t, file), "\xef\xbb\xbf"))).ReadAll()
	if err != nil || len(lines) != 1+strings.Count(page, "\n| `") {
		t.Errorf("%d lines of CSV, %v", len(lines), err)
	}
	refused(t, 2, []string{"--format"}, "db", "dictionary", "--format", "doc")
	refused(t, 2, []string{"--dsn"}, "db", "dictionary", "--diff")

	c := dbtest.StartPostgres(t)
	name := c.Fresh(t)
	if o := refused(t, 1, nil, "db", "dictionary", "--diff", "--dsn", c.DSN(name)); !strings.Contains(o.stdout, "yj_record：缺少") {
		t.Errorf("an empty database: %v", o)
	}
	store, err := connect.Open(t.Context(), connect.Place{DSN: c.DSN(name)}, central.Author{Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	store.Close()
	if o := mustRun(t, "db", "dictionary", "--diff", "--dsn", c.DSN(name)); !strings.Contains(o.stdout, "一致") {
		t.Errorf("a fresh database: %v", o)
	}
	// Other tools of the database see the words.
	db := c.Open(t, name)
	defer db.Close()
	var words string
	if err := db.QueryRowContext(t.Context(), `SELECT col_description('yj_change'::regclass, ordinal_position) FROM information_schema.columns WHERE table_name = 'yj_change' AND column_name = 'before_text'`).Scan(&words); err != nil || !strings.HasPrefix(words, "改前") {
		t.Errorf("the column's comment is %q, %v", words, err)
	}
	if _, err := db.ExecContext(t.Context(), `ALTER TABLE yj_batch ALTER COLUMN last_seq TYPE VARCHAR(30)`); err != nil {
		t.Fatal(err)
	}
	if o := refused(t, 1, nil, "db", "dictionary", "--diff", "--dsn", c.DSN(name)); !strings.Contains(o.stdout, "yj_batch.last_seq：类型不同 (another type)，字典 dictionary BIGINT，库 database VARCHAR(30)") {
		t.Errorf("a changed column: %v", o)
	}
}
