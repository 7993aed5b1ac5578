package pool_test

import (
	"context"
	"testing"

	"yinjian/hsm"
	"yinjian/hsm/pool"
	"yinjian/hsm/worker"
)

// instant answers at once.
type instant struct{ *fake }

func (instant) State() worker.State { return worker.State{Phase: worker.Ready, Sessions: 64} }

func (instant) Do(context.Context, string, hsm.Operation, []byte) ([]byte, error) { return digest, nil }

// BenchmarkAlone is what a pool of one machine adds to a call.
func BenchmarkAlone(b *testing.B) {
	p := pool.New(pool.Config{Class: hsm.Staff, Log: quiet()})
	if err := p.Add(b.Context(), pool.Machine{Name: "a", Token: instant{newFake("a")}, Weight: 1, Sessions: 64}); err != nil {
		b.Fatal(err)
	}
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Do(ctx, "shared", hsm.SignSM2E, digest); err != nil {
			b.Fatal(err)
		}
	}
}
