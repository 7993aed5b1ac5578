package alarm_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/alarm"
)

func words(events []alarm.Event) (out []string) {
	for _, e := range events {
		out = append(out, fmt.Sprintf("%s %s/%s %s", e.Event, e.Code, e.Object, e.Severity))
	}
	return out
}

// Each alarm is raised once and cleared once, however it flutters.
func TestTracker(t *testing.T) {
	t.Parallel()
	tr := alarm.Tracker{Raise: 2 * time.Second, Clear: 10 * time.Second}
	away := alarm.Condition{Code: alarm.MachineAway, Object: "b"}
	for _, step := range []struct {
		at    int
		found []alarm.Condition
		want  string
	}{
		{0, []alarm.Condition{away}, ""},
		{1, nil, ""}, // a blip
		{2, []alarm.Condition{away}, ""},
		{3, []alarm.Condition{away}, ""},
		{4, []alarm.Condition{away, away}, "raised machine-away/b warning"},
		{5, nil, ""},
		{12, []alarm.Condition{away}, ""}, // back before it was over
		{13, nil, ""},
		{14, []alarm.Condition{{Code: alarm.MachineAway, Object: "b", Severity: alarm.Severe}}, "raised machine-away/b severe"},
		{15, []alarm.Condition{away}, ""}, // less severe is no news
		{16, nil, ""},
		{24, nil, ""},
		{25, nil, "cleared machine-away/b warning"},
		{26, nil, ""},
	} {
		if got := strings.Join(words(tr.Look(time.Duration(step.at)*time.Second, step.found)), "; "); got != step.want {
			t.Errorf("at %d s: %q, want %q", step.at, got, step.want)
		}
	}
	if a := tr.Active(); len(a) != 0 {
		t.Errorf("still active: %v", a)
	}
}

// The id of what is cleared is that of what was raised; between the two it is active; of one code only so many are told
// apart, and the rest are one.
// A severity that goes up and down is told once; when it was lower for long enough, it is told again.
func TestTrackerFlaps(t *testing.T) {
	t.Parallel()
	tr := alarm.Tracker{Clear: 10 * time.Second}
	raised := 0
	look := func(at int, s alarm.Severity) {
		for _, e := range tr.Look(time.Duration(at)*time.Second, []alarm.Condition{{Code: alarm.DiskReserve, Severity: s}}) {
			if e.Event != alarm.Raised {
				t.Errorf("at %d s: %+v", at, e)
			}
			raised++
		}
		if a := tr.Active(); len(a) != 1 || a[0].Severity != s {
			t.Errorf("at %d s: %+v, want %v", at, a, s)
		}
	}
	for at := range 100 {
		look(at, alarm.Warning+alarm.Severity(at%2))
	}
	if raised != 2 { // as a warning, and as severe
		t.Errorf("raised %d times", raised)
	}
	for at := 100; at < 111; at++ {
		look(at, alarm.Warning)
	}
	look(111, alarm.Severe)
	if raised != 3 {
		t.Errorf("after ten seconds as a warning it is raised %d times, want once more", raised-2)
	}
}

func TestTrackerBounds(t *testing.T) {
	t.Parallel()
	tr := alarm.Tracker{}
	var many []alarm.Condition
	for i := range 10_000 {
		many = append(many, alarm.Condition{Code: alarm.PINLocked, Object: fmt.Sprintf("D%05d", i)})
	}
	raised := tr.Look(0, many)
	if len(raised) != alarm.MaxObjects+1 || len(tr.Active()) != len(raised) {
		t.Fatalf("%d alarms, %d active, want %d", len(raised), len(tr.Active()), alarm.MaxObjects+1)
	}
	ids := map[string]bool{}
	for _, e := range raised {
		ids[e.ID] = true
		if e.Object == "*" && !strings.Contains(e.Detail, fmt.Sprint(len(many)-alarm.MaxObjects)) {
			t.Errorf("the rest: %q", e.Detail)
		}
	}
	for _, e := range tr.Look(time.Second, nil) {
		if e.Event != alarm.Cleared || !ids[e.ID] {
			t.Errorf("%+v", e)
		}
		delete(ids, e.ID)
	}
	if len(ids) != 0 {
		t.Errorf("not cleared: %v", ids)
	}
}

// Whatever comes and goes, the events of one alarm are raised and cleared in turn, under one id, and never closer together
// than the two times allow.
func TestTrackerAtRandom(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(7, 7))
	tr := alarm.Tracker{Raise: 3, Clear: 5}
	open := map[string]string{}
	cleared := map[string]time.Duration{}
	for now := range time.Duration(20_000) {
		var found []alarm.Condition
		for i := range 5 {
			if r.IntN(8) > i {
				found = append(found, alarm.Condition{Code: alarm.MachineAway, Object: fmt.Sprint(i)})
			}
		}
		for _, e := range tr.Look(now, found) {
			switch {
			case e.Event == alarm.Raised && open[e.Object] == "":
				if at, ok := cleared[e.Object]; ok && now-at < tr.Raise {
					t.Fatalf("%v: raised again after %d", e, now-at)
				}
				open[e.Object] = e.ID
			case e.Event == alarm.Cleared && open[e.Object] == e.ID:
				delete(open, e.Object)
				cleared[e.Object] = now
			default:
				t.Fatalf("at %d: %+v while %q is open", now, e, open[e.Object])
			}
		}
	}
	if len(cleared) < 2 {
		t.Errorf("only %d objects were ever cleared: the test tries nothing", len(cleared))
	}
}

// What a drill brings about says so. What outlasts the drill is raised again for what it is; what was there before is not
// taken for the drill's.
func TestTrackerOfDrills(t *testing.T) {
	t.Parallel()
	tr := alarm.Tracker{Clear: time.Second}
	drilled := alarm.Condition{Code: alarm.MachineAway, Object: "b", Drill: "drill-1"}
	before := alarm.Condition{Code: alarm.DatabaseAway}
	marked := before
	marked.Drill = "drill-1"
	for at, step := range []struct {
		found []alarm.Condition
		want  string
	}{
		{[]alarm.Condition{before}, "raised database-away "},
		{[]alarm.Condition{marked, drilled}, "raised machine-away drill-1"},
		{[]alarm.Condition{marked, drilled}, ""},
		{[]alarm.Condition{before, {Code: alarm.MachineAway, Object: "b"}}, "raised machine-away "},
		{nil, ""},
		{nil, "cleared database-away ; cleared machine-away "},
		{[]alarm.Condition{drilled}, "raised machine-away drill-1"},
		{nil, ""},
		{nil, "cleared machine-away drill-1"},
	} {
		var got []string
		for _, e := range tr.Look(time.Duration(at)*600*time.Millisecond, step.found) {
			got = append(got, fmt.Sprintf("%s %s %s", e.Event, e.Code, e.Drill))
		}
		if all := strings.Join(got, "; "); all != step.want {
			t.Errorf("step %d: %q, want %q", at, all, step.want)
		}
	}
}

// Every alarm has its words, and its line on the page.
func TestMeaningsDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/alarms.md")
	if err != nil {
		t.Fatal(err)
	}
	for code, m := range alarm.Meanings {
		if m.Title == "" || m.Next == "" || m.Severity == alarm.Normal {
			t.Errorf("%s: %+v", code, m)
		}
		title, _, _ := strings.Cut(m.Title, " (")
		line := fmt.Sprintf("| `%s` | %s | %s |", code, m.Severity.Chinese(), title)
		if !strings.Contains(string(page), line) {
			t.Errorf("docs/alarms.md has no line that begins %q", line)
		}
	}
	for s := alarm.Normal; s <= alarm.Severe; s++ {
		var back alarm.Severity
		b, err := s.MarshalText()
		if err == nil {
			err = back.UnmarshalText(b)
		}
		if err != nil || back != s {
			t.Errorf("%v: %v, %v", s, back, err)
		}
	}
	var none alarm.Severity
	if none.UnmarshalText([]byte("bad")) == nil {
		t.Error("an unknown severity was taken")
	}
}
