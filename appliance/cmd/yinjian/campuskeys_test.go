package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/dbdriver/dbtest"
)

// A campusCeremony is a ceremony's file as one campus has it, with that campus's machine.
type campusCeremony struct {
	folder, machine, dir string
	log                  bool   // the MAC keys go to the log slot
	minutes              string // that it reads, or writes when it is held
}

// write writes the file, and answers its name.
func (c campusCeremony) write(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "name = \"2026 首次\"\nkek = \"kek/2026\"\nminutes = %q\nthreshold = 2\n", c.minutes)
	fmt.Fprintf(&b, "[[machine]]\nname = %q\nmodule = %q\nmodule_args = \"socket='%s'\"\nprofile = \"neutral\"\ntoken = \"yinjian-staff\"\npin_file = %q\nso_pin_file = %q\n",
		c.machine, built.module, appliance.SofttokenSocket(c.dir), filepath.Join(c.dir, "secrets", "staff.pin"), filepath.Join(c.dir, "secrets", "staff.so-pin"))
	if c.log {
		fmt.Fprintf(&b, "log_token = \"yinjian-log\"\nlog_pin_file = %q\n", filepath.Join(c.dir, "secrets", "log.pin"))
	}
	for i, name := range []string{"张三", "李四", "王五"} {
		fmt.Fprintf(&b, "[[custodian]]\nname = %q\nshare = \"custodian-%d.txt\"\n", name, i+1)
	}
	file := filepath.Join(c.folder, "ceremony.toml")
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// destroySecret has pkcs11-tool destroy a secret key of a slot, as the machine's administrator would.
func destroySecret(t *testing.T, dir, slot, label string) {
	t.Helper()
	pin := strings.TrimSpace(readFile(t, filepath.Join(dir, "secrets", slot+".pin")))
	o := command(t, append(os.Environ(), "YINJIAN_P11_SOCKET="+appliance.SofttokenSocket(dir)), "pkcs11-tool", "--module", built.module,
		"--token-label", "yinjian-"+slot, "--login", "--pin", pin, "--delete-object", "--type", "secrkey", "--label", label)
	if o.code != 0 {
		t.Fatal(o)
	}
}

// TestCampusKeys: an appliance that has a wrapping key and MAC keys of its own gets the MAC keys of the ceremony from its
// custodians' shares, without a change of anybody's key or PIN; the other campus's machine gets the same from the same shares.
// Both say the same check values and journal them. Wrong shares, another key under a label, and a missing key are refused.
func TestCampusKeys(t *testing.T) {
	t.Parallel()
	need(t, "pkcs11-tool")
	server := startTimeServer(t)
	a, b := initAppliance(t, server), initAppliance(t, server, "--node", "binhai-1", "--campus", "滨海")
	at := campusCeremony{folder: tempDir(t), machine: "本部一号机", dir: a, minutes: "minutes.json"}
	in := func(name string) string { return filepath.Join(at.folder, name) }
	readers := []string{"--read-by", "主持", "--read-by", "见证"}

	// 1. The appliance as it was: custody keys, and its machine's own MAC keys.
	m := serve(t, a)
	m.trusted(t)
	mustRun(t, append([]string{"ceremony", "run", at.write(t), "--dir", a}, readers...)...)
	m.stop(t)
	configure(t, a, func(c *appliance.Config) { c.HSM.Custody = &appliance.Custody{KEK: "kek/2026"} })
	m = serve(t, a)
	m.trusted(t)
	m.enrol(t, "D1", "482913", "--algorithms", "SM2")
	his := m.register(t, "his", "--consent", "signer-pin")
	sign := func(id string) {
		t.Helper()
		g, err := his.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: "482913", Count: 1, Seconds: 60})
		if err != nil {
			t.Fatal(err)
		}
		q := asserted("D1", id)
		q.Consent = wire.Consent{AuthorizationID: g.ID}
		if _, err := his.Sign(t.Context(), id, q); err != nil {
			t.Fatal(err)
		}
	}
	sign("before")
	refused(t, 1, []string{"campus_macs"}, "ceremony", "rederive", "--dir", a)

	// 2. Its MAC keys of the ceremony, while it runs.
	at.log = true
	refused(t, 1, []string{"记录中没有 MAC 密钥"}, "ceremony", "verify", at.write(t))
	restore := func(file, machine, minutes string, shares ...string) []string {
		args := append([]string{"ceremony", "restore", file, "--machine", machine, "--minutes", minutes}, readers...)
		for _, s := range shares {
			args = append(args, "--share", s)
		}
		return args
	}
	one, two, three := in("custodian-1.txt"), in("custodian-2.txt"), in("custodian-3.txt")
	refused(t, 1, []string{"只有 1 份"}, restore(at.write(t), at.machine, in("macs.json"), one)...)
	out := mustRun(t, restore(at.write(t), at.machine, in("macs.json"), one, three)...).stdout
	checks := checkValues(out)
	if len(checks) != 2 || strings.Count(out, "已导入") != 2 {
		t.Fatalf("restoring says:\n%s", out)
	}
	mustRun(t, "ceremony", "journal", in("macs.json"), "--dir", a)
	// The configuration comes before the restart; a machine without the keys would not start.
	m.stop(t)
	configure(t, a, func(c *appliance.Config) { c.HSM.Custody.CampusMACs = true })
	m = serve(t, a)
	m.trusted(t)
	his = m.client(t, "his") // with the key that it was given before
	if s := strings.Join(m.state(t).Warnings, "\n"); !strings.Contains(s, "2 名签名人、应用仍由本机密码机自己的") {
		t.Errorf("warnings: %s", s)
	}
	if out := mustRun(t, "ceremony", "rederive", "--dir", a).stdout; !strings.Contains(out, "已改 1 项 (done): his") || !strings.Contains(out, "另有 1 名") {
		t.Errorf("rederive says:\n%s", out)
	}
	m.changeOf(t, "/admin/v1/ceremonies/rederive", "account.application/outcome", "his", `"key_salt":"sm3:`, `"key_sealed":"sm3:`)
	sign("after")
	if s := strings.Join(m.state(t).Warnings, "\n"); strings.Contains(s, "自己的 MAC") {
		t.Errorf("warnings: %s", s)
	}
	m.stop(t)
	m = serve(t, a)
	m.trusted(t)
	his = m.client(t, "his")
	sign("again")
	keys := inventoryOf(t, a)
	for _, label := range []string{"mac/signer-pin@kek/2026", "mac/application-key@kek/2026"} {
		if i := slices.IndexFunc(keys, func(k inventoried) bool { return k.Label == label }); i < 0 || keys[i].Slot != "log" || !slices.Equal(keys[i].Machines, []string{"main"}) {
			t.Errorf("hsm keys on %s: %+v", label, keys)
		}
	}

	// 3. The other campus, with the minutes of the first one.
	there := campusCeremony{folder: tempDir(t), machine: "滨海一号机", dir: b, log: true, minutes: in("macs.json")}
	file := there.write(t)
	away := func(name string) string { return filepath.Join(there.folder, name) }
	n := serve(t, b)
	n.trusted(t)
	refused(t, 1, []string{there.machine, "kek/2026"}, "ceremony", "verify", file)
	lie := strings.Replace(readFile(t, two), "套号 set: ", "套号 set: 0", 1)
	if err := os.WriteFile(away("lie.txt"), []byte(lie), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 1, []string{"lie.txt"}, restore(file, there.machine, away("minutes.json"), one, away("lie.txt"))...)
	out = mustRun(t, restore(file, there.machine, away("minutes.json"), two, three)...).stdout
	if !slices.Equal(checkValues(out), checks) {
		t.Errorf("check values at the other campus: %v, at the first %v", checkValues(out), checks)
	}
	mustRun(t, "ceremony", "journal", away("minutes.json"), "--dir", b)
	if out := mustRun(t, "ceremony", "verify", file).stdout; strings.Count(out, "持有同一把") != 3 {
		t.Errorf("verify says:\n%s", out)
	}

	// 4. What goes wrong there: a missing key, and another one in its place.
	n.stop(t)
	configure(t, b, func(c *appliance.Config) { c.HSM.Custody = &appliance.Custody{KEK: "kek/2026", CampusMACs: true} })
	stop := startSofttoken(t, b)
	destroySecret(t, b, "log", "mac/signer-pin@kek/2026")
	refused(t, 1, []string{"mac/signer-pin@kek/2026"}, "ceremony", "verify", file)
	stop()
	if o := launch(t, b, "--once").outcome(); o.code == 0 || !strings.Contains(o.stderr, "ceremony restore") {
		t.Errorf("a start without a MAC key: %v", o)
	}
	stop = startSofttoken(t, b)
	out = mustRun(t, restore(file, there.machine, away("again.json"), one, two)...).stdout
	if strings.Count(out, "已在，是同一把") != 1 || strings.Count(out, "已导入") != 1 || !slices.Equal(checkValues(out), checks) {
		t.Errorf("restoring what is missing says:\n%s", out)
	}
	// Another ceremony's shares make other keys.
	other := campusCeremony{folder: tempDir(t), machine: there.machine, dir: b, log: true, minutes: "minutes.json"}
	destroySecret(t, b, "log", "mac/signer-pin@kek/2026")
	destroySecret(t, b, "log", "mac/application-key@kek/2026")
	destroySecret(t, b, "staff", "kek/2026")
	mustRun(t, append([]string{"ceremony", "run", other.write(t)}, readers...)...)
	refused(t, 1, []string{"kek/2026", "不是这次仪式的"}, restore(file, there.machine, away("third.json"), one, two)...)
	destroySecret(t, b, "staff", "kek/2026")
	refused(t, 1, []string{"mac/signer-pin@kek/2026", "校验值", "不是同一把"}, restore(file, there.machine, away("third.json"), one, two)...)
	refused(t, 1, []string{"kek/2026"}, "ceremony", "verify", file) // and the wrapping key went again
	destroySecret(t, b, "log", "mac/signer-pin@kek/2026")
	destroySecret(t, b, "log", "mac/application-key@kek/2026")
	out = mustRun(t, restore(file, there.machine, away("third.json"), one, two)...).stdout
	if !slices.Equal(checkValues(out), checks) {
		t.Errorf("restoring says:\n%s", out)
	}
	stop()
	n = serve(t, b)
	n.trusted(t)
	mustRun(t, "ceremony", "journal", away("third.json"), "--dir", b)
	mustRun(t, "ceremony", "verify", file)
	m.mustBeClean(t)
	n.mustBeClean(t)
}

// An inventoried key is one of `yinjian hsm keys`.
type inventoried struct {
	Slot, Label string
	Machines    []string
}

func inventoryOf(t *testing.T, dir string) []inventoried {
	t.Helper()
	var list struct{ Keys []inventoried }
	if err := json.Unmarshal([]byte(mustRun(t, "hsm", "keys", "--dir", dir, "-o", "json").stdout), &list); err != nil {
		t.Fatal(err)
	}
	return list.Keys
}

// checkValues are those of MAC keys in what a command says, by label.
func checkValues(out string) (values []string) {
	for line := range strings.Lines(out) {
		if _, v, ok := strings.Cut(strings.TrimSpace(line), "校验值 "); ok && strings.Contains(line, "mac/") {
			values = append(values, v)
		}
	}
	return values
}

// oneCeremony holds a ceremony on A's machine and gives B's the same keys from its shares; both are started anew with them.
func oneCeremony(t *testing.T, a, b *campus) {
	t.Helper()
	at := campusCeremony{folder: tempDir(t), machine: "本部一号机", dir: a.place, log: true, minutes: "minutes.json"}
	in := func(name string) string { return filepath.Join(at.folder, name) }
	mustRun(t, "ceremony", "run", at.write(t), "--dir", a.place, "--read-by", "主持", "--read-by", "见证")
	there := campusCeremony{folder: tempDir(t), machine: "滨海一号机", dir: b.place, log: true, minutes: in("minutes.json")}
	mustRun(t, "ceremony", "restore", there.write(t), "--machine", there.machine, "--minutes", filepath.Join(there.folder, "minutes.json"),
		"--read-by", "主持", "--read-by", "见证", "--share", in("custodian-1.txt"), "--share", in("custodian-3.txt"))
	mustRun(t, "ceremony", "journal", filepath.Join(there.folder, "minutes.json"), "--dir", b.place)
	for _, c := range []*campus{a, b} {
		c.stop(t)
		configure(t, c.place, func(cfg *appliance.Config) { cfg.HSM.Custody = &appliance.Custody{KEK: "kek/2026", CampusMACs: true} })
		c.serve(t)
	}
}

// TestKeysAtBothCampuses: two appliances over one database, with the keys of one ceremony. An application that was registered
// and a signer who was enrolled at the first campus are served at the second with the same key and PIN, the custody key signs
// there, and the verifier takes the evidence. What was derived with the first machine's own keys, and a
// key that is resident there, are refused by name; it goes when it is brought along there.
func TestKeysAtBothCampuses(t *testing.T) {
	t.Parallel()
	l := newLand(t)
	pg := dbtest.StartPostgres(t)
	dsn := pg.DSN(pg.Fresh(t))
	a, b := newCampus(t, l, 0, dsn), newCampus(t, l, 1, dsn)
	a.serve(t)
	b.serve(t)
	a.enrol(t, "D8", "482913", "--algorithms", "SM2") // a resident key, and a PIN under the machine's own
	oneCeremony(t, a, b)
	a.enrol(t, "D1", "482913")
	a.register(t, "his", "--consent", "signer-pin")
	pairUp(t, a.machine, b.machine)

	served := a.clientConfig(t, "his")
	served.BaseURL, served.RootCAs = b.ends.API, roots(t, b.ends.TLSCA)
	his, err := client.New(served)
	if err != nil {
		t.Fatal(err)
	}
	defer his.Close()
	activate := func(signer, pin string) (string, error) {
		g, err := his.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: signer, PIN: pin, Count: 5, Seconds: 60})
		if err != nil {
			return "", err
		}
		return g.ID, nil
	}
	var grant string
	eventually(t, time.Minute, "A's application and signer are served at B", func() bool {
		grant, err = activate("D1", "482913")
		return err == nil
	})
	_, err = activate("D1", "000000")
	wantCode(t, err, "pin_wrong")
	for _, algorithm := range []string{"SM2", "RSA-2048"} {
		q := asserted("D1", "there-"+algorithm)
		q.Algorithm, q.Consent = algorithm, wire.Consent{AuthorizationID: grant}
		r, err := his.Sign(t.Context(), "there-"+algorithm, q)
		if err != nil {
			t.Fatalf("%s: %v", algorithm, err)
		}
		bundle, err := his.Evidence(t.Context(), r.RecordID)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(tempDir(t), "evidence.json")
		anchors := filepath.Join(filepath.Dir(file), "anchors")
		if err := os.Mkdir(anchors, 0o700); err != nil {
			t.Fatal(err)
		}
		document := filepath.Join(filepath.Dir(file), "document")
		files := map[string]string{file: string(bundle), document: string(documentOf("there-" + algorithm))}
		for _, c := range []*campus{a, b} {
			for _, ca := range []string{"ca.pem", "ca-rsa.pem"} {
				files[filepath.Join(anchors, campusNames[c.i]+ca)] = readFile(t, filepath.Join(c.place, ca))
			}
		}
		for name, text := range files {
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if o := yinjian(t, "verify", "--anchors", anchors, "--log-key", filepath.Join(b.place, "log.pem"), "--document", document, file); o.code != 0 {
			t.Errorf("%s at the other campus: %v", algorithm, o)
		}
	}

	// D8 came with A's own MAC key and a resident key.
	_, err = activate("D8", "482913")
	wantCode(t, err, "key_elsewhere")
	if s := strings.Join(b.state(t).Warnings, "\n"); !strings.Contains(s, "1 名签名人、应用由另一院区") {
		t.Errorf("warnings at B: %s", s)
	}
	home := a.client(t, "his")
	if _, err := home.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: "D8", PIN: "482913", Count: 1, Seconds: 60}); err != nil {
		t.Fatal(err) // and so brought along
	}
	eventually(t, time.Minute, "the PIN is good at B", func() bool {
		grant, err = activate("D8", "482913")
		return err == nil
	})
	q := asserted("D8", "resident")
	q.Consent = wire.Consent{AuthorizationID: grant}
	_, err = his.Sign(t.Context(), "resident", q)
	wantCode(t, err, "key_elsewhere")
	for _, c := range []*campus{a, b} {
		c.mustBeClean(t)
	}
}
