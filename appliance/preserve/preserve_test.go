package preserve_test

import (
	"bytes"
	"context"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/cms/cmstest"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/preserve"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/ers"
)

func TestMain(m *testing.M) { cmstest.Main(m) }

// A vault is a house with an archive.
type vault struct {
	*testkit.House
	t         testing.TB
	app       *account.Application
	dir       string
	unit      *tsa.Authority
	service   *preserve.Service
	config    preserve.Config
	discarded [][]byte
	signed    []string
}

func newVault(t testing.TB) *vault {
	t.Helper()
	h := testkit.New(t)
	v := &vault{House: h, t: t, app: h.App("his", nil), dir: filepath.Join(t.TempDir(), "leaves")}
	h.Doctor("D001")
	v.unit = h.Stampers["SM2"].Authority
	log := logrus.New()
	log.SetOutput(io.Discard)
	v.config = preserve.Config{
		Journal: h.Journal, Clock: h.Clock, Stamper: v, Dir: v.dir, Digest: ers.SM3, Every: 24 * time.Hour, Lead: 90 * 24 * time.Hour, Log: log,
		Validation: func() ([]*smx509.Certificate, [][]byte) {
			var roots []*smx509.Certificate
			var lists [][]byte
			for _, a := range h.CAs {
				roots = append(roots, a.Certificate())
			}
			for _, l := range h.Directory.CRLs() {
				lists = append(lists, l.Raw())
			}
			return roots, lists
		},
		Discarded: func(_ error, tokens ...[]byte) { v.discarded = append(v.discarded, tokens...) },
	}
	v.restart()
	return v
}

// Issue satisfies preserve.Stamper with the unit of the day.
func (v *vault) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	return v.unit.Issue(ctx, req)
}

// Chain satisfies preserve.Stamper.
func (v *vault) Chain() []*smx509.Certificate { return v.unit.Chain() }

// restart makes the service anew from the journal.
func (v *vault) restart() {
	v.t.Helper()
	v.service = preserve.New(v.config)
	v.must(v.Journal.State(context.Background(), func(r audit.Record) error { return v.service.Replay(context.Background(), &r.Entry) }))
	v.service.Since(testkit.Start)
}

func (v *vault) must(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatal(err)
	}
}

// sign makes n records of all kinds.
func (v *vault) sign(n int) {
	v.t.Helper()
	for range n {
		i := len(v.signed)
		q := testkit.Request(fmt.Sprint("key-", i), "D001")
		q.Algorithm = []string{"SM2", "RSA-2048"}[i%2]
		q.Form = []string{"raw", "cms"}[i/2%2]
		v.signed = append(v.signed, v.Sign(v.app, q).RecordID)
	}
}

// pass moves the clock and publishes the lists of that day.
func (v *vault) pass(d time.Duration) {
	v.t.Helper()
	v.Clock.Advance(d)
	_, err := v.Directory.RefreshCRLs(context.Background())
	v.must(err)
}

// newUnit gives the vault a unit with a new key and a certificate for that long.
func (v *vault) newUnit(life time.Duration) {
	v.t.Helper()
	token := testkit.NewToken()
	info, err := token.GenerateKey(context.Background(), hsm.KeySpec{Label: "tsa/next", Algorithm: hsm.SM2})
	v.must(err)
	key, err := hsm.KeyOf(token, info, true)
	v.must(err)
	now := v.Clock.Now().Time
	cert, err := v.CAs["SM2"].Issue(context.Background(), ca.Request{
		Profile: ca.TSA, Subject: pkix.Name{CommonName: "时间戳单元"}, PublicKey: key.Public(), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(life),
	})
	v.must(err)
	log := logrus.New()
	log.SetOutput(io.Discard)
	v.unit, err = tsa.New(tsa.Config{
		Name: "next", Policy: asn1.ObjectIdentifier{2, 999, 1}, Accuracy: time.Second, Signer: key, Clock: v.Clock, Serials: v.Serials(), Log: log,
		Chain: []*smx509.Certificate{cert, v.CAs["SM2"].Certificate()},
	})
	v.must(err)
}

// run runs and wants so many batches, renewed tokens and rehashed batches.
func (v *vault) run(now bool, batches, renewed, rehashed int) {
	v.t.Helper()
	out, err := v.service.Run(context.Background(), "test", now)
	v.must(err)
	if out.Batches != batches || out.Renewed != renewed || out.Rehashed != rehashed {
		v.t.Errorf("%+v, want %d batches, %d renewed, %d rehashed", out, batches, renewed, rehashed)
	}
}

// refused runs and wants a refusal.
func (v *vault) refused(code problem.Code) {
	v.t.Helper()
	_, err := v.service.Run(context.Background(), "test", true)
	var p *problem.Problem
	if !errors.As(err, &p) || p.Code != code {
		v.t.Errorf("%v, want %s", err, code)
	}
}

// record is the n-th record's evidence, with its part of the archive, nil when it has none.
func (v *vault) record(n int) (b *evidence.Bundle, record []byte) {
	v.t.Helper()
	data, err := v.Signing.Evidence(context.Background(), v.app, v.signed[n])
	v.must(err)
	b, err = evidence.Parse(data)
	v.must(err)
	rec, err := v.Journal.Entry(context.Background(), b.Journal.Sequence)
	v.must(err)
	record, err = v.service.EvidenceRecord(context.Background(), &rec)
	v.must(err)
	return b, record
}

// judge judges every record at a time, years after Start, and wants so many archive timestamps in each.
func (v *vault) judge(at int, want pki.Verdict, timestamps int) {
	v.t.Helper()
	for n := range v.signed {
		b, record := v.record(n)
		if record == nil {
			v.t.Fatalf("record %d is not archived", n)
		}
		parsed, err := ers.Parse(record)
		v.must(err)
		if got := len(parsed.Timestamps()); got != timestamps {
			v.t.Errorf("record %d: %d archive timestamps, want %d", n, got, timestamps)
		}
		in := evidence.Input{Document: testkit.Document, At: testkit.Start.AddDate(at, 0, 0)}
		r := evidence.Verify(b.WithRecord(record), v.Trust, in)
		if r.Verdict != want {
			bad := slices.DeleteFunc(slices.Clone(r.Checks), func(c pki.Check) bool { return c.Status == pki.Passed })
			v.t.Errorf("record %d in %d years: %s, want %s: %v", n, at, r.Verdict, want, bad)
		}
	}
}

const day = 24 * time.Hour

// Nine years of an archive: records in batches, renewals before each certificate ends, another digest; and nothing of it
// but the journal is needed.
func TestYears(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.sign(5)
	v.run(true, 1, 0, 0)
	v.run(true, 0, 0, 0) // what was archived is archived
	v.sign(4)
	if _, record := v.record(7); record != nil {
		t.Error("a record has an archive timestamp before there is one")
	}
	v.run(false, 0, 0, 0) // a batch is closed once a day
	v.pass(25 * time.Hour)
	v.run(false, 1, 0, 0)
	v.judge(4, pki.Valid, 1)
	v.judge(6, pki.Indeterminate, 1) // the unit ends after five years

	v.pass(4*365*day + 300*day)
	v.refused(problem.CertificateUnusable) // the unit's own end is near: it cannot renew what it stamped
	v.newUnit(3 * 365 * day)
	v.run(false, 0, 2, 0)
	v.run(false, 0, 0, 0)
	v.judge(6, pki.Valid, 2)
	v.judge(8, pki.Indeterminate, 2)

	v.pass(2*365*day + 300*day)
	v.newUnit(365 * day)
	v.run(false, 0, 1, 0) // the token that stands for both batches
	v.judge(8, pki.Valid, 3)

	v.config.Digest = ers.SHA512
	v.restart()
	v.run(false, 0, 0, 2)
	v.run(false, 0, 0, 0)
	v.judge(8, pki.Valid, 4)
	v.judge(9, pki.Indeterminate, 4)

	v.pass(330 * day)
	v.restart()
	v.newUnit(365 * day)
	v.run(false, 0, 2, 0) // each batch has a token of its own again
	v.judge(9, pki.Valid, 5)

	_, before := v.record(3)
	v.must(os.RemoveAll(v.dir))
	v.restart()
	if _, again := v.record(3); !bytes.Equal(again, before) {
		t.Error("made again from the journal, an evidence record has other bytes")
	}
	status := v.service.Status()
	if status.Records != 9 || status.Batches != 2 || status.Tokens != 1 || status.Waiting == 0 {
		t.Errorf("%+v", status)
	}
	files, err := filepath.Glob(filepath.Join(v.dir, "*"))
	if err != nil || len(files) != 2 {
		t.Errorf("%v %v: want the two files of one batch", files, err)
	}
}

// A renewal that comes after the end proves nothing of the time between.
func TestMissed(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.sign(2)
	v.run(true, 1, 0, 0)
	v.pass(5*365*day + 30*day)
	v.newUnit(4 * 365 * day)
	v.run(false, 0, 1, 0)
	v.judge(6, pki.Indeterminate, 2)
	v.judge(4, pki.Valid, 2)
}

// A journal without new signatures is looked through once a day, and nothing is said to be due in between.
func TestIdle(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.sign(1)
	v.run(true, 1, 0, 0)
	v.pass(25 * time.Hour)
	v.App("emr", nil) // an entry, but no signature
	v.run(false, 0, 0, 0)
	v.App("lis", nil)
	if s := v.service.Status(); s.Waiting == 0 || len(s.Due) > 0 || v.service.Due(v.Clock.Now().Time) {
		t.Errorf("due again at once: %+v", s)
	}
	v.sign(1)
	v.pass(25 * time.Hour)
	v.run(false, 1, 0, 0)
}

// An impatient journal ends its reader's wait as soon as it is read through.
type impatient struct {
	preserve.Journal
	give func()
	read atomic.Int64
}

func (j *impatient) Range(ctx context.Context, from uint64, fn func(audit.Record) error) error {
	j.read.Add(1)
	j.give()
	if err := ctx.Err(); err != nil {
		return err
	}
	return j.Journal.Range(ctx, from, fn)
}

// The leaves may go at any time. Many who ask at once get what they ask for, of one that is made once; and it is made even
// if nobody has the time to wait for it.
func TestLeavesMadeAgain(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	j := &impatient{Journal: v.config.Journal, give: func() {}}
	v.config.Journal = j
	v.restart()
	v.sign(8)
	v.run(true, 1, 0, 0)
	v.config.Digest = ers.SHA512
	v.restart()
	v.run(true, 0, 0, 1)
	rec, err := v.Journal.ByRef(t.Context(), ref(t, v.signed[5]))
	v.must(err)
	want, err := v.service.EvidenceRecord(t.Context(), &rec[0])
	v.must(err)

	v.must(os.RemoveAll(v.dir))
	v.restart()
	j.read.Store(0)
	var all sync.WaitGroup
	for range 24 {
		all.Go(func() {
			if got, err := v.service.EvidenceRecord(t.Context(), &rec[0]); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
	if n := j.read.Load(); n != 2 { // once for each chain
		t.Errorf("the journal was read through %d times", n)
	}

	v.must(os.RemoveAll(v.dir))
	v.restart()
	ctx, cancel := context.WithCancel(t.Context())
	j.give = cancel
	_, _ = v.service.EvidenceRecord(ctx, &rec[0])
	if files, err := filepath.Glob(filepath.Join(v.dir, "*.leaves")); err != nil || len(files) == 0 {
		t.Errorf("%v %v: nothing was made for whoever asks next", files, err)
	}
}

func ref(t *testing.T, id string) []byte {
	t.Helper()
	out, err := hex.DecodeString(id)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Without trusted time, room or a unit nothing is archived, and what failed half-way is done by the next run, once.
func TestFaults(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.sign(3)
	v.Clock.State(ntp.Suspect)
	v.refused(problem.TimeUntrusted)
	v.Clock.State(ntp.Trusted)

	full := problem.New(problem.DiskReserve, "满", "腾出空间")
	v.config.Reserve = func() error { return full }
	v.restart()
	v.refused(problem.DiskReserve)
	v.config.Reserve = nil
	v.restart()

	lost := errors.New("the disk is gone")
	size := v.Journal.Size()
	for _, landed := range []bool{false, true} { // not written; written, and the answer lost
		v.Journal.FailKind(preserve.KindArchived, 1, landed, lost)
		if _, err := v.service.Run(t.Context(), "test", true); !errors.Is(err, lost) {
			t.Errorf("landed %v: %v", landed, err)
		}
		v.Journal.Fault(nil)
	}
	if len(v.discarded) != 2 || v.Journal.Size() != size+1 {
		t.Errorf("%d tokens discarded, %d entries more", len(v.discarded), v.Journal.Size()-size)
	}
	v.run(true, 1, 0, 0) // finds the entry that is there
	v.judge(4, pki.Valid, 1)
	v.restart()
	v.judge(4, pki.Valid, 1)
	n := 0
	v.must(v.Journal.Range(t.Context(), 0, func(r audit.Record) error {
		if r.Entry.Kind == preserve.KindArchived {
			n++
		}
		return nil
	}))
	if n != 1 {
		t.Errorf("%d archive timestamps over the same records", n)
	}
}

// A change of digest that is cut off between two batches: the token that both shared is renewed for the one that still needs
// it, and the other's proof stays what it was.
func TestRehashCutOff(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.sign(2)
	v.run(true, 1, 0, 0)
	v.sign(2)
	v.run(true, 1, 0, 0)
	v.pass(4*365*day + 300*day)
	v.newUnit(2 * 365 * day)
	v.run(false, 0, 2, 0) // one token for both

	v.config.Digest = ers.SHA256
	v.restart()
	gone := errors.New("the disk is gone")
	left := 1
	v.Journal.Fault(func(d audit.Draft) (bool, error) {
		if d.Kind != preserve.KindArchived {
			return false, nil
		}
		if left--; left < 0 {
			return false, gone
		}
		return false, nil
	})
	if out, err := v.service.Run(t.Context(), "test", false); !errors.Is(err, gone) || out.Rehashed != 1 {
		t.Fatalf("%+v %v", out, err)
	}
	half := v.service.Status()
	v.pass(365*day + 300*day)
	v.newUnit(3 * 365 * day)
	if out, err := v.service.Run(t.Context(), "test", false); !errors.Is(err, gone) || out.Renewed != 2 {
		t.Fatalf("%+v %v", out, err)
	}
	v.restart()
	for n, want := range map[int]int{0: 4, 2: 3} { // stamped, renewed, rehashed, renewed; and without the third
		_, record := v.record(n)
		parsed, err := ers.Parse(record)
		v.must(err)
		if len(parsed.Timestamps()) != want {
			t.Errorf("record %d: %d archive timestamps, want %d", n, len(parsed.Timestamps()), want)
		}
	}
	v.Journal.Fault(nil)
	v.run(false, 0, 0, 1)
	for n := range v.signed {
		b, record := v.record(n)
		in := evidence.Input{Document: testkit.Document, At: testkit.Start.AddDate(9, 0, 0)}
		if r := evidence.Verify(b.WithRecord(record), v.Trust, in); r.Verdict != pki.Valid {
			t.Errorf("record %d: %+v", n, r)
		}
	}
	if status := v.service.Status(); half.Error == "" || status.Error != "" || status.Tokens != 2 {
		t.Errorf("%+v, then %+v", half, status)
	}
}

// Bouncy Castle finds the members of each record covered by the evidence record that the archive gives it, through a
// renewal and another digest, and verifies every token with the revocation lists inside.
func TestBouncyCastleReadsTheArchive(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("../../tsa/ers/testdata/ERSCheck.java")
	if err != nil {
		t.Fatal(err)
	}
	bc := cmstest.JudgeOf(t, "ERSCheck", source)
	v := newVault(t)
	units := []*smx509.Certificate{v.unit.Chain()[0]}
	v.sign(5)
	v.run(true, 1, 0, 0)
	v.pass(4*365*day + 300*day)
	v.newUnit(3 * 365 * day)
	units = append(units, v.unit.Chain()[0])
	v.run(false, 0, 1, 0)
	v.config.Digest = ers.SHA256
	v.restart()
	v.run(false, 0, 0, 1)

	dir := t.TempDir()
	write := func(data []byte) string {
		files, err := os.ReadDir(dir)
		v.must(err)
		return cmstest.Write(t, filepath.Join(dir, fmt.Sprint(len(files))), data)
	}
	certs := write(cmstest.CertPEM(units...))
	var list []string
	for n := range v.signed {
		b, record := v.record(n)
		line := []string{write(record), certs}
		for _, m := range b.Members() {
			line = append(line, write(m))
		}
		list = append(list, strings.Join(line, "\t"), strings.Join(line[:len(line)-1], "\t")) // all members, all but one
	}
	out, err := bc("verify", write([]byte(strings.Join(list, "\n")+"\n")))
	got := strings.Split(strings.TrimSpace(out), "\n")[1:]
	if err != nil || len(got) != len(list) {
		t.Fatalf("%v: %s", err, out)
	}
	for i, line := range got {
		if want := []string{"yes 3", "no"}[i%2]; !strings.HasPrefix(line, want) {
			t.Errorf("record %d: %s, want %s", i/2, line, want)
		}
	}
}

// A leaf that somebody changed in its file is found and made again; one in the journal is not archived twice.
func TestLeavesAltered(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	v.sign(4)
	v.run(true, 1, 0, 0)
	files, err := filepath.Glob(filepath.Join(v.dir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	data, err := os.ReadFile(files[0])
	v.must(err)
	data[20] ^= 1
	v.must(os.WriteFile(files[0], data, 0o600))
	v.restart()
	v.judge(4, pki.Valid, 1)
	data[20] ^= 1
	if again, err := os.ReadFile(files[0]); err != nil || !bytes.Equal(again, data) {
		t.Errorf("%v: the file is not as it was", err)
	}
}
