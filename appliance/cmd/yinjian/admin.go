package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
)

// The administration commands speak to the running appliance over its local socket: the journal has one writer.

// adminFlags are shared by all of them.
type adminFlags struct {
	dir, output string
}

func (f *adminFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.dir, "dir", "", "设备目录；没有命令行的设备，其管理地址 https://设备:端口，先 login (the appliance's folder, or the administrators' address of one without a shell, after a login)")
	c.Flags().StringVarP(&f.output, "output", "o", "text", "text 或 json (text or json)")
	_ = c.MarkFlagRequired("dir")
}

func (f *adminFlags) checkOutput() error {
	if f.output != "text" && f.output != "json" {
		return usageError{fmt.Errorf("-o %s：须为 text 或 json (must be text or json)", f.output)}
	}
	return nil
}

// beside is where a file goes that belongs to the appliance: into its folder, or from one elsewhere into the working folder.
func (f *adminFlags) beside(names ...string) string {
	if elsewhere(f.dir) {
		return names[len(names)-1]
	}
	return filepath.Join(append([]string{f.dir}, names...)...)
}

func (f *adminFlags) client() (*client.Admin, error) {
	if err := f.checkOutput(); err != nil {
		return nil, err
	}
	if elsewhere(f.dir) {
		token, by, err := visit(f.dir)
		if err != nil {
			return nil, err
		}
		conf, err := by.config()
		if err != nil {
			return nil, err
		}
		return client.NewAdminTLS(strings.TrimSuffix(f.dir, "/"), conf).WithSession(token, awaiting(f.dir)), nil
	}
	socket := appliance.AdminSocket(f.dir)
	probe, err := net.DialTimeout("unix", socket, 5*time.Second) // a killed appliance leaves its socket behind
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("设备未在运行：请先 yinjian serve --dir %s (the appliance is not running)", f.dir)
	case err != nil:
		return nil, err
	}
	if err := probe.Close(); err != nil {
		return nil, err
	}
	return client.NewAdmin(socket).WithSession(session(f.dir), awaiting("")), nil
}

// show prints an answer: JSON as it is, or as lines of "key: value".
func (f *adminFlags) show(answer json.RawMessage) error {
	if f.output == "json" {
		var b bytes.Buffer
		if err := json.Indent(&b, answer, "", "  "); err != nil {
			return err
		}
		fmt.Println(b.String())
		return nil
	}
	var v any
	dec := json.NewDecoder(bytes.NewReader(answer))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return err
	}
	printValue(os.Stdout, "", v)
	return nil
}

func adminCommand(use, short string, args int, flags func(*cobra.Command), run func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error)) *cobra.Command {
	var f adminFlags
	c := &cobra.Command{Use: use, Short: short, Args: exactArgs(args), RunE: func(c *cobra.Command, args []string) error {
		a, err := f.client()
		if err != nil {
			return err
		}
		defer a.Close()
		answer, err := run(c.Context(), a, args)
		if err != nil {
			return explain(err)
		}
		return f.show(answer)
	}}
	f.add(c)
	if flags != nil {
		flags(c)
	}
	return c
}

// explain adds the next step to a refusal.
func explain(err error) error {
	var p *client.Problem
	if errors.As(err, &p) {
		field := ""
		if p.Field != "" {
			field = " " + p.Field
		}
		return fmt.Errorf("%s [%s%s]\n  下一步 (next): %s", p.Detail, p.Code, field, p.Next)
	}
	return err
}

// required adds a flag that must be given: what is missing is told before anything is asked of the appliance.
func required(c *cobra.Command, v *string, name, what string) {
	c.Flags().StringVar(v, name, "", what+"；必填 (required)")
	_ = c.MarkFlagRequired(name) // the flag is there
}

func applicationCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "app", Short: "应用：登记、停用、列出 (applications)"})
	var req wire.RegisterApplication
	var keyFile string
	var f adminFlags
	register := &cobra.Command{
		Use: "register ID", Short: "登记应用，密钥只写入文件一次 (register; the HMAC key is written to a file, once)", Args: exactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			a, err := f.client()
			if err != nil {
				return err
			}
			defer a.Close()
			req.ID = args[0]
			if keyFile == "" {
				keyFile = f.beside("credentials", req.ID+".json")
			}
			if err := register(c.Context(), a, req, keyFile); err != nil {
				return explain(err)
			}
			fmt.Printf("应用 %s 已登记；凭据 (credentials): %s\n", req.ID, keyFile)
			return nil
		},
	}
	f.add(register)
	required(register, &req.Name, "name", "名称 (name)")
	required(register, &req.Campus, "campus", "院区 (campus)")
	register.Flags().StringSliceVar(&req.Rights, "rights", []string{"sign", "verify", "timestamp"}, "权限 (rights)")
	register.Flags().StringSliceVar(&req.Consent, "consent", []string{"signer-pin"}, "可接受的同意方式 (accepted methods of consent)")
	register.Flags().StringVar(&req.Stamp, "stamp", "required", "时间戳策略 required 或 none (stamp policy)")
	register.Flags().IntVar(&req.Rate, "rate", 0, "每秒请求数上限；0 取配置的 policy.rate (requests a second; 0: the configuration's)")
	register.Flags().IntVar(&req.Burst, "burst", 0, "突发请求数上限；0 为 rate 的两倍或配置的 policy.burst (requests at once; 0: twice the rate, or the configuration's)")
	register.Flags().IntVar(&req.HSMRate, "hsm-rate", 0, "每秒签名数上限；0 取配置的 policy.hsm_rate (signatures a second; 0: the configuration's)")
	register.Flags().IntVar(&req.HSMSessions, "hsm-sessions", 0, "同时签名数上限；0 取配置的 policy.hsm_sessions (signatures at once; 0: the configuration's)")
	register.Flags().BoolVar(&req.Test, "test", false, "测试应用，记录带测试标记 (a test application)")
	register.Flags().BoolVar(&req.Production, "production", false, "生产应用，拒绝测试签名人 (an application of production: test signers are refused)")
	register.Flags().StringVar(&keyFile, "key-file", "", "凭据文件，缺省在设备目录的 credentials 下 (default: below the folder)")
	var reason string
	var limits wire.LimitApplication
	var bind wire.BindClient
	var bindFile string
	var production wire.SetProduction
	var off bool
	c.AddCommand(register,
		adminCommand("production ID", "标为生产应用，从此拒绝测试签名人 (an application of production refuses test signers)", 1, func(c *cobra.Command) {
			c.Flags().BoolVar(&off, "off", false, "取消标记 (take the mark away)")
			required(c, &production.Reason, "reason", "原因，记入日志 (why, for the journal)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			production.ID, production.Production = args[0], !off
			return a.SetProduction(ctx, production)
		}),
		adminCommand("certificate ID", "登记客户端证书：此后须以它连接 (bind to a TLS client certificate)", 1, func(c *cobra.Command) {
			c.Flags().StringVar(&bindFile, "file", "", "证书文件；按公钥登记可含换发前后的几张 (file with certificates)")
			c.Flags().StringVar(&bind.By, "by", account.BindByKey, "key 按公钥；subject 按主题，须属于用途为 client 的信任锚；none 取消 (key, subject below an anchor for clients, or none)")
			c.Flags().BoolVar(&bind.Alone, "alone", false, "只凭证书，不再要 HMAC-SM3 (the certificate alone, without HMAC-SM3)")
			required(c, &bind.Reason, "reason", "原因，记入日志 (why, for the journal)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			bind.ID = args[0]
			if (bindFile == "") != (bind.By == account.BindByNone) {
				return nil, usageError{errors.New("--file 与 --by none 恰好给一个 (give --file, or --by none)")}
			}
			if bindFile != "" {
				var err error
				if bind.Certificate, err = os.ReadFile(bindFile); err != nil {
					return nil, err
				}
			}
			return a.BindClient(ctx, bind)
		}),
		adminCommand("limit ID", "设定应用的请求与签名速率，立即生效 (set how much it may ask for; counts at once)", 1, func(c *cobra.Command) {
			c.Flags().IntVar(&limits.Rate, "rate", 0, "每秒请求数；0 恢复缺省 (requests a second; 0: the default again)")
			c.Flags().IntVar(&limits.Burst, "burst", 0, "突发请求数；0 恢复缺省 (requests at once; 0: the default again)")
			c.Flags().IntVar(&limits.HSMRate, "hsm-rate", 0, "每秒签名数；0 恢复缺省 (signatures a second; 0: the default again)")
			c.Flags().IntVar(&limits.HSMSessions, "hsm-sessions", 0, "同时签名数；0 恢复缺省 (signatures at once; 0: the default again)")
			required(c, &limits.Reason, "reason", "原因，记入日志 (why, for the journal)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			limits.ID = args[0]
			return a.LimitApplication(ctx, limits)
		}),
		adminCommand("list", "列出应用 (list)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListApplications(ctx)
		}),
		adminCommand("stop ID", "停用应用 (stop)", 1, func(c *cobra.Command) { required(c, &reason, "reason", "原因，记入日志 (why, for the journal)") },
			func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
				return a.StopApplication(ctx, wire.Decision{ID: args[0], Reason: reason})
			}))
	return c
}

// A credential is what an application needs to call: its id and HMAC key.
type credential struct {
	Application string `json:"application"`
	Key         string `json:"key_hex"` // HMAC-SM3 key, hex
}

// register registers an application and leaves its credential in a new file.
func register(ctx context.Context, a *client.Admin, req wire.RegisterApplication, keyFile string) error {
	if err := os.MkdirAll(filepath.Dir(keyFile), 0o700); err != nil {
		return err
	}
	// The file comes first: a key that could not be written down would be lost.
	file, err := os.OpenFile(keyFile, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	r, err := a.RegisterApplication(ctx, req)
	if err != nil {
		file.Close()
		os.Remove(keyFile)
		return err
	}
	enc := json.NewEncoder(file)
	enc.SetIndent("", "  ")
	err = enc.Encode(credential{Application: req.ID, Key: hex.EncodeToString(r.Key)})
	return errors.Join(err, file.Sync(), file.Close())
}

func signerCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "signer", Short: "签名人：登记、PIN、启停、列出 (signers)"})
	var req wire.EnrolSigner
	var key wire.AddSignerKey
	var pinFile, oldPIN, reason string
	var shares []string
	ca := func(c *cobra.Command, p *string) {
		c.Flags().StringVar(p, "ca", "evaluation", "证书由谁签发：evaluation 评估 CA，或 external 外部 CA，密钥待证书导入后可用 (who issues: the evaluation CA, or another)")
	}
	pinFlag := func(c *cobra.Command) {
		c.Flags().StringVar(&pinFile, "pin-file", "", "PIN 文件，权限 600 (file with the PIN, mode 600)")
	}
	why := func(c *cobra.Command) { required(c, &reason, "reason", "原因，记入日志 (why, for the journal)") }
	c.AddCommand(
		adminCommand("enrol ID", "登记签名人：在密码机内生成密钥并签发评估证书 (enrol: keys in the cipher machine, evaluation certificates)", 1, func(c *cobra.Command) {
			pinFlag(c)
			required(c, &req.Name, "name", "姓名 (name)")
			required(c, &req.Department, "department", "科室 (department)")
			required(c, &req.Campus, "campus", "院区 (campus)")
			c.Flags().StringSliceVar(&req.Algorithms, "algorithms", []string{"SM2", "RSA-2048"}, "算法 (algorithms)")
			c.Flags().StringVar(&req.Role, "role", "", "岗位 (the post)")
			c.Flags().BoolVar(&req.Test, "test", false, "测试账号，登记后不可改；其记录带测试标记，不计入统计，生产应用拒绝 (an account for tests, for ever)")
			ca(c, &req.CA)
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			req.ID = args[0]
			if pinFile != "" {
				pin, err := appliance.ReadSecret(pinFile)
				if err != nil {
					return nil, err
				}
				req.PIN = string(pin)
			}
			return a.EnrolSigner(ctx, req)
		}),
		signerImportCommand(),
		adminCommand("add-key ID", "为已登记的签名人增加另一种算法的密钥 (a key of another algorithm for one who is enrolled)", 1, func(c *cobra.Command) {
			required(c, &key.Algorithm, "algorithm", "SM2 或 RSA-2048 (algorithm)")
			ca(c, &key.CA)
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			key.Signer = args[0]
			return a.AddSignerKey(ctx, key)
		}),
		adminCommand("set-pin ID", "设置 PIN，解除锁定 (set the PIN, end a lock-out)", 1, func(c *cobra.Command) {
			pinFlag(c)
			c.Flags().StringVar(&oldPIN, "old-pin-file", "", "现有 PIN 的文件；密钥在托管且由 PIN 封存时需要 (the present PIN, where custody keys are sealed under it)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			if pinFile == "" {
				return nil, usageError{errors.New("需要 --pin-file (--pin-file is needed)")}
			}
			pin, err := appliance.ReadSecret(pinFile)
			if err != nil {
				return nil, err
			}
			var old []byte
			if oldPIN != "" {
				if old, err = appliance.ReadSecret(oldPIN); err != nil {
					return nil, err
				}
			}
			return a.SetSignerPIN(ctx, wire.SetSignerPIN{Signer: args[0], PIN: string(pin), OldPIN: string(old)})
		}),
		adminCommand("recover ID", "忘记 PIN：由保管干部凭份额恢复托管密钥，设新 PIN (a forgotten PIN: the officers' shares open the custody keys)", 1, func(c *cobra.Command) {
			pinFlag(c)
			c.Flags().StringArrayVar(&shares, "share", nil, "干部份额的文件，每份一次，须达门限 (file with an officer's share; once for each, as many as it takes)")
		}, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			if pinFile == "" || len(shares) == 0 {
				return nil, usageError{errors.New("需要 --pin-file 与 --share (--pin-file and --share are needed)")}
			}
			pin, err := appliance.ReadSecret(pinFile)
			if err != nil {
				return nil, err
			}
			req := wire.RecoverSigner{Signer: args[0], PIN: string(pin)}
			for _, name := range shares {
				b, err := os.ReadFile(name)
				if err != nil {
					return nil, err
				}
				req.Shares = append(req.Shares, b)
			}
			return a.RecoverSigner(ctx, req)
		}),
		adminCommand("list", "列出签名人 (list)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
			return a.ListSigners(ctx)
		}),
		adminCommand("stop ID", "停用 (stop)", 1, why, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			return a.StopSigner(ctx, wire.Decision{ID: args[0], Reason: reason})
		}),
		adminCommand("start ID", "启用 (start)", 1, why, func(ctx context.Context, a *client.Admin, args []string) (json.RawMessage, error) {
			return a.StartSigner(ctx, wire.Decision{ID: args[0], Reason: reason})
		}),
	)
	return c
}

func crlCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "crl", Short: "吊销列表 (CRLs)"})
	c.AddCommand(adminCommand("publish", "立即发布新的吊销列表 (publish new CRLs now)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		return a.IssueCRL(ctx)
	}))
	return c
}

func statusCommand() *cobra.Command {
	return adminCommand("status", "设备状态 (state of the appliance)", 0, nil, func(ctx context.Context, a *client.Admin, _ []string) (json.RawMessage, error) {
		return a.State(ctx)
	})
}
