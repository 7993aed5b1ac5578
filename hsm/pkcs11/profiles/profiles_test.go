package profiles_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"yinjian/hsm/pkcs11/profiles"
)

var update = flag.Bool("update", false, "write the golden table anew")

// TestShipped decodes every shipped file and compares what it says with a table that was read against its sources.
func TestShipped(t *testing.T) {
	var b strings.Builder
	for _, name := range profiles.Names() {
		p, err := profiles.Load(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		fmt.Fprintf(&b, "%s (tried: %s)\n", name, p.Tried)
		if p.Match.Library+p.Match.Manufacturer != "" {
			fmt.Fprintf(&b, "  match library %q manufacturer %q\n", p.Match.Library, p.Match.Manufacturer)
		}
		if p.Machine.UseCounter != 0 {
			fmt.Fprintf(&b, "  use_counter %#x\n", uint64(p.Machine.UseCounter))
		}
		for _, k := range slices.Sorted(maps.Keys(p.Keys)) {
			v := p.Keys[k]
			fmt.Fprintf(&b, "  key %-24s %#010x type %#x send_key_type %v", k, uint64(*v.Mechanism), uint64(*v.KeyType), *v.SendKeyType)
			if v.SendECParams != nil {
				fmt.Fprintf(&b, " ec_params %x send %v point %s on %s", v.ECParams, *v.SendECParams, v.Point, v.PointOn)
			}
			fmt.Fprintf(&b, "%s\n", optional(v.Optional))
		}
		for _, o := range slices.Sorted(maps.Keys(p.Operations)) {
			v := p.Operations[o]
			forms := strings.Join(strings.Fields(v.Input+" "+v.Parameter+" "+v.Output+" "+v.Padding), " ")
			fmt.Fprintf(&b, "  op  %-24s %#010x %s%s\n", o, uint64(*v.Mechanism), forms, optional(v.Optional))
		}
	}
	golden := filepath.Join("testdata", "shipped.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("-golden +shipped\n%s", diff)
	}
}

func optional(v bool) string {
	if v {
		return " (optional)"
	}
	return ""
}

// TestSourcesNamed: each file says where its numbers are from, and in its first line whether it was tried.
func TestSourcesNamed(t *testing.T) {
	for _, name := range profiles.Names() {
		p, err := profiles.Load(name)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(name + ".toml")
		if err != nil {
			t.Fatal(err)
		}
		if untried := strings.HasPrefix(string(b), "# Not tried on the device"); untried != (p.Tried == "no") || len(p.Sources) == 0 {
			t.Errorf("%s: tried = %q, sources %q, first line %.40q", name, p.Tried, p.Sources, b)
		}
	}
}

const whole = `name = "mine"
sources = ["header"]
tried = "no"

[match]
manufacturer = "maker"
version = ["1.2", "2.0"]

[machine]
max_sessions = 8
service_time = "2ms"
read_write = true
login_user = 0x80000001
pin_min = 6
pin_max = 8
pin_digits = true
avoid = ["C_GenerateRandom"]
use_counter = "0x8000000080000001"

[errors]
0x80000005 = 0xA0

[keys.sm2]
mechanism = 0x80008001
key_type = 0x80000004
send_key_type = true
ec_params = "06082a811ccf5501822d"
send_ec_params = false
point = "xy"
point_on = "both"
point_x = 0x80000101
point_y = 0x80000102
omit = [0x108]
public = [{type = 0x80000201, bool = true}, {type = 0x80000202, number = 7}]
private = [{type = 0x80000203, bytes = "0102"}]

[operations.sm2-sign-e]
mechanism = 0x80008000
input = "e"
parameter = "none"
output = "der"

[operations.sm2-sign-message]
mechanism = 0x80008100
input = "zm"
parameter = "none"
output = "raw"
multipart = true
`

func TestWhole(t *testing.T) {
	p, err := profiles.Parse([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	if p.Machine.UseCounter != 0x8000000080000001 || p.Errors["0x80000005"] != 0xA0 || len(p.Keys["sm2"].Public) != 2 ||
		*p.Keys["sm2"].Public[1].Number != 7 || !p.Avoids(profiles.GenerateRandom) || p.Avoids(profiles.GetSessionInfo) {
		t.Errorf("%+v", p)
	}
}

// TestRefusals: each fault is named with its key, in both languages.
func TestRefusals(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{`tried = "no"`, ``, "tried: 缺少 (missing)"},
		{`tried = "no"`, `tried = "no"` + "\ntryed = 1", "未知的键 tryed (unknown key)"},
		{`input = "e"`, `input = "e"` + "\ninputs = 1", "未知的键 operations.sm2-sign-e.inputs (unknown key)"},
		{`mechanism = 0x80008001`, `mechanism = -1`, "keys.sm2.mechanism: 值不能读"},
		{`mechanism = 0x80008001`, `mechanism = 1.5`, "keys.sm2.mechanism: 值不能读"},
		{`mechanism = 0x80008001`, `mechanism = "eight"`, "keys.sm2.mechanism: 值不能读"},
		{`mechanism = 0x80008001`, ``, "keys.sm2.mechanism: 缺少"},
		{`key_type = 0x80000004`, ``, "keys.sm2.key_type: 缺少"},
		{`send_key_type = true`, ``, "keys.sm2.send_key_type: 缺少"},
		{`ec_params = "06082a811ccf5501822d"`, ``, "keys.sm2.ec_params: 缺少"},
		{`ec_params = "06082a811ccf5501822d"`, `ec_params = "0"`, "keys.sm2.ec_params: 值不能读"},
		{`send_ec_params = false`, ``, "keys.sm2.send_ec_params: 缺少"},
		{`point = "xy"`, `point = "raw"`, "keys.sm2.point: xy 须有"},
		{`point_y = 0x80000102`, ``, "keys.sm2.point: xy 须有"},
		{`point_on = "both"`, `point_on = "private"`, `keys.sm2.point_on: "private" 不可用`},
		{`omit = [0x108]`, `omit = [0x100]`, "keys.sm2.omit[0]: 0x100 与 send_key_type"},
		{`omit = [0x108]`, `omit = [0x80000203]`, "keys.sm2.omit[0]: 0x80000203 又在"},
		{`number = 7`, `number = 7, bool = true`, "keys.sm2.public[1]: 须有 bool、number、bytes 之一"},
		{`type = 0x80000202`, `type = 0x80000201`, "keys.sm2.public[1].type: 0x80000201 重复"},
		{`[keys.sm2]`, `[keys.sm3]`, "keys.sm3: 未知的密钥种类"},
		{`[operations.sm2-sign-e]`, `[operations.sm2-sign]`, "operations.sm2-sign: 未知的运算"},
		{`output = "der"`, ``, "operations.sm2-sign-e.output: 缺少"},
		{`output = "der"`, `output = "asn1"`, `operations.sm2-sign-e.output: "asn1" 不可用`},
		{`output = "der"`, `output = "der"` + "\npadding = \"host\"", "operations.sm2-sign-e.padding: 此处不能有"},
		{`input = "e"`, `input = "m"`, `operations.sm2-sign-e.input: "m" 不可用`},
		{"parameter = \"none\"\noutput = \"raw\"", "parameter = \"id\"\noutput = \"raw\"", "id 与 input = \"zm\" 矛盾"},
		{`mechanism = 0x80008100`, `mechanism = 0x80008000`, "operations.sm2-sign-message.mechanism: 与 sm2-sign-e 同为 0x80008000"},
		{`version = ["1.2", "2.0"]`, `version = ["2.2", "2.0"]`, "match.version: 须为"},
		{`version = ["1.2", "2.0"]`, `version = ["2"]`, "match.version: 须为"},
		{`max_sessions = 8`, `max_sessions = -1`, "machine.max_sessions: 须为"},
		{`service_time = "2ms"`, `service_time = "-2ms"`, "machine.service_time: 不能为负"},
		{`service_time = "2ms"`, `service_time = "2"`, "machine.service_time: 值不能读"},
		{`login_user = 0x80000001`, `login = "none"`, "machine.login: none 与"},
		{`login_user = 0x80000001`, `login = "so"`, `machine.login: "so" 不可用`},
		{`pin_min = 6`, `pin_min = 9`, "machine.pin_min: 大于 pin_max"},
		{`"C_GenerateRandom"`, `"C_Sign"`, `machine.avoid: "C_Sign" 不可用`},
		{`0x80000005 = 0xA0`, `zero = 0xA0`, "errors.zero: 不是数"},
		{`0x80000005 = 0xA0`, `0x80000005 = 0`, "errors.0x80000005: 译为 0x0"},
		{`0x80000005 = 0xA0`, "0x80000005 = 0xA0\n2147483653 = 0xA1", "重复 (given twice)"},
		{`0x80000005 = 0xA0`, "0x80000005 = 0x80000006\n0x80000006 = 0xA1", "errors.0x80000005: 译为 0x80000006"},
	} {
		text := strings.Replace(whole, c.old, c.new, 1)
		if text == whole {
			t.Fatalf("%q does not occur", c.old)
		}
		file := filepath.Join(t.TempDir(), "mine.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := profiles.Load(file); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%q for %q: %v; want %q and the file's name", c.new, c.old, err, c.want)
		}
	}
	if _, err := profiles.Parse([]byte(strings.Replace(whole, "0x80000201", `"x"`, 1))); err == nil || !strings.Contains(err.Error(), "keys.sm2.public: 值不能读") {
		t.Errorf("a bad value in an array: %v", err)
	}
	// All at once.
	_, err := profiles.Parse([]byte(strings.Replace(strings.Replace(whole, `tried = "no"`, "", 1), `pin_min = 6`, `pin_min = 9`, 1)))
	if err == nil || !strings.Contains(err.Error(), "tried") || !strings.Contains(err.Error(), "pin_min") {
		t.Errorf("two faults: %v", err)
	}
}

func TestLoad(t *testing.T) {
	if _, err := profiles.Load("nobody"); err == nil || !strings.Contains(err.Error(), "neutral、") {
		t.Errorf("a name that is not shipped: %v", err)
	}
	if _, err := profiles.Load("/nowhere/x.toml"); err == nil || !strings.Contains(err.Error(), "/nowhere/x.toml") {
		t.Errorf("a file that is not there: %v", err)
	}
	big := filepath.Join(t.TempDir(), "big.toml")
	if err := os.WriteFile(big, make([]byte, 64<<10+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{big, t.TempDir() + "/"} {
		if _, err := profiles.Load(path); err == nil || !strings.Contains(err.Error(), "regular file") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestFits(t *testing.T) {
	p, err := profiles.Parse([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	id := profiles.Identity{Library: "/usr/lib/x.so", Manufacturers: []string{"", "The MAKER Ltd"}, VersionMajor: 1, VersionMinor: 2}
	if err := p.Match.Fits(id); err != nil {
		t.Error(err)
	}
	id.VersionMinor = 1
	if err := p.Match.Fits(id); err == nil || !strings.Contains(err.Error(), "match.version: 要求 1.2–2.0，密码机为 1.1") {
		t.Error(err)
	}
	id.VersionMinor, id.Manufacturers = 3, []string{"other"}
	if err := p.Match.Fits(id); err == nil || !strings.Contains(err.Error(), "match.manufacturer") || strings.Contains(err.Error(), "version") {
		t.Error(err)
	}
}
