package backup

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/sys/unix"

	"yinjian/appliance/custody"
)

const (
	manifestName = "manifest.json"
	maxManifest  = 16 << 20
	journalDir   = "journal/"
)

// SegmentName is a journal segment's member in the archive.
func SegmentName(number int) string { return fmt.Sprintf(journalDir+"journal-%06d.db", number) }

// A Manifest is an archive's last member: what is in it.
type Manifest struct {
	ID      string `json:"id"`
	Node    string `json:"node"`
	Epoch   string `json:"epoch"`
	Program string `json:"program"`
	// Entries are those of the journal, in this backup and those that it continues.
	Entries uint64 `json:"entries"`
	// Segments are numbered from 1 to Segments; those up to Through are sealed and never change.
	Segments int    `json:"segments"`
	Through  int    `json:"through"`
	Files    []File `json:"files"`
	// Softtoken: the software cipher machine's store is in it, sealed under a passphrase that is not.
	Softtoken bool `json:"softtoken"`
	// Absent are files that the configuration names and that no backup has: secrets, vendors' modules, what lies elsewhere.
	Absent []string `json:"absent"`
}

// A File is a member of the archive.
type File struct {
	Name string `json:"name"` // with slashes, in the appliance's folder
	Size int64  `json:"size"`
	SM3  string `json:"sm3"`
}

// A Writer writes an archive. Not safe for concurrent use.
type Writer struct {
	sealer   *Sealer
	tar      *tar.Writer
	manifest Manifest
}

// NewWriter begins an archive for those who have shares of the secret behind point.
func NewWriter(w io.Writer, h Header, point []byte) (*Writer, error) {
	s, err := NewSealer(w, h, point)
	if err != nil {
		return nil, err
	}
	return &Writer{sealer: s, tar: tar.NewWriter(s), manifest: Manifest{ID: h.ID, Node: h.Node, Epoch: h.Epoch, Program: h.Program}}, nil
}

// Add writes a file of exactly size bytes. Memory does not grow with it.
func (w *Writer) Add(name string, size int64, r io.Reader) error {
	if err := w.tar.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o600, Typeflag: tar.TypeReg, Format: tar.FormatPAX}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	sum := sm3.New()
	n, err := io.Copy(io.MultiWriter(w.tar, sum), io.LimitReader(r, size))
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes where %d were announced", n, size)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	w.manifest.Files = append(w.manifest.Files, File{name, size, hex.EncodeToString(sum.Sum(nil))})
	return nil
}

// Close writes the manifest, of which m says what the members do not, and the end.
func (w *Writer) Close(m Manifest) error {
	m.ID, m.Node, m.Epoch, m.Program, m.Files = w.manifest.ID, w.manifest.Node, w.manifest.Epoch, w.manifest.Program, w.manifest.Files
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return err
	}
	if err := w.Add(manifestName, int64(len(b)), bytes.NewReader(b)); err != nil {
		return err
	}
	return errors.Join(w.tar.Close(), w.sealer.Close())
}

// A Part is a file of a chain: a whole backup and those that continue it.
type Part struct {
	File   string
	Header *Header
	SM3    string // of the file, hexadecimal; "" until it was read
	// Read, if set, is told of bytes that [Extract] has read.
	Read func(n int)
}

// Chain puts the files of one backup in order: the whole one first, the newest last.
func Chain(files []string) ([]Part, error) {
	var parts []Part
	for _, name := range files {
		h, err := headerOf(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		parts = append(parts, Part{File: name, Header: h})
	}
	var chain []Part
	for base := ""; len(chain) < len(parts); {
		i := slices.IndexFunc(parts, func(p Part) bool {
			return base == "" && p.Header.Base == nil || base != "" && p.Header.Base != nil && p.Header.Base.ID == base
		})
		switch {
		case i < 0 && base == "":
			return nil, fmt.Errorf("没有完整备份：增量 %s 接在 %s 之后，请一并给出 (no whole backup is among them; this one continues another)", parts[0].Header.ID, parts[0].Header.Base.ID)
		case i < 0:
			return nil, fmt.Errorf("%s 之后没有接得上的增量；缺了中间的一份，或多给了别的 (nothing given continues this one: one in between is missing, or another chain's was given)", base)
		}
		chain = append(chain, parts[i])
		base = parts[i].Header.ID
	}
	return chain, nil
}

func headerOf(name string) (*Header, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h, _, err := ReadHeader(f)
	return h, err
}

// Extract opens a chain with the custodians' shares and writes the files of its last backup into dir, which is there and
// empty, each durable. It answers the manifest when every part was read to its end and every file is what the manifest
// says; after an error dir holds something that nobody may use. parts get their digests.
func Extract(ctx context.Context, parts []Part, shares []custody.Share, dir string) (*Manifest, error) {
	var m *Manifest
	for i := range parts {
		p := &parts[i]
		through := wholePart // of a base only what is sealed, which the ones after it leave out: perhaps nothing
		if i+1 < len(parts) {
			through = parts[i+1].Header.Base.Through
		}
		var err error
		if m, err = p.extract(ctx, shares, dir, through); err != nil {
			return nil, fmt.Errorf("%s: %w", p.File, err)
		}
		if i > 0 && parts[i-1].SM3 != p.Header.Base.SM3 {
			return nil, fmt.Errorf("%s: 接在摘要为 %s 的备份之后，而 %s 的摘要为 %s (it continues another file)", p.File, p.Header.Base.SM3, parts[i-1].File, parts[i-1].SM3)
		}
	}
	for n := 1; n <= m.Segments; n++ {
		if _, err := os.Stat(filepath.Join(dir, SegmentName(n))); err != nil {
			return nil, damaged("日志分段 %d 不在其中 (segment %d is not in it)", n, n)
		}
	}
	return m, nil
}

// wholePart is every file of a part.
const wholePart = -1

// extract writes one part's files, or the journal's segments up to a number alone.
func (p *Part) extract(ctx context.Context, shares []custody.Share, dir string, through int) (*Manifest, error) {
	f, err := os.Open(p.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	digest := sm3.New()
	in := &reader{ctx: ctx, r: f, digest: digest, told: p.Read}
	h, head, err := ReadHeader(in)
	if err != nil {
		return nil, err
	}
	seed, err := Seed(shares, h)
	if err != nil {
		return nil, err
	}
	defer clear(seed)
	stream, err := NewOpener(in, h, head, seed)
	if err != nil {
		return nil, err
	}
	var m *Manifest
	var found []File
	archive := tar.NewReader(stream)
	for {
		member, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, inArchive(err)
		}
		if m != nil {
			return nil, damaged("清单之后还有 %s (members after the manifest)", member.Name)
		}
		if member.Name == manifestName {
			if m, err = readManifest(archive); err != nil {
				return nil, inArchive(err)
			}
			continue
		}
		one := File{Name: member.Name, Size: member.Size}
		if !filepath.IsLocal(member.Name) || member.Typeflag != tar.TypeReg || path.Clean(member.Name) != member.Name {
			return nil, damaged("不可接受的成员 %q (a member that has no place)", member.Name)
		}
		if one.SM3, err = writeMember(archive, dir, member, through == wholePart || isSegmentUpTo(member.Name, through)); err != nil {
			return nil, inArchive(err)
		}
		found = append(found, one)
	}
	if _, err := io.Copy(io.Discard, stream); err != nil { // up to the end mark, and nothing after it
		return nil, err
	}
	switch {
	case m == nil:
		return nil, damaged("没有清单 (there is no manifest)")
	case m.ID != h.ID || m.Node != h.Node || m.Epoch != h.Epoch:
		return nil, damaged("清单属于另一份备份 (its manifest is another's)")
	case !slices.Equal(m.Files, found):
		return nil, damaged("文件与清单不符 (its files are not those of its manifest)")
	}
	p.SM3 = hex.EncodeToString(digest.Sum(nil))
	return m, nil
}

// inArchive tells an archive that cannot be read from a disk that cannot be written.
func inArchive(err error) error {
	var p *fs.PathError
	switch {
	case errors.Is(err, unix.ENOSPC):
		return err
	case errors.Is(err, ErrDamaged), errors.As(err, &p), errors.Is(err, context.Canceled):
		return err
	}
	return damaged("归档无法解读 (the archive in it cannot be read): %v", err)
}

func isSegmentUpTo(name string, through int) bool {
	var n int
	_, err := fmt.Sscanf(name, journalDir+"journal-%d.db", &n)
	return err == nil && n <= through && SegmentName(n) == name
}

func readManifest(r io.Reader) (*Manifest, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return nil, err
	}
	m := new(Manifest)
	if err := json.Unmarshal(b, m); err != nil || len(b) > maxManifest {
		return nil, damaged("清单无法解读 (its manifest cannot be read)")
	}
	return m, nil
}

// writeMember writes a member durably, or only reads it, and answers its digest.
func writeMember(r io.Reader, dir string, member *tar.Header, wanted bool) (string, error) {
	digest := sm3.New()
	if !wanted {
		_, err := io.Copy(digest, r)
		return hex.EncodeToString(digest.Sum(nil)), err
	}
	name := filepath.Join(dir, filepath.FromSlash(member.Name))
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return "", err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(io.MultiWriter(f, digest), r)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", err
	}
	return hex.EncodeToString(digest.Sum(nil)), syncFolders(dir, filepath.Dir(name))
}

// syncFolders makes the names from a folder up to the top one durable.
func syncFolders(top, folder string) error {
	for ; strings.HasPrefix(folder, top); folder = filepath.Dir(folder) {
		d, err := os.Open(folder)
		if err != nil {
			return err
		}
		if err := errors.Join(d.Sync(), d.Close()); err != nil {
			return err
		}
	}
	return nil
}

// A reader counts what is read into the file's digest, and ends with its context.
type reader struct {
	ctx    context.Context
	r      io.Reader
	digest hash.Hash
	told   func(n int) // may be nil
}

func (r *reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(b)
	r.digest.Write(b[:n])
	if r.told != nil {
		r.told(n)
	}
	return n, err
}

// Digest is SM3 of a file, hexadecimal.
func Digest(ctx context.Context, name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	digest := sm3.New()
	_, err = io.Copy(io.Discard, &reader{ctx: ctx, r: f, digest: digest})
	return hex.EncodeToString(digest.Sum(nil)), err
}
