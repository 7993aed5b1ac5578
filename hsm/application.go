package hsm

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// A Caller is the application for which an operation is done, and its quota.
type Caller struct {
	Application string
	// Rate is how many operations a second it may ask for, Sessions how many may be under way at once; 0: no limit of
	// its own.
	Rate, Sessions int
}

type callerKey struct{}

// WithCaller says for whom the operations under ctx are done. Without one they are the appliance's own.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// CallerOf answers for whom an operation is done; the zero Caller is the appliance itself.
func CallerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// A QuotaError refuses an operation over its application's quota. Nothing was done.
type QuotaError struct {
	Application string
	After       time.Duration // sooner it would be refused again
}

func (e *QuotaError) Error() string {
	return fmt.Sprintf("hsm: application %s is over its quota of operations", e.Application)
}

// HealthPrefix begins the labels of keys that only prove that a machine signs. No certificate names them, nobody hands
// out what they sign, and their uses are counted as such.
const HealthPrefix = "health/"

// WorkerPrefix begins the labels of keys that a worker keeps for itself. Each machine has its own, and no caller uses them.
const WorkerPrefix = "worker/"

// IsMachines says whether a key of this label is one machine's own, and no other's business.
func IsMachines(label string) bool { return IsHealth(label) || strings.HasPrefix(label, WorkerPrefix) }

// IsHealth says whether a key of this label is one of those.
func IsHealth(label string) bool { return strings.HasPrefix(label, HealthPrefix) }
