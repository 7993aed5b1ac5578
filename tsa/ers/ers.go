// Package ers reads and writes evidence records: archive timestamps that renew one another, so that what was stamped once
// stays provable when the certificate, the signature algorithm or the digest of the first token no longer count.
//
// It implements RFC 4998 with SM3, SHA-256, SHA-384 and SHA-512. Records with cryptoInfos, encryptionInfo or attributes
// are refused: nothing here would look at them. The encoding is DER in both directions, and what [Parse] has read comes
// out as it went in.
//
// [Record.Check] answers whether the trees lead from the data to what each token stamps, and from each token to the next.
// Whether a token is genuine, and whether it was renewed while its certificate stood, is for who has anchors and
// revocation lists: package appliance/evidence.
package ers

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"errors"
	"fmt"
	"hash"
	"slices"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/cms"
	"yinjian/tsa"
)

// An Algorithm is a digest algorithm of hash trees, by the name that people read.
type Algorithm string

// The algorithms.
const (
	SM3    Algorithm = "SM3"
	SHA256 Algorithm = "SHA-256"
	SHA384 Algorithm = "SHA-384"
	SHA512 Algorithm = "SHA-512"
)

var algorithms = []struct {
	name Algorithm
	oid  asn1.ObjectIdentifier
	new  func() hash.Hash
}{
	{SM3, cms.OIDSM3, sm3.New},
	{SHA256, cms.OIDSHA256, sha256.New},
	{SHA384, cms.OIDSHA384, sha512.New384},
	{SHA512, cms.OIDSHA512, sha512.New},
}

// Known reports whether a is one of the algorithms.
func (a Algorithm) Known() bool { return a.OID() != nil }

// OID is the algorithm's object identifier, nil for one that is not known.
func (a Algorithm) OID() asn1.ObjectIdentifier {
	for _, k := range algorithms {
		if k.name == a {
			return k.oid
		}
	}
	return nil
}

func algorithmOf(oid asn1.ObjectIdentifier) (Algorithm, error) {
	for _, k := range algorithms {
		if k.oid.Equal(oid) {
			return k.name, nil
		}
	}
	return "", fmt.Errorf("digest algorithm %v: %w", oid, ErrUnsupported)
}

// Sum is the digest of the parts, one after the other. It panics for an algorithm that is not known.
func (a Algorithm) Sum(parts ...[]byte) []byte {
	for _, k := range algorithms {
		if k.name == a {
			h := k.new()
			for _, p := range parts {
				h.Write(p)
			}
			return h.Sum(nil)
		}
	}
	panic("ers: unknown digest algorithm " + string(a))
}

// sorted is the digest of hashes in binary ascending order (RFC 4998 §4.2). The caller's slice is not changed.
func (a Algorithm) sorted(hashes [][]byte) []byte {
	hashes = slices.Clone(hashes)
	slices.SortFunc(hashes, bytes.Compare)
	return a.Sum(hashes...)
}

// What Parse and Check refuse with; test with errors.Is.
var (
	// ErrMalformed means bytes that are not the DER of an EvidenceRecord.
	ErrMalformed = errors.New("malformed")
	// ErrUnsupported means an algorithm or a part of RFC 4998 that this package does not know.
	ErrUnsupported = errors.New("unsupported")
	// ErrNotCovered means that the tree does not begin with what the timestamp has to cover.
	ErrNotCovered = errors.New("the hash tree does not begin with what it should cover")
	// ErrImprint means that the tree does not end in what the token stamps.
	ErrImprint = errors.New("the hash tree does not lead to what the token stamps")
	// ErrOrder means that a timestamp is earlier than the one before it.
	ErrOrder = errors.New("earlier than the archive timestamp before it")
)

// A Timestamp is an ArchiveTimeStamp (RFC 4998 §4.1). It is not changed once it is made.
type Timestamp struct {
	Algorithm Algorithm // of the tree
	// Tree is the reducedHashtree: lists of hashes, from what is covered up to the root. nil: the token stamps what is
	// covered itself.
	Tree  [][][]byte
	Token *tsa.Token

	raw []byte
}

// A Chain is an ArchiveTimeStampChain: each timestamp but the first covers the token before it, and all have one
// algorithm.
type Chain []*Timestamp

// A Record is an EvidenceRecord (RFC 4998 §3.1). Each chain but the first covers the data and all chains before it. The
// zero value is an empty one, which cannot be encoded.
type Record struct {
	Chains []Chain

	raw []byte // of a parsed one; its digestAlgorithms may be in any order
}

// NewTimestamp puts a token and the tree that leads to it together. That they fit is for [Record.Check].
func NewTimestamp(a Algorithm, tree [][][]byte, token []byte) (*Timestamp, error) {
	if !a.Known() {
		return nil, fmt.Errorf("ers: digest algorithm %q: %w", a, ErrUnsupported)
	}
	parsed, err := tsa.ParseToken(token)
	if err != nil {
		return nil, fmt.Errorf("ers: %w", err)
	}
	t := &Timestamp{Algorithm: a, Tree: tree, Token: parsed}
	t.raw, err = t.encode()
	return t, err
}

// Renewed is r with t at the end of its last chain (RFC 4998 §5.2, timestamp renewal). r stays as it is.
func (r *Record) Renewed(t *Timestamp) *Record {
	chains := slices.Clone(r.Chains)
	last := len(chains) - 1
	chains[last] = append(slices.Clone(chains[last]), t)
	return &Record{Chains: chains}
}

// Rehashed is r with a new chain that begins with t (hash-tree renewal); of an empty record, its first. r stays as it is.
func (r *Record) Rehashed(t *Timestamp) *Record {
	return &Record{Chains: append(slices.Clone(r.Chains), Chain{t})}
}

// Timestamps are all of them, in order.
func (r *Record) Timestamps() []*Timestamp { return slices.Concat(r.Chains...) }

// Last is the newest timestamp.
func (r *Record) Last() *Timestamp {
	chain := r.Chains[len(r.Chains)-1]
	return chain[len(chain)-1]
}

// MemberHashes are the hashes of a group's members as the first timestamp of the chain with that number has them (0: the
// first): by algorithm a, in later chains together with all that came before (RFC 4998 §5.2). Equal members count once.
func (r *Record) MemberHashes(chain int, a Algorithm, members ...[]byte) [][]byte {
	hashes := make([][]byte, len(members))
	for i, m := range members {
		hashes[i] = a.Sum(m)
	}
	if chain > 0 {
		before := a.Sum(encodeSequence(r.Chains[:chain]))
		for i, h := range hashes {
			hashes[i] = a.Sum(h, before)
		}
	}
	return Set(hashes)
}

// Set sorts hashes and takes out what is there twice.
func Set(hashes [][]byte) [][]byte {
	hashes = slices.Clone(hashes)
	slices.SortFunc(hashes, bytes.Compare)
	return slices.CompactFunc(hashes, bytes.Equal)
}

// Group is the leaf of a data group: the digest of its members' hashes, in order; that hash itself for one member.
func Group(a Algorithm, hashes [][]byte) []byte {
	if len(hashes) == 1 {
		return hashes[0]
	}
	return a.sorted(hashes)
}

// Check holds every timestamp against what it has to cover: the first of each chain against the members of the data
// group, whole or, of one member alone, wherever it stands in the first list; each other one against the token before it
// (RFC 4998 §5.3). There is one answer for each of [Record.Timestamps], nil where the tree holds and the time is not
// earlier than the one before.
func (r *Record) Check(members ...[]byte) []error {
	var out []error
	var before *Timestamp
	for i, chain := range r.Chains {
		for j, t := range chain {
			hashes := r.MemberHashes(i, t.Algorithm, members...)
			if j > 0 {
				hashes = [][]byte{t.Algorithm.Sum(before.Token.DER)}
			}
			err := t.covers(hashes)
			if err == nil && before != nil && t.Token.GenTime.Before(before.Token.GenTime) {
				err = ErrOrder
			}
			out = append(out, err)
			before = t
		}
	}
	return out
}

// covers is RFC 4998 §4.3.
func (t *Timestamp) covers(hashes [][]byte) error {
	root := Group(t.Algorithm, hashes)
	if t.Tree != nil {
		first := Set(t.Tree[0])
		whole := slices.EqualFunc(first, hashes, bytes.Equal)
		one := len(hashes) == 1 && slices.ContainsFunc(first, func(h []byte) bool { return bytes.Equal(h, hashes[0]) })
		if !whole && !one {
			return ErrNotCovered
		}
		// A first list of one value is not hashed by itself: RFC 6283 §3.1.1 says so of the same structure, and Bouncy
		// Castle writes and reads it like that.
		root = Group(t.Algorithm, t.Tree[0])
		for _, list := range t.Tree[1:] {
			root = t.Algorithm.sorted(append(slices.Clone(list), root))
		}
	}
	want, err := tsa.NewImprint(t.Algorithm.OID(), root)
	if err != nil || !t.Token.Imprint.Equal(want) {
		return ErrImprint
	}
	return nil
}

// A Tree is a binary hash tree over leaves, in their order. A node without a sibling goes up as it is. 32 bytes a hash are
// held for each leaf and as many for the nodes.
type Tree struct {
	algorithm Algorithm
	levels    [][][]byte
}

// NewTree makes one; there must be a leaf.
func NewTree(a Algorithm, leaves [][]byte) *Tree {
	t := &Tree{a, [][][]byte{leaves}}
	for len(leaves) > 1 {
		next := make([][]byte, 0, (len(leaves)+1)/2)
		for i := 0; i < len(leaves); i += 2 {
			if i+1 == len(leaves) {
				next = append(next, leaves[i])
			} else {
				next = append(next, a.sorted(leaves[i:i+2]))
			}
		}
		t.levels, leaves = append(t.levels, next), next
	}
	return t
}

// Root is what a token has to stamp.
func (t *Tree) Root() []byte { return t.levels[len(t.levels)-1][0] }

// Path are the siblings of leaf i, from its own up.
func (t *Tree) Path(i int) [][]byte {
	var out [][]byte
	for _, level := range t.levels[:len(t.levels)-1] {
		if i^1 < len(level) {
			out = append(out, level[i^1])
		}
		i /= 2
	}
	return out
}

// Reduce is the reducedHashtree of a leaf: hashes are its members, as [Group] takes them, path are its siblings. It is nil
// where there is nothing to reduce: one hash alone.
func Reduce(hashes, path [][]byte) [][][]byte {
	if len(hashes) == 1 {
		if len(path) == 0 {
			return nil
		}
		hashes, path = append(slices.Clone(hashes), path[0]), path[1:] // they have one father (RFC 4998 §4.2)
	}
	first := slices.Clone(hashes)
	slices.SortFunc(first, bytes.Compare)
	tree := [][][]byte{first}
	for _, h := range path {
		tree = append(tree, [][]byte{h})
	}
	return tree
}
