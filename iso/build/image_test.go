package build

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/iso/layout"
)

// built is the folder of an image that `make image` made; without one these tests are left out.
func built(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("YINJIAN_IMAGE")
	if dir == "" {
		t.Skip("no image: make image-test")
	}
	return dir
}

// A second build of the same sources has the same bytes, in what is signed too.
func TestReproducible(t *testing.T) {
	dir := built(t)
	var image layout.Image
	text, err := exec.Command(tool(t, "unsquashfs"), "-cat", filepath.Join(dir, "root.img"), strings.TrimPrefix(layout.ImageFile, "/")).Output()
	if err != nil {
		t.Fatal(err)
	}
	if image, err = layout.ParseImage(text); err != nil {
		t.Fatal(err)
	}
	again := t.TempDir()
	cmd := exec.Command("go", "run", "./iso/mkimage", "build", "--base", "iso/bases/"+image.Base+".toml", "--variant", image.Variant,
		"--index", fmt.Sprint(image.Index), "--keys", dir+"-keys", "--out", again)
	cmd.Dir = sources
	cmd.Env = append(os.Environ(), "YINJIAN_REVISION="+image.BuiltFrom)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range []string{"sbom.cdx.json", "root.img", "disk.initrd", "iso.initrd", "disk.efi", "iso.efi", "disk.signed.efi", "iso.signed.efi", "esp.img", layout.ESPImage, "yinjian.iso", "update.json"} {
		a, err1 := fileSHA256(filepath.Join(dir, name))
		b, err2 := fileSHA256(filepath.Join(again, name))
		if err1 != nil || err2 != nil || a != b {
			t.Errorf("%s: %s and %s, %v, %v", name, a, b, err1, err2)
		}
	}
}

// What lies in the image, as another program reads it: all root's, nothing setuid, no device, and each regular file with
// the digest that the list of parts has.
func TestRootImage(t *testing.T) {
	dir := built(t)
	file := filepath.Join(dir, "root.img")
	out, err := exec.Command(tool(t, "unsquashfs"), "-lls", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	files := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) < 6 || !strings.HasPrefix(f[5], "squashfs-root") {
			continue
		}
		if f[1] != "root/root" || strings.ContainsAny(f[0][1:], "sSt") || !strings.Contains("-dl", f[0][:1]) {
			t.Errorf("%s", line)
		}
		if f[0][0] == '-' {
			files++
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "sbom.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	var bom struct {
		Components []struct {
			Type, Name string
			Hashes     []struct{ Content string }
		}
	}
	if err := json.Unmarshal(text, &bom); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root")
	if out, err := exec.Command("unsquashfs", "-quiet", "-no-progress", "-d", root, file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	listed := 0
	for _, c := range bom.Components {
		if c.Type != "file" {
			continue
		}
		listed++
		if sum, err := fileSHA256(filepath.Join(root, c.Name)); err != nil || sum != c.Hashes[0].Content {
			t.Errorf("%s: %s, listed %s, %v", c.Name, sum, c.Hashes[0].Content, err)
		}
	}
	if files != listed || files < 100 {
		t.Errorf("%d files, %d listed", files, listed)
	}
}

// The command lines are those of the root that lies beside them, and cryptsetup's own program finds the tree good.
func TestKernelsNameTheRoot(t *testing.T) {
	dir := built(t)
	root, err := os.ReadFile(filepath.Join(dir, "root.img"))
	if err != nil {
		t.Fatal(err)
	}
	for _, media := range []string{layout.MediaDisk, layout.MediaISO} {
		kernel, err := os.ReadFile(filepath.Join(dir, media+".signed.efi"))
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(kernel, []byte(layout.WordRootHash+"="))
		if at < 0 {
			t.Fatalf("%s: no command line", media)
		}
		text, _, _ := bytes.Cut(kernel[at:], []byte{0})
		line, err := layout.ParseCommandLine(string(text))
		if err != nil || line.Media != media {
			t.Fatalf("%s: %+v, %v", media, line, err)
		}
		if err := layout.Check(bytes.NewReader(root), line.Root); err != nil {
			t.Errorf("%s: %v", media, err)
		}
		if out, err := exec.Command(tool(t, "veritysetup"), "verify", fmt.Sprintf("--hash-offset=%d", line.Root.DataBlocks*layout.BlockSize),
			filepath.Join(dir, "root.img"), filepath.Join(dir, "root.img"), fmt.Sprintf("%x", line.Root.Hash)).CombinedOutput(); err != nil {
			t.Errorf("%s: veritysetup: %v: %s", media, err, out)
		}
		if out, err := exec.Command(tool(t, "sbverify"), "--cert", filepath.Join(dir+"-keys", "db.crt"), filepath.Join(dir, media+".signed.efi")).CombinedOutput(); err != nil {
			t.Errorf("%s: sbverify: %v: %s", media, err, out)
		}
	}
}
