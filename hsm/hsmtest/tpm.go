package hsmtest

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// A TPM is a TPM 2.0 of a test's own: swtpm, with its state in a folder, so that a restart is the same TPM.
type TPM struct {
	// Socket is where it answers.
	Socket string

	dir  string
	stop func()
}

// StartTPM starts one that nobody has used, until the test ends.
func StartTPM(t testing.TB) *TPM {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("swtpm is not installed (Debian swtpm)")
	}
	dir, err := os.MkdirTemp("", "tpm") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	c := &TPM{Socket: filepath.Join(dir, "tpm.sock"), dir: dir}
	t.Cleanup(func() {
		c.Stop(t)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	c.start(t)
	c.measure(t)
	return c
}

// measure is what the firmware and the boot loader of a machine do before its system: the registers 0 to 11 have something.
func (c *TPM) measure(t testing.TB) {
	t.Helper()
	for pcr := range uint(12) {
		c.Extend(t, pcr)
	}
}

func (c *TPM) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+c.dir, "--server", "type=unixio,path="+c.Socket,
		"--ctrl", "type=unixio,path="+c.Socket+".ctrl", "--flags", "not-need-init,startup-clear")
	said := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it ends by a signal
		close(ended)
	}()
	c.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		<-ended
		_ = os.Remove(c.Socket)
	})
	for begun := time.Now(); ; { // interval
		conn, err := net.Dial("unix", c.Socket)
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-ended:
			t.Fatalf("swtpm: %s", said)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Since(begun) > 2*time.Minute { // interval
			t.Fatalf("swtpm does not answer: %v", err)
		}
	}
}

// Stop ends it, as a power cut does.
func (c *TPM) Stop(testing.TB) { c.stop() }

// Restart is the restart of its machine: the registers begin anew.
func (c *TPM) Restart(t testing.TB) {
	t.Helper()
	c.Stop(t)
	c.start(t)
	c.measure(t)
}

// Extend changes a register, as what is started does that was not started before.
func (c *TPM) Extend(t testing.TB, pcr uint) {
	t.Helper()
	chip, err := linuxudstpm.Open(c.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer chip.Close()
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: bytes.Repeat([]byte{7}, 32)}}},
	}.Execute(chip)
	if err != nil {
		t.Fatal(err)
	}
}

// Listen answers another socket before the TPM, and what has gone through it, both ways.
func (c *TPM) Listen(t testing.TB) (path string, heard func() []byte) {
	t.Helper()
	path = c.Socket + ".heard"
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var all bytes.Buffer // guarded by mu
	pass := func(to io.Writer, from io.Reader) {
		b := make([]byte, 4096)
		for {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			all.Write(b[:n])
			mu.Unlock()
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
	}
	var busy sync.WaitGroup
	busy.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", c.Socket)
			if err != nil {
				near.Close()
				continue
			}
			busy.Go(func() { pass(near, far) })
			busy.Go(func() {
				pass(far, near)
				near.Close()
				far.Close()
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		busy.Wait()
	})
	return path, func() []byte {
		mu.Lock()
		defer mu.Unlock()
		return bytes.Clone(all.Bytes())
	}
}
