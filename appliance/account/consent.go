package account

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"time"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// Bounds of the memory that live authorisations take. One application, with or without the help of signers, cannot use
// up the others' share.
const (
	maxLivePerSigner = 100       // with uses left, for one signer and one application
	maxLiveBytes     = 256 << 20 // estimated, of all
	maxLiveAppBytes  = maxLiveBytes / 4
	liveBytes        = 1024 // of one authorisation
	liveDigestBytes  = 256  // of each digest
	liveKeyBytes     = 512  // of each custody key, beside its blob
	spentBytes       = 256  // of what is kept of one that is used up
)

const (
	maxActivation = 4 * time.Hour
	// oneTimeLife: a one-time authorisation is for now, not for tomorrow.
	oneTimeLife  = 10 * time.Minute
	maxAssertion = 512 // bytes
)

// consents holds the live authorisations. They are in memory on purpose: after a restart every live one is void and
// the signer enters the PIN again, which is the safe side. What was granted and what was used is in the journal.
type consents struct {
	mu    sync.Mutex
	live  map[string]*liveAuthorization // guarded by mu
	pairs map[pair]int                  // guarded by mu: those with uses left
	apps  map[string]int                // guarded by mu: estimated bytes
	all   int                           // guarded by mu: estimated bytes

	holds  map[[32]byte]int      // guarded by mu: live authorisations, and uses under way, that hold a custody key
	ended  func(d [][32]byte)    // told of custody keys that none holds any more; does not wait
	missed map[[32]byte]struct{} // guarded by mu: those that a machine has not forgotten yet
}

type pair struct{ application, signer string }

type liveAuthorization struct {
	pair
	auth     *evidence.Authorization // nil when used up for good
	stored   []byte
	notAfter time.Time
	free     int                        // uses that are neither reserved nor kept
	reserved int                        // uses of which it is not known yet whether they are kept
	digests  map[evidence.Digest]bool   // one-time: digest → free
	keys     map[string]*hsm.WrappedKey // custody keys of the signer, by label
	bytes    int
}

// A Reservation is one use of an authorisation, taken before the signature and then either kept or given back. Not safe
// for concurrent use.
type Reservation struct {
	Stored []byte // the authorisation, byte for byte
	Auth   *evidence.Authorization
	// Keys are the signer's custody keys, by label, as far as this consent opens them.
	Keys   map[string]*hsm.WrappedKey
	settle func(kept bool)
}

// Release gives the use back. Call it only when it is certain that no record was or will be written.
func (r *Reservation) Release() { r.end(false) }

// Keep spends the use for good: the record is durable, or may be. After Keep or Release neither does anything.
func (r *Reservation) Keep() { r.end(true) }

func (r *Reservation) end(kept bool) {
	if r != nil && r.settle != nil {
		r.settle(kept)
		r.settle = nil
	}
}

func newID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return hex.EncodeToString(b[:]), nil
}

var errTooMany = problem.New(problem.RateLimited, "未用完的有效授权过多 (too many live authorisations)", "先用已有授权，或待其过期后重试 (use those there are, or try again when they have ended)")

// room reports whether another authorisation of that size has its place.
func (c *consents) room(p pair, digests int, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.prune(now)
	return c.roomLocked(p, liveBytes+digests*liveDigestBytes)
}

func (c *consents) roomLocked(p pair, bytes int) error {
	if c.pairs[p] >= maxLivePerSigner || c.apps[p.application]+bytes > maxLiveAppBytes || c.all+bytes > maxLiveBytes {
		return errTooMany
	}
	return nil
}

// add makes an authorisation live, unless valid says otherwise. It asks under the lock that a drop takes after the
// directory has changed: whoever is stopped meanwhile, or has a new PIN, is seen by one of the two.
func (c *consents) add(a *evidence.Authorization, stored []byte, notAfter time.Time, keys map[string]*hsm.WrappedKey, valid func() error) error {
	l := &liveAuthorization{
		pair: pair{a.Application, a.Subject}, auth: a, stored: stored, notAfter: notAfter, free: a.Count,
		bytes: liveBytes + len(a.Digests)*liveDigestBytes, keys: keys,
	}
	for _, k := range keys {
		l.bytes += liveKeyBytes + len(k.Blob)
	}
	if len(a.Digests) > 0 {
		l.free = len(a.Digests)
		l.digests = make(map[evidence.Digest]bool, len(a.Digests))
		for _, d := range a.Digests {
			l.digests[evidence.Digest{Algorithm: a.DigestAlgorithm, Value: d}] = true
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := valid(); err != nil {
		return err
	}
	if err := c.roomLocked(l.pair, l.bytes); err != nil {
		return err
	}
	if c.live == nil {
		c.live, c.pairs, c.apps, c.holds = map[string]*liveAuthorization{}, map[pair]int{}, map[string]int{}, map[[32]byte]int{}
	}
	c.hold(keys)
	c.live[a.ID] = l
	c.pairs[l.pair]++
	c.weigh(l, l.bytes)
	return nil
}

// weigh adds to the estimate.
func (c *consents) weigh(l *liveAuthorization, bytes int) {
	c.all += bytes
	if c.apps[l.application] += bytes; c.apps[l.application] == 0 {
		delete(c.apps, l.application)
	}
}

func (c *consents) leavePair(l *liveAuthorization) {
	if c.pairs[l.pair]--; c.pairs[l.pair] == 0 {
		delete(c.pairs, l.pair)
	}
}

func (c *consents) forget(id string) {
	l := c.live[id]
	delete(c.live, id)
	c.weigh(l, -l.bytes)
	c.letGo(l.keys)
	l.keys = nil
	if l.auth != nil {
		c.leavePair(l)
	}
}

func (c *consents) hold(keys map[string]*hsm.WrappedKey) {
	for _, k := range keys {
		c.holds[k.Digest()]++
	}
}

// letGo gives up what hold took.
func (c *consents) letGo(keys map[string]*hsm.WrappedKey) {
	var gone [][32]byte
	for _, k := range keys {
		d := k.Digest()
		if c.holds[d]--; c.holds[d] == 0 {
			delete(c.holds, d)
			gone = append(gone, d)
		}
	}
	if len(gone) > 0 {
		c.ended(gone)
	}
}

// prune forgets authorisations that ended before now.
func (c *consents) prune(now time.Time) {
	for id, l := range c.live {
		if now.After(l.notAfter) {
			c.forget(id)
		}
	}
}

// dropSigner forgets a signer's authorisations: the signer was stopped or the PIN changed.
func (c *consents) dropSigner(signer string) { c.drop(func(p pair) bool { return p.signer == signer }) }

// dropApplication forgets an application's authorisations.
func (c *consents) dropApplication(id string) {
	c.drop(func(p pair) bool { return p.application == id })
}

func (c *consents) drop(which func(pair) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, l := range c.live {
		if which(l.pair) {
			c.forget(id)
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
func (c *consents) reserve(id, application, signer string, digest evidence.Digest, now time.Time) (*Reservation, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.live[id]
	if l == nil || l.pair != (pair{application, signer}) || now.After(l.notAfter) {
		return nil, errAuthorizationBad
	}
	if l.digests != nil {
		if _, bound := l.digests[digest]; !bound {
			return nil, errAuthorizationBad
		}
	}
	if l.free <= 0 || l.digests != nil && !l.digests[digest] {
		return nil, errAuthorizationSpent
	}
	if l.digests != nil {
		l.digests[digest] = false
	}
	l.free--
	l.reserved++
	// A use under way unwraps the keys again if the authorisation ends meanwhile: they are forgotten after it.
	keys := l.keys
	c.hold(keys)
	return &Reservation{Stored: l.stored, Auth: l.auth, Keys: keys, settle: func(kept bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.letGo(keys)
		l.reserved--
		if !kept {
			l.free++
			if l.digests != nil {
				l.digests[digest] = true
			}
		}
		// Used up: what is left only answers "used up", until it would have ended. A dropped one is weighed no more.
		if l.free == 0 && l.reserved == 0 && c.live[id] == l {
			c.leavePair(l)
			c.weigh(l, spentBytes-l.bytes)
			c.letGo(l.keys)
			l.auth, l.stored, l.digests, l.keys, l.bytes = nil, nil, nil, nil, spentBytes
		}
	}}, nil
}

// Reserve takes one use of the consent that a sign request names, for the document with the digest. The caller
// ends it with [Reservation.Keep] or [Reservation.Release].
//
// With an authorisation's id the live one must belong to application and signer and cover the digest. Without one,
// the method must be app-asserted, which makes an authorisation of this request alone. While time is not trusted
// nothing is reserved: whether an authorisation has ended cannot be told.
func (s *Service) Reserve(ctx context.Context, app *Application, signer *Signer, digest evidence.Digest, id string, method evidence.Method, assertion string) (*Reservation, error) {
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, errConsentTime
	}
	if err := s.usable(applicationObject(app.ID)); err != nil { // the signer's state was asked for with the key
		return nil, err
	}
	if id != "" {
		if method != "" && method != evidence.SignerPIN || assertion != "" {
			return nil, problem.Invalid("authorization", "给出 id 时不得再写其他方式 (an id excludes another method)")
		}
		r, err := s.consents.reserve(id, app.ID, signer.ID, digest, now.Time)
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
	keys, err := s.keysWithoutPIN(ctx, signer)
	if err != nil {
		return nil, err
	}
	// The words are repeated in every verdict.
	if err := problem.CheckText("authorization.assertion", assertion, maxAssertion); err != nil {
		return nil, err
	}
	a := &evidence.Authorization{
		Version: 1, Method: evidence.AppAsserted, Level: 1, Subject: signer.ID, Application: app.ID,
		DigestAlgorithm: digest.Algorithm, Digests: []string{digest.Value}, GrantedAt: now.Time.UTC().Format(time.RFC3339Nano), Proof: assertion,
	}
	stored, err := number(a)
	if err != nil {
		return nil, err
	}
	r := &Reservation{Stored: stored, Auth: a, Keys: keys}
	if len(keys) > 0 {
		r.settle = func(bool) {
			if now, _ := s.Signer(signer.ID); now != signer {
				s.forgetKeys(digestsOf(keys)) // they were taken back meanwhile
			}
		}
	}
	return r, nil
}

// number draws id and nonce and answers the stored form, read back as a verifier will read it.
func number(a *evidence.Authorization) (stored []byte, err error) {
	if a.ID, err = newID(); err != nil {
		return nil, err
	}
	if a.Nonce, err = newID(); err != nil {
		return nil, err
	}
	if stored, err = a.Bytes(); err != nil {
		return nil, err
	}
	_, err = evidence.ParseAuthorization(stored)
	return stored, err
}

var (
	errConsentInsufficient = problem.New(problem.ConsentInsufficient,
		"该应用的策略不接受这种同意方式 (the application's policy does not accept this method of consent)",
		"请用签名人 PIN 申请授权 (request an authorisation with the signer's PIN)")
	errConsentTime = problem.New(problem.TimeUntrusted,
		"时间不可信，授权的有效期无从判断 (time is not trusted; when consent begins and ends cannot be told)",
		"检查时间源；恢复后重试 (check the time sources, then try again)")
	errApplicationStopped = problem.New(problem.ApplicationStopped, "该应用已被管理员停用 (application stopped by an administrator)", "请联系系统管理员 (ask the administrator)")
	errNotAllowedToSign   = problem.New(problem.Forbidden, "该应用没有签名权限 (the application may not sign)", "请管理员授权 (ask an administrator)")
	errPINLocked          = problem.New(problem.PINLocked,
		"该签名人的 PIN 在本应用中已锁定，其他应用不受影响 (the signer's PIN is locked for this application; others are not concerned)",
		"请管理员查明是谁在试，再重置 PIN (ask an administrator to find out who tried, and to set a new PIN)")
	errPINLockedAll = problem.New(problem.PINLocked,
		"该签名人的 PIN 在所有应用中已锁定 (the signer's PIN is locked for every application)",
		"请管理员查明是谁在试，再重置 PIN (ask an administrator to find out who tried, and to set a new PIN)")
)

// MaySign is nil, or why the application may not sign.
func MaySign(app *Application) error {
	switch {
	case app.Stopped:
		return errApplicationStopped
	case !app.Has(RightSign):
		return errNotAllowedToSign
	}
	return nil
}

// DrillPrefix begins the ids of a drill's application and signer, which have the same id.
const DrillPrefix = "drill-"

// Admits is nil, or why an application may have nothing signed by that signer. Who consents to a drill consents to no
// signature of somebody else's.
func Admits(app *Application, g *Signer) error {
	if strings.HasPrefix(app.ID, DrillPrefix) && g.ID != app.ID {
		return problem.New(problem.Forbidden, "演练的应用只能由演练的测试账号签名 (a drill's application has things signed by the drill's own test account alone)",
			"登记应用后再试 (register an application)")
	}
	if app.Production && g.Test {
		return problem.New(problem.SignerTest, "该签名人是测试账号，生产应用不接受 (the signer is a test account; applications of production refuse it)",
			"换用正式签名人；测试请用未标为 production 的应用 (use a real signer, or test with an application that is not of production)")
	}
	return nil
}

func allows(app *Application, m evidence.Method) bool {
	for _, ok := range app.Consent {
		if ok == m {
			return true
		}
	}
	return false
}

// Algorithms of the digests that an authorisation is bound to.
const (
	digestSM3 = "SM3"
	digestSHA = "SHA-256"
)

// checkGrant also names the digests' algorithm if q leaves it out.
func checkGrant(q *GrantRequest) error {
	oneTime := len(q.Digests) > 0
	if oneTime && q.DigestAlgorithm == "" {
		q.DigestAlgorithm = digestSM3
	}
	switch {
	case !reSigner.MatchString(q.Signer):
		return errSignerUnknown
	case oneTime && (q.Count != 0 || q.Seconds != 0):
		return problem.Invalid("digests", "一次性授权与限次授权二选一 (give digests, or count and seconds, not both)")
	case !oneTime && q.DigestAlgorithm != "":
		return problem.Invalid("digest_algorithm", "只与 digests 同用 (goes with digests alone)")
	case oneTime && q.DigestAlgorithm != digestSM3 && q.DigestAlgorithm != digestSHA:
		return problem.Invalid("digest_algorithm", "须为 SM3 或 SHA-256 (must be SM3 or SHA-256)")
	case oneTime && len(q.Digests) > evidence.MaxDigests:
		return problem.Invalid("digests", "一次最多 %d 项 (%d at most)", evidence.MaxDigests, evidence.MaxDigests)
	case !oneTime && (q.Count < 1 || q.Count > evidence.MaxDigests):
		return problem.Invalid("count", "须为 1–%d (1 to %d)", evidence.MaxDigests, evidence.MaxDigests)
	case !oneTime && (q.Seconds < 1 || q.Seconds > int(maxActivation/time.Second)):
		return problem.Invalid("seconds", "须为 1–%d (1 to %d)", int(maxActivation/time.Second), int(maxActivation/time.Second))
	}
	seen := make(map[string]bool, len(q.Digests))
	for _, d := range q.Digests {
		if len(d) != 32 {
			return problem.Invalid("digests", "摘要须为 32 字节 (a digest has 32 bytes)")
		}
		if seen[string(d)] {
			return problem.Invalid("digests", "摘要重复 (a digest is repeated)")
		}
		seen[string(d)] = true
	}
	return checkPINForm(q.PIN)
}

// recordLimit bounds the recording of a PIN check, during which the signer's other checks wait.
const recordLimit = 30 * time.Second

// Authorize checks the signer's PIN and grants an authorisation.
//
// One check at a time runs for a signer, and a failure is on disk before it is answered, so that neither parallel
// guesses nor a pulled plug give free tries. Once the PIN was checked, the caller's leaving changes nothing: the outcome
// is recorded. An error of the journal says the same whether the PIN was right or wrong, and a wrong one counts all the
// same until the next start. The token's own PIN is never involved: a wrong PIN here cannot lock it.
func (s *Service) Authorize(ctx context.Context, app *Application, q GrantRequest) (*Grant, error) {
	if err := MaySign(app); err != nil {
		return nil, err
	}
	if !allows(app, evidence.SignerPIN) {
		return nil, errConsentInsufficient
	}
	if err := checkGrant(&q); err != nil {
		return nil, err
	}
	unlock, err := s.pinGates.Lock(ctx, q.Signer)
	if err != nil {
		return nil, journalProblem(err)
	}
	defer unlock()
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, errConsentTime
	}
	g, ok := s.Signer(q.Signer)
	if !ok {
		return nil, errSignerUnknown
	}
	if err := s.usable(signerObject(g.ID), applicationObject(app.ID)); err != nil {
		return nil, err
	}
	if g.Stopped {
		return nil, errSignerStopped
	}
	if err := Admits(app, g); err != nil {
		return nil, err
	}
	if g.PIN == nil {
		return nil, problem.New(problem.ConsentInsufficient, "该签名人未设 PIN (the signer has no PIN)", "请管理员设置 PIN (ask an administrator to set one)")
	}
	failures, all := s.pinCount(app.ID, g.ID)
	if err := pinLocked(failures, all); err != nil {
		return nil, err
	}
	if err := s.consents.room(pair{app.ID, g.ID}, len(q.Digests), now.Time); err != nil {
		return nil, err // before the PIN, so that a right one is not spent on nothing
	}
	good, err := g.PIN.check(ctx, s.macs, g.ID, q.PIN)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordLimit)
	defer cancel()
	if !good {
		return nil, s.wrongPIN(ctx, "application/"+app.ID, app.ID, g)
	}
	if s.behind(g) {
		g = s.follow(ctx, g, q.PIN, now.Time)
	}
	keys, err := s.openKeys(ctx, g, q.PIN)
	if err != nil {
		return nil, s.orChanged(g, fmt.Errorf("account: opening the custody keys of %s: %w", g.ID, err))
	}

	a := &evidence.Authorization{
		Version: 1, Method: evidence.SignerPIN, Level: 2, Subject: g.ID, Application: app.ID, Count: q.Count,
		GrantedAt: now.Time.UTC().Format(time.RFC3339Nano), Proof: "PIN verified with key " + g.PIN.MACKey.label(PINKeyLabel) + " inside the cipher machine",
	}
	notAfter, remaining := now.Time.Add(time.Duration(q.Seconds)*time.Second), q.Count
	if len(q.Digests) > 0 {
		notAfter, remaining = now.Time.Add(oneTimeLife), len(q.Digests)
		a.DigestAlgorithm = q.DigestAlgorithm
		for _, d := range q.Digests {
			a.Digests = append(a.Digests, hex.EncodeToString(d))
		}
	}
	a.NotAfter = notAfter.UTC().Format(time.RFC3339Nano)
	stored, err := number(a)
	if err != nil {
		return nil, err
	}
	hash := evidence.HashAuthorization(stored)
	r, err := s.cfg.Journal.Append(ctx, audit.Draft{
		Kind: kindGrant, Actor: "application/" + app.ID, Object: g.ID, State: failures > 0, // a success after failures resets the count: replayed
		Fields:   []audit.Field{text("application", app.ID), text("method", string(a.Method)), octets("authorization_sm3", hash[:])},
		Payloads: []audit.Attachment{{Name: "authorization", MediaType: "application/json", Data: stored}},
	})
	if err != nil {
		return nil, journalProblem(err)
	}
	if err := s.apply(ctx, &r.Entry, nil, nil); err != nil {
		return nil, err
	}
	// What is in the journal and not live is harmless: it cannot be used.
	err = s.consents.add(a, stored, notAfter, keys, func() error {
		present, ok := s.Signer(g.ID)
		asking, _, known := s.Application(app.ID)
		switch {
		case !ok || present.Stopped:
			return errSignerStopped
		case present != g: // another version: perhaps another PIN
			return errSignerChanged
		case known && asking.Stopped:
			return errApplicationStopped
		case known:
			return Admits(asking, present)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &Grant{ID: a.ID, Method: a.Method, Signer: g.ID, Remaining: remaining, NotAfter: notAfter}, nil
}

var errSignerChanged = problem.New(problem.AuthorizationBad, "签名人或其 PIN 刚被变更 (the signer or the PIN was changed meanwhile)", "重新申请授权 (ask again)")

// wrongPIN counts a failure, durably, and answers the refusal.
func (s *Service) wrongPIN(ctx context.Context, actor, application string, g *Signer) error {
	if err := s.note(ctx, audit.Draft{Kind: kindPINFailed, Actor: actor, Object: g.ID, Fields: []audit.Field{text("application", application)}}); err != nil {
		s.mu.Lock()
		s.countWrongPIN(application, g.ID)
		s.mu.Unlock()
		return err
	}
	failures, all := s.pinCount(application, g.ID)
	if err := pinLocked(failures, all); err != nil {
		return err
	}
	left := min(MaxPINTries-failures, MaxPINTriesAll-all)
	p := problem.New(problem.PINWrong, fmt.Sprintf("PIN 错误，还可尝试 %d 次 (wrong PIN, %d tries left)", left, left), "核对后重新输入，勿自动重试 (ask the signer again; never retry by program)")
	p.TriesLeft = left
	return p
}
