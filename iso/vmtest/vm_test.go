package vmtest

import (
	"context"
	"errors"
	"testing"
)

func TestSerialWait(t *testing.T) {
	t.Parallel()
	s := &serial{changed: make(chan struct{})}
	running := make(chan struct{})
	s.Write([]byte("one two"))
	if got, err := s.wait(t.Context(), running, []string{"three", "two", "one"}); got != "one" || err != nil {
		t.Errorf("the first of them: %q, %v", got, err)
	}
	go func() {
		s.Write([]byte(" thr"))
		s.Write([]byte("ee one"))
	}()
	if got, err := s.wait(t.Context(), running, []string{"three"}); got != "three" || err != nil {
		t.Errorf("in two pieces: %q, %v", got, err)
	}
	if got, err := s.wait(t.Context(), running, []string{"two", "one"}); got != "one" || err != nil {
		t.Errorf("what was waited for is behind us: %q, %v", got, err)
	}
	late, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.wait(late, running, []string{"one"}); !errors.Is(err, context.Canceled) {
		t.Errorf("nothing more comes: %v", err)
	}
	s.Write([]byte(" last"))
	close(running)
	if got, err := s.wait(t.Context(), running, []string{"last"}); got != "last" || err != nil {
		t.Errorf("last words: %q, %v", got, err)
	}
	if _, err := s.wait(t.Context(), running, []string{"last"}); !errors.Is(err, errEnded) {
		t.Errorf("after the end: %v", err)
	}
}
