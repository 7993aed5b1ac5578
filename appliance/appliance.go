// Package appliance puts the parts together: it builds them from the configuration, starts them in order, watches over
// child processes and stops everything. It holds no procedure of its own beyond birth, start and stop.
//
// An appliance is in one of the states of docs/states.md ([Run]); this is the order of a start: clocks and sources → cipher machine (and its worker processes) → journal → identity → directory
// replayed from the journal → timestamp units → signing → listeners. Each step either holds or the start fails with
// what to do. A stop runs backwards and drains.
package appliance

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"yinjian/api"
	"yinjian/api/console"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/sign"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
	"yinjian/hsm/pool"
	"yinjian/ntp"
	"yinjian/ntp/gnss"
	"yinjian/ntp/source"
	"yinjian/ntp/sysclock"
	"yinjian/tsa/stamping"
)

// Version is this release.
const Version = "0.1.0"

// Options of [Run].
type Options struct {
	Dir string // the appliance's folder
	Log *logrus.Logger
	// Worker and Softtoken are the commands of the child processes: this program's own subcommands.
	Worker    []string
	Softtoken []string
	// RandomTests is the command of the process that tests random numbers for an assessment.
	RandomTests []string
	// Once has a start that fails end Run, and does not wait for a folder to be provisioned.
	Once bool
	// Provision makes an appliance in Dir, which is empty, from the answers of `yinjian init --answers` and the passphrases of
	// the holders that they name, and says what the first administrators' passwords are.
	Provision func(ctx context.Context, answers []byte, passphrases []string) ([]wire.FirstPassword, error)
	// RestoreAt is the address at which Dir, whose [AnswersFile] says so, waits for a backup; "": it does not.
	RestoreAt func() (string, error)
	// Restore makes Dir, in which this process waits, the appliance of a backup again, and says what was found, as JSON.
	Restore func(ctx context.Context, req RestoreRequest) ([]byte, error)
	// OnAttended, if set, is called when the local socket answers, in whatever state.
	OnAttended func()
	// OnStart, if set, is called when no other appliance runs in Dir and before anything is started, at each start.
	OnStart func()
	// OnReady is called when all listeners are open.
	OnReady func(Endpoints)
	// OnSettings, if set, is called before anything is started when this process has put other settings in place: another program may
	// be meant to run them.
	OnSettings func() error
	// TrialWithin and ReachWithin are how long a start may take with new settings, and how long until somebody has confirmed that
	// administrators reach it; zero: 5 and 30 minutes.
	TrialWithin, ReachWithin time.Duration
}

// Endpoints are where the running appliance listens.
type Endpoints struct {
	API      string            `json:"api"` // https://host:port
	Units    map[string]string `json:"-"`   // plain timestamp endpoints, by unit
	Admin    string            `json:"admin"`
	AdminTLS string            `json:"admin_tls,omitempty"` // https://host:port, "" when off
	TLSRoots string            `json:"tls_ca"`              // PEM file
}

// An Appliance is a running one.
type Appliance struct {
	house *house
	cfg   *Config
	dir   string
	log   *logrus.Logger

	sys      *sysclock.Clock
	clock    *ntp.Clock
	poller   *source.Poller
	time     *timekeeper
	watch    *stamping.Watch // of the timestamp workers' clocks
	receiver string          // where the simulated receiver is heard, host:port; empty without
	service  *stampService
	machines *machines
	tokens   map[hsm.SlotClass]hsm.Token // each a pool of the machines' tokens
	logKey   *hsm.Key
	store    *sqlite.Journal
	journal  *audit.Journal
	// projection is the central database of the embedded default.
	projection *projection
	accounting *accounting
	// softtokenDown is set while the software cipher machine does not run.
	softtokenDown atomic.Bool
	softtoken     atomic.Pointer[os.Process] // nil before it runs
	drills        drills
	images        leftImages
	serials       *serials

	identity  *identity
	listener  listenerIdentity
	directory *account.Service
	// missingVersions is how many objects have a version at the centre that does not come.
	missingVersions atomic.Int64
	signing         *sign.Service
	units           map[string]*unit
	preserver       *preserver
	backups         *backups
	logs            *logFiles
	packs           packs
	daemons         daemons
	alarms          *alarms
	assessor        *assessor
	patroller       patroller
	works           works
	reports         lastReports
	throughput      *throughput
	configSM3       string                 // of config.toml as it was read at the start
	program         func() (string, error) // SM3 of the running program
	device          *upstreamDevice        // nil when there is none
	trust           evidence.Trust

	peers    *peers
	peerAddr string // of the listener for the other campus, "" when off

	lists     *listSources
	soon      atomic.Pointer[[]account.CertificateLine] // certificates that end soon
	keys      keyCache
	server    *api.Server
	apiAddr   string // of the TLS listener, with the port that was picked
	adminAddr string // of the administrators' TLS listener, "" when off
	plain     string // address of the plain timestamp listener, "" when off
	started   time.Duration
}

// A stage is a group of goroutines that stop together.
type stage struct {
	group  *errgroup.Group
	cancel context.CancelFunc
}

func newStage(ctx context.Context) (*stage, context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	return &stage{g, cancel}, ctx
}

// stop ends the stage and waits.
func (s *stage) stop() error {
	s.cancel()
	err := s.group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// run is one start and what follows it, until ctx ends or a part fails that nothing can stand in for.
func (h *house) run(ctx context.Context, cfg *Config) (err error) {
	o, dir := h.o, h.o.Dir
	a := &Appliance{house: h, cfg: cfg, dir: dir, log: o.Log, tokens: map[hsm.SlotClass]hsm.Token{}}
	a.machines = &machines{a: a, pools: map[hsm.SlotClass]*pool.Pool{}}
	a.lists = &listSources{a: a, last: map[string]fetched{}}

	a.accounting = newAccounting(a)
	a.drills.a = a
	hooks := maps.Clone(h.log.Hooks) // what this start adds to the log goes with it
	a.logs = startLogFiles(a, cfg.Log)
	a.assessor = &assessor{a: a, command: o.RandomTests}
	a.configSM3, _ = fileSM3(filepath.Join(dir, "config.toml")) // "": it is gone since it was read
	a.program = sync.OnceValues(func() (string, error) { return fileSM3("/proc/self/exe") })

	// What is started is undone in the reverse order: listeners first, so that what they still do finds everything; the
	// journal before its store, the workers after both, the software cipher machine after its workers, time last.
	undo := []func() error{func() error {
		h.log.ReplaceHooks(hooks)
		return nil
	}, a.logs.close}
	var stages []*stage
	base := context.WithoutCancel(ctx)
	begin := func() (*stage, context.Context) {
		s, sctx := newStage(base)
		stages = append(stages, s)
		undo = append(undo, s.stop)
		return s, sctx
	}
	defer func() {
		h.stops()
		for _, f := range slices.Backward(undo) {
			if uerr := f(); uerr != nil && err == nil {
				err = uerr
			}
		}
		if ctx.Err() != nil && errors.Is(err, context.Canceled) { // told to stop while it was starting
			err = nil
		}
	}()

	// 1. Clocks.
	h.at(stepClocks)
	times, tctx := begin()
	if err := a.startTime(tctx, times); err != nil {
		return err
	}

	// 2. The cipher machine. Its workers outlive every other stage but time.
	h.at(stepMachines)
	if cfg.Evaluation.Softtoken {
		soft, sctx := begin()
		command := o.Softtoken
		if v := cfg.Evaluation.Impersonate; v != "" {
			command = slices.Concat(command, []string{"--impersonate", v})
		}
		soft.group.Go(func() error { return a.superviseSofttoken(sctx, command) })
	}
	undo = append(undo, func() error {
		a.machines.close()
		a.daemons.unused(func(string) bool { return false }) // libraries take leave of theirs first
		return nil
	})
	if err := a.startMachines(ctx, o.Worker); err != nil {
		return err
	}

	// 3. The journal. Its checkpoint key must be there before it opens; only an empty journal may have a new one made.
	h.at(stepJournal)
	a.store, err = sqlite.OpenJournal(ctx, sqlite.JournalConfig{
		Dir: filepath.Join(dir, "journal"), SegmentEntries: cfg.Policy.SegmentEntries, Monthly: true,
		Notice: func(err error) {
			a.log.WithError(err).Warning("looking records up costs more until the index is made anew")
		},
	})
	if err != nil {
		return err
	}
	undo = append(undo, a.store.Close)
	size, _, err := a.store.Head(ctx)
	if err != nil {
		return err
	}
	if size == 0 {
		if err := a.checkNotReborn(ctx); err != nil {
			return err
		}
	}
	newEpoch, restored, err := readRestored(dir) // left by a restore: the next start begins an epoch
	if err == nil && newEpoch {
		err = a.checkRestoredMachine(ctx)
	}
	if err != nil {
		return err
	}
	if err := a.ensureLogKeys(ctx, size == 0); err != nil {
		return err
	}
	a.anchor().restore(ctx) // whose key is in the cipher machine, and before the first answer of a source
	times.group.Go(func() error { return a.poller.Run(tctx) })
	a.journal, err = audit.Open(ctx, audit.Config{
		Store: a.store, Node: cfg.Node, Clock: a.clock, Log: a.log, Checkpointer: a.logKey, NewEpoch: newEpoch,
		LogKeys: []crypto.PublicKey{a.logKey.Public()}, Sealer: headSealer{macKeys{a.tokens[hsm.Log]}},
		Discarded:  a.accounting.discard,
		UnsealedOK: func(e *audit.Entry) bool { return e.Kind == kindTimeState || e.Kind == kindStarted },
	})
	if err != nil {
		return err
	}
	if !newEpoch {
		born, err := a.hasIdentity(ctx)
		if err != nil {
			return err
		}
		if err := a.checkHead(ctx, born); err != nil {
			return err
		}
	}
	if _, err := a.saveHead(ctx); err != nil {
		return fmt.Errorf("journal.head 无法写入，请检查磁盘空间与权限 (cannot be written: look at free space and permissions): %w", err)
	}
	journal, jctx := begin()
	journal.group.Go(func() error { return a.journal.Run(jctx) })
	// The head file is kept by a stage after the journal's, so that its last version is written before the journal ends.
	heads, hctx := begin()
	heads.group.Go(func() error { return a.keepHead(hctx) })
	watching, wctx := begin()
	watching.group.Go(func() error { return a.machines.run(wctx) })
	watching.group.Go(func() error { return a.time.run(wctx) })

	// The other campus may know more of this journal than the head file: it is asked before anything is written.
	if a.peers, err = newPeers(ctx, a); err != nil {
		return err
	}
	if err := a.peers.checkOwnHead(ctx); err != nil {
		return err
	}

	// 4. Who we are.
	h.at(stepIdentity)
	started := audit.Draft{
		Kind: kindStarted, Actor: "appliance", Object: cfg.Node,
		Fields: []audit.Field{{Name: "version", Value: audit.Text(Version)}, {Name: "evaluation", Value: audit.Text(a.evaluationWords())}, a.accounting.announced()},
	}
	// What the last checkpoint said before this start becomes part of the tree: whoever rewrites what came after it has
	// to rewrite this entry too, and every checkpoint since.
	if c, err := a.journal.LastCheckpoint(); err == nil {
		note := audit.Sum(c.Note)
		started.Fields = append(started.Fields, audit.Field{Name: "checkpoint.size", Value: audit.Int(c.Size)}, audit.Field{Name: "checkpoint.sm3", Value: audit.Octets(note[:])})
	}
	receipt, err := a.journal.Append(ctx, started)
	if err != nil {
		return err
	}
	a.serials = newSerials(receipt.Epoch, receipt.Sequence)
	if newEpoch {
		if err := a.announceRestore(ctx, restored); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(dir, restoredMark)); err != nil {
			return err
		}
	}
	if err := errors.Join(a.journalUnlocking(ctx), a.machines.settle(ctx), a.time.settle(ctx), a.service.replay(ctx), a.logs.replay(ctx)); err != nil {
		return err
	}
	// What an end without a stop left behind is named before anything new is signed.
	a.accounting.pass(ctx, false)
	authorities, err := a.establishIdentity(ctx)
	if err != nil {
		return err
	}

	// 5. The directory, replayed.
	h.at(stepDirectory)
	if err := a.startDirectory(ctx, authorities); err != nil {
		return err
	}
	if err := a.makeFirstAdministrators(ctx); err != nil {
		return err
	}

	// 6. Timestamps and signing.
	h.at(stepServices)
	if a.device, err = a.openUpstream(); err != nil {
		return err
	}
	if err := a.startUnits(ctx); err != nil {
		return err
	}
	if err := a.preserver.check(); err != nil {
		return settingError{err}
	}
	checkpoints := a.unitFor(hsm.SM2)
	if checkpoints == nil {
		checkpoints = a.unitFor(hsm.RSA2048)
	}
	if checkpoints != nil {
		a.journal.SetStamper(checkpointStamper{a, gatedUnit{a.service, checkpoints.name, checkpoints}})
	}
	if err := a.startSigning(); err != nil {
		return err
	}
	if err := a.reports.load(ctx, admin{a}); err != nil {
		return err
	}

	// 7. Duties.
	duties, dctx := begin()
	a.projection = newProjection(a)
	a.throughput = newThroughput(a)
	duties.group.Go(func() error { return a.throughput.run(dctx) })
	duties.group.Go(func() error { return a.projection.run(dctx) })
	duties.group.Go(func() error { return a.projection.keepSweeping(dctx) })
	duties.group.Go(func() error { return a.projection.keepArchiving(dctx) })
	duties.group.Go(func() error { return a.refreshCRLs(dctx) })
	duties.group.Go(func() error { return a.anchor().keep(dctx) })
	duties.group.Go(func() error { return a.lists.run(dctx) })
	duties.group.Go(func() error { return a.watchExpiry(dctx) })
	duties.group.Go(func() error { return a.accounting.run(dctx) })
	duties.group.Go(func() error { return a.keepRolling(dctx) })
	duties.group.Go(func() error { return a.endConsents(dctx) })
	duties.group.Go(func() error { return a.tellFailedLogins(dctx) })
	duties.group.Go(func() error { return a.settleDirectory(dctx) })
	duties.group.Go(func() error { return a.preserver.run(dctx) })
	duties.group.Go(func() error { return a.backups.run(dctx) })
	duties.group.Go(func() error { return a.logs.run(dctx) })
	duties.group.Go(func() error { return a.peers.run(dctx) })
	duties.group.Go(func() error { return a.drills.run(dctx) })
	if a.device != nil {
		duties.group.Go(func() error { return a.device.run(dctx) })
	}

	if err := a.notePacksFound(ctx); err != nil {
		return err
	}
	if a.alarms, err = newAlarms(a); err != nil {
		return err
	}

	// 8. Listeners.
	h.at(stepListeners)
	undo = append(undo, func() error { // after the listeners' stage: keeps over a restart which requests were let through
		if a.server == nil {
			return nil
		}
		return a.server.Close()
	})
	serving, lctx := begin()
	endpoints, err := a.listen(lctx, serving)
	if err != nil {
		return err
	}
	serving.group.Go(func() error { return a.alarms.run(lctx) }) // which looks at the listeners too
	serving.group.Go(func() error { return a.proveImage(lctx) })
	serving.group.Go(func() error { return a.proveSettings(lctx) })
	h.operational()
	a.log.WithFields(logrus.Fields{"api": endpoints.API, "node": cfg.Node}).Info("appliance is operational")
	if o.OnReady != nil {
		o.OnReady(*endpoints)
	}

	// 9. Until somebody says stop, or a stage fails.
	failed := make(chan error, len(stages))
	var watchers sync.WaitGroup
	for _, s := range stages {
		watchers.Go(func() { failed <- s.group.Wait() })
	}
	select {
	case <-ctx.Done():
		a.log.Info("stopping: finishing what was begun")
		return nil
	case err := <-failed:
		if err == nil {
			err = errors.New("a part of the appliance ended by itself")
		}
		return err
	}
}

// evaluationWords says which conveniences are on that no hospital uses in production.
func (a *Appliance) evaluationWords() string {
	var words []string
	if a.cfg.Evaluation.Softtoken {
		words = append(words, "软件密码机，仅供评估 (software cipher machine, evaluation only)")
	}
	if a.cfg.Evaluation.GNSSFeed {
		words = append(words, "模拟北斗，时间为本机时间 (simulated BeiDou, the time is the machine's own)")
	}
	if _, ok := a.cfg.HSM.Slots[string(hsm.TLS)]; !ok {
		words = append(words, "TLS 私钥是文件 (the TLS key is a file)")
	}
	if a.cfg.Listen.TSAPlain != "" {
		words = append(words, "明文时间戳端口 (plain timestamp listener)")
	}
	if len(words) == 0 {
		return "无 (none)"
	}
	return strings.Join(words, "; ")
}

func (a *Appliance) startTime(ctx context.Context, s *stage) error {
	sys, err := sysclock.Open()
	if err != nil {
		return err
	}
	a.sys, a.started = sys, sys.Boot()
	t := &a.cfg.Time
	if a.clock, err = ntp.NewClock(t.policy(), sys); err != nil {
		return err
	}
	a.watch = stamping.NewWatch(a.clock)
	a.time, a.service = newTimekeeper(a), newStampService(a)
	a.clock.OnChange(a.time.changed) // before the first reading; what is told waits for the journal
	list, err := a.readSources()
	if err != nil {
		return err
	}
	if a.cfg.Evaluation.GNSSFeed {
		dir := filepath.Join(a.dir, "run", "rack") // always the same: a kill leaves it behind
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		rack, err := gnss.StartRack(ctx, gnss.RackConfig{Dir: dir, Log: a.log, Clock: sys.Realtime})
		if err != nil {
			os.RemoveAll(dir)
			return fmt.Errorf("simulated BeiDou feed: %w", err)
		}
		s.group.Go(func() error {
			defer os.RemoveAll(dir)
			select {
			case <-ctx.Done():
			case <-rack.Done(): // the appliance goes on in Holdover and then refuses; the feed is for evaluation
				a.log.Error("simulated BeiDou feed has ended")
				<-ctx.Done()
			}
			if err := rack.Close(); err != nil { // why it had ended was logged
				a.log.WithError(err).Warning("the simulated BeiDou feed had ended before")
			}
			return nil
		})
		a.receiver = rack.Receiver
		list = append(list, &timeSource{TimeSource: TimeSource{Name: feedSource, Group: "evaluation-feed", Address: rack.Address}})
	}
	for _, one := range list {
		if err := a.time.open(one); err != nil {
			return fmt.Errorf("time source %s: %w", one.Name, err)
		}
	}
	if n := groupsOf(list); n < t.MinSources {
		return fmt.Errorf("time.min_sources: 连同 timesources.toml 只有 %d 组时间源，达不到 %d (only %d groups of sources with timesources.toml)", n, t.MinSources, n)
	}
	a.poller = &source.Poller{Clock: a.clock, Interval: time.Duration(t.Poll), Log: a.log, Observe: a.time.observe}
	return a.time.use(list)
}

// ensureLogKeys finds or, for an empty journal, makes the keys that must be there before the journal is.
func (a *Appliance) ensureLogKeys(ctx context.Context, mayMake bool) error {
	t := a.tokens[hsm.Log]
	info, _, err := ensureKey(ctx, t, logLabel, hsm.SM2, mayMake)
	if err != nil {
		return err
	}
	if a.logKey, err = hsm.KeyOf(t, info, *a.cfg.HSM.VerifyFresh); err != nil {
		return err
	}
	for _, label := range []string{account.PINKeyLabel, account.AppKeyLabel, batchLabel, headLabel} {
		if _, _, err := ensureKey(ctx, t, label, hsm.HMACSM3, mayMake); err != nil {
			return err
		}
	}
	return nil
}

// establishIdentity reads the identity from the journal, or makes it when time is trusted.
func (a *Appliance) establishIdentity(ctx context.Context) (map[string]*ca.Authority, error) {
	err := a.journal.State(ctx, func(r audit.Record) error {
		if r.Entry.Kind != kindIdentity {
			return nil
		}
		body, err := a.objectOf(ctx, &r.Entry)
		if err != nil {
			return err
		}
		id := new(identity)
		if err := json.Unmarshal(body, id); err != nil {
			return err
		}
		a.identity = id
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	if a.identity == nil {
		a.log.Info("a new appliance: waiting for trusted time to make its keys and certificates")
		if err := a.waitForTime(ctx); err != nil {
			return nil, err
		}
		id, authorities, err := a.birth(ctx)
		if err != nil {
			return nil, fmt.Errorf("birth: %w", err)
		}
		a.identity = id
		return authorities, nil
	}
	pub, err := smx509.MarshalPKIXPublicKey(a.logKey.Public())
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(pub, a.identity.LogKey) {
		return nil, errors.New("密码机里的日志密钥不是本机日志的密钥：可能接错了密码机 (the checkpoint key in the cipher machine is not this journal's: is it the right machine?)")
	}
	if a.identity.Node != a.cfg.Node {
		return nil, fmt.Errorf("config.toml 的 node 是 %q，而本机日志属于 %q (the journal belongs to another node)", a.cfg.Node, a.identity.Node)
	}
	if err := a.loadTLSKeys(ctx); err != nil {
		return nil, fmt.Errorf("TLS key: %w", err)
	}
	return a.authorities(ctx, a.identity.CAs, time.Time{})
}

func (a *Appliance) waitForTime(ctx context.Context) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for !a.clock.Now().Trusted() || a.watch.Ready(time.Duration(a.cfg.Time.Accuracy)) != nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (a *Appliance) objectOf(ctx context.Context, e *audit.Entry) ([]byte, error) {
	return a.journal.Payload(ctx, e, "object")
}

func (a *Appliance) startDirectory(ctx context.Context, authorities map[string]*ca.Authority) error {
	policy, err := a.cfg.custodyPolicy()
	if err == nil {
		err = a.checkCampusMACs(ctx)
	}
	if err != nil {
		return err
	}
	a.directory = account.New(account.Config{
		Journal: a.journal, Clock: a.clock, MAC: macKeys{a.tokens[hsm.Log]}, Node: a.cfg.Node, Slots: a.tokens, CAs: authorities, Log: a.log,
		SoftRevocation: a.cfg.Trust.Revocation == RevocationSoft, Discarded: a.accounting.discard, Custody: policy,
		PasswordLife: time.Duration(a.cfg.Admin.PasswordDays) * 24 * time.Hour, PasswordMin: a.cfg.Admin.PasswordMin,
	})
	if err := a.identity.register(a.directory, &a.listener); err != nil {
		return err
	}
	if err := a.addUnits(ctx); err != nil {
		return err
	}
	a.preserver = newPreserver(a)
	a.backups = newBackups(a)
	err = a.journal.State(ctx, func(r audit.Record) error {
		if err := errors.Join(a.preserver.service.Replay(ctx, &r.Entry), a.backups.Replay(ctx, &r.Entry)); err != nil {
			return err
		}
		a.drills.replay(&r.Entry)
		a.images.replay(&r.Entry)
		if err := a.peers.replay(ctx, &r.Entry); err != nil {
			return err
		}
		return a.directory.Replay(ctx, &r.Entry, func(name string) ([]byte, error) { return a.journal.Payload(ctx, &r.Entry, name) })
	})
	if err != nil {
		return fmt.Errorf("directory: %w", err)
	}
	if err := a.directory.Settle(ctx); err != nil {
		return err
	}
	_, err = a.directory.RefreshCRLs(ctx)
	return err
}

// refreshCRLs makes new CRLs in time, and keeps the published files the newest, also after a revocation.
func (a *Appliance) refreshCRLs(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	published := a.crlNumbers()
	for {
		select {
		case <-tick.C:
			if done, err := a.directory.RefreshCRLs(ctx); err != nil && ctx.Err() == nil {
				a.log.WithError(err).Error("no new CRL could be made; signing stops when the present one ends")
			} else if done {
				a.log.Info("new CRLs were made")
			}
			if n := a.crlNumbers(); n != published {
				if err := a.exportPublic(); err != nil {
					a.log.WithError(err).Error("the new CRLs could not be written to their files")
					continue
				}
				published = n
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *Appliance) crlNumbers() (n [2]int64) {
	for i, alg := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048} {
		if l := a.directory.CRL(string(alg)); l != nil {
			n[i] = l.Number
		}
	}
	return n
}

func (a *Appliance) startUnits(ctx context.Context) error {
	a.units = map[string]*unit{}
	for _, c := range a.cfg.units() {
		u := &unit{a: a, name: c.Name, terms: c.terms()}
		if err := u.refresh(ctx); err != nil {
			return err
		}
		a.units[c.Name] = u
	}
	a.machines.lookAtStamping(ctx) // whose clocks go on in Holdover where they can; what they say is known before the first request
	return nil
}

func (a *Appliance) startSigning() error {
	anchors, err := a.identity.anchors()
	if err != nil {
		return err
	}
	a.trust = evidence.Trust{Anchors: anchors, LogKeys: []crypto.PublicKey{a.logKey.Public()}}
	if pair, _ := a.peers.current(); pair != nil { // of one that is paired later /v1/verify says "not checked" until the next start
		a.trust.CosignerKeys = []crypto.PublicKey{pair.logKey}
	}
	a.keys = keyCache{token: a.tokens[hsm.Staff], verify: *a.cfg.HSM.VerifyFresh, keys: map[string]*hsm.Key{}}
	stampers := map[string]sign.Stamper{}
	for _, alg := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048} {
		if u := a.unitFor(alg); u != nil {
			stampers[string(alg)] = gatedUnit{a.service, u.name, a.stamper(u)}
		}
	}
	a.signing = sign.New(sign.Config{
		Directory: a.directory, Journal: a.journal, Keys: &a.keys, Clock: a.clock, Accuracy: time.Duration(a.cfg.Time.Accuracy),
		Caller: a.cfg.Policy.callerOf, Stampers: stampers,
		Reserve: a.reserve, Discarded: a.accounting.discard, Archived: a.preserver.evidenceRecord, Log: a.log, Trust: a.trust,
		AlgorithmEnds: a.cfg.Preserve.ends(),
	})
	return nil
}

// adminConnections are open at once at the administrators' listener; a quarter of them from one address.
const adminConnections = 128

func (a *Appliance) listen(ctx context.Context, s *stage) (*Endpoints, error) {
	sources, err := a.cfg.Listen.sources()
	if err != nil {
		return nil, settingError{err}
	}
	theme, err := console.LoadTheme(a.cfg.Admin.Theme)
	if err != nil {
		return nil, err
	}
	server, err := api.New(api.Config{
		Theme:   theme,
		Signing: countedSigning{a.signing, a.throughput}, Directory: a.directory, Stamps: stamps{a}, Tokens: tokens{a}, Health: health{a}, Admin: admin{a}, Accounts: accounts{a}, AdminLogin: a.cfg.Admin.Local == LocalLogin, Evaluation: a.cfg.Evaluation.Softtoken,
		Clock: apiClock{a}, Log: a.log, Version: Version,
		// Requests beyond the cipher machine's sessions wait for one.
		Limits: api.Limits{
			Body: int64(a.cfg.Policy.MaxBodyBytes), Concurrent: a.cfg.Policy.Concurrent, Failures: a.cfg.Policy.AuthFailures, Rate: a.cfg.Policy.rateOf,
			LoopbackRate: a.cfg.Policy.Rate, LoopbackBurst: a.cfg.Policy.Burst,
		},
		Sources: sources, Names: a.cfg.Listen.Names,
		ReplayFile: filepath.Join(a.dir, "run", "replay.json"), Succeeds: a.backups.since(apiClock{a}.Now().Time),
	})
	if err != nil {
		return nil, err
	}
	a.server = server
	if err := a.refreshListener(ctx); err != nil {
		return nil, err
	}
	if a.listener.certificate.Load() == nil { // every certificate has ended: the first one says so to clients
		if err := a.listener.use([][]byte{a.identity.TLSCert, a.identity.CAs[string(hsm.RSA2048)]}); err != nil {
			return nil, err
		}
	}
	drain := time.Duration(a.cfg.Policy.Drain)
	ln, err := api.ListenTLS(a.cfg.Listen.API, a.listener.certificate.Load, apiClock{a}, a.cfg.Listen.TLS12, func() bool { return a.cfg.Listen.asks() || a.directory.AsksClients() }, a.cfg.Policy.MaxConnections)
	if err != nil {
		return nil, err
	}
	a.apiAddr = ln.Addr().String()
	e := &Endpoints{API: "https://" + ln.Addr().String(), Admin: AdminSocket(a.dir), Units: map[string]string{}, TLSRoots: filepath.Join(a.dir, "tls-ca.pem")}
	var plainLn net.Listener
	if addr := a.cfg.Listen.TSAPlain; addr != "" {
		if plainLn, err = api.ListenPlain(addr, a.cfg.Listen.plainOpen(), a.cfg.Policy.MaxConnections); err != nil {
			ln.Close()
			return nil, err
		}
		a.plain = plainLn.Addr().String()
		for unit := range a.units {
			e.Units[unit] = "http://" + a.plain + "/tsa/" + unit
		}
	}
	err = a.exportPublic()
	var peerLn, adminTLS net.Listener
	if err == nil {
		peerLn, err = a.peers.listen()
	}
	if addr := a.cfg.Listen.Admin; err == nil && addr != "" {
		adminTLS, err = api.ListenTLS(addr, a.listener.certificate.Load, apiClock{a}, false, nil, adminConnections)
	}
	if err != nil {
		ln.Close()
		if plainLn != nil {
			plainLn.Close()
		}
		if peerLn != nil {
			peerLn.Close()
		}
		return nil, err
	}
	if adminTLS != nil {
		a.adminAddr = adminTLS.Addr().String()
		e.AdminTLS = "https://" + a.adminAddr
		s.group.Go(func() error { return api.Serve(ctx, server.NewAdminTLSServer(), adminTLS, drain) })
	}
	if peerLn != nil {
		a.peerAddr = peerLn.Addr().String()
		s.group.Go(func() error { return a.peers.serve(ctx, peerLn) })
	}
	s.group.Go(func() error { return api.Serve(ctx, server.NewHTTPServer(server.Handler()), ln, drain) })
	s.group.Go(func() error { return api.Serve(ctx, server.NewAdminServer(), a.house.door.Listen(), drain) })
	if plainLn != nil {
		s.group.Go(func() error { return api.Serve(ctx, server.NewHTTPServer(server.TSAPlainHandler()), plainLn, drain) })
	}
	return e, nil
}
