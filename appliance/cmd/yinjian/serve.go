package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

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
	Admin       string            `json:"admin_socket"`
	TLSCA       string            `json:"tls_ca"`
	Credentials map[string]string `json:"credentials"` // application id → file
}

func serve(ctx context.Context, dir string, log *logrus.Logger) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	ready := filepath.Join(dir, "endpoints.json")
	_ = os.Remove(ready) // it says "ready": an old one must not
	err = appliance.Run(ctx, appliance.Options{
		Dir: dir, Log: log, Worker: []string{self, "worker"}, Softtoken: []string{self, "softtoken", "--dir", dir},
		OnReady: func(e appliance.Endpoints) {
			out := endpoints{API: e.API, TSASM2: e.Units["sm2"], TSARSA: e.Units["rsa"], Admin: e.Admin, TLSCA: e.TLSRoots, Credentials: credentialFiles(dir)}
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
		},
	})
	_ = os.Remove(ready)
	return err
}

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
	c := &cobra.Command{
		Use:   "softtoken --dir DIR",
		Short: "软件密码机（仅供评估，非认证产品）(software cipher machine: evaluation only, not a certified product)",
		Long: `软件密码机：经 PKCS#11 模块 libyinjian-p11.so 提供 SM2、RSA、SM3、HMAC-SM3。仅供评估，非商用密码认证产品。
The software cipher machine behind libyinjian-p11.so. For evaluation only; not a certified product.`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			return runSofttoken(c.Context(), dir, newLog(logrus.InfoLevel))
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "设备目录 (the appliance's folder)")
	_ = c.MarkFlagRequired("dir")
	return c
}

func runSofttoken(ctx context.Context, dir string, log *logrus.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // a parent that dies closes our standard input
		if st, err := os.Stdin.Stat(); err == nil && st.Mode()&os.ModeNamedPipe != 0 {
			_, _ = os.Stdin.Read(make([]byte, 1))
			cancel()
		}
	}()
	s, err := softtoken.Open(softtoken.Config{
		Dir: filepath.Join(dir, "softtoken"), SocketPath: appliance.SofttokenSocket(dir),
		PassphraseFile: filepath.Join(dir, "secrets", "softtoken.passphrase"), Slots: len(hsm.Classes), Log: log,
	})
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
			return worker.Serve(context.WithoutCancel(c.Context()), conn, func(ctx context.Context, p worker.StartParams) (hsm.Token, error) {
				profile, err := pkcs11.ProfileByName(p.Profile)
				if err != nil {
					return nil, err
				}
				return pkcs11.Open(ctx, pkcs11.Config{
					Module: p.Module, ModuleArgs: p.ModuleArgs, TokenLabel: p.TokenLabel, PIN: p.PIN, Profile: profile,
					MaxSessions: p.MaxSessions, BeforeLogin: p.BeforeLogin, Log: log,
				})
			})
		},
	}
}
