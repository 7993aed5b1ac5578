package appliance

import (
	"context"
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/problem"
	"yinjian/dbdriver/central"
	"yinjian/hsm"
)

// Kinds of entries about drills. What a drill's test accounts do is journalled as everybody's.
const (
	kindDrillBegun  = "drill.begun"
	kindDrillBroken = "drill.broken"
	kindDrillEnded  = "drill.ended"
)

const (
	// drillLife is how long a drill may take beside its break. One that nobody ends is ended then.
	drillLife = 15 * time.Minute
	// drillSettles is how long after its break an alarm may still be the drill's.
	drillSettles = 30 * time.Second
	// drillAgain is the time between two attempts to end a drill that nobody ends.
	drillAgain = 5 * time.Second
)

// errDrilled is why something does not work that a drill has broken.
var errDrilled = errors.New("演练断开 (broken by a drill)")

// drillExplains are the alarms that each drill brings about.
var drillExplains = map[string][]alarm.Code{
	wire.DrillHSM:    {alarm.MachineAway, alarm.SigningStopped, alarm.TimeWorker, alarm.JournalUnsealed, alarm.DatabaseAway, alarm.DatabaseLag}, // rows have MACs of its keys
	wire.DrillDB:     {alarm.DatabaseAway, alarm.DatabaseLag},
	wire.DrillTime:   {alarm.TimeUntrusted, alarm.SigningStopped, alarm.TimeWorker},
	wire.DrillCampus: {alarm.PeerAway},
	wire.DrillCA:     {alarm.ListDue},
}

// drills are the one drill that may be under way. What it breaks is broken in this process's memory alone, for a time that
// was consented to, so that neither a drill that hangs nor a killed process leaves anything broken. Its application, signer and
// anchor are in the directory, marked as tests; they are stopped when it ends, at the latest by the next start.
type drills struct {
	a    *Appliance
	acts sync.Mutex // held during a decision

	mu  sync.Mutex // guards what follows
	now *drill     // nil: there is none
}

// A drill is one that was begun.
type drill struct {
	wire.DrillState
	long time.Duration // of its break

	// The rest is guarded by drills.mu, authority but for its pointer by drills.acts.
	ends          time.Duration   // CLOCK_BOOTTIME: when it is ended by itself; 0: at once, it is of an earlier start
	authority     *drillAuthority // of a drill "ca"
	began, mended time.Duration   // CLOCK_BOOTTIME of the break and of its end; 0: not yet
	timer         *time.Timer
	mend          func()
}

// replay takes over from the journal a drill that was not ended.
func (s *drills) replay(e *audit.Entry) {
	switch e.Kind {
	case kindDrillBegun:
		s.now = &drill{DrillState: wire.DrillState{ID: e.Object, Part: e.Text("part"), By: e.Actor, Reason: e.Text("reason")}}
	case kindDrillEnded:
		if s.now != nil && s.now.ID == e.Object {
			s.now = nil
		}
	}
}

// run ends what nobody ends.
func (s *drills) run(ctx context.Context) error {
	tick := time.NewTicker(drillAgain)
	defer tick.Stop()
	for {
		if d := s.current(); d != nil && s.over(d) {
			if _, err := s.end(ctx, "appliance", d.ID, true); err != nil && ctx.Err() == nil {
				s.a.log.WithError(err).WithField("object", d.ID).Warning("a drill that nobody ended could not be ended; it is tried again")
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if d := s.current(); d != nil {
				s.whole(d)
			}
			return nil
		}
	}
}

// over says whether nobody will end it any more.
func (s *drills) over(d *drill) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.a.sys.Boot() >= d.ends
}

func (s *drills) current() *drill {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// state is nil without a drill.
func (s *drills) state() *wire.DrillState {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.now
	if d == nil {
		return nil
	}
	out, boot := d.DrillState, s.a.sys.Boot()
	out.Broken = d.began > 0 && d.mended == 0
	left := d.ends - boot
	if out.Broken {
		left = d.began + d.long - boot
	}
	out.LeftS = max(0, int(left.Seconds()))
	if s.explaining(d, boot) {
		for _, code := range drillExplains[d.Part] {
			out.Explains = append(out.Explains, string(code))
		}
	}
	return &out
}

// explaining says whether alarms of the drill's kinds are its own: never for longer than was consented to, whatever becomes of
// its mending. The caller holds mu.
func (s *drills) explaining(d *drill, boot time.Duration) bool {
	return d.began > 0 && boot-d.began < d.long+drillSettles && (d.mended == 0 || boot-d.mended < drillSettles)
}

// explains is the drill that brought a condition about on purpose, "" for none.
func (s *drills) explains(c alarm.Condition) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.now
	if d == nil || !s.explaining(d, s.a.sys.Boot()) || !slices.Contains(drillExplains[d.Part], c.Code) {
		return ""
	}
	if c.Code == alarm.ListDue && !strings.Contains(c.Object, d.ID) || c.Code == alarm.MachineAway && c.Object != d.Machine {
		return "" // another's
	}
	return d.ID
}

func (s *drills) warnings() []string {
	d := s.state()
	if d == nil {
		return nil
	}
	what := "尚未断开或已恢复 (nothing is broken now)"
	if d.Broken {
		what = fmt.Sprintf("已断开，%d s 后自行恢复 (broken, whole again by itself)", d.LeftS)
	}
	return []string{fmt.Sprintf("演练进行中 (a drill is under way)：%s %s：%s", d.Part, d.ID, what)}
}

// shown is the state as applications may read it: what, not who.
func (s *drills) shown() *wire.DrillState {
	d := s.state()
	if d != nil {
		d.By, d.Persons, d.Reason = "", nil, ""
	}
	return d
}

// find is the drill of an id, for one decision.
func (s *drills) find(id string) (*drill, error) {
	if d := s.current(); d != nil && d.ID == id {
		return d, nil
	}
	return nil, problem.New(problem.NotFound, "没有这项演练：已结束，或设备已重启 (no such drill: it is over, or was before a restart)", "yinjian status 查看 (see yinjian status)")
}

// begin journals a drill, and makes whom it signs with.
func (s *drills) begin(ctx context.Context, actor string, req api.BeginDrill) (*wire.BegunDrill, error) {
	s.acts.Lock()
	defer s.acts.Unlock()
	if d := s.current(); d != nil {
		return nil, problem.New(problem.NotReady, fmt.Sprintf("演练 %s 还没有结束 (drill %s is not over)", d.ID, d.ID), "待其结束，或由管理员结束它 (wait for it, or have it ended)")
	}
	if ready, reasons := (health{s.a}).Ready(); !ready {
		return nil, problem.New(problem.NotReady, "设备此刻不能签名，不演练 (the appliance would not sign now: no drill): "+strings.Join(reasons, "；"), "先恢复正常 (mend that first)")
	}
	var id [4]byte
	rand.Read(id[:]) // never fails (crypto/rand)
	d := &drill{
		DrillState: wire.DrillState{ID: account.DrillPrefix + hex.EncodeToString(id[:]), Part: req.Part, Machine: req.Machine, By: actor, Persons: req.Persons, Reason: req.Reason},
		long:       time.Duration(req.Seconds) * time.Second,
	}
	if err := s.fit(d); err != nil {
		return nil, err
	}
	changed, err := audit.Changed(nil, map[string]any{"part": d.Part, "machine": d.Machine, "seconds": req.Seconds, "persons": strings.Join(d.Persons, "、")})
	if err != nil {
		return nil, err
	}
	if _, err := s.a.journal.Append(ctx, audit.Draft{
		Kind: kindDrillBegun, Actor: actor, Object: d.ID, State: true,
		Fields: append(changed, audit.Field{Name: "part", Value: audit.Text(d.Part)}, audit.Field{Name: "reason", Value: audit.Text(d.Reason)}),
	}); err != nil {
		return nil, journalRefused(err)
	}
	ctx = context.WithoutCancel(ctx)
	d.ends = s.a.sys.Boot() + d.long + drillLife
	s.mu.Lock()
	s.now = d
	s.mu.Unlock()
	out, err := s.people(ctx, actor, d)
	if err != nil {
		return nil, errors.Join(err, s.finishOrRetry(ctx, actor, d))
	}
	return out, nil
}

// fit refuses a drill that would prove nothing, and says what to do.
func (s *drills) fit(d *drill) error {
	unfit := func(detail, next string) error { return problem.New(problem.NotReady, detail, next) }
	switch d.Part {
	case wire.DrillHSM:
		if d.Machine == "" {
			d.Machine = FirstMachine
		}
		if s.a.machines.find(d.Machine) == nil {
			return problem.New(problem.NotFound, "没有这台密码机 (no such cipher machine)", "见 yinjian hsm list (see there)")
		}
	case wire.DrillDB:
		if p := s.a.projection.status(); p.Error != "" || p.Fork || p.Rebuild != nil {
			return unfit("中心库此刻不可用或正在重建，不演练 (the central database is away, or being rebuilt): "+p.Error, "待其恢复；见 yinjian status (wait; see yinjian status)")
		}
	case wire.DrillCampus:
		p := s.a.peers.state()
		if p == nil {
			return unfit("没有结对的另一院区，没有可以断开的线路 (there is no other campus, so no line to cut)", "先结对：yinjian peer add，见 docs/two-campuses.md (pair first)")
		}
		if !p.Up || p.AgeS < 0 {
			return unfit("另一院区此刻就不可达，不演练 (the other campus is not reached as it is): "+p.Error, "先恢复线路；见 yinjian peer status (mend the line first)")
		}
		if p.AgeS+d.long.Seconds() > p.MaxS/2 {
			return unfit("断开的时长超过 peer.max_age 的一半，会使签名被拒绝 (so long a cut comes too near peer.max_age, beyond which signing is refused)", "缩短 --seconds (make it shorter)")
		}
	}
	return nil
}

// people makes the drill's application and signer.
func (s *drills) people(ctx context.Context, actor string, d *drill) (*wire.BegunDrill, error) {
	const campus, name = "drill", "演练 (drill)"
	face := admin{s.a}
	app, err := face.RegisterApplication(ctx, actor, api.RegisterApplication{
		ID: d.ID, Name: name, Campus: campus, Rights: []string{account.RightSign, account.RightTimestamp}, Consent: []string{string(evidence.AppAsserted)}, Stamp: account.StampRequired, Test: true,
	})
	if err != nil {
		return nil, err
	}
	out := &wire.BegunDrill{ID: d.ID, Key: app.Key}
	enrolment := api.EnrolSigner{ID: d.ID, Name: name, Department: campus, Campus: campus, Algorithms: []string{string(hsm.SM2)}, Test: true}
	if d.Part == wire.DrillCA {
		enrolment.CA = "external"
	}
	if _, err := face.EnrolSigner(ctx, actor, enrolment); err != nil || d.Part != wire.DrillCA {
		return out, err
	}
	if d.authority, err = s.newAuthority(ctx, actor, d); err != nil {
		return nil, err
	}
	out.Anchor = d.authority.certificate.Raw
	return out, nil
}

// brk breaks what the drill is about, once. The entry comes first.
func (s *drills) brk(ctx context.Context, actor string, req api.BreakDrill) error {
	s.acts.Lock()
	defer s.acts.Unlock()
	d, err := s.find(req.ID)
	if err != nil {
		return err
	}
	s.mu.Lock()
	began, mended, over := d.began, d.mended, s.a.sys.Boot() >= d.ends
	s.mu.Unlock()
	if req.Revoke {
		if d.authority == nil || mended == 0 {
			return problem.Invalid("revoke", "只用于列表已恢复的 ca 演练 (of a drill of a CA whose list is whole again)")
		}
		return d.authority.publish(ctx, s.a, actor, 24*time.Hour, true)
	}
	if began > 0 || over {
		return problem.New(problem.NotReady, "这项演练已断开过，或已到期 (it was broken before, or its time is over)", "另开始一项演练 (begin another)")
	}
	if _, err := s.a.journal.Append(ctx, audit.Draft{
		Kind: kindDrillBroken, Actor: actor, Object: d.ID, State: true,
		Fields: []audit.Field{{Name: "part", Value: audit.Text(d.Part)}, {Name: "machine", Value: audit.Text(d.Machine)}, {Name: "seconds", Value: audit.Int(d.long / time.Second)}},
	}); err != nil {
		return journalRefused(err)
	}
	s.mu.Lock()
	d.began = s.a.sys.Boot()
	s.mu.Unlock()
	mend, err := s.sever(context.WithoutCancel(ctx), actor, d)
	s.mu.Lock()
	d.mend = mend
	d.timer = time.AfterFunc(d.long, func() { s.whole(d) })
	s.mu.Unlock()
	if err != nil {
		s.whole(d)
		return err
	}
	s.a.log.WithField("object", d.ID).WithField("part", d.Part).Warning("a drill has broken something on purpose")
	return nil
}

// sever breaks it, and answers what makes it whole. This is the one list of what drills do to the appliance.
func (s *drills) sever(ctx context.Context, actor string, d *drill) (mend func(), err error) {
	switch d.Part {
	case wire.DrillHSM:
		if soft := s.a.softtoken.Load(); s.a.cfg.Evaluation.Softtoken && d.Machine == FirstMachine && soft != nil {
			return func() { _ = soft.Signal(syscall.SIGCONT) }, soft.Signal(syscall.SIGSTOP) // it hangs, which is worse than being away
		}
		c := s.a.machines.find(d.Machine)
		if c == nil {
			return func() {}, problem.New(problem.NotFound, "没有这台密码机 (no such cipher machine)", "见 yinjian hsm list (see there)")
		}
		for _, w := range c.workers {
			w.Sever(d.long)
		}
		return func() {
			for _, w := range c.workers {
				w.Mend()
			}
		}, nil
	case wire.DrillDB:
		s.a.projection.sever(true)
		return func() { s.a.projection.sever(false) }, nil
	case wire.DrillTime:
		s.a.clock.Withhold(d.long/6, d.long/2, d.long)
		return s.a.clock.Release, nil
	case wire.DrillCampus:
		s.a.peers.sever(true)
		return func() { s.a.peers.sever(false) }, nil
	}
	// The source of the list answers no more: the one at hand is the last, and ends.
	return func() {
		if err := d.authority.publish(ctx, s.a, actor, 24*time.Hour, false); err != nil {
			s.a.log.WithError(err).WithField("object", d.ID).Error("the drill's list could not be made whole")
		}
	}, d.authority.publish(ctx, s.a, actor, d.long/2, false)
}

// whole undoes the break, once.
func (s *drills) whole(d *drill) {
	s.mu.Lock()
	mend := d.mend
	d.mend = nil
	if d.timer != nil {
		d.timer.Stop()
	}
	s.mu.Unlock()
	if mend == nil {
		return
	}
	mend()
	s.mu.Lock()
	d.mended = s.a.sys.Boot()
	s.mu.Unlock()
	s.a.log.WithField("object", d.ID).Info("what a drill had broken is whole again")
}

// end ends a drill: what is broken is made whole, its people are stopped, its anchor is withdrawn.
func (s *drills) end(ctx context.Context, actor, id string, abandon bool) (*wire.EndedDrill, error) {
	s.acts.Lock()
	defer s.acts.Unlock()
	d, err := s.find(id)
	if err != nil {
		return nil, err
	}
	s.whole(d)
	out := &wire.EndedDrill{}
	if !abandon && (d.Part == wire.DrillDB || d.Part == wire.DrillCampus) {
		if out.Rows, err = s.rows(ctx, d.ID); err != nil {
			return nil, err
		}
	}
	return out, s.finishOrRetry(context.WithoutCancel(ctx), actor, d)
}

// finishOrRetry is finish; what fails is tried again by [drills.run].
func (s *drills) finishOrRetry(ctx context.Context, actor string, d *drill) error {
	err := s.finish(ctx, actor, d)
	if err != nil {
		s.mu.Lock()
		d.ends = 0
		s.mu.Unlock()
	}
	return err
}

// rows are the drill's records as the central database has them.
func (s *drills) rows(ctx context.Context, application string) ([]wire.DrillRow, error) {
	store, err := s.a.projection.database()
	if err != nil {
		return nil, err
	}
	const most = 500 // a drill of 300 s that signs three times a second has more
	var out []wire.DrillRow
	q := central.RecordQuery{Kind: evidence.KindSign, Application: application, Before: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro(), Most: most}
	for {
		found, err := store.SearchRecords(ctx, q)
		if err != nil {
			return nil, problem.New(problem.CentreUnavailable, "中心库不可用 (the central database does not answer)", "稍后重试 (try again)").With(err)
		}
		for _, r := range found {
			out = append(out, wire.DrillRow{RecordID: r.RecordID, Leaf: r.LeafHash})
		}
		if len(found) < most {
			return out, nil
		}
		last := found[len(found)-1]
		q.After = &central.RecordPlace{SignedAt: last.SignedAt, Node: last.Node, Epoch: last.Epoch, Sequence: int64(last.Sequence)}
	}
}

// finish stops what the drill made in the directory, and journals that it is over. It may be asked again.
func (s *drills) finish(ctx context.Context, actor string, d *drill) error {
	const reason = "演练结束 (end of a drill)"
	dir := s.a.directory
	if app, _, ok := dir.Application(d.ID); ok && !app.Stopped {
		if _, err := dir.StopApplication(ctx, actor, d.ID, true, reason); err != nil {
			return err
		}
	}
	if g, ok := dir.Signer(d.ID); ok && !g.Stopped {
		if _, err := dir.StopSigner(ctx, actor, d.ID, true, reason); err != nil {
			return err
		}
	}
	for _, anchor := range dir.Anchors() {
		if anchor.Note == anchorNote(d.ID) && !anchor.Withdrawn {
			if _, err := (admin{s.a}).WithdrawAnchor(ctx, actor, api.Decision{ID: anchor.ID, Reason: reason}); err != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	var broken time.Duration
	if d.began > 0 && d.mended > 0 {
		broken = d.mended - d.began
	}
	s.mu.Unlock()
	if _, err := s.a.journal.Append(ctx, audit.Draft{
		Kind: kindDrillEnded, Actor: actor, Object: d.ID, State: true,
		Fields: []audit.Field{{Name: "part", Value: audit.Text(d.Part)}, {Name: "broken_ms", Value: audit.Int(broken.Milliseconds())}},
	}); err != nil {
		return journalRefused(err)
	}
	s.mu.Lock()
	s.now = nil
	s.mu.Unlock()
	return nil
}

// A drillAuthority is a CA of one drill. Its key is in memory alone: once the drill is over nobody can issue with it.
type drillAuthority struct {
	*ca.Authority
	certificate, leaf *smx509.Certificate
	number            int64     // of its last list; guarded by drills.acts, or by there being no drill yet
	revoked           time.Time // likewise; zero: not revoked
}

func anchorNote(id string) string { return "演练的 CA (CA of a drill) " + id }

// newAuthority makes it, admits it for staff, and has it issue the drill's signer a certificate and a list that lasts.
func (s *drills) newAuthority(ctx context.Context, actor string, d *drill) (*drillAuthority, error) {
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	serials := func(context.Context) (*big.Int, error) {
		b := make([]byte, 17)
		rand.Read(b) // never fails (crypto/rand)
		b[0] = 1
		return new(big.Int).SetBytes(b), nil
	}
	made, err := ca.New(ca.Config{Signer: key, Serials: serials})
	if err != nil {
		return nil, err
	}
	now := s.a.clock.Now().Time.Truncate(time.Second)
	from, to := now.Add(-time.Minute), now.Add(24*time.Hour)
	root, err := made.SelfSign(ctx, pkix.Name{CommonName: d.ID}, from, to)
	if err != nil {
		return nil, err
	}
	out := &drillAuthority{certificate: root}
	if out.Authority, err = ca.New(ca.Config{Signer: key, Certificate: root, Serials: serials}); err != nil {
		return nil, err
	}
	face := admin{s.a}
	if _, err := face.AddAnchor(ctx, actor, api.AddAnchor{Certificate: root.Raw, Uses: []string{account.UseStaff}, Note: anchorNote(d.ID)}); err != nil {
		return nil, err
	}
	owner := "signer:" + d.ID
	asked, err := s.a.directory.RequestCertificate(ctx, actor, account.RequestSpec{For: owner})
	if err != nil {
		return nil, err
	}
	csr, err := smx509.ParseCertificateRequest(asked.CSR)
	if err != nil {
		return nil, err
	}
	out.leaf, err = out.Issue(ctx, ca.Request{
		Profile: ca.Staff, Subject: pkix.Name{CommonName: csr.Subject.CommonName}, StaffNumber: d.ID, PublicKey: csr.PublicKey, NotBefore: from, NotAfter: to,
	})
	if err != nil {
		return nil, err
	}
	if err := out.publish(ctx, s.a, actor, 24*time.Hour, false); err != nil {
		return nil, err
	}
	_, err = s.a.directory.ImportCertificates(ctx, actor, account.Import{File: out.leaf.Raw, Chain: [][]byte{root.Raw}, Owner: owner, AcceptSubject: true})
	return out, err
}

// publish makes a list that lasts so long, and has the directory take it.
func (c *drillAuthority) publish(ctx context.Context, a *Appliance, actor string, lasts time.Duration, revoke bool) error {
	now := a.clock.Now().Time
	if revoke && c.revoked.IsZero() {
		c.revoked = now
	}
	var list []ca.Revoked
	if !c.revoked.IsZero() {
		list = append(list, ca.Revoked{Serial: c.leaf.SerialNumber, At: c.revoked, Reason: pki.Superseded})
	}
	c.number++
	der, err := c.CRL(ctx, big.NewInt(c.number), now, now.Add(lasts), list)
	if err != nil {
		return err
	}
	_, _, err = a.directory.ImportCRL(ctx, actor, der, "演练 (drill)")
	return err
}

// BeginDrill satisfies api.Admin.
func (d admin) BeginDrill(ctx context.Context, actor string, req api.BeginDrill) (any, error) {
	return d.a.drills.begin(ctx, actor, req)
}

// BreakDrill satisfies api.Admin.
func (d admin) BreakDrill(ctx context.Context, actor string, req api.BreakDrill) (any, error) {
	if err := d.a.drills.brk(ctx, actor, req); err != nil {
		return nil, err
	}
	return d.DrillStatus(ctx, actor)
}

// EndDrill satisfies api.Admin.
func (d admin) EndDrill(ctx context.Context, actor string, req api.EndDrill) (any, error) {
	return d.a.drills.end(ctx, actor, req.ID, req.Abandon)
}

// DrillStatus satisfies api.Admin.
func (d admin) DrillStatus(context.Context, string) (any, error) {
	return wire.DrillStatus{Drill: d.a.drills.state()}, nil
}
