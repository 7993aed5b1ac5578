package profiles

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

var reName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// A fault collector names the key of each.
type faults []error

func (f *faults) add(key, format string, args ...any) {
	*f = append(*f, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
}

// missing adds a fault unless there is a value.
func (f *faults) missing(key string, there bool) {
	if !there {
		f.add(key, "缺少 (missing)")
	}
}

// choice adds a fault unless v is one of the values; with no values v must be empty.
func (f *faults) choice(key, v string, values []string) {
	switch {
	case len(values) == 0:
		if v != "" {
			f.add(key, "此处不能有 (must not stand here)")
		}
	case v == "":
		f.add(key, "缺少，可为 %s (missing; one of these)", strings.Join(values, "、"))
	case !slices.Contains(values, v):
		f.add(key, "%q 不可用，可为 %s (must be one of these)", v, strings.Join(values, "、"))
	}
}

// check reports every missing value and every contradiction.
func (p *Profile) check() error {
	var f faults
	if !reName.MatchString(p.Name) {
		f.add("name", "须为小写字母、数字、连字符，1–32 位 (lower-case letters, digits, hyphens)")
	}
	f.missing("sources", len(p.Sources) > 0)
	f.missing("tried", p.Tried != "")
	f.missing("keys", len(p.Keys) > 0)
	f.missing("operations", len(p.Operations) > 0)
	p.checkMatch(&f)
	p.checkMachine(&f)
	p.checkErrors(&f)
	for _, name := range slices.Sorted(maps.Keys(p.Keys)) {
		p.Keys[name].check(&f, "keys."+name, name)
	}
	p.checkOperations(&f)
	return errors.Join(f...)
}

func (p *Profile) checkMatch(f *faults) {
	v := p.Match.Version
	if v == nil {
		return
	}
	if len(v) != 2 {
		f.add("match.version", "须为首末两个版本 (want the first and the last version)")
		return
	}
	first, err1 := parseVersion(v[0])
	last, err2 := parseVersion(v[1])
	if err1 != nil || err2 != nil || first > last {
		f.add("match.version", "须为 [\"主.次\", \"主.次\"]，由小到大 (want two versions \"major.minor\", in order)")
	}
}

// parseVersion reads "2.6" so that versions compare as numbers.
func parseVersion(s string) (int, error) {
	major, minor, _ := strings.Cut(s, ".")
	a, err := strconv.ParseUint(major, 10, 8)
	if err != nil {
		return 0, err
	}
	b, err := strconv.ParseUint(minor, 10, 8)
	return int(a)<<8 | int(b), err
}

func (p *Profile) checkMachine(f *faults) {
	m := &p.Machine
	if m.MaxSessions < 0 || m.MaxSessions > 1<<16 {
		f.add("machine.max_sessions", "须为 0–65536 (0 to 65536)")
	}
	if m.ServiceTime < 0 {
		f.add("machine.service_time", "不能为负 (negative)")
	}
	if m.Login != "" {
		f.choice("machine.login", m.Login, []string{"user", "none"})
	}
	if m.Login == "none" && (m.LoginUser != 0 || m.PINMin != 0 || m.PINMax != 0 || m.PINDigits) {
		f.add("machine.login", "none 与 login_user、pin_* 矛盾 (contradicts login_user and pin_*)")
	}
	if m.PINMin < 0 || m.PINMax < 0 || m.PINMax > 0 && m.PINMin > m.PINMax {
		f.add("machine.pin_min", "大于 pin_max，或为负 (above pin_max, or negative)")
	}
	for _, v := range m.Avoid {
		f.choice("machine.avoid", v, []string{GetMechanismList, GetSessionInfo, GenerateRandom})
	}
}

func (p *Profile) checkErrors(f *faults) {
	from := map[Number]bool{}
	for _, k := range slices.Sorted(maps.Keys(p.Errors)) {
		var n Number
		switch err := n.UnmarshalText([]byte(k)); {
		case err != nil:
			f.add("errors."+k, "不是数 (not a number)")
		case n == 0:
			f.add("errors."+k, "CKR_OK 不能改译 (cannot be translated)")
		case from[n]:
			f.add("errors."+k, "重复 (given twice)")
		}
		from[n] = true
	}
	for _, k := range slices.Sorted(maps.Keys(p.Errors)) {
		if to := p.Errors[k]; to == 0 || from[to] {
			f.add("errors."+k, "译为 %#x：是 CKR_OK，或自身也被改译 (is CKR_OK, or is translated itself)", uint64(to))
		}
	}
}

func (k *Key) check(f *faults, key, name string) {
	pair := true
	switch name {
	case KeySM2, KeyRSA2048:
	case KeyHMACSM3, KeySM4, KeySM1:
		pair = false
	default:
		f.add(key, "未知的密钥种类，可为 %s (unknown kind of key)", strings.Join([]string{KeySM2, KeyRSA2048, KeyHMACSM3, KeySM4, KeySM1}, "、"))
		return
	}
	f.missing(key+".mechanism", k.Mechanism != nil)
	f.missing(key+".key_type", k.KeyType != nil)
	f.missing(key+".send_key_type", k.SendKeyType != nil)
	if name == KeySM2 {
		k.checkSM2(f, key)
	} else if k.ECParams != nil || k.SendECParams != nil || k.Point != "" || k.PointOn != "" || k.PointX != 0 || k.PointY != 0 {
		f.add(key, "ec_params、point 等只用于 sm2 (ec_params and point are for sm2 alone)")
	}
	if !pair && k.Public != nil {
		f.add(key+".public", "对称密钥没有公钥 (a secret key has no public half)")
	}
	given := map[Number]bool{}
	for half, attributes := range [][]Attribute{k.Public, k.Private} {
		seen := map[Number]bool{}
		for i, a := range attributes {
			at := fmt.Sprintf("%s.%s[%d]", key, [...]string{"public", "private"}[half], i)
			f.missing(at+".type", a.Type != nil)
			values := 0
			for _, there := range []bool{a.Bool != nil, a.Number != nil, a.Bytes != nil} {
				if there {
					values++
				}
			}
			if values != 1 {
				f.add(at, "须有 bool、number、bytes 之一 (want one of bool, number, bytes)")
			}
			if a.Type != nil {
				if seen[*a.Type] {
					f.add(at+".type", "%#x 重复 (given twice)", uint64(*a.Type))
				}
				seen[*a.Type], given[*a.Type] = true, true
			}
		}
	}
	for i, typ := range k.Omit {
		if given[typ] {
			f.add(fmt.Sprintf("%s.omit[%d]", key, i), "%#x 又在 public 或 private 中给出 (and yet given in public or private)", uint64(typ))
		}
		if typ == CKAKeyType && k.SendKeyType != nil && *k.SendKeyType || typ == CKAECParams && k.SendECParams != nil && *k.SendECParams {
			f.add(fmt.Sprintf("%s.omit[%d]", key, i), "%#x 与 send_key_type、send_ec_params 矛盾 (contradicts them)", uint64(typ))
		}
	}
}

func (k *Key) checkSM2(f *faults, key string) {
	f.missing(key+".ec_params", len(k.ECParams) > 0)
	f.missing(key+".send_ec_params", k.SendECParams != nil)
	f.choice(key+".point", k.Point, []string{PointOctetString, PointUncompressed, PointRaw, PointXY, PointAuto})
	f.choice(key+".point_on", k.PointOn, []string{"public", "both"})
	if xy := k.Point == PointXY; xy != (k.PointX != 0) || xy != (k.PointY != 0) || xy && k.PointX == k.PointY {
		f.add(key+".point", "xy 须有不同的 point_x、point_y，其他形式不能有 (xy needs two attributes, the others none)")
	}
}

func (p *Profile) checkOperations(f *faults) {
	for _, name := range slices.Sorted(maps.Keys(p.Operations)) {
		op, key := p.Operations[name], "operations."+name
		r, known := rules[name]
		if !known {
			f.add(key, "未知的运算，可为 %s (unknown operation; one of these)", strings.Join(slices.Sorted(maps.Keys(rules)), "、"))
			continue
		}
		f.missing(key+".mechanism", op.Mechanism != nil)
		f.choice(key+".input", op.Input, r.input)
		f.choice(key+".parameter", op.Parameter, r.parameter)
		f.choice(key+".output", op.Output, r.output)
		f.choice(key+".padding", op.Padding, r.padding)
		if r.key != "" && p.Keys[r.key] == nil {
			f.add(key, "没有 keys.%s (needs keys.%s)", r.key, r.key)
		}
	}
	e, m := p.Operations[SM2SignE], p.Operations[SM2SignMessage]
	if m != nil && m.Input == InputZM && m.Parameter == ParameterID {
		f.add("operations."+SM2SignMessage+".parameter", "id 与 input = \"zm\" 矛盾：ZA 已含标识 (ZA holds the ID already)")
	}
	if e != nil && m != nil && e.Mechanism != nil && m.Mechanism != nil && *e.Mechanism == *m.Mechanism && m.Parameter == ParameterNone {
		f.add("operations."+SM2SignMessage+".mechanism", "与 %s 同为 %#x，输入却不同 (the number of %s too, whose input is another)",
			SM2SignE, uint64(*m.Mechanism), SM2SignE)
	}
}
