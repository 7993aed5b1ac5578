package evidence_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
)

// A place is one value in the JSON of a bundle.
type place struct {
	path string // "journal.inclusion.0"
	get  any
	set  func(any)
	drop func() // takes the whole value out of its object or list; nil for the file itself
}

// places lists all values below v, objects and lists included.
func places(path string, v any, set func(any), drop func()) []place {
	out := []place{{path, v, set, drop}}
	join := func(name string) string { return strings.TrimPrefix(path+"."+name, ".") }
	switch v := v.(type) {
	case map[string]any:
		for name, inner := range v {
			out = append(out, places(join(name), inner, func(x any) { v[name] = x }, func() { delete(v, name) })...)
		}
	case []any:
		for i, inner := range v {
			out = append(out, places(join(fmt.Sprint(i)), inner, func(x any) { v[i] = x }, func() { set(slices.Delete(slices.Clone(v), i, i+1)) })...)
		}
	}
	return out
}

// variants are altered values of one leaf of the tree.
func variants(p place) map[string]any {
	out := map[string]any{}
	switch v := p.get.(type) {
	case bool:
		out["turned"] = !v
	case json.Number:
		n, err := v.Int64()
		if err != nil {
			panic(err)
		}
		for _, m := range []int64{n + 1, n - 1, -n, 0, 1 << 40} {
			if m != n {
				out[fmt.Sprint("to ", m)] = json.Number(fmt.Sprint(m))
			}
		}
	case string:
		if !testkit.IsBinary(p.path) {
			out["empty"], out["more"], out["padded"] = "", v+"x", " "+v
			out["upper"] = strings.ToUpper(v)
			if v != "" {
				r := []rune(v)
				r[0]++
				out["first"] = string(r)
				out["cut"] = string([]rune(v)[1:])
			}
			break
		}
		data, err := base64.StdEncoding.DecodeString(v)
		if err != nil {
			panic(err)
		}
		out["empty"], out["cut"], out["more"] = "", encode64(data[:len(data)-1]), encode64(append(bytes.Clone(data), 0))
		const steps = 24
		for i := range steps + 1 {
			at := i * (len(data) - 1) / steps
			for _, bit := range []byte{1, 0x80} {
				changed := bytes.Clone(data)
				changed[at] ^= bit
				out[fmt.Sprintf("byte %d ^ %#x", at, bit)] = encode64(changed)
			}
		}
		out["loose end"] = strings.TrimRight(v, "=")
		out["broken line"] = v[:4] + "\n" + v[4:]
	}
	for name, x := range out {
		if x == p.get {
			delete(out, name)
		}
	}
	if p.get != nil {
		out["null"] = nil
	}
	out["another type"] = map[string]any{"a": "b"}
	return out
}

func encode64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// Every value of a real bundle is altered in many ways, taken out, and doubled: none is valid afterwards, and what can be
// read at all fails the check that a reader would look for.
func TestEveryFieldCounts(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds {
		q := request(k.String(), k)
		original := w.Evidence(w.app, w.Sign(w.app, q).RecordID)
		wants(t, evidence.Verify(parse(t, original), w.Trust, document), pki.Valid, pki.Passed, evidence.CheckPayloads)
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			seen := map[string]bool{}
			tried, refused := 0, 0
			for _, p := range places("", decode(t, original), nil, nil) {
				seen[p.path] = true
				if p.set == nil {
					continue // the file itself
				}
				tree := decode(t, original)
				placeAt(tree, p.path).drop()
				judge(t, w, p.path, "taken out", tree, &tried, &refused)
				for name, v := range variants(p) {
					tree := decode(t, original)
					placeAt(tree, p.path).set(v)
					judge(t, w, p.path, name, tree, &tried, &refused)
				}
			}
			// A field that is new in the format must be thought of above.
			for path := range seen {
				leaf := slices.IndexFunc(slices.Collect(maps.Keys(seen)), func(other string) bool { return strings.HasPrefix(other, path+".") }) < 0
				if leaf && path != "" && testkit.CheckNames(path) == nil {
					t.Errorf("%s: nobody says which check it belongs to", path)
				}
			}
			if tried < 800 || len(seen) < 35 || refused > tried*2/3 {
				t.Errorf("%d alterations of %d places, %d not even read", tried, len(seen), refused)
			}
		})
	}
}

func judge(t *testing.T, w *ward, path, how string, tree any, tried, refused *int) {
	t.Helper()
	*tried++
	data, err := json.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	b, err := evidence.Parse(data)
	if err != nil {
		*refused++
		return
	}
	r := evidence.Verify(b, w.Trust, document)
	if path == "journal.checkpoint_token" && how == "taken out" {
		wants(t, r, pki.Valid, pki.NotChecked, evidence.CheckCheckpointToken) // it is optional
		return
	}
	if r.Verdict == pki.Valid {
		t.Errorf("%s, %s: valid", path, how)
	}
	if how == "taken out" || how == "empty" || how == "null" {
		return // then a check may be impossible instead of failing
	}
	want := testkit.CheckNames(path)
	if !slices.ContainsFunc(want, func(id string) bool { return at(r, id) == pki.Failed }) {
		t.Errorf("%s, %s: none of %q failed: %s", path, how, want, problems(r))
	}
}

func decode(t *testing.T, data []byte) any {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func placeAt(tree any, path string) place {
	all := places("", tree, nil, nil)
	return all[slices.IndexFunc(all, func(p place) bool { return p.path == path })]
}

// No byte of a checkpoint's token is free, though no leaf commits to it and nothing signs the certificates inside.
func TestEveryByteOfCheckpointToken(t *testing.T) {
	t.Parallel()
	bits, tried := []byte{4}, kinds[1:2] // an RSA bundle cannot judge the SM2 unit's revocation, and must see it all the same
	if os.Getenv("YINJIAN_LONG") != "" {
		bits, tried = []byte{1, 4, 0x20, 0x80}, kinds
	}
	for _, k := range tried {
		w := newWard(t)
		b := w.bundle(t, request("a", k))
		for _, bit := range bits {
			for i := range b.Journal.CheckpointToken {
				changed := *b
				changed.Journal.CheckpointToken = bytes.Clone(b.Journal.CheckpointToken)
				changed.Journal.CheckpointToken[i] ^= bit
				r := evidence.Verify(&changed, w.Trust, document)
				if r.Verdict != pki.Invalid || at(r, evidence.CheckCheckpointToken) != pki.Failed {
					t.Errorf("%v, byte %d ^ %#x: %s: %s", k, i, bit, r.Verdict, problems(r))
				}
			}
		}
	}
}

// One byte of the file changed, wherever it stands: refused under the name of what it belongs to. What JSON calls the
// same (white space between members) is the same.
func TestEveryByteOfTheFile(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	n := 400
	if os.Getenv("YINJIAN_LONG") != "" {
		n = 4_000
	}
	for _, k := range kinds {
		file := w.Evidence(w.app, w.Sign(w.app, request(k.String(), k)).RecordID)
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			members := map[string]bool{}
			for _, a := range testkit.Alterations(t, file, 1, n) {
				members[a.Member] = true
				r := new(evidence.Report)
				if b, err := evidence.Parse(a.Data); err != nil {
					r = evidence.Unreadable(err)
				} else {
					r = evidence.Verify(b, w.Trust, document)
				}
				if err := a.Judge(r); err != nil {
					t.Error(err)
				}
			}
			for _, p := range places("", decode(t, file), nil, nil) {
				if p.path != "" && !members[p.path] {
					t.Errorf("no byte of %q was changed", p.path)
				}
			}
		})
	}
}
