package account

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// A Pairing is what the directory knows of the other campus.
type Pairing struct {
	Node   string // its appliance
	Centre Centre
	// Since is when they were paired: the copy of its directory counts from then on.
	Since time.Time
	// MaxAge is how old the copy may be for signing to go on; 0: as old as it likes.
	MaxAge time.Duration
	// CAs are the evaluation CAs of the other appliance (DER), admitted for signers, timestamps and the log.
	CAs [][]byte
}

// Pair says that there is another campus, nil that there is none any more. It is called after the replay of the entry that
// says so, before that of any entry of the other campus, and when it changes.
func (s *Service) Pair(p *Pairing) error {
	var fresh []*Anchor
	if p != nil {
		for _, der := range p.CAs {
			cert, err := pki.ParseCertificate(der)
			if err != nil {
				return fmt.Errorf("account: an evaluation CA of %s: %w", p.Node, err)
			}
			fresh = append(fresh, &Anchor{
				ID: fingerprint(der), Certificate: der, Uses: []string{UseLog, UseStaff, UseTSA}, Evaluation: true,
				Note: "评估 CA，对端设备 " + p.Node + " (evaluation CA of the other campus)", ChangedBy: "appliance", ChangedAt: p.Since, cert: cert,
			})
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range fresh {
		if s.anchors[a.ID] == nil { // else it was withdrawn, or stands for less, since
			s.anchors[a.ID] = a
		}
	}
	s.pairing = p
	s.forgetStandings()
	// Pairing with the same appliance once more tells nothing of what it has.
	if p != nil && s.heardOf != p.Node {
		s.heardOf = p.Node
		if s.heard.Before(p.Since) {
			s.heard = p.Since
		}
	}
	return nil
}

// Paired says whether there is another campus.
func (s *Service) Paired() bool { return s.centre() != nil }

// PeerCurrent says that at that time the copy had all that the other campus had.
func (s *Service) PeerCurrent(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at.After(s.heard) {
		s.heard = at
	}
}

// age is how old the copy of the other campus's directory is; false when there is none, or time is not trusted.
func (s *Service) age() (time.Duration, bool) {
	now := s.cfg.Clock.Now()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.pairing == nil || !now.Trusted() {
		return 0, false
	}
	return max(0, now.Time.Sub(s.heard)), true
}

// usable refuses what rests on a copy of the other campus's directory that is too old, or on an object of which the two
// campuses do not say the same: somebody may have been stopped there. Refusing is meant.
func (s *Service) usable(keys ...objectKey) error {
	age, paired := s.age()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if p := s.pairing; paired && p != nil && p.MaxAge > 0 && age > p.MaxAge {
		return problem.New(problem.DirectoryStale,
			fmt.Sprintf("已有 %s 未收到另一院区的目录，超过允许的 %s，停用与吊销可能未知，拒绝签名 (the other campus's directory was last heard %s ago; whom it has stopped since is not known)", age.Round(time.Second), p.MaxAge, age.Round(time.Second)),
			"请管理员恢复院区间链路 (ask an administrator to bring the link between the campuses back)")
	}
	for _, key := range keys {
		o := s.objects[key]
		if o == nil {
			continue
		}
		if o.frozen != "" {
			return frozenProblem(key, o.frozen)
		}
		if len(o.waiting) > 0 {
			return frozenProblem(key, "对端已有更新的版本，其前一版本尚未收到 (a later version is here, the one before it is not)")
		}
	}
	return nil
}

// An objectState is what is known of the versions of a shared object.
type objectState struct {
	version int64                   // the last that is here
	decided bool                    // that one was decided at the centre
	node    string                  // whose outcome it is
	at      time.Time               // of its entry
	last    Decision                // that gave the version, as the centre should have it; of an earlier version where nobody's was skipped
	filled  [][2]int64              // versions without a change of their own, from and to
	waiting map[int64]*foreignEntry // outcomes for which an earlier version is missing, by their (first) version
	frozen  string                  // why nobody may change or use it; "": one may
	stray   int64                   // outcomes of the other campus that were not decided at the centre, since the last thaw
	thawed  int64                   // versions up to this one do not count any more: an administrator has put an end to a fork
}

// known is the state of an object that may be unknown.
func (o *objectState) known() *objectState {
	if o == nil {
		return new(objectState)
	}
	return o
}

type foreignEntry struct {
	entry audit.Entry
	body  []byte
}

// A placement says what an outcome is to its object.
type placement int

const (
	placeNext  placement = iota // its next version
	placeLater                  // a later one
	placeSame                   // one that is there, and says the same
	placeFork                   // one that is there, and says something else
)

// place holds an outcome against the versions that are there. Whoever changes the centre's table can have both campuses
// decide on one version; that is a fork.
func (o *objectState) place(e *audit.Entry, own bool) (p placement, first, version int64, why string) {
	v, decided := e.Field(fieldVersion).(audit.Int)
	version = int64(v)
	if !decided {
		// Before the pairing an object had one campus, whose journal counts its versions.
		if !own && (o.decided || o.version > 0 && o.node != e.Node) {
			return placeFork, 0, 0, fmt.Sprintf("设备 %s 未经中心裁决变更了它 (changed by %s without a decision)", e.Node, e.Node)
		}
		version = o.version + 1
	}
	first = version
	if f, ok := e.Field(fieldFrom).(audit.Int); ok && e.Kind == kindFilled {
		first = int64(f)
	}
	thaw, _ := e.Field(fieldThaws).(audit.Bool)
	switch {
	case decided && (first < 1 || version < first || version-o.version > maxAhead):
		return placeFork, 0, 0, fmt.Sprintf("设备 %s 的日志第 %d 条的版本号 %d–%d 不可能 (entry %d of %s has the impossible versions %d to %d)", e.Node, e.Sequence, first, version, e.Sequence, e.Node, first, version)
	case decided && version <= o.thawed:
		return placeSame, first, version, ""
	case bool(thaw) && decided && version > o.version:
		return placeNext, first, version, ""
	case o.frozen != "", first > o.version+1:
		return placeLater, first, version, ""
	case first == o.version+1:
		return placeNext, first, version, ""
	case e.Kind == kindFilled && o.filledAll(first, min(version, o.version)):
		if version > o.version {
			return placeNext, first, version, ""
		}
		return placeSame, first, version, ""
	}
	return placeFork, first, version, fmt.Sprintf("第 %d 版有两个内容，其一来自设备 %s 的日志第 %d 条 (version %d has two outcomes, one of them entry %d of %s)", first, e.Node, e.Sequence, first, e.Sequence, e.Node)
}

func (o *objectState) filledAll(first, last int64) bool {
	for v := first; v <= last; v++ {
		i := slices.IndexFunc(o.filled, func(r [2]int64) bool { return r[0] <= v && v <= r[1] })
		if i < 0 {
			return false
		}
		v = o.filled[i][1]
	}
	return true
}

// maxAhead is how far beyond the last version one may be. No object is changed that often; a number near the largest that there
// is would end all changes of it, its stop among them.
const maxAhead = 1 << 20

// fieldThaws marks an outcome that puts an end to a fork: see [Service.Thaw].
const fieldThaws = "thaws"

var errForked = errors.New("account: an outcome for a version that has another")

// placed files an outcome under its object. It answers false when the outcome has no effect now. The caller holds s.mu.
func (s *Service) placed(e *audit.Entry, body []byte) (key objectKey, now bool, err error) {
	key, shared := objectOfEntry(e)
	if !shared || isIntent(e.Kind) {
		return key, true, nil
	}
	o := s.objects[key]
	if o == nil {
		o = &objectState{waiting: map[int64]*foreignEntry{}}
		s.objects[key] = o
	}
	p, first, version, why := o.place(e, !s.isForeign(e))
	switch p {
	case placeNext:
		if thaw, _ := e.Field(fieldThaws).(audit.Bool); bool(thaw) {
			o.frozen, o.thawed, o.stray = "", version, 0
			maps.DeleteFunc(o.waiting, func(v int64, _ *foreignEntry) bool { return v <= version })
			s.forgetStandings()
		}
		_, decided := e.Field(fieldVersion).(audit.Int)
		o.version, o.decided, o.node, o.at = version, o.decided || decided, e.Node, entryTime(e)
		if d, ok := Decided(e); ok {
			o.last = d
		}
		if e.Kind == kindFilled {
			o.filled = append(o.filled, [2]int64{first, version})
		}
		return key, true, nil
	case placeLater:
		if o.waiting[first] == nil {
			o.waiting[first] = &foreignEntry{*e, body}
		}
		return key, false, nil
	case placeSame:
		return key, false, nil
	}
	if _, decided := e.Field(fieldVersion).(audit.Int); !decided {
		o.stray++
	}
	s.freeze(key, why)
	return key, false, errForked
}

// freeze takes an object out of use. The caller holds s.mu.
func (s *Service) freeze(key objectKey, why string) {
	o := s.objects[key]
	if o == nil {
		o = &objectState{waiting: map[int64]*foreignEntry{}}
		s.objects[key] = o
	}
	o.frozen = why
	s.forgetStandings()
	s.cfg.Log.WithFields(logrus.Fields{"object": key.id, "kind": key.kind, "why": why}).Error("directory fork: the two campuses do not agree on an object, which is frozen")
}

// waited takes the outcome that has become an object's next, nil if there is none.
func (s *Service) waited(key objectKey) *foreignEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.objects[key]
	if o == nil || o.frozen != "" {
		return nil
	}
	w := o.waiting[o.version+1]
	delete(o.waiting, o.version+1)
	return w
}

// Fields of an entry that says that an entry of the other campus was applied.
const (
	fieldNode     = "foreign.node"
	fieldEpoch    = "foreign.epoch" // the entry's
	fieldLogEpoch = "foreign.log_epoch"
	fieldSequence = "foreign.sequence"
	fieldLeaf     = "foreign.leaf"
	fieldKind     = "foreign.kind"
	// An entry that another appliance than its own had applied names where it came from.
	fieldVia         = "foreign.via"
	fieldViaSequence = "foreign.via_sequence"
	// fieldEffect says that the entry changed nothing here; its object is left out.
	fieldEffect = "effect"

	effectOlder = "older" // a list that is not newer than the one at hand

	payloadEntry = "entry"
	payloadsOf   = "of." // before the names of the entry's own
)

// Replicates says whether an entry of a journal concerns the other campus's directory too.
func Replicates(e *audit.Entry) bool {
	switch e.Kind {
	case kindCRL, kindForeignCRL, kindFilled:
		return true
	}
	_, shared := objectOf(e.Kind, e.Object)
	return shared && !isIntent(e.Kind)
}

// Concerns says whether an entry of a journal concerns the directory of an appliance, whose journal is in that epoch. What
// another had applied is sent on: an appliance that was restored learns again what it had decided since the backup, one
// that takes another's place what that one had decided.
func Concerns(e *audit.Entry, node string, epoch audit.Epoch) bool {
	if e.Kind == audit.KindForeign {
		return e.Text(fieldEffect) == "" && (e.Text(fieldNode) != node || e.Text(fieldEpoch) != epoch.String())
	}
	return Replicates(e)
}

type logKey struct {
	node  string
	epoch audit.Epoch
}

// ForeignCursor answers from which number on the entries of another appliance's journal, which is in that epoch, are wanted.
func (s *Service) ForeignCursor(node string, epoch audit.Epoch) uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.cursors[logKey{node, epoch}]
}

// ApplyForeign takes an entry of the other campus's directory, which the caller has verified. It is journalled here and
// changes this directory as it changed that one, once, however often it is given; versions of one object in their order.
// An entry that does not concern the directory is passed over. What contradicts this directory freezes its object, and is
// no error: an error means that the same entry has to be given again. Entries of one journal are given in their order.
func (s *Service) ApplyForeign(ctx context.Context, f *audit.Foreign) error {
	s.order.Lock()
	defer s.order.Unlock()
	if f.Record.Sequence < s.ForeignCursor(f.Node, f.Epoch) {
		return nil
	}
	of, err := unwrapped(f)
	if err != nil {
		return err
	}
	e, ref := &of.Record.Entry, of.Ref()
	known, err := s.knows(ctx, e, ref)
	if err != nil {
		return err
	}
	if Replicates(e) && !known {
		body, applied, err := s.recordForeign(ctx, f, of, ref)
		if err != nil {
			return err
		}
		if applied {
			if err := s.applyForeign(ctx, e, body); err != nil {
				return err
			}
		}
		s.mu.Lock()
		s.foreignSeen[string(ref)] = true
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cursors[logKey{f.Node, f.Epoch}] = f.Record.Sequence + 1
	close(s.came)
	s.came = make(chan struct{})
	return nil
}

// unwrapped is the entry itself, or the one that it says was applied.
func unwrapped(f *audit.Foreign) (*audit.Foreign, error) {
	if f.Record.Entry.Kind != audit.KindForeign {
		return f, nil
	}
	der := f.Payloads[payloadEntry]
	e, err := audit.ParseEntry(der)
	if err != nil {
		return nil, fmt.Errorf("account: entry %d of %s: the entry that it applied: %w", f.Record.Sequence, f.Node, err)
	}
	of := &audit.Foreign{Node: e.Node, Epoch: f.Epoch, Payloads: map[string][]byte{}, Record: audit.Record{
		Epoch: e.Epoch, Sequence: e.Sequence, LeafHash: audit.LeafHash(der), Entry: *e, EntryDER: der,
	}}
	for name, data := range f.Payloads {
		if name, ok := strings.CutPrefix(name, payloadsOf); ok {
			of.Payloads[name] = data
		}
	}
	return of, nil
}

// knows says whether an entry was applied here, or is one of this journal's own.
func (s *Service) knows(ctx context.Context, e *audit.Entry, ref []byte) (bool, error) {
	s.mu.RLock()
	known := s.foreignSeen[string(ref)]
	s.mu.RUnlock()
	if known || s.isForeign(e) || len(e.Ref) == 0 {
		return known, nil
	}
	_, err := s.cfg.Journal.ByRef(ctx, e.Ref)
	if errors.Is(err, audit.ErrNotFound) { // lost in a restore
		return false, nil
	}
	if err != nil {
		return false, journalProblem(err)
	}
	return true, nil
}

// recordForeign journals the entry of that was received as or in f, unless it is there: the answer was lost, or it came in
// an earlier epoch of the other journal. It answers the object, and whether it has an effect.
func (s *Service) recordForeign(ctx context.Context, f, of *audit.Foreign, ref []byte) (body []byte, applied bool, err error) {
	e := &of.Record.Entry
	body = of.Payloads["object"]
	d := audit.Draft{
		Kind: audit.KindForeign, Actor: "peer/" + f.Node, Object: e.Object, Ref: ref, Unique: true, State: true,
		Fields: []audit.Field{
			text(fieldNode, of.Node), text(fieldEpoch, e.Epoch.String()), text(fieldLogEpoch, f.Epoch.String()),
			{Name: fieldSequence, Value: audit.Int(e.Sequence)}, octets(fieldLeaf, of.Record.LeafHash[:]), text(fieldKind, e.Kind),
		},
		Payloads: []audit.Attachment{{Name: payloadEntry, MediaType: entryMediaType, Data: of.Record.EntryDER}},
	}
	if of != f {
		d.Fields = append(d.Fields, text(fieldVia, f.Node), audit.Field{Name: fieldViaSequence, Value: audit.Int(f.Record.Sequence)})
	}
	if made, ok := Decided(e); ok {
		d.Fields = append(d.Fields, text(fieldObjectKind, made.Kind), text(fieldObjectID, made.Object), text(fieldIntent, made.Intent), text(fieldBody, made.Body),
			audit.Field{Name: fieldVersion, Value: audit.Int(made.Version)}, audit.Field{Name: fieldDecidedAt, Value: audit.Int(made.At.UnixMicro())})
	}
	list, older := s.foreignList(e, body)
	if list != nil {
		d.Fields = append(d.Fields, octets(fieldList, list))
	}
	if older {
		d.Fields = append(d.Fields, text(fieldEffect, effectOlder))
	} else {
		applied = true
		for _, p := range e.Payloads {
			d.Payloads = append(d.Payloads, audit.Attachment{Name: payloadsOf + p.Name, MediaType: p.MediaType, Data: of.Payloads[p.Name]})
		}
	}
	_, err = s.cfg.Journal.Append(ctx, d)
	if errors.Is(err, audit.ErrDuplicateRef) {
		var found []audit.Record
		if found, err = s.cfg.Journal.ByRef(ctx, ref); err == nil {
			applied = found[0].Entry.Text(fieldEffect) == ""
		}
	}
	if err != nil {
		return nil, false, journalProblem(err)
	}
	return body, applied, nil
}

const entryMediaType = "binary/vnd.yinjian.entry"

// replayForeign applies an entry that says that one of another campus was applied.
func (s *Service) replayForeign(ctx context.Context, e *audit.Entry, payload func(name string) ([]byte, error)) error {
	epoch, err := audit.ParseEpoch(e.Text(fieldLogEpoch))
	if err != nil {
		return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
	}
	seq, _ := e.Field(fieldSequence).(audit.Int)
	from, next := e.Text(fieldNode), uint64(seq)+1
	if via := e.Text(fieldVia); via != "" {
		n, _ := e.Field(fieldViaSequence).(audit.Int)
		from, next = via, uint64(n)+1
	}
	s.mu.Lock()
	s.foreignSeen[string(e.Ref)] = true
	s.cursors[logKey{from, epoch}] = next
	s.mu.Unlock()
	if e.Text(fieldEffect) != "" {
		return nil
	}
	of := func(string) ([]byte, error) { return payload(payloadsOf + "object") }
	if list, _ := e.Field(fieldList).(audit.Octets); len(list) > 0 {
		theirs := &audit.Entry{Node: e.Text(fieldNode), Kind: e.Text(fieldKind), Object: e.Object, Sequence: uint64(seq)}
		s.laterLists[string(list)] = laterList{theirs, of}
		return nil
	}
	der, err := payload(payloadEntry)
	if err != nil {
		return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
	}
	inner, err := audit.ParseEntry(der)
	if err != nil {
		return fmt.Errorf("account: entry %d: the entry of %s: %w", e.Sequence, e.Text(fieldNode), err)
	}
	var body []byte
	if hasObject(inner.Kind) {
		if body, err = of(""); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
	}
	return s.applyForeign(ctx, inner, body)
}

// applyForeign applies an entry of the other campus. One that cannot be applied, ever, freezes its object.
func (s *Service) applyForeign(ctx context.Context, e *audit.Entry, body []byte) error {
	err := s.returned(e, body)
	if err == nil {
		err = s.apply(ctx, e, body, nil)
	}
	switch code := problem.CodeOf(err); {
	case err == nil, errors.Is(err, errForked):
		return nil
	case code != problem.Internal, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err // the cipher machine is away
	}
	key, shared := objectOfEntry(e)
	if !shared {
		s.cfg.Log.WithError(err).WithFields(logrus.Fields{"object": e.Object, "kind": e.Kind}).Error("an entry of the other campus cannot be applied, and is left out")
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.freeze(key, fmt.Sprintf("设备 %s 的日志第 %d 条无法应用 (entry %d of %s cannot be applied): %v", e.Node, e.Sequence, e.Sequence, e.Node, err))
	return nil
}

// returned looks at a list of our own CA that comes back from the other campus, which may have had it before we were restored:
// it is our CA's, and has the number that it says. Later lists would have no effect beside one with a larger number.
func (s *Service) returned(e *audit.Entry, body []byte) error {
	if e.Kind != kindCRL || s.isForeign(e) {
		return nil
	}
	var list crlPayload
	if err := json.Unmarshal(body, &list); err != nil {
		return err
	}
	l, err := pki.ParseCRL(list.DER)
	if err != nil {
		return err
	}
	c := s.cfg.CAs[list.Algorithm]
	if c == nil || l.Number() == nil || !l.Number().IsInt64() || l.Number().Int64() != list.Number {
		return fmt.Errorf("account: entry %d of this appliance is no list of its CA", e.Sequence)
	}
	return l.CheckIssuer(c.Certificate())
}

// foreignList says which list an entry of the other campus has, as [fieldList] does, nil if it has none, and whether one
// that is as new is here: both campuses fetch the same lists.
func (s *Service) foreignList(e *audit.Entry, body []byte) (name []byte, older bool) {
	l, err := s.listIn(e, body)
	if l == nil || err != nil {
		return nil, false
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	key := s.listKey(l)
	sum := sm3.Sum([]byte(key))
	return sum[:], !s.newerList(key, l)
}

// newerList says whether the list takes the place of the one with its key. The caller holds s.mu.
func (s *Service) newerList(key string, l *foreignCRL) bool {
	had := s.foreign[key]
	return had == nil || !bytes.Equal(had.DER, l.DER) && !older(l.parsed, had.parsed)
}

// takeList takes a list of another CA, which those of the other campus's are too, if it is newer than the one here.
func (s *Service) takeList(e *audit.Entry, body []byte) error {
	l, err := s.listIn(e, body)
	if err != nil {
		return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if key := s.listKey(l); s.newerList(key, l) {
		s.foreign[key] = l
		s.indexLists()
		s.forgetStandings()
	}
	return nil
}

// listIn reads the list that an entry of the other campus has; nil if it has none. To us a list of its CAs is another CA's.
func (s *Service) listIn(e *audit.Entry, body []byte) (*foreignCRL, error) {
	l := new(foreignCRL)
	switch {
	case e.Kind == kindForeignCRL:
		if err := json.Unmarshal(body, l); err != nil {
			return nil, err
		}
		if err := l.parse(); err != nil {
			return nil, err
		}
		// A list that its CA has not signed would take the place of one that it has.
		s.mu.RLock()
		defer s.mu.RUnlock()
		issuer := s.intermediates[l.IssuerID]
		if a := s.anchors[l.IssuerID]; a != nil {
			issuer = a.cert
		}
		if issuer == nil {
			return nil, fmt.Errorf("account: list of the unknown CA %s", l.parsed.Issuer())
		}
		return l, l.parsed.CheckIssuer(issuer)
	case e.Kind == kindCRL && s.isForeign(e):
		var own crlPayload
		if err := json.Unmarshal(body, &own); err != nil {
			return nil, err
		}
		l.DER, l.Source = own.DER, "peer/"+e.Node
		if err := l.parse(); err != nil {
			return nil, err
		}
	default:
		return nil, nil
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	var issuer *smx509.Certificate
	for _, a := range s.anchors {
		if bytes.Equal(a.cert.RawSubject, l.parsed.RawIssuer()) && l.parsed.CheckIssuer(a.cert) == nil {
			issuer = a.cert
		}
	}
	if issuer == nil {
		return nil, fmt.Errorf("account: list of the unknown CA %s", l.parsed.Issuer())
	}
	l.Issuer, l.IssuerID, l.Number = l.parsed.Issuer(), fingerprint(issuer.Raw), pki.SerialHex(l.parsed.Number())
	l.ThisUpdate, l.NextUpdate = l.parsed.ThisUpdate().UTC(), l.parsed.NextUpdate().UTC()
	return l, nil
}

// chainOf answers what stands above an evaluation certificate: our CA, or the other campus's, which may have the same name.
// The caller holds s.mu.
func (s *Service) chainOf(leaf *smx509.Certificate, algorithm string) ([][]byte, error) {
	issued := func(c *smx509.Certificate) bool {
		return bytes.Equal(leaf.RawIssuer, c.RawSubject) && bytes.Equal(leaf.AuthorityKeyId, c.SubjectKeyId)
	}
	if c := s.cfg.CAs[algorithm]; c != nil && issued(c.Certificate()) {
		return s.chains[algorithm], nil
	}
	for _, a := range s.anchors {
		if a.Evaluation && issued(a.cert) {
			return [][]byte{a.Certificate}, nil
		}
	}
	return nil, fmt.Errorf("certificate of the unknown CA %s", leaf.Issuer)
}

// isForeign says whether an entry is of the other campus's journal.
func (s *Service) isForeign(e *audit.Entry) bool {
	return e.Node != "" && s.cfg.Node != "" && e.Node != s.cfg.Node
}

// A DirectoryState is what an administrator sees of the versions and of the other campus.
type DirectoryState struct {
	Peer  string     `json:"peer,omitempty"`  // the other appliance
	Heard *time.Time `json:"heard,omitempty"` // when its directory was last known to be wholly here
	AgeMS int64      `json:"age_ms,omitempty"`
	Stale bool       `json:"stale,omitempty"` // older than allowed: signing is refused
	// Objects counts those that have versions.
	Objects int      `json:"objects"`
	Frozen  []string `json:"frozen,omitempty"`
	// Waiting are objects of which a later version is here and an earlier one is not.
	Waiting []string `json:"waiting,omitempty"`
	// Open are the changes of which the centre has not said yet what became of them.
	Open []string `json:"open,omitempty"`
}

// State answers it. Only what is wrong is listed object by object.
func (s *Service) State() DirectoryState {
	var out DirectoryState
	age, ok := s.age()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if p := s.pairing; p != nil {
		heard := s.heard.UTC()
		out.Peer, out.Heard = p.Node, &heard
		if ok {
			out.AgeMS, out.Stale = age.Milliseconds(), p.MaxAge > 0 && age > p.MaxAge
		}
		for _, i := range s.openIntents {
			if i.shared && !s.underWay[i.id] {
				out.Open = append(out.Open, i.key.kind+" "+i.key.id)
			}
		}
	}
	out.Objects = len(s.objects)
	for key, o := range s.objects {
		switch {
		case o.frozen != "":
			out.Frozen = append(out.Frozen, fmt.Sprintf("%s %s：%s", key.kind, key.id, o.frozen))
		case len(o.waiting) > 0:
			out.Waiting = append(out.Waiting, fmt.Sprintf("%s %s：缺第 %d 版 (version %d is missing)", key.kind, key.id, o.version+1, o.version+1))
		}
	}
	slices.Sort(out.Frozen)
	slices.Sort(out.Waiting)
	slices.Sort(out.Open)
	return out
}

// An ObjectVersion is the state of one shared object.
type ObjectVersion struct {
	Kind    string    `json:"kind"`
	ID      string    `json:"id"`
	Version int64     `json:"version"`
	Node    string    `json:"node"` // whose change that version is
	At      time.Time `json:"at"`
	State   string    `json:"state"` // "", "waiting" or "frozen"
}

// Versions lists the shared objects, by kind and id.
func (s *Service) Versions() []ObjectVersion {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []ObjectVersion
	for key, o := range s.objects {
		v := ObjectVersion{Kind: key.kind, ID: key.id, Version: o.version, Node: o.node, At: o.at}
		switch {
		case o.frozen != "":
			v.State = "frozen"
		case len(o.waiting) > 0:
			v.State = "waiting"
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b ObjectVersion) int { return strings.Compare(a.Kind+"\x00"+a.ID, b.Kind+"\x00"+b.ID) })
	return out
}
