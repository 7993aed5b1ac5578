package appliance

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance/report"
)

// A report's file is read from the folder of reports and from nowhere else, and only as the journal has it.
func TestReportFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	folder := filepath.Join(dir, "reports")
	secret := []byte("secret")
	if err := errors.Join(os.Mkdir(folder, 0o700), os.WriteFile(filepath.Join(folder, "a.json"), []byte("{}"), 0o600), os.WriteFile(filepath.Join(dir, "secret"), secret, 0o600),
		os.Symlink("../secret", filepath.Join(folder, "link")), os.Symlink("a.json", filepath.Join(folder, "inner")), os.Mkdir(filepath.Join(folder, "folder"), 0o700)); err != nil {
		t.Fatal(err)
	}
	good := report.FileOf("a.json", []byte("{}"))
	if b, err := readReportFile(folder, good); err != nil || string(b) != "{}" {
		t.Errorf("%q, %v", b, err)
	}
	changed := good
	changed.SM3 = strings.Repeat("0a", 32)
	longer := good
	longer.Size = 3
	for name, f := range map[string]report.File{
		"changed": changed, "longer": longer, "above": report.FileOf("../secret", secret), "absolute": report.FileOf(filepath.Join(dir, "secret"), secret),
		"link": report.FileOf("link", secret), "a link within": report.FileOf("inner", []byte("{}")), "folder": report.FileOf("folder", nil), "none": report.FileOf("b", nil), "empty": report.FileOf("", nil),
	} {
		if b, err := readReportFile(folder, f); err == nil || b != nil && string(b) == string(secret) {
			t.Errorf("%s: %q", name, b)
		}
	}
	if _, err := readReportFile(filepath.Join(dir, "none"), good); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}
