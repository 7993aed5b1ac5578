package account

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/keylock"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/ntp"
)

// A Journal records what was done. Append returns only after the entry is on disk.
type Journal interface {
	Append(ctx context.Context, d audit.Draft) (audit.Receipt, error)
}

// A Clock is the trusted clock.
type Clock interface{ Now() ntp.Reading }

// Staff makes keys in the staff slot. hsm.Token satisfies it.
type Staff interface {
	GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.KeyInfo, error)
	Keys(ctx context.Context) ([]hsm.KeyInfo, error)
	DestroyKey(ctx context.Context, label string) error
}

// Config is what the directory works with.
type Config struct {
	Journal Journal
	Clock   Clock
	MAC     MAC
	Staff   Staff
	// CAs issue the evaluation certificates, by algorithm ("SM2", "RSA-2048").
	CAs map[string]*ca.Authority
	Log logrus.FieldLogger
	// CertificateLife is how long a signer's evaluation certificate is valid; CRLLife how long a CRL is. A new CRL
	// is made at half that time.
	CertificateLife, CRLLife time.Duration
}

// A Service is the directory and its consents. Safe for concurrent use.
type Service struct {
	cfg      Config
	consents consents

	change sync.Mutex // one change at a time: version = last + 1

	mu           sync.RWMutex
	applications map[string]*Application       // guarded by mu; values are never changed in place
	appKeys      map[string][]byte             // guarded by mu: derived HMAC keys
	signers      map[string]*Signer            // guarded by mu; values are never changed in place
	certificates map[string]*CertificateStatus // guarded by mu, by serial
	crls         map[string]*CRL               // guarded by mu, by CA algorithm
	pinFailures  map[string]int                // guarded by mu
	openIntents  map[string]intent             // guarded by mu; intents without outcome
	chains       map[string][][]byte           // guarded by mu: CA chain by algorithm

	pinGates keylock.Locks // one PIN check at a time for a signer, so that parallel guesses gain nothing
}

// A CRL is the newest list of one CA.
type CRL struct {
	Number     int64
	DER        []byte
	ThisUpdate time.Time
	NextUpdate time.Time
	Parsed     *pki.CRL // for look-ups
}

// Kinds of the directory's entries.
const (
	kindApplicationIntent = "account.application/intent"
	kindApplication       = "account.application/outcome"
	kindSignerIntent      = "account.signer/intent"
	kindSigner            = "account.signer/outcome"
	kindRevokeIntent      = "account.revocation/intent"
	kindRevoke            = "account.revocation/outcome"
	kindCRL               = "ca.crl/outcome"
	kindInterrupted       = "account.interrupted/outcome"
	kindPINFailed         = "consent.pin/failed"
	kindGrant             = "consent.authorization/granted"
)

type intent struct {
	kind, object, id string
	keyPrefix        string
}

// New makes an empty directory; feed it with [Service.Replay] before use.
func New(cfg Config) *Service {
	if cfg.CertificateLife == 0 {
		cfg.CertificateLife = 2 * 365 * 24 * time.Hour
	}
	if cfg.CRLLife == 0 {
		cfg.CRLLife = 7 * 24 * time.Hour
	}
	s := &Service{
		cfg: cfg, applications: map[string]*Application{}, appKeys: map[string][]byte{}, signers: map[string]*Signer{},
		certificates: map[string]*CertificateStatus{}, crls: map[string]*CRL{}, pinFailures: map[string]int{},
		openIntents: map[string]intent{}, chains: map[string][][]byte{},
	}
	for alg, c := range cfg.CAs {
		s.chains[alg] = [][]byte{c.Certificate().Raw}
		s.addCertificate(c.Certificate().Raw, nil, "ca", "appliance")
	}
	return s
}

// AddCertificate makes a certificate of the appliance itself (TSA, log, TLS) known to look-ups.
func (s *Service) AddCertificate(der []byte, chain [][]byte, profile, owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addCertificate(der, chain, profile, owner)
}

func (s *Service) addCertificate(der []byte, chain [][]byte, profile, owner string) {
	c, err := smx509.ParseCertificate(der)
	if err != nil {
		s.cfg.Log.WithError(err).WithField("object", owner).Error("directory holds a certificate that does not parse")
		return
	}
	serial := pki.SerialHex(c.SerialNumber)
	if old := s.certificates[serial]; old != nil {
		return // a revocation seen already stays
	}
	s.certificates[serial] = &CertificateStatus{Serial: serial, Certificate: der, Chain: chain, Profile: profile, Owner: owner, Status: "good"}
}

// revocation is the payload of a revocation's outcome.
type revocation struct {
	Serial    string    `json:"serial"`
	Reason    string    `json:"reason"`
	RevokedAt time.Time `json:"revoked_at"`
	By        string    `json:"by"`
}

type crlPayload struct {
	Algorithm  string    `json:"algorithm"`
	Number     int64     `json:"number"`
	ThisUpdate time.Time `json:"this_update"`
	NextUpdate time.Time `json:"next_update"`
	DER        []byte    `json:"der"`
}

// Replay applies one entry of the directory. The caller has checked that entry and payload belong to the journal. It
// is also what every change calls after its entry is durable, so that start-up runs the same code as daily work.
func (s *Service) Replay(ctx context.Context, e *audit.Entry, payload func(name string) ([]byte, error)) error {
	load := func(v any) error {
		b, err := payload("object")
		if err != nil {
			return err
		}
		return json.Unmarshal(b, v)
	}
	var app Application
	var appKey []byte
	if e.Kind == kindApplication { // the cipher machine is asked before the lock is taken
		if err := load(&app); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
		var err error
		if appKey, err = applicationKey(ctx, s.cfg.MAC, app.ID, app.KeySalt); err != nil {
			return fmt.Errorf("account: application %s: deriving its key: %w", app.ID, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if id := e.Text("intent"); id != "" {
		if isIntent(e.Kind) {
			s.openIntents[id] = intent{kind: e.Kind, object: e.Object, id: id, keyPrefix: e.Text("key_prefix")}
		} else {
			delete(s.openIntents, id)
		}
	}
	switch e.Kind {
	case kindApplication:
		if old := s.applications[app.ID]; (old == nil && app.Version != 1) || (old != nil && app.Version != old.Version+1) {
			return fmt.Errorf("account: entry %d: application %s has version %d out of order", e.Sequence, app.ID, app.Version)
		}
		s.applications[app.ID], s.appKeys[app.ID] = &app, appKey
	case kindSigner:
		var g Signer
		if err := load(&g); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
		old := s.signers[g.ID]
		if (old == nil && g.Version != 1) || (old != nil && g.Version != old.Version+1) {
			return fmt.Errorf("account: entry %d: signer %s has version %d out of order", e.Sequence, g.ID, g.Version)
		}
		s.signers[g.ID] = &g
		for _, k := range g.Keys {
			s.addCertificate(k.Certificate, s.chains[k.Algorithm], "staff", g.ID)
		}
		if set, _ := e.Field("pin_set").(audit.Bool); bool(set) {
			delete(s.pinFailures, g.ID)
		}
	case kindRevoke:
		var r revocation
		if err := load(&r); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
		c := s.certificates[r.Serial]
		if c == nil {
			return fmt.Errorf("account: entry %d revokes unknown certificate %s", e.Sequence, r.Serial)
		}
		revoked := *c
		revoked.Status, revoked.RevokedAt, revoked.Reason = "revoked", r.RevokedAt, r.Reason
		s.certificates[r.Serial] = &revoked
	case kindCRL:
		var p crlPayload
		if err := load(&p); err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
		parsed, err := pki.ParseCRL(p.DER)
		if err != nil {
			return fmt.Errorf("account: entry %d: %w", e.Sequence, err)
		}
		s.crls[p.Algorithm] = &CRL{Number: p.Number, DER: p.DER, ThisUpdate: p.ThisUpdate, NextUpdate: p.NextUpdate, Parsed: parsed}
	case kindPINFailed:
		s.pinFailures[e.Object]++
	case kindGrant:
		delete(s.pinFailures, e.Object)
	}
	return nil
}

func isIntent(kind string) bool {
	return kind == kindApplicationIntent || kind == kindSignerIntent || kind == kindRevokeIntent
}

// Settle closes intents that a stop left open: keys that an interrupted enrolment made are destroyed (nothing was
// ever signed with them: they have no certificate), and an outcome says so. Call it once, after the replay.
func (s *Service) Settle(ctx context.Context) error {
	s.mu.RLock()
	open := make([]intent, 0, len(s.openIntents))
	for _, i := range s.openIntents {
		open = append(open, i)
	}
	s.mu.RUnlock()
	sort.Slice(open, func(i, j int) bool { return open[i].id < open[j].id })
	for _, i := range open {
		var destroyed []string
		if i.keyPrefix != "" {
			keys, err := s.cfg.Staff.Keys(ctx)
			if err != nil {
				return fmt.Errorf("account: settling intent %s: %w", i.id, err)
			}
			seen := map[string]bool{}
			for _, k := range keys {
				if len(k.Label) > len(i.keyPrefix) && k.Label[:len(i.keyPrefix)] == i.keyPrefix && !seen[k.Label] {
					seen[k.Label] = true
					if err := s.cfg.Staff.DestroyKey(ctx, k.Label); err != nil && !errors.Is(err, hsm.ErrKeyNotFound) {
						return fmt.Errorf("account: settling intent %s: key %s: %w", i.id, k.Label, err)
					}
					destroyed = append(destroyed, k.Label)
				}
			}
		}
		d := audit.Draft{Kind: kindInterrupted, Actor: "appliance", Object: i.object, State: true, Fields: []audit.Field{
			text("intent", i.id), text("of", i.kind), text("destroyed_keys", fmt.Sprint(destroyed)),
		}}
		if err := s.record(ctx, d, nil); err != nil {
			return err
		}
		s.cfg.Log.WithFields(logrus.Fields{"object": i.object, "intent": i.id, "kind": i.kind}).Warning("an interrupted change was closed")
	}
	return nil
}

// record appends d with object as its payload and applies it. The entry is durable before the directory changes.
func (s *Service) record(ctx context.Context, d audit.Draft, object any) error {
	var body []byte
	if object != nil {
		b, err := json.Marshal(object)
		if err != nil {
			return err
		}
		body = b
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "object", MediaType: "application/json", Data: b})
	}
	r, err := s.cfg.Journal.Append(ctx, d)
	if err != nil {
		return err
	}
	return s.Replay(ctx, &r.Entry, func(string) ([]byte, error) { return body, nil })
}

var (
	reApp    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,31}$`)
	reSigner = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{1,31}$`)
)

func checkText(field, v string, max int) error {
	if v == "" || len(v) > max {
		return problem.Invalid(field, "长度须为 1–%d 字节 (1 to %d bytes)", max, max)
	}
	for _, r := range v {
		if r < 0x20 || r == 0x7f || r == 0xFFFD {
			return problem.Invalid(field, "含控制字符或非法 UTF-8 (control character or bad UTF-8)")
		}
	}
	return nil
}

// RegisterApplication adds an application and answers it with its HMAC key, which is shown this once: it can be
// derived again by the cipher machine alone.
func (s *Service) RegisterApplication(ctx context.Context, actor string, a Application) (*Application, []byte, error) {
	if !reApp.MatchString(a.ID) {
		return nil, nil, problem.Invalid("id", "应用标识须为 2–32 位小写字母、数字或连字符 (lower-case letters, digits and hyphens, 2 to 32)")
	}
	if err := errors.Join(checkText("name", a.Name, 128), checkText("campus", a.Campus, 64)); err != nil {
		return nil, nil, firstProblem(err)
	}
	for _, r := range a.Rights {
		switch r {
		case RightSign, RightVerify, RightTimestamp, RightEvidenceAny:
		default:
			return nil, nil, problem.Invalid("rights", "未知权限 %q (unknown right)", r)
		}
	}
	if a.Stamp == "" {
		a.Stamp = StampRequired
	}
	if a.Stamp != StampRequired && a.Stamp != StampNone {
		return nil, nil, problem.Invalid("stamp", "须为 required 或 none (must be required or none)")
	}
	for _, m := range a.Consent {
		if m != evidence.AppAsserted && m != evidence.SignerPIN {
			return nil, nil, problem.Invalid("consent", "未知同意方式 %q (unknown method of consent)", m)
		}
	}
	if a.Has(RightSign) && len(a.Consent) == 0 {
		return nil, nil, problem.Invalid("consent", "有签名权限的应用须指定同意方式 (an application that signs needs a method of consent)")
	}
	s.change.Lock()
	defer s.change.Unlock()
	if old, _, ok := s.Application(a.ID); ok && old != nil {
		return nil, nil, problem.New(problem.Exists, "应用已登记 (application is registered already)", "换一个标识 (choose another id)")
	}
	a.Version, a.Stopped, a.ChangedBy, a.ChangedAt = 1, false, actor, s.cfg.Clock.Now().Time
	a.KeySalt = make([]byte, 16)
	if _, err := rand.Read(a.KeySalt); err != nil {
		return nil, nil, err
	}
	id, err := s.intend(ctx, audit.Draft{Kind: kindApplicationIntent, Actor: actor, Object: a.ID}, "register", "")
	if err != nil {
		return nil, nil, err
	}
	d := audit.Draft{Kind: kindApplication, Actor: actor, Object: a.ID, State: true, Fields: []audit.Field{text("intent", id), text("act", "register")}}
	if err := s.record(ctx, d, &a); err != nil {
		return nil, nil, err
	}
	app, key, _ := s.Application(a.ID)
	return app, key, nil
}

// StopApplication stops or starts an application.
func (s *Service) StopApplication(ctx context.Context, actor, id string, stopped bool, reason string) (*Application, error) {
	s.change.Lock()
	defer s.change.Unlock()
	old, _, ok := s.Application(id)
	if !ok {
		return nil, problem.New(problem.NotFound, "没有这个应用 (no such application)", "核对标识 (check the id)")
	}
	a := *old
	a.Version, a.Stopped, a.ChangedBy, a.ChangedAt = old.Version+1, stopped, actor, s.cfg.Clock.Now().Time
	act := map[bool]string{true: "stop", false: "start"}[stopped]
	iid, err := s.intend(ctx, audit.Draft{Kind: kindApplicationIntent, Actor: actor, Object: id}, act, "")
	if err != nil {
		return nil, err
	}
	d := audit.Draft{Kind: kindApplication, Actor: actor, Object: id, State: true, Fields: []audit.Field{text("intent", iid), text("act", act), text("reason", reason)}}
	if err := s.record(ctx, d, &a); err != nil {
		return nil, err
	}
	return &a, nil
}

// intend journals that a change is about to be made and answers the intent's id.
func (s *Service) intend(ctx context.Context, d audit.Draft, act, keyPrefix string) (string, error) {
	id, err := newID()
	if err != nil {
		return "", err
	}
	d.State = true
	d.Fields = append(d.Fields, text("intent", id), text("act", act))
	if keyPrefix != "" {
		d.Fields = append(d.Fields, text("key_prefix", keyPrefix))
	}
	return id, s.record(ctx, d, nil)
}

// An Enrolment asks for a signer with one key pair and certificate for each algorithm.
type Enrolment struct {
	ID, Name, Department, Campus string
	Algorithms                   []string // default SM2 and RSA-2048
	PIN                          string   // may be empty: no PIN, only app-asserted consent
}

// Enrol adds a signer: keys are generated in the staff slot, certificates issued by the evaluation CAs. A crash in
// between leaves an intent that [Service.Settle] closes.
func (s *Service) Enrol(ctx context.Context, actor string, e Enrolment) (*Signer, error) {
	if !reSigner.MatchString(e.ID) {
		return nil, problem.Invalid("id", "工号须为 2–32 位字母、数字或连字符 (letters, digits and hyphens, 2 to 32)")
	}
	if err := errors.Join(checkText("name", e.Name, 64), checkText("department", e.Department, 64), checkText("campus", e.Campus, 64)); err != nil {
		return nil, firstProblem(err)
	}
	if len(e.Algorithms) == 0 {
		e.Algorithms = []string{string(hsm.SM2), string(hsm.RSA2048)}
	}
	seen := map[string]bool{}
	for _, a := range e.Algorithms {
		if s.cfg.CAs[a] == nil || seen[a] {
			return nil, problem.Invalid("algorithms", "不支持或重复的算法 %q (unsupported or repeated algorithm)", a)
		}
		seen[a] = true
	}
	s.change.Lock()
	defer s.change.Unlock()
	if _, ok := s.Signer(e.ID); ok {
		return nil, problem.New(problem.Exists, "签名人已登记 (signer is enrolled already)", "改用“重置 PIN”或“启停” (set the PIN, stop or start instead)")
	}
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, problem.New(problem.TimeUntrusted, "时间不可信，证书有效期无从确定 (time is not trusted; a certificate's validity cannot be fixed)", "待时间恢复可信后重试 (try again when time is trusted)")
	}
	g := Signer{Version: 1, ID: e.ID, Name: e.Name, Department: e.Department, Campus: e.Campus, ChangedBy: actor, ChangedAt: now.Time}
	if e.PIN != "" {
		v, err := newPINVerifier(ctx, s.cfg.MAC, e.ID, e.PIN)
		if err != nil {
			return nil, err
		}
		g.PIN = v
	}
	unique, err := newID()
	if err != nil {
		return nil, err
	}
	prefix := "staff/" + e.ID + "/" + unique[:8] + "/"
	iid, err := s.intend(ctx, audit.Draft{Kind: kindSignerIntent, Actor: actor, Object: e.ID}, "enrol", prefix)
	if err != nil {
		return nil, err
	}
	for _, a := range e.Algorithms {
		info, err := s.cfg.Staff.GenerateKey(ctx, hsm.KeySpec{Label: prefix + a, Algorithm: hsm.Algorithm(a)})
		if err != nil {
			return nil, fmt.Errorf("account: enrolling %s: %w", e.ID, err)
		}
		cert, err := s.issue(ctx, a, info.Public, &g, now.Time)
		if err != nil {
			return nil, fmt.Errorf("account: enrolling %s: %w", e.ID, err)
		}
		g.Keys = append(g.Keys, SignerKey{Label: info.Label, Algorithm: a, Certificate: cert})
	}
	d := audit.Draft{Kind: kindSigner, Actor: actor, Object: e.ID, State: true, Fields: []audit.Field{
		text("intent", iid), text("act", "enrol"), boolean("pin_set", g.PIN != nil),
	}}
	if err := s.record(ctx, d, &g); err != nil {
		return nil, err
	}
	return &g, nil
}

func (s *Service) issue(ctx context.Context, algorithm string, pub crypto.PublicKey, g *Signer, now time.Time) ([]byte, error) {
	c, err := s.cfg.CAs[algorithm].Issue(ctx, ca.Request{
		Profile:     ca.Staff,
		Subject:     pkix.Name{Country: []string{"CN"}, OrganizationalUnit: []string{g.Department}, CommonName: g.Name},
		StaffNumber: g.ID, PublicKey: pub,
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(s.cfg.CertificateLife),
	})
	if err != nil {
		return nil, err
	}
	return c.Raw, nil
}

// changeSigner journals intent and outcome of a change to an enrolled signer.
func (s *Service) changeSigner(ctx context.Context, actor, id, act, reason string, change func(*Signer) error) (*Signer, error) {
	s.change.Lock()
	defer s.change.Unlock()
	old, ok := s.Signer(id)
	if !ok {
		return nil, errSignerUnknown
	}
	g := *old
	g.Version, g.ChangedBy, g.ChangedAt = old.Version+1, actor, s.cfg.Clock.Now().Time
	if err := change(&g); err != nil {
		return nil, err
	}
	iid, err := s.intend(ctx, audit.Draft{Kind: kindSignerIntent, Actor: actor, Object: id}, act, "")
	if err != nil {
		return nil, err
	}
	d := audit.Draft{Kind: kindSigner, Actor: actor, Object: id, State: true, Fields: []audit.Field{
		text("intent", iid), text("act", act), text("reason", reason), boolean("pin_set", act == "set-pin"),
	}}
	if err := s.record(ctx, d, &g); err != nil {
		return nil, err
	}
	s.consents.drop(id)
	return &g, nil
}

// SetPIN gives the signer a new PIN, clears the count of failures and voids live authorisations.
func (s *Service) SetPIN(ctx context.Context, actor, id, pin string) (*Signer, error) {
	return s.changeSigner(ctx, actor, id, "set-pin", "", func(g *Signer) error {
		v, err := newPINVerifier(ctx, s.cfg.MAC, id, pin)
		g.PIN = v
		return err
	})
}

// StopSigner stops or starts a signer.
func (s *Service) StopSigner(ctx context.Context, actor, id string, stopped bool, reason string) (*Signer, error) {
	act := map[bool]string{true: "stop", false: "start"}[stopped]
	return s.changeSigner(ctx, actor, id, act, reason, func(g *Signer) error { g.Stopped = stopped; return nil })
}

// Revoke revokes a staff certificate and publishes a new CRL.
func (s *Service) Revoke(ctx context.Context, actor, serial, reason string) (*CertificateStatus, error) {
	if _, ok := reasons[reason]; !ok {
		return nil, problem.Invalid("reason", "未知吊销原因 %q (unknown revocation reason)", reason)
	}
	s.change.Lock()
	defer s.change.Unlock()
	c, ok := s.Certificate(serial)
	if !ok {
		return nil, problem.New(problem.NotFound, "没有这张证书 (no such certificate)", "核对序列号 (check the serial)")
	}
	if c.Profile != "staff" {
		return nil, problem.New(problem.Forbidden, "只能吊销签名人证书 (only signers' certificates can be revoked here)", "设备证书随密钥更换吊销 (the appliance's own are replaced by roll-over)")
	}
	if c.Status == "revoked" {
		return c, nil
	}
	now := s.cfg.Clock.Now()
	if !now.Trusted() {
		return nil, problem.New(problem.TimeUntrusted, "时间不可信，吊销时间无从确定 (time is not trusted)", "可先停用签名人；时间恢复后再吊销 (stop the signer now, revoke when time is trusted)")
	}
	iid, err := s.intend(ctx, audit.Draft{Kind: kindRevokeIntent, Actor: actor, Object: serial}, "revoke", "")
	if err != nil {
		return nil, err
	}
	r := revocation{Serial: serial, Reason: reason, RevokedAt: now.Time.Truncate(time.Second), By: actor}
	d := audit.Draft{Kind: kindRevoke, Actor: actor, Object: serial, State: true, Fields: []audit.Field{text("intent", iid), text("reason", reason)}}
	if err := s.record(ctx, d, &r); err != nil {
		return nil, err
	}
	if err := s.publishCRLs(ctx, actor); err != nil {
		return nil, fmt.Errorf("account: certificate %s is revoked, but no new CRL could be made: %w", serial, err)
	}
	c, _ = s.Certificate(serial)
	return c, nil
}

// PublishCRLs makes new CRLs now.
func (s *Service) PublishCRLs(ctx context.Context, actor string) error {
	s.change.Lock()
	defer s.change.Unlock()
	return s.publishCRLs(ctx, actor)
}

// RefreshCRLs makes new CRLs when the present ones are past half their life, and reports whether it did.
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
	if !due {
		return false, nil
	}
	return true, s.PublishCRLs(ctx, "appliance")
}

func (s *Service) publishCRLs(ctx context.Context, actor string) error {
	algs := make([]string, 0, len(s.cfg.CAs))
	for a := range s.cfg.CAs {
		algs = append(algs, a)
	}
	sort.Strings(algs)
	for _, alg := range algs {
		authority := s.cfg.CAs[alg]
		var revoked []ca.Revoked
		number := int64(1)
		s.mu.RLock()
		for _, c := range s.certificates {
			if c.Status != "revoked" {
				continue
			}
			x, err := smx509.ParseCertificate(c.Certificate)
			if err != nil || string(x.RawIssuer) != string(authority.Certificate().RawSubject) {
				continue
			}
			revoked = append(revoked, ca.Revoked{Serial: x.SerialNumber, At: c.RevokedAt, Reason: reasons[c.Reason]})
		}
		if l := s.crls[alg]; l != nil {
			number = l.Number + 1
		}
		s.mu.RUnlock()
		sort.Slice(revoked, func(i, j int) bool { return revoked[i].Serial.Cmp(revoked[j].Serial) < 0 })
		now := s.cfg.Clock.Now().Time.Truncate(time.Second)
		p := crlPayload{Algorithm: alg, Number: number, ThisUpdate: now, NextUpdate: now.Add(s.cfg.CRLLife)}
		der, err := authority.CRL(ctx, big.NewInt(number), p.ThisUpdate, p.NextUpdate, revoked)
		if err != nil {
			return fmt.Errorf("account: CRL of the %s CA: %w", alg, err)
		}
		p.DER = der
		sum := sm3.Sum(der)
		d := audit.Draft{Kind: kindCRL, Actor: actor, Object: alg, State: true, Fields: []audit.Field{
			text("number", strconv.FormatInt(number, 10)), octets("sm3", sum[:]),
		}}
		if err := s.record(ctx, d, &p); err != nil {
			return err
		}
	}
	return nil
}

// reasons are the revocation reasons that an administrator may give (RFC 5280 §5.3.1).
var reasons = map[string]pki.Reason{
	"unspecified": pki.Unspecified, "keyCompromise": pki.KeyCompromise, "affiliationChanged": pki.AffiliationChanged,
	"superseded": pki.Superseded, "cessationOfOperation": pki.CessationOfOperation, "privilegeWithdrawn": pki.PrivilegeWithdrawn,
}

var errSignerUnknown = problem.New(problem.SignerUnknown, "没有这个签名人 (no such signer)", "核对工号，或先登记 (check the staff number, or enrol first)")

// firstProblem picks the first refusal out of joined errors.
func firstProblem(err error) error {
	var p *problem.Problem
	if errors.As(err, &p) {
		return p
	}
	return err
}

// Application answers an application and its HMAC key (32 bytes; do not change).
func (s *Service) Application(id string) (*Application, []byte, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	a := s.applications[id]
	return a, s.appKeys[id], a != nil
}

// Applications lists all, ordered by id.
func (s *Service) Applications() []*Application {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sorted(s.applications)
}

// Signer answers a signer.
func (s *Service) Signer(id string) (*Signer, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	g := s.signers[id]
	return g, g != nil
}

// Signers lists all, ordered by id.
func (s *Service) Signers() []*Signer {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sorted(s.signers)
}

func sorted[T any](m map[string]T) []T {
	ids := make([]string, 0, len(m))
	for id := range m {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	out := make([]T, len(ids))
	for i, id := range ids {
		out[i] = m[id]
	}
	return out
}

// Certificate answers the status of a certificate by serial (hex, lower case).
func (s *Service) Certificate(serial string) (*CertificateStatus, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := s.certificates[serial]
	return c, c != nil
}

// CRL answers the newest CRL of the CA for an algorithm, nil when there is none yet.
func (s *Service) CRL(algorithm string) *CRL {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.crls[algorithm]
}

// Chain is the CA chain above a staff certificate of that algorithm, issuer first.
func (s *Service) Chain(algorithm string) [][]byte {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.chains[algorithm]
}

// Authorize checks the signer's PIN and grants an authorisation.
//
// One check at a time runs for a signer, and a failure is on disk before it is answered, so that neither parallel
// guesses nor a pulled plug give free tries. The token's own PIN is never involved: a wrong PIN here cannot lock it.
func (s *Service) Authorize(ctx context.Context, app *Application, q GrantRequest) (*Grant, error) {
	if app.Stopped || !app.Has(RightSign) {
		return nil, problem.New(problem.Forbidden, "该应用没有签名权限 (the application may not sign)", "请管理员授权 (ask an administrator)")
	}
	if !allows(app, evidence.SignerPIN) {
		return nil, errConsentInsufficient
	}
	oneTime := len(q.Digests) > 0
	switch {
	case oneTime && (q.Count != 0 || q.Seconds != 0):
		return nil, problem.Invalid("digests", "一次性授权与限次授权二选一 (give digests, or count and seconds, not both)")
	case oneTime && len(q.Digests) > 500:
		return nil, problem.Invalid("digests", "一次最多 500 项 (500 at most)")
	case !oneTime && (q.Count < 1 || q.Count > 500):
		return nil, problem.Invalid("count", "须为 1–500 (1 to 500)")
	case !oneTime && (q.Seconds < 1 || q.Seconds > 14400):
		return nil, problem.Invalid("seconds", "须为 1–14400 (1 to 14400)")
	}
	for _, d := range q.Digests {
		if len(d) != 32 {
			return nil, problem.Invalid("digests", "摘要须为 32 字节 (a digest has 32 bytes)")
		}
	}
	if err := checkPINForm(q.PIN); err != nil {
		return nil, err
	}
	unlock := s.pinGates.Lock(q.Signer)
	defer unlock()
	g, ok := s.Signer(q.Signer)
	if !ok {
		return nil, errSignerUnknown
	}
	if g.Stopped {
		return nil, errSignerStopped
	}
	if g.PIN == nil {
		return nil, problem.New(problem.ConsentInsufficient, "该签名人未设 PIN (the signer has no PIN)", "请管理员设置 PIN (ask an administrator to set one)")
	}
	s.mu.RLock()
	failures := s.pinFailures[q.Signer]
	s.mu.RUnlock()
	if failures >= MaxPINTries {
		return nil, errPINLocked
	}
	good, err := g.PIN.check(ctx, s.cfg.MAC, g.ID, q.PIN)
	if err != nil {
		return nil, err
	}
	now := s.cfg.Clock.Now()
	if !good {
		d := audit.Draft{Kind: kindPINFailed, Actor: "application/" + app.ID, Object: g.ID, State: true, Fields: []audit.Field{text("application", app.ID)}}
		if err := s.record(ctx, d, nil); err != nil {
			return nil, err
		}
		left := MaxPINTries - failures - 1
		if left <= 0 {
			return nil, errPINLocked
		}
		p := problem.New(problem.PINWrong, fmt.Sprintf("PIN 错误，还可尝试 %d 次 (wrong PIN, %d tries left)", left, left), "核对后重新输入，勿自动重试 (ask the signer again; never retry by program)")
		p.TriesLeft = left
		return nil, p
	}
	a := &evidence.Authorization{
		Version: 1, Method: evidence.SignerPIN, Level: 2, Subject: g.ID, Application: app.ID,
		GrantedAt: now.Time.Format(time.RFC3339Nano), Proof: "PIN verified with key " + PINKeyLabel + " inside the cipher machine",
	}
	notAfter := now.Time.Add(10 * time.Minute) // a one-time authorisation is for now, not for tomorrow
	if oneTime {
		dup := map[string]bool{}
		for _, d := range q.Digests {
			h := hex.EncodeToString(d)
			if dup[h] {
				return nil, problem.Invalid("digests", "摘要重复 (a digest is repeated)")
			}
			dup[h] = true
			a.Digests = append(a.Digests, h)
		}
	} else {
		a.Count = q.Count
		notAfter = now.Time.Add(time.Duration(q.Seconds) * time.Second)
	}
	a.NotAfter = notAfter.Format(time.RFC3339Nano)
	if a.ID, err = newID(); err != nil {
		return nil, err
	}
	if a.Nonce, err = newID(); err != nil {
		return nil, err
	}
	stored, err := a.Bytes()
	if err != nil {
		return nil, err
	}
	hash := evidence.HashAuthorization(stored)
	d := audit.Draft{
		Kind: kindGrant, Actor: "application/" + app.ID, Object: g.ID, State: failures > 0, // a success after failures resets the count: replayed
		Fields:   []audit.Field{text("application", app.ID), text("method", string(a.Method)), octets("authorization_sm3", hash[:])},
		Payloads: []audit.Attachment{{Name: "authorization", MediaType: "application/json", Data: stored}},
	}
	if err := s.record(ctx, d, nil); err != nil {
		return nil, err
	}
	s.consents.prune(now.Time)
	if err := s.consents.add(a, stored, notAfter); err != nil {
		return nil, err
	}
	remaining := a.Count
	if oneTime {
		remaining = len(a.Digests)
	}
	return &Grant{ID: a.ID, Method: a.Method, Signer: g.ID, Remaining: remaining, NotAfter: notAfter}, nil
}

var (
	errSignerStopped = problem.New(problem.SignerStopped, "签名人已停用 (the signer is stopped)", "请管理员启用 (ask an administrator)")
	errPINLocked     = problem.New(problem.PINLocked, "PIN 已锁定 (the PIN is locked)", "请管理员重置 PIN (ask an administrator to set a new PIN)")
)

// ActiveSigner answers the signer and the key for an algorithm, or why it cannot sign.
func (s *Service) ActiveSigner(id, algorithm string) (*Signer, *SignerKey, error) {
	g, ok := s.Signer(id)
	if !ok {
		return nil, nil, errSignerUnknown
	}
	if g.Stopped {
		return nil, nil, errSignerStopped
	}
	for i := range g.Keys {
		if g.Keys[i].Algorithm == algorithm {
			return g, &g.Keys[i], nil
		}
	}
	return nil, nil, problem.New(problem.KeyUnknown, "该签名人没有此算法的密钥 (the signer has no key of this algorithm)", "换算法，或请管理员补发 (use another algorithm, or ask an administrator)")
}

func text(name, v string) audit.Field { return audit.Field{Name: name, Value: audit.Text(v)} }
func octets(name string, v []byte) audit.Field {
	return audit.Field{Name: name, Value: audit.Octets(v)}
}
func boolean(name string, v bool) audit.Field { return audit.Field{Name: name, Value: audit.Bool(v)} }
