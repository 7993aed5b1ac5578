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

// ThawObject is likewise.
type ThawObject = wire.ThawObject

// DirectoryAdmin is the part of [Admin] that is about the directory's versions, which two campuses share.
type DirectoryAdmin interface {
	DirectoryStatus(ctx context.Context, actor string) (any, error)
	DirectoryVersions(ctx context.Context, actor string) (any, error)
	SkipVersions(ctx context.Context, actor string, req SkipVersions) (any, error)
	ThawObject(ctx context.Context, actor string, req ThawObject) (any, error)
}

func (s *Server) directoryRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/directory", s.listed(a.DirectoryStatus))
	e.GET("/admin/v1/directory/versions", s.listed(a.DirectoryVersions))
	e.POST("/admin/v1/directory/skip", administered(s, checkSkipVersions, a.SkipVersions))
	e.POST("/admin/v1/directory/thaw", administered(s, checkThawObject, a.ThawObject))
}

func checkSkipVersions(_ echo.Context, r *SkipVersions) *problem.Problem {
	return checkShared(r.Kind, r.ID, r.Reason)
}

func checkThawObject(_ echo.Context, r *ThawObject) *problem.Problem {
	return checkShared(r.Kind, r.ID, r.Reason)
}

func checkShared(kind, id, reason string) *problem.Problem {
	if !slices.Contains(account.SharedKinds, kind) {
		return problem.Invalid("kind", "须为 %v 之一 (one of these)", account.SharedKinds)
	}
	return first(text("id", id, 128), text("reason", reason, 256))
}
