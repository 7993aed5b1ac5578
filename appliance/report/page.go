package report

import (
	"html/template"
	"io"
)

// A Page is a report for people: one HTML file that needs nothing else, for screen and paper.
type Page struct {
	Title, Subtitle string
	Facts           [][2]string // name and value, above the sections
	Sections        []Section
	Notes           []string // at the end
}

// A Section is a table with words around it.
type Section struct {
	Title, Intro string
	Mark         string // as [Cell.Mark], beside the title
	Head         []string
	Rows         [][]Cell
}

// A Cell is one place of a table. Mark colours it: "normal", "notice", "warning", "severe", "none".
type Cell struct{ Text, Mark string }

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="zh-CN"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{.Title}}</title>
<style>
body{font:15px/1.6 "Noto Sans CJK SC","Source Han Sans SC","Microsoft YaHei","PingFang SC",sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1a1a1a;background:#fff}
h1{font-size:1.6em;margin:0}h2{font-size:1.2em;margin:1.6em 0 .4em}p{margin:.4em 0}
table{border-collapse:collapse;width:100%;margin:.4em 0}th,td{border:1px solid #8a8a8a;padding:.25em .6em;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{background:#ececec}.facts th{width:11em}
.normal{color:#1b5e20}.notice{color:#0d47a1}.warning{color:#7a4100;font-weight:bold}.severe{color:#b00020;font-weight:bold}.none{color:#555}
@media print{body{margin:0;max-width:none;font-size:11px}h2,tr{break-inside:avoid}thead{display:table-header-group}}
@page{size:A4;margin:15mm}
</style></head><body>
<h1>{{.Title}}</h1><p>{{.Subtitle}}</p>
<table class="facts">{{range .Facts}}<tr><th>{{index . 0}}</th><td>{{index . 1}}</td></tr>{{end}}</table>
{{range .Sections}}<h2>{{.Title}}{{with .Mark}} <span class="{{.}}">●</span>{{end}}</h2>{{with .Intro}}<p>{{.}}</p>{{end}}
{{if .Rows}}<table><thead><tr>{{range .Head}}<th>{{.}}</th>{{end}}</tr></thead><tbody>
{{range .Rows}}<tr>{{range .}}<td{{with .Mark}} class="{{.}}"{{end}}>{{.Text}}</td>{{end}}</tr>
{{end}}</tbody></table>{{end}}{{end}}
{{range .Notes}}<p>{{.}}</p>{{end}}
</body></html>
`))

// HTML writes the page. What stands in it is escaped: names and reasons come from outside.
func (p *Page) HTML(w io.Writer) error { return page.Execute(w, p) }
