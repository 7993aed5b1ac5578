package api

import (
	"net/http"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// alive is for a supervisor: an error means that a restart would help. It takes no slot, so that a busy appliance
// is not taken for a dead one.
func (s *Server) alive(c echo.Context) error {
	if err := s.cfg.Health.Alive(); err != nil {
		return problem.New(problem.NotReady, "服务异常 (not alive)", "请查看设备状态 (see the appliance's state)").With(err)
	}
	return answer(c, wire.Liveness{Alive: true, Version: s.cfg.Version})
}

// ready is for a load balancer: 503 means that signing would be refused.
func (s *Server) ready(c echo.Context) error {
	ok, reasons := s.cfg.Health.Ready()
	status := http.StatusOK
	if !ok {
		status = http.StatusServiceUnavailable
	}
	return c.JSON(status, wire.Readiness{Ready: ok, Reasons: list(reasons)})
}
