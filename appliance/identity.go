package appliance

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/hsm"
)

// Labels of the appliance's own keys, by slot class. A key has one purpose and never leaves its slot.
var caLabels = map[string]string{string(hsm.SM2): "ca/sm2", string(hsm.RSA2048): "ca/rsa"}

const (
	logLabel   = "log/checkpoint"
	batchLabel = "mac/projection-batch"
	headLabel  = "mac/journal-head" // seals the journal's end, in its store and in the head file
)

const (
	kindIdentityIntent = "appliance.identity/intent"
	kindIdentity       = "appliance.identity/outcome"
	kindStarted        = "appliance.started"
	kindTimeState      = "time.state"
	kindToken          = "tsa.token.v1"
)

// An identity is what the appliance is born with: the payload of its first outcome.
type identity struct {
	Node    string            `json:"node"`
	Campus  string            `json:"campus"`
	BornAt  time.Time         `json:"born_at"`
	LogKey  []byte            `json:"log_key"` // SubjectPublicKeyInfo of the checkpoint key
	CAs     map[string][]byte `json:"cas"`     // by algorithm, DER
	Units   map[string][]byte `json:"units"`   // timestamp units by name, DER
	LogCert []byte            `json:"log_certificate"`
	TLSCert []byte            `json:"tls_certificate"`
}

// serials hands out numbers that no token or certificate of ours ever had: epoch ‖ sequence of this start's entry ‖
// counter. The entry is on disk before the first number leaves, so a restart can repeat none, and no number costs an
// fsync. It satisfies tsa.SerialStore.
type serials struct {
	prefix [14]byte
	next   chan uint64 // one element: the counter
}

func newSerials(epoch audit.Epoch, started uint64) *serials {
	s := &serials{next: make(chan uint64, 1)}
	copy(s.prefix[:8], epoch[:])
	s.prefix[0] = s.prefix[0]&0x3f | 0x40 // positive, and always 159 bits long
	for i := range 6 {
		s.prefix[8+i] = byte(started >> (8 * (5 - i)))
	}
	s.next <- 1
	return s
}

// Next never fails before 2^48 numbers of one start are used up.
func (s *serials) Next(ctx context.Context) (*big.Int, error) {
	select {
	case n := <-s.next:
		s.next <- n + 1
		if n >= 1<<48 {
			return nil, errors.New("appliance: serial numbers of this start are used up; restart")
		}
		var b [20]byte
		copy(b[:], s.prefix[:])
		for i := range 6 {
			b[14+i] = byte(n >> (8 * (5 - i)))
		}
		return new(big.Int).SetBytes(b[:]), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// ensureKey finds the key or, where missing is allowed, makes it. The answer says whether it was made.
func ensureKey(ctx context.Context, t hsm.Token, label string, alg hsm.Algorithm, mayMake bool) (hsm.KeyInfo, bool, error) {
	info, err := t.FindKey(ctx, label)
	if err == nil {
		if info.Algorithm != alg {
			return info, false, fmt.Errorf("key %q is %s, want %s", label, info.Algorithm, alg)
		}
		if info.Extractable {
			return info, false, fmt.Errorf("key %q is extractable; the appliance does not use it", label)
		}
		return info, false, nil
	}
	if !errors.Is(err, hsm.ErrKeyNotFound) {
		return info, false, fmt.Errorf("key %q: %w", label, err)
	}
	if !mayMake {
		return info, false, fmt.Errorf("key %q is gone from the cipher machine (密钥丢失): restore it, or start a new appliance in an empty folder: %w", label, err)
	}
	info, err = t.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: alg})
	if err != nil {
		return info, false, fmt.Errorf("key %q: generating: %w", label, err)
	}
	return info, true, nil
}

// authorities builds the evaluation CAs. With certificates nil their certificates are made.
func (a *Appliance) authorities(ctx context.Context, certificates map[string][]byte, now time.Time) (map[string]*ca.Authority, error) {
	out := map[string]*ca.Authority{}
	for alg, label := range caLabels {
		info, _, err := ensureKey(ctx, a.tokens[hsm.CA], label, hsm.Algorithm(alg), certificates == nil)
		if err != nil {
			return nil, err
		}
		key, err := hsm.KeyOf(a.tokens[hsm.CA], info, *a.cfg.HSM.VerifyFresh)
		if err != nil {
			return nil, err
		}
		c := ca.Config{Signer: key, Serials: a.serials.Next}
		if certificates == nil {
			root, err := ca.New(c)
			if err != nil {
				return nil, err
			}
			name := pkix.Name{Country: []string{"CN"}, Organization: []string{a.cfg.Campus}, CommonName: alg + " " + a.cfg.Node}
			if c.Certificate, err = root.SelfSign(ctx, name, now.Add(-time.Minute), now.AddDate(10, 0, 0)); err != nil {
				return nil, err
			}
		} else if c.Certificate, err = pki.ParseCertificate(certificates[alg]); err != nil {
			return nil, fmt.Errorf("CA %s: %w", alg, err)
		}
		if out[alg], err = ca.New(c); err != nil {
			return nil, fmt.Errorf("CA %s: %w", alg, err)
		}
	}
	return out, nil
}

// birth makes keys and certificates of a new appliance and journals them: intent, then outcome. A stop in between is
// made good at the next start, which finds the keys by their labels.
func (a *Appliance) birth(ctx context.Context) (*identity, map[string]*ca.Authority, error) {
	now := a.clock.Now()
	if !now.Trusted() {
		return nil, nil, errors.New("time is not trusted")
	}
	if _, err := a.journal.Append(ctx, audit.Draft{Kind: kindIdentityIntent, Actor: "appliance", Object: a.cfg.Node, State: true}); err != nil {
		return nil, nil, err
	}
	id := &identity{Node: a.cfg.Node, Campus: a.cfg.Campus, BornAt: now.Time, CAs: map[string][]byte{}, Units: map[string][]byte{}}
	authorities, err := a.authorities(ctx, nil, now.Time)
	if err != nil {
		return nil, nil, err
	}
	for alg, c := range authorities {
		id.CAs[alg] = c.Certificate().Raw
	}
	issue := func(alg hsm.Algorithm, profile ca.Profile, name string, pub crypto.PublicKey, more func(*ca.Request)) ([]byte, error) {
		r := ca.Request{
			Profile: profile, PublicKey: pub, NotBefore: now.Time.Add(-30 * time.Second), NotAfter: now.Time.AddDate(5, 0, 0),
			Subject: pkix.Name{Country: []string{"CN"}, Organization: []string{a.cfg.Campus}, CommonName: name},
		}
		if more != nil {
			more(&r)
		}
		c, err := authorities[string(alg)].Issue(ctx, r)
		if err != nil {
			return nil, err
		}
		return c.Raw, nil
	}
	for _, u := range a.cfg.units() {
		info, _, err := ensureKey(ctx, a.tokens[hsm.TSA], u.label(), u.algorithm(), true)
		if err != nil {
			return nil, nil, err
		}
		if id.Units[u.Name], err = issue(issuerOf(u.algorithm()), ca.TSA, "时间戳单元 TSU "+u.Name+" "+a.cfg.Node, info.Public, nil); err != nil {
			return nil, nil, err
		}
	}
	if id.LogKey, err = smx509.MarshalPKIXPublicKey(a.logKey.Public()); err != nil {
		return nil, nil, err
	}
	if id.LogCert, err = issue(hsm.SM2, ca.Log, "日志检查点 log "+a.cfg.Node, a.logKey.Public(), nil); err != nil {
		return nil, nil, err
	}
	if err := a.loadTLSKeys(ctx); err != nil {
		return nil, nil, fmt.Errorf("TLS key: %w", err)
	}
	id.TLSCert, err = issue(hsm.RSA2048, ca.TLSServer, a.cfg.Node, a.listener.key().Public(), func(r *ca.Request) {
		r.NotAfter = now.Time.AddDate(2, 0, 0)
		r.DNSNames, r.IPs = a.cfg.Listen.reached(hostInterfaces)
	})
	if err != nil {
		return nil, nil, err
	}
	body, err := json.Marshal(id)
	if err != nil {
		return nil, nil, err
	}
	changed, err := audit.Changed(nil, id)
	if err != nil {
		return nil, nil, err
	}
	_, err = a.journal.Append(ctx, audit.Draft{
		Kind: kindIdentity, Actor: "appliance", Object: a.cfg.Node, State: true, Fields: changed,
		Payloads: []audit.Attachment{{Name: "object", MediaType: "application/json", Data: body}},
	})
	if err != nil {
		return nil, nil, err
	}
	return id, authorities, nil
}

// issuerOf is the algorithm of the evaluation CA for keys of alg.
func issuerOf(alg hsm.Algorithm) hsm.Algorithm {
	if alg == hsm.SM2 {
		return hsm.SM2
	}
	return hsm.RSA2048
}

// algorithmOf is the algorithm of a certificate's key.
func algorithmOf(c *smx509.Certificate) hsm.Algorithm {
	pub, isRSA := c.PublicKey.(*rsa.PublicKey)
	switch {
	case !isRSA:
		return hsm.SM2
	case pub.N.BitLen() > 2048:
		return hsm.RSA3072
	}
	return hsm.RSA2048
}

// chain is the unit's certificates from its birth, its own first; nil for a unit that is younger.
func (id *identity) chain(unit string) ([]*smx509.Certificate, error) {
	if id.Units[unit] == nil {
		return nil, nil
	}
	own, err := pki.ParseCertificate(id.Units[unit])
	if err != nil {
		return nil, fmt.Errorf("timestamp unit %s: %w", unit, err)
	}
	issuer, err := pki.ParseCertificate(id.CAs[string(issuerOf(algorithmOf(own)))])
	if err != nil {
		return nil, fmt.Errorf("timestamp unit %s: issuer: %w", unit, err)
	}
	return []*smx509.Certificate{own, issuer}, nil
}

func (id *identity) anchors() ([]*smx509.Certificate, error) {
	var out []*smx509.Certificate
	for _, alg := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048} {
		c, err := pki.ParseCertificate(id.CAs[string(alg)])
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// register makes the appliance's own keys and their first certificates known to the directory.
func (id *identity) register(s *account.Service, l *listenerIdentity) error {
	keys := []account.OwnKey{{
		Owner: account.UseLog, Label: logLabel, Algorithm: string(hsm.SM2), Class: hsm.Log, Certificate: id.LogCert, Chain: [][]byte{id.CAs[string(hsm.SM2)]},
	}}
	for unit := range id.Units {
		path, err := id.chain(unit)
		if err != nil {
			return err
		}
		keys = append(keys, account.OwnKey{
			Owner: "tsa:" + unit, Label: (&Unit{Name: unit}).label(), Algorithm: string(algorithmOf(path[0])), Class: hsm.TSA,
			Certificate: path[0].Raw, Chain: [][]byte{path[1].Raw},
		})
	}
	first := account.OwnKey{Owner: account.UseTLS, Algorithm: string(hsm.RSA2048), Certificate: id.TLSCert, Chain: [][]byte{id.CAs[string(hsm.RSA2048)]}}
	slot := account.OwnKey{Owner: account.UseTLS, Algorithm: string(hsm.RSA2048), Class: hsm.TLS, Label: tlsLabel}
	switch {
	case id.bornWith(l.file):
		first.Label, first.Signer = "file", l.file
		keys = append(keys, first)
		if l.slot != nil { // made later: it waits for a certificate
			slot.Public = l.slot.Public()
			keys = append(keys, slot)
		}
	default:
		first.Class, first.Label = slot.Class, slot.Label
		keys = append(keys, first)
	}
	for _, k := range keys {
		if err := s.AddKey(k); err != nil {
			return err
		}
	}
	return nil
}
