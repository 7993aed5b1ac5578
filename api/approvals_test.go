package api_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/google/go-cmp/cmp"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// A desk is an office where two persons work.
type desk struct {
	*office
	token map[string]string
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	d := &desk{openOffice(t), map[string]string{}}
	for _, id := range []string{"zhang", "li", "liu", "wang", "zhao"} {
		d.token[id] = d.login(t, false, id)
	}
	return d
}

func (d *desk) as(t *testing.T, id, method, path string, body any) reply {
	t.Helper()
	return d.ask(t, false, d.token[id], method, path, body)
}

func (d *desk) propose(t *testing.T, id, path string, body any) wire.Proposed {
	t.Helper()
	got := d.as(t, id, "POST", path, body)
	var p wire.Proposed
	if err := json.Unmarshal(got.body, &p); err != nil || got.status != http.StatusAccepted || len(p.Proposal) != 32 || len(p.SM3) != 64 {
		t.Fatalf("%s: %d %s", path, got.status, got.body)
	}
	return p
}

func (d *desk) decide(t *testing.T, id, what string, p wire.Proposed) reply {
	t.Helper()
	return d.as(t, id, "POST", "/admin/v1/approvals/"+p.Proposal+"/"+what, wire.Decide{SM3: p.SM3})
}

func (d *desk) look(t *testing.T, id string, p wire.Proposed) (out wire.Proposal, got reply) {
	t.Helper()
	got = d.as(t, id, "GET", "/admin/v1/approvals/"+p.Proposal, nil)
	if got.status == 200 {
		if err := json.Unmarshal(got.body, &out); err != nil {
			t.Fatal(err)
		}
	}
	return out, got
}

var registration = m{"id": "his", "name": "门诊", "campus": "east", "rights": []string{"sign"}, "stamp": "required", "consent": []string{"signer-pin"}, "rate": 0, "burst": 0}

func TestTwoPersons(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	p := d.propose(t, "li", "/admin/v1/applications", registration)
	if !slices.Equal(p.Approvers, []string{"security", "system"}) || len(d.admin.asked) != 0 {
		t.Errorf("%+v, done: %v", p, d.admin.asked)
	}
	d.wants(t, "the same person", d.decide(t, "li", "approve", p), 403, problem.Forbidden)
	d.wants(t, "who audits", d.decide(t, "wang", "approve", p), 403, problem.Forbidden)
	d.wants(t, "an operator", d.decide(t, "zhao", "approve", p), 403, problem.Forbidden)
	d.wants(t, "another request's SM3", d.decide(t, "zhang", "approve", wire.Proposed{Proposal: p.Proposal, SM3: strings.Repeat("0a", 32)}), 400, problem.InvalidRequest)
	d.wants(t, "without a login", d.ask(t, false, "", "POST", "/admin/v1/approvals/"+p.Proposal+"/approve", wire.Decide{SM3: p.SM3}), 401, problem.LoginRequired)
	if _, got := d.look(t, "zhao", p); got.status != 404 {
		t.Errorf("an operator sees it: %d %s", got.status, got.body)
	}
	if seen, _ := d.look(t, "zhang", p); seen.State != "pending" || seen.Path != "/admin/v1/applications" || seen.Body.(map[string]any)["name"] != "门诊" || seen.By != "admin:li(姓li，security)" {
		t.Errorf("%+v", seen)
	}
	if len(d.admin.asked) != 0 {
		t.Fatalf("done before it was approved: %v", d.admin.asked)
	}
	if got := d.decide(t, "zhang", "approve", p); got.status != 200 || strings.Contains(string(got.body), b64(appKey)) || !strings.Contains(string(got.body), `"state":"done"`) {
		t.Errorf("%d %s", got.status, got.body)
	}
	want := "admin:li(姓li，security) 与 admin:zhang(姓zhang，system)"
	if len(d.admin.asked) != 1 || d.admin.actors[0] != want {
		t.Errorf("asked %v by %v", d.admin.asked, d.admin.actors)
	}
	d.wants(t, "approved twice", d.decide(t, "zhang", "approve", p), 404, problem.NotFound)
	d.wants(t, "declined after", d.decide(t, "zhang", "decline", p), 404, problem.NotFound)
	// The key is the first person's alone, as often as the page is loaded, until it is confirmed.
	for _, other := range []string{"zhang", "liu", "wang"} {
		if seen, _ := d.look(t, other, p); seen.Answer != nil || seen.State != "done" {
			t.Errorf("%s sees the answer: %+v", other, seen)
		}
		d.wants(t, other+" confirms it", d.decide(t, other, "confirm", p), 404, problem.NotFound)
	}
	d.wants(t, "an operator confirms it", d.decide(t, "zhao", "confirm", p), 404, problem.NotFound)
	for range 2 {
		if seen, _ := d.look(t, "li", p); seen.Answer == nil || seen.Answer.(map[string]any)["key"] != b64(appKey) || seen.Approver == "" || seen.AnswerEndsS < 1 || seen.AnswerEndsS > 3600 {
			t.Errorf("%+v", seen)
		}
	}
	d.wants(t, "another's SM3", d.decide(t, "li", "confirm", wire.Proposed{Proposal: p.Proposal, SM3: strings.Repeat("0a", 32)}), 404, problem.NotFound)
	for range 2 {
		if got := d.decide(t, "li", "confirm", p); got.status != 200 || strings.Contains(string(got.body), b64(appKey)) {
			t.Errorf("%d %s", got.status, got.body)
		}
	}
	if seen, _ := d.look(t, "li", p); seen.Answer != nil || seen.AnswerEndsS != 0 {
		t.Errorf("the answer after it was confirmed: %+v", seen)
	}
	// What a refusal was.
	d.admin.fail = problem.New(problem.Exists, "已存在 (exists)", "换一个 (another)")
	p = d.propose(t, "li", "/admin/v1/applications", registration)
	if got := d.decide(t, "liu", "approve", p); got.status != 200 || !strings.Contains(string(got.body), `"code":"exists"`) || !strings.Contains(string(got.body), `"state":"failed"`) {
		t.Errorf("%d %s", got.status, got.body)
	}
	d.admin.fail = nil
	want0 := []string{"made", "approved", "made", "approved"}
	var kinds []string
	for _, k := range d.accounts.kinds() {
		kinds = append(kinds, strings.TrimPrefix(k, "administration.proposal/"))
	}
	if diff := cmp.Diff(want0, kinds); diff != "" {
		t.Error(diff)
	}
}

func TestProposalsEnd(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	// Declined, withdrawn, over, forgotten.
	p := d.propose(t, "li", "/admin/v1/applications", registration)
	d.wants(t, "an operator declines", d.decide(t, "zhao", "decline", p), 404, problem.NotFound)
	if got := d.decide(t, "zhang", "decline", p); got.status != 200 || !strings.Contains(string(got.body), `"state":"declined"`) {
		t.Errorf("%d %s", got.status, got.body)
	}
	d.wants(t, "approved after", d.decide(t, "zhang", "approve", p), 404, problem.NotFound)
	p = d.propose(t, "li", "/admin/v1/applications", registration)
	if got := d.decide(t, "li", "decline", p); got.status != 200 {
		t.Errorf("withdrawn: %d %s", got.status, got.body)
	}
	p = d.propose(t, "li", "/admin/v1/applications", registration)
	d.server.Expire()
	d.wants(t, "over", d.decide(t, "zhang", "approve", p), 404, problem.NotFound)
	if kinds := d.accounts.kinds(); kinds[len(kinds)-1] != "administration.proposal/expired" {
		t.Errorf("%v", kinds)
	}
	// An answer that nobody confirms is forgotten with the proposal.
	p = d.propose(t, "li", "/admin/v1/applications", registration)
	d.wants(t, "confirmed before", d.decide(t, "li", "confirm", p), 404, problem.NotFound)
	if got := d.decide(t, "zhang", "approve", p); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	d.server.Expire()
	if seen, got := d.look(t, "li", p); got.status != 404 {
		t.Errorf("after its time: %d %+v", got.status, seen)
	}
	d.admin.mu.Lock()
	d.admin.asked = nil
	d.admin.mu.Unlock()
	// One who was stopped since has nothing done.
	p = d.propose(t, "liu", "/admin/v1/applications", registration)
	d.accounts.change("liu", func(a *account.Administrator) { a.Stopped = true })
	d.wants(t, "proposed by one who is stopped", d.decide(t, "zhang", "approve", p), 403, problem.Forbidden)
	d.accounts.change("liu", func(a *account.Administrator) { a.Stopped = false })
	d.wants(t, "by one who was stopped, and started again", d.decide(t, "zhang", "approve", p), 403, problem.Forbidden)
	// What cannot be journalled is not proposed, and not done.
	d.accounts.mu.Lock()
	d.accounts.fail = problem.New(problem.JournalUnwritable, "日志 (journal)", "等 (wait)")
	d.accounts.mu.Unlock()
	d.wants(t, "no journal", d.as(t, "li", "POST", "/admin/v1/applications", registration), 503, problem.JournalUnwritable)
	d.accounts.mu.Lock()
	d.accounts.fail = nil
	d.accounts.mu.Unlock()
	p = d.propose(t, "li", "/admin/v1/applications", registration)
	d.accounts.mu.Lock()
	d.accounts.fail = errors.New("disk gone")
	d.accounts.mu.Unlock()
	if got := d.decide(t, "zhang", "approve", p); !strings.Contains(string(got.body), `"state":"failed"`) {
		t.Errorf("%d %s", got.status, got.body)
	}
	d.accounts.mu.Lock()
	d.accounts.fail = nil
	d.accounts.mu.Unlock()
	if len(d.admin.asked) != 0 {
		t.Errorf("done: %v", d.admin.asked)
	}
	// Another appliance, as one that was started again: it knows none.
	d.wants(t, "after a restart", newDesk(t).decide(t, "zhang", "approve", p), 404, problem.NotFound)
	// So many of one, and no more; the others' places are theirs, however often he proposes and withdraws.
	for n := 0; ; n++ {
		if got := d.as(t, "li", "POST", "/admin/v1/applications", registration); got.status != http.StatusAccepted {
			d.wants(t, "too many", got, 429, problem.RateLimited)
			if n > 16 {
				t.Errorf("one administrator has %d", n)
			}
			break
		}
	}
	enrolment := m{"id": "D1", "name": "甲", "department": "内科", "campus": "east", "algorithms": []string{"SM2"}}
	for range 256 {
		if got := d.decide(t, "zhao", "decline", d.propose(t, "zhao", "/admin/v1/signers", enrolment)); got.status != 200 {
			t.Fatalf("%d %s", got.status, got.body)
		}
	}
	d.propose(t, "zhang", "/admin/v1/time/sources/a/remove", m{"reason": "停"})
	// Answers that were read make room, those that were not stay.
	d = newDesk(t)
	unread := d.propose(t, "zhao", "/admin/v1/signers", enrolment)
	if got := d.decide(t, "zhang", "approve", unread); got.status != 200 {
		t.Fatalf("%d %s", got.status, got.body)
	}
	for range 256 {
		p := d.propose(t, "zhao", "/admin/v1/signers", enrolment)
		if got := d.decide(t, "zhang", "approve", p); got.status != 200 {
			t.Fatalf("%d %s", got.status, got.body)
		}
		d.look(t, "zhao", p)
	}
	if seen, _ := d.look(t, "zhao", unread); seen.Answer == nil {
		t.Errorf("an answer that nobody read was forgotten: %+v", seen)
	}
}

// Whoever is stopped while the request comes is not let through when it is whole.
func TestSessionEndsWhileItSends(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	p := d.propose(t, "li", "/admin/v1/applications", registration)
	h := *d.http
	slow := d.http.Transport.(*http.Transport).Clone()
	slow.ExpectContinueTimeout = time.Minute
	h.Transport = slow
	t.Cleanup(slow.CloseIdleConnections)
	body := bytes.NewReader(encode(t, wire.Decide{SM3: p.SM3}))
	size := body.Len()
	r, err := http.NewRequestWithContext(t.Context(), "POST", d.url+"/admin/v1/approvals/"+p.Proposal+"/approve", io.MultiReader(reader(func([]byte) (int, error) { // the appliance waits for it
		d.accounts.change("zhang", func(a *account.Administrator) { a.Stopped = true })
		return 0, io.EOF
	}), body))
	if err != nil {
		t.Fatal(err)
	}
	r.ContentLength = int64(size)
	r.Header.Set("Expect", "100-continue")
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+d.token["zhang"])
	resp, err := h.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 401 || len(d.admin.asked) != 0 {
		t.Errorf("%d, done: %v", resp.StatusCode, d.admin.asked)
	}
}

// However many decide at once, and while its time comes, a proposal is decided once.
func TestDecisionsAtOnce(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	t.Cleanup(d.http.CloseIdleConnections)
	done := 0
	for range 10 {
		p := d.propose(t, "li", "/admin/v1/applications", registration)
		var all sync.WaitGroup
		var decided atomic.Int32
		for _, one := range [][2]string{{"zhang", "approve"}, {"liu", "approve"}, {"zhang", "approve"}, {"liu", "decline"}, {"li", "decline"}, {"li", "approve"}} {
			all.Go(func() {
				if got := d.decide(t, one[0], one[1], p); got.status == 200 {
					decided.Add(1)
					if one[0] == "li" && one[1] == "approve" {
						t.Errorf("his own: %s", got.body)
					}
				}
			})
		}
		all.Go(d.server.Expire)
		all.Wait()
		n := 0
		for _, k := range d.accounts.kinds() {
			if k == "administration.proposal/approved" {
				n++
			}
		}
		if decided.Load() > 1 || n-done > 1 || len(d.admin.asked) != n {
			t.Fatalf("decided %d times, approved %d, done %d", decided.Load(), n-done, len(d.admin.asked))
		}
		done = n
	}
}

type reader func([]byte) (int, error)

func (r reader) Read(b []byte) (int, error) { return r(b) }

// The second person sees each text that the request may have, whatever it looks like; of files the digest.
func TestTextsAreShownWhole(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	folder := "/" + strings.Repeat("abcd/", 150) + "abcde" // as good Base64 as any
	p := d.propose(t, "zhang", "/admin/v1/log", m{"directory": folder, "reason": "换目录"})
	if seen, _ := d.look(t, "li", p); !strings.HasPrefix(seen.Body.(map[string]any)["directory"].(string), folder+" sm3:") {
		t.Errorf("%v", seen.Body)
	}
	p = d.propose(t, "li", "/admin/v1/applications/his/client", m{"by": "key", "certificate": bytes.Repeat([]byte{7}, 2000), "alone": false, "reason": "专线"})
	if seen, _ := d.look(t, "zhang", p); !strings.HasPrefix(seen.Body.(map[string]any)["certificate"].(string), "sm3:") {
		t.Errorf("%v", seen.Body)
	}
	// A certificate by whose it is: what a CA or a vendor says over the telephone is not an SM3.
	ca := stampUnit().ca
	for name, file := range map[string][]byte{"DER": ca.Raw, "PEM": pki.EncodeCertificatePEMs(ca)} {
		p = d.propose(t, "li", "/admin/v1/anchors", m{"certificate": file, "uses": []string{"staff"}, "note": name})
		seen, _ := d.look(t, "zhang", p)
		shown := seen.Body.(map[string]any)["certificate"].(map[string]any)
		first := shown["certificates"].([]any)[0].(map[string]any)
		if !strings.HasPrefix(shown["file"].(string), "sm3:") || first["subject"] != ca.Subject.String() || first["serial"] != pki.SerialHex(ca.SerialNumber) || first["sm3"] != fmt.Sprintf("%x", sm3.Sum(ca.Raw)) || first["ca"] != true {
			t.Errorf("%s: %v", name, shown)
		}
	}
	// A cipher machine's module is program code: the second person reads its settings, and nothing in them looks like another.
	p = d.propose(t, "zhang", "/admin/v1/machines", m{"file": []byte("name = \"second\"\r\nmodule = \"/opt/\u202egro.so\"\n"), "reason": "扩容"})
	if seen, _ := d.look(t, "li", p); !cmp.Equal(seen.Body.(map[string]any)["file"], []any{`name = "second"`, "module = \"/opt/\uFFFDgro.so\""}) {
		t.Errorf("%v", seen.Body)
	}
}

// The two persons of an act are those who have logged in; secrets are shown to nobody.
func TestPersonsAreThoseWhoLoggedIn(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	got := d.as(t, "zhang", "POST", "/admin/v1/backups", m{"persons": []string{"甲", "乙"}, "target": "/mnt", "incremental": false, "softtoken": false})
	d.wants(t, "persons that the request names", got, 400, problem.InvalidRequest)
	report := m{"kind": "drill", "name": "daily", "outcome": "passed", "files": []m{{"name": "a", "sm3": strings.Repeat("0a", 32), "size": 1}}}
	if got := d.as(t, "wang", "POST", "/admin/v1/reports", report); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	report["persons"] = []string{"甲", "乙"}
	d.wants(t, "a report in the names of two who did not log in", d.as(t, "wang", "POST", "/admin/v1/reports", report), 400, problem.InvalidRequest)
	d.admin.asked = nil
	p := d.propose(t, "zhang", "/admin/v1/backups", m{"persons": []string{}, "target": "/mnt", "incremental": false, "softtoken": false})
	if got := d.decide(t, "li", "approve", p); got.status != 200 {
		t.Fatalf("%d %s", got.status, got.body)
	}
	if diff := cmp.Diff([]any{wire.BeginBackup{Persons: []string{"姓zhang(zhang)", "姓li(li)"}, Target: "/mnt"}}, d.admin.asked); diff != "" {
		t.Error(diff)
	}
	p = d.propose(t, "zhao", "/admin/v1/signers/D1/pin", m{"pin": "271828", "old_pin": "314159"})
	if _, got := d.look(t, "li", p); strings.Contains(string(got.body), "271828") || strings.Contains(string(got.body), "314159") || got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	d.accounts.mu.Lock()
	for _, n := range d.accounts.notices {
		if text := strings.Join(n.Fields, " "); strings.Contains(text, "271828") {
			t.Errorf("journalled: %s", text)
		}
	}
	d.accounts.mu.Unlock()
	// A request for the certificate of a key that is there is one person's work, for a new key two persons'.
	if got := d.as(t, "li", "POST", "/admin/v1/certificates/requests", m{"for": "signer:D1001"}); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	d.propose(t, "li", "/admin/v1/certificates/requests", m{"for": "signer:D1001", "new_key": true})
	// A faulty one is told of at once, and not proposed.
	d.wants(t, "faulty", d.as(t, "li", "POST", "/admin/v1/applications", m{"id": "his"}), 400, problem.InvalidRequest)
	// An open local socket does as before, at once, and nobody approves there.
	o := openOffice(t, func(c *api.Config, _ *http.Server) { c.AdminLogin = false })
	if got := o.ask(t, true, "", "POST", "/admin/v1/applications", registration); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	o.wants(t, "approved by nobody", o.ask(t, true, "", "POST", "/admin/v1/approvals/"+p.Proposal+"/approve", wire.Decide{SM3: p.SM3}), 401, problem.LoginRequired)
}

// A drill is two persons' where the appliance is not for evaluation, and one's where it is.
func TestDrillOfTwoPersons(t *testing.T) {
	t.Parallel()
	for _, evaluation := range []bool{false, true} {
		o := openOffice(t, func(c *api.Config, _ *http.Server) { c.Evaluation = evaluation })
		body := m{"part": "db", "seconds": 30, "reason": "演练"}
		got := o.ask(t, true, o.login(t, true, "zhang"), "POST", "/admin/v1/drills", body)
		if want := map[bool]int{false: 202, true: 200}[evaluation]; got.status != want {
			t.Errorf("evaluation %v: %d %s, want %d", evaluation, got.status, got.body, want)
		}
		body["persons"] = []string{"甲", "乙"}
		o.wants(t, "in the names of two who did not log in", o.ask(t, true, o.login(t, true, "zhang"), "POST", "/admin/v1/drills", body), 400, problem.InvalidRequest)
		o.wants(t, "an auditor's", o.ask(t, true, o.login(t, true, "wang"), "POST", "/admin/v1/drills", body), 403, problem.Forbidden)
	}
}

// A list of many is shown by its number and its ends; the request's SM3 is that which anybody computes of the same things. A
// trial, which writes nothing, is one person's.
func TestLongListsAreCounted(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	req := wire.ImportSigners{CA: "evaluation"}
	for i := range 10_000 {
		req.Signers = append(req.Signers, wire.ImportSigner{ID: fmt.Sprintf("D%05d", i), Name: "王医生", Department: "胸外科", Campus: "本部", Algorithms: []string{"SM2"}})
	}
	p := d.propose(t, "zhao", "/admin/v1/signers/import", req)
	if want := wire.RequestSM3("POST", "/admin/v1/signers/import", encode(t, req)); p.SM3 != want {
		t.Errorf("SM3 %s, want %s", p.SM3, want)
	}
	seen, got := d.look(t, "li", p)
	list, _ := seen.Body.(map[string]any)["signers"].(map[string]any)
	if len(got.body) > 4096 || list["count"] != 10_000.0 || list["first"].(map[string]any)["id"] != "D00000" || list["last"].(map[string]any)["id"] != "D09999" {
		t.Errorf("%d bytes: %v", len(got.body), seen.Body)
	}
	if got := d.decide(t, "li", "approve", p); got.status != 200 || len(d.admin.asked) != 1 {
		t.Fatalf("%d %s", got.status, got.body)
	}
	if diff := cmp.Diff([]any{req}, d.admin.asked); diff != "" {
		t.Error(diff)
	}
	req.Signers = append(req.Signers, req.Signers[0])
	d.wants(t, "one more", d.as(t, "zhao", "POST", "/admin/v1/signers/import", req), 400, problem.InvalidRequest)
	req.Signers, req.Trial = req.Signers[:2], true
	if got := d.as(t, "zhao", "POST", "/admin/v1/signers/import", req); got.status != 200 {
		t.Errorf("a trial: %d %s", got.status, got.body)
	}
}
