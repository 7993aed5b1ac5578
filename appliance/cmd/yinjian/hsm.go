package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/probe"
	"yinjian/hsm/worker"
)

// What `hsm probe` exits with beside 0, 1 and 2.
const (
	exitNoProfile = 3
	exitAmbiguous = 4
	exitCrashed   = 5
	exitHung      = 6
	exitPIN       = 7
)

// exitError ends the command with a code of its own; what it is about was printed.
type exitError struct {
	error
	code int
}

func hsmCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "hsm", Short: "密码机：探测、添加、停用、列出，密钥清单与销毁 (cipher machines, and their keys)"})
	c.AddCommand(probeCommand(), probedCommand(), keysCommand(), destroyKeyCommand())
	c.AddCommand(machineCommands()...)
	return c
}

// machineCommands change which cipher machines the running appliance uses.
func machineCommands() []*cobra.Command {
	var reason string
	var force bool
	because := func(c *cobra.Command) { required(c, &reason, "reason", "原因，记入日志 (why, for the journal)") }
	forced := func(c *cobra.Command) {
		because(c)
		c.Flags().BoolVar(&force, "force", false, "即使有密钥仅在其中、因而不能再用 (although keys that are nowhere else cannot be used then)")
	}
	change := func(act, short string, flags func(*cobra.Command)) *cobra.Command {
		return adminCommand(act+" NAME", short, 1, flags, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			return a.ChangeMachine(ctx, act, wire.ChangeMachine{Name: args[0], Reason: reason, Force: force})
		})
	}
	return []*cobra.Command{
		adminCommand("list", "列出密码机及其状态 (list them, and how they are)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListMachines(ctx)
		}),
		adminCommand("add FILE", "添加密码机，不必重启；FILE 为 TOML，键同 [[hsm.machines]] (add one while the appliance runs)", 1, because,
			func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
				b, err := os.ReadFile(args[0])
				if err != nil {
					return nil, err
				}
				return a.AddMachine(ctx, wire.AddMachine{File: b, Reason: reason})
			}),
		change("drain", "停止派给新的运算，在途的做完 (give it nothing new)", forced),
		change("resume", "恢复派给运算 (give it work again)", because),
		change("remove", "移除：做完在途运算，结束其工作进程 (take it out)", forced),
	}
}

func probeCommand() *cobra.Command {
	var cfg pkcs11.ProbeConfig
	var slot, pinFile, output string
	var deadline time.Duration
	c := &cobra.Command{
		Use: "probe", Short: "探测一台密码机：身份、机制、相符的档案、编码、会话、速度、行为 (learn what a cipher machine can do)", Args: exactArgs(0),
		Long: `探测一台密码机，并说明哪一份厂商档案与它相符。模块在子进程中运行：崩溃或不返回也是一项结果。
用一次性密钥试签，由 gmsm 验证；令牌上已有的密钥不动。口令提交一次；被接受之后，为看重复登录的返回值再用一次。
不给 --pin-file 时只看身份与机制。

Learns what a cipher machine can do and which vendor profile fits it. The module runs in a process of its own: that it
crashes or does not return is a result too. Throw-away keys are signed with, gmsm verifies; keys on the token are left alone.
The PIN is presented once, and once more, to see the answer to a second login, after it was accepted.

退出码 exit codes: 0 已探测 (probed)；1 未能探测 (nothing learnt)；2 用法错误 (misused)；3 没有档案相符 (no profile fits)；
4 有歧义 (ambiguous)；5 模块崩溃 (it crashed)；6 模块未返回 (it did not return)；7 口令未被接受或未提交 (the PIN was not accepted, or not presented)。`,
		RunE: func(c *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError{fmt.Errorf("-o %s：须为 text 或 json (must be text or json)", output)}
			}
			if slot != "" {
				n, err := strconv.ParseUint(slot, 0, 64)
				if err != nil {
					return usageError{fmt.Errorf("--slot %s：须为数 (must be a number)", slot)}
				}
				id := uint(n)
				cfg.Slot = &id
			}
			if cfg.MaxSessions < 1 || cfg.MaxSessions > 4096 || cfg.Measure <= 0 || deadline <= 0 {
				return usageError{errors.New("--max-sessions 须为 1–4096，--measure、--deadline 须为正 (1 to 4096 sessions; positive times)")}
			}
			var err error
			if cfg.Module, err = filepath.Abs(cfg.Module); err != nil {
				return err
			}
			for _, name := range cfg.Profiles {
				if _, err := profiles.Load(name); err != nil {
					return usageError{err}
				}
			}
			if pinFile != "" {
				if cfg.PIN, err = appliance.ReadSecret(pinFile); err != nil {
					return err
				}
				defer clear(cfg.PIN)
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			report, err := probe.Run(c.Context(), probe.Config{Command: []string{self, "hsm", "probed"}, Probe: cfg, Deadline: deadline})
			if err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(os.Stdout)
				enc.SetIndent("", "  ")
				enc.SetEscapeHTML(false)
				err = enc.Encode(report)
			} else {
				probe.Print(os.Stdout, report)
			}
			return errors.Join(err, probeOutcome(report, len(cfg.PIN) > 0))
		},
	}
	f := c.Flags()
	required(c, &cfg.Module, "module", "厂商的 PKCS#11 模块 (the vendor's PKCS#11 module)")
	f.StringVar(&cfg.ModuleArgs, "module-args", "", "C_Initialize 的 pReserved，例如 socket='…' (passed to C_Initialize)")
	f.StringVar(&cfg.TokenLabel, "token-label", "", "令牌标签；只有一个已初始化的令牌时可省 (not needed where one token is initialised)")
	f.StringVar(&slot, "slot", "", "槽位号 CK_SLOT_ID，代替标签 (in place of the label)")
	f.StringVar(&pinFile, "pin-file", "", "用户口令文件，权限 600；不给则只看身份与机制 (the user PIN; without it identity and mechanisms alone)")
	f.StringArrayVar(&cfg.Profiles, "profile", nil, "只试这份档案，名称或文件，可重复；缺省试全部随附档案 (try this profile alone, may be repeated; default: all shipped)")
	f.IntVar(&cfg.MaxSessions, "max-sessions", 256, "至多打开几个会话 (sessions opened at most)")
	f.DurationVar(&cfg.Measure, "measure", 500*time.Millisecond, "测速每一步的时长 (how long each step of the measurement lasts)")
	f.DurationVar(&deadline, "deadline", 15*time.Second, "每次调用的期限 (for each call into the module)")
	f.StringVarP(&output, "output", "o", "text", "text 或 json (text or json)")
	c.MarkFlagsMutuallyExclusive("token-label", "slot")
	return c
}

// probeOutcome is what the command exits with.
func probeOutcome(r *pkcs11.ProbeReport, hadPIN bool) error {
	switch {
	case r.Crashed != nil:
		return exitError{fmt.Errorf("模块在 %s 中崩溃 (crashed in): %s", r.Crashed.Function, r.Crashed.Signal), exitCrashed}
	case r.Hung != nil:
		return exitError{fmt.Errorf("模块 %.0f 秒内未从 %s 返回 (did not return in time)", r.Hung.Seconds, r.Hung.Function), exitHung}
	case r.Verdict == pkcs11.VerdictAmbiguous:
		return exitError{errors.New("有歧义，没有选定档案 (ambiguous: no profile was chosen)"), exitAmbiguous}
	case r.Verdict == pkcs11.VerdictNone:
		return exitError{errors.New("没有档案相符；怎样写一份见 docs/hsm.md (no profile fits; docs/hsm.md tells how to write one)"), exitNoProfile}
	case hadPIN && r.Login != "accepted" && r.Login != "not needed":
		return exitError{fmt.Errorf("口令未被接受或未提交：%s (the PIN was not accepted, or not presented)", r.Login), exitPIN}
	}
	return nil
}

// probedCommand drives the module that is probed; `hsm probe` starts it, nobody else does.
func probedCommand() *cobra.Command {
	return &cobra.Command{
		Use: "probed", Hidden: true, Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			signal.Ignore(os.Interrupt, syscall.SIGTERM) // they reach the whole group; the parent decides
			conn, err := worker.Inherited()
			if err != nil {
				return usageError{err}
			}
			return probe.Serve(conn)
		},
	}
}
