package appliance

import (
	"context"
	"errors"

	"yinjian/appliance/account"
	"yinjian/dbdriver/central"
)

// centre is the central database as the place of decisions, while it is open. It satisfies account.Centre.
type centre struct{ a *Appliance }

func (a *Appliance) centre() account.Centre { return centre{a} }

var errNoCentre = errors.New("appliance: the central database is not open")

func (c centre) store() (*central.Store, error) {
	p := c.a.projection
	if p == nil { // it is opened after the directory is replayed
		return nil, errNoCentre
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.central == nil {
		return nil, errors.Join(errNoCentre, p.err)
	}
	return p.central, nil
}

func (c centre) Latest(ctx context.Context, kind, object string) (int64, error) {
	s, err := c.store()
	if err != nil {
		return 0, err
	}
	return s.Latest(ctx, kind, object)
}

func (c centre) Decide(ctx context.Context, d account.Decision) (bool, error) {
	s, err := c.store()
	if err != nil {
		return false, err
	}
	return s.Decide(ctx, d)
}

func (c centre) Lookup(ctx context.Context, intent account.Decision) (account.Decision, bool, error) {
	s, err := c.store()
	if err != nil {
		return account.Decision{}, false, err
	}
	return s.Lookup(ctx, intent)
}

func (c centre) Decisions(ctx context.Context, kind, object string, after int64) ([]account.Decision, error) {
	s, err := c.store()
	if err != nil {
		return nil, err
	}
	return s.Decisions(ctx, kind, object, after)
}

func (c centre) Versions(ctx context.Context) ([]account.Decision, error) {
	s, err := c.store()
	if err != nil {
		return nil, err
	}
	return s.Versions(ctx)
}
