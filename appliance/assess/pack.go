package assess

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
)

// A Pack is a report with what proves where and when it was made. Byte strings are base64 in JSON.
type Pack struct {
	Format string `json:"format"`
	// Report is the report as it was written: the journal's entry names the SM3 of these very bytes.
	Report       json.RawMessage  `json:"report"`
	Token        []byte           `json:"token"` // RFC 3161 TimeStampToken over them
	Certificates [][]byte         `json:"certificates"`
	CRLs         [][]byte         `json:"crls"`
	Journal      evidence.Journal `json:"journal"`
}

// MaxPack bounds a pack, in bytes: random numbers and lists of parts are what is long in it.
const MaxPack = 32 << 20

// IDs of the checks of a pack, beside evidence's own.
const (
	CheckReport  = "assessment.report"  // it is a report of this format, written in the one way
	CheckNonce   = "assessment.nonce"   // it was made for this assessor
	CheckItems   = "assessment.items"   // each item's raw output is the one that its digest names
	CheckMapping = "assessment.mapping" // rows and score follow from the items
)

// Encode is the report's bytes.
func (r *Report) Encode() ([]byte, error) { return json.Marshal(r) }

// Encode is the pack as a file.
func (p *Pack) Encode() ([]byte, error) { return json.Marshal(p) }

// IsPack reports whether a file names the format of a pack. It may be none for all that.
func IsPack(data []byte) bool {
	var o struct{ Format string }
	return json.Unmarshal(data, &o) == nil && strings.HasPrefix(o.Format, "yinjian-assessment/")
}

// Parse reads a pack and its report. There is one way to write both down, which [Pack.Encode] and [Report.Encode] do; any
// other, with a space more or a member twice, is refused, so that nothing in the file can mean one thing to this program and
// another to the next.
func Parse(data []byte) (*Pack, *Report, error) {
	if len(data) > MaxPack {
		return nil, nil, fmt.Errorf("assess: a pack of %d bytes, at most %d are read", len(data), MaxPack)
	}
	p, r := new(Pack), new(Report)
	if err := exactly(data, p); err != nil {
		return nil, nil, fmt.Errorf("assess: the pack: %w", err)
	}
	if p.Format != FormatPack {
		return nil, nil, fmt.Errorf("assess: the pack: format %.40q, want %q", p.Format, FormatPack)
	}
	if err := exactly(p.Report, r); err != nil {
		return nil, nil, fmt.Errorf("assess: the report: %w", err)
	}
	if r.Format != FormatReport {
		return nil, nil, fmt.Errorf("assess: the report: format %.40q, want %q", r.Format, FormatReport)
	}
	return p, r, r.check()
}

// exactly reads JSON that encoding/json would write the same, byte for byte.
func exactly(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	again, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(data, again) {
		at := 0
		for at < min(len(data), len(again)) && data[at] == again[at] {
			at++
		}
		return fmt.Errorf("byte %d is not as it would be written", at)
	}
	return nil
}

// reNonce is what an assessor's nonce may be.
var reNonce = regexp.MustCompile(`^[0-9A-Za-z._-]{8,128}$`)

// CheckNonceForm refuses what is no nonce: 8 to 128 letters, digits, '.', '_' and '-'.
func CheckNonceForm(nonce string) error {
	if !reNonce.MatchString(nonce) {
		return errors.New("随机数须为 8–128 个字母、数字、. _ - (a nonce of 8 to 128 letters, digits, . _ -)")
	}
	return nil
}

// check holds a report to its form: every section has an item, every item one of the states, and none stands twice.
func (r *Report) check() error {
	if err := CheckNonceForm(r.Header.Nonce); err != nil {
		return fmt.Errorf("assess: the report: %w", err)
	}
	seen := map[string]bool{}
	for i := range r.Items {
		it := &r.Items[i]
		switch {
		case it.Section < SectionHeader || it.Section > SectionIdentity, i > 0 && it.Section < r.Items[i-1].Section:
			return fmt.Errorf("assess: item %.80q stands in section %d, out of order", it.ID, it.Section)
		case seen[it.ID]:
			return fmt.Errorf("assess: item %.80q stands twice", it.ID)
		case !slices.Contains(Statuses, it.Status):
			return fmt.Errorf("assess: item %.80q has no known status", it.ID)
		case (it.Status == Shown) == (it.Why != ""):
			return fmt.Errorf("assess: item %.80q says why it is not shown, or does not", it.ID)
		}
		seen[it.ID] = true
	}
	for n := SectionHeader; n <= SectionIdentity; n++ {
		if !slices.ContainsFunc(r.Items, func(it Item) bool { return it.Section == n }) {
			return fmt.Errorf("assess: section %d has no item", n)
		}
	}
	return nil
}

// Digest is the SM3 of an item's raw output, hexadecimal.
func Digest(raw []byte) string {
	sum := sm3.Sum(raw)
	return hex.EncodeToString(sum[:])
}

// Verify judges a pack without the appliance: that the report is what an appliance's log vouches for, under anchors and log key
// of the verifier's, and that it holds together. What it says of the world is the appliance's word. nonce is the assessor's;
// without it nobody knows that the report was not made long before.
func Verify(data []byte, trust evidence.Trust, in evidence.Input, nonce string) *evidence.Report {
	p, r, err := Parse(data)
	if err != nil {
		return evidence.Unreadable(err)
	}
	a := &evidence.Attested{Kind: KindOutcome, Data: p.Report, Token: p.Token, Certificates: p.Certificates, CRLs: p.CRLs, Journal: p.Journal}
	return evidence.VerifyAttested(a, trust, in, func(j evidence.Judgement, e *audit.Entry) { r.judge(j, e, nonce) })
}

func (r *Report) judge(j evidence.Judgement, e *audit.Entry, nonce string) {
	h := &r.Header
	j.Hold(CheckReport, e != nil && e.Node == h.Node && e.Epoch.String() == h.Epoch && e.Text("nonce") == h.Nonce && e.Text("intent") == h.Intent,
		"报告所述设备、随机数与日志条目一致 (node, epoch and nonce are those of the entry)", "报告所述设备或随机数与日志条目不一致 (node, epoch or nonce differ from the entry's)")
	if nonce == "" {
		j.Skip(CheckNonce, "未给出测评方的随机数，不知报告是否为这次测评所做 (no nonce was given: it may have been made for another occasion)")
	} else {
		j.Hold(CheckNonce, h.Nonce == nonce, "报告是为此随机数所做 (made for this nonce)", "报告是为另一随机数所做 (made for another nonce)")
	}
	var wrong []string
	for i := range r.Items {
		if it := &r.Items[i]; it.SM3 != Digest(it.Raw) {
			wrong = append(wrong, it.ID)
		}
	}
	j.Hold(CheckItems, len(wrong) == 0, fmt.Sprintf("%d 项的原始输出与其摘要一致 (raw outputs fit their digests)", len(r.Items)), fmt.Sprintf("原始输出与摘要不符 (raw output does not fit its digest): %.200q", wrong))
	again := *r
	again.Items = slices.Clone(r.Items)
	again.Finish()
	j.Hold(CheckMapping, reflect.DeepEqual(again.Rows, r.Rows) && reflect.DeepEqual(again.Score, r.Score),
		fmt.Sprintf("%d 项指标与自评分由条目算得 (indicators and score follow from the items)", len(r.Rows)), "指标对照或自评分不是由条目算得的 (indicators or score do not follow from the items)")

	if h.Mode == ModeSoft {
		j.State("红色：软件密码机 soft，仅供评估，非认证产品 (RED: the software cipher machine, for evaluation only, not a certified product)")
	}
	if h.Simulated {
		j.State("时间来自模拟接收机，即本机时间 (the time is the machine's own, behind a simulated receiver)")
	}
	j.State(fmt.Sprintf("共 %d 项：已证明 %d，未通过 %d，未取得证据 %d (items: shown, failed, not evidenced)", len(r.Items), r.Count(Shown), r.Count(Failed), r.Count(NotEvidenced)))
	j.State(fmt.Sprintf("自评分 %.2f／100，不是测评结论 (self-assessment, no assessor's verdict)", r.Score.Total))
	j.State("本结论只说明报告出自持有日志密钥的设备、此后未改；报告所述事实是设备自己的陈述，未在此重做：可重放的条目用 yinjian assess verify 重算 " +
		"(this says that the report is that appliance's and unchanged since; what it reports is the appliance's own word, and was not done again here)")
	for _, p := range r.Products {
		j.State(fmt.Sprintf("产品证书 %s（%s）由运营方填写，未经核对 (entered by the operator, not checked)", p.Certificate, p.Name))
	}
}
