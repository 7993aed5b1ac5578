package api

import (
	"bytes"
	"encoding/json"
	"io"
	"reflect"
	"testing"

	"yinjian/api/wire"
)

// targets are all types that bodies are read into.
func targets() []any {
	return []any{
		new(wire.SignRequest), new(wire.VerifyRequest), new(wire.TimestampRequest), new(wire.AuthorizationRequest),
		new(wire.RegisterApplication), new(wire.SetProduction), new(wire.ImportSigners), new(wire.ImportHistory), new(wire.HistoryTotals), new(wire.HistoryRecord), new(wire.LimitApplication), new(wire.EnrolSigner), new(wire.SetSignerPIN), new(wire.Decision), new(wire.RevokeCertificate), new(wire.IssueCRL),
	}
}

// FuzzDecode holds the strict reader against encoding/json: what ours takes, that takes too, to the same value.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"signer":"D1","detached":true,"content":"YWJj","digest":{"algorithm":"SM3","value":""},"document":{"id":"\u75c5\/1"}}`,
		`{"evidence":{"a":[1,-0.5e+3,true,false,null,"\ud83d\ude00"],"b":{}},"raw":{"chain":["","AA=="]}}`,
		`{"count":-0,"seconds":2147483647,"digests":["AAAA"]}`, `{"id":"his","rights":["sign"],"test":false}`,
		`{"signer":"a","signer":"b"}`, `{"Signer":"a"}`, ` [ ] `, `{"evidence":{"a":1,"a":2}}`, `{"content":"A\nAA"}`, `{"signer":"\u0000"}`,
		"{\"signer\":\"\xff\"}", "{\"signer\":\"\u2028\"}", `{"count":1e1}`, `{"count":99999999999}`, `{"id":"000","rights":[]}`, `{"evidence":{"\ud800":1}}`, `{"pin":"\u0031"}`,
	} {
		for i := range targets() {
			f.Add([]byte(s), i)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, which int) {
		all := targets()
		ours := all[uint(which)%uint(len(all))]
		if p := decode(data, ours); p != nil {
			if p.Code == "" || p.Detail == "" || p.Next == "" || len(p.Field) > 1000 {
				t.Errorf("problem is not complete: %+v", p)
			}
			return
		}
		theirs := reflect.New(reflect.TypeOf(ours).Elem()).Interface()
		d := json.NewDecoder(bytes.NewReader(data))
		d.DisallowUnknownFields()
		if err := d.Decode(theirs); err != nil {
			t.Fatalf("encoding/json refuses what we take: %v", err)
		}
		if _, err := d.Token(); err != io.EOF {
			t.Fatalf("data after the value: %v", err)
		}
		if !reflect.DeepEqual(ours, theirs) {
			t.Errorf("we read %+v, encoding/json %+v", ours, theirs)
		}
	})
}
