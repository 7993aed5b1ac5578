package appliance

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"time"

	"yinjian/appliance/audit"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/sqlite"
	"yinjian/tsa"
	"yinjian/tsa/stf"

	"github.com/sirupsen/logrus"
)

// What tests of this package reach from outside.

type (
	HandshakeKey     = handshakeKey
	ListenerIdentity = listenerIdentity
)

var (
	LastNumbered    = lastNumbered
	Numbered        = numbered
	SameFingerprint = sameFingerprint
	NewHandshakeKey = newHandshakeKey
	ErrHandshakes   = errHandshakes
)

// HoursEnd answers at which of the looks an hour of the ledger ends that began at the first.
func HoursEnd(boots []time.Duration, nows []time.Time) (ends []int) {
	h := hourly{due: boots[0] + ledgerEvery}
	for i := range boots {
		if h.ended(boots[i], nows[i]) {
			ends = append(ends, i)
		}
	}
	return ends
}

// NewListenerIdentity is one with a key in the cipher machine.
func NewListenerIdentity(slot *HandshakeKey) *ListenerIdentity { return &listenerIdentity{slot: slot} }

func (l *listenerIdentity) Use(chain [][]byte) error { return l.use(chain) }
func (l *listenerIdentity) Warnings() []string       { return l.warnings() }

// Known asks a journal about a token.
func Known(ctx context.Context, j *audit.Journal, t *tsa.Token) (*stf.Known, error) {
	a := &Appliance{journal: j, cfg: new(Config)}
	a.cfg.Time.Accuracy = Duration(time.Second)
	return tokens{a}.Known(ctx, t)
}

// Stamping is a service over a journal: stop stops a unit, recorder journals its tokens.
func Stamping(j *audit.Journal) (stop func(ctx context.Context, unit string) error, recorder func(unit string) tsa.Recorder) {
	s := newStampService(&Appliance{journal: j, cfg: &Config{Node: "benbu-1"}})
	stop = func(ctx context.Context, unit string) error {
		return s.decide(ctx, "os:root", "stop", "年检", []string{unit})
	}
	return stop, func(unit string) tsa.Recorder { return gatedRecorder{s, TokenRecorder{j, unit}} }
}

// ParsePeerCard answers the card in a file.
func ParsePeerCard(file []byte) (*PeerCard, error) {
	c, err := parsePeerCard(file)
	if err != nil {
		return nil, err
	}
	return &c.PeerCard, nil
}

// PeerCardFile is the file of a card's bytes and their signature.
func PeerCardFile(card, signature []byte) ([]byte, error) {
	f := peerCardFile{card, signature}
	return f.encode()
}

// Duplicates is the projection that marks records that are at both campuses.
func Duplicates(store *central.Store, paired func() bool) audit.Projection {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return &duplicates{Store: store, paired: paired, log: log}
}

// DrillSegment runs the drill of an assessment on a journal. Without flip nothing is changed in the copy, and a flip of the third
// entry is claimed.
func DrillSegment(ctx context.Context, store *sqlite.Journal, dir string, flip bool) error {
	c := &collection{ctx: ctx, a: &Appliance{store: store, dir: dir}}
	change := flipEntry
	if !flip {
		change = func(string, []audit.Row) (uint64, error) { return 3, nil }
	}
	_, err := c.drillSegment(change)
	return err
}

// NotEvidenced says whether an item of an assessment with this error is not evidenced, rather than failed.
func NotEvidenced(err error) bool {
	var none missing
	return errors.As(err, &none)
}

// SealedImage is the line in a report's head, and why the host does not count as sealed.
func SealedImage(root fs.FS) (string, error) {
	s, err := readSealed(root)
	if err != nil {
		return "", notSealed(err)
	}
	return s.String(), s.shown()
}
