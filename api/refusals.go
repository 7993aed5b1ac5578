package api

import (
	"maps"
	"slices"
	"sync"

	"golang.org/x/time/rate"

	"yinjian/appliance/problem"
)

// refusals counts what was refused, by code. The codes are the program's own: nobody makes the map grow.
type refusals struct {
	mu    sync.Mutex
	of    map[problem.Code]uint64 // guarded by mu
	lines *rate.Limiter           // guarded by mu: of the log, about those who have not proved who they are
	more  uint64                  // guarded by mu: since the last of these lines
}

// Refusals of strangers that the log tells of: whoever asks for nothing but these fills no disk. 86400 lines a day are some 20 MB.
const (
	strangersPerSecond = 1
	strangersAtOnce    = 100
)

// tell says whether a stranger's refusal is to have a line in the log, and how many had none since the last one.
func (r *refusals) tell() (more uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lines == nil {
		r.lines = rate.NewLimiter(strangersPerSecond, strangersAtOnce)
	}
	if !r.lines.Allow() {
		r.more++
		return 0, false
	}
	more, r.more = r.more, 0
	return more, true
}

func (r *refusals) count(code problem.Code) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of == nil {
		r.of = map[problem.Code]uint64{}
	}
	r.of[code]++
}

// Refusals is how many requests were refused since the start, by code, on all listeners.
func (s *Server) Refusals() map[problem.Code]uint64 {
	s.refused.mu.Lock()
	defer s.refused.mu.Unlock()
	return maps.Clone(s.refused.of)
}

// Pressed lists the addresses from which nobody is let in for the moment, because too many authentications failed there:
// networks as they are counted, in order.
func (s *Server) Pressed() []string {
	f := s.failed
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for who, l := range f.of {
		if l.Tokens() < 1 {
			out = append(out, who.from.String())
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
