package api

import (
	"context"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// The bodies of the routes that look for something.
type (
	SearchSigners      = wire.SearchSigners
	SearchKeys         = wire.SearchKeys
	SearchCertificates = wire.SearchCertificates
	SearchRecords      = wire.SearchRecords
	ExamineRecord      = wire.ExamineRecord
)

// SearchAdmin is the part of [Admin] that looks for something, page by page.
type SearchAdmin interface {
	SearchSigners(ctx context.Context, actor string, req SearchSigners) (any, error)
	SearchKeys(ctx context.Context, actor string, req SearchKeys) (any, error)
	SearchCertificates(ctx context.Context, actor string, req SearchCertificates) (any, error)
	SearchRecords(ctx context.Context, actor string, req SearchRecords) (any, error)
	ExamineRecord(ctx context.Context, actor string, req ExamineRecord) (any, error)
}

func (s *Server) searchRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/signers/search", administered(s, checkSearchSigners, a.SearchSigners))
	e.POST("/admin/v1/keys/search", administered(s, checkSearchKeys, a.SearchKeys))
	e.POST("/admin/v1/certificates/search", administered(s, checkSearchCertificates, a.SearchCertificates))
	e.POST("/admin/v1/records/search", administered(s, checkSearchRecords, a.SearchRecords))
	e.POST("/admin/v1/records/:id/examine", administeredUpTo(s, s.limits.Body, func(c echo.Context, r *ExamineRecord) *problem.Problem {
		r.ID = c.Param("id")
		return pattern("path.id", r.ID, recordID)
	}, a.ExamineRecord))
}

// maxPage is the most that one page has.
const maxPage = 500

func checkSearchSigners(_ echo.Context, r *SearchSigners) *problem.Problem {
	return first(textOrNone("text", r.Text, 128), number("skip", r.Skip, 0, 1_000_000), number("most", r.Most, 0, maxPage))
}

func checkHeld(words, scope, after string, most int) *problem.Problem {
	if p := first(textOrNone("text", words, 128), textOrNone("after", after, 256), number("most", most, 0, maxPage)); p != nil || scope == "" {
		return p
	}
	return oneOf("scope", scope, account.ScopeOwn, account.ScopeSigners)
}

func checkSearchKeys(_ echo.Context, r *SearchKeys) *problem.Problem {
	return checkHeld(r.Text, r.Scope, r.After, r.Most)
}

func checkSearchCertificates(_ echo.Context, r *SearchCertificates) *problem.Problem {
	return first(checkHeld(r.Text, r.Scope, r.After, r.Most), number("within_days", r.WithinDays, 0, 3660))
}

func checkSearchRecords(_ echo.Context, r *SearchRecords) *problem.Problem {
	if p := first(textOrNone("kind", r.Kind, 64), textOrNone("application", r.Application, 256), textOrNone("signer", r.Signer, 256),
		textOrNone("department", r.Department, 256), timeOrNone("since", r.Since), timeOrNone("until", r.Until)); p != nil {
		return p
	}
	if r.RecordID != "" {
		if p := pattern("record_id", r.RecordID, recordID); p != nil {
			return p
		}
	}
	if r.After != nil {
		if p := first(text("after.node", r.After.Node, 64), text("after.epoch", r.After.Epoch, 16)); p != nil {
			return p
		}
	}
	return number("most", r.Most, 0, maxPage)
}
