package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/custody"
	"yinjian/hsm"
)

// answers is what has to be known to make an appliance: flags of init, the lines of an answers file, or what a person said.
type answers struct {
	Node            string   `toml:"node"`             // name of this node, for ever
	Campus          string   `toml:"campus"`           // 院区
	Listen          string   `toml:"listen"`           // host:port of the API
	TSAPlain        string   `toml:"tsa_plain"`        // plain timestamp listener; "" is none
	Admin           string   `toml:"admin"`            // host:port for administrators who log in, and their console; "" is none
	Module          string   `toml:"module"`           // PKCS#11 module; "" is the one beside this program
	TimeSources     []string `toml:"time_sources"`     // host:port of NTP servers, each a group of its own
	SimulatedBeidou bool     `toml:"simulated_beidou"` // for demonstrations
	PINSource       string   `toml:"pin_source"`       // "file", "unlock" or "tpm"
	Unlock          struct {
		Threshold int      `toml:"threshold"`
		Holders   []string `toml:"holders"`
	} `toml:"unlock"`
	// Administrators are the first three, as "id:name"; with them everybody logs in from the beginning. None: "" in all.
	Administrators struct {
		System   string `toml:"system"`
		Security string `toml:"security"`
		Audit    string `toml:"audit"`
	} `toml:"administrators"`
	// Restore is host:port at which a folder waits for a backup, of which it is then made; "": a new appliance is made. With it
	// nothing but settings and secrets is answered.
	Restore string `toml:"restore"`
	// Settings are keys of config.toml that the other answers do not make, or make otherwise; each but node, campus and hsm.pin_source.
	Settings map[string]any `toml:"settings"`
	// Secrets are files of the folder secrets, by their names: what the settings name by file.
	Secrets map[string]string `toml:"secrets"`
}

// defaultAnswers are those of an evaluation on one machine.
func defaultAnswers() answers {
	return answers{Node: "benbu-1", Campus: "本部", Listen: "127.0.0.1:0", PINSource: appliance.PINFromFile}
}

// readAnswers reads an answers file (TOML). Unknown keys are errors; what is left out is its default.
func readAnswers(name string) (answers, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return defaultAnswers(), err
	}
	return parseAnswers(name, b)
}

func parseAnswers(name string, b []byte) (answers, error) {
	a := defaultAnswers()
	err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&a)
	var strict *toml.StrictMissingError
	var wrong *toml.DecodeError
	switch {
	case errors.As(err, &strict):
		var errs []error
		for _, e := range strict.Errors {
			row, col := e.Position()
			errs = append(errs, fmt.Errorf("%s:%d:%d: 未知的项 %s (unknown key)", name, row, col, strings.Join(e.Key(), ".")))
		}
		return a, errors.Join(errs...)
	case errors.As(err, &wrong):
		row, col := wrong.Position()
		return a, fmt.Errorf("%s:%d:%d: %s: %w", name, row, col, strings.Join(wrong.Key(), "."), err)
	case err != nil:
		return a, fmt.Errorf("%s: %w", name, err)
	}
	return a, a.restoresAlone(name, b)
}

// locked says whether people hold the PINs.
func (a *answers) locked() bool {
	return a.PINSource == appliance.PINFromUnlock || a.PINSource == appliance.PINFromTPM
}

// time is the policy for the sources given. Two groups have to agree where there are two.
func (a *answers) time() appliance.Time {
	t := appliance.Time{
		MinSources: min(2, max(1, len(a.TimeSources))), Accuracy: appliance.Duration(time.Second),
		HoldoverMax: appliance.Duration(4 * time.Hour), Poll: appliance.Duration(16 * time.Second),
	}
	for i, address := range a.TimeSources {
		name := fmt.Sprintf("ntp%d", i+1)
		t.Sources = append(t.Sources, appliance.TimeSource{Name: name, Group: name, Address: address})
	}
	t.PolicyNote = fmt.Sprintf("min_sources=%d", t.MinSources)
	if a.SimulatedBeidou {
		t.Poll = appliance.Duration(2 * time.Second)
		t.PolicyNote += "；仅评估：时间为本机自身时间，经模拟北斗信号、gpsd、chrony 送回 (evaluation: this is the machine's own time, fed back through a simulated BeiDou signal, gpsd and chrony)"
	}
	return t
}

// A namedRole is who is to administer in a role: "id:name", or "".
type namedRole struct {
	role account.Role
	text string
}

func (a *answers) three() []namedRole {
	return []namedRole{{account.System, a.Administrators.System}, {account.Security, a.Administrators.Security}, {account.Auditor, a.Administrators.Audit}}
}

// named says whether there are administrators among the answers.
func (a *answers) named() bool {
	return slices.ContainsFunc(a.three(), func(one namedRole) bool { return one.text != "" })
}

// setOrNone takes an answer, or back that there are administrators.
func (a *answers) setOrNone(to *string, s string) error {
	if s == "-" {
		a.Administrators = answers{}.Administrators
	} else {
		*to = s
	}
	return nil
}

func administratorField(role account.Role) string { return "administrators." + string(role) }

// administratorFaults are those of the three, by answer.
func (a *answers) administratorFaults(out map[string][]error) {
	if !a.named() {
		return
	}
	seen := map[string]bool{}
	for _, one := range a.three() {
		field := administratorField(one.role)
		if one.text == "" {
			out[field] = append(out[field], errors.New("三员须一并给出：登录名:姓名 (all three: id:name)"))
			continue
		}
		n := newFirst(one.role, one.text)
		if err := n.Check(); err != nil {
			out[field] = append(out[field], fmt.Errorf("登录名:姓名 (id:name)：%w", err))
		} else if seen[n.ID] {
			out[field] = append(out[field], fmt.Errorf("登录名 %s 重复：三员须为三人 (given twice)", n.ID))
		}
		seen[n.ID] = true
	}
}

func newFirst(role account.Role, text string) account.NewAdministrator {
	id, name, _ := strings.Cut(text, ":")
	return account.NewAdministrator{ID: id, Name: name, Role: role}
}

// firstAdministrators draws the passwords of those that are named.
func (a *answers) firstAdministrators() (three []account.NewAdministrator, told []wire.FirstPassword) {
	if !a.named() {
		return nil, nil
	}
	for _, one := range a.three() {
		n := newFirst(one.role, one.text)
		var password string
		password, n.First = account.NewFirstPassword()
		three = append(three, n)
		told = append(told, wire.FirstPassword{ID: n.ID, Name: n.Name, Role: string(n.Role), Password: password})
	}
	return three, told
}

// module is the one given, or the one beside this program.
func (a *answers) module() (string, error) {
	if of, ok := a.Settings["hsm"].(map[string]any); ok {
		if m, ok := of["module"].(string); ok {
			return m, nil
		}
	}
	if a.Module != "" {
		if appliance.InPack(a.Module) {
			return a.Module, nil
		}
		return filepath.Abs(a.Module)
	}
	return defaultModule()
}

// config is the configuration that the answers make, as it will be written.
func (a *answers) config(module string) appliance.Config {
	slots := map[string]appliance.Slot{}
	for _, class := range hsm.Classes {
		s := appliance.Slot{TokenLabel: "yinjian-" + string(class), PINFile: "secrets/" + string(class) + ".pin", Sessions: 8}
		if a.locked() {
			s.PINFile = ""
		}
		slots[string(class)] = s
	}
	c := appliance.Config{
		Node: a.Node, Campus: a.Campus,
		Listen:     appliance.Listen{API: a.Listen, TSAPlain: a.TSAPlain, Admin: a.Admin},
		HSM:        appliance.HSM{Module: module, Profile: "neutral", Slots: slots, PINSource: a.PINSource, CallDeadline: appliance.Duration(5 * time.Second)},
		Evaluation: appliance.Evaluation{Softtoken: true, GNSSFeed: a.SimulatedBeidou},
		Time:       a.time(),
		Policy:     appliance.Policy{ReserveBytes: 256 << 20, TSAReservePercent: 2, SegmentEntries: 1_000_000, MaxBodyBytes: 16 << 20},
	}
	if a.named() {
		c.Admin.Local = appliance.LocalLogin
	}
	return c
}

// file is config.toml as the answers and the settings make it, for an appliance in dir, which need not be there. What is
// wrong with it is told by the code that will read it.
func (a *answers) file(module, dir string) ([]byte, *appliance.Config, error) {
	b, err := toml.Marshal(a.config(module))
	if err != nil {
		return nil, nil, err
	}
	if len(a.Settings) > 0 {
		var all map[string]any
		if err := toml.Unmarshal(b, &all); err != nil {
			return nil, nil, err
		}
		if times, ok := a.Settings["time"].(map[string]any); ok && times["policy_note"] == nil {
			delete(all["time"].(map[string]any), "policy_note") // it tells of the sources that the answers made
		}
		if machines, ok := a.Settings["hsm"].(map[string]any); ok && machines["slots"] != nil {
			delete(all["hsm"].(map[string]any), "slots") // the tokens of another machine are all others
		}
		appliance.Overlay(all, a.Settings)
		if b, err = toml.Marshal(all); err != nil {
			return nil, nil, err
		}
	}
	cfg, err := appliance.ParseConfigWith(b, dir, a.Secrets)
	return b, cfg, err
}

// secretFaults are those of the secrets, and of what the settings say of them. cfg may be nil.
func (a *answers) secretFaults(cfg *appliance.Config, dir string) (errs []error) {
	drawn := func(name string) bool { // by init, for its own cipher machine
		return cfg != nil && cfg.Evaluation.Softtoken && slices.ContainsFunc(hsm.Classes, func(c hsm.SlotClass) bool { return name == string(c)+".pin" || name == string(c)+".so-pin" })
	}
	for name, text := range a.Secrets {
		switch {
		case !appliance.SecretName(name) || drawn(name):
			errs = append(errs, fmt.Errorf("%s：不能用这个文件名：须为小写字母、数字、点、连字符、下划线，且不是设备自己写的文件 (not this name: lower-case letters, digits, dots, hyphens, underscores, and no file of the appliance's own)", name))
		case strings.TrimSpace(text) == "":
			errs = append(errs, fmt.Errorf("%s：是空的 (is empty)", name))
		}
	}
	if cfg == nil {
		return errs
	}
	for path, key := range cfg.Files() {
		name, err := filepath.Rel(filepath.Join(dir, "secrets"), path)
		if err != nil || !filepath.IsLocal(name) || drawn(name) || appliance.OwnSecret(name) {
			continue
		}
		if _, given := a.Secrets[name]; !given {
			errs = append(errs, fmt.Errorf("%s 所指的 %s 不在 [secrets] 里 (names a file that [secrets] has not)", key, name))
		}
	}
	if !cfg.Evaluation.Softtoken && a.locked() {
		for class := range cfg.HSM.Slots {
			if _, given := a.Secrets[class+".pin"]; !given {
				errs = append(errs, fmt.Errorf("缺少 %s.pin：pin_source 为 unlock 或 tpm 时由持有人的口令封存 (is missing: it is sealed by the holders' passphrases)", class))
			}
		}
		if len(cfg.HSM.Machines) > 0 {
			errs = append(errs, errors.New("pin_source 为 unlock 或 tpm 时，其他密码机请在初始化之后添加 (add other machines afterwards where PINs are unlocked)"))
		}
	}
	return errs
}

// answerOf is which answer a key of the configuration comes from.
var answerOf = []struct{ key, field string }{
	{"node", "node"}, {"campus", "campus"}, {"listen.api", "listen"}, {"listen.tsa_plain", "tsa_plain"}, {"listen.admin", "admin"},
	{"time.sources", "time_sources"}, {"time.min_sources", "time_sources"}, {"hsm.pin_source", "pin_source"}, {"hsm.module", "module"},
}

// faults is what is wrong, by the answer at fault, found by the code that will read the configuration. "" has what belongs
// to none.
func (a *answers) faults(dir string) map[string][]error {
	if a.Restore != "" {
		return a.restoreFaults()
	}
	out := map[string][]error{}
	if whole, err := filepath.Abs(dir); err == nil {
		dir = whole // as the settings name it
	}
	module, err := a.module()
	if err == nil && !appliance.InPack(module) { // whether a pack is there is seen when the machine is started
		_, err = os.Stat(module)
	}
	if err != nil {
		out["module"] = append(out["module"], err)
		module = "absent"
	}
	if a.locked() {
		if err := custody.CheckUnlock(a.Unlock.Holders, a.Unlock.Threshold); err != nil {
			out["unlock"] = append(out["unlock"], err)
		}
	} else if len(a.Unlock.Holders) > 0 || a.Unlock.Threshold != 0 {
		out["unlock"] = append(out["unlock"], errors.New("只在 pin_source 为 unlock 或 tpm 时有意义 (means nothing unless pin_source is unlock or tpm)"))
	}
	a.administratorFaults(out)
	for _, key := range []string{"node", "campus"} {
		if a.Settings[key] != nil {
			out["settings"] = append(out["settings"], fmt.Errorf("%s：请写在 [settings] 之外 (belongs outside of it)", key))
		}
	}
	if of, ok := a.Settings["hsm"].(map[string]any); ok && of["pin_source"] != nil { // who holds the PINs decides what else is asked
		out["settings"] = append(out["settings"], errors.New("hsm.pin_source：请写在 [settings] 之外的 pin_source (belongs outside of it)"))
	}
	_, cfg, err := a.file(module, dir)
	if faults := a.secretFaults(cfg, dir); len(faults) > 0 {
		out["secrets"] = faults
	}
	var list interface{ Unwrap() []error }
	all := []error{err}
	if errors.As(err, &list) {
		all = list.Unwrap()
	}
	for _, err := range all {
		if err == nil {
			continue
		}
		// Lines are told of a file that nobody has written.
		said := lines.ReplaceAllString(err.Error(), "")
		field := ""
		if len(a.Settings) > 0 && (said != err.Error() || a.sets(said)) {
			field = "settings"
		}
		for _, m := range answerOf {
			if field == "" && strings.HasPrefix(said, m.key) {
				field = m.field
			}
		}
		out[field] = append(out[field], errors.New(said))
	}
	return out
}

var lines = regexp.MustCompile(`^\d+:\d+: `)

// sets says whether what a complaint begins with, a key of config.toml, was given or asked for by the settings: the key or
// one above it, but for the outermost, which the other answers fill too.
func (a *answers) sets(complaint string) bool {
	key, _, _ := strings.Cut(complaint, ": ")
	parts := strings.FieldsFunc(key, func(r rune) bool { return r == '.' || r == '[' })
	at := a.Settings
	for i, part := range parts {
		value, ok := at[part]
		if !ok {
			return false
		}
		table, ok := value.(map[string]any)
		if !ok || i > 0 && part == "slots" {
			return true
		}
		at = table
	}
	return true
}

// check joins the faults, each with the answer that it belongs to.
func (a *answers) check(dir string) error {
	faults := a.faults(dir)
	var errs []error
	for field, list := range faults {
		for _, err := range list {
			if field != "" {
				err = fmt.Errorf("%s: %w", field, err)
			}
			errs = append(errs, err)
		}
	}
	slices.SortFunc(errs, func(x, y error) int { return strings.Compare(x.Error(), y.Error()) })
	return errors.Join(errs...)
}

// A question is one of the dialogue's.
type question struct {
	field, text string
	get         func(*answers) string
	set         func(*answers, string) error
	when        func(*answers) bool // nil: always
}

func yesNo(v bool) string {
	if v {
		return "是"
	}
	return "否"
}

func parseYesNo(s string) (bool, error) {
	switch strings.ToLower(s) {
	case "是", "y", "yes":
		return true, nil
	case "否", "n", "no":
		return false, nil
	}
	return false, errors.New("请答 是 或 否 (yes or no)")
}

// words splits a list at spaces, commas and their Chinese fellows.
func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(" ,;，；、\t", r) })
}

var questions = []question{
	{"node", "节点名，写入全部证据，以后不可改 (name of this node, for ever)", func(a *answers) string { return a.Node }, func(a *answers, s string) error { a.Node = s; return nil }, nil},
	{"campus", "院区 (campus)", func(a *answers) string { return a.Campus }, func(a *answers, s string) error { a.Campus = s; return nil }, nil},
	{"listen", "API 地址 host:port (address of the API)", func(a *answers) string { return a.Listen }, func(a *answers, s string) error { a.Listen = s; return nil }, nil},
	{"simulated_beidou", "用模拟北斗作时间源，仅供演示？是/否 (simulated BeiDou, demonstration only?)", func(a *answers) string { return yesNo(a.SimulatedBeidou) }, func(a *answers, s string) (err error) {
		a.SimulatedBeidou, err = parseYesNo(s)
		return err
	}, nil},
	{"time_sources", "NTP 源 host:port，空格隔开，建议至少两个 (NTP servers, separated by spaces)", func(a *answers) string { return strings.Join(a.TimeSources, " ") }, func(a *answers, s string) error { a.TimeSources = words(s); return nil }, nil},
	{"module", "PKCS#11 模块，空为程序旁的软件密码机模块 (PKCS#11 module; empty: the one beside this program)", func(a *answers) string { return a.Module }, func(a *answers, s string) error { a.Module = s; return nil }, nil},
	{"pin_source", "密码机口令：file 存于文件，unlock 由多人口令解锁，tpm 另可由 TPM 无人值守解锁 (PINs: file, unlock by several people, or by this machine's TPM too)", func(a *answers) string { return a.PINSource }, func(a *answers, s string) error { a.PINSource = s; return nil }, nil},
	{"unlock", "解锁持有人姓名，空格隔开，至少三人 (holders, three at least)", func(a *answers) string { return strings.Join(a.Unlock.Holders, " ") }, func(a *answers, s string) error {
		a.Unlock.Holders = words(s)
		if a.Unlock.Threshold == 0 {
			a.Unlock.Threshold = 2
		}
		return nil
	}, func(a *answers) bool { return a.locked() }},
	{"unlock", "其中几人即可解锁 (how many of them unlock)", func(a *answers) string { return strconv.Itoa(a.Unlock.Threshold) }, func(a *answers, s string) (err error) {
		if a.Unlock.Threshold, err = strconv.Atoi(s); err != nil {
			return errors.New("须为数字 (a number)")
		}
		return nil
	}, func(a *answers) bool { return a.locked() }},
	{administratorField(account.System), "系统管理员 登录名:姓名，三员设立之后人人登录；空为不设，仅供评估 (system administrator, id:name; with the three everybody logs in; empty: none, for evaluation)", func(a *answers) string { return a.Administrators.System },
		func(a *answers, s string) error { a.Administrators.System = s; return nil }, nil},
	{administratorField(account.Security), "安全管理员 登录名:姓名；- 为三员都不设 (security administrator; -: none of the three)", func(a *answers) string { return a.Administrators.Security },
		func(a *answers, s string) error { return a.setOrNone(&a.Administrators.Security, s) }, (*answers).named},
	{administratorField(account.Auditor), "审计管理员 登录名:姓名；- 为三员都不设 (audit administrator; -: none of the three)", func(a *answers) string { return a.Administrators.Audit },
		func(a *answers, s string) error { return a.setOrNone(&a.Administrators.Audit, s) }, (*answers).named},
}

// errDeclined means that the summary was not confirmed.
var errDeclined = errors.New("未确认，什么也没有写 (not confirmed; nothing was written)")

// ask holds the dialogue: each question with its default, each answer looked at at once, a summary to confirm.
func (a *answers) ask(dir string, in *bufio.Reader, out io.Writer) error {
	line := func() (string, error) {
		s, err := in.ReadString('\n')
		if err != nil && s == "" {
			return "", fmt.Errorf("对话中断，什么也没有写 (the dialogue ended early; nothing was written): %w", err)
		}
		return strings.TrimSpace(s), nil
	}
	fmt.Fprintf(out, "新建设备：%s\n直接回车取方括号里的值。(Enter takes what stands in brackets.)\n\n", dir)
	for _, q := range questions {
		if q.when != nil && !q.when(a) {
			continue
		}
		for {
			fmt.Fprintf(out, "%s [%s]: ", q.text, q.get(a))
			s, err := line()
			if err != nil {
				return err
			}
			before := *a
			if s != "" {
				err = q.set(a, s)
			}
			if err == nil {
				err = errors.Join(a.faults(dir)[q.field]...)
			}
			if err == nil {
				break
			}
			fmt.Fprintf(out, "  ✗ %v\n", err)
			*a = before
		}
	}
	fmt.Fprintln(out, "\n将新建 (to be made):")
	for _, q := range questions {
		if q.when == nil || q.when(a) {
			fmt.Fprintf(out, "  %s: %s\n", q.text, q.get(a))
		}
	}
	fmt.Fprintln(out, "仅供评估：软件密码机，非认证产品 (evaluation only: software cipher machine, not a certified product)")
	if err := a.check(dir); err != nil {
		return err
	}
	for {
		fmt.Fprint(out, "确认？是/否 (confirm?) [否]: ")
		s, err := line()
		if err != nil {
			return err
		}
		if s == "" {
			return errDeclined
		}
		switch yes, err := parseYesNo(s); {
		case err != nil:
			fmt.Fprintf(out, "  ✗ %v\n", err)
		case yes:
			return nil
		default:
			return errDeclined
		}
	}
}
