package ntp_test

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"yinjian/ntp"
)

// A clock without sources is trusted for as long as Left says, and no second longer, whichever of the two limits comes
// first.
func TestLeft(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]ntp.Config{
		"bound": {MaxBound: 100 * time.Millisecond, MaxRootDistance: 100 * time.Millisecond, HoldoverMax: 24 * time.Hour},
		"age":   {HoldoverMax: time.Hour},
	} {
		b := newBench(t, cfg)
		if left := b.Left(); left != 0 {
			t.Errorf("%s: a cold clock has %v left", name, left)
		}
		b.trusted(20 * time.Millisecond)
		left := b.Left()
		if name == "age" && left != time.Hour {
			t.Errorf("left %v, want 1h", left)
		}
		b.pass(left / 2)
		if half := b.Left(); (half - left/2).Abs() > time.Millisecond {
			t.Errorf("%s: %v left after half of %v", name, half, left)
		}
		b.pass(left - left/2 - time.Second)
		b.want(ntp.Holdover)
		b.pass(time.Second + time.Millisecond)
		b.want(ntp.Untrusted)
		if left := b.Left(); left != 0 {
			t.Errorf("%s: an untrusted clock has %v left", name, left)
		}
	}
}

func TestHoldoverSpan(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		bound, most time.Duration
		ppm         int
		want        time.Duration
	}{
		{60 * time.Millisecond, time.Second, 50, 5*time.Hour + 13*time.Minute + 20*time.Second},
		{0, time.Second, 15, 66_666_666_666_666},
		{time.Second, time.Second, 50, 0},
		{2 * time.Second, time.Second, 50, 0},
	} {
		if got := ntp.HoldoverSpan(c.bound, c.most, c.ppm); got != c.want {
			t.Errorf("HoldoverSpan(%v, %v, %d) = %v, want %v", c.bound, c.most, c.ppm, got, c.want)
		}
	}
}

// The table in docs/time.md is what the code computes.
func TestHoldoverTable(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/time.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\| (\d+) ms \| (\d+) \| (\d+) (m?s) \| ([\d.]+) h \|$`).FindAllStringSubmatch(string(page), -1)
	if len(rows) < 10 {
		t.Fatalf("%d rows in docs/time.md", len(rows))
	}
	for _, row := range rows {
		bound, err1 := time.ParseDuration(row[1] + "ms")
		ppm, err2 := strconv.Atoi(row[2])
		accuracy, err3 := time.ParseDuration(row[3] + row[4])
		if err := errors.Join(err1, err2, err3); err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%.1f", ntp.HoldoverSpan(bound, accuracy, ppm).Hours()); row[5] != want {
			t.Errorf("%s: want %s h", row[0], want)
		}
	}
}

// A drill withholds the sources: holdover and doubt come by its own limits, which are never wider than the policy's, and the
// clock comes back as after any silence. The bound grows as it always does.
func TestWithhold(t *testing.T) {
	t.Parallel()
	for _, early := range []bool{false, true} {
		b := newBench(t, ntp.Config{}).trusted(20 * time.Millisecond)
		b.Withhold(10*time.Second, 30*time.Second, time.Minute)
		if left := b.Left(); left != 30*time.Second {
			t.Errorf("left %v, want 30s", left)
		}
		if r := b.round(0, 20*time.Millisecond); !errors.Is(r.Err, ntp.ErrWithheld) {
			t.Errorf("a round was taken: %+v", r)
		}
		before := b.want(ntp.Trusted)
		b.pass(10*time.Second + 1)
		_ = b.round(0, 20*time.Millisecond)
		held := b.want(ntp.Holdover)
		if grown := held.Bound - before.Bound; grown < 500*time.Microsecond-1 || grown > 600*time.Microsecond {
			t.Errorf("the bound grew by %v in 10 s", grown)
		}
		b.pass(20 * time.Second)
		b.want(ntp.Untrusted)
		if r := b.round(0, 20*time.Millisecond); !errors.Is(r.Err, ntp.ErrWithheld) || r.Agreed != nil {
			t.Errorf("a round was taken: %+v", r)
		}
		b.want(ntp.Untrusted)
		if early {
			b.Release()
		} else {
			b.pass(30 * time.Second)
		}
		b.trusted(20 * time.Millisecond)
	}
	// The policy's own limits come first, and a drill that is over limits nothing.
	b := newBench(t, ntp.Config{HoldoverMax: time.Minute}).trusted(20 * time.Millisecond)
	b.Withhold(time.Hour, time.Hour, time.Hour)
	b.pass(time.Minute + time.Second)
	b.want(ntp.Untrusted)
	b = newBench(t, ntp.Config{}).trusted(20 * time.Millisecond)
	b.Withhold(time.Second, 2*time.Second, 3*time.Second)
	b.pass(4 * time.Second)
	b.want(ntp.Trusted)
}
