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

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/custody"
	"yinjian/hsm"
)

// readPassphrases reads one passphrase for each of the people: from the file descriptor, a line each, or, with fd negative,
// from the terminal, which does not show them; new ones are asked for twice there. Never from arguments or the environment,
// which other processes see. The caller wipes them.
func readPassphrases(ctx context.Context, fd int, people []string, fresh bool) ([][]byte, error) {
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
	if !onTerminal() {
		return nil, usageError{errors.New("标准输入不是终端：用 --passphrase-fd N 给出口令 (standard input is no terminal: give --passphrase-fd N)")}
	}
	for _, name := range people {
		who := name + " 的口令 (passphrase)"
		p, err := []byte(nil), error(nil)
		if fresh {
			p, err = typedTwice(ctx, who, custody.CheckPassphrase)
		} else {
			p, err = typed(ctx, who)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func wipeAll(secrets [][]byte) {
	for _, s := range secrets {
		clear(s)
	}
}

// provisionBy runs init as a child: making tokens loads a vendor's module, which this process does not. Answers,
// passphrases and the administrators' first passwords go through pipes.
func provisionBy(ctx context.Context, self, dir string, answers []byte, passphrases []string) ([]wire.FirstPassword, error) {
	// The child reads the answers first, and whole.
	a, err := pipeOf(answers)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	p, err := pipeOf([]byte(strings.Join(append(slices.Clone(passphrases), ""), "\n")))
	if err != nil {
		return nil, err
	}
	defer p.Close()
	r, w, err := os.Pipe() // has room for what is said
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, self, "init", "--dir", dir, "--answers", "/dev/fd/3", "--passphrase-fd", "4", "--first-passwords-fd", "5")
	cmd.ExtraFiles = []*os.File{a, p, w}
	said := new(bytes.Buffer)
	cmd.Stderr = said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // killed it would leave a half that only a person removes
	cmd.WaitDelay = time.Minute
	err = cmd.Run()
	_ = w.Close() // nothing was written through it here
	if err != nil {
		return nil, fmt.Errorf("%s", strings.TrimSpace(said.String()))
	}
	var first []wire.FirstPassword
	if err := json.NewDecoder(r).Decode(&first); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return first, nil
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
		text, err := readOwn(file)
		if err != nil {
			return nil, usageError{err}
		}
		said, err := parseAnswers(file, text) // what is wrong with the file is told before anything is asked
		if err != nil {
			return nil, usageError{err}
		}
		req := wire.Provision{Answers: text}
		if said.locked() {
			secrets, err := readPassphrases(ctx, fd, said.Unlock.Holders, true)
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

// readOwn reads a file, once, and no other in its place: who owns the folder that it is in may not have us read what he may not.
func readOwn(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) // a FIFO makes nobody wait
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s 不是普通文件 (is no regular file)", name)
	}
	return io.ReadAll(f)
}

func unlockCommand() *cobra.Command {
	var f adminFlags
	var holder string
	fd := -1
	c := &cobra.Command{
		Use:   "unlock --dir DIR --holder NAME",
		Short: "解锁：持有人给出口令 (unlock: a holder's passphrase)",
		Long: `解锁一台 hsm.pin_source = "unlock"（或 "tpm" 而 TPM 没有打开）的设备：重启后它等待，直到 N 位持有人中的 M 位各给出自己的口令。口令从终端读取，或从 --passphrase-fd
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
			secrets, err := readPassphrases(c.Context(), fd, []string{holder}, false)
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
	c.AddCommand(unlockEnrolCommand(), unlockRekeyCommand(), unlockOpenCommand(), unlockSealCommand(), unlockUnsealCommand())
	return c
}

func unlockSealCommand() *cobra.Command {
	var req wire.SealUnlock
	var toTPM bool
	c := adminCommand("seal", "由本机 TPM 无人值守解锁：把已解锁的口令封给 TPM (have this machine's TPM unlock from the next start on)", 0, func(c *cobra.Command) {
		c.Flags().BoolVar(&toTPM, "tpm", false, "封给配置 hsm.tpm 所指的 TPM 2.0 (to the TPM that hsm.tpm names)")
		_ = c.MarkFlagRequired("tpm")
		required(c, &req.Reason, "reason", "原因，记入日志 (why, for the journal)")
		persons(c, &req.Persons)
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		if err := checkPersons(a.LoggedIn(), req.Persons); err != nil {
			return nil, err
		}
		return a.SealUnlock(ctx, req)
	})
	c.Long = `config.toml 先写 hsm.pin_source = "tpm"，由持有人解锁一次，再用本命令。须两人。此后重启由 TPM 打开；TPM 换了、被清除，或配置的 PCR 变了，
设备停在已锁定，说明原因，等待持有人。防的是偷盘，不防偷整机：见 docs/states.md。更新固件、启动配置之后须重新封。

Write hsm.pin_source = "tpm" into config.toml first, and have the holders unlock once. Two persons. It is made for a stolen disk;
a machine that is stolen whole starts as it did.`
	return c
}

func unlockUnsealCommand() *cobra.Command {
	var req wire.UnsealUnlock
	return adminCommand("unseal", "取消无人值守解锁：下次启动由持有人解锁 (have people unlock again from the next start on)", 0, func(c *cobra.Command) {
		required(c, &req.Reason, "reason", "原因，记入日志 (why, for the journal)")
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		return a.UnsealUnlock(ctx, req)
	})
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
		Long: `config.toml 先写 hsm.pin_source = "unlock"（或 "tpm"）。本命令读各槽位的口令文件（及同名 .so-pin），封入 secrets/pins.locked，核对能打开之后删除
这些文件。运行中的设备不受影响，下次启动起须解锁。

Write hsm.pin_source = "unlock" (or "tpm") into config.toml first. The slots' PIN files are sealed into secrets/pins.locked, and removed
when it was seen that they can be opened again.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error { return enrolUnlock(c.Context(), h) },
	}
	h.add(c, "至少三人")
	c.Flags().IntVar(&h.threshold, "threshold", 2, "其中几人即可解锁 (how many of them unlock)")
	return c
}

func enrolUnlock(ctx context.Context, h holderFlags) error {
	cfg, err := appliance.LoadConfig(h.dir)
	if err != nil {
		return err
	}
	if s := cfg.HSM.PINSource; s != appliance.PINFromUnlock && s != appliance.PINFromTPM {
		return errors.New(`config.toml 须先写 hsm.pin_source = "unlock" 或 "tpm" (write one of these into config.toml first)`)
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
	secrets, err := readPassphrases(ctx, h.fd, h.holders, true)
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
		RunE: func(c *cobra.Command, _ []string) error {
			if err := custody.CheckUnlock(h.holders, h.threshold); err != nil {
				return usageError{err}
			}
			var old, fresh [][]byte
			var err error
			if h.fd >= 0 { // one file has them all
				var all [][]byte
				if all, err = readPassphrases(c.Context(), h.fd, append(slices.Clone(with), h.holders...), true); err == nil {
					old, fresh = all[:len(with)], all[len(with):]
				}
			} else {
				old, err = readPassphrases(c.Context(), -1, with, false)
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
				if fresh, err = readPassphrases(c.Context(), -1, h.holders, true); err != nil {
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
		RunE: func(c *cobra.Command, _ []string) error {
			secrets, err := readPassphrases(c.Context(), h.fd, h.holders, false)
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
