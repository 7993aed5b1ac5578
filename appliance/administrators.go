package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"yinjian/api"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
)

// Values of admin.local.
const (
	localOpen  = "open"
	LocalLogin = "login"
)

// AdminAccess is about who administers. See docs/roles.md.
type AdminAccess struct {
	// 本机管理套接字：`open` 不要求登录，root 与设备服务用户可做一切，仅供评估；`login` 须管理员登录，见 [roles.md](roles.md)
	// (whether the local socket asks for a login)
	// 缺省：`open`
	Local string `toml:"local"`
	// 管理员口令用多久须更改，至多 90 天 (days until a password has to be changed)
	// 缺省：`90`
	PasswordDays int `toml:"password_days"`
	// 管理员口令的最小长度，字符数，至少 12 (least length of a password)
	// 缺省：`12`
	PasswordMin int `toml:"password_min"`
	// 控制台主题文件夹（医院名称、颜色、标志），见 [console.md](console.md) (a folder with the hospital's name, colour and
	// logo for the console)
	// 缺省：无
	Theme string `toml:"theme,omitempty"`
}

func (c *Config) validateAdmin(bad func(key, format string, args ...any)) {
	if c.Admin.Local != localOpen && c.Admin.Local != LocalLogin {
		bad("admin.local", "须为 open 或 login (open or login)")
	}
	if most := int(account.MaxPasswordLife.Hours() / 24); c.Admin.PasswordDays < 1 || c.Admin.PasswordDays > most {
		bad("admin.password_days", "须为 1–%d (1 to %d)", most, most)
	}
	if c.Admin.PasswordMin < account.MinPassword || c.Admin.PasswordMin > 64 {
		bad("admin.password_min", "须为 %d–64 (%d to 64)", account.MinPassword, account.MinPassword)
	}
}

// FirstAdministratorsFile is where the first three administrators wait for the first start, without their passwords.
func FirstAdministratorsFile(dir string) string {
	return filepath.Join(dir, "secrets", "administrators.json")
}

// WriteFirstAdministrators has the first start of the appliance in dir make these administrators.
func WriteFirstAdministrators(dir string, all []account.NewAdministrator) error {
	b, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(FirstAdministratorsFile(dir), append(b, '\n'), 0o600)
}

// makeFirstAdministrators makes those that init has left, and removes what it left. A start that was cut off in between finds
// those that are there, and makes the others.
func (a *Appliance) makeFirstAdministrators(ctx context.Context) error {
	file := FirstAdministratorsFile(a.dir)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var all []account.NewAdministrator
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if !a.directory.Bootstrapped() {
		if _, err := a.directory.BootstrapAdministrators(ctx, "appliance init", all); err != nil {
			return fmt.Errorf("首批管理员 (the first administrators): %w", err)
		}
	}
	return os.Remove(file)
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

// tellFailedLogins sums up in the journal what of failed logins has no entry of its own.
func (a *Appliance) tellFailedLogins(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
		if err := a.directory.TellFailedLogins(context.WithoutCancel(ctx), ctx.Err() != nil); err != nil {
			a.log.WithError(err).Error("failed logins could not be summed up in the journal")
		}
	}
	return nil
}
