package ers_test

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/cms/cmstest"
	"yinjian/tsa/ers"
)

//go:embed testdata/ERSCheck.java
var judge []byte

// long is three renewals, a hash-tree renewal to another algorithm and a renewal after it.
func long(t testing.TB, u *unit, first, then ers.Algorithm, groups [][][]byte) []*ers.Record {
	t.Helper()
	records := u.archive(t, start, first, groups)
	for i := range 3 {
		records = u.renew(t, start.AddDate(2*(i+1), 0, 0), records...)
	}
	records = u.archive(t, start.AddDate(8, 0, 0), then, groups, records...)
	return u.renew(t, start.AddDate(10, 0, 0), records...)
}

// Every file of groups of every size is covered, by itself and no other, through all renewals; the record reads back as it
// was written.
func TestRecords(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 3, 4, 5, 8, 13} {
		groups := files(n)
		records := long(t, sm2Unit(), ers.SM3, ers.SHA512, groups)
		for i, r := range records {
			der := encode(t, r)
			back, err := ers.Parse(der)
			if err != nil {
				t.Fatalf("%d of %d: %v", i, n, err)
			}
			if again := encode(t, back); !bytes.Equal(again, der) {
				t.Errorf("%d of %d: encodes to other bytes", i, n)
			}
			if got := len(back.Timestamps()); got != 6 {
				t.Errorf("%d timestamps, want 6", got)
			}
			if at, err := wrong(back, groups[i]...); err != nil {
				t.Errorf("%d of %d, timestamp %d: %v", i, n, at, err)
			}
			others := [][][]byte{{[]byte("other")}, append(slices.Clone(groups[i]), []byte("more"))}
			if n > 1 {
				others = append(others, groups[(i+1)%n])
			}
			if len(groups[i]) > 2 {
				others = append(others, groups[i][1:])
			}
			for _, other := range others {
				if at, err := wrong(back, other...); at != 0 || err == nil {
					t.Errorf("%d of %d covers %q: %d %v", i, n, other, at, err)
				}
			}
		}
	}
}

// What is not what was stamped is named at the timestamp where it shows.
func TestAltered(t *testing.T) {
	t.Parallel()
	u, groups := sm2Unit(), files(7)
	records := long(t, u, ers.SM3, ers.SHA512, groups)
	const i = 6 // three members
	change := func(chain, at int, f func(tree [][][]byte) [][][]byte) *ers.Record {
		r := &ers.Record{}
		for c, list := range records[i].Chains {
			list = slices.Clone(list)
			if c == chain {
				old := list[at]
				tree := make([][][]byte, len(old.Tree))
				for k := range tree {
					tree[k] = slices.Clone(old.Tree[k])
				}
				list[at] = timestamp(t, old.Algorithm, f(tree), old.Token.DER)
			}
			r.Chains = append(r.Chains, list)
		}
		return r
	}
	flip := func(list, k int) func([][][]byte) [][][]byte {
		return func(tree [][][]byte) [][][]byte {
			tree[list][k] = bytes.Clone(tree[list][k])
			tree[list][k][5] ^= 1
			return tree
		}
	}
	reordered := &ers.Record{Chains: slices.Clone(records[i].Chains)}
	reordered.Chains[0] = slices.Clone(reordered.Chains[0])
	reordered.Chains[0][1], reordered.Chains[0][2] = reordered.Chains[0][2], reordered.Chains[0][1]
	exchanged := &ers.Record{Chains: []ers.Chain{records[i].Chains[1], records[i].Chains[0]}}
	early := u.renew(t, start, records[i]) // ten years too early
	for name, c := range map[string]struct {
		r    *ers.Record
		at   int
		want error
	}{
		"sibling altered":                 {change(0, 0, flip(1, 0)), 0, ers.ErrImprint},
		"member altered":                  {change(0, 0, flip(0, 1)), 0, ers.ErrNotCovered},
		"sibling missing":                 {change(0, 0, func(t [][][]byte) [][][]byte { return t[:len(t)-1] }), 0, ers.ErrImprint},
		"sibling added":                   {change(0, 0, func(t [][][]byte) [][][]byte { return append(t, t[1]) }), 0, ers.ErrImprint},
		"member missing":                  {change(0, 0, func(t [][][]byte) [][][]byte { t[0] = t[0][1:]; return t }), 0, ers.ErrNotCovered},
		"lists exchanged":                 {change(0, 0, func(t [][][]byte) [][][]byte { t[1], t[2] = t[2], t[1]; return t }), 0, ers.ErrImprint},
		"another's tree":                  {change(0, 0, func([][][]byte) [][][]byte { return records[5].Chains[0][0].Tree }), 0, ers.ErrNotCovered},
		"no tree":                         {change(0, 0, func([][][]byte) [][][]byte { return nil }), 0, ers.ErrImprint},
		"renewal of something else":       {change(0, 2, func(t [][][]byte) [][][]byte { t[0] = t[1]; return t }), 2, ers.ErrNotCovered},
		"hash-tree renewal altered":       {change(1, 0, flip(1, 0)), 4, ers.ErrImprint},
		"renewals in another order":       {reordered, 1, ers.ErrNotCovered},
		"chains in another order":         {exchanged, 0, ers.ErrNotCovered},
		"earlier than what it renews":     {early[0], 6, ers.ErrOrder},
		"another's renewal, same instant": {&ers.Record{Chains: []ers.Chain{{records[i].Chains[0][0], records[5].Chains[0][2]}}}, 1, ers.ErrNotCovered},
	} {
		if at, err := wrong(c.r, groups[i]...); at != c.at || !errors.Is(err, c.want) {
			t.Errorf("%s: timestamp %d: %v, want %d: %v", name, at, err, c.at, c.want)
		}
	}
	// A tree by another algorithm than it says does not parse, for its hashes are of another length, or leads elsewhere.
	stamped := u.archive(t, start, ers.SHA256, groups[:3])[2]
	other := &ers.Record{Chains: []ers.Chain{{timestamp(t, ers.SM3, stamped.Chains[0][0].Tree, stamped.Chains[0][0].Token.DER)}}}
	if at, err := wrong(other, groups[2]...); at != 0 || !errors.Is(err, ers.ErrNotCovered) {
		t.Errorf("another algorithm: %d %v", at, err)
	}
}

// Any byte changed: refused, or no longer what was stamped. What no tree covers, the signatures, certificates and lists of
// the last token, is for who judges tokens.
func TestEveryByte(t *testing.T) {
	t.Parallel()
	groups := files(4)
	r := long(t, sm2Unit(), ers.SM3, ers.SHA256, groups)[3]
	der := encode(t, r)
	free := bytes.LastIndex(der, r.Last().Token.DER)
	tried := 0
	for i := 0; i < free; i++ {
		if i > 400 && i%7 != 0 {
			continue
		}
		changed := bytes.Clone(der)
		changed[i] ^= 4
		tried++
		back, err := ers.Parse(changed)
		if err != nil {
			continue
		}
		if _, err := wrong(back, groups[3]...); err == nil {
			t.Errorf("byte %d of %d changed, and all of it holds", i, len(der))
		}
	}
	if tried < 200 {
		t.Errorf("%d bytes tried", tried)
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	r := sm2Unit().archive(t, start, ers.SM3, files(2))[1]
	der := encode(t, r)
	token := r.Last().Token.DER
	sha512 := encode(t, sm2Unit().archive(t, start, ers.SHA512, files(2))[1])
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"other digests":  {replace(t, sha512, []byte{0x65, 3, 4, 2, 3}, []byte{0x65, 3, 4, 2, 1}), ers.ErrMalformed},
		"nothing":        {nil, ers.ErrMalformed},
		"a token":        {token, ers.ErrMalformed},
		"cut":            {der[:len(der)-1], ers.ErrMalformed},
		"more":           {append(bytes.Clone(der), 0), ers.ErrMalformed},
		"version 2":      {replace(t, der, []byte{2, 1, 1, 0x30}, []byte{2, 1, 2, 0x30}), ers.ErrUnsupported},
		"cryptoInfos":    {replace(t, der, []byte{0x30, 0x82}, []byte{0xa0, 0x82}, 1), ers.ErrUnsupported},
		"digests differ": {replace(t, der, []byte{0x55, 1, 0x83, 0x11}, []byte{0x55, 1, 0x83, 0x12}), ers.ErrUnsupported},
		"lists not in order": {encode2(t, func(tree [][][]byte) {
			tree[0][0], tree[0][1] = tree[0][1], tree[0][0]
		}), ers.ErrMalformed},
	} {
		if _, err := ers.Parse(c.in); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := new(ers.Record).Bytes(); err == nil {
		t.Error("an empty record was encoded")
	}
	if _, err := ers.NewTimestamp("MD5", nil, token); !errors.Is(err, ers.ErrUnsupported) {
		t.Errorf("MD5: %v", err)
	}
}

// replace changes the occurrence of old with that number, the first if none is given.
func replace(t *testing.T, in, old, by []byte, number ...int) []byte {
	t.Helper()
	at := bytes.Index(in, old)
	for range append(number, 0)[0] {
		at += 1 + bytes.Index(in[at+1:], old)
	}
	if at < 0 {
		t.Fatalf("%x is not in the record", old)
	}
	return slices.Concat(in[:at], by, in[at+len(by):])
}

// encode2 puts an altered tree into a record by hand, past the checks of Bytes.
func encode2(t *testing.T, change func([][][]byte)) []byte {
	t.Helper()
	r := sm2Unit().archive(t, start, ers.SM3, files(2))[1]
	der := encode(t, r)
	tree := r.Last().Tree
	before := bytes.Join(tree[0], []byte{4, 32})
	changed := [][][]byte{slices.Clone(tree[0])}
	change(changed)
	return replace(t, der, before, bytes.Join(changed[0], []byte{4, 32}))
}

func FuzzParse(f *testing.F) {
	groups := files(3)
	for _, r := range append(long(f, sm2Unit(), ers.SM3, ers.SHA512, groups), rsaUnit().archive(f, start, ers.SHA256, groups)...) {
		f.Add(encode(f, r))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r, err := ers.Parse(in)
		if err != nil {
			return
		}
		if out, err := r.Bytes(); err != nil || !bytes.Equal(out, in) {
			t.Errorf("encodes to other bytes: %v", err)
		}
		rebuilt := &ers.Record{Chains: r.Chains}
		if n := len(rebuilt.Check([]byte("a"), []byte("b"))); n != len(r.Timestamps()) {
			t.Errorf("%d answers", n)
		}
	})
}

// openssl reads the structure as RFC 4998 draws it.
func TestOpenSSLReads(t *testing.T) {
	t.Parallel()
	r := long(t, sm2Unit(), ers.SM3, ers.SHA512, files(3))[2]
	text := cmstest.MustOpenSSL(t, "asn1parse", "-inform", "DER", "-in", cmstest.Write(t, filepath.Join(t.TempDir(), "r"), encode(t, r)))
	var got []string
	for _, line := range strings.Split(text, "\n") {
		depth, what, ok := strings.Cut(line, " cons: ")
		if !ok {
			depth, what, _ = strings.Cut(line, " prim: ")
		}
		if _, d, _ := strings.Cut(depth, "d="); len(d) > 0 && d[0] <= '5' && len(strings.Fields(d)[0]) == 1 {
			got = append(got, d[:1]+" "+strings.Join(strings.Fields(what), " "))
		}
		if len(got) == 14 {
			break
		}
	}
	want := []string{
		"0 SEQUENCE", "1 INTEGER :01", "1 SEQUENCE", "2 SEQUENCE", "3 OBJECT :sm3", "2 SEQUENCE", "3 OBJECT :sha512",
		"1 SEQUENCE", "2 SEQUENCE", "3 SEQUENCE", "4 cont [ 0 ]", "5 OBJECT :sm3", "4 cont [ 2 ]", "5 SEQUENCE",
	}
	if !slices.Equal(got, want) {
		t.Errorf("openssl reads\n%q\nwant\n%q\n%s", got, want, text[:min(len(text), 3000)])
	}
}

// Bouncy Castle finds what we cover covered, through renewals too, and refuses what we refuse.
func TestBouncyCastleReads(t *testing.T) {
	t.Parallel()
	bc := cmstest.JudgeOf(t, "ERSCheck", judge)
	dir := t.TempDir()
	u, groups := rsaUnit(), files(6)
	certs := cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert, sm2Unit().cert))
	once := u.archive(t, start, ers.SHA256, groups)
	renewed := u.renew(t, start.AddDate(2, 0, 0), once...)
	rehashed := u.archive(t, start.AddDate(4, 0, 0), ers.SHA512, groups, renewed...)
	other := cmstest.Write(t, filepath.Join(dir, "other"), []byte("other"))
	var list, want []string
	gm := sm2Unit().renew(t, start.AddDate(2, 0, 0), sm2Unit().archive(t, start, ers.SM3, groups)...)
	for _, c := range []struct {
		want    string
		records []*ers.Record
	}{{"yes 1", once}, {"yes 2", renewed}, {"yes 3", rehashed}, {"yes 2", gm}} {
		name, records := c.want, c.records
		for i, r := range records {
			record := cmstest.Write(t, filepath.Join(dir, fmt.Sprint(len(list), "-", i)), encode(t, r))
			line := []string{record, certs}
			for j, m := range groups[i] {
				line = append(line, cmstest.Write(t, filepath.Join(dir, fmt.Sprint(len(list), "-", i, "-", j)), m))
			}
			list = append(list, strings.Join(line, "\t"), strings.Join([]string{record, certs, other}, "\t"))
			want = append(want, name, "no")
		}
	}
	out, err := bc("verify", cmstest.Write(t, filepath.Join(dir, "list"), []byte(strings.Join(list, "\n")+"\n")))
	got := strings.Split(strings.TrimSpace(out), "\n")
	if err != nil || len(got) != len(want)+1 {
		t.Fatalf("%v: %s", err, out)
	}
	for i, w := range want {
		if !strings.HasPrefix(got[i+1], w) {
			t.Errorf("%s: %s, want %s", list[i], got[i+1], w)
		}
	}
}

// We find covered what Bouncy Castle covered.
func TestReadsBouncyCastle(t *testing.T) {
	t.Parallel()
	bc := cmstest.JudgeOf(t, "ERSCheck", judge)
	dir := t.TempDir()
	u := rsaUnit()
	key, cert := cmstest.Write(t, filepath.Join(dir, "key.pem"), cmstest.KeyPEM(t, u.key)), cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert))
	args := []string{"make", key, cert, dir}
	var data [][]byte
	for i := range 5 {
		data = append(data, fmt.Appendf(nil, "datum %d", i))
		args = append(args, cmstest.Write(t, filepath.Join(dir, fmt.Sprint("datum", i)), data[i]))
	}
	if out, err := bc(args...); err != nil {
		t.Fatal(out)
	}
	for name, members := range map[string][][]byte{
		"0": data[:1], "1": data[1:2], "2": data[2:3], "3": data[3:4], "4": data[4:], "group": data, "renewed": data[:1], "rehashed": data[:1],
	} {
		der, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		r, err := ers.Parse(der)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if out := encode(t, r); !bytes.Equal(out, der) {
			t.Errorf("%s: encodes to other bytes", name)
		}
		if at, err := wrong(r, members...); err != nil {
			t.Errorf("%s: timestamp %d: %v", name, at, err)
		}
		if _, err := wrong(r, []byte("other")); !errors.Is(err, ers.ErrNotCovered) {
			t.Errorf("%s: other data: %v", name, err)
		}
		if want := map[string]int{"renewed": 2, "rehashed": 3}[name]; want > 0 && len(r.Timestamps()) != want {
			t.Errorf("%s: %d timestamps", name, len(r.Timestamps()))
		}
	}
}
