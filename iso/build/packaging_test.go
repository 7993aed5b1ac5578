package build

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"yinjian/iso/layout"
)

const sources = "../.."

// units are our own services, in packaging and in the image, but for those whose work is what a sandbox takes away.
func units(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, dir := range []string{"packaging/systemd", "iso/rootfs/usr/lib/systemd/system"} {
		found, err := filepath.Glob(filepath.Join(sources, dir, "*.service"))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	if len(all) < 8 {
		t.Fatalf("only %v", all)
	}
	return all
}

// exposed are units for which 1.5 cannot be had, each with its reason and the figure that it may not exceed.
var exposed = map[string]struct{ limit, why string }{
	"yinjian-install.service": {"20", "root on raw disks, mounts the answer disk, has the answers looked at by a program that forbids its own core files, switches the machine off; runs from the medium alone, without network"},
	"yinjian-data.service":    {"25", "root on device mapper, TPM and disks, with the kernel's ciphers; makes and opens the volume, without network, and ends"},
	"yinjian-chrony.service":  {"21", "begins as root: the receiver's shared memory, port 123; the loopback; only where the answers name a receiver"},
	"yinjian-gpsd.service":    {"20", "begins as root: the receiver's line and shared memory; the loopback; only where the answers name a receiver"},
	"yinjian-packs.service":   {"40", "mounts for others, and may therefore have no mount namespace: root, CAP_SYS_ADMIN, loop and device mapper alone"},
	"emergency.service":       {"100", "restarts the machine, and nothing else"},
}

// systemd itself judges the sandbox of each service (0 best, 10 worst), as it stands in a root with its drop-ins.
func TestExposure(t *testing.T) {
	t.Parallel()
	analyze := tool(t, "systemd-analyze")
	root := t.TempDir()
	folder := filepath.Join(root, "usr/lib/systemd/system")
	for _, from := range []string{"packaging/systemd", "packaging/evaluation", "iso/rootfs/usr/lib/systemd/system"} {
		if err := os.CopyFS(folder, regular{os.DirFS(filepath.Join(sources, from))}); err != nil {
			t.Fatal(err)
		}
	}
	// Its exit status says whether the exposure, times ten, is over the threshold.
	judge := func(limit, name string) ([]byte, error) {
		return exec.Command(analyze, "security", "--offline=yes", "--no-pager", "--root="+root, "--threshold="+limit, strings.Replace(name, "@.", "@tty1.", 1)).CombinedOutput()
	}
	names := map[string]bool{}
	for _, unit := range append(units(t), "yinjian-softtoken.service") {
		name := filepath.Base(unit)
		names[name] = true
		limit := "15"
		if e, ok := exposed[name]; ok {
			limit = e.limit
		}
		if limit == "100" {
			continue
		}
		out, err := judge(limit, name)
		if err != nil {
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			t.Errorf("%s: over %s/10: %s", name, limit, lines[len(lines)-1])
		}
	}
	for name, e := range exposed {
		if !names[name] || e.why == "" {
			t.Errorf("%s is excepted from the limit, and there is no such unit or no reason", name)
		}
	}
	// The judge does judge, drop-ins too: an open unit is over the threshold, and so is ours with a drop-in that opens it.
	for name, text := range map[string]string{
		"open.service":                "[Service]\nExecStart=/bin/true\n",
		"yinjian.service.d/open.conf": "[Service]\nProtectSystem=no\nSystemCallFilter=\nPrivateDevices=no\n",
	} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"open.service", "yinjian.service"} {
		if _, err := judge("15", name); err == nil {
			t.Errorf("systemd-analyze takes %s without a sandbox: it checks nothing here", name)
		}
	}
}

// regular is a file system without its links: default.target is one, which leads to nothing here.
type regular struct{ fs.FS }

func (r regular) ReadDir(name string) ([]fs.DirEntry, error) {
	all, err := fs.ReadDir(r.FS, name)
	return slices.DeleteFunc(all, func(d fs.DirEntry) bool { return d.Type()&fs.ModeSymlink != 0 }), err
}

// In the image the service, and with it every vendor's library, has no device: the TPM that seals the data volume has an empty
// lockout password, and whoever reaches it can clear it, so that the volume opens no more.
func TestServiceHasNoDevices(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(sources, "iso/rootfs/usr/lib/systemd/system/yinjian.service.d/*.conf"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	rules, err := filepath.Glob(filepath.Join(sources, "iso/rootfs/usr/lib/udev/rules.d/*"))
	if err != nil {
		t.Fatal(err)
	}
	opens := regexp.MustCompile(`(?m)^(PrivateDevices=(no|false|0|off)|DeviceAllow=.+|DevicePolicy=(auto|strict)|.*tpm.*yinjian.*)$`)
	for _, file := range append(append(files, rules...), filepath.Join(sources, "packaging/systemd/yinjian.service")) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if found := opens.FindAllString(string(text), -1); found != nil {
			t.Errorf("%s: %q", file, found)
		}
	}
	text, err := os.ReadFile(filepath.Join(sources, "packaging/systemd/yinjian.service"))
	if err != nil || !strings.Contains(string(text), "\nPrivateDevices=yes\n") || !strings.Contains(string(text), "\nDevicePolicy=closed\n") {
		t.Errorf("the service has no devices of its own: %v", err)
	}
}

// What the agent of packs mounts is for other services: in a mount namespace of its own nobody else would see it.
func TestPacksAreMountedForOthers(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(sources, "iso/rootfs/usr/lib/systemd/system/yinjian-packs.service"))
	if err != nil {
		t.Fatal(err)
	}
	// systemd.exec(5), of systemd 252: what takes a mount namespace.
	alone := regexp.MustCompile(`(?m)^(Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc|Hostname)|ProcSubset|Private(Tmp|Devices|Mounts|Users|IPC|Network)|` +
		`(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|Bind(ReadOnly)?Paths|TemporaryFileSystem|MountFlags|MountAPIVFS|Root[A-Z][a-z]+|DynamicUser|LogNamespace)=`)
	if found := alone.FindAllString(string(text), -1); found != nil {
		t.Errorf("%q would keep what it mounts to itself", found)
	}
}

// Every hardening line of what image, deb and rpm share has a comment above it, with nothing but settings between: what it stops, or why
// it must stay open. The other units of the image have the same settings, and comments where they differ.
func TestSharedHardeningIsExplained(t *testing.T) {
	t.Parallel()
	hardens := regexp.MustCompile(`^(Protect|Private|Restrict|NoNew|Capab|Ambient|Memory|SystemCall|Lock|Remove|Keyring|Limit|UMask|Device|Tasks|install |[a-z0-9_.-]+ = )`)
	for file, least := range map[string]int{"packaging/systemd/yinjian.service": 30, "packaging/sysctl/90-yinjian.conf": 38, "packaging/modprobe/yinjian.conf": 20} {
		text, err := os.ReadFile(filepath.Join(sources, file))
		if err != nil {
			t.Fatal(err)
		}
		explained, found, comments := false, 0, 0
		for line := range strings.Lines(string(text)) {
			switch {
			case strings.HasPrefix(line, "#"):
				explained = true
				comments++
			case strings.TrimSpace(line) == "" || strings.HasPrefix(line, "["):
				explained = false
			case hardens.MatchString(line):
				if found++; !explained {
					t.Errorf("%s: nothing says why: %s", file, line)
				}
			}
		}
		if found < least || comments*6 < found {
			t.Errorf("%s: %d hardening lines, want %d, and %d comments", file, found, least, comments)
		}
	}
}

// Nothing in the image mounts the EFI system partition: while it were mounted read-only, the update agent could not mount it to
// write, and no image would ever be called good (mount(2): EBUSY).
func TestNothingMountsTheESP(t *testing.T) {
	t.Parallel()
	mounts, err := filepath.Glob(filepath.Join(sources, "iso/rootfs/usr/lib/systemd/system/*.mount"))
	if err != nil || len(mounts) == 0 {
		t.Fatal(mounts, err)
	}
	for _, file := range append(mounts, filepath.Join(sources, "iso/rootfs/etc/fstab")) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), layout.LabelESP) {
			t.Errorf("%s mounts %s", file, layout.LabelESP)
		}
	}
}

// systemd reads every unit without a word of complaint. What is not on this machine (programs, mounts, users) is not
// asked for.
func TestUnitsVerify(t *testing.T) {
	t.Parallel()
	analyze := tool(t, "systemd-analyze")
	all := units(t)
	mounts, err := filepath.Glob(filepath.Join(sources, "iso/rootfs/usr/lib/systemd/system/*.mount"))
	if err != nil {
		t.Fatal(err)
	}
	targets, err := filepath.Glob(filepath.Join(sources, "iso/rootfs/usr/lib/systemd/system/*.target"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	missing := regexp.MustCompile(`(?m)^(ExecStart|ExecStartPre|ExecStop|ConditionPathExists)=.*$`)
	var copies []string
	for _, unit := range slices.Concat(all, mounts, targets) {
		if info, err := os.Lstat(unit); err != nil || !info.Mode().IsRegular() {
			continue // default.target is a link
		}
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		text = missing.ReplaceAll(text, nil)
		if filepath.Ext(unit) == ".service" {
			text = append(text, "\n[Service]\nExecStart=/bin/true\n"...)
		}
		file := filepath.Join(dir, filepath.Base(unit))
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		copies = append(copies, file)
	}
	verify := func(files ...string) string {
		cmd := exec.Command(analyze, append([]string{"verify", "--man=no", "--generators=no", "--recursive-errors=no"}, files...)...)
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
		out, _ := cmd.CombinedOutput() // its status is 1 for warnings too
		var ours []string
		for line := range strings.Lines(string(out)) {
			if strings.HasPrefix(line, dir) {
				ours = append(ours, line)
			}
		}
		return strings.Join(ours, "")
	}
	if complaints := verify(copies...); complaints != "" {
		t.Errorf("systemd complains:\n%s", complaints)
	}
	wrong := filepath.Join(dir, "wrong.service")
	os.WriteFile(wrong, []byte("[Service]\nExecStart=/bin/true\nNoNewPriviledges=yes\n"), 0o600)
	if verify(wrong) == "" {
		t.Error("systemd says nothing about a misspelt directive: it checks nothing here")
	}
}

// nft reads the rules; the user is not on this machine, its number in the image stands in.
func TestFirewallRules(t *testing.T) {
	t.Parallel()
	nft := tool(t, "nft")
	text, err := os.ReadFile(filepath.Join(sources, "packaging/nftables/yinjian.nft"))
	if err != nil {
		t.Fatal(err)
	}
	rules := strings.Replace(string(text), "skuid yinjian", "skuid 800", 1)
	check := func(rules string) error {
		cmd := exec.Command(nft, "-c", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		out, err := cmd.CombinedOutput()
		if strings.Contains(string(out), "Operation not permitted") {
			t.Skip("nft checks rules for root alone")
		}
		if err != nil {
			t.Logf("%s", out)
		}
		return err
	}
	if err := check(rules); err != nil {
		t.Errorf("nft refuses: %v", err)
	}
	if check(strings.Replace(rules, "policy drop", "policy dropp", 1)) == nil {
		t.Error("nft takes a policy that there is not")
	}
	if n := strings.Count(rules, "policy drop;"); n != 3 {
		t.Errorf("%d chains drop by default, want input, forward and output", n)
	}
}

// Each kernel parameter is one that this kernel knows, as far as it can be looked up, and stands once.
func TestSysctl(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(sources, "packaging/sysctl/90-yinjian.conf"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, value, ok := strings.Cut(line, " = ")
		if !ok || value == "" || seen[key] {
			t.Errorf("%q is not key = value, or stands twice", line)
		}
		seen[key] = true
	}
	if len(seen) < 30 {
		t.Errorf("%d parameters", len(seen))
	}
}

// Whoever a unit, a folder or a rule names is in the image's passwd and group, with the number that the data volume of
// installed machines has; and nobody there can log in.
func TestUsers(t *testing.T) {
	t.Parallel()
	names := func(file string) map[string]string {
		text, err := os.ReadFile(filepath.Join(sources, "iso/rootfs/etc", file))
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for line := range strings.Lines(string(text)) {
			f := strings.Split(line, ":")
			out[f[0]] = strings.TrimSpace(f[2])
		}
		return out
	}
	users, groups := names("passwd"), names("group")
	if users["yinjian"] != "800" || groups["yinjian"] != "800" {
		t.Errorf("yinjian is %s:%s; installed machines have 800:800 on their disks", users["yinjian"], groups["yinjian"])
	}
	for _, unit := range units(t) {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^(User|Group)=(.+)$`).FindAllStringSubmatch(string(text), -1) {
			if m[1] == "User" && users[m[2]] == "" || m[1] == "Group" && groups[m[2]] == "" {
				t.Errorf("%s: there is no %s", unit, m[0])
			}
		}
	}
}
