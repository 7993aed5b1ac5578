package console

import (
	"encoding/json"
	"fmt"
	"html/template"
	"net/url"
	"slices"
	"strings"
	"time"

	"yinjian/api/wire"
)

// functions are what templates of a language call.
func functions(lang string) template.FuncMap {
	pick := func(zh, en string) string {
		if lang == "en" {
			return en
		}
		return zh
	}
	return template.FuncMap{
		"t":          pick,
		"word":       func(w [2]string) string { return pick(w[0], w[1]) },
		"notice":     func(key string) string { return pick(notices[key][0], notices[key][1]) },
		"role":       func(r string) string { return pick(roles[r][0], roles[r][1]) },
		"badge":      func(state string) badge { return badgeOf(state, pick) },
		"when":       when,
		"micro":      microTime,
		"us":         func(v any) string { return duration(number(v) / 1e6) },
		"ms":         func(v any) string { return duration(number(v) / 1e3) },
		"s":          func(v any) string { return duration(number(v)) },
		"signed":     func(v int64) string { return map[bool]string{true: "+"}[v > 0] + duration(float64(v)/1e6) },
		"bytes":      size,
		"short":      short,
		"join":       func(list []string) string { return strings.Join(list, "、") },
		"path":       url.PathEscape,
		"pretty":     pretty,
		"indented":   func(v any) string { b, _ := json.MarshalIndent(v, "", "  "); return string(b) },
		"mayApprove": func(pr wire.Proposal, role string) bool { return slices.Contains(pr.Approvers, role) },
		"sections":   func(p *page) []section { return p.offered() },
		"add":        func(a, b int) int { return a + b },
	}
}

// notices are what a page says after something was done.
var notices = map[string][2]string{
	"stopped":    {"已停用，已记入日志。", "Stopped, and entered in the journal."},
	"started":    {"已启用，已记入日志。", "Started, and entered in the journal."},
	"changed":    {"已变更，已记入日志。", "Changed, and entered in the journal."},
	"enrolled":   {"已登记，已记入日志。", "Enrolled, and entered in the journal."},
	"ended":      {"演练已结束：断开的已恢复，其测试账号已收回。", "The drill is over: what was broken is whole, its accounts are stopped."},
	"restarting": {"正在重新启动，稍后再登录。", "Restarting: log in again in a while."},
	"committed":  {"已提交，下次启动试用新映像。", "Committed: the next start tries the new image."},
	"cancelled":  {"已取消，已记入日志。", "Cancelled, and entered in the journal."},
	"begun":      {"已开始；结果见下。", "Begun; what comes of it is shown below."},
	"proposed":   {"已提交，须由另一位管理员批准后执行。", "Proposed: another administrator has to approve it."},
	"approved":   {"已批准并执行，已记入日志。", "Approved and done, and entered in the journal."},
	"declined":   {"已否决，未执行。", "Declined; nothing was done."},
	"confirmed":  {"已确认取得，设备不再保留这项结果。", "Confirmed; the appliance has forgotten the answer."},
	"loggedout":  {"已退出登录。", "You have logged out."},
	"password":   {"口令已更改。", "The password was changed."},
	"fetched":    {"已向各地址取吊销列表，结果见下。", "The lists were fetched; what came of it stands below."},
	"published":  {"已发布新的吊销列表，已记入日志。", "New lists were published, and entered in the journal."},
	"imported":   {"已导入，已记入日志。", "Imported, and entered in the journal."},
	"registered": {"已登记，已记入日志。", "Registered, and entered in the journal."},
}

var roles = map[string][2]string{
	"system": {"系统管理员", "system administrator"}, "security": {"安全管理员", "security administrator"},
	"audit": {"审计管理员", "audit administrator"}, "operator": {"应用操作员", "operator"},
}

// A badge is a state: a colour, and the word that says the same.
type badge struct{ Class, Text string }

var states = map[string]struct{ class, zh, en string }{
	"operational": {"ok", "运行", "operational"}, "failed": {"bad", "故障", "failed"}, "locked": {"warn", "待解锁", "locked"}, "uninitialised": {"off", "未初始化", "uninitialised"},
	"up": {"ok", "正常", "up"}, "starting": {"warn", "启动中", "starting"}, "down": {"bad", "不可用", "down"}, "needs_operator": {"bad", "需人工处理", "needs operator"},
	"refused": {"bad", "拒绝使用", "refused"}, "draining": {"warn", "停派中", "draining"}, "ready": {"ok", "就绪", "ready"}, "restarting": {"warn", "重启中", "restarting"}, "closed": {"off", "已关闭", "closed"},
	"cold": {"off", "冷", "cold"}, "acquiring": {"warn", "获取中", "acquiring"}, "trusted": {"ok", "可信", "trusted"}, "holdover": {"warn", "守时", "holdover"},
	"untrusted": {"bad", "不可信", "untrusted"}, "suspect": {"bad", "可疑", "suspect"},
	"agreed": {"ok", "一致", "agreed"}, "rejected": {"bad", "被否决", "rejected"}, "candidate": {"warn", "候选", "candidate"}, "unfit": {"bad", "不合格", "unfit"},
	"silent": {"bad", "无应答", "silent"}, "denied": {"bad", "拒绝应答", "denied"}, "waiting": {"off", "等待", "waiting"},
	"running": {"ok", "运行", "running"}, "stopped": {"off", "已停用", "stopped"}, "unable": {"bad", "不能服务", "unable"},
	"active": {"ok", "使用中", "active"}, "next": {"off", "待启用", "next"}, "superseded": {"off", "已被替换", "superseded"}, "expired": {"bad", "已过期", "expired"},
	"revoked": {"bad", "已吊销", "revoked"}, "unusable": {"bad", "不可用", "unusable"}, "pending": {"warn", "已请求", "pending"}, "awaited": {"warn", "待导入", "awaited"},
	"current": {"ok", "有效", "current"}, "stale": {"bad", "已过期", "stale"}, "future": {"warn", "来自将来", "future"}, "unknown": {"warn", "未知", "unknown"},
	"recorded": {"ok", "正式", "recorded"}, "test": {"off", "测试", "test"}, "imported": {"off", "导入", "imported"},
	"normal": {"ok", "正常", "normal"}, "notice": {"warn", "提示", "notice"}, "warning": {"warn", "警告", "warning"}, "severe": {"bad", "严重", "severe"}, "unfinished": {"warn", "未完成", "unfinished"},
	"valid": {"ok", "有效", "valid"}, "invalid": {"bad", "无效", "invalid"}, "indeterminate": {"warn", "无法判定", "indeterminate"},
	"passed": {"ok", "通过", "passed"}, "not_checked": {"off", "未检查", "not checked"}, "not-checked": {"off", "未检查", "not checked"},
	"ok": {"ok", "相符", "ok"}, "wrong": {"bad", "不符", "wrong"}, "other": {"off", "他节点", "other node"},
	"present": {"ok", "在位", "present"}, "missing": {"bad", "缺失", "missing"}, "elsewhere": {"off", "在另一院区", "elsewhere"}, "sealed": {"ok", "已封存", "sealed"}, "destroyed": {"off", "已销毁", "destroyed"},
	"locked-pin": {"bad", "PIN 已锁", "PIN locked"}, "locked-login": {"bad", "登录已锁", "login locked"}, "unavailable": {"warn", "密码机不应答", "machine away"}, "yes": {"ok", "是", "yes"}, "no": {"bad", "否", "no"}, "token": {"ok", "时间戳", "token"}, "stop": {"warn", "停止", "stop"}, "start": {"ok", "启动", "start"},
	"withdrawn": {"off", "已撤销", "withdrawn"}, "admitted": {"ok", "受信任", "admitted"}, "fork": {"bad", "分叉", "fork"},
}

func badgeOf(state string, pick func(zh, en string) string) badge {
	s, ok := states[strings.ToLower(state)]
	if !ok {
		return badge{"off", state}
	}
	return badge{s.class, pick(s.zh, s.en)}
}

// beijing is what hospital staff read; a time that is shown says so.
var beijing = time.FixedZone("UTC+8", 8*3600)

// when shows a time as RFC 3339 has it; anything else as it is.
func when(v any) string {
	switch v := v.(type) {
	case time.Time:
		if v.IsZero() {
			return "—"
		}
		return v.In(beijing).Format("2006-01-02 15:04:05")
	case *time.Time:
		if v == nil {
			return "—"
		}
		return when(*v)
	case string:
		if t, err := time.Parse(time.RFC3339, v); err == nil {
			return when(t)
		}
		if v == "" {
			return "—"
		}
		return v
	}
	return fmt.Sprint(v)
}

// microTime is a time of the journal.
func microTime(us int64) time.Time { return time.UnixMicro(us) }

func number(v any) float64 {
	switch v := v.(type) {
	case int:
		return float64(v)
	case int64:
		return float64(v)
	case uint64:
		return float64(v)
	case float64:
		return v
	}
	return 0
}

// duration shows seconds in the unit in which people think of them.
func duration(s float64) string {
	sign := ""
	if s < 0 {
		sign, s = "−", -s
	}
	switch {
	case s == 0:
		return "0"
	case s < 1e-3:
		return fmt.Sprintf("%s%.0f µs", sign, s*1e6)
	case s < 1:
		return fmt.Sprintf("%s%.3g ms", sign, s*1e3)
	case s < 120:
		return fmt.Sprintf("%s%.3g s", sign, s)
	case s < 7200:
		return fmt.Sprintf("%s%.0f min", sign, s/60)
	case s < 48*3600:
		return fmt.Sprintf("%s%.1f h", sign, s/3600)
	}
	return fmt.Sprintf("%s%.1f d", sign, s/86400)
}

func size(v any) string {
	n := number(v)
	for _, unit := range []string{"B", "KiB", "MiB", "GiB"} {
		if n < 1024 {
			return fmt.Sprintf("%.3g %s", n, unit)
		}
		n /= 1024
	}
	return fmt.Sprintf("%.1f TiB", n)
}

// short is the beginning of a digest; the whole stands in the title.
func short(s string) string {
	if len(s) > 20 {
		return s[:12] + "…"
	}
	return s
}

// pretty is JSON with its lines indented; anything else as it is.
func pretty(v any) string {
	var raw []byte
	switch v := v.(type) {
	case string:
		raw = []byte(v)
	case json.RawMessage:
		raw = v
	}
	var tree any
	if json.Unmarshal(raw, &tree) != nil {
		return string(raw)
	}
	out, err := json.MarshalIndent(tree, "", "  ")
	if err != nil {
		return string(raw)
	}
	return string(out)
}
