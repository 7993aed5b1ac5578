package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestTables(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, want string }{
		"GBK":             {"\xb9\xa4\xba\xc5\nD001\n", "GBK"},
		"no staff number": {"姓名\n张三\n", "工号"},
		"twice":           {"工号,ID\nD001,D001\n", "两次"},
		"no rows":         {"工号\n\n , \n", "没有数据行"},
		"empty":           {"", "标题"},
		"open quote":      {"工号\n\"D001\n", "无法读出"},
		"long cell":       {"工号\n" + strings.Repeat("D", 5000) + "\n", "4096"},
		"many rows":       {"工号\n" + strings.Repeat("D001\n", maxTableRows+1), "20000"},
		"large":           {"工号\n" + strings.Repeat("D", maxTableBytes), "too large"},
	} {
		if _, _, err := readTable([]byte(c.text), requestTable); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	for name, text := range map[string]string{
		"plain": "工号,算法\nD001,SM2\n", "mark, CR LF": "\xef\xbb\xbf工号,算法\r\n D001 ,SM2\r\n", "English, other order": "x,Algorithm,ID\n1,SM2,D001,more\n",
		"quoted": "\"工号\",\"算法\"\n\n\"D001\",\"SM2\"\n",
	} {
		rows, _, err := readTable([]byte(text), requestTable)
		if err != nil || len(rows) != 1 || rows[0].cells["id"] != "D001" || rows[0].cells["algorithm"] != "SM2" {
			t.Errorf("%s: %v, %v", name, rows, err)
		}
	}
}

// TestReadLimited holds what a wrong file is told as, and that a pipe that nobody writes to is not waited for.
func TestReadLimited(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := readLimited(pipe, 10); err != nil || len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
	for name, want := range map[string]string{dir: "是文件夹", filepath.Join(dir, "none"): "文件不存在", "/dev/zero": "超过 10 字节"} {
		if _, err := readLimited(name, 10); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

// FuzzTable holds what is read within the limits.
func FuzzTable(f *testing.F) {
	f.Add([]byte("工号,算法\nD001,SM2\n"))
	f.Add([]byte("\xef\xbb\xbf工号,姓名,科室,院区,主题\r\nD001,张三,\"胸,外科\",本部,\"CN=张三,O=某医院\"\r\n"))
	f.Add([]byte("\xb9\xa4\xba\xc5\nD001\n"))
	f.Add([]byte("id\n\"\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		rows, _, err := readTable(data, requestTable)
		if err != nil {
			return
		}
		if len(rows) == 0 || len(rows) > maxTableRows {
			t.Errorf("%d rows", len(rows))
		}
		for _, r := range rows {
			for name, v := range r.cells {
				if len(v) > maxCellBytes || strings.TrimSpace(v) != v {
					t.Errorf("line %d, %s: %q", r.line, name, v)
				}
			}
		}
	})
}

// A name that came from somebody's table is no formula in ours.
func TestNoFormulaInTables(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "result.csv")
	lines := [][]string{{"D001", "张三"}, {"=1+1", "@SUM(A1)"}, {"+1", "-1"}, {"\t=1", "a=1"}}
	if err := writeTable(name, lines); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if want := "\xef\xbb\xbfD001,张三\n'=1+1,'@SUM(A1)\n'+1,'-1\n'\t=1,a=1\n"; err != nil || string(b) != want {
		t.Errorf("%q, %v, want %q", b, err, want)
	}
	if lines[1][0] != "=1+1" {
		t.Error("the caller's lines were changed")
	}
}

// What others named is no formula in any table that goes to people: in those that are written, and in those handed over.
func TestTablesAreInert(t *testing.T) {
	t.Parallel()
	h := &handover{out: t.TempDir()}
	if err := h.table("rights.csv", [][]string{{"=1+1", "+1", "-1", "@x", "＝1", "－1", "a=1", ""}}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(h.out, "rights.csv"))
	if want := "\xef\xbb\xbf'=1+1,'+1,'-1,'@x,'＝1,'－1,a=1,\n"; err != nil || string(b) != want {
		t.Errorf("%q, %v, want %q", b, err, want)
	}
}
