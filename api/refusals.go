package api

import (
	"maps"
	"slices"
	"sync"

	"yinjian/appliance/problem"
)

// refusals counts what was refused, by code. The codes are the program's own: nobody makes the map grow.
type refusals struct {
	mu sync.Mutex
	of map[problem.Code]uint64 // guarded by mu
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
