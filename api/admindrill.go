package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about drills.
type (
	BeginDrill = wire.BeginDrill
	BreakDrill = wire.BreakDrill
	EndDrill   = wire.EndDrill
)

// DrillAdmin is the part of [Admin] that is about drills: one part of the running appliance is broken on purpose, for a bounded
// time.
type DrillAdmin interface {
	// BeginDrill answers the key of the drill's application, here and never again.
	BeginDrill(ctx context.Context, actor string, req BeginDrill) (any, error)
	BreakDrill(ctx context.Context, actor string, req BreakDrill) (any, error)
	EndDrill(ctx context.Context, actor string, req EndDrill) (any, error)
	DrillStatus(ctx context.Context, actor string) (any, error)
}

func (s *Server) drillRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/drills", administered(s, s.checkBeginDrill, a.BeginDrill))
	e.GET("/admin/v1/drills", s.listed(a.DrillStatus))
	e.POST("/admin/v1/drills/:id/break", administered(s, func(c echo.Context, r *BreakDrill) *problem.Problem {
		r.ID = c.Param("id")
		return text("path.id", r.ID, 64)
	}, a.BreakDrill))
	e.POST("/admin/v1/drills/:id/end", administered(s, func(c echo.Context, r *EndDrill) *problem.Problem {
		r.ID = c.Param("id")
		return text("path.id", r.ID, 64)
	}, a.EndDrill))
}

// checkBeginDrill wants two persons where the appliance is not for evaluation.
func (s *Server) checkBeginDrill(_ echo.Context, r *BeginDrill) *problem.Problem {
	if p := first(oneOf("part", r.Part, wire.DrillParts()...), number("seconds", r.Seconds, wire.DrillLeast, wire.DrillMost), text("reason", r.Reason, 256)); p != nil {
		return p
	}
	if r.Machine != "" {
		if p := text("machine", r.Machine, 32); p != nil {
			return p
		}
	}
	if r.Evaluation = s.cfg.Evaluation; r.Evaluation {
		r.Persons = nil
		return nil
	}
	return twoPersons(r.Persons)
}
