package main_test

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance"
	"yinjian/dbdriver/dbtest"
)

// A land has two network namespaces, one for each campus, and three lines: from this namespace to either campus, for clients,
// time servers and whoever administers, and between the two, which alone is cut. The database is reached over its Unix
// socket, which namespaces of the network do not part.
type land struct {
	base     int          // of its 32 addresses in 198.18.0.0/15: RFC 2544's, which nobody routes
	names    [2]string    // of the namespaces
	peerLine [2]string    // ends of the line between them
	dataLine [2][2]string // ends of the lines to the database here and in either namespace; "" before databaseLines
}

// newLand makes it; the test is skipped without the right to.
func newLand(t *testing.T) *land {
	t.Helper()
	need(t, "ip", "nsenter")
	if os.Getuid() != 0 {
		t.Skip("not root: no network namespaces")
	}
	var id [3]byte
	rand.Read(id[:])
	tag := hex.EncodeToString(id[:])
	l := &land{base: vacantAddresses(t)}
	ip := func(args ...string) error {
		out, err := exec.Command("ip", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	for i, side := range []string{"a", "b"} {
		l.names[i], l.peerLine[i] = "yj"+side+tag, "p"+side+tag
		if err := ip("netns", "add", l.names[i]); err != nil {
			t.Skipf("no network namespaces here: %v", err)
		}
		t.Cleanup(func() { _ = ip("netns", "del", l.names[i]) }) // with what is in it
		if err := ip("-n", l.names[i], "link", "set", "lo", "up"); err != nil {
			t.Fatal(err)
		}
	}
	for i, side := range []string{"a", "b"} {
		l.line(t, "m"+side+tag, "", l.address(4*i+1), "n"+side+tag, l.names[i], l.address(4*i+2))
	}
	l.line(t, l.peerLine[0], l.names[0], l.address(9), l.peerLine[1], l.names[1], l.address(10))
	return l
}

// line lays one from one end, in a namespace or here (""), to another.
func (l *land) line(t *testing.T, end0, ns0, address0, end1, ns1, address1 string) {
	t.Helper()
	ipIn(t, ns0, "link", "add", end0, "type", "veth", "peer", "name", end1, "netns", ns1)
	if ns0 == "" {
		t.Cleanup(func() { _ = exec.Command("ip", "link", "del", end0).Run() })
	}
	for _, e := range [][3]string{{end0, ns0, address0}, {end1, ns1, address1}} {
		ipIn(t, e[1], "addr", "add", e[2]+"/30", "dev", e[0])
		ipIn(t, e[1], "link", "set", e[0], "up")
	}
}

// databaseLines lays a line to a database from either campus, and answers the addresses it is reached at.
func (l *land) databaseLines(t *testing.T) (at [2]string) {
	t.Helper()
	for i := range 2 {
		l.dataLine[i] = [2]string{strings.Replace(l.peerLine[i], "p", "d", 1), strings.Replace(l.peerLine[i], "p", "q", 1)}
		at[i] = l.address(13 + 4*i)
		l.line(t, l.dataLine[i][0], "", at[i], l.dataLine[i][1], l.names[i], l.address(14+4*i))
	}
	return at
}

// losePackets has every packet between campus i and the database lost without a word, findPackets ends that.
func (l *land) losePackets(t *testing.T, i int) {
	t.Helper()
	ipIn(t, "", "neigh", "replace", l.address(14+4*i), "lladdr", nobodys, "dev", l.dataLine[i][0], "nud", "permanent")
	ipIn(t, l.names[i], "neigh", "replace", l.address(13+4*i), "lladdr", nobodys, "dev", l.dataLine[i][1], "nud", "permanent")
}

func (l *land) findPackets(t *testing.T, i int) {
	t.Helper()
	ipIn(t, "", "neigh", "del", l.address(14+4*i), "dev", l.dataLine[i][0])
	ipIn(t, l.names[i], "neigh", "del", l.address(13+4*i), "dev", l.dataLine[i][1])
}

// nobodys is the address of a station that is not there.
const nobodys = "02:00:00:00:00:99"

func (l *land) address(n int) string {
	return fmt.Sprintf("198.%d.%d.%d", 18+l.base>>16, l.base>>8&255, l.base&255+n)
}

// vacantAddresses is a block of 32 addresses that no other land has until the test has ended, of this run or of another on this
// machine: two lands with the same addresses here would get each other's packets.
func vacantAddresses(t *testing.T) int {
	t.Helper()
	for range 1000 {
		base := mathrand.IntN(1<<17/32) * 32
		if claim, err := net.Listen("unix", fmt.Sprintf("@yinjian-test-land-%d", base)); err == nil {
			t.Cleanup(func() { claim.Close() })
			return base
		}
	}
	t.Fatal("no addresses are free")
	return 0
}

// here is this namespace's address as campus i sees it, at is the campus's as this namespace sees it, and peer the one that
// the other campus sees.
func (l *land) here(i int) string { return l.address(4*i + 1) }
func (l *land) at(i int) string   { return l.address(4*i + 2) }
func (l *land) peer(i int) string { return l.address(9 + i) }

func (l *land) ip(t *testing.T, i int, args ...string) { t.Helper(); ipIn(t, l.names[i], args...) }

// ipIn runs ip in a namespace, "": in this one.
func ipIn(t *testing.T, ns string, args ...string) {
	t.Helper()
	if ns != "" {
		args = append([]string{"-n", ns}, args...)
	}
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// cut takes the line between the campuses down, as a pulled cable does; mend brings it back.
func (l *land) cut(t *testing.T)  { t.Helper(); l.ip(t, 0, "link", "set", l.peerLine[0], "down") }
func (l *land) mend(t *testing.T) { t.Helper(); l.ip(t, 0, "link", "set", l.peerLine[0], "up") }

// swallow has every packet between the campuses lost without a word, as a firewall that drops: each side sends to a station
// that is not there. release ends that.
func (l *land) swallow(t *testing.T) {
	t.Helper()
	for i := range 2 {
		l.ip(t, i, "neigh", "replace", l.peer(1-i), "lladdr", nobodys, "dev", l.peerLine[i], "nud", "permanent")
	}
}

func (l *land) release(t *testing.T) {
	t.Helper()
	for i := range 2 {
		l.ip(t, i, "neigh", "del", l.peer(1-i), "dev", l.peerLine[i])
	}
}

// inside is a program that is the binary in the namespace of campus i.
func (l *land) inside(t *testing.T, i int, binary string) string {
	t.Helper()
	name := filepath.Join(tempDir(t), "inside")
	script := fmt.Sprintf("#!/bin/sh\nexec nsenter --net=/run/netns/%s %s \"$@\"\n", l.names[i], binary)
	if err := os.WriteFile(name, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

// A campus is an appliance in a land.
type campus struct {
	*machine
	land  *land
	i     int
	time  *timeServer
	place string // folder
}

var campusNames = [2]string{"本部", "滨海"}

// newCampus makes the appliance of campus i, on the database. It does not start it.
func newCampus(t *testing.T, l *land, i int, dsn string, change ...func(*appliance.Config)) *campus {
	t.Helper()
	c := &campus{land: l, i: i, time: startTimeServerOn(t, l.here(i))}
	c.place = initAppliance(t, c.time, "--node", [2]string{"benbu-1", "binhai-1"}[i], "--campus", campusNames[i])
	configure(t, c.place, func(cfg *appliance.Config) {
		cfg.Listen.API, cfg.Listen.TSAPlain = net.JoinHostPort(l.at(i), "8443"), ""
		cfg.Listen.Peer = net.JoinHostPort(l.peer(i), "8445")
		cfg.Peer.CosignEvery = appliance.Duration(1e9)
		cfg.Database.DSN = dsn
		for _, f := range change {
			f(cfg)
		}
	})
	return c
}

func (c *campus) launch(t *testing.T, more ...string) {
	t.Helper()
	c.machine = launchBinary(t, c.land.inside(t, c.i, built.binary), c.place, more...)
}

func (c *campus) serve(t *testing.T) {
	t.Helper()
	c.launch(t)
	c.await(t)
	c.trusted(t)
}

// peerOf is what is known of the other campus.
type peerOf struct {
	Node, Split, Accused string
	Up                   bool
	AgeS                 float64 `json:"age_s"`
	Seen                 uint64  `json:"seen_entries"`
	Given                uint64  `json:"cosigned_entries"`
	Gotten               uint64  `json:"confirmed_entries"`
	Applied              uint64  `json:"applied_entries"`
	Error                string  `json:"last_error"`
}

func (m *machine) peer(t *testing.T) *peerOf {
	t.Helper()
	a := m.admin()
	defer a.Close()
	b, err := a.PeerStatus(t.Context())
	var s struct{ Peer *peerOf }
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	if s.Peer == nil {
		return &peerOf{}
	}
	return s.Peer
}

// card makes a card and answers its file and fingerprint.
func (m *machine) card(t *testing.T) (file, fingerprint string) {
	t.Helper()
	file = filepath.Join(tempDir(t), "card.json")
	var out struct{ Fingerprint string }
	o := mustRun(t, "peer", "card", "--dir", m.dir, "--out", file, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &out); err != nil {
		t.Fatalf("%v: %v", err, o)
	}
	return file, out.Fingerprint
}

// believe has m accept a card.
func (m *machine) believe(t *testing.T, file, fingerprint string) {
	t.Helper()
	mustRun(t, "peer", "add", "--dir", m.dir, "--card", file, "--fingerprint", fingerprint, "--reason", "test", "--confirmed-by", "张三", "--confirmed-by", "李四")
}

// pairUp has both accept each other's card, and waits until each has the other's directory.
func pairUp(t *testing.T, a, b *machine) {
	t.Helper()
	fileA, printA := a.card(t)
	fileB, printB := b.card(t)
	a.believe(t, fileB, printB)
	b.believe(t, fileA, printA)
	for _, m := range []*machine{a, b} {
		eventually(t, readyWithin, "the other campus answers", func() bool { p := m.peer(t); return p.Up && p.Gotten > 0 })
	}
}

// twoCampuses are two appliances, each with an application and two signers of its own, paired, over one PostgreSQL.
func twoCampuses(t *testing.T) (l *land, a, b *campus) {
	t.Helper()
	l = newLand(t)
	pg := dbtest.StartPostgres(t)
	dsn := pg.DSN(pg.Fresh(t))
	a, b = newCampus(t, l, 0, dsn), newCampus(t, l, 1, dsn)
	a.launch(t)
	b.launch(t)
	for i, c := range []*campus{a, b} {
		c.await(t)
		c.trusted(t)
		c.register(t, [2]string{"his", "emr"}[i], "--consent", "app-asserted")
		for _, id := range []string{"1001", "1002"} {
			c.enrol(t, [2]string{"A", "B"}[i]+id, "")
		}
	}
	pairUp(t, a.machine, b.machine)
	return l, a, b
}

// longOnly skips a test whose appliances the short form has no time for.
func longOnly(t *testing.T) {
	t.Helper()
	if os.Getenv("YINJIAN_LONG") == "" {
		t.Skip("with YINJIAN_LONG=1 only")
	}
}
