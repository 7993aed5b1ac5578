package page_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"yinjian/appliance/assess"
	"yinjian/appliance/assess/page"
)

// Whatever stands in a pack, the page has no markup of anybody else's, its twelve sections, the gaps before what has none, and says
// what is not evidenced.
func TestRender(t *testing.T) {
	t.Parallel()
	const evil = `<script>alert(1)</script><img src=x onerror=alert(2)>"'` + "\u202e"
	raw, err := json.Marshal(map[string]any{"a": []any{evil, map[string]any{"b": evil}}, "long": strings.Repeat("长 ", 3000)})
	if err != nil {
		t.Fatal(err)
	}
	r := &assess.Report{
		Header:   assess.Header{Product: evil, Nonce: evil, Assessor: evil, Mode: assess.ModeUnsealed, Ended: "2026-11-22T00:00:00Z", Campus: evil},
		Products: []assess.Product{{Name: evil, Certificate: evil, Covers: []string{assess.CoversCipherMachine}, Level: 2, ValidUntil: "2099-01-01"}}, Threats: []assess.Threat{{Attacker: evil, MustNot: evil, State: evil, Proof: evil}},
	}
	for n := assess.SectionHeader; n <= assess.SectionIdentity; n++ {
		r.Items = append(r.Items, assess.Item{ID: evil, Section: n, Title: evil, Status: assess.NotEvidenced, Why: evil, Shows: evil, Limits: evil, Command: evil, Raw: raw})
	}
	for _, id := range []string{"integrity.samples", "integrity.drill.evidence"} {
		r.Items = append(r.Items, assess.Item{ID: id, Section: assess.SectionIntegrity, Status: assess.Shown, Raw: []byte("null")})
	}
	r.Finish()
	r.Header.Mode = assess.ModeSoft
	var b bytes.Buffer
	if err := page.Render(&b, &assess.Pack{Report: raw}, r); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, bad := range []string{"<script", "<img", "alert(2)>\"", "http:", "https:"} {
		if strings.Contains(text, bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	at := 0
	for i, title := range assess.Titles {
		n := strings.Index(text[at:], title)
		if n < 0 {
			t.Fatalf("section %d does not follow", i+1)
		}
		at += n
	}
	if strings.Count(text, "未取得证据 not evidenced") < 10 || !strings.Contains(text, "class=\"banner\">soft") || !strings.Contains(text, "全文在 JSON 中") {
		t.Error("what is not evidenced, soft or cut does not show")
	}
	if gap, whole := strings.LastIndex(text, "向有关主管部门上报处置情况"), strings.LastIndex(text, "不可否认性（"); gap < 0 || whole < gap {
		t.Errorf("a row without a gap, at %d, comes before one with, at %d", whole, gap)
	}
}
