package console

import (
	"io"
	"strings"
	"time"

	"yinjian/api/wire"
)

const (
	routeTSA      = "GET /admin/v1/tsa"
	routeTSALog   = "POST /admin/v1/tsa/log"
	routeStopTSA  = "POST /admin/v1/tsa/stop"
	routeStartTSA = "POST /admin/v1/tsa/start"

	routeSearchCertificates = "POST /admin/v1/certificates/search"
	routeImport             = "POST /admin/v1/certificates"
	routeRevoke             = "POST /admin/v1/certificates/:serial/revoke"

	routeAnchors        = "GET /admin/v1/anchors"
	routeAddAnchor      = "POST /admin/v1/anchors"
	routeWithdrawAnchor = "POST /admin/v1/anchors/:id/withdraw"
	routeIntermediates  = "POST /admin/v1/intermediates"
	routeCRLs           = "GET /admin/v1/trust/crls"
	routeImportCRL      = "POST /admin/v1/trust/crls"
	routeFetchCRLs      = "POST /admin/v1/trust/crls/fetch"
	routePublishCRLs    = "POST /admin/v1/crls"
)

func tsaRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/tsa"
		var s struct {
			Units []struct {
				Unit    string `json:"unit"`
				State   string `json:"state"`
				Reason  string `json:"reason"`
				By      string `json:"changed_by"`
				At      string `json:"changed_at"`
				Policy  string `json:"policy"`
				Expires string `json:"not_after"`
			} `json:"units"`
			Tokens map[string]any `json:"tokens"`
		}
		if err := p.ask(routeTSA, nil, &s); err != nil {
			p.fail(err)
			return
		}
		var log []struct {
			Sequence  uint64 `json:"sequence"`
			Time      string `json:"time"`
			Kind      string `json:"kind"`
			Unit      string `json:"unit"`
			Requester string `json:"requester"`
			Serial    string `json:"serial"`
			BoundUS   int64  `json:"bound_us"`
			Reason    string `json:"reason"`
			Count     int64  `json:"count"`
		}
		if p.May(routeTSALog) {
			if err := p.ask(routeTSALog, map[string]any{"lines": 30}, &log); err != nil {
				p.fail(err)
				return
			}
		}
		p.show("tsa", map[string]any{"TSA": s, "Log": log})
	}
	c.page("GET /console/tsa", show)
	for act, to := range map[string][2]string{"stop": {routeStopTSA, "stopped"}, "start": {routeStartTSA, "started"}} {
		c.page("POST /console/tsa/"+act, func(p *page) {
			p.acted(p.ask(to[0], values(p.Form, "reason", "unit"), nil), "/console/tsa", to[1], func() { show(p) })
		})
	}
}

type certificate struct {
	Owner      string     `json:"owner"`
	Name       string     `json:"name"`
	Use        string     `json:"use"`
	Algorithm  string     `json:"algorithm"`
	Label      string     `json:"label"`
	Serial     string     `json:"serial"`
	Subject    string     `json:"subject"`
	Issuer     string     `json:"issuer"`
	State      string     `json:"state"`
	NotBefore  *time.Time `json:"not_before"`
	NotAfter   *time.Time `json:"not_after"`
	DaysLeft   int        `json:"days_left"`
	Evaluation bool       `json:"evaluation"`
}

// soonDays is within how many days a certificate ends soon.
const soonDays = 60

func certificateRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/certificates"
		p.waits("/admin/v1/certificates/")
		h := heldOf(p.r, []string{"own", "soon", "signers", "all"})
		ask := wire.SearchCertificates{Text: h.Text, Scope: h.scope(), After: h.After, Most: perPage}
		if h.Show == "soon" {
			ask.WithinDays = soonDays
		}
		var found struct {
			Certificates []certificate `json:"certificates"`
			Next         string        `json:"next"`
		}
		if err := p.ask(routeSearchCertificates, ask, &found); err != nil {
			p.fail(err)
			return
		}
		h.following("/console/certificates", found.Next)
		p.show("certificates", map[string]any{"Certificates": found.Certificates, "List": h})
	}
	c.page("GET /console/certificates", show)
	c.page("POST /console/certificates/revoke", func(p *page) {
		p.acted(p.ask(routeRevoke, reason(p), nil, strings.ToLower(strings.TrimSpace(p.Form.Get("serial")))), "/console/certificates", "changed", func() { show(p) })
	})
	c.page("POST /console/certificates/import", func(p *page) {
		body := wire.ImportCertificates{File: upload(p, "file"), Owner: strings.TrimSpace(p.Form.Get("owner")), AcceptSubject: p.Form.Get("accept_subject") != ""}
		if chain := upload(p, "chain"); len(chain) > 0 {
			body.Chain = [][]byte{chain}
		}
		p.acted(p.ask(routeImport, body, nil), "/console/certificates", "imported", func() { show(p) })
	})
	requestRoutes(c)
}

// uses are what a trust anchor may be admitted for.
var uses = []struct{ Use, Zh, En string }{
	{"staff", "签名人", "signers"}, {"tsa", "时间戳", "timestamps"}, {"log", "日志", "journal"}, {"tls", "本机 TLS", "our TLS"}, {"client", "应用的 TLS", "applications' TLS"},
}

func trustRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/trust"
		p.waits("/admin/v1/anchors")
		var anchors []struct {
			ID         string    `json:"id"`
			Subject    string    `json:"subject"`
			NotAfter   time.Time `json:"not_after"`
			Uses       []string  `json:"uses"`
			Note       string    `json:"note"`
			Evaluation bool      `json:"evaluation"`
			Withdrawn  bool      `json:"withdrawn"`
			Reason     string    `json:"reason"`
		}
		if err := p.ask(routeAnchors, nil, &anchors); err != nil {
			p.fail(err)
			return
		}
		var lists struct {
			Lists []struct {
				Issuer     string    `json:"issuer"`
				Number     string    `json:"number"`
				ThisUpdate time.Time `json:"this_update"`
				NextUpdate time.Time `json:"next_update"`
				Revoked    int       `json:"revoked"`
				State      string    `json:"state"`
				Source     string    `json:"source"`
				Own        bool      `json:"own"`
			} `json:"lists"`
			Sources []struct {
				URL   string `json:"url"`
				At    string `json:"at"`
				New   bool   `json:"new"`
				Error string `json:"error"`
			} `json:"sources"`
			Revocation string `json:"revocation"`
		}
		if err := p.ask(routeCRLs, nil, &lists); err != nil {
			p.fail(err)
			return
		}
		p.show("trust", map[string]any{"Anchors": anchors, "Lists": lists, "Uses": uses})
	}
	c.page("GET /console/trust", show)
	act := func(name, route, notice string, body func(p *page) any) {
		c.page("POST /console/trust/"+name, func(p *page) {
			p.acted(p.ask(route, body(p), nil), "/console/trust", notice, func() { show(p) })
		})
	}
	act("anchors", routeAddAnchor, "changed", func(p *page) any {
		return wire.AddAnchor{Certificate: upload(p, "certificate"), Uses: append([]string{}, p.Form["uses"]...), Note: strings.TrimSpace(p.Form.Get("note"))}
	})
	c.page("POST /console/trust/anchors/{id}/withdraw", func(p *page) {
		p.acted(p.ask(routeWithdrawAnchor, reason(p), nil, p.r.PathValue("id")), "/console/trust", "changed", func() { show(p) })
	})
	act("intermediates", routeIntermediates, "imported", func(p *page) any { return wire.AddIntermediates{File: upload(p, "file")} })
	act("crl", routeImportCRL, "imported", func(p *page) any { return wire.ImportCRL{File: upload(p, "file"), Source: "console"} })
	act("fetch", routeFetchCRLs, "fetched", func(*page) any { return wire.FetchCRLs{} })
	act("publish", routePublishCRLs, "published", func(*page) any { return wire.IssueCRL{} })
}

// upload is a file of a form; none is empty, which the route refuses.
func upload(p *page, name string) []byte {
	f, _, err := p.r.FormFile(name)
	if err != nil {
		return []byte{}
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxUpload))
	if err != nil {
		return []byte{}
	}
	return b
}
