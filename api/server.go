// Package api is the appliance's HTTP face: it reads requests strictly, knows who sent them, hands them to the
// services, and turns every error into problem+json (RFC 9457). It decides nothing that belongs to a service.
//
// Four handlers stand side by side. [Server.Handler] serves business systems over TLS 1.3, each request
// authenticated by HMAC-SM3 (package wire, docs/api-auth.md); openapi.json is its contract. [Server.AdminHandler]
// serves the local socket, where the kernel says who calls (SO_PEERCRED), and [Server.NewAdminTLSServer] the same routes over
// TLS to administrators who have logged in. [Server.TSAPlainHandler] serves RFC 3161
// §3.4 without TLS to this machine and to listed sources, for programs that speak nothing else. A folder that is no appliance yet has
// servers of its own: [NewDesk] at the local socket, [NewRestoreServer] where a backup is waited for.
//
// The interfaces below are what api asks of the services; appliance joins the two.
package api

import (
	"context"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"yinjian/api/console"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/ntp"
)

// Signing signs, verifies and answers evidence. Methods are called concurrently; a refusal is a *problem.Problem.
type Signing interface {
	// Sign has the request's form checked already (lengths, alphabets, exactly one of content and digest), and the
	// application authenticated, running and with the right to sign.
	Sign(ctx context.Context, app *account.Application, req *sign.Request) (*sign.Result, error)
	// Verify answers a report, shown as its JSON.
	Verify(ctx context.Context, req *sign.VerifyRequest) (*evidence.Report, error)
	// Evidence answers the bundle as JSON. Whether app may read the record is for the service to say.
	Evidence(ctx context.Context, app *account.Application, recordID string) ([]byte, error)
}

// Directory knows applications and certificates.
type Directory interface {
	// Application answers one and its HMAC key; it must not block, since every request asks.
	Application(id string) (app *account.Application, key []byte, ok bool)
	// ClientApplication is the application that a TLS client certificate alone stands for, "" for none; it must not block.
	ClientApplication(cert *x509.Certificate) (id string)
	// CheckClient says whether the certificates that a TLS client has shown, its own first, are what the application is bound
	// to, and fit at a time.
	CheckClient(app *account.Application, shown []*x509.Certificate, at time.Time) error
	Authorize(ctx context.Context, app *account.Application, req account.GrantRequest) (*account.Grant, error)
	// Certificate takes the serial in lower-case hex.
	Certificate(serial string) (*account.CertificateStatus, bool)
}

// Stamps are the timestamp units.
type Stamps interface {
	Units() []string // the first is the default
	// Respond answers a DER TimeStampResp, also for a refusal; an error only for an unknown unit.
	Respond(ctx context.Context, unit, requester string, der []byte) ([]byte, error)
}

// Health is how the appliance is.
type Health interface {
	Alive() error
	Ready() (ok bool, reasons []string) // reasons are shown without authentication: no paths, labels or addresses
	State() any                         // shown as its JSON to authenticated callers
	Metrics() []byte                    // for a monitor on this machine, in Prometheus' text format 0.0.4
}

// Clock is the trusted time.
type Clock interface{ Now() ntp.Reading }

// Limits bound what callers may take. The zero value of each field is its default.
type Limits struct {
	Body       int64         // bytes of a body of sign and verify; 16 MiB
	SmallBody  int64         // of the other JSON routes; 64 KiB
	StampQuery int64         // of a TimeStampReq; 16 KiB
	InFlight   int64         // bytes of all bodies being read, handled or answered, shared among addresses; 256 MiB or four Bodies
	Concurrent int           // requests being handled, not counting health, shared among applications, and a quarter more items of batches; 512
	Handling   time.Duration // of one request, after its body was read; 30 s
	Sending    time.Duration // of one answer to a client that reads slowly; 30 s
	Window     time.Duration // by which a request's time may be off; 5 min
	// Failures are the failed authentications a minute that one address may make; 120.
	Failures int

	// Rate answers how many requests a second an application may make, and how many at once. Nil means 3000 and
	// 6000 for each. It is asked for each request.
	Rate func(app *account.Application) (perSecond, burst int)
	// LoopbackRate and LoopbackBurst are the quota of [LoopbackSource]; 3000 and 6000.
	LoopbackRate, LoopbackBurst int
	// Nonces remembered of one application. 0 means what its rate can bring within both halves of the window: at 3000 a
	// second some 2 million, 100 MB at worst, for an application that does so.
	Nonces int
}

// nonces is how many of app's are remembered.
func (l *Limits) nonces(app *account.Application) int {
	if l.Nonces != 0 {
		return l.Nonces
	}
	perSecond, burst := l.Rate(app)
	return perSecond*int(2*l.Window/time.Second) + burst
}

func (l Limits) filled() Limits {
	def := func(n *int64, v int64) {
		if *n == 0 {
			*n = v
		}
	}
	def(&l.Body, 16<<20)
	def(&l.SmallBody, 64<<10)
	def(&l.StampQuery, 16<<10)
	def(&l.InFlight, max(256<<20, 4*l.Body))
	if l.Concurrent == 0 {
		l.Concurrent = 512
	}
	if l.Handling == 0 {
		l.Handling = 30 * time.Second
	}
	if l.Sending == 0 {
		l.Sending = 30 * time.Second
	}
	if l.Failures == 0 {
		l.Failures = 120
	}
	if l.Window == 0 {
		l.Window = 5 * time.Minute
	}
	if l.LoopbackRate == 0 {
		l.LoopbackRate = 3000
	}
	if l.LoopbackBurst == 0 {
		l.LoopbackBurst = 2 * l.LoopbackRate
	}
	if l.Rate == nil {
		l.Rate = func(*account.Application) (int, int) { return 3000, 6000 }
	}
	return l
}

// Config is what a Server is made of. All fields but Limits, Theme, Sources, ReplayFile and Succeeds are required.
type Config struct {
	Signing   Signing
	Directory Directory
	Stamps    Stamps
	Tokens    Tokens
	Health    Health
	Admin     Admin
	Accounts  Accounts
	// Theme is how the console looks; nil: as ours does.
	Theme   *console.Theme
	Clock   Clock
	Log     logrus.FieldLogger
	Version string
	Limits  Limits
	// AdminLogin: the local socket asks for a login, as the listener of [Server.NewAdminTLSServer] always does.
	AdminLogin bool
	// Evaluation: a drill needs one person alone.
	Evaluation bool
	// Names are the hosts, without a port, that this appliance is called by. A request for another host is somebody's who sends
	// on what was meant for another appliance that has the same applications. Empty: any host.
	Names   []string
	Sources []Source // who may use /tsa/{unit} without a key
	// ReplayFile keeps, over a restart, up to which time each application's requests were let through. Its folder
	// exists; nobody else writes it. Without it a request dated after the restart (by a client whose clock is ahead)
	// could be let through once more.
	ReplayFile string
	// Succeeds, if set, is when this appliance took over from one whose floors it does not have: what that one let through
	// is dated Limits.Window after it at most, and requests dated up to then are refused.
	Succeeds time.Time
}

// A Server is the HTTP face. Its handlers may be used by several http.Servers at once.
type Server struct {
	cfg     Config
	limits  Limits
	guard   *replayGuard
	failed  *failures
	refused refusals
	rates   rates
	sources *sources
	bodies  *shares[netip.Prefix] // bytes, by address
	slots   *shares[string]       // requests, by application
	beside  *shares[string]       // items of batches that are under way beside the first of each, by application
	// arrivals are for the makers of applications.
	arrivals arrivals

	// standing is a desk's; without it the state is operational.
	standing func() (State, *problem.Problem)

	sessions  *sessions
	guesses   *failures // of logins
	proposals *proposals
	console   *console.Console

	signing, admin, adminTLS, plain *echo.Echo
}

//go:embed openapi.json
var openAPI []byte

// New builds the handlers. It reads the clock once: requests older than that reading are refused.
func New(cfg Config) (*Server, error) {
	for name, missing := range map[string]bool{
		"Signing": cfg.Signing == nil, "Directory": cfg.Directory == nil, "Stamps": cfg.Stamps == nil, "Tokens": cfg.Tokens == nil, "Health": cfg.Health == nil,
		"Admin": cfg.Admin == nil, "Accounts": cfg.Accounts == nil, "Clock": cfg.Clock == nil, "Log": cfg.Log == nil, "Version": cfg.Version == "",
	} {
		if missing {
			return nil, fmt.Errorf("api: config: %s is missing", name)
		}
	}
	l := cfg.Limits.filled()
	for _, n := range []int64{l.Body, l.SmallBody, l.StampQuery, l.InFlight, int64(l.Concurrent), int64(l.Handling), int64(l.Sending), int64(l.Window), int64(l.Failures), int64(l.LoopbackRate), int64(l.LoopbackBurst), int64(l.Nonces)} {
		if n < 0 {
			return nil, errors.New("api: config: negative limit")
		}
	}
	if l.InFlight < 2*(l.Body+1) {
		return nil, errors.New("api: config: InFlight is less than two Bodies") // one address gets half
	}
	known, err := newSources(cfg.Sources, l.LoopbackRate, l.LoopbackBurst)
	if err != nil {
		return nil, err
	}
	from := cfg.Clock.Now().Time
	if until := cfg.Succeeds.Add(l.Window); !cfg.Succeeds.IsZero() && until.After(from) {
		from = until
	}
	guard, err := openReplayGuard(cfg.ReplayFile, from, l.Window, cfg.Log)
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, limits: l, guard: guard,
		failed:  newFailures(l.Failures),
		rates:   rates{limit: l.Rate, of: map[string]*rate.Limiter{}},
		sources: known,
		bodies:  newShares[netip.Prefix](l.InFlight),
		slots:   newShares[string](int64(l.Concurrent)),
		beside:  newShares[string](int64(l.Concurrent) / 4),
	}
	s.sessions, s.guesses, s.proposals = newSessions(), newFailures(loginsPerMinute), newProposals()
	s.signing, s.admin, s.adminTLS, s.plain = s.echo(), s.echo(), s.echo(), s.echo()
	s.signing.Pre(s.plainly)
	s.adminTLS.Pre(s.plainly, s.atHome)
	s.signingRoutes(s.signing)
	for _, e := range []*echo.Echo{s.admin, s.adminTLS} {
		s.adminRoutes(e)
		if err := checkMatrix(e.Routes()); err != nil {
			return nil, err
		}
	}
	s.plainRoutes(s.plain)
	if err := s.newConsole(); err != nil {
		return nil, err
	}
	return s, nil
}

// Close stores how far requests were let through and refuses those that come later. Call it when the http.Servers
// have stopped; without it the next run refuses requests of the first seconds.
func (s *Server) Close() error {
	s.console.Close()
	s.proposals.close()
	return s.guard.close()
}

// Handler serves business systems; for TLS only.
func (s *Server) Handler() http.Handler { return s.signing }

// AdminHandler serves the local socket. Its http.Server must come from [NewAdminServer], which learns who calls; any
// other caller is refused.
func (s *Server) AdminHandler() http.Handler { return s.admin }

// atHome refuses requests for a host that this appliance is not called: a page of somebody else's that had its name point here
// would be of one origin with it.
func (s *Server) atHome(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if !s.named(c.Request().Host) {
			return problem.Invalid("header.Host", "请求不是给本机的,Host 不在 listen.names 之内 (the request is for another appliance: its Host is none of listen.names)")
		}
		return next(c)
	}
}

// TSAPlainHandler serves /tsa/{unit} to listed sources and to this machine itself, and /health/alive, without TLS.
func (s *Server) TSAPlainHandler() http.Handler { return s.plain }

func (s *Server) echo() *echo.Echo {
	e := echo.New()
	e.HideBanner, e.HidePort = true, true
	e.Logger.SetOutput(io.Discard) // echo has its own; ours is cfg.Log
	e.HTTPErrorHandler = s.fail
	e.IPExtractor = echo.ExtractIPDirect() // nobody's X-Forwarded-For is believed
	e.Pre(s.identify, s.recovered)
	return e
}

func (s *Server) signingRoutes(e *echo.Echo) {
	l := s.limits
	post, get := e.POST, e.GET
	post("/v1/sign", s.authenticated(lend(jsonBody(l.Body)), account.RightSign, s.sign))
	post("/v1/batches", s.authenticated(lend(jsonBody(l.Body)), account.RightSign, s.batch))
	post("/v1/verify", s.authenticated(jsonBody(l.Body), account.RightVerify, s.verify))
	post("/v1/timestamp", s.authenticated(jsonBody(l.SmallBody), account.RightTimestamp, s.timestamp))
	post("/v1/authorizations", s.authenticated(jsonBody(l.SmallBody), account.RightSign, s.authorize))
	get("/v1/evidence/:id", s.authenticated(noBody, "", s.evidence))
	get("/v1/certs/:serial", s.authenticated(noBody, "", s.certificate))
	post("/tsa/:unit", s.bySource(false, s.authenticated(stampQuery(l.StampQuery), account.RightTimestamp, func(ctx context.Context, c echo.Context, app *account.Application, body []byte) error {
		return s.stamp(ctx, c, app.ID, body)
	})))
	s.stfRoutes(e)
	get("/health/alive", s.alive)
	get("/health/ready", s.ready)
	get("/health/state", s.authenticated(noBody, "", func(_ context.Context, c echo.Context, _ *account.Application, _ []byte) error {
		return answer(c, s.cfg.Health.State())
	}))
	get("/openapi.json", func(c echo.Context) error {
		return send(c, http.StatusOK, echo.MIMEApplicationJSON, openAPI)
	})
}

func (s *Server) plainRoutes(e *echo.Echo) {
	e.POST("/tsa/:unit", s.bySource(true, s.unlisted))
	e.GET("/health/alive", s.alive)
}
