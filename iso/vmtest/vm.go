// Package vmtest starts virtual machines for tests of the sealed image: QEMU without hardware help, so that every machine
// gives the same answer, a serial console that is waited on instead of slept for, firmware variables and a TPM of a test's
// own. It runs two machines at a time, over all processes, and ends each by its own process.
package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"debug/pe"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"yinjian/packaging/porttest"
)

// patience is how many times longer than expected something may take: the machines that run tests are shared.
const patience = 3

// A Machine is what is started. The zero value of what is optional leaves it out.
type Machine struct {
	Name   string // of its log: where the environment has YINJIAN_VM_LOGS, <test>-<Name>.log in that folder
	Memory int    // MiB; 1024 by default
	Arch   string // amd64 by default, or arm64, which starts by firmware alone and has its first disk on virtio

	// Either a kernel directly, without Secure Boot,
	Kernel, Initrd, Append string
	// or firmware with variables of its own ([Variables]); Secure Boot if they have keys.
	Variables string
	// Or none of them: a BIOS, whose screen is the serial console.

	TPM   string   // folder of swtpm's state
	Disks []string // raw images, as virtio disks in this order
	Bus   string   // of the first of them, if it is not virtio: nvme, ahci, or usb, which is a fixed disk there
	CDROM string   // ISO image, in a SCSI drive
	Stick string   // raw image as a USB stick

	Guest   string   // the guest's address; 10.0.2.15, which DHCP gives, by default
	Ports   []int    // of the guest, reachable at [VM.Address]
	Outside []string // "10.0.2.100:5432=127.0.0.1:41234": what the guest can reach outside of itself; nothing else
	Host    bool     // the guest reaches all of this machine's loopback, at 10.0.2.2, by UDP too
	Tap     string   // a tap interface in the caller's network namespace that the guest's card is wired to, instead of the four above
	Reboots bool     // a restart of the guest restarts it; otherwise it ends the machine
	Urgent  int      // from 0 to 2: it goes before less urgent ones of this process that wait for a place
	Alone   bool     // no other machine runs beside it, and it has two processors: what it takes is measured

	Boot time.Duration // what its longest wait is expected to take; a minute by default
}

// A VM is a running machine.
type VM struct {
	t       testing.TB
	m       Machine
	cmd     *exec.Cmd
	input   io.WriteCloser
	monitor string // socket of QEMU's
	serial  *serial
	started time.Time
	ended   chan struct{}
	endTPM  func()
	ports   map[int]string // addresses here, by the guest's
}

// A board is what machines of an architecture have in common.
type board struct {
	qemu, machine, cpu string
	code, variables    string   // of the firmware
	firmware           []string // more arguments with it
	tpm                string   // device
}

var boards = map[string]board{
	"amd64": {"qemu-system-x86_64", "q35,smm=on", "max", "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd",
		[]string{"-global", "driver=cfi.pflash01,property=secure,value=on"}, "tpm-tis"},
	// The largest processor is emulated much more slowly there; there is no screen without a device for it.
	"arm64": {"qemu-system-aarch64", "virt", "cortex-a72", "/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.snakeoil.fd",
		[]string{"-device", "ramfb"}, "tpm-tis-device"},
}

// Tool is the path of a program; without it the test is skipped.
func Tool(t testing.TB, name string) string {
	t.Helper()
	for _, at := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(at); err == nil {
			return path
		}
	}
	t.Skipf("%s is missing: packaging/dev/deps.sh image", name)
	return ""
}

// Start starts m, waits for the first byte on its serial line, and ends it with the test if nothing did before. The log is shown if
// the test fails. An emulator whose guest has not said a byte when all of its start should be over is stuck before anything of ours
// has run: the machine is started once more, and the test's log says so.
func Start(t testing.TB, m Machine) *VM {
	t.Helper()
	if m.Memory == 0 {
		m.Memory = 1024
	}
	if m.Boot == 0 {
		m.Boot = time.Minute
	}
	if m.Arch == "" {
		m.Arch = "amd64"
	}
	board, known := boards[m.Arch]
	if !known {
		t.Fatalf("no machine for %s", m.Arch)
	}
	qemu := Tool(t, board.qemu)
	release := place(t, m.Urgent, m.Alone)
	v := &VM{t: t, m: m, endTPM: func() {}, monitor: filepath.Join(t.TempDir(), "monitor"), ports: map[int]string{}}
	// Never KVM, not even where it is offered: half of the machines that run this only seem to have it.
	machine := board.machine
	if m.Kernel == "" && m.Variables == "" {
		machine += ",graphics=off"
	}
	args := []string{"-machine", machine, "-accel", "tcg,thread=multi", "-cpu", board.cpu, "-smp", strconv.Itoa(processors(m)), "-m", strconv.Itoa(m.Memory),
		"-display", "none", "-monitor", "none", "-qmp", "unix:" + escaped(v.monitor) + ",server=on,wait=off", "-serial", "stdio", "-boot", "strict=on", "-device", "virtio-rng-pci"}
	if !m.Reboots {
		args = append(args, "-no-reboot")
	}
	if m.Kernel != "" {
		args = append(args, "-kernel", m.Kernel, "-initrd", m.Initrd, "-append", m.Append)
	} else if m.Variables != "" {
		args = append(args, board.firmware...)
		args = append(args, "-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+board.code, "-drive", "if=pflash,format=raw,unit=1,file="+escaped(m.Variables))
	}
	next := 1
	boot := func() string { next++; return ",bootindex=" + strconv.Itoa(next) }
	if m.CDROM != "" { // first to be booted; a SCSI drive, which the smallest kernel has as well
		args = append(args, "-device", "virtio-scsi-pci", "-drive", "if=none,id=cd,media=cdrom,readonly=on,format=raw,file="+escaped(m.CDROM),
			"-device", "scsi-cd,drive=cd,bootindex=1")
	}
	if m.Stick != "" || m.Bus == "usb" {
		args = append(args, "-device", "qemu-xhci")
	}
	if m.Stick != "" {
		args = append(args, "-drive", "if=none,id=stick,format=raw,file="+escaped(m.Stick), "-device", "usb-storage,drive=stick,removable=on"+boot())
	}
	for i, disk := range m.Disks {
		id := "disk" + strconv.Itoa(i)
		device := map[string]string{"nvme": "nvme", "ahci": "ide-hd,bus=ide.0", "usb": "usb-storage,removable=off"}[m.Bus]
		if i > 0 || device == "" {
			device = "virtio-blk-pci"
		}
		args = append(args, "-drive", "format=raw,if=none,id="+id+",file="+escaped(disk), "-device", device+",drive="+id+",serial=disk"+strconv.Itoa(i)+boot())
	}
	nic := "user,id=n0,model=virtio-net-pci"
	if !m.Host {
		nic += ",restrict=on"
	}
	for _, port := range m.Ports {
		v.ports[port] = porttest.Free(t)
		nic += fmt.Sprintf(",hostfwd=tcp:%s-%s:%d", v.ports[port], m.Guest, port)
	}
	for _, o := range m.Outside {
		guest, host, _ := strings.Cut(o, "=")
		nic += fmt.Sprintf(",guestfwd=tcp:%s-tcp:%s", guest, host)
	}
	if m.Tap != "" {
		nic = "tap,id=n0,model=virtio-net-pci,script=no,downscript=no,ifname=" + m.Tap
	}
	args = append(args, "-nic", nic, "-global", "virtio-net-pci.romfile=")
	log := io.Discard
	if dir := os.Getenv("YINJIAN_VM_LOGS"); dir != "" { // to be looked at while it runs
		f, err := os.Create(filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "-")+"-"+m.Name+".log"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		log = f
	}
	v.launch(qemu, args, log)
	t.Cleanup(func() {
		v.Kill()
		if t.Failed() {
			t.Logf("%s: serial console:\n%s", m.Name, tail(v.serial.text(), 60))
		}
	})
	if !v.speaks() {
		t.Logf("%s: not a byte on its serial line within %v: started once more", m.Name, patience*m.Boot)
		v.Kill()
		v.endTPM() // its state is not free before
		v.launch(qemu, args, log)
	}
	go func(ended <-chan struct{}) {
		<-ended
		release()
	}(v.ended)
	return v
}

// processors is how many a machine has: two, but one in the short suite, where two machines run at any time, so that they do not wait for
// processors that are not there.
func processors(m Machine) int {
	if m.Alone || os.Getenv("YINJIAN_LONG") != "" {
		return 2
	}
	return 1
}

// launch starts QEMU, and a TPM if the machine has one.
func (v *VM) launch(qemu string, args []string, log io.Writer) {
	v.t.Helper()
	if v.m.TPM != "" {
		args = append(slices.Clone(args), "-chardev", "socket,id=chrtpm,path="+v.startTPM(), "-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", boards[v.m.Arch].tpm+",tpmdev=tpm0")
	}
	v.serial, v.ended = &serial{changed: make(chan struct{})}, make(chan struct{})
	v.cmd = exec.Command(qemu, args...)
	v.cmd.Stdout, v.cmd.Stderr = io.MultiWriter(spoken{v.serial}, log), io.MultiWriter(v.serial, log) // the emulator's own complaints are no guest's
	var err error
	if v.input, err = v.cmd.StdinPipe(); err != nil {
		v.t.Fatal(err)
	}
	// The machine dies with the test's process, however that ends.
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	v.started = time.Now() // interval
	if err := v.cmd.Start(); err != nil {
		v.t.Fatal(err)
	}
	go func(cmd *exec.Cmd, ended chan<- struct{}) {
		_ = cmd.Wait() // how it ended is read from the serial console
		close(ended)
	}(v.cmd, v.ended)
}

// speaks waits for the first byte, and says whether it came; a machine that has ended says no more, and is not stuck.
func (v *VM) speaks() bool {
	limit := time.After(patience * v.m.Boot)
	for {
		said, changed := v.serial.begun()
		if said {
			return true
		}
		select {
		case <-changed:
		case <-v.ended:
			return true
		case <-limit:
			return false
		}
	}
}

// escaped is a file's name as a value of QEMU's.
func escaped(name string) string { return strings.ReplaceAll(name, ",", ",,") }

// places is how many machines run at once: most of a start is one processor's work.
const places = 2

// seats are the places that tests of this process have, by the test's name; a subtest is a test of its own.
var seats = struct {
	sync.Mutex
	of   map[string]*seat
	wait [3]int // machines that wait for a place, by [Machine.Urgent]
}{of: map[string]*seat{}}

// A seat is a test's place, or all places. It is given back with the last of the test's machines.
type seat struct {
	machines int
	held     []*os.File
}

// place waits for a place for a machine, or for all of them, and answers what gives it back. A further machine of a test that has one
// needs none, so that nobody who has a place waits for another one; but who wants all waits until the test's own machines have ended.
func place(t testing.TB, urgent int, all bool) func() {
	t.Helper()
	name := t.Name()
	release := sync.OnceFunc(func() {
		seats.Lock()
		defer seats.Unlock()
		s := seats.of[name]
		if s.machines--; s.machines > 0 {
			return
		}
		delete(seats.of, name)
		for _, f := range s.held {
			f.Close()
		}
	})
	for ; ; time.Sleep(200 * time.Millisecond) {
		seats.Lock()
		s := seats.of[name]
		if s == nil {
			break
		}
		if !all {
			s.machines++
		}
		seats.Unlock()
		if !all {
			t.Cleanup(release)
			return release
		}
	}
	s := &seat{machines: 1}
	seats.of[name] = s
	seats.wait[urgent]++
	defer func() {
		seats.Lock()
		defer seats.Unlock()
		seats.wait[urgent]--
	}()
	seats.Unlock()
	t.Cleanup(release) // should the machine not come to be
	for ; ; time.Sleep(200 * time.Millisecond) {
		seats.Lock()
		behind := slices.ContainsFunc(seats.wait[urgent+1:], func(n int) bool { return n > 0 })
		seats.Unlock()
		if behind {
			continue
		}
		for n := range places {
			f, err := os.OpenFile(filepath.Join(os.TempDir(), fmt.Sprintf("yinjian-vm-%d.lock", n)), os.O_CREATE|os.O_RDWR, 0o666)
			if err != nil {
				t.Fatal(err)
			}
			how := syscall.LOCK_EX // who wants all of them waits for each in the same order
			if !all {
				how |= syscall.LOCK_NB
			}
			switch err := syscall.Flock(int(f.Fd()), how); {
			case err == nil:
				s.held = append(s.held, f)
			case errors.Is(err, syscall.EWOULDBLOCK):
				f.Close()
			default:
				f.Close()
				t.Fatal(err)
			}
			if len(s.held) == 1 && !all || len(s.held) == places {
				return release
			}
		}
	}
}

// startTPM starts a TPM 2.0 over the machine's state of one, which may be new, and answers its socket. It ends with the machine.
func (v *VM) startTPM() string {
	t, dir := v.t, v.m.TPM
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs(dir) // swtpm forgets its folder otherwise
	if err != nil {
		t.Fatal(err)
	}
	if state, err := os.ReadDir(dir); err == nil && len(state) == 0 {
		// One bank, as most machines have: the firmware hashes every kernel for each.
		setup := exec.Command(Tool(t, "swtpm_setup"), "--tpm2", "--tpmstate", dir, "--pcr-banks", "sha256")
		if out, err := setup.CombinedOutput(); err != nil {
			t.Fatalf("swtpm_setup: %v: %s", err, out)
		}
	}
	socket := filepath.Join(dir, "sock")
	os.Remove(socket) // of a run before
	cmd := exec.Command(Tool(t, "swtpm"), "socket", "--tpm2", "--tpmstate", "dir="+dir, "--ctrl", "type=unixio,path="+socket, "--terminate", "--flags", "startup-clear")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	v.endTPM = func() {
		_ = cmd.Process.Kill()
		<-ended
	}
	t.Cleanup(v.endTPM)
	for {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		select {
		case <-ended:
			t.Fatalf("swtpm ended: %s", said.Bytes())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Variables writes firmware variables with Secure Boot's keys of a folder (PK.esl, KEK.esl, db.esl) to a new file. Fresh ones
// for every start: those that were used remember boot orders.
func Variables(t testing.TB, arch, keys string) string {
	t.Helper()
	empty, err := os.ReadFile(boards[arch].variables)
	if err != nil {
		t.Skipf("%v: packaging/dev/deps.sh image, or image-arm64", err)
	}
	// A firmware volume's header, then the store's, which says how long it is (PI 1.8 vol. 3 §3.2; edk2's VariableFormat.h):
	// what the template holds is forgotten. The one for arm64 that has none is all zeros, and no store yet.
	header := int(binary.LittleEndian.Uint16(empty[0x30:]))
	store := empty[header:]
	store = store[:binary.LittleEndian.Uint32(store[16:])]
	for i := range store[28:] {
		store[28+i] = 0xff
	}
	name := filepath.Join(t.TempDir(), "variables.fd")
	if err := os.WriteFile(name, empty, 0o600); err != nil {
		t.Fatal(err)
	}
	const global, security = "8be4df61-93ca-11d2-aa0d-00e098032b8c", "d719b2cb-3d3a-4596-a3bc-dad00e67656f" // EFI_GLOBAL_VARIABLE, EFI_IMAGE_SECURITY_DATABASE_GUID
	for _, v := range []struct{ name, vendor string }{{"db", security}, {"KEK", global}, {"PK", global}} {
		cmd := exec.Command(Tool(t, "flash-var"), "-t", "2026-01-01", "-g", v.vendor, name, v.name, filepath.Join(keys, v.name+".esl"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("flash-var %s: %v: %s", v.name, err, out)
		}
	}
	return name
}

// Arch is the architecture of an EFI program.
func Arch(t testing.TB, program string) string {
	t.Helper()
	f, err := pe.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	arch := map[uint16]string{pe.IMAGE_FILE_MACHINE_AMD64: "amd64", pe.IMAGE_FILE_MACHINE_ARM64: "arm64"}[f.Machine]
	if arch == "" {
		t.Fatalf("%s is for machine %#x", program, f.Machine)
	}
	return arch
}

// Section is a section of an EFI program, such as the kernel's, ".linux".
func Section(t testing.TB, program, name string) []byte {
	t.Helper()
	f, err := pe.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := f.Section(name)
	if s == nil {
		t.Fatalf("%s has no section %s", program, name)
	}
	b, err := s.Data()
	if err != nil {
		t.Fatal(err)
	}
	return b[:min(len(b), int(s.VirtualSize))]
}

// Label makes a disk image with files and a volume label: ISO 9660, which every base's kernel has on the medium.
func Label(t testing.TB, label string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	content := filepath.Join(dir, "content")
	if err := os.Mkdir(content, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(content, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "labelled.img")
	if out, err := exec.Command(Tool(t, "xorriso"), "-as", "mkisofs", "-quiet", "-V", label, "-R", "-J", "-o", image, content).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return image
}

// Disk is an empty disk of so many bytes.
func Disk(t testing.TB, dir string, size int64) string {
	t.Helper()
	name := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return name
}

// Wait waits until one of the texts stands on the serial console behind what was waited for before, and answers which. The
// test ends if the machine does, or if it takes too long.
func (v *VM) Wait(texts ...string) string {
	v.t.Helper()
	limit, cancel := context.WithTimeout(context.Background(), patience*v.m.Boot)
	defer cancel()
	which, err := v.serial.wait(limit, v.ended, texts)
	if err != nil {
		v.t.Fatalf("%s: waiting for %q: %v", v.m.Name, texts, err)
	}
	return which
}

// Ended waits until the machine has ended: switched off, or restarted without Machine.Reboots.
func (v *VM) Ended() {
	v.t.Helper()
	select {
	case <-v.ended:
	case <-time.After(patience * v.m.Boot):
		v.t.Fatalf("%s: still running", v.m.Name)
	}
}

// After returns when d has gone by, or the machine has ended.
func (v *VM) After(d time.Duration) {
	select {
	case <-time.After(d):
	case <-v.ended:
	}
}

// Kill is the plug pulled.
func (v *VM) Kill() {
	_ = v.cmd.Process.Kill()
	<-v.ended
}

// PowerButton presses the machine's power button.
func (v *VM) PowerButton() {
	v.t.Helper()
	v.qmp(`{"execute":"system_powerdown"}`)
}

// Screen writes what the machine's screen shows, as PNG.
func (v *VM) Screen(file string) {
	v.t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o777); err != nil {
		v.t.Fatal(err)
	}
	v.qmp(fmt.Sprintf(`{"execute":"screendump","arguments":{"filename":%q,"format":"png"}}`, file))
}

// qmp has the machine's monitor do something.
func (v *VM) qmp(command string) {
	v.t.Helper()
	conn, err := net.Dial("unix", v.monitor)
	if err != nil {
		v.t.Fatal(err)
	}
	defer conn.Close()
	// QMP: a greeting, and an answer to each command, of which the first ends the negotiation; events may come between.
	in := bufio.NewReader(conn)
	for _, command := range []string{"", `{"execute":"qmp_capabilities"}`, command} {
		if _, err := io.WriteString(conn, command); err != nil {
			v.t.Fatal(err)
		}
		answer := `"event"`
		for err == nil && strings.Contains(answer, `"event"`) {
			answer, err = in.ReadString('\n')
		}
		if err != nil || strings.Contains(answer, `"error"`) {
			v.t.Fatalf("%s: %s %v", command, answer, err)
		}
	}
}

// Press presses keys of the machine's own keyboard: letters, digits and Enter.
func (v *VM) Press(keys string) {
	v.t.Helper()
	for _, r := range keys {
		key := string(r)
		if r == '\n' {
			key = "ret"
		}
		v.qmp(fmt.Sprintf(`{"execute":"send-key","arguments":{"keys":[{"type":"qcode","data":%q}]}}`, key))
	}
}

// Type sends keys to the serial console.
func (v *VM) Type(keys string) {
	v.t.Helper()
	if _, err := io.WriteString(v.input, keys); err != nil {
		v.t.Fatal(err)
	}
}

// Console is everything that the serial console said.
func (v *VM) Console() string { return v.serial.text() }

// Elapsed is the time since the start.
func (v *VM) Elapsed() time.Duration { return time.Since(v.started) }

// Address is where a port of the guest is reached, host:port.
func (v *VM) Address(port int) string { return v.ports[port] }

// A serial is what came over the serial line.
type serial struct {
	mu      sync.Mutex // guards all
	all     bytes.Buffer
	seen    int           // up to where was waited
	spoke   bool          // the guest has
	changed chan struct{} // closed and made anew with every byte
}

func (s *serial) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
	return s.all.Write(b)
}

// spoken is a serial's writer for what the guest says.
type spoken struct{ *serial }

func (s spoken) Write(b []byte) (int, error) {
	s.mu.Lock()
	s.spoke = true
	s.mu.Unlock()
	return s.serial.Write(b)
}

// begun says whether the guest has said anything, and answers what is closed with the next byte.
func (s *serial) begun() (bool, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.spoke, s.changed
}

func (s *serial) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all.String()
}

var errEnded = errors.New("the machine has ended")

func (s *serial) wait(ctx context.Context, ended <-chan struct{}, texts []string) (string, error) {
	for over := false; ; {
		s.mu.Lock()
		rest, changed := s.all.Bytes()[s.seen:], s.changed
		first, which := -1, ""
		for _, text := range texts {
			if at := bytes.Index(rest, []byte(text)); at >= 0 && (first < 0 || at < first) {
				first, which = at, text
			}
		}
		if first >= 0 {
			s.seen += first + len(which)
			s.mu.Unlock()
			return which, nil
		}
		s.mu.Unlock()
		if over {
			return "", errEnded
		}
		select {
		case <-changed:
		case <-ended: // look at its last words
			over = true
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// tail is the last lines of a text.
func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\r\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
