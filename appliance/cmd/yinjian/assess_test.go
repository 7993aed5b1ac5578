package main_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/assess"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
)

const assessNonce = "0123456789abcdef"

// An evaluator's pack from a running appliance: what can be shown is, what cannot is a gap, nothing secret is in it, and a copy of
// the static verifier in an empty folder accepts it and nothing that was altered.
func TestAssess(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.TSAPlain = "127.0.0.1:0" })
	m := serve(t, dir)
	m.trusted(t)
	his := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "482913", "--algorithms", "SM2")
	cms := asserted("D1", "visit-1")
	cms.Form = "cms"
	if _, err := his.Sign(t.Context(), "visit-1", cms); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(tempDir(t), "pack")
	products := filepath.Join(tempDir(t), "products.toml")
	if err := os.WriteFile(products, []byte(`[[products]]
covers = ["cipher-machine"]
name = "服务器密码机"
certificate = "GM-4711"
holder = "某厂"
level = 2
valid_until = "2099-01-31"
`), 0o600); err != nil {
		t.Fatal(err)
	}
	said := mustRun(t, "assess", "--dir", dir, "--nonce", assessNonce, "--assessor", "测评机构", "--certificates", products, "--out", out)
	data := []byte(readFile(t, out+".json"))
	p, r, err := assess.Parse(data)
	if err != nil {
		t.Fatal(err)
	}

	// What is shown, and what is a gap.
	state := map[string]assess.Status{}
	for _, it := range r.Items {
		state[it.ID] = it.Status
	}
	for id, want := range map[string]assess.Status{
		"kat.software": assess.Shown, "kat.token.log.main": assess.Shown, "kat.token.staff.main": assess.Shown, "kat.token.tsa.main": assess.Shown,
		"kat.token.ca.main": assess.Shown, "kat.sm1": assess.NotEvidenced, "keys.inventory": assess.Shown, "keys.uses": assess.Shown, "keys.pins": assess.NotEvidenced,
		"certificates.lists": assess.Shown, "certificates.own": assess.NotEvidenced, "certificates.staff": assess.NotEvidenced,
		"integrity.journal": assess.Shown, "integrity.directory": assess.Shown, "integrity.rows": assess.Shown, "integrity.samples": assess.Shown,
		"integrity.drill.segment": assess.Shown, "integrity.drill.row": assess.Shown, "integrity.drill.evidence": assess.Shown, "integrity.heads": assess.NotEvidenced,
		"channels.listener.api": assess.Shown, "channels.refused.api": assess.Shown, "channels.listener.tsa_plain": assess.Failed, "channels.tlcp": assess.NotEvidenced,
		"software.parts": assess.Shown, "software.files": assess.Shown, "software.image": assess.NotEvidenced, "software.ports": assess.Shown,
		"software.packs": assess.NotEvidenced,
		"time.status":    assess.NotEvidenced, "identity.applications": assess.Shown, "identity.signers": assess.Shown, "identity.administrators": assess.NotEvidenced,
		"header.mode": assess.NotEvidenced, "header.image": assess.NotEvidenced,
	} {
		if state[id] != want {
			t.Errorf("%s is %q, want %q", id, state[id], want)
			for _, it := range r.Items {
				if it.ID == id {
					t.Logf("%s: %.600s", it.Why, it.Raw)
				}
			}
		}
	}
	if _, there := state["channels.listener.admin_local"]; there {
		t.Error("the local socket is taken for a listener on the network")
	}
	if r.Header.Mode != assess.ModeSoft || !strings.Contains(said.stdout, "soft") || len(r.Products) != 1 || len(r.Threats) < 40 {
		t.Errorf("%+v, %d products, %d threats: %s", r.Header, len(r.Products), len(r.Threats), said.stdout)
	}
	for _, line := range r.Rows {
		for _, o := range line.Objects {
			if o.K {
				t.Errorf("%s: K is awarded, with the software cipher machine", line.ID)
			}
			if strings.HasPrefix(line.ID, "network.") && o.A {
				t.Errorf("%s: A is awarded without TLCP", line.ID)
			}
		}
		if line.Gap == "" {
			t.Errorf("%s has no gap", line.ID)
		}
	}
	page := readFile(t, out+".html")
	for _, want := range []string{"class=\"banner\">soft", "未取得证据 not evidenced", "GM-4711", "没有构建 TLCP", "integrity.drill.segment", assessNonce} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if strings.Contains(page, "<script") || strings.Contains(page, "http://") || strings.Contains(page, "https://") {
		t.Error("the page has a script, or something from elsewhere")
	}
	noSecrets(t, dir, data, []byte(page))

	// What the journal has of it.
	for _, kind := range []string{assess.KindIntent, assess.KindOutcome} {
		if n := journalled(t, dir, kind, r.Header.Node); n != 1 {
			t.Errorf("%d entries of kind %s", n, kind)
		}
	}

	// An evaluator who has nothing but the pack, the anchors and the log key.
	logKey := filepath.Join(dir, "log.pem")
	jail := testkit.NewJail(t, "../yinjian-verify", map[string]string{
		"anchors/ca.pem": filepath.Join(dir, "ca.pem"), "anchors/ca-rsa.pem": filepath.Join(dir, "ca-rsa.pem"), "log.pem": logKey, "pack.json": out + ".json",
	})
	base := []string{"--anchors", "/anchors", "--log-key", "/log.pem"}
	for what, c := range map[string]struct {
		args   []string
		status int
	}{
		"nonce": {[]string{"--nonce", assessNonce}, 0}, "another nonce": {[]string{"--nonce", "fedcba9876543210"}, 1}, "no nonce": {nil, 3},
	} {
		got, status := jail.Run(t, nil, slices.Concat(base, c.args, []string{"/pack.json"})...)
		if status != c.status || !strings.Contains(strings.Join(got.Statements, " "), "soft") {
			t.Errorf("%s: status %d, want %d: %+v", what, status, c.status, got)
		}
	}
	mustRun(t, "assess", "verify", "--anchors", dir, "--log-key", logKey, "--nonce", assessNonce, out+".json")
	mustRun(t, "assess", "page", out+".json", out+"-2.html")
	if readFile(t, out+"-2.html") != page {
		t.Error("the page made from the pack is another one")
	}
	trust, err := show.LoadTrust(dir, logKey)
	if err != nil {
		t.Fatal(err)
	}
	alterations(t, data, p, r, trust)

	// One at a time, and nothing is overwritten.
	refused(t, 1, []string{"exist"}, "assess", "--dir", dir, "--nonce", assessNonce, "--assessor", "测评机构", "--out", out)
	refused(t, 2, []string{"--nonce"}, "assess", "--dir", dir, "--nonce", "x y", "--assessor", "测评机构", "--out", out+"-3")
	a := m.admin()
	defer a.Close()
	var both sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		both.Go(func() {
			_, errs[i] = a.Assess(t.Context(), wire.Assess{Nonce: "at-the-same-time", Assessor: "测评机构"})
		})
	}
	both.Wait()
	if (errs[0] == nil) == (errs[1] == nil) {
		t.Errorf("two at once: %v, %v", errs[0], errs[1])
	} else if errs[0] == nil {
		wantCode(t, errs[1], "not_ready")
	} else {
		wantCode(t, errs[0], "not_ready")
	}

	// Whoever asked and went leaves an outcome that says so, and the next one is taken.
	ctx, cancel := context.WithCancel(t.Context())
	intents, outcomes := journalled(t, dir, assess.KindIntent, r.Header.Node), journalled(t, dir, assess.KindOutcome, r.Header.Node)
	given := make(chan error, 1)
	go func() {
		_, err := a.Assess(ctx, wire.Assess{Nonce: "given-up", Assessor: "测评机构"})
		given <- err
	}()
	eventually(t, time.Minute, "it has begun", func() bool { return journalled(t, dir, assess.KindIntent, r.Header.Node) > intents })
	cancel()
	if err := <-given; err == nil {
		t.Error("it was done before it was given up")
	}
	eventually(t, 30*time.Second, "the outcome of one that was given up", func() bool {
		return journalled(t, dir, assess.KindOutcome, r.Header.Node) == outcomes+1
	})
	if _, err := a.Assess(t.Context(), wire.Assess{Nonce: "after-that", Assessor: "测评机构"}); err != nil {
		t.Error(err)
	}
	m.mustBeClean(t)
}

// Of two paired campuses over one PostgreSQL, where everybody logs in at listen.admin: the auditor has a pack made over TLS, and
// what such a set-up shows beyond a lone appliance is shown.
func TestAssessPaired(t *testing.T) {
	t.Parallel()
	need(t, "openssl")
	_, a, _ := twoCampuses(t)
	work := tempDir(t)
	three := []string{"admin", "bootstrap", "--dir", a.dir}
	clerks := map[string]*clerk{}
	for _, c := range [][3]string{{"zhang", "--system", "Xt-guanli-2026"}, {"li", "--security", "Aq-guanli-2026"}, {"wang", "--audit", "Sj-guanli-2026"}} {
		clerks[c[0]] = a.clerk(t, c[0], c[2])
		three = append(three, c[1], c[0]+":姓"+c[0]+":"+pinFile(t, c[2]))
	}
	mustRun(t, three...)
	keys := map[string]string{}
	for id := range clerks {
		keys[id] = filepath.Join(work, id+".key")
		cert := filepath.Join(work, id+".pem")
		command(t, nil, "openssl", "genpkey", "-algorithm", "SM2", "-out", keys[id])
		if o := command(t, nil, "openssl", "req", "-x509", "-new", "-key", keys[id], "-sm3", "-sigopt", "distid:1234567812345678", "-subj", "/CN="+id, "-days", "30", "-out", cert); o.code != 0 {
			t.Fatal(o)
		}
		if err := os.Chmod(keys[id], 0o600); err != nil {
			t.Fatal(err)
		}
		mustRun(t, "admin", "certificate", id, "--dir", a.dir, "--file", cert)
	}
	configure(t, a.dir, func(c *appliance.Config) {
		c.Admin.Local, c.Listen.Admin = "login", c.Listen.API[:strings.LastIndex(c.Listen.API, ":")]+":0"
	})
	a.stop(t)
	a.serve(t)
	a.trusted(t)
	for _, k := range clerks {
		k.m = a.machine
	}
	wang := clerks["wang"]
	wang.login(t, "--key", keys["wang"])
	eventually(t, time.Minute, "the other campus is in touch and has cosigned", func() bool {
		var s struct{ Peer *peerOf }
		o := wang.must(t, "peer", "status", "-o", "json")
		return json.Unmarshal([]byte(o.stdout), &s) == nil && s.Peer != nil && s.Peer.Up && s.Peer.Gotten > 0
	})
	out := filepath.Join(work, "pack")
	said := wang.must(t, "assess", "--nonce", assessNonce, "--assessor", "测评机构", "--out", out)
	_, r, err := assess.Parse([]byte(readFile(t, out+".json")))
	if err != nil {
		t.Fatal(err, said)
	}
	for id, want := range map[string]assess.Status{
		"identity.administrators": assess.Shown, "integrity.heads": assess.Shown, "integrity.rows": assess.Shown, "integrity.journal": assess.Shown,
		"integrity.directory": assess.Shown, "integrity.drill.row": assess.Shown, "integrity.drill.segment": assess.Shown,
		"channels.listener.api": assess.Shown, "channels.refused.api": assess.Shown, "channels.listener.admin": assess.Shown, "channels.refused.admin": assess.Shown,
		"channels.listener.peer": assess.Shown, "certificates.lists": assess.Shown, "software.ports": assess.Shown,
		"software.packs": assess.NotEvidenced,
	} {
		i := slices.IndexFunc(r.Items, func(it assess.Item) bool { return it.ID == id })
		if i < 0 {
			t.Errorf("%s is not there", id)
		} else if it := r.Items[i]; it.Status != want {
			t.Errorf("%s is %q, want %q: %s: %.600s", id, it.Status, want, it.Why, it.Raw)
		}
	}
	mustRun(t, "assess", "verify", "--anchors", a.dir, "--log-key", filepath.Join(a.dir, "log.pem"), "--nonce", assessNonce, out+".json")
}

// The long form of a pack takes longer than any request of the API may.
func TestAssessFull(t *testing.T) {
	if os.Getenv("YINJIAN_LONG") == "" {
		t.Skip("YINJIAN_LONG is not set")
	}
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	a := m.admin()
	defer a.Close()
	made, err := a.Assess(t.Context(), wire.Assess{Nonce: assessNonce, Assessor: "测评机构", Full: true})
	if err != nil {
		t.Fatal(err)
	}
	_, r, err := assess.Parse(made.Pack)
	if err != nil || !r.Header.Full {
		t.Fatal(err)
	}
	for _, it := range r.Items {
		if strings.HasPrefix(it.ID, "random.") && (it.Status == assess.NotEvidenced || it.Replayed || !bytes.Contains(it.Raw, []byte("离散傅里叶检测"))) {
			t.Errorf("%s: %s %s", it.ID, it.Status, it.Why)
		}
	}
}

// noSecrets looks for what must be in no pack: as it is, in hexadecimal and in base64.
func noSecrets(t *testing.T, dir string, files ...[]byte) {
	t.Helper()
	secrets := secretsOf(t, dir)
	secrets["a signer's PIN"] = "482913"
	var credential struct {
		Key string `json:"key_hex"`
	}
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(dir, "credentials", "his.json"))), &credential); err != nil {
		t.Fatal(err)
	}
	secrets["the application's key"] = credential.Key
	if len(secrets) < 6 {
		t.Fatalf("only %d secrets are known", len(secrets))
	}
	for what, secret := range secrets {
		raw, _ := hex.DecodeString(secret)
		for _, form := range [][]byte{[]byte(secret), []byte(hex.EncodeToString([]byte(secret))), []byte(base64.StdEncoding.EncodeToString([]byte(secret))), raw, []byte(base64.StdEncoding.EncodeToString(raw))} {
			for _, file := range files {
				if len(form) > 5 && bytes.Contains(file, form) {
					t.Errorf("%s stands in the pack", what)
				}
			}
		}
	}
}

// alterations are refused, whatever member they are of: a byte, a part that is gone or elsewhere, a report that was made to say
// something better and computed anew.
func alterations(t *testing.T, data []byte, p *assess.Pack, r *assess.Report, trust evidence.Trust) {
	t.Helper()
	judge := func(what string, b []byte) {
		if got := assess.Verify(b, trust, evidence.Input{}, assessNonce); got.Verdict != pki.Invalid {
			t.Errorf("%s: %s, missing %v", what, got.Verdict, got.Missing)
		}
	}
	if got := assess.Verify(data, trust, evidence.Input{}, assessNonce); got.Verdict != pki.Valid {
		t.Fatalf("%s: %+v", got.Verdict, got.Checks)
	}
	rnd := rand.New(rand.NewPCG(3, 0))
	for range 60 {
		b := bytes.Clone(data)
		at := rnd.IntN(len(b))
		b[at] ^= byte(1 << rnd.IntN(8))
		judge("a bit of byte "+string(rune('0'+at%10)), b)
	}
	for _, n := range []int{0, 1, len(data) / 3, len(data) / 2, len(data) - 1} {
		judge("cut", data[:n])
	}
	judge("a line end more", append(bytes.Clone(data), '\n'))
	judge("twice", append(bytes.Clone(data), data...))
	judge("a member twice", bytes.Replace(data, []byte(`{"format"`), []byte(`{"format":"yinjian-assessment/1","format"`), 1))
	judge("a space", bytes.Replace(data, []byte(`,"report"`), []byte(`, "report"`), 1))

	// Each member of the pack.
	again := func(what string, change func(*assess.Pack)) {
		other := *p
		other.Certificates, other.CRLs = slices.Clone(p.Certificates), slices.Clone(p.CRLs)
		other.Journal.Inclusion = slices.Clone(p.Journal.Inclusion)
		change(&other)
		b, err := other.Encode()
		if err != nil {
			t.Fatal(err)
		}
		judge(what, b)
	}
	flip := func(b []byte) []byte {
		b = bytes.Clone(b)
		b[len(b)/2] ^= 1
		return b
	}
	again("token", func(p *assess.Pack) { p.Token = flip(p.Token) })
	again("no token", func(p *assess.Pack) { p.Token = nil })
	again("leaf", func(p *assess.Pack) { p.Journal.Leaf = flip(p.Journal.Leaf) })
	again("checkpoint", func(p *assess.Pack) { p.Journal.Checkpoint = flip(p.Journal.Checkpoint) })
	again("its signature", func(p *assess.Pack) { p.Journal.CheckpointSignature = flip(p.Journal.CheckpointSignature) })
	again("tree size", func(p *assess.Pack) { p.Journal.TreeSize++ })
	again("sequence", func(p *assess.Pack) { p.Journal.Sequence++ })
	again("node", func(p *assess.Pack) { p.Journal.Node += "x" })
	again("epoch", func(p *assess.Pack) { p.Journal.Epoch = strings.Repeat("0", len(p.Journal.Epoch)) })
	for i := range p.Journal.Inclusion {
		again("inclusion", func(p *assess.Pack) { p.Journal.Inclusion[i] = flip(p.Journal.Inclusion[i]) })
	}
	if len(p.Journal.Inclusion) > 1 {
		again("inclusion reordered", func(p *assess.Pack) {
			p.Journal.Inclusion[0], p.Journal.Inclusion[1] = p.Journal.Inclusion[1], p.Journal.Inclusion[0]
		})
	}
	for i := range p.Certificates {
		again("certificate", func(p *assess.Pack) { p.Certificates[i] = p.Certificates[i][:len(p.Certificates[i])-1] })
	}

	// A report that says something better, with every digest and score computed anew.
	report := func(what string, change func(*assess.Report)) {
		other := *r
		other.Items, other.Products = slices.Clone(r.Items), slices.Clone(r.Products)
		change(&other)
		other.Finish()
		b, err := other.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again(what, func(p *assess.Pack) { p.Report = b })
	}
	for i := 0; i < len(r.Items); i += 5 {
		report("an item is gone", func(r *assess.Report) { r.Items = slices.Delete(r.Items, i, i+1) })
		report("an item is shown", func(r *assess.Report) { r.Items[i].Status, r.Items[i].Why, r.Items[i].Limits = assess.Shown, "", "-" })
	}
	report("items reordered", func(r *assess.Report) { slices.Reverse(r.Items) })
	report("not soft", func(r *assess.Report) { r.Header.Mode = assess.ModeUnsealed })
	report("another nonce", func(r *assess.Report) { r.Header.Nonce = "fedcba9876543210" })
	report("another campus", func(r *assess.Report) { r.Header.Campus = "滨海" })
	report("a threat less", func(r *assess.Report) { r.Threats = r.Threats[1:] })
	again("a better score", func(p *assess.Pack) { p.Report = bytes.Replace(p.Report, []byte(`"total":`), []byte(`"total":9`), 1) })

	// Another log's key, and other anchors.
	other := trust
	other.LogKeys = trust.LogKeys[:0:0]
	if got := assess.Verify(data, other, evidence.Input{}, assessNonce); got.Verdict != pki.Indeterminate {
		t.Errorf("no log key: %s", got.Verdict)
	}
	other = trust
	other.Anchors = nil
	if got := assess.Verify(data, other, evidence.Input{}, assessNonce); got.Verdict == pki.Valid {
		t.Error("valid without anchors")
	}
}
