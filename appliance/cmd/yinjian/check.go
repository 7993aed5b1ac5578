package main

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/appliance/uses"
	"yinjian/dbdriver/sqlite"
)

// errFound means that the check was made and found something; what, was printed.
var errFound = errors.New("检查未通过，详见上文 (the check found something, see above)")

func auditCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "audit", Short: "日志 (the journal)"})
	var dir, journal, logKey, usesDir, output string
	var known, tsaFiles []string
	verify := &cobra.Command{
		Use:   "verify (--dir DIR | --journal DIR --log-key FILE [--uses DIR])",
		Short: "重读全部日志，指出被改动、删除、增加或调换的条目 (re-read everything and name what was changed)",
		Long: `重读日志的每一条目、每一附件、每一检查点，指出被改动、删除、增加、调换的条目。
可在设备运行时执行（只读），也可对一份拷贝执行。退出码 0：全部条目在已验签的检查点之下，未发现问题；1：有发现，
或末尾有条目无检查点覆盖，或未验签名，或无法读取。整份日志被换回旧状态，只有对照外存的检查点（--known）才能发现。
同时核对密钥使用记录（uses 目录）：密码机经本机作出的每个签名须有记录；没有的逐一指名，尚未记入日志的使退出码为 1。

Re-reads every entry, payload and checkpoint. Works beside a running appliance (read-only) and on a copy. It exits 0
only if every entry is under a checkpoint whose signature was checked. That the whole was put back to an older state
shows only against checkpoints kept elsewhere (--known). The log of the keys' uses (folder uses) is held against the
journal: each signature that the appliance had made is to be in it. One that is not is named; exit 1 if the journal does
not name it yet.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			switch {
			case dir != "" && journal == "":
				journal = filepath.Join(dir, "journal")
				if logKey == "" {
					logKey = filepath.Join(dir, "log.pem")
				}
				if usesDir == "" {
					usesDir = appliance.UsesDir(dir)
				}
			case journal == "" || dir != "":
				return usageError{errors.New("给出 --dir，或 --journal 与 --log-key (give --dir, or --journal and --log-key)")}
			}
			if logKey == "" && len(known) > 0 {
				return usageError{errors.New("--known 需要 --log-key (needs --log-key)")}
			}
			return auditVerify(c.Context(), os.Stdout, journal, logKey, usesDir, tsaFiles, output, known...)
		},
	}
	f := verify.Flags()
	f.StringVar(&dir, "dir", "", "设备目录 (folder of the appliance)")
	f.StringVar(&journal, "journal", "", "日志目录 (folder of the journal)")
	f.StringVar(&logKey, "log-key", "", "日志公钥 PEM；不给则不验签名 (without it signatures are not checked)")
	f.StringVar(&usesDir, "uses", "", "密钥使用记录的目录，缺省为设备目录下的 uses (folder of the keys' uses)")
	f.StringArrayVar(&known, "known", nil, "外存的检查点，可重复：evidence.json，或检查点文本（签名在同名 .sig 文件）(a checkpoint kept elsewhere: an evidence bundle, or a note with its signature in FILE.sig)")
	f.StringArrayVar(&tsaFiles, "tsa", nil, "时间戳单元证书 PEM，可重复；不给则取日志公钥旁的 tsa-单元.pem (certificate of a timestamp unit; default: those beside the log key)")
	f.StringVarP(&output, "output", "o", "text", "text 或 json")
	c.AddCommand(verify)
	return c
}

// checkOutput refuses formats that are not known.
func checkOutput(output string) error {
	if output != "text" && output != "json" {
		return usageError{fmt.Errorf("-o %q：只有 text 与 json (text or json)", output)}
	}
	return nil
}

// readKnown reads a checkpoint kept elsewhere and checks its signature.
func readKnown(name string, key crypto.PublicKey) (audit.Checkpoint, error) {
	fail := func(err error) (audit.Checkpoint, error) {
		return audit.Checkpoint{}, fmt.Errorf("--known %s: %w", name, err)
	}
	note, err := os.ReadFile(name)
	if err != nil {
		return fail(err)
	}
	var signature []byte
	if bytes.HasPrefix(bytes.TrimLeft(note, " \t\r\n"), []byte("{")) {
		bundle, err := evidence.Parse(note)
		if err != nil {
			return fail(err)
		}
		note, signature = bundle.Journal.Checkpoint, bundle.Journal.CheckpointSignature
	} else if signature, err = os.ReadFile(name + ".sig"); err != nil {
		return fail(err)
	}
	c, err := audit.ParseCheckpoint(note, signature)
	if err != nil {
		return fail(err)
	}
	if err := audit.VerifyCheckpoint(key, c); err != nil {
		return fail(err)
	}
	return *c, nil
}

// openJournal opens a journal's folder to read it, beside a running appliance if there is one. The caller closes it.
func openJournal(ctx context.Context, dir string) (*sqlite.Journal, error) {
	return sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: dir, ReadOnly: true})
}

// verifyWait is what a running appliance has for signing a checkpoint over what is there.
const verifyWait = 2 * time.Second

func auditVerify(ctx context.Context, w io.Writer, journal, logKey, usesDir string, tsaFiles []string, output string, known ...string) error {
	var key crypto.PublicKey
	if logKey != "" {
		var err error
		if key, err = show.ReadPublicKey(logKey); err != nil {
			return err
		}
	}
	units, err := timestampUnits(tsaFiles, logKey)
	if err != nil {
		return err
	}
	shown, end := verifyProgress()
	defer end()
	opt := audit.Options{
		LogKey: key, Wait: verifyWait, CheckToken: appliance.CheckpointToken(units...), Progress: shown, Workers: runtime.NumCPU(),
	}
	for _, name := range known {
		c, err := readKnown(name, key)
		if err != nil {
			return err
		}
		opt.Known = append(opt.Known, c)
	}
	store, err := openJournal(ctx, journal)
	if err != nil {
		return err
	}
	defer store.Close()
	report, err := audit.Verify(ctx, store, opt)
	end()
	if len(units) == 0 {
		report.Remarks = append(report.Remarks, unitsNotChecked)
	}
	var counted *uses.Report
	if usesDir == "" {
		report.Remarks = append(report.Remarks, usesNotChecked)
	} else if err == nil {
		counted, err = uses.Verify(ctx, store, usesDir, appliance.UsesSlots(), verifyWait)
	}
	if output == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		whole := struct {
			*audit.Report
			Uses *uses.Report `json:"uses,omitempty"`
		}{report, counted}
		if jerr := enc.Encode(whole); jerr != nil {
			return jerr
		}
	} else {
		printAudit(w, report)
		printUses(w, counted)
	}
	if err != nil {
		return fmt.Errorf("未能读完 (reading was not finished): %w", err)
	}
	if counted != nil && !counted.OK() {
		return errFound
	}
	if !report.OK() || !report.Covered || !report.SignaturesChecked {
		return errFound
	}
	return nil
}

// verifyProgress shows how far a verification is that takes longer than two seconds. end may be called twice.
func verifyProgress() (show func(done, total uint64), end func()) {
	begun := time.Now() // interval
	var bar *progress
	show = func(done, total uint64) {
		if bar == nil {
			if time.Since(begun) < 2*time.Second {
				return
			}
			bar = newProgress(int(total))
			bar.begun = begun
		}
		bar.add(int(done) - bar.done)
	}
	return show, func() {
		if bar != nil {
			bar.end()
			bar = nil
		}
	}
}

func printAudit(w io.Writer, r *audit.Report) {
	fmt.Fprintf(w, "日志 journal %s：%d 条 entries，%d 段 segments，%d 个检查点 checkpoints，%d 个附件 payloads\n", r.Node, r.Entries, r.Segments, r.Checkpoints, r.Payloads)
	fmt.Fprintf(w, "检查点覆盖到 covered to %d，其后 %d 条仅由链保护 (entries after it are protected by the chain alone)\n", r.CoveredTo, r.Uncovered)
	fmt.Fprintf(w, "检查点时间戳 timestamp tokens：%d 个，核验通过 good %d，无时间戳的检查点 checkpoints without %d\n", r.Tokens, r.TokensChecked, r.WithoutToken)
	if !r.SignaturesChecked {
		fmt.Fprintln(w, "未给日志公钥：检查点签名未验 (no log key: signatures of checkpoints were not checked)")
	}
	for _, m := range r.Remarks {
		fmt.Fprintf(w, "  说明 note: %s\n", m)
	}
	if r.OK() {
		switch {
		case !r.SignaturesChecked:
			fmt.Fprintf(w, "结论 result: 检查点签名未验，只能说各文件彼此一致；未被整体改写无法判断 (signatures were not checked: the files agree with each other, whether they were rewritten cannot be told)\n")
		case r.Covered:
			fmt.Fprintln(w, "结论 result: 未发现改动 (nothing was changed)")
		default:
			fmt.Fprintf(w, "结论 result: 已覆盖部分未发现改动；其后 %d 条无检查点覆盖，离线无法判断是否被改动、增添，其后是否被截去 (nothing was changed in the first %d entries; of the %d after them, under no checkpoint, nothing can be said offline)\n", r.Uncovered, r.CoveredTo, r.Uncovered)
		}
		return
	}
	for _, f := range r.Findings {
		record := ""
		if f.Ref != "" {
			record = " 记录 record " + f.Ref
		}
		fmt.Fprintf(w, "  ✗ 条目 entry %d [%s]%s\n      %s\n      %s\n", f.Sequence, f.Kind, record, f.DetailZH, f.Detail)
	}
	if r.Omitted > 0 {
		fmt.Fprintf(w, "  另有 %d 项未列出 (%d more)\n", r.Omitted, r.Omitted)
	}
}

const usesNotChecked = "未给密钥使用记录的目录：没有条目的签名查不出 (no folder of the keys' uses: signatures without an entry would not show)"

// usesMark is "–" for what a power cut or a crash leaves behind, which is no alarm.
func usesMark(reason string) string {
	if reason == uses.Ended {
		return "–"
	}
	return "✗"
}

// printUses shows what the keys were used for. The table is left out where nothing was counted.
func printUses(w io.Writer, r *uses.Report) {
	switch {
	case r == nil:
		return
	case r.Absent:
		fmt.Fprintln(w, "密钥使用 uses of keys：没有使用记录，未核对 (there is no log of uses, nothing was held against it)")
		return
	}
	fmt.Fprintln(w, "密钥使用 uses of keys（签名 signatures = 此前 before + 条目 entries + 检查点 checkpoints + 作废 discarded + 无记录 unaccounted + 自检 health + 未决 open；绕过工作进程 elsewhere：密码机自己多计的次数 as the cipher machine itself counts）")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "slot\tkey\tsignatures\tbefore\tentries\tcheckpoints\tdiscarded\tunaccounted\thealth\topen\telsewhere\t")
	for _, k := range r.Keys {
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t\n", k.Slot, k.Key, k.Uses, k.Before, k.Entries, k.Checkpoints, k.Discarded, k.Unaccounted, k.Health, k.Open, k.Elsewhere)
	}
	t.Flush()
	for _, n := range r.Named {
		fmt.Fprintf(w, "  %s 条目 entry %d 已记 names：槽位 %s 密钥 %s 第 %d 次使用没有记录 (slot %s, key %s, use %d has no entry)\n      签名 signature SM3 %s：%s\n",
			usesMark(n.Reason), n.Sequence, n.Slot, n.Key, n.Counter, n.Slot, n.Key, n.Counter, n.Signature, n.Reason)
	}
	for _, d := range r.Damages {
		fmt.Fprintf(w, "  ✗ 条目 entry %d 已记 names：槽位 %s 的使用记录不完整 (the log of uses was damaged)：%s，%s\n", d.Sequence, d.Slot, d.What, d.Detail)
	}
	for _, d := range r.Apart {
		fmt.Fprintf(w, "  %s 条目 entry %d 已记 names：槽位 %s 密钥 %s，密码机自计 %d 次，使用记录 %d 次，多 %d 次 (the cipher machine counts %d more uses of key %s than were recorded)\n      %s\n",
			usesMark(d.Reason), d.Sequence, d.Slot, d.Key, d.Machine, d.Log, d.More, d.More, d.Key, d.Reason)
	}
	for _, n := range r.Open {
		fmt.Fprintf(w, "  ✗ 槽位 %s 密钥 %s 第 %d 次使用没有记录，日志尚未记下 (slot %s, key %s, use %d has no entry, and the journal does not name it yet)\n      签名 signature SM3 %s：%s\n",
			n.Slot, n.Key, n.Counter, n.Slot, n.Key, n.Counter, n.Signature, n.Reason)
	}
	for _, d := range r.Broken {
		fmt.Fprintf(w, "  ✗ 槽位 %s 的使用记录不完整，日志尚未记下 (the log of uses is damaged, and the journal does not name it yet)：%s，%s\n", d.Slot, d.What, d.Detail)
	}
	if r.OK() {
		if len(r.Named)+len(r.Damages)+len(r.Apart) == 0 {
			fmt.Fprintln(w, "结论 result: 每个签名都有交代 (every signature is accounted for)")
		} else {
			fmt.Fprintln(w, "结论 result: 没有记录的签名均已在日志中指名 (each signature without an entry is named in the journal)")
		}
	}
}

func verifyCommand() *cobra.Command {
	var anchors, logKey, cosigner, document, at, output string
	c := &cobra.Command{
		Use:   "verify --anchors PATH --log-key FILE [--cosigner-key FILE] [--document FILE] EVIDENCE",
		Short: "离线验证一份证据 (verify evidence without the appliance)",
		Args:  exactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			data, err := os.ReadFile(args[0])
			if err != nil {
				return err
			}
			imported := evidence.IsHistory(data)
			var bundle *evidence.Bundle
			var older *evidence.History
			if imported {
				older, err = evidence.ParseHistory(data)
			} else {
				bundle, err = evidence.Parse(data)
			}
			if err != nil {
				return err
			}
			trust, err := show.LoadTrust(anchors, logKey)
			if err == nil {
				err = show.LoadCosigner(&trust, cosigner)
			}
			if err != nil {
				return err
			}
			var in evidence.Input
			if at != "" {
				if in.At, err = time.Parse(time.RFC3339, at); err != nil {
					return usageError{fmt.Errorf("--at: %w", err)}
				}
			}
			if document != "" {
				if in.Document, err = os.ReadFile(document); err != nil {
					return err
				}
			}
			var report *evidence.Report
			if imported {
				report = evidence.VerifyHistory(older, trust, in)
			} else {
				report = evidence.Verify(bundle, trust, in)
			}
			if output == "json" {
				enc := json.NewEncoder(os.Stdout)
				enc.SetIndent("", "  ")
				if err := enc.Encode(report); err != nil {
					return err
				}
			} else {
				show.Print(os.Stdout, report)
			}
			if report.Verdict != pki.Valid {
				return errFound
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&anchors, "anchors", "", "信任锚：PEM 文件或目录 (trust anchors: PEM file or folder)")
	f.StringVar(&logKey, "log-key", "", "日志公钥 PEM (the log's public key)")
	f.StringVar(&cosigner, "cosigner-key", "", "另一院区的日志公钥 PEM：核对其见证 (the other campus's log key: checks its cosignature)")
	f.StringVar(&document, "document", "", "原文 (the document)")
	f.StringVar(&at, "at", "", "按此时刻判断时间戳是否已到期，RFC 3339；不给则只按签署的时刻 (judge at this time; without it, at the time of signing alone)")
	f.StringVarP(&output, "output", "o", "text", "text 或 json")
	_ = c.MarkFlagRequired("anchors")
	_ = c.MarkFlagRequired("log-key")
	return c
}
