package pool

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"time"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/hsm"
	"yinjian/hsm/worker"
)

// A healthKey is what a machine proves with that it signs.
type healthKey struct {
	info hsm.KeyInfo
	op   hsm.Operation
	data []byte // of a MAC key: what it was asked first,
	mac  []byte // and what it answered
}

// healthLabel is the same on each machine; the keys are not.
const healthLabel = hsm.HealthPrefix + "probe"

// healthKinds are the keys that prove a machine of each class, the first that it can make.
func healthKinds(class hsm.SlotClass) []healthKey {
	kind := func(alg hsm.Algorithm, op hsm.Operation) healthKey {
		return healthKey{info: hsm.KeyInfo{Algorithm: alg}, op: op}
	}
	switch class {
	case hsm.Log:
		return []healthKey{kind(hsm.HMACSM3, hsm.MACSM3)} // not counted as a use
	case hsm.TLS:
		return []healthKey{kind(hsm.RSA2048, hsm.SignRSAPSSSHA256)}
	}
	return []healthKey{kind(hsm.SM2, hsm.SignSM2E), kind(hsm.RSA2048, hsm.SignRSASHA256)}
}

// learn reads a machine's keys, holds them against the others', and finds or makes its key for health. From then on it
// gets operations.
func (p *Pool) learn(ctx context.Context, m *member) error {
	p.admit.Lock()
	defer p.admit.Unlock()
	p.mu.Lock()
	known := m.known
	p.mu.Unlock()
	if known {
		return nil
	}
	// 1. What it holds.
	keys, err := m.Token.Keys(ctx)
	if err == nil {
		seen := map[string]hsm.KeyInfo{}
		for _, info := range keys {
			if _, twice := seen[info.Label]; twice {
				continue // nobody can use it: Do says that it is ambiguous
			}
			seen[info.Label] = info
		}
		// 2. A label means one key.
		err = p.compare(ctx, m, seen)
		// 3. Its own key for health.
		var health *healthKey
		if err == nil {
			health, err = p.ensureHealth(ctx, m, seen)
		}
		if err == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			m.health, m.refused, m.known, m.open, m.row = health, nil, true, false, 0
			m.closed = time.Now() // interval
			clear(m.lacks)
			for _, info := range seen {
				p.heldLocked(m, info)
			}
			p.judge(m)
			return nil
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var contradiction *Contradiction
	if errors.As(err, &contradiction) {
		m.refused = err
	}
	m.why = err.Error()
	p.judge(m)
	return err
}

// A Contradiction is a machine that holds another key under a label of the pool.
type Contradiction struct {
	Machine, Other, Label string
}

func (c *Contradiction) Error() string {
	return fmt.Sprintf("hsm/pool: machine %s holds another key under the label %q than machine %s", c.Machine, c.Label, c.Other)
}

// compare holds the keys of m, which is not in use, against those of the others.
func (p *Pool) compare(ctx context.Context, m *member, keys map[string]hsm.KeyInfo) error {
	for label, info := range keys {
		if hsm.IsMachines(label) {
			continue
		}
		p.mu.Lock()
		var other *member
		var known hsm.KeyInfo
		for _, o := range p.holders[label] {
			if o != m {
				other, known = o, o.keys[label]
				break
			}
		}
		p.mu.Unlock()
		if other == nil {
			continue
		}
		if err := p.same(ctx, m, info, other, known); err != nil {
			return err
		}
	}
	return nil
}

// same answers a Contradiction when two machines hold different keys under one label.
func (p *Pool) same(ctx context.Context, m *member, info hsm.KeyInfo, other *member, known hsm.KeyInfo) error {
	c := &Contradiction{m.Name, other.Name, info.Label}
	if !sameKey(info, known) {
		return c
	}
	if info.Public != nil || info.Algorithm == hsm.SM4 {
		return nil // a key that wraps makes no MAC; `yinjian ceremony verify` compares those
	}
	data := make([]byte, 32)
	rand.Read(data) // never fails (crypto/rand)
	data = append([]byte("yinjian/pool/compare/v1\x00"), data...)
	var macs [2][]byte
	for i, t := range []Token{m.Token, other.Token} {
		mac, err := t.Do(ctx, info.Label, hsm.MACSM3, data)
		if err != nil {
			return fmt.Errorf("comparing key %q: %w", info.Label, err)
		}
		macs[i] = mac
	}
	if !bytes.Equal(macs[0], macs[1]) {
		return c
	}
	return nil
}

// ensureHealth finds or makes the machine's key for health. A machine that can make none is asked for its description.
func (p *Pool) ensureHealth(ctx context.Context, m *member, keys map[string]hsm.KeyInfo) (*healthKey, error) {
	for _, k := range healthKinds(p.cfg.Class) {
		info, ok := keys[healthLabel]
		if !ok {
			var err error
			info, err = m.Token.GenerateKey(ctx, hsm.KeySpec{Label: healthLabel, Algorithm: k.info.Algorithm})
			switch {
			case err != nil && hsm.ClassifyError(err) == hsm.ClassPermanent:
				continue // not its kind
			case err != nil:
				return nil, fmt.Errorf("making its key for health: %w", err)
			}
			keys[healthLabel] = info
		}
		if k.info = info; healthFits(k) {
			if err := p.prove(ctx, m, &k); err != nil {
				return nil, err
			}
			return &k, nil
		}
	}
	return nil, nil
}

func healthFits(k healthKey) bool {
	switch k.info.Algorithm {
	case hsm.SM2:
		return k.op == hsm.SignSM2E
	case hsm.RSA2048:
		return k.op == hsm.SignRSASHA256 || k.op == hsm.SignRSAPSSSHA256
	}
	return k.op == hsm.MACSM3
}

// prove has the machine sign something new and verifies it.
func (p *Pool) prove(ctx context.Context, m *member, k *healthKey) error {
	if k == nil {
		_, err := m.Token.Info(ctx)
		return err
	}
	digest := k.data
	if digest == nil {
		digest = make([]byte, 32)
		rand.Read(digest) // never fails (crypto/rand)
	}
	answer, err := m.Token.Do(ctx, k.info.Label, k.op, digest)
	if err != nil {
		return err
	}
	good := false
	switch pub := k.info.Public.(type) {
	case *ecdsa.PublicKey:
		r, s, err := hsm.NormalizeSM2(answer)
		good = err == nil && sm2.Verify(pub, digest, r, s)
	case *rsa.PublicKey:
		if k.op == hsm.SignRSAPSSSHA256 {
			good = rsa.VerifyPSS(pub, crypto.SHA256, digest, answer, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		} else {
			good = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest, answer) == nil
		}
	default:
		if good = len(answer) == 32 && (k.mac == nil || bytes.Equal(k.mac, answer)); k.mac == nil {
			k.data, k.mac = digest, answer
		}
	}
	if !good {
		return fmt.Errorf("machine %s, key %s: %w", m.Name, k.info.Label, hsm.ErrBadSignature)
	}
	return nil
}

// look sees how a machine is. Where there are others it is asked for a signature while its breaker is open, and when
// nothing else has shown of late that it works.
func (p *Pool) look(ctx context.Context, m *member, several bool) {
	w := m.Token.State()
	if w.Sessions > 0 {
		m.queue.resize(int64(w.Sessions + w.Ahead))
	}
	p.mu.Lock()
	known, open, refused, health, well := m.known, m.open, m.refused != nil, m.health, m.well
	p.judge(m)
	p.mu.Unlock()
	if !several || refused || w.Phase != worker.Ready {
		return
	}
	if !known {
		if err := p.learn(ctx, m); err != nil && ctx.Err() == nil {
			p.log.WithError(err).WithField("machine", m.Name).Warning("a cipher machine cannot be taken in")
		}
		return
	}
	begun := time.Now() // interval
	if !open && well.After(begun.Add(-p.cfg.Interval)) {
		return
	}
	try, cancel := context.WithTimeoutCause(ctx, p.cfg.Probe, fmt.Errorf("%w (after %v)", hsm.ErrDeadline, p.cfg.Probe))
	defer cancel()
	err := p.prove(try, m, health)
	if ctx.Err() != nil {
		return
	}
	now := time.Now() // interval
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err == nil:
		m.well = now
		if m.latency == 0 || open {
			m.latency = now.Sub(begun)
		}
		m.latency += (now.Sub(begun) - m.latency) / smooth
		m.measured = now
		if m.open {
			m.open, m.row, m.closed = false, 0, now
		}
		p.judge(m)
	case m.well.After(begun): // it had too much to do for this one
	default:
		m.failed.Add(1)
		if m.open {
			m.why = err.Error()
			p.judge(m)
			return
		}
		p.trip(m, err)
	}
}
