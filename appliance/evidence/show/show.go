// Package show reads trust from files and shows reports to people. The appliance's own command and the offline verifier
// share it, so that both say the same.
package show

import (
	"bytes"
	"crypto"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// maxTrust bounds a file of certificates or keys, in bytes; a folder of CAs has a few kilobytes.
const maxTrust = 4 << 20

// ReadFile reads a file of limit bytes at most, so that a file that is no end of is not read to it. "-" is stdin.
func ReadFile(name string, stdin io.Reader, limit int64) ([]byte, error) {
	in := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s: 超过 %d MiB，不予读取 (more than %d MiB is not read)", name, limit>>20, limit>>20)
	}
	return b, err
}

// LoadTrust reads anchors from a PEM file, or from all *.pem of a folder that are CA certificates.
func LoadTrust(anchors, logKey string) (evidence.Trust, error) {
	var t evidence.Trust
	files := []string{anchors}
	st, err := os.Stat(anchors)
	if err != nil {
		return t, err
	}
	if st.IsDir() {
		if files, err = filepath.Glob(filepath.Join(anchors, "*.pem")); err != nil {
			return t, err
		}
	}
	for _, name := range files {
		b, err := ReadFile(name, nil, maxTrust)
		if err != nil {
			return t, err
		}
		if st.IsDir() && !bytes.Contains(b, []byte("BEGIN CERTIFICATE")) {
			continue // the log's key may lie beside the anchors
		}
		certs, err := pki.ParseCertificatePEMs(b)
		if err != nil {
			return t, fmt.Errorf("%s: %w", name, err)
		}
		for _, c := range certs {
			if damaged(c) {
				return t, fmt.Errorf("%s: %s 的自签名不成立，文件已损坏或算法不受支持 (the anchor's own signature does not verify: the file is damaged, or of an unknown algorithm)", name, c.Subject)
			}
			if c.IsCA {
				t.Anchors = append(t.Anchors, c)
			}
		}
	}
	if len(t.Anchors) == 0 {
		return t, fmt.Errorf("%s 中没有 CA 证书 (no CA certificate found)", anchors)
	}
	if logKey == "" {
		return t, nil
	}
	key, err := ReadPublicKey(logKey)
	if err != nil {
		return t, err
	}
	t.LogKeys = []crypto.PublicKey{key}
	return t, nil
}

// damaged reports whether a certificate that should be signed by its own key is not: one that names itself as issuer, or
// names no other key (RFC 5280 §4.2.1.1 lets only such leave it out). An anchor is believed without proof; this only
// shows that its file is what was once handed over. Old roots are signed by algorithms that nobody checks any more.
func damaged(c *smx509.Certificate) bool {
	if !bytes.Equal(c.RawSubject, c.RawIssuer) && len(c.AuthorityKeyId) > 0 && !bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId) {
		return false
	}
	err := c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature)
	var old smx509.InsecureAlgorithmError
	return err != nil && !errors.As(err, &old)
}

// ReadPublicKey reads a PEM SubjectPublicKeyInfo.
func ReadPublicKey(name string) (crypto.PublicKey, error) {
	b, err := ReadFile(name, nil, maxTrust)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("%s: 不是 PEM 公钥 (not a PEM public key)", name)
	}
	key, err := smx509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return key, nil
}

var statusMarks = map[pki.Status]string{pki.Passed: "✓", pki.Failed: "✗", pki.NotChecked: "–"}

// Mark is one character for a status.
func Mark(s pki.Status) string { return statusMarks[s] }

// Plain is text that somebody else wrote, fit for a terminal: what would move the cursor, clear the screen, begin a line
// or turn the order of characters is spelt out. A verdict must not be overwritten by what it is about.
func Plain(s string) string {
	var b strings.Builder
	for _, r := range s {
		if problem.Misleads(r) {
			fmt.Fprintf(&b, "<U+%04X>", r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// Print shows a report to people, Chinese first.
func Print(w io.Writer, r *evidence.Report) {
	fmt.Fprintf(w, "结论 verdict: %s — %s\n", r.Verdict, r.Summary)
	if len(r.Missing) > 0 {
		fmt.Fprintf(w, "缺少 missing: %s\n", strings.Join(r.Missing, " "))
	}
	if r.Signer != "" {
		fmt.Fprintf(w, "签名人 signer: %s\n", Plain(r.Signer))
	}
	if r.GenTime != "" {
		fmt.Fprintf(w, "签署时间 time: %s ± %s\n", r.GenTime, r.Accuracy)
	}
	for _, c := range r.Checks {
		fmt.Fprintf(w, "  %s %-34s %s\n", statusMarks[c.Status], c.ID, Plain(c.Detail))
	}
	for _, s := range r.Statements {
		fmt.Fprintf(w, "  ! %s\n", Plain(s))
	}
	fmt.Fprintln(w, "（✓ 通过 passed   ✗ 未通过 failed   – 未检查 not checked）")
}

// Algorithm is the name by which signatures under the certificate's key go: "SM2" or "RSA-2048".
func Algorithm(c *smx509.Certificate) string {
	if c.PublicKeyAlgorithm == smx509.RSA {
		return "RSA-2048"
	}
	return "SM2"
}
