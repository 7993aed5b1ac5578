package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/emmansun/gmsm/sm2"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/appliance/account"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

// challengeSize is that of a login's challenge, in bytes.
const challengeSize = 32

// A ukey is an administrator's PKCS#11 token: a UKey (智能密码钥匙) with its vendor's module. This process loads the module, which is
// nothing to the appliance.
type ukey struct {
	module, moduleArgs, profile, label, slot, key, pinFile string
}

func (u *ukey) add(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&u.module, "module", "", "UKey 厂商的 PKCS#11 模块：以 UKey 里的登录密钥签名 (the UKey vendor's PKCS#11 module)")
	f.StringVar(&u.moduleArgs, "module-args", "", "C_Initialize 的 pReserved，例如 socket='…' (passed to C_Initialize)")
	f.StringVar(&u.profile, "profile", "neutral", "厂商档案，名称或文件，见 docs/hsm.md (vendor profile, by name or file)")
	f.StringVar(&u.label, "token-label", "", "令牌标签；只有一个已初始化的令牌时可省 (not needed where one token is initialised)")
	f.StringVar(&u.slot, "slot", "", "槽位号 CK_SLOT_ID，代替标签 (in place of the label)")
	f.StringVar(&u.key, "key-label", "", "密钥标签 CKA_LABEL；只有一个 SM2 密钥时可省 (not needed where there is one SM2 key)")
	f.StringVar(&u.pinFile, "pin-file", "", "UKey 口令的文件，权限 600；缺省在终端输入 (file with the PIN; default: asked for on the terminal)")
	c.MarkFlagsMutuallyExclusive("token-label", "slot")
}

func ukeyCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "ukey", Short: "UKey：为控制台的登录签名 (UKeys: sign for a login at the console)"})
	var u ukey
	var challenge, out string
	sign := &cobra.Command{Use: "sign", Short: "以 UKey 签控制台登录页给出的挑战 (sign the challenge that the console's login shows)", Args: exactArgs(0),
		Long: `在插着 UKey 的机器上运行，不需要设备目录：签登录页“使用登录证书”给出的挑战，把写出的签名文件交回登录页。签的是固定前缀加挑战，不会签别的。
口令只出示一次，错了不再试。

Runs on the machine that has the UKey, without the appliance: signs the challenge that the login page shows, for the page to take.`,
		RunE: func(c *cobra.Command, _ []string) error {
			b, err := base64.StdEncoding.DecodeString(challenge)
			if err != nil || len(b) != challengeSize {
				return usageError{fmt.Errorf("--challenge 须为登录页给出的 Base64，%d 字节 (what the login page shows: Base64 of %d bytes)", challengeSize, challengeSize)}
			}
			signature, err := u.sign(c.Context(), func(context.Context) ([]byte, error) { return b, nil })
			if err != nil {
				return err
			}
			if err := os.WriteFile(out, signature, 0o600); err != nil {
				return err
			}
			fmt.Printf("签名已写出 (written): %s\n", out)
			return nil
		}}
	u.add(sign)
	_ = sign.MarkFlagRequired("module")
	required(sign, &challenge, "challenge", "登录页给出的挑战，Base64 (the challenge, Base64)")
	required(sign, &out, "out", "签名文件 (file for the signature)")
	c.AddCommand(sign)
	return c
}

// find answers the token's label. One that is locked is not tried, and neither is one with a single try left: a person should
// see to that with the vendor's program, where a slip costs less.
func (u *ukey) find() (string, error) {
	infos, err := pkcs11.ListSlots(u.module, u.moduleArgs)
	if err != nil {
		return "", err
	}
	fits := slices.DeleteFunc(slices.Clone(infos), func(i hsm.TokenInfo) bool {
		return !i.Initialized || u.label != "" && i.Label != u.label
	})
	if u.slot != "" {
		n, err := strconv.ParseUint(u.slot, 0, 64)
		if err != nil {
			return "", usageError{fmt.Errorf("--slot %s：须为数 (must be a number)", u.slot)}
		}
		fits = slices.DeleteFunc(fits, func(i hsm.TokenInfo) bool { return uint64(i.Slot) != n })
	}
	if len(fits) != 1 {
		return "", fmt.Errorf("有 %d 个符合的令牌，须恰好一个：%s；用 --token-label 或 --slot 指明 (tokens that fit, where one is needed)", len(fits), tokenNames(infos))
	}
	i := fits[0]
	switch {
	case slices.ContainsFunc(infos, func(o hsm.TokenInfo) bool { return o.Initialized && o.Label == i.Label && o.Slot != i.Slot }):
		return "", fmt.Errorf("有两个标签为 %s 的令牌：拔下另一个 (two tokens have this label: take the other one out)", i.Label)
	case i.UserPINLocked:
		return "", fmt.Errorf("UKey %s 的口令已锁定：用厂商工具解锁 (its PIN is locked: unlock it with the vendor's program)", i.Label)
	case i.UserPINFinalTry:
		return "", fmt.Errorf("UKey %s 的口令只剩最后一次：未出示；先用厂商工具输对一次 (one try is left and was not used: enter the PIN with the vendor's program first)", i.Label)
	}
	return i.Label, nil
}

func tokenNames(infos []hsm.TokenInfo) string {
	var out []string
	for _, i := range infos {
		out = append(out, fmt.Sprintf("%#x=%q", i.Slot, i.Label))
	}
	return strings.Join(out, "、")
}

// sign has the token sign a challenge of the appliance's, which is asked for when the token is ready: it is good for two
// minutes. The PIN is presented once, whatever becomes of it.
func (u *ukey) sign(ctx context.Context, challenge func(context.Context) ([]byte, error)) ([]byte, error) {
	return u.signed(ctx, func(ctx context.Context) ([]byte, error) {
		asked, err := challenge(ctx)
		return append([]byte(account.LoginPrefix), asked...), err
	})
}

// signed has the token sign a message, which is asked for when the token is ready.
func (u *ukey) signed(ctx context.Context, message func(context.Context) ([]byte, error)) (signature []byte, err error) {
	if u.module, err = filepath.Abs(u.module); err != nil {
		return nil, err
	}
	profile, err := pkcs11.ProfileByName(u.profile)
	if err != nil {
		return nil, usageError{err}
	}
	label, err := u.find()
	if err != nil {
		return nil, err
	}
	pin, err := secretOf(ctx, u.pinFile, "pin-file", "UKey "+label+" 的口令 (its PIN)", false)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	token, err := pkcs11.Open(ctx, pkcs11.Config{Module: u.module, ModuleArgs: u.moduleArgs, TokenLabel: label, PIN: pin, Profile: profile, MaxSessions: 1, Log: newLog(logrus.ErrorLevel)})
	if errors.Is(err, hsm.ErrNeedsOperator) {
		return nil, fmt.Errorf("UKey 拒绝了口令；只出示了一次，未再试 (the UKey has refused the PIN; it was presented once): %w", err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	key, err := u.keyOf(ctx, token)
	if err != nil {
		return nil, err
	}
	asked, err := message(ctx)
	if err != nil {
		return nil, err
	}
	return key.SignContext(ctx, asked, sm2.DefaultSM2SignerOpts)
}

// keyOf finds the SM2 key that logins are signed with.
func (u *ukey) keyOf(ctx context.Context, token hsm.Token) (*hsm.Key, error) {
	label := u.key
	if label == "" {
		keys, err := token.Keys(ctx)
		if err != nil {
			return nil, err
		}
		var labels []string
		for _, k := range keys {
			if k.Algorithm == hsm.SM2 {
				labels = append(labels, k.Label)
			}
		}
		if len(labels) != 1 {
			return nil, fmt.Errorf("UKey 里有 %d 个 SM2 密钥，用 --key-label 指明：%s (SM2 keys in it; name one)", len(labels), strings.Join(labels, "、"))
		}
		label = labels[0]
	}
	key, err := hsm.NewKey(ctx, token, label, true)
	if err == nil && key.Algorithm() != hsm.SM2 {
		err = fmt.Errorf("密钥 %s 不是 SM2 (not an SM2 key)", label)
	}
	return key, err
}
