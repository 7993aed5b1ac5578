package ers

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/tsa"
)

// Tags of the module of RFC 4998, whose tags are implicit.
const (
	tagAlgorithm = der.Tag(0xa0) // digestAlgorithm
	tagTree      = der.Tag(0xa2) // reducedHashtree
	tagOther0    = der.Tag(0xa0) // cryptoInfos
	tagOther1    = der.Tag(0xa1) // encryptionInfo; attributes
)

// Bounds of what is read. A tree over 2^40 leaves has 40 lists; yearly renewals over a century are a hundred timestamps.
const (
	MaxRecord = 48 << 20 // bytes: each token may carry revocation lists

	maxChains     = 32
	maxTimestamps = 512 // of all chains
	maxLists      = 64
	maxHashes     = 4096 // of one list
)

// Bytes encodes the record in DER. A parsed one comes out as it went in.
func (r *Record) Bytes() ([]byte, error) {
	if r.raw != nil {
		return r.raw, nil
	}
	if len(r.Chains) == 0 {
		return nil, fmt.Errorf("ers: a record without a timestamp: %w", ErrMalformed)
	}
	var used []Algorithm
	for _, chain := range r.Chains {
		if a := chain[0].Algorithm; !slices.Contains(used, a) {
			used = append(used, a)
		}
	}
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, a := range used {
				b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(a.OID()) })
			}
		})
		b.AddBytes(encodeSequence(r.Chains))
	})
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("ers: %w", err)
	}
	// What leaves is read again: nobody else may refuse what was made here.
	if _, err := Parse(out); err != nil {
		return nil, err
	}
	return out, nil
}

// encodeSequence is the DER of an ArchiveTimeStampSequence, which later chains cover.
func encodeSequence(chains []Chain) []byte {
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		for _, chain := range chains {
			b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
				for _, t := range chain {
					b.AddBytes(t.raw)
				}
			})
		}
	})
	return b.BytesOrPanic() // parts that were encoded before
}

func (t *Timestamp) encode() ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(tagAlgorithm, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(t.Algorithm.OID()) })
		if t.Tree != nil {
			b.AddASN1(tagTree, func(b *cryptobyte.Builder) {
				for _, list := range t.Tree {
					b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
						for _, h := range list {
							b.AddASN1OctetString(h)
						}
					})
				}
			})
		}
		b.AddBytes(t.Token.DER)
	})
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("ers: %w", err)
	}
	return out, nil
}

// Parse reads the DER of an EvidenceRecord. Its tokens are parsed, too; nothing is verified. Errors wrap [ErrMalformed] or
// [ErrUnsupported], or are package tsa's.
func Parse(in []byte) (*Record, error) {
	r, err := parse(bytes.Clone(in)) // the fields are slices of it
	if err != nil {
		return nil, fmt.Errorf("ers: evidence record: %w", err)
	}
	return r, nil
}

func parse(in []byte) (*Record, error) {
	if len(in) > MaxRecord {
		return nil, fmt.Errorf("%d bytes, at most %d are read: %w", len(in), MaxRecord, ErrUnsupported)
	}
	s := cryptobyte.String(in)
	var body, digests, sequence cryptobyte.String
	var version int64
	if !s.ReadASN1(&body, der.SEQUENCE) || !s.Empty() || !body.ReadASN1Integer(&version) {
		return nil, ErrMalformed
	}
	if version != 1 {
		return nil, fmt.Errorf("version %d: %w", version, ErrUnsupported)
	}
	if !body.ReadASN1(&digests, der.SEQUENCE) {
		return nil, fmt.Errorf("digestAlgorithms: %w", ErrMalformed)
	}
	if body.PeekASN1Tag(tagOther0) || body.PeekASN1Tag(tagOther1) {
		return nil, fmt.Errorf("cryptoInfos or encryptionInfo: %w", ErrUnsupported)
	}
	if !body.ReadASN1(&sequence, der.SEQUENCE) || !body.Empty() || sequence.Empty() {
		return nil, fmt.Errorf("archiveTimeStampSequence: %w", ErrMalformed)
	}
	r := &Record{raw: in}
	timestamps := 0
	var used []Algorithm
	for !sequence.Empty() {
		var list cryptobyte.String
		if !sequence.ReadASN1(&list, der.SEQUENCE) || list.Empty() {
			return nil, fmt.Errorf("chain %d: %w", len(r.Chains)+1, ErrMalformed)
		}
		var chain Chain
		for !list.Empty() {
			var element cryptobyte.String
			if timestamps++; timestamps > maxTimestamps || len(r.Chains) >= maxChains {
				return nil, fmt.Errorf("more than %d timestamps or %d chains: %w", maxTimestamps, maxChains, ErrUnsupported)
			}
			if !list.ReadASN1Element(&element, der.SEQUENCE) {
				return nil, fmt.Errorf("timestamp %d: %w", timestamps, ErrMalformed)
			}
			t, err := parseTimestamp(element)
			if err != nil {
				return nil, fmt.Errorf("timestamp %d: %w", timestamps, err)
			}
			chain = append(chain, t)
			if t.Algorithm != chain[0].Algorithm { // RFC 4998 §5.1: one algorithm a chain
				return nil, fmt.Errorf("timestamp %d: %s in a chain of %s: %w", timestamps, t.Algorithm, chain[0].Algorithm, ErrMalformed)
			}
		}
		r.Chains = append(r.Chains, chain)
		if a := chain[0].Algorithm; !slices.Contains(used, a) {
			used = append(used, a)
		}
	}
	var listed []Algorithm
	for !digests.Empty() {
		a, err := readAlgorithm(&digests, der.SEQUENCE)
		if err != nil {
			return nil, fmt.Errorf("digestAlgorithms: %w", err)
		}
		listed = append(listed, a)
	}
	slices.Sort(listed)
	slices.Sort(used)
	if !slices.Equal(listed, used) {
		return nil, fmt.Errorf("digestAlgorithms %v, used are %v: %w", listed, used, ErrMalformed)
	}
	return r, nil
}

func parseTimestamp(element cryptobyte.String) (*Timestamp, error) {
	t := &Timestamp{raw: element}
	var body cryptobyte.String
	if !element.ReadASN1(&body, der.SEQUENCE) {
		return nil, ErrMalformed
	}
	var err error
	if body.PeekASN1Tag(tagAlgorithm) {
		if t.Algorithm, err = readAlgorithm(&body, tagAlgorithm); err != nil {
			return nil, fmt.Errorf("digestAlgorithm: %w", err)
		}
	}
	if body.PeekASN1Tag(tagOther1) {
		return nil, fmt.Errorf("attributes: %w", ErrUnsupported)
	}
	if body.PeekASN1Tag(tagTree) {
		var tree cryptobyte.String
		if !body.ReadASN1(&tree, tagTree) || tree.Empty() {
			return nil, fmt.Errorf("reducedHashtree: %w", ErrMalformed)
		}
		for !tree.Empty() {
			list, err := readList(&tree)
			if err != nil || len(t.Tree) >= maxLists {
				return nil, fmt.Errorf("reducedHashtree, list %d: %w", len(t.Tree)+1, ErrMalformed)
			}
			t.Tree = append(t.Tree, list)
		}
	}
	if t.Token, err = tsa.ParseToken(body); err != nil {
		return nil, err
	}
	if t.Algorithm == "" { // RFC 4998 §4.1: that of the timestamp
		if t.Algorithm, err = algorithmOf(t.Token.Imprint.Algorithm); err != nil {
			return nil, err
		}
	}
	size := len(t.Algorithm.Sum())
	for _, list := range t.Tree {
		for _, h := range list {
			if len(h) != size {
				return nil, fmt.Errorf("reducedHashtree: a hash of %d bytes, %s has %d: %w", len(h), t.Algorithm, size, ErrMalformed)
			}
		}
	}
	return t, nil
}

func readList(s *cryptobyte.String) ([][]byte, error) {
	var body cryptobyte.String
	if !s.ReadASN1(&body, der.SEQUENCE) || body.Empty() {
		return nil, ErrMalformed
	}
	var list [][]byte
	for !body.Empty() {
		var h cryptobyte.String
		if !body.ReadASN1(&h, der.OCTET_STRING) || len(list) >= maxHashes {
			return nil, ErrMalformed
		}
		list = append(list, h)
	}
	if !slices.IsSortedFunc(list, bytes.Compare) { // RFC 4998 §4.2: arranged in binary ascending order
		return nil, ErrMalformed
	}
	return list, nil
}

// readAlgorithm takes an AlgorithmIdentifier off s; parameters are absent or NULL.
func readAlgorithm(s *cryptobyte.String, tag der.Tag) (Algorithm, error) {
	var body cryptobyte.String
	var oid asn1.ObjectIdentifier
	if !s.ReadASN1(&body, tag) || !body.ReadASN1ObjectIdentifier(&oid) {
		return "", ErrMalformed
	}
	if !body.Empty() && !bytes.Equal(body, []byte{5, 0}) {
		return "", fmt.Errorf("parameters of %v: %w", oid, ErrMalformed)
	}
	return algorithmOf(oid)
}
