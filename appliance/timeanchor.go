package appliance

import (
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"yinjian/hsm"
	"yinjian/ntp"
)

// A timeAnchor is what run/time.json keeps of the clock, so that a restart in the same boot goes on in Holdover. Whoever
// could write it would set the time of an appliance whose sources he silences, so it is bound to the cipher machine. An
// older version of the same boot is as true, with a bound that has grown for longer.
type timeAnchor struct {
	Snapshot json.RawMessage `json:"snapshot"` // an ntp.Snapshot
	MAC      []byte          `json:"mac"`      // HMAC-SM3 over its bytes
}

// anchorEvery is how often it is replaced; the first time as soon as time is trusted.
const anchorEvery = 10 * time.Second

func (a *Appliance) timeFile() string { return filepath.Join(a.dir, "run", "time.json") }

func (a *Appliance) anchorMAC(ctx context.Context, snapshot []byte) ([]byte, error) {
	return macKeys{a.tokens[hsm.Log]}.MAC(ctx, headLabel, append([]byte("yinjian/time/anchor/v1\x00"), snapshot...))
}

// restoreTime takes the anchor over. One that is not ours leaves the clock cold: the sources have to agree first.
func (a *Appliance) restoreTime(ctx context.Context) {
	b, err := os.ReadFile(a.timeFile())
	if errors.Is(err, os.ErrNotExist) {
		return // a first start, or one that never was trusted
	}
	if err == nil {
		err = a.readAnchor(ctx, b)
	}
	if err != nil {
		a.log.WithError(err).Warning("the saved time anchor was not taken over; time starts cold")
	}
}

func (a *Appliance) readAnchor(ctx context.Context, b []byte) error {
	var t timeAnchor
	if err := json.Unmarshal(b, &t); err != nil {
		return err
	}
	want, err := a.anchorMAC(ctx, t.Snapshot)
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
	boot := a.sys.BootID()
	if err := a.clock.Restore(s, boot); err != nil {
		return err
	}
	if s.BootID != boot {
		return errors.New("it is of an earlier boot; only the latest time vouched for is kept")
	}
	return nil
}

func (a *Appliance) saveAnchor(ctx context.Context) error {
	var t timeAnchor
	b, err := json.Marshal(a.clock.Snapshot(a.sys.BootID()))
	if err != nil {
		return err
	}
	t.Snapshot = b
	if t.MAC, err = a.anchorMAC(ctx, b); err != nil {
		return err
	}
	if b, err = json.Marshal(t); err != nil {
		return err
	}
	return writeFile(a.timeFile(), b, 0o600)
}

func (a *Appliance) persistTime(ctx context.Context) error {
	first := time.NewTicker(200 * time.Millisecond)
	defer first.Stop()
	tick := time.NewTicker(anchorEvery)
	defer tick.Stop()
	save := func(ctx context.Context) {
		if err := a.saveAnchor(ctx); err != nil {
			a.log.WithError(err).Warning("the time anchor could not be saved; a restart may start cold")
		}
	}
	for {
		select {
		case <-first.C:
			if a.clock.Now().State == ntp.Trusted {
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
