package appliance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
)

// BackupFiles says which files of an appliance's folder a backup has beside the journal, the keys' uses and the software
// cipher machine's store: configuration, decisions taken at run time, public certificates and lists, and what the
// configuration names and is no secret. Names are relative to dir, sorted. absent are the files that a backup never has and
// that a restored appliance needs: PINs, passwords, symmetric keys, vendors' modules and packs, and what lies elsewhere.
//
// What a configuration names is every absolute path in it, once relative ones are taken from dir. Whatever the key, a file
// is a secret if the key ends in "_file", or if it lies where secrets do ([LeftBehind]).
func BackupFiles(dir string) (names, absent []string, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, nil, err
	}
	c, err := LoadConfig(dir)
	if err != nil {
		return nil, nil, err
	}
	added, err := readMachines(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, line := range added.Machines {
		if line.Machine != nil {
			line.Machine.setDefaults(dir)
		}
	}
	var times sourcesFile
	if b, err := os.ReadFile(sourcesPath(dir)); err == nil {
		if err := decodeTOML(b, &times); err != nil {
			return nil, nil, fmt.Errorf("timesources.toml: %w", err)
		}
	}
	for _, line := range times.Sources {
		if line.Source != nil {
			abs(dir, &line.Source.KeyFile)
		}
	}
	var public, left []string
	for _, v := range []any{c, added, times} {
		eachPath(reflect.ValueOf(v), "", func(key, path string) {
			if key == "pin_file" && v == any(c) && c.HSM.locked() {
				return // such a file is there before the PINs are locked, and not afterwards
			}
			if key == "device" || key == "socket" {
				return // another machine has a TPM and agents of its own
			}
			if strings.HasSuffix(key, "_file") || key == "module" {
				left = append(left, path)
			} else {
				public = append(public, path)
			}
		})
	}
	modules := []string{c.HSM.Module}
	for _, m := range c.HSM.Machines {
		modules = append(modules, m.Module)
	}
	for _, line := range added.Machines {
		if line.Machine != nil {
			modules = append(modules, line.Machine.Module)
		}
	}
	for _, m := range modules {
		if strings.HasPrefix(m, packPrefix) {
			left = append(left, m)
		}
	}
	if c.HSM.locked() {
		left = append(left, LockedPINsFile(dir))
	}
	if c.Evaluation.Softtoken {
		left = append(left, filepath.Join(dir, "secrets", "softtoken.passphrase"))
	}
	if _, ok := c.HSM.Slots["tls"]; !ok {
		left = append(left, filepath.Join(dir, "secrets", "tls.key"))
	}
	for _, pattern := range []string{"config.toml", "machines.toml", "timesources.toml", "*.pem", "crl-*.crl"} {
		found, _ := filepath.Glob(filepath.Join(dir, pattern)) // the patterns are well-formed
		public = append(public, found...)
	}
	for _, name := range public {
		rel, err := filepath.Rel(dir, name)
		if err != nil || !filepath.IsLocal(rel) || LeftBehind(rel) {
			left = append(left, name)
			continue
		}
		switch st, err := os.Lstat(name); {
		case errors.Is(err, fs.ErrNotExist):
			return nil, nil, fmt.Errorf("配置所指的 %s 不存在 (the configuration names a file that is not there)", name)
		case err != nil:
			return nil, nil, err
		case !st.Mode().IsRegular(): // a link leads elsewhere
			left = append(left, name)
		default:
			names = append(names, rel)
		}
	}
	for _, name := range left {
		if rel, err := filepath.Rel(dir, name); err == nil && filepath.IsLocal(rel) {
			name = rel
		}
		absent = append(absent, name)
	}
	slices.Sort(names)
	slices.Sort(absent)
	return slices.Compact(names), slices.Compact(absent), nil
}

// Files are the absolute paths that the configuration names, each with the last part of its key: pin_file.
func (c *Config) Files() map[string]string {
	files := map[string]string{}
	eachPath(reflect.ValueOf(c), "", func(key, path string) { files[path] = key })
	return files
}

// eachPath calls fn with each absolute path below v, and the TOML key that it stands under.
func eachPath(v reflect.Value, key string, fn func(key, path string)) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			eachPath(v.Elem(), key, fn)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("toml"), ",")
			eachPath(v.Field(i), name, fn)
		}
	case reflect.Slice:
		for i := range v.Len() {
			eachPath(v.Index(i), key, fn)
		}
	case reflect.Map:
		for _, k := range v.MapKeys() {
			eachPath(v.MapIndex(k), key, fn)
		}
	case reflect.String:
		if filepath.IsAbs(v.String()) {
			fn(key, v.String())
		}
	}
}

// LeftBehind says whether a name in an appliance's folder is one that no backup may have, whatever names it: secrets,
// applications' credentials, what belongs to the running process.
func LeftBehind(name string) bool {
	top, _, _ := strings.Cut(filepath.ToSlash(name), "/")
	return slices.Contains([]string{"secrets", "credentials", "run"}, top)
}
