package vmtest_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// full is [next] with the program that fills the data volume.
func full(t *testing.T) string {
	t.Helper()
	overlay := t.TempDir()
	copyFolder(t, "testdata/full", overlay)
	at := filepath.Join(overlay, "usr/lib/yinjian")
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", filepath.Join(at, "fill"), "./fill")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return next(t, 2, "--overlay", overlay)
}

// The data volume is full to its last block: nothing is signed, and it is told why; what was signed is there and judged.
// With room again it signs by itself.
func TestFull(t *testing.T) {
	long(t)
	second := full(t)
	s, b := inUse(t)
	v := s.boot(t)
	c := b.client(t, v)
	ready(t, c)
	first := sign(t, c, "n-1")
	a := loginAgain(t, v).system(t)
	proved(t, a)
	o, err := stage(t, a, second)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, a, o)
	v.Kill()

	v = s.boot(t)
	c = b.client(t, v)
	kept(t, c, first, "n-2")
	record(t, "signs", v)
	v.Type("fill\n")
	v.Wait("FILLED")
	until(t, "not ready", func(ctx context.Context) error {
		r, err := c.Ready(ctx)
		if err == nil && r.Ready {
			err = fmt.Errorf("ready on a full disk")
		}
		return err
	})
	_, err = c.Sign(t.Context(), "n-3", request("n-3"))
	refusedAs(t, err, problem.DiskReserve, "")
	record(t, "refuses on a full disk", v)
	evidence, err := c.Evidence(t.Context(), first.RecordID)
	if err == nil {
		_, err = c.Verify(t.Context(), &wire.VerifyRequest{Evidence: evidence, Document: request("n-1").Content})
	}
	if err != nil {
		t.Errorf("what was signed: %v", err)
	}
	v.Type("free\n")
	v.Wait("FREED <nil>")
	kept(t, c, first, "n-4")
	record(t, "signs again", v)
	v.Kill()

	// Full when the power fails, and at the start.
	v = s.boot(t)
	ready(t, b.client(t, v))
	v.Type("fill\n")
	v.Wait("FILLED")
	v.Kill()
	v = s.boot(t)
	c = b.client(t, v)
	v.After(time.Minute)
	if r, err := c.Ready(t.Context()); err == nil && r.Ready {
		t.Error("it started on a full disk")
	}
	v.Type("free\n")
	v.Wait("FREED <nil>")
	kept(t, c, first, "n-5")
	record(t, "started by itself, with room again", v)
	v.Kill()
}
