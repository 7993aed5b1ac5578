package backup_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand"
	"strings"
	"testing"

	"yinjian/appliance/backup"
	"yinjian/appliance/custody"
)

// custodians are three, any two of whom open.
func custodians(t *testing.T, name string) (*backup.Custodians, []custody.Share) {
	t.Helper()
	c, shares, err := backup.NewCustodians(name, "2026-01-01T00:00:00Z", []string{"张三", "李四", "王五"}, 2, []string{"甲", "乙"})
	if err != nil {
		t.Fatal(err)
	}
	return c, shares
}

// seal answers a file of plain, and where its chunks begin.
func seal(t *testing.T, c *backup.Custodians, plain []byte) (file []byte, chunks []int) {
	t.Helper()
	var out bytes.Buffer
	s, err := backup.NewSealer(&out, backup.Header{ID: backup.NewID(), Node: "benbu-1", Set: c.Set()}, c.Point)
	if err != nil {
		t.Fatal(err)
	}
	for rest := plain; len(rest) > 0; { // in pieces of all lengths
		n := min(len(rest), 1+rand.Intn(3<<19))
		if _, err := s.Write(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file = out.Bytes()
	r := bytes.NewReader(file)
	if _, _, err := backup.ReadHeader(r); err != nil {
		t.Fatal(err)
	}
	for at := len(file) - r.Len(); at < len(file); {
		chunks = append(chunks, at)
		at += 12 + int(binary.BigEndian.Uint32(file[at+8:])&^(1<<31)) + 16
	}
	return file, append(chunks, len(file))
}

func open(file []byte, shares []custody.Share) ([]byte, error) {
	r := bytes.NewReader(file)
	h, head, err := backup.ReadHeader(r)
	if err != nil {
		return nil, err
	}
	seed, err := backup.Seed(shares, h)
	if err != nil {
		return nil, err
	}
	o, err := backup.NewOpener(r, h, head, seed)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(o)
}

func TestStream(t *testing.T) {
	t.Parallel()
	c, shares := custodians(t, "2026")
	for _, n := range []int{0, 1, 1<<20 - 1, 1 << 20, 1<<20 + 1, 3 << 20} {
		plain := make([]byte, n)
		rand.New(rand.NewSource(int64(n))).Read(plain)
		file, _ := seal(t, c, plain)
		for _, some := range [][]custody.Share{shares[:2], shares[1:], shares} {
			if got, err := open(file, some); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%d bytes: %d bytes, %v", n, len(got), err)
			}
		}
		if n > 64 && bytes.Contains(file, plain[:64]) {
			t.Errorf("%d bytes: the file has them in clear", n)
		}
	}
}

// Whatever happens to a file is said, and nothing of what was changed is delivered.
func TestDamageIsNamed(t *testing.T) {
	t.Parallel()
	c, shares := custodians(t, "2026")
	plain := make([]byte, 3<<20+7)
	rand.New(rand.NewSource(1)).Read(plain)
	file, at := seal(t, c, plain)
	other, otherAt := seal(t, c, plain)
	flip := func(i int) []byte {
		b := bytes.Clone(file)
		b[i] ^= 1
		return b
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	chunk := func(i int) []byte { return file[at[i]:at[i+1]] }
	endEarly := bytes.Clone(file[:at[2]])
	endEarly[at[1]+8] |= 0x80 // says that it is the last one
	for name, one := range map[string]struct {
		file []byte
		word string
	}{
		"first byte":                 {flip(0), "开头"},
		"header":                     {flip(60), ""},
		"a byte of the key":          {bytes.Replace(file, []byte(`"key":"`), []byte(`"kez":"`), 1), "份额打不开"},
		"another node's name":        {bytes.Replace(file, []byte(`"benbu-1"`), []byte(`"benbu-2"`), 1), "第 1 块被改动"},
		"a byte in a chunk":          {flip(at[1] + 5000), "第 2 块被改动"},
		"a byte of a tag":            {flip(at[2] - 1), "第 2 块被改动"},
		"a chunk's number":           {flip(at[1] + 7), "第 2 块处是第 1 块"},
		"a chunk's length":           {flip(at[1] + 11), "第 2 块被改动"},
		"a chunk ends it too early":  {endEarly, "第 2 块被改动"},
		"cut at a chunk":             {file[:at[3]], "第 4 块处截断"},
		"cut within a chunk":         {file[:at[2]+700], "第 3 块之内截断"},
		"cut within a chunk's head":  {file[:at[2]+5], "第 3 块处截断"},
		"cut within the header":      {file[:40], "头部之内截断"},
		"empty":                      {nil, "不是印鉴的备份"},
		"two chunks exchanged":       {join(file[:at[1]], chunk(2), chunk(1), file[at[3]:]), "第 2 块处是第 3 块"},
		"a chunk twice":              {join(file[:at[2]], chunk(1), file[at[2]:]), "第 3 块处是第 2 块"},
		"a chunk left out":           {join(file[:at[1]], file[at[2]:]), "第 2 块处是第 3 块"},
		"bytes after the end":        {join(file, []byte{0}), "结束标记之后"},
		"a chunk after the end":      {join(file, chunk(3)), "结束标记之后"},
		"a chunk of another file":    {join(file[:at[1]], other[otherAt[1]:otherAt[2]], file[at[2]:]), "第 2 块被改动"},
		"the end of another file":    {join(file[:at[3]], other[otherAt[3]:]), "第 4 块被改动"},
		"another file's first bytes": {join(other[:otherAt[0]], file[at[0]:]), "第 1 块被改动"},
	} {
		got, err := open(one.file, shares[:2])
		if err == nil || !strings.Contains(err.Error(), one.word) {
			t.Errorf("%s: %v, want %q", name, err, one.word)
		}
		if !bytes.HasPrefix(plain, got) {
			t.Errorf("%s: bytes were delivered that nobody wrote there", name)
		}
	}
}

func TestShares(t *testing.T) {
	t.Parallel()
	c, shares := custodians(t, "2026")
	_, foreign := custodians(t, "2025")
	file, _ := seal(t, c, []byte("journal"))
	changed := shares[1]
	text := strings.Replace(changed.String(), changed.String()[len(changed.String())-40:], "", 1)
	if _, err := custody.ParseShare(text); err == nil {
		t.Error("half a share was read")
	}
	officers, _, err := custody.Split(make([]byte, custody.SecretSize), custody.PurposeOfficers, "2026", []string{"a", "b"}, 2)
	if err != nil {
		t.Fatal(err)
	}
	for name, one := range map[string]struct {
		shares []custody.Share
		word   string
	}{
		"none":               {nil, "没有份额"},
		"too few":            {shares[:1], "只有 1 份，需要 2 份"},
		"one twice":          {[]custody.Share{shares[0], shares[0]}, "给了两次"},
		"of another set":     {foreign[:2], "套号"},
		"one of another set": {[]custody.Share{shares[0], foreign[1]}, "套号"},
		"of other keys":      {officers, "用途"},
	} {
		if _, err := open(file, one.shares); err == nil || !strings.Contains(err.Error(), one.word) {
			t.Errorf("%s: %v, want %q", name, err, one.word)
		}
	}
}

func TestLaterFormatIsRefused(t *testing.T) {
	t.Parallel()
	c, _ := custodians(t, "2026")
	file, _ := seal(t, c, []byte("x"))
	_, _, err := backup.ReadHeader(bytes.NewReader(bytes.Replace(file, []byte(`{"format":1`), []byte(`{"format":2`), 1)))
	if !errors.Is(err, backup.ErrNewer) {
		t.Errorf("%v, want %v", err, backup.ErrNewer)
	}
}

// FuzzOpen: what is delivered of a file that was altered is what was written there, and only a whole one comes to its end.
func FuzzOpen(f *testing.F) {
	c, shares, err := backup.NewCustodians("2026", "2026-01-01T00:00:00Z", []string{"张三", "李四"}, 2, nil)
	if err != nil {
		f.Fatal(err)
	}
	plain := bytes.Repeat([]byte("journal"), 1000)
	var out bytes.Buffer
	s, err := backup.NewSealer(&out, backup.Header{ID: backup.NewID(), Set: c.Set()}, c.Point)
	if err == nil {
		_, err = s.Write(plain)
	}
	if err == nil {
		err = s.Close()
	}
	if err != nil {
		f.Fatal(err)
	}
	whole := out.Bytes()
	f.Add(uint16(0), []byte{}, uint16(0))
	f.Add(uint16(20), []byte{1}, uint16(0))
	f.Add(uint16(400), []byte("x"), uint16(1))
	f.Fuzz(func(t *testing.T, at uint16, with []byte, cut uint16) {
		b := bytes.Clone(whole)
		copy(b[min(int(at), len(b)):], with)
		b = b[:len(b)-min(int(cut), len(b))]
		got, err := open(b, shares)
		if !bytes.HasPrefix(plain, got) || err == nil && (!bytes.Equal(got, plain) || !bytes.Equal(b, whole)) {
			t.Errorf("%d bytes of an altered file, %v", len(got), err)
		}
	})
}
