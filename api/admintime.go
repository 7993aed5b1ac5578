package api

import (
	"context"
	"fmt"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about time and the stamping service.
type (
	AddTimeSource    = wire.AddTimeSource
	RemoveTimeSource = wire.RemoveTimeSource
	ReadmitTime      = wire.ReadmitTime
	TimeHistory      = wire.TimeHistory
	StampService     = wire.StampService
	StampLog         = wire.StampLog
)

// TimeAdmin is the part of [Admin] that is about time and the stamping service.
type TimeAdmin interface {
	TimeStatus(ctx context.Context, actor string) (any, error)
	TimeHistory(ctx context.Context, actor string, req TimeHistory) (any, error)
	ListTimeSources(ctx context.Context, actor string) (any, error)
	AddTimeSource(ctx context.Context, actor string, req AddTimeSource) (any, error)
	RemoveTimeSource(ctx context.Context, actor string, req RemoveTimeSource) (any, error)
	ReadmitTime(ctx context.Context, actor string, req ReadmitTime) (any, error)
	StampStatus(ctx context.Context, actor string) (any, error)
	StopStamping(ctx context.Context, actor string, req StampService) (any, error)
	StartStamping(ctx context.Context, actor string, req StampService) (any, error)
	StampLog(ctx context.Context, actor string, req StampLog) (any, error)
}

func (s *Server) timeRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/time", s.listed(a.TimeStatus))
	e.POST("/admin/v1/time/history", administered(s, nothingToCheck[TimeHistory], a.TimeHistory))
	e.GET("/admin/v1/time/sources", s.listed(a.ListTimeSources))
	e.POST("/admin/v1/time/sources", administered(s, checkAddTimeSource, a.AddTimeSource))
	e.POST("/admin/v1/time/sources/:name/remove", administered(s, checkRemoveTimeSource, a.RemoveTimeSource))
	e.POST("/admin/v1/time/readmit", administered(s, checkReadmit, a.ReadmitTime))
	e.GET("/admin/v1/tsa", s.listed(a.StampStatus))
	e.POST("/admin/v1/tsa/stop", administered(s, checkStampService, a.StopStamping))
	e.POST("/admin/v1/tsa/start", administered(s, checkStampService, a.StartStamping))
	e.POST("/admin/v1/tsa/log", administered(s, checkStampLog, a.StampLog))
}

func checkAddTimeSource(_ echo.Context, r *AddTimeSource) *problem.Problem {
	if p := first(pattern("name", r.Name, unitName), text("group", r.Group, 64), text("address", r.Address, 256), text("reason", r.Reason, 256)); p != nil {
		return p
	}
	if r.KeyID == 0 && r.KeyType == "" && r.KeyFile == "" {
		return nil
	}
	return first(number("key_id", r.KeyID, 1, 65535), oneOf("key_type", r.KeyType, "SHA256", "AES128", "AES256"), text("key_file", r.KeyFile, 1024))
}

func checkRemoveTimeSource(c echo.Context, r *RemoveTimeSource) *problem.Problem {
	r.Name = c.Param("name")
	return first(text("path.name", r.Name, 128), text("reason", r.Reason, 256))
}

func checkReadmit(_ echo.Context, r *ReadmitTime) *problem.Problem {
	if p := text("reason", r.Reason, 256); p != nil {
		return p
	}
	if len(r.Persons) != 2 {
		return problem.Invalid("persons", "须为两人 (two persons)")
	}
	for i, name := range r.Persons {
		if p := text(fmt.Sprintf("persons[%d]", i), name, 64); p != nil {
			return p
		}
	}
	return nil
}

func checkStampService(_ echo.Context, r *StampService) *problem.Problem {
	if p := text("reason", r.Reason, 256); p != nil || r.Unit == "" {
		return p
	}
	return pattern("unit", r.Unit, unitName)
}

func checkStampLog(_ echo.Context, r *StampLog) *problem.Problem {
	if r.Lines == 0 {
		return nil
	}
	return number("lines", r.Lines, 1, 1000)
}
