package vmtest_test

import "testing"

// The power button has the services end in order and the machine switched off; it comes back as it was.
func TestPowerButton(t *testing.T) {
	long(t)
	s, b := inUse(t)
	v := s.boot(t)
	c := b.client(t, v)
	ready(t, c)
	first := sign(t, c, "n-2")
	v.PowerButton()
	v.Ended()
	record(t, "switched off by the button", v)

	v = s.boot(t)
	c = b.client(t, v)
	ready(t, c)
	if again := sign(t, c, "n-2"); !again.Replayed || again.RecordID != first.RecordID {
		t.Errorf("the record is %s, was %s", again.RecordID, first.RecordID)
	}
}
