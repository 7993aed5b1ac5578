package appliance

import (
	"bytes"
	"encoding/json"
	"testing"
)

// FuzzHead: two files under one MAC say the same of the journal.
func FuzzHead(f *testing.F) {
	file := func(node, root string, size uint64) []byte {
		b, err := json.Marshal(head{Node: node, Root: root, Size: size, MAC: "00"})
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(file("benbu-1", "ab", 7), file("benbu-", "1ab", 7))
	f.Add(file("benbu-1", "ab", 7), []byte(`{"NODE":"benbu-1","root":"ab","size":7,"size":7}`))
	f.Add([]byte("{}"), []byte("null"))
	f.Add(file("a", "", 1<<63), []byte(`{"size":-1}`))
	f.Fuzz(func(t *testing.T, one, other []byte) {
		var a, b head
		if json.Unmarshal(one, &a) != nil || json.Unmarshal(other, &b) != nil {
			return
		}
		a.MAC, b.MAC = "", ""
		if same := bytes.Equal(a.authenticated(), b.authenticated()); same != (a == b) {
			t.Errorf("%+v and %+v: one MAC: %v", a, b, same)
		}
	})
}
