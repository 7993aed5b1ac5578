package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

func (k *kit) batch(body m) wire.BatchResult {
	k.t.Helper()
	got := k.do(call{path: "/v1/batches", body: encode(k.t, body)})
	if got.status != 200 {
		k.t.Fatalf("answer = %d %s", got.status, got.body)
	}
	var out wire.BatchResult
	if err := json.Unmarshal(got.body, &out); err != nil {
		k.t.Fatal(err)
	}
	return out
}

// Each item has the outcome of its own, in the order it was asked in: signed, refused, failed, and gone wrong altogether.
func TestBatch(t *testing.T) {
	t.Parallel()
	sv := newServices()
	var mu sync.Mutex
	var asked []*sign.Request
	inner := sv.sign
	sv.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		mu.Lock()
		asked = append(asked, req)
		mu.Unlock()
		switch req.IdempotencyKey {
		case "visit-3":
			return nil, problem.New(problem.IdempotencyConflict, "x", "y")
		case "visit-5":
			return nil, fmt.Errorf("a secret of %s", "ours")
		case "visit-7":
			panic("a secret of ours")
		}
		r, err := inner(ctx, app, req)
		if r != nil {
			copied := *r
			copied.Node = req.IdempotencyKey
			r = &copied
		}
		return r, err
	}
	k := startWith(t, sv)
	out := k.batch(batchBody(500))
	if len(out.Items) != 500 || len(asked) != 500 {
		t.Fatalf("%d outcomes, %d asked", len(out.Items), len(asked))
	}
	for i, o := range out.Items {
		key := fmt.Sprintf("visit-%d", i)
		want := map[int]problem.Code{3: problem.IdempotencyConflict, 5: problem.Internal, 7: problem.Internal}[i]
		switch {
		case o.IdempotencyKey != key:
			t.Errorf("outcome %d is of %s", i, o.IdempotencyKey)
		case want == "" && (o.Problem != nil || o.Result == nil || o.Result.Node != key):
			t.Errorf("%s: %+v", key, o)
		case want != "" && (o.Result != nil || o.Problem == nil || o.Problem.Code != string(want) || strings.Contains(o.Problem.Detail, "secret")):
			t.Errorf("%s: %+v", key, o)
		}
	}
	for _, q := range asked {
		if q.Signer != "D1001" || q.Role != "attending" || string(q.Content) != "出院小结" || q.Consent.Assertion == "" || !q.Detached {
			t.Errorf("asked %+v", q)
		}
	}
}

// A batch that is wrong somewhere signs nothing anywhere, and the place is named.
func TestBatchIsRefusedWhole(t *testing.T) {
	t.Parallel()
	sv, reached := untouchable(t)
	k := startWith(t, sv)
	item := func(b m, i int) m { return b["items"].([]any)[i].(m) }
	for want, change := range map[string]func(b m){
		"items":                    func(b m) { b["items"] = []any{} },
		"items[2].idempotency_key": func(b m) { item(b, 2)["idempotency_key"] = "visit-1" },
		"items[1].content":         func(b m) { delete(item(b, 1), "content") },
		"items[2].digest":          func(b m) { item(b, 2)["digest"] = m{"algorithm": "SM3", "value": digest32} },
		"items[0].document.id":     func(b m) { item(b, 0)["document"] = m{"id": strings.Repeat("x", 129), "type": "a", "media_type": "b"} },
		"detached":                 func(b m) { b["form"], b["detached"] = "raw", false },
		"items[1].digest.algorithm": func(b m) {
			delete(item(b, 1), "content")
			item(b, 1)["digest"] = m{"algorithm": "SHA-256", "value": digest32}
		},
	} {
		b := batchBody(3)
		change(b)
		wantProblem(t, k.do(call{path: "/v1/batches", body: encode(t, b)}), 400, problem.InvalidRequest, want)
	}
	wantProblem(t, k.do(call{path: "/v1/batches", body: encode(t, batchBody(501))}), 400, problem.InvalidRequest, "items")
	raw := batchOfDigests()
	raw["form"] = "raw"
	delete(raw, "detached")
	wantProblem(t, k.do(call{path: "/v1/batches", body: encode(t, raw)}), 422, problem.ContentRequired, "items[0].digest")
	wantProblem(t, k.do(call{path: "/v1/batches", app: "noright", body: encode(t, batchBody(1))}), 403, problem.Forbidden, "")
	if n := reached.Load(); n != 0 {
		t.Errorf("%d items reached the service", n)
	}
}

// Items count for the application's rate as requests do: a batch is no way around it.
func TestBatchCountsByItem(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Rate = func(*appT) (int, int) { return 1, 20 } })
	k.batch(batchBody(15))
	got := k.do(call{path: "/v1/batches", body: encode(t, batchBody(15))})
	wantProblem(t, got, 429, problem.RateLimited, "")
	if after := got.header.Get("Retry-After"); after == "" || after == "1" {
		t.Errorf("Retry-After %q, and some ten seconds are missing", after)
	}
	wantProblem(t, k.do(call{path: "/v1/batches", body: encode(t, batchBody(30))}), 400, problem.InvalidRequest, "items")
}

// What batches do at once is bounded, and shared among applications; it takes no place of a request, neither another
// application's nor its own.
func TestBatchTakesItsShare(t *testing.T) {
	t.Parallel()
	sv := newServices()
	var now, most atomic.Int64
	held := make(chan struct{})
	inner := sv.sign
	sv.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		if app.ID == "his" {
			n := now.Add(1)
			defer now.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			<-held
		}
		return inner(ctx, app, req)
	}
	k := startWith(t, sv, func(c *api.Config, _ *http.Server) { c.Limits.Concurrent = 24 })
	done := make(chan wire.BatchResult, 1)
	go func() { done <- k.batch(batchBody(40)) }()
	for now.Load() < 4 { // its own place, and half of those beside
		time.Sleep(time.Millisecond)
	}
	other := k.do(call{path: "/v1/sign", app: "emr", body: encode(t, signBody())})
	own := make(chan reply, 1)
	go func() { own <- k.do(call{path: "/v1/sign", body: encode(t, signBody())}) }()
	for now.Load() < 5 && len(own) == 0 {
		time.Sleep(time.Millisecond)
	}
	close(held)
	if other.status != 200 {
		t.Errorf("another application: %d %s", other.status, other.body)
	}
	if got := <-own; got.status != 200 {
		t.Errorf("the application itself: %d %s", got.status, got.body)
	}
	out := <-done
	if slices.ContainsFunc(out.Items, func(o wire.BatchOutcome) bool { return o.Result == nil }) || len(out.Items) != 40 {
		t.Errorf("outcomes: %+v", out)
	}
	if n := most.Load(); n != 5 {
		t.Errorf("%d at once, want four of the batch and the other", n)
	}
	if got := k.batch(batchBody(1)); got.Items[0].Result == nil { // the places came back
		t.Errorf("afterwards: %+v", got)
	}
}

// When the time for handling is over, what was not begun is not begun, and each item says so.
func TestBatchEndsInTime(t *testing.T) {
	t.Parallel()
	sv := newServices()
	var begun atomic.Int64
	inner := sv.sign
	sv.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		if begun.Add(1) > 3 {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return inner(ctx, app, req)
	}
	k := startWith(t, sv, func(c *api.Config, _ *http.Server) { c.Limits.Concurrent, c.Limits.Handling = 8, 200*time.Millisecond })
	out := k.batch(batchBody(100))
	signed, late := 0, 0
	for _, o := range out.Items {
		switch {
		case o.Result != nil:
			signed++
		case o.Problem.Code == string(problem.Timeout) && o.Problem.Retry == wire.RetrySameKey:
			late++
		}
	}
	if signed != 3 || late != 97 || begun.Load() != 5 {
		t.Errorf("%d signed, %d late, %d begun", signed, late, begun.Load())
	}
}

// A batch's answer counts among the bytes in flight before anything is signed: a few hundred bytes of a request may have some
// megabytes of answer, for as long as its client reads.
func TestBatchsAnswerTakesItsShare(t *testing.T) {
	t.Parallel()
	sv := newServices()
	var now atomic.Int64
	held := make(chan struct{})
	inner := sv.sign
	sv.sign = func(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error) {
		if app.ID == "his" {
			now.Add(1)
			<-held
		}
		return inner(ctx, app, req)
	}
	k := startWith(t, sv, func(c *api.Config, _ *http.Server) { c.Limits.Body, c.Limits.InFlight = 1<<20, 10<<20 })
	done := make(chan wire.BatchResult, 1)
	go func() { done <- k.batch(batchBody(300)) }()
	for now.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	wantProblem(t, k.do(call{path: "/v1/batches", app: "emr", body: encode(t, batchBody(300))}), 429, problem.RateLimited, "")
	close(held)
	<-done
	k.batch(batchBody(300)) // what was held came back
}
