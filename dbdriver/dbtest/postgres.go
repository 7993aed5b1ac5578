// Package dbtest has what tests of the central database need: a PostgreSQL server of their own, a driver that behaves
// as badly as DM's was read to, and the suite that every database has to pass.
package dbtest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers "pgx"

	"yinjian/packaging/porttest"
)

// A Cluster is a PostgreSQL server of a test's own, in a temporary folder, on a Unix socket there. It runs as an
// unprivileged user, whose name is also the superuser's without a password.
type Cluster struct {
	Dir  string   // data
	Run  string   // folder of the socket
	Args []string // of the server, beside those that it always has
	Port int      // in the socket's name, and on the network if Args say so

	bin string
	run func(name string, args ...string) *exec.Cmd
	cmd *exec.Cmd
	n   atomic.Int64
}

// binaries finds the folder of initdb and postgres: Debian keeps them out of PATH.
func binaries() string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) > 0 {
		slices.Sort(found)
		return filepath.Dir(found[len(found)-1])
	}
	if p, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(p)
	}
	return ""
}

// NewCluster makes a folder for a cluster, not yet a database. The test is skipped where PostgreSQL is missing;
// packaging/dev/deps.sh test installs it, and fails where it cannot.
func NewCluster(t testing.TB) *Cluster {
	t.Helper()
	c := &Cluster{bin: binaries(), Port: 5432}
	if c.bin == "" {
		t.Skip("PostgreSQL is not installed: packaging/dev/deps.sh test")
	}
	// Not t.TempDir: its parents are closed to other users, and a socket's path has 107 bytes at most.
	base, err := os.MkdirTemp("", "yj-pg")
	if err != nil {
		t.Fatal(err)
	}
	c.Dir, c.Run = filepath.Join(base, "data"), base
	var attr *syscall.SysProcAttr
	if os.Getuid() == 0 { // the server refuses to run as root
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Skip("no user postgres for the server to run as")
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		if err := os.Chown(base, uid, gid); err != nil {
			t.Fatal(err)
		}
		attr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	c.run = func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(c.bin, name), args...)
		cmd.Dir, cmd.Env = c.Run, []string{"LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin"}
		if attr != nil {
			a := *attr
			cmd.SysProcAttr = &a
		}
		return cmd
	}
	t.Cleanup(func() {
		c.stop()
		// Of a server that was killed and not started again its lock segment stays: line 7 of its file has key and number.
		if b, err := os.ReadFile(filepath.Join(c.Dir, "postmaster.pid")); err == nil {
			if lines := strings.Split(string(b), "\n"); len(lines) > 6 {
				if ids := strings.Fields(lines[6]); len(ids) == 2 {
					_ = exec.Command("ipcrm", "-m", ids[1]).Run() // 56 bytes
				}
			}
		}
		os.RemoveAll(base)
	})
	return c
}

// StartPostgres makes a cluster with initdb and starts it.
func StartPostgres(t testing.TB, args ...string) *Cluster {
	t.Helper()
	c := NewCluster(t)
	c.Args = args
	c.Init(t)
	c.Start(t)
	return c
}

// Init makes the cluster with initdb, in a folder that is empty or not there.
func (c *Cluster) Init(t testing.TB, more ...string) {
	t.Helper()
	args := append([]string{"-D", c.Dir, "-U", "yinjian", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"}, more...)
	if out, err := c.run("initdb", args...).CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
}

// Start starts the server and waits until it answers. A server that was killed recovers first.
func (c *Cluster) Start(t testing.TB) {
	t.Helper()
	args := append([]string{"-D", c.Dir, "-k", c.Run, "-c", "listen_addresses=", "-c", fmt.Sprint("port=", c.Port), "-c", "fsync=off", "-c", "shared_buffers=16MB"}, c.Args...)
	c.cmd = c.run("postgres", args...)
	var out bytes.Buffer
	c.cmd.Stdout, c.cmd.Stderr = &out, &out
	if c.cmd.SysProcAttr == nil {
		c.cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.cmd.SysProcAttr.Pdeathsig = syscall.SIGQUIT
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	db := c.Open(t, "postgres")
	defer db.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for ; ; time.Sleep(10 * time.Millisecond) {
		err := db.PingContext(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			c.Kill()
			t.Fatalf("the server does not answer: %v: %s", err, out.Bytes())
		}
	}
}

// DSN is how a database of the cluster is reached.
func (c *Cluster) DSN(database string) string {
	return fmt.Sprintf("host=%s port=%d user=yinjian dbname=%s", c.Run, c.Port, database)
}

// Listen has the server, which was made and not started yet, be reached at addresses of the network, by whoever is there.
func (c *Cluster) Listen(t testing.TB, addresses ...string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(c.Dir, "pg_hba.conf"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("host all all samenet trust\n"); err != nil {
		t.Fatal(err)
	}
	c.Args = append(c.Args, "-c", "listen_addresses="+strings.Join(addresses, ","))
}

// Secure has the running server be reached at 127.0.0.1 as docs/database.md asks, and makes an account and a database of its
// own for that: TLS with a certificate for the addresses, a password. It answers the database's name and the certificate's
// file, which is its own CA.
func (c *Cluster) Secure(t testing.TB, account, password string, addresses ...net.IP) (database, ca string) {
	t.Helper()
	database = c.Fresh(t)
	c.Exec(t, database, "CREATE ROLE "+account+" LOGIN PASSWORD '"+password+"'")
	c.Exec(t, database, "GRANT ALL ON SCHEMA public TO "+account)
	c.stop()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "db"}, NotBefore: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: append(addresses, net.IPv4(127, 0, 0, 1)),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for name, text := range map[string][]byte{"server.crt": cert, "server.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})} {
		if err := os.WriteFile(filepath.Join(c.Dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
		OwnedLike(t, filepath.Join(c.Dir, name), info)
	}
	ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, cert, 0o600); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(porttest.Free(t))
	if err != nil {
		t.Fatal(err)
	}
	if c.Port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	c.Args = append(c.Args, "-c", "listen_addresses=127.0.0.1", "-c", "ssl=on", "-c", "ssl_cert_file=server.crt", "-c", "ssl_key_file=server.key")
	if err := os.WriteFile(filepath.Join(c.Dir, "pg_hba.conf"), []byte("local all all trust\nhostssl all all 0.0.0.0/0 scram-sha-256\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Start(t)
	return database, ca
}

// Open opens a database past our own code.
func (c *Cluster) Open(t testing.TB, database string) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", c.DSN(database)+" sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// Exec runs a statement as the superuser and answers how many rows it touched.
func (c *Cluster) Exec(t testing.TB, database, statement string) int64 {
	t.Helper()
	db := c.Open(t, database)
	defer db.Close()
	res, err := db.ExecContext(context.WithoutCancel(t.Context()), statement)
	if err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	n, _ := res.RowsAffected()
	return n
}

// Fresh makes an empty database and answers its name.
func (c *Cluster) Fresh(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("test_%d", c.n.Add(1))
	c.Exec(t, "postgres", "CREATE DATABASE "+name)
	return name
}

// processes are the server's and its children's.
func (c *Cluster) processes() []int {
	pids := []int{c.cmd.Process.Pid}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pids[0], pids[0]))
	for f := range strings.FieldsSeq(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (c *Cluster) signal(s syscall.Signal) {
	for _, pid := range c.processes() {
		syscall.Kill(pid, s)
	}
}

// Freeze stops every process of the server: it holds its connections and answers nothing.
func (c *Cluster) Freeze() { c.signal(syscall.SIGSTOP) }

// Thaw lets them go on.
func (c *Cluster) Thaw() { c.signal(syscall.SIGCONT) }

// Kill ends the server and its children as a crash does.
func (c *Cluster) Kill() {
	if c.cmd == nil {
		return
	}
	c.signal(syscall.SIGKILL)
	c.cmd.Wait()
	c.cmd = nil
}

// stop ends the server at once, but lets it give back its shared memory.
func (c *Cluster) stop() {
	if c.cmd == nil {
		return
	}
	c.Thaw()
	c.cmd.Process.Signal(syscall.SIGQUIT)
	c.cmd.Wait()
	c.cmd = nil
}

// Standby makes a standby that follows c, and starts it.
func (c *Cluster) Standby(t testing.TB) *Cluster {
	t.Helper()
	s := NewCluster(t)
	if out, err := s.run("pg_basebackup", "-h", c.Run, "-U", "yinjian", "-D", s.Dir, "-R", "-c", "fast", "-N").CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v: %s", err, out)
	}
	s.Start(t)
	return s
}

// Promote makes a standby a primary.
func (c *Cluster) Promote(t testing.TB) {
	t.Helper()
	if out, err := c.run("pg_ctl", "promote", "-D", c.Dir).CombinedOutput(); err != nil {
		t.Fatalf("promote: %v: %s", err, out)
	}
}

// OwnedLike gives a file to the owner of another.
func OwnedLike(t testing.TB, name string, info os.FileInfo) {
	t.Helper()
	owner := info.Sys().(*syscall.Stat_t)
	if err := os.Chown(name, int(owner.Uid), int(owner.Gid)); err != nil {
		t.Fatal(err)
	}
}
