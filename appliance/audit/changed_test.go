package audit_test

import (
	"strings"
	"testing"

	"yinjian/appliance/audit"
)

type thing struct {
	Name   string   `json:"name"`
	Rights []string `json:"rights"`
	Rate   int64    `json:"rate"`
	Note   string   `json:"note,omitempty"`
	Pin    any      `json:"pin,omitempty"`
	Keys   []inner  `json:"keys,omitempty"`
	Off    bool     `json:"off"`
}

type inner struct {
	Label   string `json:"label"`
	Wrapped []byte `json:"wrapped,omitempty"`
}

// Before and after are the members that differ, neither more nor less; long and confidential values are digests, and
// nothing is longer than its column.
func TestChanged(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("汉", 40)
	base := thing{Name: "医师", Rights: []string{"sign"}, Rate: 1 << 60, Pin: map[string]string{"tag": "dGFn"}, Keys: []inner{{"k1", []byte("w")}}}
	with := func(f func(*thing)) thing { c := base; f(&c); return c }
	for name, c := range map[string]struct {
		before, after any
		b, a          string // "-": no field
	}{
		"made":          {nil, thing{Name: "a"}, "-", `{"name":"a","off":false,"rate":0,"rights":null}`},
		"nil typed":     {(*thing)(nil), map[string]int{"n": 1}, "-", `{"n":1}`},
		"removed":       {map[string]int{"n": 1}, nil, `{"n":1}`, "-"},
		"a flag":        {base, with(func(c *thing) { c.Off = true }), `{"off":false}`, `{"off":true}`},
		"nothing":       {base, base, `{}`, `{}`},
		"great numbers": {base, with(func(c *thing) { c.Rate++ }), `{"rate":1152921504606846976}`, `{"rate":1152921504606846977}`},
		"a list":        {base, with(func(c *thing) { c.Rights = []string{"sign", "verify"} }), `{"rights":["sign"]}`, `{"rights":["sign","verify"]}`},
		"appears":       {base, with(func(c *thing) { c.Note = "<新>" }), `{}`, `{"note":"<新>"}`},
		"long":          {base, with(func(c *thing) { c.Note = long }), `{}`, `{"note":"sm3:` + audit.Sum([]byte(long)).String() + `"}`},
		"a PIN":         {base, with(func(c *thing) { c.Pin = nil }), `{"pin":"sm3:` + audit.Sum([]byte(`{"tag":"dGFn"}`)).String() + `"}`, `{}`},
		"a wrapped key": {base, with(func(c *thing) { c.Keys = []inner{{"k1", []byte("v")}} }),
			`{"keys":[{"label":"k1","wrapped":"sm3:` + audit.Sum([]byte(`"dw=="`)).String() + `"}]}`, `{"keys":[{"label":"k1","wrapped":"sm3:` + audit.Sum([]byte(`"dg=="`)).String() + `"}]}`},
	} {
		fields, err := audit.Changed(c.before, c.after)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := map[string]string{audit.FieldBefore: "-", audit.FieldAfter: "-"}
		for _, f := range fields {
			got[f.Name] = string(f.Value.(audit.Text))
		}
		if got[audit.FieldBefore] != c.b || got[audit.FieldAfter] != c.a {
			t.Errorf("%s: %s → %s\nwant %s → %s", name, got[audit.FieldBefore], got[audit.FieldAfter], c.b, c.a)
		}
	}
	many := map[string]string{}
	for i := range 40 {
		many[strings.Repeat("名", 10)+string(rune('a'+i))] = strings.Repeat("汉", 20)
	}
	for _, v := range []any{many, map[string]any{"keys": []any{many, many, many}, "name": "stays"}} {
		fields, err := audit.Changed(nil, v)
		if err != nil || len(fields) != 1 || len(fields[0].Value.(audit.Text)) > 900 {
			t.Errorf("%v, %v", fields, err)
		}
		if _, ok := v.(map[string]any); ok && !strings.Contains(string(fields[0].Value.(audit.Text)), `"name":"stays"`) {
			t.Errorf("a short member gave way: %v", fields)
		}
	}
	if _, err := audit.Changed(nil, []int{1}); err == nil {
		t.Error("a list was taken for an object")
	}
}
