package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/hsm/worker"
	"yinjian/ntp"
	"yinjian/ntp/source"
	"yinjian/ntp/sysclock"
	"yinjian/tsa/stamping"
)

// A stampingParams is what the worker of a machine's timestamp slot is told at its start, beside its token.
type stampingParams struct {
	Time   Time
	Units  map[string]stamping.Terms
	Anchor string // file
}

// stampingStart encodes what the worker of this machine's timestamp slot is told.
func (a *Appliance) stampingStart(machine string) ([]byte, error) {
	p := stampingParams{Time: a.cfg.Time, Units: map[string]stamping.Terms{}, Anchor: filepath.Join(a.dir, "run", "time-tsa-"+machine+".json")}
	p.Time.Sources = a.TimeSources()
	for _, u := range a.cfg.units() {
		p.Units[u.Name] = u.terms()
	}
	return json.Marshal(p)
}

// anchorLabel is the key that seals the clock's anchor, in each machine's timestamp slot another.
const anchorLabel = hsm.WorkerPrefix + "time-anchor"

// A stampingWorker is a timestamp slot's worker beyond its token: a clock of its own, and the service that reads it.
type stampingWorker struct {
	*stamping.Service
	stop context.CancelFunc
	runs sync.WaitGroup
}

// NewStampingWorker makes the extension of a worker of class tsa, for worker.ServeExtended; for one that was told of no
// units, and for the other classes, there is none.
//
// The clock asks the sources itself. What it goes on from after a restart is sealed with a key in the slot.
func NewStampingWorker(ctx context.Context, token hsm.Token, p worker.StartParams, log logrus.FieldLogger) (worker.Extension, error) {
	if p.Class != hsm.TSA || len(p.Extension) == 0 {
		return nil, nil
	}
	var params stampingParams
	if err := json.Unmarshal(p.Extension, &params); err != nil {
		return nil, fmt.Errorf("timestamp worker: parameters: %w", err)
	}
	sys, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	clock, err := ntp.NewClock(params.Time.policy(), sys)
	if err != nil {
		return nil, err
	}
	var sources []*source.Source
	for _, c := range params.Time.Sources {
		s, err := c.open(sys)
		if err != nil {
			return nil, fmt.Errorf("time source %s: %w", c.Name, err)
		}
		sources = append(sources, s)
	}
	clock.OnChange(func(from, to ntp.State, reason string, r ntp.Reading) {
		log.WithFields(logrus.Fields{"from": from, "to": to, "reason": reason, "bound_ms": r.Bound.Milliseconds()}).Info("the timestamp worker's time changed state")
	})
	w := &stampingWorker{Service: stamping.New(token, clock, params.Units, log)}
	ctx, w.stop = context.WithCancel(context.WithoutCancel(ctx))
	if _, _, err := ensureKey(ctx, token, anchorLabel, hsm.HMACSM3, true); err != nil {
		if errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrDeadline) || errors.Is(err, hsm.ErrNeedsOperator) {
			return nil, err
		}
		log.WithError(err).Warning("no key to seal the time with; each restart of the timestamp worker starts cold")
	} else {
		anchor := &anchorFile{name: params.Anchor, clock: clock, boot: sys.BootID(), mac: func(ctx context.Context, data []byte) ([]byte, error) {
			return token.Do(ctx, anchorLabel, hsm.MACSM3, data)
		}, log: log}
		anchor.restore(ctx)
		w.runs.Go(func() { _ = anchor.keep(ctx) }) // nil
	}
	poller := &source.Poller{Sources: sources, Clock: clock, Interval: time.Duration(params.Time.Poll), Log: log}
	w.runs.Go(func() {
		if err := poller.Run(ctx); err != nil { // only before it has begun
			log.WithError(err).Error("the timestamp worker asks no time sources")
		}
	})
	return w, nil
}

// Close ends the clock and keeps what it knows.
func (w *stampingWorker) Close() {
	w.stop()
	w.runs.Wait()
}

// policy is the clock's.
func (t *Time) policy() ntp.Config {
	return ntp.Config{
		MinSources: t.MinSources, MaxBound: time.Duration(t.Accuracy), HoldoverMax: time.Duration(t.HoldoverMax),
		PolicyNote: t.PolicyNote, DriftPPM: t.DriftPPM, FreshFor: max(time.Minute, 4*time.Duration(t.Poll)),
	}
}

// open makes the source that asks it.
func (c *TimeSource) open(sys *sysclock.Clock) (*source.Source, error) {
	auth := source.Auth{KeyID: uint32(c.KeyID), Type: c.KeyType, KeyFile: c.KeyFile}
	return source.New(source.Config{Name: c.Name, Group: c.Group, Address: c.Address, Auth: auth, Clock: sys})
}

// stampingLook is the time between two looks at a timestamp worker's clock, and what one may take.
const stampingLook, stampingLookMost = time.Second, 2 * time.Second

// watchStamping keeps what the timestamp workers say of their clocks, until ctx ends.
func (m *machines) watchStamping(ctx context.Context) error {
	tick := time.NewTicker(stampingLook)
	defer tick.Stop()
	for {
		m.lookAtStamping(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// lookAtStamping looks at each once, all at the same time.
func (m *machines) lookAtStamping(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stampingLookMost)
	defer cancel()
	var looks sync.WaitGroup
	all := m.all()
	for _, c := range all {
		w := c.workers[hsm.TSA]
		if w == nil || w.State().Phase != worker.Ready {
			m.a.watch.Forget(c.Name) // the next one's clock is another
			continue
		}
		looks.Go(func() {
			if err := m.a.watch.Look(ctx, c.Name, w); err != nil && ctx.Err() == nil {
				m.a.log.WithError(err).WithField("machine", c.Name).Warning("a timestamp worker did not say its time")
			}
		})
	}
	looks.Wait()
	for _, k := range m.a.watch.Clocks() {
		if m.find(k.Machine) == nil {
			m.a.watch.Forget(k.Machine)
		}
	}
}

// retime has each timestamp worker ask the sources as they are now: another takes its place, and goes on from its anchor.
func (m *machines) retime() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Duration(m.a.cfg.HSM.CallDeadline))
	defer cancel()
	var errs []error
	for _, c := range m.all() {
		w := c.workers[hsm.TSA]
		if w == nil {
			continue
		}
		told, err := m.a.stampingStart(c.Name)
		if err == nil {
			err = w.Replace(ctx, told)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("timestamp worker of machine %s: %w", c.Name, err))
		}
	}
	return errors.Join(errs...)
}

// A tsaSlot is the timestamp slot as the directory sees it: its keys sign certificate requests that are seen whole.
type tsaSlot struct {
	hsm.Token
	workers stamping.Workers
	discard func(reason error, made ...[]byte)
}

// SignRequest satisfies account.RequestSigner.
func (s tsaSlot) SignRequest(ctx context.Context, label string, info []byte) ([]byte, error) {
	key, err := s.FindKey(ctx, label)
	if err != nil {
		return nil, err
	}
	return stamping.SignRequest(ctx, s.workers, label, key.Public, info, s.discard)
}
