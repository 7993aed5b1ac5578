package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// An event is a line of `go test -json` (https://pkg.go.dev/cmd/test2json).
type event struct {
	Time    time.Time
	Action  string
	Package string
	Test    string
	Elapsed float64 // seconds
	Output  string
}

// A tested is what became of a package's tests. Subtests count, and so do those of fuzz targets' seeds.
type tested struct {
	Name                    string
	Passed, Failed, Skipped int
	Seconds                 float64
	NoTests, Bad            bool
	Failures                []string
	Skips                   []skip
}

type skip struct{ Test, Why string }

// writeReport makes a page of the output of `go test -json`. It counts what the output has: a run that was cut off shows the
// packages without an end as failed.
func writeReport(w io.Writer, r io.Reader) error {
	packages := map[string]*tested{}
	ended := map[string]bool{}
	words := map[string]string{} // a test's last line, which says why it was skipped
	var first, last time.Time
	for d := json.NewDecoder(r); ; {
		var e event
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("not the output of go test -json: %w", err)
		}
		if e.Package == "" {
			continue
		}
		if first.IsZero() {
			first = e.Time
		}
		last = e.Time
		p := packages[e.Package]
		if p == nil {
			p = &tested{Name: e.Package}
			packages[e.Package] = p
		}
		key := e.Package + " " + e.Test
		switch {
		case e.Action == "output":
			if line := strings.TrimSpace(e.Output); line != "" && !strings.HasPrefix(line, "---") && !strings.HasPrefix(line, "===") {
				words[key] = line
			}
		case e.Test == "" && (e.Action == "pass" || e.Action == "fail" || e.Action == "skip"):
			ended[e.Package] = true
			p.Seconds, p.NoTests, p.Bad = e.Elapsed, e.Action == "skip", e.Action == "fail"
		case e.Action == "pass":
			p.Passed++
		case e.Action == "fail":
			p.Failed++
			p.Failures = append(p.Failures, e.Test)
		case e.Action == "skip":
			p.Skipped++
			p.Skips = append(p.Skips, skip{e.Test, words[key]})
		}
	}
	if len(packages) == 0 {
		return errors.New("no output of go test -json on standard input")
	}
	page := struct {
		At       string
		Took     time.Duration
		Sum      tested
		Packages []*tested
	}{At: last.UTC().Format(time.RFC3339), Took: last.Sub(first).Round(time.Second)}
	page.Packages = slices.SortedFunc(maps.Values(packages), func(a, b *tested) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range page.Packages {
		if !ended[p.Name] {
			p.Bad = true
			p.Failures = append(p.Failures, "未结束 (has no end)")
		}
		page.Sum.Passed += p.Passed
		page.Sum.Failed += p.Failed
		page.Sum.Skipped += p.Skipped
		page.Sum.Bad = page.Sum.Bad || p.Bad
	}
	return reportPage.Execute(w, page)
}

var reportPage = template.Must(template.New("").Parse(`<!doctype html>
<html lang="zh-CN"><head><meta charset="utf-8"><title>测试报告</title>
<style>body{font:15px/1.5 sans-serif;margin:2em auto;max-width:72em;color:#222}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.25em .6em;border-bottom:1px solid #ddd;vertical-align:top}td.n,th.n{text-align:right}.bad{color:#a00;font-weight:bold}
.none{color:#666}@media print{body{margin:0}}</style></head><body>
<h1>测试报告 (test report)</h1>
<p>{{if .Sum.Bad}}<span class="bad">未通过 FAILED</span>{{else}}通过 passed{{end}}：{{len .Packages}} 个包，通过 {{.Sum.Passed}}，失败 {{.Sum.Failed}}，跳过 {{.Sum.Skipped}}；
历时 {{.Took}}，结束于 {{.At}}。由 <code>make test-report</code> 从 <code>go test -json</code> 的输出写出，子测试计在内；跳过的列明原因。</p>
<table><thead><tr><th>包 package</th><th class="n">通过</th><th class="n">失败</th><th class="n">跳过</th><th class="n">秒</th><th>失败与跳过</th></tr></thead><tbody>
{{range .Packages}}<tr{{if .NoTests}} class="none"{{end}}><td>{{.Name}}</td><td class="n">{{.Passed}}</td><td class="n">{{.Failed}}</td><td class="n">{{.Skipped}}</td><td class="n">{{printf "%.1f" .Seconds}}</td>
<td>{{if .NoTests}}无测试 no tests{{end}}{{range .Failures}}<span class="bad">{{.}}</span><br>{{end}}{{range .Skips}}{{.Test}}：{{.Why}}<br>{{end}}</td></tr>
{{end}}</tbody></table></body></html>
`))
