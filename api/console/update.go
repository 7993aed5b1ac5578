package console

import (
	"errors"
	"net/http"

	"yinjian/api/wire"
)

const (
	routeUpdate  = "GET /admin/v1/update"
	routeCommit  = "POST /admin/v1/update/commit"
	routeCancel  = "POST /admin/v1/update/cancel"
	routeRestart = "POST /admin/v1/update/restart"
)

// An offer is an image that waits.
type offer struct {
	Index    uint64 `json:"index"`
	Version  string `json:"version"`
	SM3      string `json:"sm3"`
	Manifest struct {
		Notes string `json:"notes"`
	} `json:"manifest"`
}

// images is what runs and what waits.
type images struct {
	Running   uint64   `json:"running"`
	Version   string   `json:"version"`
	Slot      string   `json:"slot"`
	Good      bool     `json:"good"`
	Staged    *offer   `json:"staged"`
	Committed *offer   `json:"committed"`
	Failed    []uint64 `json:"failed"`
	Behind    uint64   `json:"behind"`
	Floor     uint64   `json:"floor"`
}

func updateRoutes(c *Console) {
	const section = "/console/update"
	show := func(p *page) {
		p.Section = section
		if !p.only(routeUpdate) {
			return
		}
		var now images
		err := p.ask(routeUpdate, nil, &now)
		var refused *Refusal
		if errors.As(err, &refused) && refused.Status == http.StatusNotFound { // a server with packages
			p.show("update", map[string]any{"None": true})
			return
		}
		if err != nil {
			p.fail(err)
			return
		}
		p.show("update", map[string]any{"Now": now})
	}
	c.page("GET "+section, show)
	c.page("POST "+section+"/commit", func(p *page) {
		p.acted(p.ask(routeCommit, wire.CommitUpdate{SM3: p.Form.Get("sm3"), Reason: p.Form.Get("reason")}, nil), section, "committed", func() { show(p) })
	})
	c.page("POST "+section+"/restart", func(p *page) {
		p.acted(p.ask(routeRestart, wire.RestartForUpdate{Reason: p.Form.Get("reason")}, nil), section, "restarting", func() { show(p) })
	})
	c.page("POST "+section+"/cancel", func(p *page) {
		p.acted(p.ask(routeCancel, wire.CancelUpdate{Reason: p.Form.Get("reason")}, nil), section, "cancelled", func() { show(p) })
	})
}
