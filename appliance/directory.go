package appliance

import (
	"context"
	"fmt"
	"io"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/hsm"
)

// settleEvery is how often the centre is asked about changes whose outcome a stop or an outage left open.
const settleEvery = 2 * time.Second

// decisionsEvery is how often what the centre has decided is held against what is here.
const decisionsEvery = 5 * time.Second

// settleDirectory settles them once the centre answers.
func (a *Appliance) settleDirectory(ctx context.Context) error {
	tick, reconcile := time.NewTicker(settleEvery), time.NewTicker(decisionsEvery)
	defer tick.Stop()
	defer reconcile.Stop()
	var before map[string]int64
	for {
		select {
		case <-reconcile.C:
			_, behind, err := a.directory.Reconcile(ctx)
			if err != nil {
				continue // the projection's state says so
			}
			missing := 0
			for object, version := range behind {
				if had, ok := before[object]; ok && had == version { // it had time to come
					missing++
				}
			}
			a.missingVersions.Store(int64(missing))
			before = behind
		case <-tick.C:
			if err := a.eraseKeys(ctx); err != nil && ctx.Err() == nil {
				a.log.WithError(err).Warning("destroyed keys are in the cipher machine still")
			}
			if len(a.directory.State().Open) == 0 {
				continue
			}
			if err := a.directory.Settle(ctx); err != nil && ctx.Err() == nil {
				a.log.WithError(err).Warning("interrupted changes could not be settled")
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// eraseKeys goes on with destructions that a stop or the cipher machine's absence interrupted.
func (a *Appliance) eraseKeys(ctx context.Context) error {
	if len(a.directory.Doomed()) == 0 {
		return nil
	}
	a.machines.acts.Lock()
	defer a.machines.acts.Unlock()
	if len(a.machines.unread(hsm.Staff)) > 0 { // which may hold a copy
		return nil
	}
	return a.directory.Erase(ctx)
}

// A directoryState counts what `yinjian directory status` names: applications may read the state.
type directoryState struct {
	Objects int `json:"objects"`
	Frozen  int `json:"frozen"`  // the two campuses do not agree on them
	Waiting int `json:"waiting"` // a later version is here, an earlier one is not
	// Missing counts objects of which the centre has had a later version for longer than it takes to come here.
	Missing int `json:"missing"`
	Open    int `json:"open"` // changes of which the centre has not said what became of them
}

func (a *Appliance) directoryState() directoryState {
	s := a.directory.State()
	return directoryState{Objects: s.Objects, Frozen: len(s.Frozen), Waiting: len(s.Waiting), Open: len(s.Open), Missing: int(a.missingVersions.Load())}
}

func (s directoryState) warnings() []string {
	var out []string
	if s.Frozen > 0 {
		out = append(out, fmt.Sprintf("目录分叉：%d 个对象两院区不一致，已冻结、不得签名，见 yinjian directory status (directory fork: the two campuses do not agree on %d objects, which nobody may use)", s.Frozen, s.Frozen))
	}
	if s.Waiting > 0 {
		out = append(out, fmt.Sprintf("%d 个对象缺少对端的某一版本，暂不得签名，见 yinjian directory status (of %d objects a version of the other campus is missing)", s.Waiting, s.Waiting))
	}
	if s.Missing > 0 {
		out = append(out, fmt.Sprintf("中心库裁决过的 %d 个对象的新版本一直没有收到（链路断、对端扣住、或有人在库里插行），其中可能有停用，见 yinjian directory status (of %d objects the central database has a version that does not come)", s.Missing, s.Missing))
	}
	if s.Open > 0 {
		out = append(out, fmt.Sprintf("%d 项目录变更待中心库裁决，这些对象暂不能变更 (%d changes of the directory wait for the central database)", s.Open, s.Open))
	}
	return out
}

func (s directoryState) metrics(w io.Writer) {
	for _, m := range []struct {
		name, help string
		value      int
	}{
		{"objects", "Objects of the directory that have versions.", s.Objects},
		{"frozen", "Objects that the two campuses do not agree on.", s.Frozen},
		{"waiting", "Objects of which a version of the other campus is missing.", s.Waiting},
		{"missing", "Objects of which a version that was decided does not come.", s.Missing},
		{"open", "Changes that wait for the central database.", s.Open},
	} {
		fmt.Fprintf(w, "# HELP yinjian_directory_%s %s\n# TYPE yinjian_directory_%s gauge\nyinjian_directory_%s %d\n", m.name, m.help, m.name, m.name, m.value)
	}
}

// DirectoryStatus also asks the centre, as far as it answers, which objects have versions there that are not here.
func (d admin) DirectoryStatus(ctx context.Context, _ string) (any, error) {
	s := d.a.directory.State()
	out := wire.DirectoryStatus{
		Peer: s.Peer, Heard: s.Heard, AgeMS: s.AgeMS, Stale: s.Stale, Objects: s.Objects, Frozen: s.Frozen, Waiting: s.Waiting, Open: s.Open,
	}
	blocked, err := d.a.directory.Blocked(ctx)
	if err != nil {
		d.a.log.WithError(err).Warning("the central database could not be asked for the directory's versions")
		out.Centre = "中心库没有应答，目录变更暂不能进行；签名照常 (the central database does not answer: no change of the directory can be made; signing goes on)"
	}
	for _, b := range blocked {
		out.Blocked = append(out.Blocked, wire.BlockedObject(b))
	}
	return out, nil
}

func (d admin) DirectoryVersions(context.Context, string) (any, error) {
	return map[string]any{"objects": d.a.directory.Versions()}, nil
}

func (d admin) SkipVersions(ctx context.Context, actor string, req api.SkipVersions) (any, error) {
	first, last, err := d.a.directory.SkipVersions(ctx, actor, req.Kind, req.ID, req.Reason)
	if err != nil {
		return nil, err
	}
	return wire.SkippedVersions{First: first, Last: last}, nil
}

func (d admin) ThawObject(ctx context.Context, actor string, req api.ThawObject) (any, error) {
	version, err := d.a.directory.Thaw(ctx, actor, req.Kind, req.ID, req.Reason)
	if err != nil {
		return nil, err
	}
	return wire.ThawedObject{Version: version}, nil
}
