package audit

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	signTimeout  = 5 * time.Second        // one signature or token; the pool has its own, shorter deadline
	retryAfter   = time.Second            // after a failed signature
	restampAfter = 10 * time.Second       // after a failed token
	promptAfter  = 100 * time.Millisecond // between two checkpoints, where changes of state are urgent
	// WaitLimit is how long WaitCheckpoint waits at most.
	WaitLimit = 2 * time.Second
)

// SetCheckpointer gives the journal the log's key, or takes it away (nil). The cipher machine may be unlocked only
// after the journal was opened.
func (j *Journal) SetCheckpointer(s CheckpointSigner) {
	j.mu.Lock()
	j.signer = s
	close(j.grown) // wakes the signing loop
	j.grown = make(chan struct{})
	j.mu.Unlock()
}

// SetPrompt says whether a change of state gets its checkpoint at once, at most ten a second, instead of waiting for the
// next one: another appliance waits for it.
func (j *Journal) SetPrompt(on bool) {
	j.mu.Lock()
	j.prompt = on
	j.mu.Unlock()
}

// Changed is how many changes of state the journal has.
func (j *Journal) Changed() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.head.changes
}

// SetStamper says who stamps checkpoints; nil: nobody.
func (j *Journal) SetStamper(s Stamper) {
	j.mu.Lock()
	j.stamper = s
	j.mu.Unlock()
	notify(j.unstamps)
}

// bounded is for one use of the cipher machine. A stop does not cut it off: a signature that is made and stored nowhere
// would have to be accounted for, after the journal has ended.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), signTimeout)
}

// signLoop signs a checkpoint after growth, and at most one in CheckpointEvery. Failure never reaches Append.
func (j *Journal) signLoop(ctx context.Context) {
	failing := false
	for {
		j.mu.Lock()
		grown := j.grown
		select {
		case <-j.urgent: // what it was about is in the head that is signed now
		default:
		}
		pause := j.cfg.CheckpointEvery
		j.mu.Unlock()
		signed, err := j.sign(ctx)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			if !failing {
				j.cfg.Log.WithError(err).Error("checkpoint not signed")
			}
			pause = retryAfter
		} else if failing && signed {
			j.cfg.Log.Info("checkpoints are signed again")
		}
		failing = err != nil
		if !signed && err == nil {
			select {
			case <-grown:
				continue
			case <-ctx.Done():
			}
			break
		}
		if !j.rest(ctx, pause, err == nil) {
			break
		}
	}
	// The last entries get their checkpoint if the cipher machine still answers.
	if _, err := j.sign(context.WithoutCancel(ctx)); err != nil && !failing {
		j.cfg.Log.WithError(err).Warning("last checkpoint not signed")
	}
}

// rest waits for the pause between two checkpoints, or, where a change of state is urgent, promptAfter at least. It answers
// false when ctx has ended.
func (j *Journal) rest(ctx context.Context, pause time.Duration, mayHurry bool) bool {
	end := time.NewTimer(pause)
	defer end.Stop()
	if mayHurry && pause > promptAfter {
		soon := time.NewTimer(promptAfter)
		defer soon.Stop()
		select {
		case <-soon.C:
		case <-ctx.Done():
			return false
		}
		select {
		case <-j.urgent:
			return true
		case <-end.C:
		case <-ctx.Done():
			return false
		}
		return true
	}
	select {
	case <-end.C:
	case <-ctx.Done():
		return false
	}
	return true
}

// sign makes, stores and publishes a checkpoint of the present head, unless there is one or nobody to sign.
func (j *Journal) sign(ctx context.Context) (bool, error) {
	if j.unstored {
		if err := j.reread(ctx); err != nil {
			return false, err
		}
	}
	j.mu.Lock()
	h, last, signer := j.head, j.last, j.signer
	j.mu.Unlock()
	size := h.frontier.size()
	if signer == nil || last != nil && last.Size >= size {
		return false, nil
	}
	c := &Checkpoint{
		Node: j.cfg.Node, Epoch: h.epoch, Size: size, Root: h.frontier.root(), Time: TimeOf(j.cfg.Clock.Now()),
		Changes: h.changes,
	}
	c.Time.Provenance = "" // the text has none
	if last != nil {
		c.PreviousSize, c.PreviousHash = last.Size, Sum(last.Note)
	}
	c.Note = c.text()
	if _, err := ParseCheckpoint(c.Note, nil); err != nil {
		return false, err // a clock state that the format cannot carry
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	var err error
	if c.Signature, err = signer.SignMessage(ctx, c.Note); err != nil {
		return false, fmt.Errorf("signing: %w", err)
	}
	if err := VerifyCheckpoint(signer.Public(), c); err != nil {
		j.discard(err, c.Signature)
		return false, err
	}
	if err := j.store.PutCheckpoint(ctx, c.stored()); err != nil {
		j.discard(err, c.Signature)
		j.unstored = true
		return false, fmt.Errorf("storing: %w", err)
	}
	j.signedOne(c)
	return true, nil
}

func (j *Journal) discard(reason error, made []byte) {
	if j.cfg.Discarded != nil {
		j.cfg.Discarded(reason, made)
	}
}

// signedOne makes c the last checkpoint.
func (j *Journal) signedOne(c *Checkpoint) {
	j.mu.Lock()
	j.last = c
	close(j.signed)
	j.signed = make(chan struct{})
	j.mu.Unlock()
	notify(j.unstamps)
}

// reread looks whether a checkpoint is stored whose storing was answered with an error. The next one must name it.
func (j *Journal) reread(ctx context.Context) error {
	stored, err := j.store.LastCheckpoint(ctx)
	if errors.Is(err, ErrNotFound) {
		j.unstored = false
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the last checkpoint: %w", err)
	}
	c, err := stored.parse()
	if err != nil {
		return fmt.Errorf("reading the last checkpoint: %w", err)
	}
	j.mu.Lock()
	last, signer := j.last, j.signer
	j.mu.Unlock()
	if last == nil || c.Size > last.Size {
		if signer == nil {
			return nil // nobody signs; later
		}
		if err := VerifyCheckpoint(signer.Public(), c); err != nil {
			return fmt.Errorf("reading the last checkpoint: %w", err)
		}
		j.signedOne(c)
	}
	j.unstored = false
	return nil
}

// stampLoop has the last checkpoint stamped. Those that were passed over while a token was being made stay without:
// the later token dates them too, by consistency.
func (j *Journal) stampLoop(ctx context.Context) {
	var retry <-chan time.Time
	failing := false
	for {
		select {
		case <-j.unstamps:
		case <-retry:
		case <-ctx.Done():
			return
		}
		retry = nil
		err := j.stamp(ctx)
		if err != nil {
			if !failing && ctx.Err() == nil {
				j.cfg.Log.WithError(err).Warning("checkpoint not stamped")
			}
			retry = time.After(restampAfter)
		}
		failing = err != nil
	}
}

func (j *Journal) stamp(ctx context.Context) error {
	j.mu.Lock()
	c, stamper := j.last, j.stamper
	j.mu.Unlock()
	if c == nil || stamper == nil || c.Token != nil {
		return nil
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	token, err := stamper.Stamp(ctx, c.Signature)
	if err != nil {
		return fmt.Errorf("stamping: %w", err)
	}
	if len(token) == 0 || len(token) > MaxPayloadBytes {
		return errors.New("stamping: token empty or too long")
	}
	if err := j.store.PutToken(ctx, c.Size, token); err != nil {
		j.discard(err, token)
		return fmt.Errorf("storing the token: %w", err)
	}
	stamped := *c
	stamped.Token = token
	j.mu.Lock()
	if j.last.Size == c.Size {
		j.last = &stamped
	}
	j.mu.Unlock()
	return nil
}

// SetCosigned says that s is over the note of c, a checkpoint of this journal. The caller has verified both. The newest
// stays.
func (j *Journal) SetCosigned(c Checkpoint, s *Cosignature) {
	c.Cosignature = s
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.cosigned == nil || c.Size >= j.cosigned.Size {
		j.cosigned = &c
	}
}

// Cosigned answers the newest checkpoint that another appliance has cosigned, with its token if there is one by now, if
// it covers the entry.
func (j *Journal) Cosigned(ctx context.Context, sequence uint64) (Checkpoint, bool) {
	j.mu.Lock()
	c := j.cosigned
	j.mu.Unlock()
	if c == nil || c.Size <= sequence {
		return Checkpoint{}, false
	}
	out := *c
	if out.Token == nil {
		if stored, err := j.CheckpointFor(ctx, out.Size-1); err == nil && stored.Size == out.Size {
			out.Token = stored.Token
		}
	}
	return out, true
}

// WaitChange waits until the journal has more than changed changes of state, and answers how many.
func (j *Journal) WaitChange(ctx context.Context, changed uint64) (uint64, error) {
	for {
		j.mu.Lock()
		now, grown := j.head.changes, j.grown
		j.mu.Unlock()
		if now > changed {
			return now, nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return now, ctx.Err()
		}
	}
}

// LastCheckpoint is the last signed one, or [ErrNotFound].
func (j *Journal) LastCheckpoint() (Checkpoint, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last == nil {
		return Checkpoint{}, ErrNotFound
	}
	return *j.last, nil
}

// WaitCheckpoint waits for a signed checkpoint that covers the entry, until ctx ends and at most WaitLimit, and answers
// the last one. The error is [ErrNoCheckpoint], or that of ctx.
func (j *Journal) WaitCheckpoint(ctx context.Context, sequence uint64) (Checkpoint, error) {
	limit := time.NewTimer(WaitLimit)
	defer limit.Stop()
	for {
		j.mu.Lock()
		last, signed := j.last, j.signed
		j.mu.Unlock()
		if last != nil && last.Size > sequence {
			return *last, nil
		}
		select {
		case <-signed:
		case <-limit.C:
			return Checkpoint{}, fmt.Errorf("%w: entry %d", ErrNoCheckpoint, sequence)
		case <-ctx.Done():
			return Checkpoint{}, ctx.Err()
		}
	}
}

// WaitSize waits until the journal has more than size entries, and answers how many.
func (j *Journal) WaitSize(ctx context.Context, size uint64) (uint64, error) {
	for {
		j.mu.Lock()
		now, grown := j.head.frontier.size(), j.grown
		j.mu.Unlock()
		if now > size {
			return now, nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return now, ctx.Err()
		}
	}
}
