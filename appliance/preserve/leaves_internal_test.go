package preserve

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"testing"

	"yinjian/tsa/ers"
)

// A path out of the file is the path in one tree over all leaves, at the edges of chunks as elsewhere, and what the file
// says is believed only where it leads to the root that was stamped.
func TestLeaves(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 3, chunk - 1, chunk, chunk + 1, 2*chunk + 5, 3 * chunk} {
		dir := t.TempDir()
		w, err := createLeaves(dir, 7, 0, ers.SM3)
		if err != nil {
			t.Fatal(err)
		}
		var leaves [][]byte
		for i := range n {
			leaf := ers.SM3.Sum(binary.BigEndian.AppendUint64(nil, uint64(i)))
			leaves = append(leaves, leaf)
			if err := w.add(uint64(3*i+10), leaf); err != nil {
				t.Fatal(err)
			}
		}
		root, err := w.finish()
		if err != nil {
			t.Fatal(err)
		}
		tree := ers.NewTree(ers.SM3, leaves)
		if !bytes.Equal(root, tree.Root()) {
			t.Fatalf("%d leaves: another root than of one tree", n)
		}
		a := &archived{count: uint64(n), algorithm: ers.SM3, root: root}
		name := leafFile(dir, 7, 0)
		var cache leafCache
		for _, i := range []int{0, 1, n / 2, chunk - 1, chunk, chunk + 1, n - 1, 0} {
			if i >= n {
				continue
			}
			path, err := cache.path(name, a, uint64(3*i+10))
			if err != nil || !slices.EqualFunc(path, tree.Path(i), bytes.Equal) {
				t.Errorf("leaf %d of %d: %v, another path", i, n, err)
			}
		}
		for _, sequence := range []uint64{9, 11, uint64(3*n + 10)} {
			if _, err := cache.path(name, a, sequence); !errors.Is(err, errNoLeaf) {
				t.Errorf("entry %d of %d leaves: %v", sequence, n, err)
			}
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []int{8, len(data) - 1} { // the first leaf, a chunk's root
			changed := bytes.Clone(data)
			changed[at] ^= 1
			if err := os.WriteFile(name, changed, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := new(leafCache).path(name, a, 10); !errors.Is(err, errNoLeaf) {
				t.Errorf("%d leaves, byte %d changed: %v", n, at, err)
			}
		}
		if err := os.WriteFile(name, data[:len(data)-1], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := new(leafCache).path(name, a, 10); !errors.Is(err, errNoLeaf) {
			t.Errorf("%d leaves, cut: %v", n, err)
		}
	}
}
