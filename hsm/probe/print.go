package probe

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"

	"yinjian/hsm/pkcs11"
)

// Print writes a report for people. What a module says of itself cannot steer their terminal, nor stand on a line of its own.
func Print(to io.Writer, r *pkcs11.ProbeReport) {
	w := new(bytes.Buffer)
	defer func() {
		_, _ = to.Write(bytes.Map(func(c rune) rune {
			if unicode.In(c, unicode.Cc, unicode.Cf) && c != '\n' {
				return '?'
			}
			return c
		}, w.Bytes()))
	}()
	line := func(format string, args ...any) { fmt.Fprintf(w, format+"\n", plain(args)...) }
	line("模块 module: %s", r.Module)
	if l := r.Library; l != nil {
		line("  %s %s，%s，Cryptoki %s", l.Description, l.Version, l.Manufacturer, l.Cryptoki)
	}
	for _, s := range r.Slots {
		mark := " "
		if r.Slot != nil && *r.Slot == s.ID {
			mark = "*"
		}
		line("%s 槽位 slot %d: %s", mark, s.ID, s.Description)
		if t := s.Token; t != nil {
			line("    令牌 token %q，%s %s，序列号 %s，固件 %s%s", t.Label, t.Manufacturer, t.Model, t.Serial, t.Firmware, pinState(t))
		}
	}
	if len(r.Mechanisms) > 0 {
		line("\n机制 mechanisms: %d", len(r.Mechanisms))
		table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, m := range r.Mechanisms {
			fmt.Fprintf(table, "  %s\t%s\t%d–%d\t%s\n", m.Number, m.Name, m.Min, m.Max, known(m.Profiles))
		}
		table.Flush()
	}

	line("\n登录 login: %s", orNone(r.Login))
	if len(r.Profiles) > 0 {
		line("档案 profiles%s:", map[bool]string{true: "（未试签，只是未被排除 not tried, only not ruled out）"}[r.Verdict == pkcs11.VerdictNotChecked])
		for _, p := range r.Profiles {
			if p.Fits {
				line("  ✓ %s：令牌有其 %d 个号，缺 %d 个 (offers, lacks)", p.Name, p.Explained, p.Absent)
				continue
			}
			line("  ✗ %s：%s", p.Name, strings.Join(p.Why, "；"))
		}
	}
	line("结论 verdict: %s", verdict(r))
	for _, t := range r.Trials {
		line("  %s %s %s %s%s", results[t.Result], t.Profile, t.Operation, t.Mechanism, trial(t))
	}
	if r.Point != "" {
		line("SM2 公钥点 public point: %s，%s", r.Point, map[string]string{"public": "在公钥上 (on the public key)", "both": "公钥、私钥都有 (on both)"}[r.PointOn])
	}
	line("SM1: %s，%s", map[string]string{"callable": "可调用 (callable)", "unavailable": "不可用 (unavailable)"}[r.SM1], r.SM1Why)
	if r.KeysAre != "" {
		line("试验密钥 throw-away keys: %s", map[string]string{"session objects": "会话对象 (session objects)", "token objects": "令牌对象 (token objects)"}[r.KeysAre])
	}
	if len(r.SlotClasses) > 0 {
		line("可承担的槽位 slot classes:")
		for _, c := range r.SlotClasses {
			if c.Serves {
				line("  ✓ %s", c.Class)
			} else {
				line("  ✗ %s：缺 %s (lacks)", c.Class, strings.Join(c.Lacks, "、"))
			}
		}
	}
	if r.Verdict == pkcs11.VerdictFits {
		line("托管密钥的包装 wrapping of custody keys: %s", map[bool]string{true: r.Wrapping + "，没有试 (not tried)", false: "没有 (none)"}[r.Wrapping != ""])
	}
	if s := r.Sessions; s != nil {
		said, more := "未限定 (no limit)", "未到上限 (more were not tried)"
		if s.Said > 0 {
			said = fmt.Sprint(s.Said)
		}
		if s.Limit {
			more = "再开则 (one more): " + s.Error
		}
		line("会话 sessions: 令牌自报 (it says) %s；打开了 (opened) %d，%s", said, s.Opened, more)
	}
	for _, s := range r.Speed {
		line("速度 speed %s，拐点 knee %d 个会话：", s.Operation, s.Knee)
		for _, step := range s.Steps {
			line("  %3d 个会话 sessions: %8.0f 次/秒 (a second)", step.Sessions, step.PerSecond)
		}
		if s.Error != "" {
			line("  %s", s.Error)
		}
	}
	if len(r.Behaviour) > 0 {
		line("行为 behaviour:")
		for _, b := range r.Behaviour {
			mark := "✓"
			if !b.Fine {
				mark = "!"
			}
			line("  %s %s: %s", mark, behaviours[b.What], b.Answer)
		}
	}
	if e := r.Crashed; e != nil {
		line("崩溃 crashed (%s) in %s", e.Signal, orNone(e.Function))
	}
	if e := r.Hung; e != nil {
		line("未返回 did not return from %s within %.0f s", orNone(e.Function), e.Seconds)
	}
	if r.LeftBehind {
		line("注意 note: 标签为 %s 的试验密钥可能仍在令牌上，再次探测时销毁 (throw-away keys may be on the token still; the next probe destroys them)", pkcs11.ProbeLabel)
	}
	list := func(title string, all []string) {
		if len(all) > 0 {
			line("%s:", title)
		}
		for _, s := range all {
			line("  - %s", s)
		}
	}
	list("发现 findings", r.Findings)
	list("未查 not checked", r.NotChecked)
}

// plain keeps each text on its line.
func plain(args []any) []any {
	for i, a := range args {
		if s, ok := a.(string); ok {
			args[i] = strings.ReplaceAll(s, "\n", "?")
		}
	}
	return args
}

// known groups what profiles take a mechanism for: "rsa-pkcs1-sha256 (neutral、tass)".
func known(all []string) string {
	names := map[string][]string{}
	for _, s := range all {
		name, key, _ := strings.Cut(s, ": ")
		_, key, _ = strings.Cut(key, ".")
		names[key] = append(names[key], name)
	}
	var out []string
	for _, key := range slices.Sorted(maps.Keys(names)) {
		out = append(out, fmt.Sprintf("%s (%s)", key, strings.Join(names[key], "、")))
	}
	return strings.Join(out, "；")
}

func pinState(t *pkcs11.ProbeToken) string {
	switch {
	case !t.Initialized:
		return "，未初始化 (not initialised)"
	case t.PINLocked:
		return "，口令已锁 (PIN locked)"
	case t.PINFinalTry:
		return "，口令只剩一次 (one PIN try left)"
	case !t.UserPINSet:
		return "，没有用户口令 (no user PIN)"
	}
	return ""
}

func orNone(s string) string {
	if s == "" {
		return "—"
	}
	return s
}

func verdict(r *pkcs11.ProbeReport) string {
	switch r.Verdict {
	case pkcs11.VerdictFits:
		also := ""
		if len(r.AlsoFit) > 0 {
			also = fmt.Sprintf("；%s 对这台密码机说法相同 (say the same of this machine)", strings.Join(r.AlsoFit, "、"))
		}
		return fmt.Sprintf("相符的档案是 %s (this profile fits)%s", r.Profile, also)
	case pkcs11.VerdictNone:
		return "没有档案相符 (no profile fits)"
	case pkcs11.VerdictAmbiguous:
		return "有歧义，不作选择 (ambiguous: none is chosen)"
	}
	return "未核对 (not checked)"
}

var results = map[string]string{pkcs11.TrialWorks: "✓", pkcs11.TrialFails: "✗", pkcs11.TrialContradicts: "✗", pkcs11.TrialAbsent: "–"}

func trial(t pkcs11.ProbeTrial) string {
	if t.Result == pkcs11.TrialAbsent {
		return "：令牌没有 (not offered)"
	}
	s := ""
	for _, v := range []string{t.Answer, t.Reading, t.Error} {
		if v != "" {
			s += "，" + v
		}
	}
	if t.Judge != "" && t.Error == "" {
		s += "，核对 (checked by): " + t.Judge
	}
	return s
}

var behaviours = map[string]string{
	"double-login":     "重复登录 (C_Login twice)",
	"wrong-session":    "错误的会话句柄 (C_GetSessionInfo of no session)",
	"wrong-key":        "错误的密钥句柄 (signing with no key)",
	"logout":           "退出登录 (C_Logout)",
	"key-after-logout": "退出后用私钥 (signing after it)",
}
