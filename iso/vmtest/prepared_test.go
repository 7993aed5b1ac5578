package vmtest_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"yinjian/iso/vmtest"
)

// installed is a machine of the test's own that the image was installed on and that was never started: its disk and the state of
// its TPM are copies of one that is installed once for each image.
func installed(t *testing.T) *site {
	t.Helper()
	return prepared(t, "installed", func(t *testing.T, s *site) { s.install(t) })
}

// inUse is [installed] after its first start: provisioned, with administrators who have logged in, the application emr, the signer
// D0001, and the record n-1. It was switched off as by a power cut.
func inUse(t *testing.T) (*site, *business) {
	t.Helper()
	const keyFile = "emr.key"
	s := prepared(t, "in-use", func(t *testing.T, s *site) {
		copyFolder(t, installed(t).dir(), s.dir())
		v := s.boot(t)
		b := &business{register(t, login(t, v))}
		c := b.client(t, v)
		ready(t, c)
		sign(t, c, "n-1")
		v.Kill()
		if err := os.WriteFile(filepath.Join(s.dir(), keyFile), b.key, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	key, err := os.ReadFile(filepath.Join(s.dir(), keyFile))
	if err != nil {
		t.Fatal(err)
	}
	return s, &business{key}
}

// loginAgain logs the administrators in on a machine that is in use.
func loginAgain(t *testing.T, v *vmtest.VM) *officers {
	t.Helper()
	o := newOfficers(t, v)
	for role, id := range administrators {
		o.tokens[role] = o.enter(t, id, newPassword(role))
	}
	return o
}

// prepared is a copy of a site that make filled once for this image and these keys. It is kept in the image's folder.
func prepared(t *testing.T, name string, make func(*testing.T, *site)) *site {
	t.Helper()
	sum := sha256.New()
	for _, file := range []string{filepath.Join(built(t), "yinjian.iso"), filepath.Join(keys(t), "db.esl")} {
		f, err := os.Open(file)
		if err == nil {
			_, err = io.Copy(sum, f)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	at := filepath.Join(built(t), "prepared", fmt.Sprintf("%s-%.8x", name, sum.Sum(nil)))
	lock := locked(t, filepath.Join(built(t), "prepared", name+".lock"))
	defer lock.Close()
	if _, err := os.Stat(at); errors.Is(err, os.ErrNotExist) {
		old, _ := filepath.Glob(filepath.Join(built(t), "prepared", name+"-*")) // of images before; the pattern is well-formed
		for _, dir := range old {
			os.RemoveAll(dir)
		}
		s := newSite(t)
		s.urgent = 2 // others wait for what becomes of it
		make(t, s)
		half := at + "-half"
		copyFolder(t, s.dir(), half)
		if err := os.Rename(half, at); err != nil {
			t.Fatal(err)
		}
	} else if err != nil {
		t.Fatal(err)
	}
	s := newSite(t)
	copyFolder(t, at, s.dir())
	return s
}

// dir is the folder of what a site consists of.
func (s *site) dir() string { return filepath.Dir(s.disk) }

// copyFolder copies a folder's content, holes as holes.
func copyFolder(t *testing.T, from, to string) {
	t.Helper()
	err := os.MkdirAll(to, 0o700)
	if err == nil {
		var out []byte
		if out, err = exec.CommandContext(t.Context(), "cp", "-a", "--sparse=always", from+"/.", to).CombinedOutput(); err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// locked waits until nobody else prepares the same.
func locked(t *testing.T, name string) *os.File {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(name), 0o700)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}
