package account

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// MaxForeignCRL bounds a CRL from outside: it becomes a journal payload, and part of the evidence of every signature that
// rests on it.
const MaxForeignCRL = 8 << 20

// foreignCRL is the payload of a list's outcome: the list of a CA that is not ours.
type foreignCRL struct {
	Issuer     string    `json:"issuer"`
	IssuerID   string    `json:"issuer_id"` // SHA-256 of the issuer's certificate that verified it, hex
	Number     string    `json:"number"`    // hex, "" when the list has none
	ThisUpdate time.Time `json:"this_update"`
	NextUpdate time.Time `json:"next_update"`
	Source     string    `json:"source"` // where it came from: a file's name, a URL
	DER        []byte    `json:"der"`

	parsed *pki.CRL
}

func (l *foreignCRL) parse() (err error) {
	l.parsed, err = pki.ParseCRL(l.DER)
	return err
}

// listKey names what a newer list takes the place of: the lists by one key of one issuer with one scope. CAs of one name may
// have several keys, as for SM2 and RSA, and none of these lists says anything of the others' certificates. The caller
// holds s.mu.
func (s *Service) listKey(l *foreignCRL) string {
	key := string(l.parsed.RawIssuer()) + "\x00" + l.parsed.Scope() + "\x00"
	if a := s.anchors[l.IssuerID]; a != nil {
		return key + string(a.cert.RawSubjectPublicKeyInfo)
	}
	if c := s.intermediates[l.IssuerID]; c != nil {
		return key + string(c.RawSubjectPublicKeyInfo)
	}
	return key
}

// indexLists puts all lists, our CAs' and others', under their issuers' names. The caller holds s.mu.
func (s *Service) indexLists() {
	issued := map[string][]*pki.CRL{}
	add := func(l *pki.CRL) { issued[string(l.RawIssuer())] = append(issued[string(l.RawIssuer())], l) }
	for _, l := range s.crls {
		add(l.Parsed)
	}
	for _, l := range sorted(s.foreign) {
		add(l.parsed)
	}
	s.issued = issued
}

// allLists answers every list. The caller holds s.mu.
func (s *Service) allLists() (out []*pki.CRL) {
	for _, ls := range s.issued {
		out = append(out, ls...)
	}
	return out
}

// CRLs answers the newest list of every CA and partition.
func (s *Service) CRLs() []*pki.CRL {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.allLists()
}

// A CRLLine is one list, as an administrator sees it.
type CRLLine struct {
	Issuer     string    `json:"issuer"`
	Number     string    `json:"number,omitempty"` // hex
	ThisUpdate time.Time `json:"this_update"`
	NextUpdate time.Time `json:"next_update"`
	Revoked    int       `json:"revoked"`
	// State is current, stale (past nextUpdate, or without one) or future.
	State  string `json:"state"`
	Source string `json:"source,omitempty"`
	Own    bool   `json:"own,omitempty"` // our evaluation CA's
}

func (s *Service) crlLine(l *pki.CRL) CRLLine {
	now := s.cfg.Clock.Now()
	line := CRLLine{Issuer: l.Issuer(), Number: pki.SerialHex(l.Number()), ThisUpdate: l.ThisUpdate().UTC(), NextUpdate: l.NextUpdate().UTC(), Revoked: l.Len(), State: "current"}
	switch {
	case !now.Trusted():
		line.State = "unknown"
	case now.Time.Before(l.ThisUpdate()):
		line.State = "future"
	case l.NextUpdate().IsZero(), now.Time.After(l.NextUpdate()):
		line.State = "stale"
	}
	return line
}

// ListCRLs lists our own CAs' and all others' newest lists.
func (s *Service) ListCRLs() []CRLLine {
	s.mu.RLock()
	own := sorted(s.crls)
	foreign := sorted(s.foreign)
	s.mu.RUnlock()
	out := []CRLLine{}
	for _, l := range own {
		line := s.crlLine(l.Parsed)
		line.Own = true
		out = append(out, line)
	}
	for _, l := range foreign {
		line := s.crlLine(l.parsed)
		line.Source = l.Source
		out = append(out, line)
	}
	return out
}

// ImportCRL takes a list (as [pki.ParseCRLFile] reads it) of a CA that is an anchor or leads to one. The identical list is
// taken once; one with a lower number, or an earlier thisUpdate, than what is there is refused, and so is one from the
// future. source is for people: where it came from. The answer says whether it was new.
func (s *Service) ImportCRL(ctx context.Context, actor string, file []byte, source string) (*CRLLine, bool, error) {
	if len(file) > MaxForeignCRL {
		return nil, false, problem.New(problem.TooLarge, "吊销列表过大 (the CRL is too large)", "请 CA 按分发点分片 (ask the CA for partitioned lists)")
	}
	l, err := pki.ParseCRLFile(file)
	if err != nil {
		return nil, false, problem.New(problem.CRLMalformed, "无法读出吊销列表 (the file cannot be read as a CRL)", "须为 DER 或 PEM 的 X.509 v2 CRL (DER or PEM, version 2)").With(err)
	}
	if why := l.Limits(); why != "" {
		return nil, false, problem.New(problem.CRLMalformed, "不支持此类吊销列表 (kind of list not supported): "+why, "请使用 CA 的完整 CRL (use the CA's full CRL)")
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return nil, false, err
	}
	defer unlock()
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, false, untrustedTime("the list")
	}
	issuer, err := s.issuerOf(l)
	if err != nil {
		return nil, false, err
	}
	if l.ThisUpdate().After(now.Time.Add(now.Bound)) {
		return nil, false, problem.New(problem.CRLFuture, "吊销列表的签发时间在将来 (the list is from the future)", "核对 CA 的时间，稍后重试 (check the CA's clock, try again later)")
	}
	if l.NextUpdate().IsZero() {
		return nil, false, problem.New(problem.CRLMalformed, "吊销列表没有下次更新时间 (no nextUpdate)", "请 CA 签发带 nextUpdate 的列表 (RFC 5280 §5.1.2.5)")
	}
	f := &foreignCRL{
		Issuer: l.Issuer(), IssuerID: fingerprint(issuer.Raw), Number: pki.SerialHex(l.Number()), ThisUpdate: l.ThisUpdate().UTC(),
		NextUpdate: l.NextUpdate().UTC(), Source: source, DER: l.Raw(), parsed: l,
	}
	s.mu.RLock()
	key := s.listKey(f)
	had := s.foreign[key]
	s.mu.RUnlock()
	line := s.crlLine(l)
	line.Source = source
	if had != nil {
		if bytes.Equal(had.DER, f.DER) {
			return &line, false, nil
		}
		if older(l, had.parsed) {
			return nil, false, problem.New(problem.CRLOlder, "吊销列表不比已有的新 (the list is not newer than the one at hand)", "使用 CA 最新的列表 (use the CA's newest list)")
		}
	}
	ref, err := newRef()
	if err != nil {
		return nil, false, err
	}
	sum, list := sm3.Sum(f.DER), sm3.Sum([]byte(key))
	object := f.IssuerID
	err = s.conclude(ctx, audit.Draft{Kind: kindForeignCRL, Actor: actor, Object: object, Fields: []audit.Field{
		text("act", "import"), text("number", f.Number), octets("sm3", sum[:]), octets(fieldList, list[:]),
	}}, ref, f, nil)
	return &line, err == nil, err
}

// fieldList says in a list's entry which ones it takes the place of: SM3 of its listKey.
const fieldList = "list"

// A laterList is the entry of a list whose replay waits, since another of its kind may follow: years of them, of a megabyte
// each, would be read at each start.
type laterList struct {
	entry   *audit.Entry
	payload func(name string) ([]byte, error)
}

// replayLists replays the last list of each kind.
func (s *Service) replayLists(ctx context.Context) error {
	for key, l := range s.laterLists {
		body, err := l.payload("object")
		if err == nil && s.isForeign(l.entry) { // the other campus's cannot keep this appliance from starting
			err = s.applyForeign(ctx, l.entry, body)
		} else if err == nil {
			err = s.apply(ctx, l.entry, body, nil)
		}
		if err != nil {
			return fmt.Errorf("account: entry %d: %w", l.entry.Sequence, err)
		}
		delete(s.laterLists, key)
	}
	return nil
}

// older reports whether l may not take had's place: RFC 5280 §5.2.3 has numbers grow, and two lists with one number be the
// same.
func older(l, had *pki.CRL) bool {
	a, b := l.Number(), had.Number()
	if a == nil {
		a = new(big.Int)
	}
	if b == nil {
		b = new(big.Int)
	}
	if c := a.Cmp(b); c != 0 && (c < 0 || l.ThisUpdate().Before(had.ThisUpdate())) {
		return true
	} else if c == 0 {
		return l.Number() != nil || !l.ThisUpdate().After(had.ThisUpdate())
	}
	return false
}

// issuerOf answers the anchor or intermediate that signed the list and was entitled to.
func (s *Service) issuerOf(l *pki.CRL) (*smx509.Certificate, error) {
	s.mu.RLock()
	known := s.allAnchors()
	for _, c := range s.intermediates {
		known = append(known, c)
	}
	own := slices.ContainsFunc(sorted(s.crls), func(c *CRL) bool { return bytes.Equal(c.Parsed.RawIssuer(), l.RawIssuer()) })
	s.mu.RUnlock()
	if own {
		return nil, problem.New(problem.CRLUntrusted, "本机评估 CA 的列表由本机签发，不导入 (lists of the appliance's own CA are made here, never imported)", "用 yinjian crl publish (publish one instead)")
	}
	errs := []error{errors.New("no known CA of that name")}
	for _, c := range known {
		if !bytes.Equal(c.RawSubject, l.RawIssuer()) {
			continue
		}
		err := l.CheckIssuer(c)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, problem.New(problem.CRLUntrusted, "吊销列表不是已知 CA 所签，或该 CA 无权签发 ("+l.Issuer()+": not signed by a known CA that may)",
		"先导入该 CA 的证书：cert anchor add 或 cert chain add (import the CA's certificate first)").With(errors.Join(errs...))
}
