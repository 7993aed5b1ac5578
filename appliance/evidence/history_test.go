package evidence_test

import (
	"reflect"
	"testing"

	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
)

// What is no history is refused, as strictly as a bundle is.
func TestParseHistoryRefuses(t *testing.T) {
	t.Parallel()
	const journal = `"journal":{"node":"n","epoch":"00","sequence":0,"leaf":"MAA=","tree_size":1,"inclusion":[],"checkpoint":"","checkpoint_signature":""}`
	if _, err := evidence.ParseHistory([]byte(`{"format":"yinjian-history/1","record_id":"00","statement":"s","record":"e30=",` + journal + `}`)); err != nil {
		t.Fatal(err) // the rest differs from this in one thing each
	}
	for name, text := range map[string]string{
		"another format":  `{"format":"yinjian-history/2","record_id":"00","statement":"s","record":"e30=",` + journal + `}`,
		"a bundle's":      `{"format":"yinjian-evidence/1","record_id":"00","statement":"s","record":"e30=",` + journal + `}`,
		"unknown name":    `{"format":"yinjian-history/1","verdict":"valid","record_id":"00","statement":"s","record":"e30=",` + journal + `}`,
		"missing":         `{"format":"yinjian-history/1","record_id":"00","record":"e30=",` + journal + `}`,
		"twice":           `{"format":"yinjian-history/1","record_id":"00","record_id":"00","statement":"s","record":"e30=",` + journal + `}`,
		"loose base64":    `{"format":"yinjian-history/1","record_id":"00","statement":"s","record":"e30",` + journal + `}`,
		"empty signature": `{"format":"yinjian-history/1","record_id":"00","statement":"s","record":"e30=","signature":"",` + journal + `}`,
		"more behind":     `{"format":"yinjian-history/1","record_id":"00","statement":"s","record":"e30=",` + journal + `}{}`,
	} {
		if _, err := evidence.ParseHistory([]byte(text)); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// FuzzParseHistory holds that what is taken reads back the same, and that none is ever valid.
func FuzzParseHistory(f *testing.F) {
	trust := recordedTrust(f)
	b := parse(f, read(f, recorded(kinds[0])))
	h := evidence.History{Format: evidence.FormatHistory, RecordID: b.RecordID, Statement: "s", Record: []byte(`{"id":"1"}`), Signature: b.Signature.Value, Journal: b.Journal}
	data, err := h.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"format":"yinjian-history/1"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := evidence.ParseHistory(data)
		if err != nil {
			return
		}
		again, err := h.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if other, err := evidence.ParseHistory(again); err != nil || !reflect.DeepEqual(other, h) {
			t.Errorf("read back as %+v, %v", other, err)
		}
		if r := evidence.VerifyHistory(h, trust, evidence.Input{}); r.Verdict == pki.Valid {
			t.Error("an imported record is called valid")
		}
	})
}
