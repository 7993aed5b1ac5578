package sign_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/google/go-cmp/cmp"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

func wants(t *testing.T, what string, err error, code problem.Code) {
	t.Helper()
	if problem.CodeOf(err) != code {
		t.Errorf("%s: %v, want %q", what, err, code)
	}
}

// A ward is a house with an application and a doctor.
type ward struct {
	*testkit.House
	app    *account.Application
	doctor *account.Signer
}

func newWard(t testing.TB) *ward {
	h := testkit.New(t)
	return &ward{h, h.App("his", nil), h.Doctor("D001")}
}

func request(key, algorithm, form string) *sign.Request {
	q := testkit.Request(key, "D001")
	q.Algorithm, q.Form = algorithm, form
	return q
}

// records counts the signatures in the journal.
func (w *ward) records(t *testing.T) int {
	t.Helper()
	n := 0
	if err := w.Journal.Range(t.Context(), 0, func(r audit.Record) error {
		if r.Entry.Kind == sign.Kind {
			n++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// checked is the signature judged by other code than that which made it: gmsm's and the standard library's.
func checked(t *testing.T, q *sign.Request, r *sign.Result) {
	t.Helper()
	cert, err := smx509.ParseCertificate(r.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	signed, value := q.Content, r.Signature
	if q.Form == "cms" {
		m, err := cms.Parse(r.Signature)
		if err != nil {
			t.Fatal(err)
		}
		if attached := m.Content != nil; attached == q.Detached || attached && !bytes.Equal(m.Content, q.Content) {
			t.Errorf("detached %v, and the content is %q", q.Detached, m.Content)
		}
		signed, value = m.SignerInfos[0].SignedAttributesDER(), m.SignerInfos[0].Signature
		if tokens := m.SignerInfos[0].TimeStampTokens(); r.Token != nil && (len(tokens) != 1 || !bytes.Equal(tokens[0], r.Token)) {
			t.Errorf("%d tokens in the CMS", len(tokens))
		}
	}
	switch pub := cert.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if q.Algorithm != "SM2" || !sm2.VerifyASN1WithSM2(pub, nil, signed, value) {
			t.Error("the SM2 signature does not verify")
		}
	case *rsa.PublicKey:
		sum := sha256.Sum256(signed)
		if err := rsa.VerifyPKCS1v15(pub, crypto.SHA256, sum[:], value); q.Algorithm != "RSA-2048" || err != nil {
			t.Errorf("the RSA signature: %v", err)
		}
	}
	if r.Token == nil {
		return
	}
	token, err := tsa.ParseToken(r.Token)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := token.VerifyData(value); err != nil {
		t.Errorf("the token: %v", err)
	}
	if sm3 := token.Imprint.Algorithm.Equal(cms.OIDSM3); sm3 != (q.Algorithm == "SM2") {
		t.Errorf("the token of a %s signature has an imprint by %v", q.Algorithm, token.Imprint.Algorithm)
	}
}

func TestSign(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, alg := range []string{"SM2", "RSA-2048"} {
		for name, change := range map[string]func(*sign.Request){
			"raw":          func(q *sign.Request) { q.Form = "raw" },
			"cms":          func(q *sign.Request) {},
			"cms attached": func(q *sign.Request) { q.Detached = false },
			"cms of digest": func(q *sign.Request) {
				q.Digest = &sign.Digest{Algorithm: map[string]string{"SM2": "SM3", "RSA-2048": "SHA-256"}[alg], Value: testkit.Digest(alg, q.Content)}
				q.Content = nil
			},
			"longest": func(q *sign.Request) {
				q.IdempotencyKey = alg + strings.Repeat("k", 128-len(alg))
				q.Document = sign.Document{ID: strings.Repeat("号", 42), Type: strings.Repeat("类", 21), MediaType: strings.Repeat("m", 127)}
				q.Role = strings.Repeat("职", 21)
				q.Consent.Assertion = strings.Repeat("话", 170)
			},
		} {
			q := request(alg+strings.ReplaceAll(name, " ", "-"), alg, "cms")
			change(q)
			r := w.Sign(w.app, q)
			t.Run(alg+"/"+name, func(t *testing.T) {
				checked(t, q, r)
				id := sign.RecordID("his", q.IdempotencyKey)
				if r.RecordID != hex.EncodeToString(id[:]) || r.Replayed || r.Node != "benbu-1" || r.Provenance != testkit.Provenance || r.Accuracy != 2*time.Millisecond ||
					!r.GenTime.Equal(testkit.Start.Truncate(time.Millisecond)) || len(r.Certificates) != 2 {
					t.Errorf("record %s, replayed %v, node %s, time %v ± %v by %q, %d certificates", r.RecordID, r.Replayed, r.Node, r.GenTime, r.Accuracy, r.Provenance, len(r.Certificates))
				}
				again, err := w.Signing.Sign(t.Context(), w.app, q)
				if err != nil || !again.Replayed {
					t.Fatalf("again: %+v, %v", again, err)
				}
				again.Replayed = false
				if diff := cmp.Diff(r, again); diff != "" {
					t.Errorf("a retry got something else: %s", diff)
				}
				b, err := evidence.Parse(w.Evidence(w.app, r.RecordID))
				if err != nil {
					t.Fatal(err)
				}
				in := evidence.Input{Document: testkit.Document}
				if rep := evidence.Verify(b, w.Trust, in); rep.Verdict != pki.Valid {
					t.Errorf("evidence: %+v", rep)
				}
			})
		}
	}
	if n := w.records(t); n != 10 {
		t.Errorf("%d records of 10 signatures", n)
	}
}

// The document is nowhere in the journal, also when a CMS holds it.
func TestDocumentIsNotStored(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	q := request("attached", "SM2", "cms")
	q.Detached = false
	w.Sign(w.app, q)
	w.Sign(w.app, request("raw", "SM2", "raw"))
	err := w.Journal.Range(t.Context(), 0, func(r audit.Record) error {
		all := [][]byte{r.EntryDER}
		for _, p := range r.Entry.Payloads {
			data, err := w.Journal.Payload(t.Context(), &r.Entry, p.Name)
			if err != nil {
				return err
			}
			all = append(all, data)
		}
		for _, data := range all {
			for _, secret := range []string{string(testkit.Document), "急性阑尾炎", testkit.PIN} {
				if bytes.Contains(data, []byte(secret)) {
					t.Errorf("entry %d, a %s, holds %q", r.Sequence, r.Entry.Kind, secret)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// An RSA signature is the same each time, so the message that a caller gets can be compared with one made attached.
func TestAttachedIsTheSameMessage(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	detached := w.Sign(w.app, request("a", "RSA-2048", "cms"))
	m, err := cms.Parse(detached.Signature)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Verify(nil); err == nil {
		t.Error("a detached message verifies without its content")
	}
	attached, err := m.WithContent(testkit.Document)
	if err != nil {
		t.Fatal(err)
	}
	if m, err = cms.Parse(attached.Bytes()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Verify(nil); err != nil {
		t.Error(err)
	}
	back, err := m.WithContent(nil)
	if err != nil || !bytes.Equal(back.Bytes(), detached.Signature) {
		t.Error("there and back is not the same")
	}
}

func TestSignRefuses(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.Doctor("D002", "SM2")
	attributes := []byte{0x31, 0x0d, 0x30, 0x0b, 0x06, 0x03, 0x2a, 0x03, 0x04, 0x31, 0x04, 0x0c, 0x02, 'a', 'b'}
	sm3, sha := testkit.Digest("SM2", testkit.Document), testkit.Digest("RSA-2048", testkit.Document)
	digest := func(alg string, value []byte) func(*sign.Request) {
		return func(q *sign.Request) {
			q.Form, q.Content, q.Digest = "cms", nil, &sign.Digest{Algorithm: alg, Value: value}
		}
	}
	size, done := w.Journal.Size(), w.Staff.Calls("Do")
	for name, tt := range map[string]struct {
		spoil func(*sign.Request)
		want  problem.Code
		field string
	}{
		"no key":                {func(q *sign.Request) { q.IdempotencyKey = "" }, problem.InvalidRequest, "Idempotency-Key"},
		"long key":              {func(q *sign.Request) { q.IdempotencyKey = strings.Repeat("k", 129) }, problem.InvalidRequest, "Idempotency-Key"},
		"key with a space":      {func(q *sign.Request) { q.IdempotencyKey = "a b" }, problem.InvalidRequest, "Idempotency-Key"},
		"key in Chinese":        {func(q *sign.Request) { q.IdempotencyKey = "键" }, problem.InvalidRequest, "Idempotency-Key"},
		"no signer":             {func(q *sign.Request) { q.Signer = "" }, problem.InvalidRequest, "signer"},
		"signer, odd":           {func(q *sign.Request) { q.Signer = "D001\xff" }, problem.InvalidRequest, "signer"},
		"signer of 33":          {func(q *sign.Request) { q.Signer = strings.Repeat("D", 33) }, problem.InvalidRequest, "signer"},
		"nobody":                {func(q *sign.Request) { q.Signer = "D009" }, problem.SignerUnknown, ""},
		"no such key":           {func(q *sign.Request) { q.Signer, q.Algorithm = "D002", "RSA-2048" }, problem.KeyUnknown, ""},
		"no algorithm":          {func(q *sign.Request) { q.Algorithm = "" }, problem.InvalidRequest, "algorithm"},
		"P-256":                 {func(q *sign.Request) { q.Algorithm = "P-256" }, problem.InvalidRequest, "algorithm"},
		"no form":               {func(q *sign.Request) { q.Form = "" }, problem.InvalidRequest, "form"},
		"form PDF":              {func(q *sign.Request) { q.Form = "pdf" }, problem.InvalidRequest, "form"},
		"raw, attached":         {func(q *sign.Request) { q.Detached = false }, problem.InvalidRequest, "detached"},
		"no content":            {func(q *sign.Request) { q.Content = nil }, problem.InvalidRequest, "content"},
		"empty content":         {func(q *sign.Request) { q.Content = []byte{} }, problem.InvalidRequest, "content"},
		"raw of digest":         {func(q *sign.Request) { q.Content, q.Digest = nil, &sign.Digest{Algorithm: "SM3", Value: sm3} }, problem.ContentRequired, ""},
		"raw, both":             {func(q *sign.Request) { q.Digest = &sign.Digest{Algorithm: "SM3", Value: sm3} }, problem.ContentRequired, ""},
		"attached of digest":    {func(q *sign.Request) { digest("SM3", sm3)(q); q.Detached = false }, problem.ContentRequired, ""},
		"both":                  {func(q *sign.Request) { digest("SM3", sm3)(q); q.Content = testkit.Document }, problem.InvalidRequest, "digest"},
		"digest of the other":   {digest("SHA-256", sha), problem.InvalidRequest, "digest"},
		"short digest":          {digest("SM3", sm3[:31]), problem.InvalidRequest, "digest"},
		"no digest":             {digest("SM3", nil), problem.InvalidRequest, "digest"},
		"attributes as content": {func(q *sign.Request) { q.Content = attributes }, problem.InvalidRequest, "content"},
		"no document id":        {func(q *sign.Request) { q.Document.ID = "" }, problem.InvalidRequest, "document.id"},
		"long document id":      {func(q *sign.Request) { q.Document.ID = strings.Repeat("号", 43) }, problem.InvalidRequest, "document.id"},
		"document id, NUL":      {func(q *sign.Request) { q.Document.ID = "a\x00" }, problem.InvalidRequest, "document.id"},
		"no type":               {func(q *sign.Request) { q.Document.Type = "" }, problem.InvalidRequest, "document.type"},
		"long type":             {func(q *sign.Request) { q.Document.Type = strings.Repeat("类", 22) }, problem.InvalidRequest, "document.type"},
		"type that turns":       {func(q *sign.Request) { q.Document.Type = "a\u202e" }, problem.InvalidRequest, "document.type"},
		"no media type":         {func(q *sign.Request) { q.Document.MediaType = "" }, problem.InvalidRequest, "document.media_type"},
		"long media type":       {func(q *sign.Request) { q.Document.MediaType = strings.Repeat("m", 128) }, problem.InvalidRequest, "document.media_type"},
		"no role":               {func(q *sign.Request) { q.Role = "" }, problem.InvalidRequest, "role"},
		"role, C1":              {func(q *sign.Request) { q.Role = "a\u0085b" }, problem.InvalidRequest, "role"},
		"role, bad UTF-8":       {func(q *sign.Request) { q.Role = "a\xff" }, problem.InvalidRequest, "role"},
		"role in a CMS":         {func(q *sign.Request) { q.Form, q.Role = "cms", "\u2066a" }, problem.InvalidRequest, "role"},
		"no consent":            {func(q *sign.Request) { q.Consent = sign.Consent{} }, problem.InvalidRequest, "authorization.method"},
		"no words":              {func(q *sign.Request) { q.Consent.Assertion = "" }, problem.InvalidRequest, "authorization.assertion"},
		"unknown authorisation": {func(q *sign.Request) { q.Consent = sign.Consent{AuthorizationID: strings.Repeat("0", 32)} }, problem.AuthorizationBad, ""},
	} {
		q := request("k", "SM2", "raw")
		tt.spoil(q)
		_, err := w.Signing.Sign(t.Context(), w.app, q)
		wants(t, name, err, tt.want)
		var p *problem.Problem
		if errors.As(err, &p) && p.Field != tt.field {
			t.Errorf("%s: field %q, want %q", name, p.Field, tt.field)
		}
	}
	q := request("k", "SM2", "raw")
	for name, tt := range map[string]struct {
		spoil func(*account.Application)
		want  problem.Code
	}{
		"no right":       {func(a *account.Application) { a.Rights = []string{account.RightVerify} }, problem.Forbidden},
		"stopped":        {func(a *account.Application) { a.Stopped = true }, problem.ApplicationStopped},
		"PIN is needed":  {func(a *account.Application) { a.Consent = []evidence.Method{evidence.SignerPIN} }, problem.ConsentInsufficient},
		"nothing at all": {func(a *account.Application) { a.Consent = nil }, problem.ConsentInsufficient},
	} {
		a := *w.app
		tt.spoil(&a)
		_, err := w.Signing.Sign(t.Context(), &a, q)
		wants(t, name, err, tt.want)
	}
	w.Full = func() error { return errors.New("12 MiB free") }
	_, err := w.Signing.Sign(t.Context(), w.app, q)
	wants(t, "full disk", err, problem.DiskReserve)
	w.Full = nil
	if _, err := w.Directory.StopSigner(t.Context(), "admin", "D001", true, ""); err != nil {
		t.Fatal(err)
	}
	size += 2
	_, err = w.Signing.Sign(t.Context(), w.app, q)
	wants(t, "stopped signer", err, problem.SignerStopped)
	if w.Journal.Size() != size || w.Staff.Calls("Do") != done {
		t.Errorf("refusals made %d entries and %d signatures", w.Journal.Size()-size, w.Staff.Calls("Do")-done)
	}
	// A set of attributes is harmless inside a CMS, whose signature is over attributes of its own.
	if _, err := w.Directory.StopSigner(t.Context(), "admin", "D001", false, ""); err != nil {
		t.Fatal(err)
	}
	q = request("attributes", "SM2", "cms")
	q.Content = attributes
	w.Sign(w.app, q)
}

// Nothing is signed while time is not trusted, also without a timestamp: the certificate could not be judged. How wrong
// the time may be matters to the timestamp only.
func TestSignNeedsTime(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	lab := w.App("lab", func(a *account.Application) { a.Stamp = account.StampNone })
	odd := *w.app
	odd.Stamp = "sometimes" // a word of a later release, or a mistake
	for state, want := range map[ntp.State]problem.Code{
		ntp.Cold: problem.TimeUntrusted, ntp.Acquiring: problem.TimeUntrusted, ntp.Untrusted: problem.TimeUntrusted, ntp.Suspect: problem.TimeUntrusted,
		ntp.Trusted: "", ntp.Holdover: "",
	} {
		w.Clock.State(state)
		for _, app := range []*account.Application{w.app, lab, &odd} {
			_, err := w.Signing.Sign(t.Context(), app, request(string(state)+app.Stamp, "SM2", "raw"))
			wants(t, string(state)+", stamp "+app.Stamp, err, want)
		}
	}
	w.Clock.Change(func(r *ntp.Reading) { r.State, r.Bound = ntp.Holdover, time.Second+1 })
	_, err := w.Signing.Sign(t.Context(), w.app, request("wide", "SM2", "raw"))
	wants(t, "bound above the accuracy", err, problem.TimeUntrusted)
	_, err = w.Signing.Sign(t.Context(), &odd, request("wide", "SM2", "raw"))
	wants(t, "an odd policy", err, problem.TimeUntrusted)
	r, err := w.Signing.Sign(t.Context(), lab, request("wide", "SM2", "raw"))
	if err != nil || r.Token != nil || !r.GenTime.IsZero() {
		t.Errorf("without a timestamp: %+v, %v", r, err)
	}
}

// A unit that says beforehand that it would issue nothing is believed: nothing is signed that would be thrown away. Where no
// timestamp is asked for, nobody asks it.
func TestUnitForetells(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	lab := w.App("lab", func(a *account.Application) { a.Stamp = account.StampNone })
	stopped := problem.New(problem.NotReady, "停止 (stopped)", "启动 (start it)")
	for name, c := range map[string]struct {
		why  error
		want problem.Code
	}{"time": {fmt.Errorf("unit: %w", tsa.ErrTimeNotAvailable), problem.TimeUntrusted}, "stopped": {stopped, problem.NotReady}} {
		w.Stampers["SM2"].NotReady(c.why)
		signed := w.Staff.Calls("Do")
		_, err := w.Signing.Sign(t.Context(), w.app, request(name, "SM2", "raw"))
		wants(t, name, err, c.want)
		if n := w.Staff.Calls("Do"); n != signed {
			t.Errorf("%s: %d signatures were made", name, n-signed)
		}
		if _, err := w.Signing.Sign(t.Context(), lab, request(name+"-without", "SM2", "raw")); err != nil {
			t.Errorf("%s, without a timestamp: %v", name, err)
		}
	}
	w.Stampers["SM2"].NotReady(nil)
	w.Sign(w.app, request("time", "SM2", "raw"))
}

func TestSignNeedsStatus(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	if _, err := w.Directory.Revoke(t.Context(), "admin", w.Serial(w.doctor, "SM2"), "superseded"); err != nil {
		t.Fatal(err)
	}
	_, err := w.Signing.Sign(t.Context(), w.app, request("a", "SM2", "raw"))
	wants(t, "revoked", err, problem.CertificateUnusable)
	w.Sign(w.app, request("b", "RSA-2048", "raw"))
	w.Clock.Advance(7*24*time.Hour + time.Second)
	_, err = w.Signing.Sign(t.Context(), w.app, request("c", "RSA-2048", "raw"))
	wants(t, "the list has ended", err, problem.CertificateUnusable)
	if _, err := w.Directory.RefreshCRLs(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.Sign(w.app, request("c", "RSA-2048", "raw"))
	w.Clock.Change(func(r *ntp.Reading) { r.Time = testkit.Start.Add(time.Hour) }) // before the list
	_, err = w.Signing.Sign(t.Context(), w.app, request("d", "RSA-2048", "raw"))
	wants(t, "a list from the future", err, problem.CertificateUnusable)
	w.Clock.Change(func(r *ntp.Reading) { r.Time = testkit.Start.AddDate(2, 0, 1) })
	w.Restart()
	_, err = w.Signing.Sign(t.Context(), w.app, request("e", "RSA-2048", "raw"))
	wants(t, "expired", err, problem.CertificateUnusable)
	if n := w.records(t); n != 2 {
		t.Errorf("%d records, want 2", n)
	}
}

// What happens to signer, certificate or time while the cipher machine works counts: there is no record, and the consent
// is not used up.
func TestChangesWhileSigning(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		act  func(w *ward) error
		want problem.Code
	}{
		"signer stopped": {func(w *ward) error {
			_, err := w.Directory.StopSigner(context.Background(), "admin", "D001", true, "")
			return err
		}, problem.SignerStopped},
		"certificate revoked": {func(w *ward) error {
			_, err := w.Directory.Revoke(context.Background(), "admin", w.Serial(w.doctor, "SM2"), "keyCompromise")
			return err
		}, problem.CertificateUnusable},
		"certificate ends": {func(w *ward) error { w.Clock.Advance(3 * 365 * 24 * time.Hour); return nil }, problem.CertificateUnusable},
		"time suspect":     {func(w *ward) error { w.Clock.State(ntp.Suspect); return nil }, problem.TimeUntrusted},
	} {
		for _, stamp := range []string{account.StampRequired, account.StampNone} {
			t.Run(name+"/"+stamp, func(t *testing.T) {
				t.Parallel()
				w := newWard(t)
				w.app = w.App("lab", func(a *account.Application) { a.Stamp = stamp })
				var once sync.Once
				w.Staff.Before(func(call, _ string) error {
					var err error
					if call == "Do" {
						once.Do(func() { err = tt.act(w) })
					}
					return err
				})
				_, err := w.Signing.Sign(t.Context(), w.app, request("a", "SM2", "raw"))
				wants(t, name, err, tt.want)
				if n := w.records(t); n != 0 {
					t.Errorf("%d records", n)
				}
			})
		}
	}
}

// errGone is a cipher machine that is away.
var errGone = &hsm.Error{Call: "C_Sign", RV: 0x32}

// Whatever fails before the record is durable: no record, the use of the consent goes back, the same key works later.
// Where the record may be there, the use does not go back, and the same key answers what is there.
func TestFaults(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fail   func(w *ward)
		want   problem.Code
		landed bool // the record is there
		spent  bool // the consent is used, in spite of the error
	}{
		"machine away":     {func(w *ward) { w.Staff.Before(func(string, string) error { return errGone }) }, problem.HSMUnavailable, false, false},
		"machine too slow": {func(w *ward) { w.Staff.Before(func(string, string) error { return hsm.ErrDeadline }) }, problem.Timeout, false, false},
		"over the quota": {func(w *ward) {
			w.Staff.Before(func(string, string) error { return &hsm.QuotaError{Application: "his"} })
		}, problem.RateLimited, false, false},
		"machine's PIN":         {func(w *ward) { w.Staff.Before(func(string, string) error { return hsm.ErrNeedsOperator }) }, problem.HSMNeedsOperator, false, false},
		"key is gone":           {func(w *ward) { w.Staff.Before(func(string, string) error { return hsm.ErrKeyNotFound }) }, problem.HSMUnavailable, false, false},
		"answer lost":           {func(w *ward) { w.Staff.After(func(string, string) error { return errGone }) }, problem.HSMUnavailable, false, false},
		"no token":              {func(w *ward) { w.Stampers["SM2"].Fault(func() error { return errGone }) }, problem.HSMUnavailable, false, false},
		"time lost at stamping": {func(w *ward) { w.Stampers["SM2"].Fault(func() error { return tsa.ErrTimeNotAvailable }) }, problem.TimeUntrusted, false, false},
		"unit's certificate":    {func(w *ward) { w.Stampers["SM2"].Fault(func() error { return tsa.ErrCertificateNotValid }) }, problem.CertificateUnusable, false, false},
		"journal full":          {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, false, audit.ErrJournalUnwritable) }, problem.JournalUnwritable, false, false},
		"journal closed":        {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, false, audit.ErrClosed) }, problem.JournalUnwritable, false, false},
		"caller left the queue": {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, false, context.Canceled) }, problem.Timeout, false, false},
		"draft refused":         {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, false, audit.ErrInvalidDraft) }, problem.InvalidRequest, false, false},
		"unknown, written":      {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, true, audit.ErrOutcomeUnknown) }, problem.Timeout, true, true},
		"unknown, not written":  {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, false, audit.ErrOutcomeUnknown) }, problem.Timeout, false, true},
		"failed, written":       {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, true, audit.ErrJournalFailed) }, problem.JournalUnwritable, true, true},
		"odd error":             {func(w *ward) { w.Journal.FailKind(sign.Kind, -1, false, errors.New("?")) }, problem.JournalUnwritable, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWard(t)
			g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: [][]byte{testkit.Digest("SM2", testkit.Document)}})
			q := request("a", "SM2", "cms")
			q.Consent = sign.Consent{AuthorizationID: g.ID}
			tt.fail(w)
			_, err := w.Signing.Sign(t.Context(), w.app, q)
			wants(t, "first", err, tt.want)
			var p *problem.Problem
			if errors.As(err, &p) && (p.Detail == "" || p.Next == "") {
				t.Errorf("no reason or next step: %+v", p)
			}
			w.Staff.Before(nil)
			w.Staff.After(nil)
			w.Stampers["SM2"].Fault(nil)
			w.Journal.Fault(nil)
			if n := w.records(t); (n == 1) != tt.landed {
				t.Errorf("%d records", n)
			}
			r, err := w.Signing.Sign(t.Context(), w.app, q)
			switch {
			case tt.landed:
				if err != nil || !r.Replayed {
					t.Errorf("retry: %+v, %v, want what is there", r, err)
				}
			case tt.spent:
				wants(t, "retry", err, problem.AuthorizationSpent)
			case err != nil || r.Replayed:
				t.Errorf("retry: %+v, %v", r, err)
			}
			other := *q
			other.IdempotencyKey = "b"
			_, err = w.Signing.Sign(t.Context(), w.app, &other) // the one use is used, one way or the other
			wants(t, "another key", err, problem.AuthorizationSpent)
			want := 1
			if tt.spent && !tt.landed {
				want = 0
			}
			if n := w.records(t); n != want {
				t.Errorf("%d records at the end, want %d", n, want)
			}
		})
	}
}

// The write of an attempt whose answer was lost lands while the retry is under way: the retry gets the first record, and
// its own use of the consent goes back.
func TestLateLanding(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 2, Seconds: 60})
	q := request("a", "SM2", "cms")
	q.Consent = sign.Consent{AuthorizationID: g.ID}
	var late audit.Draft
	w.Journal.Fault(func(d audit.Draft) (bool, error) {
		if d.Kind != sign.Kind {
			return false, nil
		}
		late = d
		return false, audit.ErrOutcomeUnknown
	})
	_, err := w.Signing.Sign(t.Context(), w.app, q)
	wants(t, "first", err, problem.Timeout)
	w.Journal.Fault(func(d audit.Draft) (bool, error) {
		if d.Kind == sign.Kind {
			if _, err := w.Journal.Journal.Append(context.Background(), late); err != nil {
				t.Error(err)
			}
		}
		return false, nil
	})
	r, err := w.Signing.Sign(t.Context(), w.app, q)
	if err != nil || !r.Replayed {
		t.Fatalf("retry: %+v, %v", r, err)
	}
	checked(t, q, r)
	w.Journal.Fault(nil)
	if n := w.records(t); n != 1 {
		t.Errorf("%d records", n)
	}
	q.IdempotencyKey = "b" // the second of the two uses
	w.Sign(w.app, q)
	q.IdempotencyKey = "c"
	_, err = w.Signing.Sign(t.Context(), w.app, q)
	wants(t, "a third use", err, problem.AuthorizationSpent)
}

// A retry is answered whatever has become of consent, signer, certificate, time, cipher machine and disk; another
// request under the same key never is.
func TestReplay(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: [][]byte{testkit.Digest("SM2", testkit.Document)}})
	q := request("a", "SM2", "cms")
	q.Consent = sign.Consent{AuthorizationID: g.ID}
	first := w.Sign(w.app, q)
	if _, err := w.Directory.Revoke(t.Context(), "admin", w.Serial(w.doctor, "SM2"), "superseded"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Directory.StopSigner(t.Context(), "admin", "D001", true, ""); err != nil {
		t.Fatal(err)
	}
	w.Restart()
	w.Clock.State(ntp.Suspect)
	w.Full = func() error { return errors.New("full") }
	w.Staff.Before(func(string, string) error { return errGone })
	for name, consent := range map[string]sign.Consent{"the same": q.Consent, "a new one": {AuthorizationID: strings.Repeat("1", 32)}, "none": {}} {
		again := *q
		again.Consent = consent
		r, err := w.Signing.Sign(t.Context(), w.app, &again)
		if err != nil || !r.Replayed {
			t.Fatalf("consent %s: %+v, %v", name, r, err)
		}
		r.Replayed = false
		if diff := cmp.Diff(first, r); diff != "" {
			t.Errorf("consent %s: %s", name, diff)
		}
	}
	for name, change := range map[string]func(*sign.Request){
		"signer":    func(q *sign.Request) { q.Signer = "D002" },
		"algorithm": func(q *sign.Request) { q.Algorithm = "RSA-2048" },
		"form":      func(q *sign.Request) { q.Form = "raw" },
		"attached":  func(q *sign.Request) { q.Detached = false },
		"content":   func(q *sign.Request) { q.Content = []byte("x") },
		"digest": func(q *sign.Request) {
			q.Digest, q.Content = &sign.Digest{Algorithm: "SM3", Value: testkit.Digest("SM2", q.Content)}, nil
		},
		"document":      func(q *sign.Request) { q.Document.ID += "1" },
		"document type": func(q *sign.Request) { q.Document.Type += "1" },
		"media type":    func(q *sign.Request) { q.Document.MediaType += "1" },
		"role":          func(q *sign.Request) { q.Role = "nurse" },
	} {
		other := *q
		change(&other)
		_, err := w.Signing.Sign(t.Context(), w.app, &other)
		wants(t, name, err, problem.IdempotencyConflict)
	}
	// Another application has its own keys; whoever is stopped gets nothing.
	stopped := *w.app
	stopped.Stopped = true
	_, err := w.Signing.Sign(t.Context(), &stopped, q)
	wants(t, "stopped application", err, problem.ApplicationStopped)
	w.Clock.State(ntp.Trusted)
	_, err = w.Signing.Sign(t.Context(), w.App("emr", nil), q)
	wants(t, "another application", err, problem.SignerStopped)
	if n := w.records(t); n != 1 {
		t.Errorf("%d records", n)
	}
}

// What is promised is seven days; what is done is more: as long as the record is in the journal its key gives it back or
// refuses another body, and never makes a second record, however much time has passed and whatever has expired.
func TestKeysAreKeptForGood(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	q := request("a", "SM2", "cms")
	first := w.Sign(w.app, q)
	var since time.Duration
	for _, age := range []time.Duration{0, 6*24*time.Hour + 23*time.Hour, 7 * 24 * time.Hour, 8 * 24 * time.Hour, 400 * 24 * time.Hour, 11 * 365 * 24 * time.Hour} {
		w.Clock.Advance(age - since) // the CRL expires after 7 days, the signer's certificate after 2 years, the CA's after 10
		since = age
		for _, restarted := range []bool{false, true} {
			if restarted && age <= 400*24*time.Hour { // later the CA could make no CRL
				w.Restart()
			}
			r, err := w.Signing.Sign(t.Context(), w.app, q)
			if err != nil || !r.Replayed {
				t.Fatalf("after %s, restarted %t: %+v, %v", age, restarted, r, err)
			}
			r.Replayed = false
			if diff := cmp.Diff(first, r); diff != "" {
				t.Errorf("after %s, restarted %t: %s", age, restarted, diff)
			}
			other := *q
			other.Role = "nurse"
			_, err = w.Signing.Sign(t.Context(), w.app, &other)
			wants(t, fmt.Sprintf("another body after %s", age), err, problem.IdempotencyConflict)
		}
	}
	if n := w.records(t); n != 1 {
		t.Errorf("%d records", n)
	}
}

// A key is its application's own: the same one of two applications names two records. A refusal does not use it up.
func TestKeysOfTwoApplications(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	emr := w.App("emr", nil)
	q := request("a", "SM2", "raw")
	q.Signer = "D002"
	_, err := w.Signing.Sign(t.Context(), w.app, q)
	wants(t, "a signer who is not enrolled yet", err, problem.SignerUnknown)
	w.Doctor("D002")
	a, b := w.Sign(w.app, q), w.Sign(emr, q)
	if a.RecordID == b.RecordID || a.Replayed || b.Replayed {
		t.Errorf("records %s and %s, replayed %t and %t", a.RecordID, b.RecordID, a.Replayed, b.Replayed)
	}
	for app, want := range map[*account.Application]*sign.Result{w.app: a, emr: b} {
		if r := w.Sign(app, q); r.RecordID != want.RecordID || !r.Replayed || !bytes.Equal(r.Signature, want.Signature) {
			t.Errorf("retry of %s: record %s, replayed %t", app.ID, r.RecordID, r.Replayed)
		}
	}
	if n := w.records(t); n != 2 {
		t.Errorf("%d records", n)
	}
}

// A caller that hangs up at any point, or is cut off, gets one record by its retry, whether the first attempt went on or
// not. What it had begun does not hold the key.
func TestCallerHangsUp(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]func(w *ward, hangUp func()){
		"before the cipher machine": func(w *ward, hangUp func()) {
			w.Staff.Before(func(string, string) error { hangUp(); return nil })
		},
		"after the cipher machine": func(w *ward, hangUp func()) {
			w.Staff.After(func(string, string) error { hangUp(); return nil })
		},
		"before the timestamp": func(w *ward, hangUp func()) {
			w.Stampers["SM2"].Fault(func() error { hangUp(); return nil })
		},
		"before the journal": func(w *ward, hangUp func()) {
			w.Journal.Fault(func(d audit.Draft) (bool, error) {
				if d.Kind == sign.Kind {
					hangUp()
				}
				return false, nil
			})
		},
		"while it is written": func(w *ward, hangUp func()) {
			w.Journal.Fault(func(d audit.Draft) (bool, error) {
				if d.Kind == sign.Kind {
					hangUp()
					return true, audit.ErrOutcomeUnknown
				}
				return false, nil
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWard(t)
			ctx, hangUp := context.WithCancel(t.Context())
			at(w, hangUp)
			q := request("a", "SM2", "cms")
			_, err := w.Signing.Sign(ctx, w.app, q)
			if ctx.Err() == nil {
				t.Fatal("the caller did not hang up")
			}
			wants(t, "the first", err, problem.Timeout)
			w.Staff.Before(nil)
			w.Staff.After(nil)
			w.Stampers["SM2"].Fault(nil)
			w.Journal.Fault(nil)
			had := w.records(t)
			r := w.Sign(w.app, q)
			checked(t, q, r)
			if n := w.records(t); n != 1 || r.Replayed != (had == 1) {
				t.Errorf("%d records, %d of them before the retry; replayed %t", n, had, r.Replayed)
			}
		})
	}
}

// renewing is a directory in which the signer's certificate is another when it is looked at for the second time.
type renewing struct {
	*account.Service
	looked atomic.Int64
}

func (r *renewing) ActiveSigner(id, algorithm string) (*account.Signer, *account.SignerKey, error) {
	g, k, err := r.Service.ActiveSigner(id, algorithm)
	if err == nil && r.looked.Add(1) == 2 {
		renewed := *k
		renewed.Certificate = append(bytes.Clone(k.Certificate), 0)
		k = &renewed
	}
	return g, k, err
}

type staffKeys struct{ token *testkit.Token }

func (k staffKeys) Key(_ context.Context, label string, certificate []byte) (*hsm.Key, error) {
	cert, err := smx509.ParseCertificate(certificate)
	if err != nil {
		return nil, err
	}
	return hsm.KeyOf(k.token, hsm.KeyInfo{Label: label, Algorithm: hsm.SM2, Public: cert.PublicKey}, true)
}

func (k staffKeys) Wrapped(w *hsm.WrappedKey) (*hsm.Key, error) { return hsm.KeyOfWrapped(k.token, w) }

// A certificate that is renewed while its key signs costs one more try, and no person.
func TestCertificateReplacedWhileSigning(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	s := sign.New(sign.Config{
		Directory: &renewing{Service: w.Directory}, Journal: w.Journal, Keys: staffKeys{w.Staff}, Stampers: map[string]sign.Stamper{"SM2": w.Stampers["SM2"]},
		Accuracy: time.Second, Clock: w.Clock, Reserve: func() error { return nil }, Trust: w.Trust,
	})
	q := request("a", "SM2", "raw")
	_, err := s.Sign(t.Context(), w.app, q)
	wants(t, "replaced meanwhile", err, problem.NotReady)
	if n := w.records(t); n != 0 {
		t.Errorf("%d records", n)
	}
	if r, err := s.Sign(t.Context(), w.app, q); err != nil || r.Replayed {
		t.Errorf("again: %+v, %v", r, err)
	}
}

// A unit that takes over between the look at the present one and the token: the lists that go into the evidence would not
// be its own.
func TestUnitReplacedWhileSigning(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	unit := w.Stampers["SM2"]
	unit.Fault(func() error { unit.Authority = w.Stampers["RSA-2048"].Authority; return nil })
	_, err := w.Signing.Sign(t.Context(), w.app, testkit.Request("unit", "D001"))
	wants(t, "replaced meanwhile", err, problem.NotReady)
	unit.Fault(nil)
	b, err := evidence.Parse(w.Evidence(w.app, w.Sign(w.app, testkit.Request("unit", "D001")).RecordID))
	if err != nil {
		t.Fatal(err)
	}
	if r := evidence.Verify(b, w.Trust, evidence.Input{Document: testkit.Document}); r.Verdict != pki.Valid {
		t.Errorf("the retry: %+v", r)
	}
}

// A chooser has its tokens made elsewhere, and knows beforehand neither by whom nor under which certificate.
type chooser struct {
	unit  *testkit.Stamper
	path  []*smx509.Certificate
	ready error
}

func (c *chooser) Chain() []*smx509.Certificate { return nil }
func (c *chooser) Ready() error                 { return c.ready }
func (c *chooser) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	bare := *req
	bare.CertReq = false // a device that leaves its certificate out, whatever it is asked
	token, err := c.unit.Issue(ctx, &bare)
	if err == nil {
		token.Origin = tsa.Origin{By: "upstream/old-tsa", Path: c.path, Instead: "unit/sm2: time-not-available"}
	}
	return token, err
}

// A token of a device elsewhere: the record says whose it is and why, holds the certificates that the token does not, and
// its evidence is valid for a verifier who has nothing else.
func TestTokenOfAnother(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	stamper := &chooser{unit: w.Stampers["RSA-2048"], path: w.Stampers["RSA-2048"].Chain()}
	s := sign.New(sign.Config{
		Directory: w.Directory, Journal: w.Journal, Keys: staffKeys{w.Staff}, Stampers: map[string]sign.Stamper{"SM2": stamper},
		Accuracy: time.Second, Clock: w.Clock, Reserve: func() error { return nil }, Trust: w.Trust,
	})
	for _, form := range []string{"raw", "cms"} {
		q := request(form, "SM2", form)
		r, err := s.Sign(t.Context(), w.app, q)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := s.Sign(t.Context(), w.app, q); err != nil || !again.Replayed || len(again.Certificates) != len(r.Certificates) {
			t.Errorf("again: %+v, %v", again, err)
		}
		b, err := evidence.Parse(w.Evidence(w.app, r.RecordID))
		if err != nil {
			t.Fatal(err)
		}
		token, err := tsa.ParseToken(b.Token)
		if err != nil || len(token.Certificates()) != 0 {
			t.Fatalf("%v, %d certificates in the token", err, len(token.Certificates()))
		}
		report := evidence.Verify(b, w.Trust, evidence.Input{Document: testkit.Document})
		if report.Verdict != pki.Valid || !slices.ContainsFunc(report.Statements, func(s string) bool { return strings.Contains(s, "old-tsa") }) {
			t.Errorf("%s: %+v", form, report)
		}
		e, err := audit.ParseEntry(b.Journal.Leaf)
		if err != nil || e.Text("stamp.by") != "upstream/old-tsa" || e.Text("stamp.instead") != "unit/sm2: time-not-available" {
			t.Errorf("the leaf: %v, %v", e, err)
		}
	}

	// Nobody can stamp, and says so beforehand: nothing is signed.
	stamper.ready = problem.New(problem.NotReady, "x", "x")
	_, err := s.Sign(t.Context(), w.app, request("later", "SM2", "raw"))
	wants(t, "nobody can stamp", err, problem.NotReady)
	stamper.ready = nil

	// Its path does not end in an anchor after all: the signature is not recorded.
	leaf, err := smx509.ParseCertificate(stamper.path[0].Raw) // that nobody has judged yet
	if err != nil {
		t.Fatal(err)
	}
	stamper.path = []*smx509.Certificate{leaf}
	_, err = s.Sign(t.Context(), w.app, request("untrusted", "SM2", "raw"))
	wants(t, "a device that nobody trusts", err, problem.CertificateUnusable)
	if n := w.records(t); n != 2 {
		t.Errorf("%d records", n)
	}
}

// Equal requests at the same time make one record and one use of the consent, and all get the same.
func TestSameKeyInParallel(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: [][]byte{testkit.Digest("SM2", testkit.Document)}})
	var all sync.WaitGroup
	var mu sync.Mutex
	results := map[string]int{}
	var fresh, conflicts atomic.Int64
	for i := range 16 {
		all.Go(func() {
			q := request("a", "SM2", "cms")
			q.Consent = sign.Consent{AuthorizationID: g.ID}
			if i%4 == 3 {
				q.Role = "nurse" // whichever comes first wins
			}
			r, err := w.Signing.Sign(t.Context(), w.app, q)
			switch {
			case problem.CodeOf(err) == problem.IdempotencyConflict:
				conflicts.Add(1)
				return
			case err != nil:
				t.Error(err)
				return
			}
			if !r.Replayed {
				fresh.Add(1)
			}
			mu.Lock()
			defer mu.Unlock()
			results[string(r.Signature)]++
		})
	}
	all.Wait()
	if n := w.records(t); n != 1 || fresh.Load() != 1 || len(results) != 1 || conflicts.Load() != 4 && conflicts.Load() != 12 {
		t.Errorf("%d records, %d made, %d different results, %d conflicts", n, fresh.Load(), len(results), conflicts.Load())
	}
}

// A retry that gives up waiting for the first gets a timeout, and the first goes on.
func TestRetryGivesUp(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	entered, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.Staff.Before(func(call, _ string) error {
		once.Do(func() { close(entered); <-goOn })
		return nil
	})
	done := make(chan error)
	go func() {
		_, err := w.Signing.Sign(context.Background(), w.app, request("a", "SM2", "raw"))
		done <- err
	}()
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := w.Signing.Sign(ctx, w.app, request("a", "SM2", "raw"))
	wants(t, "the retry", err, problem.Timeout)
	close(goOn)
	if err := <-done; err != nil {
		t.Errorf("the first: %v", err)
	}
}

var digestNames = map[string]string{"SM2": "SM3", "RSA-2048": "SHA-256"}

// An authorisation for a document's SM3 is none for its SHA-256, and the reverse; nor for another document whose digest
// by the other algorithm would be those 32 bytes, as an application can claim that sends a digest alone.
func TestDigestBinding(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, alg := range []string{"SM2", "RSA-2048"} {
		other := map[string]string{"SM2": "RSA-2048", "RSA-2048": "SM2"}[alg]
		g := w.Grant(w.app, account.GrantRequest{Signer: "D001", DigestAlgorithm: digestNames[alg], Digests: [][]byte{testkit.Digest(alg, testkit.Document)}})
		same := request(alg+"same", other, "cms")
		same.Content, same.Digest, same.Consent = nil, &sign.Digest{Algorithm: digestNames[other], Value: testkit.Digest(alg, testkit.Document)}, sign.Consent{AuthorizationID: g.ID}
		_, err := w.Signing.Sign(t.Context(), w.app, same)
		wants(t, alg+", the same bytes under the other algorithm", err, problem.AuthorizationBad)
		use := func(key, algorithm string, content []byte) error {
			q := request(alg+key, algorithm, "raw")
			q.Content, q.Consent = content, sign.Consent{AuthorizationID: g.ID}
			_, err := w.Signing.Sign(t.Context(), w.app, q)
			return err
		}
		wants(t, alg+", the other algorithm", use("a", other, testkit.Document), problem.AuthorizationBad)
		wants(t, alg+", another document", use("b", alg, []byte("x")), problem.AuthorizationBad)
		wants(t, alg, use("c", alg, testkit.Document), "")
		wants(t, alg+", again", use("d", alg, testkit.Document), problem.AuthorizationSpent)
	}
	// The digest of a digest-only request binds as well.
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Digests: [][]byte{testkit.Digest("SM2", testkit.Document)}})
	q := request("digest", "SM2", "cms")
	q.Content, q.Digest, q.Consent = nil, &sign.Digest{Algorithm: "SM3", Value: make([]byte, 32)}, sign.Consent{AuthorizationID: g.ID}
	_, err := w.Signing.Sign(t.Context(), w.app, q)
	wants(t, "another digest", err, problem.AuthorizationBad)
	q.Digest.Value = testkit.Digest("SM2", testkit.Document)
	w.Sign(w.app, q)
}

// Many signatures at once, with one activation: each record once, none lost, no use too many.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 40, Seconds: 60})
	var all sync.WaitGroup
	var good, spent atomic.Int64
	for i := range 60 {
		all.Go(func() {
			q := request(fmt.Sprint("k", i), "SM2", []string{"raw", "cms"}[i%2])
			q.Consent = sign.Consent{AuthorizationID: g.ID}
			_, err := w.Signing.Sign(t.Context(), w.app, q)
			switch problem.CodeOf(err) {
			case "":
				good.Add(1)
			case problem.AuthorizationSpent:
				spent.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := w.records(t); good.Load() != 40 || spent.Load() != 20 || n != 40 {
		t.Errorf("%d signed, %d refused, %d records", good.Load(), spent.Load(), n)
	}
}

// A token is over this signature, by this unit, of this time; the entry says what was vouched for.
// The journal copies fields that are not in the order of their names; a signature's are.
func TestFieldsAreInOrder(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	seen := 0
	w.Journal.Fault(func(d audit.Draft) (bool, error) {
		if d.Kind == sign.Kind {
			seen++
			if !slices.IsSortedFunc(d.Fields, func(a, b audit.Field) int { return strings.Compare(a.Name, b.Name) }) {
				t.Errorf("fields of a draft are %v", d.Fields)
			}
		}
		return false, nil
	})
	for _, stamp := range []string{account.StampNone, account.StampRequired} {
		app := *w.app
		app.Stamp = stamp
		w.Sign(&app, request("order-"+stamp, "SM2", "raw"))
	}
	if seen != 2 {
		t.Errorf("%d drafts", seen)
	}
}

func TestEntry(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	q := request("a", "SM2", "cms")
	r := w.Sign(w.app, q)
	rec, err := w.Journal.Entry(t.Context(), r.Sequence)
	if err != nil {
		t.Fatal(err)
	}
	e := &rec.Entry
	if e.Kind != sign.Kind || e.Actor != "application/his" || e.Object != "D001" || hex.EncodeToString(e.Ref) != r.RecordID || e.Epoch.String() != r.Epoch {
		t.Errorf("entry %+v", e)
	}
	token, err := tsa.ParseToken(r.Token)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]audit.Value{
		"application": audit.Text("his"), "signer": audit.Text("D001"), "department": audit.Text("心血管内科二病区"), "role": audit.Text("attending"),
		"digest.value": audit.Octets(testkit.Digest("SM2", testkit.Document)), "digest.algorithm": audit.Text("SM3"), "document.size": audit.Int(len(testkit.Document)),
		"consent.method": audit.Text(evidence.AppAsserted), "consent.level": audit.Int(1), "stamp": audit.Text("required"), "test": audit.Bool(false),
		"time.bound_us": audit.Int(1201), "time.provenance": audit.Text(testkit.Provenance), "token.serial": audit.Octets(token.Serial.Bytes()), "campus": audit.Text("本部"),
	}
	for name, v := range want {
		if !cmp.Equal(e.Field(name), v) {
			t.Errorf("%s is %v, want %v", name, e.Field(name), v)
		}
	}
	names := []string{}
	for _, p := range e.Payloads {
		names = append(names, p.Name)
	}
	if !slices.Equal(names, []string{"authorization", "certificate.0", "certificate.1", "crl.0", "signature", "token"}) {
		t.Errorf("payloads %q", names)
	}
}

// The entry holds a digest of its own: the caller's memory is another request's when the answer is out.
func TestDigestIsTheEntrys(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.Journal.Recent(nil, w.Journal.Size(), 0) // from here on entries stay in memory
	q := request("a", "SM2", "cms")
	q.Content, q.Digest = nil, &sign.Digest{Algorithm: "SM3", Value: testkit.Digest("SM2", testkit.Document)}
	r := w.Sign(w.app, q)
	clear(q.Digest.Value)
	recent := w.Journal.Recent(nil, r.Sequence, 1)
	if len(recent) != 1 {
		t.Fatal("the entry is not in memory")
	}
	if got, want := recent[0].Entry.Field("digest.value"), audit.Octets(testkit.Digest("SM2", testkit.Document)); !cmp.Equal(got, audit.Value(want)) {
		t.Errorf("it holds %v, want %v", got, want)
	}
}
