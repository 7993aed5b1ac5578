package account

import (
	"context"
	"math/big"
	"sort"
	"sync"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/audit"
	"yinjian/appliance/internal/keylock"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/hsm"
	"yinjian/ntp"
)

// A Journal records what was done. *audit.Journal is one.
type Journal interface {
	// Append returns only after the entry is on disk.
	Append(ctx context.Context, d audit.Draft) (audit.Receipt, error)
	// ByRef answers the entries with this reference, ascending; none is [audit.ErrNotFound].
	ByRef(ctx context.Context, ref []byte) ([]audit.Record, error)
	// Epoch answers the present one.
	Epoch() audit.Epoch
}

// A Clock is the trusted clock.
type Clock interface{ Now() ntp.Reading }

// Config is what the directory works with.
type Config struct {
	Journal Journal
	Clock   Clock
	MAC     MAC
	Node    string // the appliance's name in its journal
	// Slots are where keys are made and certificate requests signed; hsm.Staff must be there.
	Slots map[hsm.SlotClass]hsm.Token
	// CAs issue the evaluation certificates, by algorithm ("SM2", "RSA-2048").
	CAs map[string]*ca.Authority
	Log logrus.FieldLogger
	// Custody, if set, makes new staff keys custody keys. Those there are go on as they are.
	Custody *CustodyPolicy
	// SoftRevocation lets a certificate be used whose revocation status is unknown; the evidence says so.
	SoftRevocation bool
	// CertificateLife is how long a signer's evaluation certificate is valid, at most as long as its CA's; CRLLife how
	// long a CRL is. A new CRL is made at half that time.
	CertificateLife, CRLLife time.Duration
	// PasswordLife is how long an administrator's password may be used, PasswordMin its least length in characters; 0 means
	// [MaxPasswordLife] and [MinPassword].
	PasswordLife time.Duration
	PasswordMin  int
	// Discarded, if set, is given an object whose outcome was not written, and why: the JSON may hold certificates, a CRL
	// or a request that were signed for it. It must not block.
	Discarded func(reason error, objects ...[]byte)
}

// A Service is the directory and its consents. Safe for concurrent use.
type Service struct {
	cfg      Config
	macs     *macs
	consents consents

	changes keylock.Locks // one key, "": one change at a time
	doubts  []*doubt      // guarded by changes: outcomes of which it is not known whether they were written

	// order is held while an entry is journalled and applied that concerns what the two campuses share: for reading by
	// changes here, for writing by the other campus's, so that memory takes them in the journal's order.
	order sync.RWMutex

	mu             sync.RWMutex
	applications   map[string]*Application       // guarded by mu; values are never changed in place
	appKeys        map[string][]byte             // guarded by mu: derived HMAC keys
	signers        map[string]*Signer            // guarded by mu; values are never changed in place
	signerOrder    []string                      // guarded by mu: their ids, ascending
	certificates   map[string]*CertificateStatus // guarded by mu, by serial; values are never changed in place
	crls           map[string]*CRL               // guarded by mu, by CA algorithm
	pinFailures    map[string]map[string]int     // guarded by mu: by signer, then application; since the last right PIN
	administrators map[string]*Administrator     // guarded by mu; values are never changed in place
	loginFailures  map[string]*failedLogin       // guarded by mu, by administrator: since the last login; values are never changed in place
	lastLogins     map[string]time.Time          // guarded by mu, by administrator: since this process began
	unheeded       unheededLogins
	openIntents    map[string]intent   // guarded by mu; intents without outcome
	underWay       map[string]bool     // guarded by mu; those whose change goes on without the lock, by id
	chains         map[string][][]byte // CA chain by algorithm; set by New

	anchors       map[string]*Anchor             // guarded by mu, by id; values are never changed in place
	intermediates map[string]*smx509.Certificate // guarded by mu, by SHA-256
	above         map[string]*smx509.Certificate // guarded by mu, by DER: CA certificates that paths of ours share
	held          map[string][]*heldKey          // guarded by mu, by owner; neither slices nor values are changed in place
	heldOrder     []string                       // guarded by mu: the owners, ascending
	doomed        map[string]*heldKey            // guarded by mu, by label: destroyed ones that the cipher machine may still have
	ownerOf       map[string]string              // guarded by mu, by SubjectPublicKeyInfo
	foreign       map[string]*foreignCRL         // guarded by mu, by listKey; values are never changed in place
	issued        map[string][]*pki.CRL          // guarded by mu, by RawIssuer: our CAs' lists and foreign ones

	tokenSealed map[string]map[string]*hsm.WrappedKey // guarded by mu, by signer, then label

	laterLists map[string]laterList // of the replay, by fieldList

	pairing      *Pairing                   // guarded by mu; nil: there is no other campus. The value is never changed in place
	heardOf      string                     // guarded by mu: whose copy heard is about
	heard        time.Time                  // guarded by mu: when the copy of its directory was whole
	objects      map[objectKey]*objectState // guarded by mu
	base         map[objectKey]int64        // guarded by mu: versions that the change under way begins from
	cursors      map[logKey]uint64          // guarded by mu: of the other campus's journal, the next entry
	foreignSeen  map[string]bool            // guarded by mu: references of its entries that were applied
	came         chan struct{}              // guarded by mu: closed and replaced when one of them was
	revokedEarly map[string]*revocation     // guarded by mu: of certificates that are not here, by serial

	// standings remembers good answers of [Service.Standing]; the four questions of each signature would cost more than it.
	standings struct {
		sync.RWMutex
		known map[standingKey]goodStanding // guarded by the lock; nil after each change of what the answers rest on
		round uint64                       // guarded by the lock: counts those changes
	}

	// clients are the paths of the client certificates that were shown.
	clients struct {
		sync.Mutex
		paths map[string][]*smx509.Certificate // guarded by the lock, by the leaf's fingerprint
	}

	logins *loginPlaces

	follows struct {
		sync.Mutex
		failed time.Time // guarded by the mutex: trusted time of the last failure of [Service.follow]
	}

	pinGates keylock.Locks // one PIN check at a time for a signer, so that parallel guesses gain nothing
}

// New makes an empty directory; feed it with [Service.Replay] before use.
func New(cfg Config) *Service {
	if cfg.CertificateLife == 0 {
		cfg.CertificateLife = 2 * 365 * 24 * time.Hour
	}
	if cfg.CRLLife == 0 {
		cfg.CRLLife = 7 * 24 * time.Hour
	}
	if cfg.PasswordLife == 0 {
		cfg.PasswordLife = MaxPasswordLife
	}
	if cfg.PasswordMin == 0 {
		cfg.PasswordMin = MinPassword
	}
	s := &Service{
		cfg: cfg, applications: map[string]*Application{}, appKeys: map[string][]byte{}, signers: map[string]*Signer{},
		certificates: map[string]*CertificateStatus{}, crls: map[string]*CRL{}, pinFailures: map[string]map[string]int{},
		openIntents: map[string]intent{}, underWay: map[string]bool{}, chains: map[string][][]byte{},
		anchors: map[string]*Anchor{}, intermediates: map[string]*smx509.Certificate{}, above: map[string]*smx509.Certificate{}, held: map[string][]*heldKey{},
		doomed: map[string]*heldKey{}, ownerOf: map[string]string{}, foreign: map[string]*foreignCRL{}, issued: map[string][]*pki.CRL{},
		laterLists: map[string]laterList{}, tokenSealed: map[string]map[string]*hsm.WrappedKey{},
		objects: map[objectKey]*objectState{}, base: map[objectKey]int64{}, cursors: map[logKey]uint64{}, foreignSeen: map[string]bool{},
		came: make(chan struct{}), revokedEarly: map[string]*revocation{},
		administrators: map[string]*Administrator{}, loginFailures: map[string]*failedLogin{}, lastLogins: map[string]time.Time{}, logins: newLoginPlaces(),
	}
	s.macs = newMACs(&s.cfg)
	s.consents.ended, s.consents.missed = s.forgetKeys, map[[32]byte]struct{}{}
	for alg, c := range cfg.CAs {
		s.chains[alg] = [][]byte{c.Certificate().Raw}
		s.addCertificate(c.Certificate().Raw, nil, "ca", "appliance")
		// The evaluation CA is an anchor from the appliance's birth on, like any other that can be withdrawn.
		a := &Anchor{
			ID: fingerprint(c.Certificate().Raw), Certificate: c.Certificate().Raw, Uses: Uses, Evaluation: true,
			Note: "评估 CA，设备诞生时生成 (evaluation CA, made at the appliance's birth)", ChangedBy: "appliance", ChangedAt: c.Certificate().NotBefore,
			cert: c.Certificate(),
		}
		s.anchors[a.ID] = a
	}
	return s
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
	status := &CertificateStatus{
		Serial: serial, Certificate: der, Chain: chain, Profile: profile, Owner: owner, Status: statusGood,
		issuer: string(c.RawIssuer), number: new(big.Int).Set(c.SerialNumber),
	}
	if r := s.revokedEarly[serial]; r != nil {
		status = status.revoked(r)
	}
	s.certificates[serial] = status
}

// revoked is the status after a revocation.
func (c *CertificateStatus) revoked(r *revocation) *CertificateStatus {
	bad := *c
	bad.Status, bad.RevokedAt, bad.Reason = statusRevoked, r.RevokedAt, r.Reason
	return &bad
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

// Certificate answers the status of a certificate by serial (hex, lower case). That of another CA's is what its newest list
// says.
func (s *Service) Certificate(serial string) (*CertificateStatus, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := s.certificates[serial]
	if c == nil || c.Status == statusRevoked {
		return c, c != nil
	}
	for _, l := range s.issued[c.issuer] {
		for _, r := range l.Lookup(c.number) {
			if r.Reason == pki.RemoveFromCRL || !c.judgedBy(l) {
				continue
			}
			bad := *c
			bad.Status, bad.RevokedAt, bad.Reason = statusRevoked, r.Date, reasonName(r.Reason)
			return &bad, true
		}
	}
	return c, true
}

// judgedBy says whether the list is by the certificate's issuer, and not by another CA of its name.
func (c *CertificateStatus) judgedBy(l *pki.CRL) bool {
	if len(c.Chain) == 0 {
		return true // a root of ours
	}
	issuer, err := pki.ParseCertificate(c.Chain[0])
	return err == nil && l.CheckIssuer(issuer) == nil
}

// CRL answers the newest CRL of the CA for an algorithm, nil when there is none yet.
func (s *Service) CRL(algorithm string) *CRL {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.crls[algorithm]
}

func text(name, v string) audit.Field { return audit.Field{Name: name, Value: audit.Text(v)} }
func octets(name string, v []byte) audit.Field {
	return audit.Field{Name: name, Value: audit.Octets(v)}
}
func boolean(name string, v bool) audit.Field { return audit.Field{Name: name, Value: audit.Bool(v)} }
