package appliance

import (
	"context"
	"fmt"
	"io"
	"time"

	"yinjian/api"
	"yinjian/api/wire"
)

// A peerState is what /health/state and `yinjian peer status` say of the other campus.
type peerState struct {
	Node        string `json:"node"`
	Campus      string `json:"campus"`
	Epoch       string `json:"epoch"`
	Address     string `json:"address"`
	Fingerprint string `json:"fingerprint"` // of the card that was agreed on
	Since       string `json:"since"`       // RFC 3339
	Up          bool   `json:"up"`          // it answered the last question
	// Heard is when all of its directory was last known to be here; AgeS how long that is, -1 while time is not trusted.
	Heard  string  `json:"heard,omitempty"`
	AgeS   float64 `json:"age_s"`
	MaxS   float64 `json:"max_age_s"`
	Seen   uint64  `json:"seen_entries"`      // of its log, verified
	Given  uint64  `json:"cosigned_entries"`  // of its log, cosigned here
	Gotten uint64  `json:"confirmed_entries"` // of our log, cosigned there
	GotAt  string  `json:"confirmed_at,omitempty"`
	Next   uint64  `json:"applied_entries"` // its log's entries below are applied
	Split  string  `json:"split,omitempty"`
	// Accused is what the other campus has against our own log.
	Accused string `json:"accused,omitempty"`
	Error   string `json:"last_error,omitempty"`
}

// state is nil without a pairing.
func (p *peers) state() *peerState {
	now, copied := p.a.clock.Now(), p.a.directory.State().Heard
	p.mu.Lock()
	defer p.mu.Unlock()
	pair := p.pair
	if pair == nil {
		return nil
	}
	s := &peerState{
		Node: pair.Node, Campus: pair.Campus, Epoch: pair.Epoch, Address: pair.Address, Fingerprint: PeerCardFingerprint(pair.bytes),
		Since: pair.since.Format(time.RFC3339), AgeS: -1, MaxS: time.Duration(p.a.cfg.Peer.MaxAge).Seconds(),
		Gotten: pair.confirmed, Next: pair.cursor, Split: pair.split, Accused: p.accused, Error: pair.fault,
	}
	s.Up = pair.fault == "" && pair.split == "" && !pair.heard.IsZero()
	heard := pair.since
	if copied != nil { // before it was paired with anew
		heard = *copied
	}
	if !pair.heard.IsZero() {
		heard = pair.heard
		s.Heard = heard.UTC().Format(time.RFC3339Nano)
	}
	if now.Trusted() {
		s.AgeS = max(0, now.Time.Sub(heard).Seconds())
	}
	if pair.seen != nil {
		s.Seen = pair.seen.Size
	}
	if pair.cosigned != nil {
		s.Given = pair.cosigned.Size
	}
	if !pair.confirmedBy.IsZero() {
		s.GotAt = pair.confirmedBy.UTC().Format(time.RFC3339)
	}
	return s
}

// warnings are what somebody should look at.
func (s *peerState) warnings() []string {
	if s == nil {
		return nil
	}
	var out []string
	if s.Split != "" {
		out = append(out, "分叉视图告警：不再采用该院区的目录，不再为其见证；保留两边现场，查明后移除结对、换卡重结 "+
			"(SPLIT VIEW: nothing of the other campus is taken or cosigned any more; keep both as they are, find out, remove the pairing and pair anew): "+s.Split)
	}
	if s.Accused != "" {
		out = append(out, "日志告警：另一院区不认可本机日志 (the other campus does not recognise this journal): "+s.Accused)
	}
	switch {
	case s.AgeS > s.MaxS:
		out = append(out, fmt.Sprintf("另一院区的目录已 %.0f s 未更新，超过 peer.max_age，拒绝签名 (the copy of the other campus's directory is older than peer.max_age: signing is refused)", s.AgeS))
	case !s.Up:
		out = append(out, fmt.Sprintf("另一院区 %s 不可达，目录副本已 %.0f s；签名照常，目录变更须待恢复 (the other campus is not reached; signing goes on): %s", s.Node, max(0, s.AgeS), s.Error))
	}
	return out
}

// metrics writes the other campus's part of /metrics.
func (p *peers) metrics(w io.Writer) {
	s := p.state()
	if s == nil {
		return
	}
	flag := func(v bool) float64 {
		if v {
			return 1
		}
		return 0
	}
	for _, m := range []struct {
		name, help string
		value      float64
	}{
		{"up", "Whether the other campus answered the last question.", flag(s.Up)},
		{"copy_age_seconds", "Age of the copy of the other campus's directory; -1: time is not trusted.", s.AgeS},
		{"copy_max_age_seconds", "Age beyond which signing is refused.", s.MaxS},
		{"seen_entries", "Entries of the other campus's journal that were seen.", float64(s.Seen)},
		{"cosigned_entries", "Entries of the other campus's journal that were cosigned here.", float64(s.Given)},
		{"confirmed_entries", "Entries of this journal that the other campus has cosigned.", float64(s.Gotten)},
		{"split", "Whether the other campus's log has shown two histories.", flag(s.Split != "")},
		{"accused", "Whether the other campus does not recognise this journal.", flag(s.Accused != "")},
	} {
		fmt.Fprintf(w, "# HELP yinjian_peer_%s %s\n# TYPE yinjian_peer_%s gauge\nyinjian_peer_%s{peer=%q} %v\n", m.name, m.help, m.name, m.name, s.Node, m.value)
	}
}

// A peerCardAnswer is the answer to the request for a card.
type peerCardAnswer struct {
	File        []byte `json:"file"`
	Fingerprint string `json:"fingerprint"`
}

func (d admin) PeerCard(ctx context.Context, actor string, _ api.PeerCard) (any, error) {
	if d.a.cfg.Listen.Peer == "" {
		return nil, noPeerListener()
	}
	f, err := d.a.peers.card(ctx, actor)
	if err != nil {
		return nil, err
	}
	file, err := f.encode()
	if err != nil {
		return nil, err
	}
	return peerCardAnswer{File: file, Fingerprint: PeerCardFingerprint(f.Card)}, nil
}

func (d admin) AddPeer(ctx context.Context, actor string, req api.AddPeer) (any, error) {
	if err := d.a.peers.add(ctx, actor, req.Card, req.Fingerprint, req.Reason, req.Persons); err != nil {
		return nil, err
	}
	return d.PeerStatus(ctx, actor)
}

func (d admin) RemovePeer(ctx context.Context, actor string, req api.RemovePeer) (any, error) {
	if err := d.a.peers.remove(ctx, actor, req.Reason, req.Persons); err != nil {
		return nil, err
	}
	return d.PeerStatus(ctx, actor)
}

func (d admin) PeerStatus(context.Context, string) (any, error) {
	s := d.a.peers.state()
	return wire.PeerStatus{Listen: d.a.peerAddr, Paired: s != nil, Peer: s, Warnings: append([]string{}, s.warnings()...)}, nil
}
