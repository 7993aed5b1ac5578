package appliance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/ntp"
	"yinjian/ntp/source"
)

// A timeSource is one that the appliance asks.
type timeSource struct {
	TimeSource
	added  bool // by an administrator while the appliance ran, so that it stands in timesources.toml
	source *source.Source
}

// feedSource is the name of the simulated receiver's source, which configuration alone turns on and off.
const feedSource = "rack"

// TimeSources are the time sources as they are now: those of config.toml, less what was removed since, those that were
// added, and the simulated feed. Safe for concurrent use.
func (a *Appliance) TimeSources() []TimeSource { return a.time.TimeSources() }

func (k *timekeeper) TimeSources() []TimeSource {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make([]TimeSource, len(k.sources))
	for i, s := range k.sources {
		out[i] = s.TimeSource
	}
	return out
}

// all answers the sources as they are now.
func (k *timekeeper) all() []*timeSource {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.sources)
}

// sourcesFile keeps what administrators decided while the appliance ran. The rest stands in config.toml.
type sourcesFile struct {
	Sources []sourceLine `toml:"sources"`
}

type sourceLine struct {
	Name   string      `toml:"name"`
	State  string      `toml:"state"`            // "" in use, "removed" (one of config.toml)
	Source *TimeSource `toml:"source,omitempty"` // of one that was added
}

const sourceRemoved = "removed"

func sourcesPath(dir string) string { return filepath.Join(dir, "timesources.toml") }

// readSources answers config.toml's sources, less those removed, and those added.
func (a *Appliance) readSources() ([]*timeSource, error) {
	var f sourcesFile
	b, err := os.ReadFile(sourcesPath(a.dir))
	if err == nil {
		err = decodeTOML(b, &f)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("timesources.toml: %w", err)
	}
	var out []*timeSource
	for _, c := range a.cfg.Time.Sources {
		if slices.ContainsFunc(f.Sources, func(l sourceLine) bool { return l.Name == c.Name && l.State == sourceRemoved }) {
			a.log.WithField("source", c.Name).Warning("config.toml has a time source that was removed by an administrator; it stays out while timesources.toml says so")
			continue
		}
		out = append(out, &timeSource{TimeSource: c})
	}
	for _, l := range f.Sources {
		if l.Source == nil {
			continue
		}
		if slices.ContainsFunc(out, func(s *timeSource) bool { return s.Name == l.Name }) {
			return nil, fmt.Errorf("time.sources: 时间源 %s 也在 timesources.toml 中（运行时添加）；请从其一删去 (it stands in timesources.toml as well, where it was added at run time; take it out of one of them)", l.Name)
		}
		abs(a.dir, &l.Source.KeyFile)
		out = append(out, &timeSource{TimeSource: *l.Source, added: true})
	}
	return out, nil
}

func (k *timekeeper) open(s *timeSource) (err error) {
	s.source, err = s.TimeSource.open(k.a.sys)
	return err
}

// use makes list the sources that are asked.
func (k *timekeeper) use(list []*timeSource) error {
	var all []*source.Source
	for _, s := range list {
		all = append(all, s.source)
	}
	if err := k.a.poller.Use(all); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sources = list
	return nil
}

// save writes timesources.toml as it is to be with this list.
func (k *timekeeper) save(list []*timeSource) error {
	var f sourcesFile
	for _, c := range k.a.cfg.Time.Sources {
		if !slices.ContainsFunc(list, func(s *timeSource) bool { return s.Name == c.Name && !s.added }) {
			f.Sources = append(f.Sources, sourceLine{Name: c.Name, State: sourceRemoved})
		}
	}
	for _, s := range list {
		if s.added {
			f.Sources = append(f.Sources, sourceLine{Name: s.Name, Source: &s.TimeSource})
		}
	}
	b, err := toml.Marshal(f)
	if err != nil {
		return err
	}
	return writeFile(sourcesPath(k.a.dir), b, 0o600)
}

func groupsOf(list []*timeSource) int {
	groups := map[string]bool{}
	for _, s := range list {
		groups[s.Group] = true
	}
	return len(groups)
}

// intend journals what an administrator is about to do, and answers the intent's identifier.
func (k *timekeeper) intend(ctx context.Context, d audit.Draft) (string, error) {
	var ref [16]byte
	rand.Read(ref[:]) // never fails (crypto/rand)
	id := hex.EncodeToString(ref[:])
	d.Fields = append(d.Fields, audit.Field{Name: "intent", Value: audit.Text(id)})
	if _, err := k.a.journal.Append(ctx, d); err != nil {
		return "", journalRefused(err)
	}
	return id, nil
}

func (k *timekeeper) conclude(ctx context.Context, kind, actor, object, intent, result string, more ...audit.Field) error {
	_, err := k.a.journal.Append(ctx, audit.Draft{
		Kind: kind, Actor: actor, Object: object, State: true,
		Fields: append(more, audit.Field{Name: "intent", Value: audit.Text(intent)}, audit.Field{Name: "result", Value: audit.Text(result)}),
	})
	return err
}

// decided is what the change log has of a source; nil without one.
func (k *timekeeper) decided(name string) any {
	for _, s := range k.all() {
		if s.Name == name {
			return map[string]any{"name": name, "group": s.Group, "address": s.Address, "authentication": s.KeyType, "key_id": s.KeyID}
		}
	}
	return nil
}

// act does what an administrator decided about a source: intent, the act, outcome. do answers the list as it is to be. It is
// kept in the file before it is used: a stop in between leaves an intent that the next start settles by what was kept. A
// refusal is an outcome too.
func (k *timekeeper) act(ctx context.Context, actor, act string, s TimeSource, reason string, do func() ([]*timeSource, error)) error {
	intent, err := k.intend(ctx, audit.Draft{
		Kind: kindSourceIntent, Actor: actor, Object: s.Name, State: true,
		Fields: []audit.Field{
			{Name: "act", Value: audit.Text(act)}, {Name: "reason", Value: audit.Text(reason)}, {Name: "address", Value: audit.Text(s.Address)},
			{Name: "group", Value: audit.Text(s.Group)}, {Name: "authentication", Value: audit.Text(s.KeyType)},
		},
	})
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx) // what was begun is finished and told
	before := k.decided(s.Name)
	list, err := do()
	if err == nil {
		if serr := k.save(list); serr != nil {
			err = problem.New(problem.DiskReserve, "timesources.toml 未能写入，没有执行 (timesources.toml could not be written; nothing was done)",
				"检查磁盘空间与权限后再执行一次 (look at free space and permissions, and do it again)").With(serr)
		} else {
			err = k.use(list)
		}
	}
	result := "done"
	if err != nil {
		result = cutText("refused: " + err.Error())
	} else if werr := k.a.machines.retime(); werr != nil {
		result = cutText("done; a timestamp worker asks the sources of before: " + werr.Error())
		err = problem.New(problem.NotReady, "已执行；有时间戳进程尚未换新，仍询问原来的时间源 (done; a timestamp worker still asks the sources of before)",
			"它下次启动时采用；或重启服务 (it will ask them from its next start on; or restart the service)").With(werr)
	}
	changed, cerr := audit.Changed(before, k.decided(s.Name))
	changed = append(changed, audit.Field{Name: "act", Value: audit.Text(act)}, audit.Field{Name: "reason", Value: audit.Text(reason)})
	if oerr := errors.Join(cerr, k.conclude(ctx, kindSourceOutcome, actor, s.Name, intent, result, changed...)); oerr != nil {
		return journalRefused(errors.Join(err, oerr))
	}
	return err
}

// settle writes the outcome of acts that a stop interrupted: what the sources are now is what came of them. A readmission
// is lost with the process.
func (k *timekeeper) settle(ctx context.Context) error {
	type open struct{ kind, object string }
	intents := map[string]open{}
	err := k.a.journal.State(ctx, func(r audit.Record) error {
		e := &r.Entry
		switch e.Kind {
		case kindSourceIntent, kindReadmitIntent:
			intents[e.Text("intent")] = open{e.Kind, e.Object}
		case kindSourceOutcome, kindReadmitOutcome:
			delete(intents, e.Text("intent"))
		}
		return nil
	})
	if err != nil {
		return err
	}
	for id, o := range intents {
		kind, now := kindReadmitOutcome, "interrupted; nothing was readmitted"
		if o.kind == kindSourceIntent {
			kind, now = kindSourceOutcome, "interrupted; the source is not used"
			if slices.ContainsFunc(k.all(), func(s *timeSource) bool { return s.Name == o.object }) {
				now = "interrupted; the source is used"
			}
		}
		if err := k.conclude(ctx, kind, "appliance", o.object, id, now); err != nil {
			return err
		}
	}
	return nil
}

func (d admin) ListTimeSources(context.Context, string) (any, error) {
	reading, boot := d.a.clock.Now(), d.a.sys.Boot()
	return d.a.time.sourceReports(d.a.clock.Last(), reading, boot), nil
}

func (d admin) AddTimeSource(ctx context.Context, actor string, req api.AddTimeSource) (any, error) {
	k := d.a.time
	k.acts.Lock()
	defer k.acts.Unlock()
	s := TimeSource{Name: req.Name, Group: req.Group, Address: req.Address, KeyID: uint16(req.KeyID), KeyType: req.KeyType, KeyFile: req.KeyFile}
	if _, _, err := net.SplitHostPort(s.Address); err != nil {
		return nil, problem.Invalid("address", "须为 host:port (%v)", err)
	}
	abs(d.a.dir, &s.KeyFile)
	list := k.all()
	if len(list) >= maxTimeSources {
		return nil, problem.Invalid("name", "至多 %d 个时间源 (at most %d sources)", maxTimeSources, maxTimeSources)
	}
	if s.Name == feedSource || slices.ContainsFunc(list, func(o *timeSource) bool { return o.Name == s.Name }) ||
		slices.ContainsFunc(d.a.cfg.Time.Sources, func(c TimeSource) bool { return c.Name == s.Name }) {
		return nil, problem.New(problem.Exists, "已有同名的时间源，或 config.toml 中有、此前已移除 (a source of this name is there, or config.toml has one that was removed)",
			"换一个名称；要恢复 config.toml 中的源，从 timesources.toml 删去它的行并重启 (choose another name; to have a configured one back, take its line out of timesources.toml and restart)")
	}
	one := &timeSource{TimeSource: s, added: true}
	err := k.act(ctx, actor, "add", s, req.Reason, func() ([]*timeSource, error) {
		if err := k.open(one); err != nil {
			return nil, problem.Invalid("key_file", "%v", err)
		}
		if !req.Force {
			if err := k.try(context.WithoutCancel(ctx), one); err != nil {
				return nil, err
			}
		}
		return append(list, one), nil
	})
	if err != nil {
		return nil, err
	}
	return d.ListTimeSources(ctx, actor)
}

// try asks a source once, and refuses one that does not answer, whose answer is no candidate, or that contradicts own time.
func (k *timekeeper) try(ctx context.Context, s *timeSource) error {
	const next = "先查明原因；确要先登记后开通，请加 --force (find out why; --force adds it all the same)"
	m, err := s.source.Query(ctx)
	if err == nil {
		accuracy := time.Duration(k.a.cfg.Time.Accuracy)
		err = m.Check(ntp.Limits{MaxRootDistance: accuracy, MaxReferenceAge: time.Hour})
	}
	if err != nil {
		return problem.New(problem.NotReady, fmt.Sprintf("试问该时间源未成功 (the source did not answer well): %s", printable(err.Error())), next).With(err)
	}
	reading, boot := k.a.clock.Now(), k.a.sys.Boot()
	if off := m.UTC.Sub(reading.Time.Add(m.Boot - boot)); reading.Trusted() && off.Abs() > reading.Bound+m.RootDistance {
		return problem.New(problem.NotReady, fmt.Sprintf("该时间源与本机时间相差 %v，超出两者的误差 (it differs from own time by more than both may be wrong)", off.Round(time.Microsecond)), next)
	}
	return nil
}

func (d admin) RemoveTimeSource(ctx context.Context, actor string, req api.RemoveTimeSource) (any, error) {
	k := d.a.time
	k.acts.Lock()
	defer k.acts.Unlock()
	list := k.all()
	i := slices.IndexFunc(list, func(s *timeSource) bool { return s.Name == req.Name })
	if i < 0 {
		return nil, problem.New(problem.NotFound, "没有这个时间源 (no such time source)", "见 yinjian time sources list (see yinjian time sources list)")
	}
	err := k.act(ctx, actor, "remove", list[i].TimeSource, req.Reason, func() ([]*timeSource, error) {
		if !list[i].added && req.Name == feedSource && d.a.cfg.Evaluation.GNSSFeed {
			return nil, problem.New(problem.Forbidden, "模拟北斗由配置决定 (the simulated feed is the configuration's)", "改 evaluation.gnss_feed 并重启 (change evaluation.gnss_feed and restart)")
		}
		rest := slices.Delete(slices.Clone(list), i, i+1)
		if n, want := groupsOf(rest), max(1, d.a.cfg.Time.MinSources); n < want {
			return nil, problem.New(problem.Forbidden, fmt.Sprintf("移除后只剩 %d 组时间源，策略要求 %d 组 (only %d groups would be left of the %d that the policy wants)", n, want, n, want),
				"先添加另一组时间源 (add a source of another group first)")
		}
		return rest, nil
	})
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	delete(k.denied, req.Name)
	k.mu.Unlock()
	return d.ListTimeSources(ctx, actor)
}
