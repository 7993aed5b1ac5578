package api

import (
	"regexp"
	"time"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// The bodies of the routes about administrators and their sessions.
type (
	AddAdministrator            = wire.AddAdministrator
	BootstrapAdministrators     = wire.BootstrapAdministrators
	SetAdministratorPassword    = wire.SetAdministratorPassword
	SetAdministratorCertificate = wire.SetAdministratorCertificate
	ChangePassword              = wire.ChangePassword
)

var administratorID = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,31}$`)

const (
	maxPassword   = 256 // bytes of one that somebody tries; the directory says what a new one may have
	maxLoginBody  = 16 << 10
	maxLoginProof = 512
)

func (s *Server) accountRoutes(e *echo.Echo) {
	a := s.cfg.Accounts
	e.POST("/admin/v1/administrators/bootstrap", administered(s, checkBootstrap, a.BootstrapAdministrators))
	e.POST("/admin/v1/administrators", administered(s, func(_ echo.Context, r *AddAdministrator) *problem.Problem { return checkAdministrator("", r) }, a.AddAdministrator))
	e.GET("/admin/v1/administrators", s.listed(a.ListAdministrators))
	e.POST("/admin/v1/administrators/:id/stop", administered(s, checkAdministratorDecision, a.StopAdministrator))
	e.POST("/admin/v1/administrators/:id/start", administered(s, checkAdministratorDecision, a.StartAdministrator))
	e.POST("/admin/v1/administrators/:id/password", administered(s, func(c echo.Context, r *SetAdministratorPassword) *problem.Problem {
		r.ID = c.Param("id")
		return first(pattern("path.id", r.ID, administratorID), password("password", r.Password))
	}, a.SetAdministratorPassword))
	e.POST("/admin/v1/administrators/:id/certificate", administered(s, func(c echo.Context, r *SetAdministratorCertificate) *problem.Problem {
		r.ID = c.Param("id")
		return first(pattern("path.id", r.ID, administratorID), blob("certificate", r.Certificate, 16<<10))
	}, a.SetAdministratorCertificate))
	e.POST("/admin/v1/login", s.loggingIn)
	e.POST("/admin/v1/login/challenge", s.local(jsonBody(maxLoginBody), func(c echo.Context, _ string, body []byte) error {
		var req wire.LoginChallenge
		if p := decode(body, &req); p != nil {
			return p
		}
		return answer(c, wire.LoginChallenged{Challenge: s.sessions.challenge()})
	}))
	e.POST("/admin/v1/logout", s.local(jsonBody(maxLoginBody), func(c echo.Context, actor string, body []byte) error {
		var req wire.Logout
		if p := decode(body, &req); p != nil {
			return p
		}
		sess := exchangeOf(c).session
		if sess.Administrator == "" {
			return errLoginRequired
		}
		s.sessions.end(sess)
		if err := s.cfg.Accounts.Note(c.Request().Context(), Notice{Kind: "administration.logout", Actor: actor, Object: sess.Administrator}); err != nil {
			return err
		}
		return answer(c, loggedIn(sess))
	}))
	e.GET("/admin/v1/session", s.local(noBody, func(c echo.Context, _ string, _ []byte) error {
		return answer(c, loggedIn(exchangeOf(c).session))
	}))
	e.POST("/admin/v1/password", s.local(jsonBody(maxLoginBody), func(c echo.Context, actor string, body []byte) error {
		var req ChangePassword
		if p := first(decode(body, &req), password("old", req.Old), password("password", req.Password)); p != nil {
			return p
		}
		sess := exchangeOf(c).session
		if sess.Administrator == "" {
			return errLoginRequired
		}
		return s.guessing(c, func(from string) error {
			out, err := s.cfg.Accounts.ChangePassword(c.Request().Context(), actor, from, sess.Administrator, req)
			if err != nil {
				return err
			}
			return answer(c, out)
		})
	}))
}

// loggingIn begins a session. Nothing of a session that the request may bear is used.
func (s *Server) loggingIn(c echo.Context) error {
	sess, err := s.login(c)
	if err != nil {
		return err
	}
	return answer(c, sess)
}

// login looks at a login, and answers the session with its token.
func (s *Server) login(c echo.Context) (*wire.LoggedIn, error) {
	listener, _, p := s.callerOf(c)
	if p != nil {
		return nil, p
	}
	data, err := s.receive(c, jsonBody(maxLoginBody), nil)
	if err != nil {
		return nil, err
	}
	var req wire.Login
	if p := first(decode(data, &req), missingText("name", req.Name), password("password", req.Password), blob("challenge", req.Challenge, 32), blob("signature", req.Signature, maxLoginProof)); p != nil {
		return nil, p
	}
	var out *wire.LoggedIn
	err = s.guessing(c, func(from string) error {
		if !s.sessions.open(req.Challenge) {
			req.Challenge, req.Signature = nil, nil // as if there were none
		}
		a, err := s.cfg.Accounts.Authenticate(c.Request().Context(), account.LoginAttempt{ID: req.Name, Password: req.Password, Challenge: req.Challenge, Signature: req.Signature, From: from})
		if err != nil {
			return err
		}
		_, must, ok := s.cfg.Accounts.Administrator(a.ID)
		if !ok || req.Challenge != nil && !s.sessions.spend(req.Challenge) {
			return errLoginRequired // stopped, or it was sent twice, at this moment
		}
		token, sess := s.sessions.begin(a, listener)
		now := *sess
		now.MustChange = must
		out = loggedIn(&now)
		out.Session = token
		return nil
	})
	return out, err
}

// guessing bounds the failures of an address.
func (s *Server) guessing(c echo.Context, do func(from string) error) error {
	listener, who, p := s.callerOf(c)
	if p != nil {
		return p
	}
	from := household(exchangeOf(c).remote)
	if after := s.guesses.wait(from, ""); after > 0 {
		p := problem.New(problem.RateLimited, "来自该处的登录失败过多 (too many failed logins from here)", retryLater)
		p.After = after
		return p
	}
	err := do(listener + " " + who)
	if problem.CodeOf(err) == problem.LoginFailed {
		s.guesses.count(from, "")
	}
	return err
}

func loggedIn(sess *Session) *wire.LoggedIn {
	out := &wire.LoggedIn{Administrator: sess.Administrator, Name: sess.Name, Role: string(sess.Role), MustChange: sess.MustChange}
	if sess.Administrator != "" {
		out.IdleS, out.EndsS = int(sessionIdle/time.Second), int((sessionLife-time.Since(sess.begun))/time.Second) // interval
	}
	return out
}

func missingText(field, v string) *problem.Problem {
	if v == "" || len(v) > 64 {
		return problem.Invalid(field, "须为 1–64 字节 (1 to 64 bytes)")
	}
	return nil
}

func password(field, v string) *problem.Problem {
	if v == "" || len(v) > maxPassword {
		return problem.Invalid(field, "须为 1–%d 字节 (1 to %d bytes)", maxPassword, maxPassword)
	}
	return nil
}

func checkAdministrator(at string, r *AddAdministrator) *problem.Problem {
	var roles []string
	for _, one := range account.Roles {
		roles = append(roles, string(one))
	}
	return first(pattern(at+"id", r.ID, administratorID), text(at+"name", r.Name, 64), oneOf(at+"role", r.Role, roles...), password(at+"password", r.Password),
		blob(at+"certificate", r.Certificate, 16<<10))
}

func checkBootstrap(_ echo.Context, r *BootstrapAdministrators) *problem.Problem {
	if len(r.Administrators) != 3 {
		return problem.Invalid("administrators", "须为三人 (three)")
	}
	for i := range r.Administrators {
		if p := checkAdministrator("administrators["+string(rune('0'+i))+"].", &r.Administrators[i]); p != nil {
			return p
		}
	}
	return nil
}

func checkAdministratorDecision(c echo.Context, r *Decision) *problem.Problem {
	r.ID = c.Param("id")
	return first(pattern("path.id", r.ID, administratorID), text("reason", r.Reason, 256))
}
