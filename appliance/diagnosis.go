package appliance

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance/diag"
)

// A diagnosis is what a running process says of itself, for a bundle. Nothing in it is anybody's data.
type diagnosis struct {
	At         string            `json:"at"`
	Goroutines string            `json:"goroutines"` // stacks without arguments, alike ones together
	Count      int               `json:"goroutine_count"`
	HeapBytes  uint64            `json:"heap_bytes"`
	SysBytes   uint64            `json:"sys_bytes"`
	Collected  uint32            `json:"collections"`
	Status     map[string]string `json:"status"` // of /proc/self/status
	Files      int               `json:"open_files"`
	Build      string            `json:"build"` // modules and settings
	// Tables are the rows of the central database's tables; -1: not had in time.
	Tables map[string]int64 `json:"tables"`
	Error  string           `json:"tables_error,omitempty"`
}

// tablesWithin is how long rows may be counted.
const tablesWithin = 10 * time.Second

// Diagnosis satisfies api.Admin.
func (d admin) Diagnosis(ctx context.Context, _ string) (any, error) {
	out := diagnosis{At: apiClock{d.a}.Now().Time.UTC().Format(time.RFC3339), Count: runtime.NumGoroutine(), Status: map[string]string{}, Tables: map[string]int64{}}
	var stacks bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&stacks, 1); err != nil { // 1: no arguments, which may be anything
		return nil, err
	}
	out.Goroutines = stacks.String()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	out.HeapBytes, out.SysBytes, out.Collected = m.HeapAlloc, m.Sys, m.NumGC
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		if strings.HasPrefix(name, "Vm") || name == "Threads" || name == "State" {
			out.Status[name] = strings.TrimSpace(value)
		}
	}
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		out.Files = len(open)
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		out.Build = info.String()
	}
	p := d.a.projection
	p.mu.Lock()
	store, err := p.central, p.err
	p.mu.Unlock()
	if store == nil {
		out.Error = cmp.Or(shownError(err), "库未打开 (not open)")
		return out, nil
	}
	ctx, cancel := context.WithTimeout(ctx, tablesWithin)
	defer cancel()
	if out.Tables, err = store.CountRows(ctx); err != nil {
		out.Error = shownError(err)
	}
	return out, nil
}

// shownKeys are the keys of config.toml whose text a bundle shows. Every other text is hidden: a key that is new here is
// hidden until somebody has thought about it.
var shownKeys = map[string]bool{
	"node": true, "campus": true, "listen.api": true, "listen.tsa_plain": true, "listen.peer": true, "listen.names": true,
	"listen.tsa_sources.name": true, "listen.tsa_sources.addresses": true, "listen.tsa_sources.certificates": true,
	"hsm.module": true, "hsm.profile": true, "hsm.pin_source": true, "hsm.tpm.device": true, "hsm.slots.token_label": true, "hsm.slots.pin_file": true, "hsm.custody.kek": true, "hsm.custody.officers": true,
	"hsm.machines.name": true, "hsm.machines.module": true, "hsm.machines.profile": true, "hsm.machines.slots.token_label": true, "hsm.machines.slots.pin_file": true,
	"admin.local": true, "time.sources.name": true, "time.sources.group": true, "time.sources.address": true, "time.sources.key_type": true, "time.sources.key_file": true,
	"tsa.units.name": true, "tsa.units.algorithm": true, "tsa.units.policy": true, "tsa.units.profile": true,
	"tsa.upstream.name": true, "tsa.upstream.order": true, "tsa.upstream.units": true, "tsa.upstream.policies": true,
	"tsa.upstream.certificates": true, "tsa.upstream.password_file": true, "tsa.upstream.tls_roots": true,
	"trust.revocation": true, "database.password_file": true, "database.nodes": true,
	"preserve.unit": true, "preserve.digest": true, "preserve.algorithm_ends": true, "peer.address": true,
	"alarms.syslog.address": true, "alarms.syslog.roots": true, "alarms.syslog.server_name": true, "alarms.syslog.certificate": true, "alarms.syslog.key_file": true,
	"alarms.webhook.key_file": true, "alarms.webhook.roots": true, "log.directory": true, "log.level": true, "packs.socket": true, "evaluation.impersonate": true,
}

// shownHosts are the keys whose text is an address that may hold a secret: scheme and host are shown.
var shownHosts = map[string]bool{"tsa.upstream.url": true, "trust.crl.url": true, "database.dsn": true, "alarms.webhook.url": true}

// namedTables are those whose keys are names that an operator gave.
var namedTables = map[string]bool{"hsm.slots": true, "hsm.machines.slots": true, "preserve.algorithm_ends": true}

var durationText = regexp.MustCompile(`^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`)

// Shown is the configuration as a bundle may show it, in TOML: as the program has read it, so that no comment goes along,
// without the text of keys that could hold a secret.
func (c *Config) Shown() ([]byte, error) {
	b, err := toml.Marshal(c)
	if err != nil {
		return nil, err
	}
	var tree map[string]any
	if err := toml.Unmarshal(b, &tree); err != nil {
		return nil, err
	}
	return toml.Marshal(shownValue("", tree))
}

func shownValue(at string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for name, w := range v {
			key := strings.TrimPrefix(at+"."+name, ".")
			if namedTables[at] {
				key = at
			}
			out[name] = shownValue(key, w)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = shownValue(at, v[i])
		}
		return out
	case string:
		switch {
		case v == "", shownKeys[at], durationText.MatchString(v):
			return v
		case shownHosts[at]:
			if u, err := url.Parse(v); err == nil && u.Scheme != "" && u.Host != "" {
				return u.Scheme + "://" + u.Host + "/" + diag.Hidden
			}
		}
		return fmt.Sprintf("%s %d bytes", diag.Hidden, len(v))
	}
	return v
}

// Secrets are what the appliance in dir has in files that nobody else may read, by the name of the file: PINs, passwords,
// passphrases, private keys, keys of applications and of receivers. A file that cannot be read is an error: a bundle could
// not be searched for what is in it.
func Secrets(cfg *Config, dir string) (map[string][]byte, error) {
	names := map[string]bool{}
	add := func(list ...string) {
		for _, n := range list {
			if n != "" {
				names[n] = true
			}
		}
	}
	for _, pattern := range []string{"secrets/*", "settings/*/secrets/*", "settings/.*/secrets/*", "credentials/*", "run/*.session", "run/session*"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		add(found...)
	}
	for _, s := range cfg.HSM.Slots {
		add(s.PINFile)
	}
	for _, m := range cfg.HSM.Machines {
		for _, s := range m.Slots {
			add(s.PINFile)
		}
	}
	for _, s := range cfg.Time.Sources {
		add(s.KeyFile)
	}
	var added sourcesFile // while it ran
	if b, err := os.ReadFile(sourcesPath(dir)); err == nil {
		if err := decodeTOML(b, &added); err != nil {
			return nil, fmt.Errorf("timesources.toml: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, l := range added.Sources {
		if l.Source != nil {
			abs(dir, &l.Source.KeyFile)
			add(l.Source.KeyFile)
		}
	}
	add(cfg.Database.PasswordFile)
	if u := cfg.TSA.Upstream; u != nil {
		add(u.PasswordFile)
	}
	for _, s := range cfg.Alarms.Syslog {
		add(s.KeyFile)
	}
	for _, w := range cfg.Alarms.Webhook {
		add(w.KeyFile)
	}
	f, err := readMachines(dir) // those that were added while it ran
	if err != nil {
		return nil, err
	}
	for _, m := range f.Machines {
		if m.Machine == nil {
			continue
		}
		for _, s := range m.Machine.Slots {
			abs(dir, &s.PINFile)
			add(s.PINFile)
		}
	}
	out := map[string][]byte{}
	for name := range names {
		info, err := os.Stat(name)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue
		}
		if err != nil {
			return nil, err
		}
		if info.Size() > 1<<20 {
			return nil, fmt.Errorf("%s: 太大，不像口令 (too large for a secret)", name)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		if !publicPEM(b) {
			out[name] = b
		}
	}
	return out, nil
}

// publicPEM says whether a file holds certificates or public keys and nothing else.
func publicPEM(b []byte) bool {
	some := false
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			return some && len(bytes.TrimSpace(b)) == 0
		}
		if !slices.Contains([]string{"CERTIFICATE", "PUBLIC KEY", "X509 CRL"}, block.Type) {
			return false
		}
		some, b = true, rest
	}
}

// NewScanner knows the appliance's secrets, and of credentials the key by itself and in bytes.
func NewScanner(cfg *Config, dir string) (*diag.Scanner, error) {
	secrets, err := Secrets(cfg, dir)
	if err != nil {
		return nil, err
	}
	s := new(diag.Scanner)
	for name, b := range secrets {
		shown := name
		if rel, err := filepath.Rel(dir, name); err == nil && filepath.IsLocal(rel) {
			shown = rel
		}
		var credential struct {
			Key string `json:"key_hex"`
		}
		key, err := []byte(nil), json.Unmarshal(b, &credential)
		if err == nil {
			key, err = hex.DecodeString(credential.Key)
		}
		switch {
		case err == nil && len(key) > 0:
			s.Add(shown, key)
		case bytes.Contains(b, []byte("-----BEGIN")):
			for {
				block, rest := pem.Decode(b)
				if block == nil {
					break
				}
				if strings.Contains(block.Type, "PRIVATE KEY") {
					s.Add(shown, block.Bytes)
					s.Add(shown, pem.EncodeToMemory(block))
				}
				b = rest
			}
		default:
			s.Add(shown, b)
		}
	}
	return s, nil
}
