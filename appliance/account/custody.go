package account

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/pbkdf2"

	"yinjian/appliance/audit"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// A CustodyPolicy says that new staff keys are custody keys: on no token, wrapped under a key of the cipher machine, and
// sealed to the signer.
type CustodyPolicy struct {
	KEK string // CKA_LABEL of the wrapping key in the staff slot
	// Officers is the public point (65 bytes) of those who together open what is sealed under a forgotten PIN; nil: nobody
	// can, and a signer who forgets the PIN needs new keys.
	Officers []byte
	// CampusMACs has what is new derived with the MAC keys that the wrapping key's ceremony made, which every campus has.
	CampusMACs bool
}

// A Sealing guards a signer's custody keys: each is sealed to Point, and what opens them is sealed under a key that is
// HMAC-SM3 in the cipher machine over the stretched PIN, and to the officers.
type Sealing struct {
	Point      []byte `json:"point"` // SM2, uncompressed
	Salt       []byte `json:"salt"`
	Iterations int    `json:"iterations"`
	// PIN says that the signer's PIN is needed. Without one the cipher machine alone suffices: the signer has no PIN, and an
	// application vouches for consent.
	PIN      bool    `json:"pin"`
	Private  []byte  `json:"private"`
	MACKey   *MACKey `json:"mac_key,omitempty"`
	Officers []byte  `json:"officers,omitempty"` // the officers' point
	Escrow   []byte  `json:"escrow,omitempty"`   // sealed to it
	// Keys are the custody keys that were there when the pair was made, by label: they were sealed to another before.
	Keys map[string][]byte `json:"keys,omitempty"`
}

// A Wrapped is a custody key's private half: the blob that the cipher machine wrapped, sealed to the signer.
type Wrapped struct {
	KEK    string `json:"kek"`
	Sealed []byte `json:"sealed"`
}

// newSealing makes a signer's sealing pair. pin "" seals it under the cipher machine alone.
func (s *Service) newSealing(ctx context.Context, signer, pin string) (*Sealing, error) {
	seed, point := custody.NewPair()
	defer clear(seed)
	l := &Sealing{Point: point}
	return l, s.closeSealing(ctx, l, signer, pin, seed)
}

// closeSealing seals what opens the keys under another PIN, and to the officers of the present policy; without any of those
// it stays with the officers who have it.
func (s *Service) closeSealing(ctx context.Context, l *Sealing, signer, pin string, seed []byte) error {
	if c := s.cfg.Custody; c != nil && c.Officers != nil {
		l.Officers = c.Officers
	}
	if l.Officers != nil {
		var err error
		if l.Escrow, err = custody.SealTo(l.Officers, seed, sealingName(signer)); err != nil {
			return err
		}
	}
	return l.close(ctx, s.macs, signer, pin, seed)
}

// renew gives a signer whose present pair is open another one, under another PIN, and seals the keys to it: what opened the
// old one opens no key that is made from now on.
func (s *Service) renew(ctx context.Context, g *Signer, pin string, seed []byte) error {
	fresh, point := custody.NewPair()
	defer clear(fresh)
	l := &Sealing{Point: point, Officers: g.Sealing.Officers, Keys: map[string][]byte{}}
	for _, k := range s.wrappedKeys(g.ID) {
		blob, err := custody.OpenWith(seed, k.wrapped.Sealed, wrappedName(k.label))
		if err == nil {
			l.Keys[k.label], err = custody.SealTo(point, blob, wrappedName(k.label))
		}
		if err != nil {
			return fmt.Errorf("account: custody key %s: %w", k.label, err)
		}
	}
	g.Sealing = l
	return s.closeSealing(ctx, l, g.ID, pin, fresh)
}

// reholdSealed takes the keys as a signer's new pair has them. The caller holds s.mu.
func (s *Service) reholdSealed(g *Signer) {
	if g.Sealing == nil {
		return
	}
	for _, k := range s.held[signerOwner+g.ID] {
		if sealed := g.Sealing.Keys[k.label]; sealed != nil && k.wrapped != nil && k.destroyed.IsZero() {
			anew := *k
			anew.wrapped = &Wrapped{KEK: k.wrapped.KEK, Sealed: sealed}
			s.hold(&anew)
		}
	}
}

// escrowed says whether the present officers, if there are any, can open what the sealing guards.
func (s *Service) escrowed(l *Sealing) bool {
	return s.cfg.Custody == nil || s.cfg.Custody.Officers == nil || bytes.Equal(l.Officers, s.cfg.Custody.Officers)
}

func sealingName(signer string) string { return "yinjian/custody-signer/v1 " + signer }
func wrappedName(label string) string  { return "yinjian/custody-key/v1 " + label }

// close seals what opens the keys under another PIN.
func (l *Sealing) close(ctx context.Context, m *macs, signer, pin string, seed []byte) (err error) {
	if l.MACKey, err = m.present(ctx, PINKeyLabel); err != nil {
		return err
	}
	l.Salt, l.Iterations, l.PIN = make([]byte, 16), pinIterations, pin != ""
	rand.Read(l.Salt) // never fails (crypto/rand)
	key, err := l.key(ctx, m, signer, pin)
	if err != nil {
		return err
	}
	defer clear(key)
	l.Private, err = custody.Seal(key, seed, sealingName(signer))
	return err
}

// open answers what opens the signer's keys. A wrong PIN is custody.ErrSealed. The caller wipes it.
func (l *Sealing) open(ctx context.Context, m *macs, signer, pin string) ([]byte, error) {
	key, err := l.key(ctx, m, signer, pin)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return custody.Open(key, l.Private, sealingName(signer))
}

// key is HMAC-SM3 in the cipher machine, its first half: a thief of the journal can try no PIN without the machine.
func (l *Sealing) key(ctx context.Context, m *macs, signer, pin string) ([]byte, error) {
	msg := make([]byte, 0, 160) // never moved, so that clear leaves no copy
	defer func() { clear(msg[:cap(msg)]) }()
	if l.PIN {
		stretched := pbkdf2.Key([]byte(pin), l.Salt, l.Iterations, 32, sm3.New)
		defer clear(stretched)
		msg = append(append(msg, "yinjian/custody-pin/v1\x00"...), stretched...)
	} else {
		msg = append(append(msg, "yinjian/custody-token/v1\x00"...), l.Salt...)
	}
	msg = append(msg, signer...)
	tag, err := m.derive(ctx, PINKeyLabel, l.MACKey, msg)
	if err != nil {
		return nil, err
	}
	clear(tag[16:])
	return tag[:16], nil
}

var errNoSealing = problem.New(problem.ConsentInsufficient,
	"该签名人尚无托管密钥的封装，须先设置一次 PIN (the signer has a PIN and nothing that seals custody keys)",
	"用 signer set-pin 设置 PIN 后重试 (set the PIN once, then try again)")

// generateWrapped makes a custody key for the signer. The key answered can sign; its blob is not kept.
func (s *Service) generateWrapped(ctx context.Context, label, algorithm string, g *Signer) (*hsm.Key, *Wrapped, error) {
	if g.Sealing == nil {
		return nil, nil, errNoSealing
	}
	token, kek := s.cfg.Slots[hsm.Staff], s.cfg.Custody.KEK
	info, blob, err := token.GenerateWrapped(ctx, hsm.KeySpec{Label: label, Algorithm: hsm.Algorithm(algorithm)}, kek)
	if err != nil {
		return nil, nil, hsmProblem(err)
	}
	w, err := hsm.NewWrappedKey(label, hsm.Algorithm(algorithm), info.Public, kek, blob)
	if err != nil {
		return nil, nil, err
	}
	key, err := hsm.KeyOfWrapped(token, w)
	if err != nil {
		return nil, nil, err
	}
	sealed, err := custody.SealTo(g.Sealing.Point, blob, wrappedName(label))
	if err != nil {
		return nil, nil, err
	}
	return key, &Wrapped{KEK: kek, Sealed: sealed}, nil
}

// wrappedKeys are the signer's custody keys.
func (s *Service) wrappedKeys(signer string) (keys []*heldKey) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, k := range s.held[signerOwner+signer] {
		if k.wrapped != nil && k.destroyed.IsZero() {
			keys = append(keys, k)
		}
	}
	return keys
}

// openKeys opens all custody keys of a signer, by label; nil where there are none. What it answers is of use to the cipher
// machine alone. A wrong PIN is custody.ErrSealed.
func (s *Service) openKeys(ctx context.Context, g *Signer, pin string) (map[string]*hsm.WrappedKey, error) {
	held := s.wrappedKeys(g.ID)
	if len(held) == 0 {
		return nil, nil
	}
	if g.Sealing == nil {
		return nil, fmt.Errorf("account: signer %s has custody keys and no sealing", g.ID)
	}
	seed, err := g.Sealing.open(ctx, s.macs, g.ID, pin)
	if err != nil {
		return nil, err
	}
	defer clear(seed)
	out := map[string]*hsm.WrappedKey{}
	for _, k := range held {
		blob, err := custody.OpenWith(seed, k.wrapped.Sealed, wrappedName(k.label))
		if err != nil {
			return nil, fmt.Errorf("account: custody key %s: %w", k.label, err)
		}
		pub, err := smx509.ParsePKIXPublicKey(k.spki)
		if err != nil {
			return nil, fmt.Errorf("account: custody key %s: %w", k.label, err)
		}
		if out[k.label], err = hsm.NewWrappedKey(k.label, hsm.Algorithm(k.algorithm), pub, k.wrapped.KEK, blob); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// orChanged is err, or that the signer was changed while the keys were opened.
func (s *Service) orChanged(g *Signer, err error) error {
	if present, _ := s.Signer(g.ID); present != g {
		return errSignerChanged
	}
	return err
}

// maxTokenSealed bounds the signers without a PIN whose opened blobs are kept: what openKeys said of them, so that the cipher
// machine need not be asked for each signature.
const maxTokenSealed = 16_384 // a large hospital's staff; half a kilobyte each

var errCustodyPIN = problem.New(problem.ConsentInsufficient,
	"签名人的密钥由其 PIN 封存，须凭 PIN 授权 (the signer's keys are sealed under the PIN; the application's word does not open them)",
	"请用签名人 PIN 申请授权 (request an authorisation with the signer's PIN)")

// keysWithoutPIN answers a signer's custody keys to an application that vouches.
func (s *Service) keysWithoutPIN(ctx context.Context, g *Signer) (map[string]*hsm.WrappedKey, error) {
	held := s.wrappedKeys(g.ID)
	switch {
	case len(held) == 0:
		return nil, nil
	case g.Sealing != nil && g.Sealing.PIN:
		return nil, errCustodyPIN
	}
	s.mu.RLock()
	known, ok := s.tokenSealed[g.ID]
	s.mu.RUnlock()
	if ok && !slices.ContainsFunc(held, func(k *heldKey) bool { return known[k.label] == nil }) {
		return known, nil
	}
	keys, err := s.openKeys(ctx, g, "")
	if err != nil {
		return nil, s.orChanged(g, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.tokenSealed) >= maxTokenSealed {
		clear(s.tokenSealed)
	}
	if s.signers[g.ID] == g { // else it was changed meanwhile
		s.tokenSealed[g.ID] = keys
	}
	return keys, nil
}

// dropTokenSealed forgets the opened keys of a signer without a PIN: the signer was stopped or has one now.
func (s *Service) dropTokenSealed(signer string) {
	s.mu.Lock()
	keys := s.tokenSealed[signer]
	delete(s.tokenSealed, signer)
	s.mu.Unlock()
	if len(keys) > 0 {
		s.forgetKeys(digestsOf(keys))
	}
}

func digestsOf(keys map[string]*hsm.WrappedKey) (out [][32]byte) {
	for _, k := range keys {
		out = append(out, k.Digest())
	}
	return out
}

// TokenSealed counts the signers whose custody keys the cipher machine alone opens, for want of a PIN.
func (s *Service) TokenSealed() (n int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, g := range s.signers {
		if g.Sealing != nil && !g.Sealing.PIN && !g.Stopped {
			n++
		}
	}
	return n
}

// NotEscrowed counts the signers whose custody keys the present officers cannot open: they were sealed before these were
// appointed. The next PIN seals them to these.
func (s *Service) NotEscrowed() (n int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, g := range s.signers {
		if g.Sealing != nil && !s.escrowed(g.Sealing) && !g.Stopped {
			n++
		}
	}
	return n
}

// reseal puts the signer's keys under a new PIN. old is the present one, where the keys are sealed under one; a wrong one is
// counted, as administrator's, and refused.
func (s *Service) reseal(ctx context.Context, actor string, g *Signer, old, pin string) error {
	switch {
	case g.Sealing == nil && s.cfg.Custody == nil:
		return nil
	case g.Sealing == nil:
		l, err := s.newSealing(ctx, g.ID, pin)
		g.Sealing = l
		return err
	}
	if g.Sealing.PIN {
		if old == "" {
			return problem.New(problem.ConsentInsufficient,
				"签名人的密钥由其现有 PIN 封存：须给出现有 PIN，忘记时由保管干部恢复 (the keys are sealed under the present PIN: give it, or have the officers recover it)",
				"加 --old-pin-file；忘记时用 signer recover (give --old-pin-file, or use signer recover)")
		}
		if failures, _ := s.pinCount(resealing, g.ID); failures >= MaxPINTries {
			return errResealingLocked
		}
	}
	seed, err := g.Sealing.open(ctx, s.macs, g.ID, old)
	if err != nil {
		if errors.Is(err, custody.ErrSealed) {
			err = s.wrongPIN(ctx, actor, resealing, g)
			if failures, _ := s.pinCount(resealing, g.ID); failures >= MaxPINTries {
				err = errResealingLocked
			}
		}
		return err
	}
	defer clear(seed)
	return s.renew(ctx, g, pin, seed)
}

// resealing is as what administrators' wrong PINs are counted; no application has this id.
const resealing = "admin:set-pin"

var errResealingLocked = problem.New(problem.PINLocked,
	"更换 PIN 时现有 PIN 已输错五次，不再接受 (the present PIN was given wrongly five times; it is not looked at any more)",
	"由保管干部恢复：yinjian signer recover (have the officers recover it)")

const actRecover = "recover"

// RecoverPIN opens what the officers hold for a signer who forgot the PIN, and seals it under a new one. Fewer shares than
// the officers' threshold open nothing. The journal says whose shares they were,
// those that opened nothing too.
func (s *Service) RecoverPIN(ctx context.Context, actor, id, pin string, shares []custody.Share) (*Signer, error) {
	if _, ok := s.Signer(id); !ok {
		return nil, errSignerUnknown
	}
	var holders []string
	set := ""
	for i := range shares {
		if err := errors.Join(problem.CheckText("shares", shares[i].Holder, custody.MaxHolderName), problem.CheckText("shares", shares[i].Set, maxName)); err != nil {
			return nil, firstProblem(err)
		}
		// The number is what the share proves; the name is what stands on the paper.
		holders = append(holders, fmt.Sprintf("%d %s", shares[i].Number, shares[i].Holder))
		set = shares[i].Set
	}
	who := []audit.Field{text("officers", strings.Join(holders, "、")), text("share_set", set)}
	refuse := func(err error) error {
		if _, jerr := s.cfg.Journal.Append(ctx, audit.Draft{Kind: kindRecoveryFailed, Actor: actor, Object: id, Fields: who}); jerr != nil {
			return journalProblem(jerr)
		}
		return problem.New(problem.Forbidden, "份额不能打开该签名人的密钥 (the shares do not open the signer's keys): "+err.Error(),
			"核对份额是否齐全、是否属于同一套 (are there enough, and of one set?)")
	}
	secret, err := custody.Combine(shares, custody.PurposeOfficers)
	if err != nil {
		return nil, refuse(err)
	}
	defer clear(secret)
	return s.changeSigner(ctx, actor, id, actRecover, "", func(g *Signer) error {
		if g.Sealing == nil || g.Sealing.Escrow == nil {
			return problem.New(problem.KeyUnknown, "该签名人没有交干部保管的密钥 (nothing of the signer's is with the officers)", "重新登记签名密钥 (give the signer a new key)")
		}
		if point, err := custody.PointOf(secret); err != nil || !bytes.Equal(point, g.Sealing.Officers) {
			return refuse(custody.ErrSealed)
		}
		seed, err := custody.OpenWith(secret, g.Sealing.Escrow, sealingName(id))
		if err != nil {
			return refuse(err)
		}
		defer clear(seed)
		if err := s.renew(ctx, g, pin, seed); err != nil {
			return err
		}
		g.PIN, err = newPINVerifier(ctx, s.macs, id, pin)
		return err
	}, who...)
}

// Ceremony journals the minutes of a key ceremony, which are signed with a key that was made under the new wrapping key.
// signature is that signature (DER), for which the entry accounts.
func (s *Service) Ceremony(ctx context.Context, actor, kek string, minutes, signature []byte) error {
	sum := sm3.Sum(signature)
	_, err := s.cfg.Journal.Append(ctx, audit.Draft{
		Kind: kindCeremony, Actor: actor, Object: kek, State: true, Fields: []audit.Field{octets("signature.sm3", sum[:])},
		Payloads: []audit.Attachment{{Name: "minutes", MediaType: "application/json", Data: minutes}},
	})
	if err != nil {
		return journalProblem(err)
	}
	return nil
}

// EndConsents forgets the authorisations that have ended, and has the cipher machine forget their custody keys. It is called
// from time to time.
func (s *Service) EndConsents() {
	s.consents.mu.Lock()
	defer s.consents.mu.Unlock()
	if now := s.cfg.Clock.Now(); now.Trusted() {
		s.consents.prune(now.Time)
	}
	var again [][32]byte
	for d := range s.consents.missed {
		if s.consents.holds[d] == 0 {
			again = append(again, d)
		}
	}
	if len(again) > 0 {
		s.forgetKeys(again)
	}
}

// forgetLimit bounds the cipher machine's forgetting.
const forgetLimit = 10 * time.Second

// forgetKeys has the cipher machine destroy the session objects of keys that no live authorisation holds. It does not wait;
// what a machine that is away misses, EndConsents tries again.
func (s *Service) forgetKeys(digests [][32]byte) {
	token := s.cfg.Slots[hsm.Staff]
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), forgetLimit)
		defer cancel()
		c := &s.consents
		for _, d := range digests {
			err := token.ForgetWrapped(ctx, d)
			c.mu.Lock()
			first := err != nil && len(c.missed) == 0
			if err == nil {
				delete(c.missed, d)
			} else {
				c.missed[d] = struct{}{}
			}
			c.mu.Unlock()
			if first {
				s.cfg.Log.WithError(err).Warning("a custody key stays unwrapped until the cipher machine answers again")
			}
		}
	}()
}
