package build

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"yinjian/iso/layout"
)

// command runs a program of others with fixed time, zone and language.
func command(when time.Time, stdin io.Reader, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", when.Unix()), "TZ=UTC", "LC_ALL=C", "MTOOLS_SKIP_CHECK=1")
	cmd.Stdin = stdin
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, &out)
	}
	return nil
}

// squash packs the tree and puts superblock and hash tree behind it: the image of a slot.
func squash(t Tree, b *Base, file string, when time.Time) (layout.Root, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(t.WriteTar(w, when)) }()
	os.Remove(file)
	args := append([]string{"-", file, "-tar"}, b.Squashfs...)
	args = append(args, "-noappend", "-all-root", "-no-exports", "-no-xattrs", "-no-progress", "-quiet",
		"-root-mode", "0755", "-root-time", fmt.Sprint(when.Unix()))
	err := command(when, r, "mksquashfs", args...)
	r.Close()
	if err != nil {
		return layout.Root{}, err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return layout.Root{}, err
	}
	if over := len(data) % layout.BlockSize; over != 0 {
		data = append(data, make([]byte, layout.BlockSize-over)...)
	}
	// The salt has to be fresh for each content, and the same for the same: the content's own digest.
	h := hashes[b.VerityHash]()
	h.Write(data)
	tree, err := layout.NewTree(b.VerityHash, h.Sum(nil))
	if err != nil {
		return layout.Root{}, err
	}
	tree.Write(data)
	root, behind, err := tree.Sum()
	if err != nil {
		return layout.Root{}, err
	}
	return root, os.WriteFile(file, append(data, behind...), 0o644)
}

// esp makes the EFI system partition's image, without the zeros behind what is in use: the installer writes these bytes
// to a partition of the base's size.
func esp(dir string, size int64, files map[string][]byte, label string, when time.Time) ([]byte, error) {
	image := filepath.Join(dir, "fat.img")
	os.Remove(image)
	if err := os.WriteFile(image, nil, 0o644); err != nil {
		return nil, err
	}
	if err := os.Truncate(image, size); err != nil {
		return nil, err
	}
	kind := "32"
	if size < 64<<20 { // FAT32 has at least 65525 clusters
		kind = "16"
	}
	if err := command(when, nil, "mkfs.vfat", "-F", kind, "-i", "59494e4a", "--invariant", "-n", label, image); err != nil {
		return nil, err
	}
	made := map[string]bool{".": true}
	var folder func(name string) error
	folder = func(name string) error {
		if made[name] {
			return nil
		}
		if err := folder(path.Dir(name)); err != nil {
			return err
		}
		made[name] = true
		return command(when, nil, "mmd", "-i", image, "::/"+name)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := folder(path.Dir(name)); err != nil {
			return nil, err
		}
		one := filepath.Join(dir, "one")
		if err := os.WriteFile(one, files[name], 0o644); err != nil {
			return nil, err
		}
		if err := os.Chtimes(one, when, when); err != nil {
			return nil, err
		}
		if err := command(when, nil, "mcopy", "-m", "-i", image, one, "::/"+name); err != nil {
			return nil, err
		}
	}
	defer os.Remove(image)
	defer os.Remove(filepath.Join(dir, "one"))
	return used(image)
}

// gzipped packs b: RFC 1952, without name and time.
func gzipped(b []byte) ([]byte, error) {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	_, err := z.Write(b)
	err = errors.Join(err, z.Close())
	return out.Bytes(), err
}

// used reads a file up to its last byte that is not zero, to a whole MiB.
func used(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []byte
	zeros, block, last := make([]byte, layout.Align), make([]byte, layout.Align), 0
	for {
		n, err := io.ReadFull(f, block)
		if n > 0 {
			all = append(all, block[:n]...)
			if !bytes.Equal(block[:n], zeros[:n]) {
				last = len(all)
			} else if len(all)-last > 64<<20 {
				return all[:last], nil // mtools fills from the front; what is behind 64 MiB of nothing is nothing
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return all[:last], nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// iso makes the installation medium: for UEFI alone, from a CD or a stick. Its boot partition has one signed kernel, the
// installer's; the folder beside it what the installer writes to the disk.
func iso(dir, out string, boot []byte, files map[string]string, when time.Time) error {
	efi := filepath.Join(dir, "efi.img")
	if err := os.WriteFile(efi, boot, 0o644); err != nil {
		return err
	}
	defer os.Remove(efi)
	content := filepath.Join(dir, "iso")
	os.RemoveAll(content)
	defer os.RemoveAll(content)
	if err := os.MkdirAll(filepath.Join(content, layout.MediaDir), 0o755); err != nil {
		return err
	}
	for name, from := range files {
		if err := os.Link(from, filepath.Join(content, layout.MediaDir, name)); err != nil {
			return err
		}
	}
	err := filepath.WalkDir(content, func(name string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(name, when, when)
	})
	if err != nil {
		return err
	}
	os.Remove(out)
	stamp := when.UTC().Format("20060102150405") + "00"
	return command(when, nil, "xorriso", "-as", "mkisofs", "-quiet", "-o", out, "-V", layout.ISOLabel, "-r", "-J",
		"--modification-date="+stamp, "--set_all_file_dates", stamp, "-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::", "-no-emul-boot",
		"-append_partition", "2", "0xef", efi, "-appended_part_as_gpt", "-partition_offset", "16", content)
}
