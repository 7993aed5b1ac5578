// Package dbdriver holds what the database adapters below it share: the conditions that callers act on, whichever
// database is behind. Each adapter turns its driver's errors into these; a driver's own type stops at its adapter.
package dbdriver

import "errors"

var (
	// ErrNotFound means that there is no such row.
	ErrNotFound = errors.New("database: not found")
	// ErrConflict means that the write contradicts what is stored (a unique key, a version).
	ErrConflict = errors.New("database: conflict")
	// ErrUnavailable means that the database cannot be reached or written just now; trying later is right.
	ErrUnavailable = errors.New("database: unavailable")
	// ErrFull means that the disk has no room. It is an ErrUnavailable too.
	ErrFull = errors.New("database: disk full")
	// ErrReadOnly means that the server is a standby, or reads only for another reason. It is an ErrUnavailable too.
	ErrReadOnly = errors.New("database: this server takes no writes")
	// ErrDeadlock means that the database ended a statement or a transaction for the sake of another. Whatever the
	// database keeps open after it, the transaction is over for us. It is an ErrUnavailable too.
	ErrDeadlock = errors.New("database: deadlock or lock timeout")
	// ErrUnfit means that the database's settings or tables are not such that this program may use it.
	ErrUnfit = errors.New("database: unfit for use")
	// ErrDamaged means that the database's files are malformed.
	ErrDamaged = errors.New("database: damaged")
	// ErrInUse means that another process holds the database.
	ErrInUse = errors.New("database: in use by another process")
)
