package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/softtoken"
	"yinjian/hsm/worker"
)

// endpoints is endpoints.json: what a program needs to use a running evaluation appliance.
type endpoints struct {
	API         string            `json:"api"`
	TSASM2      string            `json:"tsa_sm2,omitempty"`
	TSARSA      string            `json:"tsa_rsa,omitempty"`
	TSA         map[string]string `json:"tsa,omitempty"` // of all units, by name
	Admin       string            `json:"admin_socket"`
	AdminTLS    string            `json:"admin,omitempty"` // for administrators who log in
	TLSCA       string            `json:"tls_ca"`
	Credentials map[string]string `json:"credentials"` // application id → file
}

// setMemory trades memory for processor time, unless the environment says otherwise: some tens of MB are live while
// several hundred thousand objects a second come and go, so that Go's own setting collects dozens of times a second. The
// limit keeps the worst case (nonces, consents and bodies at their bounds) from being multiplied.
func setMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(2 << 30)
	}
}

func serve(ctx context.Context, dir string, once bool, service, trial, reach time.Duration, log *logrus.Logger) error {
	setMemory()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if err := becomePack(ctx, dir); err != nil {
		return err
	}
	ready := filepath.Join(dir, "endpoints.json")
	started := false
	err = appliance.Run(ctx, appliance.Options{
		Dir: dir, Log: log, Worker: []string{self, "worker"}, Softtoken: []string{self, "softtoken", "--dir", dir, "--service-time", service.String()}, Once: once,
		RandomTests: []string{self, "assess-random"}, TrialWithin: trial, ReachWithin: reach,
		Provision: func(ctx context.Context, answers []byte, passphrases []string) ([]wire.FirstPassword, error) {
			return provisionBy(ctx, self, dir, answers, passphrases)
		},
		OnSettings: func() error { return becomePack(ctx, dir) },
		RestoreAt:  func() (string, error) { return restoreAt(dir) },
		Restore: func(ctx context.Context, req appliance.RestoreRequest) ([]byte, error) {
			return restoreHere(ctx, dir, req)
		},
		OnAttended: func() {
			if err := notifyReady(); err != nil {
				log.WithError(err).Error("the service manager could not be told")
			}
		},
		OnStart: func() {
			started = true
			_ = os.Remove(ready) // it says "ready": an old one must not, and another's that runs is not ours to remove
		},
		OnReady: func(e appliance.Endpoints) {
			out := endpoints{API: e.API, TSASM2: e.Units["sm2"], TSARSA: e.Units["rsa"], TSA: e.Units, Admin: e.Admin, AdminTLS: e.AdminTLS, TLSCA: e.TLSRoots, Credentials: credentialFiles(dir)}
			b, err := json.MarshalIndent(out, "", "  ")
			if err == nil {
				err = os.WriteFile(ready+".new", append(b, '\n'), 0o644)
			}
			if err == nil {
				err = os.Rename(ready+".new", ready)
			}
			if err != nil {
				log.WithError(err).Error("endpoints.json could not be written")
				return
			}
			fmt.Printf("设备已就绪 (ready): %s\n", e.API)
			if e.AdminTLS != "" {
				fmt.Printf("控制台 (console): %s/console/\n", e.AdminTLS)
			}
		},
	})
	if started {
		_ = os.Remove(ready)
	}
	if errors.Is(err, appliance.ErrRestart) { // the service manager starts it again
		return exitError{err, exitRestart}
	}
	return err
}

// exitRestart is the code with which serve ends to be started again: EX_TEMPFAIL of sysexits.h.
const exitRestart = 75

func credentialFiles(dir string) map[string]string {
	out := map[string]string{}
	files, _ := filepath.Glob(filepath.Join(dir, "credentials", "*.json")) // the pattern is well-formed
	for _, f := range files {
		out[trimExt(filepath.Base(f))] = f
	}
	return out
}

func trimExt(name string) string { return name[:len(name)-len(filepath.Ext(name))] }

func softtokenCommand() *cobra.Command {
	var dir string
	var cfg softtoken.Config
	c := &cobra.Command{
		Use:   "softtoken (--dir DIR | --state DIR --passphrase-file FILE)",
		Short: "软件密码机（仅供评估，非认证产品）(software cipher machine: evaluation only, not a certified product)",
		Long: `软件密码机：经 PKCS#11 模块 libyinjian-p11.so 提供 SM2、RSA、SM3、HMAC-SM3。仅供评估，非商用密码认证产品。
任何 PKCS#11 程序都可使用：export YINJIAN_P11_SOCKET=套接字；pkcs11-tool --module build/libyinjian-p11.so -L
--listen 时其他机器上的也可使用：YINJIAN_P11_ADDRESS=IP:端口 YINJIAN_P11_CREDENTIALS=link-client.pem 的绝对路径；那台机器上要有 OpenSSL 3。

The software cipher machine behind libyinjian-p11.so, for any PKCS#11 program. For evaluation only; not a certified product.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			switch {
			case dir != "" && cfg.Dir == "":
				cfg.Dir, cfg.SocketPath = filepath.Join(dir, "softtoken"), appliance.SofttokenSocket(dir)
				if cfg.PassphraseFile == "" {
					cfg.PassphraseFile = filepath.Join(dir, "secrets", "softtoken.passphrase")
				}
			case dir != "" || cfg.Dir == "" || cfg.PassphraseFile == "":
				return usageError{errors.New("给出 --dir，或 --state 与 --passphrase-file (give --dir, or --state and --passphrase-file)")}
			}
			cfg.Log = newLog(logrus.InfoLevel)
			return runSofttoken(c.Context(), cfg)
		},
	}
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "设备目录 (the appliance's folder)")
	f.StringVar(&cfg.Dir, "state", "", "独立使用：状态目录，权限 700 (by itself: folder for its state)")
	f.StringVar(&cfg.PassphraseFile, "passphrase-file", "", "口令文件，权限 600 (file with the passphrase)")
	f.StringVar(&cfg.SocketPath, "socket", "", "套接字，缺省为状态目录下的 p11.sock (unix socket)")
	f.StringVar(&cfg.Address, "listen", "", "另供其他机器使用的地址 IP:端口：TLS 1.3，凭状态目录下的 link-client.pem (also for other machines, IP:port, with link-client.pem of its folder)")
	f.IntVar(&cfg.Slots, "slots", len(hsm.Classes), "槽位数 (slots)")
	f.DurationVar(&cfg.ServiceTime, "service-time", 0, "每次签名至少耗时，模拟较慢的设备 (least time of a signature, to stand for a slower device)")
	f.StringVar(&cfg.Impersonate, "impersonate", "", "按厂商档案应答（名称或文件），供联调；仍非该厂商产品 (answer to a vendor profile, by name or file)")
	return c
}

func runSofttoken(ctx context.Context, cfg softtoken.Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // a parent that dies closes our standard input
		if st, err := os.Stdin.Stat(); err == nil && st.Mode()&os.ModeNamedPipe != 0 {
			_, _ = os.Stdin.Read(make([]byte, 1))
			cancel()
		}
	}()
	s, err := softtoken.Open(cfg)
	if err != nil {
		return err
	}
	return s.Serve(ctx)
}

// workerCommand drives one slot class of the cipher machine; the appliance starts it, nobody else does.
func workerCommand() *cobra.Command {
	return &cobra.Command{
		Use: "worker", Hidden: true, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			log := newLog(logrus.InfoLevel)
			// Ctrl-C and a service manager's SIGTERM reach the whole group. The worker ends when its parent does, or when the
			// parent closes the stream, so that signatures under way are finished.
			signal.Ignore(os.Interrupt, syscall.SIGTERM)
			conn, err := worker.Inherited()
			if err != nil {
				return usageError{err}
			}
			return worker.ServeExtended(context.WithoutCancel(c.Context()), conn, openToken(log), func(ctx context.Context, token hsm.Token, p worker.StartParams) (worker.Extension, error) {
				return appliance.NewStampingWorker(ctx, token, p, log)
			})
		},
	}
}

// openToken is how a worker opens its token.
func openToken(log logrus.FieldLogger) func(context.Context, worker.StartParams) (hsm.Token, error) {
	return func(ctx context.Context, p worker.StartParams) (hsm.Token, error) {
		profile, err := pkcs11.ProfileByName(p.Profile)
		if err != nil {
			return nil, err
		}
		return pkcs11.Open(ctx, pkcs11.Config{
			Module: p.Module, ModuleArgs: p.ModuleArgs, TokenLabel: p.TokenLabel, PIN: p.PIN, Profile: profile,
			MaxSessions: p.MaxSessions, WrappedKeys: p.WrappedKeys, BeforeLogin: p.BeforeLogin, Log: log,
		})
	}
}
