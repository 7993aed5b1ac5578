package console

import (
	"encoding/json"
	"encoding/pem"
	"slices"
	"strings"

	"yinjian/api/wire"
)

const (
	routeApprovals = "GET /admin/v1/approvals"
	routeApproval  = "GET /admin/v1/approvals/:id"
	routeApprove   = "POST /admin/v1/approvals/:id/approve"
	routeDecline   = "POST /admin/v1/approvals/:id/decline"
	routeConfirm   = "POST /admin/v1/approvals/:id/confirm"
)

func approvalRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/approvals"
		var list struct {
			Proposals []wire.Proposal `json:"proposals"`
		}
		if err := p.ask(routeApprovals, nil, &list); err != nil {
			p.fail(err)
			return
		}
		p.show("approvals", map[string]any{"Proposals": list.Proposals})
	}
	c.page("GET /console/approvals", show)
	for act, to := range map[string][2]string{"approve": {routeApprove, "approved"}, "decline": {routeDecline, "declined"}} {
		c.page("POST /console/approvals/{id}/"+act, func(p *page) {
			var done wire.Proposal
			err := p.ask(to[0], wire.Decide{SM3: p.Form.Get("sm3"), Reason: p.Form.Get("reason")}, &done, p.r.PathValue("id"))
			if err == nil && done.Failed != nil { // it was approved, and the route refused
				err = &Refusal{*done.Failed}
			}
			p.acted(err, "/console/approvals", to[1], func() { show(p) })
		})
	}
	c.page("GET /console/approvals/{id}", func(p *page) {
		p.Section = "/console/approvals"
		var done struct {
			wire.Proposal
			Answer json.RawMessage `json:"answer"`
		}
		if err := p.ask(routeApproval, nil, &done, p.r.PathValue("id")); err != nil {
			p.fail(err)
			return
		}
		// The answers of other routes have no key, and no certificate request.
		var key wire.RegisteredApplication
		var request wire.CertificateRequest
		_ = json.Unmarshal(done.Answer, &key)
		_ = json.Unmarshal(done.Answer, &request)
		p.show("answer", map[string]any{"Proposal": done.Proposal, "Answer": done.Answer, "Key": key.Key, "CSR": csrPEM(request.CSR)})
	})
	c.page("POST /console/approvals/{id}/confirm", func(p *page) {
		id := p.r.PathValue("id")
		p.acted(p.ask(routeConfirm, wire.Decide{SM3: p.Form.Get("sm3")}, nil, id), "/console/approvals", "confirmed", func() { show(p) })
	})
}

// shownWaiting is how many proposals stand above a page; the rest are counted.
const shownWaiting = 3

// waits has the page say what waits for a second person, of what the routes do whose paths begin so. Where it cannot be told now,
// the page of approvals says why.
func (p *page) waits(beginnings ...string) {
	var list struct {
		Proposals []wire.Proposal `json:"proposals"`
	}
	if p.ask(routeApprovals, nil, &list) != nil {
		return
	}
	for _, one := range list.Proposals {
		if one.State == "pending" && slices.ContainsFunc(beginnings, func(b string) bool { return strings.HasPrefix(one.Path, b) }) {
			p.Waiting = append(p.Waiting, one)
		}
	}
	if n := len(p.Waiting) - shownWaiting; n > 0 {
		p.Waiting, p.Others = p.Waiting[:shownWaiting], n
	}
}

// csrPEM is a certificate request as CAs take it; "" for none.
func csrPEM(der []byte) string {
	if len(der) == 0 {
		return ""
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}
