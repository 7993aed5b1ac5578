package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/pack"
	"yinjian/appliance/problem"
	"yinjian/appliance/update"
)

// Entries about makers' packs. What an administrator does is journalled before the agent does it, and what came of it after.
const (
	kindPackStaging   = "pack.file/staging" // a pack begins to be judged
	kindPackStaged    = "pack.file/staged"  // it is whole and may be installed
	kindPackInstall   = "pack.file/install" // it is about to be
	kindPackInstalled = "pack.file/outcome" // what came of it
	kindPackRemove    = "pack.file/remove"  // it is about to be taken away
	kindPackRemoved   = "pack.file/removed" // what came of that
	kindPackFound     = "pack.file/found"   // it was brought with the installation, or put there past us: it is mounted, and two keys have signed it
	kindPackKey       = "pack.key/register" // the hospital's key is about to be registered
	kindPackKeyIs     = "pack.key/outcome"  // what came of it
	packPrefix        = "pack:"             // of a module in a pack
	packDone          = "done"              // a result
	packFailed        = "failed"            // a result, with a reason
	packsFolder       = "packs"             // in the appliance's folder: what makers' libraries may write to
)

// PackSocket is the variable of the environment by which a sealed image says where its agent of packs listens.
const PackSocket = "YINJIAN_PACK_SOCKET"

// Packs is the part of the configuration about makers' packs.
type Packs struct {
	// 厂商包代理所在的本机套接字，由密封映像设定；不写则这台机器不装厂商包，密码机的库装在操作系统里，以路径写明，见
	// [packs.md](packs.md) (socket of the agent that keeps makers' packs; none where this is no sealed appliance)
	// 缺省：环境变量 `YINJIAN_PACK_SOCKET`，密封映像里已设；没有则空
	Socket string `toml:"socket,omitempty"`
}

// packs are the makers' packs as the agent last told.
type packs struct {
	acts sync.Mutex // held during an administrator's act

	mu    sync.Mutex // guards what follows
	state pack.State // as it was last told
	err   error      // why it could not be
}

var errNoPacks = problem.New(problem.NotFound, "这台机器不是密封设备，不装厂商包 (this is no sealed appliance: it takes no packs)",
	"把厂商的库装在操作系统里，在 hsm.module 写它的路径：见 docs/packs.md (install the maker's library on the system, and name its path)")

// validateModule says whether a module is a path or a library in a pack.
func validateModule(module string, bad func(key, format string, args ...any)) {
	if module == "" {
		bad("module", "缺少 PKCS#11 模块路径 (path of the PKCS#11 module is missing)")
	}
	if _, _, err := splitModule(module); err != nil {
		bad("module", "%v", err)
	}
}

// InPack says whether a module is a library in a pack.
func InPack(module string) bool { return strings.HasPrefix(module, packPrefix) }

// notHandedBack is why a module in a pack cannot be loaded here; "" if it can.
func notHandedBack(ctx context.Context, socket, module string) string {
	name, library, err := splitModule(module)
	if err != nil {
		return err.Error()
	}
	if socket == "" {
		return errNoPacks.Error()
	}
	s, err := (&update.PackClient{Socket: socket}).State(ctx)
	if err != nil {
		return packProblem(err).Error()
	}
	i := slices.IndexFunc(s.Packs, func(p pack.Installed) bool { return p.Name == name })
	switch {
	case i < 0:
		return "没有这个厂商包，随应答盘带入，见 docs/packs.md (no such pack: it comes with the answer disk)"
	case s.Packs[i].Fault != "":
		return s.Packs[i].Fault
	case s.Packs[i].Library != library:
		return fmt.Sprintf("它的库是 %s (its library is another)", s.Packs[i].Library)
	}
	return ""
}

// splitModule answers the pack and the library in it; "" and "" for a path.
func splitModule(module string) (name, library string, err error) {
	in, ok := strings.CutPrefix(module, packPrefix)
	if !ok {
		return "", "", nil
	}
	name, library, _ = strings.Cut(in, "/")
	if !pack.Name.MatchString(name) || library == "" || path.Clean(library) != library || !filepath.IsLocal(library) {
		return "", "", fmt.Errorf("须为 pack:名称/库的路径 (pack:name/path of the library)：%q", module)
	}
	return name, library, nil
}

func (a *Appliance) packAgent() (*update.PackClient, error) {
	if a.cfg.Packs.Socket == "" {
		return nil, errNoPacks
	}
	return &update.PackClient{Socket: a.cfg.Packs.Socket}, nil
}

// packProblem says what the agent's error means to whoever asked.
func packProblem(err error) error {
	var p *problem.Problem
	if err == nil || errors.As(err, &p) {
		return err
	}
	if errors.Is(err, update.ErrNoAgent) {
		return problem.New(problem.NotReady, "厂商包代理没有应答 (the agent of packs does not answer)", "查看 yinjian-packs.service 的日志 (see that service's log)").With(err)
	}
	return err
}

// listPacks asks the agent, and keeps the answer.
func (a *Appliance) listPacks(ctx context.Context) (*pack.State, error) {
	c, err := a.packAgent()
	if err != nil {
		return nil, err
	}
	s, err := c.State(ctx)
	a.packs.mu.Lock()
	defer a.packs.mu.Unlock()
	if a.packs.err = packProblem(err); err != nil {
		return nil, a.packs.err
	}
	a.packs.state = *s
	return s, nil
}

// lastPacks is what the agent last told.
func (a *Appliance) lastPacks() ([]pack.Installed, error) {
	a.packs.mu.Lock()
	defer a.packs.mu.Unlock()
	return a.packs.state.Packs, a.packs.err
}

// packWarnings are about packs that cannot be used.
func (a *Appliance) packWarnings() (out []string) {
	list, err := a.lastPacks()
	if err != nil {
		out = append(out, fmt.Sprintf("厂商包的状态不明 (what packs there are is not known): %v", err))
	}
	for _, p := range list {
		if p.Fault != "" {
			out = append(out, fmt.Sprintf("厂商包 %s 没有挂载 (the pack is not mounted): %s", p.Name, p.Fault))
		}
	}
	return append(out, a.daemons.faults()...)
}

// moduleOf answers the path of a module, and the environment of the process that loads it: ours, without what leads to the agents. A
// library in a pack sees what its manifest says, the pack's folders before the system's, and one folder of ours for what it keeps.
// Nothing but decency holds it there: the worker is of our user, in our sandbox.
func (a *Appliance) moduleOf(ctx context.Context, module string) (string, []string, error) {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, PackSocket+"=") || strings.HasPrefix(v, UpdateSocket+"=")
	})
	name, library, err := splitModule(module)
	if err != nil || name == "" {
		return module, env, err
	}
	s, err := a.listPacks(ctx)
	if err != nil {
		return "", nil, err
	}
	i := slices.IndexFunc(s.Packs, func(p pack.Installed) bool { return p.Name == name })
	if i < 0 {
		return "", nil, fmt.Errorf("没有安装厂商包 %s (the pack is not installed)", name)
	}
	p := s.Packs[i]
	switch {
	case p.Fault != "":
		return "", nil, fmt.Errorf("厂商包 %s 没有挂载 (the pack is not mounted): %s", name, p.Fault)
	case p.Kind != pack.PKCS11 || p.Library != library:
		return "", nil, fmt.Errorf("厂商包 %s 的库是 %q，不是 %s (its library is another)", name, p.Library, library)
	}
	state := filepath.Join(a.dir, packsFolder, name)
	if err := os.MkdirAll(state, 0o700); err != nil {
		return "", nil, err
	}
	var folders []string
	for _, f := range p.Folders {
		folders = append(folders, filepath.Join(p.Folder, filepath.FromSlash(f)))
	}
	env = append(env, "LD_LIBRARY_PATH="+strings.Join(folders, ":"))
	fill := strings.NewReplacer(pack.AtPack, p.Folder, pack.AtState, state)
	for _, v := range p.Environment {
		env = append(env, v.Name+"="+fill.Replace(v.Value))
	}
	a.daemonOf(ctx, &p, fill, env)
	return filepath.Join(p.Folder, filepath.FromSlash(library)), env, nil
}

// usedBy names the cipher machines whose library is in a pack, those that are configured and out of use too.
func (a *Appliance) usedBy(name string) []string {
	users := map[string]string{FirstMachine: a.cfg.HSM.Module}
	for _, m := range a.cfg.HSM.Machines {
		users[m.Name] = m.Module
	}
	for _, m := range a.machines.all() {
		users[m.Name] = m.Module
	}
	var out []string
	for machine, module := range users {
		if in, _, err := splitModule(module); err == nil && in == name {
			out = append(out, machine)
		}
	}
	slices.Sort(out)
	return out
}

// inUse refuses to touch a pack that a machine needs.
func (a *Appliance) inUse(name string) error {
	if users := a.usedBy(name); len(users) > 0 {
		return problem.New(problem.WrongState, fmt.Sprintf("厂商包 %s 由密码机 %s 使用 (cipher machines use this pack)", name, strings.Join(users, "、")),
			"先移除或改用别的库：yinjian hsm remove，或改配置；换新版可用另一名称打包 (remove them, or have them use another library; a new version may be packed under another name)")
	}
	return nil
}

// A packLine is an installed pack with what the journal and the machines say of it.
type packLine struct {
	pack.Installed
	Since  string   `json:"since,omitempty"` // UTC: when it was installed, as journalled
	By     string   `json:"installed_by,omitempty"`
	UsedBy []string `json:"used_by,omitempty"`
}

type packList struct {
	Packs    []packLine      `json:"packs"`
	Staged   *pack.Installed `json:"staged,omitempty"`
	Hospital string          `json:"hospital_key,omitempty"` // SM3 of the key that is registered
}

// ListPacks satisfies api.PackAdmin.
func (d admin) ListPacks(ctx context.Context, _ string) (any, error) { return d.a.describePacks(ctx) }

func (a *Appliance) describePacks(ctx context.Context) (*packList, error) {
	s, err := a.listPacks(ctx)
	if err != nil {
		return nil, err
	}
	since, err := a.packsSince(ctx)
	if err != nil {
		return nil, err
	}
	out := packList{Packs: []packLine{}, Staged: s.Staged, Hospital: s.Hospital}
	for _, p := range s.Packs {
		one := since[packKey(&p)]
		out.Packs = append(out.Packs, packLine{p, one.at, one.by, a.usedBy(p.Name)})
	}
	return &out, nil
}

// journalled is when a pack was installed and by whom, as the journal has it: "" for what was begun and has no outcome.
type journalled struct{ at, by string }

// packsSince is that of the packs that this appliance should have, by [packKey].
func (a *Appliance) packsSince(ctx context.Context) (map[string]journalled, error) {
	since := map[string]journalled{}
	err := a.journal.State(ctx, func(r audit.Record) error {
		e := &r.Entry
		key := e.Object + " " + e.Text("manifest_sm3")
		done := e.Text("result") == packDone
		switch {
		case e.Kind == kindPackInstall:
			since[key] = journalled{"", e.Actor}
		case e.Kind == kindPackInstalled && done, e.Kind == kindPackFound:
			since[key] = journalled{e.Time.UTC().Format("2006-01-02T15:04:05Z"), e.Actor}
		case e.Kind == kindPackRemoved && done:
			maps.DeleteFunc(since, func(k string, _ journalled) bool { return strings.HasPrefix(k, e.Object+" ") })
		case e.Kind == backup.KindRestored: // another machine, to which others have brought them
			clear(since)
		}
		return nil
	})
	return since, err
}

func packKey(p *pack.Installed) string { return p.Name + " " + p.SM3 }

// installation is who brought a pack that no administrator has installed.
const installation = "installation"

// notePacksFound has it in the journal that a pack is there which nobody is known to have installed: it came with the answers of the
// installation, before there was a journal, or was put there past us. One whose installation was begun, and whose outcome a stop cut
// off, is theirs who began it.
func (a *Appliance) notePacksFound(ctx context.Context) error {
	list, err := a.lastPacks()
	if err != nil || len(list) == 0 {
		return nil // what is wrong with the agent is among the warnings
	}
	since, err := a.packsSince(ctx)
	if err != nil {
		return err
	}
	for i := range list {
		p := &list[i]
		one, known := since[packKey(p)]
		if known && one.at != "" || p.Fault != "" {
			continue
		}
		by := installation
		if known {
			by = one.by
		}
		if err := a.notePack(ctx, kindPackFound, by, p.Name, nil, packOf(p, "installed"), audit.Field{Name: "manifest_sm3", Value: audit.Text(p.SM3)}); err != nil {
			return err
		}
	}
	return nil
}

// notePack journals an act about a pack.
func (a *Appliance) notePack(ctx context.Context, kind, actor, name string, before, after any, more ...audit.Field) error {
	changed, err := audit.Changed(before, after)
	if err != nil {
		return err
	}
	if _, err := a.journal.Append(ctx, audit.Draft{Kind: kind, Actor: actor, Object: name, State: true, Fields: append(changed, more...)}); err != nil {
		return journalRefused(err)
	}
	return nil
}

// packOf is what the change log says of a pack.
func packOf(p *pack.Installed, state string) any {
	if p == nil {
		return nil
	}
	return map[string]any{"name": p.Name, "kind": p.Kind, "version": p.Version, "serial": p.Serial, "maker": p.Maker, "manifest_sm3": p.SM3, "image_sm3": p.ImageSM3, "state": state}
}

// actPack does what two persons decided about a pack: intent, the act, outcome. do answers the pack before and after.
func (a *Appliance) actPack(ctx context.Context, kind, outcome, actor, name, sm3, reason string, persons []string, do func(context.Context) (before, after any, err error)) error {
	why := []audit.Field{personsField(persons), {Name: "reason", Value: audit.Text(reason)}, {Name: "manifest_sm3", Value: audit.Text(sm3)}}
	if err := a.notePack(ctx, kind, actor, name, nil, nil, why...); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx) // what was begun is finished and told
	before, after, err := do(ctx)
	result := packDone
	if err != nil {
		result, before, after = cutText(packFailed+": "+err.Error()), nil, nil
	}
	_, lerr := a.listPacks(ctx)
	return errors.Join(packProblem(err), a.notePack(ctx, outcome, actor, name, before, after, audit.Field{Name: "manifest_sm3", Value: audit.Text(sm3)}, audit.Field{Name: "result", Value: audit.Text(result)}),
		lerr)
}

// StagePack satisfies api.PackAdmin: the pack goes on to the agent as it comes.
func (d admin) StagePack(ctx context.Context, actor string, file io.Reader) (any, error) {
	c, err := d.a.packAgent()
	if err != nil {
		return nil, err
	}
	if err := d.a.notePack(ctx, kindPackStaging, actor, d.a.cfg.Node, nil, nil); err != nil {
		return nil, err
	}
	p, err := c.Stage(ctx, file)
	if err != nil {
		return nil, packProblem(err)
	}
	return p, d.a.notePack(context.WithoutCancel(ctx), kindPackStaged, actor, p.Name, nil, packOf(p, "staged"))
}

// InstallPack satisfies api.PackAdmin.
func (d admin) InstallPack(ctx context.Context, actor string, req api.InstallPack) (any, error) {
	a := d.a
	a.packs.acts.Lock()
	defer a.packs.acts.Unlock()
	c, err := a.packAgent()
	if err != nil {
		return nil, err
	}
	s, err := a.listPacks(ctx)
	if err != nil {
		return nil, err
	}
	name := a.cfg.Node
	var old *pack.Installed
	if s.Staged != nil && s.Staged.SM3 == req.SM3 { // else the agent says what is wrong
		name = s.Staged.Name
		if i := slices.IndexFunc(s.Packs, func(p pack.Installed) bool { return p.Name == name }); i >= 0 {
			old = &s.Packs[i]
			if old.Fault == "" {
				if err := a.inUse(name); err != nil {
					return nil, err
				}
			}
		}
	}
	var p *pack.Installed
	err = a.actPack(ctx, kindPackInstall, kindPackInstalled, actor, name, req.SM3, req.Reason, req.Persons, func(ctx context.Context) (any, any, error) {
		var err error
		p, err = c.Install(ctx, req.SM3)
		return packOf(old, "installed"), packOf(p, "installed"), err
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// RemovePack satisfies api.PackAdmin.
func (d admin) RemovePack(ctx context.Context, actor string, req api.RemovePack) (any, error) {
	a := d.a
	a.packs.acts.Lock()
	defer a.packs.acts.Unlock()
	c, err := a.packAgent()
	if err != nil {
		return nil, err
	}
	if err := a.inUse(req.Name); err != nil {
		return nil, err
	}
	var p *pack.Installed
	err = a.actPack(ctx, kindPackRemove, kindPackRemoved, actor, req.Name, "", req.Reason, req.Persons, func(ctx context.Context) (any, any, error) {
		var err error
		p, err = c.Remove(ctx, req.Name)
		return packOf(p, "installed"), packOf(p, "removed"), err
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// RegisterPackKey satisfies api.PackAdmin.
func (d admin) RegisterPackKey(ctx context.Context, actor string, req api.RegisterPackKey) (any, error) {
	a := d.a
	a.packs.acts.Lock()
	defer a.packs.acts.Unlock()
	c, err := a.packAgent()
	if err != nil {
		return nil, err
	}
	key := ""
	err = a.actPack(ctx, kindPackKey, kindPackKeyIs, actor, a.cfg.Node, "", req.Reason, req.Persons, func(ctx context.Context) (any, any, error) {
		var err error
		key, err = c.RegisterKey(ctx, string(req.Key))
		return nil, map[string]any{"hospital_key": key}, err
	})
	if err != nil {
		return nil, err
	}
	return map[string]string{"hospital_key": key}, nil
}

var _ api.PackAdmin = admin{}
