package console

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"yinjian/api/wire"
)

const (
	routeSearchRecords = "POST /admin/v1/records/search"
	routeExamine       = "POST /admin/v1/records/:id/examine"
	routeChanges       = "POST /admin/v1/changes"
	routeVerify        = "POST /admin/v1/audit/verify"
	routeCompare       = "POST /admin/v1/compare"
	routeSweep         = "POST /admin/v1/sweep"
)

// day is a form's date as the beginning of that day in Beijing, in RFC 3339; "" where there is none. past adds a day, for an
// end that is included.
func day(s string, past int) string {
	t, err := time.ParseInLocation(time.DateOnly, s, beijing)
	if err != nil {
		return s // the route says what is wrong with it
	}
	return t.AddDate(0, 0, past).Format(time.RFC3339)
}

// kindNames are the entries that people look for.
var kindNames = [][3]string{
	{"sign.v1", "签名", "signature"}, {"tsa.token.v1", "时间戳", "timestamp"}, {"", "全部条目", "all entries"},
}

// place reads where a page begins from the address.
func place(q url.Values) *wire.RecordPlace {
	at, err := strconv.Atoi(q.Get("at"))
	seq, err2 := strconv.Atoi(q.Get("seq"))
	if err != nil || err2 != nil {
		return nil
	}
	return &wire.RecordPlace{AtUS: at, Node: q.Get("node"), Epoch: q.Get("epoch"), Sequence: seq}
}

func recordRoutes(c *Console) {
	c.page("GET /console/records", func(p *page) {
		p.Section = "/console/records"
		q := p.r.URL.Query()
		kind := "sign.v1"
		if q.Has("kind") {
			kind = q.Get("kind")
		}
		get := func(name string) string { return strings.TrimSpace(q.Get(name)) }
		ask := wire.SearchRecords{
			RecordID: strings.ToLower(get("record")), Kind: kind, Application: get("application"), Signer: get("signer"), Department: get("department"),
			Since: day(q.Get("since"), 0), Until: day(q.Get("until"), 1), After: place(q), Most: perPage,
		}
		data := map[string]any{"Query": q, "Kind": kind, "Kinds": kindNames, "Paged": q.Has("at")}
		var found wire.RecordPage
		switch err := p.ask(routeSearchRecords, ask, &found).(type) {
		case nil:
			data["Found"] = found
		case *Refusal:
			p.Refusal = err
		default:
			p.fail(err)
			return
		}
		if n := found.Next; n != nil {
			more := url.Values{}
			for _, k := range []string{"record", "kind", "application", "signer", "department", "since", "until"} {
				if q.Has(k) {
					more.Set(k, q.Get(k))
				}
			}
			more.Set("at", strconv.Itoa(n.AtUS))
			more.Set("node", n.Node)
			more.Set("epoch", n.Epoch)
			more.Set("seq", strconv.Itoa(n.Sequence))
			data["More"] = "/console/records?" + more.Encode()
		}
		p.show("records", data)
	})
	c.page("GET /console/records/{id}", func(p *page) { p.examine(nil) })
	c.page("POST /console/records/{id}", func(p *page) {
		f, _, err := p.r.FormFile("document")
		if err != nil {
			p.examine(nil)
			return
		}
		defer f.Close()
		document, err := io.ReadAll(io.LimitReader(f, maxUpload))
		if err != nil {
			p.problem(http.StatusBadRequest, "invalid_request", "文件无法读出 (the file cannot be read)")
			return
		}
		p.examine(document)
	})
	c.page("GET /console/records/{id}/evidence.json", func(p *page) {
		var e examined
		if err := p.ask(routeExamine, wire.ExamineRecord{}, &e, p.r.PathValue("id")); err != nil {
			p.fail(err)
			return
		}
		p.w.Header().Set("Content-Disposition", fmt.Sprintf("attachment; filename=%q", "evidence-"+reFile.ReplaceAllString(p.r.PathValue("id"), "")+".json"))
		p.w.Header().Set("Content-Type", "application/json")
		_, _ = p.w.Write(e.Evidence)
	})
}

// reFile is what the name of a file has not.
var reFile = regexp.MustCompile(`[^0-9a-f]`)

// examined is a record under the microscope.
type examined struct {
	Evidence json.RawMessage `json:"evidence"`
	Report   struct {
		Verdict string `json:"verdict"`
		Summary string `json:"summary"`
		Checks  []struct {
			ID     string `json:"id"`
			Status string `json:"status"`
			Detail string `json:"detail"`
		} `json:"checks"`
		Missing    []string `json:"missing"`
		Statements []string `json:"statements"`
		Signer     string   `json:"signer"`
		GenTime    string   `json:"gen_time"`
		Accuracy   string   `json:"accuracy"`
	} `json:"report"`
	Parts []struct {
		ID      string `json:"id"`
		Title   string `json:"title"`
		Figures []struct {
			Name  string `json:"name"`
			How   string `json:"how"`
			Value string `json:"value"`
			Holds *bool  `json:"holds"`
		} `json:"figures"`
		DER []string `json:"der"`
	} `json:"parts"`
}

type bundle struct {
	RecordID string `json:"record_id"`
	Record   struct {
		Application     string `json:"application"`
		Campus          string `json:"campus"`
		Signer          string `json:"signer"`
		Department      string `json:"department"`
		Role            string `json:"role"`
		DocumentType    string `json:"document_type"`
		DocumentID      string `json:"document_id"`
		MediaType       string `json:"media_type"`
		Size            int64  `json:"size"`
		DigestAlgorithm string `json:"digest_algorithm"`
		Digest          string `json:"digest"`
		Test            bool   `json:"test"`
	} `json:"record"`
	Signature struct {
		Algorithm string `json:"algorithm"`
		Form      string `json:"form"`
	} `json:"signature"`
	Journal struct {
		Node     string `json:"node"`
		Epoch    string `json:"epoch"`
		Sequence uint64 `json:"sequence"`
	} `json:"journal"`
}

func (p *page) examine(document []byte) {
	p.Section = "/console/records"
	var e examined
	err := p.ask(routeExamine, wire.ExamineRecord{Document: document}, &e, p.r.PathValue("id"))
	if r, ok := err.(*Refusal); ok && r.Code == "not_found" && p.elsewhere() {
		return
	}
	if err != nil {
		p.fail(err)
		return
	}
	var b bundle
	if err := json.Unmarshal(e.Evidence, &b); err != nil {
		p.fail(err)
		return
	}
	p.show("record", map[string]any{"E": e, "B": b, "Given": document != nil})
}

// elsewhere shows what this appliance knows of a record that is in another's journal: its row in the central database. It
// reports false where there is none such.
func (p *page) elsewhere() bool {
	var found wire.RecordPage
	var s applianceState
	id := strings.ToLower(p.r.PathValue("id"))
	if p.ask(routeSearchRecords, wire.SearchRecords{RecordID: id, Most: 10}, &found) != nil || p.ask(routeState, nil, &s) != nil {
		return false
	}
	var rows []wire.RecordRow
	for _, r := range found.Records {
		if r.Node != s.Node {
			rows = append(rows, r)
		}
	}
	if len(rows) == 0 {
		return false
	}
	peer := ""
	if s.Peer != nil && s.Peer.Node == rows[0].Node {
		peer = s.Peer.Campus
	}
	p.show("elsewhere", map[string]any{"Rows": rows, "ID": id, "Node": rows[0].Node, "Peer": peer, "Up": s.Peer != nil && s.Peer.Up, "Own": s})
	return true
}

// maxExport is how many lines a file of changes has at most; the route gives no more.
const maxExport = 10_000

func changeRoutes(c *Console) {
	ask := func(p *page, limit int) (found wire.Changes, err error) {
		q := p.r.URL.Query()
		err = p.ask(routeChanges, wire.ListChanges{
			Object: strings.TrimSpace(q.Get("object")), Actor: strings.TrimSpace(q.Get("actor")), Kind: strings.TrimSpace(q.Get("kind")),
			Since: day(q.Get("since"), 0), Until: day(q.Get("until"), 1), Limit: limit,
		}, &found)
		slices.Reverse(found.Changes) // the newest first
		return found, err
	}
	c.page("GET /console/changes", func(p *page) {
		p.Section = "/console/changes"
		q := p.r.URL.Query()
		q.Del("notice")
		data := map[string]any{"Query": q, "Export": q.Encode()}
		switch found, err := ask(p, 100); err := err.(type) {
		case nil:
			data["Found"] = found
		case *Refusal:
			p.Refusal = err
		default:
			p.fail(err)
			return
		}
		p.show("changes", data)
	})
	c.page("GET /console/changes/export.csv", func(p *page) {
		p.Section = "/console/changes"
		found, err := ask(p, maxExport)
		if err != nil {
			p.fail(err)
			return
		}
		rows := [][]string{{"时间 time (UTC+8)", "节点 node", "纪元 epoch", "序号 sequence", "种类 kind", "动作 act", "对象 object", "修改人 by", "为何 why", "改前 before", "改后 after", "MAC"}}
		for _, x := range found.Changes {
			rows = append(rows, []string{when(x.Time), x.Node, x.Epoch, strconv.FormatUint(x.Sequence, 10), x.Kind, x.Act, x.Object, x.Actor, x.Reason, x.Before, x.After, x.MAC})
		}
		if found.Omitted > 0 {
			rows = append(rows, append([]string{fmt.Sprintf("另有更早的 %d 条未列出，请缩小时间范围 (older ones left out: narrow the dates)", found.Omitted)}, make([]string, len(rows[0])-1)...))
		}
		p.table("changes", rows)
	})
	c.page("GET /console/changes/export.json", func(p *page) {
		p.Section = "/console/changes"
		found, err := ask(p, maxExport)
		var b []byte
		if err == nil {
			b, err = json.MarshalIndent(found, "", "  ")
		}
		if err != nil {
			p.fail(err)
			return
		}
		attach(p.w, p.c.fileName("changes")+".json", "application/json")
		p.deliver(b)
	})
}

// fileName is what a file is called that is made now, without its end.
func (c *Console) fileName(what string) string {
	return what + "-" + c.cfg.Now().In(beijing).Format("20060102T150405")
}

// table sends a table for a spreadsheet: CSV in UTF-8 with a mark that says so. A cell that such a program would take for a
// formula, the wide forms of Chinese input too, begins with a quote.
func (p *page) table(what string, rows [][]string) {
	var b bytes.Buffer
	b.WriteString("\ufeff")
	w := csv.NewWriter(&b)
	for _, row := range rows {
		for i, cell := range row {
			if strings.IndexAny(cell, "=+-@＝＋－＠\t\r\n") == 0 {
				row[i] = "'" + cell
			}
		}
		_ = w.Write(row) // to memory
	}
	w.Flush()
	attach(p.w, p.c.fileName(what)+".csv", "text/csv; charset=utf-8")
	p.deliver(b.Bytes())
}

// tasks are what the audit administrator has the appliance do, and look at the answer of.
var tasks = map[string]struct {
	Route string
	Title [2]string
}{
	"verify":  {routeVerify, [2]string{"核验日志", "Verify the journal"}},
	"compare": {routeCompare, [2]string{"与中心库对账", "Compare with the central database"}},
	"sweep":   {routeSweep, [2]string{"清查中心库", "Sweep the central database"}},
}

// A task is what a page shows of one.
type task struct {
	Progress
	Title  [2]string
	Report *taskReport
	Wrong  uint64
}

// A taskReport is what the answers of these routes have in common; what one has not is empty.
type taskReport struct {
	Entries     uint64            `json:"entries"`
	Checkpoints uint64            `json:"checkpoints"`
	Rows        uint64            `json:"rows"`
	MACs        uint64            `json:"macs_checked"`
	Findings    []json.RawMessage `json:"findings"`
	Differences []json.RawMessage `json:"differences"`
	Omitted     uint64            `json:"omitted"`
	Remarks     []string          `json:"remarks"`
}

func journalRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/journal"
		if !p.only(routeVerify) {
			return
		}
		var s applianceState
		if err := p.ask(routeState, nil, &s); err != nil {
			p.fail(err)
			return
		}
		var all []task
		for _, name := range []string{"verify", "compare", "sweep"} {
			one := task{Progress: p.progress(name, &s), Title: tasks[name].Title}
			if w := one.Work; w != nil && w.Answer != nil {
				one.Report = new(taskReport)
				if err := json.Unmarshal(w.Answer, one.Report); err != nil {
					p.fail(err)
					return
				}
				one.Wrong = uint64(len(one.Report.Findings)+len(one.Report.Differences)) + one.Report.Omitted
			}
			all = append(all, one)
		}
		p.show("journal", map[string]any{"State": s, "Tasks": all})
	}
	c.page("GET /console/journal", show)
	for name, task := range tasks {
		c.page("POST /console/journal/"+name, func(p *page) {
			p.acted(p.work(name, task.Route, map[string]any{}), "/console/journal", "begun", func() { show(p) })
		})
		c.page("GET /console/journal/"+name+"/report.json", func(p *page) {
			p.Section = "/console/journal"
			w := c.works.last(name)
			if !p.only(task.Route) {
				return
			}
			if w == nil || w.Answer == nil {
				p.problem(http.StatusNotFound, "not_found", "没有报告：尚未做过、没有完成，或已满一小时 (there is no report: none was made, or it is older than an hour)")
				return
			}
			attach(p.w, name+"-"+w.Ended.In(beijing).Format("20060102T150405")+".json", "application/json")
			p.deliver(w.Answer)
		})
	}
}
