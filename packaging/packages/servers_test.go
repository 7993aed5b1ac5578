package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/hsm"
	"yinjian/packaging/porttest"
)

// tools that a trial on servers needs, beside root.
var tools = []string{"mmdebstrap", "systemd-nspawn", "nsenter", "dpkg-deb", "go"}

// A server is a Debian 12 that has been started in a container: its own systemd, users and packages, this machine's network.
type server struct {
	root string
	pid  string // of its systemd
}

// baseSystem is an archive of the smallest Debian 12 with systemd and rpm, kept in the cache of packages.
func baseSystem(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("YINJIAN_CACHE")
	if cache == "" {
		cache = "build/cache"
	}
	include := "systemd,systemd-sysv,dbus,rpm,ca-certificates,chrony,gpsd"
	file := filepath.Join(cache, fmt.Sprintf("server-bookworm-%.4x.tar", sha256.Sum256([]byte(include))))
	if _, err := os.Stat(file); err == nil {
		return file
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"--variant=minbase", "--include=" + include, "--aptopt=APT::Install-Recommends \"false\"",
		"--aptopt=Acquire::Languages \"none\"", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*", "bookworm", file + ".new.tar"}
	if out, err := exec.CommandContext(t.Context(), "mmdebstrap", args...).CombinedOutput(); err != nil {
		t.Fatalf("mmdebstrap: %v\n%s", err, out)
	}
	if err := os.Rename(file+".new.tar", file); err != nil {
		t.Fatal(err)
	}
	return file
}

// memory is a folder in memory where there is one: a tree of small files is made faster there.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "yinjian-packages")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// start unpacks a server, puts the packages into its /packages and starts it.
func start(t *testing.T, packages string) *server {
	t.Helper()
	s := &server{root: filepath.Join(memory(t), "root")}
	if err := os.Mkdir(s.root, 0o755); err != nil {
		t.Fatal(err)
	}
	commands := [][]string{{"tar", "-C", s.root, "--exclude=./dev/*", "-xf", baseSystem(t)}}
	if packages != "" {
		commands = append(commands, []string{"cp", "-r", packages, s.root + "/packages"})
	}
	for _, argv := range commands {
		if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", argv, err, out)
		}
	}
	for _, unit := range []string{"apt-daily.timer", "apt-daily-upgrade.timer", "chrony.service", "gpsd.service", "gpsd.socket"} { // not asked for here
		if err := os.Symlink("/dev/null", filepath.Join(s.root, "etc/systemd/system", unit)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--directory="+s.root, "--machine=yinjian-"+strconv.Itoa(os.Getpid()),
		"--resolv-conf=off", "--timezone=off", "--console=pipe", "--boot")
	var console bytes.Buffer
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // nothing outlives a test that was cut off
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		if t.Failed() && s.pid != "" {
			out, _ := s.try("journalctl", "--no-pager", "-n", "60", "-u", "yinjian.service")
			t.Logf("%s", out)
		}
		_ = cmd.Process.Signal(os.Interrupt) // systemd-nspawn ends its container; it may have ended
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	children := fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid)
	wait(t, "the container's start", func() error {
		select {
		case <-ended:
			t.Fatalf("the container ended:\n%s", console.Bytes())
		default:
		}
		text, err := os.ReadFile(children)
		if s.pid = strings.TrimSpace(string(text)); s.pid == "" || strings.Contains(s.pid, " ") {
			return fmt.Errorf("children %q, %v", text, err)
		}
		out, err := s.try("systemctl", "is-system-running")
		if state := strings.TrimSpace(out); state != "running" && state != "degraded" {
			return fmt.Errorf("%s %v", state, err)
		}
		return nil
	})
	return s
}

// try runs a program on the server as root.
func (s *server) try(argv ...string) (string, error) {
	cmd := exec.Command("nsenter", append([]string{"-t", s.pid, "-m", "-u", "-i", "-n", "-p", "-r", "-w"}, argv...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (s *server) run(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := s.try(argv...)
	if err != nil {
		t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return out
}

func wait(t *testing.T, what string, done func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for {
		err := done()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// timeServer answers NTP with this machine's clock.
func timeServer(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	stamp := func(b []byte) {
		now := time.Now()
		binary.BigEndian.PutUint32(b, uint32(now.Unix()+2208988800))
		binary.BigEndian.PutUint32(b[4:], uint32(uint64(now.Nanosecond())<<32/1e9))
	}
	go func() {
		query := make([]byte, 1024)
		for {
			n, from, err := conn.ReadFrom(query)
			if err != nil {
				return
			}
			if n < 48 {
				continue
			}
			reply := make([]byte, 48)
			stamp(reply[32:])                                         // receive
			reply[0], reply[1], reply[2], reply[3] = 0x24, 1, 6, 0xec // version 4, server, stratum 1, 2^-20 s
			copy(reply[12:], "TEST")
			stamp(reply[16:])              // reference
			copy(reply[24:32], query[40:]) // origin
			stamp(reply[40:])              // transmit
			_, _ = conn.WriteTo(reply, from)
		}
	}()
	return conn.LocalAddr().String()
}

// A way is how a kind of package gets onto a server and off it; each command with the version's folder below /packages.
type way struct {
	install, upgrade func(folder string) []string
	remove           []string
	purge            []string // nil where there is no such thing
	kept             string   // where the site's own firewall rules are after a removal
}

func shell(format string, args ...any) []string {
	return []string{"sh", "-ec", fmt.Sprintf(format, args...)}
}

var ways = map[string]way{
	"deb": {
		install: func(v string) []string { return shell("dpkg -i /packages/%s/*.deb", v) },
		upgrade: func(v string) []string { return shell("dpkg -i /packages/%s/*.deb", v) },
		remove:  []string{"dpkg", "-r", "yinjian-evaluation", "yinjian"},
		purge:   []string{"dpkg", "-P", "yinjian-evaluation", "yinjian"},
		kept:    "/etc/yinjian/yinjian.nft",
	},
	"rpm": {
		// Debian's rpm has a data base of its own, in which nothing is that a package could ask for.
		install: func(v string) []string { return shell("rpm --force-debian --nodeps -i /packages/%s/*.rpm", v) },
		upgrade: func(v string) []string { return shell("rpm --force-debian --nodeps -U /packages/%s/*.rpm", v) },
		remove:  []string{"rpm", "--force-debian", "-e", "yinjian-evaluation", "yinjian"},
		kept:    "/etc/yinjian/yinjian.nft.rpmsave",
	},
	"tar": {
		install: func(v string) []string {
			return shell("cd /packages/%s; tar -xzf *.tar.gz; cd yinjian-*/; ./install.sh install --evaluation", v)
		},
		upgrade: func(v string) []string {
			return shell("cd /packages/%s; tar -xzf *.tar.gz; cd yinjian-*/; ./install.sh install --evaluation", v)
		},
		remove: shell("cd /packages/new/yinjian-*/; ./install.sh remove"),
		kept:   "/etc/yinjian/yinjian.nft",
	},
}

// made makes packages in two versions, the first of them twice, programs and all, which has to give the same bytes.
func made(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	var built []entry
	for _, v := range []struct{ folder, version string }{{"old", "0.1.0+1.gaaaaaaaaa"}, {"again", "0.1.0+1.gaaaaaaaaa"}, {"new", "0.1.0+2.gbbbbbbbbb"}} {
		out := filepath.Join(dir, v.folder)
		r, err := describe(v.version)
		if err == nil {
			err = os.Mkdir(out, 0o755)
		}
		if err == nil && v.folder != "new" {
			built, err = gather("amd64")
		}
		if err == nil {
			err = r.pack("amd64", built, out)
		}
		if err == nil {
			var key *sm2.PrivateKey
			if key, err = loadKey(filepath.Join(dir, "keys"), true); err == nil {
				err = list(out, key)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(filepath.Join(dir, "old"))
	if err != nil || len(files) != 9 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, f := range files {
		a, err1 := os.ReadFile(filepath.Join(dir, "old", f.Name()))
		b, err2 := os.ReadFile(filepath.Join(dir, "again", f.Name()))
		if same := bytes.Equal(a, b); err1 != nil || err2 != nil || same == (f.Name() == "SM3SUMS.sig") {
			t.Errorf("%s: the same twice: %v (%v, %v)", f.Name(), same, err1, err2)
		}
	}
	return dir
}

// containers skips a test where none can be started.
func containers(t *testing.T) {
	t.Helper()
	if os.Getenv("YINJIAN_PACKAGES") == "" {
		t.Skip("YINJIAN_PACKAGES is not set: make packages-test tries the packages on servers")
	}
	if os.Geteuid() != 0 {
		t.Skip("a container is started by root alone")
	}
	for _, name := range tools {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name + " is not installed")
		}
	}
	atTop(t)
}

// On a server that was started: installed, initialised, served, a record signed; upgraded, with the service restarted and
// the site's settings left alone; removed, with the data left; installed again, with the record still there.
func TestServers(t *testing.T) {
	containers(t)
	packages := made(t)
	for name, w := range ways {
		t.Run(name, func(t *testing.T) { testServer(t, w, packages) })
	}
	t.Run("softtoken", func(t *testing.T) { testSofttoken(t, packages) })
}

// testSofttoken has the software cipher machine run as a service of its own user, with the appliance asking it over the
// loopback: tokens made by pkcs11-tool, a record signed, and nothing of its folder open to the appliance's user.
func testSofttoken(t *testing.T, packages string) {
	tool, err := exec.LookPath("pkcs11-tool")
	if err != nil {
		t.Skip("pkcs11-tool is not installed")
	}
	const state, address, pin = "/var/lib/yinjian-softtoken", "127.0.0.1:7443", "123456"
	s := start(t, packages)
	s.run(t, ways["deb"].install("new")...)
	s.run(t, "systemctl", "enable", "--now", "yinjian-softtoken.service")
	wait(t, "the cipher machine", func() error {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
	credentials := filepath.Join(s.root, state, "state/link-client.pem")
	link, err := os.ReadFile(credentials)
	if err != nil {
		t.Fatal(err)
	}
	answers := fmt.Sprintf("node = \"server-2\"\ncampus = \"本部\"\nlisten = \"%s\"\ntime_sources = [\"%s\"]\n[settings.evaluation]\nsofttoken = false\n"+
		"[settings.hsm]\nmodule = \"%s/libyinjian-p11.so\"\nmodule_args = \"address=%s credentials='%s/secrets/link-client.pem'\"\n", freePort(t), timeServer(t), programs, address, dir)
	for i, class := range hsm.Classes {
		for _, args := range [][]string{{"--init-token", "--so-pin", "87654321", "--label", string(class)}, {"--init-pin", "--login", "--login-type", "so", "--so-pin", "87654321", "--new-pin", pin}} {
			cmd := exec.CommandContext(t.Context(), tool, append([]string{"--module", filepath.Join(s.root, programs, "libyinjian-p11.so"), "--slot", strconv.Itoa(i)}, args...)...)
			cmd.Env = append(os.Environ(), "YINJIAN_P11_ADDRESS="+address, "YINJIAN_P11_CREDENTIALS="+credentials)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%q: %v\n%s", args, err, out)
			}
		}
		answers += fmt.Sprintf("[settings.hsm.slots.%s]\ntoken_label = \"%[1]s\"\npin_file = \"secrets/all.pin\"\n", class)
	}
	answers += fmt.Sprintf("[secrets]\n\"all.pin\" = \"%s\"\n\"link-client.pem\" = \"\"\"\n%s\"\"\"\n", pin, link)
	if err := os.WriteFile(filepath.Join(s.root, "answers.toml"), []byte(answers), 0o644); err != nil {
		t.Fatal(err)
	}
	s.run(t, append(asService, "yinjian", "init", "--dir", dir, "--answers", "/answers.toml")...)
	s.run(t, "systemctl", "start", "yinjian.service")
	s.operational(t)
	var ends struct{ API string }
	text, err := os.ReadFile(filepath.Join(s.root, dir, "endpoints.json"))
	if err == nil {
		err = json.Unmarshal(text, &ends)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.enrol(t)
	b := &business{url: ends.API}
	b.credential(t, filepath.Join(s.root, dir, "credentials/emr.json"))
	b.sign(t, "n-1", false)
	if out, err := s.try(append(asService, "ls", state)...); err == nil {
		t.Errorf("the appliance's user reads the cipher machine's folder: %s", out)
	}
}

// asService runs a program as the appliance's user.
var asService = []string{"setpriv", "--reuid=yinjian", "--regid=yinjian", "--clear-groups"}

// operational waits until the appliance on the server is.
func (s *server) operational(t *testing.T) {
	t.Helper()
	wait(t, "the appliance", func() error {
		out, err := s.try("yinjian", "status", "--dir", dir, "-o", "json")
		var state struct{ State string }
		if err == nil {
			err = json.Unmarshal([]byte(out), &state)
		}
		if err != nil || state.State != "operational" {
			return fmt.Errorf("%q %v %s", state.State, err, out)
		}
		return nil
	})
}

// enrol registers the application emr and the signer D0001.
func (s *server) enrol(t *testing.T) {
	t.Helper()
	s.run(t, "yinjian", "app", "register", "emr", "--dir", dir, "--name", "电子病历", "--campus", "本部", "--consent", "app-asserted")
	s.run(t, "yinjian", "signer", "enrol", "D0001", "--dir", dir, "--name", "陈医师", "--department", "胸外科", "--campus", "本部", "--algorithms", "SM2")
}

const (
	dir      = "/var/lib/yinjian"
	rules    = "/etc/yinjian/yinjian.nft"
	programs = "/usr/lib/yinjian"
)

func testServer(t *testing.T, w way, packages string) {
	s := start(t, packages)
	on := func(name string) string { return filepath.Join(s.root, name) }
	active := func() string {
		out, _ := s.try("systemctl", "is-active", "yinjian.service")
		return strings.TrimSpace(out)
	}

	said := s.run(t, w.install("old")...)
	if !strings.Contains(said, "没有启动任何服务") || active() != "inactive" {
		t.Errorf("after the installation the service is %s:\n%s", active(), said)
	}
	if owner := s.run(t, "stat", "-c", "%U:%G %a", dir); owner != "yinjian:yinjian 700\n" {
		t.Errorf("%s is of %s", dir, owner)
	}
	if user := s.run(t, "getent", "passwd", "yinjian"); !strings.Contains(user, "nologin") {
		t.Errorf("user %s", user)
	}

	// 1. From the empty folder to a record.
	api := freePort(t)
	s.run(t, append(asService, "yinjian", "init", "--dir", dir, "--node", "server-1", "--campus", "本部", "--listen", api, "--time-source", timeServer(t))...)
	s.run(t, "systemctl", "enable", "--now", "yinjian.service")
	b := &business{url: "https://" + api}
	s.operational(t)
	s.enrol(t)
	b.credential(t, on(dir+"/credentials/emr.json"))
	first, _ := b.sign(t, "n-1", false)

	// 2. An upgrade: the site's rules stay, the service runs the new program, what was signed is there.
	if err := os.WriteFile(on(rules), []byte("# 本院的规则\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := s.run(t, "systemctl", "show", "-p", "MainPID", "yinjian.service")
	s.run(t, w.upgrade("new")...)
	if text, err := os.ReadFile(on(rules)); err != nil || string(text) != "# 本院的规则\n" {
		t.Errorf("the upgrade wrote over the site's rules: %q, %v", text, err)
	}
	if after := s.run(t, "systemctl", "show", "-p", "MainPID", "yinjian.service"); after == before || active() != "active" {
		t.Errorf("the service was not started again: %s, %s", after, active())
	}
	s.operational(t)
	if again, _ := b.sign(t, "n-1", true); again != first {
		t.Errorf("the first record is %s, was %s", again, first)
	}
	b.sign(t, "n-2", false)

	// 3. Removed: no program, no unit, nothing that runs; all data.
	said = s.run(t, w.remove...)
	if !strings.Contains(said, "数据没有动") || active() != "inactive" {
		t.Errorf("after the removal the service is %s:\n%s", active(), said)
	}
	for _, gone := range []string{programs, "/usr/bin/yinjian", "/usr/lib/systemd/system/yinjian.service", "/etc/systemd/system/multi-user.target.wants/yinjian.service"} {
		if _, err := os.Lstat(on(gone)); err == nil {
			t.Errorf("%s is left", gone)
		}
	}
	if text, err := os.ReadFile(on(w.kept)); err != nil || string(text) != "# 本院的规则\n" {
		t.Errorf("the removal took the site's rules: %q, %v", text, err)
	}
	if w.purge != nil {
		if said := s.run(t, w.purge...); !strings.Contains(said, "数据没有动") {
			t.Errorf("a purge does not say where the data is:\n%s", said)
		}
		if _, err := os.Stat(on(rules)); err == nil {
			t.Errorf("a purge leaves %s", rules)
		}
	}
	if owner := s.run(t, "stat", "-c", "%U %a", dir+"/journal"); owner != "yinjian 700\n" {
		t.Errorf("the journal is of %s", owner)
	}

	// 4. Installed again: the same appliance.
	s.run(t, w.install("new")...)
	s.run(t, "systemctl", "start", "yinjian.service")
	s.operational(t)
	if again, _ := b.sign(t, "n-1", true); again != first {
		t.Errorf("the first record is %s, was %s", again, first)
	}
}

// freePort is an address on loopback that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	return porttest.Free(t)
}

// A business is a business system outside of the server.
type business struct {
	url string
	key []byte
}

func (b *business) credential(t *testing.T, file string) {
	t.Helper()
	var credential struct {
		Key string `json:"key_hex"`
	}
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &credential)
	}
	if err == nil {
		b.key, err = hex.DecodeString(credential.Key)
	}
	if err != nil || len(b.key) == 0 {
		t.Fatalf("%s: %v", file, err)
	}
}

func content(id string) []byte { return []byte("病程记录 " + id) }

// sign has a record signed and stamped, has the appliance judge its evidence, and answers the record's number and evidence.
func (b *business) sign(t *testing.T, id string, replayed bool) (record string, evidence []byte) {
	t.Helper()
	// Whose certificate answers is not what is tried here.
	c, err := client.New(client.Config{BaseURL: b.url, AppID: "emr", Key: b.key, TLS: &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}, Clock: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, err := c.Sign(t.Context(), id, &wire.SignRequest{
		Signer: "D0001", Algorithm: "SM2", Form: "raw", Content: content(id), Role: "主治医师",
		Document: wire.Document{ID: id, Type: "progress-note", MediaType: "text/plain"},
		Consent:  wire.Consent{Method: "app-asserted", Assertion: "test"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.Replayed != replayed || len(r.Signature) == 0 || len(r.Token) == 0 {
		t.Errorf("%s: replayed %v, %d bytes of signature, %d of token", id, r.Replayed, len(r.Signature), len(r.Token))
	}
	evidence, err = c.Evidence(t.Context(), r.RecordID)
	if err != nil {
		t.Fatal(err)
	}
	verdict, err := c.Verify(t.Context(), &wire.VerifyRequest{Evidence: evidence, Document: content(id)})
	if err != nil || !strings.Contains(string(verdict), `"valid"`) {
		t.Errorf("verdict %s, %v", verdict, err)
	}
	return r.RecordID, evidence
}
