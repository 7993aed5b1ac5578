package gnss_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/ntp"
	"yinjian/ntp/gnss"
	"yinjian/ntp/source"
	"yinjian/ntp/sysclock"
	"yinjian/packaging/porttest"
)

var kernel = func() *sysclock.Clock {
	c, err := sysclock.Open()
	if err != nil {
		panic(err)
	}
	return c
}()

func logTo(w io.Writer) logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(w)
	l.SetLevel(logrus.DebugLevel)
	return l
}

// startRack skips the test, with the name of the package, where gpsd or chronyd is missing.
func startRack(t *testing.T, cfg gnss.RackConfig) *gnss.Rack {
	t.Helper()
	cfg.Dir, cfg.Log, cfg.Clock = t.TempDir(), logTo(t.Output()), kernel.Realtime
	r, err := gnss.StartRack(t.Context(), cfg)
	if errors.Is(err, gnss.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func newSource(t *testing.T, r *gnss.Rack) *source.Source {
	t.Helper()
	s, err := source.New(source.Config{Name: "rack", Group: "beidou", Address: r.Address, Clock: kernel, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// lanServer is a chronyd that serves the machine's time at stratum 3, as a server on the hospital's network would.
func lanServer(t *testing.T, name string) *source.Source {
	t.Helper()
	path, err := exec.LookPath("chronyd")
	if err != nil {
		path = "/usr/sbin/chronyd"
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	address, err := net.ResolveUDPAddr("udp4", porttest.Free(t))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	conf := fmt.Sprintf("local stratum 3\nport %d\nbindaddress 127.0.0.1\nallow 127.0.0.0/8\ncmdport 0\nbindcmdaddress /\npidfile chronyd.pid\nuser %s\n", address.Port, me.Username)
	if err := os.WriteFile(filepath.Join(dir, "chrony.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-U", "-x", "-d", "-f", "chrony.conf")
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	s, err := source.New(source.Config{Name: name, Address: address.String(), Clock: kernel, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRack is the story of a receiver: trusted, antenna lost, and then a spoofer five seconds ahead. Three clocks with
// different policies watch its answers alone. A fourth has two servers of the hospital's network beside it, and goes on.
func TestRack(t *testing.T) {
	t.Parallel()
	r := startRack(t, gnss.RackConfig{})
	src := newSource(t, r)

	policy := ntp.Config{MinSources: 1, PolicyNote: "simulated", FreshFor: 1500 * time.Millisecond, MaxReferenceAge: 4 * time.Second}
	patient, strict, tight := policy, policy, policy
	strict.HoldoverMax = 4 * time.Second
	tight.MaxBound, tight.MaxRootDistance, tight.DriftPPM = 70*time.Millisecond, 200*time.Millisecond, 500
	clocks := make(map[string]*ntp.Clock)
	for name, cfg := range map[string]ntp.Config{"patient": patient, "strict": strict, "tight": tight} {
		c, err := ntp.NewClock(cfg, kernel)
		if err != nil {
			t.Fatal(err)
		}
		c.OnChange(func(from, to ntp.State, reason string, r ntp.Reading) {
			t.Logf("%s: %s to %s: %s; %v", name, from, to, reason, r.Bound)
		})
		clocks[name] = c
	}
	housed, err := ntp.NewClock(ntp.Config{MinSources: 2, PolicyNote: "simulated"}, kernel)
	if err != nil {
		t.Fatal(err)
	}
	all := maps.Clone(clocks)
	all["housed"] = housed
	lan := &source.Poller{Sources: []*source.Source{src, lanServer(t, "lan1"), lanServer(t, "lan2")}, Clock: housed, Log: logTo(t.Output())}
	// until polls like a poller until done, and fails if a clock shows a time that is wrong by more than it admits.
	until := func(what string, limit time.Duration, done func() bool) {
		t.Helper()
		start := kernel.Boot()
		for !done() {
			if kernel.Boot()-start > limit {
				t.Fatalf("%s: not within %v", what, limit)
			}
			var ms []ntp.Measurement
			if m, err := src.Query(t.Context()); err == nil {
				ms = append(ms, m)
			}
			lan.Round(t.Context())
			for _, c := range clocks {
				c.Update(ms)
			}
			for name, c := range all {
				before := kernel.Realtime() // the clock was read between the two, which on a busy machine lie apart
				now := c.Now()
				after := kernel.Realtime()
				allowed := now.Bound + 20*time.Millisecond
				if now.Trusted() && (now.Time.Before(before.Add(-allowed)) || now.Time.After(after.Add(allowed))) {
					t.Fatalf("%s: %s clock says %v between %v and %v in state %s, bound %v", what, name, now.Time, before, after, now.State, now.Bound)
				}
			}
			time.Sleep(100 * time.Millisecond) // the poll interval
		}
	}
	state := func(name string) ntp.State { return clocks[name].Now().State }

	m, err := src.Query(t.Context())
	if err != nil || m.Stratum != 1 || m.RefID != "BDS" || m.Leap != ntp.LeapNone {
		t.Fatalf("rack answers %+v, %v", m, err)
	}
	until("start", 2*time.Minute, func() bool { // a busy machine answers late, which the tight clock does not forgive
		return state("patient") == ntp.Trusted && state("strict") == ntp.Trusted && state("tight") == ntp.Trusted &&
			len(housed.Last().Agreed) == 3 && housed.Now().State == ntp.Trusted
	})
	now := clocks["patient"].Now()
	if now.Provenance != "BDS(beidou), 1 of 1 groups; simulated" || now.Bound > time.Second {
		t.Errorf("reading %+v", now)
	}

	// The receiver falls silent. chronyd goes on as stratum 1, leap 0; only the age of its reference shows it.
	r.Feed.SetFix(gnss.Silent)
	until("outage", 2*time.Minute, func() bool { return state("patient") == ntp.Holdover && state("strict") == ntp.Untrusted })
	if m, err := src.Query(t.Context()); err != nil || m.Stratum != 1 || m.Leap != ntp.LeapNone {
		t.Errorf("in the outage the rack answers %+v, %v", m, err)
	}

	// The spoofer. The clocks that still believe their own count see a jump; the one that had given up does not let it in
	// either, because it is beyond what a machine corrects by itself.
	r.Feed.SetOffset(5 * time.Second)
	r.Feed.SetFix(gnss.Fixed)
	until("spoof", 2*time.Minute, func() bool { return state("patient") == ntp.Suspect && state("strict") == ntp.Suspect })
	// However long it lasts, no clock takes it.
	until("refusal", 2*time.Minute, func() bool {
		for _, c := range clocks {
			if c.Now().State != ntp.Suspect || !errors.Is(c.Last().Err, ntp.ErrOperator) {
				return false
			}
		}
		return true
	})
	// Where others answer too, the receiver is outvoted, and named.
	until("outvoted", 2*time.Minute, func() bool { return slices.Equal(housed.Last().Rejected, []string{"beidou"}) })
	if now := housed.Now(); now.State != ntp.Trusted || now.Provenance != "lan1+lan2, 2 of 3 groups; simulated" {
		t.Errorf("beside other servers: %+v, last round %+v", now, housed.Last())
	}
}

// TestRacksSideBySide: two at a time, one with a wrong receiver. Without CAP_SYS_ADMIN the second has to wait.
func TestRacksSideBySide(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs CAP_SYS_ADMIN for IPC namespaces")
	}
	right := startRack(t, gnss.RackConfig{})
	wrong := startRack(t, gnss.RackConfig{Offset: time.Hour})
	for _, c := range []struct {
		rack *gnss.Rack
		want time.Duration
	}{{right, 0}, {wrong, time.Hour}} {
		m, err := newSource(t, c.rack).Query(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if d := m.UTC.Sub(kernel.Realtime()) - c.want; d.Abs() > 10*time.Second { // the other's is an hour away
			t.Errorf("rack with offset %v is %v away from it", c.want, d)
		}
	}
}

// TestHelperRack is a process of its own for the tests below: it runs a rack and says where, until it is killed.
func TestHelperRack(t *testing.T) {
	dir := os.Getenv("YINJIAN_TEST_RACK")
	if dir == "" {
		return
	}
	r, err := gnss.StartRack(context.Background(), gnss.RackConfig{Dir: dir, Log: logTo(os.Stderr), Clock: kernel.Realtime})
	if err != nil {
		fmt.Println("ERROR", err)
		return
	}
	fmt.Println("RACK", r.Address)
	<-r.Done()
}

// helper starts the helper as uid and returns its process and the rack's address.
func helper(t *testing.T, uid uint32) (*exec.Cmd, string) {
	t.Helper()
	// The test's binary and folders are closed to others.
	dir, err := os.MkdirTemp("", "yinjian-rack")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	binary, work := filepath.Join(dir, "helper"), filepath.Join(dir, "work")
	// Copied by another process: a program that this one has open for writing while a test beside forks is "text file busy".
	copied := exec.Command("install", "-m", "755", os.Args[0], binary).Run()
	for _, err := range []error{os.Chmod(dir, 0o755), copied, os.Mkdir(work, 0o750), os.Chown(work, int(uid), int(uid))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(binary, "-test.run=^TestHelperRack$", "-test.v")
	cmd.Dir = dir
	cmd.Env = []string{"PATH=/usr/bin:/bin", "YINJIAN_TEST_RACK=" + work}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	var said strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		said.Write(buf[:n])
		if _, rest, ok := strings.Cut(said.String(), "RACK "); ok && strings.Contains(rest, "\n") {
			return cmd, strings.Fields(rest)[0]
		}
		if strings.Contains(said.String(), gnss.ErrMissing.Error()) {
			t.Skip(said.String())
		}
		if err != nil {
			t.Fatalf("helper: %v: %s", err, said.String())
		}
	}
}

// children are the processes that any thread of pid has started.
func children(t *testing.T, pid int) []int {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var all []int
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for _, p := range strings.Fields(string(text)) {
			n, err := strconv.Atoi(p)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, n)
		}
	}
	return all
}

// gone waits for the processes to end.
func gone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		for start := kernel.Boot(); syscall.Kill(pid, 0) == nil; time.Sleep(20 * time.Millisecond) {
			if kernel.Boot()-start > 2*time.Minute {
				t.Fatalf("process %d lives on", pid)
			}
		}
	}
}

// TestDaemonsDieWithParent: after kill -9 of the program no daemon is left.
func TestDaemonsDieWithParent(t *testing.T) {
	t.Parallel()
	cmd, _ := helper(t, uint32(os.Geteuid()))
	pids := children(t, cmd.Process.Pid)
	if len(pids) != 2 {
		t.Fatalf("children %v, want gpsd and chronyd", pids)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	gone(t, pids)
}

// TestRackAsUser runs one without any privilege.
func TestRackAsUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become somebody else; as an ordinary user TestRack shows the same")
	}
	const nobody = 65534
	_, address := helper(t, nobody)
	src, err := source.New(source.Config{Name: "rack", Address: address, Clock: kernel})
	if err != nil {
		t.Fatal(err)
	}
	m, err := src.Query(t.Context())
	if err != nil || m.Stratum != 1 || offBy(m).Abs() > 5*time.Second {
		t.Errorf("rack of an ordinary user answers %+v, %v", m, err)
	}
}

// TestRackEnds: a daemon that ends takes the rack with it, and Close says so.
func TestRackEnds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r, err := gnss.StartRack(t.Context(), gnss.RackConfig{Dir: dir, Log: logTo(t.Output()), Clock: kernel.Realtime})
	if errors.Is(err, gnss.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "chronyd.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-r.Done()
	if err := r.Close(); err == nil || !strings.Contains(err.Error(), "chronyd") {
		t.Errorf("Close = %v, want chronyd's end", err)
	}
	gone(t, []int{pid})
}

func TestStartRackRefuses(t *testing.T) {
	t.Parallel()
	if _, err := gnss.StartRack(t.Context(), gnss.RackConfig{}); err == nil {
		t.Error("an empty configuration accepted")
	}
	// A port in use: chronyd says so, and the error repeats it.
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = gnss.StartRack(t.Context(), gnss.RackConfig{Dir: t.TempDir(), Log: logTo(t.Output()), Clock: kernel.Realtime, NTPPort: c.LocalAddr().(*net.UDPAddr).Port})
	if errors.Is(err, gnss.ErrMissing) {
		t.Skip(err)
	}
	if err == nil || !strings.Contains(err.Error(), "chronyd") {
		t.Errorf("StartRack on a taken port = %v", err)
	}
}
