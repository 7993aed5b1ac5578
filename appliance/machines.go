package appliance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sync/errgroup"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/hsm/pool"
	"yinjian/hsm/worker"
	"yinjian/tsa/stamping"
)

// Kinds of entries about cipher machines: what administrators decide, and what the machines do by themselves.
const (
	kindMachineIntent  = "hsm.machine/intent"
	kindMachineOutcome = "hsm.machine/outcome"
	kindMachineState   = "hsm.machine.state"
)

// A cipherMachine is one that the appliance uses, with a worker for each of its slots.
type cipherMachine struct {
	Machine
	added    bool // by an administrator while the appliance ran, so that it stands in machines.toml
	draining bool
	workers  map[hsm.SlotClass]*worker.Client
	failures map[hsm.SlotClass]error // of slots that could not be started: a PIN refused, a file missing
	// presented are the PIN files as they were read, of workers whose PIN was not refused; watch's own once they run.
	presented map[hsm.SlotClass]os.FileInfo
}

// machines are the cipher machines and the pools that they make up, one for each slot class.
type machines struct {
	a       *Appliance
	command []string // of a worker
	pools   map[hsm.SlotClass]*pool.Pool

	acts sync.Mutex // held during an administrator's act

	mu   sync.Mutex       // guards what follows
	list []*cipherMachine // the first is [FirstMachine]
}

// all answers the machines as they are now.
func (m *machines) all() []*cipherMachine {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.list)
}

func (m *machines) find(name string) *cipherMachine {
	for _, c := range m.all() {
		if c.Name == name {
			return c
		}
	}
	return nil
}

// loaded says whether a machine that is there now has its library in a pack; one that was removed, and still stands in config.toml, is not.
func (m *machines) loaded(pack string) bool {
	return slices.ContainsFunc(m.all(), func(c *cipherMachine) bool {
		in, _, err := splitModule(c.Module)
		return err == nil && in == pack
	})
}

func (m *machines) put(list []*cipherMachine) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = list
}

// usesSlot is the name under which the uses of a machine's slot are recorded: the first machine's is the class's.
func usesSlot(class hsm.SlotClass, machine string) string {
	if machine == FirstMachine {
		return string(class)
	}
	return string(class) + "." + machine
}

// slotOf is the worker behind such a name, nil when there is none any more.
func (m *machines) slotOf(uses string) (*worker.Client, int) {
	class, machine, ok := strings.Cut(uses, ".")
	if !ok {
		machine = FirstMachine
	}
	if c := m.find(machine); c != nil && c.workers[hsm.SlotClass(class)] != nil {
		return c.workers[hsm.SlotClass(class)], c.Slots[class].Sessions
	}
	return nil, 0
}

// startSlot starts the worker of one slot and presents its PIN, once. A worker that is answered with an error is running
// and goes on trying; nil means that nothing runs.
func (a *Appliance) startSlot(ctx context.Context, command []string, m *Machine, class hsm.SlotClass) (w *worker.Client, presented os.FileInfo, err error) {
	slot := m.Slots[string(class)]
	place := a.pinPlace(m.Name, class, slot)
	latch := a.pinLatch(class, m.Name, place)
	if err := latch.check(); err != nil {
		return nil, nil, err
	}
	if presented, err = os.Stat(place); err != nil {
		return nil, nil, err
	}
	pin, err := a.pinOf(m.Name, class, slot)
	if err != nil {
		return nil, nil, err
	}
	var counted worker.UseLog
	if slices.Contains(UsesSlots(), string(class)) {
		counted = worker.UseLog{Dir: UsesDir(a.dir), Slot: usesSlot(class, m.Name), Life: a.accounting.life}
	}
	var extension []byte
	abandoned := func(answer []byte, reason error) {
		if made := stamping.Signature(answer); made != nil {
			a.accounting.discard(reason, made)
		}
	}
	if class == hsm.TSA {
		if extension, err = a.stampingStart(m.Name); err != nil {
			return nil, nil, err
		}
	}
	module, env, err := a.moduleOf(ctx, m.Module)
	if err != nil {
		clear(pin)
		return nil, nil, err
	}
	w, err = worker.Start(worker.Config{
		Command: command, Env: env, Class: class, CallDeadline: time.Duration(a.cfg.HSM.CallDeadline), Log: a.log.WithField("slot_class", class).WithField("machine", m.Name),
		Params: worker.StartParams{
			Module: module, ModuleArgs: m.ModuleArgs, TokenLabel: slot.TokenLabel, PIN: pin, Profile: m.Profile, MaxSessions: slot.Sessions,
			WrappedKeys: a.cfg.HSM.WrappedKeys, Uses: counted, Extension: extension,
		},
		Abandoned: a.accounting.abandoned, AbandonedExtension: abandoned,
	})
	clear(pin)
	if err == nil {
		_, err = w.Info(ctx)
		// A software cipher machine that was killed with us may hold its folder, and answer, for a moment longer.
		for end := a.sys.Monotonic() + 20*time.Second; a.cfg.Evaluation.Softtoken && m.Name == FirstMachine && errors.Is(err, hsm.ErrUnavailable) &&
			!errors.Is(err, hsm.ErrNeedsOperator) && ctx.Err() == nil && a.sys.Monotonic() < end; {
			_, err = w.Info(ctx) // it waits for the worker
		}
	}
	if errors.Is(err, hsm.ErrNeedsOperator) {
		if w != nil {
			w.Close()
		}
		err = errors.Join(err, latch.set(presented))
		return nil, nil, fmt.Errorf("密码机拒绝了口令文件 %s，只出示了一次：改正后重启 (the PIN was refused and is not tried again): %w", place, err)
	}
	if err == nil {
		err = latch.clear()
	}
	return w, presented, err
}

// latchPINs keeps over a restart that a PIN was refused later than at the start of its slot: by a machine that was away then,
// or whose PIN was changed.
func (m *machines) latchPINs() {
	for _, c := range m.all() {
		for class, w := range c.workers {
			presented := c.presented[class]
			if presented == nil || w.State().Phase != worker.NeedsOperator {
				continue
			}
			if err := m.a.pinLatch(class, c.Name, m.a.pinPlace(c.Name, class, c.Slots[string(class)])).set(presented); err != nil {
				m.a.log.WithError(err).WithField("machine", c.Name).Error("that the PIN was refused could not be kept; it is tried again")
				continue
			}
			delete(c.presented, class)
		}
	}
}

// startMachines starts the first machine, without which there is no appliance, and the others, which may be away.
func (a *Appliance) startMachines(ctx context.Context, command []string) error {
	first := &cipherMachine{
		Machine: Machine{
			Name: FirstMachine, Module: a.cfg.HSM.Module, ModuleArgs: a.cfg.HSM.ModuleArgs, Profile: a.cfg.HSM.Profile, Weight: a.cfg.HSM.Weight, Slots: a.cfg.HSM.Slots,
		},
		workers: map[hsm.SlotClass]*worker.Client{}, presented: map[hsm.SlotClass]os.FileInfo{},
	}
	if a.cfg.Evaluation.Softtoken {
		first.ModuleArgs = "socket='" + SofttokenSocket(a.dir) + "'"
		if err := WaitForSocket(ctx, SofttokenSocket(a.dir), 20*time.Second); err != nil {
			return fmt.Errorf("软件密码机没有启动 (the software cipher machine did not start): %w", err)
		}
	}
	if a.cfg.Packs.Socket != "" {
		_, _ = a.listPacks(ctx) // what goes wrong is among the warnings, and a reason of its own for who needs one
	}
	a.machines.command = command
	a.machines.put([]*cipherMachine{first})
	for _, class := range hsm.Classes {
		if _, ok := a.cfg.HSM.Slots[string(class)]; !ok {
			continue
		}
		w, presented, err := a.startSlot(ctx, command, &first.Machine, class)
		if w != nil {
			first.workers[class], first.presented[class] = w, presented
		}
		if err != nil {
			return fmt.Errorf("hsm.slots.%s: cipher machine, slot %s: %w", class, class, err)
		}
		p := pool.New(pool.Config{
			Class: class, CallDeadline: time.Duration(a.cfg.HSM.CallDeadline), Log: a.log,
			Now: func() time.Time { return a.clock.Now().Time }, Discarded: a.accounting.abandoned,
		})
		if err := p.Add(ctx, pool.Machine{Name: first.Name, Token: w, Weight: first.Weight, Sessions: a.cfg.HSM.Slots[string(class)].Sessions}); err != nil {
			return err
		}
		a.machines.pools[class], a.tokens[class] = p, p
		if class == hsm.TSA {
			a.tokens[class] = tsaSlot{p, p, a.accounting.discard}
		}
	}
	others, err := a.otherMachines()
	if err != nil {
		return err
	}
	var wg sync.WaitGroup // a machine that hangs must not keep the next from being started
	for _, m := range others {
		a.machines.put(append(a.machines.all(), m))
		wg.Go(func() {
			if err := a.startMachine(ctx, m); err != nil {
				a.log.WithError(err).WithField("machine", m.Name).Error("a cipher machine could not be taken in; the appliance goes on without it")
			}
			if !m.draining {
				a.machines.employ(m)
			}
		})
	}
	wg.Wait()
	return a.resumeDraining(first)
}

// resumeDraining goes on draining the first machine after a restart, where the others can still do its work: without it
// there would be no appliance.
func (a *Appliance) resumeDraining(first *cipherMachine) error {
	f, err := readMachines(a.dir)
	if err != nil || !slices.ContainsFunc(f.Machines, func(l machineLine) bool { return l.Name == FirstMachine && l.State == machineDraining }) {
		return err
	}
	if err := a.machines.mayGo(FirstMachine, false); err != nil {
		a.log.WithError(err).WithField("machine", FirstMachine).Warning("the machine was draining; it is used again, for the others cannot do its work")
		return nil
	}
	for class := range first.workers {
		if err := a.machines.pools[class].Drain(FirstMachine); err != nil {
			return err
		}
	}
	first.draining = true
	return nil
}

// startMachine starts a machine's workers and takes it into the pools, as one that drains. What fails is in the error and does not keep the
// rest from being tried.
func (a *Appliance) startMachine(ctx context.Context, m *cipherMachine) error {
	m.workers, m.failures, m.presented = map[hsm.SlotClass]*worker.Client{}, map[hsm.SlotClass]error{}, map[hsm.SlotClass]os.FileInfo{}
	var errs []error
	type started struct {
		w         *worker.Client
		presented os.FileInfo
		err       error
	}
	slots := map[hsm.SlotClass]chan started{} // one that hangs must not keep the next from being started
	for _, class := range hsm.Classes {
		if _, ok := m.Slots[string(class)]; ok && a.machines.pools[class] != nil {
			done := make(chan started, 1)
			slots[class] = done
			go func() {
				w, presented, err := a.startSlot(ctx, a.machines.command, &m.Machine, class)
				done <- started{w, presented, err}
			}()
		}
	}
	for _, class := range hsm.Classes {
		slot, ok := m.Slots[string(class)]
		p := a.machines.pools[class]
		if !ok {
			continue
		}
		if p == nil {
			errs = append(errs, fmt.Errorf("slots.%s: %s 没有这个槽位 (machine main has no such slot)", class, FirstMachine))
			continue
		}
		s := <-slots[class]
		w, err := s.w, s.err
		if w == nil {
			m.failures[class] = err
			errs = append(errs, fmt.Errorf("slots.%s: %w", class, err))
			continue
		}
		m.workers[class], m.presented[class] = w, s.presented
		if aerr := p.Add(ctx, pool.Machine{Name: m.Name, Token: w, Weight: m.Weight, Sessions: slot.Sessions, Draining: true}); aerr != nil {
			errs = append(errs, fmt.Errorf("slots.%s: %w", class, aerr))
			if !slices.ContainsFunc(p.States(), func(s pool.State) bool { return s.Machine == m.Name }) {
				m.failures[class] = aerr // the pool does not try it again
			}
		}
	}
	return errors.Join(errs...)
}

// employ gives a machine work. Before, it has none: a key that is made in one slot would be lost when the machine is not
// taken in because of another.
func (m *machines) employ(c *cipherMachine) {
	for class := range c.workers {
		if err := m.pools[class].Resume(c.Name); err != nil {
			m.a.log.WithError(err).WithField("machine", c.Name).Debug("it is in no pool")
		}
	}
}

// stopMachine takes a machine out of the pools, lets it finish, and ends its workers.
func (a *Appliance) stopMachine(ctx context.Context, m *cipherMachine) {
	for class, w := range m.workers {
		if _, err := a.machines.pools[class].Remove(ctx, m.Name); err != nil {
			a.log.WithError(err).WithField("machine", m.Name).Debug("it was in no pool")
		}
		if err := w.Close(); err != nil {
			a.log.WithError(err).Warning("worker did not stop cleanly")
		}
	}
}

// close ends all workers.
func (m *machines) close() {
	for _, c := range m.all() {
		for _, w := range c.workers {
			if err := w.Close(); err != nil {
				m.a.log.WithError(err).Warning("worker did not stop cleanly")
			}
		}
	}
}

// unread names the machines whose keys of a class are not known.
func (m *machines) unread(class hsm.SlotClass) (names []string) {
	starting := m.pools[class].Unread()
	for _, c := range m.all() {
		if _, has := c.Slots[string(class)]; has && (c.failures[class] != nil || slices.Contains(starting, c.Name)) {
			names = append(names, c.Name)
		}
	}
	return names
}

// run looks after the pools, and journals what becomes of the machines.
func (m *machines) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range m.pools {
		g.Go(func() error { return p.Run(ctx) })
	}
	g.Go(func() error { return m.watch(ctx) })
	g.Go(func() error { return m.watchStamping(ctx) })
	return g.Wait()
}

// machinesFile keeps what administrators decided while the appliance ran. The rest stands in config.toml.
type machinesFile struct {
	Machines []machineLine `toml:"machines"`
}

type machineLine struct {
	Name    string   `toml:"name"`
	State   string   `toml:"state"`             // "" in use, "draining", "removed" (one of config.toml)
	Machine *Machine `toml:"machine,omitempty"` // of one that was added
}

const (
	machineDraining = "draining"
	machineRemoved  = "removed"
)

func machinesPath(dir string) string { return filepath.Join(dir, "machines.toml") }

func readMachines(dir string) (*machinesFile, error) {
	f := new(machinesFile)
	b, err := os.ReadFile(machinesPath(dir))
	if errors.Is(err, os.ErrNotExist) {
		return f, nil
	}
	if err == nil {
		err = decodeTOML(b, f)
	}
	if err != nil {
		return nil, fmt.Errorf("machines.toml: %w", err)
	}
	return f, nil
}

// otherMachines are those of config.toml, less what was removed since, and those that were added.
func (a *Appliance) otherMachines() ([]*cipherMachine, error) {
	f, err := readMachines(a.dir)
	if err != nil {
		return nil, err
	}
	state := map[string]string{}
	for _, l := range f.Machines {
		state[l.Name] = l.State
	}
	var out []*cipherMachine
	for _, m := range a.cfg.HSM.Machines {
		if state[m.Name] == machineRemoved {
			a.log.WithField("machine", m.Name).Warning("config.toml has a cipher machine that was removed by an administrator; it stays out while machines.toml says so")
			continue
		}
		out = append(out, &cipherMachine{Machine: m, draining: state[m.Name] == machineDraining})
	}
	for _, l := range f.Machines {
		if l.Machine == nil {
			continue
		}
		if slices.ContainsFunc(out, func(c *cipherMachine) bool { return c.Name == l.Name }) {
			return nil, fmt.Errorf("hsm.machines: 密码机 %s 也在 machines.toml 中（运行时添加）；请从其一删去 (it stands in machines.toml as well, where it was added at run time; take it out of one of them)", l.Name)
		}
		var errs []error
		l.Machine.setDefaults(a.dir)
		l.Machine.validate(false, func(key, format string, args ...any) {
			errs = append(errs, fmt.Errorf("machines.toml: %s: %s: %s", l.Name, key, fmt.Sprintf(format, args...)))
		})
		if err := errors.Join(errs...); err != nil {
			return nil, err
		}
		out = append(out, &cipherMachine{Machine: *l.Machine, added: true, draining: l.State == machineDraining})
	}
	if len(out) >= pool.Most {
		return nil, fmt.Errorf("hsm.machines: %d 台，连同 main 至多 %d 台 (at most %d, main included)", len(out), pool.Most, pool.Most)
	}
	return out, nil
}

// save writes machines.toml as it is to be with this list.
func (m *machines) save(list []*cipherMachine) error {
	var f machinesFile
	configured := map[string]bool{}
	for _, c := range m.a.cfg.HSM.Machines {
		configured[c.Name] = true
	}
	for _, c := range list {
		line := machineLine{Name: c.Name}
		if c.draining {
			line.State = machineDraining
		}
		if c.added {
			line.Machine = &c.Machine
		}
		delete(configured, c.Name)
		if line.State != "" || line.Machine != nil {
			f.Machines = append(f.Machines, line)
		}
	}
	for name := range configured {
		f.Machines = append(f.Machines, machineLine{Name: name, State: machineRemoved})
	}
	b, err := toml.Marshal(f)
	if err != nil {
		return err
	}
	return writeFile(machinesPath(m.a.dir), b, 0o600)
}

// act does what an administrator decided about a machine: intent, the act, outcome. do answers the list as it is then,
// which is kept before the outcome is written: a stop in between leaves an intent that the next start settles by what
// was kept. A refusal is an outcome too.
func (m *machines) act(ctx context.Context, actor, act, name, reason string, file []byte, do func() ([]*cipherMachine, error)) error {
	var ref [16]byte
	rand.Read(ref[:]) // never fails (crypto/rand)
	intent := audit.Draft{
		Kind: kindMachineIntent, Actor: actor, Object: name, State: true,
		Fields: []audit.Field{{Name: "act", Value: audit.Text(act)}, {Name: "intent", Value: audit.Text(hex.EncodeToString(ref[:]))}, {Name: "reason", Value: audit.Text(reason)}},
	}
	if file != nil {
		intent.Payloads = []audit.Attachment{{Name: "machine", MediaType: "text/plain", Data: file}}
	}
	if _, err := m.a.journal.Append(ctx, intent); err != nil {
		return journalRefused(err)
	}
	ctx = context.WithoutCancel(ctx) // what was begun is finished and told
	before := m.decided(name)
	defer m.a.daemons.unused(m.loaded)
	list, err := do()
	if err == nil {
		m.put(list)
		if serr := m.save(list); serr != nil {
			err = problem.New(problem.DiskReserve, "已执行，但 machines.toml 未能写入，重启后不保留 (done, and not kept over a restart: machines.toml could not be written)",
				"检查磁盘空间与权限后再执行一次 (look at free space and permissions, and do it again)").With(serr)
		}
	}
	result := "done"
	if err != nil {
		result = cutText("refused: " + err.Error())
	}
	changed, cerr := audit.Changed(before, m.decided(name))
	if oerr := errors.Join(cerr, m.outcome(ctx, actor, act, name, hex.EncodeToString(ref[:]), reason, result, changed)); oerr != nil {
		return journalRefused(errors.Join(err, oerr))
	}
	return err
}

func (m *machines) outcome(ctx context.Context, actor, act, name, intent, reason, result string, changed []audit.Field) error {
	_, err := m.a.journal.Append(ctx, audit.Draft{
		Kind: kindMachineOutcome, Actor: actor, Object: name, State: true,
		Fields: append(changed, audit.Field{Name: "act", Value: audit.Text(act)}, audit.Field{Name: "intent", Value: audit.Text(intent)},
			audit.Field{Name: "reason", Value: audit.Text(reason)}, audit.Field{Name: "result", Value: audit.Text(result)}),
	})
	return err
}

// decided is what the change log has of a machine: its description and whether it is draining; nil without one.
func (m *machines) decided(name string) any {
	c := m.find(name)
	if c == nil {
		return nil
	}
	return map[string]any{
		"name": name, "module": c.Module, "profile": c.Profile, "weight": c.Weight, "slots": slices.Sorted(maps.Keys(c.Slots)), "draining": c.draining,
	}
}

// cutText shortens what a field of the journal is to hold.
func cutText(s string) string {
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "")
	}
	return s
}

func journalRefused(err error) error {
	return problem.New(problem.JournalUnwritable, "日志无法写入 (the journal cannot be written)", "请检查存储与运行日志 (look at the storage and the log)").With(err)
}

// settle writes the outcome of an act that a stop interrupted: what the machines are now is what came of it.
func (m *machines) settle(ctx context.Context) error {
	type open struct{ act, name string }
	intents := map[string]open{}
	err := m.a.journal.State(ctx, func(r audit.Record) error {
		e := &r.Entry
		switch e.Kind {
		case kindMachineIntent:
			intents[e.Text("intent")] = open{e.Text("act"), e.Object}
		case kindMachineOutcome:
			delete(intents, e.Text("intent"))
		}
		return nil
	})
	if err != nil {
		return err
	}
	for id, o := range intents {
		now := "absent"
		if c := m.find(o.name); c != nil {
			if now = "in use"; c.draining {
				now = "draining"
			}
		}
		if err := m.outcome(ctx, "appliance", o.act, o.name, id, "", "interrupted; the machine is "+now, nil); err != nil {
			return err
		}
	}
	return nil
}

var errMachineUnknown = problem.New(problem.NotFound, "没有这台密码机 (no such cipher machine)", "见 yinjian hsm list (see yinjian hsm list)")

var errStays = problem.New(problem.Forbidden, "main 不能移除 (machine main stays)", "它持有设备自身的密钥，在 config.toml 的 [hsm] 中 (it holds the appliance's own keys, and stands under [hsm] in config.toml)")

// mayGo refuses to take away a machine whose keys are nowhere else.
func (m *machines) mayGo(name string, force bool) error {
	n := 0
	var where []string
	for class, p := range m.pools {
		if labels := p.Only(name); len(labels) > 0 {
			n += len(labels)
			where = append(where, string(class))
		}
		if name == FirstMachine && len(p.States()) == 1 {
			return problem.New(problem.Forbidden, fmt.Sprintf("main 的 %s 槽位没有第二台密码机 (no other machine has the slot %s)", class, class), errStays.Next)
		}
	}
	slices.Sort(where)
	if n == 0 || force && name != FirstMachine {
		return nil
	}
	next := "先让其他密码机持有这些密钥；确要如此请加 --force (let another machine hold them, or give --force)"
	if name == FirstMachine {
		next = errStays.Next
	}
	return problem.New(problem.Exists, fmt.Sprintf("密码机 %s 有 %d 把密钥仅在其中（%s），停用后不能使用 (%d keys are on no other machine)", name, n, strings.Join(where, "、"), n), next)
}

func (d admin) AddMachine(ctx context.Context, actor string, req api.AddMachine) (any, error) {
	m := d.a.machines
	m.acts.Lock()
	defer m.acts.Unlock()
	parsed, err := ParseMachine(req.File, d.a.dir)
	if err != nil {
		return nil, problem.Invalid("file", "%v", err)
	}
	if len(m.all()) >= pool.Most {
		return nil, problem.Invalid("file", "连同 main 至多 %d 台 (at most %d, main included)", pool.Most, pool.Most)
	}
	if m.find(parsed.Name) != nil {
		return nil, problem.New(problem.Exists, "已有同名的密码机 (a machine of this name is there already)", "换一个名称，或先 yinjian hsm remove (choose another name, or remove it first)")
	}
	if slices.ContainsFunc(d.a.cfg.HSM.Machines, func(c Machine) bool { return c.Name == parsed.Name }) {
		return nil, problem.New(problem.Exists, "config.toml 中有同名的密码机，此前已移除 (config.toml has a machine of this name, which was removed)",
			"换一个名称；或从 machines.toml 删去它的行并重启 (choose another name, or take its line out of machines.toml and restart)")
	}
	err = m.act(ctx, actor, "add", parsed.Name, req.Reason, req.File, func() ([]*cipherMachine, error) {
		c := &cipherMachine{Machine: *parsed, added: true}
		if err := d.a.startMachine(context.WithoutCancel(ctx), c); err != nil {
			d.a.stopMachine(context.WithoutCancel(ctx), c)
			return nil, machineProblem(err)
		}
		m.employ(c)
		return append(m.all(), c), nil
	})
	if err != nil {
		return nil, err
	}
	return m.states(), nil
}

func machineProblem(err error) error {
	var contradiction *pool.Contradiction
	switch {
	case errors.As(err, &contradiction):
		return problem.New(problem.Exists, fmt.Sprintf("密码机 %s 的密钥 %s 与 %s 中的同名密钥不同 (it holds another key under a label that is in use)", contradiction.Machine, contradiction.Label, contradiction.Other),
			"核对是否接错密码机；同名的密钥必须是同一把 (is it the right machine? one label means one key)").With(err)
	case errors.Is(err, hsm.ErrNeedsOperator):
		return problem.New(problem.HSMNeedsOperator, fmt.Sprintf("口令未被接受 (the PIN was not accepted): %v", err), "核对口令文件，勿反复尝试 (check the PIN file; do not try again and again)").With(err)
	}
	return problem.New(problem.HSMUnavailable, fmt.Sprintf("密码机不能接入 (it cannot be taken in): %v", err), "先用 yinjian hsm probe 查明 (find out with yinjian hsm probe)").With(err)
}

func (d admin) DrainMachine(ctx context.Context, actor string, req api.ChangeMachine) (any, error) {
	return d.setDraining(ctx, actor, req, "drain", true)
}

func (d admin) ResumeMachine(ctx context.Context, actor string, req api.ChangeMachine) (any, error) {
	return d.setDraining(ctx, actor, req, "resume", false)
}

func (d admin) setDraining(ctx context.Context, actor string, req api.ChangeMachine, act string, on bool) (any, error) {
	m := d.a.machines
	m.acts.Lock()
	defer m.acts.Unlock()
	c := m.find(req.Name)
	if c == nil {
		return nil, errMachineUnknown
	}
	err := m.act(ctx, actor, act, req.Name, req.Reason, nil, func() ([]*cipherMachine, error) {
		if on {
			if err := m.mayGo(req.Name, req.Force); err != nil {
				return nil, err
			}
		}
		changed := *c
		changed.draining = on
		for class := range c.workers {
			change := m.pools[class].Resume
			if on {
				change = m.pools[class].Drain
			}
			if err := change(c.Name); err != nil {
				return nil, err
			}
		}
		list := m.all()
		list[slices.Index(list, c)] = &changed
		return list, nil
	})
	if err != nil {
		return nil, err
	}
	return m.states(), nil
}

func (d admin) RemoveMachine(ctx context.Context, actor string, req api.ChangeMachine) (any, error) {
	m := d.a.machines
	m.acts.Lock()
	defer m.acts.Unlock()
	c := m.find(req.Name)
	if c == nil {
		return nil, errMachineUnknown
	}
	err := m.act(ctx, actor, "remove", req.Name, req.Reason, nil, func() ([]*cipherMachine, error) {
		if req.Name == FirstMachine {
			return nil, errStays
		}
		if err := m.mayGo(req.Name, req.Force); err != nil {
			return nil, err
		}
		finish, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(d.a.cfg.HSM.CallDeadline))
		defer cancel()
		d.a.stopMachine(finish, c)
		return slices.DeleteFunc(m.all(), func(o *cipherMachine) bool { return o == c }), nil
	})
	if err != nil {
		return nil, err
	}
	return m.states(), nil
}

func (d admin) ListMachines(context.Context, string) (any, error) { return d.a.machines.states(), nil }

// A machineState is a cipher machine in /health/state.
type machineState struct {
	Name   string             `json:"name"`
	State  string             `json:"state"` // the worst of its slots: see pool.Phase
	Reason string             `json:"reason,omitempty"`
	Since  string             `json:"since,omitempty"` // UTC, by the appliance's clock
	Weight int                `json:"weight"`
	Added  bool               `json:"added"` // while the appliance ran
	Slots  []machineSlotState `json:"slots"`
}

type machineSlotState struct {
	Slot      string  `json:"slot"`
	State     string  `json:"state"`
	Reason    string  `json:"reason,omitempty"`
	Since     string  `json:"since,omitempty"`
	Keys      int     `json:"keys"`
	Only      int     `json:"keys_only_here"`
	UnderWay  int64   `json:"under_way"`
	Waiting   int64   `json:"waiting"`
	Done      int64   `json:"done"`
	Failed    int64   `json:"failed"`
	LatencyMS float64 `json:"latency_ms"`
	PID       int     `json:"pid"`
}

// worse orders the phases.
var worse = []pool.Phase{pool.Up, pool.Draining, pool.Starting, pool.Down, pool.NeedsOperator, pool.Refused}

func (m *machines) states() []machineState {
	bySlot := map[string]map[hsm.SlotClass]pool.State{}
	for class, p := range m.pools {
		for _, s := range p.States() {
			if bySlot[s.Machine] == nil {
				bySlot[s.Machine] = map[hsm.SlotClass]pool.State{}
			}
			bySlot[s.Machine][class] = s
		}
	}
	out := []machineState{}
	for _, c := range m.all() {
		ms := machineState{Name: c.Name, State: string(pool.Up), Weight: c.Weight, Added: c.added, Slots: []machineSlotState{}}
		worst := -1
		for _, class := range hsm.Classes {
			if _, ok := c.Slots[string(class)]; !ok {
				continue
			}
			s, ok := bySlot[c.Name][class]
			if !ok {
				s = pool.State{Phase: pool.NeedsOperator, Reason: errorText(c.failures[class])}
			}
			line := machineSlotState{
				Slot: string(class), State: string(s.Phase), Reason: s.Reason, Keys: s.Keys, Only: s.Only, UnderWay: s.UnderWay, Waiting: s.Waiting,
				Done: s.Done, Failed: s.Failed, LatencyMS: float64(s.Latency.Microseconds()) / 1000,
			}
			if w := c.workers[class]; w != nil {
				line.PID = w.State().PID
			}
			if !s.Since.IsZero() {
				line.Since = s.Since.UTC().Format(time.RFC3339)
			}
			if n := slices.Index(worse, s.Phase); n > worst {
				worst = n
				ms.State, ms.Reason, ms.Since = line.State, line.Reason, line.Since
			}
			ms.Slots = append(ms.Slots, line)
		}
		out = append(out, ms)
	}
	return out
}

// missing says what cannot be done for want of a machine. Reasons are why signing is not ready, in words that anybody may
// read; a machine that is away and whose keys others hold is a warning.
func (m *machines) missing() (reasons, warnings []string) {
	several := len(m.all()) > 1
	for _, class := range hsm.Classes {
		p := m.pools[class]
		if p == nil {
			continue
		}
		states := p.States()
		up := slices.ContainsFunc(states, func(s pool.State) bool { return s.Phase == pool.Up })
		if !up {
			reasons = append(reasons, fmt.Sprintf("密码机 %s 不可用 (cipher machine unavailable)", class))
		}
		for _, s := range states {
			if s.Phase == pool.Up || !several || m.find(s.Machine) == nil { // one that is being added is nobody's loss
				continue
			}
			what := "其密钥另有密码机持有，照常使用 (others hold its keys)"
			if s.Only > 0 {
				what = fmt.Sprintf("仅在其中的 %d 把密钥不可用 (%d keys are on no other machine and cannot be used)", s.Only, s.Only)
			} else if s.Phase == pool.Starting {
				what = "尚未接入 (not taken in yet)"
			}
			text := fmt.Sprintf("密码机 %s 的 %s 槽位：%s，%s", s.Machine, class, s.Phase, what)
			if up && s.Only > 0 && class != hsm.Staff {
				reasons = append(reasons, text) // the appliance's own keys: without them nothing is signed
			}
			if s.Reason != "" {
				text += "：" + s.Reason
			}
			warnings = append(warnings, text)
		}
	}
	for _, c := range m.all() {
		for class, err := range c.failures {
			warnings = append(warnings, fmt.Sprintf("密码机 %s 的 %s 槽位没有启动 (was not started): %v", c.Name, class, err))
		}
	}
	return reasons, warnings
}

// Metrics answers how ready the appliance is, how far its journal is, and how each machine does.
func (h health) Metrics() []byte {
	var b bytes.Buffer
	family := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	one := func(v bool) int {
		if v {
			return 1
		}
		return 0
	}
	ready, _ := h.Ready()
	family("yinjian_ready", "gauge", "Whether a signature asked for now would be made.")
	fmt.Fprintf(&b, "yinjian_ready %d\n", one(ready))
	family("yinjian_journal_entries", "counter", "Entries of the journal.")
	fmt.Fprintf(&b, "yinjian_journal_entries %d\n", h.a.journal.Size())
	projected := h.a.projection.status()
	family("yinjian_projection_shipped_entries", "gauge", "Entries of the journal that the central database has; 0 while it is not known.")
	fmt.Fprintf(&b, "yinjian_projection_shipped_entries %d\n", projected.Shipped)
	family("yinjian_projection_lag_entries", "gauge", "Entries that it has not.")
	fmt.Fprintf(&b, "yinjian_projection_lag_entries %d\n", projected.Lag)
	family("yinjian_projection_up", "gauge", "Whether the last attempt to write to it succeeded.")
	fmt.Fprintf(&b, "yinjian_projection_up %d\n", one(projected.Error == ""))
	family("yinjian_projection_fork", "gauge", "Whether it holds another history of this node: an alarm, nothing is shipped.")
	fmt.Fprintf(&b, "yinjian_projection_fork %d\n", one(projected.Fork))
	states := h.a.machines.states()
	for _, m := range []struct {
		name, kind, help string
		value            func(machineSlotState) any
	}{
		{"yinjian_hsm_up", "gauge", "Whether a cipher machine's slot gets operations.", func(s machineSlotState) any { return one(s.State == string(pool.Up)) }},
		{"yinjian_hsm_since_seconds", "gauge", "When its state began, UTC by the appliance's clock; 0: not known.", func(s machineSlotState) any {
			at, err := time.Parse(time.RFC3339, s.Since)
			if err != nil {
				return 0
			}
			return at.Unix()
		}},
		{"yinjian_hsm_operations_total", "counter", "Operations done.", func(s machineSlotState) any { return s.Done }},
		{"yinjian_hsm_failures_total", "counter", "Operations that the machine failed.", func(s machineSlotState) any { return s.Failed }},
		{"yinjian_hsm_under_way", "gauge", "Operations now.", func(s machineSlotState) any { return s.UnderWay }},
		{"yinjian_hsm_waiting", "gauge", "Operations that wait for a session.", func(s machineSlotState) any { return s.Waiting }},
		{"yinjian_hsm_latency_seconds", "gauge", "Moving mean of an operation's time; 0: not measured.", func(s machineSlotState) any { return s.LatencyMS / 1000 }},
		{"yinjian_hsm_keys", "gauge", "Keys that it holds, where there are several machines.", func(s machineSlotState) any { return s.Keys }},
		{"yinjian_hsm_keys_only_here", "gauge", "Of these those that no other machine holds.", func(s machineSlotState) any { return s.Only }},
	} {
		family(m.name, m.kind, m.help)
		for _, c := range states {
			for _, s := range c.Slots {
				state := ""
				if m.name == "yinjian_hsm_up" {
					state = fmt.Sprintf(",state=%q", s.State)
				}
				fmt.Fprintf(&b, "%s{machine=%q,slot=%q%s} %v\n", m.name, c.Name, s.Slot, state, m.value(s))
			}
		}
	}
	h.a.device.metrics(&b)
	h.a.directoryState().metrics(&b)
	h.a.peers.metrics(&b)
	return b.Bytes()
}

// steady is how long a machine must have been in a state for the journal to keep it: not every blip is kept.
const steady = 2 * time.Second

// watch journals the states of the machines, where there are several, as they change for longer than a moment.
func (m *machines) watch(ctx context.Context) error {
	type seen struct {
		kept, now, reason, since string
		at                       time.Time // monotonic
	}
	of := map[string]*seen{}
	var waiting []audit.Draft
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		m.latchPINs()
		states := m.states()
		for _, s := range states {
			o := of[s.Name]
			if o == nil {
				o = &seen{kept: string(pool.Up)}
				of[s.Name] = o
			}
			if o.now != s.State {
				o.now, o.since, o.at = s.State, s.Since, time.Now() // interval
			}
			o.reason = s.Reason
			if o.now == o.kept || len(states) < 2 || time.Since(o.at) < steady {
				continue
			}
			d := audit.Draft{
				Kind: kindMachineState, Actor: "appliance", Object: s.Name,
				Fields: []audit.Field{{Name: "from", Value: audit.Text(o.kept)}, {Name: "to", Value: audit.Text(o.now)}},
			}
			for name, value := range map[string]string{"reason": cutText(o.reason), "since": o.since} {
				if value != "" {
					d.Fields = append(d.Fields, audit.Field{Name: name, Value: audit.Text(value)})
				}
			}
			waiting = append(waiting, d)
			o.kept = o.now
		}
		// An entry over an end that is not sealed could keep the next start from happening.
		for len(waiting) > 0 && m.a.journal.SealedTo() >= m.a.journal.Size() {
			if _, err := m.a.journal.Append(ctx, waiting[0]); err != nil {
				if ctx.Err() == nil {
					m.a.log.WithError(err).Error("a cipher machine's state could not be journalled; it is tried again")
				}
				break
			}
			waiting = waiting[1:]
		}
	}
}
