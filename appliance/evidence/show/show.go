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
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/tsa"
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

// LoadCosigner reads the log key of another campus, whose cosignatures count; "" is none.
func LoadCosigner(t *evidence.Trust, file string) error {
	if file == "" {
		return nil
	}
	key, err := ReadPublicKey(file)
	t.CosignerKeys = []crypto.PublicKey{key}
	return err
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

// maxList bounds a revocation list, in bytes.
const maxList = 64 << 20

// ReadCRLs reads all *.crl of a folder; "" is none.
func ReadCRLs(dir string) ([]*pki.CRL, error) {
	if dir == "" {
		return nil, nil
	}
	if info, err := os.Stat(dir); err != nil {
		return nil, err
	} else if !info.IsDir() {
		return nil, fmt.Errorf("--crls：%s 不是文件夹 (not a folder)", dir)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.crl"))
	if err != nil {
		return nil, err
	}
	var out []*pki.CRL
	for _, name := range files {
		der, err := ReadFile(name, nil, maxList)
		if err != nil {
			return nil, err
		}
		l, err := pki.ParseCRL(der)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, l)
	}
	return out, nil
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

// A Stamp is what a timestamp token says, for people; nothing of it is verified.
type Stamp struct {
	GenTime    string   `json:"gen_time"` // RFC 3339, UTC
	Accuracy   string   `json:"accuracy,omitempty"`
	Serial     string   `json:"serial"` // hex
	Policy     string   `json:"policy"`
	Algorithm  string   `json:"imprint_algorithm"` // of the imprint
	Imprint    string   `json:"imprint"`           // hex
	Nonce      string   `json:"nonce,omitempty"`
	Ordering   bool     `json:"ordering"`
	Signer     string   `json:"signer,omitempty"` // subject of the certificate that signed, if it is in the token
	NotAfter   string   `json:"signer_not_after,omitempty"`
	Chain      []string `json:"certificates"` // subjects of all that are in it
	Lists      int      `json:"crls"`
	OuterType  string   `json:"content_type"`
	Evaluation bool     `json:"evaluation,omitempty"` // the signer's certificate is for evaluation only
}

var imprintNames = map[string]string{
	cms.OIDSM3.String(): "SM3", cms.OIDSHA256.String(): "SHA-256", cms.OIDSHA384.String(): "SHA-384", cms.OIDSHA512.String(): "SHA-512",
}

// StampOf reads what a token says.
func StampOf(t *tsa.Token) *Stamp {
	out := &Stamp{
		GenTime: t.GenTime.UTC().Format(time.RFC3339Nano), Serial: fmt.Sprintf("%x", t.Serial), Policy: t.Policy.String(), Ordering: t.Ordering,
		Algorithm: t.Imprint.Algorithm.String(), Imprint: fmt.Sprintf("%x", t.Imprint.Digest), Chain: []string{},
		Lists: len(t.Message().CRLs), OuterType: t.Message().OuterType.String(),
	}
	if name, ok := imprintNames[out.Algorithm]; ok {
		out.Algorithm = name
	}
	if t.Accuracy > 0 {
		out.Accuracy = t.Accuracy.String()
	}
	if t.Nonce != nil {
		out.Nonce = fmt.Sprintf("%x", t.Nonce)
	}
	for _, c := range t.Certificates() {
		out.Chain = append(out.Chain, c.Subject.String())
	}
	if report, _ := t.Verify(t.Imprint); report.Signer != nil {
		out.Signer, out.NotAfter = report.Signer.Subject.String(), report.Signer.NotAfter.UTC().Format(time.RFC3339)
		out.Evaluation = pki.IsEvaluation(report.Signer)
	}
	return out
}

// PrintStamp shows what a token says, Chinese first.
func PrintStamp(w io.Writer, s *Stamp) {
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s：%s\n", name, Plain(value))
		}
	}
	line("时间 genTime", s.GenTime)
	line("准确度 accuracy", s.Accuracy)
	line("序列号 serial", s.Serial)
	line("策略 policy", s.Policy)
	line("所盖摘要 imprint", s.Algorithm+" "+s.Imprint)
	line("随机数 nonce", s.Nonce)
	line("签发者 signer", s.Signer)
	line("其证书到期 its certificate ends", s.NotAfter)
	for _, c := range s.Chain {
		line("内含证书 certificate", c)
	}
	if s.Lists > 0 {
		fmt.Fprintf(w, "内含吊销列表 CRLs：%d\n", s.Lists)
	}
	if s.Evaluation {
		fmt.Fprintln(w, "! 证书仅供评估，不具法律效力 (the certificate is for evaluation only)")
	}
	fmt.Fprintln(w, "以上未经验证：验证用 ts verify (nothing of this was verified: that is ts verify)")
}
