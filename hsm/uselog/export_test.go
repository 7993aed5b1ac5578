package uselog

import (
	"os"
	"time"
)

// SetFileUses makes files small.
func SetFileUses(n uint64) { fileUses = n }

// SetSync has logs that are opened from now on synced that often, by f.
func SetSync(every time.Duration, f func(*os.File) error) (undo func()) {
	was, wasEvery := syncFile, syncEvery
	syncFile, syncEvery = f, every
	return func() { syncFile, syncEvery = was, wasEvery }
}

// MaxBuffer is maxBuffer.
const MaxBuffer = maxBuffer
