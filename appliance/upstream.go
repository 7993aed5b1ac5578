package appliance

import (
	"context"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api/stampclient"
	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/tsa"
	"yinjian/tsa/upstream"
)

// kindUpstream is a change of the upstream device's standing.
const kindUpstream = "tsa.upstream"

// Upstream is a timestamp device that the hospital has already, and when it is asked. Its CA is admitted for timestamps like
// any other (yinjian anchor add), and its revocation lists are imported.
type Upstream struct {
	// 医院已有的时间戳设备的名称，写入日志与证据；见 [upstream.md](upstream.md) (an existing timestamp device)
	// 缺省：必填；不写 `[tsa.upstream]` 即无上游
	Name string `toml:"name"`
	// 其地址，http 或 https，不含用户名口令 (where it is)
	// 缺省：必填
	URL string `toml:"url"`
	// `inside`、`upstream`、`inside-then-upstream`、`upstream-then-inside` (who is asked first, and whether the other stands
	// in)
	// 缺省：`inside-then-upstream`
	Order string `toml:"order"`
	// 为哪些单元设此上游 (the units that it stands beside)
	// 缺省：全部 all
	Units []string `toml:"units"`
	// 一次往返的时限，100ms–10s (of one exchange)
	// 缺省：`2s`
	Timeout Duration `toml:"timeout"`
	// 连续几次失败后停问 (failures in a row before it is left alone)
	// 缺省：`3`
	Failures int `toml:"failures"`
	// 停问或空闲时多久问一次，1s–1h (how often it is asked while down or idle)
	// 缺省：`30s`
	Probe Duration `toml:"probe"`
	// 时间戳不说精度时按此算，不超过 `time.accuracy` (assumed for tokens that do not say theirs)
	// 缺省：不写即拒绝此类
	Accuracy Duration `toml:"accuracy"`
	// genTime 在双方误差之外还可差多少，至多 5s；只到秒的设备需要 (how far genTime may be off beyond both accuracies)
	// 缺省：`1s`
	Allowance Duration `toml:"allowance"`
	// 其时间戳可有的策略 OID (policies that its tokens may have)
	// 缺省：任意 any
	Policies []string `toml:"policies"`
	// 本机时间不可信时不要上游时间戳；`false` 只放宽单独的 `/tsa` 请求 (no tokens while own time is not trusted; false
	// loosens free-standing requests alone)
	// 缺省：`true`
	RequireOwnTime *bool `toml:"require_own_time"`
	// PEM 文件：设备的证书与中间 CA，供不带证书的时间戳用 (for tokens without certificates)
	// 缺省：无
	Certificates string `toml:"certificates"`
	// HTTP 基本认证的用户名 (HTTP basic authentication)
	// 缺省：不认证
	User string `toml:"user"`
	// 其口令文件，权限 600 (file with its password)
	// 缺省：无
	PasswordFile string `toml:"password_file"`
	// PEM 文件：设备网站证书的 CA (CAs of its web server)
	// 缺省：系统的 the system's
	TLSRoots string `toml:"tls_roots"`
}

// Orders of asking.
const (
	orderInside       = "inside"
	orderUpstream     = "upstream"
	orderInsideFirst  = "inside-then-upstream"
	orderUpstreamOnce = "upstream-then-inside"
)

func (u *Upstream) setDefaults(dir string) {
	def(&u.Order, orderInsideFirst)
	def(&u.Timeout, Duration(2*time.Second))
	def(&u.Failures, 3)
	def(&u.Probe, Duration(30*time.Second))
	def(&u.Allowance, Duration(time.Second))
	if u.RequireOwnTime == nil {
		yes := true
		u.RequireOwnTime = &yes
	}
	abs(dir, &u.Certificates)
	abs(dir, &u.PasswordFile)
	abs(dir, &u.TLSRoots)
}

func (u *Upstream) validate(c *Config, bad func(key, format string, args ...any)) {
	if !reUnit.MatchString(u.Name) {
		bad("tsa.upstream.name", "须为小写字母、数字、连字符，至多 31 位 (lower-case letters, digits, hyphens)")
	}
	if err := stampclient.CheckURL(u.URL); err != nil {
		bad("tsa.upstream.url", "%v", err)
	}
	if !slices.Contains([]string{orderInside, orderUpstream, orderInsideFirst, orderUpstreamOnce}, u.Order) {
		bad("tsa.upstream.order", "须为 %s、%s、%s 或 %s (must be one of these)", orderInside, orderUpstream, orderInsideFirst, orderUpstreamOnce)
	}
	for _, name := range u.Units {
		if !slices.ContainsFunc(c.units(), func(x Unit) bool { return x.Name == name }) {
			bad("tsa.upstream.units", "没有单元 %s (no such unit)", name)
		}
	}
	within := func(key string, d Duration, least, most time.Duration) {
		if time.Duration(d) < least || time.Duration(d) > most {
			bad("tsa.upstream."+key, "须在 %v 与 %v 之间 (between these)", least, most)
		}
	}
	within("timeout", u.Timeout, 100*time.Millisecond, 10*time.Second)
	within("probe", u.Probe, time.Second, time.Hour)
	within("accuracy", u.Accuracy, 0, time.Duration(c.Time.Accuracy))
	within("allowance", u.Allowance, 0, 5*time.Second)
	if u.Failures < 1 || u.Failures > 100 {
		bad("tsa.upstream.failures", "须为 1–100 (1 to 100)")
	}
	for _, p := range u.Policies {
		if _, err := parseOID(p); err != nil {
			bad("tsa.upstream.policies", "%q 须为点分对象标识符 (want a dotted object identifier): %v", p, err)
		}
	}
	if (u.User == "") != (u.PasswordFile == "") {
		bad("tsa.upstream.user", "user 与 password_file 须同时给出 (give both or neither)")
	}
}

// An upstreamDevice is the configured device, and who is told of its standing.
type upstreamDevice struct {
	*upstream.Device
	a       *Appliance
	cfg     *Upstream
	client  io.Closer
	changes chan error
}

// openUpstream makes the device; nil when none is configured. Nothing is asked yet.
func (a *Appliance) openUpstream() (*upstreamDevice, error) {
	u := a.cfg.TSA.Upstream
	if u == nil {
		return nil, nil
	}
	transport := stampclient.Config{URL: u.URL, User: u.User, Now: func() time.Time { return apiClock{a}.Now().Time }}
	var own []*smx509.Certificate
	if u.PasswordFile != "" {
		secret, err := ReadSecret(u.PasswordFile)
		if err != nil {
			return nil, fmt.Errorf("tsa.upstream.password_file: %w", err)
		}
		transport.Password = string(secret)
	}
	if u.TLSRoots != "" {
		b, err := os.ReadFile(u.TLSRoots)
		if err != nil {
			return nil, fmt.Errorf("tsa.upstream.tls_roots: %w", err)
		}
		transport.Roots = x509.NewCertPool()
		if !transport.Roots.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("tsa.upstream.tls_roots: %s: 没有可用的证书 (no certificate that TLS can use)", u.TLSRoots)
		}
	}
	if u.Certificates != "" {
		b, err := os.ReadFile(u.Certificates)
		if err == nil {
			own, err = pki.ParseCertificatePEMs(b)
		}
		if err != nil {
			return nil, fmt.Errorf("tsa.upstream.certificates: %w", err)
		}
	}
	var policies []asn1.ObjectIdentifier
	for _, p := range u.Policies {
		oid, err := parseOID(p)
		if err != nil {
			return nil, fmt.Errorf("tsa.upstream.policies: %w", err)
		}
		policies = append(policies, oid)
	}
	client, err := stampclient.New(transport)
	if err != nil {
		return nil, err
	}
	d := &upstreamDevice{a: a, cfg: u, client: client, changes: make(chan error, 16)}
	d.Device, err = upstream.New(upstream.Config{
		Name: u.Name, Ask: client.Ask, Clock: a.clock, Timeout: time.Duration(u.Timeout), Failures: u.Failures, Probe: time.Duration(u.Probe),
		Policies: policies, Assumed: time.Duration(u.Accuracy), MaxAccuracy: time.Duration(a.cfg.Time.Accuracy), Allowance: time.Duration(u.Allowance),
		Certificates: own, Anchors: func() []*smx509.Certificate { return a.directory.AnchorsFor(pki.TimeStamping) },
		Standing: func(path []*smx509.Certificate, at time.Time) error {
			_, err := a.directory.Standing(path, pki.TimeStamping, at)
			return err
		},
		OnChange: func(why error) {
			select {
			case d.changes <- why:
			default: // the journal stands still; the state is shown as it is
				a.log.WithField("device", u.Name).WithError(why).Error("a change of the upstream device could not be journalled")
			}
		},
		Log: a.log,
	})
	return d, err
}

// run keeps asking the device, and journals its going and coming, until ctx ends.
func (d *upstreamDevice) run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	defer d.client.Close()
	for {
		select {
		case why := <-d.changes:
			state, reason := "up", ""
			if why != nil {
				state, reason = "down", reasonOf(why)
			}
			d.a.log.WithField("device", d.Name()).WithField("state", state).WithField("reason", reason).Warning("the upstream timestamp device changed state")
			_, err := d.a.journal.Append(ctx, audit.Draft{
				Kind: kindUpstream, Actor: "tsa", Object: "upstream/" + d.Name(),
				Fields: []audit.Field{{Name: "state", Value: audit.Text(state)}, {Name: "reason", Value: audit.Text(reason)}},
			})
			if err != nil && ctx.Err() == nil {
				d.a.log.WithError(err).Error("a change of the upstream device could not be journalled")
			}
		case err := <-done:
			return err
		}
	}
}

// reasonOf is one word for a refusal, fit for journal and evidence: neither paths nor labels.
func reasonOf(err error) string {
	var e *upstream.Error
	var p *problem.Problem
	switch {
	case errors.As(err, &e):
		if e.Reason == upstream.Down && e.Err != nil {
			return string(upstream.Down) + ", " + reasonOf(e.Err)
		}
		return string(e.Reason)
	case errors.Is(err, tsa.ErrTimeNotAvailable):
		return "time-not-available"
	case errors.Is(err, tsa.ErrCertificateNotValid), errors.Is(err, errUncertified):
		return "certificate"
	case errors.As(err, &p):
		return string(p.Code)
	}
	return "failed"
}

// A stampUnit is a timestamp unit as signatures and clients see it.
type stampUnit interface {
	sign.Stamper
	sign.Foreteller
	Respond(ctx context.Context, der []byte) []byte
}

// stamper is the unit itself, or the choice between it and the upstream device.
func (a *Appliance) stamper(u *unit) stampUnit {
	d := a.device
	if d == nil || d.cfg.Order == orderInside || len(d.cfg.Units) > 0 && !slices.Contains(d.cfg.Units, u.name) {
		return u
	}
	return &choice{a, u, d}
}

// A choice has tokens made by one of our units or by the upstream device, in the configured order: the first that can. Which
// it was, and why not the one before it, goes into the token's entry. Safe for concurrent use.
type choice struct {
	a      *Appliance
	unit   *unit
	device *upstreamDevice
}

// A maker is one of the two.
type maker struct {
	by    string
	ready func() error
	path  func() []*smx509.Certificate // that its tokens will have; none when it is not known
	// issue makes a token. For a client's own request nonce is what the client sent, none if it sent none.
	issue func(ctx context.Context, req *tsa.Request, clients bool) (*tsa.Token, error)
}

func (c *choice) makers() []maker {
	inside := maker{"unit/" + c.unit.name, c.insideReady, c.unit.Chain, c.issueInside}
	outside := maker{"upstream/" + c.device.Name(), c.device.ready, c.device.Path, c.device.issue}
	switch c.device.cfg.Order {
	case orderUpstream:
		return []maker{outside}
	case orderUpstreamOnce:
		return []maker{outside, inside}
	}
	return []maker{inside, outside}
}

func (c *choice) insideReady() error {
	if err := c.unit.Ready(); err != nil {
		return err
	}
	r := c.a.clock.Now()
	if !r.Trusted() {
		return fmt.Errorf("%w: clock is %s", tsa.ErrTimeNotAvailable, r.State)
	}
	_, err := c.a.directory.Standing(c.unit.Chain(), pki.TimeStamping, r.Time)
	return err
}

func (c *choice) issueInside(ctx context.Context, req *tsa.Request, _ bool) (*tsa.Token, error) {
	path := c.unit.Chain()
	token, err := c.unit.Issue(ctx, req)
	if err != nil {
		return nil, err
	}
	if now := c.unit.Chain(); !now[0].Equal(path[0]) { // which of the two made the token?
		return nil, errors.New("the unit's certificate was replaced meanwhile")
	}
	token.Origin = tsa.Origin{By: "unit/" + c.unit.name, Path: path}
	return token, nil
}

// ready also looks at the certificate that the device had last. When it has another, a probe finds out.
func (d *upstreamDevice) ready() error {
	if err := d.Down(); err != nil {
		return &upstream.Error{Device: d.Name(), Reason: upstream.Down, Err: err}
	}
	path, r := d.Path(), d.a.clock.Now()
	if path == nil || !r.Trusted() {
		return nil
	}
	if _, err := d.a.directory.Standing(path, pki.TimeStamping, r.Time); err != nil {
		return &upstream.Error{Device: d.Name(), Reason: upstream.Revocation, Err: err}
	}
	return nil
}

// issue passes a client's request on as it is; only of such a one may genTime go unjudged, if the configuration says so.
func (d *upstreamDevice) issue(ctx context.Context, req *tsa.Request, clients bool) (*tsa.Token, error) {
	if !clients {
		return d.Issue(ctx, req)
	}
	query, err := req.Bytes()
	if err != nil {
		return nil, err
	}
	_, token, err := d.Relay(ctx, query, *d.cfg.RequireOwnTime)
	return token, err
}

func (c *choice) issue(ctx context.Context, req *tsa.Request, clients bool) (*tsa.Token, error) {
	var instead []string
	var errs []error
	for _, m := range c.makers() {
		err := m.ready()
		var token *tsa.Token
		if err == nil {
			token, err = m.issue(ctx, req, clients)
		}
		if err == nil {
			token.Origin.Instead = strings.Join(instead, "; ")
			return token, nil
		}
		var fault *tsa.RequestError
		if errors.As(err, &fault) || ctx.Err() != nil { // nobody else would say otherwise, or nobody waits
			return nil, err
		}
		var away *upstream.Error
		if log := c.a.log.WithError(err).WithField("maker", m.by); errors.As(err, &away) && away.Reason == upstream.Down {
			log.Debug("no token of this maker") // that it is down was said once
		} else {
			log.Warning("no token of this maker")
		}
		instead = append(instead, m.by+": "+reasonOf(err))
		errs = append(errs, err)
	}
	return nil, c.refusal(instead, errs)
}

func (c *choice) refusal(instead []string, errs []error) error {
	words := strings.Join(instead, "; ")
	if !slices.ContainsFunc(errs, func(err error) bool {
		var e *upstream.Error
		return !errors.Is(err, tsa.ErrTimeNotAvailable) && !(errors.As(err, &e) && e.Reason == upstream.OwnTime)
	}) {
		return fmt.Errorf("%w: %s", tsa.ErrTimeNotAvailable, words)
	}
	return problem.New(problem.NotReady, fmt.Sprintf("本机单元与上游设备都未能盖时间戳：%s (no timestamp could be had: %s)", words, words),
		"稍后用同一 Idempotency-Key 重试；管理员见 yinjian status (retry later with the same key; administrators see yinjian status)").With(errors.Join(errs...))
}

// Issue satisfies sign.Stamper. Whatever the configuration says, genTime is held against our own clock: a signature is
// judged at it.
func (c *choice) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	return c.issue(ctx, req, false)
}

// Ready satisfies sign.Foreteller.
func (c *choice) Ready() error {
	var instead []string
	var errs []error
	for _, m := range c.makers() {
		err := m.ready()
		if err == nil {
			return nil
		}
		instead, errs = append(instead, m.by+": "+reasonOf(err)), append(errs, err)
	}
	return c.refusal(instead, errs)
}

// Chain satisfies sign.Stamper: what the token will probably be signed under, none while that is not known. Whose it was
// stands in the token's Origin.
func (c *choice) Chain() []*smx509.Certificate {
	for _, m := range c.makers() {
		if m.ready() == nil {
			return m.path()
		}
	}
	return nil
}

// Respond answers a client's DER request.
func (c *choice) Respond(ctx context.Context, der []byte) []byte {
	r := tsa.Responder{
		Issuer: clients{c}, Recorder: gatedRecorder{c.a.service, TokenRecorder{c.a.journal, c.unit.name}}, Discarded: c.a.accounting.discard,
		Log: c.a.log.WithField("unit", c.unit.name),
	}
	return r.Respond(ctx, der)
}

// clients makes tokens for clients' own requests.
type clients struct{ c *choice }

func (k clients) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	return k.c.issue(ctx, req, true)
}

// An upstreamState is the device in /health/state.
type upstreamState struct {
	Device  string                     `json:"device"`
	Order   string                     `json:"order"`
	State   string                     `json:"state"` // "up", "down"
	Reason  string                     `json:"reason,omitempty"`
	Stamped uint64                     `json:"stamped"`
	Refused map[upstream.Reason]uint64 `json:"refused"`
}

func (d *upstreamDevice) state() *upstreamState {
	if d == nil {
		return nil
	}
	stats := d.Stats()
	s := &upstreamState{Device: d.Name(), Order: d.cfg.Order, State: "up", Stamped: stats.Stamped, Refused: stats.Refused}
	if err := d.Down(); err != nil {
		s.State, s.Reason = "down", reasonOf(err)
	}
	return s
}

func (d *upstreamDevice) warnings() []string {
	if d == nil {
		return nil
	}
	var out []string
	if err := d.Down(); err != nil {
		out = append(out, fmt.Sprintf("上游时间戳设备 %s 不可用 (the upstream timestamp device is not usable): %s", d.Name(), reasonOf(err)))
	}
	if !*d.cfg.RequireOwnTime {
		out = append(out, "本机时间不可信时仍转发上游时间戳，其时间未经本机核对 (upstream tokens are relayed also while own time is not trusted; nobody here has looked at their time)")
	}
	return out
}

// serves says whether the device stands in for units that stamp nothing.
func (d *upstreamDevice) serves() bool {
	return d != nil && d.cfg.Order != orderInside && d.Down() == nil
}

// only says whether nothing but the device stamps for some unit.
func (d *upstreamDevice) only() bool { return d != nil && d.cfg.Order == orderUpstream }

// metrics are in Prometheus' text format.
func (d *upstreamDevice) metrics(w io.Writer) {
	if d == nil {
		return
	}
	s := d.state()
	up := 0
	if s.State == "up" {
		up = 1
	}
	fmt.Fprintf(w, "# HELP yinjian_upstream_up Whether the upstream timestamp device is asked.\n# TYPE yinjian_upstream_up gauge\nyinjian_upstream_up{device=%q} %d\n", s.Device, up)
	fmt.Fprintf(w, "# HELP yinjian_upstream_tokens_total Tokens had from it, verified.\n# TYPE yinjian_upstream_tokens_total counter\nyinjian_upstream_tokens_total{device=%q} %d\n", s.Device, s.Stamped)
	fmt.Fprint(w, "# HELP yinjian_upstream_refused_total Answers of it that were not used, and failures, by reason.\n# TYPE yinjian_upstream_refused_total counter\n")
	for _, reason := range slices.Sorted(maps.Keys(s.Refused)) {
		fmt.Fprintf(w, "yinjian_upstream_refused_total{device=%q,reason=%q} %d\n", s.Device, reason, s.Refused[reason])
	}
}
