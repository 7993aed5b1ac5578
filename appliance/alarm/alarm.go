// Package alarm is the vocabulary of what somebody has to look at: how bad it is, what to do, and when it is said. One
// table holds every alarm; the alarms that leave the appliance and the ledger of a patrol use the same words. What is wrong
// is looked for elsewhere; this package is pure.
package alarm

import (
	"fmt"
	"slices"
	"strings"
)

// A Severity says how bad something is.
type Severity int

const (
	Normal  Severity = iota // 正常
	Notice                  // 提示: nothing to do now
	Warning                 // 警告: service goes on, somebody should look
	Severe                  // 严重: service is refused, or evidence is in doubt
)

var severities = [...]struct{ name, chinese string }{{"normal", "正常"}, {"notice", "提示"}, {"warning", "警告"}, {"severe", "严重"}}

func (s Severity) String() string { return severities[s].name }

// Chinese is the word for people.
func (s Severity) Chinese() string { return severities[s].chinese }

// MarshalText writes the English name.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads it.
func (s *Severity) UnmarshalText(b []byte) error {
	for i, n := range severities {
		if n.name == string(b) {
			*s = Severity(i)
			return nil
		}
	}
	return fmt.Errorf("alarm: no severity %q", b)
}

// A Code names an alarm, for programs; it is stable over releases.
type Code string

const (
	SigningStopped  Code = "signing-stopped"
	TimeUntrusted   Code = "time-untrusted"
	TimeWorker      Code = "time-worker"
	MachineAway     Code = "machine-away"
	DatabaseAway    Code = "database-away"
	DatabaseLag     Code = "database-lag"
	DatabaseChanged Code = "database-changed"
	Fork            Code = "fork"
	SplitView       Code = "split-view"
	PeerAway        Code = "peer-away"
	DirectoryFrozen Code = "directory-frozen"
	DiskReserve     Code = "disk-reserve"
	DiskLow         Code = "disk-low"
	JournalFailed   Code = "journal-failed"
	JournalUnsealed Code = "journal-unsealed"
	UnaccountedUse  Code = "use-without-entry"
	CertificateDue  Code = "certificate-due"
	ListDue         Code = "crl-due"
	BackupOverdue   Code = "backup-overdue"
	PINLocked       Code = "pin-locked"
	LoginLocked     Code = "login-locked"
	UpstreamAway    Code = "upstream-away"
	ImageLeft       Code = "image-left"
	SettingsLeft    Code = "settings-left"
	Test            Code = "test" // somebody tries whether alarms arrive
)

// A Meaning is what an alarm says to people.
type Meaning struct {
	Severity Severity // unless the condition says another
	Title    string   // Chinese first
	Next     string   // what to do
}

// Meanings is the one table.
var Meanings = map[Code]Meaning{
	SigningStopped:  {Severe, "不能签名 (signing is refused)", "见 yinjian status 的 warnings；按其中各项处理 (see the warnings of yinjian status)"},
	TimeUntrusted:   {Severe, "时间不可信 (time is not trusted)", "见 yinjian time status；查时间源、天线、网络 (see yinjian time status; look at sources, antenna, network)"},
	TimeWorker:      {Warning, "时间戳进程的时钟与本机不符 (a timestamp worker's clock contradicts the appliance's)", "见 yinjian time status；重启服务，仍不符则查该密码机的主机 (see yinjian time status; restart the service)"},
	MachineAway:     {Warning, "密码机不可用 (a cipher machine is away)", "见 yinjian hsm list；查密码机电源、网络、口令 (see yinjian hsm list; look at power, network, PIN)"},
	DatabaseAway:    {Warning, "中心库不可用 (the central database does not answer)", "签名照常；查数据库与网络，恢复后自动补投 (signing goes on; look at the database and the network)"},
	DatabaseLag:     {Warning, "中心库落后 (the central database lags)", "查数据库的负荷与磁盘；见 yinjian status 的 projection (look at the database's load and disk)"},
	DatabaseChanged: {Severe, "中心库被改动 (the central database is not what was written)", "保留现场；运行 yinjian db sweep 看是哪些行，查数据库账户 (keep it as it is; run yinjian db sweep)"},
	Fork:            {Severe, "日志分叉 (a fork of the journal)", "保留两边现场；查是否两台设备以同一名义运行，见 docs/database.md (keep both as they are; do two appliances run under one name?)"},
	SplitView:       {Severe, "院区间日志互证不符 (split view between the campuses)", "保留两边现场；见 docs/two-campuses.md (keep both as they are)"},
	PeerAway:        {Warning, "另一院区不可达 (the other campus is not reached)", "签名照常；查专线，见 yinjian peer status (signing goes on; look at the line)"},
	DirectoryFrozen: {Severe, "两院区目录不一致 (the two campuses do not agree on the directory)", "见 yinjian directory status，两院区核对后 yinjian directory thaw (see yinjian directory status)"},
	DiskReserve:     {Severe, "磁盘余量低于保留值 (too little room left to sign)", "扩容或清理；有了空间自行恢复 (make room; it recovers by itself)"},
	DiskLow:         {Warning, "磁盘将满 (the volume is nearly full)", "扩容或清理；见巡检报告的增长预测 (make room; see the forecast of yinjian patrol)"},
	JournalFailed:   {Severe, "日志已停止写入 (the journal is closed for writing)", "查运行日志与磁盘，然后重启服务 (look at the log and the disk, then restart the service)"},
	JournalUnsealed: {Warning, "日志末端未封存 (the journal's end is not sealed)", "查密码机 log 槽位；此时不要断电 (look at the log slot; do not cut the power)"},
	UnaccountedUse:  {Severe, "密钥使用没有对应记录 (a key was used without an entry)", "保留现场；运行 yinjian audit verify，见 docs/operations.md (keep it as it is; run yinjian audit verify)"},
	CertificateDue:  {Warning, "证书将到期 (certificates end soon)", "换发：yinjian cert csr、cert import，见 docs/certificates.md (renew them)"},
	ListDue:         {Warning, "吊销列表过期或将过期 (a CRL has ended, or ends soon)", "yinjian cert crl fetch 或 cert crl import (fetch or import a new one)"},
	BackupOverdue:   {Warning, "备份超期 (a backup is overdue)", "yinjian backup create，见 docs/backup.md (make one)"},
	PINLocked:       {Warning, "签名人 PIN 已锁定 (a signer's PIN is locked)", "核实本人后 yinjian signer set-pin；查是谁在试 (ask the signer; find out who tried)"},
	LoginLocked:     {Warning, "验证失败过多 (too many failed authentications)", "核对该地址上应用的密钥，或问管理员本人；查是否有人在试 (check the application's key, or ask the administrator; does somebody guess?)"},
	UpstreamAway:    {Warning, "上游时间戳设备不可用 (the upstream timestamp device is away)", "查该设备与网络，见 docs/upstream.md (look at the device and the network)"},
	ImageLeft:       {Warning, "新映像试过未成，已退回 (a new image was tried and left again)", "签名照常；查明原因后上传新的升级包，或 yinjian update cancel，见 docs/update.md (signing goes on; send another bundle, or cancel)"},
	SettingsLeft:    {Warning, "新的设置没有成功，已换回原来的 (new settings were tried and left again)", "签名照常，设置是原来的；见 yinjian settings show，改正后重新提出，或 yinjian settings cancel (signing goes on with those of before; propose others, or cancel)"},
	Test:            {Notice, "告警测试 (a test alarm)", "无须处理 (nothing to do)"},
}

// A Condition is something that is wrong now.
type Condition struct {
	Code     Code     `json:"code"`
	Object   string   `json:"object,omitempty"` // which machine, certificate, signer; "" where there is only one
	Severity Severity `json:"severity"`         // Normal: the code's own
	Detail   string   `json:"detail,omitempty"`
	// Drill names the drill that brought it about on purpose; "": it is what it says. One that outlasts its drill is raised
	// again without.
	Drill string `json:"drill,omitempty"`
}

// fill gives it the severity of its code.
func (c Condition) fill() Condition {
	if c.Severity == Normal {
		c.Severity = Meanings[c.Code].Severity
	}
	return c
}

// MaxObjects is how many conditions of one code are told apart: of more the rest are one, so that nobody can make the
// appliance send thousands of alarms.
const MaxObjects = 16

// rest is the object of those beyond MaxObjects.
const rest = "*"

// fold orders conditions and bounds them.
func fold(found []Condition) []Condition {
	found = slices.Clone(found)
	slices.SortFunc(found, func(a, b Condition) int {
		if a.Code != b.Code {
			return strings.Compare(string(a.Code), string(b.Code))
		}
		return strings.Compare(a.Object, b.Object)
	})
	var out []Condition
	more := map[Code]int{}
	count := map[Code]int{}
	for i, c := range found {
		if i > 0 && c.Code == found[i-1].Code && c.Object == found[i-1].Object {
			continue
		}
		if count[c.Code] < MaxObjects {
			count[c.Code]++
			out = append(out, c.fill())
			continue
		}
		if more[c.Code]++; more[c.Code] == 1 {
			out = append(out, Condition{Code: c.Code, Object: rest}.fill())
		}
	}
	for i := range out {
		if out[i].Object == rest {
			out[i].Detail = fmt.Sprintf("另有 %d 项 (%d more)", more[out[i].Code], more[out[i].Code])
		}
	}
	return out
}
