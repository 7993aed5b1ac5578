package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// openssl ts beside our service: it has no server, each token is a command.

// opensslConfig is for "openssl ts -reply", its folder to be filled in.
const opensslConfig = `[tsa]
default_tsa = bench
[bench]
dir = %[1]s
serial = $dir/serial
crypto_device = builtin
signer_cert = $dir/tsa.pem
signer_key = $dir/tsa.key
signer_digest = sha256
default_policy = 2.999.1
digests = sha256
accuracy = secs:1
`

// openssl makes what the command needs, and answers the case; nil where there is no openssl.
func (b *tsaBench) openssl() (func(context.Context, *tsaCase) (tsaSample, error), error) {
	program, err := exec.LookPath("openssl")
	if err != nil {
		return nil, nil
	}
	dir := filepath.Join(b.dir, "openssl")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	purpose, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}}) // timeStamping, which has to be critical (RFC 3161 §2.3)
	if err != nil {
		return nil, err
	}
	certificate := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "openssl ts, measured"}, NotBefore: benchTime.AddDate(-1, 0, 0), NotAfter: benchTime.AddDate(30, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: purpose}},
	}
	der, err := x509.CreateCertificate(rand.Reader, certificate, certificate, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	config, query, reply := filepath.Join(dir, "openssl.cnf"), filepath.Join(dir, "query.tsq"), filepath.Join(dir, "reply.tsr")
	for name, text := range map[string][]byte{
		config: fmt.Appendf(nil, opensslConfig, dir), query: b.query, filepath.Join(dir, "serial"): []byte("01\n"),
		filepath.Join(dir, "tsa.pem"): pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		filepath.Join(dir, "tsa.key"): pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
	} {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			return nil, err
		}
	}
	one := func(ctx context.Context, _ int) error {
		if out, err := exec.CommandContext(ctx, program, "ts", "-reply", "-config", config, "-queryfile", query, "-out", reply).CombinedOutput(); err != nil {
			return fmt.Errorf("openssl ts: %w\n%s", err, out)
		}
		token, err := os.ReadFile(reply)
		if err != nil {
			return err
		}
		return errors.Join(granted(token), os.Remove(reply))
	}
	return func(ctx context.Context, c *tsaCase) (s tsaSample, err error) {
		var before, after syscall.Rusage // of children that have ended: the servers go on
		if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &before); err != nil {
			return s, err
		}
		begun := time.Now() // interval
		var took histogram
		run := &benchCase{Conns: 1, op: one}
		if s.Ops, err = run.timed(ctx, b.each, &took); err != nil {
			return s, err
		}
		s.Seconds, s.P50, s.P99 = time.Since(begun).Seconds(), took.quantile(0.5), took.quantile(0.99)
		if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &after); err != nil {
			return s, err
		}
		s.CPU = float64(after.Utime.Nano()+after.Stime.Nano()-before.Utime.Nano()-before.Stime.Nano()) / 1000 / float64(s.Ops)
		return s, nil
	}, nil
}
