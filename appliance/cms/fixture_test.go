package cms_test

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"math/big"
	"sync"
	"testing"
	"time"

	"yinjian/appliance/cms/cmstest"

	"github.com/emmansun/gmsm/smx509"
)

var update = flag.Bool("update", false, "record the exchanges in testdata anew; needs the peers")

// softKey is a signer in memory, standing in for hsm.Key.
type softKey struct {
	key crypto.Signer // *sm2.PrivateKey or *rsa.PrivateKey
}

func (k softKey) Public() crypto.PublicKey { return k.key.Public() }

func (k softKey) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	return cmstest.SignMessage(ctx, k.key, message)
}

// A person signs: a key, its certificate, and the CA's above it.
type person struct {
	key      softKey
	cert, ca *smx509.Certificate
}

func (p *person) chain() [][]byte { return [][]byte{p.cert.Raw, p.ca.Raw} }

var (
	sm2Person = sync.OnceValue(func() *person { return newPerson(cmstest.NewSM2Key(), cmstest.NewSM2Key()) })
	rsaPerson = sync.OnceValue(func() *person { return newPerson(cmstest.NewRSAKey(2048), cmstest.NewRSAKey(2048)) })
	people    = map[string]func() *person{"sm2": sm2Person, "rsa": rsaPerson}
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newPerson(key, caKey crypto.Signer) *person {
	ca := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA", Organization: []string{"Hospital"}},
		NotBefore: epoch, NotAfter: epoch.AddDate(20, 0, 0), IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1,
		KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, caKey.Public(), caKey)
	cert := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(0x8123456789), Subject: pkix.Name{CommonName: "张医生"},
		NotBefore: epoch, NotAfter: epoch.AddDate(5, 0, 0), SubjectKeyId: []byte("key of doctor Zhang"),
		KeyUsage: smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment,
	}, ca, key.Public(), caKey)
	return &person{softKey{key}, cert, ca}
}

func parsePEM(t testing.TB, data []byte) *smx509.Certificate {
	t.Helper()
	cert, err := smx509.ParseCertificatePEM(data)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func publicPEM(t *testing.T, key any) []byte {
	t.Helper()
	raw, err := smx509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: raw})
}

func TestMain(m *testing.M) { cmstest.Main(m) }
