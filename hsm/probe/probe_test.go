package probe_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pkcs11/profiles"
	"yinjian/hsm/probe"
	"yinjian/hsm/worker"
)

// TestMain is three programs: the tests, the software cipher machine, and the child that drives a module.
func TestMain(m *testing.M) {
	hsmtest.Daemon()
	if len(os.Args) > 1 && os.Args[1] == "probed" {
		conn, err := worker.Inherited()
		if err == nil {
			err = probe.Serve(conn)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func config(t testing.TB, c pkcs11.ProbeConfig) probe.Config {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if c.MaxSessions == 0 {
		c.MaxSessions = 4
	}
	c.Measure = 10 * time.Millisecond
	return probe.Config{Command: []string{self, "probed"}, Probe: c, Deadline: 60 * time.Second}
}

func run(t testing.TB, c probe.Config) *pkcs11.ProbeReport {
	t.Helper()
	r, err := probe.Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if testing.Verbose() {
		var text bytes.Buffer
		probe.Print(&text, r)
		t.Log(text.String())
	}
	return r
}

// of is a probe of a software cipher machine with its PIN.
func of(m *hsmtest.Machine, profiles ...string) pkcs11.ProbeConfig {
	return pkcs11.ProbeConfig{Module: m.Module, ModuleArgs: m.Config.ModuleArgs, TokenLabel: "staff", PIN: []byte(hsmtest.UserPIN), Profiles: profiles}
}

// empty fails the test when a throw-away key is on the token, as pkcs11-tool sees it.
func empty(t testing.TB, m *hsmtest.Machine) {
	t.Helper()
	out := tool(t, nil, "--module", m.Module, "--login", "--pin", hsmtest.UserPIN, "-O")
	if strings.Contains(out, "Object;") {
		t.Errorf("keys were left on the token:\n%s", out)
	}
}

func tool(t testing.TB, env []string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("pkcs11-tool")
	if err != nil {
		t.Skip("pkcs11-tool is not installed (Debian opensc)")
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(append(os.Environ(), env...), "YINJIAN_P11_SOCKET="+filepath.Join(filepath.Dir(args[1]), "state", "p11.sock")) // for ours
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("pkcs11-tool %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestNames: the probe names each machine that the software cipher machine can stand for by itself, what it found is
// what the profile says, and pkcs11-tool lists the same mechanisms.
func TestNames(t *testing.T) {
	t.Parallel()
	m := hsmtest.NewMachine(t)
	for _, name := range profiles.Names() {
		if name == "softhsm2" { // its match asks for the real one
			continue
		}
		t.Run(name, func(t *testing.T) {
			m.As(t, name)
			r := run(t, config(t, of(m)))
			if r.Verdict != pkcs11.VerdictFits || r.Profile != name || len(r.AlsoFit) != 0 || len(r.Findings) != 0 || r.Login != "accepted" {
				t.Fatalf("it is %s: %s, also %v; login %s; findings %q", r.Verdict, r.Profile, r.AlsoFit, r.Login, r.Findings)
			}
			found(t, r, m.Config.Profile)
			if (r.Wrapping == profiles.SM4GCMWrap) != (name == "neutral") {
				t.Errorf("wrapping: %q", r.Wrapping)
			}
			if name == "tass" {
				documented(t, r)
			}
		})
	}
	empty(t, m)
}

var reNumber = regexp.MustCompile(` *[0-9]+`)

// documented holds the example in docs/hsm.md against what is printed, but for numbers, names of files and what is left out
// there.
func documented(t *testing.T, r *pkcs11.ProbeReport) {
	t.Helper()
	page, err := os.ReadFile("../../docs/hsm.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(page), "\n```probe\n")
	block, _, found := strings.Cut(block, "\n```")
	if !found {
		t.Fatal("docs/hsm.md has no example")
	}
	var out bytes.Buffer
	probe.Print(&out, r)
	plain := func(line string) string {
		for _, volatile := range []string{"模块 module: ", "会话 sessions: ", "速度 speed "} {
			if strings.HasPrefix(line, volatile) {
				return volatile
			}
		}
		line, _, _ = strings.Cut(line, "，序列号")
		return reNumber.ReplaceAllString(line, "#")
	}
	var printed []string
	for line := range strings.SplitSeq(out.String(), "\n") {
		printed = append(printed, plain(line))
	}
	for line := range strings.SplitSeq(block, "\n") {
		if line = plain(line); line == "…" || line == "" || strings.Contains(line, "个会话 sessions:") {
			continue
		}
		i := slices.Index(printed, line)
		if i < 0 {
			t.Errorf("docs/hsm.md shows %q, which is not printed, or earlier", line)
			continue
		}
		printed = printed[i:]
	}
}

// found holds a report against the profile that the machine answers to.
func found(t *testing.T, r *pkcs11.ProbeReport, p pkcs11.Profile, env ...string) {
	t.Helper()
	file, err := profiles.Load(p.Name)
	if err != nil {
		t.Fatal(err)
	}
	serves := map[string]bool{}
	for _, trial := range r.Trials {
		op := file.Operations[trial.Operation]
		want := map[string]string{profiles.InputE: "e", profiles.InputM: "m", profiles.InputZM: "zm"}[op.Input]
		if !strings.HasPrefix(trial.Operation, "sm2-sign") {
			want = ""
		}
		serves[trial.Operation] = trial.Result == pkcs11.TrialWorks
		switch {
		case trial.Result == pkcs11.TrialAbsent:
			continue // the software cipher machine does not do that
		case trial.Result != pkcs11.TrialWorks, trial.Judge == "", trial.Judge == "form", trial.Judge == "round trip", trial.Reading != want:
			t.Errorf("%+v, want it to work, read as %q", trial, want)
		case want != "" && op.Output != profiles.OutputAuto && trial.Answer != op.Output:
			t.Errorf("%+v, want the answer %s", trial, op.Output)
		}
	}
	for _, name := range []string{profiles.SM2SignE, profiles.SM2SignMessage, profiles.RSAPKCS1, profiles.RSAPSS, profiles.HMACSM3, profiles.SM3} {
		if file.Operations[name] != nil && !serves[name] {
			t.Errorf("%s was not tried", name)
		}
	}
	if k := file.Keys[profiles.KeySM2]; k != nil && (r.Point != k.Point && k.Point != profiles.PointAuto || r.PointOn != k.PointOn) {
		t.Errorf("the point is %s on %s, want %s on %s", r.Point, r.PointOn, k.Point, k.PointOn)
	}
	if r.SM1 != "unavailable" || r.KeysAre != "session objects" || r.LeftBehind {
		t.Errorf("SM1 %s, keys %s, left behind %v", r.SM1, r.KeysAre, r.LeftBehind)
	}
	for _, c := range r.SlotClasses {
		sm2, rsa := serves[profiles.SM2SignE], serves[profiles.RSAPKCS1]
		want := sm2 && rsa
		switch c.Class {
		case hsm.Log:
			want = sm2 && serves[profiles.HMACSM3]
		case hsm.TLS:
			want = rsa && serves[profiles.RSAPSS]
		}
		if c.Serves != want || want != (len(c.Lacks) == 0) {
			t.Errorf("slot class %s: %+v, want %v", c.Class, c, want)
		}
	}
	if len(r.SlotClasses) != len(hsm.Classes) {
		t.Errorf("slot classes: %+v", r.SlotClasses)
	}
	if s := r.Sessions; s == nil || s.Opened != 4 || s.Limit {
		t.Errorf("sessions: %+v", s)
	}
	for _, s := range r.Speed {
		if s.Error != "" || s.Knee < 1 || s.Steps[0].PerSecond <= 0 {
			t.Errorf("speed: %+v", s)
		}
	}
	for _, b := range r.Behaviour {
		if !b.Fine {
			t.Errorf("behaviour: %+v", b)
		}
	}
	if len(r.Speed) == 0 || len(r.Behaviour) != 5 {
		t.Errorf("speed %+v, behaviour %+v", r.Speed, r.Behaviour)
	}
	listed(t, r, env)
}

// reListed is a line of pkcs11-tool -M: "  RSA-PKCS, keySize={2048,3072}, sign", "  mechtype-0xFFFFF003, …".
var reListed = regexp.MustCompile(`(?m)^  ([\w-]+)(?:, keySize=\{(\d+),(\d+)\})?`)

// listed compares the mechanisms with what pkcs11-tool lists, by their numbers and key sizes.
func listed(t *testing.T, r *pkcs11.ProbeReport, env []string) {
	t.Helper()
	var want, got []string
	numbers := map[string]string{"ECDSA-KEY-PAIR-GEN": "0x1040"} // the name in v2.20, that pkcs11-tool has
	for _, m := range r.Mechanisms {
		numbers[strings.ReplaceAll(strings.TrimPrefix(m.Name, "CKM_"), "_", "-")] = m.Number
		got = append(got, fmt.Sprintf("%s %d %d", m.Number, m.Min, m.Max))
	}
	for _, m := range reListed.FindAllStringSubmatch(tool(t, env, "--module", r.Module, "--slot", fmt.Sprint(*r.Slot), "-M"), -1) {
		number, known := numbers[m[1]]
		if hex, ok := strings.CutPrefix(m[1], "mechtype-"); ok { // one that it has no name for
			number, known = strings.ToLower(hex), true
		}
		if !known {
			number = m[1]
		}
		low, _ := strconv.Atoi(m[2])
		high, _ := strconv.Atoi(m[3])
		want = append(want, fmt.Sprintf("%s %d %d", number, low, high))
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) || len(want) < 3 {
		t.Errorf("mechanisms:\n%q\npkcs11-tool -M:\n%q", got, want)
	}
}

// softHSM is a probe of a new SoftHSM2 token with its PIN.
func softHSM(t testing.TB, label string) (probe.Config, hsmtest.SoftHSM) {
	t.Helper()
	s := hsmtest.NewSoftHSM2(t, label)
	c := config(t, pkcs11.ProbeConfig{Module: hsmtest.SoftHSMModule, TokenLabel: label, PIN: []byte(s.PIN)})
	c.Env = s.Env
	return c, s
}

// TestSoftHSM2: the real thing, named by itself among all that is shipped.
func TestSoftHSM2(t *testing.T) {
	t.Parallel()
	c, s := softHSM(t, "probed")
	r := run(t, c)
	if r.Verdict != pkcs11.VerdictFits || r.Profile != "softhsm2" || len(r.Findings) != 0 {
		t.Errorf("it is %s: %s; findings %q", r.Verdict, r.Profile, r.Findings)
	}
	if len(r.Slots) != 2 || r.Slots[0].Token == nil || r.Slots[0].Token.Label != "probed" || r.Slots[1].Token.Initialized {
		t.Errorf("slots: %+v", r.Slots)
	}
	found(t, r, hsmtest.Profile(t, "softhsm2"), s.Env...)

	// By its slot; without a PIN; a label that no token has.
	id := *r.Slot
	c.Probe.Slot, c.Probe.TokenLabel, c.Probe.PIN = &id, "", nil
	if r := run(t, c); r.Slot == nil || *r.Slot != id || len(r.Mechanisms) < 50 || r.Verdict != pkcs11.VerdictNotChecked ||
		r.Login != "not presented" || len(r.NotChecked) != 1 || r.Sessions != nil {
		t.Errorf("without a PIN: %+v", r)
	}
	c.Probe.Slot, c.Probe.TokenLabel = nil, "nobody"
	if r := run(t, c); r.Slot != nil || len(r.Slots) != 2 || r.Mechanisms != nil || len(r.NotChecked) != 1 {
		t.Errorf("a label that no token has: %+v", r)
	}
	c.Probe.Module = "/nowhere.so"
	var nothing *probe.Error
	if _, err := probe.Run(t.Context(), c); !errors.As(err, &nothing) || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no module: %v", err)
	}
}

// TestPrintIsPlain: what a module says of itself does not steer a terminal.
func TestPrintIsPlain(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	probe.Print(&out, &pkcs11.ProbeReport{Module: "m", Library: &pkcs11.ProbeLibrary{Description: "\x1b[2Jgone\r", Manufacturer: "a\n\u202everdict: b"},
		Mechanisms: []pkcs11.ProbeMechanism{{Number: "0x1", Name: "\u009b1m"}}})
	if s := out.String(); !strings.Contains(s, "?[2Jgone?") || !strings.Contains(s, "?1m") || !strings.Contains(s, "a??verdict") || strings.ContainsAny(s, "\x1b\r\u009b\u202e") {
		t.Errorf("printed %q", s)
	}
}

// TestOpenCryptoki: the software token of openCryptoki, named by itself.
func TestOpenCryptoki(t *testing.T) {
	t.Parallel()
	label, pin, inside := hsmtest.OpenCryptoki(t)
	if !inside {
		return
	}
	r := run(t, config(t, pkcs11.ProbeConfig{Module: hsmtest.OpenCryptokiModule, TokenLabel: label, PIN: []byte(pin)}))
	if r.Verdict != pkcs11.VerdictFits || r.Profile != "opencryptoki" || len(r.AlsoFit) != 0 || len(r.Findings) != 0 {
		t.Errorf("it is %s: %s, also %v; findings %q", r.Verdict, r.Profile, r.AlsoFit, r.Findings)
	}
	found(t, r, hsmtest.Profile(t, "opencryptoki"))
}

// unruly builds testdata/unruly.c before a module, and answers what counts the calls of C_Login.
func unruly(t *testing.T, real string, defines ...string) (module string, logins func() int) {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler (cc)")
	}
	dir := t.TempDir()
	module, log := filepath.Join(dir, "unruly.so"), filepath.Join(dir, "logins")
	args := []string{"-shared", "-fPIC", "-o", module, "-DREAL=\"" + real + "\"", "-DLOG=\"" + log + "\""}
	if out, err := exec.Command(cc, append(append(args, defines...), "testdata/unruly.c", "-ldl")...).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, out)
	}
	return module, func() int {
		b, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return len(b)
	}
}

// TestUnruly: a module that crashes, aborts or does not return is a finding that names the function; what was known
// stands, and the PIN was presented once.
func TestUnruly(t *testing.T) {
	t.Parallel()
	base, _ := softHSM(t, "unruly")
	for _, c := range []struct {
		define   string
		function string
		signal   string // "": it hangs
		logins   int
	}{
		{"-DCRASH=0", "C_Initialize", "SIGSEGV", 0},
		{"-DCRASH=7", "C_GetMechanismList", "SIGSEGV", 0},
		{"-DCRASH=43", "C_Sign", "SIGSEGV", 1},
		{"-DABORT=42", "C_SignInit", "SIGABRT", 1},
		{"-DCRASH=19", "C_Logout", "SIGSEGV", 2},
		{"-DHANG=1", "C_Finalize", "", 2},
		{"-DHANG=4", "C_GetSlotList", "", 0},
		{"-DHANG=43", "C_Sign", "", 1},
	} {
		t.Run(c.define, func(t *testing.T) {
			t.Parallel()
			cfg := base
			var logins func() int
			cfg.Probe.Module, logins = unruly(t, hsmtest.SoftHSMModule, c.define)
			switch {
			case c.signal != "":
			case c.logins == 0:
				cfg.Deadline = 10 * time.Second // in which the probe on a busy machine comes to it
			default:
				cfg.Deadline = 30 * time.Second // SoftHSM2 makes an RSA key in it
			}
			r := run(t, cfg)
			end := r.Crashed
			if c.signal == "" {
				end = r.Hung
			}
			if end == nil || end.Function != c.function || end.Signal != c.signal || (r.Crashed == nil) == (r.Hung == nil) {
				t.Fatalf("crashed %+v, hung %+v", r.Crashed, r.Hung)
			}
			if logins() != c.logins {
				t.Errorf("C_Login was called %d times, want %d", logins(), c.logins)
			}
			if len(r.NotChecked) == 0 || (c.logins > 0) != (len(r.Mechanisms) > 0) {
				t.Errorf("not checked %q, %d mechanisms", r.NotChecked, len(r.Mechanisms))
			}
			if c.logins == 2 && r.Profile != "softhsm2" {
				t.Errorf("the profile is %q although it was found before", r.Profile)
			}
		})
	}
}

// TestKeysGo: on a token that wants no session objects the throw-away keys are destroyed; what a crash leaves there is
// said, and destroyed by the next probe.
func TestKeysGo(t *testing.T) {
	t.Parallel()
	c, s := softHSM(t, "keys go")
	var logins func() int
	c.Probe.Module, logins = unruly(t, hsmtest.SoftHSMModule, "-DNO_SESSION_KEYS", "-DTWICE")
	r := run(t, c)
	if r.Profile != "softhsm2" || r.KeysAre != "token objects" || r.LeftBehind || logins() != 2 {
		t.Errorf("%s, keys are %s, left behind %v, %d logins", r.Profile, r.KeysAre, r.LeftBehind, logins())
	}
	if i := slices.IndexFunc(r.Behaviour, func(b pkcs11.ProbeBehaviour) bool { return b.What == "double-login" }); i < 0 || r.Behaviour[i].Fine {
		t.Errorf("a second C_Login that is answered CKR_OK passes: %+v", r.Behaviour)
	}
	objects := func() string {
		return tool(t, s.Env, "--module", hsmtest.SoftHSMModule, "--token-label", s.Label, "--login", "--pin", s.PIN, "-O")
	}
	if out := objects(); strings.Contains(out, "Object;") {
		t.Errorf("left on the token:\n%s", out)
	}
	c.Probe.Module, _ = unruly(t, hsmtest.SoftHSMModule, "-DNO_SESSION_KEYS", "-DCRASH=43")
	if r := run(t, c); r.Crashed == nil || !r.LeftBehind || !strings.Contains(objects(), "Private Key Object;") {
		t.Errorf("crashed %+v, left behind %v", r.Crashed, r.LeftBehind)
	}
	c.Probe.Module = hsmtest.SoftHSMModule
	if r := run(t, c); len(r.Findings) != 2 || !strings.Contains(r.Findings[0], "destroyed): CKR_OK") || r.LeftBehind {
		t.Errorf("the next probe: %q, left behind %v", r.Findings, r.LeftBehind)
	}
	if out := objects(); strings.Contains(out, "Object;") {
		t.Errorf("left on the token:\n%s", out)
	}
}

// TestOthersKeysStay: a module that finds every object, whatever is looked for, does not have keys that are no probe's
// destroyed.
func TestOthersKeysStay(t *testing.T) {
	t.Parallel()
	c, s := softHSM(t, "others stay")
	tool(t, s.Env, "--module", hsmtest.SoftHSMModule, "--token-label", s.Label, "--login", "--pin", s.PIN, "--keypairgen", "--key-type", "rsa:2048", "--label", "theirs")
	c.Probe.Module, _ = unruly(t, hsmtest.SoftHSMModule, "-DFINDS_ALL")
	r := run(t, c)
	if !slices.ContainsFunc(r.Findings, func(f string) bool { return strings.Contains(f, "left alone") }) {
		t.Errorf("findings %q", r.Findings)
	}
	out := tool(t, s.Env, "--module", hsmtest.SoftHSMModule, "--token-label", s.Label, "--login", "--pin", s.PIN, "-O")
	if !strings.Contains(out, "Private Key Object;") || !strings.Contains(out, "Public Key Object;") {
		t.Errorf("on the token:\n%s", out)
	}
}

// profile writes the neutral profile with changes to a file.
func profile(t *testing.T, name string, changes ...string) string {
	t.Helper()
	text, err := os.ReadFile("../pkcs11/profiles/neutral.toml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), name+".toml")
	if err := os.WriteFile(file, []byte(strings.NewReplacer(append(changes, `name = "neutral"`, `name = "`+name+`"`)...).Replace(string(text))), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestOneMachine asks the software cipher machine in its own numbers, by profiles that fit it more or less.
func TestOneMachine(t *testing.T) {
	t.Parallel()
	m := hsmtest.NewMachine(t)
	trialOf := func(r *pkcs11.ProbeReport, operation string) (found pkcs11.ProbeTrial) {
		for _, trial := range r.Trials {
			if trial.Operation == operation {
				found = trial
			}
		}
		return found
	}

	t.Run("ambiguous", func(t *testing.T) {
		r := run(t, config(t, of(m, profile(t, "a", "[operations.sm3]", "[operations.sm4-cbc-pad]\nmechanism = 0xFFFFF00A\nparameter = \"iv\"\npadding = \"token\"\n\n[operations.sm3]"),
			profile(t, "b", "[operations.sm3]", "[operations.sm4-gcm]\nmechanism = 0xFFFFF00A\nparameter = \"gcm\"\n\n[operations.sm3]"))))
		if r.Verdict != pkcs11.VerdictAmbiguous || r.Profile != "" || len(r.Findings) != 1 || !strings.Contains(r.Findings[0], "0xfffff00a") ||
			r.Speed != nil || r.SlotClasses != nil {
			t.Errorf("%s %q %q", r.Verdict, r.Profile, r.Findings)
		}
	})
	t.Run("same meaning", func(t *testing.T) {
		r := run(t, config(t, of(m, profile(t, "a"), profile(t, "b"))))
		if r.Verdict != pkcs11.VerdictFits || filepath.Base(r.Profile) != "a.toml" || len(r.AlsoFit) != 1 {
			t.Errorf("%s %q %q", r.Verdict, r.Profile, r.AlsoFit)
		}
	})
	t.Run("the token hashes", func(t *testing.T) {
		// The number of the mechanism that hashes, in the place of the one that does not.
		r := run(t, config(t, of(m, profile(t, "m", "0x1041", "0xFFFFF003", "0xFFFFF003", "0xFFFFF002"))))
		e, whole := trialOf(r, profiles.SM2SignE), trialOf(r, profiles.SM2SignMessage)
		if r.Verdict != pkcs11.VerdictNone || e.Result != pkcs11.TrialContradicts || e.Reading != "m" || whole.Result == pkcs11.TrialWorks || r.Profile != "" {
			t.Errorf("%s: %+v, %+v", r.Verdict, e, whole)
		}
	})
	t.Run("encodings", func(t *testing.T) {
		r := run(t, config(t, of(m, profile(t, "der", "mechanism = 0x1041 # CKM_ECDSA\ninput = \"e\"\nparameter = \"none\"\noutput = \"raw\"",
			"mechanism = 0x1041\ninput = \"e\"\nparameter = \"none\"\noutput = \"der\""))))
		if e := trialOf(r, profiles.SM2SignE); r.Verdict != pkcs11.VerdictNone || e.Answer != "raw" || e.Result != pkcs11.TrialContradicts {
			t.Errorf("%s: %+v", r.Verdict, e)
		}
		r = run(t, config(t, of(m, profile(t, "point", `point = "octet-string"`, `point = "raw"`))))
		if e := trialOf(r, profiles.SM2SignE); r.Verdict != pkcs11.VerdictNone || !strings.Contains(e.Error, "67 字节") {
			t.Errorf("%s: %+v", r.Verdict, e)
		}
		r = run(t, config(t, of(m, profile(t, "type", "key_type = 0x3", "key_type = 0x80000003"))))
		if r.Verdict != pkcs11.VerdictNone || !slices.ContainsFunc(r.Profiles[0].Why, func(w string) bool { return strings.Contains(w, "keys.sm2.key_type") }) {
			t.Errorf("%s: %+v", r.Verdict, r.Profiles)
		}
	})
	t.Run("SM1", func(t *testing.T) {
		// That SM4 stands in for it here shows only that the profile's numbers are what is called.
		sm1 := "\n[keys.sm1]\nmechanism = 0xFFFFF006\nkey_type = 0xFFFFF002\nsend_key_type = false\n\n[operations.sm1-ecb]\nmechanism = 0xFFFFF007\nparameter = \"none\"\npadding = \"host\"\n"
		if r := run(t, config(t, of(m, profile(t, "sm1", "\n[keys.rsa-2048]", sm1+"\n[keys.rsa-2048]")))); r.SM1 != "callable" {
			t.Errorf("SM1 is %s: %s", r.SM1, r.SM1Why)
		}
	})
	t.Run("PIN forms", func(t *testing.T) {
		module, logins := unruly(t, m.Module)
		// Two profiles may fit, and one of them excludes the PIN: it may be the right one.
		c := of(m, profile(t, "any"), profile(t, "digits", "[machine]", "[machine]\npin_digits = true"))
		c.Module = module
		r := run(t, config(t, c))
		if r.Login != "not presented" || logins() != 0 || r.Verdict != pkcs11.VerdictNotChecked || !strings.Contains(r.NotChecked[0], "machine.pin_digits") {
			t.Errorf("%s, %d logins, %s: %q", r.Login, logins(), r.Verdict, r.NotChecked)
		}
		c.Profiles = []string{"tass"}
		if r := run(t, config(t, c)); r.Login != "not presented" || logins() != 0 || r.Verdict != pkcs11.VerdictNone {
			t.Errorf("a profile that does not fit: %s, %d logins, %s", r.Login, logins(), r.Verdict)
		}
	})
	t.Run("few sessions", func(t *testing.T) {
		// Nor does the machine have functions that the profile says are to be avoided, and it takes another type of user.
		file := profile(t, "few", "[machine]", "[machine]\nmax_sessions = 3\nservice_time = \"2ms\"\nlogin_user = 0x80000007\navoid = [\"C_GetMechanismList\", \"C_GetSessionInfo\"]")
		m.As(t, file)
		c := config(t, of(m, file))
		c.Probe.MaxSessions = 100
		r := run(t, c)
		if r.Verdict != pkcs11.VerdictFits || len(r.Findings) != 0 || r.Mechanisms != nil || len(r.NotChecked) != 1 || len(r.Behaviour) != 4 {
			t.Errorf("%s, findings %q, not checked %q, behaviour %+v", r.Verdict, r.Findings, r.NotChecked, r.Behaviour)
		}
		if s := r.Sessions; s == nil || s.Opened != 3 || !s.Limit || s.Error != "CKR_SESSION_COUNT" {
			t.Errorf("sessions: %+v", s)
		}
		// No clock is needed to know that one session cannot make more.
		if len(r.Speed) == 0 || r.Speed[0].Steps[0].PerSecond > 500 || len(r.Speed[0].Steps) != 2 {
			t.Errorf("speed at 2 ms a signature: %+v", r.Speed)
		}
	})
	t.Run("wrong PIN", func(t *testing.T) {
		m.As(t, "neutral")
		module, logins := unruly(t, m.Module)
		c := of(m, "neutral")
		c.Module, c.PIN = module, []byte("not-the-pin")
		for tries := 1; ; tries++ {
			r := run(t, config(t, c))
			if r.Login == "not presented" {
				// Before the last try, not after it.
				if tries < 3 || logins() != tries-1 || !r.Slots[0].Token.PINFinalTry || r.Slots[0].Token.PINLocked {
					t.Errorf("after %d tries: %d logins, %+v", tries, logins(), r.Slots[0].Token)
				}
				break
			}
			if r.Login != "CKR_PIN_INCORRECT" || logins() != tries || tries > 20 || len(r.NotChecked) != 1 {
				t.Fatalf("try %d: %s, %d logins, %q", tries, r.Login, logins(), r.NotChecked)
			}
		}
	})
	empty(t, m)
}
