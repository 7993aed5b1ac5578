package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/update"
)

func updateCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "update", Short: "升级密封映像：上传、提交、取消 (replace the sealed image)",
		Long: `升级包由发布方签名（医院另设密钥时须会签），写入不在运行的槽；提交后下次启动试用新映像，签过名才算可用，否则自动退回。
A bundle is written into the slot that does not run; once committed the next start tries it, and goes back to this one by itself
unless it signs.`})
	var commit wire.CommitUpdate
	var cancel wire.CancelUpdate
	var restart wire.RestartForUpdate
	c.AddCommand(
		shown("status", "运行、写好、待启用的映像 (which image runs, and which waits)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.UpdateStatus(ctx) }, printUpdate),
		stageCommand(),
		shown("commit", "提交写好的升级，下次启动生效；须两人 (commit what is staged: the next start tries it)", func(c *cobra.Command) {
			required(c, &commit.SM3, "sm3", "升级包清单的 SM3，与发布方公布的核对 (SM3 of the bundle's manifest)")
			required(c, &commit.Reason, "reason", "原因，记入日志 (why, for the journal)")
			c.Flags().StringArrayVar(&commit.Persons, "confirmed-by", nil, "核对人，给两次，记入日志；登录后不必 (who has compared it, twice; not after a login)")
		}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
			return a.CommitUpdate(ctx, commit)
		}, printOffer("已提交，下次启动试用 (committed)")),
		shown("cancel", "取消写好或已提交而未启动的升级；没有则忘记试过未成的映像 (take it back before it has started, or forget what was left)", func(c *cobra.Command) {
			required(c, &cancel.Reason, "reason", "原因，记入日志 (why, for the journal)")
		}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
			return a.CancelUpdate(ctx, cancel)
		}, printOffer("已取消 (cancelled)")),
		shown("restart", "重新启动设备，启用已提交的升级 (restart the machine into what was committed)", func(c *cobra.Command) {
			required(c, &restart.Reason, "reason", "原因，记入日志 (why, for the journal)")
		}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
			return a.RestartForUpdate(ctx, restart)
		}, printOffer("正在重新启动 (restarting)")),
	)
	return c
}

func stageCommand() *cobra.Command {
	var f adminFlags
	c := &cobra.Command{Use: "stage BUNDLE", Short: "上传升级包，写入不在运行的槽 (send a bundle; nothing starts it yet)", Args: exactArgs(1), RunE: func(c *cobra.Command, args []string) error {
		answer, err := f.send(c.Context(), args[0], (*client.Admin).StageUpdate)
		if err != nil {
			return err
		}
		if f.output == "json" {
			return f.show(answer)
		}
		var o update.Offer
		if err := json.Unmarshal(answer, &o); err != nil {
			return err
		}
		printOffer("已写好，尚未启用 (staged)")(os.Stdout, &o)
		fmt.Printf("下一步 (next): yinjian update commit --dir %s --sm3 %s --reason …\n", f.dir, o.SM3)
		return nil
	}}
	f.add(c)
	return c
}

// send has do send a file, with a bar.
func (f *adminFlags) send(ctx context.Context, name string, do func(a *client.Admin, ctx context.Context, r io.Reader, size int64) (json.RawMessage, error)) (json.RawMessage, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, usageError{fmt.Errorf("%s 不是文件 (is no file)", name)}
	}
	a, err := f.client()
	if err != nil {
		return nil, err
	}
	defer a.Close()
	bar := newProgress(int(info.Size() >> 10))
	answer, err := do(a, ctx, &shownReader{r: file, bar: bar}, info.Size())
	bar.end()
	if err != nil {
		return nil, explain(err)
	}
	return answer, nil
}

// shownReader tells a bar of the KiB that were read.
type shownReader struct {
	r    io.Reader
	bar  *progress
	read int64
}

func (s *shownReader) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	s.bar.add(int((s.read+int64(n))>>10 - s.read>>10))
	s.read += int64(n)
	return n, err
}

func printOffer(what string) func(io.Writer, *update.Offer) {
	return func(w io.Writer, o *update.Offer) {
		t := &columns{to: w}
		fmt.Fprintf(t, "%s\t\n映像 image\t%d（%s）\n清单 SM3\t%s\n说明 notes\t%s\n", what, o.Index, o.Version, o.SM3, o.Manifest.Notes)
		t.flush()
	}
}

func printUpdate(w io.Writer, s *update.Status) {
	t := &columns{to: w}
	state := "可用 good"
	if !s.Good {
		state = "试用中，签过名才算可用 (on trial until it has signed)"
	}
	fmt.Fprintf(t, "运行 runs\t%d（%s），槽 %s，%s\n", s.Running, s.Version, s.Slot, state)
	if s.Behind > 0 {
		fmt.Fprintf(t, "可退回 behind it\t%d\n", s.Behind)
	}
	if s.Staged != nil {
		fmt.Fprintf(t, "写好 staged\t%d（%s），清单 SM3 %s\n", s.Staged.Index, s.Staged.Version, s.Staged.SM3)
	}
	if s.Committed != nil {
		fmt.Fprintf(t, "下次启动 starts next\t%d（%s），清单 SM3 %s\n", s.Committed.Index, s.Committed.Version, s.Committed.SM3)
	}
	if len(s.Failed) > 0 {
		fmt.Fprintf(t, "试过未成 tried, and left\t%s\n", strings.Trim(fmt.Sprint(s.Failed), "[]"))
	}
	if s.Floor > 0 {
		fmt.Fprintf(t, "下限 floor\t%d\n", s.Floor)
	}
	t.flush()
}
