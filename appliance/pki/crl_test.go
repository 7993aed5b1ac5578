package pki_test

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
)

func entry(serial *big.Int, when time.Time, reason pki.Reason, extra ...pkix.Extension) smx509.RevocationListEntry {
	return smx509.RevocationListEntry{SerialNumber: serial, RevocationTime: when, ReasonCode: int(reason), ExtraExtensions: extra}
}

func invalidSince(t time.Time) pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 24}, Value: must(asn1.MarshalWithParams(t, "generalized"))}
}

// idp is an issuingDistributionPoint with the given DER after the SEQUENCE header.
func idp(critical bool, content ...byte) func(*smx509.RevocationList) {
	return func(l *smx509.RevocationList) {
		l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: critical,
			Value: append([]byte{0x30, byte(len(content))}, content...)})
	}
}

// idpURI has a distribution point with one URI.
func idpURI(uri string) []byte {
	n := byte(len(uri))
	return append([]byte{0xa0, n + 4, 0xa0, n + 2, 0x86, n}, uri...)
}

func TestCheckRevocation(t *testing.T) {
	t.Parallel()
	ca := issue(t, caTemplate("CA"), nil, sm2Key(t))
	namesake := issue(t, caTemplate("CA"), nil, sm2Key(t)) // same name, other key
	stranger := issue(t, caTemplate("stranger"), nil, sm2Key(t))
	nameless := caTemplate("CA")
	nameless.KeyUsage = smx509.KeyUsageCertSign
	noCRLSign := issue(t, nameless, nil, ca.key) // CA's own key, certified without cRLSign
	const url = "http://crl.test/a.crl"
	lt := staffTemplate("leaf")
	lt.CRLDistributionPoints = []string{url}
	leaf := issue(t, lt, ca, sm2Key(t))
	tt2 := staffTemplate("tsa")
	tsa(tt2)
	stamper := issue(t, tt2, ca, sm2Key(t))
	me, tsaSerial := leaf.cert.SerialNumber, stamper.cert.SerialNumber
	other := big.NewInt(0x1234567890)
	list := func(change func(*smx509.RevocationList), e ...smx509.RevocationListEntry) *pki.CRL {
		return crlOf(t, ca, change, e...)
	}
	window := func(from, to time.Time) func(*smx509.RevocationList) {
		return func(l *smx509.RevocationList) { l.ThisUpdate, l.NextUpdate = from, to }
	}
	ext := func(id int, critical bool, value ...byte) func(*smx509.RevocationList) {
		return func(l *smx509.RevocationList) {
			l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, id}, Critical: critical, Value: value})
		}
	}
	expired := window(at.Add(-2*day), at.Add(-day))
	future := window(at.Add(time.Hour), at.Add(day))
	pass, fail, none := pki.Passed, pki.Failed, pki.NotChecked
	type Q = pki.RevocationQuestion
	for _, tt := range []struct {
		name   string
		crls   []*pki.CRL
		change func(*Q)
		want   pki.Status
		words  string
	}{
		{"none", nil, nil, none, "no CRL"},
		{"empty list", []*pki.CRL{list(nil)}, nil, pass, "not revoked"},
		{"nil list", []*pki.CRL{nil, list(nil)}, nil, pass, "not revoked"},
		{"somebody else", []*pki.CRL{list(nil, entry(other, at.Add(-day), 1))}, nil, pass, "not revoked"},
		{"of another issuer", []*pki.CRL{crlOf(t, stranger, nil)}, nil, none, "no CRL"},
		{"of a namesake", []*pki.CRL{crlOf(t, namesake, nil)}, nil, none, "列表签名未通过"},
		{"namesake revokes", []*pki.CRL{crlOf(t, namesake, nil, entry(me, at.Add(-day), 1)), list(nil)}, nil, pass, "not revoked"},
		{"issuer may not sign lists", []*pki.CRL{list(nil)}, func(q *Q) { q.Issuer = noCRLSign.cert }, none, "cRLSign"},
		{"revoked before", []*pki.CRL{list(nil, entry(me, at.Add(-time.Hour), pki.KeyCompromise))}, nil, fail, "密钥泄露"},
		{"revoked that second", []*pki.CRL{list(nil, entry(me, at, 0))}, nil, fail, "未给出原因"},
		{"revoked after", []*pki.CRL{list(nil, entry(me, at.Add(time.Second), pki.CessationOfOperation))}, nil, pass, "signature stands"},
		{"revoked after, invalid before", []*pki.CRL{list(nil, entry(me, at.Add(time.Hour), pki.KeyCompromise, invalidSince(at.Add(-day))))}, nil, none, "invalidityDate"},
		{"revoked after, invalid after", []*pki.CRL{list(nil, entry(me, at.Add(time.Hour), pki.KeyCompromise, invalidSince(at.Add(time.Minute))))}, nil, pass, "signature stands"},
		{"on hold", []*pki.CRL{list(nil, entry(me, at.Add(-day), pki.CertificateHold))}, nil, fail, "暂停"},
		{"removeFromCRL in a full list", []*pki.CRL{list(nil, entry(me, at.Add(-day), pki.RemoveFromCRL))}, nil, none, "removeFromCRL"},
		{"removed, then revoked", []*pki.CRL{list(nil, entry(me, at.Add(-2*day), pki.RemoveFromCRL), entry(me, at.Add(-day), 4))}, nil, fail, "superseded"},
		{"unknown reason still revokes", []*pki.CRL{list(nil, entry(me, at.Add(-day), 77))}, nil, fail, "77"},
		{"list expired", []*pki.CRL{list(expired)}, nil, none, "list expired"},
		{"expired list shows revocation", []*pki.CRL{list(expired, entry(me, at.Add(-3*day), 1))}, nil, fail, "revoked"},
		{"expired list shows hold", []*pki.CRL{list(expired, entry(me, at.Add(-3*day), pki.CertificateHold))}, nil, none, "on hold"},
		{"hold lifted by a newer list", []*pki.CRL{list(expired, entry(me, at.Add(-3*day), pki.CertificateHold)), list(nil)}, nil, pass, "not revoked"},
		{"list from the future", []*pki.CRL{list(future)}, nil, none, "future"},
		{"future list shows revocation", []*pki.CRL{list(future, entry(me, at.Add(-day), 1)), list(nil)}, nil, fail, "revoked"},
		{"future list shows hold", []*pki.CRL{list(future, entry(me, at.Add(-day), pki.CertificateHold)), list(nil)}, nil, none, "on hold"},
		{"future list judged then", []*pki.CRL{list(future)}, func(q *Q) { q.ListedAt = at.Add(2 * time.Hour) }, pass, "not revoked"},
		{"judged before the act", []*pki.CRL{list(nil)}, func(q *Q) { q.ListedAt = at.Add(-time.Second) }, none, "before"},
		{"certificate expired before the list", []*pki.CRL{list(window(at.Add(200*day), at.Add(300*day)))}, func(q *Q) { q.ListedAt = at.Add(250 * day) }, none, "expired before"},
		{"expired ones stay listed", []*pki.CRL{list(func(l *smx509.RevocationList) {
			window(at.Add(200*day), at.Add(300*day))(l)
			ext(60, false, must(asn1.MarshalWithParams(at, "generalized"))...)(l)
		})}, func(q *Q) { q.ListedAt = at.Add(250 * day) }, pass, "not revoked"},
		{"one expired, one good", []*pki.CRL{list(expired), list(nil)}, nil, pass, "not revoked"},
		{"delta", []*pki.CRL{list(ext(27, true, 2, 1, 1))}, nil, none, "delta"},
		{"delta, not marked critical", []*pki.CRL{list(ext(27, false, 2, 1, 1))}, nil, none, "delta"},
		{"unknown critical", []*pki.CRL{list(ext(99, true, 5, 0))}, nil, none, "unknown critical"},
		{"unknown, not critical", []*pki.CRL{list(ext(99, false, 5, 0))}, nil, pass, "not revoked"},
		{"unknown critical in any entry", []*pki.CRL{list(nil, entry(other, at.Add(-day), 1, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 29}, Critical: true, Value: []byte{0x30, 0}}))}, nil, none, "entry"},
		{"our distribution point", []*pki.CRL{list(idp(true, idpURI(url)...))}, nil, pass, "not revoked"},
		{"other distribution point", []*pki.CRL{list(idp(true, idpURI("http://crl.test/b.crl")...))}, nil, none, "distribution point"},
		{"relative distribution point", []*pki.CRL{list(idp(true, 0xa0, 2, 0xa1, 0))}, nil, none, "not understood"},
		{"user certificates only", []*pki.CRL{list(idp(true, 0x81, 1, 0xff))}, nil, pass, "not revoked"},
		{"CA certificates only", []*pki.CRL{list(idp(true, 0x82, 1, 0xff))}, nil, none, "another kind"},
		{"other distribution point revokes", []*pki.CRL{list(idp(true, idpURI("http://crl.test/b.crl")...), entry(me, at.Add(-day), 1)), list(nil)}, nil, fail, "revoked"},
		{"delta revokes", []*pki.CRL{list(ext(27, true, 2, 1, 1), entry(me, at.Add(-day), 1)), list(nil)}, nil, fail, "revoked"},
		{"delta silent", []*pki.CRL{list(ext(27, true, 2, 1, 1)), list(nil)}, nil, pass, "not revoked"},
		{"indirect lists our serial", []*pki.CRL{list(idp(true, 0x84, 1, 0xff), entry(me, at.Add(-day), 1)), list(nil)}, nil, pass, "not revoked"},
		{"some reasons", []*pki.CRL{list(idp(true, 0x83, 2, 1, 2))}, nil, none, "onlySomeReasons"},
		{"indirect", []*pki.CRL{list(idp(true, 0x84, 1, 0xff))}, nil, none, "indirect"},
		{"attribute certificates", []*pki.CRL{list(idp(true, 0x85, 1, 0xff))}, nil, none, "attribute"},
		{"distribution point of the future", []*pki.CRL{list(idp(true, 0x86, 1, 0xff))}, nil, none, "malformed"},
		{"not critical, same rules", []*pki.CRL{list(idp(false, 0x84, 1, 0xff))}, nil, none, "indirect"},
		{"empty distribution point", []*pki.CRL{list(idp(true))}, nil, pass, "not revoked"},

		{"TSA good", []*pki.CRL{list(nil)}, asTSA(stamper), pass, "not revoked"},
		{"TSA retired later", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), pki.CessationOfOperation))}, asTSA(stamper), pass, "stands"},
		{"TSA revoked later, key compromised", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), pki.KeyCompromise))}, asTSA(stamper), fail, "RFC 3161"},
		{"TSA revoked later, no reason", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), 0))}, asTSA(stamper), fail, "RFC 3161"},
		{"TSA on hold later", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), pki.CertificateHold))}, asTSA(stamper), none, "on hold"},
		{"TSA compromised after the archive timestamp", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), pki.KeyCompromise))}, stood(stamper, time.Minute), pass, "later than the archive timestamp"},
		{"TSA compromised before the archive timestamp", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), pki.KeyCompromise))}, stood(stamper, 2*time.Hour), fail, "RFC 3161"},
		{"TSA compromised at the archive timestamp", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), pki.KeyCompromise))}, stood(stamper, time.Hour), fail, "RFC 3161"},
		{"TSA compromised later, bad since before it", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(time.Hour), pki.KeyCompromise, invalidSince(at.Add(time.Second))))}, stood(stamper, time.Minute), fail, "RFC 3161"},
		{"TSA revoked before, archive timestamp or not", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(-time.Hour), pki.KeyCompromise))}, stood(stamper, time.Minute), fail, "revoked"},
		{"signer compromised later, nothing stood", []*pki.CRL{list(nil, entry(me, at.Add(time.Hour), pki.KeyCompromise, invalidSince(at.Add(-day))))}, func(q *Q) { q.StoodAt = at.Add(time.Minute) }, none, "invalidityDate"},
		{"TSA revoked before", []*pki.CRL{list(nil, entry(tsaSerial, at.Add(-time.Hour), pki.Superseded))}, asTSA(stamper), fail, "superseded"},
	} {
		q := Q{Certificate: leaf.cert, Issuer: ca.cert, CRLs: tt.crls, At: at, Purpose: pki.StaffSigning}
		if tt.change != nil {
			tt.change(&q)
		}
		// Twice: the second answer has the list's signature from memory.
		for range 2 {
			if got := pki.CheckRevocation(q); got.Status != tt.want || !strings.Contains(got.Detail, tt.words) || got.ID != pki.CheckPathRevocation {
				t.Errorf("%s: %+v, want %s with %q", tt.name, got, tt.want, tt.words)
			}
		}
	}
}

func asTSA(n *node) func(*pki.RevocationQuestion) {
	return func(q *pki.RevocationQuestion) { q.Certificate, q.Purpose = n.cert, pki.TimeStamping }
}

// stood is a TSA's certificate whose token is known to have existed some time after at.
func stood(n *node, later time.Duration) func(*pki.RevocationQuestion) {
	return func(q *pki.RevocationQuestion) { asTSA(n)(q); q.StoodAt = at.Add(later) }
}

// A list verified once by its issuer must not be taken on behalf of a namesake afterwards.
func TestCheckRevocationForgetsNoKey(t *testing.T) {
	t.Parallel()
	ca, namesake := issue(t, caTemplate("CA"), nil, sm2Key(t)), issue(t, caTemplate("CA"), nil, sm2Key(t))
	leaf := issue(t, staffTemplate("leaf"), ca, sm2Key(t))
	q := pki.RevocationQuestion{Certificate: leaf.cert, Issuer: ca.cert, CRLs: []*pki.CRL{crlOf(t, ca, nil)}, At: at}
	for _, tt := range []struct {
		issuer *node
		want   pki.Status
	}{{ca, pki.Passed}, {namesake, pki.NotChecked}, {ca, pki.Passed}} {
		q.Issuer = tt.issuer.cert
		if got := pki.CheckRevocation(q); got.Status != tt.want {
			t.Errorf("%+v, want %s", got, tt.want)
		}
	}
}

// A list by a namesake's key is hashed once, not for every certificate that is judged. Each hashing of a list reads it
// into a digest of its own, which is what is counted here.
func TestNamesakesListIsHashedOnce(t *testing.T) {
	ca, namesake := issue(t, caTemplate("CA"), nil, sm2Key(t)), issue(t, caTemplate("CA"), nil, sm2Key(t))
	leaf := issue(t, staffTemplate("leaf"), ca, sm2Key(t))
	own, other := crlOf(t, ca, nil), crlOf(t, namesake, nil)
	ask := func(lists ...*pki.CRL) float64 {
		q := pki.RevocationQuestion{Certificate: leaf.cert, Issuer: ca.cert, CRLs: lists, At: at}
		return testing.AllocsPerRun(100, func() {
			if got := pki.CheckRevocation(q); got.Status != pki.Passed {
				t.Fatalf("%+v", got)
			}
		})
	}
	if alone, both := ask(own), ask(own, other); both > alone+4 {
		t.Errorf("%v allocations with the namesake's list, %v without", both, alone)
	}
}

func TestParseCRLStrict(t *testing.T) {
	t.Parallel()
	ca := issue(t, caTemplate("CA"), nil, sm2Key(t))
	good := crlOf(t, ca, nil, entry(big.NewInt(1<<40), at, 1)).Raw()
	if _, err := pki.ParseCRL(append(good[:len(good):len(good)], 0)); err == nil {
		t.Error("trailing byte taken")
	}
	if _, err := pki.ParseCRL(insideOuter(good, 5, 0)); err == nil {
		t.Error("bytes after the signature taken")
	}
	if _, err := pki.ParseCRL(nil); err == nil {
		t.Error("nothing taken")
	}
	if _, err := pki.ParseCRL(make([]byte, pki.MaxCRLSize+1)); err == nil {
		t.Error("too long taken")
	}
	crl, err := pki.ParseCRL(good)
	if err != nil || crl.Len() != 1 || crl.Number().Int64() != 7 || string(crl.RawIssuer()) != string(ca.cert.RawSubject) ||
		!crl.NextUpdate().After(crl.ThisUpdate()) {
		t.Errorf("%+v, %v", crl, err)
	}
	got := crl.Lookup(big.NewInt(1 << 40))
	if len(got) != 1 || !got[0].Date.Equal(at) || got[0].Reason != pki.KeyCompromise || !got[0].HasReason {
		t.Errorf("%+v", got)
	}
	if crl.Lookup(big.NewInt(-1<<40)) != nil {
		t.Error("the sign of a serial does not count")
	}
}

// insideOuter puts extra bytes at the end of the outer SEQUENCE.
func insideOuter(der []byte, extra ...byte) []byte {
	var outer asn1.RawValue
	if _, err := asn1.Unmarshal(der, &outer); err != nil {
		panic(err)
	}
	outer.FullBytes, outer.Bytes = nil, append(outer.Bytes[:len(outer.Bytes):len(outer.Bytes)], extra...)
	return must(asn1.Marshal(outer))
}

func FuzzParseCRL(f *testing.F) {
	ca := issue(f, caTemplate("CA"), nil, sm2Key(f))
	leaf := issue(f, staffTemplate("leaf"), ca, sm2Key(f))
	for _, c := range []*pki.CRL{
		crlOf(f, ca, nil),
		crlOf(f, ca, idp(true, idpURI("http://a/")...), entry(leaf.cert.SerialNumber, at, 6, invalidSince(at))),
	} {
		f.Add(c.Raw())
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		crl, err := pki.ParseCRL(der)
		if err != nil {
			return
		}
		if string(crl.Raw()) != string(der) {
			t.Error("bytes left over")
		}
		pki.CheckRevocation(pki.RevocationQuestion{Certificate: leaf.cert, Issuer: ca.cert, CRLs: []*pki.CRL{crl}, At: at})
	})
}

// BenchmarkCRL100k shows that the length of a list costs once, when it is read, and nothing per question.
func BenchmarkCRL100k(b *testing.B) {
	ca := issue(b, caTemplate("CA"), nil, sm2Key(b))
	leaf := issue(b, staffTemplate("leaf"), ca, sm2Key(b))
	entries := make([]smx509.RevocationListEntry, 100_000)
	for i := range entries {
		entries[i] = entry(new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 127), big.NewInt(int64(i))), at.Add(-day), 4)
	}
	crl := crlOf(b, ca, nil, entries...)
	b.Run("parse", func(b *testing.B) {
		b.SetBytes(int64(len(crl.Raw())))
		for b.Loop() {
			if _, err := pki.ParseCRL(crl.Raw()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("question", func(b *testing.B) {
		q := pki.RevocationQuestion{Certificate: leaf.cert, Issuer: ca.cert, CRLs: []*pki.CRL{crl}, At: at}
		for b.Loop() {
			if c := pki.CheckRevocation(q); c.Status != pki.Passed {
				b.Fatal(c)
			}
		}
	})
}
