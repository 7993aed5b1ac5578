package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The sources that are handed over are the same each time, whole by their lists of digests, and build without a network and
// without a module cache. What is committed is tried, not what lies in the folder.
func TestSourceBundle(t *testing.T) {
	if os.Getenv("YINJIAN_LONG") == "" {
		t.Skip("minutes: set YINJIAN_LONG=1")
	}
	if _, err := os.Stat(filepath.Join(root, ".git")); err != nil {
		t.Skip("no git checkout")
	}
	run := func(dir string, env []string, command ...string) string {
		t.Helper()
		c := exec.Command(command[0], command[1:]...)
		c.Dir, c.Env = dir, append(os.Environ(), env...)
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
		return string(out)
	}
	dir := t.TempDir()
	var made [2][]byte
	for i := range made {
		out := filepath.Join(dir, string('a'+rune(i)))
		run(root, []string{"TZ=Asia/Shanghai"}[:i], "packaging/dev/source-bundle.sh", out)
		found, _ := filepath.Glob(filepath.Join(out, "yinjian-source-*.tar.gz"))
		if len(found) != 1 {
			t.Fatalf("made %v", found)
		}
		var err error
		if made[i], err = os.ReadFile(found[0]); err != nil {
			t.Fatal(err)
		}
		run(out, nil, "sh", "-c", "sha256sum -c --quiet *.sha256 && [ \"$(openssl dgst -sm3 -r *.gz | cut -d' ' -f1)\" = \"$(cut -d' ' -f1 *.sm3)\" ]")
		if i == 1 {
			run(dir, nil, "tar", "-xzf", found[0])
		}
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Error("two bundles of one commit differ")
	}
	tops, _ := filepath.Glob(filepath.Join(dir, "yinjian-source-*"))
	if len(tops) != 1 {
		t.Fatalf("unpacked %v", tops)
	}
	tree := tops[0]
	run(tree, nil, "sh", "-c", `sha256sum -c --quiet SHA256SUMS && cut -c67- SM3SUMS | xargs openssl dgst -sm3 -r | sed 's/ \*/  /' | cmp - SM3SUMS`)
	listed := run(tree, nil, "sh", "-c", "wc -l < SHA256SUMS; find . -type f ! -name SHA256SUMS ! -name SM3SUMS | wc -l")
	if f := strings.Fields(listed); f[0] != f[1] {
		t.Errorf("%s files are listed of %s", f[0], f[1])
	}
	for _, name := range []string{"LICENSE", "sbom.cdx.json", "COMMIT", "docs/source.md", "docs/third-party.md", "vendor/modules.txt", "vendor/github.com/emmansun/gmsm/LICENSE"} {
		if _, err := os.Stat(filepath.Join(tree, name)); err != nil {
			t.Error(err)
		}
	}
	offline := []string{"GOPROXY=off", "GOFLAGS=-mod=vendor", "GOMODCACHE=" + filepath.Join(dir, "none"), "GOTOOLCHAIN=local"}
	command := []string{"make", "build/yinjian", "build/yinjian-verify", "build/libyinjian-p11.so"}
	if exec.Command("unshare", "-n", "true").Run() == nil {
		command = append([]string{"unshare", "-n"}, command...)
	} else {
		t.Log("not root: the network is only not asked, not away")
	}
	run(tree, offline, command...)
	run(tree, nil, "build/yinjian", "--help")
	run(tree, offline, "go", "vet", "./appliance", "./packaging/...")
}
