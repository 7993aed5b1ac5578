package audit

import (
	"context"
	"crypto/hmac"
	"encoding/hex"
	"fmt"
	"math/big"

	"github.com/emmansun/gmsm/sm3"
)

// A SetRoot sums up the rows that one node keeps in a table whose rows have MACs of their own: how many they are and the
// sum of their MACs, under a MAC and with a version that only grows. A row that was removed, and one that was put back to
// what it once was, have right MACs; the sum tells.
type SetRoot struct {
	Node, Set string // the set's name is its table's
	Version   uint64 // µs since 1970 UTC of the last write, or one more than before: a rebuilt set has the version it had
	Count     uint64
	Sum       string // 256 hexadecimal digits: the sum of the expanded MACs modulo 2^1024
	MAC       string // HMAC-SM3 over the columns of Columns, 64 hexadecimal digits
	KeyID     string
	CreatedBy string
	CreatedAt int64 // µs since 1970 UTC

	ModifiedBy string
	ModifiedAt int64
}

// RootSet is the name of the roots' own table in their MACs.
const RootSet = "yj_set_root"

// Columns are the columns that the root's MAC covers.
func (r *SetRoot) Columns() []Column {
	return []Column{
		{"node_id", r.Node}, {"set_name", r.Set}, {"root_version", fmt.Sprint(r.Version)}, {"entry_count", fmt.Sprint(r.Count)}, {"set_sum", r.Sum},
		{"created_by", r.CreatedBy}, {"created_at", fmt.Sprint(r.CreatedAt)}, {"modified_by", r.ModifiedBy}, {"modified_at", fmt.Sprint(r.ModifiedAt)},
	}
}

const sumBytes = 128

var sumModulus = new(big.Int).Lsh(big.NewInt(1), 8*sumBytes)

// expand is a row's summand: SM3 over "yinjian/set/v1", a zero byte, the number 0 to 3 in a byte, and the row's MAC. Whoever
// has not the key can only leave rows out and put old ones back. 1024 bits are more than a table's rows give to combine: a
// sum of 256 bits could be met with some ten thousand of them (D. Wagner, A Generalized Birthday Problem, CRYPTO 2002).
func expand(mac string) (*big.Int, error) {
	b, err := hex.DecodeString(mac)
	if err != nil || len(b) != sm3.Size {
		return nil, fmt.Errorf("%w: a row's MAC %.80q", ErrCorrupt, mac)
	}
	var out []byte
	for i := range byte(sumBytes / sm3.Size) {
		h := sm3.Sum(append(append([]byte("yinjian/set/v1\x00"), i), b...))
		out = append(out, h[:]...)
	}
	return new(big.Int).SetBytes(out), nil
}

// Fold takes rows into the sum and out of it, by their MACs.
func (r *SetRoot) Fold(added, removed []string) error {
	sum := new(big.Int)
	if r.Sum != "" {
		if _, ok := sum.SetString(r.Sum, 16); !ok || len(r.Sum) != 2*sumBytes {
			return fmt.Errorf("%w: the sum of set %s", ErrCorrupt, r.Set)
		}
	}
	for _, mac := range added {
		x, err := expand(mac)
		if err != nil {
			return err
		}
		sum.Add(sum, x)
	}
	for _, mac := range removed {
		x, err := expand(mac)
		if err != nil {
			return err
		}
		sum.Sub(sum, x)
	}
	r.Sum = hex.EncodeToString(sum.Mod(sum, sumModulus).FillBytes(make([]byte, sumBytes)))
	r.Count += uint64(len(added)) - uint64(len(removed))
	return nil
}

// Seal computes the root's MAC.
func (r *SetRoot) Seal(ctx context.Context, mac MAC) (err error) {
	r.MAC, err = RowMAC(ctx, mac, RootSet, r.Columns())
	return err
}

// Sealed says whether the root's MAC is right.
func (r *SetRoot) Sealed(ctx context.Context, mac MAC) (bool, error) {
	want, err := RowMAC(ctx, mac, RootSet, r.Columns())
	return hmac.Equal([]byte(want), []byte(r.MAC)), err
}
