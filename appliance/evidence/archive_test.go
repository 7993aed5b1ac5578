package evidence_test

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/ers"
)

// An archivist is a unit with a certificate for a few years that stamps archive timestamps.
type archivist struct {
	w         *ward
	algorithm string
	key       *hsm.Key
	chain     []*smx509.Certificate
}

// archivist is a new unit whose certificate lasts from one year after Start to another.
func (w *ward) archivist(t testing.TB, algorithm string, from, to int) *archivist {
	t.Helper()
	token := testkit.NewToken()
	info, err := token.GenerateKey(t.Context(), hsm.KeySpec{Label: "tsa/x", Algorithm: hsm.Algorithm(algorithm)})
	if err != nil {
		t.Fatal(err)
	}
	key, err := hsm.KeyOf(token, info, true)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := w.CAs[algorithm].Issue(t.Context(), ca.Request{Profile: ca.TSA, Subject: pkix.Name{CommonName: "存档单元"}, PublicKey: key.Public(),
		NotBefore: years(from).Add(-time.Minute), NotAfter: years(to)})
	if err != nil {
		t.Fatal(err)
	}
	return &archivist{w, algorithm, key, []*smx509.Certificate{cert, w.CAs[algorithm].Certificate()}}
}

func years(n int) time.Time { return testkit.Start.AddDate(n, 0, 0) }

type fixedClock time.Time

func (c fixedClock) Now() ntp.Reading {
	return ntp.Reading{Time: time.Time(c), Bound: time.Millisecond, State: ntp.Trusted, Provenance: "test"}
}

// stamp is a token with the CAs' lists of that day in it.
func (a *archivist) stamp(t testing.TB, at time.Time, algorithm ers.Algorithm, digest []byte, revoked ...ca.Revoked) []byte {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	unit, err := tsa.New(tsa.Config{
		Name: "archive", Policy: asn1.ObjectIdentifier{2, 999, 1}, Accuracy: time.Second, Signer: a.key, Chain: a.chain,
		Clock: fixedClock(at), Serials: a.w.Serials(), Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	imprint, err := tsa.NewImprint(algorithm.OID(), digest)
	if err != nil {
		t.Fatal(err)
	}
	token, err := unit.Issue(t.Context(), &tsa.Request{Imprint: imprint, CertReq: true})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := tsa.ParseToken(token.DER)
	if err != nil {
		t.Fatal(err)
	}
	var lists [][]byte
	var roots []*smx509.Certificate
	for alg, authority := range a.w.CAs {
		lists = append(lists, a.w.listDER(t, alg, at.Add(-time.Hour), revoked...))
		roots = append(roots, authority.Certificate())
	}
	whole, err := parsed.Message().WithValidation(roots, lists)
	if err != nil {
		t.Fatal(err)
	}
	return whole.Bytes()
}

// archive covers a bundle together with others in a new chain.
func (a *archivist) archive(t testing.TB, at time.Time, algorithm ers.Algorithm, before *ers.Record, b *evidence.Bundle) *ers.Record {
	t.Helper()
	hashes := before.MemberHashes(len(before.Chains), algorithm, b.Members()...)
	leaves := [][]byte{algorithm.Sum([]byte("a")), algorithm.Sum([]byte("b")), ers.Group(algorithm, hashes), algorithm.Sum([]byte("c"))}
	tree := ers.NewTree(algorithm, leaves)
	return before.Rehashed(a.timestamp(t, algorithm, ers.Reduce(hashes, tree.Path(2)), a.stamp(t, at, algorithm, tree.Root())))
}

func (a *archivist) timestamp(t testing.TB, algorithm ers.Algorithm, tree [][][]byte, token []byte) *ers.Timestamp {
	t.Helper()
	ts, err := ers.NewTimestamp(algorithm, tree, token)
	if err != nil {
		t.Fatal(err)
	}
	return ts
}

// renew stamps the last token of a record.
func (a *archivist) renew(t testing.TB, at time.Time, r *ers.Record, revoked ...ca.Revoked) *ers.Record {
	t.Helper()
	algorithm := r.Last().Algorithm
	leaf := algorithm.Sum(r.Last().Token.DER)
	tree := ers.NewTree(algorithm, [][]byte{leaf, algorithm.Sum([]byte("another"))})
	return r.Renewed(a.timestamp(t, algorithm, ers.Reduce([][]byte{leaf}, tree.Path(0)), a.stamp(t, at, algorithm, tree.Root(), revoked...)))
}

// archived puts the record into the bundle, through the file.
func archived(t testing.TB, b *evidence.Bundle, r *ers.Record) *evidence.Bundle {
	t.Helper()
	der, err := r.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, encode(t, b.WithRecord(der)))
}

// The unit of the house ends five years after Start; its token counts after that only as far as it was renewed in time.
func TestArchiveTimestamps(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds {
		b := w.bundle(t, request(k.String(), k))
		first, second, third := w.archivist(t, k.algorithm, 4, 8), w.archivist(t, "SM2", 7, 9), w.archivist(t, "RSA-2048", 7, 9)
		once := first.archive(t, years(4), ers.SM3, new(ers.Record), b)
		twice := second.renew(t, years(7), once)
		thrice := third.renew(t, years(8).Add(-time.Hour), twice)
		rehashed := third.archive(t, years(8).Add(time.Hour), ers.SHA512, thrice, b)
		long := second.renew(t, years(8).Add(2*time.Hour), rehashed)
		late := w.archivist(t, k.algorithm, 4, 8).archive(t, years(5).Add(time.Hour), ers.SM3, new(ers.Record), b)
		gap := second.renew(t, years(8).Add(time.Hour), once)
		for _, c := range []struct {
			name   string
			record *ers.Record
			at     int // years; -1: no time given
			want   pki.Verdict
			status pki.Status
			check  string
		}{
			{"nothing, before the end", nil, 4, pki.Valid, "", evidence.CheckArchiveCurrent},
			{"nothing, after the end", nil, 6, pki.Indeterminate, pki.NotChecked, evidence.CheckArchiveCurrent},
			{"nothing, no time given", nil, -1, pki.Valid, "", evidence.CheckArchiveCurrent},
			{"once, before the end", once, 4, pki.Valid, pki.Passed, evidence.CheckArchiveCurrent},
			{"once, after the end", once, 6, pki.Valid, pki.Passed, evidence.CheckArchiveCurrent},
			{"once, no time given", once, -1, pki.Valid, pki.Passed, evidence.CheckArchiveTree},
			{"once, after its own end", once, 9, pki.Indeterminate, pki.NotChecked, evidence.CheckArchiveCurrent},
			{"twice", twice, 8, pki.Valid, pki.Passed, evidence.CheckArchiveRenewal},
			{"three renewals and another digest", long, 8, pki.Valid, pki.Passed, evidence.CheckArchiveTimestamp},
			{"too late for the token", late, 6, pki.Indeterminate, pki.NotChecked, evidence.CheckArchiveRenewal},
			{"too late for the archive timestamp", gap, 9, pki.Indeterminate, pki.NotChecked, evidence.CheckArchiveRenewal},
		} {
			in := document
			if c.at >= 0 {
				in.At = years(c.at)
			}
			judged := b
			if c.record != nil {
				judged = archived(t, b, c.record)
			}
			r := evidence.Verify(judged, w.Trust, in)
			if r.Verdict != c.want || at(r, c.check) != c.status {
				t.Errorf("%v, %s: %s, %s is %q; want %s, %q: %s", k, c.name, r.Verdict, c.check, at(r, c.check), c.want, c.status, problems(r))
			}
		}
		in := document
		in.At = years(6)
		says(t, evidence.Verify(archived(t, b, once), w.Trust, in), "到期不影响结论")
		// The lists of the day are needed at the renewal, and somebody has to have signed them.
		bare := first.timestamp(t, ers.SM3, once.Last().Tree, stripped(t, once.Last().Token))
		r := evidence.Verify(archived(t, b, new(ers.Record).Rehashed(bare)), w.Trust, in)
		wants(t, r, pki.Indeterminate, pki.NotChecked, "tsa."+pki.CheckPathRevocation)
	}
}

// stripped is the token without lists.
func stripped(t testing.TB, token *tsa.Token) []byte {
	t.Helper()
	message := *token.Message()
	message.CRLs = nil
	return message.Bytes()
}

// A key that fell into other hands voids what it stamped, unless an archive timestamp was there first.
func TestCompromisedAfterArchive(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	for _, k := range kinds {
		b := w.bundle(t, request(k.String(), k))
		unit := w.Stampers[k.algorithm].Chain()[0]
		first, second := w.archivist(t, k.algorithm, 1, 8), w.archivist(t, k.algorithm, 2, 9)
		once := first.archive(t, years(1), ers.SM3, new(ers.Record), b)
		twice := second.renew(t, years(3), once)
		entry := func(c *smx509.Certificate, at int) ca.Revoked {
			return ca.Revoked{Serial: c.SerialNumber, At: years(at), Reason: pki.KeyCompromise}
		}
		for _, c := range []struct {
			name    string
			record  *ers.Record
			revoked []ca.Revoked
			at      int
			want    pki.Verdict
			status  pki.Status // of archive.certificate
		}{
			{"not archived", nil, []ca.Revoked{entry(unit, 2)}, 4, pki.Invalid, ""},
			{"after the archive timestamp", once, []ca.Revoked{entry(unit, 2)}, 4, pki.Valid, pki.Passed},
			{"before the archive timestamp", once, []ca.Revoked{entry(unit, 0)}, 4, pki.Invalid, pki.Passed},
			// The signature's own token stands by itself: one seal that proves nothing does not break it.
			{"the archive's key", once, []ca.Revoked{entry(first.chain[0], 2)}, 4, pki.Valid, pki.NotChecked},
			{"the archive's key, after a renewal", twice, []ca.Revoked{entry(first.chain[0], 4)}, 4, pki.Valid, pki.Passed},
			{"the archive's key, before the renewal", twice, []ca.Revoked{entry(first.chain[0], 2)}, 4, pki.Valid, pki.NotChecked},
			{"the newest key", twice, []ca.Revoked{entry(second.chain[0], 4)}, 4, pki.Valid, pki.NotChecked},
			// Where it is needed, nothing else shows the token: it has ended, or is void itself.
			{"the archive's key, the token ended", once, []ca.Revoked{entry(first.chain[0], 2)}, 6, pki.Indeterminate, pki.NotChecked},
			{"the newest key, the token ended", twice, []ca.Revoked{entry(second.chain[0], 4)}, 6, pki.Indeterminate, pki.NotChecked},
			{"both keys", once, []ca.Revoked{entry(unit, 2), entry(first.chain[0], 3)}, 4, pki.Invalid, pki.Failed},
		} {
			in := document
			in.At = years(c.at).Add(time.Hour)
			in.CRLs = []*pki.CRL{w.list(t, k.algorithm, years(c.at), c.revoked...)}
			judged := b
			if c.record != nil {
				judged = archived(t, b, c.record)
			}
			if r := evidence.Verify(judged, w.Trust, in); r.Verdict != c.want || at(r, evidence.CheckArchiveCertificate) != c.status {
				t.Errorf("%v, %s: %s, want %s: %s", k, c.name, r.Verdict, c.want, problems(r))
			}
		}
	}
}

// Algorithms end when the verifier says so. What was stamped again by others before goes on.
func TestAlgorithmEnds(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	k := kind{"SM2", "cms"}
	b := w.bundle(t, request("a", k))
	sm2, rsa := w.archivist(t, "SM2", 1, 9), w.archivist(t, "RSA-2048", 2, 9)
	once := sm2.archive(t, years(1), ers.SM3, new(ers.Record), b)
	renewed := rsa.renew(t, years(2), once)
	rehashed := rsa.archive(t, years(2), ers.SHA512, once, b)
	for _, c := range []struct {
		name   string
		record *ers.Record
		ends   map[string]time.Time
		want   pki.Verdict
		check  string
	}{
		{"SM2, nothing", nil, map[string]time.Time{"SM2": years(3)}, pki.Indeterminate, evidence.CheckArchiveCurrent},
		{"SM2, SM2 again", once, map[string]time.Time{"SM2": years(3)}, pki.Indeterminate, evidence.CheckArchiveCurrent},
		{"SM2, renewed by RSA", renewed, map[string]time.Time{"SM2": years(3)}, pki.Valid, ""},
		{"SM2, renewed too late", renewed, map[string]time.Time{"SM2": years(1).AddDate(0, 6, 0)}, pki.Indeterminate, evidence.CheckArchiveRenewal},
		{"SM3, the same tree", renewed, map[string]time.Time{"SM3": years(3)}, pki.Indeterminate, evidence.CheckArchiveRenewal},
		{"SM3, another tree; but the document", rehashed, map[string]time.Time{"SM3": years(3)}, pki.Indeterminate, evidence.CheckArchiveDocument},
		{"SM3 later", renewed, map[string]time.Time{"SM3": years(5)}, pki.Valid, ""},
	} {
		in := document
		in.At, in.AlgorithmEnds = years(4), c.ends
		judged := b
		if c.record != nil {
			judged = archived(t, b, c.record)
		}
		r := evidence.Verify(judged, w.Trust, in)
		if r.Verdict != c.want || c.check != "" && at(r, c.check) != pki.NotChecked {
			t.Errorf("%s: %s, want %s, %s: %s", c.name, r.Verdict, c.want, c.check, problems(r))
		}
		if c.name == "SM3, another tree; but the document" && !slices.Equal(r.Missing, []string{evidence.CheckArchiveDocument}) {
			t.Errorf("%s: missing %q", c.name, r.Missing)
		}
	}
}

// What the signature's own token does not stamp ends with its own algorithms: the journal's entry, with the consent in it,
// and a signature without a token. Archive timestamps before that keep it.
func TestUnstampedEnds(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	stamped := w.bundle(t, request("stamped", kind{"RSA-2048", "raw"}))
	w.app = w.App("lab", func(a *account.Application) { a.Stamp, a.Test = account.StampNone, true })
	bare := w.bundle(t, request("bare", kind{"RSA-2048", "cms"}))
	rsa, sm2 := w.archivist(t, "RSA-2048", 1, 9), w.archivist(t, "SM2", 1, 9)
	below := *rsa // an RSA unit below a CA with an SM2 key
	cert, err := w.CAs["SM2"].Issue(t.Context(), ca.Request{Profile: ca.TSA, Subject: pkix.Name{CommonName: "存档单元"}, PublicKey: rsa.key.Public(), NotBefore: years(1), NotAfter: years(9)})
	if err != nil {
		t.Fatal(err)
	}
	below.chain = []*smx509.Certificate{cert, w.CAs["SM2"].Certificate()}
	for _, c := range []struct {
		name    string
		b       *evidence.Bundle
		by      *archivist
		digest  ers.Algorithm
		at      int
		ends    string
		want    pki.Verdict
		journal pki.Status
	}{
		{"nothing ends", stamped, nil, "", 0, "", pki.Valid, ""},
		{"the log key's algorithm", stamped, nil, "", 0, "SM2", pki.Indeterminate, pki.NotChecked},
		{"the journal's digest", stamped, nil, "", 0, "SM3", pki.Indeterminate, pki.NotChecked},
		{"archived before", stamped, rsa, ers.SHA256, 2, "SM2", pki.Valid, pki.Passed},
		{"archived before, the digest", stamped, rsa, ers.SHA256, 2, "SM3", pki.Valid, pki.Passed},
		{"archived before, by what ended, too", stamped, sm2, ers.SHA256, 2, "SM2", pki.Indeterminate, pki.Passed},
		{"archived before, under a CA of what ended", stamped, &below, ers.SHA256, 2, "SM2", pki.Indeterminate, pki.Passed},
		{"archived too late", stamped, rsa, ers.SHA256, 4, "SM2", pki.Indeterminate, pki.NotChecked},
		{"without a token", bare, nil, "", 0, "RSA-2048", pki.Indeterminate, pki.NotChecked},
		{"without a token, archived before", bare, sm2, ers.SM3, 2, "RSA-2048", pki.Valid, pki.Passed},
		{"without a token, archived too late", bare, sm2, ers.SM3, 4, "RSA-2048", pki.Indeterminate, pki.NotChecked},
	} {
		in := document
		in.At = years(4).Add(time.Hour)
		if c.ends != "" {
			in.AlgorithmEnds = map[string]time.Time{c.ends: years(3)}
		}
		judged := c.b
		if c.by != nil {
			judged = archived(t, c.b, c.by.archive(t, years(c.at), c.digest, new(ers.Record), c.b))
		}
		if r := evidence.Verify(judged, w.Trust, in); r.Verdict != c.want || at(r, evidence.CheckArchiveJournal) != c.journal {
			t.Errorf("%s: %s, want %s: %s", c.name, r.Verdict, c.want, problems(r))
		}
	}
	// By itself, and without a token, nothing shows that a signature was there before.
	in := document
	in.At = years(0)
	in.CRLs = []*pki.CRL{w.list(t, "RSA-2048", years(0))}
	if r := evidence.VerifyCMS(bare.Signature.Value, w.Trust, in); r.Verdict != pki.Valid {
		t.Errorf("the CMS alone: %s: %s", r.Verdict, problems(r))
	}
	in.AlgorithmEnds = map[string]time.Time{"RSA-2048": years(0).Add(-time.Hour)}
	wants(t, evidence.VerifyCMS(bare.Signature.Value, w.Trust, in), pki.Indeterminate, pki.NotChecked, evidence.CheckArchiveCurrent)
}

// Evidence with archive timestamps that this release leaves is judged by every later one, years after the end of its token.
// testdata/archived is recorded anew (-update) only when the format gets a new number.
func TestRecordedArchive(t *testing.T) {
	t.Parallel()
	if *update {
		w := newWard(t)
		b := w.bundle(t, request("a", kind{"SM2", "cms"}))
		first, second := w.archivist(t, "SM2", 1, 7), w.archivist(t, "RSA-2048", 6, 9)
		record := first.renew(t, years(2), first.archive(t, years(1), ers.SM3, new(ers.Record), b))
		record = second.archive(t, years(6).Add(time.Hour), ers.SHA256, record, b)
		spki, err := smx509.MarshalPKIXPublicKey(w.LogKey.Public())
		if err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string][]byte{
			"bundle.json": encode(t, archived(t, b, record)), "document.xml": testkit.Document,
			"anchors.pem": pki.EncodeCertificatePEMs(w.Trust.Anchors...), "log.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}),
		} {
			if err := os.WriteFile(filepath.Join("testdata", "archived", name), data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	b, trust := parse(t, read(t, "archived/bundle.json")), trustIn(t, "archived/")
	in := evidence.Input{Document: read(t, "archived/document.xml"), At: years(8)}
	r := evidence.Verify(b, trust, in)
	wants(t, r, pki.Valid, pki.Passed, evidence.CheckArchiveTree, evidence.CheckArchiveRenewal, evidence.CheckArchiveCurrent)
	says(t, r, "3 次存档时间戳")
	b = with(t, b, func(b *evidence.Bundle) { b.Format, b.EvidenceRecord = evidence.Format, nil })
	wants(t, evidence.Verify(b, trust, in), pki.Indeterminate, pki.NotChecked, evidence.CheckArchiveCurrent)
}

// No byte of a file with archive timestamps is free, and no other file's record can be put in.
func TestEveryByteArchived(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	k := kind{"SM2", "raw"}
	b, other := w.bundle(t, request("a", k)), w.bundle(t, request("b", k))
	sm2 := w.archivist(t, "SM2", 1, 9)
	record := sm2.renew(t, years(2), sm2.archive(t, years(1), ers.SM3, new(ers.Record), b))
	in := document
	in.At = years(6)
	whole := archived(t, b, record)
	wants(t, evidence.Verify(whole, w.Trust, in), pki.Valid, pki.Passed, evidence.CheckArchiveTree)
	wants(t, evidence.Verify(archived(t, other, record), w.Trust, in), pki.Invalid, pki.Failed, evidence.CheckArchiveTree)
	for _, a := range testkit.Alterations(t, encode(t, whole), 3, 500) {
		r := new(evidence.Report)
		if b, err := evidence.Parse(a.Data); err != nil {
			r = evidence.Unreadable(err)
		} else {
			r = evidence.Verify(b, w.Trust, in)
		}
		if err := a.Judge(r); err != nil {
			t.Error(err)
		}
	}
	for i := range 400 {
		der := bytes.Clone(whole.EvidenceRecord)
		der[i*(len(der)-1)/399] ^= 4
		changed := with(t, whole, func(b *evidence.Bundle) { b.EvidenceRecord = der })
		if r := evidence.Verify(changed, w.Trust, document); r.Verdict != pki.Invalid {
			t.Errorf("byte %d: %s: %s", i*(len(der)-1)/399, r.Verdict, problems(r))
		}
	}
	// The format says whether there is a record.
	file := string(encode(t, whole))
	member := `"evidence_record": "` + base64.StdEncoding.EncodeToString(whole.EvidenceRecord) + `"`
	for name, text := range map[string]string{
		"the first format with a record": strings.Replace(file, evidence.FormatArchived, evidence.Format, 1),
		"the second format without one":  strings.Replace(string(encode(t, b)), evidence.Format, evidence.FormatArchived, 1),
		"an empty record":                strings.Replace(file, member, `"evidence_record": ""`, 1),
	} {
		if _, err := evidence.Parse([]byte(text)); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}
