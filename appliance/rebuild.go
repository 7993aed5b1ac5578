package appliance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/problem"
	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
	"yinjian/dbdriver/sqlite"
)

// Kinds of entries about a rebuild.
const (
	kindRebuildIntent  = "projection.rebuild/intent"
	kindRebuildOutcome = "projection.rebuild/outcome"
)

// A RebuildReport is the answer to a rebuild.
type RebuildReport struct {
	Nodes []RebuiltNode `json:"nodes"`
	// SetAside is where the embedded database's damaged file went.
	SetAside string `json:"set_aside,omitempty"`
}

// A RebuiltNode is one node's part.
type RebuiltNode struct {
	Node string `json:"node"`
	// Uncovered are entries at the end of a copy over which there is no signed checkpoint.
	Uncovered uint64               `json:"uncovered,omitempty"`
	Compare   *audit.CompareReport `json:"compare"`
}

// keyOf names the key of a node's batches: those of another node, rebuilt here, are under the key of this appliance,
// which its own cipher machine does not have.
func keyOf(node, by string) string {
	if node == by {
		return batchLabel
	}
	id := batchLabel + "@" + by
	return id[:min(len(id), 64)]
}

// batchKeys are the keys of batches that may be in the database.
func (a *Appliance) batchKeys() audit.MACs {
	keys := audit.MACs{batchLabel: a.batchMAC(), keyOf("", a.cfg.Node): a.batchMAC()}
	for _, n := range a.cfg.Database.Nodes {
		keys[keyOf("", n)] = nil
	}
	return keys
}

// Rebuild has the central database made anew from this journal and from copies of others'. Signing goes on, shipping waits.
func (d admin) Rebuild(ctx context.Context, actor string, req api.Rebuild) (any, error) {
	var ref [16]byte
	rand.Read(ref[:]) // never fails (crypto/rand)
	note := func(kind string, fields ...audit.Field) error {
		_, err := d.a.journal.Append(context.WithoutCancel(ctx), audit.Draft{
			Kind: kind, Actor: actor, Object: d.a.cfg.Node, Fields: append(fields, audit.Field{Name: "intent", Value: audit.Text(hex.EncodeToString(ref[:]))}),
		})
		if err != nil {
			err = journalRefused(err)
		}
		return err
	}
	report, err := d.a.projection.rebuild(ctx, req, func() error {
		return note(kindRebuildIntent, audit.Field{Name: "reason", Value: audit.Text(req.Reason)},
			audit.Field{Name: "replace", Value: audit.Text(cutText(strings.Join(req.Replace, " ")))},
			audit.Field{Name: "remove", Value: audit.Text(cutText(strings.Join(req.Remove, " ")))},
			audit.Field{Name: "journals", Value: audit.Text(cutText(strings.Join(req.Journals, " ")))})
	})
	if report == nil { // refused before anything was done
		return nil, err
	}
	result := "done"
	if err != nil {
		result = cutText("stopped: " + err.Error())
	}
	if nerr := note(kindRebuildOutcome, audit.Field{Name: "result", Value: audit.Text(result)}); nerr != nil {
		return nil, errors.Join(err, nerr)
	}
	if err != nil {
		return nil, problem.New(problem.NotReady, "重建没有完成 (the rebuild is not finished)：为何见 yinjian status 与运行日志",
			"原因消除后再执行同一命令，从停下处继续 (run the same command again when the cause is gone: it goes on where it stopped)").With(err)
	}
	return report, nil
}

// rebuild takes the database from the shipper, opens it, decides what goes, and makes it anew. A nil report means that
// nothing was changed. begin is called before anything is.
func (p *projection) rebuild(ctx context.Context, req api.Rebuild, begin func() error) (*RebuildReport, error) {
	copies, err := openCopies(ctx, req.Journals, p.a.cfg.Node)
	if err != nil {
		return nil, err
	}
	defer copies.close()
	release, err := p.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	report := &RebuildReport{Nodes: []RebuiltNode{}}
	place, err := p.place()
	if err != nil {
		return nil, err
	}
	store, err := connect.Open(ctx, place, p.author())
	if errors.Is(err, dbdriver.ErrDamaged) || errors.Is(err, dbdriver.ErrUnfit) {
		if !slices.Contains(req.Replace, p.a.cfg.Node) {
			return nil, problem.New(problem.Exists, "库已损坏或缺表，尚未动它 (the database is damaged or lacks tables, and was left alone)",
				fmt.Sprintf("确认由日志重建：--replace %s (say so with --replace)", p.a.cfg.Node)).With(err)
		}
		if report.SetAside, err = connect.Repair(ctx, place, p.author()); err == nil {
			store, err = connect.Open(ctx, place, p.author())
		}
	}
	if err != nil {
		return nil, problem.New(problem.NotReady, "中心库打不开："+shownError(err), "见运行日志与 yinjian db check (see the log, and yinjian db check)").With(err)
	}
	defer store.Close()
	p.seal(store)
	journals, err := p.todo(ctx, store, req, copies)
	if err != nil {
		return nil, err
	}
	if err := begin(); err != nil {
		return nil, err
	}
	now := func() int64 { return p.a.clock.Now().Time.UnixMicro() }
	campuses := slices.Clone(p.nodes())
	decisions := account.Decisions{Centre: store, Log: p.a.log}
	if !slices.Contains(journals, audit.Source(p.a.journal)) {
		campuses = append(campuses, p.a.cfg.Node)
	} else {
		decisions.Mend = func(ctx context.Context, all []account.Decision) error { return store.MendDecisions(ctx, all, now()) }
	}
	reports, err := audit.Rebuild(ctx, audit.RebuildConfig{
		Projection: store, Journals: journals, Remove: req.Remove, By: p.a.cfg.Node, Now: now,
		Tables: []audit.Table{audit.Records{
			Projection: &duplicates{Store: store, paired: p.a.directory.Paired, log: p.a.log}, MAC: p.a.batchMAC(), KeyID: func(node string) string { return keyOf(node, p.a.cfg.Node) }, By: p.a.cfg.Node, Log: p.a.log,
		}, central.Marks{Store: store, Now: now}, decisions},
		MACs: p.a.batchKeys(), Campuses: campuses, Progress: p.progress,
	})
	for i, r := range reports {
		one := RebuiltNode{Node: journals[i].Node(), Compare: r}
		if c, ok := journals[i].(*audit.Copy); ok {
			one.Uncovered = c.Report().Uncovered
		}
		report.Nodes = append(report.Nodes, one)
	}
	return report, err
}

// todo decides whose rows are made anew: a node's that has a journal and no rows, or is named to be replaced, or whose
// rebuild was begun before.
func (p *projection) todo(ctx context.Context, store *central.Store, req api.Rebuild, copies *copies) ([]audit.Source, error) {
	present, err := store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	changed, err := store.ChangeNodes(ctx)
	if err != nil {
		return nil, err
	}
	present = append(present, changed...)
	marks, err := store.Marks(ctx)
	if err != nil {
		return nil, err
	}
	own := p.a.cfg.Node
	all := append([]audit.Source{p.a.journal}, copies.journals...)
	has := func(node string) bool {
		return slices.ContainsFunc(all, func(j audit.Source) bool { return j.Node() == node })
	}
	for _, node := range req.Replace {
		if !has(node) {
			return nil, problem.Invalid("replace", "没有节点 %s 的日志，不能重建；只删除其行用 --remove (there is no journal of node %s; --remove removes its rows)", node, node)
		}
	}
	for _, node := range req.Remove {
		if has(node) || slices.Contains(p.a.cfg.Database.Nodes, node) {
			return nil, problem.Invalid("remove", "节点 %s 有自己的日志，不能删除其行 (node %s has a journal of its own)", node, node)
		}
	}
	var out []audit.Source
	for _, j := range all {
		node := j.Node()
		begun := slices.ContainsFunc(marks, func(m audit.RebuildMark) bool { return m.Node == node && m.By == own })
		switch {
		case begun || !slices.Contains(present, node):
			out = append(out, j)
		case slices.Contains(req.Replace, node):
			n, err := audit.Beyond(ctx, j, store)
			if err != nil {
				return nil, err
			}
			if n > 0 && !req.Discard {
				return nil, problem.New(problem.Exists, fmt.Sprintf("库中节点 %s 有 %d 行在日志中没有条目：恢复备份时丢失的，或是后来加入的；重建不能再造 (%d rows of node %s have no entry: a restore lost it, or they were added)", node, n, n, node),
					"先保存它们（yinjian db compare -o json、yinjian backup missing），确认删除则加 --discard (save them first; --discard removes them)")
			}
			out = append(out, j)
		case node != own || len(copies.journals) == 0:
			return nil, problem.New(problem.Exists, fmt.Sprintf("库中已有节点 %s 的行 (the database has rows of node %s)", node, node),
				fmt.Sprintf("确认这些行由日志重新生成，则加 --replace %s (say with --replace that they are made anew)", node))
		}
	}
	return out, nil
}

// copies are journals of appliances that are no more.
type copies struct {
	journals []audit.Source
	stores   []*sqlite.Journal
}

func (c *copies) close() {
	for _, s := range c.stores {
		_ = s.Close() // nothing was written
	}
}

// openCopies opens and verifies copies of other appliances' folders.
func openCopies(ctx context.Context, dirs []string, own string) (*copies, error) {
	c := &copies{}
	for _, dir := range dirs {
		j, err := c.open(ctx, dir)
		if err == nil && (j.Node() == own || slices.ContainsFunc(c.journals, func(o audit.Source) bool { return o.Node() == j.Node() })) {
			err = fmt.Errorf("节点 %s 的日志已有 (there is a journal of that node already)", j.Node())
		}
		if err != nil {
			c.close()
			return nil, problem.Invalid("journals", "%s：不能用 (cannot be used): %v", dir, err)
		}
		c.journals = append(c.journals, j)
	}
	return c, nil
}

func (c *copies) open(ctx context.Context, dir string) (*audit.Copy, error) {
	key, err := show.ReadPublicKey(filepath.Join(dir, "log.pem"))
	if err != nil {
		return nil, err
	}
	s, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: filepath.Join(dir, "journal"), ReadOnly: true})
	if err != nil {
		return nil, err
	}
	c.stores = append(c.stores, s)
	return audit.OpenCopy(ctx, s, audit.Options{LogKey: key})
}

// take stops the shipper and keeps it from starting again until release.
func (p *projection) take(ctx context.Context) (release func(), err error) {
	p.mu.Lock()
	if p.rebuilding != nil {
		p.mu.Unlock()
		return nil, problem.New(problem.NotReady, "已有一次重建在进行 (a rebuild is under way)", "等它结束，进度见 yinjian status (wait for its end)")
	}
	p.rebuilding = &audit.RebuildProgress{Phase: "opening"}
	interrupt := p.interrupt
	p.mu.Unlock()
	give := func() {
		p.mu.Lock()
		p.rebuilding = nil
		p.mu.Unlock()
	}
	if interrupt != nil {
		interrupt()
	}
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		give()
		return nil, ctx.Err()
	}
	return func() {
		give()
		<-p.turn
		select {
		case p.resume <- struct{}{}:
		default:
		}
	}, nil
}

func (p *projection) progress(r audit.RebuildProgress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rebuilding = &r
}

// place is where the database is, and the time for its certificates.
func (p *projection) place() (connect.Place, error) {
	place, err := p.a.cfg.Database.Place(p.a.dir)
	place.Now = func() time.Time { return p.a.clock.Now().Time }
	return place, err
}
