package appliance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"yinjian/hsm/pkcs11/profiles"
)

// BackupFiles says which files of an appliance's folder a backup has beside the journal, the keys' uses and the software
// cipher machine's store: configuration, decisions taken at run time, public certificates and lists, and what the
// configuration names and is no secret. Names are relative to dir, sorted. absent are the files that a backup never has and
// that a restored appliance needs: PINs, passwords, symmetric keys, vendors' modules, and what lies elsewhere.
func BackupFiles(dir string) (names, absent []string, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, nil, err
	}
	c, err := LoadConfig(dir)
	if err != nil {
		return nil, nil, err
	}
	public := []string{filepath.Join(dir, "config.toml")}
	for _, pattern := range []string{"machines.toml", "timesources.toml", "*.pem", "crl-*.crl"} {
		found, _ := filepath.Glob(filepath.Join(dir, pattern)) // the patterns are well-formed
		public = append(public, found...)
	}
	secret := []string{c.Database.PasswordFile}
	elsewhere := []string{c.HSM.Module}
	machine := func(profile string, slots map[string]Slot) {
		if profiles.IsPath(profile) {
			public = append(public, profile)
		}
		for _, s := range slots {
			secret = append(secret, s.PINFile)
		}
	}
	machine(c.HSM.Profile, c.HSM.Slots)
	added, err := readMachines(dir)
	if err != nil {
		return nil, nil, err
	}
	others := slices.Clone(c.HSM.Machines)
	for _, line := range added.Machines {
		if line.Machine != nil {
			line.Machine.setDefaults(dir)
			others = append(others, *line.Machine)
		}
	}
	for _, m := range others {
		machine(m.Profile, m.Slots)
		elsewhere = append(elsewhere, m.Module)
	}
	if profiles.IsPath(c.Evaluation.Impersonate) {
		public = append(public, c.Evaluation.Impersonate)
	}
	if c.HSM.Custody != nil {
		public = append(public, c.HSM.Custody.Officers)
	}
	for _, s := range c.Listen.TSASources {
		public = append(public, s.Certificates...)
	}
	if u := c.TSA.Upstream; u != nil {
		public = append(public, u.Certificates, u.TLSRoots)
		secret = append(secret, u.PasswordFile)
	}
	for _, s := range c.Time.Sources {
		secret = append(secret, s.KeyFile)
	}
	var times sourcesFile
	if b, err := os.ReadFile(sourcesPath(dir)); err == nil {
		if err := decodeTOML(b, &times); err != nil {
			return nil, nil, fmt.Errorf("timesources.toml: %w", err)
		}
	}
	for _, l := range times.Sources {
		if l.Source != nil {
			abs(dir, &l.Source.KeyFile)
			secret = append(secret, l.Source.KeyFile)
		}
	}
	if c.Evaluation.Softtoken {
		secret = append(secret, filepath.Join(dir, "secrets", "softtoken.passphrase"))
	}
	if _, ok := c.HSM.Slots["tls"]; !ok {
		secret = append(secret, filepath.Join(dir, "secrets", "tls.key"))
	}
	for _, name := range public {
		if name == "" {
			continue
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil || !filepath.IsLocal(rel) {
			elsewhere = append(elsewhere, name)
			continue
		}
		switch st, err := os.Lstat(name); {
		case errors.Is(err, fs.ErrNotExist):
			return nil, nil, fmt.Errorf("配置所指的 %s 不存在 (the configuration names a file that is not there)", name)
		case err != nil:
			return nil, nil, err
		case LeftBehind(rel), !st.Mode().IsRegular(): // a link leads elsewhere
			elsewhere = append(elsewhere, name)
		default:
			names = append(names, rel)
		}
	}
	for _, name := range slices.Concat(secret, elsewhere) {
		if name != "" {
			if rel, err := filepath.Rel(dir, name); err == nil && filepath.IsLocal(rel) {
				name = rel
			}
			absent = append(absent, name)
		}
	}
	slices.Sort(names)
	slices.Sort(absent)
	return slices.Compact(names), slices.Compact(absent), nil
}

// LeftBehind says whether a name in an appliance's folder is one that no backup may have, whatever names it: secrets,
// applications' credentials, what belongs to the running process.
func LeftBehind(name string) bool {
	top, _, _ := strings.Cut(filepath.ToSlash(name), "/")
	return slices.Contains([]string{"secrets", "credentials", "run"}, top)
}
