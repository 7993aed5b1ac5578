package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/worker"
	"yinjian/ntp/sysclock"
)

// A ceremony is the one file of a key ceremony: what two people read aloud is what is done.
type ceremony struct {
	Name       string            `toml:"name"`      // of the ceremony, for shares and minutes
	KEK        string            `toml:"kek"`       // label of the wrapping key
	Minutes    string            `toml:"minutes"`   // file to be written
	Threshold  int               `toml:"threshold"` // how many custodians restore the wrapping key
	Machines   []ceremonyMachine `toml:"machine"`
	Custodians []ceremonyHolder  `toml:"custodian"`
	Officers   *ceremonyOfficers `toml:"officers"` // who open what a forgotten PIN has sealed; may be left out
}

type ceremonyMachine struct {
	Name       string `toml:"name"`
	Module     string `toml:"module"`
	ModuleArgs string `toml:"module_args"`
	Profile    string `toml:"profile"`
	Token      string `toml:"token"` // of the staff slot
	PINFile    string `toml:"pin_file"`
	SOPINFile  string `toml:"so_pin_file"`
	// LogToken is the token of the log slot, which gets the MAC keys that every campus shares; "": none are made.
	LogToken   string `toml:"log_token"`
	LogPINFile string `toml:"log_pin_file"`
}

type ceremonyHolder struct {
	Name  string `toml:"name"`
	Share string `toml:"share"` // file to be written: on a medium of the holder's own, or printed and destroyed
}

type ceremonyOfficers struct {
	Threshold int              `toml:"threshold"`
	Public    string           `toml:"public"` // file to be written, for hsm.custody.officers
	Holders   []ceremonyHolder `toml:"holder"`
}

var reCeremonyName = regexp.MustCompile(`^[^\s\pC][^\pC]{0,60}[^\s\pC]$`)

// loadCeremony reads a file strictly. Relative paths are taken from its folder.
func loadCeremony(name string) (*ceremony, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	c := new(ceremony)
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(c); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			var errs []error
			for _, e := range strict.Errors {
				errs = append(errs, fmt.Errorf("%s: 未知的项 (unknown key)", strings.Join(e.Key(), ".")))
			}
			err = errors.Join(errs...)
		}
		return nil, usageError{fmt.Errorf("%s: %w", name, err)}
	}
	dir, err := filepath.Abs(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	for _, p := range c.paths() {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	if err := c.check(); err != nil {
		return nil, usageError{fmt.Errorf("%s:\n%w", name, err)}
	}
	return c, nil
}

// outputs are the files that the ceremony writes.
func (c *ceremony) outputs() []*string {
	out := []*string{&c.Minutes}
	for i := range c.Custodians {
		out = append(out, &c.Custodians[i].Share)
	}
	if c.Officers != nil {
		out = append(out, &c.Officers.Public)
		for i := range c.Officers.Holders {
			out = append(out, &c.Officers.Holders[i].Share)
		}
	}
	return out
}

func (c *ceremony) paths() []*string {
	out := c.outputs()
	for i := range c.Machines {
		m := &c.Machines[i]
		out = append(out, &m.Module, &m.PINFile, &m.SOPINFile, &m.LogPINFile)
		if profiles.IsPath(m.Profile) {
			out = append(out, &m.Profile)
		}
	}
	return out
}

// check reports everything that can be seen to be wrong in the file alone.
func (c *ceremony) check() error {
	f := faults{names: map[string]string{}}
	bad, word := f.bad, f.word
	word("name", c.Name)
	word("kek", c.KEK)
	if len(c.Machines) == 0 {
		bad("machine", "至少一台，最好两台 (one at least, better two)")
	}
	for i, m := range c.Machines {
		at := fmt.Sprintf("machine[%d]", i+1)
		word(at, m.Name)
		for key, v := range map[string]string{"module": m.Module, "profile": m.Profile, "token": m.Token, "pin_file": m.PINFile, "so_pin_file": m.SOPINFile} {
			if v == "" {
				bad(at+"."+key, "缺少 (missing)")
			}
		}
		if (m.LogToken == "") != (m.LogPINFile == "") {
			bad(at, "log_token 与 log_pin_file 须同时写或同时不写 (both or neither)")
		}
	}
	f.holders("custodian", c.Threshold, c.Custodians)
	if c.Officers != nil {
		f.holders("officers.holder", c.Officers.Threshold, c.Officers.Holders)
	}
	f.outputs("minutes、share、public", c.outputs())
	return f.all()
}

// faults gathers what is wrong with a file that says who gets which share.
type faults struct {
	errs  []error
	names map[string]string // by kind and name, where each stands
}

func (f *faults) bad(key, format string, args ...any) {
	f.errs = append(f.errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
}

// word wants a name that may stand on a share, and no other of its kind like it.
func (f *faults) word(key, v string) {
	// Who recovers a key is journalled by name: what the journal refuses must not be on a share.
	if !reCeremonyName.MatchString(v) || problem.CheckText(key, v, custody.MaxHolderName) != nil {
		f.bad(key, "须为 2–62 个字符，首尾无空格，不含看不见的字符 (2 to 62 characters that can be seen)")
	}
	kind, _, _ := strings.Cut(key, "[")
	if f.names[kind+v] != "" {
		f.bad(key, "与 %s 同名 (the same name as another)", f.names[kind+v])
	}
	f.names[kind+v] = key
}

func (f *faults) holders(key string, threshold int, hs []ceremonyHolder) {
	if len(hs) > custody.MaxHolders || threshold < 2 || threshold > len(hs) {
		f.bad(key, "门限 %d、共 %d 人：门限至少 2，不超过人数，至多 %d 人 (threshold of 2 at least, %d holders at most)", threshold, len(hs), custody.MaxHolders, custody.MaxHolders)
	}
	for i, h := range hs {
		f.word(fmt.Sprintf("%s[%d]", key, i+1), h.Name)
	}
}

// outputs are the files that will be written.
func (f *faults) outputs(keys string, files []*string) {
	seen := map[string]bool{}
	for _, p := range files {
		if *p == "" {
			f.bad(keys, "缺少要写的文件 (a file to be written is missing)")
		} else if seen[*p] {
			f.bad(*p, "两处写同一文件 (two things in one file)")
		}
		seen[*p] = true
	}
}

func (f *faults) all() error {
	slices.SortFunc(f.errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(f.errs...)
}

// read prints the ceremony for two people.
func (c *ceremony) read(w io.Writer) {
	fmt.Fprintf(w, "密钥仪式 (key ceremony): %s\n", c.Name)
	fmt.Fprintf(w, "一、产生包装密钥 %s（SM4），导入 %d 台密码机并由安全员标记为受信任：\n", c.KEK, len(c.Machines))
	for i, m := range c.Machines {
		fmt.Fprintf(w, "  %d. %s：令牌 %s，模块 %s，厂商档案 %s\n", i+1, m.Name, m.Token, m.Module, m.Profile)
		if m.LogToken != "" {
			fmt.Fprintf(w, "     同一秘密派生的 MAC 密钥 %s 导入令牌 %s\n", strings.Join(macLabels(c.KEK), "、"), m.LogToken)
		}
	}
	fmt.Fprintf(w, "二、密钥的秘密分给 %d 名保管人，任 %d 人可恢复：\n", len(c.Custodians), c.Threshold)
	for i, h := range c.Custodians {
		fmt.Fprintf(w, "  第 %d 份 %s → %s\n", i+1, h.Name, h.Share)
	}
	if c.Officers == nil {
		fmt.Fprintln(w, "三、没有保管干部：忘记 PIN 的密钥无人能恢复。")
	} else {
		fmt.Fprintf(w, "三、恢复忘记的 PIN，须 %d 名干部中的 %d 名；其公钥写入 %s：\n", len(c.Officers.Holders), c.Officers.Threshold, c.Officers.Public)
		for i, h := range c.Officers.Holders {
			fmt.Fprintf(w, "  第 %d 份 %s → %s\n", i+1, h.Name, h.Share)
		}
	}
	fmt.Fprintf(w, "四、记录写入 %s，由新密钥之下的校验密钥在最后一台密码机中签名。\n", c.Minutes)
}

// prepare looks at everything that can be seen before there is a secret: files that would be overwritten, folders that cannot
// be written, PIN files, modules, tokens, profiles.
func (c *ceremony) prepare(out io.Writer) error {
	var errs []error
	for _, p := range c.outputs() {
		if _, err := os.Lstat(*p); err == nil {
			errs = append(errs, fmt.Errorf("%s 已存在，不会覆盖 (exists and is not overwritten)", *p))
		} else if err := unix.Access(filepath.Dir(*p), unix.W_OK); err != nil {
			errs = append(errs, fmt.Errorf("%s 的目录不可写 (its folder cannot be written): %w", *p, err))
		}
	}
	for i := range c.Machines {
		m := &c.Machines[i]
		place, err := m.look()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.Name, err))
			continue
		}
		fmt.Fprintf(out, "%s：%s %s，序列号 %s (found)\n", m.Name, place.Manufacturer, place.Model, place.Serial)
	}
	return errors.Join(errs...)
}

// look finds the tokens and reads the PIN files, and presents no PIN.
func (m *ceremonyMachine) look() (place custody.Place, err error) {
	profile, err := pkcs11.ProfileByName(m.Profile)
	if err != nil {
		return place, err
	}
	if profile.Wrapping.Form == 0 {
		return place, fmt.Errorf("厂商档案 %s 没有写包装运算，见 docs/hsm.md (the profile names no wrapping operation)", m.Profile)
	}
	secrets := []string{m.PINFile, m.SOPINFile}
	if m.LogToken != "" {
		if _, ok := profile.Operations[hsm.MACSM3]; !ok {
			return place, fmt.Errorf("厂商档案 %s 没有 hmac-sm3，不能持有 MAC 密钥 (the profile has no HMAC-SM3)", m.Profile)
		}
		secrets = append(secrets, m.LogPINFile)
	}
	for _, name := range secrets {
		pin, err := appliance.ReadSecret(name)
		clear(pin)
		if err != nil {
			return place, err
		}
	}
	infos, err := pkcs11.ListSlots(m.Module, m.ModuleArgs)
	if err != nil {
		return place, err
	}
	find := func(token string) (custody.Place, error) {
		for _, info := range infos {
			if info.Label == token && info.Initialized {
				return custody.Place{Name: m.Name, Token: token, Serial: info.Serial, Manufacturer: info.Manufacturer, Model: info.Model}, nil
			}
		}
		return custody.Place{}, fmt.Errorf("没有标签为 %q 的令牌 (no such token)", token)
	}
	if place, err = find(m.Token); err == nil && m.LogToken != "" {
		var log custody.Place
		log, err = find(m.LogToken)
		place.Log = &log
	}
	return place, err
}

// use opens the machine's staff token, as its user, for f.
func (m *ceremonyMachine) use(ctx context.Context, log logrus.FieldLogger, f func(*pkcs11.Token) error) error {
	return m.useToken(ctx, m.Token, m.PINFile, log, f)
}

// useLog is likewise for the token of the log slot.
func (m *ceremonyMachine) useLog(ctx context.Context, log logrus.FieldLogger, f func(*pkcs11.Token) error) error {
	return m.useToken(ctx, m.LogToken, m.LogPINFile, log, f)
}

func (m *ceremonyMachine) useToken(ctx context.Context, token, pinFile string, log logrus.FieldLogger, f func(*pkcs11.Token) error) error {
	tok, err := m.open(ctx, token, pinFile, log)
	if err == nil {
		err = errors.Join(f(tok), tok.Close())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", m.Name, err)
	}
	return nil
}

func (m *ceremonyMachine) open(ctx context.Context, token, pinFile string, log logrus.FieldLogger) (*pkcs11.Token, error) {
	profile, err := pkcs11.ProfileByName(m.Profile)
	if err != nil {
		return nil, err
	}
	pin, err := appliance.ReadSecret(pinFile)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	return pkcs11.Open(ctx, pkcs11.Config{Module: m.Module, ModuleArgs: m.ModuleArgs, TokenLabel: token, PIN: pin, Profile: profile, MaxSessions: 2, Log: log})
}

// macLabels are the labels of the MAC keys that go with a wrapping key.
func macLabels(kek string) (labels []string) {
	for _, use := range account.CampusMACs {
		labels = append(labels, custody.MACLabel(use, kek))
	}
	return labels
}

// macKeys are the MAC keys that the secret makes, as the minutes name them.
func macKeys(secret []byte, kek string) (keys []custody.MACKey, err error) {
	for _, label := range macLabels(kek) {
		k, err := custody.MACKeyOf(secret, label)
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// checkMAC holds a token's MAC key against its check value. It fails with hsm.ErrKeyNotFound where there is none.
func checkMAC(ctx context.Context, tok hsm.Token, want custody.MACKey) error {
	answer, err := tok.Do(ctx, want.Label, hsm.MACSM3, custody.MACCheckMessage(want.Label))
	if err != nil {
		return err
	}
	v, err := custody.MACCheckValue(answer)
	if err == nil && v != want.CheckValue {
		err = fmt.Errorf("密码机中 %s 的校验值为 %s，这一套份额的为 %s：不是同一把；查明后由密码机管理员删除错的一把，再 yinjian ceremony restore (another key has this label: find out which is wrong, have it destroyed, and restore)",
			want.Label, v, want.CheckValue)
	}
	return err
}

// installMACs brings the MAC keys that the token lacks, and holds those that are there against the secret. made has the labels
// of those that it brought, also when it fails.
func (m *ceremonyMachine) installMACs(ctx context.Context, secret []byte, keys []custody.MACKey, log logrus.FieldLogger, out io.Writer) (made []string, err error) {
	err = m.useLog(ctx, log, func(tok *pkcs11.Token) error {
		for _, k := range keys { // all are looked at before one is made
			if err := checkMAC(ctx, tok, k); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
				return err
			}
		}
		for _, k := range keys {
			did := "已在，是同一把 (there already, the same)"
			err := checkMAC(ctx, tok, k)
			if errors.Is(err, hsm.ErrKeyNotFound) {
				did = "已导入 (imported)"
				value := custody.MACOf(secret, k.Label)
				err = tok.ImportMAC(ctx, k.Label, value)
				clear(value)
				if err == nil {
					made = append(made, k.Label)
					err = checkMAC(ctx, tok, k)
				}
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(out, "%s：%s %s，校验值 %s\n", m.Name, k.Label, did, k.CheckValue)
		}
		return nil
	})
	return made, err
}

// withdraw destroys keys that a ceremony made on a token before it failed.
func withdraw(ctx context.Context, labels []string, use func(context.Context, logrus.FieldLogger, func(*pkcs11.Token) error) error, log logrus.FieldLogger) func() error {
	return func() error {
		if len(labels) == 0 {
			return nil
		}
		ctx := context.WithoutCancel(ctx)
		return use(ctx, log, func(tok *pkcs11.Token) (err error) {
			for _, label := range labels {
				err = errors.Join(err, tok.DestroyKey(ctx, label))
			}
			return err
		})
	}
}

// install brings the wrapping key onto the machine.
func (m *ceremonyMachine) install(label string, kek []byte) error {
	profile, err := pkcs11.ProfileByName(m.Profile)
	if err != nil {
		return err
	}
	pin, err := appliance.ReadSecret(m.PINFile)
	if err != nil {
		return err
	}
	defer clear(pin)
	so, err := appliance.ReadSecret(m.SOPINFile)
	if err != nil {
		return err
	}
	defer clear(so)
	err = pkcs11.InstallKEK(pkcs11.KEKConfig{Module: m.Module, ModuleArgs: m.ModuleArgs, TokenLabel: m.Token, Profile: profile, Label: label, Value: kek,
		SOPIN: so, UserPIN: pin})
	if err != nil {
		return fmt.Errorf("%s: %w", m.Name, err)
	}
	return nil
}

// guard keeps what this process remembers out of core files, of other users' reach and of swap. It says what it could not do.
func guard(out io.Writer) error {
	if err := worker.Undumpable(); err != nil {
		return err
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE); err != nil {
		fmt.Fprintf(out, "注意：内存未能锁定，可能换出到磁盘；请先 swapoff -a (memory is not locked: %v)\n", err)
	}
	return nil
}

// run is the ceremony. What it made is undone when a step fails.
//
// Order: 1. look; 2. the secrets, from the first machine's random source and this machine's together; 3. shares on disk;
// 4. the wrapping key on every machine, and the MAC keys where there is a log slot; 5. the check key, made on the first machine and used on the last; 6. the minutes. A
// stop in between leaves shares or a key that nothing depends on yet: nothing is wrapped before the minutes are there.
func (c *ceremony) run(ctx context.Context, present []string, out io.Writer, log logrus.FieldLogger) (m *custody.Minutes, err error) {
	// 1.
	if err := c.prepare(out); err != nil {
		return nil, err
	}
	clock, err := sysclock.Open()
	if err != nil {
		return nil, err
	}
	// 2.
	secret := make([]byte, custody.SecretSize)
	defer clear(secret)
	rand.Read(secret) // never fails (crypto/rand)
	err = c.Machines[0].use(ctx, log, func(tok *pkcs11.Token) error {
		more, err := tok.Random(ctx, len(secret))
		defer clear(more)
		for i := range more {
			secret[i] ^= more[i]
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	kek := custody.KEKOf(secret)
	defer clear(kek)
	body := custody.MinutesBody{Version: 1, Name: c.Name, At: clock.Realtime().UTC().Format(time.RFC3339), KEK: c.KEK, Present: present}
	if body.CheckValue, err = custody.CheckValue(kek); err != nil {
		return nil, err
	}
	// 3.
	var undo []func() error
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				err = errors.Join(err, f())
			}
		}
	}()
	share := func(secret []byte, purpose string, threshold int, hs []ceremonyHolder) (custody.Holders, error) {
		h := custody.Holders{Threshold: threshold}
		for _, holder := range hs {
			h.Names = append(h.Names, holder.Name)
		}
		shares, commitments, err := custody.Split(secret, purpose, c.Name, h.Names, threshold)
		h.Commitments = commitments
		for i := range shares {
			if err == nil {
				err = writeNew(hs[i].Share, []byte(shares[i].String()), 0o600, &undo)
			}
			shares[i].Wipe()
		}
		return h, err
	}
	if body.Custodians, err = share(secret, custody.PurposeKEK, c.Threshold, c.Custodians); err != nil {
		return nil, err
	}
	if o := c.Officers; o != nil {
		seed, point := custody.NewPair()
		defer clear(seed)
		h, err := share(seed, custody.PurposeOfficers, o.Threshold, o.Holders)
		if err != nil {
			return nil, err
		}
		body.Officers = &custody.Officers{Holders: h, Point: point}
		public, err := publicPEM(point)
		if err == nil {
			err = writeNew(o.Public, public, 0o644, &undo)
		}
		if err != nil {
			return nil, err
		}
	}
	// 4.
	keys, err := macKeys(secret, c.KEK)
	if err != nil {
		return nil, err
	}
	for i := range c.Machines {
		machine := &c.Machines[i]
		if err := machine.install(c.KEK, kek); err != nil {
			return nil, err
		}
		undo = append(undo, withdraw(ctx, []string{c.KEK}, machine.use, log))
		place, err := machine.look()
		if err != nil {
			return nil, err
		}
		body.Machines = append(body.Machines, place)
		fmt.Fprintf(out, "%s：已导入 %s 并标记为受信任 (installed and trusted)\n", machine.Name, c.KEK)
		if machine.LogToken == "" {
			continue
		}
		made, err := machine.installMACs(ctx, secret, keys, log, out)
		undo = append(undo, withdraw(ctx, made, machine.useLog, log))
		if err != nil {
			return nil, err
		}
		body.MACs = keys
	}
	// 5.
	body.CheckKey.Label = "ceremony/" + c.KEK
	err = c.Machines[0].use(ctx, log, func(tok *pkcs11.Token) error {
		info, blob, err := tok.GenerateWrapped(ctx, hsm.KeySpec{Label: body.CheckKey.Label, Algorithm: hsm.SM2}, c.KEK)
		if err == nil {
			pub := info.Public.(*ecdsa.PublicKey)
			body.CheckKey.Point, body.CheckKey.Blob = elliptic.Marshal(pub.Curve, pub.X, pub.Y), blob
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	// 6.
	m = &custody.Minutes{Body: body}
	last := &c.Machines[len(c.Machines)-1]
	if err := c.sign(ctx, m, last, c.Minutes, log, &undo); err != nil {
		return nil, err
	}
	return m, nil
}

// sign has the check key sign the minutes on a machine, and writes them.
func (c *ceremony) sign(ctx context.Context, m *custody.Minutes, machine *ceremonyMachine, name string, log logrus.FieldLogger, undo *[]func() error) error {
	var b []byte
	err := machine.use(ctx, log, func(tok *pkcs11.Token) error {
		key, err := ceremonyKey(tok, &m.Body)
		if err == nil {
			b, err = m.Sign(func(body []byte) ([]byte, error) { return key.SignMessage(ctx, body) })
		}
		return err
	})
	if err != nil {
		return err
	}
	return writeNew(name, append(b, '\n'), 0o644, undo)
}

// ceremonyKey is the key that a machine can use if it holds the wrapping key of the minutes.
func ceremonyKey(tok hsm.Token, b *custody.MinutesBody) (*hsm.Key, error) {
	pub, err := sm2.NewPublicKey(b.CheckKey.Point)
	if err != nil {
		return nil, err
	}
	w, err := hsm.NewWrappedKey(b.CheckKey.Label, hsm.SM2, pub, b.KEK, b.CheckKey.Blob)
	if err != nil {
		return nil, err
	}
	return hsm.KeyOfWrapped(tok, w)
}

// writeNew writes a file that must not be there, durably, and removes it again when the ceremony fails.
func writeNew(name string, data []byte, perm os.FileMode, undo *[]func() error) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, perm)
	if err != nil {
		return err
	}
	*undo = append(*undo, func() error { return os.Remove(name) })
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(name)) // the name, too, must outlive a power cut
	if err != nil {
		return err
	}
	if err = folder.Sync(); errors.Is(err, unix.EINVAL) {
		err = nil // a medium whose file system does not know that
	}
	return errors.Join(err, folder.Close())
}

func publicPEM(point []byte) ([]byte, error) {
	pub, err := sm2.NewPublicKey(point)
	if err != nil {
		return nil, err
	}
	der, err := smx509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// verify asks machines whether they hold the wrapping key of the minutes: each has the check key sign something fresh. No key
// is shown.
func verifyMachines(ctx context.Context, machines []ceremonyMachine, m *custody.Minutes, out io.Writer, log logrus.FieldLogger) error {
	var errs []error
	for i := range machines {
		machine := &machines[i]
		err := machine.use(ctx, log, func(tok *pkcs11.Token) error { return tryCeremonyKey(ctx, tok, &m.Body) })
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintf(out, "%s：持有同一把 %s，校验值 %s (holds the same key)\n", machine.Name, m.Body.KEK, m.Body.CheckValue)
		if machine.LogToken == "" {
			continue
		}
		if len(m.Body.MACs) == 0 {
			errs = append(errs, fmt.Errorf("%s：记录中没有 MAC 密钥；先 ceremony restore，并把文件的 minutes 改为其记录 (the minutes name no MAC keys: restore, and name its minutes in the file)", machine.Name))
			continue
		}
		err = machine.useLog(ctx, log, func(tok *pkcs11.Token) (err error) {
			for _, k := range m.Body.MACs {
				if e := checkMAC(ctx, tok, k); e != nil {
					err = errors.Join(err, e)
					continue
				}
				fmt.Fprintf(out, "%s：持有同一把 %s，校验值 %s (holds the same key)\n", machine.Name, k.Label, k.CheckValue)
			}
			return err
		})
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// readShares reads shares and holds each against the commitments.
func readShares(names []string, holders custody.Holders) ([]custody.Share, error) {
	var shares []custody.Share
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		s, err := custody.ParseShare(string(b))
		clear(b)
		if err == nil {
			err = s.Check(holders.Commitments)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		shares = append(shares, s)
	}
	return shares, nil
}

// holds says whether the machine has the wrapping key of the minutes. Another key of its label is an error.
func (m *ceremonyMachine) holds(ctx context.Context, of *custody.Minutes, log logrus.FieldLogger) (yes bool, err error) {
	err = m.use(ctx, log, func(tok *pkcs11.Token) error {
		_, err := tok.FindKey(ctx, of.Body.KEK)
		if errors.Is(err, hsm.ErrKeyNotFound) {
			return nil
		}
		if err == nil {
			err = tryCeremonyKey(ctx, tok, &of.Body)
		}
		if err != nil {
			return fmt.Errorf("密码机中已有标签为 %s 的密钥，而它不是这次仪式的（校验值 %s）或不受信任；查明后由密码机管理员删除，再恢复 (a key with this label is there, and is not this ceremony's or not trusted: find out, have it destroyed, and restore): %w", of.Body.KEK, of.Body.CheckValue, err)
		}
		yes = true
		return nil
	})
	return yes, err
}

// tryCeremonyKey has the check key sign, which the machine can if it holds the wrapping key.
func tryCeremonyKey(ctx context.Context, tok hsm.Token, b *custody.MinutesBody) error {
	key, err := ceremonyKey(tok, b)
	if err != nil {
		return err
	}
	fresh := make([]byte, 32)
	rand.Read(fresh) // never fails (crypto/rand)
	_, err = key.SignMessage(ctx, fresh)
	return err // hsm.Key has verified it
}

// restore brings the wrapping key, and the MAC keys where there is a log slot, onto another machine from the custodians'
// shares. What is there already is held against the shares, and left as it is.
func (c *ceremony) restore(ctx context.Context, machine *ceremonyMachine, m *custody.Minutes, names, present []string, minutes string, out io.Writer, log logrus.FieldLogger) (err error) {
	if _, err := os.Lstat(minutes); err == nil {
		return fmt.Errorf("%s 已存在，不会覆盖 (exists and is not overwritten)", minutes)
	}
	shares, err := readShares(names, m.Body.Custodians)
	if err != nil {
		return err
	}
	defer func() {
		for i := range shares {
			shares[i].Wipe()
		}
	}()
	secret, err := custody.Combine(shares, custody.PurposeKEK)
	if err != nil {
		return err
	}
	defer clear(secret)
	kek := custody.KEKOf(secret)
	defer clear(kek)
	if v, err := custody.CheckValue(kek); err != nil || v != m.Body.CheckValue {
		return errors.Join(err, fmt.Errorf("合成的密钥校验值为 %s，记录为 %s (the restored key's check value is another)", v, m.Body.CheckValue))
	}
	keys, err := macKeys(secret, m.Body.KEK)
	if err != nil {
		return err
	}
	for _, was := range m.Body.MACs {
		if i := slices.IndexFunc(keys, func(k custody.MACKey) bool { return k.Label == was.Label }); i >= 0 && keys[i] != was {
			return fmt.Errorf("合成的 %s 校验值为 %s，记录为 %s (the restored key's check value is another)", was.Label, keys[i].CheckValue, was.CheckValue)
		}
	}
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	place, err := machine.look()
	if err != nil {
		return err
	}
	var undo []func() error
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				err = errors.Join(err, f())
			}
		}
	}()
	there, err := machine.holds(ctx, m, log)
	if err != nil {
		return err
	}
	if there && machine.LogToken == "" {
		return fmt.Errorf("%s 已持有 %s，是同一把；没有要恢复的 (the machine holds the key already, the same; nothing is to be restored)", machine.Name, m.Body.KEK)
	}
	if !there {
		if err := machine.install(m.Body.KEK, kek); err != nil {
			return err
		}
		undo = append(undo, withdraw(ctx, []string{m.Body.KEK}, machine.use, log))
	}
	body := m.Body
	body.Name, body.At, body.Present = "恢复 (restored): "+c.Name, clock.Realtime().UTC().Format(time.RFC3339), present
	for i := range shares {
		body.Present = append(body.Present, shares[i].Holder)
	}
	body.Machines, body.MACs = []custody.Place{place}, nil
	if machine.LogToken != "" {
		made, err := machine.installMACs(ctx, secret, keys, log, out)
		undo = append(undo, withdraw(ctx, made, machine.useLog, log))
		if err != nil {
			return err
		}
		body.MACs = keys
	}
	if err := c.sign(ctx, &custody.Minutes{Body: body}, machine, minutes, log, &undo); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s：已由 %d 份恢复 %s，校验值 %s；记录 %s (restored)\n", machine.Name, len(shares), m.Body.KEK, m.Body.CheckValue, minutes)
	return nil
}

func (c *ceremony) machine(name string) (*ceremonyMachine, error) {
	for i := range c.Machines {
		if c.Machines[i].Name == name {
			return &c.Machines[i], nil
		}
	}
	return nil, usageError{fmt.Errorf("文件中没有密码机 %q (no such machine in the file)", name)}
}

func loadMinutes(name string) (*custody.Minutes, []byte, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, nil, err
	}
	m, err := custody.ParseMinutes(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	return m, b, nil
}

// journal sends minutes to the running appliance.
func journal(ctx context.Context, dir string, minutes []byte) error {
	f := adminFlags{dir: dir, output: "json"}
	a, err := f.client()
	if err != nil {
		return err
	}
	defer a.Close()
	if _, err := a.Ceremony(ctx, wire.Ceremony{Minutes: minutes}); err != nil {
		return explain(err)
	}
	return nil
}

func ceremonyCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "ceremony", Short: "密钥仪式：产生、核对、恢复托管密钥的包装密钥 (the ceremony of the key that wraps custody keys)", Long: `密钥仪式只看一个文件：密码机、标签、保管人、门限、干部、份额写到哪里。两人对照 read 的输出朗读无误后 run。

One file says everything: machines, label, custodians, threshold, officers, where shares go. Two people read it aloud.`})
	var present, shares []string
	var dir, name, minutes string
	var dry bool
	quiet := newLog(logrus.ErrorLevel)
	read := &cobra.Command{Use: "read FILE", Short: "打印供两人朗读 (print it for two people to read aloud)", Args: exactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		c, err := loadCeremony(args[0])
		if err == nil {
			c.read(os.Stdout)
		}
		return err
	}}
	run := &cobra.Command{Use: "run FILE", Short: "执行；--dry-run 只检查 (do it; --dry-run looks only)", Args: exactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		c, err := loadCeremony(args[0])
		if err != nil {
			return err
		}
		c.read(os.Stdout)
		if dry {
			if err := c.prepare(os.Stdout); err != nil {
				return err
			}
			fmt.Println("检查通过；没有出示口令，没有产生密钥 (nothing stands in the way; no PIN was presented and no key made)")
			return nil
		}
		if len(present) < 2 || present[0] == present[1] {
			return usageError{errors.New("需要两名不同的朗读人 --read-by (two people who read it aloud: --read-by, twice)")}
		}
		if err := guard(os.Stdout); err != nil {
			return err
		}
		m, err := c.run(cmd.Context(), present, os.Stdout, quiet)
		if err != nil {
			return err
		}
		fmt.Printf("完成。校验值 (check value): %s；记录 (minutes): %s\n", m.Body.CheckValue, c.Minutes)
		if dir == "" {
			fmt.Printf("下一步 next: yinjian ceremony journal %s --dir DIR；config.toml 写 hsm.custody\n", c.Minutes)
			return nil
		}
		_, b, err := loadMinutes(c.Minutes)
		if err == nil {
			err = journal(cmd.Context(), dir, b)
		}
		return err
	}}
	run.Flags().BoolVar(&dry, "dry-run", false, "只检查，不出示口令，不产生密钥 (look only)")
	verify := &cobra.Command{Use: "verify FILE", Short: "核对各密码机持有同一把密钥、份额属于这一套 (do the machines hold the one key; are shares of this set)", Args: exactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		c, err := loadCeremony(args[0])
		if err != nil {
			return err
		}
		m, _, err := loadMinutes(c.Minutes)
		if err != nil {
			return err
		}
		if err := guard(os.Stdout); err != nil {
			return err
		}
		for _, name := range shares {
			holders := m.Body.Custodians
			if b, err := os.ReadFile(name); err == nil && m.Body.Officers != nil && strings.Contains(string(b), "purpose: "+custody.PurposeOfficers) {
				holders = m.Body.Officers.Holders
			}
			read, err := readShares([]string{name}, holders)
			if err != nil {
				return err
			}
			fmt.Printf("%s：第 %d 份属于这一套 (is of this set)\n", read[0].Holder, read[0].Number)
			read[0].Wipe()
		}
		return verifyMachines(cmd.Context(), c.Machines, m, os.Stdout, quiet)
	}}
	restore := &cobra.Command{Use: "restore FILE", Short: "由保管人的份额在另一台密码机、另一院区恢复 (restore to another machine or campus from custodians' shares)", Args: exactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		c, err := loadCeremony(args[0])
		if err != nil {
			return err
		}
		machine, err := c.machine(name)
		if err != nil {
			return err
		}
		m, _, err := loadMinutes(c.Minutes)
		if err != nil {
			return err
		}
		if err := guard(os.Stdout); err != nil {
			return err
		}
		return c.restore(cmd.Context(), machine, m, shares, present, minutes, os.Stdout, quiet)
	}}
	send := &cobra.Command{Use: "journal MINUTES", Short: "把记录写入设备的日志 (have the appliance journal the minutes)", Args: exactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		_, b, err := loadMinutes(args[0])
		if err == nil {
			err = journal(cmd.Context(), dir, b)
		}
		if err == nil {
			fmt.Println("已记入日志 (journalled)")
		}
		return err
	}}
	rederive := &cobra.Command{Use: "rederive", Short: "把应用与无 PIN 的签名人改由仪式的 MAC 密钥派生，密钥不变 (bring applications and signers without a PIN under the ceremony's MAC keys)", Args: exactArgs(0), RunE: func(cmd *cobra.Command, args []string) error {
		f := adminFlags{dir: dir, output: "json"}
		a, err := f.client()
		if err != nil {
			return err
		}
		defer a.Close()
		answer, err := a.Rederive(cmd.Context())
		if err != nil {
			return explain(err)
		}
		var r account.Rederivation
		if err := json.Unmarshal(answer, &r); err != nil {
			return err
		}
		fmt.Printf("已改 %d 项 (done): %s\n", len(r.Done), strings.Join(r.Done, " "))
		fmt.Printf("另有 %d 名签名人有 PIN，下次输 PIN 时随之改 (signers who follow with their next PIN)\n", r.Waiting)
		if len(r.Elsewhere) > 0 {
			fmt.Printf("须在另一院区改的 (to be done at the other campus): %s\n", strings.Join(r.Elsewhere, " "))
		}
		return nil
	}}
	for _, c := range []*cobra.Command{run, restore} {
		c.Flags().StringArrayVar(&present, "read-by", nil, "朗读并核对本文件的人，两次 (who read the file aloud; twice)")
	}
	for _, c := range []*cobra.Command{verify, restore} {
		c.Flags().StringArrayVar(&shares, "share", nil, "份额的文件，可重复 (file with a share, repeatable)")
	}
	run.Flags().StringVar(&dir, "dir", "", "运行中设备的目录，完成后记入其日志 (the running appliance's folder, to journal the minutes)")
	required(send, &dir, "dir", "运行中设备的目录 (the running appliance's folder)")
	required(rederive, &dir, "dir", "运行中设备的目录 (the running appliance's folder)")
	required(restore, &name, "machine", "文件中密码机的名称 (name of the machine in the file)")
	required(restore, &minutes, "minutes", "恢复的记录写入的文件 (file for the minutes of the restoration)")
	c.AddCommand(read, run, verify, restore, send, rederive)
	return c
}
