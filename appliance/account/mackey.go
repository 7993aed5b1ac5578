package account

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// PINKeyLabel and AppKeyLabel name the secret keys in the log slot that PINs and application keys depend on. Under these
// labels each cipher machine has keys of its own; under custody.MACLabel of them and a wrapping key's label, those that the
// ceremony of that key has brought to every campus.
const (
	PINKeyLabel = "mac/signer-pin"
	AppKeyLabel = "mac/application-key"
)

// CampusMACs are the uses whose MAC keys a ceremony makes.
var CampusMACs = []string{PINKeyLabel, AppKeyLabel}

// A MAC answers HMAC-SM3 over data under the named key inside the cipher machine.
type MAC interface {
	MAC(ctx context.Context, keyLabel string, data []byte) ([]byte, error)
}

// A MACKey names the MAC key that something was derived with. nil in an object is the key of the appliance whose entry it is.
type MACKey struct {
	// Label and Check are of a key that a ceremony made: its label, and its check value, since another key of that label would
	// make each right PIN a wrong one.
	Label string `json:"label,omitempty"`
	Check string `json:"check,omitempty"`
	// Node is the appliance whose cipher machine's own key it is; no other machine has that.
	Node string `json:"node,omitempty"`
}

// label is that of the key for a use.
func (k *MACKey) label(use string) string {
	if k == nil || k.Label == "" {
		return use
	}
	return k.Label
}

// macs derives with the MAC keys of the cipher machine, and knows which of them are here. Safe for concurrent use.
type macs struct {
	machine MAC
	node    string
	kek     string // of the ceremony whose keys derive what is new; "": the machine's own do

	mu     sync.Mutex
	checks map[string]string // guarded by mu: check values of keys of ceremonies, by label
}

func newMACs(cfg *Config) *macs {
	m := &macs{machine: cfg.MAC, node: cfg.Node, checks: map[string]string{}}
	if c := cfg.Custody; c != nil && c.CampusMACs {
		m.kek = c.KEK
	}
	return m
}

// present names the key that something new is derived with.
func (m *macs) present(ctx context.Context, use string) (*MACKey, error) {
	if m.kek == "" {
		return nil, nil
	}
	label := custody.MACLabel(use, m.kek)
	check, err := m.check(ctx, label)
	if err != nil {
		return nil, err
	}
	return &MACKey{Label: label, Check: check}, nil
}

// isPresent says whether something new would be derived with k.
func (m *macs) isPresent(use string, k *MACKey) bool {
	if m.kek == "" {
		return true // nothing is brought back under a machine's own keys
	}
	return k != nil && k.Label == custody.MACLabel(use, m.kek)
}

// check answers the check value of a ceremony's key.
func (m *macs) check(ctx context.Context, label string) (string, error) {
	m.mu.Lock()
	v := m.checks[label]
	m.mu.Unlock()
	if v != "" {
		return v, nil
	}
	answer, err := m.machine.MAC(ctx, label, custody.MACCheckMessage(label))
	if errors.Is(err, hsm.ErrKeyNotFound) {
		return "", macMissing.With(fmt.Errorf("account: key %q: %w", label, err))
	}
	if err != nil {
		return "", hsmProblem(err)
	}
	if v, err = custody.MACCheckValue(answer); err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.checks[label] = v
	return v, nil
}

// derive is HMAC-SM3 under the key for a use that k names. It fails with [problem.KeyElsewhere] where this campus's machine
// does not have it.
func (m *macs) derive(ctx context.Context, use string, k *MACKey, msg []byte) ([]byte, error) {
	label := use
	switch {
	case k == nil, k.Label == "" && k.Node == m.node:
	case k.Label == "":
		return nil, problem.New(problem.KeyElsewhere, fmt.Sprintf("由设备 %s 自己的密码机的密钥派生，只能在该院区使用 (derived with a key that is in the cipher machine of %s alone)", k.Node, k.Node),
			"在该院区使用；要两院区通用，见 docs/custody.md“两院区” (use it there; for both campuses see docs/custody.md)")
	case !strings.HasPrefix(k.Label, use+"@"): // a key is for one use, whatever an entry says
		return nil, fmt.Errorf("account: key %q is not for %s", k.Label, use)
	default:
		label = k.Label
		check, err := m.check(ctx, label)
		if err != nil {
			return nil, err
		}
		if check != k.Check {
			return nil, problem.New(problem.KeyElsewhere, "两院区的 MAC 密钥校验值不同，不是同一把 (the two campuses have different MAC keys under one label)",
				"两院区须由同一次仪式的份额导入；用 ceremony verify 查明哪一处错，由密码机管理员删除那一把，再 yinjian ceremony restore (find out with ceremony verify which is wrong, have it destroyed, and restore from the shares)").
				With(fmt.Errorf("account: key %q has the check value %s, want %s", label, check, k.Check))
		}
	}
	tag, err := m.machine.MAC(ctx, label, msg)
	if err != nil {
		if label != use && errors.Is(err, hsm.ErrKeyNotFound) {
			return nil, macMissing.With(fmt.Errorf("account: key %q: %w", label, err))
		}
		return nil, hsmProblem(err)
	}
	if len(tag) != 32 { // an empty one would make every PIN right
		return nil, fmt.Errorf("account: HMAC-SM3 of %d bytes under key %q", len(tag), label)
	}
	return tag, nil
}

var macMissing = problem.New(problem.KeyElsewhere, "本院区的密码机没有所需的 MAC 密钥 (this campus's cipher machine has not the MAC key)",
	"由保管人的份额在本院区恢复：yinjian ceremony restore，然后重启 (restore it here from the custodians' shares, then restart)")

func isElsewhere(err error) bool {
	var p *problem.Problem
	return errors.As(err, &p) && p.Code == problem.KeyElsewhere
}

// ownedBy says of what another appliance's entry has derived with that appliance's own keys whose keys they are: the entry
// itself does not.
func (a *Application) ownedBy(node string) {
	if a.MACKey == nil {
		a.MACKey = &MACKey{Node: node}
	}
}

// ownedBy is likewise, and names the appliance whose staff slot has the signer's resident keys.
func (g *Signer) ownedBy(node string) {
	if g.PIN != nil && g.PIN.MACKey == nil {
		v := *g.PIN
		v.MACKey, g.PIN = &MACKey{Node: node}, &v
	}
	if g.Sealing != nil && g.Sealing.MACKey == nil {
		l := *g.Sealing
		l.MACKey, g.Sealing = &MACKey{Node: node}, &l
	}
	for i := range g.Keys {
		if k := &g.Keys[i]; k.Wrapped == nil && k.Node == "" {
			k.Node = node
		}
	}
}

// behind says whether something of the signer's is still derived with a machine's own keys, or those of an earlier ceremony.
func (s *Service) behind(g *Signer) bool {
	return g.PIN != nil && !s.macs.isPresent(PINKeyLabel, g.PIN.MACKey) || g.Sealing != nil && !s.macs.isPresent(PINKeyLabel, g.Sealing.MACKey)
}

// actRederive is the act of bringing something under the MAC keys of a ceremony; what it opens stays as it is.
const actRederive = "rederive"

// rederive brings a signer under the present MAC keys. pin is right: it was checked against g; "" for a signer without one.
// Live authorisations end with the signer's former version.
func (s *Service) rederive(ctx context.Context, actor string, g *Signer, pin string) (*Signer, error) {
	return s.changeSigner(ctx, actor, g.ID, actRederive, "", func(next *Signer) (err error) {
		if present, _ := s.Signer(g.ID); present != g {
			return errSignerChanged
		}
		if g.PIN != nil {
			if next.PIN, err = newPINVerifier(ctx, s.macs, g.ID, pin); err != nil {
				return err
			}
		}
		if g.Sealing == nil {
			return nil
		}
		seed, err := g.Sealing.open(ctx, s.macs, g.ID, pin)
		if err != nil {
			return err
		}
		defer clear(seed)
		l := *g.Sealing
		next.Sealing = &l
		return s.closeSealing(ctx, &l, g.ID, pin, seed)
	})
}

const (
	// followWait bounds how long a PIN waits for other changes before it is left as it is for this time.
	followWait = time.Second
	// followPause is how long after a failure none is tried: while the centre is away each would cost its caller the wait.
	followPause = time.Minute
)

// follow is rederive when the signer has given the PIN. The signer waits for it: one is done at a time, none while other
// changes are under way, or soon after one failed. The next PIN does it then.
func (s *Service) follow(ctx context.Context, g *Signer, pin string, now time.Time) *Signer {
	if !s.follows.TryLock() {
		return g
	}
	defer s.follows.Unlock()
	if since := now.Sub(s.follows.failed); since >= 0 && since < followPause {
		return g
	}
	quick, cancel := context.WithTimeout(ctx, followWait)
	defer cancel()
	unlock, err := s.changes.Lock(quick, "")
	if err != nil {
		return g
	}
	unlock()
	changed, err := s.rederive(ctx, "appliance", g, pin)
	if err != nil {
		s.follows.failed = now
		s.cfg.Log.WithError(err).WithField("object", g.ID).Warning("a signer's PIN could not be brought under the ceremony's MAC key; the next PIN tries again")
		return g
	}
	return changed
}

// A Rederivation is how far the directory is under the MAC keys of the present ceremony.
type Rederivation struct {
	Done []string `json:"done"` // ids that were brought now
	// Waiting counts the signers who have a PIN that nobody knows here: each follows when it is next given.
	Waiting int `json:"waiting"`
	// Elsewhere names what is derived with keys that are not in this campus's machine: it is brought at the campus that has them.
	Elsewhere []string `json:"elsewhere"`
}

// Rederive brings under the ceremony's MAC keys what needs no PIN for that: applications, whose keys stay what they are, and
// signers without a PIN. It may be asked again after a failure.
func (s *Service) Rederive(ctx context.Context, actor string) (*Rederivation, error) {
	out := &Rederivation{Done: []string{}, Elsewhere: []string{}}
	if s.macs.kek == "" {
		return nil, problem.New(problem.Forbidden, "没有启用 hsm.custody.campus_macs (it is not set)", "先在 config.toml 写 hsm.custody.campus_macs = true 并重启 (set it and restart)")
	}
	for _, a := range s.Applications() {
		if s.macs.isPresent(AppKeyLabel, a.MACKey) {
			continue
		}
		_, key, _ := s.Application(a.ID)
		if len(key) == 0 {
			out.Elsewhere = append(out.Elsewhere, a.ID)
			continue
		}
		if err := s.rederiveApplication(ctx, actor, a.ID); err != nil {
			return nil, err
		}
		out.Done = append(out.Done, a.ID)
	}
	for _, g := range s.Signers() {
		switch {
		case !s.behind(g):
		case g.PIN != nil && !s.elsewhere(g):
			out.Waiting++
		case s.elsewhere(g):
			out.Elsewhere = append(out.Elsewhere, g.ID)
		default:
			if _, err := s.rederive(ctx, actor, g, ""); err != nil {
				return nil, err
			}
			out.Done = append(out.Done, g.ID)
		}
	}
	return out, nil
}

// OwnMACs counts the applications and signers that are not stopped and still depend on this machine's own MAC keys, where a
// ceremony's are to take their place, and those that depend on keys which are not here.
func (s *Service) OwnMACs() (behind, elsewhere int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for id, a := range s.applications {
		switch {
		case a.Stopped:
		case len(s.appKeys[id]) == 0:
			elsewhere++
		case !s.macs.isPresent(AppKeyLabel, a.MACKey):
			behind++
		}
	}
	for _, g := range s.signers {
		switch {
		case g.Stopped:
		case s.elsewhere(g):
			elsewhere++
		case s.behind(g):
			behind++
		}
	}
	return behind, elsewhere
}

// elsewhere says whether the signer's PIN, or what seals the signer's keys, is of another appliance's own MAC keys.
func (s *Service) elsewhere(g *Signer) bool {
	foreign := func(k *MACKey) bool { return k != nil && k.Label == "" && k.Node != s.macs.node }
	return g.PIN != nil && foreign(g.PIN.MACKey) || g.Sealing != nil && foreign(g.Sealing.MACKey)
}

// rederiveApplication seals the application's key, which stays what it is, under what the ceremony's key derives.
func (s *Service) rederiveApplication(ctx context.Context, actor, id string) error {
	_, err := s.changeApplication(ctx, actor, id, actRederive, "", func(a *Application, key []byte) (err error) {
		a.KeySalt, a.KeySealed = make([]byte, 16), nil
		rand.Read(a.KeySalt) // never fails (crypto/rand)
		if a.MACKey, err = s.macs.present(ctx, AppKeyLabel); err != nil {
			return err
		}
		seal, err := s.macs.applicationSeal(ctx, a)
		if err != nil {
			return err
		}
		defer clear(seal)
		a.KeySealed, err = custody.Seal(seal, key, applicationName(id))
		return err
	})
	return err
}
