package api

import (
	"context"
	"regexp"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about backups.
type (
	SetCustodians = wire.SetCustodians
	BeginBackup   = wire.BeginBackup
	EndBackup     = wire.EndBackup
	FileReport    = wire.FileReport
)

// BackupAdmin is the part of [Admin] that is about backups. The file is written by the command that asks, beside the
// appliance; what it did is journalled here.
type BackupAdmin interface {
	SetCustodians(ctx context.Context, actor string, req SetCustodians) (any, error)
	BeginBackup(ctx context.Context, actor string, req BeginBackup) (any, error)
	EndBackup(ctx context.Context, actor string, req EndBackup) (any, error)
	FileReport(ctx context.Context, actor string, req FileReport) (any, error)
	ListBackups(ctx context.Context, actor string) (any, error)
	// MissingRecords are what a restored journal lacks, as far as the central database tells.
	MissingRecords(ctx context.Context, actor string) (any, error)
}

func (s *Server) backupRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/backups/custodians", administeredFile(s, func(_ echo.Context, r *SetCustodians) *problem.Problem {
		return first(required("record", r.Record, 64<<10), twoPersons(r.Persons))
	}, a.SetCustodians))
	e.POST("/admin/v1/backups", administered(s, func(_ echo.Context, r *BeginBackup) *problem.Problem {
		return first(twoPersons(r.Persons), text("target", r.Target, 256))
	}, a.BeginBackup))
	e.POST("/admin/v1/backups/:id/outcome", administered(s, checkEndBackup, a.EndBackup))
	e.POST("/admin/v1/backups/reports", administeredFile(s, func(_ echo.Context, r *FileReport) *problem.Problem {
		return first(oneOf("kind", r.Kind, "verify", "drill"), pattern("backup", r.Backup, backupID), twoPersons(r.Persons), required("report", r.Report, 64<<10))
	}, a.FileReport))
	e.GET("/admin/v1/backups", s.listed(a.ListBackups))
	e.GET("/admin/v1/backups/missing", s.listed(a.MissingRecords))
}

var (
	backupID  = regexp.MustCompile(`^[0-9a-f]{16}$`)
	sm3Digest = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

func checkEndBackup(c echo.Context, r *EndBackup) *problem.Problem {
	r.ID = c.Param("id")
	if p := pattern("path.id", r.ID, backupID); p != nil || r.Failed != "" {
		return first(p, text("failed", r.Failed, 256))
	}
	if r.Size < 1 || r.Entries < 1 || r.Through < 0 {
		return problem.Invalid("size", "大小、条目数须为正 (size and entries must be positive)")
	}
	return pattern("sm3", r.SM3, sm3Digest)
}

// twoPersons wants two different names; that they are who they say the appliance cannot prove yet.
func twoPersons(persons []string) *problem.Problem {
	if len(persons) != 2 {
		return problem.Invalid("persons", "须为两人 (two persons)")
	}
	if persons[0] == persons[1] {
		return problem.Invalid("persons", "须为不同的两人 (two different persons)")
	}
	return first(text("persons[0]", persons[0], 64), text("persons[1]", persons[1], 64))
}
