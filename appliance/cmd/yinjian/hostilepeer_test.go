package main_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/peer"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/alarm"
	"yinjian/appliance/audit"
	"yinjian/dbdriver/sqlite"
	"yinjian/ntp"
)

// A falsePeer is another campus in the test's hands: with the keys that were agreed on, a journal of its own, and answers as
// the test wants them.
type falsePeer struct {
	key     *sm2.PrivateKey
	journal *audit.Journal
	line    *tls.Certificate
	feed    atomic.Pointer[func(q peer.Query) (*peer.Feed, error)]
	asked   atomic.Int64
}

func (p *falsePeer) SignMessage(_ context.Context, m []byte) ([]byte, error) {
	return p.key.SignWithSM2(rand.Reader, nil, m)
}
func (p *falsePeer) Public() crypto.PublicKey { return &p.key.PublicKey }
func (p *falsePeer) Now() ntp.Reading {
	return ntp.Reading{Time: time.Now(), State: ntp.Trusted, Bound: time.Millisecond, Provenance: "test"}
}
func (p *falsePeer) Feed(_ context.Context, q peer.Query) (*peer.Feed, error) {
	defer p.asked.Add(1)
	return (*p.feed.Load())(q)
}
func (p *falsePeer) Cosign(context.Context, *peer.CosignRequest) (*peer.Cosigned, error) {
	return nil, peer.Refuse(peer.Unable, "not just now")
}
func (p *falsePeer) Seen(context.Context) (*peer.Seen, error) { return &peer.Seen{}, nil }

// openFalseJournal begins a journal under the peer's key.
func (p *falsePeer) openJournal(t *testing.T, node string) *audit.Journal {
	t.Helper()
	store, err := sqlite.OpenJournal(t.Context(), sqlite.JournalConfig{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	j, err := audit.Open(t.Context(), audit.Config{Store: store, Node: node, Clock: p, Log: log, Checkpointer: p})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- j.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		store.Close()
	})
	return j
}

// registers puts an application into a journal, and waits for the checkpoint over it.
func registers(t *testing.T, j *audit.Journal, id string) (uint64, audit.Checkpoint) {
	t.Helper()
	body, err := json.Marshal(account.Application{Version: 1, ID: id, Name: id, Campus: "滨海", Rights: []string{"sign"}, Stamp: "none", KeySalt: make([]byte, 16)})
	if err != nil {
		t.Fatal(err)
	}
	ref := audit.Sum([]byte(id))
	r, err := j.Append(t.Context(), audit.Draft{
		Kind: "account.application/outcome", Actor: "x", Object: id, Ref: ref[:], State: true, Fields: []audit.Field{{Name: "act", Value: audit.Text("register")}},
		Payloads: []audit.Attachment{{Name: "object", MediaType: "application/json", Data: body}},
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := j.WaitCheckpoint(t.Context(), r.Sequence)
	if err != nil {
		t.Fatal(err)
	}
	return r.Sequence, c
}

// answer is the honest feed of the entries under c.
func answer(t *testing.T, j *audit.Journal, c audit.Checkpoint, size uint64, entries ...uint64) *peer.Feed {
	t.Helper()
	f := &peer.Feed{Checkpoint: peer.HeadOf(&c), Consistency: [][]byte{}, Entries: []peer.Entry{}, Through: c.Size}
	if size > 0 && size <= c.Size {
		proof, err := j.ConsistencyProof(context.Background(), size, c.Size)
		if err != nil {
			t.Error(err)
		}
		f.Consistency = peer.Hashes(proof)
	}
	for _, seq := range entries {
		e, err := j.Foreign(context.Background(), seq, c)
		if err != nil {
			t.Error(err)
			continue
		}
		f.Entries = append(f.Entries, peer.EntryOf(e))
	}
	return f
}

// A peer with the right keys that answers wrongly: nothing of it is applied, and once it answers rightly again all is. When its
// log shows two histories nothing of it is ever applied again.
func TestHostilePeer(t *testing.T) {
	t.Parallel()
	own := freePort(t)
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.Peer = own })
	configure(t, dir, quick)
	m := serve(t, dir)
	m.trusted(t)

	p := new(falsePeer)
	var err error
	if p.key, err = sm2.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	line, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{}, line.Public(), line)
	if err != nil {
		t.Fatal(err)
	}
	p.line = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: line}
	p.journal = p.openJournal(t, "binhai-1")
	first, early := registers(t, p.journal, "lis")
	second, late := registers(t, p.journal, "pacs")
	honest := func(q peer.Query) (*peer.Feed, error) {
		time.Sleep(100 * time.Millisecond) // a long poll, so that it is not asked without pause
		c := early
		if q.Size > early.Size {
			c = late
		}
		f := answer(t, p.journal, c, q.Size)
		f.Through = min(c.Size, second) // the second entry is still to come
		return f, nil
	}
	p.feed.Store(&honest)

	// The two know each other.
	file, _ := m.card(t)
	var card struct{ Card []byte }
	var theirs appliance.PeerCard
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &card)
	}
	if err == nil {
		err = json.Unmarshal(card.Card, &theirs)
	}
	if err != nil {
		t.Fatal(err)
	}
	ln, err := peer.Listen("127.0.0.1:0", func() (*tls.Certificate, error) { return p.line, nil }, func() []byte { return theirs.PeerKey })
	if err != nil {
		t.Fatal(err)
	}
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- api.Serve(ctx, peer.NewServer(p, func() []byte { return theirs.PeerKey }, quiet), ln, time.Second)
	}()
	t.Cleanup(func() { cancel(); <-served })
	spki := func(pub any) []byte {
		b, err := smx509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	mine := appliance.PeerCard{
		Format: "yinjian-peer-card/1", Node: "binhai-1", Campus: "滨海", Epoch: early.Epoch.String(), LogKey: spki(p.Public()), PeerKey: spki(line.Public()),
		Address: ln.Addr().String(), CAs: [][]byte{}, Objects: []string{}, IssuedAt: "2026-11-22T00:00:00Z",
	}
	text, err := json.Marshal(mine)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := p.SignMessage(t.Context(), append([]byte("yinjian/peer/card/v1\x00"), text...))
	if err != nil {
		t.Fatal(err)
	}
	b, err = json.Marshal(map[string][]byte{"card": text, "signature": sig})
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(tempDir(t), "card.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	m.believe(t, file, appliance.PeerCardFingerprint(text))
	eventually(t, time.Minute, "the honest peer is followed", func() bool { s := m.peer(t); return s.Up && s.Seen == early.Size })

	known := func(id string) bool {
		return strings.Contains(mustRun(t, "app", "list", "--dir", dir, "-o", "json").stdout, `"`+id+`"`)
	}
	otherNode := p.openJournal(t, "binhai-2")
	otherSeq, otherHead := registers(t, otherNode, "lis")
	stranger := new(falsePeer)
	if stranger.key, err = sm2.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	for name, wrong := range map[string]func(q peer.Query) (*peer.Feed, error){
		"no checkpoint":  func(peer.Query) (*peer.Feed, error) { return &peer.Feed{}, nil },
		"another node's": func(q peer.Query) (*peer.Feed, error) { return answer(t, otherNode, otherHead, 0, otherSeq), nil },
		"no proof of entry": func(q peer.Query) (*peer.Feed, error) {
			f := answer(t, p.journal, late, q.Size, second)
			f.Entries[0].Proof = nil
			return f, nil
		},
		"another payload": func(q peer.Query) (*peer.Feed, error) {
			f := answer(t, p.journal, late, q.Size, second)
			f.Entries[0].Payloads = map[string][]byte{"object": []byte(`{"id":"lis"}`)}
			return f, nil
		},
		"another entry's proof": func(q peer.Query) (*peer.Feed, error) {
			f := answer(t, p.journal, late, q.Size, second)
			f.Entries[0].Proof = answer(t, p.journal, late, q.Size, first).Entries[0].Proof
			return f, nil
		},
		"an entry of before": func(q peer.Query) (*peer.Feed, error) { return answer(t, p.journal, late, q.Size, first), nil },
		"entries beyond the end": func(q peer.Query) (*peer.Feed, error) {
			f := answer(t, p.journal, late, q.Size, second)
			f.Through = second
			return f, nil
		},
		"further than the tree": func(q peer.Query) (*peer.Feed, error) {
			f := answer(t, p.journal, late, q.Size)
			f.Through = late.Size + 1
			return f, nil
		},
		"another key's checkpoint": func(q peer.Query) (*peer.Feed, error) {
			f := answer(t, p.journal, late, q.Size, second)
			f.Checkpoint.Signature, _ = stranger.SignMessage(context.Background(), f.Checkpoint.Note)
			return f, nil
		},
		"another epoch": func(peer.Query) (*peer.Feed, error) { return nil, peer.Refuse(peer.OtherEpoch, "restored") },
	} {
		asked := p.asked.Load()
		p.feed.Store(&wrong)
		eventually(t, time.Minute, name+": the state says that something is wrong", func() bool { return !m.peer(t).Up && p.asked.Load() > asked+1 })
		if known("lis") || known("pacs") || m.peer(t).Split != "" {
			t.Fatalf("%s: something was applied, or called a split view: %+v", name, m.peer(t))
		}
		p.feed.Store(&honest)
		eventually(t, time.Minute, name+": all is well afterwards", func() bool { return m.peer(t).Up })
	}
	given := func(q peer.Query) (*peer.Feed, error) {
		time.Sleep(100 * time.Millisecond)
		if q.After > second {
			return answer(t, p.journal, late, q.Size), nil
		}
		return answer(t, p.journal, late, q.Size, second), nil
	}
	p.feed.Store(&given)
	eventually(t, time.Minute, "with its proof the entry is applied", func() bool { return known("pacs") && m.peer(t).Seen == late.Size })
	older := func(peer.Query) (*peer.Feed, error) { return answer(t, p.journal, early, 0), nil }
	p.feed.Store(&older)
	eventually(t, time.Minute, "an older head is refused", func() bool { s := m.peer(t); return !s.Up && strings.Contains(s.Error, "fewer entries") })
	if s := m.peer(t); s.Seen != late.Size || s.Split != "" {
		t.Errorf("after an older head: %+v", s)
	}
	p.feed.Store(&given)
	eventually(t, time.Minute, "the peer is followed again", func() bool { return m.peer(t).Up })

	// Two histories, each under the right key: the second journal has the same name, and is signed as the first's epoch is.
	third, more := registers(t, p.journal, "ris")
	forged := more
	forged.Root[0] ^= 1
	note := strings.Replace(string(more.Note), strings.Split(string(more.Note), "\n")[2], base64.StdEncoding.EncodeToString(forged.Root[:]), 1)
	forgedSig, err := p.SignMessage(t.Context(), []byte(note))
	if err != nil {
		t.Fatal(err)
	}
	split := func(q peer.Query) (*peer.Feed, error) {
		f := answer(t, p.journal, more, q.Size, third)
		f.Checkpoint = peer.Head{Note: []byte(note), Signature: forgedSig}
		return f, nil
	}
	// It never asked for a cosignature: what was taken of it is remembered all the same.
	m.stop(t)
	p.feed.Store(&split)
	m = serve(t, dir)
	eventually(t, time.Minute, "a second history is an alarm", func() bool { return m.peer(t).Split != "" })
	p.feed.Store(&given)
	m.raises(t, alarm.SplitView)
	asked := p.asked.Load()
	if s := m.peer(t); s.Split == "" || known("ris") || p.asked.Load() != asked {
		t.Errorf("after two histories: %+v", s)
	}
	// Paired anew it asks for one cosignature after another: each costs a signature and an entry.
	mustRun(t, "peer", "remove", "--dir", dir, "--reason", "查明", "--confirmed-by", "张三", "--confirmed-by", "李四")
	m.clears(t, alarm.SplitView)
	m.believe(t, file, appliance.PeerCardFingerprint(text))
	asks := peer.NewClient(peer.ClientConfig{Address: own, Certificate: func() (*tls.Certificate, error) { return p.line, nil }, SPKI: theirs.PeerKey})
	defer asks.Close()
	var busy bool
	from, size := late.Size, m.state(t).Journal.Entries
	var heads []audit.Checkpoint
	for i := range 5 {
		_, c := registers(t, p.journal, fmt.Sprintf("app%d", i))
		heads = append(heads, c)
	}
	for _, c := range heads {
		proof, err := p.journal.ConsistencyProof(t.Context(), from, c.Size)
		if err != nil {
			t.Fatal(err)
		}
		_, err = asks.Cosign(t.Context(), &peer.CosignRequest{Checkpoint: peer.HeadOf(&c), From: from, Consistency: peer.Hashes(proof)})
		if from = c.Size; peer.IsRefusal(err, peer.Busy) {
			busy = true
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if grown := m.state(t).Journal.Entries - size; !busy || grown >= 5 {
		t.Errorf("refused %v; the journal has grown by %d entries", busy, grown)
	}
	m.mustBeClean(t)
}
