package tsa_test

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"flag"
	"io"
	"math/big"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/ntp"
	"yinjian/tsa"
)

var update = flag.Bool("update", false, "record the exchanges in testdata anew; needs the peers")

// softKey is a signer in memory, standing in for hsm.Key.
type softKey struct {
	key   crypto.Signer
	fail  error
	calls *atomic.Int64
}

func (k softKey) Public() crypto.PublicKey { return k.key.Public() }

func (k softKey) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	if k.calls != nil {
		k.calls.Add(1)
	}
	if k.fail != nil {
		return nil, k.fail
	}
	return cmstest.SignMessage(ctx, k.key, message)
}

// A unit is a key with a certificate for timestamping, and the CA's.
type unit struct {
	key      softKey
	caKey    crypto.Signer
	cert, ca *smx509.Certificate
}

var (
	sm2Unit = sync.OnceValue(func() *unit { return newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key()) })
	rsaUnit = sync.OnceValue(func() *unit { return newUnit(cmstest.NewRSAKey(2048), cmstest.NewRSAKey(2048)) })
	units   = map[string]func() *unit{"sm2": sm2Unit, "rsa": rsaUnit}
)

var (
	epoch        = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	now          = time.Date(2026, 11, 21, 10, 20, 30, 120456789, time.UTC)
	policy       = asn1.ObjectIdentifier{1, 2, 156, 112600, 1, 1}
	timeStamping = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
)

func newUnit(key, caKey crypto.Signer) *unit {
	ca := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"},
		NotBefore: epoch, NotAfter: epoch.AddDate(20, 0, 0), IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1,
		KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, caKey.Public(), caKey)
	u := &unit{softKey{key: key}, caKey, nil, ca}
	u.cert = u.certificate(nil)
	return u
}

// certificate issues one for the unit's key; change may spoil the template.
func (u *unit) certificate(change func(*smx509.Certificate)) *smx509.Certificate {
	template := &smx509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Test TSU"},
		NotBefore: epoch, NotAfter: epoch.AddDate(5, 0, 0), SubjectKeyId: []byte("unit"),
		KeyUsage:        smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment,
		ExtraExtensions: []pkix.Extension{purpose(true, timeStamping)},
	}
	if change != nil {
		change(template)
	}
	return cmstest.Issue(template, u.ca, u.key.Public(), u.caKey)
}

func purpose(critical bool, oids ...asn1.ObjectIdentifier) pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: critical, Value: marshal(oids)}
}

func marshal(v any) []byte {
	out, err := asn1.Marshal(v)
	if err != nil {
		panic(err)
	}
	return out
}

type fixedClock ntp.Reading

func (c fixedClock) Now() ntp.Reading { return ntp.Reading(c) }

func trusted() fixedClock {
	return fixedClock{Time: now, Bound: 37200 * time.Microsecond, State: ntp.Trusted, Provenance: "BDS+lan"}
}

// memSerials counts; fail may decide to fail a call instead.
type memSerials struct {
	last atomic.Int64
	give func(n int64) (*big.Int, error)
}

func (s *memSerials) Next(ctx context.Context) (*big.Int, error) {
	n := s.last.Add(1)
	if s.give != nil {
		return s.give(n)
	}
	serial := new(big.Int).Lsh(big.NewInt(0x7f), 152) // as long as serials may be
	return serial.Add(serial, big.NewInt(n)), ctx.Err()
}

// memJournal keeps tokens; fail decides the failure of a call, and whether the entry was written all the same.
type memJournal struct {
	mu     sync.Mutex // guards tokens
	tokens []*tsa.Token
	fail   func() (written bool, err error)
}

func (j *memJournal) RecordToken(_ context.Context, token *tsa.Token) error {
	written, err := true, error(nil)
	if j.fail != nil {
		written, err = j.fail()
	}
	if written {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.tokens = append(j.tokens, token)
	}
	return err
}

func (u *unit) config() tsa.Config {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return tsa.Config{
		Name: "test", Policy: policy, Accuracy: time.Second, Signer: u.key, Chain: []*smx509.Certificate{u.cert, u.ca},
		Clock: trusted(), Serials: new(memSerials), Recorder: new(memJournal), Log: log,
	}
}

func newAuthority(t testing.TB, c tsa.Config) *tsa.Authority {
	t.Helper()
	a, err := tsa.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// request asks for a stamp on data, with nonce and certificates.
func request(data []byte) *tsa.Request {
	return &tsa.Request{Imprint: tsa.ImprintOf(data), Nonce: big.NewInt(-77), CertReq: true}
}

func (u *unit) token(t testing.TB, req *tsa.Request) *tsa.Token {
	t.Helper()
	token, err := newAuthority(t, u.config()).Issue(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func encode(t testing.TB, req *tsa.Request) []byte {
	t.Helper()
	out, err := req.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestMain(m *testing.M) { cmstest.Main(m) }

var _ cms.Signer = softKey{}
