package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/appliance"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

type initOptions struct {
	dir, node, campus string
	module            string
	api, tsaPlain     string
	feed              bool
	sources           []string // host:port of NTP servers, each a group of its own
}

func initCommand() *cobra.Command {
	var o initOptions
	c := &cobra.Command{
		Use:   "init --dir DIR",
		Short: "新建一台评估用设备：配置、口令、密码机令牌 (make a new evaluation appliance: configuration, PINs, tokens)",
		Long: `新建一台评估用设备：在空目录中写配置、生成口令文件、初始化软件密码机的五个令牌（签名人、时间戳、日志、CA、TLS）。
密钥与证书在首次 serve、时间可信之后生成，并记入日志。仅供评估：口令与密文在同一磁盘上，偷盘者两者兼得。

Makes a new evaluation appliance in an empty folder. Keys and certificates are made at the first serve, once time is
trusted. Evaluation only: PIN files and sealed keys are on one disk, and whoever takes it has both.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error { return runInit(c.Context(), o) },
	}
	f := c.Flags()
	f.StringVar(&o.dir, "dir", "", "设备目录，须为空或不存在 (folder, empty or absent)")
	f.StringVar(&o.node, "node", "benbu-1", "节点名，写入全部证据，以后不可改 (name of this node, for ever)")
	f.StringVar(&o.campus, "campus", "本部", "院区 (campus)")
	f.StringVar(&o.module, "module", "", "PKCS#11 模块；缺省为程序旁的 libyinjian-p11.so (default: beside this program)")
	f.StringVar(&o.api, "listen", "127.0.0.1:0", "API 地址 (address of the API)")
	f.StringVar(&o.tsaPlain, "tsa-plain", "", "明文时间戳地址，仅回环 (plain timestamp listener, loopback only)")
	f.StringArrayVar(&o.sources, "time-source", nil, "NTP 源 host:port，可重复；共用天线者请之后在配置里写同一 group (NTP server, repeatable)")
	f.BoolVar(&o.feed, "simulated-beidou", false, "用模拟北斗作时间源，仅供演示 (simulated BeiDou source, demonstration only)")
	_ = c.MarkFlagRequired("dir")
	return c
}

// time is the policy for the sources given. Two groups have to agree where there are two.
func (o initOptions) time() appliance.Time {
	t := appliance.Time{
		MinSources: min(2, max(1, len(o.sources))), Accuracy: appliance.Duration(time.Second),
		HoldoverMax: appliance.Duration(4 * time.Hour), Poll: appliance.Duration(16 * time.Second),
	}
	for i, address := range o.sources {
		name := fmt.Sprintf("ntp%d", i+1)
		t.Sources = append(t.Sources, appliance.TimeSource{Name: name, Group: name, Address: address})
	}
	t.PolicyNote = fmt.Sprintf("min_sources=%d", t.MinSources)
	if o.feed {
		t.Poll = appliance.Duration(2 * time.Second)
		t.PolicyNote += "；仅评估：时间为本机自身时间，经模拟北斗信号、gpsd、chrony 送回 (evaluation: this is the machine's own time, fed back through a simulated BeiDou signal, gpsd and chrony)"
	}
	return t
}

// defaultModule is the module beside this program.
func defaultModule() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	m := filepath.Join(filepath.Dir(self), "libyinjian-p11.so")
	if _, err := os.Stat(m); err != nil {
		return "", fmt.Errorf("找不到 %s：请先 make build，或用 --module 指明 (module not found: make build first, or give --module)", m)
	}
	return m, nil
}

func runInit(ctx context.Context, o initOptions) (err error) {
	if _, err := os.Stat(filepath.Join(o.dir, appliance.InitUnfinished)); err == nil {
		return usageError{fmt.Errorf("%s: 上次 init 没有完成；请删除该目录后重试 (init was interrupted; remove the folder and try again)", o.dir)}
	}
	if entries, err := os.ReadDir(o.dir); err == nil && len(entries) > 0 {
		return usageError{fmt.Errorf("%s 不是空目录；不会覆盖已有设备 (folder is not empty; an appliance is never overwritten)", o.dir)}
	}
	module := o.module
	if module == "" {
		if module, err = defaultModule(); err != nil {
			return err
		}
	}
	if module, err = filepath.Abs(module); err != nil {
		return err
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	// 1. Configuration, checked by the code that will read it, before anything is written.
	slots := map[string]appliance.Slot{}
	for _, class := range hsm.Classes {
		slots[string(class)] = appliance.Slot{TokenLabel: "yinjian-" + string(class), PINFile: "secrets/" + string(class) + ".pin", Sessions: 8}
	}
	cfg := appliance.Config{
		Node: o.node, Campus: o.campus,
		Listen:     appliance.Listen{API: o.api, TSAPlain: o.tsaPlain},
		HSM:        appliance.HSM{Module: module, Profile: "neutral", Slots: slots, CallDeadline: appliance.Duration(5 * time.Second)},
		Evaluation: appliance.Evaluation{Softtoken: true, GNSSFeed: o.feed},
		Time:       o.time(),
		Policy:     appliance.Policy{ReserveBytes: 256 << 20, TSAReservePercent: 2, SegmentEntries: 1_000_000, MaxBodyBytes: 16 << 20},
	}
	b, err := toml.Marshal(cfg)
	if err != nil {
		return err
	}
	if _, err := appliance.ParseConfig(b, dir); err != nil {
		return usageError{err}
	}
	defer func() {
		if err != nil { // a half-made appliance has signed nothing; what stays behind would only be in the way
			for _, name := range []string{"config.toml", "secrets", "run", "softtoken", appliance.InitUnfinished} {
				err = errors.Join(err, os.RemoveAll(filepath.Join(dir, name)))
			}
		}
	}()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// A power cut leaves this mark, and nobody takes the half for an appliance.
	if err := os.WriteFile(filepath.Join(dir, appliance.InitUnfinished), nil, 0o600); err != nil {
		return err
	}
	for _, d := range []string{dir, filepath.Join(dir, "secrets"), filepath.Join(dir, "run"), filepath.Join(dir, "softtoken")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	// 2. Secrets. Each slot class has its own PIN; the SO PINs are for PIN resets.
	secret := func(name string) error {
		var b [16]byte
		if _, err := rand.Read(b[:]); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "secrets", name), []byte(hex.EncodeToString(b[:])+"\n"), 0o600)
	}
	names := []string{"softtoken.passphrase"}
	for _, class := range hsm.Classes {
		names = append(names, string(class)+".pin", string(class)+".so-pin")
	}
	for _, n := range names {
		if err := secret(n); err != nil {
			return err
		}
	}
	head := "# 印鉴配置。各项含义见 docs/configuration.md；未知的键会被拒绝。Unknown keys are errors.\n"
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), append([]byte(head), b...), 0o600); err != nil {
		return err
	}

	// 3. Tokens, through PKCS#11 like any machine's.
	if err := provision(ctx, dir, module); err != nil {
		return fmt.Errorf("初始化令牌 (initialising tokens): %w", err)
	}
	if err := os.Remove(filepath.Join(dir, appliance.InitUnfinished)); err != nil {
		return err
	}
	fmt.Printf("已新建 (made): %s\n节点 node: %s  院区 campus: %s\n下一步 next: yinjian serve --dir %s\n", dir, o.node, o.campus, o.dir)
	return nil
}

// provision runs the software cipher machine for as long as its tokens are made.
func provision(ctx context.Context, dir, module string) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "softtoken", "--dir", dir)
	said := new(bytes.Buffer) // shown when something goes wrong
	cmd.Stderr = said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = stdin.Close() // the daemon stops when its parent's pipe ends
		_ = cmd.Wait()    // its exit says nothing that we do not know
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, said)
		}
	}()
	if err := appliance.WaitForSocket(ctx, appliance.SofttokenSocket(dir), 20*time.Second); err != nil {
		return err
	}
	for _, class := range hsm.Classes {
		so, err1 := appliance.ReadSecret(filepath.Join(dir, "secrets", string(class)+".so-pin"))
		pin, err2 := appliance.ReadSecret(filepath.Join(dir, "secrets", string(class)+".pin"))
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		_, err := pkcs11.Provision(pkcs11.ProvisionConfig{
			Module: module, ModuleArgs: "socket='" + appliance.SofttokenSocket(dir) + "'", Slot: pkcs11.AnySlot,
			Label: "yinjian-" + string(class), SOPIN: so, UserPIN: pin,
		})
		clear(so)
		clear(pin)
		if err != nil {
			return fmt.Errorf("%s: %w", class, err)
		}
	}
	return nil
}

func serveCommand() *cobra.Command {
	var dir, profile string
	var verbose bool
	c := &cobra.Command{
		Use:   "serve --dir DIR",
		Short: "运行设备，直到收到停止信号 (run the appliance until it is told to stop)",
		Args:  exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			level := logrus.InfoLevel
			if verbose {
				level = logrus.DebugLevel
			}
			log := newLog(level)
			if profile != "" {
				go profileOnSignal(c.Context(), profile+"-cpu.prof", log)
			}
			return serve(c.Context(), dir, log)
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "设备目录 (folder)")
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "调试日志 (debug log)")
	c.Flags().StringVar(&profile, "profile", "", "测量用：SIGUSR1 开始与结束处理器剖面 (for bench: SIGUSR1 begins and ends a processor profile)")
	_ = c.Flags().MarkHidden("profile")
	_ = c.MarkFlagRequired("dir")
	return c
}
