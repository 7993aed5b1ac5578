package account

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
)

// MaxEnrolments is how many signers [Service.EnrolAll] takes at once. No change of the directory waits for the keys of
// others, but keys of a batch are lost together when the appliance is killed.
const MaxEnrolments = 64

// MaxImport is how many signers one request may have: what two persons approve at once.
const MaxImport = 10_000

// enrolAtOnce bounds how many signers of a batch have their keys made at the same time, so that signatures find a session.
const enrolAtOnce = 4

// Results of an enrolment in bulk.
const (
	EnrolNew      = "new"      // a trial: it would be enrolled
	EnrolDone     = "enrolled" // now
	EnrolPresent  = "present"  // enrolled already, and the directory says the same
	EnrolDiffers  = "differs"  // enrolled already, and the directory says something else, which stays
	EnrolRefused  = "refused"
	EnrolNotTried = "not tried" // something failed before; try again
)

// An EnrolResult is what became of one enrolment of many.
type EnrolResult struct {
	Result      string
	Differences []SignerDifference // with EnrolDiffers
	Err         error              // with EnrolRefused and EnrolNotTried
}

// A SignerDifference is a field of which table and directory say different things.
type SignerDifference struct {
	Field string `json:"field"`
	Have  string `json:"have"` // in the directory
	Want  string `json:"want"` // in the table
}

// EnrolAll enrols signers in bulk, without PINs, and answers for each what became of it, in their order. One who is enrolled
// already is never changed: what is different is named. With trial nothing is written. Others may change the directory
// meanwhile.
//
// Order: 1. all rows are judged; 2. the intents, in one commit; 3. keys and certificates, some at a time; 4. the outcomes,
// in one commit. A stop in between leaves open intents, which [Service.Settle] closes, keys destroyed; the same call again
// enrols those who are not there. So a batch may be repeated as often as one likes.
func (s *Service) EnrolAll(ctx context.Context, actor string, all []Enrolment, trial bool) ([]EnrolResult, error) {
	if len(all) > MaxEnrolments {
		return nil, problem.Invalid("signers", "一次至多 %d 人 (%d at most)", MaxEnrolments, MaxEnrolments)
	}
	results := make([]EnrolResult, len(all))
	if trial {
		s.judge(all, results)
		return results, nil
	}
	made, err := s.announceAll(ctx, actor, all, results)
	if err != nil {
		return nil, err
	}
	defer s.endAnnounced(made)
	var g errgroup.Group
	g.SetLimit(enrolAtOnce)
	for _, e := range made {
		g.Go(func() error { e.err = s.makeKeys(ctx, e); return nil })
	}
	_ = g.Wait() // each has its own error
	s.concludeAll(ctx, actor, made)
	for _, e := range made {
		if results[e.at] = (EnrolResult{Result: EnrolDone}); e.err != nil {
			results[e.at] = EnrolResult{Result: EnrolNotTried, Err: fmt.Errorf("account: enrolling %s: %w", e.signer.ID, e.err)}
		}
	}
	return results, nil
}

// An enrolling is a signer of a batch on the way.
type enrolling struct {
	at     int // in the batch
	signer Signer
	asked  *Enrolment
	intent intent
	prefix string
	err    error
}

// judge fills in what can be said before anything is made.
func (s *Service) judge(all []Enrolment, results []EnrolResult) {
	folded := map[string]string{} // ids as people read them
	s.mu.RLock()
	for id := range s.signers {
		folded[strings.ToUpper(id)] = id
	}
	s.mu.RUnlock()
	for i := range all {
		e := &all[i]
		e.Algorithms = slices.Clone(e.Algorithms)
		results[i] = s.judgeOne(e, folded)
		if results[i].Result == EnrolNew {
			folded[strings.ToUpper(e.ID)] = e.ID
		}
	}
}

func (s *Service) judgeOne(e *Enrolment, folded map[string]string) EnrolResult {
	refuse := func(err error) EnrolResult { return EnrolResult{Result: EnrolRefused, Err: err} }
	if e.PIN != "" {
		return refuse(problem.Invalid("pin", "批量登记不设 PIN (no PINs in bulk)"))
	}
	if err := s.checkEnrolment(e); err != nil {
		return refuse(err)
	}
	for _, f := range []struct{ name, value string }{{"name", e.Name}, {"department", e.Department}, {"campus", e.Campus}, {"role", e.Role}} {
		if looksLikeFormula(f.value) {
			return refuse(problem.Invalid(f.name, "以 %q 开头，电子表格会当作公式 (a spreadsheet would compute it)", []rune(f.value)[0]))
		}
	}
	g, ok := s.Signer(e.ID)
	if !ok {
		if other := folded[strings.ToUpper(e.ID)]; other != "" {
			return refuse(problem.New(problem.Exists, fmt.Sprintf("与 %s 只有大小写不同或重复 (the same as %s but for case, or given twice)", other, other),
				"核对工号 (check the staff number)"))
		}
		return EnrolResult{Result: EnrolNew}
	}
	if d := s.differences(g, e); len(d) > 0 {
		return EnrolResult{Result: EnrolDiffers, Differences: d}
	}
	return EnrolResult{Result: EnrolPresent}
}

// looksLikeFormula reports whether a spreadsheet that is given the text in a CSV file may take it for a formula.
func looksLikeFormula(s string) bool {
	return s != "" && strings.ContainsRune("=+-@＝＋－＠", []rune(s)[0])
}

// differences are what the directory has otherwise than an enrolment asks for.
func (s *Service) differences(g *Signer, e *Enrolment) (out []SignerDifference) {
	var held []string
	s.mu.RLock()
	for _, k := range s.held[signerOwner+g.ID] {
		if k.destroyed.IsZero() && !slices.Contains(held, k.algorithm) {
			held = append(held, k.algorithm)
		}
	}
	s.mu.RUnlock()
	slices.Sort(held)
	wanted := slices.Sorted(slices.Values(e.Algorithms))
	for _, f := range []SignerDifference{
		{"name", g.Name, e.Name}, {"department", g.Department, e.Department}, {"campus", g.Campus, e.Campus}, {"role", g.Role, e.Role},
		{"test", fmt.Sprint(g.Test), fmt.Sprint(e.Test)}, {"algorithms", strings.Join(held, " "), strings.Join(wanted, " ")},
		{"stopped", fmt.Sprint(g.Stopped), "false"},
	} {
		if f.Have != f.Want {
			out = append(out, f)
		}
	}
	return out
}

// announceAll judges, and journals the intents of those who are to be enrolled.
func (s *Service) announceAll(ctx context.Context, actor string, all []Enrolment, results []EnrolResult) ([]*enrolling, error) {
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s.judge(all, results)
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, untrustedTime("a certificate's validity")
	}
	if err := s.settle(ctx); err != nil {
		s.cfg.Log.WithError(err).Warning("keys of an interrupted enrolment could not be cleared away")
	}
	var made []*enrolling
	for i := range all {
		if results[i].Result != EnrolNew {
			continue
		}
		e := &all[i]
		unique, err := newID()
		if err != nil {
			return nil, err
		}
		made = append(made, &enrolling{
			at: i, asked: e, prefix: "staff/" + e.ID + "/" + unique[:8] + "/",
			signer: Signer{Version: 1, ID: e.ID, Name: e.Name, Department: e.Department, Campus: e.Campus, Role: e.Role, Test: e.Test, ChangedBy: actor, ChangedAt: now.Time},
		})
	}
	var g errgroup.Group // all at once: the journal writes what waits together
	for _, e := range made {
		g.Go(func() error {
			e.intent, e.err = s.intendUnderWay(ctx, audit.Draft{Kind: kindSignerIntent, Actor: actor, Object: e.signer.ID}, "enrol", e.prefix)
			return nil
		})
	}
	_ = g.Wait() // each has its own error
	return made, nil
}

// intendUnderWay is intend for a change that goes on without the lock: nobody settles it meanwhile.
func (s *Service) intendUnderWay(ctx context.Context, d audit.Draft, act, keyPrefix string) (intent, error) {
	i, err := newIntent(&d, act, keyPrefix)
	if err != nil {
		return i, err
	}
	s.mu.Lock()
	s.underWay[i.id] = true
	s.mu.Unlock()
	return i, s.note(ctx, d)
}

func (s *Service) endAnnounced(made []*enrolling) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range made {
		delete(s.underWay, e.intent.id)
	}
}

// makeKeys makes a signer's keys and certificates.
func (s *Service) makeKeys(ctx context.Context, e *enrolling) (err error) {
	if e.err != nil {
		return e.err
	}
	if s.cfg.Custody != nil {
		if e.signer.Sealing, err = s.newSealing(ctx, e.signer.ID, ""); err != nil {
			return err
		}
	}
	for _, a := range e.asked.Algorithms {
		k, err := s.newSignerKey(ctx, e.prefix+a, a, &e.signer, e.asked.External)
		if err != nil {
			s.discardKeys(err, &e.signer)
			return err
		}
		e.signer.Keys = append(e.signer.Keys, k)
	}
	return nil
}

func (s *Service) discardKeys(reason error, g *Signer) {
	for _, made := range g.Keys {
		s.discard(reason, made.Certificate)
	}
}

// concludeAll journals the outcomes of those whose keys were made.
func (s *Service) concludeAll(ctx context.Context, actor string, made []*enrolling) {
	unlock, err := s.beginChange(ctx)
	if err == nil {
		defer unlock()
	}
	doubts := make([]*doubt, len(made))
	var g errgroup.Group
	failed := err
	for n, e := range made {
		if e.err != nil {
			continue
		}
		if e.err = failed; e.err == nil {
			e.err = s.current(ctx, signerObject(e.signer.ID))
		}
		if problem.CodeOf(e.err) == problem.CentreUnavailable { // one wait for it is enough: other changes wait behind this
			failed = e.err
		}
		if _, there := s.Signer(e.signer.ID); there && e.err == nil { // since the keys were begun
			e.err = errSignerExists
		}
		if e.err != nil {
			s.discardKeys(e.err, &e.signer)
			continue
		}
		g.Go(func() error {
			d := audit.Draft{Kind: kindSigner, Actor: actor, Object: e.signer.ID, Fields: []audit.Field{
				text("intent", e.intent.id), text("act", "enrol"), boolean("pin_set", false), boolean("bulk", true),
			}}
			doubts[n], e.err = s.record(ctx, d, e.intent.ref, &e.signer, nil)
			return nil
		})
	}
	_ = g.Wait() // each has its own error
	if err == nil {
		s.doubts = append(s.doubts, slices.DeleteFunc(doubts, func(d *doubt) bool { return d == nil })...)
	}
}
