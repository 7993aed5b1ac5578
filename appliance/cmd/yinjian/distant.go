package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
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
type distant struct {
	trust
	at, name, passwordFile, keyFile string
}

// A trust is how an appliance elsewhere proves that it is the one that is meant: by an anchor, or by its certificate itself.
type trust struct{ ca, fingerprint string }

// elsewhere says whether what stands for the appliance's folder is the administrators' address of one that has no shell.
func elsewhere(dir string) bool { return strings.HasPrefix(dir, "https://") }

func (d *distant) flags(c *cobra.Command) {
	c.Flags().StringVar(&d.at, "at", "", "没有命令行的设备：其管理地址 https://设备:端口，代替 --dir (an appliance without a shell: its administrators' address, instead of --dir)")
	c.Flags().StringVar(&d.ca, "ca", "", "--at 时：设备 TLS 证书的信任锚，PEM (with --at: the anchor of its TLS certificate)")
	c.Flags().StringVar(&d.fingerprint, "fingerprint", "", "--at 时，代替 --ca：设备控制台上的证书指纹，SHA-256 (with --at, instead of --ca: the fingerprint on its console)")
	c.Flags().StringVar(&d.name, "name", "", "--at 时：登录名；本命令执行期间登录 (with --at: who logs in, for this command)")
	c.Flags().StringVar(&d.passwordFile, "password-file", "", "--at 时：口令文件，权限 600；缺省在终端输入 (with --at: file with the password, mode 600; default: asked for on the terminal)")
	c.Flags().StringVar(&d.keyFile, "key", "", "--at 时：登录证书的私钥，PKCS#8 PEM，权限 600 (with --at: private key of the login certificate)")
	c.MarkFlagsRequiredTogether("at", "name")
	c.MarkFlagsMutuallyExclusive("ca", "fingerprint")
	c.MarkFlagsMutuallyExclusive("dir", "at")
	c.MarkFlagsOneRequired("dir", "at")
}

// fingerprintOf reads a fingerprint as consoles and browsers show it: SHA-256, with colons, spaces and capitals or without.
func fingerprintOf(text string) ([]byte, error) {
	f, err := hex.DecodeString(strings.NewReplacer(":", "", " ", "").Replace(text))
	if err != nil || len(f) != sha256.Size {
		return nil, usageError{errors.New("--fingerprint 应为 64 个十六进制数字 (64 hexadecimal digits)")}
	}
	return f, nil
}

func (t *trust) config() (*tls.Config, error) {
	if t.fingerprint != "" {
		f, err := fingerprintOf(t.fingerprint)
		if err != nil {
			return nil, err
		}
		return client.Pinned(f), nil
	}
	if t.ca == "" {
		return nil, usageError{errors.New("须有 --ca 或 --fingerprint：设备的证书由谁证明 (want --ca or --fingerprint: what proves the appliance's certificate)")}
	}
	pem, err := os.ReadFile(t.ca)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: 没有证书 (no certificate)", t.ca)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots}, nil
}

// admin calls the appliance of dir, or the distant one. What needs a second person waits for the approval.
func (d *distant) admin(ctx context.Context, dir string) (a *client.Admin, done func(), err error) {
	if d.at == "" {
		if d.trust != (trust{}) {
			return nil, nil, usageError{errors.New("--ca、--fingerprint 须与 --at 连用 (mean nothing without --at)")}
		}
		f := adminFlags{dir: dir, output: "json"}
		if a, err = f.client(); err != nil {
			return nil, nil, err
		}
		return a, a.Close, nil
	}
	if !strings.HasPrefix(d.at, "https://") {
		return nil, nil, usageError{errors.New("--at 应为 https://设备:端口 (https://host:port)")}
	}
	conf, err := d.config()
	if err != nil {
		return nil, nil, err
	}
	password, err := secretOf(ctx, d.passwordFile, "password-file", d.name+" 的口令 (password)", false)
	if err != nil {
		return nil, nil, err
	}
	a = client.NewAdminTLS(strings.TrimSuffix(d.at, "/"), conf)
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
	a = a.WithSession(in.Session, awaiting(d.at))
	return a, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_, _ = a.Logout(ctx) // or the session ends by itself
		a.Close()
	}, nil
}
