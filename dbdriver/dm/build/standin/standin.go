// Package dm has the names of DM's driver that dbdriver/dm/build uses, written from their description, and nothing
// behind them. It is our own text and connects to nothing.
package dm

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"net"
)

// DmError has the fields of the driver's.
type DmError struct {
	ErrCode int32
	ErrText string
}

func (e *DmError) Error() string { return e.ErrText }

// DialContextFunc connects to host:port.
type DialContextFunc func(ctx context.Context, addr string) (net.Conn, error)

// RegisterDialContext does nothing.
func RegisterDialContext(name string, dial DialContextFunc) {}

var errStandIn = errors.New("no DM driver in this build")

type standIn struct{}

// Open always fails.
func (standIn) Open(string) (driver.Conn, error) { return nil, errStandIn }

// StandIn marks the driver for what it is.
func (standIn) StandIn() string { return errStandIn.Error() }

func init() { sql.Register("dm", standIn{}) }
