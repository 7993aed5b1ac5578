package main

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"yinjian/appliance/problem"
	"yinjian/appliance/update"
	"yinjian/iso/layout"
)

// An agentPlace is where the update agent finds things. In the image all of them stand as the defaults say.
type agentPlace struct {
	socket, group, state           string
	boot, image, release, hospital string
	disk, esp                      string // "": as boot says; mounted for each question
	fsck                           string // checks the EFI system partition before it is mounted for the first time
	reboot                         string // restarts the machine when it is called with --no-block reboot
	slot                           int
	checked                        bool // it was; the hook's alone
}

// updateAgentCommand is the process that writes disks for the appliance; yinjian-update.service runs it.
func updateAgentCommand() *cobra.Command {
	var p agentPlace
	c := &cobra.Command{
		Use: "update-agent", Hidden: true, Short: "升级代理 (writes images on the appliance's behalf)", Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error { return p.run(c.Context()) },
	}
	f := c.Flags()
	f.StringVar(&p.socket, "socket", "/run/yinjian-update/socket", "套接字 (socket)")
	f.StringVar(&p.group, "group", "", "可连接的组的编号；空则只有本用户 (number of the group that may connect)")
	f.StringVar(&p.state, "state", layout.DataMount+"/update", "目录，存下限 (folder for the floor)")
	f.StringVar(&p.boot, "boot", layout.BootRecord, "init 留下的启动记录 (what init has said)")
	f.StringVar(&p.image, "image", layout.ImageFile, "映像的自述 (the image's own page)")
	f.StringVar(&p.release, "release-key", layout.ReleaseKey, "发布方的 SM2 公钥 (release key)")
	f.StringVar(&p.hospital, "hospital-key", layout.HospitalKey, "医院的 SM2 公钥，没有则不须会签 (hospital's key; none: it is not asked)")
	f.StringVar(&p.disk, "disk", "", "整个磁盘，缺省见启动记录 (whole disk)")
	f.StringVar(&p.esp, "esp", "", "已挂载的 EFI 系统分区，缺省每次挂载 (EFI system partition, mounted)")
	f.StringVar(&p.fsck, "fsck", "/usr/sbin/fsck.fat", "检查 FAT 的程序 (program that checks a FAT)")
	f.StringVar(&p.reboot, "reboot", "/usr/bin/systemctl", "重启机器的程序 (program that restarts the machine)")
	f.IntVar(&p.slot, "slot", 0, "运行中的槽，缺省见启动记录 (slot that runs)")
	return c
}

func (p *agentPlace) run(ctx context.Context) error {
	u, err := p.updater()
	if err != nil {
		return err
	}
	hooks := update.Hooks{Keep: p.keep, Least: p.least, Want: p.want, Trial: p.trial, Restart: p.restart}
	if p.esp == "" {
		hooks.Mount = p.mount
	}
	ln, err := p.listen()
	if err != nil {
		return err
	}
	return update.Serve(ctx, ln, u, hooks)
}

func (p *agentPlace) updater() (*update.Updater, error) {
	cfg := update.Config{ESP: p.esp, Slot: p.slot}
	if p.disk == "" || p.slot == 0 {
		text, err := os.ReadFile(p.boot)
		var b layout.Booted
		if err == nil {
			err = json.Unmarshal(text, &b)
		}
		if err != nil {
			return nil, err
		}
		if b.Media != layout.MediaDisk {
			return nil, errors.New("不是从磁盘启动的，没有可升级的槽 (not started from a disk: there is no slot to write)")
		}
		p.disk, cfg.Slot = b.Disk, b.Slot
	}
	if cfg.ESP == "" {
		cfg.ESP = filepath.Join(filepath.Dir(p.socket), "esp")
	}
	text, err := os.ReadFile(p.image)
	if err != nil {
		return nil, err
	}
	if cfg.Running, err = layout.ParseImage(text); err != nil {
		return nil, err
	}
	if cfg.Keys.Release, err = readSM2Public(p.release); err != nil {
		return nil, err
	}
	if cfg.Keys.Hospital, err = readSM2Public(p.hospital); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if cfg.Floor, err = p.floor(); err != nil {
		return nil, err
	}
	index, floor, err := p.wanted()
	if err != nil {
		return nil, err
	}
	if index == cfg.Running.Index {
		cfg.Wanted = floor
	}
	disk, err := os.OpenFile(p.disk, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if cfg.Size, err = disk.Seek(0, io.SeekEnd); err != nil { // a device's size is no file's
		return nil, err
	}
	cfg.Device = disk
	return update.New(cfg)
}

// readSM2Public reads a public key, PKIX in PEM.
func readSM2Public(name string) (*ecdsa.PublicKey, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	key, err := update.ParseKey(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return key, nil
}

func (p *agentPlace) floorFile() string { return filepath.Join(p.state, "floor") }

func (p *agentPlace) floor() (uint64, error) { return layout.ReadFloor(p.floorFile()) }

func (p *agentPlace) keep(floor uint64) error { return p.raise(p.floorFile(), floor) }

// least keeps the floor for [layout.LeastFile], which is read at each start before anything else: it follows the floor once the image
// that brought it is good, so that no cut of the power leaves nothing that may start.
func (p *agentPlace) least(floor uint64) error {
	return p.raise(filepath.Join(p.state, filepath.Base(layout.LeastFile)), floor)
}

// raise keeps a number that only grows.
func (p *agentPlace) raise(name string, floor uint64) error {
	before, err := layout.ReadFloor(name)
	if err != nil || floor <= before {
		return err
	}
	if err := os.MkdirAll(p.state, 0o755); err != nil {
		return err
	}
	if err := replaceFile(name, []byte(strconv.FormatUint(floor, 10)+"\n")); err != nil {
		return err
	}
	return p.syncState()
}

func (p *agentPlace) wantedFile() string { return filepath.Join(p.state, "wanted") }

// want keeps the floor of an image that was committed, for the start of that image.
func (p *agentPlace) want(index, floor uint64) error {
	if err := os.MkdirAll(p.state, 0o755); err != nil {
		return err
	}
	if err := replaceFile(p.wantedFile(), fmt.Appendf(nil, "%d %d\n", index, floor)); err != nil {
		return err
	}
	return p.syncState()
}

// wanted is what want kept last; zeros if nothing was committed here yet.
func (p *agentPlace) wanted() (index, floor uint64, err error) {
	text, err := os.ReadFile(p.wantedFile())
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err == nil {
		_, err = fmt.Sscanf(string(text), "%d %d\n", &index, &floor)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", p.wantedFile(), err)
	}
	return index, floor, nil
}

// trial makes the mark by which yinjian-trial.service restarts a machine whose new image does not prove itself, or takes it away.
func (p *agentPlace) trial(waits bool) error {
	mark := filepath.Join(p.state, "trial")
	if !waits {
		err := os.Remove(mark)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return errors.Join(err, p.syncState())
	}
	if err := os.MkdirAll(p.state, 0o755); err != nil {
		return err
	}
	if err := replaceFile(mark, nil); err != nil {
		return err
	}
	return p.syncState()
}

func (p *agentPlace) syncState() error {
	d, err := os.Open(p.state)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// mount makes the EFI system partition appear beside the socket.
func (p *agentPlace) mount() (func() error, error) {
	at := filepath.Join(filepath.Dir(p.socket), "esp")
	if err := os.MkdirAll(at, 0o700); err != nil {
		return nil, err
	}
	device := layout.DeviceName(p.disk, layout.NumberESP)
	if !p.checked { // what a power cut or the firmware has left; what this process leaves it unmounts
		if err := checkFAT(p.fsck, device); err != nil {
			return nil, err
		}
	}
	// DIRSYNC: a renaming writes the new name before it takes the old one away.
	if err := unix.Mount(device, at, "vfat", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_DIRSYNC, "umask=0077"); err != nil {
		return nil, fmt.Errorf("mount %s: %w", device, err)
	}
	unmount := func() error { return unix.Unmount(at, 0) }
	if !p.checked {
		if err := update.Mended(at); err != nil {
			return nil, errors.Join(err, unmount())
		}
		p.checked = true
	}
	return unmount, nil
}

// restart has systemd stop everything in order, and the machine start again.
func (p *agentPlace) restart() error {
	if out, err := exec.Command(p.reboot, "--no-block", "reboot").CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", p.reboot, err, out)
	}
	return nil
}

// checkFAT has a file system that is not mounted checked and mended; a *problem.Problem if it is not whole then.
func checkFAT(program, device string) error {
	var out []byte
	var err error
	for range 2 { // its status is 1 when it has mended something: nothing is left then for a second time
		if out, err = exec.Command(program, "-a", "-w", device).CombinedOutput(); err == nil {
			return nil
		}
	}
	return problem.New(problem.NotReady, "EFI 系统分区的文件系统已损坏，没有写入 (the EFI system partition's file system is damaged; nothing was written)",
		"查硬盘；重装系统，再由备份恢复，见 docs/install.md (look at the disk; install anew and restore a backup)").With(fmt.Errorf("%s: %w: %s", program, err, out))
}

// listen makes the socket, for its user and one group.
func (p *agentPlace) listen() (net.Listener, error) {
	if err := os.Remove(p.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	mask := unix.Umask(0o177)
	ln, err := net.Listen("unix", p.socket)
	unix.Umask(mask)
	if err != nil || p.group == "" {
		return ln, err
	}
	gid, err := strconv.Atoi(p.group)
	if err == nil {
		err = os.Chown(p.socket, -1, gid)
	}
	if err == nil {
		err = os.Chmod(p.socket, 0o660)
	}
	return ln, err
}
