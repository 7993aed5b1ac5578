package account

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"sync"
	"time"

	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
)

// maxLiveAuthorizations bounds the memory that grants can take; 500 users with a few each stay far below it.
const maxLiveAuthorizations = 100_000

// consents holds the live authorisations. They are in memory on purpose: after a restart every live one is void and
// the signer enters the PIN again, which is the safe side. What was granted and what was used is in the journal.
type consents struct {
	mu   sync.Mutex
	live map[string]*liveAuthorization // guarded by mu
}

type liveAuthorization struct {
	auth      *evidence.Authorization
	stored    []byte
	notAfter  time.Time
	remaining int             // reserved uses are taken off at once and given back on failure
	digests   map[string]bool // one-time: hex digest → not used yet
}

// A Reservation is one use of an authorisation, taken before the signature and either kept (the record is durable)
// or given back.
type Reservation struct {
	Stored []byte // the authorisation, byte for byte
	Auth   *evidence.Authorization
	undo   func()
}

// Release gives the use back. Call it when no record was written.
func (r *Reservation) Release() {
	if r != nil && r.undo != nil {
		r.undo()
		r.undo = nil
	}
}

func newID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return hex.EncodeToString(b[:]), nil
}

func (c *consents) add(a *evidence.Authorization, stored []byte, notAfter time.Time) error {
	l := &liveAuthorization{auth: a, stored: stored, notAfter: notAfter, remaining: a.Count}
	if len(a.Digests) > 0 {
		l.remaining = len(a.Digests)
		l.digests = make(map[string]bool, len(a.Digests))
		for _, d := range a.Digests {
			l.digests[d] = true
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.live == nil {
		c.live = map[string]*liveAuthorization{}
	}
	if len(c.live) >= maxLiveAuthorizations {
		return problem.New(problem.RateLimited, "有效授权过多 (too many live authorisations)", "稍后重试 (try again later)")
	}
	c.live[a.ID] = l
	return nil
}

// prune forgets authorisations that ended before now.
func (c *consents) prune(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, l := range c.live {
		if now.After(l.notAfter) {
			delete(c.live, id)
		}
	}
}

// drop forgets a signer's authorisations: the signer was stopped or the PIN changed.
func (c *consents) drop(signer string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, l := range c.live {
		if l.auth.Subject == signer {
			delete(c.live, id)
		}
	}
}

var (
	errAuthorizationBad = problem.New(problem.AuthorizationBad,
		"授权不存在、已过期，或不属于该应用、签名人或文档 (authorisation unknown, expired, or not for this application, signer or document)",
		"重新申请授权 (request a new authorisation)")
	errAuthorizationSpent = problem.New(problem.AuthorizationSpent,
		"授权已用完 (authorisation is used up)", "重新申请授权 (request a new authorisation)")
)

// reserve takes one use. Which of the causes of errAuthorizationBad holds is not told to the caller: ids are secrets.
func (c *consents) reserve(id, application, signer, digestHex string, now time.Time) (*Reservation, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.live[id]
	if l == nil || l.auth.Application != application || l.auth.Subject != signer || now.After(l.notAfter) {
		return nil, errAuthorizationBad
	}
	if l.digests != nil {
		unused, bound := l.digests[digestHex]
		if !bound {
			return nil, errAuthorizationBad
		}
		if !unused {
			return nil, errAuthorizationSpent
		}
		l.digests[digestHex] = false
	} else if l.remaining <= 0 {
		return nil, errAuthorizationSpent
	}
	l.remaining--
	return &Reservation{Stored: l.stored, Auth: l.auth, undo: func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		l.remaining++
		if l.digests != nil {
			l.digests[digestHex] = true
		}
	}}, nil
}

// Reserve takes one use of the consent that a sign request names, for the document with the digest (hex).
//
// With an authorisation's id the live one must belong to application and signer and cover the digest. Without one,
// the method must be app-asserted, which makes an authorisation of this request alone.
func (s *Service) Reserve(_ context.Context, app *Application, signer *Signer, digestHex, id string, method evidence.Method, assertion string) (*Reservation, error) {
	now := s.cfg.Clock.Now()
	if id != "" {
		if method != "" && method != evidence.SignerPIN {
			return nil, problem.Invalid("authorization", "给出 id 时不得再写其他方式 (an id excludes another method)")
		}
		r, err := s.consents.reserve(id, app.ID, signer.ID, digestHex, now.Time)
		if err != nil {
			return nil, err
		}
		if !allows(app, r.Auth.Method) {
			r.Release()
			return nil, errConsentInsufficient
		}
		return r, nil
	}
	if method != evidence.AppAsserted {
		return nil, problem.Invalid("authorization.method", "须为 app-asserted，或给出授权 id (must be app-asserted, or give an authorisation id)")
	}
	if !allows(app, method) {
		return nil, errConsentInsufficient
	}
	if assertion == "" || len(assertion) > 512 {
		return nil, problem.Invalid("authorization.assertion", "应用须说明如何确认签名人同意，1–512 字节 (say how the signer consented, 1 to 512 bytes)")
	}
	aid, err := newID()
	if err != nil {
		return nil, err
	}
	nonce, err := newID()
	if err != nil {
		return nil, err
	}
	a := &evidence.Authorization{
		Version: 1, ID: aid, Method: evidence.AppAsserted, Level: 1, Subject: signer.ID, Application: app.ID,
		Nonce: nonce, Digests: []string{digestHex}, GrantedAt: now.Time.Format(time.RFC3339Nano), Proof: assertion,
	}
	stored, err := a.Bytes()
	if err != nil {
		return nil, err
	}
	return &Reservation{Stored: stored, Auth: a}, nil
}

var errConsentInsufficient = problem.New(problem.ConsentInsufficient,
	"该应用的策略不接受这种同意方式 (the application's policy does not accept this method of consent)",
	"请用签名人 PIN 申请授权 (request an authorisation with the signer's PIN)")

func allows(app *Application, m evidence.Method) bool {
	for _, ok := range app.Consent {
		if ok == m {
			return true
		}
	}
	return false
}
