package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/backup"
)

// A restore to a machine that has no shell: it waits in its empty folder, as its answers say, and the same code as that of
// `yinjian restore --dir` runs there.

// restoreAt is where a folder waits for a backup: what the answers in it say.
func restoreAt(dir string) (string, error) {
	name := filepath.Join(dir, appliance.AnswersFile)
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var only struct {
		Restore string `toml:"restore"`
	}
	if toml.Unmarshal(b, &only) != nil || only.Restore == "" {
		return "", nil // answers for init, whose affair they are
	}
	a, err := parseAnswers(name, b)
	if err == nil {
		err = a.check(dir)
	}
	return a.Restore, err
}

// restoresAlone refuses answers that would have a machine restored and made at once: node, addresses, administrators come out
// of the backup.
func (a *answers) restoresAlone(name string, text []byte) error {
	if a.Restore == "" {
		return nil
	}
	var all map[string]any
	if err := toml.Unmarshal(text, &all); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains([]string{"restore", "settings", "secrets"}, key) {
			errs = append(errs, fmt.Errorf("%s: %s：恢复的设备取自备份，这里只写 restore、settings、secrets (comes out of the backup: only these three stand here)", name, key))
		}
	}
	return errors.Join(errs...)
}

// madeAgain are secrets that an appliance makes itself and that mean nothing on another machine.
var madeAgain = []string{"administrators.json", "pins.tpm", "unlock-tries.json"}

// restoreFaults are those of answers for a restore. What the settings make of the backup's configuration shows when it has come.
func (a *answers) restoreFaults() map[string][]error {
	out := map[string][]error{}
	if host, port, err := net.SplitHostPort(a.Restore); err != nil || port == "" {
		out["restore"] = []error{errors.New("应为等待备份的地址 host:port，如 0.0.0.0:8444 (want the address to wait at)")}
	} else if ip, err := netip.ParseAddr(host); appliance.Sealed() && (err == nil && ip.IsLoopback() || port == "0") {
		out["restore"] = []error{errors.New("须是外面能连到的地址与端口 (want an address and a port that can be reached from outside)")}
	}
	for _, key := range []string{"node", "campus"} {
		if a.Settings[key] != nil {
			out["settings"] = append(out["settings"], fmt.Errorf("%s：取自备份，不能改 (is the backup's, for ever)", key))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(a.Secrets)) {
		switch {
		case !appliance.SecretFile(name) || slices.Contains(madeAgain, name):
			out["secrets"] = append(out["secrets"], fmt.Errorf("%s：不能用这个文件名 (not this name)", name))
		case strings.TrimSpace(a.Secrets[name]) == "":
			out["secrets"] = append(out["secrets"], fmt.Errorf("%s：是空的 (is empty)", name))
		}
	}
	return out
}

// over takes settings and secrets of other answers, which have the last word.
func (a *answers) over(text []byte) error {
	if len(text) == 0 {
		return nil
	}
	const name = "--answers"
	b := answers{}
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	var only struct {
		Settings map[string]any    `toml:"settings"`
		Secrets  map[string]string `toml:"secrets"`
	}
	if err := d.Decode(&only); err != nil {
		return fmt.Errorf("%s：只写 settings、secrets (these two alone): %w", name, err)
	}
	b.Restore, b.Settings, b.Secrets = a.Restore, only.Settings, only.Secrets
	if err := b.check(""); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if a.Settings == nil {
		a.Settings = map[string]any{}
	}
	appliance.Overlay(a.Settings, b.Settings)
	if a.Secrets == nil {
		a.Secrets = map[string]string{}
	}
	maps.Copy(a.Secrets, b.Secrets)
	return nil
}

// restoreHere restores the folder in which this process waits, as req says, and makes of it an appliance that starts: nobody
// will put files back by hand.
func restoreHere(ctx context.Context, dir string, req appliance.RestoreRequest) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(dir, appliance.AnswersFile))
	if err != nil {
		return nil, err
	}
	a, err := parseAnswers(appliance.AnswersFile, text)
	if err == nil {
		err = a.over(req.Answers)
	}
	if err != nil {
		return nil, err
	}
	o := opening{files: req.Files, given: req.Shares, noReceipt: req.WithoutReceipt, progress: req.Progress}
	if req.LogKey != nil {
		o.logKey = filepath.Join(appliance.RestoreFiles(dir), "log-key.pem")
		if err := os.WriteFile(o.logKey, req.LogKey, 0o600); err != nil {
			return nil, err
		}
	}
	to := destination{dir: dir, keeps: appliance.RestoreKeeps, from: req.From, tries: req.Refused, finish: func(*opened) error { return a.complete(ctx, dir) }}
	found, err := restore(ctx, &o, to, req.Persons, false)
	if err != nil {
		return nil, err
	}
	// It is an appliance from here on, whatever becomes of the answers; the next start looks again.
	err = os.Remove(filepath.Join(dir, appliance.AnswersFile))
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "应答未能删除 (the answers could not be removed): %v\n", err)
	}
	return json.Marshal(found)
}

// complete puts settings over the restored configuration, and the secrets in their places, and refuses what would not start.
func (a *answers) complete(ctx context.Context, dir string) error {
	for name, text := range a.Secrets {
		if err := os.WriteFile(filepath.Join(dir, "secrets", name), []byte(strings.TrimRight(text, "\r\n")+"\n"), 0o600); err != nil {
			return err
		}
	}
	file := filepath.Join(dir, "config.toml")
	if len(a.Settings) > 0 {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var all map[string]any
		if err := toml.Unmarshal(b, &all); err != nil {
			return fmt.Errorf("config.toml: %w", err)
		}
		if of, ok := a.Settings["hsm"].(map[string]any); ok && of["slots"] != nil {
			if was, ok := all["hsm"].(map[string]any); ok {
				delete(was, "slots") // as for a new appliance: the tokens of another machine are all others
			}
		}
		appliance.Overlay(all, a.Settings)
		if b, err = toml.Marshal(all); err != nil {
			return err
		}
		head := "# 印鉴配置：由备份恢复，并按恢复时的 settings 改过。Restored from a backup, with the settings given then.\n"
		if err := os.WriteFile(file, append([]byte(head), b...), 0o600); err != nil {
			return err
		}
	}
	cfg, err := appliance.LoadConfig(dir)
	if err != nil {
		return fmt.Errorf("备份的配置在这里不能用，以 settings 改正 (the backup's configuration does not do here: mend it by settings): %w", err)
	}
	missing, err := appliance.NotHandedBack(ctx, dir)
	if err != nil {
		return fmt.Errorf("备份的配置在这里不能用，以 settings 改正 (the backup's configuration does not do here: mend it by settings): %w", err)
	}
	if len(missing) > 0 {
		return fmt.Errorf("备份里没有、这里也没有：%s。secrets/ 里的以 --answers 的 [secrets] 给出；别处的须是这台机器上有的，或以 settings 改掉 (these are neither in the backup nor here: those of secrets/ are given in [secrets], others have to be on this machine, or not to be named)", strings.Join(missing, "、"))
	}
	if appliance.Sealed() {
		return outsideReaches(cfg)
	}
	return nil
}

// outsideReaches refuses a configuration with which a machine that nobody can log in to at its console would answer nobody.
func outsideReaches(cfg *appliance.Config) error {
	var errs []error
	for key, at := range map[string]string{"listen.api": cfg.Listen.API, "listen.admin": cfg.Listen.Admin} {
		host, port, err := net.SplitHostPort(at)
		if ip, _ := netip.ParseAddr(host); err != nil || port == "" || port == "0" || ip.IsLoopback() || host == "localhost" {
			errs = append(errs, fmt.Errorf("%s：%q 从外面连不到，以 settings 改为如 0.0.0.0:8443 (cannot be reached from outside: set another)", key, at))
		}
	}
	if cfg.Admin.Local != appliance.LocalLogin {
		errs = append(errs, errors.New("admin.local：须为 login (has to be login)"))
	}
	if cfg.HSM.PINSource != appliance.PINFromFile {
		errs = append(errs, errors.New("hsm.pin_source：封闭镜像上只能是 file (only file on the sealed image)"))
	}
	return errors.Join(errs...)
}

// A distantRestore is what the engineer's command is told of the machine that waits.
type distantRestore struct{ url, fingerprint, tokenFile, answers string }

func (d *distantRestore) flags(c *cobra.Command) {
	c.Flags().StringVar(&d.url, "to", "", "等待备份的机器 https://地址:端口 (the machine that waits for the backup)")
	c.Flags().StringVar(&d.fingerprint, "fingerprint", "", "其控制台上的证书指纹 SHA-256 (fingerprint on its console)")
	c.Flags().StringVar(&d.tokenFile, "token-file", "", "恢复码的文件，权限 600；缺省在终端输入 (file with the token on its console, mode 600; default: asked for on the terminal)")
	c.Flags().StringVar(&d.answers, "answers", "", "TOML：[settings]、[secrets]，盖过那台机器的应答 (settings and secrets, over those of the machine's answers)")
}

// restorePoll is how often the machine is asked how far it is.
const restorePoll = 500 * time.Millisecond

// restore sends what is needed and tells what comes of it.
func (d *distantRestore) restore(ctx context.Context, o *opening, who []string) error {
	fingerprint, err := fingerprintOf(d.fingerprint)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(d.url, "https://") {
		return usageError{errors.New("--to 应为 https://地址:端口 (https://host:port)")}
	}
	req := wire.BeginRestore{Persons: who, WithoutReceipt: o.noReceipt}
	if d.answers != "" {
		if req.Answers, err = os.ReadFile(d.answers); err != nil {
			return err
		}
	}
	if o.logKey != "" {
		if req.LogKey, err = os.ReadFile(o.logKey); err != nil {
			return err
		}
	}
	shares, err := sharesFrom(o.shares) // what is none is told before anything is sent
	if err != nil {
		return err
	}
	wipe(shares)
	for _, name := range o.shares {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		req.Shares = append(req.Shares, b)
	}
	parts, err := backup.Chain(o.files)
	if err != nil {
		return err
	}
	token, err := secretOf(ctx, d.tokenFile, "token-file", "控制台上的恢复码 (token on the console)", false)
	if err != nil {
		return err
	}
	m := client.NewRestore(d.url, fingerprint, string(token))
	defer m.Close()
	there, err := m.State(ctx)
	if err != nil {
		return explain(err)
	}
	names := map[string]string{} // what the machine calls them, what we do
	if there.State != wire.RestoreRuns && there.State != wire.RestoreDone {
		for i, p := range parts {
			name := fmt.Sprintf("%03d.yjb", i)
			if err := sendOne(ctx, m, there, name, p.File, names); err != nil {
				return err
			}
			req.Files = append(req.Files, name)
			if _, err := os.Stat(p.File + receiptSuffix); errors.Is(err, fs.ErrNotExist) {
				continue // whether it may be missing the machine says
			}
			if err := sendOne(ctx, m, there, name+receiptSuffix, p.File+receiptSuffix, names); err != nil {
				return err
			}
		}
		if there, err = m.Begin(ctx, req); err != nil {
			return explain(err)
		}
	}
	return awaitDistant(ctx, m, there, names)
}

// sendOne sends a file, unless the machine has it.
func sendOne(ctx context.Context, m *client.Restore, there *wire.RestoreState, name, file string, names map[string]string) error {
	names[name] = file
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	digest, err := backup.Digest(ctx, file)
	if err != nil {
		return err
	}
	if slices.Contains(there.Files, wire.RestoreFile{Name: name, Size: st.Size(), SM3: digest}) {
		return nil
	}
	fmt.Fprintf(os.Stderr, "传送 (sending) %s，%d KiB\n", file, (st.Size()+1023)>>10)
	bar := newProgress(int(st.Size() >> 10))
	got, err := m.Send(ctx, name, &shownReader{r: f, bar: bar}, st.Size())
	bar.end()
	if err != nil {
		return explain(err)
	}
	if got.SM3 != digest {
		return fmt.Errorf("%s：那台机器收到的不同，请重来 (what arrived there is different: begin again)", file)
	}
	return nil
}

// awaitDistant shows how far the machine is until it says what came of it.
func awaitDistant(ctx context.Context, m *client.Restore, there *wire.RestoreState, names map[string]string) error {
	shown := int64(-1)
	for there.State == wire.RestoreRuns {
		if there.Total > 0 {
			if percent := 100 * there.Bytes / there.Total; percent/10 != shown/10 || shown < 0 {
				shown = percent
				fmt.Fprintf(os.Stderr, "恢复中 (restoring) %d%%\n", percent)
			}
		}
		select {
		case <-time.After(restorePoll):
		case <-ctx.Done():
			return ctx.Err()
		}
		var err error
		if there, err = m.State(ctx); err != nil {
			return fmt.Errorf("不知道结果：请看那台机器的控制台；它若又在等待备份，重新执行即可 (the outcome is not known: look at the machine's console; if it waits for a backup again, begin again): %w", explain(err))
		}
	}
	if there.State != wire.RestoreDone {
		said := there.Failure
		for name, file := range names {
			said = strings.ReplaceAll(said, name, file)
		}
		return fmt.Errorf("没有恢复，那台机器仍在等待备份 (not restored, the machine goes on waiting for a backup): %s", said)
	}
	found := new(opened)
	if err := json.Unmarshal(there.Report, found); err != nil {
		return err
	}
	found.print()
	fmt.Println("已恢复，设备正在启动，此门不再打开；进度见其控制台 (restored, the appliance starts, and this door is gone; see its console)")
	if found.Softtoken {
		fmt.Println("软件密码机的密文密钥已恢复 (the software cipher machine's store was restored)")
	} else {
		fmt.Println("备份不含密码机的密钥：密码机须是原来的，或已由厂商的办法恢复 (the cipher machine's keys are not in it: it must be the one of before, or restored by its vendor's means)")
	}
	return nil
}
