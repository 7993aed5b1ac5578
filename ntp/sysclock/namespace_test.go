package sysclock_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"yinjian/ntp"
	"yinjian/ntp/sysclock"
)

// TestHelperRestore is a process of its own for the test below: a clock that begins with the snapshot given on stdin.
func TestHelperRestore(t *testing.T) {
	if os.Getenv("YINJIAN_TEST_RESTORE") == "" {
		return
	}
	var s ntp.Snapshot
	if err := json.NewDecoder(os.Stdin).Decode(&s); err != nil {
		t.Fatal(err)
	}
	kernel, err := sysclock.Open()
	if err != nil {
		t.Fatal(err)
	}
	c, err := ntp.NewClock(ntp.Config{MinSources: 1}, kernel)
	if err != nil {
		t.Fatal(err)
	}
	told := ""
	c.OnChange(func(_, to ntp.State, reason string, _ ntp.Reading) { told += string(to) + ": " + reason + "; " })
	err = c.Restore(s, kernel.BootID())
	fmt.Printf("STATE %s VOUCHED %v ERROR %v TOLD %s\n", c.Now().State, c.Snapshot("").Emitted.Equal(s.Emitted), err, told)
}

// TestTimeNamespace restarts a clock in the same boot with the kernel's CLOCK_BOOTTIME and CLOCK_MONOTONIC moved, as they
// are after a checkpoint of the process or a snapshot of the machine was restored, and as after sleep.
func TestTimeNamespace(t *testing.T) {
	t.Parallel()
	kernel, err := sysclock.Open()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("unshare", "--time", "--fork", "true").CombinedOutput(); err != nil || kernel.Boot() < 10*time.Minute {
		t.Skipf("needs CAP_SYS_ADMIN, Linux 5.6, and a machine that has been up for ten minutes: %v %s", err, out)
	}
	c, err := ntp.NewClock(ntp.Config{MinSources: 1, AgreeRounds: 1}, kernel)
	if err != nil {
		t.Fatal(err)
	}
	c.Update([]ntp.Measurement{{Source: "self", Boot: kernel.Boot(), UTC: kernel.Realtime(), Bent: kernel.Monotonic() - kernel.Raw(), RootDistance: time.Millisecond, Stratum: 1}})
	if r := c.Now(); r.State != ntp.Trusted {
		t.Fatal(c.Last().Err)
	}
	fresh := c.Snapshot(kernel.BootID())
	older := fresh // as if nothing had happened since, for two minutes
	for _, d := range []*time.Duration{&older.Taken, &older.Boot, &older.Agreed} {
		*d -= 2 * time.Minute
	}
	older.UTC = older.UTC.Add(-2 * time.Minute)
	older.Emitted = older.Emitted.Add(-2 * time.Minute)
	for name, c := range map[string]struct {
		boot, mono string // seconds by which the clocks are moved
		snapshot   ntp.Snapshot
		want       []string
	}{
		"a restart":                    {"0", "0", fresh, []string{"STATE holdover", "ERROR <nil>"}},
		"a restart later":              {"0", "0", older, []string{"STATE holdover", "ERROR <nil>"}},
		"restored to before":           {"-60", "-60", fresh, []string{"STATE cold VOUCHED true", "snapshot refused: taken at"}},
		"restored to after, wall told": {"-60", "-60", older, []string{"STATE suspect VOUCHED true", "CLOCK_REALTIME was stepped by 1m0"}},
		"resumed elsewhere":            {"3600", "3600", fresh, []string{"STATE suspect", "CLOCK_REALTIME was stepped by -1h0m0"}},
		"slept":                        {"90", "0", fresh, []string{"STATE suspect", "the machine slept for 1m30"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in, err := json.Marshal(c.snapshot)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("unshare", "--time", "--boottime", c.boot, "--monotonic", c.mono, "--fork", os.Args[0], "-test.run=^TestHelperRestore$", "-test.v")
			cmd.Env = append(os.Environ(), "YINJIAN_TEST_RESTORE=1")
			cmd.Stdin = bytes.NewReader(in)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, w := range c.want {
				if !strings.Contains(string(out), w) {
					t.Errorf("want %q in: %s", w, out)
				}
			}
		})
	}
}
