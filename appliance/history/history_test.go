package history_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/history"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/ntp"
)

var source = history.Source{System: "oldsign", Name: "旧电子签名平台", File: "records.csv", FileSM3: [32]byte{1, 2, 3}}

// some are n records, every third with a signature that nobody can read.
func some(n int) []history.Record {
	all := make([]history.Record, n)
	for i := range all {
		all[i] = history.Record{Line: int64(i + 2), HistoryRecord: evidence.HistoryRecord{
			ID: fmt.Sprintf("R%03d", i), SignedAt: "2019-03-04T05:06:07+08:00", Signer: "D001", SignerName: "张三", Department: "心内科", Campus: "本部",
			DocumentID: "ZY-1", DocumentType: "出院记录", DigestAlgorithm: "SM3", Digest: strings.Repeat("ab", 32),
		}}
		if i%3 == 0 {
			all[i].Signature, all[i].SignatureForm = []byte("an older signature"), evidence.HistoryOpaque
		}
	}
	return all
}

func words(all []history.Result) (out []string) {
	for _, r := range all {
		out = append(out, r.Result)
	}
	return out
}

func repeated(word string, n int) []string { return slices.Repeat([]string{word}, n) }

// Each is imported once, in whatever batches and however often; what is different is named and not taken.
func TestImport(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	s := history.New(history.Config{Journal: h.Journal, Clock: h.Clock})
	load := func(all []history.Record, trial bool) []history.Result {
		t.Helper()
		r, err := s.Import(t.Context(), "admin", source, all, trial)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	size := h.Journal.Size()
	if got := words(load(some(40), true)); !slices.Equal(got, repeated(history.ResultNew, 40)) || h.Journal.Size() != size {
		t.Errorf("a trial: %v, %d entries", got, h.Journal.Size()-size)
	}
	if got := words(load(some(20), false)); !slices.Equal(got, repeated(history.ResultImported, 20)) {
		t.Errorf("some: %v", got)
	}
	want := append(repeated(history.ResultPresent, 20), repeated(history.ResultImported, 20)...)
	if got := words(load(some(40), false)); !slices.Equal(got, want) || h.Journal.Size() != size+40 {
		t.Errorf("all: %v, %d entries", got, h.Journal.Size()-size)
	}
	changed := some(4)
	changed[0].Signature = []byte("another")
	changed[1].Signer, changed[1].Role = "D002", "护士"
	changed[2].Signature, changed[2].SignatureForm = []byte("x"), evidence.HistoryOpaque
	changed[3].Line = 99 // where it stands is no part of it
	got := load(changed, false)
	if !slices.Equal(words(got), []string{history.ResultDiffers, history.ResultDiffers, history.ResultDiffers, history.ResultPresent}) || h.Journal.Size() != size+40 {
		t.Errorf("changed: %+v", got)
	}
	if d := []history.Difference{{"role", "", "护士"}, {"signer", "D001", "D002"}}; cmp.Diff(d, got[1].Differences) != "" {
		t.Errorf("differences: %+v", got[1].Differences)
	}
	if err := s.Close(t.Context(), "admin", source, history.Totals{Read: 44, Imported: 20, Present: 21, Differs: 3}); err != nil {
		t.Error(err)
	}
	if err := s.Close(t.Context(), "admin", source, history.Totals{Read: 44, Imported: 20}); problem.CodeOf(err) != problem.InvalidRequest {
		t.Errorf("totals that do not add up: %v", err)
	}
	// The same number in another system is another record.
	other := source
	other.System = "older"
	r, err := s.Import(t.Context(), "admin", other, some(1), false)
	if err != nil || r[0].Result != history.ResultImported {
		t.Errorf("another system: %+v, %v", r, err)
	}
	ref, _ := hex.DecodeString(got[3].RecordID)
	found, err := h.Journal.ByRef(t.Context(), ref)
	if err != nil || len(found) != 1 {
		t.Fatalf("%d entries, %v", len(found), err)
	}
	if row := audit.Project(found[0]); row.Kind != "history.imported" || row.Status != audit.StatusImported || row.Application != "history/oldsign" || row.Signer != "D001" {
		t.Errorf("projected as %+v", row)
	}
}

func TestImportRefuses(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	s := history.New(history.Config{Journal: h.Journal, Clock: h.Clock})
	spoils := []func(*history.Record){
		func(r *history.Record) { r.ID = "" },
		func(r *history.Record) { r.ID = "R\x00" },
		func(r *history.Record) { r.ID = "R000" }, // as the first
		func(r *history.Record) { r.SignedAt = "yesterday" },
		func(r *history.Record) { r.SignedAt = "1970-01-01T00:00:00Z" },
		func(r *history.Record) {
			r.SignedAt = testkit.Start.AddDate(0, 0, 2).Format("2006-01-02T15:04:05Z07:00")
		},
		func(r *history.Record) { r.Signer = "张\u202e三" },
		func(r *history.Record) { r.DocumentID = strings.Repeat("x", 257) },
		func(r *history.Record) { r.Digest = "abcd" },
		func(r *history.Record) { r.Digest = strings.Repeat("AB", 32) },
		func(r *history.Record) { r.DigestAlgorithm = "CRC32" },
		func(r *history.Record) { r.Signature, r.SignatureForm = []byte("no CMS"), evidence.HistoryCMS },
		func(r *history.Record) { r.Signature, r.SignatureForm = []byte("x"), "seal" },
		func(r *history.Record) { r.Signature, r.SignatureForm = nil, evidence.HistoryCMS },
		func(r *history.Record) {
			r.Signature, r.SignatureForm = make([]byte, history.MaxSignature+1), evidence.HistoryOpaque
		},
	}
	all := some(len(spoils) + 2)
	for i, spoil := range spoils {
		spoil(&all[i+1])
	}
	for _, trial := range []bool{true, false} {
		got, err := s.Import(t.Context(), "admin", source, all, trial)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range got {
			if good := i == 0 || i == len(all)-1; good != (r.Result != history.ResultRefused) || !good && problem.CodeOf(r.Err) != problem.InvalidRequest {
				t.Errorf("trial %v, record %d: %+v", trial, i, r)
			}
		}
	}
	for name, src := range map[string]history.Source{"system": {System: "A/b", Name: "n", File: "f"}, "name": {System: "old", File: "f"}, "file": {System: "old", Name: "n"}} {
		if _, err := s.Import(t.Context(), "admin", src, some(1), false); problem.CodeOf(err) != problem.InvalidRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Import(t.Context(), "admin", source, some(history.MaxRecords+1), false); problem.CodeOf(err) != problem.InvalidRequest {
		t.Errorf("too many: %v", err)
	}
	h.Clock.State(ntp.Untrusted)
	if _, err := s.Import(t.Context(), "admin", source, some(1), false); problem.CodeOf(err) != problem.TimeUntrusted {
		t.Errorf("without trusted time: %v", err)
	}
}

// Whether an entry landed whose answer was lost or not: the next call has each once.
func TestImportFaults(t *testing.T) {
	t.Parallel()
	for name, landed := range map[string]bool{"not written": false, "written, answer lost": true} {
		h := testkit.New(t)
		s := history.New(history.Config{Journal: h.Journal, Clock: h.Clock})
		size := h.Journal.Size()
		h.Journal.FailKind(audit.KindImported, 7, landed, audit.ErrOutcomeUnknown)
		first, err := s.Import(t.Context(), "admin", source, some(30), false)
		if n := strings.Count(strings.Join(words(first), ","), history.ResultNotTried); err != nil || n != 7 {
			t.Fatalf("%s: %d not tried, %v", name, n, err)
		}
		h.Journal.Fault(nil)
		second, err := s.Import(t.Context(), "admin", source, some(30), false)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range second {
			want := history.ResultPresent
			if first[i].Result == history.ResultNotTried && !landed {
				want = history.ResultImported
			}
			if r.Result != want {
				t.Errorf("%s, record %d: %+v, want %s", name, i, r, want)
			}
		}
		if n := h.Journal.Size() - size; n != 30 {
			t.Errorf("%s: %d entries", name, n)
		}
	}
}

// The file about a record never says valid, and says of each change to it that it was changed. A signature of this
// appliance that is imported stays what an import is.
func TestExport(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	s := history.New(history.Config{Journal: h.Journal, Clock: h.Clock})
	app := h.App("his", nil)
	h.Doctor("D001", "SM2")
	q := testkit.Request("one", "D001")
	q.Form = "cms"
	signed := h.Sign(app, q)
	r := some(1)
	r[0].Signature, r[0].SignatureForm = signed.Signature, evidence.HistoryCMS
	if got, err := s.Import(t.Context(), "admin", source, r, false); err != nil || got[0].Result != history.ResultImported {
		t.Fatalf("%+v, %v", got, err)
	}
	data, err := s.Export(t.Context(), "oldsign", "R000")
	if err != nil {
		t.Fatal(err)
	}
	file, err := evidence.ParseHistory(data)
	if err != nil || !evidence.IsHistory(data) {
		t.Fatal(err)
	}
	trust := h.Trust
	report := evidence.VerifyHistory(file, trust, evidence.Input{})
	if report.Verdict != pki.Indeterminate || !slices.Contains(report.Missing, evidence.CheckImported) || !strings.Contains(report.Statements[0], "not verified by this appliance") {
		t.Errorf("%+v", report)
	}
	at := slices.IndexFunc(report.Checks, func(c pki.Check) bool { return c.ID == "history.signature.cms.signature" })
	if at < 0 || report.Checks[at].Status != pki.Passed {
		t.Errorf("the older signature by itself: %+v", report.Checks)
	}
	if _, err := evidence.Parse(data); err == nil {
		t.Error("it is read as evidence of a signature")
	}
	for name, spoil := range map[string]func(*evidence.History){
		"record id":    func(f *evidence.History) { f.RecordID = strings.Repeat("0", 64) },
		"statement":    func(f *evidence.History) { f.Statement = "verified" },
		"record":       func(f *evidence.History) { f.Record = []byte(strings.Replace(string(f.Record), "张三", "李四", 1)) },
		"signature":    func(f *evidence.History) { f.Signature = append(slices.Clone(f.Signature), 0) },
		"no signature": func(f *evidence.History) { f.Signature = nil },
		"sequence":     func(f *evidence.History) { f.Journal.Sequence++ },
		"leaf": func(f *evidence.History) {
			e, _ := audit.ParseEntry(f.Journal.Leaf)
			for i := range e.Fields {
				if e.Fields[i].Name == "source.id" {
					e.Fields[i].Value = audit.Text("R001")
				}
			}
			f.Journal.Leaf, _ = e.Marshal()
		},
		"checkpoint": func(f *evidence.History) { f.Journal.CheckpointSignature = make([]byte, 70) },
	} {
		b, _ := json.Marshal(file)
		var other evidence.History
		if err := json.Unmarshal(b, &other); err != nil {
			t.Fatal(err)
		}
		spoil(&other)
		if r := evidence.VerifyHistory(&other, trust, evidence.Input{}); r.Verdict != pki.Invalid {
			t.Errorf("%s: %s", name, r.Verdict)
		}
	}
	_, err = s.Export(t.Context(), "oldsign", "none")
	if problem.CodeOf(err) != problem.NotFound {
		t.Errorf("no such record: %v", err)
	}
	// An entry of another kind is no imported record, and an imported one no signature.
	ref, _ := hex.DecodeString(signed.RecordID)
	found, err := h.Journal.ByRef(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := evidence.BuildHistory(t.Context(), h.Journal, found[0]); err == nil {
		t.Error("a signature's entry is taken for an imported record")
	}
}
