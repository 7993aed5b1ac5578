package appliance

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
)

// What is found without netlink is what package net finds with it.
func TestHostInterfaces(t *testing.T) {
	t.Parallel()
	list, err := hostInterfaces()
	if err != nil {
		t.Fatal(err)
	}
	want, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) == 0 || len(list) < len(want) {
		t.Fatalf("%d interfaces, want %d", len(list), len(want))
	}
	for _, w := range want {
		i := slices.IndexFunc(list, func(h hostInterface) bool { return h.name == w.Name })
		if i < 0 {
			t.Errorf("%s is missing", w.Name)
			continue
		}
		if list[i].up != (w.Flags&net.FlagUp != 0) {
			t.Errorf("%s up: %v", w.Name, list[i].up)
		}
		var got, all []string
		for _, a := range list[i].addresses {
			got = append(got, a.String())
		}
		addresses, err := w.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		four := false
		for _, a := range addresses {
			if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil {
				if four {
					continue // of IPv4 the first alone
				}
				four = true
			}
			all = append(all, a.String())
		}
		slices.Sort(got)
		slices.Sort(all)
		if !slices.Equal(got, all) {
			t.Errorf("%s: %q, want %q", w.Name, got, all)
		}
	}
}

// The certificate that an appliance is born with fits the names and addresses by which clients call it, and nothing that the
// configuration allows keeps it from being made.
func TestReached(t *testing.T) {
	t.Parallel()
	interfaces := func() ([]hostInterface, error) {
		return []hostInterface{
			{"lo", true, []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix("::1/128")}},
			{"ens3", true, []netip.Prefix{netip.MustParsePrefix("10.1.0.10/24"), netip.MustParsePrefix("2001:db8::1/64"), netip.MustParsePrefix("fe80::1/64")}},
			{"ens4", false, []netip.Prefix{netip.MustParsePrefix("10.2.0.10/24")}},
		}, nil
	}
	for _, c := range []struct {
		listen Listen
		want   string
	}{
		{Listen{API: "127.0.0.1:0", Admin: "127.0.0.1:0"}, "[localhost] [127.0.0.1]"},
		{Listen{API: "localhost:0"}, "[localhost] []"},
		{Listen{API: "sign.example:8443", Admin: "10.1.0.11:8444"}, "[localhost sign.example] [10.1.0.11]"},
		{Listen{API: "0.0.0.0:8443", Admin: ":8444", Names: []string{"sign.example", "10.1.0.10", "10.1.0.99"}}, "[localhost sign.example] [10.1.0.10 2001:db8::1 10.1.0.99]"},
		{Listen{API: "[fe80::1%ens3]:8443", Names: []string{"sign_01", "sign.example.", "*"}}, "[localhost] []"},
	} {
		names, ips := c.listen.reached(interfaces)
		if got := fmt.Sprint(names, ips); got != c.want {
			t.Errorf("%+v: %s, want %s", c.listen, got, c.want)
		}
	}
	all := Listen{API: "[::]:8443"}
	if names, ips := all.reached(func() ([]hostInterface, error) { return nil, errors.New("none") }); fmt.Sprint(names, ips) != "[localhost] []" {
		t.Errorf("%v %v", names, ips)
	}
}
