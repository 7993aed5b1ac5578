package source

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// A conn is the socket of one question. Its Read passes over packets that cannot be the answer, so that a single spoofed
// packet does not end the query: whoever cannot see the question cannot guess its 64-bit origin, and whoever can see it
// cannot make a MAC.
//
//	byte   0      1       2     3     4       8       12    16     24      32     40      48
//	      +------+-------+-----+-----+-------+-------+-----+------+-------+------+-------+----
//	      |LI VN |stratum|poll |prec.|root   |root   |ref. |ref.  |origin |recv  |transm.| MAC…
//	      |mode  |       |     |     |delay  |disp.  |ID   |time  |       |time  |time   |
//	      +------+-------+-----+-----+-------+-------+-----+------+-------+------+-------+----
type conn struct {
	net.Conn
	origin []byte // the question's transmit time, which the answer repeats

	authentic func(packet []byte) bool // nil: no MAC is wanted
	forged    int                      // answers whose MAC was wrong

	stop   func() bool
	closed sync.Once
}

const (
	headerSize = 48
	maxAnswer  = 1024 // header, MAC and extension fields we do not use
)

// newConn binds c to ctx: when ctx ends, reads and writes end.
func newConn(ctx context.Context, c net.Conn, authentic func([]byte) bool) *conn {
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(deadline)
	}
	return &conn{Conn: c, authentic: authentic, stop: context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })}
}

// SetDeadline is beevik's wish, which the context overrules.
func (c *conn) SetDeadline(time.Time) error { return nil }

func (c *conn) Write(b []byte) (int, error) {
	if len(b) >= headerSize {
		c.origin = bytes.Clone(b[40:48])
	}
	return c.Conn.Write(b)
}

func (c *conn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil {
			if c.forged > 0 {
				err = fmt.Errorf("%w; authentication failed for %d answers", err, c.forged)
			}
			return 0, err
		}
		if n < headerSize || n > maxAnswer || !bytes.Equal(b[24:32], c.origin) || b[0]&7 != 4 {
			continue
		}
		// beevik v1.6.0 negates poll and precision as int8 and panics at −128; and a precision above 2^33 s overflows into
		// anything, 0 included (TestFaults, "precision −128" and "precision absurd").
		if b[2] == 0x80 || b[3] == 0x80 || int8(b[3]) > 33 {
			continue
		}
		if c.authentic != nil && !c.authentic(b[:n]) {
			c.forged++
			continue
		}
		return n, nil
	}
}

func (c *conn) Close() error {
	err := net.ErrClosed
	c.closed.Do(func() {
		c.stop()
		err = c.Conn.Close()
	})
	return err
}
