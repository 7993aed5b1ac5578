package console

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"yinjian/api/wire"
)

const (
	overviewEvery = 15 // seconds
	// refreshes is how often a page asks by itself: a session that nobody uses has to end.
	refreshes = 40

	routeAlarms = "GET /admin/v1/alarms"
)

// refresh has the page ask for itself again, for a while.
func (p *page) refresh(seconds int) {
	q := url.Values{}
	for k, v := range p.r.URL.Query() {
		if k != "notice" {
			q[k] = v
		}
	}
	n, _ := strconv.Atoi(q.Get("n"))
	if p.r.Method != http.MethodGet || n < 0 || n >= refreshes || q.Has("still") {
		return
	}
	q.Set("n", strconv.Itoa(n+1))
	p.Refresh, p.Again = seconds, p.r.URL.Path+"?"+q.Encode()
}

// An alarm is one that was raised and is not over.
type alarm struct {
	Code     string `json:"code"`
	Object   string `json:"object"`
	Severity string `json:"severity"`
	Detail   string `json:"detail"`
	Title    string `json:"title"`
	Next     string `json:"next"`
	ForS     int64  `json:"for_s"`
}

// overview asks for the state and, where the role may, the alarms: both are in the appliance's memory.
func overviewRoutes(c *Console) {
	c.page("GET /console/{$}", func(p *page) {
		p.Section = "/console/"
		var s applianceState
		if err := p.ask(routeState, nil, &s); err != nil {
			p.fail(err)
			return
		}
		data := map[string]any{"State": s, "Works": workTitles, "Kinds": reportTitles, "Names": reportNames}
		if p.May(routeAlarms) {
			var a struct {
				Active []alarm `json:"active"`
			}
			if err := p.ask(routeAlarms, nil, &a); err != nil {
				p.fail(err)
				return
			}
			data["Alarms"], data["Asked"] = a.Active, true
		}
		p.refresh(overviewEvery)
		p.show("overview", data)
	})
}

const routeMissing = "GET /admin/v1/backups/missing"

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
			Unfinished map[string]string `json:"unfinished"`
			Restored   string            `json:"restored_epoch"`
			Lost       *struct {
				Entries    uint64 `json:"entries"`
				Signatures uint64 `json:"signatures"`
				Reaches    bool   `json:"reaches"`
			} `json:"lost"`
			Reports []struct {
				Kind    string `json:"kind"`
				Backup  string `json:"backup"`
				At      string `json:"at"`
				Passed  bool   `json:"passed"`
				Persons string `json:"persons"`
			} `json:"reports"`
		}
		if err := p.ask(routeBackups, nil, &b); err != nil {
			p.fail(err)
			return
		}
		data := map[string]any{"Backups": b}
		if b.Last != nil {
			data["At"] = microTime(b.Last.At.Micros)
		}
		if b.Lost != nil && b.Lost.Entries > 0 {
			var lost struct {
				Missing []struct {
					Record      string `json:"record_id"`
					Kind        string `json:"kind"`
					Application string `json:"application"`
					AtUS        int64  `json:"at_us"`
				} `json:"missing"`
			}
			if err := p.ask(routeMissing, nil, &lost); err == nil {
				data["Missing"] = lost.Missing[:min(len(lost.Missing), 100)]
			}
		}
		p.show("backups", data)
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

const routeSystem = "GET /admin/v1/system"

func systemRoutes(c *Console) {
	c.page("GET /console/system", func(p *page) {
		p.Section = "/console/system"
		var s struct {
			Program struct {
				Version, Go, Revision, Path, SM3 string
			} `json:"program"`
			Process struct {
				PID                   int
				User, Threads, Memory string
				UpS                   int64 `json:"up_s"`
				Goroutines            int
				Files                 int `json:"open_files"`
			} `json:"process"`
			Host struct {
				Name, System, Kernel, Arch, Zone string
				CPUs                             int
				MemoryBytes                      uint64 `json:"memory_bytes"`
				UpS                              int64  `json:"up_s"`
			} `json:"host"`
			Disks []struct {
				Name, Error string
				Free        uint64 `json:"free_bytes"`
				Total       uint64 `json:"total_bytes"`
			} `json:"disks"`
			Addresses []struct {
				Interface string
				Up        bool
				Addresses []string
			} `json:"addresses"`
			Listeners []struct {
				Name, Setting, Address string
				Certificate            *struct {
					Subject, Issuer, Serial string
					NotAfter                string `json:"not_after"`
					DaysLeft                int    `json:"days_left"`
				}
			} `json:"listeners"`
			Config struct{ File, SM3, Started, Error string } `json:"config"`
			PINs   string                                     `json:"pins"`
		}
		if err := p.ask(routeSystem, nil, &s); err != nil {
			p.fail(err)
			return
		}
		p.show("system", map[string]any{"System": s})
	})
}

const routeSelftest = "GET /admin/v1/applications/:id/selftest"

func selftestRoutes(c *Console) {
	c.page("GET /console/selftest", func(p *page) {
		p.Section = "/console/selftest"
		var apps []application
		if err := p.ask(routeApplications, nil, &apps); err != nil {
			p.fail(err)
			return
		}
		var tests []application
		for _, a := range apps {
			if a.Test && !(a.Stopped && strings.HasPrefix(a.ID, "drill-")) { // of a drill that is over
				tests = append(tests, a)
			}
		}
		id := strings.TrimSpace(p.r.URL.Query().Get("application"))
		data := map[string]any{"Tests": tests, "ID": id, "Titles": selftestTitles}
		if id != "" {
			var s wire.Selftest
			switch err := p.ask(routeSelftest, nil, &s, id).(type) {
			case nil:
				data["Selftest"] = s
			case *Refusal:
				p.Refusal = err
			default:
				p.fail(err)
				return
			}
		}
		p.show("selftest", data)
	})
}

// selftestTitles are the steps of a self-test.
var selftestTitles = map[string][2]string{
	"header": {"Authorization 头", "Authorization header"}, "time": {"请求时间", "time of the request"}, "host": {"Host 头", "Host header"},
	"signature": {"HMAC-SM3", "HMAC-SM3"}, "certificate": {"TLS 客户端证书", "TLS client certificate"}, "outcome": {"结果", "outcome"},
}
