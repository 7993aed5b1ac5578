package api

import (
	"context"
	"io"
	"net/http"
	"regexp"
	"time"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about the sealed image.
type (
	CommitUpdate     = wire.CommitUpdate
	CancelUpdate     = wire.CancelUpdate
	RestartForUpdate = wire.RestartForUpdate
)

// UpdateAdmin is the part of [Admin] that replaces the sealed image.
type UpdateAdmin interface {
	UpdateStatus(ctx context.Context, actor string) (any, error)
	// StageUpdate reads a bundle to its end, or until it refuses it.
	StageUpdate(ctx context.Context, actor string, bundle io.Reader) (any, error)
	CommitUpdate(ctx context.Context, actor string, req CommitUpdate) (any, error)
	CancelUpdate(ctx context.Context, actor string, req CancelUpdate) (any, error)
	// RestartForUpdate restarts the machine into what was committed; the answer may come or not.
	RestartForUpdate(ctx context.Context, actor string, req RestartForUpdate) (any, error)
}

const (
	// maxBundle bounds a bundle; the manifest, which is signed, says how long it is.
	maxBundle = 1 << 30
	// bundleTime is how long one may take, bundlePause how long the next bytes.
	bundleTime  = time.Hour
	bundlePause = 30 * time.Second
)

var manifestSM3 = regexp.MustCompile(`^[0-9a-f]{64}$`)

func (s *Server) updateRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/update", s.listed(a.UpdateStatus))
	e.POST("/admin/v1/update/bundle", s.streamed(maxBundle, a.StageUpdate))
	e.POST("/admin/v1/update/commit", administered(s, func(_ echo.Context, r *CommitUpdate) *problem.Problem {
		return first(pattern("sm3", r.SM3, manifestSM3), text("reason", r.Reason, 256), twoPersons(r.Persons))
	}, a.CommitUpdate))
	e.POST("/admin/v1/update/cancel", administered(s, func(_ echo.Context, r *CancelUpdate) *problem.Problem {
		return text("reason", r.Reason, 256)
	}, a.CancelUpdate))
	e.POST("/admin/v1/update/restart", administered(s, func(_ echo.Context, r *RestartForUpdate) *problem.Problem {
		return text("reason", r.Reason, 256)
	}, a.RestartForUpdate))
}

// streamed has do read the body as it comes: it is too long to be held. It is of application/octet-stream.
func (s *Server) streamed(most int64, do func(ctx context.Context, actor string, body io.Reader) (any, error)) echo.HandlerFunc {
	b := body{takes: "application/octet-stream", gives: echo.MIMEApplicationJSON, most: most}
	return s.entered(func(c echo.Context, sess *Session) error {
		r := c.Request()
		if p := first(acceptable(r, b.gives), b.readable(r)); p != nil {
			return p
		}
		if sess.Administrator != "" {
			handled(r)
		}
		ctx, cancel := context.WithTimeout(r.Context(), bundleTime)
		defer cancel()
		in := &paced{http.NewResponseController(c.Response()), http.MaxBytesReader(nil, r.Body, most)}
		out, err := do(ctx, sess.actor(), in)
		if err != nil {
			return err
		}
		exchangeOf(c).bodyRead = true
		return answer(c, out)
	})
}

// paced gives each read its time.
type paced struct {
	conn *http.ResponseController
	r    io.Reader
}

func (p *paced) Read(b []byte) (int, error) {
	if err := p.conn.SetReadDeadline(time.Now().Add(bundlePause)); err != nil { // interval
		return 0, err
	}
	return p.r.Read(b)
}
