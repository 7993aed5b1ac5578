package account

import (
	"context"
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
	for owner, keys := range s.held {
		for _, k := range keys {
			r := KeyRecord{Owner: owner, Label: k.label, Algorithm: k.algorithm, Class: k.class, Node: k.node, Public: custody.Fingerprint(k.spki), Born: k.born, Destroyed: k.destroyed}
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
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b KeyRecord) int {
		return strings.Compare(a.Owner+"\x00"+a.Label, b.Owner+"\x00"+b.Label)
	})
	return out
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
// Order: 1. the intent; 2. the cipher machine; 3. the outcome. After a stop in between, ask again.
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
	i, err := s.intend(ctx, audit.Draft{Kind: kindDestroyIntent, Actor: actor, Object: key.owner, Fields: []audit.Field{text("label", label)}}, "destroy", "")
	if err != nil {
		return err
	}
	if key.wrapped == nil {
		if err := s.cfg.Slots[key.class].DestroyKey(ctx, label); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
			return hsmProblem(err)
		}
	}
	d := audit.Draft{Kind: kindDestroyed, Actor: actor, Object: key.owner, Fields: []audit.Field{
		text("intent", i.id), text("act", "destroy"), text("label", label), text("reason", reason), boolean("custody", key.wrapped != nil),
	}}
	return s.conclude(ctx, d, i.ref, &destruction{key.owner, label, reason}, nil)
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
