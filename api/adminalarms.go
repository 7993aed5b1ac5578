package api

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"strings"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/patrol"
	"yinjian/appliance/problem"
	"yinjian/appliance/report"
)

// The bodies of the routes about alarms and reports.
type (
	TestAlarms  = wire.TestAlarms
	SignReport  = wire.SignReport
	ListReports = wire.ListReports
	ReadReport  = wire.ReadReport
	RunPatrol   = wire.RunPatrol
)

// ReportAdmin is the part of [Admin] that is about alarms, and about reports that the appliance signs.
type ReportAdmin interface {
	ListAlarms(ctx context.Context, actor string) (any, error)
	TestAlarms(ctx context.Context, actor string, req TestAlarms) (any, error)
	SignReport(ctx context.Context, actor string, req SignReport) (any, error)
	ListReports(ctx context.Context, actor string, req ListReports) (any, error)
	ReadReport(ctx context.Context, actor string, req ReadReport) (any, error)
	// RunPatrol patrols in this process, and files the report.
	RunPatrol(ctx context.Context, actor string, req RunPatrol) (any, error)
	// Diagnosis is what the process says of itself.
	Diagnosis(ctx context.Context, actor string) (any, error)
	// System is what it runs on and listens at.
	System(ctx context.Context, actor string) (any, error)
}

func (s *Server) reportRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/alarms", s.listed(a.ListAlarms))
	e.POST("/admin/v1/alarms/test", administered(s, nothingToCheck[TestAlarms], a.TestAlarms))
	e.GET("/admin/v1/diagnosis", s.listed(a.Diagnosis))
	e.GET("/admin/v1/system", s.listed(a.System))
	e.POST("/admin/v1/reports", administeredFile(s, checkSignReport, a.SignReport))
	e.POST("/admin/v1/reports/list", administered(s, func(_ echo.Context, r *ListReports) *problem.Problem {
		return first(oneOf("kind", r.Kind, report.Kinds()...), number("most", r.Most, 0, maxPage))
	}, a.ListReports))
	e.POST("/admin/v1/reports/read", administered(s, func(_ echo.Context, r *ReadReport) *problem.Problem {
		return first(number("sequence", r.Sequence, 0, math.MaxInt), textOrNone("file", r.File, 128))
	}, a.ReadReport))
	e.POST("/admin/v1/patrols", administered(s, func(_ echo.Context, r *RunPatrol) *problem.Problem {
		return oneOf("period", r.Period, string(patrol.Daily), string(patrol.Weekly), string(patrol.Monthly), string(patrol.Quarterly))
	}, a.RunPatrol))
}

var (
	reportName    = regexp.MustCompile(`^[a-z0-9-]{1,32}$`)
	reportOutcome = regexp.MustCompile(`^[a-z-]{1,32}$`)
)

func checkSignReport(c echo.Context, r *SignReport) *problem.Problem {
	if p := first(oneOf("kind", r.Kind, report.Kinds()...), pattern("name", r.Name, reportName), pattern("outcome", r.Outcome, reportOutcome)); p != nil {
		return p
	}
	if n := len(r.Files); n < 1 || n > 16 {
		return problem.Invalid("files", "须为 1–16 个 (1 to 16)")
	}
	seen := map[string]bool{}
	for i, f := range r.Files {
		at := fmt.Sprintf("files[%d].", i)
		if p := first(text(at+"name", f.Name, 128), pattern(at+"sm3", f.SM3, sm3Digest)); p != nil {
			return p
		}
		if f.Size < 0 || strings.ContainsAny(f.Name, `/\`) || seen[f.Name] {
			return problem.Invalid(at+"name", "须为不带目录、不重复的文件名 (a name without a folder, each once)")
		}
		seen[f.Name] = true
	}
	if len(r.Summary) > 32<<10 || len(r.Summary) > 0 && !json.Valid(r.Summary) {
		return problem.Invalid("summary", "须为至多 32 KiB 的 JSON (JSON of at most 32 KiB)")
	}
	if len(r.Persons) > 0 {
		if !exchangeOf(c).session.open {
			return problem.Invalid("persons", "登录的只有一人，不得写两人 (one has logged in, and cannot speak for two)")
		}
		return twoPersons(r.Persons)
	}
	return nil
}
