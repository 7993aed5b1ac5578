package main_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"yinjian/api/wire"
	"yinjian/appliance"
)

// The running log's folder, level and time of keeping are changed while the appliance runs, hold over a restart, and are in the change
// log. Old files are deleted by trusted time alone, never before half a year, and an entry says which.
func TestRunningLog(t *testing.T) {
	t.Parallel()
	clock := startTimeServer(t)
	dir := initAppliance(t, clock)
	configure(t, dir, func(c *appliance.Config) { c.Log.Directory = "logs" })
	m := serve(t, dir)
	m.trusted(t)

	status := func() (s wire.LogStatus) {
		t.Helper()
		if err := json.Unmarshal([]byte(mustRun(t, "log", "status", "--dir", dir, "-o", "json").stdout), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := status(); s.Folder != filepath.Join(dir, "logs") || s.Level != "info" || s.KeepDays != 365 || s.Files != 1 || s.Decided != "config.toml" {
		t.Errorf("%+v", s)
	}
	eventually(t, 10*time.Second, "the start is in the file", func() bool {
		return strings.Contains(readFile(t, filepath.Join(dir, "logs", "yinjian.log")), "appliance is operational")
	})
	refused(t, 1, []string{"keep_days"}, "log", "set", "--dir", dir, "--keep-days", "30", "--reason", "腾空间")
	refused(t, 1, []string{"directory"}, "log", "set", "--dir", dir, "--directory", "journal", "--reason", "试")
	mustRun(t, "log", "set", "--dir", dir, "--directory", "logs/new", "--level", "debug", "--keep-days", "200", "--reason", "换目录")
	m.changeOf(t, "/admin/v1/log", "log.settings", "", `"directory":"logs"`, `"directory":"logs/new"`)
	if s := status(); s.Folder != filepath.Join(dir, "logs", "new") || s.Level != "debug" || s.KeepDays != 200 || s.Decided == "config.toml" {
		t.Errorf("%+v", s)
	}
	m.stop(t)

	// Two closed files: one whose note says that it is old enough, one from a clock that was wrong.
	folder := filepath.Join(dir, "logs", "new")
	for _, name := range []string{"yinjian-2020-01-01T00-00-00.000.log", "yinjian-1970-01-01T00-00-00.000.log", "other.log"} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte("x\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(filepath.Join(folder, name), time.Unix(0, 0), time.Unix(0, 0)); err != nil {
			t.Fatal(err)
		}
	}
	note, err := json.Marshal(map[string]time.Time{"yinjian-2020-01-01T00-00-00.000.log": time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)})
	if err == nil {
		err = os.WriteFile(filepath.Join(folder, "closed.json"), note, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	m = serve(t, dir)
	m.trusted(t)
	eventually(t, 10*time.Second, "the old file is deleted", func() bool {
		_, err := os.Stat(filepath.Join(folder, "yinjian-2020-01-01T00-00-00.000.log"))
		return os.IsNotExist(err)
	})
	for _, name := range []string{"yinjian-1970-01-01T00-00-00.000.log", "other.log"} {
		if _, err := os.Stat(filepath.Join(folder, name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s := status(); s.Folder != folder || s.Level != "debug" || s.Files != 2 {
		t.Errorf("after a restart: %+v", s)
	}
	eventually(t, 10*time.Second, "the last lines tell of it", func() bool {
		o := mustRun(t, "log", "lines", "--dir", dir, "-n", "10000")
		return strings.Contains(o.stdout, "appliance is operational") && strings.Contains(o.stdout, "old files of the running log were deleted")
	})
	m.stop(t)
	found := false
	for _, e := range entries(t, dir, "log.purged") {
		found = strings.Contains(e.Text("files"), "yinjian-2020-01-01T00-00-00.000.log") && !strings.Contains(e.Text("files"), "1970")
	}
	if !found {
		t.Error("no entry says which file was deleted")
	}
}
