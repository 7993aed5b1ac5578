package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
)

// A distant appliance is one with no shell, whose administrators' listener is called by an administrator who logs in for this
// one command.
type distant struct{ at, ca, name, passwordFile, keyFile string }

func (d *distant) flags(c *cobra.Command) {
	c.Flags().StringVar(&d.at, "at", "", "没有命令行的设备：其管理地址 https://设备:端口，代替 --dir (an appliance without a shell: its administrators' address, instead of --dir)")
	c.Flags().StringVar(&d.ca, "ca", "", "--at 时：设备 TLS 证书的信任锚，PEM (with --at: the anchor of its TLS certificate)")
	c.Flags().StringVar(&d.name, "name", "", "--at 时：登录名；本命令执行期间登录 (with --at: who logs in, for this command)")
	c.Flags().StringVar(&d.passwordFile, "password-file", "", "--at 时：口令文件，权限 600；缺省在终端输入 (with --at: file with the password, mode 600; default: asked for on the terminal)")
	c.Flags().StringVar(&d.keyFile, "key", "", "--at 时：登录证书的私钥，PKCS#8 PEM，权限 600 (with --at: private key of the login certificate)")
	c.MarkFlagsRequiredTogether("at", "ca", "name")
	c.MarkFlagsMutuallyExclusive("dir", "at")
	c.MarkFlagsOneRequired("dir", "at")
}

// admin calls the appliance of dir, or the distant one. What needs a second person waits for the approval.
func (d *distant) admin(ctx context.Context, dir string) (a *client.Admin, done func(), err error) {
	if d.at == "" {
		f := adminFlags{dir: dir, output: "json"}
		if a, err = f.client(); err != nil {
			return nil, nil, err
		}
		return a, a.Close, nil
	}
	if !strings.HasPrefix(d.at, "https://") {
		return nil, nil, usageError{errors.New("--at 应为 https://设备:端口 (https://host:port)")}
	}
	pem, err := os.ReadFile(d.ca)
	if err != nil {
		return nil, nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, nil, fmt.Errorf("%s: 没有证书 (no certificate)", d.ca)
	}
	password, err := secretOf(ctx, d.passwordFile, "password-file", d.name+" 的口令 (password)", false)
	if err != nil {
		return nil, nil, err
	}
	a = client.NewAdminTLS(strings.TrimSuffix(d.at, "/"), &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots})
	req := wire.Login{Name: d.name, Password: string(password)}
	if d.keyFile != "" {
		err = signLogin(ctx, a, d.keyFile, &req)
	}
	var in *wire.LoggedIn
	if err == nil {
		in, err = a.Login(ctx, req)
	}
	if err != nil {
		a.Close()
		return nil, nil, explain(err)
	}
	a = a.WithSession(in.Session, awaiting)
	return a, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_, _ = a.Logout(ctx) // or the session ends by itself
		a.Close()
	}, nil
}
