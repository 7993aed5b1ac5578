// Package updatetest makes bundles and disks for the tests of updates, with throw-away keys. Nothing in them could be started:
// a kernel is its command line alone, a root random bytes under a hash tree.
package updatetest

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/update"
	"yinjian/iso/layout"
)

// Sizes of what is made, in bytes.
const (
	SlotBytes = 8 << 20
	ESPBytes  = 32 << 20
	DiskBytes = 112 << 20
)

// Image is an image's own page.
func Image(index uint64) layout.Image {
	return layout.Image{
		Version: fmt.Sprintf("0.%d.0", index), Index: index, Arch: "amd64", Base: "debian12", Variant: layout.Evaluation, VerityHash: "sm3",
		LUKSCipher: "aes-xts-plain64", LUKSKeyBits: 512, ESPBytes: ESPBytes, SlotBytes: SlotBytes, BuiltFrom: "test",
	}
}

// A Release is an image as a builder makes it.
type Release struct {
	Manifest     update.Manifest
	Root, Kernel []byte
	Layout       layout.Root
}

// New makes one.
func New(t testing.TB, index uint64) *Release {
	t.Helper()
	data := make([]byte, 200*layout.BlockSize) // two levels of the tree
	rand.Read(data)                            // never fails (crypto/rand)
	tree, err := layout.NewTree("sm3", []byte("salt"))
	if err != nil {
		t.Fatal(err)
	}
	tree.Write(data)
	root, behind, err := tree.Sum()
	if err != nil {
		t.Fatal(err)
	}
	r := &Release{Root: append(data, behind...), Kernel: Unified(layout.CommandLine{Root: root, Media: layout.MediaDisk}.String() + " quiet"), Layout: root}
	r.Manifest = update.Manifest{
		Format: update.Format, Image: Image(index), Notes: "测试",
		Root:   update.RootFile{File: FileOf(r.Root), Hash: hex.EncodeToString(root.Hash), Algorithm: "sm3", DataBlocks: root.DataBlocks, Salt: hex.EncodeToString(root.Salt)},
		Kernel: FileOf(r.Kernel),
	}
	return r
}

// FileOf is what a manifest says of bytes.
func FileOf(b []byte) update.File {
	a, c := sm3.Sum(b), sha256.Sum256(b)
	return update.File{Size: int64(len(b)), SM3: hex.EncodeToString(a[:]), SHA256: hex.EncodeToString(c[:])}
}

// Unified is the least PE that has a command line: what the firmware would start is not in it.
func Unified(line string) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0x200)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x80)
	copy(b[0x80:], "PE\x00\x00")
	le.PutUint16(b[0x84:], 0x8664)
	le.PutUint16(b[0x86:], 1)
	s := b[0x98:]
	copy(s, ".cmdline")
	le.PutUint32(s[8:], uint32(len(line)))
	le.PutUint32(s[16:], uint32(len(line)))
	le.PutUint32(s[20:], 0x200)
	return append(b, line...)
}

// Key is a throw-away one.
func Key(t testing.TB) *sm2.PrivateKey {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Bundle signs the manifest by those keys, each as whom it is called.
func (r *Release) Bundle(t testing.TB, by map[string]*sm2.PrivateKey) []byte {
	t.Helper()
	raw, err := json.Marshal(r.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	var signatures []update.Signature
	for who, k := range by {
		value, err := k.SignWithSM2(rand.Reader, nil, update.Signed(raw))
		if err != nil {
			t.Fatal(err)
		}
		signatures = append(signatures, update.Signature{By: who, Value: value})
	}
	var out bytes.Buffer
	if err := update.Create(&out, raw, signatures, bytes.NewReader(r.Root), bytes.NewReader(r.Kernel)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// Install makes a disk with the release in slot A, and fills a folder as its EFI system partition.
func (r *Release) Install(t testing.TB, esp string) []byte {
	t.Helper()
	disk := make([]byte, DiskBytes)
	table, err := layout.NewTable(DiskBytes, 512, r.Manifest.Image, r.Layout, [3]layout.GUID{{1}, {2}, {3}})
	if err != nil {
		t.Fatal(err)
	}
	copy(disk[table.Offset(table.Partitions[layout.NumberRootA-1]):], r.Root)
	if err := table.Write(onto(disk), func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(esp, filepath.FromSlash(layout.EntryDir))
	name := layout.Entry{Index: r.Manifest.Image.Index}.String()
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, name), r.Kernel, 0o644)); err != nil {
		t.Fatal(err)
	}
	return disk
}

type onto []byte

func (o onto) WriteAt(p []byte, at int64) (int, error) { return copy(o[at:], p), nil }
func (o onto) ReadAt(p []byte, at int64) (int, error)  { return copy(p, o[at:]), nil }
