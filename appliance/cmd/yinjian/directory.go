package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/account"
)

func directoryCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "directory", Short: "两院区共用的目录：版本、等待、冻结 (the directory that two campuses share: versions, what waits, what is frozen)"})
	c.AddCommand(
		shown("status", "目录是否与对端一致、多旧、什么在等待或已冻结 (whether it agrees with the other campus, how old the copy is, what waits or is frozen)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.DirectoryStatus(ctx) }, printDirectory),
		shown("versions", "每个对象现在的版本，由谁所定 (each object's present version, and whose it is)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.DirectoryVersions(ctx) }, printVersions),
		directorySkipCommand(),
		directoryThawCommand(),
	)
	return c
}

func directorySkipCommand() *cobra.Command {
	var req wire.SkipVersions
	return adminCommand("skip", "越过中心库里没有对应变更的版本，两院区日志都会记载 (go past versions that the central database has and no journal; both journals will say so)", 0, func(c *cobra.Command) {
		required(c, &req.Kind, "kind", "对象类型：application、signer、certificate、anchor、intermediates (kind of object)")
		required(c, &req.ID, "id", "对象标识，见 directory status (its id)")
		required(c, &req.Reason, "reason", "理由 (why)")
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		return a.SkipVersions(ctx, req)
	})
}

func directoryThawCommand() *cobra.Command {
	var req wire.ThawObject
	return adminCommand("thaw", "结束一个对象的分叉：两院区都以本机的内容为准，且为停用，之后照常启用 (put an end to a fork: the object becomes what it is here, stopped, at both campuses; start it again as usual)", 0, func(c *cobra.Command) {
		required(c, &req.Kind, "kind", "对象类型：application、signer、certificate、anchor、intermediates (kind of object)")
		required(c, &req.ID, "id", "对象标识，见 directory status (its id)")
		required(c, &req.Reason, "reason", "理由 (why)")
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		return a.ThawObject(ctx, req)
	})
}

func printDirectory(w io.Writer, s *wire.DirectoryStatus) {
	if s.Peer == "" {
		fmt.Fprintln(w, "对端 peer:     无，本机独自管理目录 (none)")
	} else {
		fmt.Fprintf(w, "对端 peer:     %s\n", s.Peer)
		age := (time.Duration(s.AgeMS) * time.Millisecond).Round(time.Second).String()
		if s.Stale {
			age += "，过旧，拒绝签名 (too old: signing is refused)"
		}
		fmt.Fprintf(w, "副本 copy:     %s 前为最新 (up to date that long ago)\n", age)
	}
	if s.Centre != "" {
		fmt.Fprintln(w, "中心 centre:  ", s.Centre)
	}
	fmt.Fprintf(w, "对象 objects:  %d\n", s.Objects)
	list := func(title string, of []string) {
		if len(of) == 0 {
			return
		}
		fmt.Fprintln(w, title)
		for _, one := range of {
			fmt.Fprintln(w, "  ！", one)
		}
	}
	list("已冻结，两院区不一致 (frozen: the campuses do not agree):", s.Frozen)
	list("缺少一个版本 (a version is missing):", s.Waiting)
	list("待中心库裁决 (waiting for the central database):", s.Open)
	if len(s.Blocked) > 0 {
		fmt.Fprintln(w, "中心库已有而日志未到的版本；若对端查无此变更，在署名设备上用 directory skip (versions that the central database has and no journal yet):")
	}
	for _, b := range s.Blocked {
		fmt.Fprintf(w, "  ！ %s %s：第 %d 版起，至第 %d 版，署名 %s，%s (from version %d to %d, in the name of %s)\n", b.Kind, b.ID, b.Version, b.Latest, b.Node, b.At.Format(time.RFC3339), b.Version, b.Latest, b.Node)
	}
}

func printVersions(w io.Writer, all *struct{ Objects []account.ObjectVersion }) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "类型 kind\t标识 id\t版本 version\t设备 node\t时间 at\t状态 state")
	for _, o := range all.Objects {
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\n", o.Kind, o.ID, o.Version, o.Node, o.At.Format(time.RFC3339), o.State)
	}
	t.Flush()
}
