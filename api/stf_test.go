package api_test

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/api/wire"
	"yinjian/appliance/cms/cmstest"
	"yinjian/appliance/problem"
	"yinjian/ntp"
	"yinjian/tsa"
	"yinjian/tsa/stf"
)

type stampKey struct{ crypto.Signer }

func (k stampKey) SignMessage(ctx context.Context, message []byte) ([]byte, error) {
	return cmstest.SignMessage(ctx, k.Signer, message)
}

// A stamper is a timestamp unit with keys in memory, and an exchange with it.
type stamper struct {
	ca, cert        *smx509.Certificate
	authority       *tsa.Authority
	query, response []byte
	serial          int64
}

func (s *stamper) Now() ntp.Reading {
	return ntp.Reading{Time: epoch, Bound: time.Millisecond, State: ntp.Trusted}
}
func (s *stamper) Next(context.Context) (*big.Int, error) {
	s.serial++
	return big.NewInt(s.serial), nil
}
func (s *stamper) RecordToken(context.Context, *tsa.Token) error { return nil }

var stampUnit = sync.OnceValue(func() *stamper {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	caKey, key := cmstest.NewSM2Key(), cmstest.NewSM2Key()
	s := new(stamper)
	s.ca = cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, NotBefore: epoch.AddDate(-1, 0, 0), NotAfter: epoch.AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign,
	}, nil, caKey.Public(), caKey)
	purpose, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
	must(err)
	s.cert = cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Test TSU"}, NotBefore: epoch.AddDate(-1, 0, 0), NotAfter: epoch.AddDate(5, 0, 0),
		KeyUsage:        smx509.KeyUsageDigitalSignature,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: purpose}},
	}, s.ca, key.Public(), caKey)
	s.authority, err = tsa.New(tsa.Config{
		Name: "sm2", Policy: asn1.ObjectIdentifier{1, 2, 3, 4}, Accuracy: time.Second, Signer: stampKey{key}, Chain: []*smx509.Certificate{s.cert, s.ca},
		Clock: s, Serials: s, Recorder: s, Log: discard(),
	})
	must(err)
	s.query, err = (&tsa.Request{Imprint: tsa.ImprintOf([]byte("abc")), Nonce: big.NewInt(7), CertReq: true}).Bytes()
	must(err)
	s.response = s.authority.Respond(context.Background(), s.query)
	return s
})

// TestSTF goes through the operations of GM/T 0033 by HTTP.
func TestSTF(t *testing.T) {
	t.Parallel()
	sv := newServices()
	sv.respond = func(ctx context.Context, unit, requester string, der []byte) ([]byte, error) {
		if unit != "sm2" || requester != "his" {
			t.Errorf("unit %s, requester %s", unit, requester)
		}
		return stampUnit().authority.Respond(ctx, der), nil
	}
	sv.known = func(context.Context, *tsa.Token) (*stf.Known, error) { return &stf.Known{TimeSource: "BDS+lan"}, nil }
	k := startWith(t, sv)
	ask := func(operation string, body m, out any) {
		t.Helper()
		got := k.do(call{path: "/v1/stf/" + operation, body: encode(t, body)})
		if got.status != 200 {
			t.Fatalf("%s: %d %s", operation, got.status, got.body)
		}
		if err := json.Unmarshal(got.body, out); err != nil {
			t.Fatal(err)
		}
	}
	var q wire.STFRequest
	ask("create-request", m{"data": b64([]byte("abc")), "req_type": 0}, &q)
	var r wire.STFResponse
	ask("create-response", m{"request": b64(q.Request)}, &r)
	var v wire.STFValidity
	ask("verify", m{"response": b64(r.Response), "hash_alg": 1, "sig_alg": 131585}, &v)
	if v.Verdict != "indeterminate" || len(v.Unchecked) != 1 || v.Given || v.GenTime == "" {
		t.Errorf("verify = %+v", v)
	}
	var i wire.STFInfo
	if ask("info", m{"response": b64(r.Response)}, &i); i.Issuer != "Test TSU" || i.Time != v.GenTime {
		t.Errorf("info = %+v", i)
	}
	var d wire.STFDetail
	if ask("detail", m{"response": b64(r.Response), "item": 6}, &d); d.Text != "BDS+lan" || d.From != "journal" {
		t.Errorf("detail = %+v", d)
	}
	d = wire.STFDetail{}
	if ask("detail", m{"response": b64(r.Response), "item": 5}, &d); len(d.Certificates) != 2 || d.From != "token" {
		t.Errorf("detail = %+v", d)
	}
}

// TestSTFRefusals: our code and the standard's number side by side.
func TestSTFRefusals(t *testing.T) {
	t.Parallel()
	sv := newServices()
	var respond func() ([]byte, error)
	sv.respond = func(context.Context, string, string, []byte) ([]byte, error) { return respond() }
	sv.known = func(context.Context, *tsa.Token) (*stf.Known, error) { return nil, errors.New("secret") }
	k := startWith(t, sv)
	u := stampUnit()
	reject := func(f tsa.Failure) func() ([]byte, error) {
		return func() ([]byte, error) { return tsa.Reject(f, "no"), nil }
	}
	spoiled := append([]byte(nil), u.response...)
	spoiled[len(spoiled)-1] ^= 1
	response, request := m{"response": b64(u.response)}, m{"request": b64(u.query)}
	for name, row := range map[string]struct {
		operation string
		body      m
		respond   func() ([]byte, error)
		status    int
		code      problem.Code
		field     string
		number    string
	}{
		"request type":       {"create-request", m{"data": "YWJj", "req_type": 2}, nil, 400, problem.InvalidRequest, "req_type", "0x04000008"},
		"SHA-1":              {"create-request", m{"data": "YWJj", "req_type": 0, "hash_alg": 2}, nil, 400, problem.InvalidRequest, "hash_alg", "0x04000007"},
		"request too long":   {"create-response", m{"request": b64(make([]byte, 17<<10))}, nil, 413, problem.TooLarge, "request", "0x04000001"},
		"no unit":            {"create-response", m{"request": b64(u.query), "sig_alg": 65540}, nil, 400, problem.InvalidRequest, "sig_alg", "0x04000007"},
		"no answer":          {"create-response", request, func() ([]byte, error) { return nil, errors.New("secret") }, 503, problem.NotReady, "", "0x04000003"},
		"bad request":        {"create-response", request, reject(tsa.BadRequest), 400, problem.InvalidRequest, "request", "0x04000008"},
		"bad format":         {"create-response", request, reject(tsa.BadDataFormat), 400, problem.InvalidRequest, "request", "0x04000009"},
		"no time":            {"create-response", request, reject(tsa.TimeNotAvailable), 503, problem.TimeUntrusted, "", "0x0400000A"},
		"policy":             {"create-response", request, reject(tsa.UnacceptedPolicy), 400, problem.InvalidRequest, "request", "0x0400000B"},
		"extension":          {"create-response", request, reject(tsa.UnacceptedExtension), 400, problem.InvalidRequest, "request", "0x0400000C"},
		"failure":            {"create-response", request, reject(tsa.SystemFailure), 503, problem.NotReady, "", "0x0400000E"},
		"not a response":     {"info", m{"response": "MAA="}, nil, 400, problem.InvalidRequest, "response", "0x04000004"},
		"a rejection":        {"info", m{"response": b64(tsa.Reject(tsa.TimeNotAvailable, "no"))}, nil, 400, problem.InvalidRequest, "response", "0x0400000A"},
		"item":               {"detail", m{"response": b64(u.response), "item": 13}, nil, 400, problem.InvalidRequest, "item", "0x04000005"},
		"item not available": {"detail", m{"response": b64(u.response), "item": 3}, nil, 404, problem.NotFound, "item", "0x0400000D"},
		"journal away":       {"detail", m{"response": b64(u.response), "item": 6}, nil, 503, problem.NotReady, "", "0x0400000E"},
		"spoiled":            {"verify", m{"response": b64(spoiled)}, nil, 422, problem.TimestampInvalid, "response", "0x04000006"},
		"wrong certificate":  {"verify", m{"response": b64(u.response), "certificate": b64(u.ca.Raw)}, nil, 422, problem.TimestampInvalid, "response", "0x04000006"},
		"no response":        {"verify", m{}, nil, 400, problem.InvalidRequest, "response", ""},
	} {
		respond = row.respond
		got := k.do(call{path: "/v1/stf/" + row.operation, body: encode(t, row.body)})
		wantProblem(t, got, row.status, row.code, row.field)
		if got.problem.STF != row.number {
			t.Errorf("%s: number %q, want %q", name, got.problem.STF, row.number)
		}
	}
	// rights are those of timestamps and of verification
	for operation, body := range map[string]m{"create-request": {"data": "YWJj", "req_type": 0}, "create-response": request, "verify": response, "info": response} {
		wantProblem(t, k.do(call{path: "/v1/stf/" + operation, app: "emr", body: encode(t, body)}), 403, problem.Forbidden, "")
	}
}
