package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance"
)

// client makes a key and a certificate for clients and answers the file that curl takes: certificate, intermediate and key.
func (ca *hospitalCA) client(name, subject string, more ...string) string {
	ca.t.Helper()
	ca.openssl("req", "-config", "ca.cnf", "-newkey", "rsa:2048", "-nodes", "-keyout", name+".key", "-out", name+".csr", "-subj", subject)
	crt := ca.issue(name+".csr", "client", more...)
	ca.write(name+".certs", readFile(ca.t, ca.path(crt))+readFile(ca.t, ca.path("sub.crt")))
	ca.write(name+".pem", readFile(ca.t, ca.path(name+".certs"))+readFile(ca.t, ca.path(name+".key")))
	return ca.path(name + ".pem")
}

// An application proves itself by a TLS client certificate, with HMAC-SM3 or instead of it: shown by curl and openssl
// s_client, made, revoked and listed by `openssl ca`.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	need(t, "curl", "openssl")
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.TLS12 = true })
	m := serve(t, dir)
	m.trusted(t)
	for _, app := range []string{"his", "lis", "emr"} {
		m.register(t, app, "--consent", "app-asserted")
	}
	host := strings.TrimPrefix(m.ends.API, "https://")
	work := tempDir(t)

	// A session of before anybody was asked for a certificate.
	session := filepath.Join(work, "session")
	speak := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("openssl", append([]string{"s_client", "-connect", host, "-CAfile", m.ends.TLSCA, "-ign_eof"}, args...)...)
		cmd.Stdin = strings.NewReader("GET /health/state HTTP/1.1\r\nHost: " + host + "\r\nAccept: application/json\r\nConnection: close\r\n\r\n")
		out, _ := cmd.CombinedOutput() // what it says is looked at
		return string(out)
	}
	if out := speak("-tls1_3", "-sess_out", session); !strings.Contains(out, "401 Unauthorized") {
		t.Fatalf("without a certificate: %s", out)
	}
	if out := speak("-tls1_3", "-sess_in", session); !strings.Contains(out, "Reused, TLSv1.3") || strings.Contains(out, "Acceptable client certificate CA names") {
		t.Errorf("sessions are not resumed: %s", out)
	}

	ca := newHospitalCA(t, false)
	lis := ca.client("lis", "/C=CN/O=医院/CN=lis")
	again := ca.client("again", "/C=CN/O=医院/CN=lis")
	stolen := ca.client("stolen", "/C=CN/O=医院/CN=lis")
	stranger := ca.client("stranger", "/C=CN/O=医院/CN=pacs")
	expired := ca.client("expired", "/C=CN/O=医院/CN=lis", "-startdate", "20200101000000Z", "-enddate", "20210101000000Z")
	server := ca.client("server", "/C=CN/O=医院/CN=lis", "-extensions", "tls")
	self := func(name, subject string) string {
		ca.openssl("req", "-config", "ca.cnf", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", name+".key", "-out", name+".crt", "-subj", subject, "-days", "30", "-extensions", "client")
		ca.write(name+".certs", readFile(t, ca.path(name+".crt")))
		ca.write(name+".pem", readFile(t, ca.path(name+".crt"))+readFile(t, ca.path(name+".key")))
		return ca.path(name + ".pem")
	}
	forged, his, emr := self("forged", "/C=CN/O=医院/CN=lis"), self("his", "/CN=his"), self("emr", "/CN=emr")

	// 1. Registered: by subject only below an anchor for clients, with lists that say who is revoked.
	bind := func(app string, args ...string) []string { // what is given is the certificates without the key
		for i := range args {
			args[i] = strings.Replace(args[i], ".pem", ".certs", 1)
		}
		return append([]string{"app", "certificate", app, "--dir", dir, "--reason", "专线"}, args...)
	}
	bySubject := bind("lis", "--by", "subject", "--alone", "--file", lis)
	refused(t, 1, []string{"certificate_untrusted"}, bySubject...)
	refused(t, 1, []string{"certificate_malformed"}, append(bySubject[:len(bySubject)-1:len(bySubject)-1], lis)...) // with the private key
	mustRun(t, "cert", "anchor", "add", ca.path("root.crt"), "--dir", dir, "--use", "client", "--note", "客户端 CA")
	refused(t, 1, []string{"certificate_unusable", "吊销列表"}, bySubject...)
	lists := func() {
		t.Helper()
		for _, l := range ca.lists() {
			mustRun(t, "cert", "crl", "import", l, "--dir", dir)
		}
	}
	mustRun(t, "cert", "chain", "add", ca.path("sub.crt"), "--dir", dir)
	lists()
	refused(t, 1, []string{"certificate_purpose"}, bind("lis", "--by", "subject", "--alone", "--file", server)...)
	refused(t, 1, []string{"certificate_purpose"}, bind("his", "--file", ca.path("root.crt"))...)
	mustRun(t, bySubject...)
	m.changeOf(t, "/admin/v1/applications/:id/client", "account.application/outcome", "lis", `"version":1`, `"alone":true`)
	refused(t, 1, []string{"exists", "lis"}, bind("emr", "--by", "subject", "--file", again)...)
	mustRun(t, bind("his", "--file", his)...) // with HMAC-SM3, by key
	mustRun(t, bind("emr", "--alone", "--file", emr)...)
	refused(t, 1, []string{"exists", "emr"}, bind("his", "--file", emr)...)

	// 2. The certificate alone.
	curl := func(cert string, more ...string) (status, body string) {
		t.Helper()
		args := append([]string{"-sS", "--cacert", m.ends.TLSCA, "-w", "\n%{http_code}", m.ends.API + "/health/state"}, more...)
		if cert != "" {
			args = append(args, "--cert", cert)
		}
		out, err := exec.Command("curl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("curl %v: %v\n%s", args, err, out)
		}
		at := strings.LastIndexByte(string(out), '\n')
		return string(out)[at+1:], string(out)[:at]
	}
	for what, c := range map[string]struct {
		cert   string
		more   []string
		status string
		says   string
	}{
		"the very one":                   {lis, nil, "200", `"operational"`},
		"another of that subject and CA": {again, nil, "200", `"operational"`},
		"one by its key":                 {emr, nil, "200", `"operational"`},
		"none":                           {"", nil, "401", "缺少 Authorization"},
		"of nobody":                      {stranger, nil, "401", "不能代替"},
		"that subject, self-signed":      {forged, nil, "401", "unauthenticated"},
		"expired":                        {expired, nil, "401", "不在有效期内"},
		"a server's":                     {server, nil, "401", "unauthenticated"},
		"of one that needs HMAC too":     {his, nil, "401", "不能代替"},
		"by TLS 1.2":                     {lis, []string{"--tls-max", "1.2"}, "401", "缺少 Authorization"},
		"with a word for HMAC":           {lis, []string{"-H", "Authorization: YJ1-HMAC-SM3 nonsense"}, "401", "格式不正确"},
	} {
		if status, body := curl(c.cert, c.more...); status != c.status || !strings.Contains(body, c.says) {
			t.Errorf("%s: %s %s; want %s and %q", what, status, body, c.status, c.says)
		}
	}
	query := filepath.Join(work, "query")
	ca.openssl("ts", "-query", "-data", ca.path("ca.cnf"), "-sha256", "-cert", "-out", query)
	if out, err := exec.Command("curl", "-sS", "--cacert", m.ends.TLSCA, "--cert", lis, "-H", "Content-Type: application/timestamp-query", "--data-binary", "@"+query,
		m.ends.API+"/tsa/rsa", "-o", query+".reply", "-w", "%{http_code}").CombinedOutput(); err != nil || string(out) != "200" {
		t.Errorf("a timestamp: %v %s", err, out)
	}

	// 3. Together with HMAC-SM3: neither does without the other. A session of before is not resumed.
	call := func(app, cert string) string {
		t.Helper()
		cmd := exec.Command("sh", "../../../docs/clients/sign.sh", "GET", m.ends.API+"/health/state", "--cacert", m.ends.TLSCA)
		if cert != "" {
			cmd.Args = append(cmd.Args, "--cert", cert)
		}
		cmd.Env = append(os.Environ(), "YINJIAN_KEY_FILE="+filepath.Join(dir, "credentials", app+".json"))
		out, _ := cmd.CombinedOutput() // what it says is looked at
		return string(out)
	}
	for what, c := range map[string]struct{ app, cert, says string }{
		"both":                   {"his", his, `"operational"`},
		"HMAC alone":             {"his", "", "须出示客户端证书"},
		"another application's":  {"his", emr, "不是该应用的"},
		"another's, of that CA":  {"his", lis, "不是该应用的"},
		"by subject, no shown":   {"lis", "", "须出示客户端证书"},
		"by subject, with both":  {"lis", again, `"operational"`},
		"by subject, self-made":  {"lis", forged, "客户端证书不可用"},
		"by subject, expired":    {"lis", expired, "不在有效期内"},
		"by subject, a server's": {"lis", server, "客户端证书不可用"},
	} {
		if out := call(c.app, c.cert); !strings.Contains(out, c.says) {
			t.Errorf("%s: %s; want %q", what, out, c.says)
		}
	}
	if out := speak("-tls1_3", "-sess_in", session, "-cert", lis, "-key", lis, "-cert_chain", ca.path("sub.crt")); strings.Contains(out, "Reused") || !strings.Contains(out, "200 OK") {
		t.Errorf("a session without a certificate is resumed: %s", out)
	}
	if out := speak("-tls1_3", "-sess_out", session, "-cert", lis, "-key", lis, "-cert_chain", ca.path("sub.crt")); !strings.Contains(out, "200 OK") {
		t.Errorf("s_client: %s", out)
	}
	if out := speak("-tls1_3", "-sess_in", session); !strings.Contains(out, "Reused") || !strings.Contains(out, "200 OK") {
		t.Errorf("a session of the certificate's: %s", out)
	}

	// 4. Revoked: by a list where a CA says so, over a restart too; by taking the key out where it is pinned.
	if status, body := curl(stolen); status != "200" {
		t.Errorf("before it was revoked: %s %s", status, body)
	}
	ca.revoke("stolen.crt")
	lists()
	for round := range 2 {
		if status, body := curl(stolen); status != "401" || !strings.Contains(body, "客户端证书不可用") {
			t.Errorf("round %d: a revoked one: %s %s", round, status, body)
		}
		if status, body := curl(lis); status != "200" {
			t.Errorf("round %d: one that is not: %s %s", round, status, body)
		}
		if out := call("his", ""); !strings.Contains(out, "须出示客户端证书") {
			t.Errorf("round %d: HMAC alone: %s", round, out)
		}
		if round == 0 {
			m.stop(t)
			m = serve(t, dir)
			m.trusted(t)
		}
	}
	if out := speakTo(t, m, session); strings.Contains(out, "200 OK") {
		t.Errorf("a session of before the restart: %s", out)
	}
	mustRun(t, bind("emr", "--alone", "--file", forged)...)
	if status, body := curl(emr); status != "401" {
		t.Errorf("a key that was taken out: %s %s", status, body)
	}
	mustRun(t, bind("his", "--by", "none")...)
	if out := call("his", ""); !strings.Contains(out, `"operational"`) {
		t.Errorf("HMAC alone, the binding ended: %s", out)
	}
	// 5. An anchor that is withdrawn vouches for none of them, though a path to it was found before.
	if status, body := curl(again); status != "200" {
		t.Errorf("before the anchor is withdrawn: %s %s", status, body)
	}
	var anchors []struct{ ID, Note string }
	if err := json.Unmarshal([]byte(mustRun(t, "cert", "anchor", "list", "--dir", dir, "-o", "json").stdout), &anchors); err != nil {
		t.Fatal(err)
	}
	for _, a := range anchors {
		if a.Note == "客户端 CA" {
			mustRun(t, "cert", "anchor", "withdraw", a.ID, "--dir", dir, "--reason", "换 CA")
		}
	}
	for _, c := range []string{lis, again} {
		if status, body := curl(c); status != "401" || !strings.Contains(body, "客户端证书不可用") {
			t.Errorf("below an anchor that was withdrawn: %s %s", status, body)
		}
	}
	m.mustBeClean(t)
	m.stop(t)
}

// speakTo resumes a session with a machine.
func speakTo(t *testing.T, m *machine, session string) string {
	t.Helper()
	host := strings.TrimPrefix(m.ends.API, "https://")
	cmd := exec.Command("openssl", "s_client", "-connect", host, "-CAfile", m.ends.TLSCA, "-ign_eof", "-tls1_3", "-sess_in", session)
	cmd.Stdin = strings.NewReader(fmt.Sprintf("GET /health/state HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host))
	out, _ := cmd.CombinedOutput() // what it says is looked at
	return string(out)
}
