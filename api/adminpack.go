package api

import (
	"context"
	"io"
	"regexp"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about makers' packs.
type (
	InstallPack     = wire.InstallPack
	RemovePack      = wire.RemovePack
	RegisterPackKey = wire.RegisterPackKey
)

// PackAdmin is the part of [Admin] that brings makers' libraries into the sealed appliance.
type PackAdmin interface {
	ListPacks(ctx context.Context, actor string) (any, error)
	// StagePack reads a pack to its end, or until it refuses it.
	StagePack(ctx context.Context, actor string, file io.Reader) (any, error)
	InstallPack(ctx context.Context, actor string, req InstallPack) (any, error)
	RemovePack(ctx context.Context, actor string, req RemovePack) (any, error)
	RegisterPackKey(ctx context.Context, actor string, req RegisterPackKey) (any, error)
}

// maxPack bounds a pack's file; the manifest, which is signed, says how long it is.
const maxPack = 260 << 20

var packName = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,30}$`)

func (s *Server) packRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/packs", s.listed(a.ListPacks))
	e.POST("/admin/v1/packs/file", s.streamed(maxPack, a.StagePack))
	e.POST("/admin/v1/packs/install", administered(s, func(_ echo.Context, r *InstallPack) *problem.Problem {
		return first(pattern("sm3", r.SM3, manifestSM3), text("reason", r.Reason, 256), twoPersons(r.Persons))
	}, a.InstallPack))
	e.POST("/admin/v1/packs/remove", administered(s, func(_ echo.Context, r *RemovePack) *problem.Problem {
		return first(pattern("name", r.Name, packName), text("reason", r.Reason, 256), twoPersons(r.Persons))
	}, a.RemovePack))
	e.POST("/admin/v1/packs/key", administered(s, func(_ echo.Context, r *RegisterPackKey) *problem.Problem {
		if len(r.Key) == 0 || len(r.Key) > 4096 {
			return problem.Invalid("key", "须为 PEM 公钥 (a public key in PEM)")
		}
		return first(text("reason", r.Reason, 256), twoPersons(r.Persons))
	}, a.RegisterPackKey))
}
