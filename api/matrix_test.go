package api

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/labstack/echo/v4"

	"yinjian/appliance/account"
)

// A route without a line, and a line without a route, keep a server from starting.
func TestMatrixAndRoutesAgree(t *testing.T) {
	t.Parallel()
	var routes []*echo.Route
	for r := range lines {
		routes = append(routes, &echo.Route{Method: r.method, Path: r.pattern})
	}
	if len(lines) != len(matrix) {
		t.Errorf("%d lines for %d routes: one stands twice", len(matrix), len(lines))
	}
	if err := checkMatrix(routes); err != nil {
		t.Errorf("the routes of the matrix itself: %v", err)
	}
	if err := checkMatrix(append(routes, &echo.Route{Method: "POST", Path: "/admin/v1/back-door"})); err == nil || !strings.Contains(err.Error(), "back-door") {
		t.Errorf("a route without a line: %v", err)
	}
	if err := checkMatrix(routes[1:]); err == nil || !strings.Contains(err.Error(), routes[0].Path) {
		t.Errorf("a line without a route: %v", err)
	}
}

// What the matrix may not say, whoever edits it.
func TestMatrixKeepsRolesApart(t *testing.T) {
	t.Parallel()
	for _, l := range matrix {
		at := l.Method + " " + l.Pattern
		system, security := slices.Contains(l.Roles, account.System), slices.Contains(l.Roles, account.Security)
		switch {
		case l.Changes && slices.Contains(l.Roles, account.Auditor):
			t.Errorf("%s: who audits changes something", at)
		case l.Changes && system && security && !strings.HasPrefix(l.Pattern, "/admin/v1/approvals/"):
			t.Errorf("%s: the work of two roles", at)
		case slices.Contains(l.Second, account.Auditor), slices.Contains(l.Second, account.Operator):
			t.Errorf("%s: %v approve", at, l.Second)
		case len(l.Second) > 0 && (!l.Changes || len(l.Roles) == 0):
			t.Errorf("%s: two persons for what changes nothing, or for everybody", at)
		case l.Without == anywhere && (l.Changes || len(l.Roles) > 0):
			t.Errorf("%s: roles for whom nobody asks", at)
		case l.Method == get && l.Changes:
			t.Errorf("%s: a GET changes something", at)
		case l.Title == "":
			t.Errorf("%s: no title", at)
		}
	}
	// What needs two persons by the design, of what exists.
	for _, pattern := range []string{
		"/admin/v1/applications", "/admin/v1/applications/:id/limits", "/admin/v1/applications/:id/production",
		"/admin/v1/signers", "/admin/v1/signers/import", "/admin/v1/signers/:id/keys", "/admin/v1/signers/:id/pin", "/admin/v1/signers/:id/recover", "/admin/v1/signers/:id/start",
		"/admin/v1/machines", "/admin/v1/certificates/requests", "/admin/v1/keys/destroy", "/admin/v1/ceremonies", "/admin/v1/anchors",
		"/admin/v1/time/readmit", "/admin/v1/administrators", "/admin/v1/administrators/:id/start", "/admin/v1/administrators/:id/password", "/admin/v1/administrators/:id/certificate",
		"/admin/v1/backups", "/admin/v1/backups/custodians", "/admin/v1/backups/reports", "/admin/v1/peer", "/admin/v1/peer/remove", "/admin/v1/drills", "/admin/v1/update/commit", "/admin/v1/settings",
		"/admin/v1/packs/install", "/admin/v1/packs/remove", "/admin/v1/packs/key",
	} {
		if l := lineOf(post, pattern); l == nil || len(l.Second) == 0 {
			t.Errorf("%s is done by one person", pattern)
		}
	}
}

// TestRolesPage holds the table of docs/roles.md against the matrix; -update writes it anew.
func TestRolesPage(t *testing.T) {
	t.Parallel()
	const name, from, to = "../docs/roles.md", "<!-- matrix -->\n", "<!-- /matrix -->"
	var table strings.Builder
	table.WriteString("| 路由 route | 作用 | 系统 | 安全 | 审计 | 操作员 | 第二人 | 未登录 | 变更 |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	mark := func(yes bool, word string) string {
		if yes {
			return word
		}
		return ""
	}
	names := map[Role]string{account.System: "系统", account.Security: "安全", account.Auditor: "审计", account.Operator: "操作员"}
	for _, l := range matrix {
		fmt.Fprintf(&table, "| `%s %s` | %s |", l.Method, l.Pattern, l.Title)
		for _, r := range account.Roles {
			fmt.Fprintf(&table, " %s |", mark(len(l.Roles) == 0 || slices.Contains(l.Roles, r), "✓"))
		}
		var second []string
		for _, r := range l.Second {
			second = append(second, names[r])
		}
		fmt.Fprintf(&table, " %s | %s | %s |\n", strings.Join(second, "、"), map[Place]string{locally: "本机", anywhere: "可"}[l.Without], mark(l.Changes, "是"))
	}
	holdsTable(t, name, from, to, table.String())
}
