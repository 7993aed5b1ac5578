package api

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"time"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about backups.
type (
	SetCustodians = wire.SetCustodians
	BeginBackup   = wire.BeginBackup
	EndBackup     = wire.EndBackup
	CarryBackup   = wire.CarryBackup
	FileReport    = wire.FileReport
)

// BackupAdmin is the part of [Admin] that is about backups. The file is written by the command that asks, beside the
// appliance, or carried out to one elsewhere; what became of it is journalled here.
type BackupAdmin interface {
	SetCustodians(ctx context.Context, actor string, req SetCustodians) (any, error)
	BeginBackup(ctx context.Context, actor string, req BeginBackup) (any, error)
	// CarryBackup writes a backup that was begun to out, and says what it is.
	CarryBackup(ctx context.Context, actor string, req CarryBackup, out io.Writer) (EndBackup, error)
	EndBackup(ctx context.Context, actor string, req EndBackup) (any, error)
	FileReport(ctx context.Context, actor string, req FileReport) (any, error)
	ListBackups(ctx context.Context, actor string) (any, error)
	// MissingRecords are what a restored journal lacks, as far as the central database tells.
	MissingRecords(ctx context.Context, actor string) (any, error)
}

func (s *Server) backupRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.POST("/admin/v1/backups/custodians", administeredFile(s, func(_ echo.Context, r *SetCustodians) *problem.Problem {
		return first(required("record", r.Record, 64<<10), twoPersons(r.Persons))
	}, a.SetCustodians))
	e.POST("/admin/v1/backups", administered(s, func(_ echo.Context, r *BeginBackup) *problem.Problem {
		return first(twoPersons(r.Persons), text("target", r.Target, 256))
	}, a.BeginBackup))
	e.POST("/admin/v1/backups/:id/file", s.carried(a.CarryBackup))
	e.POST("/admin/v1/backups/:id/outcome", administered(s, checkEndBackup, a.EndBackup))
	e.POST("/admin/v1/backups/reports", administeredFile(s, func(_ echo.Context, r *FileReport) *problem.Problem {
		return first(oneOf("kind", r.Kind, "verify", "drill"), pattern("backup", r.Backup, backupID), twoPersons(r.Persons), required("report", r.Report, 64<<10))
	}, a.FileReport))
	e.GET("/admin/v1/backups", s.listed(a.ListBackups))
	e.GET("/admin/v1/backups/missing", s.listed(a.MissingRecords))
}

const (
	// carryTime is how long a backup may take, carryPause how long what was written of it to be read.
	carryTime  = 24 * time.Hour
	carryPause = 30 * time.Second
	maxRate    = 1 << 16
)

// carried answers with a file that is made while it is sent. An answer that breaks off has no trailer.
func (s *Server) carried(do func(ctx context.Context, actor string, req CarryBackup, out io.Writer) (EndBackup, error)) echo.HandlerFunc {
	b := body{takes: echo.MIMEApplicationJSON, gives: "application/octet-stream", most: s.limits.SmallBody}
	return s.entered(func(c echo.Context, sess *Session) error {
		data, err := s.receive(c, b, nil)
		if err != nil {
			return err
		}
		var req CarryBackup
		if p := decode(data, &req); p != nil {
			return p
		}
		req.ID = c.Param("id")
		if p := first(pattern("path.id", req.ID, backupID), number("rate", req.Rate, 0, maxRate)); p != nil {
			return p
		}
		if sess.Administrator != "" {
			handled(c.Request())
		}
		ctx, cancel := context.WithTimeout(c.Request().Context(), carryTime)
		defer cancel()
		out := &carrier{conn: http.NewResponseController(c.Response()), w: c.Response(), media: b.gives}
		end, err := do(ctx, sess.actor(), req, out)
		var told []byte
		if err == nil {
			told, err = json.Marshal(end)
		}
		if err != nil && !out.begun {
			return err
		}
		if err != nil {
			s.cfg.Log.WithError(err).Error("a backup that was being carried out broke off")
			panic(http.ErrAbortHandler) // half of a file must not look whole
		}
		c.Response().Header().Set(wire.BackupTrailer, string(told))
		return nil
	})
}

// A carrier is the answer's body: each piece has its time.
type carrier struct {
	conn  *http.ResponseController
	w     *echo.Response
	media string
	begun bool
}

func (o *carrier) Write(b []byte) (int, error) {
	if !o.begun {
		o.begun = true
		o.w.Header().Set(echo.HeaderContentType, o.media)
		o.w.Header().Set("Trailer", wire.BackupTrailer)
		o.w.WriteHeader(http.StatusOK)
	}
	if err := o.conn.SetWriteDeadline(time.Now().Add(carryPause)); err != nil { // interval
		return 0, err
	}
	return o.w.Write(b)
}

var (
	backupID  = regexp.MustCompile(`^[0-9a-f]{16}$`)
	sm3Digest = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

func checkEndBackup(c echo.Context, r *EndBackup) *problem.Problem {
	r.ID = c.Param("id")
	if p := pattern("path.id", r.ID, backupID); p != nil || r.Failed != "" {
		return first(p, text("failed", r.Failed, 256))
	}
	if r.Size < 1 || r.Entries < 1 || r.Through < 0 {
		return problem.Invalid("size", "大小、条目数须为正 (size and entries must be positive)")
	}
	return pattern("sm3", r.SM3, sm3Digest)
}

// twoPersons wants two different names; that they are who they say the appliance cannot prove yet.
func twoPersons(persons []string) *problem.Problem {
	if len(persons) != 2 {
		return problem.Invalid("persons", "须为两人 (two persons)")
	}
	if persons[0] == persons[1] {
		return problem.Invalid("persons", "须为不同的两人 (two different persons)")
	}
	return first(text("persons[0]", persons[0], 64), text("persons[1]", persons[1], 64))
}
