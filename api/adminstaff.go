package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// The bodies of the routes about staff in bulk, test accounts and records of older systems.
type (
	SetProduction = wire.SetProduction
	ImportSigners = wire.ImportSigners
)

// StaffAdmin is the part of [Admin] that is about those.
type StaffAdmin interface {
	SetProduction(ctx context.Context, actor string, req SetProduction) (any, error)
	ImportSigners(ctx context.Context, actor string, req ImportSigners) (any, error)
}

func (s *Server) staffRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/applications/:id/production", administered(s, checkSetProduction, a.SetProduction))
	e.POST("/admin/v1/signers/import", administeredUpTo(s, s.limits.Body, checkImportSigners, a.ImportSigners))
}

func checkSetProduction(c echo.Context, r *SetProduction) *problem.Problem {
	r.ID = c.Param("id")
	return first(pattern("path.id", r.ID, applicationID), text("reason", r.Reason, 256))
}

// checkImportSigners leaves what is wrong with one of them to be told of that one.
func checkImportSigners(_ echo.Context, r *ImportSigners) *problem.Problem {
	return first(number("signers", len(r.Signers), 1, account.MaxEnrolments), issuer(r.CA))
}
