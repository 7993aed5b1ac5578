package appliance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm3"
	"github.com/pelletier/go-toml/v2"

	"yinjian/api/wire"
	"yinjian/appliance/diag"
	"yinjian/hsm"
)

// Overlay puts every key of with into all: tables into tables, everything else in the place of what was there.
func Overlay(all, with map[string]any) {
	for key, value := range with {
		if in, ok := value.(map[string]any); ok {
			if table, ok := all[key].(map[string]any); ok {
				Overlay(table, in)
				continue
			}
		}
		all[key] = value
	}
}

// ParseConfigWith is ParseConfig for a configuration whose secrets are not in their folder yet: what its DSN names of them, a CA's
// certificate, is read with it, from somewhere else. No other secret is written anywhere.
func ParseConfigWith(text []byte, dir string, secrets map[string]string) (*Config, error) {
	look, done, err := withCertificates(text, dir, secrets)
	if err != nil {
		return nil, err
	}
	defer done()
	return ParseConfig(look, dir)
}

// withCertificates is a configuration as it can be looked at before the secrets are in their folder, until done is called.
func withCertificates(text []byte, dir string, secrets map[string]string) (look []byte, done func(), err error) {
	done = func() {}
	var all map[string]any
	if toml.Unmarshal(text, &all) != nil {
		return text, done, nil // whoever reads it says what is wrong
	}
	of, _ := all["database"].(map[string]any)
	dsn, _ := of["dsn"].(string)
	scratch := ""
	elsewhere, err := dsnFiles(dsn, func(place string) (string, error) {
		name, err := filepath.Rel(filepath.Join(dir, "secrets"), place)
		secret, given := secrets[name]
		if err != nil || !given || !secretName.MatchString(name) {
			return place, nil
		}
		if scratch == "" {
			if scratch, err = os.MkdirTemp("", "yinjian"); err != nil {
				return "", err
			}
			done = func() { _ = os.RemoveAll(scratch) } // at worst a certificate stays there
		}
		file := filepath.Join(scratch, name)
		return file, os.WriteFile(file, []byte(secret), 0o600)
	})
	if err != nil || elsewhere == dsn {
		done()
		return text, func() {}, err
	}
	of["dsn"] = elsewhere
	if look, err = toml.Marshal(all); err != nil {
		done()
		return nil, nil, err
	}
	return look, done, nil
}

// dsnValue is a parameter of a DSN, as an URL has it or libpq's keywords.
var dsnValue = regexp.MustCompile(`(=\s*)('[^']*'|[^&\s']+)`)

// dsnFiles puts place's answer where a parameter of the DSN has an absolute path as its whole value, and leaves everything else.
func dsnFiles(dsn string, place func(path string) (string, error)) (string, error) {
	var failed error
	isURL := strings.Contains(dsn, "://")
	out := dsnValue.ReplaceAllStringFunc(dsn, func(found string) string {
		m := dsnValue.FindStringSubmatch(found)
		path := strings.Trim(m[2], "'")
		if plain, err := url.QueryUnescape(path); isURL && err == nil {
			path = plain
		}
		if !filepath.IsAbs(path) {
			return found
		}
		to, err := place(path)
		failed = errors.Join(failed, err)
		if to == path {
			return found
		}
		if isURL {
			to = url.QueryEscape(to)
		}
		return m[1] + to
	})
	return out, failed
}

var secretName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// ownSecrets are files of the folder secrets that the appliance makes itself.
var ownSecrets = []string{"administrators.json", "pins.locked", "pins.tpm", "softtoken.passphrase", "tls.key", "unlock-tries.json"}

// OwnSecret says whether a file of the folder secrets is one that the appliance makes itself.
func OwnSecret(name string) bool { return slices.Contains(ownSecrets, name) }

// SecretName says whether somebody may give a file of the folder secrets this name.
func SecretName(name string) bool { return SecretFile(name) && !OwnSecret(name) }

// SecretFile says whether a file of the folder secrets may have that name, whoever makes it.
func SecretFile(name string) bool { return secretName.MatchString(name) }

// slotPIN says whether a file of the folder secrets has by its name a PIN of a slot of the first cipher machine.
func slotPIN(name string) bool {
	return slices.ContainsFunc(hsm.Classes, func(c hsm.SlotClass) bool { return name == string(c)+".pin" || name == string(c)+".so-pin" })
}

// keptKeys are the keys of config.toml that an appliance keeps, and why: a key by itself, or a table with all in it.
var keptKeys = []struct{ key, why string }{
	{"node", "写入全部日志与证据 (it stands in all evidence)"},
	{"campus", "写入全部日志与证据 (it stands in all evidence)"},
	{"hsm.pin_source", "口令的去处由 yinjian unlock enrol、seal 决定，改错了没有人能解锁 (who holds the PINs is decided by yinjian unlock)"},
	{"hsm.tpm", "改错了设备停在 locked，远处无人能解锁 (a wrong one leaves it locked)"},
	{"update", "由映像设定 (the image sets it)"},
	{"packs", "由映像设定 (the image sets it)"},
	{"evaluation", "评估用的部件里有设备的密钥；换掉它就是另一台设备 (the appliance's keys are in what it turns on)"},
}

// reachKeys are the tables of config.toml by which administrators reach the appliance or log in: an appliance can be operational with
// a change of them, and out of everybody's reach.
var reachKeys = []string{"listen", "admin", "hsm"}

func inTable(key, table string) bool {
	return key == table || strings.HasPrefix(key, table+".") || strings.HasPrefix(key, table+"[")
}

// A settingsPlan is a change of config.toml and of files of the folder secrets as it would be made.
type settingsPlan struct {
	text    []byte               // config.toml
	changes []wire.SettingChange // without what could be a secret
	reach   bool                 // administrators may not reach the appliance afterwards
}

// maxChanged is how many keys are changed at a time: whoever approves looks at each.
const maxChanged = 60

// planSettings is what a change makes of the configuration in dir, whose text is now. Everything wrong with it is told, by the code
// that will read it.
func planSettings(dir string, now []byte, c *wire.Settings) (*settingsPlan, error) {
	old, err := ParseConfig(now, dir)
	if err != nil {
		return nil, fmt.Errorf("config.toml: %w", err) // it was read at the start
	}
	var all, with map[string]any
	if err := toml.Unmarshal(now, &all); err != nil {
		return nil, err
	}
	if err := toml.Unmarshal(c.Overlay, &with); err != nil {
		return nil, err
	}
	var errs []error
	if all, err = removed(all, c.Remove); err != nil {
		errs = append(errs, err)
	}
	if times, ok := with["time"].(map[string]any); ok && times["policy_note"] == nil {
		if was, ok := all["time"].(map[string]any); ok && strings.HasPrefix(fmt.Sprint(was["policy_note"]), "min_sources=") {
			delete(was, "policy_note") // init has made it of the sources
		}
	}
	Overlay(all, with)
	plan := new(settingsPlan)
	if plan.text, err = toml.Marshal(all); err != nil {
		return nil, err
	}
	secrets := map[string]string{}
	for _, s := range c.Secrets {
		if _, twice := secrets[s.Name]; twice {
			errs = append(errs, fmt.Errorf("secrets/%s：重复 (given twice)", s.Name))
		}
		secrets[s.Name] = string(s.Secret)
		errs = append(errs, secretFault(old, s))
	}
	cfg, err := ParseConfigWith(plan.text, dir, secrets)
	if err != nil {
		var list interface{ Unwrap() []error }
		if !errors.As(err, &list) {
			return nil, errors.Join(append(errs, err)...)
		}
		for _, err := range list.Unwrap() {
			errs = append(errs, errors.New(rowAndColumn.ReplaceAllString(err.Error(), ""))) // of a file that nobody has written
		}
		return nil, errors.Join(errs...)
	}
	changed, err := configChanges(old, cfg)
	if err != nil {
		return nil, err
	}
	for _, one := range changed {
		for _, k := range keptKeys {
			if inTable(one.Key, k.key) {
				errs = append(errs, fmt.Errorf("%s：不能这样更改：%s (is not changed this way)", one.Key, k.why))
			}
		}
		for _, k := range reachKeys {
			plan.reach = plan.reach || inTable(one.Key, k)
		}
	}
	if old.Admin.Local == LocalLogin && cfg.Admin.Local == localOpen {
		errs = append(errs, errors.New("admin.local：不能这样改回 open：此后一人即可管理 (open lets one person administer: not this way)"))
	}
	errs = append(errs, fileFaults(dir, old, cfg, secrets)...)
	plan.changes = changed
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		path := filepath.Join(dir, "secrets", name)
		was := "（没有 none）"
		if _, err := os.Lstat(path); err == nil {
			was = "（原有，不显示 was there）"
		}
		is := "（换新，不显示 replaced）"
		if publicPEM([]byte(secrets[name])) {
			is = fmt.Sprintf("sm3:%x", sm3.Sum([]byte(secrets[name])))
		}
		plan.changes = append(plan.changes, wire.SettingChange{Key: "secrets/" + name, Old: was, New: is})
		plan.reach = plan.reach || slotPIN(name) || namedBy(cfg, path)
	}
	switch {
	case len(plan.changes) == 0:
		errs = append(errs, errors.New("没有任何改变 (nothing would change)"))
	case len(plan.changes) > maxChanged:
		errs = append(errs, fmt.Errorf("一次至多改 %d 项，这里有 %d 项 (too many at a time)", maxChanged, len(plan.changes)))
	}
	return plan, errors.Join(errs...)
}

var rowAndColumn = regexp.MustCompile(`^\d+:\d+: `)

// secretFault is nil, or what is wrong with a file for the folder secrets.
func secretFault(old *Config, s wire.SecretFile) error {
	switch {
	case !SecretName(s.Name):
		return fmt.Errorf("secrets/%s：不能用这个文件名：须为小写字母、数字、点、连字符、下划线，且不是设备自己写的文件 (not this name)", s.Name)
	case old.Evaluation.Softtoken && slotPIN(s.Name):
		return fmt.Errorf("secrets/%s：软件密码机的口令不能只改文件 (the software cipher machine's PIN is not changed by its file)", s.Name)
	case old.HSM.locked() && slotPIN(s.Name):
		return fmt.Errorf("secrets/%s：口令由持有人封存，不写到盘上：yinjian unlock rekey (the holders seal it; it is on no disk)", s.Name)
	case len(bytes.TrimSpace(s.Secret)) == 0:
		return fmt.Errorf("secrets/%s：是空的 (is empty)", s.Name)
	case bytes.ContainsRune(s.Secret, 0):
		return fmt.Errorf("secrets/%s：不是文本 (is no text)", s.Name)
	}
	return nil
}

// namedBy says whether the cipher machines' or the listeners' part of a configuration names a file.
func namedBy(cfg *Config, path string) bool {
	part := Config{HSM: cfg.HSM, Listen: cfg.Listen, Admin: cfg.Admin}
	_, named := part.Files()[path]
	return named
}

// fileFaults are those of the files that the new configuration names and the old does not: they are there, or among the secrets, and
// no library is loaded from where administrators can write.
func fileFaults(dir string, old, cfg *Config, secrets map[string]string) (errs []error) {
	was, is := old.Files(), cfg.Files()
	for _, path := range slices.Sorted(maps.Keys(is)) {
		if _, known := was[path]; known || is[path] == "directory" {
			continue
		}
		inside, err := filepath.Rel(dir, path)
		local := err == nil && filepath.IsLocal(inside)
		if is[path] == "module" && local {
			errs = append(errs, fmt.Errorf("module：%s 在设备目录里；程序库只能来自映像、软件包或厂商包 (a library from the appliance's folder is not loaded)", path))
			continue
		}
		if _, given := secrets[strings.TrimPrefix(inside, "secrets"+string(filepath.Separator))]; given && local {
			continue
		}
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s 所指的 %s 不在，也不在 secrets 里 (names a file that is not there)", is[path], path))
		}
	}
	return errs
}

// removed is all without these keys, each with dots between its parts.
func removed(all map[string]any, keys []string) (map[string]any, error) {
	var errs []error
	for _, key := range keys {
		at := all
		parts := strings.Split(key, ".")
		for i, part := range parts {
			if i == len(parts)-1 {
				if _, there := at[part]; !there {
					errs = append(errs, fmt.Errorf("%s：config.toml 里没有这一项 (is not in config.toml)", key))
				}
				delete(at, part)
				break
			}
			next, ok := at[part].(map[string]any)
			if !ok {
				errs = append(errs, fmt.Errorf("%s：config.toml 里没有这一项 (is not in config.toml)", key))
				break
			}
			at = next
		}
	}
	return all, errors.Join(errs...)
}

// configChanges are the keys in which two configurations differ, as they are read, defaults included, without what could be a secret.
func configChanges(old, cfg *Config) ([]wire.SettingChange, error) {
	was, is := map[string]string{}, map[string]string{}           // to compare
	wasShown, isShown := map[string]string{}, map[string]string{} // to show
	for _, one := range []struct {
		c         *Config
		raw, show map[string]string
	}{{old, was, wasShown}, {cfg, is, isShown}} {
		b, err := toml.Marshal(one.c)
		if err != nil {
			return nil, err
		}
		var tree map[string]any
		if err := toml.Unmarshal(b, &tree); err != nil {
			return nil, err
		}
		flatten("", tree, one.raw)
		flatten("", shownValue("", tree), one.show)
	}
	keys := maps.Clone(was)
	maps.Copy(keys, is)
	var out []wire.SettingChange
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if was[key] == is[key] {
			continue
		}
		one := wire.SettingChange{Key: printable(key), Old: shownChange(wasShown, key), New: shownChange(isShown, key)}
		if one.Old == one.New {
			one.New += "（已改，不同之处不显示 changed; where is not shown）"
		}
		out = append(out, one)
	}
	return out, nil
}

// longestShown is how much of a value is shown.
const longestShown = 200

func shownChange(values map[string]string, key string) string {
	v, there := values[key]
	if !there {
		return "（没有 none）"
	}
	if v == "" {
		return "（空 empty）"
	}
	if strings.Contains(v, diag.Hidden) && !strings.Contains(v, "://") {
		v = "（不显示 not shown）" // its length would tell of it
	}
	if len(v) > longestShown {
		v = strings.ToValidUTF8(v[:longestShown], "") + "…"
	}
	return printable(v)
}

// flatten puts the values of a tree into out, by their keys: tables by dots, tables in a list by their place, lists of values as a whole.
func flatten(at string, v any, out map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for name, w := range v {
			flatten(strings.TrimPrefix(at+"."+name, "."), w, out)
		}
	case []any:
		tables := len(v) > 0
		for _, w := range v {
			_, table := w.(map[string]any)
			tables = tables && table
		}
		if !tables {
			b, err := json.Marshal(v)
			if err != nil {
				b = fmt.Append(nil, v)
			}
			out[at] = string(b)
			return
		}
		for i, w := range v {
			flatten(fmt.Sprintf("%s[%d]", at, i), w, out)
		}
	default:
		out[at] = fmt.Sprint(v)
	}
}
