package console

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"yinjian/api/wire"
)

// A work takes long: a page begins it, others show how far it is and, when it ended, what came of it. It goes on when whoever
// began it has left, as him. What came of it is in memory, the last of each name for [workKept], and shown to whoever may use
// its route.
type work struct {
	Route string
	By    string
	Begun time.Time // of the appliance's clock
	Ended time.Time // zero while it is under way

	Answer  json.RawMessage
	Refusal *Refusal

	done chan struct{}
}

// workTitles are the works that have pages, by name; the appliance calls them so in its state.
var workTitles = map[string][2]string{
	"verify": {"核验日志", "Verifying the journal"}, "compare": {"与中心库对账", "Comparing with the central database"}, "sweep": {"清查中心库", "Sweeping the central database"},
	"assess": {"制作密评证据包", "Making an evaluator's pack"}, "patrol": {"巡检", "Patrolling"},
}

const (
	workKept = time.Hour
	// workSoon is how long the page that begins a work waits for it: much ends at once.
	workSoon  = 1500 * time.Millisecond
	workEvery = 3 // seconds
)

// works are those of a console. Safe for concurrent use.
type works struct {
	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup

	mu sync.Mutex
	of map[string]*work // guarded by mu; by name
}

func (ws *works) begin() {
	ws.ctx, ws.cancel = context.WithCancel(context.Background())
	ws.of = map[string]*work{}
}

func (ws *works) end() {
	ws.mu.Lock()
	ws.cancel()
	ws.mu.Unlock()
	ws.group.Wait()
}

// last is the last work of a name, nil without one. What is answered is a copy.
func (ws *works) last(name string) *work {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.of[name]
	if w == nil {
		return nil
	}
	now := *w
	return &now
}

// forget takes a work away that was kept long enough.
func (ws *works) forget(name string, w *work) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.of[name] == w {
		delete(ws.of, name)
	}
}

// work begins a route's work, and waits a moment for its end.
func (p *page) work(name, route string, body any) error {
	if !p.May(route) { // what the route would say, at once
		return p.ask(route, body, nil)
	}
	in, err := json.Marshal(body)
	if err != nil {
		return err
	}
	c, ws := p.c, &p.c.works
	w := &work{Route: route, By: p.Session.Name, Begun: c.cfg.Now(), done: make(chan struct{})}
	ws.mu.Lock()
	if o := ws.of[name]; o != nil && o.Ended.IsZero() {
		ws.mu.Unlock()
		return &Refusal{wire.Problem{Status: http.StatusConflict, Code: "not_ready", Title: "正在进行", Detail: o.By + " 已开始，尚未结束 (somebody has begun it, and it has not ended)", Next: "等它结束 (wait for it)"}}
	}
	if ws.ctx.Err() != nil {
		ws.mu.Unlock()
		return ws.ctx.Err()
	}
	ws.of[name] = w
	ws.group.Add(1)
	ws.mu.Unlock()
	r := c.cfg.Backend.Apart(ws.ctx, p.r)
	go func() {
		defer ws.group.Done()
		method, path, _ := strings.Cut(route, " ")
		status, out := c.cfg.Backend.Ask(r, method, path, in)
		var answer json.RawMessage
		err := read(status, out, &answer)
		var refused *Refusal
		if err != nil && !errors.As(err, &refused) {
			refused = &Refusal{wire.Problem{Status: http.StatusInternalServerError, Code: "internal", Detail: "内部错误 (internal error)"}}
		}
		ws.mu.Lock()
		w.Answer, w.Refusal, w.Ended = answer, refused, c.cfg.Now()
		ws.mu.Unlock()
		close(w.done)
		time.AfterFunc(workKept, func() { ws.forget(name, w) })
	}()
	select {
	case <-w.done:
	case <-time.After(workSoon):
	case <-p.r.Context().Done():
	}
	return nil
}

// A Progress is what a page shows of a work.
type Progress struct {
	Name    string
	Work    *work // the last, nil without one
	Running bool
	Now     *working // how far it is, as the appliance says; nil where it does not
}

// progress is what there is of a work; while it is under way the page asks again. state is the appliance's, if the page has it.
func (p *page) progress(name string, s *applianceState) Progress {
	out := Progress{Name: name, Work: p.c.works.last(name)}
	if out.Work == nil || !p.May(out.Work.Route) {
		out.Work = nil
	}
	out.Running = out.Work != nil && out.Work.Ended.IsZero()
	for i := range s.Work {
		if s.Work[i].Name == name {
			out.Now = &s.Work[i]
		}
	}
	if out.Running {
		p.refresh(workEvery)
	}
	return out
}
