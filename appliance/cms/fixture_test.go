package cms_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
)

var update = flag.Bool("update", false, "record the exchanges in testdata anew; needs the peers")

// softKey is a signer in memory, standing in for hsm.Key.
type softKey struct {
	key crypto.Signer // *sm2.PrivateKey or *rsa.PrivateKey
}

func (k softKey) Public() crypto.PublicKey { return k.key.Public() }

func (k softKey) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if key, ok := k.key.(*rsa.PrivateKey); ok {
		digest := sha256.Sum256(message)
		return rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	}
	return k.key.Sign(rand.Reader, message, sm2.DefaultSM2SignerOpts)
}

// A person signs: a key, its certificate, and the CA's above it.
type person struct {
	key      softKey
	cert, ca *smx509.Certificate
}

func (p *person) chain() [][]byte { return [][]byte{p.cert.Raw, p.ca.Raw} }

var (
	sm2Person = sync.OnceValue(func() *person { return newPerson(newSM2Key(), newSM2Key()) })
	rsaPerson = sync.OnceValue(func() *person { return newPerson(newRSAKey(2048), newRSAKey(2048)) })
	people    = map[string]func() *person{"sm2": sm2Person, "rsa": rsaPerson}
)

func newSM2Key() crypto.Signer {
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func newRSAKey(bits int) crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return key
}

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newPerson(key, caKey crypto.Signer) *person {
	ca := issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA", Organization: []string{"Hospital"}},
		NotBefore: epoch, NotAfter: epoch.AddDate(20, 0, 0), IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1,
		KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, caKey.Public(), caKey)
	cert := issue(&smx509.Certificate{
		SerialNumber: big.NewInt(0x8123456789), Subject: pkix.Name{CommonName: "张医生"},
		NotBefore: epoch, NotAfter: epoch.AddDate(5, 0, 0), SubjectKeyId: []byte("key of doctor Zhang"),
		KeyUsage: smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment,
	}, ca, key.Public(), caKey)
	return &person{softKey{key}, cert, ca}
}

func issue(template, parent *smx509.Certificate, pub crypto.PublicKey, priv crypto.Signer) *smx509.Certificate {
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

func write(t *testing.T, path string, data []byte) string {
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

func certPEM(certs ...*smx509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func parsePEM(t testing.TB, data []byte) *smx509.Certificate {
	t.Helper()
	cert, err := smx509.ParseCertificatePEM(data)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func keyPEM(t *testing.T, key any) []byte {
	t.Helper()
	raw, err := smx509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

func publicPEM(t *testing.T, key any) []byte {
	t.Helper()
	raw, err := smx509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: raw})
}

// openssl runs the command and answers its output.
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

// bouncyCastle compiles testdata/BCCheck.java, once, and answers the class path.
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
	out, err := exec.Command("javac", "-cp", jars, "-d", classes, filepath.Join("testdata", "BCCheck.java")).CombinedOutput()
	if err != nil {
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

func mustBCCheck(t *testing.T, args ...string) {
	t.Helper()
	if out, err := bcCheck(t, args...); err != nil {
		t.Fatalf("BCCheck %v: %v\n%s", args, err, out)
	}
}
