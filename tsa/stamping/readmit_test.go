package stamping_test

import (
	"errors"
	"testing"

	"yinjian/ntp"
	"yinjian/tsa/stamping"
)

// A waiting clock readmits once.
type waiting struct {
	standing
	left int
}

func (c *waiting) Readmit() error {
	if c.left == 0 {
		return errors.New("no majority waits")
	}
	c.left--
	return nil
}

// A readmission reaches the worker's clock, is refused where none waits, and where the clock knows of none.
func TestReadmit(t *testing.T) {
	t.Parallel()
	m := newMemory()
	clock := &waiting{standing(ntp.Reading{State: ntp.Suspect}), 1}
	workers := oneRow(m, clock)
	watch := stamping.NewWatch(standing(now))
	if err := watch.Readmit(t.Context(), "main", workers[0].w); err != nil || clock.left != 0 {
		t.Errorf("Readmit = %v", err)
	}
	if err := watch.Readmit(t.Context(), "main", workers[0].w); !errors.Is(err, stamping.ErrNotReadmitted) {
		t.Errorf("a second time: %v, want ErrNotReadmitted", err)
	}
	if err := watch.Readmit(t.Context(), "main", oneRow(m, standing(now))[0].w); err == nil || errors.Is(err, stamping.ErrNotReadmitted) {
		t.Errorf("a clock that cannot: %v", err)
	}
}
