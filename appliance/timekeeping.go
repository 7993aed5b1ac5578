package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/hsm/worker"
	"yinjian/ntp"
	"yinjian/ntp/ledger"
	"yinjian/ntp/source"
	"yinjian/tsa/stamping"
)

// Kinds of entries about time; kindTimeState is the clock's own.
const (
	kindTimeLedger     = "time.ledger"
	kindTimeDenied     = "time.source.denied"
	kindWorkerState    = "time.worker.state" // of a timestamp worker's clock
	kindSourceIntent   = "time.source/intent"
	kindSourceOutcome  = "time.source/outcome"
	kindReadmitIntent  = "time.readmit/intent"
	kindReadmitOutcome = "time.readmit/outcome"
)

const (
	ledgerEvery = time.Hour
	// changesKept bounds what waits for a journal that cannot be written: far more than a day of a clock that flutters.
	changesKept = 1000
	// maxTimeSources bounds the list: a round asks them all at once, and the ledger's entry has a line for each.
	maxTimeSources = 32
	// historyDays is how much of the journal one question may ask for.
	historyDays = 31
)

// A timekeeper journals what becomes of time: each change of the clock's state, in order, what the hours were like, sources
// that refuse us, and what administrators decide about sources. It also keeps the last rounds for whoever looks.
type timekeeper struct {
	a    *Appliance
	acts sync.Mutex // held during an administrator's act

	ledger *ledger.Ledger

	mu      sync.Mutex // guards what follows
	sources []*timeSource
	pending []timeChange
	lost    int // changes while too many waited
	denied  map[string]bool
	waiting []audit.Draft     // entries that want a sealed end
	workers map[string]string // timestamp workers' clocks by machine, as they were journalled
	tokens  ledger.Tokens     // as they were when the last hour ended
	wake    chan struct{}
}

// A timeChange waits to be journalled.
type timeChange struct {
	from, to ntp.State
	reason   string
	reading  ntp.Reading
	boot     time.Duration
}

func newTimekeeper(a *Appliance) *timekeeper {
	return &timekeeper{a: a, ledger: ledger.New(a.sys.Boot(), ntp.Cold), denied: map[string]bool{}, wake: make(chan struct{}, 1)}
}

// changed takes note of a change of the clock's state. It is called from whoever noticed, perhaps while appending, so it
// does not wait.
func (k *timekeeper) changed(from, to ntp.State, reason string, r ntp.Reading) {
	boot := k.a.sys.Boot()
	k.a.log.WithFields(logrus.Fields{"from": from, "to": to, "reason": reason, "bound_ms": r.Bound.Milliseconds()}).Info("time changed state")
	k.ledger.Changed(boot, to)
	k.mu.Lock()
	if len(k.pending) < changesKept {
		k.pending = append(k.pending, timeChange{from, to, reason, r, boot})
	} else {
		k.lost++
	}
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// observe takes note of a round.
func (k *timekeeper) observe(r ntp.Round, said []source.Status) {
	reading, boot := k.a.clock.Now(), k.a.sys.Boot()
	round := ledger.Round{Boot: boot, Reading: reading, Confirmed: r.Err == nil}
	groups := map[string]string{}
	for _, s := range k.TimeSources() {
		groups[s.Name] = s.Group
	}
	for _, s := range said {
		one := ledger.Said{Source: s.Source, Group: groups[s.Source], Measurement: s.Measurement, Reason: errorText(s.Err)}
		if m := s.Measurement; m.Source != "" && !reading.Time.IsZero() {
			one.Known, one.Offset = true, m.UTC.Sub(reading.Time.Add(m.Boot-boot))
		}
		one.Rejected = s.Err == nil && slices.Contains(r.Rejected, one.Group)
		round.Said = append(round.Said, one)
		if errors.Is(s.Err, source.ErrDenied) {
			k.deny(s.Source, errorText(s.Err))
		}
	}
	k.ledger.Add(round)
}

// deny has it journalled, once, that a source refuses us: it is not asked again.
func (k *timekeeper) deny(name, reason string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.denied[name] {
		k.denied[name] = true
		k.waiting = append(k.waiting, audit.Draft{
			Kind: kindTimeDenied, Actor: "time", Object: name, Fields: []audit.Field{{Name: "reason", Value: audit.Text(cutText(reason))}},
		})
	}
}

// watchWorkers has it journalled when the clock of a timestamp worker is in another state, or contradicts own time, as it was
// last told: once a second at most.
func (k *timekeeper) watchWorkers() {
	clocks, own := k.a.watch.Clocks(), k.a.clock.Now().Trusted() // without an own time there is nothing to contradict
	k.mu.Lock()
	defer k.mu.Unlock()
	seen := map[string]string{}
	for _, c := range clocks {
		now := string(c.Reading.State)
		if !own {
			c.Wrong = nil
		}
		if c.Wrong != nil {
			now += ", contradicts"
		}
		if was := k.workers[c.Machine]; was != now && len(k.waiting) < changesKept {
			k.waiting = append(k.waiting, audit.Draft{
				Kind: kindWorkerState, Actor: "time", Object: c.Machine,
				Fields: []audit.Field{{Name: "from", Value: audit.Text(was)}, {Name: "to", Value: audit.Text(now)}, {Name: "bound_us", Value: audit.Int(c.Reading.Bound.Microseconds())}, {Name: "contradicts", Value: audit.Text(cutText(errorText(c.Wrong)))}},
			})
		}
		seen[c.Machine] = now
	}
	k.workers = seen
}

// dayRef is the reference under which a day's entries of a kind are found, day being UTC. It is no more than an index.
func dayRef(kind string, day time.Time) []byte {
	sum := sm3.Sum([]byte("yinjian/time/day/v1\x00" + kind + "\x00" + day.UTC().Format(time.DateOnly)))
	return sum[:]
}

// day is the one under which an entry is filed. While the clock is cold it is the machine's own idea of the date.
func (k *timekeeper) day(at time.Time) time.Time {
	if at.IsZero() {
		return k.a.sys.Realtime()
	}
	return at
}

// run journals until ctx ends, and what is left then.
func (k *timekeeper) run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	hour := hourly{due: k.a.sys.Boot() + ledgerEvery}
	for {
		select {
		case <-k.wake:
		case <-tick.C:
			if boot := k.a.sys.Boot(); hour.ended(boot, k.a.clock.Now().Time) {
				k.closeHour(boot)
			}
			k.a.service.summarize(false)
			k.watchWorkers()
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			k.closeHour(k.a.sys.Boot())
			k.a.service.summarize(true)
			k.write(last)
			return nil
		}
		k.write(ctx)
	}
}

// An hourly says when an hour of the ledger ends: with that of UTC once the time is known, else an hour after it began.
type hourly struct {
	due     time.Duration // CLOCK_BOOTTIME
	aligned bool
}

// ended looks at the clocks, now being zero while there is no time. If the hour has ended, the next has begun.
func (h *hourly) ended(boot time.Duration, now time.Time) bool {
	if !h.aligned && !now.IsZero() {
		h.due, h.aligned = boot+untilHour(now), true
	}
	if boot < h.due {
		return false
	}
	h.due = boot + untilHour(now)
	return true
}

func untilHour(now time.Time) time.Duration {
	if now.IsZero() {
		return ledgerEvery
	}
	left := now.Truncate(ledgerEvery).Add(ledgerEvery).Sub(now)
	if left < time.Minute { // the clock was set back a little since: no hour of some seconds
		left += ledgerEvery
	}
	return left
}

// closeHour puts the hour that has ended among the entries that wait.
func (k *timekeeper) closeHour(boot time.Duration) {
	reading := k.a.clock.Now()
	h := k.ledger.Close(boot, reading)
	total := k.a.service.counts()
	k.mu.Lock()
	defer k.mu.Unlock()
	h.Tokens = ledger.Tokens{Issued: total.Issued - k.tokens.Issued, RefusedTime: total.RefusedTime - k.tokens.RefusedTime, RefusedOther: total.RefusedOther - k.tokens.RefusedOther}
	k.tokens = total
	body, err := json.Marshal(h)
	if err != nil {
		k.a.log.WithError(err).Error("the hour's ledger of time could not be written down")
		return
	}
	if len(k.waiting) >= changesKept { // the journal's end has not been sealed for weeks
		return
	}
	k.waiting = append(k.waiting, audit.Draft{
		Kind: kindTimeLedger, Actor: "time", Object: k.a.cfg.Node, Ref: dayRef(kindTimeLedger, k.day(h.To)),
		Fields: []audit.Field{
			{Name: "rounds", Value: audit.Int(h.Rounds)}, {Name: "confirmed", Value: audit.Int(h.Confirmed)}, {Name: "span_ms", Value: audit.Int(h.SpanMS)},
			{Name: "bound_max_us", Value: audit.Int(h.BoundMaxUS)},
			{Name: "tokens.issued", Value: audit.Int(h.Tokens.Issued)}, {Name: "tokens.refused_time", Value: audit.Int(h.Tokens.RefusedTime)},
		},
		Payloads: []audit.Attachment{{Name: "hour", MediaType: "application/json", Data: body}},
	})
}

// write journals what waits. What cannot be written now is tried again.
func (k *timekeeper) write(ctx context.Context) {
	for {
		k.mu.Lock()
		var d audit.Draft
		change := len(k.pending) > 0
		switch {
		case change:
			d = k.stateDraft(k.pending[0])
		case len(k.waiting) > 0:
			d = k.waiting[0]
		}
		k.mu.Unlock()
		// An entry over an end that is not sealed could keep the next start from happening, unless it is of a state.
		if d.Kind == "" || !change && k.a.journal.SealedTo() < k.a.journal.Size() {
			return
		}
		one, cancel := context.WithTimeout(ctx, 30*time.Second)
		_, err := k.a.journal.Append(one, d)
		cancel()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, audit.ErrClosed) {
				k.a.log.WithError(err).WithField("kind", d.Kind).Error("what became of time could not be journalled; it is tried again")
			}
			return
		}
		k.mu.Lock()
		if change {
			k.pending, k.lost = k.pending[1:], 0
		} else {
			k.waiting = k.waiting[1:]
		}
		k.mu.Unlock()
	}
}

func (k *timekeeper) stateDraft(c timeChange) audit.Draft {
	d := audit.Draft{
		Kind: kindTimeState, Actor: "time", Object: k.a.cfg.Node, Ref: dayRef(kindTimeState, k.day(c.reading.Time)),
		Fields: []audit.Field{
			{Name: "from", Value: audit.Text(c.from)}, {Name: "to", Value: audit.Text(c.to)}, {Name: "reason", Value: audit.Text(cutText(c.reason))},
			{Name: "boot_ns", Value: audit.Int(c.boot)}, {Name: "boot_id", Value: audit.Text(k.a.sys.BootID())},
		},
	}
	if !c.reading.Time.IsZero() {
		d.Fields = append(d.Fields, audit.Field{Name: "at", Value: audit.Text(c.reading.Time.Format(time.RFC3339Nano))}, audit.Field{Name: "bound_us", Value: audit.Int(c.reading.Bound.Microseconds())})
	}
	if k.lost > 0 {
		d.Fields = append(d.Fields, audit.Field{Name: "lost", Value: audit.Int(k.lost)})
	}
	return d
}

// A timeHistory is what the journal and the memory know of a time.
type timeHistory struct {
	From       time.Time       `json:"from"`
	To         time.Time       `json:"to"`
	AccuracyUS int64           `json:"accuracy_us"`
	Hours      []ledger.Hour   `json:"hours"`   // of the journal, and the present one
	Changes    []ledger.Change `json:"changes"` // of the journal
	Points     []ledger.Point  `json:"points"`  // of the memory: the last rounds
	// PointsFrom is since when every round is among Points; zero: there is none.
	PointsFrom time.Time `json:"points_from"`
}

// history answers what is known of from to to. Zero times: the last hours.
func (k *timekeeper) history(ctx context.Context, from, to time.Time) (*timeHistory, error) {
	reading, boot := k.a.clock.Now(), k.a.sys.Boot()
	if to.IsZero() {
		if to = reading.Time; to.IsZero() {
			to = k.a.sys.Realtime().UTC()
		}
	}
	if from.IsZero() {
		from = to.Add(-6 * time.Hour)
	}
	if !from.Before(to) || to.Sub(from) > historyDays*24*time.Hour {
		return nil, problem.Invalid("from", "须早于 to，至多 %d 天 (earlier than to, at most %d days)", historyDays, historyDays)
	}
	h := &timeHistory{From: from.UTC(), To: to.UTC(), AccuracyUS: time.Duration(k.a.cfg.Time.Accuracy).Microseconds(), Hours: []ledger.Hour{}, Points: []ledger.Point{}}
	if err := k.hours(ctx, from, to, func(one ledger.Hour) { h.Hours = append(h.Hours, one) }); err != nil {
		return nil, err
	}
	if now := k.ledger.Present(boot, reading); !now.To.IsZero() && now.From.Before(to) && now.To.After(from) {
		total := k.a.service.counts()
		k.mu.Lock()
		now.Tokens = ledger.Tokens{Issued: total.Issued - k.tokens.Issued, RefusedTime: total.RefusedTime - k.tokens.RefusedTime, RefusedOther: total.RefusedOther - k.tokens.RefusedOther}
		k.mu.Unlock()
		h.Hours = append(h.Hours, now)
	}
	var err error
	if h.Changes, err = k.changes(ctx, from, to); err != nil {
		return nil, err
	}
	points := k.ledger.Points(boot, reading)
	if len(points) > 0 {
		h.PointsFrom = points[0].At
	}
	for _, p := range points {
		if !p.At.Before(from) && !p.At.After(to) {
			h.Points = append(h.Points, p)
		}
	}
	return h, nil
}

// filed calls fn with the entries of a kind that are filed under the days from from to to, a day more at either end.
func (k *timekeeper) filed(ctx context.Context, kind string, from, to time.Time, fn func(*audit.Entry) error) error {
	const day = 24 * time.Hour
	for at := from.UTC().Truncate(day).Add(-day); !at.After(to.Add(day)); at = at.Add(day) {
		records, err := k.a.journal.ByRef(ctx, dayRef(kind, at))
		if errors.Is(err, audit.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		for i := range records {
			if records[i].Entry.Kind != kind {
				continue
			}
			if err := fn(&records[i].Entry); err != nil {
				return err
			}
		}
	}
	return nil
}

func (k *timekeeper) hours(ctx context.Context, from, to time.Time, fn func(ledger.Hour)) error {
	return k.filed(ctx, kindTimeLedger, from, to, func(e *audit.Entry) error {
		body, err := k.a.journal.Payload(ctx, e, "hour")
		if err != nil {
			return err
		}
		var h ledger.Hour
		if err := json.Unmarshal(body, &h); err != nil {
			return fmt.Errorf("entry %d: %w", e.Sequence, err)
		}
		if h.From.Before(to) && h.To.After(from) {
			fn(h)
		}
		return nil
	})
}

// changes are those of the clock's state from from to to, and the last one before. A change while the clock had no time
// is given one by a later change of the same boot, if there is any.
func (k *timekeeper) changes(ctx context.Context, from, to time.Time) ([]ledger.Change, error) {
	type stamped struct {
		ledger.Change
		bootID string
		boot   time.Duration
	}
	var all []stamped
	err := k.filed(ctx, kindTimeState, from, to, func(e *audit.Entry) error {
		c := stamped{Change: ledger.Change{From: ntp.State(e.Text("from")), To: ntp.State(e.Text("to")), Reason: e.Text("reason")}, bootID: e.Text("boot_id")}
		if ns, ok := e.Field("boot_ns").(audit.Int); ok {
			c.boot = time.Duration(ns)
		}
		if at, err := time.Parse(time.RFC3339Nano, e.Text("at")); err == nil {
			c.At = at
		}
		all = append(all, c)
		return nil
	})
	if err != nil {
		return nil, err
	}
	var next *stamped // the first after, with a time
	out := []ledger.Change{}
	for i := range slices.Backward(all) {
		c := &all[i]
		if c.At.IsZero() && next != nil && next.bootID == c.bootID {
			c.At = next.At.Add(c.boot - next.boot)
		}
		if !c.At.IsZero() {
			next = c
		}
	}
	for _, c := range all {
		switch {
		case c.At.IsZero() || c.At.After(to):
		case c.At.Before(from) && len(out) > 0: // only the last before from
			out[0] = c.Change
		default:
			out = append(out, c.Change)
		}
	}
	return out, nil
}

// A timeReport is the answer of `yinjian time status`.
type timeReport struct {
	State      ntp.State `json:"state"`
	Time       string    `json:"time,omitempty"` // UTC
	BoundUS    int64     `json:"bound_us"`
	Provenance string    `json:"provenance"`
	AccuracyUS int64     `json:"accuracy_us"` // beyond it nothing is stamped
	// LeftS is how long time stays trusted if no source agreed any more.
	LeftS       int64            `json:"left_s"`
	MinSources  int              `json:"min_sources"`
	DriftPPM    int              `json:"drift_ppm"`
	HoldoverS   int64            `json:"holdover_max_s"`
	Round       roundReport      `json:"round"`
	Workers     []workerTime     `json:"workers"` // the clocks of the timestamp workers
	Sources     []sourceReport   `json:"sources"`
	Changes     []ledger.Change  `json:"changes"` // the last ten of two days
	Stamping    []stampingReport `json:"stamping"`
	Evaluation  bool             `json:"simulated"` // the simulated feed is among the sources
	PendingNote string           `json:"note,omitempty"`
}

type roundReport struct {
	AgoS     float64  `json:"ago_s"`
	Agreed   []string `json:"agreed"`   // groups
	Rejected []string `json:"rejected"` // groups outvoted
	OffsetUS int64    `json:"offset_us"`
	Error    string   `json:"error,omitempty"`
}

type sourceReport struct {
	Name         string  `json:"name"`
	Group        string  `json:"group"`
	Address      string  `json:"address"`
	Added        bool    `json:"added"` // while the appliance ran
	Auth         string  `json:"authentication,omitempty"`
	State        string  `json:"state"` // agreed, rejected, candidate, unfit, silent, denied, waiting
	Reason       string  `json:"reason,omitempty"`
	OffsetUS     int64   `json:"offset_us"` // its time less own time
	DistanceUS   int64   `json:"root_distance_us"`
	RTTUS        int64   `json:"rtt_us"`
	Stratum      uint8   `json:"stratum"`
	Leap         int     `json:"leap"`
	RefID        string  `json:"refid"`
	ReferenceAge float64 `json:"reference_age_s"`
}

// States of a source in a report.
const (
	sourceAgreed    = "agreed"
	sourceRejected  = "rejected"
	sourceCandidate = "candidate" // there was no majority
	sourceUnfit     = "unfit"
	sourceSilent    = "silent"
	sourceDenied    = "denied"
	sourceWaiting   = "waiting" // not asked yet
)

func (k *timekeeper) sourceReports(r ntp.Round, reading ntp.Reading, boot time.Duration) []sourceReport {
	said := map[string]source.Status{}
	for _, s := range k.a.poller.Status() {
		said[s.Source] = s
	}
	out := []sourceReport{}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.sources {
		line := sourceReport{Name: s.Name, Group: s.Group, Address: s.Address, Added: s.added, Auth: s.KeyType}
		status, asked := said[s.Name]
		m := status.Measurement
		if m.Source != "" {
			line.DistanceUS, line.RTTUS, line.Stratum, line.Leap = m.RootDistance.Microseconds(), m.RTT.Microseconds(), m.Stratum, int(m.Leap)
			line.RefID, line.ReferenceAge = printable(m.RefID), m.ReferenceAge.Round(time.Millisecond).Seconds()
			if !reading.Time.IsZero() {
				line.OffsetUS = m.UTC.Sub(reading.Time.Add(m.Boot - boot)).Microseconds()
			}
		}
		line.Reason = printable(errorText(status.Err))
		switch {
		case !asked:
			line.State = sourceWaiting
		case errors.Is(status.Err, source.ErrDenied):
			line.State = sourceDenied
		case errors.Is(status.Err, ntp.ErrUnfit):
			line.State = sourceUnfit
		case status.Err != nil:
			line.State = sourceSilent
		case slices.Contains(r.Agreed, s.Group):
			line.State = sourceAgreed
		case slices.Contains(r.Rejected, s.Group):
			line.State = sourceRejected
		default:
			line.State = sourceCandidate
		}
		out = append(out, line)
	}
	return out
}

// printable makes what a server said fit for a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if problem.Misleads(r) {
			return '?'
		}
		return r
	}, cutText(s))
}

func (d admin) TimeStatus(ctx context.Context, _ string) (any, error) {
	k := d.a.time
	reading, boot, round := d.a.clock.Now(), d.a.sys.Boot(), d.a.clock.Last()
	t := d.a.cfg.Time
	out := &timeReport{
		State: reading.State, BoundUS: reading.Bound.Microseconds(), Provenance: reading.Provenance, AccuracyUS: time.Duration(t.Accuracy).Microseconds(),
		LeftS: int64(d.a.clock.Left().Seconds()), MinSources: t.MinSources, DriftPPM: t.DriftPPM, HoldoverS: int64(time.Duration(t.HoldoverMax).Seconds()),
		Round:      roundReport{Agreed: append([]string{}, round.Agreed...), Rejected: append([]string{}, round.Rejected...), OffsetUS: round.Offset.Microseconds(), Error: printable(errorText(round.Err))},
		Sources:    k.sourceReports(round, reading, boot),
		Stamping:   d.a.service.report(),
		Workers:    d.a.workerTimes(),
		Evaluation: d.a.cfg.Evaluation.GNSSFeed,
	}
	if round.At > 0 {
		out.Round.AgoS = (boot - round.At).Round(time.Millisecond).Seconds()
	}
	at := reading.Time
	if at.IsZero() {
		at = d.a.sys.Realtime()
	} else {
		out.Time = at.Format(time.RFC3339Nano)
	}
	var err error
	if out.Changes, err = k.changes(ctx, at.Add(-48*time.Hour), at.Add(time.Second)); err != nil {
		return nil, err
	}
	out.Changes = out.Changes[max(0, len(out.Changes)-10):]
	if errors.Is(round.Err, ntp.ErrOperator) {
		out.PendingNote = "多数源的时间超出自行恢复的范围，须两人核对后执行 yinjian time readmit (the majority waits for two persons to confirm it)"
	}
	return out, nil
}

func (d admin) TimeHistory(ctx context.Context, _ string, req api.TimeHistory) (any, error) {
	var from, to time.Time
	for _, f := range []struct {
		name, text string
		at         *time.Time
	}{{"from", req.From, &from}, {"to", req.To, &to}} {
		if f.text == "" {
			continue
		}
		at, err := time.Parse(time.RFC3339, f.text)
		if err != nil {
			return nil, problem.Invalid(f.name, "须为 RFC 3339 时间 (want a time as in RFC 3339)")
		}
		*f.at = at
	}
	return d.a.time.history(ctx, from, to)
}

// readmitWait is how long a readmission waits for the timestamp workers' clocks to see what the appliance's own sees.
const readmitWait = 10 * time.Second

// readmitWorkers readmits the clocks of the timestamp workers that are not trusted, and answers of how many. One where no
// majority waits is waited for.
func (k *timekeeper) readmitWorkers(ctx context.Context) (int, error) {
	n, end := 0, k.a.sys.Boot()+readmitWait
	for _, c := range k.a.machines.all() {
		w := c.workers[hsm.TSA]
		if w == nil || w.State().Phase != worker.Ready {
			continue // its clock is another when it comes back
		}
		for {
			if err := k.a.watch.Look(ctx, c.Name, w); err != nil {
				return n, err
			}
			i := slices.IndexFunc(k.a.watch.Clocks(), func(o stamping.WorkerClock) bool { return o.Machine == c.Name })
			if i >= 0 && k.a.watch.Clocks()[i].Reading.Trusted() {
				break
			}
			err := k.a.watch.Readmit(ctx, c.Name, w)
			if err == nil {
				n++
				break
			}
			if !errors.Is(err, stamping.ErrNotReadmitted) || k.a.sys.Boot() > end {
				return n, err
			}
			select {
			case <-time.After(200 * time.Millisecond):
			case <-ctx.Done():
				return n, context.Cause(ctx)
			}
		}
	}
	return n, nil
}

// ReadmitTime lets in the majority that is beyond what a clock corrects by itself: the appliance's, and those of the
// timestamp workers, which ask the sources themselves.
func (d admin) ReadmitTime(ctx context.Context, actor string, req wire.ReadmitTime) (any, error) {
	k := d.a.time
	k.acts.Lock()
	defer k.acts.Unlock()
	if req.Persons[0] == req.Persons[1] {
		return nil, problem.Invalid("persons", "须为不同的两人 (two different persons)")
	}
	round, own := d.a.clock.Last(), d.a.clock.Now()
	waits := round.Err != nil && errors.Is(round.Err, ntp.ErrOperator)
	if workers := d.a.watch.Ready(time.Duration(d.a.cfg.Time.Accuracy)); !waits && (workers == nil || !own.Trusted()) {
		return nil, problem.New(problem.NotReady, "没有等待核准的时间 (no majority waits to be readmitted)", "见 yinjian time status (see yinjian time status)")
	}
	intent, err := k.intend(ctx, audit.Draft{
		Kind: kindReadmitIntent, Actor: actor, Object: d.a.cfg.Node, State: true,
		Fields: []audit.Field{
			{Name: "reason", Value: audit.Text(req.Reason)}, {Name: "persons", Value: audit.Text(strings.Join(req.Persons, "、"))},
			{Name: "offset_us", Value: audit.Int(round.Offset.Microseconds())}, {Name: "groups", Value: audit.Text(cutText(strings.Join(round.Agreed, "+")))},
		},
	})
	if err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx) // what was begun is finished and told
	workers, err := k.readmitWorkers(ctx)
	if err == nil && waits {
		err = d.a.clock.Readmit()
	}
	result := fmt.Sprintf("done: the next agreeing round is taken, by the appliance %v, by timestamp workers %d", waits, workers)
	if err != nil {
		result = cutText("refused: " + err.Error())
		err = problem.New(problem.NotReady, "多数源已改变或消失，或时间戳进程尚未见到，没有全部执行 (the majority has changed or gone, or a timestamp worker has not seen it)",
			"见 yinjian time status；仍在等待核准的，再执行一次 (see yinjian time status; do it again where one still waits)").With(err)
	}
	changed, cerr := audit.Changed(map[string]any{"state": own.State, "offset_us": round.Offset.Microseconds()}, map[string]any{"state": d.a.clock.Now().State, "result": result})
	changed = append(changed, audit.Field{Name: "reason", Value: audit.Text(req.Reason)})
	if oerr := errors.Join(cerr, k.conclude(ctx, kindReadmitOutcome, actor, d.a.cfg.Node, intent, result, changed...)); oerr != nil {
		return nil, journalRefused(errors.Join(err, oerr))
	}
	if err != nil {
		return nil, err
	}
	return d.TimeStatus(ctx, actor)
}
