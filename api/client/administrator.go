package client

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"yinjian/api/wire"
)

// NewAdminTLS calls the administrators' listener at https://host:port.
func NewAdminTLS(baseURL string, cfg *tls.Config) *Admin {
	return &Admin{base: baseURL, http: &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, IdleConnTimeout: 30 * time.Second}}}
}

// WithSession answers a client that bears a session. waiting, if set, is told of a request that a second person has to approve,
// whose outcome is then waited for; without it such a request is answered with a [*Waits].
func (a *Admin) WithSession(token string, waiting func(wire.Proposed)) *Admin {
	b := *a
	b.session, b.waiting = token, waiting
	return &b
}

// LoggedIn says whether it bears a session.
func (a *Admin) LoggedIn() bool { return a.session != "" }

// Waits says that a second person has to approve the request.
type Waits struct{ wire.Proposed }

func (w *Waits) Error() string {
	return fmt.Sprintf("client: %s waits for a second person: %v", w.Proposal, w.Approvers)
}

// approvedPoll is how often the outcome is asked for.
const approvedPoll = time.Second

// approved answers data, or what became of the proposal that it is.
func (a *Admin) approved(ctx context.Context, data json.RawMessage) (json.RawMessage, error) {
	var p struct {
		wire.Proposed
		State string `json:"state"`
	}
	if json.Unmarshal(data, &p) != nil || p.Proposal == "" || p.SM3 == "" || p.State != "" {
		return data, nil
	}
	if a.waiting == nil {
		return nil, &Waits{p.Proposed}
	}
	a.waiting(p.Proposed)
	tick := time.NewTicker(approvedPoll)
	defer tick.Stop()
	for {
		got, err := a.get(ctx, "approvals/"+url.PathEscape(p.Proposal))
		if err != nil {
			return nil, err
		}
		var now struct {
			State    string
			Approver string
			Failed   *wire.Problem
			Answer   json.RawMessage
		}
		if err := json.Unmarshal(got, &now); err != nil {
			return nil, fmt.Errorf("client: decoding answer: %w", err)
		}
		switch now.State {
		case "done":
			// It is here; where this is not heard, the appliance forgets it by itself.
			_, _ = a.Decide(context.WithoutCancel(ctx), "confirm", wire.Decide{ID: p.Proposal, SM3: p.SM3})
			return now.Answer, nil
		case "failed":
			return nil, &Problem{Problem: *now.Failed}
		case "pending", "running":
		default:
			return nil, fmt.Errorf("client: the request was not approved: %s %s", now.State, now.Approver)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Login answers a session.
func (a *Admin) Login(ctx context.Context, req wire.Login) (*wire.LoggedIn, error) {
	data, err := a.post(ctx, "login", req)
	if err != nil {
		return nil, err
	}
	var out wire.LoggedIn
	return &out, decode(data, &out)
}

// LoginChallenge answers 32 bytes for one login.
func (a *Admin) LoginChallenge(ctx context.Context) ([]byte, error) {
	data, err := a.post(ctx, "login/challenge", wire.LoginChallenge{})
	if err != nil {
		return nil, err
	}
	var out wire.LoginChallenged
	return out.Challenge, decode(data, &out)
}

func (a *Admin) Logout(ctx context.Context) (json.RawMessage, error) {
	return a.post(ctx, "logout", wire.Logout{})
}

// Session answers a wire.LoggedIn, without the token.
func (a *Admin) Session(ctx context.Context) (json.RawMessage, error) { return a.get(ctx, "session") }

// ChangePassword changes one's own; the session ends with it.
func (a *Admin) ChangePassword(ctx context.Context, req wire.ChangePassword) (json.RawMessage, error) {
	return a.post(ctx, "password", req)
}

func (a *Admin) BootstrapAdministrators(ctx context.Context, req wire.BootstrapAdministrators) (json.RawMessage, error) {
	return a.post(ctx, "administrators/bootstrap", req)
}

func (a *Admin) AddAdministrator(ctx context.Context, req wire.AddAdministrator) (json.RawMessage, error) {
	return a.post(ctx, "administrators", req)
}

func (a *Admin) ListAdministrators(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "administrators")
}

// ChangeAdministrator stops or starts one: act is "stop" or "start".
func (a *Admin) ChangeAdministrator(ctx context.Context, act string, req wire.Decision) (json.RawMessage, error) {
	return a.post(ctx, "administrators/"+url.PathEscape(req.ID)+"/"+url.PathEscape(act), req)
}

func (a *Admin) SetAdministratorPassword(ctx context.Context, req wire.SetAdministratorPassword) (json.RawMessage, error) {
	return a.post(ctx, "administrators/"+url.PathEscape(req.ID)+"/password", req)
}

func (a *Admin) SetAdministratorCertificate(ctx context.Context, req wire.SetAdministratorCertificate) (json.RawMessage, error) {
	return a.post(ctx, "administrators/"+url.PathEscape(req.ID)+"/certificate", req)
}

// ListProposals answers those that the administrator proposed or may approve.
func (a *Admin) ListProposals(ctx context.Context) (json.RawMessage, error) {
	return a.get(ctx, "approvals")
}

// Decide approves or declines a proposal, or confirms that the answer to one's own is here: act is "approve", "decline" or
// "confirm".
func (a *Admin) Decide(ctx context.Context, act string, req wire.Decide) (json.RawMessage, error) {
	return a.post(ctx, "approvals/"+url.PathEscape(req.ID)+"/"+url.PathEscape(act), req)
}
