package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"yinjian/appliance/pack"
	"yinjian/iso/layout"
)

// A parcel is what the installer leaves for the first start from the disk, at the beginning of the empty slot B: no file
// system has to be written for it, and it is gone with its first sector. While it is there, the data volume does not count:
// a first start that was cut off begins anew.
type parcel struct {
	Answers   Answers `json:"answers"`
	Appliance []byte  `json:"appliance,omitempty"` // answers.toml as it was
	Hospital  []byte  `json:"hospital,omitempty"`  // hospital.pem as it was
	// Packs lie behind it on the disk, each from a block's beginning.
	Packs []packed `json:"packs,omitempty"`

	packs []*io.SectionReader // their bytes, in the same order
	keys  pack.Keys           // the installer judges them by
}

// On the disk: magic | length of the text, 4 bytes, big-endian | SHA-256 of the text | text, JSON | zeros to a block's end.
var parcelMagic = []byte("YINJIAN FIRST START\n")

const maxParcel = 1 << 20

// errNoParcel is what a disk has whose first start is over.
var errNoParcel = errors.New("no answers are waiting")

func (p *parcel) encode() ([]byte, error) {
	text, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(text)
	b := append(bytes.Clone(parcelMagic), binary.BigEndian.AppendUint32(nil, uint32(len(text)))...)
	b = append(append(b, sum[:]...), text...)
	if len(b) > maxParcel {
		return nil, fmt.Errorf("the answers have %d bytes", len(text))
	}
	return append(b, make([]byte, (layout.BlockSize-len(b)%layout.BlockSize)%layout.BlockSize)...), nil
}

// readParcel reads what encode wrote. Torn or absent is the same: [errNoParcel].
func readParcel(r io.Reader) (*parcel, error) {
	head := make([]byte, len(parcelMagic)+4+sha256.Size)
	if _, err := io.ReadFull(r, head); err != nil || !bytes.HasPrefix(head, parcelMagic) {
		return nil, errNoParcel
	}
	n := binary.BigEndian.Uint32(head[len(parcelMagic):])
	if n > maxParcel {
		return nil, errNoParcel
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(r, text); err != nil {
		return nil, errNoParcel
	}
	if sum := sha256.Sum256(text); !bytes.Equal(sum[:], head[len(parcelMagic)+4:]) {
		return nil, errNoParcel
	}
	p := new(parcel)
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(p); err != nil {
		return nil, fmt.Errorf("answers for the first start: %w", err)
	}
	return p, errors.Join(p.Answers.check(), p.checkPacks())
}
