package sqlite_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
)

func init() { children["upgrade"] = childUpgrade }

// childUpgrade opens the journal and closes it. Its call number YJ_CALL (from 1) that changes a file does not happen: it
// is killed there, or the call fails.
func childUpgrade() {
	k, err := strconv.Atoi(os.Getenv("YJ_CALL"))
	if err != nil {
		panic(err)
	}
	var n atomic.Int64
	in := &interceptor{dir: os.Getenv("YJ_DIR"), decide: func(*call) verdict {
		if n.Add(1) != int64(k) {
			return verdict{}
		}
		if os.Getenv("YJ_ACTION") == "kill" {
			return verdict{kill: true}
		}
		return verdict{errno: syscall.EIO}
	}}
	if err := in.install(); err != nil {
		panic(err)
	}
	s, err := sqlite.OpenJournal(context.Background(), sqlite.JournalConfig{Dir: os.Getenv("YJ_DIR")})
	if err == nil {
		err = s.Close()
	}
	if err != nil {
		fmt.Println("open:", err)
	}
	if n.Load() >= int64(k) {
		fmt.Println("struck")
	}
	os.Exit(0)
}

// A kill at any call that changes a file, or a failure of it, leaves a journal of the one format or of the other that
// verifies and opens.
func TestFormat1Interrupted(t *testing.T) {
	t.Parallel()
	for _, action := range []string{"kill", "EIO"} {
		t.Run(action, func(t *testing.T) {
			t.Parallel()
			left := map[int]int{}
			for k := 1; ; k++ {
				dir, key := format1(t)
				cmd, out := child(t, "upgrade", dir, "YJ_CALL="+strconv.Itoa(k), "YJ_ACTION="+action)
				said, err := io.ReadAll(out)
				if err != nil {
					t.Fatal(err)
				}
				killed := cmd.Wait() != nil
				left[formatOf(t, dir, seg3)]++
				s := openStore(t, dir, nil)
				r, err := audit.Verify(t.Context(), s, audit.Options{LogKey: key})
				if err != nil || !r.OK() || r.Entries != 131 || r.Payloads != 256 {
					t.Fatalf("call %d, %q: %v, %+v", k, said, err, r)
				}
				s.Close()
				if n := formatOf(t, dir, seg3); n != 2 {
					t.Fatalf("call %d: format %d after the next start", k, n)
				}
				if !killed && len(said) == 0 { // it had fewer calls
					break
				}
			}
			if left[1] < 5 || left[2] < 5 {
				t.Errorf("formats that were left: %v", left)
			}
		})
	}
}
