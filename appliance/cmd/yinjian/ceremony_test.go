package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance"
)

// ceremonyFile writes the file of a ceremony on the staff tokens of appliances, and answers its folder.
func ceremonyFile(t *testing.T, dirs ...string) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("# 密钥仪式\nname = \"2026 首次\"\nkek = \"kek/2026\"\nminutes = \"minutes.json\"\nthreshold = 3\n")
	for i, dir := range dirs {
		fmt.Fprintf(&b, "[[machine]]\nname = \"%d 号机\"\nmodule = %q\nmodule_args = \"socket='%s'\"\nprofile = %q\ntoken = \"yinjian-staff\"\npin_file = %q\nso_pin_file = %q\nlog_token = \"yinjian-log\"\nlog_pin_file = %q\n",
			i+1, built.module, appliance.SofttokenSocket(dir), []string{"neutral", "profiles/ours.toml"}[i], filepath.Join(dir, "secrets", "staff.pin"), filepath.Join(dir, "secrets", "staff.so-pin"), filepath.Join(dir, "secrets", "log.pin"))
	}
	for i, name := range []string{"张三", "李四", "王五", "赵六", "钱七"} {
		fmt.Fprintf(&b, "[[custodian]]\nname = %q\nshare = \"custodian-%d.txt\"\n", name, i+1)
	}
	b.WriteString("[officers]\nthreshold = 2\npublic = \"officers.pem\"\n")
	for i, name := range []string{"甲", "乙", "丙"} {
		fmt.Fprintf(&b, "[[officers.holder]]\nname = \"干部%s\"\nshare = \"officer-%d.txt\"\n", name, i+1)
	}
	folder := tempDir(t)
	if err := os.Mkdir(filepath.Join(folder, "profiles"), 0o700); err != nil {
		t.Fatal(err)
	}
	neutral := readFile(t, filepath.Join("..", "..", "..", "hsm", "pkcs11", "profiles", "neutral.toml"))
	if err := os.WriteFile(filepath.Join(folder, "profiles", "ours.toml"), []byte(neutral), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "ceremony.toml"), []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return folder
}

// TestCustody is custody from the ceremony to a forgotten PIN, on two machines.
func TestCustody(t *testing.T) {
	t.Parallel()
	need(t, "pkcs11-tool", "openssl")
	server := startTimeServer(t)
	dir, other := initAppliance(t, server), initAppliance(t, server)
	m := serve(t, dir)
	m.trusted(t)
	stopOther := startSofttoken(t, other)
	defer stopOther()
	folder := ceremonyFile(t, dir, other)
	file := filepath.Join(folder, "ceremony.toml")
	in := func(name string) string { return filepath.Join(folder, name) }

	// 1. The ceremony.
	if out := mustRun(t, "ceremony", "read", file).stdout; !strings.Contains(out, "任 3 人可恢复") || !strings.Contains(out, "第 5 份 钱七") {
		t.Errorf("it reads:\n%s", out)
	}
	if out := mustRun(t, "ceremony", "run", "--dry-run", file).stdout; !strings.Contains(out, "2 号机") || !strings.Contains(out, "没有产生密钥") {
		t.Errorf("the dry run says:\n%s", out)
	}
	refused(t, 2, []string{"--read-by"}, "ceremony", "run", file, "--read-by", "甲")
	if left, _ := filepath.Glob(in("*")); len(left) != 2 {
		t.Errorf("looking left files: %v", left)
	}
	unseen := strings.Replace(readFile(t, file), "干部甲", "干部甲\U000E0100", 1)
	if err := os.WriteFile(in("wrong.toml"), []byte(unseen), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 2, []string{"officers.holder[1]", "看不见"}, "ceremony", "read", in("wrong.toml"))
	// The officer's PIN is not the one: what was written and made goes, so that the ceremony can be held again as it is.
	wrong := strings.Replace(readFile(t, file), filepath.Join(other, "secrets", "staff.so-pin"), "wrong.pin", 1)
	for name, text := range map[string]string{"wrong.toml": wrong, "wrong.pin": "00000000\n"} {
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, 1, []string{"2 号机"}, "ceremony", "run", in("wrong.toml"), "--read-by", "主持", "--read-by", "见证")
	if left, _ := filepath.Glob(in("*")); len(left) != 4 {
		t.Errorf("a ceremony that failed left files: %v", left)
	}
	run := []string{"ceremony", "run", file, "--read-by", "主持", "--read-by", "见证", "--dir", dir}
	if out := mustRun(t, run...).stdout; !strings.Contains(out, "校验值") {
		t.Errorf("the ceremony says:\n%s", out)
	}
	refused(t, 1, []string{"已存在"}, run...)
	if out := mustRun(t, "ceremony", "verify", file, "--share", in("custodian-2.txt"), "--share", in("officer-3.txt")).stdout; strings.Count(out, "持有同一把") != 6 || strings.Count(out, "属于这一套") != 2 {
		t.Errorf("verify says:\n%s", out)
	}
	if o := command(t, nil, "openssl", "pkey", "-pubin", "-in", in("officers.pem"), "-noout", "-text"); o.code != 0 || !strings.Contains(o.stdout, "SM2") {
		t.Errorf("OpenSSL on the officers' key: %v", o)
	}
	for _, name := range []string{"custodian-1.txt", "officer-1.txt"} {
		if st, err := os.Stat(in(name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}

	// 2. The wrapping key goes from the second machine, and comes back from three custodians, not from two.
	token := func(dir string, args ...string) outcome {
		pin := strings.TrimSpace(readFile(t, filepath.Join(dir, "secrets", "staff.pin")))
		return command(t, append(os.Environ(), "YINJIAN_P11_SOCKET="+appliance.SofttokenSocket(dir)),
			append([]string{"pkcs11-tool", "--module", built.module, "--token-label", "yinjian-staff", "--login", "--pin", pin}, args...)...)
	}
	if o := token(other, "--delete-object", "--type", "secrkey", "--label", "kek/2026"); o.code != 0 {
		t.Fatal(o)
	}
	refused(t, 1, []string{"2 号机", "kek/2026"}, "ceremony", "verify", file)
	restore := []string{"ceremony", "restore", file, "--machine", "2 号机", "--read-by", "主持", "--minutes", in("restored.json"), "--share", in("custodian-1.txt"), "--share", in("custodian-4.txt")}
	refused(t, 1, []string{"只有 2 份"}, restore...)
	if out := mustRun(t, append(restore, "--share", in("custodian-5.txt"))...).stdout; strings.Count(out, "已在，是同一把") != 2 {
		t.Errorf("restoring the wrapping key beside its MAC keys says:\n%s", out)
	}
	mustRun(t, "ceremony", "verify", file)
	mustRun(t, "ceremony", "journal", in("restored.json"), "--dir", dir)
	m.changeOf(t, "/admin/v1/ceremonies", "custody.ceremony/outcome", "kek/2026", "", `"signature.sm3":"`)

	// 3. Staff keys in custody.
	m.stop(t)
	configure(t, dir, func(c *appliance.Config) {
		c.HSM.Custody = &appliance.Custody{KEK: "kek/2026", Officers: in("officers.pem"), CampusMACs: true}
	})
	m = serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "482913", "--algorithms", "SM2")
	his := m.register(t, "his", "--consent", "signer-pin,app-asserted")
	if o := token(dir, "-O", "--type", "privkey"); o.code != 0 || strings.Contains(o.stdout, "staff/D1") {
		t.Errorf("pkcs11-tool sees a key of the signer: %v", o)
	}
	ctx := t.Context()
	activate := func(pin string) (string, error) {
		g, err := his.Authorize(ctx, &wire.AuthorizationRequest{Signer: "D1", PIN: pin, Count: 20, Seconds: 600})
		if err != nil {
			return "", err
		}
		return g.ID, nil
	}
	sign := func(grant, key string) error {
		q := asserted("D1", key)
		q.Consent = wire.Consent{AuthorizationID: grant}
		_, err := his.Sign(ctx, key, q)
		return err
	}
	_, err := his.Sign(ctx, "word", asserted("D1", "word"))
	wantCode(t, err, "consent_insufficient")
	grant, err := activate("482913")
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(grant, "one"); err != nil {
		t.Fatal(err)
	}
	// The worker is killed in the middle of the activation: the next one unwraps again.
	if err := syscall.Kill(m.state(t).HSM["staff"].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "a signature after the worker was killed", func() bool { return sign(grant, "two") == nil })

	// 4. A restart ends the activation and not the key.
	m.stop(t)
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	wantCode(t, sign(grant, "three"), "authorization_invalid")
	if grant, err = activate("482913"); err != nil {
		t.Fatal(err)
	}
	if err := sign(grant, "four"); err != nil {
		t.Fatal(err)
	}

	// A second machine that holds the wrapping key signs with the same keys, and its loss costs nobody a signature.
	machine := in("b.toml")
	text := fmt.Sprintf("name = 'b'\nmodule = %q\nmodule_args = \"socket='%s'\"\n[slots.staff]\ntoken_label = 'yinjian-staff'\npin_file = %q\n[slots.log]\ntoken_label = 'yinjian-log'\npin_file = %q\n",
		built.module, appliance.SofttokenSocket(other), filepath.Join(other, "secrets", "staff.pin"), filepath.Join(other, "secrets", "log.pin"))
	if err := os.WriteFile(machine, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "hsm", "add", machine, "--dir", dir, "--reason", "扩容")
	// It has the ceremony's MAC keys, too; those that the first one made for itself it cannot have.
	for _, k := range inventoryOf(t, dir) {
		want := map[string]int{"mac/signer-pin@kek/2026": 2, "mac/application-key@kek/2026": 2, "kek/2026": 2, "mac/signer-pin": 1, "mac/application-key": 1}
		if n := want[k.Label]; n > 0 && len(k.Machines) != n {
			t.Errorf("%s is on %v", k.Label, k.Machines)
		}
	}
	grants := map[string]string{"D1": grant}
	for _, id := range []string{"D2", "D3", "D4"} {
		m.enrol(t, id, "482913", "--algorithms", "SM2")
		g, err := his.Authorize(ctx, &wire.AuthorizationRequest{Signer: id, PIN: "482913", Count: 20, Seconds: 600})
		if err != nil {
			t.Fatal(err)
		}
		grants[id] = g.ID
	}
	everyone := func(round string) {
		t.Helper()
		for id, g := range grants {
			q := asserted(id, round+"-"+id)
			q.Consent = wire.Consent{AuthorizationID: g}
			if _, err := his.Sign(ctx, round+"-"+id, q); err != nil {
				t.Errorf("%s, %s: %v", round, id, err)
			}
		}
	}
	before, round := m.machines(t)["b"].done("staff"), 0
	eventually(t, 30*time.Second, "the second machine signs too", func() bool {
		round++
		everyone(fmt.Sprintf("both-%d", round))
		return m.machines(t)["b"].done("staff") > before || t.Failed()
	})
	stopOther()
	everyone("one")
	mustRun(t, "hsm", "remove", "b", "--dir", dir, "--reason", "损坏")

	// 5. A forgotten PIN: an administrator cannot, one officer cannot, two can.
	refused(t, 1, []string{"signer recover"}, "signer", "set-pin", "D1", "--dir", dir, "--pin-file", pinFile(t, "739155"))
	recover := []string{"signer", "recover", "D1", "--dir", dir, "--pin-file", pinFile(t, "739155"), "--share", in("officer-1.txt")}
	refused(t, 1, []string{"[forbidden]"}, recover...)
	refused(t, 1, []string{"[forbidden]"}, append(recover, "--share", in("custodian-2.txt"))...)
	mustRun(t, append(recover, "--share", in("officer-3.txt"))...)
	m.changeOf(t, "/admin/v1/signers/:id/recover", "account.signer/outcome", "D1", `"pin":"sm3:`, `"pin":"sm3:`)
	_, err = activate("482913")
	wantCode(t, err, "pin_wrong")
	if grant, err = activate("739155"); err != nil {
		t.Fatal(err)
	}
	if err := sign(grant, "five"); err != nil {
		t.Fatal(err)
	}
	var signers []struct {
		Custody string
		Keys    []map[string]any
	}
	if err := json.Unmarshal([]byte(mustRun(t, "signer", "list", "--dir", dir, "-o", "json").stdout), &signers); err != nil || len(signers) != len(grants) || signers[0].Custody != "pin" {
		t.Errorf("signer list: %d signers, custody %q, %v", len(signers), signers[0].Custody, err)
	}
	for _, k := range signers[0].Keys {
		if k["wrapped"] != nil {
			t.Error("signer list shows the sealed blob")
		}
	}

	// 6. The inventory, and destruction.
	var list struct {
		Keys []struct {
			Label, Owner, Kind, State       string
			Machines                        []string
			Sensitive, Extractable, Trusted *bool
		}
		Warnings []string
	}
	inventory := func() {
		t.Helper()
		list.Keys, list.Warnings = nil, nil
		if err := json.Unmarshal([]byte(mustRun(t, "hsm", "keys", "--dir", dir, "-o", "json").stdout), &list); err != nil {
			t.Fatal(err)
		}
	}
	inventory()
	m.keysByPages(t)
	label, trusted := "", false
	for _, k := range list.Keys {
		if strings.HasPrefix(k.Owner, "signer:") {
			if k.Owner == "signer:D1" {
				label = k.Label
			}
			if k.Kind != "custody" || k.State != "sealed" || len(k.Machines) != 1 {
				t.Errorf("the signer's key: %+v", k)
			}
			continue
		}
		if k.State != "present" || k.Sensitive == nil || !*k.Sensitive || *k.Extractable || len(k.Machines) != 1 {
			t.Errorf("a resident key: %+v", k)
		}
		trusted = trusted || k.Label == "kek/2026" && k.Trusted != nil && *k.Trusted
	}
	if len(list.Warnings) != 0 || label == "" || !trusted || len(list.Keys) < 10 {
		t.Errorf("%d keys, the wrapping key trusted: %v, warnings %v", len(list.Keys), trusted, list.Warnings)
	}
	refused(t, 1, []string{"[forbidden]"}, "hsm", "destroy", label, "--dir", dir, "--reason", "离职")
	mustRun(t, "signer", "stop", "D1", "--dir", dir, "--reason", "离职")
	mustRun(t, "hsm", "destroy", label, "--dir", dir, "--reason", "离职")
	inventory()
	for _, k := range list.Keys {
		if k.Label == label && k.State != "destroyed" {
			t.Errorf("destroyed: %+v", k)
		}
	}
	m.mustBeClean(t)
}
