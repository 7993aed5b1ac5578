package appliance

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A systemState is what the appliance runs on and listens at, as far as it can tell from within its process.
type systemState struct {
	Program struct {
		Version  string `json:"version"`
		Go       string `json:"go"`
		Revision string `json:"revision,omitempty"` // of the source, where the build has it
		Path     string `json:"path"`
		SM3      string `json:"sm3"`
	} `json:"program"`
	Process struct {
		PID        int    `json:"pid"`
		User       string `json:"user"`
		UpS        int64  `json:"up_s"`
		Goroutines int    `json:"goroutines"`
		Threads    string `json:"threads"`
		Memory     string `json:"memory"` // resident
		Files      int    `json:"open_files"`
		Heap       uint64 `json:"heap_bytes"` // live objects, and those that are not collected yet
		Go         uint64 `json:"go_bytes"`   // that Go's runtime has from the system; what is resident beyond it is SQLite's and the C library's, and files
	} `json:"process"`
	Host struct {
		Name        string `json:"name"`
		System      string `json:"system"`
		Kernel      string `json:"kernel"`
		Arch        string `json:"arch"`
		CPUs        int    `json:"cpus"`
		MemoryBytes uint64 `json:"memory_bytes"`
		UpS         int64  `json:"up_s"`
		Zone        string `json:"zone"`
	} `json:"host"`
	Disks     []diskState     `json:"disks"`
	Addresses []addressState  `json:"addresses"`
	Listeners []listenerState `json:"listeners"`
	Config    struct {
		File    string `json:"file"`
		SM3     string `json:"sm3"`     // as it is now
		Started string `json:"started"` // as it was at the start
		Error   string `json:"error,omitempty"`
	} `json:"config"`
	// PINs says where those of the cipher machines come from: "file", "unlock" or "tpm".
	PINs string `json:"pins"`
}

type diskState struct {
	Name  string `json:"name"`
	Free  uint64 `json:"free_bytes"`
	Total uint64 `json:"total_bytes"`
	Error string `json:"error,omitempty"`
}

type addressState struct {
	Interface string   `json:"interface"`
	Up        bool     `json:"up"`
	Addresses []string `json:"addresses"`
}

// A listenerState is one listener. Setting is its key in config.toml.
type listenerState struct {
	Name        string            `json:"name"`
	Setting     string            `json:"setting"`
	Address     string            `json:"address"` // "": it is off
	Certificate *certificateState `json:"certificate,omitempty"`
}

type certificateState struct {
	Subject  string `json:"subject"`
	Issuer   string `json:"issuer"`
	Serial   string `json:"serial"`
	NotAfter string `json:"not_after"`
	DaysLeft int    `json:"days_left"`
}

// System satisfies api.Admin.
func (d admin) System(context.Context, string) (any, error) {
	a := d.a
	s := systemState{Disks: []diskState{}, Addresses: []addressState{}, PINs: a.cfg.HSM.PINSource}
	var err error
	s.Program.Version, s.Program.Go = Version, runtime.Version()
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, v := range info.Settings {
			if v.Key == "vcs.revision" {
				s.Program.Revision = v.Value
			}
		}
	}
	if s.Program.Path, err = os.Executable(); err != nil {
		return nil, err
	}
	if s.Program.SM3, err = a.program(); err != nil {
		return nil, err
	}
	a.describeProcess(&s)
	a.describeHost(&s)
	for _, v := range PatrolVolumes(a.dir, a.cfg.Log.Directory) {
		s.Disks = append(s.Disks, diskState(v))
	}
	interfaces, err := hostInterfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range interfaces {
		one := addressState{Interface: i.name, Up: i.up, Addresses: []string{}}
		for _, addr := range i.addresses {
			one.Addresses = append(one.Addresses, addr.String())
		}
		s.Addresses = append(s.Addresses, one)
	}
	s.Listeners = a.describeListeners()
	s.Config.File, s.Config.Started = filepath.Join(a.dir, "config.toml"), a.configSM3
	if s.Config.SM3, err = fileSM3(s.Config.File); err != nil {
		s.Config.Error = err.Error()
	}
	return s, nil
}

func (a *Appliance) describeProcess(s *systemState) {
	s.Process.PID, s.Process.UpS, s.Process.Goroutines = os.Getpid(), int64((a.sys.Boot() - a.started).Seconds()), runtime.NumGoroutine()
	s.Process.User = strconv.Itoa(os.Getuid())
	if u, err := user.Current(); err == nil {
		s.Process.User = u.Username
	}
	status, _ := os.ReadFile("/proc/self/status") // what cannot be read stays empty
	lines := keyed(status)
	s.Process.Threads, s.Process.Memory = lines["Threads"], lines["VmRSS"]
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		s.Process.Files = len(open)
	}
	// Unlike runtime.ReadMemStats this stops nobody.
	memory := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(memory)
	s.Process.Heap, s.Process.Go = memory[0].Value.Uint64(), memory[1].Value.Uint64()-memory[2].Value.Uint64()
}

func (a *Appliance) describeHost(s *systemState) {
	h := &s.Host
	h.Name, _ = os.Hostname()
	release, _ := os.ReadFile("/etc/os-release")
	for line := range strings.Lines(string(release)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
			h.System = strings.Trim(v, `"`)
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	h.Arch, h.CPUs, h.UpS = runtime.GOARCH, runtime.NumCPU(), int64(a.sys.Boot().Seconds())
	memory, _ := os.ReadFile("/proc/meminfo")
	if kib, err := strconv.ParseUint(strings.TrimSuffix(keyed(memory)["MemTotal"], " kB"), 10, 64); err == nil {
		h.MemoryBytes = kib << 10
	}
	name, offset := a.sys.Realtime().Local().Zone()
	h.Zone = fmt.Sprintf("%s (UTC%+03d:%02d)", name, offset/3600, offset%3600/60)
}

// keyed are the lines of a file of /proc, by what stands before the colon.
func keyed(b []byte) map[string]string {
	out := map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok {
			out[name] = strings.TrimSpace(value)
		}
	}
	return out
}

// describeListeners are all of them, those that are off too.
func (a *Appliance) describeListeners() []listenerState {
	served := a.listener.certificate.Load()
	of := func(leaf *x509.Certificate, address string) *certificateState {
		if leaf == nil || address == "" {
			return nil
		}
		return &certificateState{
			Subject: leaf.Subject.String(), Issuer: leaf.Issuer.String(), Serial: hex.EncodeToString(leaf.SerialNumber.Bytes()),
			NotAfter: leaf.NotAfter.UTC().Format(time.RFC3339), DaysLeft: int(leaf.NotAfter.Sub(apiClock{a}.Now().Time).Hours() / 24),
		}
	}
	var leaf, peer *x509.Certificate
	if served != nil {
		leaf = served.Leaf
	}
	if c := a.peers.certificate; c != nil && len(c.Certificate) > 0 {
		peer, _ = x509.ParseCertificate(c.Certificate[0]) // our own
	}
	out := []listenerState{
		{"api", "listen.api", a.apiAddr, of(leaf, a.apiAddr)}, {"admin", "listen.admin", a.adminAddr, of(leaf, a.adminAddr)},
		{"peer", "listen.peer", a.peerAddr, of(peer, a.peerAddr)}, {"tsa_plain", "listen.tsa_plain", a.plain, nil},
		{"admin_local", "admin.local", AdminSocket(a.dir), nil},
	}
	slices.SortStableFunc(out, func(x, y listenerState) int { return cmp.Compare(btoi(x.Address == ""), btoi(y.Address == "")) })
	return out
}
