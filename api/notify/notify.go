// Package notify carries alarms out of the appliance: by syslog (RFC 5424) over TLS (RFC 5425), and to an HTTPS address
// (webhook). Whoever has an alarm offers it and goes on: each receiver has a queue of bounded length in memory, and what
// does not fit is dropped, the oldest first, and counted. Nothing that the receivers answer is believed or kept.
package notify

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/appliance/alarm"
)

// A Message is an event with who says it and when.
type Message struct {
	alarm.Event
	Node   string    `json:"node"`
	Campus string    `json:"campus"`
	At     time.Time `json:"at"` // UTC; by the machine's clock while time is not trusted
	// Trusted says whether At is a trusted time.
	Trusted bool   `json:"time_trusted"`
	Title   string `json:"title"`
	Next    string `json:"next"`
}

// A State is how a receiver does.
type State struct {
	Name      string `json:"name"` // kind and address
	Waiting   int    `json:"waiting"`
	Delivered uint64 `json:"delivered"` // as far as the receiver's side tells: syslog has no acknowledgement
	Dropped   uint64 `json:"dropped"`   // did not fit, or were given up
	Error     string `json:"last_error,omitempty"`
}

const (
	queued       = 256 // messages that wait for one receiver
	firstBackoff = time.Second
	lastBackoff  = time.Minute
	sendWithin   = 5 * time.Second // one attempt
)

// A sender makes one attempt. dropped is how many messages were lost before this one and not told of yet.
type sender interface {
	send(ctx context.Context, m *Message, dropped uint64) error
	close()
}

// A Receiver is where alarms go. Its methods are safe for concurrent use.
type Receiver struct {
	name     string
	attempts int // of one message; 0: for ever
	sender   sender
	log      logrus.FieldLogger
	wake     chan struct{} // capacity 1
	backoff  time.Duration // the first

	mu      sync.Mutex // guards what follows
	queue   []queuedMessage
	state   State
	untold  uint64 // dropped, and no message has said so
	failing bool   // the last attempt failed
}

type queuedMessage struct {
	Message
	done chan<- error // buffered; nil: nobody waits
}

func newReceiver(name string, attempts int, s sender, log logrus.FieldLogger) *Receiver {
	return &Receiver{name: name, attempts: attempts, sender: s, log: log.WithField("receiver", name), wake: make(chan struct{}, 1), backoff: firstBackoff}
}

// Offer takes a message and does not wait.
func (r *Receiver) Offer(m Message) { r.offer(queuedMessage{Message: m}) }

// Try takes a message and waits until it was sent, was lost, or ctx ends.
func (r *Receiver) Try(ctx context.Context, m Message) error {
	done := make(chan error, 1)
	r.offer(queuedMessage{m, done})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		if s := r.State(); s.Error != "" {
			return &Error{s.Error}
		}
		return ctx.Err()
	}
}

// An Error is what a receiver's side said, shortened.
type Error struct{ Text string }

func (e *Error) Error() string { return e.Text }

var errDropped = &Error{"排队已满，已丢弃 (dropped: the queue was full)"}

func (r *Receiver) offer(m queuedMessage) {
	r.mu.Lock()
	if len(r.queue) >= queued {
		r.lose(r.queue[0], errDropped)
		r.queue = r.queue[1:]
	}
	r.queue = append(r.queue, m)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// lose is called under r.mu.
func (r *Receiver) lose(m queuedMessage, why error) {
	r.state.Dropped++
	r.untold++
	if m.done != nil {
		m.done <- why
	}
}

// State is how it does.
func (r *Receiver) State() State {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.state
	s.Name, s.Waiting = r.name, len(r.queue)
	return s
}

// Run sends until ctx ends. What waits then is lost.
func (r *Receiver) Run(ctx context.Context) error {
	defer r.sender.close()
	tries, wait := 0, r.backoff
	for ctx.Err() == nil {
		r.mu.Lock()
		var m queuedMessage
		some := len(r.queue) > 0
		if some {
			m = r.queue[0]
		}
		untold := r.untold
		r.mu.Unlock()
		if !some {
			select {
			case <-r.wake:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		attempt, cancel := context.WithTimeout(ctx, sendWithin)
		err := r.sender.send(attempt, &m.Message, untold)
		cancel()
		if ctx.Err() != nil && err != nil {
			return nil
		}
		tries++
		r.settle(m, untold, err, r.attempts > 0 && tries >= r.attempts)
		if err == nil || r.attempts > 0 && tries >= r.attempts {
			tries, wait = 0, r.backoff
			continue
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		wait = min(2*wait, lastBackoff)
	}
	return nil
}

// settle notes what came of an attempt.
func (r *Receiver) settle(m queuedMessage, told uint64, err error, last bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// Offers may have pushed the message out of the queue meanwhile: then it was counted as lost, and its copy arrived.
	head := len(r.queue) > 0 && r.queue[0].ID == m.ID && r.queue[0].Event.Event == m.Event.Event && r.queue[0].done == m.done
	switch {
	case err == nil:
		r.state.Delivered++
		r.untold -= told
		r.state.Error = ""
		if head {
			r.queue = r.queue[1:]
			if m.done != nil {
				m.done <- nil
			}
		}
		if r.failing {
			r.log.Info("alarms reach the receiver again")
		}
		r.failing = false
		return
	case last && head:
		r.queue = r.queue[1:]
		r.lose(m, err)
	}
	r.state.Error = cut(err.Error(), 256)
	if !r.failing { // once, not at each attempt
		r.log.WithError(err).Error("an alarm could not be sent; it is tried again")
	}
	r.failing = true
}

// cut shortens text at the border of a character.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && s[most]&0xc0 == 0x80 {
		most--
	}
	return s[:most]
}

// TLS says how a receiver is known, and how we are.
type TLS struct {
	Roots       *x509.CertPool   // nil: the system's
	ServerName  string           // "": the address's host
	Certificate *tls.Certificate // of ours, where the receiver asks for one; nil: none
	Now         func() time.Time // judges the receiver's certificate
}

func (t TLS) config(host string) *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: t.Roots, ServerName: t.ServerName, Time: t.Now}
	if c.ServerName == "" {
		c.ServerName = host
	}
	if t.Certificate != nil {
		c.Certificates = []tls.Certificate{*t.Certificate}
	}
	return c
}
