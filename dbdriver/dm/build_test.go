package dm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func run(t *testing.T, env []string, argv ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("the go command is not installed")
	}
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Dir = "build"
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// What joins our code to the driver compiles against the names that are known of the driver.
func TestStandInCompiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for from, to := range map[string]string{"build/go.standin.mod": "dm.mod", "../../go.sum": "dm.sum"} {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, to), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if out, err := run(t, nil, "go", "build", "-mod=mod", "-modfile="+filepath.Join(dir, "dm.mod"), "./link"); err != nil {
		t.Errorf("go build: %v: %s", err, out)
	}
}

// The whole program builds so, and refuses to start.
func TestStandInRefuses(t *testing.T) {
	if os.Getenv("YINJIAN_LONG") == "" {
		t.Skip("YINJIAN_LONG=1 builds the whole program")
	}
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "yinjian-dm")
	if out, err := run(t, nil, "./build.sh", "--standin", binary); err != nil {
		t.Fatalf("build.sh: %v: %s", err, out)
	}
	for _, args := range [][]string{{"--help"}, {"serve", "--dir", t.TempDir()}, {}} {
		if out, err := run(t, nil, append([]string{binary}, args...)...); err == nil || !strings.Contains(out, "占位模块") {
			t.Errorf("%q started: %v: %s", args, err, out)
		}
	}
	if out, err := run(t, nil, "go", "version", "-m", binary); err != nil || !strings.Contains(out, "./standin") {
		t.Errorf("go version -m does not tell the stand-in: %v: %s", err, out)
	}
}

// Where the driver cannot be had, that is what is said, and nothing is built.
func TestDriverOutOfReach(t *testing.T) {
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "yinjian-dm")
	out, err := run(t, []string{"GOPROXY=off", "GOMODCACHE=" + t.TempDir(), "GOFLAGS=-modcacherw"}, "./build.sh", binary)
	if err == nil || !strings.Contains(out, "取不到") {
		t.Errorf("build.sh: %v: %s", err, out)
	}
	if _, err := os.Stat(binary); err == nil {
		t.Error("something was built")
	}
}

// Nothing of the module above names the driver: its checks, its list of modules and its vendoring go without.
func TestRootIsFreeOfDriver(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"../../go.mod", "../../go.sum"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "chunanyong") {
			t.Errorf("%s names the driver", name)
		}
	}
}
