// Package porttest gives tests a port for what is told its port by a file or an argument: a daemon, an appliance that goes and comes
// back.
package porttest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"testing"
)

// Ports are given out of those below the ones that the kernel gives to connections (from 32768 on): none of the many connections of
// the tests that run at the same time has the port between the asking and the listening.
const first, count = 20_000, 12_000

// Free is an address on loopback on which nobody listens, by TCP or UDP, and which no other caller gets until the test has ended:
// of this process or of another, such as a second run of the suite on this machine.
func Free(t testing.TB) string {
	t.Helper()
	for range 1000 {
		port := strconv.Itoa(first + rand.IntN(count))
		// Whoever holds the name has the port. It goes with the process, however that ends.
		claim, err := net.Listen("unix", "@yinjian-test-port-"+port)
		if err != nil {
			continue
		}
		addr := net.JoinHostPort("127.0.0.1", port)
		if err := vacant(addr); err != nil {
			claim.Close()
			continue
		}
		t.Cleanup(func() { claim.Close() })
		return addr
	}
	t.Fatal("no port is free")
	return ""
}

func vacant(addr string) error {
	l, err := net.Listen("tcp4", addr)
	if err != nil {
		return fmt.Errorf("porttest: %w", err)
	}
	l.Close()
	c, err := net.ListenPacket("udp4", addr)
	if err != nil {
		return fmt.Errorf("porttest: %w", err)
	}
	c.Close()
	return nil
}
