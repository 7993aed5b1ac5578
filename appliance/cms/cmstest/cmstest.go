// Package cmstest runs the judges from outside, OpenSSL and Bouncy Castle, and makes the keys, certificates and PEM files
// that are put before them. A judge that is not installed skips the test.
package cmstest

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
)

// NewSM2Key makes a key.
func NewSM2Key() crypto.Signer {
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

// NewRSAKey makes a key of that many bits.
func NewRSAKey(bits int) crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return key
}

// SignMessage signs as hsm.Key does: SM2 with the default identity, or RSASSA-PKCS1-v1_5 with SHA-256.
func SignMessage(ctx context.Context, key crypto.Signer, message []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if key, ok := key.(*rsa.PrivateKey); ok {
		digest := sha256.Sum256(message)
		return rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	}
	return key.Sign(rand.Reader, message, sm2.DefaultSM2SignerOpts)
}

// Issue makes a certificate; without a parent it is the template's own.
func Issue(template, parent *smx509.Certificate, pub crypto.PublicKey, priv crypto.Signer) *smx509.Certificate {
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

// Write makes a file and answers its path.
func Write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Read answers a file's content.
func Read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// CertPEM is certificates in PEM.
func CertPEM(certs ...*smx509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// KeyPEM is a private key in PEM (PKCS#8).
func KeyPEM(t testing.TB, key any) []byte {
	t.Helper()
	raw, err := smx509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

// OpenSSL runs the command and answers its output, both streams.
func OpenSSL(t testing.TB, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
	return string(out), err
}

// MustOpenSSL is OpenSSL where it has to succeed.
func MustOpenSSL(t testing.TB, args ...string) string {
	t.Helper()
	out, err := OpenSSL(t, args...)
	if err != nil {
		t.Fatalf("openssl %v: %v\n%s", args, err, out)
	}
	return out
}

var jars = []string{"/usr/share/java/bcprov.jar", "/usr/share/java/bcpkix.jar", "/usr/share/java/bcutil.jar"}

var errNoBouncyCastle = errors.New("javac, java or Bouncy Castle (libbcpkix-java) is not installed")

//go:embed BCCheck.java
var source []byte

// Compile compiles BCCheck.java in a folder and answers the command that runs it. The error says that it cannot be had.
func Compile(folder string) ([]string, error) { return compile(folder, "BCCheck", source) }

func compile(folder, class string, source []byte) ([]string, error) {
	for _, tool := range []string{"java", "javac"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, errNoBouncyCastle
		}
	}
	for _, jar := range jars {
		if _, err := os.Stat(jar); err != nil {
			return nil, errNoBouncyCastle
		}
	}
	path := strings.Join(jars, ":")
	file := filepath.Join(folder, class+".java")
	if err := os.WriteFile(file, source, 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.Command("javac", "-cp", path, "-d", folder, file).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("javac: %w\n%s", err, out)
	}
	return []string{"java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", folder + ":" + path, class}, nil
}

// JudgeOf compiles another class with Bouncy Castle beside it, whose successes begin with OK as BCCheck's do, and answers
// what runs it: its output, and an error when it refused. Without Bouncy Castle the test is skipped.
func JudgeOf(t testing.TB, class string, source []byte) func(args ...string) (string, error) {
	t.Helper()
	java, err := compile(t.TempDir(), class, source)
	if errors.Is(err, errNoBouncyCastle) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func(args ...string) (string, error) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), java[0], append(slices.Clone(java[1:]), args...)...).CombinedOutput()
		if err == nil && !strings.HasPrefix(string(out), "OK") {
			t.Fatalf("%s %v: no verdict: %s", class, args, out)
		}
		return string(out), err
	}
}

var command = sync.OnceValues(func() ([]string, error) { return Compile(folder) })

var folder string // for what is compiled

// Main runs a package's tests and removes what was compiled for them: the TestMain of packages that ask Bouncy Castle.
func Main(m *testing.M) {
	var err error
	if folder, err = os.MkdirTemp("", "bccheck"); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(folder)
	os.Exit(code)
}

// BouncyCastle runs BCCheck and answers its output; the error says that it refused.
func BouncyCastle(t testing.TB, args ...string) (string, error) {
	t.Helper()
	if folder == "" {
		t.Fatal("cmstest.Main has to be this package's TestMain")
	}
	java, err := command()
	if errors.Is(err, errNoBouncyCastle) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), java[0], append(slices.Clone(java[1:]), args...)...).CombinedOutput()
	if err == nil && !strings.HasPrefix(string(out), "OK") {
		t.Fatalf("BCCheck %v: no verdict: %s", args, out)
	}
	return string(out), err
}

// MustBouncyCastle is BouncyCastle where it has to accept.
func MustBouncyCastle(t testing.TB, args ...string) string {
	t.Helper()
	out, err := BouncyCastle(t, args...)
	if err != nil {
		t.Fatalf("BCCheck %v: %v\n%s", args, err, out)
	}
	return out
}
