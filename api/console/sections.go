package console

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"yinjian/api/wire"
	"yinjian/ntp/plot"
)

// A section is a line of the navigation.
type section struct {
	Group, Title [2]string
	Path         string
	// needs are the routes of which one has to be open to the role; none: everybody's.
	needs  []string
	routes func(c *Console)
}

var (
	groupWatch   = [2]string{"运行", "Operation"}
	groupPeople  = [2]string{"业务", "Business"}
	groupAudit   = [2]string{"证据与审计", "Evidence and audit"}
	groupMachine = [2]string{"设备", "Appliance"}
	groupHelp    = [2]string{"帮助", "Help"}
)

// sections in the order of the navigation.
var sections []section

func init() {
	sections = []section{
		{groupWatch, [2]string{"概览", "Overview"}, "/console/", nil, overviewRoutes},
		{groupWatch, [2]string{"待批准事项", "Approvals"}, "/console/approvals", []string{routeApprovals}, approvalRoutes},
		{groupPeople, [2]string{"签名人", "Signers"}, "/console/signers", []string{routeSearchSigners}, signerRoutes},
		{groupPeople, [2]string{"应用", "Applications"}, "/console/applications", []string{routeApplications}, applicationRoutes},
		{groupPeople, [2]string{"应用自检", "Self-test of applications"}, "/console/selftest", []string{routeSelftest}, selftestRoutes},
		{groupAudit, [2]string{"记录与证据", "Records and evidence"}, "/console/records", []string{routeSearchRecords}, recordRoutes},
		{groupAudit, [2]string{"变更日志", "Changes"}, "/console/changes", []string{routeChanges}, changeRoutes},
		{groupAudit, [2]string{"日志核验", "Journal"}, "/console/journal", []string{routeVerify}, journalRoutes},
		{groupAudit, [2]string{"密评证据包", "Evaluator's pack"}, "/console/assess", []string{routeAssess}, assessRoutes},
		{groupAudit, [2]string{"巡检", "Patrols"}, "/console/patrol", []string{routeListReports}, patrolRoutes},
		{groupAudit, [2]string{"演练", "Drills"}, "/console/drills", []string{routeListReports}, drillRoutes},
		{groupMachine, [2]string{"时间", "Time"}, "/console/time", []string{routeTime}, timeRoutes},
		{groupMachine, [2]string{"密码机", "Cipher machines"}, "/console/machines", []string{routeMachines}, machineRoutes},
		{groupMachine, [2]string{"密钥", "Keys"}, "/console/keys", []string{routeSearchKeys}, keyRoutes},
		{groupMachine, [2]string{"时间戳服务", "Timestamping"}, "/console/tsa", []string{routeTSA}, tsaRoutes},
		{groupMachine, [2]string{"证书", "Certificates"}, "/console/certificates", []string{routeSearchCertificates}, certificateRoutes},
		{groupMachine, [2]string{"信任与吊销", "Trust and revocation"}, "/console/trust", []string{routeAnchors, routeCRLs}, trustRoutes},
		{groupMachine, [2]string{"管理员", "Administrators"}, "/console/administrators", []string{routeAdministrators}, administratorRoutes},
		{groupMachine, [2]string{"备份", "Backups"}, "/console/backups", []string{routeBackups}, backupRoutes},
		{groupMachine, [2]string{"运行日志", "Running log"}, "/console/logs", []string{routeLog}, logRoutes},
		{groupMachine, [2]string{"系统与网络", "System and network"}, "/console/system", []string{routeSystem}, systemRoutes},
		{groupMachine, [2]string{"设置", "Settings"}, "/console/settings", []string{routeSettings}, settingsRoutes},
		{groupMachine, [2]string{"映像与升级", "Image and updates"}, "/console/update", []string{routeUpdate}, updateRoutes},
		{groupHelp, [2]string{"帮助与错误码", "Help"}, "/console/help", nil, helpRoutes},
		{groupHelp, [2]string{"关于", "About"}, "/console/about", nil, aboutRoutes},
	}
}

// offered are the sections that the role may open.
func (p *page) offered() []section {
	var out []section
	for _, s := range sections {
		open := len(s.needs) == 0
		for _, route := range s.needs {
			open = open || p.May(route)
		}
		if open {
			out = append(out, s)
		}
	}
	return out
}

// What the layout asks for.

func (p *page) Version() string   { return p.c.version }
func (p *page) Release() string   { return p.c.cfg.Version }
func (p *page) ThemeName() string { return p.c.cfg.Theme.Name }

// LogoPath is the hospital's logo, or our mark.
func (p *page) LogoPath() string {
	if p.c.cfg.Theme.Logo != nil {
		return "/console/assets/logo"
	}
	return "/console/assets/mark.svg"
}

// Here is where the switch of languages leads back to.
func (p *page) Here() string {
	if p.r.Method != http.MethodGet {
		return within(p.Section)
	}
	return within(p.r.URL.RequestURI())
}

const routeState = "GET /admin/v1/state"

// applianceState is what pages show of the state.
type applianceState struct {
	State      string  `json:"state"`
	Ready      bool    `json:"ready"`
	Code       string  `json:"code"`
	Reason     string  `json:"reason"`
	Next       string  `json:"next"`
	Node       string  `json:"node"`
	Campus     string  `json:"campus"`
	Version    string  `json:"version"`
	UptimeS    float64 `json:"uptime_s"`
	Evaluation string  `json:"evaluation"`
	Time       struct {
		State      string  `json:"state"`
		Time       string  `json:"time"`
		BoundMS    float64 `json:"bound_ms"`
		Provenance string  `json:"provenance"`
	} `json:"time"`
	Machines []machine `json:"machines"`
	Journal  struct {
		Entries    uint64 `json:"entries"`
		Checkpoint uint64 `json:"checkpoint"`
		FreeBytes  uint64 `json:"free_bytes"`
		Failed     string `json:"failed"`
	} `json:"journal"`
	Projection struct {
		Shipped uint64 `json:"shipped"`
		Lag     uint64 `json:"lag"`
		Fork    bool   `json:"fork"`
		Error   string `json:"last_error"`
	} `json:"projection"`
	Peer *struct {
		Node   string  `json:"node"`
		Campus string  `json:"campus"`
		Up     bool    `json:"up"`
		AgeS   float64 `json:"age_s"`
	} `json:"peer"`
	Listeners  map[string]string `json:"listeners"`
	Warnings   []string          `json:"warnings"`
	Throughput struct {
		Signatures float64 `json:"signatures_per_s"`
		Timestamps float64 `json:"timestamps_per_s"`
		Entries    float64 `json:"entries_per_s"`
		OverS      float64 `json:"over_s"`
	} `json:"throughput"`
	Work    []working              `json:"work"`
	Reports map[string]*lastReport `json:"reports"`
}

// A working is something long that is under way in the appliance.
type working struct {
	Name  string `json:"name"`
	ForS  int64  `json:"for_s"`
	Done  uint64 `json:"done"`
	Total uint64 `json:"total"`
}

// A lastReport is the last of a kind that was filed.
type lastReport struct {
	Name    string `json:"name"`
	Outcome string `json:"outcome"`
	At      string `json:"at"`
}

type machine struct {
	Name   string `json:"name"`
	State  string `json:"state"`
	Reason string `json:"reason"`
	Since  string `json:"since"`
	Weight int    `json:"weight"`
	Added  bool   `json:"added"`
	Slots  []struct {
		Slot      string  `json:"slot"`
		State     string  `json:"state"`
		Reason    string  `json:"reason"`
		Keys      int     `json:"keys"`
		Only      int     `json:"keys_only_here"`
		UnderWay  int64   `json:"under_way"`
		Waiting   int64   `json:"waiting"`
		Done      int64   `json:"done"`
		Failed    int64   `json:"failed"`
		LatencyMS float64 `json:"latency_ms"`
	} `json:"slots"`
}

const (
	routeTime          = "GET /admin/v1/time"
	routeHistory       = "POST /admin/v1/time/history"
	routeAddSource     = "POST /admin/v1/time/sources"
	routeRemoveSource  = "POST /admin/v1/time/sources/:name/remove"
	routeReadmit       = "POST /admin/v1/time/readmit"
	routeMachines      = "GET /admin/v1/machines"
	routeAddMachine    = "POST /admin/v1/machines"
	routeDrain         = "POST /admin/v1/machines/:name/drain"
	routeResume        = "POST /admin/v1/machines/:name/resume"
	routeRemoveMachine = "POST /admin/v1/machines/:name/remove"
	routeBackups       = "GET /admin/v1/backups"
)

type timeReport struct {
	State      string `json:"state"`
	Time       string `json:"time"`
	BoundUS    int64  `json:"bound_us"`
	Provenance string `json:"provenance"`
	AccuracyUS int64  `json:"accuracy_us"`
	LeftS      int64  `json:"left_s"`
	MinSources int    `json:"min_sources"`
	HoldoverS  int64  `json:"holdover_max_s"`
	Round      struct {
		AgoS     float64  `json:"ago_s"`
		Agreed   []string `json:"agreed"`
		Rejected []string `json:"rejected"`
		OffsetUS int64    `json:"offset_us"`
		Error    string   `json:"error"`
	} `json:"round"`
	Workers []struct {
		Machine string  `json:"machine"`
		State   string  `json:"state"`
		BoundMS float64 `json:"bound_ms"`
		Wrong   string  `json:"wrong"`
	} `json:"workers"`
	Sources []struct {
		Name       string `json:"name"`
		Group      string `json:"group"`
		Address    string `json:"address"`
		Auth       string `json:"authentication"`
		State      string `json:"state"`
		Reason     string `json:"reason"`
		OffsetUS   int64  `json:"offset_us"`
		DistanceUS int64  `json:"root_distance_us"`
		RTTUS      int64  `json:"rtt_us"`
		Stratum    int    `json:"stratum"`
		RefID      string `json:"refid"`
	} `json:"sources"`
	Changes     json.RawMessage `json:"changes"`
	Evaluation  bool            `json:"simulated"`
	PendingNote string          `json:"note"`
}

// plotHours are the stretches that the plot of time can show.
var plotHours = []int{1, 6, 24, 72, 168}

func timeRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/time"
		p.waits("/admin/v1/time/")
		var report timeReport
		if err := p.ask(routeTime, nil, &report); err != nil {
			p.fail(err)
			return
		}
		p.show("time", map[string]any{"Time": report, "Hours": hoursOf(p.r), "Choices": plotHours})
	}
	c.page("GET /console/time", show)
	c.page("GET /console/time/plot.svg", func(p *page) {
		to := c.cfg.Now()
		from := to.Add(-time.Duration(hoursOf(p.r)) * time.Hour)
		d := plot.Data{Title: "", From: from, To: to, Zone: beijing}
		var h struct {
			AccuracyUS int64           `json:"accuracy_us"`
			Points     json.RawMessage `json:"points"`
			Hours      json.RawMessage `json:"hours"`
			Changes    json.RawMessage `json:"changes"`
		}
		err := p.ask(routeHistory, map[string]string{"from": from.UTC().Format(time.RFC3339), "to": to.UTC().Format(time.RFC3339)}, &h)
		if err == nil {
			d.Accuracy = time.Duration(h.AccuracyUS) * time.Microsecond
			err = errors.Join(json.Unmarshal(h.Points, &d.Points), json.Unmarshal(h.Hours, &d.Hours), json.Unmarshal(h.Changes, &d.Changes))
		}
		var picture []byte
		if err == nil {
			picture, err = plot.Draw(d)
		}
		if err != nil {
			http.NotFound(p.w, p.r)
			return
		}
		// A picture that is opened by itself has styles inside, and nothing else.
		p.w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox")
		p.w.Header().Set("Content-Type", "image/svg+xml")
		_, _ = p.w.Write(picture)
	})
	c.page("POST /console/time/sources", func(p *page) {
		f := p.Form
		body := wire.AddTimeSource{
			Name: f.Get("name"), Group: f.Get("group"), Address: f.Get("address"), Reason: f.Get("reason"), Force: f.Get("force") != "",
			KeyID: whole(f, "key_id"), KeyType: f.Get("key_type"), KeyFile: f.Get("key_file"),
		}
		p.acted(p.ask(routeAddSource, body, nil), "/console/time", "changed", func() { show(p) })
	})
	c.page("POST /console/time/readmit", func(p *page) {
		p.acted(p.ask(routeReadmit, reason(p), nil), "/console/time", "changed", func() { show(p) })
	})
	c.page("POST /console/time/sources/{name}/remove", func(p *page) {
		p.acted(p.ask(routeRemoveSource, reason(p), nil, p.r.PathValue("name")), "/console/time", "changed", func() { show(p) })
	})
}

func hoursOf(r *http.Request) int {
	n, _ := strconv.Atoi(r.URL.Query().Get("hours"))
	for _, h := range plotHours {
		if n == h {
			return h
		}
	}
	return 6
}

// reason is the body of a decision.
func reason(p *page) map[string]any { return map[string]any{"reason": p.Form.Get("reason")} }

func machineRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/machines"
		p.waits("/admin/v1/machines")
		var machines []machine
		if err := p.ask(routeMachines, nil, &machines); err != nil {
			p.fail(err)
			return
		}
		p.show("machines", map[string]any{"Machines": machines})
	}
	c.page("GET /console/machines", show)
	c.page("POST /console/machines", func(p *page) {
		body := wire.AddMachine{File: []byte(p.Form.Get("file")), Reason: p.Form.Get("reason")}
		p.acted(p.ask(routeAddMachine, body, nil), "/console/machines", "changed", func() { show(p) })
	})
	for act, route := range map[string]string{"drain": routeDrain, "resume": routeResume, "remove": routeRemoveMachine} {
		c.page("POST /console/machines/{name}/"+act, func(p *page) {
			body := wire.ChangeMachine{Reason: p.Form.Get("reason"), Force: p.Form.Get("force") != ""}
			p.acted(p.ask(route, body, nil, p.r.PathValue("name")), "/console/machines", "changed", func() { show(p) })
		})
	}
}

// values are a form's, without those that are empty.
func values(f url.Values, names ...string) map[string]any {
	out := map[string]any{}
	for _, n := range names {
		if v := strings.TrimSpace(f.Get(n)); v != "" {
			out[n] = v
		}
	}
	return out
}

// whole is a number of a form; what is none is sent as it is not, and refused by the route.
func whole(f url.Values, name string) int {
	v := strings.TrimSpace(f.Get(name))
	if v == "" {
		return 0
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		return -1
	}
	return n
}
