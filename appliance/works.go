package appliance

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// The works are what takes long and people wait for: verifications, assessments, patrols. Safe for concurrent use.
type works struct {
	mu sync.Mutex
	of []*work // guarded by mu, the longest under way first
}

// A work is one of them.
type work struct {
	ws          *works
	name        string
	begun       time.Time // monotonic
	done, total uint64    // guarded by ws.mu
}

// A workState says how far one is; Total is 0 where nobody knows it.
type workState struct {
	Name  string `json:"name"`
	ForS  int64  `json:"for_s"`
	Done  uint64 `json:"done,omitempty"`
	Total uint64 `json:"total,omitempty"`
}

// begin adds one, until it ends.
func (ws *works) begin(name string) *work {
	w := &work{ws: ws, name: name, begun: time.Now()} // interval
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.of = append(ws.of, w)
	return w
}

// is tells how far it is.
func (w *work) is(done, total uint64) {
	w.ws.mu.Lock()
	defer w.ws.mu.Unlock()
	w.done, w.total = done, total
}

func (w *work) end() {
	w.ws.mu.Lock()
	defer w.ws.mu.Unlock()
	w.ws.of = slices.DeleteFunc(w.ws.of, func(o *work) bool { return o == w })
}

func (ws *works) state() []workState {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	out := []workState{}
	for _, w := range ws.of {
		out = append(out, workState{w.name, int64(time.Since(w.begun).Seconds()), w.done, w.total}) // interval
	}
	slices.SortStableFunc(out, func(a, b workState) int { return cmp.Compare(b.ForS, a.ForS) })
	return out
}
