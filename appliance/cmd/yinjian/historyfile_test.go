package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// One record never fills the memory, whatever the file, and what is read in the end is the file that was opened.
func TestHistoryFileBounds(t *testing.T) {
	t.Parallel()
	open := func(format, text string) (*historyFile, error) {
		t.Helper()
		m, err := parseMapping([]byte(strings.Replace(goodMapping, `"csv"`, `"`+format+`"`, 1)))
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(t.TempDir(), "old."+format)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return openHistory(name, m)
	}
	long := strings.Repeat("x", maxRecordBytes+1<<16)
	for format, text := range map[string]string{
		"csv":  "编号,时间\n1,2019-03-04 05:06\n2,\"2019-03-04 05:06\n" + long,
		"json": `[{"编号":"1","时间":"2019-03-04 05:06"},{"编号":"` + long + `"}]`,
	} {
		if _, err := open(format, text); err == nil || !strings.Contains(err.Error(), "一条记录超过") {
			t.Errorf("%s: %v", format, err)
		}
	}
	// Together they may be as long as they like.
	rows := "编号,时间,备注\n" + strings.Repeat("1,2019-03-04 05:06,"+strings.Repeat("y", 1<<20)+"\n", 12)
	h, err := open("csv", rows)
	if err != nil || h.records != 12 {
		t.Fatalf("%+v, %v", h, err)
	}
	for _, change := range []string{rows + "2,2019-03-04 05:06,z\n", strings.Replace(rows, "1,2019", "1,2018", 1)} {
		if err := os.WriteFile(filepath.Join(h.folder, h.name), []byte(change), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := h.each(func(historyRow) error { return nil }); err == nil || !strings.Contains(err.Error(), "变了") {
			t.Errorf("a file that has changed: %v", err)
		}
	}
}
