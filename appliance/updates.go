package appliance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/appliance/update"
	"yinjian/hsm"
	"yinjian/tsa"
)

// Entries about the sealed image. What an administrator does is journalled before the agent does it.
const (
	kindUpdateStaging   = "update.image/staging"   // a bundle begins to be written
	kindUpdateStaged    = "update.image/staged"    // it is whole in the idle slot
	kindUpdateCommit    = "update.image/commit"    // it may start next
	kindUpdateCancelled = "update.image/cancelled" // it may not
	kindUpdateRestart   = "update.image/restart"   // the machine is restarted into it
	kindUpdateGood      = "update.image/good"      // the running image has proved itself, and is counted no more
	kindUpdateLeft      = "update.image/left"      // an image was tried and left again
)

// UpdateSocket is the variable of the environment by which a sealed image says where its agent listens.
const UpdateSocket = "YINJIAN_UPDATE_SOCKET"

// Update is the part of the configuration about the sealed image.
type Update struct {
	// 密封映像的升级代理所在的本机套接字，由映像设定；不写则这台机器没有可换的映像，`yinjian update` 无从谈起 (socket of the
	// agent that writes images; none where this is no sealed appliance)
	// 缺省：环境变量 `YINJIAN_UPDATE_SOCKET`，密封映像里已设；没有则空
	Socket string `toml:"socket,omitempty"`
}

var errNoImage = problem.New(problem.NotFound, "这台机器不是密封设备，没有可升级的映像 (this is no sealed appliance: there is no image to replace)",
	"用软件包升级：见 docs/operations.md (upgrade by packages)")

func (a *Appliance) agent() (*update.Client, error) {
	if a.cfg.Update.Socket == "" {
		return nil, errNoImage
	}
	return &update.Client{Socket: a.cfg.Update.Socket}, nil
}

// updateProblem says what an agent's error means to whoever asked.
func updateProblem(err error) error {
	var p *problem.Problem
	if err == nil || errors.As(err, &p) {
		return err
	}
	if errors.Is(err, update.ErrNoAgent) {
		return problem.New(problem.NotReady, "升级代理没有应答 (the update agent does not answer)", "查看 yinjian-update.service 的日志 (see that service's log)").With(err)
	}
	return err
}

// UpdateStatus satisfies api.UpdateAdmin.
func (d admin) UpdateStatus(ctx context.Context, _ string) (any, error) {
	c, err := d.a.agent()
	if err != nil {
		return nil, err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return nil, updateProblem(err)
	}
	return s, nil
}

// note journals an act about the image; what is about is its version.
func (d admin) noteUpdate(ctx context.Context, kind, actor string, before, after any, more ...audit.Field) error {
	changed, err := audit.Changed(before, after)
	if err != nil {
		return err
	}
	_, err = d.a.journal.Append(ctx, audit.Draft{Kind: kind, Actor: actor, Object: d.a.cfg.Node, State: true, Fields: append(changed, more...)})
	if err != nil {
		return journalRefused(err)
	}
	return nil
}

// imageOf is what the change log says of an image that was offered.
func imageOf(o *update.Offer, state string) map[string]any {
	return map[string]any{"index": o.Index, "version": o.Version, "manifest_sm3": o.SM3, "state": state}
}

// StageUpdate satisfies api.UpdateAdmin: the bundle goes on to the agent as it comes.
func (d admin) StageUpdate(ctx context.Context, actor string, bundle io.Reader) (any, error) {
	c, err := d.a.agent()
	if err != nil {
		return nil, err
	}
	if err := d.noteUpdate(ctx, kindUpdateStaging, actor, nil, nil); err != nil {
		return nil, err
	}
	o, err := c.Stage(ctx, bundle)
	if err != nil {
		if s, e := c.Status(context.WithoutCancel(ctx)); e == nil { // what was in the slot may be gone, and what was left there with it
			d.a.images.keep(s.Failed)
		}
		return nil, updateProblem(err)
	}
	d.a.images.keep(nil)
	return o, d.noteUpdate(context.WithoutCancel(ctx), kindUpdateStaged, actor, nil, imageOf(o, "staged"))
}

// CommitUpdate satisfies api.UpdateAdmin.
func (d admin) CommitUpdate(ctx context.Context, actor string, req api.CommitUpdate) (any, error) {
	c, err := d.a.agent()
	if err != nil {
		return nil, err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return nil, updateProblem(err)
	}
	if s.Staged == nil || s.Staged.SM3 != req.SM3 { // the agent says what is wrong
		_, err := c.Commit(ctx, req.SM3)
		return nil, updateProblem(cmpError(err))
	}
	if err := d.noteUpdate(ctx, kindUpdateCommit, actor, imageOf(s.Staged, "staged"), imageOf(s.Staged, "committed"),
		personsField(req.Persons), audit.Field{Name: "reason", Value: audit.Text(req.Reason)}); err != nil {
		return nil, err
	}
	o, err := c.Commit(context.WithoutCancel(ctx), req.SM3)
	if err != nil {
		return nil, updateProblem(err)
	}
	return o, nil
}

// cmpError is an error in any case: what was not done must not look as if it were.
func cmpError(err error) error {
	if err == nil {
		return errors.New("update: the agent did what it had nothing to do for")
	}
	return err
}

// CancelUpdate satisfies api.UpdateAdmin.
func (d admin) CancelUpdate(ctx context.Context, actor string, req api.CancelUpdate) (any, error) {
	c, err := d.a.agent()
	if err != nil {
		return nil, err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return nil, updateProblem(err)
	}
	o := s.Waits()
	if o == nil { // the agent says what is wrong
		_, err := c.Cancel(ctx, "")
		return nil, updateProblem(cmpError(err))
	}
	was := "offered"
	if o.SM3 == "" {
		was = "left"
	}
	if err := d.noteUpdate(ctx, kindUpdateCancelled, actor, imageOf(o, was), imageOf(o, "cancelled"), audit.Field{Name: "reason", Value: audit.Text(req.Reason)}); err != nil {
		return nil, err
	}
	if o, err = c.Cancel(context.WithoutCancel(ctx), o.SM3); err != nil {
		return nil, updateProblem(err)
	}
	if was == "left" {
		d.a.images.keep(nil)
	}
	return o, nil
}

// RestartForUpdate satisfies api.UpdateAdmin.
func (d admin) RestartForUpdate(ctx context.Context, actor string, req api.RestartForUpdate) (any, error) {
	c, err := d.a.agent()
	if err != nil {
		return nil, err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return nil, updateProblem(err)
	}
	if o := s.Committed; o != nil { // otherwise the agent says what is wrong
		if err := d.noteUpdate(ctx, kindUpdateRestart, actor, imageOf(o, "committed"), imageOf(o, "restarting"), audit.Field{Name: "reason", Value: audit.Text(req.Reason)}); err != nil {
			return nil, err
		}
	}
	o, err := c.Restart(context.WithoutCancel(ctx))
	if err != nil {
		return nil, updateProblem(err)
	}
	return o, nil
}

// leftImages are the images that were tried and left, each journalled once, until another is staged or they are forgotten. Safe for
// concurrent use.
type leftImages struct {
	mu    sync.Mutex
	known []uint64 // guarded by mu
}

// replay takes them from the journal.
func (l *leftImages) replay(e *audit.Entry) {
	switch e.Kind {
	case kindUpdateLeft:
		if n, ok := e.Field("index").(audit.Int); ok {
			l.add(uint64(n))
		}
	case kindUpdateStaged, kindUpdateCancelled:
		l.keep(nil)
	}
}

func (l *leftImages) add(index uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known = append(l.known, index)
}

// keep forgets all that are not among these.
func (l *leftImages) keep(those []uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.known = slices.DeleteFunc(l.known, func(index uint64) bool { return !slices.Contains(those, index) })
}

func (l *leftImages) all() []uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.known)
}

// proveImage has the running image called good when it has done what it is for: the appliance is ready, and its own cipher
// machine has signed a token that is in the journal. Until then the boot loader counts its starts, and goes back to the image
// before. It also writes down which images were tried and left.
func (a *Appliance) proveImage(ctx context.Context) error {
	c, err := a.agent()
	if err != nil {
		return nil
	}
	p := imageProof{a: a, c: c}
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	told := ""
	for {
		done, err := p.try(ctx)
		if err != nil && ctx.Err() == nil && err.Error() != told { // each reason once
			told = err.Error()
			a.log.WithError(err).Warn("the image could not be called good yet")
		}
		if done {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// An imageProof is how far the running image has proved itself.
type imageProof struct {
	a    *Appliance
	c    *update.Client
	said bool // there is an entry that the running image is good
}

func (p *imageProof) try(ctx context.Context) (done bool, err error) {
	a := p.a
	s, err := p.c.Status(ctx)
	if err != nil {
		return false, err
	}
	a.images.keep(s.Failed)
	for _, index := range s.Failed {
		if slices.Contains(a.images.all(), index) {
			continue
		}
		a.log.WithField("image", index).Error("an image was tried and did not prove itself: the one before it runs again")
		if err := a.noteImage(ctx, kindUpdateLeft, index, "", ""); err != nil {
			return false, err
		}
		a.images.add(index)
	}
	if s.Good { // the agent may have died before it took the mark of the trial away
		err := p.c.MarkGood(ctx)
		return err == nil, err
	}
	if !p.said { // it signs once, however often the agent has to be asked
		unit, err := a.proveUnits(ctx)
		if err != nil {
			return false, err
		}
		if err := a.noteImage(ctx, kindUpdateGood, s.Running, s.Version, unit); err != nil {
			return false, err
		}
		p.said = true
	}
	if err := p.c.MarkGood(ctx); err != nil {
		return false, err
	}
	a.log.WithField("image", s.Running).WithField("version", s.Version).Info("the image has proved itself, and is called good")
	return true, nil
}

// proveUnits answers the unit that has signed a token: the first that can of those that administrators have not stopped. Where they
// have stopped all of them, or have only the upstream device stamp, there is nothing that the image would be asked to sign: it is
// enough then that the appliance is ready but for that, and the answer is "". A unit that has no certificate, or none that holds, is
// no such case: who knows whether that is the image's fault.
func (a *Appliance) proveUnits(ctx context.Context) (string, error) {
	var names []string
	for _, u := range a.cfg.units() {
		_, device := a.stamper(a.units[u.Name]).(*choice)
		if a.service.ready(u.Name) != nil || device && a.device.only() {
			continue
		}
		names = append(names, u.Name)
	}
	if reasons := (health{a}).reasons(len(names) > 0); len(reasons) > 0 {
		return "", fmt.Errorf("not ready: %v", reasons)
	}
	var failed error
	for _, name := range names {
		err := a.proveUnit(ctx, name)
		if err == nil {
			return name, nil
		}
		failed = errors.Join(failed, fmt.Errorf("unit %s: %w", name, err))
	}
	return "", failed
}

// proveUnit has a unit sign a token, and nobody in its stead.
func (a *Appliance) proveUnit(ctx context.Context, name string) error {
	if err := a.tokenReserve(); err != nil {
		return err
	}
	q := tsa.Request{CertReq: true}
	var proof [32]byte
	rand.Read(proof[:]) // never fails (crypto/rand)
	q.Imprint = tsa.ImprintOf(proof[:])
	query, err := q.Bytes()
	if err != nil {
		return err
	}
	ctx = hsm.WithCaller(WithRequester(ctx, "appliance"), hsm.Caller{Application: "appliance"})
	answer, err := tsa.ParseResponse(a.service.respond(name, "appliance", func() []byte { return a.units[name].Respond(ctx, query) }))
	if err != nil {
		return err
	}
	return answer.Err()
}

func (a *Appliance) noteImage(ctx context.Context, kind string, index uint64, version, unit string) error {
	_, err := a.journal.Append(ctx, audit.Draft{Kind: kind, Actor: "appliance", Object: a.cfg.Node, State: true, Fields: []audit.Field{
		{Name: "index", Value: audit.Int(int64(index))}, {Name: "version", Value: audit.Text(version)}, {Name: "unit", Value: audit.Text(unit)},
	}})
	return err
}

var _ api.UpdateAdmin = admin{}
