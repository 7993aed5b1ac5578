package appliance_test

import (
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"yinjian/appliance"
)

// fill puts a text of its own into every string below v, and one element into each list and table; it answers the texts by key.
func fill(v reflect.Value, key string, texts map[string]string) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), key, texts)
	case reflect.Struct:
		for i := range v.NumField() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("toml"), ",")
			fill(v.Field(i), strings.TrimPrefix(key+"."+name, "."), texts)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), key, texts)
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		one := reflect.New(v.Type().Elem()).Elem()
		fill(one, key, texts)
		v.SetMapIndex(reflect.ValueOf("staff"), one)
	case reflect.String:
		texts[key] = fmt.Sprintf("https://canary%[1]d:canary%[1]d@host.example/canary%[1]d?canary%[1]d", len(texts)+1000)
		v.SetString(texts[key])
	}
}

// What an operator wrote into a key that could hold a secret is in no bundle; what a diagnosis needs is.
func TestShownConfiguration(t *testing.T) {
	t.Parallel()
	var c appliance.Config
	texts := map[string]string{}
	fill(reflect.ValueOf(&c).Elem(), "", texts)
	if len(texts) < 60 {
		t.Fatalf("only %d keys were found", len(texts))
	}
	out, err := c.Shown()
	if err != nil {
		t.Fatal(err)
	}
	shown := 0
	doubtful := regexp.MustCompile(`(args|note|user|url|dsn|password|pin|secret|token)$`)
	for key, text := range texts {
		canary := regexp.MustCompile(`canary\d+`).FindString(text)
		if !strings.Contains(string(out), canary) {
			continue
		}
		if shown++; doubtful.MatchString(key) {
			t.Errorf("%s shows what it holds", key)
		}
		if !strings.Contains(string(out), text) {
			t.Errorf("%s shows a part of what it holds", key)
		}
	}
	if shown < 40 || shown == len(texts) {
		t.Errorf("%d of %d keys are shown", shown, len(texts))
	}
	for _, key := range []string{"hsm.module_args", "hsm.machines.module_args", "time.policy_note", "database.dsn", "tsa.upstream.url", "tsa.upstream.user", "alarms.webhook.url", "trust.crl.url"} {
		if texts[key] == "" {
			t.Errorf("there is no key %s", key)
		}
	}
	if n := strings.Count(string(out), "https://host.example/[已隐去"); n != 4 {
		t.Errorf("%d addresses show their host, want 4", n)
	}
	var again map[string]any
	if err := toml.Unmarshal(out, &again); err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
}
