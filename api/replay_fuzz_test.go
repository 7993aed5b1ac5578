package api

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/ntp"
)

// FuzzReplayFloors: whatever the file holds, no application sends again what it has sent before: neither at or before
// the floor that the file names, nor, when the file cannot be understood, within the window after the start.
func FuzzReplayFloors(f *testing.F) {
	start := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	const window = 5 * time.Minute
	good, err := json.Marshal(floors{1, map[string]int64{"his": start.UnixMilli() + 1000, "emr": 0}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	for _, s := range []string{"", "{}", `{"version":2,"floors":{}}`, `{"version":1}`, `{"version":1,"floors":{"his":-9223372036854775808}}`,
		`{"version":1,"floors":{"his":9223372036854775807}}`, `{"version":1,"floors":{"his":1,"his":2}}`, `{"version":1,"floors":{"his":null}}`} {
		f.Add([]byte(s))
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	path := filepath.Join(f.TempDir(), "floors")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		g, err := openReplayGuard(path, start, window, log)
		if err != nil {
			t.Fatal(err)
		}
		var file floors
		understood := json.Unmarshal(data, &file) == nil && file.Version == 1 && file.Floors != nil
		now := start.Add(time.Minute)
		if !understood {
			if err := g.admit("his", "n", now, ntp.Reading{Time: now}, 10); err == nil {
				t.Errorf("%q is not understood, and a request within the window is let through", data)
			}
			return
		}
		for app, ms := range file.Floors {
			at := time.UnixMilli(ms).UTC()
			if err := g.admit(app, "n", at, ntp.Reading{Time: at}, 10); err == nil {
				t.Errorf("%q: %q sends at its floor again", data, app)
			}
		}
	})
}
