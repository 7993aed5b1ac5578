package profiles

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// An Identity is what a machine says of itself.
type Identity struct {
	Library                    string   // path of the module
	Manufacturers              []string // of CK_INFO and CK_TOKEN_INFO
	Description, Model         string
	VersionMajor, VersionMinor byte // libraryVersion
}

// Fits answers nil when the machine is one that the profile is for, and otherwise everything that differs.
func (m Match) Fits(id Identity) error {
	var f faults
	has := func(key, want string, have ...string) {
		for _, h := range have {
			if strings.Contains(strings.ToLower(h), strings.ToLower(want)) {
				return
			}
		}
		f.add("match."+key, "要求含 %q，密码机为 %q (wants this, the machine has that)", want, have)
	}
	has("library", m.Library, filepath.Base(id.Library))
	has("manufacturer", m.Manufacturer, id.Manufacturers...)
	has("description", m.Description, id.Description)
	has("model", m.Model, id.Model)
	if len(m.Version) == 2 {
		first, _ := parseVersion(m.Version[0]) // check has read both
		last, _ := parseVersion(m.Version[1])
		if v := int(id.VersionMajor)<<8 | int(id.VersionMinor); v < first || v > last {
			f.add("match.version", "要求 %s–%s，密码机为 %s (wants these, the machine has that)", m.Version[0], m.Version[1],
				fmt.Sprintf("%d.%d", id.VersionMajor, id.VersionMinor))
		}
	}
	return errors.Join(f...)
}
