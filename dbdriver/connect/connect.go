// Package connect opens the central database that a configuration names, of whichever kind.
package connect

import (
	"context"
	"database/sql"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/dm"
	"yinjian/dbdriver/postgres"
	"yinjian/dbdriver/sqlite"
)

// A Place is where a database is.
type Place struct {
	// DSN is sqlite:FILE, dm://… (see dm.ParseDSN), or what PostgreSQL's libpq takes. It holds no password.
	DSN      string
	Password string
	// Now is the time for certificates; nil: the system's.
	Now func() time.Time
}

const sqlitePrefix = "sqlite:"

// File is the place of an embedded database.
func File(name string) Place { return Place{DSN: sqlitePrefix + name} }

// Check looks at a DSN without connecting.
func Check(dsn string) error {
	if file, ok := strings.CutPrefix(dsn, sqlitePrefix); ok {
		if !filepath.IsAbs(file) {
			return fmt.Errorf("%w: DSN: sqlite: 后须为绝对路径 (an absolute path is wanted)", dbdriver.ErrUnfit)
		}
		return nil
	}
	if strings.HasPrefix(dsn, "dm:") {
		_, err := dm.ParseDSN(dsn)
		return err
	}
	return postgres.Check(dsn)
}

// Open opens the store there.
func Open(ctx context.Context, p Place, by central.Author) (*central.Store, error) {
	if file, ok := strings.CutPrefix(p.DSN, sqlitePrefix); ok {
		return sqlite.OpenCentral(ctx, file, by)
	}
	db, seam, err := DB(p)
	if err != nil {
		return nil, err
	}
	s, err := central.Open(ctx, db, seam, by)
	if err != nil {
		db.Close()
		return nil, err
	}
	return s, nil
}

// Repair makes a database usable again whose tables are gone or whose file is damaged, at the price of its rows. An
// embedded one's damaged file is set aside, and the answer is its name; elsewhere what is gone of the schema is made.
func Repair(ctx context.Context, p Place, by central.Author) (setAside string, err error) {
	if file, ok := strings.CutPrefix(p.DSN, sqlitePrefix); ok {
		return sqlite.SetCentralAside(file, by.Micros)
	}
	db, seam, err := DB(p)
	if err != nil {
		return "", err
	}
	defer db.Close()
	return "", central.Repair(ctx, db, seam, by)
}

// DB opens a pool and the seam for it.
func DB(p Place) (*sql.DB, *central.Seam, error) {
	if file, ok := strings.CutPrefix(p.DSN, sqlitePrefix); ok {
		db, err := sqlite.CentralDB(file)
		return db, sqlite.Seam(), err
	}
	if strings.HasPrefix(p.DSN, "dm:") {
		c, err := dm.ParseDSN(p.DSN)
		if err != nil {
			return nil, nil, err
		}
		c.Now = p.Now
		return dm.DB(c, p.Password)
	}
	return postgres.DB(postgres.Config{DSN: p.DSN, Password: p.Password, Now: p.Now})
}
