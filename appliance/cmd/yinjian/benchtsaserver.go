package main

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/api"
	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
	"yinjian/hsm/pool"
	"yinjian/hsm/worker"
	"yinjian/ntp"
	"yinjian/ntp/sysclock"
	"yinjian/tsa"
	"yinjian/tsa/stamping"
)

// A stampServer is the timestamp service that bench-tsa measures, in a process of its own so that its processor time can be
// told: the product's HTTP face, unit and, if wanted, journal, around a key in memory or in a cipher machine. Its clock is
// the product's too, and believes this machine's: what it stamps is worth nothing.
type stampServer struct {
	key, listen, journal, profile string
	verify, secure                bool
	module, moduleArgs, pinFile   string
	sessions                      int

	log    *logrus.Logger
	expect func() (done func()) // the journal's
	bare   *worker.Client       // signs for "sign", with the unit's key in the cipher machine
	undo   []func() error
}

func benchTSAServerCommand() *cobra.Command {
	s := &stampServer{}
	c := &cobra.Command{
		Use: "bench-tsa-server", Hidden: true, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error { return s.run(c.Context()) },
	}
	f := c.Flags()
	f.StringVar(&s.key, "key", keySM2, "sm2、rsa 或 machine")
	f.StringVar(&s.listen, "listen", "127.0.0.1:0", "回环地址 (loopback address)")
	f.StringVar(&s.journal, "journal", "", "日志目录，缺省不记 (folder of a journal)")
	f.StringVar(&s.profile, "profile", "", "SIGUSR1 时写处理器剖面 (profile at SIGUSR1)")
	f.BoolVar(&s.verify, "verify", false, "先验证再交出 (verify after signing)")
	f.BoolVar(&s.secure, "tls", false, "TLS 1.3，证书自签 (TLS 1.3 with a certificate of its own)")
	f.StringVar(&s.module, "module", "", "PKCS#11")
	f.StringVar(&s.moduleArgs, "module-args", "", "PKCS#11")
	f.StringVar(&s.pinFile, "pin-file", "", "PIN")
	f.IntVar(&s.sessions, "sessions", 1, "会话数 (sessions)")
	return c
}

// Where the unit's key is.
const (
	keySM2     = "sm2"
	keyRSA     = "rsa"
	keyMachine = "machine" // SM2 in a cipher machine, through a worker
)

func (s *stampServer) run(ctx context.Context) (err error) {
	setMemory() // as serve has it
	s.log = newLog(logrus.ErrorLevel)
	defer func() {
		for i := len(s.undo) - 1; i >= 0; i-- {
			err = errors.Join(err, s.undo[i]())
		}
	}()
	clock, err := s.clock()
	if err != nil {
		return err
	}
	respond, err := s.unit(ctx, clock)
	if err != nil {
		return err
	}
	const plenty = 10_000_000 // one client is all there is
	server, err := api.New(api.Config{
		Signing: struct{ api.Signing }{}, Directory: struct{ api.Directory }{}, Health: struct{ api.Health }{}, Tokens: struct{ api.Tokens }{}, Admin: struct{ api.Admin }{}, Accounts: struct{ api.Accounts }{},
		Stamps: benchStamps{respond, s.expect}, Clock: clock, Log: s.log, Version: appliance.Version,
		Limits: api.Limits{Concurrent: 1024, LoopbackRate: plenty},
	})
	if err != nil {
		return err
	}
	s.undo = append(s.undo, server.Close)
	ln, err := api.ListenPlain(s.listen, false, 4096)
	if err != nil {
		return err
	}
	scheme := "http"
	if s.secure {
		cert, err := benchCertificate(clock.Now().Time)
		if err != nil {
			return err
		}
		scheme, ln = "https", tls.NewListener(ln, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})
	}
	if s.profile != "" {
		go profileOnSignal(ctx, s.profile, s.log)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- api.Serve(ctx, server.NewHTTPServer(server.TSAPlainHandler()), ln, time.Second) }()
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(map[string]string{"url": scheme + "://" + ln.Addr().String() + "/tsa/bench"}); err != nil {
		return err
	}
	s.obey(ctx, out)
	stop()
	return <-served
}

// obey does what the lines of the standard input say until it ends: "sign N D" has the cipher machine's key sign on N goroutines for D,
// through a worker of class staff: one of class tsa makes tokens alone. Without a pipe there is nobody to obey.
func (s *stampServer) obey(ctx context.Context, out *json.Encoder) {
	if st, err := os.Stdin.Stat(); err != nil || st.Mode()&os.ModeNamedPipe == 0 {
		<-ctx.Done()
		return
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var conns int
		var long time.Duration
		var text string
		_, err := fmt.Sscanf(in.Text(), "sign %d %s", &conns, &text)
		if err == nil {
			long, err = time.ParseDuration(text)
		}
		var answer signedCount
		if err == nil {
			e := make([]byte, 32)
			c := &benchCase{Conns: conns, op: func(ctx context.Context, _ int) error {
				_, err := s.bare.Do(ctx, benchMachineKey, hsm.SignSM2E, e)
				return err
			}}
			begun := time.Now() // interval
			answer.Ops, err = c.run(ctx, long)
			answer.Seconds = time.Since(begun).Seconds()
		}
		if err != nil {
			answer.Error = err.Error()
		}
		if out.Encode(answer) != nil {
			return
		}
	}
}

// A signedCount answers "sign".
type signedCount struct {
	Ops     int64
	Seconds float64
	Error   string `json:",omitempty"`
}

// benchStamps is to the API what the appliance is.
type benchStamps struct {
	respond func(ctx context.Context, der []byte) []byte
	expect  func() (done func()) // nil without a journal
}

func (s benchStamps) Units() []string { return []string{"bench"} }

func (s benchStamps) Respond(ctx context.Context, _, requester string, der []byte) ([]byte, error) {
	if s.expect != nil {
		defer s.expect()()
	}
	ctx = hsm.WithCaller(ctx, hsm.Caller{Application: requester})
	return s.respond(appliance.WithRequester(ctx, requester), der), nil
}

// clock believes this machine's clock, and asks it again from time to time.
func (s *stampServer) clock() (*ntp.Clock, error) {
	clock, stop, err := benchClock()
	if err == nil {
		s.undo = append(s.undo, func() error { stop(); return nil })
	}
	return clock, err
}

func benchClock() (clock *ntp.Clock, stop func(), err error) {
	kernel, err := sysclock.Open()
	if err != nil {
		return nil, nil, err
	}
	if clock, err = ntp.NewClock(ntp.Config{AgreeRounds: 1, MinSources: 1}, kernel); err != nil {
		return nil, nil, err
	}
	ask := func() {
		clock.Update([]ntp.Measurement{{Source: "self", Boot: kernel.Boot(), UTC: kernel.Realtime(), Bent: kernel.Monotonic() - kernel.Raw(), RootDistance: time.Millisecond, Stratum: 1}})
	}
	ask()
	if r := clock.Now(); !r.Trusted() {
		return nil, nil, fmt.Errorf("the bench's clock is %s", r.State)
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				ask()
			case <-done:
				return
			}
		}
	}()
	return clock, func() { close(done); <-ended }, nil
}

// benchTerms are what the unit's tokens are made under.
var benchTerms = stamping.Terms{Policy: pki.OIDPolicyTSASM2, Accuracy: time.Second}

// unit makes the key, its certificate and the unit.
func (s *stampServer) unit(ctx context.Context, clock *ntp.Clock) (func(context.Context, []byte) []byte, error) {
	recorder := tsa.Recorder(noRecorder{})
	if s.journal != "" {
		j, err := s.openJournal(ctx, clock)
		if err != nil {
			return nil, err
		}
		recorder, s.expect = appliance.TokenRecorder{Journal: j, Unit: "bench"}, j.Expect
	}
	serials := &countedSerials{}
	if s.key == keyMachine {
		issuer, err := s.machineUnit(ctx, clock, serials)
		if err != nil {
			return nil, err
		}
		r := tsa.Responder{Issuer: issuer, Recorder: recorder, Log: s.log}
		return r.Respond, nil
	}
	key, root, err := s.memoryKeys()
	if err != nil {
		return nil, err
	}
	chain, err := benchChain(ctx, root, key.Public(), serials, clock.Now().Time)
	if err != nil {
		return nil, err
	}
	unit, err := tsa.New(tsa.Config{
		Name: "bench", Policy: benchTerms.Policy, Accuracy: benchTerms.Accuracy, Signer: key, Chain: chain,
		Clock: clock, Serials: serials, Recorder: recorder, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	return unit.Respond, nil
}

// memoryKeys answers a unit's key and that of the CA above it, of one algorithm, both in this process.
func (s *stampServer) memoryKeys() (key *hsm.Key, root crypto.Signer, err error) {
	var token hsm.Token
	info := hsm.KeyInfo{Label: "bench"}
	switch s.key {
	case keySM2:
		secret, err := sm2.GenerateKey(rand.Reader)
		if err != nil {
			return nil, nil, err
		}
		token, info.Algorithm, info.Public = memoryToken{key: secret}, hsm.SM2, &secret.PublicKey
		if root, err = sm2.GenerateKey(rand.Reader); err != nil {
			return nil, nil, err
		}
	case keyRSA:
		secret, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return nil, nil, err
		}
		token, info.Algorithm, info.Public = memoryRSA{key: secret}, hsm.RSA2048, &secret.PublicKey
		if root, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			return nil, nil, err
		}
	default:
		return nil, nil, usageError{fmt.Errorf("--key %s", s.key)}
	}
	key, err = hsm.KeyOf(token, info, s.verify)
	return key, root, err
}

// machineUnit has tokens made in a worker, as the appliance has, and starts the worker for the bare signatures.
func (s *stampServer) machineUnit(ctx context.Context, clock *ntp.Clock, serials *countedSerials) (tsa.Issuer, error) {
	w, err := s.worker(hsm.TSA, "bench-tsa-worker")
	if err != nil {
		return nil, err
	}
	if s.bare, err = s.worker(hsm.Staff, "worker"); err != nil {
		return nil, err
	}
	info, err := w.FindKey(ctx, benchMachineKey)
	if err != nil {
		return nil, err
	}
	root, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	chain, err := benchChain(ctx, root, info.Public, serials, clock.Now().Time)
	if err != nil {
		return nil, err
	}
	workers := pool.New(pool.Config{Class: hsm.TSA, Log: s.log})
	if err := workers.Add(ctx, pool.Machine{Name: appliance.FirstMachine, Token: w, Weight: 1, Sessions: s.sessions}); err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- workers.Run(run) }()
	s.undo = append(s.undo, func() error { stop(); return <-ended })
	watch := stamping.NewWatch(clock)
	if err := watch.Look(ctx, appliance.FirstMachine, w); err != nil {
		return nil, err
	}
	return stamping.NewUnit(stamping.UnitConfig{
		Name: "bench", Terms: benchTerms, Label: benchMachineKey, Chain: chain, Workers: workers, Watch: watch, Serials: serials,
		Verify: s.verify, Discarded: func(error, ...[]byte) {}, Log: s.log,
	})
}

// worker starts one on the software cipher machine's token.
func (s *stampServer) worker(class hsm.SlotClass, command string) (*worker.Client, error) {
	pin, err := appliance.ReadSecret(s.pinFile)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	w, err := worker.Start(worker.Config{
		Command: []string{self, command}, Class: class, Log: s.log,
		Params: worker.StartParams{Module: s.module, ModuleArgs: s.moduleArgs, TokenLabel: "staff", PIN: pin, Profile: "neutral", MaxSessions: s.sessions, WrappedKeys: 1},
	})
	if err != nil {
		return nil, err
	}
	s.undo = append(s.undo, w.Close)
	if st := w.State(); st.Phase != worker.Ready {
		return nil, fmt.Errorf("the worker is not ready: %w", st.LastError)
	}
	return w, nil
}

// benchTSAWorkerCommand is the product's timestamp worker with the bench's clock.
func benchTSAWorkerCommand() *cobra.Command {
	return &cobra.Command{
		Use: "bench-tsa-worker", Hidden: true, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			log := newLog(logrus.ErrorLevel)
			signal.Ignore(os.Interrupt, syscall.SIGTERM) // as the product's: it ends with its parent
			conn, err := worker.Inherited()
			if err != nil {
				return usageError{err}
			}
			return worker.ServeExtended(context.WithoutCancel(c.Context()), conn, openToken(log), func(_ context.Context, token hsm.Token, _ worker.StartParams) (worker.Extension, error) {
				clock, stop, err := benchClock()
				if err != nil {
					return nil, err
				}
				return benchStamping{stamping.New(token, clock, map[string]stamping.Terms{"bench": benchTerms}, log), stop}, nil
			})
		},
	}
}

// benchStamping is the service with its clock.
type benchStamping struct {
	*stamping.Service
	stop func()
}

// Close ends the clock.
func (s benchStamping) Close() { s.stop() }

// openJournal is the journal over SQLite, sealed in this process.
func (s *stampServer) openJournal(ctx context.Context, clock *ntp.Clock) (*audit.Journal, error) {
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: s.journal})
	if err != nil {
		return nil, err
	}
	s.undo = append(s.undo, store.Close)
	quiet := newLog(logrus.ErrorLevel)
	quiet.SetOutput(io.Discard)
	j, err := audit.Open(ctx, audit.Config{Store: store, Node: "bench", Clock: clock, Log: quiet, Sealer: memoryMAC("bench")})
	if err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- j.Run(run) }()
	s.undo = append(s.undo, func() error { stop(); return <-ended })
	return j, nil
}

// benchCertificate is a self-signed one for P-256, as the appliance's own is for.
func benchCertificate(now time.Time) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.AddDate(0, 0, -1), NotAfter: now.AddDate(0, 0, 1), DNSNames: []string{"bench"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// memoryRSA is [memoryToken] with an RSA key.
type memoryRSA struct {
	hsm.Token // nothing else is called
	key       *rsa.PrivateKey
}

func (t memoryRSA) Do(_ context.Context, _ string, _ hsm.Operation, digest []byte) ([]byte, error) {
	return rsa.SignPKCS1v15(nil, t.key, crypto.SHA256, digest)
}

// benchChain is a unit's certificate under an evaluation CA, begun a month before.
func benchChain(ctx context.Context, root crypto.Signer, public crypto.PublicKey, serials *countedSerials, now time.Time) ([]*smx509.Certificate, error) {
	c := ca.Config{Signer: root, Serials: serials.Next}
	authority, err := ca.New(c)
	if err != nil {
		return nil, err
	}
	name := pkix.Name{Country: []string{"CN"}, Organization: []string{"本部"}, CommonName: "bench"}
	if c.Certificate, err = authority.SelfSign(ctx, name, now.AddDate(-1, 0, 0), now.AddDate(9, 0, 0)); err != nil {
		return nil, err
	}
	if authority, err = ca.New(c); err != nil {
		return nil, err
	}
	cert, err := authority.Issue(ctx, ca.Request{Profile: ca.TSA, Subject: name, PublicKey: public, NotBefore: now.AddDate(0, -1, 0), NotAfter: now.AddDate(5, 0, 0)})
	if err != nil {
		return nil, err
	}
	return []*smx509.Certificate{cert, authority.Certificate()}, nil
}

// flags are those of the child process.
func (s *stampServer) flags() []string {
	return []string{
		"bench-tsa-server", "--key", s.key, "--listen", s.listen, "--journal", s.journal, "--profile", s.profile, fmt.Sprintf("--verify=%t", s.verify), fmt.Sprintf("--tls=%t", s.secure),
		"--module", s.module, "--module-args", s.moduleArgs, "--pin-file", s.pinFile, "--sessions", fmt.Sprint(max(1, s.sessions)),
	}
}
