package api

import (
	"context"
	"time"

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
	for _, f := range []struct {
		name, value string
		most        int
	}{{"object", r.Object, 256}, {"actor", r.Actor, 256}, {"kind", r.Kind, 64}} {
		if f.value == "" {
			continue
		}
		if p := text(f.name, f.value, f.most); p != nil {
			return p
		}
	}
	for name, v := range map[string]string{"since": r.Since, "until": r.Until} {
		if _, err := time.Parse(time.RFC3339, v); v != "" && err != nil {
			return problem.Invalid(name, "须为 RFC 3339 时间 (a time as RFC 3339 has it)")
		}
	}
	return number("limit", r.Limit, 0, 10_000)
}
