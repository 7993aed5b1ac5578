// Package history takes in the records of older systems: each becomes an entry of its own kind, a statement of what was read
// and from where, that claims nothing else. One is known by the older system's name and its own number there, which are
// the entry's reference, so that reading the same file again adds nothing. Refusals are [*problem.Problem].
package history

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/sync/errgroup"

	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/ntp"
)

// KindTotals is the journal's kind of the entry that sums up a run of an import.
const KindTotals = "history.totals"

// Limits.
const (
	MaxRecords   = 256     // of one call
	MaxSignature = 1 << 20 // bytes

	maxText = 256
	maxID   = 128
	maxSkew = 24 * time.Hour // by which an older system's clock may be ahead of ours
	atOnce  = 64             // entries that wait for the journal together
)

// A Journal keeps the entries. *audit.Journal is one.
type Journal interface {
	Append(ctx context.Context, d audit.Draft) (audit.Receipt, error)
	ByRef(ctx context.Context, ref []byte) ([]audit.Record, error)
	evidence.Source
}

// Config is what the service works with.
type Config struct {
	Journal Journal
	Clock   interface{ Now() ntp.Reading }
}

// A Service imports. Safe for concurrent use.
type Service struct{ cfg Config }

// New makes a service.
func New(cfg Config) *Service { return &Service{cfg} }

// A Source is the file that records are read from, and the system that wrote it.
type Source struct {
	System  string   // [a-z0-9-]{2,32}
	Name    string   // for people
	File    string   // its name, without folders
	FileSM3 [32]byte // of the whole file as it came
}

// A Record is one row of a file.
type Record struct {
	evidence.HistoryRecord
	Signature []byte
	Line      int64 // where it stands in the file
}

// Results of a record.
const (
	ResultNew      = "new"       // a trial: it would be imported
	ResultImported = "imported"  // now
	ResultPresent  = "present"   // imported before, the same
	ResultDiffers  = "differs"   // imported before, otherwise; what is there stays
	ResultRefused  = "refused"   //
	ResultNotTried = "not tried" // something failed; try again
)

// A Result is what became of a record.
type Result struct {
	RecordID    string // hex, the entry's reference
	Result      string
	Differences []Difference // with ResultDiffers
	Err         error        // with ResultRefused and ResultNotTried
}

// A Difference is a field of which the journal and the file say different things.
type Difference struct{ Field, Have, Want string }

// RecordID is SM3("yinjian/history/v1" ‖ 0x00 ‖ system ‖ 0x00 ‖ id). No application's record has it, for no application's
// name has a stroke in it.
func RecordID(system, id string) [32]byte {
	return sm3.Sum([]byte("yinjian/history/v1\x00" + system + "\x00" + id))
}

var (
	reSystem = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,31}$`)
	digests  = map[string]int{"SM3": 32, "SHA-256": 32, "SHA-1": 20, "MD5": 16, "SHA-512": 64}
)

func (src *Source) check() error {
	if !reSystem.MatchString(src.System) {
		return problem.Invalid("system", "来源系统标识须为 2–32 位小写字母、数字或连字符 (lower-case letters, digits and hyphens, 2 to 32)")
	}
	for field, v := range map[string]string{"name": src.Name, "file": src.File} {
		if err := problem.CheckText(field, v, maxText); err != nil {
			return err
		}
	}
	return nil
}

// check judges one record by itself.
func (s *Service) check(r *Record, now time.Time) error {
	if err := problem.CheckText("id", r.ID, maxID); err != nil {
		return err
	}
	at, err := time.Parse(time.RFC3339, r.SignedAt)
	switch {
	case err != nil:
		return problem.Invalid("signed_at", "不是 RFC 3339 时刻 (not a time of RFC 3339)")
	case at.Year() < 1990:
		return problem.Invalid("signed_at", "早于 1990 年 (before 1990)")
	case at.After(now.Add(maxSkew)):
		return problem.Invalid("signed_at", "在将来 (in the future)")
	}
	for _, f := range []struct{ name, value string }{
		{"signer", r.Signer}, {"signer_name", r.SignerName}, {"role", r.Role}, {"department", r.Department}, {"campus", r.Campus}, {"application", r.Application},
		{"document_id", r.DocumentID}, {"document_type", r.DocumentType}, {"media_type", r.MediaType},
	} {
		if f.value == "" {
			continue
		}
		if err := problem.CheckText(f.name, f.value, maxText); err != nil {
			return err
		}
	}
	if size, known := digests[r.DigestAlgorithm]; r.Digest != "" || r.DigestAlgorithm != "" {
		b, err := hex.DecodeString(r.Digest)
		switch {
		case !known:
			return problem.Invalid("digest_algorithm", "须为 SM3、SHA-256、SHA-512、SHA-1 或 MD5 (must be one of these)")
		case err != nil || len(b) != size || strings.ToLower(r.Digest) != r.Digest:
			return problem.Invalid("digest", "%s 摘要须为 %d 字节，小写十六进制 (lower-case hexadecimal)", r.DigestAlgorithm, size)
		}
	}
	switch {
	case len(r.Signature) == 0 && r.SignatureForm != "":
		return problem.Invalid("signature", "有签名格式而没有签名 (a form, and no signature)")
	case len(r.Signature) == 0:
	case len(r.Signature) > MaxSignature:
		return problem.Invalid("signature", "签名 %d 字节，至多 %d (too long)", len(r.Signature), MaxSignature)
	case r.SignatureForm == evidence.HistoryCMS:
		if _, err := cms.Parse(r.Signature); err != nil {
			return problem.Invalid("signature", "不是 CMS（PKCS#7 签名）：%v；映射中可写 form = \"opaque\" 只作保存 (not a CMS; with form opaque it is kept and not read)", err)
		}
	case r.SignatureForm != evidence.HistoryOpaque:
		return problem.Invalid("signature_form", "须为 cms 或 opaque (must be cms or opaque)")
	}
	return nil
}

// Import takes in up to [MaxRecords] records, and answers for each what became of it. With trial nothing is written. Call it
// again with what was not tried, or with all: each is imported once.
func (s *Service) Import(ctx context.Context, actor string, src Source, records []Record, trial bool) ([]Result, error) {
	if err := src.check(); err != nil {
		return nil, err
	}
	if n := len(records); n < 1 || n > MaxRecords {
		return nil, problem.Invalid("records", "须为 1–%d 条 (1 to %d)", MaxRecords, MaxRecords)
	}
	now := s.cfg.Clock.Now()
	if !now.Trusted() { // every verdict says on which day it was imported
		return nil, problem.New(problem.TimeUntrusted, "时间不可信，导入的日期无从确定 (time is not trusted; the import could not be dated)", "待时间恢复可信后重试 (try again when time is trusted)")
	}
	results := make([]Result, len(records))
	first := map[string]int{} // by id
	var g errgroup.Group      // together: the journal writes what waits together
	g.SetLimit(atOnce)
	for i := range records {
		r := &records[i]
		ref := RecordID(src.System, r.ID)
		results[i].RecordID = hex.EncodeToString(ref[:])
		err := s.check(r, now.Time)
		if j, twice := first[r.ID]; err == nil && twice {
			err = problem.Invalid("id", "与第 %d 行的编号相同 (another record has this id)", records[j].Line)
		}
		if err != nil {
			results[i].Result, results[i].Err = ResultRefused, err
			continue
		}
		first[r.ID] = i
		g.Go(func() error {
			results[i].Result, results[i].Differences, results[i].Err = s.one(ctx, actor, src, r, ref[:], trial)
			return nil
		})
	}
	_ = g.Wait() // each has its own error
	return results, nil
}

func (s *Service) one(ctx context.Context, actor string, src Source, r *Record, ref []byte, trial bool) (string, []Difference, error) {
	body, err := json.Marshal(r.HistoryRecord)
	if err != nil {
		return ResultNotTried, nil, err
	}
	there, err := s.cfg.Journal.ByRef(ctx, ref)
	switch {
	case err == nil:
		return s.compare(ctx, &there[0].Entry, r, body)
	case !errors.Is(err, audit.ErrNotFound):
		return ResultNotTried, nil, journalProblem(err)
	case trial:
		return ResultNew, nil, nil
	}
	d := audit.Draft{
		Kind: audit.KindImported, Actor: actor, Object: "history/" + src.System, Ref: ref, Unique: true,
		Fields: []audit.Field{
			{Name: "source.system", Value: audit.Text(src.System)},
			{Name: "source.name", Value: audit.Text(src.Name)},
			{Name: "source.file", Value: audit.Text(src.File)},
			{Name: "source.file.sm3", Value: audit.Octets(src.FileSM3[:])},
			{Name: "source.line", Value: audit.Int(r.Line)},
			{Name: "source.id", Value: audit.Text(r.ID)},
			{Name: "signed_at", Value: audit.Text(r.SignedAt)},
			{Name: "verdict", Value: audit.Text("imported, not verified by this appliance")},
			// What the central database has columns for. No application has a stroke in its name.
			{Name: audit.FieldApplication, Value: audit.Text("history/" + src.System)},
			{Name: audit.FieldSigner, Value: audit.Text(r.Signer)},
			{Name: audit.FieldDepartment, Value: audit.Text(r.Department)},
			{Name: audit.FieldDocumentType, Value: audit.Text(r.DocumentType)},
			{Name: audit.FieldCampus, Value: audit.Text(r.Campus)},
		},
		Payloads: []audit.Attachment{{Name: "record", MediaType: "application/json", Data: body}},
	}
	if len(r.Signature) > 0 {
		media := map[bool]string{true: "application/cms", false: "application/octet-stream"}[r.SignatureForm == evidence.HistoryCMS]
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "signature", MediaType: media, Data: r.Signature})
	}
	_, err = s.cfg.Journal.Append(ctx, d)
	switch {
	case err == nil:
		return ResultImported, nil, nil
	case errors.Is(err, audit.ErrDuplicateRef): // another import at the same time, or one whose answer was lost
		if there, err = s.cfg.Journal.ByRef(ctx, ref); err == nil {
			return s.compare(ctx, &there[0].Entry, r, body)
		}
	}
	return ResultNotTried, nil, journalProblem(err)
}

// compare names what is different in a record that is there.
func (s *Service) compare(ctx context.Context, e *audit.Entry, r *Record, body []byte) (string, []Difference, error) {
	var out []Difference
	if p, _ := e.Payload("record"); p.SM3 != audit.Sum(body) {
		stored, err := s.cfg.Journal.Payload(ctx, e, "record")
		if err != nil {
			return ResultNotTried, nil, journalProblem(err)
		}
		var have, want map[string]string
		if err := errors.Join(json.Unmarshal(stored, &have), json.Unmarshal(body, &want)); err != nil {
			return ResultNotTried, nil, fmt.Errorf("history: entry %d: %w", e.Sequence, err)
		}
		for name := range want {
			if have[name] == "" {
				have[name] = ""
			}
		}
		for name := range have {
			if have[name] != want[name] {
				out = append(out, Difference{name, have[name], want[name]})
			}
		}
	}
	p, had := e.Payload("signature")
	if sum := audit.Sum(r.Signature); had != (len(r.Signature) > 0) || had && p.SM3 != sum {
		d := Difference{Field: "signature"}
		if had {
			d.Have = "SM3 " + p.SM3.String()
		}
		if len(r.Signature) > 0 {
			d.Want = "SM3 " + sum.String()
		}
		out = append(out, d)
	}
	if len(out) == 0 {
		return ResultPresent, nil, nil
	}
	slices.SortFunc(out, func(a, b Difference) int { return strings.Compare(a.Field, b.Field) })
	return ResultDiffers, out, nil
}

// Totals are the counts of one run over a file, as the command that read it has them. Each record's entry names file and
// line, so that they can be counted again.
type Totals struct {
	MappingSM3                                         [32]byte
	Read, Imported, Present, Differs, Refused, Pending int64
}

// Close journals the totals of a run.
func (s *Service) Close(ctx context.Context, actor string, src Source, t Totals) error {
	if err := src.check(); err != nil {
		return err
	}
	if least := min(t.Read, t.Imported, t.Present, t.Differs, t.Refused, t.Pending); least < 0 || t.Imported+t.Present+t.Differs+t.Refused+t.Pending != t.Read {
		return problem.Invalid("totals", "各项之和与读入数不符 (they do not add up)")
	}
	_, err := s.cfg.Journal.Append(ctx, audit.Draft{
		Kind: KindTotals, Actor: actor, Object: "history/" + src.System, Fields: []audit.Field{
			{Name: "source.system", Value: audit.Text(src.System)}, {Name: "source.name", Value: audit.Text(src.Name)},
			{Name: "source.file", Value: audit.Text(src.File)}, {Name: "source.file.sm3", Value: audit.Octets(src.FileSM3[:])},
			{Name: "mapping.sm3", Value: audit.Octets(t.MappingSM3[:])},
			{Name: "count.read", Value: audit.Int(t.Read)}, {Name: "count.imported", Value: audit.Int(t.Imported)}, {Name: "count.present", Value: audit.Int(t.Present)},
			{Name: "count.differs", Value: audit.Int(t.Differs)}, {Name: "count.refused", Value: audit.Int(t.Refused)}, {Name: "count.not_tried", Value: audit.Int(t.Pending)},
		},
	})
	if err != nil {
		return journalProblem(err)
	}
	return nil
}

// Export answers the file about an imported record ([evidence.History]), by the older system's name and number.
func (s *Service) Export(ctx context.Context, system, id string) ([]byte, error) {
	ref := RecordID(system, id)
	found, err := s.cfg.Journal.ByRef(ctx, ref[:])
	if errors.Is(err, audit.ErrNotFound) {
		return nil, problem.New(problem.NotFound, "没有导入过这条记录 (no such record was imported)", "核对来源系统标识与编号 (check the system's name and the record's number)")
	}
	if err != nil {
		return nil, journalProblem(err)
	}
	h, err := evidence.BuildHistory(ctx, s.cfg.Journal, found[0])
	if errors.Is(err, audit.ErrNoCheckpoint) {
		return nil, problem.New(problem.NotReady, "覆盖该记录的日志检查点尚未签署 (no signed checkpoint covers the record yet)", "稍后重试 (try again in a few seconds)").With(err)
	}
	if err != nil {
		return nil, journalProblem(err)
	}
	return h.Encode()
}

// journalProblem makes a refusal of an error of the journal.
func journalProblem(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, audit.ErrOutcomeUnknown):
		return problem.New(problem.Timeout, "未能在时限内确认落盘，结果未知 (the record could not be confirmed in time)", "再导入一次，已有的不会重复 (import again; nothing is imported twice)").With(err)
	case errors.Is(err, audit.ErrInvalidDraft):
		return problem.Invalid("record", "有字段超出记录格式的限制 (a field is outside the limits of the record)").With(err)
	}
	return problem.New(problem.JournalUnwritable, "日志无法读写 (the journal cannot be read or written)", "请管理员检查存储，再导入一次 (ask an administrator, then import again)").With(err)
}
