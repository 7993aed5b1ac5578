package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/iso/layout"
)

func tarOf(t *testing.T, headers ...tar.Header) io.Reader {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range headers {
		body := ""
		if h.Typeflag == tar.TypeReg {
			body = "of " + h.Name
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, body)
	}
	w.Close()
	return &out
}

// A package's files come to where the merge of /usr puts them, without setuid; links still lead where they led.
func TestAddTar(t *testing.T) {
	t.Parallel()
	tree := Tree{}
	err := tree.AddTar(tarOf(t,
		tar.Header{Name: "./bin/mount", Typeflag: tar.TypeReg, Mode: 0o4755},
		tar.Header{Name: "./lib/a/libx.so.1", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "./lib/a/libx.so", Typeflag: tar.TypeSymlink, Linkname: "libx.so.1"},
		tar.Header{Name: "./usr/lib/a/liby.so", Typeflag: tar.TypeSymlink, Linkname: "../../../lib/a/libx.so.1"},
		tar.Header{Name: "./sbin/again", Typeflag: tar.TypeLink, Linkname: "./bin/mount"},
		tar.Header{Name: "./dev/mem", Typeflag: tar.TypeChar},
		tar.Header{Name: "./usr/share/doc/x", Typeflag: tar.TypeReg},
	), "x=1", func(name string) bool { return !strings.HasPrefix(name, "usr/share/doc") })
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"usr/lib/a/libx.so": "usr/lib/a/libx.so.1", "usr/lib/a/liby.so": "usr/lib/a/libx.so.1",
		"usr/bin/mount": "usr/bin/mount", "usr/sbin/again": "usr/sbin/again"} {
		if at, ok := tree.Resolve(name); !ok || at != want {
			t.Errorf("%s resolves to %q, %v; want %q", name, at, ok, want)
		}
	}
	if m := tree["usr/bin/mount"].Mode; m != 0o755 {
		t.Errorf("usr/bin/mount has mode %v", m)
	}
	if tree["dev/mem"] != nil || tree["usr/share/doc/x"] != nil {
		t.Error("a device, or what is not kept, is in the tree")
	}
	if s := tree["usr/sbin/again"]; string(s.Data) != "of ./bin/mount" || s.Source != "x=1" {
		t.Errorf("the hard link became %+v", s)
	}
}

func TestPattern(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		glob, name string
		want       bool
	}{
		{"usr/bin/*", "usr/bin/mount", true}, {"usr/bin/*", "usr/bin/a/b", false}, {"usr/**", "usr/bin/a/b", true},
		{"usr/{bin,sbin}/x", "usr/sbin/x", true}, {"usr/{bin,sbin}/x", "usr/xbin/x", false}, {"a.b", "aXb", false},
		{"lib/libx.so.?", "lib/libx.so.1", true}, {"usr/bin", "usr/bin/mount", false}, {"a@.service", "a@.service", true},
	} {
		re, err := pattern(c.glob)
		if err != nil || re.MatchString(c.name) != c.want {
			t.Errorf("%q on %q: want %v, %v", c.glob, c.name, c.want, err)
		}
	}
}

// good is a tree that Check has nothing to say about.
func good() Tree {
	t := Tree{}
	t.Put("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/usr/sbin/nologin\n"), "x")
	t.Put("usr/bin/systemctl", 0o755, []byte("\x7fELF"), "systemd=252")
	t.Put("usr/lib/modules/6.1/kernel/ext4.ko", 0o644, nil, "linux=6.1")
	t.Put("usr/lib/systemd/system/multi-user.target", 0o644, nil, "x")
	t.Put("usr/share/zoneinfo/PRC", 0o644, nil, "x")
	for name, to := range links {
		t.Symlink(name, to, "x")
	}
	return t
}

func TestCheck(t *testing.T) {
	t.Parallel()
	if err := Check(good(), layout.Release, []string{"ext4"}); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(Tree){
		"is setuid":                 func(t Tree) { t["usr/bin/systemctl"].Mode |= fs.ModeSetuid },
		"others than root":          func(t Tree) { t["usr/bin/systemctl"].Mode = 0o777 },
		"usr/bin/sh: no image":      func(t Tree) { t.Put("usr/bin/sh", 0o755, nil, "dash=1") },
		"python3.11: no image":      func(t Tree) { t.Put("usr/bin/python3.11", 0o755, nil, "python=1") },
		"usr/lib/x/bash: no image":  func(t Tree) { t.Put("usr/lib/x/bash", 0o755, nil, "bash=1") },
		"usr/sbin/dpkg: no image":   func(t Tree) { t.Put("usr/sbin/dpkg", 0o755, nil, "dpkg=1") },
		"usr/bin/x is a link to sh": func(t Tree) { t.Symlink("usr/bin/x", "sh", "x") },
		"which is not there":        func(t Tree) { t.Symlink("usr/bin/x", "y", "x") },
		"is a script":               func(t Tree) { t.Put("usr/lib/x", 0o755, []byte("#!/usr/lib/y"), "x") },
		"not on the base's list":    func(t Tree) { t.Put("usr/lib/modules/6.1/kernel/firewire-core.ko.xz", 0o644, nil, "linux=6.1") },
		"like a password":           func(t Tree) { t.Put("etc/shadow", 0o600, []byte("root:$6$abc:1::::::\n"), "x") },
		"without a password field":  func(t Tree) { t.Put("etc/shadow", 0o600, []byte("root::1::::::\n"), "x") },
		"no password and no shell":  func(t Tree) { t["etc/passwd"].Data = []byte("root:x:0:0:root:/root:/bin/sh\n") },
		"etc/passwd is missing":     func(t Tree) { delete(t, "etc/passwd") },
		"no link to multi-user": func(t Tree) { // as where links were lost on the way here
			t.Put("usr/lib/systemd/system/default.target", 0o644, []byte("multi-user.target"), "x")
		},
		"software cipher machine": func(t Tree) { t.Put("usr/lib/yinjian/libyinjian-p11.so", 0o644, nil, "x") },
	} {
		tree := good()
		spoil(tree)
		if want == "without a password field" {
			want = "like a password"
		}
		if err := Check(tree, layout.Release, []string{"ext4"}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
	if err := Check(good(), layout.Evaluation, []string{"ext4"}); err == nil {
		t.Error("an evaluation image without its software cipher machine is taken")
	}
}

// What a real program is linked with comes along, and a library that nobody has is named. ldd is the judge.
func TestLink(t *testing.T) {
	t.Parallel()
	program, err := filepath.EvalSymlinks(tool(t, "openssl"))
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := elf.NewFile(bytes.NewReader(data)); err != nil || f.Machine != elf.EM_X86_64 {
		t.Skip("the machine's own programs are for another architecture than the folders below")
	}
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		t.Skip("ldd is missing")
	}
	offered, want := Tree{}, []string{}
	for _, word := range strings.Fields(string(out)) {
		if !strings.HasPrefix(word, "/") {
			continue
		}
		lib, err := os.ReadFile(word)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, merged(word))
		offered.Put(merged(word), 0o644, lib, "lib=1")
	}
	folders := []string{"usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib64"}
	tree := Tree{}
	tree.Put("usr/bin/openssl", 0o755, data, "openssl=3")
	if err := link(tree, offered, folders); err != nil {
		t.Fatal(err)
	}
	if len(want) < 3 {
		t.Fatalf("ldd says %s", out)
	}
	for _, name := range want {
		if tree[name] == nil {
			t.Errorf("%s did not come along", name)
		}
	}
	delete(offered, want[0])
	bare := Tree{}
	bare.Put("usr/bin/openssl", 0o755, data, "openssl=3")
	if err := link(bare, offered, folders); err == nil || !strings.Contains(err.Error(), filepath.Base(want[0])) {
		t.Errorf("without %s: %v", want[0], err)
	}
}

// cpio, as the kernel does, reads what we pack, and gets the same bytes from two packings.
func TestInitrd(t *testing.T) {
	t.Parallel()
	cpio := tool(t, "cpio")
	tree := Tree{}
	tree.Put("init", 0o755, []byte("program"), "x")
	tree.Put("modules/a.ko", 0o644, bytes.Repeat([]byte{1}, 4099), "x")
	tree.Symlink("link", "init", "x")
	packed, err := initrd(tree)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := initrd(tree); !bytes.Equal(packed, again) {
		t.Error("two packings differ")
	}
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(cpio, "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = t.TempDir(), z
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for name, f := range tree {
		info, err := os.Lstat(filepath.Join(cmd.Dir, name))
		if err != nil || info.Mode() != f.Mode && f.Mode&fs.ModeSymlink == 0 {
			t.Errorf("%s: %v, %v", name, info, err)
			continue
		}
		if data, err := os.ReadFile(filepath.Join(cmd.Dir, name)); f.Mode.IsRegular() && (err != nil || !bytes.Equal(data, f.Data)) {
			t.Errorf("%s has other content: %v", name, err)
		}
	}
}

func TestSBOM(t *testing.T) {
	t.Parallel()
	text, err := SBOM(good(), "image", "0.1.0")
	if err != nil {
		t.Fatal(err)
	}
	var bom struct {
		Components []struct{ Type, Name, Version string }
	}
	if err := json.Unmarshal(text, &bom); err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, c := range bom.Components {
		have = append(have, c.Type+" "+c.Name+" "+c.Version)
	}
	if got := strings.Join(have, "; "); got != "library linux 6.1; library systemd 252; "+
		"file /etc/passwd ; file /usr/bin/systemctl ; file /usr/lib/modules/6.1/kernel/ext4.ko ; file /usr/lib/systemd/system/multi-user.target ; file /usr/share/zoneinfo/PRC " &&
		got != "library systemd 252; library linux 6.1; file /etc/passwd ; file /usr/bin/systemctl ; file /usr/lib/modules/6.1/kernel/ext4.ko ; file /usr/lib/systemd/system/multi-user.target ; file /usr/share/zoneinfo/PRC " {
		t.Errorf("SBOM lists %s", got)
	}
	if !strings.Contains(string(text), "yinjian:sm3") {
		t.Error("no SM3")
	}
}
