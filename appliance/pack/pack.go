// Package pack brings somebody else's program into the sealed appliance: a maker's PKCS#11 library with what it needs, or the
// site's program with the driver of its database. A pack is one file, signed by whoever builds the appliance and by the
// hospital; it is mounted read-only under dm-verity and nothing in it is ever copied out.
//
// A pack file is, in this order: [Magic]; the lengths of the next two, 4 bytes each, big endian; the manifest; the signatures;
// zeros up to a multiple of 4096; the image, which is squashfs, superblock and hash tree as iso/layout has them. The
// manifest is JSON in one form only: what [Manifest.Encode] makes. It is believed for its signatures alone, which are judged
// before anything behind them is looked at; the image is believed for the manifest's root hash and digests. Signatures are SM2
// with SM3 (GM/T 0003.2-2012, identity 1234567812345678) over [Domain] and the manifest's bytes, in DER.
package pack

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/problem"
	"yinjian/iso/layout"
)

// Format names this form of packs, Magic begins their files, and Domain stands before the manifest in what is signed.
const (
	Format = "yinjian-pack/1"
	Magic  = Format + "\n\x00"
	Domain = Format + "\x00"
)

// Kinds of packs.
const (
	PKCS11 = "pkcs11" // a cipher machine's library
	DM     = "dm"     // the program itself, built with the driver of DM
)

// Who signs a pack. Both have to: see docs/decisions.md.
const (
	ByRelease  = "release"
	ByHospital = "hospital"
)

const (
	maxManifest = 256 << 10
	maxFiles    = 512
	maxContent  = 512 << 20 // of all files, unpacked
	// MaxImage bounds an image, in bytes.
	MaxImage = 256 << 20
)

// Placeholders in the value of a [Variable].
const (
	AtPack  = "{pack}"  // the folder in which the pack is mounted
	AtState = "{state}" // a folder of the appliance's own for this pack, for what the library has to keep
)

// A Manifest says what a pack holds.
type Manifest struct {
	Format  string `json:"format"`
	Kind    string `json:"kind"`
	Name    string `json:"name"`    // what the configuration calls it
	Version string `json:"version"` // the maker's, for people
	Serial  uint64 `json:"serial"`  // grows with each pack of this name
	Maker   string `json:"maker"`
	Arch    string `json:"arch"` // GOARCH
	// Library is the file that is the PKCS#11 module; "" in a pack of another kind.
	Library string `json:"library"`
	// Program is the file that runs in the appliance's stead, and Product the version of the appliance that it is: it runs under
	// an image of that version alone. Both "" but in a pack of kind dm.
	Program     string     `json:"program"`
	Product     string     `json:"product"`
	Environment []Variable `json:"environment"` // of the processes that load the library, and of the daemon, by name
	// Daemon is the maker's program that the library talks to; nil for a library that needs none.
	Daemon *Daemon `json:"daemon,omitempty"`
	Files  []File  `json:"files"` // by path
	Image  Image   `json:"image"`
	Notes  string  `json:"notes"` // for those who approve it
}

// A Daemon is a program of the pack's that the appliance keeps running, in the foreground, as long as a cipher machine uses the library.
type Daemon struct {
	Program   string   `json:"program"`   // the file
	Arguments []string `json:"arguments"` // may hold [AtPack] and [AtState]
	// Ready begins with [AtState]: what is there, a socket for one, once the library may be loaded; "" where that does not matter. It is
	// removed before each start.
	Ready string `json:"ready"`
}

func (d *Daemon) validate(files []File) error {
	if d == nil {
		return nil
	}
	i := slices.IndexFunc(files, func(f File) bool { return f.Path == d.Program })
	if i < 0 || !files[i].Executable {
		return fmt.Errorf("daemon: %.80q is none of its files, or may not be executed", d.Program)
	}
	if d.Arguments == nil || len(d.Arguments) > 64 || slices.ContainsFunc(d.Arguments, func(a string) bool { return !plain(a, 256) }) {
		return errors.New("daemon: its arguments")
	}
	if d.Ready != "" {
		name, ok := strings.CutPrefix(d.Ready, AtState+"/")
		if !ok || len(name) > 80 || !fs.ValidPath(name) || slices.ContainsFunc(strings.Split(name, "/"), func(s string) bool { return !reSegment.MatchString(s) }) {
			return fmt.Errorf("daemon: ready has to be a path in %s: %.80q", AtState, d.Ready)
		}
	}
	return nil
}

// A Variable is one of the environment's; its value may hold [AtPack] and [AtState].
type Variable struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// A File is a regular file in the image.
type File struct {
	Path       string `json:"path"`
	Size       int64  `json:"size"`
	Executable bool   `json:"executable"`
	SM3        string `json:"sm3"`
	SHA256     string `json:"sha256"`
}

// An Image is the squashfs with its hash tree; digests are in hex.
type Image struct {
	Size       int64  `json:"size"`
	SM3        string `json:"sm3"`
	SHA256     string `json:"sha256"`
	Hash       string `json:"hash"`
	Algorithm  string `json:"algorithm"`
	DataBlocks uint64 `json:"data_blocks"`
	Salt       string `json:"salt"`
}

// Layout is the image as layout has it.
func (i Image) Layout() (layout.Root, error) {
	out := layout.Root{Algorithm: i.Algorithm, DataBlocks: i.DataBlocks}
	var err error
	if out.Hash, err = hex.DecodeString(i.Hash); err == nil {
		out.Salt, err = hex.DecodeString(i.Salt)
	}
	if err != nil {
		return layout.Root{}, err
	}
	return out, out.Validate()
}

// Encode is the manifest's one form.
func (m *Manifest) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", " ")
	return append(b, '\n'), err
}

// Forms of what stands in a manifest.
var (
	Name      = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,30}$`)
	reVersion = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z._+~-]{0,62}$`)
	reSegment = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z._+-]{0,126}$`)
	reEnv     = regexp.MustCompile(`^[A-Z][A-Z0-9_]{0,62}$`)
	reC       = regexp.MustCompile(`^(ld-linux.*|ld64|libc|libm|libdl|libpthread|librt|libresolv|libnss_.*)\.so(\..*)?$`)
	reModule  = regexp.MustCompile(`\.ko(\.(xz|zst|gz))?$`)
)

// reserved are variables that change what the process itself is.
func reserved(name string) bool {
	for _, p := range []string{"LD_", "GO", "GLIBC_", "MALLOC_", "YINJIAN_", "SYSTEMD_", "SSL_"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return slices.Contains([]string{"PATH", "HOME", "TMPDIR", "LANG", "TZ", "NOTIFY_SOCKET"}, name)
}

// plain says whether text is fit to be shown on a line.
func plain(text string, most int) bool {
	return len(text) <= most && utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) })
}

// IsC says whether a file of that name is a part of the C library, which is the image's own.
func IsC(name string) bool { return reC.MatchString(name) }

// validate says what of a manifest cannot be.
func (m *Manifest) validate() error {
	switch {
	case m.Format != Format:
		return fmt.Errorf("format %.40q", m.Format)
	case m.Kind != PKCS11 && m.Kind != DM:
		return fmt.Errorf("kind %.40q", m.Kind)
	case !Name.MatchString(m.Name):
		return fmt.Errorf("name %.40q", m.Name)
	case !reVersion.MatchString(m.Version):
		return fmt.Errorf("version %.40q", m.Version)
	case m.Serial == 0 || m.Serial > 1<<53: // what every reader of JSON can hold
		return errors.New("serial")
	case m.Maker == "" || !plain(m.Maker, 200):
		return errors.New("maker")
	case m.Arch == "" || !plain(m.Arch, 20):
		return errors.New("arch")
	case !utf8.ValidString(m.Notes) || len(m.Notes) > 1024:
		return errors.New("notes")
	}
	if err := m.validateFiles(); err != nil {
		return err
	}
	main, other := m.Library, m.Program+m.Product
	if m.Kind == DM {
		main, other = m.Program, m.Library
		if !reVersion.MatchString(m.Product) {
			return fmt.Errorf("product %.40q", m.Product)
		}
	}
	i := slices.IndexFunc(m.Files, func(f File) bool { return f.Path == main })
	switch {
	case i < 0 || m.Kind == DM && !m.Files[i].Executable:
		return fmt.Errorf("%.80q is none of its files, or may not be executed", main)
	case other != "":
		return errors.New("it is of one kind, and says something of another")
	}
	for i, v := range m.Environment {
		if !reEnv.MatchString(v.Name) || reserved(v.Name) || !plain(v.Value, 256) || i > 0 && m.Environment[i-1].Name >= v.Name || i >= 32 {
			return fmt.Errorf("environment: %.80q", v.Name)
		}
	}
	if err := m.Daemon.validate(m.Files); err != nil {
		return err
	}
	if m.Daemon != nil && m.Kind != PKCS11 {
		return errors.New("a daemon is a library's")
	}
	root, err := m.Image.Layout()
	if err != nil {
		return err
	}
	if m.Image.Size != int64(root.Blocks())*layout.BlockSize || m.Image.Size > MaxImage {
		return errors.New("the image's length")
	}
	return digests(m.Image.SM3, m.Image.SHA256)
}

func (m *Manifest) validateFiles() error {
	if len(m.Files) == 0 || len(m.Files) > maxFiles {
		return fmt.Errorf("%d files", len(m.Files))
	}
	all, folders := int64(0), map[string]bool{}
	for i, f := range m.Files {
		parts := strings.Split(f.Path, "/")
		if !fs.ValidPath(f.Path) || len(parts) > 8 || slices.ContainsFunc(parts, func(s string) bool { return !reSegment.MatchString(s) }) {
			return fmt.Errorf("path %.80q", f.Path)
		}
		if i > 0 && m.Files[i-1].Path >= f.Path {
			return fmt.Errorf("%.80q: not in order, or twice", f.Path)
		}
		switch base := path.Base(f.Path); {
		case IsC(base):
			return fmt.Errorf("%.80q: the C library is the image's", f.Path)
		case reModule.MatchString(base):
			return fmt.Errorf("%.80q: the kernel takes no module from a pack", f.Path)
		}
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			folders[dir] = true
		}
		if f.Size < 0 || f.Size > maxContent {
			return fmt.Errorf("%.80q: its length", f.Path)
		}
		if all += f.Size; all > maxContent {
			return errors.New("too much in it")
		}
		if err := digests(f.SM3, f.SHA256); err != nil {
			return fmt.Errorf("%.80q: %w", f.Path, err)
		}
	}
	for _, f := range m.Files {
		if folders[f.Path] {
			return fmt.Errorf("%.80q is file and folder", f.Path)
		}
	}
	return nil
}

func digests(all ...string) error {
	for _, digest := range all {
		if b, err := hex.DecodeString(digest); err != nil || len(b) != sha256.Size || hex.EncodeToString(b) != digest {
			return errors.New("a digest")
		}
	}
	return nil
}

// Folders are those that hold libraries, relative to the pack: where the loader has to look.
func (m *Manifest) Folders() []string {
	var out []string
	for _, f := range m.Files {
		if base := path.Base(f.Path); strings.HasSuffix(base, ".so") || strings.Contains(base, ".so.") {
			out = append(out, path.Dir(f.Path))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// ParseManifest reads a manifest, in its one form.
func ParseManifest(text []byte) (*Manifest, error) {
	m := new(Manifest)
	if err := strict(text, m); err != nil {
		return nil, err
	}
	if err := m.validate(); err != nil {
		return nil, err
	}
	same, err := m.Encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(text, same) {
		return nil, errors.New("it is not in the form in which manifests are written")
	}
	return m, nil
}

// A Signature is one of a manifest's.
type Signature struct {
	By    string `json:"by"`    // [ByRelease] or [ByHospital]
	Value []byte `json:"value"` // DER
}

// Signed is what a signature is made over.
func Signed(manifest []byte) []byte { return append([]byte(Domain), manifest...) }

// Keys are those that a pack has to be signed by, both.
type Keys struct{ Release, Hospital *ecdsa.PublicKey }

// Signer is who has signed a pack.
type Signer struct {
	By  string `json:"by"`
	Key string `json:"key"` // SM3 of the public key (SubjectPublicKeyInfo, DER), in hex
}

// check judges the signatures.
func (k Keys) check(manifest []byte, signatures []Signature) ([]Signer, error) {
	var out []Signer
	for _, one := range []struct {
		by, zh string
		key    *ecdsa.PublicKey
	}{{ByRelease, "发布方", k.Release}, {ByHospital, "医院", k.Hospital}} {
		if one.key == nil {
			return nil, refuse(problem.Forbidden, fmt.Sprintf("设备没有%s的公钥，不装任何厂商包 (no public key of the %s is known: no pack is taken)", one.zh, one.by),
				"先登记医院的公钥，正式版在安装时：见 docs/packs.md (register the hospital's key first; a release has it from its installation)")
		}
		if !slices.ContainsFunc(signatures, func(s Signature) bool {
			return s.By == one.by && sm2.VerifyASN1WithSM2(one.key, nil, Signed(manifest), s.Value) // nil: the default identity
		}) {
			return nil, refuse(problem.Forbidden, fmt.Sprintf("厂商包没有%s密钥的有效签名，没有安装 (no valid signature by the %s key; nothing was installed)", one.zh, one.by),
				"发布方与医院都要签：yinjian pack sign (both have to sign it)")
		}
		sum, err := fingerprint(one.key)
		if err != nil {
			return nil, err
		}
		out = append(out, Signer{one.by, sum})
	}
	return out, nil
}

// fingerprint is the SM3 of a key's SubjectPublicKeyInfo, in hex.
func fingerprint(key *ecdsa.PublicKey) (string, error) {
	der, err := smx509.MarshalPKIXPublicKey(key)
	sum := sm3.Sum(der)
	return hex.EncodeToString(sum[:]), err
}

// ParseKey reads a public SM2 key, PKIX in PEM.
func ParseKey(text []byte) (*ecdsa.PublicKey, error) {
	b, rest := pem.Decode(text)
	if b == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("不是一个 PEM (is no PEM)")
	}
	key, err := smx509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		return nil, err
	}
	pub, ok := key.(*ecdsa.PublicKey)
	if !ok || pub.Curve != sm2.P256() {
		return nil, errors.New("不是 SM2 公钥 (is no SM2 key)")
	}
	return pub, nil
}

func refuse(code problem.Code, detail, next string) error { return problem.New(code, detail, next) }

// damaged refuses a pack that is none, or not whole.
func damaged(format string, args ...any) error {
	return refuse(problem.InvalidRequest, "厂商包已损坏或不是厂商包："+fmt.Sprintf(format, args...)+" (the pack is damaged, or none)", "请重新取得厂商包 (get the pack again)")
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

// A Pack is a file's head: all of it but the image, which begins at byte Start of the file.
type Pack struct {
	Manifest   *Manifest
	Raw        []byte // the manifest's bytes
	Signatures []Signature
	Start      int64
	SM3        string // of Raw, in hex: what two persons compare
	Signers    []Signer
}

// Head reads the head of a pack and believes nothing: for those who show or sign it. It reads no further than that.
func Head(r io.Reader) (*Pack, error) {
	p, raw, err := read(r)
	if err != nil {
		return nil, err
	}
	return p, p.parse(raw)
}

// Open reads the head of a pack and judges its signatures; r is read no further than it has to be. Refusals are
// *problem.Problem.
func Open(r io.Reader, keys Keys) (*Pack, error) {
	p, raw, err := read(r)
	if err != nil {
		return nil, err
	}
	if p.Signers, err = keys.check(raw, p.Signatures); err != nil { // before anything in it is looked at
		return nil, err
	}
	return p, p.parse(raw)
}

func (p *Pack) parse(raw []byte) error {
	m, err := ParseManifest(raw)
	if err != nil {
		return damaged("清单：%v", err)
	}
	sum := sm3.Sum(raw)
	p.Manifest, p.Raw, p.SM3 = m, raw, hex.EncodeToString(sum[:])
	return nil
}

const headSize = len(Magic) + 8

func read(r io.Reader) (*Pack, []byte, error) {
	var head [headSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, nil, damaged("%v", err)
	}
	if string(head[:len(Magic)]) != Magic {
		return nil, nil, damaged("开头不是 %s", Format)
	}
	manifest, signatures := binary.BigEndian.Uint32(head[len(Magic):]), binary.BigEndian.Uint32(head[len(Magic)+4:])
	if manifest > maxManifest || signatures > maxManifest {
		return nil, nil, damaged("清单 %d 字节，签名 %d 字节", manifest, signatures)
	}
	used := int64(headSize) + int64(manifest) + int64(signatures)
	start := (used + layout.BlockSize - 1) / layout.BlockSize * layout.BlockSize
	rest := make([]byte, start-int64(headSize))
	if _, err := io.ReadFull(r, rest); err != nil {
		return nil, nil, damaged("%v", err)
	}
	p := &Pack{Start: start}
	text := rest[manifest : manifest+signatures]
	if err := strict(text, &p.Signatures); err != nil || len(p.Signatures) > 16 {
		return nil, nil, damaged("签名")
	}
	if same, err := json.Marshal(p.Signatures); err != nil || !bytes.Equal(same, text) {
		return nil, nil, damaged("签名的写法")
	}
	if slices.ContainsFunc(rest[manifest+signatures:], func(b byte) bool { return b != 0 }) {
		return nil, nil, damaged("填充")
	}
	return p, rest[:manifest], nil
}

// WriteHead writes all of a pack but its image.
func WriteHead(w io.Writer, manifest []byte, signatures []Signature) error {
	sigs, err := json.Marshal(signatures)
	if err != nil {
		return err
	}
	b := []byte(Magic)
	b = binary.BigEndian.AppendUint32(b, uint32(len(manifest)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(sigs)))
	b = slices.Concat(b, manifest, sigs)
	if over := len(b) % layout.BlockSize; over != 0 {
		b = append(b, make([]byte, layout.BlockSize-over)...)
	}
	_, err = w.Write(b)
	return err
}

// CopyImage copies the image, which r is at, to w, and holds it against its digests. What w got is worth nothing when an
// error comes back; something behind the image is one.
func (p *Pack) CopyImage(w io.Writer, r io.Reader) error {
	i := p.Manifest.Image
	h3, h256 := sm3.New(), sha256.New()
	n, err := io.CopyN(io.MultiWriter(w, h3, h256), r, i.Size)
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return damaged("只有 %d 字节，签过名的是 %d", n, i.Size)
	case err != nil:
		return err
	case hex.EncodeToString(h3.Sum(nil)) != i.SM3 || hex.EncodeToString(h256.Sum(nil)) != i.SHA256:
		return damaged("映像与签过名的摘要不符")
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return damaged("映像之后还有内容 (%v)", err)
	}
	return nil
}
