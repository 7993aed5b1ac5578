//go:build linux

// Command yinjian-install belongs to the sealed image. From the installation medium it puts the system on a disk, by the
// answers of an answer disk or after a short dialogue on the console; at a disk's first start it makes the data volume and
// seals its key; at every other start it opens the volume. All it writes to a disk is what was signed, what it computed, or
// what it was answered, and it runs no other program than those of the verified root.
//
//	yinjian-install install    started by yinjian-install.service, on the medium
//	yinjian-install data       started by yinjian-data.service, on the disk, before everything that needs /data
//	yinjian-install provision  started by yinjian-provision.service: the appliance's answers, once
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"yinjian/appliance/update"
	"yinjian/iso/layout"
)

// Texts on the console that tests, and people on the telephone, wait for.
const (
	markInstalled = "INSTALLED"
	markRefused   = "REFUSED"
	markData      = "DATA"
	markLocked    = "LOCKED"
)

func main() {
	con, err := openConsole()
	if err == nil {
		ctx := context.Background()
		switch {
		case len(os.Args) == 2 && os.Args[1] == "install":
			err = install(con)
		case len(os.Args) == 2 && os.Args[1] == "data":
			if err = data(ctx, con); err != nil {
				con.say("\n%s 数据卷不可用，服务不启动 (no data volume, nothing starts): %v", markRefused, err)
			}
		case len(os.Args) == 2 && os.Args[1] == "provision":
			err = provision(ctx, con)
		default:
			err = errors.New("usage: yinjian-install install|data|provision")
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "yinjian-install:", err)
		os.Exit(1)
	}
}

func readImage() (layout.Image, error) {
	text, err := os.ReadFile(layout.ImageFile)
	if err != nil {
		return layout.Image{}, err
	}
	return layout.ParseImage(text)
}

func readBooted() (b layout.Booted, err error) {
	text, err := os.ReadFile(layout.BootRecord)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	return b, err
}

// install installs, or says why not and stays so until the machine is switched off: there is nothing else to do on the
// medium.
func install(con *console) error {
	err := tryInstall(con)
	if err == nil {
		unix.Sync()
		return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	con.say("\nINSTALL %s 未安装 (nothing was installed)：%v\n请关机，排除原因后再启动 (switch off, mend the cause, start again)", markRefused, err)
	return err
}

func tryInstall(con *console) error {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	line, err := layout.ParseCommandLine(string(text))
	if err != nil {
		return err
	}
	image, err := readImage()
	if err != nil {
		return err
	}
	booted, err := readBooted()
	if err != nil {
		return err
	}
	p, answersDisk, err := readAnswerDisk(image)
	if err != nil {
		return err
	}
	disks, err := findDisks(os.DirFS("/sys/block"), func(name string) (device, error) { return os.Open(name) }, []string{filepath.Base(booted.Disk), answersDisk})
	if err != nil {
		return err
	}
	least := image.ESPBytes + 2*image.SlotBytes + leastData
	if p == nil {
		p = new(parcel)
		if p.Answers, p.Appliance, err = con.askAll(disks, least); err != nil {
			return err
		}
	}
	d, err := choose(disks, p.Answers, least)
	if err != nil {
		return err
	}
	if p.Answers.Seal == sealTPM {
		if err := needTPM(); err != nil {
			return err
		}
	}
	err = checkAppliance(context.Background(), p.Appliance)
	if err == nil {
		err = needPacks(p.Appliance, p.Packs)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", applianceAnswers, err)
	}
	con.say("\n正在安装到 %s (installing)", d)
	root, err := os.Open(layout.VerityDev)
	if err != nil {
		return err
	}
	defer root.Close()
	esp, err := os.Open(filepath.Join(layout.MediaRun, layout.MediaDir, layout.ESPImage))
	if err != nil {
		return err
	}
	defer esp.Close()
	// O_EXCL: nothing of the disk is mounted. It stays open: a disk that is closed is read by udev, while the machine is
	// switched off, and the console ends with errors of a disk that has none.
	f, err := os.OpenFile("/dev/"+d.name, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	j := job{line: line, image: image, root: root, esp: esp, parcel: p}
	began := time.Now() // interval
	if err := j.write(blockDevice{f}, d.size, d.sector); err != nil {
		return err
	}
	con.say("\n%s 安装完成，用时 %v。即将关机；请取出安装介质与应答盘后开机 (done, switching off; take out the media and start the machine)", markInstalled, time.Since(began).Round(time.Second/10))
	return nil
}

// leastData is what is left at least for the data of an appliance.
const leastData = 1 << 30

// A blockDevice is a disk as a [target].
type blockDevice struct{ *os.File }

func (b blockDevice) Drop() error {
	return unix.IoctlSetInt(int(b.Fd()), unix.BLKFLSBUF, 0)
}

// readAnswerDisk reads the answer disk and answers what it says and which disk it is on; nil if there is none.
func readAnswerDisk(image layout.Image) (*parcel, string, error) {
	device, err := filepath.EvalSymlinks("/dev/disk/by-label/" + layout.AnswersLabel)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	const folder = "/run/yinjian-answers"
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, "", err
	}
	kind := "vfat"
	if isISO(device) {
		kind = "iso9660"
	}
	if err := unix.Mount(device, folder, kind, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return nil, "", fmt.Errorf("应答盘无法读取 (the answer disk cannot be read): %s: %w", kind, err)
	}
	defer unix.Unmount(folder, unix.MNT_DETACH) // what is open of it can be read until it is closed
	p, err := readAnswers(folder)
	if err != nil {
		return nil, "", err
	}
	release, err := os.ReadFile(layout.ReleaseKey)
	if err != nil {
		return nil, "", err
	}
	return p, filepath.Base(device), findPacks(folder, p, release, image)
}

// readAnswers reads the files of an answer disk.
func readAnswers(folder string) (*parcel, error) {
	text, err := readBounded(filepath.Join(folder, layout.AnswersFile))
	if err != nil {
		return nil, fmt.Errorf("应答盘 (answer disk): %w", err)
	}
	p := new(parcel)
	if p.Answers, err = parseAnswers(text); err != nil {
		return nil, fmt.Errorf("%s: %w", layout.AnswersFile, err)
	}
	if p.Appliance, err = readBounded(filepath.Join(folder, applianceAnswers)); err != nil {
		return nil, fmt.Errorf("应答盘 (answer disk): %w", err)
	}
	p.Hospital, err = readBounded(filepath.Join(folder, hospitalKey))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("应答盘 (answer disk): %w", err)
	default: // the update agent would not start with it
		if _, err := update.ParseKey(p.Hospital); err != nil {
			return nil, fmt.Errorf("%s: %w", hospitalKey, err)
		}
	}
	return p, nil
}

// hospitalKey is the public key by which the hospital signs update bundles as well; on the answer disk, if it wants to.
const hospitalKey = "hospital.pem"

// isISO says whether a device begins with the volume descriptors of ECMA-119 (clause 8.1).
func isISO(device string) bool {
	f, err := os.Open(device)
	if err != nil {
		return false
	}
	defer f.Close()
	id := make([]byte, 5)
	_, err = f.ReadAt(id, 16*2048+1)
	return err == nil && string(id) == "CD001"
}

// applianceAnswers has what the appliance has to know, as docs/states.md says; on the answer disk, and in the appliance's
// folder until it was used.
const applianceAnswers = "answers.toml"

// checkAppliance has the appliance's own program look at its answers, as it will at the first start, and refuses those
// after which nobody could reach the machine.
func checkAppliance(ctx context.Context, text []byte) error {
	if err := reachable(text); err != nil {
		return err
	}
	const folder = "/run/yinjian-check"
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	file := filepath.Join(folder, applianceAnswers)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	_, err := run(ctx, nil, program, "init", "--check", "--dir", layout.Dir, "--answers", file)
	return err
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxAnswers+1))
	if err == nil && len(b) > maxAnswers {
		err = fmt.Errorf("%s: 超过 %d 字节 (too large)", name, maxAnswers)
	}
	return b, err
}

// The data volume is mounted here while its first files are written and the machine's settings are read; on /data it is
// mounted by data.mount.
const volumeDir = "/run/yinjian-volume"

// machineFile is what is kept of the answers, on the data volume.
const machineFile = "machine.json"

type machine struct {
	Network  Network  `json:"network"`
	Receiver Receiver `json:"receiver"`
}

// data opens the data volume, or makes it at the first start. A volume that does not open waits for its
// recovery key: whoever needs /data waits with it.
func data(ctx context.Context, con *console) error {
	image, err := readImage()
	if err != nil {
		return err
	}
	booted, err := readBooted()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(booted.Disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	table, err := layout.ReadTable(f, size)
	if err != nil {
		return err
	}
	if len(table.Partitions) < layout.NumberData || table.Partitions[layout.NumberData-1].Label != layout.LabelData {
		return errors.New("系统盘上没有数据分区 (the disk has no partition for the data)")
	}
	const secret = "/run/yinjian-secret"
	if err := os.MkdirAll(secret, 0o700); err != nil {
		return err
	}
	v := &volume{image: image, device: layout.DeviceName(booted.Disk, layout.NumberData), secret: secret, run: run, con: con}

	// The parcel lies where the first update will put a root.
	slot := table.Partitions[layout.NumberRootB-1]
	place := io.NewSectionReader(f, table.Offset(slot), table.Size(slot))
	p, err := readParcel(place)
	if slot.Label != layout.LabelEmpty {
		p, err = nil, errNoParcel
	}
	switch {
	case errors.Is(err, errNoParcel):
		if err := v.openOrRecover(ctx); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		p.behind(place)
		if err := begin(ctx, v, p); err != nil {
			return err
		}
		// From here on the volume counts, and is on the disk before that is said there.
		if err := f.Sync(); err != nil {
			return err
		}
		if _, err := f.WriteAt(make([]byte, maxParcel), table.Offset(slot)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := useMachine(image); err != nil {
		_, shutErr := v.shut(ctx) // an older image that was put back on the disk is to get nothing else of it
		_, closeErr := v.run(ctx, nil, cryptsetup, "close", layout.DataName)
		return errors.Join(err, shutErr, closeErr)
	}
	// It is open, and the machine is to come back by itself: a TPM that fails here is told of, and nothing more.
	switch shut, err := v.shut(ctx); {
	case err != nil:
		con.say("%s 数据卷已打开；TPM 未能停止交出它的密钥 (open; the TPM did not stop giving its key away): %v", markData, err)
	case shut:
		con.say("%s 数据卷已打开；下次启动之前 TPM 不再交出密钥 (open; the TPM gives its key to nobody until the next start)", markData)
	default:
		con.say("%s 数据卷已打开 (open)", markData)
	}
	return nil
}

// waitForTPM gives the driver time.
func waitForTPM() {
	for range 100 {
		if _, err := os.Stat(tpmDevice); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// needTPM refuses to seal to what is not there.
func needTPM() error {
	waitForTPM()
	if _, err := os.Stat(tpmDevice); err != nil {
		return errors.New("seal: 本机没有可用的 TPM 2.0：在固件设置里打开它，或选 passphrase (NO TPM 2.0: switch it on in the firmware's settings, or answer passphrase)")
	}
	return nil
}

// mounted runs do with the open volume mounted at volumeDir.
func mounted(flags uintptr, do func() error) error {
	if err := os.MkdirAll(volumeDir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(layout.DataDev, volumeDir, "ext4", flags|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", layout.DataDev, err)
	}
	return errors.Join(do(), unix.Unmount(volumeDir, 0))
}

// begin makes the volume for which answers wait. One that was made whole before is opened instead, whoever left answers again: only
// the installer, which overwrites its header and asks for the token of wiping, makes room for another.
func begin(ctx context.Context, v *volume, p *parcel) error {
	if v.made(ctx) {
		return v.openOrRecover(ctx)
	}
	if err := firstStart(ctx, v, p); err != nil {
		return fmt.Errorf("首次启动 (first start): %w", err)
	}
	if err := v.finish(ctx); err != nil {
		return err
	}
	v.con.say("%s 数据卷已建立 (made)", markData)
	return nil
}

// firstStart makes the volume, fills it, and opens it once more the way the next start will: what cannot be opened again is
// no volume.
func firstStart(ctx context.Context, v *volume, p *parcel) error {
	v.con.say("\n首次启动：正在建立数据卷 (first start: making the data volume)")
	if p.Answers.Seal == sealTPM {
		if err := needTPM(); err != nil {
			return err
		}
	}
	if err := v.make(ctx, p.Answers); err != nil {
		return err
	}
	if err := mounted(0, func() error { return fill(p) }); err != nil {
		return err
	}
	if p.Answers.Seal != sealTPM {
		return nil // whoever typed the passphrase twice is not asked a third time
	}
	if _, err := v.run(ctx, nil, cryptsetup, "close", layout.DataName); err != nil {
		return err
	}
	return v.open(ctx)
}

// fill writes the first files of the data volume.
func fill(p *parcel) error {
	text, err := json.Marshal(machine{p.Answers.Network, p.Answers.Receiver})
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(volumeDir, machineFile), text, 0, 0); err != nil {
		return err
	}
	uid, gid, err := owner()
	if err != nil {
		return err
	}
	dir := filepath.Join(volumeDir, filepath.Base(layout.Dir))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chown(dir, uid, gid); err != nil {
		return err
	}
	if p.Hospital != nil {
		name := filepath.Join(volumeDir, strings.TrimPrefix(layout.HospitalKey, layout.DataMount))
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), writeFile(name, p.Hospital, 0, 0)); err != nil {
			return err
		}
	}
	if err := p.keepPacks(filepath.Join(volumeDir, strings.TrimPrefix(layout.PacksDir, layout.DataMount))); err != nil {
		return err
	}
	if p.Appliance == nil {
		return nil
	}
	return writeFile(filepath.Join(dir, applianceAnswers), p.Appliance, uid, gid)
}

func owner() (uid, gid int, err error) {
	u, err := user.Lookup("yinjian")
	if err != nil {
		return 0, 0, err
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	return uid, gid, errors.Join(err1, err2)
}

func writeFile(name string, text []byte, uid, gid int) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chown(uid, gid), f.Sync(), f.Close())
}

// useMachine gives systemd what it has to know of the machine, before the network starts.
func useMachine(image layout.Image) error {
	var text []byte
	err := mounted(0, func() (err error) {
		if err := notBelow(image, filepath.Join(volumeDir, strings.TrimPrefix(layout.LeastFile, layout.DataMount))); err != nil {
			return err
		}
		if text, err = os.ReadFile(filepath.Join(volumeDir, machineFile)); err != nil {
			return err
		}
		return beginAnew(filepath.Join(volumeDir, filepath.Base(layout.Dir)))
	})
	if err != nil {
		return err
	}
	var m machine
	if err := json.Unmarshal(text, &m); err != nil {
		return fmt.Errorf("%s: %w", machineFile, err)
	}
	// systemd-networkd, which is not root, has to read it whatever the umask.
	const folder, file = "/run/systemd/network", "/run/systemd/network/10-yinjian.network"
	if err := errors.Join(os.MkdirAll(folder, 0o755), os.Chmod(folder, 0o755)); err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(file, []byte(m.Network.file()), 0o644), os.Chmod(file, 0o644)); err != nil {
		return err
	}
	// /etc/resolv.conf leads here: there is no resolver service, whoever asks reads the servers himself.
	const place, resolver = "/run/yinjian", "/run/yinjian/resolv.conf"
	if err := errors.Join(os.MkdirAll(place, 0o755), os.Chmod(place, 0o755)); err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(resolver, []byte(m.Network.resolver()), 0o644), os.Chmod(resolver, 0o644)); err != nil {
		return err
	}
	if m.Receiver.Device == "" {
		return nil
	}
	return os.WriteFile(filepath.Join(place, "receiver"), []byte(m.Receiver.environment()), 0o644)
}

// notBelow refuses an image that is older than what a good image has allowed: it was put back on the disk by hand, past the update agent.
func notBelow(image layout.Image, file string) error {
	least, err := layout.ReadFloor(file)
	if err == nil && image.Index < least {
		err = fmt.Errorf("映像 %d 低于下限 %d，有已知缺陷，不再启动；请重装较新的映像，由备份恢复 (image %d is below the floor: it has known defects and starts no more; install a newer one and restore a backup)", image.Index, least, image.Index)
	}
	return err
}

// beginAnew takes away what a provisioning that was cut off has left in the appliance's folder: half an appliance, or a
// whole one whose administrators nobody was told of. The answers are still there, and there is no journal: it has signed
// nothing and has nothing to lose.
func beginAnew(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	has := func(name string) bool {
		return slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == name })
	}
	if !has(applianceAnswers) || has(journalDir) {
		return nil
	}
	for _, e := range entries {
		if e.Name() == applianceAnswers {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// journalDir is where the appliance keeps its journal, in its folder.
const journalDir = "journal"

const program = "/usr/lib/yinjian/yinjian"

// waitsForBackup says whether the appliance in dir waits for a backup by itself, as its answers say, and needs them for that: it
// is nothing yet, or what a restore that was cut off has left.
func waitsForBackup(dir string) (bool, error) {
	text, err := os.ReadFile(filepath.Join(dir, applianceAnswers))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	var a struct {
		Restore string `toml:"restore"`
	}
	if err == nil {
		err = toml.Unmarshal(text, &a)
	}
	if err != nil || a.Restore == "" {
		return false, err
	}
	_, unfinished := os.Stat(filepath.Join(dir, restoreUnfinished))
	_, made := os.Stat(filepath.Join(dir, "config.toml"))
	return unfinished == nil || errors.Is(made, fs.ErrNotExist), nil
}

// restoreUnfinished is the appliance's mark of a restore that has not come to its end.
const restoreUnfinished = ".restore-unfinished"

// notRunning stands in what program says before the service answers.
const notRunning = "未在运行"

// provision gives the appliance, which waits in its empty folder, the answers that were brought for it, shows what is told
// once, and takes the answers away. A service manager tries again what fails.
func provision(ctx context.Context, con *console) error {
	answers := filepath.Join(layout.Dir, applianceAnswers)
	if waits, err := waitsForBackup(layout.Dir); err != nil || waits {
		if waits {
			con.say("\nRESTORE 等待备份；指纹与恢复码见状态页 (waiting for a backup: fingerprint and token stand on the page of the state)")
		}
		return err
	}
	if _, err := os.Stat(answers); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := os.Stat(filepath.Join(layout.Dir, "config.toml")); errors.Is(err, fs.ErrNotExist) {
		out, err := run(ctx, nil, program, "provision", "--dir", layout.Dir, "--answers", answers, "-o", "json")
		if err != nil {
			if !strings.Contains(err.Error(), notRunning) {
				con.say("\nPROVISION %s 初始化未成功，将再试 (not provisioned, will be tried again): %v", markRefused, err)
			}
			return err
		}
		var made struct {
			Administrators []struct{ ID, Name, Role, Password string }
		}
		if err := json.Unmarshal(out, &made); err != nil {
			return fmt.Errorf("provision: %w", err)
		}
		if len(made.Administrators) > 0 {
			con.wipe() // what has to be written down stands at the top, and stays there
		}
		con.say("PROVISIONED 设备已初始化 (the appliance was made)")
		if len(made.Administrators) > 0 {
			con.say("ADMINISTRATORS 首批管理员的一次性口令，首次登录须更改；请记下，只显示这一次\n(the first administrators' passwords, for one login each, shown this once)")
		}
		for _, who := range made.Administrators {
			con.say("  %-8s  %s (%s)  %s", who.Role, who.ID, who.Name, who.Password)
		}
		if n := len(made.Administrators); n > 0 {
			con.keep(3 + n)
		}
	}
	return os.Remove(answers)
}

// run runs a program of the root with nothing of our environment, and answers its output.
func run(ctx context.Context, input []byte, program string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, program, args...)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin", "LC_ALL=C.UTF-8"}
	c.Stdin = bytes.NewReader(input)
	var said, complaint bytes.Buffer
	c.Stdout, c.Stderr = &said, &complaint
	if err := c.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(program), args[0], err, bytes.TrimSpace(complaint.Bytes()))
	}
	return said.Bytes(), nil
}
