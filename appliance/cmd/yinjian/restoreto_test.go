package main_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
)

// A door is what the local socket says of a folder that waits for a backup.
type door struct {
	Address, Fingerprint, Token, State, Failure string
	Files, Refused                              int
}

// door waits until the folder waits.
func (m *machine) door(t *testing.T) (d door) {
	t.Helper()
	m.stands(t, api.Uninitialised)
	eventually(t, readyWithin, "the door for a backup is open", func() bool {
		var s struct{ Restore *door }
		o := yinjian(t, "status", "--dir", m.dir, "-o", "json")
		if o.code != 0 || json.Unmarshal([]byte(o.stdout), &s) != nil || s.Restore == nil || s.Restore.Address == "" {
			return false
		}
		d = *s.Restore
		return true
	})
	return d
}

// to are the arguments of a restore to it.
func (d door) to(t *testing.T, token string, more ...string) []string {
	t.Helper()
	file := filepath.Join(tempDir(t), "token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return two(append([]string{"restore", "--to", "https://" + d.Address, "--fingerprint", d.Fingerprint, "--token-file", file}, more...)...)
}

// brokenAfter is a file whose sender goes away.
type brokenAfter struct{ left int }

var errGone = errors.New("the sender is gone")

func (b *brokenAfter) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, errGone
	}
	n := min(b.left, len(p))
	b.left -= n
	return n, nil
}

// TestRestoreToAWaitingMachine has a folder wait for a backup, as the sealed image does, and sends it one from outside: wrong
// tokens, a broken upload, what cannot be opened, secrets that are missing, a kill in the middle, and then an appliance that
// signs and knows what was signed before.
func TestRestoreToAWaitingMachine(t *testing.T) {
	t.Parallel()
	// 1. The original, and its backup.
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	m.enrol(t, "D1", "")
	c := m.register(t, "his", "--consent", "app-asserted")
	before, err := c.Sign(t.Context(), "record-1", asserted("D1", "record-1"))
	if err != nil {
		t.Fatal(err)
	}
	shares := m.custodians(t, "2026 年")
	file := m.backup(t)
	more := m.backup(t, "--incremental")
	m.stop(t)

	// 2. A folder with nothing but the word to wait. It is made nothing else of.
	other := filepath.Join(tempDir(t), "other")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	answers := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(other, appliance.AnswersFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for text, word := range map[string]string{
		"restore = '127.0.0.1:0'\nnode = 'benbu-1'\n":                    "node：恢复的设备取自备份",
		"restore = 'nowhere'\n":                                          "restore: 应为等待备份的地址",
		"restore = '127.0.0.1:0'\n[settings]\nnode = 'benbu-2'\n":        "settings: node：取自备份",
		"restore = '127.0.0.1:0'\n[secrets]\n'pins.tpm' = 'x'\n":         "secrets: pins.tpm：不能用这个文件名",
		"restore = '127.0.0.1:0'\n[secrets]\n'../config.toml' = 'x'\n":   "secrets: ../config.toml：不能用这个文件名",
		"restore = '127.0.0.1:0'\n[settings.policy]\nrate = 50\ncolour=": "answers.toml",
	} {
		answers(text)
		refused(t, 2, []string{word}, "init", "--check", "--dir", other, "--answers", filepath.Join(other, appliance.AnswersFile))
	}
	answers("restore = '127.0.0.1:0'\n[settings.policy]\nrate = 50\n")
	mustRun(t, "init", "--check", "--dir", other, "--answers", filepath.Join(other, appliance.AnswersFile))
	refused(t, 2, []string{"由 serve 等待备份"}, "init", "--dir", other, "--answers", filepath.Join(other, appliance.AnswersFile))
	w := launch(t, other)
	d := w.door(t)
	refused(t, 1, []string{"这个目录等待备份"}, "provision", "--dir", other, "--answers", filepath.Join(other, appliance.AnswersFile))
	if strings.Contains(readFile(t, w.log), d.Token) {
		t.Error("the token stands in the log")
	}

	// 3. Another machine's certificate: nothing is sent, not even the token. A wrong token: refused, counted, limited.
	with := func(d door, token string, n int, files ...string) []string {
		return opens(shares, n, append(d.to(t, token, "--log-key", filepath.Join(dir, "log.pem")), files...)...)
	}
	another := d
	another.Fingerprint = strings.Repeat("0", 64)
	refused(t, 1, []string{"指纹不符"}, with(another, d.Token, 2, file)...)
	refused(t, 1, []string{"恢复码不符"}, with(d, "AAAAA-BBBBB-CCCCC-DDDDD", 2, file)...)
	fingerprint, err := hex.DecodeString(d.Fingerprint)
	if err != nil {
		t.Fatal(err)
	}
	guesser := client.NewRestore("https://"+d.Address, fingerprint, "AAAAA-BBBBB-CCCCC-DDDDD")
	t.Cleanup(guesser.Close)
	engineer := client.NewRestore("https://"+d.Address, fingerprint, strings.ToLower(strings.ReplaceAll(d.Token, "-", "")))
	t.Cleanup(engineer.Close)
	limited := false
	for range 100 { // five at once, and one more each twelve seconds
		if _, err := guesser.State(t.Context()); client.Is(err, "rate_limited") {
			limited = true
			break
		} else if !client.Is(err, "unauthenticated") {
			t.Fatal(err)
		}
	}
	if _, err := engineer.State(t.Context()); !limited || err != nil && !client.Is(err, "rate_limited") {
		t.Errorf("a hundred wrong tokens in a row: limited %v; then the right one: %v", limited, err)
	}
	if now := w.door(t); now.Refused < 5 || now.Refused > 50 || now.Files != 0 {
		t.Errorf("after wrong tokens and another machine's fingerprint: %+v", now)
	}
	eventually(t, readyWithin, "the address may try again", func() bool { _, err := engineer.State(t.Context()); return err == nil })

	// 4. An upload that breaks off leaves nothing; a file that cannot fit is refused before it is sent.
	if _, err := engineer.Send(t.Context(), "000.yjb", &brokenAfter{100_000}, 1_000_000); !errors.Is(err, errGone) {
		t.Errorf("a broken upload: %v", err)
	}
	eventually(t, readyWithin, "nothing is left of it", func() bool {
		s, err := engineer.State(t.Context())
		left, _ := os.ReadDir(appliance.RestoreFiles(other))
		return err == nil && len(s.Files) == 0 && len(left) == 0
	})
	if _, err := engineer.Send(t.Context(), "000.yjb", io.LimitReader(zeros{}, 1<<50), 1<<50); err == nil || !client.Is(err, "disk_reserve") {
		t.Errorf("a file larger than the disk: %v", err)
	}
	if _, err := engineer.Send(t.Context(), "config.toml", strings.NewReader("x"), 1); !client.Is(err, "invalid_request") {
		t.Errorf("a file of another name: %v", err)
	}
	if _, err := engineer.Begin(t.Context(), wire.BeginRestore{Files: []string{"007.yjb"}, Shares: [][]byte{[]byte("x")}, Persons: []string{"甲", "乙"}}); !client.Is(err, "invalid_request") {
		t.Errorf("a file that was not sent: %v", err)
	}

	// 5. What the command refuses for a folder is refused alike, and leaves the folder blank.
	still := func() {
		t.Helper()
		if !appliance.Blank(other) {
			t.Fatal("a refusal left something in the folder")
		}
		w.stands(t, api.Uninitialised)
	}
	refused(t, 1, []string{"只有 1 份，需要 2 份"}, with(d, d.Token, 1, file)...)
	still()
	refused(t, 1, []string{"备份文件已损坏"}, with(d, d.Token, 2, damaged(t, file))...)
	still()
	refused(t, 1, []string{"没有完整备份"}, with(d, d.Token, 2, more)...)
	refused(t, 2, []string{"不同的两人"}, opens(shares, 2, "restore", "--to", "https://"+d.Address, "--fingerprint", d.Fingerprint, file)...)
	// No backup has the PINs, and here nobody puts them back by hand: without them it is not begun.
	refused(t, 1, []string{"secrets/staff.pin", "secrets/softtoken.passphrase"}, with(d, d.Token, 2, file, more)...)
	still()
	text := "[secrets]\n"
	names, _ := filepath.Glob(filepath.Join(dir, "secrets", "*"))
	for _, name := range names {
		text += fmt.Sprintf("%q = %q\n", filepath.Base(name), strings.TrimSpace(readFile(t, name)))
	}
	secrets := filepath.Join(tempDir(t), "secrets.toml")
	if err := os.WriteFile(secrets, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	colour := filepath.Join(tempDir(t), "colour.toml")
	if err := os.WriteFile(colour, []byte(text+"[settings.policy]\ncolour = 'red'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 1, []string{"policy.colour", "以 settings 改正"}, append(with(d, d.Token, 2, file, more), "--answers", colour)...)
	still()
	for name, secret := range secretsOf(t, dir) {
		if o := command(t, nil, "grep", "-rlF", "--", secret, other); o.code != 1 {
			t.Errorf("%s stayed in the folder of a restore that was refused: %v", name, o)
		}
	}

	// 6. A kill in the middle: it waits again, with another token, and begins anew.
	args := append(with(d, d.Token, 2, file, more), "--answers", secrets)
	ended := make(chan outcome, 1)
	go func() { ended <- command(t, nil, append([]string{built.binary}, args...)...) }()
	mark := filepath.Join(other, appliance.RestoreUnfinished)
	for deadline := time.Now().Add(readyWithin); ; time.Sleep(time.Millisecond) {
		_, unfinished := os.Stat(mark)
		_, whole := os.Stat(filepath.Join(other, "restored"))
		if unfinished == nil || whole == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the restore did not begin")
		}
	}
	w.kill(t)
	if o := <-ended; o.code != 1 || !strings.Contains(o.stderr, "不知道结果") {
		t.Errorf("a command whose machine went away: %v", o)
	}
	if _, err := os.Stat(mark); err != nil {
		t.Log("the restore was quicker than the kill: the mark is put back")
		if err := os.WriteFile(mark, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		answers("restore = '127.0.0.1:0'\n[settings.policy]\nrate = 50\n")
	}
	w = launch(t, other)
	old, d := d, w.door(t)
	if d.Token == old.Token || d.Fingerprint == old.Fingerprint {
		t.Error("the same token or key after a restart")
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("the mark of the unfinished restore is still there")
	}
	if !appliance.Blank(other) {
		t.Error("what the restore had written is still there")
	}
	refused(t, 1, []string{"恢复码不符"}, with(d, old.Token, 2, file, more)...)

	// 7. Done: it starts by itself, and the door is gone.
	o := mustRun(t, append(with(d, d.Token, 2, file, more), "--answers", secrets)...)
	if !strings.Contains(o.stdout, "已恢复，设备正在启动") || !strings.Contains(o.stdout, "✓ 回执") || strings.Contains(o.stdout, "–") {
		t.Errorf("restore says: %v", o)
	}
	w.await(t)
	if conn, err := net.DialTimeout("tcp", d.Address, time.Second); err == nil {
		conn.Close()
		t.Error("the door is still open")
	}
	if _, err := os.Stat(filepath.Join(other, appliance.AnswersFile)); err == nil {
		t.Error("the answers, with their secrets, are still there")
	}
	if left, err := os.ReadDir(appliance.RestoreFiles(other)); err == nil {
		t.Errorf("the backup's files are still there: %v", left)
	}
	cfg, err := appliance.LoadConfig(other)
	if err != nil || cfg.Policy.Rate != 50 {
		t.Errorf("the setting did not reach the configuration: %v", err)
	}
	w.trusted(t)
	found := 0
	for _, e := range entries(t, other, "backup.restored") {
		found++
		if e.Field("tokens.refused") != audit.Value(audit.Int(1)) || e.Text("from") != "127.0.0.1" || e.Text("persons") != "甲、乙" {
			t.Errorf("the journal says of the restore: %+v", e)
		}
	}
	if found != 1 {
		t.Errorf("%d restores in the journal", found)
	}
	// The original may have let requests of the last five minutes through: those of a client whose clock is ahead count.
	credential := filepath.Join(other, "credentials", "his.json")
	if err := errors.Join(os.Mkdir(filepath.Dir(credential), 0o700), os.WriteFile(credential, []byte(readFile(t, filepath.Join(dir, "credentials", "his.json"))), 0o600)); err != nil {
		t.Fatal(err)
	}
	conf := w.clientConfig(t, "his")
	conf.Clock = func() time.Time { return time.Now().Add(5*time.Minute - 10*time.Second) }
	c, err = client.New(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	var again *wire.SignResult
	eventually(t, readyWithin, "it signs", func() bool {
		again, err = c.Sign(t.Context(), "record-1", asserted("D1", "record-1"))
		return err == nil
	})
	if !again.Replayed || again.RecordID != before.RecordID {
		t.Errorf("what was signed before: %+v", again)
	}
	late, err := c.Sign(t.Context(), "record-2", asserted("D1", "record-2"))
	if err != nil || late.Epoch == before.Epoch {
		t.Errorf("what is signed now: %+v, %v", late, err)
	}
	evidence, err := c.Evidence(t.Context(), before.RecordID)
	if err != nil {
		t.Fatal(err)
	}
	kept, document := filepath.Join(tempDir(t), "evidence.json"), filepath.Join(tempDir(t), "document")
	if err := errors.Join(os.WriteFile(kept, evidence, 0o600), os.WriteFile(document, documentOf("record-1"), 0o600)); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "verify", "--anchors", dir, "--log-key", filepath.Join(dir, "log.pem"), "--document", document, kept)
	w.stop(t)
	// 8. For good.
	w = serve(t, other)
	w.trusted(t)
	w.stop(t)
}

// zeros never end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
