package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
)

func settingsCommand() *cobra.Command {
	c := group(&cobra.Command{Use: "settings", Short: "设置：查看，两人更改，下次启动试用，不成自动换回 (the configuration, changed by two persons)",
		Long: `改 config.toml 与它所指的口令、证书文件：提出，第二人批准，重新启动时试用；启动不成、或没有人确认仍连得到，自动换回原来的。
Changes config.toml and the files that it names: one proposes, another approves, the next start tries it, and goes back by itself when
it does not come up, or when nobody confirms that it is still reached.`})
	c.AddCommand(
		shown("show", "现在的设置，与等待、试用、换回来的更改 (the settings, and which change waits, is tried or was left)", nil,
			func(ctx context.Context, a *client.Admin) (json.RawMessage, error) { return a.Settings(ctx) }, printSettings),
		checkSettingsCommand(), proposeSettingsCommand(),
		decideSettings("restart", "重新启动服务，试用已批准的设置；签名中断十几秒 (restart the service with what was approved)", (*client.Admin).RestartForSettings, "正在重新启动 (restarting)"),
		decideSettings("confirm", "换了监听、管理员或密码机的设置之后，确认仍连得到 (say that the appliance is still reached)", (*client.Admin).ConfirmSettings, "已确认 (confirmed)"),
		decideSettings("cancel", "取消等待的更改，或忘记换回来的 (take back a change that waits, or forget one that was left)", (*client.Admin).CancelSettings, "已取消 (cancelled)"),
	)
	return c
}

// settingsFlags are a change as it is given on the command line.
type settingsFlags struct {
	file                string
	set, remove, secret []string
}

func (s *settingsFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&s.file, "file", "", "要改的项，TOML，写法同 config.toml (what changes, as config.toml has it)")
	f.StringArrayVar(&s.set, "set", nil, `一项，如 policy.rate=2000、log.level='"debug"'；值是 TOML，可多次 (one key; its value is TOML)`)
	f.StringArrayVar(&s.remove, "remove", nil, "从 config.toml 去掉的项，如 tsa.upstream，可多次 (a key that goes out)")
	f.StringArrayVar(&s.secret, "secret", nil, "写入 secrets/ 的文件：名称=本地文件，可多次 (a file for the folder secrets: name=local file)")
}

func (s *settingsFlags) read() (wire.Settings, error) {
	out := wire.Settings{Overlay: []byte{}, Remove: s.remove}
	for _, one := range s.set {
		key, value, ok := strings.Cut(one, "=")
		if !ok {
			return out, usageError{fmt.Errorf("--set %s：须为 项=值 (want key=value)", one)}
		}
		out.Overlay = fmt.Appendf(out.Overlay, "%s = %s\n", key, value)
	}
	if s.file != "" {
		b, err := os.ReadFile(s.file)
		if err != nil {
			return out, err
		}
		out.Overlay = append(out.Overlay, b...)
	}
	for _, one := range s.secret {
		name, file, ok := strings.Cut(one, "=")
		if !ok {
			return out, usageError{fmt.Errorf("--secret %s：须为 名称=文件 (want name=file)", one)}
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return out, err
		}
		out.Secrets = append(out.Secrets, wire.SecretFile{Name: name, Secret: b})
	}
	return out, nil
}

func (s *settingsFlags) check(ctx context.Context, a *client.Admin) (wire.Settings, *wire.CheckedSettings, json.RawMessage, error) {
	change, err := s.read()
	if err != nil {
		return change, nil, nil, err
	}
	answer, err := a.CheckSettings(ctx, change)
	if err != nil {
		return change, nil, nil, err
	}
	checked := new(wire.CheckedSettings)
	return change, checked, answer, json.Unmarshal(answer, checked)
}

func checkSettingsCommand() *cobra.Command {
	var s settingsFlags
	return shown("check", "核对会改变什么，什么也不做 (what would change; nothing is done)", s.add, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
		_, _, answer, err := s.check(ctx, a)
		return answer, err
	}, func(w io.Writer, c *wire.CheckedSettings) { printSettingChanges(w, c.Changes, c.Confirm) })
}

func proposeSettingsCommand() *cobra.Command {
	var s settingsFlags
	var req wire.ChangeSettings
	c := shown("propose", "提出更改：逐项列出原值与新值，另一人批准，下次启动试用 (propose a change; another approves, the next start tries it)", func(c *cobra.Command) {
		s.add(c)
		required(c, &req.Reason, "reason", "原因，记入日志 (why, for the journal)")
		c.Flags().StringArrayVar(&req.Persons, "confirmed-by", nil, "核对人，给两次，记入日志；登录后不必 (who has looked at it, twice; not after a login)")
	}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
		change, checked, _, err := s.check(ctx, a)
		if err != nil {
			return nil, err
		}
		printSettingChanges(os.Stderr, checked.Changes, checked.Confirm)
		req.Settings, req.Base, req.Changes = change, checked.Base, checked.Changes
		return a.ChangeSettings(ctx, req)
	}, func(w io.Writer, c *wire.SettingsChange) {
		fmt.Fprintln(w, "已批准，下次启动试用 (approved; the next start tries it)：yinjian settings restart")
	})
	return c
}

func decideSettings(use, short string, do func(*client.Admin, context.Context, wire.DecideSettings) (json.RawMessage, error), done string) *cobra.Command {
	var req wire.DecideSettings
	return shown(use, short, func(c *cobra.Command) {
		required(c, &req.Reason, "reason", "原因，记入日志 (why, for the journal)")
	}, func(ctx context.Context, a *client.Admin) (json.RawMessage, error) {
		return do(a, ctx, req)
	}, func(w io.Writer, c *wire.SettingsChange) { fmt.Fprintln(w, done) })
}

func printSettingChanges(w io.Writer, changes []wire.SettingChange, confirm bool) {
	t := &columns{to: w}
	for _, c := range changes {
		fmt.Fprintf(t, "%s\t%s\t→\t%s\n", c.Key, c.Old, c.New)
	}
	t.flush()
	if confirm {
		fmt.Fprintln(w, "重新启动之后须有人确认仍连得到，否则自动换回 (after the restart somebody has to confirm, or the settings of before come back)：yinjian settings confirm")
	}
}

func printSettings(w io.Writer, s *wire.SettingsStatus) {
	fmt.Fprintf(w, "%s\nconfig.toml 的 SM3：%s\n", s.Config, s.SM3)
	for _, one := range []struct {
		title string
		c     *wire.SettingsChange
	}{{"等待重新启动 (waits for the restart)", s.Waiting}, {"正在试用 (is tried)", s.Trial}, {"没有成功，已换回 (was left again)", s.Left}} {
		if one.c == nil {
			continue
		}
		fmt.Fprintf(w, "\n%s：%s，%s\n", one.title, one.c.By, one.c.Reason)
		if one.c.Why != "" {
			fmt.Fprintln(w, "原因 why：", one.c.Why)
		}
		if one.c.LeftS > 0 {
			fmt.Fprintf(w, "还有 %d 秒确认 (seconds left to confirm)\n", one.c.LeftS)
		}
		printSettingChanges(w, one.c.Changes, one.c == s.Waiting && one.c.Confirm)
	}
}
