package vmtest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance/pack"
	"yinjian/iso/layout"
	"yinjian/iso/vmtest"
)

// restoredWithin is what a new appliance may take from the beginning of its installation to its first signature: the tender's
// quarter of an hour, which a slow emulated machine has to keep too.
const restoredWithin = 15 * time.Minute

// shown waits until the pattern finds something on the console, and answers the last.
func shown(t *testing.T, v *vmtest.VM, pattern string) (value string) {
	t.Helper()
	find := regexp.MustCompile(pattern)
	until(t, "the console shows "+pattern, func(context.Context) error {
		found := find.FindAllStringSubmatch(v.Console(), -1)
		if len(found) == 0 {
			return errors.New("not yet")
		}
		value = found[len(found)-1][1]
		return nil
	})
	return value
}

// private writes what nobody else may read.
func private(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "private")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// command runs the program on the engineer's computer, and answers what it says.
func (a *surroundings) command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), a.yinjian, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v: %s", args, err, out)
	}
	return string(out)
}

// pack is one with the cipher machine's library; unsigned.
func (a *surroundings) pack(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := pack.Create(t.Context(), &out, pack.Content{
		Manifest: pack.Manifest{Kind: pack.PKCS11, Name: "maker", Version: "1.0.0", Serial: 1, Maker: "某厂商", Library: "lib/libmaker.so"},
		Sources:  map[string]string{"lib/libmaker.so": a.module}, Verity: "sha256",
	}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// together has the administrator of role propose by a command from outside, and the one of second approve.
func (a *surroundings) together(t *testing.T, v *vmtest.VM, o *officers, fingerprint, role, second string, args ...string) {
	t.Helper()
	args = append(args, "--at", "https://"+v.Address(adminPort), "--fingerprint", fingerprint, "--name", administrators[role], "--password-file", private(t, newPassword(role)))
	cmd := exec.CommandContext(t.Context(), a.yinjian, args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	approver := o.admin.WithSession(o.tokens[second], nil)
	until(t, "a proposal", func(ctx context.Context) error {
		answer, err := approver.ListProposals(ctx)
		if err != nil {
			return err
		}
		select {
		case err := <-ended:
			t.Fatalf("%q ended before it was approved: %v: %s", args, err, &said)
		default:
		}
		var list struct{ Proposals []wire.Proposal }
		if err := json.Unmarshal(answer, &list); err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(list.Proposals, func(p wire.Proposal) bool { return p.State == "pending" })
		if i < 0 {
			return fmt.Errorf("%s", answer)
		}
		_, err = approver.Decide(ctx, "approve", wire.Decide{ID: list.Proposals[i].Proposed.Proposal, SM3: list.Proposals[i].SM3})
		return err
	})
	if err := <-ended; err != nil {
		t.Fatalf("%q: %v: %s", args, err, &said)
	}
}

// A machine, whose cipher machine's library came as a pack with its installation, is lost with its disk and its TPM. Another one is installed, waits, is sent the backup that was carried out before, and
// signs, all within a quarter of an hour; what was acknowledged after the backup is named from the database.
func TestRestore(t *testing.T) {
	long(t)
	outside, settings := newSurroundings(t)
	signers, hospital := packKeys(t)
	// The cipher machine's library comes as a maker's pack, with the installation.
	beside := map[string]string{"hospital.pem": string(hospital), "maker.pack": string(signedPack(t, outside.pack(t), signers))}
	settings = strings.Replace(settings, "[settings.hsm]\n", "[settings.hsm]\nmodule = \"pack:maker/lib/libmaker.so\"\n", 1)
	lost := newSite(t)
	lost.settings, lost.beside = settings, beside
	lost.install(t)
	v := lost.boot(t)
	o := login(t, v)
	fingerprint := shown(t, v, `TLS certificate, SHA-256:\s+([0-9a-f]{64})\s`)
	b := &business{key: register(t, o)}
	c := b.client(t, v)
	ready(t, c)
	// Its certificate is for the address that the engineer has answered.
	conn, err := tls.Dial("tcp", v.Address(apiPort), anyTLS())
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.ConnectionState().PeerCertificates[0].VerifyHostname("10.0.2.20"); err != nil {
		t.Error(err)
	}
	conn.Close()
	before := sign(t, c, "n-1")

	dir := t.TempDir()
	custodians := "name = \"2026 年\"\nrecord = \"custodians.json\"\nthreshold = 2\n"
	for _, holder := range []string{"赵一", "钱二", "孙三"} {
		custodians += fmt.Sprintf("[[custodian]]\nname = %q\nshare = \"%s.txt\"\n", holder, holder)
	}
	list := filepath.Join(dir, "custodians.toml")
	if err := os.WriteFile(list, []byte(custodians), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "whole.yjb")
	outside.together(t, v, o, fingerprint, "security", "system", "backup", "custodians", list)
	outside.together(t, v, o, fingerprint, "system", "security", "backup", "create", "--to", file)
	record(t, "backup carried out", v)
	if said, l := packs(t, o.system(t)); len(l) != 1 || l[0].Name != "maker" || l[0].Fault != "" || !strings.Contains(said, `"installed_by":"installation"`) {
		t.Errorf("the pack that came with the installation: %s", said)
	}
	after := sign(t, c, "n-2")
	shipped(t, o)
	v.Kill()

	began := time.Now() // interval
	s := newSite(t)
	files := map[string]string{layout.AnswersFile: answersJSON, "answers.toml": fmt.Sprintf("restore = \"0.0.0.0:%d\"\n", adminPort)}
	maps.Copy(files, beside)
	installs(t, s.medium(t, "install", vmtest.Label(t, layout.AnswersLabel, files)))
	v = vmtest.Start(t, s.firmware(t, "restored"))
	door := shown(t, v, `fingerprint:\s+([0-9a-f]{64})\s`)
	token := shown(t, v, `恢复码 token: (\S+)\s`)
	record(t, "waits for its backup", v)
	said := outside.command(t, "restore", "--to", "https://"+v.Address(adminPort), "--fingerprint", door, "--token-file", private(t, token), file,
		"--share", filepath.Join(dir, "赵一.txt"), "--share", filepath.Join(dir, "孙三.txt"), "--answers", private(t, settings[strings.Index(settings, "[secrets]"):]),
		"--confirmed-by", "甲", "--confirmed-by", "乙")
	if !strings.Contains(said, "✓ 回执") || !strings.Contains(said, "已恢复，设备正在启动") {
		t.Errorf("restore says: %s", said)
	}
	record(t, "restored", v)
	c = b.client(t, v)
	var again *wire.SignResult
	for {
		var err error
		if again, err = c.Sign(t.Context(), "n-1", request("n-1")); err == nil {
			break
		}
		if time.Since(began) > restoredWithin {
			t.Fatalf("not signing after %v: %v", restoredWithin, err)
		}
		v.After(time.Second)
	}
	if !again.Replayed || again.RecordID != before.RecordID {
		t.Errorf("the record from before is %s, was %s", again.RecordID, before.RecordID)
	}
	if fresh := sign(t, c, "n-3"); fresh.Epoch == before.Epoch {
		t.Error("no new epoch after the restore")
	}
	whole := time.Since(began)
	noteTook("%7.1f s  %s: from the beginning of the new machine's installation to its first signature", whole.Seconds(), t.Name())
	if whole > restoredWithin {
		t.Errorf("%v, at most %v", whole, restoredWithin)
	}
	o = loginAgain(t, v)
	until(t, "what was lost is named", func(ctx context.Context) error {
		answer, err := o.admin.WithSession(o.tokens["audit"], nil).MissingRecords(ctx)
		if err == nil && (!strings.Contains(string(answer), after.RecordID) || strings.Contains(string(answer), before.RecordID)) {
			err = fmt.Errorf("%s", answer)
		}
		return err
	})
	v.Kill()
	v = s.boot(t) // by itself, from now on
	ready(t, b.client(t, v))
	record(t, "started again, unattended", v)
	v.Kill()
}
