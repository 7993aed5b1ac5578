package appliance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Harden keeps what is in this process's memory (applications' keys, the TLS key, what somebody types) out of core files and of
// other processes' sight.
func Harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("core limit: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	return nil
}

// checkPermissions names every file and folder that others may read or write and should not, with the remedy.
func checkPermissions(dir string, cfg *Config) error {
	var errs []error
	closed := func(name string, mask os.FileMode, remedy string) {
		st, err := os.Stat(name)
		if errors.Is(err, os.ErrNotExist) {
			return // whoever needs it says so
		}
		if err != nil {
			errs = append(errs, err)
			return
		}
		if st.Mode().Perm()&mask != 0 {
			errs = append(errs, fmt.Errorf("%s: 权限 %#o 过宽，请 chmod %s (too open)", name, st.Mode().Perm(), remedy))
		}
	}
	closed(dir, 0o022, "700")
	closed(filepath.Join(dir, "config.toml"), 0o022, "600")
	for _, d := range []string{"secrets", "journal", "run", "softtoken", "credentials"} {
		closed(filepath.Join(dir, d), 0o077, "700")
	}
	for _, f := range []string{"secrets/tls.key", "secrets/softtoken.passphrase", "secrets/pins.locked", "secrets/pins.tpm", "secrets/administrators.json"} {
		closed(filepath.Join(dir, f), 0o077, "600")
	}
	closed(machinesPath(dir), 0o022, "600")
	if cfg.Database.PasswordFile != "" {
		closed(cfg.Database.PasswordFile, 0o077, "600")
	}
	for _, s := range cfg.HSM.Slots {
		closed(s.PINFile, 0o077, "600")
	}
	return errors.Join(errs...)
}
