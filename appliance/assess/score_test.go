package assess_test

import (
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"yinjian/appliance/assess"
)

const day = "2026-11-22T10:00:00Z"

func item(id string, s assess.Status) assess.Item { return assess.Item{ID: id, Section: 6, Status: s} }

func row(t *testing.T, rows []assess.Row, id string) assess.Row {
	t.Helper()
	for _, r := range rows {
		if r.ID == id {
			return r
		}
	}
	t.Fatalf("no row %s", id)
	return assess.Row{}
}

func near(a, b float64) bool { return math.Abs(a-b) < 5e-5 }

// The 41 indicators are there, 22 and 19, by layer as GB/T 39786-2021 has them, and with nothing shown each is a gap.
func TestIndicators(t *testing.T) {
	t.Parallel()
	rows := assess.Map(nil, nil, day, assess.ModeUnsealed)
	count := map[string]int{}
	seen := map[string]bool{}
	for _, r := range rows {
		count[r.Layer]++
		if seen[r.ID] || r.Gap == "" || r.Score != 0 {
			t.Errorf("%+v", r)
		}
		seen[r.ID] = true
	}
	for layer, want := range map[string]int{assess.Physical: 3, assess.Network: 5, assess.Device: 6, assess.Application: 8, assess.Policy: 6, assess.People: 5, assess.Operation: 5, assess.Emergency: 3} {
		if count[layer] != want {
			t.Errorf("%s: %d rows, want %d", layer, count[layer], want)
		}
	}
	if s := assess.ScoreOf(rows); s.Total != 0 || len(s.Layers) != 8 || s.Note == "" || s.Reached() {
		t.Errorf("%+v", s)
	}
}

// One example, computed by hand from the law: an object has 1, times 0.5·Ra where A fails, times 0.5·Rk where K fails; an indicator
// the mean of its objects; a layer the mean of its indicators, times its weight; network and application have at least half of
// each other's.
func TestScoreByHand(t *testing.T) {
	t.Parallel()
	shown := []string{
		"integrity.journal", "integrity.rows", "integrity.directory", "integrity.samples", "integrity.drill.segment", "integrity.drill.row", "integrity.drill.evidence",
		"channels.listener.api",
	}
	items := []assess.Item{item("channels.listener.tsa_plain", assess.Failed), item("channels.tlcp", assess.NotEvidenced)}
	for _, id := range shown {
		items = append(items, item(id, assess.Shown))
	}
	machine := []assess.Product{{Covers: []string{assess.CoversCipherMachine}, Name: "密码机", Certificate: "GM1", Level: 2, ValidUntil: "2027-01-01"}}
	rows := assess.Map(items, machine, day, assess.ModeUnsealed)

	// TLS with international algorithms and no certified channel: 0.5·0.2 · 0.5·1 = 0.05 for the listener, 0 for the plain one.
	for _, id := range []string{"network.identity", "network.integrity", "network.confidentiality", "application.transport_confidentiality", "application.transport_integrity"} {
		if r := row(t, rows, id); !near(r.Own, 0.025) || len(r.Objects) != 2 {
			t.Errorf("%s: %+v", id, r)
		}
	}
	// application.identity has nothing of its own, and half of the network's.
	if r := row(t, rows, "application.identity"); r.Own != 0 || !near(r.Score, 0.0125) {
		t.Errorf("%+v", r)
	}
	// With SM algorithms and a certified cipher machine: 1.
	for _, id := range []string{"device.log", "application.acl", "application.storage_integrity", "application.non_repudiation"} {
		if r := row(t, rows, id); r.Score != 1 || r.Gap != "" {
			t.Errorf("%s: %+v", id, r)
		}
	}
	// Network: 3 × 0.025 of 5 = 0.015, 20 points: 0.3. Device: 1 of 6 = 0.1667, 10: 1.667. Application: 3 + 2 × 0.025 + 0.0125 of 8 =
	// 0.38281, 30: 11.484. Physical and management 0.
	whole := assess.Report{Items: items, Products: machine}
	whole.Header.Ended, whole.Header.Mode = day, assess.ModeUnsealed
	whole.Finish()
	s := whole.Score
	for i, want := range []float64{0, 0.3, 1.6667, 11.4844, 0, 0, 0, 0} {
		if !near(s.Layers[i].Points, want) {
			t.Errorf("%s: %v points, want %v", s.Layers[i].Layer, s.Layers[i].Points, want)
		}
	}
	if !near(s.Total, 13.4510) || // 0.3 + 10/6 + 11.484375, not the sum of what is shown
		s.Management != 0 || !near(s.Total, s.Technical) {
		t.Errorf("%+v", s)
	}

	// The same without the certificate: each K fails, 0.5·1.
	for what, products := range map[string][]assess.Product{
		"none": nil, "expired": {{Covers: []string{assess.CoversCipherMachine}, Certificate: "GM1", Level: 2, ValidUntil: "2026-11-21"}},
		"level 1": {{Covers: []string{assess.CoversCipherMachine}, Certificate: "GM1", Level: 1, ValidUntil: "2027-01-01"}},
		"channel": {{Covers: []string{assess.CoversChannel}, Certificate: "GM2", Level: 2, ValidUntil: "2027-01-01"}},
	} {
		if r := row(t, assess.Map(items, products, day, assess.ModeUnsealed), "device.log"); r.Score != 0.5 || r.Objects[0].K || r.Gap == "" {
			t.Errorf("%s: %+v", what, r)
		}
	}
	// The software cipher machine is no certified product, whatever is entered.
	if r := row(t, assess.Map(items, machine, day, assess.ModeSoft), "device.log"); r.Score != 0.5 || r.Objects[0].K || !strings.Contains(r.Gap, "软件密码机") {
		t.Errorf("%+v", r)
	}
	// A certified channel that is still TLS: K holds, A does not.
	channel := []assess.Product{{Covers: []string{assess.CoversChannel}, Certificate: "GM2", Level: 2, ValidUntil: "2027-01-01"}}
	if r := row(t, assess.Map(items, channel, day, assess.ModeUnsealed), "network.identity"); !near(r.Own, 0.05) {
		t.Errorf("%+v", r)
	}
	// A drill that failed takes what it stands for with it.
	for i := range items {
		if items[i].ID == "integrity.drill.segment" {
			items[i].Status = assess.Failed
		}
	}
	if r := row(t, assess.Map(items, machine, day, assess.ModeUnsealed), "device.log"); r.Score != 0 || r.Objects[0].D || !strings.Contains(r.Gap, "integrity.drill.segment") {
		t.Errorf("%+v", r)
	}
}

// The page of threats is read whole.
func TestThreats(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/threats.md")
	if err != nil {
		t.Fatal(err)
	}
	threats := assess.ParseThreats(string(page))
	states := map[string]int{}
	attackers := map[string]bool{}
	for _, x := range threats {
		states[x.State]++
		attackers[x.Attacker] = true
		if x.MustNot == "" || x.Proof == "" {
			t.Errorf("%+v", x)
		}
	}
	rows := 0
	for line := range strings.SplitSeq(string(page), "\n") {
		if strings.HasPrefix(line, "| ") && !strings.HasPrefix(line, "| ---") && !strings.Contains(line, "| 状态 |") {
			rows++
		}
	}
	if len(threats) != rows || len(attackers) < 7 || states["成立"] == 0 || states["部分"] == 0 || states["未解决"] == 0 || states["成立"]+states["部分"]+states["未解决"] != rows {
		t.Errorf("%d of %d rows, %v, %v", len(threats), rows, states, fmt.Sprint(attackers))
	}
}
