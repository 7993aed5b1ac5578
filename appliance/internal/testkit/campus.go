package testkit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
)

// A Centre is the table of decisions in memory, with a hook. Safe for concurrent use.
type Centre struct {
	mu    sync.Mutex
	of    account.Centre                             // if set, has the table
	fault func(call string) (landed bool, err error) // guarded by mu
	rows  []account.Decision                         // guarded by mu, in the order of their making
	spent map[string]bool                            // guarded by mu, by intent
}

// Fault has f decide which calls ("latest", "decide", "lookup", "decisions") fail, and whether they are done all the same;
// nil: none.
func (c *Centre) Fault(f func(call string) (landed bool, err error)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = f
}

// ErrCentre is what a centre answers that is away.
var ErrCentre = errors.New("testkit: the centre is away")

// Away has every call fail.
func (c *Centre) Away() { c.Fault(func(string) (bool, error) { return false, ErrCentre }) }

// do asks the hook, and does f unless it says otherwise.
func (c *Centre) do(call string, f func()) error {
	c.mu.Lock()
	hook := c.fault
	c.mu.Unlock()
	var err error
	landed := true
	if hook != nil {
		if landed, err = hook(call); err == nil {
			landed = true
		}
	}
	if landed {
		c.mu.Lock()
		defer c.mu.Unlock()
		f()
	}
	return err
}

// Change changes the rows, as whoever administers the database may.
func (c *Centre) Change(f func(rows []account.Decision) []account.Decision) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rows = f(c.rows)
}

// CentreOf is a table of another's, with the hook.
func CentreOf(of account.Centre) *Centre { return &Centre{of: of} }

// Rows are the decisions.
func (c *Centre) Rows() []account.Decision {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of != nil {
		var out []account.Decision
		last, err := c.of.Versions(context.Background())
		for _, d := range last {
			rows, derr := c.of.Decisions(context.Background(), d.Kind, d.Object, 0)
			out, err = append(out, rows...), errors.Join(err, derr)
		}
		if err != nil {
			panic(err) // of a test
		}
		return out
	}
	return append([]account.Decision(nil), c.rows...)
}

// Table is the rows by kind, object and version, with times as a database keeps them.
func (c *Centre) Table() map[string]account.Decision {
	out := map[string]account.Decision{}
	for _, r := range c.Rows() {
		r.At = r.At.Truncate(time.Microsecond)
		out[fmt.Sprintf("%s %s %d", r.Kind, r.Object, r.Version)] = r
	}
	return out
}

// Latest implements account.Centre.
func (c *Centre) Latest(ctx context.Context, kind, object string) (n int64, err error) {
	var inner error
	err = c.do("latest", func() {
		if c.of != nil {
			n, inner = c.of.Latest(ctx, kind, object)
			return
		}
		for _, r := range c.rows {
			if r.Kind == kind && r.Object == object {
				n = max(n, r.Version)
			}
		}
	})
	return n, errors.Join(err, inner)
}

// Decide implements account.Centre.
func (c *Centre) Decide(ctx context.Context, d account.Decision) (won bool, err error) {
	conflict := error(nil)
	err = c.do("decide", func() {
		if c.of != nil {
			won, conflict = c.of.Decide(ctx, d)
			return
		}
		for _, r := range c.rows {
			switch {
			case r.Intent == d.Intent && r.Kind == d.Kind && r.Object == d.Object && r.Version == d.Version:
				won = true
				return
			case r.Intent == d.Intent:
				conflict = errors.New("testkit: the intent has another decision")
				return
			case r.Kind == d.Kind && r.Object == d.Object && r.Version == d.Version:
				return
			}
		}
		if c.spent[d.Intent] {
			conflict = errors.New("testkit: the intent is spent")
			return
		}
		c.rows = append(c.rows, d)
		won = true
	})
	if err == nil {
		err = conflict
	}
	return won && err == nil, err
}

// Lookup implements account.Centre.
func (c *Centre) Lookup(ctx context.Context, intent account.Decision) (d account.Decision, found bool, err error) {
	var inner error
	err = c.do("lookup", func() {
		if c.of != nil {
			d, found, inner = c.of.Lookup(ctx, intent)
			return
		}
		for _, r := range c.rows {
			if r.Intent == intent.Intent {
				d, found = r, true
				return
			}
		}
		if c.spent == nil {
			c.spent = map[string]bool{}
		}
		c.spent[intent.Intent] = true
	})
	err = errors.Join(err, inner)
	return d, found && err == nil, err
}

// Versions implements account.Centre.
func (c *Centre) Versions(ctx context.Context) (out []account.Decision, err error) {
	var inner error
	err = c.do("versions", func() {
		if c.of != nil {
			out, inner = c.of.Versions(ctx)
			return
		}
		last := map[[2]string]int64{}
		for _, r := range c.rows {
			last[[2]string{r.Kind, r.Object}] = max(r.Version, last[[2]string{r.Kind, r.Object}])
		}
		for key, version := range last {
			out = append(out, account.Decision{Kind: key[0], Object: key[1], Version: version})
		}
	})
	return out, errors.Join(err, inner)
}

// Decisions implements account.Centre.
func (c *Centre) Decisions(ctx context.Context, kind, object string, after int64) (out []account.Decision, err error) {
	var inner error
	err = c.do("decisions", func() {
		if c.of != nil {
			out, inner = c.of.Decisions(ctx, kind, object, after)
			return
		}
		for _, r := range c.rows {
			if r.Kind == kind && r.Object == object && r.Version > after {
				out = append(out, r)
			}
		}
		slices.SortFunc(out, func(a, b account.Decision) int { return cmp.Compare(a.Version, b.Version) })
	})
	return out, errors.Join(err, inner)
}

// PairWith pairs the house with another, on this side. The copy may be a day old.
func (h *House) PairWith(other *House, centre account.Centre) {
	h.t.Helper()
	h.Pairing = &account.Pairing{Node: other.Node, Centre: centre, Since: h.Clock.Now().Time, MaxAge: 24 * time.Hour}
	for _, a := range other.CAs {
		h.Pairing.CAs = append(h.Pairing.CAs, a.Certificate().Raw)
	}
	h.must(h.Directory.Pair(h.Pairing))
}

// Take applies what the other house's directory has and this one's has not, each entry with its proof, and answers how many
// entries that were.
func (h *House) Take(other *House) (n int, err error) {
	h.t.Helper()
	ctx := context.Background()
	from := h.Directory.ForeignCursor(other.Node, other.Journal.Epoch())
	size := other.Journal.Size()
	if from >= size {
		return 0, nil
	}
	c, err := other.Journal.WaitCheckpoint(ctx, size-1)
	h.must(err)
	var all []audit.Record
	h.must(other.Journal.Changes(ctx, from, c.Size, func(r audit.Record) error { all = append(all, r); return nil }))
	for _, r := range all {
		if !account.Concerns(&r.Entry, h.Node, h.Journal.Epoch()) {
			continue
		}
		f, err := other.Journal.Foreign(ctx, r.Sequence, c)
		h.must(err)
		h.must(f.Verify(other.LogKey.Public()))
		if err := h.Directory.ApplyForeign(ctx, f); err != nil {
			return n, err
		}
		n++
	}
	h.Directory.PeerCurrent(h.Clock.Now().Time)
	return n, nil
}
