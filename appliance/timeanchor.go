package appliance

import (
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/ntp"
)

// A timeAnchor is what a file keeps of a clock, so that a restart in the same boot goes on in Holdover. Whoever could write
// it would set the time of an appliance whose sources he silences, so it is bound to the cipher machine. An older version of
// the same boot is as true, with a bound that has grown for longer.
type timeAnchor struct {
	Snapshot json.RawMessage `json:"snapshot"` // an ntp.Snapshot
	MAC      []byte          `json:"mac"`      // HMAC-SM3 over its bytes
}

// anchorEvery is how often it is replaced; the first time as soon as time is trusted.
const anchorEvery = 10 * time.Second

// An anchorFile keeps the anchor of one process's clock: run/time.json for this one's, another for each timestamp worker's.
type anchorFile struct {
	name  string
	clock *ntp.Clock
	boot  string // the present boot's id
	mac   func(ctx context.Context, data []byte) ([]byte, error)
	log   logrus.FieldLogger
}

// anchor is this process's.
func (a *Appliance) anchor() *anchorFile {
	return &anchorFile{
		name: filepath.Join(a.dir, "run", "time.json"), clock: a.clock, boot: a.sys.BootID(), log: a.log,
		mac: func(ctx context.Context, data []byte) ([]byte, error) {
			return macKeys{a.tokens[hsm.Log]}.MAC(ctx, headLabel, data)
		},
	}
}

func (f *anchorFile) seal(ctx context.Context, snapshot []byte) ([]byte, error) {
	return f.mac(ctx, append([]byte("yinjian/time/anchor/v1\x00"), snapshot...))
}

// restore takes the anchor over. One that is not ours leaves the clock cold: the sources have to agree first.
func (f *anchorFile) restore(ctx context.Context) {
	b, err := os.ReadFile(f.name)
	if errors.Is(err, os.ErrNotExist) {
		return // a first start, or one that never was trusted
	}
	if err == nil {
		err = f.read(ctx, b)
	}
	if err != nil {
		f.log.WithError(err).Warning("the saved time anchor was not taken over; time starts cold")
	}
}

func (f *anchorFile) read(ctx context.Context, b []byte) error {
	var t timeAnchor
	if err := json.Unmarshal(b, &t); err != nil {
		return err
	}
	want, err := f.seal(ctx, t.Snapshot)
	if err != nil {
		return err
	}
	if !hmac.Equal(t.MAC, want) {
		return errors.New("its MAC is wrong: another machine's, damaged or forged")
	}
	var s ntp.Snapshot
	if err := json.Unmarshal(t.Snapshot, &s); err != nil {
		return err
	}
	if err := f.clock.Restore(s, f.boot); err != nil {
		return err
	}
	if s.BootID != f.boot {
		return errors.New("it is of an earlier boot; only the latest time vouched for is kept")
	}
	return nil
}

func (f *anchorFile) save(ctx context.Context) error {
	var t timeAnchor
	b, err := json.Marshal(f.clock.Snapshot(f.boot))
	if err != nil {
		return err
	}
	t.Snapshot = b
	if t.MAC, err = f.seal(ctx, b); err != nil {
		return err
	}
	if b, err = json.Marshal(t); err != nil {
		return err
	}
	return writeFile(f.name, b, 0o600)
}

// keep replaces the anchor from time to time until ctx ends, and once more.
func (f *anchorFile) keep(ctx context.Context) error {
	first := time.NewTicker(200 * time.Millisecond)
	defer first.Stop()
	tick := time.NewTicker(anchorEvery)
	defer tick.Stop()
	save := func(ctx context.Context) {
		if err := f.save(ctx); err != nil {
			f.log.WithError(err).Warning("the time anchor could not be saved; a restart may start cold")
		}
	}
	for {
		select {
		case <-first.C:
			if f.clock.Now().State == ntp.Trusted {
				first.Stop()
				save(ctx)
			}
		case <-tick.C:
			save(ctx)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			save(last)
			return nil
		}
	}
}
