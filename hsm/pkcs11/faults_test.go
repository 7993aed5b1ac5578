package pkcs11_test

import (
	"context"
	"crypto/ecdsa"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/uselog"
	"yinjian/hsm/worker"
)

// A fault is one thing that goes wrong while many sign, each through the same worker process, and what may come of it.
// TestFaults is the runner: a new fault is a row.
//
// Beside what a row says, it holds for each of them: no call hangs; every signature that is answered is the caller's own
// by gmsm; calls fail with an error that has a type; a key is not reported missing, nor a person asked for, without
// cause; service comes back by itself when the fault is over; no socket, thread or process is left; and every signature
// that the worker has recorded was answered, given to Config.Abandoned, withheld, or belongs to a worker that ended.
type fault struct {
	name string
	// strike makes the fault and returns when it has been met. heal, if set, ends it.
	strike, heal func(b *bed)
	own          bool // the machine is the row's own, and not shared with others
	relay        bool // a relay lies between the module and the machine
	// open and call are deadlines shorter than the worker's usual ones, where a row waits for them.
	open, call time.Duration
	lives      bool  // the worker survives
	logins     int64 // C_Login after the first start, exactly; -1: some
	initialize int64 // C_Initialize after the first start, at most; -1: some
	spoils     bool  // signatures that do not verify are withheld
	// mend is set where a PIN is the cause: it does the operator's work and answers the PIN that is right then.
	mend func(b *bed) string
	// gone: the key is deleted, and signers of the other key notice nothing.
	gone bool
}

// Places after the function list in the control file: the worker's stream, to the parent and from it.
const (
	fnOut, fnIn = 70, 71

	streamHalf, streamStall, streamOversize, streamStray, streamGarbage, streamSwap = 1, 2, 3, 4, 5, 6
)

const forever = 1 << 40

// answering is a fault of one call of the module: times calls of fn answer rv. first is done when that lies in wait, to
// have the call made at all.
func answering(fn int, rv uint, times int64, first ...func(*bed)) func(*bed) {
	return func(b *bed) {
		b.ctl.inject(fn, rv, times, false)
		b.provoke(fn, first)
	}
}

// untilFinalize is answering by a module that has lost itself: until C_Finalize.
func untilFinalize(fn int, rv uint, first ...func(*bed)) func(*bed) {
	return func(b *bed) {
		b.ctl.set(fn, forever, map[int]int64{fieldRV: int64(rv), fieldUntil: 1})
		b.provoke(fn, first)
	}
}

// A token that loses its sessions, and handles of keys: some of them unwrapped ones, which are not looked for.
var loseSessions, loseHandle = answering(fnSign, 0xB0, 1), answering(fnSignInit, 0x60, 4)

// acting has the next call of fn crash or hang or log out.
func acting(fn int, act int64) func(*bed) {
	return func(b *bed) {
		b.ctl.set(fn, 1, map[int]int64{fieldAct: act})
		b.meets(fn, 1)
	}
}

// after has a fault lie in wait before another makes way for it.
func after(fn int, act int64, first func(*bed)) func(*bed) {
	return func(b *bed) {
		b.ctl.set(fn, 1, map[int]int64{fieldAct: act})
		first(b)
		b.meets(fn, 1)
	}
}

func killWorker(b *bed) {
	was := b.w.State()
	if err := syscall.Kill(was.PID, syscall.SIGKILL); err != nil {
		b.Fatal(err)
	}
	b.until("another worker", func() bool { return b.w.State().Restarts > was.Restarts })
}

// restarted answers when the worker that was there has been given up.
func restarted(do func(*bed)) func(*bed) {
	return func(b *bed) {
		was := b.w.State().Restarts
		do(b)
		b.until("the worker is given up", func() bool { return b.w.State().Restarts > was })
	}
}

// streaming has the worker's next frame, or the next it reads, go wrong.
func streaming(fn int, act int64) func(*bed) {
	return restarted(func(b *bed) {
		b.ctl.set(fn, 1, map[int]int64{fieldAct: act})
		b.meets(fn, 1)
	})
}

// relaying has the relay treat the machine's next answer, or the module's next request, so.
func relaying(what int32) func(*bed) {
	return func(b *bed) {
		met := b.between.met.Load()
		b.between.next.Store(what)
		b.until("a frame to spoil", func() bool { return b.between.met.Load() > met })
	}
}

func restartMachine(b *bed) {
	b.m.kill()
	b.m.run(b.T)
}

// expire ends the login at the machine itself, for every session.
var expire = acting(fnSignInit, actLogout)

var faults = []fault{
	// Processes.
	{name: "worker killed", strike: killWorker, logins: 1, initialize: 1},
	{name: "worker stopped", call: 2 * time.Second, logins: 1, initialize: 1, strike: restarted(func(b *bed) {
		if err := syscall.Kill(b.w.State().PID, syscall.SIGSTOP); err != nil {
			b.Fatal(err)
		}
	})},
	{name: "machine killed", own: true, lives: true, logins: 1, initialize: -1,
		strike: func(b *bed) { b.m.kill(); b.refused() }, heal: func(b *bed) { b.m.run(b.T) }},
	{name: "machine restarted", own: true, lives: true, logins: 1, initialize: -1, strike: restartMachine},
	{name: "machine stopped", own: true, call: 2 * time.Second, open: 6 * time.Second, logins: -1, initialize: -1,
		strike: func(b *bed) { b.m.signal(b.T, syscall.SIGSTOP); b.refused() }, heal: func(b *bed) { b.m.signal(b.T, syscall.SIGCONT) }},
	{name: "machine stopped for a moment", own: true, lives: true,
		strike: func(b *bed) { b.m.signal(b.T, syscall.SIGSTOP); b.m.signal(b.T, syscall.SIGCONT) }},

	// Frames between the module and the machine.
	{name: "machine: half a frame, then the end", relay: true, lives: true, logins: -1, initialize: -1, strike: relaying(relayHalf)},
	{name: "machine: half a frame, then silence", relay: true, call: 2 * time.Second, logins: 1, initialize: 1, strike: restarted(relaying(relayStall))},
	{name: "machine: a frame of 2 GiB", relay: true, lives: true, logins: -1, initialize: -1, strike: relaying(relayOversize)},
	{name: "machine: an answer without results", relay: true, lives: true, logins: -1, initialize: -1, strike: relaying(relayEmpty)},
	{name: "machine: gets half a frame", relay: true, lives: true, logins: -1, initialize: -1, strike: relaying(relayHalfRequest)},
	{name: "machine: gets a frame of 2 GiB", relay: true, lives: true, logins: -1, initialize: -1, strike: relaying(relayOversizeRequest)},

	// Frames between the worker and its parent.
	{name: "worker: half a frame, then the end", logins: 1, initialize: 1, strike: streaming(fnOut, streamHalf)},
	{name: "worker: half a frame, then silence", call: 2 * time.Second, logins: 1, initialize: 1, strike: streaming(fnOut, streamStall)},
	{name: "worker: a frame of 4 GiB", logins: 1, initialize: 1, strike: streaming(fnOut, streamOversize)},
	{name: "worker: an answer to no call", logins: 1, initialize: 1, strike: streaming(fnOut, streamStray)},
	{name: "worker: no frame at all", logins: 1, initialize: 1, strike: streaming(fnOut, streamGarbage)},
	{name: "worker: gets a frame of 4 GiB", logins: 1, initialize: 1, strike: streaming(fnIn, streamOversize)},
	{name: "worker: gets no frame", logins: 1, initialize: 1, strike: streaming(fnIn, streamGarbage)},
	{name: "worker: two callers' answers exchanged", lives: true, spoils: true, strike: func(b *bed) {
		b.ctl.set(fnOut, 2, map[int]int64{fieldAct: streamSwap})
		b.meets(fnOut, 2)
	}},

	// A module that crashes.
	{name: "crash in C_Sign", logins: 1, initialize: 1, strike: restarted(acting(fnSign, actCrash))},
	{name: "crash in C_OpenSession", logins: 1, initialize: 1, strike: restarted(after(fnOpenSession, actCrash, answering(fnSign, 0xB3, 1)))},
	{name: "crash in C_Login", logins: 2, initialize: 2, strike: after(fnLogin, actCrash, killWorker)},
	{name: "crash in C_Initialize", logins: 1, initialize: 2, strike: after(fnInitialize, actCrash, killWorker)},
	{name: "crash in C_Finalize", logins: 1, initialize: 1, strike: restarted(after(fnFinalize, actCrash, answering(fnSign, 0x30, 1)))},

	// A module that does not return.
	{name: "C_Sign never returns", call: 2 * time.Second, logins: 1, initialize: 1, strike: restarted(acting(fnSign, actHang))},
	{name: "C_OpenSession never returns", call: 2 * time.Second, logins: 1, initialize: 1, strike: restarted(after(fnOpenSession, actHang, answering(fnSign, 0xB3, 1)))},
	{name: "C_Login never returns", open: 6 * time.Second, logins: 2, initialize: 2, strike: after(fnLogin, actHang, killWorker)},
	{name: "C_Login never returns, when the login has expired", call: 2 * time.Second, logins: 2, initialize: 1, strike: restarted(after(fnLogin, actHang, expire))},
	{name: "C_Initialize never returns", open: 6 * time.Second, logins: 1, initialize: 2, strike: after(fnInitialize, actHang, killWorker)},
	{name: "C_Initialize never returns, reconnecting", call: 2 * time.Second, logins: 1, initialize: 2, strike: restarted(after(fnInitialize, actHang, answering(fnSign, 0x30, 1)))},
	{name: "C_Initialize never returns, for a while", open: 6 * time.Second, logins: 1, initialize: -1,
		strike: func(b *bed) {
			b.ctl.set(fnInitialize, forever, map[int]int64{fieldAct: actHang})
			killWorker(b)
			b.meets(fnInitialize, 1)
			b.refused()
		}, heal: func(b *bed) { b.ctl.set(fnInitialize, 0, nil) }},
	{name: "C_Finalize never returns", call: 2 * time.Second, logins: 1, initialize: 1, strike: restarted(after(fnFinalize, actHang, answering(fnSign, 0x30, 1)))},
	{name: "C_Finalize never returns, at the end", lives: true, strike: func(b *bed) { b.ctl.set(fnFinalize, 1, map[int]int64{fieldAct: actHang}) }},

	// The login.
	{name: "login expired", lives: true, logins: 1, strike: expire},
	{name: "login expired, and the module does not see it", lives: true, logins: -1, initialize: -1, strike: func(b *bed) {
		b.ctl.inject(fnLogin, 0x100, 1, false)
		untilFinalize(fnSignInit, 0x101)(b)
	}},
	{name: "login expired, no answer to the next", lives: true, logins: 2, initialize: 1, strike: func(b *bed) {
		b.ctl.inject(fnLogin, 0x30, 1, false)
		expire(b)
	}},
	{name: "PIN changed", own: true, logins: 1, initialize: -1, strike: func(b *bed) {
		b.aside(func(p *p11.Ctx, s p11.SessionHandle) error { return p.SetPIN(s, "user-pin", "other-pin") })
		restartMachine(b)
	}, mend: func(*bed) string { return "other-pin" }},
	{name: "PIN locked", own: true, logins: 0, initialize: -1, strike: func(b *bed) {
		b.aside(func(p *p11.Ctx, s p11.SessionHandle) error {
			err := p.Login(s, p11.CKU_USER, "wrong-pin")
			for range 20 {
				if errors.Is(err, p11.Error(p11.CKR_PIN_LOCKED)) {
					return nil
				}
				err = p.Login(s, p11.CKU_USER, "wrong-pin")
			}
			return err
		})
		restartMachine(b)
	}, mend: func(b *bed) string {
		b.aside(func(p *p11.Ctx, s p11.SessionHandle) error {
			if err := p.Login(s, p11.CKU_SO, "officer-pin"); err != nil {
				return err
			}
			return p.InitPIN(s, "third-pin")
		})
		return "third-pin"
	}},
	{name: "PIN refused, unannounced", logins: 1, strike: refusing(hsm.CKR_PIN_INCORRECT), mend: samePIN},
	{name: "PIN locked, unannounced", logins: 1, strike: refusing(hsm.CKR_PIN_LOCKED), mend: samePIN},
	{name: "PIN expired, unannounced", logins: 1, strike: refusing(hsm.CKR_PIN_EXPIRED), mend: samePIN},
	{name: "PIN expired, as C_Sign says", logins: 0, strike: answering(fnSign, hsm.CKR_PIN_EXPIRED, 1), mend: samePIN},

	// Objects and slots.
	{name: "key deleted", own: true, lives: true, gone: true, strike: func(b *bed) {
		b.aside(func(p *p11.Ctx, s p11.SessionHandle) error {
			if err := p.Login(s, p11.CKU_USER, "user-pin"); err != nil {
				return err
			}
			if err := p.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_LABEL, "doomed")}); err != nil {
				return err
			}
			found, _, err := p.FindObjects(s, 10)
			for _, h := range found {
				err = errors.Join(err, p.DestroyObject(s, h))
			}
			return errors.Join(err, p.FindObjectsFinal(s))
		})
	}},
	{name: "slots renumbered", own: true, lives: true, logins: 1, initialize: -1, strike: func(b *bed) {
		atomic.StoreInt64(b.ctl.field(fnSlotList, fieldValue), 7)
		restartMachine(b)
	}},
	{name: "no slot for a while", lives: true, logins: 1, initialize: -1, strike: func(b *bed) {
		b.ctl.inject(fnTokenInfo, 0xE0, forever, false)
		answering(fnSign, 0x32, 1)(b)
		b.refused()
	}, heal: func(b *bed) { b.ctl.inject(fnTokenInfo, 0, 0, false) }},

	// False answers: of each class, once and by many at a time; in vendors' numbers; of a module that has lost itself.
	{name: "a signature that does not verify", lives: true, spoils: true, strike: acting(fnSign, actSpoil)},
	{name: "sessions closed", lives: true, strike: answering(fnSign, 0xB0, 1)},
	{name: "sessions closed, many", lives: true, initialize: -1, logins: -1, strike: answering(fnSignInit, 0xB3, 30)},
	{name: "sessions closed, until C_Finalize", lives: true, initialize: -1, logins: -1, strike: untilFinalize(fnSignInit, 0xB3)},
	{name: "key handles invalid", lives: true, strike: answering(fnSignInit, 0x60, 1)},
	{name: "key handles invalid, until C_Finalize", lives: true, initialize: -1, logins: -1, strike: untilFinalize(fnSignInit, 0x82)},
	{name: "not logged in, once", lives: true, logins: 1, strike: answering(fnSign, 0x101, 1)},
	{name: "device error", lives: true, initialize: 1, logins: -1, strike: answering(fnSign, 0x30, 1)},
	{name: "device removed", lives: true, initialize: 1, logins: 1, strike: answering(fnSign, 0x32, 1)},
	{name: "device error, many", lives: true, initialize: -1, logins: -1, strike: answering(fnSign, 0x30, 30)},
	{name: "device removed in C_OpenSession, until C_Finalize", lives: true, initialize: -1, logins: -1, strike: untilFinalize(fnOpenSession, 0x32, loseSessions)},
	{name: "device error, for a while", lives: true, initialize: 8, logins: -1, strike: func(b *bed) {
		b.ctl.inject(fnSignInit, 0x30, forever, false)
		b.each("is refused", func(s *signer, tried, _ int64) bool { return s.tried.Load() > tried+20 })
	}, heal: func(b *bed) { b.ctl.inject(fnSignInit, 0, 0, false) }},
	{name: "general error", lives: true, strike: answering(fnSign, 0x05, 1)},
	{name: "general error, until C_Finalize", lives: true, initialize: -1, logins: -1, strike: untilFinalize(fnSign, 0x05)},
	{name: "vendor's number", lives: true, strike: answering(fnSign, 0x80000042, 1)},
	{name: "vendor's number, until C_Finalize", lives: true, initialize: -1, logins: -1, strike: untilFinalize(fnSignInit, 0xDEADBEEF)},
	{name: "out of memory", lives: true, strike: answering(fnSign, 0x31, 5)},
	{name: "out of memory, until C_Finalize", lives: true, initialize: -1, logins: -1, strike: untilFinalize(fnSign, 0x02)},
	{name: "out of sessions", lives: true, strike: answering(fnOpenSession, 0xB1, 20, loseSessions)},
	{name: "out of sessions, until C_Finalize", lives: true, initialize: -1, logins: -1, strike: untilFinalize(fnOpenSession, 0xB1, loseSessions)},
	{name: "arguments bad", lives: true, strike: answering(fnSign, 0x07, 20)},
	{name: "device error when sessions are asked about", lives: true, initialize: -1, logins: -1, strike: answering(fnSessionInfo, 0x30, 3, loseHandle)},
}

func refusing(rv uint) func(*bed) {
	return func(b *bed) {
		b.ctl.inject(fnLogin, rv, 1, false)
		expire(b)
	}
}

func samePIN(*bed) string { return "user-pin" }

// everyAnswer is a row for each return value that has a name here, at each call of a signature: once, and by many.
func everyAnswer() []fault {
	var rows []fault
	for rv := uint(1); rv < 0x400; rv++ {
		class := hsm.ClassOf(rv)
		if class == hsm.ClassUnknown && rv%0x40 != 0x3F { // those without a name behave alike
			continue
		}
		for call, fn := range map[string]int{"C_SignInit": fnSignInit, "C_Sign": fnSign, "C_FindObjectsInit": fnFindInit, "C_OpenSession": fnOpenSession} {
			many := int64(40)
			if fn == fnOpenSession || class == hsm.ClassReconnect || class == hsm.ClassUnknown {
				many = 4 // each is a reconnect, which opens a session, too, and stretches a PIN; and the breaker's pauses double
			}
			for _, times := range []int64{1, many} {
				f := fault{name: fmt.Sprintf("%s from %s, %d times", hsm.RVName(rv), call, times), lives: class != hsm.ClassFatal, initialize: -1, logins: -1,
					strike: answering(fn, rv, times, map[int][]func(*bed){fnFindInit: {loseHandle}, fnOpenSession: {loseSessions}}[fn]...)}
				if class == hsm.ClassFatal {
					f.mend = samePIN
				}
				rows = append(rows, f)
			}
		}
	}
	return rows
}

// TestFaults runs each fault under 16 or, every other, 64 signers; with YINJIAN_LONG=1 each under both, three times over,
// and a row for every return value.
func TestFaults(t *testing.T) {
	rows, long := faults, os.Getenv("YINJIAN_LONG") != ""
	if long {
		rows = append(slices.Clone(rows), everyAnswer()...)
	}
	shared := newMachine(t)
	custody := shared.keys(t)
	template := t.TempDir()
	shared.copyTo(t, template)
	dir := t.TempDir()
	module, real := filepath.Join(dir, "faulty.so"), filepath.Join(dir, "p11.so")
	compile(t, module)
	if b, err := hsmtest.SoftModule(); err != nil || os.WriteFile(real, b, 0o700) != nil {
		t.Fatal(err)
	}
	// Rows are mostly waits, more of them than Go runs at once by itself; but each begins with a login that stretches a PIN.
	room := make(chan struct{}, 8)
	before := openFiles(t, os.Getpid(), "")
	var all sync.WaitGroup
	for i, f := range rows {
		for _, signers := range []int{16, 64} {
			if !long && (i%2 == 0) != (signers == 16) {
				continue
			}
			room <- struct{}{}
			all.Go(func() {
				defer func() { <-room }()
				t.Run(fmt.Sprintf("%s/%d", f.name, signers), func(t *testing.T) { f.run(t, shared, custody, template, module, real, signers, long) })
			})
		}
	}
	all.Wait()
	// What ended in the process that starts workers leaves nothing there.
	var stacks string
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) { // interval
		buf := make([]byte, 8<<20)
		stacks = string(buf[:runtime.Stack(buf, true)])
		files := openFiles(t, os.Getpid(), "")
		if !strings.Contains(stacks, "yinjian/hsm/worker.") && !strings.Contains(stacks, "os/exec.") && len(files) <= len(before) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("left behind: %d files, %d before: %v\n%s", len(files), len(before), files, stacks)
		}
	}
}

// A bed is what a fault is tried on: a machine, a module that does wrong, a worker, and signers.
type bed struct {
	*testing.T
	f         fault
	m         *machine
	ctl       control
	between   *relay
	cfg       worker.Config
	w         *worker.Client
	public    map[string]*ecdsa.PublicKey
	signers   []*signer
	stop      chan struct{}
	done      sync.WaitGroup
	struck    atomic.Bool
	provoking bool
	withheld  atomic.Int64

	mu        sync.Mutex // guards what follows
	answered  map[uselog.Hash]bool
	abandoned map[uselog.Hash]bool
}

// A signer signs digests of his own, one after the other. Every fourth is in a hurry.
type signer struct {
	n             int
	key           *hsm.Key
	hasty         bool
	signed, tried atomic.Int64
	operator      atomic.Bool // was told that an operator has to look
	missing       atomic.Bool // was told that his key is missing
}

// Deadlines of the worker, where a row does not say otherwise, and what a call may take by them: two tries, with a wait
// for a worker before each. A busy machine gets as much again.
const (
	usualCall, usualOpen, restartWait = 20 * time.Second, 30 * time.Second, 2 * time.Second
	hurry                             = 300 * time.Millisecond
	recovery                          = 4 * time.Minute
	sessions                          = 8
)

func (f fault) run(t *testing.T, m *machine, custody []*hsm.WrappedKey, template, module, real string, n int, long bool) {
	if f.own {
		m = placeMachine(t)
		(&machine{root: template}).copyTo(t, m.root)
		m.run(t)
	}
	if f.call == 0 {
		f.call = usualCall
	}
	if f.open == 0 {
		f.open = usualOpen
	}
	dir := t.TempDir()
	b := &bed{T: t, f: f, m: m, ctl: newControl(t, filepath.Join(dir, "control")), stop: make(chan struct{}),
		public: map[string]*ecdsa.PublicKey{}, answered: map[uselog.Hash]bool{}, abandoned: map[uselog.Hash]bool{}}
	arguments := m.cfg.ModuleArgs
	if f.relay {
		b.between = newRelay(t, filepath.Join(m.root, "state", "p11.sock"))
		arguments = "socket='" + b.between.path + "'"
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	control, uses := filepath.Join(dir, "control"), filepath.Join(dir, "uses")
	if err := os.Mkdir(uses, 0o700); err != nil {
		t.Fatal(err)
	}
	b.cfg = worker.Config{Command: []string{self, "worker"}, Env: append(os.Environ(), "FAULTS_CONTROL="+control), Class: hsm.Staff, Log: quiet(),
		CallDeadline: f.call, OpenDeadline: f.open, RestartWait: restartWait, Abandoned: b.wasAbandoned,
		Params: worker.StartParams{Module: module, ModuleArgs: control + "=" + real + "\n" + arguments, TokenLabel: m.cfg.TokenLabel,
			PIN: []byte("user-pin"), Profile: "neutral", MaxSessions: sessions, WrappedKeys: len(custody) / 2, Uses: worker.UseLog{Dir: uses, Life: [32]byte{1}}}}
	if b.w, err = worker.Start(b.cfg); err != nil {
		t.Fatal(err)
	}
	closed := sync.OnceFunc(func() { b.w.Close() })
	defer closed()
	halt := sync.OnceFunc(func() { close(b.stop); b.done.Wait() })
	defer halt()

	// 1. Everybody signs.
	b.begin(n, custody)
	b.progress()

	// 2. The fault, and its end.
	rounds := 1
	if long && f.mend == nil && !f.gone {
		rounds = 3
	}
	for range rounds {
		logins, initialized, restarts := b.ctl.calls(fnLogin), b.ctl.calls(fnInitialize), b.w.State().Restarts
		b.struck.Store(true)
		f.strike(b)
		if f.heal != nil {
			f.heal(b)
		}
		switch {
		case f.mend != nil:
			b.latched(logins)
		default:
			b.progress()
			b.ctl.clear() // what no call has met yet must not be met later
			b.progress()
			b.struck.Store(false)
		}
		if got := b.ctl.calls(fnLogin) - logins; f.logins >= 0 && got != f.logins {
			t.Errorf("C_Login was called %d times, want %d", got, f.logins)
		}
		if got := b.ctl.calls(fnInitialize) - initialized; f.initialize >= 0 && got > f.initialize {
			t.Errorf("C_Initialize was called %d times, want %d at most", got, f.initialize)
		}
		if got := b.w.State().Restarts - restarts; f.lives && got != 0 {
			t.Errorf("the worker was given up %d times: %v", got, b.w.State().LastError)
		}
	}
	halt()

	// 3. What is left.
	state := b.w.State()
	if f.mend == nil {
		if s := openFiles(t, state.PID, "socket:"); len(s) > 1+1+sessions+1+2 { // the stream, the module's control connection, sessions, the pinned one, two that unwrap
			t.Errorf("the worker has %d sockets open, at most %d sessions and 2: %v", len(s), sessions+3, s)
		}
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", state.PID))
		if most := sessions + 4 + 2*runtime.GOMAXPROCS(0) + 8; err != nil || len(threads) > most {
			t.Errorf("the worker has %d threads, %d at most; %v", len(threads), most, err)
		}
	}
	ended := state.Restarts
	if f.mend != nil {
		ended++ // for good
	}
	b.accounted(ended)
	begun := time.Now() // interval
	closed()
	if took := time.Since(begun); took > 2*time.Minute {
		t.Errorf("closing took %v", took)
	}
	if state.PID != 0 && !errors.Is(syscall.Kill(state.PID, 0), syscall.ESRCH) {
		t.Errorf("worker %d is still there", state.PID)
	}

	// 4. The operator.
	if f.mend != nil {
		b.ctl.clear()
		b.cfg.Params.PIN = []byte(f.mend(b))
		if b.w, err = worker.Start(b.cfg); err != nil {
			t.Fatalf("after the operator's work: %v", err)
		}
		defer b.w.Close()
		if err := signSM2(t.Context(), newKey(t, b.w, "k"), "again"); err != nil {
			t.Errorf("after the operator's work: %v", err)
		}
	}
}

// keys makes those that the signers use, and answers those that are on no token.
func (m *machine) keys(t *testing.T) (custody []*hsm.WrappedKey) {
	t.Helper()
	install(t, m.cfg, "officer-pin", "kek/1", randomBytes(16))
	tok, err := pkcs11.Open(t.Context(), m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	generate(t, tok, "k", hsm.SM2)
	generate(t, tok, "doomed", hsm.SM2)
	for i := range 4 {
		custody = append(custody, generateWrapped(t, tok, fmt.Sprintf("custody/%d", i), hsm.SM2, "kek/1"))
	}
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	return custody
}

// copyTo copies the machine's files, which it must not be writing: making a token and its keys takes longer than most
// faults.
func (m *machine) copyTo(t *testing.T, dir string) {
	t.Helper()
	for _, part := range []string{"passphrase", "state"} {
		err := filepath.WalkDir(filepath.Join(m.root, part), func(path string, e os.DirEntry, err error) error {
			to := filepath.Join(dir, strings.TrimPrefix(path, m.root))
			switch {
			case err != nil:
				return err
			case e.IsDir():
				return os.Mkdir(to, 0o700)
			case !e.Type().IsRegular():
				return nil
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(to, b, 0o600)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (m *machine) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := m.process.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// aside does something at the machine, past the worker.
func (b *bed) aside(do func(*p11.Ctx, p11.SessionHandle) error) {
	b.Helper()
	p := p11.New(b.m.module)
	if p == nil {
		b.Fatal("the module cannot be loaded")
	}
	os.Setenv("YINJIAN_P11_SOCKET", filepath.Join(b.m.root, "state", "p11.sock"))
	err := p.Initialize()
	if err != nil {
		b.Fatal(err)
	}
	s, err := p.OpenSession(0, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err == nil {
		err = do(p, s)
	}
	if err = errors.Join(err, p.Finalize()); err != nil {
		b.Fatal(err)
	}
}

// begin starts the signers. Every fourth has a key in custody, unwrapped to sign, of which there are more than are kept.
func (b *bed) begin(n int, custody []*hsm.WrappedKey) {
	b.Helper()
	infos := map[string]hsm.KeyInfo{}
	for _, label := range []string{"k", "doomed"} {
		info, err := b.w.FindKey(b.Context(), label)
		if err != nil {
			b.Fatal(err)
		}
		infos[label], b.public[label] = info, info.Public.(*ecdsa.PublicKey)
	}
	for i := range n {
		label := "k"
		if b.f.gone && i%2 == 1 {
			label = "doomed"
		}
		key, err := hsm.KeyOf(b.w, infos[label], true)
		if i%4 == 2 {
			w := custody[i/4%len(custody)]
			key, err = hsm.KeyOfWrapped(b.w, w)
			b.public[w.Label] = w.Public.(*ecdsa.PublicKey)
		}
		if err != nil {
			b.Fatal(err)
		}
		b.signers = append(b.signers, &signer{n: i, key: key, hasty: i%4 == 3})
	}
	for _, s := range b.signers {
		b.done.Go(func() { b.sign(s, time.Duration(n)*250*time.Microsecond) })
	}
}

// sign is one signer's life.
func (b *bed) sign(s *signer, pause time.Duration) {
	limit := 2*(2*(b.f.call+2*restartWait)+time.Minute) + b.f.open
	for n := 0; ; n++ {
		select {
		case <-b.stop:
			return
		case <-time.After(pause): // so many of them, and two processors
		}
		e := sm3.Sum(fmt.Appendf(nil, "%s/%d/%d", b.Name(), s.n, n))
		ctx, cancel := context.WithCancel(context.Background())
		if s.hasty {
			ctx, cancel = context.WithTimeout(ctx, hurry)
		}
		begun := time.Now() // interval
		sig, err := s.key.SignDigest(ctx, e[:])
		took := time.Since(begun)
		cancel()
		s.tried.Add(1)
		if took > limit || s.hasty && took > hurry+b.f.call+time.Minute {
			b.Errorf("signer %d: a call took %v: %v", s.n, took, err)
		}
		var refusal *hsm.Error
		switch {
		case err == nil:
			if !sm2.VerifyASN1(b.public[s.key.Info().Label], e[:], sig) {
				b.Errorf("signer %d was given a signature that is not his", s.n)
			}
			b.mu.Lock()
			b.answered[uselog.Digest(hsm.SignSM2E, sig)] = true
			b.mu.Unlock()
			s.signed.Add(1)
		case errors.Is(err, hsm.ErrNeedsOperator):
			if b.f.mend == nil {
				b.Errorf("signer %d: an operator is asked for: %v", s.n, err)
				return
			}
			s.operator.Store(true)
		case errors.Is(err, hsm.ErrKeyNotFound):
			if s.key.Info().Label != "doomed" {
				b.Errorf("signer %d: %v", s.n, err)
				return
			}
			s.missing.Store(true)
		case errors.Is(err, hsm.ErrBadSignature):
			b.withheld.Add(1)
			if !b.f.spoils {
				b.Errorf("signer %d: %v", s.n, err)
			}
		case s.hasty && errors.Is(err, context.DeadlineExceeded):
		case b.f.spoils && errors.Is(err, hsm.ErrNotCached): // what another was told
		case errors.Is(err, hsm.ErrUnavailable), errors.Is(err, hsm.ErrDeadline), errors.As(err, &refusal):
			if !b.struck.Load() {
				b.Errorf("signer %d, before or long after the fault: %v", s.n, err)
			}
		default:
			b.Errorf("signer %d: an error without a type: %v", s.n, err)
		}
	}
}

func (b *bed) wasAbandoned(answer []byte, _ error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.abandoned[uselog.Digest(hsm.SignSM2E, answer)] = true
}

func (b *bed) until(what string, yes func() bool) {
	b.Helper()
	for end := time.Now().Add(recovery); !yes(); time.Sleep(2 * time.Millisecond) { // interval
		if time.Now().After(end) {
			b.Fatalf("not within %v: %s; the worker: %+v", recovery, what, b.w.State())
		}
		if b.Failed() {
			b.FailNow()
		}
	}
}

// provoke does what leads to a call of fn, until one has gone wrong: who is met by it may go another way.
func (b *bed) provoke(fn int, by []func(*bed)) {
	b.Helper()
	for len(by) > 0 && b.ctl.met(fn) == 0 && !b.Failed() {
		b.provoking = true // on a busy machine fn may have met its fault meanwhile, and the worker be latched
		for _, do := range by {
			do(b)
		}
		b.provoking = false
		for end := time.Now().Add(time.Second); b.ctl.met(fn) == 0 && time.Now().Before(end); { // interval
			time.Sleep(time.Millisecond)
		}
	}
	b.meets(fn, 1)
}

// meets waits until n calls of fn have gone wrong since the fault was made.
func (b *bed) meets(fn int, n int64) {
	b.Helper()
	b.until(fmt.Sprintf("function %d goes wrong", fn), func() bool {
		return b.ctl.met(fn) >= n || b.provoking && b.f.mend != nil && b.w.State().Phase == worker.NeedsOperator
	})
}

// each waits for all signers at once: ready gets how often each had tried and signed before.
func (b *bed) each(what string, ready func(s *signer, tried, signed int64) bool) {
	b.Helper()
	tried, signed := make([]int64, len(b.signers)), make([]int64, len(b.signers))
	for i, s := range b.signers {
		tried[i], signed[i] = s.tried.Load(), s.signed.Load()
	}
	for i, s := range b.signers {
		b.until(fmt.Sprintf("signer %d %s", s.n, what), func() bool { return ready(s, tried[i], signed[i]) })
	}
}

// progress waits until everybody has got what he was at and two signatures more; of a deleted key, an answer.
func (b *bed) progress() {
	b.Helper()
	b.each("goes on", func(s *signer, tried, _ int64) bool { return s.tried.Load() > tried })
	b.each("is served again", func(s *signer, _, signed int64) bool {
		return s.signed.Load() >= signed+2 || b.f.gone && b.struck.Load() && s.missing.Load()
	})
}

// refused waits until everybody has been told that there is nothing to be had.
func (b *bed) refused() {
	b.Helper()
	b.each("is refused", func(s *signer, tried, _ int64) bool { return s.tried.Load() >= tried+2 })
}

// latched waits until everybody has been told to ask an operator, and sees to it that nothing is tried any more.
func (b *bed) latched(logins int64) {
	b.Helper()
	b.each("is told to ask an operator", func(s *signer, _, _ int64) bool { return s.operator.Load() })
	if s := b.w.State(); s.Phase != worker.NeedsOperator || s.PID != 0 || !errors.Is(s.LastError, hsm.ErrNeedsOperator) {
		b.Errorf("state of the worker: %+v", s)
	}
	was := b.ctl.calls(fnLogin)
	b.refused()
	if now := b.ctl.calls(fnLogin); now != was {
		b.Errorf("C_Login was called %d times after the refusal", now-was)
	}
}

// accounted holds the log of uses against what callers were given.
func (b *bed) accounted(ended int) {
	b.Helper()
	used := map[uselog.Hash]bool{}
	settled := func() (int, bool) {
		clear(used)
		r, err := uselog.OpenReader(b.cfg.Params.Uses.Dir, string(hsm.Staff), nil)
		if err == nil {
			err = r.Next(func(rec uselog.Record) error {
				if rec.Kind == uselog.Use {
					used[rec.Signature] = true
				}
				return nil
			})
		}
		if err != nil {
			b.Fatal(err)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		left := len(used) - len(b.answered) - len(b.abandoned) - int(b.withheld.Load())
		return left, left >= 0 && left <= ended*2*sessions // as many calls as have a session wait in the child, and may get one before it ends
	}
	// What is abandoned is told of when it comes.
	end := time.Now().Add(2 * time.Minute) // interval
	for left, ok := settled(); !ok; left, ok = settled() {
		if time.Now().After(end) {
			b.Fatalf("%d signatures recorded, %d answered, %d abandoned, %d withheld: %d left over %d workers that ended",
				len(used), len(b.answered), len(b.abandoned), b.withheld.Load(), left, ended)
		}
		time.Sleep(5 * time.Millisecond)
	}
	for _, given := range []map[uselog.Hash]bool{b.answered, b.abandoned} {
		for h := range given {
			if !used[h] {
				b.Errorf("signature %x is not recorded", h)
			}
		}
	}
}

// openFiles are what a process has open, of a kind ("": any).
func openFiles(t *testing.T, pid int, kind string) (found []string) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && strings.HasPrefix(to, kind) {
			found = append(found, to)
		}
	}
	return found
}

// A relay passes what the module and the machine say to each other, and spoils a frame when it is told to.
type relay struct {
	path string
	next atomic.Int32
	met  atomic.Int32
}

const (
	relayHalf int32 = iota + 1
	relayStall
	relayOversize
	relayEmpty
	relayHalfRequest
	relayOversizeRequest
)

func newRelay(t *testing.T, machine string) *relay {
	t.Helper()
	dir, err := os.MkdirTemp("", "yj")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &relay{path: filepath.Join(dir, "s")}
	l, err := net.Listen("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); l.Close(); all.Wait() })
	all.Go(func() {
		for {
			module, err := l.Accept()
			if err != nil {
				return
			}
			there, err := net.Dial("unix", machine)
			if err != nil {
				module.Close()
				continue
			}
			end := sync.OnceFunc(func() { module.Close(); there.Close() })
			context.AfterFunc(ctx, end)
			all.Go(func() { defer end(); r.pass(module, there, relayHalfRequest, relayOversizeRequest, ctx) })
			all.Go(func() { defer end(); r.pass(there, module, relayHalf, relayEmpty, ctx) })
		}
	})
	return r
}

// pass copies what comes, which is one frame at a time, but for the beginning. It spoils what first to last name.
func (r *relay) pass(from, to net.Conn, first, last int32, ctx context.Context) {
	buf := make([]byte, 1<<20)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		frame := buf[:n]
		// 8: only what is asked while signing, a frame with a body.
		if what := r.next.Load(); n > 12 && what >= first && what <= last && r.next.CompareAndSwap(what, 0) {
			r.met.Add(1)
			switch what {
			case relayHalf, relayHalfRequest:
				_, _ = to.Write(frame[:n/2])
				return
			case relayStall:
				_, _ = to.Write(frame[:n/2])
				<-ctx.Done()
				return
			case relayOversize, relayOversizeRequest:
				binary.BigEndian.PutUint32(frame, 1<<31)
			case relayEmpty:
				frame = frame[:12]
				binary.BigEndian.PutUint32(frame, 8)
				clear(frame[4:])
			}
		}
		if _, err := to.Write(frame); err != nil {
			return
		}
	}
}

// A spoiledStream is a worker's end of the stream that goes wrong when the control file says so.
type spoiledStream struct {
	io.ReadWriteCloser
	ctl control

	kept []byte // an answer that waits for another to be exchanged with; Serve writes one frame at a time
}

// spoilable wraps a worker's stream where a test asks for it.
func spoilable(conn io.ReadWriteCloser) (io.ReadWriteCloser, error) {
	path := os.Getenv("FAULTS_CONTROL")
	if path == "" {
		return conn, nil
	}
	ctl, err := mapControl(path, 80*controlFields*8)
	return &spoiledStream{ReadWriteCloser: conn, ctl: ctl}, err
}

func (s *spoiledStream) take(fn int) int64 {
	if atomic.LoadInt64(s.ctl.field(fn, fieldTimes)) <= 0 || atomic.AddInt64(s.ctl.field(fn, fieldTimes), -1) < 0 {
		return 0
	}
	atomic.AddInt64(s.ctl.field(fn, fieldMet), 1)
	return atomic.LoadInt64(s.ctl.field(fn, fieldAct))
}

const frameHeader = 4 + 1 + 8 // length, kind, id: see hsm/worker

func (s *spoiledStream) Write(b []byte) (int, error) {
	n, frame := len(b), slices.Clone(b)
	switch s.take(fnOut) {
	case streamHalf:
		_, _ = s.ReadWriteCloser.Write(frame[:n/2])
		return 0, s.Close()
	case streamStall:
		_, _ = s.ReadWriteCloser.Write(frame[:n/2])
		select {}
	case streamOversize:
		binary.BigEndian.PutUint32(frame, 0xFFFFFFFF)
	case streamStray:
		binary.BigEndian.PutUint64(frame[5:], 1<<60)
	case streamGarbage:
		frame = []byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
	case streamSwap:
		if s.kept == nil {
			s.kept = frame
			return n, nil
		}
		ours := binary.BigEndian.Uint64(frame[5:])
		binary.BigEndian.PutUint64(frame[5:], binary.BigEndian.Uint64(s.kept[5:]))
		binary.BigEndian.PutUint64(s.kept[5:], ours)
		frame, s.kept = append(frame, s.kept...), nil
	}
	if _, err := s.ReadWriteCloser.Write(frame); err != nil {
		return 0, err
	}
	return n, nil
}

func (s *spoiledStream) Read(b []byte) (int, error) {
	n, err := s.ReadWriteCloser.Read(b)
	if err != nil || n < frameHeader {
		return n, err
	}
	switch s.take(fnIn) {
	case streamOversize:
		binary.BigEndian.PutUint32(b, 0xFFFFFFFF)
	case streamGarbage:
		copy(b, "GET / HTTP/1.1\r\n")
	}
	return n, nil
}
