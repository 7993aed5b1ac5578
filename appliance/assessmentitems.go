package appliance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/assess"
	"yinjian/appliance/assess/trial"
	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
	"yinjian/appliance/pki"
	"yinjian/hsm"
	"yinjian/ntp/ledger"
)

// softModels are the models of software tokens, as they name themselves (CK_TOKEN_INFO): ours, and SoftHSM's.
var softModels = []string{"soft-evaluation", "SoftHSM v2"}

// modeOf is soft when configuration or any token says so: ours can be driven like anybody's, beside a machine or instead of one.
func modeOf(configured bool, tokens []hsm.TokenInfo) string {
	if configured || slices.ContainsFunc(tokens, func(t hsm.TokenInfo) bool { return slices.Contains(softModels, t.Model) }) {
		return assess.ModeSoft
	}
	return assess.ModeUnsealed
}

// mode asks every slot's token what it is.
func (c *collection) mode() {
	var tokens []hsm.TokenInfo
	c.eachSlot(func(name string, class hsm.SlotClass, machine *cipherMachine) {
		info, err := hsm.TokenInfo{}, hsm.ErrUnavailable
		if w := machine.workers[class]; w != nil {
			info, err = w.Info(c.ctx)
		}
		if err != nil {
			c.unknown = append(c.unknown, name)
		}
		tokens = append(tokens, info)
	})
	c.report.Header.Mode = modeOf(c.a.cfg.Evaluation.Softtoken, tokens)
}

// header is section 1.
func (c *collection) header(spki []byte) {
	a := c.a
	c.try(assess.SectionHeader, line{
		id: "header.appliance", title: "设备与日志密钥 (the appliance and its log key)", command: "yinjian status --dir DIR -o json",
		shows: "设备名、院区、版本、纪元与日志公钥", limits: "不证明设备所在地点",
	}, func() (any, error) {
		return map[string]any{
			"node": a.cfg.Node, "campus": a.cfg.Campus, "version": Version, "epoch": a.journal.Epoch().String(), "entries": a.journal.Size(), "log_key": spki,
			"evaluation": a.evaluationWords(), "uptime_s": int64((a.sys.Boot() - a.started).Seconds()), "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH,
		}, nil
	})
	c.try(assess.SectionHeader, line{
		id: "header.mode", title: "密码机 (cipher machine)", command: "yinjian hsm list --dir DIR", shows: "没有使用软件密码机", limits: "不证明密码机是认证产品：见第 11 节的证书编号",
	}, func() (any, error) {
		machines := a.machines.states()
		switch {
		case c.report.Header.Mode == assess.ModeSoft:
			return machines, missing("soft：使用软件密码机，仅供评估，非认证产品 (the software cipher machine: evaluation only)")
		case len(c.unknown) > 0:
			return machines, missing("没有应答，不知是不是软件密码机 (no answer: it may be a software one): " + strings.Join(c.unknown, " "))
		}
		return machines, nil
	})
	c.try(assess.SectionHeader, line{
		id: "header.image", title: "密封映像 (sealed image)", command: "yinjian update status --dir DIR", shows: "从正式版密封映像启动，固件打开了安全启动",
		limits: "是运行中的系统自己读出的；固件里登记的是谁的密钥，须在机器旁核对",
	}, func() (any, error) {
		s, err := readSealed(os.DirFS("/"))
		if err != nil {
			return nil, notSealed(err)
		}
		c.report.Header.Image = s.String()
		return s, s.shown()
	})
}

// algorithms is section 2.
func (c *collection) algorithms() {
	c.try(assess.SectionKAT, line{
		id: "kat.software", title: "软件实现的已知答案测试 (known answers, in software)", command: "yinjian assess verify PACK", replayed: true,
		shows: "本程序的 SM2、SM3、SM4、HMAC-SM3、RSA-2048、SHA-256 与公布的向量一致", limits: "不代替商用密码产品检测",
	}, func() (any, error) {
		kats := trial.RunKAT()
		for _, k := range kats {
			if !k.Passed {
				return kats, fmt.Errorf("%s（%s）：%s", k.Algorithm, k.Source, k.Detail)
			}
		}
		return kats, nil
	})
	c.eachSlot(func(name string, class hsm.SlotClass, machine *cipherMachine) {
		c.try(assess.SectionKAT, line{
			id: "kat.token." + name, title: "密码机内的自测，槽位 " + name + " (inside the token)", command: "yinjian hsm probe",
			shows: "令牌内的算法与公布的向量一致，或其签名在令牌外验证得过", limits: "只试厂商档案列出的算法；SM1 未公开，从不模拟，也无从核对",
		}, func() (any, error) {
			w := machine.workers[class]
			if w == nil {
				return nil, missing("槽位没有启动 (the slot was not started)")
			}
			tests, err := w.SelfTest(c.ctx)
			if err != nil {
				return nil, missing("密码机没有应答 (the machine does not answer): " + err.Error())
			}
			passed := 0
			for _, t := range tests {
				switch t.Result {
				case hsm.SelfTestFailed:
					return tests, fmt.Errorf("%s：%s", t.Algorithm, t.Detail)
				case hsm.SelfTestPassed:
					passed++
				}
			}
			if passed == 0 {
				return tests, missing("没有可核对的算法 (nothing that could be compared)")
			}
			return tests, nil
		})
	})
	c.absent(assess.SectionKAT, line{id: "kat.sm1", title: "SM1", limits: "SM1 只存在于经批准的硬件"}, "unavailable：软件不含 SM1，密码机见各槽位 (software has none; see each slot)")
}

// eachSlot calls fn for each machine's slots, by "class.machine".
func (c *collection) eachSlot(fn func(name string, class hsm.SlotClass, machine *cipherMachine)) {
	for _, m := range c.a.machines.all() {
		for _, class := range hsm.Classes {
			if _, ok := m.Slots[string(class)]; ok {
				fn(string(class)+"."+m.Name, class, m)
			}
		}
	}
}

// A randomTry is one collection of a source's bytes and its judgement. Data is left out of the long set.
type randomTry struct {
	SM3    string        `json:"sm3"`
	Data   []byte        `json:"data,omitempty"`
	Judged *trial.Judged `json:"judged"`
}

// random is section 3.
func (c *collection) random() {
	set := trial.Periodic
	if c.req.Full {
		set = trial.PowerOn
	}
	source := func(id, title, what string, read func(ctx context.Context, n int) ([]byte, error)) {
		c.try(assess.SectionRandom, line{
			id: id, title: title, command: "yinjian assess verify PACK", replayed: set == trial.Periodic,
			shows:  fmt.Sprintf("%s 的 %d 组数据通过 GM/T 0005-2021 的 %d 种检测", what, trial.Groups, map[trial.Set]int{trial.Periodic: 12, trial.PowerOn: 15}[set]),
			limits: "只说明这一次的数据；好的源约六次有一次不过周期检测（实测 200 次中 35 次），按 GM/T 0062-2018 重采重测一次，两次都列出。不评价熵源",
		}, func() (any, error) {
			var tries []randomTry
			for range 2 {
				data, err := read(c.ctx, set.Bytes())
				if err != nil {
					return tries, missing("取不到随机数 (no random numbers): " + err.Error())
				}
				judged, err := c.s.test(c.ctx, set, data)
				if err != nil {
					return tries, missing("检测没有完成 (the tests did not end): " + err.Error())
				}
				t := randomTry{SM3: assess.Digest(data), Judged: judged}
				if set == trial.Periodic {
					t.Data = data
				}
				tries = append(tries, t)
				if judged.Passed {
					return tries, nil
				}
			}
			return tries, errors.New("两次检测均未通过 (both tries failed)")
		})
	}
	source("random.software", "软件随机数：gmsm 与协议所用的 crypto/rand (software: what gmsm and protocols use)", "crypto/rand（内核 getrandom）", func(_ context.Context, n int) ([]byte, error) {
		b := make([]byte, n)
		_, err := rand.Read(b)
		return b, err
	})
	for _, m := range c.a.machines.all() {
		source("random.token."+m.Name, "密码机 "+m.Name+" 的 C_GenerateRandom (the machine's)", "密码机 "+m.Name+" 的 C_GenerateRandom", func(ctx context.Context, n int) ([]byte, error) {
			for _, class := range hsm.Classes {
				if w := m.workers[class]; w != nil {
					return readRandom(ctx, w, n)
				}
			}
			return nil, errors.New("没有已启动的槽位 (no slot was started)")
		})
	}
}

// readRandom asks for n bytes in parts, and rests between them.
func readRandom(ctx context.Context, t hsm.Token, n int) ([]byte, error) {
	out := make([]byte, 0, n)
	for begun := time.Now(); len(out) < n; rest(ctx, &begun) { // interval
		part, err := t.Random(ctx, min(n-len(out), 1024))
		if err != nil {
			return nil, err
		}
		out = append(out, part...)
	}
	return out, ctx.Err()
}

// LowestPriority gives every thread of this process the lowest priority; those that come later have their maker's.
func LowestPriority() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := syscall.Setpriority(syscall.PRIO_PROCESS, id, 19); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// ServeRandomTests is the work of the process that tests random numbers: the set's name and a line end, then its bytes, on in; the
// judgement on out.
func ServeRandomTests(in io.Reader, out io.Writer) error {
	data, err := io.ReadAll(io.LimitReader(in, int64(trial.PowerOn.Bytes())+64))
	if err != nil {
		return err
	}
	name, data, _ := bytes.Cut(data, []byte("\n"))
	judged, err := trial.Test(trial.Set(name), data)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(judged)
}

// test has the other process judge.
func (s *assessor) test(ctx context.Context, set trial.Set, data []byte) (*trial.Judged, error) {
	cmd := exec.CommandContext(ctx, s.command[0], s.command[1:]...)
	cmd.Stdin = io.MultiReader(strings.NewReader(string(set)+"\n"), bytes.NewReader(data))
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	judged := new(trial.Judged)
	return judged, json.Unmarshal(out, judged)
}

// staffKeysShown is how many keys of staff stand in a report one by one; of the others there are counts.
const staffKeysShown = 50

// keys is section 4.
func (c *collection) keys() {
	a := c.a
	c.try(assess.SectionKeys, line{
		id: "keys.inventory", title: "密钥清单与生命周期台账，属性由密码机读回 (inventory, attributes read back)", command: "yinjian hsm keys --dir DIR -o json",
		shows:  "每把设备密钥都在密码机内，CKA_SENSITIVE 为真、CKA_EXTRACTABLE 为假；列出 NEVER_EXTRACTABLE、ALWAYS_SENSITIVE、LOCAL、产生、启用、更换、销毁与使用次数",
		limits: "属性是密码机自己说的；签名人密钥只列前 " + fmt.Sprint(staffKeysShown) + " 把，其余计数",
	}, func() (any, error) {
		all, err := admin{a}.ListKeys(c.ctx, c.actor)
		if err != nil {
			return nil, err
		}
		inv := all.(inventory)
		counts := map[string]int{}
		shown, staff := []keyLine{}, 0
		var wrong []string
		for _, k := range inv.Keys {
			counts[k.Kind+"/"+k.State]++
			if k.State == "unknown" {
				wrong = append(wrong, k.Label)
			}
			if k.Slot == string(hsm.Staff) {
				if staff++; staff > staffKeysShown {
					continue
				}
			}
			shown = append(shown, k)
		}
		raw := map[string]any{"slots": inv.Slots, "counts": counts, "keys": shown, "keys_in_all": len(inv.Keys), "warnings": inv.Warnings}
		switch {
		case len(wrong) > 0:
			return raw, fmt.Errorf("密码机中有目录不认识的密钥 (keys that the directory does not know): %s", strings.Join(wrong[:min(len(wrong), 5)], "、"))
		case len(inv.Warnings) > 0:
			return raw, errors.New(inv.Warnings[0])
		}
		return raw, nil
	})
	c.try(assess.SectionKeys, line{
		id: "keys.uses", title: "密钥使用次数与日志的核对 (uses held against the journal)", command: "yinjian audit verify --dir DIR",
		shows: "工作进程记下的每次签名在日志中都有记录", limits: "绕过工作进程的签名只有密码机自带计数时才看得到；见 docs/hsm.md",
	}, func() (any, error) {
		u := a.accounting.status()
		if u.Alarms > 0 {
			return u, fmt.Errorf("%d 项告警 (alarms)", u.Alarms)
		}
		if u.Error != "" {
			return u, missing(u.Error)
		}
		return u, nil
	})
	c.try(assess.SectionKeys, line{
		id: "keys.pins", title: "密码机口令从哪里来 (where the PINs come from)", command: "yinjian status --dir DIR -o json",
		shows:  "启动时由多名持有人，或由本机 TPM 打开；口令不在磁盘的文件里",
		limits: "由 TPM 打开的，整机被偷即可启动；不证明持有人是谁、口令没有写在纸上",
	}, func() (any, error) {
		warnings := a.lockWarnings()
		raw := map[string]any{"pin_source": a.cfg.HSM.PINSource, "warnings": append([]string{}, warnings...)}
		if a.cfg.Evaluation.Softtoken {
			raw["softtoken_passphrase"] = "secrets/softtoken.passphrase"
		}
		switch {
		case a.cfg.Evaluation.Softtoken:
			return raw, missing("软件密码机，仅供评估：其存储口令是磁盘上的文件 (the software cipher machine's passphrase is a file on the disk)")
		case !a.cfg.HSM.locked():
			return raw, missing("口令文件与设备在同一磁盘：hsm.pin_source = file (the PINs are files on the appliance's disk)")
		case len(warnings) > 0:
			return raw, missing(warnings[0])
		}
		return raw, nil
	})
	c.entries(assess.SectionKeys, line{
		id: "keys.ceremonies", title: "密钥仪式记录 (key ceremonies)", command: "yinjian change list --dir DIR", shows: "仪式的纪要已入日志，列出其条目", limits: "不证明在场的人是谁",
	}, "没有做过密钥仪式 (no ceremony was held)", func(kind string) bool { return strings.HasPrefix(kind, "custody.ceremony/") })
	c.entries(assess.SectionKeys, line{
		id: "keys.backups", title: "备份与恢复演练 (backups and drills)", command: "yinjian backup list --dir DIR", shows: "备份、校验、演练已入日志", limits: "不证明备份介质还在",
	}, "没有做过备份 (no backup was made)", func(kind string) bool {
		return kind == backup.KindOutcome || kind == backup.KindVerified || kind == backup.KindDrill
	})
}

// An entryLine names an entry of the journal.
type entryLine struct {
	Sequence uint64 `json:"sequence"`
	Kind     string `json:"kind"`
	Object   string `json:"object"`
	At       string `json:"at"`
	Leaf     string `json:"leaf_sm3"`
}

// entriesShown bounds what stands in a report of one kind of entries.
const entriesShown = 100

// entries makes an item of the entries of state whose kinds are wanted, each proved to be in the log as it is read.
func (c *collection) entries(section int, l line, none string, wanted func(kind string) bool) {
	c.try(section, l, func() (any, error) {
		found := []entryLine{}
		n := 0
		begun := time.Now() // interval
		err := c.a.journal.State(c.ctx, func(r audit.Record) error {
			if n++; n%256 == 0 {
				rest(c.ctx, &begun)
			}
			if wanted(r.Entry.Kind) && len(found) < entriesShown {
				found = append(found, entryLine{r.Sequence, r.Entry.Kind, r.Entry.Object, time.UnixMicro(r.Entry.Time.Micros).UTC().Format(time.RFC3339), audit.LeafHash(r.EntryDER).String()})
			}
			return c.ctx.Err()
		})
		if err == nil && len(found) == 0 {
			err = missing(none)
		}
		return found, err
	})
}

// staffPathsTried is how many signers' certificates are judged.
const staffPathsTried = 20

// certificates is section 5.
func (c *collection) certificates() {
	a := c.a
	now := a.clock.Now().Time
	own := []account.CertificateLine{}
	staff := []account.CertificateLine{}
	for _, l := range a.directory.Certificates() {
		if l.Use == account.UseStaff {
			staff = append(staff, l)
		} else {
			own = append(own, l)
		}
	}
	standing := func(l account.CertificateLine) (subjects []string, err error) {
		for _, path := range a.directory.Paths(l.Owner) {
			if pki.SerialHex(path[0].SerialNumber) != l.Serial {
				continue
			}
			for _, cert := range path {
				subjects = append(subjects, cert.Subject.String())
			}
			st, err := a.directory.Standing(path, purposeOf(l.Use), now)
			if err == nil && st.Unchecked != "" {
				err = missing("吊销状态未核验 (not checked): " + st.Unchecked)
			}
			return subjects, err
		}
		return nil, errors.New("没有路径 (no path)")
	}
	c.try(assess.SectionCertificates, line{
		id: "certificates.own", title: "设备证书：TLS、时间戳单元、日志 (the appliance's own)", command: "yinjian cert list --dir DIR -o json", shows: "路径到受信任的 CA，在有效期内，未吊销，由其他 CA 签发",
		limits: "不证明该 CA 持有电子认证服务许可证",
	}, func() (any, error) { return judgeCertificates(own, len(own), standing) })
	c.try(assess.SectionCertificates, line{
		id: "certificates.staff", title: fmt.Sprintf("签名人证书抽样 %d 张 (a sample of signers')", staffPathsTried), command: "yinjian cert list --dir DIR -o json", shows: "抽样的路径到受信任的 CA，在有效期内，未吊销，由其他 CA 签发",
		limits: "抽样；不证明证书持有人的身份",
	}, func() (any, error) { return judgeCertificates(staff, staffPathsTried, standing) })
	c.try(assess.SectionCertificates, line{
		id: "certificates.lists", title: "吊销列表的新鲜程度 (freshness of CRLs)", command: "yinjian cert crls --dir DIR -o json", shows: "设备现有的每份吊销列表此刻都在有效期内（thisUpdate 与 nextUpdate 之间）",
		limits: "只看设备现有的列表，不证明每个 CA 都发布了列表，也不证明列表是最新的一份；没有 OCSP",
	}, func() (any, error) {
		lists := a.directory.ListCRLs()
		for _, l := range lists {
			if l.State != "current" {
				return lists, fmt.Errorf("%s：%s", l.Issuer, l.State)
			}
		}
		if len(lists) == 0 {
			return lists, missing("没有吊销列表 (there are no lists)")
		}
		return lists, nil
	})
	c.try(assess.SectionCertificates, line{
		id: "certificates.forecast", title: "到期预测 (expiry forecast)", command: "yinjian cert list --dir DIR -o json", shows: "30 天内没有现用证书到期", limits: "只算现有证书，不含续期计划",
	}, func() (any, error) {
		ends := map[string]int{"30": 0, "90": 0, "180": 0, "365": 0}
		for _, l := range slices.Concat(own, staff) {
			for _, days := range []int{30, 90, 180, 365} {
				if l.State == account.StateActive && l.DaysLeft <= days {
					ends[fmt.Sprint(days)]++
				}
			}
		}
		if ends["30"] > 0 {
			return ends, fmt.Errorf("%d 张在 30 天内到期 (end within 30 days)", ends["30"])
		}
		return ends, nil
	})
}

// judgeCertificates judges at most so many of those in use; standing answers a path's subjects and what is wrong with it. Whoever
// has certificates and none in use counts, too, people aside whose certificates have ended: they may have left.
func judgeCertificates(lines []account.CertificateLine, most int, standing func(account.CertificateLine) ([]string, error)) (any, error) {
	type judged struct {
		account.CertificateLine
		Path    []string `json:"path"`
		Verdict string   `json:"verdict"`
	}
	inUse := map[string]bool{}
	for _, l := range lines {
		inUse[l.Owner+" "+l.Algorithm] = inUse[l.Owner+" "+l.Algorithm] || l.State == account.StateActive
	}
	out := []judged{}
	var bad, none error
	for _, l := range lines {
		ended := l.State == account.StateExpired || l.State == account.StateRevoked
		if !inUse[l.Owner+" "+l.Algorithm] && (l.State == account.StateUnusable || ended && l.Use != account.UseStaff) {
			bad = fmt.Errorf("%s：没有现用的证书 (none in use)：%s %s", l.Owner, l.State, l.Revocation)
		}
		if l.State != account.StateActive || len(out) >= most {
			continue
		}
		j := judged{CertificateLine: l, Verdict: "good"}
		var err error
		if j.Path, err = standing(l); err != nil {
			j.Verdict = shownProblem(err)
			if unknown := missing(""); errors.As(err, &unknown) {
				none = missing(l.Owner + "：" + j.Verdict)
			} else {
				bad = fmt.Errorf("%s：%s", l.Owner, j.Verdict)
			}
		}
		out = append(out, j)
	}
	evaluation := 0
	for _, j := range out {
		if j.Evaluation {
			evaluation++
		}
	}
	switch {
	case bad != nil:
		return out, bad
	case none != nil:
		return out, none
	case len(out) == 0:
		return out, missing("没有现用的证书 (none is in use)")
	case evaluation > 0:
		return out, missing(fmt.Sprintf("其中 %d 张由评估 CA 签发，不具法律效力；路径、吊销状态见原始输出 (of these %d are the evaluation CA's)", evaluation, evaluation))
	}
	return out, nil
}

func purposeOf(use string) pki.Purpose {
	switch use {
	case account.UseStaff:
		return pki.StaffSigning
	case account.UseTSA:
		return pki.TimeStamping
	case account.UseTLS:
		return pki.TLSServer
	}
	return pki.LogSigning
}

// software is section 8.
func (c *collection) software() {
	a := c.a
	c.try(assess.SectionSoftware, line{
		id: "software.parts", title: "软件物料清单 (SBOM)", command: "go version -m yinjian", shows: "构建时编入的模块与版本", limits: "不含密码机厂商的库与操作系统",
	}, func() (any, error) {
		info, ok := debug.ReadBuildInfo()
		if !ok {
			return nil, missing("程序没有构建信息 (the program has no build information)")
		}
		type part struct {
			Path    string `json:"path"`
			Version string `json:"version"`
			Sum     string `json:"sum,omitempty"`
		}
		parts := []part{}
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			parts = append(parts, part{m.Path, m.Version, m.Sum})
		}
		settings := map[string]string{}
		for _, s := range info.Settings {
			settings[s.Key] = s.Value
		}
		return map[string]any{"go": info.GoVersion, "main": info.Main.Path, "parts": parts, "settings": settings}, nil
	})
	c.try(assess.SectionSoftware, line{
		id: "software.files", title: "程序与配置的 SM3 量度 (measured files)", command: "gmssl sm3 或 openssl dgst -sm3 FILE", shows: "此刻程序、密码机模块与配置文件的 SM3",
		limits: "没有签名的基准可比：只能与别处保存的值、与上次报告比较",
	}, func() (any, error) {
		files := map[string]string{}
		names := []string{"/proc/self/exe"}
		for _, m := range a.machines.all() {
			if name, _, err := splitModule(m.Module); err == nil && name == "" { // what is in a pack is its own item's
				names = append(names, m.Module)
			}
		}
		for _, name := range []string{"config.toml", "machines.toml", "timesources.toml"} {
			names = append(names, filepath.Join(a.dir, name))
		}
		for _, name := range names {
			sum, err := fileSM3(name)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return files, err
			}
			files[name] = sum
		}
		return files, nil
	})
	c.try(assess.SectionSoftware, line{
		id: "software.packs", title: "厂商包 (makers' packs)", command: "yinjian pack list --dir DIR -o json", shows: "每个厂商包由发布方与医院签名，以 dm-verity 只读挂载，安装由两人决定、记入日志",
		limits: "签名由厂商包代理核验，本进程转述；厂商的库做什么，签名不证明",
	}, func() (any, error) {
		if a.cfg.Packs.Socket == "" {
			return nil, missing("不是密封设备，不装厂商包 (no sealed appliance: it takes no packs)")
		}
		list, err := a.describePacks(c.ctx)
		if err != nil {
			return nil, missing(shownProblem(err))
		}
		for _, p := range list.Packs {
			switch {
			case p.Fault != "":
				return list, fmt.Errorf("%s：没有挂载 (not mounted)：%s", p.Name, p.Fault)
			case p.Since == "":
				return list, fmt.Errorf("%s：日志里没有它的安装 (the journal has no installation of it)", p.Name)
			}
		}
		return list, nil
	})
	c.absent(assess.SectionSoftware, line{id: "software.image", title: "签名的镜像与更新 (signed image and updates)"}, "没有构建镜像：可执行程序的来源没有签名可验 (no image is built: nothing signed says where the program came from)")
	c.try(assess.SectionSoftware, line{
		id: "software.ports", title: "打开的端口与声明的比较 (open ports against the declared)", command: "ss -ltnup", shows: "本进程监听的 TCP 端口都是声明的", limits: "只看本进程；同一主机的其他程序与防火墙不在内",
	}, func() (any, error) {
		open, err := listeningPorts()
		if err != nil {
			return nil, missing("读不到 /proc (cannot be read): " + err.Error())
		}
		declared := c.declared()
		if c.a.receiver != "" {
			declared = append(declared, listening{name: "simulated_receiver", address: c.a.receiver})
		}
		var others []string
		for _, address := range open {
			if !slices.ContainsFunc(declared, func(l listening) bool { return samePort(l.address, address) }) {
				others = append(others, address)
			}
		}
		raw := map[string]any{"open": open, "declared": addresses(declared)}
		if len(others) > 0 {
			return raw, fmt.Errorf("没有声明的端口 (not declared): %s", strings.Join(others, " "))
		}
		return raw, nil
	})
	c.try(assess.SectionSoftware, line{
		id: "software.accounts", title: "运行账户与子进程 (account and children)", command: "ps -o user,pid,args", shows: "本进程不以 root 运行", limits: "操作系统的其他账户不在内；数据库账户见 yinjian handover",
	}, func() (any, error) {
		raw := map[string]any{"uid": os.Getuid(), "gid": os.Getgid(), "pid": os.Getpid(), "groups": groupsOfProcess()}
		if os.Getuid() == 0 {
			return raw, errors.New("以 root 运行 (runs as root)")
		}
		return raw, nil
	})
}

func groupsOfProcess() []int {
	g, err := os.Getgroups()
	if err != nil {
		return []int{}
	}
	return g
}

// time is section 9.
func (c *collection) time() {
	a := c.a
	c.try(assess.SectionTime, line{
		id: "time.status", title: "时间来源、组数、误差界与声明的准确度 (sources, quorum, bound against the accuracy)", command: "yinjian time status --dir DIR -o json",
		shows: "此刻时间可信，误差界在时间戳所声明的准确度之内，来源达到最少组数", limits: "误差界由各来源的自报与往返时间算得，没有与第三方时钟比对",
	}, func() (any, error) {
		raw, err := admin{a}.TimeStatus(c.ctx, c.actor)
		if err != nil {
			return nil, err
		}
		r := raw.(*timeReport)
		switch {
		case r.Evaluation:
			return raw, missing("时间来自模拟的北斗接收机，即本机时间 (a simulated receiver: the time is the machine's own)")
		case r.BoundUS > r.AccuracyUS:
			return raw, fmt.Errorf("误差界 %d µs 超过声明的 %d µs (the bound is above the accuracy)", r.BoundUS, r.AccuracyUS)
		case len(r.Round.Agreed) < r.MinSources:
			return raw, fmt.Errorf("最近一轮只有 %d 组一致，要求 %d 组 (groups agreed)", len(r.Round.Agreed), r.MinSources)
		case r.MinSources < 2:
			return raw, missing("只要求一组时间源，没有互证 (one group of sources suffices: nothing is cross-checked)")
		}
		return raw, nil
	})
	c.try(assess.SectionTime, line{
		id: "time.refusals", title: "三十天的每小时台账与状态变化 (hours and changes of thirty days)", command: "yinjian time history --dir DIR -o json", shows: "日志里近三十天有时间台账；误差界的最大值、因时间拒绝的时间戳数与时间状态的变化由台账算得",
		limits: "不证明每个小时都有台账，设备未运行的时段没有；不判断变化的原因，被否决的来源只见于状态变化",
	}, func() (any, error) {
		now := a.clock.Now().Time
		changes, err := a.time.changes(c.ctx, now.Add(-30*24*time.Hour), now.Add(time.Second))
		if err != nil {
			return nil, err
		}
		hours, bound, refused := 0, int64(0), int64(0)
		err = a.time.hours(c.ctx, now.Add(-30*24*time.Hour), now.Add(time.Second), func(h ledger.Hour) {
			hours, bound, refused = hours+1, max(bound, h.BoundMaxUS), refused+int64(h.Tokens.RefusedTime)
		})
		if err != nil {
			return nil, err
		}
		raw := map[string]any{"hours": hours, "bound_max_us": bound, "refused_for_time": refused, "changes_in_all": len(changes), "changes": changes[max(0, len(changes)-entriesShown):]}
		if hours == 0 {
			return raw, missing("日志里还没有时间台账（每小时一条） (no hour is journalled yet)")
		}
		return raw, nil
	})
}

// identity is section 10.
func (c *collection) identity() {
	a := c.a
	c.try(assess.SectionIdentity, line{
		id: "identity.applications", title: "应用的鉴别：逐请求 HMAC-SM3 (applications: HMAC-SM3 of each request)", command: "yinjian app list --dir DIR -o json",
		shows: "每个应用有自己的密钥、权限与可接受的同意方式；密钥由密码机内的密钥派生，不落盘", limits: "不证明业务系统如何保管其密钥",
	}, func() (any, error) {
		apps := a.directory.Applications()
		if len(apps) == 0 {
			return apps, missing("没有登记应用 (no application is registered)")
		}
		type entry struct {
			ID         string   `json:"id"`
			Rights     []string `json:"rights"`
			Consent    []string `json:"consent"`
			Stamp      string   `json:"stamp"`
			Test       bool     `json:"test"`
			Production bool     `json:"production"`
			Stopped    bool     `json:"stopped"`
		}
		out := []entry{}
		for _, app := range apps {
			e := entry{ID: app.ID, Rights: app.Rights, Consent: []string{}, Stamp: app.Stamp, Test: app.Test, Production: app.Production, Stopped: app.Stopped}
			for _, m := range app.Consent {
				e.Consent = append(e.Consent, string(m))
			}
			out = append(out, e)
		}
		return out, nil
	})
	c.try(assess.SectionIdentity, line{
		id: "identity.signers", title: "签名人的因素：PIN 在密码机内核对 (signers: PINs checked in the cipher machine)", command: "yinjian signer list --dir DIR -o json",
		shows: "有多少签名人设了 PIN、被锁、停用、为测试账号", limits: "PIN 是一种因素；短信、扫码、UKey 等尚无",
	}, func() (any, error) {
		counts := map[string]int{"in_all": 0, "has_pin": 0, "pin_locked": 0, "stopped": 0, "test": 0, "custody_by_pin": 0}
		for _, g := range a.directory.Signers() {
			v := a.directory.View(g)
			counts["in_all"]++
			for name, is := range map[string]bool{"has_pin": v.HasPIN, "pin_locked": v.PINLocked, "stopped": v.Stopped, "test": v.Test, "custody_by_pin": v.Custody == "pin"} {
				if is {
					counts[name]++
				}
			}
		}
		if counts["in_all"] == 0 {
			return counts, missing("没有登记签名人 (nobody is enrolled)")
		}
		return counts, nil
	})
	c.try(assess.SectionIdentity, line{
		id: "identity.administrators", title: "管理员的因素 (administrators' factors)", command: "yinjian admin list --dir DIR -o json",
		shows:  "系统、安全、审计管理员都有在任的账户；每个在任的账户都登记了 SM2 登录证书，登录须口令与其签名；本机管理套接字须登录",
		limits: "不证明账户背后的人是谁、是不是不同的人，也不证明私钥在 UKey 里；没有看证书是否到期（登录时看）；能改配置并重启的人可改回不须登录；宿主操作系统的账户不在内",
	}, func() (any, error) {
		type entry struct {
			ID      string       `json:"id"`
			Role    account.Role `json:"role"`
			Factors []string     `json:"factors"`
			Stopped bool         `json:"stopped"`
		}
		out := []entry{}
		roles, bare := map[account.Role]bool{}, 0
		for _, one := range a.directory.Administrators() {
			e := entry{one.ID, one.Role, []string{"password"}, one.Stopped}
			if len(one.Certificate) > 0 {
				e.Factors = append(e.Factors, "SM2 certificate")
			}
			if !one.Stopped {
				roles[one.Role] = true
				if len(e.Factors) < 2 {
					bare++
				}
			}
			out = append(out, e)
		}
		switch {
		case len(out) == 0:
			return out, missing("没有建立管理员，本机管理只认操作系统用户 (there are no administrators: the local socket knows users of the host)")
		case a.cfg.Admin.Local != LocalLogin:
			return out, missing("本机套接字不要求登录：admin.local = open (the local socket asks for no login)")
		case !roles[account.System] || !roles[account.Security] || !roles[account.Auditor]:
			return out, missing("三员不全 (not all of the three roles have somebody)")
		case bare > 0:
			return out, missing(fmt.Sprintf("%d 名管理员只有口令，没有密码技术的因素 (by password alone)", bare))
		}
		return out, nil
	})
	c.absent(assess.SectionIdentity, line{id: "identity.users", title: "业务用户登录 (business users' login)"}, "业务系统自己鉴别其用户，本设备没有其登录的证据 (business systems authenticate their users, not this appliance)")
}
