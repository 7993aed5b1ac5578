package account

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// An Administrator is somebody who administers the appliance. Nothing of the password is stored that it could be tried against
// without the cipher machine.
type Administrator struct {
	Version  int          `json:"version"`
	ID       string       `json:"id"` // [a-z0-9][a-z0-9.-]{1,31}, what one logs in by
	Name     string       `json:"name"`
	Role     Role         `json:"role"`
	Password *PINVerifier `json:"password"`
	// History are the verifiers of the passwords before, the newest first.
	History       []*PINVerifier `json:"history,omitempty"`
	PasswordSetAt time.Time      `json:"password_set_at"`
	// MustChange: somebody else knows the password, who set it.
	MustChange bool `json:"must_change,omitempty"`
	// Certificate, if set, is what a login has to be signed with beside the password (DER, SM2).
	Certificate []byte    `json:"certificate,omitempty"`
	Stopped     bool      `json:"stopped"`
	ChangedBy   string    `json:"changed_by"`
	ChangedAt   time.Time `json:"changed_at"`

	cert *smx509.Certificate
}

const (
	kindAdministratorIntent = "account.administrator/intent"
	kindAdministrator       = "account.administrator/outcome"
	kindLogin               = "administration.login/succeeded"
	kindLoginFailed         = "administration.login/failed"

	passwordHistory = 5
	maxPassword     = 128 // bytes
	// maxAdministratorName keeps two of them, with ids and roles, within an entry's actor.
	maxAdministratorName = 64
	// MinPassword is the least length of a password, in characters.
	MinPassword = 12
	// MaxPasswordLife is the longest that a password may be used.
	MaxPasswordLife = 90 * 24 * time.Hour
	// MaxLoginTries is how many failures in a row lock an administrator for LoginLock.
	MaxLoginTries = 5
	// LoginLock is how long.
	LoginLock = 15 * time.Minute

	// LoginPrefix stands before the challenge in what an administrator's key signs, so that it signs nothing else.
	LoginPrefix = "YINJIAN LOGIN\x00"

	fieldFailures = "failures"
)

// passwordIterations of PBKDF2-HMAC-SM3 (GM/T 0091-2020, RFC 8018 §5.2) take some 100 ms; the key in the cipher machine is what
// makes a stolen verifier useless. A variable for this package's tests alone, which have to be done some time.
var passwordIterations = 100_000

var reAdministrator = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,31}$`)

func administratorObject(id string) objectKey { return objectKey{objectAdministrator, id} }

func (a *Administrator) parse() (err error) {
	if !reAdministrator.MatchString(a.ID) || a.Password == nil || !slices.Contains(Roles, a.Role) {
		return errors.New("account: not an administrator")
	}
	if a.Certificate != nil {
		a.cert, err = pki.ParseCertificate(a.Certificate)
	}
	return err
}

// set is called under s.mu.
func (a *Administrator) set(s *Service, e *audit.Entry) error {
	old := s.administrators[a.ID]
	if !s.wasThawed(administratorObject(a.ID)) && ((old == nil && a.Version != 1) || (old != nil && a.Version != old.Version+1)) {
		return fmt.Errorf("account: entry %d: administrator %s has version %d out of order", e.Sequence, a.ID, a.Version)
	}
	s.administrators[a.ID] = a
	if set, _ := e.Field("password_set").(audit.Bool); bool(set) {
		delete(s.loginFailures, a.ID)
	}
	return nil
}

// ownedBy says of what another appliance's entry has derived with that appliance's own keys whose keys they are.
func (a *Administrator) ownedBy(node string) {
	foreign := func(v *PINVerifier) *PINVerifier {
		if v == nil || v.MACKey != nil {
			return v
		}
		w := *v
		w.MACKey = &MACKey{Node: node}
		return &w
	}
	a.Password, a.History = foreign(a.Password), slices.Clone(a.History)
	for i := range a.History {
		a.History[i] = foreign(a.History[i])
	}
}

// A failedLogin is how often an administrator's logins failed since the last that did not.
type failedLogin struct {
	n    int
	at   time.Time // of the entry
	seen time.Time // monotonic: when it was journalled, or replayed
}

// locked says whether nobody may log in. Without trusted time the lock counts from when this process knew of it.
func (f *failedLogin) locked(now time.Time, trusted bool) bool {
	if f == nil || f.n < MaxLoginTries || time.Since(f.seen) >= LoginLock { // interval
		return false
	}
	return !trusted || now.Sub(f.at) < LoginLock
}

// countFailedLogin is called under s.mu, with the entry that says so.
func (s *Service) countFailedLogin(e *audit.Entry) {
	if n, ok := e.Field(fieldFailures).(audit.Int); ok && n > 0 {
		s.loginFailures[e.Object] = &failedLogin{n: int(n), at: entryTime(e), seen: time.Now()} // interval
	}
}

// Administrator answers one.
func (s *Service) Administrator(id string) (*Administrator, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	a := s.administrators[id]
	return a, a != nil
}

// ActiveAdministrator answers one who may administer now: not one who is stopped, or of whom the two campuses do not say the
// same. mustChange: nothing but the password.
func (s *Service) ActiveAdministrator(id string) (a *Administrator, mustChange, ok bool) {
	s.mu.RLock()
	a = s.administrators[id]
	ok = a != nil && !a.Stopped && s.objects[administratorObject(id)].known().frozen == ""
	s.mu.RUnlock()
	return a, ok && s.MustChangePassword(a), ok
}

// Administrators lists all, ordered by id.
func (s *Service) Administrators() []*Administrator {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return sorted(s.administrators)
}

// PasswordEnds is when the administrator's password has to be changed; a time that has passed if at once.
func (s *Service) PasswordEnds(a *Administrator) time.Time {
	if a.MustChange {
		return a.PasswordSetAt
	}
	return a.PasswordSetAt.Add(s.cfg.PasswordLife)
}

// MustChangePassword says whether an administrator may do nothing but that. While time is not trusted no password ends.
func (s *Service) MustChangePassword(a *Administrator) bool {
	now := s.cfg.Clock.Now()
	return a.MustChange || now.Trusted() && !now.Time.Before(s.PasswordEnds(a))
}

// checkPassword refuses what is too easy to guess: at least three of lower case, upper case, digits and other characters.
func (s *Service) checkPassword(id, password string) error {
	if utf8.RuneCountInString(password) < s.cfg.PasswordMin || len(password) > maxPassword || !utf8.ValidString(password) || strings.ContainsFunc(password, unicode.IsControl) {
		return problem.Invalid("password", "口令须为至少 %d 个字符、至多 %d 字节，不含控制字符 (at least %d characters, at most %d bytes)", s.cfg.PasswordMin, maxPassword, s.cfg.PasswordMin, maxPassword)
	}
	var lower, upper, digit, other int
	for _, r := range password {
		switch {
		case 'a' <= r && r <= 'z':
			lower = 1
		case 'A' <= r && r <= 'Z':
			upper = 1
		case '0' <= r && r <= '9':
			digit = 1
		default:
			other = 1
		}
	}
	if lower+upper+digit+other < 3 {
		return problem.Invalid("password", "口令须含小写、大写字母、数字、其他字符中的三类 (three of lower case, upper case, digits, others)")
	}
	if len(id) >= 4 && strings.Contains(strings.ToLower(password), id) { // shorter ones stand in many words
		return problem.Invalid("password", "口令不得含登录名 (the password holds the name)")
	}
	return nil
}

func (s *Service) newPasswordVerifier(ctx context.Context, id, password string) (*PINVerifier, error) {
	v := &PINVerifier{Salt: make([]byte, 16), Iterations: passwordIterations}
	rand.Read(v.Salt) // never fails (crypto/rand)
	var err error
	if v.MACKey, err = s.macs.present(ctx, PINKeyLabel); err != nil {
		return nil, err
	}
	v.Tag, err = v.tagOf(ctx, s.macs, passwordDomain, id, password)
	return v, err
}

// A NewAdministrator is somebody who is to administer.
type NewAdministrator struct {
	ID          string         `json:"id"`
	Name        string         `json:"name"`
	Role        Role           `json:"role"`
	Password    string         `json:"-"`
	First       *FirstPassword `json:"first,omitempty"` // in the place of Password
	Certificate []byte         `json:"-"`               // PEM or DER; may be nil
}

// Check says what is wrong with who it is.
func (n *NewAdministrator) Check() error {
	if !reAdministrator.MatchString(n.ID) {
		return problem.Invalid("id", "登录名须为 2–32 位小写字母、数字、点或连字符 (lower-case letters, digits, dots and hyphens, 2 to 32)")
	}
	if err := problem.CheckText("name", n.Name, maxAdministratorName); err != nil {
		return err
	}
	if strings.ContainsAny(n.Name, "()（）,，") { // the journal writes them around names
		return problem.Invalid("name", "不得含括号与逗号 (no brackets and commas)")
	}
	if !slices.Contains(Roles, n.Role) {
		return problem.Invalid("role", "须为 %v 之一 (one of these)", Roles)
	}
	return nil
}

// loginCertificate reads the certificate of a login: SM2, with a key that nothing of ours has.
func (s *Service) loginCertificate(file []byte) (*smx509.Certificate, error) {
	certs, err := pki.ParseCertificatePEMs(file)
	if err != nil || len(certs) != 1 {
		one, derr := pki.ParseCertificate(file)
		if derr != nil {
			return nil, problem.New(problem.CertificateMalformed, "不是一张 PEM 或 DER 证书 (not one certificate)", "给出管理员本人的 SM2 证书 (give the administrator's own SM2 certificate)").With(errors.Join(err, derr))
		}
		certs = []*smx509.Certificate{one}
	}
	c := certs[0]
	pub, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || !sm2.IsSM2PublicKey(pub) {
		return nil, problem.New(problem.CertificatePurpose, "登录证书须为 SM2 (a login's certificate has an SM2 key)", "换一张 SM2 证书 (use an SM2 certificate)")
	}
	if c.IsCA && c.BasicConstraintsValid && c.KeyUsage&smx509.KeyUsageCertSign != 0 && c.KeyUsage&smx509.KeyUsageDigitalSignature == 0 {
		return nil, problem.New(problem.CertificatePurpose, "CA 证书不能用于登录 (a CA's certificate is not for logging in)", "换一张个人证书 (use a personal certificate)")
	}
	s.mu.RLock()
	owner := s.ownerOf[string(c.RawSubjectPublicKeyInfo)]
	s.mu.RUnlock()
	if owner != "" {
		return nil, problem.New(problem.CertificatePurpose, "该密钥已有别的用途 (the key has another purpose)", "登录须用专门的密钥 (a login has a key of its own)")
	}
	return c, nil
}

func (s *Service) newAdministrator(ctx context.Context, actor string, n NewAdministrator, must bool) (*Administrator, error) {
	if err := n.Check(); err != nil {
		return nil, err
	}
	if n.First == nil {
		if err := s.checkPassword(n.ID, n.Password); err != nil {
			return nil, err
		}
	}
	now := s.cfg.Clock.Now().Time
	a := &Administrator{Version: 1, ID: n.ID, Name: n.Name, Role: n.Role, PasswordSetAt: now, MustChange: must, ChangedBy: actor, ChangedAt: now}
	if n.Certificate != nil {
		c, err := s.loginCertificate(n.Certificate)
		if err != nil {
			return nil, err
		}
		a.Certificate = c.Raw
	}
	var err error
	if n.First != nil {
		a.MustChange = true
		a.Password, err = n.First.verifier(ctx, s.macs, n.ID)
	} else {
		a.Password, err = s.newPasswordVerifier(ctx, n.ID, n.Password)
	}
	return a, err
}

var errAdministratorUnknown = problem.New(problem.NotFound, "没有这个管理员 (no such administrator)", "核对登录名 (check the name)")

// Bootstrapped says whether there is an administrator of each of the three roles, or was.
func (s *Service) Bootstrapped() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	have := map[Role]bool{}
	for _, a := range s.administrators {
		have[a.Role] = true
	}
	return have[System] && have[Security] && have[Auditor]
}

// BootstrapAdministrators makes the first three administrators, one of each role. After an interruption it is asked again, and
// leaves those that are there as they are; once there are three it is refused for ever.
func (s *Service) BootstrapAdministrators(ctx context.Context, actor string, all []NewAdministrator) ([]*Administrator, error) {
	roles, ids := map[Role]bool{}, map[string]bool{}
	for _, n := range all {
		roles[n.Role], ids[n.ID] = true, true
	}
	if len(all) != 3 || len(ids) != 3 || !roles[System] || !roles[Security] || !roles[Auditor] {
		return nil, problem.Invalid("administrators", "须为三人：系统、安全、审计管理员各一 (three persons, one of each role)")
	}
	if s.Bootstrapped() {
		return nil, problem.New(problem.Exists, "已有管理员 (there are administrators)", "由安全管理员登记新的管理员 (a security administrator adds others)")
	}
	var fresh []*Administrator
	for _, n := range all { // all of them are looked at before one is made
		a, err := s.newAdministrator(ctx, actor, n, false)
		if err != nil {
			return nil, err
		}
		fresh = append(fresh, a)
	}
	for _, a := range fresh {
		if old, ok := s.Administrator(a.ID); ok && old.Role == a.Role {
			continue
		}
		if err := s.addAdministrator(ctx, actor, a, "bootstrap"); err != nil {
			return nil, err
		}
	}
	return s.Administrators(), nil
}

// AddAdministrator adds one, who has to change the password at the first login.
func (s *Service) AddAdministrator(ctx context.Context, actor string, n NewAdministrator) (*Administrator, error) {
	a, err := s.newAdministrator(ctx, actor, n, true)
	if err != nil {
		return nil, err
	}
	if err := s.addAdministrator(ctx, actor, a, "add"); err != nil {
		return nil, err
	}
	a, _ = s.Administrator(n.ID)
	return a, nil
}

func (s *Service) addAdministrator(ctx context.Context, actor string, a *Administrator, act string) error {
	unlock, err := s.beginChange(ctx, administratorObject(a.ID))
	if err != nil {
		return err
	}
	defer unlock()
	if _, ok := s.Administrator(a.ID); ok {
		return problem.New(problem.Exists, "管理员已登记 (there is such an administrator)", "换一个登录名 (choose another name)")
	}
	i, err := s.intend(ctx, audit.Draft{Kind: kindAdministratorIntent, Actor: actor, Object: a.ID}, act, "")
	if err != nil {
		return err
	}
	d := audit.Draft{Kind: kindAdministrator, Actor: actor, Object: a.ID, Fields: []audit.Field{text("intent", i.id), text("act", act), boolean("password_set", true)}}
	return s.conclude(ctx, d, i.ref, a, nil)
}

// changeAdministrator journals a change. Sessions of the administrator end with the former version.
func (s *Service) changeAdministrator(ctx context.Context, actor, id, act, reason string, change func(*Administrator) error) (*Administrator, error) {
	if err := checkReason(reason); err != nil {
		return nil, err
	}
	unlock, err := s.beginChange(ctx, administratorObject(id))
	if err != nil {
		return nil, err
	}
	defer unlock()
	old, ok := s.Administrator(id)
	if !ok {
		return nil, errAdministratorUnknown
	}
	a := *old
	a.History = slices.Clone(old.History)
	a.Version, a.ChangedBy, a.ChangedAt = old.Version+1, actor, s.cfg.Clock.Now().Time
	if err := change(&a); err != nil {
		return nil, err
	}
	i, err := s.intend(ctx, audit.Draft{Kind: kindAdministratorIntent, Actor: actor, Object: id}, act, "")
	if err != nil {
		return nil, err
	}
	d := audit.Draft{Kind: kindAdministrator, Actor: actor, Object: id, Fields: []audit.Field{
		text("intent", i.id), text("act", act), text("reason", reason), boolean("password_set", act == actSetPassword || act == actChangePassword),
	}}
	if err := s.conclude(ctx, d, i.ref, &a, nil); err != nil {
		return nil, err
	}
	now, _ := s.Administrator(id)
	return now, nil
}

const (
	actSetPassword    = "set-password"
	actChangePassword = "change-password"
)

// StopAdministrator stops or starts one. Of system, security and audit administrators the last one who is active stays: there
// would be no second person, and nobody to add another. Of two campuses that stop each other's last one at a time one is refused.
func (s *Service) StopAdministrator(ctx context.Context, actor, id string, stopped bool, reason string) (*Administrator, error) {
	act := map[bool]string{true: "stop", false: "start"}[stopped]
	return s.changeAdministrator(ctx, actor, id, act, reason, func(a *Administrator) error {
		if stopped && s.needed(a) && len(s.others(a)) == 0 {
			return lastProblem(a)
		}
		a.Stopped = stopped
		return nil
	})
}

// errLast means that a version of an administrator was decided on, and that it stops the last one of the role.
var errLast = errors.New("account: nobody else of the role is known to be active")

func lastProblem(a *Administrator) *problem.Problem {
	return problem.New(problem.Forbidden, fmt.Sprintf("这是唯一在任的 %s 管理员 (the only %s administrator who is active)", a.Role, a.Role),
		"先登记或启用另一名同角色的管理员，须两人 (first add or start another one of the role, which takes two persons)").With(errLast)
}

// needed says whether an administrator is active, of a role that must not be left empty.
func (s *Service) needed(a *Administrator) bool {
	now, _, ok := s.ActiveAdministrator(a.ID)
	return ok && now.Role != Operator
}

// others are the other active ones of the role.
func (s *Service) others(a *Administrator) (out []*Administrator) {
	for _, o := range s.Administrators() {
		if _, _, ok := s.ActiveAdministrator(o.ID); ok && o.ID != a.ID && o.Role == a.Role {
			out = append(out, o)
		}
	}
	return out
}

// replaced makes sure, once the centre has given a version that stops a to this campus, that it has none of another active
// administrator of the role that is not here: whichever campus looks last sees what the other has decided, so that never
// both stop the one whom the other counted on.
func (s *Service) replaced(ctx context.Context, c Centre, a *Administrator) error {
	if !a.Stopped || !s.needed(a) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), centreLimit)
	defer cancel()
	refusal := lastProblem(a)
	for _, o := range s.others(a) {
		key := administratorObject(o.ID)
		s.mu.RLock()
		have := s.objects[key].known().version
		s.mu.RUnlock()
		latest, err := c.Latest(ctx, key.kind, key.id)
		if err != nil {
			return centreProblem(errors.Join(errLast, err))
		}
		if latest <= have {
			return nil
		}
		refusal = behindProblem(key, have, latest, s.decidedBy(ctx, c, key, have)).With(errLast)
	}
	return refusal
}

// SetAdministratorPassword gives an administrator a password that has to be changed at the next login, and ends a lock-out.
func (s *Service) SetAdministratorPassword(ctx context.Context, actor, id, password string) (*Administrator, error) {
	return s.newPassword(ctx, actor, id, password, actSetPassword)
}

func (s *Service) newPassword(ctx context.Context, actor, id, password, act string) (*Administrator, error) {
	if err := s.checkPassword(id, password); err != nil {
		return nil, err
	}
	leave, err := s.logins.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	return s.changeAdministrator(ctx, actor, id, act, "", func(a *Administrator) (err error) {
		for _, v := range append([]*PINVerifier{a.Password}, a.History...) {
			same, err := v.checkOf(ctx, s.macs, passwordDomain, id, password)
			if err != nil && !isElsewhere(err) { // it cannot be held against one of another campus
				return err
			}
			if same {
				return problem.Invalid("password", "不得使用现在或最近 %d 次的口令 (the present password, or one of the last %d)", passwordHistory, passwordHistory)
			}
		}
		a.History = append([]*PINVerifier{a.Password}, a.History...)
		a.History = a.History[:min(len(a.History), passwordHistory)]
		a.PasswordSetAt, a.MustChange = s.cfg.Clock.Now().Time, act == actSetPassword
		a.Password, err = s.newPasswordVerifier(ctx, id, password)
		return err
	})
}

// ChangePassword is an administrator's own; old is looked at as at a login, and counts as one.
func (s *Service) ChangePassword(ctx context.Context, actor, from, id, old, password string) (*Administrator, error) {
	if err := s.checkPassword(id, password); err != nil {
		return nil, err
	}
	if _, err := s.authenticate(ctx, LoginAttempt{ID: id, Password: old, From: from}, "change-password"); err != nil {
		return nil, err
	}
	return s.newPassword(ctx, actor, id, password, actChangePassword)
}

// SetAdministratorCertificate sets what the administrator's logins have to be signed with; nil: the password suffices.
func (s *Service) SetAdministratorCertificate(ctx context.Context, actor, id string, file []byte) (*Administrator, error) {
	var der []byte
	if file != nil {
		c, err := s.loginCertificate(file)
		if err != nil {
			return nil, err
		}
		der = c.Raw
	}
	return s.changeAdministrator(ctx, actor, id, "certificate", "", func(a *Administrator) error { a.Certificate = der; return nil })
}

// An AdministratorView is an administrator as others may see one.
type AdministratorView struct {
	Version      int       `json:"version"`
	ID           string    `json:"id"`
	Name         string    `json:"name"`
	Role         Role      `json:"role"`
	Stopped      bool      `json:"stopped"`
	Locked       bool      `json:"locked"`
	MustChange   bool      `json:"must_change"`
	PasswordEnds time.Time `json:"password_ends"`
	// Certificate is the SHA-256 of the certificate that logins are signed with; "": none is needed.
	Certificate string `json:"certificate,omitempty"`
	// LastLogin is the last one here since the appliance started; nil: there was none.
	LastLogin *time.Time `json:"last_login,omitempty"`
	ChangedBy string     `json:"changed_by"`
	ChangedAt time.Time  `json:"changed_at"`
}

// ViewAdministrator answers what may be shown.
func (s *Service) ViewAdministrator(a *Administrator) *AdministratorView {
	v := &AdministratorView{
		Version: a.Version, ID: a.ID, Name: a.Name, Role: a.Role, Stopped: a.Stopped, MustChange: s.MustChangePassword(a), PasswordEnds: s.PasswordEnds(a),
		ChangedBy: a.ChangedBy, ChangedAt: a.ChangedAt,
	}
	if a.Certificate != nil {
		sum := sha256.Sum256(a.Certificate)
		v.Certificate = hex.EncodeToString(sum[:])
	}
	now := s.cfg.Clock.Now()
	s.mu.RLock()
	defer s.mu.RUnlock()
	v.Locked = s.loginFailures[a.ID].locked(now.Time, now.Trusted())
	if at, known := s.lastLogins[a.ID]; known {
		v.LastLogin = &at
	}
	return v
}
