package diag_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"math/rand/v2"
	"strings"
	"testing"

	"yinjian/appliance/diag"
)

// A secret is found in every form, wherever it stands, and nothing of it is left.
func TestScannerFindsEveryForm(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 500 {
		secret := make([]byte, 6+r.IntN(60))
		for j := range secret {
			secret[j] = byte('!' + r.IntN(90))
		}
		if i%3 == 0 { // a key of bytes, which no line ends in white space
			for j := range secret {
				secret[j] = byte(0x80 + r.IntN(128))
			}
		}
		var s diag.Scanner
		s.Add("it", secret)
		around := make([]byte, r.IntN(50))
		for j := range around {
			around[j] = byte(r.IntN(256))
		}
		whole := append(append(bytes.Clone(around), secret...), around...)
		for name, text := range map[string][]byte{
			"raw": whole, "hex": []byte(hex.EncodeToString(whole)), "HEX": bytes.ToUpper([]byte(hex.EncodeToString(whole))),
			"base64": []byte(base64.StdEncoding.EncodeToString(whole)), "base64url": []byte(base64.RawURLEncoding.EncodeToString(whole)),
		} {
			if strings.HasPrefix(name, "base64") && len(secret) < 10 {
				continue // too few characters are its own
			}
			if found := s.Find(text); len(found) != 1 || found[0] != "it" {
				t.Fatalf("%s of %q: found %q", name, secret, found)
			}
			clean, found := s.Clean(text, false)
			if len(found) != 1 || len(s.Find(clean)) != 0 || !bytes.Contains(clean, []byte(diag.Hidden)) {
				t.Fatalf("%s of %q: %q, %q", name, secret, clean, found)
			}
		}
	}
}

// What looks like a secret is taken out of free text; what does not is left as it was.
func TestScannerLooks(t *testing.T) {
	t.Parallel()
	var s diag.Scanner
	s.Add("pin", []byte("271828\n"))
	s.Add("short", []byte("1234"))
	if len(s.Short()) != 1 || s.Short()[0] != "short" {
		t.Errorf("short: %q", s.Short())
	}
	for _, line := range []string{
		"-----BEGIN EC PRIVATE KEY-----\nCANARY\nCANARY\n-----END EC PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\nCANARY", "dsn=postgres://user:CANARY@host/db",
		`Authorization: Bearer CANARYCANARY`, `msg="x" password=CANARY next`, `"pin": "CANARY", "a": 1`, `{"secret":"CANARY with space"}`, "token: CANARY", "PASSPHRASE='CANARY'", "api_key=CANARY", "271828",
	} {
		clean, found := s.Clean([]byte("before "+line+" after"), true)
		if len(found) == 0 || bytes.Contains(clean, []byte("CANARY")) || bytes.Contains(clean, []byte("271828")) {
			t.Errorf("%q: %q, %q", line, clean, found)
		}
	}
	for _, line := range []string{
		`time="2026-03-04T05:06:07Z" level=info msg="worker ready" slot=staff`, "https://192.0.2.1:8443/v1/sign", "-----BEGIN CERTIFICATE-----", "pins=2 spinning: true", "1234",
	} {
		if clean, found := s.Clean([]byte(line), true); string(clean) != line || len(found) > 0 {
			t.Errorf("%q became %q: %q", line, clean, found)
		}
	}
}
