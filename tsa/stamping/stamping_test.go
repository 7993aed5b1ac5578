package stamping_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/hsm"
	"yinjian/hsm/hsmtest"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pool"
	"yinjian/hsm/softtoken"
	"yinjian/hsm/uselog"
	"yinjian/hsm/worker"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/stamping"
)

// TestMain is three programs: the tests, a timestamp worker, and the software cipher machine.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "worker" {
		os.Exit(serveWorker())
	}
	if len(os.Args) == 4 && os.Args[1] == "machine" {
		os.Exit(serveMachine(os.Args[2], os.Args[3]))
	}
	hsmtest.Daemon()
	os.Exit(m.Run())
}

// started is what the worker of these tests is told.
type started struct {
	Units map[string]stamping.Terms
	Clock string // file with the reading that its clock gives; the clock stands still
}

// A fileClock gives the reading that a file holds.
type fileClock string

func (c fileClock) Now() ntp.Reading {
	var r ntp.Reading
	b, err := os.ReadFile(string(c))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		panic(err)
	}
	return r
}

func (c fileClock) set(t testing.TB, r ntp.Reading) {
	t.Helper()
	b, err := json.Marshal(r)
	if err == nil {
		err = os.WriteFile(string(c)+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(string(c)+".new", string(c))
	}
	if err != nil {
		t.Fatal(err)
	}
}

func serveWorker() int {
	conn, err := worker.Inherited()
	if err == nil {
		err = worker.ServeExtended(context.Background(), conn, func(ctx context.Context, p worker.StartParams) (hsm.Token, error) {
			profile, err := pkcs11.ProfileByName(p.Profile)
			if err != nil {
				return nil, err
			}
			return pkcs11.Open(ctx, pkcs11.Config{Module: p.Module, ModuleArgs: p.ModuleArgs, TokenLabel: p.TokenLabel, PIN: p.PIN, Profile: profile,
				MaxSessions: p.MaxSessions, BeforeLogin: p.BeforeLogin, Log: quiet()})
		}, func(_ context.Context, token hsm.Token, p worker.StartParams) (worker.Extension, error) {
			if len(p.Extension) == 0 {
				return nil, nil
			}
			var s started
			if err := json.Unmarshal(p.Extension, &s); err != nil {
				return nil, err
			}
			var clock tsa.Clock = standing(now)
			if s.Clock != "" {
				clock = fileClock(s.Clock)
			}
			return extension{stamping.New(token, clock, s.Units, quiet())}, nil
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

type extension struct{ *stamping.Service }

func (extension) Close() {}

func serveMachine(dir, service string) int {
	d, err := time.ParseDuration(service)
	var s *softtoken.Server
	if err == nil {
		s, err = softtoken.Open(softtoken.Config{Dir: dir + "/state", PassphraseFile: dir + "/passphrase", ServiceTime: d, Log: quiet()})
	}
	if err == nil {
		err = s.Serve(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func quiet() *logrus.Logger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

var (
	epoch  = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	now    = ntp.Reading{Time: time.Date(2026, 11, 22, 8, 0, 0, 123456789, time.UTC), Bound: 3 * time.Millisecond, State: ntp.Trusted, Provenance: "BDS+lan"}
	policy = asn1.ObjectIdentifier{2, 999, 1}
	terms  = map[string]stamping.Terms{
		"sm2": {Policy: policy, Accuracy: time.Second}, "rsa": {Policy: policy, Accuracy: time.Second},
		"gm": {Policy: policy, Accuracy: 100 * time.Millisecond, Profile: cms.GM0010},
	}
)

// standing is a clock that does not move.
type standing ntp.Reading

func (c standing) Now() ntp.Reading { return ntp.Reading(c) }

// A hand is a clock that is moved by hand.
type hand struct{ atomic.Pointer[ntp.Reading] }

func newHand(r ntp.Reading) *hand {
	h := new(hand)
	h.Store(&r)
	return h
}

func (h *hand) Now() ntp.Reading { return *h.Load() }

func moved(by time.Duration) ntp.Reading {
	r := now
	r.Time = r.Time.Add(by)
	return r
}

// counter hands out serials as the appliance's are.
type counter struct{ n atomic.Int64 }

func (c *counter) Next(context.Context) (*big.Int, error) {
	return new(big.Int).Add(new(big.Int).Lsh(big.NewInt(0x5a5a), 144), big.NewInt(c.n.Add(1))), nil
}

// A CA issues units' certificates.
var issuer = sync.OnceValue(func() (ca struct {
	key  crypto.Signer
	cert *smx509.Certificate
}) {
	ca.key = cmstest.NewSM2Key()
	ca.cert = cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, NotBefore: epoch, NotAfter: epoch.AddDate(20, 0, 0), IsCA: true,
		BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, ca.key.Public(), ca.key)
	return ca
})

// chainFor certifies a unit's key.
func chainFor(pub crypto.PublicKey, change func(*smx509.Certificate)) []*smx509.Certificate {
	purpose, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
	if err != nil {
		panic(err)
	}
	template := &smx509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Test TSU"}, NotBefore: epoch, NotAfter: epoch.AddDate(5, 0, 0),
		KeyUsage:        smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: purpose}},
	}
	if change != nil {
		change(template)
	}
	ca := issuer()
	return []*smx509.Certificate{cmstest.Issue(template, ca.cert, pub, ca.key), ca.cert}
}

// A memory token holds one SM2 and one RSA key, and counts what they sign.
type memory struct {
	hsm.Token
	sm2  *sm2.PrivateKey
	rsa  *rsa.PrivateKey
	made atomic.Int64
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey { return cmstest.NewRSAKey(2048).(*rsa.PrivateKey) })

func newMemory() *memory { return &memory{sm2: cmstest.NewSM2Key().(*sm2.PrivateKey), rsa: rsaKey()} }

func (m *memory) FindKey(_ context.Context, label string) (hsm.KeyInfo, error) {
	switch label {
	case "tsa/sm2":
		return hsm.KeyInfo{Label: label, Algorithm: hsm.SM2, Public: &m.sm2.PublicKey}, nil
	case "tsa/rsa":
		return hsm.KeyInfo{Label: label, Algorithm: hsm.RSA2048, Public: &m.rsa.PublicKey}, nil
	}
	return hsm.KeyInfo{}, hsm.ErrKeyNotFound
}

func (m *memory) Do(_ context.Context, label string, op hsm.Operation, data []byte) ([]byte, error) {
	m.made.Add(1)
	if op == hsm.SignRSASHA256 {
		return rsa.SignPKCS1v15(nil, m.rsa, crypto.SHA256, data)
	}
	return sm2.SignASN1(rand.Reader, m.sm2, data, nil)
}

// direct reaches a service in this process; after, if set, changes what it answers. Without a service it answers canned.
type direct struct {
	*stamping.Service
	asked  atomic.Int64
	after  func([]byte) ([]byte, error)
	canned []byte
}

func (d *direct) Extend(ctx context.Context, request func() ([]byte, error)) ([]byte, error) {
	d.asked.Add(1)
	r, err := request()
	if err != nil {
		return nil, err
	}
	if d.Service == nil {
		return bytes.Clone(d.canned), nil
	}
	answer, err := d.Service.Extend(ctx, r)
	if err == nil && d.after != nil {
		return d.after(answer)
	}
	return answer, err
}

// rows are workers that are tried in their order, as a pool does it.
type rows []struct {
	name string
	w    *direct
}

func (r rows) Extend(ctx context.Context, _ string, fits func(string) bool, call func(context.Context, string, stamping.Worker) ([]byte, error)) ([]byte, error) {
	err := hsm.ErrDeclined
	for _, m := range r {
		if fits != nil && !fits(m.name) {
			continue
		}
		out, cerr := call(ctx, m.name, m.w)
		if !errors.Is(cerr, hsm.ErrDeclined) && !errors.Is(cerr, hsm.ErrBadSignature) {
			return out, cerr
		}
		err = cerr
	}
	return nil, err
}

func oneRow(token hsm.Token, clock tsa.Clock) rows {
	return rows{{"main", &direct{Service: stamping.New(token, clock, terms, quiet())}}}
}

// A discards keeps what was thrown away.
type discards struct {
	mu   sync.Mutex
	made [][]byte
}

func (d *discards) add(_ error, made ...[]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.made = append(d.made, made...)
}

func (d *discards) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.made)
}

func unitOf(t testing.TB, name string, workers stamping.Workers, own tsa.Clock, chain []*smx509.Certificate, d *discards) (*stamping.Unit, *stamping.Watch) {
	t.Helper()
	watch := stamping.NewWatch(own)
	label := "tsa/" + name
	if name == "gm" {
		label = "tsa/sm2"
	}
	u, err := stamping.NewUnit(stamping.UnitConfig{
		Name: name, Terms: terms[name], Label: label, Chain: chain, Workers: workers, Watch: watch, Serials: new(counter), Verify: true,
		Discarded: d.add, Log: quiet(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return u, watch
}

func query(text string) *tsa.Request {
	return &tsa.Request{Imprint: tsa.ImprintOf([]byte(text)), Nonce: big.NewInt(-7), CertReq: true}
}

// TestTimeIsTheWorkers: what stands in a token is the worker's reading, not this process's; a chain crosses once, and a
// token is one request and one answer.
func TestTimeIsTheWorkers(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"sm2", "rsa", "gm"} {
		m := newMemory()
		var pub crypto.PublicKey = &m.sm2.PublicKey
		if name == "rsa" {
			pub = &m.rsa.PublicKey
		}
		theirs := moved(4 * time.Millisecond)
		theirs.Bound, theirs.Provenance, theirs.State = 2*time.Millisecond, "BDS alone", ntp.Holdover
		workers := oneRow(m, standing(theirs))
		var d discards
		u, watch := unitOf(t, name, workers, standing(now), chainFor(pub, nil), &d)
		for i := range 3 {
			token, err := u.Issue(t.Context(), query("x"))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !token.GenTime.Equal(theirs.Time.Truncate(time.Millisecond)) || token.Provenance != theirs || token.Accuracy != 3*time.Millisecond {
				t.Errorf("%s: genTime %v, accuracy %v, provenance %+v; want the worker's reading", name, token.GenTime, token.Accuracy, token.Provenance)
			}
			if report, err := token.VerifyData([]byte("x")); err != nil {
				t.Errorf("%s: %v: %v", name, err, report.Checks)
			}
			if n := workers[0].w.asked.Load(); n != int64(i+2) {
				t.Errorf("%s: %d requests for %d tokens, want one more, for the chain", name, n, i+1)
			}
		}
		if err := watch.Ready(time.Second); err != nil || d.count() != 0 || m.made.Load() != 3 {
			t.Errorf("%s: ready %v, %d thrown away, %d signatures", name, err, d.count(), m.made.Load())
		}
		if _, err := u.Issue(t.Context(), &tsa.Request{Imprint: query("x").Imprint, Policy: asn1.ObjectIdentifier{1, 2}}); !isFault(err, tsa.UnacceptedPolicy) {
			t.Errorf("%s: another policy: %v", name, err)
		}
	}
}

func isFault(err error, f tsa.Failure) bool {
	var fault *tsa.RequestError
	return errors.As(err, &fault) && fault.Failure == f
}

// TestRefusals: whose clock is not trusted, which certificate does not cover the present; nothing is signed then.
func TestRefusals(t *testing.T) {
	t.Parallel()
	bad := now
	bad.State = ntp.Suspect
	vague := now
	vague.Bound = 2 * time.Second
	ended := func(c *smx509.Certificate) { c.NotAfter = now.Time.Add(-time.Hour) }
	period, err := asn1.Marshal(struct {
		NotAfter time.Time `asn1:"generalized,tag:1"`
	}{now.Time.Add(-time.Minute).Truncate(time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		own, theirs ntp.Reading
		change      func(*smx509.Certificate)
		want        error
		ready       bool
	}{
		"the worker's clock is suspect":  {now, bad, nil, tsa.ErrTimeNotAvailable, false},
		"the worker's bound is too wide": {now, vague, nil, tsa.ErrTimeNotAvailable, false},
		"the worker's clock is cold":     {now, ntp.Reading{State: ntp.Cold}, nil, tsa.ErrTimeNotAvailable, false},
		"our own clock is suspect":       {bad, now, nil, tsa.ErrTimeNotAvailable, false},
		"the certificate has ended":      {now, now, ended, tsa.ErrCertificateNotValid, true},
		"the private key usage period has ended": {now, now, func(c *smx509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 16}, Value: period})
		}, tsa.ErrCertificateNotValid, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMemory()
			workers := oneRow(m, standing(c.theirs))
			var d discards
			u, watch := unitOf(t, "sm2", workers, standing(c.own), chainFor(&m.sm2.PublicKey, c.change), &d)
			if err := watch.Ready(time.Second); !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, tsa.ErrTimeNotAvailable) {
				t.Errorf("before anybody was asked: %v, want ErrUnavailable and nothing about the time", err)
			}
			if _, err := u.Issue(t.Context(), query("x")); !errors.Is(err, c.want) {
				t.Errorf("Issue = %v, want %v", err, c.want)
			}
			if err := watch.Look(t.Context(), "main", workers[0].w); err != nil {
				t.Fatal(err)
			}
			if err := u.Ready(); (err == nil) != c.ready || err != nil && !errors.Is(err, tsa.ErrTimeNotAvailable) {
				t.Errorf("Ready = %v, want ready %v", err, c.ready)
			}
			if m.made.Load() != 0 || d.count() != 0 {
				t.Errorf("%d signatures were made, %d thrown away", m.made.Load(), d.count())
			}
		})
	}
	// What the worker would refuse is not taken into use here either.
	m := newMemory()
	for name, change := range map[string]func(*smx509.Certificate){
		"not critical":  func(c *smx509.Certificate) { c.ExtraExtensions[0].Critical = false },
		"no purpose":    func(c *smx509.Certificate) { c.ExtraExtensions = nil },
		"another usage": func(c *smx509.Certificate) { c.KeyUsage |= smx509.KeyUsageKeyEncipherment },
	} {
		chain := chainFor(&m.sm2.PublicKey, change)
		if _, err := stamping.NewUnit(stamping.UnitConfig{Name: "sm2", Terms: terms["sm2"], Label: "tsa/sm2", Chain: chain, Watch: stamping.NewWatch(standing(now)), Serials: new(counter), Log: quiet()}); err == nil {
			t.Errorf("%s: the certificate was taken", name)
		}
		workers := oneRow(m, standing(now))
		good, _ := unitOf(t, "sm2", swapped{workers, chainFor(&m.sm2.PublicKey, nil), chain}, standing(now), chainFor(&m.sm2.PublicKey, nil), new(discards))
		if _, err := good.Issue(t.Context(), query("x")); err == nil || m.made.Load() != 0 {
			t.Errorf("%s: the worker took the certificate: %v, %d signatures", name, err, m.made.Load())
		}
	}
}

// swapped sends another chain than the unit's.
type swapped struct {
	rows
	was, is []*smx509.Certificate
}

func (s swapped) Extend(ctx context.Context, label string, fits func(string) bool, call func(context.Context, string, stamping.Worker) ([]byte, error)) ([]byte, error) {
	return s.rows.Extend(ctx, label, fits, func(ctx context.Context, name string, w stamping.Worker) ([]byte, error) {
		return call(ctx, name, swapping{w, s.is})
	})
}

type swapping struct {
	stamping.Worker
	chain []*smx509.Certificate
}

func (s swapping) Extend(ctx context.Context, _ func() ([]byte, error)) ([]byte, error) {
	var raw [][]byte
	for _, c := range s.chain {
		raw = append(raw, c.Raw)
	}
	return s.Worker.Extend(ctx, func() ([]byte, error) {
		return askWith("sm2", "tsa/sm2", raw, serialOf(1<<20), mustBytes(query("x"))), nil
	})
}

func mustBytes(q *tsa.Request) []byte {
	b, err := q.Bytes()
	if err != nil {
		panic(err)
	}
	return b
}

func serialOf(n uint64) []byte {
	return new(big.Int).Add(new(big.Int).Lsh(big.NewInt(0x5a5a), 144), new(big.Int).SetUint64(n)).Bytes()
}

func part(b []byte, v []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...)
}

// askWith is a request for a token, made by hand.
func askWith(unit, label string, chain [][]byte, serial, query []byte) []byte {
	digest := stamping.DigestOf(label, chain)
	b := part([]byte{1}, []byte(unit))
	b = append(b, digest[:]...)
	b = append(part(part(part(b, serial), query), []byte(label)), byte(len(chain)))
	for _, c := range chain {
		b = part(b, c)
	}
	return b
}

// TestWrongClock: a worker whose clock contradicts ours, both bounds considered, has its token thrown away and is named;
// another one makes the next, and the first is not asked again until its clock agrees.
func TestWrongClock(t *testing.T) {
	t.Parallel()
	m := newMemory()
	first, own := newHand(moved(7*time.Millisecond)), newHand(now)
	workers := append(oneRow(m, first), oneRow(m, standing(moved(-5*time.Millisecond)))...)
	workers[1].name = "second"
	var d discards
	u, watch := unitOf(t, "sm2", workers, own, chainFor(&m.sm2.PublicKey, nil), &d)
	token, err := u.Issue(t.Context(), query("x"))
	if err != nil || !token.GenTime.Equal(moved(-5*time.Millisecond).Time.Truncate(time.Millisecond)) {
		t.Fatalf("token %+v, %v; want the second machine's", token, err)
	}
	if d.count() != 1 {
		t.Errorf("%d tokens were thrown away, want the first machine's", d.count())
	}
	if k := watch.Clocks(); len(k) != 2 || k[0].Wrong == nil || !strings.Contains(k[0].Wrong.Error(), "machine main") || k[1].Wrong != nil {
		t.Errorf("clocks %+v, want main's named as wrong", k)
	}
	asked := workers[0].w.asked.Load()
	if _, err := u.Issue(t.Context(), query("y")); err != nil || workers[0].w.asked.Load() != asked {
		t.Errorf("the next token: %v; the machine with the wrong clock was asked %d times", err, workers[0].w.asked.Load()-asked)
	}
	own.Store(new(ntp.Reading{Time: now.Time.Add(time.Hour), Bound: now.Bound, State: ntp.Trusted}))
	if _, err := u.Issue(t.Context(), query("z")); !errors.Is(err, tsa.ErrTimeNotAvailable) || d.count() != 2 {
		t.Errorf("both are wrong: %v, %d thrown away", err, d.count())
	}
	if err := u.Ready(); !errors.Is(err, tsa.ErrTimeNotAvailable) || !strings.Contains(err.Error(), "machine") {
		t.Errorf("Ready = %v, want which machine's clock is wrong", err)
	}
	first.Store(new(ntp.Reading{Time: own.Now().Time, Bound: now.Bound, State: ntp.Trusted}))
	if err := watch.Look(t.Context(), "main", workers[0].w); err != nil || u.Ready() != nil {
		t.Errorf("after the clock was put right: %v, %v", err, u.Ready())
	}
	if _, err := u.Issue(t.Context(), query("z")); err != nil {
		t.Error(err)
	}
	watch.Forget("main")
	watch.Forget("second")
	if err := u.Ready(); err == nil {
		t.Error("ready with no machine")
	}
}

// TestBadTokens: what comes back is held against what was asked for; all else is thrown away and accounted for.
func TestBadTokens(t *testing.T) {
	t.Parallel()
	m := newMemory()
	chain := chainFor(&m.sm2.PublicKey, nil)
	other := newMemory()
	elsewhere := stamping.New(other, standing(now), terms, quiet())
	var again []byte // an earlier answer
	for name, spoil := range map[string]func([]byte) ([]byte, error){
		"signature": func(a []byte) ([]byte, error) { return flipped(a, len(a)-3), nil },
		"reading later than genTime": func(a []byte) ([]byte, error) {
			binary.BigEndian.PutUint64(a[1:], binary.BigEndian.Uint64(a[1:])+2e6)
			return a, nil
		},
		"reading earlier than genTime": func(a []byte) ([]byte, error) {
			binary.BigEndian.PutUint64(a[1:], binary.BigEndian.Uint64(a[1:])-2e6)
			return a, nil
		},
		"bound narrower than the accuracy says": func(a []byte) ([]byte, error) {
			binary.BigEndian.PutUint64(a[9:], uint64(30*time.Millisecond))
			return a, nil
		},
		"reading of a clock that is not trusted": func(a []byte) ([]byte, error) {
			return bytes.Replace(a, []byte(ntp.Trusted), []byte(ntp.Suspect), 1), nil
		},
		"not a signature": func(a []byte) ([]byte, error) { return append(a[:len(a)-40], make([]byte, 40)...), nil },
		"an earlier one": func(a []byte) ([]byte, error) {
			if again == nil {
				again = bytes.Clone(a)
			}
			return bytes.Clone(again), nil
		},
		"under another key": func([]byte) ([]byte, error) {
			c := chainFor(&other.sm2.PublicKey, nil)
			return elsewhere.Extend(t.Context(), askWith("sm2", "tsa/sm2", [][]byte{c[0].Raw, c[1].Raw}, serialOf(2), mustBytes(query("x"))))
		},
		"under another certificate of the key": func([]byte) ([]byte, error) {
			c := chainFor(&m.sm2.PublicKey, func(c *smx509.Certificate) { c.SerialNumber = big.NewInt(77) })
			return stamping.New(m, standing(now), terms, quiet()).Extend(t.Context(), askWith("sm2", "tsa/sm2", [][]byte{c[0].Raw, c[1].Raw}, serialOf(2), mustBytes(query("x"))))
		},
	} {
		workers := oneRow(m, standing(now))
		var d discards
		u, _ := unitOf(t, "sm2", workers, standing(now), chain, &d)
		if _, err := u.Issue(t.Context(), query("x")); err != nil { // the chain is there
			t.Fatal(err)
		}
		workers[0].w.after = spoil
		_, err := u.Issue(t.Context(), query("x"))
		if name == "an earlier one" { // the first came through
			if err != nil {
				t.Fatal(err)
			}
			_, err = u.Issue(t.Context(), query("x"))
		}
		if !errors.Is(err, hsm.ErrBadSignature) || d.count() != 1 {
			t.Errorf("%s: %v, %d thrown away; want ErrBadSignature and one", name, err, d.count())
		}
	}
}

func flipped(b []byte, i int) []byte {
	b = bytes.Clone(b)
	b[i] ^= 1
	return b
}

// TestSerials: a number is used once, however the requests overtake one another.
func TestSerials(t *testing.T) {
	t.Parallel()
	m := newMemory()
	s := stamping.New(m, standing(now), terms, quiet())
	c := chainFor(&m.sm2.PublicKey, nil)
	chain := [][]byte{c[0].Raw, c[1].Raw}
	ask := func(serial []byte) bool {
		answer, err := s.Extend(context.Background(), askWith("sm2", "tsa/sm2", chain, serial, mustBytes(query("x"))))
		return err == nil && stamping.Signature(answer) != nil
	}
	var wg sync.WaitGroup
	var got atomic.Int64
	for i := range 4 { // each number from all of them
		wg.Go(func() {
			for n := range uint64(60) {
				if ask(serialOf(1000 + (n*7+uint64(i)*13)%60)) {
					got.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if got.Load() != 60 {
		t.Errorf("%d tokens under 60 numbers", got.Load())
	}
	for _, c := range []struct {
		name string
		n    uint64
		want bool
	}{
		{"far ahead", 1000 + 1<<20, true}, {"an old one", 1003, false}, {"one behind", 999 + 1<<20, true}, {"again", 999 + 1<<20, false},
		{"at the window's end", 1000 + 1<<20 - 1<<16 + 1, true}, {"beyond the window's end", 1000 + 1<<20 - 1<<16, false},
		{"a step within the window", 1000 + 1<<20 + 3<<14, true}, {"one that was jumped over", 1000 + 1<<20 + 2<<14, true}, {"again", 1000 + 1<<20 + 2<<14, false},
	} {
		if ask(serialOf(c.n)) != c.want {
			t.Errorf("%s: number %d, want %v", c.name, c.n, c.want)
		}
	}
	for name, serial := range map[string][]byte{
		"another row": new(big.Int).Add(new(big.Int).SetBytes(serialOf(1<<21)), new(big.Int).Lsh(big.NewInt(1), 100)).Bytes(),
		"none":        nil, "short": {1, 2, 3}, "leading zero": append([]byte{0}, serialOf(1 << 22)[1:]...), "long": append([]byte{1}, make([]byte, 20)...),
	} {
		if ask(serial) {
			t.Errorf("%s was taken", name)
		}
	}
}

// requestInfo is the CertificationRequestInfo of a good request.
func requestInfo(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := smx509.CreateCertificateRequest(rand.Reader, &smx509.CertificateRequest{Subject: pkix.Name{CommonName: "TSU"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := smx509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	return csr.RawTBSCertificateRequest
}

// TestBackdating holds a client of a real worker over a real token, as whoever owns the API process does, and tries to get a
// date of his own signed by the unit's key. The worker's stream refuses at both ends (hsm/worker's TestClasses has the
// frames), its extension signs what it makes, and the log of uses has nothing but that.
func TestBackdating(t *testing.T) {
	t.Parallel()
	machine := hsmtest.NewMachine(t)
	dir := t.TempDir()
	clock := fileClock(dir + "/clock")
	clock.set(t, now)
	extension, err := json.Marshal(started{Units: terms, Clock: string(clock)})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	uses := dir + "/uses"
	w, err := worker.Start(worker.Config{Command: []string{self, "worker"}, Class: hsm.TSA, Log: quiet(), Params: worker.StartParams{
		Module: machine.Config.Module, ModuleArgs: machine.Config.ModuleArgs, TokenLabel: machine.Config.TokenLabel, PIN: []byte(hsmtest.UserPIN), Profile: "neutral",
		MaxSessions: 4, Uses: worker.UseLog{Dir: uses}, Extension: extension,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	p := pool.New(pool.Config{Class: hsm.TSA, Log: quiet()})
	if err := p.Add(t.Context(), pool.Machine{Name: "main", Token: w, Weight: 1, Sessions: 4}); err != nil {
		t.Fatal(err)
	}
	const label = "tsa/sm2"
	info, err := p.GenerateKey(t.Context(), hsm.KeySpec{Label: label, Algorithm: hsm.SM2})
	if err != nil {
		t.Fatal(err)
	}
	chain := chainFor(info.Public, nil)
	var d discards
	u, _ := unitOf(t, "sm2", p, standing(now), chain, &d)
	token, err := u.Issue(t.Context(), query("x"))
	if err != nil {
		t.Fatal(err)
	}

	// 1. What a back-dated token would need signed: its TSTInfo names another date, its signed attributes name that TSTInfo.
	if token, err = tsa.ParseToken(token.DER); err != nil {
		t.Fatal(err)
	}
	content := bytes.Replace(token.Message().Content, []byte("20261122080000"), []byte("20250101000000"), 1)
	if bytes.Equal(content, token.Message().Content) {
		t.Fatal("the test changes nothing")
	}
	mine := newMemory()
	key, err := hsm.NewKey(t.Context(), mine, label, false)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := cms.Sign(t.Context(), key, cms.Params{ContentType: cms.OIDTSTInfo, Content: content, Certificates: [][]byte{chainFor(&mine.sm2.PublicKey, nil)[0].Raw}})
	if err != nil {
		t.Fatal(err)
	}
	attributes := forged.SignedAttributesDER
	own, err := hsm.KeyOf(p, info, false)
	if err != nil {
		t.Fatal(err)
	}
	h := own.NewHash()
	h.Write(attributes)
	digest := h.Sum(nil)

	// 2. By the operations that other classes have.
	for name, try := range map[string]func() error{
		"digest":     func() error { _, err := own.SignDigest(t.Context(), digest); return err },
		"message":    func() error { _, err := own.SignMessage(t.Context(), attributes); return err },
		"as RSA":     func() error { _, err := w.Do(t.Context(), label, hsm.SignRSASHA256, digest); return err },
		"as PSS":     func() error { _, err := w.Do(t.Context(), label, hsm.SignRSAPSSSHA256, digest); return err },
		"as MAC":     func() error { _, err := w.Do(t.Context(), label, hsm.MACSM3, digest); return err },
		"as message": func() error { _, err := w.Do(t.Context(), label, hsm.SignSM2M, attributes); return err },
		"wrapped": func() error {
			_, err := w.DoWrapped(t.Context(), hsm.WrappedRef([32]byte{}, hsm.HealthPrefix+"x"), hsm.SignSM2E, digest)
			return err
		},
	} {
		var refused *hsm.Error
		if err := try(); !errors.As(err, &refused) || hsm.RVName(refused.RV) != "CKR_KEY_FUNCTION_NOT_PERMITTED" {
			t.Errorf("%s: %v, want CKR_KEY_FUNCTION_NOT_PERMITTED", name, err)
		}
	}

	// 3. As certificate requests.
	good := requestInfo(t, signerOf{info.Public, func(message []byte) ([]byte, error) {
		return stamping.SignRequest(t.Context(), p, label, info.Public, message, d.add)
	}})
	for name, info := range map[string][]byte{
		"TSTInfo": content, "signed attributes": attributes, "digest": digest, "nothing": nil, "a certificate": chain[0].RawTBSCertificate,
		"with more after it": append(bytes.Clone(good), 0), "for another key": requestInfo(t, mine.sm2), "of another version": bytes.Replace(good, []byte{2, 1, 0}, []byte{2, 1, 1}, 1),
		"signed attributes called a sequence": append([]byte{0x30}, attributes[1:]...),
	} {
		if sig, err := p.Extend(t.Context(), label, nil, func(ctx context.Context, _ string, w stamping.Worker) ([]byte, error) {
			return w.Extend(ctx, func() ([]byte, error) { return part(part([]byte{3}, []byte(label)), info), nil })
		}); err == nil {
			t.Errorf("%s was signed: %x", name, sig)
		}
	}

	// 4. As requests for tokens: of the time there is nothing that could be said; other terms are not the unit's.
	if _, err := w.Extend(t.Context(), func() ([]byte, error) {
		return askWith("other", label, [][]byte{chain[0].Raw, chain[1].Raw}, serialOf(9), mustBytes(query("x"))), nil
	}); err == nil {
		t.Error("a token of a unit that is not configured")
	}
	if _, err := w.Extend(t.Context(), func() ([]byte, error) {
		return askWith("sm2", hsm.HealthPrefix+"x", [][]byte{chain[0].Raw, chain[1].Raw}, serialOf(9), mustBytes(query("x"))), nil
	}); err == nil {
		t.Error("a token under a key for health")
	}
	later := moved(-time.Hour)
	clock.set(t, later)
	if _, err := u.Issue(t.Context(), query("x")); !errors.Is(err, tsa.ErrTimeNotAvailable) || d.count() != 1 {
		t.Errorf("the worker's clock an hour behind: %v, %d thrown away", err, d.count())
	}

	// 5. The log of uses: two tokens and a certificate request.
	r, err := uselog.OpenReader(uses, string(hsm.TSA), nil)
	var labels []string
	if err == nil {
		err = r.Next(func(rec uselog.Record) error {
			if rec.Kind == uselog.Use {
				labels = append(labels, rec.Label)
			}
			return nil
		})
	}
	if err != nil || !slices.Equal(labels, []string{label, label, label}) {
		t.Errorf("uses %q, %v; want those of two tokens and one request", labels, err)
	}
}

// signerOf is a crypto.MessageSigner.
type signerOf struct {
	pub  crypto.PublicKey
	sign func(message []byte) ([]byte, error)
}

func (s signerOf) Public() crypto.PublicKey { return s.pub }

func (s signerOf) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("no digest is signed")
}

func (s signerOf) SignMessage(_ io.Reader, message []byte, _ crypto.SignerOpts) ([]byte, error) {
	return s.sign(message)
}
