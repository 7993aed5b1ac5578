package console

import (
	"strings"

	"yinjian/api/wire"
)

const (
	routeSettings        = "GET /admin/v1/settings"
	routeCheckSettings   = "POST /admin/v1/settings/check"
	routeChangeSettings  = "POST /admin/v1/settings"
	routeCancelSettings  = "POST /admin/v1/settings/cancel"
	routeRestartSettings = "POST /admin/v1/settings/restart"
	routeConfirmSettings = "POST /admin/v1/settings/confirm"
)

func settingsRoutes(c *Console) {
	const section = "/console/settings"
	show := func(p *page) {
		p.Section = section
		p.waits("/admin/v1/settings")
		var now wire.SettingsStatus
		if err := p.ask(routeSettings, nil, &now); err != nil {
			p.fail(err)
			return
		}
		p.show("settings", map[string]any{"Now": now})
	}
	c.page("GET "+section, show)
	// What would change is asked for first, and goes along with the proposal: it is what the second person looks at.
	c.page("POST "+section, func(p *page) {
		f := p.Form
		body := wire.ChangeSettings{Reason: f.Get("reason"), Settings: wire.Settings{
			Overlay: []byte(strings.ReplaceAll(f.Get("overlay"), "\r\n", "\n")), Remove: strings.Fields(f.Get("remove")),
		}}
		if name := strings.TrimSpace(f.Get("name")); name != "" {
			body.Settings.Secrets = []wire.SecretFile{{Name: name, Secret: []byte(strings.ReplaceAll(f.Get("secret"), "\r\n", "\n"))}}
		}
		var checked wire.CheckedSettings
		err := p.ask(routeCheckSettings, body.Settings, &checked)
		if err == nil {
			body.Base, body.Changes = checked.Base, checked.Changes
			err = p.ask(routeChangeSettings, body, nil)
		}
		p.acted(err, section, "changed", func() { show(p) })
	})
	for act, one := range map[string]struct{ route, notice string }{
		"cancel": {routeCancelSettings, "cancelled"}, "restart": {routeRestartSettings, "restarting"}, "confirm": {routeConfirmSettings, "changed"},
	} {
		c.page("POST "+section+"/"+act, func(p *page) {
			p.acted(p.ask(one.route, wire.DecideSettings{Reason: p.Form.Get("reason")}, nil), section, one.notice, func() { show(p) })
		})
	}
}
