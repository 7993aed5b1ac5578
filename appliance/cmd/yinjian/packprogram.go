package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"yinjian/appliance"
	"yinjian/appliance/pack"
	"yinjian/appliance/update"
	"yinjian/dbdriver/dm"
)

// inPack is the variable that says which pack's program this is.
const inPack = "YINJIAN_IN_PACK"

// becomePack has the site's program run in this one's stead where the central database is DM, whose driver this one has not, and a
// pack brings one of the same version. Where there is none it goes on: the database's state says what is missing. It does not
// return when it succeeds.
func becomePack(ctx context.Context, dir string) error {
	if dm.Linked() || os.Getenv(inPack) != "" {
		return nil
	}
	cfg, err := appliance.LoadConfig(dir)
	if err != nil || cfg.Packs.Socket == "" || !strings.HasPrefix(cfg.Database.DSN, "dm:") {
		return nil // what is wrong with a configuration is told by whoever runs it
	}
	s, err := (&update.PackClient{Socket: cfg.Packs.Socket}).State(ctx)
	if errors.Is(err, update.ErrNoAgent) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, p := range s.Packs {
		if p.Kind != pack.DM || p.Fault != "" || p.Product != appliance.Version {
			continue
		}
		program := filepath.Join(p.Folder, filepath.FromSlash(p.Program))
		env := append(os.Environ(), inPack+"="+p.Name)
		return fmt.Errorf("厂商包 %s 的程序不能执行 (its program cannot be run): %w", p.Name, unix.Exec(program, append([]string{program}, os.Args[1:]...), env))
	}
	return nil
}
