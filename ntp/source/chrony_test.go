package source_test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"testing"
	"time"

	"yinjian/ntp/source"
	"yinjian/packaging/porttest"
)

// startChronyd runs a chronyd that serves its machine's time as stratum 3 and touches no clock, and returns its address.
func startChronyd(t *testing.T, dir string, conf string) string {
	t.Helper()
	path, err := exec.LookPath("chronyd")
	if err != nil {
		path = "/usr/sbin/chronyd"
		if _, err := os.Stat(path); err != nil {
			t.Skip("chronyd is missing; on Debian: apt-get install chrony")
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	addr, err := net.ResolveUDPAddr("udp4", porttest.Free(t))
	if err != nil {
		t.Fatal(err)
	}
	conf = fmt.Sprintf("local stratum 3\nport %d\nbindaddress 127.0.0.1\nallow 127.0.0.0/8\ncmdport 0\nbindcmdaddress /\npidfile chronyd.pid\nuser %s\n%s", addr.Port, me.Username, conf)
	if err := os.WriteFile(filepath.Join(dir, "chrony.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-U", "-x", "-d", "-f", "chrony.conf")
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return addr.String()
}

// TestAuth is against chronyd, which is the oracle for the MACs of both directions.
func TestAuth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	keys := "# id type key\n" +
		"1 SHA256 ASCII:sixteen-bytes-or-more\n" +
		"2 AES128 HEX:000102030405060708090a0b0c0d0e0f\n" +
		"3 AES256 HEX:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n"
	server, wrong := filepath.Join(dir, "server.keys"), filepath.Join(dir, "wrong.keys")
	for path, text := range map[string]string{server: keys, wrong: "3 AES256 HEX:ff0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n4 AES128 HEX:000102030405060708090a0b0c0d0e0f\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	addr := startChronyd(t, dir, "keyfile server.keys\n")
	// It is up when it answers without a key.
	plain := newSource(t, "plain", addr)
	for start := kernel.Boot(); ; {
		m, err := plain.Query(t.Context())
		if err == nil {
			if m.Stratum != 3 || m.UTC.Sub(kernel.Realtime()).Abs() > 5*time.Second {
				t.Errorf("chronyd answers %+v", m)
			}
			break
		}
		if kernel.Boot()-start > 2*time.Minute {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	ask := func(a source.Auth, within time.Duration) error {
		s, err := source.New(source.Config{Name: "s", Address: addr, Clock: kernel, Timeout: within, Auth: a})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Query(t.Context())
		return err
	}
	for id, typ := range map[uint32]string{1: "SHA256", 2: "AES128", 3: "AES256"} {
		if err := ask(source.Auth{KeyID: id, Type: typ, KeyFile: server}, 30*time.Second); err != nil {
			t.Errorf("%s: %v", typ, err)
		}
	}
	if err := ask(source.Auth{KeyID: 3, Type: "AES256", KeyFile: wrong}, 500*time.Millisecond); err == nil {
		t.Error("answered to a wrong key")
	}
	if err := ask(source.Auth{KeyID: 4, Type: "AES128", KeyFile: wrong}, 500*time.Millisecond); err == nil {
		t.Error("answered to an unknown key")
	}

	// Somebody who sees the questions, and is faster than the server, changes nothing.
	in, _ := net.ResolveUDPAddr("udp4", addr)
	racer := serve(t, func(_ int, req []byte) [][]byte {
		c, err := net.DialUDP("udp4", nil, in)
		if err != nil {
			t.Error(err)
			return nil
		}
		defer c.Close()
		buf := make([]byte, 1024)
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err = c.Write(req); err == nil {
			var n int
			n, err = c.Read(buf)
			buf = buf[:n]
		}
		if err != nil {
			t.Error(err)
			return nil
		}
		forged := bytes.Clone(buf)
		forged[43] ^= 5
		return [][]byte{forged[:48], forged, buf}
	})
	for id, typ := range map[uint32]string{1: "SHA256", 2: "AES128", 3: "AES256"} {
		s, err := source.New(source.Config{Name: "s", Address: racer, Clock: kernel, Timeout: 30 * time.Second, Auth: source.Auth{KeyID: id, Type: typ, KeyFile: server}})
		if err != nil {
			t.Fatal(err)
		}
		if m, err := s.Query(t.Context()); err != nil || m.UTC.Sub(kernel.Realtime().Add(m.Boot-kernel.Boot())).Abs() > 500*time.Millisecond {
			t.Errorf("%s, raced: %+v, %v", typ, m, err)
		}
	}

	// A server that answers without MAC, or with one made of zeros, is not believed.
	for name, extra := range map[string]int{"no MAC": 0, "false MAC": 20} {
		a := good()
		a.extraBytes = extra
		s, err := source.New(source.Config{Name: "s", Address: serve(t, always(a)), Clock: kernel, Timeout: 300 * time.Millisecond, Auth: source.Auth{KeyID: 2, Type: "AES128", KeyFile: server}})
		if err != nil {
			t.Fatal(err)
		}
		if m, err := s.Query(t.Context()); err == nil {
			t.Errorf("%s: believed %+v", name, m)
		}
	}
}
