// Package testkit builds a small appliance for tests out of the real parts: the journal over SQLite in a temporary
// folder, the evaluation CAs, the timestamp units, directory and signing. Two things are not real: the cipher machine,
// whose keys are in memory, and the clock, which stands until it is moved. Hooks make calls fail, or be done with their
// answers lost.
package testkit

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"io"
	"math/big"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/sign"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

// Start is where the clock stands at first.
var Start = time.Date(2026, 11, 21, 10, 20, 30, 123456789, time.UTC)

// Provenance is who vouches for the time.
const Provenance = "BDS(beidou)+lan, min_sources=2"

// PIN is every signer's.
const PIN = "2580-柳叶刀"

// A Clock stands still. Safe for concurrent use.
type Clock struct {
	mu sync.Mutex
	r  ntp.Reading // guarded by mu
}

// NewClock is trusted, at Start.
func NewClock() *Clock {
	return &Clock{r: ntp.Reading{Time: Start, Bound: 1200*time.Microsecond + 1, State: ntp.Trusted, Provenance: Provenance}}
}

// Now is the reading.
func (c *Clock) Now() ntp.Reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.r
}

// Change changes the reading.
func (c *Clock) Change(f func(*ntp.Reading)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.r)
}

// Advance moves the clock.
func (c *Clock) Advance(d time.Duration) {
	c.Change(func(r *ntp.Reading) { r.Time = r.Time.Add(d) })
}

// State changes how far it is trusted.
func (c *Clock) State(s ntp.State) { c.Change(func(r *ntp.Reading) { r.State = s }) }

// A Journal is the real one with a hook.
type Journal struct {
	*audit.Journal
	mu    sync.Mutex
	fault func(d audit.Draft) (landed bool, err error) // guarded by mu
}

// Fault has f decide which appends fail, and whether their entry is written all the same; nil: none. f runs without
// locks held.
func (j *Journal) Fault(f func(d audit.Draft) (landed bool, err error)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.fault = f
}

// Append asks the hook first.
func (j *Journal) Append(ctx context.Context, d audit.Draft) (audit.Receipt, error) {
	j.mu.Lock()
	f := j.fault
	j.mu.Unlock()
	if f != nil {
		if landed, err := f(d); err != nil {
			if landed {
				if _, werr := j.Journal.Append(context.WithoutCancel(ctx), d); werr != nil {
					return audit.Receipt{}, werr
				}
			}
			return audit.Receipt{}, err
		}
	}
	return j.Journal.Append(ctx, d)
}

// FailKind makes appends of a kind fail; n is how many, -1 for all.
func (j *Journal) FailKind(kind string, n int, landed bool, err error) {
	var left atomic.Int64
	left.Store(int64(n))
	j.Fault(func(d audit.Draft) (bool, error) {
		if d.Kind != kind || n >= 0 && left.Add(-1) < 0 {
			return false, nil
		}
		return landed, err
	})
}

// A Stamper is a timestamp unit with a hook.
type Stamper struct {
	*tsa.Authority
	mu    sync.Mutex
	fault func() error // guarded by mu
	ready error        // guarded by mu
}

// NotReady has the unit say beforehand why it would issue nothing; nil: it would.
func (s *Stamper) NotReady(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = why
}

// Ready satisfies sign.Foreteller.
func (s *Stamper) Ready() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready
}

// Fault has f decide whether no token is issued.
func (s *Stamper) Fault(f func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Issue asks the hook first.
func (s *Stamper) Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error) {
	s.mu.Lock()
	f := s.fault
	s.mu.Unlock()
	if f != nil {
		if err := f(); err != nil {
			return nil, err
		}
	}
	return s.Authority.Issue(ctx, req)
}

// A House is the appliance's services, joined.
type House struct {
	t testing.TB

	Node                string
	Clock               *Clock
	Staff, CA, TSA, Log *Token
	Journal             *Journal
	CAs                 map[string]*ca.Authority
	Stampers            map[string]*Stamper
	Directory           *account.Service
	Signing             *sign.Service
	LogKey              *hsm.Key
	Trust               evidence.Trust
	CertificateLife     time.Duration                         // given to the directory by Restart
	SoftRevocation      bool                                  // likewise
	Custody             *account.CustodyPolicy                // likewise
	Discarded           func(reason error, objects ...[]byte) // likewise
	Pairing             *account.Pairing                      // likewise
	Full                func() error                          // why the disk is too full to sign; nil: it is not
	Machine             hsm.Token                             // a real one in the place of Staff and Log from the next Restart on; nil: those
	logger              *logrus.Logger
	serial              atomic.Int64
	unitCertificates    map[string][]*smx509.Certificate
}

// New builds a house with CRLs published. It is taken down when the test ends.
func New(t testing.TB) *House {
	t.Helper()
	return NewNode(t, "benbu-1")
}

// NewNode is New for an appliance of that name.
func NewNode(t testing.TB, node string) *House {
	t.Helper()
	h := &House{
		t: t, Node: node, Clock: NewClock(), Staff: NewToken(), CA: NewToken(), TSA: NewToken(), Log: NewToken(),
		CAs: map[string]*ca.Authority{}, Stampers: map[string]*Stamper{}, logger: logrus.New(), unitCertificates: map[string][]*smx509.Certificate{},
	}
	h.logger.SetOutput(io.Discard)
	ctx := context.Background()
	key := func(token *Token, label string, alg hsm.Algorithm) *hsm.Key {
		t.Helper()
		info, err := token.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: alg})
		h.must(err)
		k, err := hsm.KeyOf(token, info, true)
		h.must(err)
		return k
	}
	for _, label := range []string{account.PINKeyLabel, account.AppKeyLabel} {
		_, err := h.Log.GenerateKey(ctx, hsm.KeySpec{Label: label, Algorithm: hsm.HMACSM3})
		h.must(err)
	}
	h.LogKey = key(h.Log, "log", hsm.SM2)
	h.Trust.LogKeys = []crypto.PublicKey{h.LogKey.Public()}
	for _, alg := range []hsm.Algorithm{hsm.SM2, hsm.RSA2048} {
		a := h.NewCA(key(h.CA, "ca/"+string(alg), alg), string(alg), 10*365*24*time.Hour)
		h.CAs[string(alg)] = a
		h.Trust.Anchors = append(h.Trust.Anchors, a.Certificate())
		unit := key(h.TSA, "tsa/"+string(alg), alg)
		cert, err := a.Issue(ctx, ca.Request{
			Profile: ca.TSA, Subject: pkix.Name{Country: []string{"CN"}, CommonName: "时间戳单元 " + string(alg)}, PublicKey: unit.Public(),
			NotBefore: Start.Add(-time.Minute), NotAfter: Start.AddDate(5, 0, 0),
		})
		h.must(err)
		h.unitCertificates[string(alg)] = []*smx509.Certificate{cert, a.Certificate()}
		authority, err := tsa.New(tsa.Config{
			Name: string(alg), Policy: asn1.ObjectIdentifier{2, 999, 1}, Accuracy: time.Second, Signer: unit,
			Chain: h.unitCertificates[string(alg)], Clock: h.Clock, Serials: serials{h}, Log: h.logger,
		})
		h.must(err)
		h.Stampers[string(alg)] = &Stamper{Authority: authority}
	}
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: t.TempDir()})
	h.must(err)
	journal, err := audit.Open(ctx, audit.Config{
		Store: store, Node: h.Node, Clock: h.Clock, Log: h.logger, Checkpointer: h.LogKey, CheckpointEvery: 5 * time.Millisecond,
		Stamper: checkpointStamper{h.Stampers[string(hsm.SM2)].Authority},
	})
	h.must(err)
	h.Journal = &Journal{Journal: journal}
	run, stop := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() {
		if err := journal.Run(run); err != nil {
			t.Errorf("journal: %v", err)
		}
	})
	t.Cleanup(func() {
		stop()
		done.Wait()
		if err := store.Close(); err != nil {
			t.Errorf("closing the journal: %v", err)
		}
	})
	h.Restart()
	return h
}

func (h *House) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// NewCA is an authority of that name with its own root, valid from a minute before the clock's time.
func (h *House) NewCA(signer crypto.Signer, name string, life time.Duration) *ca.Authority {
	h.t.Helper()
	now := h.Clock.Now().Time
	c := ca.Config{Signer: signer, Serials: serials{h}.Next}
	root, err := ca.New(c)
	h.must(err)
	c.Certificate, err = root.SelfSign(context.Background(), pkix.Name{Country: []string{"CN"}, Organization: []string{"某医院"}, CommonName: name}, now.Add(-time.Minute), now.Add(life))
	h.must(err)
	a, err := ca.New(c)
	h.must(err)
	return a
}

// Serials numbers what the house issues.
func (h *House) Serials() tsa.SerialStore { return serials{h} }

type serials struct{ h *House }

func (s serials) Next(context.Context) (*big.Int, error) {
	node := sha256.Sum256([]byte(s.h.Node))
	node[0] = node[0]&0x3f | 0x40 // positive, and not short
	n := new(big.Int).Lsh(new(big.Int).SetBytes(node[:8]), 64)
	return n.Add(n, big.NewInt(s.h.serial.Add(1))), nil
}

type checkpointStamper struct{ unit *tsa.Authority }

func (c checkpointStamper) Stamp(ctx context.Context, data []byte) ([]byte, error) {
	t, err := c.unit.Issue(ctx, &tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true})
	if err != nil {
		return nil, err
	}
	return t.DER, nil
}

// keys hands out the staff slot's keys.
type keys struct{ token hsm.Token }

func (k keys) Key(_ context.Context, label string, certificate []byte) (*hsm.Key, error) {
	cert, err := smx509.ParseCertificate(certificate)
	if err != nil {
		return nil, err
	}
	alg := hsm.SM2
	if cert.PublicKeyAlgorithm == smx509.RSA {
		alg = hsm.RSA2048
	}
	return hsm.KeyOf(k.token, hsm.KeyInfo{Label: label, Algorithm: alg, Public: cert.PublicKey}, true)
}

func (k keys) Wrapped(w *hsm.WrappedKey) (*hsm.Key, error) { return hsm.KeyOfWrapped(k.token, w) }

// slots answers the staff slot's token and the log slot's.
func (h *House) slots() (staff, log hsm.Token) {
	if h.Machine != nil {
		return h.Machine, h.Machine
	}
	return h.Staff, h.Log
}

// macs answers with a token's MAC keys.
type macs struct{ token hsm.Token }

func (m macs) MAC(ctx context.Context, label string, data []byte) ([]byte, error) {
	return m.token.Do(ctx, label, hsm.MACSM3, data)
}

// Restart builds directory and signing anew from the journal, as a start does.
func (h *House) Restart() {
	h.t.Helper()
	h.must(h.TryRestart())
}

// TryRestart is Restart for one that may fail; then the old services stay.
func (h *House) TryRestart() error {
	ctx := context.Background()
	staff, log := h.slots()
	d := account.New(account.Config{
		Journal: h.Journal, Clock: h.Clock, MAC: macs{log}, Node: h.Node, Slots: map[hsm.SlotClass]hsm.Token{hsm.Staff: staff, hsm.TSA: h.TSA, hsm.Log: log}, CAs: h.CAs, Log: h.logger, CertificateLife: h.CertificateLife, SoftRevocation: h.SoftRevocation,
		Discarded: h.Discarded, Custody: h.Custody,
	})
	if err := d.Pair(h.Pairing); err != nil {
		return err
	}
	for alg, chain := range h.unitCertificates {
		h.must(d.AddKey(account.OwnKey{
			Owner: "tsa:" + map[string]string{"SM2": "sm2", "RSA-2048": "rsa"}[alg], Label: "tsa/" + alg, Algorithm: alg, Class: hsm.TSA,
			Certificate: chain[0].Raw, Chain: [][]byte{chain[1].Raw},
		}))
	}
	err := h.Journal.State(ctx, func(r audit.Record) error {
		return d.Replay(ctx, &r.Entry, func(name string) ([]byte, error) {
			return h.Journal.Payload(ctx, &r.Entry, name)
		})
	})
	if err == nil {
		err = d.Settle(ctx)
	}
	if err == nil {
		_, err = d.RefreshCRLs(ctx)
	}
	if err != nil {
		return err
	}
	h.Directory = d
	stampers := map[string]sign.Stamper{}
	for alg, s := range h.Stampers {
		stampers[alg] = s
	}
	h.Signing = sign.New(sign.Config{
		Directory: d, Journal: h.Journal, Keys: keys{staff}, Stampers: stampers, Accuracy: time.Second, Clock: h.Clock,
		Reserve: func() error {
			if h.Full != nil {
				return h.Full()
			}
			return nil
		},
		Log: h.logger, Trust: h.Trust,
	})
	return nil
}

// App registers an application that may sign, by both methods of consent and with timestamps unless change says
// otherwise.
func (h *House) App(id string, change func(*account.Application)) *account.Application {
	h.t.Helper()
	a := account.Application{
		ID: id, Name: "医院信息系统 " + id, Campus: "本部", Rights: []string{account.RightSign, account.RightVerify},
		Consent: []evidence.Method{evidence.AppAsserted, evidence.SignerPIN},
	}
	if change != nil {
		change(&a)
	}
	app, _, err := h.Directory.RegisterApplication(context.Background(), "admin", a)
	h.must(err)
	return app
}

// Doctor enrols a signer with PIN and the given algorithms (none: both).
func (h *House) Doctor(id string, algorithms ...string) *account.Signer {
	h.t.Helper()
	g, err := h.Directory.Enrol(context.Background(), "admin", account.Enrolment{
		ID: id, Name: "华佗", Department: "心血管内科二病区", Campus: "本部", Algorithms: algorithms, PIN: PIN,
	})
	h.must(err)
	return g
}

// Document is what Request asks to be signed.
var Document = []byte("<record><诊断>急性阑尾炎</诊断></record>")

// Request asks for a raw SM2 signature over Document, by assertion.
func Request(key, signer string) *sign.Request {
	return &sign.Request{
		IdempotencyKey: key, Signer: signer, Algorithm: string(hsm.SM2), Form: "raw", Detached: true, Content: Document,
		Document: sign.Document{ID: "ZY-2026-001", Type: "discharge-summary", MediaType: "application/xml"}, Role: "attending",
		Consent: sign.Consent{Method: evidence.AppAsserted, Assertion: "医生已在工作站登录并点击签名"},
	}
}

// Digest is a document's digest by the algorithm that goes with the signature's.
func Digest(algorithm string, document []byte) []byte {
	if algorithm == string(hsm.SM2) {
		sum := sm3.Sum(document)
		return sum[:]
	}
	sum := sha256.Sum256(document)
	return sum[:]
}

// Sign signs or ends the test.
func (h *House) Sign(app *account.Application, q *sign.Request) *sign.Result {
	h.t.Helper()
	r, err := h.Signing.Sign(context.Background(), app, q)
	h.must(err)
	return r
}

// Evidence is the bundle of a record, whose checkpoint has its timestamp.
func (h *House) Evidence(app *account.Application, recordID string) []byte {
	h.t.Helper()
	for range 400 { // the token follows the checkpoint when the unit comes to it
		data, err := h.Signing.Evidence(context.Background(), app, recordID)
		h.must(err)
		b, err := evidence.Parse(data)
		h.must(err)
		if len(b.Journal.CheckpointToken) > 0 {
			return data
		}
		<-time.After(5 * time.Millisecond)
	}
	h.t.Fatal("no checkpoint was stamped")
	return nil
}

// Grant asks for an authorisation with the right PIN.
func (h *House) Grant(app *account.Application, q account.GrantRequest) *account.Grant {
	h.t.Helper()
	q.PIN = PIN
	g, err := h.Directory.Authorize(context.Background(), app, q)
	h.must(err)
	return g
}

// Serial is the serial number, in hexadecimal, of the signer's certificate for an algorithm.
func (h *House) Serial(g *account.Signer, algorithm string) string {
	h.t.Helper()
	for _, k := range g.Keys {
		if k.Algorithm == algorithm {
			c, err := pki.ParseCertificate(k.Certificate)
			h.must(err)
			return pki.SerialHex(c.SerialNumber)
		}
	}
	h.t.Fatalf("%s has no %s key", g.ID, algorithm)
	return ""
}
