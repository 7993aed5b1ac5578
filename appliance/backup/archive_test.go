package backup_test

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"yinjian/appliance/backup"
	"yinjian/appliance/custody"
)

// archive writes a backup with the files, by name and content, and answers its path and what continues it.
func archive(t *testing.T, c *backup.Custodians, h backup.Header, m backup.Manifest, files ...string) (string, *backup.Base) {
	t.Helper()
	h.ID, h.Node, h.Set, h.Threshold = backup.NewID(), "benbu-1", c.Set(), c.Threshold
	name := filepath.Join(t.TempDir(), h.ID)
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := backup.NewWriter(f, h, c.Point)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(files); i += 2 {
		if err := w.Add(files[i], int64(len(files[i+1])), strings.NewReader(files[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(m); err != nil {
		t.Fatal(err)
	}
	digest, err := backup.Digest(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return name, &backup.Base{ID: h.ID, SM3: digest, Through: m.Through}
}

func extract(t *testing.T, dir string, shares []custody.Share, files ...string) (*backup.Manifest, error) {
	t.Helper()
	parts, err := backup.Chain(files)
	if err != nil {
		return nil, err
	}
	return backup.Extract(t.Context(), parts, shares, dir)
}

// A chain gives the files of its last backup, and of the earlier ones the sealed segments that it leaves out.
func TestChain(t *testing.T) {
	t.Parallel()
	c, shares := custodians(t, "2026")
	seg := backup.SegmentName
	whole, base := archive(t, c, backup.Header{}, backup.Manifest{Segments: 2, Through: 1}, "config.toml", "old", "machines.toml", "gone since", seg(1), "sealed 1", seg(2), "half of 2")
	second, next := archive(t, c, backup.Header{Base: base}, backup.Manifest{Segments: 3, Through: 2}, "config.toml", "newer", seg(2), "sealed 2", seg(3), "half of 3")
	third, _ := archive(t, c, backup.Header{Base: next}, backup.Manifest{Segments: 4, Through: 3, Entries: 7}, "config.toml", "newest", "uses/a", "u", seg(3), "sealed 3", seg(4), "half of 4")
	dir := t.TempDir()
	m, err := extract(t, dir, shares[1:], third, whole, second)
	if err != nil || m.Entries != 7 {
		t.Fatalf("%+v, %v", m, err)
	}
	got := map[string]string{}
	_ = filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			b, _ := os.ReadFile(name)
			rel, _ := filepath.Rel(dir, name)
			got[rel] = string(b)
			if i, err := d.Info(); err != nil || i.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", rel, i, err)
			}
		}
		return err
	})
	want := map[string]string{"config.toml": "newest", "uses/a": "u", seg(1): "sealed 1", seg(2): "sealed 2", seg(3): "sealed 3", seg(4): "half of 4"}
	if len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for name, text := range want {
		if got[name] != text {
			t.Errorf("%s is %q, want %q", name, got[name], text)
		}
	}
	forged := *next
	forged.SM3 = strings.Repeat("0", 64)
	wrong, _ := archive(t, c, backup.Header{Base: &forged}, backup.Manifest{Segments: 3, Through: 2}, seg(3), "x")
	for name, one := range map[string]struct {
		files []string
		word  string
	}{
		"without the whole one":        {[]string{second, third}, "没有完整备份"},
		"without the one in between":   {[]string{whole, third}, "缺了中间的一份"},
		"two whole ones":               {[]string{whole, whole}, "接得上"},
		"the one before is not as was": {[]string{whole, second, wrong}, "接在摘要为"},
	} {
		if _, err := extract(t, t.TempDir(), shares, one.files...); err == nil || !strings.Contains(err.Error(), one.word) {
			t.Errorf("%s: %v, want %q", name, err, one.word)
		}
	}
}

// Of a backup without a sealed segment, as every one of an appliance's first million entries, the next one leaves nothing out.
func TestChainBeforeTheFirstSeal(t *testing.T) {
	t.Parallel()
	c, shares := custodians(t, "2026")
	seg := backup.SegmentName
	whole, base := archive(t, c, backup.Header{}, backup.Manifest{Segments: 1}, "config.toml", "old", seg(1), "half of 1")
	second, _ := archive(t, c, backup.Header{Base: base}, backup.Manifest{Segments: 1, Entries: 7}, "config.toml", "newer", seg(1), "more of 1")
	dir := t.TempDir()
	if m, err := extract(t, dir, shares[1:], whole, second); err != nil || m.Entries != 7 {
		t.Fatalf("%+v, %v", m, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, seg(1))); err != nil || string(b) != "more of 1" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestExtractRefuses(t *testing.T) {
	t.Parallel()
	c, shares := custodians(t, "2026")
	for name, one := range map[string]struct {
		m     backup.Manifest
		files []string
	}{
		"a file outside":         {backup.Manifest{Segments: 1}, []string{backup.SegmentName(1), "x", "../evil", "x"}},
		"an absolute name":       {backup.Manifest{Segments: 1}, []string{backup.SegmentName(1), "x", "/etc/evil", "x"}},
		"a name of another form": {backup.Manifest{Segments: 1}, []string{backup.SegmentName(1), "x", "a/../config.toml", "x"}},
		"a segment that is not":  {backup.Manifest{Segments: 2}, []string{backup.SegmentName(1), "x"}},
	} {
		file, _ := archive(t, c, backup.Header{}, one.m, one.files...)
		if _, err := extract(t, t.TempDir(), shares, file); !errors.Is(err, backup.ErrDamaged) {
			t.Errorf("%s: %v, want %v", name, err, backup.ErrDamaged)
		}
	}
}

// Memory does not grow with what is written or read.
func TestFlatMemory(t *testing.T) { // alone: it looks at the process's memory
	c, shares := custodians(t, "2026")
	const size = 96 << 20
	name := filepath.Join(t.TempDir(), "large")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var most, before runtime.MemStats
	runtime.ReadMemStats(&before)
	look := func(r io.Reader) io.Reader {
		n := 0
		return readerFunc(func(b []byte) (int, error) {
			if n++; n%64 == 0 {
				var now runtime.MemStats
				runtime.ReadMemStats(&now)
				most.HeapAlloc = max(most.HeapAlloc, now.HeapAlloc)
			}
			return r.Read(b)
		})
	}
	w, err := backup.NewWriter(f, backup.Header{ID: backup.NewID(), Set: c.Set()}, c.Point)
	if err == nil {
		err = w.Add(backup.SegmentName(1), size, look(zeros{}))
	}
	if err == nil {
		err = w.Close(backup.Manifest{Segments: 1})
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := extract(t, t.TempDir(), shares, name); err != nil {
		t.Fatal(err)
	}
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	most.HeapAlloc = max(most.HeapAlloc, after.HeapAlloc)
	if most.HeapAlloc > before.HeapAlloc+size/3 {
		t.Errorf("%d MiB of memory for a file of %d MiB", (most.HeapAlloc-before.HeapAlloc)>>20, size>>20)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// A manifest that is not of the files beside it is refused: whoever can seal can write anything.
func TestManifestIsHeldAgainstTheFiles(t *testing.T) {
	t.Parallel()
	c, shares := custodians(t, "2026")
	seg := backup.SegmentName(1)
	x := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(x, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	digest, err := backup.Digest(t.Context(), x)
	if err != nil {
		t.Fatal(err)
	}
	files := `"files":[{"name":"` + seg + `","size":1,"sm3":"` + digest + `"}]}`
	for name, one := range map[string]struct {
		manifest string
		after    string // a member that follows
	}{
		"":                 {`{"id":"ID","node":"benbu-1","segments":1,` + files, ""},
		"other content":    {`{"id":"ID","node":"benbu-1","segments":1,` + strings.Replace(files, digest, strings.Repeat("0", 64), 1), ""},
		"no files":         {`{"id":"ID","node":"benbu-1","segments":1,"files":[]}`, ""},
		"another backup":   {`{"id":"0000000000000000","node":"benbu-1","segments":1,` + files, ""},
		"no JSON":          {`{`, ""},
		"none":             {"", ""},
		"members after it": {`{"id":"ID","node":"benbu-1","segments":1,` + files, "config.toml"},
	} {
		h := backup.Header{ID: backup.NewID(), Node: "benbu-1", Set: c.Set()}
		file := filepath.Join(t.TempDir(), "b")
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		s, err := backup.NewSealer(f, h, c.Point)
		if err != nil {
			t.Fatal(err)
		}
		w := tar.NewWriter(s)
		add := func(name, text string) {
			t.Helper()
			err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(text)), Mode: 0o600, Typeflag: tar.TypeReg})
			if err == nil {
				_, err = io.WriteString(w, text)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		add(seg, "x")
		if one.manifest != "" {
			add("manifest.json", strings.Replace(one.manifest, "ID", h.ID, 1))
		}
		if one.after != "" {
			add(one.after, "x")
		}
		if err := errors.Join(w.Close(), s.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := extract(t, t.TempDir(), shares, file); errors.Is(err, backup.ErrDamaged) != (name != "") {
			t.Errorf("%s: %v, want %v", name, err, backup.ErrDamaged)
		}
	}
}
