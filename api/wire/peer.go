package wire

// PeerStatus is the answer of GET /admin/v1/peer.
type PeerStatus struct {
	Listen   string   `json:"listen"` // address of the peer listener; "" when off
	Paired   bool     `json:"paired"`
	Peer     any      `json:"peer"` // null without a pairing
	Warnings []string `json:"warnings"`
}

// PeerCard is the body of POST /admin/v1/peer/card: this appliance's card for the other campus.
type PeerCard struct{}

// PeerCardFile is its answer.
type PeerCardFile struct {
	File        []byte `json:"file"`
	Fingerprint string `json:"fingerprint"` // to be read over the telephone
}

// AddPeer is the body of POST /admin/v1/peer: the other campus is the appliance of this card.
type AddPeer struct {
	Card        []byte   `json:"card"`        // the file that it wrote
	Fingerprint string   `json:"fingerprint"` // as its administrators read it out; 32 hexadecimal digits, grouped at will
	Persons     []string `json:"persons"`     // two, who compared it; 1–64 bytes each
	Reason      string   `json:"reason"`      // 1–256 bytes
}

// RemovePeer is the body of POST /admin/v1/peer/remove.
type RemovePeer struct {
	Persons []string `json:"persons"` // two; 1–64 bytes each
	Reason  string   `json:"reason"`  // 1–256 bytes
}
