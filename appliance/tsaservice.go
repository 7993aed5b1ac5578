package appliance

import (
	"context"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/ntp/ledger"
	"yinjian/tsa"
)

// Kinds of entries about the stamping service.
const (
	kindStampService = "tsa.service" // an administrator stopped or started units; the entry is the act
	kindStampRefused = "tsa.refused" // how many requests a unit refused within a minute, and why
)

// A stampService says which timestamp units are stopped, and counts what they answer.
type stampService struct {
	a *Appliance

	issued, refusedTime, refusedOther atomic.Uint64

	acts    sync.Mutex   // held during an administrator's act
	writes  sync.RWMutex // held to write while an act is journalled and obeyed, to read while a token is journalled
	stopped atomic.Pointer[map[string]stoppedUnit]

	mu       sync.Mutex // guards what follows
	refused  map[refusalKey]*refusals
	reckoned time.Duration // CLOCK_BOOTTIME when refused was journalled last
}

type stoppedUnit struct{ by, reason, at string }

type refusalKey struct{ unit, reason string }

type refusals struct {
	count     int
	requester string // the last
	first     time.Time
	last      time.Time
}

const refusedEvery = time.Minute

func newStampService(a *Appliance) *stampService {
	s := &stampService{a: a, refused: map[refusalKey]*refusals{}}
	s.stopped.Store(&map[string]stoppedUnit{})
	return s
}

// replay takes over from the journal which units are stopped.
func (s *stampService) replay(ctx context.Context) error {
	stopped := map[string]stoppedUnit{}
	err := s.a.journal.State(ctx, func(r audit.Record) error {
		if r.Entry.Kind == kindStampService {
			apply(stopped, &r.Entry)
		}
		return nil
	})
	s.stopped.Store(&stopped)
	return err
}

func apply(stopped map[string]stoppedUnit, e *audit.Entry) {
	for _, unit := range strings.Split(e.Text("units"), ",") {
		if e.Text("act") == "start" {
			delete(stopped, unit)
			continue
		}
		stopped[unit] = stoppedUnit{by: e.Actor, reason: e.Text("reason"), at: e.Time.UTC().Format(time.RFC3339)}
	}
}

// ready refuses for a unit that is stopped.
func (s *stampService) ready(unit string) error {
	if _, is := (*s.stopped.Load())[unit]; !is {
		return nil
	}
	return problem.New(problem.NotReady, fmt.Sprintf("时间戳单元 %s 已由管理员停止 (the timestamp unit was stopped by an administrator)", unit), "请管理员执行 yinjian tsa start (an administrator starts it with yinjian tsa start)")
}

// respond is a unit's Respond behind the service: it refuses for a unit that is stopped, and counts.
func (s *stampService) respond(unit, requester string, next func() []byte) []byte {
	if s.ready(unit) != nil {
		s.refuse(unit, requester, "stopped")
		return tsa.Reject(tsa.SystemFailure, "时间戳服务已由管理员停止 (the time-stamping service was stopped by an administrator)")
	}
	reply := next()
	if granted(reply) {
		s.issued.Add(1)
		return reply
	}
	reason := "unreadable"
	if resp, err := tsa.ParseResponse(reply); err == nil && len(resp.Failures) > 0 {
		reason = resp.Failures[0].String()
	}
	s.refuse(unit, requester, reason)
	return reply
}

// A gatedRecorder journals tokens of a unit that is not stopped: one that was under way when an administrator stopped it goes to
// nobody, so that no entry of a token stands behind that of the decision.
type gatedRecorder struct {
	service *stampService
	next    TokenRecorder
}

// RecordToken satisfies tsa.Recorder.
func (g gatedRecorder) RecordToken(ctx context.Context, t *tsa.Token) error {
	g.service.writes.RLock()
	defer g.service.writes.RUnlock()
	if err := g.service.ready(g.next.Unit); err != nil {
		return err
	}
	return g.next.RecordToken(ctx, t)
}

// granted looks at the status of a DER TimeStampResp and no further.
func granted(reply []byte) bool {
	s := cryptobyte.String(reply)
	var resp, info cryptobyte.String
	var status int
	return s.ReadASN1(&resp, der.SEQUENCE) && resp.ReadASN1(&info, der.SEQUENCE) && info.ReadASN1Integer(&status) && status <= tsa.StatusGrantedWithMods
}

func (s *stampService) refuse(unit, requester, reason string) {
	if reason == tsa.TimeNotAvailable.String() {
		s.refusedTime.Add(1)
	} else {
		s.refusedOther.Add(1)
	}
	now := s.a.clock.Now().Time
	s.mu.Lock()
	defer s.mu.Unlock()
	key := refusalKey{unit, reason} // of few units and nine reasons
	r := s.refused[key]
	if r == nil {
		r = &refusals{first: now}
		s.refused[key] = r
	}
	r.count++
	r.requester, r.last = requester, now
}

// counts are of this start.
func (s *stampService) counts() ledger.Tokens {
	return ledger.Tokens{Issued: s.issued.Load(), RefusedTime: s.refusedTime.Load(), RefusedOther: s.refusedOther.Load()}
}

// summarize puts what was refused among the entries that wait, at most once a minute.
func (s *stampService) summarize(final bool) {
	boot := s.a.sys.Boot()
	s.mu.Lock()
	if len(s.refused) == 0 || !final && boot-s.reckoned < refusedEvery {
		s.mu.Unlock()
		return
	}
	refused := s.refused
	s.refused, s.reckoned = map[refusalKey]*refusals{}, boot
	s.mu.Unlock()
	var drafts []audit.Draft
	for key, r := range refused {
		d := audit.Draft{
			Kind: kindStampRefused, Actor: "tsa", Object: "unit/" + key.unit,
			Fields: []audit.Field{{Name: "reason", Value: audit.Text(key.reason)}, {Name: "count", Value: audit.Int(r.count)}, {Name: "last_requester", Value: audit.Text(cutText(r.requester))}},
		}
		if !r.first.IsZero() {
			d.Fields = append(d.Fields, audit.Field{Name: "first", Value: audit.Text(r.first.Format(time.RFC3339Nano))}, audit.Field{Name: "last", Value: audit.Text(r.last.Format(time.RFC3339Nano))})
		}
		drafts = append(drafts, d)
	}
	k := s.a.time
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.waiting) < changesKept { // the counts stay in the hour's ledger
		k.waiting = append(k.waiting, drafts...)
	}
}

// A gatedUnit is a unit behind the service, for signatures and checkpoints.
type gatedUnit struct {
	service *stampService
	name    string
	unit    sign.Stamper
}

// Ready refuses when the unit is stopped, or knows that it would issue nothing. Package sign asks before anything is signed.
func (g gatedUnit) Ready() error {
	if err := g.service.ready(g.name); err != nil {
		return err
	}
	if f, ok := g.unit.(sign.Foreteller); ok {
		return f.Ready()
	}
	return nil
}

// Chain satisfies sign.Stamper.
func (g gatedUnit) Chain() []*smx509.Certificate { return g.unit.Chain() }

// Issue satisfies sign.Stamper.
func (g gatedUnit) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	if err := g.service.ready(g.name); err != nil {
		return nil, err
	}
	t, err := g.unit.Issue(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := g.service.ready(g.name); err != nil { // meanwhile
		g.service.a.accounting.discard(err, t.DER)
		return nil, err
	}
	g.service.issued.Add(1)
	return t, nil
}

// A stampingReport is one unit.
type stampingReport struct {
	Unit    string `json:"unit"`
	State   string `json:"state"` // "running", "stopped", "unable"
	Reason  string `json:"reason,omitempty"`
	By      string `json:"changed_by,omitempty"`
	At      string `json:"changed_at,omitempty"`
	Policy  string `json:"policy,omitempty"`
	Expires string `json:"not_after,omitempty"`
}

func (s *stampService) report() []stampingReport {
	stopped := *s.stopped.Load()
	unable := health{s.a}.stoppedUnits()
	out := []stampingReport{}
	for _, name := range slices.Sorted(maps.Keys(s.a.units)) {
		line := stampingReport{Unit: name, State: "running", Policy: s.a.units[name].terms.Policy.String()}
		if chain := s.a.units[name].Chain(); len(chain) > 0 {
			line.Expires = chain[0].NotAfter.UTC().Format(time.RFC3339)
		}
		if o, is := stopped[name]; is {
			line.State, line.Reason, line.By, line.At = "stopped", o.reason, o.by, o.at
		} else if err := unable[name]; err != nil {
			line.State, line.Reason = "unable", errorText(err)
		}
		out = append(out, line)
	}
	return out
}

func (d admin) StampStatus(context.Context, string) (any, error) {
	return map[string]any{"units": d.a.service.report(), "tokens": d.a.service.counts()}, nil
}

func (d admin) StopStamping(ctx context.Context, actor string, req api.StampService) (any, error) {
	return d.a.service.change(ctx, actor, "stop", req)
}

func (d admin) StartStamping(ctx context.Context, actor string, req api.StampService) (any, error) {
	return d.a.service.change(ctx, actor, "start", req)
}

// change journals an administrator's decision and obeys it. The entry comes first: what it says holds from the next start
// on, whatever becomes of this process.
func (s *stampService) change(ctx context.Context, actor, act string, req api.StampService) (any, error) {
	s.acts.Lock()
	defer s.acts.Unlock()
	units := slices.Sorted(maps.Keys(s.a.units))
	if req.Unit != "" {
		if !slices.Contains(units, req.Unit) {
			return nil, problem.New(problem.NotFound, "没有这个时间戳单元 (no such timestamp unit)", "见 yinjian tsa status (see yinjian tsa status)")
		}
		units = []string{req.Unit}
	}
	if err := s.decide(ctx, actor, act, req.Reason, units); err != nil {
		return nil, err
	}
	return admin{s.a}.StampStatus(ctx, actor)
}

func (s *stampService) decide(ctx context.Context, actor, act, reason string, units []string) error {
	s.writes.Lock()
	defer s.writes.Unlock()
	before, after := map[string]any{}, map[string]any{}
	for _, unit := range units {
		before[unit] = "serving"
		if _, is := (*s.stopped.Load())[unit]; is {
			before[unit] = "stopped"
		}
		after[unit] = map[string]string{"stop": "stopped", "start": "serving"}[act]
	}
	changed, err := audit.Changed(before, after)
	if err != nil {
		return err
	}
	receipt, err := s.a.journal.Append(ctx, audit.Draft{
		Kind: kindStampService, Actor: actor, Object: s.a.cfg.Node, State: true,
		Fields: append(changed, audit.Field{Name: "act", Value: audit.Text(act)}, audit.Field{Name: "units", Value: audit.Text(strings.Join(units, ","))},
			audit.Field{Name: "reason", Value: audit.Text(reason)}),
	})
	if err != nil {
		return journalRefused(err)
	}
	stopped := maps.Clone(*s.stopped.Load())
	apply(stopped, &receipt.Entry)
	s.stopped.Store(&stopped)
	return nil
}

// A stampLine is a line of `yinjian tsa log`.
type stampLine struct {
	Sequence  uint64 `json:"sequence"`
	Time      string `json:"time"` // the entry's
	Kind      string `json:"kind"` // "token", "refused", "stop", "start"
	Unit      string `json:"unit"`
	Requester string `json:"requester,omitempty"`
	Serial    string `json:"serial,omitempty"`
	BoundUS   int64  `json:"bound_us,omitempty"`
	Reason    string `json:"reason,omitempty"`
	Count     int64  `json:"count,omitempty"`
}

const (
	stampLines = 20      // where no number is asked for
	stampScan  = 200_000 // entries that are looked through at most
)

// StampLog answers the last tokens, refusals and decisions about the service, newest first.
func (d admin) StampLog(ctx context.Context, _ string, req api.StampLog) (any, error) {
	n := req.Lines
	if n == 0 {
		n = stampLines
	}
	size := d.a.journal.Size()
	lines := []stampLine{}
	for end, window := size, uint64(1000); end > 0 && len(lines) < n && size-end < stampScan; window *= 4 {
		from := end - min(end, window)
		var part []stampLine
		err := audit.Scan(ctx, d.a.store, from, end, func(r audit.Record) error {
			if l, ok := stampLineOf(&r.Entry); ok {
				part = append(part, l)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		slices.Reverse(part)
		lines, end = append(lines, part...), from
	}
	return lines[:min(n, len(lines))], nil
}

func stampLineOf(e *audit.Entry) (stampLine, bool) {
	l := stampLine{Sequence: e.Sequence, Time: e.Time.UTC().Format(time.RFC3339Nano), Unit: strings.TrimPrefix(e.Object, "unit/")}
	switch e.Kind {
	case kindToken:
		l.Kind, l.Requester = "token", e.Actor
		if serial, ok := e.Field("serial").(audit.Octets); ok {
			l.Serial = hex.EncodeToString(serial)
		}
		if bound, ok := e.Field("time.bound_us").(audit.Int); ok {
			l.BoundUS = int64(bound)
		}
	case kindStampRefused:
		l.Kind, l.Requester, l.Reason = "refused", e.Text("last_requester"), e.Text("reason")
		if count, ok := e.Field("count").(audit.Int); ok {
			l.Count = int64(count)
		}
	case kindStampService:
		l.Kind, l.Unit, l.Requester, l.Reason = e.Text("act"), e.Text("units"), e.Actor, e.Text("reason")
	default:
		return l, false
	}
	return l, true
}
