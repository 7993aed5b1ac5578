package pki_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
)

// at is the time in question in these tests.
var at = time.Date(2027, 3, 1, 8, 0, 0, 0, time.UTC)

const day = 24 * time.Hour

func sm2Key(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// RSA keys are slow to make; the tests share a few.
var rsaKeys [3]func() *rsa.PrivateKey

func init() {
	for i := range rsaKeys {
		rsaKeys[i] = sync.OnceValue(func() *rsa.PrivateKey {
			k, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				panic(err)
			}
			return k
		})
	}
}

// A node is a certificate with its key.
type node struct {
	cert *smx509.Certificate
	key  crypto.Signer
}

var lastSerial atomic.Int64

// base is a template that breaks no rule.
func base(cn string) *smx509.Certificate {
	serial := new(big.Int).Lsh(big.NewInt(0x4f), 120)
	return &smx509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(lastSerial.Add(1))),
		Subject:      pkix.Name{CommonName: cn, Organization: []string{"Test"}},
		NotBefore:    at.Add(-100 * day), NotAfter: at.Add(100 * day),
	}
}

func caTemplate(cn string) *smx509.Certificate {
	c := base(cn)
	c.BasicConstraintsValid, c.IsCA, c.MaxPathLen = true, true, -1
	c.KeyUsage = smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign
	return c
}

func staffTemplate(cn string) *smx509.Certificate {
	c := base(cn)
	c.KeyUsage = smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment
	return c
}

// make signs tmpl by parent (by itself when parent is nil).
func issue(t testing.TB, tmpl *smx509.Certificate, parent *node, key crypto.Signer) *node {
	t.Helper()
	if tmpl.SubjectKeyId == nil {
		tmpl.SubjectKeyId = must(pki.KeyID(key.Public()))
	}
	issuer, signer := tmpl, key
	if parent != nil {
		issuer, signer = parent.cert, parent.key
	}
	// smx509 sets basicConstraints only; the rest is the template's.
	der, err := smx509.CreateCertificate(rand.Reader, tmpl, issuer, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &node{cert, key}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

type certs = []*smx509.Certificate

// crlOf is a list by issuer, current at [at].
func crlOf(t testing.TB, issuer *node, change func(*smx509.RevocationList), revoked ...smx509.RevocationListEntry) *pki.CRL {
	t.Helper()
	tmpl := &smx509.RevocationList{Number: big.NewInt(7), ThisUpdate: at.Add(-time.Hour), NextUpdate: at.Add(day), RevokedCertificateEntries: revoked}
	if change != nil {
		change(tmpl)
	}
	der, err := smx509.CreateRevocationList(rand.Reader, tmpl, issuer.cert, issuer.key)
	if err != nil {
		t.Fatal(err)
	}
	crl, err := pki.ParseCRL(der)
	if err != nil {
		t.Fatal(err)
	}
	return crl
}

// statuses joins the checks by ID, the worst of each.
func statuses(r *pki.PathReport) map[string]pki.Status {
	rank := []pki.Status{pki.Passed, pki.NotChecked, pki.Failed}
	out := map[string]pki.Status{}
	for _, c := range r.Checks {
		if old, ok := out[c.ID]; !ok || slices.Index(rank, c.Status) > slices.Index(rank, old) {
			out[c.ID] = c.Status
		}
	}
	return out
}

// eku is a critical extKeyUsage.
func eku(critical bool, ids ...asn1.ObjectIdentifier) pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: critical, Value: must(asn1.Marshal(ids))}
}

var (
	ekuTime   = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
	ekuServer = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	ekuClient = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
)
