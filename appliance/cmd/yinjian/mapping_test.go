package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const goodMapping = `system = "old"
name = "旧平台"
format = "csv"
[fields]
id = "编号"
signed_at = "时间"
`

func TestMappings(t *testing.T) {
	t.Parallel()
	if m, err := parseMapping([]byte(goodMapping)); err != nil || m.Time != "datetime" || m.Signature.Form != "cms" || m.UTCOffset != "+08:00" {
		t.Fatalf("%+v, %v", m, err)
	}
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":          {goodMapping + "singer = \"工号\"\n", "singer"},
		"unknown table":        {goodMapping + "[field]\nid = \"x\"\n", "field"},
		"no name":              {strings.Replace(goodMapping, "name =", "# name =", 1), "name"},
		"no id":                {strings.Replace(goodMapping, "id =", "signer =", 1), "fields.id"},
		"no system":            {strings.Replace(goodMapping, `"old"`, `"旧"`, 1), "system"},
		"format":               {strings.Replace(goodMapping, `"csv"`, `"xml"`, 1), "xml"},
		"constant number":      {goodMapping + "[constants]\nid = \"1\"\n", "constants.id"},
		"constant and field":   {goodMapping + "signer = \"a\"\n[constants]\nsigner = \"b\"\n", "constants.signer"},
		"constant signature":   {goodMapping + "[constants]\nsignature = \"b\"\n", "constants"},
		"signature's form":     {goodMapping + "[signature]\nform = \"pkcs7\"\n", "signature.form"},
		"digest's encoding":    {goodMapping + "[digest]\nencoding = \"base32\"\n", "digest.encoding"},
		"offset":               {"utc_offset = \"CST\"\n" + goodMapping, "utc_offset"},
		"time":                 {"time = \"excel\"\n" + goodMapping, "time"},
		"no TOML":              {"system", "toml"},
		"everything at a time": {"format = \"xml\"\n", "system"},
	} {
		if _, err := parseMapping([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestMappedTimes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ time, value, want string }{
		{"datetime", "2019-03-04 05:06:07", "2019-03-03T21:06:07Z"}, {"datetime", "2019/3/4 5:06:07", "2019-03-03T21:06:07Z"},
		{"datetime", "20190304050607", "2019-03-03T21:06:07Z"}, {"datetime", "2019-03-04 05:06", "2019-03-03T21:06:00Z"},
		{"datetime", "2019-03-04T05:06:07.25", "2019-03-03T21:06:07.25Z"}, {"rfc3339", "2019-03-04T05:06:07+01:00", "2019-03-04T04:06:07Z"},
		{"unix", "1551647167", "2019-03-03T21:06:07Z"}, {"unix_ms", "1551647167250", "2019-03-03T21:06:07.25Z"},
		{"datetime", "04.03.2019", ""}, {"datetime", "2019-02-30 00:00:00", ""}, {"unix", "1e9", ""}, {"unix", "99999999999999", ""}, {"rfc3339", "2019-03-04 05:06:07", ""},
	} {
		m, err := parseMapping([]byte("time = \"" + c.time + "\"\n" + goodMapping))
		if err != nil {
			t.Fatal(err)
		}
		r, err := m.record(func(source string) string { return map[string]string{"编号": "1", "时间": c.value}[source] }, "")
		if (err != nil) != (c.want == "") || err == nil && r.SignedAt != c.want {
			t.Errorf("%s %q: %q, %v, want %q", c.time, c.value, r.SignedAt, err, c.want)
		}
	}
}

// Signatures in files are read below the table's folder, and nowhere else.
func TestMappedSignatureFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "in", "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"in/sub/a.p7s": "signature", "secret": "secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../secret", filepath.Join(dir, "in", "link")); err != nil {
		t.Fatal(err)
	}
	m, err := parseMapping([]byte(goodMapping + "signature = \"签名\"\n[signature]\nencoding = \"file\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"sub/a.p7s": "signature", "../secret": "", "link": "", "/etc/passwd": "", "sub": "", "none": ""} {
		b, err := m.signature(name, filepath.Join(dir, "in"))
		if (err == nil) != (want != "") || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

// FuzzHistoryFile holds that a file of records is read the same both times, or refused.
func FuzzHistoryFile(f *testing.F) {
	f.Add([]byte("编号,时间\r\n1,2019-03-04 05:06:07\r\n"), false)
	f.Add([]byte("\xef\xbb\xbf编号,时间\n\"a\nb\",x\n"), false)
	f.Add([]byte("\xb1\xe0\xba\xc5,\xca\xb1\xbc\xe4\n1,x\n"), false)
	f.Add([]byte(`[{"编号":"1","时间":{"s":1}}, {"编号":2}]`), true)
	f.Add([]byte(" {\"编号\":true}\n{}"), true)
	f.Fuzz(func(t *testing.T, data []byte, asJSON bool) {
		m, err := parseMapping([]byte(goodMapping))
		if err != nil {
			t.Fatal(err)
		}
		if asJSON {
			m.Format = formatJSON
		}
		name := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		h, err := openHistory(name, m)
		if err != nil {
			return
		}
		var lines []int
		if err := h.each(func(row historyRow) error {
			lines = append(lines, row.line)
			_, _ = m.record(row.get, h.folder) // refused or not
			return nil
		}); err != nil || len(lines) != h.records || !slices.IsSorted(lines) {
			t.Errorf("%d records, then %d: %v", h.records, len(lines), err)
		}
	})
}
