package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about archive timestamps.
type (
	RunPreserve     = wire.RunPreserve
	PreservedRecord = wire.PreservedRecord
)

// PreserveAdmin is the part of [Admin] that is about archive timestamps.
type PreserveAdmin interface {
	RunPreserve(ctx context.Context, actor string, req RunPreserve) (any, error)
	PreserveStatus(ctx context.Context, actor string) (any, error)
	PreservedRecord(ctx context.Context, actor string, req PreservedRecord) (any, error)
}

func (s *Server) preserveRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/preserve/run", administered(s, nothingToCheck[RunPreserve], a.RunPreserve))
	e.GET("/admin/v1/preserve", s.listed(a.PreserveStatus))
	e.POST("/admin/v1/preserve/record", administered(s, func(_ echo.Context, r *PreservedRecord) *problem.Problem {
		return pattern("id", r.ID, recordID)
	}, a.PreservedRecord))
}
