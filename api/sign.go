package api

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

const (
	algSM2    = "SM2"
	algRSA    = "RSA-2048"
	digestSM3 = "SM3"
	digestSHA = "SHA-256"

	maxDER   = 64 << 10 // of a certificate or token
	maxChain = 8
)

func (s *Server) sign(ctx context.Context, c echo.Context, app *account.Application, body []byte) error {
	keys := c.Request().Header.Values("Idempotency-Key")
	if len(keys) == 0 {
		return missing("header.Idempotency-Key")
	}
	if len(keys) > 1 || !visibleASCII.MatchString(keys[0]) {
		return problem.Invalid("header.Idempotency-Key", "应为一个 1 至 128 字符的可见 ASCII 串 (want one value of 1 to 128 visible ASCII characters)")
	}
	w := signRequests.Get().(*wire.SignRequest)
	defer func() { *w = wire.SignRequest{}; signRequests.Put(w) }()
	if p := first(decodeInto(body, w, exchangeOf(c).room)); p != nil {
		return p
	}
	if p := checkSign(w); p != nil {
		return p
	}
	r, err := s.cfg.Signing.Sign(ctx, app, signRequest(keys[0], w))
	if err != nil {
		return err
	}
	return answer(c, resultOf(r))
}

// signRequests are decoded requests, empty.
var signRequests = sync.Pool{New: func() any { return new(wire.SignRequest) }}

func checkSign(w *wire.SignRequest) *problem.Problem {
	if p := first(
		pattern("signer", w.Signer, signerID),
		oneOf("algorithm", w.Algorithm, algSM2, algRSA),
		oneOf("form", w.Form, "raw", "cms"),
		text("document.id", w.Document.ID, 128),
		text("document.type", w.Document.Type, 64),
		text("document.media_type", w.Document.MediaType, 127),
		text("role", w.Role, 64),
		blob("content", w.Content, 1<<30),
	); p != nil {
		return p
	}
	switch {
	case w.Form == "raw" && w.Detached != nil && !*w.Detached:
		return problem.Invalid("detached", "raw 签名总是分离的 (a raw signature is always detached)")
	case w.Content != nil && w.Digest != nil:
		return problem.Invalid("digest", "content 与 digest 只能给一个 (give content or digest, not both)")
	case w.Digest != nil && w.Form == "raw":
		p := problem.Invalid("digest", "raw 签名需要原文,不能只给摘要 (a raw signature needs content)")
		p.Code = problem.ContentRequired
		return p
	case w.Digest != nil && w.Detached != nil && !*w.Detached:
		p := problem.Invalid("detached", "只给摘要时不能内附原文 (without content the CMS cannot hold it)")
		p.Code = problem.ContentRequired
		return p
	case w.Content == nil && w.Digest == nil:
		return missing("content")
	}
	if w.Digest != nil {
		if p := checkDigest("digest", w.Digest, map[string]string{algSM2: digestSM3, algRSA: digestSHA}[w.Algorithm]); p != nil {
			return p
		}
	}
	return checkConsent(&w.Consent)
}

func checkConsent(c *wire.Consent) *problem.Problem {
	if c.AuthorizationID != "" {
		switch {
		case c.Method != "":
			return problem.Invalid("consent.method", "与 authorization_id 只能给一个 (not together with authorization_id)")
		case c.Assertion != "":
			return problem.Invalid("consent.assertion", "与 authorization_id 只能给一个 (not together with authorization_id)")
		}
		return pattern("consent.authorization_id", c.AuthorizationID, grantID)
	}
	if c.Method == "" && c.Assertion == "" {
		return missing("consent")
	}
	return first(oneOf("consent.method", c.Method, string(evidence.AppAsserted)), text("consent.assertion", c.Assertion, 512))
}

func checkDigest(field string, d *wire.Digest, allowed ...string) *problem.Problem {
	if p := first(oneOf(field+".algorithm", d.Algorithm, allowed...), required(field+".value", d.Value, 32)); p != nil {
		return p
	}
	if len(d.Value) != 32 {
		return problem.Invalid(field+".value", "应为 32 字节 (want 32 bytes)")
	}
	return nil
}

func (s *Server) verify(ctx context.Context, c echo.Context, _ *account.Application, body []byte) error {
	var w wire.VerifyRequest
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	if p := checkVerify(&w); p != nil {
		return p
	}
	req := &sign.VerifyRequest{Evidence: w.Evidence, CMS: w.CMS, Token: w.Token, Document: w.Document, Digest: (*sign.Digest)(w.Digest)}
	if w.Raw != nil {
		req.Raw = (*sign.RawSignature)(w.Raw)
	}
	report, err := s.cfg.Signing.Verify(ctx, req)
	if err != nil {
		return err
	}
	return answer(c, report)
}

func checkVerify(w *wire.VerifyRequest) *problem.Problem {
	given := 0
	for _, g := range []bool{w.Evidence != nil, w.CMS != nil, w.Token != nil, w.Raw != nil} {
		if g {
			given++
		}
	}
	switch {
	case given == 0:
		return missing("evidence")
	case given > 1:
		return problem.Invalid("evidence", "evidence、cms、token、raw 只能给一个 (give exactly one of them)")
	case w.Document != nil && w.Digest != nil:
		return problem.Invalid("digest", "document 与 digest 只能给一个 (give document or digest, not both)")
	case w.Digest != nil && (w.Raw != nil || w.Evidence != nil):
		p := problem.Invalid("digest", "验证 raw 签名或证据需要原文 (a raw signature or a bundle needs document)")
		p.Code = problem.ContentRequired
		return p
	}
	// An empty document is a document: what was signed may be checked against it.
	if p := first(blob("cms", w.CMS, 1<<30), blob("token", w.Token, 1<<20)); p != nil {
		return p
	}
	if w.Digest != nil {
		if p := checkDigest("digest", w.Digest, digestSM3, digestSHA); p != nil {
			return p
		}
	}
	if w.Raw == nil {
		return nil
	}
	if p := first(
		oneOf("raw.algorithm", w.Raw.Algorithm, algSM2, algRSA),
		required("raw.value", w.Raw.Value, 1024),
		required("raw.certificate", w.Raw.Certificate, maxDER),
		number("raw.chain", len(w.Raw.Chain), 0, maxChain),
		blob("raw.token", w.Raw.Token, maxDER),
	); p != nil {
		return p
	}
	for _, cert := range w.Raw.Chain {
		if p := required("raw.chain", cert, maxDER); p != nil {
			return p
		}
	}
	return nil
}

func (s *Server) evidence(ctx context.Context, c echo.Context, app *account.Application, _ []byte) error {
	id := c.Param("id")
	if p := pattern("path.id", id, recordID); p != nil {
		return p
	}
	bundle, err := s.cfg.Signing.Evidence(ctx, app, id)
	if err != nil {
		return err
	}
	return send(c, http.StatusOK, echo.MIMEApplicationJSON, bundle)
}

func (s *Server) authorize(ctx context.Context, c echo.Context, app *account.Application, body []byte) error {
	var w wire.AuthorizationRequest
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	if p := checkAuthorization(&w); p != nil {
		return p
	}
	g, err := s.cfg.Directory.Authorize(ctx, app, account.GrantRequest(w))
	if err != nil {
		return err
	}
	return answer(c, wire.Grant{ID: g.ID, Method: string(g.Method), Signer: g.Signer, Remaining: g.Remaining, NotAfter: stampTime(g.NotAfter)})
}

func checkAuthorization(w *wire.AuthorizationRequest) *problem.Problem {
	if p := first(pattern("signer", w.Signer, signerID), pin("pin", w.PIN)); p != nil {
		return p
	}
	if w.Digests == nil {
		if w.DigestAlgorithm != "" {
			return problem.Invalid("digest_algorithm", "只与 digests 同用 (goes with digests alone)")
		}
		if w.Count == 0 && w.Seconds == 0 {
			return missing("digests")
		}
		return first(number("count", w.Count, 1, 500), number("seconds", w.Seconds, 1, 14400))
	}
	switch {
	case w.Count != 0:
		return problem.Invalid("count", "与 digests 只能给一种 (not together with digests)")
	case w.Seconds != 0:
		return problem.Invalid("seconds", "与 digests 只能给一种 (not together with digests)")
	}
	if p := number("digests", len(w.Digests), 1, 500); p != nil {
		return p
	}
	if w.DigestAlgorithm != "" {
		if p := oneOf("digest_algorithm", w.DigestAlgorithm, digestSM3, digestSHA); p != nil {
			return p
		}
	}
	for _, d := range w.Digests {
		if len(d) != 32 {
			return problem.Invalid("digests", "每个摘要应为 32 字节 (each digest is 32 bytes)")
		}
	}
	return nil
}

// pin bounds a PIN's length only: what makes a good one is the directory's affair.
func pin(field, s string) *problem.Problem {
	switch {
	case s == "":
		return missing(field)
	case len(s) > 64:
		return problem.Invalid(field, "超过 64 字节 (longer than 64 bytes)")
	}
	return nil
}

func (s *Server) certificate(_ context.Context, c echo.Context, _ *account.Application, _ []byte) error {
	serial := c.Param("serial")
	if p := pattern("path.serial", serial, serialNumber); p != nil {
		return p
	}
	st, ok := s.cfg.Directory.Certificate(serial)
	if !ok {
		p := problem.New(problem.NotFound, "没有这个序列号的证书 (no certificate with this serial)", "请核对序列号 (check the serial)")
		p.Field = "path.serial"
		return p
	}
	return answer(c, wire.CertificateStatus{
		Serial: st.Serial, Certificate: st.Certificate, Chain: list(st.Chain), Profile: st.Profile, Owner: st.Owner,
		Status: st.Status, RevokedAt: stampTime(st.RevokedAt), Reason: st.Reason,
	})
}

// list is never null in JSON.
func list[T any](in []T) []T {
	if in == nil {
		return []T{}
	}
	return in
}

// stampTime is "" for the zero time.
func stampTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}
