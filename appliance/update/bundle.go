// Package update replaces the sealed image under a running appliance: it reads a signed bundle, writes it into the slot that
// is not running, publishes it for the boot loader, and marks it good when it has proved itself.
//
// A bundle is a tar (POSIX.1-2001, ustar) with four members in this order and nothing else: manifest.json, manifest.sig,
// root.img, kernel.efi. The manifest is believed for its signatures alone, which are judged before a byte of the rest is
// read; the rest is believed for the manifest's digests. Signatures are SM2 with SM3 (GM/T 0003.2-2012, identity
// 1234567812345678) over [Domain] and the manifest's bytes, in DER.
package update

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"debug/pe"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/pack"
	"yinjian/appliance/problem"
	"yinjian/iso/layout"
)

// Format names this form of bundles.
const Format = "yinjian-update/1"

// Domain stands before the manifest in what is signed, so that no signature over anything else is one over a manifest.
const Domain = Format + "\x00"

// Who signs a bundle.
const (
	ByRelease  = "release"  // who built it
	ByHospital = "hospital" // whoever the hospital wants to have seen it
)

const (
	memberManifest   = "manifest.json"
	memberSignatures = "manifest.sig"
	memberRoot       = "root.img"
	memberKernel     = "kernel.efi"

	maxManifest = 64 << 10
	maxKernel   = 64 << 20
)

// A Manifest says what a bundle holds and where it may be installed.
type Manifest struct {
	Format string       `json:"format"`
	Image  layout.Image `json:"image"`
	// MinIndex is the least image from which this one may be installed; 0: any.
	MinIndex uint64 `json:"min_index"`
	// Floor is the least image that may ever be installed once this one is good; an image with a known hole lies below it.
	Floor  uint64   `json:"floor"`
	Root   RootFile `json:"root"`
	Kernel File     `json:"kernel"`
	Notes  string   `json:"notes"` // for the administrator who approves it
}

// A File is a member's length and digests, in hex.
type File struct {
	Size   int64  `json:"size"`
	SM3    string `json:"sm3"`
	SHA256 string `json:"sha256"`
}

// holds says whether that is the file's content.
func (f File) holds(data []byte) bool {
	one, two := sm3.Sum(data), sha256.Sum256(data)
	return f.Size == int64(len(data)) && f.SM3 == hex.EncodeToString(one[:]) && f.SHA256 == hex.EncodeToString(two[:])
}

// A RootFile is that of the root, with what the kernel's signed command line says of it.
type RootFile struct {
	File
	Hash       string `json:"hash"`
	Algorithm  string `json:"algorithm"`
	DataBlocks uint64 `json:"data_blocks"`
	Salt       string `json:"salt"`
}

// Layout is the root as layout has it.
func (r RootFile) Layout() (layout.Root, error) {
	out := layout.Root{Algorithm: r.Algorithm, DataBlocks: r.DataBlocks}
	var err error
	if out.Hash, err = hex.DecodeString(r.Hash); err == nil {
		out.Salt, err = hex.DecodeString(r.Salt)
	}
	if err != nil {
		return layout.Root{}, err
	}
	return out, out.Validate()
}

// validate says what of a manifest cannot be.
func (m *Manifest) validate() error {
	if m.Format != Format {
		return fmt.Errorf("format %q", m.Format)
	}
	if err := m.Image.Validate(); err != nil {
		return err
	}
	root, err := m.Root.Layout()
	if err != nil {
		return err
	}
	switch {
	case m.Root.Algorithm != m.Image.VerityHash:
		return errors.New("the root's hash is not the image's")
	case m.Root.Size != int64(root.Blocks())*layout.BlockSize || m.Root.Size > m.Image.SlotBytes:
		return errors.New("the root's length")
	case m.Kernel.Size < 1 || m.Kernel.Size > maxKernel:
		return errors.New("the kernel's length")
	case m.Floor > m.Image.Index || m.MinIndex > m.Image.Index:
		return errors.New("a floor above the image itself")
	case len(m.Notes) > 4096:
		return errors.New("notes")
	}
	for _, digest := range []string{m.Root.SM3, m.Root.SHA256, m.Kernel.SM3, m.Kernel.SHA256} {
		if b, err := hex.DecodeString(digest); err != nil || len(b) != sha256.Size || hex.EncodeToString(b) != digest {
			return errors.New("a digest")
		}
	}
	return nil
}

// A Signature is one of a manifest's.
type Signature struct {
	By    string `json:"by"`    // [ByRelease] or [ByHospital]
	Value []byte `json:"value"` // DER
}

// Keys are those that a bundle has to be signed by. Release is needed; with Hospital both are.
type Keys struct{ Release, Hospital *ecdsa.PublicKey }

// ParseKey reads a public SM2 key, PKIX in PEM: the hospital's signs packs as well.
func ParseKey(text []byte) (*ecdsa.PublicKey, error) { return pack.ParseKey(text) }

// Signed is what a signature is made over.
func Signed(manifest []byte) []byte { return append([]byte(Domain), manifest...) }

// check judges the signatures.
func (k Keys) check(manifest []byte, signatures []Signature) error {
	if k.Release == nil {
		return errors.New("update: no release key is known")
	}
	for by, key := range map[string]*ecdsa.PublicKey{ByRelease: k.Release, ByHospital: k.Hospital} {
		if key == nil {
			continue
		}
		good := false
		for _, s := range signatures {
			good = good || s.By == by && sm2.VerifyASN1WithSM2(key, nil, Signed(manifest), s.Value) // nil: the default identity
		}
		if !good {
			who := map[string]string{ByRelease: "发布方 release", ByHospital: "医院 hospital"}[by]
			return refuse(problem.Forbidden, "升级包没有"+who+"密钥的有效签名，一个字节都没有写入 (no valid signature by this key; not a byte was written)",
				"请向发布方索取原包并核对其 SM3 (get the original bundle, and compare its SM3)")
		}
	}
	return nil
}

func refuse(code problem.Code, detail, next string) error { return problem.New(code, detail, next) }

// damaged refuses a bundle that is none, or not whole.
func damaged(format string, args ...any) error {
	return refuse(problem.InvalidRequest, "升级包已损坏或不是升级包："+fmt.Sprintf(format, args...)+" (the bundle is damaged, or none)", "请重新取得升级包 (get the bundle again)")
}

// Create writes a bundle. root and kernel are read once each; their lengths and digests must be the manifest's, which sign
// has signed as its JSON. Nothing is checked of whether the kernel starts that root: [Open]'s reader does.
func Create(w io.Writer, manifest []byte, signatures []Signature, root, kernel io.Reader) error {
	var m Manifest
	if err := strict(manifest, &m); err != nil {
		return err
	}
	if err := m.validate(); err != nil {
		return fmt.Errorf("update: manifest: %w", err)
	}
	sigs, err := json.Marshal(signatures)
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	for _, member := range []struct {
		name string
		size int64
		from io.Reader
	}{
		{memberManifest, int64(len(manifest)), bytes.NewReader(manifest)}, {memberSignatures, int64(len(sigs)), bytes.NewReader(sigs)},
		{memberRoot, m.Root.Size, root}, {memberKernel, m.Kernel.Size, kernel},
	} {
		h := tar.Header{Typeflag: tar.TypeReg, Name: member.name, Size: member.size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
		if err := t.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := io.CopyN(t, member.from, member.size); err != nil {
			return fmt.Errorf("update: %s: %w", member.name, err)
		}
	}
	return t.Close()
}

// strict reads JSON without unknown members or anything behind it.
func strict(text []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something behind the JSON")
	}
	return nil
}

// A Bundle is one whose manifest is signed as it has to be. The rest follows on its reader.
type Bundle struct {
	Manifest Manifest
	Raw      []byte // the manifest's bytes
	Root     layout.Root
	SM3      string // of Raw, in hex: what two persons compare

	signatures []byte
	tar        *tar.Reader
}

// Open reads a bundle up to its manifest and judges that; r is read no further than it has to be.
func Open(r io.Reader, keys Keys) (*Bundle, error) {
	b := &Bundle{tar: tar.NewReader(r)}
	var err error
	if b.Raw, err = b.small(memberManifest); err != nil {
		return nil, err
	}
	if b.signatures, err = b.small(memberSignatures); err != nil {
		return nil, err
	}
	if err := b.judge(keys); err != nil {
		return nil, err
	}
	return b, nil
}

// judge believes the manifest, or not.
func (b *Bundle) judge(keys Keys) error {
	var signatures []Signature
	if err := strict(b.signatures, &signatures); err != nil || len(signatures) > 16 {
		return damaged("%s", memberSignatures)
	}
	if err := keys.check(b.Raw, signatures); err != nil { // before anything in it is looked at
		return err
	}
	if err := strict(b.Raw, &b.Manifest); err != nil {
		return damaged("%s: %v", memberManifest, err)
	}
	if err := b.Manifest.validate(); err != nil {
		return damaged("%s: %v", memberManifest, err)
	}
	b.Root, _ = b.Manifest.Root.Layout() // validated
	sum := sm3.Sum(b.Raw)
	b.SM3 = hex.EncodeToString(sum[:])
	return nil
}

// next goes on to a member, which must be that one.
func (b *Bundle) next(name string) (int64, error) {
	h, err := b.tar.Next()
	switch {
	case err != nil:
		return 0, damaged("%s: %v", name, err)
	case h.Name != name || h.Typeflag != tar.TypeReg || h.Size < 0:
		return 0, damaged("%.40q 处应为 %s", h.Name, name)
	}
	return h.Size, nil
}

func (b *Bundle) small(name string) ([]byte, error) {
	size, err := b.next(name)
	if err != nil {
		return nil, err
	}
	if size > maxManifest {
		return nil, damaged("%s: %d bytes", name, size)
	}
	out := make([]byte, size)
	if _, err := io.ReadFull(b.tar, out); err != nil {
		return nil, damaged("%s: %v", name, err)
	}
	return out, nil
}

// member copies one to w while it takes its digests; what w got is worth nothing when an error comes back.
func (b *Bundle) member(name string, f File, w io.Writer) error {
	size, err := b.next(name)
	if err != nil {
		return err
	}
	if size != f.Size {
		return damaged("%s: %d bytes, %d are signed", name, size, f.Size)
	}
	sums := [...]hash.Hash{sm3.New(), sha256.New()}
	buf := make([]byte, 1<<20)
	for left := size; left > 0; {
		n, err := io.ReadFull(b.tar, buf[:min(left, int64(len(buf)))])
		if err != nil {
			return damaged("%s: %v", name, err)
		}
		for _, h := range sums {
			h.Write(buf[:n]) // never fails (hash.Hash)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return fmt.Errorf("update: writing %s: %w", name, err)
		}
		left -= int64(n)
	}
	for i, want := range [...]string{f.SM3, f.SHA256} {
		if hex.EncodeToString(sums[i].Sum(nil)) != want {
			return damaged("%s 与签过名的摘要不符", name)
		}
	}
	return nil
}

// root copies the root to w, and holds it against the root hash as well: what the kernel will ask of each block.
func (b *Bundle) root(w io.Writer) error {
	tree, err := layout.NewTree(b.Root.Algorithm, b.Root.Salt)
	if err != nil {
		return err
	}
	var behind bytes.Buffer
	parts := &splitter{first: tree, rest: &behind, left: int64(b.Root.DataBlocks) * layout.BlockSize}
	if err := b.member(memberRoot, b.Manifest.Root.File, io.MultiWriter(w, parts)); err != nil {
		return err
	}
	got, want, err := tree.Sum()
	if err != nil {
		return damaged("%s: %v", memberRoot, err)
	}
	if !bytes.Equal(got.Hash, b.Root.Hash) || !bytes.Equal(behind.Bytes(), want) {
		return damaged("%s 与根哈希不符", memberRoot)
	}
	return nil
}

// A splitter writes the first bytes to one writer and the rest to another.
type splitter struct {
	first, rest io.Writer
	left        int64
}

func (s *splitter) Write(p []byte) (int, error) {
	n := int(min(s.left, int64(len(p))))
	s.left -= int64(n)
	if _, err := s.first.Write(p[:n]); err != nil {
		return 0, err
	}
	_, err := s.rest.Write(p[n:])
	return len(p), err
}

// kernel answers the signed kernel, whose command line must start the bundle's root from a disk, and the end of the bundle.
func (b *Bundle) kernel() ([]byte, error) {
	var out bytes.Buffer
	if err := b.member(memberKernel, b.Manifest.Kernel, &out); err != nil {
		return nil, err
	}
	if _, err := b.tar.Next(); !errors.Is(err, io.EOF) {
		return nil, damaged("%s 之后还有内容", memberKernel)
	}
	line, err := CommandLine(out.Bytes())
	if err != nil {
		return nil, damaged("%s: %v", memberKernel, err)
	}
	if line.Media != layout.MediaDisk || !bytes.Equal(line.Root.Hash, b.Root.Hash) || line.Root.Algorithm != b.Root.Algorithm ||
		line.Root.DataBlocks != b.Root.DataBlocks || !bytes.Equal(line.Root.Salt, b.Root.Salt) {
		return nil, damaged("内核的命令行启动的不是这个根")
	}
	return out.Bytes(), nil
}

// CommandLine reads a unified kernel image's command line (UAPI Group Specification, unified kernel image: section .cmdline).
func CommandLine(kernel []byte) (layout.CommandLine, error) {
	f, err := pe.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return layout.CommandLine{}, err
	}
	var text []byte
	for _, s := range f.Sections {
		if s.Name != ".cmdline" {
			continue
		}
		if text != nil {
			return layout.CommandLine{}, errors.New("two command lines")
		}
		if s.VirtualSize > s.Size || s.VirtualSize > 64<<10 {
			return layout.CommandLine{}, errors.New("the command line's length")
		}
		if text, err = s.Data(); err != nil {
			return layout.CommandLine{}, err
		}
		text = text[:s.VirtualSize]
	}
	if text == nil {
		return layout.CommandLine{}, errors.New("no command line")
	}
	return layout.ParseCommandLine(string(bytes.TrimRight(text, "\x00")))
}
