package porttest_test

import (
	"net"
	"testing"

	"yinjian/packaging/porttest"
)

// Ports are vacant, and nobody else's while the test runs.
func TestFree(t *testing.T) {
	t.Parallel()
	given := map[string]bool{}
	for range 300 {
		addr := porttest.Free(t)
		if given[addr] {
			t.Errorf("%s is given twice", addr)
		}
		given[addr] = true
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		if l, err := net.Listen("unix", "@yinjian-test-port-"+port); err == nil {
			l.Close()
			t.Errorf("another process could have %s", addr)
		}
		l, err := net.Listen("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
	var once string
	t.Run("ended", func(t *testing.T) { once = porttest.Free(t) })
	_, port, err := net.SplitHostPort(once)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", "@yinjian-test-port-"+port)
	if err != nil {
		t.Fatalf("a port is kept after the test: %v", err)
	}
	l.Close()
}
