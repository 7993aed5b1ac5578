package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/history"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// The bodies of the routes about staff in bulk, test accounts and records of older systems.
type (
	SetProduction = wire.SetProduction
	BindClient    = wire.BindClient
	ImportSigners = wire.ImportSigners
	ImportHistory = wire.ImportHistory
	HistoryTotals = wire.HistoryTotals
	HistoryRecord = wire.HistoryRecord
)

// StaffAdmin is the part of [Admin] that is about those.
type StaffAdmin interface {
	SetProduction(ctx context.Context, actor string, req SetProduction) (any, error)
	BindClient(ctx context.Context, actor string, req BindClient) (any, error)
	ImportSigners(ctx context.Context, actor string, req ImportSigners) (any, error)
	ImportHistory(ctx context.Context, actor string, req ImportHistory) (any, error)
	CloseHistory(ctx context.Context, actor string, req HistoryTotals) (any, error)
	HistoryRecord(ctx context.Context, actor string, req HistoryRecord) (any, error)
}

func (s *Server) staffRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/applications/:id/production", administered(s, checkSetProduction, a.SetProduction))
	e.POST("/admin/v1/applications/:id/client", administeredUpTo(s, 2*pki.MaxBundleSize, checkBindClient, a.BindClient))
	e.POST("/admin/v1/signers/import", administeredUpTo(s, s.limits.Body, checkImportSigners, a.ImportSigners))
	e.POST("/admin/v1/history/records", administeredUpTo(s, s.limits.Body, checkImportHistory, a.ImportHistory))
	e.POST("/admin/v1/history/totals", administered(s, checkHistoryTotals, a.CloseHistory))
	e.POST("/admin/v1/history/record", administered(s, checkHistoryRecord, a.HistoryRecord))
}

func checkSetProduction(c echo.Context, r *SetProduction) *problem.Problem {
	r.ID = c.Param("id")
	return first(pattern("path.id", r.ID, applicationID), text("reason", r.Reason, 256))
}

func checkBindClient(c echo.Context, r *BindClient) *problem.Problem {
	r.ID = c.Param("id")
	if p := first(pattern("path.id", r.ID, applicationID), oneOf("by", r.By, account.BindByKey, account.BindBySubject, account.BindByNone), text("reason", r.Reason, 256)); p != nil || r.By == account.BindByNone {
		return p
	}
	return required("certificate", r.Certificate, pki.MaxBundleSize)
}

// checkImportSigners leaves what is wrong with one of them to be told of that one.
func checkImportSigners(_ echo.Context, r *ImportSigners) *problem.Problem {
	return first(number("signers", len(r.Signers), 1, account.MaxImport), issuer(r.CA))
}

// checkSource leaves the rest to the service, which says it of all its callers.
func checkSource(src *wire.HistorySource) *problem.Problem {
	return sm3Sum("source.file_sm3", src.FileSM3)
}

func sm3Sum(field string, b []byte) *problem.Problem {
	if len(b) != 32 {
		return problem.Invalid(field, "须为 32 字节 (32 bytes)")
	}
	return nil
}

// checkImportHistory leaves what is wrong with one of them to be told of that one.
func checkImportHistory(_ echo.Context, r *ImportHistory) *problem.Problem {
	return first(checkSource(&r.Source), number("records", len(r.Records), 1, history.MaxRecords))
}

func checkHistoryTotals(_ echo.Context, r *HistoryTotals) *problem.Problem {
	return first(checkSource(&r.Source), sm3Sum("mapping_sm3", r.MappingSM3))
}

func checkHistoryRecord(_ echo.Context, r *HistoryRecord) *problem.Problem {
	return first(pattern("system", r.System, applicationID), text("id", r.ID, 128))
}
