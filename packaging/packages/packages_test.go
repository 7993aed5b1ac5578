package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
)

// atTop works at the top of the repository, as make does.
func atTop(t *testing.T) { t.Chdir("../..") }

// What is packed is there, has its place, and each file that a site may change is one that packages leave alone.
func TestContents(t *testing.T) {
	atTop(t)
	entries, err := collect(".")
	if err != nil {
		t.Fatal(err)
	}
	if err := check(entries); err != nil {
		t.Fatal(err)
	}
	var config []string
	for _, e := range entries {
		if e.config() {
			config = append(config, e.to)
		}
	}
	if !slices.Equal(config, []string{"/etc/yinjian/yinjian.nft"}) {
		t.Errorf("configuration files %q", config)
	}
	for name, wrong := range map[string]entry{
		"twice":        {to: "/usr/bin/yinjian", mode: 0o644},
		"data":         {to: "/var/lib/yinjian/config.toml", mode: 0o644},
		"elsewhere":    {to: "/usr/lib/../../root/x", mode: 0o644},
		"setuid":       {to: "/usr/lib/yinjian/x", mode: fs.ModeSetuid | 0o755},
		"writable":     {to: "/usr/lib/yinjian/x", mode: 0o666},
		"not readable": {to: "/usr/lib/yinjian/x", mode: 0o600},
	} {
		if check(append(slices.Clone(entries), wrong)) == nil {
			t.Errorf("%s: packed", name)
		}
	}
}

// The archive has every file once under its package's tree with the sources' date, and is the same each time.
func TestArchive(t *testing.T) {
	atTop(t)
	entries, err := collect(".")
	if err != nil {
		t.Fatal(err)
	}
	r := release{version: "1.2.3", time: time.Unix(1750000000, 0)}
	dir := t.TempDir()
	var files [2][]byte
	for i := range files {
		file := filepath.Join(dir, "a.tar.gz")
		if err := r.archive(file, "yinjian-1.2.3", entries); err != nil {
			t.Fatal(err)
		}
		if files[i], err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
		slices.Reverse(entries)
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two archives of the same files differ")
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(files[0]))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for in := tar.NewReader(unzipped); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := found[h.Name]; twice || h.Uid != 0 || !h.ModTime.Equal(r.time) || !strings.HasPrefix(h.Name, "yinjian-1.2.3/") {
			t.Errorf("%s: twice, or of user %d and %v", h.Name, h.Uid, h.ModTime)
		}
		found[h.Name] = string(data)
	}
	unit, err := os.ReadFile("packaging/systemd/yinjian.service")
	if err != nil || found["yinjian-1.2.3/root/usr/lib/systemd/system/yinjian.service"] != string(unit) {
		t.Errorf("the unit is not the image's (%v)", err)
	}
	for _, name := range []string{"install.sh", "scripts/postinstall.sh", "evaluation/usr/share/doc/yinjian-evaluation/copyright"} {
		if found["yinjian-1.2.3/"+name] == "" {
			t.Errorf("%s is missing", name)
		}
	}
}

// The lists are those that sha256sum and OpenSSL know, and OpenSSL takes the signature; a changed list it does not.
func TestList(t *testing.T) {
	dir, keys := t.TempDir(), filepath.Join(t.TempDir(), "keys")
	for _, name := range []string{"a.deb", "b.rpm", "c.tar.gz"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("content of "+name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var key *sm2.PrivateKey
	for i := range 2 { // the second time it is the key of the first
		again, err := loadKey(keys, true)
		if err == nil {
			err = list(dir, again)
		}
		if err != nil || i > 0 && !again.Equal(key) {
			t.Fatal(err)
		}
		key = again
	}
	if _, err := loadKey(keys, false); !errors.Is(err, fs.ErrNotExist) { // no release is signed by it, nor by one that is made for it
		t.Errorf("err = %v", err)
	}
	run := func(name string, args ...string) (string, error) {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name + " is not installed")
		}
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("sha256sum", "--strict", "-c", "SHA256SUMS"); err != nil || strings.Count(out, ": OK") != 3 {
		t.Errorf("sha256sum: %v\n%s", err, out)
	}
	sums, err := os.ReadFile(filepath.Join(dir, "SM3SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := run("openssl", "dgst", "-sm3", "-r", "a.deb", "b.rpm", "c.tar.gz")
	if err != nil || strings.ReplaceAll(out, " *", "  ") != string(sums) {
		t.Errorf("openssl: %v\n%s\nwe wrote\n%s", err, out, sums)
	}
	verify := []string{"pkeyutl", "-verify", "-pubin", "-inkey", "release.pub", "-rawin", "-digest", "sm3", "-pkeyopt", "distid:1234567812345678", "-sigfile", "SM3SUMS.sig", "-in", "SM3SUMS"}
	if out, err := run("openssl", verify...); err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
	if err := os.WriteFile(filepath.Join(dir, "SM3SUMS"), append(sums, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run("openssl", verify...); err == nil {
		t.Errorf("openssl takes a changed list: %s", out)
	}
}
