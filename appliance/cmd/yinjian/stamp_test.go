package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/tsa"
)

// TestTimestampHTTP sends what clients of RFC 3161 send, and what they should not, to a running appliance. OpenSSL makes
// the queries and reads the replies, curl carries some.
func TestTimestampHTTP(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t), "--tsa-plain", "127.0.0.1:0")
	ours := clientPEM(t, dir, "pacs")
	configure(t, dir, func(c *appliance.Config) {
		c.Listen.TSASources = []appliance.TSASource{
			{Name: "lis", Addresses: []string{"127.0.3.0/24"}},
			{Name: "greedy", Addresses: []string{"127.0.4.1"}, Rate: 1, Burst: 2},
			{Name: "pacs", Certificates: []string{ours + ".pem"}},
		}
	})
	m := serve(t, dir)
	m.trusted(t)
	out := tempDir(t)
	query := func(args ...string) []byte {
		t.Helper()
		name := filepath.Join(out, "query")
		if o := command(t, nil, append([]string{"openssl", "ts", "-query", "-digest", strings.Repeat("5a", 32), "-out", name}, args...)...); o.code != 0 {
			t.Fatal(o)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := query("-sha256", "-cert")
	tried := 0 // how often ten queries were sent from loopback

	t.Run("refusals in the protocol", func(t *testing.T) {
		indefinite := append(append([]byte{0x30, 0x80}, good[2:]...), 0, 0)
		rows := map[string]struct {
			query []byte
			words string // OpenSSL's
		}{
			"nothing":          {nil, "the data submitted has the wrong format"},
			"garbage":          {[]byte("\xff\x00 garbage"), "the data submitted has the wrong format"},
			"text":             {[]byte(`{"digest":"x"}`), "the data submitted has the wrong format"},
			"truncated":        {good[:len(good)-1], "the data submitted has the wrong format"},
			"trailing":         {append(slices.Clone(good), 0), "the data submitted has the wrong format"},
			"BER":              {indefinite, "the data submitted has the wrong format"},
			"16 KiB":           {make([]byte, 16<<10), "the data submitted has the wrong format"},
			"16 KiB in form":   {append([]byte{0x30, 0x82, 0x3f, 0xfc}, make([]byte, 16<<10-4)...), "the data submitted has the wrong format"},
			"SHA-1":            {query("-sha1", "-digest", strings.Repeat("5a", 20)), "unrecognized or unsupported algorithm identifier"},
			"another's policy": {query("-sha256", "-tspolicy", "1.2.3.4"), "the requested TSA policy is not supported by the TSA"},
		}
		m.leavesJournal(t, func() {
			tried++
			for name, row := range rows {
				got := m.stamp(t, "127.0.0.1", "application/timestamp-query", row.query)
				text := got.text(t)
				if got.status != 200 || !strings.Contains(text, "Rejected") || !strings.Contains(text, row.words) || strings.Contains(text, "Serial number") {
					t.Errorf("%s: %d, OpenSSL reads\n%s", name, got.status, text)
				}
			}
		})
	})

	t.Run("refusals before it", func(t *testing.T) {
		for name, row := range map[string]struct {
			media  string
			body   []byte
			status int
			code   string
		}{
			"media type":     {"application/timestamp-reply", good, 415, "unsupported_media_type"},
			"no media type":  {"", good, 415, "unsupported_media_type"},
			"16 KiB and one": {"application/timestamp-query", make([]byte, 16<<10+1), 413, "too_large"},
			"five megabytes": {"application/timestamp-query", make([]byte, 5<<20), 413, "too_large"},
		} {
			got := m.stamp(t, "127.0.0.1", row.media, row.body)
			if got.status != row.status || !strings.Contains(string(got.body), `"`+row.code+`"`) {
				t.Errorf("%s: %d %s", name, got.status, got.body)
			}
		}
	})

	t.Run("a token and its entry", func(t *testing.T) {
		before := len(entries(t, dir, "tsa.token.v1"))
		got := m.stamp(t, "127.0.3.7", "application/timestamp-query", good)
		text := got.text(t)
		if got.status != 200 || !strings.Contains(text, "Status: Granted") {
			t.Fatalf("%d, OpenSSL reads\n%s", got.status, text)
		}
		for name, want := range map[string]string{
			"Content-Type": "application/timestamp-reply", "Content-Length": strconv.Itoa(len(got.body)), "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
		} {
			if v := got.header.Get(name); v != want {
				t.Errorf("%s: %q, want %q", name, v, want)
			}
		}
		if len(got.coding) != 0 || !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(got.header.Get("X-Request-Id")) {
			t.Errorf("coding %v, header %v", got.coding, got.header)
		}
		reply, err := tsa.ParseResponse(got.body)
		if err != nil || reply.Token == nil {
			t.Fatal(err)
		}
		all := entries(t, dir, "tsa.token.v1")
		if len(all) != before+1 {
			t.Fatalf("%d entries, want one more than %d", len(all), before)
		}
		e := all[before]
		serial, _ := e.Field("serial").(audit.Octets)
		bound, _ := e.Field("time.bound_us").(audit.Int)
		payload, ok := e.Payload("token")
		bare, _ := reply.Token.Bare() // its certificates are a payload of their own
		if e.Actor != "source:lis" || e.Object != "unit/sm2" || !bytes.Equal(serial, reply.Token.Serial.Bytes()) || !ok || payload.SM3 != audit.Sum(bare) {
			t.Errorf("entry %+v of token %x", e, reply.Token.Serial)
		}
		if provenance := e.Text("time.provenance"); provenance == "" || int64(bound) <= 0 || int64(bound) > reply.Token.Accuracy.Microseconds() {
			t.Errorf("time from %q within %d µs, published %v", provenance, bound, reply.Token.Accuracy)
		}
	})

	t.Run("quota", func(t *testing.T) {
		refused := 0
		for range 6 {
			switch got := m.stamp(t, "127.0.4.1", "application/timestamp-query", good); {
			case got.status == 429 && strings.Contains(string(got.body), `"rate_limited"`) && got.header.Get("Retry-After") != "":
				refused++
			case got.status != 200:
				t.Errorf("%d %s", got.status, got.body)
			}
			if got := m.stamp(t, "127.0.3.8", "application/timestamp-query", good); got.status != 200 {
				t.Errorf("another source: %d %s", got.status, got.body)
			}
		}
		if refused == 0 {
			t.Error("six requests at one a second, two at once: none was refused")
		}
	})

	t.Run("client certificate by curl", func(t *testing.T) {
		q, r := filepath.Join(out, "q"), filepath.Join(out, "r")
		if err := os.WriteFile(q, good, 0o600); err != nil {
			t.Fatal(err)
		}
		before := len(entries(t, dir, "tsa.token.v1"))
		for name, row := range map[string]struct {
			with []string
			want string
		}{
			"none":    {nil, "401"},
			"another": {curlAs(clientPEM(t, out, "stranger")), "401"},
			"its own": {curlAs(ours), "200"},
		} {
			o := command(t, nil, append([]string{
				"curl", "-sS", "--cacert", m.ends.TLSCA, "-H", "Content-Type: application/timestamp-query", "--data-binary", "@" + q, "-o", r, "-w", "%{http_code} %{content_type}", m.ends.API + "/tsa/sm2",
			}, row.with...)...)
			if o.code != 0 || !strings.HasPrefix(o.stdout, row.want) || row.want == "200" && !strings.HasSuffix(o.stdout, "application/timestamp-reply") {
				t.Errorf("%s: %v, want %s", name, o, row.want)
			}
		}
		if all := entries(t, dir, "tsa.token.v1"); len(all) != before+1 || all[before].Actor != "source:pacs" {
			t.Errorf("%d entries more, %+v", len(all)-before, all[before:])
		}
	})

	t.Run("state", func(t *testing.T) {
		var s struct {
			Sources struct {
				Sources []struct {
					Name      string
					Served    int
					OverQuota int `json:"over_quota"`
				}
				Unlisted int
			} `json:"timestamp_sources"`
		}
		if err := json.Unmarshal([]byte(mustRun(t, "status", "--dir", dir, "-o", "json").stdout), &s); err != nil {
			t.Fatal(err)
		}
		served := map[string]int{}
		for _, one := range s.Sources.Sources {
			served[one.Name] = one.Served
			if (one.OverQuota > 0) != (one.Name == "greedy") {
				t.Errorf("%+v", one)
			}
		}
		if served["lis"] != 7 || served["pacs"] != 1 || served["greedy"] < 2 || served["loopback"] != 10*tried || s.Sources.Unlisted != 2 {
			t.Errorf("%+v", s)
		}
	})
	m.mustBeClean(t)
}

// A stamped is what came back.
type stamped struct {
	status int
	header http.Header
	coding []string
	body   []byte
}

// stamp posts to the plain listener from an address of loopback. A body that is too large is announced first: whoever sends
// it at once may find the connection reset before he has read why.
func (m *machine) stamp(t *testing.T, from, media string, body []byte) stamped {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	h := &http.Client{Transport: &http.Transport{DialContext: d.DialContext, DisableKeepAlives: true, ExpectContinueTimeout: answerWithin}, Timeout: answerWithin}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, m.ends.TSASM2, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if len(body) > 16<<10 {
		r.Header.Set("Expect", "100-continue")
	}
	if media != "" {
		r.Header.Set("Content-Type", media)
	}
	resp, err := h.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return stamped{resp.StatusCode, resp.Header, resp.TransferEncoding, b}
}

// text is the reply as OpenSSL reads it.
func (s stamped) text(t *testing.T) string {
	t.Helper()
	name := filepath.Join(tempDir(t), "reply")
	if err := os.WriteFile(name, s.body, 0o600); err != nil {
		t.Fatal(err)
	}
	return command(t, nil, "openssl", "ts", "-reply", "-in", name, "-text").stdout
}

// clientPEM has OpenSSL make a certificate NAME.pem and its key NAME.key, and answers the path without the endings.
func clientPEM(t *testing.T, dir, name string) string {
	t.Helper()
	at := filepath.Join(dir, "secrets", name)
	if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
		t.Fatal(err)
	}
	if o := command(t, nil, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", at+".key", "-out", at+".pem", "-days", "2",
		"-subj", fmt.Sprintf("/CN=%s", name)); o.code != 0 {
		t.Fatal(o)
	}
	return at
}

func curlAs(at string) []string { return []string{"--cert", at + ".pem", "--key", at + ".key"} }
