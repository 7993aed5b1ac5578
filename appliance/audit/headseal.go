package audit

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// A HeadSeal is a MAC over the journal's end, by a key that does not leave the cipher machine. It is replaced with each
// batch, in the same transaction: whoever can write the files and not use the key can neither change, cut off nor add
// entries after the last checkpoint without [Open] refusing the journal ([ErrUnsealed]). It does not show that the
// whole was put back to an older state with that state's seal.
type HeadSeal struct {
	Size uint64 // entries under it
	MAC  []byte // over [HeadSealInput]
}

// HeadSealInput is what a head seal's MAC is computed over: "yinjian/journal/head/v1" and a zero byte; the node,
// preceded by its length in four bytes; the last entry's epoch (8 bytes); size and number of changes of state (8 bytes
// each); the last chain hash; the root of the tree. Numbers are big-endian. The chain covers every entry; the root,
// also the inner nodes as they are stored; the number, which entries are found as changes of state.
func HeadSealInput(node string, epoch Epoch, size, changes uint64, chain, root Hash) []byte {
	b := []byte("yinjian/journal/head/v1\x00")
	b = binary.BigEndian.AppendUint32(b, uint32(len(node)))
	b = append(b, node...)
	b = append(b, epoch[:]...)
	b = binary.BigEndian.AppendUint64(b, size)
	b = binary.BigEndian.AppendUint64(b, changes)
	b = append(b, chain[:]...)
	return append(b, root[:]...)
}

const (
	sealWithin     = 500 * time.Millisecond // what a commit waits for its seal
	sealAgain      = 20 * time.Millisecond  // between two of its attempts
	resealEvery    = 250 * time.Millisecond
	maxHeadSeal    = 64 // bytes of a MAC that are believed to be one
	fieldUnsealed  = "journal.unsealed_from"
	unsealedAdvice = "先保留整个目录的拷贝，用 yinjian audit verify 与外存的检查点（证据文件）核对；确认日志未被改动，或确属恢复备份，再按恢复备份的步骤启动，将开启新纪元并记下未封存的起点 " +
		"(keep a copy of the folder; compare with checkpoints kept elsewhere, as in evidence; if nothing was changed, or a backup was restored on purpose, start as after a restore: a new epoch then records from where it was unsealed)"
)

// seal computes the seal of h, within limit. A sealer that does not answer is left alone with its call, and nothing
// else is asked of it meanwhile.
func (j *Journal) seal(ctx context.Context, limit time.Duration, h head) (*HeadSeal, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case j.sealing <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("sealing the head: an earlier call has not come back: %w", ctx.Err())
	}
	size := h.frontier.size()
	input := HeadSealInput(j.cfg.Node, h.epoch, size, h.changes, h.chain, h.frontier.root())
	type answer struct {
		mac []byte
		err error
	}
	done := make(chan answer, 1)
	go func() {
		mac, err := j.cfg.Sealer.MAC(ctx, input)
		<-j.sealing
		done <- answer{mac, err}
	}()
	select {
	case a := <-done:
		if a.err == nil && (len(a.mac) == 0 || len(a.mac) > maxHeadSeal) {
			a.err = fmt.Errorf("a MAC of %d bytes", len(a.mac))
		}
		if a.err != nil {
			return nil, fmt.Errorf("sealing the head: %w", a.err)
		}
		return &HeadSeal{Size: size, MAC: bytes.Clone(a.mac)}, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("sealing the head: %w", ctx.Err())
	}
}

// sealBatch is the seal that a batch ending in h takes along, nil if there is none: then the batch is written without,
// and sealLoop tries again. A worker process that died is replaced well within the limit, so the sealer is asked until
// then: an end without a seal costs an operator's word if power fails meanwhile. After that no commit waits for a seal
// until sealLoop got one.
func (j *Journal) sealBatch(ctx context.Context, h head) *HeadSeal {
	if j.cfg.Sealer == nil || j.sealerAway.Load() {
		return nil
	}
	begun := time.Now() // interval
	for {
		s, err := j.seal(ctx, sealWithin-time.Since(begun), h)
		if err == nil {
			return s
		}
		if time.Since(begun) >= sealWithin-sealAgain {
			j.sealerAway.Store(true)
			j.cfg.Log.WithError(err).Error("journal written without a seal of its end; it is tried again")
			return nil
		}
		time.Sleep(sealAgain)
	}
}

// unsealedHead answers the head if it is not sealed.
func (j *Journal) unsealedHead() (head, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.head, j.cfg.Sealer != nil && j.head.frontier.size() > 0 && j.sealedTo != j.head.frontier.size()
}

// sealLoop seals what was written without a seal, at the start and as soon as the cipher machine answers again: a call
// that waits for it is answered then, one that fails at once is repeated after resealEvery. At the end it tries a last
// time.
func (j *Journal) sealLoop(ctx context.Context) {
	if j.cfg.Sealer == nil {
		return
	}
	for ctx.Err() == nil {
		if _, open := j.unsealedHead(); !open {
			select {
			case <-j.unsealed:
			case <-ctx.Done():
			}
			continue
		}
		next := time.NewTimer(resealEvery)
		if j.reseal(ctx) == nil {
			next.Stop()
			j.cfg.Log.Info("the journal's end is sealed again")
			continue
		}
		select {
		case <-next.C:
		case <-ctx.Done():
			next.Stop()
		}
	}
	if _, open := j.unsealedHead(); open {
		if err := j.reseal(context.WithoutCancel(ctx)); err != nil {
			j.cfg.Log.WithError(err).Error("the journal stops without a seal of its end: its next start may need an operator")
		}
	}
}

// errMoved means that the store ended elsewhere when the seal was there.
var errMoved = errors.New("audit: the journal has grown meanwhile, or its last write is in doubt")

// reseal seals the present head.
func (j *Journal) reseal(ctx context.Context) error {
	h, open := j.unsealedHead()
	if !open {
		return nil
	}
	s, err := j.seal(ctx, signTimeout, h)
	if err != nil {
		j.sealerAway.Store(true)
		return err
	}
	j.sealerAway.Store(false)
	j.storing.Lock() // nothing is appended meanwhile
	defer j.storing.Unlock()
	size, last, err := j.store.Head(ctx)
	if err != nil {
		return fmt.Errorf("sealing the head: %w", err)
	}
	if size != s.Size || !bytes.Equal(last.Leaf, h.leaf[:]) {
		return errMoved // it could replace a newer one
	}
	if err := j.store.PutHeadSeal(ctx, *s); err != nil {
		return fmt.Errorf("sealing the head: %w", err)
	}
	j.mu.Lock()
	j.sealedTo = max(j.sealedTo, s.Size)
	j.mu.Unlock()
	return nil
}

// SealedTo is how many entries are under a stored head seal: all of them, unless the cipher machine is away; 0 without
// a Sealer.
func (j *Journal) SealedTo() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.sealedTo
}

// checkSeal holds the head that was read against the stored seal, when the journal is opened. from is the number of the
// first entry that no seal vouches for; the error is [ErrUnsealed] then, or that of reading or of the sealer.
func (j *Journal) checkSeal(ctx context.Context) (from uint64, err error) {
	h := j.head
	size := h.frontier.size()
	if j.cfg.Sealer == nil || size == 0 {
		return 0, nil
	}
	stored, err := j.store.HeadSeal(ctx)
	if errors.Is(err, ErrNotFound) {
		return 0, fmt.Errorf("%w；没有封存值 (there is no seal)", ErrUnsealed)
	} else if err != nil {
		return 0, fmt.Errorf("the head seal: %w", err)
	}
	if stored.Size == 0 || stored.Size > size {
		return 0, fmt.Errorf("%w；封存了 %d 条，现有 %d 条 (%d entries were sealed, there are %d)", ErrUnsealed, stored.Size, size, stored.Size, size)
	}
	sealed := h
	if stored.Size < size {
		if sealed, err = j.headAt(ctx, stored.Size); err != nil {
			return 0, fmt.Errorf("%w；封存处的记录无法读取 (the sealed part cannot be read): %w", ErrUnsealed, err)
		}
	}
	want, err := j.seal(ctx, signTimeout, sealed)
	if err != nil {
		return 0, err
	}
	if !hmac.Equal(want.MAC, stored.MAC) {
		return 0, fmt.Errorf("%w；前 %d 条的封存值不符 (the seal over the first %d entries is wrong)", ErrUnsealed, stored.Size, stored.Size)
	}
	if stored.Size == size {
		j.sealedTo = size
		return 0, nil
	}
	if err := j.mayFollow(ctx, sealed, h); err != nil {
		return stored.Size, fmt.Errorf("%w；自第 %d 条起 (from entry %d on): %w", ErrUnsealed, stored.Size, stored.Size, err)
	}
	j.cfg.Log.WithField("unsealed_from", stored.Size).Warn("the last entries of the journal are unsealed and of kinds that are let through: the cipher machine was away when they were written")
	return 0, nil
}

// headAt is the head when the journal had size entries, 0 < size. The number of changes is the present one: a head
// after which there were others is not sealed anew, and entries after a seal may not be changes.
func (j *Journal) headAt(ctx context.Context, size uint64) (head, error) {
	h := head{changes: j.head.changes}
	row, err := j.store.Row(ctx, size-1)
	if err != nil {
		return h, err
	}
	rec, err := recordOf(row)
	if err != nil {
		return h, err
	}
	if h.frontier, err = loadFrontier(ctx, j.store, size); err != nil {
		return h, err
	}
	h.epoch, h.leaf, h.chain = rec.Epoch, rec.LeafHash, Hash(row.Chain)
	// Changes among the entries after size are refused by mayFollow, but the operator's marker lets them in: count them,
	// so that the seal itself is judged rightly.
	for seq := size; seq < j.head.frontier.size(); seq++ {
		row, err := j.store.Row(ctx, seq)
		if err != nil {
			return h, err
		}
		e, err := ParseEntry(row.DER)
		if err != nil {
			return h, err
		}
		if n, ok := e.Change(); ok {
			h.changes = n
			break
		}
	}
	return h, nil
}

// mayFollow walks from the sealed head to the present one: each entry follows in chain and tree, is no change of state,
// and is one that the configuration lets through, or the journal's own of a finished segment.
func (j *Journal) mayFollow(ctx context.Context, sealed, end head) error {
	next := sealed
	next.frontier = sealed.frontier.clone()
	for seq := sealed.frontier.size(); seq < end.frontier.size(); seq++ {
		row, err := j.store.Row(ctx, seq)
		if err != nil {
			return err
		}
		rec, err := recordOf(row)
		if err != nil {
			return err
		}
		e := &rec.Entry
		_, change := e.Change()
		switch {
		case e.Node != j.cfg.Node || e.Epoch != sealed.epoch || e.Sequence != seq || row.Kind != e.Kind || row.Change != change:
			return fmt.Errorf("%w: entry %d is not what its row says", ErrCorrupt, seq)
		case change:
			return fmt.Errorf("entry %d (%s) is a change of state", seq, e.Kind)
		case e.Kind == KindSealed:
			if err := j.mayBeSealed(ctx, e); err != nil {
				return err
			}
		case j.cfg.UnsealedOK == nil || !j.cfg.UnsealedOK(e):
			return fmt.Errorf("entry %d (%s) is of a kind that is not let through", seq, e.Kind)
		}
		next.leaf = rec.LeafHash
		next.chain = ChainHash(next.chain, next.leaf)
		if !bytes.Equal(row.Chain, next.chain[:]) {
			return fmt.Errorf("%w: the chain does not lead to entry %d", ErrCorrupt, seq)
		}
		if err := next.frontier.grow(next.leaf, nil); err != nil {
			return err
		}
	}
	if next.frontier.root() != end.frontier.root() {
		return fmt.Errorf("%w: the tree does not follow from the sealed one", ErrCorrupt)
	}
	return nil
}

// mayBeSealed checks that e sums up a segment as the store does, and where it should.
func (j *Journal) mayBeSealed(ctx context.Context, e *Entry) error {
	seal, err := sealIn(e)
	if err != nil {
		return err
	}
	segs, err := j.store.Segments(ctx)
	if err != nil {
		return err
	}
	for i, s := range segs {
		if s.First == e.Sequence && i > 0 && segs[i-1].Seal != nil && *segs[i-1].Seal == seal {
			return nil
		}
	}
	return fmt.Errorf("%w: entry %d sums up no segment that ends before it", ErrCorrupt, e.Sequence)
}
