package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about staff in bulk, test accounts and records of older systems.
type (
	SetProduction = wire.SetProduction
)

// StaffAdmin is the part of [Admin] that is about those.
type StaffAdmin interface {
	SetProduction(ctx context.Context, actor string, req SetProduction) (any, error)
}

func (s *Server) staffRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/applications/:id/production", administered(s, checkSetProduction, a.SetProduction))
}

func checkSetProduction(c echo.Context, r *SetProduction) *problem.Problem {
	r.ID = c.Param("id")
	return first(pattern("path.id", r.ID, applicationID), text("reason", r.Reason, 256))
}
