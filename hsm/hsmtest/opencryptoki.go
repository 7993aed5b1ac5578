package hsmtest

import (
	_ "embed"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// OpenCryptokiModule is Debian's openCryptoki.
const OpenCryptokiModule = "/usr/lib/x86_64-linux-gnu/pkcs11/libopencryptoki.so"

//go:embed opencryptoki.sh
var openCryptokiScript string

// OpenCryptoki answers the label and the user PIN of openCryptoki's software token to a test that runs beside it, and
// false to one whose work is done: its token lies in the system's folders and is served by a daemon, so the test (a top one)
// is run once more in namespaces of its own, and what it says there is said here. That needs root; somebody else may name
// a token that was made for it, YINJIAN_OPENCRYPTOKI=label:PIN.
func OpenCryptoki(t *testing.T) (label, pin string, inside bool) {
	t.Helper()
	if label, pin, given := strings.Cut(os.Getenv("YINJIAN_OPENCRYPTOKI"), ":"); given {
		return label, pin, true
	}
	if _, err := os.Stat(OpenCryptokiModule); err != nil {
		t.Skip("openCryptoki is not installed (Debian opencryptoki)")
	}
	if os.Getuid() != 0 {
		t.Skip("openCryptoki's daemon needs root, and YINJIAN_OPENCRYPTOKI names no token")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const l, p = "staff", "24681357"
	args := []string{"-e", "-c", openCryptokiScript, "opencryptoki.sh", self, "-test.run=^" + t.Name() + "$", "-test.count=1"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	cmd := exec.CommandContext(t.Context(), "sh", args...)
	cmd.Env = append(os.Environ(), "LABEL="+l, "PIN="+p, "YINJIAN_OPENCRYPTOKI="+l+":"+p)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) {
		t.Skip("this machine allows no namespaces, and YINJIAN_OPENCRYPTOKI names no token")
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	} else {
		t.Logf("%s", out)
	}
	return "", "", false
}
