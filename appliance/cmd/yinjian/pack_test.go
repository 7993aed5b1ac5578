package main_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance"
	"yinjian/appliance/assess"
	"yinjian/appliance/pack"
	"yinjian/appliance/update"
	"yinjian/appliance/update/updatetest"
	"yinjian/hsm/hsmtest"
	"yinjian/iso/layout"
	"yinjian/iso/verity"
)

// looped mounts as the agent does, without dm-verity, for kernels that have none: what dm-verity adds is tried in a virtual machine
// (iso/vmtest).
type looped struct{ pack.System }

func (looped) Mount(file *os.File, start int64, root layout.Root, _, at string) error {
	loop, err := verity.Loop(file, start, int64(root.Blocks())*layout.BlockSize)
	if err != nil {
		return err
	}
	defer loop.Close()
	return pack.Squashfs(loop.Name(), at)
}

// mounter is the kernel's, where it has what packs are mounted by.
func mounter(t *testing.T) pack.Mounter {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0); err == nil {
		f.Close()
		return pack.System{}
	}
	probe, err := os.Open("/dev/loop-control")
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	probe.Close()
	return looped{}
}

// A packer is who makes and signs packs, with the two keys in files, and the agent that takes them.
type packer struct {
	dir, socket string
	stop        func()
}

func newPacker(t *testing.T) *packer {
	t.Helper()
	p := &packer{dir: tempDir(t)}
	p.socket = filepath.Join(p.dir, "socket")
	for _, by := range []string{pack.ByRelease, pack.ByHospital} {
		key := updatetest.Key(t)
		private, err := smx509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		p.put(t, by+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
		p.put(t, by+".pem", publicPEM(t, key))
	}
	return p
}

func publicPEM(t *testing.T, key *sm2.PrivateKey) []byte {
	t.Helper()
	der, err := smx509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func (p *packer) at(name string) string { return filepath.Join(p.dir, name) }

func (p *packer) put(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(p.at(name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// keeper is the agent's, when it starts.
func (p *packer) keeper(t *testing.T, m pack.Mounter) *pack.Keeper {
	t.Helper()
	cfg := pack.KeeperConfig{Dir: p.at("packs"), Mounts: p.at("run"), KeyFile: p.at("registered.pem"), Asked: true, Arch: runtime.GOARCH, Verity: "sm3", Mounter: m}
	var err error
	if cfg.Keys.Release, err = pack.ParseKey([]byte(readFile(t, p.at("release.pem")))); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(cfg.KeyFile); err == nil {
		if cfg.Keys.Hospital, err = pack.ParseKey(text); err != nil {
			t.Fatal(err)
		}
	}
	k, err := pack.NewKeeper(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// serve starts the agent, as the machine's start would.
func (p *packer) serve(t *testing.T, m pack.Mounter) {
	t.Helper()
	k := p.keeper(t, m)
	ln, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- update.ServePacks(ctx, ln, k) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(p.stop)
}

// mounted are the packs that are mounted now.
func (p *packer) mounted(t *testing.T) string {
	t.Helper()
	var out []string
	for line := range strings.Lines(readFile(t, "/proc/self/mounts")) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasPrefix(f[1], p.dir) {
			out = append(out, filepath.Base(f[1])+" "+f[2]+" "+f[3])
		}
	}
	return strings.Join(out, "\n")
}

// A maker's library comes in as a pack: SoftHSM2, which stands for any, with the libraries that it needs. Made and signed by two
// at their desks, judged by the agent, installed by two persons, loaded by a worker that sees it and nothing of the system's
// instead, signing a record; kept while it is used, over a restart too; told of to the evaluator; removed, and nothing is left.
func TestPack(t *testing.T) {
	t.Parallel()
	need(t, "mksquashfs", "softhsm2-util", "openssl", "cc")
	if _, err := os.Stat(hsmtest.SoftHSMModule); err != nil {
		t.Skip("SoftHSM2 is not installed")
	}
	mount := mounter(t)
	p := newPacker(t)
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	m.trusted(t)
	two := func(args ...string) []string {
		return append(append([]string{"pack"}, args...), "--dir", dir, "--reason", "接入密码机", "--confirmed-by", "张三", "--confirmed-by", "李四")
	}
	refused(t, 1, []string{"不是密封设备", "docs/packs.md"}, "pack", "list", "--dir", dir)
	m.stop(t)
	configure(t, dir, func(c *appliance.Config) { c.Packs.Socket = p.socket })
	m = serve(t, dir)
	m.trusted(t)
	refused(t, 1, []string{"厂商包代理没有应答"}, "pack", "list", "--dir", dir)
	p.serve(t, mount)

	// At the maker's and the hospital's desks.
	tokens := filepath.Join(dir, "packs", "softhsm2", "tokens")
	p.put(t, "softhsm2.conf", []byte("directories.tokendir = "+tokens+"\nlog.level = ERROR\n"))
	// Its daemon, which SoftHSM2 does not need: it says who it is when it is ready, and stays.
	if o := command(t, nil, "cc", "-o", p.at("agent"), "testdata/agent.c"); o.code != 0 {
		t.Fatal(o)
	}
	// running counts the processes that run from the pack.
	running := func() (n int) {
		all, _ := filepath.Glob("/proc/[0-9]*/exe") // the pattern is well-formed
		for _, link := range all {
			if program, err := os.Readlink(link); err == nil && strings.HasPrefix(program, p.at("run")+"/") {
				n++
			}
		}
		return n
	}
	agentPID := func(other int) (pid int) {
		t.Helper()
		eventually(t, 30*time.Second, "the maker's daemon runs", func() bool {
			b, _ := os.ReadFile(filepath.Join(dir, "packs", "softhsm2", "agent.pid")) // not yet
			pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
			return pid > 0 && pid != other
		})
		return pid
	}
	file := p.at("softhsm2.pack")
	libraries := "/usr/lib/x86_64-linux-gnu/"
	create := func(serial string, more ...string) {
		t.Helper()
		mustRun(t, append([]string{"pack", "create", "--kind", "pkcs11", "--name", "softhsm2", "--version", "2.6.1", "--serial", serial, "--maker", "OpenDNSSEC", "--library", "lib/libsofthsm2.so",
			"--env", "SOFTHSM2_CONF={pack}/etc/softhsm2.conf", "--daemon", "sbin/agent", "--daemon-arg", "{state}", "--daemon-ready", "{state}/agent.pid",
			"--verity", "sm3", "--out", file, "sbin/agent=" + p.at("agent"), "lib/libsofthsm2.so=" + hsmtest.SoftHSMModule, "etc/softhsm2.conf=" + p.at("softhsm2.conf")}, more...)...)
	}
	refused(t, 1, []string{"libcrypto.so.3", "--system"}, "pack", "create", "--kind", "pkcs11", "--name", "softhsm2", "--version", "2.6.1", "--serial", "1", "--maker", "x",
		"--library", "libsofthsm2.so", "--out", file, hsmtest.SoftHSMModule)
	create("2", "lib/libcrypto.so.3="+libraries+"libcrypto.so.3", "lib/libstdc++.so.6="+libraries+"libstdc++.so.6", "lib/libgcc_s.so.1="+libraries+"libgcc_s.so.1")
	mustRun(t, "pack", "sign", file, "--by", "release", "--key", p.at("release.key"))
	judge := []string{"pack", "verify", file, "--release-key", p.at("release.pem"), "--hospital-key", p.at("hospital.pem")}
	refused(t, 1, []string{"医院"}, judge...)
	refused(t, 1, []string{"先登记医院的公钥"}, "pack", "stage", file, "--dir", dir)
	mustRun(t, two("key", p.at("hospital.pem"))...)
	m.changeOf(t, "/admin/v1/packs/key", "pack.key/outcome", "", "", `"hospital_key":`)
	refused(t, 1, []string{"不能更换"}, two("key", p.at("release.pem"))...)
	refused(t, 1, []string{"医院"}, "pack", "stage", file, "--dir", dir)
	// The hospital signs elsewhere, with a program of others.
	mustRun(t, "pack", "show", file, "--signed", p.at("signed"))
	if o := command(t, nil, "openssl", "dgst", "-sm3", "-sign", p.at("hospital.key"), "-sigopt", "distid:1234567812345678", "-out", p.at("value"), p.at("signed")); o.code != 0 {
		t.Fatal(o)
	}
	mustRun(t, "pack", "sign", file, "--by", "hospital", "--signature", p.at("value"))
	mustRun(t, judge...)
	if o := mustRun(t, "pack", "show", file); !strings.Contains(o.stdout, "lib/libcrypto.so.3") || !strings.Contains(o.stdout, "SOFTHSM2_CONF={pack}/etc/softhsm2.conf") {
		t.Error(o)
	}

	// Into the appliance.
	var staged pack.Installed
	if err := json.Unmarshal([]byte(mustRun(t, "pack", "stage", file, "--dir", dir, "-o", "json").stdout), &staged); err != nil {
		t.Fatal(err)
	}
	m.changeOf(t, "/admin/v1/packs/file", "pack.file/staged", "softhsm2", "", `"state":"staged"`)
	if got := p.mounted(t); got != "" {
		t.Errorf("mounted before anybody has decided: %s", got)
	}
	refused(t, 1, []string{"persons"}, "pack", "install", "--dir", dir, "--sm3", staged.SM3, "--reason", "接入密码机")
	refused(t, 1, []string{staged.SM3}, two("install", "--sm3", strings.Repeat("0", 64))...)
	mustRun(t, two("install", "--sm3", staged.SM3)...)
	m.changeOf(t, "/admin/v1/packs/install", "pack.file/outcome", "softhsm2", "", `"state":"installed"`)
	if got := p.mounted(t); !strings.HasPrefix(got, "softhsm2 squashfs ro,nosuid,nodev") || strings.Contains(got, "\n") {
		t.Errorf("mounted: %s", got)
	}
	if err := os.WriteFile(filepath.Join(p.at("run"), "softhsm2", "lib", "more"), nil, 0o600); err == nil {
		t.Error("something was written into the pack")
	}

	// A machine that needs it.
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	if o := command(t, []string{"SOFTHSM2_CONF=" + p.at("softhsm2.conf")}, "softhsm2-util", "--init-token", "--free", "--label", "vendor-staff", "--so-pin", "87654321", "--pin", "123456"); o.code != 0 {
		t.Fatal(o)
	}
	describe := func(module string) string {
		name := p.at("machine.toml")
		p.put(t, "machine.toml", fmt.Appendf(nil, "name = 'vendor'\nmodule = '%s'\nprofile = 'softhsm2'\nweight = 100\n[slots.staff]\ntoken_label = 'vendor-staff'\npin_file = '%s'\n", module, pinFile(t, "123456")))
		return name
	}
	add := func(module string) []string {
		return []string{"hsm", "add", describe(module), "--dir", dir, "--reason", "扩容"}
	}
	refused(t, 1, []string{"pack:名称"}, add("pack:softhsm2/../../etc/passwd")...)
	refused(t, 1, []string{"没有安装厂商包"}, add("pack:other/lib/libsofthsm2.so")...)
	refused(t, 1, []string{"的库是"}, add("pack:softhsm2/lib/libcrypto.so.3")...)
	mustRun(t, add("pack:softhsm2/lib/libsofthsm2.so")...)
	his := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "", "--algorithms", "RSA-2048")
	signs := func(key string) {
		t.Helper()
		req := asserted("D1", key)
		req.Algorithm = "RSA-2048"
		done := m.machines(t)["vendor"].done("staff")
		if _, err := his.Sign(t.Context(), key, req); err != nil {
			t.Fatal(err)
		}
		if got := m.machines(t)["vendor"].done("staff"); got <= done {
			t.Errorf("%s: the maker's machine did %d operations before and %d after", key, done, got)
		}
	}
	signs("visit-1")
	// Its daemon runs from the pack, and is started again.
	pid := agentPID(0)
	if program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); program != filepath.Join(p.at("run"), "softhsm2", "sbin", "agent") {
		t.Errorf("the daemon is %q, %v", program, err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	pid = agentPID(pid)
	if n := running(); n != 2 { // it, and what has gone into the background; of the one before nothing
		t.Errorf("%d processes run from the pack", n)
	}
	// What the worker has loaded, of the kernel.
	var worker struct {
		Slots []struct{ PID int }
	}
	a := m.admin()
	defer a.Close()
	var list []json.RawMessage
	b, err := a.ListMachines(t.Context())
	if err == nil {
		if err = json.Unmarshal(b, &list); err == nil {
			err = json.Unmarshal(list[1], &worker)
		}
	}
	if err != nil || len(worker.Slots) != 1 {
		t.Fatalf("%s, %v", b, err)
	}
	maps := readFile(t, fmt.Sprintf("/proc/%d/maps", worker.Slots[0].PID))
	for _, name := range []string{"libsofthsm2.so", "libcrypto.so.3", "libstdc++.so.6", "libgcc_s.so.1"} {
		if !strings.Contains(maps, filepath.Join(p.at("run"), "softhsm2", "lib", name)) || strings.Contains(maps, libraries+name) {
			t.Errorf("%s is not the pack's", name)
		}
	}
	if !strings.Contains(maps, libraries+"libc.so.6") {
		t.Error("the C library is not the system's")
	}

	// Nobody takes it away while it is used: the appliance says by whom, and the agent sees for itself.
	refused(t, 1, []string{"由密码机 vendor 使用"}, two("remove", "--name", "softhsm2")...)
	if _, err := (&update.PackClient{Socket: p.socket}).Remove(t.Context(), "softhsm2"); err == nil || !strings.Contains(err.Error(), "正在使用") {
		t.Errorf("the agent: %v", err)
	}
	// An agent that is started again finds it mounted, and used.
	if s := p.keeper(t, mount).State(); len(s.Packs) != 1 || s.Packs[0].Fault != "" || s.Packs[0].Folder == "" || strings.Count(p.mounted(t), "softhsm2") != 1 {
		t.Errorf("another agent: %+v; mounted: %s", s, p.mounted(t))
	}
	create("1", "--system", "libcrypto.so.3", "--system", "libstdc++.so.6", "--system", "libgcc_s.so.1")
	for _, by := range []string{"release", "hospital"} {
		mustRun(t, "pack", "sign", file, "--by", by, "--key", p.at(by+".key"))
	}
	refused(t, 1, []string{"不高于"}, "pack", "stage", file, "--dir", dir)

	// What the evaluator and the operator are told.
	out := p.at("evidence")
	mustRun(t, "assess", "--dir", dir, "--nonce", assessNonce, "--assessor", "测评机构", "--out", out)
	_, report, err := assess.Parse([]byte(readFile(t, out+".json")))
	if err != nil {
		t.Fatal(err)
	}
	for _, it := range report.Items {
		if it.ID != "software.packs" {
			continue
		}
		for _, want := range []string{staged.SM3, `"by":"release"`, `"by":"hospital"`, `"since":"20`, `"used_by":["vendor"]`} {
			if it.Status != assess.Shown || !strings.Contains(string(it.Raw), want) {
				t.Errorf("%s is not told: %s %s %s", want, it.Status, it.Why, it.Raw)
			}
		}
		staged.Kind = "seen"
	}
	if staged.Kind != "seen" {
		t.Error("the evaluator is told nothing of packs")
	}
	if o := mustRun(t, "pack", "list", "--dir", dir); !strings.Contains(o.stdout, staged.SM3) || !strings.Contains(o.stdout, "vendor") {
		t.Error(o)
	}

	// Over a restart of both: the agent first, as the units are ordered.
	m.stop(t)
	p.stop()
	if got := p.mounted(t); got != "" {
		t.Fatalf("still mounted: %s", got)
	}
	p.serve(t, mount)
	m = serve(t, dir)
	m.trusted(t)
	his = m.client(t, "his")
	signs("visit-2")
	m.mustBeClean(t)

	pid = agentPID(pid)
	mustRun(t, "hsm", "remove", "vendor", "--dir", dir, "--reason", "停用", "--force")
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("nobody uses the library, and its daemon runs on: %v", err)
	}
	eventually(t, 10*time.Second, "nothing runs from the pack", func() bool { return running() == 0 })
	mustRun(t, two("remove", "--name", "softhsm2")...)
	m.changeOf(t, "/admin/v1/packs/remove", "pack.file/removed", "softhsm2", `"state":"installed"`, `"state":"removed"`)
	left, err := os.ReadDir(p.at("packs"))
	if err != nil || len(left) != 0 || p.mounted(t) != "" {
		t.Errorf("left: %v, %v, %s", left, err, p.mounted(t))
	}
	if list := mustRun(t, "pack", "list", "--dir", dir); strings.Contains(list.stdout, "softhsm2") {
		t.Error(list)
	}

	// The site's program with the driver of DM comes in the same way, and runs in this one's stead; here one that says so alone.
	need(t, "cc")
	p.put(t, "dm.c", []byte("#include <stdio.h>\nint main(int n, char **a) { printf(\"program of the pack: %s\\n\", n > 1 ? a[1] : \"\"); return 0; }\n"))
	if o := command(t, nil, "cc", "-o", p.at("yinjian-dm"), p.at("dm.c")); o.code != 0 {
		t.Fatal(o)
	}
	mustRun(t, "pack", "create", "--kind", "dm", "--name", "dm8", "--version", "8.1", "--serial", "1", "--maker", "本院", "--program", "yinjian-dm", "--product", appliance.Version, "--verity", "sm3",
		"--out", file, p.at("yinjian-dm"))
	for _, by := range []string{"release", "hospital"} {
		mustRun(t, "pack", "sign", file, "--by", by, "--key", p.at(by+".key"))
	}
	// As the installer leaves one, before there is anybody who could install it: it is mounted, and the journal tells of it once.
	m.stop(t)
	p.stop()
	p.put(t, filepath.Join("packs", "dm8.pack"), []byte(readFile(t, file)))
	p.serve(t, mount)
	for range 2 {
		m = serve(t, dir)
		m.trusted(t)
		if found := entries(t, dir, "pack.file/found"); len(found) != 1 || found[0].Object != "dm8" || found[0].Actor != "installation" || len(found[0].Text("manifest_sm3")) != 64 {
			t.Errorf("a pack that came with the installation: %+v", found)
		}
		if o := mustRun(t, "pack", "list", "--dir", dir); !strings.Contains(o.stdout, "dm8") || !strings.Contains(o.stdout, "installation") {
			t.Error(o)
		}
		m.stop(t)
	}
	// Taken away by two, and put there again by somebody: that is told as well.
	m = serve(t, dir)
	m.trusted(t)
	mustRun(t, two("remove", "--name", "dm8")...)
	m.stop(t)
	p.stop()
	p.put(t, filepath.Join("packs", "dm8.pack"), []byte(readFile(t, file)))
	p.serve(t, mount)
	m = serve(t, dir)
	m.trusted(t)
	if found := entries(t, dir, "pack.file/found"); len(found) != 2 {
		t.Errorf("a pack that came back past everybody: %+v", found)
	}
	m.stop(t)
	configure(t, dir, func(c *appliance.Config) {
		c.Database.DSN, c.Database.PasswordFile = "dm://YINJIAN@127.0.0.1:1", pinFile(t, "x")
	})
	if o := launch(t, dir).outcome(); o.code != 0 || !strings.Contains(o.stderr, "program of the pack: serve") {
		t.Error(o)
	}
}
