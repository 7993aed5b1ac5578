package layout

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/emmansun/gmsm/sm3"
)

// BlockSize is that of data and of hash tree, in bytes.
const BlockSize = 4096

// MaxBlocks bounds the data of a root: 4 GiB, far above any budget, far below what a count could overflow.
const MaxBlocks = 1 << 20

// ErrChanged means that a root is not the one that its hash names.
var ErrChanged = errors.New("layout: the root's bytes are not those that its root hash names")

// A Root is what has to be known, from elsewhere than the disk, to check a root's every block: what dm-verity's table
// takes. The slot holds DataBlocks blocks of squashfs, one block with the superblock, then the tree.
type Root struct {
	Hash       []byte // the root hash
	Algorithm  string // sha256 or sm3, as the kernel calls them
	DataBlocks uint64
	Salt       []byte
}

// digest makes the named hash, or nil when it is none of ours.
func digest(name string) func() hash.Hash {
	switch name {
	case "sha256":
		return sha256.New
	case "sm3":
		return sm3.New
	}
	return nil
}

// Validate says whether init could act on the values.
func (r Root) Validate() error {
	switch h := digest(r.Algorithm); {
	case h == nil:
		return fmt.Errorf("layout: hash %q is neither sha256 nor sm3", r.Algorithm)
	case len(r.Hash) != h().Size():
		return fmt.Errorf("layout: a root hash of %d bytes is no %s", len(r.Hash), r.Algorithm)
	case r.DataBlocks == 0 || r.DataBlocks > MaxBlocks:
		return fmt.Errorf("layout: %d data blocks", r.DataBlocks)
	case len(r.Salt) == 0 || len(r.Salt) > 256: // the superblock has room for 256
		return fmt.Errorf("layout: a salt of %d bytes", len(r.Salt))
	}
	return nil
}

// PartitionUUID is that of the partition which holds the root: the first 128 bits of its hash, written as the
// Discoverable Partitions Specification says, most significant byte first.
func (r Root) PartitionUUID() GUID { return GUID(r.Hash[:16]) }

// HashStart is the block at which the tree begins: behind data and superblock.
func (r Root) HashStart() uint64 { return r.DataBlocks + 1 }

// Blocks counts those of data, superblock and tree: the length of the image.
func (r Root) Blocks() uint64 {
	n := r.HashStart()
	for level := r.DataBlocks; level > 1; {
		level = (level + perBlock - 1) / perBlock
		n += level
	}
	return n
}

// Table is the parameters of the kernel's verity target (Documentation/admin-guide/device-mapper/verity.rst) with both
// on device. A block that is not what the tree says is an error for whoever reads it or, with restart, restarts the
// machine: nothing runs on after that.
func (r Root) Table(device string, restart bool) string {
	table := fmt.Sprintf("1 %s %s %d %d %d %d %s %x %x",
		device, device, BlockSize, BlockSize, r.DataBlocks, r.HashStart(), r.Algorithm, r.Hash, r.Salt)
	if restart {
		table += " 1 restart_on_corruption"
	}
	return table
}

// perBlock is how many digests a block of the tree holds: both hashes have 32 bytes.
const perBlock = BlockSize / sha256.Size

// Superblock is the first sector of the block behind the data, as veritysetup writes it (struct verity_sb of
// cryptsetup's lib/verity/verity.c), padded to a block. Nothing of ours reads it: see [Root]. It is there for
// veritysetup, and [Check] holds every byte of it.
func (r Root) Superblock() []byte {
	b := make([]byte, BlockSize)
	copy(b, "verity\x00\x00")
	le := binary.LittleEndian
	le.PutUint32(b[8:], 1)  // version of the superblock
	le.PutUint32(b[12:], 1) // hash type: the salt stands before the block
	uuid := sha256.Sum256(r.Salt)
	copy(b[16:32], uuid[:16]) // any; from the salt, so that two builds agree
	copy(b[32:64], r.Algorithm)
	le.PutUint32(b[64:], BlockSize)
	le.PutUint32(b[68:], BlockSize)
	le.PutUint64(b[72:], r.DataBlocks)
	le.PutUint16(b[80:], uint16(len(r.Salt)))
	copy(b[88:344], r.Salt)
	return b
}

// A Tree makes the hash tree over data that is written to it: whole blocks, however cut into calls. Not safe for
// concurrent use.
type Tree struct {
	algorithm string
	salt      []byte
	hash      hash.Hash
	leaves    []byte // digests of the whole blocks so far
	rest      []byte // the beginning of a block
}

// NewTree starts one with a hash (sha256 or sm3) and a salt.
func NewTree(algorithm string, salt []byte) (*Tree, error) {
	h := digest(algorithm)
	if h == nil {
		return nil, fmt.Errorf("layout: hash %q is neither sha256 nor sm3", algorithm)
	}
	return &Tree{algorithm: algorithm, salt: bytes.Clone(salt), hash: h()}, nil
}

// Write takes more of the data. It does not fail.
func (t *Tree) Write(p []byte) (int, error) {
	n := len(p)
	if len(t.rest) > 0 {
		take := min(BlockSize-len(t.rest), len(p))
		t.rest, p = append(t.rest, p[:take]...), p[take:]
		if len(t.rest) == BlockSize {
			t.leaves = t.digest(t.leaves, t.rest)
			t.rest = t.rest[:0]
		}
	}
	for len(p) >= BlockSize {
		t.leaves, p = t.digest(t.leaves, p[:BlockSize]), p[BlockSize:]
	}
	t.rest = append(t.rest, p...)
	return n, nil
}

func (t *Tree) digest(to, block []byte) []byte {
	t.hash.Reset()
	t.hash.Write(t.salt)
	t.hash.Write(block)
	return t.hash.Sum(to)
}

// Sum returns the root of what was written, and superblock and tree as they stand behind it in a slot. It is an error
// when the data does not end at a block's end.
func (t *Tree) Sum() (Root, []byte, error) {
	r := Root{Algorithm: t.algorithm, DataBlocks: uint64(len(t.leaves) / sha256.Size), Salt: t.salt}
	if len(t.rest) != 0 || r.DataBlocks == 0 {
		return Root{}, nil, errors.New("layout: the data is not made of whole blocks")
	}
	// From the leaves up; the level with a single block is the top, and its digest the root hash.
	var levels [][]byte
	digests := t.leaves
	for len(digests) > sha256.Size {
		level := bytes.Clone(digests)
		if over := len(level) % BlockSize; over != 0 {
			level = append(level, make([]byte, BlockSize-over)...)
		}
		levels = append(levels, level)
		digests = nil
		for at := 0; at < len(level); at += BlockSize {
			digests = t.digest(digests, level[at:at+BlockSize])
		}
	}
	r.Hash = digests
	behind := r.Superblock()
	for i := len(levels) - 1; i >= 0; i-- { // on disk the top stands first
		behind = append(behind, levels[i]...)
	}
	return r, behind, r.Validate()
}

// Check reads an image of r, data, superblock and tree, and compares every byte with what r names: [ErrChanged] when
// one differs or the image is too short. What stands behind the image is not read.
func Check(image io.Reader, r Root) error {
	if err := r.Validate(); err != nil {
		return err
	}
	t, err := NewTree(r.Algorithm, r.Salt)
	if err != nil {
		return err
	}
	if _, err := io.CopyN(t, image, int64(r.DataBlocks)*BlockSize); err != nil {
		return short(err)
	}
	got, behind, err := t.Sum()
	if err != nil {
		return err
	}
	if !bytes.Equal(got.Hash, r.Hash) {
		return ErrChanged
	}
	have := make([]byte, len(behind))
	if _, err := io.ReadFull(image, have); err != nil {
		return short(err)
	}
	if !bytes.Equal(have, behind) {
		return ErrChanged
	}
	return nil
}

func short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends early", ErrChanged)
	}
	return fmt.Errorf("layout: reading the root: %w", err)
}
