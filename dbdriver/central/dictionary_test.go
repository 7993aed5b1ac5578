package central_test

import (
	"strings"
	"testing"

	"yinjian/dbdriver/central"
)

// Every table and column has Chinese words, none stands for a column that is not there, and none has what a comment's
// text may not have.
func TestDictionary(t *testing.T) {
	t.Parallel()
	tables, err := central.Dictionary()
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for _, table := range tables {
		used[table.Name] = true
		for _, c := range table.Columns {
			used[table.Name+"."+c.Name], used["*."+c.Name] = true, true
		}
		if len(table.Key) == 0 || len(table.Columns) < 5 {
			t.Errorf("%+v", table)
		}
	}
	for name, words := range central.Comments() {
		if !used[name] {
			t.Errorf("%s: there is no such table or column", name)
		}
		if strings.ContainsAny(words, "'?;\n\\") || strings.ToValidUTF8(words, "") != words || len(words) > 400 || !strings.ContainsFunc(words, func(r rune) bool { return r > 0x3000 }) {
			t.Errorf("%s: %q", name, words)
		}
	}
	files, err := central.Migrations()
	if err != nil {
		t.Fatal(err)
	}
	made, indexes := 1, 0
	for _, text := range files {
		switch {
		case strings.HasPrefix(text, "CREATE TABLE "):
			made++
		case !strings.HasPrefix(text, "ALTER TABLE "):
			indexes++
		}
	}
	for _, table := range tables {
		indexes -= len(table.Indexes)
	}
	if len(tables) != made || indexes != 0 {
		t.Errorf("%d tables of %d, %d indexes too few", len(tables), made, indexes)
	}
}
