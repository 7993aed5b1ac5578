package appliance

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/preserve"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/ers"
)

// Preserve says when records are stamped again so that they outlive the timestamps' certificates and algorithms.
type Preserve struct {
	// 不自动盖存档时间戳；`yinjian preserve run` 仍可手动运行，见 [preservation.md](preservation.md) (archive timestamps are made on
	// command alone)
	// 缺省：`false`
	Off bool `toml:"off"`
	// 盖存档时间戳的时间戳单元 (the unit that stamps them)
	// 缺省：为 SM2 签名盖戳的单元，没有时为 RSA 的
	Unit string `toml:"unit"`
	// 新记录每隔多久成一批，10s–744h (how often a batch of records is closed)
	// 缺省：`24h`
	Every Duration `toml:"every"`
	// 存档时间戳终止之前多久续盖，24h–43800h (how long before its end one is renewed)
	// 缺省：`2160h`，90 天
	Lead Duration `toml:"lead"`
	// 散列树的摘要算法：SM3、SHA-256、SHA-384、SHA-512；改动即把已有记录全部按新算法重建 (digest of the hash trees; another
	// one renews all of them)
	// 缺省：`SM3`
	Digest string `toml:"digest"`
	// 某算法自某日起不再可信，如 `SM2 = "2045-01-01"`；此日之前改用别的算法续盖，此日起 `/v1/verify` 也不再凭它判为有效 (from
	// that day the algorithm is not relied on, by `/v1/verify` either)
	// 缺省：无
	AlgorithmEnds map[string]string `toml:"algorithm_ends,omitempty"`
}

func (p *Preserve) setDefaults() {
	def(&p.Every, Duration(24*time.Hour))
	def(&p.Lead, Duration(90*24*time.Hour))
	def(&p.Digest, string(ers.SM3))
}

func (p *Preserve) validate(bad func(key, format string, args ...any)) {
	if d := time.Duration(p.Every); d < 10*time.Second || d > 31*24*time.Hour {
		bad("preserve.every", "须在 10s 与 744h 之间 (between 10s and 744h)")
	}
	if d := time.Duration(p.Lead); d < 24*time.Hour || d > 5*365*24*time.Hour {
		bad("preserve.lead", "须在 24h 与 43800h 之间 (between 24h and 43800h)")
	}
	if !ers.Algorithm(p.Digest).Known() {
		bad("preserve.digest", "须为 SM3、SHA-256、SHA-384 或 SHA-512 (must be one of them)")
	}
	for name, day := range p.AlgorithmEnds {
		if !evidence.KnownAlgorithm(name) {
			bad("preserve.algorithm_ends."+name, "须为 SM2、SM3、SHA-256、SHA-384、SHA-512 或 RSA-2048 之类 (no algorithm is known by this name)")
		}
		if _, err := time.Parse(time.DateOnly, day); err != nil {
			bad("preserve.algorithm_ends."+name, "须为日期，如 2045-01-01 (must be a day like that)")
		}
	}
}

// ends are the days of AlgorithmEnds, each from its beginning in UTC.
func (p *Preserve) ends() map[string]time.Time {
	ends := map[string]time.Time{}
	for name, day := range p.AlgorithmEnds {
		ends[name], _ = time.Parse(time.DateOnly, day) // read when the configuration was
	}
	return ends
}

// A preserver archives and renews by itself while the appliance runs, unless it is told not to.
type preserver struct {
	a       *Appliance
	service *preserve.Service
}

// newPreserver is made before the directory is replayed, which it takes part in.
func newPreserver(a *Appliance) *preserver {
	c := a.cfg.Preserve
	p := &preserver{a: a}
	p.service = preserve.New(preserve.Config{
		Journal: a.journal, Clock: a.clock, Stamper: p, Validation: p.validation, Reserve: a.tokenReserve,
		Dir: filepath.Join(a.dir, "preserve"), Digest: ers.Algorithm(c.Digest), Every: time.Duration(c.Every), Lead: time.Duration(c.Lead),
		AlgorithmEnds: c.ends(), Discarded: a.accounting.discard, Log: a.log,
	})
	return p
}

// check refuses a start with a unit that is not there.
func (p *preserver) check() error {
	if name := p.a.cfg.Preserve.Unit; name != "" && p.unit() == nil {
		return fmt.Errorf("config.toml: preserve.unit：没有时间戳单元 %q (no such unit)", name)
	}
	return nil
}

// unit is the one that stamps, nil when there is none.
func (p *preserver) unit() *unit {
	if name := p.a.cfg.Preserve.Unit; name != "" {
		return p.a.units[name]
	}
	if u := p.a.unitFor(hsm.SM2); u != nil {
		return u
	}
	return p.a.unitFor(hsm.RSA2048)
}

// Issue satisfies preserve.Stamper. A unit whose certificate is revoked, or of unknown status under the policy "hard",
// archives nothing: what it stamped could be proved by nobody later.
func (p *preserver) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	u := p.unit()
	if u == nil {
		return nil, problem.New(problem.NotReady, "没有时间戳单元，不能盖存档时间戳 (there is no timestamp unit)", "在配置中设置单元 (configure one)")
	}
	if r := p.a.clock.Now(); r.Trusted() {
		if _, err := p.a.directory.Standing(u.Chain(), pki.TimeStamping, r.Time); err != nil {
			return nil, err
		}
	}
	return gatedUnit{p.a.service, u.name, u}.Issue(ctx, req)
}

// Chain satisfies preserve.Stamper.
func (p *preserver) Chain() []*smx509.Certificate {
	if u := p.unit(); u != nil {
		return u.Chain()
	}
	return nil
}

// validation is what stands beside each archive timestamp: the certificates above all units, and their newest lists. Without
// a list that is current today a token of that unit cannot be cleared once its certificate has ended, which is logged.
func (p *preserver) validation() (certificates []*smx509.Certificate, lists [][]byte) {
	issuers := map[string]bool{}
	open := map[string]bool{} // of units whose certificate has not ended, and no current list was met yet
	now := p.a.clock.Now().Time
	for _, name := range p.a.unitNames() {
		for _, path := range p.a.directory.Paths("tsa:" + name) {
			for _, c := range path[1:] {
				certificates = append(certificates, c)
			}
			for _, c := range path {
				issuers[string(c.RawIssuer)] = true
			}
			if path[0].NotAfter.After(now) {
				open[string(path[0].RawIssuer)] = true
			}
		}
	}
	for _, l := range p.a.directory.CRLs() {
		if issuers[string(l.RawIssuer())] {
			lists = append(lists, l.Raw())
			if !now.Before(l.ThisUpdate()) && !now.After(l.NextUpdate()) {
				delete(open, string(l.RawIssuer()))
			}
		}
	}
	if len(open) > 0 {
		p.a.log.WithField("issuers", len(open)).Warn("an archive timestamp is made without a current list of a unit's issuer: that unit's tokens cannot be cleared after its end")
	}
	return certificates, lists
}

// preserveLooks is how often it is looked whether something is due, at least.
const preserveLooks = time.Minute

// run does what is due until ctx ends. What goes wrong is shown, and tried again an hour later.
func (p *preserver) run(ctx context.Context) error {
	if first, err := p.a.journal.Entry(ctx, 0); err == nil {
		p.service.Since(first.Entry.Time.UTC())
	}
	var again time.Duration
	looks := min(preserveLooks, time.Duration(p.a.cfg.Preserve.Every)/5)
	for {
		select {
		case <-time.After(max(looks, again)):
		case <-ctx.Done():
			return nil
		}
		again = 0
		now := p.a.clock.Now()
		if p.a.cfg.Preserve.Off || now.State != ntp.Trusted || !p.service.Due(now.Time) {
			continue
		}
		out, err := p.service.Run(ctx, "appliance", false)
		switch {
		case err != nil && ctx.Err() == nil:
			p.a.log.WithError(err).Error("archive timestamps that are due could not be made; it is tried again in an hour")
			again = time.Hour
		case err == nil && *out != (preserve.Outcome{}):
			p.a.log.WithField("batches", out.Batches).WithField("records", out.Records).WithField("renewed", out.Renewed).Info("archive timestamps were made")
		}
	}
}

// warnings are what /health/state says of it.
func (p *preserver) warnings() []string {
	s := p.service.Status()
	switch {
	case s.Error != "":
		return []string{"存档时间戳未能按时盖出：" + s.Error + " (archive timestamps that are due could not be made)"}
	case p.a.cfg.Preserve.Off && len(s.Due) > 0:
		return []string{"自动存档已关闭，而有存档时间戳到期应盖：请运行 yinjian preserve run (archive timestamps are due, and making them by itself is off)"}
	}
	return nil
}

// evidenceRecord is a record's part of the archive, nil when it has none yet.
func (p *preserver) evidenceRecord(ctx context.Context, r *audit.Record) ([]byte, error) {
	return p.service.EvidenceRecord(ctx, r)
}

// RunPreserve satisfies api.Admin.
func (d admin) RunPreserve(ctx context.Context, actor string, _ api.RunPreserve) (any, error) {
	return d.a.preserver.service.Run(ctx, actor, true)
}

// A preserveReport is the status with what the configuration says.
type preserveReport struct {
	*preserve.Status
	Off   bool     `json:"off"`
	Unit  string   `json:"unit"`
	Every Duration `json:"every"`
	Lead  Duration `json:"lead"`
}

// PreserveStatus satisfies api.Admin.
func (d admin) PreserveStatus(context.Context, string) (any, error) {
	c := d.a.cfg.Preserve
	r := preserveReport{Status: d.a.preserver.service.Status(), Off: c.Off, Every: c.Every, Lead: c.Lead}
	if u := d.a.preserver.unit(); u != nil {
		r.Unit = u.name
	}
	return r, nil
}

// PreservedRecord satisfies api.Admin: the evidence of a record of any application.
func (d admin) PreservedRecord(ctx context.Context, _ string, req api.PreservedRecord) (any, error) {
	id, err := hex.DecodeString(req.ID)
	if err != nil {
		return nil, problem.Invalid("id", "须为 64 位十六进制 (64 hexadecimal digits)")
	}
	found, err := d.a.journal.ByRef(ctx, id)
	if errors.Is(err, audit.ErrNotFound) || err == nil && found[0].Entry.Kind != evidence.KindSign {
		return nil, problem.New(problem.NotFound, "没有这条记录 (no such record)", "核对记录号 (check the id)")
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	b, err := evidence.Build(ctx, d.a.journal, found[0])
	if err != nil {
		return nil, err
	}
	record, err := d.a.preserver.evidenceRecord(ctx, &found[0])
	if err != nil {
		return nil, err
	}
	if record != nil {
		b = b.WithRecord(record)
	}
	data, err := b.Encode()
	return json.RawMessage(data), err
}
