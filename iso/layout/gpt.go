package layout

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"unicode/utf16"
)

// Partitions of the installed disk, counted from 1, and their labels.
const (
	NumberESP   = 1
	NumberRootA = 2
	NumberRootB = 3
	NumberData  = 4

	LabelESP   = "yinjian-esp"
	LabelRootA = "yinjian-a"
	LabelRootB = "yinjian-b"
	LabelEmpty = "_empty" // a root that holds nothing that may be started
	LabelData  = "yinjian-data"
)

// Align is what partitions start and end at, in bytes.
const Align = 1 << 20

// ErrNoTable means that a disk holds no partition table that could be believed, neither at its start nor at its end.
var ErrNoTable = errors.New("layout: no valid GPT")

// A GUID has its bytes in the order in which it is printed; on disk the first three groups stand reversed.
type GUID [16]byte

// Partition types, from UEFI and the Discoverable Partitions Specification.
var (
	TypeESP  = mustGUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
	TypeData = mustGUID("0fc63daf-8483-4772-8e79-3d69d8477de4") // Linux filesystem data

	rootTypes = map[string]GUID{
		"amd64":   mustGUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"),
		"arm64":   mustGUID("b921b045-1df0-41c3-af44-4c6f280d3fae"),
		"loong64": mustGUID("77055800-792c-4f94-b39a-98c91b762bb6"),
	}
)

// RootType is the partition type of a root for a GOARCH.
func RootType(arch string) (GUID, error) {
	t, ok := rootTypes[arch]
	if !ok {
		return GUID{}, fmt.Errorf("layout: no root partition type for architecture %q", arch)
	}
	return t, nil
}

// ParseGUID reads the usual form, 8-4-4-4-12 hex digits in either case.
func ParseGUID(text string) (GUID, error) {
	var g GUID
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(b) != len(g) {
		return g, fmt.Errorf("layout: %q is no GUID", text)
	}
	copy(g[:], b)
	if g.String() != strings.ToLower(text) {
		return GUID{}, fmt.Errorf("layout: %q is no GUID", text)
	}
	return g, nil
}

func mustGUID(text string) GUID {
	g, err := ParseGUID(text)
	if err != nil {
		panic(err)
	}
	return g
}

// String prints in lower case, as Linux does in PARTUUID.
func (g GUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[0:4], g[4:6], g[6:8], g[8:10], g[10:16])
}

// disk is the order on disk; it is its own inverse.
func (g GUID) disk() GUID {
	slices.Reverse(g[0:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
	return g
}

// A Partition is an entry of the table. First and Last are sectors, both inside.
type Partition struct {
	Type, UUID  GUID
	First, Last uint64
	Flags       uint64
	Label       string // at most 36 UTF-16 units
}

// A Table is a GPT on a disk of Sectors sectors of SectorSize bytes. Partitions[i] is number i+1; one of zero type is
// unused.
type Table struct {
	Disk       GUID
	SectorSize int64
	Sectors    uint64
	Partitions []Partition
}

const (
	entryCount = 128
	entrySize  = 128
	headerSize = 92
)

// Offset and Size of a partition, in bytes.
func (t *Table) Offset(p Partition) int64 { return int64(p.First) * t.SectorSize }

// Size is a partition's length in bytes.
func (t *Table) Size(p Partition) int64 { return int64(p.Last-p.First+1) * t.SectorSize }

// ByUUID finds a partition's number, from 1; 0 when there is none, or more than one: which of two is meant nobody knows.
func (t *Table) ByUUID(id GUID) int {
	return t.only(func(p Partition) bool { return p.UUID == id })
}

// ByLabel is the same for a label.
func (t *Table) ByLabel(label string) int {
	return t.only(func(p Partition) bool { return p.Label == label })
}

func (t *Table) only(is func(Partition) bool) int {
	number := 0
	for i, p := range t.Partitions {
		if p.Type != (GUID{}) && is(p) {
			if number != 0 {
				return 0
			}
			number = i + 1
		}
	}
	return number
}

// DeviceName is what Linux calls partition number of a disk: sda2, nvme0n1p2.
func DeviceName(disk string, number int) string {
	if last := disk[len(disk)-1]; last >= '0' && last <= '9' {
		return fmt.Sprintf("%sp%d", disk, number)
	}
	return fmt.Sprintf("%s%d", disk, number)
}

// NewTable lays out a disk of size bytes for an image: EFI system partition, root A, empty root B. The data volume gets
// the rest, but only at the first start from the disk ([Table.AddData]), which alone can seal it to what then runs.
// ids give the disk and the partitions but the root their names; the root's comes from its hash.
func NewTable(size, sectorSize int64, image Image, root Root, ids [3]GUID) (*Table, error) {
	t := &Table{Disk: ids[0], SectorSize: sectorSize, Sectors: uint64(size / sectorSize)}
	kind, err := RootType(image.Arch)
	if err != nil {
		return nil, err
	}
	if need := image.ESPBytes + 2*image.SlotBytes + 64*Align; size < need {
		return nil, fmt.Errorf("layout: a disk of %d bytes is too small: at least %d", size, need)
	}
	if room := int64(root.Blocks()) * BlockSize; room > image.SlotBytes {
		return nil, fmt.Errorf("layout: a root of %d bytes does not fit a slot of %d", room, image.SlotBytes)
	}
	at := int64(Align)
	add := func(bytes int64, p Partition) {
		p.First, p.Last = uint64(at/sectorSize), uint64((at+bytes)/sectorSize-1)
		t.Partitions = append(t.Partitions, p)
		at += bytes
	}
	add(image.ESPBytes, Partition{Type: TypeESP, UUID: ids[1], Label: LabelESP})
	add(image.SlotBytes, Partition{Type: kind, UUID: root.PartitionUUID(), Label: LabelRootA})
	add(image.SlotBytes, Partition{Type: kind, UUID: ids[2], Label: LabelEmpty})
	return t, nil
}

// AddData puts the data volume behind the roots, to the end of the disk.
func (t *Table) AddData(id GUID) (Partition, error) {
	if len(t.Partitions) != NumberRootB {
		return Partition{}, fmt.Errorf("layout: %d partitions where EFI system partition and two roots belong", len(t.Partitions))
	}
	first := t.Offset(t.Partitions[NumberRootB-1]) + t.Size(t.Partitions[NumberRootB-1])
	end := int64(t.lastUsable()+1) * t.SectorSize / Align * Align
	if end-first < 16*Align {
		return Partition{}, fmt.Errorf("layout: %d bytes are left for the data", end-first)
	}
	p := Partition{Type: TypeData, UUID: id, Label: LabelData, First: uint64(first / t.SectorSize), Last: uint64(end/t.SectorSize - 1)}
	t.Partitions = append(t.Partitions, p)
	return p, nil
}

// tableSectors is how many sectors the entries take.
func (t *Table) tableSectors() uint64 {
	return uint64((entryCount*entrySize + t.SectorSize - 1) / t.SectorSize)
}

func (t *Table) firstUsable() uint64 { return 2 + t.tableSectors() }
func (t *Table) lastUsable() uint64  { return t.Sectors - 2 - t.tableSectors() }

// Validate holds the table against its disk: partitions inside, none over another, labels that fit, no UUID twice.
func (t *Table) Validate() error {
	if t.SectorSize != 512 && t.SectorSize != 4096 {
		return fmt.Errorf("layout: sectors of %d bytes", t.SectorSize)
	}
	if len(t.Partitions) > entryCount || t.Sectors < 2*t.tableSectors()+4 {
		return errors.New("layout: the table does not fit its disk")
	}
	var used []Partition
	for i, p := range t.Partitions {
		if p.Type == (GUID{}) {
			continue
		}
		if p.First < t.firstUsable() || p.Last > t.lastUsable() || p.Last < p.First {
			return fmt.Errorf("layout: partition %d lies outside of its disk", i+1)
		}
		if len(utf16.Encode([]rune(p.Label))) > 36 || strings.ContainsRune(p.Label, 0) {
			return fmt.Errorf("layout: partition %d: label %q", i+1, p.Label)
		}
		for _, other := range used {
			if p.First <= other.Last && other.First <= p.Last || p.UUID == other.UUID {
				return fmt.Errorf("layout: partition %d lies over another, or has its UUID", i+1)
			}
		}
		used = append(used, p)
	}
	return nil
}

// A Disk is what a table is written to.
type Disk interface {
	io.ReaderAt
	io.WriterAt
}

// Write puts the table on a disk: first the copy at its end, then, behind a barrier, the one at its start, so that a
// power cut leaves one whole table of before or after. Where the copy at the start is damaged, as by an earlier cut, it is the
// first to be written. The protective MBR, without which firmware looks for no table, is the last there: until then [Blank] knows a
// disk that was blank again. sync must return only when what was written is on the disk.
func (t *Table) Write(w Disk, sync func() error) error {
	if err := t.Validate(); err != nil {
		return err
	}
	entries := make([]byte, t.tableSectors()*uint64(t.SectorSize))
	for i, p := range t.Partitions {
		if p.Type == (GUID{}) {
			continue
		}
		e := entries[i*entrySize:]
		kind, id := p.Type.disk(), p.UUID.disk()
		copy(e[0:], kind[:])
		copy(e[16:], id[:])
		le := binary.LittleEndian
		le.PutUint64(e[32:], p.First)
		le.PutUint64(e[40:], p.Last)
		le.PutUint64(e[48:], p.Flags)
		for n, unit := range utf16.Encode([]rune(p.Label)) {
			le.PutUint16(e[56+2*n:], unit)
		}
	}
	last := t.Sectors - 1
	put := func(sector uint64, b []byte) error {
		_, err := w.WriteAt(b, int64(sector)*t.SectorSize)
		return err
	}
	atStart := []func() error{
		func() error { return put(2, entries) },
		sync,
		func() error { return put(1, t.header(1, last, 2, entries)) },
		sync,
		func() error { return put(0, t.protective()) },
		sync,
	}
	atEnd := []func() error{
		func() error { return put(last-t.tableSectors(), entries) },
		sync,
		func() error { return put(last, t.header(last, 1, last-t.tableSectors(), entries)) },
		sync,
	}
	steps := slices.Concat(atEnd, atStart)
	if readCopy(w, t.SectorSize, t.Sectors, 1) == nil { // then the one at the end may be the only one
		steps = slices.Concat(atStart, atEnd)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("layout: writing the partition table: %w", err)
		}
	}
	return nil
}

// header is UEFI 2.10 table 5.5, for the copy at sector mine.
func (t *Table) header(mine, other, entriesAt uint64, entries []byte) []byte {
	b := make([]byte, t.SectorSize)
	le := binary.LittleEndian
	copy(b, "EFI PART")
	le.PutUint32(b[8:], 0x10000)
	le.PutUint32(b[12:], headerSize)
	le.PutUint64(b[24:], mine)
	le.PutUint64(b[32:], other)
	le.PutUint64(b[40:], t.firstUsable())
	le.PutUint64(b[48:], t.lastUsable())
	disk := t.Disk.disk()
	copy(b[56:], disk[:])
	le.PutUint64(b[72:], entriesAt)
	le.PutUint32(b[80:], entryCount)
	le.PutUint32(b[84:], entrySize)
	le.PutUint32(b[88:], crc32.ChecksumIEEE(entries[:entryCount*entrySize]))
	le.PutUint32(b[16:], crc32.ChecksumIEEE(b[:headerSize])) // with itself zero
	return b
}

// forBIOS is what a BIOS runs of the disk, at 0000:7c00, where it would hang without a word otherwise: it says why nothing starts,
// and lets the BIOS go on to what else it has (INT 18h).
var forBIOS = append([]byte{
	0x31, 0xc0, // xor ax, ax
	0x8e, 0xd8, // mov ds, ax
	0xfc,             // cld
	0xbe, 0x1b, 0x7c, // mov si, text
	0xac,       // next: lodsb
	0x84, 0xc0, // test al, al
	0x74, 0x09, // jz over
	0xb4, 0x0e, // mov ah, 0x0e
	0xbb, 0x07, 0x00, // mov bx, 7
	0xcd, 0x10, // int 0x10
	0xeb, 0xf2, // jmp next
	0xcd, 0x18, // over: int 0x18
	0xf4,       // halt: hlt
	0xeb, 0xfd, // jmp halt
}, "\r\nThis disk starts by UEFI with Secure Boot, not by a legacy BIOS.\r\n\x00"...)

// protective is the MBR that keeps tools which know no GPT from taking the disk for empty (UEFI 2.10 §5.2.3).
func (t *Table) protective() []byte {
	b := make([]byte, t.SectorSize)
	copy(b, forBIOS)
	e := b[446:]
	copy(e[1:], []byte{0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	binary.LittleEndian.PutUint32(e[8:], 1)
	binary.LittleEndian.PutUint32(e[12:], uint32(min(t.Sectors-1, 0xffffffff)))
	b[510], b[511] = 0x55, 0xaa
	return b
}

// ReadTable reads the table of a disk of size bytes: the copy at its start, or, where that is damaged, the one at its
// end. Sectors of 512 and of 4096 bytes are tried. [ErrNoTable] when there is none.
func ReadTable(r io.ReaderAt, size int64) (*Table, error) {
	for _, sector := range []int64{512, 4096} {
		for _, at := range []uint64{1, uint64(size/sector) - 1} {
			if size/sector < 64 {
				continue
			}
			if t := readCopy(r, sector, uint64(size/sector), at); t != nil {
				return t, nil
			}
		}
	}
	return nil, ErrNoTable
}

// readCopy is nil for whatever is not wholly right.
func readCopy(r io.ReaderAt, sectorSize int64, sectors, at uint64) *Table {
	h := make([]byte, headerSize)
	if _, err := r.ReadAt(h, int64(at)*sectorSize); err != nil {
		return nil
	}
	le := binary.LittleEndian
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	if string(h[:8]) != "EFI PART" || le.Uint32(h[12:]) != headerSize || crc32.ChecksumIEEE(h) != sum || le.Uint64(h[24:]) != at {
		return nil
	}
	if le.Uint32(h[80:]) != entryCount || le.Uint32(h[84:]) != entrySize || le.Uint64(h[72:]) >= sectors {
		return nil
	}
	entries := make([]byte, entryCount*entrySize)
	if _, err := r.ReadAt(entries, int64(le.Uint64(h[72:]))*sectorSize); err != nil || crc32.ChecksumIEEE(entries) != le.Uint32(h[88:]) {
		return nil
	}
	t := &Table{Disk: GUID(h[56:72]).disk(), SectorSize: sectorSize, Sectors: sectors, Partitions: decodeEntries(entries)}
	if t.Validate() != nil {
		return nil
	}
	return t
}

// decodeEntries answers the partitions of a table, without unused ones behind the last.
func decodeEntries(entries []byte) (all []Partition) {
	le := binary.LittleEndian
	for e := range slices.Chunk(entries, entrySize) {
		p := Partition{Type: GUID(e[0:16]).disk(), UUID: GUID(e[16:32]).disk(),
			First: le.Uint64(e[32:]), Last: le.Uint64(e[40:]), Flags: le.Uint64(e[48:])}
		var label []uint16
		for n := 56; n < entrySize; n += 2 {
			unit := le.Uint16(e[n:])
			if unit == 0 {
				break
			}
			label = append(label, unit)
		}
		p.Label = string(utf16.Decode(label))
		all = append(all, p)
	}
	for len(all) > 0 && all[len(all)-1] == (Partition{}) {
		all = all[:len(all)-1]
	}
	return all
}

// ClearingMark begins the first sector of a disk that the installer is clearing: whoever owned it has agreed.
const ClearingMark = "YINJIAN CLEARING\n"

// Blank says whether a disk looks unused: zeros in its first and last MiB, where tables and most filesystems have
// their signatures, or nothing there but the beginning of a [Table.Write] of ours that was cut off, which started from such a disk. What
// was written in the middle alone is not seen. A disk with [ClearingMark] counts as blank, whatever else is left of it.
func Blank(r io.ReaderAt, size int64) (bool, error) {
	zeros := make([]byte, Align)
	b := make([]byte, Align)
	for _, at := range []int64{0, max(0, size-Align)} {
		n, err := r.ReadAt(b, at)
		if err != nil && !(errors.Is(err, io.EOF) && int64(n) == min(size, Align)) {
			return false, fmt.Errorf("layout: reading the disk: %w", err)
		}
		if at == 0 && string(b[:min(n, len(ClearingMark))]) == ClearingMark {
			return true, nil
		}
		if at == 0 && size >= 2*Align {
			forget(b, r)
		}
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false, nil
		}
	}
	return true, nil
}

// forget clears of a disk's first MiB what a [Table.Write] of ours has put there before its protective MBR: entries, and perhaps the
// header. It leaves them where the data volume has a beginning: a disk that was in use and lost its first sector is not blank.
func forget(b []byte, r io.ReaderAt) {
	for _, sector := range []int{512, 4096} {
		header, entries := b[sector:2*sector], b[2*sector:3*sector]
		ours := decodeEntries(entries[:4*entrySize])
		if len(ours) != NumberData || ours[NumberESP-1].Label != LabelESP || ours[NumberData-1].Label != LabelData ||
			string(header[:8]) != "EFI PART" && !bytes.Equal(header, make([]byte, sector)) {
			continue
		}
		data := make([]byte, Align)
		if _, err := r.ReadAt(data, int64(ours[NumberData-1].First)*int64(sector)); err == nil && bytes.Equal(data, make([]byte, Align)) {
			clear(header)
			clear(entries)
		}
	}
}
