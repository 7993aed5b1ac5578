package api

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/emmansun/gmsm/sm3"
	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

const (
	// proposalLife is how long a second person may approve.
	proposalLife = time.Hour
	// answerLife is how long after that the first may read the answer, which is forgotten sooner when he says that he has it:
	// one that is shown a single time is lost with a page that is loaded again or a connection that breaks.
	answerLife   = time.Hour
	maxProposals = 64
	// maxProposed bounds the requests that wait, in bytes.
	maxProposed = 64 << 20
	// ownProposals is the part of both that one administrator may have, so that nobody keeps the others from proposing.
	ownProposals = 4
)

// States of a proposal.
const (
	proposalPending  = "pending"
	proposalRunning  = "running"
	proposalDone     = "done"
	proposalFailed   = "failed"
	proposalDeclined = "declined"
	proposalExpired  = "expired"
)

// A proposal is a request that one administrator has made and another has to approve. It is in memory alone, for it may hold
// PINs: a restart forgets it.
type proposal struct {
	id, sum string // sum: SM3 of method, path and body
	line    *Line
	path    string
	by      *Session
	shown   any // the body, without secrets
	size    int
	begun   time.Time // monotonic
	timer   *time.Timer
	run     func(ctx context.Context, actor string, persons []string) (any, error)

	state    string        // guarded by proposals.mu
	approver *Session      // guarded by proposals.mu
	answer   any           // guarded by proposals.mu: of run; the first person's, until he confirms it
	answered time.Time     // guarded by proposals.mu: when it was run; monotonic
	read     bool          // guarded by proposals.mu: the first person has asked for the answer
	failed   *wire.Problem // guarded by proposals.mu
}

type proposals struct {
	mu    sync.Mutex
	of    map[string]*proposal // guarded by mu
	bytes int                  // guarded by mu: of those that are pending
}

func newProposals() *proposals { return &proposals{of: map[string]*proposal{}} }

func (s *proposals) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.of {
		p.timer.Stop()
	}
}

var errProposalUnknown = problem.New(problem.NotFound, "没有这项待批事项：已办结、过期，或设备已重启 (no such proposal: decided, over, or lost in a restart)", "请提出者重新提出 (have it proposed again)")

// makeRoom forgets the oldest of those that are over and have no answer that nobody has read, where too many are kept. It is
// called under mu.
func (s *proposals) makeRoom() {
	var oldest *proposal
	for _, p := range s.of {
		if p.state != proposalPending && p.state != proposalRunning && (p.answer == nil || p.read) && (oldest == nil || p.begun.Before(oldest.begun)) {
			oldest = p
		}
	}
	if len(s.of) >= 4*maxProposals && oldest != nil {
		oldest.timer.Stop()
		delete(s.of, oldest.id)
	}
}

// settled ends the waiting of a pending proposal. It is called under mu.
func (s *proposals) settled(p *proposal, state string) {
	p.state = state
	s.bytes -= p.size
	p.size = 0
	if state != proposalRunning {
		p.run = nil // holds the request
	}
}

// propose files a request, and answers 202.
func (s *Server) propose(c echo.Context, line *Line, body []byte, run func(ctx context.Context, actor string, persons []string) (any, error)) error {
	r, sess := c.Request(), exchangeOf(c).session
	var id [16]byte
	rand.Read(id[:]) // never fails (crypto/rand)
	p := &proposal{
		id: hex.EncodeToString(id[:]), sum: wire.RequestSM3(r.Method, r.URL.EscapedPath(), body), line: line, path: r.URL.EscapedPath(), by: sess, shown: redacted(body), size: len(body),
		begun: time.Now(), run: run, state: proposalPending, // interval
	}
	q := s.proposals
	q.mu.Lock()
	pending, own, ownBytes := 0, 0, p.size
	for _, o := range q.of {
		if o.state != proposalPending {
			continue
		}
		if pending++; o.by.Administrator == sess.Administrator {
			own++
			ownBytes += o.size
		}
	}
	q.makeRoom()
	if pending >= maxProposals || len(q.of) >= 4*maxProposals || q.bytes+p.size > maxProposed || own >= maxProposals/ownProposals || ownBytes > maxProposed/ownProposals {
		q.mu.Unlock()
		return problem.New(problem.RateLimited, "待批事项过多 (too many proposals)", "先批准或否决已有的 (approve or decline those there are)")
	}
	q.bytes += p.size
	p.timer = time.AfterFunc(proposalLife, func() { s.expire(p) })
	q.of[p.id] = p
	q.mu.Unlock()
	if err := s.notice(r.Context(), "made", sess.actor(), p, ""); err != nil {
		q.mu.Lock()
		defer q.mu.Unlock()
		p.timer.Stop()
		q.settled(p, proposalDeclined)
		delete(q.of, p.id)
		return err
	}
	out, err := json.Marshal(p.proposed())
	if err != nil {
		return err
	}
	return send(c, http.StatusAccepted, echo.MIMEApplicationJSON, out)
}

func (p *proposal) proposed() wire.Proposed {
	out := wire.Proposed{Proposal: p.id, SM3: p.sum, EndsS: int((proposalLife - time.Since(p.begun)) / time.Second)} // interval
	for _, r := range p.line.Second {
		out.Approvers = append(out.Approvers, string(r))
	}
	return out
}

// notice journals what becomes of a proposal: the route, its SM3 and the persons, never the body.
func (s *Server) notice(ctx context.Context, what, actor string, p *proposal, reason string) error {
	fields := []string{"route", p.line.Method + " " + p.line.Pattern, "path", p.path, "request.sm3", p.sum, "proposed_by", p.by.actor()}
	if reason != "" {
		fields = append(fields, "reason", reason)
	}
	return s.cfg.Accounts.Note(ctx, Notice{Kind: "administration.proposal/" + what, Actor: actor, Object: p.id, Fields: fields})
}

// expire ends a proposal whose time has come, and forgets it, with its answer. One that is being done has its time anew after
// it.
func (s *Server) expire(p *proposal) {
	q := s.proposals
	q.mu.Lock()
	was := p.state
	if was == proposalRunning {
		q.mu.Unlock()
		return
	}
	if was == proposalPending {
		q.settled(p, proposalExpired)
	}
	delete(q.of, p.id)
	q.mu.Unlock()
	if was != proposalPending {
		return
	}
	if err := s.notice(context.Background(), "expired", "appliance", p, ""); err != nil {
		s.cfg.Log.WithError(err).WithField("object", p.id).Error("that a proposal is over could not be journalled")
	}
}

func (s *Server) approvalRoutes(e *echo.Echo) {
	e.GET("/admin/v1/approvals", s.local(noBody, func(c echo.Context, _ string, _ []byte) error {
		q, sess := s.proposals, exchangeOf(c).session
		q.mu.Lock()
		out := []wire.Proposal{}
		for _, p := range q.of {
			if p.seenBy(sess) {
				out = append(out, p.view())
			}
		}
		q.mu.Unlock()
		slices.SortFunc(out, func(a, b wire.Proposal) int { return b.EndsS - a.EndsS })
		return answer(c, map[string]any{"proposals": out})
	}))
	e.GET("/admin/v1/approvals/:id", s.local(noBody, func(c echo.Context, _ string, _ []byte) error {
		q, sess := s.proposals, exchangeOf(c).session
		q.mu.Lock()
		p := q.of[c.Param("id")]
		if p == nil || !p.seenBy(sess) {
			q.mu.Unlock()
			return errProposalUnknown
		}
		out := p.view()
		if p.by.Administrator == sess.Administrator {
			out.Answer, p.read = p.answer, true // a key that it has is shown to nobody else
		}
		q.mu.Unlock()
		return answer(c, out)
	}))
	e.POST("/admin/v1/approvals/:id/approve", s.deciding(s.approve))
	e.POST("/admin/v1/approvals/:id/decline", s.deciding(s.decline))
	e.POST("/admin/v1/approvals/:id/confirm", s.deciding(s.confirm))
}

// deciding reads who decides on which proposal.
func (s *Server) deciding(do func(ctx context.Context, sess *Session, req wire.Decide) (*wire.Proposal, error)) echo.HandlerFunc {
	return s.local(jsonBody(s.limits.SmallBody), func(c echo.Context, _ string, body []byte) error {
		var req wire.Decide
		if p := first(decode(body, &req), checkDecide(c, &req)); p != nil {
			return p
		}
		sess := exchangeOf(c).session
		if sess.Administrator == "" {
			return errLoginRequired
		}
		out, err := do(c.Request().Context(), sess, req)
		if err != nil {
			return err
		}
		return answer(c, out)
	})
}

var proposalID = regexp.MustCompile(`^[0-9a-f]{32}$`)

func checkDecide(c echo.Context, r *wire.Decide) *problem.Problem {
	if r.ID = c.Param("id"); !proposalID.MatchString(r.ID) {
		return errProposalUnknown
	}
	if p := first(pattern("sm3", r.SM3, sm3Digest)); p != nil || r.Reason == "" {
		return p
	}
	return text("reason", r.Reason, 256)
}

// seenBy is for who proposed it, who may approve it, and who audits.
func (p *proposal) seenBy(sess *Session) bool {
	return sess.Administrator != "" && (p.by.Administrator == sess.Administrator || sess.Role == auditor[0] || slices.Contains(p.line.Second, sess.Role))
}

// view is called under proposals.mu.
func (p *proposal) view() wire.Proposal {
	out := wire.Proposal{Proposed: p.proposed(), Path: p.path, Title: p.line.Title, Body: p.shown, By: p.by.actor(), State: p.state, Failed: p.failed}
	if p.approver != nil {
		out.Approver = p.approver.actor()
	}
	if p.answer != nil {
		out.AnswerEndsS = max(1, int((answerLife-time.Since(p.answered))/time.Second)) // interval
	}
	return out
}

// take finds a pending proposal that is the one that was looked at. It is called under mu.
func (s *proposals) take(req wire.Decide) (*proposal, *problem.Problem) {
	p := s.of[req.ID]
	switch {
	case p == nil || p.state != proposalPending:
		return nil, errProposalUnknown
	case p.sum != req.SM3:
		return nil, problem.Invalid("sm3", "不是这项待批事项的 SM3 (not this proposal's)")
	}
	return p, nil
}

// approve has the proposal done. From here on the second person's leaving changes nothing.
//
// 1. Who: another person, of a role that may, and the first one may still administer. 2. The approval is journalled. 3. The
// request is run as both, and its answer kept for the first.
func (s *Server) approve(ctx context.Context, sess *Session, req wire.Decide) (*wire.Proposal, error) {
	q := s.proposals
	q.mu.Lock()
	p, no := q.take(req)
	if no == nil {
		no = s.secondOf(p, sess)
	}
	if no != nil {
		q.mu.Unlock()
		return nil, no
	}
	run := p.run
	q.settled(p, proposalRunning)
	p.approver = sess
	q.mu.Unlock()
	ctx = context.WithoutCancel(ctx)
	var out any
	err := s.notice(ctx, "approved", sess.actor(), p, req.Reason)
	if err == nil {
		out, err = run(ctx, p.by.actor()+" 与 "+sess.actor(), []string{p.by.person(), sess.person()})
	}
	var text json.RawMessage
	if err == nil {
		text, err = json.Marshal(out)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	p.answered = time.Now() // interval
	p.timer.Reset(answerLife)
	if err == nil {
		q.settled(p, proposalDone)
		p.answer = text
	} else {
		q.settled(p, proposalFailed)
		no, f := problemOf(err)
		p.failed = &wire.Problem{Type: "urn:yinjian:problem:" + string(no.Code), Title: f.title, Status: f.status, Detail: no.Detail, Code: string(no.Code), Field: no.Field, Next: no.Next, Retry: f.retry}
		s.cfg.Log.WithError(err).WithField("object", p.id).Warn("what two administrators asked for was refused")
	}
	view := p.view()
	return &view, nil
}

// secondOf is nil, or why the session may not approve.
func (s *Server) secondOf(p *proposal, sess *Session) *problem.Problem {
	by, _, ok := s.cfg.Accounts.Administrator(p.by.Administrator)
	switch {
	case !slices.Contains(p.line.Second, sess.Role):
		return problem.New(problem.Forbidden, "该角色不能批准此事 (this role does not approve it)", "由 docs/roles.md 所列角色的管理员批准 (see there who does)")
	case p.by.Administrator == sess.Administrator:
		return problem.New(problem.Forbidden, "提出者不能批准自己的事项 (nobody approves his own proposal)", "请另一名管理员批准 (ask another administrator)")
	case !ok || by.Version != p.by.version: // as his sessions have: who was stopped and started again, or got another password, was somebody else meanwhile
		return problem.New(problem.Forbidden, "提出者此后已停用，或其口令、证书已更改 (who proposed it was stopped or changed since)", "重新提出 (have it proposed again)")
	}
	return nil
}

// decline ends a proposal: by whoever could approve it, or withdrawn by who made it.
func (s *Server) decline(ctx context.Context, sess *Session, req wire.Decide) (*wire.Proposal, error) {
	q := s.proposals
	q.mu.Lock()
	p, no := q.take(req)
	if no == nil && p.by.Administrator != sess.Administrator && !slices.Contains(p.line.Second, sess.Role) {
		no = errProposalUnknown
	}
	if no != nil {
		q.mu.Unlock()
		return nil, no
	}
	q.settled(p, proposalDeclined)
	p.approver = sess
	view := p.view()
	q.mu.Unlock()
	return &view, s.notice(ctx, "declined", sess.actor(), p, req.Reason)
}

// confirm forgets an answer that the first person has.
func (s *Server) confirm(_ context.Context, sess *Session, req wire.Decide) (*wire.Proposal, error) {
	q := s.proposals
	q.mu.Lock()
	defer q.mu.Unlock()
	p := q.of[req.ID]
	if p == nil || p.state != proposalDone || p.by.Administrator != sess.Administrator || p.sum != req.SM3 {
		return nil, errProposalUnknown
	}
	p.answer = nil
	view := p.view()
	return &view, nil
}

// secrets are the members of requests that nobody else sees.
var secrets = map[string]bool{"pin": true, "old_pin": true, "password": true, "shares": true, "secret": true}

// digested are the members of which the second person sees a digest alone: what is in them may be a secret, and what it does stands
// beside it.
var digested = map[string]bool{"overlay": true}

// maxShown is the length of the longest text, of one that is no file, that a request of two persons may have.
const maxShown = 1024

// maxListed is the length of the longest list that is shown whole. Of a longer one there are number, first and last: what makes it
// the list of a file is the request's SM3, which the second person computes of that file (signer import --digest).
const maxListed = 64

// maxLines is the size of the largest file of text that is shown.
const maxLines = 16 << 10

// redacted is a request as the second person sees it: without secrets, with the lines of a file of text, and with digests of
// long values, which can be compared with a file's, and whose the certificates of a file are. A character that misleads is shown as U+FFFD.
func redacted(body []byte) any {
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		return nil // it was read before
	}
	return redact(v)
}

func redact(v any) any {
	switch v := v.(type) {
	case string:
		if len(v) <= 256 {
			return plain(v)
		}
		whole := ""
		if len(v) <= maxShown { // texts are no longer; files are
			whole = plain(v) + " "
		}
		digest, b := digestOf(v), bytesOf(v)
		if certs := certificatesOf(b); certs != nil {
			return map[string]any{"file": digest, "certificates": certs}
		}
		return whole + digest
	case []any:
		if n := len(v); n > maxListed {
			return map[string]any{"count": n, "first": redact(v[0]), "last": redact(v[n-1])}
		}
		for i := range v {
			v[i] = redact(v[i])
		}
	case map[string]any:
		for name, w := range v {
			lines := []string(nil)
			if name == "file" {
				lines = linesOf(w)
			}
			switch {
			case secrets[name]:
				v[name] = "（不显示）"
			case digested[name]:
				v[name] = digestOf(w)
			case lines != nil:
				v[name] = lines
			default:
				v[name] = redact(w)
			}
		}
	}
	return v
}

// bytesOf are a file's, or a text's.
func bytesOf(v string) []byte {
	b, err := base64.StdEncoding.DecodeString(v)
	if err != nil {
		b = []byte(v)
	}
	return b
}

func digestOf(v any) string {
	s, _ := v.(string)
	b := bytesOf(s)
	return fmt.Sprintf("sm3:%x（%d 字节）", sm3.Sum(b), len(b))
}

// certificatesOf are those of a file, as the second person compares them with what the CA, or the vendor, has said; nil for
// another file.
func certificatesOf(file []byte) (out []any) {
	certs, err := pki.ParseBundle(file)
	if err != nil || len(certs) > maxListed {
		return nil
	}
	for _, c := range certs {
		out = append(out, map[string]any{
			"subject": plain(c.Subject.String()), "issuer": plain(c.Issuer.String()), "serial": pki.SerialHex(c.SerialNumber),
			"not_before": c.NotBefore.UTC().Format(time.RFC3339), "not_after": c.NotAfter.UTC().Format(time.RFC3339),
			"ca": c.IsCA, "sm3": fmt.Sprintf("%x", sm3.Sum(c.Raw)),
		})
	}
	return out
}

// linesOf are the lines of a file of text, a cipher machine's settings say; nil for another file.
func linesOf(v any) []string {
	s, _ := v.(string)
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil || len(b) == 0 || len(b) > maxLines || !utf8.Valid(b) {
		return nil
	}
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	for i, line := range lines {
		lines[i] = plain(strings.TrimSuffix(line, "\r"))
	}
	return lines
}

// plain is a text of which nothing shows as something else, or not at all.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\t' && problem.Misleads(r) {
			return utf8.RuneError
		}
		return r
	}, s)
}
