package api

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"sync/atomic"

	"github.com/emmansun/gmsm/smx509"
	"github.com/labstack/echo/v4"
	"golang.org/x/time/rate"

	"yinjian/appliance/problem"
)

// A Source is a caller of /tsa/{unit} that has no key for HMAC: clients of RFC 3161 know no other credentials than those of
// the connection. It is known by the address it calls from, by its TLS client certificate, or, if it has both, by both
// together.
type Source struct {
	Name      string         // 1 to 31 of [a-z0-9.-], each once; "source:" and it is who asked, in the journal
	Addresses []netip.Prefix // empty: any. Of two that hold an address the narrower one counts
	// Certificates are the very certificates that the source may show, by their DER: no CA is asked about them, and taking
	// one out of the list is how it is revoked. Empty: none is needed.
	Certificates []*smx509.Certificate
	Rate, Burst  int // requests a second, and at once; both at least 1
}

// LoopbackSource is the name of callers on this machine itself, at the plain listener. They need not be listed.
const LoopbackSource = "loopback"

var sourceName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,30}$`)

// CheckSources says what is wrong with a list of sources, all at once. It does not look into the certificates.
func CheckSources(list []Source) error {
	var errs []error
	bad := func(i int, format string, args ...any) {
		errs = append(errs, fmt.Errorf("[%d]: %s", i, fmt.Sprintf(format, args...)))
	}
	names, addresses := map[string]bool{}, map[netip.Prefix]string{}
	for i, s := range list {
		if !sourceName.MatchString(s.Name) || s.Name == LoopbackSource || names[s.Name] {
			bad(i, "name 须为小写字母、数字、点或连字符，1–31 位，不可重复，不得为 %s (name: lower-case letters, digits, dots, hyphens, each once, not %s)", LoopbackSource, LoopbackSource)
		}
		names[s.Name] = true
		if len(s.Addresses) == 0 && len(s.Certificates) == 0 {
			bad(i, "addresses 与 certificates 至少给一样 (give addresses, certificates or both)")
		}
		for _, p := range s.Addresses {
			switch other, taken := addresses[p]; {
			case !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || p.Addr().Zone() != "":
				bad(i, "addresses: %v 须为网段，如 10.2.0.0/16、2001:db8::/48 (want a network)", p)
			case p.Bits() == 0:
				bad(i, "addresses: %v 包括所有人 (is everybody)", p)
			case len(s.Certificates) == 0 && taken:
				bad(i, "addresses: %v 已属于 %s (belongs to that source)", p, other)
			}
			if len(s.Certificates) == 0 {
				addresses[p] = s.Name
			}
		}
		if s.Rate < 1 || s.Burst < 1 {
			bad(i, "rate、burst 至少为 1 (at least 1)")
		}
	}
	return errors.Join(errs...)
}

// A source is one with its quota.
type source struct {
	Source
	requester string // in the journal, and among those who share places
	quota     *rate.Limiter

	served, limited atomic.Uint64
}

func newSource(s Source) *source {
	return &source{Source: s, requester: "source:" + s.Name, quota: rate.NewLimiter(rate.Limit(s.Rate), s.Burst)}
}

// sources finds who calls.
type sources struct {
	all      []*source
	networks []network // of those that need no certificate, the narrowest first
	loopback *source
	unlisted atomic.Uint64
}

type network struct {
	netip.Prefix
	source *source
}

func newSources(list []Source, loopbackRate, loopbackBurst int) (*sources, error) {
	if err := CheckSources(list); err != nil {
		return nil, fmt.Errorf("api: config: Sources: %w", err)
	}
	f := &sources{loopback: newSource(Source{Name: LoopbackSource, Rate: loopbackRate, Burst: loopbackBurst})}
	certificates := map[string]string{}
	for _, one := range list {
		for _, c := range one.Certificates {
			if other, taken := certificates[string(c.Raw)]; taken {
				return nil, fmt.Errorf("api: config: Sources: %s: 序列号 %x 的证书已属于 %s (the certificate belongs to that source)", one.Name, c.SerialNumber, other)
			}
			certificates[string(c.Raw)] = one.Name
		}
		s := newSource(one)
		f.all = append(f.all, s)
		for _, p := range one.Addresses {
			if len(one.Certificates) == 0 {
				f.networks = append(f.networks, network{p, s})
			}
		}
	}
	slices.SortFunc(f.networks, func(a, b network) int { return cmp.Compare(b.Bits(), a.Bits()) })
	return f, nil
}

// at is the source of an address, nil if none is listed.
func (f *sources) at(addr netip.Addr) *source {
	for i := range f.networks {
		if f.networks[i].Contains(addr) {
			return f.networks[i].source
		}
	}
	return nil
}

// shown is the source whose certificate the client has shown, nil if it is nobody's or is shown from elsewhere. The
// handshake has proved that the client has its key.
func (f *sources) shown(r *http.Request, addr netip.Addr) (*source, *smx509.Certificate) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil, nil
	}
	for _, s := range f.all {
		for _, c := range s.Certificates {
			if bytes.Equal(c.Raw, r.TLS.PeerCertificates[0].Raw) && (len(s.Addresses) == 0 || slices.ContainsFunc(s.Addresses, func(p netip.Prefix) bool { return p.Contains(addr) })) {
				return s, c
			}
		}
	}
	return nil, nil
}

// SourceState is how much a source has asked for since the start.
type SourceState struct {
	Name      string `json:"name"`
	Served    uint64 `json:"served"`
	OverQuota uint64 `json:"over_quota"`
}

// Sources answers what each source has asked for, and how many requests came from none.
func (s *Server) Sources() (states []SourceState, unlisted uint64) {
	for _, one := range append([]*source{s.sources.loopback}, s.sources.all...) {
		states = append(states, SourceState{Name: one.Name, Served: one.served.Load(), OverQuota: one.limited.Load()})
	}
	return states, s.sources.unlisted.Load()
}

// bySource runs the request as its source's. Without a source it is other's: a challenge, or a refusal.
func (s *Server) bySource(plain bool, other echo.HandlerFunc) echo.HandlerFunc {
	b := stampQuery(s.limits.StampQuery)
	return func(c echo.Context) error {
		r, addr := c.Request(), exchangeOf(c).remote
		if len(r.Header[echo.HeaderAuthorization]) > 0 && !plain { // whoever has a key is judged by it
			return other(c)
		}
		from, shown := s.sources.shown(r, addr)
		if shown != nil {
			if now := s.cfg.Clock.Now().Time; now.Before(shown.NotBefore) || now.After(shown.NotAfter) {
				return problem.New(problem.Forbidden, "客户端证书不在有效期内 (the client certificate is not valid now)", "请换发证书并由管理员登记 (have a new one listed)")
			}
		}
		if from == nil {
			from = s.sources.at(addr)
		}
		if from == nil && plain && addr.IsLoopback() {
			from = s.sources.loopback
		}
		if from == nil {
			s.sources.unlisted.Add(1)
			return other(c)
		}
		exchangeOf(c).source = from.requester
		data, err := s.receive(c, b, nil)
		if err != nil {
			return err
		}
		if !from.quota.Allow() { // a monotonic interval
			from.limited.Add(1)
			p := problem.New(problem.RateLimited, "该来源的请求过于频繁 (the source's quota is used up)", retryLater)
			p.After = until(from.quota, 1)
			return p
		}
		from.served.Add(1)
		return s.admitted(c, from.requester, func(ctx context.Context) error { return s.stamp(ctx, c, from.requester, data) })
	}
}

// unlisted refuses a caller of the plain listener that is no source.
func (s *Server) unlisted(echo.Context) error {
	return problem.New(problem.Forbidden, "该地址不在时间戳来源之列 (this address is not a listed source of timestamp requests)", "请管理员登记，见 docs/configuration.md 的 listen.tsa_sources (have it listed)")
}

// remoteAddr is who sends; nobody's forwarding header is believed.
func remoteAddr(r *http.Request) netip.Addr {
	a, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap().WithZone("")
}
