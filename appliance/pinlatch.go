package appliance

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"yinjian/hsm"
)

// A pinLatch remembers over restarts that the cipher machine has refused the PIN of a slot's file. Without it a service
// manager that starts the appliance again after each failure would spend the token's tries, one a start, until it locks.
// What is kept is which file was presented, not what was in it: a file that was not written since is not presented
// again.
type pinLatch struct {
	file    string // where it is kept
	pinFile string
}

type refusedPIN struct {
	Modified time.Time `json:"modified"` // of the PIN file
	Size     int64     `json:"size"`
}

func (a *Appliance) pinLatch(class hsm.SlotClass, machine, pinFile string) pinLatch {
	return pinLatch{filepath.Join(a.dir, "run", "pin-refused-"+usesSlot(class, machine)+".json"), pinFile}
}

// errRefusedBefore is for a PIN file that the cipher machine has refused and nobody has written since.
var errRefusedBefore = errors.New("该口令文件此前已被拒绝，且未改动；不再出示，以免锁死令牌。改正文件后重启；若改的是令牌的口令，touch 该文件 " +
	"(the cipher machine has refused this PIN file before and it was not changed; it is not presented again, lest the token lock)")

// check answers errRefusedBefore when the PIN file is the one that was refused. A latch that cannot be read is taken
// for closed: presenting is what cannot be undone.
func (l pinLatch) check() error {
	b, err := os.ReadFile(l.file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var was refusedPIN
	if err == nil {
		err = json.Unmarshal(b, &was)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", l.file, err)
	}
	st, err := os.Stat(l.pinFile)
	if err != nil {
		return err
	}
	if st.ModTime().Equal(was.Modified) && st.Size() == was.Size {
		return fmt.Errorf("%s: %w", l.pinFile, errRefusedBefore)
	}
	return nil
}

// set closes the latch for the PIN file as it was when st was taken, before it was read.
func (l pinLatch) set(st os.FileInfo) error {
	b, err := json.Marshal(refusedPIN{st.ModTime(), st.Size()})
	if err != nil {
		return err
	}
	return writeFile(l.file, b, 0o600)
}

// clear opens it: the PIN was taken.
func (l pinLatch) clear() error {
	if err := os.Remove(l.file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
