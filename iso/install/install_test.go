//go:build linux

package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"yinjian/appliance/custody"
	"yinjian/iso/layout"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
)

const mib = 1 << 20

const whole = `{
  "disk": "sda", "wipe": "wipe-0123456789abcdef", "seal": "passphrase",
  "recovery": {"holders": ["赵", "钱", "孙"], "threshold": 2},
  "network": {"interface": "ens3", "address": "192.0.2.10/24", "gateway": "192.0.2.1", "dns": ["192.0.2.2", "2001:db8::1"]},
  "receiver": {"device": "ttyUSB0", "pps": true}
}`

// Every field, alone: what is wrong with it is told under its name.
func TestAnswersFieldByField(t *testing.T) {
	t.Parallel()
	a, err := parseAnswers([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	want := Answers{Disk: "sda", Wipe: "wipe-0123456789abcdef", Seal: sealPassphrase, Recovery: Recovery{[]string{"赵", "钱", "孙"}, 2},
		Network: Network{"ens3", "192.0.2.10/24", "192.0.2.1", []string{"192.0.2.2", "2001:db8::1"}}, Receiver: Receiver{"ttyUSB0", true}}
	if fmt.Sprint(a) != fmt.Sprint(want) {
		t.Errorf("read as %+v", a)
	}
	if a, err := parseAnswers([]byte("{}")); err != nil || a.Seal != sealTPM || a.Disk != "" {
		t.Errorf("without answers: %+v, %v", a, err)
	}
	for _, c := range []struct{ old, new, says string }{
		{`"sda"`, `"/dev/sda"`, "disk: "},
		{`"sda"`, `"s da"`, "disk: "},
		{`"sda"`, `5`, "disk: "},
		{`"disk": "sda", `, ``, "wipe: "},
		{`wipe-0123456789abcdef`, `yes`, "wipe: "},
		{`wipe-0123456789abcdef`, `wipe-0123456789ABCDEF`, "wipe: "},
		{`"passphrase"`, `""`, "seal: "},
		{`"passphrase"`, `"none"`, "seal: "},
		{`"threshold": 2`, `"threshold": 1`, "recovery: "},
		{`"threshold": 2`, `"threshold": 3`, "recovery: "},
		{`"threshold": 2`, `"threshold": "2"`, "recovery.threshold: "},
		{`["赵", "钱", "孙"]`, `[]`, "recovery.threshold: "},
		{`"赵", "钱"`, `"赵", "赵"`, "recovery: "},
		{`"赵"`, `""`, "recovery: "},
		{`"ttyUSB0"`, `"/dev/ttyUSB0"`, "receiver.device: "},
		{`"ttyUSB0"`, `"ttyUSB0\nCHRONY=/x"`, "receiver.device: "},
		{`"device": "ttyUSB0", `, ``, "receiver.pps: "},
		{`"ens3"`, `"ens3\n[Link]"`, "network.interface: "},
		{`"ens3"`, `"averyverylonginterface"`, "network.interface: "},
		{`192.0.2.10/24`, `192.0.2.10`, "network.address: "},
		{`192.0.2.10/24`, `192.0.2.10/33`, "network.address: "},
		{`192.0.2.10/24`, `127.0.0.1/8`, "network.address: "},
		{`192.0.2.10/24`, `0.0.0.0/0`, "network.address: "},
		{`"address": "192.0.2.10/24", `, ``, "network.gateway: "},
		{`"address": "192.0.2.10/24", "gateway": "192.0.2.1", `, `"gateway": "192.0.2.1", `, "network.gateway: "},
		{`"192.0.2.1"`, `"192.0.3.1"`, "network.gateway: "},
		{`"192.0.2.1"`, `"192.0.2.10"`, "network.gateway: "},
		{`"192.0.2.1"`, `"gateway"`, "network.gateway: "},
		{`"192.0.2.2"`, `"dns.example"`, "network.dns: "},
		{`"192.0.2.2"`, `"2001:db8::1"`, "network.dns: "},
		{`"192.0.2.2"`, `"192.0.2.3", "192.0.2.4", "192.0.2.5"`, "network.dns: "},
		{`"seal"`, `"saal"`, "unknown field"},
		{`"gateway"`, `"router"`, "unknown field"},
		{whole[len(whole)-1:], "", "EOF"},
		{whole[:1], "[", ""},
	} {
		text := strings.Replace(whole, c.old, c.new, 1)
		if c.old == whole[len(whole)-1:] {
			text = whole[:len(whole)-1]
		}
		if _, err := parseAnswers([]byte(text)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s → %s: %v; want %q", c.old, c.new, err, c.says)
		}
	}
	if _, err := parseAnswers([]byte(whole + "{}")); err == nil {
		t.Error("two objects are taken")
	}
	// All at once.
	_, err = parseAnswers([]byte(`{"disk": "/", "seal": "x", "network": {"address": "x"}}`))
	for _, field := range []string{"disk: ", "seal: ", "network.address: "} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%v; want %q as well", err, field)
		}
	}
}

func FuzzParseAnswers(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		a, err := parseAnswers(text)
		if err != nil {
			return
		}
		b, err := (&parcel{Answers: a}).encode()
		if err != nil {
			t.Fatal(err)
		}
		if p, err := readParcel(bytes.NewReader(b)); err != nil || fmt.Sprint(p.Answers) != fmt.Sprint(a) {
			t.Errorf("%+v comes back as %+v, %v", a, p, err)
		}
		if lines := strings.Count(a.Network.resolver(), "\n"); lines != len(a.Network.DNS) || strings.Count(a.Network.resolver(), "nameserver ") != lines {
			t.Errorf("a name server of an answer's own: %q", a.Network.resolver())
		}
		for _, line := range strings.Split(a.Network.file(), "\n") { // nothing of an answer opens a section or a key of its own
			if key, _, ok := strings.Cut(line, "="); line != "" && line != "[Match]" && line != "[Network]" && line != "[DHCPv4]" &&
				(!ok || !slices.Contains([]string{"Name", "LinkLocalAddressing", "IPv6AcceptRA", "LLMNR", "MulticastDNS", "LLDP", "DHCP", "Address", "Gateway", "DNS",
					"UseDNS", "UseNTP", "UseHostname", "UseDomains", "UseRoutes", "UseGateway"}, key)) {
				t.Errorf("a line of an answer's own: %q", line)
			}
		}
	})
}

// What the image's own file refuses of a network, the site's file refuses, too: it is read in its stead, not with it.
func TestNetworkRefusesWhatTheImageDoes(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../rootfs/etc/systemd/network/50-wired.network")
	if err != nil {
		t.Fatal(err)
	}
	wired, dhcp, ok := strings.Cut(string(text), "[DHCPv4]")
	if !ok {
		t.Fatal("50-wired.network says nothing of DHCP")
	}
	for _, c := range []struct {
		network Network
		want    string
	}{
		{Network{DNS: []string{"192.0.2.2"}}, wired + dhcp},
		{Network{Address: "192.0.2.10/24", Gateway: "192.0.2.1"}, wired},
	} {
		c.network.check(func(field, what string) { t.Errorf("%+v: %s: %s", c.network, field, what) })
		lines := strings.Split(c.network.file(), "\n")
		for line := range strings.Lines(c.want) {
			line = strings.TrimSpace(line)
			if key, _, setting := strings.Cut(line, "="); !setting || key[0] == '#' || key == "Type" || key == "DHCP" {
				continue
			}
			if !slices.Contains(lines, line) {
				t.Errorf("%+v: %s is missing", c.network, line)
			}
		}
	}
	if six := (&Network{Address: "2001:db8::2/64"}).file(); !strings.Contains(six, "LinkLocalAddressing=ipv6\n") {
		t.Errorf("no neighbour can be found by IPv6: %s", six)
	}
}

func FuzzReadParcel(f *testing.F) {
	b, err := (&parcel{Answers: Answers{Seal: sealTPM}, Appliance: []byte("node = \"a\"\n")}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := readParcel(bytes.NewReader(b))
		if err != nil {
			return
		}
		if err := p.Answers.check(); err != nil {
			t.Errorf("taken with %v", err)
		}
	})
}

func TestParcelTornOrAbsent(t *testing.T) {
	t.Parallel()
	b, err := (&parcel{Answers: Answers{Seal: sealTPM}, Appliance: []byte("x")}).encode()
	if err != nil {
		t.Fatal(err)
	}
	if p, err := readParcel(bytes.NewReader(b)); err != nil || string(p.Appliance) != "x" {
		t.Fatalf("%+v, %v", p, err)
	}
	text := bytes.TrimRight(b, "\x00")
	for at := range text {
		torn := bytes.Clone(b)
		clear(torn[at:])
		if _, err := readParcel(bytes.NewReader(torn)); !errors.Is(err, errNoParcel) {
			t.Fatalf("torn at %d: %v", at, err)
		}
	}
}

// memory is a disk that can fail.
type memory struct {
	bytes   []byte
	written int64
	fails   int64 // after so many bytes written; 0 is never
	flips   int64 // bit that the disk loses, by byte
}

var errCut = errors.New("power cut")

func (m *memory) ReadAt(p []byte, at int64) (int, error) {
	if at >= int64(len(m.bytes)) {
		return 0, io.EOF
	}
	n := copy(p, m.bytes[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	if m.fails > 0 && m.written+int64(len(p)) > m.fails {
		p = p[:m.fails-m.written]
		copy(m.bytes[at:], p)
		m.written = m.fails
		return len(p), errCut
	}
	m.written += int64(len(p))
	return copy(m.bytes[at:], p), nil
}

func (m *memory) Sync() error  { return nil }
func (m *memory) Close() error { return nil }
func (m *memory) Drop() error {
	if m.flips > 0 {
		m.bytes[m.flips] ^= 1
	}
	return nil
}

func testESP() []byte {
	esp := make([]byte, 3*mib/2)
	rand.NewChaCha8([32]byte{2}).Read(esp)
	return esp
}

func testJob(t *testing.T) (*job, []byte) {
	t.Helper()
	data := make([]byte, 200*layout.BlockSize)
	rand.NewChaCha8([32]byte{1}).Read(data)
	esp := testESP()
	tree, err := layout.NewTree("sha256", bytes.Repeat([]byte{3}, 32))
	if err != nil {
		t.Fatal(err)
	}
	tree.Write(data)
	root, behind, err := tree.Sum()
	if err != nil {
		t.Fatal(err)
	}
	return &job{
		line:  layout.CommandLine{Root: root, Media: layout.MediaISO, ESP: sha256.Sum256(esp)},
		image: layout.Image{Version: "0", Index: 1, Arch: "amd64", Variant: layout.Release, ESPBytes: 32 * mib, SlotBytes: 8 * mib},
		root:  bytes.NewReader(data), esp: bytes.NewReader(gz(t, esp)),
		parcel: &parcel{Answers: Answers{Seal: sealTPM}},
	}, append(data, behind...)
}

// gz is b as the medium has it.
func gz(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	_, err := z.Write(b)
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

const diskSize = 130 * mib

func TestWrite(t *testing.T) {
	t.Parallel()
	for _, sector := range []int64{512, 4096} {
		j, root := testJob(t)
		disk := &memory{bytes: bytes.Repeat([]byte("old "), diskSize/4)}
		if err := j.write(disk, diskSize, sector); err != nil {
			t.Fatal(err)
		}
		table, err := layout.ReadTable(disk, diskSize)
		if err != nil {
			t.Fatal(err)
		}
		var labels []string
		for _, p := range table.Partitions {
			labels = append(labels, p.Label)
		}
		if table.SectorSize != sector || !slices.Equal(labels, []string{layout.LabelESP, layout.LabelRootA, layout.LabelEmpty, layout.LabelData}) {
			t.Errorf("%d: %d %q", sector, table.SectorSize, labels)
		}
		if n := table.ByUUID(j.line.Root.PartitionUUID()); n != layout.NumberRootA {
			t.Errorf("%d: the root's UUID is that of partition %d", sector, n)
		}
		at := table.Offset(table.Partitions[layout.NumberRootA-1])
		if !bytes.Equal(disk.bytes[at:at+int64(len(root))], root) {
			t.Errorf("%d: the root is another", sector)
		}
		at = table.Offset(table.Partitions[layout.NumberData-1])
		if !bytes.Equal(disk.bytes[at:at+mib], make([]byte, mib)) {
			t.Errorf("%d: something is left at the beginning of the data", sector)
		}
	}
}

// Nothing that differs from what was signed, or from what was written, becomes an installation; and a power cut before
// the table leaves a disk that is as blank as it was.
func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil func(j *job, m *memory)
		says  string
	}{
		"another ESP":         {func(j *job, _ *memory) { j.line.ESP[5]++ }, "not what was signed"},
		"another root":        {func(j *job, _ *memory) { j.line.Root.Hash = bytes.Repeat([]byte{1}, 32) }, "not what was signed"},
		"a short root":        {func(j *job, _ *memory) { j.root = strings.NewReader("short") }, "not made of whole blocks"},
		"a short ESP":         {func(j *job, _ *memory) { j.esp = io.NewSectionReader(j.esp.(*bytes.Reader), 0, mib) }, "damaged, or is not read"},
		"an ESP not packed":   {func(j *job, _ *memory) { j.esp = strings.NewReader(strings.Repeat("MZ", mib)) }, "damaged, or is not read"},
		"more behind the ESP": {func(j *job, _ *memory) { j.esp = bytes.NewReader(append(gz(t, testESP()), gz(t, []byte{0})...)) }, "not what was signed"},
		"ESP without room":    {func(j *job, _ *memory) { j.esp = bytes.NewReader(gz(t, make([]byte, 32*mib+1))) }, "larger than its place"},
		"disk loses a bit":    {func(_ *job, m *memory) { m.flips = mib + 40 }, "not what is read"},
		"in the root":         {func(_ *job, m *memory) { m.flips = 33*mib + 40 }, "not what is read"},
		"in the answers":      {func(_ *job, m *memory) { m.flips = 41*mib + 40 }, "not what is read"},
		"power cut":           {func(_ *job, m *memory) { m.fails = 4*mib + 100 }, "power cut"},
		"power cut, answers":  {func(_ *job, m *memory) { m.fails = 4*mib + 3*mib/2 + 204*layout.BlockSize + 7 }, "power cut"},
	} {
		j, _ := testJob(t)
		disk := &memory{bytes: make([]byte, diskSize)}
		c.spoil(j, disk)
		if err := j.write(disk, diskSize, 512); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; want %q", name, err, c.says)
		}
		if blank, err := layout.Blank(disk, diskSize); err != nil || !blank {
			t.Errorf("%s: the disk does not count as blank any more (%v)", name, err)
		}
		if strings.Contains(name, "ESP") && disk.written > 0 {
			t.Errorf("%s: something was written before the medium was judged", name)
		}
	}
}

// cutDisk is a disk whose power goes at an operation of a number: of what was written since the last Sync it has then any of the sectors.
type cutDisk struct {
	memory
	held    []byte // what is on it for certain
	pending []extent
	left    int // operations before the cut
}

type extent struct {
	at   int64
	data []byte
}

func (c *cutDisk) spend() error {
	if c.left == 0 {
		return errCut
	}
	c.left--
	return nil
}

func (c *cutDisk) WriteAt(p []byte, at int64) (int, error) {
	c.pending = append(c.pending, extent{at, bytes.Clone(p)})
	if err := c.spend(); err != nil {
		return 0, err
	}
	return copy(c.bytes[at:], p), nil
}

func (c *cutDisk) Sync() error {
	if err := c.spend(); err != nil {
		return err
	}
	c.settle(func() bool { return true })
	c.pending = c.pending[:0]
	return nil
}

// settle puts those of the pending sectors that keep says on the disk, and answers what takes them off again.
func (c *cutDisk) settle(keep func() bool) (undo func()) {
	var before []extent
	for _, w := range c.pending {
		for n := 0; n < len(w.data); n += 512 {
			if keep() {
				place := c.held[w.at+int64(n):][:min(512, len(w.data)-n)]
				before = append(before, extent{w.at + int64(n), bytes.Clone(place)})
				copy(place, w.data[n:])
			}
		}
	}
	return func() {
		for _, e := range slices.Backward(before) {
			copy(c.held[e.at:], e.data)
		}
	}
}

// A power cut during any write or Sync, of which any of the sectors may have come to the disk, leaves a disk that counts as blank, or one
// that starts, by a protective MBR and the table at the start, which is what firmware reads; or, of a disk with something on it, what was
// there at its start and end, for which the token that was given is good.
func TestWriteCutAnywhere(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sector int64
		old    []byte
	}{"blank": {512, []byte{0}}, "blank, sectors of 4096": {4096, []byte{0}}, "not blank": {512, []byte("old ")}} {
		_, root := testJob(t)
		esp := testESP()
		old := bytes.Repeat(c.old, diskSize/len(c.old))
		seen, held := make([]byte, diskSize), make([]byte, diskSize)
		count := map[string]int{}
		judge := func(n int) string {
			after := &memory{bytes: held}
			blank, err := layout.Blank(after, diskSize)
			if err != nil {
				t.Fatal(err)
			}
			if blank {
				return "blank"
			}
			if bytes.Equal(held[:mib], old[:mib]) && bytes.Equal(held[diskSize-mib:], old[:mib]) {
				return "as it was"
			}
			table, err := layout.ReadTable(after, diskSize)
			if err != nil || held[510] != 0x55 || string(held[c.sector:c.sector+8]) != "EFI PART" {
				t.Errorf("%s, operation %d: neither blank nor to be started (%v)", name, n, err)
				return "lost"
			}
			at := func(number int) []byte { return held[table.Offset(table.Partitions[number-1]):] }
			if !bytes.HasPrefix(at(layout.NumberRootA), root) || !bytes.HasPrefix(at(layout.NumberESP), esp) {
				t.Errorf("%s, operation %d: a table before what it is of", name, n)
			}
			if _, err := readParcel(bytes.NewReader(at(layout.NumberRootB))); err != nil {
				t.Errorf("%s, operation %d: %v", name, n, err)
			}
			return "whole"
		}
		for n := 0; ; n++ {
			if n > 15 && n < 80 && n%8 > 0 { // the root's blocks: one is as another
				continue
			}
			copy(seen, old)
			copy(held, old)
			j, _ := testJob(t)
			disk := &cutDisk{memory: memory{bytes: seen}, held: held, left: n}
			err := j.write(disk, diskSize, c.sector)
			if err == nil {
				break // all operations were done
			}
			if !errors.Is(err, errCut) {
				t.Fatal(err)
			}
			random := rand.New(rand.NewPCG(1, uint64(n)))
			for _, of := range []int{1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 8, 8, 8, 8} { // all of them, one in two, one in eight
				undo := disk.settle(func() bool { return random.IntN(of) == 0 })
				count[judge(n)]++
				undo()
			}
			count[judge(n)]++ // none
		}
		t.Logf("%s: %v", name, count)
		if count["blank"] < 500 || count["whole"] < 100 || (count["as it was"] > 0) != (c.old[0] != 0) {
			t.Errorf("%s: %v", name, count)
		}
	}
}

func sysfs(disks map[string]map[string]string) fstest.MapFS {
	sys := fstest.MapFS{}
	for name, attributes := range disks {
		for a, value := range attributes {
			sys[name+"/"+a] = &fstest.MapFile{Data: []byte(value + "\n")}
		}
	}
	return sys
}

func TestDisksAndChoice(t *testing.T) {
	t.Parallel()
	const sectors = "262144" // 128 MiB
	sys := sysfs(map[string]map[string]string{
		"sda":     {"size": sectors, "ro": "0", "removable": "0", "queue/logical_block_size": "512", "device/wwid": "naa.5 00\x00"},
		"vdb":     {"size": sectors, "ro": "0", "removable": "0", "queue/logical_block_size": "4096", "serial": "S-7"},
		"nvme0n1": {"size": "2048", "ro": "0", "removable": "0", "queue/logical_block_size": "512"},
		"sdb":     {"size": sectors, "ro": "0", "removable": "1", "queue/logical_block_size": "512"},
		"sdc":     {"size": sectors, "ro": "1", "removable": "0", "queue/logical_block_size": "512"},
		"sdd":     {"size": sectors, "ro": "0", "removable": "0", "queue/logical_block_size": "512"}, // the answers are on sdd1
		"sr0":     {"size": sectors, "ro": "0", "removable": "1", "queue/logical_block_size": "2048"},
		"loop0":   {"size": sectors, "ro": "0", "removable": "0", "queue/logical_block_size": "512"},
	})
	usb := func(name string) { // a disk that the installed system could not start from
		delete(sys, name+"/size")
		const place = "devices/pci0000:00/0000:00:05.0/usb2/2-1/2-1:1.0/host3/block/"
		for _, a := range []struct{ name, value string }{{"size", sectors}, {"ro", "0"}, {"removable", "0"}, {"queue/logical_block_size", "512"}} {
			sys[place+name+"/"+a.name] = &fstest.MapFile{Data: []byte(a.value + "\n")}
		}
		sys[name] = &fstest.MapFile{Data: []byte(place + name), Mode: fs.ModeSymlink}
	}
	usb("sde")
	contents := map[string][]byte{"sda": make([]byte, 128*mib), "vdb": make([]byte, 128*mib), "nvme0n1": make([]byte, mib), "sde": make([]byte, 128*mib)}
	contents["vdb"][127*mib+5] = 1 // only at its end
	open := func(name string) (device, error) {
		if b, ok := contents[strings.TrimPrefix(name, "/dev/")]; ok {
			return &memory{bytes: b}, nil
		}
		return nil, os.ErrNotExist
	}
	disks, err := findDisks(sys, open, []string{"sr0", "sdd1"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range disks {
		names = append(names, d.name)
	}
	if !slices.Equal(names, []string{"nvme0n1", "sda", "vdb"}) || disks[1].serial != "naa.5_00" || !disks[1].blank || disks[2].blank {
		t.Fatalf("%+v", disks)
	}
	token := disks[2].token
	for name, c := range map[string]struct {
		a    Answers
		want string // a disk, or what the refusal says
	}{
		"the one blank":          {Answers{}, "sda"},
		"by name":                {Answers{Disk: "sda"}, "sda"},
		"by serial, wiped":       {Answers{Disk: "S-7", Wipe: token}, "vdb"},
		"not blank":              {Answers{Disk: "vdb"}, token},
		"token of another time":  {Answers{Disk: "vdb", Wipe: "wipe-0000000000000000"}, token},
		"token for a blank disk": {Answers{Disk: "sda", Wipe: token}, "sda"}, // cut off while it was wiped
		"too small":              {Answers{Disk: "nvme0n1"}, "too small"},
		"unknown":                {Answers{Disk: "sdz"}, "no such disk"},
	} {
		d, err := choose(disks, c.a, 100*mib)
		if err == nil && d.name != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v; want %q", name, d.name, err, c.want)
		}
	}
	if _, err := choose(disks, Answers{}, 1<<40); err == nil || !strings.Contains(err.Error(), "no blank disk") {
		t.Errorf("none is large enough: %v", err)
	}
	two := append(slices.Clone(disks), disk{name: "sdx", size: 128 * mib, sector: 512, blank: true})
	if _, err := choose(two, Answers{}, 100*mib); err == nil || !strings.Contains(err.Error(), "more than one") {
		t.Errorf("two blank disks: %v", err)
	}
	// The token is for what is on the disk now.
	contents["vdb"][127*mib+5] = 2
	if again, err := findDisks(sys, open, nil); err != nil || again[2].token == token {
		t.Errorf("another content, the same token: %+v, %v", again, err)
	}
}

func TestDialogue(t *testing.T) {
	t.Parallel()
	disks := []disk{{name: "sda", size: 128 * mib, sector: 512, token: "wipe-0123456789abcdef"}, {name: "vda", size: 128 * mib, sector: 512, blank: true}}
	talk := func(lines ...string) (Answers, string, string, error) {
		var out bytes.Buffer
		con := &console{in: bufio.NewReader(strings.NewReader(strings.Join(lines, "\n") + "\n")), out: &out}
		a, text, err := con.askAll(disks, 100*mib)
		return a, string(text), out.String(), err
	}
	a, text, said, err := talk("", "", "", "", "", "", "", "", "192.0.2.21:123", "zhang 张三", "li 李四", "wang 王五", "yes")
	if err != nil || a.Disk != "vda" || a.Wipe != "" || a.Seal != sealTPM || a.Network.Address != "" || a.check() != nil {
		t.Errorf("Enter throughout: %+v, %v\n%s", a, err, said)
	}
	if want := "node = 'benbu-1'\ncampus = '本部'\nlisten = '0.0.0.0:8443'\nadmin = '0.0.0.0:8444'\ntime_sources = ['192.0.2.21:123']\n\n[administrators]\naudit = 'wang:王五'\nsecurity = 'li:李四'\nsystem = 'zhang:张三'\n"; text != want {
		t.Errorf("for the appliance: %s", text)
	}
	a, text, said, err = talk("sdz", "sda", "yes", "wipe-0123456789abcdef", "none", "passphrase", "甲 乙", "甲 乙 丙", "3", "2",
		"ens3", "192.0.2.10", "192.0.2.10/24", "10.0.0.1", "192.0.2.1", "x", "192.0.2.2 192.0.2.3",
		"Dong Qu", "dongqu-1", "东区", "", "192.0.2.21", "192.0.2.21:123 [2001:db8::1]:123", "zhang", "z 张三", "zhang 张:三", "zhang 张三", "zhang 李四", "li 李四", "wang 王五", "no", "yes")
	want := Answers{"sda", "wipe-0123456789abcdef", sealPassphrase, Recovery{[]string{"甲", "乙", "丙"}, 2}, Network{"ens3", "192.0.2.10/24", "192.0.2.1", []string{"192.0.2.2", "192.0.2.3"}}, Receiver{}}
	if err != nil || fmt.Sprint(a) != fmt.Sprint(want) || !strings.Contains(text, "node = 'dongqu-1'") || !strings.Contains(text, "'[2001:db8::1]:123'") {
		t.Errorf("with slips: %+v, %v\n%s\n%s", a, err, text, said)
	}
	if _, _, _, err := talk("", "", "", "", "", "", "", "", "a:1", "zhang 张三", "li 李四", "wang 王五", "no"); !errors.Is(err, io.EOF) {
		t.Errorf("without the last yes: %v", err)
	}
}

// A real volume in a file: cryptsetup's own program formats it, opens it by the recovery key and refuses the key that was
// thrown away. Opening needs a kernel; --test-passphrase does not.
func TestVolumeKeys(t *testing.T) {
	t.Parallel()
	tool, err := exec.LookPath("cryptsetup")
	if err != nil {
		t.Skip("cryptsetup is missing: packaging/dev/deps.sh image")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "volume")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 32*mib); err != nil {
		t.Fatal(err)
	}
	var key []byte
	var calls []string
	v := &volume{image: layout.Image{LUKSCipher: "aes-xts-plain64", LUKSKeyBits: 512}, device: file, secret: dir}
	v.run = func(ctx context.Context, input []byte, program string, args ...string) ([]byte, error) {
		calls = append(calls, filepath.Base(program)+" "+args[0])
		if program != cryptsetup {
			return nil, nil
		}
		if args[0] == "luksFormat" {
			key, _ = os.ReadFile(filepath.Join(dir, "key"))
		}
		if args[0] == "luksAddKey" && !slices.Contains(args, "--pbkdf") { // a person's: slow on purpose
			args = append(slices.Clone(args), "--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4")
		}
		if args[0] == "open" { // no device mapper in a test
			args = append([]string{"open", "--test-passphrase"}, args[1:len(args)-1]...)
		}
		c := exec.CommandContext(ctx, tool, args...)
		c.Stdin = bytes.NewReader(input)
		out, err := c.CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
		return out, nil
	}
	var out bytes.Buffer
	v.con = &console{in: bufio.NewReader(strings.NewReader("short\nlong enough, really\nanother\nlong enough, really\nlong enough, really\n" + strings.Repeat("\n", 6))), out: &out}
	if err := v.make(t.Context(), Answers{Seal: sealPassphrase, Recovery: Recovery{[]string{"甲", "乙", "丙"}, 2}}); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if want := []string{"cryptsetup luksFormat", "cryptsetup luksAddKey", "cryptsetup luksAddKey", "cryptsetup open", "cryptsetup luksRemoveKey", "mkfs.ext4 -q"}; !slices.Equal(calls, want) {
		t.Errorf("%q", calls)
	}
	if v.made(t.Context()) {
		t.Error("the volume counts before it was said to")
	}
	if err := v.finish(t.Context()); err != nil || !v.made(t.Context()) {
		t.Errorf("it does not count afterwards: %v", err)
	}
	left, _ := filepath.Glob(dir + "/*")
	if !slices.Equal(left, []string{file}) {
		t.Errorf("left behind: %q", left)
	}
	opens := func(key []byte) bool {
		_, err := v.run(t.Context(), key, cryptsetup, "open", "--key-file", "-", file, "x")
		return err == nil
	}
	if len(key) != 64 || opens(key) {
		t.Error("the first key still opens the volume")
	}
	if !opens([]byte("long enough, really")) {
		t.Error("the passphrase does not open the volume")
	}
	// Shares as they stood on the screen, typed by two holders after a slip.
	screens := strings.Split(out.String(), "\x1b[2J")
	typed := func(i int) string { return screens[i][strings.Index(screens[i], "印鉴 密钥份额"):] + "\n\n" }
	one, three := strings.ReplaceAll(typed(0), "\r", ""), strings.ReplaceAll(typed(2), "\r", "")
	one, three = one[:strings.Index(one, "抄写")], three[:strings.Index(three, "抄写")]
	if _, err := custody.ParseShare(one); err != nil {
		t.Fatalf("%v:\n%s", err, one)
	}
	slip := strings.Replace(one, "1: ", "1: f", 1)
	var asked bytes.Buffer
	others, _, err := custody.Split(bytes.Repeat([]byte{5}, custody.SecretSize), purposeData, "another", []string{"甲", "乙", "丙"}, 2)
	if err != nil {
		t.Fatal(err)
	}
	// Three wrong passphrases, a slip, a share that is another volume's, one that is typed twice; then a new passphrase.
	v.con = &console{in: bufio.NewReader(strings.NewReader("\nwrong one\nwrong two\nwrong three\n" + oneBlock(slip) + oneBlock(others[1].String()) + oneBlock(one) +
		oneBlock(one) + oneBlock(one) + oneBlock(three) + "a new passphrase\na new passphrase\n")), out: &asked}
	if err := v.openOrRecover(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, asked.String())
	}
	rest := asked.String()
	for _, say := range []string{"3 tries", "WRONG PASSPHRASE", "2 tries", "WRONG PASSPHRASE", "1 tries", "WRONG PASSPHRASE", "LOCKED", "RECOVERY", "RECOVERY",
		"THESE DO NOT OPEN IT", "typed before", "RECOVERED", "NEW PASSPHRASE", "SEALED"} {
		_, after, ok := strings.Cut(rest, say)
		if !ok {
			t.Fatalf("%q is missing in:\n%s", say, asked.String())
		}
		rest = after
	}
	if opens([]byte("long enough, really")) || !opens([]byte("a new passphrase")) {
		t.Error("the new passphrase is not in the place of the one before")
	}
	// Without a recovery key nobody is asked for shares.
	if _, err := v.run(t.Context(), []byte("a new passphrase"), cryptsetup, "luksKillSlot", "--batch-mode", "--key-file", "-", file, recoverySlot); err != nil {
		t.Fatal(err)
	}
	asked.Reset()
	v.con.in = bufio.NewReader(strings.NewReader("wrong one\nwrong two\nwrong three\n" + oneBlock(one)))
	if err := v.openOrRecover(t.Context()); err == nil || !strings.Contains(err.Error(), "NO RECOVERY KEY") || strings.Contains(asked.String(), "RECOVERY:") {
		t.Errorf("without a recovery key: %v\n%s", err, asked.String())
	}
	// What is wrong with the machine counts as nobody's mistake.
	v.con.in = bufio.NewReader(strings.NewReader("a new passphrase\n"))
	cryptsetupRun := v.run
	v.run = func(ctx context.Context, input []byte, program string, args ...string) ([]byte, error) {
		if args[0] == "open" {
			args = append(slices.Clone(args[:len(args)-2]), file+".absent", "x")
		}
		return cryptsetupRun(ctx, input, program, args...)
	}
	if err := v.openOrRecover(t.Context()); err == nil || errors.Is(err, errLocked) {
		t.Errorf("no such device: %v", err)
	}
}

// A volume that was made whole is opened, and not formatted, though answers for a first start lie there again. What a power cut left
// of one is made anew, and so is what is none.
func TestWholeVolumeIsKept(t *testing.T) {
	t.Parallel()
	stop := errors.New("formatted")
	for name, c := range map[string]struct {
		header    string
		formatted bool
	}{
		"whole":             {`{"keyslots": {"1": {}}, "tokens": {"0": {"type": "yinjian-made"}}}`, false},
		"not whole":         {`{"keyslots": {"1": {}}, "tokens": {}}`, true},
		"not whole, sealed": {`{"keyslots": {"1": {}}, "tokens": {"0": {"type": "systemd-tpm2"}}}`, true},
		"none":              {"", true},
	} {
		v := &volume{secret: t.TempDir(), con: &console{in: bufio.NewReader(strings.NewReader("the passphrase\n")), out: io.Discard}}
		v.run = func(_ context.Context, _ []byte, _ string, args ...string) ([]byte, error) {
			switch args[0] {
			case "luksFormat":
				return nil, stop
			case "luksDump":
				if c.header == "" {
					return nil, errors.New("no header")
				}
				return []byte(c.header), nil
			}
			return nil, nil
		}
		err := begin(t.Context(), v, &parcel{Answers: Answers{Seal: sealPassphrase}})
		if errors.Is(err, stop) != c.formatted || err != nil && !c.formatted {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHeader(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][2]bool{
		`{"keyslots": {"0": {}, "7": {}}, "tokens": {"0": {"type": "systemd-tpm2"}}}`: {true, true},
		`{"keyslots": {"1": {}}, "tokens": {"0": {"type": "systemd-tpm2"}}}`:          {true, false},
		`{"keyslots": {"1": {}, "7": {}}, "tokens": {}}`:                              {false, true},
		`{"keyslots": {"1": {}}, "tokens": {}}`:                                       {false, false},
		`{"keyslots": {"7": {}}, "tokens": {}}`:                                       {true, true}, // cut off while it was sealed to another TPM
	} {
		v := &volume{run: func(context.Context, []byte, string, ...string) ([]byte, error) { return []byte(text), nil }}
		if h, err := v.header(t.Context()); err != nil || h.tpm() != want[0] || h.recovery() != want[1] {
			t.Errorf("%s: %+v, %v", text, h, err)
		}
	}
}

// A provisioning that was cut off begins anew at the next start; an appliance that has a journal, or whose answers were
// used up, keeps everything.
func TestBeginAnew(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ has, left []string }{
		"not begun":       {[]string{"answers.toml"}, []string{"answers.toml"}},
		"half":            {[]string{"answers.toml", ".init-unfinished", "secrets/a.pin", "run/lock"}, []string{"answers.toml"}},
		"whole, untold":   {[]string{"answers.toml", "config.toml", "secrets/a.pin"}, []string{"answers.toml"}},
		"has run":         {[]string{"answers.toml", "config.toml", "journal/1"}, []string{"answers.toml", "config.toml", "journal/1"}},
		"told":            {[]string{"config.toml", "secrets/a.pin"}, []string{"config.toml", "secrets/a.pin"}},
		"without answers": {[]string{"secrets/a.pin"}, []string{"secrets/a.pin"}},
	} {
		dir := t.TempDir()
		for _, file := range c.has {
			at := filepath.Join(dir, file)
			if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o700), os.WriteFile(at, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		if err := beginAnew(dir); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var left []string
		err := filepath.WalkDir(dir, func(at string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				left = append(left, strings.TrimPrefix(at, dir+"/"))
			}
			return err
		})
		if err != nil || !slices.Equal(left, c.left) {
			t.Errorf("%s: left %q, %v; want %q", name, left, err, c.left)
		}
	}
}

// Answers with which the machine could not be reached are refused before anything is written.
func TestReachable(t *testing.T) {
	t.Parallel()
	const good = "listen = \"0.0.0.0:8443\"\nadmin = \"192.0.2.10:8444\"\npin_source = \"file\"\n[administrators]\nsystem = \"zhang:张三\"\n"
	if err := reachable([]byte(good)); err != nil {
		t.Error(err)
	}
	const set = "[settings.listen]\napi = \"0.0.0.0:8443\"\n[settings.hsm]\nprofile = \"neutral\"\n"
	if err := reachable([]byte(strings.Replace(good, "0.0.0.0:8443", "127.0.0.1:0", 1) + set)); err != nil {
		t.Errorf("what the settings mend: %v", err)
	}
	for _, c := range []struct{ old, new, says string }{
		{"0.0.0.0:8443", "127.0.0.1:8443", "listen: "},
		{"0.0.0.0:8443", "0.0.0.0:0", "listen: "},
		{"0.0.0.0:8443", "0.0.0.0", "listen: "},
		{"listen = \"0.0.0.0:8443\"\n", "", "listen: "},
		{"192.0.2.10:8444", "[::1]:8444", "admin: "},
		{"192.0.2.10:8444", "localhost:8444", "admin: "},
		{"admin = \"192.0.2.10:8444\"\n", "", "admin: "},
		{"[administrators]\nsystem = \"zhang:张三\"\n", "", "administrators: "},
		{"\"file\"", "\"unlock\"", "pin_source: "},
		{"\"file\"", "\"tpm\"", "pin_source: "},
		{"listen =", "listen", "toml"},
		{"[admin", "[settings.listen]\nadmin = \"127.0.0.1:8444\"\n[admin", "settings.listen.admin: "},
		{"[admin", "[settings.listen]\nadmin = \"\"\n[admin", "settings.listen.admin: "},
		{"[admin", "[settings.listen]\napi = \"[::1]:8443\"\n[admin", "settings.listen.api: "},
		{"[admin", "[settings.hsm]\npin_source = \"unlock\"\n[admin", "settings.hsm.pin_source: "},
		{"[admin", "[settings.admin]\nlocal = \"open\"\n[admin", "settings.admin.local: "},
	} {
		if err := reachable([]byte(strings.Replace(good, c.old, c.new, 1))); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s → %s: %v; want %q", c.old, c.new, err, c.says)
		}
	}
}

// A machine that is to be restored says where it waits for the backup, and nothing else has to be known of it.
func TestReachableForABackup(t *testing.T) {
	t.Parallel()
	if err := reachable([]byte("restore = \"0.0.0.0:8444\"\n")); err != nil {
		t.Error(err)
	}
	for _, at := range []string{"127.0.0.1:8444", "0.0.0.0:0", "localhost:8444", "0.0.0.0"} {
		if err := reachable([]byte("restore = \"" + at + "\"\n")); err == nil || !strings.Contains(err.Error(), "restore: ") {
			t.Errorf("%s: %v", at, err)
		}
	}
}

// The answers stay for as long as the appliance waits for its backup, over a restore that was cut off, and no longer.
func TestWaitsForBackup(t *testing.T) {
	t.Parallel()
	const restores, makes = "restore = \"0.0.0.0:8444\"\n", "node = \"benbu-1\"\n"
	for name, c := range map[string]struct {
		answers string
		has     []string
		want    bool
	}{
		"waits":           {restores, nil, true},
		"cut off":         {restores, []string{"config.toml", restoreUnfinished}, true},
		"restored":        {restores, []string{"config.toml", "restored"}, false},
		"to be made":      {makes, nil, false},
		"without answers": {"", nil, false},
	} {
		dir := t.TempDir()
		files := map[string]string{}
		for _, file := range c.has {
			files[file] = ""
		}
		if c.answers != "" {
			files[applianceAnswers] = c.answers
		}
		for file, text := range files {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := waitsForBackup(dir); got != c.want || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, applianceAnswers), []byte("restore = "), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := waitsForBackup(dir); err == nil {
		t.Error("answers that cannot be read are taken for some that can")
	}
}

// oneBlock is a share without empty lines inside, and one behind.
func oneBlock(share string) string {
	var b strings.Builder
	for line := range strings.Lines(share) {
		if strings.TrimSpace(line) != "" {
			b.WriteString(strings.TrimRight(line, "\n") + "\n")
		}
	}
	return b.String() + "\n"
}

// The hospital's key goes the way of the answers, and what is none is refused before anything is written.
func TestHospitalKey(t *testing.T) {
	t.Parallel()
	key, err := sm2.GenerateKey(crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := smx509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	disk := func(key []byte) string {
		dir := t.TempDir()
		for name, text := range map[string][]byte{"answers.json": []byte("{}"), applianceAnswers: []byte("x"), hospitalKey: key} {
			if text == nil {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	p, err := readAnswers(disk(public))
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.encode()
	if err != nil {
		t.Fatal(err)
	}
	if p, err = readParcel(bytes.NewReader(b)); err != nil || !bytes.Equal(p.Hospital, public) {
		t.Errorf("%q, %v", p.Hospital, err)
	}
	if p, err := readAnswers(disk(nil)); err != nil || p.Hospital != nil {
		t.Errorf("none: %v, %v", p, err)
	}
	for _, bad := range [][]byte{{}, []byte("-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"), public[:60]} {
		if _, err := readAnswers(disk(bad)); err == nil || !strings.Contains(err.Error(), hospitalKey) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// An image below what a good one has allowed does not start; nor does any when that cannot be read.
func TestNotBelow(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "least")
	image := layout.Image{Index: 2}
	if err := notBelow(image, file); err != nil {
		t.Errorf("nothing was ever kept: %v", err)
	}
	for text, want := range map[string]bool{"1\n": true, "2\n": true, "3\n": false, "": false, "two": false} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := notBelow(image, file); (err == nil) != want {
			t.Errorf("image 2 and %q: %v", text, err)
		}
	}
}
