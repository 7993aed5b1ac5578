package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
	"yinjian/dbdriver"
	"yinjian/hsm"
	"yinjian/ntp/sysclock"
)

// A house is what outlives one start: the lock on the folder, the local socket, what people have unlocked. It is in one of
// the states of docs/states.md, and answers for the appliance while there is none (api.Desk).
type house struct {
	o    Options // Dir is absolute
	log  *logrus.Logger
	sys  *sysclock.Clock
	door *api.Door
	// again has the start that failed tried once more; one word waits at most.
	again chan struct{}
	// provisioning is held while a folder is made an appliance.
	provisioning sync.Mutex
	keeper       keeper
	settings     settings

	mu       sync.Mutex // guards what follows
	state    api.State
	step     step
	failure  *failure
	served   bool              // the appliance was operational
	pins     map[string][]byte // that people have unlocked, by pinName; nil when there are none
	unlocked *unlocked         // not yet journalled
	// restoring is the door for a backup, nil where none is waited for.
	restoring *restoring
}

// A step is one of a start's, in their order.
type step int

const (
	stepChecks step = iota
	stepClocks
	stepMachines
	stepJournal
	stepIdentity
	stepDirectory
	stepServices
	stepListeners
)

var stepNames = []string{
	"检查目录 (the folder)", "时钟与时间源 (clocks and sources)", "密码机 (cipher machines)", "日志 (the journal)",
	"身份；新设备在此等待时间可信 (identity; a new appliance waits here for trusted time)", "目录 (the directory)", "时间戳与签名 (timestamps and signing)",
	"监听 (listeners)",
}

// A failure is why a start went wrong.
type failure struct {
	Code   problem.Code `json:"code"`
	Reason string       `json:"reason"`
	Next   string       `json:"next"`
	Step   string       `json:"step"`
	// Attempts is how often in a row the start was tried.
	Attempts int `json:"attempts"`
	// RetryInS is after how many seconds it is tried again by itself; absent when it waits for a person.
	RetryInS int `json:"retry_in_s,omitempty"`
}

// A settingError is a folder that must not be served as it is: the process ends, as it does for wrong flags.
type settingError struct{ error }

func (e settingError) Unwrap() error { return e.error }

const (
	lastAnswers = 2 * time.Second
	firstPause  = 2 * time.Second
	mostPause   = 5 * time.Minute
)

// AnswersFile is where the answers of an unattended provisioning may lie in a folder that is no appliance yet.
const AnswersFile = "answers.toml"

// Blank says whether dir is there and holds nothing that an appliance could be: at most the folder of a process that waits
// for it to be made one, the answers for that, and what a file system makes.
func Blank(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		return !slices.Contains([]string{"run", AnswersFile, "lost+found"}, e.Name())
	})
}

// Run runs the appliance in o.Dir until ctx ends or a part fails that nothing can stand in for: from whatever state it is in
// to operational. A folder that is empty waits to be provisioned, PINs that are locked wait for their holders, and a start
// that fails is tried again, by itself where the cause may pass. What ends the process all the same is a wrong
// configuration, and, with o.Once, any start that fails.
func Run(ctx context.Context, o Options) (err error) {
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}
	dir := o.Dir
	blank := Blank(dir) && !o.Once
	_, serr := os.Stat(filepath.Join(dir, RestoreUnfinished))
	cut := serr == nil // a restore did not come to its end
	backupAt := ""
	if o.RestoreAt != nil && !o.Once && (blank || cut) {
		if backupAt, err = o.RestoreAt(); err != nil {
			return err
		}
	}
	blank = blank || backupAt != ""
	if !blank && !trialStands(dir) { // what is tried may be unreadable, and is put back below
		if _, err := LoadConfig(dir); err != nil {
			return err
		}
	}
	if _, serr := os.Stat(filepath.Join(dir, InitUnfinished)); serr == nil {
		return fmt.Errorf("%s: 上次 init 没有完成；请删除该目录后重新 init (init was interrupted; remove the folder and init again)", dir)
	}
	if cut && backupAt == "" {
		return fmt.Errorf("%s: 上次 restore 没有完成；请重新 restore，它会从头开始 (restore was interrupted; run it again, it begins anew)", dir)
	}
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil { // may be lost without harm
		return err
	}
	unlock, err := Lock(dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := errors.Join(removeUnfinished(dir), Harden()); err != nil {
		return err
	}
	if cut && backupAt != "" { // it was for this folder to wait for, and begins anew
		if err := EmptyForRestore(dir); err != nil {
			return err
		}
	}
	h := &house{o: o, log: o.Log, again: make(chan struct{}, 1), state: api.Starting}
	if blank {
		h.state = api.Uninitialised
	}
	if h.sys, err = sysclock.Open(); err != nil {
		return err
	}
	h.keeper.h, h.settings.h = h, h
	if !blank {
		if err := h.settings.begin(); err != nil {
			return err
		}
		if h.settings.placed && o.OnSettings != nil {
			if err := o.OnSettings(); err != nil {
				return err
			}
		}
	}
	ln, err := api.ListenAdmin(AdminSocket(dir))
	if err != nil {
		return errors.Join(checkRoom(dir), err) // on a full volume the first says more
	}
	h.door = api.NewDoor(ln)
	desk := api.NewDesk(h, o.Log, Version)
	attended := make(chan struct{})
	go func() {
		defer close(attended)
		_ = desk.Serve(h.door.Listen()) // it ends with the door
	}()
	defer func() {
		_ = h.door.Close()
		answered, cancel := context.WithTimeout(context.Background(), lastAnswers)
		_ = desk.Shutdown(answered) // who has just said "start" is told that it was heard
		cancel()
		_ = desk.Close()
		<-attended
		h.keeper.forget()
		h.wipe()
	}()
	if o.OnAttended != nil {
		o.OnAttended()
	}
	if backupAt != "" {
		err := h.awaitRestore(ctx, backupAt)
		if ctx.Err() != nil {
			return nil // told to stop
		}
		if err != nil {
			return err
		}
	} else if blank {
		h.log.Info("the folder is empty: waiting to be provisioned (yinjian init)")
		if err := h.awaitProvision(ctx); err != nil {
			return nil // told to stop
		}
	}
	pause := firstPause
	for attempt := 1; ; attempt++ {
		err := h.live(ctx)
		var wrong settingError
		h.mu.Lock()
		served := h.served
		h.mu.Unlock()
		if ctx.Err() == nil && errors.Is(err, ErrRestart) {
			return ErrRestart
		}
		if ctx.Err() == nil && err != nil && h.settings.tries() {
			var f *failure
			if !served {
				f = h.fail(err, attempt, pause)
			}
			if why := h.settings.givesUp(err, f); why != "" {
				h.log.WithError(err).Error("a start with new settings failed")
				if uerr := h.settings.undo(why); uerr != nil {
					return errors.Join(err, uerr)
				}
				switch {
				case served:
					return ErrRestart
				case o.Once:
					return err
				}
				attempt, pause = 0, firstPause
				h.begins()
				continue
			}
			pause = min(pause, trialPause)
		}
		if err != nil && ctx.Err() != nil && !served && !errors.As(err, &wrong) {
			h.log.WithError(err).Warning("told to stop before the start was done")
			return nil
		}
		if err == nil || ctx.Err() != nil || o.Once || served || errors.As(err, &wrong) {
			return err
		}
		f := h.fail(err, attempt, pause)
		h.log.WithError(err).WithFields(logrus.Fields{"code": string(f.Code), "attempt": attempt, "retry_in_s": f.RetryInS}).Error("the start failed")
		var timer <-chan time.Time // nil: a person has to say so
		if f.RetryInS > 0 {
			timer = time.After(pause)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-timer:
			pause = min(2*pause, mostPause)
		case <-h.again:
			attempt, pause = 0, firstPause
		}
		h.begins()
	}
}

// begins leaves the state failed, for whatever reason it is tried again: who has asked for it so far has been heard.
func (h *house) begins() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state, h.failure = api.Starting, nil
	select {
	case <-h.again:
	default:
	}
}

// live is one start, and what follows it.
func (h *house) live(ctx context.Context) error {
	h.enter(api.Starting)
	h.at(stepChecks)
	dir := h.o.Dir
	cfg, err := LoadConfig(dir)
	if err == nil {
		err = errors.Join(checkHandedBack(ctx, dir), checkPermissions(dir, cfg))
	}
	if err != nil {
		return settingError{err}
	}
	if err := checkRoom(dir); err != nil {
		return err
	}
	if err := h.keeper.open(ctx, cfg); err != nil {
		return err
	}
	h.enter(api.Starting)
	if h.o.OnStart != nil {
		h.o.OnStart()
	}
	attempt, end := h.settings.attempt(ctx)
	defer end()
	err = h.run(attempt, cfg)
	if cause := context.Cause(attempt); ctx.Err() == nil && attempt.Err() != nil { // the settings have ended it, not the caller
		return errors.Join(cause, err)
	}
	return err
}

func (h *house) enter(s api.State) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state = s
	if s != api.Failed {
		h.failure = nil
	}
}

// at says how far the start is.
func (h *house) at(s step) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.step = s
}

// stops is called when the start, or what followed it, is being undone.
func (h *house) stops() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == api.Operational {
		h.state = api.Stopping
	}
}

// operational is called when all listeners are open.
func (h *house) operational() {
	h.settings.reached()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state, h.served = api.Operational, true
}

// wipe overwrites the PINs.
func (h *house) wipe() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, pin := range h.pins {
		clear(pin)
	}
	h.pins = nil
}

const retryStart = "排除原因后 yinjian start --dir 目录，或重启服务 (when that is mended: yinjian start --dir DIR, or restart the service)"

// fail enters the state failed and says why: by what the error is, or by the step that it happened in. What may pass is
// tried again: a machine that is away, a full volume, an address that is not there yet. What may not waits for a person: a
// PIN that was refused must not be presented over and over, and a journal that does not continue what it was is evidence.
func (h *house) fail(err error, attempt int, pause time.Duration) *failure {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := &failure{Code: problem.StartFailed, Reason: err.Error(), Next: "见原因；设备会自行再试 (see the reason; it is tried again)", Step: stepNames[h.step], Attempts: attempt}
	passing := true
	var room noRoomError
	switch {
	case errors.As(err, &room), errors.Is(err, syscall.ENOSPC):
		f.Code, f.Next = problem.DiskReserve, "清理或扩容；有了空间自行启动 (make room; it then starts by itself)"
	case errors.Is(err, hsm.ErrNeedsOperator), errors.Is(err, errRefusedBefore):
		f.Code, f.Next, passing = problem.HSMNeedsOperator, "核对口令，勿反复尝试；"+retryStart, false
	case errors.Is(err, hsm.ErrUnavailable), h.step == stepMachines:
		f.Code, f.Next = problem.HSMUnavailable, "检查密码机；恢复后自行启动 (look at the cipher machine; when it is back the start goes on by itself)"
	case h.step == stepJournal && errors.Is(err, dbdriver.ErrUnavailable):
		f.Code = problem.JournalUnwritable
	case h.step == stepJournal:
		f.Code, f.Next, passing = problem.JournalRefused, "保留现场，见 docs/operations.md“出了故障”；"+retryStart, false
	case h.step == stepIdentity:
		f.Next, passing = "核对是否接错密码机、目录或 config.toml 的 node；"+retryStart, false
	}
	if passing {
		f.RetryInS = int(pause / time.Second)
	}
	h.state, h.failure = api.Failed, f
	return f
}

// awaitProvision waits until the folder is an appliance's. It fails when ctx ends.
func (h *house) awaitProvision(ctx context.Context) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		_, made := os.Stat(filepath.Join(h.o.Dir, "config.toml"))
		_, unfinished := os.Stat(filepath.Join(h.o.Dir, InitUnfinished))
		if made == nil && errors.Is(unfinished, fs.ErrNotExist) {
			return nil
		}
	}
}

// Standing satisfies api.Desk.
func (h *house) Standing() (api.State, *problem.Problem) {
	h.mu.Lock()
	defer h.mu.Unlock()
	what, next := "", ""
	switch h.state {
	case api.Uninitialised:
		if h.restoring != nil {
			what, next = "等待备份 (waiting for a backup)", "在工程师的电脑上 yinjian restore --to https://本机地址:端口 --fingerprint 指纹 … (from the engineer's computer, see docs/backup.md)"
			break
		}
		what, next = "设备尚未初始化 (there is no appliance yet)", "yinjian init --dir "+h.o.Dir
	case api.Locked:
		what, next = "设备已锁定，等待持有人口令 (locked: the holders' passphrases are awaited)", "yinjian unlock --dir "+h.o.Dir+" --holder 姓名"
	case api.Failed:
		what, next = "启动失败 (the start failed): "+h.failure.Reason, h.failure.Next
	case api.Starting:
		what, next = "设备正在启动 (starting): "+stepNames[h.step], "请稍候，yinjian status 查看进度 (wait; see yinjian status)"
	default:
		what, next = "设备正在停机 (stopping)", "请稍候 (wait)"
	}
	return h.state, problem.New(problem.NotReady, what, next)
}

// A deskState is the body of /admin/v1/state while the appliance is not operational.
type deskState struct {
	State   api.State    `json:"state"`
	Ready   bool         `json:"ready"`
	Version string       `json:"version"`
	Step    string       `json:"step,omitempty"` // of a start under way
	Failure *failure     `json:"failure,omitempty"`
	Unlock  *unlockState `json:"unlock,omitempty"`
	// Restore is the door for a backup, where one is waited for.
	Restore *restoreShown `json:"restore,omitempty"`
	Next    string        `json:"next"`
	// Warnings are what an operator should know, as in the state operational.
	Warnings []string `json:"warnings"`
}

// State satisfies api.Desk.
func (h *house) State(context.Context, string) (any, error) {
	state, p := h.Standing()
	out := deskState{State: state, Version: Version, Next: p.Next, Warnings: []string{p.Detail}}
	if state == api.Locked {
		out.Unlock = h.keeper.shown()
		if t := out.Unlock.TPM; t != nil && t.Why != "" {
			out.Warnings = append(out.Warnings, t.words())
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if state == api.Starting {
		out.Step = stepNames[h.step]
	}
	if state == api.Uninitialised && h.restoring != nil {
		out.Restore = h.restoring.shown()
	}
	out.Failure = h.failure
	return out, nil
}

// wrongState refuses what means nothing in the present state.
func (h *house) wrongState(want api.State) error {
	if state, _ := h.Standing(); state == want {
		return nil
	}
	return h.notIn(want)
}

func (h *house) notIn(want api.State) error {
	state, p := h.Standing()
	return problem.New(problem.WrongState, fmt.Sprintf("设备状态为 %s，不是 %s (the appliance is in state %s, not %s)", state, want, state, want), p.Next)
}

// RetryStart satisfies api.StateAdmin.
func (h *house) RetryStart(_ context.Context, actor string, _ api.RetryStart) (any, error) {
	h.mu.Lock()
	failed := h.state == api.Failed
	if failed {
		select {
		case h.again <- struct{}{}:
		default: // it was said already
		}
	}
	h.mu.Unlock()
	if !failed {
		return nil, h.notIn(api.Failed)
	}
	h.log.WithField("operator", actor).Info("the start is tried again at an operator's word")
	return map[string]any{"state": api.Starting}, nil
}

// Provision satisfies api.StateAdmin.
func (h *house) Provision(ctx context.Context, actor string, req api.Provision) (any, error) {
	h.provisioning.Lock()
	defer h.provisioning.Unlock()
	if err := h.wrongState(api.Uninitialised); err != nil {
		return nil, err
	}
	h.mu.Lock()
	awaited := h.restoring != nil
	h.mu.Unlock()
	if awaited {
		return nil, problem.New(problem.WrongState, "这个目录等待备份，不新建 (this folder waits for a backup; nothing new is made of it)", "yinjian restore --to；要新建，先删除 answers.toml 并重启 (to make a new one remove answers.toml and start again)")
	}
	if !Blank(h.o.Dir) {
		return nil, problem.New(problem.Exists, "目录中已有内容，不会覆盖 (the folder is not empty; nothing is overwritten)", "yinjian status 查看 (see yinjian status)")
	}
	first, err := h.o.Provision(ctx, req.Answers, req.Passphrases)
	if err != nil {
		return nil, problem.Invalid("answers", "%v", err)
	}
	h.log.WithField("operator", actor).Info("the folder was provisioned")
	return wire.Provisioned{State: string(api.Starting), Administrators: first}, nil
}
