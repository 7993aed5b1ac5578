package main_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp/ledger"
	"yinjian/tsa"
)

// entries are the journal's entries of the kinds, in order.
func entries(t *testing.T, dir string, kinds ...string) (all []audit.Entry) {
	t.Helper()
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	size, _, err := store.Head(t.Context())
	if err == nil {
		err = audit.Scan(t.Context(), store, 0, size, func(r audit.Record) error {
			if slices.Contains(kinds, r.Entry.Kind) {
				all = append(all, r.Entry)
			}
			return nil
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// A timeStatus is what the test reads of `yinjian time status -o json`.
type timeStatus struct {
	State   string
	LeftS   int64 `json:"left_s"`
	Time    time.Time
	Round   struct{ Agreed, Rejected []string }
	Workers []struct{ Machine, State, Wrong string }
	Sources []struct{ Name, Group, State, Reason string }
	Changes []ledger.Change
}

func (m *machine) timeStatus(t *testing.T) (s timeStatus) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustRun(t, "time", "status", "--dir", m.dir, "-o", "json").stdout), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s timeStatus) source(name string) string {
	for _, one := range s.Sources {
		if one.Name == name {
			return one.State
		}
	}
	return "absent"
}

// Time sources come and go without a restart, and what was decided outlives one; every act and its outcome is in the
// journal, and so is each change of state, in order, from the first on. The hour is written at a stop, and shown with the
// one that runs; the plot has a mark for each answer of it.
func TestTimeAdministration(t *testing.T) {
	t.Parallel()
	a, b, c := startTimeServer(t), startTimeServer(t), startTimeServer(t)
	dir := initAppliance(t, a)
	m := serve(t, dir)
	m.trusted(t)
	sources := func(args ...string) []string {
		return append(append([]string{"time", "sources"}, args...), "--dir", dir, "--reason", "扩容")
	}
	name := m.timeStatus(t).Sources[0].Name
	is := func(source, want string) {
		t.Helper()
		eventually(t, time.Minute, source+" is "+want, func() bool { return m.timeStatus(t).source(source) == want })
	}

	refused(t, 1, []string{"forbidden", "添加另一组"}, sources("remove", name)...)
	refused(t, 1, []string{"not_found"}, sources("remove", "nobody")...)
	refused(t, 1, []string{"invalid_request", "group"}, sources("add", "b", "--group", "\u202eb", "--address", b.address)...)
	b.silent.Store(true)
	refused(t, 1, []string{"not_ready", "--force"}, sources("add", "b", "--group", "lan-b", "--address", b.address)...)
	if s := m.timeStatus(t).source("b"); s != "absent" {
		t.Errorf("a source that did not answer is %s", s)
	}
	b.silent.Store(false)
	mustRun(t, sources("add", "b", "--group", "lan-b", "--address", b.address)...)
	refused(t, 1, []string{"exists"}, sources("add", "b", "--group", "lan-b", "--address", b.address)...)
	c.silent.Store(true)
	mustRun(t, sources("add", "c", "--group", "lan-c", "--address", c.address, "--force")...)
	is("b", "agreed")
	is("c", "silent")
	// With the first one gone, b alone carries the time.
	mustRun(t, sources("remove", name)...)
	refused(t, 1, []string{"exists", "timesources.toml"}, sources("add", name, "--group", "x", "--address", a.address)...)
	eventually(t, time.Minute, "b and c are left", func() bool {
		s := m.timeStatus(t)
		return len(s.Sources) == 2 && slices.Equal(s.Round.Agreed, []string{"lan-b"}) && s.State == "trusted"
	})
	// A timestamp worker that was not heard of for a while, on a busy machine, might wait for it.
	eventually(t, time.Minute, "nothing waits to be readmitted", func() bool {
		m.trusted(t)
		o := yinjian(t, "time", "readmit", "--dir", dir, "--reason", "核对", "--confirmed-by", "甲", "--confirmed-by", "乙")
		return o.code == 1 && strings.Contains(o.stderr, "not_ready") && strings.Contains(o.stderr, "没有等待核准的时间")
	})
	refused(t, 1, []string{"invalid_request", "不同"}, "time", "readmit", "--dir", dir, "--reason", "核对", "--confirmed-by", "甲", "--confirmed-by", "甲")
	refused(t, 2, []string{"confirmed-by"}, "time", "readmit", "--dir", dir, "--reason", "核对", "--confirmed-by", "甲")
	m.stop(t)

	m = serve(t, dir)
	m.trusted(t)
	is("b", "agreed")
	if s := m.timeStatus(t); s.source(name) != "absent" || s.source("c") != "silent" || s.LeftS < 3600 {
		t.Errorf("after a restart: %+v", s)
	}
	var acts []string
	for _, e := range entries(t, dir, "time.source/intent", "time.source/outcome") {
		what, _, _ := strings.Cut(e.Text("result"), ":")
		if what == "" { // not an outcome
			what = e.Text("act")
		}
		acts = append(acts, strings.TrimPrefix(e.Kind, "time.source/")+" "+e.Object+" "+what)
	}
	want := []string{
		"intent " + name + " remove", "outcome " + name + " refused", "intent b add", "outcome b refused", "intent b add", "outcome b done",
		"intent c add", "outcome c done", "intent " + name + " remove", "outcome " + name + " done",
	}
	if !slices.Equal(acts, want) {
		t.Errorf("journal has\n%s\nwant\n%s", strings.Join(acts, "\n"), strings.Join(want, "\n"))
	}

	// The states: the journal has them from the first on, each beginning where the one before ended, but for the restart.
	eventually(t, time.Minute, "the journal has the states", func() bool { return len(entries(t, dir, "time.state")) >= 4 })
	var states []string
	for _, e := range entries(t, dir, "time.state") {
		states = append(states, e.Text("from")+">"+e.Text("to"))
		if e.Text("boot_id") == "" || e.Text("reason") == "" || e.Text("to") == "trusted" && e.Text("at") == "" {
			t.Errorf("entry %+v", e)
		}
	}
	if len(states) < 4 || !slices.Equal(states[:4], []string{"cold>acquiring", "acquiring>trusted", "cold>holdover", "holdover>trusted"}) {
		t.Errorf("states %v", states)
	}
	if s := m.timeStatus(t); len(s.Changes) < 4 || s.Changes[0].To != "acquiring" || s.Changes[0].At.IsZero() || s.Changes[0].At.After(s.Changes[1].At) {
		t.Errorf("changes %+v", s.Changes)
	}

	// The ledger: an entry at the stop, and one more if an hour has ended meanwhile. What is running is shown, too.
	hours := len(entries(t, dir, "time.ledger"))
	if hours < 1 || hours > 3 {
		t.Errorf("%d hours in the journal after one stop", hours)
	}
	var history struct{ Hours []ledger.Hour }
	if err := json.Unmarshal([]byte(mustRun(t, "time", "ledger", "--dir", dir, "-o", "json").stdout), &history); err != nil {
		t.Fatal(err)
	}
	if len(history.Hours) < 2 {
		t.Fatalf("ledger %+v", history)
	}
	rounds, confirmed, issued, trusted, cold := 0, 0, uint64(0), int64(0), int64(0)
	byName := map[string]ledger.SourceHour{}
	for i, h := range history.Hours {
		rounds, confirmed, issued = rounds+h.Rounds, confirmed+h.Confirmed, issued+h.Tokens.Issued
		trusted, cold = trusted+h.StatesMS["trusted"], cold+h.StatesMS["cold"]
		for _, s := range h.Sources {
			was := byName[s.Name]
			s.Answers, s.Candidates, s.Failed = s.Answers+was.Answers, s.Candidates+was.Candidates, s.Failed+was.Failed
			byName[s.Name] = s
		}
		if !h.From.Before(h.To) || i > 0 && h.From.Before(history.Hours[i-1].To) {
			t.Errorf("hour %d from %v to %v", i, h.From, h.To)
		}
	}
	if rounds < 5 || confirmed < 5 || trusted == 0 || cold == 0 || issued == 0 || history.Hours[0].BoundMinUS == 0 ||
		byName[name].Answers < 3 || byName["b"].Candidates < 2 || byName["c"].Failed < 2 || byName["c"].Answers != 0 || byName["b"].RefID != "TEST" {
		t.Errorf("ledger %+v", history)
	}
	if o := mustRun(t, "time", "ledger", "--dir", dir, "--from", "2h"); strings.Count(o.stdout, "b(lan-b)") < 2 {
		t.Errorf("ledger: %v", o)
	}
	refused(t, 2, []string{"--from"}, "time", "ledger", "--dir", dir, "--from", "昨天")
	if o := mustRun(t, "time", "status", "--dir", dir); !strings.Contains(o.stdout, "可信（trusted）") || !strings.Contains(o.stdout, "还能守时") || !strings.Contains(o.stdout, "运行时添加") {
		t.Errorf("status: %v", o)
	}

	// The plot: a mark for each answer that the memory has.
	file := filepath.Join(tempDir(t), "time.svg")
	o := mustRun(t, "time", "plot", "--dir", dir, "-o", file)
	svg, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(o.stdout[strings.Index(o.stdout, "，")+len("，"):], "%d 轮", &rounds); err != nil {
		t.Fatalf("%v: %v", o, err)
	}
	marks, group := map[string]int{}, ""
	dec := xml.NewDecoder(bytes.NewReader(svg))
	for {
		tok, err := dec.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
		if e, ok := tok.(xml.StartElement); ok {
			for _, at := range e.Attr {
				if at.Name.Local == "data-source" {
					group = at.Value
				}
			}
			if e.Name.Local == "circle" {
				marks[group]++
			}
		}
	}
	// One mark for the hour before the restart as well.
	if rounds == 0 || marks["b"] < rounds/2 || marks["b"] > rounds+hours || marks["c"] != 0 || marks[name] < 1 || marks[name] > hours {
		t.Errorf("%d rounds, marks %v", rounds, marks)
	}
	m.mustBeClean(t)
}

// Sources that agree on a time five seconds away are not followed, until an administrator says that two persons have checked
// it; and a source that refuses us is in the journal, once.
func TestReadmission(t *testing.T) {
	t.Parallel()
	server, other := startTimeServer(t), startTimeServer(t)
	dir := initAppliance(t, server)
	m := serve(t, dir)
	m.trusted(t)
	mustRun(t, "time", "sources", "add", "other", "--dir", dir, "--group", "other", "--address", other.address, "--reason", "扩容")
	other.denies.Store(true)
	eventually(t, time.Minute, "the refusal is in the journal", func() bool { return journalled(t, dir, "time.source.denied", "other") == 1 })
	// The timestamp worker asks it, too, and was refused as well.
	eventually(t, time.Minute, "the timestamp worker asks the source that was added", func() bool {
		b, err := os.ReadFile(m.log)
		return err == nil && regexp.MustCompile(`(?m)^.*worker output.*DENY.*slot=tsa`).Match(b)
	})
	server.ahead.Store(int64(5 * time.Second))
	eventually(t, time.Minute, "the jump is seen", func() bool { return m.state(t).Time.State == "suspect" })
	readmit := []string{"time", "readmit", "--dir", dir, "--reason", "与授时热线核对", "--confirmed-by", "张三", "--confirmed-by", "李四"}
	var o outcome
	eventually(t, time.Minute, "a majority waits", func() bool {
		o = yinjian(t, "time", "status", "--dir", dir)
		return strings.Contains(o.stdout, "yinjian time readmit")
	})
	if s := m.timeStatus(t); s.State != "suspect" || s.LeftS != 0 {
		t.Errorf("before the readmission: %+v", s)
	}
	// A reading is some time between the command's start and its end, which on a busy machine are far apart.
	reading := func() (earliest, latest time.Duration) {
		t.Helper()
		begun := time.Now()
		is := m.timeStatus(t).Time
		return is.Sub(time.Now()), is.Sub(begun)
	}
	beforeLeast, beforeMost := reading()
	mustRun(t, readmit...)
	m.trusted(t)
	afterLeast, afterMost := reading()
	if afterMost-beforeLeast < 4*time.Second || afterLeast-beforeMost > 6*time.Second {
		t.Errorf("time moved by %v to %v, want 5 s", afterLeast-beforeMost, afterMost-beforeLeast)
	}
	// The timestamp worker has a clock of its own, which followed as little, and was readmitted with the appliance's.
	eventually(t, time.Minute, "the timestamp worker's time is trusted", func() bool {
		s := m.timeStatus(t)
		return len(s.Workers) == 1 && s.Workers[0].State == "trusted" && s.Workers[0].Wrong == ""
	})
	m.changeOf(t, "/admin/v1/time/readmit", "time.readmit/outcome", "", `"offset_us":`, `"result":"done`)
	m.enrol(t, "D1", "")
	if r, err := m.register(t, "his", "--consent", "app-asserted").Sign(t.Context(), "after", asserted("D1", "after")); err != nil {
		t.Errorf("a stamped signature after the readmission: %+v, %v", r, err)
	}
	eventually(t, time.Minute, "the journal has the worker's states", func() bool {
		var worker []string
		for _, e := range entries(t, dir, "time.worker.state") {
			worker = append(worker, e.Text("to"))
		}
		return slices.Contains(worker, "suspect") && worker[len(worker)-1] == "trusted"
	})
	all := entries(t, dir, "time.readmit/intent", "time.readmit/outcome")
	if len(all) != 2 || all[0].Text("persons") != "张三、李四" || !strings.HasPrefix(all[1].Text("result"), "done") || all[0].Text("intent") != all[1].Text("intent") {
		t.Errorf("journal: %+v", all)
	}
	if us, ok := all[0].Field("offset_us").(audit.Int); !ok || us < 4_000_000 || us > 6_000_000 {
		t.Errorf("offset %v", all[0].Field("offset_us"))
	}
	if n := journalled(t, dir, "time.source.denied", "other"); n != 1 {
		t.Errorf("%d entries about the refusal", n)
	}
	if s := m.timeStatus(t); s.source("other") != "denied" {
		t.Errorf("source %+v", s.Sources)
	}
	m.mustBeClean(t)
}

// A stopped time-stamping service answers systemFailure and says why; a signature that needs a stamp is refused before
// anything is signed, one that does not is made; the decision outlives a restart, and who decided, what was refused and what
// was stamped can be read from the journal.
func TestStampingIsStopped(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	configure(t, dir, func(c *appliance.Config) { c.Listen.TSAPlain = "127.0.0.1:0" })
	m := serve(t, dir)
	m.trusted(t)
	his := m.register(t, "his", "--consent", "app-asserted")
	bare := m.register(t, "bare", "--consent", "app-asserted", "--stamp", "none")
	m.enrol(t, "D1", "")
	imprint := tsa.ImprintOf([]byte("印鉴"))
	query, err := (&tsa.Request{Imprint: imprint, CertReq: true}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	stamp := func(url string) *tsa.Response {
		t.Helper()
		reply, err := client.StampPlain(t.Context(), url, query)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tsa.ParseResponse(reply)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	because := func(args ...string) []string {
		return append(append([]string{"tsa"}, args...), "--dir", dir, "--reason", "年检")
	}
	uses := func() (n int) {
		for _, s := range m.uses(t) {
			n += s
		}
		return n
	}
	if stamp(m.ends.TSASM2).Token == nil {
		t.Fatal("no token")
	}
	refused(t, 1, []string{"not_found"}, because("stop", "--unit", "nobody")...)
	mustRun(t, because("stop", "--unit", "sm2")...)
	stopped := func() {
		t.Helper()
		if resp := stamp(m.ends.TSASM2); resp.Token != nil || !slices.Contains(resp.Failures, tsa.SystemFailure) || !strings.Contains(strings.Join(resp.Text, ""), "停止") {
			t.Errorf("a stopped unit answers %+v", resp)
		}
		if stamp(m.ends.TSARSA).Token == nil {
			t.Error("the other unit is stopped, too")
		}
		before := uses()
		_, err := his.Sign(t.Context(), "stopped", asserted("D1", "stopped"))
		wantCode(t, err, "not_ready")
		if after := uses(); after != before {
			t.Errorf("%d keys' uses for a refusal", after-before)
		}
	}
	stopped()
	key := fmt.Sprint("bare")
	if _, err := bare.Sign(t.Context(), key, asserted("D1", key)); err != nil {
		t.Errorf("a signature without stamp: %v", err)
	}
	if s := m.state(t); !strings.Contains(strings.Join(s.Warnings, "\n"), "时间戳单元 sm2") {
		t.Errorf("warnings %q", s.Warnings)
	}
	m.stop(t)
	m = serve(t, dir)
	m.trusted(t)
	his, bare = m.client(t, "his"), m.client(t, "bare")
	stopped()
	if o := mustRun(t, "tsa", "status", "--dir", dir); !strings.Contains(o.stdout, "已停止") || !strings.Contains(o.stdout, "年检") {
		t.Errorf("status: %v", o)
	}
	mustRun(t, because("start")...)
	good := stamp(m.ends.TSASM2)
	if good.Token == nil {
		t.Fatalf("after the start: %+v", good)
	}
	if _, err := his.Sign(t.Context(), "started", asserted("D1", "started")); err != nil {
		t.Error(err)
	}
	m.stop(t) // which writes what was refused
	m = serve(t, dir)
	o := mustRun(t, "tsa", "log", "--dir", dir, "-n", "50")
	for _, w := range []string{"token", "refused", "stopped", "stop ", "start ", "年检", hex.EncodeToString(good.Token.Serial.Bytes())} {
		if !strings.Contains(o.stdout, w) {
			t.Errorf("log does not say %q: %v", w, o)
		}
	}
	var lines []struct {
		Kind, Reason string
		Count        int
	}
	if err := json.Unmarshal([]byte(mustRun(t, "tsa", "log", "--dir", dir, "-n", "50", "-o", "json").stdout), &lines); err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, l := range lines {
		count[l.Kind+" "+l.Reason] += max(1, l.Count)
	}
	if count["token "] != 4 || count["refused stopped"] != 2 || count["stop 年检"] != 1 || count["start 年检"] != 1 {
		t.Errorf("log: %v", count)
	}
	if o := mustRun(t, "tsa", "log", "--dir", dir, "-n", "1", "-o", "json"); strings.Count(o.stdout, `"kind"`) != 1 {
		t.Errorf("one line: %v", o)
	}
	m.mustBeClean(t)
}

// uses are how often each slot has signed.
func (m *machine) uses(t *testing.T) map[string]int {
	t.Helper()
	out := map[string]int{}
	for name, l := range m.machines(t) {
		for _, slot := range []string{"staff", "tsa"} {
			out[name+" "+slot] = l.done(slot)
		}
	}
	return out
}
