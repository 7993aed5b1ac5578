// Package page shows a pack as one page of HTML: Chinese first, to be printed, without scripts and without anything from
// elsewhere. The pack's JSON is the truth; what stands here is rendered from it.
package page

import (
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"yinjian/appliance/assess"
)

//go:embed page.html
var source string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"status": func(s assess.Status) string { return words[s] },
	"raw":    raw,
	"points": func(v float64) string { return fmt.Sprintf("%.2f", v) },
	"yes": func(b bool) string {
		if b {
			return "是"
		}
		return "否"
	},
	"encode": base64.StdEncoding.EncodeToString,
}).Parse(source))

var words = map[assess.Status]string{assess.Shown: "已证明 shown", assess.Failed: "未通过 failed", assess.NotEvidenced: "未取得证据 not evidenced"}

// shownBytes bounds how much of an item's raw output stands on the page; the rest is in the pack.
const shownBytes = 4000

// raw is an item's raw output, cut: a member or element of it a line.
func raw(data json.RawMessage) string {
	var v any
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.UseNumber()
	if dec.Decode(&v) != nil || v == nil {
		return ""
	}
	var b strings.Builder
	write(&b, "", shorten(v), 2)
	text := strings.TrimPrefix(b.String(), "\n")
	if len(text) > shownBytes {
		cut := shownBytes
		for !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut] + fmt.Sprintf("\n…（共 %d 字节，全文在 JSON 中 the whole is in the JSON）", len(data))
	}
	return text
}

// write spreads a value over lines to a depth; below it is in one piece.
func write(b *strings.Builder, indent string, v any, depth int) {
	line := func(name string, v any) {
		b.WriteString("\n" + indent + name)
		write(b, indent+"  ", v, depth-1)
	}
	switch v := v.(type) {
	case map[string]any:
		if depth > 0 && len(v) > 0 {
			for _, name := range slices.Sorted(maps.Keys(v)) {
				line(name+": ", v[name])
			}
			return
		}
	case []any:
		if depth > 0 && len(v) > 0 {
			for _, e := range v {
				line("- ", whole{e})
			}
			return
		}
	case string:
		b.WriteString(v)
		return
	case whole:
		write(b, indent, v.v, 0)
		return
	}
	text, err := json.Marshal(v)
	if err != nil {
		return
	}
	b.WriteString(strings.NewReplacer(`\u003c`, "<", `\u003e`, ">", `\u0026`, "&").Replace(string(text)))
}

// A whole is an element of a list, which stands on one line.
type whole struct{ v any }

// shorten cuts long words: keys, certificates, random numbers.
func shorten(v any) any {
	switch v := v.(type) {
	case string:
		if len(v) > 200 && !strings.Contains(v, " ") {
			return strings.ToValidUTF8(v[:60], "") + fmt.Sprintf("…（%d）", len(v))
		}
		return v
	case []any:
		for i := range v {
			v[i] = shorten(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = shorten(v[k])
		}
	}
	return v
}

// A section is what stands under one heading.
type section struct {
	Number int
	Title  string
	Items  []assess.Item
}

// Render writes the page of a pack that was read.
func Render(w io.Writer, p *assess.Pack, r *assess.Report) error {
	sections := make([]section, 0, assess.SectionIdentity)
	for n := assess.SectionHeader; n <= assess.SectionIdentity; n++ {
		s := section{Number: n, Title: assess.Titles[n-1]}
		for _, it := range r.Items {
			if it.Section == n {
				s.Items = append(s.Items, it)
			}
		}
		sections = append(sections, s)
	}
	gaps, whole := []assess.Row{}, []assess.Row{}
	for _, row := range r.Rows { // what is missing comes first
		if row.Gap != "" {
			gaps = append(gaps, row)
		} else {
			whole = append(whole, row)
		}
	}
	return page.Execute(w, map[string]any{
		"Pack": p, "Report": r, "Header": r.Header, "Sections": sections, "Rows": append(gaps, whole...), "Soft": r.Header.Mode == assess.ModeSoft,
		"Shown": r.Count(assess.Shown), "Failed": r.Count(assess.Failed), "NotEvidenced": r.Count(assess.NotEvidenced), "Titles": assess.Titles,
		"Digest": assess.Digest(p.Report),
	})
}
