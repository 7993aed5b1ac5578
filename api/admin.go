package api

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/labstack/echo/v4"
	"golang.org/x/sys/unix"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/custody"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// The bodies of the administration routes.
type (
	RegisterApplication   = wire.RegisterApplication
	RegisteredApplication = wire.RegisteredApplication
	LimitApplication      = wire.LimitApplication
	EnrolSigner           = wire.EnrolSigner
	AddSignerKey          = wire.AddSignerKey
	SetSignerPIN          = wire.SetSignerPIN
	RecoverSigner         = wire.RecoverSigner
	Ceremony              = wire.Ceremony
	DestroyKey            = wire.DestroyKey
	Decision              = wire.Decision
	RevokeCertificate     = wire.RevokeCertificate
	IssueCRL              = wire.IssueCRL
	AddAnchor             = wire.AddAnchor
	AddIntermediates      = wire.AddIntermediates
	RequestCertificate    = wire.RequestCertificate
	Rederive              = wire.Rederive
	ImportCertificates    = wire.ImportCertificates
	ImportCRL             = wire.ImportCRL
	FetchCRLs             = wire.FetchCRLs
	AddMachine            = wire.AddMachine
	ChangeMachine         = wire.ChangeMachine
	AuditVerify           = wire.AuditVerify
	Stamp                 = wire.Stamp
)

// Admin does what an administrator on the local socket asks. actor says who that is in words that the journal keeps:
// "local uid=0(root)". Requests are checked in form; answers are shown as their JSON. A refusal is a *problem.Problem.
type Admin interface {
	// RegisterApplication answers the application's HMAC key, here and never again.
	RegisterApplication(ctx context.Context, actor string, req RegisterApplication) (*RegisteredApplication, error)
	StopApplication(ctx context.Context, actor string, req Decision) (any, error)
	LimitApplication(ctx context.Context, actor string, req LimitApplication) (any, error)
	ListApplications(ctx context.Context, actor string) (any, error)
	EnrolSigner(ctx context.Context, actor string, req EnrolSigner) (any, error)
	AddSignerKey(ctx context.Context, actor string, req AddSignerKey) (any, error)
	SetSignerPIN(ctx context.Context, actor string, req SetSignerPIN) (any, error)
	RecoverSigner(ctx context.Context, actor string, req RecoverSigner) (any, error)
	Ceremony(ctx context.Context, actor string, req Ceremony) (any, error)
	Rederive(ctx context.Context, actor string, req Rederive) (any, error)
	ListKeys(ctx context.Context, actor string) (any, error)
	DestroyKey(ctx context.Context, actor string, req DestroyKey) (any, error)
	StopSigner(ctx context.Context, actor string, req Decision) (any, error)
	StartSigner(ctx context.Context, actor string, req Decision) (any, error)
	ListSigners(ctx context.Context, actor string) (any, error)
	RevokeCertificate(ctx context.Context, actor string, req RevokeCertificate) (any, error)
	IssueCRL(ctx context.Context, actor string, req IssueCRL) (any, error)
	AddAnchor(ctx context.Context, actor string, req AddAnchor) (any, error)
	WithdrawAnchor(ctx context.Context, actor string, req Decision) (any, error)
	ListAnchors(ctx context.Context, actor string) (any, error)
	AddIntermediates(ctx context.Context, actor string, req AddIntermediates) (any, error)
	RequestCertificate(ctx context.Context, actor string, req RequestCertificate) (any, error)
	ImportCertificates(ctx context.Context, actor string, req ImportCertificates) (any, error)
	ListCertificates(ctx context.Context, actor string) (any, error)
	ImportCRL(ctx context.Context, actor string, req ImportCRL) (any, error)
	FetchCRLs(ctx context.Context, actor string, req FetchCRLs) (any, error)
	ListCRLs(ctx context.Context, actor string) (any, error)
	AddMachine(ctx context.Context, actor string, req AddMachine) (any, error)
	DrainMachine(ctx context.Context, actor string, req ChangeMachine) (any, error)
	ResumeMachine(ctx context.Context, actor string, req ChangeMachine) (any, error)
	RemoveMachine(ctx context.Context, actor string, req ChangeMachine) (any, error)
	ListMachines(ctx context.Context, actor string) (any, error)
	AuditVerify(ctx context.Context, actor string, req AuditVerify) (any, error)
	Stamp(ctx context.Context, actor string, req Stamp) (any, error)
	State(ctx context.Context, actor string) (any, error)
	DatabaseAdmin
	DirectoryAdmin
	TimeAdmin
	PreserveAdmin
	BackupAdmin
	RecordsAdmin
	PeerAdmin
	StaffAdmin
	SearchAdmin
	SettingsAdmin
	LogAdmin
	ReportAdmin
	AssessAdmin
	UnlockAdmin
	DrillAdmin
	UpdateAdmin
	PackAdmin
}

func (s *Server) adminRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/applications", administered(s, checkRegister, func(ctx context.Context, actor string, req RegisterApplication) (any, error) {
		return a.RegisterApplication(ctx, actor, req)
	}))
	e.GET("/admin/v1/applications", s.listed(a.ListApplications))
	e.POST("/admin/v1/applications/:id/stop", administered(s, checkApplicationDecision, a.StopApplication))
	e.POST("/admin/v1/applications/:id/limits", administered(s, checkLimitApplication, a.LimitApplication))
	e.POST("/admin/v1/signers", administered(s, checkEnrol, a.EnrolSigner))
	e.POST("/admin/v1/signers/:id/keys", administered(s, checkAddKey, a.AddSignerKey))
	e.GET("/admin/v1/signers", s.listed(a.ListSigners))
	e.POST("/admin/v1/signers/:id/pin", administered(s, checkSetPIN, a.SetSignerPIN))
	e.POST("/admin/v1/signers/:id/recover", administered(s, checkRecover, a.RecoverSigner))
	e.GET("/admin/v1/keys", s.listed(a.ListKeys))
	e.POST("/admin/v1/keys/destroy", administered(s, checkDestroyKey, a.DestroyKey))
	e.POST("/admin/v1/ceremonies", administeredFile(s, checkCeremony, a.Ceremony))
	e.POST("/admin/v1/ceremonies/rederive", administered(s, nothingToCheck[Rederive], a.Rederive))
	e.POST("/admin/v1/signers/:id/stop", administered(s, checkSignerDecision, a.StopSigner))
	e.POST("/admin/v1/signers/:id/start", administered(s, checkSignerDecision, a.StartSigner))
	e.POST("/admin/v1/certificates/:serial/revoke", administered(s, checkRevoke, a.RevokeCertificate))
	e.POST("/admin/v1/crls", administered(s, nothingToCheck[IssueCRL], a.IssueCRL))
	e.POST("/admin/v1/anchors", administeredFile(s, checkAnchor, a.AddAnchor))
	e.GET("/admin/v1/anchors", s.listed(a.ListAnchors))
	e.POST("/admin/v1/anchors/:id/withdraw", administered(s, checkWithdraw, a.WithdrawAnchor))
	e.POST("/admin/v1/intermediates", administeredFile(s, checkIntermediates, a.AddIntermediates))
	e.POST("/admin/v1/certificates/requests", administered(s, checkRequest, a.RequestCertificate))
	e.POST("/admin/v1/certificates", administeredFile(s, checkImport, a.ImportCertificates))
	e.GET("/admin/v1/certificates", s.listed(a.ListCertificates))
	e.POST("/admin/v1/trust/crls", administeredFile(s, checkImportCRL, a.ImportCRL))
	e.POST("/admin/v1/trust/crls/fetch", administered(s, nothingToCheck[FetchCRLs], a.FetchCRLs))
	e.GET("/admin/v1/trust/crls", s.listed(a.ListCRLs))
	e.POST("/admin/v1/machines", administered(s, checkAddMachine, a.AddMachine))
	e.GET("/admin/v1/machines", s.listed(a.ListMachines))
	e.POST("/admin/v1/machines/:name/drain", administered(s, checkMachine, a.DrainMachine))
	e.POST("/admin/v1/machines/:name/resume", administered(s, checkMachine, a.ResumeMachine))
	e.POST("/admin/v1/machines/:name/remove", administered(s, checkMachine, a.RemoveMachine))
	s.directoryRoutes(e)
	s.timeRoutes(e)
	s.logRoutes(e)
	e.POST("/admin/v1/audit/verify", administered(s, nothingToCheck[AuditVerify], a.AuditVerify))
	s.databaseRoutes(e)
	s.preserveRoutes(e)
	s.backupRoutes(e)
	s.recordsRoutes(e)
	s.peerRoutes(e)
	s.staffRoutes(e)
	s.searchRoutes(e)
	s.reportRoutes(e)
	s.unlockRoutes(e)
	s.stateRoutes(e, nil) // the table refuses them in this state
	s.assessRoutes(e)
	s.selftestRoutes(e)
	s.drillRoutes(e)
	s.updateRoutes(e)
	s.settingsRoutes(e)
	s.packRoutes(e)
	e.POST("/admin/v1/stamps", administered(s, checkStamp, a.Stamp))
	s.accountRoutes(e)
	s.approvalRoutes(e)
	e.GET("/admin/v1/state", s.listed(a.State))
	e.GET("/metrics", s.local(body{gives: "text/plain"}, func(c echo.Context, _ string, _ []byte) error {
		return send(c, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", s.cfg.Health.Metrics())
	}))
	e.GET("/health/alive", s.alive)
	e.GET("/health/ready", s.ready)
}

func checkStamp(_ echo.Context, r *Stamp) *problem.Problem {
	if len(r.Request) == 0 || len(r.Request) > 4096 {
		return problem.Invalid("request", "须为 1–4096 字节 (1 to 4096 bytes)")
	}
	return nil
}

// administered reads and checks a request, and says who asks. There is no time limit: an audit takes what it takes,
// and the administrator may give up.
func administered[Req any](s *Server, check func(c echo.Context, req *Req) *problem.Problem, do func(ctx context.Context, actor string, req Req) (any, error)) echo.HandlerFunc {
	return administeredUpTo(s, s.limits.SmallBody, check, do)
}

// maxAdminFile bounds a request with files inside: a CRL of [account.MaxForeignCRL] in base64, and some.
const maxAdminFile = account.MaxForeignCRL/3*4 + 1<<20

// administeredFile is administered for requests with files inside.
func administeredFile[Req any](s *Server, check func(c echo.Context, req *Req) *problem.Problem, do func(ctx context.Context, actor string, req Req) (any, error)) echo.HandlerFunc {
	return administeredUpTo(s, maxAdminFile, check, do)
}

func administeredUpTo[Req any](s *Server, most int64, check func(c echo.Context, req *Req) *problem.Problem, do func(ctx context.Context, actor string, req Req) (any, error)) echo.HandlerFunc {
	return s.local(jsonBody(most), func(c echo.Context, actor string, body []byte) error {
		var req Req
		if p := first(decode(body, &req)); p != nil {
			return p
		}
		sess := exchangeOf(c).session
		persons := func([]string) {}
		if two, ok := any(&req).(interface{ ConfirmedBy() *[]string }); ok && !sess.open {
			if len(*two.ConfirmedBy()) > 0 {
				return problem.Invalid("persons", "由登录的两人填写，请求中不得给出 (those who propose and approve it; not for the request to say)")
			}
			persons = func(who []string) { *two.ConfirmedBy() = who }
			persons([]string{sess.person(), "?"})
		}
		if p := check(c, &req); p != nil {
			return p
		}
		alone, _ := any(&req).(interface{ Alone() bool })
		if line := lineOf(c.Request().Method, c.Path()); !sess.open && len(line.Second) > 0 && (alone == nil || !alone.Alone()) {
			return s.propose(c, line, body, func(ctx context.Context, actor string, who []string) (any, error) {
				persons(who)
				return do(ctx, actor, req)
			})
		}
		out, err := do(c.Request().Context(), actor, req)
		if err != nil {
			return err
		}
		return answer(c, out)
	})
}

func (s *Server) listed(do func(ctx context.Context, actor string) (any, error)) echo.HandlerFunc {
	return s.local(noBody, func(c echo.Context, actor string, _ []byte) error {
		out, err := do(c.Request().Context(), actor)
		if err != nil {
			return err
		}
		return answer(c, out)
	})
}

// local runs h for whom the matrix lets in, in a state in which it answers.
func (s *Server) local(b body, h func(c echo.Context, actor string, body []byte) error) echo.HandlerFunc {
	return s.entered(func(c echo.Context, sess *Session) error {
		data, err := s.receive(c, b, nil)
		if err != nil {
			return err
		}
		if sess.Administrator != "" {
			if len(data) > 0 { // it may have ended while the body came
				if _, p := s.sessionOf(c); p != nil {
					return p
				}
			}
			handled(c.Request())
		}
		return h(c, sess.actor(), data)
	})
}

// entered is local before the body is read.
func (s *Server) entered(h func(c echo.Context, sess *Session) error) echo.HandlerFunc {
	return func(c echo.Context) error {
		sess, p := s.sessionOf(c)
		if p == nil {
			p = s.may(sess, c.Request().Method, c.Path())
		}
		if p != nil {
			if sess = s.without(c); sess == nil {
				return p
			}
		}
		if p := s.stands(c.Request().Method, c.Path()); p != nil {
			return p
		}
		exchangeOf(c).session = sess
		return h(c, sess)
	}
}

// without is the session of somebody who has not logged in, where the matrix asks for none; else nil.
func (s *Server) without(c echo.Context) *Session {
	listener, who, p := s.callerOf(c)
	line := lineOf(c.Request().Method, c.Path())
	if p != nil || line == nil || line.Without == nowhere || line.Without == locally && listener != listenerLocal {
		return nil
	}
	return &Session{Name: who, who: who}
}

type peerKey struct{}

// withPeer keeps what SO_PEERCRED says: pid, uid and gid of the process that connected, as the kernel recorded them
// then. Nobody can claim another's.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if err := raw.Control(func(fd uintptr) {
		if c, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			cred = c
		}
	}); err != nil || cred == nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred)
}

// ListenAdmin listens on a unix socket that only its owner may connect to. A socket left by a process that died is
// removed; one that answers, or a file that is no socket, is an error. The folder should be the owner's alone.
func ListenAdmin(path string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("api: %s exists and is no socket", path)
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("api: %s is in use", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("api: removing a dead socket: %w", err)
		}
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("api: listening for administrators: %w", err)
	}
	// Between the two calls another user could connect; the handler would still refuse him by SO_PEERCRED.
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("api: listening for administrators: %w", err)
	}
	return ln, nil
}

func nothingToCheck[Req any](echo.Context, *Req) *problem.Problem { return nil }

func checkRegister(_ echo.Context, r *RegisterApplication) *problem.Problem {
	if p := first(
		pattern("id", r.ID, applicationID), text("name", r.Name, 128), text("campus", r.Campus, 64),
		oneOf("stamp", r.Stamp, account.StampRequired, account.StampNone),
		each("rights", r.Rights, account.RightSign, account.RightVerify, account.RightTimestamp, account.RightEvidenceAny),
		number("rate", r.Rate, 0, account.MaxRate), number("burst", r.Burst, 0, account.MaxBurst),
		number("hsm_rate", r.HSMRate, 0, account.MaxRate), number("hsm_sessions", r.HSMSessions, 0, account.MaxSessions),
	); p != nil {
		return p
	}
	return each("consent", r.Consent, string(evidence.AppAsserted), string(evidence.SignerPIN))
}

func checkLimitApplication(c echo.Context, r *LimitApplication) *problem.Problem {
	r.ID = c.Param("id")
	return first(
		pattern("path.id", r.ID, applicationID), number("rate", r.Rate, 0, account.MaxRate), number("burst", r.Burst, 0, account.MaxBurst),
		number("hsm_rate", r.HSMRate, 0, account.MaxRate), number("hsm_sessions", r.HSMSessions, 0, account.MaxSessions),
		text("reason", r.Reason, 256),
	)
}

// each wants at least one, all of them allowed, none twice.
func each(field string, values []string, allowed ...string) *problem.Problem {
	if len(values) == 0 {
		return missing(field)
	}
	seen := map[string]bool{}
	for _, v := range values {
		if p := oneOf(field, v, allowed...); p != nil {
			return p
		}
		if seen[v] {
			return problem.Invalid(field, "%s 重复 (given twice)", v)
		}
		seen[v] = true
	}
	return nil
}

func checkEnrol(_ echo.Context, r *EnrolSigner) *problem.Problem {
	if p := first(
		pattern("id", r.ID, signerID), text("name", r.Name, 128), text("department", r.Department, 128), text("campus", r.Campus, 64),
		each("algorithms", r.Algorithms, algSM2, algRSA),
	); p != nil {
		return p
	}
	if p := issuer(r.CA); p != nil {
		return p
	}
	if r.Role != "" {
		if p := text("role", r.Role, 128); p != nil {
			return p
		}
	}
	if r.PIN == "" {
		return nil
	}
	return pin("pin", r.PIN)
}

// issuer checks who issues a signer's certificate; it may be left out.
func issuer(ca string) *problem.Problem {
	if ca == "" {
		return nil
	}
	return oneOf("ca", ca, "evaluation", "external")
}

func checkAddKey(c echo.Context, r *AddSignerKey) *problem.Problem {
	r.Signer = c.Param("id")
	return first(pattern("path.id", r.Signer, signerID), oneOf("algorithm", r.Algorithm, algSM2, algRSA), issuer(r.CA))
}

func checkSetPIN(c echo.Context, r *SetSignerPIN) *problem.Problem {
	r.Signer = c.Param("id")
	p := first(pattern("path.id", r.Signer, signerID), pin("pin", r.PIN))
	if p != nil || r.OldPIN == "" {
		return p
	}
	return pin("old_pin", r.OldPIN)
}

func checkRecover(c echo.Context, r *RecoverSigner) *problem.Problem {
	r.Signer = c.Param("id")
	if p := first(pattern("path.id", r.Signer, signerID), pin("pin", r.PIN)); p != nil {
		return p
	}
	if n := len(r.Shares); n < 1 || n > custody.MaxHolders {
		return problem.Invalid("shares", "须为 1–%d 份 (1 to %d)", custody.MaxHolders, custody.MaxHolders)
	}
	for i, s := range r.Shares {
		if len(s) == 0 || len(s) > 4096 {
			return problem.Invalid(fmt.Sprintf("shares[%d]", i), "须为 1–4096 字节 (1 to 4096 bytes)")
		}
	}
	return nil
}

func checkDestroyKey(_ echo.Context, r *DestroyKey) *problem.Problem {
	return first(text("label", r.Label, 128), text("reason", r.Reason, 256))
}

func checkCeremony(_ echo.Context, r *Ceremony) *problem.Problem {
	return required("minutes", r.Minutes, 256<<10)
}

func checkSignerDecision(c echo.Context, r *Decision) *problem.Problem {
	r.ID = c.Param("id")
	return first(pattern("path.id", r.ID, signerID), text("reason", r.Reason, 256))
}

func checkApplicationDecision(c echo.Context, r *Decision) *problem.Problem {
	r.ID = c.Param("id")
	return first(pattern("path.id", r.ID, applicationID), text("reason", r.Reason, 256))
}

// checkRevoke takes the reasons of RFC 5280 §5.3.1 that an administrator has for an end entity; certificateHold is not used.
func checkRevoke(c echo.Context, r *RevokeCertificate) *problem.Problem {
	r.Serial = c.Param("serial")
	return first(
		pattern("path.serial", r.Serial, serialNumber),
		oneOf("reason", r.Reason, "unspecified", "keyCompromise", "affiliationChanged", "superseded", "cessationOfOperation", "privilegeWithdrawn"),
	)
}

func checkAnchor(_ echo.Context, r *AddAnchor) *problem.Problem {
	if p := first(required("certificate", r.Certificate, pki.MaxBundleSize), each("uses", r.Uses, account.Uses...)); p != nil || r.Note == "" {
		return p
	}
	return text("note", r.Note, 256)
}

func checkWithdraw(c echo.Context, r *Decision) *problem.Problem {
	r.ID = c.Param("id")
	return first(pattern("path.id", r.ID, anchorID), text("reason", r.Reason, 256))
}

func checkIntermediates(_ echo.Context, r *AddIntermediates) *problem.Problem {
	return required("file", r.File, pki.MaxBundleSize)
}

func checkRequest(_ echo.Context, r *RequestCertificate) *problem.Problem {
	if p := pattern("for", r.For, keyOwner); p != nil {
		return p
	}
	if len(r.Hosts) > 32 {
		return problem.Invalid("hosts", "不得超过 32 个 (32 at most)")
	}
	for i, h := range r.Hosts {
		if p := text(fmt.Sprintf("hosts[%d]", i), h, 253); p != nil {
			return p
		}
	}
	if r.Subject == "" {
		return nil
	}
	return text("subject", r.Subject, 512)
}

func checkImport(_ echo.Context, r *ImportCertificates) *problem.Problem {
	if p := required("file", r.File, pki.MaxBundleSize); p != nil {
		return p
	}
	if len(r.Chain) > 16 {
		return problem.Invalid("chain", "不得超过 16 个文件 (16 files at most)")
	}
	for i, f := range r.Chain {
		if p := required(fmt.Sprintf("chain[%d]", i), f, pki.MaxBundleSize); p != nil {
			return p
		}
	}
	if r.Owner == "" {
		return nil
	}
	return pattern("owner", r.Owner, keyOwner)
}

func checkImportCRL(_ echo.Context, r *ImportCRL) *problem.Problem {
	return first(required("file", r.File, account.MaxForeignCRL), text("source", r.Source, 256))
}

func checkAddMachine(_ echo.Context, r *AddMachine) *problem.Problem {
	return first(required("file", r.File, 32<<10), text("reason", r.Reason, 256))
}

func checkMachine(c echo.Context, r *ChangeMachine) *problem.Problem {
	r.Name = c.Param("name")
	return first(pattern("path.name", r.Name, machineName), text("reason", r.Reason, 256))
}

// NewAdminServer is the http.Server for [ListenAdmin].
func (s *Server) NewAdminServer() *http.Server {
	srv := s.newAdminServer(s.admin)
	srv.ConnContext = withPeer
	return srv
}

// NewAdminTLSServer is the http.Server for the administration over TLS, a listener of [ListenTLS].
func (s *Server) NewAdminTLSServer() *http.Server {
	srv := s.newAdminServer(http.HandlerFunc(s.administration))
	inner := srv.ConnContext
	srv.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		if inner != nil {
			ctx = inner(ctx, conn)
		}
		return context.WithValue(ctx, adminTLSKey{}, true)
	}
	return srv
}

// newAdminServer lets handling take as long as it does, an audit's say, and bounds what comes after: a client that does not
// read its answer loses its connection.
func (s *Server) newAdminServer(h http.Handler) *http.Server {
	srv := s.newHTTPServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out := &timelyWriter{ResponseWriter: w, sending: s.limits.Sending}
		h.ServeHTTP(out, r)
		out.begin() // what is sent after the handler
	}))
	srv.WriteTimeout = 0
	return srv
}

// A timelyWriter has an answer sent within a time from its beginning on.
type timelyWriter struct {
	http.ResponseWriter
	sending time.Duration
	begun   bool
}

// Unwrap is for http.ResponseController.
func (w *timelyWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *timelyWriter) begin() {
	if !w.begun {
		w.begun = true
		_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.sending)) // interval
	}
}

// WriteHeader implements http.ResponseWriter.
func (w *timelyWriter) WriteHeader(status int) {
	w.begin()
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *timelyWriter) Write(p []byte) (int, error) {
	w.begin()
	return w.ResponseWriter.Write(p)
}
