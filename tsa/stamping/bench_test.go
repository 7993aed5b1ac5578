package stamping_test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pool"
	"yinjian/hsm/worker"
)

// BenchmarkWorker is what sixteen callers get through a worker and a cipher machine: C_Sign alone, and tokens, each built and
// signed there and verified here. The machine signs as fast as it can, or takes a millisecond for each. cpu-ns/op is the
// processor time of all the processes.
func BenchmarkWorker(b *testing.B) {
	for _, service := range []string{"0s", "1ms"} {
		m := hsmtest.NewMachine(b)
		m.Kill()
		self, err := os.Executable()
		if err != nil {
			b.Fatal(err)
		}
		m.Process = exec.Command(self, "machine", m.Root, service)
		m.Process.Stderr = os.Stderr
		if err := m.Process.Start(); err != nil {
			b.Fatal(err)
		}
		for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) { // interval
			c, err := net.Dial("unix", filepath.Join(m.Root, "state", "p11.sock"))
			if err == nil {
				c.Close()
				break
			}
			if time.Since(begun) > 2*time.Minute {
				b.Fatal(err)
			}
		}
		extension, err := json.Marshal(started{Units: terms})
		if err != nil {
			b.Fatal(err)
		}
		start := func(class hsm.SlotClass, extension []byte) *worker.Client {
			w, err := worker.Start(worker.Config{Command: []string{self, "worker"}, Class: class, Log: quiet(), Params: worker.StartParams{
				Module: m.Config.Module, ModuleArgs: m.Config.ModuleArgs, TokenLabel: m.Config.TokenLabel, PIN: []byte(hsmtest.UserPIN), Profile: "neutral",
				MaxSessions: 16, Uses: worker.UseLog{Dir: b.TempDir()}, Extension: extension,
			}})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { w.Close() })
			return w
		}
		plain, stamper := start(hsm.Staff, nil), start(hsm.TSA, extension)
		p := pool.New(pool.Config{Class: hsm.TSA, Log: quiet()})
		if err := p.Add(b.Context(), pool.Machine{Name: "main", Token: stamper, Weight: 1, Sessions: 16}); err != nil {
			b.Fatal(err)
		}
		info, err := p.GenerateKey(b.Context(), hsm.KeySpec{Label: "tsa/sm2", Algorithm: hsm.SM2})
		if err != nil {
			b.Fatal(err)
		}
		e := make([]byte, 32)
		e[0] = 1
		u, _ := unitOf(b, "sm2", p, standing(now), chainFor(info.Public, nil), new(discards))
		q := query("x")
		for name, call := range map[string]func() error{
			"sign":  func() error { _, err := plain.Do(b.Context(), "tsa/sm2", hsm.SignSM2E, e); return err },
			"token": func() error { _, err := u.Issue(b.Context(), q); return err },
		} {
			b.Run(name+"/"+service, func(b *testing.B) {
				b.ReportAllocs()
				begun := processorTime(b, os.Getpid(), m.Process.Process.Pid, plain.State().PID, stamper.State().PID)
				var left atomic.Int64
				left.Store(int64(b.N))
				var wg sync.WaitGroup
				for range 16 {
					wg.Go(func() {
						for left.Add(-1) >= 0 {
							if err := call(); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				used := processorTime(b, os.Getpid(), m.Process.Process.Pid, plain.State().PID, stamper.State().PID) - begun
				b.ReportMetric(float64(used.Nanoseconds())/float64(b.N), "cpu-ns/op")
			})
		}
		m.Kill()
	}
}

// processorTime is what processes have used so far (proc(5), utime and stime in hundredths of a second).
func processorTime(b *testing.B, pids ...int) (sum time.Duration) {
	b.Helper()
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			b.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(stat), ") ") // the name may hold anything
		for _, f := range strings.Fields(rest)[11:13] {
			n, err := strconv.Atoi(f)
			if err != nil {
				b.Fatal(err)
			}
			sum += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return sum
}
