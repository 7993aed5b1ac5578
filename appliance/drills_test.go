package appliance

import (
	"strings"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance/alarm"
	"yinjian/ntp/sysclock"
)

// Each drill says which alarms it brings about, and the alarms that mean that evidence is in doubt are never a drill's.
func TestDrillsExplain(t *testing.T) {
	t.Parallel()
	doubt := []alarm.Code{alarm.DatabaseChanged, alarm.Fork, alarm.SplitView, alarm.DirectoryFrozen, alarm.JournalFailed, alarm.UnaccountedUse}
	for _, part := range wire.DrillParts() {
		if len(drillExplains[part]) == 0 {
			t.Errorf("%s explains no alarm", part)
		}
		for _, code := range drillExplains[part] {
			if alarm.Meanings[code].Title == "" {
				t.Errorf("%s: no alarm %s", part, code)
			}
			for _, d := range doubt {
				if code == d {
					t.Errorf("%s explains away %s", part, code)
				}
			}
		}
	}
	if len(drillExplains) != len(wire.DrillParts()) {
		t.Errorf("%d drills explain, of %d", len(drillExplains), len(wire.DrillParts()))
	}
}

// A drill's alarms are its own only while it has broken something, and only of what it has broken.
func TestDrillExplainsItsOwn(t *testing.T) {
	t.Parallel()
	sys, err := sysclock.Open()
	if err != nil {
		t.Fatal(err)
	}
	a := &Appliance{sys: sys}
	s := &drills{a: a}
	away := alarm.Condition{Code: alarm.MachineAway, Object: "b"}
	if got := s.explains(away); got != "" {
		t.Errorf("without a drill: %q", got)
	}
	d := &drill{DrillState: wire.DrillState{ID: "drill-1", Part: wire.DrillHSM, Machine: "b"}}
	s.now = d
	if got := s.explains(away); got != "" {
		t.Errorf("before the break: %q", got)
	}
	now := a.sys.Boot()
	d.began = now
	for _, c := range []struct {
		of   alarm.Condition
		want string
	}{
		{away, "drill-1"}, {alarm.Condition{Code: alarm.MachineAway, Object: "main"}, ""}, {alarm.Condition{Code: alarm.Fork}, ""}, {alarm.Condition{Code: alarm.SigningStopped}, "drill-1"},
	} {
		if got := s.explains(c.of); got != c.want {
			t.Errorf("%+v: %q, want %q", c.of, got, c.want)
		}
	}
	d.mended = now - drillSettles/2
	if got := s.explains(away); got != "drill-1" {
		t.Errorf("while it settles: %q", got)
	}
	d.mended = now - 2*drillSettles
	if got := s.explains(away); got != "" {
		t.Errorf("long after: %q", got)
	}
	d.mended, d.long = 0, time.Minute
	d.began = now - d.long - 2*drillSettles
	if got := s.explains(away); got != "" {
		t.Errorf("a break that does not end as was consented to: %q", got)
	}
	d.DrillState.Part, d.began = wire.DrillCA, now
	if a, b := s.explains(alarm.Condition{Code: alarm.ListDue, Object: "CN=x drill-1"}), s.explains(alarm.Condition{Code: alarm.ListDue, Object: "CN=hospital"}); a != "drill-1" || b != "" {
		t.Errorf("lists: %q, %q", a, b)
	}
}

// A disaster's drill is refused, with what to do, where it cannot be.
func TestMayDrillRestore(t *testing.T) {
	t.Parallel()
	c := &Config{}
	c.Evaluation.Softtoken = true
	if err := MayDrillRestore(c); err != nil {
		t.Error(err)
	}
	for _, c.HSM.PINSource = range []string{PINFromUnlock, PINFromTPM} {
		if err := MayDrillRestore(c); err == nil || !strings.Contains(err.Error(), "pins.locked") {
			t.Errorf("%s: %v", c.HSM.PINSource, err)
		}
	}
	c.Evaluation.Softtoken = false
	if err := MayDrillRestore(c); err == nil || !strings.Contains(err.Error(), "真正的密码机") {
		t.Error(err)
	}
}
