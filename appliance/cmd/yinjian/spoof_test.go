package main_test

import (
	"regexp"
	"slices"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/appliance"
	"yinjian/ntp"
	"yinjian/ntp/ledger"
	"yinjian/tsa"
)

// TestSpoofAfterAnOutage: the only source of an appliance falls silent and comes back five seconds ahead. Nothing is stamped
// and nothing is signed from then on, the jump is named, and a restart is no way around it. When the source tells the truth
// again nobody has to do anything.
func TestSpoofAfterAnOutage(t *testing.T) {
	t.Parallel()
	server := startTimeServer(t)
	dir := initAppliance(t, server)
	configure(t, dir, func(c *appliance.Config) { c.Listen.TSAPlain = "127.0.0.1:0" })
	m := serve(t, dir)
	m.trusted(t)
	his := m.register(t, "his", "--consent", "app-asserted")
	m.enrol(t, "D1", "")
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf([]byte("印鉴")), CertReq: true}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	stamp := func() *tsa.Response {
		t.Helper()
		reply, err := client.StampPlain(t.Context(), m.ends.TSASM2, query)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tsa.ParseResponse(reply)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	if resp := stamp(); resp.Token == nil {
		t.Fatalf("no token: %+v", resp)
	}

	server.silent.Store(true)
	eventually(t, time.Minute, "the source is lost", func() bool { return m.timeStatus(t).Sources[0].State == "silent" })
	if resp := stamp(); resp.Token == nil { // it goes on by its own count
		t.Errorf("in the outage: %+v", resp)
	}
	server.ahead.Store(int64(5 * time.Second))
	server.silent.Store(false)
	suspect := func() {
		t.Helper()
		eventually(t, time.Minute, "all clocks are suspect", func() bool {
			s := m.timeStatus(t)
			for _, w := range s.Workers {
				if w.State != string(ntp.Suspect) {
					return false
				}
			}
			return s.State == string(ntp.Suspect)
		})
		if resp := stamp(); resp.Token != nil || len(resp.Failures) != 1 || resp.Failures[0] != tsa.TimeNotAvailable {
			t.Errorf("stamped with a spoofed source: %+v", resp)
		}
		_, err := his.Sign(t.Context(), "spoofed", asserted("D1", "spoofed"))
		wantCode(t, err, "time_untrusted")
	}
	suspect()
	if changes := m.timeStatus(t).Changes; !slices.ContainsFunc(changes, func(c ledger.Change) bool {
		return c.To == ntp.Suspect && regexp.MustCompile(`majority contradicts own prediction: (4|5)(\.\d*)?s away`).MatchString(c.Reason)
	}) {
		t.Errorf("the jump is not named: %+v", changes)
	}

	m.stop(t)
	m = serve(t, dir)
	his = m.client(t, "his")
	suspect()

	server.ahead.Store(0)
	m.trusted(t)
	if resp := stamp(); resp.Token == nil {
		t.Errorf("after the spoof: %+v", resp)
	}
	if _, err := his.Sign(t.Context(), "after", asserted("D1", "after")); err != nil {
		t.Error(err)
	}
	m.mustBeClean(t)
}
