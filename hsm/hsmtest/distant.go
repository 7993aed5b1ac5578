package hsmtest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"yinjian/packaging/porttest"
)

// A Distant is the software cipher machine as its own program, reached over the network alone, as a maker's machine is.
type Distant struct {
	Address     string // host:port
	Credentials string // file that lets a module in
	module      string
	slots       map[string]int // by token label
}

// NewDistant starts binary, which is yinjian, as the software cipher machine and makes tokens with these labels, their PIN
// being [UserPIN]: by pkcs11-tool, over the network.
func NewDistant(t testing.TB, binary, module string, labels ...string) *Distant {
	t.Helper()
	if _, err := exec.LookPath("pkcs11-tool"); err != nil {
		t.Skip("pkcs11-tool is not installed: packaging/dev/deps.sh test")
	}
	root, err := os.MkdirTemp("", "yj") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	d := &Distant{Address: porttest.Free(t), Credentials: filepath.Join(root, "state", "link-client.pem"), module: module, slots: map[string]int{}}
	phrase := filepath.Join(root, "passphrase")
	if err := os.WriteFile(phrase, []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "softtoken", "--state", filepath.Join(root, "state"), "--passphrase-file", phrase, "--slots", strconv.Itoa(len(labels)), "--listen", d.Address)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its state says how it ended
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	for {
		conn, err := net.Dial("tcp", d.Address)
		if err == nil {
			conn.Close()
			break
		}
		select {
		case <-ended:
			t.Fatalf("the software cipher machine ended: %v", cmd.ProcessState)
		case <-time.After(20 * time.Millisecond):
		}
	}
	for i, label := range labels {
		d.slots[label] = i
		d.Tool(t, label, "--init-token", "--so-pin", SOPIN, "--label", label)
		d.Tool(t, label, "--init-pin", "--login", "--login-type", "so", "--so-pin", SOPIN, "--new-pin", UserPIN)
	}
	return d
}

// Tool runs pkcs11-tool over the network on the slot of a token.
func (d *Distant) Tool(t testing.TB, label string, args ...string) string {
	t.Helper()
	cmd := exec.Command("pkcs11-tool", append([]string{"--module", d.module, "--slot", strconv.Itoa(d.slots[label])}, args...)...)
	cmd.Env = append(os.Environ(), "YINJIAN_P11_ADDRESS="+d.Address, "YINJIAN_P11_CREDENTIALS="+d.Credentials)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("pkcs11-tool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}
