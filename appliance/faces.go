package appliance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pack"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/uses"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

// What the listeners see of the appliance: small adapters to package api's interfaces, one type for each.

// apiClock is the trusted clock for the API. Before the first agreement there is none, and request times are held
// against the machine's own clock, in a state that says so; nothing of that becomes evidence.
type apiClock struct{ a *Appliance }

func (c apiClock) Now() ntp.Reading {
	r := c.a.clock.Now()
	if r.Time.IsZero() {
		r.Time = c.a.sys.Realtime().UTC()
	}
	return r
}

type stamps struct{ a *Appliance }

func (s stamps) Units() []string {
	var names []string
	for _, u := range s.a.cfg.units() {
		names = append(names, u.Name)
	}
	return names
}

func (s stamps) Respond(ctx context.Context, unit, requester string, der []byte) ([]byte, error) {
	u, ok := s.a.units[unit]
	if !ok {
		return nil, fmt.Errorf("no timestamp unit %q", unit)
	}
	return s.a.service.respond(unit, requester, func() []byte {
		// Before anything is signed: a signature that is thrown away takes room in the journal, too.
		if err := s.a.tokenReserve(); err != nil {
			s.a.log.WithError(err).WithField("unit", unit).Error("timestamp refused: no room")
			return tsa.Reject(tsa.SystemFailure, "the authority cannot serve the request now")
		}
		defer s.a.journal.Expect()() // so that tokens share transactions as signatures do
		ctx := hsm.WithCaller(ctx, hsm.Caller{Application: requester})
		return s.a.stamper(u).Respond(WithRequester(ctx, requester), der)
	}), nil
}

type health struct{ a *Appliance }

func (h health) Alive() error { return nil }

// Ready says whether a signature asked for now would be made.
func (h health) Ready() (bool, []string) {
	reasons := h.reasons(true)
	return len(reasons) == 0, reasons
}

// reasons are why it would not be made; not that nobody stamps, unless stamping is asked for.
func (h health) reasons(stamping bool) []string {
	reasons := []string{}
	if r := h.a.clock.Now(); !r.Trusted() || r.Bound > time.Duration(h.a.cfg.Time.Accuracy) {
		reasons = append(reasons, "时间不可信 (time is not trusted)")
	} else if err := h.a.watch.Ready(time.Duration(h.a.cfg.Time.Accuracy)); errors.Is(err, tsa.ErrTimeNotAvailable) && !h.a.device.serves() { // one that does not answer is a reason of its own
		reasons = append(reasons, "时间戳进程的时间不可信，须盖时间戳的签名被拒绝 (the time of the timestamp worker is not trusted; signatures that need a stamp are refused)")
	}
	if h.a.softtokenDown.Load() {
		reasons = append(reasons, "软件密码机已停止，正在重启 (the software cipher machine has ended and is being started again)")
	}
	missing, _ := h.a.machines.missing()
	reasons = append(reasons, missing...)
	if stopped := h.stoppedUnits(); stamping && len(stopped) > 0 && len(stopped) == len(h.a.units) && !h.a.device.serves() {
		reasons = append(reasons, "没有可用的时间戳单元，须盖时间戳的签名被拒绝 (no timestamp unit stamps; signatures that need a stamp are refused)")
	}
	if stamping && h.a.device.only() && !h.a.device.serves() {
		reasons = append(reasons, "上游时间戳设备不可用，须由它盖时间戳的签名被拒绝 (the upstream timestamp device is not usable; signatures that need its stamp are refused)")
	}
	if err := h.a.journal.Failed(); err != nil {
		reasons = append(reasons, "日志不可写 (the journal is closed for writing)")
	} else if err := h.a.reserve(); err != nil {
		reason := "存储空间低于保留值 (too little room left)"
		var p *problem.Problem
		if errors.As(err, &p) {
			reason = p.Detail
		}
		reasons = append(reasons, reason)
	}
	return reasons
}

// stoppedUnits are the timestamp units that stamp nothing, with the reason. While time is not trusted there is no time to
// judge a certificate at, which is a reason of its own.
func (h health) stoppedUnits() map[string]error {
	out := map[string]error{}
	r := h.a.clock.Now()
	for name := range h.a.units {
		if err := h.a.service.ready(name); err != nil {
			out[name] = err
		}
	}
	for name, u := range h.a.units {
		if u.current.Load() == nil {
			out[name] = errUncertified
			continue
		}
		if !r.Trusted() {
			continue
		}
		if _, err := h.a.directory.Standing(u.Chain(), pki.TimeStamping, r.Time); err != nil {
			out[name] = err
		}
	}
	return out
}

// A state is the body of /health/state.
type state struct {
	State string `json:"state"`
	// Ready says whether a signature asked for now would be made; if not, the reasons stand among the warnings.
	Ready      bool                 `json:"ready"`
	Node       string               `json:"node"`
	Campus     string               `json:"campus"`
	Version    string               `json:"version"`
	UptimeS    int64                `json:"uptime_s"`
	Evaluation string               `json:"evaluation"`
	Time       timeState            `json:"time"`
	HSM        map[string]slotState `json:"hsm"`      // of machine main
	Machines   []machineState       `json:"machines"` // that one, and those beside it
	Journal    journalState         `json:"journal"`
	Projection projectionState      `json:"projection"`
	Directory  directoryState       `json:"directory"`
	Uses       usesState            `json:"uses"`
	Listeners  map[string]string    `json:"listeners"`
	// Certificate is the listeners' own: what a client that has no anchor for it compares.
	Certificate *servedCertificate `json:"certificate,omitempty"`
	// Peer is the other campus, if this appliance is paired.
	Peer *peerState `json:"peer,omitempty"`
	// Upstream is the timestamp device beside our own units, if there is one.
	Upstream *upstreamState `json:"upstream,omitempty"`
	// Drill is the drill that is under way, if there is one.
	Drill *wire.DrillState `json:"drill,omitempty"`
	// Packs are makers' packs on a sealed appliance.
	Packs []pack.Installed `json:"packs,omitempty"`
	// TimestampSources are the callers of /tsa without a key, and what they asked for since the start.
	TimestampSources sourcesState `json:"timestamp_sources"`
	Warnings         []string     `json:"warnings"`
}

// A servedCertificate names the listeners' TLS certificate.
type servedCertificate struct {
	Fingerprint string `json:"fingerprint"` // SHA-256 of its DER, in hexadecimal, as browsers and openssl show it
	NotAfter    string `json:"not_after"`   // RFC 3339
}

type sourcesState struct {
	Sources  []api.SourceState `json:"sources"`
	Unlisted uint64            `json:"unlisted"` // requests without a key from elsewhere, all refused
}

type timeState struct {
	State      ntp.State `json:"state"`
	Time       string    `json:"time,omitempty"`
	BoundMS    float64   `json:"bound_ms"`
	Provenance string    `json:"provenance"`
	// Workers are the clocks of the timestamp workers, which tokens are made by.
	Workers []workerTime `json:"workers"`
}

// A workerTime is what is known of one timestamp worker's clock.
type workerTime struct {
	Machine string    `json:"machine"`
	State   ntp.State `json:"state"`
	BoundMS float64   `json:"bound_ms"`
	// Wrong says how it contradicts the appliance's own clock; such a worker's tokens are not used.
	Wrong string `json:"wrong,omitempty"`
}

type slotState struct {
	Phase    string  `json:"phase"`
	SinceS   float64 `json:"since_s"`
	Restarts int     `json:"restarts"`
	Sessions int     `json:"sessions"`
	PID      int     `json:"pid"`
	Error    string  `json:"last_error,omitempty"`
}

type projectionState struct {
	Shipped uint64 `json:"shipped"`
	Lag     uint64 `json:"lag"`
	Fork    bool   `json:"fork"`
	// Rebuild is how far a rebuild is, while there is one.
	Rebuild *audit.RebuildProgress `json:"rebuild,omitempty"`
	// Archive is how far the moving of closed months' rows is, while there is one.
	Archive *audit.RebuildProgress `json:"archive,omitempty"`
	Error   string                 `json:"last_error,omitempty"`
}

// A usesState says how many signatures each slot made, and what accounts for them.
type usesState struct {
	uses.Summary
	Error string `json:"last_error,omitempty"`
}

type journalState struct {
	Entries    uint64 `json:"entries"`
	Epoch      string `json:"epoch"`
	Checkpoint uint64 `json:"checkpoint"`
	FreeBytes  uint64 `json:"free_bytes"`
	Failed     string `json:"failed,omitempty"`
}

// workerTimes are the clocks of the timestamp workers, as they last told.
func (a *Appliance) workerTimes() []workerTime {
	out := []workerTime{}
	for _, k := range a.watch.Clocks() {
		out = append(out, workerTime{k.Machine, k.Reading.State, float64(k.Reading.Bound.Microseconds()) / 1000, errorText(k.Wrong)})
	}
	return out
}

func (h health) State() any {
	a := h.a
	r := a.clock.Now()
	s := state{
		State: "operational", Node: a.cfg.Node, Campus: a.cfg.Campus, Version: Version, Evaluation: a.evaluationWords(),
		UptimeS: int64((a.sys.Boot() - a.started).Seconds()), HSM: map[string]slotState{}, Warnings: []string{},
		Time:      timeState{State: r.State, BoundMS: float64(r.Bound.Microseconds()) / 1000, Provenance: r.Provenance},
		Listeners: map[string]string{"api": a.apiAddr + " (TLS 1.3)"},
	}
	if a.cfg.Listen.TLS12 {
		s.Listeners["api"] = a.apiAddr + " (TLS 1.3、1.2)"
	}
	s.Certificate = a.listener.state()
	s.Drill = a.drills.shown()
	s.Warnings = append(s.Warnings, a.drills.warnings()...)
	s.Warnings = append(s.Warnings, a.listener.warnings()...)
	s.Warnings = append(s.Warnings, a.lockWarnings()...)
	s.Warnings = append(s.Warnings, a.house.settings.warnings()...)
	s.Time.Workers = a.workerTimes()
	for _, k := range a.contradicting(r) {
		s.Warnings = append(s.Warnings, fmt.Sprintf("密码机 %s 的时间戳进程的时钟与本机不符，其时间戳不予采用 (the clock of this machine's timestamp worker contradicts the appliance's; its tokens are not used): %v", k.Machine, k.Wrong))
	}
	if !r.Time.IsZero() {
		s.Time.Time = r.Time.Format(time.RFC3339Nano)
	}
	if a.plain != "" {
		s.Listeners["tsa_plain"] = a.plain + " (明文，仅回环 plain, loopback only)"
		s.Warnings = append(s.Warnings, "时间戳明文端口已打开 (the plain timestamp listener is open)")
		if a.cfg.Listen.plainOpen() {
			s.Listeners["tsa_plain"] = a.plain + " (明文，限登记的来源 plain, listed sources only)"
			s.Warnings = append(s.Warnings, "红色警告：时间戳明文端口对网络开放，线路上的人可读、可改请求与应答，可冒用登记的地址；客户端须自行核验时间戳 "+
				"(RED: plain timestamps over the network; whoever is on the wire can read and change them and borrow a listed address; clients must verify their tokens)")
		}
	}
	s.Listeners["admin_local"] = "本机管理套接字，须登录 (the local socket asks for a login)"
	if a.cfg.Admin.Local == localOpen {
		s.Listeners["admin_local"] = "本机管理套接字，不要求登录：root 与服务用户可做一切 (open: root and the service's user do everything)"
	}
	if a.adminAddr != "" {
		s.Listeners["admin"] = a.adminAddr + " (TLS 1.3，管理员登录 for administrators who log in)"
	}
	if a.peerAddr != "" {
		s.Listeners["peer"] = a.peerAddr + " (TLS 1.3，仅对端院区 the other campus alone)"
	}
	s.Peer = a.peers.state()
	s.Warnings = append(s.Warnings, s.Peer.warnings()...)
	if s.Peer != nil && len(a.cfg.Listen.Names) == 0 {
		s.Warnings = append(s.Warnings, "没有配置 listen.names：业务系统发往另一院区的请求，得其明文者可原样发到本机 (without listen.names a request for the other campus is taken here too, if somebody sends it on)")
	}
	s.TimestampSources.Sources, s.TimestampSources.Unlisted = a.server.Sources()
	s.Machines = a.machines.states()
	_, away := a.machines.missing()
	s.Warnings = append(s.Warnings, away...)
	s.Warnings = append(s.Warnings, a.preserver.warnings()...)
	for class, w := range a.machines.all()[0].workers {
		ws := w.State()
		s.HSM[string(class)] = slotState{
			Phase: fmt.Sprint(ws.Phase), SinceS: ws.Since.Seconds(), Restarts: ws.Restarts, Sessions: ws.Sessions, PID: ws.PID, Error: errorText(ws.LastError),
		}
	}
	if a.cfg.Evaluation.Softtoken {
		s.Warnings = append(s.Warnings, "软件密码机，仅供评估，非认证产品 (software cipher machine: evaluation only, not a certified product)")
	}
	if v := a.cfg.Evaluation.Impersonate; v != "" {
		s.Warnings = append(s.Warnings, fmt.Sprintf("软件密码机按厂商档案 %s 应答 (it answers to this vendor profile)", filepath.Base(v)))
	}
	if a.cfg.Time.MinSources == 1 {
		s.Warnings = append(s.Warnings, "只要求一组时间源：掌握该源者即掌握时间 (one group of sources suffices: whoever owns it owns the time)")
	}
	for _, src := range a.poller.Status() {
		if src.Err != nil {
			s.Warnings = append(s.Warnings, fmt.Sprintf("时间源 %s 不可用 (time source is not usable): %v", src.Source, src.Err))
		}
	}
	if soon := a.soon.Load(); soon != nil {
		s.Warnings = append(s.Warnings, expiryWarnings(*soon)...)
	}
	for _, l := range a.lists.status() {
		if l.Error != "" {
			s.Warnings = append(s.Warnings, fmt.Sprintf("吊销列表 %s 未能更新 (the CRL could not be fetched): %s", l.URL, l.Error))
		}
	}
	if r.Trusted() {
		s.Warnings = append(s.Warnings, listWarnings(a.directory.ListCRLs(), r.Time)...)
	}
	stopped := h.stoppedUnits()
	for _, name := range slices.Sorted(maps.Keys(stopped)) {
		s.Warnings = append(s.Warnings, fmt.Sprintf("时间戳单元 %s 拒绝盖时间戳，须盖时间戳的签名也被拒绝 (the unit stamps nothing, and signatures that need it are refused): %v", name, stopped[name]))
	}
	s.Upstream = a.device.state()
	s.Warnings = append(s.Warnings, a.device.warnings()...)
	s.Packs, _ = a.lastPacks() // the error is among the warnings
	s.Warnings = append(s.Warnings, a.packWarnings()...)
	s.Warnings = append(s.Warnings, a.custodyWarnings()...)
	if a.cfg.Trust.Revocation == RevocationSoft {
		s.Warnings = append(s.Warnings, "吊销策略为 soft：状态不明的证书也可签名 (revocation policy soft: certificates of unknown status sign)")
	}
	s.Journal.Entries, s.Journal.Epoch = a.journal.Size(), a.journal.Epoch().String()
	if c, err := a.journal.LastCheckpoint(); err == nil {
		s.Journal.Checkpoint = c.Size
	}
	s.Journal.FreeBytes, _ = a.journal.FreeBytes() // 0 says enough
	if sealed := a.journal.SealedTo(); sealed < s.Journal.Entries {
		s.Warnings = append(s.Warnings, fmt.Sprintf("日志末 %d 条尚未封存（密码机 log 槽位不应答？）；此时断电则下次启动须人工确认 (%d entries are not sealed yet: does the log slot answer?)",
			s.Journal.Entries-sealed, s.Journal.Entries-sealed))
	}
	if err := a.journal.Failed(); err != nil {
		s.State, s.Journal.Failed = "failed", "日志已停止写入，详见运行日志 (closed for writing, see the log)"
	}
	s.Projection = a.projection.status()
	s.Directory = a.directoryState()
	s.Warnings = append(s.Warnings, s.Directory.warnings()...)
	s.Warnings = append(s.Warnings, a.projection.warnings()...)
	s.Warnings = append(s.Warnings, a.backups.warnings()...)
	if s.Projection.Fork {
		s.Warnings = append(s.Warnings, "分叉告警：投影库中同一位置有另一条目 (fork alarm: the projection holds another entry under the same key)")
	}
	s.Uses = a.accounting.status()
	if n := s.Uses.Alarms; n > 0 {
		s.Warnings = append(s.Warnings, fmt.Sprintf("密钥使用告警：%d 项使用没有对应的记录，或使用记录被改动；运行 yinjian audit verify 查看 (key uses: %d alarms, signatures without an entry or a log of uses that was changed; see yinjian audit verify)", n, n))
	}
	if s.Uses.Error != "" {
		s.Warnings = append(s.Warnings, "密钥使用与日志的核对未能完成 (the uses of keys could not be held against the journal): "+s.Uses.Error)
	}
	ready, reasons := h.Ready()
	s.Ready, s.Warnings = ready, append(s.Warnings, reasons...)
	return s
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

type admin struct{ a *Appliance }

func (d admin) RegisterApplication(ctx context.Context, actor string, req api.RegisterApplication) (*api.RegisteredApplication, error) {
	app := account.Application{ID: req.ID, Name: req.Name, Campus: req.Campus, Rights: req.Rights, Stamp: req.Stamp, Test: req.Test, Production: req.Production, Rate: req.Rate, Burst: req.Burst, HSMRate: req.HSMRate, HSMSessions: req.HSMSessions}
	for _, m := range req.Consent {
		app.Consent = append(app.Consent, evidence.Method(m))
	}
	registered, key, err := d.a.directory.RegisterApplication(ctx, actor, app)
	if err != nil {
		return nil, err
	}
	return &api.RegisteredApplication{Application: registered, Key: key}, nil
}

func (d admin) StopApplication(ctx context.Context, actor string, req api.Decision) (any, error) {
	return d.a.directory.StopApplication(ctx, actor, req.ID, true, req.Reason)
}

func (d admin) LimitApplication(ctx context.Context, actor string, req api.LimitApplication) (any, error) {
	return d.a.directory.LimitApplication(ctx, actor, req.ID, account.Limits{Rate: req.Rate, Burst: req.Burst, HSMRate: req.HSMRate, HSMSessions: req.HSMSessions}, req.Reason)
}

func (d admin) ListApplications(context.Context, string) (any, error) {
	return d.a.directory.Applications(), nil
}

func (d admin) EnrolSigner(ctx context.Context, actor string, req api.EnrolSigner) (any, error) {
	return d.view(d.a.directory.Enrol(ctx, actor, account.Enrolment{
		ID: req.ID, Name: req.Name, Department: req.Department, Campus: req.Campus, Algorithms: req.Algorithms, PIN: req.PIN, External: req.CA == "external",
		Role: req.Role, Test: req.Test,
	}))
}

func (d admin) AddSignerKey(ctx context.Context, actor string, req api.AddSignerKey) (any, error) {
	return d.view(d.a.directory.AddSignerKey(ctx, actor, req.Signer, req.Algorithm, req.CA == "external"))
}

// view leaves out what a PIN is verified by.
func (d admin) view(g *account.Signer, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return d.a.directory.View(g), nil
}

func (d admin) SetSignerPIN(ctx context.Context, actor string, req api.SetSignerPIN) (any, error) {
	return d.view(d.a.directory.SetPIN(ctx, actor, req.Signer, req.OldPIN, req.PIN))
}

func (d admin) StopSigner(ctx context.Context, actor string, req api.Decision) (any, error) {
	return d.view(d.a.directory.StopSigner(ctx, actor, req.ID, true, req.Reason))
}

func (d admin) StartSigner(ctx context.Context, actor string, req api.Decision) (any, error) {
	return d.view(d.a.directory.StopSigner(ctx, actor, req.ID, false, req.Reason))
}

func (d admin) ListSigners(context.Context, string) (any, error) {
	views := []*account.SignerView{}
	for _, g := range d.a.directory.Signers() {
		views = append(views, d.a.directory.View(g))
	}
	return views, nil
}

func (d admin) RevokeCertificate(ctx context.Context, actor string, req api.RevokeCertificate) (any, error) {
	return d.a.directory.Revoke(ctx, actor, req.Serial, req.Reason)
}

func (d admin) IssueCRL(ctx context.Context, actor string, _ api.IssueCRL) (any, error) {
	if err := d.a.directory.PublishCRLs(ctx, actor); err != nil {
		return nil, err
	}
	out := map[string]any{}
	for _, alg := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048} {
		if l := d.a.directory.CRL(string(alg)); l != nil {
			out[string(alg)] = map[string]any{"number": l.Number, "this_update": l.ThisUpdate, "next_update": l.NextUpdate, "der": l.DER}
		}
	}
	return out, nil
}

func (d admin) AuditVerify(ctx context.Context, actor string, _ wire.AuditVerify) (any, error) {
	w := d.a.works.begin("verify")
	defer w.end()
	return audit.Verify(ctx, d.a.store, audit.Options{
		LogKey: d.a.logKey.Public(), CheckToken: d.a.checkToken(), Sealer: headSealer{macKeys{d.a.tokens[hsm.Log]}}, Progress: w.is,
	})
}

func (d admin) Compare(ctx context.Context, actor string, _ wire.Compare) (any, error) {
	defer d.a.works.begin("compare").end()
	report, err := d.a.projection.compare(ctx)
	if report == nil {
		return nil, problem.New(problem.NotReady, "投影库未打开 (the projection is not open)", "见 yinjian status 与运行日志；库已损坏则 yinjian db rebuild (see yinjian status and the log; yinjian db rebuild for a damaged one)").With(err)
	}
	return report, err
}

// Stamp has the first unit answer a request of the administrator's, journalled as every token is.
func (d admin) Stamp(ctx context.Context, actor string, req wire.Stamp) (any, error) {
	der, err := stamps(d).Respond(ctx, d.a.cfg.units()[0].Name, actor, req.Request)
	if err != nil {
		return nil, err
	}
	return wire.Stamped{Response: der}, nil
}

// An adminState is what administrators see beyond what applications do.
type adminState struct {
	state
	Throughput throughputState `json:"throughput"`
	// Work is what takes long and is under way, Reports the last of each kind that was filed.
	Work    []workState           `json:"work"`
	Reports map[string]lastReport `json:"reports"`
}

func (d admin) State(context.Context, string) (any, error) {
	a := d.a
	return adminState{health(d).State().(state), a.throughput.state(a.throughput.now()), a.works.state(), a.reports.state()}, nil
}

// batchMAC is the projection's MAC key.
func (a *Appliance) batchMAC() audit.MAC {
	return batchMAC{macKeys{a.tokens[hsm.Log]}}
}

type batchMAC struct{ keys macKeys }

func (b batchMAC) MAC(ctx context.Context, data []byte) ([]byte, error) {
	return b.keys.MAC(ctx, batchLabel, data)
}
