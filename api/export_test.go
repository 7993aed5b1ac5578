package api

import (
	"context"
	"net"
	"net/http"
	"time"
)

// Age has all sessions and challenges be older than they are.
func (s *Server) Age(idle, life time.Duration) {
	s.sessions.mu.Lock()
	defer s.sessions.mu.Unlock()
	for _, sess := range s.sessions.of {
		sess.used, sess.begun = sess.used.Add(-idle), sess.begun.Add(-life)
	}
	s.sessions.born = s.sessions.born.Add(-idle)
}

// Expire has the time of all proposals come.
func (s *Server) Expire() {
	s.proposals.mu.Lock()
	all := []*proposal{}
	for _, p := range s.proposals.of {
		all = append(all, p)
	}
	s.proposals.mu.Unlock()
	for _, p := range all {
		s.expire(p)
	}
}

// CSRF is what a page of the session with the token brings.
func (s *Server) CSRF(token string) string {
	return s.sessions.csrf(s.sessions.find(token, listenerTLS))
}

// ConnState is what net/http calls.
var ConnState = connState

// Handled says that a request on the connection is being handled.
func Handled(conn net.Conn) {
	handled(new(http.Request).WithContext(connContext(context.Background(), conn)))
}
