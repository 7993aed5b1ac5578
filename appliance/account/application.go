package account

import (
	"context"
	"crypto/rand"
	"errors"
	"regexp"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
)

var reApp = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,31}$`)

// Longest texts, in bytes; a Chinese character has three. Package pki's signing context takes a campus of 64 and a
// department of 128, a certificate names of 64 characters, the journal far more.
const (
	maxName   = 128
	maxCampus = 64
	maxReason = 512
)

// Most that an application may be given. Its nonces of the time window are remembered: some 30 KB for each request a
// second, if it does make them.
const (
	MaxRate  = 10_000  // requests a second
	MaxBurst = 100_000 // requests at once
	// MaxSessions is the most signatures that an application may be allowed at once.
	MaxSessions = 1000
)

// Limits are what an application may ask for; 0 means what the appliance's configuration says.
type Limits struct {
	Rate, Burst          int // requests a second, and at once
	HSMRate, HSMSessions int // signatures a second, and at once
}

// RegisterApplication adds an application and answers it with its HMAC key, which is shown this once: it can be
// derived again by the cipher machine alone.
func (s *Service) RegisterApplication(ctx context.Context, actor string, a Application) (*Application, []byte, error) {
	if !reApp.MatchString(a.ID) {
		return nil, nil, problem.Invalid("id", "应用标识须为 2–32 位小写字母、数字或连字符 (lower-case letters, digits and hyphens, 2 to 32)")
	}
	if err := errors.Join(problem.CheckText("name", a.Name, maxName), problem.CheckText("campus", a.Campus, maxCampus)); err != nil {
		return nil, nil, firstProblem(err)
	}
	for _, r := range a.Rights {
		switch r {
		case RightSign, RightVerify, RightTimestamp, RightEvidenceAny:
		default:
			return nil, nil, problem.Invalid("rights", "未知权限 %q (unknown right)", r)
		}
	}
	if a.Stamp == "" {
		a.Stamp = StampRequired
	}
	if a.Stamp != StampRequired && a.Stamp != StampNone {
		return nil, nil, problem.Invalid("stamp", "须为 required 或 none (must be required or none)")
	}
	for _, m := range a.Consent {
		if m != evidence.AppAsserted && m != evidence.SignerPIN {
			return nil, nil, problem.Invalid("consent", "未知同意方式 %q (unknown method of consent)", m)
		}
	}
	if a.Has(RightSign) && len(a.Consent) == 0 {
		return nil, nil, problem.Invalid("consent", "有签名权限的应用须指定同意方式 (an application that signs needs a method of consent)")
	}
	if a.Test && a.Production {
		return nil, nil, errTestProduction
	}
	if err := (Limits{a.Rate, a.Burst, a.HSMRate, a.HSMSessions}).check(); err != nil {
		return nil, nil, err
	}
	unlock, err := s.beginChange(ctx, applicationObject(a.ID))
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	if _, _, ok := s.Application(a.ID); ok {
		return nil, nil, problem.New(problem.Exists, "应用已登记 (application is registered already)", "换一个标识 (choose another id)")
	}
	a.Version, a.Stopped, a.ChangedBy, a.ChangedAt = 1, false, actor, s.cfg.Clock.Now().Time
	a.KeySalt, a.KeySealed = make([]byte, 16), nil
	if _, err := rand.Read(a.KeySalt); err != nil {
		return nil, nil, err
	}
	// The key is derived before anything is written: an application whose registration is on disk can be used.
	if a.MACKey, err = s.macs.present(ctx, AppKeyLabel); err != nil {
		return nil, nil, err
	}
	key, err := s.macs.applicationKey(ctx, &a)
	if err != nil {
		return nil, nil, err
	}
	i, err := s.intend(ctx, audit.Draft{Kind: kindApplicationIntent, Actor: actor, Object: a.ID}, "register", "")
	if err != nil {
		return nil, nil, err
	}
	d := audit.Draft{Kind: kindApplication, Actor: actor, Object: a.ID, Fields: []audit.Field{text("intent", i.id), text("act", "register")}}
	if err := s.conclude(ctx, d, i.ref, &a, key); err != nil {
		return nil, nil, err
	}
	app, key, _ := s.Application(a.ID)
	return app, key, nil
}

// StopApplication stops or starts an application. Its live authorisations are void. It needs no cipher machine.
func (s *Service) StopApplication(ctx context.Context, actor, id string, stopped bool, reason string) (*Application, error) {
	act := map[bool]string{true: "stop", false: "start"}[stopped]
	return s.changeApplication(ctx, actor, id, act, reason, func(a *Application, _ []byte) error { a.Stopped = stopped; return nil })
}

// LimitApplication sets what the application may ask for. It needs no cipher machine.
func (s *Service) LimitApplication(ctx context.Context, actor, id string, l Limits, reason string) (*Application, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	return s.changeApplication(ctx, actor, id, "limit", reason, func(a *Application, _ []byte) error {
		a.Rate, a.Burst, a.HSMRate, a.HSMSessions = l.Rate, l.Burst, l.HSMRate, l.HSMSessions
		return nil
	})
}

// SetProduction marks an application as one of production, or takes the mark away; live authorisations of test signers
// are refused from then on. It needs no cipher machine.
func (s *Service) SetProduction(ctx context.Context, actor, id string, production bool, reason string) (*Application, error) {
	if a, _, ok := s.Application(id); ok && a.Test && production {
		return nil, errTestProduction
	}
	act := map[bool]string{true: "production", false: "no-production"}[production]
	return s.changeApplication(ctx, actor, id, act, reason, func(a *Application, _ []byte) error { a.Production = production; return nil })
}

var errTestProduction = problem.Invalid("production", "测试应用不能标为生产应用 (an application for tests is none of production)")

func (l Limits) check() error {
	for _, n := range []struct {
		field       string
		value, most int
	}{{"rate", l.Rate, MaxRate}, {"burst", l.Burst, MaxBurst}, {"hsm_rate", l.HSMRate, MaxRate}, {"hsm_sessions", l.HSMSessions, MaxSessions}} {
		if n.value < 0 || n.value > n.most {
			return problem.Invalid(n.field, "须为 0–%d，0 为缺省 (0 to %d, 0 means the default)", n.most, n.most)
		}
	}
	return nil
}

// changeApplication journals a change of an application that leaves its key as it is.
func (s *Service) changeApplication(ctx context.Context, actor, id, act, reason string, change func(a *Application, key []byte) error) (*Application, error) {
	if err := checkReason(reason); err != nil {
		return nil, err
	}
	unlock, err := s.beginChange(ctx, applicationObject(id))
	if err != nil {
		return nil, err
	}
	defer unlock()
	old, key, ok := s.Application(id)
	if !ok {
		return nil, problem.New(problem.NotFound, "没有这个应用 (no such application)", "核对标识 (check the id)")
	}
	a := *old
	a.Version, a.ChangedBy, a.ChangedAt = old.Version+1, actor, s.cfg.Clock.Now().Time
	if err := change(&a, key); err != nil {
		return nil, err
	}
	i, err := s.intend(ctx, audit.Draft{Kind: kindApplicationIntent, Actor: actor, Object: id}, act, "")
	if err != nil {
		return nil, err
	}
	d := audit.Draft{Kind: kindApplication, Actor: actor, Object: id, Fields: []audit.Field{text("intent", i.id), text("act", act), text("reason", reason)}}
	if err := s.conclude(ctx, d, i.ref, &a, key); err != nil {
		return nil, err
	}
	now, _, _ := s.Application(id)
	return now, nil
}

// checkReason takes an empty reason.
func checkReason(reason string) error {
	if reason == "" {
		return nil
	}
	return problem.CheckText("reason", reason, maxReason)
}

// firstProblem picks the first refusal out of joined errors.
func firstProblem(err error) error {
	var p *problem.Problem
	if errors.As(err, &p) {
		return p
	}
	return err
}
