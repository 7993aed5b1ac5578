package api

import (
	"errors"
	"net"
	"sync"
	"time"
)

// A Door is one listener whose callers are answered by whoever was let in last: the local socket stays where it is while
// the appliance starts, runs and stops, and no call falls between two servers. Safe for concurrent use.
type Door struct {
	ln net.Listener

	mu     sync.Mutex
	guests []*guest // the last one gets the next connection
	change chan struct{}
	closed bool
}

// NewDoor begins to take connections from ln, which it owns from here on.
func NewDoor(ln net.Listener) *Door {
	d := &Door{ln: ln, change: make(chan struct{})}
	go d.run()
	return d
}

// run hands connections on until the listener ends.
func (d *Door) run() {
	for {
		conn, err := d.ln.Accept()
		switch {
		case err == nil:
			d.hand(conn)
		case errors.Is(err, net.ErrClosed):
			return
		default: // too many open files, say: it may pass
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// changed wakes those who wait for another guest; mu is held.
func (d *Door) changed() {
	close(d.change)
	d.change = make(chan struct{})
}

// hand gives a connection to the present guest, or to the next when that one leaves or another is let in.
func (d *Door) hand(conn net.Conn) {
	for {
		d.mu.Lock()
		change, closed := d.change, d.closed
		var to chan net.Conn // nil while nobody is there
		if n := len(d.guests); n > 0 {
			to = d.guests[n-1].conns
		}
		d.mu.Unlock()
		if closed {
			conn.Close()
			return
		}
		select {
		case to <- conn:
			return
		case <-change:
		}
	}
}

// Listen lets a guest in: its listener gets the connections from now on, until it is closed; then the one before does.
func (d *Door) Listen() net.Listener {
	d.mu.Lock()
	defer d.mu.Unlock()
	g := &guest{door: d, conns: make(chan net.Conn), left: make(chan struct{})}
	d.guests = append(d.guests, g)
	d.changed()
	return g
}

// Close ends the listener, and with it its guests'.
func (d *Door) Close() error {
	err := d.ln.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.closed = true
		d.changed()
	}
	return err
}

// A guest is the listener of one server.
type guest struct {
	door  *Door
	conns chan net.Conn
	left  chan struct{}
	once  sync.Once
}

func (g *guest) Accept() (net.Conn, error) {
	for {
		g.door.mu.Lock()
		change, closed := g.door.change, g.door.closed
		g.door.mu.Unlock()
		if closed {
			return nil, net.ErrClosed
		}
		select {
		case conn := <-g.conns:
			return conn, nil
		case <-g.left:
			return nil, net.ErrClosed
		case <-change:
		}
	}
}

// Close leaves the door to the guest before.
func (g *guest) Close() error {
	g.once.Do(func() {
		g.door.mu.Lock()
		defer g.door.mu.Unlock()
		close(g.left)
		for i, o := range g.door.guests {
			if o == g {
				g.door.guests = append(g.door.guests[:i:i], g.door.guests[i+1:]...)
				break
			}
		}
		g.door.changed()
	})
	return nil
}

func (g *guest) Addr() net.Addr { return g.door.ln.Addr() }
