package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/problem"
	"yinjian/ntp"
)

const (
	signAgain = "重新签名请求并使用新的 nonce 与当前时间 (sign the request again with a new nonce and the current time)"

	// floorStep is how far ahead of the latest request the stored floor runs: one write in so long, and after a power
	// cut at most so long a wait.
	floorStep = 5 * time.Second
)

// A replayGuard lets each authenticated request through once.
//
// Within one run it remembers every nonce until its request's time leaves the window. Over a restart it remembers
// nothing but a floor for each application: a time, stored before a request at or under it is let through, below
// which the next run refuses everything. Without the floor a client whose clock runs ahead (up to the window) could
// have its requests replayed after a restart, since their times lie after the start. The floor is written ahead by
// floorStep, hence seldom; an orderly stop writes it exact.
type replayGuard struct {
	start  time.Time // of this run: older requests are refused whatever the floor
	window time.Duration
	path   string // of the floors; "" keeps none

	mu     sync.Mutex // guards everything below, and the file
	apps   map[string]*appReplay
	closed bool
}

type appReplay struct {
	refused time.Time // requests at or before are refused: the last run's floor, and minutes already forgotten
	floor   time.Time // stored
	latest  time.Time // of the requests let through
	count   int
	minutes map[int64]map[nonceHash]struct{} // by the request's own time
}

type nonceHash [16]byte // 128 bits of SM3: a collision cannot be made, and would only refuse its maker

// floors is the file.
type floors struct {
	Version int              `json:"version"` // 1
	Floors  map[string]int64 `json:"floors"`  // application: Unix milliseconds
}

// openReplayGuard reads the floors. A file that cannot be understood is not trusted to be complete: every application
// then waits until the whole window has passed the start, which no earlier request can outlive.
func openReplayGuard(path string, start time.Time, window time.Duration, log logrus.FieldLogger) (*replayGuard, error) {
	g := &replayGuard{start: start, window: window, path: path, apps: map[string]*appReplay{}}
	if path == "" {
		return g, nil
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return g, nil
	}
	if err != nil {
		return nil, fmt.Errorf("api: reading replay floors: %w", err)
	}
	var f floors
	if err := json.Unmarshal(data, &f); err != nil || f.Version != 1 || f.Floors == nil {
		log.WithError(err).WithField("version", f.Version).Warn("replay floors unreadable, requests are refused until the window has passed")
		g.start = start.Add(window)
		return g, nil
	}
	for id, ms := range f.Floors {
		at := time.UnixMilli(ms).UTC()
		g.apps[id] = &appReplay{refused: at, floor: at, minutes: map[int64]map[nonceHash]struct{}{}}
	}
	return g, nil
}

// admit lets a request of app through, or says why not. The MAC was checked before: only an application can fill its
// own share of the memory. at is the request's time; most is how many of app's nonces are remembered: a new one is
// refused rather than an old one forgotten.
func (g *replayGuard) admit(app, nonce string, at time.Time, now ntp.Reading, most int) error {
	if d := at.Sub(now.Time); d > g.window || d < -g.window {
		return skewed(now, "请求时间与设备时间相差超过 %s (request time is off by more than the window)", g.window)
	}
	digest := sm3.Sum([]byte(nonce))
	key := nonceHash(digest[:16])

	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return problem.New(problem.NotReady, "设备正在停止 (shutting down)", retryLater)
	}
	a := g.apps[app]
	if a == nil {
		a = &appReplay{minutes: map[int64]map[nonceHash]struct{}{}}
		g.apps[app] = a
	}
	g.forget(a, now.Time)
	if at.Before(g.start) || !at.After(a.refused) {
		return skewed(now, "请求时间早于设备本次启动或已处理的时间 (request is older than the appliance's start)")
	}
	for _, seen := range a.minutes {
		if _, ok := seen[key]; ok {
			return problem.New(problem.ReplayedRequest, "该 nonce 已使用过 (nonce seen before)", signAgain)
		}
	}
	if a.count >= most {
		return problem.New(problem.RateLimited, "该应用在时间窗内的请求过多 (too many requests of this application within the window)", retryLater)
	}
	if g.path != "" && at.After(a.floor) {
		// The floor is durable before the request is let through: a crash from here on cannot forget it.
		if err := g.raise(app, at); err != nil {
			return err
		}
	}
	m := at.Unix() / 60
	if a.minutes[m] == nil {
		a.minutes[m] = map[nonceHash]struct{}{}
	}
	a.minutes[m][key] = struct{}{}
	a.count++
	if at.After(a.latest) {
		a.latest = at
	}
	return nil
}

// forget drops the minutes that left the window, and refuses them from then on, so that a clock set back does not
// make their requests fresh again.
func (g *replayGuard) forget(a *appReplay, now time.Time) {
	for m, seen := range a.minutes {
		end := time.Unix((m+1)*60, 0).UTC()
		if end.Add(g.window).Before(now) {
			a.count -= len(seen)
			delete(a.minutes, m)
			if end.After(a.refused) {
				a.refused = end
			}
		}
	}
}

// raise stores floors that cover at for app, and a step more; other applications that are near their own floor are
// raised in the same write.
func (g *replayGuard) raise(app string, at time.Time) error {
	raised := map[string]time.Time{app: at.Add(floorStep)}
	for id, a := range g.apps {
		if ahead := a.latest.Add(floorStep); id != app && !a.latest.IsZero() && ahead.After(a.floor) {
			raised[id] = ahead
		}
	}
	if err := g.write(func(id string, a *appReplay) time.Time {
		if t, ok := raised[id]; ok {
			return t
		}
		return a.floor
	}); err != nil {
		return problem.New(problem.NotReady, "无法保存防重放状态 (cannot store the replay floor)", retryLater).With(err)
	}
	for id, t := range raised {
		g.apps[id].floor = t
	}
	return nil
}

// close writes exact floors. Nothing is let through afterwards.
func (g *replayGuard) close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.path == "" {
		g.closed = true
		return nil
	}
	g.closed = true
	return g.write(func(_ string, a *appReplay) time.Time {
		if a.latest.After(a.refused) {
			return a.latest
		}
		return a.refused
	})
}

// write stores one floor per application: temporary name, fsync, rename, fsync of the folder. A stop anywhere leaves
// the old file or the new one, and both cover every request let through so far.
func (g *replayGuard) write(floor func(id string, a *appReplay) time.Time) (err error) {
	f := floors{Version: 1, Floors: map[string]int64{}}
	for id, a := range g.apps {
		if at := floor(id, a); !at.IsZero() {
			f.Floors[id] = at.Add(time.Millisecond - 1).UnixMilli() // rounded up
		}
	}
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("api: encoding replay floors: %w", err)
	}
	tmp, err := os.OpenFile(g.path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("api: writing replay floors: %w", err)
	}
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return fmt.Errorf("api: writing replay floors: %w", err)
	}
	if err := os.Rename(tmp.Name(), g.path); err != nil {
		return fmt.Errorf("api: writing replay floors: %w", err)
	}
	dir, err := os.Open(filepath.Dir(g.path))
	if err != nil {
		return fmt.Errorf("api: syncing replay floors: %w", err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func skewed(now ntp.Reading, format string, args ...any) *problem.Problem {
	p := problem.Invalid("header.Authorization", format, args...)
	p.Code, p.Next = problem.ClockSkew, signAgain
	p.Detail += ";设备时间 (appliance's time) " + now.Time.UTC().Format(time.RFC3339)
	if !now.Trusted() {
		p.Detail += ",当前未获信任 (not trusted at present)"
	}
	return p
}
