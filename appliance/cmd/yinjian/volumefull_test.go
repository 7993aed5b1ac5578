package main_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
)

// tmpfs mounts a small file system that is really full when it is full.
func tmpfs(t *testing.T, at, options string) {
	t.Helper()
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, options+",mode=0700"); err != nil {
		t.Skipf("mounting a tmpfs (mount(2), CAP_SYS_ADMIN): %v", err)
	}
	t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
}

// fill leaves so many bytes free on the file system of the folder, by a file in it; free removes it again.
func fill(t *testing.T, dir string, leave int64) (free func()) {
	t.Helper()
	name := filepath.Join(dir, "ballast")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		more := int64(st.Bavail)*st.Bsize - leave
		if more <= 0 {
			break
		}
		if _, err := f.Write(make([]byte, min(more, 1<<20))); errors.Is(err, unix.ENOSPC) && leave == 0 {
			break
		} else if err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(name); err != nil {
			t.Error(err)
		}
	}
}

// useUp makes empty files until there can be no more.
func useUp(t *testing.T, dir string) (free func()) {
	t.Helper()
	at := filepath.Join(dir, "many")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		err := os.WriteFile(filepath.Join(at, fmt.Sprint(i)), nil, 0o600)
		if errors.Is(err, unix.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.RemoveAll(at); err != nil {
			t.Error(err)
		}
	}
}

// TestVolumeFull fills the appliance's volume: strangers' tokens are refused first, then signatures, each with its code;
// nothing that was acknowledged is lost; and when there is room again, it goes on by itself.
func TestVolumeFull(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(tempDir(t), "a")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	tmpfs(t, dir, "size=48m,nr_inodes=2k")
	server := startTimeServer(t)
	mustRun(t, "init", "--dir", dir, "--time-source", server.address, "--listen", freePort(t), "--tsa-plain", "127.0.0.1:0")
	reserve := func(bytes uint64) {
		configure(t, dir, func(c *appliance.Config) {
			c.Time.Poll, c.Policy.ReserveBytes, c.Policy.TSAReservePercent, c.Policy.SegmentEntries = appliance.Duration(time.Second), bytes, 10, 400
		})
	}
	reserve(3 << 20)
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	var configs []client.Config
	for _, id := range []string{"his", "app-0", "app-1"} {
		m.register(t, id, "--consent", "app-asserted")
		configs = append(configs, m.clientConfig(t, id))
	}
	m.enrol(t, "D1", "")
	his := m.client(t, "his")
	signs := func(key string) error {
		_, err := his.Sign(t.Context(), key, asserted("D1", key))
		return err
	}
	stamps := func() error {
		_, err := his.Timestamp(t.Context(), &wire.TimestampRequest{Data: []byte("x")})
		return err
	}

	// 1. The order of the refusals.
	if err := errors.Join(signs("room"), stamps()); err != nil {
		t.Fatal(err)
	}
	free := fill(t, dir, 4<<20) // under a tenth
	if err := signs("little-room"); err != nil {
		t.Errorf("with room for signatures and none for tokens: %v", err)
	}
	o := &operations{T: t, all: t, m: m, his: his}
	o.stampRefused("system failure")
	m.raises(t, alarm.DiskLow)
	free()
	m.clears(t, alarm.DiskLow)
	free = fill(t, dir, 2<<20)
	wantCode(t, signs("no-room"), "disk_reserve")
	m.raises(t, alarm.DiskReserve)
	free()
	m.clears(t, alarm.DiskReserve)
	if err := errors.Join(signs("no-room"), stamps()); err != nil {
		t.Errorf("with room again: %v", err)
	}
	m.stop(t)

	// 2. No reserve, and the volume is full to the last byte while sixteen clients sign; then its inodes are used up.
	reserve(1)
	m = serve(t, dir)
	m.trusted(t)
	pid := m.cmd.Process.Pid
	var app atomic.Int32
	app.Store(1)
	l := newRetryLoad(t, configs, []string{"D1"}, app.Load)
	t.Cleanup(l.end)
	refusals := func() (n int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, c := range l.refused {
			n += c
		}
		return n
	}
	for what, use := range map[string]func() func(){
		"no byte is left": func() func() { return fill(t, dir, 0) }, "no inode is left": func() func() { return useUp(t, dir) },
	} {
		l.await()
		eventually(t, readyWithin, "signatures before "+what, l.returned)
		had := refusals()
		free := use()
		eventually(t, time.Minute, "refusals when "+what, func() bool { return refusals() > had+2*loadClients })
		free()
		l.await()
		eventually(t, readyWithin, "signatures after "+what, l.returned)
	}
	l.end()
	for code := range l.refused {
		if !slices.Contains([]string{"journal_unwritable", "disk_reserve", "not_ready", "hsm_unavailable", "clock_skew"}, code) {
			t.Errorf("refused with %s", code)
		}
	}
	t.Logf("%d signatures, refusals %v", len(l.made), l.refused)
	if p, _, ok := readProcess(pid); !ok || p.pid != m.cmd.Process.Pid {
		t.Error("it was restarted")
	}
	m.mustBeClean(t)
	m.stop(t)
	entriesByRef(t, dir, l.made)

	// 3. Full when it starts: it says so; when there is room it starts.
	free = fill(t, dir, 0)
	refusesToServe(t, dir, "磁盘空间")
	free()
	m = serve(t, dir)
	m.trusted(t)
	m.mustBeClean(t)
	m.stop(t)

	// 4. Only run/ is full: what is kept there over a restart cannot be kept, and requests are refused for it.
	if err := os.RemoveAll(filepath.Join(dir, "run")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	tmpfs(t, filepath.Join(dir, "run"), "size=64k")
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	free = fill(t, filepath.Join(dir, "run"), 0)
	var codes = map[string]bool{}
	eventually(t, time.Minute, "a refusal with run/ full", func() bool {
		err := signs(fmt.Sprintf("run-%d", time.Now().UnixNano()))
		var p *client.Problem
		if errors.As(err, &p) {
			codes[p.Code] = true
		}
		return codes["not_ready"]
	})
	free()
	if err := signs("run-free"); err != nil {
		t.Errorf("with room in run/ again: %v", err)
	}
	t.Logf("run/ full: %v", slices.Collect(maps.Keys(codes)))
	m.mustBeClean(t)
	m.stop(t)
	if left, _ := filepath.Glob(filepath.Join(dir, ".*.part")); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, " "))
	}
}
