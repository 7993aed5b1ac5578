package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance"
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
	PINSource       string   `toml:"pin_source"`       // "file" or "unlock"
	Unlock          struct {
		Threshold int      `toml:"threshold"`
		Holders   []string `toml:"holders"`
	} `toml:"unlock"`
}

// defaultAnswers are those of an evaluation on one machine.
func defaultAnswers() answers {
	return answers{Node: "benbu-1", Campus: "本部", Listen: "127.0.0.1:0", PINSource: appliance.PINFromFile}
}

// readAnswers reads an answers file (TOML). Unknown keys are errors; what is left out is its default.
func readAnswers(name string) (answers, error) {
	a := defaultAnswers()
	b, err := os.ReadFile(name)
	if err != nil {
		return a, err
	}
	err = toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&a)
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
	return a, nil
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

// module is the one given, or the one beside this program.
func (a *answers) module() (string, error) {
	if a.Module != "" {
		return filepath.Abs(a.Module)
	}
	return defaultModule()
}

// config is the configuration that the answers make, as it will be written.
func (a *answers) config(module string) appliance.Config {
	slots := map[string]appliance.Slot{}
	for _, class := range hsm.Classes {
		s := appliance.Slot{TokenLabel: "yinjian-" + string(class), PINFile: "secrets/" + string(class) + ".pin", Sessions: 8}
		if a.PINSource == appliance.PINFromUnlock {
			s.PINFile = ""
		}
		slots[string(class)] = s
	}
	return appliance.Config{
		Node: a.Node, Campus: a.Campus,
		Listen:     appliance.Listen{API: a.Listen, TSAPlain: a.TSAPlain, Admin: a.Admin},
		HSM:        appliance.HSM{Module: module, Profile: "neutral", Slots: slots, PINSource: a.PINSource, CallDeadline: appliance.Duration(5 * time.Second)},
		Evaluation: appliance.Evaluation{Softtoken: true, GNSSFeed: a.SimulatedBeidou},
		Time:       a.time(),
		Policy:     appliance.Policy{ReserveBytes: 256 << 20, TSAReservePercent: 2, SegmentEntries: 1_000_000, MaxBodyBytes: 16 << 20},
	}
}

// answerOf is which answer a key of the configuration comes from.
var answerOf = []struct{ key, field string }{
	{"node", "node"}, {"campus", "campus"}, {"listen.api", "listen"}, {"listen.tsa_plain", "tsa_plain"}, {"listen.admin", "admin"},
	{"time.sources", "time_sources"}, {"time.min_sources", "time_sources"}, {"hsm.pin_source", "pin_source"}, {"hsm.module", "module"},
}

// faults is what is wrong, by the answer at fault, found by the code that will read the configuration. "" has what belongs
// to none.
func (a *answers) faults(dir string) map[string][]error {
	out := map[string][]error{}
	module, err := a.module()
	if err == nil {
		_, err = os.Stat(module)
	}
	if err != nil {
		out["module"] = append(out["module"], err)
		module = "absent"
	}
	if a.PINSource == appliance.PINFromUnlock {
		if err := custody.CheckUnlock(a.Unlock.Holders, a.Unlock.Threshold); err != nil {
			out["unlock"] = append(out["unlock"], err)
		}
	} else if len(a.Unlock.Holders) > 0 || a.Unlock.Threshold != 0 {
		out["unlock"] = append(out["unlock"], errors.New("只在 pin_source = \"unlock\" 时有意义 (means nothing unless pin_source is unlock)"))
	}
	b, err := toml.Marshal(a.config(module))
	if err == nil {
		_, err = appliance.ParseConfig(b, dir)
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
		field := ""
		for _, m := range answerOf {
			if strings.HasPrefix(err.Error(), m.key) {
				field = m.field
				break
			}
		}
		out[field] = append(out[field], err)
	}
	return out
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
	{"pin_source", "密码机口令：file 存于文件，unlock 由多人口令解锁 (PINs: file, or unlock by several people)", func(a *answers) string { return a.PINSource }, func(a *answers, s string) error { a.PINSource = s; return nil }, nil},
	{"unlock", "解锁持有人姓名，空格隔开，至少三人 (holders, three at least)", func(a *answers) string { return strings.Join(a.Unlock.Holders, " ") }, func(a *answers, s string) error {
		a.Unlock.Holders = words(s)
		if a.Unlock.Threshold == 0 {
			a.Unlock.Threshold = 2
		}
		return nil
	}, func(a *answers) bool { return a.PINSource == appliance.PINFromUnlock }},
	{"unlock", "其中几人即可解锁 (how many of them unlock)", func(a *answers) string { return strconv.Itoa(a.Unlock.Threshold) }, func(a *answers, s string) (err error) {
		if a.Unlock.Threshold, err = strconv.Atoi(s); err != nil {
			return errors.New("须为数字 (a number)")
		}
		return nil
	}, func(a *answers) bool { return a.PINSource == appliance.PINFromUnlock }},
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
