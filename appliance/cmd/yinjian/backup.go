package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/backup"
	"yinjian/appliance/custody"
	"yinjian/ntp/sysclock"
)

func backupCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "backup", Short: "备份：保管人、做、核验、列出 (backups: custodians, make, verify, list)", Long: `备份在设备运行中做出，加密给 N 名保管人，任 M 名可打开；其中没有口令与 PIN。做备份不需要任何秘密，恢复需要 M 份份额。

A backup is made while the appliance runs and sealed to N custodians, any M of whom open it. It holds no PIN or passphrase.
Making one needs no secret; opening it needs M shares.`})
	c.AddCommand(backupCustodiansCommand(), backupCreateCommand(), backupVerifyCommand(), backupShowCommand(),
		adminCommand("list", "保管人、最近的备份、未做完的 (custodians, the last backup, what was not finished)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListBackups(ctx)
		}),
		adminCommand("missing", "恢复之后：中心库有而本机日志没有的条目 (after a restore: what the central database has and the journal lacks)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.MissingRecords(ctx)
		}))
	return c
}

// persons adds the flag of a two-person act.
func persons(c *cobra.Command, to *[]string) {
	c.Flags().StringArrayVar(to, "confirmed-by", nil, "两名当事人，给两次，记入日志；本命令不核验其身份 (two persons, once each; their word is recorded, not proved)")
}

// checkPersons wants two, unless an administrator has logged in: then they are who proposes and who approves.
func checkPersons(loggedIn bool, who []string) error {
	if loggedIn && len(who) == 0 {
		return nil
	}
	if len(who) != 2 || who[0] == who[1] {
		return usageError{errors.New("--confirmed-by 须给两次，不同的两人 (twice: two different persons)")}
	}
	return nil
}

// A custodianFile names the custodians of backups.
type custodianFile struct {
	Name       string           `toml:"name"`      // of the set, printed on the shares
	Record     string           `toml:"record"`    // file to be written
	Threshold  int              `toml:"threshold"` // how many open a backup
	Custodians []ceremonyHolder `toml:"custodian"`
}

func backupCustodiansCommand() *cobra.Command {
	var who []string
	var dir string
	var far distant
	c := &cobra.Command{Use: "custodians FILE", Short: "产生备份保管人的份额，记入日志 (make the custodians' shares, and journal whom backups are sealed to)", Args: exactArgs(1),
		Long: `FILE（TOML）写明套名 name、记录文件 record、门限 threshold，每名保管人一节 [[custodian]]：name、share（要写的文件）。
私钥只以份额存在；备份封给其公钥。换保管人即另做一套，此前的备份仍由原来的保管人打开。

The private half exists as shares alone. Another set counts for later backups; earlier ones stay with their custodians.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkPersons(far.at != "" || session(dir) != "", who); err != nil {
				return err
			}
			a, done, err := far.admin(cmd.Context(), dir)
			if err != nil {
				return err
			}
			defer done()
			return makeCustodians(cmd.Context(), a, args[0], append([]string{}, who...)) // null would be refused
		}}
	persons(c, &who)
	c.Flags().StringVar(&dir, "dir", "", "运行中设备的目录 (the running appliance's folder)")
	far.flags(c)
	return c
}

// makeCustodians writes shares and record, and journals the record. What was written is removed when a step fails.
func makeCustodians(ctx context.Context, a *client.Admin, name string, who []string) (err error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var in custodianFile
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&in); err != nil {
		return usageError{fmt.Errorf("%s: %w", name, err)}
	}
	files := []*string{&in.Record}
	var holders []string
	for i := range in.Custodians {
		files = append(files, &in.Custodians[i].Share)
		holders = append(holders, in.Custodians[i].Name)
	}
	f := faults{names: map[string]string{}}
	f.word("name", in.Name)
	f.holders("custodian", in.Threshold, in.Custodians)
	f.outputs("record、share", files)
	if err := f.all(); err != nil {
		return usageError{fmt.Errorf("%s:\n%w", name, err)}
	}
	for _, p := range files {
		if !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(name), *p)
		}
	}
	if err := guard(os.Stdout); err != nil {
		return err
	}
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	set, shares, err := backup.NewCustodians(in.Name, clock.Realtime().UTC().Format(time.RFC3339), holders, in.Threshold, who)
	if err != nil {
		return err
	}
	var undo []func() error
	defer func() {
		for i := range shares {
			shares[i].Wipe()
		}
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()
	for i := range shares {
		if err := writeNew(in.Custodians[i].Share, []byte(shares[i].String()), 0o600, &undo); err != nil {
			return err
		}
	}
	record, err := json.Marshal(set)
	if err == nil {
		err = writeNew(in.Record, append(record, '\n'), 0o644, &undo)
	}
	if err != nil {
		return err
	}
	if _, err := a.SetCustodians(ctx, wire.SetCustodians{Record: record, Persons: who}); err != nil {
		return explain(err)
	}
	fmt.Printf("备份保管人 %d 名，任 %d 名可打开；套号 (set) %s；公钥指纹 (key) %s；记录 (record) %s\n份额已写出，请封入信封、分开保管 (keep the shares apart, in envelopes)\n", len(holders), in.Threshold, set.Set(), set.Key(), in.Record)
	return nil
}

type createOptions struct {
	dir, to                string
	incremental, softtoken bool
	rate                   int // MiB a second; 0: as fast as it goes
	persons                []string
	far                    distant // the appliance is elsewhere, and carries the file out
}

func backupCreateCommand() *cobra.Command {
	var o createOptions
	c := &cobra.Command{Use: "create --dir DIR --to FILE", Short: "做一份备份；设备照常运行 (make a backup while the appliance runs)", Args: exactArgs(0),
		Long: `含：日志全部分段、配置、信任与时间源的决定、公开的证书与吊销列表、密钥使用记录；--softtoken 时含软件密码机的密文密钥（仅评估）。
不含：PIN、口令、口令文件、应用凭据、厂商模块；真正的密码机由厂商的办法备份。写到 FILE.partial，做完才改名；旁边的 FILE.receipt.json 是
日志的回执，请一并保存。被杀、断电后重来即可。--at：封闭镜像等没有命令行的设备，经其管理地址取出，由系统管理员提出、第二人批准。

With the journal, configuration, decisions on trust and time, public certificates and lists, and the records of keys' uses;
the software cipher machine's store only with --softtoken. Without PINs, passphrases, credentials and vendors' modules: a
real cipher machine is backed up by its vendor's means. After a kill or a power cut it is simply made again.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkPersons(o.far.at != "" || session(o.dir) != "", o.persons); err != nil {
				return err
			}
			if elsewhere(o.dir) {
				return usageError{errors.New("没有命令行的设备的备份请用 --at 代替 --dir (an appliance without a shell: --at instead of --dir)")}
			}
			if o.rate < 0 {
				return usageError{errors.New("--rate 不可为负 (not negative)")}
			}
			return createBackup(cmd.Context(), o)
		}}
	c.Flags().StringVar(&o.dir, "dir", "", "运行中设备的目录 (the running appliance's folder)")
	o.far.flags(c)
	required(c, &o.to, "to", "要写的文件，须不存在 (file to be written, must not exist)")
	c.Flags().BoolVar(&o.incremental, "incremental", false, "接续最近一份备份，不再含已封存的分段 (continue the last backup: without segments sealed by then)")
	c.Flags().BoolVar(&o.softtoken, "softtoken", false, "含软件密码机的密文密钥，仅评估 (with the software cipher machine's store, evaluation only)")
	c.Flags().IntVar(&o.rate, "rate", 32, "每秒至多读 MiB 数，免得拖慢签名；0 不限 (MiB read a second, so that signing is not slowed; 0: no limit)")
	persons(c, &o.persons)
	return c
}

const partialSuffix, receiptSuffix = ".partial", ".receipt.json"

// createBackup is the procedure of a backup.
//
// Order: 1. nobody else makes one, and what a killed one left goes; 2. intent in the journal; 3. the file under another
// name, durable; 4. its own name; 5. outcome in the journal, with the digest; 6. the receipt. A stop before 4 leaves
// nothing that looks whole, one after it a file that no receipt goes with.
func createBackup(ctx context.Context, o createOptions) (err error) {
	if o.far.at == "" {
		cfg, err := appliance.LoadConfig(o.dir)
		if err != nil {
			return err
		}
		if o.softtoken && !cfg.Evaluation.Softtoken {
			return usageError{errors.New("本机用的是真正的密码机：其密钥由厂商的办法备份，不带 --softtoken (a real cipher machine is backed up by its vendor's means)")}
		}
	}
	a, done, err := o.far.admin(ctx, o.dir)
	if err != nil {
		return err
	}
	defer done()
	// 1.
	for _, name := range []string{o.to, o.to + receiptSuffix} {
		if _, err := os.Lstat(name); err == nil {
			return fmt.Errorf("%s 已存在，不会覆盖 (exists and is not overwritten)", name)
		}
	}
	if o.far.at == "" { // a distant one does this itself
		release, err := appliance.ClaimBackup(o.dir)
		if err != nil {
			return err
		}
		defer release()
	}
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10) // signing goes first; without it it is only slower
	// 2.
	target, err := filepath.Abs(o.to)
	if err != nil {
		return err
	}
	started, err := a.BeginBackup(ctx, wire.BeginBackup{Persons: append([]string{}, o.persons...), Target: cutBytes(target, 256), Incremental: o.incremental, Softtoken: o.softtoken})
	if err != nil {
		return explain(err)
	}
	partial := o.to + partialSuffix
	end := wire.EndBackup{ID: started.ID}
	defer func() {
		if err == nil {
			return
		}
		os.Remove(partial)
		end = wire.EndBackup{ID: started.ID, Failed: cutBytes(err.Error(), 256)}
		if _, jerr := a.EndBackup(context.WithoutCancel(ctx), end); jerr != nil {
			err = errors.Join(err, fmt.Errorf("日志里没有记下失败 (the journal does not say that it failed): %w", jerr))
		}
	}()
	// 3.
	if err := writeBackup(ctx, a, o, started, partial, &end); err != nil {
		if errors.Is(err, unix.ENOSPC) {
			err = fmt.Errorf("目标磁盘已满，没有留下文件；换更大的介质，或用 --incremental (no room at the target, nothing was left there: take a larger one, or --incremental): %w", err)
		}
		return err
	}
	// 4.
	if err := os.Rename(partial, o.to); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(target)); err != nil {
		return err
	}
	// 5.
	receipt, eerr := a.EndBackup(ctx, end)
	if eerr != nil {
		return fmt.Errorf("文件已写成，但日志里没有它的结果，不可作数 (the file is whole, but the journal does not say so): %w", explain(eerr))
	}
	// 6.
	var undo []func() error
	if err := writeNew(o.to+receiptSuffix, append(receipt, '\n'), 0o644, &undo); err != nil {
		fmt.Fprintf(os.Stderr, "回执未能写出 (the receipt could not be written): %v\n", err)
	}
	where := " --log-key log.pem"
	if o.dir != "" {
		where = " --dir " + o.dir
	}
	fmt.Printf("备份 %s：%s，%d 字节，日志 %d 条\n摘要 SM3 %s\n回执 (receipt) %s\n下一步 next: yinjian backup verify %s --share … --share …%s\n", started.ID, o.to, end.Size, end.Entries, end.SM3, o.to+receiptSuffix, o.to, where)
	return nil
}

// cutBytes shortens text at a character's end.
func cutBytes(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, s)
	for len(s) > most {
		r := []rune(s)
		s = string(r[:len(r)-1])
	}
	return strings.TrimSpace(s)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err = d.Sync(); errors.Is(err, unix.EINVAL) {
		err = nil // a medium whose file system does not know that
	}
	return errors.Join(err, d.Close())
}

// writeBackup writes the file under its first name, and says in end what it is.
func writeBackup(ctx context.Context, a *client.Admin, o createOptions, started *wire.BegunBackup, partial string, end *wire.EndBackup) error {
	out, err := os.OpenFile(partial, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close() // after what follows it is closed already, or err says why not
	var written wire.EndBackup
	if o.far.at == "" {
		written, err = appliance.WriteBackup(ctx, &gradual{f: out}, appliance.BackupWriting{Dir: o.dir, Begun: started, Softtoken: o.softtoken, Rate: o.rate})
	} else {
		written, err = carryBackup(ctx, a, o, started, &gradual{f: out})
	}
	if err == nil {
		err = errors.Join(out.Sync(), out.Close())
	}
	if err == nil {
		*end = written
	}
	return err
}

// carryBackup has a distant appliance write it, and holds what came against what that says it has sent.
func carryBackup(ctx context.Context, a *client.Admin, o createOptions, started *wire.BegunBackup, out *gradual) (wire.EndBackup, error) {
	digest := sm3.New()
	sent, err := a.CarryBackup(ctx, wire.CarryBackup{ID: started.ID, Rate: o.rate}, io.MultiWriter(out, digest))
	if err != nil {
		return wire.EndBackup{}, explain(err)
	}
	if came := hex.EncodeToString(digest.Sum(nil)); came != sent.SM3 || out.n != int64(sent.Size) {
		return wire.EndBackup{}, fmt.Errorf("收到的与设备送出的不同：摘要 %s、%s (what came is not what was sent)", came, sent.SM3)
	}
	return *sent, nil
}

// gradual syncs what is written now and then, so that the volume's cache never has much that the journal's own fsync would
// wait for.
type gradual struct {
	f         *os.File
	n, synced int64
}

func (g *gradual) Write(b []byte) (int, error) {
	n, err := g.f.Write(b)
	g.n += int64(n)
	if err == nil && g.n-g.synced >= 16<<20 {
		g.synced = g.n
		err = g.f.Sync()
	}
	return n, err
}

func backupShowCommand() *cobra.Command {
	return &cobra.Command{Use: "show FILE", Short: "备份明文部分：哪台设备、何时、谁能打开 (what a backup says in clear: whose, when, who opens it)", Args: exactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		h, _, err := backup.ReadHeader(f)
		if err != nil {
			return err
		}
		base := "完整 (whole)"
		if h.Base != nil {
			base = "接续 (continues) " + h.Base.ID
		}
		fmt.Printf("备份 %s，节点 %s，纪元 %s，%s，程序 %s\n%s\n套号 (set) %s：%s 中任 %d 名可打开 (any %d of them open it)\n",
			h.ID, h.Node, h.Epoch, h.At, h.Program, base, h.Set, strings.Join(h.Holders, "、"), h.Threshold, h.Threshold)
		return nil
	}}
}

// sharesFrom reads custodians' shares. The caller wipes them.
func sharesFrom(names []string) ([]custody.Share, error) {
	var shares []custody.Share
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil {
			var s custody.Share
			s, err = custody.ParseShare(string(b))
			clear(b)
			shares = append(shares, s)
		}
		if err != nil {
			wipe(shares)
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return shares, nil
}

func wipe(shares []custody.Share) {
	for i := range shares {
		shares[i].Wipe()
	}
}
