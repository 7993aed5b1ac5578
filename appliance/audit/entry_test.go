package audit_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"yinjian/appliance/audit"
	"yinjian/ntp"
)

var update = flag.Bool("update", false, "write the files in testdata anew")

func sampleEntry() audit.Entry {
	return audit.Entry{
		Node: "east", Epoch: audit.Epoch{1, 2, 3, 4, 5, 6, 7, 8}, Sequence: 378000,
		Time: audit.Time{Micros: 1772352000123456, BoundMicros: 2500, State: ntp.Trusted, Provenance: "BDS(beidou)+lan"},
		Kind: "sign.v1", Actor: "app/emr", Object: "signer/张医生", Ref: bytes.Repeat([]byte{0xAB}, 32),
		Fields: []audit.Field{
			{"application", audit.Text("emr")}, {"blind", audit.Bool(false)}, {"consent", audit.Octets{0xDE, 0xAD}},
			{"department", audit.Text("心内科")}, {"document.size", audit.Int(40960)}, {"offset", audit.Int(-129)},
			{"test", audit.Bool(true)},
		},
		Payloads: []audit.Payload{
			{"signature", "application/cms", 3, audit.Sum([]byte("abc"))}, {"token", "application/timestamp-reply", 0, audit.Sum(nil)},
		},
	}
}

func vectors() map[string]audit.Entry {
	least := audit.Entry{Node: "n", Time: audit.Time{}, Kind: "k"}
	widest := audit.Entry{
		Node: "node-1.a_b", Epoch: audit.Epoch{0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF}, Sequence: math.MaxInt64,
		Time: audit.Time{Micros: math.MinInt64, BoundMicros: math.MaxInt64, State: ntp.Suspect},
		Kind: "account.signer.enrol/outcome", Ref: make([]byte, 32),
		Fields: []audit.Field{{"a", audit.Int(math.MinInt64)}, {"b", audit.Int(math.MaxInt64)}, {"c", audit.Octets{}}, {"d", audit.Text("")}},
	}
	return map[string]audit.Entry{"sign": sampleEntry(), "least": least, "widest": widest}
}

// The files are the format. They must never change; -update is for a new file only.
func TestEntryVectors(t *testing.T) {
	t.Parallel()
	var leaves strings.Builder
	for _, name := range []string{"least", "sign", "widest"} {
		e := vectors()[name]
		der, err := e.Marshal()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		file := filepath.Join("testdata", "entry-"+name)
		fmt.Fprintf(&leaves, "%s %s\n", audit.LeafHash(der), name)
		if *update {
			if err := os.WriteFile(file+".der", der, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file + ".der")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(der, want) {
			t.Errorf("%s = %x, want %x", name, der, want)
		}
		got, err := audit.ParseEntry(want)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(&e, got); diff != "" {
			t.Errorf("%s, read back:\n%s", name, diff)
		}
		// OpenSSL reads the same structure: the dump beside the file is its own.
		if openssl, err := exec.LookPath("openssl"); err == nil {
			dump, err := exec.Command(openssl, "asn1parse", "-inform", "DER", "-i", "-in", file+".der").CombinedOutput()
			if err != nil {
				t.Errorf("openssl asn1parse %s: %v\n%s", name, err, dump)
			}
			if *update {
				os.WriteFile(file+".txt", dump, 0o644)
			}
			if want, err := os.ReadFile(file + ".txt"); err != nil || !bytes.Equal(dump, want) {
				t.Errorf("%s: OpenSSL's dump differs from the recorded one (%v):\n%s", name, err, dump)
			}
			cmd := exec.Command(openssl, "dgst", "-sm3", "-r")
			cmd.Stdin = bytes.NewReader(append([]byte{0}, der...))
			sum, err := cmd.Output()
			if leaf := audit.LeafHash(der); err != nil || !strings.HasPrefix(string(sum), leaf.String()) {
				t.Errorf("%s: openssl dgst -sm3 of 0x00 ‖ entry = %s (%v), want %s", name, sum, err, leaf)
			}
		} else {
			t.Log("openssl is not installed: its dump and SM3 were not compared")
		}
	}
	if *update {
		os.WriteFile(filepath.Join("testdata", "leaves.txt"), []byte(leaves.String()), 0o644)
	}
	want, err := os.ReadFile(filepath.Join("testdata", "leaves.txt"))
	if err != nil || leaves.String() != string(want) {
		t.Errorf("leaf hashes:\n%swant:\n%s(%v)", leaves.String(), want, err)
	}
}

func TestParseEntryRefuses(t *testing.T) {
	t.Parallel()
	e := sampleEntry()
	der, err := e.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	replace := func(old, new string) []byte {
		o, _ := hex.DecodeString(old)
		n, _ := hex.DecodeString(new)
		if bytes.Count(der, o) != 1 || len(o) != len(n) {
			t.Fatalf("%s is not there once", old)
		}
		return bytes.Replace(der, o, n, 1)
	}
	for name, in := range map[string][]byte{
		"empty":               nil,
		"trailing byte":       append(bytes.Clone(der), 0),
		"cut":                 der[:len(der)-1],
		"version 2":           bytes.Replace(der, []byte{2, 1, 1, 12, 4}, []byte{2, 1, 2, 12, 4}, 1),
		"BOOLEAN 0x01":        replace("0101ff", "010101"),
		"long INTEGER":        replace("0202ff7f", "0202ffff"), // −129 as −1 in two bytes
		"upper-case name":     bytes.Replace(der, []byte("blind"), []byte("Blind"), 1),
		"fields out of order": bytes.Replace(der, []byte("blind"), []byte("zlind"), 1),
		"not UTF-8":           bytes.Replace(der, []byte("张"), []byte{0xFF, 0xFE, 0xFD}, 1),
		"NUL":                 bytes.Replace(der, []byte("app/emr"), []byte("app\x00emr"), 1),
		"PrintableString":     bytes.Replace(der, []byte("\x0c\x07sign.v1"), []byte("\x13\x07sign.v1"), 1),
		"too long":            make([]byte, audit.MaxEntryBytes+1),
	} {
		if _, err := audit.ParseEntry(in); err == nil {
			t.Errorf("%s: ParseEntry = nil, want an error", name)
		}
		if audit.Examine(in) == nil {
			t.Errorf("%s: a verification reads it", name)
		}
	}
}

func TestEntryLimits(t *testing.T) {
	t.Parallel()
	many := make([]audit.Field, audit.MaxFields+1)
	for i := range many {
		many[i] = audit.Field{fmt.Sprintf("f%03d", i), audit.Int(i)}
	}
	fat := make([]audit.Field, audit.MaxFields)
	for i := range fat {
		fat[i] = audit.Field{fmt.Sprintf("f%03d", i), audit.Octets(make([]byte, audit.MaxTextBytes))}
	}
	for name, change := range map[string]func(*audit.Entry){
		"node empty":       func(e *audit.Entry) { e.Node = "" },
		"node with slash":  func(e *audit.Entry) { e.Node = "a/b" },
		"kind":             func(e *audit.Entry) { e.Kind = "Sign" },
		"kind long":        func(e *audit.Entry) { e.Kind = strings.Repeat("k", 65) },
		"sequence":         func(e *audit.Entry) { e.Sequence = 1 << 63 },
		"bound":            func(e *audit.Entry) { e.Time.BoundMicros = -1 },
		"ref":              func(e *audit.Entry) { e.Ref = make([]byte, 31) },
		"actor":            func(e *audit.Entry) { e.Actor = strings.Repeat("a", 257) },
		"object not UTF-8": func(e *audit.Entry) { e.Object = "\xff" },
		"field twice":      func(e *audit.Entry) { e.Fields = []audit.Field{{"a", audit.Int(1)}, {"a", audit.Int(2)}} },
		"field order":      func(e *audit.Entry) { e.Fields = []audit.Field{{"b", audit.Int(1)}, {"a", audit.Int(2)}} },
		"field nil":        func(e *audit.Entry) { e.Fields = []audit.Field{{"a", nil}} },
		"fields":           func(e *audit.Entry) { e.Fields = many },
		"whole":            func(e *audit.Entry) { e.Fields = fat },
		"text":             func(e *audit.Entry) { e.Fields = []audit.Field{{"a", audit.Text(strings.Repeat("x", 4097))}} },
		"payload size":     func(e *audit.Entry) { e.Payloads = []audit.Payload{{Name: "p", Size: audit.MaxPayloadBytes + 1}} },
		"payload name":     func(e *audit.Entry) { e.Payloads = []audit.Payload{{Name: "P"}} },
	} {
		e := sampleEntry()
		change(&e)
		if _, err := e.Marshal(); err == nil {
			t.Errorf("%s: Marshal = nil, want an error", name)
		}
	}
}

// Rounding to microseconds must not make the bound untrue.
func TestTimeOfKeepsTheBound(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		time  time.Time
		bound time.Duration
		want  audit.Time
	}{
		{time.Unix(10, 999), 0, audit.Time{Micros: 10_000_000, BoundMicros: 1}},
		{time.Unix(10, 1500), 2500, audit.Time{Micros: 10_000_001, BoundMicros: 3}},
		{time.Unix(10, 1000), 2000, audit.Time{Micros: 10_000_001, BoundMicros: 2}},
		{time.Unix(-1, 999_999_999), 1, audit.Time{Micros: -1, BoundMicros: 1}},
		{time.Unix(10, 999), math.MaxInt64, audit.Time{Micros: 10_000_000, BoundMicros: math.MaxInt64/1000 + 1}},
		{time.Unix(10, 0), -5, audit.Time{Micros: 10_000_000}},
	} {
		got := audit.TimeOf(ntp.Reading{Time: c.time, Bound: c.bound})
		if got.Micros != c.want.Micros || got.BoundMicros != c.want.BoundMicros && c.bound != math.MaxInt64 || got.BoundMicros < 0 {
			t.Errorf("TimeOf(%v ± %v) = %+v, want %+v", c.time.UnixNano(), c.bound, got, c.want)
		}
	}
}

func FuzzParseEntry(f *testing.F) {
	for _, e := range vectors() {
		der, err := e.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		e, err := audit.ParseEntry(der)
		if examined := audit.Examine(der); (examined == nil) != (err == nil) {
			t.Errorf("%x: ParseEntry answers %v, a verification %v", der, err, examined)
		}
		if err != nil {
			return
		}
		again, err := e.Marshal()
		if err != nil || !bytes.Equal(again, der) {
			t.Errorf("%x parses and encodes to %x, %v", der, again, err)
		}
	})
}

func FuzzParseOwn(f *testing.F) {
	one := audit.Blob{Sum: audit.Sum([]byte("one")), Data: []byte("one")}
	f.Add([]byte{})
	f.Add(audit.AppendOwn(nil, one))
	f.Add(audit.AppendOwn(audit.AppendOwn(nil, audit.Blob{}), one))
	f.Fuzz(func(t *testing.T, own []byte) {
		blobs, err := audit.ParseOwn(own)
		if err != nil {
			if !errors.Is(err, audit.ErrCorrupt) {
				t.Errorf("ParseOwn = %v", err)
			}
			return
		}
		var again []byte
		for _, b := range blobs {
			again = audit.AppendOwn(again, b)
		}
		if !bytes.Equal(again, own) {
			t.Errorf("%x parses and encodes to %x", own, again)
		}
	})
}
