package sqlite

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"

	"yinjian/appliance/audit"
)

// The inner nodes of the tree, as a segment keeps them: by level and index in formats 1 and 2, in the order of nodeNo in
// format 3.

// nodeBand is how many levels are kept together.
const nodeBand = 6

const (
	nodeBandShift = 57
	maxNodeLast   = 1<<(nodeBandShift-6) - 1
)

// nodeNo orders the nodes of format 3: levels 1 to 6 by the last leaf below them, then levels 7 to 12, and so on. So the 63
// nodes over 64 leaves, and the 63 over those, lie beside each other, and a proof reads a page or two for each six levels, where
// in the order of levels it read one for each; and entries that are written change the end of the table alone. A node that
// has no number, as no tree is that large, gets -1.
func nodeNo(id audit.NodeID) int64 {
	last := id.Last()
	if id.Level < 1 || id.Level > 62 || id.Index > maxNodeLast>>id.Level || last > maxNodeLast {
		return -1
	}
	return int64(id.Level-1)/nodeBand<<nodeBandShift | int64(last)<<6 | int64(id.Level)
}

// nodeOf is what nodeNo gave the number to; false: nothing has it.
func nodeOf(no int64) (audit.NodeID, bool) {
	level := uint8(no & 63)
	id := audit.NodeID{Level: level, Index: (uint64(no)>>6&maxNodeLast+1)>>level - 1}
	return id, no >= 0 && level > 0 && nodeNo(id) == no
}

// Nodes implements audit.Store. A node is in the segment of its last leaf.
func (j *Journal) Nodes(ctx context.Context, ids ...audit.NodeID) (map[audit.NodeID]audit.Hash, error) {
	return j.readNodes(ctx, ids, (*segment).query)
}

// PathNodes implements audit.Store.
func (j *Journal) PathNodes(ctx context.Context, ids ...audit.NodeID) (map[audit.NodeID]audit.Hash, error) {
	return j.readNodes(ctx, ids, (*segment).lookUp)
}

// A reader is one of the ways to ask a segment.
type reader func(*segment, func(*sql.DB) error) error

func (j *Journal) readNodes(ctx context.Context, ids []audit.NodeID, read reader) (map[audit.NodeID]audit.Hash, error) {
	segs, err := j.list()
	if err != nil {
		return nil, err
	}
	of := map[*segment][]audit.NodeID{}
	for _, id := range ids {
		if s := holder(segs, id.Last()); s != nil {
			of[s] = append(of[s], id)
		}
	}
	out := make(map[audit.NodeID]audit.Hash, len(ids))
	for s, ids := range of {
		if err := s.nodes(ctx, ids, read, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// keysPerStatement are the lengths of statements that look up several keys, the shortest first.
var keysPerStatement = [...]int{1, 4, 16, 64}

// severalKeys are the forms of a statement for keysPerStatement; key is one in its text.
func severalKeys(statement, key string) (out [len(keysPerStatement)]string) {
	for i, n := range keysPerStatement {
		out[i] = strings.Replace(statement, "(VALUES "+key+")", "(VALUES "+key+strings.Repeat(", "+key, n-1)+")", 1)
	}
	return out
}

var (
	leafStatements      = severalKeys(selectLeaves, "(?)")
	nodeStatements      = severalKeys(selectNodes, "(?)")
	levelNodeStatements = severalKeys(selectLevelNodes, "(?, ?)")
)

// nodes reads nodes of the segment into out.
func (s *segment) nodes(ctx context.Context, ids []audit.NodeID, read reader, out map[audit.NodeID]audit.Hash) error {
	var leaves, inner, levels []int64
	for _, id := range ids {
		switch no := nodeNo(id); {
		case id.Level == 0:
			leaves = append(leaves, int64(id.Index))
		case s.format < 3:
			levels = append(levels, int64(id.Level), int64(id.Index))
		case no >= 0:
			inner = append(inner, no)
		}
	}
	slices.Sort(inner) // one page after the other
	put := func(id audit.NodeID, h []byte) error {
		if len(h) != len(audit.Hash{}) {
			return fmt.Errorf("%w: node (%d, %d) has %d bytes", audit.ErrCorrupt, id.Level, id.Index, len(h))
		}
		out[id] = audit.Hash(h)
		return nil
	}
	return read(s, func(db *sql.DB) error {
		err := byKeys(ctx, db, leafStatements, 1, leaves, func(rows *sql.Rows) error {
			var index int64
			var h sql.RawBytes
			if err := rows.Scan(&index, &h); err != nil {
				return err
			}
			return put(audit.NodeID{Index: uint64(index)}, h)
		})
		if err != nil {
			return err
		}
		err = byKeys(ctx, db, nodeStatements, 1, inner, func(rows *sql.Rows) error {
			var no int64
			var h sql.RawBytes
			if err := rows.Scan(&no, &h); err != nil {
				return err
			}
			id, _ := nodeOf(no) // one that was asked for
			return put(id, h)
		})
		if err != nil {
			return err
		}
		return byKeys(ctx, db, levelNodeStatements, 2, levels, func(rows *sql.Rows) error {
			var level, index int64
			var h sql.RawBytes
			if err := rows.Scan(&level, &index, &h); err != nil {
				return err
			}
			return put(audit.NodeID{Level: uint8(level), Index: uint64(index)}, h)
		})
	})
}

// byKeys calls fn with the rows of the keys, each of width values.
func byKeys(ctx context.Context, db *sql.DB, statements [len(keysPerStatement)]string, width int, keys []int64, fn func(*sql.Rows) error) error {
	for len(keys) > 0 {
		i := 0
		for i+1 < len(keysPerStatement) && keysPerStatement[i]*width < len(keys) {
			i++
		}
		args := make([]any, keysPerStatement[i]*width) // what is over asks for NULL, which nothing is
		n := min(len(args), len(keys))
		for k, key := range keys[:n] {
			args[k] = key
		}
		keys = keys[n:]
		err := func() error {
			rows, err := db.QueryContext(ctx, statements[i], args...)
			if err != nil {
				return err
			}
			defer rows.Close()
			for rows.Next() {
				if err := fn(rows); err != nil {
					return err
				}
			}
			return rows.Err()
		}()
		if err != nil {
			return err
		}
	}
	return nil
}

// NodesOver implements audit.Store: level by level in formats 1 and 2, else band by band, as long as a node of it ends there.
func (j *Journal) NodesOver(ctx context.Context, first, end uint64, fn func(audit.NodeID, audit.Hash)) error {
	s, err := j.holding(first)
	if err != nil {
		return err
	}
	step, statement := uint8(nodeBand), selectNodeRange
	if s.format < 3 {
		step, statement = 1, selectLevelNodeRange
	}
	return s.query(func(db *sql.DB) error {
		for level := uint8(1); level < 63 && first>>level < end>>level; level += step {
			args := []any{int64(level), int64(first >> level), int64(end >> level)}
			if s.format >= 3 {
				if end > maxNodeLast {
					return nil // nothing has a number there
				}
				band := int64(level-1) / nodeBand << nodeBandShift
				args = []any{band | int64(first)<<6, band | int64(end)<<6}
			}
			rows, err := db.QueryContext(ctx, statement, args...)
			if err != nil {
				return err
			}
			var no int64
			var h sql.RawBytes
			for rows.Next() {
				if err := rows.Scan(&no, &h); err != nil {
					rows.Close()
					return err
				}
				id, good := audit.NodeID{Level: level, Index: uint64(no)}, true
				if s.format >= 3 {
					id, good = nodeOf(no)
				}
				if good && len(h) == len(audit.Hash{}) {
					fn(id, audit.Hash(h))
				}
			}
			rows.Close()
			if err := rows.Err(); err != nil {
				return err
			}
		}
		return nil
	})
}

// leavesAtOnce is how many leaf hashes come in one row.
const leavesAtOnce = 4096

// Leaves implements audit.Store.
func (j *Journal) Leaves(ctx context.Context, number int, first, end uint64, fn func([]audit.Hash) error) error {
	s, err := j.numbered(number)
	if err != nil {
		return err
	}
	for next := first; next < end; {
		var count, low, high uint64
		var all []byte
		err := s.query(func(db *sql.DB) error {
			return db.QueryRowContext(ctx, selectLeafRange, int64(next), int64(end), leavesAtOnce).Scan(&count, &low, &high, &all)
		})
		if err != nil {
			return err
		}
		if want := min(leavesAtOnce, end-next); count != want || low != next || high != next+want-1 || uint64(len(all)) != want*uint64(len(audit.Hash{})) {
			return fmt.Errorf("%w: segment %d has %d entries from %d to %d and %d bytes of leaf hashes, where %d entries from %d on should be", audit.ErrCorrupt, number, count, low, high, len(all), want, next)
		}
		leaves := make([]audit.Hash, count)
		for i := range leaves {
			leaves[i] = audit.Hash(all[i*len(audit.Hash{}):])
		}
		if err := fn(leaves); err != nil {
			return err
		}
		next += count
	}
	return nil
}
