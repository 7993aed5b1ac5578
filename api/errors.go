package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/sirupsen/logrus"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// Codes that only HTTP has.
const (
	methodNotAllowed     problem.Code = "method_not_allowed"
	notAcceptable        problem.Code = "not_acceptable"
	unsupportedMediaType problem.Code = "unsupported_media_type"
	requestTimeout       problem.Code = "request_timeout" // the client sent its body too slowly; nothing was done
)

type face struct {
	status int
	title  string
	retry  wire.Retry
	after  int // seconds of Retry-After, at least; 0 sends none
}

// faces is the one table of codes: what each looks like over HTTP, and what a client does about it. docs/errors.md shows
// it, and a test holds the two together.
var faces = map[problem.Code]face{
	problem.InvalidRequest:        {http.StatusBadRequest, "请求有误", wire.RetryNever, 0},
	problem.ContentRequired:       {http.StatusUnprocessableEntity, "需要原文", wire.RetryNever, 0},
	problem.TooLarge:              {http.StatusRequestEntityTooLarge, "内容过大", wire.RetryNever, 0},
	problem.Unauthenticated:       {http.StatusUnauthorized, "身份验证失败", wire.RetryNever, 0},
	problem.ReplayedRequest:       {http.StatusUnauthorized, "请求重复", wire.RetryResign, 0},
	problem.ClockSkew:             {http.StatusUnauthorized, "请求时间超出允许范围", wire.RetryResign, 0},
	problem.Forbidden:             {http.StatusForbidden, "没有权限", wire.RetryOperator, 0},
	problem.ApplicationStopped:    {http.StatusForbidden, "应用已停用", wire.RetryOperator, 0},
	problem.SignerUnknown:         {http.StatusUnprocessableEntity, "签名人不存在", wire.RetryOperator, 0},
	problem.SignerTest:            {http.StatusForbidden, "签名人是测试账号", wire.RetryOperator, 0},
	problem.SignerStopped:         {http.StatusForbidden, "签名人已停用", wire.RetryOperator, 0},
	problem.KeyUnknown:            {http.StatusUnprocessableEntity, "没有对应算法的密钥", wire.RetryOperator, 0},
	problem.KeyElsewhere:          {http.StatusUnprocessableEntity, "密钥在另一院区", wire.RetryOperator, 0},
	problem.PINWrong:              {http.StatusForbidden, "PIN 错误", wire.RetryNever, 0},
	problem.PINLocked:             {http.StatusForbidden, "PIN 已锁定", wire.RetryOperator, 0},
	problem.LoginRequired:         {http.StatusUnauthorized, "须先登录", wire.RetryNever, 0},
	problem.LoginFailed:           {http.StatusUnauthorized, "登录失败", wire.RetryNever, 0},
	problem.PasswordEnded:         {http.StatusForbidden, "口令须更改", wire.RetryNever, 0},
	problem.ConsentInsufficient:   {http.StatusForbidden, "授权方式不足", wire.RetryNever, 0},
	problem.AuthorizationBad:      {http.StatusForbidden, "授权无效", wire.RetryNever, 0},
	problem.AuthorizationSpent:    {http.StatusForbidden, "授权已用完", wire.RetryNever, 0},
	problem.IdempotencyConflict:   {http.StatusConflict, "幂等键冲突", wire.RetryNever, 0},
	problem.NotFound:              {http.StatusNotFound, "不存在", wire.RetryNever, 0},
	problem.Exists:                {http.StatusConflict, "已存在", wire.RetryNever, 0},
	problem.CertificateUnusable:   {http.StatusConflict, "证书不可用", wire.RetryOperator, 0},
	problem.CertificateAwaited:    {http.StatusConflict, "证书尚未导入", wire.RetryOperator, 0},
	problem.CertificateMalformed:  {http.StatusBadRequest, "证书无法读出", wire.RetryNever, 0},
	problem.CertificateKeyUnknown: {http.StatusUnprocessableEntity, "证书不属于本机密钥", wire.RetryNever, 0},
	problem.CertificatePurpose:    {http.StatusUnprocessableEntity, "证书用途不符", wire.RetryNever, 0},
	problem.CertificateEncryption: {http.StatusUnprocessableEntity, "加密证书", wire.RetryNever, 0},
	problem.CertificateUntrusted:  {http.StatusUnprocessableEntity, "证书不可信", wire.RetryNever, 0},
	problem.CertificateExpired:    {http.StatusUnprocessableEntity, "证书已过期", wire.RetryNever, 0},
	problem.CertificateRevoked:    {http.StatusUnprocessableEntity, "证书已吊销", wire.RetryNever, 0},
	problem.CertificateSubject:    {http.StatusUnprocessableEntity, "证书主题不符", wire.RetryNever, 0},
	problem.CertificateWeak:       {http.StatusUnprocessableEntity, "证书强度不足", wire.RetryNever, 0},
	problem.CRLMalformed:          {http.StatusBadRequest, "吊销列表无法使用", wire.RetryNever, 0},
	problem.CRLUntrusted:          {http.StatusUnprocessableEntity, "吊销列表不可信", wire.RetryNever, 0},
	problem.CRLOlder:              {http.StatusConflict, "吊销列表不是最新", wire.RetryNever, 0},
	problem.CRLFuture:             {http.StatusConflict, "吊销列表来自将来", wire.RetryNever, 0},
	problem.TimestampInvalid:      {http.StatusUnprocessableEntity, "时间戳无效", wire.RetryNever, 0},
	problem.TimeUntrusted:         {http.StatusServiceUnavailable, "时间不可信", wire.RetryLater, 5},
	problem.JournalUnwritable:     {http.StatusServiceUnavailable, "日志不可写", wire.RetrySameKey, 5},
	problem.DiskReserve:           {http.StatusServiceUnavailable, "磁盘余量不足", wire.RetryLater, 30},
	problem.HSMUnavailable:        {http.StatusServiceUnavailable, "密码机不可用", wire.RetryLater, 2},
	problem.HSMNeedsOperator:      {http.StatusServiceUnavailable, "密码机需要人工处理", wire.RetryOperator, 0},
	problem.CentreUnavailable:     {http.StatusServiceUnavailable, "中心库不可用", wire.RetryLater, 10},
	problem.DirectoryBehind:       {http.StatusServiceUnavailable, "目录落后于另一院区", wire.RetryLater, 5},
	problem.DirectoryConflict:     {http.StatusConflict, "另一院区刚变更了同一对象", wire.RetryNever, 0},
	problem.DirectoryFrozen:       {http.StatusConflict, "两院区目录不一致，已冻结", wire.RetryOperator, 0},
	problem.DirectoryStale:        {http.StatusServiceUnavailable, "另一院区目录过旧", wire.RetryOperator, 0},
	problem.RateLimited:           {http.StatusTooManyRequests, "请求过多", wire.RetryLater, 1},
	problem.WrongState:            {http.StatusConflict, "设备状态不符", wire.RetryNever, 0},
	problem.StartFailed:           {http.StatusServiceUnavailable, "启动失败", wire.RetryOperator, 0},
	problem.JournalRefused:        {http.StatusServiceUnavailable, "日志不被接受", wire.RetryOperator, 0},
	problem.NotReady:              {http.StatusServiceUnavailable, "尚未就绪", wire.RetryLater, 1},
	problem.Timeout:               {http.StatusGatewayTimeout, "处理超时", wire.RetrySameKey, 0},
	problem.Internal:              {http.StatusInternalServerError, "内部错误", wire.RetrySameKey, 0},

	methodNotAllowed:     {http.StatusMethodNotAllowed, "方法不支持", wire.RetryNever, 0},
	notAcceptable:        {http.StatusNotAcceptable, "无法提供所要的格式", wire.RetryNever, 0},
	unsupportedMediaType: {http.StatusUnsupportedMediaType, "内容类型不支持", wire.RetryNever, 0},
	requestTimeout:       {http.StatusRequestTimeout, "请求发送过慢", wire.RetryLater, 1},
}

const retryLater = "请稍后重试 (try again later)"

var errInternal = problem.New(problem.Internal, "内部错误,已记入设备日志 (internal error, see the appliance's log)",
	"请把请求编号告知管理员 (tell the administrator the request id)")

// problemOf is the one place where an error becomes what a caller may see: a Problem passes, the context's ends are
// timeouts, echo's routing errors get their code, and everything else is a plain 500 that shows nothing. A code
// without a face is a programmer's slip and is also answered as 500.
func problemOf(err error) (*problem.Problem, face) {
	var p *problem.Problem
	var routing *echo.HTTPError
	switch {
	case errors.As(err, &p):
		if f, ok := faces[p.Code]; ok {
			if p.Code == problem.Internal {
				return errInternal.With(err), f
			}
			return p, f
		}
		p = errInternal.With(err)
	case errors.Is(err, context.DeadlineExceeded):
		p = problem.New(problem.Timeout, "处理超时,结果未知 (timed out, the outcome is unknown)",
			"请用同一个 Idempotency-Key 重试 (retry with the same Idempotency-Key)").With(err)
	case errors.Is(err, context.Canceled):
		p = problem.New(problem.Timeout, "请求已取消,结果未知 (cancelled, the outcome is unknown)",
			"请用同一个 Idempotency-Key 重试 (retry with the same Idempotency-Key)").With(err)
	case errors.As(err, &routing) && routing.Code == http.StatusNotFound:
		p = problem.New(problem.NotFound, "没有这个地址 (no such route)", "请查阅 /openapi.json (see /openapi.json)")
	case errors.As(err, &routing) && routing.Code == http.StatusMethodNotAllowed:
		p = problem.New(methodNotAllowed, "该地址不支持此方法 (method not allowed here, see Allow)", "请查阅 /openapi.json (see /openapi.json)")
	default:
		p = errInternal.With(err)
	}
	return p, faces[p.Code]
}

// fail is echo's error handler: it writes err as problem+json and logs it, once.
func (s *Server) fail(err error, c echo.Context) {
	p, f := problemOf(err)
	x := exchangeOf(c)
	s.refused.count(p.Code)
	log := s.cfg.Log.WithFields(logrus.Fields{"request_id": x.id, "route": c.Path()})
	if x.application != "" {
		log = log.WithField("application", x.application)
	}
	if x.source != "" {
		log = log.WithField("source", x.source)
	}
	if x.operator != "" {
		log = log.WithField("operator", x.operator)
	}
	if errors.Is(err, errNotDelivered) {
		log.WithError(err).Info("client did not read its answer")
		return
	}
	told := true
	if x.application == "" && x.source == "" && x.operator == "" && f.status != http.StatusInternalServerError {
		var more uint64
		if more, told = s.refused.tell(); more > 0 {
			log = log.WithField("more", more)
		}
	}
	log = log.WithFields(logrus.Fields{"code": string(p.Code), "status": f.status})
	if p.Field != "" {
		log = log.WithField("field", p.Field)
	}
	if p.Err != nil {
		log = log.WithError(p.Err)
	}
	switch {
	case !told:
	case f.status == http.StatusInternalServerError:
		log.Error("request failed")
	case f.status >= 500, f.status == http.StatusUnauthorized, f.status == http.StatusTooManyRequests:
		log.Warn("request refused")
	default:
		log.Info("request refused")
	}
	if c.Response().Committed {
		return
	}
	h := c.Response().Header()
	h.Set(echo.HeaderContentType, "application/problem+json")
	switch p.Code {
	case problem.Unauthenticated, problem.ReplayedRequest, problem.ClockSkew:
		h.Set(echo.HeaderWWWAuthenticate, wire.Scheme)
	}
	// What was not read is not worth reading; net/http would wait for it before it sends the answer.
	if !x.bodyRead && c.Request().ContentLength != 0 {
		h.Set(echo.HeaderConnection, "close")
	}
	if f.after > 0 {
		h.Set(echo.HeaderRetryAfter, strconv.Itoa(max(f.after, int((p.After+time.Second-1)/time.Second))))
	}
	out, err := json.Marshal(x.problem(p, f))
	if err != nil { // strings and integers only: cannot happen
		panic(err)
	}
	c.Response().WriteHeader(f.status)
	if _, err := c.Response().Write(out); err != nil {
		log.WithError(err).Debug("client went away")
	}
}

// problem is how a refusal is shown to whoever asked.
func (x *exchange) problem(p *problem.Problem, f face) wire.Problem {
	out := wire.Problem{
		STF:  stfNumber(p.Err),
		Type: "urn:yinjian:problem:" + string(p.Code), Title: f.title, Status: f.status, Detail: p.Detail,
		Instance: "urn:yinjian:request:" + x.id, Code: string(p.Code), Field: p.Field, Next: p.Next, Retry: f.retry,
	}
	if p.Code == problem.PINWrong {
		out.TriesLeft = &p.TriesLeft
	}
	return out
}
