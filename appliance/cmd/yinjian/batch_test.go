package main_test

import (
	"fmt"
	"testing"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
)

// A batch is signed item by item: one authorisation covers as many as it says and no more; the power that goes in the middle of
// one leaves some of it signed, and the batch sent again gives every item one record, those that were there as they were.
func TestBatch(t *testing.T) {
	t.Parallel()
	dir := initAppliance(t, startTimeServer(t))
	configure(t, dir, func(c *appliance.Config) { c.Listen.API = freePort(t) })
	m := serve(t, dir)
	m.trusted(t)
	his := m.register(t, "his", "--consent", "app-asserted", "--consent", "signer-pin")
	m.enrol(t, "D1", officePIN, "--algorithms", "SM2")
	batch := func(name string, n int, consent wire.Consent) *wire.BatchRequest {
		one := asserted("D1", name)
		b := &wire.BatchRequest{Signer: one.Signer, Algorithm: one.Algorithm, Form: one.Form, Role: one.Role, Consent: consent}
		for i := range n {
			key := fmt.Sprintf("%s-%d", name, i)
			it := asserted("D1", key)
			b.Items = append(b.Items, wire.BatchItem{IdempotencyKey: key, Content: it.Content, Document: it.Document})
		}
		return b
	}

	// 1. One authorisation.
	grant, err := his.Authorize(t.Context(), &wire.AuthorizationRequest{Signer: "D1", PIN: officePIN, Count: 30, Seconds: 600})
	if err != nil {
		t.Fatal(err)
	}
	got, err := his.Batch(t.Context(), batch("granted", 40, wire.Consent{AuthorizationID: grant.ID}))
	if err != nil {
		t.Fatal(err)
	}
	signed, spent := 0, 0
	for _, o := range got.Items {
		switch {
		case o.Result != nil:
			signed++
		case o.Problem.Code == string(problem.AuthorizationSpent):
			spent++
		default:
			t.Errorf("%s: %+v", o.IdempotencyKey, o.Problem)
		}
	}
	if signed != 30 || spent != 10 {
		t.Errorf("%d signed, %d refused under an authorisation for 30 of 40", signed, spent)
	}

	// 2. The power goes, and the client sends again until it is answered.
	cfg := m.clientConfig(t, "his")
	cfg.Retry = client.Retry{Attempts: 10_000, Total: 2 * time.Minute}
	patient, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer patient.Close()
	before := m.state(t).Journal.Entries
	answered := make(chan *wire.BatchResult, 1)
	go func() {
		out, err := patient.Batch(t.Context(), batch("cut", 500, asserted("D1", "x").Consent))
		if err != nil {
			t.Error(err)
			out = &wire.BatchResult{}
		}
		answered <- out
	}()
	eventually(t, time.Minute, "some of the batch is signed", func() bool { return m.state(t).Journal.Entries > before })
	m.kill(t)
	then := len(entries(t, dir, evidence.KindSign)) - signed
	m = serve(t, dir)
	m.trusted(t)
	replayed := 0
	records := map[string]bool{}
	for _, o := range (<-answered).Items {
		if o.Result == nil {
			t.Errorf("%s: %+v", o.IdempotencyKey, o.Problem)
			continue
		}
		records[o.Result.RecordID] = true
		if o.Result.Replayed {
			replayed++
		}
	}
	m.stop(t)
	times := map[string]int{}
	for _, e := range entries(t, dir, evidence.KindSign) {
		times[string(e.Ref)]++
	}
	t.Logf("%d of 500 were signed when the power went, %d answers are of before", then, replayed)
	if len(records) != 500 || len(times) != 500+signed || then < 1 || replayed < then {
		t.Errorf("%d records of 500 items, %d in the journal; %d were there when the power went, %d replayed", len(records), len(times), then, replayed)
	}
	for ref, n := range times {
		if n != 1 {
			t.Errorf("record %x stands %d times in the journal", ref, n)
		}
	}
}
