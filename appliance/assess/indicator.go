package assess

import (
	"fmt"
	"strings"
)

// Layers of GB/T 39786-2021, with their weights in the score.
const (
	Physical    = "物理和环境安全"
	Network     = "网络和通信安全"
	Device      = "设备和计算安全"
	Application = "应用和数据安全"
	Policy      = "管理制度"
	People      = "人员管理"
	Operation   = "建设运行"
	Emergency   = "应急处置"
)

// Strengths of an indicator at level 3.
const (
	Must   = "应"
	Should = "宜"
	May    = "可"
)

// An indicator is one of the 41: what evidence it needs here, and what its object is.
type indicator struct {
	id, layer, name, strength string
	// needs are ids of items that must all be shown; none: nothing here can show it, and gap says who can.
	needs []string
	// objects is a prefix of items' ids: each of them is an object of its own, which the appliance has beside needs.
	objects string
	// channel: the algorithms are those of the channel, not SM2, SM3 and SM4.
	channel bool
	product string // of [Coverages]
	gap     string
}

const (
	templates  = "管理类指标由单位的制度、记录与人证明，设备无法证明 (management is shown by papers and people, not by a machine)"
	objectSelf = "本设备 (this appliance)"
	prefixItem = "channels.listener."
)

// indicators are the 41 of a level-3 system: technical 22, management 19.
var indicators = []indicator{
	{id: "physical.identity", layer: Physical, name: "身份鉴别", strength: Should, gap: "由机房电子门禁系统证明（GM/T 0036），不属本设备 (the door system's)"},
	{id: "physical.door_log", layer: Physical, name: "电子门禁记录数据存储完整性", strength: Should, gap: "由机房电子门禁系统证明，不属本设备 (the door system's)"},
	{id: "physical.video", layer: Physical, name: "视频监控记录数据存储完整性", strength: Should, gap: "由视频监控系统证明，不属本设备 (the video system's)"},

	{id: "network.identity", layer: Network, name: "身份鉴别", strength: Must, objects: prefixItem, channel: true, product: CoversChannel},
	{id: "network.integrity", layer: Network, name: "通信数据完整性", strength: Should, objects: prefixItem, channel: true, product: CoversChannel},
	{id: "network.confidentiality", layer: Network, name: "通信过程中重要数据的机密性", strength: Must, objects: prefixItem, channel: true, product: CoversChannel},
	{id: "network.boundary", layer: Network, name: "网络边界访问控制信息的完整性", strength: Should, gap: "防火墙与边界设备的访问控制信息不在本设备 (kept by the firewalls, not here)"},
	{id: "network.access", layer: Network, name: "安全接入认证", strength: May, gap: "由接入认证设备证明，不属本设备 (the access equipment's)"},

	{id: "device.identity", layer: Device, name: "身份鉴别", strength: Must, needs: []string{"identity.administrators"}, product: CoversCipherMachine, gap: "管理员以密码技术登录的证据"},
	{id: "device.remote", layer: Device, name: "远程管理通道安全", strength: Must, needs: []string{"channels.tlcp"}, channel: true, product: CoversChannel, gap: "以国密算法保护的远程管理通道；主机自身的 SSH 不在本设备之内"},
	{id: "device.acl", layer: Device, name: "系统资源访问控制信息完整性", strength: Should, gap: "宿主操作系统的访问控制信息不由本设备保护 (the host's, not here)"},
	{id: "device.label", layer: Device, name: "重要信息资源安全标记完整性", strength: Should, gap: "没有安全标记 (there are no labels)"},
	{id: "device.log", layer: Device, name: "日志记录完整性", strength: Should, needs: []string{"integrity.journal", "integrity.drill.segment"}, product: CoversCipherMachine},
	{id: "device.executable", layer: Device, name: "重要可执行程序完整性、重要可执行程序来源真实性", strength: Should, needs: []string{"software.files", "software.image"}, product: CoversCipherMachine, gap: "程序已量度，但没有签名的镜像 (measured, but no signed image)"},

	{id: "application.identity", layer: Application, name: "身份鉴别", strength: Must, needs: []string{"identity.users"}, product: CoversCipherMachine, gap: "业务用户以密码技术登录的证据 (business users' login)"},
	{id: "application.acl", layer: Application, name: "访问控制信息完整性", strength: Should, needs: []string{"integrity.directory", "integrity.rows", "integrity.drill.row"}, product: CoversCipherMachine},
	{id: "application.label", layer: Application, name: "重要信息资源安全标记完整性", strength: Should, gap: "没有安全标记 (there are no labels)"},
	{id: "application.transport_confidentiality", layer: Application, name: "重要数据传输机密性", strength: Must, objects: prefixItem, channel: true, product: CoversChannel},
	{id: "application.storage_confidentiality", layer: Application, name: "重要数据存储机密性", strength: Must, needs: []string{"integrity.sealed_columns"}, product: CoversCipherMachine, gap: "中心库的列为明文，按招标“数据不得加密”；只有密钥与口令验证值密封 (columns are plain; only keys and verifiers are sealed)"},
	{id: "application.transport_integrity", layer: Application, name: "重要数据传输完整性", strength: Should, objects: prefixItem, channel: true, product: CoversChannel},
	{id: "application.storage_integrity", layer: Application, name: "重要数据存储完整性", strength: Should, needs: []string{"integrity.journal", "integrity.rows", "integrity.drill.segment", "integrity.drill.row"}, product: CoversCipherMachine},
	{id: "application.non_repudiation", layer: Application, name: "不可否认性", strength: Should, needs: []string{"integrity.samples", "integrity.drill.evidence"}, product: CoversCipherMachine},

	{id: "policy.system", layer: Policy, name: "具备密码应用安全管理制度", strength: Must, gap: templates},
	{id: "policy.keys", layer: Policy, name: "密钥管理规则", strength: Must, gap: templates},
	{id: "policy.procedures", layer: Policy, name: "建立操作规程", strength: Must, gap: templates},
	{id: "policy.revision", layer: Policy, name: "定期修订安全管理制度", strength: Must, gap: templates},
	{id: "policy.release", layer: Policy, name: "明确管理制度发布流程", strength: Must, gap: templates},
	{id: "policy.records", layer: Policy, name: "制度执行过程记录留存", strength: Must, gap: templates},
	{id: "people.law", layer: People, name: "了解并遵守密码相关法律法规和密码管理制度", strength: Must, gap: templates},
	{id: "people.duties", layer: People, name: "建立密码应用岗位责任制度", strength: Must, gap: templates},
	{id: "people.training", layer: People, name: "建立上岗人员培训制度", strength: Must, gap: templates},
	{id: "people.examination", layer: People, name: "定期进行安全岗位人员考核", strength: Must, gap: templates},
	{id: "people.leaving", layer: People, name: "建立关键岗位人员保密制度和调离制度", strength: Must, gap: templates},
	{id: "operation.plan", layer: Operation, name: "制定密码应用方案", strength: Must, gap: templates},
	{id: "operation.keys", layer: Operation, name: "制定密钥安全管理策略", strength: Must, gap: templates},
	{id: "operation.implementation", layer: Operation, name: "制定实施方案", strength: Must, gap: templates},
	{id: "operation.before", layer: Operation, name: "投入运行前进行密码应用安全性评估", strength: Must, gap: templates},
	{id: "operation.periodic", layer: Operation, name: "定期开展密码应用安全性评估及攻防对抗演习", strength: Must, gap: templates},
	{id: "emergency.plan", layer: Emergency, name: "应急策略", strength: Must, gap: templates},
	{id: "emergency.handling", layer: Emergency, name: "事件处置", strength: Must, gap: templates},
	{id: "emergency.report", layer: Emergency, name: "向有关主管部门上报处置情况", strength: Must, gap: templates},
}

// A Row is one indicator's line of section 11.
type Row struct {
	ID       string   `json:"id"`
	Layer    string   `json:"layer"`
	Name     string   `json:"name"`
	Strength string   `json:"strength"`
	Objects  []Object `json:"objects"`
	// Own is the mean of the objects' scores; Score what counts, after a layer that makes up for another.
	Own   float64 `json:"own"`
	Score float64 `json:"score"`
	// Gap says what is missing; "" when nothing is.
	Gap string `json:"gap"`
}

// An Object is what an indicator is judged of: D, the cryptography is used and effective; A, its algorithms are compliant; K,
// its keys are managed by certified products. Ra and Rk are the factors of a failed A or K, 1 for one that holds.
type Object struct {
	Name     string   `json:"name"`
	Evidence []string `json:"evidence"` // ids of items
	D        bool     `json:"d"`
	A        bool     `json:"a"`
	K        bool     `json:"k"`
	Ra       float64  `json:"ra"`
	Rk       float64  `json:"rk"`
	Score    float64  `json:"score"`
}

// Where an assessor chooses, the least is taken: Ra is 1, 0.5 or 0.2, Rk 1 or 1.2.
const (
	leastRa = 0.2
	leastRk = 1
)

// leastLevel of GB/T 37092 is what a level-3 system asks of a product.
const leastLevel = 2

// score is that of one object: 0 without D; otherwise 1, times 0.5·Ra where A fails, times 0.5·Rk where K fails.
func (o *Object) score() float64 {
	if !o.D {
		return 0
	}
	s := 1.0
	if !o.A {
		s *= 0.5 * o.Ra
	}
	if !o.K {
		s *= 0.5 * o.Rk
	}
	return s
}

// covered says whether a product's certificate speaks for K at a time (RFC 3339), and why not.
func covered(products []Product, kind, at, mode string) (bool, string) {
	if kind == CoversCipherMachine && mode == ModeSoft {
		return false, "使用软件密码机，不是认证产品，填入的证书编号不计 (the software cipher machine is no certified product, whatever is entered)"
	}
	why := "没有填入商用密码产品认证证书 (no product certificate was entered)"
	for _, p := range products {
		for _, c := range p.Covers {
			switch {
			case c != kind:
			case len(at) < len("2006-01-02") || p.ValidUntil < at[:len("2006-01-02")]:
				why = fmt.Sprintf("证书 %s 已于 %s 到期 (expired)", p.Certificate, p.ValidUntil)
			case p.Level < leastLevel:
				why = fmt.Sprintf("证书 %s 为 %d 级，三级系统须 %d 级 (level %d, want %d)", p.Certificate, p.Level, leastLevel, p.Level, leastLevel)
			default:
				return true, ""
			}
		}
	}
	return false, why
}

// Map puts the items' states beside the 41 indicators. at is RFC 3339, the day at which products' certificates must stand.
func Map(items []Item, products []Product, at, mode string) []Row {
	return shownRows(mapped(items, products, at, mode))
}

// shownRows rounds for people and for the file; the score is computed before.
func shownRows(rows []Row) []Row {
	for i := range rows {
		rows[i].Own, rows[i].Score = rounded(rows[i].Own), rounded(rows[i].Score)
	}
	return rows
}

// mapped is Map, exactly.
func mapped(items []Item, products []Product, at, mode string) []Row {
	state := statuses(items)
	out := make([]Row, 0, len(indicators))
	for _, in := range indicators {
		row := Row{ID: in.id, Layer: in.layer, Name: in.name, Strength: in.strength, Objects: []Object{}}
		var gaps []string
		tell := func(gap string) {
			for _, g := range gaps {
				if g == gap {
					return
				}
			}
			gaps = append(gaps, gap)
		}
		if in.needs != nil {
			row.Objects = append(row.Objects, Object{Name: objectSelf, Evidence: in.needs})
		}
		for i := range items {
			if name, ok := strings.CutPrefix(items[i].ID, in.objects); ok && in.objects != "" {
				row.Objects = append(row.Objects, Object{Name: name, Evidence: []string{items[i].ID}})
			}
		}
		for i := range row.Objects {
			o := &row.Objects[i]
			o.Ra, o.Rk, o.D = 1, 1, true
			for _, id := range o.Evidence {
				if state[id] != Shown {
					o.D = false
					tell(fmt.Sprintf("%s：%s 未取得证据或未通过 (not evidenced, or failed)", o.Name, id))
				}
			}
			if !o.D {
				tell(in.gap)
				continue
			}
			o.A = !in.channel || state["channels.tlcp"] == Shown
			if !o.A {
				o.Ra = leastRa
				tell("TLS 用国际算法，未用 TLCP 与国密套件 (TLS with international algorithms, no TLCP)")
			}
			var why string
			if o.K, why = covered(products, in.product, at, mode); !o.K {
				o.Rk = leastRk
				tell(why)
			}
			o.Score = o.score()
			row.Own += o.Score
		}
		if n := len(row.Objects); n > 0 {
			row.Own /= float64(n)
		} else {
			tell("未取得证据 (not evidenced)")
			tell(in.gap)
		}
		row.Score = row.Own
		for _, g := range gaps {
			if g != "" {
				row.Gap = strings.TrimPrefix(row.Gap+"；"+g, "；")
			}
		}
		out = append(out, row)
	}
	compensate(out)
	return out
}

// pairs are the indicators by which the network and the application layer make up for each other.
var pairs = [][2]string{
	{"network.identity", "application.identity"}, {"network.integrity", "application.transport_integrity"},
	{"network.confidentiality", "application.transport_confidentiality"},
}

// compensate lets half of the other layer's score stand where that is more than the own.
func compensate(rows []Row) {
	find := func(id string) *Row {
		for i := range rows {
			if rows[i].ID == id {
				return &rows[i]
			}
		}
		return nil
	}
	for _, p := range pairs {
		a, b := find(p[0]), find(p[1])
		if a == nil || b == nil {
			continue
		}
		a.Score, b.Score = max(a.Own, 0.5*b.Own), max(b.Own, 0.5*a.Own)
	}
}
