package account

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
)

// A Decision says which change has an object's version: the row of the central database that it is decided by.
type Decision struct {
	Kind    string // of object: "application", "signer", "certificate", "anchor", "intermediates", "administrator"
	Object  string // its id
	Version int64  // from 1 on
	Node    string // who decided
	Epoch   string // 16 hexadecimal digits
	Intent  string // 64 hexadecimal digits, the reference of the outcome's entry
	Body    string // SM3 of the outcome's object, 64 hexadecimal digits
	At      time.Time
}

// A Centre decides which campus's change has an object's next version: a table, in which each version and each intent
// stand once. Nothing that it says changes the directory; it can only keep a change from being made. Errors mean that it
// did not answer.
type Centre interface {
	// Latest answers the highest version that was decided on, 0 when there is none.
	Latest(ctx context.Context, kind, object string) (int64, error)
	// Decide claims a version, and answers whether it is this intent's. Asked again it answers the same. After an error
	// it may be: Lookup tells.
	Decide(ctx context.Context, d Decision) (won bool, err error)
	// Lookup answers the decision of an intent, of which Node, Epoch, Intent, Body and At are given. When there is none,
	// there never will be one: Decide with that intent fails from then on.
	Lookup(ctx context.Context, intent Decision) (Decision, bool, error)
	// Versions answers the last version of each object; of the decisions only Kind, Object and Version are set.
	Versions(ctx context.Context) ([]Decision, error)
	// Decisions answers those on an object after a version, ascending, some hundreds at most.
	Decisions(ctx context.Context, kind, object string, after int64) ([]Decision, error)
}

// A shared change has these steps; the centre is asked in 1 and 4 alone, and only where there is another campus:
//
//  1. the object's latest version is here ([Service.current]);
//  2. the intent is journalled;
//  3. keys and certificates are made;
//  4. the centre gives the version to this intent, or to the other campus's ([Service.decide]);
//  5. the outcome is journalled with the version, and applied.
//
// A stop after 2 leaves an open intent. Whether 4 happened the centre knows by the intent's id; if it did, the version is
// filled with an entry that changes nothing, so that each version has one outcome ([Service.fill]). Until the centre can
// be asked, the intent stays open and its object as it is.

const (
	behindLimit = 2 * time.Second  // for the other campus's entries to arrive
	centreLimit = 10 * time.Second // for one answer of the centre's
)

// Fields of an outcome that was decided at the centre.
const (
	fieldVersion    = "decided.version"
	fieldDecidedAt  = "decided.at"     // µs since 1970 UTC
	fieldBody       = "decided.body"   // of a filled version: the digest of what it would have been
	fieldFrom       = "decided.from"   // of filled versions: the first of several
	fieldIntent     = "decided.intent" // of what the other campus decided
	fieldObjectKind = "object.kind"
	fieldObjectID   = "object.id"
)

// An objectKey names what has one version for both campuses.
type objectKey struct{ kind, id string }

// Kinds of such objects.
const (
	objectApplication   = "application"
	objectSigner        = "signer" // with keys, their requests and certificates
	objectCertificate   = "certificate"
	objectAnchor        = "anchor"
	objectIntermediates = "intermediates"
	objectAdministrator = "administrator"
)

// SharedKinds lists them.
var SharedKinds = []string{objectApplication, objectSigner, objectCertificate, objectAnchor, objectIntermediates, objectAdministrator}

func signerObject(id string) objectKey      { return objectKey{objectSigner, id} }
func applicationObject(id string) objectKey { return objectKey{objectApplication, id} }

// objectOf answers what an entry of that kind, about that object, changes; false for what one campus alone can change: the
// lists of its own CAs and its own units' keys. Lists of other CAs prove themselves, and the newest holds.
func objectOf(kind, object string) (objectKey, bool) {
	switch kind {
	case kindApplicationIntent, kindApplication:
		return applicationObject(object), true
	case kindSignerIntent, kindSigner:
		return signerObject(object), true
	case kindAdministratorIntent, kindAdministrator:
		return administratorObject(object), true
	case kindRevokeIntent, kindRevoke:
		return objectKey{objectCertificate, object}, true
	case kindAnchor:
		return objectKey{objectAnchor, object}, true
	case kindIntermediates:
		return objectKey{objectIntermediates, object}, true
	case kindRequestIntent, kindRequest, kindImport, kindDestroyIntent, kindDestroyed:
		return ownerObject(object)
	}
	return objectKey{}, false
}

// ownerObject is objectOf of an owner of keys.
func ownerObject(owner string) (objectKey, bool) {
	if useOf(owner) != UseStaff {
		return objectKey{}, false
	}
	return signerObject(owner[len(signerOwner):]), true
}

func objectOfEntry(e *audit.Entry) (objectKey, bool) {
	switch e.Kind {
	case kindFilled:
		return objectKey{e.Text(fieldObjectKind), e.Object}, true
	case kindChangeIntent:
		return objectOf(e.Text("of"), e.Object)
	}
	return objectOf(e.Kind, e.Object)
}

// centre is nil for an appliance that has no other campus.
func (s *Service) centre() Centre {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.pairing == nil {
		return nil
	}
	return s.pairing.Centre
}

func centreProblem(err error) error {
	return problem.New(problem.CentreUnavailable,
		"中心库没有应答，目录变更须由它裁决，未执行；签名与时间戳不受影响 (the central database did not answer, which decides on changes of the directory; signing goes on)",
		"待中心库恢复后，先查询现状再重试 (when it is back, look at the present state, then try again)").With(err)
}

func behindProblem(key objectKey, have, latest int64, by string) *problem.Problem {
	return problem.New(problem.DirectoryBehind,
		fmt.Sprintf("%s %s 在中心库已有第 %d 版（%s），本机只有第 %d 版 (version %d, decided by %s, is not here yet; here is %d)", key.kind, key.id, latest, by, have, latest, by, have),
		"检查院区间链路后重试；见 yinjian directory status (look at the link between the campuses, then try again)")
}

var errLost = problem.New(problem.DirectoryConflict, "另一院区刚变更了同一对象，本次变更未执行 (the other campus changed the same object just now; nothing was changed here)",
	"查询现状，确有必要再重试 (look at the present state, then try again if still wanted)")

func frozenProblem(key objectKey, why string) error {
	return problem.New(problem.DirectoryFrozen,
		fmt.Sprintf("%s %s 已冻结：%s (frozen: the two campuses do not agree on it)", key.kind, key.id, why),
		"请管理员查看 yinjian directory status，查明后 yinjian directory thaw (ask an administrator)")
}

// current makes sure that the directory has the object's latest version before it is changed. The caller holds s.changes.
func (s *Service) current(ctx context.Context, key objectKey) error {
	c := s.centre()
	limited, cancel := context.WithTimeout(ctx, centreLimit)
	defer cancel()
	if c != nil {
		if err := s.fillOpen(limited, c, key); err != nil {
			return err
		}
	}
	var late <-chan time.Time
	for {
		s.mu.RLock()
		o := s.objects[key].known()
		have, why, gap, came := o.version, o.frozen, len(o.waiting) > 0, s.came
		s.mu.RUnlock()
		if why != "" {
			return frozenProblem(key, why)
		}
		if c == nil {
			return nil
		}
		latest, err := c.Latest(limited, key.kind, key.id)
		if err != nil {
			return centreProblem(err)
		}
		if latest <= have && !gap {
			s.mu.Lock()
			s.base[key] = have
			s.mu.Unlock()
			return nil
		}
		if late == nil {
			late = time.After(behindLimit)
		}
		select {
		case <-came:
		case <-late:
			return behindProblem(key, have, latest, s.decidedBy(limited, c, key, have))
		case <-ctx.Done():
			return journalProblem(ctx.Err())
		}
	}
}

// currentOwner is current for the owner of keys, if he is shared.
func (s *Service) currentOwner(ctx context.Context, owner string) error {
	if key, shared := ownerObject(owner); shared {
		return s.current(ctx, key)
	}
	return nil
}

// decidedBy says who decided on the versions that are not here.
func (s *Service) decidedBy(ctx context.Context, c Centre, key objectKey, have int64) string {
	rows, err := c.Decisions(ctx, key.kind, key.id, have)
	if err != nil || len(rows) == 0 {
		return "?"
	}
	return rows[0].Node
}

// decide has the centre give the object's next version to this change, and writes it into the outcome's draft. The caller
// holds s.changes and has called current.
func (s *Service) decide(ctx context.Context, c Centre, key objectKey, d *audit.Draft, ref, body []byte) (version int64, err error) {
	s.mu.RLock()
	base, looked := s.base[key]
	s.mu.RUnlock()
	if !looked {
		return 0, fmt.Errorf("account: %s %s is changed without having been looked up at the centre", key.kind, key.id)
	}
	id := hex.EncodeToString(ref)
	if !slices.ContainsFunc(d.Fields, func(f audit.Field) bool { return f.Name == "intent" }) {
		announce := audit.Draft{Kind: kindChangeIntent, Actor: d.Actor, Object: d.Object, Fields: []audit.Field{text("intent", id), text("of", d.Kind)}}
		if err := s.note(ctx, announce); err != nil {
			return 0, err
		}
		d.Fields = append(d.Fields, text("intent", id))
	}
	// From here on the caller's leaving changes nothing.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), centreLimit)
	defer cancel()
	sum := sm3.Sum(body)
	decision := Decision{
		Kind: key.kind, Object: key.id, Version: base + 1, Node: s.cfg.Node, Epoch: s.cfg.Journal.Epoch().String(), Intent: id,
		Body: hex.EncodeToString(sum[:]), At: s.cfg.Clock.Now().Time,
	}
	won, err := c.Decide(ctx, decision)
	if err != nil {
		return 0, centreProblem(err)
	}
	if !won {
		return 0, errLost
	}
	d.Fields = append(d.Fields, audit.Field{Name: fieldVersion, Value: audit.Int(decision.Version)}, audit.Field{Name: fieldDecidedAt, Value: audit.Int(decision.At.UnixMicro())})
	return decision.Version, nil
}

// fillOpen settles what open intents on an object have decided.
func (s *Service) fillOpen(ctx context.Context, c Centre, key objectKey) error {
	s.mu.RLock()
	var open []intent
	for _, i := range s.openIntents {
		if i.shared && i.key == key && !s.underWay[i.id] {
			open = append(open, i)
		}
	}
	s.mu.RUnlock()
	for _, i := range open {
		if err := s.fill(ctx, c, i); err != nil {
			return err
		}
	}
	return nil
}

// fill asks the centre what became of an open intent. If it has a version, that one gets its outcome: an entry that leaves
// the object as it was. If not, it will never have one. The intent itself stays open.
func (s *Service) fill(ctx context.Context, c Centre, i intent) error {
	ctx, cancel := context.WithTimeout(ctx, centreLimit)
	defer cancel()
	none := sm3.Sum(nil)
	d, found, err := c.Lookup(ctx, Decision{
		Node: s.cfg.Node, Epoch: s.cfg.Journal.Epoch().String(), Intent: i.id, Body: hex.EncodeToString(none[:]), At: s.cfg.Clock.Now().Time,
	})
	if err != nil {
		return centreProblem(err)
	}
	s.mu.RLock()
	have := s.objects[i.key].known().version
	s.mu.RUnlock()
	// Whoever changes rows there can have any of them bear this id. What is not the object's next version is nobody's: the
	// object waits for an administrator ([Service.SkipVersions]).
	if !found || d.Kind != i.key.kind || d.Object != i.key.id || d.Node != s.cfg.Node || d.Version != have+1 {
		return nil
	}
	// Decided before a restore: the outcome may have been written after the backup, and the other campus may have it.
	if age, ok := s.age(); d.Epoch != s.cfg.Journal.Epoch().String() && (!ok || age > skipAge) {
		return behindProblem(i.key, have, d.Version, d.Node)
	}
	return s.fillVersions(ctx, i.key, d.Version, d.Version, "appliance", []audit.Field{
		text("act", "fill"), text("of", i.kind), text("fills", i.id), text(fieldBody, d.Body), {Name: fieldDecidedAt, Value: audit.Int(d.At.UnixMicro())},
	})
}

// fillVersions journals that an object's versions from first to last have no other content than the one before.
func (s *Service) fillVersions(ctx context.Context, key objectKey, first, last int64, actor string, fields []audit.Field) error {
	s.order.RLock()
	defer s.order.RUnlock()
	ref := sm3.Sum(fmt.Appendf(nil, "yinjian/account/filled/v1\x00%s\x00%s\x00%d\x00%d\x00%s", key.kind, key.id, first, last, s.cfg.Journal.Epoch()))
	d := audit.Draft{Kind: kindFilled, Actor: actor, Object: key.id, State: true, Ref: ref[:], Unique: true, Fields: append(fields,
		text(fieldObjectKind, key.kind), audit.Field{Name: fieldFrom, Value: audit.Int(first)}, audit.Field{Name: fieldVersion, Value: audit.Int(last)},
	)}
	r, err := s.cfg.Journal.Append(ctx, d)
	entry := &r.Entry
	if errors.Is(err, audit.ErrDuplicateRef) { // the answer was lost
		var found []audit.Record
		if found, err = s.cfg.Journal.ByRef(ctx, d.Ref); err == nil {
			entry = &found[0].Entry
		}
	}
	if err != nil {
		return journalProblem(err)
	}
	if err := s.apply(ctx, entry, nil, nil); err != nil {
		return err
	}
	s.cfg.Log.WithFields(logrus.Fields{"object": key.id, "kind": key.kind, "version": last}).Warning("a version without a change of its own was filled")
	return nil
}

// SkipVersions fills the versions of an object that the centre has and no journal: rows that somebody put there, or whose
// appliance lost its journal. Each appliance says so of rows that bear its own name, or that of none of the two; of the
// others it cannot know. The other campus must have been heard within a minute, so that what it has is here. It answers the
// versions skipped.
func (s *Service) SkipVersions(ctx context.Context, actor, kind, object, reason string) (first, last int64, err error) {
	if err := problem.CheckText("reason", reason, maxReason); err != nil {
		return 0, 0, err
	}
	c := s.centre()
	if c == nil {
		return 0, 0, problem.New(problem.NotFound, "本机没有配对的院区 (there is no other campus)", "无需处理 (nothing to do)")
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer unlock()
	key := objectKey{kind, object}
	if err := s.fillOpen(ctx, c, key); err != nil {
		return 0, 0, err
	}
	if age, ok := s.age(); !ok || age > skipAge {
		return 0, 0, problem.New(problem.DirectoryBehind, "尚未取得对端的全部目录，不能判断 (what the other campus has is not here yet)", "待院区间链路恢复后重试 (try again when the link is up)")
	}
	s.mu.RLock()
	o := s.objects[key].known()
	have, why, other := o.version, o.frozen, s.pairing.Node
	s.mu.RUnlock()
	if why != "" {
		return 0, 0, frozenProblem(key, why)
	}
	rows, err := c.Decisions(ctx, kind, object, have)
	if err != nil {
		return 0, 0, centreProblem(err)
	}
	if len(rows) == 0 {
		return 0, 0, problem.New(problem.NotFound, "该对象没有缺少的版本 (no version of this object is missing)", "核对类型与标识，见 yinjian directory status (check kind and id)")
	}
	for _, d := range rows {
		if d.Node == other {
			break
		}
		last = d.Version
	}
	if last-have > maxAhead {
		return 0, 0, problem.New(problem.Forbidden, fmt.Sprintf("中心库有第 %d 版，不可能是由变更得来的 (the central database has a version %d, which no changes can have led to)", last, last),
			"请数据库管理员核实并删除该行，此事件须追查 (have that row looked into and deleted)")
	}
	if last == 0 {
		return 0, 0, problem.New(problem.Forbidden, fmt.Sprintf("第 %d 版署名为设备 %s，只有该院区能判断 (version %d bears the name of %s, which alone can know)", rows[0].Version, other, rows[0].Version, other),
			"在该院区执行同一命令 (give the same command there)")
	}
	fields, err := audit.Changed(map[string]any{"version": have}, map[string]any{"version": last})
	if err != nil {
		return 0, 0, err
	}
	err = s.fillVersions(ctx, key, have+1, last, actor, append(fields, text("act", "skip"), text("reason", reason)))
	return have + 1, last, err
}

// Thaw puts an end to a fork, or to the wait for a version that never comes: the object becomes what it is here, stopped (an anchor: withdrawn), at both campuses, with a
// version after all that either has; what was said of it under earlier versions counts no more, whenever it arrives. It is
// started again as any object is. Keys that the other campus alone has made for a signer meanwhile stay there. The other
// campus, if there is one, must have been heard within a minute, so that what it has is here. It answers the version.
func (s *Service) Thaw(ctx context.Context, actor, kind, id, reason string) (int64, error) {
	if err := problem.CheckText("reason", reason, maxReason); err != nil {
		return 0, err
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return 0, err
	}
	defer unlock()
	key, c := objectKey{kind, id}, s.centre()
	var latest int64
	if c != nil {
		if age, ok := s.age(); !ok || age > skipAge {
			return 0, problem.New(problem.DirectoryBehind, "尚未取得对端的全部目录，不能判断 (what the other campus has is not here yet)", "待院区间链路恢复后重试 (try again when the link is up)")
		}
		limited, cancel := context.WithTimeout(ctx, centreLimit)
		defer cancel()
		if latest, err = c.Latest(limited, kind, id); err != nil {
			return 0, centreProblem(err)
		}
	}
	s.mu.Lock()
	o := s.objects[key].known()
	stuck, most := o.frozen != "" || len(o.waiting) > 0, o.version+maxAhead/2
	have := max(o.version, min(latest, most))
	for _, w := range o.waiting {
		v, _ := w.entry.Field(fieldVersion).(audit.Int)
		have = max(have, min(int64(v), most))
	}
	have += o.stray // which the other campus counts
	s.base[key] = have
	s.mu.Unlock()
	if !stuck {
		return 0, problem.New(problem.NotFound, "该对象在本机没有冻结 (this object is not frozen here)", "见 yinjian directory status；对端冻结的在对端执行 (look at its state; what the other campus froze is thawed there)")
	}
	ref, err := newRef()
	if err != nil {
		return 0, err
	}
	d := audit.Draft{Actor: actor, Object: id, Fields: []audit.Field{text("act", "thaw"), text("reason", reason), boolean(fieldThaws, true)}}
	object := s.stopped(&d, key, actor, reason)
	if c == nil { // nobody else decides; the version says that it comes after all others
		d.Fields = append(d.Fields, text("intent", hex.EncodeToString(ref)),
			audit.Field{Name: fieldVersion, Value: audit.Int(have + 1)}, audit.Field{Name: fieldDecidedAt, Value: audit.Int(s.cfg.Clock.Now().Time.UnixMicro())})
	}
	if object != nil {
		err = s.conclude(ctx, d, ref, object, nil)
	} else {
		if c != nil {
			_, err = s.decide(ctx, c, key, &d, ref, nil)
		}
		if err == nil {
			none := sm3.Sum(nil)
			fields := slices.DeleteFunc(d.Fields, func(f audit.Field) bool { return f.Name == fieldVersion })
			err = s.fillVersions(ctx, key, have+1, have+1, actor, append(fields, text("fills", hex.EncodeToString(ref)), text(fieldBody, hex.EncodeToString(none[:]))))
		}
	}
	if err != nil {
		return 0, err
	}
	s.cfg.Log.WithFields(logrus.Fields{"object": id, "kind": kind, "version": have + 1}).Warning("an administrator has put an end to a fork; the object is stopped")
	return have + 1, nil
}

// stopped answers a shared object as it is here, but stopped or withdrawn, and gives the draft its kind. It is nil for what is
// not here, and for what only ever grows: a revoked certificate stays revoked.
func (s *Service) stopped(d *audit.Draft, key objectKey, actor, reason string) any {
	s.mu.RLock()
	defer s.mu.RUnlock()
	now := s.cfg.Clock.Now().Time
	switch key.kind {
	case objectApplication:
		if was := s.applications[key.id]; was != nil {
			a := *was
			a.Version, a.Stopped, a.ChangedBy, a.ChangedAt = was.Version+1, true, actor, now
			d.Kind = kindApplication
			return &a
		}
	case objectSigner:
		if was := s.signers[key.id]; was != nil {
			g := *was
			g.Version, g.Stopped, g.ChangedBy, g.ChangedAt = was.Version+1, true, actor, now
			d.Kind = kindSigner
			return &g
		}
	case objectAdministrator:
		if was := s.administrators[key.id]; was != nil {
			a := *was
			a.Version, a.Stopped, a.ChangedBy, a.ChangedAt = was.Version+1, true, actor, now
			d.Kind = kindAdministrator
			return &a
		}
	case objectAnchor:
		if was := s.anchors[key.id]; was != nil {
			a := *was
			a.Withdrawn, a.Reason, a.ChangedBy, a.ChangedAt = true, reason, actor, now
			d.Kind = kindAnchor
			return &a
		}
	}
	d.Kind = kindFilled
	return nil
}

// A BlockedObject has a version at the centre that is not here.
type BlockedObject struct {
	Kind, ID        string
	Version, Latest int64  // the next one here, and the last one there
	Node            string // whose name the next one bears
	At              time.Time
}

// Blocked asks the centre for versions that are not here: decided just now and on their way, or of nobody. Without another
// campus there are none.
func (s *Service) Blocked(ctx context.Context) ([]BlockedObject, error) {
	c := s.centre()
	if c == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, centreLimit)
	defer cancel()
	last, err := c.Versions(ctx)
	if err != nil {
		return nil, centreProblem(err)
	}
	var out []BlockedObject
	for _, d := range last {
		key := objectKey{d.Kind, d.Object}
		s.mu.RLock()
		have := s.objects[key].known().version
		s.mu.RUnlock()
		if d.Version <= have {
			continue
		}
		rows, err := c.Decisions(ctx, d.Kind, d.Object, have)
		if err != nil {
			return nil, centreProblem(err)
		}
		if len(rows) > 0 {
			out = append(out, BlockedObject{Kind: d.Kind, ID: d.Object, Version: have + 1, Latest: d.Version, Node: rows[0].Node, At: rows[0].At})
		}
	}
	return out, nil
}

// Reconcile holds the versions that are here against the centre's. A decision that the centre has lost, in a standby that took
// over or an older copy of the database, is put back before the other campus, which may not have heard of it, is given its
// version once more. behind has the objects of which the centre has a version that is not here, with the version here: such as
// are on their way, and such as never come. Without another campus there is nothing.
func (s *Service) Reconcile(ctx context.Context) (putBack int, behind map[string]int64, err error) {
	c := s.centre()
	if c == nil {
		return 0, nil, nil
	}
	// What is here is read first: what was decided on meanwhile the centre has.
	here := map[objectKey]Decision{}
	s.mu.RLock()
	for key, o := range s.objects {
		d := o.last
		if d.Version != o.version {
			d = Decision{Version: o.version}
		}
		here[key] = d
	}
	s.mu.RUnlock()
	limited, cancel := context.WithTimeout(ctx, centreLimit)
	defer cancel()
	last, err := c.Versions(limited)
	if err != nil {
		return 0, nil, err
	}
	behind = map[string]int64{}
	there := map[objectKey]int64{}
	for _, d := range last {
		key := objectKey{d.Kind, d.Object}
		there[key] = d.Version
		if have := here[key].Version; d.Version > have {
			behind[d.Kind+" "+d.Object] = have
		}
	}
	failed := 0
	for key, d := range here {
		if d.Intent == "" || d.Version <= there[key] {
			continue
		}
		log := s.cfg.Log.WithFields(logrus.Fields{"object": d.Object, "kind": d.Kind, "version": d.Version})
		limited, cancel := context.WithTimeout(ctx, centreLimit)
		won, err := c.Decide(limited, d)
		cancel()
		switch {
		case err != nil:
			log.WithError(err).Warning("a decision that the central database had lost could not be put back")
			if failed++; failed == 3 {
				return putBack, behind, err
			}
		case won:
			log.Error("the central database had lost a decision, which was put back")
			putBack++
		default:
			log.Error("the central database has another decision on a version than the journals")
		}
	}
	return putBack, behind, nil
}

// skipAge is how lately the other campus must have been heard for a version to be skipped.
const skipAge = time.Minute

// Decided answers the decision that an entry of the directory is the outcome of, here or at the other campus, as the
// centre's table has it; false for an entry that no decision stands for.
func Decided(e *audit.Entry) (Decision, bool) {
	version, decided := e.Field(fieldVersion).(audit.Int)
	if decided && e.Kind == audit.KindForeign {
		at, _ := e.Field(fieldDecidedAt).(audit.Int)
		return Decision{
			Kind: e.Text(fieldObjectKind), Object: e.Text(fieldObjectID), Version: int64(version), Node: e.Text(fieldNode), Epoch: e.Text(fieldEpoch),
			Intent: e.Text(fieldIntent), Body: e.Text(fieldBody), At: time.UnixMicro(int64(at)).UTC(),
		}, true
	}
	key, shared := objectOfEntry(e)
	if !decided || !shared {
		return Decision{}, false
	}
	at, _ := e.Field(fieldDecidedAt).(audit.Int)
	d := Decision{
		Kind: key.kind, Object: key.id, Version: int64(version), Node: e.Node, Epoch: e.Epoch.String(), Intent: e.Text("intent"),
		At: time.UnixMicro(int64(at)).UTC(),
	}
	if e.Kind == kindFilled {
		d.Intent, d.Body = e.Text("fills"), e.Text(fieldBody)
		if d.Intent == "" { // skipped: nobody's intent
			return Decision{}, false
		}
	} else if p, ok := e.Payload("object"); ok {
		d.Body = p.SM3.String()
	}
	return d, true
}

// Decisions is the table of decisions as journals have it (an audit.Table): each has its own, and what it applied of the
// other's. Nothing is ever removed from it, since a version that was free for a moment could be given twice.
type Decisions struct {
	Centre Centre
	Log    logrus.FieldLogger
	// Mend is given, once all are there, those that the journals have; nil: nobody is.
	Mend func(ctx context.Context, journals []Decision) error
}

// Name implements audit.Table.
func (Decisions) Name() string { return "yj_decision" }

// Empty implements audit.Table: it leaves everything.
func (Decisions) Empty(context.Context, string, func(uint64)) error { return nil }

// Fill implements audit.Table.
func (t Decisions) Fill(ctx context.Context, journals []audit.Source, done func(entries, total uint64)) error {
	var seen, total uint64
	var all []Decision
	for _, j := range journals {
		total += j.Size()
	}
	for _, j := range journals {
		size := j.Size()
		err := j.Range(ctx, 0, func(r audit.Record) error {
			if seen++; seen%10_000 == 0 {
				done(seen, total)
			}
			d, ok := Decided(&r.Entry)
			if !ok {
				return nil
			}
			all = append(all, d)
			won, err := t.Centre.Decide(ctx, d)
			if err == nil && !won {
				t.Log.WithFields(logrus.Fields{"object": d.Object, "kind": d.Kind, "version": d.Version}).Error("the central database has another decision on a version than the journals")
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("account: decisions of %s, %d entries: %w", j.Node(), size, err)
		}
	}
	if t.Mend != nil {
		if err := t.Mend(ctx, all); err != nil {
			return fmt.Errorf("account: decisions: %w", err)
		}
	}
	done(total, total)
	return nil
}
