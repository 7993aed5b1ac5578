package source_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/ntp"
	"yinjian/ntp/source"
)

// An outcome is what becomes of a server's answer when two honest servers answer beside it.
type outcome string

const (
	refused  outcome = "refused"  // Query fails: it is no measurement
	unfit    outcome = "unfit"    // measured, and sorted out before the selection
	outvoted outcome = "outvoted" // a candidate, against whom the others agree
	fit      outcome = "fit"      // takes part
)

// A fault is a kind of server, what is expected of it, and a word of the reason.
type fault struct {
	kind   string
	server func(t *testing.T) string // starts it and returns its address
	want   outcome
	reason string        // in the error of a refused or unfit one
	off    time.Duration // of what it says from the truth
	rtt    time.Duration // that it takes at least
	key    uint32        // 0: asked without a MAC
}

var macKey = []byte("0123456789abcdef0123456789abcdef")

// mac is RFC 5905 §7.3 with SHA-256, cut to 20 bytes as chrony and beevik do in version 4; cut may take more.
func mac(packet []byte, id uint32, key []byte, cut int) []byte {
	sum := sha256.Sum256(append(bytes.Clone(key), packet...))
	return append(binary.BigEndian.AppendUint32(bytes.Clone(packet), id), sum[:20-cut]...)
}

// faults are the 24 kinds of server that beevik v1.6.0 was tried with, of which it let eight pass, and more. Those that are
// refused for a timeout gave nothing that belongs to the question: it was read over, and no more came.
func faults() []fault {
	with := func(f func(*answer)) func(*testing.T) string {
		a := good()
		f(&a)
		return func(t *testing.T) string { return serve(t, always(a)) }
	}
	reply := func(f func(n int, req []byte) [][]byte) func(*testing.T) string {
		return func(t *testing.T) string { return serve(t, f) }
	}
	kiss := func(code string) func(*testing.T) string {
		return with(func(a *answer) { a.stratum, a.refID = 0, code })
	}
	signed := func(id uint32, key []byte, cut int) func(*testing.T) string {
		return reply(func(_ int, req []byte) [][]byte { return [][]byte{mac(good().bytes(req), id, key, cut)} })
	}
	spoofed := good()
	spoofed.wrongOrigin, spoofed.offset = true, time.Hour
	unasked := func(address func(port string) string) func(*testing.T) string { // the right answer, from elsewhere
		return func(t *testing.T) string {
			in := listen(t, "127.0.0.1:0")
			_, port, _ := net.SplitHostPort(in.LocalAddr().String())
			go serveOn(in, listen(t, address(port)), always(good()))
			return in.LocalAddr().String()
		}
	}
	const hour = time.Hour
	return []fault{
		{kind: "honest", server: with(func(*answer) {}), want: fit},
		{kind: "stratum 16", server: with(func(a *answer) { a.stratum = 16 }), want: unfit, reason: "stratum 16"},
		{kind: "stratum 255", server: with(func(a *answer) { a.stratum = 255 }), want: unfit, reason: "stratum 255"},
		{kind: "LI=3, unsynchronized", server: with(func(a *answer) { a.leap = 3 }), want: unfit, reason: "not synchronized"},
		{kind: "kiss of death RATE", server: kiss("RATE"), want: refused, reason: "RATE, next query in 1m4s"},
		{kind: "kiss of death DENY", server: kiss("DENY"), want: refused, reason: "the server refuses us (DENY)"},
		{kind: "kiss of death RSTR", server: kiss("RSTR"), want: refused, reason: "the server refuses us (RSTR)"},
		{kind: "kiss of death INIT", server: kiss("INIT"), want: refused, reason: `kiss of death "INIT"`},
		{kind: "reference 2 h old", server: with(func(a *answer) { a.refAge = 2 * hour }), want: unfit, reason: "reference time is 2h"},
		{kind: "reference 48 h old", server: with(func(a *answer) { a.refAge = 48 * hour }), want: unfit, reason: "reference time is 48h"},
		{kind: "reference ahead", server: with(func(a *answer) { a.refAge = -time.Minute }), want: unfit, reason: "ahead"},
		{kind: "reference 0", server: with(func(a *answer) { a.refZero = true }), want: unfit, reason: "ahead"}, // 0 reads as 2036
		{kind: "dispersion 10 s", server: with(func(a *answer) { a.rootDisp = 10 * time.Second }), want: unfit, reason: "root distance 10"},
		{kind: "dispersion 17 s", server: with(func(a *answer) { a.rootDisp = 17 * time.Second }), want: unfit, reason: "root distance 17"},
		{kind: "root delay 20 s", server: with(func(a *answer) { a.rootDelay = 20 * time.Second }), want: unfit, reason: "root distance 10"},
		{kind: "precision 4 s", server: with(func(a *answer) { a.precision = 2 }), want: unfit, reason: "root distance 4"},
		{kind: "precision absurd", server: with(func(a *answer) { a.precision = 127 }), want: refused, reason: "timeout"},
		{kind: "precision −128", server: with(func(a *answer) { a.precision = -128 }), want: refused, reason: "timeout"},
		{kind: "poll −128", server: with(func(a *answer) { a.poll = -128 }), want: refused, reason: "timeout"},
		{kind: "wrong origin", server: reply(always(spoofed)), want: refused, reason: "timeout"},
		{kind: "mode 3", server: with(func(a *answer) { a.mode = 3 }), want: refused, reason: "timeout"},
		{kind: "mode 5", server: with(func(a *answer) { a.mode = 5 }), want: refused, reason: "timeout"},
		{kind: "transmit time 0", server: with(func(a *answer) { a.noXmit = true }), want: refused, reason: "invalid transmit time"},
		{kind: "received after transmitting", server: with(func(a *answer) { a.recvLater = true }), want: refused, reason: "backwards"},
		{kind: "thought for longer than we waited", server: with(func(a *answer) { a.inside = 10 * time.Second }), want: refused, reason: "inside the server"},
		{kind: "short packet", server: with(func(a *answer) { a.truncate = 1 }), want: refused, reason: "timeout"},
		{kind: "empty packet", server: with(func(a *answer) { a.truncate = 48 }), want: refused, reason: "timeout"},
		{kind: "oversized packet", server: with(func(a *answer) { a.extraBytes = 1100 }), want: refused, reason: "timeout"},
		{kind: "silence", server: reply(func(int, []byte) [][]byte { return nil }), want: refused, reason: "timeout"},
		{kind: "5 s ahead", server: with(func(a *answer) { a.offset = 5 * time.Second }), want: outvoted, off: 5 * time.Second},
		{kind: "a day behind", server: with(func(a *answer) { a.offset = -24 * hour }), want: outvoted, off: -24 * hour},
		{kind: "year 1990", server: with(func(a *answer) { a.offset = -40 * 365 * 24 * hour }), want: unfit, reason: "year 1990"},
		{kind: "leap second pending", server: with(func(a *answer) { a.leap = 1 }), want: fit}, // one of three: no majority for it
		{kind: "version 3", server: with(func(a *answer) { a.version = 3 }), want: refused, reason: "version 3"},
		{kind: "400 ms on the way there", server: reply(func(_ int, req []byte) [][]byte {
			time.Sleep(400 * time.Millisecond) // the delay itself is the subject: it shows as 200 ms of error, inside the root distance
			return [][]byte{good().bytes(req)}
		}), want: fit, rtt: 400 * time.Millisecond},
		{kind: "spoofed before the right one", server: reply(func(_ int, req []byte) [][]byte {
			return [][]byte{spoofed.bytes(req), {1, 2, 3}, {}, good().bytes(req)}
		}), want: fit},
		{kind: "garbage, then right when asked again", server: reply(func(n int, req []byte) [][]byte {
			a := good()
			a.noXmit = n == 0
			return [][]byte{a.bytes(req)}
		}), want: fit},
		{kind: "extension garbage", server: with(func(a *answer) { a.extraBytes = 28 }), want: fit},
		{kind: "from another port", server: unasked(func(string) string { return "127.0.0.1:0" }), want: refused, reason: "timeout"},
		{kind: "from another address", server: unasked(func(port string) string { return "127.0.0.2:" + port }), want: refused, reason: "timeout"},
		{kind: "right MAC", server: signed(7, macKey, 0), want: fit, key: 7},
		{kind: "no MAC", server: with(func(*answer) {}), want: refused, reason: "timeout", key: 7},
		{kind: "wrong MAC", server: signed(7, []byte("another key of 32 bytes, all told"), 0), want: refused, reason: "timeout", key: 7},
		{kind: "unknown key", server: signed(8, macKey, 0), want: refused, reason: "timeout", key: 7},
		{kind: "crypto-NAK", server: with(func(a *answer) { a.extraBytes = 4 }), want: refused, reason: "timeout", key: 7},
		{kind: "truncated MAC", server: signed(7, macKey, 4), want: refused, reason: "timeout", key: 7},
		{kind: "MAC cut within a word", server: signed(7, macKey, 3), want: refused, reason: "timeout", key: 7},
		{kind: "altered on the way before the right one", server: reply(func(_ int, req []byte) [][]byte {
			p := mac(good().bytes(req), 7, macKey, 0)
			altered := bytes.Clone(p)
			altered[43] ^= 1 // the transmit time, by a second
			return [][]byte{altered, p}
		}), want: fit, key: 7},
	}
}

// TestFaults holds each kind of server against two honest ones. Whatever it does, the two are heard, the reading contains
// the true time, and what is thought of the third is in the poller's status with its reason.
func TestFaults(t *testing.T) {
	t.Parallel()
	all := faults()
	kinds := make(map[string]bool)
	for _, f := range all {
		kinds[f.kind] = true
	}
	if n := len(kinds) - 2; n < 24 || n != len(all)-2 { // "honest" and "right MAC" are the controls
		t.Errorf("%d kinds of faults in %d rows, want 24 or more, each once", n, len(all)-2)
	}
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keys, fmt.Appendf(nil, "7 SHA256 HEX:%x\n", macKey), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		t.Run(f.kind, func(t *testing.T) {
			t.Parallel()
			var sources []*source.Source
			add := func(c source.Config) {
				c.Clock = kernel
				s, err := source.New(c)
				if err != nil {
					t.Fatal(err)
				}
				sources = append(sources, s)
			}
			c := source.Config{Name: "odd", Address: f.server(t), Timeout: 30 * time.Second}
			if f.key != 0 {
				c.Auth = source.Auth{KeyID: f.key, Type: "SHA256", KeyFile: keys}
			}
			if f.reason == "timeout" {
				c.Timeout = 300 * time.Millisecond
			}
			add(c)
			for _, name := range []string{"a", "b"} {
				add(source.Config{Name: name, Address: serve(t, always(good())), Timeout: 30 * time.Second})
			}
			clock, err := ntp.NewClock(ntp.Config{MinSources: 2, AgreeRounds: 1}, kernel)
			if err != nil {
				t.Fatal(err)
			}
			p := &source.Poller{Sources: sources, Clock: clock, Log: quiet()}
			round := p.Round(t.Context())
			if round.Err != nil {
				t.Errorf("round %+v", round)
			}
			truthful(t, clock)

			st := p.Status()[0]
			got := fit
			switch {
			case errors.Is(st.Err, ntp.ErrUnfit):
				got = unfit
			case st.Err != nil:
				got = refused
			case slices.Contains(round.Rejected, "odd"):
				got = outvoted
			case !slices.Contains(round.Agreed, "odd"):
				got = "lost"
			}
			if got != f.want || f.reason != "" && (st.Err == nil || !strings.Contains(st.Err.Error(), f.reason)) {
				t.Errorf("%s (%v), want %s (%s)", got, st.Err, f.want, f.reason)
			}
			t.Logf("%s: %v", got, st.Err)
			if m := st.Measurement; got == fit || got == outvoted {
				// The true time, or the lie, lies inside; and the distance says all that it consists of.
				if d := m.UTC.Sub(utcAtBoot.Add(m.Boot)) - f.off; d.Abs() > m.RootDistance || m.RootDistance < m.RTT/2+61*time.Millisecond || m.RTT < f.rtt {
					t.Errorf("%v off, round trip %v, root distance %v", d, m.RTT, m.RootDistance)
				}
			}
		})
	}
}
