package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/pelletier/go-toml/v2"

	"yinjian/api"
	"yinjian/api/fetch"
	"yinjian/appliance/account"
	"yinjian/appliance/pki"
	"yinjian/dbdriver/connect"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/pool"
)

// InitUnfinished is in a folder that `yinjian init` has not finished.
const InitUnfinished = ".init-unfinished"

// A Config is the one configuration file, config.toml in the appliance's folder. Unknown keys are errors. Paths may be
// relative to that folder. Secrets are named by file and never stand in it.
type Config struct {
	Node   string `toml:"node"`   // name of this appliance in journals and evidence, [a-z0-9.-], for ever
	Campus string `toml:"campus"` // 院区: "本部", "滨海"

	Listen     Listen      `toml:"listen"`
	HSM        HSM         `toml:"hsm"`
	Time       Time        `toml:"time"`
	TSA        TSA         `toml:"tsa,omitempty"`
	Policy     Policy      `toml:"policy"`
	Trust      Trust       `toml:"trust"`
	Database   Database    `toml:"database"`
	Preserve   Preserve    `toml:"preserve"`
	Peer       Peer        `toml:"peer"`
	Admin      AdminAccess `toml:"admin"`
	Log        Log         `toml:"log"`
	Alarms     Alarms      `toml:"alarms"`
	Evaluation Evaluation  `toml:"evaluation"`
}

// Listen says where the appliance listens.
type Listen struct {
	API string `toml:"api"` // host:port, TLS 1.3; port 0 picks a free one
	// TLS12 lets old clients (Java 8, .NET Framework, Mono) use TLS 1.2, with ECDHE and AEAD alone. /health/state says so.
	TLS12 bool `toml:"tls12"`
	// TSAPlain is a second listener for /tsa without TLS, off when empty: on a loopback address, or on another for the
	// sources that are listed by their addresses. It is named in /health/state.
	TSAPlain string `toml:"tsa_plain"`
	// Admin is the listener for administrators who have logged in, host:port, TLS 1.3; off when empty.
	Admin string `toml:"admin"`
	// Peer is the listener for the other campus's appliance, host:port; off when empty.
	Peer string `toml:"peer"`
	// Names are what clients call this appliance, addresses or host names without a port; a request for another host is refused.
	// Empty: any.
	Names []string `toml:"names,omitempty"`
	// TSASources may use /tsa without a key.
	TSASources []TSASource `toml:"tsa_sources,omitempty"`
}

// A TSASource is a client of RFC 3161 that is known by its address, its TLS client certificate, or by both together.
type TSASource struct {
	Name         string   `toml:"name"`         // [a-z0-9.-], journalled as "source:" and the name
	Addresses    []string `toml:"addresses"`    // addresses and networks
	Certificates []string `toml:"certificates"` // PEM files with the very certificates that it may show
	Rate         int      `toml:"rate"`         // requests a second; default policy.rate
	Burst        int      `toml:"burst"`        // requests at once; default twice the rate
}

// source is s for the API, its certificates still to be read.
func (s *TSASource) source() (api.Source, error) {
	out := api.Source{Name: s.Name, Certificates: make([]*smx509.Certificate, len(s.Certificates)), Rate: s.Rate, Burst: s.Burst}
	for _, text := range s.Addresses {
		p, err := netip.ParsePrefix(text)
		if a, aerr := netip.ParseAddr(text); aerr == nil {
			p, err = a.Prefix(a.BitLen())
		}
		if err != nil {
			return out, fmt.Errorf("addresses: %q 须为地址或网段 (want an address or a network)", text)
		}
		out.Addresses = append(out.Addresses, p)
	}
	return out, nil
}

// sources are those for the API.
func (l *Listen) sources() ([]api.Source, error) {
	var out []api.Source
	for i, s := range l.TSASources {
		one, err := s.source()
		if err != nil {
			return nil, err // validate has looked already
		}
		one.Certificates = nil
		for _, name := range s.Certificates {
			b, err := os.ReadFile(name)
			if err != nil {
				return nil, fmt.Errorf("listen.tsa_sources[%d].certificates: %w", i, err)
			}
			certs, err := pki.ParseCertificatePEMs(b)
			if err != nil {
				return nil, fmt.Errorf("listen.tsa_sources[%d].certificates: %s: %w", i, name, err)
			}
			one.Certificates = append(one.Certificates, certs...)
		}
		out = append(out, one)
	}
	return out, nil
}

// asks says whether TLS clients are asked for a certificate.
func (l *Listen) asks() bool {
	return slices.ContainsFunc(l.TSASources, func(s TSASource) bool { return len(s.Certificates) > 0 })
}

// isOpen says whether a listener's address is for others than this machine.
func isOpen(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	return err == nil && !api.IsLoopback(host)
}

// plainOpen says whether the plain listener is for others than this machine.
func (l *Listen) plainOpen() bool { return isOpen(l.TSAPlain) }

func (l *Listen) validate(bad func(key, format string, args ...any)) {
	if _, _, err := net.SplitHostPort(l.API); err != nil {
		bad("listen.api", "须为 host:port (%v)", err)
	}
	if l.Admin != "" {
		if _, _, err := net.SplitHostPort(l.Admin); err != nil {
			bad("listen.admin", "须为 host:port (%v)", err)
		}
	}
	for _, n := range l.Names {
		if n == "" || strings.ContainsAny(n, "/[] ") || strings.Contains(n, ":") && net.ParseIP(n) == nil {
			bad("listen.names", "%q 须为主机名或地址，不含端口 (a host name or an address, without a port)", n)
		}
	}
	listed := slices.ContainsFunc(l.TSASources, func(s TSASource) bool { return len(s.Addresses) > 0 && len(s.Certificates) == 0 })
	if p := l.TSAPlain; p != "" {
		host, _, err := net.SplitHostPort(p)
		switch {
		case err != nil || host != "" && net.ParseIP(host) == nil:
			bad("listen.tsa_plain", "须为 IP:port，如 127.0.0.1:0 (want IP:port)")
		case l.plainOpen() && !listed:
			bad("listen.tsa_plain", "没有按地址登记的 listen.tsa_sources 时只能是回环地址，如 127.0.0.1:0 (loopback only, unless sources are listed by address)")
		}
	}
	var all []api.Source
	for i, s := range l.TSASources {
		one, err := s.source()
		if err != nil {
			bad(fmt.Sprintf("listen.tsa_sources[%d]", i), "%v", err)
			continue
		}
		if one.Rate > account.MaxRate || one.Burst > account.MaxBurst {
			bad(fmt.Sprintf("listen.tsa_sources[%d]", i), "rate、burst 至多 %d、%d (at most)", account.MaxRate, account.MaxBurst)
		}
		all = append(all, one)
	}
	if err := api.CheckSources(all); err != nil {
		bad("listen.tsa_sources", "%v", err)
	}
}

// Peer is about the other campus. Whom this appliance is paired with is decided by administrators, in the journal.
type Peer struct {
	// Address is listen.peer as the other campus reaches it, host:port; default listen.peer itself.
	Address string `toml:"address"`
	// MaxAge is how old the copy of the other campus's directory may be for signing to go on; default 24h.
	MaxAge Duration `toml:"max_age"`
	// CosignEvery is how often a checkpoint of ours is given to the other campus for its cosignature, if there is news;
	// default 10s.
	CosignEvery Duration `toml:"cosign_every"`
}

func (c *Config) validatePeer(bad func(key, format string, args ...any)) {
	if c.Listen.Peer == "" {
		if c.Peer.Address != "" {
			bad("peer.address", "没有 listen.peer 时无意义 (means nothing without listen.peer)")
		}
	} else {
		if _, _, err := net.SplitHostPort(c.Listen.Peer); err != nil {
			bad("listen.peer", "须为 host:port (%v)", err)
		}
		host, port, err := net.SplitHostPort(c.Peer.Address)
		if ip := net.ParseIP(host); err != nil || host == "" || port == "0" || ip != nil && ip.IsUnspecified() {
			bad("peer.address", "须为对端院区可达的 host:port；listen.peer 不是这样的地址时必须写明 (an address that the other campus reaches)")
		}
	}
	if d := time.Duration(c.Peer.MaxAge); d < time.Minute || d > 30*24*time.Hour {
		bad("peer.max_age", "须在 1m 与 720h 之间 (between 1m and 720h)")
	}
	if d := time.Duration(c.Peer.CosignEvery); d < time.Second || d > time.Hour {
		bad("peer.cosign_every", "须在 1s 与 1h 之间 (between 1s and 1h)")
	}
}

// HSM says how the cipher machine is reached.
type HSM struct {
	Module     string          `toml:"module"`      // the vendor's PKCS#11 library
	ModuleArgs string          `toml:"module_args"` // C_Initialize's pReserved string, for modules that take one
	Profile    string          `toml:"profile"`     // vendor profile, by name ("neutral", …) or file
	Slots      map[string]Slot `toml:"slots"`       // staff, tsa, log, ca; tls, without which the listener's key is secrets/tls.key
	// PINSource says where the slots' PINs come from: "file" (default: each slot's pin_file) or "unlock" (sealed on disk, opened
	// by holders' passphrases after each start).
	PINSource    string   `toml:"pin_source"`
	CallDeadline Duration `toml:"call_deadline"`
	WrappedKeys  int      `toml:"wrapped_keys"` // custody keys that a slot keeps unwrapped, as session objects; default 1024
	VerifyFresh  *bool    `toml:"verify_fresh"` // check each fresh signature before it leaves; default true
	// Custody, if it stands there, makes new staff keys custody keys: outside the cipher machine, wrapped under its KEK.
	// Keys that are in the machine go on.
	Custody *Custody `toml:"custody"`
	// Weight is the share of this machine's work where there are others; default 1.
	Weight int `toml:"weight"`
	// Machines are cipher machines beside this one, which is called "main". More can be added while the appliance runs.
	Machines []Machine `toml:"machines,omitempty"`
}

// FirstMachine is the name of the machine that [HSM] itself describes.
const FirstMachine = "main"

// A Machine is a cipher machine beside the first. It may have any of the slots.
type Machine struct {
	Name       string          `toml:"name"` // [a-z][a-z0-9_]*, for ever: the records of its keys' uses bear it
	Module     string          `toml:"module"`
	ModuleArgs string          `toml:"module_args"`
	Profile    string          `toml:"profile"` // default neutral
	Weight     int             `toml:"weight"`  // share of the work, 1–100; default 1
	Slots      map[string]Slot `toml:"slots"`
}

var reMachine = regexp.MustCompile(`^[a-z][a-z0-9_]{0,30}$`)

func (m *Machine) setDefaults(dir string) {
	def(&m.Profile, "neutral")
	def(&m.Weight, 1)
	abs(dir, &m.Module)
	if profiles.IsPath(m.Profile) {
		abs(dir, &m.Profile)
	}
	for name, s := range m.Slots {
		def(&s.Sessions, 8)
		abs(dir, &s.PINFile)
		m.Slots[name] = s
	}
}

func (m *Machine) validate(locked bool, bad func(key, format string, args ...any)) {
	if !reMachine.MatchString(m.Name) || m.Name == FirstMachine {
		bad("name", "须为小写字母、数字、下划线，字母开头，至多 31 位，不得为 %s (lower-case letters, digits, underscores; not %s)", FirstMachine, FirstMachine)
	}
	if m.Module == "" {
		bad("module", "缺少 PKCS#11 模块路径 (path of the PKCS#11 module is missing)")
	}
	if _, err := profiles.Load(m.Profile); err != nil {
		bad("profile", "%v", err)
	}
	validateWeight(m.Weight, bad)
	if len(m.Slots) == 0 {
		bad("slots", "至少一个槽位 (at least one slot)")
	}
	validateSlots(m.Slots, locked, bad)
}

func validateWeight(weight int, bad func(key, format string, args ...any)) {
	if weight < 1 || weight > 100 {
		bad("weight", "须为 1–100 (1 to 100)")
	}
}

// validateSlots looks at a machine's slots: each class has a token of its own. With locked its PIN needs no file.
func validateSlots(slots map[string]Slot, locked bool, bad func(key, format string, args ...any)) {
	known := 0
	for _, class := range hsm.Classes {
		s, ok := slots[string(class)]
		if !ok {
			continue
		}
		known++
		if s.TokenLabel == "" || len(s.TokenLabel) > 32 {
			bad("slots."+string(class)+".token_label", "须为 1–32 字节 (1 to 32 bytes)")
		}
		if s.PINFile == "" && !locked {
			bad("slots."+string(class)+".pin_file", "缺少 (missing)")
		}
		if s.Sessions < 1 || s.Sessions > 256 {
			bad("slots."+string(class)+".sessions", "须为 1–256 (1 to 256)")
		}
	}
	if len(slots) > known {
		bad("slots", "只能有 staff、tsa、log、ca、tls (only staff, tsa, log, ca, tls)")
	}
	labels := map[string]string{}
	for name, s := range slots {
		if other, dup := labels[s.TokenLabel]; dup {
			bad("slots", "%s 与 %s 使用同一令牌，密钥用途须分离 (%s and %s share a token; purposes must be apart)", name, other, name, other)
		}
		labels[s.TokenLabel] = name
	}
}

// ParseMachine reads a file with one machine's keys, as under [[hsm.machines]]. Relative paths are taken from dir.
func ParseMachine(b []byte, dir string) (*Machine, error) {
	m := new(Machine)
	if err := decodeTOML(b, m); err != nil {
		return nil, err
	}
	m.setDefaults(dir)
	var errs []error
	m.validate(false, func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	})
	return m, errors.Join(errs...)
}

// abs makes a path in the appliance's folder absolute.
func abs(dir string, p *string) {
	if *p != "" && !filepath.IsAbs(*p) {
		*p = filepath.Join(dir, *p)
	}
}

// Custody is what a key ceremony left.
type Custody struct {
	KEK string `toml:"kek"` // label of the wrapping key in the staff slot
	// Officers is the public key (PEM) of the officers who together open keys whose PIN was forgotten; empty: nobody can.
	Officers string `toml:"officers"`
	// CampusMACs derives PINs' verifiers, applications' keys and what seals custody keys with the MAC keys that the ceremony
	// of KEK brought to the log slot, so that they hold at every campus where it did. Without it they hold at this one alone.
	CampusMACs bool `toml:"campus_macs"`
}

// Slot is one slot class's token.
type Slot struct {
	TokenLabel string `toml:"token_label"`
	// PINFile holds the user PIN. For evaluation only: whoever takes the disk has both. See [HSM.PINSource].
	PINFile  string `toml:"pin_file"`
	Sessions int    `toml:"sessions"` // default 8
}

// Time says whom to believe.
type Time struct {
	MinSources  int          `toml:"min_sources"`  // groups that must agree
	Accuracy    Duration     `toml:"accuracy"`     // stamps are refused when the bound exceeds it
	HoldoverMax Duration     `toml:"holdover_max"` // how long without a majority
	Poll        Duration     `toml:"poll"`
	DriftPPM    int          `toml:"drift_ppm"`   // by how much the oscillator may be off, 15–500 parts per million; default 50
	PolicyNote  string       `toml:"policy_note"` // repeated in all evidence
	Sources     []TimeSource `toml:"sources"`
}

// TimeSource is one NTP server.
type TimeSource struct {
	Name    string `toml:"name"`
	Group   string `toml:"group"` // sources that share an antenna share a group
	Address string `toml:"address"`
	KeyID   uint16 `toml:"key_id"`   // symmetric authentication, 0: none
	KeyType string `toml:"key_type"` // "SHA256", "AES128", "AES256"
	KeyFile string `toml:"key_file"`
}

// Policy are limits an evaluator asks for.
type Policy struct {
	ReserveBytes uint64 `toml:"reserve_bytes"` // free space below which signing is refused
	// TSAReservePercent: tokens for others are refused earlier than signatures are.
	TSAReservePercent int `toml:"tsa_reserve_percent"`
	SegmentEntries    int `toml:"segment_entries"` // journal entries a file
	MaxBodyBytes      int `toml:"max_body_bytes"`
	// Rate and Burst are how many requests a second an application may make, and how many at once, unless its registration
	// says otherwise.
	Rate  int `toml:"rate"`
	Burst int `toml:"burst"` // default: twice the rate
	// HSMRate and HSMSessions are how many signatures a second an application may have made, and how many at once, unless its
	// registration says otherwise; 0: as many as its requests ask for.
	HSMRate     int `toml:"hsm_rate"`
	HSMSessions int `toml:"hsm_sessions"`
	// Concurrent requests are handled at once, shared among the applications.
	Concurrent     int `toml:"concurrent"`
	AuthFailures   int `toml:"auth_failures"`   // failed authentications a minute from one address
	MaxConnections int `toml:"max_connections"` // of the API; a quarter of them from one address
	// Drain is how long requests under way may take after the word to stop.
	Drain Duration `toml:"drain"`
}

// rateOf is what an application may do.
func (p *Policy) rateOf(app *account.Application) (perSecond, burst int) {
	perSecond, burst = p.Rate, p.Burst
	if app.Rate != 0 {
		perSecond, burst = app.Rate, 2*app.Rate
	}
	if app.Burst != 0 {
		burst = app.Burst
	}
	return perSecond, burst
}

// callerOf is the application as the cipher machines' queue knows it.
func (p *Policy) callerOf(app *account.Application) hsm.Caller {
	c := hsm.Caller{Application: app.ID, Rate: p.HSMRate, Sessions: p.HSMSessions}
	if app.HSMRate != 0 {
		c.Rate = app.HSMRate
	}
	if app.HSMSessions != 0 {
		c.Sessions = app.HSMSessions
	}
	return c
}

// Trust says how other CAs' certificates are judged. The CAs themselves are decided on by administrators, in the journal.
type Trust struct {
	// Revocation is "hard" (default: an unknown or outdated status refuses signing) or "soft" (it signs, and the evidence
	// says that revocation was not checked).
	Revocation string      `toml:"revocation"`
	CRL        []CRLSource `toml:"crl"`
}

// CRLSource is where a CA publishes its revocation list.
type CRLSource struct {
	URL      string   `toml:"url"`      // http, https or file
	Interval Duration `toml:"interval"` // default 1h
}

// Database is the central database, which people query. Signing never waits for it.
type Database struct {
	// DSN says where: "" is the embedded one, central.db in the appliance's folder; postgres://… or dm://… are servers.
	// Never with a password.
	DSN          string `toml:"dsn"`
	PasswordFile string `toml:"password_file"`
	// Nodes are the other appliances that ship to this database. Rows of any other are named as foreign.
	Nodes []string `toml:"nodes"`
	// SweepEvery is how often the database is gone through in the background, by its MACs.
	SweepEvery Duration `toml:"sweep_every"`
	// ArchiveAfterMonths is how many whole months stay in the tables in use; those before are moved to the archive, once a
	// day. 0: none is moved by itself. Nothing is ever deleted.
	ArchiveAfterMonths int `toml:"archive_after_months"`
}

// Place is where connections go, with the password as the file has it now. dir is the appliance's folder.
func (d *Database) Place(dir string) (connect.Place, error) {
	if d.DSN == "" {
		return connect.File(filepath.Join(dir, "central.db")), nil
	}
	p := connect.Place{DSN: d.DSN}
	if d.PasswordFile != "" {
		password, err := ReadSecret(d.PasswordFile)
		if err != nil {
			return p, err
		}
		p.Password = string(password)
	}
	return p, nil
}

// Revocation policies.
const (
	RevocationHard = "hard"
	RevocationSoft = "soft"
)

// Evaluation are conveniences that no hospital uses in production; /health/state and the evidence name them.
type Evaluation struct {
	// Softtoken runs our software cipher machine as a child. Not a certified product.
	Softtoken bool `toml:"softtoken"`
	// Impersonate is a vendor profile, by name or file, to which our software cipher machine answers instead of its own.
	Impersonate string `toml:"impersonate"`
	// GNSSFeed runs chrony, fed by gpsd, fed by simulated BeiDou sentences of this machine's own clock.
	GNSSFeed bool `toml:"gnss_feed"`
}

// A Duration is written as "5s", "24h".
type Duration time.Duration

// UnmarshalText reads Go's duration syntax.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// MarshalText writes Go's duration syntax.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

var reNode = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)

// LoadConfig reads dir/config.toml. Everything wrong is reported at once, with the key's path.
func LoadConfig(dir string) (*Config, error) {
	name := filepath.Join(dir, "config.toml")
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s 不存在：请先运行 yinjian init --dir %s (no configuration: run yinjian init first)", name, dir)
	}
	if err != nil {
		return nil, err
	}
	c, err := ParseConfig(b, dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// ParseConfig reads a configuration; relative paths are taken from dir.
func ParseConfig(b []byte, dir string) (*Config, error) {
	c := new(Config)
	if err := decodeTOML(b, c); err != nil {
		return nil, err
	}
	c.setDefaults()
	abs := func(p *string) { abs(dir, p) }
	abs(&c.HSM.Module)
	if c.Admin.Theme != "" {
		abs(&c.Admin.Theme)
	}
	for i := range c.HSM.Machines {
		c.HSM.Machines[i].setDefaults(dir)
	}
	if profiles.IsPath(c.HSM.Profile) {
		abs(&c.HSM.Profile)
	}
	if profiles.IsPath(c.Evaluation.Impersonate) {
		abs(&c.Evaluation.Impersonate)
	}
	if c.TSA.Upstream != nil {
		c.TSA.Upstream.setDefaults(dir)
	}
	if c.HSM.Custody != nil {
		abs(&c.HSM.Custody.Officers)
	}
	for name, s := range c.HSM.Slots {
		abs(&s.PINFile)
		c.HSM.Slots[name] = s
	}
	abs(&c.Database.PasswordFile)
	c.Alarms.setDefaults(dir)
	for i := range c.Time.Sources {
		abs(&c.Time.Sources[i].KeyFile)
	}
	for i := range c.Listen.TSASources {
		for j := range c.Listen.TSASources[i].Certificates {
			abs(&c.Listen.TSASources[i].Certificates[j])
		}
	}
	return c, c.validate()
}

// decodeTOML reads a file strictly: an unknown key is an error that says where.
func decodeTOML(b []byte, v any) error {
	dec := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err := dec.Decode(v)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var errs []error
		for _, e := range strict.Errors {
			row, col := e.Position()
			errs = append(errs, fmt.Errorf("%d:%d: 未知的配置项 %s (unknown key)", row, col, strings.Join(e.Key(), ".")))
		}
		return errors.Join(errs...)
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		row, col := wrong.Position()
		return fmt.Errorf("%d:%d: %s: %w", row, col, strings.Join(wrong.Key(), "."), err)
	}
	return err
}

func (c *Config) setDefaults() {
	def(&c.HSM.CallDeadline, Duration(5*time.Second))
	def(&c.HSM.WrappedKeys, 1024)
	def(&c.HSM.Weight, 1)
	def(&c.HSM.Profile, "neutral")
	def(&c.HSM.PINSource, PINFromFile)
	def(&c.Time.MinSources, 2)
	def(&c.Time.Accuracy, Duration(time.Second))
	def(&c.Time.HoldoverMax, Duration(4*time.Hour))
	def(&c.Time.Poll, Duration(16*time.Second))
	def(&c.Time.DriftPPM, 50)
	for i := range c.TSA.Units {
		def(&c.TSA.Units[i].Accuracy, c.Time.Accuracy)
		def(&c.TSA.Units[i].Profile, "rfc3161")
	}
	def(&c.Database.SweepEvery, Duration(24*time.Hour))
	def(&c.Log.Level, "info")
	def(&c.Log.KeepDays, 365)
	def(&c.Policy.ReserveBytes, 256<<20)
	def(&c.Policy.TSAReservePercent, 10)
	def(&c.Policy.SegmentEntries, 1_000_000)
	def(&c.Policy.MaxBodyBytes, 16<<20)
	def(&c.Policy.Rate, 3000)
	def(&c.Policy.Burst, 2*c.Policy.Rate)
	def(&c.Policy.Concurrent, 1024) // 500 users at once is what hospitals ask for, and one application may hold half
	def(&c.Policy.AuthFailures, 120)
	def(&c.Policy.MaxConnections, 4096)
	def(&c.Policy.Drain, Duration(20*time.Second))
	for i := range c.Listen.TSASources {
		def(&c.Listen.TSASources[i].Rate, c.Policy.Rate)
		def(&c.Listen.TSASources[i].Burst, 2*c.Listen.TSASources[i].Rate)
	}
	c.Preserve.setDefaults()
	def(&c.Peer.Address, c.Listen.Peer)
	def(&c.Peer.MaxAge, Duration(24*time.Hour))
	def(&c.Peer.CosignEvery, Duration(10*time.Second))
	def(&c.Admin.Local, localOpen)
	def(&c.Admin.PasswordDays, int(account.MaxPasswordLife.Hours()/24))
	def(&c.Admin.PasswordMin, account.MinPassword)
	def(&c.Trust.Revocation, RevocationHard)
	for i := range c.Trust.CRL {
		def(&c.Trust.CRL[i].Interval, Duration(time.Hour))
	}
	for name, s := range c.HSM.Slots {
		def(&s.Sessions, 8)
		c.HSM.Slots[name] = s
	}
	if c.HSM.VerifyFresh == nil {
		yes := true
		c.HSM.VerifyFresh = &yes
	}
}

func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (c *Config) validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	}
	if !reNode.MatchString(c.Node) {
		bad("node", "须为小写字母、数字、点或连字符，1–63 位 (lower-case letters, digits, dots, hyphens)")
	}
	if c.Campus == "" || len(c.Campus) > 64 {
		bad("campus", "须为 1–64 字节 (1 to 64 bytes)")
	}
	c.Listen.validate(bad)
	if c.Database.SweepEvery < Duration(time.Second) {
		bad("database.sweep_every", "至少 1 秒 (at least a second)")
	}
	if n := c.Database.ArchiveAfterMonths; n < 0 || n > 1200 {
		bad("database.archive_after_months", "须为 0（不自动归档）或 1–1200 个月 (0: never by itself, or 1 to 1200 months)")
	}
	if d := c.Database; d.DSN != "" {
		if err := connect.Check(d.DSN); err != nil {
			bad("database.dsn", "%v", err)
		}
	} else if d.PasswordFile != "" {
		bad("database.password_file", "没有 database.dsn 时无意义 (means nothing without database.dsn)")
	}
	if _, err := profiles.Load(c.HSM.Profile); err != nil {
		bad("hsm.profile", "%v", err)
	}
	if v := c.Evaluation.Impersonate; v != "" {
		if !c.Evaluation.Softtoken {
			bad("evaluation.impersonate", "没有 evaluation.softtoken 时无意义 (means nothing without evaluation.softtoken)")
		}
		if _, err := profiles.Load(v); err != nil {
			bad("evaluation.impersonate", "%v", err)
		}
	}
	if c.HSM.Module == "" {
		bad("hsm.module", "缺少 PKCS#11 模块路径 (path of the PKCS#11 module is missing)")
	}
	if c.HSM.Custody != nil && (c.HSM.Custody.KEK == "" || len(c.HSM.Custody.KEK) > 128) {
		bad("hsm.custody.kek", "须为 1–128 字节 (1 to 128 bytes)")
	}
	if c.HSM.WrappedKeys < 1 || c.HSM.WrappedKeys > 1<<20 {
		bad("hsm.wrapped_keys", "须为 1–1048576 (1 to 1048576)")
	}
	below := func(at string) func(key, format string, args ...any) {
		return func(key, format string, args ...any) { bad(at+key, format, args...) }
	}
	for _, class := range hsm.Classes {
		if _, ok := c.HSM.Slots[string(class)]; !ok && class != hsm.TLS {
			bad("hsm.slots."+string(class), "缺少 (missing)")
		}
	}
	locked := c.HSM.PINSource == PINFromUnlock
	if s := c.HSM.PINSource; s != PINFromFile && !locked {
		bad("hsm.pin_source", "须为 file 或 unlock (must be file or unlock)")
	}
	validateSlots(c.HSM.Slots, locked, below("hsm."))
	validateWeight(c.HSM.Weight, below("hsm."))
	names := map[string]bool{}
	for i := range c.HSM.Machines {
		m := &c.HSM.Machines[i]
		at := fmt.Sprintf("hsm.machines[%d].", i)
		m.validate(locked, below(at))
		if names[m.Name] {
			bad(at+"name", "%s 重复 (given twice)", m.Name)
		}
		names[m.Name] = true
	}
	if len(c.HSM.Machines) >= pool.Most {
		bad("hsm.machines", "连同 main 至多 %d 台 (at most %d, main included)", pool.Most, pool.Most)
	}
	if c.Time.MinSources < 1 {
		bad("time.min_sources", "至少为 1 (at least 1)")
	}
	if len(c.Time.Sources) == 0 && !c.Evaluation.GNSSFeed {
		bad("time.sources", "至少需要一个时间源 (at least one source)")
	}
	groups := map[string]bool{}
	for i, s := range c.Time.Sources {
		key := fmt.Sprintf("time.sources[%d]", i)
		if s.Name == "" || s.Group == "" {
			bad(key, "缺少 name 或 group (name and group are needed)")
		}
		if _, _, err := net.SplitHostPort(s.Address); err != nil {
			bad(key+".address", "须为 host:port (%v)", err)
		}
		groups[s.Group] = true
	}
	if c.Evaluation.GNSSFeed {
		groups["evaluation-feed"] = true
	}
	if len(groups) < c.Time.MinSources {
		bad("time.min_sources", "只有 %d 组时间源，达不到 %d (only %d groups of sources)", len(groups), c.Time.MinSources, len(groups))
	}
	if a := time.Duration(c.Time.Accuracy); a < 10*time.Millisecond || a > 10*time.Second {
		bad("time.accuracy", "须在 10ms 与 10s 之间 (between 10ms and 10s)")
	}
	c.validateUnits(bad)
	if c.TSA.Upstream != nil {
		c.TSA.Upstream.validate(c, bad)
	}
	if c.Policy.MaxBodyBytes < 1<<20 || c.Policy.MaxBodyBytes > 256<<20 {
		bad("policy.max_body_bytes", "须在 1 MiB 与 256 MiB 之间 (between 1 MiB and 256 MiB)")
	}
	if p := c.Policy.TSAReservePercent; p < 1 || p > 100 {
		bad("policy.tsa_reserve_percent", "须为 1–100 (1 to 100)")
	}
	if err := c.Log.check(); err != nil {
		key, why, _ := strings.Cut(err.Error(), ": ")
		bad(key, "%s", why)
	}
	if c.Policy.SegmentEntries < 10 {
		bad("policy.segment_entries", "至少 10 (at least 10)")
	}
	for _, n := range []struct {
		key                string
		value, least, most int
	}{
		{"time.drift_ppm", c.Time.DriftPPM, 15, 500},
		{"policy.rate", c.Policy.Rate, 1, account.MaxRate},
		{"policy.burst", c.Policy.Burst, 1, account.MaxBurst},
		{"policy.hsm_rate", c.Policy.HSMRate, 0, account.MaxRate},
		{"policy.hsm_sessions", c.Policy.HSMSessions, 0, account.MaxSessions},
		{"policy.concurrent", c.Policy.Concurrent, 1, 10_000},
		{"policy.auth_failures", c.Policy.AuthFailures, 1, 100_000},
		{"policy.max_connections", c.Policy.MaxConnections, 16, 100_000},
	} {
		if n.value < n.least || n.value > n.most {
			bad(n.key, "须为 %d–%d (%d to %d)", n.least, n.most, n.least, n.most)
		}
	}
	if d := time.Duration(c.Policy.Drain); d < time.Second || d > 5*time.Minute {
		bad("policy.drain", "须在 1s 与 5m 之间 (between 1s and 5m)")
	}
	c.Preserve.validate(bad)
	c.validatePeer(bad)
	c.Alarms.validate(bad)
	c.validateAdmin(bad)
	if r := c.Trust.Revocation; r != RevocationHard && r != RevocationSoft {
		bad("trust.revocation", "须为 hard 或 soft (must be hard or soft)")
	}
	urls := map[string]bool{}
	for i, s := range c.Trust.CRL {
		key := fmt.Sprintf("trust.crl[%d]", i)
		if err := fetch.CheckURL(s.URL); err != nil || urls[s.URL] {
			bad(key+".url", "须为 http、https 或 file 地址，不可重复 (http, https or file, each once): %v", err)
		}
		urls[s.URL] = true
		if d := time.Duration(s.Interval); d < 10*time.Second || d > 7*24*time.Hour {
			bad(key+".interval", "须在 10s 与 168h 之间 (between 10s and 168h)")
		}
	}
	return errors.Join(errs...)
}
