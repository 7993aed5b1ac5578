package api

import (
	queue "container/list"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync"
)

// Limited holds at most most connections of ln open at once, and at most each of one address. One more makes room for
// itself: of those without a request that is being handled, the one that has waited longest is closed, of the same address if
// that has its fill. When there is none such, the new one is closed. So connections that do nothing, or whose requests are
// never whole, keep nobody out, and one address cannot take all.
//
// Which connections wait is known by the http.Server, if it comes from [Server.NewHTTPServer].
func Limited(ln net.Listener, most, each int) net.Listener {
	return &limitedListener{Listener: ln, most: most, each: each, of: map[netip.Prefix]int{}}
}

type limitedListener struct {
	net.Listener
	most, each int

	mu      sync.Mutex
	open    int                  // guarded by mu
	of      map[netip.Prefix]int // guarded by mu: open, by address
	waiting queue.List           // guarded by mu: *limitedConn, the one that has waited longest first
}

type limitedConn struct {
	net.Conn
	ln    *limitedListener
	from  netip.Prefix
	gone  bool           // guarded by ln.mu: no longer counted
	place *queue.Element // guarded by ln.mu; nil while a request is being handled
}

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		one := &limitedConn{Conn: c, ln: l, from: addressOf(c.RemoteAddr().String())}
		victim, ok := l.admit(one)
		if victim != nil {
			victim.Close()
		}
		if ok {
			return one, nil
		}
		c.Close()
	}
}

// admit counts c, and answers who has to go for it.
func (l *limitedListener) admit(c *limitedConn) (victim *limitedConn, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	crowd := l.of[c.from] >= l.each
	if crowd || l.open >= l.most {
		for e := l.waiting.Front(); e != nil; e = e.Next() {
			if w := e.Value.(*limitedConn); !crowd || w.from == c.from {
				victim = w
				l.forget(w)
				break
			}
		}
		if victim == nil {
			return nil, false
		}
	}
	l.open++
	l.of[c.from]++
	c.place = l.waiting.PushBack(c)
	return victim, true
}

// forget takes c out of the counts, once; the caller holds l.mu.
func (l *limitedListener) forget(c *limitedConn) {
	if c.gone {
		return
	}
	c.gone = true
	l.open--
	if l.of[c.from]--; l.of[c.from] == 0 {
		delete(l.of, c.from)
	}
	c.wait(false)
}

// wait says whether c waits for a request, from now on; the caller holds ln.mu.
func (c *limitedConn) wait(waits bool) {
	switch waits = waits && !c.gone; {
	case waits && c.place != nil:
		c.ln.waiting.MoveToBack(c.place)
	case waits:
		c.place = c.ln.waiting.PushBack(c)
	case c.place != nil:
		c.ln.waiting.Remove(c.place)
		c.place = nil
	}
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	c.ln.forget(c)
	return err
}

// limitedOf answers the limited connection under conn, nil if there is none.
func limitedOf(conn net.Conn) *limitedConn {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	c, _ := conn.(*limitedConn)
	return c
}

// connState is the http.Server's: a connection waits from its last answer on, and anew from the end of a header on, until
// [handled] is called.
func connState(conn net.Conn, state http.ConnState) {
	if c := limitedOf(conn); c != nil && (state == http.StateActive || state == http.StateIdle) {
		c.ln.mu.Lock()
		defer c.ln.mu.Unlock()
		c.wait(true)
	}
}

type connKey struct{}

// connContext is the http.Server's: it lets [handled] find the connection of a request.
func connContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, limitedOf(conn))
}

// handled says that the request is whole, and from somebody who may send it: its connection makes room for no other.
func handled(r *http.Request) {
	if c, _ := r.Context().Value(connKey{}).(*limitedConn); c != nil {
		c.ln.mu.Lock()
		defer c.ln.mu.Unlock()
		c.wait(false)
	}
}

// addressOf is who sends, for limits: an IPv4 address, or the 64 bits of an IPv6 address that a network gives to one
// household. What is no address is one of its own.
func addressOf(hostport string) netip.Prefix {
	a, err := netip.ParseAddrPort(hostport)
	if err != nil {
		return netip.Prefix{}
	}
	return household(a.Addr().Unmap().WithZone(""))
}

// household is [addressOf] of a plain address.
func household(addr netip.Addr) netip.Prefix {
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // bits fits; what is no address gives what is none
	return p
}
