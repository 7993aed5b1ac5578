package tsa_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"flag"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/cms"
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
	if err := errors.Join(ctx.Err(), k.fail); err != nil {
		return nil, err
	}
	if key, ok := k.key.(*rsa.PrivateKey); ok {
		digest := sha256.Sum256(message)
		return rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	}
	return k.key.Sign(rand.Reader, message, sm2.DefaultSM2SignerOpts)
}

// A unit is a key with a certificate for timestamping, and the CA's.
type unit struct {
	key      softKey
	caKey    crypto.Signer
	cert, ca *smx509.Certificate
}

var (
	sm2Unit = sync.OnceValue(func() *unit { return newUnit(newSM2Key(), newSM2Key()) })
	rsaUnit = sync.OnceValue(func() *unit { return newUnit(newRSAKey(), newRSAKey()) })
	units   = map[string]func() *unit{"sm2": sm2Unit, "rsa": rsaUnit}
)

func newSM2Key() crypto.Signer {
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func newRSAKey() crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
}

var (
	epoch        = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	now          = time.Date(2026, 11, 21, 10, 20, 30, 120456789, time.UTC)
	policy       = asn1.ObjectIdentifier{1, 2, 156, 112600, 1, 1}
	timeStamping = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
)

func newUnit(key, caKey crypto.Signer) *unit {
	ca := certify(&smx509.Certificate{
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
	return certify(template, u.ca, u.key.Public(), u.caKey)
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

func certify(template, parent *smx509.Certificate, pub crypto.PublicKey, priv crypto.Signer) *smx509.Certificate {
	if parent == nil {
		parent = template
	}
	raw, err := smx509.CreateCertificate(rand.Reader, template, parent, pub, priv)
	if err != nil {
		panic(err)
	}
	cert, err := smx509.ParseCertificate(raw)
	if err != nil {
		panic(err)
	}
	return cert
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

func write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func certPEM(cert *smx509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func keyPEM(t *testing.T, key any) []byte {
	t.Helper()
	raw, err := smx509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

func openssl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
	return string(out), err
}

func mustOpenSSL(t *testing.T, args ...string) string {
	t.Helper()
	out, err := openssl(t, args...)
	if err != nil {
		t.Fatalf("openssl %v: %v\n%s", args, err, out)
	}
	return out
}

var bcJars = []string{"/usr/share/java/bcprov.jar", "/usr/share/java/bcpkix.jar", "/usr/share/java/bcutil.jar"}

var errNoBouncyCastle = errors.New("javac, java or Bouncy Castle (libbcpkix-java) is not installed")

// bouncyCastle compiles package cms's BCCheck.java, once, and answers the class path.
var bouncyCastle = sync.OnceValues(func() (string, error) {
	for _, tool := range []string{"java", "javac"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", errNoBouncyCastle
		}
	}
	for _, jar := range bcJars {
		if _, err := os.Stat(jar); err != nil {
			return "", errNoBouncyCastle
		}
	}
	jars := strings.Join(bcJars, ":")
	source := filepath.Join("..", "appliance", "cms", "testdata", "BCCheck.java")
	if out, err := exec.Command("javac", "-cp", jars, "-d", classes, source).CombinedOutput(); err != nil {
		return "", errors.New("javac: " + string(out))
	}
	return classes + ":" + jars, nil
})

var classes string // folder for compiled Java

func TestMain(m *testing.M) {
	flag.Parse()
	var err error
	if classes, err = os.MkdirTemp("", "bccheck"); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(classes)
	os.Exit(code)
}

func bcCheck(t *testing.T, args ...string) (string, error) {
	t.Helper()
	path, err := bouncyCastle()
	if errors.Is(err, errNoBouncyCastle) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	argv := append([]string{"-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", path, "BCCheck"}, args...)
	out, err := exec.CommandContext(t.Context(), "java", argv...).CombinedOutput()
	if err == nil && !strings.HasPrefix(string(out), "OK") {
		t.Fatalf("BCCheck %v: no verdict: %s", args, out)
	}
	return string(out), err
}

func mustBCCheck(t *testing.T, args ...string) string {
	t.Helper()
	out, err := bcCheck(t, args...)
	if err != nil {
		t.Fatalf("BCCheck %v: %v\n%s", args, err, out)
	}
	return out
}

var _ cms.Signer = softKey{}
