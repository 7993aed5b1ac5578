package pack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/iso/layout"
)

// A Content is what a pack is made of.
type Content struct {
	// Manifest has everything but Format, Files and Image; Arch "" is read from the library or program.
	Manifest Manifest
	// Sources are the files by their path in the pack; links are followed.
	Sources map[string]string
	// Verity is the hash of the tree, sha256 or sm3: what the image's kernel has.
	Verity string
	// System are libraries of the image's own that the pack may need, beside the C library.
	System []string
}

// Create writes an unsigned pack to w and answers its manifest. It runs mksquashfs (squashfs-tools 4.4 or later) of the machine
// where it packs. The same content makes the same bytes with the same mksquashfs.
func Create(ctx context.Context, w io.Writer, c Content) (*Manifest, error) {
	m := c.Manifest
	m.Format, m.Files = Format, nil
	if m.Daemon != nil && m.Daemon.Arguments == nil {
		m.Daemon.Arguments = []string{}
	}
	slices.SortFunc(m.Environment, func(a, b Variable) int { return strings.Compare(a.Name, b.Name) })
	dir, err := os.MkdirTemp("", "yinjian-pack-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return nil, err
	}
	for name, source := range c.Sources {
		if reModule.MatchString(path.Base(name)) {
			return nil, fmt.Errorf("%s：不能打包内核模块，密封设备的内核只装入发行版签过名的模块，启动完毕后一个也不装 (kernel modules are not packed: the sealed kernel takes those alone that its distribution signed, and none at all once it has started)", name)
		}
		f, err := copyIn(tree, name, source)
		if err != nil {
			return nil, err
		}
		m.Files = append(m.Files, f)
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	if err := m.validateFiles(); err != nil {
		return nil, err
	}
	if err := linked(tree, &m, c.System); err != nil {
		return nil, err
	}
	image, err := squash(ctx, dir, tree, c.Verity, &m.Image)
	if err != nil {
		return nil, err
	}
	if err := m.validate(); err != nil {
		return nil, err
	}
	raw, err := m.Encode()
	if err != nil {
		return nil, err
	}
	if len(raw) > maxManifest {
		return nil, errors.New("the manifest is too long")
	}
	if err := WriteHead(w, raw, []Signature{}); err != nil {
		return nil, err
	}
	_, err = w.Write(image)
	return &m, err
}

// copyIn copies a file into the tree.
func copyIn(tree, name, source string) (File, error) {
	out := File{Path: name}
	if !filepath.IsLocal(name) {
		return out, fmt.Errorf("%q 不是包内的路径 (is no path in a pack)", name)
	}
	in, err := os.Open(source)
	if err != nil {
		return out, err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return out, err
	}
	if !info.Mode().IsRegular() {
		return out, fmt.Errorf("%s 不是文件 (is no file)", source)
	}
	mode := os.FileMode(0o444)
	if out.Executable = info.Mode()&0o111 != 0; out.Executable {
		mode = 0o555
	}
	to := filepath.Join(tree, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return out, err
	}
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return out, err
	}
	h3, h256 := sm3.New(), sha256.New()
	out.Size, err = io.Copy(io.MultiWriter(f, h3, h256), io.LimitReader(in, maxContent+1))
	out.SM3, out.SHA256 = hex.EncodeToString(h3.Sum(nil)), hex.EncodeToString(h256.Sum(nil))
	return out, errors.Join(err, f.Chmod(mode), f.Close())
}

// machines are the architectures of ELF files as Go calls them.
var machines = map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_LOONGARCH: "loong64"}

// linked looks at the library or program as the loader will: of one architecture, a library that is a PKCS#11 module, and nothing
// needed that is neither in the pack nor in the image.
func linked(tree string, m *Manifest, system []string) error {
	have := slices.Clone(system)
	for _, f := range m.Files {
		have = append(have, path.Base(f.Path))
	}
	for _, f := range m.Files {
		e, err := elf.Open(filepath.Join(tree, filepath.FromSlash(f.Path)))
		var none *elf.FormatError
		if errors.As(err, &none) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			if f.Path == m.Library || f.Path == m.Program || m.Daemon != nil && f.Path == m.Daemon.Program { // the sealed appliance has no interpreter
				return fmt.Errorf("%s 不是 ELF 文件 (is no ELF file): %v", f.Path, err)
			}
			continue
		}
		if err != nil {
			return err
		}
		err = func() error {
			defer e.Close()
			arch := machines[e.Machine]
			if m.Arch == "" && (f.Path == m.Library || f.Path == m.Program) {
				m.Arch = arch
			}
			needed, err := e.ImportedLibraries()
			if err != nil {
				return fmt.Errorf("%s: %w", f.Path, err)
			}
			for _, n := range needed {
				if !IsC(n) && !slices.Contains(have, n) {
					return fmt.Errorf("%s 需要 %s，包里没有：一并打包，映像里有的用 --system 写明 (needs a library that is not in the pack: pack it as well, or name it with --system if the image has it)", f.Path, n)
				}
			}
			if f.Path != m.Library {
				return nil
			}
			symbols, err := e.DynamicSymbols()
			if err != nil {
				return fmt.Errorf("%s: %w", f.Path, err)
			}
			if !slices.ContainsFunc(symbols, func(s elf.Symbol) bool { return s.Name == "C_GetFunctionList" && s.Section != elf.SHN_UNDEF }) {
				return fmt.Errorf("%s 没有 C_GetFunctionList，不是 PKCS#11 模块 (is no PKCS#11 module)", f.Path)
			}
			return nil
		}()
		if err != nil {
			return err
		}
	}
	for _, f := range m.Files { // the architecture is known now
		e, err := elf.Open(filepath.Join(tree, filepath.FromSlash(f.Path)))
		if err != nil {
			continue // looked at above
		}
		arch := machines[e.Machine]
		e.Close()
		if arch != m.Arch {
			return fmt.Errorf("%s 是 %s 的，包是 %s 的 (is of another architecture than the pack)", f.Path, e.Machine, m.Arch)
		}
	}
	return nil
}

// squash makes the image of the tree.
func squash(ctx context.Context, dir, tree, algorithm string, about *Image) ([]byte, error) {
	file := filepath.Join(dir, "image")
	// xz is what every kernel that we know has; no times, owners or attributes of the machine that packs.
	cmd := exec.CommandContext(ctx, "mksquashfs", tree, file, "-comp", "xz", "-b", "128K", "-noappend", "-all-root", "-no-exports", "-no-xattrs", "-no-progress", "-quiet")
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=0", "TZ=UTC", "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mksquashfs（squashfs-tools）: %w\n%s", err, bytes.TrimSpace(out))
	}
	image, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if over := len(image) % layout.BlockSize; over != 0 {
		image = append(image, make([]byte, layout.BlockSize-over)...)
	}
	salt := sha256.Sum256(image) // fresh for each content, and the same for the same
	t, err := layout.NewTree(algorithm, salt[:])
	if err != nil {
		return nil, err
	}
	t.Write(image) // never fails
	root, behind, err := t.Sum()
	if err != nil {
		return nil, err
	}
	image = append(image, behind...)
	if len(image) > MaxImage {
		return nil, fmt.Errorf("映像 %d MiB，至多 %d MiB (the image is too large)", len(image)>>20, MaxImage>>20)
	}
	h3, h256 := sm3.Sum(image), sha256.Sum256(image)
	*about = Image{Size: int64(len(image)), SM3: hex.EncodeToString(h3[:]), SHA256: hex.EncodeToString(h256[:]), Hash: hex.EncodeToString(root.Hash), Algorithm: root.Algorithm,
		DataBlocks: root.DataBlocks, Salt: hex.EncodeToString(root.Salt)}
	return image, nil
}
