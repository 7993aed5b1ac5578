package api

import (
	"context"
	"time"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about the central database.
type (
	Compare    = wire.Compare
	Rebuild    = wire.Rebuild
	Archive    = wire.Archive
	YearReport = wire.YearReport
)

// MonthLayout is how a month is written.
const MonthLayout = wire.MonthLayout

// DatabaseAdmin is the part of [Admin] that is about it.
type DatabaseAdmin interface {
	Compare(ctx context.Context, actor string, req Compare) (any, error)
	Rebuild(ctx context.Context, actor string, req Rebuild) (any, error)
	Archive(ctx context.Context, actor string, req Archive) (any, error)
	YearReport(ctx context.Context, actor string, req YearReport) (any, error)
}

func (s *Server) databaseRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/compare", administered(s, nothingToCheck[Compare], a.Compare))
	e.POST("/admin/v1/rebuild", administered(s, checkRebuild, a.Rebuild))
	e.POST("/admin/v1/archive", administered(s, checkArchive, a.Archive))
	e.POST("/admin/v1/reports/year", administered(s, checkYearReport, a.YearReport))
}

func checkRebuild(_ echo.Context, r *Rebuild) *problem.Problem {
	for field, list := range map[string][]string{"replace": r.Replace, "remove": r.Remove, "journals": r.Journals} {
		if len(list) > 64 {
			return problem.Invalid(field, "至多 64 项 (at most 64)")
		}
		for _, v := range list {
			if p := text(field, v, 4096); p != nil {
				return p
			}
		}
	}
	return text("reason", r.Reason, 256)
}

func checkArchive(_ echo.Context, r *Archive) *problem.Problem {
	if _, err := time.Parse(MonthLayout, r.Before); err != nil {
		return problem.Invalid("before", "须为月份，如 2025-01 (a month)")
	}
	if r.DryRun && r.Reason == "" {
		return nil
	}
	return text("reason", r.Reason, 256)
}

func checkYearReport(_ echo.Context, r *YearReport) *problem.Problem {
	if r.Year < 1970 || r.Year > 9999 {
		return problem.Invalid("year", "须为四位年份 (a year of four digits)")
	}
	return nil
}
