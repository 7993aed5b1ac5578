// Package dm opens the central database on DM8 (达梦). DM's Go driver is proprietary and is neither part of this
// program nor shipped with it: a build in dbdriver/dm/build links it and hands over what is needed of it with [Link].
// Everything else is here and is tested against a driver of our own that behaves as DM8's was read to
// (dbdriver/dbtest). On DM8 itself it was never run: there is no report of a site yet.
package dm

import (
	"context"
	"database/sql"
	"fmt"
	"net"
	"sync"
	"time"

	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
)

// A Driver is what a build with DM's driver hands over.
type Driver struct {
	Name string // with which it registers itself in database/sql
	// Code answers the code of the driver's errors; false for other errors.
	Code func(error) (int32, bool)
	// RegisterDial gives the driver a way of connecting, which a DSN names by dialName.
	RegisterDial func(name string, dial DialFunc)
}

// A DialFunc connects to host:port.
type DialFunc = func(ctx context.Context, addr string) (net.Conn, error)

var (
	mu     sync.Mutex // guards what follows
	linked *Driver
	dials  int
)

// Link is called once, by the build that has the driver, before main.
func Link(d Driver) {
	mu.Lock()
	defer mu.Unlock()
	if linked != nil || d.Name == "" || d.Code == nil || d.RegisterDial == nil {
		panic("dm: Link: twice, or incomplete")
	}
	linked = &d
}

// Linked says whether this program has the driver.
func Linked() bool {
	mu.Lock()
	defer mu.Unlock()
	return linked != nil
}

const (
	maxOpen  = 8
	lifetime = 10 * time.Minute
	idleTime = 2 * time.Minute // below what firewalls between campuses allow
)

// DB opens a pool, which connects at its first use, and the seam for it. Without the driver that is dbdriver.ErrUnfit.
func DB(c *Config, password string) (*sql.DB, *central.Seam, error) {
	mu.Lock()
	d := linked
	dials++
	name := fmt.Sprintf("yinjian%d", dials)
	mu.Unlock()
	if d == nil {
		return nil, nil, fmt.Errorf("%w: 本程序未带 DM 驱动；带驱动的程序须在现场构建，见 docs/database.md (this program was built without DM's driver)", dbdriver.ErrUnfit)
	}
	dsn, err := c.driverDSN(password, name)
	if err != nil {
		return nil, nil, err
	}
	dial, err := c.dialer(silence)
	if err != nil {
		return nil, nil, err
	}
	d.RegisterDial(name, dial)
	db, err := sql.Open(d.Name, dsn)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %v", dbdriver.ErrUnfit, err)
	}
	db.SetMaxOpenConns(maxOpen)
	db.SetConnMaxLifetime(lifetime)
	db.SetConnMaxIdleTime(idleTime)
	seam := Seam(d.Code)
	ofServer := seam.Settings
	seam.Settings = func(ctx context.Context, db *sql.DB) ([]central.Setting, error) {
		s, err := ofServer(ctx, db)
		return append([]central.Setting{c.way()}, s...), err
	}
	return db, seam, nil
}
