package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/pelletier/go-toml/v2"

	"yinjian/api"
	"yinjian/api/fetch"
	"yinjian/appliance/account"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/dbdriver/connect"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/pool"
)

// InitUnfinished is in a folder that `yinjian init` has not finished.
const InitUnfinished = ".init-unfinished"

// A Config is the one configuration file, config.toml in the appliance's folder. Unknown keys are errors. Paths may be
// relative to that folder. Secrets are named by file and never stand in it.
type Config struct {
	// 节点名，写入全部日志与证据，以后不可改：小写字母、数字、点、连字符 (name of this node, for ever)
	// 缺省：必填
	Node string `toml:"node"`
	// 院区 (campus)
	// 缺省：必填
	Campus string `toml:"campus"`

	Listen     Listen      `toml:"listen"`
	HSM        HSM         `toml:"hsm"`
	Time       Time        `toml:"time"`
	TSA        TSA         `toml:"tsa,omitempty"`
	Policy     Policy      `toml:"policy"`
	Trust      Trust       `toml:"trust"`
	Database   Database    `toml:"database"`
	Preserve   Preserve    `toml:"preserve"`
	Peer       Peer        `toml:"peer"`
	Admin      AdminAccess `toml:"admin"`
	Log        Log         `toml:"log"`
	Alarms     Alarms      `toml:"alarms"`
	Update     Update      `toml:"update,omitempty"`
	Packs      Packs       `toml:"packs,omitempty"`
	Evaluation Evaluation  `toml:"evaluation"`
}

// Listen says where the appliance listens.
type Listen struct {
	// API 地址 host:port，TLS 1.3；端口 0 取空闲端口 (0 picks a free port)
	// 缺省：必填
	API string `toml:"api"`
	// 也接受 TLS 1.2，供旧客户端（Java 8、.NET Framework、Mono）；只有 ECDHE 加 AEAD 的套件，更旧的版本一律不接受 (TLS 1.2
	// too, ECDHE with AEAD alone)
	// 缺省：`false`
	TLS12 bool `toml:"tls12"`
	// 不加密的时间戳地址 IP:port，供只会 HTTP 的旧客户端：回环地址，或（须有按地址登记的来源）其他地址；
	// 打开时 `/health/state` 警告，对网络开放时为红色警告 (timestamps without TLS, on loopback; elsewhere for sources listed
	// by address alone, and then the state shows it in red)
	// 缺省：关 off
	TSAPlain string `toml:"tsa_plain"`
	// 供管理员登录的地址 host:port，TLS 1.3，与签名 API 分开；路由与本机管理套接字相同，按角色放行，见 [roles.md](roles.md)
	// (for administrators who log in; apart from the signing API)
	// 缺省：关 off
	Admin string `toml:"admin"`
	// 供另一院区设备连接的地址 host:port，TLS 1.3，只认结对时约定的密钥；见 [two-campuses.md](two-campuses.md) (for the other
	// campus's appliance, known by its key)
	// 缺省：关 off
	Peer string `toml:"peer"`
	// 业务系统称呼本机所用的主机名或地址，不含端口，如 `["sign-benbu.hospital.example", "10.1.0.10"]`；Host
	// 头是别的主机的请求被拒绝。两院区须写明且互不相同，否则发往一处的请求可被原样发到另一处 (what clients call this
	// appliance; requests for another host are refused)
	// 缺省：任何 any
	Names []string `toml:"names,omitempty"`
	// TSASources may use /tsa without a key.
	TSASources []TSASource `toml:"tsa_sources,omitempty"`
}

// A TSASource is a client of RFC 3161 that is known by its address, its TLS client certificate, or by both together.
type TSASource struct {
	// 不用 HMAC 密钥即可使用 `/tsa/{单元}` 的来源，1–31 位小写字母、数字、点、连字符，不得为 `loopback`；
	// 日志中的请求者记为 `source:名称` (who may use /tsa without a key; journalled under this name)
	// 缺省：必填
	Name string `toml:"name"`
	// 该来源的地址或网段，如 `["10.2.3.4", "10.8.0.0/16"]`；一个地址落入几个网段时取最窄的 (its addresses and networks; the
	// narrowest counts)
	// 缺省：与 `certificates` 至少一样
	Addresses []string `toml:"addresses"`
	// 该来源的 TLS 客户端证书文件(PEM)，逐张登记，不看签发者；从列表中删去即作废；与 `addresses` 同时写则须两者都符合 (the
	// very certificates it may show; with `addresses` both must fit)
	// 缺省：与 `addresses` 至少一样
	Certificates []string `toml:"certificates"`
	// 该来源每秒的请求数，超过时 429 (requests a second of the source)
	// 缺省：`policy.rate`
	Rate int `toml:"rate"`
	// 该来源一时的请求数 (requests at once)
	// 缺省：`rate` 的两倍 (twice the rate)
	Burst int `toml:"burst"`
}

// source is s for the API, its certificates still to be read.
func (s *TSASource) source() (api.Source, error) {
	out := api.Source{Name: s.Name, Certificates: make([]*smx509.Certificate, len(s.Certificates)), Rate: s.Rate, Burst: s.Burst}
	for _, text := range s.Addresses {
		p, err := netip.ParsePrefix(text)
		if a, aerr := netip.ParseAddr(text); aerr == nil {
			p, err = a.Prefix(a.BitLen())
		}
		if err != nil {
			return out, fmt.Errorf("addresses: %q 须为地址或网段 (want an address or a network)", text)
		}
		out.Addresses = append(out.Addresses, p)
	}
	return out, nil
}

// sources are those for the API.
func (l *Listen) sources() ([]api.Source, error) {
	var out []api.Source
	for i, s := range l.TSASources {
		one, err := s.source()
		if err != nil {
			return nil, err // validate has looked already
		}
		one.Certificates = nil
		for _, name := range s.Certificates {
			b, err := os.ReadFile(name)
			if err != nil {
				return nil, fmt.Errorf("listen.tsa_sources[%d].certificates: %w", i, err)
			}
			certs, err := pki.ParseCertificatePEMs(b)
			if err != nil {
				return nil, fmt.Errorf("listen.tsa_sources[%d].certificates: %s: %w", i, name, err)
			}
			one.Certificates = append(one.Certificates, certs...)
		}
		out = append(out, one)
	}
	return out, nil
}

// asks says whether TLS clients are asked for a certificate.
func (l *Listen) asks() bool {
	return slices.ContainsFunc(l.TSASources, func(s TSASource) bool { return len(s.Certificates) > 0 })
}

// isOpen says whether a listener's address is for others than this machine.
func isOpen(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	return err == nil && !api.IsLoopback(host)
}

// plainOpen says whether the plain listener is for others than this machine.
func (l *Listen) plainOpen() bool { return isOpen(l.TSAPlain) }

// reached are the names and addresses by which clients call the listeners, for the certificate that the appliance is born with: this
// machine's own name for itself, what the configuration says, and where a listener is at every address, those that the machine has.
// A name that no certificate can have is left out.
func (l *Listen) reached(interfaces func() ([]hostInterface, error)) (names []string, ips []net.IP) {
	names = []string{"localhost"}
	add := func(host string) {
		ip := net.ParseIP(host)
		switch {
		case ip == nil && ca.ValidDNSName(host) && !slices.Contains(names, host):
			names = append(names, host)
		case ip != nil && !slices.ContainsFunc(ips, ip.Equal):
			ips = append(ips, ip)
		}
	}
	for _, listener := range []string{l.API, l.Admin} {
		if listener == "" {
			continue
		}
		host, _, err := net.SplitHostPort(listener)
		if err != nil {
			continue // validate has said so
		}
		if ip := net.ParseIP(host); host != "" && (ip == nil || !ip.IsUnspecified()) {
			add(host)
			continue
		}
		all, err := interfaces()
		if err != nil {
			continue // a certificate for the other names is better than none
		}
		for _, i := range all {
			for _, a := range i.addresses {
				if i.up && a.Addr().IsGlobalUnicast() {
					add(a.Addr().String())
				}
			}
		}
	}
	for _, n := range l.Names {
		add(n)
	}
	return names, ips
}

func (l *Listen) validate(bad func(key, format string, args ...any)) {
	if _, _, err := net.SplitHostPort(l.API); err != nil {
		bad("listen.api", "须为 host:port (%v)", err)
	}
	if l.Admin != "" {
		if _, _, err := net.SplitHostPort(l.Admin); err != nil {
			bad("listen.admin", "须为 host:port (%v)", err)
		}
	}
	for _, n := range l.Names {
		if n == "" || strings.ContainsAny(n, "/[] ") || strings.Contains(n, ":") && net.ParseIP(n) == nil {
			bad("listen.names", "%q 须为主机名或地址，不含端口 (a host name or an address, without a port)", n)
		}
	}
	listed := slices.ContainsFunc(l.TSASources, func(s TSASource) bool { return len(s.Addresses) > 0 && len(s.Certificates) == 0 })
	if p := l.TSAPlain; p != "" {
		host, _, err := net.SplitHostPort(p)
		switch {
		case err != nil || host != "" && net.ParseIP(host) == nil:
			bad("listen.tsa_plain", "须为 IP:port，如 127.0.0.1:0 (want IP:port)")
		case l.plainOpen() && !listed:
			bad("listen.tsa_plain", "没有按地址登记的 listen.tsa_sources 时只能是回环地址，如 127.0.0.1:0 (loopback only, unless sources are listed by address)")
		}
	}
	var all []api.Source
	for i, s := range l.TSASources {
		one, err := s.source()
		if err != nil {
			bad(fmt.Sprintf("listen.tsa_sources[%d]", i), "%v", err)
			continue
		}
		if one.Rate > account.MaxRate || one.Burst > account.MaxBurst {
			bad(fmt.Sprintf("listen.tsa_sources[%d]", i), "rate、burst 至多 %d、%d (at most)", account.MaxRate, account.MaxBurst)
		}
		all = append(all, one)
	}
	if err := api.CheckSources(all); err != nil {
		bad("listen.tsa_sources", "%v", err)
	}
}

// Peer is about the other campus. Whom this appliance is paired with is decided by administrators, in the journal.
type Peer struct {
	// 另一院区连接本机 `listen.peer` 所用的 host:port，写在结对卡上 (listen.peer as the other campus reaches it)
	// 缺省：`listen.peer`
	Address string `toml:"address"`
	// 另一院区目录的副本最旧多久仍可签名，1m–720h；超过即拒绝全部签名，因为可能有人已被停用 (how old the copy of the other
	// campus's directory may be for signing to go on)
	// 缺省：`24h`
	MaxAge Duration `toml:"max_age"`
	// 有新条目时多久请另一院区见证一次检查点，1s–1h (how often the other campus is asked for its cosignature)
	// 缺省：`10s`
	CosignEvery Duration `toml:"cosign_every"`
}

func (c *Config) validatePeer(bad func(key, format string, args ...any)) {
	if c.Listen.Peer == "" {
		if c.Peer.Address != "" {
			bad("peer.address", "没有 listen.peer 时无意义 (means nothing without listen.peer)")
		}
	} else {
		if _, _, err := net.SplitHostPort(c.Listen.Peer); err != nil {
			bad("listen.peer", "须为 host:port (%v)", err)
		}
		host, port, err := net.SplitHostPort(c.Peer.Address)
		if ip := net.ParseIP(host); err != nil || host == "" || port == "0" || ip != nil && ip.IsUnspecified() {
			bad("peer.address", "须为对端院区可达的 host:port；listen.peer 不是这样的地址时必须写明 (an address that the other campus reaches)")
		}
	}
	if d := time.Duration(c.Peer.MaxAge); d < time.Minute || d > 30*24*time.Hour {
		bad("peer.max_age", "须在 1m 与 720h 之间 (between 1m and 720h)")
	}
	if d := time.Duration(c.Peer.CosignEvery); d < time.Second || d > time.Hour {
		bad("peer.cosign_every", "须在 1s 与 1h 之间 (between 1s and 1h)")
	}
}

// HSM says how the cipher machine is reached.
type HSM struct {
	// PKCS#11 模块的路径；密封设备上为 `pack:名称/路径`，即厂商包里的库，见 [packs.md](packs.md) (path of the vendor's library, or one in a
	// pack)
	// 缺省：必填
	Module string `toml:"module"`
	// C_Initialize 的 pReserved 字符串；软件密码机由程序自填 (for modules that take one)
	// 缺省：空
	ModuleArgs string `toml:"module_args"`
	// 厂商档案：随附档案的名称，或档案文件的路径，见 [hsm.md](hsm.md) (a shipped vendor profile by name, or a file's path)
	// 缺省：`neutral`
	Profile string          `toml:"profile"`
	Slots   map[string]Slot `toml:"slots"` // staff, tsa, log, ca; tls, without which the listener's key is secrets/tls.key
	// `file`：各槽位的 `pin_file`；`unlock`：口令封存在 `secrets/pins.locked`，每次启动由多人解锁；`tpm`：同 `unlock`，另可由
	// 本机 TPM 打开，见 [states.md](states.md) (PINs from files, unlocked by several people after each start, or by this machine's TPM)
	// 缺省：`file`
	PINSource string `toml:"pin_source"`
	// TPM is for pin_source "tpm" alone.
	TPM *TPM `toml:"tpm,omitempty"`
	// 一次密码运算的时限；超时则该工作进程被替换 (a call past it costs the worker its life)
	// 缺省：`5s`
	CallDeadline Duration `toml:"call_deadline"`
	// 每个槽位在密码机中同时保留的已解包托管密钥数(会话对象)，满则弃用最久未用的；1–1048576，不得超过密码机的容量 (custody
	// keys kept unwrapped, the least recently used goes first)
	// 缺省：`1024`
	WrappedKeys int `toml:"wrapped_keys"`
	// 每个新签名先用公钥验证再交出；关闭时，时间戳工作进程签的是不是所请求的，也不再核对 (verify each fresh signature before
	// it leaves; without it nobody looks at what a timestamp worker has signed)
	// 缺省：`true`
	VerifyFresh *bool `toml:"verify_fresh"`
	// Custody, if it stands there, makes new staff keys custody keys: outside the cipher machine, wrapped under its KEK.
	// Keys that are in the machine go on.
	Custody *Custody `toml:"custody"`
	// 有其他密码机时，`[hsm]` 这一台（名为 `main`）分担的份额，1–100 (its share of the work beside others)
	// 缺省：`1`
	Weight int `toml:"weight"`
	// Machines are cipher machines beside this one, which is called "main". More can be added while the appliance runs.
	Machines []Machine `toml:"machines,omitempty"`
}

// A TPM is the TPM 2.0 that the PINs are sealed to. See docs/states.md.
type TPM struct {
	// TPM 2.0 的字符设备，或 Unix 套接字；`hsm.pin_source = "tpm"` 时用 (character device or Unix socket)
	// 缺省：`/dev/tpmrm0`
	Device string `toml:"device"`
	// 须与封存时相同的寄存器，SHA-256 库，0–15，如 `[7, 11]`；下次 `unlock seal --tpm` 起生效 (registers that must be as they
	// were; counts from the next sealing on)
	// 缺省：空，只认 TPM
	PCRs []int `toml:"pcrs,omitempty"`
}

// FirstMachine is the name of the machine that [HSM] itself describes.
const FirstMachine = "main"

// A Machine is a cipher machine beside the first. It may have any of the slots.
type Machine struct {
	// 另一台密码机的名称：小写字母、数字、下划线，以后不可改，不得为 `main`；见 [hsm.md](hsm.md) (another cipher machine)
	// 缺省：必填
	Name string `toml:"name"`
	// 同 `hsm.module` (as there)
	// 缺省：必填
	Module string `toml:"module"`
	// 同 `hsm.module_args` (as there)
	// 缺省：空
	ModuleArgs string `toml:"module_args"`
	// 同 `hsm.profile` (as there)
	// 缺省：`neutral`
	Profile string `toml:"profile"`
	// 分担的份额，1–100 (its share of the work)
	// 缺省：`1`
	Weight int             `toml:"weight"`
	Slots  map[string]Slot `toml:"slots"`
}

var reMachine = regexp.MustCompile(`^[a-z][a-z0-9_]{0,30}$`)

func (m *Machine) setDefaults(dir string) {
	def(&m.Profile, "neutral")
	def(&m.Weight, 1)
	absModule(dir, &m.Module)
	if profiles.IsPath(m.Profile) {
		abs(dir, &m.Profile)
	}
	for name, s := range m.Slots {
		def(&s.Sessions, 8)
		abs(dir, &s.PINFile)
		m.Slots[name] = s
	}
}

func (m *Machine) validate(locked bool, bad func(key, format string, args ...any)) {
	if !reMachine.MatchString(m.Name) || m.Name == FirstMachine {
		bad("name", "须为小写字母、数字、下划线，字母开头，至多 31 位，不得为 %s (lower-case letters, digits, underscores; not %s)", FirstMachine, FirstMachine)
	}
	validateModule(m.Module, bad)
	if _, err := profiles.Load(m.Profile); err != nil {
		bad("profile", "%v", err)
	}
	validateWeight(m.Weight, bad)
	if len(m.Slots) == 0 {
		bad("slots", "至少一个槽位 (at least one slot)")
	}
	validateSlots(m.Slots, locked, bad)
}

func validateWeight(weight int, bad func(key, format string, args ...any)) {
	if weight < 1 || weight > 100 {
		bad("weight", "须为 1–100 (1 to 100)")
	}
}

// validateSlots looks at a machine's slots: each class has a token of its own. With locked its PIN needs no file.
func validateSlots(slots map[string]Slot, locked bool, bad func(key, format string, args ...any)) {
	known := 0
	for _, class := range hsm.Classes {
		s, ok := slots[string(class)]
		if !ok {
			continue
		}
		known++
		if s.TokenLabel == "" || len(s.TokenLabel) > 32 {
			bad("slots."+string(class)+".token_label", "须为 1–32 字节 (1 to 32 bytes)")
		}
		if s.PINFile == "" && !locked {
			bad("slots."+string(class)+".pin_file", "缺少 (missing)")
		}
		if s.Sessions < 1 || s.Sessions > 256 {
			bad("slots."+string(class)+".sessions", "须为 1–256 (1 to 256)")
		}
	}
	if len(slots) > known {
		bad("slots", "只能有 staff、tsa、log、ca、tls (only staff, tsa, log, ca, tls)")
	}
	labels := map[string]string{}
	for name, s := range slots {
		if other, dup := labels[s.TokenLabel]; dup {
			bad("slots", "%s 与 %s 使用同一令牌，密钥用途须分离 (%s and %s share a token; purposes must be apart)", name, other, name, other)
		}
		labels[s.TokenLabel] = name
	}
}

// ParseMachine reads a file with one machine's keys, as under [[hsm.machines]]. Relative paths are taken from dir.
func ParseMachine(b []byte, dir string) (*Machine, error) {
	m := new(Machine)
	if err := decodeTOML(b, m); err != nil {
		return nil, err
	}
	m.setDefaults(dir)
	var errs []error
	m.validate(false, func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	})
	return m, errors.Join(errs...)
}

// abs makes a path in the appliance's folder absolute.
func abs(dir string, p *string) {
	if *p != "" && !filepath.IsAbs(*p) {
		*p = filepath.Join(dir, *p)
	}
}

// absModule leaves a library in a pack as it is.
func absModule(dir string, p *string) {
	if !strings.HasPrefix(*p, packPrefix) {
		abs(dir, p)
	}
}

// Custody is what a key ceremony left.
type Custody struct {
	// 写了 `[hsm.custody]`，新的签名人密钥即为托管密钥，由此标签的密钥包装；已有密钥不变，见 [custody.md](custody.md) (new staff keys
	// are custody keys, wrapped under this key)
	// 缺省：必填；不写 `[hsm.custody]` 即在密码机内
	KEK string `toml:"kek"`
	// 保管干部的公钥文件(PEM，密钥仪式写出)；不写则忘记 PIN 的托管密钥无人能恢复 (the officers' public key; without it nobody
	// opens a key whose PIN was forgotten)
	// 缺省：空
	Officers string `toml:"officers"`
	// PIN、应用密钥与托管密钥的封存由密钥仪式导入 log 槽位的 MAC 密钥派生，凡导入过的院区通用，见 [custody.md](custody.md)“两院区”
	// (derived with the MAC keys of the ceremony, usable at every campus that has them)
	// 缺省：`false`，本机密码机自己的 MAC 密钥，只在本院区可用
	CampusMACs bool `toml:"campus_macs"`
}

// Slot is one slot class's token.
type Slot struct {
	// 该类密钥所在令牌的标签；各类令牌必须各不相同 (the class's token; all different)
	// 缺省：必填；`tls` 可缺
	TokenLabel string `toml:"token_label"`
	// 用户口令文件，仅供评估：拿走磁盘的人两者兼得 (evaluation: whoever takes the disk has both)
	// 缺省：必填；`hsm.pin_source` 为 `unlock`、`tpm` 时可缺
	PINFile string `toml:"pin_file"`
	// 会话数，1–256 (sessions)
	// 缺省：`8`
	Sessions int `toml:"sessions"`
}

// Time says whom to believe.
type Time struct {
	// 至少几组时间源一致才可信；为 1 时掌握该源者即掌握时间 (groups that must agree)
	// 缺省：`2`
	MinSources int `toml:"min_sources"`
	// 承诺的准确度；误差上限超过它即拒绝盖时间戳与签名 (stamps are refused beyond it)
	// 缺省：`1s`
	Accuracy Duration `toml:"accuracy"`
	// 无多数源时最多守时多久 (how long without a majority)
	// 缺省：`4h`
	HoldoverMax Duration `toml:"holdover_max"`
	// 轮询间隔 (interval of polling)
	// 缺省：`16s`
	Poll Duration `toml:"poll"`
	// 无源时误差上限增长的速度，百万分之几，15–500；有实测依据才可调小，见 [time.md](time.md) (by how much the oscillator may be
	// off)
	// 缺省：`50`
	DriftPPM int `toml:"drift_ppm"`
	// 关于时间来源的说明，写入每份证据 (repeated in all evidence)
	// 缺省：写明 `min_sources=N`
	PolicyNote string       `toml:"policy_note"`
	Sources    []TimeSource `toml:"sources"`
}

// TimeSource is one NTP server.
type TimeSource struct {
	// NTP 源的名称；至少要有一个源 (an NTP source; at least one is needed)
	// 缺省：必填
	Name string `toml:"name"`
	// 共用天线或上游的源写同一组，一组只算一票 (sources that share an antenna share a group, and have one vote)
	// 缺省：必填
	Group string `toml:"group"`
	// NTP 服务器的 host:port (its address)
	// 缺省：必填
	Address string `toml:"address"`
	// NTP 对称认证的密钥编号，0 为不认证 (symmetric authentication; 0: none)
	// 缺省：`0`
	KeyID uint16 `toml:"key_id"`
	// `SHA256`、`AES128`、`AES256` (kind of that key)
	// 缺省：无
	KeyType string `toml:"key_type"`
	// 该密钥的文件，chrony 格式 (its file, as chrony writes it)
	// 缺省：无
	KeyFile string `toml:"key_file"`
}

// Policy are limits an evaluator asks for.
type Policy struct {
	// 剩余空间低于此值即拒绝签名 (free space kept in reserve)
	// 缺省：`268435456`，256 MiB
	ReserveBytes uint64 `toml:"reserve_bytes"`
	// 剩余空间低于此百分比即拒绝对外时间戳，先于拒绝签名 (tokens for others are refused first)
	// 缺省：`10`
	TSAReservePercent int `toml:"tsa_reserve_percent"`
	// 每段日志的条目数；另每月一段 (entries of a journal segment; a new one each month too)
	// 缺省：`1000000`
	SegmentEntries int `toml:"segment_entries"`
	// 签名、验证请求体的上限 (limit of a body)
	// 缺省：`16777216`，16 MiB
	MaxBodyBytes int `toml:"max_body_bytes"`
	// 每个应用每秒的请求数上限；登记时或 `yinjian app limit` 可另定 (requests a second of one application)
	// 缺省：`3000`
	Rate int `toml:"rate"`
	// 每个应用一时的请求数上限 (requests at once of one application)
	// 缺省：`rate` 的两倍
	Burst int `toml:"burst"`
	// 每个应用每秒的签名数上限；登记时或 `yinjian app limit` 可另定；0 为不另设限 (signatures a second of one application; 0:
	// its requests' rate is the limit)
	// 缺省：`0`
	HSMRate int `toml:"hsm_rate"`
	// 每个应用同时进行的签名数上限，超出者排队 (signatures of one application at once; more wait)
	// 缺省：`0`，不另设限
	HSMSessions int `toml:"hsm_sessions"`
	// 同时处理的请求总数，各应用公平分享 (requests handled at once, shared fairly among applications)
	// 缺省：`1024`
	Concurrent int `toml:"concurrent"`
	// 同一地址每分钟身份验证失败的次数上限 (failed authentications a minute from one address)
	// 缺省：`120`
	AuthFailures int `toml:"auth_failures"`
	// API 的连接总数上限；同一地址至多四分之一 (connections; a quarter of them from one address)
	// 缺省：`4096`
	MaxConnections int `toml:"max_connections"`
	// 停机时等待在途请求的时限 (how long requests under way may take at a stop)
	// 缺省：`20s`
	Drain Duration `toml:"drain"`
}

// rateOf is what an application may do.
func (p *Policy) rateOf(app *account.Application) (perSecond, burst int) {
	perSecond, burst = p.Rate, p.Burst
	if app.Rate != 0 {
		perSecond, burst = app.Rate, 2*app.Rate
	}
	if app.Burst != 0 {
		burst = app.Burst
	}
	return perSecond, burst
}

// callerOf is the application as the cipher machines' queue knows it.
func (p *Policy) callerOf(app *account.Application) hsm.Caller {
	c := hsm.Caller{Application: app.ID, Rate: p.HSMRate, Sessions: p.HSMSessions}
	if app.HSMRate != 0 {
		c.Rate = app.HSMRate
	}
	if app.HSMSessions != 0 {
		c.Sessions = app.HSMSessions
	}
	return c
}

// Trust says how other CAs' certificates are judged. The CAs themselves are decided on by administrators, in the journal.
type Trust struct {
	// 吊销状态不明（无列表或已过期）时：`hard` 拒绝签名，`soft` 照签并在证据中写明未核验 (unknown status: refuse, or sign and
	// say so)
	// 缺省：`hard`
	Revocation string      `toml:"revocation"`
	CRL        []CRLSource `toml:"crl"`
}

// CRLSource is where a CA publishes its revocation list.
type CRLSource struct {
	// 外部 CA 的吊销列表地址：http、https 或 file (where another CA publishes its CRL)
	// 缺省：必填
	URL string `toml:"url"`
	// 更新间隔，10s–168h (how often it is fetched)
	// 缺省：`1h`
	Interval Duration `toml:"interval"`
}

// Database is the central database, which people query. Signing never waits for it.
type Database struct {
	// 中心库（投影）在哪里：不写则用设备目录中的 `central.db`(SQLite)；`postgres://用户@主机/库名?…` 或 `host=… dbname=…`；
	// `dm://用户@主机:5236?…`。不得写口令；见 [database.md](database.md) (where the central database is; never with a
	// password)
	// 缺省：内嵌 embedded
	DSN string `toml:"dsn"`
	// 该库账户的口令文件，权限 600 (file with the account's password)
	// 缺省：无
	PasswordFile string `toml:"password_file"`
	// 也投递到此库的其他设备的节点名；库中别的节点的行由 `db compare` 指为外来 (the other appliances that ship to it; any
	// other's rows are foreign)
	// 缺省：无
	Nodes []string `toml:"nodes"`
	// 后台多久按 MAC 清查一遍中心库，见 [records.md](records.md) (how often the database is gone through by its MACs)
	// 缺省：`24h`
	SweepEvery Duration `toml:"sweep_every"`
	// 最近多少个整月留在常用的表里，更早的行每天自动移入归档表（不删除），见 [records.md](records.md)；0 不自动归档，
	// 否则 1–1200 (how many whole months stay in the tables in use; older rows are moved to the archive once a day, none is
	// deleted)
	// 缺省：`0`
	ArchiveAfterMonths int `toml:"archive_after_months"`
}

// Place is where connections go, with the password as the file has it now. dir is the appliance's folder.
func (d *Database) Place(dir string) (connect.Place, error) {
	if d.DSN == "" {
		return connect.File(filepath.Join(dir, "central.db")), nil
	}
	p := connect.Place{DSN: d.DSN}
	if d.PasswordFile != "" {
		password, err := ReadSecret(d.PasswordFile)
		if err != nil {
			return p, err
		}
		p.Password = string(password)
	}
	return p, nil
}

// Revocation policies.
const (
	RevocationHard = "hard"
	RevocationSoft = "soft"
)

// Evaluation are conveniences that no hospital uses in production; /health/state and the evidence name them.
type Evaluation struct {
	// 以子进程运行软件密码机；仅供评估，非认证产品：其存储口令 `secrets/softtoken.passphrase` 总是磁盘上的文件，无论 `hsm.pin_source`
	// 如何 (software cipher machine as a child; its passphrase is a file, whatever hsm.pin_source says)
	// 缺省：`false`
	Softtoken bool `toml:"softtoken"`
	// 软件密码机按此厂商档案（名称或文件）应答，供联调；`hsm.profile` 通常写同一档案 (the software cipher machine answers to
	// this vendor profile)
	// 缺省：不模拟
	Impersonate string `toml:"impersonate"`
	// 用本机时间模拟北斗，经 gpsd、chrony 送回；仅供演示 (simulated BeiDou)
	// 缺省：`false`
	GNSSFeed bool `toml:"gnss_feed"`
}

// A Duration is written as "5s", "24h".
type Duration time.Duration

// UnmarshalText reads Go's duration syntax.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// MarshalText writes Go's duration syntax.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

var reNode = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)

// LoadConfig reads dir/config.toml. Everything wrong is reported at once, with the key's path.
func LoadConfig(dir string) (*Config, error) {
	name := filepath.Join(dir, "config.toml")
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s 不存在：请先运行 yinjian init --dir %s (no configuration: run yinjian init first)", name, dir)
	}
	if err != nil {
		return nil, err
	}
	c, err := ParseConfig(b, dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// ParseConfig reads a configuration; relative paths are taken from dir.
func ParseConfig(b []byte, dir string) (*Config, error) {
	c := new(Config)
	if err := decodeTOML(b, c); err != nil {
		return nil, err
	}
	c.setDefaults()
	abs := func(p *string) { abs(dir, p) }
	absModule(dir, &c.HSM.Module)
	if c.Admin.Theme != "" {
		abs(&c.Admin.Theme)
	}
	for i := range c.HSM.Machines {
		c.HSM.Machines[i].setDefaults(dir)
	}
	if profiles.IsPath(c.HSM.Profile) {
		abs(&c.HSM.Profile)
	}
	if profiles.IsPath(c.Evaluation.Impersonate) {
		abs(&c.Evaluation.Impersonate)
	}
	if c.TSA.Upstream != nil {
		c.TSA.Upstream.setDefaults(dir)
	}
	if c.HSM.Custody != nil {
		abs(&c.HSM.Custody.Officers)
	}
	for name, s := range c.HSM.Slots {
		abs(&s.PINFile)
		c.HSM.Slots[name] = s
	}
	abs(&c.Database.PasswordFile)
	c.Alarms.setDefaults(dir)
	for i := range c.Time.Sources {
		abs(&c.Time.Sources[i].KeyFile)
	}
	for i := range c.Listen.TSASources {
		for j := range c.Listen.TSASources[i].Certificates {
			abs(&c.Listen.TSASources[i].Certificates[j])
		}
	}
	return c, c.validate()
}

// decodeTOML reads a file strictly: an unknown key is an error that says where.
func decodeTOML(b []byte, v any) error {
	dec := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err := dec.Decode(v)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var errs []error
		for _, e := range strict.Errors {
			row, col := e.Position()
			errs = append(errs, fmt.Errorf("%d:%d: 未知的配置项 %s (unknown key)", row, col, strings.Join(e.Key(), ".")))
		}
		return errors.Join(errs...)
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		row, col := wrong.Position()
		return fmt.Errorf("%d:%d: %s: %w", row, col, strings.Join(wrong.Key(), "."), err)
	}
	return err
}

func (c *Config) setDefaults() {
	def(&c.HSM.CallDeadline, Duration(5*time.Second))
	def(&c.HSM.WrappedKeys, 1024)
	def(&c.HSM.Weight, 1)
	def(&c.HSM.Profile, "neutral")
	def(&c.HSM.PINSource, PINFromFile)
	if c.HSM.PINSource == PINFromTPM && c.HSM.TPM == nil {
		c.HSM.TPM = new(TPM)
	}
	if c.HSM.TPM != nil {
		def(&c.HSM.TPM.Device, "/dev/tpmrm0")
	}
	def(&c.Update.Socket, os.Getenv(UpdateSocket))
	def(&c.Packs.Socket, os.Getenv(PackSocket))
	def(&c.Time.MinSources, 2)
	def(&c.Time.Accuracy, Duration(time.Second))
	def(&c.Time.HoldoverMax, Duration(4*time.Hour))
	def(&c.Time.Poll, Duration(16*time.Second))
	def(&c.Time.DriftPPM, 50)
	for i := range c.TSA.Units {
		def(&c.TSA.Units[i].Accuracy, c.Time.Accuracy)
		def(&c.TSA.Units[i].Profile, "rfc3161")
	}
	def(&c.Database.SweepEvery, Duration(24*time.Hour))
	def(&c.Log.Level, "info")
	def(&c.Log.KeepDays, 365)
	def(&c.Policy.ReserveBytes, 256<<20)
	def(&c.Policy.TSAReservePercent, 10)
	def(&c.Policy.SegmentEntries, 1_000_000)
	def(&c.Policy.MaxBodyBytes, 16<<20)
	def(&c.Policy.Rate, 3000)
	def(&c.Policy.Burst, 2*c.Policy.Rate)
	def(&c.Policy.Concurrent, 1024) // 500 users at once is what hospitals ask for, and one application may hold half
	def(&c.Policy.AuthFailures, 120)
	def(&c.Policy.MaxConnections, 4096)
	def(&c.Policy.Drain, Duration(20*time.Second))
	for i := range c.Listen.TSASources {
		def(&c.Listen.TSASources[i].Rate, c.Policy.Rate)
		def(&c.Listen.TSASources[i].Burst, 2*c.Listen.TSASources[i].Rate)
	}
	c.Preserve.setDefaults()
	def(&c.Peer.Address, c.Listen.Peer)
	def(&c.Peer.MaxAge, Duration(24*time.Hour))
	def(&c.Peer.CosignEvery, Duration(10*time.Second))
	def(&c.Admin.Local, localOpen)
	def(&c.Admin.PasswordDays, int(account.MaxPasswordLife.Hours()/24))
	def(&c.Admin.PasswordMin, account.MinPassword)
	def(&c.Trust.Revocation, RevocationHard)
	for i := range c.Trust.CRL {
		def(&c.Trust.CRL[i].Interval, Duration(time.Hour))
	}
	for name, s := range c.HSM.Slots {
		def(&s.Sessions, 8)
		c.HSM.Slots[name] = s
	}
	if c.HSM.VerifyFresh == nil {
		yes := true
		c.HSM.VerifyFresh = &yes
	}
}

func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (c *Config) validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	}
	if !reNode.MatchString(c.Node) {
		bad("node", "须为小写字母、数字、点或连字符，1–63 位 (lower-case letters, digits, dots, hyphens)")
	}
	if c.Campus == "" || len(c.Campus) > 64 {
		bad("campus", "须为 1–64 字节 (1 to 64 bytes)")
	}
	c.Listen.validate(bad)
	if c.Database.SweepEvery < Duration(time.Second) {
		bad("database.sweep_every", "至少 1 秒 (at least a second)")
	}
	if n := c.Database.ArchiveAfterMonths; n < 0 || n > 1200 {
		bad("database.archive_after_months", "须为 0（不自动归档）或 1–1200 个月 (0: never by itself, or 1 to 1200 months)")
	}
	if d := c.Database; d.DSN != "" {
		if err := connect.Check(d.DSN); err != nil {
			bad("database.dsn", "%v", err)
		}
	} else if d.PasswordFile != "" {
		bad("database.password_file", "没有 database.dsn 时无意义 (means nothing without database.dsn)")
	}
	if _, err := profiles.Load(c.HSM.Profile); err != nil {
		bad("hsm.profile", "%v", err)
	}
	if v := c.Evaluation.Impersonate; v != "" {
		if !c.Evaluation.Softtoken {
			bad("evaluation.impersonate", "没有 evaluation.softtoken 时无意义 (means nothing without evaluation.softtoken)")
		}
		if _, err := profiles.Load(v); err != nil {
			bad("evaluation.impersonate", "%v", err)
		}
	}
	if c.HSM.Custody != nil && (c.HSM.Custody.KEK == "" || len(c.HSM.Custody.KEK) > 128) {
		bad("hsm.custody.kek", "须为 1–128 字节 (1 to 128 bytes)")
	}
	if c.HSM.WrappedKeys < 1 || c.HSM.WrappedKeys > 1<<20 {
		bad("hsm.wrapped_keys", "须为 1–1048576 (1 to 1048576)")
	}
	below := func(at string) func(key, format string, args ...any) {
		return func(key, format string, args ...any) { bad(at+key, format, args...) }
	}
	for _, class := range hsm.Classes {
		if _, ok := c.HSM.Slots[string(class)]; !ok && class != hsm.TLS {
			bad("hsm.slots."+string(class), "缺少 (missing)")
		}
	}
	locked := c.HSM.locked()
	if s := c.HSM.PINSource; s != PINFromFile && !locked {
		bad("hsm.pin_source", "须为 file、unlock 或 tpm (must be file, unlock or tpm)")
	}
	if t := c.HSM.TPM; t != nil {
		t.validate(bad)
	}
	validateModule(c.HSM.Module, below("hsm."))
	validateSlots(c.HSM.Slots, locked, below("hsm."))
	validateWeight(c.HSM.Weight, below("hsm."))
	names := map[string]bool{}
	for i := range c.HSM.Machines {
		m := &c.HSM.Machines[i]
		at := fmt.Sprintf("hsm.machines[%d].", i)
		m.validate(locked, below(at))
		if names[m.Name] {
			bad(at+"name", "%s 重复 (given twice)", m.Name)
		}
		names[m.Name] = true
	}
	if len(c.HSM.Machines) >= pool.Most {
		bad("hsm.machines", "连同 main 至多 %d 台 (at most %d, main included)", pool.Most, pool.Most)
	}
	if c.Time.MinSources < 1 {
		bad("time.min_sources", "至少为 1 (at least 1)")
	}
	if len(c.Time.Sources) == 0 && !c.Evaluation.GNSSFeed {
		bad("time.sources", "至少需要一个时间源 (at least one source)")
	}
	groups := map[string]bool{}
	for i, s := range c.Time.Sources {
		key := fmt.Sprintf("time.sources[%d]", i)
		if s.Name == "" || s.Group == "" {
			bad(key, "缺少 name 或 group (name and group are needed)")
		}
		if _, _, err := net.SplitHostPort(s.Address); err != nil {
			bad(key+".address", "须为 host:port (%v)", err)
		}
		groups[s.Group] = true
	}
	if c.Evaluation.GNSSFeed {
		groups["evaluation-feed"] = true
	}
	if len(groups) < c.Time.MinSources {
		bad("time.min_sources", "只有 %d 组时间源，达不到 %d (only %d groups of sources)", len(groups), c.Time.MinSources, len(groups))
	}
	if a := time.Duration(c.Time.Accuracy); a < 10*time.Millisecond || a > 10*time.Second {
		bad("time.accuracy", "须在 10ms 与 10s 之间 (between 10ms and 10s)")
	}
	c.validateUnits(bad)
	if c.TSA.Upstream != nil {
		c.TSA.Upstream.validate(c, bad)
	}
	if c.Policy.MaxBodyBytes < 1<<20 || c.Policy.MaxBodyBytes > 256<<20 {
		bad("policy.max_body_bytes", "须在 1 MiB 与 256 MiB 之间 (between 1 MiB and 256 MiB)")
	}
	if p := c.Policy.TSAReservePercent; p < 1 || p > 100 {
		bad("policy.tsa_reserve_percent", "须为 1–100 (1 to 100)")
	}
	if err := c.Log.check(); err != nil {
		key, why, _ := strings.Cut(err.Error(), ": ")
		bad(key, "%s", why)
	}
	if c.Policy.SegmentEntries < 10 {
		bad("policy.segment_entries", "至少 10 (at least 10)")
	}
	for _, n := range []struct {
		key                string
		value, least, most int
	}{
		{"time.drift_ppm", c.Time.DriftPPM, 15, 500},
		{"policy.rate", c.Policy.Rate, 1, account.MaxRate},
		{"policy.burst", c.Policy.Burst, 1, account.MaxBurst},
		{"policy.hsm_rate", c.Policy.HSMRate, 0, account.MaxRate},
		{"policy.hsm_sessions", c.Policy.HSMSessions, 0, account.MaxSessions},
		{"policy.concurrent", c.Policy.Concurrent, 1, 10_000},
		{"policy.auth_failures", c.Policy.AuthFailures, 1, 100_000},
		{"policy.max_connections", c.Policy.MaxConnections, 16, 100_000},
	} {
		if n.value < n.least || n.value > n.most {
			bad(n.key, "须为 %d–%d (%d to %d)", n.least, n.most, n.least, n.most)
		}
	}
	if d := time.Duration(c.Policy.Drain); d < time.Second || d > 5*time.Minute {
		bad("policy.drain", "须在 1s 与 5m 之间 (between 1s and 5m)")
	}
	c.Preserve.validate(bad)
	c.validatePeer(bad)
	c.Alarms.validate(bad)
	c.validateAdmin(bad)
	if r := c.Trust.Revocation; r != RevocationHard && r != RevocationSoft {
		bad("trust.revocation", "须为 hard 或 soft (must be hard or soft)")
	}
	urls := map[string]bool{}
	for i, s := range c.Trust.CRL {
		key := fmt.Sprintf("trust.crl[%d]", i)
		if err := fetch.CheckURL(s.URL); err != nil || urls[s.URL] {
			bad(key+".url", "须为 http、https 或 file 地址，不可重复 (http, https or file, each once): %v", err)
		}
		urls[s.URL] = true
		if d := time.Duration(s.Interval); d < 10*time.Second || d > 7*24*time.Hour {
			bad(key+".interval", "须在 10s 与 168h 之间 (between 10s and 168h)")
		}
	}
	return errors.Join(errs...)
}
