package api

import (
	"context"
	"slices"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// SkipVersions is the body of the route of that name.
type SkipVersions = wire.SkipVersions

// DirectoryAdmin is the part of [Admin] that is about the directory's versions, which two campuses share.
type DirectoryAdmin interface {
	DirectoryStatus(ctx context.Context, actor string) (any, error)
	DirectoryVersions(ctx context.Context, actor string) (any, error)
	SkipVersions(ctx context.Context, actor string, req SkipVersions) (any, error)
}

func (s *Server) directoryRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/directory", s.listed(a.DirectoryStatus))
	e.GET("/admin/v1/directory/versions", s.listed(a.DirectoryVersions))
	e.POST("/admin/v1/directory/skip", administered(s, checkSkipVersions, a.SkipVersions))
}

func checkSkipVersions(_ echo.Context, r *SkipVersions) *problem.Problem {
	if !slices.Contains(account.SharedKinds, r.Kind) {
		return problem.Invalid("kind", "须为 %v 之一 (one of these)", account.SharedKinds)
	}
	return first(text("id", r.ID, 128), text("reason", r.Reason, 256))
}
