package main

import (
	"context"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp/sysclock"
)

// A record that was acknowledged and is elsewhere in the journal, or nowhere, is a severe failure, and so are an internal error, a
// wrong answer and any error while nothing was broken; a refusal while something was broken is none.
func TestSoakLedger(t *testing.T) {
	t.Parallel()
	clock, err := sysclock.Open()
	if err != nil {
		t.Fatal(err)
	}
	s := &soak{bench: &bench{demo: &demo{dir: t.TempDir(), clock: clock}}, database: &benchServer{}}
	if s.made, err = os.Create(filepath.Join(s.dir, "acknowledged")); err != nil {
		t.Fatal(err)
	}
	defer s.made.Close()
	s.report.Classes = map[string]*loadTally{}
	for _, name := range loadNames {
		s.report.Classes[name] = &loadTally{}
	}

	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: filepath.Join(s.dir, "journal")})
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	j, err := audit.Open(t.Context(), audit.Config{Store: store, Node: "bench", Clock: constantClock{benchTime}, Log: log, Sealer: memoryMAC("bench")})
	if err != nil {
		t.Fatal(err)
	}
	run, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- j.Run(run) }()
	say := func(ref []byte, sequence uint64) {
		if err := s.acknowledge(&wire.SignResult{RecordID: hex.EncodeToString(ref), Sequence: sequence}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(5) {
		d := benchDraft([]byte("certificate"), []byte("chain"), []byte("crl"))
		d.Kind = evidence.KindSign
		in, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		switch i {
		case 1:
			say(d.Ref, in.Sequence+1) // elsewhere
		case 2:
			say(make([]byte, 32), in.Sequence) // another
		default:
			say(d.Ref, in.Sequence)
			say(d.Ref, in.Sequence) // asked for once more, and answered the same
		}
	}
	say(make([]byte, 32), 1<<40) // nowhere
	stop()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	all, err := s.records()
	if err != nil || len(all) != 6 {
		t.Fatalf("%d records, %v", len(all), err)
	}
	if err := s.find(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	if s.report.Found != 3 || len(s.report.Severe) != 3 {
		t.Errorf("found %d, severe %q", s.report.Found, s.report.Severe)
	}

	s.report.Severe = nil
	s.errs = map[string]map[string]int64{
		"disk full": {"disk_reserve": 7}, "machine killed": {"hsm_unavailable": 5, "internal": 1}, "": {noAnswer: 2}, "line to the database cut": {wrongAnswer: 1},
	}
	if err := s.finish(); err != errFound {
		t.Errorf("with severe failures: %v", err)
	}
	if got := strings.Join(s.report.Severe, "\n"); len(s.report.Severe) != 3 || strings.Contains(got, "disk_reserve") || strings.Contains(got, "hsm_unavailable") {
		t.Errorf("severe: %s", got)
	}
	s.report.Severe, s.errs = nil, map[string]map[string]int64{"disk full": {"disk_reserve": 7}}
	if err := s.finish(); err != nil {
		t.Errorf("with refusals alone: %v", err)
	}
	// A long run in which a fault never came, or could not, has not shown what it is for; a short one is not asked.
	s.report.Left, s.report.Events = []string{"disk full: needs root"}, []soakEvent{{Fault: "machine killed", Seen: "another process has its place"}}
	kinds := []soakFault{{name: "machine killed"}, {name: "database killed"}}
	s.long = time.Minute
	s.complete(kinds)
	if len(s.report.Severe) != 0 {
		t.Errorf("a short run: %q", s.report.Severe)
	}
	s.long = 10 * time.Minute
	s.complete(kinds)
	if got := strings.Join(s.report.Severe, "; "); got != "not injected: database killed: it never came; not injected: disk full: needs root" {
		t.Errorf("a long run: %s", got)
	}
	// The ledger says what grew.
	s.report.Points = []soakPoint{
		{At: 60, All: 100e6, RSS: 80e6, Parts: map[string]int64{partHeap: 30e6, partC: 50e6, "softtoken": 20e6}},
		{At: 590, All: 121e6, RSS: 100e6, Parts: map[string]int64{partHeap: 30e6, partC: 70e6, "softtoken": 21e6}},
	}
	s.ratio()
	if page := s.page(); s.report.RSSRatio != 1.21 || !strings.Contains(page, partC+" | 50.0 | 70.0 | +20.0 |") || !strings.Contains(page, "| all | 100.0 | 121.0 | +21.0 |") {
		t.Errorf("what grew: %v\n%s", s.report.RSSRatio, page)
	}
	s.report.RSSJudged, s.report.RSSRatio = true, 1.2
	if page := s.page(); !strings.Contains(page, "1.200 | ≤ 1.1 | **fails** |") {
		t.Errorf("memory that grew: %s", page)
	}
}

// Quantiles are within a hundredth of those of all values.
func TestHistogram(t *testing.T) {
	t.Parallel()
	var h histogram
	if h.quantile(0.5) != 0 {
		t.Error("a quantile of nothing")
	}
	for ms := 1; ms <= 1000; ms++ {
		h.add(time.Duration(ms) * time.Millisecond)
	}
	for q, want := range map[float64]float64{0.5: 500, 0.95: 950, 0.99: 990, 1: 1000} {
		if got := h.quantile(q); got < want*0.99 || got > want*1.011 {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
}
