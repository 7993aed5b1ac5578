package appliance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"yinjian/api"
	"yinjian/api/notify"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/hsm/pool"
	"yinjian/ntp"
	"yinjian/tsa/stamping"
)

// Kinds of entries about alarms.
const (
	kindAlarmRaised  = "alarm.raised"
	kindAlarmCleared = "alarm.cleared"
	// FieldDrill of such an entry names the drill that brought the alarm about.
	FieldDrill = "drill"
)

// An alarms is the one place where alarms come from: once a second it looks at what the parts show of themselves, and what
// is new it journals, logs and offers to the receivers. It takes no part in signing, and nothing waits for it.
type alarms struct {
	a         *Appliance
	receivers []*notify.Receiver
	born      time.Time // when the journal began; zero: not known yet

	mu      sync.Mutex // guards what follows
	tracker alarm.Tracker

	waiting []audit.Draft // the running goroutine's
	lost    int           // of these, beyond changesKept
}

func newAlarms(a *Appliance) (*alarms, error) {
	r, err := a.receivers()
	if err != nil {
		return nil, err
	}
	return &alarms{a: a, receivers: r, tracker: alarm.Tracker{Raise: time.Duration(a.cfg.Alarms.RaiseAfter), Clear: time.Duration(a.cfg.Alarms.ClearAfter)}}, nil
}

// run looks until ctx ends.
func (l *alarms) run(ctx context.Context) error {
	g, sctx := errgroup.WithContext(ctx)
	for _, r := range l.receivers {
		g.Go(func() error { return r.Run(sctx) })
	}
	g.Go(func() error {
		hours := serviceHours{a: l.a}
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				l.look()
				hours.look(sctx)
				l.write(sctx)
			case <-ctx.Done():
				last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
				defer cancel()
				hours.end(last)
				l.write(last)
				return nil
			}
		}
	})
	return g.Wait()
}

// look tells of what is new.
func (l *alarms) look() {
	found := l.conditions()
	for i := range found {
		found[i].Drill = l.a.drills.explains(found[i])
	}
	l.mu.Lock()
	events := l.tracker.Look(l.a.sys.Boot(), found)
	l.mu.Unlock()
	for _, e := range events {
		log := l.a.log.WithFields(logrus.Fields{"alarm": e.Code, "object": e.Object, "severity": e.Severity.String()})
		if e.Event == alarm.Cleared {
			log.Info("an alarm is over")
		} else {
			log.WithField("detail", e.Detail).Warning("an alarm was raised")
		}
		l.tell(e)
		l.note(e)
	}
}

// message is an event as it leaves the appliance.
func (l *alarms) message(e alarm.Event) notify.Message {
	now := apiClock{l.a}.Now()
	m := alarm.Meanings[e.Code]
	title := m.Title
	if e.Event == alarm.Cleared {
		title = "恢复 (over)：" + title
	}
	if e.Drill != "" {
		title = "演练 (a drill)：" + title
	}
	return notify.Message{Event: e, Node: l.a.cfg.Node, Campus: l.a.cfg.Campus, At: now.Time.UTC(), Trusted: now.Trusted(), Title: title, Next: m.Next}
}

func (l *alarms) tell(e alarm.Event) {
	m := l.message(e)
	for _, r := range l.receivers {
		r.Offer(m)
	}
}

// note puts an event among the entries that wait.
func (l *alarms) note(e alarm.Event) {
	if len(l.waiting) >= changesKept {
		l.lost++
		return
	}
	kind := kindAlarmRaised
	if e.Event == alarm.Cleared {
		kind = kindAlarmCleared
	}
	fields := []audit.Field{
		{Name: "id", Value: audit.Text(e.ID)}, {Name: "code", Value: audit.Text(e.Code)}, {Name: "severity", Value: audit.Text(e.Severity.String())},
		{Name: "detail", Value: audit.Text(printable(e.Detail))},
	}
	if e.Drill != "" {
		fields = append(fields, audit.Field{Name: FieldDrill, Value: audit.Text(e.Drill)})
	}
	if l.lost > 0 {
		fields = append(fields, audit.Field{Name: "lost", Value: audit.Int(l.lost)})
		l.lost = 0
	}
	day := l.a.time.day(l.a.clock.Now().Time)
	l.waiting = append(l.waiting, audit.Draft{Kind: kind, Actor: "appliance", Object: printable(e.Object), Ref: dayRef(FiledAlarms, day), Fields: fields})
}

// write journals what waits. What cannot be written now is tried again; an entry over an end that is not sealed could keep
// the next start from happening.
func (l *alarms) write(ctx context.Context) {
	for len(l.waiting) > 0 && l.a.journal.SealedTo() >= l.a.journal.Size() {
		if _, err := l.a.journal.Append(ctx, l.waiting[0]); err != nil {
			if ctx.Err() == nil && !errors.Is(err, audit.ErrClosed) {
				l.a.log.WithError(err).Error("an alarm could not be journalled; it is tried again")
			}
			return
		}
		l.waiting = l.waiting[1:]
	}
}

// coldFor is how long a start may take to find the time before that is an alarm.
const coldFor = time.Minute

// conditions are what is wrong now, as the parts show it.
func (l *alarms) conditions() []alarm.Condition {
	a := l.a
	var out []alarm.Condition
	add := func(code alarm.Code, object, format string, args ...any) {
		out = append(out, alarm.Condition{Code: code, Object: object, Detail: fmt.Sprintf(format, args...)})
	}
	r := a.clock.Now()
	starting := r.State == ntp.Cold && a.sys.Boot()-a.started < coldFor
	if ready, reasons := (health{a}).Ready(); !ready && !starting {
		add(alarm.SigningStopped, "", "%s", strings.Join(reasons, "；"))
	}
	if (!r.Trusted() || r.Bound > time.Duration(a.cfg.Time.Accuracy)) && !starting {
		add(alarm.TimeUntrusted, "", "状态 %s，误差上限 %d ms (state, bound)", r.State, r.Bound.Milliseconds())
	}
	out = append(out, l.ofWorkers(r)...)
	for _, m := range a.machines.states() {
		if m.State != string(pool.Up) && m.State != string(pool.Draining) {
			add(alarm.MachineAway, m.Name, "%s：%s", m.State, m.Reason)
		}
	}
	out = append(out, l.ofJournal()...)
	out = append(out, l.ofDatabase()...)
	if p := a.peers.state(); p != nil {
		switch {
		case p.Split != "":
			add(alarm.SplitView, p.Node, "%s", p.Split)
		case p.Accused != "":
			add(alarm.SplitView, p.Node, "另一院区不认可本机日志 (the other campus does not recognise this journal): %s", p.Accused)
		case p.AgeS > p.MaxS:
			out = append(out, alarm.Condition{Code: alarm.PeerAway, Object: p.Node, Severity: alarm.Severe, Detail: fmt.Sprintf("目录副本已 %.0f s，超过 peer.max_age，拒绝签名 (signing is refused)", p.AgeS)})
		case !p.Up && p.Heard != "":
			add(alarm.PeerAway, p.Node, "%s", p.Error)
		}
	}
	if n := a.directoryState().Frozen; n > 0 {
		add(alarm.DirectoryFrozen, "", "%d 个对象已冻结 (objects are frozen)", n)
	}
	out = append(out, l.ofTrust(r)...)
	for signer, applications := range a.directory.LockedPINs() {
		add(alarm.PINLocked, signer, "应用 (applications) %s", strings.Join(applications, "、"))
	}
	for _, address := range a.server.Pressed() {
		add(alarm.LoginLocked, address, "来自该地址的身份验证失败过多，暂不受理 (nobody is let in from there for the moment)")
	}
	for _, x := range a.directory.Administrators() {
		if a.directory.ViewAdministrator(x).Locked {
			add(alarm.LoginLocked, "admin:"+x.ID, "管理员登录失败过多，已锁定 (an administrator's login is locked)")
		}
	}
	for _, index := range a.images.all() {
		add(alarm.ImageLeft, strconv.FormatUint(index, 10), "映像 %d 三次没有证明自己可用，运行的是原来的映像 (did not prove itself)", index)
	}
	if why, left := a.house.settings.leftWhy(); left {
		add(alarm.SettingsLeft, "", "%s", why)
	}
	if a.device != nil {
		if err := a.device.Down(); err != nil {
			add(alarm.UpstreamAway, a.device.Name(), "%s", reasonOf(err))
		}
	}
	return out
}

// ofWorkers is about the timestamp workers' clocks.
func (l *alarms) ofWorkers(r ntp.Reading) (out []alarm.Condition) {
	for _, k := range l.a.contradicting(r) {
		out = append(out, alarm.Condition{Code: alarm.TimeWorker, Object: k.Machine, Detail: k.Wrong.Error()})
	}
	return out
}

// contradicting are the timestamp workers' clocks that cannot be right if own is. Without an own time there is nothing to contradict.
func (a *Appliance) contradicting(own ntp.Reading) []stamping.WorkerClock {
	if !own.Trusted() {
		return nil
	}
	return slices.DeleteFunc(a.watch.Clocks(), func(k stamping.WorkerClock) bool { return k.Wrong == nil })
}

func (l *alarms) ofJournal() (out []alarm.Condition) {
	a := l.a
	if err := a.journal.Failed(); err != nil {
		out = append(out, alarm.Condition{Code: alarm.JournalFailed})
	}
	if size, sealed := a.journal.Size(), a.journal.SealedTo(); size > sealed {
		out = append(out, alarm.Condition{Code: alarm.JournalUnsealed, Detail: fmt.Sprintf("%d 条 (entries)", size-sealed)})
	}
	var fs syscall.Statfs_t
	free, err := a.journal.FreeBytes()
	switch {
	case err != nil:
	case free < a.cfg.Policy.ReserveBytes:
		out = append(out, alarm.Condition{Code: alarm.DiskReserve, Detail: fmt.Sprintf("余 %d MiB，保留 %d MiB (free, reserve)", free>>20, a.cfg.Policy.ReserveBytes>>20)})
	case syscall.Statfs(a.dir, &fs) == nil && fs.Blocks > 0 && fs.Bavail*100/fs.Blocks < uint64(a.cfg.Policy.TSAReservePercent):
		out = append(out, alarm.Condition{Code: alarm.DiskLow, Detail: fmt.Sprintf("余 %d %%，低于 policy.tsa_reserve_percent (free)", fs.Bavail*100/fs.Blocks)})
	}
	if n := a.accounting.status().Alarms; n > 0 {
		out = append(out, alarm.Condition{Code: alarm.UnaccountedUse, Detail: fmt.Sprintf("累计 %d 项 (in all)", n)})
	}
	return out
}

func (l *alarms) ofDatabase() (out []alarm.Condition) {
	a := l.a
	p := a.projection.status()
	a.backups.mu.Lock()
	revived := a.backups.revived
	a.backups.mu.Unlock()
	a.projection.mu.Lock()
	found := a.projection.found
	a.projection.mu.Unlock()
	switch {
	case p.Fork:
		out = append(out, alarm.Condition{Code: alarm.Fork, Object: "database", Detail: p.Error})
	case p.Error != "":
		out = append(out, alarm.Condition{Code: alarm.DatabaseAway, Detail: p.Error})
	case p.Lag > uint64(a.cfg.Alarms.Lag) && p.Rebuild == nil:
		out = append(out, alarm.Condition{Code: alarm.DatabaseLag, Detail: fmt.Sprintf("落后 %d 条 (entries behind)", p.Lag)})
	}
	if revived != "" {
		out = append(out, alarm.Condition{Code: alarm.Fork, Object: "epoch " + revived, Detail: "恢复之前的设备还在运行 (the appliance of before the restore runs)"})
	}
	if found > 0 {
		out = append(out, alarm.Condition{Code: alarm.DatabaseChanged, Detail: fmt.Sprintf("%d 处 (differences)", found)})
	}
	if l.born.IsZero() {
		if first, err := a.journal.Entry(context.Background(), 0); err == nil {
			l.born = first.Entry.Time.UTC()
		}
	}
	return append(out, l.ofBackups(a.clock.Now())...)
}

// ofBackups is about the age of the last backup, or of the appliance.
func (l *alarms) ofBackups(now ntp.Reading) (out []alarm.Condition) {
	a := l.a
	if !now.Trusted() {
		return nil
	}
	a.backups.mu.Lock()
	last, made := a.backups.last, a.backups.custodians != nil
	a.backups.mu.Unlock()
	since, what := l.born, "从未备份 (never made)"
	if last != nil {
		since, what = last.At.UTC(), "上次 (the last) "+last.At.UTC().In(audit.Beijing).Format(time.DateTime)
	}
	if !made {
		what += "，还没有备份保管人 (there are no custodians)"
	}
	// A journal that began before the time was known says 1970.
	if age := now.Time.Sub(since); since.Year() > 2000 && age > time.Duration(a.cfg.Alarms.BackupMaxAge) {
		out = append(out, alarm.Condition{Code: alarm.BackupOverdue, Detail: what})
	}
	return out
}

// ofTrust is about certificates and lists.
func (l *alarms) ofTrust(r ntp.Reading) (out []alarm.Condition) {
	a := l.a
	staff := 0
	var first account.CertificateLine
	if soon := a.soon.Load(); soon != nil {
		for _, c := range *soon {
			if c.DaysLeft >= a.cfg.Alarms.CertificateDays {
				continue
			}
			if c.Use == account.UseStaff {
				if staff++; staff == 1 {
					first = c
				}
				continue
			}
			one := alarm.Condition{Code: alarm.CertificateDue, Object: c.Owner + "/" + c.Algorithm, Detail: ends(c)}
			if c.DaysLeft < 7 {
				one.Severity = alarm.Severe
			}
			out = append(out, one)
		}
	}
	if staff > 0 {
		out = append(out, alarm.Condition{Code: alarm.CertificateDue, Object: "signers", Detail: fmt.Sprintf("签名人证书 %d 张，最早 %s %s (certificates of signers, the first)", staff, first.Owner, ends(first))})
	}
	if !r.Trusted() {
		return out
	}
	for _, line := range a.directory.ListCRLs() {
		left := line.NextUpdate.Sub(r.Time)
		switch {
		case left < 0:
			out = append(out, alarm.Condition{Code: alarm.ListDue, Object: line.Issuer, Severity: alarm.Severe, Detail: "已过期 (has ended) " + line.NextUpdate.Format(time.RFC3339)})
		case left*10 < line.NextUpdate.Sub(line.ThisUpdate):
			out = append(out, alarm.Condition{Code: alarm.ListDue, Object: line.Issuer, Detail: "将于 (ends) " + line.NextUpdate.Format(time.RFC3339)})
		}
	}
	return out
}

// An alarmLine is an alarm that was raised and is not over.
type alarmLine struct {
	alarm.Active
	Title string `json:"title"`
	Next  string `json:"next"`
	ForS  int64  `json:"for_s"`
}

// An alarmState is the answer of `yinjian alarm list`.
type alarmState struct {
	Active    []alarmLine    `json:"active"`
	Receivers []notify.State `json:"receivers"`
}

func (l *alarms) state() alarmState {
	s := alarmState{Active: []alarmLine{}, Receivers: []notify.State{}}
	boot := l.a.sys.Boot()
	l.mu.Lock()
	for _, one := range l.tracker.Active() {
		m := alarm.Meanings[one.Code]
		s.Active = append(s.Active, alarmLine{one, m.Title, m.Next, int64((boot - one.Since).Seconds())})
	}
	l.mu.Unlock()
	for _, r := range l.receivers {
		s.Receivers = append(s.Receivers, r.State())
	}
	return s
}

// ListAlarms satisfies api.Admin.
func (d admin) ListAlarms(context.Context, string) (any, error) { return d.a.alarms.state(), nil }

// testWithin is how long a test of the receivers may take.
const testWithin = 8 * time.Second

// TestAlarms satisfies api.Admin: every receiver is sent one message, and what came of it is told.
func (d admin) TestAlarms(ctx context.Context, actor string, _ api.TestAlarms) (any, error) {
	l := d.a.alarms
	if len(l.receivers) == 0 {
		return nil, problem.New(problem.NotFound, "没有配置告警接收方 (no receiver of alarms is configured)", "在 config.toml 写 [[alarms.syslog]] 或 [[alarms.webhook]]，见 docs/alarms.md (configure one)")
	}
	ctx, cancel := context.WithTimeout(ctx, testWithin)
	defer cancel()
	m := l.message(alarm.NewTest("由 " + printable(actor) + " 发出 (sent by an administrator)"))
	out := wire.TestedAlarms{ID: m.ID, Receivers: make([]wire.TestedReceiver, len(l.receivers)), Passed: true}
	var g sync.WaitGroup
	for i, r := range l.receivers {
		g.Go(func() {
			err := r.Try(ctx, m)
			out.Receivers[i] = wire.TestedReceiver{Name: r.State().Name, Sent: err == nil, Error: errorText(err)}
		})
	}
	g.Wait()
	out.Passed = !slices.ContainsFunc(out.Receivers, func(r wire.TestedReceiver) bool { return !r.Sent })
	return out, nil
}
