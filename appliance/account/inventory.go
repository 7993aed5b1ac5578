package account

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"yinjian/appliance/audit"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// A KeyRecord is what the directory knows of one key pair.
type KeyRecord struct {
	Owner, Label, Algorithm string
	Class                   hsm.SlotClass // "" for a key in a file
	KEK                     string        // of a custody key
	Node                    string        // of a resident key in another appliance's cipher machine, whose that is; else ""
	Public                  string        // fingerprint of its SubjectPublicKeyInfo
	Born                    time.Time     // when the journal has it from
	Activated, Due          time.Time     // when its first certificate began and its last one ends; zero without any
	Destroyed               time.Time     // zero: it was not
}

// KeyRecords lists every key pair that the directory knows, by owner and label, those that were destroyed too.
func (s *Service) KeyRecords() []KeyRecord {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []KeyRecord
	for _, keys := range s.held {
		for _, k := range keys {
			out = append(out, k.record())
		}
	}
	slices.SortFunc(out, func(a, b KeyRecord) int {
		return strings.Compare(a.Owner+"\x00"+a.Label, b.Owner+"\x00"+b.Label)
	})
	return out
}

func (k *heldKey) record() KeyRecord {
	r := KeyRecord{Owner: k.owner, Label: k.label, Algorithm: k.algorithm, Class: k.class, Node: k.node, Public: custody.Fingerprint(k.spki), Born: k.born, Destroyed: k.destroyed}
	if k.signer != nil {
		r.Class = ""
	}
	if k.wrapped != nil {
		r.KEK = k.wrapped.KEK
	}
	for _, c := range k.certs {
		if begins := c.leaf().NotBefore; r.Activated.IsZero() || begins.Before(r.Activated) {
			r.Activated = begins
		}
		if ends := c.leaf().NotAfter; ends.After(r.Due) {
			r.Due = ends
		}
	}
	if r.Born.IsZero() {
		r.Born = r.Activated // made with the appliance's identity
	}
	return r
}

// entryTime is an entry's time, which is trusted or says in the entry that it was not.
func entryTime(e *audit.Entry) time.Time { return time.UnixMicro(e.Time.Micros).UTC() }

// A destruction is the payload of a destroyed key's outcome.
type destruction struct {
	Owner  string `json:"owner"`
	Label  string `json:"label"`
	Reason string `json:"reason"`
}

func (d *destruction) parse() error { return nil }

func (d *destruction) set(s *Service, e *audit.Entry) error {
	old := s.heldKeyOf(d.Owner, d.Label)
	if old == nil {
		return errors.New("account: a key that nobody knows was destroyed: " + d.Label)
	}
	k := *old
	k.destroyed, k.wrapped, k.request = entryTime(e), destroyedWrapped(old.wrapped), nil
	s.hold(&k)
	if id := strings.TrimPrefix(d.Owner, signerOwner); old.wrapped != nil && s.signers[id] != nil {
		g := *s.signers[id] // later entries do not repeat what could be opened
		g.Keys = slices.Clone(g.Keys)
		if g.Sealing != nil {
			l := *g.Sealing
			l.Keys = maps.Clone(l.Keys)
			delete(l.Keys, d.Label)
			g.Sealing = &l
		}
		for i := range g.Keys {
			if g.Keys[i].Label == d.Label {
				g.Keys[i].Wrapped = k.wrapped
			}
		}
		s.signers[id] = &g
	}
	return nil
}

// destroyedWrapped keeps the name of the wrapping key and nothing that could be opened.
func destroyedWrapped(w *Wrapped) *Wrapped {
	if w == nil {
		return nil
	}
	return &Wrapped{KEK: w.KEK}
}

// DestroyKey destroys a signer's key that is not needed any more: one that another has taken the place of, or of a signer
// who was stopped. Signatures made with it stay valid. A resident key is destroyed in the cipher machine; of a custody key
// the directory forgets it, while the journal, which forgets nothing, keeps the sealed blob: it opens with a PIN that the
// signer had while it lived, the cipher machine and its wrapping key together, and with nothing less. Live authorisations are void.
//
// Order: 1. the intent; 2. the outcome, which the centre decides on where there is another campus; 3. the cipher machine;
// 4. an entry that it is done. The machine comes after the decision, since what it does cannot be undone: a change that the
// other campus wins, its starting the signer again perhaps, must find the key. After a stop between 2 and 4 the key is in
// the machine, and nobody uses it: [Service.Erase] goes on. After one before 2, ask again.
func (s *Service) DestroyKey(ctx context.Context, actor, label, reason string) error {
	if err := checkReason(reason); err != nil {
		return err
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	key := s.signerKey(label)
	if key != nil {
		if err := s.currentOwner(ctx, key.owner); err != nil {
			return err
		}
		key = s.signerKey(label)
	}
	if key == nil {
		return problem.New(problem.KeyUnknown, "没有此标签的签名人密钥 (no signer's key has this label)", "标签见 yinjian hsm keys；设备自身的密钥不能在此销毁 (see hsm keys; the appliance's own keys are not destroyed here)")
	}
	if key.node != "" {
		return problem.New(problem.KeyElsewhere, fmt.Sprintf("密钥在设备 %s 的密码机内，不能在此销毁 (the key is in the cipher machine of %s; it cannot be destroyed here)", key.node, key.node), "在该院区销毁 (destroy it there)")
	}
	id := strings.TrimPrefix(key.owner, signerOwner)
	g, _ := s.Signer(id)
	if !g.Stopped && !s.cfg.Clock.Now().Trusted() {
		return untrustedTime("which key is the present one")
	}
	if used, _, err := s.choose(key.owner, key.algorithm); !g.Stopped && (err != nil || used.label == label) {
		return problem.New(problem.Forbidden, "这是签名人现用的密钥 (the signer's present key)",
			"先换发新密钥并待其生效，或停用签名人 (have another take its place, or stop the signer)")
	}
	if key.wrapped == nil { // a machine that does not answer now would not destroy it either
		if _, err := s.cfg.Slots[key.class].FindKey(ctx, label); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
			return hsmProblem(err)
		}
	}
	i, err := s.intend(ctx, audit.Draft{Kind: kindDestroyIntent, Actor: actor, Object: key.owner, Fields: []audit.Field{text("label", label)}}, "destroy", "")
	if err != nil {
		return err
	}
	d := audit.Draft{Kind: kindDestroyed, Actor: actor, Object: key.owner, Fields: []audit.Field{
		text("intent", i.id), text("act", "destroy"), text("label", label), text("reason", reason), boolean("custody", key.wrapped != nil),
	}}
	if err := s.conclude(ctx, d, i.ref, &destruction{key.owner, label, reason}, nil); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), keyLimit)
	defer cancel()
	if err := s.erase(limited); err != nil && !slices.Contains(s.Doomed(), label) {
		s.cfg.Log.WithError(err).Warning("other destroyed keys are in the cipher machine still")
	} else if err != nil {
		return problem.New(problem.HSMUnavailable, "密钥已记为销毁，不会再用；密码机尚未删除它，设备会自动再试 (recorded as destroyed and used no more; the cipher machine has not deleted it yet, which is tried again)",
			"查看 yinjian hsm keys，直到其状态为 destroyed (look at hsm keys until its state is destroyed)").With(err)
	}
	return nil
}

// doom remembers what the cipher machine has to destroy after an outcome of this appliance's own journal, until another entry says
// that it has. What the other campus sends, as its own or as this appliance's from before a restore, destroys nothing here.
func (s *Service) doom(e *audit.Entry, body []byte) error {
	switch e.Kind {
	case kindErased:
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.doomed, e.Text("label"))
		return nil
	case kindDestroyed:
	default:
		return nil
	}
	var d destruction
	if err := json.Unmarshal(body, &d); err != nil {
		return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.heldKey(d.Owner, d.Label); k != nil && !k.destroyed.IsZero() && k.wrapped == nil && k.signer == nil && k.node == "" {
		s.doomed[d.Label] = k
	}
	return nil
}

// Erase has the cipher machine destroy keys that the directory has as destroyed, of which no entry says yet that it has: a
// stop came between, or the machine did not answer. Every machine that may hold a copy must be at work.
func (s *Service) Erase(ctx context.Context) error {
	unlock, err := s.changes.Lock(ctx, "")
	if err != nil {
		return journalProblem(err)
	}
	defer unlock()
	return s.erase(ctx)
}

// erase is Erase. One that cannot be destroyed keeps no other from it; each is in the error. The caller holds s.changes.
func (s *Service) erase(ctx context.Context) error {
	s.mu.RLock()
	doomed := slices.Collect(maps.Values(s.doomed))
	s.mu.RUnlock()
	slices.SortFunc(doomed, func(a, b *heldKey) int { return strings.Compare(a.label, b.label) })
	var left []error
	for _, k := range doomed {
		token := s.cfg.Slots[k.class]
		if token == nil {
			left = append(left, fmt.Errorf("account: destroying key %s: no %s slot", k.label, k.class))
			continue
		}
		if err := token.DestroyKey(ctx, k.label); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
			left = append(left, fmt.Errorf("account: destroying key %s: %w", k.label, hsmProblem(err)))
			continue
		}
		// If the answer is lost it is said twice, which does no harm.
		done := audit.Draft{Kind: kindErased, Actor: "appliance", Object: k.owner, State: true, Fields: []audit.Field{text("label", k.label)}}
		r, err := s.cfg.Journal.Append(ctx, done)
		if err != nil { // nor would it take the next
			return errors.Join(append(left, journalProblem(err))...)
		}
		if err := s.doom(&r.Entry, nil); err != nil {
			return errors.Join(append(left, err)...)
		}
	}
	return errors.Join(left...)
}

// Doomed are the labels of keys that [Service.Erase] has to do with.
func (s *Service) Doomed() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Sorted(maps.Keys(s.doomed))
}

// signerKey answers a signer's key by its label, nil if there is none any more.
func (s *Service) signerKey(label string) *heldKey {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for owner, keys := range s.held {
		for _, k := range keys {
			if k.label == label && useOf(owner) == UseStaff && k.destroyed.IsZero() {
				return k
			}
		}
	}
	return nil
}
