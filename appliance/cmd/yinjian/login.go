package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
)

// sessionFile is where the session of this user with the appliance of a folder is: in the user's runtime folder, which is in
// memory, or below the appliance's.
func sessionFile(dir string) string {
	if elsewhere(dir) {
		dir = strings.TrimSuffix(dir, "/")
		run := os.Getenv("XDG_RUNTIME_DIR")
		if run == "" {
			run, _ = os.UserCacheDir() // where there is none, checkElsewhere has refused
		}
		sum := sha256.Sum256([]byte(dir))
		return filepath.Join(run, fmt.Sprintf("yinjian-%x.session", sum[:8]))
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		abs = dir
	}
	if run := os.Getenv("XDG_RUNTIME_DIR"); run != "" {
		sum := sha256.Sum256([]byte(abs))
		return filepath.Join(run, fmt.Sprintf("yinjian-%x.session", sum[:8]))
	}
	return filepath.Join(abs, "run", "session-"+strconv.Itoa(os.Getuid()))
}

// checkElsewhere refuses where a session would lie open.
func checkElsewhere() error {
	if os.Getenv("XDG_RUNTIME_DIR") != "" {
		return nil
	}
	if _, err := os.UserCacheDir(); err != nil {
		return fmt.Errorf("会话没有可存的私有目录，请设 XDG_RUNTIME_DIR (no private folder for the session): %w", err)
	}
	return nil
}

// session is the token that a login left, "" without one. A file that others may read is none.
func session(dir string) string {
	if dir == "" {
		return ""
	}
	b, err := appliance.ReadSecret(sessionFile(dir))
	if err != nil {
		return ""
	}
	token, _, _ := strings.Cut(string(b), "\n")
	return token
}

// visit is what a login at an address left: the session, and how the appliance there proves itself.
func visit(dir string) (token string, t trust, err error) {
	if err := checkElsewhere(); err != nil {
		return "", t, err
	}
	var b []byte
	st, err := os.Lstat(sessionFile(dir))
	if err == nil {
		if owner, ok := st.Sys().(*syscall.Stat_t); !ok || !st.Mode().IsRegular() || int(owner.Uid) != os.Getuid() {
			return "", t, fmt.Errorf("%s: 不是本用户的文件 (is not this user's file)", sessionFile(dir))
		}
		b, err = appliance.ReadSecret(sessionFile(dir))
	}
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("没有登录：请先 yinjian login --dir %s --fingerprint 控制台上的证书指纹 --name 登录名 (nobody has logged in there)", dir)
	}
	if err != nil {
		return "", t, err
	}
	token, how, _ := strings.Cut(string(b), "\n")
	if kind, value, _ := strings.Cut(how, " "); kind == "fingerprint" {
		t.fingerprint = value
	} else {
		t.ca = value
	}
	return token, t, nil
}

// kept is t as [visit] reads it.
func (t *trust) kept() (string, error) {
	if t.fingerprint != "" {
		return "fingerprint " + t.fingerprint, nil
	}
	ca, err := filepath.Abs(t.ca)
	return "ca " + ca, err
}

// awaiting says that a request waits for a second person, who calls the appliance at that address, if it has one.
func awaiting(at string) func(wire.Proposed) {
	if at != "" {
		at = " --dir " + at
	}
	return func(p wire.Proposed) { awaits(p, at) }
}

func awaits(p wire.Proposed, at string) {
	fmt.Fprintf(os.Stderr, "须由第二名管理员（%s）批准；一小时内有效，设备重启即失效 (waits for a second administrator, an hour at most)\n  yinjian approval approve %s --sm3 %s%s\n",
		strings.Join(p.Approvers, "、"), p.Proposal, p.SM3, at)
}

func loginCommand() *cobra.Command {
	var f adminFlags
	var name, passwordFile, keyFile string
	var u ukey
	var by trust
	c := &cobra.Command{Use: "login --name NAME", Short: "管理员登录，此后的管理命令以其身份执行 (log in; later commands are this administrator's)", Args: exactArgs(0),
		Long: `会话存于 $XDG_RUNTIME_DIR（没有时在设备目录的 run 下），权限 600；空闲 15 分钟、至多 8 小时，设备重启、口令更改或停用即结束。
没有命令行的设备（封闭镜像）：--dir 写它的管理地址 https://设备:端口，另给 --fingerprint（它控制台上的证书指纹）或 --ca；此后各命令的 --dir 也写这个地址。会话存于
$XDG_RUNTIME_DIR（没有时在用户的缓存目录）。
口令在终端上输入，不显示；或取自 --password-file。
管理员登记了登录证书的，另以其私钥签名：在 UKey 里（--module，厂商的 PKCS#11 模块；口令只出示一次，错了不再试），或在文件里（--key，PKCS#8 PEM，
SM2；仅供评估）。

An appliance without a shell is named by the administrators' address, here and in later commands: --dir https://host:port.
The password is asked for on the terminal, or read from a file. A login that has to be signed is signed by a UKey through its
vendor's PKCS#11 module (its PIN is presented once), or with a key file, for evaluation. The session ends after 15 minutes idle or 8 hours, and with a restart or any change of the administrator.`,
		RunE: func(c *cobra.Command, _ []string) error {
			var a *client.Admin
			mark := ""
			if elsewhere(f.dir) {
				conf, err := by.config()
				if err == nil {
					mark, err = by.kept()
				}
				if err == nil {
					err = errors.Join(checkElsewhere(), f.checkOutput())
				}
				if err != nil {
					return err
				}
				a = client.NewAdminTLS(strings.TrimSuffix(f.dir, "/"), conf)
			} else {
				if by != (trust{}) {
					return usageError{errors.New("--ca、--fingerprint 只用于 https:// 的 --dir (mean nothing for a folder)")}
				}
				var err error
				if a, err = f.client(); err != nil {
					return err
				}
			}
			defer a.Close()
			a = a.WithSession("", nil)
			password, err := secretOf(c.Context(), passwordFile, "password-file", name+" 的口令 (password)", false)
			if err != nil {
				return err
			}
			req := wire.Login{Name: name, Password: string(password)}
			if u.module != "" {
				req.Signature, err = u.sign(c.Context(), func(ctx context.Context) (_ []byte, err error) {
					req.Challenge, err = a.LoginChallenge(ctx)
					return req.Challenge, err
				})
				if err != nil {
					return explain(err)
				}
			}
			if keyFile != "" {
				if err := signLogin(c.Context(), a, keyFile, &req); err != nil {
					return explain(err)
				}
			}
			in, err := a.Login(c.Context(), req)
			if err != nil {
				return explain(err)
			}
			if err := keepSession(sessionFile(f.dir), strings.TrimSpace(in.Session+"\n"+mark)); err != nil {
				return err
			}
			in.Session = ""
			b, err := json.Marshal(in)
			if err != nil {
				return err
			}
			return f.show(b)
		}}
	f.add(c)
	c.Flags().StringVar(&by.ca, "ca", "", "--dir 是地址时：设备 TLS 证书的信任锚，PEM (where --dir is an address: the anchor of its TLS certificate)")
	c.Flags().StringVar(&by.fingerprint, "fingerprint", "", "--dir 是地址时：设备控制台上的证书指纹，SHA-256 (where --dir is an address: the fingerprint on its console)")
	c.MarkFlagsMutuallyExclusive("ca", "fingerprint")
	required(c, &name, "name", "登录名 (the administrator's id)")
	c.Flags().StringVar(&passwordFile, "password-file", "", "口令文件，权限 600；缺省在终端输入 (file with the password, mode 600; default: asked for on the terminal)")
	c.Flags().StringVar(&keyFile, "key", "", "登录证书的私钥，PKCS#8 PEM，权限 600；仅供评估 (private key of the login certificate; evaluation)")
	u.add(c)
	c.MarkFlagsMutuallyExclusive("module", "key")
	return c
}

// keepSession writes a file that is new, so that nobody else has it open.
func keepSession(name, token string) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	file, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(token + "\n")
	return errors.Join(err, file.Close())
}

// readSM2Private reads a private key, PKCS#8 in PEM, that nobody else may read.
func readSM2Private(keyFile string) (*sm2.PrivateKey, error) {
	b, err := appliance.ReadSecret(keyFile)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s: 不是 PEM (not PEM)", keyFile)
	}
	defer clear(block.Bytes)
	parsed, err := smx509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyFile, err)
	}
	key, ok := parsed.(*sm2.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: 不是 SM2 私钥 (not an SM2 key)", keyFile)
	}
	return key, nil
}

// signLogin has the administrator's key sign a challenge of the appliance's.
func signLogin(ctx context.Context, a *client.Admin, keyFile string, req *wire.Login) error {
	key, err := readSM2Private(keyFile)
	if err != nil {
		return err
	}
	if req.Challenge, err = a.LoginChallenge(ctx); err != nil {
		return err
	}
	req.Signature, err = key.Sign(rand.Reader, append([]byte(account.LoginPrefix), req.Challenge...), sm2.DefaultSM2SignerOpts)
	return err
}

func logoutCommand() *cobra.Command {
	var f adminFlags
	c := &cobra.Command{Use: "logout", Short: "退出登录 (log out)", Args: exactArgs(0), RunE: func(c *cobra.Command, _ []string) error {
		if session(f.dir) == "" {
			return errors.New("没有登录 (nobody has logged in)")
		}
		a, err := f.client()
		if err != nil {
			return err
		}
		defer a.Close()
		_, err = a.Logout(c.Context())
		if client.Is(err, "login_required") { // it had ended
			err = nil
		}
		return errors.Join(err, os.Remove(sessionFile(f.dir)))
	}}
	f.add(c)
	return c
}

func administratorCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "admin", Short: "管理员：三员的设立、登记、启停、口令、证书 (administrators)"})
	var add wire.AddAdministrator
	var passwordFile, oldFile, certificate, reason string
	var none bool
	why := func(c *cobra.Command) { required(c, &reason, "reason", "原因，记入日志 (why, for the journal)") }
	secret := func(c *cobra.Command) {
		c.Flags().StringVar(&passwordFile, "password-file", "", "口令文件，权限 600；缺省在终端输入两次 (file with the password, mode 600; default: asked for on the terminal, twice)")
	}
	fresh := func(ctx context.Context, who string) ([]byte, error) {
		return secretOf(ctx, passwordFile, "password-file", who+" 的新口令 (new password)", true)
	}
	change := func(act string) func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
		return func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			return a.ChangeAdministrator(ctx, act, wire.Decision{ID: args[0], Reason: reason})
		}
	}
	c.AddCommand(
		bootstrapCommand(),
		adminCommand("list", "列出管理员 (list)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListAdministrators(ctx)
		}),
		adminCommand("add ID", "登记管理员，首次登录须改口令 (add; the password is changed at the first login)", 1, func(c *cobra.Command) {
			secret(c)
			required(c, &add.Name, "name", "姓名 (name)")
			required(c, &add.Role, "role", "system、security、audit 或 operator (role)")
			c.Flags().StringVar(&certificate, "certificate", "", "登录证书文件，SM2 (certificate that logins are signed with)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			b, err := fresh(ctx, args[0])
			if err != nil {
				return nil, err
			}
			add.ID, add.Password = args[0], string(b)
			if certificate != "" {
				if add.Certificate, err = os.ReadFile(certificate); err != nil {
					return nil, err
				}
			}
			return a.AddAdministrator(ctx, add)
		}),
		adminCommand("stop ID", "停用，其会话立即结束 (stop; sessions end at once)", 1, why, change("stop")),
		adminCommand("start ID", "启用 (start)", 1, why, change("start")),
		adminCommand("reset ID", "重置别人的口令，解除锁定；其登录后须更改 (set another's password, end a lock-out)", 1, secret, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			b, err := fresh(ctx, args[0])
			if err != nil {
				return nil, err
			}
			return a.SetAdministratorPassword(ctx, wire.SetAdministratorPassword{ID: args[0], Password: string(b)})
		}),
		adminCommand("password", "更改本人口令，之后须重新登录 (change one's own password, then log in again)", 0, func(c *cobra.Command) {
			secret(c)
			c.Flags().StringVar(&oldFile, "old-password-file", "", "现有口令的文件；缺省在终端输入 (file with the present password; default: asked for on the terminal)")
		}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			old, err := secretOf(ctx, oldFile, "old-password-file", "现有口令 (present password)", false)
			if err != nil {
				return nil, err
			}
			b, err := fresh(ctx, "本人")
			if err != nil {
				return nil, err
			}
			return a.ChangePassword(ctx, wire.ChangePassword{Old: string(old), Password: string(b)})
		}),
		adminCommand("certificate ID", "设定登录证书：此后口令与签名缺一不可 (set what logins are signed with, beside the password)", 1, func(c *cobra.Command) {
			c.Flags().StringVar(&certificate, "file", "", "证书文件，SM2 (the certificate)")
			c.Flags().BoolVar(&none, "none", false, "不再需要 (none any more)")
			c.MarkFlagsOneRequired("file", "none")
			c.MarkFlagsMutuallyExclusive("file", "none")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			req := wire.SetAdministratorCertificate{ID: args[0]}
			if !none {
				var err error
				if req.Certificate, err = os.ReadFile(certificate); err != nil {
					return nil, err
				}
			}
			return a.SetAdministratorCertificate(ctx, req)
		}),
	)
	return c
}

func bootstrapCommand() *cobra.Command {
	of := map[string]*string{}
	roles := []string{"system", "security", "audit"}
	c := adminCommand("bootstrap", "设立首批三员，只能一次，经本机套接字 (the first three administrators, once, over the local socket)", 0, func(c *cobra.Command) {
		for _, role := range roles {
			of[role] = new(string)
			required(c, of[role], role, "登录名:姓名[:口令文件]，缺省在终端输入两次 (id:name[:password file]; default: asked for on the terminal, twice)")
		}
	}, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		var req wire.BootstrapAdministrators
		for _, role := range roles {
			part := append(strings.SplitN(*of[role], ":", 3), "")
			if len(part) < 3 {
				return nil, usageError{fmt.Errorf("--%s 须为 登录名:姓名[:口令文件] (id:name[:password file])", role)}
			}
			b, err := secretOf(ctx, part[2], role+" 登录名:姓名:口令文件", part[0]+" 的新口令 (new password)", true)
			if err != nil {
				return nil, err
			}
			req.Administrators = append(req.Administrators, wire.AddAdministrator{ID: part[0], Name: part[1], Role: role, Password: string(b)})
		}
		return a.BootstrapAdministrators(ctx, req)
	})
	return c
}

func approvalCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "approval", Short: "双人事项：列出、批准、否决 (what needs two persons)"})
	var req wire.Decide
	flags := func(c *cobra.Command) {
		required(c, &req.SM3, "sm3", "所看的那一项的 SM3 (of the proposal that was looked at)")
		c.Flags().StringVar(&req.Reason, "reason", "", "说明，记入日志 (for the journal)")
	}
	decide := func(act string) func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
		return func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			req.ID = args[0]
			return a.Decide(ctx, act, req)
		}
	}
	c.AddCommand(
		adminCommand("list", "列出待批事项：路由、内容（不含秘密）、SM3 (list, with contents but secrets)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListProposals(ctx)
		}),
		adminCommand("approve ID", "批准，随即执行 (approve; it is done at once)", 1, flags, decide("approve")),
		adminCommand("decline ID", "否决，或撤回本人提出的 (decline, or withdraw one's own)", 1, flags, decide("decline")),
	)
	return c
}
