package appliance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/assess"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/docs"
	"yinjian/hsm"
	"yinjian/tsa"
)

// An assessor makes packs for evaluators, one at a time. What it does is done slowly beside the signatures: tests of randomness
// in a process of the lowest priority, long readings with more rest than work.
type assessor struct {
	a       *Appliance
	command []string // of the process that tests random numbers
	busy    atomic.Bool
	work    *work // of the one under way, whose goroutine's it is
}

// assessmentRest is how much longer than it works a long reading rests.
const assessmentRest = 3

// rest rests in proportion to what was worked since begun, which is set anew.
func rest(ctx context.Context, begun *time.Time) {
	select {
	case <-time.After(min(assessmentRest*time.Since(*begun), time.Second)):
	case <-ctx.Done():
	}
	*begun = time.Now() // interval
}

// Assess satisfies api.Admin. Order: 1. the intent, with the assessor's nonce; 2. everything that is tried and read; 3. a token over
// the report; 4. the outcome, which names the report's SM3 and holds the token; 5. its place under a checkpoint that the log key
// signs. A stop in between leaves an intent without an outcome, and no report.
func (d admin) Assess(ctx context.Context, actor string, req api.Assess) (any, error) {
	s := d.a.assessor
	if !s.busy.CompareAndSwap(false, true) {
		return nil, problem.New(problem.NotReady, "正在进行另一次评估 (another assessment is under way)", "等它结束后再试 (wait for it to end)")
	}
	defer s.busy.Store(false)
	s.work = d.a.works.begin("assess")
	defer s.work.end()
	return s.run(ctx, actor, req)
}

func (s *assessor) run(ctx context.Context, actor string, req api.Assess) (*wire.Assessed, error) {
	a := s.a
	if r := a.clock.Now(); !r.Trusted() {
		return nil, problem.New(problem.TimeUntrusted, "时间不可信，评估报告不能盖时间戳 (time is not trusted, and a report needs a timestamp)", "见 yinjian time status (see yinjian time status)")
	}
	var id [16]byte
	rand.Read(id[:]) // never fails (crypto/rand)
	intent := hex.EncodeToString(id[:])
	common := []audit.Field{
		{Name: "intent", Value: audit.Text(intent)}, {Name: "nonce", Value: audit.Text(req.Nonce)}, {Name: "assessor", Value: audit.Text(req.Assessor)},
		{Name: "full", Value: audit.Bool(req.Full)},
	}
	if _, err := a.journal.Append(ctx, audit.Draft{Kind: assess.KindIntent, Actor: actor, Object: a.cfg.Node, Fields: common}); err != nil {
		return nil, journalRefused(err)
	}
	pack, err := s.pack(ctx, actor, req, intent, common)
	if err != nil {
		// Whoever asked may have gone; that nothing came of it is journalled all the same.
		_, jerr := a.journal.Append(context.WithoutCancel(ctx), audit.Draft{Kind: assess.KindOutcome, Actor: actor, Object: a.cfg.Node, Fields: append(common, audit.Field{
			Name: "result", Value: audit.Text(cutText("failed: " + err.Error())),
		})})
		return nil, errors.Join(err, jerr)
	}
	data, err := pack.Encode()
	if err != nil {
		return nil, err
	}
	return &wire.Assessed{Pack: data}, nil
}

func (s *assessor) pack(ctx context.Context, actor string, req api.Assess, intent string, common []audit.Field) (*assess.Pack, error) {
	a := s.a
	unit := a.unitFor(hsm.SM2)
	if unit == nil {
		unit = a.unitFor(hsm.RSA2048)
	}
	if unit == nil {
		return nil, problem.New(problem.NotReady, "没有时间戳单元，报告不能盖时间戳 (there is no timestamp unit)", "在配置中设置单元 (configure one)")
	}
	report, err := s.collect(ctx, actor, req, intent)
	if err != nil {
		return nil, err
	}
	data, err := report.Encode()
	if err != nil {
		return nil, err
	}
	if len(data) > assess.MaxPack*3/4 {
		return nil, problem.New(problem.TooLarge, fmt.Sprintf("报告有 %d MiB，过大 (the report is too large)", len(data)>>20), "不带 --full 再试 (try without --full)")
	}
	token, err := gatedUnit{a.service, unit.name, unit}.Issue(ctx, &tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true})
	if err != nil {
		return nil, err
	}
	sum := sm3.Sum(data)
	receipt, err := a.journal.Append(ctx, audit.Draft{
		Kind: assess.KindOutcome, Actor: actor, Object: a.cfg.Node,
		Fields: append(common, audit.Field{Name: evidence.FieldAttested, Value: audit.Octets(sum[:])}, audit.Field{Name: "result", Value: audit.Text("done")},
			audit.Field{Name: "shown", Value: audit.Int(report.Count(assess.Shown))}, audit.Field{Name: "failed", Value: audit.Int(report.Count(assess.Failed))},
			audit.Field{Name: "not_evidenced", Value: audit.Int(report.Count(assess.NotEvidenced))}),
		Payloads: []audit.Attachment{{Name: "token", MediaType: "application/timestamp-reply", Data: token.DER}},
	})
	if err != nil {
		a.accounting.discard(err, token.DER)
		return nil, journalRefused(err)
	}
	pack := &assess.Pack{Format: assess.FormatPack, Report: data, Token: token.DER, Certificates: [][]byte{}, CRLs: [][]byte{}}
	rec, err := a.journal.Entry(ctx, receipt.Sequence)
	if err != nil {
		return nil, err
	}
	if pack.Journal, err = evidence.Place(ctx, a.journal, rec); err != nil {
		return nil, err
	}
	certificates, lists := a.preserver.validation()
	for _, c := range append(unit.Chain(), certificates...) {
		pack.Certificates = append(pack.Certificates, c.Raw)
	}
	pack.CRLs = append(pack.CRLs, lists...)
	return pack, nil
}

// A collection is a report that is being made.
type collection struct {
	ctx    context.Context // of this assessment alone
	a      *Appliance
	s      *assessor
	actor  string
	req    api.Assess
	now    func() string
	report *assess.Report
	// unknown are the slots whose token did not say what it is.
	unknown []string
}

// A missing is why something is not evidenced.
type missing string

func (m missing) Error() string { return string(m) }

// A line says what an item is, before it is tried.
type line struct {
	id, title, command, shows, limits string
	replayed                          bool
}

// try makes one item: what f answers is its raw output, and its error why it is not shown.
func (c *collection) try(section int, l line, f func() (any, error)) {
	if c.ctx.Err() != nil {
		return
	}
	out, err := f()
	raw := []byte("null")
	if out != nil {
		b, merr := json.Marshal(out)
		if merr != nil {
			err = errors.Join(err, merr)
		} else {
			raw = b
		}
	}
	it := assess.Item{
		ID: l.id, Section: section, Title: l.title, Status: assess.Shown, Shows: l.shows, Limits: l.limits, Command: l.command, At: c.now(), Node: c.a.cfg.Node,
		SM3: assess.Digest(raw), Replayed: l.replayed, Raw: raw,
	}
	var none missing
	switch {
	case errors.As(err, &none):
		it.Status, it.Why = assess.NotEvidenced, string(none)
	case err != nil:
		it.Status, it.Why = assess.Failed, cutText(err.Error())
		var p *problem.Problem
		if errors.As(err, &p) {
			it.Why = p.Detail
		}
	}
	c.report.Items = append(c.report.Items, it)
	c.s.work.is(uint64(len(c.report.Items)), 0)
}

// absent makes an item of what there is not.
func (c *collection) absent(section int, l line, why string) {
	c.try(section, l, func() (any, error) { return nil, missing(why) })
}

func (s *assessor) collect(ctx context.Context, actor string, req api.Assess, intent string) (*assess.Report, error) {
	a := s.a
	now := func() string { return a.clock.Now().Time.UTC().Format(time.RFC3339Nano) }
	build, err := fileSM3("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	spki, err := smx509.MarshalPKIXPublicKey(a.logKey.Public())
	if err != nil {
		return nil, err
	}
	c := &collection{ctx: ctx, a: a, s: s, actor: actor, req: req, now: now, report: &assess.Report{
		Format: assess.FormatReport, Products: append([]assess.Product{}, req.Products...), Threats: assess.ParseThreats(docs.Threats),
		Header: assess.Header{
			Product: "印鉴 Yinjian", Version: Version, Build: build, Image: assess.NoImage, Serial: audit.Sum(spki).String()[:16], Node: a.cfg.Node, Campus: a.cfg.Campus,
			Epoch: a.journal.Epoch().String(), Nonce: req.Nonce, Assessor: req.Assessor, Simulated: a.cfg.Evaluation.GNSSFeed, Full: req.Full, Intent: intent, Began: now(),
		},
	}}
	c.mode()
	c.header(spki)
	c.algorithms()
	c.random()
	c.keys()
	c.certificates()
	c.integrity()
	c.channels()
	c.software()
	c.time()
	c.identity()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c.report.Header.Ended = now()
	c.report.Finish()
	return c.report, nil
}

// fileSM3 is the SM3 of a file, hexadecimal.
func fileSM3(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sm3.New()
	if _, err := f.WriteTo(h); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
