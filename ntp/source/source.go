// Package source asks NTP servers (RFC 5905, NTPv4 client mode) and feeds what they say to an ntp.Clock.
//
// The exchange is github.com/beevik/ntp's. Given CLOCK_BOOTTIME for its system time, the offset it computes is UTC at
// boot, and the machine's wall clock, right or wrong, stepping or not, has no part in it. This package adds what a query
// needs in a hostile network: packets that do not belong to the request are read over until the deadline, kiss-of-death
// answers are obeyed, and nothing is believed about an answer's quality but its numbers; which numbers are good enough
// is ntp.Limits' business.
package source

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	beevik "github.com/beevik/ntp"

	"yinjian/ntp"
)

// Config names one server.
type Config struct {
	Name    string        // unique, for logs and evidence
	Group   string        // servers with one antenna or upstream share a group; default Name
	Address string        // host:port
	Timeout time.Duration // for a whole Query with its retries; default 2 s
	Auth    Auth          // zero: no authentication

	// Clock is required.
	Clock ntp.BootClock
	// Dial is net.Dialer's DialContext if nil; network is "udp".
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// A Source is one server. Query is safe for concurrent use; queries run one at a time.
type Source struct {
	cfg  Config
	auth beevik.AuthOptions
	key  []byte // nil: none

	mu        sync.Mutex
	denied    bool
	spacing   time.Duration // wanted by a RATE kiss; 0: none
	notBefore time.Duration // CLOCK_BOOTTIME
	good      int           // answers since the spacing last changed
}

var (
	// ErrDenied means that the server has sent DENY or RSTR (RFC 5905 §7.4) and is not asked again in this process.
	ErrDenied = errors.New("ntp source: the server refuses us")
	// ErrBackoff means that the server has asked for fewer queries (RATE) and the time for the next has not come.
	ErrBackoff = errors.New("ntp source: waiting as the server asked")
	// ErrInvalid means that an answer contradicts itself or the protocol.
	ErrInvalid = errors.New("ntp source: invalid answer")
	// ErrSleep means that the machine slept during the query.
	ErrSleep = errors.New("ntp source: the machine slept during the query")
)

const (
	minSpacing = 64 * time.Second   // first answer to RATE
	maxSpacing = 1024 * time.Second // the usual longest NTP poll interval, 2^10 s
	goodAnswer = 8                  // answers at one spacing before it is halved

	// floor stands for what no field of the packet tells: timestamps taken in user space, interrupts, asymmetry on the LAN.
	floor = time.Millisecond
	// ownDriftPPM covers our clock's part in measuring the round trip.
	ownDriftPPM = 500
)

// New returns a source; it reads the key file and does not yet talk to the server.
func New(cfg Config) (*Source, error) {
	if cfg.Name == "" || cfg.Clock == nil {
		return nil, errors.New("ntp source: name and clock are required")
	}
	host, port, err := net.SplitHostPort(cfg.Address)
	if err != nil || host == "" || port == "" {
		return nil, fmt.Errorf("ntp source %s: address %q: want host:port", cfg.Name, cfg.Address)
	}
	if cfg.Group == "" {
		cfg.Group = cfg.Name
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 2 * time.Second
	}
	if cfg.Timeout < 0 {
		return nil, fmt.Errorf("ntp source %s: timeout %v", cfg.Name, cfg.Timeout)
	}
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	s := &Source{cfg: cfg}
	if cfg.Auth != (Auth{}) {
		if s.auth, s.key, err = cfg.Auth.load(); err != nil {
			return nil, fmt.Errorf("ntp source %s: %w", cfg.Name, err)
		}
	}
	return s, nil
}

// Name is the source's name.
func (s *Source) Name() string { return s.cfg.Name }

// Query asks the server once and waits for an answer that belongs to the question, until ctx ends or the timeout of the
// configuration has passed. Answers that fail authentication are read over; those that come to nothing in another way that
// a third party could have caused are followed by a new question while there is time. The measurement has not passed ntp's Check: an answer
// of stratum 16 is returned as such.
func (s *Source) Query(ctx context.Context) (ntp.Measurement, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.query(ctx)
	if err != nil {
		return ntp.Measurement{}, fmt.Errorf("ntp source %s: %w", s.cfg.Name, err)
	}
	return m, nil
}

func (s *Source) query(ctx context.Context) (ntp.Measurement, error) {
	if s.denied {
		return ntp.Measurement{}, ErrDenied
	}
	if s.cfg.Clock.Boot() < s.notBefore {
		return ntp.Measurement{}, ErrBackoff
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	var last error
	// Three questions at most: a server that answers wrongly three times in two seconds will not do better, and must not
	// be flooded.
	for range 3 {
		m, err := s.once(ctx)
		switch {
		case err == nil:
			s.answered()
			return m, nil
		case errors.Is(err, ErrDenied), errors.Is(err, ErrBackoff):
			return m, err
		}
		// The socket's deadline is the context's, and may be noticed before it.
		over := ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded)
		if last == nil || !over { // a later timeout says less than what was wrong before
			last = err
		}
		if over {
			break
		}
	}
	return ntp.Measurement{}, last
}

// answered halves the spacing that the server asked for, after a number of good answers at it.
func (s *Source) answered() {
	if s.spacing == 0 {
		return
	}
	s.notBefore = s.cfg.Clock.Boot() + s.spacing
	if s.good++; s.good >= goodAnswer {
		s.good, s.spacing = 0, s.spacing/2
		if s.spacing < minSpacing/4 {
			s.spacing = 0
		}
	}
}

// kissed obeys a kiss code, RFC 5905 §7.4.
func (s *Source) kissed(code string, poll time.Duration) error {
	switch code {
	case "DENY", "RSTR":
		s.denied = true
		return fmt.Errorf("%w (%s)", ErrDenied, code)
	case "RATE":
		s.good = 0
		s.spacing = min(max(2*s.spacing, minSpacing, poll), maxSpacing)
		s.notBefore = s.cfg.Clock.Boot() + s.spacing
		return fmt.Errorf("%w: RATE, next query in %v", ErrBackoff, s.spacing)
	}
	// Other codes are about association and initialisation; there is nothing to do but to ask again later.
	return fmt.Errorf("%w: kiss of death %q", ErrInvalid, code)
}

// epoch is the zero of CLOCK_BOOTTIME as handed to beevik. 1970 keeps all differences to the times of NTP eras 0 and 1
// (1970 to 2106) within a time.Duration, twice over.
var epoch = time.Unix(0, 0).UTC()

// once is one question on a socket of its own: a new port and a new origin each time.
func (s *Source) once(ctx context.Context) (ntp.Measurement, error) {
	clock := s.cfg.Clock
	boot, mono, raw := clock.Boot(), clock.Monotonic(), clock.Raw()
	if ctx.Err() != nil {
		return ntp.Measurement{}, context.Cause(ctx)
	}
	r, err := beevik.QueryWithOptions(s.cfg.Address, beevik.QueryOptions{
		Timeout:       s.cfg.Timeout, // conn lets the context decide
		Version:       4,
		Auth:          s.auth,
		GetSystemTime: func() time.Time { return epoch.Add(clock.Boot()) },
		Dialer: func(_, remote string) (net.Conn, error) {
			c, err := s.cfg.Dial(ctx, "udp", remote)
			if err != nil {
				return nil, err
			}
			var authentic func([]byte) bool
			if s.key != nil {
				authentic = func(packet []byte) bool { return s.cfg.Auth.authentic(s.key, packet) }
			}
			return newConn(ctx, c, authentic), nil
		},
	})
	if err != nil {
		return ntp.Measurement{}, err
	}
	bent := clock.Monotonic() - clock.Raw()
	if slept := (clock.Boot() - clock.Monotonic()) - (boot - mono); slept.Abs() > 5*time.Millisecond {
		// Two clock readings can be torn apart by the scheduler; throwing such an answer away costs little.
		return ntp.Measurement{}, fmt.Errorf("%w (%v)", ErrSleep, slept)
	}
	if r.Version != 4 {
		return ntp.Measurement{}, fmt.Errorf("%w: version %d to a question of version 4", ErrInvalid, r.Version)
	}
	if r.IsKissOfDeath() {
		return ntp.Measurement{}, s.kissed(r.KissCode, r.Poll)
	}

	// RFC 5905 §8: t1 and t4 are ours (here: of CLOCK_BOOTTIME), t2 and t3 the server's.
	t := r.Timestamps
	t1, t4 := t.ClientXmit.Sub(epoch), t.ClientRecv.Sub(epoch)
	inside, total := t.ServerXmit.Sub(t.ServerRecv), t4-t1
	if total < 0 || inside < 0 || inside > total+total/1000+floor {
		// The server claims to have thought for longer than we waited (or across the end of an era); beevik would call the
		// round trip zero and lose its share of the root distance.
		return ntp.Measurement{}, fmt.Errorf("%w: %v inside the server, %v in all", ErrInvalid, inside, total)
	}
	rtt := max(total-inside, 0)
	offset := (t.ServerRecv.Sub(t.ClientXmit) + t.ServerXmit.Sub(t.ClientRecv)) / 2
	precision := min(max(r.Precision, 0), time.Hour) // 2^63 s overflows into anything
	m := ntp.Measurement{
		Source:       s.cfg.Name,
		Group:        s.cfg.Group,
		Boot:         t4,
		UTC:          epoch.Add(t4 + offset),
		Bent:         bent,
		RTT:          rtt,
		RootDistance: rtt/2 + r.RootDelay/2 + r.RootDispersion + precision + total/1_000_000*ownDriftPPM + (bent - (mono - raw)).Abs() + floor,
		Stratum:      r.Stratum,
		Leap:         ntp.Leap(r.Leap),
		RefID:        refID(r),
		ReferenceAge: t.ServerXmit.Sub(r.ReferenceTime),
	}
	return m, nil
}

// refID is the reference identifier: text at stratum 1, a dotted number otherwise.
func refID(r *beevik.Response) string {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], r.ReferenceID)
	if r.Stratum > 1 {
		return fmt.Sprintf("%d.%d.%d.%d", b[0], b[1], b[2], b[3])
	}
	n := len(b)
	for n > 0 && b[n-1] == 0 {
		n--
	}
	return string(b[:n])
}
