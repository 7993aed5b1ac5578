package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/custody"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

type initOptions struct {
	dir string
	answers
	passphrases [][]byte // of the holders that unlock the PINs, in their order
	firstFD     int      // where the administrators' first passwords are written, as JSON; negative: standard output, for people
}

func initCommand() *cobra.Command {
	o := initOptions{answers: defaultAnswers(), firstFD: -1}
	var file string
	var asked, check bool
	passphraseFD := -1
	c := &cobra.Command{
		Use:   "init --dir DIR",
		Short: "新建一台评估用设备：配置、口令、密码机令牌 (make a new evaluation appliance: configuration, PINs, tokens)",
		Long: `新建一台评估用设备：在空目录中写配置、生成口令、初始化软件密码机的五个令牌（签名人、时间戳、日志、CA、TLS）。
在终端上只给 --dir 即逐项询问，每答一项当即核对，最后列出全部请您确认；--answers 取自应答文件（TOML），无人值守；--check 只核对；
其余参数为评估之用。
密钥与证书在首次 serve、时间可信之后生成，并记入日志。每个目录只能新建一次。
仅供评估：pin_source 为 file 时口令与密文在同一磁盘上，偷盘者两者兼得；为 unlock、tpm 时口令须多人解锁（tpm：封给 TPM 之后由它打开），见 docs/states.md。

Makes a new evaluation appliance in an empty folder, once. With --dir alone on a terminal it asks, and looks at each answer at
once; --answers takes them from a file (TOML). Keys and certificates are made at the first serve, once time is trusted.
Evaluation only: with pin_source "file" PIN files and sealed keys are on one disk, and whoever takes it has both.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			alone := c.Flags().NFlag() == 1
			switch {
			case file != "":
				if o.answers, err = readAnswers(file); err != nil {
					return usageError{err}
				}
			case asked, alone && onTerminal():
				if err := mayInit(o.dir); err != nil {
					return err
				}
				in := bufio.NewReader(interruptible{c.Context(), os.Stdin})
				if err := o.ask(o.dir, in, os.Stdout); err != nil {
					return err
				}
			}
			if err := mayInit(o.dir); err != nil {
				return err
			}
			if err := o.check(o.dir); err != nil {
				return usageError{err}
			}
			if check {
				return nil
			}
			if o.Restore != "" {
				return usageError{fmt.Errorf("restore：要由备份恢复的，把应答文件作为 answers.toml 放在目录里，由 serve 等待备份，不用 init (these answers are for a serve that waits for a backup: put them into its folder as %s)", appliance.AnswersFile)}
			}
			if o.locked() {
				if o.passphrases, err = readPassphrases(c.Context(), passphraseFD, o.Unlock.Holders, true); err != nil {
					return err
				}
			}
			return runInit(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.dir, "dir", "", "设备目录，须为空或不存在 (folder, empty or absent)")
	f.StringVar(&file, "answers", "", "应答文件 TOML，见 docs/states.md (file with the answers)")
	f.BoolVar(&check, "check", false, "只核对应答，什么也不写 (look at the answers alone, write nothing)")
	f.BoolVar(&asked, "ask", false, "逐项询问，即使标准输入不是终端 (ask, even where standard input is no terminal)")
	f.IntVar(&passphraseFD, "passphrase-fd", -1, "从该文件描述符读持有人口令，每行一个 (read the holders' passphrases from this file descriptor, a line each)")
	f.IntVar(&o.firstFD, "first-passwords-fd", -1, "首批管理员的一次性口令写到该文件描述符（JSON），不显示 (write the administrators' one-time passwords to this file descriptor, as JSON)")
	f.StringVar(&o.Node, "node", o.Node, "节点名，写入全部证据，以后不可改 (name of this node, for ever)")
	f.StringVar(&o.Campus, "campus", o.Campus, "院区 (campus)")
	f.StringVar(&o.Module, "module", "", "PKCS#11 模块；缺省为程序旁的 libyinjian-p11.so (default: beside this program)")
	f.StringVar(&o.Listen, "listen", o.Listen, "API 地址 (address of the API)")
	f.StringVar(&o.TSAPlain, "tsa-plain", "", "明文时间戳地址，仅回环 (plain timestamp listener, loopback only)")
	f.StringArrayVar(&o.TimeSources, "time-source", nil, "NTP 源 host:port，可重复；共用天线者请之后在配置里写同一 group (NTP server, repeatable)")
	f.BoolVar(&o.SimulatedBeidou, "simulated-beidou", false, "用模拟北斗作时间源，仅供演示 (simulated BeiDou source, demonstration only)")
	_ = c.MarkFlagRequired("dir")
	for _, name := range []string{"ask", "node", "campus", "module", "listen", "tsa-plain", "time-source", "simulated-beidou"} {
		c.MarkFlagsMutuallyExclusive("answers", name)
	}
	return c
}

// mayInit refuses a folder that is, or was to be, an appliance's.
func mayInit(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, appliance.InitUnfinished)); err == nil {
		return usageError{fmt.Errorf("%s: 上次 init 没有完成；请删除该目录后重试 (init was interrupted; remove the folder and try again)", dir)}
	}
	if _, err := os.Stat(dir); err == nil && !appliance.Blank(dir) {
		return usageError{fmt.Errorf("%s 不是空目录；不会覆盖已有设备 (folder is not empty; an appliance is never overwritten)", dir)}
	}
	return nil
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
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	module, err := o.module()
	if err != nil {
		return err
	}
	// 1. Configuration, checked by the code that will read it, before anything is written.
	b, cfg, err := o.file(module, dir)
	if err != nil {
		return usageError{err}
	}
	if err := mayInit(dir); err != nil { // again: another may have made it while the passphrases were typed
		return err
	}
	waiting := appliance.Blank(dir) // a folder that is there, perhaps with a process that waits in it
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// A power cut leaves this mark, and nobody takes the half for an appliance. There is one at a time who makes it.
	mark, err := os.OpenFile(filepath.Join(dir, appliance.InitUnfinished), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := mark.Close(); err != nil {
		return err
	}
	defer func() {
		if err != nil { // a half-made appliance has signed nothing; what stays behind would only be in the way
			made := []string{"config.toml", "secrets", "softtoken", appliance.InitUnfinished}
			if !waiting {
				made = append(made, "run")
			}
			for _, name := range made {
				err = errors.Join(err, os.RemoveAll(filepath.Join(dir, name)))
			}
		}
	}()
	folders := []string{dir, filepath.Join(dir, "secrets"), filepath.Join(dir, "run")}
	if cfg.Evaluation.Softtoken {
		folders = append(folders, filepath.Join(dir, "softtoken"))
	}
	for _, d := range folders {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	// 2. Secrets. Each slot class has its own PIN; the SO PINs are for PIN resets. What people unlock is on no disk in the clear.
	pins := map[string][]byte{}
	defer func() {
		for _, pin := range pins {
			clear(pin)
		}
	}()
	secret := func(name string, value []byte) error {
		return os.WriteFile(filepath.Join(dir, "secrets", name), append(value, '\n'), 0o600)
	}
	if cfg.Evaluation.Softtoken {
		for _, class := range hsm.Classes {
			pins[appliance.PINName(appliance.FirstMachine, class)], pins[soPINName(appliance.FirstMachine, class)] = newSecret(), newSecret()
		}
		if err := secret("softtoken.passphrase", newSecret()); err != nil {
			return err
		}
	} else if o.locked() {
		for class := range cfg.HSM.Slots {
			pins[appliance.PINName(appliance.FirstMachine, hsm.SlotClass(class))] = []byte(strings.TrimSpace(o.Secrets[class+".pin"]))
		}
	}
	for name, text := range o.Secrets {
		if !cfg.Evaluation.Softtoken && o.locked() && slices.ContainsFunc(hsm.Classes, func(c hsm.SlotClass) bool { return name == string(c)+".pin" }) {
			continue // sealed below, and on no disk in the clear
		}
		if err := secret(name, []byte(strings.TrimRight(text, "\r\n"))); err != nil {
			return err
		}
	}
	if o.locked() {
		locked, err := custody.LockPINs(pins, o.Unlock.Holders, o.passphrases, o.Unlock.Threshold)
		if err == nil {
			err = appliance.WriteLockedPINs(dir, locked)
		}
		if err != nil {
			return err
		}
	} else if cfg.Evaluation.Softtoken {
		for _, class := range hsm.Classes {
			err := errors.Join(secret(string(class)+".pin", bytes.Clone(pins[appliance.PINName(appliance.FirstMachine, class)])),
				secret(string(class)+".so-pin", bytes.Clone(pins[soPINName(appliance.FirstMachine, class)])))
			if err != nil {
				return err
			}
		}
	}
	three, first := o.firstAdministrators()
	if len(three) > 0 {
		if err := appliance.WriteFirstAdministrators(dir, three); err != nil {
			return err
		}
	}
	head := "# 印鉴配置。各项含义见 docs/configuration.md；未知的键会被拒绝。Unknown keys are errors.\n"
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), append([]byte(head), b...), 0o600); err != nil {
		return err
	}

	// 3. Tokens, through PKCS#11 like any machine's. Those of another machine its maker's tools have made.
	if cfg.Evaluation.Softtoken {
		if err := provision(ctx, dir, module, pins); err != nil {
			return fmt.Errorf("初始化令牌 (initialising tokens): %w", err)
		}
	}
	// Without the mark it counts: first all of it is on the disk, or a power cut would leave files without content.
	if err := syncAll(dir); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, appliance.InitUnfinished)); err != nil {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	fmt.Printf("已新建 (made): %s\n节点 node: %s  院区 campus: %s\n下一步 next: yinjian serve --dir %s\n", dir, o.Node, o.Campus, o.dir)
	return tellFirst(o.firstFD, first)
}

// tellFirst says the first passwords, once: they are kept nowhere.
func tellFirst(fd int, first []wire.FirstPassword) error {
	if len(first) == 0 {
		return nil
	}
	if fd >= 0 {
		f := os.NewFile(uintptr(fd), "first passwords")
		if f == nil {
			return usageError{fmt.Errorf("--first-passwords-fd %d：不是打开的文件 (is no open file)", fd)}
		}
		return errors.Join(json.NewEncoder(f).Encode(first), f.Close())
	}
	fmt.Println("\n首批管理员的一次性口令，只显示这一次，首次登录须更改，请分别交给本人 (one-time passwords, shown once; each is changed at the first login):")
	for _, p := range first {
		fmt.Printf("  %s  %s  %s  %s\n", p.Role, p.ID, p.Name, p.Password)
	}
	return nil
}

// syncAll returns when all of the file system that dir is on stands on its disk.
func syncAll(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("syncfs %s: %w", dir, err)
	}
	return nil
}

// newSecret draws 128 bits, as hexadecimal digits.
func newSecret() []byte {
	var b [16]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return hex.AppendEncode(nil, b[:])
}

// soPINName names the SO PIN of a slot's token among the locked PINs.
func soPINName(machine string, class hsm.SlotClass) string {
	return appliance.PINName(machine, class) + ".so"
}

// provision runs the software cipher machine for as long as its tokens are made.
func provision(ctx context.Context, dir, module string, pins map[string][]byte) (err error) {
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
	if err := appliance.WaitForSocket(ctx, appliance.SofttokenSocket(dir), time.Minute); err != nil {
		return err
	}
	for _, class := range hsm.Classes {
		_, err := pkcs11.Provision(pkcs11.ProvisionConfig{
			Module: module, ModuleArgs: "socket='" + appliance.SofttokenSocket(dir) + "'", Slot: pkcs11.AnySlot,
			Label: "yinjian-" + string(class),
			SOPIN: pins[soPINName(appliance.FirstMachine, class)], UserPIN: pins[appliance.PINName(appliance.FirstMachine, class)],
		})
		if err != nil {
			return fmt.Errorf("%s: %w", class, err)
		}
	}
	return nil
}

func serveCommand() *cobra.Command {
	var dir, profile string
	var verbose, once bool
	var service, trial, reach time.Duration
	c := &cobra.Command{
		Use:   "serve --dir DIR",
		Short: "运行设备，直到收到停止信号 (run the appliance until it is told to stop)",
		Long: `运行设备，直到收到停止信号。空目录则等待初始化（yinjian init），口令未解锁则等待持有人（yinjian unlock），启动失败则说明原因、能自行
排除的自行再试；各状态见 docs/states.md。配置有误（未知的键、读不出的文件、权限过宽）立即结束；--once 时启动失败也立即结束。
退出码 75：为采用另一份设置而结束（yinjian settings），由服务管理器再启动 (ends to be started again with other settings)。

Runs the appliance until it is told to stop. An empty folder waits for init, locked PINs wait for their holders, and a start
that fails says why and is tried again where that may help. It ends at once when the configuration is wrong; with --once also
when the start fails.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			level := logrus.InfoLevel
			if verbose {
				level = logrus.DebugLevel
			}
			log := newLog(level)
			if profile != "" {
				go profileOnSignal(c.Context(), profile+"-cpu.prof", log)
			}
			return serve(c.Context(), dir, once, service, trial, reach, log)
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "设备目录 (folder)")
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "调试日志 (debug log)")
	c.Flags().BoolVar(&once, "once", false, "启动失败即结束，不等待、不再试 (end when the start fails)")
	c.Flags().StringVar(&profile, "profile", "", "测量用：SIGUSR1 开始与结束处理器剖面 (for bench: SIGUSR1 begins and ends a processor profile)")
	_ = c.Flags().MarkHidden("profile")
	c.Flags().DurationVar(&service, "service-time", 0, "测量用：软件密码机每次签名至少耗时 (for bench: least time of a signature in the software cipher machine)")
	_ = c.Flags().MarkHidden("service-time")
	c.Flags().DurationVar(&trial, "settings-trial", 0, "试验用：新设置的启动至多多久 (for tests: how long a start with new settings may take)")
	c.Flags().DurationVar(&reach, "settings-confirm", 0, "试验用：新设置须在多久内确认 (for tests: how long until new settings have to be confirmed)")
	_ = c.Flags().MarkHidden("settings-trial")
	_ = c.Flags().MarkHidden("settings-confirm")
	_ = c.MarkFlagRequired("dir")
	return c
}
