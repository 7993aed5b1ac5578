package main

import (
	"bytes"
	"debug/elf"
	"debug/pe"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
)

const v1 = "testdata/v1/"

// judge runs the command and answers its status and report.
func judge(t *testing.T, args ...string) (int, evidence.Report) {
	t.Helper()
	var out, errs bytes.Buffer
	status := run(append([]string{"-o", "json"}, args...), strings.NewReader(""), &out, &errs)
	var r evidence.Report
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
	} else {
		t.Logf("%v: %s", args, errs.String())
	}
	return status, r
}

func failed(r evidence.Report) (ids []string) {
	for _, c := range r.Checks {
		if c.Status == pki.Failed {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// What release 0.1.0 left is judged as it was then, by every release after it.
func TestEvidenceOfEarlierReleases(t *testing.T) {
	t.Parallel()
	other := filepath.Join(t.TempDir(), "other.xml")
	text, err := os.ReadFile(v1 + "record.xml")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, bytes.Replace(text, []byte("0/9"), []byte("1/9"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return v1 + name }
	base := []string{"--anchors", v1}
	logKey := []string{"--log-key", in("log.pem")}
	document := []string{"--document", in("record.xml")}
	crls := []string{"--crls", v1}
	at := []string{"--at", "2026-11-23T00:00:00Z"}
	args := func(parts ...[]string) (all []string) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	for name, c := range map[string]struct {
		args    []string
		verdict pki.Verdict
		fails   string // a check that must be among the failed
	}{
		"raw":                {args(base, logKey, document, []string{in("evidence.json")}), pki.Valid, ""},
		"cms":                {args(base, logKey, document, []string{in("evidence-cms.json")}), pki.Valid, ""},
		"no document":        {args(base, logKey, []string{in("evidence-cms.json")}), pki.Indeterminate, ""},
		"other document":     {args(base, logKey, []string{"--document", other, in("evidence.json")}), pki.Invalid, evidence.CheckDocument},
		"other document cms": {args(base, logKey, []string{"--document", other, in("evidence-cms.json")}), pki.Invalid, evidence.CheckDocument},
		"lone cms":           {args(base, crls, document, []string{"--cms", in("signature.cms")}), pki.Valid, ""},
		"lone cms, no crls":  {args(base, document, []string{"--cms", in("signature.cms")}), pki.Indeterminate, ""},
		"lone raw":           {args(base, crls, document, at, []string{"--raw", in("signature.der"), "--certificate", in("signer.pem")}), pki.Valid, ""},
		"lone raw, changed":  {args(base, crls, at, []string{"--document", other, "--raw", in("signature.der"), "--certificate", in("signer.pem")}), pki.Invalid, evidence.CheckSignature},
		"sm2 token":          {args(base, crls, document, []string{"--token", in("token-sm2.tsr")}), pki.Valid, ""},
		"rsa token":          {args(base, crls, document, []string{"--token", in("token-rsa.tsr")}), pki.Valid, ""},
		"token, changed":     {args(base, crls, []string{"--document", other, "--token", in("token-rsa.tsr")}), pki.Invalid, evidence.CheckTokenImprint},
		"wrong anchor":       {args([]string{"--anchors", in("ca-rsa.pem")}, logKey, document, []string{in("evidence.json")}), pki.Indeterminate, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status, r := judge(t, c.args...)
			if want := statuses[c.verdict]; r.Verdict != c.verdict || status != want {
				t.Errorf("verdict %q, status %d; want %q, %d; failed: %v", r.Verdict, status, c.verdict, want, failed(r))
			}
			if c.fails != "" && !strings.Contains(strings.Join(failed(r), " "), c.fails) {
				t.Errorf("failed: %v, want %s among them", failed(r), c.fails)
			}
		})
	}
}

// In a folder with nothing else, with no machine's time, the recorded evidence is valid, and not with any byte changed.
func TestAlone(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"evidence.json", "evidence-cms.json"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testkit.NewJail(t, ".", map[string]string{
				"anchors/ca.pem": v1 + "ca.pem", "anchors/ca-rsa.pem": v1 + "ca-rsa.pem", "log.pem": v1 + "log.pem",
				"document": v1 + "record.xml", "evidence.json": v1 + name,
			}).JudgeAlone(t, 200)
		})
	}
}

// Evidence with archive timestamps, recorded in 2026 by a clock that was moved to 2032.
const archivedFiles = "../../evidence/testdata/archived/"

func TestArchivedAlone(t *testing.T) {
	t.Parallel()
	testkit.NewJail(t, ".", map[string]string{
		"anchors/ca.pem": archivedFiles + "anchors.pem", "log.pem": archivedFiles + "log.pem", "document": archivedFiles + "document.xml", "evidence.json": archivedFiles + "bundle.json",
	}).JudgeAlone(t, 200)
}

// An evidence record may stand beside the evidence, too; algorithms end when the caller says so.
func TestEvidenceRecordBeside(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(archivedFiles + "bundle.json")
	if err != nil {
		t.Fatal(err)
	}
	b, err := evidence.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	record := write("record.ers", b.EvidenceRecord)
	b.Format, b.EvidenceRecord = evidence.Format, nil
	plain, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	file := write("evidence.json", plain)
	for name, c := range map[string]struct {
		flags  []string
		status int
		failed string
	}{
		"nothing beside it":                       {nil, exitIndeterminate, ""},
		"the record beside it":                    {[]string{"--evidence-record", record}, exitValid, ""},
		"another file":                            {[]string{"--evidence-record", file}, exitInvalid, evidence.CheckArchive},
		"SM2 ends before the record left it":      {[]string{"--evidence-record", record, "--algorithm-end", "SM2=2028-01-01T00:00:00Z"}, exitIndeterminate, ""},
		"SM2 ends later":                          {[]string{"--evidence-record", record, "--algorithm-end", "SM2=2033-01-01T00:00:00Z"}, exitValid, ""},
		"what vouches for the document has ended": {[]string{"--evidence-record", record, "--algorithm-end", "SM3=2033-01-01T00:00:00Z"}, exitIndeterminate, ""},
		"no time":        {[]string{"--algorithm-end", "SM2"}, exitMisused, ""},
		"sm2":            {[]string{"--evidence-record", record, "--algorithm-end", "sm2=2028-01-01T00:00:00Z"}, exitMisused, ""},
		"SHA256":         {[]string{"--evidence-record", record, "--algorithm-end", "SHA256=2028-01-01T00:00:00Z"}, exitMisused, ""},
		"RSA-2048":       {[]string{"--evidence-record", record, "--algorithm-end", "RSA-2048=2060-01-01T00:00:00Z"}, exitValid, ""},
		"no such record": {[]string{"--evidence-record", dir + "/absent"}, exitMisused, ""},
	} {
		args := append([]string{"--anchors", archivedFiles + "anchors.pem", "--log-key", archivedFiles + "log.pem", "--document", archivedFiles + "document.xml", "--at", "2034-06-01T00:00:00Z"}, c.flags...)
		status, r := judge(t, append(args, file)...)
		if status != c.status || c.failed != "" && !slices.Contains(failed(r), c.failed) {
			t.Errorf("%s: status %d, want %d: failed %v, missing %v", name, status, c.status, failed(r), r.Missing)
		}
	}
	for name, args := range map[string][]string{
		"a record for a folder":    {"--evidence-record", record, dir},
		"a record for a token":     {"--evidence-record", record, "--token", v1 + "token-sm2.tsr"},
		"an algorithm, no time":    {"--algorithm-end", "SM2=2033-01-01T00:00:00Z", file},
		"a query for evidence":     {"--query", record, file},
		"a query that is no query": {"--query", record, "--token", v1 + "token-sm2.tsr"},
	} {
		base := []string{"--anchors", archivedFiles + "anchors.pem"}
		if !slices.Contains(args, "--token") {
			base = append(base, "--log-key", archivedFiles+"log.pem")
		}
		if status, _ := judge(t, append(base, args...)...); status != exitMisused {
			t.Errorf("%s: status %d, want %d", name, status, exitMisused)
		}
	}
}

func TestMisuse(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"nothing":             {},
		"no anchors":          {"--log-key", v1 + "log.pem", v1 + "evidence.json"},
		"no log key":          {"--anchors", v1, v1 + "evidence.json"},
		"two things":          {"--anchors", v1, "--cms", "x", "--token", "y"},
		"raw, no certificate": {"--anchors", v1, "--raw", v1 + "signature.der"},
		"unknown flag":        {"--anchor", v1},
		"unknown output":      {"--anchors", v1, "--log-key", "k", "-o", "xml", "e"},
	} {
		if status, _ := judge(t, args...); status != 2 {
			t.Errorf("%s: status %d, want 2", name, status)
		}
	}
	for name, args := range map[string][]string{
		"no such anchors":   {"--anchors", v1 + "absent", "--log-key", v1 + "log.pem", v1 + "evidence.json"},
		"no such evidence":  {"--anchors", v1, "--log-key", v1 + "log.pem", v1 + "absent"},
		"no such document":  {"--anchors", v1, "--log-key", v1 + "log.pem", "--document", v1 + "absent", v1 + "evidence.json"},
		"a log key of none": {"--anchors", v1, "--log-key", v1 + "ca.pem", v1 + "evidence.json"},
		"a time of none":    {"--anchors", v1, "--log-key", v1 + "log.pem", "--at", "now", v1 + "evidence.json"},
		"stdin twice":       {"--anchors", v1, "--log-key", v1 + "log.pem", "--document", "-", "-"},
		"document a folder": {"--anchors", v1, "--log-key", v1 + "log.pem", "--document", v1, v1 + "evidence.json"},
		"an empty folder":   {"--anchors", v1, "--log-key", v1 + "log.pem", t.TempDir()},
	} {
		if status, _ := judge(t, args...); status != 2 {
			t.Errorf("%s: status %d, want 2", name, status)
		}
	}
	status, r := judge(t, "--anchors", v1, "--log-key", v1+"log.pem", v1+"record.xml")
	if status != 1 || !slices.Equal(failed(r), []string{evidence.CheckFormat}) {
		t.Errorf("a file that is no evidence: status %d, want 1: %v", status, failed(r))
	}
	if status, _ := judge(t, "--help"); status != 0 {
		t.Errorf("help: status %d", status)
	}
}

// Evidence, document and single parts are taken from standard input too.
func TestStandardInput(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		stdin string
		args  []string
	}{
		"evidence":    {"evidence.json", []string{"--log-key", v1 + "log.pem", "--document", v1 + "record.xml", "-"}},
		"document":    {"record.xml", []string{"--log-key", v1 + "log.pem", "--document", "-", v1 + "evidence.json"}},
		"cms":         {"signature.cms", []string{"--crls", v1, "--document", v1 + "record.xml", "--cms", "-"}},
		"token":       {"token-sm2.tsr", []string{"--crls", v1, "--document", v1 + "record.xml", "--token", "-"}},
		"raw":         {"signature.der", []string{"--crls", v1, "--document", v1 + "record.xml", "--at", "2026-11-23T00:00:00Z", "--certificate", v1 + "signer.pem", "--raw", "-"}},
		"certificate": {"signer.pem", []string{"--crls", v1, "--document", v1 + "record.xml", "--at", "2026-11-23T00:00:00Z", "--certificate", "-", "--raw", v1 + "signature.der"}},
	} {
		f, err := os.Open(v1 + c.stdin)
		if err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		if status := run(append([]string{"--anchors", v1}, c.args...), f, &out, &errs); status != 0 {
			t.Errorf("%s: status %d: %s%s", name, status, &out, &errs)
		}
		f.Close()
	}
}

// A raw signature with its token needs no --at, and not any token will do.
func TestRawWithToken(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(v1 + "evidence.json")
	if err != nil {
		t.Fatal(err)
	}
	b, err := evidence.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	args := []string{"--anchors", v1, "--crls", v1, "--document", v1 + "record.xml", "--certificate", v1 + "signer.pem", "--raw", write("signature", b.Signature.Value)}
	if status, r := judge(t, append(args, "--token", write("token", b.Token))...); status != 0 || r.GenTime == "" {
		t.Errorf("with its token: status %d: %v", status, r.Checks)
	}
	if status, r := judge(t, append(args, "--token", v1+"token-sm2.tsr")...); status != 1 || !slices.Contains(failed(r), evidence.CheckTokenImprint) {
		t.Errorf("with another's: status %d: %v", status, failed(r))
	}
	if status, _ := judge(t, args...); status != 3 {
		t.Errorf("without: status %d, want 3", status)
	}
}

// A folder is judged whole: documents by name, then by digest; the worst decides the status.
func TestFolder(t *testing.T) {
	t.Parallel()
	evidences, docs := t.TempDir(), t.TempDir()
	put := func(dir, name, from string, change func([]byte) []byte) {
		b, err := os.ReadFile(v1 + from)
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			b = change(b)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spoil := func(b []byte) []byte { return bytes.Replace(b, []byte("0/9"), []byte("1/9"), 1) }
	base := []string{"--anchors", v1, "--log-key", v1 + "log.pem"}
	folder := func(more ...string) (int, map[string]judged, string) {
		t.Helper()
		var out, text, errs bytes.Buffer
		args := slices.Concat(base, more, []string{evidences})
		status := run(append([]string{"-o", "json"}, args...), strings.NewReader(""), &out, &errs)
		var list []judged
		if err := json.Unmarshal(out.Bytes(), &list); err != nil {
			t.Fatal(err, errs.String())
		}
		if again := run(args, strings.NewReader(""), &text, &errs); again != status {
			t.Errorf("status %d as JSON, %d as text", status, again)
		}
		all := map[string]judged{}
		for _, j := range list {
			all[j.File] = j
		}
		return status, all, text.String()
	}
	put(evidences, "a.json", "evidence.json", nil)
	put(evidences, "b.json", "evidence-cms.json", nil)
	if status, all, _ := folder(); status != 3 || all["a.json"].Report.Verdict != pki.Indeterminate || !slices.Contains(all["a.json"].Report.Missing, evidence.CheckDocument) {
		t.Errorf("without documents: status %d: %+v", status, all)
	}
	put(docs, "discharge.xml", "record.xml", nil) // both are over it
	if status, all, text := folder("--document", docs); status != 0 || all["b.json"].Document != "discharge.xml" || !strings.Contains(text, "共 2 份 in all：有效 valid 2") {
		t.Errorf("by digest: status %d: %+v\n%s", status, all, text)
	}
	put(docs, "b.xml", "record.xml", spoil)
	if status, all, text := folder("--document", docs); status != 1 || all["a.json"].Report.Verdict != pki.Valid || !slices.Contains(failed(*all["b.json"].Report), evidence.CheckDocument) || !strings.Contains(text, evidence.CheckDocument) {
		t.Errorf("by name: status %d: %+v\n%s", status, all, text)
	}
	put(evidences, "c.json", "record.xml", nil)
	if _, all, _ := folder("--document", docs); !slices.Equal(failed(*all["c.json"].Report), []string{evidence.CheckFormat}) {
		t.Errorf("no evidence: %+v", all["c.json"])
	}
	put(docs, "a.xml", "record.xml", nil)
	put(docs, "a.txt", "record.xml", nil)
	if status, _ := judge(t, slices.Concat(base, []string{"--document", docs, evidences})...); status != 2 {
		t.Errorf("two documents of one name: status %d, want 2", status)
	}
}

// What is endless, deep or many is refused in bounded time and memory.
func TestHostileFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	sparse := func(name string, size int64) string {
		name = filepath.Join(dir, name)
		f, err := os.Create(name)
		if err == nil {
			err = errors.Join(f.Truncate(size), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	write := func(name string, parts ...string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(strings.Join(parts, "")), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	whole, err := os.ReadFile(v1 + "evidence.json")
	if err != nil {
		t.Fatal(err)
	}
	before, after, _ := strings.Cut(string(whole), `"certificates": [`)
	base := []string{"--anchors", v1, "--log-key", v1 + "log.pem", "--document", v1 + "record.xml"}
	huge := sparse("huge", 1<<30+1)
	for name, c := range map[string]struct {
		args   []string
		status int
		fails  string
	}{
		"evidence of a gigabyte": {append(base, huge), 2, ""},
		"CMS of a gigabyte":      {[]string{"--anchors", v1, "--cms", huge}, 2, ""},
		"token of a gigabyte":    {[]string{"--anchors", v1, "--token", huge}, 2, ""},
		"document of more":       {[]string{"--anchors", v1, "--log-key", v1 + "log.pem", "--document", huge, v1 + "evidence.json"}, 2, ""},
		"anchors of a gigabyte":  {[]string{"--anchors", huge, "--log-key", v1 + "log.pem", v1 + "evidence.json"}, 2, ""},
		"log key of a gigabyte":  {[]string{"--anchors", v1, "--log-key", huge, v1 + "evidence.json"}, 2, ""},
		"endless":                {append(base, "/dev/zero"), 2, ""},
		"a file for CRLs":        {[]string{"--anchors", v1, "--token", v1 + "token-sm2.tsr", "--crls", v1 + "ca.pem"}, 2, ""},
		"deep":                   {append(base, write("deep", strings.Repeat("[", 1<<20))), 1, evidence.CheckFormat},
		"deep in a member":       {append(base, write("member", before, `"certificates": `, strings.Repeat("[", 1<<20))), 1, evidence.CheckFormat},
		"a million certificates": {append(base, write("million", before, `"certificates": [`, strings.Repeat(`"MAA=",`, 1_000_000), after)), 1, evidence.CheckPayloads},
		"a million names":        {append(base, write("names", before, strings.Repeat(`"`, 1), strings.Repeat(`x":1,"`, 1_000_000), `certificates": [`, after)), 1, evidence.CheckFormat},
		"a long name":            {append(base, write("name", `{"`, strings.Repeat("x", 1<<20), `":1}`)), 1, evidence.CheckFormat},
		"a megabyte of no CMS":   {[]string{"--anchors", v1, "--cms", write("no.cms", strings.Repeat("0", 1<<20))}, 1, evidence.CheckCMS},
		"a thousand PEM certificates": {[]string{"--anchors", v1, "--document", v1 + "record.xml", "--raw", v1 + "signature.der", "--certificate",
			write("pem", strings.Repeat("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", 1000))}, 2, ""},
	} {
		t.Run(name, func(t *testing.T) {
			status, r := judge(t, c.args...)
			if status != c.status || c.fails != "" && !slices.Equal(failed(r), []string{c.fails}) {
				t.Errorf("status %d, want %d: %v", status, c.status, failed(r))
			}
			for _, k := range r.Checks {
				if len(k.Detail) > 1000 {
					t.Errorf("%d bytes of detail", len(k.Detail))
				}
			}
		})
	}
}

// The verifier is handed to courts: it builds without cgo for every platform named, and has neither SQL nor HTTP in it.
func TestStandsAlone(t *testing.T) {
	t.Parallel()
	list := exec.Command("go", "list", "-deps", ".")
	list.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range strings.Fields(string(out)) {
		for _, banned := range []string{"database/sql", "net/http", "runtime/cgo", "github.com/mattn/", "github.com/miekg/", "yinjian/ntp/", "yinjian/dbdriver", "yinjian/hsm/"} {
			if strings.HasPrefix(p, banned) {
				t.Errorf("%s is compiled in", p)
			}
		}
	}
	magic := map[string]elf.Machine{"linux/amd64": elf.EM_X86_64, "linux/arm64": elf.EM_AARCH64, "linux/loong64": elf.EM_LOONGARCH}
	for _, p := range []string{"linux/amd64", "linux/arm64", "linux/loong64", "windows/amd64"} {
		goos, arch, _ := strings.Cut(p, "/")
		bin := filepath.Join(t.TempDir(), "v")
		cmd := exec.Command("go", "build", "-o", bin, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+goos, "GOARCH="+arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", p, err, out)
			continue
		}
		if goos == "windows" {
			f, err := pe.Open(bin)
			if err != nil || f.Machine != pe.IMAGE_FILE_MACHINE_AMD64 {
				t.Errorf("%s: %v", p, err)
			}
			continue
		}
		f, err := elf.Open(bin)
		if err != nil || f.Machine != magic[p] {
			t.Errorf("%s: %v", p, err)
			continue
		}
		// Neither an interpreter nor a library is asked for.
		for _, prog := range f.Progs {
			if prog.Type == elf.PT_INTERP || prog.Type == elf.PT_DYNAMIC {
				t.Errorf("%s is not static: %v", p, prog.Type)
			}
		}
	}
}
