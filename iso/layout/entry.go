package layout

import (
	"fmt"
	"strconv"
	"strings"
)

// Tries is how often a new image is started before the boot loader goes back to the one before it.
const Tries = 3

// An Entry is the file name of a signed kernel in [EntryDir], with the counter of the Boot Loader Specification: while
// Counted, the boot loader takes one from Left and adds one to Done at each try, and sorts an entry without tries left
// behind all others.
//
//	yinjian_7+3.efi    not tried yet
//	yinjian_7+1-2.efi  tried twice, one left
//	yinjian_7.efi      good
type Entry struct {
	Index      uint64 // of the image
	Counted    bool
	Left, Done int
}

// NewEntry is that of an image which was not started yet.
func NewEntry(index uint64) Entry { return Entry{Index: index, Counted: true, Left: Tries} }

// Good is the entry after it has proved itself: without counter.
func (e Entry) Good() Entry { return Entry{Index: e.Index} }

// Failed says that its tries are used up.
func (e Entry) Failed() bool { return e.Counted && e.Left == 0 }

// String is the file name.
func (e Entry) String() string {
	switch {
	case !e.Counted:
		return fmt.Sprintf("yinjian_%d.efi", e.Index)
	case e.Done == 0:
		return fmt.Sprintf("yinjian_%d+%d.efi", e.Index, e.Left)
	}
	return fmt.Sprintf("yinjian_%d+%d-%d.efi", e.Index, e.Left, e.Done)
}

// ParseEntry reads a file name; an error when it is none of ours. Names are taken in any case, as FAT gives them.
func ParseEntry(name string) (Entry, error) {
	var e Entry
	text, ours := strings.CutPrefix(strings.ToLower(name), "yinjian_")
	text, efi := strings.CutSuffix(text, ".efi")
	index, counter, counted := strings.Cut(text, "+")
	left, done, tried := strings.Cut(counter, "-")
	var err error
	if e.Index, err = strconv.ParseUint(index, 10, 64); err == nil && counted {
		e.Counted = true
		if e.Left, err = strconv.Atoi(left); err == nil && tried {
			e.Done, err = strconv.Atoi(done)
		}
	}
	if !ours || !efi || err != nil || e.Left < 0 || e.Done < 0 || e.String() != strings.ToLower(name) {
		return Entry{}, fmt.Errorf("layout: %q is not the name of a kernel of ours", name)
	}
	return e, nil
}
