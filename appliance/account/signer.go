package account

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

var reSigner = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{1,31}$`)

// An Enrolment asks for a signer with one key pair and certificate for each algorithm.
type Enrolment struct {
	ID, Name, Department, Campus string
	Algorithms                   []string // default SM2 and RSA-2048
	PIN                          string   // may be empty: no PIN, only app-asserted consent
	// External leaves the certificates to another CA: the keys wait for them, and nothing is signed until then.
	External bool
	Role     string // the post; may be empty
	Test     bool   // an account for tests
}

func (s *Service) checkEnrolment(e *Enrolment) error {
	if !reSigner.MatchString(e.ID) {
		return problem.Invalid("id", "工号须为 2–32 位字母、数字或连字符 (letters, digits and hyphens, 2 to 32)")
	}
	if err := errors.Join(problem.CheckText("name", e.Name, maxName), problem.CheckText("department", e.Department, maxName), problem.CheckText("campus", e.Campus, maxCampus)); err != nil {
		return firstProblem(err)
	}
	if e.Role != "" {
		if err := problem.CheckText("role", e.Role, maxName); err != nil {
			return err
		}
	}
	for field, v := range map[string]string{"name": e.Name, "department": e.Department} {
		if utf8.RuneCountInString(v) > 64 { // ub-common-name, ub-organizational-unit-name (RFC 5280 appendix A)
			return problem.Invalid(field, "不得超过 64 个字符 (64 characters at most)")
		}
	}
	if len(e.Algorithms) == 0 {
		e.Algorithms = []string{string(hsm.SM2), string(hsm.RSA2048)}
	}
	seen := map[string]bool{}
	for _, a := range e.Algorithms {
		if s.cfg.CAs[a] == nil || seen[a] {
			return problem.Invalid("algorithms", "不支持或重复的算法 %q (unsupported or repeated algorithm)", a)
		}
		seen[a] = true
	}
	if e.PIN != "" {
		return checkPINForm(e.PIN)
	}
	return nil
}

// Enrol adds a signer: keys are generated in the staff slot, certificates issued by the evaluation CAs unless another CA is
// to issue them.
//
// Order: 1. the intent, with the prefix of the keys' labels; 2. keys and certificates; 3. the outcome, which makes the
// signer. A stop or failure after 1 leaves an open intent and perhaps keys that nobody can use; [Service.Settle] destroys
// and closes them.
func (s *Service) Enrol(ctx context.Context, actor string, e Enrolment) (*Signer, error) {
	if err := s.checkEnrolment(&e); err != nil {
		return nil, err
	}
	unlock, err := s.beginChange(ctx, signerObject(e.ID))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, ok := s.Signer(e.ID); ok {
		return nil, errSignerExists
	}
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, problem.New(problem.TimeUntrusted, "时间不可信，证书有效期无从确定 (time is not trusted; a certificate's validity cannot be fixed)", "待时间恢复可信后重试 (try again when time is trusted)")
	}
	if err := s.settle(ctx); err != nil { // left by an earlier failure; does not stand in the way of this one
		s.cfg.Log.WithError(err).Warning("keys of an interrupted enrolment could not be cleared away")
	}
	g := Signer{Version: 1, ID: e.ID, Name: e.Name, Department: e.Department, Campus: e.Campus, Role: e.Role, Test: e.Test, ChangedBy: actor, ChangedAt: now.Time}
	if e.PIN != "" {
		if g.PIN, err = newPINVerifier(ctx, s.macs, e.ID, e.PIN); err != nil {
			return nil, err
		}
	}
	if s.cfg.Custody != nil {
		if g.Sealing, err = s.newSealing(ctx, e.ID, e.PIN); err != nil {
			return nil, err
		}
	}
	unique, err := newID()
	if err != nil {
		return nil, err
	}
	prefix := "staff/" + e.ID + "/" + unique[:8] + "/"
	i, err := s.intend(ctx, audit.Draft{Kind: kindSignerIntent, Actor: actor, Object: e.ID}, "enrol", prefix)
	if err != nil {
		return nil, err
	}
	for _, a := range e.Algorithms {
		k, err := s.newSignerKey(ctx, prefix+a, a, &g, e.External)
		if err != nil {
			s.discardKeys(err, &g)
			return nil, fmt.Errorf("account: enrolling %s: %w", e.ID, err)
		}
		g.Keys = append(g.Keys, k)
	}
	d := audit.Draft{Kind: kindSigner, Actor: actor, Object: e.ID, Fields: []audit.Field{
		text("intent", i.id), text("act", "enrol"), boolean("pin_set", g.PIN != nil),
	}}
	if err := s.conclude(ctx, d, i.ref, &g, nil); err != nil {
		return nil, err
	}
	enrolled, _ := s.Signer(e.ID)
	return enrolled, nil
}

// newSignerKey makes a key, with a certificate of the evaluation CA unless another CA is to issue it.
func (s *Service) newSignerKey(ctx context.Context, label, algorithm string, g *Signer, external bool) (k SignerKey, err error) {
	key, wrapped, err := s.generate(ctx, hsm.Staff, label, algorithm, g)
	if err != nil {
		return k, err
	}
	k = SignerKey{Label: label, Algorithm: algorithm, Wrapped: wrapped}
	if external {
		k.PublicKey, err = smx509.MarshalPKIXPublicKey(key.Public())
		return k, err
	}
	if k.Certificate, err = s.issue(ctx, algorithm, key.Public(), g, g.ChangedAt); err != nil {
		return k, hsmProblem(err)
	}
	return k, nil
}

// keyLimit is far beyond the deadline of a cipher machine's call, after which its worker is ended.
const keyLimit = 5 * time.Minute

// generate makes a key in a slot, or, for a signer under a policy of custody, one that is wrapped and sealed to the signer.
func (s *Service) generate(ctx context.Context, class hsm.SlotClass, label, algorithm string, g *Signer) (*hsm.Key, *Wrapped, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, hsmProblem(err)
	}
	// Whoever goes away meanwhile leaves a call that goes on: its key could come after the intent was closed, and be
	// nobody's.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), keyLimit)
	defer cancel()
	if g != nil && s.cfg.Custody != nil {
		return s.generateWrapped(ctx, label, algorithm, g)
	}
	token := s.cfg.Slots[class]
	info, err := token.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: hsm.Algorithm(algorithm)})
	if err != nil {
		return nil, nil, hsmProblem(err)
	}
	if info.Extractable {
		return nil, nil, fmt.Errorf("the cipher machine made an extractable %s key", algorithm)
	}
	key, err := hsm.KeyOf(token, info, true)
	return key, nil, err
}

func (s *Service) issue(ctx context.Context, algorithm string, pub crypto.PublicKey, g *Signer, now time.Time) ([]byte, error) {
	authority := s.cfg.CAs[algorithm]
	end := now.Add(s.cfg.CertificateLife)
	if last := authority.Certificate().NotAfter; end.After(last) {
		end = last // no certificate outlives its CA's
	}
	c, err := authority.Issue(ctx, ca.Request{
		Profile:     ca.Staff,
		Subject:     pkix.Name{Country: []string{"CN"}, OrganizationalUnit: []string{g.Department}, CommonName: g.Name},
		StaffNumber: g.ID, PublicKey: pub,
		NotBefore: now.Add(-time.Minute), NotAfter: end,
	})
	if err != nil {
		return nil, err
	}
	return c.Raw, nil
}

// AddSignerKey gives an enrolled signer a key of an algorithm that he has none of; external as in an [Enrolment]. Order and
// what a stop leaves are those of [Service.Enrol].
func (s *Service) AddSignerKey(ctx context.Context, actor, id, algorithm string, external bool) (*Signer, error) {
	if s.cfg.CAs[algorithm] == nil {
		return nil, problem.Invalid("algorithm", "不支持的算法 %q (unsupported algorithm)", algorithm)
	}
	unlock, err := s.beginChange(ctx, signerObject(id))
	if err != nil {
		return nil, err
	}
	defer unlock()
	old, ok := s.Signer(id)
	if !ok {
		return nil, errSignerUnknown
	}
	s.mu.RLock()
	held := s.held[signerOwner+id]
	s.mu.RUnlock()
	for _, k := range held {
		if k.algorithm == algorithm && k.destroyed.IsZero() {
			return nil, problem.New(problem.Exists, "该签名人已有此算法的密钥 (the signer has a key of this algorithm)", "换发用 cert csr --new-key (for another one request a certificate with --new-key)")
		}
	}
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, untrustedTime("a certificate's validity")
	}
	if err := s.settle(ctx); err != nil {
		s.cfg.Log.WithError(err).Warning("keys of an interrupted enrolment could not be cleared away")
	}
	g := *old
	g.Version, g.ChangedBy, g.ChangedAt = old.Version+1, actor, now.Time
	if s.cfg.Custody != nil && g.Sealing == nil && g.PIN == nil {
		if g.Sealing, err = s.newSealing(ctx, id, ""); err != nil {
			return nil, err
		}
	}
	unique, err := newID()
	if err != nil {
		return nil, err
	}
	prefix := "staff/" + id + "/" + unique[:8] + "/"
	i, err := s.intend(ctx, audit.Draft{Kind: kindSignerIntent, Actor: actor, Object: id}, actAddKey, prefix)
	if err != nil {
		return nil, err
	}
	k, err := s.newSignerKey(ctx, prefix+algorithm, algorithm, &g, external)
	if err != nil {
		return nil, fmt.Errorf("account: another key for %s: %w", id, err)
	}
	g.Keys = append(slices.Clone(old.Keys), k)
	d := audit.Draft{Kind: kindSigner, Actor: actor, Object: id, Fields: []audit.Field{
		text("intent", i.id), text("act", actAddKey), boolean("pin_set", false),
	}}
	if err := s.conclude(ctx, d, i.ref, &g, nil); err != nil {
		return nil, err
	}
	changed, _ := s.Signer(id)
	return changed, nil
}

const actAddKey = "add-key"

// changeSigner journals intent and outcome of a change to an enrolled signer, and voids live authorisations.
func (s *Service) changeSigner(ctx context.Context, actor, id, act, reason string, change func(*Signer) error, more ...audit.Field) (*Signer, error) {
	if err := checkReason(reason); err != nil {
		return nil, err
	}
	unlock, err := s.beginChange(ctx, signerObject(id))
	if err != nil {
		return nil, err
	}
	defer unlock()
	old, ok := s.Signer(id)
	if !ok {
		return nil, errSignerUnknown
	}
	g := *old
	g.Version, g.ChangedBy, g.ChangedAt = old.Version+1, actor, s.cfg.Clock.Now().Time
	if err := change(&g); err != nil {
		return nil, err
	}
	i, err := s.intend(ctx, audit.Draft{Kind: kindSignerIntent, Actor: actor, Object: id}, act, "")
	if err != nil {
		return nil, err
	}
	d := audit.Draft{Kind: kindSigner, Actor: actor, Object: id, Fields: append(more,
		text("intent", i.id), text("act", act), text("reason", reason), boolean("pin_set", act == actSetPIN || act == actRecover),
	)}
	if err := s.conclude(ctx, d, i.ref, &g, nil); err != nil {
		return nil, err
	}
	changed, _ := s.Signer(id)
	return changed, nil
}

const actSetPIN = "set-pin"

// SetPIN gives the signer a new PIN, clears the count of failures and voids live authorisations. Where custody keys are
// sealed under the present PIN, old must be that one; see [Service.RecoverPIN].
func (s *Service) SetPIN(ctx context.Context, actor, id, old, pin string) (*Signer, error) {
	return s.changeSigner(ctx, actor, id, actSetPIN, "", func(g *Signer) (err error) {
		if err := checkPINForm(pin); err != nil {
			return err
		}
		if err := s.reseal(ctx, actor, g, old, pin); err != nil {
			return err
		}
		g.PIN, err = newPINVerifier(ctx, s.macs, id, pin)
		return err
	})
}

// StopSigner stops or starts a signer; live authorisations are void either way.
func (s *Service) StopSigner(ctx context.Context, actor, id string, stopped bool, reason string) (*Signer, error) {
	act := map[bool]string{true: "stop", false: "start"}[stopped]
	return s.changeSigner(ctx, actor, id, act, reason, func(g *Signer) error { g.Stopped = stopped; return nil })
}

var (
	errSignerUnknown = problem.New(problem.SignerUnknown, "没有这个签名人 (no such signer)", "核对工号，或先登记 (check the staff number, or enrol first)")
	errSignerExists  = problem.New(problem.Exists, "签名人已登记 (signer is enrolled already)", "改用“重置 PIN”或“启停” (set the PIN, stop or start instead)")
	errSignerStopped = problem.New(problem.SignerStopped, "签名人已停用 (the signer is stopped)", "请管理员启用 (ask an administrator)")
)
