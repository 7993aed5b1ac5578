package api

import (
	"errors"
	"fmt"
	"slices"

	"github.com/labstack/echo/v4"

	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// A Role is an administrator's.
type Role = account.Role

// A State is one of the appliance's. docs/states.md shows how they follow each other.
type State string

// The states of an appliance.
const (
	Uninitialised State = "uninitialised" // a folder that is no appliance yet
	Locked        State = "locked"        // PINs have to be given first
	Starting      State = "starting"      // passes by itself
	Operational   State = "operational"
	Failed        State = "failed"   // the start went wrong
	Stopping      State = "stopping" // passes by itself
)

// States are all of them, in the order in which an appliance comes through them.
var States = []State{Uninitialised, Locked, Starting, Operational, Failed, Stopping}

// A Place is where a route answers somebody who has not logged in.
type Place int

const (
	nowhere Place = iota
	locally       // on the local socket
	anywhere
)

// A Line says of one route of the administration who may use it, and when.
type Line struct {
	Method, Pattern string
	// Title is what it does, for docs/roles.md.
	Title string
	// Roles are those that may; none: whoever has logged in.
	Roles []Role
	// Second are the roles of which a second person has to approve, somebody else than the first; none: nobody has to.
	Second []Role
	// Own is a session's own affair: it answers also while the password has to be changed.
	Own bool
	// Without says where it answers without a login.
	Without Place
	// States are those in which it answers; none: operational alone.
	States  []State
	Changes bool // it changes something
}

// Matrix is the one table of roles and routes: what is not in it does not exist, and a server with a route that it does not
// know does not start. docs/roles.md shows it.
func Matrix() []Line { return slices.Clone(matrix) }

const post, get = "POST", "GET"

var (
	security = []Role{account.Security}
	system   = []Role{account.System}
	auditor  = []Role{account.Auditor}
	staffing = []Role{account.Security, account.Operator}
	// second may approve what the security and the system administrator propose: the other one of them, or one more of the same.
	second = []Role{account.Security, account.System}

	seeStaff    = []Role{account.Security, account.Auditor, account.Operator}
	seeTrust    = []Role{account.Security, account.Auditor}
	seeMachines = []Role{account.System, account.Security, account.Auditor}
	seeService  = []Role{account.System, account.Auditor}
	seeRecords  = []Role{account.Auditor, account.Operator}
	always      = States
)

var matrix = []Line{
	{Method: post, Pattern: "/admin/v1/applications", Title: "登记应用 (register an application)", Roles: security, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/applications", Title: "列出应用 (list applications)", Roles: seeStaff},
	{Method: get, Pattern: "/admin/v1/applications/:id/selftest", Title: "测试应用的自检：收到的请求与逐步核对 (requests of an application for tests, as they came)", Roles: seeStaff},
	{Method: post, Pattern: "/admin/v1/applications/:id/stop", Title: "停用应用 (stop an application)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/applications/:id/limits", Title: "设定应用的速率 (set an application's rates)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/applications/:id/production", Title: "标为生产应用或取消 (mark as one of production, or not)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/applications/:id/client", Title: "登记应用的客户端证书或取消 (bind an application to a client certificate, or not)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/signers", Title: "登记签名人 (enrol a signer)", Roles: staffing, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/signers/import", Title: "批量登记签名人 (enrol signers in bulk)", Roles: staffing, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/signers", Title: "列出签名人 (list signers)", Roles: seeStaff},
	{Method: post, Pattern: "/admin/v1/signers/search", Title: "查找签名人 (look for signers)", Roles: seeStaff},
	{Method: post, Pattern: "/admin/v1/signers/:id/keys", Title: "增加签名人密钥 (another key for a signer)", Roles: staffing, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/signers/:id/pin", Title: "设置签名人 PIN (set a signer's PIN)", Roles: staffing, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/signers/:id/recover", Title: "凭份额恢复托管密钥 (recover custody keys with shares)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/signers/:id/stop", Title: "停用签名人 (stop a signer)", Roles: staffing, Changes: true},
	{Method: post, Pattern: "/admin/v1/signers/:id/start", Title: "启用签名人 (start a signer)", Roles: staffing, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/keys", Title: "列出密钥 (list keys)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/keys/search", Title: "查找密钥 (look for keys)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/keys/destroy", Title: "销毁密钥 (destroy a key)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/ceremonies", Title: "记入密钥仪式 (record a ceremony)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/ceremonies/rederive", Title: "改由仪式的 MAC 密钥派生 (derive anew with a ceremony's MAC keys)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/certificates/:serial/revoke", Title: "吊销证书 (revoke a certificate)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/crls", Title: "发布吊销列表 (publish CRLs)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/anchors", Title: "加信任锚 (admit a trust anchor)", Roles: security, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/anchors", Title: "列出信任锚 (list anchors)", Roles: seeTrust},
	{Method: post, Pattern: "/admin/v1/anchors/:id/withdraw", Title: "撤销信任锚 (withdraw an anchor)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/intermediates", Title: "加中间证书 (add intermediates)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/certificates/requests", Title: "生成证书请求；换新密钥须两人 (request a certificate; two persons for a new key)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/certificates", Title: "导入证书 (import certificates)", Roles: security, Changes: true},
	{Method: get, Pattern: "/admin/v1/certificates", Title: "列出证书 (list certificates)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/certificates/search", Title: "查找证书 (look for certificates)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/trust/crls", Title: "导入吊销列表 (import a CRL)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/trust/crls/fetch", Title: "取吊销列表 (fetch CRLs)", Roles: security, Changes: true},
	{Method: get, Pattern: "/admin/v1/trust/crls", Title: "列出吊销列表 (list CRLs)", Roles: seeTrust},

	{Method: post, Pattern: "/admin/v1/machines", Title: "增加密码机 (add a cipher machine)", Roles: system, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/machines", Title: "列出密码机 (list cipher machines)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/machines/:name/drain", Title: "停派密码机 (drain a cipher machine)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/machines/:name/resume", Title: "恢复密码机 (resume a cipher machine)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/machines/:name/remove", Title: "移除密码机 (remove a cipher machine)", Roles: system, Changes: true},
	{Method: get, Pattern: "/admin/v1/directory", Title: "目录状态 (state of the directory)", Roles: seeMachines},
	{Method: get, Pattern: "/admin/v1/directory/versions", Title: "目录各对象的版本 (versions of the directory)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/directory/skip", Title: "跳过无人认领的版本 (skip versions)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/directory/thaw", Title: "结束目录分叉 (end a fork of the directory)", Roles: security, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/time", Title: "时间状态 (state of time)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/time/history", Title: "时间历史 (history of time)", Roles: seeMachines},
	{Method: get, Pattern: "/admin/v1/time/sources", Title: "列出时间源 (list time sources)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/time/sources", Title: "增加时间源 (add a time source)", Roles: system, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/time/sources/:name/remove", Title: "移除时间源 (remove a time source)", Roles: system, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/time/readmit", Title: "时间重新准入 (re-entry of time)", Roles: system, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/tsa", Title: "时间戳服务状态 (state of the stamping service)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/tsa/stop", Title: "停止时间戳服务 (stop stamping)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/tsa/start", Title: "启动时间戳服务 (start stamping)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/tsa/log", Title: "时间戳服务日志 (log of stamping)", Roles: seeService},
	{Method: get, Pattern: "/admin/v1/log", Title: "运行日志的去处 (where the running log goes)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/log", Title: "设定运行日志 (set the running log)", Roles: system, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/log/lines", Title: "运行日志最近的行 (last lines of the running log)", Roles: seeService},
	{Method: post, Pattern: "/admin/v1/log/file", Title: "读取运行日志文件 (read a file of the running log)", Roles: seeService},
	{Method: get, Pattern: "/admin/v1/settings", Title: "设置：现在的、等待重新启动的、正在试用的 (the settings, and which change waits or is tried)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/settings/check", Title: "核对一项设置会改变什么 (what a change of settings would make)", Roles: system},
	// They can loosen what administrators are held to, which is security's to approve.
	{Method: post, Pattern: "/admin/v1/settings", Title: "改设置，下次启动试用 (change settings: the next start tries them)", Roles: system, Second: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/settings/cancel", Title: "取消等待的设置，或忘记换回来的 (cancel a change of settings, or forget one that was left)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/settings/restart", Title: "重新启动服务，试用已批准的设置 (restart the service with the settings that were approved)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/settings/confirm", Title: "确认换了设置之后管理员仍连得到 (confirm that administrators still reach the appliance)", Roles: system, Changes: true},
	{Method: get, Pattern: "/admin/v1/update", Title: "映像与升级的状态 (which image runs, and which waits)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/update/bundle", Title: "上传升级包，写入不在运行的槽 (send a bundle: it is written, and nothing starts it yet)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/update/commit", Title: "提交升级，下次启动生效 (commit an update: the next start tries it)", Roles: system, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/update/restart", Title: "重新启动，启用已提交的升级 (restart the machine into what was committed)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/update/cancel", Title: "取消升级 (cancel an update)", Roles: system, Changes: true},
	{Method: get, Pattern: "/admin/v1/packs", Title: "列出厂商包 (list makers' packs)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/packs/file", Title: "上传厂商包，核验后待装 (send a pack: it is judged and kept, and nothing uses it yet)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/packs/install", Title: "安装厂商包 (install a pack)", Roles: system, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/packs/remove", Title: "移除厂商包 (remove a pack)", Roles: system, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/packs/key", Title: "登记医院签厂商包与升级包的公钥 (register the hospital's key, which signs packs and updates)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/stamps", Title: "盖一个时间戳 (stamp once)", Roles: system, Changes: true},

	{Method: post, Pattern: "/admin/v1/audit/verify", Title: "核验日志 (verify the journal)", Roles: auditor},
	{Method: post, Pattern: "/admin/v1/compare", Title: "与中心库对账 (compare with the central database)", Roles: auditor},
	{Method: post, Pattern: "/admin/v1/sweep", Title: "清查中心库 (sweep the central database)", Roles: auditor},
	{Method: post, Pattern: "/admin/v1/changes", Title: "查询变更日志 (query the change log)", Roles: auditor},
	{Method: post, Pattern: "/admin/v1/records/search", Title: "查找记录 (look for records)", Roles: seeRecords},
	{Method: post, Pattern: "/admin/v1/records/:id/examine", Title: "查看记录的证据与逐项核验 (a record's evidence, examined)", Roles: seeRecords},
	{Method: post, Pattern: "/admin/v1/assessments", Title: "制作密评证据包 (make an evaluator's pack)", Roles: auditor},
	{Method: post, Pattern: "/admin/v1/reports/year", Title: "年度统计 (report of a year)", Roles: auditor},
	{Method: get, Pattern: "/admin/v1/alarms", Title: "列出告警 (list alarms)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/alarms/test", Title: "发测试告警 (send a test alarm)", Roles: system, Changes: true},
	// It makes a test application and a test account, whose like are security's to approve. An evaluation set-up asks for one
	// person alone.
	{Method: post, Pattern: "/admin/v1/drills", Title: "开始演练；评估设备一人即可 (begin a drill; one person in an evaluation set-up)", Roles: system, Second: security, Changes: true},
	{Method: get, Pattern: "/admin/v1/drills", Title: "演练状态 (state of the drill)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/drills/:id/break", Title: "在已批准的演练中断开一处 (break what the drill is about)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/drills/:id/end", Title: "结束演练，恢复并收回 (end a drill and undo it)", Roles: system, Changes: true},
	{Method: get, Pattern: "/admin/v1/diagnosis", Title: "进程自述，供诊断包 (what the process says of itself)", Roles: seeService},
	// It decides nothing: what somebody found is put down.
	{Method: post, Pattern: "/admin/v1/reports", Title: "为巡检、评估、演练的报告签名 (sign a report)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/reports/list", Title: "列出已签名的报告 (list signed reports)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/reports/read", Title: "读取已签名的报告 (read a signed report)", Roles: seeMachines},
	// It looks, and puts down what it found; what it looks at each of these may see.
	{Method: post, Pattern: "/admin/v1/patrols", Title: "巡检 (patrol)", Roles: seeService},
	{Method: get, Pattern: "/admin/v1/system", Title: "程序、主机、磁盘、监听与配置 (program, host, disks, listeners, configuration)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/archive", Title: "归档中心库中已结束各月的行 (archive the closed months of the central database)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/rebuild", Title: "重建中心库 (rebuild the central database)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/preserve/run", Title: "立即做归档时间戳 (run archive timestamps)", Roles: system, Changes: true},
	{Method: get, Pattern: "/admin/v1/preserve", Title: "归档时间戳状态 (state of archive timestamps)", Roles: seeService},
	{Method: post, Pattern: "/admin/v1/preserve/record", Title: "一条记录的归档证据 (evidence of a record)", Roles: seeRecords},
	{Method: post, Pattern: "/admin/v1/backups/custodians", Title: "设定备份保管人 (set the custodians of backups)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/backups", Title: "导出备份 (export a backup)", Roles: system, Second: second, Changes: true},
	// What is carried out was begun by two persons, and is sealed to the custodians.
	{Method: post, Pattern: "/admin/v1/backups/:id/file", Title: "取走已开始的备份的文件 (carry out the file of a backup that was begun)", Roles: system},
	{Method: post, Pattern: "/admin/v1/backups/:id/outcome", Title: "记入备份结果 (record a backup's outcome)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/backups/reports", Title: "记入核验或恢复演练 (file a verification or a drill of restoring)", Roles: system, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/backups", Title: "列出备份 (list backups)", Roles: seeService},
	{Method: get, Pattern: "/admin/v1/backups/missing", Title: "恢复丢失的记录 (records lost in a restore)", Roles: seeService},
	{Method: get, Pattern: "/admin/v1/peer", Title: "另一院区状态 (state of the other campus)", Roles: seeMachines},
	{Method: post, Pattern: "/admin/v1/peer/card", Title: "制作结对卡 (make a card for pairing)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/peer", Title: "与另一院区结对 (pair with the other campus)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/peer/remove", Title: "解除结对 (end the pairing)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/history/records", Title: "导入旧系统记录 (import records of older systems)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/history/totals", Title: "旧系统记录导入合计 (totals of an import)", Roles: system, Changes: true},
	{Method: post, Pattern: "/admin/v1/history/record", Title: "查看旧系统记录 (look at a record of an older system)", Roles: seeRecords},

	{Method: post, Pattern: "/admin/v1/administrators/bootstrap", Title: "设立首批三员，仅一次 (the first three administrators, once)", Without: locally, Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/administrators", Title: "登记管理员 (add an administrator)", Roles: security, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/administrators", Title: "列出管理员 (list administrators)", Roles: seeTrust},
	{Method: post, Pattern: "/admin/v1/administrators/:id/stop", Title: "停用管理员 (stop an administrator)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/administrators/:id/start", Title: "启用管理员 (start an administrator)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/administrators/:id/password", Title: "重置管理员口令 (set an administrator's password)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/administrators/:id/certificate", Title: "设定登录证书 (set what logins are signed with)", Roles: security, Second: second, Changes: true},
	{Method: get, Pattern: "/admin/v1/approvals", Title: "待批事项 (what waits for a second person)"},
	{Method: get, Pattern: "/admin/v1/approvals/:id", Title: "一项待批事项及其结果 (one of them, and its outcome)"},
	{Method: post, Pattern: "/admin/v1/approvals/:id/approve", Title: "批准 (approve)", Roles: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/approvals/:id/decline", Title: "否决或撤回 (decline, or withdraw one's own)", Changes: true},
	{Method: post, Pattern: "/admin/v1/approvals/:id/confirm", Title: "确认已取得本人事项的结果，设备不再保留 (one has the answer to one's own: it is forgotten)", Changes: true},
	{Method: post, Pattern: "/admin/v1/login", Title: "登录 (log in)", Without: anywhere},
	{Method: post, Pattern: "/admin/v1/login/challenge", Title: "取登录挑战 (a challenge for a login)", Without: anywhere},
	{Method: post, Pattern: "/admin/v1/logout", Title: "退出登录 (log out)", Own: true},
	{Method: get, Pattern: "/admin/v1/session", Title: "本人会话 (one's own session)", Own: true},
	{Method: post, Pattern: "/admin/v1/password", Title: "更改本人口令 (change one's own password)", Own: true, Changes: true},

	{Method: post, Pattern: "/admin/v1/provision", Title: "初始化空目录 (make an empty folder an appliance)", Without: locally, States: []State{Uninitialised}, Changes: true},
	{Method: post, Pattern: "/admin/v1/unlock", Title: "持有人给出解锁口令 (a holder's passphrase)", Without: locally, States: []State{Locked}, Changes: true},
	{Method: post, Pattern: "/admin/v1/unlock/seal", Title: "由 TPM 无人值守解锁 (have the TPM unlock)", Roles: security, Second: second, Changes: true},
	{Method: post, Pattern: "/admin/v1/unlock/unseal", Title: "取消无人值守解锁 (have people unlock again)", Roles: security, Changes: true},
	{Method: post, Pattern: "/admin/v1/start", Title: "再试一次失败的启动 (try a start that failed again)", Roles: system, Without: locally, States: []State{Failed}, Changes: true},
	{Method: get, Pattern: "/admin/v1/state", Title: "设备状态 (state of the appliance)", Without: locally, States: always},
	{Method: get, Pattern: "/metrics", Title: "监控指标 (metrics)", Without: locally},
	{Method: get, Pattern: "/health/alive", Title: "存活 (alive)", Without: anywhere, States: always},
	{Method: get, Pattern: "/health/ready", Title: "就绪 (ready)", Without: anywhere, States: always},
}

type route struct{ method, pattern string }

var lines = func() map[route]*Line {
	out := map[route]*Line{}
	for i := range matrix {
		out[route{matrix[i].Method, matrix[i].Pattern}] = &matrix[i]
	}
	return out
}()

// lineOf is nil for what the matrix does not know.
func lineOf(method, pattern string) *Line { return lines[route{method, pattern}] }

// checkMatrix wants each of the routes in the matrix, and each line of it among them.
func checkMatrix(routes []*echo.Route) error {
	var errs []error
	seen := map[route]bool{}
	for _, r := range routes {
		if lineOf(r.Method, r.Path) == nil {
			errs = append(errs, fmt.Errorf("api: %s %s is in no line of the matrix of roles", r.Method, r.Path))
		}
		seen[route{r.Method, r.Path}] = true
	}
	for r := range lines {
		if !seen[r] {
			errs = append(errs, fmt.Errorf("api: the matrix of roles has %s %s, which is no route", r.method, r.pattern))
		}
	}
	return errors.Join(errs...)
}

// Answers says whether the route answers in a state.
func (l *Line) Answers(in State) bool {
	if len(l.States) == 0 {
		return in == Operational
	}
	return slices.Contains(l.States, in)
}

// stands is nil, or why a route does not answer in the present state.
func (s *Server) stands(method, pattern string) *problem.Problem {
	state, next := Operational, "yinjian status 查看状态，见 docs/states.md (see the state)"
	if s.standing != nil {
		var p *problem.Problem
		state, p = s.standing()
		next = p.Next
	}
	if line := lineOf(method, pattern); line == nil || line.Answers(state) {
		return nil
	}
	return problem.New(problem.WrongState, "设备状态为 "+string(state)+"，此时没有这项操作 (the appliance is in this state, in which this means nothing)", next)
}

// may is nil, or why the session may not use a route.
func (s *Server) may(sess *Session, method, pattern string) *problem.Problem {
	line := lineOf(method, pattern)
	switch {
	case line == nil:
		return problem.New(problem.NotFound, "没有这个地址 (no such route)", "见 docs/roles.md (see there)")
	case sess.open:
		return nil
	case sess.MustChange && !line.Own:
		return problem.New(problem.PasswordEnded, "口令须先更改：首次登录、被重置，或已到期 (the password has to be changed first)", "更改口令后重新登录：yinjian admin password (change it, then log in again)")
	case len(line.Roles) == 0, slices.Contains(line.Roles, sess.Role):
		return nil
	}
	return problem.New(problem.Forbidden, "该角色无此权限 (this is no work of the administrator's role)", "由有此职责的管理员办理，见 docs/roles.md (ask the administrator whose work it is)")
}
