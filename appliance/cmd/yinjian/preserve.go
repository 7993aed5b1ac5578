package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/evidence"
)

func preserveCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "preserve", Short: "存档时间戳：盖出、续盖、状态、导出证据 (archive timestamps: make and renew them, state, export)"})
	c.AddCommand(preserveRunCommand(), preserveStatusCommand(), preserveExportCommand())
	return c
}

// A preserveState is what the appliance says of its archive.
type preserveState struct {
	Records  uint64   `json:"records"`
	Batches  int      `json:"batches"`
	Waiting  uint64   `json:"waiting_entries"`
	Tokens   int      `json:"newest_tokens"`
	Ends     string   `json:"earliest"`
	Due      []string `json:"due"`
	Digest   string   `json:"digest"`
	Progress *struct {
		Doing       string `json:"doing"`
		Done, Total uint64
	} `json:"progress"`
	Error string `json:"error"`
	Off   bool   `json:"off"`
	Unit  string `json:"unit"`
	Every string `json:"every"`
	Lead  string `json:"lead"`
}

var preserveWords = map[string]string{
	"archive": "新记录存档 (archive new records)", "renew": "续盖存档时间戳 (renew archive timestamps)", "rehash": "按新摘要算法重建 (rebuild by another digest)",
}

func preserveRunCommand() *cobra.Command {
	var f adminFlags
	c := &cobra.Command{
		Use: "run", Short: "盖出应盖的存档时间戳，新记录一并存档；中断后重来即可 (make what is due, and archive all new records; may be cut off and run again)", Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			ctx, done := context.WithCancel(c.Context())
			defer done()
			if f.output == "text" {
				go showProgress(ctx, a, os.Stderr)
			}
			answer, err := a.RunPreserve(ctx)
			done()
			if err != nil {
				return explain(err)
			}
			if f.output == "json" {
				return f.show(answer)
			}
			var out struct {
				Batches, Renewed, Rehashed int
				Records                    uint64
			}
			if err := json.Unmarshal(answer, &out); err != nil {
				return err
			}
			fmt.Printf("存档 archived：%d 条记录 records，%d 批 batches；续盖 renewed：%d；重建 rebuilt：%d 批 batches\n", out.Records, out.Batches, out.Renewed, out.Rehashed)
			return nil
		},
	}
	f.add(c)
	return c
}

// showProgress says every two seconds how far the run is.
func showProgress(ctx context.Context, a *client.Admin, w io.Writer) {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		answer, err := a.PreserveStatus(ctx)
		var s preserveState
		if err == nil && json.Unmarshal(answer, &s) == nil && s.Progress != nil && ctx.Err() == nil {
			fmt.Fprintf(w, "%s：%d / %d\n", preserveWords[s.Progress.Doing], s.Progress.Done, s.Progress.Total)
		}
	}
}

func preserveStatusCommand() *cobra.Command {
	return shown("status", "存档到哪里，何时须续 (what is archived, and when it has to be renewed)", nil,
		func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.PreserveStatus(ctx) },
		func(w io.Writer, s *preserveState) {
			fmt.Fprintf(w, "已存档 archived：%d 条记录 records，%d 批 batches；其后日志条目 entries since：%d\n", s.Records, s.Batches, s.Waiting)
			if s.Tokens > 0 {
				fmt.Fprintf(w, "最新的存档时间戳 newest archive timestamps：%d 个，最早于 %s 终止 (the first of them ends then)\n", s.Tokens, s.Ends)
			}
			fmt.Fprintf(w, "单元 unit：%s；摘要 digest：%s；每 %s 一批，提前 %s 续盖 (a batch every, renewed before)\n", s.Unit, s.Digest, s.Every, s.Lead)
			if s.Off {
				fmt.Fprintln(w, "自动存档已关闭 (making them by itself is off)")
			}
			for _, d := range s.Due {
				fmt.Fprintf(w, "应做 due：%s\n", preserveWords[d])
			}
			if s.Progress != nil {
				fmt.Fprintf(w, "正在 doing：%s，%d / %d\n", preserveWords[s.Progress.Doing], s.Progress.Done, s.Progress.Total)
			}
			if s.Error != "" {
				fmt.Fprintf(w, "上次失败 the last run failed：%s\n", s.Error)
			}
		})
}

func preserveExportCommand() *cobra.Command {
	var f adminFlags
	var to string
	c := &cobra.Command{
		Use:   "export ID|DIR",
		Short: "导出一条记录的证据与存档证据记录；或为文件夹里的证据补上最新的存档时间戳 (export a record's evidence; or bring a folder of evidence up to date)",
		Args:  exactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			if st, err := os.Stat(args[0]); err == nil && st.IsDir() {
				return exportFolder(c.Context(), a, args[0])
			} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return exportRecord(c.Context(), a, args[0], filepath.Join(to, args[0]+".json"))
		},
	}
	f.add(c)
	c.Flags().StringVar(&to, "to", ".", "写到的文件夹 (the folder to write to)")
	return c
}

// exportRecord writes a record's evidence and, beside it, its evidence record by itself for other programs.
func exportRecord(ctx context.Context, a *client.Admin, id, name string) error {
	answer, err := a.PreservedRecord(ctx, wire.PreservedRecord{ID: id})
	if err != nil {
		return explain(err)
	}
	b, err := evidence.Parse(answer)
	if err != nil {
		return err
	}
	return writeEvidence(b, name)
}

func writeEvidence(b *evidence.Bundle, name string) error {
	data, err := b.Encode()
	if err != nil {
		return err
	}
	if err := replaceFile(name, data); err != nil {
		return err
	}
	if len(b.EvidenceRecord) == 0 {
		fmt.Printf("%s：尚未存档，请先 yinjian preserve run (not archived yet)\n", name)
		return nil
	}
	fmt.Printf("%s：含存档时间戳 (with archive timestamps)\n", name)
	return replaceFile(strings.TrimSuffix(name, filepath.Ext(name))+".ers", b.EvidenceRecord)
}

// exportFolder gives every *.json of a folder that is evidence of this appliance its newest archive timestamps, and leaves
// everything else in it as it is. Other files are named and left alone.
func exportFolder(ctx context.Context, a *client.Admin, dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return err
	}
	left := 0
	for _, name := range files {
		if err := exportInto(ctx, a, name); err != nil {
			fmt.Printf("%s：未更新 (left alone): %v\n", name, err)
			left++
		}
	}
	if left > 0 {
		return fmt.Errorf("%d 个文件未更新 (files were left alone)", left)
	}
	return nil
}

func exportInto(ctx context.Context, a *client.Admin, name string) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	b, err := evidence.Parse(data)
	if err != nil {
		return err
	}
	answer, err := a.PreservedRecord(ctx, wire.PreservedRecord{ID: b.RecordID})
	if err != nil {
		return explain(err)
	}
	ours, err := evidence.Parse(answer)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(ours.Journal.Leaf, b.Journal.Leaf):
		return errors.New("与本机日志中的这条记录不同 (not the record that this appliance has)")
	case len(ours.EvidenceRecord) == 0:
		return errors.New("尚未存档，请先 yinjian preserve run (not archived yet)")
	}
	return writeEvidence(b.WithRecord(ours.EvidenceRecord), name)
}
