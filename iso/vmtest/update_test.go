package vmtest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/alarm"
	"yinjian/appliance/problem"
	"yinjian/appliance/update"
	"yinjian/iso/vmtest"
)

// next builds another image of the same sources and keys, and answers its update bundle. What the packages have is in the cache, and
// the root is packed quickly: what is tried here is not how small it gets.
func next(t *testing.T, index uint64, more ...string) string {
	t.Helper()
	at, err := filepath.Abs(keys(t))
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	began := time.Now() // interval
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"run", "./iso/mkimage", "build", "--quick", "--index", fmt.Sprint(index), "--keys", at, "--out", out}, more...)...)
	cmd.Dir = "../.."
	said, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	noteTook("%7.1f s  %s: image %d built from the cache; its steps:\n%s", time.Since(began).Seconds(), t.Name(), index, said)
	return filepath.Join(out, "yinjian.update")
}

// system is the system administrator, whose requests the security administrator approves where two are needed.
func (o *officers) system(t *testing.T) *client.Admin {
	return o.admin.WithSession(o.tokens["system"], func(p wire.Proposed) {
		if _, err := o.admin.WithSession(o.tokens["security"], nil).Decide(t.Context(), "approve", wire.Decide{ID: p.Proposal, SM3: p.SM3}); err != nil {
			t.Errorf("approving: %v", err)
		}
	})
}

// stage sends a bundle from outside of the machine.
func stage(t *testing.T, a *client.Admin, bundle string) (*update.Offer, error) {
	t.Helper()
	f, err := os.Open(bundle)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	answer, err := a.StageUpdate(t.Context(), f, info.Size())
	if err != nil {
		return nil, err
	}
	var o update.Offer
	if err := json.Unmarshal(answer, &o); err != nil {
		t.Fatal(err)
	}
	return &o, nil
}

// stageByCurl sends a bundle by the command of docs/update.md.
func stageByCurl(t *testing.T, v *vmtest.VM, session, bundle string) *update.Offer {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), vmtest.Tool(t, "curl"), "--insecure", "--silent", "--show-error", "--fail-with-body", "-H", "Authorization: Bearer "+session,
		"-H", "Content-Type: application/octet-stream", "-X", "POST", "-T", bundle, "https://"+v.Address(adminPort)+"/admin/v1/update/bundle")
	var complaints strings.Builder
	cmd.Stderr = &complaints
	answer, err := cmd.Output()
	var o update.Offer
	if err == nil {
		err = json.Unmarshal(answer, &o)
	}
	if err != nil {
		t.Fatalf("%v: %s: %s", err, &complaints, answer)
	}
	return &o
}

// commit has two administrators commit what was staged.
func commit(t *testing.T, a *client.Admin, o *update.Offer) {
	t.Helper()
	if _, err := a.CommitUpdate(t.Context(), wire.CommitUpdate{SM3: o.SM3, Reason: "季度补丁"}); err != nil {
		t.Fatal(err)
	}
}

// bootRestarting is [site.boot] of a machine that goes on when it restarts itself.
func (s *site) bootRestarting(t *testing.T, name string) *vmtest.VM {
	t.Helper()
	m := s.firmware(t, name)
	m.Reboots = true
	v := vmtest.Start(t, m)
	v.Wait("of /dev/vda2")
	v.Wait("数据卷已打开")
	return v
}

func restart(t *testing.T, a *client.Admin) {
	t.Helper()
	if _, err := a.RestartForUpdate(t.Context(), wire.RestartForUpdate{Reason: "启用"}); err != nil {
		t.Logf("the answer to the restart: %v", err) // it may be gone before it has answered
	}
}

// proved waits until the running image is good, and answers what stands on the disk.
func proved(t *testing.T, a *client.Admin) *update.Status {
	t.Helper()
	var s *update.Status
	until(t, "the image is good", func(ctx context.Context) error {
		answer, err := a.UpdateStatus(ctx)
		if err != nil {
			return err
		}
		s = &update.Status{}
		if err := json.Unmarshal(answer, s); err != nil {
			return err
		}
		if !s.Good {
			return errors.New("it is on trial")
		}
		return nil
	})
	return s
}

// refusedUpdate says that the bundle was refused, and in which words.
func refusedUpdate(t *testing.T, a *client.Admin, bundle, words string) {
	t.Helper()
	_, err := stage(t, a, bundle)
	if err == nil || !strings.Contains(err.Error(), string(problem.InvalidRequest)) || !strings.Contains(err.Error(), words) {
		t.Errorf("err = %v, want a refusal with %q", err, words)
	}
}

// kept says that what was signed before is there, and judged as before, and that more is signed.
func kept(t *testing.T, c *client.Client, before *wire.SignResult, another string) {
	t.Helper()
	ready(t, c)
	again := sign(t, c, "n-1")
	if !again.Replayed || again.RecordID != before.RecordID {
		t.Errorf("the record from before is %s, was %s", again.RecordID, before.RecordID)
	}
	if more := sign(t, c, another); more.Replayed {
		t.Errorf("%s was there already", another)
	}
}

// An administrator outside of the machine replaces its image: the new one starts, signs with the appliance's own keys, is good, and
// cannot be replaced by the one before. It takes a maker's pack; in the long form, where TestPacks does that, it is started once more.
func TestUpdateImage(t *testing.T) {
	t.Parallel()
	second := next(t, 2, "--floor", "2", "--notes", "试验")
	s, b := inUse(t)
	v := s.bootRestarting(t, "updated")
	c := b.client(t, v)
	ready(t, c)
	first := sign(t, c, "n-1")
	officers := loginAgain(t, v)
	a := officers.system(t)
	if got := proved(t, a); got.Running != 1 || got.Slot != "A" {
		t.Fatalf("%+v", got)
	}
	record(t, "the first image is good", v)
	refusedUpdate(t, a, filepath.Join(built(t), "yinjian.update"), "不高于") // itself
	o := stageByCurl(t, v, officers.tokens["system"], second)
	record(t, "bundle staged from outside", v)
	commit(t, a, o)
	sign(t, c, "n-2") // the first image works on until it is restarted
	restart(t, a)
	v.Wait("of /dev/vda3")
	record(t, "restarted, the second root verified", v)
	v.Wait("数据卷已打开")
	officers = loginAgain(t, v)
	a = officers.system(t)
	got := proved(t, a)
	record(t, "the second image is good", v)
	if got.Running != 2 || got.Slot != "B" || got.Floor != 2 || len(got.Failed) != 0 {
		t.Errorf("%+v", got)
	}
	kept(t, c, first, "n-3")
	record(t, "records verify, new ones are signed", v)
	refusedUpdate(t, a, filepath.Join(built(t), "yinjian.update"), "不高于")
	if os.Getenv("YINJIAN_LONG") == "" {
		tryPacks(t, v, c, officers)
		return
	}
	v.Kill()

	// It stays: a start that nobody counts any more.
	v = s.boot(t)
	kept(t, b.client(t, v), first, "n-4")
	if got := proved(t, loginAgain(t, v).system(t)); got.Running != 2 {
		t.Errorf("%+v", got)
	}
	record(t, "started again", v)
}

// An image that starts, and whose service does not, is restarted three times and left: the one before runs on by itself, with its
// data, and says so.
func TestBrokenUpdate(t *testing.T) {
	t.Parallel()
	broken := next(t, 2, "--overlay", "iso/vmtest/testdata/broken")
	s, b := inUse(t)
	v := s.bootRestarting(t, "falls-back")
	c := b.client(t, v)
	ready(t, c)
	first := sign(t, c, "n-1")
	a := loginAgain(t, v).system(t)
	proved(t, a)
	o, err := stage(t, a, broken)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, a, o)
	restart(t, a)
	for range 3 {
		if v.Wait("of /dev/vda3", "of /dev/vda2") != "of /dev/vda3" {
			t.Fatal("the new image was left before its tries were used up")
		}
		record(t, "tried", v)
	}
	if v.Wait("of /dev/vda3", "of /dev/vda2") != "of /dev/vda2" {
		t.Fatal("the new image was tried a fourth time")
	}
	kept(t, c, first, "n-2")
	record(t, "the first image signs again", v)
	a = loginAgain(t, v).system(t)
	if got := proved(t, a); got.Running != 1 || !slices.Equal(got.Failed, []uint64{2}) {
		t.Errorf("%+v", got)
	}
	until(t, "the alarm", func(ctx context.Context) error {
		answer, err := a.ListAlarms(ctx)
		if err == nil && !strings.Contains(string(answer), string(alarm.ImageLeft)) {
			err = fmt.Errorf("%s", answer)
		}
		return err
	})
	refusedUpdate(t, a, broken, "已试过")
}
