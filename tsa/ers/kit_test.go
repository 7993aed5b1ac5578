package ers_test

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"math/big"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/cms/cmstest"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/ers"
)

func TestMain(m *testing.M) { cmstest.Main(m) }

// A unit stamps at whatever time it is told.
type unit struct {
	key  crypto.Signer
	cert *smx509.Certificate
	ca   *smx509.Certificate
}

var (
	start   = time.Date(2026, 11, 21, 10, 20, 30, 0, time.UTC)
	rsaUnit = sync.OnceValue(func() *unit { return newUnit(cmstest.NewRSAKey(2048), cmstest.NewRSAKey(2048)) })
	sm2Unit = sync.OnceValue(func() *unit { return newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key()) })
)

func newUnit(key, caKey crypto.Signer) *unit {
	ca := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, NotBefore: start.AddDate(-1, 0, 0), NotAfter: start.AddDate(90, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, caKey.Public(), caKey)
	timeStamping, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
	if err != nil {
		panic(err)
	}
	cert := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Test TSU"}, NotBefore: start.AddDate(-1, 0, 0), NotAfter: start.AddDate(80, 0, 0),
		KeyUsage:        smx509.KeyUsageDigitalSignature,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: timeStamping}},
	}, ca, key.Public(), caKey)
	return &unit{key, cert, ca}
}

// Public satisfies cms.Signer.
func (u *unit) Public() crypto.PublicKey { return u.key.Public() }

// SignMessage satisfies cms.Signer.
func (u *unit) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	return cmstest.SignMessage(ctx, u.key, message)
}

type clock time.Time

func (c clock) Now() ntp.Reading {
	return ntp.Reading{Time: time.Time(c), Bound: time.Millisecond, State: ntp.Trusted, Provenance: "test"}
}

type serials struct{}

var lastSerial atomic.Int64

func (serials) Next(context.Context) (*big.Int, error) {
	return big.NewInt(1000 + lastSerial.Add(1)), nil
}

// stamp is a token over a digest.
func (u *unit) stamp(t testing.TB, at time.Time, a ers.Algorithm, digest []byte) []byte {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	unit, err := tsa.New(tsa.Config{
		Name: "test", Policy: asn1.ObjectIdentifier{2, 999, 1}, Accuracy: time.Second, Signer: u, Chain: []*smx509.Certificate{u.cert, u.ca},
		Clock: clock(at), Serials: serials{}, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	imprint, err := tsa.NewImprint(a.OID(), digest)
	if err != nil {
		t.Fatal(err)
	}
	token, err := unit.Issue(t.Context(), &tsa.Request{Imprint: imprint, CertReq: true})
	if err != nil {
		t.Fatal(err)
	}
	return token.DER
}

// files are data groups of different sizes: of one, two, … members.
func files(n int) [][][]byte {
	var out [][][]byte
	for i := range n {
		var group [][]byte
		for j := range i%4 + 1 {
			group = append(group, fmt.Appendf(nil, "file %d part %d", i, j))
		}
		out = append(out, group)
	}
	return out
}

// archive stamps groups with one token and answers a record for each; those given are continued in a new chain.
func (u *unit) archive(t testing.TB, at time.Time, a ers.Algorithm, groups [][][]byte, before ...*ers.Record) []*ers.Record {
	t.Helper()
	if before == nil {
		for range groups {
			before = append(before, new(ers.Record))
		}
	}
	var leaves [][]byte
	var hashes [][][]byte
	for i, g := range groups {
		h := before[i].MemberHashes(len(before[i].Chains), a, g...)
		hashes, leaves = append(hashes, h), append(leaves, ers.Group(a, h))
	}
	tree := ers.NewTree(a, leaves)
	token := u.stamp(t, at, a, tree.Root())
	var out []*ers.Record
	for i := range groups {
		out = append(out, before[i].Rehashed(timestamp(t, a, ers.Reduce(hashes[i], tree.Path(i)), token)))
	}
	return out
}

// renew stamps the last tokens of records with one token.
func (u *unit) renew(t testing.TB, at time.Time, records ...*ers.Record) []*ers.Record {
	t.Helper()
	a := records[0].Last().Algorithm
	var leaves [][]byte
	for _, r := range records {
		leaves = append(leaves, a.Sum(r.Last().Token.DER))
	}
	tree := ers.NewTree(a, leaves)
	token := u.stamp(t, at, a, tree.Root())
	var out []*ers.Record
	for i, r := range records {
		out = append(out, r.Renewed(timestamp(t, a, ers.Reduce(leaves[i:i+1], tree.Path(i)), token)))
	}
	return out
}

func timestamp(t testing.TB, a ers.Algorithm, tree [][][]byte, token []byte) *ers.Timestamp {
	t.Helper()
	ts, err := ers.NewTimestamp(a, tree, token)
	if err != nil {
		t.Fatal(err)
	}
	return ts
}

func encode(t testing.TB, r *ers.Record) []byte {
	t.Helper()
	out, err := r.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wrong is the number of the first timestamp that does not hold, -1 for none, and why.
func wrong(r *ers.Record, members ...[]byte) (int, error) {
	for i, err := range r.Check(members...) {
		if err != nil {
			return i, err
		}
	}
	return -1, nil
}
