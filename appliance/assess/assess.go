// Package assess is the evaluator's pack: what an appliance can show of itself for an assessment of its cryptography (密评,
// GB/T 39786-2021 with GB/T 43206-2023), how that is scored, and the judgement of a pack without the appliance.
//
// A [Report] has twelve sections of items. An item is something that was tried or read at that moment: its raw output
// stands in it, with what it shows and what it does not. What could not be shown is there too, as "not evidenced"; nothing
// is left out. The mapping to the 41 indicators and the score follow from the items' states alone ([Map], [ScoreOf]), so that whoever
// has the pack computes them again. They are a self-assessment: an assessor's judgement is another thing.
//
// A [Pack] holds the report's very bytes, an entry of the journal that names their SM3, the entry's place under a checkpoint
// that the log key signed, and a timestamp token. No key signs a report by itself: the log key signs checkpoints alone, a unit's
// key tokens alone, and a key of its own would be one more to look after, trusted by nobody yet. Whoever can judge a record's
// evidence can judge a pack with the same anchors and the same log key.
package assess

import (
	"encoding/json"
	"slices"
	"strings"
)

// Formats, with their versions.
const (
	FormatReport = "yinjian-assessment-report/1"
	FormatPack   = "yinjian-assessment/1"
)

// Kinds of the journal's entries.
const (
	KindIntent  = "assessment/intent"
	KindOutcome = "assessment/outcome"
)

// A Status says what came of an item.
type Status string

const (
	Shown        Status = "shown"         // tried or read now, and as it should be
	Failed       Status = "failed"        // tried now, and not as it should be
	NotEvidenced Status = "not_evidenced" // 未取得证据: not built, not there, or could not be tried
)

// Statuses lists them.
var Statuses = []Status{Shown, Failed, NotEvidenced}

// Modes of an appliance. None is called sealed: there is no image yet.
const (
	ModeSoft     = "soft"     // the software cipher machine is in use, which is no certified product
	ModeUnsealed = "unsealed" // other cipher machines, on a host that nobody sealed
)

// Titles are those of the twelve sections, in their order.
var Titles = []string{
	"产品与模式 (header)", "密码算法自测 (known-answer tests)", "随机数 (random numbers)", "密钥清单与生命周期 (keys and their life)",
	"证书 (certificates)", "完整性 (integrity)", "通信信道 (channels)", "软件 (software)", "时间 (time)", "身份鉴别 (identity)",
	"指标对照与自评分 (indicators and self-score)", "复现 (reproduce)",
}

// Sections whose numbers are named elsewhere.
const (
	SectionHeader = iota + 1
	SectionKAT
	SectionRandom
	SectionKeys
	SectionCertificates
	SectionIntegrity
	SectionChannels
	SectionSoftware
	SectionTime
	SectionIdentity
)

// A Report is the truth of a pack; pages are rendered from it.
type Report struct {
	Format string `json:"format"`
	Header Header `json:"header"`
	// Items are those of sections 1 to 10, by section.
	Items []Item `json:"items"`
	// Products are what the operator entered; nobody has looked at the certificates here.
	Products []Product `json:"products"`
	// Rows and Score are section 11.
	Rows  []Row `json:"rows"`
	Score Score `json:"score"`
	// Threats is the project's own page of attackers, with the honest state of each claim.
	Threats []Threat `json:"threats"`
}

// NoImage stands in a head for the image of a system that was not started from one.
const NoImage = "none"

// A Header says of what the report is.
type Header struct {
	Product   string `json:"product"`
	Version   string `json:"version"`
	Build     string `json:"build_sm3"`       // of the running binary
	Image     string `json:"image_signature"` // what was started from which root, or [NoImage]
	Serial    string `json:"serial"`          // SM3 of the log key's SubjectPublicKeyInfo, its first 16 hexadecimal digits
	Node      string `json:"node"`
	Campus    string `json:"campus"`
	Epoch     string `json:"epoch"`
	Nonce     string `json:"nonce"` // the assessor's
	Assessor  string `json:"assessor"`
	Mode      string `json:"mode"`
	Simulated bool   `json:"simulated_time"` // time is this machine's own, behind a simulated receiver
	Full      bool   `json:"full"`           // the power-on set of random tests was run
	Intent    string `json:"intent"`         // of the journal's entry that began it
	Began     string `json:"began"`          // RFC 3339, by the trusted clock
	Ended     string `json:"ended"`
}

// An Item is one thing that was tried or read.
type Item struct {
	ID      string `json:"id"` // "channels.listener.api"
	Section int    `json:"section"`
	Title   string `json:"title"`
	Status  Status `json:"status"`
	// Shows is what it proves when its status is Shown; Limits what it does not prove even then.
	Shows  string `json:"shows"`
	Limits string `json:"limits"`
	// Why says why it is not shown; "" when it is.
	Why string `json:"why"`
	// How it is had again, when it was made, where, and the SM3 of Raw: section 12.
	Command string `json:"command"`
	At      string `json:"at"` // RFC 3339
	Node    string `json:"node"`
	SM3     string `json:"sm3"`
	// Replayed: whoever has the pack can compute the result again from Raw (yinjian assess verify).
	Replayed bool            `json:"replayed"`
	Raw      json.RawMessage `json:"raw"` // null when there is none
}

// A Product is a certified product as the operator entered it (商用密码产品认证证书).
type Product struct {
	Covers      []string `json:"covers" toml:"covers"` // of [Coverages]
	Name        string   `json:"name" toml:"name"`
	Certificate string   `json:"certificate" toml:"certificate"` // its number
	Holder      string   `json:"holder" toml:"holder"`
	Level       int      `json:"level" toml:"level"`             // of GB/T 37092
	ValidUntil  string   `json:"valid_until" toml:"valid_until"` // a day, "2029-01-31"
}

// What a product may be for.
const (
	CoversCipherMachine = "cipher-machine"
	CoversChannel       = "channel"
)

// Coverages lists them.
var Coverages = []string{CoversCipherMachine, CoversChannel}

// A Threat is one claim of the project's page of threats.
type Threat struct {
	Attacker string `json:"attacker"`
	MustNot  string `json:"must_not"`
	State    string `json:"state"` // 成立, 部分, 未解决
	Proof    string `json:"proof"` // tests, or the reason
}

// ParseThreats reads the page (docs/threats.md): a heading an attacker, a row of its table a claim.
func ParseThreats(page string) []Threat {
	out := []Threat{}
	attacker := ""
	for line := range strings.SplitSeq(page, "\n") {
		if name, ok := strings.CutPrefix(line, "## "); ok {
			attacker = name
			continue
		}
		cells := strings.Split(line, " | ")
		if attacker == "" || len(cells) != 3 || !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| ---") || strings.HasPrefix(cells[1], "状态") {
			continue
		}
		out = append(out, Threat{attacker, strings.TrimPrefix(cells[0], "| "), cells[1], strings.TrimSuffix(cells[2], " |")})
	}
	return out
}

// Count says how many items have a status.
func (r *Report) Count(s Status) (n int) {
	for i := range r.Items {
		if r.Items[i].Status == s {
			n++
		}
	}
	return n
}

// statuses are those of the items by id.
func statuses(items []Item) map[string]Status {
	out := map[string]Status{}
	for i := range items {
		out[items[i].ID] = items[i].Status
	}
	return out
}

// Finish computes rows and score from the items, which it puts in the order of their sections.
func (r *Report) Finish() {
	slices.SortStableFunc(r.Items, func(a, b Item) int { return a.Section - b.Section })
	exact := mapped(r.Items, r.Products, r.Header.Ended, r.Header.Mode)
	r.Score = ScoreOf(exact)
	r.Rows = shownRows(exact)
}
