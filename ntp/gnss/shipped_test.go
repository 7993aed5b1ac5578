package gnss_test

import (
	"encoding/binary"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/ntp"
	"yinjian/ntp/gnss"
)

const shippedDir = "../../packaging/time"

func shipped(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(shippedDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// options are GPSD_OPTIONS as packaging installs them.
func options(t *testing.T) []string {
	t.Helper()
	for line := range strings.Lines(shipped(t, "gpsd.default")) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "GPSD_OPTIONS="); ok {
			return strings.Fields(strings.Trim(value, `"`))
		}
	}
	t.Fatal("gpsd.default has no GPSD_OPTIONS")
	return nil
}

// directives are the lines of a chrony.conf that say something.
func directives(text string) (out []string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			out = append(out, line)
		}
	}
	return out
}

// chronyd understands both files as they are shipped: it prints each directive back, and says of none that it is wrong.
func TestShippedIsParsed(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"chrony-nmea.conf", "chrony-pps.conf"} {
		out, err := exec.CommandContext(t.Context(), chronyd(t), "-p", "-f", filepath.Join(shippedDir, name)).Output()
		if err != nil {
			t.Errorf("chronyd -p %s: %v\n%s", name, err, out)
		}
		if want := directives(shipped(t, name)); !slices.Equal(directives(string(out)), want) {
			t.Errorf("%s: chronyd prints\n%s\nwant\n%s", name, out, strings.Join(want, "\n"))
		}
		r, err := gnss.StartRack(t.Context(), gnss.RackConfig{Dir: t.TempDir(), Log: logTo(t.Output()), Clock: kernel.Realtime, ChronyConf: shipped(t, name) + "refclock SHM 0 refd BDS\n"})
		if err == nil {
			t.Error("a rack with a misspelt option started")
			_ = r.Close()
		} else if !strings.Contains(err.Error(), "Invalid refclock option") {
			t.Errorf("a misspelt option: %v", err)
		}
	}
	if got := options(t); !slices.Contains(got, "-n") || slices.Contains(got, "-r") {
		t.Errorf("gpsd's options %v", got)
	}
}

func chronyd(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"chronyd", "/usr/sbin/chronyd"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("chronyd is missing; on Debian: apt-get install chrony")
	return ""
}

// The file for a receiver without PPS, with gpsd's options, reaches stratum 1 on generated sentences, and what it serves is
// as true as it says: it is not calibrated for this receiver, which answers at once, and its root distance covers that.
func TestShippedNMEA(t *testing.T) {
	t.Parallel()
	r := startRack(t, gnss.RackConfig{ChronyConf: shipped(t, "chrony-nmea.conf"), GpsdOptions: options(t)})
	src := newSource(t, r)
	m, err := src.Query(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	off := offBy(m)
	if m.Stratum != 1 || m.RefID != "BDS" || m.Leap != ntp.LeapNone || off.Abs() > m.RootDistance {
		t.Errorf("served %+v, %v off", m, off)
	}
	// The appliance takes it, when its root distance has come down: it is a candidate, and three rounds make it trusted. The bound
	// comes down with it.
	const within = 600 * time.Millisecond
	clock, err := ntp.NewClock(ntp.Config{MinSources: 1}, kernel)
	if err != nil {
		t.Fatal(err)
	}
	for start := kernel.Boot(); clock.Now().State != ntp.Trusted || clock.Now().Bound > within; {
		if m, err = src.Query(t.Context()); err == nil {
			clock.Update([]ntp.Measurement{m})
		}
		if kernel.Boot()-start > 3*time.Minute {
			t.Fatalf("not trusted within %v: %v, %+v, %v", within, err, m, clock.Last())
		}
	}
	t.Logf("root distance %v, bound %v", m.RootDistance, clock.Now().Bound)
	if now := clock.Now(); kernel.Realtime().Sub(now.Time).Abs() > now.Bound {
		t.Errorf("reading %+v", now)
	}
}

// offBy is how far a measurement lies from the machine's own time at its moment. Both clocks are read at once: again, while the
// machine lets another run in between.
func offBy(m ntp.Measurement) time.Duration {
	for {
		before := kernel.Boot()
		now := kernel.Realtime()
		if kernel.Boot()-before < time.Millisecond {
			return m.UTC.Sub(now.Add(m.Boot - before))
		}
	}
}

// pulses sends a pulse for each second of the receiver's time, until the test ends: what the kernel would say of the edge on
// /dev/pps0, as chrony's SOCK reference clock takes it (refclock_sock.c, struct sock_sample).
func pulses(t *testing.T, path string, ahead time.Duration) {
	t.Helper()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() { close(stop); wg.Wait() })
	wg.Go(func() {
		for {
			now := kernel.Realtime()
			truth := now.Add(ahead)
			wait := truth.Truncate(time.Second).Add(time.Second).Sub(truth)
			select {
			case <-stop:
				return
			case <-time.After(wait):
			}
			now = kernel.Realtime()
			b := make([]byte, 40)
			binary.NativeEndian.PutUint64(b, uint64(now.Unix()))
			binary.NativeEndian.PutUint64(b[8:], uint64(now.Nanosecond()/1000))
			// How far into our second the pulse came: it does not say which second it is.
			binary.NativeEndian.PutUint64(b[16:], math.Float64bits(-ahead.Seconds()))
			binary.NativeEndian.PutUint32(b[24:], 1) // a pulse
			binary.NativeEndian.PutUint32(b[36:], 0x534f434b)
			if c, err := net.Dial("unixgram", path); err == nil {
				_, _ = c.Write(b)
				_ = c.Close()
			}
		}
	})
}

// The file for a receiver with PPS: generated sentences say which second it is, pulses when it begins. The pulses come from
// this test through a socket; no GPIO, no DCD line was there. That they are what is served shows in the precision, which
// sentences alone do not have: their configured offset is 100 ms, and they come at once.
func TestShippedPPS(t *testing.T) {
	t.Parallel()
	const ahead = 30 * time.Millisecond
	dir := t.TempDir()
	pulses(t, filepath.Join(dir, gnss.PulseSocket), ahead)
	r, err := gnss.StartRack(t.Context(), gnss.RackConfig{
		Dir: dir, Log: logTo(t.Output()), Clock: kernel.Realtime, Offset: ahead, ChronyConf: shipped(t, "chrony-pps.conf"), GpsdOptions: options(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	m, err := newSource(t, r).Query(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	off := offBy(m) - ahead
	t.Logf("%v off, root distance %v, refid %s", off, m.RootDistance, m.RefID)
	if m.Stratum != 1 || m.RefID != "BDS" || off.Abs() > 20*time.Millisecond || off.Abs() > m.RootDistance {
		t.Errorf("served %+v, %v off", m, off)
	}
}

// systemd understands the units and drop-ins, over Debian's own units.
func TestShippedUnits(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is missing; on Debian: apt-get install systemd")
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(shippedDir)); err != nil {
		t.Fatal(err)
	}
	for _, unit := range []string{"chrony.service", "gpsd.service", "gpsd.socket"} {
		b, err := os.ReadFile(filepath.Join("/lib/systemd/system", unit))
		if err != nil {
			t.Skip(err)
		}
		if err := os.WriteFile(filepath.Join(dir, unit), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	verify := func() string {
		cmd := exec.CommandContext(t.Context(), analyze, "verify", "./chrony.service", "./gpsd.service", "./pps-serial@ttyS0.service")
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return err.Error() + "\n" + string(out)
		}
		return string(out)
	}
	if out := verify(); strings.Contains(out, dir) {
		t.Errorf("systemd-analyze: %s", out)
	}
	name := filepath.Join(dir, "chrony.service.d", "yinjian.conf")
	if err := os.WriteFile(name, []byte("[Service]\nRestrat=always\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := verify(); !strings.Contains(out, "Restrat") {
		t.Errorf("a misspelt directive passed: %s", out)
	}
}
