package console

import (
	"bytes"
	"encoding/json"
	"net/http"
	"path"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"yinjian/api/wire"
	"yinjian/appliance/assess"
	assesspage "yinjian/appliance/assess/page"
)

const (
	routeListReports = "POST /admin/v1/reports/list"
	routeReadReport  = "POST /admin/v1/reports/read"
	routePatrol      = "POST /admin/v1/patrols"
	routeAssess      = "POST /admin/v1/assessments"
	routeDrill       = "GET /admin/v1/drills"
	routeEndDrill    = "POST /admin/v1/drills/:id/end"
)

// reportTitles are the kinds of reports that have pages.
var reportTitles = map[string][2]string{"patrol": {"巡检", "Patrol"}, "drill": {"演练", "Drill"}}

// reportNames are what reports are called, and reportOutcomes what came of them.
var (
	reportNames = map[string][2]string{
		"daily": {"日巡检", "daily"}, "weekly": {"周巡检", "weekly"}, "monthly": {"月巡检", "monthly"}, "quarterly": {"季巡检", "quarterly"},
		"hsm": {"停密码机", "cipher machine stopped"}, "db": {"断中心库", "database cut off"}, "time": {"断时间源", "time sources cut off"}, "campus": {"断另一院区", "other campus cut off"},
		"ca": {"吊销列表与吊销", "CRL and revocation"}, "restore": {"恢复备份", "backup restored"},
	}
	periods = []string{"daily", "weekly", "monthly", "quarterly"}
)

// A patrolReport is what a page shows of one.
type patrolReport struct {
	Period   string `json:"period"`
	Node     string `json:"node"`
	Campus   string `json:"campus"`
	From     string `json:"from"`
	To       string `json:"to"`
	Trusted  bool   `json:"time_trusted"`
	Running  bool   `json:"running"`
	Severity string `json:"severity"`
	Areas    []struct {
		Title    string `json:"title"`
		Severity string `json:"severity"`
		Lines    []struct {
			Item       string `json:"item"`
			Value      string `json:"value"`
			Severity   string `json:"severity"`
			Next       string `json:"next"`
			NotChecked bool   `json:"not_checked"`
		} `json:"lines"`
	} `json:"areas"`
	NotChecked []string `json:"not_checked"`
}

// filed are the reports of a kind.
func (p *page) filed(kind string) (wire.FiledReports, error) {
	var list wire.FiledReports
	return list, p.ask(routeListReports, wire.ListReports{Kind: kind, Most: perPage}, &list)
}

// one is the report of a page's address, from the list of its kind.
func (p *page) one(kind string) (*wire.FiledReport, error) {
	n, err := strconv.Atoi(p.r.PathValue("seq"))
	list := wire.FiledReports{}
	if err == nil {
		err = p.ask(routeListReports, wire.ListReports{Kind: kind, Most: 500}, &list)
	}
	if err != nil {
		return nil, err
	}
	for _, r := range list.Reports {
		if r.Sequence == n {
			return &r, nil
		}
	}
	return nil, &Refusal{wire.Problem{Status: http.StatusNotFound, Code: "not_found", Detail: "没有这份报告，或已早于最近 500 份 (no such report, or older than the last 500)"}}
}

// reportPages are the pages of one report: itself, its files, its receipt.
func reportPages(c *Console, kind, section string) {
	c.page("GET "+section+"/{seq}", func(p *page) {
		p.Section = section
		r, err := p.one(kind)
		if err != nil {
			p.fail(err)
			return
		}
		data := map[string]any{"Filed": r, "Kind": kind, "Title": reportTitles[kind], "Names": reportNames, "Section": section}
		for _, f := range r.Files {
			if !strings.HasSuffix(f.Name, ".json") {
				continue
			}
			var content wire.ReportContent
			switch err := p.ask(routeReadReport, wire.ReadReport{Sequence: r.Sequence, File: f.Name}, &content).(type) {
			case nil:
				var report patrolReport
				if kind == "patrol" && json.Unmarshal(content.Content, &report) == nil {
					data["Patrol"] = report
				} else {
					data["Text"] = string(content.Content)
				}
			case *Refusal:
				data["Unread"] = err
			default:
				p.fail(err)
				return
			}
			break
		}
		p.show("report", data)
	})
	c.page("GET "+section+"/{seq}/file", func(p *page) {
		p.Section = section
		r, err := p.one(kind)
		var content wire.ReportContent
		if err == nil {
			err = p.ask(routeReadReport, wire.ReadReport{Sequence: r.Sequence, File: p.r.URL.Query().Get("name")}, &content)
		}
		if err != nil {
			p.fail(err)
			return
		}
		media := "application/octet-stream"
		switch path.Ext(content.Name) {
		case ".json":
			media = "application/json"
		case ".html":
			media = "text/html; charset=utf-8"
		}
		attach(p.w, content.Name, media)
		p.deliver(content.Content)
	})
}

func patrolRoutes(c *Console) {
	const section = "/console/patrol"
	show := func(p *page) {
		p.Section = section
		var s applianceState
		list, err := p.filed("patrol")
		if err == nil {
			err = p.ask(routeState, nil, &s)
		}
		if err != nil {
			p.fail(err)
			return
		}
		p.show("patrol", map[string]any{"List": list, "Names": reportNames, "Periods": periods, "Section": section, "Progress": p.progress("patrol", &s)})
	}
	c.page("GET "+section, show)
	c.page("POST "+section, func(p *page) {
		p.acted(p.work("patrol", routePatrol, wire.RunPatrol{Period: p.Form.Get("period")}), section, "begun", func() { show(p) })
	})
	reportPages(c, "patrol", section)
}

func drillRoutes(c *Console) {
	const section = "/console/drills"
	show := func(p *page) {
		p.Section = section
		list, err := p.filed("drill")
		var now wire.DrillStatus
		if err == nil {
			err = p.ask(routeDrill, nil, &now)
		}
		if err != nil {
			p.fail(err)
			return
		}
		if now.Drill != nil {
			p.refresh(workEvery)
		}
		p.show("drills", map[string]any{"List": list, "Names": reportNames, "Section": section, "Now": now.Drill})
	}
	c.page("GET "+section, show)
	c.page("POST "+section+"/{id}/end", func(p *page) {
		p.acted(p.ask(routeEndDrill, wire.EndDrill{}, nil, p.r.PathValue("id")), section, "ended", func() { show(p) })
	})
	reportPages(c, "drill", section)
}

func assessRoutes(c *Console) {
	const section = "/console/assess"
	show := func(p *page) {
		p.Section = section
		if !p.only(routeAssess) {
			return
		}
		var s applianceState
		if err := p.ask(routeState, nil, &s); err != nil {
			p.fail(err)
			return
		}
		data := map[string]any{"Progress": p.progress("assess", &s)}
		if _, r, err := p.pack(); err == nil {
			data["Report"], data["Shown"], data["Failed"], data["None"] = r, r.Count(assess.Shown), r.Count(assess.Failed), r.Count(assess.NotEvidenced)
		}
		p.show("assess", data)
	}
	c.page("GET "+section, show)
	c.page("POST "+section, func(p *page) {
		req := wire.Assess{Nonce: strings.TrimSpace(p.Form.Get("nonce")), Assessor: strings.TrimSpace(p.Form.Get("assessor")), Full: p.Form.Get("full") != ""}
		var err error
		if req.Products, err = products(upload(p, "products")); err == nil {
			if err = assess.CheckNonceForm(req.Nonce); err != nil { // before anything takes long
				err = &Refusal{wire.Problem{Status: http.StatusBadRequest, Code: "invalid_request", Title: "请求有误", Field: "nonce", Detail: err.Error(), Next: "由测评方给出 (the assessor gives it)"}}
			}
		}
		if err == nil {
			err = p.work("assess", routeAssess, req)
		}
		p.acted(err, section, "begun", func() { show(p) })
	})
	for _, form := range []string{"json", "html"} {
		c.page("GET "+section+"/pack."+form, func(p *page) {
			if p.Section = section; !p.only(routeAssess) {
				return
			}
			pack, r, err := p.pack()
			if err != nil {
				p.fail(&Refusal{wire.Problem{Status: http.StatusNotFound, Code: "not_found", Detail: "没有证据包：尚未制作、没有完成，或已满一小时 (there is no pack: none was made, or it is older than an hour)", Next: "重新制作 (make one)"}})
				return
			}
			name := "assess-" + r.Header.Nonce + "." + form
			if form == "json" {
				attach(p.w, name, "application/json")
				p.deliver(pack)
				return
			}
			parsed, _, err := assess.Parse(pack)
			var b bytes.Buffer
			if err == nil {
				err = assesspage.Render(&b, parsed, r)
			}
			if err != nil {
				p.fail(err)
				return
			}
			attach(p.w, name, "text/html; charset=utf-8")
			p.deliver(b.Bytes())
		})
	}
}

// pack is the last one that was made.
func (p *page) pack() ([]byte, *assess.Report, error) {
	w := p.c.works.last("assess")
	if w == nil || w.Answer == nil {
		return nil, nil, errNoPack
	}
	var made wire.Assessed
	if err := json.Unmarshal(w.Answer, &made); err != nil {
		return nil, nil, err
	}
	_, r, err := assess.Parse(made.Pack)
	return made.Pack, r, err
}

var errNoPack = &Refusal{}

// products reads the file of certified products; none is none.
func products(file []byte) ([]assess.Product, error) {
	if len(file) == 0 {
		return nil, nil
	}
	var list struct {
		Products []assess.Product `toml:"products"`
	}
	if err := toml.NewDecoder(bytes.NewReader(file)).DisallowUnknownFields().Decode(&list); err != nil {
		return nil, &Refusal{wire.Problem{Status: http.StatusBadRequest, Code: "invalid_request", Title: "请求有误", Field: "products", Detail: err.Error(), Next: "格式见 docs/assess.md (see there)"}}
	}
	return list.Products, nil
}
