package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/ntp/gnss"
)

// The sealed image's units of gpsd and chronyd, under systemd with all that is taken from them: sentences of a receiver become
// a time server of stratum 1 on the loopback. Without a receiver neither runs.
func TestReceiver(t *testing.T) {
	containers(t)
	const units = "iso/rootfs/usr/lib/systemd/system"
	names := []string{"yinjian-chrony.service", "yinjian-gpsd.service"}
	s := start(t, "")
	put := func(from, to string, change func(string) string) {
		t.Helper()
		text, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(s.root, to), []byte(change(string(text))), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	same := func(text string) string { return text }
	for _, name := range names {
		put(filepath.Join(units, name), "etc/systemd/system/"+name, same)
	}
	put("packaging/time/chrony-nmea.conf", "etc/chrony/chrony-nmea.conf", same)
	s.run(t, "systemctl", "daemon-reload")
	s.run(t, append([]string{"systemctl", "start"}, names...)...)
	for _, name := range names {
		if out, _ := s.try("systemctl", "is-active", name); strings.TrimSpace(out) != "inactive" {
			t.Errorf("without a receiver %s is %s", name, out)
		}
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	fed := make(chan error, 1)
	go func() { fed <- gnss.NewFeed(time.Now, 0).Serve(ctx, ln) }()
	t.Cleanup(func() { cancel(); <-fed })
	s.run(t, shell("mkdir -p /run/yinjian; printf 'RECEIVER=tcp://%s\nCHRONY=/etc/chrony/chrony-nmea.conf\n' > /run/yinjian/receiver", ln.Addr())...)
	s.run(t, append([]string{"systemctl", "start"}, names...)...)
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := s.try("journalctl", "--no-pager", "-n", "60", "-u", names[0], "-u", names[1])
			t.Log(out)
		}
	})
	wait(t, "the receiver's time", func() error {
		conn, err := net.Dial("udp", "127.0.0.1:123")
		if err != nil {
			return err
		}
		defer conn.Close()
		query := make([]byte, 48)
		query[0] = 4<<3 | 3 // RFC 5905 §7.3: version 4, client
		if _, err := conn.Write(query); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
			return err
		}
		if n, err := conn.Read(query); err != nil || n < 48 {
			return errors.Join(fmt.Errorf("%d bytes", n), err)
		}
		if query[0]>>6 == 3 || query[1] != 1 {
			return fmt.Errorf("leap indicator %d, stratum %d", query[0]>>6, query[1])
		}
		return nil
	})
	// Both gave up being root.
	for name, user := range map[string]string{names[0]: "_chrony", names[1]: "gpsd"} {
		status := s.run(t, shell("cat /proc/$(systemctl show -p MainPID --value %s)/status", name)...)
		if uid := strings.TrimSpace(s.run(t, "id", "-u", user)); !strings.Contains(status, "\nUid:\t"+uid+"\t"+uid+"\t"+uid+"\t") {
			t.Errorf("%s is not %s:\n%s", name, user, status)
		}
	}
}
