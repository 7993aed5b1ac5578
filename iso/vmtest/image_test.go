package vmtest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
	"yinjian/iso/layout"
	"yinjian/iso/vmtest"
)

// took is what the scenarios took, in their order: make image-test shows it at the end.
var (
	tookMu sync.Mutex
	took   []string
)

func noteTook(format string, a ...any) {
	tookMu.Lock()
	defer tookMu.Unlock()
	took = append(took, fmt.Sprintf(format, a...))
}

func TestMain(m *testing.M) {
	began := time.Now() // interval
	code := m.Run()
	if len(took) > 0 {
		fmt.Printf("\n%s\n%7.1f s  all of them, with what each waited for\n", strings.Join(took, "\n"), time.Since(began).Seconds())
	}
	os.Exit(code)
}

// record notes how long a step of a scenario took, from the start of its machine.
func record(t *testing.T, step string, v *vmtest.VM) {
	noteTook("%7.1f s  %s: %s", v.Elapsed().Seconds(), t.Name(), step)
}

// keys is the folder with the throw-away keys that the image was signed with.
func keys(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("YINJIAN_IMAGE_KEYS"); dir != "" {
		return dir
	}
	return built(t) + "-keys"
}

// A site is a machine that an image is installed on, and what stands around it: the disk, the TPM, a time server.
type site struct {
	disk, tpm string
	bus       string            // of the disk; virtio by default
	time      string            // as the guest reaches it
	settings  string            // more lines of answers.toml
	beside    map[string]string // more files of the answer disk
	urgent    int               // its machines, see vmtest.Machine
}

// longest are the tests that would end last.
var longest = map[string]bool{"TestBrokenUpdate": true, "TestUpdateImage": true}

const (
	apiPort   = 8443
	adminPort = 8444
)

func newSite(t *testing.T) *site {
	t.Helper()
	dir := t.TempDir()
	return &site{disk: vmtest.Disk(t, dir, 4<<30), tpm: filepath.Join(dir, "tpm"), time: timeServer(t)}
}

// timePort is the time server's on this machine: what is prepared once knows it for all its copies.
const timePort = 30123

// timeServer answers NTP with this machine's clock. Several tests' processes may each have one at that port: they all say the same.
func timeServer(t *testing.T) string {
	t.Helper()
	answerTime(t, "127.0.0.1")
	return "10.0.2.2:" + strconv.Itoa(timePort)
}

// answerTime answers NTP at an address of this machine's, or of the network namespace that the test's thread is in.
func answerTime(t *testing.T, address string) {
	t.Helper()
	shared := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); e != nil {
			return e
		}
		return err
	}}
	conn, err := shared.ListenPacket(t.Context(), "udp4", net.JoinHostPort(address, strconv.Itoa(timePort)))
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
}

const answersJSON = `{
  "seal": "tpm2",
  "network": {"address": "10.0.2.20/24", "gateway": "10.0.2.2"}
}`

func (s *site) answers(t *testing.T) string {
	t.Helper()
	files := map[string]string{
		layout.AnswersFile: answersJSON,
		"answers.toml":     fmt.Sprintf("node = \"benbu-1\"\ncampus = \"本部\"\nlisten = \"0.0.0.0:%d\"\nadmin = \"0.0.0.0:%d\"\ntime_sources = [\"%s\"]\n[administrators]\nsystem = \"zhang:张三\"\nsecurity = \"li:李四\"\naudit = \"wang:王五\"\n", apiPort, adminPort, s.time) + s.settings,
	}
	maps.Copy(files, s.beside)
	return vmtest.Label(t, layout.AnswersLabel, files)
}

// picture is where one of a machine's screen is kept: beside the image that it shows.
func picture(t *testing.T, name string) string {
	t.Helper()
	return filepath.Join(built(t), "screens", name+".png")
}

// firmware is a machine with Secure Boot and this site's TPM.
func (s *site) firmware(t *testing.T, name string) vmtest.Machine {
	t.Helper()
	arch := vmtest.Arch(t, filepath.Join(built(t), "disk.efi"))
	urgent := max(1, s.urgent)
	if longest[t.Name()] {
		urgent = 2
	}
	return vmtest.Machine{Name: name, Arch: arch, Memory: 2048, Urgent: urgent, Variables: vmtest.Variables(t, arch, keys(t)), TPM: s.tpm, Disks: []string{s.disk}, Bus: s.bus, Host: true, Guest: "10.0.2.20", Ports: []int{apiPort, adminPort}, Boot: map[string]time.Duration{"amd64": 2 * time.Minute, "arm64": 4 * time.Minute}[arch]}
}

func (s *site) install(t *testing.T) {
	t.Helper()
	m := s.firmware(t, "install")
	m.CDROM, m.Disks = filepath.Join(built(t), "yinjian.iso"), append(m.Disks, s.answers(t))
	v := vmtest.Start(t, m)
	if v.Wait("INSTALLED", "INSTALL REFUSED", "REFUSED [") != "INSTALLED" {
		v.Wait("\n")
		t.Fatal("not installed")
	}
	v.Ended()
	record(t, "installed", v)
}

// boot starts the installed machine and waits for its data volume.
func (s *site) boot(t *testing.T) *vmtest.VM {
	t.Helper()
	v := vmtest.Start(t, s.firmware(t, "boot"))
	v.Wait("verified ")
	record(t, "root verified", v)
	v.Wait("下次启动之前 TPM 不再交出密钥")
	record(t, "data volume open", v)
	return v
}

// until waits until do does, as long as a start takes at most.
func until(t *testing.T, what string, do func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for tick := time.NewTicker(500 * time.Millisecond); ; {
		err := do(ctx)
		if err == nil {
			tick.Stop()
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// anyTLS connects to whoever answers: whose certificate it is, is not what is tried here.
func anyTLS() *tls.Config { return &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true} }

var newcomer = regexp.MustCompile(`(system|security|audit) +([a-z]+) \(.+\)  (\S+)`)

// officers are the sessions of the first administrators, by role.
type officers struct {
	admin  *client.Admin
	tokens map[string]string
}

// administrators are the first ones' names by role, as the answers say.
var administrators = map[string]string{"system": "zhang", "security": "li", "audit": "wang"}

// newPassword is what an administrator changes the first password to.
func newPassword(role string) string { return "Gai-guo-2026-" + role }

func newOfficers(t *testing.T, v *vmtest.VM) *officers {
	o := &officers{client.NewAdminTLS("https://"+v.Address(adminPort), anyTLS()), map[string]string{}}
	t.Cleanup(o.admin.Close)
	return o
}

// enter logs one of them in.
func (o *officers) enter(t *testing.T, id, password string) (token string) {
	t.Helper()
	until(t, "login of "+id, func(ctx context.Context) error {
		got, err := o.admin.Login(ctx, wire.Login{Name: id, Password: password})
		if err == nil {
			token = got.Session
		}
		return err
	})
	return token
}

// login logs the first three in, by the passwords that stand on the console, which they change.
func login(t *testing.T, v *vmtest.VM) *officers {
	t.Helper()
	v.Wait("ADMINISTRATORS")
	v.Wait("  audit ")
	v.Wait("\n")
	found := newcomer.FindAllStringSubmatch(v.Console(), -1)
	if len(found) != 3 {
		t.Fatalf("%d administrators on the console", len(found))
	}
	o := newOfficers(t, v)
	for _, f := range found {
		mine := newPassword(f[1])
		if _, err := o.admin.WithSession(o.enter(t, f[2], f[3]), nil).ChangePassword(t.Context(), wire.ChangePassword{Old: f[3], Password: mine}); err != nil {
			t.Fatal(err)
		}
		o.tokens[f[1]] = o.enter(t, f[2], mine)
	}
	return o
}

// security is the security administrator, whose requests the system administrator approves where two are needed.
func (o *officers) security(t *testing.T) *client.Admin {
	return o.admin.WithSession(o.tokens["security"], func(p wire.Proposed) {
		if _, err := o.admin.WithSession(o.tokens["system"], nil).Decide(t.Context(), "approve", wire.Decide{ID: p.Proposal, SM3: p.SM3}); err != nil {
			t.Errorf("approving: %v", err)
		}
	})
}

// register makes the application emr and the signer D0001, and answers the application's key.
func register(t *testing.T, o *officers) []byte {
	t.Helper()
	security := o.security(t)
	app, err := security.RegisterApplication(t.Context(), wire.RegisterApplication{ID: "emr", Name: "电子病历", Campus: "本部", Rights: []string{"sign", "verify"}, Stamp: "required", Consent: []string{"app-asserted"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := security.EnrolSigner(t.Context(), wire.EnrolSigner{ID: "D0001", Name: "陈医师", Department: "胸外科", Campus: "本部", Algorithms: []string{"SM2"}}); err != nil {
		t.Fatal(err)
	}
	return app.Key
}

// A business is a business system outside of the machine.
type business struct{ key []byte }

func (b *business) client(t *testing.T, v *vmtest.VM) *client.Client {
	t.Helper()
	c, err := client.New(client.Config{BaseURL: "https://" + v.Address(apiPort), AppID: "emr", Key: b.key, TLS: anyTLS(), Clock: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func ready(t *testing.T, c *client.Client) {
	t.Helper()
	until(t, "ready", func(ctx context.Context) error {
		r, err := c.Ready(ctx)
		if err == nil && !r.Ready {
			err = fmt.Errorf("%q", r.Reasons)
		}
		return err
	})
}

// request asks for a signature of a record's.
func request(id string) *wire.SignRequest {
	return &wire.SignRequest{
		Signer: "D0001", Algorithm: "SM2", Form: "raw", Content: []byte("病程记录 " + id), Role: "主治医师",
		Document: wire.Document{ID: id, Type: "progress-note", MediaType: "text/plain"},
		Consent:  wire.Consent{Method: "app-asserted", Assertion: "test"},
	}
}

// sign has a record signed and stamped, and the appliance judge it.
func sign(t *testing.T, c *client.Client, id string) *wire.SignResult {
	t.Helper()
	asked := request(id)
	r, err := c.Sign(t.Context(), id, asked)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Signature) == 0 || len(r.Token) == 0 {
		t.Fatalf("signed without signature or token: %+v", r)
	}
	var evidence []byte
	until(t, "evidence", func(ctx context.Context) error {
		var refused *client.Problem
		if evidence, err = c.Evidence(ctx, r.RecordID); err != nil && (!errors.As(err, &refused) || refused.Code != string(problem.NotReady)) {
			t.Fatal(err)
		}
		return err // a busy machine's checkpoint may be late: it is said to be asked again
	})
	verdict, err := c.Verify(t.Context(), &wire.VerifyRequest{Evidence: evidence, Document: asked.Content})
	if err != nil || !strings.Contains(string(verdict), `"valid"`) {
		t.Errorf("verdict %s, %v", verdict, err)
	}
	return r
}

// The disk in a machine with another TPM stays locked, and the machine says so.
func TestAnotherTPM(t *testing.T) {
	t.Parallel()
	s, b := inUse(t)
	s.tpm = filepath.Join(t.TempDir(), "tpm")
	v := vmtest.Start(t, s.firmware(t, "stolen"))
	if v.Wait("LOCKED", "数据卷已打开") != "LOCKED" {
		t.Fatal("another machine's TPM opens the data")
	}
	v.Wait("RECOVERY")
	record(t, "locked, says so", v)
	if err := b.client(t, v).Alive(t.Context()); err == nil {
		t.Error("something answers")
	}
}

// copied is another disk with the same content.
func copied(t *testing.T, disk string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.img")
	if out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", disk, name).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return name
}

// table is a disk's partition table.
func table(t *testing.T, disk string) *layout.Table {
	t.Helper()
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	table, err := layout.ReadTable(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// replaceKernel puts another file in the place of a disk's kernel.
func replaceKernel(t *testing.T, disk string, program []byte) {
	t.Helper()
	parts := table(t, disk)
	esp := fmt.Sprintf("%s@@%d", disk, parts.Offset(parts.Partitions[layout.NumberESP-1]))
	one := filepath.Join(t.TempDir(), "one.efi")
	if err := os.WriteFile(one, program, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, argv := range [][]string{{"mdel", "-i", esp, "::/" + layout.EntryDir + "/*"}, {"mcopy", "-i", esp, one, "::/" + layout.EntryDir + "/" + layout.NewEntry(1).String()}} {
		cmd := exec.CommandContext(t.Context(), vmtest.Tool(t, argv[0]), argv[1:]...)
		cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", argv, err, out)
		}
	}
}

// What somebody with the disk in his hands could change: under Secure Boot nothing of it starts. Superblock and hash tree are TestInit's in
// the short suite.
func TestChangedDisk(t *testing.T) {
	t.Parallel()
	dir := built(t)
	screenFont(t) // before it is needed in a hurry
	s := installed(t)
	root, err := layout.ParseCommandLine(string(vmtest.Section(t, filepath.Join(dir, "disk.efi"), ".cmdline")))
	if err != nil {
		t.Fatal(err)
	}
	start := func(t *testing.T, disk string) *vmtest.VM {
		t.Helper()
		m := s.firmware(t, "refused")
		m.Disks = []string{disk}
		return vmtest.Start(t, m)
	}
	data := int64(root.Root.DataBlocks) * layout.BlockSize
	for _, c := range []struct {
		name string
		at   int64
		code string
	}{
		{"data", data / 2, "root-changed"},
		{"superblock", data + 80, "root-superblock"},
		{"hash tree", int64(root.Root.Blocks())*layout.BlockSize - 1, "root-changed"},
	} {
		t.Run("one bit of the "+c.name, func(t *testing.T) {
			if c.name != "data" {
				long(t)
			}
			disk := copied(t, s.disk)
			parts := table(t, disk)
			flip(t, disk, parts.Offset(parts.Partitions[layout.NumberRootA-1])+c.at)
			v := start(t, disk)
			if v.Wait("REFUSED [", "数据卷已打开") != "REFUSED [" {
				t.Fatal("it started")
			}
			v.Wait("\n")
			if !strings.Contains(v.Console(), "REFUSED ["+c.code+"]") {
				t.Errorf("refused for another reason than %s", c.code)
			}
			if c.name != "data" {
				record(t, "refused", v)
				v.Kill()
				return
			}
			shows(t, v, "refused", "系统盘上的系统已被改动或损坏")
			v.Ended() // it restarts by itself
			record(t, "refused, restarted", v)
		})
	}
	signed, err := os.ReadFile(filepath.Join(dir, "disk.signed.efi"))
	if err != nil {
		t.Fatal(err)
	}
	edited := bytes.Replace(signed, []byte("lockdown=integrity"), []byte("init=/bin/sh      "), 1)
	unsigned, err := os.ReadFile(filepath.Join(dir, "disk.efi"))
	if err != nil {
		t.Fatal(err)
	}
	for name, program := range map[string][]byte{"kernel without a signature": unsigned, "edited command line": edited} {
		t.Run(name, func(t *testing.T) {
			if bytes.Equal(program, signed) {
				t.Fatal("nothing was changed")
			}
			disk := copied(t, s.disk)
			replaceKernel(t, disk, program)
			v := start(t, disk)
			if which := v.Wait("Access Denied", "Access denied", "Security Violation", "verified ", "数据卷已打开"); which == "verified " || which == "数据卷已打开" {
				t.Fatal("it started")
			}
			record(t, "refused by the firmware", v)
		})
	}
}
