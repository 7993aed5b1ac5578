package layout_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"yinjian/iso/layout"
)

const diskBytes = 256 << 20

// disk is a file with an image's table on it, data volume included.
func disk(t *testing.T) (*os.File, *layout.Table) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(diskBytes); err != nil {
		t.Fatal(err)
	}
	root, _ := noise(t, "sha256", 300)
	table, err := layout.NewTable(diskBytes, 512, image(), root, [3]layout.GUID{{1}, {2}, {3}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := table.AddData(layout.GUID{4}); err != nil {
		t.Fatal(err)
	}
	if err := table.Write(f, f.Sync); err != nil {
		t.Fatal(err)
	}
	return f, table
}

// util-linux's sfdisk reads the same partitions and finds nothing to complain of.
func TestTableAgainstSfdisk(t *testing.T) {
	sfdisk := tool(t, "sfdisk")
	f, table := disk(t)
	out, err := exec.Command(sfdisk, "--json", f.Name()).Output()
	if err != nil {
		t.Fatal(err)
	}
	var dump struct {
		PartitionTable struct {
			ID         string
			Partitions []struct {
				Start, Size      uint64
				Type, UUID, Name string
			}
		}
	}
	if err := json.Unmarshal(out, &dump); err != nil {
		t.Fatal(err)
	}
	if len(dump.PartitionTable.Partitions) != 4 || !strings.EqualFold(dump.PartitionTable.ID, table.Disk.String()) {
		t.Fatalf("sfdisk reads %s", out)
	}
	for i, p := range dump.PartitionTable.Partitions {
		own := table.Partitions[i]
		if p.Start != own.First || p.Size != own.Last-own.First+1 || p.Name != own.Label ||
			!strings.EqualFold(p.UUID, own.UUID.String()) || !strings.EqualFold(p.Type, own.Type.String()) {
			t.Errorf("sfdisk reads %+v of %+v", p, own)
		}
	}
	if out, err := exec.Command(sfdisk, "--verify", f.Name()).CombinedOutput(); err != nil || !strings.Contains(string(out), "No errors detected") {
		t.Errorf("sfdisk --verify: %v: %s", err, out)
	}
}

func TestTable(t *testing.T) {
	f, table := disk(t)
	read := func() *layout.Table {
		t.Helper()
		got, err := layout.ReadTable(f, diskBytes)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := read(); !reflect.DeepEqual(got, table) {
		t.Errorf("read\n%+v\nof\n%+v", got, table)
	}
	if n := table.ByLabel(layout.LabelData); n != layout.NumberData {
		t.Errorf("the data is number %d", n)
	}
	if n := table.ByUUID(table.Partitions[1].UUID); n != layout.NumberRootA {
		t.Errorf("the root is number %d", n)
	}
	if blank, err := layout.Blank(f, diskBytes); err != nil || blank {
		t.Errorf("Blank = %v, %v for a disk with a table", blank, err)
	}

	for name, at := range map[string]int64{"header": 512 + 60, "entries": 1024 + 20} {
		byteAt := make([]byte, 1)
		f.ReadAt(byteAt, at)
		f.WriteAt([]byte{byteAt[0] ^ 1}, at)
		if got := read(); !reflect.DeepEqual(got, table) {
			t.Errorf("%s damaged: the copy says %+v", name, got)
		}
		f.WriteAt(byteAt, at)
	}
	f.WriteAt(make([]byte, 1024), 0)
	f.WriteAt(make([]byte, 512), diskBytes-512)
	if got, err := layout.ReadTable(f, diskBytes); !errors.Is(err, layout.ErrNoTable) {
		t.Errorf("both copies gone: %+v, %v", got, err)
	}
	if got := layout.DeviceName("nvme0n1", 2) + " " + layout.DeviceName("sda", 3); got != "nvme0n1p2 sda3" {
		t.Error(got)
	}
}

// A disk is blank while a table's writing onto a blank one has not come to the protective MBR, unless it has data.
func TestBlankCutOff(t *testing.T) {
	f, table := disk(t)
	zeros := make([]byte, layout.Align)
	for _, c := range []struct {
		name string
		gone []int64 // sectors at the start
		end  bool    // the copy at the end is there
		data bool    // the data volume has a beginning
		want bool
	}{
		{"before the MBR", []int64{0}, false, false, true},
		{"before the header", []int64{0, 1}, false, false, true},
		{"with an MBR", nil, false, false, false},
		{"lost its MBR", []int64{0}, true, false, false},
		{"in use", []int64{0, 1}, false, true, false},
		{"MBR without header", []int64{1}, false, false, false},
	} {
		if err := table.Write(f, f.Sync); err != nil {
			t.Fatal(err)
		}
		for _, sector := range c.gone {
			f.WriteAt(zeros[:512], sector*512)
		}
		if !c.end {
			f.WriteAt(zeros, diskBytes-layout.Align)
		}
		at := table.Offset(table.Partitions[layout.NumberData-1])
		f.WriteAt(zeros, at)
		if c.data {
			f.WriteAt([]byte("LUKS"), at)
		}
		if blank, err := layout.Blank(f, diskBytes); err != nil || blank != c.want {
			t.Errorf("%s: Blank = %v, %v", c.name, blank, err)
		}
	}
}

// A cut after any write leaves the old table or the new one, whole; so does a second cut, of what is written onto what the
// first has left.
func TestTablePowerCut(t *testing.T) {
	f, before := disk(t)
	after := *before
	after.Partitions = append([]layout.Partition{}, before.Partitions...)
	after.Partitions[layout.NumberRootB-1].Label = layout.LabelRootB
	again := *before
	again.Partitions = append([]layout.Partition{}, before.Partitions...)
	again.Partitions[layout.NumberRootB-1].Label = "another"
	cut := func(to *layout.Table, writes int, cuts ...int) (done bool) {
		t.Helper()
		err := to.Write(&cutting{f, writes}, f.Sync)
		got, readErr := layout.ReadTable(f, diskBytes)
		if readErr != nil || !reflect.DeepEqual(got, before) && !reflect.DeepEqual(got, &after) && !reflect.DeepEqual(got, &again) {
			t.Fatalf("cut after %d writes and %v before: %+v, %v", writes, cuts, got, readErr)
		}
		if err == nil && (writes < 5 || !reflect.DeepEqual(got, to)) {
			t.Errorf("written in %d writes: %+v", writes, got)
		}
		return err == nil
	}
	for first, done := 0, false; !done; first++ {
		for second, done := 0, false; !done; second++ {
			if err := before.Write(f, f.Sync); err != nil {
				t.Fatal(err)
			}
			cut(&after, first)
			done = cut(&again, second, first)
		}
		if err := before.Write(f, f.Sync); err != nil {
			t.Fatal(err)
		}
		done = cut(&after, first)
	}
}

type cutting struct {
	layout.Disk
	left int
}

func (c *cutting) WriteAt(p []byte, at int64) (int, error) {
	if c.left == 0 {
		n, _ := c.Disk.WriteAt(p[:len(p)/2], at)
		return n, io.ErrShortWrite
	}
	c.left--
	return c.Disk.WriteAt(p, at)
}

func TestTableRefuses(t *testing.T) {
	root, _ := noise(t, "sha256", 300)
	if _, err := layout.NewTable(64<<20, 512, image(), root, [3]layout.GUID{{1}, {2}, {3}}); err == nil {
		t.Error("a disk that is too small is laid out")
	}
	_, table := disk(t)
	for name, change := range map[string]func(t *layout.Table){
		"two of one UUID": func(t *layout.Table) { t.Partitions[2].UUID = t.Partitions[1].UUID },
		"overlap":         func(t *layout.Table) { t.Partitions[2].First = t.Partitions[1].Last },
		"over the end":    func(t *layout.Table) { t.Partitions[3].Last = t.Sectors - 1 },
		"over the table":  func(t *layout.Table) { t.Partitions[0].First = 33 },
		"long label":      func(t *layout.Table) { t.Partitions[0].Label = strings.Repeat("x", 37) },
	} {
		changed := *table
		changed.Partitions = append([]layout.Partition{}, table.Partitions...)
		change(&changed)
		if err := changed.Validate(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	table.Partitions[2].Label = layout.LabelRootA
	if n := table.ByLabel(layout.LabelRootA); n != 0 {
		t.Errorf("of two with one label, number %d is believed", n)
	}
	for _, bad := range []string{"", "c12a7328f81f11d2ba4b00a0c93ec93b", "c12a7328-f81f-11d2-ba4b-00a0c93ec93", "g12a7328-f81f-11d2-ba4b-00a0c93ec93b"} {
		if g, err := layout.ParseGUID(bad); err == nil {
			t.Errorf("%q is taken as %s", bad, g)
		}
	}
}

func FuzzReadTable(f *testing.F) {
	dir := f.TempDir()
	file, err := os.Create(filepath.Join(dir, "disk"))
	if err != nil {
		f.Fatal(err)
	}
	defer file.Close()
	small := &layout.Table{Disk: layout.GUID{9}, SectorSize: 512, Sectors: 200,
		Partitions: []layout.Partition{{Type: layout.TypeESP, UUID: layout.GUID{8}, First: 40, Last: 60, Label: "印鉴"}}}
	file.Truncate(200 * 512)
	if err := small.Write(file, file.Sync); err != nil {
		f.Fatal(err)
	}
	seed, _ := os.ReadFile(file.Name())
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		table, err := layout.ReadTable(strings.NewReader(string(b)), int64(len(b)))
		if err == nil && table.Validate() != nil {
			t.Errorf("read and not valid: %+v", table)
		}
	})
}
