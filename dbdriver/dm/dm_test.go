package dm_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
	"yinjian/dbdriver/dbtest"
	"yinjian/dbdriver/dm"
)

// What the driver is given for what is written in the configuration. The keys were read in the driver's source.
func TestDriverDSN(t *testing.T) {
	t.Parallel()
	const common = "&switchTimes=1&switchInterval=200&socketTimeout=5&LobMode=2&appName=yinjian&dialName=d1"
	for dsn, want := range map[string]string{
		"dm://YINJIAN@10.0.0.1":                        "dm://YINJIAN:Right.pass_1@10.0.0.1:5236?loginMode=4" + common,
		"dm://YINJIAN@db.example:5237":                 "dm://YINJIAN:Right.pass_1@db.example:5237?loginMode=4" + common,
		"dm://YINJIAN@[fd00::1]:5237":                  "dm://YINJIAN:Right.pass_1@[fd00::1]:5237?loginMode=4" + common,
		"dm://yj_app@h1,h2:5237?topology=standby":      "dm://yj_app:Right.pass_1@YINJIAN?YINJIAN=(h1:5236,h2:5237)&loginMode=1" + common,
		"dm://yj_app@h1?topology=standby":              "dm://yj_app:Right.pass_1@h1:5236?loginMode=1" + common,
		"dm://yj_app@h1,h2?topology=dsc":               "dm://yj_app:Right.pass_1@YINJIAN?YINJIAN=(h1:5236,h2:5236)&loginMode=4&cluster=DSC" + common,
		"dm://yj_app@h1?tls_ca=/etc/ca.pem&tls_name=x": "dm://yj_app:Right.pass_1@h1:5236?loginMode=4" + common,
	} {
		c, err := dm.ParseDSN(dsn)
		if err != nil {
			t.Errorf("%s: %v", dsn, err)
			continue
		}
		if got, err := dm.DriverDSN(c, "Right.pass_1", "d1"); got != want || err != nil {
			t.Errorf("%s:\n got %s, %v\nwant %s", dsn, got, err, want)
		}
	}
}

func TestDSNRefused(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{
		"", "dm:", "dm://", "dm://host", "dm://u@", "dm://u:s3cret@h", "dm://u@h/schema", "dm://u@h?schema=X", "dm://u@h:0", "dm://u@h:x", "dm://u@h h",
		"dm://u@h1,h2", "dm://u@h?topology=dsc", "dm://u@h?topology=both", "dm://u@h?topology=", "dm://u@h?tls_name=x", "dm://u@h?logLevel=all",
		"dm://u@h?rwSeparate=true", "dm://u@h)&loginMode=0&x=(", "dm://u@h?tls_ca=a&tls_ca=b", "dm://1u@h", "dm://u?x@h", "dm://u@h@g", "dm://u@h,", "dm://u@%2e",
		"DM://u@h",
	} {
		if c, err := dm.ParseDSN(dsn); !errors.Is(err, dbdriver.ErrUnfit) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %+v, %v, want %v", dsn, c, err, dbdriver.ErrUnfit)
		}
	}
	c, err := dm.ParseDSN("dm://u@h")
	if err != nil {
		t.Fatal(err)
	}
	for _, password := range []string{"", "short", "with@sign1", "with?mark1", "with&amp1", "with/slash", "with%25pc", "汉字口令汉字口令", "with space", "with:colon", "with#hash1", "x(y)zabcd"} {
		if dsn, err := dm.DriverDSN(c, password, "d"); !errors.Is(err, dbdriver.ErrUnfit) || password != "" && strings.Contains(err.Error(), password) {
			t.Errorf("password %q: %s, %v", password, dsn, err)
		}
	}
}

// Without a build that linked the driver, DM8 is refused in words.
func TestNoDriver(t *testing.T) {
	t.Parallel()
	if _, _, err := connect.DB(connect.Place{DSN: "dm://u@127.0.0.1", Password: "Right.pass_1"}); !errors.Is(err, dbdriver.ErrUnfit) || !strings.Contains(err.Error(), "docs/database.md") {
		t.Errorf("DB = %v, want %v", err, dbdriver.ErrUnfit)
	}
}

func TestLOB(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("汉𠮷", 1500) + "z"
	for name, c := range map[string]struct {
		in   any
		want string
	}{
		"nil": {nil, ""}, "bytes": {[]byte{0, 1, 0xff}, "\x00\x01\xff"}, "text": {"王", "王"},
		"BLOB": {dbtest.NewBlob([]byte(long)), long}, "CLOB": {dbtest.NewClob(long), long}, "empty CLOB": {dbtest.NewClob(""), ""},
	} {
		var l dm.LOB
		if err := l.Scan(c.in); err != nil || string(l) != c.want {
			t.Errorf("%s: %d bytes, %v, want %d", name, len(l), err, len(c.want))
		}
	}
	var l dm.LOB
	if err := l.Scan(5); err == nil {
		t.Error("a number was taken for bytes")
	}
	if err := l.Scan(shortClob{}); err == nil {
		t.Error("a text that ends early was taken")
	}
}

type shortClob struct{}

func (shortClob) GetLength() (int64, error)             { return 5, nil }
func (shortClob) ReadString(pos, n int) (string, error) { return "", nil }

// A standby is told from a server whose settings do not fit, and what an account may not read is "not checked".
func TestSettings(t *testing.T) {
	t.Parallel()
	open := func(d *dbtest.Driver) ([]central.Setting, error) {
		db := d.OverSQLite(filepath.Join(t.TempDir(), "x.db"))
		t.Cleanup(func() { db.Close() })
		s, err := central.Open(t.Context(), db, dm.Seam(dbtest.DMCode), central.Author{Name: "test"})
		if err != nil {
			return nil, err
		}
		return s.Settings(), nil
	}
	verdict := func(settings []central.Setting, name string) central.Verdict {
		for _, s := range settings {
			if s.Name == name {
				return s.Verdict
			}
		}
		return "absent"
	}
	settings, err := open(dbtest.Hostile())
	if err != nil || verdict(settings, "MODE$") != central.Fit || verdict(settings, "COMPATIBLE_MODE") != central.Doubtful {
		t.Errorf("settings = %+v, %v", settings, err)
	}
	standby := dbtest.Hostile()
	role := "STANDBY"
	standby.Role.Store(&role)
	if _, err := open(standby); !errors.Is(err, dbdriver.ErrReadOnly) || !errors.Is(err, dbdriver.ErrUnavailable) {
		t.Errorf("a standby: %v, want %v", err, dbdriver.ErrReadOnly)
	}
	denied := dbtest.Hostile()
	denied.Fault = func(op dbtest.Op) dbtest.Fault {
		if strings.Contains(op.Text, "V$") {
			return dbtest.Fault{Before: &dbtest.DMError{ErrCode: -5504, ErrText: "没有权限"}}
		}
		return dbtest.Fault{}
	}
	if settings, err = open(denied); err != nil || verdict(settings, "MODE$") != central.NotChecked || verdict(settings, "UNICODE_FLAG") != central.Fit {
		t.Errorf("settings = %+v, %v", settings, err)
	}
	gb := dbtest.Hostile()
	gb.Charset = "0"
	if _, err := open(gb); !errors.Is(err, dbdriver.ErrUnfit) || !strings.Contains(err.Error(), "UNICODE_FLAG = 0") {
		t.Errorf("GB18030: %v, want %v", err, dbdriver.ErrUnfit)
	}
}

// A server that becomes a standby refuses writes; the store says so.
func TestBecomesStandby(t *testing.T) {
	t.Parallel()
	d := dbtest.Hostile()
	db := d.OverSQLite(filepath.Join(t.TempDir(), "x.db"))
	s, err := central.Open(t.Context(), db, dm.Seam(dbtest.DMCode), central.Author{Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	j, _ := dbtest.Journal(t, t.TempDir(), false)
	dbtest.Append(t, j, 0, 30)
	role := "STANDBY"
	d.Role.Store(&role)
	sh := dbtest.StartShipper(t, j, s, nil)
	for st := sh.Status(); st.LastError == nil; st = sh.Status() {
		time.Sleep(time.Millisecond)
	}
	if st := sh.Status(); !errors.Is(st.LastError, dbdriver.ErrReadOnly) || st.Lag != j.Size() {
		t.Errorf("status = %+v, want %v", st, dbdriver.ErrReadOnly)
	}
	d.Role.Store(nil)
	sh.Wait(t, dbtest.CaughtUp)
	if r := dbtest.Compare(t, j, s); !r.OK() || r.Rows != j.Size() {
		t.Errorf("compare = %+v", r)
	}
}

// The codes, and that nothing of the driver's passes.
func TestClassify(t *testing.T) {
	t.Parallel()
	seam := dm.Seam(dbtest.DMCode)
	for code, want := range map[int32]error{
		-6602: dbdriver.ErrConflict, -6612: dbdriver.ErrConflict, -6403: dbdriver.ErrDeadlock, -6407: dbdriver.ErrDeadlock, -2018: dbdriver.ErrReadOnly,
		6091: dbdriver.ErrReadOnly, -2106: dbdriver.ErrUnfit, -5504: dbdriver.ErrUnfit, 6001: dbdriver.ErrUnavailable, -1: dbdriver.ErrUnavailable,
	} {
		err := seam.Classify(&dbtest.DMError{ErrCode: code})
		var theirs *dbtest.DMError
		if !errors.Is(err, want) || errors.As(err, &theirs) {
			t.Errorf("%d: %v, want %v", code, err, want)
		}
	}
	if err := seam.Classify(sql.ErrConnDone); !errors.Is(err, dbdriver.ErrUnavailable) {
		t.Error(err)
	}
}

// The dial hook verifies whom it speaks to, reaches no other host, and does not wait for ever for an answer.
func TestDial(t *testing.T) {
	t.Parallel()
	certificate, ca := certify(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // echoes once, then is silent, until the other end closes
				defer c.Close()
				b := make([]byte, 1)
				if n, _ := c.Read(b); n == 1 {
					c.Write(b)
				}
				c.Read(b)
			}()
		}
	}()
	_, other := certify(t)
	dial := func(c *dm.Config, addr string) (net.Conn, error) {
		f, err := dm.Dialer(c, 200*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		return f(context.Background(), addr)
	}
	addr := l.Addr().String()
	conn, err := dial(&dm.Config{Hosts: []string{addr}, TLSCA: ca}, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	b := make([]byte, 1)
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(b); n != 1 || err != nil {
		t.Fatalf("Read = %d, %v", n, err)
	}
	if _, err := conn.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read of a silent server = %v, want %v", err, os.ErrDeadlineExceeded)
	}
	for what, c := range map[string]*dm.Config{
		"another CA":   {Hosts: []string{addr}, TLSCA: other},
		"another name": {Hosts: []string{addr}, TLSCA: ca, TLSName: "db.example"},
		"another host": {Hosts: []string{"127.0.0.1:1"}, TLSCA: ca},
		"another time": {Hosts: []string{addr}, TLSCA: ca, Now: func() time.Time { return time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC) }},
	} {
		if conn, err := dial(c, addr); err == nil {
			conn.Close()
			t.Errorf("%s: connected", what)
		}
	}
	if _, err := dm.Dialer(&dm.Config{TLSCA: "/nonexistent"}, time.Second); !errors.Is(err, dbdriver.ErrUnfit) {
		t.Errorf("a CA that is not there: %v", err)
	}
}

// certify makes a self-signed certificate for 127.0.0.1, and a file with it.
func certify(t *testing.T) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "db"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file
}

func FuzzParseDSN(f *testing.F) {
	for _, s := range []string{"dm://u@h1,h2:5237?topology=dsc", "dm://u@[::1]?tls_ca=/x&tls_name=y", "dm://u@h)&x=("} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		c, err := dm.ParseDSN(in)
		if err != nil {
			return
		}
		// Whatever is taken gives the driver one question mark, one at sign, and the keys that are ours.
		out, err := dm.DriverDSN(c, "Right.pass_1", "d1")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(out, "?") != 1 || strings.Count(out, "@") != 1 || strings.Count(out, "loginMode=") != 1 {
			t.Errorf("%q became %q", in, out)
		}
		if _, keys, _ := strings.Cut(out, "?"); strings.Count(keys, "&") > 9 || strings.ContainsAny(strings.TrimPrefix(out, "dm://"), " \n%#/\\\"'") {
			t.Errorf("%q became %q", in, out)
		}
	})
}
