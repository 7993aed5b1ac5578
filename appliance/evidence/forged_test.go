package evidence_test

import (
	"bytes"
	"encoding/hex"
	"slices"
	"testing"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
)

// record has a signature recorded that change has altered after signing, as a faulty appliance might, and answers its
// evidence.
func (w *ward) record(t *testing.T, key string, k kind, change func(*audit.Draft)) *evidence.Bundle {
	t.Helper()
	var draft audit.Draft
	w.Journal.Fault(func(d audit.Draft) (bool, error) {
		if d.Kind == evidence.KindSign {
			draft = d
			return false, audit.ErrJournalUnwritable
		}
		return false, nil
	})
	if _, err := w.Signing.Sign(t.Context(), w.app, request(key, k)); err == nil {
		t.Fatal("recorded in spite of the hook")
	}
	w.Journal.Fault(nil)
	change(&draft)
	rec, err := w.Journal.Append(t.Context(), draft)
	if err != nil {
		t.Fatal(err)
	}
	b, err := evidence.Build(t.Context(), w.Journal, rec)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func setField(d *audit.Draft, name string, v audit.Value) {
	d.Fields[slices.IndexFunc(d.Fields, func(f audit.Field) bool { return f.Name == name })].Value = v
}

// The log's word is not enough: a consent that does not reach the signature is found though the leaf commits to it.
func TestConsentMustReach(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	stamp := func(d time.Duration) string { return testkit.Start.Add(d).Format(time.RFC3339Nano) }
	activation := func(a *evidence.Authorization) {
		a.Method, a.Level, a.DigestAlgorithm, a.Digests, a.Count, a.NotAfter = evidence.SignerPIN, 2, "", nil, 5, stamp(time.Hour)
	}
	for name, tt := range map[string]struct {
		change func(*evidence.Authorization)
		want   pki.Verdict
		check  string
	}{
		"as it is":            {func(*evidence.Authorization) {}, pki.Valid, ""},
		"another document":    {func(a *evidence.Authorization) { a.Digests[0] = hex.EncodeToString(make([]byte, 32)) }, pki.Invalid, evidence.CheckConsentBound},
		"another algorithm":   {func(a *evidence.Authorization) { a.DigestAlgorithm = "SHA-256" }, pki.Invalid, evidence.CheckConsentBound},
		"no algorithm":        {func(a *evidence.Authorization) { a.DigestAlgorithm = "" }, pki.Invalid, evidence.CheckConsentBound},
		"another signer":      {func(a *evidence.Authorization) { a.Subject = "D002" }, pki.Invalid, evidence.CheckConsentBound},
		"another application": {func(a *evidence.Authorization) { a.Application = "emr" }, pki.Invalid, evidence.CheckConsentBound},
		"an activation":       {activation, pki.Valid, ""},
		"asserted for all":    {func(a *evidence.Authorization) { activation(a); a.Method, a.Level = evidence.AppAsserted, 1 }, pki.Invalid, evidence.CheckConsentBound},
		"no authorisation":    {func(a *evidence.Authorization) { a.Digests = nil }, pki.Invalid, evidence.CheckConsentBound},
		"long ended": {func(a *evidence.Authorization) {
			activation(a)
			a.GrantedAt, a.NotAfter = stamp(-time.Hour), stamp(-2*time.Minute)
		}, pki.Invalid, evidence.CheckConsentTime},
		"just ended": {func(a *evidence.Authorization) {
			activation(a)
			a.GrantedAt, a.NotAfter = stamp(-time.Hour), stamp(-30*time.Second)
		}, pki.Valid, ""},
		"granted afterwards":    {func(a *evidence.Authorization) { a.GrantedAt = stamp(2 * time.Minute) }, pki.Invalid, evidence.CheckConsentTime},
		"a method not of today": {func(a *evidence.Authorization) { activation(a); a.Method = "ukey" }, pki.Indeterminate, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := w.record(t, "k"+hex.EncodeToString([]byte(name)), kinds[0], func(d *audit.Draft) {
				i := slices.IndexFunc(d.Payloads, func(p audit.Attachment) bool { return p.Name == "authorization" })
				a, err := evidence.ParseAuthorization(d.Payloads[i].Data)
				if err != nil {
					t.Fatal(err)
				}
				tt.change(a)
				if d.Payloads[i].Data, err = a.Bytes(); err != nil {
					t.Fatal(err)
				}
				hash := evidence.HashAuthorization(d.Payloads[i].Data)
				setField(d, "consent.sm3", audit.Octets(hash[:]))
				setField(d, "consent.method", audit.Text(a.Method))
				setField(d, "consent.level", audit.Int(a.Level))
			})
			r := evidence.Verify(b, w.Trust, document)
			if tt.check == "" {
				wants(t, r, tt.want, pki.Passed, evidence.CheckConsentHash, evidence.CheckConsentBound)
			} else {
				wants(t, r, tt.want, pki.Failed, tt.check)
			}
		})
	}
	for name, v := range map[string]audit.Value{"consent.method": audit.Text(evidence.SignerPIN), "consent.level": audit.Int(2), "consent.sm3": audit.Octets(make([]byte, 32))} {
		b := w.record(t, name, kinds[0], func(d *audit.Draft) { setField(d, name, v) })
		if r := evidence.Verify(b, w.Trust, document); r.Verdict != pki.Invalid {
			t.Errorf("the leaf says another %s: %s", name, r.Verdict)
		}
	}
}

// What the leaf says of document, certificate and time does not stand against the signature either.
func TestLeafAgainstSignature(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	other := audit.Sum(w.other.Keys[0].Certificate)
	for name, tt := range map[string]struct {
		field string
		value audit.Value
		want  pki.Verdict
		check string
	}{
		"another document":      {"digest.value", audit.Octets(testkit.Digest("SM2", []byte("x"))), pki.Invalid, evidence.CheckDocument},
		"a digest too short":    {"digest.value", audit.Octets{1, 2}, pki.Invalid, evidence.CheckDocument},
		"another certificate":   {"certificate.sm3", audit.Octets(other[:]), pki.Indeterminate, ""},               // which is not at hand
		"an algorithm unknown":  {"digest.algorithm", audit.Text("MD5"), pki.Invalid, evidence.CheckConsentBound}, // consent was to an SM3 digest
		"another algorithm":     {"algorithm", audit.Text("RSA-2048"), pki.Invalid, evidence.CheckSignature},
		"a form unknown":        {"form", audit.Text("pdf"), pki.Invalid, evidence.CheckSignature},
		"another form":          {"form", audit.Text("cms"), pki.Invalid, evidence.CheckSignature},
		"another signer's name": {"signer", audit.Text("D002"), pki.Invalid, evidence.CheckConsentBound},
	} {
		b := w.record(t, hex.EncodeToString([]byte(name)), kinds[0], func(d *audit.Draft) { setField(d, tt.field, tt.value) })
		r := evidence.Verify(b, w.Trust, document)
		if tt.check == "" {
			wants(t, r, tt.want, pki.Passed, evidence.CheckLeafMatch)
		} else {
			wants(t, r, tt.want, pki.Failed, tt.check)
		}
	}
	// A CMS carries more of it under the signature.
	for field, value := range map[string]audit.Value{
		"application": audit.Text("emr"), "campus": audit.Text("滨海"), "department": audit.Text("外科"), "role": audit.Text("chief"),
		"document.type": audit.Text("prescription"), "test": audit.Bool(true), "consent.sm3": audit.Octets(make([]byte, 32)),
	} {
		b := w.record(t, "cms-"+field, kinds[2], func(d *audit.Draft) { setField(d, field, value) })
		wants(t, evidence.Verify(b, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckContext)
	}
	b := w.record(t, "cms-digest", kinds[2], func(d *audit.Draft) { setField(d, "digest.algorithm", audit.Text("SHA-256")) })
	wants(t, evidence.Verify(b, w.Trust, evidence.Input{}), pki.Invalid, pki.Failed, evidence.CheckSignedDigest)
	b = w.record(t, "cms-ref", kinds[2], func(d *audit.Draft) { d.Ref = make([]byte, 32) })
	wants(t, evidence.Verify(b, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckContext)
	b = w.record(t, "cms-certificate", kinds[2], func(d *audit.Draft) { setField(d, "certificate.sm3", audit.Octets(other[:])) })
	wants(t, evidence.Verify(b, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckSigner)
}

// A checkpoint signed by the log's key for another node's log is none of this one's.
func TestCheckpointOfAnotherNode(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	b := w.bundle(t, request("a", kinds[0]))
	for name, tt := range map[string]struct{ old, new string }{"node": {"/benbu-1/", "/binhai-1/"}, "size": {"\n", "\n1"}} {
		note := bytes.Replace(b.Journal.Checkpoint, []byte(tt.old), []byte(tt.new), 1)
		signature, err := w.LogKey.SignMessage(t.Context(), note)
		if err != nil {
			t.Fatal(err)
		}
		forged := with(t, b, func(b *evidence.Bundle) {
			b.Journal.Checkpoint, b.Journal.CheckpointSignature, b.Journal.CheckpointToken = note, signature, nil
		})
		check := map[string]string{"node": evidence.CheckCheckpoint, "size": evidence.CheckInclusion}[name]
		wants(t, evidence.Verify(forged, w.Trust, document), pki.Invalid, pki.Failed, check)
	}
}

// The mark of a test record can be neither taken off nor put on.
func TestMarkOfTests(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, test := range []bool{true, false} {
		w.app = w.App(map[bool]string{true: "test", false: "real"}[test], func(a *account.Application) { a.Test = test })
		for _, k := range kinds {
			b := w.bundle(t, request(k.String(), k))
			if b.Record.Test != test {
				t.Fatalf("%v: test %v", k, b.Record.Test)
			}
			turned := with(t, b, func(b *evidence.Bundle) { b.Record.Test = !test })
			wants(t, evidence.Verify(turned, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckLeafMatch)
		}
	}
}
