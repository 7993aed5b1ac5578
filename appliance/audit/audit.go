// Package audit is the appliance's journal: a transparency log of everything it did, and the only truth about it.
//
// An [Entry] is a small DER value; [Journal.Append] returns when it is on disk. Entries are the leaves of one Merkle
// tree per node with SM3 in the structure of RFC 6962 §2.1, so that a single entry can be proved to be in the log
// ([VerifyInclusion]) and a later log to continue an earlier one ([VerifyConsistency]). A [Checkpoint] is a short text
// with the tree's size and root, signed in the cipher machine within a second of growth. [Verify] reads everything
// again and names what was changed. A [Shipper] copies entries, in order and once, to the [Projection] that people
// query; [Compare] derives every row of it again.
//
// The package owns the format, the tree, the checkpoints and the order of writing. It contains no SQL: a [Store] keeps
// the bytes (dbdriver/sqlite has one). Time comes from a [Clock] only; what an entry says of time it says with the
// bound and the provenance of the reading. Logging is not audit: what is logged here may be lost.
package audit

import (
	"errors"
	"fmt"
)

var (
	// ErrNotFound means that there is no such entry, node, payload or checkpoint.
	ErrNotFound = errors.New("audit: not found")
	// ErrInvalidDraft means that a draft cannot become an entry: a name, length or value outside the format's limits.
	ErrInvalidDraft = errors.New("audit: draft outside the limits of the entry format")
	// ErrDuplicateRef is what a [*DuplicateRefError] is.
	ErrDuplicateRef = errors.New("audit: an entry with this reference is in the journal already")
	// ErrJournalUnwritable means that the entry was not written: the disk is full, or the store failed and was found
	// unchanged afterwards. The next append looks at the store again, so trying later is right. Whatever was to be
	// recorded must not be released.
	ErrJournalUnwritable = errors.New("audit: the journal cannot be written just now; nothing was recorded")
	// ErrOutcomeUnknown means that the store did not say, or not in time, whether the entry was written. It may appear in
	// the journal later; it was not acknowledged, and what it recorded must not be released.
	ErrOutcomeUnknown = errors.New("audit: the store did not answer; whether the entry was written is not known")
	// ErrJournalFailed means that the store holds something else than what was acknowledged. Nothing is written any
	// more until a person has looked and the appliance was restarted.
	ErrJournalFailed = errors.New("audit: the journal disagrees with its store and is closed for writing")
	// ErrClosed means that Run has ended or is ending.
	ErrClosed = errors.New("audit: journal closed")
	// ErrCorrupt means that what the store gave back is not what was written.
	ErrCorrupt = errors.New("audit: stored journal data are damaged or were changed")
	// ErrNoCheckpoint means that no signed checkpoint covered the entry in time.
	ErrNoCheckpoint = errors.New("audit: no signed checkpoint covers the entry yet")
	// ErrUnsealed means that the end of the journal is not what the cipher machine sealed: the seal is missing or wrong,
	// or entries come after it that are not let through ([Config.UnsealedOK]). Either somebody wrote the files, or the
	// machine was killed while the cipher machine did not answer. Only an operator can tell; see [Config.NewEpoch].
	ErrUnsealed = errors.New("audit: 日志末尾未经密码机封存，或与封存值不符：可能被改动、截去或增添，也可能是密码机离线时断电 " +
		"(the end of the journal is not sealed by the cipher machine: it was changed, cut off or added to, or power failed while the cipher machine was away)。" + unsealedAdvice)
	// ErrFork means that the projection holds another entry under the same node, epoch and sequence.
	ErrFork = errors.New("audit: fork: the same node, epoch and sequence stand for two different entries")
)

// A DuplicateRefError refuses a draft with Unique set whose reference the journal knows. It is [ErrDuplicateRef].
type DuplicateRefError struct {
	Sequence uint64 // of the first entry with this reference
}

func (e *DuplicateRefError) Error() string {
	return fmt.Sprintf("%v, at sequence %d", ErrDuplicateRef, e.Sequence)
}

// Is makes errors.Is(err, ErrDuplicateRef) true.
func (e *DuplicateRefError) Is(target error) bool { return target == ErrDuplicateRef }
