package main_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
)

const clientFiles = "../../../docs/clients/"

// copied compiles the clients of docs/clients, once, and answers their commands by name.
var copied = sync.OnceValues(func() (map[string][]string, error) {
	dir := filepath.Join(built.dir, "clients")
	program := filepath.Join(dir, "YinjianClient.exe")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	for _, argv := range [][]string{
		{"javac", "--release", "8", "-Xlint:all,-options", "-Werror", "-encoding", "UTF-8", "-d", dir, clientFiles + "YinjianClient.java"},
		{"mcs", "-langversion:7.2", "-warn:4", "-warnaserror", "-out:" + program, clientFiles + "YinjianClient.cs"},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", argv[0], err, out)
		}
	}
	return map[string][]string{
		"Java": {"java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", dir, "YinjianClient"},
		"C#":   {"mono", program},
	}, nil
})

// copiedClients skips the test, naming the tool, when one is not installed: packaging/dev/deps.sh test fails then.
func copiedClients(t *testing.T) map[string][]string {
	t.Helper()
	need(t, "curl", "openssl", "javac", "java", "mcs", "mono")
	programs, err := copied()
	if err != nil {
		t.Fatal(err)
	}
	return programs
}

// TestClientVectors runs the one vector file through every client but the Go one, whose test is in api/wire.
func TestClientVectors(t *testing.T) {
	t.Parallel()
	const file = "../../../api/testdata/hmac-vector.json"
	var vectors struct {
		Vectors []struct {
			KeyHex                                                                 string `json:"key_hex"`
			Name, Method, Path, Query, Host, App, Time, Nonce, Body, Authorization string
		}
	}
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &vectors)
	}
	if err != nil || len(vectors.Vectors) == 0 {
		t.Fatalf("%v, %d vectors", err, len(vectors.Vectors))
	}
	var want strings.Builder
	for _, v := range vectors.Vectors {
		fmt.Fprintln(&want, v.Authorization)
	}
	spoiled := filepath.Join(tempDir(t), "spoiled.json")
	if err := os.WriteFile(spoiled, bytes.Replace(b, []byte(`"method": "POST"`), []byte(`"method": "PUT"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, argv := range copiedClients(t) {
		if o := command(t, nil, append(argv, "vector", file)...); o.code != 0 || o.stdout != want.String() {
			t.Errorf("%s: %v\nwant:\n%s", name, o, &want)
		}
		if o := command(t, nil, append(argv, "vector", spoiled)...); o.code != 1 {
			t.Errorf("%s takes a spoiled vector: %v", name, o)
		}
	}
	var shell strings.Builder
	for _, v := range vectors.Vectors {
		dir := tempDir(t)
		key, body := filepath.Join(dir, "key"), filepath.Join(dir, "body")
		if err := os.WriteFile(key, []byte(v.KeyHex), 0o600); err != nil {
			t.Fatal(err)
		}
		url := "https://" + v.Host + v.Path
		if v.Query != "" {
			url += "?" + v.Query
		}
		argv := []string{"sh", clientFiles + "sign.sh", "header", v.Method, url}
		if v.Body != "" {
			argv = append(argv, body)
			if err := os.WriteFile(body, []byte(v.Body), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		o := command(t, []string{"YINJIAN_APP=" + v.App, "YINJIAN_KEY_FILE=" + key, "YINJIAN_TIME=" + v.Time, "YINJIAN_NONCE=" + v.Nonce}, argv...)
		shell.WriteString(o.stdout)
	}
	if shell.String() != want.String() {
		t.Errorf("sh: %s\nwant:\n%s", &shell, &want)
	}
}

// A breaker stands between clients and the appliance, ends TLS, passes Host unchanged, and breaks exchanges of
// POST /v1/sign as it is told for each Idempotency-Key.
type breaker struct {
	t    *testing.T
	url  string // https://127.0.0.1:port
	ca   string // PEM file
	to   string // the appliance
	via  *http.Client
	over chan struct{} // closed at the end of the test

	mu     sync.Mutex // guards what follows
	plan   map[string][]string
	nonces map[string]int
	came   map[string]int
}

// startBreaker speaks TLS 1.2 too, and has a certificate of its own CA for 127.0.0.1 alone.
func startBreaker(t *testing.T, m *machine) *breaker {
	t.Helper()
	b := &breaker{t: t, to: m.ends.API, plan: map[string][]string{}, nonces: map[string]int{}, came: map[string]int{}, over: make(chan struct{})}
	b.via = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots(t, m.ends.TLSCA)}}}
	ca, caKey, caDER := certify(t, nil, nil, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	_, key, leaf := certify(t, ca, caKey, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	b.ca = filepath.Join(tempDir(t), "ca.pem")
	if err := os.WriteFile(b.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), 0o600); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(b)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leaf}, PrivateKey: key}}}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(func() { close(b.over); srv.Close() })
	b.url = srv.URL
	return b
}

// certify makes an RSA certificate, self-signed without a parent. Mono cannot read a chain of EC keys.
func certify(t *testing.T, parent *x509.Certificate, by *rsa.PrivateKey, c *x509.Certificate) (*x509.Certificate, *rsa.PrivateKey, []byte) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	c.Subject = pkix.Name{CommonName: fmt.Sprintf("breaker %t", c.IsCA)}
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, by)
	if err == nil {
		c, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c, key, der
}

func (b *breaker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Idempotency-Key") == "deaf" {
		<-b.over
		return
	}
	body, err := io.ReadAll(r.Body)
	a, aerr := wire.ParseAuthorization(r.Header.Get("Authorization"))
	if err != nil || aerr != nil {
		b.t.Errorf("%s %s: %v, %v", r.Method, r.URL, err, aerr)
		return
	}
	key, fault := r.Header.Get("Idempotency-Key"), "none"
	b.mu.Lock()
	b.nonces[a.Nonce]++
	b.came[key]++
	if len(b.plan[key]) > 0 {
		fault, b.plan[key] = b.plan[key][0], b.plan[key][1:]
	}
	b.mu.Unlock()
	problem := func(status int, code, retry string) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"type":"urn:yinjian:problem:%[1]s","title":"x","status":%[2]d,"detail":"原因","instance":"urn:x","code":"%[1]s","next":"下一步","retry":"%[3]s"}`, code, status, retry)
	}
	switch fault {
	case "429":
		problem(http.StatusTooManyRequests, "rate_limited", "later")
		return
	case "skew":
		problem(http.StatusUnauthorized, "clock_skew", "resign")
		return
	case "stopped":
		problem(http.StatusForbidden, "signer_stopped", "operator")
		return
	case "502":
		http.Error(w, "<html>", http.StatusBadGateway)
		return
	}
	q, err := http.NewRequest(r.Method, b.to+r.URL.Path, bytes.NewReader(body))
	if err != nil {
		b.t.Error(err)
		return
	}
	q.Header, q.Host = r.Header.Clone(), r.Host
	resp, err := b.via.Do(q)
	if err != nil {
		b.t.Errorf("breaker: %v", err)
		return
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Errorf("breaker: %v", err)
		return
	}
	switch fault {
	case "lose":
		panic(http.ErrAbortHandler)
	case "hang":
		<-r.Context().Done()
		return
	}
	for _, name := range []string{"Content-Type", "Retry-After"} {
		if v := resp.Header.Get(name); v != "" {
			w.Header().Set(name, v)
		}
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	w.WriteHeader(resp.StatusCode)
	if fault == "half" {
		_, _ = w.Write(answer[:len(answer)/2])
		w.(http.Flusher).Flush()
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			b.t.Error(err)
			return
		}
		tcp := conn.(*tls.Conn).NetConn().(*net.TCPConn)
		_ = tcp.SetLinger(0) // a reset, not an end
		_ = tcp.Close()
		return
	}
	_, _ = w.Write(answer)
}

// at sets what happens to the next exchanges with the key, and answers how many came so far.
func (b *breaker) at(key string, faults ...string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.plan[key] = faults
	return b.came[key]
}

// A foreign client sends one request to sign, and answers its exit code as the files of docs/clients do.
type foreign func(t *testing.T, url, ca, key string, attempt, total int) (answer []byte, code int, message string)

// TestClients has every client of docs/clients, and api/client, sign with one appliance: straight, and through answers
// that are lost, cut, late and refused. Each act is one record, and its evidence is there.
func TestClients(t *testing.T) {
	t.Parallel()
	programs := copiedClients(t)
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.TLS12 = true }) // Mono knows no TLS 1.3
	m := serve(t, dir)
	m.register(t, "emr-binhai", "--consent", "signer-pin", "--consent", "app-asserted")
	const pin = `p"in\1357`
	m.enrol(t, "D10023", pin)
	credentials, foreigner := filepath.Join(dir, "credentials", "emr-binhai.json"), filepath.Join(tempDir(t), "foreigner.json")
	body, large := filepath.Join(tempDir(t), "body.json"), filepath.Join(tempDir(t), "large.json")
	request, err := json.Marshal(asserted("D10023", "clients"))
	if err == nil {
		err = os.WriteFile(body, request, 0o600)
	}
	if err == nil {
		err = os.WriteFile(large, make([]byte, 12<<20), 0o600)
	}
	if err == nil {
		err = os.WriteFile(foreigner, fmt.Appendf(nil, `{"application":"emr-binhai","key_hex":"%064x"}`, 1), 0o600)
	}
	// The rest of what the demo leaves.
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "record.xml"), bytes.Repeat(documentOf("clients"), 50), 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "credentials", "D10023.pin"), []byte(pin+"\n"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}

	clients := map[string]foreign{
		"sh": func(t *testing.T, url, ca, key string, attempt, total int) ([]byte, int, string) {
			o := command(t, append(times(attempt, total), "YINJIAN_KEY_FILE="+credentials), "sh", clientFiles+"sign.sh", "POST", url+"/v1/sign", body,
				"-H", "Idempotency-Key: "+key, "--cacert", ca)
			return []byte(o.stdout), o.code, o.stderr
		},
		"Go": func(t *testing.T, url, ca, key string, attempt, total int) ([]byte, int, string) {
			cfg := m.clientConfig(t, "emr-binhai")
			cfg.BaseURL, cfg.RootCAs, cfg.Timeout = url, roots(t, ca), time.Duration(attempt)*time.Second
			cfg.Retry = client.Retry{Attempts: client.DefaultAttempts, Total: time.Duration(total) * time.Second}
			c, err := client.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			r, err := c.Sign(t.Context(), key, asserted("D10023", "clients"))
			switch {
			case client.OutcomeUnknown(err):
				return nil, 4, err.Error()
			case err != nil:
				return nil, 3, err.Error()
			}
			answer, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			return answer, 0, ""
		},
	}
	for name, argv := range programs {
		clients[name] = func(t *testing.T, url, ca, key string, attempt, total int) ([]byte, int, string) {
			o := command(t, times(attempt, total), append(slices.Clip(argv), "sign", credentials, url, ca, body, key)...)
			return []byte(o.stdout), o.code, o.stderr
		}
	}

	t.Run("README", func(t *testing.T) {
		text, err := os.ReadFile(clientFiles + "README.md")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(text), "\n```sh\n")
		lines, _, ok := strings.Cut(rest, "\n```\n")
		if !ok {
			t.Fatal("the example is gone")
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-euc", lines)
		cmd.Dir, cmd.Env = "../../..", append(os.Environ(), "demo="+dir, "made="+filepath.Join(tempDir(t), "made"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		parts := strings.Split("\n"+string(out), "\nauthorization ")[1:]
		if len(parts) != 3 {
			t.Fatalf("%d examples ran, want 3:\n%s", len(parts), out)
		}
		for _, part := range parts {
			said := map[string]string{}
			for line := range strings.Lines("authorization " + part) {
				i := strings.LastIndexByte(line, ' ')
				said[line[:i]] = strings.TrimSpace(line[i+1:])
			}
			inside := said["cms-content"]
			if said["again "+inside+" replayed"] != "true" || said["verify evidence"] != "valid" || said["verify cms"] == "invalid" || said["timestamp"] == "" {
				t.Error(part)
			}
			for _, record := range []string{said["raw"], said["cms"], inside} {
				if _, err := m.client(t, "emr-binhai").Evidence(t.Context(), record); err != nil {
					t.Errorf("record %q: %v\n%s", record, err, part)
				}
			}
		}
	})
	b := startBreaker(t, m)
	var mu sync.Mutex // guards made
	made := map[string]*wire.SignResult{}
	t.Run("broken", func(t *testing.T) {
		for name, sign := range clients {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				key := fmt.Sprintf("visit-%x", name)

				// signed wants exit 0, and notes the record.
				signed := func(key string, attempt int, replayed bool) *wire.SignResult {
					t.Helper()
					answer, code, message := sign(t, b.url, b.ca, key, attempt, 120)
					r := new(wire.SignResult)
					if err := json.Unmarshal(answer, r); err != nil || code != 0 || r.Replayed != replayed {
						t.Fatalf("%s: exit %d after %d requests, %v: %s%s", key, code, b.at(key), err, answer, message)
					}
					mu.Lock()
					defer mu.Unlock()
					made[key] = r
					return r
				}

				// 1. Signed at once, and then the answer is lost, cut by a reset, late. And refused for now, three times.
				b.at(key, "lose", "half", "hang")
				first := signed(key, 2, true)
				if evidence, err := m.client(t, "emr-binhai").Evidence(t.Context(), first.RecordID); err != nil || !bytes.Contains(evidence, []byte(first.RecordID)) {
					t.Errorf("evidence: %v", err)
				}
				late := key + "-late"
				b.at(late, "429", "skew", "502")
				signed(late, 30, false)
				if n, m := b.at(key), b.at(late); n < 4 || m < 4 {
					t.Errorf("%d and %d requests, want 4", n, m)
				}

				// 2. It gives up, and says that it may have been signed; and so when a later attempt is refused.
				for i, faults := range [][]string{slices.Repeat([]string{"lose"}, 8), {"lose", "stopped"}} {
					lost := fmt.Sprintf("%s-lost-%d", key, i)
					b.at(lost, faults...)
					if answer, code, message := sign(t, b.url, b.ca, lost, 30, []int{2, 120}[i]); code != 4 {
						t.Errorf("%q: exit %d, want 4: %s%s", faults, code, answer, message)
					}
					b.at(lost)
					signed(lost, 30, true)
				}

				// 3. A plain no is not sent again, and the person learns why.
				refused := key + "-refused"
				b.at(refused, "stopped")
				if answer, code, message := sign(t, b.url, b.ca, refused, 30, 120); code != 3 || b.at(refused) != 1 || !strings.Contains(message, "signer_stopped") {
					t.Errorf("refused: exit %d after %d requests: %s%s", code, b.at(refused), answer, message)
				}

				// 4. Another host name, another CA, nobody there: nothing is sent.
				nothing := key + "-nothing"
				for what, at := range map[string]struct {
					url, ca string
					total   int
				}{
					"host name": {strings.Replace(b.url, "127.0.0.1", "localhost", 1), b.ca, 120},
					"CA":        {b.url, m.ends.TLSCA, 120},
					"nobody":    {"https://127.0.0.1:1", b.ca, 1},
				} {
					if answer, code, message := sign(t, at.url, at.ca, nothing, 30, at.total); code != 3 || message == "" {
						t.Errorf("%s: exit %d, want 3: %s%s", what, code, answer, message)
					}
				}
				if n := b.at(nothing); n != 0 { // Mono does not tell a callback of a wrong name: the C# client looks itself
					t.Errorf("%d requests to a server that should not be believed", n)
				}

				// 5. The reason of a 401 is told, and it is not tried again.
				argv := append(slices.Clip(programs[name]), "sign", foreigner, b.url, b.ca, body, nothing)
				if name == "sh" {
					argv = []string{"sh", clientFiles + "sign.sh", "POST", b.url + "/v1/sign", body, "-H", "Idempotency-Key: " + nothing, "--cacert", b.ca}
				}
				if name != "Go" { // its refusals are tested in package api
					o := command(t, []string{"YINJIAN_KEY_FILE=" + foreigner}, argv...)
					if o.code != 3 || !strings.Contains(o.stderr, "unauthenticated: ") || b.at(nothing) != 1 {
						t.Errorf("wrong key: %d requests, %v", b.at(nothing), o)
					}
				}

				// 6. A server that takes no more of a large body: the attempt's time covers that too.
				if argv, ok := programs[name]; ok {
					o := command(t, times(1, 1), append(slices.Clip(argv), "sign", credentials, b.url, b.ca, large, "deaf")...)
					if o.code != 4 {
						t.Errorf("a deaf server: exit %d, want 4: %s", o.code, o.stderr)
					}
				}
			})
		}
	})
	for nonce, n := range b.nonces {
		if n > 1 {
			t.Errorf("nonce %s came %d times", nonce, n)
		}
	}
	m.mustBeClean(t)
	m.stop(t)
	if len(made) != 4*len(clients) {
		t.Errorf("%d acts, want 4 of each client", len(made))
	}
	entriesByRef(t, dir, made) // one entry each
}

func times(attempt, total int) []string {
	return []string{fmt.Sprint("YINJIAN_ATTEMPT_SECONDS=", attempt), fmt.Sprint("YINJIAN_TOTAL_SECONDS=", total)}
}
