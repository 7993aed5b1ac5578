package account

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/big"
	"sort"
	"strconv"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/problem"
)

// A CRL is the newest list of one CA.
type CRL struct {
	Number     int64
	DER        []byte
	ThisUpdate time.Time
	NextUpdate time.Time
	Parsed     *pki.CRL // for look-ups
}

// crlPayload is the payload of a CRL's outcome.
type crlPayload struct {
	Algorithm  string    `json:"algorithm"`
	Number     int64     `json:"number"`
	ThisUpdate time.Time `json:"this_update"`
	NextUpdate time.Time `json:"next_update"`
	DER        []byte    `json:"der"`
}

// revocation is the payload of a revocation's outcome.
type revocation struct {
	Serial    string    `json:"serial"`
	Reason    string    `json:"reason"`
	RevokedAt time.Time `json:"revoked_at"`
	By        string    `json:"by"`
}

const (
	statusGood    = "good"
	statusRevoked = "revoked"
)

// reasons are the revocation reasons that an administrator may give (RFC 5280 §5.3.1).
var reasons = map[string]pki.Reason{
	"unspecified": pki.Unspecified, "keyCompromise": pki.KeyCompromise, "affiliationChanged": pki.AffiliationChanged,
	"superseded": pki.Superseded, "cessationOfOperation": pki.CessationOfOperation, "privilegeWithdrawn": pki.PrivilegeWithdrawn,
}

// reasonName is the reason's name in RFC 5280 §5.3.1, or its number.
func reasonName(r pki.Reason) string {
	for name, code := range reasons {
		if code == r {
			return name
		}
	}
	switch r {
	case pki.CACompromise:
		return "cACompromise"
	case pki.CertificateHold:
		return "certificateHold"
	case pki.AACompromise:
		return "aACompromise"
	}
	return strconv.Itoa(int(r))
}

// Revoke revokes a staff certificate and publishes a new CRL. When the revocation is durable and the list fails, the
// error says so: signing with the certificate is refused from then on, the list is tried again by [Service.RefreshCRLs],
// and calling Revoke again is right.
func (s *Service) Revoke(ctx context.Context, actor, serial, reason string) (*CertificateStatus, error) {
	if _, ok := reasons[reason]; !ok {
		return nil, problem.Invalid("reason", "未知吊销原因 %q (unknown revocation reason)", reason)
	}
	unlock, err := s.beginChange(ctx, objectKey{objectCertificate, serial})
	if err != nil {
		return nil, err
	}
	defer unlock()
	c, ok := s.Certificate(serial)
	if !ok {
		return nil, problem.New(problem.NotFound, "没有这张证书 (no such certificate)", "核对序列号 (check the serial)")
	}
	if s.authorityOver(c) == nil {
		return nil, problem.New(problem.Forbidden, "证书由外部 CA 签发，本机不能吊销 (another CA issued it; it cannot be revoked here)", "请该 CA 吊销；可先停用签名人 (ask that CA; stop the signer meanwhile)")
	}
	if c.Profile != "staff" {
		return nil, problem.New(problem.Forbidden, "只能吊销签名人证书 (only signers' certificates can be revoked here)", "设备证书随密钥更换吊销 (the appliance's own are replaced by roll-over)")
	}
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, problem.New(problem.TimeUntrusted, "时间不可信，吊销时间无从确定 (time is not trusted)", "可先停用签名人；时间恢复后再吊销 (stop the signer now, revoke when time is trusted)")
	}
	if c.Status != statusRevoked {
		i, err := s.intend(ctx, audit.Draft{Kind: kindRevokeIntent, Actor: actor, Object: serial}, "revoke", "")
		if err != nil {
			return nil, err
		}
		r := revocation{Serial: serial, Reason: reason, RevokedAt: now.Time.UTC().Truncate(time.Second), By: actor}
		d := audit.Draft{Kind: kindRevoke, Actor: actor, Object: serial, Fields: []audit.Field{text("intent", i.id), text("reason", reason)}}
		if err := s.conclude(ctx, d, i.ref, &r, nil); err != nil {
			return nil, err
		}
	}
	if len(s.unlisted()) > 0 {
		if err := s.publishCRLs(ctx, actor); err != nil {
			return nil, fmt.Errorf("account: certificate %s is revoked, but no new CRL could be made: %w", serial, err)
		}
	}
	c, _ = s.Certificate(serial)
	return c, nil
}

// authorityOver answers which of our evaluation CAs issued the certificate, nil if none did. The other campus's may have
// the same name.
func (s *Service) authorityOver(c *CertificateStatus) *ca.Authority {
	for _, authority := range s.cfg.CAs {
		if len(c.Chain) > 0 && bytes.Equal(c.Chain[0], authority.Certificate().Raw) {
			return authority
		}
	}
	return nil
}

// unlisted are the revoked certificates that the newest CRL of their CA does not have: a stop came between revocation
// and list, or the list could not be made.
func (s *Service) unlisted() (out []*CertificateStatus) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, c := range s.certificates {
		if c.Status != statusRevoked {
			continue
		}
		for alg, authority := range s.cfg.CAs {
			if s.authorityOver(c) != authority {
				continue
			}
			if l := s.crls[alg]; l == nil || l.Parsed.Lookup(c.number) == nil {
				out = append(out, c)
			}
		}
	}
	return out
}

// PublishCRLs makes new CRLs now.
func (s *Service) PublishCRLs(ctx context.Context, actor string) error {
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return s.publishCRLs(ctx, actor)
}

// RefreshCRLs makes new CRLs when the present ones are past half their life or lack a revoked certificate, and reports
// whether it did. While time is not trusted it does nothing.
func (s *Service) RefreshCRLs(ctx context.Context) (bool, error) {
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return false, nil
	}
	due := false
	s.mu.RLock()
	for alg := range s.cfg.CAs {
		l := s.crls[alg]
		due = due || l == nil || now.Time.After(l.ThisUpdate.Add(s.cfg.CRLLife/2))
	}
	s.mu.RUnlock()
	if !due && len(s.unlisted()) == 0 {
		return false, nil
	}
	return true, s.PublishCRLs(ctx, "appliance")
}

// publishCRLs makes a list of each CA; one that fails does not keep the others from theirs. The caller holds s.changes.
func (s *Service) publishCRLs(ctx context.Context, actor string) error {
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return problem.New(problem.TimeUntrusted, "时间不可信，不能签发吊销列表 (time is not trusted; no CRL can be dated)", "待时间恢复可信后重试 (try again when time is trusted)")
	}
	algs := make([]string, 0, len(s.cfg.CAs))
	for a := range s.cfg.CAs {
		algs = append(algs, a)
	}
	sort.Strings(algs)
	var errs []error
	for _, alg := range algs {
		if len(s.doubts) > 0 { // the list before this one: its number may be taken
			errs = append(errs, errDoubt)
			break
		}
		if err := s.publishCRL(ctx, actor, alg, now.Time); err != nil {
			errs = append(errs, fmt.Errorf("account: CRL of the %s CA: %w", alg, err))
		}
	}
	return errors.Join(errs...)
}

var errDoubt = errors.New("account: the outcome of the change before is not known yet")

func (s *Service) publishCRL(ctx context.Context, actor, alg string, now time.Time) error {
	authority := s.cfg.CAs[alg]
	p := crlPayload{Algorithm: alg, Number: 1, ThisUpdate: now.UTC().Truncate(time.Second)}
	var revoked []ca.Revoked
	s.mu.RLock()
	for _, c := range s.certificates {
		if c.Status != statusRevoked || s.authorityOver(c) != authority {
			continue
		}
		revoked = append(revoked, ca.Revoked{Serial: c.number, At: c.RevokedAt, Reason: reasons[c.Reason]})
		if c.RevokedAt.After(p.ThisUpdate) { // a restart may have begun with an earlier time, within the bounds
			p.ThisUpdate = c.RevokedAt
		}
	}
	if l := s.crls[alg]; l != nil {
		p.Number = l.Number + 1
	}
	s.mu.RUnlock()
	p.NextUpdate = p.ThisUpdate.Add(s.cfg.CRLLife)
	sort.Slice(revoked, func(i, j int) bool { return revoked[i].Serial.Cmp(revoked[j].Serial) < 0 })
	der, err := authority.CRL(ctx, big.NewInt(p.Number), p.ThisUpdate, p.NextUpdate, revoked)
	if err != nil {
		return hsmProblem(err)
	}
	if _, err := pki.ParseCRL(der); err != nil { // what is written must be readable at the next start
		return err
	}
	p.DER = der
	ref, err := newRef()
	if err != nil {
		return err
	}
	sum := sm3.Sum(der)
	return s.conclude(ctx, audit.Draft{Kind: kindCRL, Actor: actor, Object: alg, Fields: []audit.Field{
		text("number", strconv.FormatInt(p.Number, 10)), octets("sm3", sum[:]),
	}}, ref, &p, nil)
}
