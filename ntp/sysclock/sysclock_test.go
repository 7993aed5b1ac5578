package sysclock_test

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"yinjian/ntp"
	"yinjian/ntp/sysclock"
)

var _ ntp.BootClock = (*sysclock.Clock)(nil)

// TestAgainstKernel compares with /proc/uptime (BOOTTIME to 10 ms) and the runtime's own clock.
func TestAgainstKernel(t *testing.T) {
	t.Parallel()
	c, err := sysclock.Open()
	if err != nil {
		t.Fatal(err)
	}
	before := c.Boot()
	raw, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Fatal(err)
	}
	after := c.Boot()
	seconds, err := strconv.ParseFloat(strings.Fields(string(raw))[0], 64)
	if err != nil {
		t.Fatal(err)
	}
	up := time.Duration(seconds * float64(time.Second))
	if up < before-20*time.Millisecond || up > after+20*time.Millisecond {
		t.Errorf("Boot = %v..%v, /proc/uptime says %v", before, after, up)
	}
	if mono := c.Monotonic(); mono > c.Boot()+time.Millisecond {
		t.Errorf("Monotonic = %v is ahead of Boot", mono)
	}
	if d := time.Since(c.Realtime()).Abs(); d > time.Second {
		t.Errorf("Realtime is %v away from the runtime's", d)
	}
	if len(c.BootID()) != 36 {
		t.Errorf("BootID = %q, want a UUID", c.BootID())
	}
}

func TestClocksAdvance(t *testing.T) {
	t.Parallel()
	c, err := sysclock.Open()
	if err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func() time.Duration{"Boot": c.Boot, "Monotonic": c.Monotonic, "Raw": c.Raw} {
		last := read()
		for range 10_000 {
			now := read()
			if now < last {
				t.Fatalf("%s went back from %v to %v", name, last, now)
			}
			last = now
		}
	}
}

func BenchmarkBoot(b *testing.B) {
	c, err := sysclock.Open()
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		c.Boot()
	}
}

// BenchmarkNow is a whole reading with the kernel's clocks, as a stamp takes it.
func BenchmarkNow(b *testing.B) {
	kernel, err := sysclock.Open()
	if err != nil {
		b.Fatal(err)
	}
	c, err := ntp.NewClock(ntp.Config{AgreeRounds: 1, MinSources: 1}, kernel)
	if err != nil {
		b.Fatal(err)
	}
	c.Update([]ntp.Measurement{{Source: "self", Boot: kernel.Boot(), UTC: kernel.Realtime(), Bent: kernel.Monotonic() - kernel.Raw(), RootDistance: time.Millisecond, Stratum: 1}})
	b.ReportAllocs()
	for b.Loop() {
		if !c.Now().Trusted() {
			b.Fatal(c.Now().State)
		}
	}
}
