package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
	"yinjian/hsm/worker"
	"yinjian/ntp"
	"yinjian/tsa"
)

// The cases of bench that run in its own process.

// rawSign is gmsm's signature over e, nothing else.
func rawSign() (func(context.Context, int) error, error) {
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	e := sm3.Sum(nil)
	return func(context.Context, int) error {
		_, err := sm2.SignASN1(rand.Reader, key, e[:], nil)
		return err
	}, nil
}

// workerSign is C_Sign as the appliance calls it, by a worker of our own on the appliance's staff token: of SM2, and of RSA-2048.
func (b *bench) workerSign(ctx context.Context) (sm2, rsa func(context.Context, int) error, err error) {
	w, err := b.staffWorker(0)
	if err != nil {
		return nil, nil, err
	}
	e := sm3.Sum(nil)
	sign := func(alg hsm.Algorithm, op hsm.Operation) (func(context.Context, int) error, error) {
		label, err := b.signerKey(ctx, alg)
		return func(ctx context.Context, _ int) error {
			_, err := w.Do(ctx, label, op, e[:])
			return err
		}, err
	}
	if sm2, err = sign(hsm.SM2, hsm.SignSM2E); err != nil {
		return nil, nil, err
	}
	rsa, err = sign(hsm.RSA2048, hsm.SignRSASHA256)
	return sm2, rsa, err
}

// staffWorker starts a worker of our own on the appliance's staff token, which keeps so many custody keys unwrapped.
func (b *bench) staffWorker(wrapped int) (*worker.Client, error) { return b.staffWorkerOf(wrapped, 16) }

func (b *bench) staffWorkerOf(wrapped, sessions int) (*worker.Client, error) {
	params, err := b.staffParams(wrapped, sessions)
	if err != nil {
		return nil, err
	}
	return b.startWorker(hsm.Staff, params)
}

// staffParams are those of the appliance's staff token. The PIN is to be cleared.
func (b *bench) staffParams(wrapped, sessions int) (worker.StartParams, error) {
	pin, err := appliance.ReadSecret(filepath.Join(b.dir, "secrets", "staff.pin"))
	if err != nil {
		return worker.StartParams{}, err
	}
	module, err := defaultModule()
	return worker.StartParams{
		Module: module, ModuleArgs: "socket='" + appliance.SofttokenSocket(b.dir) + "'", TokenLabel: "yinjian-staff", PIN: pin,
		Profile: "neutral", MaxSessions: sessions, WrappedKeys: wrapped,
	}, err
}

// startWorker starts a worker of our own, and clears the PIN.
func (b *bench) startWorker(class hsm.SlotClass, params worker.StartParams) (*worker.Client, error) {
	defer clear(params.PIN)
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	w, err := worker.Start(worker.Config{Command: []string{self, "worker"}, Class: class, Log: newLog(logrus.WarnLevel), Params: params})
	if err != nil {
		return nil, err
	}
	b.closers = append(b.closers, w.Close)
	if s := w.State(); s.Phase != worker.Ready {
		return nil, fmt.Errorf("the worker is not ready: %w", s.LastError)
	}
	if b.own == nil {
		b.own = map[int]string{os.Getpid(): roleClient}
	}
	b.own[w.State().PID] = "worker bench"
	return w, nil
}

// memoryToken signs with one SM2 key in this process.
type memoryToken struct {
	hsm.Token // nothing else is called
	key       *sm2.PrivateKey
}

func (t memoryToken) Do(_ context.Context, _ string, _ hsm.Operation, e []byte) ([]byte, error) {
	return sm2.SignASN1(rand.Reader, t.key, e, nil)
}

// constantClock is always trusted: this machine's time, with a bound of a millisecond.
type constantClock struct{ at time.Time }

func (c constantClock) Now() ntp.Reading {
	return ntp.Reading{Time: c.at, Bound: time.Millisecond, State: ntp.Trusted, Provenance: "bench"}
}

// benchTime is inside the validity of the certificates that tokenInProcess has made.
var benchTime = time.Date(2026, 11, 18, 8, 0, 0, 0, time.UTC)

// countedSerials hands out numbers as long as the appliance's.
type countedSerials struct{ n atomic.Int64 }

func (s *countedSerials) Next(context.Context) (*big.Int, error) {
	return new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 158), big.NewInt(s.n.Add(1))), nil
}

// noRecorder lets tokens go unrecorded.
type noRecorder struct{}

func (noRecorder) RecordToken(context.Context, *tsa.Token) error { return nil }

func tokenInProcess(ctx context.Context, verify bool) (func(context.Context, int) error, error) {
	serials := &countedSerials{}
	root, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	secret, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	chain, err := benchChain(ctx, root, &secret.PublicKey, serials, benchTime)
	if err != nil {
		return nil, err
	}
	key, err := hsm.KeyOf(memoryToken{key: secret}, hsm.KeyInfo{Label: "bench", Algorithm: hsm.SM2, Public: &secret.PublicKey}, verify)
	if err != nil {
		return nil, err
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	unit, err := tsa.New(tsa.Config{
		Name: "bench", Policy: pki.OIDPolicyTSASM2, Accuracy: time.Second, Signer: key, Chain: chain,
		Clock: constantClock{benchTime}, Serials: serials, Recorder: noRecorder{}, Log: log,
	})
	if err != nil {
		return nil, err
	}
	query, err := (&tsa.Request{Imprint: tsa.ImprintOf([]byte("bench")), Nonce: big.NewInt(1 << 62), CertReq: true}).Bytes()
	if err != nil {
		return nil, err
	}
	answer, err := tsa.ParseResponse(unit.Respond(ctx, query))
	if err == nil {
		err = answer.Err()
	}
	if err != nil {
		return nil, err
	}
	granted := len(unit.Respond(ctx, query))
	return func(ctx context.Context, _ int) error {
		if reply := unit.Respond(ctx, query); len(reply) < granted-8 { // r and s vary by a few bytes
			return errors.New("no token was granted")
		}
		return nil
	}, nil
}

// memoryMAC is HMAC-SM3 with a key in this process.
type memoryMAC []byte

func (k memoryMAC) MAC(_ context.Context, data []byte) ([]byte, error) {
	h := hmac.New(sm3.New, k)
	h.Write(data)
	return h.Sum(nil), nil
}

// journalAlone is the journal over SQLite with nothing around it, and fsync on the same file system.
func (b *bench) journalAlone(ctx context.Context) (appendOne, fsync func(context.Context, int) error, err error) {
	dir := filepath.Join(b.dir, "journal-alone")
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: dir})
	if err != nil {
		return nil, nil, err
	}
	b.closers = append(b.closers, store.Close)
	log := logrus.New()
	log.SetOutput(io.Discard)
	j, err := audit.Open(ctx, audit.Config{Store: store, Node: "bench", Clock: constantClock{benchTime}, Log: log, Sealer: memoryMAC("bench")})
	if err != nil {
		return nil, nil, err
	}
	b.alone = j
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- j.Run(run) }()
	b.closers = append(b.closers, func() error { stop(); return <-ended })
	f, err := os.Create(filepath.Join(dir, "fsync"))
	if err != nil {
		return nil, nil, err
	}
	b.closers = append(b.closers, f.Close)
	certificate, chain, crl := make([]byte, 800), make([]byte, 700), make([]byte, 400)
	for _, p := range [][]byte{certificate, chain, crl} {
		if _, err := rand.Read(p); err != nil {
			return nil, nil, err
		}
	}
	appendOne = func(ctx context.Context, _ int) error {
		d := benchDraft(certificate, chain, crl)
		defer j.Expect()()
		d.Absent = j.Size()
		if _, err := j.ByRef(ctx, d.Ref); !errors.Is(err, audit.ErrNotFound) {
			return fmt.Errorf("the reference is there already: %w", err)
		}
		_, err := j.Append(ctx, d)
		return err
	}
	page := make([]byte, 4096)
	fsync = func(context.Context, int) error {
		if _, err := f.Write(page); err != nil {
			return err
		}
		return f.Sync()
	}
	return appendOne, fsync, nil
}

// benchDraft is shaped as that of a signature without stamp: the certificates and the CRL repeat, the rest is new.
func benchDraft(certificate, chain, crl []byte) audit.Draft {
	var fresh [32 + 71 + 420]byte
	rand.Read(fresh[:]) // never fails (crypto/rand)
	hash := audit.Octets(fresh[32:64])
	return audit.Draft{
		Kind: "sign", Actor: "application/bench", Object: "D10023", Ref: fresh[:32], Unique: true,
		Fields: []audit.Field{
			{Name: "algorithm", Value: audit.Text("SM2")}, {Name: "application", Value: audit.Text("bench")},
			{Name: "campus", Value: audit.Text("本部")}, {Name: "certificate.sm3", Value: hash}, {Name: "consent.level", Value: audit.Int(1)},
			{Name: "consent.method", Value: audit.Text("app-asserted")}, {Name: "consent.sm3", Value: hash},
			{Name: "department", Value: audit.Text("胸外科")}, {Name: "detached", Value: audit.Bool(true)},
			{Name: "digest.algorithm", Value: audit.Text("SM3")}, {Name: "digest.value", Value: hash},
			{Name: "document.id", Value: audit.Text("ZY20261118000731")}, {Name: "document.media_type", Value: audit.Text("application/octet-stream")},
			{Name: "document.size", Value: audit.Int(2048)}, {Name: "document.type", Value: audit.Text("discharge-summary")},
			{Name: "form", Value: audit.Text("raw")}, {Name: "request.sm3", Value: hash}, {Name: "role", Value: audit.Text("主治医师")},
			{Name: "signer", Value: audit.Text("D10023")}, {Name: "stamp", Value: audit.Text("none")}, {Name: "test", Value: audit.Bool(false)},
			{Name: "time.bound_us", Value: audit.Int(1000)}, {Name: "time.provenance", Value: audit.Text("rack(evaluation-feed), min_sources=1")},
		},
		Payloads: []audit.Attachment{
			{Name: "authorization", MediaType: "application/json", Data: fresh[103:]},
			{Name: "certificate.0", MediaType: "application/pkix-cert", Data: certificate, Shared: true},
			{Name: "certificate.1", MediaType: "application/pkix-cert", Data: chain, Shared: true},
			{Name: "crl.0", MediaType: "application/pkix-crl", Data: crl, Shared: true},
			{Name: "signature", MediaType: "application/octet-stream", Data: fresh[32:103]},
		},
	}
}
