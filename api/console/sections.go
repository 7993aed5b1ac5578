package console

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

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
		{groupAudit, [2]string{"记录与证据", "Records and evidence"}, "/console/records", []string{routeSearchRecords}, recordRoutes},
		{groupAudit, [2]string{"变更日志", "Changes"}, "/console/changes", []string{routeChanges}, changeRoutes},
		{groupAudit, [2]string{"日志核验", "Journal"}, "/console/journal", []string{routeVerify}, journalRoutes},
		{groupMachine, [2]string{"时间", "Time"}, "/console/time", []string{routeTime}, timeRoutes},
		{groupMachine, [2]string{"密码机", "Cipher machines"}, "/console/machines", []string{routeMachines}, machineRoutes},
		{groupMachine, [2]string{"时间戳服务", "Timestamping"}, "/console/tsa", []string{routeTSA}, tsaRoutes},
		{groupMachine, [2]string{"证书与信任", "Certificates"}, "/console/certificates", []string{routeCertificates}, certificateRoutes},
		{groupMachine, [2]string{"备份", "Backups"}, "/console/backups", []string{routeBackups}, backupRoutes},
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

const (
	overviewEvery = 15 // seconds
	// overviewTimes is how often the overview asks by itself: a session that nobody uses has to end.
	overviewTimes = 40
)

// Again is what a page that is refreshed asks for next.
func (p *page) Again() string {
	n, _ := strconv.Atoi(p.r.URL.Query().Get("n"))
	return "/console/?n=" + strconv.Itoa(n+1)
}

// A sample is the counters at a moment.
type sample struct {
	at                      time.Time
	entries, signed, stamps float64
}

// rates are what was done a second between the oldest sample of the last minutes and now.
type rates struct {
	Known                    bool
	Over                     float64 // seconds
	Entries, Signed, Stamped float64
}

const sampleFor = 2 * time.Minute

func (c *Console) rates(now sample) rates {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.seen); n > 0 && (now.entries < c.seen[n-1].entries || now.at.Before(c.seen[n-1].at)) {
		c.seen = nil // the counters began anew
	}
	for len(c.seen) > 1 && now.at.Sub(c.seen[0].at) > sampleFor {
		c.seen = c.seen[1:]
	}
	if n := len(c.seen); n == 0 || now.at.Sub(c.seen[n-1].at) >= time.Second {
		c.seen = append(c.seen, now)
	}
	first := c.seen[0]
	over := now.at.Sub(first.at).Seconds()
	if over < 1 {
		return rates{}
	}
	return rates{true, over, (now.entries - first.entries) / over, max(0, now.signed-first.signed) / over, max(0, now.stamps-first.stamps) / over}
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
	Listeners map[string]string `json:"listeners"`
	Warnings  []string          `json:"warnings"`
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

func overviewRoutes(c *Console) {
	c.page("GET /console/{$}", func(p *page) {
		p.Section = "/console/"
		var s applianceState
		if err := p.ask(routeState, nil, &s); err != nil {
			p.fail(err)
			return
		}
		now := sample{at: c.cfg.Now(), entries: float64(s.Journal.Entries)}
		for _, m := range s.Machines {
			for _, slot := range m.Slots {
				switch slot.Slot {
				case "staff":
					now.signed += float64(slot.Done)
				case "tsa":
					now.stamps += float64(slot.Done)
				}
			}
		}
		if n, _ := strconv.Atoi(p.r.URL.Query().Get("n")); n < overviewTimes && p.r.URL.Query().Get("still") == "" {
			p.Refresh = overviewEvery
		}
		p.show("overview", map[string]any{"State": s, "Rates": c.rates(now)})
	})
}

const (
	routeTime          = "GET /admin/v1/time"
	routeHistory       = "POST /admin/v1/time/history"
	routeAddSource     = "POST /admin/v1/time/sources"
	routeRemoveSource  = "POST /admin/v1/time/sources/:name/remove"
	routeMachines      = "GET /admin/v1/machines"
	routeKeys          = "GET /admin/v1/keys"
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
		body := map[string]any{"name": f.Get("name"), "group": f.Get("group"), "address": f.Get("address"), "reason": f.Get("reason")}
		if f.Get("force") != "" {
			body["force"] = true
		}
		p.acted(p.ask(routeAddSource, body, nil), "/console/time", "changed", func() { show(p) })
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

type key struct {
	Slot      string   `json:"slot"`
	Label     string   `json:"label"`
	Algorithm string   `json:"algorithm"`
	Owner     string   `json:"owner"`
	Kind      string   `json:"kind"`
	State     string   `json:"state"`
	Machines  []string `json:"machines"`
	Uses      uint64   `json:"uses"`
	Born      string   `json:"born"`
	Due       string   `json:"rotation_due"`
}

// shownKeys is how many keys the replica matrix has; those of staff are thousands.
const shownKeys = 200

func machineRoutes(c *Console) {
	show := func(p *page) {
		p.Section = "/console/machines"
		var machines []machine
		if err := p.ask(routeMachines, nil, &machines); err != nil {
			p.fail(err)
			return
		}
		var inventory struct {
			Keys     []key    `json:"keys"`
			Warnings []string `json:"warnings"`
		}
		want, asked := p.r.URL.Query().Get("key"), p.r.URL.Query().Has("key")
		if asked && p.May(routeKeys) {
			if err := p.ask(routeKeys, nil, &inventory); err != nil {
				p.fail(err)
				return
			}
		}
		var keys []key
		omitted := 0
		for _, k := range inventory.Keys {
			switch {
			case want != "" && !strings.Contains(k.Label+" "+k.Owner, want):
			case len(keys) == shownKeys:
				omitted++
			default:
				keys = append(keys, k)
			}
		}
		p.show("machines", map[string]any{"Machines": machines, "Asked": asked, "Keys": keys, "Omitted": omitted, "Want": want, "Warnings": inventory.Warnings})
	}
	c.page("GET /console/machines", show)
	for act, route := range map[string]string{"drain": routeDrain, "resume": routeResume, "remove": routeRemoveMachine} {
		c.page("POST /console/machines/{name}/"+act, func(p *page) {
			p.acted(p.ask(route, reason(p), nil, p.r.PathValue("name")), "/console/machines", "changed", func() { show(p) })
		})
	}
}

func backupRoutes(c *Console) {
	c.page("GET /console/backups", func(p *page) {
		p.Section = "/console/backups"
		var b struct {
			Custodians *struct {
				Set       string   `json:"set"`
				Key       string   `json:"key"`
				Threshold int      `json:"threshold"`
				Holders   []string `json:"holders"`
			} `json:"custodians"`
			Last *struct {
				ID, Node, SM3, Base, Set string
				Entries                  uint64
				At                       struct{ Micros int64 }
			} `json:"last"`
			Unfinished map[string]time.Time `json:"unfinished"`
			Restored   string               `json:"restored_epoch"`
			Lost       json.RawMessage      `json:"lost"`
		}
		if err := p.ask(routeBackups, nil, &b); err != nil {
			p.fail(err)
			return
		}
		last := time.Time{}
		if b.Last != nil {
			last = time.UnixMicro(b.Last.At.Micros)
		}
		p.show("backups", map[string]any{"Backups": b, "At": last})
	})
}

func helpRoutes(c *Console) {
	c.page("GET /console/help", func(p *page) {
		p.Section = "/console/help"
		p.show("help", map[string]any{"Codes": c.cfg.Codes})
	})
}

func aboutRoutes(c *Console) {
	c.page("GET /console/about", func(p *page) {
		p.Section = "/console/about"
		var s applianceState
		if err := p.ask(routeState, nil, &s); err != nil {
			p.fail(err)
			return
		}
		p.show("about", map[string]any{"State": s})
	})
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
