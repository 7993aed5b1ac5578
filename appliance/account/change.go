package account

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// Kinds of the directory's entries.
const (
	kindApplicationIntent = "account.application/intent"
	kindApplication       = "account.application/outcome"
	kindSignerIntent      = "account.signer/intent"
	kindSigner            = "account.signer/outcome"
	kindRevokeIntent      = "account.revocation/intent"
	kindRevoke            = "account.revocation/outcome"
	kindCRL               = "ca.crl/outcome"
	kindAnchor            = "trust.anchor/outcome"
	kindIntermediates     = "trust.intermediates/outcome"
	kindForeignCRL        = "trust.crl/outcome" // of a CA that is not ours
	kindRequestIntent     = "certificate.request/intent"
	kindRequest           = "certificate.request/outcome"
	kindImport            = "certificate.import/outcome"
	kindDestroyIntent     = "key.destruction/intent"
	kindDestroyed         = "key.destruction/outcome"
	kindErased            = "key.erasure/outcome" // the cipher machine has it no more
	kindCeremony          = "custody.ceremony/outcome"
	kindInterrupted       = "account.interrupted/outcome" // closes an intent without its change
	kindWithdrawn         = "account.withdrawn/outcome"   // takes the reference of an outcome that was not written
	kindFilled            = "account.filled/outcome"      // versions of an object without a change of their own
	kindChangeIntent      = "account.change/intent"       // of a change that has no other intent, when two campuses decide on it
	kindPINFailed         = "consent.pin/failed"
	kindRecoveryFailed    = "custody.recovery/failed"
	kindGrant             = "consent.authorization/granted"
)

func isIntent(kind string) bool {
	switch kind {
	case kindApplicationIntent, kindSignerIntent, kindAdministratorIntent, kindRevokeIntent, kindRequestIntent, kindDestroyIntent, kindChangeIntent:
		return true
	}
	return false
}

// An intent is a change that was announced.
type intent struct {
	kind, object string
	id           string        // hex of ref
	keyPrefix    string        // of the labels of keys that the change makes
	slot         hsm.SlotClass // where it makes them
	ref          []byte        // 32 bytes, the reference of the outcome's entry; nil in one that was replayed
	key          objectKey     // if it is shared
	shared       bool          // the two campuses decide on it
}

// A doubt is an outcome of which the journal did not say whether it was written.
type doubt struct {
	ref          []byte
	kind, object string
	body, appKey []byte
}

// beginChange waits until no other change is under way: version = last + 1. It also finds out what became of an outcome
// that is in doubt; until that is known nothing changes, or the next change could carry a version that is taken, and the
// directory could not be replayed at the next start. Where there is another campus, the objects that will be changed are
// made sure of; whoever learns later which they are calls current then.
func (s *Service) beginChange(ctx context.Context, objects ...objectKey) (unlock func(), err error) {
	unlock, err = s.changes.Lock(ctx, "")
	if err != nil {
		return nil, journalProblem(err)
	}
	s.mu.Lock()
	clear(s.base)
	s.mu.Unlock()
	err = s.resolve(ctx)
	for i := 0; i < len(objects) && err == nil; i++ {
		err = s.current(ctx, objects[i])
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// resolve settles s.doubts by appending for each an entry that withdraws the outcome, under the same reference. Only one of the
// two can be in the journal, and the journal writes in order: if ours is taken, the outcome is not there and never will
// be; if ours is a duplicate, what is there decides, and is applied. The intent of a withdrawn outcome stays open until
// it is settled.
func (s *Service) resolve(ctx context.Context) error {
	for len(s.doubts) > 0 {
		if err := s.resolveOne(ctx, s.doubts[0]); err != nil {
			return err
		}
		s.doubts = s.doubts[1:]
	}
	return nil
}

func (s *Service) resolveOne(ctx context.Context, d *doubt) error {
	s.order.RLock()
	defer s.order.RUnlock()
	r, err := s.cfg.Journal.Append(ctx, audit.Draft{
		Kind: kindWithdrawn, Actor: "appliance", Object: d.object, Ref: d.ref, Unique: true, State: true,
		Fields: []audit.Field{text("of", d.kind)},
	})
	entry := &r.Entry
	if errors.Is(err, audit.ErrDuplicateRef) {
		var found []audit.Record
		if found, err = s.cfg.Journal.ByRef(ctx, d.ref); err == nil {
			entry = &found[0].Entry
		}
	}
	if err != nil {
		return journalProblem(err) // still in doubt
	}
	if err := s.apply(ctx, entry, d.body, d.appKey); err != nil && !errors.Is(err, errForked) {
		return err
	}
	if err := s.doom(entry, d.body); err != nil {
		return err
	}
	if entry.Kind != d.kind {
		s.discard(errWithdrawn, d.body)
	}
	s.cfg.Log.WithFields(logrus.Fields{"object": d.object, "kind": d.kind, "done": entry.Kind == d.kind}).Warning("a change whose outcome was in doubt is settled")
	return nil
}

var errWithdrawn = errors.New("account: the change was withdrawn, since nobody could say whether it was written")

// discard gives account of what was signed for a change that did not come about; of nothing when there was no signature.
func (s *Service) discard(reason error, object []byte) {
	if s.cfg.Discarded != nil && object != nil {
		s.cfg.Discarded(reason, object)
	}
}

// newRef is 256 random bits.
func newRef() ([]byte, error) {
	b := make([]byte, 32)
	_, err := rand.Read(b)
	return b, err
}

// intend journals that a change is about to be made.
func (s *Service) intend(ctx context.Context, d audit.Draft, act, keyPrefix string) (intent, error) {
	i, err := newIntent(&d, act, keyPrefix)
	if err != nil {
		return i, err
	}
	return i, s.note(ctx, d)
}

// newIntent draws an intent and writes it into the draft.
func newIntent(d *audit.Draft, act, keyPrefix string) (intent, error) {
	ref, err := newRef()
	if err != nil {
		return intent{}, err
	}
	i := intent{kind: d.Kind, object: d.Object, id: hex.EncodeToString(ref), keyPrefix: keyPrefix, ref: ref}
	d.Fields = append(d.Fields, text("intent", i.id), text("act", act))
	if keyPrefix != "" {
		d.Fields = append(d.Fields, text("key_prefix", keyPrefix))
	}
	return i, nil
}

// note appends a change of state that has no object and applies it.
func (s *Service) note(ctx context.Context, d audit.Draft) error {
	d.State = true
	r, err := s.cfg.Journal.Append(ctx, d)
	if err != nil {
		return journalProblem(err)
	}
	return s.apply(ctx, &r.Entry, nil, nil)
}

// conclude appends the outcome of a change, with the whole new object as its payload, and applies it: the entry is
// durable before the directory changes. The object must be one that apply takes; after that nothing may fail. When the
// journal cannot say whether it is written, the outcome is in doubt: see [Service.resolve]. appKey is the derived key
// of an application, nil for other objects. ref is the intent's, or 32 random bytes. The caller holds s.changes.
func (s *Service) conclude(ctx context.Context, d audit.Draft, ref []byte, object any, appKey []byte) error {
	doubt, err := s.record(ctx, d, ref, object, appKey)
	if doubt != nil {
		s.doubts = append(s.doubts, doubt)
	}
	if errors.Is(err, errLost) || errors.Is(err, errLast) {
		if serr := s.settle(ctx); serr != nil {
			s.cfg.Log.WithError(serr).Warning("what is left of a change that was not made could not be cleared away")
		}
	}
	return err
}

// record is conclude for those who conclude several changes at once: what is in doubt is theirs to remember.
func (s *Service) record(ctx context.Context, d audit.Draft, ref []byte, object any, appKey []byte) (*doubt, error) {
	body, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	changed, err := audit.Changed(s.before(d.Kind, d.Object, object), object)
	if err != nil {
		return nil, err
	}
	d.Fields = append(d.Fields, changed...)
	key, shared := objectOf(d.Kind, d.Object)
	c := s.centre()
	if shared = shared && c != nil; shared {
		version, err := s.decide(ctx, c, key, &d, ref, body)
		if a, is := object.(*Administrator); is && err == nil {
			err = s.replaced(ctx, c, a)
		}
		if err != nil {
			s.discard(err, body)
			return nil, err
		}
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordLimit)
		defer cancel()
		ctx = limited
		s.order.RLock()
		defer s.order.RUnlock()
		s.mu.RLock()
		have := s.objects[key].known().version
		s.mu.RUnlock()
		if thaw, _ := draftField(&d, fieldThaws).(audit.Bool); version != have+1 && !(bool(thaw) && version > have) { // an outcome of the other campus came for it, whatever the centre says
			s.discard(errLost, body)
			return nil, errLost
		}
	}
	d.State, d.Unique, d.Ref = true, true, ref
	d.Payloads = append(d.Payloads, audit.Attachment{Name: "object", MediaType: "application/json", Data: body})
	r, err := s.cfg.Journal.Append(ctx, d)
	if err != nil {
		if !notWritten(err) {
			return &doubt{ref: d.Ref, kind: d.Kind, object: d.Object, body: body, appKey: appKey}, journalProblem(err)
		}
		s.discard(err, body)
		return nil, journalProblem(err)
	}
	if err := s.apply(ctx, &r.Entry, body, appKey); err != nil {
		return nil, err
	}
	if err := s.doom(&r.Entry, body); err != nil {
		return nil, err
	}
	if shared {
		s.mu.Lock()
		s.base[key]++
		s.mu.Unlock()
	}
	return nil, nil
}

// before is what the directory has of the object of an outcome, for the change log; nil: nothing. after is the payload.
func (s *Service) before(kind, object string, after any) any {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch after := after.(type) {
	case *Application:
		return s.applications[after.ID]
	case *Signer:
		return s.signers[after.ID]
	case *Administrator:
		return s.administrators[after.ID]
	case *Anchor:
		return s.anchors[after.ID]
	case *foreignCRL:
		return s.foreign[s.listKey(after)]
	case *crlPayload:
		if l := s.crls[object]; l != nil {
			return crlPayload{object, l.Number, l.ThisUpdate, l.NextUpdate, l.DER}
		}
	case *revocation:
		return map[string]any{"serial": after.Serial, "status": s.certificates[after.Serial].Status}
	case *intermediates:
		return map[string]any{"known": len(s.intermediates)}
	case *Request:
		if k := s.heldKey(object, after.Label); k != nil {
			return k.request
		}
	case *imported:
		serials := []string{}
		if k := s.heldKey(object, after.Label); k != nil {
			for _, c := range k.certs {
				serials = append(serials, pki.SerialHex(c.leaf().SerialNumber))
			}
		}
		return map[string]any{"label": after.Label, "certificates": serials}
	case *destruction:
		return map[string]any{"owner": after.Owner, "label": after.Label, "state": "present"}
	}
	return nil
}

// heldKey is a key by owner and label, nil if there is none. The caller holds s.mu.
func (s *Service) heldKey(owner, label string) *heldKey {
	for _, k := range s.held[owner] {
		if k.label == label {
			return k
		}
	}
	return nil
}

// wasThawed says whether the object had a fork: the two campuses' counts in the object itself differ since. The caller holds s.mu.
func (s *Service) wasThawed(key objectKey) bool { return s.objects[key].known().thawed > 0 }

// draftField is a draft's field, nil if it has none of that name.
func draftField(d *audit.Draft, name string) any {
	for _, f := range d.Fields {
		if f.Name == name {
			return f.Value
		}
	}
	return nil
}

// notWritten reports whether an error of Append means that nothing was or will be written. All others are taken to leave
// it open; finding out later that nothing was written costs one entry.
func notWritten(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, audit.ErrInvalidDraft) || errors.Is(err, audit.ErrClosed)
}

// Replay applies one entry of the directory. The caller has checked that entry and payload belong to the journal, and
// gives all changes of state in their order, then calls [Service.Settle]. Daily work goes the same way after its entry is durable.
func (s *Service) Replay(ctx context.Context, e *audit.Entry, payload func(name string) ([]byte, error)) error {
	if e.Kind == audit.KindForeign {
		return s.replayForeign(ctx, e, payload)
	}
	if list, _ := e.Field(fieldList).(audit.Octets); e.Kind == kindForeignCRL && len(list) > 0 {
		s.laterLists[string(list)] = laterList{e, payload}
		return nil
	}
	var body []byte
	if hasObject(e.Kind) {
		var err error
		if body, err = payload("object"); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
	}
	if err := s.apply(ctx, e, body, nil); err != nil && !errors.Is(err, errForked) {
		return err
	}
	return s.doom(e, body)
}

func hasObject(kind string) bool {
	switch kind {
	case kindApplication, kindSigner, kindAdministrator, kindRevoke, kindCRL, kindAnchor, kindIntermediates, kindForeignCRL, kindRequest, kindImport, kindDestroyed:
		return true
	}
	return false
}

// apply changes the directory as an entry says, ours or the other campus's, and as those say that waited for it. appKey
// spares the derivation of an application's key.
func (s *Service) apply(ctx context.Context, e *audit.Entry, body, appKey []byte) error {
	if e.Kind == kindCRL && s.isForeign(e) || e.Kind == kindForeignCRL {
		return s.takeList(e, body)
	}
	if err := s.applyOne(ctx, e, body, appKey); err != nil {
		return err
	}
	key, shared := objectOfEntry(e)
	if !shared {
		return nil
	}
	for w := s.waited(key); w != nil; w = s.waited(key) {
		if err := s.applyForeign(ctx, &w.entry, w.body); err != nil {
			return err
		}
	}
	return nil
}

func (s *Service) applyOne(ctx context.Context, e *audit.Entry, body, appKey []byte) error {
	// 1. Read, and ask the cipher machine, before any lock is taken.
	var app Application
	var signer Signer
	var revoked revocation
	var list crlPayload
	object := map[string]any{kindApplication: &app, kindSigner: &signer, kindRevoke: &revoked, kindCRL: &list}[e.Kind]
	trust := newTrustObject(e.Kind)
	if trust != nil {
		object = trust
	}
	if object != nil {
		if err := json.Unmarshal(body, object); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
	}
	if id, ok := bodyID(e.Kind, &app, &signer, &revoked, trust); ok && id != e.Object {
		return fmt.Errorf("account: entry %d is about %s, and has the object %s", e.Sequence, e.Object, id)
	}
	if s.isForeign(e) && e.Kind == kindApplication {
		app.ownedBy(e.Node)
	} else if s.isForeign(e) && e.Kind == kindSigner {
		signer.ownedBy(e.Node)
	} else if a, ok := trust.(*Administrator); ok && s.isForeign(e) {
		a.ownedBy(e.Node)
	}
	var parsed *pki.CRL
	switch e.Kind {
	case kindApplication:
		if old, key, ok := s.Application(app.ID); appKey == nil && ok && string(old.KeySalt) == string(app.KeySalt) {
			appKey = key
		}
		if appKey == nil {
			var err error
			if appKey, err = s.macs.applicationKey(ctx, &app); isElsewhere(err) { // it is known here, and nobody can prove to be it
				s.cfg.Log.WithError(err).WithField("object", app.ID).Warning("an application's key cannot be derived here")
			} else if err != nil {
				return fmt.Errorf("account: application %s: deriving its key: %w", app.ID, err)
			}
		}
	case kindCRL:
		var err error
		if parsed, err = pki.ParseCRL(list.DER); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
	}
	if trust != nil {
		if err := trust.parse(); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
	}
	// 2. Change.
	changed, err := s.set(e, body, &app, appKey, &signer, &revoked, &list, parsed, trust)
	if err != nil || !changed {
		return err
	}
	// 3. Void what was allowed before. A grant that is being made looks at the directory again under the same lock that
	// is taken here, so none slips through between.
	switch {
	case e.Kind == kindSigner:
		s.consents.dropSigner(signer.ID)
		s.dropTokenSealed(signer.ID)
	case e.Kind == kindDestroyed:
		id := strings.TrimPrefix(e.Object, signerOwner)
		s.consents.dropSigner(id)
		s.dropTokenSealed(id)
	case e.Kind == kindApplication && app.Stopped:
		s.consents.dropApplication(app.ID)
	}
	return nil
}

// bodyID is what an entry's object is about. In an entry of ours it is what the entry says; in one that the other campus sends it
// has to be, or its versions would be counted for one object while another changes, one of this appliance alone perhaps.
func bodyID(kind string, app *Application, g *Signer, revoked *revocation, trust trustObject) (id string, ok bool) {
	switch kind {
	case kindApplication:
		return app.ID, true
	case kindSigner:
		return g.ID, true
	case kindRevoke:
		return revoked.Serial, true
	}
	switch t := trust.(type) {
	case *Administrator:
		return t.ID, true
	case *Anchor:
		return t.ID, true
	case *Request:
		return t.Owner, true
	case *imported:
		return t.Owner, true
	case *destruction:
		return t.Owner, true
	}
	return "", false
}

// set changes the directory, unless the entry waits for another.
func (s *Service) set(e *audit.Entry, body []byte, app *Application, appKey []byte, g *Signer, revoked *revocation, list *crlPayload, parsed *pki.CRL, trust trustObject) (changed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key, changed, err := s.placed(e, body)
	if changed {
		err = s.setOne(e, app, appKey, g, revoked, list, parsed, trust)
	}
	if id := e.Text("intent"); id != "" {
		if isIntent(e.Kind) {
			_, shared := objectOfEntry(e)
			s.openIntents[id] = intent{kind: e.Kind, object: e.Object, id: id, keyPrefix: e.Text("key_prefix"), slot: slotOf(e), key: key, shared: shared}
		} else {
			delete(s.openIntents, id)
		}
	}
	return changed, err
}

// setOne changes the directory. The caller holds s.mu.
func (s *Service) setOne(e *audit.Entry, app *Application, appKey []byte, g *Signer, revoked *revocation, list *crlPayload, parsed *pki.CRL, trust trustObject) error {
	if trust != nil {
		if err := trust.set(s, e); err != nil {
			return err
		}
	}
	switch e.Kind {
	case kindAnchor, kindCRL, kindRevoke:
		defer s.forgetStandings()
	}
	switch e.Kind {
	case kindApplication:
		if old := s.applications[app.ID]; !s.wasThawed(applicationObject(app.ID)) && ((old == nil && app.Version != 1) || (old != nil && app.Version != old.Version+1)) {
			return fmt.Errorf("account: entry %d: application %s has version %d out of order", e.Sequence, app.ID, app.Version)
		}
		s.applications[app.ID], s.appKeys[app.ID] = app, appKey
	case kindSigner:
		if old := s.signers[g.ID]; !s.wasThawed(signerObject(g.ID)) && ((old == nil && g.Version != 1) || (old != nil && g.Version != old.Version+1)) {
			return fmt.Errorf("account: entry %d: signer %s has version %d out of order", e.Sequence, g.ID, g.Version)
		}
		if err := s.holdSigner(g, entryTime(e)); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
		s.reholdSealed(g)
		s.signers[g.ID], s.signerOrder = g, ordered(s.signerOrder, g.ID)
		if set, _ := e.Field("pin_set").(audit.Bool); bool(set) {
			delete(s.pinFailures, g.ID)
		}
	case kindRevoke:
		c := s.certificates[revoked.Serial]
		if c == nil && s.isForeign(e) {
			s.revokedEarly[revoked.Serial] = revoked
			return nil
		}
		if c == nil {
			return fmt.Errorf("account: entry %d revokes unknown certificate %s", e.Sequence, revoked.Serial)
		}
		s.certificates[revoked.Serial] = c.revoked(revoked)
	case kindCRL:
		if old := s.crls[list.Algorithm]; old != nil && old.Number >= list.Number {
			return nil // lost in a restore, and there is a newer one
		}
		s.crls[list.Algorithm] = &CRL{Number: list.Number, DER: list.DER, ThisUpdate: list.ThisUpdate, NextUpdate: list.NextUpdate, Parsed: parsed}
		s.indexLists()
	case kindPINFailed:
		s.countWrongPIN(e.Text("application"), e.Object)
	case kindGrant:
		delete(s.pinFailures[e.Object], e.Text("application"))
	case kindLoginFailed:
		s.countFailedLogin(e)
	case kindLogin:
		delete(s.loginFailures, e.Object)
	}
	return nil
}

// Settle closes intents that a stop or a failure left open: keys that an interrupted enrolment made are destroyed
// (nothing was ever signed with them: no certificate of theirs was given out), and an outcome says so. Call it after
// the replay, which it completes; it is also called before each enrolment, so that a long-running appliance leaves no keys about.
func (s *Service) Settle(ctx context.Context) error {
	if err := s.replayLists(ctx); err != nil {
		return err
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.settle(ctx)
}

func (s *Service) settle(ctx context.Context) error {
	s.mu.RLock()
	open := make([]intent, 0, len(s.openIntents))
	for _, i := range s.openIntents {
		if !s.underWay[i.id] {
			open = append(open, i)
		}
	}
	if len(open) == 0 {
		s.mu.RUnlock()
		return nil
	}
	used := map[string]bool{}
	for _, keys := range s.held {
		for _, k := range keys {
			used[k.label] = true
		}
	}
	s.mu.RUnlock()
	sort.Slice(open, func(i, j int) bool { return open[i].id < open[j].id })
	listed := map[hsm.SlotClass][]hsm.KeyInfo{}
	c, away := s.centre(), false
	for _, i := range open {
		if i.shared && away { // one wait for a centre that does not answer is enough: other changes wait behind this
			continue
		}
		if i.shared && c != nil {
			if err := s.fill(ctx, c, i); err != nil { // its object stays as it is until the centre answers
				s.cfg.Log.WithError(err).WithFields(logrus.Fields{"object": i.object, "intent": i.id}).Warning("what became of a change is not known yet")
				away = problem.CodeOf(err) == problem.CentreUnavailable
				continue
			}
		}
		var destroyed []string
		if i.keyPrefix != "" {
			token := s.cfg.Slots[i.slot]
			if token == nil {
				return fmt.Errorf("account: settling intent %s: no %s slot", i.id, i.slot)
			}
			keys, ok := listed[i.slot]
			if !ok { // once for all: of thousands of keys the list takes long
				var err error
				if keys, err = token.Keys(ctx); err != nil {
					return fmt.Errorf("account: settling intent %s: %w", i.id, hsmProblem(err))
				}
				listed[i.slot] = keys
			}
			seen := map[string]bool{}
			for _, k := range keys {
				// A key that somebody holds is never touched, whatever an intent says.
				if !strings.HasPrefix(k.Label, i.keyPrefix) || seen[k.Label] || used[k.Label] {
					continue
				}
				seen[k.Label] = true
				if err := token.DestroyKey(ctx, k.Label); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
					return fmt.Errorf("account: settling intent %s: key %s: %w", i.id, k.Label, hsmProblem(err))
				}
				destroyed = append(destroyed, k.Label)
			}
		}
		// If the answer is lost the intent may be closed twice, which does no harm.
		err := s.note(ctx, audit.Draft{Kind: kindInterrupted, Actor: "appliance", Object: i.object, Fields: []audit.Field{
			text("intent", i.id), text("of", i.kind), text("destroyed_keys", strings.Join(destroyed, " ")),
		}})
		if err != nil {
			return fmt.Errorf("account: settling intent %s: %w", i.id, err)
		}
		s.cfg.Log.WithFields(logrus.Fields{"object": i.object, "intent": i.id, "kind": i.kind}).Warning("an interrupted change was closed")
	}
	return nil
}

// slotOf is where the keys of an intent are; entries of before there was a choice do not say.
func slotOf(e *audit.Entry) hsm.SlotClass {
	if slot := e.Text("slot"); slot != "" {
		return hsm.SlotClass(slot)
	}
	return hsm.Staff
}
