package main_test

import (
	"bytes"
	"crypto/tls"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
)

// A hospitalCA is a root with an intermediate, kept by `openssl ca` as a small CA would be.
type hospitalCA struct {
	t   *testing.T
	dir string
	sm2 bool
}

// sigopt is OpenSSL's way to say the identity that everybody else takes for granted (GM/T 0009-2012 §10).
const sigopt = "distid:1234567812345678"

const caConfig = `
[ca]
default_ca = sub
[root]
dir = .
database = root.index
new_certs_dir = .
certificate = root.crt
private_key = root.key
rand_serial = yes
unique_subject = no
default_md = %[1]s
default_days = 3000
default_crl_days = 30
policy = any
crlnumber = root.crlnumber
crl_extensions = crl
string_mask = utf8only
[sub]
dir = .
database = sub.index
new_certs_dir = .
certificate = sub.crt
private_key = sub.key
rand_serial = yes
unique_subject = no
default_md = %[1]s
default_days = 365
default_crl_days = 7
policy = any
copy_extensions = none
preserve = yes
crlnumber = sub.crlnumber
crl_extensions = crl
[any]
countryName = optional
organizationName = optional
organizationalUnitName = optional
commonName = supplied
serialNumber = optional
[req]
distinguished_name = dn
string_mask = utf8only
utf8 = yes
[dn]
[authority]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[staff]
keyUsage = critical,digitalSignature,nonRepudiation
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[encryption]
keyUsage = critical,keyEncipherment,dataEncipherment,keyAgreement
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[tsa]
keyUsage = critical,digitalSignature,nonRepudiation
extendedKeyUsage = critical,timeStamping
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[tls]
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = IP:127.0.0.1,DNS:localhost
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[client]
keyUsage = critical,digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[log]
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,2.999.3.1
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[crl]
authorityKeyIdentifier = keyid
`

func newHospitalCA(t *testing.T, sm2 bool) *hospitalCA {
	t.Helper()
	need(t, "openssl")
	ca := &hospitalCA{t: t, dir: tempDir(t), sm2: sm2}
	md, kind := "sha256", "RSA"
	if sm2 {
		md, kind = "sm3", "SM2"
	}
	ca.write("ca.cnf", fmt.Sprintf(caConfig, md))
	for _, level := range []string{"root", "sub"} {
		ca.write(level+".index", "")
		ca.write(level+".crlnumber", "01\n")
		if sm2 {
			ca.openssl("genpkey", "-algorithm", "SM2", "-out", level+".key")
		} else {
			ca.openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", level+".key")
		}
	}
	subject := func(name string) string { return "/C=CN/O=市数字证书认证中心/CN=" + kind + " " + name }
	ca.signed("req", "-config", "ca.cnf", "-x509", "-new", "-key", "root.key", "-"+md, "-days", "3650", "-subj", subject("根"), "-extensions", "authority", "-out", "root.crt")
	ca.signed("req", "-config", "ca.cnf", "-new", "-key", "sub.key", "-"+md, "-subj", subject("二级"), "-out", "sub.csr")
	ca.ca("root", "-in", "sub.csr", "-out", "sub.crt", "-extensions", "authority")
	return ca
}

func (ca *hospitalCA) path(name string) string { return filepath.Join(ca.dir, name) }

func (ca *hospitalCA) write(name, text string) {
	ca.t.Helper()
	if err := os.WriteFile(ca.path(name), []byte(text), 0o600); err != nil {
		ca.t.Fatal(err)
	}
}

func (ca *hospitalCA) openssl(args ...string) {
	ca.t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Dir = ca.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		ca.t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// signed adds the identity to a command that signs.
func (ca *hospitalCA) signed(args ...string) {
	ca.t.Helper()
	if ca.sm2 {
		args = append(args[:1:1], append([]string{"-sigopt", sigopt}, args[1:]...)...)
	}
	ca.openssl(args...)
}

// ca has a level's CA do something.
func (ca *hospitalCA) ca(level string, args ...string) {
	ca.t.Helper()
	all := append([]string{"ca", "-batch", "-notext", "-config", "ca.cnf", "-name", level}, args...)
	if i := slices.Index(args, "-in"); i >= 0 && ca.isSM2(args[i+1]) { // how the request is verified
		all = append(all, "-vfyopt", sigopt)
	}
	ca.signed(all...)
}

func (ca *hospitalCA) isSM2(csr string) bool {
	ca.t.Helper()
	if !filepath.IsAbs(csr) {
		csr = ca.path(csr)
	}
	b, err := os.ReadFile(csr)
	if err != nil {
		ca.t.Fatal(err)
	}
	r, err := smx509.ParseCertificateRequestPEM(b)
	if err != nil {
		ca.t.Fatal(err)
	}
	return r.SignatureAlgorithm == smx509.SM2WithSM3
}

// issue checks a request as a CA does (RFC 2986 §4.2) and answers the file of the certificate.
func (ca *hospitalCA) issue(csr, profile string, more ...string) string {
	ca.t.Helper()
	check := []string{"req", "-in", csr, "-verify", "-noout"}
	if ca.isSM2(csr) {
		check = append(check, "-vfyopt", sigopt)
	}
	ca.openssl(check...)
	out := strings.TrimSuffix(csr, ".csr") + ".crt"
	ca.ca("sub", append([]string{"-in", csr, "-out", out, "-extensions", profile}, more...)...)
	return out
}

// lists makes new lists of both levels and answers their files.
func (ca *hospitalCA) lists() []string {
	ca.t.Helper()
	for _, level := range []string{"root", "sub"} {
		ca.ca(level, "-gencrl", "-out", level+".crl")
	}
	return []string{ca.path("root.crl"), ca.path("sub.crl")}
}

func (ca *hospitalCA) revoke(cert string) {
	ca.t.Helper()
	ca.ca("sub", "-revoke", cert, "-crl_reason", "keyCompromise")
}

// offlineVerifier is yinjian-verify, built once.
var offlineVerifier = sync.OnceValues(func() (string, error) {
	name := filepath.Join(built.dir, "yinjian-verify")
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", name, "../yinjian-verify").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return name, nil
})

// judgeAlone holds evidence against the roots given and the log's key, with nothing else at hand.
func (m *machine) judgeAlone(t *testing.T, bundle []byte, document []byte, anchors ...string) evidence.Report {
	t.Helper()
	return m.judgeWith(t, nil, bundle, document, anchors...)
}

// judgeWith is judgeAlone with more arguments.
func (m *machine) judgeWith(t *testing.T, flags []string, bundle []byte, document []byte, anchors ...string) evidence.Report {
	t.Helper()
	verifier, err := offlineVerifier()
	if err != nil {
		t.Fatal(err)
	}
	dir := tempDir(t)
	trusted := filepath.Join(dir, "anchors")
	err = os.Mkdir(trusted, 0o700)
	for i, a := range anchors {
		b, rerr := os.ReadFile(a)
		err = errors.Join(err, rerr, os.WriteFile(filepath.Join(trusted, fmt.Sprintf("%d.pem", i)), b, 0o600))
	}
	err = errors.Join(err, os.WriteFile(filepath.Join(dir, "evidence.json"), bundle, 0o600), os.WriteFile(filepath.Join(dir, "document"), document, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	args := append([]string{verifier, "--anchors", trusted, "--log-key", filepath.Join(m.dir, "log.pem"), "--document", filepath.Join(dir, "document"), "-o", "json"}, flags...)
	o := command(t, nil, append(args, filepath.Join(dir, "evidence.json"))...)
	var r evidence.Report
	if err := json.Unmarshal([]byte(o.stdout), &r); err != nil {
		t.Fatalf("yinjian-verify: %v", o)
	}
	return r
}

func (m *machine) certificates(t *testing.T) (lines []account.CertificateLine) {
	t.Helper()
	o := mustRun(t, "cert", "list", "--dir", m.dir, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &lines); err != nil {
		t.Fatal(err)
	}
	return lines
}

// table writes a CSV file.
func table(t *testing.T, name string, rows [][]string) string {
	t.Helper()
	var b bytes.Buffer
	if err := csv.NewWriter(&b).WriteAll(rows); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func results(t *testing.T, name string) (out map[string]string) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(bytes.NewReader(bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")))).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	out = map[string]string{}
	for _, r := range rows[1:] {
		out[r[0]+" "+r[1]] = r[4] + " " + r[5]
	}
	return out
}

// TestCertificatesFromARealCA is a hospital's first year with certificates from a CA: twenty doctors in a table, lists from
// the CA's web server, a renewal that overlaps, a revocation, and a restart. The CA is OpenSSL's; whoever judges the
// evidence has the CA's root and the log's key, and nothing of ours.
func TestCertificatesFromARealCA(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	server := startTimeServer(t)
	ca := newHospitalCA(t, true)
	rsaCA := newHospitalCA(t, false)
	dir := initAppliance(t, server)
	web := struct {
		*httptest.Server
		down atomic.Bool
	}{}
	web.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if web.down.Load() {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		http.ServeFile(w, r, ca.path(filepath.Base(r.URL.Path)))
	}))
	t.Cleanup(web.Close)
	configure(t, dir, func(c *appliance.Config) {
		c.Trust.CRL = []appliance.CRLSource{{URL: web.URL + "/root.crl", Interval: appliance.Duration(time.Hour)}, {URL: web.URL + "/sub.crl", Interval: appliance.Duration(time.Hour)}}
	})
	web.down.Store(true) // the CA has published nothing yet
	m := serve(t, dir)
	m.trusted(t)
	app := m.register(t, "his", "--consent", "app-asserted")
	work := tempDir(t)

	// 1. Anchors: the SM2 root for signers, units and the log, the RSA root for the listener.
	mustRun(t, "cert", "anchor", "add", ca.path("root.crt"), "--dir", dir, "--use", "staff,tsa,log", "--note", "市 CA SM2 根")
	mustRun(t, "cert", "anchor", "add", rsaCA.path("root.crt"), "--dir", dir, "--use", "tls", "--note", "市 CA RSA 根")
	if o := mustRun(t, "cert", "anchor", "list", "--dir", dir); !strings.Contains(o.stdout, "市 CA SM2 根") {
		t.Errorf("%v", o)
	}
	m.changeOf(t, "/admin/v1/anchors", "trust.anchor/outcome", "", "", `"note":"市 CA RSA 根"`)
	mustRun(t, "cert", "chain", "add", ca.path("sub.crt"), "--dir", dir)
	m.changeOf(t, "/admin/v1/intermediates", "trust.intermediates/outcome", "", `{"known":0}`, `"certificates":["sm3:`)

	// 2. Requests: a table of twenty, and three rows that are wrong, which do not keep the others from theirs. It is made
	// twice, as after an interruption: the requests are the same.
	people := [][]string{{"姓名", "工号", "科室", "院区", "电话"}}
	for i := range 20 {
		people = append(people, []string{fmt.Sprintf("医师%02d", i), fmt.Sprintf("D%03d", i), "胸外科", "本部", "0571-1"})
	}
	staff := table(t, filepath.Join(work, "staff.csv"), append(people, []string{"", "D900", "", "", ""}, []string{"甲", "D/../1", "科", "本部", ""}, []string{"医师00", "D000", "胸外科", "本部", ""}))
	var first []byte
	for _, round := range []string{"first", "again"} {
		o := yinjian(t, "cert", "csr", "--dir", dir, "--csv", staff, "--out", filepath.Join(work, "csr"), "--enrol")
		if o.code != 1 || !strings.Contains(o.stdout, "23/23") || !strings.Contains(o.stdout, "成功 20，失败 3") || !strings.Contains(o.stderr, "电话") {
			t.Fatalf("%s: %v", round, o)
		}
		b, err := os.ReadFile(filepath.Join(work, "csr", "D007-SM2.csr"))
		if err != nil {
			t.Fatal(err)
		}
		if first != nil && !bytes.Equal(first, b) {
			t.Error("asked again, another request")
		}
		first = b
	}
	res := results(t, filepath.Join(work, "csr", "result.csv"))
	if !strings.HasPrefix(res["9 D007"], "成功") || !strings.Contains(res["22 D900"], "invalid_request") || !strings.Contains(res["24 D000"], "重复") || !strings.Contains(res["23 D/../1"], "工号须为") {
		t.Errorf("%v", res)
	}
	// Both algorithms of one signer in one table.
	both := table(t, filepath.Join(work, "both.csv"), [][]string{
		{"工号", "算法", "姓名", "科室", "院区"}, {"D110", "", "甲", "内科", "本部"}, {"D110", "RSA-2048", "甲", "内科", "本部"}})
	mustRun(t, "cert", "csr", "--dir", dir, "--csv", both, "--out", filepath.Join(work, "both"), "--enrol")
	_, err := app.Sign(t.Context(), "awaited", asserted("D000", "awaited"))
	wantCode(t, err, "certificate_awaited")

	// 3. The CA checks and signs each; they are imported by a table, with one that is another's and one that is missing.
	rows := [][]string{{"证书", "工号"}}
	for i := range 20 {
		id := fmt.Sprintf("D%03d", i)
		rows = append(rows, []string{filepath.Base(ca.issue(filepath.Join(work, "csr", id+"-SM2.csr"), "staff")), id})
	}
	rows = append(rows, []string{"D001-SM2.crt", "D002"}, []string{"none.crt", "D003"})
	certs := table(t, filepath.Join(work, "csr", "certs.csv"), rows)
	o := yinjian(t, "cert", "import", "--dir", dir, "--csv", certs)
	if o.code != 1 || !strings.Contains(o.stdout, "成功 20，失败 2") || !strings.Contains(o.stdout, "原因 (because) 没有在有效期内的吊销列表") {
		t.Fatalf("%v", o)
	}
	if res := results(t, certs+".result.csv"); !strings.Contains(res["22 D002"], "certificate_key_unknown") {
		t.Errorf("%v", res)
	}

	// 4. The appliance's own keys: units and the log under the SM2 root, the listener under the RSA one.
	own := func(key, profile string, ca *hospitalCA, flags ...string) string {
		t.Helper()
		csr := filepath.Join(work, strings.ReplaceAll(key, ":", "-")+".csr")
		mustRun(t, append([]string{"cert", "csr", "--dir", dir, "--for", key, "-o", csr}, flags...)...)
		crt := ca.issue(csr, profile)
		mustRun(t, "cert", "import", crt, "--dir", dir, "--chain", ca.path("sub.crt"))
		return crt
	}
	own("tsa:sm2", "tsa", ca)
	m.changeOf(t, "/admin/v1/certificates/requests", "certificate.request/outcome", "tsa:sm2", "", `"subject":"`)
	m.changeOf(t, "/admin/v1/certificates", "certificate.import/outcome", "tsa:sm2", `"certificates":["`, `"certificate":"sm3:`)
	// One comes as CAs like to send them: PKCS#7, with the chain inside.
	csr := filepath.Join(work, "tsa-rsa.csr")
	mustRun(t, "cert", "csr", "--dir", dir, "--for", "tsa:rsa", "-o", csr, "--subject", "CN=时间戳单元 RSA,O=某医院,C=CN")
	bundle := filepath.Join(work, "tsa-rsa.p7b")
	ca.openssl("crl2pkcs7", "-nocrl", "-certfile", ca.issue(csr, "tsa"), "-certfile", "sub.crt", "-outform", "DER", "-out", bundle)
	mustRun(t, "cert", "import", bundle, "--dir", dir)
	own("log", "log", ca)
	refused(t, 1, []string{"forbidden", "日志密钥不更换"}, "cert", "csr", "--dir", dir, "--for", "log", "--new-key")
	own("tls", "tls", rsaCA)

	// 5. Without lists nothing is signed; one comes from a file, the others from the CA's web server.
	lists := ca.lists()
	for _, l := range rsaCA.lists() {
		mustRun(t, "cert", "crl", "import", l, "--dir", dir)
	}
	m.changeOf(t, "/admin/v1/trust/crls", "trust.crl/outcome", "", "", `"source":"`)
	_, err = app.Sign(t.Context(), "no-list", asserted("D000", "no-list"))
	wantCode(t, err, "certificate_unusable")
	if o := mustRun(t, "status", "--dir", dir); !strings.Contains(o.stdout, "时间戳单元 sm2 拒绝盖时间戳") || !strings.Contains(o.stdout, "没有在有效期内的吊销列表") {
		t.Errorf("units without lists: %v", o)
	}
	if m.state(t).Ready {
		t.Error("ready, and no unit stamps")
	}
	mustRun(t, "cert", "crl", "import", lists[0], "--dir", dir)
	refused(t, 1, []string{"404"}, "cert", "crl", "fetch", "--dir", dir)
	web.down.Store(false)
	mustRun(t, "cert", "crl", "fetch", "--dir", dir)
	if o := mustRun(t, "cert", "crl", "list", "--dir", dir); strings.Count(o.stdout, "current") != 6 || strings.Contains(o.stdout, "status 404") { // a port may have these digits
		t.Errorf("%v", o)
	}
	if o := mustRun(t, "status", "--dir", dir); strings.Contains(o.stdout, "拒绝盖时间戳") {
		t.Errorf("units with lists: %v", o)
	}
	if !m.state(t).Ready {
		t.Error("not ready, and both units stamp")
	}

	// The listener answers new handshakes with the new certificate, which a client under the RSA root takes.
	under := func(root string) error {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(m.ends.API, "https://"), &tls.Config{RootCAs: roots(t, root), MinVersion: tls.VersionTLS13})
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := under(rsaCA.path("root.crt")); err != nil {
		t.Errorf("TLS under the CA's root: %v", err)
	}
	app = m.client(t, "his") // tls-ca.pem has the new root too

	// 6. Signed, and judged with the root alone.
	type record struct {
		bundle, document []byte
		serial           string
	}
	sign := func(signer, key string) record {
		t.Helper()
		req := asserted(signer, key)
		r, err := app.Sign(t.Context(), key, req)
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		c, err := pki.ParseCertificate(r.Certificates[0])
		if err != nil {
			t.Fatal(err)
		}
		b, err := app.Evidence(t.Context(), r.RecordID)
		if err != nil {
			t.Fatal(err)
		}
		return record{b, req.Content, pki.SerialHex(c.SerialNumber)}
	}
	holds := func(when string, r record) {
		t.Helper()
		if v := m.judgeAlone(t, r.bundle, r.document, ca.path("root.crt")); v.Verdict != pki.Valid {
			t.Errorf("%s: %+v", when, v)
		}
	}
	old := sign("D000", "before-renewal")
	holds("first", old)
	if v := m.judgeAlone(t, old.bundle, old.document, rsaCA.path("root.crt")); v.Verdict == pki.Valid {
		t.Error("valid under a root that has nothing to do with it")
	}

	// 7. Renewal with another key, overlapping; a unit's too. Both signatures hold.
	csr = filepath.Join(work, "renewal.csr")
	mustRun(t, "cert", "csr", "--dir", dir, "--for", "signer:D000", "--new-key", "-o", csr)
	encryption := ca.issue(csr, "encryption")
	refused(t, 1, []string{"certificate_encryption", "加密证书"}, "cert", "import", encryption, "--dir", dir)
	mustRun(t, "cert", "import", ca.issue(csr, "staff"), "--dir", dir)
	own("tsa:sm2", "tsa", ca, "--new-key")
	own("tls", "tls", rsaCA, "--new-key")
	if err := under(rsaCA.path("root.crt")); err != nil {
		t.Errorf("TLS with a new key: %v", err)
	}
	// A doctor who is enrolled now has a certificate that ends within a week.
	short := filepath.Join(work, "short.csr")
	m.enrol(t, "D100", "", "--ca", "external", "--algorithms", "SM2")
	mustRun(t, "cert", "csr", "--dir", dir, "--for", "signer:D100", "-o", short)
	mustRun(t, "cert", "import", ca.issue(short, "staff", "-days", "5"), "--dir", dir)
	fresh := sign("D000", "after-renewal")
	if fresh.serial == old.serial {
		t.Error("the renewed certificate does not sign")
	}
	holds("old, after the renewal", old)
	holds("new", fresh)

	// 8. Revoked by the CA: refused from the next list on; what was signed stands, and another doctor signs.
	ca.revoke(filepath.Join(work, "csr", "D000-SM2.crt"))
	ca.revoke(filepath.Join(work, "renewal.crt"))
	ca.lists()
	mustRun(t, "cert", "crl", "fetch", "--dir", dir)
	m.changeOf(t, "/admin/v1/trust/crls/fetch", "trust.crl/outcome", "", `"number":"01"`, `"number":"02"`)
	gone := func(when string) {
		t.Helper()
		_, err := app.Sign(t.Context(), when, asserted("D000", when))
		wantCode(t, err, "certificate_unusable")
		var p *client.Problem
		if errors.As(err, &p) && !strings.Contains(p.Detail, "revoked") {
			t.Errorf("%s: %v", when, err)
		}
	}
	gone("revoked")
	holds("old, after the revocation", old)
	holds("new, after the revocation", fresh)
	holds("another doctor", sign("D001", "another"))

	// 9. A restart keeps everything.
	before := m.certificates(t)
	m.stop(t)
	m = serve(t, dir)
	m.trusted(t)
	app = m.client(t, "his")
	gone("revoked-restarted")
	holds("after the restart", sign("D001", "restarted"))
	if err := under(rsaCA.path("root.crt")); err != nil {
		t.Errorf("TLS after the restart: %v", err)
	}
	eventually(t, 20*time.Second, "a warning of the certificate that ends soon", func() bool {
		return slices.ContainsFunc(m.state(t).Warnings, func(w string) bool { return strings.Contains(w, "signer:D100") && strings.Contains(w, "4 天") })
	})
	after := m.certificates(t)
	count := func(lines []account.CertificateLine) map[string]int {
		n := map[string]int{}
		for _, l := range lines {
			n[l.Use+" "+l.State]++
		}
		return n
	}
	want := map[string]int{"staff active": 20, "staff pending": 2, "staff revoked": 2, "tsa active": 2, "tsa superseded": 3, "log active": 1, "log superseded": 1, "tls active": 1, "tls superseded": 2}
	for name, lines := range map[string][]account.CertificateLine{"before": before, "after": after} {
		if got := count(lines); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("certificates %s the restart: %v, want %v", name, got, want)
		}
	}
	m.mustBeClean(t)
}
