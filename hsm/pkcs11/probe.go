package pkcs11

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	p11 "github.com/miekg/pkcs11"
	"github.com/sirupsen/logrus"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
)

// ProbeLabel is the CKA_LABEL of every key that Probe makes. What carries it on a token was left by a probe whose module
// crashed, and the next probe destroys it.
const ProbeLabel = "yinjian-probe"

// ProbeConfig says what is to be learnt of which module.
type ProbeConfig struct {
	Module     string // absolute path
	ModuleArgs string // as in Config
	TokenLabel string // "": by Slot, or the only initialised token
	Slot       *uint  // CK_SLOT_ID
	// PIN is the user's; nil: nothing that needs a login is looked at. It is presented once, and a second time, to see
	// what that is answered to, only after the token has accepted it.
	PIN []byte
	// Profiles are names or paths of the profiles that may fit; none: all that are shipped.
	Profiles    []string
	MaxSessions int           // how many sessions are opened at most
	Measure     time.Duration // how long each step of the measurement lasts
}

// A ProbeWatch is told what Probe does, so that whoever drives the process knows where a module crashed or hangs.
type ProbeWatch struct {
	// Call is told the function that is about to be called, and how long more than others it may take; then "".
	Call func(function string, more time.Duration)
	// Progress is given what is known so far. It must not keep it.
	Progress func(*ProbeReport)
}

// A ProbeReport is what was learnt. What was not looked at is missing, and NotChecked says why.
type ProbeReport struct {
	Module     string           `json:"module"`
	Library    *ProbeLibrary    `json:"library,omitempty"`
	Slots      []ProbeSlot      `json:"slots,omitempty"`
	Slot       *uint            `json:"slot,omitempty"` // CK_SLOT_ID of the token that was probed
	Mechanisms []ProbeMechanism `json:"mechanisms,omitempty"`
	Login      string           `json:"login,omitempty"` // "accepted", "not presented", or the return value
	Verdict    string           `json:"verdict"`         // Verdict…
	Profile    string           `json:"profile,omitempty"`
	// AlsoFit are profiles that say the same of everything that the token offers.
	AlsoFit  []string       `json:"also_fit,omitempty"`
	Profiles []ProbeProfile `json:"profiles,omitempty"`
	Trials   []ProbeTrial   `json:"trials,omitempty"` // by Profile, or by every profile that was tried when none is chosen
	Point    string         `json:"point,omitempty"`  // profiles.Point…, as found
	PointOn  string         `json:"point_on,omitempty"`
	SM1      string         `json:"sm1"` // "callable" or "unavailable"
	SM1Why   string         `json:"sm1_why,omitempty"`
	// Wrapping is the operation that custody keys are wrapped by, where the profile names one that the token offers. It is not
	// tried: the wrapping key would have to be marked as trusted, by the security officer.
	Wrapping    string           `json:"wrapping,omitempty"`
	KeysAre     string           `json:"keys_are,omitempty"` // "session objects" or "token objects": the throw-away keys
	LeftBehind  bool             `json:"left_behind"`        // keys labelled ProbeLabel are still on the token
	Sessions    *ProbeSessions   `json:"sessions,omitempty"`
	Speed       []ProbeSpeed     `json:"speed,omitempty"`
	Behaviour   []ProbeBehaviour `json:"behaviour,omitempty"`
	SlotClasses []ProbeClass     `json:"slot_classes,omitempty"`
	Findings    []string         `json:"findings"`
	NotChecked  []string         `json:"not_checked"`
	Crashed     *ProbeEnd        `json:"crashed,omitempty"` // set by the process that watches
	Hung        *ProbeEnd        `json:"hung,omitempty"`    // set by the process that watches
}

// Verdicts about the profile.
const (
	VerdictFits       = "fits"
	VerdictNone       = "none"
	VerdictAmbiguous  = "ambiguous"
	VerdictNotChecked = "not_checked"
)

// A ProbeLibrary is CK_INFO.
type ProbeLibrary struct {
	Manufacturer string `json:"manufacturer"`
	Description  string `json:"description"`
	Version      string `json:"version"`
	Cryptoki     string `json:"cryptoki"`
}

// A ProbeSlot is CK_SLOT_INFO, and CK_TOKEN_INFO of what is in it.
type ProbeSlot struct {
	ID           uint        `json:"id"`
	Description  string      `json:"description"`
	Manufacturer string      `json:"manufacturer"`
	Token        *ProbeToken `json:"token,omitempty"`
}

// A ProbeToken is CK_TOKEN_INFO.
type ProbeToken struct {
	Label        string `json:"label"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Serial       string `json:"serial"`
	Hardware     string `json:"hardware"`
	Firmware     string `json:"firmware"`
	MaxSessions  uint   `json:"max_sessions"` // 0: unknown or unlimited
	Initialized  bool   `json:"initialized"`
	UserPINSet   bool   `json:"user_pin_set"`
	PINLocked    bool   `json:"pin_locked"`
	PINFinalTry  bool   `json:"pin_final_try"`
	info         p11.TokenInfo
}

// A ProbeMechanism is one entry of C_GetMechanismList.
type ProbeMechanism struct {
	Number string `json:"number"`         // hexadecimal
	Name   string `json:"name,omitempty"` // of PKCS#11
	Min    uint   `json:"min"`
	Max    uint   `json:"max"`
	Flags  string `json:"flags"` // CK_MECHANISM_INFO, hexadecimal
	// Profiles are what profiles say it is: "sansec: operations.sm2-sign-e".
	Profiles []string `json:"profiles"`
	number   uint
}

// A ProbeProfile says whether a profile fits, and if not why.
type ProbeProfile struct {
	Name      string   `json:"name"`
	Fits      bool     `json:"fits"`
	Explained int      `json:"explained"` // numbers that it gives and the token offers
	Absent    int      `json:"absent"`    // numbers that it gives and the token does not offer
	Why       []string `json:"why,omitempty"`
}

// A ProbeTrial is one operation that was tried with a throw-away key.
type ProbeTrial struct {
	Profile   string `json:"profile"`
	Operation string `json:"operation"`
	Mechanism string `json:"mechanism"`
	Result    string `json:"result"`            // Trial…
	Answer    string `json:"answer,omitempty"`  // "raw", "der", or a length
	Reading   string `json:"reading,omitempty"` // what gmsm verified it as: "e", "m", "zm"
	Judge     string `json:"judge,omitempty"`   // who verified it; "round trip", "form": nobody could
	Error     string `json:"error,omitempty"`
}

// Results of a trial.
const (
	TrialWorks       = "works"
	TrialFails       = "fails"       // a return value that is not CKR_OK
	TrialContradicts = "contradicts" // it does something else than the profile says
	TrialAbsent      = "absent"      // the token does not offer the mechanism
)

// ProbeSessions says how many sessions could be open at once.
type ProbeSessions struct {
	Said   uint   `json:"said"` // ulMaxSessionCount; 0: unknown or unlimited
	Opened int    `json:"opened"`
	Limit  bool   `json:"limit"`           // one more was refused
	Error  string `json:"error,omitempty"` // with this
}

// ProbeSpeed is how fast one operation is.
type ProbeSpeed struct {
	Operation string      `json:"operation"`
	Steps     []ProbeStep `json:"steps"`
	Knee      int         `json:"knee"` // sessions from which on more of them bring less than a tenth
	Error     string      `json:"error,omitempty"`
}

// A ProbeStep is one step of a measurement.
type ProbeStep struct {
	Sessions  int     `json:"sessions"`
	PerSecond float64 `json:"per_second"`
}

// ProbeBehaviour is what the module answers to something unusual.
type ProbeBehaviour struct {
	What   string `json:"what"`
	Answer string `json:"answer"`
	Fine   bool   `json:"fine"` // what PKCS#11 v2.40 asks for, or a module that was tried does
}

// A ProbeClass says whether the token can serve a slot class of the appliance.
type ProbeClass struct {
	Class  hsm.SlotClass `json:"class"`
	Serves bool          `json:"serves"`
	Lacks  []string      `json:"lacks,omitempty"` // operations of profiles
}

// A ProbeEnd says where a module crashed or did not return.
type ProbeEnd struct {
	Function string  `json:"function"` // "": in none that was called
	Signal   string  `json:"signal,omitempty"`
	Seconds  float64 `json:"seconds,omitempty"`
}

// A candidate is a profile that may fit.
type candidate struct {
	name string // as it was asked for
	file *profiles.Profile
	Profile
	report ProbeProfile
	trials []ProbeTrial
}

// A prober is one Probe under way.
type prober struct {
	cfg        ProbeConfig
	watch      ProbeWatch
	lib        *library
	li         p11.Info
	report     *ProbeReport
	candidates []*candidate
	listed     bool // C_GetMechanismList answered
	offered    []uint
	ti         p11.TokenInfo
	slot       uint
	session    p11.SessionHandle // read/write, logged in
	id         []byte            // CKA_ID of the throw-away keys
	keys       map[string]*probeKey
	tried      map[string]trialOutcome
	chosen     *candidate
}

// Probe learns what a module and one token in it can do. It calls C code of a vendor, with no deadline: hsm/probe runs
// it in a process of its own. Keys that are on the token are not used. An error means that nothing was learnt, or that the
// configuration cannot be used; whatever the module does wrong stands in the report.
//
// What may crash a module comes late, and what is known by then is given to watch first.
func Probe(cfg ProbeConfig, watch ProbeWatch) (*ProbeReport, error) {
	p := &prober{cfg: cfg, watch: watch, keys: map[string]*probeKey{}, tried: map[string]trialOutcome{},
		report: &ProbeReport{Module: cfg.Module, Verdict: VerdictNotChecked, SM1: "unavailable", SM1Why: "没有试 (not tried)",
			Findings: []string{}, NotChecked: []string{}}}
	if err := p.readProfiles(); err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: probing: %w", err)
	}
	err := p.call("C_GetFunctionList", func() error { return load(cfg.Module) })
	if err == nil {
		err = p.call("C_Initialize", func() (err error) { p.lib, err = acquireLibrary(cfg.Module, cfg.ModuleArgs, ""); return err })
	}
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: probing: %w", err)
	}
	if err := p.identity(); err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: probing: %w", err)
	}
	p.progress()
	if p.selectToken() {
		p.mechanisms()
		p.progress()
		p.fitting()
		p.progress()
		if p.login() {
			p.work()
		}
	}
	_ = p.call("C_Finalize", func() error { p.lib.release(""); return nil })
	return p.report, nil
}

// load loads a module, and asks it for its functions.
func load(path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("module: %w", err)
	}
	libraries.mu.Lock()
	defer libraries.mu.Unlock()
	_, err = loadLocked(real)
	return err
}

// readProfiles reads the profiles that may fit.
func (p *prober) readProfiles() error {
	names := p.cfg.Profiles
	if len(names) == 0 {
		names = profiles.Names()
	}
	for _, name := range names {
		file, err := profiles.Load(name)
		if err != nil {
			return err
		}
		p.candidates = append(p.candidates, &candidate{name: name, file: file, Profile: resolve(file), report: ProbeProfile{Name: name}})
	}
	return nil
}

// call announces a call, makes it, and types its error.
func (p *prober) call(function string, f func() error) error {
	p.watch.Call(function, 0)
	err := f()
	p.watch.Call("", 0)
	var e *hsm.Error
	if errors.As(err, &e) {
		return err
	}
	return call(function, err)
}

func (p *prober) progress() { p.watch.Progress(p.report) }

func (p *prober) finding(format string, args ...any) {
	p.report.Findings = append(p.report.Findings, fmt.Sprintf(format, args...))
}

func (p *prober) notChecked(format string, args ...any) {
	p.report.NotChecked = append(p.report.NotChecked, fmt.Sprintf(format, args...))
}

func version(v p11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// identity asks for CK_INFO, the slots and the tokens.
func (p *prober) identity() error {
	err := p.call("C_GetInfo", func() (err error) { p.li, err = p.lib.ctx.GetInfo(); return err })
	if err != nil {
		return err
	}
	p.report.Library = &ProbeLibrary{Manufacturer: p.li.ManufacturerID, Description: p.li.LibraryDescription,
		Version: version(p.li.LibraryVersion), Cryptoki: version(p.li.CryptokiVersion)}
	var slots []uint
	if err := p.call("C_GetSlotList", func() (err error) { slots, err = p.lib.ctx.GetSlotList(true); return err }); err != nil {
		return err
	}
	for _, id := range slots {
		s := ProbeSlot{ID: id}
		if p.lib.has(fnSlotInfo) {
			var si p11.SlotInfo
			if err := p.call("C_GetSlotInfo", func() (err error) { si, err = p.lib.ctx.GetSlotInfo(id); return err }); err != nil {
				p.finding("槽位 %d (slot): %v", id, err)
			}
			s.Description, s.Manufacturer = si.SlotDescription, si.ManufacturerID
		}
		var ti p11.TokenInfo
		if err := p.call("C_GetTokenInfo", func() (err error) { ti, err = p.lib.ctx.GetTokenInfo(id); return err }); err != nil {
			p.finding("槽位 %d (slot): %v", id, err)
		} else {
			s.Token = &ProbeToken{Label: ti.Label, Manufacturer: ti.ManufacturerID, Model: ti.Model, Serial: ti.SerialNumber,
				Hardware: version(ti.HardwareVersion), Firmware: version(ti.FirmwareVersion), MaxSessions: sessionLimit(ti),
				Initialized: ti.Flags&p11.CKF_TOKEN_INITIALIZED != 0, UserPINSet: ti.Flags&p11.CKF_USER_PIN_INITIALIZED != 0,
				PINLocked: ti.Flags&p11.CKF_USER_PIN_LOCKED != 0, PINFinalTry: ti.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0, info: ti}
		}
		p.report.Slots = append(p.report.Slots, s)
	}
	return nil
}

// selectToken finds the token that is meant.
func (p *prober) selectToken() bool {
	var meant []ProbeSlot
	for _, s := range p.report.Slots {
		switch {
		case s.Token == nil:
		case p.cfg.Slot != nil && s.ID == *p.cfg.Slot, p.cfg.Slot == nil && p.cfg.TokenLabel != "" && s.Token.Label == p.cfg.TokenLabel,
			p.cfg.Slot == nil && p.cfg.TokenLabel == "" && s.Token.Initialized:
			meant = append(meant, s)
		}
	}
	if len(meant) == 0 && p.cfg.Slot == nil && p.cfg.TokenLabel == "" && len(p.report.Slots) == 1 && p.report.Slots[0].Token != nil {
		meant = p.report.Slots // not initialised: its mechanisms can be listed
	}
	if len(meant) != 1 {
		p.notChecked("机制与其后各项：%d 个令牌相符，请用 --token-label 或 --slot 指定一个 (mechanisms and all else: %d tokens are meant, name one)", len(meant), len(meant))
		return false
	}
	p.slot, p.ti = meant[0].ID, meant[0].Token.info
	p.report.Slot = &p.slot
	return true
}

//go:embed mechanisms.txt
var mechanismNames string

// mechanismName is the name in PKCS#11, "" where it has none.
func mechanismName(number uint) string {
	in := bufio.NewScanner(strings.NewReader(mechanismNames))
	for in.Scan() {
		n, name, _ := strings.Cut(in.Text(), " ")
		if v, err := strconv.ParseUint(n, 0, 64); err == nil && uint(v) == number {
			return name
		}
	}
	return ""
}

// numbers calls f for each number of a profile, with its key in the file.
func numbers(file *profiles.Profile, f func(key string, number uint)) {
	for name, k := range file.Keys {
		f("keys."+name, uint(*k.Mechanism))
	}
	for name, op := range file.Operations {
		f("operations."+name, uint(*op.Mechanism))
	}
}

// mechanisms asks what the token offers, and says what each profile takes it for, the shipped ones too.
func (p *prober) mechanisms() {
	for _, c := range p.candidates {
		if c.noMechanismList {
			p.notChecked("机制：%s 档案要求不调用 C_GetMechanismList (mechanisms: the profile avoids it)", c.name)
			return
		}
	}
	var list []*p11.Mechanism
	err := p.call("C_GetMechanismList", func() (err error) { list, err = p.lib.ctx.GetMechanismList(p.slot); return err })
	if err != nil {
		p.finding("%v", err)
		p.notChecked("机制 (mechanisms)：%v", err)
		return
	}
	p.listed = true
	known := map[uint][]string{}
	files := map[string]*profiles.Profile{}
	for _, c := range p.candidates {
		files[c.name] = c.file
	}
	for _, name := range profiles.Names() {
		if file, err := profiles.Load(name); err == nil {
			files[name] = file
		}
	}
	for name, file := range files {
		numbers(file, func(key string, number uint) { known[number] = append(known[number], name+": "+key) })
	}
	for _, m := range list {
		p.offered = append(p.offered, m.Mechanism)
		row := ProbeMechanism{Number: fmt.Sprintf("%#x", m.Mechanism), Name: mechanismName(m.Mechanism), Profiles: known[m.Mechanism], number: m.Mechanism}
		slices.Sort(row.Profiles)
		if p.lib.has(fnMechanismInfo) {
			var mi p11.MechanismInfo
			err := p.call("C_GetMechanismInfo", func() (err error) {
				mi, err = p.lib.ctx.GetMechanismInfo(p.slot, []*p11.Mechanism{m})
				return err
			})
			if err != nil {
				p.finding("机制 %s 在表中，但 (is listed, but): %v", row.Number, err)
			}
			row.Min, row.Max, row.Flags = mi.MinKeySize, mi.MaxKeySize, fmt.Sprintf("%#x", mi.Flags)
		}
		p.report.Mechanisms = append(p.report.Mechanisms, row)
	}
	slices.SortFunc(p.report.Mechanisms, func(a, b ProbeMechanism) int {
		if a.number < b.number {
			return -1
		}
		return 1
	})
}

// fitting drops the profiles that do not fit what the machine says of itself and offers.
func (p *prober) fitting() {
	id := profiles.Identity{Library: p.cfg.Module, Manufacturers: []string{p.li.ManufacturerID, p.ti.ManufacturerID},
		Description: p.li.LibraryDescription, Model: p.ti.Model, VersionMajor: p.li.LibraryVersion.Major, VersionMinor: p.li.LibraryVersion.Minor}
	for _, c := range p.candidates {
		c.noMechanismList = !p.listed
		if err := c.fits(id, p.offered); err != nil {
			c.report.Why = strings.Split(strings.TrimPrefix(err.Error(), fmt.Sprintf("%v: %s: ", errUnfit, c.Name)), "\n")
		} else {
			c.report.Fits = true
		}
		c.count(p.offered)
	}
	p.tell()
}

// count says how much of what the token offers the profile explains. A key that no operation on offer uses explains
// nothing.
func (c *candidate) count(offered []uint) {
	explained, absent := map[uint]bool{}, map[uint]bool{}
	used := map[string]bool{}
	for name, op := range c.file.Operations {
		if n := uint(*op.Mechanism); slices.Contains(offered, n) {
			explained[n] = true
			for key := range c.file.Keys {
				if family(key) == family(name) {
					used[key] = true
				}
			}
		} else {
			absent[n] = true
		}
	}
	for name, k := range c.file.Keys {
		if n := uint(*k.Mechanism); used[name] && slices.Contains(offered, n) {
			explained[n] = true
		} else {
			absent[n] = true
		}
	}
	c.report.Explained, c.report.Absent = len(explained), len(absent)
}

// family is what keys and the operations on them have in common: "rsa" of "rsa-2048" and of "rsa-pss-sha256".
func family(name string) string {
	first, _, _ := strings.Cut(name, "-")
	return first
}

// tell puts the state of the profiles into the report.
func (p *prober) tell() {
	p.report.Profiles = nil
	for _, c := range p.candidates {
		p.report.Profiles = append(p.report.Profiles, c.report)
	}
}

// viable are the profiles that nothing speaks against yet.
func (p *prober) viable() (v []*candidate) {
	for _, c := range p.candidates {
		if c.report.Fits {
			v = append(v, c)
		}
	}
	return v
}

// login presents the PIN, once, unless something speaks against it.
func (p *prober) login() bool {
	p.report.Login = "not presented"
	v := p.viable()
	refuse := func(why string) bool {
		p.notChecked("登录与其后各项 (login and all else)：%s", why)
		return false
	}
	if len(v) == 0 {
		p.report.Verdict = VerdictNone
		return refuse("没有档案相符，口令未提交 (no profile fits, the PIN was not presented)")
	}
	rules := v[0]
	for _, c := range v[1:] {
		if c.noLogin != rules.noLogin || c.loginUser != rules.loginUser {
			return refuse(fmt.Sprintf("%s 与 %s 的登录规则不同，请用 --profile 指定 (the profiles log in differently, name one)", rules.name, c.name))
		}
	}
	switch {
	case rules.noLogin:
		p.report.Login = "not needed"
	case len(p.cfg.PIN) == 0:
		return refuse("未给 --pin-file (no PIN was given)")
	case p.ti.Flags&p11.CKF_USER_PIN_LOCKED != 0:
		return refuse("令牌称口令已锁 (the token says that the PIN is locked)")
	case p.ti.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0:
		return refuse("令牌称只剩最后一次，本命令不用它 (the token says that one try is left; it is not spent here)")
	case p.ti.Flags&p11.CKF_TOKEN_INITIALIZED != 0 && p.ti.Flags&p11.CKF_USER_PIN_INITIALIZED == 0:
		return refuse("令牌没有用户口令 (the token has no user PIN)")
	}
	for _, c := range v {
		if err := c.checkPIN(p.cfg.PIN); err != nil {
			return refuse(err.Error())
		}
	}
	err := p.call("C_OpenSession", func() (err error) {
		p.session, err = p.lib.ctx.OpenSession(p.slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
		return err
	})
	if err != nil {
		return refuse(err.Error())
	}
	if rules.noLogin {
		return true
	}
	err = rules.translate(p.call("C_Login", func() error { return p.lib.login(p.session, p.userType(rules), p.cfg.PIN) }))
	var e *hsm.Error
	switch {
	case err == nil:
		p.report.Login = "accepted"
		return true
	case errors.As(err, &e):
		p.report.Login = hsm.RVName(e.RV)
	default:
		p.report.Login = err.Error()
	}
	_ = p.call("C_CloseSession", func() error { return p.lib.ctx.CloseSession(p.session) })
	return refuse(err.Error())
}

func (p *prober) userType(c *candidate) uint {
	if c.loginUser != 0 {
		return c.loginUser
	}
	return p11.CKU_USER
}

// reader is a Token's way to read attributes, without its sessions.
func (p *prober) reader(profile Profile) *Token {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return &Token{lib: p.lib, cfg: Config{Profile: profile, Log: log}}
}
