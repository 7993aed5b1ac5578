package api

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/tsa"
	"yinjian/tsa/stf"
)

// Tokens is what the appliance knows of timestamp tokens, for the operations of GM/T 0033.
type Tokens interface {
	// Unit answers the unit that signs with alg, "" when there is none.
	Unit(alg stf.SignatureAlgorithm) string
	// Known answers what the journal has of a token beyond what stands in it; nil when it has nothing.
	Known(ctx context.Context, token *tsa.Token) (*stf.Known, error)
	// Judge judges the path of a unit's certificate at a time.
	Judge(leaf *smx509.Certificate, others []*smx509.Certificate, at time.Time) *pki.PathReport
}

func (s *Server) stfRoutes(e *echo.Echo) {
	for path, h := range map[string]struct {
		right string
		do    func(c echo.Context, e *stf.Environment, body []byte) error
	}{
		"/v1/stf/create-request":  {account.RightTimestamp, stfCreateRequest},
		"/v1/stf/create-response": {account.RightTimestamp, stfCreateResponse},
		"/v1/stf/verify":          {account.RightVerify, stfVerify},
		"/v1/stf/info":            {account.RightVerify, stfInfo},
		"/v1/stf/detail":          {account.RightVerify, stfDetail},
	} {
		e.POST(path, s.authenticated(jsonBody(s.limits.SmallBody), h.right, func(ctx context.Context, c echo.Context, app *account.Application, body []byte) error {
			env := stf.InitEnvironment(stf.Config{
				Respond: func(ctx context.Context, alg stf.SignatureAlgorithm, request []byte) ([]byte, error) {
					unit := s.cfg.Tokens.Unit(alg)
					if unit == "" {
						return nil, stf.ErrNoUnit
					}
					return s.cfg.Stamps.Respond(ctx, unit, app.ID, request)
				},
				Known: s.cfg.Tokens.Known, Judge: s.cfg.Tokens.Judge,
			})
			defer env.ClearEnvironment()
			c.SetRequest(c.Request().WithContext(ctx))
			return stfProblem(h.do(c, env, body))
		}))
	}
}

func stfCreateRequest(c echo.Context, e *stf.Environment, body []byte) error {
	w := wire.STFCreateRequest{HashAlg: int(stf.SM3)}
	if p := first(decode(body, &w), required("data", w.Data, 1<<20)); p != nil {
		return p
	}
	if w.ReqType == nil {
		return missing("req_type")
	}
	out, err := e.CreateTSRequest(w.Data, *w.ReqType, nil, stf.HashAlgorithm(w.HashAlg))
	if err != nil {
		return err
	}
	return answer(c, wire.STFRequest{Request: out})
}

func stfCreateResponse(c echo.Context, e *stf.Environment, body []byte) error {
	w := wire.STFCreateResponse{SigAlg: int(stf.SM3SM2)}
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	if p := required("request", w.Request, maxDER); p != nil {
		return p
	}
	out, err := e.CreateTSResponse(c.Request().Context(), w.Request, stf.SignatureAlgorithm(w.SigAlg))
	if err != nil {
		return err
	}
	return answer(c, wire.STFResponse{Response: out})
}

func stfVerify(c echo.Context, e *stf.Environment, body []byte) error {
	var w wire.STFVerify
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	if p := first(required("response", w.Response, maxDER), blob("certificate", w.Certificate, maxDER)); p != nil {
		return p
	}
	v, err := e.VerifyTSValidity(w.Response, stf.HashAlgorithm(w.HashAlg), stf.SignatureAlgorithm(w.SigAlg), w.Certificate)
	if err != nil {
		return err
	}
	out := wire.STFValidity{
		Verdict: string(pki.Valid), Certificate: v.Signer.Raw, Given: v.Given, GenTime: stampTime(v.Token.GenTime), Unchecked: v.Unchecked,
	}
	if len(v.Unchecked) > 0 {
		out.Verdict = string(pki.Indeterminate)
	} else {
		out.Unchecked = []string{}
	}
	return answer(c, out)
}

func stfInfo(c echo.Context, e *stf.Environment, body []byte) error {
	var w wire.STFRead
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	if p := required("response", w.Response, maxDER); p != nil {
		return p
	}
	issuer, issued, err := e.GetTSInfo(w.Response)
	if err != nil {
		return err
	}
	return answer(c, wire.STFInfo{Issuer: issuer, Time: stampTime(issued)})
}

func stfDetail(c echo.Context, e *stf.Environment, body []byte) error {
	var w wire.STFReadItem
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	if p := required("response", w.Response, maxDER); p != nil {
		return p
	}
	d, err := e.GetTSDetail(c.Request().Context(), w.Response, stf.Item(w.Item))
	if err != nil {
		return err
	}
	return answer(c, wire.STFDetail{Item: int(d.Item), Text: d.Text, Certificates: d.Certificates, From: d.From})
}

// stfProblem is the refusal of an operation; [Server.fail] shows its number beside ours.
func stfProblem(err error) error {
	var e *stf.Error
	if !errors.As(err, &e) {
		return err
	}
	var p *problem.Problem
	switch {
	case e.Code == stf.InDataTooLong:
		p = problem.New(problem.TooLarge, e.Detail, "请减小内容后重试 (send less)")
		p.Field = e.Parameter
	case e.Code == stf.InvalidSignature:
		p = problem.New(problem.TimestampInvalid, e.Detail, "请勿采信此时间戳 (do not rely on this token)")
		p.Field = e.Parameter
	case e.Code == stf.AddInfoNotAvailable && e.Parameter == "":
		p = problem.New(problem.NotFound, e.Detail, "该项无从得知 (it cannot be had)")
		p.Field = "item"
	case e.Parameter != "":
		p = problem.Invalid(e.Parameter, "%s", e.Detail)
	case e.Code == stf.TimeNotAvailable:
		p = problem.New(problem.TimeUntrusted, e.Detail, "请等待时间恢复可信后重试 (retry when time is trusted again)")
	case e.Code == stf.ServerError, e.Code == stf.SystemFailure:
		p = problem.New(problem.NotReady, e.Detail, retryLater)
	default: // the unit refuses what is in the request
		p = problem.Invalid("request", "%s", e.Detail)
	}
	return p.With(err)
}

// stfNumber is the number of the standard that stands beside our code, "" when there is none.
func stfNumber(err error) string {
	var e *stf.Error
	if !errors.As(err, &e) {
		return ""
	}
	return fmt.Sprintf("0x%08X", uint32(e.Code))
}
