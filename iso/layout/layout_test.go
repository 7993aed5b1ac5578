package layout_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/iso/layout"
)

func image() layout.Image {
	return layout.Image{Version: "0.1.0", Index: 7, Arch: "amd64", Base: "debian12", Variant: layout.Release,
		VerityHash: "sha256", LUKSCipher: "aes-xts-plain64", LUKSKeyBits: 512, ESPBytes: 64 << 20, SlotBytes: 16 << 20}
}

func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is missing: packaging/dev/deps.sh image", name)
	}
	return path
}

// noise is data of blocks blocks, with the root and the image that it becomes.
func noise(t *testing.T, algorithm string, blocks int) (layout.Root, []byte) {
	t.Helper()
	data := make([]byte, blocks*layout.BlockSize)
	rand.NewChaCha8([32]byte{byte(blocks)}).Read(data)
	tree, err := layout.NewTree(algorithm, bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	for rest := data; len(rest) > 0; { // cut anyhow
		n := min(len(rest), 1+rand.IntN(3*layout.BlockSize))
		tree.Write(rest[:n])
		rest = rest[n:]
	}
	root, behind, err := tree.Sum()
	if err != nil {
		t.Fatal(err)
	}
	if got := uint64(len(data)+len(behind)) / layout.BlockSize; got != root.Blocks() {
		t.Errorf("%d blocks, Blocks says %d", got, root.Blocks())
	}
	return root, append(data, behind...)
}

// cryptsetup's own program judges superblock, tree and root hash, for both hashes and around each size at which the
// tree gets another level.
func TestTreeAgainstVeritysetup(t *testing.T) {
	veritysetup := tool(t, "veritysetup")
	for _, algorithm := range []string{"sha256", "sm3"} {
		for _, blocks := range []int{2, 127, 128, 129, 128*128 + 1} {
			t.Run(fmt.Sprintf("%s %d", algorithm, blocks), func(t *testing.T) {
				root, whole := noise(t, algorithm, blocks)
				file := filepath.Join(t.TempDir(), "root.img")
				if err := os.WriteFile(file, whole, 0o600); err != nil {
					t.Fatal(err)
				}
				verify := func() error {
					return exec.Command(veritysetup, "verify", "--hash-offset="+fmt.Sprint(root.DataBlocks*layout.BlockSize),
						file, file, fmt.Sprintf("%x", root.Hash)).Run()
				}
				if err := verify(); err != nil {
					t.Errorf("veritysetup refuses what we made: %v", err)
				}
				whole[len(whole)-layout.BlockSize] ^= 1
				os.WriteFile(file, whole, 0o600)
				if verify() == nil {
					t.Error("veritysetup takes a changed tree: it checks nothing here")
				}
			})
		}
	}
}

func TestCheck(t *testing.T) {
	root, whole := noise(t, "sm3", 300)
	if err := layout.Check(bytes.NewReader(append(bytes.Clone(whole), "what lies behind"...)), root); err != nil {
		t.Fatalf("Check = %v", err)
	}
	data := int(root.DataBlocks) * layout.BlockSize
	for name, at := range map[string]int{"first byte": 0, "data": data / 2, "superblock": data, "its salt": data + 90,
		"behind the superblock": data + 4000, "tree": data + layout.BlockSize, "last byte": len(whole) - 1} {
		changed := bytes.Clone(whole)
		changed[at] ^= 0x80
		if err := layout.Check(bytes.NewReader(changed), root); !errors.Is(err, layout.ErrChanged) {
			t.Errorf("%s flipped: %v", name, err)
		}
	}
	for _, size := range []int{0, data, data + layout.BlockSize, len(whole) - 1} {
		if err := layout.Check(bytes.NewReader(whole[:size]), root); !errors.Is(err, layout.ErrChanged) {
			t.Errorf("cut to %d bytes: %v", size, err)
		}
	}
	if err := layout.Check(io.MultiReader(bytes.NewReader(whole[:5]), failing{}), root); err == nil || errors.Is(err, layout.ErrChanged) {
		t.Errorf("a disk that cannot be read: %v", err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("input/output error") }

func TestCommandLine(t *testing.T) {
	root, _ := noise(t, "sha256", 2)
	for _, c := range []layout.CommandLine{{Root: root, Media: layout.MediaDisk}, {Root: root, Media: layout.MediaISO, ESP: [32]byte{1, 2}}} {
		got, err := layout.ParseCommandLine("quiet " + c.String() + " console=ttyS0")
		if err != nil || got.String() != c.String() {
			t.Errorf("%q is read as %q, %v", c, got, err)
		}
	}
	good := layout.CommandLine{Root: root, Media: layout.MediaDisk}.String()
	for name, text := range map[string]string{
		"empty":             "",
		"root hash twice":   good + " roothash=" + strings.Repeat("0", 64),
		"media twice":       good + " yinjian.media=disk",
		"another media":     strings.Replace(good, "=disk", "=net", 1),
		"short hash":        strings.Replace(good, "roothash=", "roothash= x", 1),
		"another algorithm": strings.Replace(good, "sha256", "md5", 1),
		"no blocks":         strings.Replace(good, ",2,", ",0,", 1),
		"too many blocks":   strings.Replace(good, ",2,", ",1048577,", 1),
		"ESP on the disk":   good + " yinjian.esp=" + strings.Repeat("0", 64),
		"ISO without ESP":   strings.Replace(good, "=disk", "=iso", 1),
	} {
		if c, err := layout.ParseCommandLine(text); err == nil {
			t.Errorf("%s: taken as %q", name, c)
		}
	}
}

func FuzzCommandLine(f *testing.F) {
	f.Add("roothash=" + strings.Repeat("ab", 32) + " yinjian.verity=sha256,12,00ff yinjian.media=disk")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := layout.ParseCommandLine(text)
		if err != nil {
			return
		}
		if again, err := layout.ParseCommandLine(c.String()); err != nil || again.String() != c.String() {
			t.Errorf("%q: %q, %v", c, again, err)
		}
	})
}

func TestEntry(t *testing.T) {
	for name, want := range map[string]layout.Entry{
		"yinjian_7+3.efi":   layout.NewEntry(7),
		"yinjian_7.efi":     layout.NewEntry(7).Good(),
		"YINJIAN_7+1-2.EFI": {Index: 7, Counted: true, Left: 1, Done: 2},
		"yinjian_7+0-3.efi": {Index: 7, Counted: true, Done: 3},
	} {
		if got, err := layout.ParseEntry(name); err != nil || got != want || got.String() != strings.ToLower(name) {
			t.Errorf("%s: %+v (%s), %v", name, got, got, err)
		}
	}
	if e, _ := layout.ParseEntry("yinjian_7+0-3.efi"); !e.Failed() || layout.NewEntry(7).Failed() {
		t.Error("an entry without tries left is the one that failed")
	}
	for _, name := range []string{"", "yinjian_.efi", "yinjian_07.efi", "yinjian_7+.efi", "yinjian_7+-1.efi", "yinjian_7+3-0.efi",
		"yinjian_7.efi.tmp", "yinjian_-7.efi", "linux_7.efi", "yinjian_7+03.efi", "yinjian_99999999999999999999.efi"} {
		if e, err := layout.ParseEntry(name); err == nil {
			t.Errorf("%q is taken as %+v", name, e)
		}
	}
}

func TestImage(t *testing.T) {
	text, err := json.Marshal(image())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := layout.ParseImage(text); err != nil || got != image() {
		t.Errorf("ParseImage = %+v, %v", got, err)
	}
	for name, change := range map[string]func(*layout.Image){
		"version": func(i *layout.Image) { i.Version = "" },
		"index":   func(i *layout.Image) { i.Index = 0 },
		"variant": func(i *layout.Image) { i.Variant = "test" },
		"hash":    func(i *layout.Image) { i.VerityHash = "crc32c" },
		"bits":    func(i *layout.Image) { i.LUKSKeyBits = 128 },
		"slot":    func(i *layout.Image) { i.SlotBytes++ },
		"arch":    func(i *layout.Image) { i.Arch = "pdp11" },
	} {
		i := image()
		change(&i)
		if err := i.Validate(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := layout.ParseImage([]byte(strings.Replace(string(text), `"index"`, `"indx"`, 1))); err == nil {
		t.Error("an unknown member is taken")
	}
}
