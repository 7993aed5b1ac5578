package console

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
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
	if err := p.ask(routeExamine, wire.ExamineRecord{Document: document}, &e, p.r.PathValue("id")); err != nil {
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

func changeRoutes(c *Console) {
	c.page("GET /console/changes", func(p *page) {
		p.Section = "/console/changes"
		q := p.r.URL.Query()
		ask := wire.ListChanges{
			Object: strings.TrimSpace(q.Get("object")), Actor: strings.TrimSpace(q.Get("actor")), Kind: strings.TrimSpace(q.Get("kind")),
			Since: day(q.Get("since"), 0), Until: day(q.Get("until"), 1), Limit: 100,
		}
		data := map[string]any{"Query": q}
		var found wire.Changes
		switch err := p.ask(routeChanges, ask, &found).(type) {
		case nil:
			for i, j := 0, len(found.Changes)-1; i < j; i, j = i+1, j-1 { // the newest first
				found.Changes[i], found.Changes[j] = found.Changes[j], found.Changes[i]
			}
			data["Found"] = found
		case *Refusal:
			p.Refusal = err
		default:
			p.fail(err)
			return
		}
		p.show("changes", data)
	})
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

func journalRoutes(c *Console) {
	show := func(p *page, data map[string]any) {
		p.Section = "/console/journal"
		if !p.only(routeVerify) {
			return
		}
		var s applianceState
		if err := p.ask(routeState, nil, &s); err != nil {
			p.fail(err)
			return
		}
		data["State"], data["Tasks"] = s, tasks
		p.show("journal", data)
	}
	c.page("GET /console/journal", func(p *page) { show(p, map[string]any{}) })
	for name, task := range tasks {
		c.page("POST /console/journal/"+name, func(p *page) {
			var report struct {
				Entries     uint64            `json:"entries"`
				Checkpoints uint64            `json:"checkpoints"`
				Findings    []json.RawMessage `json:"findings"`
				Differences []json.RawMessage `json:"differences"`
				Remarks     []string          `json:"remarks"`
			}
			var whole json.RawMessage
			err := p.ask(task.Route, map[string]any{}, &whole)
			if err == nil {
				err = json.Unmarshal(whole, &report)
			}
			if e, ok := err.(*Refusal); ok {
				p.Refusal = e
				show(p, map[string]any{})
				return
			}
			if err != nil {
				p.fail(err)
				return
			}
			show(p, map[string]any{"Done": task.Title, "Report": report, "Wrong": len(report.Findings) + len(report.Differences), "Whole": whole})
		})
	}
}
