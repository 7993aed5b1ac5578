// The tests of this folder are the whole product: the real binary, the real PKCS#11 module and real processes, spoken
// to as a business system, an administrator or a stranger's tool would. Nothing is faked but the time servers of some,
// which answer from this machine's clock or not at all.
//
// With -short the kill tests make one round of each kind. With YINJIAN_LONG=1 the binary is built with the race
// detector.
package main_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/cms/cmstest"
	"yinjian/packaging/porttest"
)

// built is what TestMain makes, once.
var built struct {
	dir    string // short, since sockets below it have 107 bytes for their path
	binary string // yinjian, with libyinjian-p11.so beside it
	module string
	init   string // the same without the race detector, under which init stretches its PINs longer than the module waits
}

func TestMain(m *testing.M) {
	flag.Parse()
	if fuzz := flag.Lookup("test.fuzz"); fuzz != nil && fuzz.Value.String() != "" || slices.Contains(os.Args, "-test.fuzzworker") {
		os.Exit(m.Run()) // the targets are of parsers: each of their processes would build the programs first
	}
	os.Exit(func() int {
		moreAtOnce()
		dir, err := os.MkdirTemp("", "yj")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		built.dir, built.binary, built.module = dir, filepath.Join(dir, "yinjian"), filepath.Join(dir, "libyinjian-p11.so")
		built.init = built.binary
		build := func(out string, more ...string) []string {
			return append(append([]string{"go", "build", "-buildvcs=false", "-o", out}, more...), ".")
		}
		commands := [][]string{{"../../../hsm/softtoken/module/build.sh", built.module}}
		if os.Getenv("YINJIAN_LONG") == "" {
			commands = append(commands, build(built.binary))
		} else {
			built.init = filepath.Join(dir, "plain", "yinjian")
			commands = append(commands, build(built.binary, "-race"), build(built.init), []string{"cp", built.module, filepath.Dir(built.init)})
		}
		for _, argv := range commands {
			if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "%s: %v\n%s", strings.Join(argv, " "), err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// perProcessor is how many tests run at once for each processor. Most of a test here is waiting: for a start, for trusted time, for
// another campus, for what was killed to come back.
const perProcessor = 4

// moreAtOnce has that many run unless -parallel says otherwise. The long forms keep the processors busy by themselves.
func moreAtOnce() {
	said := os.Getenv("YINJIAN_LONG") != ""
	flag.Visit(func(f *flag.Flag) { said = said || f.Name == "test.parallel" })
	if !said {
		_ = flag.Set("test.parallel", strconv.Itoa(perProcessor*runtime.GOMAXPROCS(0))) // it is a number
	}
}

// need skips the test, naming the tool, when one is not installed.
func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		_, err := exec.LookPath(tool)
		for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} { // daemons are not in everybody's PATH
			if err != nil {
				_, err = exec.LookPath(filepath.Join(dir, tool))
			}
		}
		if err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
}

// tempDir is like t.TempDir, with a short path.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(built.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// An outcome is what a command left.
type outcome struct {
	stdout, stderr string
	code           int
}

func (o outcome) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", o.code, o.stdout, o.stderr)
}

// command runs a program to its end, for ten minutes at most.
func command(t *testing.T, env []string, argv ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%s: %v %v\n%s%s", strings.Join(argv, " "), err, ctx.Err(), &stdout, &stderr)
	}
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// yinjian runs a subcommand.
func yinjian(t *testing.T, args ...string) outcome {
	t.Helper()
	binary := built.binary
	if len(args) > 0 && args[0] == "init" {
		binary = built.init
	}
	return command(t, nil, append([]string{binary}, args...)...)
}

// mustRun runs a subcommand that has to succeed.
func mustRun(t *testing.T, args ...string) outcome {
	t.Helper()
	o := yinjian(t, args...)
	if o.code != 0 {
		t.Fatalf("yinjian %s: %v", strings.Join(args, " "), o)
	}
	return o
}

// refused runs a subcommand that has to fail with the exit code and each of the words on stderr.
func refused(t *testing.T, code int, words []string, args ...string) outcome {
	t.Helper()
	o := yinjian(t, args...)
	if o.code != code {
		t.Errorf("yinjian %s: want exit %d: %v", strings.Join(args, " "), code, o)
	}
	for _, w := range words {
		if !strings.Contains(o.stderr, w) {
			t.Errorf("yinjian %s: stderr does not say %q: %v", strings.Join(args, " "), w, o)
		}
	}
	return o
}

// A timeServer is an NTP server of our own that answers from this machine's clock, while it answers.
type timeServer struct {
	address string
	silent  atomic.Bool
	ahead   atomic.Int64 // nanoseconds by which it lies
	denies  atomic.Bool  // kiss of death, RFC 5905 §7.4
}

// startTimeServer serves until the test ends (RFC 5905 §7.3, mode 4, stratum 1).
func startTimeServer(t *testing.T) *timeServer {
	t.Helper()
	return startTimeServerOn(t, "127.0.0.1")
}

func startTimeServerOn(t *testing.T, host string) *timeServer {
	t.Helper()
	conn, err := net.ListenPacket("udp4", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	s := &timeServer{address: conn.LocalAddr().String()}
	t.Cleanup(func() { conn.Close() })
	stamp := func(b []byte) {
		now := time.Now().Add(time.Duration(s.ahead.Load()))
		binary.BigEndian.PutUint32(b, uint32(now.Unix()+2208988800))
		binary.BigEndian.PutUint32(b[4:], uint32(uint64(now.Nanosecond())<<32/1e9))
	}
	go func() {
		buf := make([]byte, 1024)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if n < 48 || s.silent.Load() {
				continue
			}
			reply := make([]byte, 48)
			stamp(reply[32:])                                     // receive
			reply[0], reply[1], reply[2] = 0<<6|4<<3|4, 1, buf[2] // no leap, version 4, server; stratum 1
			reply[3] = 0xec                                       // precision 2^-20 s
			copy(reply[12:], "TEST")
			stamp(reply[16:])            // reference
			copy(reply[24:32], buf[40:]) // origin
			stamp(reply[40:])            // transmit
			if s.denies.Load() {
				reply[1] = 0
				copy(reply[12:], "DENY")
			}
			_, _ = conn.WriteTo(reply, from)
		}
	}()
	return s
}

// initAppliance makes a new appliance. A time server is there at once; without one the simulated BeiDou feed is used.
func initAppliance(t *testing.T, server *timeServer, args ...string) string {
	t.Helper()
	dir := filepath.Join(tempDir(t), "a")
	if server == nil {
		mustRun(t, append([]string{"init", "--dir", dir, "--simulated-beidou"}, args...)...)
		return dir
	}
	mustRun(t, append([]string{"init", "--dir", dir, "--time-source", server.address}, args...)...)
	configure(t, dir, func(c *appliance.Config) { c.Time.Poll = appliance.Duration(time.Second) })
	return dir
}

// configure changes config.toml, as an operator with an editor would.
func configure(t *testing.T, dir string, change func(*appliance.Config)) {
	t.Helper()
	name := filepath.Join(dir, "config.toml")
	var c appliance.Config
	b, err := os.ReadFile(name)
	if err == nil {
		err = toml.Unmarshal(b, &c)
	}
	if err == nil {
		change(&c)
		b, err = toml.Marshal(c)
	}
	if err == nil {
		err = os.WriteFile(name, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// endpoints is endpoints.json, as a stranger reads it.
type endpoints struct {
	API         string
	TSASM2      string `json:"tsa_sm2"`
	TSARSA      string `json:"tsa_rsa"`
	Admin       string `json:"admin_socket"`
	AdminTLS    string `json:"admin"`
	TLSCA       string `json:"tls_ca"`
	Credentials map[string]string
}

// A machine is a running `yinjian serve`.
type machine struct {
	dir   string
	cmd   *exec.Cmd
	log   string // file with its output
	ended chan struct{}
	ends  endpoints
}

var logNumber atomic.Int32

// launch starts serve, with more arguments if there are any, and does not wait for it.
func launch(t *testing.T, dir string, more ...string) *machine {
	t.Helper()
	return launchBinary(t, built.binary, dir, more...)
}

func launchBinary(t *testing.T, binary, dir string, more ...string) *machine {
	t.Helper()
	m := &machine{dir: dir, ended: make(chan struct{}), log: fmt.Sprintf("%s-%d.log", dir, logNumber.Add(1))}
	_ = os.Remove(filepath.Join(dir, "endpoints.json")) // what a killed one left says nothing about this one
	out, err := os.Create(m.log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	m.cmd = exec.Command(binary, append([]string{"serve", "--dir", dir}, more...)...)
	m.cmd.Stdout, m.cmd.Stderr = out, out
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // nothing outlives a test that was cut off
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = m.cmd.Wait() // its state says how it ended
		close(m.ended)
	}()
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		<-m.ended
		b, _ := os.ReadFile(m.log)
		if t.Failed() {
			t.Logf("%s, without refusals:\n%s", m.log, lastLines(regexp.MustCompile(`(?m)^.*msg="request refused".*\n`).ReplaceAll(b, nil), 60))
		}
		if i := bytes.Index(b, []byte("DATA RACE")); i >= 0 {
			t.Errorf("data race:\n%s", b[max(0, i-200):min(len(b), i+4000)])
		}
		if i := bytes.Index(b, []byte("panic:")); i >= 0 {
			t.Errorf("panic:\n%s", b[i:min(len(b), i+4000)])
		}
	})
	return m
}

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// serve starts serve and waits until it is ready.
func serve(t *testing.T, dir string, more ...string) *machine {
	t.Helper()
	m := launch(t, dir, more...)
	m.await(t)
	return m
}

// readyWithin is for a cold start with gpsd and chronyd on a busy machine; 4 s is usual.
const readyWithin = patience

func (m *machine) await(t *testing.T) {
	t.Helper()
	deadline := time.After(readyWithin)
	for {
		b, err := os.ReadFile(filepath.Join(m.dir, "endpoints.json"))
		if err == nil {
			m.ends = endpoints{}
			if err := json.Unmarshal(b, &m.ends); err != nil {
				t.Fatalf("endpoints.json: %v\n%s", err, b)
			}
			m.younger(t)
			return
		}
		select {
		case <-m.ended:
			t.Fatalf("serve ended: %v", m.outcome())
		case <-deadline:
			t.Fatalf("serve is not ready after %v", readyWithin)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// younger waits until requests of this machine's time are younger than the start by the appliance's own, which may be ahead by what
// answers of time servers are late on a busy machine; older ones might be replayed, and are refused with clock_skew. Where a test
// has its time server lie by seconds it gives requests that time.
func (m *machine) younger(t *testing.T) {
	t.Helper()
	a := m.admin()
	defer a.Close()
	var s struct{ Time struct{ Time time.Time } }
	now := time.Now()
	if b, err := a.State(t.Context()); err != nil || json.Unmarshal(b, &s) != nil {
		return // it has no time, or has been killed meanwhile
	}
	time.Sleep(min(s.Time.Time.Sub(now), time.Second))
}

// outcome waits for the end.
func (m *machine) outcome() outcome {
	<-m.ended
	b, _ := os.ReadFile(m.log)
	return outcome{stderr: string(b), code: m.cmd.ProcessState.ExitCode()}
}

// stop asks it to end and wants an orderly end.
func (m *machine) stop(t *testing.T) {
	t.Helper()
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.ended:
	case <-time.After(patience):
		t.Fatalf("serve did not stop within %v of SIGTERM", patience)
	}
	if code := m.cmd.ProcessState.ExitCode(); code != 0 {
		t.Fatalf("serve stopped with exit %d", code)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "endpoints.json")); err == nil {
		t.Error("endpoints.json says ready after the stop")
	}
}

// kill is SIGKILL, to the appliance's process alone.
func (m *machine) kill(t *testing.T) {
	t.Helper()
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-m.ended
}

func (m *machine) admin() *client.Admin { return client.NewAdmin(m.ends.Admin) }

// state asks over the local socket.
func (m *machine) state(t *testing.T) machineState {
	t.Helper()
	a := m.admin()
	defer a.Close()
	b, err := a.State(t.Context())
	var s machineState
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// trusted waits for trusted time, the timestamp workers' too: an appliance that was born before serves earlier.
func (m *machine) trusted(t *testing.T) {
	t.Helper()
	eventually(t, readyWithin, "time is trusted", func() bool {
		s := m.state(t).Time
		return s.State == "trusted" && len(s.Workers) > 0 && !slices.ContainsFunc(s.Workers, func(w workerTime) bool { return w.State != "trusted" || w.Wrong != "" })
	})
}

// workerTime is what is known of a timestamp worker's clock.
type workerTime struct{ Machine, State, Wrong string }

// machineState is what the tests read of /health/state.
type machineState struct {
	State string
	Ready bool
	Time  struct {
		State   string
		Workers []workerTime
	}
	HSM map[string]struct {
		Phase    string
		SinceS   float64 `json:"since_s"`
		PID      int
		Restarts int
		Error    string `json:"last_error"`
	}
	Journal struct {
		Entries    uint64
		Checkpoint uint64
	}
	Projection struct {
		Lag  uint64
		Fork bool
	}
	Listeners  map[string]string
	Evaluation string
	Warnings   []string
}

// register registers an application by the command line and answers its client. Options change the client.
func (m *machine) register(t *testing.T, id string, flags ...string) *client.Client {
	t.Helper()
	mustRun(t, append([]string{"app", "register", id, "--dir", m.dir, "--name", "测试 " + id, "--campus", "本部"}, flags...)...)
	return m.client(t, id)
}

// client reads the application's credential. Answers take as long as the appliance may take for them, and some.
func (m *machine) client(t *testing.T, id string) *client.Client {
	t.Helper()
	c, err := client.New(m.clientConfig(t, id))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// answerWithin is the API's limit of 30 s for the handling of a request, and room for a busy machine; connectWithin has room, too.
const answerWithin, connectWithin = 2 * time.Minute, 15 * time.Second

func (m *machine) clientConfig(t *testing.T, id string) client.Config {
	t.Helper()
	var credential struct {
		Application string
		Key         string `json:"key_hex"`
	}
	b, err := os.ReadFile(filepath.Join(m.dir, "credentials", id+".json"))
	if err == nil {
		err = json.Unmarshal(b, &credential)
	}
	if err != nil || credential.Application != id {
		t.Fatalf("credential of %s: %+v, %v", id, credential, err)
	}
	key, err := hex.DecodeString(credential.Key)
	if err != nil {
		t.Fatal(err)
	}
	return client.Config{BaseURL: m.ends.API, AppID: id, Key: key, RootCAs: roots(t, m.ends.TLSCA), Clock: time.Now, Timeout: answerWithin, Connect: connectWithin}
}

func roots(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		t.Fatalf("%s holds no certificate", file)
	}
	return pool
}

// pinFile writes a PIN as the command line wants it.
func pinFile(t *testing.T, pin string) string {
	t.Helper()
	name := filepath.Join(tempDir(t), "pin")
	if err := os.WriteFile(name, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func (m *machine) enrol(t *testing.T, id, pin string, flags ...string) {
	t.Helper()
	args := []string{"signer", "enrol", id, "--dir", m.dir, "--name", "医师 " + id, "--department", "胸外科", "--campus", "本部"}
	if pin != "" {
		args = append(args, "--pin-file", pinFile(t, pin))
	}
	mustRun(t, append(args, flags...)...)
}

// stranger is a client with nothing of ours in it; one that keeps a connection has made it.
func (m *machine) stranger(t *testing.T, keep bool) *http.Client {
	t.Helper()
	h := &http.Client{Transport: &http.Transport{DisableKeepAlives: !keep, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots(t, m.ends.TLSCA)}}, Timeout: answerWithin}
	t.Cleanup(h.CloseIdleConnections)
	if keep {
		resp, err := h.Get(m.ends.API + "/health/alive")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body) // so that the connection can be used again
		resp.Body.Close()
	}
	return h
}

// handmade is a request signed once, to be sent as often as wanted. Changes are made after it was signed.
func (m *machine) handmade(t *testing.T, h *http.Client, app, key string, req *wire.SignRequest, change ...func([]byte) []byte) func(*testing.T) (*http.Response, string) {
	t.Helper()
	return handmadeAs(t, h, m.clientConfig(t, app), key, req, change...)
}

func handmadeAs(t *testing.T, h *http.Client, cfg client.Config, key string, req *wire.SignRequest, change ...func([]byte) []byte) func(*testing.T) (*http.Response, string) {
	t.Helper()
	body, err := json.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	host := strings.TrimPrefix(cfg.BaseURL, "https://")
	a := wire.Authorization{App: cfg.AppID, Time: strconv.FormatInt(time.Now().UnixMilli(), 10), Nonce: base64.RawURLEncoding.EncodeToString([]byte(key + "-0123456789abcdef"))[:20]}
	a.MAC = wire.MAC(cfg.Key, wire.Signable{Method: "POST", Path: "/v1/sign", Host: host, Body: body}, a.App, a.Time, a.Nonce)
	for _, f := range change {
		body = f(body)
	}
	return func(t *testing.T) (*http.Response, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "POST", cfg.BaseURL+"/v1/sign", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Accept", "application/json")
		r.Header.Set("Idempotency-Key", key)
		r.Header.Set("Authorization", a.String())
		resp, err := h.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(b)
	}
}

// documentOf is the content that a key's signature is over.
func documentOf(key string) []byte {
	return []byte(`<?xml version="1.0" encoding="UTF-8"?><病历 编号="` + key + `"/>`)
}

// asserted is a request with the application's word for the signer's consent.
func asserted(signer, key string) *wire.SignRequest {
	return &wire.SignRequest{
		Signer: signer, Algorithm: "SM2", Form: "raw", Content: documentOf(key), Role: "主治医师",
		Document: wire.Document{ID: key, Type: "progress-note", MediaType: "application/xml"},
		Consent:  wire.Consent{Method: "app-asserted", Assertion: "test"},
	}
}

// wantCode wants a refusal with the code.
func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	var p *client.Problem
	if !errors.As(err, &p) || p.Code != code {
		t.Errorf("err = %v, want a problem %s", err, code)
		return
	}
	if p.Detail == "" || p.Next == "" {
		t.Errorf("problem %s has no reason or next step: %+v", code, p)
	}
}

// A process is one of this machine, told from a later one of the same number by when it began.
type process struct {
	pid   int
	start string // field 22 of /proc/PID/stat
	args  string
}

func readProcess(pid int) (p process, parent int, ok bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return p, 0, false
	}
	_, rest, found := strings.Cut(string(b), ") ") // the name may hold anything
	fields := strings.Fields(rest)
	if !found || len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return p, 0, false
	}
	parent, _ = strconv.Atoi(fields[1])
	args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return process{pid, fields[19], string(bytes.TrimSpace(bytes.ReplaceAll(args, []byte{0}, []byte{' '})))}, parent, true
}

// descendants are the processes below pid.
func descendants(t *testing.T, pid int) []process {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	children := map[int][]process{}
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, parent, ok := readProcess(n); ok {
			children[parent] = append(children[parent], p)
		}
	}
	var all []process
	for todo := []int{pid}; len(todo) > 0; todo = todo[1:] {
		for _, p := range children[todo[0]] {
			all = append(all, p)
			todo = append(todo, p.pid)
		}
	}
	return all
}

// childWith is the one descendant whose command line has the words.
func childWith(t *testing.T, pid int, words string) process {
	t.Helper()
	var found []process
	for _, p := range descendants(t, pid) {
		if strings.Contains(p.args, words) {
			found = append(found, p)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d processes with %q below %d: %v", len(found), words, pid, found)
	}
	return found[0]
}

func (p process) alive() bool {
	now, _, ok := readProcess(p.pid)
	return ok && now.start == p.start
}

// signal sends to the process, unless its number belongs to another by now. One that is to stop has stopped then: on a busy
// machine its threads may go on for some calls.
func (p process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if !p.alive() {
		t.Fatalf("process %d (%s) has gone", p.pid, p.args)
	}
	if err := syscall.Kill(p.pid, s); err != nil {
		t.Fatalf("signal %v to %d (%s): %v", s, p.pid, p.args, err)
	}
	if s != syscall.SIGSTOP {
		return
	}
	eventually(t, 20*time.Second, "all its threads stop", func() bool {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.pid)) // the pattern is well-formed
		return !slices.ContainsFunc(threads, func(name string) bool {
			b, err := os.ReadFile(name)
			return err == nil && !bytes.Contains(b, []byte(") T ")) // one that has gone runs no more
		})
	})
}

// patience is what a test waits for at the least, before it says that something does not come. On a machine that has no time for it
// seconds become minutes, and that is nobody's fault; where something never comes the wait costs a failing run no more than time.
const patience = 4 * time.Minute

// eventually asks until the answer is yes.
func eventually(t *testing.T, within time.Duration, what string, yes func() bool) {
	t.Helper()
	begun, within := time.Now(), max(within, patience)
	for !yes() {
		if time.Since(begun) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// leavesJournal wants what is tried to enter nothing. What the appliance itself enters now and then comes between at some tries.
func (m *machine) leavesJournal(t *testing.T, try func()) {
	t.Helper()
	eventually(t, time.Minute, "the journal does not grow", func() bool {
		before := m.state(t).Journal.Entries
		try()
		return m.state(t).Journal.Entries == before || t.Failed()
	})
}

// freePort is one that nobody listens on, for a machine that goes and comes back.
func freePort(t *testing.T) string {
	t.Helper()
	return porttest.Free(t)
}

// audited verifies a journal and wants nothing to be found. Of the last entries nothing can be said before they are under a
// checkpoint, which takes half a second where the appliance runs.
func audited(t *testing.T, dir string, more ...string) (o outcome) {
	t.Helper()
	eventually(t, time.Minute, "the last entries are under a checkpoint", func() bool {
		o = yinjian(t, append([]string{"audit", "verify", "--dir", dir}, more...)...)
		return o.code == 0 || strings.Contains(o.stdout, "✗") || !strings.Contains(o.stdout, "离线无法判断")
	})
	if o.code != 0 {
		t.Fatalf("audit verify: %v", o)
	}
	return o
}

// The checks after any abuse: the journal is unbroken and the projection agrees with it.
func (m *machine) mustBeClean(t *testing.T) {
	t.Helper()
	if o := audited(t, m.dir); !strings.Contains(o.stdout, "未发现改动") {
		t.Errorf("audit verify: %v", o)
	}
	eventually(t, 30*time.Second, "everything is shipped", func() bool { return m.state(t).Projection.Lag == 0 })
	if o := yinjian(t, "db", "compare", "--dir", m.dir); o.code != 0 || !strings.Contains(o.stdout, "与日志一致") {
		t.Errorf("db compare: %v", o)
	}
}

// judge is Bouncy Castle's command, compiled once.
var judge = sync.OnceValues(func() ([]string, error) { return cmstest.Compile(built.dir) })
