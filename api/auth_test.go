package api_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
	"yinjian/ntp"
)

var certs = call{method: "GET", path: "/v1/certs/01ab"}

func TestAuthenticationIsRefused(t *testing.T) {
	t.Parallel()
	k := start(t)
	header := func(change func(string) string) call {
		c := certs
		c.tamper = func(r *http.Request) { r.Header.Set("Authorization", change(r.Header.Get("Authorization"))) }
		return c
	}
	replace := func(from, to string) call {
		return header(func(s string) string {
			if !strings.Contains(s, from) {
				t.Errorf("%q is not in %q", from, s)
			}
			return strings.Replace(s, from, to, 1)
		})
	}
	for name, c := range map[string]call{
		"none":             {method: "GET", path: "/v1/certs/01ab", unsigned: true},
		"empty":            header(func(string) string { return "" }),
		"basic":            header(func(string) string { return "Basic aGlzOmhpcw==" }),
		"other version":    replace("YJ1", "YJ2"),
		"lower scheme":     replace("YJ1-HMAC-SM3", "yj1-hmac-sm3"),
		"two spaces":       replace(" ", "  "),
		"space after ,":    replace(",time", ", time"),
		"parameter more":   header(func(s string) string { return s + ",x=1" }),
		"parameter less":   header(func(s string) string { return s[:strings.LastIndex(s, ",")] }),
		"order":            replace("app=his,time=", "time=his,app="),
		"app in capitals":  replace("app=his", "app=HIS"),
		"app empty":        replace("app=his", "app="),
		"time in words":    replace("time=1", "time=now"),
		"time in seconds":  replace("000,", ","),
		"short nonce":      replace("nonce=nonce-0123456789-", "nonce="),
		"long nonce":       replace("nonce=", "nonce="+strings.Repeat("n", 60)),
		"nonce's alphabet": replace("nonce=nonce-", "nonce=nonce!"),
		"sig not base64":   replace("sig=", "sig=!"),
		"sig short":        header(func(s string) string { return s[:len(s)-4] }),
		"sig empty":        header(func(s string) string { return s[:strings.Index(s, "sig=")+4] }),
		"huge":             header(func(s string) string { return s + strings.Repeat("x", 4000) }),
		"twice": {method: "GET", path: "/v1/certs/01ab", tamper: func(r *http.Request) {
			r.Header.Add("Authorization", r.Header.Get("Authorization"))
		}},
		"wrong key":           {method: "GET", path: "/v1/certs/01ab", key: []byte("no")},
		"unknown application": {method: "GET", path: "/v1/certs/01ab", app: "nobody"},
		"other application":   replace("app=his", "app=emr"),
		"other nonce":         replace("nonce=nonce-0", "nonce=nonce-1"),
		"other time":          replace("000,", "001,"),
		"other path":          {method: "GET", path: "/v1/certs/01ab", tamper: func(r *http.Request) { r.URL.Path = "/v1/certs/01ac" }},
		"other spelling":      {method: "GET", path: "/v1/certs/01ab", tamper: func(r *http.Request) { r.URL.Path, r.URL.RawPath = "/v1/certs/01ab", "/v1/certs/%301ab" }},
		"query added":         {method: "GET", path: "/v1/certs/01ab", tamper: func(r *http.Request) { r.URL.RawQuery = "a=1" }},
		"other host":          {method: "GET", path: "/v1/certs/01ab", tamper: func(r *http.Request) { r.Host = "other.campus" }},
		"other body": {path: "/v1/verify", body: []byte(`{"cms":"MAA="}`), tamper: func(r *http.Request) {
			r.Body = http.NoBody
			r.ContentLength = 0
		}},
		"other method": {method: "POST", path: "/v1/verify", tamper: func(r *http.Request) {
			a := wire.Authorization{App: "his", Time: strconv.FormatInt(epoch.UnixMilli(), 10), Nonce: "nonce-of-the-get-request"}
			a.MAC = wire.MAC(appKey, wire.Signable{Method: "GET", Path: "/v1/verify", Host: r.Host}, a.App, a.Time, a.Nonce)
			r.Header.Set("Authorization", a.String())
		}},
	} {
		t.Run(name, func(t *testing.T) {
			got := k.do(c)
			wantProblem(t, got, 401, problem.Unauthenticated, "header.Authorization")
			if got.header.Get("WWW-Authenticate") != wire.Scheme {
				t.Errorf("WWW-Authenticate = %q", got.header.Get("WWW-Authenticate"))
			}
		})
	}
	// Nothing before the MAC is right tells a known application from an unknown one, nor is the body looked at.
	same := func(c call) string {
		got := k.do(c)
		return strings.Replace(string(got.body), got.header.Get("X-Request-ID"), "", 1)
	}
	broken := call{path: "/v1/sign", body: []byte("{"), key: []byte("no")}
	want := same(broken)
	for _, app := range []string{"nobody", "stopped", "noright"} {
		broken.app = app
		if got := same(broken); got != want {
			t.Errorf("%s with a wrong key: %s, want %s", app, got, want)
		}
	}
}

func TestSignedRequestsAreTaken(t *testing.T) {
	t.Parallel()
	k := start(t)
	for name, c := range map[string]call{
		"milliseconds": certs,
		"RFC 3339": {method: "GET", path: "/v1/certs/01ab", tamper: func(r *http.Request) {
			a := wire.Authorization{App: "his", Time: "2026-01-01T08:00:00.25+08:00", Nonce: "0123456789abcdef"}
			a.MAC = wire.MAC(appKey, wire.Signable{Method: "GET", Path: "/v1/certs/01ab", Host: r.Host}, a.App, a.Time, a.Nonce)
			r.Header.Set("Authorization", a.String())
		}},
		"host in capitals": {method: "GET", path: "/v1/certs/01ab", host: "YinJian.Local:8443"},
	} {
		if got := k.do(c); got.status != 200 {
			t.Errorf("%s: %d %s", name, got.status, got.body)
		}
	}
}

func TestClockSkew(t *testing.T) {
	t.Parallel()
	k := start(t)
	k.clock.add(time.Hour) // away from the start
	now := k.clock.Now().Time
	for off, ok := range map[time.Duration]bool{
		0: true, 5 * time.Minute: true, -5 * time.Minute: true, 5*time.Minute + time.Millisecond: false, -5*time.Minute - time.Millisecond: false,
		24 * time.Hour: false, -30 * time.Minute: false,
	} {
		c := certs
		c.at = now.Add(off)
		got := k.do(c)
		if ok && got.status != 200 {
			t.Errorf("%s: %d %s", off, got.status, got.body)
		}
		if !ok {
			wantProblem(t, got, 401, problem.ClockSkew, "header.Authorization")
			if !strings.Contains(got.problem.Detail, "2026-01-01T01:00:00Z") || strings.Contains(got.problem.Detail, "未获信任") ||
				!strings.Contains(got.problem.Next, "重新签名请求并使用新的 nonce 与当前时间") {
				t.Errorf("%s: %s", off, got.body)
			}
		}
	}
	// Time that is not trusted is still compared, and called so.
	k.clock.set(now, ntp.Untrusted)
	c := certs
	if got := k.do(c); got.status != 200 {
		t.Errorf("untrusted, no skew: %d", got.status)
	}
	c.at = now.Add(-time.Hour + time.Minute)
	if got := k.do(c); got.problem.Code != "clock_skew" || !strings.Contains(got.problem.Detail, "未获信任") {
		t.Errorf("untrusted, skewed: %s", got.body)
	}
}

func TestOlderThanTheStart(t *testing.T) {
	t.Parallel()
	k := start(t)
	c := certs
	c.at = epoch.Add(-time.Millisecond)
	wantProblem(t, k.do(c), 401, problem.ClockSkew, "header.Authorization")
	c.at = epoch
	if got := k.do(c); got.status != 200 {
		t.Errorf("at the start: %d %s", got.status, got.body)
	}
}

// An appliance that goes on from a backup has not what the one before it let through. What that was is dated by clients, up
// to the window ahead.
func TestSuccessorRefusesWhatMayHaveBeenLetThrough(t *testing.T) {
	t.Parallel()
	for ago, refused := range map[time.Duration]time.Duration{0: 5 * time.Minute, 3 * time.Minute: 2 * time.Minute, time.Hour: 0} {
		k := start(t, func(cfg *api.Config, _ *http.Server) { cfg.Succeeds = epoch.Add(-ago) })
		c := certs
		if refused > 0 {
			c.at = epoch.Add(refused - time.Millisecond)
			wantProblem(t, k.do(c), 401, problem.ClockSkew, "header.Authorization")
		}
		c.at = epoch.Add(refused)
		if got := k.do(c); got.status != 200 {
			t.Errorf("%v after it: %d %s", ago, got.status, got.body)
		}
	}
}

func TestReplay(t *testing.T) {
	t.Parallel()
	k := start(t)
	c := certs
	c.nonce = "the-same-nonce-again"
	if got := k.do(c); got.status != 200 {
		t.Fatalf("first: %d %s", got.status, got.body)
	}
	wantProblem(t, k.do(c), 401, problem.ReplayedRequest, "")
	c.at = epoch.Add(2 * time.Minute) // signed anew, but with the old nonce
	wantProblem(t, k.do(c), 401, problem.ReplayedRequest, "")
	c.app = "emr" // nonces are the application's own
	if got := k.do(c); got.status != 200 {
		t.Errorf("other application: %d %s", got.status, got.body)
	}
	// A request that was refused for its MAC does not use its nonce up.
	bad := certs
	bad.nonce, bad.key = "nonce-of-somebody-else", []byte("no")
	k.do(bad)
	bad.key = nil
	if got := k.do(bad); got.status != 200 {
		t.Errorf("nonce was spent by a stranger: %d %s", got.status, got.body)
	}
}

func TestReplayAtOnce(t *testing.T) {
	t.Parallel()
	k := start(t)
	c := certs
	c.nonce = "the-same-nonce-again"
	var wg sync.WaitGroup
	status := make(chan int, 16)
	for range 16 {
		wg.Go(func() {
			got, err := k.try(c)
			if err != nil {
				t.Error(err)
			}
			status <- got.status
		})
	}
	wg.Wait()
	close(status)
	taken := 0
	for s := range status {
		if s == 200 {
			taken++
		}
	}
	if taken != 1 {
		t.Errorf("one request was taken %d times", taken)
	}
}

func TestNonceMemoryIsBounded(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Nonces = 3 })
	old := certs
	old.nonce, old.at = "the-first-nonce-of-all", epoch
	for i, c := range []call{old, certs, certs} {
		if got := k.do(c); got.status != 200 {
			t.Fatalf("%d: %d %s", i, got.status, got.body)
		}
	}
	wantProblem(t, k.do(certs), 429, problem.RateLimited, "")
	wantProblem(t, k.do(old), 401, problem.ReplayedRequest, "") // nothing was forgotten
	other := certs
	other.app = "emr"
	if got := k.do(other); got.status != 200 {
		t.Errorf("another application suffers: %d", got.status)
	}
	// Once the window has passed there is room, and the old ones are too old.
	k.clock.add(7 * time.Minute)
	if got := k.do(certs); got.status != 200 {
		t.Errorf("after the window: %d %s", got.status, got.body)
	}
	wantProblem(t, k.do(old), 401, problem.ClockSkew, "header.Authorization")
	// Set back, the clock does not make what was forgotten fresh.
	k.clock.set(epoch, ntp.Trusted)
	wantProblem(t, k.do(old), 401, problem.ClockSkew, "header.Authorization")
}

// restart begins a second run on the floors of a first.
func restart(t *testing.T, path string, at time.Time) *kit {
	c := newClock()
	c.set(at, ntp.Trusted)
	return start(t, func(cfg *api.Config, _ *http.Server) { cfg.ReplayFile, cfg.Clock = path, c })
}

func TestRestartDoesNotReopenTheWindow(t *testing.T) {
	t.Parallel()
	for name, orderly := range map[string]bool{"orderly stop": true, "power cut": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "replay")
			k := restart(t, path, epoch)
			ahead := certs // a client whose clock is four minutes ahead
			ahead.host, ahead.nonce, ahead.at = "yinjian.local", "nonce-of-a-fast-clock", epoch.Add(4*time.Minute)
			if got := k.do(ahead); got.status != 200 {
				t.Fatalf("first: %d %s", got.status, got.body)
			}
			if err := k.stop(); err != nil {
				t.Fatal(err)
			}
			if orderly {
				if err := k.server.Close(); err != nil {
					t.Fatal(err)
				}
			}
			k = restart(t, path, epoch.Add(10*time.Second))
			wantProblem(t, k.do(ahead), 401, problem.ClockSkew, "header.Authorization")
			next := certs
			next.at = ahead.at.Add(time.Second)
			got := k.do(next)
			if orderly && got.status != 200 {
				t.Errorf("the next request: %d %s", got.status, got.body)
			}
			if !orderly {
				wantProblem(t, got, 401, problem.ClockSkew, "header.Authorization")
			}
			next.at = ahead.at.Add(5*time.Second + time.Millisecond) // at most a step later
			if got := k.do(next); got.status != 200 {
				t.Errorf("a step later: %d %s", got.status, got.body)
			}
			other := certs
			other.app = "emr"
			if got := k.do(other); got.status != 200 {
				t.Errorf("another application suffers: %d %s", got.status, got.body)
			}
		})
	}
}

func TestUnreadableFloors(t *testing.T) {
	t.Parallel()
	for _, content := range []string{"", "{", `{"version":2,"floors":{}}`, `{"version":1}`} {
		path := filepath.Join(t.TempDir(), "replay")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		k := restart(t, path, epoch)
		c := certs
		c.at = epoch.Add(5*time.Minute - time.Millisecond)
		wantProblem(t, k.do(c), 401, problem.ClockSkew, "header.Authorization")
		c.at = epoch.Add(5 * time.Minute)
		if got := k.do(c); got.status != 200 {
			t.Errorf("%q, after the window: %d %s", content, got.status, got.body)
		}
	}
}

func TestFloorThatCannotBeStored(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "gone")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	k := restart(t, filepath.Join(dir, "replay"), epoch)
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	got := k.do(certs)
	wantProblem(t, got, 503, problem.NotReady, "")
	if strings.Contains(string(got.body), dir) {
		t.Errorf("a path is shown: %s", got.body)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := k.do(certs); got.status != 200 {
		t.Errorf("when the disk is back: %d %s", got.status, got.body)
	}
}

func TestFloorsAreWrittenSeldomAndAhead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "replay")
	k := restart(t, path, epoch)
	writes, last := 0, []byte(nil)
	for range 100 { // ten seconds of requests
		if got := k.do(certs); got.status != 200 {
			t.Fatalf("%d %s", got.status, got.body)
		}
		now, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(now, last) {
			writes, last = writes+1, now
		}
		var f struct{ Floors map[string]int64 }
		if err := json.Unmarshal(now, &f); err != nil || f.Floors["his"] < k.clock.Now().Time.UnixMilli() {
			t.Fatalf("floors %s at %d: %v", now, k.clock.Now().Time.UnixMilli(), err)
		}
		k.clock.add(100 * time.Millisecond)
	}
	if writes > 3 {
		t.Errorf("%d writes in ten seconds", writes)
	}
	if err := k.server.Close(); err != nil {
		t.Fatal(err)
	}
	got := k.do(certs)
	wantProblem(t, got, 503, problem.NotReady, "")
}

func TestRateOfOneApplication(t *testing.T) {
	t.Parallel()
	var slow atomic.Bool
	slow.Store(true)
	k := start(t, func(c *api.Config, _ *http.Server) {
		c.Limits.Rate = func(app *appT) (int, int) {
			if app.ID == "his" && slow.Load() {
				return 1, 2
			}
			return 1 << 20, 1 << 20
		}
	})
	// Two at once, then one a second: on the slowest machine some of a hundred are too many.
	taken, refused := 0, reply{}
	for range 100 {
		got := k.do(certs)
		if got.status != 200 {
			refused = got
			break
		}
		taken++
	}
	wantProblem(t, refused, 429, problem.RateLimited, "")
	if taken < 2 || refused.header.Get("Retry-After") != "1" {
		t.Errorf("refused after %d, Retry-After %q", taken, refused.header.Get("Retry-After"))
	}
	other := certs
	other.app = "emr"
	for range 20 {
		if got := k.do(other); got.status != 200 {
			t.Fatalf("the other application: %d %s", got.status, got.body)
		}
	}
	// An administrator's change counts at once: a request is there within a few milliseconds, where it took a second, and
	// others after it. On the slowest machine one of a thousand tries in a row is refused once at most.
	slow.Store(false)
	taken = 0
	for range 1000 {
		if got := k.do(certs); got.status == 200 {
			taken++
		}
	}
	if taken < 500 {
		t.Errorf("under the new rate %d of 1000 were taken", taken)
	}
}

// Whoever fails too often is refused before his body is read; others are not, at the same address or with the same id.
func TestFailedAuthentications(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Failures = 5 })
	bad := call{path: "/v1/sign", body: encode(t, signBody()), key: []byte("no")}
	fail := func(c call) (failed int, last reply) {
		t.Helper()
		for failed = range 100 {
			if last = k.do(c); last.status != 401 {
				return failed, last
			}
		}
		t.Fatal("failures are not bounded")
		return 0, last
	}
	n, got := fail(bad)
	wantProblem(t, got, 429, problem.RateLimited, "")
	if after, err := strconv.Atoi(got.header.Get("Retry-After")); err != nil || after < 1 || after > 12 {
		t.Errorf("Retry-After = %q", got.header.Get("Retry-After"))
	}
	if n < 5 {
		t.Errorf("refused after %d", n)
	}
	// Nor is a right one looked at, and not a byte of its body read.
	c := k.dial()
	k.raw(c, 1000)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 429 {
		t.Errorf("without its body: %v, %v", resp, err)
	}
	// Requests without a name have a budget of their own.
	none := call{method: "GET", path: "/v1/certs/01ab", unsigned: true}
	if n, got := fail(none); n < 5 || got.status != 429 {
		t.Errorf("without Authorization: %d after %d", got.status, n)
	}
	// Health needs no proof.
	if got := k.do(call{method: "GET", path: "/health/ready", unsigned: true}); got.status != 200 {
		t.Errorf("health: %d", got.status)
	}
	// Another application behind the same address has another budget, if the lot falls so: of forty at most a few share.
	shut := 0
	for i := range 40 {
		id := fmt.Sprintf("app-%d", i)
		k.services.apps[id] = &appT{ID: id}
		one := certs
		one.app = id
		if got := k.do(one); got.status == 429 {
			shut++
		} else if got.status != 200 {
			t.Errorf("%s: %d %s", id, got.status, got.body)
		}
	}
	if shut > 20 {
		t.Errorf("%d of 40 applications at the same address are shut out", shut)
	}
}

// Behind one address, as that of a proxy, nobody locks an application out by failing under its name. One that has not
// proved itself there is refused.
func TestFailuresUnderAnothersName(t *testing.T) {
	t.Parallel()
	k := start(t, func(c *api.Config, _ *http.Server) { c.Limits.Failures = 5 })
	good := certs
	if got := k.do(good); got.status != 200 {
		t.Fatalf("before: %d %s", got.status, got.body)
	}
	bad := call{path: "/v1/sign", body: encode(t, signBody()), key: []byte("no")}
	for range 20 {
		if got := k.do(bad); got.status != 401 {
			t.Fatalf("under its name: %d %s", got.status, got.body)
		}
	}
	if got := k.do(good); got.status != 200 {
		t.Errorf("the application itself: %d %s", got.status, got.body)
	}
	bad.app = "nobody"
	refused := 0
	for range 20 {
		if k.do(bad).status == 429 {
			refused++
		}
	}
	if refused < 10 {
		t.Errorf("of 20 failures under a name that proved nothing %d were refused", refused)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	if _, err := api.New(api.Config{}); err == nil {
		t.Error("New took an empty config")
	}
	sv := newServices()
	good := api.Config{Signing: sv, Directory: sv, Stamps: sv, Tokens: sv, Health: sv, Admin: &admin{}, Accounts: newAccounts(), Clock: newClock(), Log: discard(), Version: "1"}
	if _, err := api.New(good); err != nil {
		t.Errorf("New = %v", err)
	}
	for i, l := range []api.Limits{{Body: -1}, {Concurrent: -1}, {InFlight: 1}, {Body: 1 << 20, InFlight: 2 << 20}, {Window: -1}, {Failures: -1}, {Sending: -1}} {
		bad := good
		bad.Limits = l
		if _, err := api.New(bad); err == nil {
			t.Errorf("New took limits %d: %+v", i, fmt.Sprint(l.Body))
		}
	}
}

func withClock(c *clock) option {
	return func(cfg *api.Config, _ *http.Server) { cfg.Clock = c }
}

// A request is for one appliance: what the other campus was sent is not taken here, though the application's key is the same.
func TestRequestForTheOtherCampus(t *testing.T) {
	t.Parallel()
	k := start(t, func(cfg *api.Config, _ *http.Server) { cfg.Names = []string{"benbu.example", "10.1.0.10", "fd00::1"} })
	for i, host := range []string{"benbu.example", "BenBu.example:8443", "10.1.0.10:8443", "[fd00::1]:8443", "[fd00::1]"} {
		c := certs
		c.host, c.nonce = host, fmt.Sprintf("nonce-0123456789-%d", i)
		if got := k.do(c); got.status != 200 {
			t.Errorf("%s: %d %s", host, got.status, got.body)
		}
	}
	for i, host := range []string{"binhai.example", "10.1.0.11:8443", "benbu.example.org", "[fd00::2]:8443"} {
		c := certs
		c.host, c.nonce = host, fmt.Sprintf("nonce-0123456789-x%d", i)
		wantProblem(t, k.do(c), 400, problem.InvalidRequest, "header.Host")
	}
}
