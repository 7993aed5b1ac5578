package sqlite_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A call is a system call that changes a file or a folder, seen before the kernel carries it out. strace counts its
// injections for each thread apart, which is no order for a program that runs on several; this one has a single count.
type call struct {
	Op     string // create, write, truncate, sync, rename, unlink; ack: no call, but a receipt given
	Path   string // base name; "." is the folder
	To     string `json:",omitempty"` // of rename
	Offset int64  `json:",omitempty"` // of write; the new size of truncate
	Data   []byte `json:",omitempty"`
	Errno  int    `json:",omitempty"` // it was answered so and not carried out
	Phase  string `json:",omitempty"` // of the program

	Sequence uint64 `json:",omitempty"` // of ack
	Leaf     string `json:",omitempty"`
}

// An interceptor sees the calls of this process on one folder.
type interceptor struct {
	dir string
	// decide answers what becomes of the call: 0: it is carried out.
	decide func(c *call) verdict

	mu  sync.Mutex
	log *os.File // a line of JSON for each call; nil: none
}

type verdict struct {
	errno syscall.Errno
	kill  bool
	short bool // half of a write is carried out
}

// seccomp(2) and seccomp_unotify(2).
type (
	seccompNotif struct {
		id         uint64
		pid, flags uint32
		nr         int32
		arch       uint32
		ip         uint64
		args       [6]uint64
	}
	seccompResponse struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
)

const (
	notifReceive, notifSend                       = 0xc0502100, 0xc0182101
	filterTsync, filterListener, filterTsyncESRCH = 1 << 0, 1 << 3, 1 << 4
	returnAllow, returnNotify                     = 0x7fff0000, 0x7fc00000
)

var intercepted = []uint32{
	unix.SYS_OPENAT, unix.SYS_PWRITE64, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_FTRUNCATE, unix.SYS_UNLINK,
	unix.SYS_UNLINKAT, unix.SYS_RENAME, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2,
}

// install puts the filter on every thread of the process, for good. The collector is stopped with it: it waits for every
// thread, and one of them could be waiting for an answer that nobody is left to give.
func (in *interceptor) install() error {
	debug.SetGCPercent(-1)
	var program []unix.SockFilter
	program = append(program, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0})
	for i, n := range intercepted {
		program = append(program, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: n, Jt: uint8(len(intercepted) - i)})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET, K: returnAllow}, unix.SockFilter{Code: unix.BPF_RET, K: returnNotify})
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	ready := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		f := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
		fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, 1, filterTsync|filterListener|filterTsyncESRCH, uintptr(unsafe.Pointer(&f)))
		if errno != 0 {
			ready <- fmt.Errorf("seccomp: %w", errno)
			return
		}
		ready <- nil
		for {
			var n seccompNotif
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, notifReceive, uintptr(unsafe.Pointer(&n))); errno != 0 {
				continue // a thread that was woken by a signal
			}
			r := in.answer(&n)
			_, _, _ = unix.Syscall(unix.SYS_IOCTL, fd, notifSend, uintptr(unsafe.Pointer(&r))) // gone meanwhile
		}
	}()
	return <-ready
}

// answer decides about a call. It makes none itself that is intercepted.
func (in *interceptor) answer(n *seccompNotif) seccompResponse {
	pass := seccompResponse{id: n.id, flags: 1} // SECCOMP_USER_NOTIF_FLAG_CONTINUE
	file := func(fd uint64) string {
		name, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", int32(fd)))
		return name
	}
	text := func(at uint64) string { return string(bytes.TrimRight(in.memory(at, 4096, true), "\x00")) }
	c := &call{}
	path, to := "", ""
	switch n.nr {
	case unix.SYS_OPENAT:
		if n.args[2]&unix.O_CREAT == 0 {
			return pass
		}
		path = text(n.args[1])
		if _, err := os.Stat(path); err == nil {
			return pass
		}
		c.Op = "create"
	case unix.SYS_PWRITE64:
		c.Op, path, c.Offset = "write", file(n.args[0]), int64(n.args[3])
	case unix.SYS_FSYNC, unix.SYS_FDATASYNC:
		c.Op, path = "sync", file(n.args[0])
	case unix.SYS_FTRUNCATE:
		c.Op, path, c.Offset = "truncate", file(n.args[0]), int64(n.args[1])
	case unix.SYS_UNLINK:
		c.Op, path = "unlink", text(n.args[0])
	case unix.SYS_UNLINKAT:
		c.Op, path = "unlink", text(n.args[1])
	case unix.SYS_RENAME:
		c.Op, path, to = "rename", text(n.args[0]), text(n.args[1])
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		c.Op, path, to = "rename", text(n.args[1]), text(n.args[3])
	}
	rel, err := filepath.Rel(in.dir, path)
	if err != nil || strings.HasPrefix(rel, "..") {
		return pass
	}
	c.Path = rel
	if to != "" {
		c.To = filepath.Base(to)
	}
	if c.Op == "write" {
		c.Data = in.memory(n.args[1], int(n.args[2]), false)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	v := in.decide(c)
	switch {
	case v.kill:
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case v.short && len(c.Data) > 1:
		c.Data = c.Data[:len(c.Data)/2]
		in.write(c)
		if _, err := unix.Pwritev(int(n.args[0]), [][]byte{c.Data}, c.Offset); err != nil { // not intercepted
			panic(err)
		}
		return seccompResponse{id: n.id, value: int64(len(c.Data))}
	case v.errno != 0:
		c.Errno = int(v.errno)
		in.write(c)
		return seccompResponse{id: n.id, errno: -int32(v.errno)}
	}
	in.write(c)
	return pass
}

// receipt notes in the log that the entry was acknowledged.
func (in *interceptor) receipt(sequence uint64, leaf string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.write(&call{Op: "ack", Sequence: sequence, Leaf: leaf})
}

func (in *interceptor) write(c *call) {
	if in.log == nil {
		return
	}
	b, err := json.Marshal(c)
	if err == nil {
		_, err = in.log.Write(append(b, '\n')) // write(2) is not intercepted
	}
	if err != nil {
		panic(err)
	}
}

// memory reads the process's own, as the kernel does for a tracer. A string may end before most bytes, at a page that
// is not there.
func (in *interceptor) memory(at uint64, most int, str bool) []byte {
	b := make([]byte, most)
	for got := 0; got < most; {
		part := min(most-got, 4096-int((at+uint64(got))%4096))
		local := []unix.Iovec{{Base: &b[got], Len: uint64(part)}}
		n, err := unix.ProcessVMReadv(os.Getpid(), local, []unix.RemoteIovec{{Base: uintptr(at) + uintptr(got), Len: part}}, 0)
		if err != nil && !errors.Is(err, unix.EFAULT) {
			panic(err)
		}
		if i := bytes.IndexByte(b[got:got+n], 0); str && i >= 0 {
			return b[:got+i]
		}
		if got += n; err != nil || n == 0 {
			return b[:got]
		}
	}
	return b
}
