package appliance

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
)

// A PeerCard is what one appliance tells the other campus's administrators about itself, once, at pairing.
type PeerCard struct {
	Format   string   `json:"format"`
	Node     string   `json:"node"`
	Campus   string   `json:"campus"`
	Epoch    string   `json:"epoch"`   // of its journal, 16 hexadecimal digits
	LogKey   []byte   `json:"log_key"` // SubjectPublicKeyInfo of the key that signs its checkpoints, DER
	PeerKey  []byte   `json:"peer_key"`
	Address  string   `json:"address"` // host:port of its peer listener, as the other campus reaches it
	CAs      [][]byte `json:"cas"`     // certificates of its evaluation CAs, DER
	Objects  []string `json:"objects"` // applications, signers and administrators that it registered: "application his", sorted
	IssuedAt string   `json:"issued_at"`
}

const (
	peerCardFormat = "yinjian-peer-card/1"
	peerCardDomain = "yinjian/peer/card/v1\x00"
	maxPeerCard    = 8 << 20
)

// A peerCardFile is the card's file: the card as it was signed, and the log key's SM2 signature over the domain and it.
type peerCardFile struct {
	Card      []byte `json:"card"`
	Signature []byte `json:"signature"`
}

func (f *peerCardFile) encode() ([]byte, error) {
	b, err := json.MarshalIndent(f, "", "  ")
	return append(b, '\n'), err
}

// PeerCardFingerprint is what two people compare over the telephone: the first 128 bits of SM3 over the card, as hexadecimal
// digits in groups of four.
func PeerCardFingerprint(card []byte) string {
	sum := audit.Sum(card)
	digits := hex.EncodeToString(sum[:16])
	var groups []string
	for ; digits != ""; digits = digits[4:] {
		groups = append(groups, digits[:4])
	}
	return strings.Join(groups, " ")
}

// sameFingerprint compares what somebody typed: groups and capitals are free.
func sameFingerprint(a, b string) bool {
	plain := func(s string) string {
		return strings.ToLower(strings.NewReplacer(" ", "", "-", "", ":", "").Replace(s))
	}
	return plain(a) == plain(b)
}

// A parsedCard is a card whose signature and parts were looked at.
type parsedCard struct {
	PeerCard
	bytes  []byte
	logKey *ecdsa.PublicKey
	epoch  audit.Epoch
}

// parsePeerCard reads a card's file. That the card is by the log key that it names proves nothing but that whoever made it
// has that key: the fingerprint is what it is believed for.
func parsePeerCard(file []byte) (*parsedCard, error) {
	var f peerCardFile
	if len(file) > maxPeerCard {
		return nil, errors.New("too large")
	}
	if err := strictJSON(file, &f); err != nil {
		return nil, err
	}
	return readPeerCard(f)
}

func readPeerCard(f peerCardFile) (*parsedCard, error) {
	c := &parsedCard{bytes: f.Card}
	if err := strictJSON(f.Card, &c.PeerCard); err != nil {
		return nil, err
	}
	if c.Format != peerCardFormat {
		return nil, fmt.Errorf("format %q", c.Format)
	}
	var err error
	if c.epoch, err = audit.ParseEpoch(c.Epoch); err != nil {
		return nil, err
	}
	key, err := smx509.ParsePKIXPublicKey(c.LogKey)
	if err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	log, ok := key.(*ecdsa.PublicKey)
	if !ok || !sm2.IsSM2PublicKey(log) {
		return nil, errors.New("log key: not an SM2 key")
	}
	c.logKey = log
	if !sm2.VerifyASN1WithSM2(log, nil, append([]byte(peerCardDomain), f.Card...), f.Signature) {
		return nil, errors.New("the signature does not verify")
	}
	if _, err := smx509.ParsePKIXPublicKey(c.PeerKey); err != nil {
		return nil, fmt.Errorf("peer key: %w", err)
	}
	if host, port, err := net.SplitHostPort(c.Address); err != nil || host == "" || port == "" {
		return nil, fmt.Errorf("address %q", c.Address)
	}
	if !reNode.MatchString(c.Node) || c.Campus == "" || len(c.Campus) > 64 {
		return nil, errors.New("node or campus")
	}
	for _, der := range c.CAs {
		if _, err := pki.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("CA: %w", err)
		}
	}
	return c, nil
}

func strictJSON(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if d.More() {
		return errors.New("more after it")
	}
	return nil
}

// card makes this appliance's card and journals its signature.
func (p *peers) card(ctx context.Context, actor string) (*peerCardFile, error) {
	a := p.a
	objects, err := a.createdHere(ctx)
	if err != nil {
		return nil, err
	}
	card := PeerCard{
		Format: peerCardFormat, Node: a.cfg.Node, Campus: a.cfg.Campus, Epoch: a.journal.Epoch().String(), LogKey: a.identity.LogKey,
		PeerKey: p.spki, Address: a.cfg.Peer.Address, Objects: objects, IssuedAt: a.clock.Now().Time.UTC().Format(time.RFC3339), CAs: [][]byte{},
	}
	for _, alg := range slices.Sorted(maps.Keys(a.identity.CAs)) {
		card.CAs = append(card.CAs, a.identity.CAs[alg])
	}
	f := &peerCardFile{}
	if f.Card, err = json.Marshal(card); err != nil {
		return nil, err
	}
	if f.Signature, err = a.logKey.SignMessage(ctx, append([]byte(peerCardDomain), f.Card...)); err != nil {
		return nil, err
	}
	_, err = a.journal.Append(ctx, audit.Draft{
		Kind: kindPeerCard, Actor: actor, Object: a.cfg.Node, Fields: []audit.Field{{Name: "fingerprint", Value: audit.Text(PeerCardFingerprint(f.Card))}},
		Payloads: []audit.Attachment{
			{Name: "card", MediaType: "application/json", Data: f.Card}, {Name: "card.signature", MediaType: "application/octet-stream", Data: f.Signature},
		},
	})
	if err != nil {
		a.accounting.discard(err, f.Signature)
		return nil, journalRefused(err)
	}
	return f, nil
}

// createdHere are the applications, signers and administrators that this appliance registered, as cards name them, sorted. What the other
// campus registered and this one changed is not among them.
func (a *Appliance) createdHere(ctx context.Context) ([]string, error) {
	out := []string{}
	err := a.journal.State(ctx, func(r audit.Record) error {
		e := &r.Entry
		switch {
		case e.Kind == "account.application/outcome" && e.Text("act") == "register":
			out = append(out, "application "+e.Object)
		case e.Kind == "account.signer/outcome" && e.Text("act") == "enrol":
			out = append(out, "signer "+e.Object)
		case e.Kind == "account.administrator/outcome" && (e.Text("act") == "add" || e.Text("act") == "bootstrap"):
			out = append(out, "administrator "+e.Object)
		}
		return nil
	})
	slices.Sort(out)
	return slices.Compact(out), err
}
