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
	// ErrDamaged means that the database's files are malformed.
	ErrDamaged = errors.New("database: damaged")
	// ErrInUse means that another process holds the database.
	ErrInUse = errors.New("database: in use by another process")
)
