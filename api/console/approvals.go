package console

import (
	"encoding/json"

	"yinjian/api/wire"
)

const (
	routeApprovals = "GET /admin/v1/approvals"
	routeApproval  = "GET /admin/v1/approvals/:id"
	routeApprove   = "POST /admin/v1/approvals/:id/approve"
	routeDecline   = "POST /admin/v1/approvals/:id/decline"
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
	// The answer is given once: nothing but a button may take it.
	c.page("POST /console/approvals/{id}/answer", func(p *page) {
		p.Section = "/console/approvals"
		var done wire.Proposal
		if err := p.ask(routeApproval, nil, &done, p.r.PathValue("id")); err != nil {
			p.acted(err, "", "", func() { show(p) })
			return
		}
		text, err := json.Marshal(done.Answer)
		if err != nil {
			p.fail(err)
			return
		}
		var registered wire.RegisteredApplication
		_ = json.Unmarshal(text, &registered) // the answers of other routes have no key
		p.show("answer", map[string]any{"Proposal": done, "Answer": json.RawMessage(text), "Key": registered.Key})
	})
}
