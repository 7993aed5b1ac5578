package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/hsm"
)

var at = time.Date(2027, 3, 1, 8, 0, 0, 0, time.UTC)

const day = 24 * time.Hour

// RSA keys are slow to make; the tests share two.
var rsaKey = [2]func() *rsa.PrivateKey{sync.OnceValue(newRSA), sync.OnceValue(newRSA)}

func newRSA() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
}

func newSM2(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

var counter atomic.Int64

// serials are like the appliance's: an epoch before a counter.
func serials(context.Context) (*big.Int, error) {
	n := new(big.Int).Lsh(big.NewInt(0x5a5a5a5a5a5a5a5a), 64)
	return n.Add(n, big.NewInt(counter.Add(1))), nil
}

// newCA is a working authority. kind is "SM2" or "RSA".
func newCA(t testing.TB, kind, crlURL string) *ca.Authority {
	t.Helper()
	var key crypto.Signer = rsaKey[0]()
	if kind == "SM2" {
		key = newSM2(t)
	}
	config := ca.Config{Signer: key, Serials: serials, CRLURL: crlURL}
	fresh, err := ca.New(config)
	if err != nil {
		t.Fatal(err)
	}
	config.Certificate, err = fresh.SelfSign(t.Context(), pkix.Name{Country: []string{"CN"}, Organization: []string{"某医院"}, CommonName: kind}, at.Add(-day), at.Add(3650*day))
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func staff(pub crypto.PublicKey) ca.Request {
	return ca.Request{Profile: ca.Staff, Subject: pkix.Name{Country: []string{"CN"}, Organization: []string{"某医院"}, OrganizationalUnit: []string{"心内科"}, CommonName: "张三"},
		StaffNumber: "A-0017", PublicKey: pub, NotBefore: at.Add(-time.Hour), NotAfter: at.Add(365 * day)}
}

// requests has one for each profile.
func requests(pub crypto.PublicKey) []ca.Request {
	var out []ca.Request
	for _, p := range []ca.Profile{ca.Staff, ca.TSA, ca.Log, ca.TLSServer, ca.TLSClient} {
		r := staff(pub)
		r.Profile = p
		if p != ca.Staff {
			r.StaffNumber, r.Subject.CommonName = "", "unit "+string(p)
		}
		if p == ca.TLSServer {
			r.DNSNames, r.IPs = []string{"sign.hospital.test"}, []net.IP{net.IPv4(127, 0, 0, 1)}
		}
		out = append(out, r)
	}
	return out
}

func TestIssueEachProfile(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"SM2", "RSA"} {
		a := newCA(t, kind, "http://crl.hospital.test/a.crl")
		der, err := a.CRL(t.Context(), big.NewInt(1), at, at.Add(7*day), nil)
		if err != nil {
			t.Fatal(err)
		}
		crl, err := pki.ParseCRL(der)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range []crypto.Signer{newSM2(t), rsaKey[1]()} {
			for _, r := range requests(key.Public()) {
				cert, err := a.Issue(t.Context(), r)
				if err != nil {
					t.Errorf("%s CA: %v", kind, err)
					continue
				}
				purpose, _ := r.Profile.Purpose()
				if ps := pki.LintLeaf(cert, purpose); len(ps) > 0 {
					t.Errorf("%s, %s: %v", kind, r.Profile, ps)
				}
				report := pki.VerifyPath(pki.Options{Leaf: cert, Anchors: []*smx509.Certificate{a.Certificate()}, At: at, Purpose: purpose, CRLs: []*pki.CRL{crl}})
				if report.Verdict != pki.Valid || !report.Evaluation {
					t.Errorf("%s, %s: %+v", kind, r.Profile, report)
				}
				if !strings.Contains(cert.Subject.Organization[0], ca.Mark) || !strings.HasPrefix(cert.Issuer.CommonName, ca.RootName) || !pki.IsEvaluation(cert) {
					t.Errorf("%s, %s: evaluation is not said: %v by %v", kind, r.Profile, cert.Subject, cert.Issuer)
				}
				if r.Profile == ca.Staff && cert.Subject.SerialNumber != "A-0017" {
					t.Errorf("staff number %q", cert.Subject.SerialNumber)
				}
				if !slices.Equal(cert.CRLDistributionPoints, []string{"http://crl.hospital.test/a.crl"}) {
					t.Errorf("distribution points %v", cert.CRLDistributionPoints)
				}
			}
		}
	}
}

func TestRoot(t *testing.T) {
	t.Parallel()
	root := newCA(t, "SM2", "").Certificate()
	if root.Subject.CommonName != ca.RootName+" SM2" || root.Subject.Organization[0] != "某医院 "+ca.Mark || !pki.IsEvaluation(root) {
		t.Errorf("root is %v", root.Subject)
	}
	if root.MaxPathLen != 0 || !root.MaxPathLenZero || root.KeyUsage != smx509.KeyUsageCertSign|smx509.KeyUsageCRLSign {
		t.Errorf("path length %d, usage %b", root.MaxPathLen, root.KeyUsage)
	}
}

func TestIssueRefuses(t *testing.T) {
	t.Parallel()
	a := newCA(t, "SM2", "")
	key := newSM2(t)
	for name, spoil := range map[string]func(*ca.Request){
		"unknown profile":             func(r *ca.Request) { r.Profile = "root" },
		"no profile":                  func(r *ca.Request) { r.Profile = "" },
		"no name":                     func(r *ca.Request) { r.Subject.CommonName = "" },
		"long name":                   func(r *ca.Request) { r.Subject.CommonName = strings.Repeat("名", 65) },
		"name with a line break":      func(r *ca.Request) { r.Subject.CommonName = "a\nb" },
		"organisation leaves no room": func(r *ca.Request) { r.Subject.Organization = []string{strings.Repeat("o", 60)} },
		"two organisations":           func(r *ca.Request) { r.Subject.Organization = []string{"a", "b"} },
		"country in words":            func(r *ca.Request) { r.Subject.Country = []string{"China"} },
		"no staff number":             func(r *ca.Request) { r.StaffNumber = "" },
		"odd staff number":            func(r *ca.Request) { r.StaffNumber = "a b" },
		"staff number of a TSA":       func(r *ca.Request) { r.Profile = ca.TSA },
		"staff with a host name":      func(r *ca.Request) { r.DNSNames = []string{"a.test"} },
		"server without a name":       func(r *ca.Request) { r.Profile, r.StaffNumber = ca.TLSServer, "" },
		"odd host name":               func(r *ca.Request) { r.Profile, r.StaffNumber, r.DNSNames = ca.TLSServer, "", []string{"a_b..c"} },
		"odd address":                 func(r *ca.Request) { r.Profile, r.StaffNumber, r.IPs = ca.TLSServer, "", []net.IP{{1}} },
		"no key":                      func(r *ca.Request) { r.PublicKey = nil },
		"short key":                   func(r *ca.Request) { r.PublicKey = &rsa.PublicKey{N: big.NewInt(35), E: 65537} },
		"the CA's own key":            func(r *ca.Request) { r.PublicKey = a.Certificate().PublicKey },
		"before the CA":               func(r *ca.Request) { r.NotBefore = at.Add(-2 * day) },
		"after the CA":                func(r *ca.Request) { r.NotAfter = at.Add(5000 * day) },
		"no validity":                 func(r *ca.Request) { r.NotAfter = r.NotBefore },
		"zero times":                  func(r *ca.Request) { r.NotBefore, r.NotAfter = time.Time{}, time.Time{} },
	} {
		r := staff(key.Public())
		spoil(&r)
		if c, err := a.Issue(t.Context(), r); err == nil {
			t.Errorf("%s: issued %v", name, c.Subject)
		}
	}
}

// The mark cannot be got rid of by raw names, nor doubled.
func TestMarkIsStubborn(t *testing.T) {
	t.Parallel()
	a := newCA(t, "SM2", "")
	r := staff(newSM2(t).Public())
	r.Subject.Organization = []string{"某医院 " + ca.Mark}
	r.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: []int{2, 5, 4, 10}, Value: "Real CA"}}
	cert, err := a.Issue(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if got := cert.Subject.Organization; !slices.Equal(got, []string{"某医院 " + ca.Mark}) {
		t.Errorf("organisation %q", got)
	}
}

var errTokenGone = errors.New("CKR_DEVICE_REMOVED")

type signer struct {
	crypto.Signer
	sign func() ([]byte, error)
}

func (s signer) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return s.sign()
}

func TestFaults(t *testing.T) {
	t.Parallel()
	key := newSM2(t)
	good := newCA(t, "SM2", "")
	self, err := ca.New(ca.Config{Signer: key, Serials: serials})
	if err != nil {
		t.Fatal(err)
	}
	root, err := self.SelfSign(t.Context(), pkix.Name{}, at, at.Add(day))
	if err != nil {
		t.Fatal(err)
	}
	request := staff(newSM2(t).Public())
	request.NotBefore, request.NotAfter = at, at.Add(day)

	// A signer that fails, and one that signs rubbish.
	for name, sign := range map[string]func() ([]byte, error){
		"fails":         func() ([]byte, error) { return nil, errTokenGone },
		"signs rubbish": func() ([]byte, error) { return []byte{0x30, 6, 2, 1, 1, 2, 1, 1}, nil },
	} {
		a, err := ca.New(ca.Config{Signer: signer{key, sign}, Serials: serials, Certificate: root})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Issue(t.Context(), request); err == nil || name == "fails" && !errors.Is(err, errTokenGone) {
			t.Errorf("signer %s: Issue = %v", name, err)
		}
		if _, err := a.CRL(t.Context(), big.NewInt(1), at, at.Add(day), nil); err == nil {
			t.Errorf("signer %s: CRL made", name)
		}
	}
	// Serials that are missing, short, long or negative.
	for name, serial := range map[string]*big.Int{"nil": nil, "short": big.NewInt(1 << 62), "negative": big.NewInt(-1), "long": new(big.Int).Lsh(big.NewInt(1), 159)} {
		a, err := ca.New(ca.Config{Signer: key, Certificate: root, Serials: func(context.Context) (*big.Int, error) { return serial, nil }})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Issue(t.Context(), request); err == nil {
			t.Errorf("serial %s taken", name)
		}
	}
	disk := errors.New("disk gone")
	a, _ := ca.New(ca.Config{Signer: key, Certificate: root, Serials: func(context.Context) (*big.Int, error) { return nil, disk }})
	if _, err := a.Issue(t.Context(), request); !errors.Is(err, disk) {
		t.Errorf("Issue = %v, want %v", err, disk)
	}
	// A context that is over signs nothing.
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := good.Issue(over, staff(newSM2(t).Public())); !errors.Is(err, context.Canceled) {
		t.Errorf("Issue = %v, want canceled", err)
	}
	nist, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// Parts that do not fit together.
	for name, c := range map[string]ca.Config{
		"nothing":      {},
		"no serials":   {Signer: key},
		"foreign key":  {Signer: newSM2(t), Serials: serials, Certificate: root},
		"not a CA":     {Signer: key, Serials: serials, Certificate: mustIssue(t, good, staff(key.Public()))},
		"odd CRL URL":  {Signer: key, Serials: serials, CRLURL: "file:///etc"},
		"P-256 signer": {Signer: nist, Serials: serials},
	} {
		if _, err := ca.New(c); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := good.SelfSign(t.Context(), pkix.Name{}, at, at.Add(day)); err == nil {
		t.Error("self-signed twice")
	}
	if _, err := self.Issue(t.Context(), request); err == nil {
		t.Error("issued without a certificate")
	}
	if _, err := self.CRL(t.Context(), big.NewInt(1), at, at.Add(day), nil); err == nil {
		t.Error("CRL without a certificate")
	}
}

func mustIssue(t testing.TB, a *ca.Authority, r ca.Request) *smx509.Certificate {
	t.Helper()
	c, err := a.Issue(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCRL(t *testing.T) {
	t.Parallel()
	a := newCA(t, "SM2", "")
	revoked := mustIssue(t, a, staff(newSM2(t).Public()))
	standing := mustIssue(t, a, staff(newSM2(t).Public()))
	entries := []ca.Revoked{
		{Serial: revoked.SerialNumber, At: at.Add(-time.Minute), Reason: pki.KeyCompromise},
		{Serial: big.NewInt(1 << 61), At: at.Add(-time.Hour), Reason: pki.Unspecified},
	}
	der, err := a.CRL(t.Context(), big.NewInt(300), at.Add(time.Second/2), at.Add(day), entries)
	if err != nil {
		t.Fatal(err)
	}
	crl, err := pki.ParseCRL(der)
	if err != nil || crl.Len() != 2 || crl.Number().Int64() != 300 || !crl.ThisUpdate().Equal(at) || !crl.NextUpdate().Equal(at.Add(day)) {
		t.Fatalf("%+v, %v", crl, err)
	}
	slices.Reverse(entries)
	again, err := a.CRL(t.Context(), big.NewInt(300), at, at.Add(day), entries)
	if err != nil {
		t.Fatal(err)
	}
	list1, _ := smx509.ParseRevocationList(der)
	list2, _ := smx509.ParseRevocationList(again)
	if string(list1.RawTBSRevocationList) != string(list2.RawTBSRevocationList) {
		t.Error("the order of the entries shows")
	}
	for cert, want := range map[*smx509.Certificate]pki.Verdict{revoked: pki.Invalid, standing: pki.Valid} {
		r := pki.VerifyPath(pki.Options{Leaf: cert, Anchors: []*smx509.Certificate{a.Certificate()}, At: at, Purpose: pki.StaffSigning, CRLs: []*pki.CRL{crl}})
		if r.Verdict != want {
			t.Errorf("%s, want %s: %+v", r.Verdict, want, r.Checks)
		}
	}
	one := ca.Revoked{Serial: big.NewInt(5), At: at, Reason: pki.Superseded}
	for name, tt := range map[string]struct {
		number  *big.Int
		until   time.Time
		entries []ca.Revoked
	}{
		"no number":          {nil, at.Add(day), nil},
		"number 0":           {new(big.Int), at.Add(day), nil},
		"no window":          {big.NewInt(1), at, nil},
		"listed twice":       {big.NewInt(1), at.Add(day), []ca.Revoked{one, one}},
		"revoked tomorrow":   {big.NewInt(1), at.Add(day), []ca.Revoked{{Serial: big.NewInt(5), At: at.Add(day)}}},
		"revoked at no time": {big.NewInt(1), at.Add(day), []ca.Revoked{{Serial: big.NewInt(5)}}},
		"no serial":          {big.NewInt(1), at.Add(day), []ca.Revoked{{At: at}}},
		"reason 7":           {big.NewInt(1), at.Add(day), []ca.Revoked{{Serial: big.NewInt(5), At: at, Reason: 7}}},
		"removeFromCRL":      {big.NewInt(1), at.Add(day), []ca.Revoked{{Serial: big.NewInt(5), At: at, Reason: pki.RemoveFromCRL}}},
	} {
		if _, err := a.CRL(t.Context(), tt.number, at, tt.until, tt.entries); err == nil {
			t.Errorf("%s: made", name)
		}
	}
}

// fakeToken signs digests with software keys, as a token does; nothing else of it is used.
type fakeToken struct {
	hsm.Token
	key crypto.Signer
}

func (f fakeToken) Do(_ context.Context, _ string, op hsm.Operation, digest []byte) ([]byte, error) {
	if op == hsm.SignSM2E {
		return f.key.Sign(rand.Reader, digest, nil) // without options gmsm takes e
	}
	return f.key.Sign(rand.Reader, digest, crypto.SHA256)
}

// hsm.Key gets e and digests right for both kinds of CA.
func TestCipherMachineKey(t *testing.T) {
	t.Parallel()
	for _, key := range []crypto.Signer{newSM2(t), rsaKey[1]()} {
		k, err := hsm.KeyOf(fakeToken{key: key}, hsm.KeyInfo{Label: "ca", Public: key.Public()}, true)
		if err != nil {
			t.Fatal(err)
		}
		config := ca.Config{Signer: k, Serials: serials}
		a, err := ca.New(config)
		if err != nil {
			t.Fatal(err)
		}
		if config.Certificate, err = a.SelfSign(t.Context(), pkix.Name{}, at.Add(-day), at.Add(500*day)); err != nil {
			t.Fatal(err)
		}
		if a, err = ca.New(config); err != nil {
			t.Fatal(err)
		}
		leaf := mustIssue(t, a, staff(newSM2(t).Public()))
		der, err := a.CRL(t.Context(), big.NewInt(1), at, at.Add(day), nil)
		if err != nil {
			t.Fatal(err)
		}
		crl, err := pki.ParseCRL(der)
		if err != nil {
			t.Fatal(err)
		}
		r := pki.VerifyPath(pki.Options{Leaf: leaf, Anchors: []*smx509.Certificate{config.Certificate}, At: at, Purpose: pki.StaffSigning, CRLs: []*pki.CRL{crl}})
		if r.Verdict != pki.Valid {
			t.Errorf("%T: %+v", key, r)
		}
	}
}
