package main_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/appliance"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
)

// What is due is done without anybody, unless that is off.
func TestPreserveBySchedule(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Preserve.Every = appliance.Duration(10 * time.Second) })
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	r, err := his.Sign(t.Context(), "key", asserted("D1001", "key"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the record is archived", func() bool {
		data, err := his.Evidence(t.Context(), r.RecordID)
		if err != nil {
			t.Fatal(err)
		}
		b, err := evidence.Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		return len(b.EvidenceRecord) > 0
	})
	if o := mustRun(t, "preserve", "status", "--dir", dir); !strings.Contains(o.stdout, "1 条记录") {
		t.Errorf("%v", o)
	}
	m.stop(t)
	configure(t, dir, func(c *appliance.Config) { c.Preserve.Unit = "none" })
	refused(t, 1, []string{"preserve.unit"}, "serve", "--dir", dir)
}

// Records outlive the unit that stamped them: it gets a new key and a certificate that lasts longer, the archive stamps
// the records again, and the offline verifier, which has the roots and nothing else of ours, finds them valid years after
// the first certificate's end. Without the archive it does not.
func TestPreserve(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	ca := newHospitalCA(t, true)
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1001", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	keys := []string{"first", "second", "third"}
	before, ids := map[string][]byte{}, map[string]string{}
	for _, key := range keys {
		r, err := his.Sign(t.Context(), key, asserted("D1001", key))
		if err != nil {
			t.Fatal(err)
		}
		ids[key] = r.RecordID
		if before[key], err = his.Evidence(t.Context(), r.RecordID); err != nil {
			t.Fatal(err)
		}
	}
	if o := mustRun(t, "preserve", "status", "--dir", dir); !strings.Contains(o.stdout, "0 条记录") {
		t.Errorf("%v", o)
	}

	// A token of the unit answers the query that it was asked with, and no other.
	queries := tempDir(t)
	for _, name := range []string{"q1", "q2"} {
		mustRun(t, "ts", "query", v1+"record.xml", "--out", filepath.Join(queries, name))
		q, err := os.ReadFile(filepath.Join(queries, name))
		if err != nil {
			t.Fatal(err)
		}
		response, err := his.Stamp(t.Context(), "sm2", q)
		if err == nil {
			err = os.WriteFile(filepath.Join(queries, name+".tsr"), response, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	answers(t, m, filepath.Join(queries, "q1.tsr"), filepath.Join(queries, "q1"), pki.Valid)
	answers(t, m, filepath.Join(queries, "q1.tsr"), filepath.Join(queries, "q2"), pki.Invalid)

	// 1. The unit's new key, certified by another CA for eight years: the evaluation CA's certificate lasts five.
	mustRun(t, "cert", "anchor", "add", ca.path("root.crt"), "--dir", dir, "--use", "tsa", "--note", "市 CA")
	mustRun(t, "cert", "chain", "add", ca.path("sub.crt"), "--dir", dir)
	work := tempDir(t)
	csr := filepath.Join(work, "tsa.csr")
	mustRun(t, "cert", "csr", "--dir", dir, "--for", "tsa:sm2", "--new-key", "-o", csr)
	unit := ca.issue(csr, "tsa", "-days", "2920")
	mustRun(t, "cert", "import", unit, "--dir", dir)
	pem, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the unit uses its new certificate", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "tsa-sm2.pem"))
		return err == nil && bytes.HasPrefix(bytes.TrimSpace(b), bytes.TrimSpace(pem[bytes.Index(pem, []byte("-----BEGIN")):]))
	})

	refused(t, 1, []string{"certificate_unusable"}, "preserve", "run", "--dir", dir) // nobody says that it is not revoked
	if o := mustRun(t, "preserve", "status", "--dir", dir); !strings.Contains(o.stdout, "上次失败") {
		t.Errorf("%v", o)
	}
	for _, l := range ca.lists() {
		mustRun(t, "cert", "crl", "import", l, "--dir", dir)
	}

	// 2. The run: all records under one token. A second one finds nothing to do; a kill loses nothing.
	o := mustRun(t, "preserve", "run", "--dir", dir)
	if !strings.Contains(o.stdout, "3 条记录") || !strings.Contains(o.stdout, "1 批") {
		t.Errorf("%v", o)
	}
	if o := mustRun(t, "preserve", "run", "--dir", dir); !strings.Contains(o.stdout, "0 条记录") {
		t.Errorf("%v", o)
	}
	m.kill(t)
	if err := os.RemoveAll(filepath.Join(dir, "preserve")); err != nil { // what lies there can be made again
		t.Fatal(err)
	}
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	var status struct {
		Records uint64
		Due     []string
		Error   string
	}
	if err := json.Unmarshal([]byte(mustRun(t, "preserve", "status", "--dir", dir, "-o", "json").stdout), &status); err != nil || status.Records != 3 || len(status.Due) > 0 || status.Error != "" {
		t.Errorf("%+v %v", status, err)
	}

	// 3. Six years later, with the roots alone.
	anchors := []string{filepath.Join(dir, "ca.pem"), ca.path("root.crt")}
	at := func(when time.Time) []string { return []string{"--at", when.UTC().Format(time.RFC3339)} }
	later := time.Now().AddDate(6, 0, 0)
	for _, key := range keys {
		var after []byte
		eventually(t, 10*time.Second, "the second of the restart is over", func() bool { // a request that old could be a replay
			after, err = his.Evidence(t.Context(), ids[key])
			return err == nil
		})
		if r := m.judgeWith(t, at(later), after, documentOf(key), anchors...); r.Verdict != pki.Valid || !slices.ContainsFunc(r.Statements, func(s string) bool { return strings.Contains(s, "到期不影响结论") }) {
			t.Errorf("%s: %+v", key, r)
		}
		if r := m.judgeWith(t, at(later), before[key], documentOf(key), anchors...); r.Verdict != pki.Indeterminate || !slices.Contains(r.Missing, evidence.CheckArchiveCurrent) {
			t.Errorf("%s, not archived: %+v", key, r)
		}
		if r := m.judgeWith(t, at(time.Now().AddDate(9, 0, 0)), after, documentOf(key), anchors...); r.Verdict != pki.Indeterminate {
			t.Errorf("%s, after the second unit's end: %+v", key, r)
		}
		if r := m.judgeWith(t, at(later), after, []byte("another"), anchors...); r.Verdict != pki.Invalid {
			t.Errorf("%s, another document: %+v", key, r)
		}
	}

	// 4. Export: a record by its number, with the evidence record beside it for other programs; a folder brought up to date.
	mustRun(t, "preserve", "export", ids["first"], "--dir", dir, "--to", work)
	if o := command(t, nil, "openssl", "asn1parse", "-inform", "DER", "-in", filepath.Join(work, ids["first"]+".ers")); o.code != 0 || !strings.Contains(o.stdout, "OBJECT            :sm3") {
		t.Errorf("%v", o)
	}
	folder := tempDir(t)
	for _, key := range keys {
		if err := os.WriteFile(filepath.Join(folder, key+".json"), before[key], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustRun(t, "preserve", "export", folder, "--dir", dir)
	for _, key := range keys {
		b, err := os.ReadFile(filepath.Join(folder, key+".json"))
		if err != nil {
			t.Fatal(err)
		}
		if r := m.judgeWith(t, at(later), b, documentOf(key), anchors...); r.Verdict != pki.Valid {
			t.Errorf("%s, exported: %+v", key, r)
		}
	}
	if err := os.WriteFile(filepath.Join(folder, "other.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if o := yinjian(t, "preserve", "export", folder, "--dir", dir); o.code != 1 || !strings.Contains(o.stdout, "other.json：未更新") {
		t.Errorf("%v", o)
	}
	refused(t, 1, []string{"not_found"}, "preserve", "export", strings.Repeat("0a", 32), "--dir", dir)

	// 5. Every signature that a key made is accounted for, the archive's too.
	if o := audited(t, dir); !strings.Contains(o.stdout, "未发现改动") {
		t.Errorf("%v", o)
	}
	m.stop(t)
}
