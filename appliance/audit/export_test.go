package audit

import "time"

// Waiting is the number of drafts in the queue.
func (j *Journal) Waiting() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.waiting)
}

// RecentFrom are the sequences of entries that are in memory still, from one on.
func (j *Journal) RecentFrom(from uint64, most int) (out []uint64) {
	for _, r := range j.recentFrom(nil, from, most) {
		out = append(out, r.Sequence)
	}
	return out
}

// ForgetRecent is forgetRecent.
func (j *Journal) ForgetRecent(before uint64) { j.forgetRecent(before) }

// RecentBytes is what they are said to take.
func (j *Journal) RecentBytes() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.recentBytes
}

const MaxRecent = maxRecent

var AppendOwn = appendOwn

// SetCheckpointEvery lets a test wait longer for a checkpoint than anybody does.
func (j *Journal) SetCheckpointEvery(d time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.cfg.CheckpointEvery = d
}

// Examine is how a verification reads an entry.
func Examine(der []byte) error {
	_, err := readEntry(der, true)
	return err
}

// VerifyInParts is Verify with parts of so many rows.
var VerifyInParts = verifyInParts
