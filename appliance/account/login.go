package account

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
)

const passwordDomain = "yinjian/administrator-password/v1\x00"

// Logins cost some 100 ms of a processor each: two at once, and a short queue, leave the rest to signing.
const (
	loginsAtOnce  = 2
	loginsWaiting = 16
)

type loginPlaces struct {
	places  chan struct{}
	waiting atomic.Int32
	// Of nobody: what the password and the signature of one who does not exist are held against, in the same time.
	decoy PINVerifier
	key   *sm2.PrivateKey
}

func newLoginPlaces() *loginPlaces {
	l := &loginPlaces{places: make(chan struct{}, loginsAtOnce), decoy: PINVerifier{Salt: make([]byte, 16), Iterations: passwordIterations, Tag: make([]byte, 32)}}
	rand.Read(l.decoy.Salt) // never fails (crypto/rand)
	rand.Read(l.decoy.Tag)
	var err error
	if l.key, err = sm2.GenerateKey(rand.Reader); err != nil {
		panic(err) // never (crypto/rand)
	}
	return l
}

// queue takes a place among those who wait or are looked at.
func (l *loginPlaces) queue() (leave func(), err error) {
	if l.waiting.Add(1) > loginsAtOnce+loginsWaiting {
		l.waiting.Add(-1)
		return nil, problem.New(problem.RateLimited, "同时登录的过多 (too many logins at once)", "稍后重试 (try again later)")
	}
	return func() { l.waiting.Add(-1) }, nil
}

// enter waits until there is a processor for one that is in the queue.
func (l *loginPlaces) enter(ctx context.Context) (leave func(), err error) {
	select {
	case l.places <- struct{}{}:
		return func() { <-l.places }, nil
	case <-ctx.Done():
		return nil, journalProblem(ctx.Err())
	}
}

// A LoginAttempt is what somebody brings who wants to log in.
type LoginAttempt struct {
	ID, Password string
	// Challenge and Signature: SM2 with SM3 (DER, the default identifier of GM/T 0009) over LoginPrefix and the challenge, which
	// the caller has given out once. Needed where the administrator has a certificate.
	Challenge, Signature []byte
	From                 string // where from, for the journal
}

// errLogin says the same of an unknown name, a wrong password or signature, and one who is stopped or locked.
var errLogin = problem.New(problem.LoginFailed, "登录名、口令或签名不正确，或账号已停用、锁定 (name, password or signature is wrong, or the account is stopped or locked)",
	"核对后重试；连续失败 5 次锁定 15 分钟 (check and try again; five failures lock for 15 minutes)")

// AuthenticateAdministrator looks at a login. One is looked at at a time for an administrator, and a failure is on disk before it
// is answered; the answer and its time do not tell which part was wrong. Both outcomes are journalled ([Service.TellFailedLogins]
// tells of many in one); when they cannot be, nobody gets in.
func (s *Service) AuthenticateAdministrator(ctx context.Context, l LoginAttempt) (*Administrator, error) {
	return s.authenticate(ctx, l, "login")
}

func (s *Service) authenticate(ctx context.Context, l LoginAttempt, act string) (*Administrator, error) {
	if !reAdministrator.MatchString(l.ID) {
		l.ID = "?" // nobody's
	}
	if len(l.Password) > maxPassword {
		l.Password = ""
	}
	unqueue, err := s.logins.queue()
	if err != nil {
		return nil, err
	}
	defer unqueue()
	unlock, err := s.pinGates.Lock(ctx, "administrator/"+l.ID)
	if err != nil {
		return nil, journalProblem(err)
	}
	defer unlock()
	leave, err := s.logins.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	a, known := s.Administrator(l.ID)
	v := s.logins.decoy
	if known {
		v = *a.Password
	} else if v.MACKey, err = s.macs.present(ctx, PINKeyLabel); err != nil {
		return nil, err
	}
	good, err := v.checkOf(ctx, s.macs, passwordDomain, l.ID, l.Password)
	elsewhere := isElsewhere(err) // nobody gets in here; who asks is not told, for it would tell which names there are
	if err != nil && !elsewhere {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordLimit)
	defer cancel()
	now := s.cfg.Clock.Now()
	signed := act != "login" || s.signedLogin(a, l)
	s.mu.RLock()
	failed := s.loginFailures[l.ID]
	frozen := s.objects[administratorObject(l.ID)].known().frozen != ""
	s.mu.RUnlock()
	locked := failed.locked(now.Time, now.Trusted())
	d := audit.Draft{Kind: kindLogin, Actor: "admin:" + l.ID, Object: l.ID, Fields: []audit.Field{text("act", act), text("from", l.From)}}
	if known && good && signed && !locked && !a.Stopped && !frozen {
		if failed == nil {
			_, err = s.cfg.Journal.Append(ctx, d)
			if err != nil {
				err = journalProblem(err)
			}
		} else {
			err = s.note(ctx, d) // ends the count of failures: replayed
		}
		if err == nil && act == "login" {
			s.mu.Lock()
			s.lastLogins[a.ID] = now.Time
			s.mu.Unlock()
		}
		return a, err
	}
	d.Kind, d.Actor = kindLoginFailed, "appliance"
	count := 0
	if known && !locked { // attempts while it is locked do not make it longer
		count = 1
		if failed != nil && failed.n < MaxLoginTries {
			count = failed.n + 1
		}
	}
	d.Fields = append(d.Fields, audit.Field{Name: fieldFailures, Value: audit.Int(count)}, boolean("locked", locked))
	if elsewhere {
		d.Fields = append(d.Fields, text("reason", string(problem.KeyElsewhere)))
	}
	if count == 0 { // changes nothing, and is not replayed
		if s.unheeded.count(l.From) {
			if _, err := s.cfg.Journal.Append(ctx, d); err != nil {
				return nil, journalProblem(err)
			}
		}
		return nil, errLogin
	}
	if err := s.note(ctx, d); err != nil {
		s.mu.Lock()
		s.loginFailures[l.ID] = &failedLogin{n: count, at: now.Time, seen: time.Now()} // interval
		s.mu.Unlock()
		return nil, err
	}
	return nil, errLogin
}

// Failed logins that change nothing, of names that nobody has and of who is locked, are as many as whoever makes them likes.
// Each has an entry of its own until there were unheededEach within an hour; the rest is counted, and told of in one entry.
const (
	unheededEach = 60
	unheededSpan = time.Hour
	unheededFrom = 16 // places that the entry names, each with its number
)

type unheededLogins struct {
	mu    sync.Mutex
	begun time.Time      // guarded by mu; monotonic: of the first that was counted
	n     int            // guarded by mu
	more  int            // guarded by mu: those without an entry
	from  map[string]int // guarded by mu: where they came from; "" for the places after the first unheededFrom
}

// count counts one, and says whether it has an entry of its own.
func (u *unheededLogins) count(from string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.more == 0 && time.Since(u.begun) >= unheededSpan { // interval
		u.begun, u.n, u.from = time.Now(), 0, map[string]int{} // interval
	}
	if u.n++; u.n <= unheededEach {
		return true
	}
	if _, known := u.from[from]; !known && len(u.from) >= unheededFrom {
		from = ""
	}
	u.from[from]++
	u.more++
	return false
}

// TellFailedLogins journals how many failed logins had no entry of their own, once their hour is over, or at once. Call it
// now and then, and before the journal is closed.
func (s *Service) TellFailedLogins(ctx context.Context, atOnce bool) error {
	u := &s.unheeded
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.more == 0 || !atOnce && time.Since(u.begun) < unheededSpan { // interval
		return nil
	}
	var from []string
	for _, place := range slices.Sorted(maps.Keys(u.from)) {
		from = append(from, fmt.Sprintf("%s ×%d", cmp.Or(place, "其他 (others)"), u.from[place]))
	}
	_, err := s.cfg.Journal.Append(ctx, audit.Draft{Kind: kindLoginFailed, Actor: "appliance", Object: "?", Fields: []audit.Field{
		text("act", "login"), text("from", strings.Join(from, "，")), {Name: fieldFailures, Value: audit.Int(0)}, {Name: "count", Value: audit.Int(u.more)},
	}})
	if err == nil {
		u.n, u.more, u.begun = 0, 0, time.Time{}
	}
	return err
}

// signedLogin says whether the login is signed as the administrator's certificate wants it; a is nil for nobody.
func (s *Service) signedLogin(a *Administrator, l LoginAttempt) bool {
	message := append([]byte(LoginPrefix), l.Challenge...)
	if a == nil || a.cert == nil {
		if l.Signature != nil { // takes its time all the same
			sm2.VerifyASN1WithSM2(&s.logins.key.PublicKey, nil, message, l.Signature)
		}
		return a != nil
	}
	if r := s.cfg.Clock.Now(); r.Trusted() && (r.Time.Before(a.cert.NotBefore) || r.Time.After(a.cert.NotAfter)) {
		return false
	}
	pub, ok := a.cert.PublicKey.(*ecdsa.PublicKey)
	return ok && len(l.Challenge) == 32 && sm2.VerifyASN1WithSM2(pub, nil, message, l.Signature)
}
