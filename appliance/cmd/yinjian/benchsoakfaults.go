package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/hsm"
)

// What a soak breaks, and how it is mended.

// A soakFault is broken and mended again; between the two it lasts. Where begin fails, the soak ends. A fault that nobody saw may as well
// not have been: seen is asked from begin until all is well again, what it answers is what shows it, "" as long as nothing does.
type soakFault struct {
	name       string
	begin, end func(ctx context.Context) error
	seen       func(ctx context.Context) string
}

// faults are those that this machine can do, and in left those that it cannot, with the reason.
func (s *soak) faults() (can []soakFault, left []string) {
	nothing := func(context.Context) error { return nil }
	// signal finds the process that has the role now.
	signal := func(role string, sig syscall.Signal) (int, error) {
		for try := 0; ; try++ {
			roles, err := s.processes()
			for pid, r := range roles {
				if r == role {
					err = syscall.Kill(pid, sig)
					if err == nil {
						return pid, nil
					}
				}
			}
			if try == 100 { // ten seconds: it is not being started any more
				return 0, errors.Join(fmt.Errorf("no process %q", role), err)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	killed := func(name, role string) soakFault {
		var gone int
		return soakFault{name, func(context.Context) (err error) { gone, err = signal(role, syscall.SIGKILL); return err }, nothing, func(context.Context) string {
			roles, err := s.processes()
			if err != nil {
				return ""
			}
			for pid, r := range roles {
				if r == role && pid != gone {
					return "another process has its place"
				}
			}
			return ""
		}}
	}
	var stopped int
	var before int64 // errors of earlier times
	var delivered uint64
	var since time.Time // it has been so many
	can = []soakFault{
		killed("machine killed", roleSofttoken),
		{"machine hangs", func(context.Context) (err error) { stopped, err = signal(roleSofttoken, syscall.SIGSTOP); return err }, func(context.Context) error {
			return syscall.Kill(stopped, syscall.SIGCONT)
		}, func(ctx context.Context) string {
			if state, err := s.state(ctx); err == nil {
				for _, slot := range state.HSM {
					if slot.Phase != "ready" {
						return "a slot is not ready"
					}
				}
			}
			if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", stopped)); err == nil && strings.Contains(string(stat), ") T ") {
				return "its process is stopped"
			}
			return ""
		}},
		{"clock of one source steps", func(context.Context) error {
			s.sources[s.rnd.IntN(len(s.sources))].ahead.Store(int64(time.Second))
			return nil
		}, func(context.Context) error {
			for _, one := range s.sources {
				one.ahead.Store(0)
			}
			return nil
		}, func(ctx context.Context) string {
			var status struct {
				Sources []struct {
					State    string
					OffsetUS int64 `json:"offset_us"`
				}
			}
			answer, err := s.admin.TimeStatus(ctx)
			if err == nil {
				err = json.Unmarshal(answer, &status)
			}
			for _, one := range status.Sources {
				if err == nil && one.State != "agreed" && (one.OffsetUS > 500_000 || one.OffsetUS < -500_000) {
					return "the source is " + one.State
				}
			}
			return ""
		}},
		{"database killed", func(context.Context) error { s.database.kill(); return nil }, func(ctx context.Context) error { return s.database.start(ctx) }, func(ctx context.Context) string {
			if state, err := s.state(ctx); err == nil && state.Projection.LastError != "" {
				return "rows cannot be delivered"
			}
			return ""
		}},
		{"line to the database cut", func(context.Context) error {
			s.line.cut.Lock()
			delivered, since = 0, time.Time{}
			return nil
		}, func(context.Context) error { s.line.cut.Unlock(); return nil }, func(ctx context.Context) string {
			state, err := s.state(ctx)
			if err != nil {
				return ""
			}
			if now := time.Now(); state.Projection.Shipped != delivered || state.Projection.Lag == 0 { // interval
				delivered, since = state.Projection.Shipped, now
			}
			if time.Since(since) > 2*time.Second {
				return "rows wait, none is delivered"
			}
			return ""
		}},
	}
	for _, class := range hsm.Classes {
		can = append(can, killed("worker "+string(class)+" killed", "worker "+string(class)))
	}
	if s.volume == "" {
		left = append(left, "disk full: "+s.noVolume)
	} else {
		can = append(can, soakFault{"disk full", func(context.Context) error { before = s.errorsOf("disk full"); return s.fill() }, func(context.Context) error { return os.Remove(s.filler()) }, func(context.Context) string {
			if s.errorsOf("disk full") > before {
				return "requests were refused"
			}
			return ""
		}})
	}
	return can, left
}

// errorsOf is how many errors users saw of what was broken so far.
func (s *soak) errorsOf(what string) (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range s.errs[what] {
		n += one
	}
	return n
}

// kill ends the server as a crash does: the next start recovers from its log.
func (s *benchServer) kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGQUIT) // it may have ended
	_ = s.cmd.Wait()
	s.cmd = nil
}

func (s *soak) filler() string { return filepath.Join(s.volume, "filler") }

// fill takes what room there is on the appliance's volume, but for a megabyte.
func (s *soak) fill() error {
	f, err := os.OpenFile(s.filler(), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for try := 0; ; try++ {
		var st unix.Statfs_t
		if err := unix.Statfs(s.volume, &st); err != nil {
			return err
		}
		room := int64(st.Bavail)*st.Bsize - 1<<20
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if room <= 0 {
			return nil
		}
		err = unix.Fallocate(int(f.Fd()), 0, info.Size(), room)
		if err != nil && !errors.Is(err, unix.ENOSPC) || try == 20 {
			return err
		}
	}
}

// mountVolume gives the appliance a file system of its own, in a file. Where that cannot be done the reason is kept, and the disk is
// not among the faults.
func (s *soak) mountVolume() error {
	at, file := filepath.Join(s.folder, "volume"), filepath.Join(s.folder, "volume.img")
	if os.Getuid() != 0 {
		s.noVolume = "须为 root (needs root)"
		return nil
	}
	if err := errors.Join(os.MkdirAll(at, 0o700), os.WriteFile(file, nil, 0o600), os.Truncate(file, s.volumeBytes)); err != nil {
		return err
	}
	for _, argv := range [][]string{{"mkfs.ext4", "-q", "-m", "0", file}, {"mount", "-o", "loop", file, at}} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			s.noVolume = fmt.Sprintf("%s: %v %s", argv[0], err, strings.TrimSpace(string(out)))
			return os.Remove(file)
		}
	}
	s.volume = at
	return nil
}

func (s *soak) unmountVolume() error {
	if s.volume == "" {
		return nil
	}
	if out, err := exec.Command("umount", s.volume).CombinedOutput(); err != nil {
		return fmt.Errorf("umount: %w: %s", err, out)
	}
	return os.Remove(filepath.Join(s.folder, "volume.img"))
}

// A soakSource is a time server outside the appliance: this machine's clock, or what it lies (RFC 5905 §7.3, mode 4, stratum 1).
type soakSource struct {
	conn  net.PacketConn
	ahead atomic.Int64 // nanoseconds by which it lies
}

func startSource(now func() time.Time) (*soakSource, error) {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &soakSource{conn: conn}
	stamp := func(b []byte) {
		at := now().Add(time.Duration(s.ahead.Load()))
		binary.BigEndian.PutUint32(b, uint32(at.Unix()+2208988800)) // since 1900
		binary.BigEndian.PutUint32(b[4:], uint32(uint64(at.Nanosecond())<<32/1e9))
	}
	go func() {
		buf := make([]byte, 1024)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return // closed
			}
			if n < 48 {
				continue
			}
			reply := make([]byte, 48)
			stamp(reply[32:])                                                // receive
			reply[0], reply[1], reply[2], reply[3] = 4<<3|4, 1, buf[2], 0xec // version 4, server, stratum 1, precision 2^-20 s
			copy(reply[12:], "SOAK")
			stamp(reply[16:])                // reference
			copy(reply[24:32], buf[40:])     // origin
			stamp(reply[40:])                // transmit
			_, _ = conn.WriteTo(reply, from) // a lost answer is asked for again
		}
	}()
	return s, nil
}

// A soakLine is between the appliance and the database's socket. While cut is held nothing passes; nobody is told.
type soakLine struct {
	listener net.Listener
	cut      sync.RWMutex
}

// startLine listens beside where the database would be expected.
func startLine(dir, database string) (*soakLine, error) {
	const name = ".s.PGSQL.5432"
	listener, err := net.Listen("unix", filepath.Join(dir, name))
	if err != nil {
		return nil, err
	}
	l := &soakLine{listener: listener}
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return // closed
			}
			go l.carry(near, filepath.Join(database, name))
		}
	}()
	return l, nil
}

func (l *soakLine) carry(near net.Conn, address string) {
	l.wait()
	far, err := net.Dial("unix", address)
	if err != nil {
		near.Close()
		return
	}
	one := func(to, from net.Conn) {
		defer to.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := from.Read(buf)
			l.wait()
			if n > 0 {
				if _, err := to.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	go one(near, far)
	one(far, near)
}

func (l *soakLine) wait() {
	l.cut.RLock()
	defer l.cut.RUnlock()
}
