package api

import (
	"context"
	"fmt"
	"time"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/assess"
	"yinjian/appliance/problem"
)

// Assess is the body of the route about assessments.
type Assess = wire.Assess

// AssessAdmin is the part of [Admin] that makes packs for evaluators.
type AssessAdmin interface {
	Assess(ctx context.Context, actor string, req Assess) (any, error)
}

func (s *Server) assessRoutes(e *echo.Echo) {
	e.POST("/admin/v1/assessments", administered(s, checkAssess, s.cfg.Admin.Assess))
}

// maxProducts bounds the certified products of one system.
const maxProducts = 16

func checkAssess(_ echo.Context, r *Assess) *problem.Problem {
	if err := assess.CheckNonceForm(r.Nonce); err != nil {
		return problem.Invalid("nonce", "%v", err)
	}
	if p := text("assessor", r.Assessor, 128); p != nil {
		return p
	}
	if len(r.Products) > maxProducts {
		return problem.Invalid("products", "至多 %d 个 (at most %d)", maxProducts, maxProducts)
	}
	for i, x := range r.Products {
		at := func(name string) string { return fmt.Sprintf("products[%d].%s", i, name) }
		if p := first(
			each(at("covers"), x.Covers, assess.Coverages...), text(at("name"), x.Name, 128), text(at("certificate"), x.Certificate, 64),
			text(at("holder"), x.Holder, 128), number(at("level"), x.Level, 1, 4),
		); p != nil {
			return p
		}
		if _, err := time.Parse(time.DateOnly, x.ValidUntil); err != nil {
			return problem.Invalid(at("valid_until"), "须为日期，如 2029-01-31 (must be a day like that)")
		}
	}
	return nil
}
