package build

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The way of rpm, from a repository of one package that is made here: locked, fetched, unpacked without its script, and
// refused when the cache has other content.
func TestRPM(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"rpmbuild", "createrepo_c", "dnf", "rpm2archive"} {
		tool(t, name)
	}
	dir := t.TempDir()
	ran := filepath.Join(dir, "script-ran")
	spec := filepath.Join(dir, "tiny.spec")
	os.WriteFile(spec, []byte(`Name: tiny
Version: 1.0
Release: 2
Summary: of a test
License: MulanPSL-2.0
BuildArch: noarch
%description
of a test
%install
mkdir -p %{buildroot}/bin %{buildroot}/lib64
printf hello > %{buildroot}/bin/tiny
chmod 4755 %{buildroot}/bin/tiny
ln -s ../bin/tiny %{buildroot}/lib64/libtiny
%files
/bin/tiny
/lib64/libtiny
%post
touch `+ran+"\n"), 0o600)
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
	}
	run("rpmbuild", "-bb", "--quiet", "--define", "_topdir "+dir, spec)
	repo := filepath.Join(dir, "RPMS")
	run("createrepo_c", "--quiet", repo)
	repos := filepath.Join(dir, "repos")
	os.Mkdir(repos, 0o755)
	os.WriteFile(filepath.Join(repos, "here.repo"), []byte("[here]\nname=here\nbaseurl=file://"+repo+"\ngpgcheck=0\n"), 0o600)

	f := &Fetcher{Cache: filepath.Join(dir, "cache"), Repos: repos, Base: &Base{Format: "rpm", Arch: "amd64", Release: "1", Kernel: "tiny"}}
	lock, err := f.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if len(lock) != 1 || lock[0].Name != "tiny" || lock[0].Version != "1.0-2" {
		t.Fatalf("locked %v", lock)
	}
	if err := f.Fetch(lock); err != nil {
		t.Fatal(err)
	}
	tree := Tree{}
	if err := f.Unpack(tree, lock[0], func(string) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if tiny := tree["usr/bin/tiny"]; tiny == nil || string(tiny.Data) != "hello" || tiny.Mode != 0o755 || tiny.Source != "tiny=1.0-2" {
		t.Errorf("unpacked %+v", tiny)
	}
	if at, ok := tree.Resolve("usr/lib64/libtiny"); !ok || at != "usr/bin/tiny" {
		t.Errorf("the link leads to %q", at)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("the package's script ran")
	}
	other := lock[0]
	other.SHA256 = strings.Repeat("0", 64)
	if err := f.Fetch([]Package{other}); err == nil || !strings.Contains(err.Error(), "locked content") {
		t.Errorf("a package of another content: %v", err)
	}
	os.WriteFile(f.file(lock[0]), []byte("changed"), 0o600)
	if err := f.Unpack(tree, lock[0], func(string) bool { return true }); err == nil {
		t.Error("a changed cache is unpacked")
	}
}
