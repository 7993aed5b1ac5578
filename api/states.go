package api

import (
	"context"
	"net/http"
	"net/netip"

	"github.com/labstack/echo/v4"
	"github.com/sirupsen/logrus"

	"yinjian/api/wire"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
)

// The bodies of the routes about the appliance's states.
type (
	Unlock       = wire.Unlock
	Provision    = wire.Provision
	RetryStart   = wire.RetryStart
	SealUnlock   = wire.SealUnlock
	UnsealUnlock = wire.UnsealUnlock
)

// UnlockAdmin is the part of [Admin] that is about unattended unlocking.
type UnlockAdmin interface {
	SealUnlock(ctx context.Context, actor string, req SealUnlock) (any, error)
	UnsealUnlock(ctx context.Context, actor string, req UnsealUnlock) (any, error)
}

func (s *Server) unlockRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/unlock/seal", administered(s, func(_ echo.Context, r *SealUnlock) *problem.Problem {
		return first(text("reason", r.Reason, 256), twoPersons(r.Persons))
	}, a.SealUnlock))
	e.POST("/admin/v1/unlock/unseal", administered(s, func(_ echo.Context, r *UnsealUnlock) *problem.Problem {
		return text("reason", r.Reason, 256)
	}, a.UnsealUnlock))
}

// StateAdmin is what leads from one state to another. Each method refuses in a state where it means nothing.
type StateAdmin interface {
	// Unlock takes one holder's passphrase.
	Unlock(ctx context.Context, actor string, req Unlock) (any, error)
	// Provision makes an appliance of an empty folder.
	Provision(ctx context.Context, actor string, req Provision) (any, error)
	// RetryStart tries a start that failed again now.
	RetryStart(ctx context.Context, actor string, req RetryStart) (any, error)
}

// A Desk answers at the local socket while the appliance is not operational.
type Desk interface {
	StateAdmin
	// Standing is the state now, and the refusal of whatever needs another.
	Standing() (State, *problem.Problem)
	// State is shown as its JSON.
	State(ctx context.Context, actor string) (any, error)
}

// NewDesk is the http.Server of a desk. It serves what the table of routes (matrix.go) allows in the desk's state, and
// refuses the rest.
func NewDesk(d Desk, log logrus.FieldLogger, version string) *http.Server {
	l := Limits{}.filled()
	s := &Server{
		cfg: Config{Health: deskHealth{d}, Log: log, Version: version}, limits: l,
		bodies: newShares[netip.Prefix](l.InFlight), slots: newShares[string](int64(l.Concurrent)), sessions: newSessions(), standing: d.Standing,
	}
	s.admin = s.echo()
	s.stateRoutes(s.admin, d)
	s.admin.GET("/health/alive", s.alive)
	s.admin.GET("/health/ready", s.ready)
	s.admin.GET("/admin/v1/state", s.listed(d.State))
	s.admin.RouteNotFound("/*", func(echo.Context) error {
		_, p := d.Standing()
		return p
	})
	srv := s.NewAdminServer()
	srv.SetKeepAlivesEnabled(false) // the next request may be somebody else's to answer
	return srv
}

// deskHealth is a desk's health: it lives, and nothing is ready.
type deskHealth struct{ Desk }

func (deskHealth) Alive() error { return nil }

func (h deskHealth) Ready() (bool, []string) {
	state, _ := h.Standing()
	return false, []string{"设备状态 (state of the appliance): " + string(state)}
}

func (deskHealth) State() any { return nil }

func (deskHealth) Metrics() []byte { return nil }

// stateRoutes registers what the table refuses in the state operational; a is nil there.
func (s *Server) stateRoutes(e *echo.Echo, a StateAdmin) {
	e.POST("/admin/v1/unlock", administered(s, func(_ echo.Context, r *Unlock) *problem.Problem {
		if len(r.Passphrase) == 0 || len(r.Passphrase) > custody.MaxPassphrase {
			return problem.Invalid("passphrase", "须为 1–%d 字节 (1 to %d bytes)", custody.MaxPassphrase, custody.MaxPassphrase)
		}
		return text("holder", r.Holder, custody.MaxHolderName)
	}, func(ctx context.Context, actor string, req Unlock) (any, error) { return a.Unlock(ctx, actor, req) }))
	e.POST("/admin/v1/provision", administered(s, func(_ echo.Context, r *Provision) *problem.Problem {
		return required("answers", r.Answers, 32<<10)
	}, func(ctx context.Context, actor string, req Provision) (any, error) {
		return a.Provision(ctx, actor, req)
	}))
	e.POST("/admin/v1/start", administered(s, nothingToCheck[RetryStart], func(ctx context.Context, actor string, req RetryStart) (any, error) {
		return a.RetryStart(ctx, actor, req)
	}))
}
