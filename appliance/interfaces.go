package appliance

import (
	"bufio"
	"encoding/hex"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A hostInterface is a network interface of this machine with its addresses: of IPv4 the first one.
type hostInterface struct {
	name      string
	up        bool
	addresses []netip.Prefix
}

// hostInterfaces lists them without AF_NETLINK, which package net asks and the sandbox of the service does not have: by ioctl and /proc.
func hostInterfaces() ([]hostInterface, error) {
	list, err := os.Open("/proc/self/net/dev")
	if err != nil {
		return nil, err
	}
	defer list.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	six, err := addresses6()
	if err != nil {
		return nil, err
	}
	var out []hostInterface
	for lines := bufio.NewScanner(list); lines.Scan(); {
		name, _, ok := strings.Cut(lines.Text(), ":") // two lines of titles have none
		if !ok {
			continue
		}
		one := hostInterface{name: strings.TrimSpace(name)}
		flags, err := unix.NewIfreq(one.name)
		if err != nil {
			return nil, err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, flags); err != nil {
			continue // it is gone
		}
		one.up = flags.Uint16()&unix.IFF_UP != 0
		if ip, err := inet4(fd, one.name, unix.SIOCGIFADDR); err == nil {
			bits := 32
			if mask, err := inet4(fd, one.name, unix.SIOCGIFNETMASK); err == nil {
				bits, _ = net.IPMask(mask).Size()
			}
			if a, ok := netip.AddrFromSlice(ip); ok {
				one.addresses = append(one.addresses, netip.PrefixFrom(a, bits))
			}
		}
		one.addresses = append(one.addresses, six[one.name]...)
		out = append(out, one)
	}
	return out, nil
}

// inet4 asks for an address of an interface: netdevice(7).
func inet4(fd int, name string, what uint) ([]byte, error) {
	r, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(fd, what, r)
	}
	if err != nil {
		return nil, err
	}
	return r.Inet4Addr()
}

// addresses6 are the IPv6 addresses by interface: 32 digits, index, prefix length, scope, flags, name.
func addresses6() (map[string][]netip.Prefix, error) {
	text, err := os.ReadFile("/proc/self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string][]netip.Prefix{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 6 {
			continue
		}
		b, err := hex.DecodeString(f[0])
		bits, err2 := strconv.ParseUint(f[2], 16, 8)
		a, ok := netip.AddrFromSlice(b)
		if err != nil || err2 != nil || !ok {
			continue
		}
		out[f[5]] = append(out[f[5]], netip.PrefixFrom(a, int(bits)))
	}
	return out, nil
}
