package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/custody"
	"yinjian/hsm"
)

// readPassphrases reads one passphrase for each of the people: from the file descriptor, a line each, or, with fd negative,
// from the terminal, which does not show them; new ones are asked for twice there. Never from arguments or the environment,
// which other processes see. The caller wipes them.
func readPassphrases(fd int, people []string, fresh bool) ([][]byte, error) {
	var out [][]byte
	if fd >= 0 {
		f := os.NewFile(uintptr(fd), "passphrases")
		if f == nil {
			return nil, usageError{fmt.Errorf("--passphrase-fd %d：不是打开的文件 (is no open file)", fd)}
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, 64<<10))
		if err != nil {
			return nil, fmt.Errorf("--passphrase-fd %d: %w", fd, err)
		}
		for line := range bytes.Lines(b) {
			out = append(out, bytes.TrimRight(line, "\r\n"))
		}
		if len(out) != len(people) {
			return nil, usageError{fmt.Errorf("--passphrase-fd %d：需要 %d 行，给出 %d 行 (want %d lines, got %d)", fd, len(people), len(out), len(people), len(out))}
		}
		return out, nil
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return nil, usageError{errors.New("标准输入不是终端：用 --passphrase-fd N 给出口令 (standard input is no terminal: give --passphrase-fd N)")}
	}
	ask := func(prompt string) ([]byte, error) {
		fmt.Fprintf(os.Stderr, "%s: ", prompt)
		p, err := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(os.Stderr)
		return p, err
	}
	for _, name := range people {
		for {
			p, err := ask(name + " 的口令 (passphrase)")
			if err != nil {
				return nil, err
			}
			if !fresh {
				out = append(out, p)
				break
			}
			if err := custody.CheckPassphrase(p); err != nil {
				fmt.Fprintf(os.Stderr, "  ✗ %v\n", err)
				continue
			}
			again, err := ask(name + " 再输一次 (again)")
			if err != nil {
				return nil, err
			}
			if bytes.Equal(p, again) {
				out = append(out, p)
				break
			}
			fmt.Fprintln(os.Stderr, "  ✗ 两次不同 (they differ)")
		}
	}
	return out, nil
}

func wipeAll(secrets [][]byte) {
	for _, s := range secrets {
		clear(s)
	}
}

// provisionBy runs init as a child: making tokens loads a vendor's module, which this process does not. Answers and
// passphrases go through pipes.
func provisionBy(ctx context.Context, self, dir string, answers []byte, passphrases []string) error {
	// The child reads the answers first, and whole.
	a, err := pipeOf(answers)
	if err != nil {
		return err
	}
	defer a.Close()
	p, err := pipeOf([]byte(strings.Join(append(slices.Clone(passphrases), ""), "\n")))
	if err != nil {
		return err
	}
	defer p.Close()
	cmd := exec.CommandContext(ctx, self, "init", "--dir", dir, "--answers", "/dev/fd/3", "--passphrase-fd", "4")
	cmd.ExtraFiles = []*os.File{a, p}
	said := new(bytes.Buffer)
	cmd.Stderr = said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // killed it would leave a half that only a person removes
	cmd.WaitDelay = time.Minute
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s", strings.TrimSpace(said.String()))
	}
	return nil
}

// pipeOf is a pipe that holds data, which must fit into it.
func pipeOf(data []byte) (*os.File, error) {
	const most = 32 << 10 // Linux: 64 KiB
	if len(data) > most {
		return nil, fmt.Errorf("超过 %d 字节 (longer than %d bytes)", most, most)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_, err = w.Write(data)
	if err = errors.Join(err, w.Close()); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func startCommand() *cobra.Command {
	return adminCommand("start", "再试一次失败的启动 (try a start that failed again, now)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		return a.RetryStart(ctx)
	})
}

func provisionCommand() *cobra.Command {
	var file string
	fd := -1
	c := adminCommand("provision", "由运行中的 serve 以应答文件初始化空目录 (have a running serve make its empty folder an appliance)", 0, func(c *cobra.Command) {
		required(c, &file, "answers", "应答文件 TOML (file with the answers)")
		c.Flags().IntVar(&fd, "passphrase-fd", -1, "从该文件描述符读持有人口令，每行一个 (read the holders' passphrases from this file descriptor, a line each)")
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		said, err := readAnswers(file) // what is wrong with the file is told before anything is asked
		if err != nil {
			return nil, usageError{err}
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		req := wire.Provision{Answers: text}
		if said.PINSource == appliance.PINFromUnlock {
			secrets, err := readPassphrases(fd, said.Unlock.Holders, true)
			if err != nil {
				return nil, err
			}
			defer wipeAll(secrets)
			for _, s := range secrets {
				req.Passphrases = append(req.Passphrases, string(s))
			}
		}
		return a.Provision(ctx, req)
	})
	return c
}

func unlockCommand() *cobra.Command {
	var f adminFlags
	var holder string
	fd := -1
	c := &cobra.Command{
		Use:   "unlock --dir DIR --holder NAME",
		Short: "解锁：持有人给出口令 (unlock: a holder's passphrase)",
		Long: `解锁一台 hsm.pin_source = "unlock" 的设备：重启后它等待，直到 N 位持有人中的 M 位各给出自己的口令。口令从终端读取，或从 --passphrase-fd
读取，从不作为命令参数。输错有限制，计数写在磁盘上；谁解的锁记入日志。

Unlocks an appliance whose PINs people hold: after a restart it waits until M of N holders have given their passphrases, which
are read from the terminal or from a file descriptor, never from the arguments.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			secrets, err := readPassphrases(fd, []string{holder}, false)
			if err != nil {
				return err
			}
			defer wipeAll(secrets)
			answer, err := a.Unlock(c.Context(), wire.Unlock{Holder: holder, Passphrase: string(secrets[0])})
			if err != nil {
				return explain(err)
			}
			if f.output == "json" {
				return f.show(answer)
			}
			var u wire.Unlocked
			if err := json.Unmarshal(answer, &u); err != nil {
				return err
			}
			if u.Opened {
				fmt.Println("已解锁，设备正在启动 (unlocked; the appliance starts)")
				return nil
			}
			fmt.Printf("已给出 %d/%d：%s；还需 %d 位 (given; %d more)\n", len(u.Given), u.Threshold, strings.Join(u.Given, "、"), u.Threshold-len(u.Given), u.Threshold-len(u.Given))
			return nil
		},
	}
	f.add(c)
	required(c, &holder, "holder", "持有人姓名 (the holder's name)")
	c.Flags().IntVar(&fd, "passphrase-fd", -1, "从该文件描述符读口令 (read the passphrase from this file descriptor)")
	c.AddCommand(unlockEnrolCommand(), unlockRekeyCommand(), unlockOpenCommand())
	return c
}

// holderFlags say who will unlock.
type holderFlags struct {
	dir       string
	holders   []string
	threshold int
	fd        int
}

func (h *holderFlags) add(c *cobra.Command, many string) {
	f := c.Flags()
	f.StringVar(&h.dir, "dir", "", "设备目录 (the appliance's folder)")
	f.StringArrayVar(&h.holders, "holder", nil, "持有人姓名，"+many+" (a holder's name, repeatable)")
	f.IntVar(&h.fd, "passphrase-fd", -1, "从该文件描述符读口令，每行一个 (read the passphrases from this file descriptor, a line each)")
	_ = c.MarkFlagRequired("dir")
	_ = c.MarkFlagRequired("holder")
}

func unlockEnrolCommand() *cobra.Command {
	var h holderFlags
	c := &cobra.Command{
		Use:   "enrol --dir DIR --holder NAME …",
		Short: "把口令文件封入口令包，由多人解锁 (seal the PIN files into locked PINs that several people open)",
		Long: `config.toml 先写 hsm.pin_source = "unlock"。本命令读各槽位的口令文件（及同名 .so-pin），封入 secrets/pins.locked，核对能打开之后删除
这些文件。运行中的设备不受影响，下次启动起须解锁。

Write hsm.pin_source = "unlock" into config.toml first. The slots' PIN files are sealed into secrets/pins.locked, and removed
when it was seen that they can be opened again.`,
		Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error { return enrolUnlock(h) },
	}
	h.add(c, "至少三人")
	c.Flags().IntVar(&h.threshold, "threshold", 2, "其中几人即可解锁 (how many of them unlock)")
	return c
}

func enrolUnlock(h holderFlags) error {
	cfg, err := appliance.LoadConfig(h.dir)
	if err != nil {
		return err
	}
	if cfg.HSM.PINSource != appliance.PINFromUnlock {
		return errors.New(`config.toml 须先写 hsm.pin_source = "unlock" (write that into config.toml first)`)
	}
	if err := custody.CheckUnlock(h.holders, h.threshold); err != nil {
		return usageError{err}
	}
	if _, err := os.Stat(appliance.LockedPINsFile(h.dir)); err == nil {
		return errors.New("已有口令包；更换持有人用 yinjian unlock rekey (there are locked PINs; unlock rekey changes the holders)")
	}
	pins, files := map[string][]byte{}, []string{}
	defer func() {
		for _, pin := range pins {
			clear(pin)
		}
	}()
	take := func(name, file string, needed bool) error {
		pin, err := appliance.ReadSecret(file)
		if errors.Is(err, os.ErrNotExist) && !needed {
			return nil
		}
		if err != nil {
			return err
		}
		pins[name] = pin
		files = append(files, file)
		return nil
	}
	machines := append([]appliance.Machine{{Name: appliance.FirstMachine, Slots: cfg.HSM.Slots}}, cfg.HSM.Machines...)
	for _, m := range machines {
		for _, class := range hsm.Classes {
			s, ok := m.Slots[string(class)]
			if !ok {
				continue
			}
			if s.PINFile == "" {
				return fmt.Errorf("密码机 %s 的 %s 槽位没有 pin_file (the slot has no pin_file)", m.Name, class)
			}
			so := strings.TrimSuffix(s.PINFile, filepath.Ext(s.PINFile)) + ".so-pin"
			if err := errors.Join(take(appliance.PINName(m.Name, class), s.PINFile, true), take(soPINName(m.Name, class), so, false)); err != nil {
				return err
			}
		}
	}
	secrets, err := readPassphrases(h.fd, h.holders, true)
	if err != nil {
		return err
	}
	defer wipeAll(secrets)
	if err := lockAnew(h.dir, pins, h.holders, secrets, h.threshold); err != nil {
		return err
	}
	for _, name := range files {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	fmt.Printf("口令已封入 (sealed into) %s，口令文件已删除 (PIN files were removed)：%d 位持有人中的 %d 位解锁\n", appliance.LockedPINsFile(h.dir), len(h.holders), h.threshold)
	return nil
}

// lockAnew seals, opens what it has sealed, and writes it.
func lockAnew(dir string, pins map[string][]byte, holders []string, passphrases [][]byte, threshold int) error {
	l, err := custody.LockPINs(pins, holders, passphrases, threshold)
	if err != nil {
		return usageError{err}
	}
	opened, err := openLocked(l, holders[len(holders)-threshold:], passphrases[len(holders)-threshold:])
	if err != nil {
		return fmt.Errorf("封好的口令包打不开，未写 (what was sealed cannot be opened; nothing was written): %w", err)
	}
	for name, pin := range opened {
		if !bytes.Equal(pin, pins[name]) {
			return errors.New("封好的口令与原来的不同，未写 (what was sealed is not what it was; nothing was written)")
		}
		clear(pin)
	}
	return appliance.WriteLockedPINs(dir, l)
}

// openLocked opens locked PINs with the passphrases of some holders.
func openLocked(l *custody.LockedPINs, holders []string, passphrases [][]byte) (map[string][]byte, error) {
	var shares []custody.Share
	defer func() {
		for i := range shares {
			shares[i].Wipe()
		}
	}()
	for i, name := range holders {
		if !slices.Contains(l.Names(), name) {
			return nil, usageError{fmt.Errorf("%s 不是持有人；持有人为 %s (not a holder)", name, strings.Join(l.Names(), "、"))}
		}
		s, err := l.Share(name, passphrases[i])
		if errors.Is(err, custody.ErrSealed) {
			return nil, fmt.Errorf("%s 的口令不正确 (the passphrase is wrong)", name)
		}
		if err != nil {
			return nil, err
		}
		shares = append(shares, s)
	}
	return l.Open(shares)
}

// openWith reads the locked PINs of dir and opens them with the holders' passphrases, the first of those read.
func openWith(dir string, holders []string, passphrases [][]byte) (map[string][]byte, error) {
	b, err := os.ReadFile(appliance.LockedPINsFile(dir))
	if err != nil {
		return nil, err
	}
	l, err := custody.ParseLockedPINs(b)
	if err != nil {
		return nil, err
	}
	return openLocked(l, holders, passphrases)
}

func unlockRekeyCommand() *cobra.Command {
	var h holderFlags
	var with []string
	c := &cobra.Command{
		Use:   "rekey --dir DIR --with NAME … --holder NAME …",
		Short: "更换持有人、口令或门限 (change holders, passphrases or threshold)",
		Long: `先由现有持有人（--with，门限之数）给出口令，再由新的持有人（--holder）各给出新口令。--passphrase-fd 时各行依此顺序。旧口令包随即作废；
旧盘的拷贝仍可用旧口令打开：有人离职而可能留有拷贝时，另换密码机口令。更换在下次解锁时记入日志（套号不同）。

The present holders (--with, as many as the threshold) give their passphrases, then the new ones theirs. A copy of the old
disk is still opened by the old passphrases.`,
		Args: exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			if err := custody.CheckUnlock(h.holders, h.threshold); err != nil {
				return usageError{err}
			}
			var old, fresh [][]byte
			var err error
			if h.fd >= 0 { // one file has them all
				var all [][]byte
				if all, err = readPassphrases(h.fd, append(slices.Clone(with), h.holders...), true); err == nil {
					old, fresh = all[:len(with)], all[len(with):]
				}
			} else {
				old, err = readPassphrases(-1, with, false)
			}
			if err != nil {
				return err
			}
			defer wipeAll(old)
			pins, err := openWith(h.dir, with, old)
			if err != nil {
				return err
			}
			if fresh == nil {
				if fresh, err = readPassphrases(-1, h.holders, true); err != nil {
					return err
				}
			}
			defer wipeAll(fresh)
			if err := lockAnew(h.dir, pins, h.holders, fresh, h.threshold); err != nil {
				return err
			}
			fmt.Printf("口令包已更换 (changed)：%d 位持有人中的 %d 位解锁\n", len(h.holders), h.threshold)
			return nil
		},
	}
	h.add(c, "新的，至少三人")
	c.Flags().IntVar(&h.threshold, "threshold", 2, "其中几人即可解锁 (how many of them unlock)")
	c.Flags().StringArrayVar(&with, "with", nil, "现有持有人，门限之数 (present holders, as many as the threshold)")
	_ = c.MarkFlagRequired("with")
	return c
}

func unlockOpenCommand() *cobra.Command {
	var h holderFlags
	var out string
	c := &cobra.Command{
		Use:   "open --dir DIR --holder NAME … --out DIR",
		Short: "取出口令为文件，供密钥仪式、更换密码机口令之用；用毕删除 (write the PINs to files, for ceremonies; remove them afterwards)",
		Args:  exactArgs(0),
		RunE: func(*cobra.Command, []string) error {
			secrets, err := readPassphrases(h.fd, h.holders, false)
			if err != nil {
				return err
			}
			defer wipeAll(secrets)
			pins, err := openWith(h.dir, h.holders, secrets)
			if err != nil {
				return err
			}
			if err := os.Mkdir(out, 0o700); err != nil {
				return err
			}
			for name, pin := range pins {
				file, so := strings.CutSuffix(strings.ReplaceAll(name, "/", "-"), ".so")
				if so {
					file += ".so-pin"
				} else {
					file += ".pin"
				}
				if err := os.WriteFile(filepath.Join(out, file), append(pin, '\n'), 0o600); err != nil {
					return err
				}
			}
			fmt.Printf("已写出 %d 个口令到 %s；用毕删除 (written; remove them afterwards)\n", len(pins), out)
			return nil
		},
	}
	h.add(c, "门限之数")
	c.Flags().StringVar(&out, "out", "", "新建的目录，权限 700 (a folder that is made)")
	_ = c.MarkFlagRequired("out")
	return c
}
