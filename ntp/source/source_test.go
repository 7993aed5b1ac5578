package source_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/ntp"
	"yinjian/ntp/source"
	"yinjian/ntp/sysclock"
)

// utcAtBoot makes the servers of these tests live in 2030: whatever the test machine's wall clock says, it must not show.
var utcAtBoot = time.Date(2030, 3, 1, 0, 0, 0, 0, time.UTC)

var kernel = func() *sysclock.Clock {
	c, err := sysclock.Open()
	if err != nil {
		panic(err)
	}
	return c
}()

func quiet() logrus.FieldLogger { l := logrus.New(); l.SetOutput(io.Discard); return l }

// An answer is an NTP packet in the making.
type answer struct {
	leap, version, mode  byte
	stratum              byte
	poll, precision      int8
	rootDelay, rootDisp  time.Duration
	refID                string
	refAge               time.Duration
	offset               time.Duration // of the server's clock
	inside               time.Duration // claimed between receive and transmit
	noXmit, wrongOrigin  bool
	refZero, recvLater   bool
	truncate, extraBytes int
}

func good() answer {
	return answer{version: 4, mode: 4, stratum: 1, precision: -20, rootDelay: 100 * time.Millisecond, rootDisp: 11 * time.Millisecond, refID: "BDS", refAge: 4 * time.Second}
}

func stamp(t time.Time) uint64 {
	d := t.Sub(time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC)) // below 292 years
	return uint64(d/time.Second)<<32 | uint64(d%time.Second)<<32/uint64(time.Second)
}

func short(d time.Duration) uint32 { return uint32(uint64(d) << 16 / uint64(time.Second)) }

func (a answer) bytes(req []byte) []byte {
	now := utcAtBoot.Add(kernel.Boot() + a.offset)
	b := make([]byte, 48, 128)
	b[0], b[1], b[2], b[3] = a.leap<<6|a.version<<3|a.mode, a.stratum, byte(a.poll), byte(a.precision)
	binary.BigEndian.PutUint32(b[4:], short(a.rootDelay))
	binary.BigEndian.PutUint32(b[8:], short(a.rootDisp))
	copy(b[12:16], a.refID)
	if !a.refZero {
		binary.BigEndian.PutUint64(b[16:], stamp(now.Add(-a.refAge)))
	}
	copy(b[24:32], req[40:48])
	if a.wrongOrigin {
		b[31] ^= 1
	}
	recv := now.Add(-a.inside)
	if a.recvLater {
		recv = now.Add(time.Second)
	}
	binary.BigEndian.PutUint64(b[32:], stamp(recv))
	if !a.noXmit {
		binary.BigEndian.PutUint64(b[40:], stamp(now))
	}
	b = append(b, make([]byte, a.extraBytes)...)
	return b[:len(b)-a.truncate]
}

// serve answers each request with what reply returns for it, n counting from 0, and returns the address.
func serve(t testing.TB, reply func(n int, req []byte) [][]byte) string {
	t.Helper()
	c := listen(t, "127.0.0.1:0")
	go serveOn(c, c, reply)
	return c.LocalAddr().String()
}

func listen(t testing.TB, address string) net.PacketConn {
	t.Helper()
	c, err := net.ListenPacket("udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// serveOn reads requests from in and sends the answers from out, until in is closed.
func serveOn(in, out net.PacketConn, reply func(n int, req []byte) [][]byte) {
	buf := make([]byte, 2048)
	for n := 0; ; n++ {
		size, from, err := in.ReadFrom(buf)
		if err != nil {
			return
		}
		if size < 48 {
			continue
		}
		for _, p := range reply(n, buf[:size]) {
			_, _ = out.WriteTo(p, from)
		}
	}
}

func always(a answer) func(int, []byte) [][]byte {
	return func(_ int, req []byte) [][]byte { return [][]byte{a.bytes(req)} }
}

func newSource(t testing.TB, name, address string) *source.Source {
	t.Helper()
	s, err := source.New(source.Config{Name: name, Group: "g-" + name, Address: address, Timeout: 3 * time.Second, Clock: kernel})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// truthful wants a trusted clock whose reading lies within its bound of the time that it was at some moment of the reading.
func truthful(t *testing.T, clock *ntp.Clock) {
	t.Helper()
	before := utcAtBoot.Add(kernel.Boot())
	r := clock.Now()
	after := utcAtBoot.Add(kernel.Boot())
	if r.State != ntp.Trusted || r.Time.Before(before.Add(-r.Bound)) || r.Time.After(after.Add(r.Bound)) {
		t.Errorf("reading %+v between %v and %v", r, before, after)
	}
}

func TestGoodAnswer(t *testing.T) {
	t.Parallel()
	a := good()
	a.leap, a.stratum, a.refID = 1, 2, "\x0a\x00\x00\x01"
	m, err := newSource(t, "lan", serve(t, always(a))).Query(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := m.UTC.Sub(utcAtBoot.Add(m.Boot)); d.Abs() > m.RTT/2+time.Microsecond {
		t.Errorf("UTC is %v off, round trip %v", d, m.RTT)
	}
	if m.Source != "lan" || m.Group != "g-lan" || m.Stratum != 2 || m.Leap != ntp.LeapInsert || m.RefID != "10.0.0.1" {
		t.Errorf("measurement %+v", m)
	}
	if want := 61*time.Millisecond + m.RTT/2; m.RootDistance < want || m.RootDistance > want+3*time.Millisecond {
		t.Errorf("root distance %v, want about %v", m.RootDistance, want)
	}
	if d := m.ReferenceAge - 4*time.Second; d.Abs() > time.Millisecond {
		t.Errorf("reference age %v, want 4s", m.ReferenceAge)
	}
}

// A turned clock is the kernel's with BOOTTIME moved by hand.
type turned struct {
	*sysclock.Clock
	ahead, slept atomic.Int64
	onBoot       func()
}

func (c *turned) Boot() time.Duration {
	if c.onBoot != nil {
		c.onBoot()
	}
	return c.Clock.Boot() + time.Duration(c.ahead.Load()+c.slept.Load())
}
func (c *turned) Monotonic() time.Duration {
	return c.Clock.Monotonic() + time.Duration(c.ahead.Load())
}

// TestBentWhileAsked: a kernel's clock that is slowed while the answer is on its way makes the way look short.
func TestBentWhileAsked(t *testing.T) {
	t.Parallel()
	const slowed = 40 * time.Millisecond
	clock := &turned{Clock: kernel}
	a := good()
	a.rootDelay, a.rootDisp = 0, 0
	addr := serve(t, func(_ int, req []byte) [][]byte {
		b := a.bytes(req)
		time.Sleep(60 * time.Millisecond) // on the way back
		clock.ahead.Add(-int64(slowed))
		return [][]byte{b}
	})
	s, err := source.New(source.Config{Name: "s", Address: addr, Clock: clock})
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Query(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if off := utcAtBoot.Add(m.Boot + slowed).Sub(m.UTC); off.Abs() > m.RootDistance {
		t.Errorf("measurement is %v off, and claims %v", off, m.RootDistance)
	}
	if now := clock.Monotonic() - clock.Raw(); (now - m.Bent).Abs() > 20*time.Millisecond {
		t.Errorf("bent by %v, now %v", m.Bent, now)
	}
}

func TestKissOfDeath(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"DENY", "RSTR"} {
		var asked atomic.Int32
		a := good()
		a.stratum, a.refID = 0, code
		s := newSource(t, "s", serve(t, func(_ int, req []byte) [][]byte { asked.Add(1); return [][]byte{a.bytes(req)} }))
		for range 3 {
			if _, err := s.Query(t.Context()); !errors.Is(err, source.ErrDenied) {
				t.Errorf("%s: %v, want ErrDenied", code, err)
			}
		}
		if n := asked.Load(); n != 1 {
			t.Errorf("%s: asked %d times, want 1", code, n)
		}
	}
}

func TestRate(t *testing.T) {
	t.Parallel()
	var asked, limited atomic.Int32
	limited.Store(1)
	addr := serve(t, func(_ int, req []byte) [][]byte {
		asked.Add(1)
		a := good()
		if limited.Load() != 0 {
			a.stratum, a.refID = 0, "RATE"
		}
		return [][]byte{a.bytes(req)}
	})
	clock := &turned{Clock: kernel}
	s, err := source.New(source.Config{Name: "s", Address: addr, Clock: clock})
	if err != nil {
		t.Fatal(err)
	}
	// Each RATE doubles the pause, in which nobody is asked.
	for i, pause := range []time.Duration{64, 128, 256, 512, 1024, 1024} {
		if _, err := s.Query(t.Context()); !errors.Is(err, source.ErrBackoff) {
			t.Fatalf("RATE: %v, want ErrBackoff", err)
		}
		clock.ahead.Add(int64((pause - 30) * time.Second))
		if _, err := s.Query(t.Context()); !errors.Is(err, source.ErrBackoff) || asked.Load() != int32(i+1) {
			t.Fatalf("asked %d times within %d s of the %dth RATE: %v", asked.Load(), pause, i+1, err)
		}
		clock.ahead.Add(int64(30 * time.Second))
	}
	// Good answers bring the old rate back, gradually.
	limited.Store(0)
	spaced := 0
	for range 60 {
		if _, err := s.Query(t.Context()); errors.Is(err, source.ErrBackoff) {
			spaced++
			clock.ahead.Add(int64(1024 * time.Second))
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if spaced < 20 {
		t.Errorf("only %d queries were spaced", spaced)
	}
	for range 120 {
		_, _ = s.Query(t.Context())
		clock.ahead.Add(int64(1024 * time.Second))
	}
	for range 3 {
		if _, err := s.Query(t.Context()); err != nil {
			t.Errorf("still spaced: %v", err)
		}
	}
}

func TestSleepDuringQuery(t *testing.T) {
	t.Parallel()
	clock := &turned{Clock: kernel}
	addr := serve(t, func(_ int, req []byte) [][]byte {
		clock.slept.Add(int64(time.Second))
		return [][]byte{good().bytes(req)}
	})
	s, err := source.New(source.Config{Name: "s", Address: addr, Clock: clock})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s.Query(t.Context()); !errors.Is(err, source.ErrSleep) {
		t.Errorf("Query = %+v, %v, want ErrSleep", m, err)
	}
}

func TestQueryEndsWithContext(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 8)
	addr := serve(t, func(int, []byte) [][]byte { asked <- struct{}{}; return nil })
	s, err := source.New(source.Config{Name: "s", Address: addr, Clock: kernel, Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { _, err := s.Query(ctx); done <- err }()
	<-asked
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("no error")
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("Query goes on after its context")
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	secret := strings.Repeat("a5", 16)
	for name, c := range map[string]struct {
		cfg  source.Config
		want string
	}{
		"no name":      {source.Config{Address: "127.0.0.1:123", Clock: kernel}, "required"},
		"no clock":     {source.Config{Name: "s", Address: "127.0.0.1:123"}, "required"},
		"no port":      {source.Config{Name: "s", Address: "127.0.0.1", Clock: kernel}, "host:port"},
		"timeout":      {source.Config{Name: "s", Address: "127.0.0.1:123", Clock: kernel, Timeout: -1}, "timeout"},
		"MD5":          {auth(1, "MD5", file("md5", "1 MD5 HEX:"+secret, 0o600)), `auth type "MD5"`},
		"no such file": {auth(1, "AES128", filepath.Join(dir, "none")), "no such file"},
		"open to all":  {auth(1, "AES128", file("open", "1 AES128 HEX:"+secret, 0o644)), "open to others"},
		"no such key":  {auth(2, "AES128", file("other", "1 AES128 HEX:"+secret, 0o600)), "key 2 not found"},
		"twice":        {auth(1, "AES128", file("twice", "1 AES128 HEX:"+secret+"\n1 AES128 HEX:"+secret, 0o600)), "occurs twice"},
		"other type":   {auth(1, "AES256", file("type", "1 AES128 HEX:"+secret, 0o600)), "not of type"},
		"bad hex":      {auth(1, "AES128", file("hex", "1 AES128 HEX:"+secret+"zz", 0o600)), "not hexadecimal"},
		"bare key":     {auth(1, "AES128", file("bare", "1 AES128 "+secret, 0o600)), "must begin with"},
		"short":        {auth(1, "SHA256", file("short", "1 SHA256 ASCII:secret", 0o600)), "has 6 bytes"},
		"long":         {auth(1, "SHA256", file("long", "1 SHA256 HEX:"+secret+secret+"00", 0o600)), "has 33 bytes"},
		"empty key":    {auth(1, "SHA256", file("empty", "1 SHA256 HEX:", 0o600)), "empty"},
		"odd line":     {auth(1, "SHA256", file("odd", "# comment\n\n1 SHA256", 0o600)), "line 3"},
		"id no number": {auth(1, "SHA256", file("id", "one SHA256 HEX:00", 0o600)), "not a number"},
		"oversized":    {auth(1, "SHA256", file("huge", strings.Repeat("#", 70<<10), 0o600)), "larger than"},
		"no id":        {auth(0, "SHA256", file("noid", "", 0o600)), "required"},
	} {
		_, err := source.New(c.cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error shows the key: %v", name, err)
		}
	}
}

func auth(id uint32, typ, file string) source.Config {
	return source.Config{Name: "s", Address: "127.0.0.1:123", Clock: kernel, Auth: source.Auth{KeyID: id, Type: typ, KeyFile: file}}
}

// TestPoller has three servers, one of which lies, falls silent, and so on.
func TestPoller(t *testing.T) {
	t.Parallel()
	var lie, silent atomic.Bool
	honest := good()
	honest.stratum = 2
	var sources []*source.Source
	for _, name := range []string{"a", "b", "c"} {
		sources = append(sources, newSource(t, name, serve(t, func(_ int, req []byte) [][]byte {
			a := honest
			switch {
			case name == "c" && lie.Load():
				a.offset = 5 * time.Second
			case silent.Load():
				return nil
			}
			return [][]byte{a.bytes(req)}
		})))
	}
	clock, err := ntp.NewClock(ntp.Config{MinSources: 2}, kernel)
	if err != nil {
		t.Fatal(err)
	}
	p := &source.Poller{Sources: sources, Clock: clock, Log: quiet(), Interval: 10 * time.Millisecond}
	want := func(s ntp.State, rounds int) ntp.Reading {
		t.Helper()
		for range rounds {
			p.Round(t.Context())
		}
		r := clock.Now()
		if r.State != s {
			t.Fatalf("state %s, want %s: %+v", r.State, s, clock.Last())
		}
		return r
	}
	lie.Store(true)
	want(ntp.Trusted, 3)
	truthful(t, clock)
	if last := clock.Last(); strings.Join(last.Rejected, " ") != "g-c" {
		t.Errorf("rejected %v", last.Rejected)
	}
	silent.Store(true) // now only the liar speaks
	want(ntp.Trusted, 1)
	for i, st := range p.Status() {
		if (st.Err != nil) != (i < 2) || st.Measurement.Source != st.Source {
			t.Errorf("status %+v", st)
		}
	}
	silent.Store(false)
	lie.Store(false)
	want(ntp.Trusted, 1)

	// Run ends with its context, and does not take the interruption for silence.
	ctx, cancel := context.WithCancel(t.Context())
	rounds := make(chan ntp.Round)
	p.OnRound = func(r ntp.Round) { rounds <- r }
	done := make(chan error)
	go func() { done <- p.Run(ctx) }()
	for range 3 {
		if r := <-rounds; r.Err != nil {
			t.Error(r.Err)
		}
	}
	cancel()
	for {
		select {
		case <-rounds:
			continue
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		}
		break
	}
	if err := (&source.Poller{Sources: append(sources, sources[0]), Clock: clock, Log: quiet()}).Run(t.Context()); err == nil {
		t.Error("two sources of one name accepted")
	}
}

// A fake conn answers with given bytes, once, with the origin of the question written into them if asked to.
type fakeConn struct {
	net.Conn
	mu     sync.Mutex
	origin []byte
	packet []byte
	fix    bool
}

func (c *fakeConn) Write(b []byte) (int, error) {
	c.origin = append([]byte(nil), b[40:48]...)
	return len(b), nil
}
func (c *fakeConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.packet == nil {
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(b, c.packet)
	if c.fix && n >= 32 {
		copy(b[24:32], c.origin)
	}
	c.packet = nil
	return n, nil
}
func (c *fakeConn) Close() error                { return nil }
func (c *fakeConn) SetDeadline(time.Time) error { return nil }

// TestForgedAnswersAreCounted: an answer with a wrong MAC is not the answer, but the operator is told that there was one.
func TestForgedAnswersAreCounted(t *testing.T) {
	t.Parallel()
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keys, fmt.Appendf(nil, "7 SHA256 HEX:%x\n", macKey), 0o600); err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	s, err := source.New(source.Config{
		Name: "s", Address: "127.0.0.1:123", Clock: kernel, Auth: source.Auth{KeyID: 7, Type: "SHA256", KeyFile: keys},
		Dial: func(context.Context, string, string) (net.Conn, error) {
			if asked.Add(1) > 1 { // the time is up, and nothing is asked again
				return nil, os.ErrDeadlineExceeded
			}
			return &fakeConn{packet: mac(good().bytes(make([]byte, 48)), 7, []byte("another key"), 0), fix: true}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s.Query(t.Context()); !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "authentication failed for 1 answers") {
		t.Errorf("%+v, %v", m, err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// FuzzAnswer feeds raw packets. Whatever they are: no panic, and what passes Check is within its own limits and has a
// UTC that follows from the packet's timestamps. A source with a key believes none of them.
func FuzzAnswer(f *testing.F) {
	req := make([]byte, 48)
	for _, a := range []answer{good(), {}, {version: 4, mode: 4, stratum: 0, refID: "RATE", poll: 127}, {version: 4, mode: 4, stratum: 1, precision: -128}} {
		for _, fix := range []bool{true, false} {
			f.Add(a.bytes(req), fix, false)
		}
		f.Add(mac(a.bytes(req), 7, macKey, 0), true, true)
	}
	long := good()
	long.extraBytes = 68
	f.Add(long.bytes(req), true, false)
	f.Add([]byte{}, true, false)
	keys := filepath.Join(f.TempDir(), "keys")
	if err := os.WriteFile(keys, fmt.Appendf(nil, "7 SHA256 HEX:%x\n", macKey), 0o600); err != nil {
		f.Fatal(err)
	}
	limits := ntp.Limits{MaxRootDistance: time.Second, MaxReferenceAge: time.Hour}
	f.Fuzz(func(t *testing.T, packet []byte, fix, keyed bool) {
		cfg := source.Config{
			Name: "s", Address: "127.0.0.1:123", Clock: kernel, Timeout: time.Second,
			Dial: func(context.Context, string, string) (net.Conn, error) {
				return &fakeConn{packet: packet, fix: fix}, nil
			},
		}
		if keyed {
			cfg.Auth = source.Auth{KeyID: 7, Type: "SHA256", KeyFile: keys}
		}
		s, err := source.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.Query(context.Background())
		if err != nil {
			return
		}
		if !fix || keyed { // the MAC was not made over this origin
			t.Fatalf("believed a packet with origin %x, MAC %v", packet[24:32], keyed)
		}
		if m.Check(limits) != nil {
			return
		}
		xmit := binary.BigEndian.Uint64(packet[40:])
		want := time.Unix(int64(xmit>>32)-2208988800, 0)
		if xmit>>63 == 0 {
			want = want.Add(1 << 32 * time.Second) // NTP era 1
		}
		if d := m.UTC.Sub(want); d.Abs() > 3*time.Second {
			t.Fatalf("UTC %v from transmit time %v", m.UTC, want)
		}
	})
}
