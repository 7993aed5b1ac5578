package vmtest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/dbdriver/dbtest"
	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/iso/vmtest"
)

// Where the machine's own loopback is, as the guest sees it (QEMU's user network).
const around = "10.0.2.2"

// surroundings are what stands outside of the machine at a site: a cipher machine and a PostgreSQL server, both on this host,
// both reached over the network alone.
type surroundings struct {
	yinjian  string // the program, for commands from outside
	module   string // of the cipher machine
	machine  *hsmtest.Distant
	pg       *dbtest.Cluster
	database string
}

const databasePassword = "long-Enough_1"

// newSurroundings starts them, and answers the lines of answers.toml with which the machine finds them.
func newSurroundings(t *testing.T) (*surroundings, string) {
	t.Helper()
	dir := t.TempDir()
	binary, module := filepath.Join(dir, "yinjian"), filepath.Join(dir, "libyinjian-p11.so")
	for _, argv := range [][]string{{"go", "build", "-o", binary, "../../appliance/cmd/yinjian"}, {"../../hsm/softtoken/module/build.sh", module}} {
		if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", argv, err, out)
		}
	}
	var labels []string
	for _, class := range hsm.Classes {
		labels = append(labels, "hospital-"+string(class))
	}
	s := &surroundings{yinjian: binary, module: module, machine: hsmtest.NewDistant(t, binary, module, labels...), pg: dbtest.StartPostgres(t)}
	var ca string
	s.database, ca = s.pg.Secure(t, "yinjian_app", databasePassword, net.ParseIP(around))
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	_, port, err := net.SplitHostPort(s.machine.Address)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `
[settings.evaluation]
softtoken = false
[settings.hsm]
module_args = "address=%s:%s credentials='/data/yinjian/secrets/link-client.pem'"
[settings.database]
dsn = "postgres://yinjian_app@%s:%d/%s?sslrootcert=/data/yinjian/secrets/db-ca.pem"
password_file = "secrets/db.password"
`, around, port, around, s.pg.Port, s.database)
	for _, class := range hsm.Classes {
		fmt.Fprintf(&b, "[settings.hsm.slots.%s]\ntoken_label = \"hospital-%s\"\npin_file = \"secrets/hospital.pin\"\n", class, class)
	}
	fmt.Fprintf(&b, "[secrets]\n\"db.password\" = %q\n\"hospital.pin\" = %q\n\"db-ca.pem\" = \"\"\"\n%s\"\"\"\n\"link-client.pem\" = \"\"\"\n%s\"\"\"\n", databasePassword, hsmtest.UserPIN, read(ca), read(s.machine.Credentials))
	return s, b.String()
}

// shipped waits until all of the journal is in the database.
func shipped(t *testing.T, o *officers) {
	t.Helper()
	until(t, "everything is shipped", func(ctx context.Context) error {
		answer, err := o.admin.WithSession(o.tokens["audit"], nil).State(ctx)
		if err != nil {
			return err
		}
		var s struct{ Projection struct{ Lag *int } }
		if err := json.Unmarshal(answer, &s); err != nil {
			return err
		}
		if s.Projection.Lag == nil || *s.Projection.Lag > 0 {
			return fmt.Errorf("%s", answer)
		}
		return nil
	})
}

// differences are what the appliance finds wrong in the database: rows against its journal, and what a sweep finds by MACs.
func differences(t *testing.T, o *officers) (rows, sweep []json.RawMessage) {
	t.Helper()
	audit := o.admin.WithSession(o.tokens["audit"], nil)
	for _, look := range []struct {
		ask func(context.Context) (json.RawMessage, error)
		out *[]json.RawMessage
	}{{audit.Compare, &rows}, {audit.Sweep, &sweep}} {
		answer, err := look.ask(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var r struct {
			MACs        int `json:"macs_checked"`
			Differences []json.RawMessage
		}
		if err := json.Unmarshal(answer, &r); err != nil || r.MACs == 0 {
			t.Fatalf("%s, %v", answer, err)
		}
		*look.out = r.Differences
	}
	return rows, sweep
}

var uptime = regexp.MustCompile(`verified \d+ blocks of \S+, up ([0-9.]+) s`)

// From the medium to a signature with a cipher machine and a database outside of the machine, over a power cut, and a start
// that nobody attends.
func TestImage(t *testing.T) {
	t.Parallel()
	built(t)
	s := newSite(t)
	outside, settings := newSurroundings(t)
	s.settings = settings
	if !t.Run("install", s.install) {
		return
	}
	b := &business{}
	var first *wire.SignResult
	if !t.Run("first start", func(t *testing.T) {
		v := s.boot(t)
		o := login(t, v)
		record(t, "administrators logged in", v)
		b.key = register(t, o)
		c := b.client(t, v)
		ready(t, c)
		first = sign(t, c, "n-1")
		record(t, "first record signed and stamped", v)
		v.Kill() // a power cut: what was answered must be there
	}) {
		return
	}
	t.Run("restart after a power cut", func(t *testing.T) {
		m := s.firmware(t, "restart")
		m.Alone = os.Getenv("YINJIAN_LONG") != "" // a ratio of one start; steadier where nothing runs beside it
		v := vmtest.Start(t, m)
		v.Wait("verified ")
		kernel := v.Elapsed()
		v.Wait(" s\r")
		said := uptime.FindStringSubmatch(v.Console())
		if said == nil {
			t.Fatal("init does not say how long the kernel runs")
		}
		since, err := time.ParseDuration(said[1] + "s")
		if err != nil {
			t.Fatal(err)
		}
		kernel -= since
		v.Wait("下次启动之前 TPM 不再交出密钥")
		open := v.Elapsed() - kernel
		// The status page comes when everything else is up: on a machine without the appliance it would say so.
		v.Wait("STATE:")
		without := v.Elapsed() - kernel
		c := b.client(t, v)
		until(t, "alive", c.Alive)
		up := v.Elapsed() - kernel
		ready(t, c)
		record(t, "ready, unattended", v)
		noteTook("%7.1f s  %s: from the kernel's start to /health/alive, and then %.1f s to trusted time; %.1f s to the open data volume, %.1f s to everything but the appliance: ratio %.2f",
			up.Seconds(), t.Name(), (v.Elapsed() - kernel - up).Seconds(), open.Seconds(), without.Seconds(), up.Seconds()/without.Seconds())
		again := sign(t, c, "n-1")
		if !again.Replayed || again.RecordID != first.RecordID {
			t.Errorf("the first record is %s, was %s", again.RecordID, first.RecordID)
		}
		sign(t, c, "n-2")
		record(t, "second record signed and stamped", v)
		if strings.Contains(v.Console(), "login:") {
			t.Error("somebody can log in at the console")
		}
		outside.hold(t, loginAgain(t, v))
		record(t, "keys and rows outside looked at", v)
		until(t, "the kernel's parameters are as laid down, but for two that root alone may read", func(context.Context) error {
			if said := fmt.Sprintf("kernel: %d 项与规定相同", laidDown(t)-2); !strings.Contains(v.Console(), said) {
				return fmt.Errorf("no %q on the console", said)
			}
			return nil
		})
		shows(t, v, "status", "状态")
	})
}

// laidDown is how many of the kernel's parameters the image sets.
func laidDown(t *testing.T) (n int) {
	for _, file := range []string{"packaging/sysctl/90-yinjian.conf", "iso/rootfs/usr/lib/yinjian/sealed.conf"} {
		text, err := os.ReadFile(filepath.Join("../..", file))
		if err != nil {
			t.Fatal(err)
		}
		n += len(regexp.MustCompile(`(?m)^[a-z].* = `).FindAll(text, -1))
	}
	return n
}

// hold looks at what stands outside, past the appliance, and at what the appliance says of it.
func (a *surroundings) hold(t *testing.T, o *officers) {
	t.Helper()
	for _, label := range []string{"hospital-staff", "hospital-tsa", "hospital-log"} {
		if keys := a.machine.Tool(t, label, "--login", "--pin", hsmtest.UserPIN, "-O"); !strings.Contains(keys, "Private Key Object") {
			t.Errorf("the cipher machine's token %s has no private key:\n%s", label, keys)
		}
	}
	shipped(t, o)
	db := a.pg.Open(t, a.database)
	defer db.Close()
	count := func(query string) (n int) {
		t.Helper()
		if err := db.QueryRowContext(t.Context(), query).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := count(`SELECT COUNT(*) FROM yj_record WHERE node_id = 'benbu-1' AND application_id = 'emr' AND signer_id = 'D0001'`); n != 2 {
		t.Errorf("%d rows of signatures in the database, want 2", n)
	}
	if all, secure := count(`SELECT COUNT(*) FROM pg_stat_activity WHERE usename = 'yinjian_app'`),
		count(`SELECT COUNT(*) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) WHERE usename = 'yinjian_app' AND ssl AND version = 'TLSv1.3'`); all == 0 || all != secure {
		t.Errorf("of the appliance's %d connections %d are TLS 1.3", all, secure)
	}
	if rows, sweep := differences(t, o); len(rows) > 0 || len(sweep) > 0 {
		t.Errorf("the appliance finds %s and %s", rows, sweep)
	}
	if n := a.pg.Exec(t, a.database, `UPDATE yj_record SET signer_id = 'D0002' WHERE application_id = 'emr' AND seq_no = (SELECT MAX(seq_no) FROM yj_record WHERE application_id = 'emr')`); n != 1 {
		t.Fatalf("%d rows changed", n)
	}
	if rows, sweep := differences(t, o); len(rows) == 0 || len(sweep) == 0 {
		t.Errorf("of a changed row the appliance finds %s and %s", rows, sweep)
	}
}
