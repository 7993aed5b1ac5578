package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strings"

	"github.com/labstack/echo/v4"
	"github.com/sirupsen/logrus"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// BeginRestore is the body of POST /restore/v1.
type BeginRestore = wire.BeginRestore

// A Restorer waits in an empty folder for a backup. There is no appliance yet, and so no administrator: whoever has the token
// that stands on the machine's console restores it. Methods are called concurrently; a refusal is a *problem.Problem.
type Restorer interface {
	// Admits says whether the token is the one; a wrong one is counted and told on the console.
	Admits(token string, from netip.Addr) bool
	State() wire.RestoreState
	// Take reads a file of size bytes to its end, and keeps it under a name of its sender's until the restore.
	Take(ctx context.Context, name string, size int64, r io.Reader) (wire.RestoreFile, error)
	// Begin returns as soon as the restore runs.
	Begin(req BeginRestore, from netip.Addr) error
}

const (
	// restoreTries are the wrong tokens a minute that one address may show. A token has 100 bits: this keeps the log short,
	// and what somebody else tries does not shut out the engineer.
	restoreTries = 5
	// maxRestoreBody holds shares, a key, and answers with their secrets.
	maxRestoreBody = 1 << 20
)

// NewRestoreServer is the http.Server of a restorer, for a listener of [ListenTLS]: three routes, each with the token.
func NewRestoreServer(d Restorer, log logrus.FieldLogger, version string) *http.Server {
	l := Limits{}.filled()
	s := &Server{
		cfg: Config{Log: log, Version: version}, limits: l,
		bodies: newShares[netip.Prefix](l.InFlight), slots: newShares[string](int64(l.Concurrent)), guesses: newFailures(restoreTries),
	}
	e := s.echo()
	e.Pre(s.plainly)
	e.GET("/restore/v1", s.restoring(d, func(c echo.Context) error { return answer(c, d.State()) }))
	e.POST("/restore/v1/files/:name", s.restoring(d, func(c echo.Context) error { return s.takeFile(c, d) }))
	e.POST("/restore/v1", s.restoring(d, s.received(jsonBody(maxRestoreBody), func(c echo.Context, body []byte) error {
		var req BeginRestore
		if p := decode(body, &req); p != nil {
			return p
		}
		if p := checkRestore(&req); p != nil {
			return p
		}
		if err := d.Begin(req, exchangeOf(c).remote); err != nil {
			return err
		}
		return answer(c, d.State())
	})))
	return s.newAdminServer(e)
}

// restoring is h for whoever shows the token.
func (s *Server) restoring(d Restorer, h echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		from := exchangeOf(c).remote
		if after := s.guesses.wait(household(from), ""); after > 0 {
			p := problem.New(problem.RateLimited, "该地址出示错误的恢复码过多 (too many wrong tokens from this address)", retryLater)
			p.After = after
			return p
		}
		if token, ok := bearer(c.Request()); !ok || !d.Admits(token, from) {
			s.guesses.count(household(from), "")
			return problem.New(problem.Unauthenticated, "恢复码不符 (this is not the token of the restore)", "恢复码显示在这台机器的控制台上；机器每次启动另换一个 (it stands on the machine's console; each start has another)")
		}
		handled(c.Request())
		return h(c)
	}
}

// RestoreName is the name of a backup's file, or of its receipt, among those sent: what the sender calls it is his own affair.
var RestoreName = regexp.MustCompile(`^[0-9]{3}\.yjb(\.receipt\.json)?$`)

func (s *Server) takeFile(c echo.Context, d Restorer) error {
	r := c.Request()
	b := body{takes: "application/octet-stream", gives: echo.MIMEApplicationJSON, most: 1 << 62} // the free space bounds it
	if p := first(acceptable(r, b.gives), b.readable(r), pattern("path.name", c.Param("name"), RestoreName)); p != nil {
		return p
	}
	if r.ContentLength < 1 {
		return problem.Invalid("header.Content-Length", "须写明文件的长度 (the file's length is needed)")
	}
	got, err := d.Take(r.Context(), c.Param("name"), r.ContentLength, &paced{http.NewResponseController(c.Response()), r.Body})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, io.ErrUnexpectedEOF):
		return problem.Invalid("", "文件没有传完，没有留下 (the file did not come whole, nothing of it is kept)").With(err)
	case err != nil:
		return err
	}
	exchangeOf(c).bodyRead = true
	return answer(c, got)
}

// bearer is the one token of a request.
func bearer(r *http.Request) (string, bool) {
	values := r.Header.Values(echo.HeaderAuthorization)
	if len(values) != 1 {
		return "", false
	}
	return strings.CutPrefix(values[0], "Bearer ")
}

func checkRestore(r *BeginRestore) *problem.Problem {
	if len(r.Files) == 0 || len(r.Files) > 999 || len(r.Shares) == 0 || len(r.Shares) > 255 {
		return problem.Invalid("files", "须给出备份文件与份额 (backup files and shares are needed)")
	}
	for _, name := range r.Files {
		if p := pattern("files", name, RestoreName); p != nil {
			return p
		}
	}
	return twoPersons(r.Persons)
}
