package main

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/custody"
	"yinjian/appliance/evidence/show"
	"yinjian/dbdriver"
	"yinjian/ntp/sysclock"
)

// An opening says how a backup is opened.
type opening struct {
	files, shares []string
	logKey        string // PEM; "": the one in the backup
	noReceipt     bool
	given         [][]byte             // shares as their files have them, in the place of shares
	progress      func(read, of int64) // may be nil
}

func (o *opening) flags(c *cobra.Command) {
	c.Flags().StringArrayVar(&o.shares, "share", nil, "保管人份额的文件，每份一次，须达门限 (file with a custodian's share; once for each, as many as it takes)")
	c.Flags().StringVar(&o.logKey, "log-key", "", "日志公钥 PEM，取自别处；不给则用备份自带的，只能说前后一致 (the log's public key from elsewhere; without it the backup's own, which proves only that it agrees with itself)")
	c.Flags().BoolVar(&o.noReceipt, "without-receipt", false, "没有回执也打开：不能证明它出自该设备 (open it without its receipt: nothing proves whose it is)")
}

// An opened backup was found to be as it was written.
type opened struct {
	Backup   string `json:"backup"`
	Node     string `json:"node"`
	Epoch    string `json:"epoch"`
	SM3      string `json:"sm3"`
	Files    int    `json:"files"` // of the chain
	Entries  uint64 `json:"entries"`
	Root     string `json:"root"`
	Segments int    `json:"segments"`
	// Proved: a receipt under the log's key has this digest and this root.
	Proved bool `json:"proved"`
	// OwnLogKey: the log's key was taken from the backup itself.
	OwnLogKey   bool     `json:"own_log_key"`
	Checkpoints uint64   `json:"checkpoints"`
	Uncovered   uint64   `json:"uncovered"` // entries after the last checkpoint in it
	Softtoken   bool     `json:"softtoken"`
	Absent      []string `json:"absent"`
	ElapsedMS   int64    `json:"elapsed_ms"`

	manifest *backup.Manifest
}

// open writes the backup's files into dir, which is empty, and holds everything against everything: the stream, the
// manifest, the receipt, the journal's own verification, and the tree's head in it against the one that was journalled.
func (o *opening) open(ctx context.Context, dir string) (*opened, error) {
	begun := time.Now() // interval
	if len(o.files) == 0 {
		return nil, usageError{errors.New("需要备份文件 (a backup is needed)")}
	}
	shares, err := o.custodians()
	if err != nil {
		return nil, err
	}
	defer wipe(shares)
	parts, err := backup.Chain(o.files)
	if err != nil {
		return nil, err
	}
	if err := o.tell(parts); err != nil {
		return nil, err
	}
	m, err := backup.Extract(ctx, parts, shares, dir)
	if err != nil {
		return nil, err
	}
	last := parts[len(parts)-1]
	out := &opened{
		Backup: m.ID, Node: m.Node, Epoch: m.Epoch, SM3: last.SM3, Files: len(parts), Entries: m.Entries, Segments: m.Segments, Softtoken: m.Softtoken,
		Absent: m.Absent, OwnLogKey: o.logKey == "", manifest: m,
	}
	keyFile := o.logKey
	if keyFile == "" {
		keyFile = filepath.Join(dir, "log.pem")
	}
	key, err := show.ReadPublicKey(keyFile)
	if err != nil {
		return nil, err
	}
	stated, err := o.statement(last.File, key)
	if err != nil {
		return nil, err
	}
	store, err := openJournal(ctx, filepath.Join(dir, "journal"))
	if err != nil {
		return nil, err
	}
	defer store.Close()
	units, err := timestampUnits(nil, filepath.Join(dir, "log.pem"))
	if err != nil {
		return nil, err
	}
	report, err := audit.Verify(ctx, store, audit.Options{LogKey: key, CheckToken: appliance.CheckpointToken(units...)})
	if err != nil {
		return nil, err
	}
	if !report.OK() {
		printAudit(os.Stderr, report)
		return nil, fmt.Errorf("备份里的日志与写成时不同，不可使用 (the journal in it is not as it was written)")
	}
	out.Root, out.Checkpoints, out.Uncovered = report.Root, report.Checkpoints, report.Uncovered
	switch {
	case report.Node != m.Node || report.Entries != m.Entries:
		return nil, fmt.Errorf("备份里的日志属于 %s、有 %d 条，清单写的是 %s、%d 条 (the journal is not the one of the manifest)", report.Node, report.Entries, m.Node, m.Entries)
	case stated == nil:
	case stated.ID != m.ID || stated.Node != m.Node || stated.SM3 != last.SM3:
		return nil, fmt.Errorf("回执是另一个文件的：备份 %s，摘要 %s (the receipt is another file's)", stated.ID, stated.SM3)
	case stated.Root != report.Root || stated.Entries != report.Entries:
		return nil, fmt.Errorf("树根与设备当时记入日志的不同：%s，记的是 %s (the tree's head is not the one that the appliance journalled)", report.Root, stated.Root)
	default:
		out.Proved = true
	}
	out.ElapsedMS = time.Since(begun).Milliseconds()
	return out, nil
}

// custodians are the shares. The caller wipes them.
func (o *opening) custodians() ([]custody.Share, error) {
	if o.given == nil {
		return sharesFrom(o.shares)
	}
	var shares []custody.Share
	for i, text := range o.given {
		s, err := custody.ParseShare(string(text))
		if err != nil {
			wipe(shares)
			return nil, fmt.Errorf("第 %d 份份额 (share %d): %w", i+1, i+1, err)
		}
		shares = append(shares, s)
	}
	return shares, nil
}

// tell has the progress told while the parts are read.
func (o *opening) tell(parts []backup.Part) error {
	if o.progress == nil {
		return nil
	}
	var total, read int64
	for _, p := range parts {
		st, err := os.Stat(p.File)
		if err != nil {
			return err
		}
		total += st.Size()
	}
	for i := range parts {
		parts[i].Read = func(n int) {
			read += int64(n)
			o.progress(read, total)
		}
	}
	return nil
}

// statement proves the receipt beside a file; nil without one, where that is allowed.
func (o *opening) statement(file string, key crypto.PublicKey) (*backup.Statement, error) {
	b, err := os.ReadFile(file + receiptSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		if o.noReceipt {
			return nil, nil
		}
		return nil, fmt.Errorf("%s 不在：没有回执不能证明备份出自该设备；确要如此，加 --without-receipt (the receipt is not there; nothing proves whose the backup is)", file+receiptSuffix)
	}
	if err != nil {
		return nil, err
	}
	e, err := backup.ParseReceipt(b, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file+receiptSuffix, err)
	}
	return backup.StatementOf(e)
}

func (o *opened) print() {
	proved := "✓ 回执：摘要与树根即设备记入日志的 (receipt: digest and tree head are those that the appliance journalled)"
	if !o.Proved {
		proved = "– 没有回执：不能证明它出自该设备 (no receipt: nothing proves whose it is)"
	}
	if o.OwnLogKey {
		proved += "\n– 日志公钥取自备份自身；以 --log-key 给出别处保存的才算数 (the log's key is the backup's own; --log-key from elsewhere counts)"
	}
	fmt.Printf("备份 %s，节点 %s，纪元 %s，共 %d 个文件\n✓ 密文完整，文件与清单相符 (whole, and its files are those of the manifest)\n✓ 日志 %d 条，%d 段，%d 个检查点，末 %d 条无检查点 (journal verified)\n  树根 root %s\n%s\n",
		o.Backup, o.Node, o.Epoch, o.Files, o.Entries, o.Segments, o.Checkpoints, o.Uncovered, o.Root, proved)
}

func backupVerifyCommand() *cobra.Command {
	var o opening
	var scratch, dir, output string
	var who []string
	c := &cobra.Command{Use: "verify FILE…", Short: "恢复到临时目录来核验备份 (verify a backup by restoring it into a scratch folder)",
		Long: `凭 M 份份额解密到临时目录，核对每个文件，重读整本日志（树、封存、检查点签名），并与设备当时记入日志的树根比较；随后删除临时目录。
增量备份须连同它接续的各份一起给出。给出 --dir 则结果记入运行中设备的日志，日志公钥取自该目录。

临时目录里有日志的明文（没有口令与病历），请放在自己的卷上；被杀则留下，请自行删除。

The scratch folder holds the journal in clear (no secrets, no documents): keep it on a volume of your own. A kill leaves it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			o.files = args
			if dir != "" {
				if err := checkPersons(session(dir) != "", who); err != nil {
					return err
				}
				if o.logKey == "" {
					o.logKey = filepath.Join(dir, "log.pem")
				}
			}
			if err := guard(os.Stderr); err != nil {
				return err
			}
			folder, err := os.MkdirTemp(scratch, "yinjian-verify-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(folder)
			found, err := o.open(cmd.Context(), folder)
			err = noRoom(err)
			if err == nil {
				if output == "json" {
					err = json.NewEncoder(os.Stdout).Encode(found)
				} else {
					found.print()
				}
			}
			if dir == "" {
				return err
			}
			return errors.Join(err, fileReport(cmd.Context(), dir, "verify", idOf(args), who, found, err))
		}}
	o.flags(c)
	c.Flags().StringVar(&scratch, "scratch", "", "临时目录建在哪里，须容得下整本日志；缺省为系统的 (where the scratch folder is made; default the system's)")
	c.Flags().StringVar(&dir, "dir", "", "运行中设备的目录，结果记入其日志 (the running appliance's folder: the result is journalled)")
	c.Flags().StringArrayVar(&who, "confirmed-by", nil, "给出 --dir 时：两名当事人，给两次 (with --dir: two persons, once each)")
	c.Flags().StringVarP(&output, "output", "o", "text", "text 或 json")
	return c
}

// idOf is the newest backup's id among files, zeros when none can be read.
func idOf(files []string) string {
	if parts, err := backup.Chain(files); err == nil {
		return parts[len(parts)-1].Header.ID
	}
	return strings.Repeat("0", 16)
}

// fileReport journals a report.
func fileReport(ctx context.Context, dir, kind, id string, who []string, report any, failed error) error {
	body := struct {
		Report any    `json:"report"`
		Failed string `json:"failed,omitempty"`
	}{Report: report}
	if failed != nil {
		body.Failed = failed.Error()
	}
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	f := adminFlags{dir: dir, output: "json"}
	a, err := f.client()
	if err != nil {
		return err
	}
	defer a.Close()
	if _, err := a.FileReport(ctx, wire.FileReport{Kind: kind, Backup: id, Passed: failed == nil, Persons: who, Report: b}); err != nil {
		return explain(err)
	}
	return nil
}

func restoreCommand() *cobra.Command {
	var o opening
	var dir string
	var who []string
	var to distantRestore
	c := &cobra.Command{Use: "restore (--dir DIR | --to URL --fingerprint HEX) FILE…", Short: "把备份恢复到空白的设备目录，或等待备份的另一台机器 (restore a backup to a blank appliance's folder, or to a machine that waits for it)",
		Long: `--dir：本机的目录。DIR 须为空或不存在。凭 M 份份额解密、核验后才可用；之后第一次 serve 开启新纪元，在日志里宣布恢复，并把中心库有而日志没有的条目列为丢失。
备份里没有口令：恢复之后把所列的口令文件放回原处。原设备必须停用：两台以同一名义运行即为分叉。被杀则重来，从头开始。

The folder must be empty or absent. Nothing of it can be used before all was verified. The first serve begins a new epoch,
announces the restore, and names what the central database has and the journal lacks. Put the files with PINs and
passphrases back. The original must not run any more: two under one name are a fork.

--to：应答里写了 restore 而等待备份的机器（封闭镜像，见 docs/install.md）。指纹与恢复码显示在它的控制台上。文件照旧是加密的，份额、--answers 里的口令经
TLS 送到指纹所指的那台机器；解密、核验、恢复都在那台机器上，做完它即启动。中断了重新执行，已传完的文件不再传。

With --to the machine that waits for a backup does all of it; fingerprint and token stand on its console.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.files = args
			if err := checkPersons(false, who); err != nil {
				return err
			}
			if err := guard(os.Stderr); err != nil {
				return err
			}
			if to.url != "" {
				return to.restore(cmd.Context(), &o, who)
			}
			found, err := restore(cmd.Context(), &o, destination{dir: dir}, who, false)
			if err != nil {
				return err
			}
			found.print()
			fmt.Printf("已恢复到 (restored to) %s\n", dir)
			for _, name := range found.Absent {
				fmt.Printf("  须另行放好 (to be put in place): %s\n", name)
			}
			if found.Softtoken {
				fmt.Println("  软件密码机的密文密钥已恢复，其口令须另行放好 (the software cipher machine's store is here, its passphrase is not)")
			} else {
				fmt.Println("  备份不含密码机的密钥：密码机须是原来的，或已由厂商的办法恢复 (the cipher machine's keys are not in it: it must be the one of before, or restored by its vendor's means)")
			}
			fmt.Printf("确认原设备已停用；然后 (make sure that the original does not run, then): yinjian serve --dir %s\n", dir)
			return nil
		}}
	o.flags(c)
	c.Flags().StringVar(&dir, "dir", "", "要恢复到的目录 (folder to restore to)")
	to.flags(c)
	c.MarkFlagsOneRequired("dir", "to")
	for _, name := range []string{"to", "fingerprint", "token-file", "answers"} {
		c.MarkFlagsMutuallyExclusive("dir", name)
	}
	c.MarkFlagsRequiredTogether("to", "fingerprint")
	persons(c, &who)
	return c
}

// A destination is where a backup is restored to.
type destination struct {
	dir   string
	keeps []string // what is in it, and stays: of a process that waits there
	// finish, if set, makes a startable appliance of what was found to be whole.
	finish func(*opened) error
	from   string // the address that asked, and how many wrong tokens there were before
	tries  int
}

// restore makes its destination's folder an appliance's folder again.
//
// Order: 1. the folder is blank, or what a restore that was cut off left; 2. a mark that nobody serves and that keeps other
// restores out, and what was left goes; 3. the files, verified; 4. the mark of a restore, by which the next start begins an
// epoch; 5. the first mark goes. A stop before 5 leaves a folder that serve refuses and that restore empties; one that waits
// for a backup empties it itself.
func restore(ctx context.Context, o *opening, to destination, who []string, drill bool) (found *opened, err error) {
	dir := to.dir
	defer func() { err = noRoom(err) }()
	clock, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	begun := clock.Realtime().UTC().Format(time.RFC3339)
	// 1. and 2.
	unfinished := filepath.Join(dir, appliance.RestoreUnfinished)
	if _, err := os.Stat(unfinished); errors.Is(err, fs.ErrNotExist) {
		entries, err := os.ReadDir(dir)
		entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return slices.Contains(to.keeps, e.Name()) })
		if err == nil && len(entries) > 0 {
			return nil, usageError{fmt.Errorf("%s 不是空目录；只恢复到空白的设备，不会覆盖 (folder is not empty; only a blank one is restored to)", dir)}
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	release, err := claimMark(unfinished)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := errors.Join(emptyFolder(dir, to.keeps), syncDir(dir)); err != nil {
		return nil, err
	}
	// 3.
	found, err = o.open(ctx, dir)
	for _, name := range []string{"run", "secrets"} {
		if err == nil {
			err = os.MkdirAll(filepath.Join(dir, name), 0o700)
		}
	}
	if err == nil && to.finish != nil {
		if err = to.finish(found); err == nil {
			err = syncAll(dir)
		}
	}
	if err != nil {
		return nil, errors.Join(err, emptyFolder(dir, to.keeps), os.Remove(unfinished))
	}
	// 4.
	r := appliance.Restored{Backup: found.Backup, SM3: found.SM3, Entries: found.Entries, Epoch: found.Epoch, Persons: who, Begun: begun, Proved: found.Proved, Drill: drill, From: to.from, Refused: to.tries}
	if err := appliance.WriteRestored(dir, r); err != nil {
		return nil, err
	}
	// 5.
	if err := os.Remove(unfinished); err != nil {
		return nil, err
	}
	return found, syncDir(dir)
}

// noRoom says what to do about what failed since the disk is full.
func noRoom(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, dbdriver.ErrFull) {
		return fmt.Errorf("磁盘已满，请换用更大的目录后重来 (no room left: begin again where there is more): %w", err)
	}
	return err
}

// claimMark makes the mark and keeps every other restore out of its folder, which would empty it.
func claimMark(name string) (release func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil { // of one that has finished meanwhile the mark is another file, or gone
		var mine, there fs.FileInfo
		mine, err = f.Stat()
		if err == nil {
			there, err = os.Stat(name)
		}
		if err == nil && !os.SameFile(mine, there) {
			err = fs.ErrExist
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("另一个 restore 正在恢复到这个目录 (another restore is under way to this folder): %w", err)
	}
	return func() { f.Close() }, nil
}

// emptyFolder removes everything in a folder but the mark of an unfinished restore, and what stays.
func emptyFolder(dir string, keeps []string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != appliance.RestoreUnfinished && !slices.Contains(keeps, e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}
