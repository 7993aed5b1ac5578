package assess_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"yinjian/appliance/assess"
	"yinjian/appliance/evidence"
)

// small is a pack in form, with an item a section, that nothing vouches for.
func small(t testing.TB) []byte {
	t.Helper()
	r := &assess.Report{Format: assess.FormatReport, Products: []assess.Product{}, Threats: []assess.Threat{}, Header: assess.Header{Nonce: "0123456789abcdef", Mode: assess.ModeSoft, Ended: day}}
	for n := assess.SectionHeader; n <= assess.SectionIdentity; n++ {
		raw := json.RawMessage(`{"n":1,"text":"\u003c甲\u003e"}`)
		r.Items = append(r.Items, assess.Item{ID: "a." + string(rune('a'+n)), Section: n, Status: assess.Shown, SM3: assess.Digest(raw), Raw: raw})
	}
	r.Finish()
	report, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	b, err := (&assess.Pack{Format: assess.FormatPack, Report: report, Token: []byte{1}, Certificates: [][]byte{{2}}, CRLs: [][]byte{}, Journal: evidence.Journal{Inclusion: [][]byte{}}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// There is one way to write a pack down.
func TestParseIsStrict(t *testing.T) {
	t.Parallel()
	good := small(t)
	if _, _, err := assess.Parse(good); err != nil || !assess.IsPack(good) {
		t.Fatal(err)
	}
	replace := func(old, new string) []byte {
		b := bytes.Replace(good, []byte(old), []byte(new), 1)
		if bytes.Equal(b, good) {
			t.Fatalf("%q does not stand there", old)
		}
		return b
	}
	for name, b := range map[string][]byte{
		"empty": {}, "null": []byte("null"), "cut": good[:len(good)-1], "a line end": append(bytes.Clone(good), '\n'), "a second one": append(bytes.Clone(good), good...),
		"a space in the report": replace(`"section":1`, `"section": 1`), "a space": replace(`,"report"`, ` ,"report"`), "another case": replace(`"token"`, `"Token"`),
		"a name twice": replace(`{"format"`, `{"format":"yinjian-assessment/1","format"`), "a name more": replace(`{"format"`, `{"more":1,"format"`),
		"a later format": replace(`yinjian-assessment/1`, `yinjian-assessment/2`), "a later report": replace(`assessment-report/1`, `assessment-report/2`),
		"another spelling": replace(`\u003c`, `<`), "a number's": replace(`"section":1`, `"section":1.0`), "base64's": replace(`"AQ=="`, `"AR=="`), "null for a list": replace(`"crls":[]`, `"crls":null,"x":0`),
		"an item twice": replace(`"a.c"`, `"a.b"`), "a section empty": replace(`"section":3`, `"section":2`), "out of order": replace(`"section":3`, `"section":5`),
		"no such state": replace(`"shown"`, `"good"`), "not shown, and no reason": replace(`"shown"`, `"failed"`), "no nonce": replace(`0123456789abcdef`, ``), "a bad nonce": replace(`0123456789abcdef`, `0123456789 bcdef`),
	} {
		if _, _, err := assess.Parse(b); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if r := assess.Verify(good, evidence.Trust{}, evidence.Input{}, "0123456789abcdef"); r.Verdict != "invalid" {
		t.Errorf("a pack that nothing vouches for: %s", r.Verdict)
	}
}

// What is taken is written the same, and its judgement never says valid where nobody is trusted.
func FuzzParse(f *testing.F) {
	good := small(f)
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"section":1`), []byte(`"section":1e0`), 1))
	f.Add([]byte(strings.Repeat(`[`, 100)))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, _, err := assess.Parse(data)
		if err != nil {
			return
		}
		if again, err := p.Encode(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("written as %q, %v", again, err)
		}
		if r := assess.Verify(data, evidence.Trust{}, evidence.Input{}, ""); r.Verdict == "valid" {
			t.Error("valid without anchors and log key")
		}
	})
}
