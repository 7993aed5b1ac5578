package main

import (
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
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

// A second without any answer has no step and is the slowest; what is cut off at both ends is not.
func TestSlowestSeconds(t *testing.T) {
	steps := func(requests ...int64) (all []loadStep) {
		for i, n := range requests {
			if n > 0 {
				all = append(all, loadStep{At: float64(i), Requests: n})
			}
		}
		return all
	}
	for name, c := range map[string]struct {
		requests []int64
		want     []float64
	}{
		"even":             {[]int64{1, 100, 100, 100, 100, 100, 1}, []float64{1}},
		"one is slow":      {[]int64{1, 100, 100, 100, 40, 100, 1}, []float64{0.4}},
		"one has nothing":  {[]int64{1, 100, 100, 100, 0, 100, 1}, []float64{0}},
		"the last but one": {[]int64{1, 100, 100, 100, 100, 0, 1}, []float64{0}},
		"nothing":          {nil, nil},
	} {
		s := loadSample{}
		s.Seconds, s.Steps = 4, steps(c.requests...)
		s.All.Requests = 400
		if got := slowestSeconds([]loadSample{s}); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// Two threads that want one processor wait for it, and the kernel's account of that grows.
func TestReadWait(t *testing.T) {
	begin := time.Now() // interval
	before, wait := readWait(os.Getpid()), 0.0
	var over atomic.Bool
	var ready sync.WaitGroup
	for range runtime.NumCPU() + 1 {
		ready.Go(func() {
			runtime.LockOSThread() // and ends with the goroutine
			for !over.Load() {
			}
		})
	}
	defer ready.Wait()
	defer over.Store(true)
	for wait < 0.05 {
		if wait = readWait(os.Getpid()) - before; time.Since(begin) > time.Minute { // interval
			t.Fatalf("more threads than processors waited for %.3f s", wait)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
