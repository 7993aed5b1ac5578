package evidence_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/sign"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

func contains(s, sub string) bool { return strings.Contains(s, sub) }

var document = evidence.Input{Document: testkit.Document}

// Every form, algorithm and way of consent verifies, with each check made that can be made, and says what a reader must
// know.
func TestVerify(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds {
		for _, consent := range []string{"asserted", "one-time", "activation"} {
			q := request(k.String()+consent, k)
			switch consent {
			case "one-time":
				g := w.Grant(w.app, account.GrantRequest{Signer: "D001", DigestAlgorithm: map[string]string{"SM2": "SM3", "RSA-2048": "SHA-256"}[k.algorithm], Digests: [][]byte{testkit.Digest(k.algorithm, testkit.Document)}})
				q.Consent = sign.Consent{AuthorizationID: g.ID}
			case "activation":
				g := w.Grant(w.app, account.GrantRequest{Signer: "D001", Count: 2, Seconds: 600})
				q.Consent = sign.Consent{AuthorizationID: g.ID}
			}
			b := w.bundle(t, q)
			r := evidence.Verify(b, w.Trust, document)
			wants(t, r, pki.Valid, pki.Passed, evidence.CheckDocument, evidence.CheckSigner, evidence.CheckConsentHash,
				evidence.CheckConsentBound, evidence.CheckConsentTime, evidence.CheckToken, evidence.CheckTokenImprint, evidence.CheckLeaf,
				evidence.CheckLeafMatch, evidence.CheckPayloads, evidence.CheckInclusion, evidence.CheckCheckpoint,
				"signer."+pki.CheckPathRevocation, "tsa."+pki.CheckPathRevocation, "tsa."+pki.CheckPathPurpose)
			if k.form == "cms" {
				wants(t, r, pki.Valid, pki.Passed, evidence.CheckContext, evidence.CheckSignedDigest, evidence.CheckTokenEmbedded, "signature."+cms.CheckSignature)
			} else {
				wants(t, r, pki.Valid, pki.Passed, evidence.CheckSignature)
			}
			// Only the SM2 CA's list is in an SM2 signature's bundle, and the checkpoint is stamped by the SM2 unit.
			stamped := map[string]pki.Status{"SM2": pki.Passed, "RSA-2048": pki.NotChecked}[k.algorithm]
			wants(t, r, pki.Valid, stamped, evidence.CheckCheckpointToken)
			// What cannot be checked is not said to have been.
			wants(t, r, pki.Valid, pki.NotChecked, evidence.CheckConsentProof, evidence.CheckCosigned)
			if consent == "asserted" {
				says(t, r, "not proved")
				says(t, r, q.Consent.Assertion)
			} else {
				says(t, r, "by PIN")
			}
			says(t, r, "evaluation only")
			says(t, r, testkit.Provenance)
			if !contains(r.Signer, "华佗") || r.GenTime != testkit.Start.Truncate(time.Millisecond).Format(time.RFC3339Nano) || r.Accuracy == "" {
				t.Errorf("%v: signer %q at %s ± %s", k, r.Signer, r.GenTime, r.Accuracy)
			}
			if b.Record.TimeBoundUS != 1201 { // 1.200001 ms: rounded up, or the bound would not hold
				t.Errorf("%v: bound %d µs", k, b.Record.TimeBoundUS)
			}
			for _, secret := range []string{testkit.PIN, string(testkit.Document)} {
				if bytes.Contains(encode(t, b), []byte(secret)) {
					t.Errorf("%v: the bundle holds %q", k, secret)
				}
			}
		}
	}
}

func TestVerifyWithoutDocument(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds {
		b := w.bundle(t, request(k.String(), k))
		wants(t, evidence.Verify(b, w.Trust, evidence.Input{}), pki.Indeterminate, pki.NotChecked, evidence.CheckDocument)

		changed := bytes.Replace(testkit.Document, []byte("急性"), []byte("慢性"), 1)
		r := evidence.Verify(b, w.Trust, evidence.Input{Document: changed})
		wants(t, r, pki.Invalid, pki.Failed, evidence.CheckDocument)
		wants(t, evidence.Verify(b, w.Trust, evidence.Input{Document: []byte{}}), pki.Invalid, pki.Failed, evidence.CheckDocument)

		// A digest serves a CMS; a raw signature needs the document. A digest of another kind proves nothing.
		digest := testkit.Digest(k.algorithm, testkit.Document)
		want := map[string]pki.Verdict{"raw": pki.Indeterminate, "cms": pki.Valid}[k.form]
		wants(t, evidence.Verify(b, w.Trust, evidence.Input{Digest: digest}), want, pki.Passed, evidence.CheckDocument)
		other := map[string]string{"SM2": "SHA-256", "RSA-2048": "SM3"}[k.algorithm]
		r = evidence.Verify(b, w.Trust, evidence.Input{Digest: testkit.Digest("?", changed), DigestAlgorithm: other})
		wants(t, r, pki.Indeterminate, pki.NotChecked, evidence.CheckDocument)
		wants(t, evidence.Verify(b, w.Trust, evidence.Input{Digest: testkit.Digest(k.algorithm, changed)}), pki.Invalid, pki.Failed, evidence.CheckDocument)
	}
}

func TestVerifyWithoutTrust(t *testing.T) {
	t.Parallel()
	w, stranger := newWard(t), testkit.New(t)
	b := w.bundle(t, request("a", kinds[0]))
	trust := w.Trust
	trust.LogKeys = nil
	wants(t, evidence.Verify(b, trust, document), pki.Indeterminate, pki.NotChecked, evidence.CheckCheckpoint)
	trust.LogKeys = stranger.Trust.LogKeys
	wants(t, evidence.Verify(b, trust, document), pki.Invalid, pki.Failed, evidence.CheckCheckpoint)
	trust.LogKeys = append(slices.Clone(stranger.Trust.LogKeys), w.Trust.LogKeys...) // after a change of keys
	wants(t, evidence.Verify(b, trust, document), pki.Valid, pki.Passed, evidence.CheckCheckpoint)
	for name, keys := range map[string][]crypto.PublicKey{"RSA": {&rsa.PublicKey{N: big.NewInt(1), E: 3}}, "nil": {nil}, "a signer's": {w.Trust.Anchors[0].PublicKey}} {
		trust.LogKeys = keys
		if r := evidence.Verify(b, trust, document); r.Verdict != pki.Invalid {
			t.Errorf("log key %s: %s", name, r.Verdict)
		}
	}
	trust = w.Trust
	trust.Anchors = nil
	wants(t, evidence.Verify(b, trust, document), pki.Indeterminate, pki.NotChecked, "signer."+pki.CheckPathChain, "tsa."+pki.CheckPathChain)
	trust.Anchors = stranger.Trust.Anchors // of the same names
	if r := evidence.Verify(b, trust, document); r.Verdict == pki.Valid {
		t.Errorf("under a stranger's anchors: %s", r.Verdict)
	}
}

// Parts that are taken out make the evidence incomplete, not false; parts that are exchanged make it false.
func TestMissingAndForeignParts(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds {
		b := w.bundle(t, request(k.String(), k))
		q := request(k.String()+"2", k)
		q.Content = []byte("another document") // an RSA signature over the same one would be the same
		other := w.bundle(t, q)
		foreign := func() []byte { // a valid certificate of the same CA, for the same purpose
			for _, key := range w.other.Keys {
				if key.Algorithm == k.algorithm {
					return key.Certificate
				}
			}
			return nil
		}()
		for name, tt := range map[string]struct {
			change func(*evidence.Bundle)
			want   pki.Verdict
			status pki.Status
			checks []string
		}{
			"no CRL": {func(b *evidence.Bundle) { b.CRLs = [][]byte{} }, pki.Indeterminate, pki.NotChecked,
				[]string{evidence.CheckPayloads, "signer." + pki.CheckPathRevocation, "tsa." + pki.CheckPathRevocation}},
			"no CA certificate": {func(b *evidence.Bundle) { b.Certificates = b.Certificates[:1] }, pki.Indeterminate, pki.NotChecked, []string{evidence.CheckPayloads}},
			"no signer's certificate": {func(b *evidence.Bundle) { b.Certificates = b.Certificates[1:] }, pki.Indeterminate, pki.NotChecked,
				[]string{evidence.CheckPayloads}},
			"no authorisation":    {func(b *evidence.Bundle) { b.Authorization = nil }, pki.Indeterminate, pki.NotChecked, []string{evidence.CheckPayloads, evidence.CheckConsentHash}},
			"another certificate": {func(b *evidence.Bundle) { b.Certificates[0] = foreign }, pki.Invalid, pki.Failed, []string{evidence.CheckPayloads}},
			"another token":       {func(b *evidence.Bundle) { b.Token = other.Token }, pki.Invalid, pki.Failed, []string{evidence.CheckPayloads, evidence.CheckTokenImprint}},
			"checkpoint's token": {func(b *evidence.Bundle) { b.Token = b.Journal.CheckpointToken }, pki.Invalid, pki.Failed,
				[]string{evidence.CheckPayloads, evidence.CheckTokenImprint}},
			"another checkpoint's token": {func(b *evidence.Bundle) { b.Journal.CheckpointToken = other.Journal.CheckpointToken }, pki.Invalid, pki.Failed,
				[]string{evidence.CheckCheckpointToken}},
			"another signature": {func(b *evidence.Bundle) { b.Signature.Value = other.Signature.Value }, pki.Invalid, pki.Failed,
				[]string{evidence.CheckPayloads, evidence.CheckTokenImprint}},
			"another authorisation": {func(b *evidence.Bundle) { b.Authorization = other.Authorization }, pki.Invalid, pki.Failed,
				[]string{evidence.CheckPayloads, evidence.CheckConsentHash}},
			"another place in the log": {func(b *evidence.Bundle) { b.Journal = other.Journal }, pki.Invalid, pki.Failed, []string{evidence.CheckLeafMatch, evidence.CheckPayloads}},
			"no token":                 {func(b *evidence.Bundle) { b.Token = nil }, pki.Indeterminate, pki.NotChecked, []string{evidence.CheckPayloads, evidence.CheckToken}},
			"no checkpoint's token":    {func(b *evidence.Bundle) { b.Journal.CheckpointToken = nil }, pki.Valid, pki.NotChecked, []string{evidence.CheckCheckpointToken}},
			"certificates reversed":    {func(b *evidence.Bundle) { slices.Reverse(b.Certificates) }, pki.Valid, pki.Passed, []string{evidence.CheckSigner}},
			"a certificate more":       {func(b *evidence.Bundle) { b.Certificates = append(b.Certificates, foreign) }, pki.Valid, pki.Passed, []string{evidence.CheckPayloads}},
			"too many certificates": {func(b *evidence.Bundle) { b.Certificates = slices.Repeat(b.Certificates, 40) }, pki.Invalid, pki.Failed,
				[]string{evidence.CheckPayloads}},
			"an older checkpoint's proof": {func(b *evidence.Bundle) { b.Journal.Inclusion = other.Journal.Inclusion }, pki.Invalid, pki.Failed, []string{evidence.CheckInclusion}},
		} {
			t.Run(k.String()+"/"+name, func(t *testing.T) {
				r := evidence.Verify(with(t, b, tt.change), w.Trust, document)
				wants(t, r, tt.want, tt.status, tt.checks...)
			})
		}
	}
}

// A leaf of the log that is no signature's is not one, whatever stands beside it.
func TestLeafIsNotASignature(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	b := w.bundle(t, request("a", kinds[0]))
	rec, err := w.Journal.Entry(t.Context(), 3)
	if err != nil || rec.Entry.Kind == evidence.KindSign {
		t.Fatal(rec.Entry.Kind, err)
	}
	path, err := w.Journal.InclusionProof(t.Context(), 3, b.Journal.TreeSize)
	if err != nil {
		t.Fatal(err)
	}
	bad := with(t, b, func(b *evidence.Bundle) {
		b.Journal.Leaf, b.Journal.Sequence, b.Journal.Inclusion = rec.EntryDER, 3, [][]byte{}
		for _, h := range path {
			b.Journal.Inclusion = append(b.Journal.Inclusion, h[:])
		}
	})
	r := evidence.Verify(bad, w.Trust, document)
	wants(t, r, pki.Invalid, pki.Failed, evidence.CheckLeaf)
	if at(r, evidence.CheckInclusion) != pki.Passed {
		t.Error("the entry is in the log, and the proof was not taken")
	}
	if _, err := evidence.Build(t.Context(), w.Journal, rec); err == nil {
		t.Error("a bundle was built of it")
	}
}

func TestStampPolicyNone(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	w.app = w.App("lab", func(a *account.Application) { a.Stamp, a.Test = account.StampNone, true })
	for _, k := range kinds {
		var draft audit.Draft
		w.Journal.Fault(func(d audit.Draft) (bool, error) {
			if d.Kind == evidence.KindSign {
				draft = d
			}
			return false, nil
		})
		b := w.bundle(t, request(k.String(), k))
		r := evidence.Verify(b, w.Trust, document)
		wants(t, r, pki.Valid, pki.NotChecked, evidence.CheckToken)
		says(t, r, "the appliance's own word")
		says(t, r, "test record")
		if r.GenTime != "" || len(b.Token) != 0 {
			t.Errorf("a time without a token: %q", r.GenTime)
		}
		// The same record, had it been written while time was not trusted: its own time is worth nothing.
		w.Clock.State(ntp.Suspect)
		copied := draft
		copied.Unique = false
		rec, err := w.Journal.Append(t.Context(), copied)
		w.Clock.State(ntp.Trusted)
		if err != nil {
			t.Fatal(err)
		}
		b, err = evidence.Build(t.Context(), w.Journal, rec)
		if err != nil {
			t.Fatal(err)
		}
		wants(t, evidence.Verify(b, w.Trust, document), pki.Indeterminate, pki.NotChecked, "signer."+pki.CheckPathValidity)
		// A policy that nobody knows is no reason to do without a token.
		odd := with(t, b, func(b *evidence.Bundle) { b.Record.StampPolicy = "None" })
		if r := evidence.Verify(odd, w.Trust, document); r.Verdict != pki.Invalid {
			t.Errorf("stamp policy None: %s", r.Verdict)
		}
	}
}

// What is learned later: a signer's certificate revoked after the signature changes nothing, a timestamp unit's key in
// other hands changes all, and a list that is newer than the signature does not stand in the way.
func TestLaterRevocation(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	bundles := map[kind]*evidence.Bundle{}
	for _, k := range kinds {
		bundles[k] = w.bundle(t, request(k.String(), k))
	}
	w.Clock.Advance(time.Hour)
	now := w.Clock.Now().Time
	for _, alg := range []string{"SM2", "RSA-2048"} {
		if _, err := w.Directory.Revoke(t.Context(), "admin", w.Serial(w.doctor, alg), "superseded"); err != nil {
			t.Fatal(err)
		}
	}
	for k, b := range bundles {
		in := evidence.Input{Document: testkit.Document, CRLs: []*pki.CRL{w.Directory.CRL(k.algorithm).Parsed}, At: now}
		wants(t, evidence.Verify(b, w.Trust, in), pki.Valid, pki.Passed, "signer."+pki.CheckPathRevocation)
		unit := w.Stampers[k.algorithm].Chain()[0]
		for reason, want := range map[pki.Reason]pki.Verdict{pki.KeyCompromise: pki.Invalid, pki.Superseded: pki.Valid} {
			in.CRLs = []*pki.CRL{w.list(t, k.algorithm, now, ca.Revoked{Serial: unit.SerialNumber, At: now, Reason: reason})}
			if r := evidence.Verify(b, w.Trust, in); r.Verdict != want {
				t.Errorf("%v: unit revoked for %v: %s, want %s: %s", k, reason, r.Verdict, want, problems(r))
			}
		}
	}
}

// list is a CRL of the house's CA, for a day.
func (w *ward) list(t testing.TB, algorithm string, at time.Time, revoked ...ca.Revoked) *pki.CRL {
	t.Helper()
	l, err := pki.ParseCRL(w.listDER(t, algorithm, at, revoked...))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (w *ward) listDER(t testing.TB, algorithm string, at time.Time, revoked ...ca.Revoked) []byte {
	t.Helper()
	der, err := w.CAs[algorithm].CRL(t.Context(), big.NewInt(99), at, at.Add(24*time.Hour), revoked)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// signed is a signature made by a key in the test's hand, with a certificate as the test wants it.
type signed struct {
	value, token []byte
	certificate  []byte
	message      *cms.Signed
}

func (w *ward) signAs(t *testing.T, k kind, life time.Duration, genTime time.Time) signed {
	t.Helper()
	token := testkit.NewToken()
	info, err := token.GenerateKey(t.Context(), hsm.KeySpec{Label: "staff/x", Algorithm: hsm.Algorithm(k.algorithm)})
	if err != nil {
		t.Fatal(err)
	}
	key, err := hsm.KeyOf(token, info, true)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := w.CAs[k.algorithm].Issue(t.Context(), ca.Request{Profile: ca.Staff, Subject: pkix.Name{CommonName: "某医生"}, StaffNumber: "X001",
		PublicKey: key.Public(), NotBefore: testkit.Start, NotAfter: testkit.Start.Add(life)})
	if err != nil {
		t.Fatal(err)
	}
	s := signed{certificate: cert.Raw}
	value := []byte(nil)
	if k.form == "cms" {
		if s.message, err = cms.Sign(t.Context(), key, cms.Params{Content: testkit.Document, Detached: true, Certificates: [][]byte{cert.Raw}}); err != nil {
			t.Fatal(err)
		}
		value = s.message.SignatureValue
	} else if value, err = key.SignMessage(t.Context(), testkit.Document); err != nil {
		t.Fatal(err)
	}
	was := w.Clock.Now()
	w.Clock.Change(func(r *ntp.Reading) { r.Time = genTime })
	defer w.Clock.Change(func(r *ntp.Reading) { *r = was })
	tok, err := w.Stampers[k.algorithm].Issue(t.Context(), &tsa.Request{Imprint: tsa.ImprintOf(value), CertReq: true})
	if err != nil {
		t.Fatal(err)
	}
	s.value, s.token = value, tok.DER
	if s.message != nil {
		if err := s.message.AddUnsignedAttribute(cms.Attribute{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{tok.DER}}); err != nil {
			t.Fatal(err)
		}
		s.value = s.message.Bytes()
	}
	return s
}

func (w *ward) verify(k kind, s signed, in evidence.Input) *evidence.Report {
	if k.form == "cms" {
		return evidence.VerifyCMS(s.value, w.Trust, in)
	}
	return evidence.VerifyRaw(k.algorithm, s.value, s.certificate, nil, s.token, w.Trust, in)
}

// The token's time decides, not the verifier's.
func TestGenTimeDecides(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds {
		life := 48 * time.Hour
		expired := w.signAs(t, k, life, testkit.Start.Add(life+time.Second))
		early := w.signAs(t, k, life, testkit.Start.Add(-10*time.Second))
		good := w.signAs(t, k, life, testkit.Start.Add(time.Hour))
		list := w.Directory.CRL(k.algorithm).Parsed
		in := evidence.Input{Document: testkit.Document, CRLs: []*pki.CRL{list}, At: testkit.Start.Add(time.Hour)}
		wants(t, w.verify(k, good, in), pki.Valid, pki.Passed, "signer."+pki.CheckPathValidity)
		wants(t, w.verify(k, expired, in), pki.Invalid, pki.Failed, "signer."+pki.CheckPathValidity)
		wants(t, w.verify(k, early, in), pki.Invalid, pki.Failed, "signer."+pki.CheckPathValidity)

		cert, err := smx509.ParseCertificate(good.certificate)
		if err != nil {
			t.Fatal(err)
		}
		for when, tt := range map[time.Duration]struct {
			verdict pki.Verdict
			status  pki.Status
		}{30 * time.Minute: {pki.Invalid, pki.Failed}, 90 * time.Minute: {pki.Valid, pki.Passed}} {
			// The list is made two hours after; the verifier looks three hours after.
			later := w.list(t, k.algorithm, testkit.Start.Add(2*time.Hour), ca.Revoked{Serial: cert.SerialNumber, At: testkit.Start.Add(when), Reason: pki.AffiliationChanged})
			in := evidence.Input{Document: testkit.Document, CRLs: []*pki.CRL{later}, At: testkit.Start.Add(3 * time.Hour)}
			wants(t, w.verify(k, good, in), tt.verdict, tt.status, "signer."+pki.CheckPathRevocation)
			in.At = time.Time{}
			if tt.verdict == pki.Valid { // nobody says that the list is current
				wants(t, w.verify(k, good, in), pki.Indeterminate, pki.NotChecked, "signer."+pki.CheckPathRevocation)
			}
			// Long after the list has ended it clears nobody.
			in.At = testkit.Start.AddDate(0, 0, 30)
			if r := w.verify(k, good, in); r.Verdict == pki.Valid {
				t.Errorf("%v: valid by a list that ended", k)
			}
		}
	}
}

// A CMS by itself: detached needs its document, attached does not.
func TestVerifyCMSAlone(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds[2:] {
		in := evidence.Input{CRLs: []*pki.CRL{w.Directory.CRL(k.algorithm).Parsed}, At: testkit.Start}
		q := request("detached"+k.algorithm, k)
		detached := w.Sign(w.app, q).Signature
		q = request("attached"+k.algorithm, k)
		q.Detached = false
		attached := w.Sign(w.app, q).Signature
		withDoc, wrong, digest, foreign := in, in, in, in
		withDoc.Document = testkit.Document
		wrong.Document = []byte("another")
		digest.Digest = testkit.Digest(k.algorithm, testkit.Document)
		foreign.Digest, foreign.DigestAlgorithm = testkit.Digest("?", testkit.Document), map[string]string{"SM2": "SHA-256", "RSA-2048": "SM3"}[k.algorithm]

		wants(t, evidence.VerifyCMS(detached, w.Trust, in), pki.Indeterminate, pki.NotChecked, "signature."+cms.CheckContent)
		wants(t, evidence.VerifyCMS(detached, w.Trust, withDoc), pki.Valid, pki.Passed, "signature."+cms.CheckMessageDigest, "signature."+cms.CheckSignature)
		wants(t, evidence.VerifyCMS(detached, w.Trust, digest), pki.Valid, pki.Passed, "signature."+cms.CheckMessageDigest)
		wants(t, evidence.VerifyCMS(detached, w.Trust, wrong), pki.Invalid, pki.Failed, "signature."+cms.CheckMessageDigest)
		wants(t, evidence.VerifyCMS(detached, w.Trust, foreign), pki.Indeterminate, pki.NotChecked, "signature."+cms.CheckContent)
		wants(t, evidence.VerifyCMS(attached, w.Trust, in), pki.Valid, pki.Passed, "signature."+cms.CheckMessageDigest, evidence.CheckTokenImprint)
		wants(t, evidence.VerifyCMS(attached, w.Trust, withDoc), pki.Valid, pki.Passed, "signature."+cms.CheckContent)
		wants(t, evidence.VerifyCMS(attached, w.Trust, wrong), pki.Invalid, pki.Failed, "signature."+cms.CheckContent)

		none := withDoc
		none.CRLs = nil
		wants(t, evidence.VerifyCMS(detached, w.Trust, none), pki.Indeterminate, pki.NotChecked, "signer."+pki.CheckPathRevocation)
		if r := evidence.VerifyCMS(detached, w.Trust, withDoc); at(r, evidence.CheckLeaf) != pki.NotChecked {
			t.Error("a CMS alone claims a journal")
		}
	}
	wants(t, evidence.VerifyCMS([]byte("rubbish"), w.Trust, document), pki.Invalid, pki.Failed, "signature.cms.parse")
	// Data of a type that is not SignedData is not a false signature; it is none that we can judge.
	envelope := []byte{0x30, 0x0f, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x03, 0xa0, 0x02, 0x30, 0x00}
	wants(t, evidence.VerifyCMS(envelope, w.Trust, document), pki.Indeterminate, pki.NotChecked, "signature.cms.parse")
}

func TestVerifyTokenAlone(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, alg := range []string{"SM2", "RSA-2048"} {
		imprint := tsa.ImprintOf(testkit.Document)
		name := "SM3"
		if alg != "SM2" {
			var err error
			if imprint, err = tsa.NewImprint(cms.OIDSHA256, testkit.Digest(alg, testkit.Document)); err != nil {
				t.Fatal(err)
			}
			name = "SHA-256"
		}
		tok, err := w.Stampers[alg].Issue(t.Context(), &tsa.Request{Imprint: imprint, CertReq: true})
		if err != nil {
			t.Fatal(err)
		}
		bare, err := w.Stampers[alg].Issue(t.Context(), &tsa.Request{Imprint: imprint})
		if err != nil {
			t.Fatal(err)
		}
		in := evidence.Input{CRLs: []*pki.CRL{w.Directory.CRL(alg).Parsed}}
		for what, tt := range map[string]struct {
			give    func(*evidence.Input)
			verdict pki.Verdict
			status  pki.Status
		}{
			"document":       {func(in *evidence.Input) { in.Document = testkit.Document }, pki.Valid, pki.Passed},
			"digest":         {func(in *evidence.Input) { in.Digest, in.DigestAlgorithm = imprint.Digest, name }, pki.Valid, pki.Passed},
			"digest, no alg": {func(in *evidence.Input) { in.Digest = imprint.Digest }, pki.Valid, pki.Passed},
			"nothing":        {func(*evidence.Input) {}, pki.Indeterminate, pki.NotChecked},
			"wrong document": {func(in *evidence.Input) { in.Document = []byte("x") }, pki.Invalid, pki.Failed},
			"wrong digest":   {func(in *evidence.Input) { in.Digest = make([]byte, 32) }, pki.Invalid, pki.Failed},
			"other digest":   {func(in *evidence.Input) { in.Digest, in.DigestAlgorithm = make([]byte, 32), "SHA-1" }, pki.Indeterminate, pki.NotChecked},
			"no list":        {func(in *evidence.Input) { in.Document, in.CRLs = testkit.Document, nil }, pki.Indeterminate, pki.Passed},
		} {
			in := in
			tt.give(&in)
			r := evidence.VerifyToken(tok.DER, w.Trust, in)
			if r.Verdict != tt.verdict || at(r, evidence.CheckTokenImprint) != tt.status {
				t.Errorf("%s, %s: %s, imprint %s; want %s, %s: %s", alg, what, r.Verdict, at(r, evidence.CheckTokenImprint), tt.verdict, tt.status, problems(r))
			}
		}
		in.Document = testkit.Document
		r := evidence.VerifyToken(bare.DER, w.Trust, in) // the unit's certificate is not at hand
		wants(t, r, pki.Indeterminate, pki.NotChecked, "token."+cms.CheckSignerCertificate)
		if r.GenTime != "" {
			t.Errorf("a time that nobody could verify: %s", r.GenTime)
		}
	}
	wants(t, evidence.VerifyToken([]byte{0x30, 0}, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckToken)
}

func TestVerifyRawAlone(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	k := kinds[0]
	s := w.signAs(t, k, 48*time.Hour, testkit.Start.Add(time.Hour))
	rsaSigned := w.signAs(t, kinds[1], 48*time.Hour, testkit.Start.Add(time.Hour))
	in := evidence.Input{Document: testkit.Document, CRLs: []*pki.CRL{w.Directory.CRL("SM2").Parsed, w.Directory.CRL("RSA-2048").Parsed}, At: testkit.Start.Add(time.Hour)}
	raw := func(alg string, s signed, token []byte, in evidence.Input) *evidence.Report {
		return evidence.VerifyRaw(alg, s.value, s.certificate, nil, token, w.Trust, in)
	}
	wants(t, raw("SM2", s, s.token, in), pki.Valid, pki.Passed, evidence.CheckSignature)
	wants(t, raw("SM2", s, nil, in), pki.Valid, pki.Passed, evidence.CheckSignature) // judged at the verifier's time
	says(t, raw("SM2", s, nil, in), "nothing vouches for the time")
	wants(t, raw("SM2", s, rsaSigned.token, in), pki.Invalid, pki.Failed, evidence.CheckTokenImprint)
	wants(t, raw("RSA-2048", s, s.token, in), pki.Invalid, pki.Failed, evidence.CheckSignature)
	wants(t, raw("SM2", rsaSigned, rsaSigned.token, in), pki.Invalid, pki.Failed, evidence.CheckSignature)
	nothing := in
	nothing.Document = nil
	wants(t, raw("SM2", s, s.token, nothing), pki.Indeterminate, pki.NotChecked, evidence.CheckSignature)
	noTime := in
	noTime.At = time.Time{}
	wants(t, raw("SM2", s, nil, noTime), pki.Indeterminate, pki.NotChecked, "signer."+pki.CheckPathValidity)

	// With another certificate the signature is another's, and a chain does not stand in for a certificate that is broken.
	other := s
	other.certificate = w.other.Keys[0].Certificate
	wants(t, raw("SM2", other, s.token, in), pki.Invalid, pki.Failed, evidence.CheckSignature)
	r := evidence.VerifyRaw("SM2", s.value, []byte("rubbish"), [][]byte{s.certificate}, s.token, w.Trust, in)
	wants(t, r, pki.Invalid, pki.Failed, "evidence.certificates")
	if at(r, evidence.CheckSignature) != pki.NotChecked {
		t.Error("the signature was checked with a certificate of the chain")
	}
	// Content that is a set of attributes proves nothing, even rightly signed.
	attributes := []byte{0x31, 0x0d, 0x30, 0x0b, 0x06, 0x03, 0x2a, 0x03, 0x04, 0x31, 0x04, 0x0c, 0x02, 'a', 'b'}
	if !cms.LooksLikeAttributes(attributes) {
		t.Fatal("not a set of attributes")
	}
	in.Document = attributes
	wants(t, raw("SM2", s, nil, in), pki.Invalid, pki.Failed, evidence.CheckSignature)
	// A key that is none of ours is not a wrong signature.
	in.Document = testkit.Document
	r = evidence.VerifyRaw("SM2", s.value, p256Certificate(t), nil, nil, w.Trust, in)
	if at(r, evidence.CheckSignature) != pki.NotChecked || r.Verdict == pki.Valid {
		t.Errorf("P-256: %s, %s", r.Verdict, problems(r))
	}
}

// p256Certificate is self-signed, on a curve that is not SM2's.
func p256Certificate(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &smx509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "P-256"}, NotBefore: testkit.Start, NotAfter: testkit.Start.AddDate(1, 0, 0)}
	der, err := smx509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}
