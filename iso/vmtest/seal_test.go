package vmtest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance/update"
	"yinjian/iso/layout"
	"yinjian/iso/vmtest"
)

// long skips what only make image-test-long runs.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("YINJIAN_LONG") == "" {
		t.Skip("YINJIAN_LONG is not set: make image-test-long")
	}
	built(t)
}

// appliance is answers.toml for a site.
func (s *site) appliance() string {
	return fmt.Sprintf("node = \"benbu-1\"\ncampus = \"本部\"\nlisten = \"0.0.0.0:%d\"\nadmin = \"0.0.0.0:%d\"\ntime_sources = [\"%s\"]\n[administrators]\nsystem = \"zhang:张三\"\nsecurity = \"li:李四\"\naudit = \"wang:王五\"\n", apiPort, adminPort, s.time)
}

// network is that of a site, as a member of answers.json.
const network = `"network": {"address": "10.0.2.20/24", "gateway": "10.0.2.2"}`

// files are those of an answer disk.
func (s *site) files(answers string) map[string]string {
	return map[string]string{layout.AnswersFile: answers, "answers.toml": s.appliance()}
}

// fat makes a disk image with files: one FAT, as a stick from a shop has it.
func fat(t *testing.T, label string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	image := vmtest.Disk(t, dir, 64*mib)
	commands := [][]string{{vmtest.Tool(t, "mkfs.vfat"), "-F", "32", "-n", label, image}}
	for name, text := range files {
		from := filepath.Join(dir, name)
		if err := os.WriteFile(from, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		commands = append(commands, []string{vmtest.Tool(t, "mcopy"), "-i", image, from, "::/" + name})
	}
	for _, argv := range commands {
		if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", argv, err, out)
		}
	}
	return image
}

// medium starts this site's machine with the installation medium in it, and with an answer disk, "" for none.
func (s *site) medium(t *testing.T, name, answerDisk string) *vmtest.VM {
	t.Helper()
	m := s.firmware(t, name)
	m.CDROM = filepath.Join(built(t), "yinjian.iso")
	if answerDisk != "" {
		m.Disks = append(m.Disks, answerDisk)
	}
	return vmtest.Start(t, m)
}

// installs waits until the machine has installed and switched itself off.
func installs(t *testing.T, v *vmtest.VM) {
	t.Helper()
	if v.Wait("INSTALLED", "INSTALL REFUSED", "REFUSED [") != "INSTALLED" {
		v.Wait("start again)")
		t.Fatal("not installed")
	}
	v.Ended()
	record(t, "installed", v)
}

// refusesToInstall waits for a refusal, and answers what was said.
func refusesToInstall(t *testing.T, v *vmtest.VM) string {
	t.Helper()
	if v.Wait("INSTALLED", "INSTALL REFUSED") != "INSTALL REFUSED" {
		t.Fatal("it installed")
	}
	v.Wait("start again)")
	shows(t, v, "install-refused", "请关机，排除原因后再启动")
	record(t, "refused", v)
	v.Kill()
	said := v.Console()
	return said[strings.LastIndex(said, "INSTALL REFUSED"):]
}

// blank says whether nothing was written to a disk.
func blank(t *testing.T, disk string) bool {
	t.Helper()
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	is, err := layout.Blank(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	return is
}

// writesDown stands before the console of a first start while each holder's share is shown, and answers the shares.
func writesDown(v *vmtest.VM, holders int) (shares []string) {
	for range holders {
		v.Wait("alone, press Enter)")
		v.Type("\n")
		v.Wait("抄写")
		said := v.Console()
		share, _, _ := strings.Cut(said[strings.LastIndex(said, "印鉴 密钥份额"):], "抄写")
		shares = append(shares, share)
		v.Wait("press Enter when")
		v.Type("\n")
	}
	return shares
}

// typesShare types a share that was written down, without its empty lines, and the empty line that ends it.
func typesShare(v *vmtest.VM, share string) {
	v.Wait("RECOVERY: type a share")
	for line := range strings.Lines(share) {
		if line = strings.TrimSpace(line); line != "" {
			v.Type(line + "\n")
		}
	}
	v.Type("\n")
}

// The recovery key, as its holders see and type it: at the first start each writes a share down, on another mainboard two
// of them open the volume, and from then on that machine opens it by itself, and the one before does not.
func TestRecovery(t *testing.T) {
	long(t)
	s := newSite(t)
	installs(t, s.medium(t, "install", vmtest.Label(t, layout.AnswersLabel, s.files(`{"recovery": {"holders": ["赵", "钱", "孙"], "threshold": 2}, `+network+`}`))))
	v := vmtest.Start(t, s.firmware(t, "boot"))
	shares := writesDown(v, 3)
	v.Wait("数据卷已打开")
	v.Kill()

	before := s.tpm
	s.tpm = filepath.Join(t.TempDir(), "tpm")
	v = vmtest.Start(t, s.firmware(t, "recovery"))
	v.Wait("LOCKED")
	typesShare(v, shares[2])
	typesShare(v, strings.Replace(shares[0], "1: ", "1: 0", 1)) // a slip
	typesShare(v, shares[2])                                    // once more
	typesShare(v, shares[0])
	v.Wait("RECOVERED")
	v.Wait("SEALED")
	v.Wait("数据卷已打开")
	record(t, "opened by two shares, sealed to the new TPM", v)
	v.Kill()
	v = s.boot(t) // nobody is asked any more
	v.Kill()
	s.tpm = before
	v = vmtest.Start(t, s.firmware(t, "before"))
	if v.Wait("LOCKED", "数据卷已打开") != "LOCKED" {
		t.Error("the mainboard that was replaced still opens the data")
	}
	v.Kill()
}

// A machine without a TPM: its volume has a passphrase, typed at the console and not shown. A wrong one is refused, three
// lock the machine, and who has forgotten it sets another by the recovery key.
func TestPassphrase(t *testing.T) {
	long(t)
	s := newSite(t)
	s.tpm = ""
	installs(t, s.medium(t, "install", vmtest.Label(t, layout.AnswersLabel, s.files(`{"seal": "passphrase", "recovery": {"holders": ["赵", "钱", "孙"], "threshold": 2}, `+network+`}`))))
	const right, another = "ma que sui xiao 13", "wu zang ju quan 14"
	types := func(v *vmtest.VM, prompt, text string) {
		v.Wait(prompt)
		v.Wait("\n")
		v.Type(text + "\n")
	}
	v := vmtest.Start(t, s.firmware(t, "first"))
	types(v, "NEW PASSPHRASE", "short")
	types(v, "too short", right)
	types(v, "ONCE MORE", right+"x")
	types(v, "they differ", right)
	types(v, "ONCE MORE", right)
	shares := writesDown(v, 3)
	v.Wait("数据卷已打开")
	record(t, "volume made", v)
	if strings.Contains(v.Console(), right) {
		t.Error("the passphrase was shown")
	}
	v.Kill()

	v = vmtest.Start(t, s.firmware(t, "right"))
	types(v, "3 tries", "not the right one")
	types(v, "2 tries", right)
	v.Wait("数据卷已打开")
	record(t, "opened by the passphrase, at the second try", v)
	v.Kill()

	v = vmtest.Start(t, s.firmware(t, "forgotten"))
	for _, left := range []string{"3 tries", "2 tries", "1 tries"} {
		types(v, left, "not the right one")
		v.Wait("WRONG PASSPHRASE")
	}
	v.Wait("LOCKED")
	typesShare(v, shares[0])
	typesShare(v, shares[1])
	v.Wait("RECOVERED")
	types(v, "NEW PASSPHRASE", another)
	types(v, "ONCE MORE", another)
	v.Wait("SEALED")
	v.Wait("数据卷已打开")
	record(t, "another passphrase set, by the recovery key", v)
	v.Kill()

	v = vmtest.Start(t, s.firmware(t, "another"))
	types(v, "3 tries", right)
	types(v, "2 tries", another)
	v.Wait("数据卷已打开")
	v.Kill()
}

// Answers that cannot be acted on: each field is named on the console, and nothing is written. A disk that is not blank
// takes the token that the refusal showed, and no other.
func TestAnswerDisk(t *testing.T) {
	long(t)
	t.Run("every field", func(t *testing.T) {
		s := newSite(t)
		said := refusesToInstall(t, s.medium(t, "fields", fat(t, layout.AnswersLabel, s.files(`{"disk": "/dev/vda", "wipe": "yes", "seal": "none",
			"recovery": {"holders": ["赵", "钱"], "threshold": 2}, "network": {"interface": "ens 3", "address": "192.0.2.10/24", "gateway": "192.0.3.1", "dns": ["x"]}}`))))
		for _, field := range []string{"disk", "wipe", "seal", "recovery", "network.interface", "network.gateway", "network.dns"} {
			if !strings.Contains(said, field+": ") {
				t.Errorf("%s is not named in: %s", field, said)
			}
		}
		if !blank(t, s.disk) {
			t.Error("something was written")
		}
	})
	t.Run("the appliance's", func(t *testing.T) {
		s := newSite(t)
		files := s.files("{" + network + "}")
		files["answers.toml"] = strings.Replace(files["answers.toml"], "benbu-1", "Ben Bu", 1) + "auditor = \"sun:孙七\"\n"
		said := refusesToInstall(t, s.medium(t, "unknown", vmtest.Label(t, layout.AnswersLabel, files)))
		if !strings.Contains(said, "auditor") || !blank(t, s.disk) {
			t.Errorf("an unknown key: %s", said)
		}
		files["answers.toml"] = strings.Replace(s.appliance(), "benbu-1", "Ben Bu", 1)
		said = refusesToInstall(t, s.medium(t, "node", vmtest.Label(t, layout.AnswersLabel, files)))
		if !strings.Contains(said, "node: ") || !blank(t, s.disk) {
			t.Errorf("a wrong name: %s", said)
		}
	})
	t.Run("no TPM", func(t *testing.T) {
		s := newSite(t)
		s.tpm = ""
		said := refusesToInstall(t, s.medium(t, "no-tpm", vmtest.Label(t, layout.AnswersLabel, s.files("{"+network+"}"))))
		if !strings.Contains(said, "NO TPM") || !blank(t, s.disk) {
			t.Error(said)
		}
	})
	t.Run("a disk that is not blank", func(t *testing.T) {
		s := newSite(t)
		f, err := os.OpenFile(s.disk, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("somebody's data"), 4096); err != nil {
			t.Fatal(err)
		}
		f.Close()
		said := refusesToInstall(t, s.medium(t, "no token", vmtest.Label(t, layout.AnswersLabel, s.files(`{"disk": "vda", "wipe": "wipe-0123456789abcdef", `+network+`}`))))
		token := regexp.MustCompile(`wipe-[0-9a-f]{16}`).FindString(said)
		b := make([]byte, 15)
		if f, err = os.Open(s.disk); err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.ReadAt(b, 4096); err != nil || token == "" || string(b) != "somebody's data" {
			t.Fatalf("token %q, on the disk %q, %v", token, b, err)
		}
		installs(t, s.medium(t, "token", fat(t, layout.AnswersLabel, s.files(`{"disk": "vda", "wipe": "`+token+`", `+network+`}`))))
		if len(table(t, s.disk).Partitions) != layout.NumberData {
			t.Error("no whole partition table")
		}
	})
}

// Without an answer disk the machine asks, on its serial line: slips are asked again, a disk that is not blank wants its
// token typed, and what was answered makes an appliance.
func TestDialogue(t *testing.T) {
	long(t)
	s := newSite(t)
	f, err := os.OpenFile(s.disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("somebody's data"), 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	v := s.medium(t, "dialogue", "")
	answer := func(question, text string) {
		v.Wait(question)
		v.Wait(": ")
		v.Type(text + "\n")
	}
	answer("(install on)", "sdq")
	v.Wait("no such disk")
	answer("(install on)", "vda")
	v.Wait("(to confirm, type) ")
	said := v.Console()
	token := regexp.MustCompile(`wipe-[0-9a-f]{16}`).FindString(said)
	v.Type("yes\n")
	v.Wait("it differs")
	answer("(to confirm, type)", token)
	answer("(data sealed to)", "")
	answer("(names, or nothing)", "")
	answer("(interface)", "")
	answer("(address/prefix, Enter for DHCP)", "10.0.2.20")
	v.Wait("want an address with its prefix length")
	answer("(address/prefix, Enter for DHCP)", "10.0.2.20/24")
	answer("(gateway)", "10.0.2.2")
	answer("(DNS)", "")
	answer("(name of this node, for ever)", "")
	answer("(campus)", "")
	answer("(NTP servers, host:port)", s.time)
	answer("(login and name)", "zhang 张三")
	answer("(login and name)", "zhang 李四")
	v.Wait("given twice")
	answer("(login and name)", "li 李四")
	answer("(login and name)", "wang 王五")
	v.Wait("about to install")
	v.Wait("(to begin, type yes)")
	shows(t, v, "dialogue", "开始安装请输入")
	v.Press("yes\n") // at the keyboard, before the screen
	installs(t, v)
	v = s.boot(t)
	login(t, v)
	for range 4 { // each is a page, and the passwords stay above them
		v.Wait("STATE:")
	}
	shows(t, v, "status", "状态")
	shows(t, v, "first-start", "首批管理员的一次性口令")
	record(t, "installed by the dialogue, administrators logged in from outside", v)
	v.Kill()
}

// Disks other than virtio's, and the medium as a stick. A disk on USB is no target: what is installed has no driver for it.
func TestDisks(t *testing.T) {
	long(t)
	for _, bus := range []string{"nvme", "ahci"} {
		t.Run(bus, func(t *testing.T) {
			s := newSite(t)
			s.bus = bus
			m := s.firmware(t, "install")
			stick := filepath.Join(built(t), "yinjian.iso")
			if bus == "nvme" {
				m.Stick = copied(t, stick)
			} else {
				m.CDROM = stick
			}
			m.Disks = append(m.Disks, fat(t, layout.AnswersLabel, s.files("{"+network+"}")))
			installs(t, vmtest.Start(t, m))
			v := s.boot(t)
			login(t, v)
			record(t, "administrators logged in", v)
			v.Kill()
		})
	}
	t.Run("usb", func(t *testing.T) {
		s := newSite(t)
		s.bus = "usb"
		said := refusesToInstall(t, s.medium(t, "usb", fat(t, layout.AnswersLabel, s.files("{"+network+"}"))))
		if !strings.Contains(said, "no disk at all") || !blank(t, s.disk) {
			t.Error(said)
		}
	})
}

// A BIOS finds nothing to start, neither on the medium nor on an installed disk: only firmware that checks signatures does. In a
// laboratory, where the kernel is handed over by who runs the machine, the same root is installed, started and signs there.
func TestBIOS(t *testing.T) {
	long(t)
	const passphrase = "ma que sui xiao 13"
	medium := filepath.Join(built(t), "yinjian.iso")
	s := newSite(t)
	s.tpm = ""
	nothing := func(name string, change func(*vmtest.Machine)) {
		m := vmtest.Machine{Name: name, Boot: 2 * time.Minute}
		change(&m)
		v := vmtest.Start(t, m)
		if v.Wait("No bootable device", "yinjian-init", "verified ") != "No bootable device" {
			t.Errorf("a BIOS started %s", name)
		}
		if said := v.Console(); len(m.Disks) > 0 && !strings.Contains(said, "starts by UEFI with Secure Boot") {
			t.Error("the disk does not say why")
		}
		record(t, name+": nothing to start", v)
		v.Kill()
	}
	nothing("medium", func(m *vmtest.Machine) { m.CDROM = medium })

	handed := func(media string) vmtest.Machine {
		m := s.firmware(t, "lab-"+media)
		program := filepath.Join(built(t), media+".efi")
		m.Variables, m.Kernel = "", filepath.Join(t.TempDir(), "vmlinuz")
		m.Initrd, m.Append = filepath.Join(built(t), media+".initrd"), string(vmtest.Section(t, program, ".cmdline"))
		if err := os.WriteFile(m.Kernel, vmtest.Section(t, program, ".linux"), 0o600); err != nil {
			t.Fatal(err)
		}
		return m
	}
	m := handed(layout.MediaISO)
	m.CDROM, m.Disks = medium, append(m.Disks, vmtest.Label(t, layout.AnswersLabel, s.files(`{"seal": "passphrase", `+network+`}`)))
	installs(t, vmtest.Start(t, m))
	nothing("installed disk", func(m *vmtest.Machine) { m.Disks = []string{s.disk} })

	v := vmtest.Start(t, handed(layout.MediaDisk))
	for _, prompt := range []string{"NEW PASSPHRASE", "ONCE MORE"} {
		v.Wait(prompt)
		v.Wait("\n")
		v.Type(passphrase + "\n")
	}
	v.Wait("数据卷已打开")
	b := &business{register(t, login(t, v))}
	c := b.client(t, v)
	ready(t, c)
	sign(t, c, "n-1")
	record(t, "kernel handed over: a record signed and stamped", v)
	v.Kill()
}

// seeded is a source of the points at which the power is cut: another each time, but for the environment's YINJIAN_SEED.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("YINJIAN_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("YINJIAN_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// cuts is how often the power is cut.
func cuts(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("YINJIAN_CUTS"))
	if err != nil {
		n = 10
	}
	return n
}

// sectionOf is a partition of a disk.
func sectionOf(f *os.File, parts *layout.Table, number int) *io.SectionReader {
	p := parts.Partitions[number-1]
	return io.NewSectionReader(f, parts.Offset(p), parts.Size(p))
}

// The power is cut while the machine installs: four times in five at a part of the time that an installation took before, once in each
// part of it, and otherwise when it has said that it is done, before it has switched itself off. The disk stays blank, or is as whole as
// one that was not cut off; the next start of the medium installs, or the disk starts. What happens at the writes of the table itself,
// which take milliseconds, package install's TestWriteCutAnywhere tries.
func TestPowerCutsOfInstallation(t *testing.T) {
	long(t)
	random := seeded(t)
	root, err := layout.ParseCommandLine(string(vmtest.Section(t, filepath.Join(built(t), "disk.efi"), ".cmdline")))
	if err != nil {
		t.Fatal(err)
	}
	esp, err := os.ReadFile(filepath.Join(built(t), "esp.img"))
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t)
	answers := vmtest.Label(t, layout.AnswersLabel, s.files("{"+network+"}"))
	var blanks, wholes int
	var takes time.Duration // from its first word on to its last
	for n := range cuts(t) + 1 {
		if err := os.Truncate(s.disk, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(s.disk, 4<<30); err != nil {
			t.Fatal(err)
		}
		v := s.medium(t, "cut", answers)
		v.Wait("正在安装到")
		began := v.Elapsed()
		if n == 0 { // how long it takes, and not cut off
			v.Wait("INSTALLED")
			takes = v.Elapsed() - began
			v.Ended()
			continue
		}
		part := (float64(n-1) + random.Float64()) / float64(cuts(t))
		delay := time.Duration(part / 0.8 * float64(takes))
		if part >= 0.8 {
			v.Wait("INSTALLED")
			delay = time.Duration(random.Int64N(int64(time.Second)))
		}
		v.After(delay)
		v.Kill()
		f, err := os.Open(s.disk)
		if err != nil {
			t.Fatal(err)
		}
		parts, err := layout.ReadTable(f, 4<<30)
		switch {
		case err == nil: // it counts: then all of it is there
			wholes++
			if err := layout.Check(sectionOf(f, parts, layout.NumberRootA), root.Root); err != nil {
				t.Errorf("after %v: the root: %v", delay, err)
			}
			b := make([]byte, len(esp))
			if _, err := sectionOf(f, parts, layout.NumberESP).ReadAt(b, 0); err != nil || !bytes.Equal(b, esp) {
				t.Errorf("after %v: the EFI system partition is another (%v)", delay, err)
			}
			head := make([]byte, 20)
			if _, err := sectionOf(f, parts, layout.NumberRootB).ReadAt(head, 0); err != nil || string(head) != "YINJIAN FIRST START\n" {
				t.Errorf("after %v: the answers are missing", delay)
			}
		case blank(t, s.disk):
			blanks++
		default:
			t.Errorf("after %v: neither blank nor whole", delay)
		}
		f.Close()
	}
	noteTook("%7.1f s  %s: an installation; cut off, %d times blank, %d times whole", takes.Seconds(), t.Name(), blanks, wholes)
	if cuts(t) >= 10 && (blanks == 0 || wholes == 0) {
		t.Errorf("%d times blank, %d times whole: the cuts are not on both sides of the table", blanks, wholes)
	}
	// Whatever the last cut has left: the machine installs, or starts.
	if blank(t, s.disk) {
		installs(t, s.medium(t, "again", answers))
	}
	v := s.boot(t)
	login(t, v)
	record(t, fmt.Sprintf("comes up after %d power cuts", cuts(t)), v)
	v.Kill()
}

// The power is cut again and again during the first start, and at last when the administrators' passwords have just been
// shown: the machine goes on by itself each time, and the last passwords shown are theirs.
func TestPowerCutsOfFirstStart(t *testing.T) {
	long(t)
	random := seeded(t)
	s := installed(t)
	steps := []string{"BdsDxe: starting", "verified ", "首次启动", "数据卷已建立", "数据卷已打开", "PROVISIONED", "STATE: operational"}
	shown := ""
	for n := range cuts(t) {
		v := vmtest.Start(t, s.firmware(t, "cut"))
		k := random.IntN(len(steps) - 1)
		seen := v.Wait(append([]string{"REFUSED"}, steps[k:]...)...)
		if seen == "REFUSED" {
			v.Wait("\n")
			t.Fatalf("after %d power cuts", n)
		}
		delay := time.Duration(random.Int64N(int64(6 * time.Second)))
		v.After(delay)
		v.Kill()
		if newcomer.MatchString(v.Console()) {
			shown = v.Console()
		}
		t.Logf("cut %d: %v after %q", n+1, delay, seen)
	}
	if shown == "" {
		v := vmtest.Start(t, s.firmware(t, "shown"))
		v.Wait("ADMINISTRATORS")
		v.Wait("  audit ")
		v.Wait("\n")
		v.Kill()
		shown = v.Console()
		t.Log("cut as soon as the passwords were shown")
	}
	v := s.boot(t)
	o := newOfficers(t, v)
	for _, f := range newcomer.FindAllStringSubmatch(shown, -1) {
		o.enter(t, f[2], f[3])
	}
	record(t, fmt.Sprintf("comes up after %d power cuts", cuts(t)), v)
	v.Kill()
}

// The power is cut while an update is sent, staged and committed, and during its first start: either image starts, by
// itself, with all that was signed before.
func TestPowerCutsOfUpdate(t *testing.T) {
	long(t)
	random := seeded(t)
	second := next(t, 2)
	s, b := inUse(t)
	var first *wire.SignResult
	check := func(v *vmtest.VM, n int) (o *officers, running uint64) {
		c := b.client(t, v)
		ready(t, c)
		if first == nil {
			first = sign(t, c, "n-1")
		}
		kept(t, c, first, fmt.Sprintf("cut-%d", n))
		o = loginAgain(t, v)
		answer, err := o.admin.WithSession(o.tokens["system"], nil).UpdateStatus(t.Context())
		var status update.Status
		if err == nil {
			err = json.Unmarshal(answer, &status)
		}
		if err != nil {
			t.Fatal(err)
		}
		return o, status.Running
	}
	for n := range cuts(t) {
		v := s.boot(t)
		o, running := check(v, n)
		if running == 2 { // it got through: from the beginning
			v.Kill()
			s, b = inUse(t)
			first = nil
			v = s.boot(t)
			o, _ = check(v, n)
		}
		sent := make(chan error)
		go func() { sent <- o.replace(t.Context(), second) }()
		delay := time.Duration(random.Int64N(int64(30 * time.Second)))
		var err error
		select {
		case err = <-sent: // and then the power
		case <-time.After(delay):
			v.Kill()
			err = <-sent
		}
		v.Kill()
		t.Logf("cut %d: %v, %v", n+1, delay, err)
	}
	v := s.boot(t)
	_, running := check(v, cuts(t))
	record(t, fmt.Sprintf("image %d signs after %d power cuts", running, cuts(t)), v)
	v.Kill()
}

// replace stages and commits an update.
func (o *officers) replace(ctx context.Context, bundle string) error {
	a := o.admin.WithSession(o.tokens["system"], func(p wire.Proposed) {
		// What becomes of it, the answer to the commit says.
		_, _ = o.admin.WithSession(o.tokens["security"], nil).Decide(ctx, "approve", wire.Decide{ID: p.Proposal, SM3: p.SM3})
	})
	f, err := os.Open(bundle)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	answer, err := a.StageUpdate(ctx, f, info.Size())
	if err != nil {
		return err
	}
	var offer update.Offer
	if err := json.Unmarshal(answer, &offer); err != nil {
		return err
	}
	_, err = a.CommitUpdate(ctx, wire.CommitUpdate{SM3: offer.SM3, Reason: "季度补丁"})
	return err
}

// The appliance signs for as long as YINJIAN_SOAK says, two minutes by default, and stays ready; after the power was cut all
// that it has answered is there.
func TestSoak(t *testing.T) {
	long(t)
	d, err := time.ParseDuration(os.Getenv("YINJIAN_SOAK"))
	if err != nil {
		d = 2 * time.Minute
	}
	s, b := inUse(t)
	v := s.boot(t)
	c := b.client(t, v)
	ready(t, c)
	var records []string
	for began := time.Now(); time.Since(began) < d; { // interval
		records = append(records, sign(t, c, fmt.Sprintf("soak-%d", len(records))).RecordID)
		if r, err := c.Ready(t.Context()); err != nil || !r.Ready {
			t.Fatalf("after %d records: %+v, %v", len(records), r, err)
		}
	}
	record(t, fmt.Sprintf("%d records signed and judged", len(records)), v)
	v.Kill()
	v = s.boot(t)
	c = b.client(t, v)
	ready(t, c)
	for i, id := range records {
		if again := sign(t, c, fmt.Sprintf("soak-%d", i)); !again.Replayed || again.RecordID != id {
			t.Errorf("record %d is %s, was %s", i, again.RecordID, id)
		}
	}
	record(t, "all of them there after a power cut", v)
	v.Kill()
}
