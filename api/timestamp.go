package api

import (
	"context"
	"crypto/rand"
	"encoding/asn1"
	"math/big"
	"net/http"
	"slices"

	"github.com/emmansun/gmsm/sm3"
	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/cms"
	"yinjian/appliance/problem"
	"yinjian/tsa"
)

// stamp is RFC 3161 §3.4: the query in, the reply out. A rejection is a reply like any other, with status 200.
func (s *Server) stamp(ctx context.Context, c echo.Context, requester string, query []byte) error {
	unit := c.Param("unit")
	if !slices.Contains(s.cfg.Stamps.Units(), unit) {
		return unitUnknown("path.unit")
	}
	reply, err := s.cfg.Stamps.Respond(ctx, unit, requester, query)
	if err != nil {
		return err
	}
	return send(c, http.StatusOK, "application/timestamp-reply", reply)
}

func unitUnknown(field string) *problem.Problem {
	p := problem.New(problem.NotFound, "没有这个时间戳单元 (no such timestamp unit)", "请核对单元名称 (check the unit's name)")
	p.Field = field
	return p
}

// timestamp is the same for callers that have no ASN.1.
func (s *Server) timestamp(ctx context.Context, c echo.Context, app *account.Application, body []byte) error {
	var w wire.TimestampRequest
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	switch {
	case w.Data != nil && w.Digest != nil:
		return problem.Invalid("digest", "data 与 digest 只能给一个 (give data or digest, not both)")
	case w.Data == nil && w.Digest == nil:
		return missing("digest")
	case w.Digest != nil:
		if p := checkDigest("digest", w.Digest, digestSM3, digestSHA); p != nil {
			return p
		}
	default:
		if p := blob("data", w.Data, 1<<20); p != nil {
			return p
		}
		sum := sm3.Sum(w.Data)
		w.Digest = &wire.Digest{Algorithm: digestSM3, Value: sum[:]}
	}
	units := s.cfg.Stamps.Units()
	if w.Unit == "" && len(units) > 0 {
		w.Unit = units[0]
	}
	if w.Unit != "" {
		if p := pattern("unit", w.Unit, unitName); p != nil {
			return p
		}
	}
	if !slices.Contains(units, w.Unit) {
		return unitUnknown("unit")
	}
	var random [8]byte
	rand.Read(random[:])
	nonce := new(big.Int).SetBytes(random[:])
	imprint, err := tsa.NewImprint(imprintOIDs[w.Digest.Algorithm], w.Digest.Value)
	if err != nil {
		return err
	}
	req := &tsa.Request{Imprint: imprint, Nonce: nonce, CertReq: true}
	query, err := req.Bytes()
	if err != nil {
		return err
	}
	reply, err := s.cfg.Stamps.Respond(ctx, w.Unit, app.ID, query)
	if err != nil {
		return err
	}
	resp, err := tsa.ParseResponse(reply)
	if err != nil {
		return err
	}
	token := resp.Token
	if token == nil {
		return rejection(resp)
	}
	// The unit has verified its token; this is about the answer being for this request.
	if err := token.Answers(req); err != nil {
		return err
	}
	return answer(c, wire.Timestamp{
		Unit: w.Unit, Token: token.DER, Serial: token.Serial.Text(16), Policy: token.Policy.String(),
		GenTime: stampTime(token.GenTime), AccuracyUS: token.Accuracy.Microseconds(),
	})
}

var imprintOIDs = map[string]asn1.ObjectIdentifier{digestSM3: cms.OIDSM3, digestSHA: cms.OIDSHA256}

// rejection is the problem of a TimeStampResp without token.
func rejection(resp *tsa.Response) error {
	cause := resp.Err()
	switch {
	case slices.Contains(resp.Failures, tsa.TimeNotAvailable):
		return problem.New(problem.TimeUntrusted, "可信时间暂不可用,未签发时间戳 (trusted time not available)", "请等待时间恢复可信后重试 (retry when time is trusted again)").With(cause)
	case slices.Contains(resp.Failures, tsa.BadAlg):
		return problem.Invalid("digest.algorithm", "该时间戳单元不接受此摘要算法 (the unit does not take this digest algorithm)").With(cause)
	case slices.Contains(resp.Failures, tsa.SystemFailure):
		return problem.New(problem.NotReady, "时间戳单元暂不可用 (the timestamp unit is not available)", retryLater).With(cause)
	}
	return cause
}
