package audit_test

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"testing"

	"yinjian/appliance/audit"
)

// foreign is an entry with two payloads in the middle of a journal, proved under a later checkpoint.
func foreign(t *testing.T, key logKey) (*audit.Journal, *audit.Foreign) {
	t.Helper()
	j := startMem(t, newMemStore(), func(c *audit.Config) { c.Checkpointer = key })
	var at uint64
	for i := range 7 {
		d := draft(i)
		if i == 3 {
			d.State = true
			d.Payloads = []audit.Attachment{{Name: "object", MediaType: "application/json", Data: []byte(`{"id":"his"}`)}, {Name: "proof", MediaType: "text/plain", Data: []byte("p")}}
		}
		r, err := j.Append(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		if i == 3 {
			at = r.Sequence
		}
	}
	c, err := j.WaitCheckpoint(t.Context(), j.Size()-1)
	if err != nil {
		t.Fatal(err)
	}
	f, err := j.Foreign(t.Context(), at, c)
	if err != nil {
		t.Fatal(err)
	}
	return j, f
}

// Whatever of a foreign entry is another's, or another than it was, is refused; and it is refused as what it claims to be.
func TestForeignEntryProvesWhatItSays(t *testing.T) {
	t.Parallel()
	key := newLogKey(t)
	j, f := foreign(t, key)
	if err := f.Verify(key.Public()); err != nil {
		t.Fatalf("Verify = %v", err)
	}
	if err := f.Verify(newLogKey(t).Public()); !errors.Is(err, audit.ErrForeign) {
		t.Errorf("under another key: Verify = %v, want %v", err, audit.ErrForeign)
	}
	other, err := j.Entry(t.Context(), f.Record.Sequence+1)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*audit.Foreign){
		"node":                    func(f *audit.Foreign) { f.Node = "c" },
		"node of all":             func(f *audit.Foreign) { f.Node, f.Record.Entry.Node, f.Checkpoint.Node = "c", "c", "c" },
		"epoch":                   func(f *audit.Foreign) { f.Epoch[0] ^= 1 },
		"epoch of the checkpoint": func(f *audit.Foreign) { f.Epoch[0] ^= 1; f.Checkpoint.Epoch = f.Epoch },
		"epoch of the entry":      func(f *audit.Foreign) { f.Record.Epoch[0] ^= 1 },
		"sequence":                func(f *audit.Foreign) { f.Record.Sequence++ },
		"leaf hash":               func(f *audit.Foreign) { f.Record.LeafHash[0] ^= 1 },
		"parsed form":             func(f *audit.Foreign) { f.Record.Entry.Kind = "account.signer/outcome" },
		"bytes":                   func(f *audit.Foreign) { f.Record.EntryDER = bytes.Clone(f.Record.EntryDER); f.Record.EntryDER[40] ^= 1 },
		"bytes after the entry":   func(f *audit.Foreign) { f.Record.EntryDER = append(bytes.Clone(f.Record.EntryDER), 0) },
		"another entry's record":  func(f *audit.Foreign) { f.Record = other },
		"proof":                   func(f *audit.Foreign) { f.Proof = slices.Clone(f.Proof); f.Proof[0][0] ^= 1 },
		"proof cut":               func(f *audit.Foreign) { f.Proof = f.Proof[1:] },
		"root":                    func(f *audit.Foreign) { f.Checkpoint.Root[0] ^= 1 },
		"size":                    func(f *audit.Foreign) { f.Checkpoint.Size++ },
		"signature": func(f *audit.Foreign) {
			f.Checkpoint.Signature = bytes.Clone(f.Checkpoint.Signature)
			f.Checkpoint.Signature[20] ^= 1
		},
		"no signature":               func(f *audit.Foreign) { f.Checkpoint.Signature = nil },
		"payload":                    func(f *audit.Foreign) { f.Payloads["object"] = []byte(`{"id":"emr"}`) },
		"payload missing":            func(f *audit.Foreign) { delete(f.Payloads, "proof") },
		"payload under another name": func(f *audit.Foreign) { f.Payloads["x"] = f.Payloads["proof"]; delete(f.Payloads, "proof") },
		"payload too many":           func(f *audit.Foreign) { f.Payloads["x"] = nil },
	} {
		bad := *f
		bad.Payloads = maps.Clone(f.Payloads)
		change(&bad)
		if err := bad.Verify(key.Public()); !errors.Is(err, audit.ErrForeign) {
			t.Errorf("%s: Verify = %v, want %v", name, err, audit.ErrForeign)
		}
	}
}

// The reference is another one for each node, epoch and sequence.
func TestForeignReference(t *testing.T) {
	t.Parallel()
	refs := map[string]bool{}
	for _, f := range []audit.Foreign{
		{Node: "a"}, {Node: "b"}, {Node: "a", Record: audit.Record{Epoch: audit.Epoch{1}}}, {Node: "a", Record: audit.Record{Sequence: 1}},
	} {
		refs[string(f.Ref())] = true
	}
	if len(refs) != 4 {
		t.Errorf("%d references for 4 entries", len(refs))
	}
}
