package appliance

import (
	"testing"
	"time"
)

// The rate is that of the last minute, whoever looks and however often.
func TestThroughput(t *testing.T) {
	t.Parallel()
	at := func(s, signed int) counted {
		return counted{time.Hour + time.Duration(s)*time.Second, uint64(signed), 2 * uint64(signed), 3 * uint64(signed)}
	}
	x := &throughput{seen: []counted{at(0, 0)}}
	if got := x.state(at(0, 0)); got != (throughputState{}) {
		t.Errorf("at once: %+v", got)
	}
	if got := x.state(at(2, 20)); got != (throughputState{10, 20, 30, 2}) {
		t.Errorf("after two seconds: %+v", got)
	}
	for s := 5; s <= 600; s += 5 { // ten a second for five minutes, then nothing
		x.note(at(s, min(10*s, 3000)))
		if len(x.seen) > 14 {
			t.Fatalf("%d samples are kept", len(x.seen))
		}
	}
	if got := x.state(at(603, 3000)); got.Signatures != 0 || got.OverS < 60 || got.OverS > 65 {
		t.Errorf("after minutes of rest: %+v", got)
	}
}

// What is under way is told until it ends.
func TestWorks(t *testing.T) {
	t.Parallel()
	var ws works
	if got := ws.state(); got == nil || len(got) != 0 {
		t.Errorf("nothing: %v", got)
	}
	a, b := ws.begin("verify"), ws.begin("assess")
	a.is(7, 9)
	if got := ws.state(); len(got) != 2 || got[0] != (workState{"verify", 0, 7, 9}) || got[1].Name != "assess" {
		t.Errorf("two: %+v", got)
	}
	a.end()
	a.end()
	if got := ws.state(); len(got) != 1 || got[0].Name != "assess" {
		t.Errorf("one: %+v", got)
	}
	b.end()
}
