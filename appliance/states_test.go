package appliance

import (
	"io"
	"testing"

	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/appliance/problem"
)

// Two who ask for a start at a time get one: whoever asks while it begins is not heard after it has failed.
func TestOneStartForTwo(t *testing.T) {
	t.Parallel()
	log := logrus.New()
	log.SetOutput(io.Discard)
	h := &house{log: log, again: make(chan struct{}, 1), state: api.Failed, failure: &failure{}}
	for range 2 {
		if _, err := h.RetryStart(t.Context(), "local", api.RetryStart{}); err != nil {
			t.Fatal(err)
		}
	}
	<-h.again                                                                       // the first is heard
	if _, err := h.RetryStart(t.Context(), "local", api.RetryStart{}); err != nil { // before the start begins
		t.Fatal(err)
	}
	h.begins()
	if _, err := h.RetryStart(t.Context(), "local", api.RetryStart{}); problem.CodeOf(err) != problem.WrongState {
		t.Errorf("during the start: %v", err)
	}
	if len(h.again) != 0 {
		t.Error("after this start there would be another")
	}
}
