package account

// A Role is what an administrator is there for. No role does another's work.
type Role string

// The three administrators (三员), and the operators of applications.
const (
	System   Role = "system"   // 系统管理员: machines, time, backups, the database, the service
	Security Role = "security" // 安全管理员: applications, signers, keys, certificates, anchors, the other campus, administrators
	Auditor  Role = "audit"    // 审计管理员: looks at everything, and changes nothing
	Operator Role = "operator" // 应用操作员: enrols and stops signers
)

// Roles lists them.
var Roles = []Role{System, Security, Auditor, Operator}
