package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about the other campus.
type (
	PeerCard   = wire.PeerCard
	AddPeer    = wire.AddPeer
	RemovePeer = wire.RemovePeer
)

// PeerAdmin is the part of [Admin] that is about the other campus.
type PeerAdmin interface {
	PeerStatus(ctx context.Context, actor string) (any, error)
	PeerCard(ctx context.Context, actor string, req PeerCard) (any, error)
	AddPeer(ctx context.Context, actor string, req AddPeer) (any, error)
	RemovePeer(ctx context.Context, actor string, req RemovePeer) (any, error)
}

func (s *Server) peerRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/peer", s.listed(a.PeerStatus))
	e.POST("/admin/v1/peer/card", administered(s, nothingToCheck[PeerCard], a.PeerCard))
	e.POST("/admin/v1/peer", administeredFile(s, func(_ echo.Context, r *AddPeer) *problem.Problem {
		return first(text("fingerprint", r.Fingerprint, 128), text("reason", r.Reason, 256), twoPersons(r.Persons))
	}, a.AddPeer))
	e.POST("/admin/v1/peer/remove", administered(s, func(_ echo.Context, r *RemovePeer) *problem.Problem {
		return first(text("reason", r.Reason, 256), twoPersons(r.Persons))
	}, a.RemovePeer))
}
