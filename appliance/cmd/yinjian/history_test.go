package main_test

import (
	"bytes"
	"database/sql"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/text/encoding/simplifiedchinese"
)

// oldSigner makes CMS signatures with OpenSSL, as an older system would have, under a CA of its own.
func oldSigner(t *testing.T, dir string) (sign func(document string) []byte, anchor string) {
	t.Helper()
	openssl := func(args ...string) {
		t.Helper()
		cmd := exec.Command("openssl", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", "3000", "-subj", "/CN=Old CA", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
	openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "old.key", "-out", "old.csr", "-subj", "/CN=Old Signer")
	if err := os.WriteFile(filepath.Join(dir, "ext"), []byte("keyUsage=critical,digitalSignature,nonRepudiation\nbasicConstraints=CA:FALSE\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	openssl("x509", "-req", "-in", "old.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "old.pem", "-days", "2000", "-extfile", "ext", "-sha256")
	return func(document string) []byte {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "doc"), []byte(document), 0o600); err != nil {
			t.Fatal(err)
		}
		openssl("cms", "-sign", "-binary", "-in", "doc", "-signer", "old.pem", "-inkey", "old.key", "-outform", "DER", "-md", "sha256", "-out", "sig")
		b, err := os.ReadFile(filepath.Join(dir, "sig"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}, filepath.Join(dir, "ca.pem")
}

// A historySummary is what `history import -o json` prints.
type historySummary struct {
	Records, New, Imported, Present, Differs, Refused int
	NotTried                                          int     `json:"not_tried"`
	PerSecond                                         float64 `json:"per_second"`
}

// Records of an older system come in once, whatever is killed meanwhile, as statements that nobody here vouches for: their
// file says so, also after it was altered or the older signature was looked at, and the central database counts no signature.
// With YINJIAN_LONG=1 there are 100,000, else 3,000.
func TestHistoryImport(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	records := 3000
	if os.Getenv("YINJIAN_LONG") != "" {
		records = 100_000
	}
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	folder := tempDir(t)
	sign, anchor := oldSigner(t, folder)
	write := func(name string, data []byte) string {
		t.Helper()
		name = filepath.Join(folder, name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	mapping := write("mapping.toml", []byte(`
system = "oldsign"
name = "旧电子签名平台"
format = "csv"
time = "datetime"

[fields]
id = "流水号"
signed_at = "签名时间"
signer = "工号"
signer_name = "姓名"
department = "科室"
document_id = "文书号"
digest = "摘要"
signature = "签名"

[constants]
campus = "本部"
document_type = "出院记录"
digest_algorithm = "SHA-256"
`))
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	line := func(cells ...string) {
		if err := w.Write(cells); err != nil {
			t.Fatal(err)
		}
	}
	line("流水号", "签名时间", "工号", "姓名", "科室", "文书号", "摘要", "签名")
	const document = "older document"
	signature := sign(document)
	digest := "f2ca1bb6c7e907d06dafe4687e579fce76b37e4e93b7605022da52e6ccc26fd2"
	for i := range records {
		cms := ""
		if i == 0 {
			cms = base64.StdEncoding.EncodeToString(signature)
		}
		line(fmt.Sprintf("R%07d", i), fmt.Sprintf("2019-03-04 05:%02d:%02d", i/60%60, i%60), fmt.Sprint(i%50), "张三", "心内科", fmt.Sprintf("ZY-%d", i), digest, cms)
	}
	bad := [][]string{
		{"B1", "昨天", "1", "张三", "心内科", "ZY", digest, ""},
		{"B2", "2999-01-01 00:00:00", "1", "张三", "心内科", "ZY", digest, ""},
		{"", "2019-03-04 05:06:07", "1", "张三", "心内科", "ZY", digest, ""},
		{"B4", "2019-03-04 05:06:07", "1", "张\u202e三", "心内科", "ZY", digest, ""},
		{"B5", "2019-03-04 05:06:07", "1", "张三", "心内科", "ZY", "abcd", ""},
		{"B6", "2019-03-04 05:06:07", "1", "张三", "心内科", "ZY", digest, "bm8gQ01T"},
		{"B7", "2019-03-04 05:06:07", "1", "张三", "心内科", "ZY", digest, "%%"},
		{"=B8", "", "1", "张三", "心内科", "ZY", digest, ""},
	}
	for _, cells := range bad {
		line(cells...)
	}
	w.Flush()
	gb, err := simplifiedchinese.GB18030.NewEncoder().Bytes(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	table := write("records.csv", gb)
	args := []string{"history", "import", table, "--dir", dir, "--mapping", mapping, "-o", "json"}
	summed := func(o outcome) (s historySummary) {
		t.Helper()
		if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
			t.Fatalf("%v: %v", err, o)
		}
		return s
	}

	entries := m.state(t).Journal.Entries
	o := refused(t, 1, []string{"gb18030", "隔离表"}, append(args, "--dry-run")...)
	if s := summed(o); s.Records != records+len(bad) || s.New != records || s.Refused != len(bad) || m.state(t).Journal.Entries > entries+5 { // the appliance's own go on
		t.Errorf("dry run: %+v, %d entries; %v", s, m.state(t).Journal.Entries-entries, o)
	}

	// Killed in turns, the command and the appliance, each time after some were imported.
	for i := range 2 {
		had := m.state(t).Journal.Entries
		cmd := exec.Command(built.binary, args...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, time.Minute, "some are imported", func() bool { return m.state(t).Journal.Entries > had+uint64(records/20) })
		if i == 0 {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		} else {
			m.kill(t)
			_ = cmd.Wait()
			m = serve(t, dir)
			m.trusted(t)
		}
	}
	o = yinjian(t, args...)
	s := summed(o)
	if o.code != 1 || s.Imported+s.Present != records || s.Imported == 0 || s.Present == 0 || s.Refused != len(bad) || s.Differs+s.NotTried > 0 {
		t.Errorf("the rest: %+v; %v", s, o)
	}
	t.Logf("%d imported, %.0f a second", s.Imported, s.PerSecond)
	rows := readCSV(t, table+".quarantine.csv")
	if len(rows) != len(bad)+1 {
		t.Fatalf("quarantine: %q", rows)
	}
	slices.SortFunc(rows[1:], func(a, b []string) int { return strings.Compare(a[0], b[0]) })
	for i, why := range []string{"signed_at", "将来", "id", "U+202E", "摘要", "CMS", "base64", "signed_at"} {
		if r := rows[i+1]; r[0] != fmt.Sprint(records+i+2) || !strings.Contains(r[2], why) {
			t.Errorf("quarantine, row %d: %q, want %q", i, r, why)
		}
	}
	if rows[8][3] != "'=B8" {
		t.Errorf("a formula is written back as %q", rows[8][3])
	}
	if s := summed(yinjian(t, args...)); s.Imported != 0 || s.Present != records {
		t.Errorf("again: %+v", s)
	}

	// The same number with something else in it, from another file and as JSON: named, and not taken.
	jsonMapping := write("json.toml", []byte("system = \"oldsign\"\nname = \"旧电子签名平台\"\nformat = \"json\"\ntime = \"unix\"\n[fields]\nid = \"no\"\nsigned_at = \"at.s\"\nsigner = \"who\"\n"))
	for name, text := range map[string]string{
		"lines.json": `{"no":"R0000001","at":{"s":1551675661},"who":"9"}` + "\n" + `{"no":"J1","at":{"s":1551675661},"who":"9"}`,
		"array.json": ` [{"no":"R0000001","at":{"s":1551675661},"who":"9"},{"no":"J2","at":{"s":1551675661},"who":"9"}] `,
	} {
		file := write(name, []byte(text))
		o := yinjian(t, "history", "import", file, "--dir", dir, "--mapping", jsonMapping, "-o", "json")
		if s := summed(o); o.code != 1 || s.Imported != 1 || s.Differs != 1 {
			t.Errorf("%s: %+v; %v", name, s, o)
		}
		if r := readCSV(t, file+".quarantine.csv"); len(r) != 2 || r[1][1] != "differs" || !strings.Contains(r[1][2], "signer：已导入的为“1”，文件中为“9”") {
			t.Errorf("%s: %q", name, r)
		}
	}
	for name, text := range map[string]string{"cut.json": `[{"no":"J3","at":{"s":1551675661}},{"no":`, "after.json": `[{"no":"J3","at":{"s":1}}] x`, "list.json": `[["J3"]]`} {
		if o := refused(t, 1, []string{name}, "history", "import", write(name, []byte(text)), "--dir", dir, "--mapping", jsonMapping); strings.Contains(o.stdout, "imported") {
			t.Errorf("%s: %v", name, o)
		}
	}

	// What is said of an imported record, and what an alteration of its file shows.
	file := filepath.Join(folder, "r.json")
	mustRun(t, "history", "export", "oldsign", "R0000000", "--dir", dir, "-o", file)
	refused(t, 1, []string{"没有导入过"}, "history", "export", "oldsign", "R9999999", "--dir", dir)
	judge := func(file, anchors string, more ...string) outcome {
		return yinjian(t, append([]string{"verify", "--anchors", anchors, "--log-key", filepath.Join(dir, "log.pem"), file}, more...)...)
	}
	o = judge(file, anchor)
	for _, words := range []string{"无法判定", "未经本设备核验", "not verified by this appliance", "oldsign", "旧签名单独核验"} {
		if !strings.Contains(o.stdout, words) {
			t.Errorf("verdict does not say %q: %v", words, o)
		}
	}
	if o.code == 0 || strings.Contains(o.stdout, "有效：") {
		t.Errorf("an imported record is called valid: %v", o)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var h map[string]any
	if err := json.Unmarshal(data, &h); err != nil {
		t.Fatal(err)
	}
	alter := func(name string, change func(b []byte) []byte) {
		t.Helper()
		was := h[name].(string)
		raw, err := base64.StdEncoding.DecodeString(was)
		if err != nil {
			t.Fatal(err)
		}
		h[name] = base64.StdEncoding.EncodeToString(change(raw))
		b, _ := json.Marshal(h) // it was read from JSON
		h[name] = was
		if o := judge(write("altered.json", b), anchor); o.code == 0 || !strings.Contains(o.stdout, "无效") {
			t.Errorf("%s altered: %v", name, o)
		}
	}
	alter("record", func(b []byte) []byte { return bytes.Replace(b, []byte("张三"), []byte("李四"), 1) })
	alter("signature", func(b []byte) []byte { b[len(b)-1] ^= 1; return b })

	// The central database has them as their own kind; nothing is counted as a signature.
	eventually(t, 2*time.Minute, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	db, err := sql.Open("sqlite3", "file:"+filepath.Join(dir, "central.db")+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for query, want := range map[string]int{
		`SELECT COUNT(*) FROM yj_record WHERE kind_name = 'history.imported' AND status_code = 'imported' AND application_id = 'history/oldsign'`: records + 2,
		`SELECT COUNT(*) FROM yj_record WHERE kind_name = 'sign.v1'`:                                                                              0,
		`SELECT COUNT(*) FROM yj_record WHERE kind_name = 'history.imported' AND status_code = 'recorded'`:                                        0,
		`SELECT COUNT(DISTINCT record_id) FROM yj_record WHERE kind_name = 'history.imported'`:                                                    records + 2,
	} {
		var n int
		if err := db.QueryRow(query).Scan(&n); err != nil || n != want {
			t.Errorf("%s: %d, want %d: %v", query, n, want, err)
		}
	}
	m.mustBeClean(t)
}
