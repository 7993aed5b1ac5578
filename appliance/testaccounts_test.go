package appliance_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// A test account signs for applications that are not of production, and what it signs says so: in the entry, the signed
// attributes, the evidence's verdict and the projected row that statistics leave out. An application of production refuses
// it, with and without a PIN, also when it was marked later; everybody else's signatures are as they were.
func TestTestAccounts(t *testing.T) {
	t.Parallel()
	f := newFront(t)
	f.App("his", func(a *account.Application) { a.Production = true })
	f.App("school", nil)
	f.Doctor("D001", "SM2")
	g, err := f.Directory.Enrol(t.Context(), "admin", account.Enrolment{
		ID: "T001", Name: "测试账号一", Department: "信息科", Campus: "本部", Algorithms: []string{"SM2"}, PIN: testkit.PIN, Role: "测试", Test: true,
	})
	if err != nil || !g.Test || g.Role != "测试" || !f.Directory.View(g).Test {
		t.Fatalf("%+v, %v", g, err)
	}
	grant := map[string]any{"signer": "T001", "pin": testkit.PIN, "count": 2, "seconds": 60}
	sign := func(app, signer, key string, consent *wire.Consent) (int, wire.SignResult, wire.Problem) {
		t.Helper()
		q := signRequest()
		q.Signer, q.Form = signer, "cms"
		if consent != nil {
			q.Consent = *consent
		}
		status, body := f.post(app, "/v1/sign", key, q)
		var r wire.SignResult
		var p wire.Problem
		if status == 200 {
			err = json.Unmarshal(body, &r)
		} else {
			err = json.Unmarshal(body, &p)
		}
		if err != nil {
			t.Fatalf("%d %s: %v", status, body, err)
		}
		return status, r, p
	}
	refused := func(what string, status int, p wire.Problem) {
		t.Helper()
		if status != 403 || p.Code != string(problem.SignerTest) || p.Retry != wire.RetryOperator || !strings.Contains(p.Detail, "测试账号") || p.Next == "" {
			t.Errorf("%s: %d %+v", what, status, p)
		}
	}

	size := f.Journal.Size()
	status, _, p := sign("his", "T001", "a", nil)
	refused("a signature for production", status, p)
	status, body := f.post("his", "/v1/authorizations", "b", grant)
	if err := json.Unmarshal(body, &p); err != nil {
		t.Fatalf("%s: %v", body, err)
	}
	refused("an authorisation for production", status, p)
	if n := f.Journal.Size(); n != size {
		t.Errorf("refusals made %d entries", n-size)
	}

	rows := map[string]audit.ProjectedRow{}
	for i, c := range []struct {
		app, signer string
		test        bool
	}{{"his", "D001", false}, {"school", "T001", true}, {"school", "D001", false}} {
		status, r, p := sign(c.app, c.signer, fmt.Sprintf("c%d", i), nil)
		if status != 200 {
			t.Fatalf("%+v: %d %+v", c, status, p)
		}
		m, err := cms.Parse(r.Signature)
		if err != nil {
			t.Fatal(err)
		}
		at := slices.IndexFunc(m.SignerInfos[0].SignedAttributes, func(a cms.Attribute) bool { return a.Type.Equal(pki.OIDSigningContext) })
		context, err := pki.ParseSigningContext(m.SignerInfos[0].SignedAttributes[at].Values[0])
		if err != nil || context.Test != c.test {
			t.Errorf("%+v: signed attributes: %+v, %v", c, context, err)
		}
		b, err := evidence.Parse(f.Evidence(f.application(c.app), r.RecordID))
		if err != nil || b.Record.Test != c.test {
			t.Errorf("%+v: evidence: %v, %v", c, b.Record.Test, err)
		}
		ref, _ := hex.DecodeString(r.RecordID)
		found, err := f.Journal.ByRef(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		rows[c.app+c.signer] = audit.Project(found[0])
	}
	if rows["hisD001"].Status != audit.StatusRecorded || rows["schoolD001"].Status != audit.StatusRecorded || rows["schoolT001"].Status != audit.StatusTest {
		t.Errorf("statuses: %q, %q, %q", rows["hisD001"].Status, rows["schoolD001"].Status, rows["schoolT001"].Status)
	}

	// Marked after the signer has given consent: what is live does not help. The mark, and taking it away, are journalled.
	status, body = f.post("school", "/v1/authorizations", "d", grant)
	var a struct{ ID string }
	if err := json.Unmarshal(body, &a); err != nil || status != 200 && status != 201 {
		t.Fatalf("%d %s: %v", status, body, err)
	}
	mark := func(on bool) {
		t.Helper()
		if _, err := f.Directory.SetProduction(t.Context(), "admin", "school", on, "上线"); err != nil {
			t.Fatal(err)
		}
	}
	mark(true)
	status, _, p = sign("school", "T001", "e", &wire.Consent{AuthorizationID: a.ID})
	refused("with an authorisation of before", status, p)
	f.Restart()
	if now := f.application("school"); !now.Production || now.Version != 2 {
		t.Errorf("after a restart: %+v", now)
	}
	if now, _ := f.Directory.Signer("T001"); !now.Test {
		t.Error("after a restart the account is no test account")
	}
	mark(false)
	if f.application("school").Production {
		t.Error("the mark stays")
	}
	_, _, err = f.Directory.RegisterApplication(t.Context(), "admin", account.Application{ID: "both", Name: "a", Campus: "b", Test: true, Production: true})
	if problem.CodeOf(err) != problem.InvalidRequest {
		t.Errorf("for tests and of production: %v", err)
	}
	f.App("tests", func(a *account.Application) { a.Test = true })
	if _, err := f.Directory.SetProduction(t.Context(), "admin", "tests", true, "上线"); problem.CodeOf(err) != problem.InvalidRequest {
		t.Errorf("a test application marked: %v", err)
	}
}
