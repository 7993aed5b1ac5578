package testkit

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"yinjian/appliance/evidence"
)

// A Jail is a folder with nothing in it but the offline verifier and what was handed over, in which it runs with that
// folder for its root: no libraries, no /proc, no time zones, no network configuration.
type Jail struct{ dir string }

// NewJail builds the verifier without cgo from the folder of its source, and skips the test where it may not change the
// root. files are what is handed over: names in the jail and files to copy.
func NewJail(t testing.TB, source string, files map[string]string) *Jail {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: another root cannot be set")
	}
	j := &Jail{t.TempDir()}
	build := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(j.dir, "yinjian-verify"), ".")
	build.Dir = source
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, from := range files {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		j.Write(t, name, b)
	}
	return j
}

// Write puts a file there.
func (j *Jail) Write(t testing.TB, name string, data []byte) {
	t.Helper()
	name = filepath.Join(j.dir, name)
	err := os.MkdirAll(filepath.Dir(name), 0o755)
	if err == nil {
		err = os.WriteFile(name, data, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Run runs the verifier with -o json and answers its report, empty if it gave none, and exit status. stdin is what it
// can read there.
func (j *Jail) Run(t testing.TB, stdin []byte, args ...string) (*evidence.Report, int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := &exec.Cmd{
		Path: "/yinjian-verify", Args: append([]string{"yinjian-verify", "-o", "json"}, args...), Env: []string{}, Dir: "/",
		Stdin: bytes.NewReader(stdin), Stdout: &out, Stderr: &errs, SysProcAttr: &syscall.SysProcAttr{Chroot: j.dir},
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	r := new(evidence.Report)
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), r); err != nil {
			t.Fatalf("%v: %s", err, &out)
		}
	}
	return r, cmd.ProcessState.ExitCode()
}

// JudgeAlone has the verifier accept an evidence file in a jail with anchors, log key and document alone, and refuse n
// files of which one byte is another, each by the right name. The files lie in "anchors", "log.pem", "document" and
// "evidence.json".
func (j *Jail) JudgeAlone(t *testing.T, n int) {
	t.Helper()
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(j.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	base := []string{"--anchors", "/anchors", "--log-key", "/log.pem", "--document"}
	judge := func(document, file []byte) (*evidence.Report, int) {
		if document != nil {
			j.Write(t, "other", document)
			return j.Run(t, file, append(base, "/other", "-")...)
		}
		return j.Run(t, file, append(base, "/document", "-")...)
	}
	file := read("evidence.json")
	if r, status := judge(nil, file); r.Verdict != "valid" || status != 0 {
		t.Fatalf("%s, status %d: %+v", r.Verdict, status, r.Checks)
	}
	same := 0
	for _, a := range Alterations(t, file, 2, n) {
		r, status := judge(nil, a.Data)
		if err := a.Judge(r); err != nil {
			t.Error(err)
		}
		if a.Same {
			same++
		}
		if want := map[bool]int{true: 0, false: 1}[a.Same]; status != want {
			t.Errorf("%v: status %d, want %d", a, status, want)
		}
	}
	if same > n/10 {
		t.Errorf("%d of %d changes were of white space", same, n)
	}

	// What the verifier holds itself, changed.
	document := read("document")
	for _, at := range []int{0, len(document) / 2, len(document) - 1} {
		changed := bytes.Clone(document)
		changed[at] ^= 1
		r, status := judge(changed, file)
		if status != 1 || !failedCheck(r, evidence.CheckDocument) {
			t.Errorf("document, byte %d: status %d: %+v", at, status, r.Checks)
		}
	}
	inputs := []string{"log.pem"}
	entries, err := os.ReadDir(filepath.Join(j.dir, "anchors"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		inputs = append(inputs, filepath.Join("anchors", e.Name()))
	}
	for _, name := range inputs {
		whole := read(name)
		from := bytes.IndexByte(whole, '\n') + 1
		to := bytes.LastIndex(whole, []byte("\n-----END"))
		for i := range 12 {
			at := from + i*(to-from-1)/11
			if whole[at] == '\n' {
				at++
			}
			changed := bytes.Clone(whole)
			if changed[at]++; changed[at] > 'z' {
				changed[at] = 'A'
			}
			j.Write(t, name, changed)
			// A file that is none any more is misuse; another key, or an anchor under which nothing stands, is said.
			if r, status := judge(nil, file); r.Verdict == "valid" || status == 0 {
				t.Errorf("%s, byte %d: valid", name, at)
			} else if status == 1 && name == "log.pem" && !failedCheck(r, evidence.CheckCheckpoint) {
				t.Errorf("%s, byte %d: %+v", name, at, r.Checks)
			}
		}
		j.Write(t, name, whole)
	}
	if r, status := judge(nil, file); r.Verdict != "valid" || status != 0 {
		t.Fatalf("afterwards: %s, status %d", r.Verdict, status)
	}
}

func failedCheck(r *evidence.Report, id string) bool {
	for _, c := range r.Checks {
		if c.ID == id && c.Status == "failed" {
			return true
		}
	}
	return false
}
