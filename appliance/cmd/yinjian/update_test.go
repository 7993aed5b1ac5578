package main_test

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/appliance/update"
	"yinjian/appliance/update/updatetest"
	"yinjian/iso/layout"
)

// A sealedDisk is a disk with two slots, and the agent that may write to it.
type sealedDisk struct {
	dir, socket string
	release     *sm2.PrivateKey
	agent       *exec.Cmd
}

func newSealedDisk(t *testing.T, index uint64) *sealedDisk {
	t.Helper()
	d := &sealedDisk{dir: tempDir(t), release: updatetest.Key(t)}
	d.socket = filepath.Join(d.dir, "socket")
	der, err := smx509.MarshalPKIXPublicKey(&d.release.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"disk":        updatetest.New(t, index).Install(t, filepath.Join(d.dir, "esp")),
		"reboot":      []byte("#!/bin/sh\necho \"$@\" > " + filepath.Join(d.dir, "restarted") + "\n"),
		"release.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}),
	} {
		if err := os.WriteFile(filepath.Join(d.dir, name), data, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// runs starts the agent under an image of that index in that slot.
func (d *sealedDisk) runs(t *testing.T, index uint64, slot string) {
	t.Helper()
	d.stop(t)
	page, err := json.Marshal(updatetest.Image(index))
	if err == nil {
		err = os.WriteFile(filepath.Join(d.dir, "image.json"), page, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(d.dir, name) }
	d.agent = exec.Command(built.binary, "update-agent", "--socket", d.socket, "--state", at("state"), "--image", at("image.json"), "--release-key", at("release.pem"),
		"--hospital-key", at("none.pem"), "--disk", at("disk"), "--esp", at("esp"), "--slot", slot, "--reboot", at("reboot"))
	d.agent.Stderr = os.Stderr
	if err := d.agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.stop(t) })
	eventually(t, 20*time.Second, "the agent listens", func() bool {
		_, err := (&update.Client{Socket: d.socket}).Status(t.Context())
		return err == nil
	})
}

func (d *sealedDisk) stop(t *testing.T) {
	t.Helper()
	if d.agent == nil {
		return
	}
	_ = d.agent.Process.Signal(os.Interrupt)
	if err := d.agent.Wait(); err != nil {
		t.Errorf("the agent: %v", err)
	}
	d.agent = nil
}

// trial says whether there is the mark by which a machine is restarted whose new image does not prove itself.
func (d *sealedDisk) trial(t *testing.T, want bool) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(d.dir, "state", "trial")); (err == nil) != want {
		t.Errorf("the mark of a trial: %v, want one: %v", err, want)
	}
}

func (d *sealedDisk) bundle(t *testing.T, r *updatetest.Release) string {
	t.Helper()
	name := filepath.Join(d.dir, "bundle")
	if err := os.WriteFile(name, r.Bundle(t, map[string]*sm2.PrivateKey{update.ByRelease: d.release}), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// An administrator replaces the image through the appliance, which may not write to disks: staged, compared by two, committed;
// the new image is good once it has signed, an older one is refused, and one that was left again is journalled. What is no
// sealed appliance says so.
func TestUpdate(t *testing.T) {
	t.Parallel()
	d := newSealedDisk(t, 1)
	dir := initAppliance(t, startTimeServer(t))
	m := serve(t, dir)
	refused(t, 1, []string{"密封设备"}, "update", "status", "--dir", dir)
	m.stop(t)
	configure(t, dir, func(c *appliance.Config) {
		c.Update.Socket, c.Alarms.RaiseAfter, c.Alarms.ClearAfter = d.socket, appliance.Duration(time.Second), appliance.Duration(time.Second)
	})
	m = serve(t, dir)
	m.trusted(t)
	refused(t, 1, []string{"升级代理没有应答"}, "update", "status", "--dir", dir)

	d.runs(t, 1, "2")
	next := updatetest.New(t, 2)
	next.Manifest.Floor = 2
	file := d.bundle(t, next)
	mustRun(t, "update", "stage", file, "--dir", dir)
	m.changeOf(t, "/admin/v1/update/bundle", "update.image/staged", "", "", `"index":2`)
	var s update.Status
	o := mustRun(t, "update", "status", "--dir", dir, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &s); err != nil || s.Running != 1 || s.Staged == nil || s.Staged.Index != 2 {
		t.Fatalf("%v, %v", o, err)
	}
	sm3 := s.Staged.SM3
	refused(t, 1, []string{"没有提交"}, "update", "restart", "--dir", dir, "--reason", "启用")
	refused(t, 1, []string{"persons"}, "update", "commit", "--dir", dir, "--sm3", sm3, "--reason", "补丁")
	two := []string{"--confirmed-by", "张三", "--confirmed-by", "李四"}
	refused(t, 1, []string{sm3}, append([]string{"update", "commit", "--dir", dir, "--sm3", strings.Repeat("0", 64), "--reason", "补丁"}, two...)...)
	mustRun(t, append([]string{"update", "commit", "--dir", dir, "--sm3", sm3, "--reason", "补丁"}, two...)...)
	d.trial(t, true)
	m.changeOf(t, "/admin/v1/update/commit", "update.image/commit", "", `"state":"staged"`, `"state":"committed"`)
	mustRun(t, "update", "cancel", "--dir", dir, "--reason", "改期")
	m.changeOf(t, "/admin/v1/update/cancel", "update.image/cancelled", "", `"state":"offered"`, `"state":"cancelled"`)
	d.trial(t, false)
	mustRun(t, "update", "stage", file, "--dir", dir)
	mustRun(t, append([]string{"update", "commit", "--dir", dir, "--sm3", sm3, "--reason", "补丁"}, two...)...)

	mustRun(t, "update", "restart", "--dir", dir, "--reason", "启用")
	m.changeOf(t, "/admin/v1/update/restart", "update.image/restart", "", `"state":"committed"`, `"state":"restarting"`)
	if said := readFile(t, filepath.Join(d.dir, "restarted")); said != "--no-block reboot\n" {
		t.Errorf("the machine was asked to %q", said)
	}

	// The machine starts again, from the other slot.
	m.stop(t)
	tried := filepath.Join(d.dir, "esp", filepath.FromSlash(layout.EntryDir))
	if err := os.Rename(filepath.Join(tried, layout.NewEntry(2).String()), filepath.Join(tried, layout.Entry{Index: 2, Counted: true, Left: 2, Done: 1}.String())); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(d.dir, "esp", layout.MediaDir, "staged.json")); err != nil { // the floor is kept elsewhere
		t.Fatal(err)
	}
	d.runs(t, 2, "3")
	m = serve(t, dir)
	eventually(t, time.Minute, "the image is good", func() bool {
		s := update.Status{}
		o := mustRun(t, "update", "status", "--dir", dir, "-o", "json")
		if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
			t.Fatal(err)
		}
		return s.Running == 2 && s.Good && s.Floor == 2
	})
	noTrial := func() {
		eventually(t, time.Minute, "nothing is on trial", func() bool {
			_, err := os.Stat(filepath.Join(d.dir, "state", "trial"))
			return errors.Is(err, os.ErrNotExist)
		})
	}
	noTrial()
	if least := readFile(t, filepath.Join(d.dir, "state", filepath.Base(layout.LeastFile))); least != "2\n" {
		t.Errorf("the least image that may start: %q", least)
	}
	refused(t, 1, []string{"不高于"}, "update", "stage", d.bundle(t, updatetest.New(t, 2)), "--dir", dir)

	// One that was tried and left.
	mustRun(t, "update", "stage", d.bundle(t, updatetest.New(t, 3)), "--dir", dir)
	o = mustRun(t, "update", "status", "--dir", dir, "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
		t.Fatal(err)
	}
	mustRun(t, append([]string{"update", "commit", "--dir", dir, "--sm3", s.Staged.SM3, "--reason", "补丁"}, two...)...)
	m.stop(t)
	if err := os.Rename(filepath.Join(tried, layout.NewEntry(3).String()), filepath.Join(tried, layout.Entry{Index: 3, Counted: true, Done: 3}.String())); err != nil {
		t.Fatal(err)
	}
	d.runs(t, 2, "3")
	m = serve(t, dir)
	eventually(t, time.Minute, "it is in the journal", func() bool {
		for _, e := range entries(t, dir, "update.image/left") {
			for _, f := range e.Fields {
				if f.Name == "index" && f.Value == audit.Int(3) {
					return true
				}
			}
		}
		return false
	})
	noTrial() // the image before is good, and was before this start

	m.raises(t, alarm.ImageLeft)
	m.stop(t)
	m = serve(t, dir) // it is not journalled anew at each start, and the alarm stands until somebody acts
	m.raises(t, alarm.ImageLeft)
	if n := len(entries(t, dir, "update.image/left")); n != 1 {
		t.Errorf("%d entries about the image that was left", n)
	}

	// It was no fault of its own: tried again, under administrators who have stopped stamping, so that it has nothing to sign.
	file = d.bundle(t, updatetest.New(t, 3))
	refused(t, 1, []string{"已试过", "update cancel"}, "update", "stage", file, "--dir", dir)
	mustRun(t, "update", "cancel", "--dir", dir, "--reason", "断电")
	m.changeOf(t, "/admin/v1/update/cancel", "update.image/cancelled", "", `"state":"left"`, `"state":"cancelled"`)
	m.clears(t, alarm.ImageLeft)
	mustRun(t, "update", "stage", file, "--dir", dir)
	mustRun(t, "tsa", "stop", "--dir", dir, "--reason", "检修")
	m.stop(t)
	if err := os.Rename(filepath.Join(d.dir, "esp", layout.MediaDir, "staged.efi"), filepath.Join(tried, layout.Entry{Index: 3, Counted: true, Left: 2, Done: 1}.String())); err != nil {
		t.Fatal(err)
	}
	d.runs(t, 3, "2")
	m = serve(t, dir)
	eventually(t, time.Minute, "the image is good", func() bool {
		s := update.Status{}
		o := mustRun(t, "update", "status", "--dir", dir, "-o", "json")
		if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
			t.Fatal(err)
		}
		return s.Running == 3 && s.Good
	})
	m.stop(t)
	rang(t, dir, alarm.ImageLeft)
	good := entries(t, dir, "update.image/good")
	if len(good) != 2 {
		t.Fatalf("%d images became good, want the second and the third", len(good))
	}
	for i, unit := range []string{"sm2", ""} {
		if !slices.ContainsFunc(good[i].Fields, func(f audit.Field) bool { return f.Name == "unit" && f.Value == audit.Text(unit) }) {
			t.Errorf("image %d: %+v, want that unit %q has signed", i+2, good[i].Fields, unit)
		}
	}
}
