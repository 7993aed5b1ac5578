package console

import (
	"io"
	"strings"
	"time"
)

const (
	routeTSA          = "GET /admin/v1/tsa"
	routeTSALog       = "POST /admin/v1/tsa/log"
	routeStopTSA      = "POST /admin/v1/tsa/stop"
	routeStartTSA     = "POST /admin/v1/tsa/start"
	routeCertificates = "GET /admin/v1/certificates"
	routeImport       = "POST /admin/v1/certificates"
	routeRevoke       = "POST /admin/v1/certificates/:serial/revoke"
	routeAnchors      = "GET /admin/v1/anchors"
	routeCRLs         = "GET /admin/v1/trust/crls"
	routeImportCRL    = "POST /admin/v1/trust/crls"
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

// shownCertificates is how many a page has; the signers' are thousands.
const shownCertificates = 200

func certificateRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/certificates"
		var all []certificate
		if err := p.ask(routeCertificates, nil, &all); err != nil {
			p.fail(err)
			return
		}
		q := strings.TrimSpace(p.r.URL.Query().Get("q"))
		var some []certificate
		omitted := 0
		for _, k := range all {
			switch {
			case q == "" && strings.HasPrefix(k.Owner, "signer:") && (k.DaysLeft > 60 || k.State == "superseded"): // those of the house, and what ends soon
			case q != "" && !strings.Contains(strings.ToLower(k.Owner+" "+k.Name+" "+k.Serial+" "+k.Subject), strings.ToLower(q)):
			case len(some) == shownCertificates:
				omitted++
			default:
				some = append(some, k)
			}
		}
		data := map[string]any{"Certificates": some, "Omitted": omitted, "Total": len(all), "Query": q}
		if p.May(routeAnchors) {
			var anchors []struct {
				ID         string    `json:"id"`
				Subject    string    `json:"subject"`
				NotAfter   time.Time `json:"not_after"`
				Uses       []string  `json:"uses"`
				Note       string    `json:"note"`
				Evaluation bool      `json:"evaluation"`
				Withdrawn  bool      `json:"withdrawn"`
			}
			if err := p.ask(routeAnchors, nil, &anchors); err != nil {
				p.fail(err)
				return
			}
			data["Anchors"] = anchors
		}
		if p.May(routeCRLs) {
			var lists struct {
				Lists []struct {
					Issuer     string    `json:"issuer"`
					Number     string    `json:"number"`
					ThisUpdate time.Time `json:"this_update"`
					NextUpdate time.Time `json:"next_update"`
					Revoked    int       `json:"revoked"`
					State      string    `json:"state"`
					Source     string    `json:"source"`
				} `json:"lists"`
				Revocation string `json:"revocation"`
			}
			if err := p.ask(routeCRLs, nil, &lists); err != nil {
				p.fail(err)
				return
			}
			data["Lists"] = lists
		}
		p.show("certificates", data)
	}
	c.page("GET /console/certificates", show)
	c.page("POST /console/certificates/revoke", func(p *page) {
		p.acted(p.ask(routeRevoke, reason(p), nil, strings.ToLower(strings.TrimSpace(p.Form.Get("serial")))), "/console/certificates", "changed", func() { show(p) })
	})
	c.page("POST /console/certificates/import", func(p *page) {
		p.acted(p.ask(routeImport, map[string]any{"file": upload(p, "file")}, nil), "/console/certificates", "imported", func() { show(p) })
	})
	c.page("POST /console/certificates/crl", func(p *page) {
		p.acted(p.ask(routeImportCRL, map[string]any{"file": upload(p, "file"), "source": "console"}, nil), "/console/certificates", "imported", func() { show(p) })
	})
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
