package testkit

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
)

// An Alteration is an evidence file with one byte changed.
type Alteration struct {
	Data   []byte
	Offset int
	From   byte
	To     byte
	Member string // in which the byte stands, as "journal.inclusion.0"; the object or list around it for a byte of none
	Value  bool   // the byte stands in the member's value, not in its name or between members
	Same   bool   // JSON says the same as before: white space
	// Readable: names, base64 and numbers are in form, so that the file can be judged and Checks must find the change.
	Readable bool
}

func (a Alteration) String() string {
	return fmt.Sprintf("byte %d of %s, %q to %q", a.Offset, a.Member, a.From, a.To)
}

// A span is where a member's name, a value that is neither object nor list, or punctuation stands.
type span struct {
	member   string
	from, to int // quotes included
	value    bool
}

// spans finds each member's name and each value. What is between them is punctuation and white space.
func spans(t testing.TB, file []byte) []span {
	dec := json.NewDecoder(bytes.NewReader(file))
	var out []span
	token := func() (json.Token, int, int) {
		before := int(dec.InputOffset())
		tok, err := dec.Token()
		if err != nil {
			t.Fatal(err)
		}
		for strings.IndexByte(" \t\r\n:,", file[before]) >= 0 {
			before++
		}
		return tok, before, int(dec.InputOffset())
	}
	var walk func(path string)
	walk = func(path string) {
		tok, from, to := token()
		join := func(name string) string { return strings.TrimPrefix(path+"."+name, ".") }
		switch tok {
		case json.Delim('{'):
			for dec.More() {
				name, from, to := token()
				out = append(out, span{join(name.(string)), from, to, false})
				walk(join(name.(string)))
			}
			token()
		case json.Delim('['):
			for i := 0; dec.More(); i++ {
				walk(join(strconv.Itoa(i)))
			}
			token()
		default:
			out = append(out, span{path, from, to, true})
		}
	}
	walk("")
	return out
}

// Alterations are n single-byte changes, at least two in each name and each value and the rest spread evenly over the
// file. What they are follows from the seed. n is raised where the file has more members than that.
func Alterations(t testing.TB, file []byte, seed uint64, n int) []Alteration {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 0))
	all := spans(t, file)
	var out []Alteration
	seen := map[[2]int]bool{}
	change := func(at int, to byte) {
		if to == file[at] || seen[[2]int{at, int(to)}] {
			return
		}
		seen[[2]int{at, int(to)}] = true
		a := Alteration{Data: bytes.Clone(file), Offset: at, From: file[at], To: to}
		a.Data[at] = to
		// The member in whose name or value the byte stands, otherwise what is around the last one before it.
		for _, s := range all {
			switch {
			case at >= s.from && at < s.to:
				a.Member, a.Value = s.member, s.value
			case s.to <= at:
				a.Member = s.member[:max(0, strings.LastIndexByte(s.member, '.'))]
			}
			if at < s.to {
				break
			}
		}
		a.Same, a.Readable = compare(file, a.Data)
		out = append(out, a)
	}
	for _, s := range all {
		inside := s.from + rnd.IntN(s.to-s.from)
		change(inside, file[inside]^byte(1+rnd.IntN(255))) // anything, a quote too
		at := s.from + rnd.IntN(s.to-s.from)
		if file[s.from] == '"' && s.to-s.from > 2 {
			at = s.from + 1 + rnd.IntN(s.to-s.from-2)
		}
		change(at, likely(rnd, file[at])) // what a forger would write
	}
	for len(out) < n {
		at := rnd.IntN(len(file))
		if rnd.IntN(4) == 0 {
			change(at, file[at]^byte(1+rnd.IntN(255)))
		} else {
			change(at, likely(rnd, file[at]))
		}
	}
	return out
}

// likely is another character of the same kind.
func likely(rnd *rand.Rand, was byte) byte {
	for _, set := range []string{"0123456789", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/", " \t\r\n"} {
		if strings.IndexByte(set, was) >= 0 {
			return set[rnd.IntN(len(set))]
		}
	}
	return was ^ byte(1+rnd.IntN(255))
}

// compare reports whether JSON says the same in both, and whether the second has the first's shape.
func compare(was, is []byte) (same, readable bool) {
	decode := func(b []byte) (v any, err error) {
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.UseNumber()
		err = dec.Decode(&v)
		return v, err
	}
	a, _ := decode(was)
	b, err := decode(is)
	if err != nil || !utf8.Valid(is) || !json.Valid(is) {
		return false, false
	}
	return reflect.DeepEqual(a, b), shaped("", a, b)
}

func shaped(path string, was, is any) bool {
	switch was := was.(type) {
	case map[string]any:
		is, ok := is.(map[string]any)
		if !ok || !slices.Equal(slices.Sorted(maps.Keys(was)), slices.Sorted(maps.Keys(is))) {
			return false
		}
		for name := range was {
			if !shaped(path+"."+name, was[name], is[name]) {
				return false
			}
		}
		return true
	case []any:
		is, ok := is.([]any)
		if !ok || len(is) != len(was) {
			return false
		}
		for i := range was {
			if !shaped(fmt.Sprint(path, ".", i), was[i], is[i]) {
				return false
			}
		}
		return true
	case json.Number:
		is, ok := is.(json.Number)
		n, err := strconv.ParseInt(is.String(), 10, 64)
		return ok && err == nil && strconv.FormatInt(n, 10) == is.String() && (n >= 0 || path == ".record.size" || path == ".record.time_bound_us")
	case string:
		is, ok := is.(string)
		if !ok || path == ".format" && is != was {
			return false
		}
		if IsBinary(strings.TrimPrefix(path, ".")) {
			_, err := base64.StdEncoding.Strict().DecodeString(is)
			return err == nil && !strings.ContainsAny(is, "\r\n")
		}
		return true
	}
	return reflect.TypeOf(was) == reflect.TypeOf(is)
}

// IsBinary says which members of an evidence file hold base64.
func IsBinary(member string) bool {
	top, _, _ := strings.Cut(member, ".")
	switch {
	case top == "certificates", top == "crls", top == "authorization", top == "token", member == "signature.value", member == "evidence_record":
		return true
	case top == "journal":
		return !slices.Contains([]string{"journal.node", "journal.epoch", "journal.sequence", "journal.tree_size"}, member)
	}
	return false
}

// CheckNames are the checks of which one must fail when a member of an evidence file says something else. A member that
// is new in the format has none until somebody has thought of it here.
func CheckNames(member string) []string {
	top, rest, _ := strings.Cut(member, ".")
	switch {
	case member == "format":
		return []string{evidence.CheckFormat}
	case top == "record", top == "record_id", member == "journal.node", member == "journal.epoch", member == "journal.sequence",
		top == "signature" && rest != "value":
		return []string{evidence.CheckLeafMatch}
	case top == "certificates", top == "crls", top == "token", member == "signature.value":
		return []string{evidence.CheckPayloads}
	case top == "authorization":
		return []string{evidence.CheckConsentHash}
	case member == "journal.tree_size", strings.HasPrefix(member, "journal.inclusion"):
		return []string{evidence.CheckInclusion}
	case member == "journal.leaf":
		return []string{evidence.CheckLeaf, evidence.CheckInclusion} // either: it no longer parses, or is in no log
	case member == "journal.checkpoint", member == "journal.checkpoint_signature":
		return []string{evidence.CheckCheckpoint}
	case member == "journal.checkpoint_token":
		return []string{evidence.CheckCheckpointToken}
	case member == "journal.cosigned", member == "journal.cosignature":
		return []string{evidence.CheckCosigned}
	case member == "evidence_record": // wherever in it the change is
		return []string{evidence.CheckArchive, evidence.CheckArchiveTree, evidence.CheckArchiveTimestamp, evidence.CheckArchiveCertificate}
	}
	return nil
}

// Judge holds a report on an altered file against what must be said of it.
func (a Alteration) Judge(r *evidence.Report) error {
	failed := map[string]string{}
	for _, c := range r.Checks {
		if c.Status == pki.Failed {
			failed[c.ID] = c.Detail
		}
	}
	detail, unreadable := failed[evidence.CheckFormat]
	switch {
	case a.Same && r.Verdict != pki.Valid:
		return fmt.Errorf("%v: it says the same, and is %s: %v", a, r.Verdict, failed)
	case a.Same:
		return nil
	case r.Verdict != pki.Invalid:
		return fmt.Errorf("%v: %s: %v", a, r.Verdict, failed)
	case a.Readable == unreadable:
		return fmt.Errorf("%v: in form: %v, called out of form: %v: %v", a, a.Readable, unreadable, failed)
	case unreadable:
		// A value out of form is named itself; where JSON ends the name may be that of what is around it.
		around := a.Member[:max(0, strings.LastIndexByte(a.Member, '.'))]
		named := strings.Contains(detail, "evidence: "+a.Member+": ")
		if !named && (a.Value && json.Valid(a.Data) || around != "" && !strings.Contains(detail, "evidence: "+around+".") && !strings.Contains(detail, "evidence: "+around+":")) {
			return fmt.Errorf("%v: the member is not named: %s", a, detail)
		}
		return nil
	}
	for _, name := range CheckNames(a.Member) {
		if _, ok := failed[name]; ok {
			return nil
		}
	}
	return fmt.Errorf("%v: none of %q failed: %v", a, CheckNames(a.Member), failed)
}
