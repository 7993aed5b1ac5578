package backup

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"yinjian/appliance/custody"
)

// PurposeBackup is what the custodians' shares are of: the private half of their pair.
const PurposeBackup = "backup"

// Custodians are those whom backups are sealed to. It holds no secret.
type Custodians struct {
	Version int    `json:"version"`
	Name    string `json:"name"` // of the set, printed on the shares
	At      string `json:"at"`   // RFC 3339, by the machine's clock
	custody.Holders
	Point   []byte   `json:"point"`   // SM2, uncompressed
	Present []string `json:"present"` // who attended
}

// NewCustodians draws a pair and shares its private half. The caller wipes the shares.
func NewCustodians(name, at string, holders []string, threshold int, present []string) (*Custodians, []custody.Share, error) {
	seed, point := custody.NewPair()
	defer clear(seed)
	shares, commitments, err := custody.Split(seed, PurposeBackup, name, holders, threshold)
	if err != nil {
		return nil, nil, err
	}
	c := &Custodians{
		Version: 1, Name: name, At: at, Point: point, Present: present,
		Holders: custody.Holders{Threshold: threshold, Names: holders, Commitments: commitments},
	}
	return c, shares, nil
}

// ParseCustodians reads what [Custodians] marshal to.
func ParseCustodians(b []byte) (*Custodians, error) {
	c := new(Custodians)
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	err := dec.Decode(c)
	switch {
	case err == nil && dec.More():
		err = errors.New("more follows")
	case err == nil && c.Version != 1:
		err = fmt.Errorf("version %d", c.Version)
	case err == nil && (c.Threshold < 2 || c.Threshold > len(c.Names) || len(c.Names) > custody.MaxHolders || len(c.Commitments) != c.Threshold):
		err = fmt.Errorf("%d of %d", c.Threshold, len(c.Names))
	}
	if err != nil {
		return nil, fmt.Errorf("不是备份保管人的记录 (not a record of custodians): %w", err)
	}
	return c, nil
}

// Set names the shares that go together.
func (c *Custodians) Set() string { return c.Commitments.Set() }

// Key is the fingerprint of what backups are sealed to. That it is the key of the shares, nobody can tell without them.
func (c *Custodians) Key() string { return custody.Fingerprint(c.Point) }

// Seed restores the custodians' secret from shares, for a backup of that set. The caller wipes it.
func Seed(shares []custody.Share, h *Header) ([]byte, error) {
	for i := range shares {
		if s := &shares[i]; s.Purpose == PurposeBackup && s.Set != h.Set {
			return nil, fmt.Errorf("%s 的份额属于套号 %s，备份 %s 封给套号 %s (a share of another ceremony: the backup is sealed to that set)", s.Holder, s.Set, h.ID, h.Set)
		}
	}
	return custody.Combine(shares, PurposeBackup)
}
