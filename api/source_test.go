package api_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, p := range list {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// clientCertificate is self-signed and valid from epoch on for so long.
func clientCertificate(t *testing.T, long time.Duration) (tls.Certificate, *smx509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "client"}, NotBefore: epoch.Add(-time.Hour), NotAfter: epoch.Add(long)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := smx509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, parsed
}

// stampFrom sends a query from an address of loopback, with a certificate if there is one.
func (k *kit) stampFrom(host string, cert *tls.Certificate, c call) (reply, error) {
	k.t.Helper()
	_, pool := certificate(k.t)
	cfg := &tls.Config{RootCAs: pool, Time: func() time.Time { return epoch }}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(host)}}
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DialContext: dialer.DialContext}}
	defer h.CloseIdleConnections()
	had := k.http
	k.http = h
	defer func() { k.http = had }()
	return k.try(c)
}

// TestSources is about who may use /tsa over TLS without a key, and under which name.
func TestSources(t *testing.T) {
	t.Parallel()
	ours, oursParsed := clientCertificate(t, 48*time.Hour)
	tied, tiedParsed := clientCertificate(t, 48*time.Hour)
	ended, endedParsed := clientCertificate(t, time.Hour)
	stranger, _ := clientCertificate(t, 48*time.Hour)
	sv := newServices()
	sv.ask = true
	k := startWith(t, sv, func(c *api.Config, _ *http.Server) {
		c.Sources = []api.Source{
			{Name: "pacs", Addresses: prefixes("127.0.1.0/24", "10.0.0.0/8"), Rate: 100, Burst: 100},
			{Name: "ris", Addresses: prefixes("127.0.1.9/32"), Rate: 100, Burst: 100},
			{Name: "lis", Certificates: []*smx509.Certificate{oursParsed}, Rate: 100, Burst: 100},
			{Name: "his.main", Addresses: prefixes("127.0.2.0/24"), Certificates: []*smx509.Certificate{tiedParsed}, Rate: 100, Burst: 100},
			{Name: "old", Certificates: []*smx509.Certificate{endedParsed}, Rate: 100, Burst: 100},
		}
	})
	k.clock.add(2 * time.Hour) // past the end of one certificate
	asked := ""
	sv.respond = func(_ context.Context, _, requester string, _ []byte) ([]byte, error) {
		asked = requester
		return []byte{0x30, 0}, nil
	}
	signed, unsigned := tsaCall("/tsa/sm2", []byte("q")), tsaCall("/tsa/sm2", []byte("q"))
	unsigned.unsigned = true
	garbled := unsigned
	garbled.header = map[string]string{"Content-Type": "application/timestamp-query", "Authorization": "Basic eDp5"}
	for name, row := range map[string]struct {
		host   string
		cert   *tls.Certificate
		call   call
		status int
		asked  string
	}{
		"listed network":                {"127.0.1.7", nil, unsigned, 200, "source:pacs"},
		"a narrower one":                {"127.0.1.9", nil, unsigned, 200, "source:ris"},
		"nobody":                        {"127.0.0.1", nil, unsigned, 401, ""},
		"certificate":                   {"127.0.0.1", &ours, unsigned, 200, "source:lis"},
		"certificate before address":    {"127.0.1.9", &ours, unsigned, 200, "source:lis"},
		"a stranger's certificate":      {"127.0.0.1", &stranger, unsigned, 401, ""},
		"a stranger's, listed address":  {"127.0.1.9", &stranger, unsigned, 200, "source:ris"},
		"both, as listed":               {"127.0.2.3", &tied, unsigned, 200, "source:his.main"},
		"tied certificate elsewhere":    {"127.0.0.1", &tied, unsigned, 401, ""},
		"tied address, no certificate":  {"127.0.2.3", nil, unsigned, 401, ""},
		"ended certificate":             {"127.0.0.1", &ended, unsigned, 403, ""},
		"a key counts before a source":  {"127.0.1.9", &ours, signed, 200, "his"},
		"a bad key is not made good":    {"127.0.1.9", &ours, garbled, 401, ""},
		"an application without source": {"127.0.0.1", nil, signed, 200, "his"},
	} {
		t.Run(name, func(t *testing.T) {
			asked = ""
			got, err := k.stampFrom(row.host, row.cert, row.call)
			if err != nil || got.status != row.status || asked != row.asked {
				t.Errorf("%d %s %v, asked by %q; want %d, %q", got.status, got.body, err, asked, row.status, row.asked)
			}
		})
	}
	// Sources are for /tsa: nothing else is open to them.
	if got, err := k.stampFrom("127.0.1.9", &ours, call{path: "/v1/timestamp", body: encode(t, timestampBody()), unsigned: true}); err != nil || got.status != 401 {
		t.Errorf("/v1/timestamp: %d %s %v", got.status, got.body, err)
	}
	states, unlisted := k.server.Sources()
	want := map[string]uint64{"loopback": 0, "pacs": 1, "ris": 2, "lis": 2, "his.main": 1, "old": 0}
	for _, s := range states {
		if s.Served != want[s.Name] || s.OverQuota != 0 {
			t.Errorf("%+v, want %d served", s, want[s.Name])
		}
	}
	if len(states) != len(want) || unlisted != 4 {
		t.Errorf("%v, %d unlisted", states, unlisted)
	}
}

// TestPlainSources is the same without TLS, where this machine itself needs no entry.
func TestPlainSources(t *testing.T) {
	t.Parallel()
	_, cert := clientCertificate(t, time.Hour)
	sv := newServices()
	k := startWith(t, sv, func(c *api.Config, _ *http.Server) {
		c.Sources = []api.Source{
			{Name: "pacs", Addresses: prefixes("203.0.113.0/24", "2001:db8:1::/48", "127.0.0.2/32"), Rate: 100, Burst: 100},
			{Name: "tied", Addresses: prefixes("198.51.100.0/24"), Certificates: []*smx509.Certificate{cert}, Rate: 100, Burst: 100},
		}
	})
	asked := ""
	sv.respond = func(_ context.Context, _, requester string, _ []byte) ([]byte, error) {
		asked = requester
		return []byte{0x30, 0}, nil
	}
	for from, want := range map[string]string{
		"203.0.113.7:1": "source:pacs", "[::ffff:203.0.113.7]:1": "source:pacs", "[2001:db8:1::5]:1": "source:pacs", "[2001:db8:1::5%eth0]:1": "source:pacs",
		"127.0.0.2:1": "source:pacs", "127.0.0.1:1": "source:loopback", "[::1]:1": "source:loopback", "[::ffff:127.0.0.1]:1": "source:loopback",
		"203.0.114.7:1": "", "[2001:db8:2::5]:1": "", "198.51.100.1:1": "", "nonsense": "", "0.0.0.0:1": "",
	} {
		asked = ""
		r := httptest.NewRequest("POST", "/tsa/sm2", strings.NewReader("q"))
		r.RemoteAddr = from
		r.Header.Set("Content-Type", "application/timestamp-query")
		r.Header.Set("X-Forwarded-For", "203.0.113.7")
		r.Header.Set("X-Real-Ip", "127.0.0.1")
		r.Header.Set("Authorization", "Basic eDp5") // old clients may send one
		w := httptest.NewRecorder()
		k.server.TSAPlainHandler().ServeHTTP(w, r)
		if asked != want || (w.Code == 200) != (want != "") {
			t.Errorf("%s: %d %s, asked by %q; want %q", from, w.Code, w.Body, asked, want)
		}
		if want == "" {
			var p wire.Problem
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || w.Code != 403 || p.Code != string(problem.Forbidden) || !strings.Contains(p.Next, "listen.tsa_sources") {
				t.Errorf("%s: %d %s", from, w.Code, w.Body)
			}
		}
	}
}

// TestSourceQuota uses up one source's quota while another is served.
func TestSourceQuota(t *testing.T) {
	t.Parallel()
	sv := newServices()
	k := startWith(t, sv, func(c *api.Config, _ *http.Server) {
		c.Limits.LoopbackRate, c.Limits.LoopbackBurst = 1, 1
		c.Sources = []api.Source{
			{Name: "greedy", Addresses: prefixes("127.0.1.0/24"), Rate: 1, Burst: 3},
			{Name: "modest", Addresses: prefixes("127.0.2.0/24"), Rate: 1, Burst: 3},
		}
	})
	unsigned := tsaCall("/tsa/sm2", []byte("q"))
	unsigned.unsigned = true
	ask := func(host string) reply {
		t.Helper()
		got, err := k.stampFrom(host, nil, unsigned)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	refused, after := 0, time.Now()
	for i := range 6 { // from several of its addresses: the quota is the source's
		switch got := ask("127.0.1." + string(rune('1'+i))); got.status {
		case 200:
		case 429:
			refused++
			wantProblem(t, got, 429, problem.RateLimited, "")
			if got.header.Get("Retry-After") == "" || got.header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("refusal: %v", got.header)
			}
		default:
			t.Errorf("%d %s", got.status, got.body)
		}
	}
	if most := 3 + int(time.Since(after)/time.Second); 6-refused < 3 || 6-refused > most {
		t.Errorf("%d of 6 were served, want 3 to %d", 6-refused, most)
	}
	for range 3 {
		if got := ask("127.0.2.1"); got.status != 200 {
			t.Errorf("another source: %d %s", got.status, got.body)
		}
	}
	if got := k.do(tsaCall("/tsa/sm2", []byte("q"))); got.status != 200 {
		t.Errorf("an application: %d %s", got.status, got.body)
	}
	if log := k.log.String(); strings.Count(log, `"source":"source:greedy"`) != refused || strings.Contains(log, "source:modest") {
		t.Errorf("%d refusals, logged as %s", refused, log)
	}
	states, _ := k.server.Sources()
	if i := slices.IndexFunc(states, func(s api.SourceState) bool { return s.Name == "greedy" }); i < 0 || states[i].OverQuota != uint64(refused) || states[i].Served != uint64(6-refused) {
		t.Errorf("%+v, %d refused", states, refused)
	}
}

func TestSourcesAreChecked(t *testing.T) {
	t.Parallel()
	_, cert := clientCertificate(t, time.Hour)
	good := api.Source{Name: "pacs", Addresses: prefixes("10.0.0.0/8"), Rate: 1, Burst: 1}
	with := func(change func(*api.Source)) []api.Source {
		other := api.Source{Name: "ris", Addresses: prefixes("10.1.0.0/16"), Rate: 1, Burst: 1}
		change(&other)
		return []api.Source{good, other}
	}
	certified := func(s *api.Source) { s.Certificates = []*smx509.Certificate{cert} }
	for name, row := range map[string]struct {
		list []api.Source
		word string // "" for none wrong
	}{
		"good":             {with(func(*api.Source) {}), ""},
		"no name":          {with(func(s *api.Source) { s.Name = "" }), "name"},
		"name in capitals": {with(func(s *api.Source) { s.Name = "RIS" }), "name"},
		"loopback":         {with(func(s *api.Source) { s.Name = "loopback" }), "name"},
		"same name":        {with(func(s *api.Source) { s.Name = "pacs" }), "name"},
		"nothing":          {with(func(s *api.Source) { s.Addresses = nil }), "addresses"},
		"same network":     {with(func(s *api.Source) { s.Addresses = prefixes("10.0.0.0/8") }), "pacs"},
		"same, certified":  {with(func(s *api.Source) { s.Addresses = prefixes("10.0.0.0/8"); certified(s) }), ""},
		"everybody":        {with(func(s *api.Source) { s.Addresses = prefixes("0.0.0.0/0") }), "everybody"},
		"everybody by six": {with(func(s *api.Source) { s.Addresses = prefixes("::/0") }), "everybody"},
		"host bits":        {with(func(s *api.Source) { s.Addresses = prefixes("10.1.2.3/16") }), "10.1.2.3/16"},
		"no network":       {with(func(s *api.Source) { s.Addresses = []netip.Prefix{{}} }), "network"},
		"mapped":           {with(func(s *api.Source) { s.Addresses = prefixes("::ffff:10.0.0.0/104") }), "network"},
		"no rate":          {with(func(s *api.Source) { s.Rate = 0 }), "rate"},
		"no burst":         {with(func(s *api.Source) { s.Burst = -1 }), "burst"},
		"same certificate": {append(with(certified), api.Source{Name: "c", Certificates: []*smx509.Certificate{cert}, Rate: 1, Burst: 1}), "ris"},
	} {
		sv := newServices()
		_, err := api.New(api.Config{Signing: sv, Directory: sv, Stamps: sv, Tokens: sv, Health: sv, Admin: &admin{}, Accounts: newAccounts(), Clock: newClock(), Log: discard(), Version: "t", Sources: row.list})
		if (err != nil) != (row.word != "") || err != nil && !strings.Contains(err.Error(), row.word) {
			t.Errorf("%s: %v, want %q", name, err, row.word)
		}
	}
}
