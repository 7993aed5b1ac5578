package main

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the other loaders wrote is read as they mean it: classes, errors, and what came while users began, apart.
func TestOtherLoaders(t *testing.T) {
	t.Parallel()
	fresh := func() *loaderRun { return &loaderRun{Classes: map[string]*loaderClass{}, Errors: map[string]int64{}} }
	r := fresh()
	err := readK6([]byte(`{"metrics":{"sign_ms":{"count":70,"med":1.5,"p(95)":2,"p(99)":3,"max":4},"batch_ms":{"count":10,"med":9},"http_reqs":{"count":95,"rate":9},"problems":{"count":3}}}`), r)
	if err != nil {
		t.Fatal(err)
	}
	if *r.Classes["sign"] != (loaderClass{70, 1.5, 2, 3, 4}) || r.Classes["verify"].Requests != 0 || r.Answers != 95 || r.failures() != 3 || r.requests() != 80 {
		t.Errorf("%+v", r)
	}
	r = fresh()
	if err := readK6([]byte(`{"metrics":{}}`), r); err != nil || r.failures() != 0 {
		t.Errorf("without problems: %+v, %v", r, err)
	}

	const head = "timeStamp,elapsed,label,responseCode,responseMessage,threadName,success\n"
	r = fresh()
	err = readJMeter(strings.NewReader(head+
		"1000,400,sign,200,OK,u1,true\n"+ // while users began
		"1500,9,sign,503,time_untrusted,u1,false\n"+ // and failed
		"3000,10,sign,200,OK,u1,true\n3100,30,sign,200,OK,u2,true\n4000,1000,batch,200,OK,u1,true\n"), 2*time.Second, r)
	if err != nil {
		t.Fatal(err)
	}
	if sign := r.Classes["sign"]; sign.Requests != 2 || sign.Most != 30 || sign.P50 < 9.9 || sign.P50 > 10.2 {
		t.Errorf("sign: %+v", sign)
	}
	if r.Answers != 5 || r.Errors["503 time_untrusted"] != 1 || r.Seconds != 2 || r.Classes["batch"].Requests != 1 {
		t.Errorf("%+v", r)
	}
	for what, text := range map[string]string{"nothing": "", "no sample": head, "other columns": "a,b\n1,2\n", "no number": head + "x,1,sign,200,OK,u,true\n"} {
		if err := readJMeter(strings.NewReader(text), time.Second, fresh()); err == nil {
			t.Errorf("%s is taken for a result", what)
		}
	}

	b := &loadersBench{loadBench: &loadBench{bench: &bench{}}}
	b.users, b.mix, b.runs = 500, usualMix, []*loaderRun{r, {Name: "k6", Missing: "k6: packaging/dev/deps.sh load"}}
	if page := loadersPage(machineInfo{}, b); !strings.Contains(page, "1 × 503 time_untrusted") || !strings.Contains(page, "| k6 | | | | 未运行 not run") {
		t.Error(page)
	}
}

// The slowest second is one that is measured as a whole, without an answer or with few, wherever it stands.
func TestSlowestSeconds(t *testing.T) {
	for name, c := range map[string]struct {
		requests []int64
		want     []float64
	}{
		"even":            {[]int64{1, 1, 100, 100, 100, 100, 1}, []float64{1}},
		"one is slow":     {[]int64{1, 1, 100, 100, 40, 100, 1}, []float64{0.4}},
		"one has nothing": {[]int64{1, 1, 100, 100, 0, 100, 1}, []float64{0}},
		"the first":       {[]int64{1, 1, 0, 100, 100, 100, 1}, []float64{0}},
		"the last two":    {[]int64{1, 1, 100, 100, 0, 0, 0}, []float64{0}},
	} {
		s := loadSample{}
		s.Begun, s.Seconds = 1.5, 4.5 // to 6
		s.All.Requests = 450
		for i, n := range c.requests {
			if n > 0 {
				s.Steps = append(s.Steps, loadStep{At: float64(i), Requests: n})
			}
		}
		if got := slowestSeconds([]loadSample{s}); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if got := slowestSeconds([]loadSample{{}}); got != nil {
		t.Errorf("of no second: %v", got)
	}
}

// Of two processes that want the same processor each waits for it, and the kernel's account of that grows.
func TestReadWait(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/schedstat"); err != nil {
		t.Skip("the kernel keeps no account: ", err)
	}
	var own, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &own); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if own.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	pid := 0
	for range 2 {
		busy := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
		if err := busy.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { busy.Process.Kill(); busy.Wait() })
		pid = busy.Process.Pid
		if err := unix.SchedSetaffinity(pid, &one); err != nil {
			t.Fatal(err)
		}
	}
	for begin := time.Now(); readWait(pid) < 0.05; time.Sleep(20 * time.Millisecond) { // interval
		if time.Since(begin) > time.Minute { // interval
			t.Fatalf("it waited for %.3f s", readWait(pid))
		}
	}
}
