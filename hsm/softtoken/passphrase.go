package softtoken

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

const (
	minPassphrase = 8
	maxPassphrase = 4096
)

// readPassphrase reads the file that unseals the store. One line break at its end is not part of it. The file must
// be a regular one, belong to the daemon's user or root, and be closed to group and others.
func readPassphrase(path string) ([]byte, error) {
	if path == "" {
		return nil, errors.New("softtoken: no passphrase file is configured")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("softtoken: passphrase file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("softtoken: passphrase file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("softtoken: passphrase file %s is not a regular file", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("softtoken: passphrase file %s has mode %04o and can be read by others; chmod 0600 it and change the passphrase", path, info.Mode().Perm())
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 && int(owner) != os.Geteuid() {
		return nil, fmt.Errorf("softtoken: passphrase file %s belongs to uid %d, not to the daemon's user", path, owner)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPassphrase+1))
	if err != nil {
		return nil, fmt.Errorf("softtoken: passphrase file: %w", err)
	}
	if len(b) > maxPassphrase {
		clear(b)
		return nil, fmt.Errorf("softtoken: passphrase file %s is longer than %d bytes", path, maxPassphrase)
	}
	p := bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if len(p) < minPassphrase {
		clear(b)
		return nil, fmt.Errorf("softtoken: passphrase file %s holds fewer than %d bytes", path, minPassphrase)
	}
	return p, nil
}
