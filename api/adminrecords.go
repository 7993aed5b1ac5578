package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// RecordsAdmin is the part of [Admin] that is about the central database's own records.
type RecordsAdmin interface {
	Sweep(ctx context.Context, actor string, req wire.Sweep) (any, error)
	ListChanges(ctx context.Context, actor string, req wire.ListChanges) (any, error)
}

func (s *Server) recordsRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/sweep", administered(s, nothingToCheck[wire.Sweep], a.Sweep))
	e.POST("/admin/v1/changes", administered(s, checkListChanges, a.ListChanges))
}

func checkListChanges(_ echo.Context, r *wire.ListChanges) *problem.Problem {
	return first(textOrNone("object", r.Object, 256), textOrNone("actor", r.Actor, 256), textOrNone("kind", r.Kind, 64),
		timeOrNone("since", r.Since), timeOrNone("until", r.Until), number("limit", r.Limit, 0, 10_000))
}
