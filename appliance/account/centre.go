package account

import (
	"context"
	"time"
)

// A Decision says which change has an object's version: the row of the central database that it is decided by.
type Decision struct {
	Kind    string // of object: "application", "signer" …
	Object  string // its id
	Version int64  // from 1 on
	Node    string // who decided
	Epoch   string // 16 hexadecimal digits
	Intent  string // 64 hexadecimal digits, the reference of the outcome's entry
	Body    string // SM3 of the outcome's object, 64 hexadecimal digits
	At      time.Time
}

// A Centre decides which campus's change has an object's next version: a table, in which each version and each intent
// stand once. Nothing that it says changes the directory; it can only keep a change from being made. Errors mean that it
// did not answer.
type Centre interface {
	// Latest answers the highest version that was decided on, 0 when there is none.
	Latest(ctx context.Context, kind, object string) (int64, error)
	// Decide claims a version, and answers whether it is this intent's. Asked again it answers the same. After an error
	// it may be: Lookup tells.
	Decide(ctx context.Context, d Decision) (won bool, err error)
	// Lookup answers the decision of an intent, of which Node, Epoch, Intent, Body and At are given. When there is none,
	// there never will be one: Decide with that intent fails from then on.
	Lookup(ctx context.Context, intent Decision) (Decision, bool, error)
	// Decisions answers those on an object after a version, ascending, some hundreds at most.
	Decisions(ctx context.Context, kind, object string, after int64) ([]Decision, error)
}
