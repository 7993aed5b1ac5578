package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/appliance/pack"
	"yinjian/appliance/update"
	"yinjian/iso/layout"
)

// A packPlace is where the agent of packs finds things. In the image all of them stand as the defaults say.
type packPlace struct {
	agentPlace // socket, group, image and keys
	mounts     string
}

// packAgentCommand is the process that mounts packs for the appliance; yinjian-packs.service runs it.
func packAgentCommand() *cobra.Command {
	var p packPlace
	c := &cobra.Command{
		Use: "pack-agent", Hidden: true, Short: "厂商包代理 (keeps and mounts makers' packs on the appliance's behalf)", Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error { return p.run(c.Context()) },
	}
	f := c.Flags()
	f.StringVar(&p.socket, "socket", "/run/yinjian-packs/socket", "套接字 (socket)")
	f.StringVar(&p.group, "group", "", "可连接的组的编号；空则只有本用户 (number of the group that may connect)")
	f.StringVar(&p.state, "state", layout.PacksDir, "目录，存厂商包 (folder for packs)")
	f.StringVar(&p.mounts, "mounts", "/run/yinjian/packs", "挂载的目录 (folder where they are mounted)")
	f.StringVar(&p.image, "image", layout.ImageFile, "映像的自述 (the image's own page)")
	f.StringVar(&p.release, "release-key", layout.ReleaseKey, "发布方的 SM2 公钥 (release key)")
	f.StringVar(&p.hospital, "hospital-key", layout.HospitalKey, "医院的 SM2 公钥 (hospital's key)")
	return c
}

func (p *packPlace) run(ctx context.Context) error {
	text, err := os.ReadFile(p.image)
	if err != nil {
		return err
	}
	image, err := layout.ParseImage(text)
	if err != nil {
		return err
	}
	cfg := pack.KeeperConfig{Dir: p.state, Mounts: p.mounts, KeyFile: p.hospital, Arch: image.Arch, Verity: image.VerityHash, Mounter: pack.System{},
		Asked: image.Variant == layout.Evaluation}
	if cfg.Keys.Release, err = readSM2Public(p.release); err != nil {
		return err
	}
	if cfg.Keys.Hospital, err = readSM2Public(p.hospital); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p.hospital), 0o755); err != nil {
		return err
	}
	k, err := pack.NewKeeper(cfg)
	if err != nil {
		return err
	}
	for _, one := range k.State().Packs {
		if one.Fault != "" {
			newLog(logrus.ErrorLevel).Errorf("厂商包 %s 没有挂载 (is not mounted): %s", one.Name, one.Fault)
		}
	}
	ln, err := p.listen()
	if err != nil {
		return err
	}
	if err := notifyReady(); err != nil { // the service that needs them begins now
		return errors.Join(err, ln.Close())
	}
	return update.ServePacks(ctx, ln, k)
}

// notifyReady tells systemd that what is ordered after this service may begin (sd_notify(3), Type=notify); without systemd it
// does nothing. No child is to say it again.
func notifyReady() error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	if err := os.Unsetenv("NOTIFY_SOCKET"); err != nil {
		return err
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return err
	}
	_, err = conn.Write([]byte("READY=1"))
	return errors.Join(err, conn.Close())
}
