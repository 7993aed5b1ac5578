package api

import (
	"context"
	"math"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about the running log.
type (
	SetLog      = wire.SetLog
	ReadLog     = wire.ReadLog
	ReadLogFile = wire.ReadLogFile
	LogStatus   = wire.LogStatus
)

// LogAdmin is the part of [Admin] that is about the running log: the lines for whoever looks after the appliance, not the journal.
type LogAdmin interface {
	LogStatus(ctx context.Context, actor string) (any, error)
	SetLog(ctx context.Context, actor string, req SetLog) (any, error)
	ReadLog(ctx context.Context, actor string, req ReadLog) (any, error)
	ReadLogFile(ctx context.Context, actor string, req ReadLogFile) (any, error)
}

func (s *Server) logRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/log", s.listed(a.LogStatus))
	e.POST("/admin/v1/log", administered(s, checkSetLog, a.SetLog))
	e.POST("/admin/v1/log/lines", administered(s, checkReadLog, a.ReadLog))
	e.POST("/admin/v1/log/file", administered(s, func(_ echo.Context, r *ReadLogFile) *problem.Problem {
		return first(text("name", r.Name, 128), number("from", r.From, 0, math.MaxInt32*1024))
	}, a.ReadLogFile))
}

func checkSetLog(_ echo.Context, r *SetLog) *problem.Problem {
	if r.Directory != nil && *r.Directory != "" {
		if p := text("directory", *r.Directory, 1024); p != nil {
			return p
		}
	}
	if r.Level != "" {
		if p := oneOf("level", r.Level, "error", "warning", "info", "debug"); p != nil {
			return p
		}
	}
	if r.KeepDays != 0 {
		if p := number("keep_days", r.KeepDays, 180, 36500); p != nil {
			return p
		}
	}
	return text("reason", r.Reason, 256)
}

func checkReadLog(_ echo.Context, r *ReadLog) *problem.Problem {
	if r.Lines == 0 {
		return nil
	}
	return number("lines", r.Lines, 1, 10_000)
}
