package api

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/labstack/echo/v4"
	"github.com/sirupsen/logrus"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

const (
	maxBatch = 500
	// batchWidth is how many items of one batch are under way at once, at most: so many that the cipher machine's sessions and
	// the journal's transaction are full, and no more.
	batchWidth = 64
	// outcomeRoom is what an item's answer takes, in bytes: certificates and a token in base64. What is returned of the content has
	// come with the request, and counts there.
	outcomeRoom = 12 << 10
)

// batch signs each item as /v1/sign does: a record, an entry and a refusal of its own. What is wrong with the request's form
// refuses the whole, before anything is signed.
func (s *Server) batch(ctx context.Context, c echo.Context, app *account.Application, body []byte) error {
	var w wire.BatchRequest
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	requests, p := batchRequests(&w)
	if p != nil {
		return p
	}
	n := len(requests)
	x := exchangeOf(c)
	if !x.hold(int64(n) * outcomeRoom) { // before anything is signed: a client that reads slowly keeps its answer here
		return problem.New(problem.RateLimited, "设备正在接收与应答的数据已达上限 (too much data in flight)", retryLater)
	}
	switch ok, after, burst := s.rates.more(app, n-1); { // one was counted with the request
	case n-1 > burst:
		return problem.Invalid("items", "条数超过该应用的突发数 %d，请分成几批 (more items than the application may ask for at once, %d: send several batches)", burst, burst)
	case !ok:
		p := problem.New(problem.RateLimited, "该应用的请求过于频繁，批内每条计一次 (the application's rate is exceeded; each item of a batch counts)", retryLater)
		p.After = after
		return p
	}
	out := wire.BatchResult{Items: make([]wire.BatchOutcome, n)}
	refused := make([]problem.Code, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range x.widen(min(n, batchWidth)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				out.Items[i], refused[i] = s.item(ctx, x, c.Path(), app, requests[i])
			}
		})
	}
	wg.Wait()
	s.noteBatch(x, c.Path(), refused)
	return answer(c, out)
}

// item signs one. A panic in it is that item's refusal, as it would be the request's own.
func (s *Server) item(ctx context.Context, x *exchange, route string, app *account.Application, req *sign.Request) (o wire.BatchOutcome, refused problem.Code) {
	o.IdempotencyKey = req.IdempotencyKey
	err := ctx.Err() // the time is over: what was not begun is not begun any more
	if err == nil {
		var r *sign.Result
		if r, err = s.signed(ctx, app, req); err == nil {
			o.Result = resultOf(r)
			return o, ""
		}
	}
	p, f := problemOf(err)
	s.refused.count(p.Code)
	if p.Code == problem.Internal {
		s.cfg.Log.WithFields(logrus.Fields{"request_id": x.id, "route": route, "application": app.ID, "code": string(p.Code)}).WithError(p.Err).Error("item of a batch failed")
	}
	shown := x.problem(p, f)
	o.Problem = &shown
	return o, p.Code
}

// signed is the service's answer; a panic is an error.
func (s *Server) signed(ctx context.Context, app *account.Application, req *sign.Request) (r *sign.Result, err error) {
	defer caught(&err)
	return s.cfg.Signing.Sign(ctx, app, req)
}

// noteBatch logs what was refused, a line for a batch.
func (s *Server) noteBatch(x *exchange, route string, refused []problem.Code) {
	counts := map[problem.Code]int{}
	for _, code := range refused {
		if code != "" {
			counts[code]++
		}
	}
	if len(counts) == 0 {
		return
	}
	fields := logrus.Fields{"request_id": x.id, "route": route, "application": x.application, "items": len(refused)}
	for code, n := range counts {
		fields["refused_"+string(code)] = n
	}
	s.cfg.Log.WithFields(fields).Info("items of a batch refused")
}

// batchRequests checks the form of all, and makes a request for each.
func batchRequests(w *wire.BatchRequest) ([]*sign.Request, *problem.Problem) {
	if p := number("items", len(w.Items), 1, maxBatch); p != nil {
		return nil, p
	}
	seen := make(map[string]int, len(w.Items))
	out := make([]*sign.Request, len(w.Items))
	for i := range w.Items {
		it := &w.Items[i]
		at := "items[" + strconv.Itoa(i) + "]."
		if p := pattern(at+"idempotency_key", it.IdempotencyKey, visibleASCII); p != nil {
			return nil, p
		}
		if before, twice := seen[it.IdempotencyKey]; twice {
			return nil, problem.Invalid(at+"idempotency_key", "与 items[%d] 相同，每条须有自己的键 (the same as items[%d]: each item names an act of its own)", before, before)
		}
		seen[it.IdempotencyKey] = i
		one := wire.SignRequest{
			Signer: w.Signer, Algorithm: w.Algorithm, Form: w.Form, Detached: w.Detached, Role: w.Role, Consent: w.Consent,
			Content: it.Content, Digest: it.Digest, Document: it.Document,
		}
		if p := checkSign(&one); p != nil {
			if name, _, _ := strings.Cut(p.Field, "."); name == "content" || name == "digest" || name == "document" {
				p.Field = at + p.Field
			}
			return nil, p
		}
		out[i] = signRequest(it.IdempotencyKey, &one)
	}
	return out, nil
}

// signRequest is what the service is asked; w's form is checked.
func signRequest(key string, w *wire.SignRequest) *sign.Request {
	return &sign.Request{
		IdempotencyKey: key, Signer: w.Signer, Algorithm: w.Algorithm, Form: w.Form,
		Detached: w.Detached == nil || *w.Detached,
		Content:  w.Content, Digest: (*sign.Digest)(w.Digest), Document: sign.Document(w.Document), Role: w.Role,
		Consent: sign.Consent{AuthorizationID: w.Consent.AuthorizationID, Method: evidence.Method(w.Consent.Method), Assertion: w.Consent.Assertion},
	}
}

func resultOf(r *sign.Result) *wire.SignResult {
	return &wire.SignResult{
		RecordID: r.RecordID, Algorithm: r.Algorithm, Form: r.Form, Signature: r.Signature, Certificates: list(r.Certificates),
		Token: r.Token, GenTime: stampTime(r.GenTime), AccuracyUS: r.Accuracy.Microseconds(), Provenance: r.Provenance,
		Node: r.Node, Epoch: r.Epoch, Sequence: r.Sequence, Replayed: r.Replayed,
	}
}
