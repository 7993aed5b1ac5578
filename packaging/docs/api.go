package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
)

const apiHead = `# 接口参考 (API reference)

由 ` + "`make docs`" + ` 从 [api/openapi.json](../api/openapi.json) 生成，勿手工修改；该文件也由设备在 ` + "`/openapi.json`" + ` 提供，测试拿它与运行中的服务逐项对照。
请求如何签名见 [api-auth.md](api-auth.md)，错误码与重试见 [errors.md](errors.md)，限额见 [limits.md](limits.md)，各语言的客户端见 [clients](clients/README.md)。
(Generated from the contract, which the appliance serves itself.)
`

// writeAPI writes the contract for people: each route, then each message that is named.
func writeAPI(w io.Writer, file string) error {
	doc, err := openapi3.NewLoader().LoadFromFile(file)
	if err != nil {
		return err
	}
	fmt.Fprint(w, apiHead+"\n")
	fmt.Fprint(w, "| 路由 route | 说明 | 身份 |\n| --- | --- | --- |\n")
	eachRoute(doc, func(method, path string, o *openapi3.Operation) {
		fmt.Fprintf(w, "| [`%s %s`](#%s) | %s | %s |\n", method, path, anchor(method+" "+path), cell(o.Summary), identity(doc, o))
	})
	eachRoute(doc, func(method, path string, o *openapi3.Operation) {
		fmt.Fprintf(w, "\n## %s %s\n\n%s\n", method, path, paragraph(o.Summary, o.Description))
		writeParameters(w, doc, path, o)
		if o.RequestBody != nil {
			fmt.Fprint(w, "\n请求体 (body)\n\n| 内容类型 | 内容 |\n| --- | --- |\n")
			writeContent(w, o.RequestBody.Value.Content, "")
		}
		fmt.Fprint(w, "\n| 应答 status | 说明 | 内容 |\n| --- | --- | --- |\n")
		all := o.Responses.Map()
		for _, status := range slices.Sorted(maps.Keys(all)) {
			r := all[status].Value
			description := ""
			if r.Description != nil {
				description = cell(*r.Description)
			}
			if len(r.Content) == 0 {
				fmt.Fprintf(w, "| %s | %s |  |\n", status, description)
				continue
			}
			writeContent(w, r.Content, fmt.Sprintf("%s | %s | ", status, description))
		}
	})
	fmt.Fprint(w, "\n# 报文 (messages)\n")
	for _, name := range slices.Sorted(maps.Keys(doc.Components.Schemas)) {
		s := doc.Components.Schemas[name].Value
		fmt.Fprintf(w, "\n## %s\n\n%s\n", name, paragraph(s.Description, ""))
		writeFields(w, s)
	}
	return nil
}

func eachRoute(doc *openapi3.T, do func(method, path string, o *openapi3.Operation)) {
	paths := doc.Paths.Map()
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		operations := paths[path].Operations()
		for _, method := range slices.Sorted(maps.Keys(operations)) {
			do(method, path, operations[method])
		}
	}
}

// identity names the ways in which a caller shows who he is.
func identity(doc *openapi3.T, o *openapi3.Operation) string {
	wants := o.Security
	if wants == nil {
		wants = &doc.Security
	}
	var ways []string
	for _, one := range *wants {
		if names := slices.Sorted(maps.Keys(one)); len(names) > 0 {
			ways = append(ways, strings.Join(names, " + "))
		} else {
			ways = append(ways, "不要求 none")
		}
	}
	if len(ways) == 0 {
		return "不要求 none"
	}
	return strings.Join(ways, "，或 ")
}

func writeParameters(w io.Writer, doc *openapi3.T, path string, o *openapi3.Operation) {
	all := slices.Concat(doc.Paths.Value(path).Parameters, o.Parameters)
	if len(all) == 0 {
		return
	}
	fmt.Fprint(w, "\n| 参数 parameter | 在 in | 必填 | 类型 | 说明 |\n| --- | --- | --- | --- | --- |\n")
	for _, p := range all {
		v := p.Value
		fmt.Fprintf(w, "| `%s` | %s | %s | %s | %s |\n", v.Name, v.In, yes(v.Required), typeOf(v.Schema), cell(v.Description))
	}
}

func writeContent(w io.Writer, content openapi3.Content, before string) {
	for _, media := range slices.Sorted(maps.Keys(content)) {
		fmt.Fprintf(w, "| %s`%s`", before, media)
		if before == "" {
			fmt.Fprint(w, " |")
		}
		fmt.Fprintf(w, " %s |\n", typeOf(content[media].Schema))
	}
}

// writeFields is a table of an object's members; those that it takes from others stand with them.
func writeFields(w io.Writer, s *openapi3.Schema) {
	if len(s.Properties) == 0 {
		fmt.Fprintln(w, typeOf(openapi3.NewSchemaRef("", s)))
		return
	}
	fmt.Fprint(w, "| 字段 field | 类型 | 必填 | 说明 |\n| --- | --- | --- | --- |\n")
	for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
		p := s.Properties[name]
		fmt.Fprintf(w, "| `%s` | %s | %s | %s |\n", name, typeOf(p), yes(slices.Contains(s.Required, name)), cell(p.Value.Description))
	}
}

// typeOf is a schema in a few words, with its bounds.
func typeOf(r *openapi3.SchemaRef) string {
	if r == nil || r.Value == nil {
		return ""
	}
	if name, named := strings.CutPrefix(r.Ref, "#/components/schemas/"); named {
		return fmt.Sprintf("[%s](#%s)", name, anchor(name))
	}
	s := r.Value
	var words []string
	if s.Type != nil {
		words = append(words, strings.Join(s.Type.Slice(), "/"))
	}
	for _, group := range []struct {
		word string
		of   openapi3.SchemaRefs
	}{{"全部 all of ", s.AllOf}, {"其一 one of ", s.OneOf}, {"任一 any of ", s.AnyOf}} {
		var of []string
		for _, one := range group.of {
			of = append(of, typeOf(one))
		}
		if len(of) > 0 {
			words = append(words, group.word+strings.Join(of, "，"))
		}
	}
	if s.Items != nil {
		words = append(words, "of "+typeOf(s.Items))
	}
	if s.Format != "" {
		words = append(words, s.Format)
	}
	var values []string
	for _, v := range s.Enum {
		values = append(values, fmt.Sprintf("`%v`", v))
	}
	words = append(words, strings.Join(values, " "))
	words = append(words, bounds("", number(s.Min), number(s.Max)))
	words = append(words, bounds(" 字符 characters", above0(s.MinLength), count(s.MaxLength)))
	words = append(words, bounds(" 项 items", above0(s.MinItems), count(s.MaxItems)))
	if s.Pattern != "" {
		words = append(words, "`"+strings.ReplaceAll(s.Pattern, "|", "\\|")+"`")
	}
	words = slices.DeleteFunc(words, func(w string) bool { return w == "" })
	return strings.Join(words, "，")
}

func bounds(unit, low, high string) string {
	switch {
	case low == "" && high == "":
		return ""
	case high == "":
		return "≥ " + low + unit
	case low == "":
		return "≤ " + high + unit
	}
	return low + "–" + high + unit
}

func number(f *float64) string {
	if f == nil {
		return ""
	}
	return strconv.FormatFloat(*f, 'f', -1, 64)
}

func count(n *uint64) string {
	if n == nil {
		return ""
	}
	return strconv.FormatUint(*n, 10)
}

func above0(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

func yes(b bool) string {
	if b {
		return "是"
	}
	return ""
}

// cell is text for a table.
func cell(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", "\\|")
}

func paragraph(texts ...string) string {
	texts = slices.DeleteFunc(slices.Clone(texts), func(t string) bool { return t == "" })
	return strings.Join(texts, "\n\n")
}

// anchor is what a reader of Markdown makes of a heading.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '/', r == '{', r == '}', r == '.':
			return -1
		}
		return r
	}, strings.ToLower(heading))
}
