package api

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"github.com/labstack/echo/v4"

	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// The bodies of the routes about the configuration.
type (
	Settings       = wire.Settings
	ChangeSettings = wire.ChangeSettings
	DecideSettings = wire.DecideSettings
)

// SettingsAdmin is the part of [Admin] that changes the configuration.
type SettingsAdmin interface {
	Settings(ctx context.Context, actor string) (any, error)
	// CheckSettings answers what a change would make, or everything that is wrong with it.
	CheckSettings(ctx context.Context, actor string, req Settings) (any, error)
	// ChangeSettings has the next start try a change.
	ChangeSettings(ctx context.Context, actor string, req ChangeSettings) (any, error)
	CancelSettings(ctx context.Context, actor string, req DecideSettings) (any, error)
	// RestartForSettings ends the process a moment after it has answered.
	RestartForSettings(ctx context.Context, actor string, req DecideSettings) (any, error)
	ConfirmSettings(ctx context.Context, actor string, req DecideSettings) (any, error)
}

const (
	maxOverlay     = 64 << 10
	maxSecretFile  = 16 << 10
	maxSecretFiles = 16
)

var settingKey = regexp.MustCompile(`^[a-z0-9_]+(\.[A-Za-z0-9_-]+)*$`)

func (s *Server) settingsRoutes(e *echo.Echo) {
	a := s.cfg.Admin
	e.GET("/admin/v1/settings", s.listed(a.Settings))
	e.POST("/admin/v1/settings/check", administeredFile(s, func(_ echo.Context, r *Settings) *problem.Problem {
		return checkSettings("", r)
	}, a.CheckSettings))
	// What is wrong is told whoever proposes it, before anybody is asked to approve.
	e.POST("/admin/v1/settings", administeredFile(s, func(c echo.Context, r *ChangeSettings) *problem.Problem {
		if p := first(checkSettings("settings.", &r.Settings), pattern("base", r.Base, manifestSM3), text("reason", r.Reason, 256), twoPersons(r.Persons)); p != nil {
			return p
		}
		_, err := a.CheckSettings(c.Request().Context(), "", r.Settings)
		var p *problem.Problem
		if errors.As(err, &p) {
			return p
		}
		return nil // any other error is met again when it is done
	}, a.ChangeSettings))
	e.POST("/admin/v1/settings/cancel", administered(s, checkDecideSettings, a.CancelSettings))
	e.POST("/admin/v1/settings/restart", administered(s, checkDecideSettings, a.RestartForSettings))
	e.POST("/admin/v1/settings/confirm", administered(s, checkDecideSettings, a.ConfirmSettings))
}

func checkDecideSettings(_ echo.Context, r *DecideSettings) *problem.Problem {
	return text("reason", r.Reason, 256)
}

func checkSettings(at string, r *Settings) *problem.Problem {
	if len(r.Overlay) > maxOverlay {
		return problem.Invalid(at+"overlay", "至多 %d 字节 (at most)", maxOverlay)
	}
	if len(r.Remove) > maxSecretFiles {
		return problem.Invalid(at+"remove", "至多 %d 项 (at most)", maxSecretFiles)
	}
	for i, key := range r.Remove {
		if p := pattern(fmt.Sprintf("%sremove[%d]", at, i), key, settingKey); p != nil {
			return p
		}
	}
	if len(r.Secrets) > maxSecretFiles {
		return problem.Invalid(at+"secrets", "至多 %d 个 (at most)", maxSecretFiles)
	}
	for i, f := range r.Secrets {
		if p := text(fmt.Sprintf("%ssecrets[%d].name", at, i), f.Name, 64); p != nil {
			return p
		}
		if n := len(f.Secret); n == 0 || n > maxSecretFile {
			return problem.Invalid(fmt.Sprintf("%ssecrets[%d].secret", at, i), "须为 1–%d 字节 (1 to so many bytes)", maxSecretFile)
		}
	}
	return nil
}
