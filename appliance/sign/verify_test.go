package sign_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/ntp"
)

func TestVerifyRequests(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	raw, message := w.Sign(w.app, request("a", "SM2", "raw")), w.Sign(w.app, request("b", "RSA-2048", "cms"))
	bundle := w.Evidence(w.app, raw.RecordID)
	rawSignature := &sign.RawSignature{Algorithm: "SM2", Value: raw.Signature, Certificate: raw.Certificates[0], Chain: raw.Certificates[1:], Token: raw.Token}
	sm3, sha := &sign.Digest{Algorithm: "SM3", Value: testkit.Digest("SM2", testkit.Document)}, &sign.Digest{Algorithm: "SHA-256", Value: testkit.Digest("RSA-2048", testkit.Document)}
	// Days later there is a newer list, and the signatures can still be judged.
	for _, days := range []int{0, 5} {
		if days > 0 {
			w.Clock.Advance(time.Duration(days) * 24 * time.Hour)
			if done, err := w.Directory.RefreshCRLs(t.Context()); !done || err != nil {
				t.Fatal(done, err)
			}
		}
		for name, tt := range map[string]struct {
			q    sign.VerifyRequest
			want pki.Verdict
		}{
			"evidence":               {sign.VerifyRequest{Evidence: bundle, Document: testkit.Document}, pki.Valid},
			"evidence, no document":  {sign.VerifyRequest{Evidence: bundle}, pki.Indeterminate},
			"evidence, other digest": {sign.VerifyRequest{Evidence: bundle, Digest: sha}, pki.Indeterminate},
			"evidence, wrong":        {sign.VerifyRequest{Evidence: bundle, Document: []byte("x")}, pki.Invalid},
			"CMS":                    {sign.VerifyRequest{CMS: message.Signature, Document: testkit.Document}, pki.Valid},
			"CMS, digest":            {sign.VerifyRequest{CMS: message.Signature, Digest: sha}, pki.Valid},
			"CMS, other digest":      {sign.VerifyRequest{CMS: message.Signature, Digest: sm3}, pki.Indeterminate},
			"CMS, no document":       {sign.VerifyRequest{CMS: message.Signature}, pki.Indeterminate},
			"CMS, rubbish":           {sign.VerifyRequest{CMS: []byte("x")}, pki.Invalid},
			"token":                  {sign.VerifyRequest{Token: raw.Token, Document: raw.Signature}, pki.Valid},
			"token, nothing":         {sign.VerifyRequest{Token: raw.Token}, pki.Indeterminate},
			"raw":                    {sign.VerifyRequest{Raw: rawSignature, Document: testkit.Document}, pki.Valid},
			"raw, wrong":             {sign.VerifyRequest{Raw: rawSignature, Document: []byte("x")}, pki.Invalid},
		} {
			r, err := w.Signing.Verify(t.Context(), &tt.q)
			if err != nil || r.Verdict != tt.want {
				t.Errorf("%s after %d days: %+v, %v; want %s", name, days, r, err, tt.want)
			}
		}
	}
	for name, tt := range map[string]struct {
		q    sign.VerifyRequest
		want problem.Code
	}{
		"nothing":             {sign.VerifyRequest{}, problem.InvalidRequest},
		"two":                 {sign.VerifyRequest{CMS: []byte{1}, Token: []byte{1}}, problem.InvalidRequest},
		"document and digest": {sign.VerifyRequest{CMS: message.Signature, Document: []byte("x"), Digest: sm3}, problem.InvalidRequest},
		"evidence, rubbish":   {sign.VerifyRequest{Evidence: []byte("{}")}, problem.InvalidRequest},
		"raw of digest":       {sign.VerifyRequest{Raw: rawSignature, Digest: sm3}, problem.ContentRequired},
		"raw, algorithm":      {sign.VerifyRequest{Raw: &sign.RawSignature{Algorithm: "DSA"}}, problem.InvalidRequest},
		"digest, algorithm":   {sign.VerifyRequest{CMS: message.Signature, Digest: &sign.Digest{Algorithm: "MD5", Value: make([]byte, 32)}}, problem.InvalidRequest},
		"digest, length":      {sign.VerifyRequest{CMS: message.Signature, Digest: &sign.Digest{Algorithm: "SM3", Value: make([]byte, 31)}}, problem.InvalidRequest},
	} {
		_, err := w.Signing.Verify(t.Context(), &tt.q)
		wants(t, name, err, tt.want)
	}
	// Without trusted time nothing is valid that only the present time could make so.
	w.Clock.State(ntp.Untrusted)
	withoutToken := *rawSignature
	withoutToken.Token = nil
	r, err := w.Signing.Verify(t.Context(), &sign.VerifyRequest{Raw: &withoutToken, Document: testkit.Document})
	if err != nil || r.Verdict != pki.Indeterminate {
		t.Errorf("no token and no time: %+v, %v", r, err)
	}
}

// A signature of a certificate that was revoked since stands if its token is older, and falls without one.
func TestVerifyAfterRevocation(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	r := w.Sign(w.app, request("a", "SM2", "raw"))
	w.Clock.Advance(time.Hour)
	if _, err := w.Directory.Revoke(t.Context(), "admin", w.Serial(w.doctor, "SM2"), "keyCompromise"); err != nil {
		t.Fatal(err)
	}
	w.Clock.Advance(time.Hour)
	for token, want := range map[string]pki.Verdict{string(r.Token): pki.Valid, "": pki.Invalid} {
		q := sign.VerifyRequest{Raw: &sign.RawSignature{Algorithm: "SM2", Value: r.Signature, Certificate: r.Certificates[0], Token: []byte(token)}, Document: testkit.Document}
		if got, err := w.Signing.Verify(t.Context(), &q); err != nil || got.Verdict != want {
			t.Errorf("with a token of %d bytes: %+v, %v, want %s", len(token), got, err, want)
		}
	}
}

// An algorithm that the house does not rely on any more proves nothing from that day on.
func TestVerifyAfterAlgorithmEnds(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	r := w.Sign(w.app, request("a", "SM2", "raw"))
	w.Clock.Advance(time.Hour)
	for end, want := range map[time.Duration]pki.Verdict{2 * time.Hour: pki.Valid, 30 * time.Minute: pki.Indeterminate} {
		house := sign.New(sign.Config{
			Directory: w.Directory, Clock: w.Clock, Trust: w.Trust, AlgorithmEnds: map[string]time.Time{"SM2": testkit.Start.Add(end)},
		})
		q := sign.VerifyRequest{Evidence: w.House.Evidence(w.app, r.RecordID), Document: testkit.Document}
		if got, err := house.Verify(t.Context(), &q); err != nil || got.Verdict != want {
			t.Errorf("ended after %v: %+v, %v, want %s", end, got, err, want)
		}
	}
}

func TestEvidenceIsTheApplications(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	r := w.Sign(w.app, request("a", "SM2", "raw"))
	stranger := w.App("emr", nil)
	auditor := w.App("audit", func(a *account.Application) { a.Rights = []string{account.RightEvidenceAny} })
	for app, want := range map[*account.Application]problem.Code{w.app: "", stranger: problem.NotFound, auditor: ""} {
		data, err := w.Signing.Evidence(t.Context(), app, r.RecordID)
		wants(t, app.ID, err, want)
		var b evidence.Bundle
		if err == nil && (json.Unmarshal(data, &b) != nil || b.RecordID != r.RecordID) {
			t.Errorf("%s got %s", app.ID, data)
		}
	}
	// A stranger cannot tell another's record from none.
	_, theirs := w.Signing.Evidence(t.Context(), stranger, r.RecordID)
	_, none := w.Signing.Evidence(t.Context(), stranger, strings.Repeat("0", 64))
	if theirs.Error() != none.Error() {
		t.Errorf("%v, and %v", theirs, none)
	}
	for name, id := range map[string]string{"short": "00", "no hex": strings.Repeat("x", 64), "empty": ""} {
		_, err := w.Signing.Evidence(t.Context(), w.app, id)
		wants(t, name, err, problem.InvalidRequest)
	}
	// What has a reference and is no signature is not shown: the outcome of a change has its intent's.
	err := w.Journal.State(t.Context(), func(rec audit.Record) error {
		if len(rec.Entry.Ref) == 0 {
			return nil
		}
		_, err := w.Signing.Evidence(t.Context(), auditor, strings.ToLower(hexOf(rec.Entry.Ref)))
		if problem.CodeOf(err) != problem.NotFound {
			return errors.New(rec.Entry.Kind + " is shown as evidence")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// Without a checkpoint that covers the record the answer is "not yet".
func TestEvidenceWaitsForCheckpoint(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.Journal.SetCheckpointer(nil)
	r := w.Sign(w.app, request("a", "SM2", "raw"))
	_, err := w.Signing.Evidence(t.Context(), w.app, r.RecordID)
	wants(t, "no checkpoint", err, problem.NotReady)
	w.Journal.SetCheckpointer(w.LogKey)
	if _, err := w.Signing.Evidence(t.Context(), w.app, r.RecordID); err != nil {
		t.Error(err)
	}
}
