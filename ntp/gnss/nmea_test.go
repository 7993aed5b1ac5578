package gnss_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"yinjian/ntp/gnss"
)

func TestSentences(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 21, 23, 59, 59, 999_000_000, time.FixedZone("CST", 8*3600))
	want := "$BDRMC,155959.00,A,3954.2400,N,11624.6600,E,0.00,0.00,211126,,,A*"
	got := gnss.Sentences(at, gnss.Fixed)
	if !strings.HasPrefix(got, want) {
		t.Errorf("sentences %q, want %q", got, want)
	}
	for line := range strings.Lines(got) {
		body, sum, _ := strings.Cut(strings.TrimSuffix(line[1:], "\r\n"), "*")
		var x byte
		for _, c := range []byte(body) {
			x ^= c
		}
		if fmt.Sprintf("%02X", x) != sum || len(line) > 82 || !strings.HasSuffix(line, "\r\n") {
			t.Errorf("sentence %q: checksum %02X, length %d", line, x, len(line))
		}
	}
	if s := gnss.Sentences(at, gnss.Silent); s != "" {
		t.Errorf("silent receiver says %q", s)
	}
}

// A report is what gpsdecode says, as far as we look.
type report struct {
	Class      string
	Mode       int
	Time       time.Time
	Lat        float64
	Satellites []struct{ Gnssid, Svid int }
}

// gpsdecode is gpsd's own decoder as a filter.
func gpsdecode(t *testing.T, text string) []report {
	t.Helper()
	path, err := exec.LookPath("gpsdecode")
	if err != nil {
		t.Skip("gpsdecode is missing; on Debian: apt-get install gpsd-clients")
	}
	cmd := exec.CommandContext(t.Context(), path, "-j")
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("gpsdecode: %v", err)
	}
	var all []report
	for line := range strings.Lines(string(out)) {
		var r report
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("gpsdecode says %q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

// TestGpsdUnderstands: gpsd decodes the time, the place and BeiDou satellites (gnssid 3), and for a receiver without fix
// neither.
func TestGpsdUnderstands(t *testing.T) {
	t.Parallel()
	for _, start := range []time.Time{
		time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC),
		time.Date(2026, 12, 31, 23, 59, 57, 0, time.UTC),
		time.Date(2028, 2, 28, 23, 59, 57, 0, time.UTC),
	} {
		var text strings.Builder
		for i := range 6 {
			text.WriteString(gnss.Sentences(start.Add(time.Duration(i)*time.Second), gnss.Fixed))
		}
		seen := make(map[time.Time]bool)
		var beidou int
		for _, r := range gpsdecode(t, text.String()) {
			switch {
			case r.Class == "TPV" && r.Mode == 3 && r.Lat > 39.9 && r.Lat < 39.91:
				seen[r.Time.UTC()] = true
			case r.Class == "SKY":
				beidou = 0
				for _, s := range r.Satellites {
					if s.Gnssid == 3 {
						beidou++
					}
				}
			}
		}
		for i := range 5 { // the first second has no date yet when its position is reported
			if at := start.Add(time.Duration(i+1) * time.Second); !seen[at] {
				t.Errorf("gpsd did not see %v, but %v", at, seen)
			}
		}
		if beidou != 8 {
			t.Errorf("gpsd sees %d BeiDou satellites, want 8", beidou)
		}
	}
	var text strings.Builder
	for i := range 3 {
		text.WriteString(gnss.Sentences(time.Date(2026, 11, 21, 12, 0, i, 0, time.UTC), gnss.NoFix))
	}
	for _, r := range gpsdecode(t, text.String()) {
		if r.Mode > 1 {
			t.Errorf("without fix gpsd reports %+v", r)
		}
	}
}

// TestFeed: sentences come when their second begins, follow steps, stop and go on.
func TestFeed(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := gnss.NewFeed(kernel.Realtime, 0)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- gnss.Serve(ctx, l, f) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	lines := bufio.NewScanner(c)
	next := func() time.Duration { // the receiver's time less ours, when the sentence comes
		t.Helper()
		for lines.Scan() {
			if body, ok := strings.CutPrefix(lines.Text(), "$BDRMC,"); ok {
				fields := strings.Split(body, ",")
				at, err := time.Parse("020106 150405.00", fields[8]+" "+fields[0])
				if err != nil {
					t.Fatal(err)
				}
				return at.Sub(kernel.Realtime())
			}
		}
		t.Fatal("feed ended:", lines.Err())
		return 0
	}
	// A sentence is read late where the machine has no time for it; one of many is read at once.
	const tolerance = 150 * time.Millisecond
	for _, offset := range []time.Duration{0, 5 * time.Second, -90 * time.Minute, 300 * time.Millisecond} {
		f.SetOffset(offset)
		d := next() - offset
		for range 30 {
			if d.Abs() <= tolerance {
				break
			}
			d = next() - offset
		}
		if d.Abs() > tolerance {
			t.Errorf("offset %v: %v off", offset, d)
		}
	}
	f.SetFix(gnss.Silent)
	f.SetOffset(0)
	said := 0
	for ; said < 30; said++ { // what was said before may not have been read yet
		_ = c.SetReadDeadline(kernel.Realtime().Add(1200 * time.Millisecond))
		if !lines.Scan() || !strings.Contains(lines.Text(), "RMC") {
			break
		}
	}
	if said == 30 {
		t.Errorf("silent receiver says %q", lines.Text())
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func FuzzSentences(f *testing.F) {
	f.Add(int64(1795262400), 0)
	f.Add(int64(0), 1)
	f.Add(int64(4102444799), 7)
	f.Fuzz(func(t *testing.T, unix int64, fix int) {
		text := gnss.Sentences(time.Unix(unix%4102444800, 0), gnss.Fix(fix))
		for line := range strings.Lines(text) {
			if line[0] != '$' || len(line) > 82 || !strings.HasSuffix(line, "\r\n") || line[len(line)-5] != '*' {
				t.Errorf("sentence %q", line)
			}
		}
	})
}
