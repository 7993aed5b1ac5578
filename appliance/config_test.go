package appliance_test

import (
	"bytes"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance"
)

const goodConfig = `
node = "benbu-1"
campus = "本部"
[listen]
api = "127.0.0.1:8443"
[hsm]
module = "libp11.so"
[hsm.slots.staff]
token_label = "a"
pin_file = "secrets/a.pin"
[hsm.slots.tsa]
token_label = "b"
pin_file = "secrets/b.pin"
[hsm.slots.log]
token_label = "c"
pin_file = "secrets/c.pin"
[hsm.slots.ca]
token_label = "d"
pin_file = "secrets/d.pin"
[time]
min_sources = 1
[[time.sources]]
name = "ntp1"
group = "rack"
address = "192.0.2.1:123"
`

func TestConfigDefaults(t *testing.T) {
	t.Parallel()
	c, err := appliance.ParseConfig([]byte(goodConfig), "/dir")
	if err != nil {
		t.Fatal(err)
	}
	if c.HSM.Module != "/dir/libp11.so" || c.HSM.Slots["staff"].PINFile != "/dir/secrets/a.pin" || !*c.HSM.VerifyFresh || c.HSM.Slots["ca"].Sessions != 8 {
		t.Errorf("ParseConfig = %+v", c.HSM)
	}
	if p := c.Policy; p.Rate != 3000 || p.Burst != 6000 || p.Concurrent != 1024 || p.AuthFailures != 120 || p.MaxConnections != 4096 || time.Duration(p.Drain) != 20*time.Second {
		t.Errorf("ParseConfig = %+v", p)
	}
	again, err := toml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := appliance.ParseConfig(again, "/dir"); err != nil {
		t.Errorf("what was written is not read back: %v", err)
	}
}

// Sources of timestamp requests: an address is a network of one, quotas follow policy.rate, and the plain listener may be
// anywhere when one is listed by address.
func TestConfigSources(t *testing.T) {
	t.Parallel()
	c, err := appliance.ParseConfig([]byte(strings.Replace(goodConfig, "[hsm]",
		"tsa_plain = \":3180\"\n[[listen.tsa_sources]]\nname = \"pacs\"\naddresses = [\"10.0.0.1\", \"2001:db8::/48\"]\n"+
			"[[listen.tsa_sources]]\nname = \"ris\"\ncertificates = [\"secrets/ris.pem\"]\nrate = 7\n[policy]\nrate = 50\n[hsm]", 1)), "/dir")
	if err != nil {
		t.Fatal(err)
	}
	pacs, ris := c.Listen.TSASources[0], c.Listen.TSASources[1]
	if pacs.Rate != 50 || pacs.Burst != 100 || ris.Rate != 7 || ris.Burst != 14 || ris.Certificates[0] != "/dir/secrets/ris.pem" {
		t.Errorf("%+v, %+v", pacs, ris)
	}
}

// Everything that can be wrong is named, all at once, with its key.
func TestConfigRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change [2]string
		want   []string
	}{
		"unknown key":        {[2]string{`[listen]`, "[listen]\nspeed = 3"}, []string{"speed"}},
		"unknown table":      {[2]string{`[listen]`, "[extra]\na = 1\n[listen]"}, []string{"extra"}},
		"node":               {[2]string{`"benbu-1"`, `"本部"`}, []string{"node"}},
		"shared token":       {[2]string{`token_label = "b"`, `token_label = "a"`}, []string{"hsm.slots"}},
		"slot missing":       {[2]string{`[hsm.slots.ca]`, `[hsm.slots.other]`}, []string{"hsm.slots.ca"}},
		"plain elsewhere":    {[2]string{`api = "127.0.0.1:8443"`, "api = \"127.0.0.1:8443\"\ntsa_plain = \"0.0.0.0:80\""}, []string{"listen.tsa_plain"}},
		"plain, unlisted":    {[2]string{"[hsm]", "tsa_plain = \"192.0.2.1:80\"\n[[listen.tsa_sources]]\nname = \"ris\"\naddresses = [\"10.0.0.1\"]\ncertificates = [\"c.pem\"]\n[hsm]"}, []string{"listen.tsa_plain"}},
		"plain by name":      {[2]string{`api = "127.0.0.1:8443"`, "api = \"127.0.0.1:8443\"\ntsa_plain = \"localhost:80\""}, []string{"listen.tsa_plain"}},
		"source":             {[2]string{"[hsm]", "[[listen.tsa_sources]]\nname = \"PACS\"\naddresses = [\"10.0.0.1/8\"]\nrate = -1\n[hsm]"}, []string{"listen.tsa_sources", "name", "10.0.0.1/8", "rate"}},
		"source's address":   {[2]string{"[hsm]", "[[listen.tsa_sources]]\nname = \"pacs\"\naddresses = [\"pacs.local\"]\nburst = 1000000000\n[[listen.tsa_sources]]\nname = \"ris\"\nburst = 1000000000\n[hsm]"}, []string{"tsa_sources[0]", "pacs.local", "tsa_sources[1]"}},
		"too few groups":     {[2]string{`min_sources = 1`, `min_sources = 2`}, []string{"time.min_sources"}},
		"two faults at once": {[2]string{`campus = "本部"`, "campus = \"\"\n"}, []string{"campus"}},
		"rate":               {[2]string{"[hsm]", "[policy]\nrate = 10001\n[hsm]"}, []string{"policy.rate"}},
		"negative limits":    {[2]string{"[hsm]", "[policy]\nburst = -1\nconcurrent = -1\nauth_failures = -1\n[hsm]"}, []string{"policy.burst", "policy.concurrent", "policy.auth_failures"}},
		"too few":            {[2]string{"[hsm]", "[policy]\nmax_connections = 3\ndrain = \"10ms\"\n[hsm]"}, []string{"policy.max_connections", "policy.drain"}},
		"machine's name":     {[2]string{"[time]", "[[hsm.machines]]\nname = 'B-1'\nmodule = 'x.so'\n[hsm.machines.slots.staff]\ntoken_label = 's'\npin_file = 'p'\n[time]"}, []string{"hsm.machines[0].name"}},
		"machine":            {[2]string{"[time]", "[[hsm.machines]]\nname = 'main'\nweight = 101\n[hsm.machines.slots.other]\ntoken_label = 's'\n[time]"}, []string{"hsm.machines[0].name", ".module", ".weight", ".slots"}},
		"machine twice":      {[2]string{"[time]", "[[hsm.machines]]\nname = 'b'\n[[hsm.machines]]\nname = 'b'\n[time]"}, []string{"hsm.machines[1].name"}},
		"machine's key":      {[2]string{"[time]", "[[hsm.machines]]\nname = 'b'\nwieght = 1\n[time]"}, []string{"wieght"}},
		"weight":             {[2]string{"[hsm]", "[hsm]\nweight = -1"}, []string{"hsm.weight"}},
		"upstream": {[2]string{"[time]", "[tsa.upstream]\nname = 'Old TSA'\nurl = 'ftp://a'\norder = 'both'\nunits = ['ecdsa']\ntimeout = '1ms'\nfailures = 101\nprobe = '10ms'\n" +
			"accuracy = '2s'\nallowance = '6s'\npolicies = ['x']\nuser = 'u'\n[time]"}, []string{"upstream.name", "upstream.url", "upstream.order", "upstream.units", "upstream.timeout",
			"upstream.failures", "upstream.probe", "upstream.accuracy", "upstream.allowance", "upstream.policies", "upstream.user"}},
		"upstream's password": {[2]string{"[time]", "[tsa.upstream]\nname = 'old'\nurl = 'http://u:p@a'\n[time]"}, []string{"upstream.url"}},
		"archive": {[2]string{"[time]", "[preserve]\nevery = '1s'\nlead = '1h'\ndigest = 'sm3'\n[preserve.algorithm_ends]\nsm2 = '2045-01-01'\nSHA256 = '2045-01-01'\nSM3 = '2045'\n[time]"},
			[]string{"preserve.every", "preserve.lead", "preserve.digest", "algorithm_ends.sm2", "algorithm_ends.SHA256", "algorithm_ends.SM3"}},
		"quota":    {[2]string{"[hsm]", "[policy]\nhsm_rate = -1\nhsm_sessions = 1001\n[hsm]"}, []string{"policy.hsm_rate", "policy.hsm_sessions"}},
		"accuracy": {[2]string{`min_sources = 1`, "min_sources = 1\naccuracy = \"1h\""}, []string{"time.accuracy"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text := strings.Replace(goodConfig, c.change[0], c.change[1], 1)
			if text == goodConfig {
				t.Fatal("the case changes nothing")
			}
			_, err := appliance.ParseConfig([]byte(text), "/dir")
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not name %s", err, w)
				}
			}
		})
	}
	_, err := appliance.ParseConfig(nil, "/dir")
	for _, w := range []string{"node", "campus", "listen.api", "hsm.module", "hsm.slots.staff", "time.sources"} {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("an empty configuration: %v does not name %s", err, w)
		}
	}
}

// The page and the program cannot part: every key is a row of docs/configuration.md, and the defaults that the rows give are
// those of a configuration that says as little as it may.
func TestConfigDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	c, err := appliance.ParseConfig([]byte(strings.Replace(goodConfig, "min_sources = 1\n", "", 1)+`
[[time.sources]]
name = "ntp2"
group = "room"
address = "192.0.2.2:123"
[hsm.custody]
kek = "k"
[hsm.tpm]
[[hsm.machines]]
name = "b"
module = "libb.so"
slots.staff = {token_label = "e", pin_file = "secrets/e.pin"}
[[listen.tsa_sources]]
name = "pacs"
addresses = ["10.0.0.1"]
[[tsa.units]]
name = "sm2"
algorithm = "sm2"
policy = "2.999.1"
[tsa.upstream]
name = "old"
url = "https://192.0.2.2/tsa"
[[trust.crl]]
url = "http://192.0.2.3/a.crl"
[[alarms.syslog]]
address = "tls://192.0.2.4:6514"
[[alarms.webhook]]
url = "https://192.0.2.5/"
key_file = "secrets/w.key"
`), "/dir")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{} // default by key
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9_.\\[\\]<>名称…]+)` \\| .* \\| (.*) \\|$").FindAllStringSubmatch(string(page), -1) {
		rows[m[1]] = m[2]
	}
	value := regexp.MustCompile("^`([^`]+)`")
	compared := 0
	var walk func(path string, v reflect.Value)
	walk = func(path string, v reflect.Value) {
		switch {
		case rows[path+".…"] != "":
			return // as elsewhere
		case v.Kind() == reflect.Pointer && v.Elem().Kind() == reflect.Struct:
			v = v.Elem()
		case v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct:
			path, v = path+"[]", v.Index(0)
		case v.Kind() == reflect.Map && v.Type().Elem().Kind() == reflect.Struct:
			path, v = path+".<名称>", v.MapIndex(reflect.ValueOf("staff"))
		case v.Kind() == reflect.Map:
			path += ".<名称>"
		}
		if rows[path+".…"] != "" {
			return
		}
		if v.Kind() == reflect.Struct {
			for i := range v.NumField() {
				key, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("toml"), ",")
				if key == "" {
					t.Errorf("%s.%s has no key", v.Type(), v.Type().Field(i).Name)
				}
				walk(strings.TrimPrefix(path+"."+key, "."), v.Field(i))
			}
			return
		}
		row := rows[path]
		if row == "" {
			t.Errorf("docs/configuration.md has no row for %s", path)
			return
		}
		given := value.FindStringSubmatch(row)
		if given == nil || rows[given[1]] != "" || strings.HasPrefix(row, given[0]+" 的") { // words, or as another key has it
			if given == nil && !v.IsZero() && !strings.HasPrefix(row, "必填") && !strings.HasPrefix(row, "与 ") {
				t.Errorf("%s: the page gives no value, the program takes %v", path, v)
			}
			return
		}
		if v.Kind() == reflect.Pointer {
			v = v.Elem()
		}
		if d, ok := v.Interface().(appliance.Duration); ok {
			want, err := time.ParseDuration(given[1])
			if err != nil || want != time.Duration(d) {
				t.Errorf("%s: the page's default is %s, the program's %v (%v)", path, given[1], time.Duration(d), err)
			}
		} else if got := fmt.Sprint(v); got != given[1] {
			t.Errorf("%s: the page's default is %s, the program's %s", path, given[1], got)
		}
		compared++
	}
	walk("", reflect.ValueOf(*c))
	if compared < 50 {
		t.Errorf("only %d defaults were compared", compared)
	}
}

// FuzzParseConfig: what is taken is written and read again as the same.
func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(goodConfig))
	f.Add([]byte(strings.Replace(goodConfig, "[listen]", "[policy]\nrate = 1\n[listen]", 1)))
	f.Add([]byte(strings.Replace(goodConfig, "min_sources = 1", "min_sources = -1\ngnss_feed = true", 1)))
	f.Add([]byte("node = 1"))
	f.Add([]byte(goodConfig + "\n[alarms]\nlag = 7\n[[alarms.syslog]]\naddress = 'log.hospital.example:6514'\nserver_name = 'log'\n[[alarms.webhook]]\nurl = 'https://u:p@hook.example/a?b#c'\nkey_file = 'secrets/hook.key'\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := appliance.ParseConfig(in, "/dir")
		if err != nil {
			return
		}
		out, err := toml.Marshal(c)
		if err != nil {
			t.Fatalf("%s is taken and cannot be written: %v", in, err)
		}
		again, err := appliance.ParseConfig(out, "/dir")
		if err != nil {
			t.Fatalf("%s is taken and not when it is written as %s: %v", in, out, err)
		}
		if twice, err := toml.Marshal(again); err != nil || !bytes.Equal(twice, out) {
			t.Fatalf("%s is written as %s, then as %s, %v", in, out, twice, err)
		}
	})
}
