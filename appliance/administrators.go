package appliance

import (
	"context"
	"fmt"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
)

// Values of admin.local.
const (
	localOpen  = "open"
	localLogin = "login"
)

// AdminAccess is about who administers. See docs/roles.md.
type AdminAccess struct {
	// Local says whether the local socket asks for a login: "open" lets root and the service's user do everything (evaluation),
	// "login" asks. Default open.
	Local string `toml:"local"`
	// PasswordDays is how long a password may be used; default 90, and at most that.
	PasswordDays int `toml:"password_days"`
	// PasswordMin is the least length of a password, in characters; default 12, and at least that.
	PasswordMin int `toml:"password_min"`
	// Theme is a folder with the hospital's name, colour and logo for the console; see docs/console.md. "": ours.
	Theme string `toml:"theme,omitempty"`
}

func (c *Config) validateAdmin(bad func(key, format string, args ...any)) {
	if c.Admin.Local != localOpen && c.Admin.Local != localLogin {
		bad("admin.local", "须为 open 或 login (open or login)")
	}
	if most := int(account.MaxPasswordLife.Hours() / 24); c.Admin.PasswordDays < 1 || c.Admin.PasswordDays > most {
		bad("admin.password_days", "须为 1–%d (1 to %d)", most, most)
	}
	if c.Admin.PasswordMin < account.MinPassword || c.Admin.PasswordMin > 64 {
		bad("admin.password_min", "须为 %d–64 (%d to 64)", account.MinPassword, account.MinPassword)
	}
}

// accounts are the administrators for the API.
type accounts struct{ a *Appliance }

func (d accounts) Administrator(id string) (*account.Administrator, bool, bool) {
	return d.a.directory.ActiveAdministrator(id)
}

func (d accounts) Authenticate(ctx context.Context, l account.LoginAttempt) (*account.Administrator, error) {
	return d.a.directory.AuthenticateAdministrator(ctx, l)
}

func (d accounts) ChangePassword(ctx context.Context, actor, from, id string, req api.ChangePassword) (any, error) {
	return d.view(d.a.directory.ChangePassword(ctx, actor, from, id, req.Old, req.Password))
}

func newAdministrator(r api.AddAdministrator) account.NewAdministrator {
	return account.NewAdministrator{ID: r.ID, Name: r.Name, Role: account.Role(r.Role), Password: r.Password, Certificate: r.Certificate}
}

func (d accounts) BootstrapAdministrators(ctx context.Context, actor string, req api.BootstrapAdministrators) (any, error) {
	var all []account.NewAdministrator
	for _, r := range req.Administrators {
		all = append(all, newAdministrator(r))
	}
	if _, err := d.a.directory.BootstrapAdministrators(ctx, actor, all); err != nil {
		return nil, err
	}
	return d.ListAdministrators(ctx, actor)
}

func (d accounts) AddAdministrator(ctx context.Context, actor string, req api.AddAdministrator) (any, error) {
	return d.view(d.a.directory.AddAdministrator(ctx, actor, newAdministrator(req)))
}

func (d accounts) ListAdministrators(context.Context, string) (any, error) {
	out := []*account.AdministratorView{}
	for _, a := range d.a.directory.Administrators() {
		out = append(out, d.a.directory.ViewAdministrator(a))
	}
	return map[string]any{"administrators": out}, nil
}

func (d accounts) StopAdministrator(ctx context.Context, actor string, req api.Decision) (any, error) {
	return d.view(d.a.directory.StopAdministrator(ctx, actor, req.ID, true, req.Reason))
}

func (d accounts) StartAdministrator(ctx context.Context, actor string, req api.Decision) (any, error) {
	return d.view(d.a.directory.StopAdministrator(ctx, actor, req.ID, false, req.Reason))
}

func (d accounts) SetAdministratorPassword(ctx context.Context, actor string, req api.SetAdministratorPassword) (any, error) {
	return d.view(d.a.directory.SetAdministratorPassword(ctx, actor, req.ID, req.Password))
}

func (d accounts) SetAdministratorCertificate(ctx context.Context, actor string, req api.SetAdministratorCertificate) (any, error) {
	return d.view(d.a.directory.SetAdministratorCertificate(ctx, actor, req.ID, req.Certificate))
}

func (d accounts) view(a *account.Administrator, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return d.a.directory.ViewAdministrator(a), nil
}

func (d accounts) Note(ctx context.Context, n api.Notice) error {
	draft := audit.Draft{Kind: n.Kind, Actor: n.Actor, Object: n.Object}
	for i := 0; i+1 < len(n.Fields); i += 2 {
		draft.Fields = append(draft.Fields, audit.Field{Name: n.Fields[i], Value: audit.Text(n.Fields[i+1])})
	}
	if _, err := d.a.journal.Append(ctx, draft); err != nil {
		return fmt.Errorf("journalling %s: %w", n.Kind, account.JournalProblem(err))
	}
	return nil
}
