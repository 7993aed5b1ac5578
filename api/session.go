package api

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/labstack/echo/v4"
	"golang.org/x/sys/unix"

	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// Accounts are the administrators. A refusal is a *problem.Problem.
type Accounts interface {
	// Administrator answers one who may administer now, with the present version: not one who is stopped, or of whom the two
	// campuses do not say the same. mustChange: nothing but the password.
	Administrator(id string) (a *account.Administrator, mustChange, ok bool)
	// Authenticate looks at a login; it journals it.
	Authenticate(ctx context.Context, l account.LoginAttempt) (*account.Administrator, error)
	ChangePassword(ctx context.Context, actor, from, id string, req ChangePassword) (any, error)
	BootstrapAdministrators(ctx context.Context, actor string, req BootstrapAdministrators) (any, error)
	AddAdministrator(ctx context.Context, actor string, req AddAdministrator) (any, error)
	ListAdministrators(ctx context.Context, actor string) (any, error)
	StopAdministrator(ctx context.Context, actor string, req Decision) (any, error)
	StartAdministrator(ctx context.Context, actor string, req Decision) (any, error)
	SetAdministratorPassword(ctx context.Context, actor string, req SetAdministratorPassword) (any, error)
	SetAdministratorCertificate(ctx context.Context, actor string, req SetAdministratorCertificate) (any, error)
	// Note journals what became of a session or a proposal; it returns when that is on disk.
	Note(ctx context.Context, n Notice) error
}

// A Notice is an entry about a session or a proposal.
type Notice struct {
	Kind   string // "administration.…"
	Actor  string
	Object string   // the administrator, or the proposal's id
	Fields []string // names and values in turn
}

const (
	sessionIdle = 15 * time.Minute
	sessionLife = 8 * time.Hour
	// Of one administrator, and of all; the one that was idle for longest makes way.
	maxOwnSessions = 8
	maxSessions    = 256

	challengeLife = 2 * time.Minute
	// loginsPerMinute are the failures that one address may make.
	loginsPerMinute = 20

	sessionCookie = "__Host-yinjian"
	csrfHeader    = "X-Yinjian-CSRF"

	listenerLocal = "local"
	listenerTLS   = "admin"
)

// A Session is who asks something of the administration.
type Session struct {
	Administrator string // id; "" where nobody has logged in
	Name          string
	Role          Role
	MustChange    bool // the password, and nothing else

	open     bool   // on an open local socket: may do everything
	who      string // without an administrator: whom the kernel names
	key      [32]byte
	listener string
	version  int       // of the administrator
	begun    time.Time // monotonic
	used     time.Time // monotonic; guarded by sessions.mu
}

// actor is who the journal says it was. Names hold no brackets.
func (sess *Session) actor() string {
	if sess.Administrator == "" {
		return sess.who
	}
	return "admin:" + sess.Administrator + "(" + sess.Name + "，" + string(sess.Role) + ")"
}

// person is what stands for the administrator where two persons are named.
func (sess *Session) person() string {
	if p := sess.Name + "(" + sess.Administrator + ")"; len(p) <= 64 {
		return p
	}
	return sess.Administrator
}

// sessions are in memory: a restart ends them all. What is kept of a token is its SM3.
type sessions struct {
	csrfKey, challengeKey [32]byte

	mu    sync.Mutex
	of    map[[32]byte]*Session // guarded by mu
	born  time.Time             // guarded by mu; monotonic: what challenges count their time from
	spent map[string]time.Time  // guarded by mu: challenges that somebody logged in with, and when they were given out
}

func newSessions() *sessions {
	s := &sessions{of: map[[32]byte]*Session{}, born: time.Now(), spent: map[string]time.Time{}} // interval

	rand.Read(s.csrfKey[:]) // never fails (crypto/rand)
	rand.Read(s.challengeKey[:])
	return s
}

// begin makes a session with an id of its own, whatever session the request came with.
func (s *sessions) begin(a *account.Administrator, listener string) (token string, sess *Session) {
	var secret [32]byte
	rand.Read(secret[:])
	now := time.Now() // interval
	sess = &Session{Administrator: a.ID, Name: a.Name, Role: a.Role, key: sm3.Sum(secret[:]), listener: listener, version: a.Version, begun: now, used: now}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.makeRoom(a.ID)
	s.of[sess.key] = sess
	return hex.EncodeToString(secret[:]), sess
}

// makeRoom ends sessions that are over, and the one that was idle for longest where there are too many.
func (s *sessions) makeRoom(id string) {
	own, oldest, oldestOwn := 0, (*Session)(nil), (*Session)(nil)
	for key, o := range s.of {
		if o.over() {
			delete(s.of, key)
			continue
		}
		if oldest == nil || o.used.Before(oldest.used) {
			oldest = o
		}
		if o.Administrator == id {
			own++
			if oldestOwn == nil || o.used.Before(oldestOwn.used) {
				oldestOwn = o
			}
		}
	}
	switch {
	case own >= maxOwnSessions:
		delete(s.of, oldestOwn.key)
	case len(s.of) >= maxSessions:
		delete(s.of, oldest.key)
	}
}

// over is called under sessions.mu.
func (sess *Session) over() bool {
	return time.Since(sess.used) >= sessionIdle || time.Since(sess.begun) >= sessionLife // interval
}

// find answers a copy of a live session by its token, and counts as its use.
func (s *sessions) find(token, listener string) *Session {
	secret, err := hex.DecodeString(token)
	if err != nil || len(secret) != 32 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sess := s.of[sm3.Sum(secret)]
	if sess == nil || sess.listener != listener {
		return nil
	}
	if sess.over() {
		delete(s.of, sess.key)
		return nil
	}
	sess.used = time.Now() // interval
	now := *sess
	return &now
}

func (s *sessions) end(sess *Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.of, sess.key)
}

// challenge gives out 32 bytes: the time, eight that nobody can foretell, and a MAC over both. Nothing is kept of it, so that
// whoever asks for many takes nobody else's away.
func (s *sessions) challenge() []byte {
	s.mu.Lock()
	age := time.Since(s.born) // interval
	s.mu.Unlock()
	b := binary.BigEndian.AppendUint64(nil, uint64(age))
	b = append(b, make([]byte, 8)...)
	rand.Read(b[8:])
	return s.sealed(b)
}

// sealed is the challenge that begins with b, 16 bytes.
func (s *sessions) sealed(b []byte) []byte {
	m := hmac.New(sm3.New, s.challengeKey[:])
	m.Write(b)
	return append(b[:16:16], m.Sum(nil)[:16]...)
}

// givenOut says when a challenge was given out, if it was, not too long ago, and nobody has logged in with it. It is called
// under mu.
func (s *sessions) givenOut(b []byte) (at time.Time, ok bool) {
	if len(b) != 32 || !hmac.Equal(b, s.sealed(b[:16])) {
		return at, false
	}
	at = s.born.Add(time.Duration(binary.BigEndian.Uint64(b)))
	_, spent := s.spent[string(b)]
	return at, !spent && time.Since(at) < challengeLife // interval
}

// open says whether somebody may still log in with a challenge.
func (s *sessions) open(challenge []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.givenOut(challenge)
	return ok
}

// spend is open once: it is for somebody who has proved who he is, so that nobody else fills what is remembered.
func (s *sessions) spend(challenge []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c, at := range s.spent {
		if time.Since(at) >= challengeLife { // interval
			delete(s.spent, c)
		}
	}
	at, ok := s.givenOut(challenge)
	if ok {
		s.spent[string(challenge)] = at
	}
	return ok
}

// csrf is what a request that bears the cookie has to bring beside it, unless it only reads.
func (s *sessions) csrf(sess *Session) string {
	m := hmac.New(sm3.New, s.csrfKey[:])
	m.Write(sess.key[:])
	return hex.EncodeToString(m.Sum(nil))
}

var errLoginRequired = problem.New(problem.LoginRequired, "须先登录，或会话已结束 (log in first; a session ends after 15 minutes idle, or with any change of the administrator)",
	"yinjian login --name 登录名 (log in)")

// callerOf says which listener a request came by, and whom the kernel names where that is the local socket.
func (s *Server) callerOf(c echo.Context) (listener, who string, p *problem.Problem) {
	r := c.Request()
	peer, ok := r.Context().Value(peerKey{}).(*unix.Ucred)
	if !ok || peer == nil {
		if r.TLS != nil && r.Context().Value(adminTLSKey{}) != nil {
			return listenerTLS, exchangeOf(c).remote.String(), nil
		}
		return "", "", problem.New(problem.Forbidden, "无法确认本机调用者 (the kernel does not say who calls)", "请通过本机管理套接字访问 (use the local socket)")
	}
	who = actorOf(peer.Uid)
	exchangeOf(c).operator = who
	if peer.Uid != 0 && int(peer.Uid) != os.Getuid() {
		return "", "", problem.New(problem.Forbidden, "该用户不能管理设备 (this user may not administer the appliance)", "请使用 root 或设备服务用户 (use root or the service's user)")
	}
	return listenerLocal, who, nil
}

// sessionOf says who asks: an administrator who has logged in at this listener, or whoever an open local socket lets in.
func (s *Server) sessionOf(c echo.Context) (*Session, *problem.Problem) {
	listener, who, p := s.callerOf(c)
	if p != nil {
		return nil, p
	}
	r := c.Request()
	if len(r.Header[echo.HeaderAuthorization]) > 1 { // whoever stands between may have looked at the other
		return nil, problem.Invalid("header.Authorization", "只能有一个 (one at most)")
	}
	token, cookie := strings.CutPrefix(r.Header.Get(echo.HeaderAuthorization), "Bearer ")
	if cookie = !cookie; cookie {
		token = ""
		if k, err := r.Cookie(sessionCookie); err == nil && listener == listenerTLS {
			token = k.Value
		}
	}
	if token == "" {
		if listener == listenerLocal && !s.cfg.AdminLogin {
			return &Session{Name: who, who: who, open: true}, nil
		}
		return nil, errLoginRequired
	}
	sess := s.sessions.find(token, listener)
	if sess == nil {
		return nil, errLoginRequired
	}
	a, must, ok := s.cfg.Accounts.Administrator(sess.Administrator)
	if !ok || a.Version != sess.version {
		s.sessions.end(sess)
		return nil, errLoginRequired
	}
	if cookie && r.Method != http.MethodGet && r.Method != http.MethodHead && !s.ownPage(c, sess) {
		return nil, problem.New(problem.Forbidden, "请求没有带本会话的防伪令牌 (the request does not bear the session's token against forgery)", "从页面重新提交 (send it from the page again)")
	}
	sess.MustChange = must
	exchangeOf(c).operator = sess.actor()
	return sess, nil
}

// ownPage says whether a request with the cookie is from a page of ours: it bears what only such a page knows.
func (s *Server) ownPage(c echo.Context, sess *Session) bool {
	got := c.Request().Header.Get(csrfHeader)
	if got == "" && strings.HasPrefix(c.Request().Header.Get(echo.HeaderContentType), echo.MIMEApplicationForm) {
		got = c.FormValue("csrf")
	}
	return hmac.Equal([]byte(got), []byte(s.sessions.csrf(sess)))
}

func actorOf(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return "local uid=" + id + "(" + u.Username + ")"
	}
	return "local uid=" + id // a user without a name is still one user
}

type adminTLSKey struct{}
