package main_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/sync/errgroup"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/pki"
	"yinjian/appliance/sign"
)

// TestUsage is about calls that are mistakes: exit 2, and a line that says what to do.
func TestUsage(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args  []string
		words []string
	}{
		"unknown command":       {[]string{"sing"}, []string{"用法错误", "sing"}},
		"unknown subcommand":    {[]string{"app", "registre", "x"}, []string{"用法错误", "registre"}},
		"unknown flag":          {[]string{"serve", "--dri", "x"}, []string{"用法错误", "--dri"}},
		"missing flag":          {[]string{"serve"}, []string{"用法错误", "dir"}},
		"missing argument":      {[]string{"signer", "enrol", "--dir", "x"}, []string{"用法错误", "1"}},
		"extra argument":        {[]string{"status", "--dir", "x", "y"}, []string{"用法错误"}},
		"unknown output":        {[]string{"status", "--dir", "x", "-o", "yaml"}, []string{"yaml", "json"}},
		"audit of nothing":      {[]string{"audit", "verify"}, []string{"--dir"}},
		"worker by hand":        {[]string{"worker"}, []string{"用法错误"}},
		"plain not on loopback": {[]string{"init", "--dir", filepath.Join(tempDir(t), "x"), "--simulated-beidou", "--tsa-plain", "0.0.0.0:0"}, []string{"listen.tsa_plain", "回环"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			refused(t, 2, c.words, c.args...)
		})
	}
}

// TestNothingToServe is about folders that are no appliance yet, or are one that must not run so.
func TestNothingToServe(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)

	t.Run("not initialised", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(tempDir(t), "none")
		refused(t, 1, []string{"config.toml", "yinjian init --dir"}, "serve", "--dir", dir)
		for _, args := range [][]string{{"status"}, {"app", "list"}, {"signer", "list"}, {"db", "compare"}, {"crl", "publish"}} {
			refused(t, 1, []string{"未在运行", "yinjian serve"}, append(args, "--dir", dir)...)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Error("a refused command has made the folder")
		}
	})
	t.Run("folder in use", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		if err := os.WriteFile(filepath.Join(dir, "thesis.txt"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, 2, []string{"不是空目录"}, "init", "--dir", dir, "--simulated-beidou")
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("the folder holds %v, %v", entries, err)
		}
	})
	t.Run("init refused leaves nothing", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(tempDir(t), "a")
		refused(t, 2, []string{"node"}, "init", "--dir", dir, "--simulated-beidou", "--node", "Bad Node")
		refused(t, 2, []string{"listen.api"}, "init", "--dir", dir, "--simulated-beidou", "--listen", "nowhere")
		mustRun(t, "init", "--dir", dir, "--simulated-beidou")
	})
	t.Run("module missing", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(tempDir(t), "a")
		refused(t, 2, []string{"module", "/nonexistent"}, "init", "--dir", dir, "--simulated-beidou", "--module", "/nonexistent/no-such-module.so")
		mustRun(t, "init", "--dir", dir, "--simulated-beidou")
	})
	t.Run("no time source", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(tempDir(t), "a")
		refused(t, 2, []string{"time.sources"}, "init", "--dir", dir)
		mustRun(t, "init", "--dir", dir, "--time-source", "127.0.0.1:1", "--time-source", "127.0.0.1:2")
	})
	t.Run("configuration", func(t *testing.T) {
		t.Parallel()
		dir := initAppliance(t, server)
		name := filepath.Join(dir, "config.toml")
		good, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for what, c := range map[string]struct {
			old, new string
			at       string // what is wrong stands in this line
			words    []string
		}{
			"unknown key":         {"[policy]\n", "[policy]\nresreve_bytes = 1\n", "resreve", []string{"policy.resreve_bytes", "未知的配置项"}},
			"unknown table":       {"[policy]\n", "[polcy]\nx = 1\n[policy]\n", "[polcy]", []string{"polcy"}},
			"no campus":           {"campus = '本部'", "campus = ''", "", []string{"campus", "1–64"}},
			"wrong type":          {"min_sources = 1", "min_sources = 'one'", "'one'", []string{"config.toml", "min_sources"}},
			"no TOML":             {"[policy]", "[policy", "", []string{"config.toml"}},
			"two slots, one card": {"token_label = 'yinjian-log'", "token_label = 'yinjian-tsa'", "", []string{"hsm.slots", "用途须分离"}},
			"accuracy":            {"accuracy = '1s'", "accuracy = '1h'", "", []string{"time.accuracy"}},
		} {
			bad := bytes.Replace(good, []byte(c.old), []byte(c.new), 1)
			if bytes.Equal(bad, good) {
				t.Fatalf("%s: %q is not in the configuration:\n%s", what, c.old, good)
			}
			if err := os.WriteFile(name, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			o := refused(t, 1, c.words, "serve", "--dir", dir)
			if c.at == "" {
				continue
			}
			line := strconv.Itoa(1 + bytes.Count(bad[:bytes.Index(bad, []byte(c.at))], []byte("\n")))
			if !regexp.MustCompile(`(?m)\b` + line + `:\d+: `).MatchString(o.stderr) {
				t.Errorf("%s: line %s is not named: %v", what, line, o)
			}
		}
	})
	t.Run("secrets", func(t *testing.T) {
		t.Parallel()
		dir := initAppliance(t, server)
		secret := func(name string) string { return filepath.Join(dir, "secrets", name) }
		// 1. A PIN that others may read, an empty one, none.
		if err := os.Chmod(secret("tsa.pin"), 0o644); err != nil {
			t.Fatal(err)
		}
		refused(t, 1, []string{"tsa.pin", "0644", "chmod 600"}, "serve", "--dir", dir)
		if err := os.Chmod(secret("tsa.pin"), 0o600); err != nil {
			t.Fatal(err)
		}
		pin, err := os.ReadFile(secret("log.pin"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(secret("log.pin"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, 1, []string{"log.pin", "空文件"}, "serve", "--once", "--dir", dir)
		if err := os.Remove(secret("log.pin")); err != nil {
			t.Fatal(err)
		}
		refused(t, 1, []string{"hsm.slots.log", "log.pin"}, "serve", "--once", "--dir", dir)
		// 2. A wrong PIN is presented once, however often a service manager starts the appliance again.
		if err := os.WriteFile(secret("log.pin"), []byte("not-the-pin\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		o := refused(t, 1, []string{"log.pin", "CKR_PIN_INCORRECT", "改正后重启"}, "serve", "--once", "--dir", dir)
		if n := strings.Count(o.stderr, `msg="wrong PIN"`); n != 1 {
			t.Errorf("the wrong PIN was presented %d times: %v", n, o)
		}
		for range 2 {
			o := refused(t, 1, []string{"log.pin", "已被拒绝"}, "serve", "--once", "--dir", dir)
			if strings.Contains(o.stderr, `msg="wrong PIN"`) {
				t.Errorf("the wrong PIN was presented again: %v", o)
			}
		}
		// 3. Corrected, it starts, and the token's count is clear again.
		if err := os.WriteFile(secret("log.pin"), pin, 0o600); err != nil {
			t.Fatal(err)
		}
		m := serve(t, dir)
		if h := m.state(t).HSM["log"]; h.Phase != "ready" {
			t.Errorf("slot log: %+v", h)
		}
		m.stop(t)
		// 4. The passphrase of the software cipher machine: open to others, wrong.
		phrase := secret("softtoken.passphrase")
		if err := os.Chmod(phrase, 0o640); err != nil {
			t.Fatal(err)
		}
		refused(t, 1, []string{"softtoken.passphrase"}, "softtoken", "--dir", dir)
		if err := os.Chmod(phrase, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(phrase, []byte("another passphrase\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, 1, []string{"wrong passphrase"}, "softtoken", "--dir", dir)
		begun := time.Now()
		refused(t, 1, []string{"软件密码机没有启动", "wrong passphrase"}, "serve", "--once", "--dir", dir)
		if took := time.Since(begun); took > patience {
			t.Errorf("the refusal took %v", took)
		}
	})
	t.Run("unborn without time", func(t *testing.T) {
		t.Parallel()
		silent := startTimeServer(t)
		silent.silent.Store(true)
		dir := initAppliance(t, silent)
		m := launch(t, dir)
		eventually(t, 30*time.Second, "it says what it waits for", func() bool {
			b, err := os.ReadFile(m.log)
			return err == nil && bytes.Contains(b, []byte("waiting for trusted time"))
		})
		if _, err := os.Stat(filepath.Join(dir, "ca.pem")); err == nil {
			t.Error("certificates were made without trusted time")
		}
		m.stop(t) // in order, though it never was ready
	})
}

// TestBirthInterrupted kills a new appliance again and again, a little later each time, until it is ready: the one that
// comes out is whole.
func TestBirthInterrupted(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	kills := 0
	for wait := 50 * time.Millisecond; ; wait += max(150*time.Millisecond, wait/8) { // a busy machine takes minutes
		m := launch(t, dir, "--once")
		ready := func() bool { _, err := os.Stat(filepath.Join(dir, "endpoints.json")); return err == nil }
		for end := time.Now().Add(wait); time.Now().Before(end) && !ready(); time.Sleep(5 * time.Millisecond) {
			select {
			case <-m.ended:
				t.Fatalf("it gave up: %v", m.outcome())
			default:
			}
		}
		done := ready()
		m.kill(t)
		kills++
		if done || wait > patience {
			break
		}
	}
	t.Logf("%d kills", kills)
	m := serve(t, dir)
	m.trusted(t)
	c := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "")
	r, err := c.Sign(t.Context(), "first", asserted("D1", "first"))
	if err != nil {
		t.Fatal(err)
	}
	m.mustBeClean(t)
	m.judgeAll(t, "his", map[string]*wire.SignResult{"first": r})
	m.stop(t)
}

// TestOperations is the life of one appliance: what administrators do, what is refused, and that each stays so over
// restarts. The steps build on one another.
func TestOperations(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	server := startTimeServer(t)
	dir := initAppliance(t, server, "--listen", freePort(t), "--tsa-plain", "127.0.0.1:0")
	o := &operations{T: t, all: t, server: server, dir: dir}
	o.m = serve(t, dir)
	for _, step := range []struct {
		name string
		do   func(*operations)
	}{
		{"second serve", (*operations).secondServe},
		{"applications", (*operations).applications},
		{"signers", (*operations).signers},
		{"consent", (*operations).consent},
		{"pin lock", (*operations).pinLock},
		{"stop and start", (*operations).stopAndStart},
		{"revocation", (*operations).revocation},
		{"replay", (*operations).replay},
		{"disk reserve", (*operations).diskReserve},
		{"untrusted time", (*operations).untrustedTime},
		{"graceful stop", (*operations).gracefulStop},
		{"dead socket", (*operations).deadSocket},
	} {
		if !t.Run(step.name, func(t *testing.T) {
			o.T = t
			step.do(o)
		}) {
			return
		}
	}
	o.T = t
	o.m.mustBeClean(t)
	o.m.stop(t)
	entriesByRef(t, dir, o.made)
}

type operations struct {
	*testing.T            // the step's
	all        *testing.T // the whole: what is started outlives a step
	server     *timeServer
	dir        string
	m          *machine
	his, emr   *client.Client
	made       map[string]*wire.SignResult
}

// restart stops in order, lets the caller change something, and starts again.
func (o *operations) restart(change func()) {
	o.Helper()
	o.m.stop(o.T)
	if change != nil {
		change()
	}
	o.m = serve(o.all, o.dir)
	if o.his != nil {
		o.his, o.emr = o.m.client(o.all, "his"), o.m.client(o.all, "emr")
	}
}

// signs wants a signature by HIS with consent asserted.
func (o *operations) signs(signer, key string) *wire.SignResult {
	o.Helper()
	r, err := o.his.Sign(o.Context(), key, asserted(signer, key))
	if err != nil {
		o.Fatalf("%s: %v", key, err)
	}
	if o.made == nil {
		o.made = map[string]*wire.SignResult{}
	}
	o.made[key] = r
	return r
}

// refuses wants the code, and that no record was made.
func (o *operations) refuses(signer, key, code string) {
	o.Helper()
	_, err := o.his.Sign(o.Context(), key, asserted(signer, key))
	wantCode(o.T, err, code)
	id := sign.RecordID("his", key)
	_, err = o.his.Evidence(o.Context(), hex.EncodeToString(id[:]))
	wantCode(o.T, err, "not_found")
}

func (o *operations) secondServe() {
	before := o.m.state(o.T)
	o.m.leavesJournal(o.T, func() {
		for range 2 {
			refused(o.T, 1, []string{"已在该目录运行"}, "serve", "--dir", o.dir)
		}
		refused(o.T, 2, []string{"不是空目录"}, "init", "--dir", o.dir, "--simulated-beidou")
		refused(o.T, 1, []string{"in use"}, "softtoken", "--dir", o.dir)
	})
	if _, err := os.Stat(filepath.Join(o.dir, "endpoints.json")); err != nil {
		o.Error("the refused one has taken away endpoints.json:", err)
	}
	after := o.m.state(o.T)
	for class, h := range after.HSM {
		if h.Restarts != before.HSM[class].Restarts || h.Phase != "ready" {
			o.Errorf("slot %s was disturbed: %+v", class, h)
		}
	}
	if api := after.Listeners["api"]; !strings.Contains(api, strings.TrimPrefix(o.m.ends.API, "https://")) {
		o.Errorf("state says that the API is at %q, it is at %s", api, o.m.ends.API)
	}
}

func (o *operations) applications() {
	o.his = o.m.register(o.all, "his", "--consent", "signer-pin,app-asserted")
	o.emr = o.m.register(o.all, "emr", "--consent", "signer-pin")
	credential := filepath.Join(o.dir, "credentials", "his.json")
	had, err := os.ReadFile(credential)
	if err != nil {
		o.Fatal(err)
	}
	if st, err := os.Stat(credential); err != nil || st.Mode().Perm() != 0o600 {
		o.Errorf("mode of the credential: %v, %v", st.Mode(), err)
	}
	register := func(id string, more ...string) []string {
		return append([]string{"app", "register", id, "--dir", o.dir, "--name", "测试", "--campus", "本部"}, more...)
	}
	refused(o.T, 1, []string{"his.json"}, register("his")...)
	elsewhere := filepath.Join(tempDir(o.T), "his.json")
	refused(o.T, 1, []string{"[exists]", "下一步"}, register("his", "--key-file", elsewhere)...)
	if _, err := os.Stat(elsewhere); err == nil {
		o.Error("a refused registration has left a credential")
	}
	if now, err := os.ReadFile(credential); err != nil || !bytes.Equal(now, had) {
		o.Errorf("the credential was changed: %v", err)
	}
	refused(o.T, 1, []string{"[invalid_request id]"}, register("Bad_ID", "--key-file", elsewhere)...)
	refused(o.T, 1, []string{"[invalid_request rights]"}, register("ok", "--rights", "everything", "--key-file", elsewhere)...)
	refused(o.T, 1, []string{"[invalid_request consent]"}, register("ok", "--consent", "trust-me", "--key-file", elsewhere)...)
	refused(o.T, 2, []string{"campus", "name"}, "app", "register", "ok", "--dir", o.dir, "--key-file", elsewhere)
	if _, err := os.Stat(elsewhere); err == nil {
		o.Error("a refused registration has left a credential")
	}
	list := mustRun(o.T, "app", "list", "--dir", o.dir, "-o", "json").stdout
	if !json.Valid([]byte(list)) || !strings.Contains(list, `"his"`) || strings.Contains(list, `"ok"`) {
		o.Errorf("applications: %s", list)
	}
	var c struct {
		Key string `json:"key_hex"`
	}
	if err := json.Unmarshal(had, &c); err != nil || len(c.Key) != 64 || strings.Contains(list, c.Key) {
		o.Errorf("key of %d digits, %v; or the list shows it", len(c.Key), err)
	}
}

func (o *operations) signers() {
	enrol := func(id string, more ...string) []string {
		return append([]string{"signer", "enrol", id, "--dir", o.dir, "--name", "医师", "--department", "胸外科", "--campus", "本部"}, more...)
	}
	o.m.enrol(o.T, "D1", "482913")
	o.m.enrol(o.T, "D2", "")
	refused(o.T, 1, []string{"[exists]"}, enrol("D1")...)
	refused(o.T, 1, []string{"[invalid_request "}, enrol("D3", "--pin-file", pinFile(o.T, "123"))...)
	open := pinFile(o.T, "482913")
	if err := os.Chmod(open, 0o644); err != nil {
		o.Fatal(err)
	}
	refused(o.T, 1, []string{"0644", "chmod 600"}, enrol("D3", "--pin-file", open)...)
	refused(o.T, 1, []string{"[invalid_request "}, enrol("D3", "--algorithms", "RSA-1024")...)
	refused(o.T, 1, []string{"[invalid_request "}, enrol("D 3")...)
	refused(o.T, 2, []string{"--pin-file"}, "signer", "set-pin", "D1", "--dir", o.dir)
	refused(o.T, 1, []string{"[signer_unknown]"}, "signer", "set-pin", "D9", "--dir", o.dir, "--pin-file", pinFile(o.T, "482913"))
	if list := mustRun(o.T, "signer", "list", "--dir", o.dir).stdout; strings.Contains(list, "D3") || !strings.Contains(list, "胸外科") {
		o.Errorf("signers: %s", list)
	}
	o.signs("D1", "plain")
}

// consent is about authorisations by PIN: bound, spent, foreign, void after a restart.
func (o *operations) consent() {
	digest := func(key string) []byte { sum := sm3.Sum(documentOf(key)); return sum[:] }
	with := func(id, key string) *wire.SignRequest {
		r := asserted("D1", key)
		r.Consent = wire.Consent{AuthorizationID: id}
		return r
	}
	once, err := o.emr.Authorize(o.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: "482913", Digests: [][]byte{digest("c1")}})
	if err != nil {
		o.Fatal(err)
	}
	_, err = o.emr.Sign(o.Context(), "c0", asserted("D1", "c0"))
	wantCode(o.T, err, "consent_insufficient")
	_, err = o.his.Sign(o.Context(), "c1", with(once.ID, "c1"))
	wantCode(o.T, err, "authorization_invalid") // another application's
	_, err = o.emr.Sign(o.Context(), "c2", with(once.ID, "c2"))
	wantCode(o.T, err, "authorization_invalid") // another document
	wrong := with(once.ID, "c1")
	wrong.Signer = "D2"
	_, err = o.emr.Sign(o.Context(), "c1", wrong)
	wantCode(o.T, err, "authorization_invalid") // another signer
	r, err := o.emr.Sign(o.Context(), "c1", with(once.ID, "c1"))
	if err != nil {
		o.Fatal(err)
	}
	_, err = o.emr.Sign(o.Context(), "c1-again", with(once.ID, "c1"))
	wantCode(o.T, err, "authorization_spent")
	_, err = o.his.Evidence(o.Context(), r.RecordID)
	wantCode(o.T, err, "not_found") // another application's record

	many, err := o.emr.Authorize(o.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: "482913", Count: 2, Seconds: 600})
	if err != nil {
		o.Fatal(err)
	}
	// Refused requests do not use it up; concurrent ones cannot overdraw it.
	_, err = o.emr.Sign(o.Context(), "c3 with spaces", with(many.ID, "c3"))
	wantCode(o.T, err, "invalid_request")
	var g errgroup.Group
	codes := make([]string, 6)
	for i := range codes {
		g.Go(func() error {
			_, err := o.emr.Sign(context.Background(), fmt.Sprintf("many-%d", i), with(many.ID, fmt.Sprintf("many-%d", i)))
			switch {
			case err == nil:
				codes[i] = "signed"
			case client.Is(err, "authorization_spent"):
				codes[i] = "spent"
			default:
				return err
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		o.Error(err)
	}
	if slices.Sort(codes); !slices.Equal(codes, []string{"signed", "signed", "spent", "spent", "spent", "spent"}) {
		o.Errorf("two uses gave %v", codes)
	}

	// A restart voids what is live, and a retry of what was signed still gets its record.
	left, err := o.emr.Authorize(o.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: "482913", Count: 5, Seconds: 600})
	if err != nil {
		o.Fatal(err)
	}
	o.restart(nil)
	_, err = o.emr.Sign(o.Context(), "after", with(left.ID, "after"))
	wantCode(o.T, err, "authorization_invalid")
	again, err := o.emr.Sign(o.Context(), "c1", with(once.ID, "c1"))
	if err != nil || !again.Replayed || again.RecordID != r.RecordID || !bytes.Equal(again.Signature, r.Signature) || !bytes.Equal(again.Token, r.Token) {
		o.Errorf("the retry got %+v, %v", again, err)
	}
	_, err = o.emr.Sign(o.Context(), "c1", with(once.ID, "c2"))
	wantCode(o.T, err, "idempotency_conflict")
}

func (o *operations) pinLock() {
	try := func(pin string) error {
		_, err := o.his.Authorize(o.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: pin, Count: 1, Seconds: 60})
		return err
	}
	for left := 4; left >= 0; left-- {
		err := try("000000")
		var p *client.Problem
		if left > 0 {
			wantCode(o.T, err, "pin_wrong")
			if errors.As(err, &p) && (p.TriesLeft == nil || *p.TriesLeft != left) {
				o.Errorf("tries left: %v, want %d", p.TriesLeft, left)
			}
			continue
		}
		if !client.Is(err, "pin_locked") {
			wantCode(o.T, err, "pin_wrong")
		}
	}
	wantCode(o.T, try("482913"), "pin_locked")
	o.restart(nil)
	wantCode(o.T, try("482913"), "pin_locked")
	mustRun(o.T, "signer", "set-pin", "D1", "--dir", o.dir, "--pin-file", pinFile(o.T, "739155"))
	wantCode(o.T, try("482913"), "pin_wrong")
	if err := try("739155"); err != nil {
		o.Error(err)
	}
	o.restart(nil)
	if err := try("739155"); err != nil {
		o.Error(err)
	}
	_, err := o.his.Authorize(o.Context(), &wire.AuthorizationRequest{Signer: "D2", PIN: "739155", Count: 1, Seconds: 60})
	if err == nil {
		o.Error("a signer without a PIN consents by one")
	}
}

func (o *operations) stopAndStart() {
	refused(o.T, 2, []string{"reason"}, "signer", "stop", "D1", "--dir", o.dir)
	mustRun(o.T, "signer", "stop", "D1", "--dir", o.dir, "--reason", "离职")
	o.refuses("D1", "stopped", "signer_stopped")
	o.restart(nil)
	o.refuses("D1", "stopped", "signer_stopped")
	o.signs("D2", "other-signer")
	mustRun(o.T, "signer", "start", "D1", "--dir", o.dir, "--reason", "返聘")
	o.signs("D1", "stopped")

	mustRun(o.T, "app", "stop", "emr", "--dir", o.dir, "--reason", "下线")
	_, err := o.emr.Timestamp(o.Context(), &wire.TimestampRequest{Data: []byte("x")})
	wantCode(o.T, err, "application_stopped")
	refused(o.T, 1, []string{"[not_found]"}, "app", "stop", "none", "--dir", o.dir, "--reason", "x")
}

func (o *operations) revocation() {
	before := o.signs("D1", "before-revocation")
	cert, err := pki.ParseCertificate(before.Certificates[0])
	if err != nil {
		o.Fatal(err)
	}
	serial := pki.SerialHex(cert.SerialNumber)
	refused(o.T, 1, []string{"[not_found]"}, "cert", "revoke", "0123456789abcdef", "--dir", o.dir)
	refused(o.T, 1, []string{"[invalid_request "}, "cert", "revoke", serial, "--dir", o.dir, "--reason", "boredom")
	mustRun(o.T, "cert", "revoke", strings.ToUpper(serial), "--dir", o.dir, "--reason", "superseded")
	o.refuses("D1", "after-revocation", "certificate_unusable")
	for range 2 { // and after a restart
		status, err := o.his.Certificate(o.Context(), serial)
		if err != nil || status.Status != "revoked" || status.Reason != "superseded" {
			o.Errorf("status %+v, %v", status, err)
		}
		o.refuses("D1", "after-revocation", "certificate_unusable")
		o.restart(nil)
	}
	// The other key is another certificate.
	rsa := asserted("D1", "rsa")
	rsa.Algorithm = "RSA-2048"
	r, err := o.his.Sign(o.Context(), "rsa", rsa)
	if err != nil {
		o.Error(err)
	} else {
		o.made["rsa"] = r
	}
	// What was signed before stays valid: its token precedes the revocation.
	o.m.judgeAll(o.T, "his", map[string]*wire.SignResult{"before-revocation": before})
	// The published CRL names it, and OpenSSL agrees.
	crls, err := filepath.Glob(filepath.Join(o.dir, "crl-*.crl"))
	if err != nil || len(crls) == 0 {
		o.Fatalf("no CRL is published: %v, %v", crls, err)
	}
	named := false
	for _, crl := range crls {
		out := command(o.T, nil, "openssl", "crl", "-inform", "DER", "-in", crl, "-noout", "-text")
		named = named || out.code == 0 && strings.Contains(strings.ToLower(out.stdout), "serial number: "+serial)
	}
	if !named {
		o.Errorf("no published CRL names %s", serial)
	}
}

// replay sends the same bytes again: at once, after an orderly restart, and after a kill.
func (o *operations) replay() {
	o.signs("D2", "replay")
	send := o.m.handmade(o.T, o.m.stranger(o.T, false), "his", "replay-by-hand", asserted("D2", "replay-by-hand"))
	if resp, body := send(o.T); resp.StatusCode != http.StatusOK {
		o.Fatalf("%s %s", resp.Status, body)
	}
	if resp, body := send(o.T); resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `"replayed_request"`) {
		o.Errorf("at once: %s %s", resp.Status, body)
	}
	o.restart(nil)
	if resp, body := send(o.T); resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `"clock_skew"`) {
		o.Errorf("after a restart: %s %s", resp.Status, body)
	}
	o.m.kill(o.T)
	o.m = serve(o.all, o.dir)
	if resp, body := send(o.T); resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `"clock_skew"`) {
		o.Errorf("after a kill: %s %s", resp.Status, body)
	}
	// A changed byte is no longer the application's word.
	o.his = o.m.client(o.T, "his")
	send = o.m.handmade(o.T, o.m.stranger(o.T, false), "his", "forged", asserted("D2", "forged"), func(b []byte) []byte { return bytes.Replace(b, []byte("D2"), []byte("D1"), 1) })
	if resp, body := send(o.T); resp.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `"unauthenticated"`) {
		o.Errorf("forged: %s %s", resp.Status, body)
	}
	eventually(o.T, 30*time.Second, "the replay guard's wait after a kill is over", func() bool {
		_, err := o.his.Certificate(o.Context(), "00")
		return !client.Is(err, "clock_skew")
	})
}

// notReady wants /health/ready to say no, with the words.
func (o *operations) notReady(words string) {
	o.Helper()
	r, err := o.his.Ready(o.Context())
	if err != nil || r.Ready || !strings.Contains(strings.Join(r.Reasons, " "), words) {
		o.Errorf("ready: %+v, %v; want no, because of %q", r, err, words)
	}
}

// stampRefused wants a rejection with the words that OpenSSL has for it, and no token.
func (o *operations) stampRefused(words string) {
	o.Helper()
	dir := tempDir(o.T)
	query, reply := filepath.Join(dir, "q"), filepath.Join(dir, "r")
	if out := command(o.T, nil, "openssl", "ts", "-query", "-digest", strings.Repeat("ab", 32), "-sha256", "-cert", "-out", query); out.code != 0 {
		o.Fatal(out)
	}
	b, err := os.ReadFile(query)
	if err == nil {
		b, err = client.StampPlain(o.Context(), o.m.ends.TSARSA, b)
	}
	if err == nil {
		err = os.WriteFile(reply, b, 0o600)
	}
	if err != nil {
		o.Fatal(err)
	}
	text := command(o.T, nil, "openssl", "ts", "-reply", "-in", reply, "-text")
	if !strings.Contains(text.stdout, "Rejected") || !strings.Contains(text.stdout, words) || strings.Contains(text.stdout, "Serial number") {
		o.Errorf("want a rejection with %q: %v", words, text)
	}
}

func (o *operations) diskReserve() {
	var had uint64
	discarded := len(entries(o.T, o.dir, "signature.discarded"))
	o.restart(func() {
		configure(o.T, o.dir, func(c *appliance.Config) { had, c.Policy.ReserveBytes = c.Policy.ReserveBytes, 1<<60 })
	})
	o.notReady("存储空间")
	o.m.leavesJournal(o.T, func() {
		o.refuses("D2", "reserve", "disk_reserve")
		o.stampRefused("system failure")
		if _, err := o.his.Timestamp(o.Context(), &wire.TimestampRequest{Data: []byte("x")}); err == nil {
			o.Error("a token was given although the room is kept in reserve")
		}
	})
	// Strangers' tokens are refused before signatures are.
	percent := 0
	o.restart(func() {
		configure(o.T, o.dir, func(c *appliance.Config) {
			percent, c.Policy.ReserveBytes, c.Policy.TSAReservePercent = c.Policy.TSAReservePercent, had, 100
		})
	})
	o.stampRefused("system failure")
	o.signs("D2", "reserve") // the same key
	o.restart(func() { configure(o.T, o.dir, func(c *appliance.Config) { c.Policy.TSAReservePercent = percent }) })
	// A stop journals what was thrown away: no token was signed first and refused then.
	if now := len(entries(o.T, o.dir, "signature.discarded")); now != discarded {
		o.Errorf("%d entries of signatures that were thrown away, want %d", now, discarded)
	}
}

func (o *operations) untrustedTime() {
	// 1. The source is silent and the appliance has its anchor: Holdover, and signing goes on.
	o.restart(func() { o.server.silent.Store(true) })
	if s := o.m.state(o.T).Time.State; s != "holdover" {
		o.Errorf("time is %s, want holdover", s)
	}
	o.signs("D2", "holdover")
	// 2. Without its anchor it knows no time.
	o.restart(func() {
		if err := os.Remove(filepath.Join(o.dir, "run", "time.json")); err != nil {
			o.Fatal(err)
		}
	})
	o.m.leavesJournal(o.T, func() {
		o.refuses("D2", "untrusted", "time_untrusted")
		o.notReady("时间不可信")
		o.stampRefused("time source")
		_, err := o.his.Timestamp(o.Context(), &wire.TimestampRequest{Data: []byte("x")})
		wantCode(o.T, err, "time_untrusted")
		refused(o.T, 1, []string{"[time_untrusted]"}, "signer", "enrol", "D8", "--dir", o.dir, "--name", "医师", "--department", "内科", "--campus", "本部")
	})
	// 3. It comes back by itself.
	o.server.silent.Store(false)
	o.m.trusted(o.T)
	o.signs("D2", "untrusted") // the same key
}

// gracefulStop sends SIGTERM under load, with requests whose body is half sent: they are answered.
func (o *operations) gracefulStop() {
	o.m.register(o.T, "load", "--consent", "app-asserted")
	l := startLoad(o.T, o.m, []string{"D2"})
	l.progress(3, time.Minute)
	const begun = 8
	cfg := o.m.clientConfig(o.T, "his")
	reading, finish := make(chan struct{}, begun), make(chan struct{})
	var g errgroup.Group
	results := make([]wire.SignResult, begun)
	for i := range begun {
		key := fmt.Sprintf("graceful-%d", i)
		o.made[key] = &results[i]
		g.Go(func() error { return signSlowly(cfg, key, asserted("D2", key), reading, finish, &results[i]) })
	}
	for range begun {
		select {
		case <-reading:
		case <-time.After(patience):
			o.Fatal("the appliance does not read the bodies")
		}
	}
	l.during("restart", readyWithin, func() {
		if err := o.m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			o.Fatal(err)
		}
		eventually(o.T, 10*time.Second, "the stop begins", func() bool {
			b, err := os.ReadFile(o.m.log)
			return err == nil && bytes.Contains(b, []byte("finishing what was begun"))
		})
		eventually(o.T, 10*time.Second, "no new connections are taken", func() bool { return o.m.client(o.T, "his").Alive(o.Context()) != nil })
		close(finish)
		if err := g.Wait(); err != nil {
			o.Errorf("a request that was begun before the stop: %v", err)
		}
		select {
		case <-o.m.ended:
		case <-time.After(patience):
			o.Fatal("it does not stop")
		}
		if code := o.m.cmd.ProcessState.ExitCode(); code != 0 {
			o.Errorf("exit %d", code)
		}
		o.m = serve(o.all, o.dir)
	})
	l.end()
	l.onlySaw(map[string][]string{calm: nil, "restart": {"transport", "not_ready", "clock_skew"}})
	o.his = o.m.client(o.T, "his")
	made := map[string]*wire.SignResult{}
	for i := range begun {
		key := fmt.Sprintf("graceful-%d", i)
		made[key] = &results[i]
	}
	o.m.judgeAll(o.T, "his", made)
	for key, r := range l.made {
		o.made[key] = r
	}
}

// signSlowly sends half of the body, says on reading that the appliance has asked for it, and the rest after finish.
func signSlowly(cfg client.Config, key string, req *wire.SignRequest, reading chan<- struct{}, finish <-chan struct{}, out *wire.SignResult) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	a := wire.Authorization{App: cfg.AppID, Time: strconv.FormatInt(time.Now().UnixMilli(), 10), Nonce: "slow-0123456789-" + key}
	a.MAC = wire.MAC(cfg.Key, wire.Signable{Method: "POST", Path: "/v1/sign", Host: strings.TrimPrefix(cfg.BaseURL, "https://"), Body: body}, a.App, a.Time, a.Nonce)
	halves, sent := io.Pipe()
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{Got100Continue: func() { reading <- struct{}{} }})
	r, err := http.NewRequestWithContext(ctx, "POST", cfg.BaseURL+"/v1/sign", halves)
	if err != nil {
		return err
	}
	r.ContentLength = int64(len(body))
	for name, value := range map[string]string{"Content-Type": "application/json", "Accept": "application/json", "Idempotency-Key": key, "Authorization": a.String(), "Expect": "100-continue"} {
		r.Header.Set(name, value)
	}
	go func() {
		_, _ = sent.Write(body[:len(body)/2])
		<-finish
		_, _ = sent.Write(body[len(body)/2:])
		sent.Close()
	}()
	h := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Minute, DisableKeepAlives: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: cfg.RootCAs}}, Timeout: answerWithin}
	resp, err := h.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%d %s", resp.StatusCode, b)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(b, out)
}

// deadSocket: after a kill the administration socket is still there, and nobody listens.
func (o *operations) deadSocket() {
	o.m.kill(o.T)
	if _, err := os.Stat(appliance.AdminSocket(o.dir)); err != nil {
		o.Fatal(err)
	}
	refused(o.T, 1, []string{"未在运行", "yinjian serve"}, "status", "--dir", o.dir)
	refused(o.T, 1, []string{"未在运行", "yinjian serve"}, "db", "compare", "--dir", o.dir)
	refused(o.T, 1, []string{"未在运行", "yinjian serve"}, "app", "register", "later", "--dir", o.dir, "--name", "x", "--campus", "x")
	if _, err := os.Stat(filepath.Join(o.dir, "credentials", "later.json")); err == nil {
		o.Error("a registration that did not happen has left a credential")
	}
	// Of what came in the last half second before the kill, under no checkpoint, nothing can be said offline: exit 1 then.
	// A signature that was being recorded when it was killed is named by the next start; until then it is told as one without
	// an entry.
	out := yinjian(o.T, "audit", "verify", "--dir", o.dir)
	cut := strings.Count(out.stdout, "日志尚未记下")
	if !strings.Contains(out.stdout, "未发现改动") || strings.Count(out.stdout, "✗") != cut || cut > 8 || // as many are under way
		(out.code == 0) == (cut > 0 || strings.Contains(out.stdout, "离线无法判断")) {
		o.Errorf("audit of a dead appliance: %v", out)
	}
	o.m = serve(o.all, o.dir)
	// What the command line says about evidence, with every way to get it wrong.
	r := o.made["plain"]
	o.his = o.m.client(o.T, "his")
	var b []byte
	eventually(o.T, 30*time.Second, "evidence", func() bool {
		var err error
		b, err = o.his.Evidence(o.Context(), r.RecordID)
		return err == nil
	})
	dir := tempDir(o.T)
	write := func(name string, data []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			o.Fatal(err)
		}
		return name
	}
	file, document := write("evidence.json", b), write("document", documentOf("plain"))
	verify := func(file string, more ...string) []string {
		return append([]string{"verify", "--anchors", o.dir, "--log-key", filepath.Join(o.dir, "log.pem"), file}, more...)
	}
	mustRun(o.T, verify(file, "--document", document)...)
	refused(o.T, 1, nil, verify(file, "--document", write("other", []byte("x")))...)
	refused(o.T, 1, nil, verify(write("cut.json", b[:len(b)/2]), "--document", document)...)
	refused(o.T, 1, nil, verify(filepath.Join(dir, "absent"), "--document", document)...)
	out = yinjian(o.T, verify(file, "-o", "json")...)
	var report struct{ Verdict string }
	if err := json.Unmarshal([]byte(out.stdout), &report); err != nil || report.Verdict == string(pki.Valid) || out.code != 1 {
		o.Errorf("without the document: %v %v", err, out)
	}
}
