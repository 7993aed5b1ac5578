package appliance

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/peer"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// Kinds of entries about the other campus. The numbered ones are told by their references, so that the last of them is found
// without an index of its own, and cannot be forgotten or replaced.
const (
	kindPeerKeyIntent = "peer.key/intent"
	kindPeerKey       = "peer.key/outcome"
	kindPeerCard      = "peer.card"           // a card was made
	kindPeering       = "peer.pairing"        // "add" or "remove"; the entry is the act
	kindPeerHead      = "peer.head/cosigned"  // numbered: a checkpoint of the other log was cosigned here
	kindPeerSeen      = "peer.head/seen"      // numbered: entries of the other log were taken under a checkpoint that is not cosigned
	kindPeerConfirmed = "peer.head/confirmed" // numbered: a checkpoint of this log was cosigned there
	kindPeerSplit     = "peer.head/split"     // the other log showed two histories; the proof is in the entry
)

// peerLabel is the key that both ends of the line to the other campus are known by, in the tls slot.
const peerLabel = "tls/peer"

const (
	peerWait       = 5 * time.Second        // a long poll
	peerPause      = 500 * time.Millisecond // after a failure, doubled up to peerPauseMost
	peerPauseMost  = 5 * time.Second
	cosignPause    = 500 * time.Millisecond // between two cosignatures
	peerStartLimit = 5 * time.Second        // for the question at the start
	heardEvery     = 10 * time.Second
)

// foreignMediaType is that of signatures by keys of another appliance: they are not held against the uses of our keys.
const foreignMediaType = "binary/vnd.yinjian.signature"

// peers is the side of this appliance that the other campus sees, and its view of the other.
type peers struct {
	a           *Appliance
	certificate *tls.Certificate
	spki        []byte // of the certificate's key

	acts  sync.Mutex // one decision about the pairing at a time
	heads sync.Mutex // held while a checkpoint of the other log is followed and journalled

	mu      sync.Mutex    // guards what follows
	pair    *pairing      // nil: there is no other campus
	changed chan struct{} // closed and replaced when pair changes, or its split
	severed bool          // by a drill: the line is cut
	accused string        // what the other campus has against our own log; "": nothing
	notes   []uint64      // our own entries about heads, which alone are no reason to have another checkpoint cosigned
}

// A pairing is the other campus as its card says, and what is known of its log. All but card, since and client is guarded by
// peers.mu.
type pairing struct {
	*parsedCard
	since  time.Time
	client *peer.Client

	split       string             // why nothing of it is taken any more; "": all is well
	seen        *audit.Checkpoint  // the newest of its log that was verified; nil: none
	cosigned    *audit.Checkpoint  // the last one that was cosigned, and the word
	cosignature *audit.Cosignature // nil: none
	headCount   uint64             // entries of kindPeerHead about this node
	seenCount   uint64             // entries of kindPeerSeen about this node
	cosignedAt  time.Time          // guarded by heads: when the last one was asked for that is not older
	remembered  uint64             // size of its checkpoint in the last of them
	confirmed   uint64             // size of our newest checkpoint that it has cosigned; 0: none
	confirmedBy time.Time          // when
	count       uint64             // entries of kindPeerConfirmed about this node
	known       uint64             // size of our tree that it has seen, as far as we know
	cursor      uint64             // its entries below this number are applied
	heard       time.Time          // when its whole directory was last known to be here; zero: not since the pairing
	fault       string             // why the last request failed; "": it did not
}

// newPeers finds the key, the pairing and what was seen of the other log. The journal is open and may be written.
func newPeers(ctx context.Context, a *Appliance) (*peers, error) {
	p := &peers{a: a, changed: make(chan struct{})}
	if err := p.load(ctx); err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	if a.cfg.Listen.Peer == "" {
		if p.pair != nil {
			// Its directory's copy ages all the same, and changes are still decided at the centre.
			a.log.WithField("peer", p.pair.Node).Error("the other campus is paired, but listen.peer is off: its directory is not followed, and signing ends when the copy is too old")
		}
		return p, nil
	}
	key, err := p.key(ctx)
	if err != nil {
		return nil, fmt.Errorf("peer key: %w", err)
	}
	if err := p.certify(key); err != nil {
		return nil, fmt.Errorf("peer certificate: %w", err)
	}
	if p.pair != nil {
		p.pair.client = p.newClient(p.pair.parsedCard)
	}
	return p, nil
}

// key is the one in the tls slot; without that slot it is the listener's file.
func (p *peers) key(ctx context.Context) (crypto.Signer, error) {
	t, ok := p.a.tokens[hsm.TLS]
	if !ok {
		return readTLSKey(p.a.dir)
	}
	info, err := t.FindKey(ctx, peerLabel)
	if errors.Is(err, hsm.ErrKeyNotFound) {
		info, err = p.makeKey(ctx, t)
	}
	if err != nil {
		return nil, err
	}
	key, err := hsm.KeyOf(t, info, *p.a.cfg.HSM.VerifyFresh)
	if err != nil {
		return nil, err
	}
	return newHandshakeKey(key, time.Duration(p.a.cfg.HSM.CallDeadline), 16), nil
}

// makeKey makes it and journals that: intent, then outcome. Where it is gone, as after a restore onto another cipher machine,
// the other campus no longer knows this appliance, and has to be paired anew; signing does not wait for that.
func (p *peers) makeKey(ctx context.Context, t hsm.Token) (hsm.KeyInfo, error) {
	if p.pair != nil {
		p.a.log.WithFields(logrus.Fields{"peer": p.pair.Node, "object": peerLabel}).Error("the key that the other campus knows this appliance by is gone; another is made, and the two have to be paired anew")
	}
	if _, err := p.a.journal.Append(ctx, audit.Draft{Kind: kindPeerKeyIntent, Actor: "appliance", Object: peerLabel}); err != nil {
		return hsm.KeyInfo{}, err
	}
	info, _, err := ensureKey(ctx, t, peerLabel, hsm.RSA2048, true)
	if err != nil {
		return info, err
	}
	spki, err := smx509.MarshalPKIXPublicKey(info.Public)
	if err != nil {
		return info, err
	}
	_, err = p.a.journal.Append(ctx, audit.Draft{
		Kind: kindPeerKey, Actor: "appliance", Object: peerLabel, Fields: []audit.Field{{Name: "spki", Value: audit.Octets(spki)}},
	})
	return info, err
}

// certify makes the certificate that carries the key: TLS wants one, nobody looks at it.
func (p *peers) certify(key crypto.Signer) error {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: p.a.cfg.Node},
		NotBefore: time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 §4.1.2.5: no end
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	p.certificate, p.spki = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, leaf.RawSubjectPublicKeyInfo
	if _, ok := key.(*handshakeKey); ok {
		p.certificate.SupportedSignatureAlgorithms = []tls.SignatureScheme{tls.PSSWithSHA256, tls.PKCS1WithSHA256}
	}
	return nil
}

func (p *peers) newClient(c *parsedCard) *peer.Client {
	return peer.NewClient(peer.ClientConfig{Address: c.Address, Certificate: func() (*tls.Certificate, error) { return p.certificate, nil }, SPKI: c.PeerKey})
}

// pin is the key that may speak to our listener; none without a pairing.
func (p *peers) pin() []byte {
	if pair, _ := p.current(); pair != nil && !p.isSevered() {
		return pair.PeerKey
	}
	return nil
}

// sever cuts the line to the other campus in both directions, until it is called again; for drills.
func (p *peers) sever(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.severed = on
	p.tell()
}

func (p *peers) isSevered() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.severed
}

// current is the pairing, and what tells of its change.
func (p *peers) current() (*pairing, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pair, p.changed
}

// tell wakes those that wait for a change. The caller holds mu.
func (p *peers) tell() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// load takes over from the journal who the other campus is, and what was seen of its log.
func (p *peers) load(ctx context.Context) error {
	var pair *pairing
	err := p.a.journal.State(ctx, func(r audit.Record) error {
		var err error
		switch e := &r.Entry; {
		case e.Kind == kindPeering:
			pair, err = p.pairingOf(ctx, e)
		case e.Kind == kindPeerSplit && pair != nil:
			pair.split = splitText(e)
		}
		return err
	})
	if err != nil || pair == nil {
		return err
	}
	if err := p.loadHeads(ctx, pair); err != nil {
		return err
	}
	pair.heard = p.readHeard(ctx, pair)
	p.pair = pair
	return nil
}

// pairingOf is what an entry of kindPeering leaves; nil if that is none.
func (p *peers) pairingOf(ctx context.Context, e *audit.Entry) (*pairing, error) {
	if e.Text("act") != "add" {
		return nil, nil
	}
	file := peerCardFile{}
	var err error
	if file.Card, err = p.a.journal.Payload(ctx, e, "card"); err != nil {
		return nil, err
	}
	if file.Signature, err = p.a.journal.Payload(ctx, e, "card.signature"); err != nil {
		return nil, err
	}
	card, err := readPeerCard(file)
	if err != nil {
		return nil, fmt.Errorf("entry %d: the card: %w", e.Sequence, err)
	}
	return &pairing{parsedCard: card, since: e.Time.UTC()}, nil
}

// loadHeads finds the last checkpoint that was cosigned here, and the last of ours that was cosigned there.
func (p *peers) loadHeads(ctx context.Context, pair *pairing) error {
	j := p.a.journal
	n, rec, err := lastNumbered(ctx, j, kindPeerHead, pair.Node)
	if err != nil {
		return err
	}
	if pair.headCount = n; rec != nil {
		c, err := storedCheckpoint(ctx, j, &rec.Entry)
		if err != nil {
			return err
		}
		if c.Epoch == pair.epoch { // of an earlier life of that appliance nothing follows
			if pair.cosignature, err = storedCosignature(ctx, j, &rec.Entry); err != nil {
				return err
			}
			pair.seen, pair.cosigned = c, c
		}
	}
	if n, rec, err = lastNumbered(ctx, j, kindPeerSeen, pair.Node); err != nil {
		return err
	}
	if pair.seenCount = n; rec != nil {
		c, err := storedCheckpoint(ctx, j, &rec.Entry)
		if err != nil {
			return err
		}
		if c.Epoch == pair.epoch {
			pair.remembered = c.Size
			if pair.seen == nil || c.Size > pair.seen.Size {
				pair.seen = c
			}
		}
	}
	if n, rec, err = lastNumbered(ctx, j, kindPeerConfirmed, pair.Node); err != nil {
		return err
	}
	if pair.count = n; rec != nil {
		s, err := storedCosignature(ctx, j, &rec.Entry)
		if err != nil {
			return err
		}
		size, _ := rec.Entry.Field("size").(audit.Int)
		c, err := j.CheckpointFor(ctx, uint64(size)-1)
		if err == nil && bytes.Equal(c.Note, s.Note) {
			pair.confirmed, pair.known, pair.confirmedBy = c.Size, c.Size, rec.Entry.Time.UTC()
			j.SetCosigned(c, s)
		} else if err != nil && !errors.Is(err, audit.ErrNotFound) {
			return err
		}
	}
	return nil
}

// numbered is the reference of the n-th entry of a kind about a node.
func numbered(kind, node string, n uint64) []byte {
	sum := audit.Sum(binary.BigEndian.AppendUint64([]byte("yinjian/peer/numbered/v1\x00"+kind+"\x00"+node+"\x00"), n))
	return sum[:]
}

// lastNumbered answers how many entries of a kind about a node there are, and the last; nil if none. It asks O(log n) times.
func lastNumbered(ctx context.Context, j *audit.Journal, kind, node string) (uint64, *audit.Record, error) {
	var last *audit.Record
	there := func(n uint64) (bool, error) {
		found, err := j.ByRef(ctx, numbered(kind, node, n))
		if errors.Is(err, audit.ErrNotFound) {
			return false, nil
		}
		if err == nil {
			last = &found[0]
		}
		return err == nil, err
	}
	var low, high uint64 = 0, 1 // low are there; number high-1 is not, once the loop ends
	for {
		ok, err := there(high - 1)
		if err != nil {
			return 0, nil, err
		}
		if !ok {
			break
		}
		low, high = high, 2*high
	}
	for high--; low < high; {
		mid := (low + high) / 2
		ok, err := there(mid)
		if err != nil {
			return 0, nil, err
		}
		if ok {
			low = mid + 1
		} else {
			high = mid
		}
	}
	if low == 0 {
		return 0, nil, nil
	}
	_, err := there(low - 1)
	return low, last, err
}

func storedCheckpoint(ctx context.Context, j *audit.Journal, e *audit.Entry) (*audit.Checkpoint, error) {
	note, err := j.Payload(ctx, e, "checkpoint")
	if err != nil {
		return nil, err
	}
	sig, err := j.Payload(ctx, e, "checkpoint.signature")
	if err != nil {
		return nil, err
	}
	return audit.ParseCheckpoint(note, sig)
}

func storedCosignature(ctx context.Context, j *audit.Journal, e *audit.Entry) (*audit.Cosignature, error) {
	text, err := j.Payload(ctx, e, "cosigned")
	if err != nil {
		return nil, err
	}
	sig, err := j.Payload(ctx, e, "cosignature")
	if err != nil {
		return nil, err
	}
	return audit.ParseCosignature(text, sig)
}

// errPeerKnows refuses a start: our own signature, in the other campus's hands, is over more than we have, or over something
// else.
var errPeerKnows = errors.New("日志与另一院区见过的不符：日志可能被换成旧的，或被改写。保留现场；确认是恢复备份的，在设备目录建空文件 restored 后重启，将开启新纪元，并须重新结对 " +
	"(the journal does not agree with what the other campus has seen of it: it may have been put back to an older state or rewritten; keep everything as it is; " +
	"if a backup was restored on purpose, make an empty file named restored and start again, and pair anew)")

// checkOwnHead asks the other campus what it has seen of our log. One that does not answer keeps nobody from starting; one
// that lies cannot, for what counts is our own key's signature.
func (p *peers) checkOwnHead(ctx context.Context) error {
	pair := p.pair
	if pair == nil || pair.client == nil {
		return nil
	}
	asking, cancel := context.WithTimeout(ctx, peerStartLimit)
	defer cancel()
	seen, err := pair.client.Seen(asking)
	if err != nil {
		p.a.log.WithError(err).WithField("peer", pair.Node).Warning("the other campus could not be asked what it has seen of this journal")
		return nil
	}
	if seen.Checkpoint == nil {
		return nil
	}
	c, err := seen.Checkpoint.Checkpoint()
	if err == nil {
		err = audit.VerifyCheckpoint(p.a.logKey.Public(), c)
	}
	if err != nil || c.Node != p.a.cfg.Node {
		p.a.log.WithError(err).WithField("peer", pair.Node).Error("what the other campus says to have seen of this journal is not ours")
		return nil
	}
	j := p.a.journal
	if c.Epoch != j.Epoch() { // a restore was announced since
		return nil
	}
	if size := j.Size(); c.Size > size {
		return fmt.Errorf("%w: 日志有 %d 条，%s 见过 %d 条 (the journal has %d entries, %s has seen %d)", errPeerKnows, size, pair.Node, c.Size, size, pair.Node, c.Size)
	}
	root, err := j.Root(ctx, c.Size)
	if err != nil {
		return err
	}
	if root != c.Root {
		return fmt.Errorf("%w: 前 %d 条不是 %s 见过的 (the first %d entries are not those that %s has seen)", errPeerKnows, c.Size, pair.Node, c.Size, pair.Node)
	}
	return nil
}

// listen opens the listener, if it is configured.
func (p *peers) listen() (net.Listener, error) {
	if p.a.cfg.Listen.Peer == "" {
		return nil, nil
	}
	return peer.Listen(p.a.cfg.Listen.Peer, func() (*tls.Certificate, error) { return p.certificate, nil }, p.pin)
}

// serve answers the other campus until ctx ends.
func (p *peers) serve(ctx context.Context, ln net.Listener) error {
	return api.Serve(ctx, peer.NewServer(peerService{p}, p.pin, p.a.log), ln, time.Second) // a long poll is cut off; it is asked again
}

// run follows the other campus until ctx ends.
func (p *peers) run(ctx context.Context) error {
	if p.a.cfg.Listen.Peer == "" {
		return nil
	}
	for ctx.Err() == nil {
		pair, changed := p.current()
		p.a.journal.SetPrompt(pair != nil)
		if pair == nil || p.splitOf(pair) != "" || p.isSevered() {
			if pair != nil && p.isSevered() {
				p.note(pair, errDrilled)
			}
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		following, stop := context.WithCancel(ctx)
		var loops sync.WaitGroup
		loops.Go(func() { p.feedLoop(following, pair) })
		loops.Go(func() { p.confirmLoop(following, pair) })
		select {
		case <-changed:
		case <-ctx.Done():
		}
		stop()
		loops.Wait()
		pair.client.Close()
	}
	return nil
}

func (p *peers) splitOf(pair *pairing) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return pair.split
}

// note remembers how a request ended, and logs where that changes.
func (p *peers) note(pair *pairing, err error) {
	text := errorText(err)
	p.mu.Lock()
	before := pair.fault
	pair.fault = text
	p.mu.Unlock()
	log := p.a.log.WithFields(logrus.Fields{"peer": pair.Node, "address": pair.Address})
	switch {
	case err != nil && before == "":
		log.WithError(err).Warning("the other campus does not answer as it should; signing goes on")
	case err == nil && before != "":
		log.Info("the other campus answers again")
	}
}

// accuse remembers what the other campus has against our log. Nothing stops by it: whoever reads the state looks into it.
func (p *peers) accuse(pair *pairing, why string) {
	p.mu.Lock()
	before := p.accused
	p.accused = why
	p.mu.Unlock()
	if before == "" && why != "" {
		p.a.log.WithFields(logrus.Fields{"peer": pair.Node, "why": why}).Error("the other campus does not recognise this journal")
	}
}

// feedLoop keeps one long poll open and applies what comes.
func (p *peers) feedLoop(ctx context.Context, pair *pairing) {
	p.mu.Lock()
	pair.cursor = max(pair.cursor, p.a.directory.ForeignCursor(pair.Node, pair.epoch))
	p.mu.Unlock()
	pause := peerPause
	for ctx.Err() == nil {
		err := p.feedOnce(ctx, pair)
		if errors.Is(err, errHeadMoved) {
			continue
		}
		if ctx.Err() != nil {
			return
		}
		p.note(pair, err)
		if err == nil {
			pause = peerPause
			continue
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, peerPauseMost)
	}
}

// errHeadMoved means that the other log was followed further while an answer was under way; it is asked again.
var errHeadMoved = errors.New("appliance: a later checkpoint of the other log was seen meanwhile")

// feedOnce asks once. Nothing of an answer is believed before it is verified, and nothing is applied that is not in a tree
// which continues the one seen before.
func (p *peers) feedOnce(ctx context.Context, pair *pairing) error {
	p.mu.Lock()
	q := peer.Query{Epoch: pair.epoch, After: pair.cursor, Wait: peerWait}
	if pair.seen != nil {
		q.Size = pair.seen.Size
	}
	if pair.fault != "" || pair.heard.IsZero() { // how things stand is known sooner
		q.Wait = 0
	}
	p.mu.Unlock()
	f, err := pair.client.Feed(ctx, q)
	if err != nil {
		if peer.IsRefusal(err, peer.OlderHead) {
			p.stale(pair)
		}
		if peer.IsRefusal(err, peer.SplitView) {
			p.accuse(pair, "另一院区认为本机日志有两份历史 (the other campus has seen two histories of this journal)")
		}
		return err
	}
	answered := p.a.clock.Now()
	c, err := f.Checkpoint.Checkpoint()
	if err != nil {
		return err
	}
	proof, err := f.Proof()
	if err != nil {
		return err
	}
	entries, err := f.Foreign(pair.Node, pair.epoch, c)
	if err != nil {
		return err
	}
	if err := p.follow(ctx, pair, c, proof, q.Size); err != nil {
		return err
	}
	if f.Through < q.After && f.Through != c.Size || f.Through > c.Size {
		return fmt.Errorf("peer: an answer up to entry %d, asked from %d of %d", f.Through, q.After, c.Size)
	}
	cursor := q.After
	for _, e := range entries {
		if e.Record.Sequence < cursor || e.Record.Sequence >= f.Through {
			return fmt.Errorf("peer: entry %d is not in order", e.Record.Sequence)
		}
		if err := e.Verify(pair.logKey); err != nil {
			return err
		}
		if err := p.remember(ctx, pair, c); err != nil {
			return err
		}
		if err := p.a.directory.ApplyForeign(ctx, e); err != nil {
			return fmt.Errorf("applying entry %d of %s: %w", e.Record.Sequence, pair.Node, err)
		}
		cursor = e.Record.Sequence + 1
		p.mu.Lock()
		pair.cursor = cursor
		p.mu.Unlock()
	}
	p.mu.Lock()
	pair.cursor = max(cursor, f.Through)
	p.mu.Unlock()
	if f.Through == c.Size && answered.Trusted() {
		p.heardAll(ctx, pair, answered.Time)
	}
	return nil
}

// stale says that the other side has fewer entries than we have seen, where that is new.
func (p *peers) stale(pair *pairing) {
	p.mu.Lock()
	known := pair.fault != ""
	p.mu.Unlock()
	if known {
		return
	}
	p.a.log.WithField("peer", pair.Node).Error("the other campus's journal is older than what was seen of it: it may have been put back")
}

// follow takes a checkpoint of the other log, with a proof that begins at from. A log that shows two histories is followed
// no further, by an entry that a restart finds again.
func (p *peers) follow(ctx context.Context, pair *pairing, c *audit.Checkpoint, proof []audit.Hash, from uint64) error {
	p.heads.Lock()
	defer p.heads.Unlock()
	p.mu.Lock()
	seen := pair.seen
	p.mu.Unlock()
	if seen != nil && seen.Size != from {
		return errHeadMoved
	}
	return p.followed(ctx, pair, seen, c, proof)
}

// followed is follow from seen on. The caller holds heads.
func (p *peers) followed(ctx context.Context, pair *pairing, seen, c *audit.Checkpoint, proof []audit.Hash) error {
	err := audit.Follow(pair.logKey, pair.Node, pair.epoch, seen, c, proof)
	switch {
	case errors.Is(err, audit.ErrSplitView):
		return errors.Join(err, p.alarm(ctx, pair, seen, c))
	case errors.Is(err, audit.ErrOlderHead):
		p.stale(pair)
		return err
	case err != nil:
		return err
	}
	p.mu.Lock()
	pair.seen = c
	p.mu.Unlock()
	return nil
}

// remember journals the checkpoint that entries are taken under, unless the cosigned ones cover it: a peer that never asks
// for a cosignature could otherwise show another history after a restart.
func (p *peers) remember(ctx context.Context, pair *pairing, c *audit.Checkpoint) error {
	p.heads.Lock()
	defer p.heads.Unlock()
	p.mu.Lock()
	covered, n := pair.remembered >= c.Size || pair.cosigned != nil && pair.cosigned.Size >= c.Size, pair.seenCount
	p.mu.Unlock()
	if covered {
		return nil
	}
	_, err := p.a.journal.Append(ctx, audit.Draft{
		Kind: kindPeerSeen, Actor: "peer/" + pair.Node, Object: pair.Node, Ref: numbered(kindPeerSeen, pair.Node, n), Unique: true,
		Fields: []audit.Field{
			{Name: "epoch", Value: audit.Text(pair.Epoch)}, {Name: "root", Value: audit.Octets(c.Root[:])}, {Name: "size", Value: audit.Int(c.Size)},
		},
		Payloads: []audit.Attachment{
			{Name: "checkpoint", MediaType: "text/plain", Data: c.Note}, {Name: "checkpoint.signature", MediaType: foreignMediaType, Data: c.Signature},
		},
	})
	if err != nil && !errors.Is(err, audit.ErrDuplicateRef) { // that one: its answer was lost, and an earlier checkpoint is there
		return err
	}
	p.mu.Lock()
	pair.seenCount++
	if err == nil {
		pair.remembered = c.Size
	}
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("peer: what is seen of %s is written again: %w", pair.Node, err)
	}
	return nil
}

// alarm latches that the other log has two histories. From now on nothing of it is applied or cosigned, until the pairing is
// removed; what of its directory is here goes on until it is too old.
func (p *peers) alarm(ctx context.Context, pair *pairing, seen, c *audit.Checkpoint) error {
	r, err := p.a.journal.Append(context.WithoutCancel(ctx), audit.Draft{
		Kind: kindPeerSplit, Actor: "peer/" + pair.Node, Object: pair.Node, State: true,
		Fields: []audit.Field{
			{Name: "epoch", Value: audit.Text(pair.Epoch)}, {Name: "first.size", Value: audit.Int(seen.Size)}, {Name: "first.root", Value: audit.Octets(seen.Root[:])},
			{Name: "second.size", Value: audit.Int(c.Size)}, {Name: "second.root", Value: audit.Octets(c.Root[:])},
		},
		Payloads: []audit.Attachment{
			{Name: "first.checkpoint", MediaType: "text/plain", Data: seen.Note}, {Name: "first.signature", MediaType: foreignMediaType, Data: seen.Signature},
			{Name: "second.checkpoint", MediaType: "text/plain", Data: c.Note}, {Name: "second.signature", MediaType: foreignMediaType, Data: c.Signature},
		},
	})
	why := fmt.Sprintf("%d / %d", seen.Size, c.Size)
	if err == nil {
		why = splitText(&r.Entry)
	}
	p.a.log.WithFields(logrus.Fields{"peer": pair.Node, "seen": seen.Size, "shown": c.Size}).Error("split view: the other campus's log has two histories; nothing of it is taken any more")
	p.mu.Lock()
	defer p.mu.Unlock()
	if pair.split == "" {
		pair.split = why
		p.tell()
	}
	return err
}

func splitText(e *audit.Entry) string {
	first, _ := e.Field("first.size").(audit.Int)
	second, _ := e.Field("second.size").(audit.Int)
	return fmt.Sprintf("%s 的日志有两份历史：%d 条与 %d 条的检查点不相容，证据在本机日志第 %d 条 (its checkpoints of %d and %d entries contradict each other; the proof is entry %d of this journal)",
		e.Object, first, second, e.Sequence, first, second, e.Sequence)
}

// heardAll says that all of the other campus's directory was here at that time.
func (p *peers) heardAll(ctx context.Context, pair *pairing, at time.Time) {
	p.mu.Lock()
	before := pair.heard
	pair.heard = at
	p.mu.Unlock()
	p.a.directory.PeerCurrent(at)
	if at.Sub(before) < heardEvery {
		return
	}
	if err := p.writeHeard(ctx, pair, at); err != nil && ctx.Err() == nil {
		p.a.log.WithError(err).Warning("peer.heard could not be written: after a restart the copy of the other campus's directory would count as older than it is")
	}
}

// A heard is when the other campus was last heard, kept over a restart. Whoever could write it at will could keep a copy
// young that is old.
type heard struct {
	Node   string `json:"node"`
	Epoch  string `json:"epoch"`
	Micros int64  `json:"at_us"`
	MAC    []byte `json:"mac"`
}

func (h heard) authenticated() []byte {
	return fmt.Appendf(nil, "yinjian/peer/heard/v1\x00%s\x00%s\x00%d", h.Node, h.Epoch, h.Micros)
}

func (p *peers) heardFile() string { return filepath.Join(p.a.dir, "peer.heard") }

func (p *peers) writeHeard(ctx context.Context, pair *pairing, at time.Time) error {
	h := heard{Node: pair.Node, Epoch: pair.Epoch, Micros: at.UnixMicro()}
	var err error
	if h.MAC, err = (macKeys{p.a.tokens[hsm.Log]}).MAC(ctx, headLabel, h.authenticated()); err != nil {
		return err
	}
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return writeFile(p.heardFile(), b, 0o600)
}

// readHeard answers what writeHeard kept; the zero time if that is missing or not ours: then the copy counts from the
// pairing on.
func (p *peers) readHeard(ctx context.Context, pair *pairing) time.Time {
	b, err := os.ReadFile(p.heardFile())
	var h heard
	if err == nil {
		err = json.Unmarshal(b, &h)
	}
	if err != nil || h.Node != pair.Node || h.Epoch != pair.Epoch {
		return time.Time{}
	}
	want, err := (macKeys{p.a.tokens[hsm.Log]}).MAC(ctx, headLabel, h.authenticated())
	if err != nil || !bytes.Equal(want, h.MAC) {
		return time.Time{}
	}
	return time.UnixMicro(h.Micros).UTC()
}

// confirmLoop has our checkpoints cosigned.
func (p *peers) confirmLoop(ctx context.Context, pair *pairing) {
	tick := time.NewTicker(time.Duration(p.a.cfg.Peer.CosignEvery))
	defer tick.Stop()
	for {
		if err := p.confirmOnce(ctx, pair); err != nil && ctx.Err() == nil {
			p.a.log.WithError(err).WithField("peer", pair.Node).Debug("no cosignature")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// worth says whether the checkpoint has anything that the last cosigned one has not, beside our entries about cosignatures:
// two idle appliances would go on cosigning each other's for ever.
func (p *peers) worth(pair *pairing, size uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.notes = slices.DeleteFunc(p.notes, func(n uint64) bool { return n < pair.confirmed })
	own := uint64(0)
	for _, n := range p.notes {
		if n < size {
			own++
		}
	}
	return size > pair.confirmed+own
}

// confirmOnce asks for a cosignature of the last checkpoint, and journals it.
func (p *peers) confirmOnce(ctx context.Context, pair *pairing) error {
	j := p.a.journal
	c, err := j.LastCheckpoint()
	if err != nil || !p.worth(pair, c.Size) || j.SealedTo() < j.Size() {
		return err // an entry over an end that is not sealed could keep the next start from happening
	}
	var answer *peer.Cosigned
	for range 3 { // the other side may follow us by its own questions meanwhile
		p.mu.Lock()
		from := pair.known
		p.mu.Unlock()
		if c.Size < from {
			if c, err = j.WaitCheckpoint(ctx, from-1); err != nil {
				return err
			}
		}
		proof, perr := j.ConsistencyProof(ctx, from, c.Size)
		if from == 0 {
			proof, perr = nil, nil
		}
		if perr != nil {
			return perr
		}
		answer, err = pair.client.Cosign(ctx, &peer.CosignRequest{Checkpoint: peer.HeadOf(&c), From: from, Consistency: peer.Hashes(proof)})
		var refusal *peer.Refusal
		if !errors.As(err, &refusal) || refusal.Code != peer.Behind {
			break
		}
		if refusal.Size > j.Size() {
			p.accuse(pair, fmt.Sprintf("另一院区见过本机日志 %d 条，本机只有 %d 条：日志可能被换成旧的 (the other campus has seen more of this journal than there is: it may have been put back)", refusal.Size, j.Size()))
			return err
		}
		p.mu.Lock()
		pair.known = refusal.Size
		p.mu.Unlock()
	}
	switch {
	case peer.IsRefusal(err, peer.SplitView):
		p.accuse(pair, "另一院区认为本机日志有两份历史 (the other campus has seen two histories of this journal)")
		return err
	case peer.IsRefusal(err, peer.OlderHead):
		p.accuse(pair, "另一院区见过本机更长的日志：日志可能被换成旧的 (the other campus has seen a longer journal: it may have been put back)")
		return err
	case err != nil:
		return err
	}
	s, err := answer.Cosignature()
	if err != nil {
		return err
	}
	if err := audit.VerifyCosignature(pair.logKey, s); err != nil {
		return err
	}
	if s.Node != pair.Node || s.Epoch != pair.epoch || !bytes.Equal(s.Note, c.Note) {
		return fmt.Errorf("peer: a cosignature of %s, epoch %s, over another checkpoint or by another log", s.Node, s.Epoch)
	}
	r, err := j.Append(context.WithoutCancel(ctx), audit.Draft{
		Kind: kindPeerConfirmed, Actor: "peer/" + pair.Node, Object: pair.Node, Ref: numbered(kindPeerConfirmed, pair.Node, pair.count), Unique: true,
		Fields: []audit.Field{{Name: "size", Value: audit.Int(c.Size)}, {Name: "root", Value: audit.Octets(c.Root[:])}},
		Payloads: []audit.Attachment{
			{Name: "cosignature", MediaType: foreignMediaType, Data: s.Signature}, {Name: "cosigned", MediaType: "text/plain", Data: s.Text},
		},
	})
	if err != nil && !errors.Is(err, audit.ErrDuplicateRef) { // that one: its answer was lost
		return err
	}
	p.mu.Lock()
	pair.count++
	if err == nil {
		p.notes = append(p.notes, r.Sequence)
	}
	pair.confirmed, pair.known, pair.confirmedBy = c.Size, c.Size, p.a.clock.Now().Time
	p.accused = ""
	p.mu.Unlock()
	j.SetCosigned(c, s)
	return nil
}

// peerService is what the other campus asks.
type peerService struct{ p *peers }

// asked is the pairing that a request belongs to, which must be in order.
func (s peerService) asked() (*pairing, error) {
	pair, _ := s.p.current()
	if pair == nil {
		return nil, peer.Refuse(peer.NotPaired, "no pairing")
	}
	if s.p.splitOf(pair) != "" {
		return nil, peer.Refuse(peer.SplitView, "your log has two histories")
	}
	return pair, nil
}

var errEnough = errors.New("enough")

// Feed satisfies peer.Service.
func (s peerService) Feed(ctx context.Context, q peer.Query) (*peer.Feed, error) {
	pair, err := s.asked()
	if err != nil {
		return nil, err
	}
	j := s.p.a.journal
	if q.Epoch != j.Epoch() {
		return nil, peer.Refuse(peer.OtherEpoch, "this journal is in epoch %s: it was restored, and has to be paired anew", j.Epoch())
	}
	if size := j.Size(); q.Size > size {
		s.p.accuse(pair, fmt.Sprintf("另一院区见过本机日志 %d 条，本机只有 %d 条：日志可能被换成旧的 (the other campus has seen more of this journal than there is: it may have been put back)", q.Size, size))
		return nil, peer.Refuse(peer.OlderHead, "this journal has %d entries", size)
	}
	waiting, cancel := context.WithTimeout(ctx, q.Wait)
	defer cancel()
	scanned := q.After // entries of the directory below are known to be none
	for {
		// What is counted is read before what is looked through, so that nothing falls between.
		changed, end := j.Changed(), j.Size()
		var found []uint64
		err := j.Changes(ctx, scanned, end, func(r audit.Record) error {
			if account.Concerns(&r.Entry, pair.Node, pair.epoch) {
				found = append(found, r.Sequence)
			}
			if len(found) == peer.MaxEntries {
				return errEnough
			}
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return nil, err
		}
		if len(found) > 0 {
			// All of them in one answer, and the checkpoint must cover the last.
			c, err := j.WaitCheckpoint(ctx, found[len(found)-1])
			if err != nil {
				return nil, err
			}
			return s.answer(ctx, q, c, found, end)
		}
		scanned = max(scanned, end)
		if _, err := j.WaitChange(waiting, changed); err != nil {
			break
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	c, err := j.LastCheckpoint()
	if errors.Is(err, audit.ErrNotFound) {
		return nil, peer.Refuse(peer.Unable, "no checkpoint yet")
	}
	if err != nil {
		return nil, err
	}
	return s.answer(ctx, q, c, nil, scanned)
}

// answer makes the feed of these entries under c. Before looked there are no others.
func (s peerService) answer(ctx context.Context, q peer.Query, c audit.Checkpoint, found []uint64, looked uint64) (*peer.Feed, error) {
	j := s.p.a.journal
	f := &peer.Feed{Checkpoint: peer.HeadOf(&c), Consistency: [][]byte{}, Entries: []peer.Entry{}, Through: min(looked, c.Size)}
	if q.Size > c.Size { // seen under a checkpoint that was lost with the power, whose tree is here
		return nil, peer.Refuse(peer.Unable, "no checkpoint over %d entries yet", q.Size)
	}
	if q.Size > 0 {
		proof, err := j.ConsistencyProof(ctx, q.Size, c.Size)
		if err != nil {
			return nil, err
		}
		f.Consistency = peer.Hashes(proof)
	}
	if len(found) == peer.MaxEntries {
		f.Through = found[len(found)-1] + 1
	}
	for _, seq := range found {
		if f.Full() {
			f.Through = seq
			break
		}
		foreign, err := j.Foreign(ctx, seq, c)
		if err != nil {
			return nil, err
		}
		f.Entries = append(f.Entries, peer.EntryOf(foreign))
	}
	return f, nil
}

// Cosign satisfies peer.Service. What is cosigned is in the journal before the cosignature leaves.
func (s peerService) Cosign(ctx context.Context, r *peer.CosignRequest) (*peer.Cosigned, error) {
	p := s.p
	pair, err := s.asked()
	if err != nil {
		return nil, err
	}
	c, err := r.Checkpoint.Checkpoint()
	if err != nil {
		return nil, peer.Refuse(peer.Malformed, "the checkpoint: %v", err)
	}
	proof, err := r.Proof()
	if err != nil {
		return nil, peer.Refuse(peer.Malformed, "the proof: %v", err)
	}
	if c.Node == pair.Node && c.Epoch != pair.epoch {
		return nil, peer.Refuse(peer.OtherEpoch, "epoch %s is the one that was agreed on", pair.Epoch)
	}
	p.heads.Lock()
	defer p.heads.Unlock()
	p.mu.Lock()
	seen, last, word := pair.seen, pair.cosigned, pair.cosignature
	p.mu.Unlock()
	if err := audit.VerifyCheckpoint(pair.logKey, c); err != nil || c.Node != pair.Node {
		return nil, peer.Refuse(peer.Malformed, "the checkpoint is not by your log's key")
	}
	if seen != nil && r.From != seen.Size {
		refusal := peer.Refuse(peer.Behind, "%d entries of your log were seen", seen.Size)
		refusal.Size = seen.Size
		return nil, refusal
	}
	switch err := p.followed(ctx, pair, seen, c, proof); {
	case errors.Is(err, audit.ErrSplitView):
		return nil, peer.Refuse(peer.SplitView, "your log has two histories: of %d and of %d entries", seen.Size, c.Size)
	case errors.Is(err, audit.ErrOlderHead):
		return nil, peer.Refuse(peer.OlderHead, "%d entries of your log were seen", seen.Size)
	case err != nil:
		return nil, err
	}
	if last != nil && bytes.Equal(last.Note, c.Note) { // the answer was lost
		return &peer.Cosigned{Text: word.Text, Signature: word.Signature}, nil
	}
	// Each costs a signature and an entry here; the other side asks once in its peer.cosign_every, a second at least.
	now := time.Now() // interval
	if now.Sub(pair.cosignedAt) < cosignPause {
		return nil, peer.Refuse(peer.Busy, "a checkpoint was cosigned less than %v ago", cosignPause)
	}
	pair.cosignedAt = now
	return p.cosign(ctx, pair, c)
}

// cosign signs and journals. The caller holds heads.
func (p *peers) cosign(ctx context.Context, pair *pairing, c *audit.Checkpoint) (*peer.Cosigned, error) {
	j := p.a.journal
	now := p.a.clock.Now()
	if !now.Trusted() {
		return nil, peer.Refuse(peer.Unable, "time is not trusted here")
	}
	if j.SealedTo() < j.Size() { // an entry over an end that is not sealed could keep the next start from happening
		return nil, peer.Refuse(peer.Unable, "the journal's end is not sealed")
	}
	word := &audit.Cosignature{Node: p.a.cfg.Node, Epoch: j.Epoch(), Campus: p.a.cfg.Campus, Time: now.Time.UnixMicro(), Note: c.Note}
	if err := word.Cosign(ctx, p.a.logKey); err != nil {
		if word.Signature != nil {
			p.a.accounting.discard(err, word.Signature)
		}
		return nil, err
	}
	r, err := j.Append(context.WithoutCancel(ctx), audit.Draft{
		Kind: kindPeerHead, Actor: "peer/" + pair.Node, Object: pair.Node, Ref: numbered(kindPeerHead, pair.Node, pair.headCount), Unique: true,
		Fields: []audit.Field{
			{Name: "epoch", Value: audit.Text(pair.Epoch)}, {Name: "root", Value: audit.Octets(c.Root[:])}, {Name: "size", Value: audit.Int(c.Size)},
		},
		Payloads: []audit.Attachment{
			{Name: "checkpoint", MediaType: "text/plain", Data: c.Note}, {Name: "checkpoint.signature", MediaType: foreignMediaType, Data: c.Signature},
			{Name: "cosignature", MediaType: "application/octet-stream", Data: word.Signature}, {Name: "cosigned", MediaType: "text/plain", Data: word.Text},
		},
	})
	if err != nil {
		p.a.accounting.discard(err, word.Signature)
		if errors.Is(err, audit.ErrDuplicateRef) { // an earlier one was written, and its answer lost
			err = errors.Join(err, p.reload(ctx, pair))
		}
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	pair.headCount++
	pair.cosigned, pair.cosignature = c, word
	p.notes = append(p.notes, r.Sequence)
	return &peer.Cosigned{Text: word.Text, Signature: word.Signature}, nil
}

// reload counts the numbered entries again.
func (p *peers) reload(ctx context.Context, pair *pairing) error {
	n, _, err := lastNumbered(ctx, p.a.journal, kindPeerHead, pair.Node)
	if err == nil {
		p.mu.Lock()
		pair.headCount = n
		p.mu.Unlock()
	}
	return err
}

// Seen satisfies peer.Service.
func (s peerService) Seen(context.Context) (*peer.Seen, error) {
	pair, _ := s.p.current()
	if pair == nil {
		return nil, peer.Refuse(peer.NotPaired, "no pairing")
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	out := &peer.Seen{}
	if pair.seen != nil {
		h := peer.HeadOf(pair.seen)
		out.Checkpoint = &h
	}
	if pair.cosignature != nil {
		out.Cosigned = &peer.Cosigned{Text: pair.cosignature.Text, Signature: pair.cosignature.Signature}
	}
	return out, nil
}

// add pairs with the appliance of a card that two persons have compared over the telephone.
func (p *peers) add(ctx context.Context, actor string, file []byte, fingerprint, reason string, persons []string) error {
	p.acts.Lock()
	defer p.acts.Unlock()
	a := p.a
	if a.cfg.Listen.Peer == "" {
		return noPeerListener()
	}
	card, err := parsePeerCard(file)
	if err != nil {
		return problem.Invalid("card", "不是结对卡，或已损坏 (not a peer card, or damaged): %v", err)
	}
	if got := PeerCardFingerprint(card.bytes); !sameFingerprint(got, fingerprint) {
		return problem.Invalid("fingerprint", "与结对卡不符；请对端院区重新念一遍其 yinjian peer card 显示的指纹，仍不符则卡已被换 (not the card's: have the other campus read its own again; if it still differs, the card was exchanged)")
	}
	if card.Node == a.cfg.Node || bytes.Equal(card.LogKey, a.identity.LogKey) || bytes.Equal(card.PeerKey, p.spki) {
		return problem.Invalid("card", "这是本机自己的卡，或与本机同名；请在对端院区执行 yinjian peer card (the card of this appliance, or of one of its name: make it at the other campus)")
	}
	old, _ := p.current()
	if old != nil && old.Node != card.Node {
		return problem.New(problem.Exists, fmt.Sprintf("已与 %s 结对 (paired with another appliance already)", old.Node), "先 yinjian peer remove (remove that pairing first)")
	}
	// Own objects against its own: what either has got from the other since is no conflict.
	own, err := a.createdHere(ctx)
	if err != nil {
		return err
	}
	var both []string
	for _, o := range own {
		if _, ok := slices.BinarySearch(card.Objects, o); ok {
			both = append(both, o)
		}
	}
	if len(both) > 0 {
		shown := strings.Join(both[:min(len(both), 10)], "、")
		return problem.New(problem.Exists, fmt.Sprintf("两院区都登记了相同的标识，共 %d 个：%s (registered at both campuses: %d)", len(both), shown, len(both)),
			"标识在两院区必须唯一：一方改用其他标识重新登记，从未用过的目录可换新设备目录 (ids must be unique over both campuses)")
	}
	r, err := a.journal.Append(ctx, audit.Draft{
		Kind: kindPeering, Actor: actor, Object: card.Node, State: true,
		Fields: []audit.Field{
			{Name: "act", Value: audit.Text("add")}, {Name: "address", Value: audit.Text(card.Address)}, {Name: "campus", Value: audit.Text(card.Campus)},
			{Name: "epoch", Value: audit.Text(card.Epoch)}, {Name: "fingerprint", Value: audit.Text(PeerCardFingerprint(card.bytes))},
			{Name: "persons", Value: audit.Text(strings.Join(persons, "、"))}, {Name: "reason", Value: audit.Text(reason)},
		},
		Payloads: []audit.Attachment{
			{Name: "card", MediaType: "text/vnd.yinjian.peer-card", Data: card.bytes}, {Name: "card.signature", MediaType: foreignMediaType, Data: cardSignature(file)},
		},
	})
	if err != nil {
		return journalRefused(err)
	}
	pair := &pairing{parsedCard: card, since: r.Entry.Time.UTC(), client: p.newClient(card)}
	if err := p.loadHeads(ctx, pair); err != nil {
		return err
	}
	if err := p.directoryPair(pair); err != nil {
		return err
	}
	p.mu.Lock()
	p.pair, p.accused = pair, ""
	p.tell()
	p.mu.Unlock()
	if err := a.exportPublic(); err != nil { // for verifiers; the next start writes it
		a.log.WithError(err).Warning("peer-log.pem could not be written")
	}
	return nil
}

// cardSignature is the signature in a card's file that was parsed before.
func cardSignature(file []byte) []byte {
	var f peerCardFile
	_ = json.Unmarshal(file, &f) // parsePeerCard has read it
	return f.Signature
}

func noPeerListener() error {
	return problem.New(problem.NotReady, "没有配置 listen.peer (listen.peer is not configured)", "在 config.toml 中写明 listen.peer 与 peer.address，重启后再试，见 docs/two-campuses.md (configure it and restart)")
}

// remove ends the pairing: nothing of the other campus is taken, and nothing is told to it.
func (p *peers) remove(ctx context.Context, actor, reason string, persons []string) error {
	p.acts.Lock()
	defer p.acts.Unlock()
	pair, _ := p.current()
	if pair == nil {
		return problem.New(problem.NotFound, "没有结对 (there is no pairing)", "见 yinjian peer status (see yinjian peer status)")
	}
	changed, err := audit.Changed(map[string]string{"node": pair.Node, "epoch": pair.Epoch}, nil)
	if err != nil {
		return err
	}
	_, err = p.a.journal.Append(ctx, audit.Draft{
		Kind: kindPeering, Actor: actor, Object: pair.Node, State: true,
		Fields: append(changed,
			audit.Field{Name: "act", Value: audit.Text("remove")}, audit.Field{Name: "epoch", Value: audit.Text(pair.Epoch)},
			audit.Field{Name: "persons", Value: audit.Text(strings.Join(persons, "、"))}, audit.Field{Name: "reason", Value: audit.Text(reason)},
		),
	})
	if err != nil {
		return journalRefused(err)
	}
	if err := p.directoryPair(nil); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pair, p.accused = nil, ""
	p.tell()
	return nil
}

// directoryPair tells the directory who the other campus is; nil: nobody. The configuration has no say in it: whom the other
// campus has stopped would be signed for again, and what is changed here alone would contradict what is decided there.
func (p *peers) directoryPair(pair *pairing) error {
	if pair == nil {
		return p.a.directory.Pair(nil)
	}
	if p.a.cfg.Listen.Peer == "" && !isOpen(p.a.cfg.Listen.API) { // a drill: what was taken over before rests on the CAs, nothing waits
		return p.a.directory.Pair(&account.Pairing{Node: pair.Node, Since: pair.since, CAs: pair.CAs})
	}
	p.mu.Lock()
	heard := pair.heard
	p.mu.Unlock()
	err := p.a.directory.Pair(&account.Pairing{
		Node: pair.Node, Centre: p.a.centre(), Since: pair.since, MaxAge: time.Duration(p.a.cfg.Peer.MaxAge), CAs: pair.CAs,
	})
	if err == nil && !heard.IsZero() {
		p.a.directory.PeerCurrent(heard)
	}
	return err
}

// replay tells the directory of a pairing when the entry that made it is replayed: the entries of the other campus come after
// it.
func (p *peers) replay(ctx context.Context, e *audit.Entry) error {
	if e.Kind != kindPeering {
		return nil
	}
	pair, err := p.pairingOf(ctx, e)
	if err == nil && pair != nil && p.pair != nil && pair.since.Equal(p.pair.since) {
		pair = p.pair // which knows when it was heard
	}
	if err == nil {
		err = p.directoryPair(pair)
	}
	return err
}
