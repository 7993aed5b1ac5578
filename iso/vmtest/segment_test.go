package vmtest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/iso/layout"
	"yinjian/iso/vmtest"
)

// A segment is the network segment that a machine's card is on, with nothing between: a network namespace with a tap interface,
// which the test's thread is in, and what the test starts and listens with from then on. It notes what the machine sends.
type segment struct {
	mu   sync.Mutex // guards sent
	sent map[string]int
}

// The segment's addresses: the router, which is all that answers, the machine, and a host that is not there, which a network
// that means ill names as everything; far is behind the router.
const (
	segmentTap     = "segment"
	segmentRouter  = "10.0.2.2"
	segmentMachine = "10.0.2.20"
	segmentIll     = "10.0.2.66"
	segmentFar     = "198.51.100.7"
)

func newSegment(t *testing.T) *segment {
	t.Helper()
	runtime.LockOSThread() // for ever: the thread ends with the test, and the namespace with what is in it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("no network namespaces here: %v", err)
	}
	for _, argv := range [][]string{
		{"link", "set", "lo", "up"}, {"addr", "add", segmentFar + "/32", "dev", "lo"},
		{"tuntap", "add", "dev", segmentTap, "mode", "tap"}, {"link", "set", segmentTap, "txqueuelen", "10000"},
		{"addr", "add", segmentRouter + "/24", "dev", segmentTap}, {"link", "set", segmentTap, "up"},
	} {
		if out, err := exec.CommandContext(t.Context(), vmtest.Tool(t, "ip"), argv...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v: %s", argv, err, out)
		}
	}
	s := &segment{sent: map[string]int{}}
	tap, err := net.InterfaceByName(segmentTap)
	if err != nil {
		t.Fatal(err)
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err == nil {
		err = errors.Join(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: tap.Index}),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000}))
	}
	if err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		<-stopped
		unix.Close(fd)
	})
	go func() {
		defer close(stopped)
		frame := make([]byte, 1<<16)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, from, err := unix.Recvfrom(fd, frame, 0)
			if link, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || link.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			s.mu.Lock()
			s.sent[frameKind(frame[:n])]++
			s.mu.Unlock()
		}
	}()
	return s
}

// frameKind is what of a frame is looked at here.
func frameKind(b []byte) string {
	if len(b) < 42 {
		return "short"
	}
	switch p := b[14:]; binary.BigEndian.Uint16(b[12:]) {
	case unix.ETH_P_ARP:
		return "arp " + netip.AddrFrom4([4]byte(p[24:28])).String()
	case unix.ETH_P_IP:
		to, segment := netip.AddrFrom4([4]byte(p[16:20])).String(), p[int(p[0]&15)*4:]
		switch p[9] {
		case unix.IPPROTO_TCP:
			port := binary.BigEndian.Uint16(segment)
			switch flags := segment[13]; {
			case flags&0x12 == 0x12: // SYN, ACK
				return fmt.Sprintf("tcp open %d", port)
			case flags&0x04 != 0 && binary.BigEndian.Uint32(segment[4:]) == 0: // RST as an answer to SYN
				return fmt.Sprintf("tcp refused %d", port)
			case flags&0x12 == 0x02:
				return fmt.Sprintf("tcp connects %s:%d", to, binary.BigEndian.Uint16(segment[2:]))
			}
			return "tcp more"
		case unix.IPPROTO_UDP:
			return fmt.Sprintf("udp %s:%d", to, binary.BigEndian.Uint16(segment[2:]))
		case unix.IPPROTO_ICMP:
			kind := fmt.Sprintf("icmp %d/%d", segment[0], segment[1])
			if segment[0] == 3 && len(segment) >= 8+20+4 { // what it is about
				return fmt.Sprintf("%s udp %d", kind, binary.BigEndian.Uint16(segment[8+20+2:]))
			}
			return kind
		}
		return fmt.Sprintf("ip protocol %d", p[9])
	case unix.ETH_P_IPV6:
		return fmt.Sprintf("ipv6 %s to %s", netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])))
	}
	return fmt.Sprintf("ethertype %#x", binary.BigEndian.Uint16(b[12:]))
}

// kinds are those of the frames so far that begin with a prefix, in order.
func (s *segment) kinds(prefix string) (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for kind := range maps.Keys(s.sent) {
		if strings.HasPrefix(kind, prefix) {
			all = append(all, kind)
		}
	}
	slices.Sort(all)
	return all
}

// datagrams is a UDP socket on the segment, of a port of the router's.
func datagrams(t *testing.T, address string) net.PacketConn {
	t.Helper()
	onSegment := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) {
			err = errors.Join(unix.BindToDevice(int(fd), segmentTap), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20))
		}); e != nil {
			return e
		}
		return err
	}}
	conn, err := onSegment.ListenPacket(t.Context(), "udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// serve answers each datagram with what answer makes of it, nil for nothing.
func serve(conn net.PacketConn, to net.Addr, answer func([]byte) []byte) {
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			if to != nil {
				from = to
			}
			if reply := answer(b[:n]); reply != nil {
				_, _ = conn.WriteTo(reply, from)
			}
		}
	}()
}

// illDHCP gives the machine its address and its router, and with them all that a network can ask of a machine besides.
func illDHCP(t *testing.T) net.PacketConn {
	t.Helper()
	conn := datagrams(t, "0.0.0.0:67")
	ill, far := netip.MustParseAddr(segmentIll).AsSlice(), netip.MustParseAddr(segmentFar).AsSlice()
	serve(conn, &net.UDPAddr{IP: net.IPv4bcast, Port: 68}, func(query []byte) []byte {
		if len(query) < 241 || query[0] != 1 {
			return nil
		}
		kind := byte(0)
		for o := query[240:]; len(o) > 2 && o[0] != 255; {
			if o[0] == 0 {
				o = o[1:]
				continue
			}
			if o[0] == 53 {
				kind = o[2]
			}
			if len(o) < 2+int(o[1]) {
				break
			}
			o = o[2+int(o[1]):]
		}
		answer := map[byte]byte{1: 2, 3: 5}[kind] // an offer, an acknowledgement
		if answer == 0 {
			return nil
		}
		router := netip.MustParseAddr(segmentRouter).AsSlice()
		reply := make([]byte, 240)
		copy(reply, query[:240])
		reply[0] = 2
		copy(reply[16:], netip.MustParseAddr(segmentMachine).AsSlice())
		copy(reply[20:], router)
		clear(reply[44:236])
		for code, value := range map[byte][]byte{
			53: {answer}, 54: router, 51: {0, 0, 2, 88}, 1: {255, 255, 255, 0}, 3: router, // type, server, lease, mask, router
			6: ill, 42: ill, 12: []byte("ill"), 15: []byte("ill.test"), // DNS, NTP, host name, domain
			33:  append(bytes.Clone(far), ill...),                                                  // a static route, by host
			121: append(append([]byte{24, 198, 51, 100}, ill...), append([]byte{1, 0}, ill...)...), // and by prefix
		} {
			reply = append(append(reply, code, byte(len(value))), value...)
		}
		return append(reply, 255)
	})
	return conn
}

// names answers questions for addresses: far, whatever is asked.
func names(t *testing.T) {
	serve(datagrams(t, segmentRouter+":53"), nil, func(query []byte) []byte {
		if len(query) < 17 {
			return nil
		}
		end := 12 + bytes.IndexByte(query[12:], 0) + 5 // the name, type and class
		if end < 17 || end > len(query) {
			return nil
		}
		reply := append([]byte{query[0], query[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, query[12:end]...)
		if query[end-3] == 1 { // A
			reply[7] = 1
			reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4)
			reply = append(reply, netip.MustParseAddr(segmentFar).AsSlice()...)
		}
		return reply
	})
}

// illRouter says by IPv6 that it is the router, with a prefix to make addresses of and a name server.
func illRouter(t *testing.T) func() {
	t.Helper()
	tap, err := net.InterfaceByName(segmentTap)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err == nil {
		err = errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255), unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, tap.Index))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	ill := netip.MustParseAddr("2001:db8:66::").AsSlice()
	say := []byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0} // for 1800 s
	say = append(append(say, 3, 4, 64, 0xc0, 0, 0, 7, 8, 0, 0, 7, 8, 0, 0, 0, 0), ill...)
	say = append(append(say, 25, 3, 0, 0, 0, 0, 7, 8), ill...)
	nodes := &unix.SockaddrInet6{ZoneId: uint32(tap.Index), Addr: netip.MustParseAddr("ff02::1").As16()}
	return func() {
		t.Helper()
		for _, message := range [][]byte{say, {128, 0, 0, 0, 0, 1, 0, 1}} { // and an echo request, to whoever has an address
			if err := unix.Sendto(fd, message, 0, nodes); err != nil {
				t.Error(err)
			}
		}
	}
}

// answers says whether the machine's API takes a connection.
func answers() error {
	conn, err := net.DialTimeout("tcp4", fmt.Sprintf("%s:%d", segmentMachine, apiPort), 10*time.Second)
	if err == nil {
		conn.Close()
	}
	return err
}

// asks gets a page of the API's from the thread that calls, which an HTTP client would not.
func asks(path string) (string, error) {
	conn, err := net.DialTimeout("tcp4", fmt.Sprintf("%s:%d", segmentMachine, apiPort), 10*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second)) // interval
	secure := tls.Client(conn, anyTLS())
	if _, err := fmt.Fprintf(secure, "GET %s HTTP/1.1\r\nHost: yinjian\r\nConnection: close\r\n\r\n", path); err != nil {
		return "", err
	}
	b, err := io.ReadAll(secure)
	return string(b), err
}

// scanTCP asks every port for a connection, a few at a time, and gives each a while after one that is open has answered: what
// comes back later is noted all the same.
func scanTCP(t *testing.T) {
	t.Helper()
	to := netip.MustParseAddr(segmentMachine).As4()
	const some = 1024
	for first := 0; first < 1<<16; first += some {
		var open []int
		for port := max(1, first); port < first+some; port++ {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, fd)
			if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to, Port: port}); err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatal(err)
			}
		}
		time.Sleep(1100 * time.Millisecond) // each is asked a second time after one second
		if err := answers(); err != nil {
			t.Fatalf("at port %d: %v", first, err)
		}
		for _, fd := range open {
			unix.Close(fd)
		}
	}
}

// scanUDP sends every port a datagram, from a port that nobody has reason to trust and from that of DHCP servers'.
func scanUDP(t *testing.T, conn net.PacketConn) {
	t.Helper()
	to := &net.UDPAddr{IP: net.ParseIP(segmentMachine)}
	for to.Port = 1; to.Port < 1<<16; to.Port++ {
		if _, err := conn.WriteTo([]byte("?"), to); err != nil {
			t.Fatal(err)
		}
		if to.Port%512 == 0 {
			if err := answers(); err != nil { // it has read all of them
				t.Fatal(err)
			}
		}
	}
}

// From outside, on the machine's own network segment, with nothing between that could hide a port: it answers where docs/hardening.md
// says, and nowhere else, and sends nothing that it was not configured to. A DHCP server that names name servers, time servers and
// routes is believed its address and router, a router of IPv6 nothing.
func TestSegment(t *testing.T) {
	long(t)
	ping := vmtest.Tool(t, "ping")
	segment := newSegment(t)
	dhcp := illDHCP(t)
	names(t)
	sayIll := illRouter(t)
	answerTime(t, segmentRouter)
	answerTime(t, segmentFar)
	dir := t.TempDir()
	router := fmt.Sprintf("%s:%d", segmentRouter, timePort)
	s := &site{disk: vmtest.Disk(t, dir, 4<<30), tpm: filepath.Join(dir, "tpm"), time: router}
	files := s.files(`{"network": {"dns": ["` + segmentRouter + `"]}}`)
	files["answers.toml"] = strings.Replace(files["answers.toml"], router, fmt.Sprintf("%s\", \"shijian.test:%d", router, timePort), 1) + "[settings.listen]\ntsa_plain = \"0.0.0.0:3180\"\n[[settings.listen.tsa_sources]]\nname = \"pacs\"\naddresses = [\"10.0.2.0/24\"]\n"
	wired := func(m vmtest.Machine) vmtest.Machine {
		m.Ports, m.Host, m.Tap = nil, false, segmentTap
		return m
	}
	m := wired(s.firmware(t, "install"))
	m.CDROM, m.Disks = filepath.Join(built(t), "yinjian.iso"), append(m.Disks, vmtest.Label(t, layout.AnswersLabel, files))
	installs(t, vmtest.Start(t, m))
	if sent := segment.kinds(""); len(sent) > 0 {
		t.Errorf("the installation sends %q", sent)
	}

	v := vmtest.Start(t, wired(s.firmware(t, "segment")))
	v.Wait("数据卷已打开")
	sayIll()
	v.Wait("ADMINISTRATORS")
	until(t, "ready", func(context.Context) error {
		sayIll()
		said, err := asks("/health/ready")
		if err == nil && !strings.HasPrefix(said, "HTTP/1.1 200") {
			err = errors.New(said)
		}
		return err
	})
	record(t, "ready", v)
	until(t, "the time server that has a name is asked, past the route that DHCP gave", func(context.Context) error {
		if len(segment.kinds(fmt.Sprintf("udp %s:%d", segmentFar, timePort))) == 0 {
			return fmt.Errorf("%q", segment.kinds(""))
		}
		return nil
	})
	scanTCP(t)
	record(t, "every TCP port asked, twice", v)
	scanUDP(t, datagrams(t, segmentRouter+":40000"))
	scanUDP(t, dhcp)
	record(t, "every UDP port sent to, twice", v)
	if out, err := exec.CommandContext(t.Context(), ping, "-c", "3", "-W", "10", segmentMachine).CombinedOutput(); err != nil {
		t.Errorf("ping: %v: %s", err, out)
	}
	sayIll()
	v.After(5 * time.Second)
	v.Kill()

	t.Logf("%q", segment.kinds(""))
	got := slices.DeleteFunc(segment.kinds("tcp"), func(kind string) bool { return kind == "tcp refused 8443" }) // asked before it listened
	if want := []string{"tcp more", "tcp open 3180", "tcp open 8443", "tcp open 8444", "tcp refused 8445"}; !slices.Equal(got, want) {
		t.Errorf("by TCP it answers %q, want %q", got, want)
	}
	clock := fmt.Sprintf(":%d", timePort)
	may := []string{"udp 255.255.255.255:67", "udp " + segmentRouter + ":67", "udp " + segmentRouter + ":53", "udp " + segmentRouter + clock, "udp " + segmentFar + clock,
		"icmp 0/0", "icmp 3/3 udp 68", "arp " + segmentRouter, "arp " + segmentMachine}
	for _, kind := range segment.kinds("") {
		if !strings.HasPrefix(kind, "tcp ") && !slices.Contains(may, kind) {
			t.Errorf("it sends %s", kind)
		}
	}
}
