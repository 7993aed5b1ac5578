package main_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// handshake has OpenSSL connect and check the certificate against tls-ca.pem.
func (m *machine) handshake(t *testing.T, flags ...string) outcome {
	t.Helper()
	argv := []string{"openssl", "s_client", "-connect", strings.TrimPrefix(m.ends.API, "https://"), "-CAfile", m.ends.TLSCA,
		"-verify_return_error", "-verify_ip", "127.0.0.1"}
	return command(t, nil, append(argv, flags...)...)
}

// The listener's key is made in the cipher machine and is nowhere on the disk.
func TestTLSKeyInTheCipherMachine(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	o := m.handshake(t)
	for _, w := range []string{"Verify return code: 0 (ok)", "New, TLSv1.3", "Peer signature type: RSA-PSS", "Peer signing digest: SHA256"} {
		if !strings.Contains(o.stdout, w) {
			t.Errorf("openssl s_client: %v; want %q", o, w)
		}
	}
	s := m.state(t)
	if s.HSM["tls"].Phase != "ready" {
		t.Errorf("slot tls: %+v", s.HSM["tls"])
	}
	if all := strings.Join(s.Warnings, "\n"); strings.Contains(all, "TLS 私钥是文件") {
		t.Errorf("warnings: %s", all)
	}
	err := filepath.WalkDir(filepath.Join(dir, "secrets"), func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(name)
		if bytes.Contains(b, []byte("PRIVATE KEY")) || len(b) > 64 {
			t.Errorf("%s may be a key", name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	m.stop(t)
}
