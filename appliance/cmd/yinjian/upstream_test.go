package main_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

// An oldTSA is a hospital's timestamp device: openssl ts -reply behind HTTP, with a certificate of the city's CA.
type oldTSA struct {
	ca      *hospitalCA
	cert    *smx509.Certificate
	address string
	mu      sync.Mutex // one answer at a time: the serial stands in a file
	serving *http.Server
}

func newOldTSA(t *testing.T) *oldTSA {
	t.Helper()
	d := &oldTSA{ca: newHospitalCA(t, false), address: freePort(t)}
	d.ca.openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", "tsa.key")
	d.ca.openssl("req", "-config", "ca.cnf", "-new", "-key", "tsa.key", "-subj", "/C=CN/O=医院/CN=旧时间戳服务器", "-out", "tsa.csr")
	d.ca.issue(d.ca.path("tsa.csr"), "tsa")
	d.ca.write("ts.cnf", "[t]\nserial=serial\ndefault_policy=1.2.3.4.1\nsigner_digest=sha256\ndigests=sha256,sm3\naccuracy=millisecs:400\ness_cert_id_alg=sha256\nclock_precision_digits=3\n")
	b, err := os.ReadFile(d.ca.path("tsa.crt"))
	if err == nil {
		d.cert, err = smx509.ParseCertificatePEM(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.kill)
	return d
}

func (d *oldTSA) answer(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	query, err := io.ReadAll(r.Body)
	if err == nil {
		err = os.WriteFile(d.ca.path("q.tsq"), query, 0o600)
	}
	cmd := exec.Command("openssl", "ts", "-reply", "-config", "ts.cnf", "-section", "t", "-queryfile", "q.tsq", "-signer", "tsa.crt", "-inkey", "tsa.key", "-chain", "sub.crt", "-out", "r.tsr")
	cmd.Dir = d.ca.dir
	if err == nil {
		err = cmd.Run()
	}
	var reply []byte
	if err == nil {
		reply, err = os.ReadFile(d.ca.path("r.tsr"))
	}
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/timestamp-reply")
	_, _ = w.Write(reply)
}

func (d *oldTSA) start(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	d.serving = &http.Server{Handler: http.HandlerFunc(d.answer), ReadHeaderTimeout: time.Minute}
	go func(s *http.Server) { _ = s.Serve(ln) }(d.serving)
}

// kill ends the device with whatever it is doing.
func (d *oldTSA) kill() {
	if d.serving != nil {
		d.serving.Close()
	}
}

func (m *machine) upstream(t *testing.T) (s struct{ State, Reason string }) {
	t.Helper()
	a := m.admin()
	defer a.Close()
	b, err := a.State(t.Context())
	var all struct {
		Upstream *struct{ State, Reason string }
	}
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil || all.Upstream == nil {
		t.Fatalf("%v: %s", err, b)
	}
	return *all.Upstream
}

// stampedBy is what a record's leaf says of its token: who made it, and why not another.
func (m *machine) stampedBy(t *testing.T, record string) (by, instead string, bundle []byte) {
	t.Helper()
	var err error
	eventually(t, 30*time.Second, "evidence", func() bool {
		bundle, err = m.client(t, "his").Evidence(t.Context(), record)
		return err == nil
	})
	b, err := evidence.Parse(bundle)
	if err != nil {
		t.Fatal(err)
	}
	e, err := audit.ParseEntry(b.Journal.Leaf)
	if err != nil {
		t.Fatal(err)
	}
	return e.Text("stamp.by"), e.Text("stamp.instead"), bundle
}

// stf asks for an operation of GM/T 0033.
func (m *machine) stf(t *testing.T, operation string, in, out any) {
	t.Helper()
	stf(t, m.stranger(t, false), m.clientConfig(t, "his"), operation, in, out)
}

func stf(t *testing.T, h *http.Client, cfg client.Config, operation string, in, out any) {
	t.Helper()
	body, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	status, b := postAs(t, h, cfg, "/v1/stf/"+operation, "", "application/json", body)
	if status != http.StatusOK {
		t.Fatalf("%s: %d %s", operation, status, b)
	}
	if err := json.Unmarshal(b, out); err != nil {
		t.Fatal(err)
	}
}

// TestUpstream is a hospital that has a timestamp device already, and goes on using it: refused while its CA is not admitted,
// used then, killed under load, and used again when it is back. Signatures never stop; each leaf says who stamped and
// why not the other, and evidence of both kinds is valid for whoever has the two roots and the log's key alone.
func TestUpstream(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	old := newOldTSA(t)
	old.start(t)
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	configure(t, dir, func(c *appliance.Config) {
		c.TSA.Upstream = &appliance.Upstream{
			Name: "old-tsa", URL: "http://" + old.address + "/tsa", Order: "upstream-then-inside", Timeout: appliance.Duration(10 * time.Second),
			Failures: 2, Probe: appliance.Duration(time.Second),
		}
	})
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	sign := func(key string) *wire.SignResult {
		t.Helper()
		r, err := his.Sign(t.Context(), key, asserted("D1", key))
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		return r
	}
	wants := func(key string, r *wire.SignResult, by, instead string) {
		t.Helper()
		gotBy, gotInstead, bundle := m.stampedBy(t, r.RecordID)
		if gotBy != by || !strings.Contains(gotInstead, instead) || (instead == "") != (gotInstead == "") {
			t.Errorf("%s: stamped by %q, instead %q; want %q, %q", key, gotBy, gotInstead, by, instead)
		}
		anchors := []string{filepath.Join(dir, "ca.pem"), old.ca.path("root.crt")}
		report := m.judgeAlone(t, bundle, documentOf(key), anchors...)
		if report.Verdict != pki.Valid {
			t.Errorf("%s, by %s: %s: %+v", key, by, report.Verdict, report.Checks)
		}
		if by == "upstream/old-tsa" {
			if !strings.Contains(strings.Join(report.Statements, " "), "上游设备 old-tsa") {
				t.Errorf("the report does not say whose token it is: %v", report.Statements)
			}
			if r := m.judgeAlone(t, bundle, documentOf(key), anchors[0]); r.Verdict == pki.Valid {
				t.Error("valid without the device's root")
			}
		}
	}

	// 1. Nobody has admitted its CA.
	eventually(t, time.Minute, "the device is refused", func() bool { s := m.upstream(t); return s.State == "down" && strings.Contains(s.Reason, "untrusted") })
	wants("foreign", sign("foreign"), "unit/sm2", "upstream/old-tsa: down, untrusted")
	m.raises(t, alarm.UpstreamAway)
	if o := mustRun(t, "status", "--dir", dir); !strings.Contains(o.stdout, "上游时间戳设备 old-tsa 不可用") {
		t.Errorf("%v", o)
	}

	// 2. It is admitted; its revocation is known when the lists are there, and then it stamps.
	mustRun(t, "cert", "anchor", "add", old.ca.path("root.crt"), "--dir", dir, "--use", "tsa", "--note", "旧时间戳设备的 CA")
	mustRun(t, "cert", "chain", "add", old.ca.path("sub.crt"), "--dir", dir)
	eventually(t, time.Minute, "revocation is asked for", func() bool { return strings.Contains(m.upstream(t).Reason, "revocation") })
	for _, l := range old.ca.lists() {
		mustRun(t, "cert", "crl", "import", l, "--dir", dir)
	}
	up := func() bool { return m.upstream(t).State == "up" }
	eventually(t, time.Minute, "the device is used", up)
	m.clears(t, alarm.UpstreamAway)
	r := sign("with")
	wants("with", r, "upstream/old-tsa", "")
	if token, err := tsa.ParseToken(r.Token); err != nil || !token.Certificates()[0].Equal(old.cert) && !token.Certificates()[1].Equal(old.cert) {
		t.Errorf("the token is not the device's: %v", err)
	}
	// The archive stamps the device's token again before its certificate ends.
	_, _, before := m.stampedBy(t, r.RecordID)
	mustRun(t, "preserve", "run", "--dir", dir)
	_, _, after := m.stampedBy(t, r.RecordID)
	ended := []string{"--at", old.cert.NotAfter.AddDate(0, 0, 1).UTC().Format(time.RFC3339)}
	for what, c := range map[string]struct {
		bundle []byte
		want   pki.Verdict
	}{"archived": {after, pki.Valid}, "not archived": {before, pki.Indeterminate}} {
		if got := m.judgeWith(t, ended, c.bundle, documentOf("with"), filepath.Join(dir, "ca.pem"), old.ca.path("root.crt")); got.Verdict != c.want {
			t.Errorf("%s, after the end of the device's certificate: %s, want %s: %+v", what, got.Verdict, c.want, got.Checks)
		}
	}

	// 3. Free-standing requests go through as they are, and are journalled like our own.
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf([]byte("x"))}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	reply, err := his.Stamp(t.Context(), "rsa", query)
	if err != nil {
		t.Fatal(err)
	}
	response, err := tsa.ParseResponse(reply)
	if err != nil || response.Token == nil || response.Token.Nonce != nil || len(response.Token.Certificates()) != 0 {
		t.Fatalf("%v: %+v", err, response)
	}
	if _, err := response.Token.VerifyData([]byte("x"), old.cert); err != nil {
		t.Errorf("relayed: %v", err)
	}
	var d wire.STFDetail
	m.stf(t, "detail", wire.STFReadItem{Response: reply, Item: 6}, &d)
	if !strings.HasPrefix(d.Text, "upstream/old-tsa; ") || d.From != "journal" {
		t.Errorf("the journal's word for the relayed token's time: %+v", d)
	}
	m.stf(t, "detail", wire.STFReadItem{Response: r.Token, Item: 6}, &d) // in a signature's entry
	if !strings.HasPrefix(d.Text, "upstream/old-tsa; ") || d.From != "journal" {
		t.Errorf("the journal's word for the signature's time: %+v", d)
	}
	m.stf(t, "detail", wire.STFReadItem{Response: reply, Item: 8}, &d)
	if d.Text != "HTTP" {
		t.Errorf("how it was given: %+v", d)
	}

	local := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", m.ends.Admin)
	}}}
	defer local.CloseIdleConnections()
	page, err := local.Get("http://yinjian/metrics")
	if err != nil {
		t.Fatal(err)
	}
	metrics, err := io.ReadAll(page.Body)
	page.Body.Close()
	if err != nil || !strings.Contains(string(metrics), `yinjian_upstream_up{device="old-tsa"} 1`) || !strings.Contains(string(metrics), `yinjian_upstream_refused_total{device="old-tsa",reason="untrusted"}`) {
		t.Errorf("%v: %s", err, metrics)
	}

	// 4. It is killed under load. Signatures go on.
	var stop atomic.Bool
	var all sync.WaitGroup
	type made struct {
		key string
		r   *wire.SignResult
	}
	records, failed := make(chan made, 100_000), make(chan error, 4)
	for i := range 4 {
		all.Go(func() {
			for n := 0; !stop.Load(); n++ {
				key := fmt.Sprintf("load-%d-%d", i, n)
				r, err := his.Sign(t.Context(), key, asserted("D1", key))
				if err != nil {
					failed <- fmt.Errorf("%s: %w", key, err)
					return
				}
				records <- made{key, r}
			}
		})
	}
	eventually(t, time.Minute, "records of the device", func() bool { return len(records) >= 8 || len(failed) > 0 })
	old.kill()
	eventually(t, time.Minute, "the device is down", func() bool { return m.upstream(t).State == "down" || len(failed) > 0 })
	n := len(records)
	eventually(t, time.Minute, "records of our own", func() bool { return len(records) >= n+20 || len(failed) > 0 })
	stop.Store(true)
	all.Wait()
	close(records)
	if len(failed) > 0 {
		t.Error(<-failed)
	}
	kinds := map[string]int{}
	for x := range records {
		token, err := tsa.ParseToken(x.r.Token)
		if err != nil {
			t.Fatal(err)
		}
		by := "unit/sm2"
		if token.Policy.String() == "1.2.3.4.1" {
			by = "upstream/old-tsa"
		}
		if kinds[by]++; kinds[by] == 1 {
			wants(x.key, x.r, by, map[string]string{"unit/sm2": "upstream/old-tsa: "}[by])
		}
	}
	if kinds["unit/sm2"] < 20 || kinds["upstream/old-tsa"] < 4 {
		t.Errorf("%v", kinds)
	}
	t.Logf("%v", kinds)

	// 5. It is back.
	old.start(t)
	eventually(t, time.Minute, "the device is back", up)
	wants("back", sign("back"), "upstream/old-tsa", "")

	// 6. Without trusted time nothing is had from it, until the configuration says otherwise; then free-standing requests are
	// relayed, and the journal says that nobody held their time against ours. Signatures are refused either way.
	server.silent.Store(true)
	if query, err = (&tsa.Request{Imprint: tsa.ImprintOf([]byte("x")), CertReq: true}).Bytes(); err != nil { // nobody has seen its certificate since the start
		t.Fatal(err)
	}
	for _, require := range []bool{true, false} {
		m.stop(t)
		if err := os.Remove(filepath.Join(dir, "run", "time.json")); err != nil {
			t.Fatal(err)
		}
		configure(t, dir, func(c *appliance.Config) { c.TSA.Upstream.RequireOwnTime = &require })
		m = serve(t, dir)
		his = m.client(t, "his")
		var response *tsa.Response
		eventually(t, time.Minute, "an answer", func() bool { // a request's time must lie after the last run's
			reply, err := his.Stamp(t.Context(), "rsa", query)
			if err != nil {
				return false
			}
			response, err = tsa.ParseResponse(reply)
			return err == nil
		})
		if require {
			if !slices.Contains(response.Failures, tsa.TimeNotAvailable) {
				t.Errorf("without own time: %v", response.Err())
			}
		} else if response.Token == nil {
			t.Errorf("not relayed: %v", response.Err())
		}
		_, err := his.Sign(t.Context(), "no-time", asserted("D1", "no-time"))
		wantCode(t, err, "time_untrusted")
	}
	m.stop(t)
	relayed := entries(t, dir, "tsa.token.v1")
	if e := relayed[len(relayed)-1]; e.Object != "upstream/old-tsa" || !strings.Contains(e.Text("time.provenance"), "not held against own time") || e.Time.State == "trusted" {
		t.Errorf("relayed without own time: %s, %q, %s", e.Object, e.Text("time.provenance"), e.Time.State)
	}

	// 7. The other way round: our unit stamps, the device when our unit's certificate is revoked, nobody when the device's is
	// revoked too.
	server.silent.Store(false)
	configure(t, dir, func(c *appliance.Config) { c.TSA.Upstream.Order = "inside-then-upstream" })
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	wants("inside", sign("inside"), "unit/sm2", "")
	csr := filepath.Join(tempDir(t), "sm2.csr")
	mustRun(t, "cert", "csr", "--dir", dir, "--for", "tsa:sm2", "-o", csr, "--subject", "CN=时间戳单元 SM2,O=某医院,C=CN")
	own := old.ca.issue(csr, "tsa")
	mustRun(t, "cert", "import", own, "--dir", dir)
	old.ca.revoke(own)
	for _, l := range old.ca.lists() {
		mustRun(t, "cert", "crl", "import", l, "--dir", dir)
	}
	outside := sign("outside")
	// The unit stamps no checkpoint either, however long evidence is waited for: its token would make the evidence invalid.
	eventually(t, time.Minute, "the checkpoint is left without a token", func() bool {
		return regexp.MustCompile(`msg="checkpoint not stamped" error=.*certificate_unusable`).MatchString(readFile(t, m.log))
	})
	wants("outside", outside, "upstream/old-tsa", "unit/sm2: certificate_unusable")
	if !m.state(t).Ready {
		t.Error("not ready, and the device stamps")
	}
	old.ca.revoke("tsa.crt")
	for _, l := range old.ca.lists() {
		mustRun(t, "cert", "crl", "import", l, "--dir", dir)
	}
	_, err = his.Sign(t.Context(), "nobody", asserted("D1", "nobody"))
	wantCode(t, err, "not_ready")
	if err == nil || !strings.Contains(err.Error(), "unit/sm2: certificate_unusable") || !strings.Contains(err.Error(), "upstream/old-tsa: ") {
		t.Errorf("nobody: %v", err)
	}
	m.mustBeClean(t) // tokens that no key of ours made are no signatures without a use
	m.stop(t)

	// 8. The journal has its going and coming.
	var states []string
	for _, e := range entries(t, dir, "tsa.upstream") {
		states = append(states, strings.TrimSpace(e.Text("state")+" "+e.Text("reason")))
	}
	if got := strings.Join(states, ", "); !strings.HasPrefix(got, "down untrusted, up, down ") || !strings.Contains(got[len("down untrusted, up, down "):], ", up") {
		t.Errorf("the device's states: %s", got)
	}
}

// TestUpstreamAlone: where nothing but the device may stamp, an appliance without it is not ready, refuses before anything
// is signed, and says which of the two failed how.
func TestUpstreamAlone(t *testing.T) {
	t.Parallel()
	silent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }))
	t.Cleanup(silent.Close)
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) {
		c.TSA.Upstream = &appliance.Upstream{Name: "old-tsa", URL: silent.URL, Order: "upstream", Failures: 1, Probe: appliance.Duration(time.Second)}
	})
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	his := m.register(t, "his", "--consent", "app-asserted")
	eventually(t, time.Minute, "the device is down", func() bool { return m.upstream(t).State == "down" })
	if s := m.state(t); s.Ready || !strings.Contains(strings.Join(s.Warnings, " "), "须由它盖时间戳的签名被拒绝") {
		t.Errorf("nobody stamps: ready %v, %v", s.Ready, s.Warnings)
	}
	_, err := his.Sign(t.Context(), "none", asserted("D1", "none"))
	wantCode(t, err, "not_ready")
	if err == nil || !strings.Contains(err.Error(), "upstream/old-tsa: down, http-status") {
		t.Errorf("%v", err)
	}
	reply, err := his.Stamp(t.Context(), "sm2", []byte{0x30, 0})
	if r, perr := tsa.ParseResponse(reply); err != nil || perr != nil || len(r.Failures) != 1 || r.Failures[0] != tsa.BadDataFormat {
		t.Errorf("rubbish: %v, %v", err, perr)
	}
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf([]byte("x"))}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	reply, err = his.Stamp(t.Context(), "sm2", query)
	if r, perr := tsa.ParseResponse(reply); err != nil || perr != nil || len(r.Failures) != 1 || r.Failures[0] != tsa.SystemFailure {
		t.Errorf("without the device: %v, %v", err, perr)
	}
	m.stop(t)
}
