package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/dbdriver/sqlite"
	"yinjian/hsm"
	"yinjian/ntp"
)

const benchGrowthText = `日志增长时各项代价如何变化。每种规模一份日志，各轮交错；比值取同一轮内与最小规模之比，再取各轮中位数。
What a journal's size does to its costs. One journal of each size, filled through the journal itself and measured in this
process; rounds are interleaved; each ratio is to the smallest journal in the same round, then the median of the rounds.

entry         300 bytes of payload of its own, a reference, the fields of a signature without certificates; segments of
              1,000,000 (--segment); a checkpoint key and a head seal in this process; 500 changes of state, evenly spread
at            the sizes are what the journals have at the end: the last segment of 1,000,000 and of 10,000,000 is full then
append-1      one caller, append-64 64 callers: the reference looked up, the entry appended, on disk             ≤ 1.25
reference     entries by a reference that is there; no-reference one that is not (no limit)                       ≤ 1.25
sequence      one entry by its number                                                                            ≤ 1.25
evidence      by reference, with proof, checkpoint and payload, as JSON: GET /v1/evidence without HTTP           ≤ 1.25
proof         of inclusion under the last checkpoint, alone (no limit)
start         files opened, their schema and the end checked, the directory's changes replayed with their proofs
              as often as a start of the appliance does                                                          ≤ 2
after start   what goes on in the background then, until there is nothing left to do (no limit)
verify        audit.Verify over all of it, bytes of entries and payloads a second, over raw SM3                   ≥ 0.5
              (gmsm, one goroutine, one stream of the same bytes)`

// benchGrowthCommand measures; the Makefile's bench calls it with small sizes, bench-growth with all.
func benchGrowthCommand() *cobra.Command {
	b := &growthBench{}
	var sizes []uint
	c := &cobra.Command{
		Use: "bench-growth --dir DIR", Hidden: true, Short: "测量日志增长的代价 (measure what growth costs)", Long: benchGrowthText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			for _, n := range sizes {
				b.sizes = append(b.sizes, uint64(n))
			}
			slices.Sort(b.sizes)
			if b.rounds < 1 || len(b.sizes) < 2 || b.sizes[0] < 2*growthRound {
				return usageError{fmt.Errorf("--rounds 须为正，--entries 至少两个、各不小于 %d (must be positive; at least two, each at least %d)", 2*growthRound, 2*growthRound)}
			}
			return b.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&b.dir, "dir", "out/bench-growth", "目录 (folder)")
	f.StringVar(&b.results, "results", "", "结果目录：growth.md、growth.json、growth.svg (folder for the results)")
	f.StringVar(&b.name, "name", "growth", "结果文件的名称 (name of the results' files)")
	f.IntVar(&b.rounds, "rounds", 7, "轮数 (rounds)")
	f.UintSliceVar(&sizes, "entries", []uint{10_000, 100_000}, "日志规模 (sizes of the journals)")
	f.IntVar(&b.segment, "segment", 0, "一段的条目数；0 为 1,000,000，如设备 (entries of a segment; 0: 1,000,000, as the appliance has it)")
	f.BoolVar(&b.keep, "keep", false, "保留并续用目录中已有的日志，--rounds 须与建立时相同 (go on with the journals that are in the folder, made with the same --rounds, and leave them there)")
	return c
}

// The journal that bench-growth measures, and how it is filled: through audit.Journal, as the appliance does it.

// growthDay is how many signatures a day the staff make: 6,300 with 60 each.
const growthDay = 378_000

// growthChanges is how many changes of state each journal has, evenly spread: what a start replays.
const growthChanges = 500

// A growthJournal is one journal of a size.
type growthJournal struct {
	size    uint64
	dir     string
	segment int // entries of one
	store   *sqlite.Journal
	*audit.Journal
	key    *hsm.Key
	fresh  atomic.Uint64 // number of the last draft beyond those of fill
	filled uint64        // drafts that fill has made
	stop   func() error
}

// growthClock goes on as if growthDay entries were written a day.
type growthClock struct{ entries atomic.Uint64 }

func (c *growthClock) Now() ntp.Reading {
	at := benchTime.Add(time.Duration(c.entries.Load()) * (24 * time.Hour / growthDay))
	return ntp.Reading{Time: at, Bound: time.Millisecond, State: ntp.Trusted, Provenance: "rack(bench)"}
}

// growthSumUp is when a journal's active segment is read for its seal, of which 'after start' is to tell, and 'start' not.
const growthSumUp = time.Second

// growthRef is the reference of the nth draft, so that any can be looked up.
func growthRef(n uint64) []byte {
	ref := audit.Sum(binary.BigEndian.AppendUint64([]byte("yinjian/bench/growth"), n))
	return ref[:]
}

func newGrowthJournal(dir string, size uint64, segment int) (*growthJournal, error) {
	secret, err := sm2.NewPrivateKey(bytes.Repeat([]byte{0x42}, 32)) // always the same, for journals that are kept
	if err != nil {
		return nil, err
	}
	g := &growthJournal{size: size, dir: filepath.Join(dir, fmt.Sprint(size)), segment: segment}
	g.fresh.Store(uint64(time.Now().UnixNano())) // interval: only makes them differ from those of another run
	if g.key, err = hsm.KeyOf(memoryToken{key: secret}, hsm.KeyInfo{Label: "bench", Algorithm: hsm.SM2, Public: &secret.PublicKey}, false); err != nil {
		return nil, err
	}
	return g, nil
}

// open opens the journal and runs it.
func (g *growthJournal) open(ctx context.Context) (err error) {
	if g.store, err = sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: g.dir, SegmentEntries: g.segment}); err != nil {
		return err
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	clock := &growthClock{}
	if g.Journal, err = audit.Open(ctx, audit.Config{
		Store: g.store, Node: "bench", Clock: clock, Log: log, Checkpointer: g.key, Sealer: memoryMAC("bench"), SumUpAfter: growthSumUp,
	}); err != nil {
		return errors.Join(err, g.store.Close())
	}
	clock.entries.Store(g.Size())
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- g.Run(run) }()
	timed := make(chan struct{})
	go func() { // the clock follows the journal
		defer close(timed)
		for size := g.Size(); run.Err() == nil; clock.entries.Store(size) {
			size, _ = g.WaitSize(run, size) // it ends with run
		}
	}()
	g.stop = func() error {
		cancel()
		<-timed
		return errors.Join(<-ended, g.store.Close())
	}
	return nil
}

// draft is that of the nth signature, with what the projection and the evidence file read of it, and one payload of 300
// bytes. Certificates and lists, which a segment has once, and the digests of them are left out: ten million entries as long
// as a real signature's would take 22 GB.
func (g *growthJournal) draft(n uint64) audit.Draft {
	payload := make([]byte, 300)
	rand.Read(payload) // never fails (crypto/rand)
	digest := audit.Octets(payload[:32])
	return audit.Draft{
		Kind: evidence.KindSign, Actor: "application/bench", Object: fmt.Sprintf("D%05d", n%6300), Ref: growthRef(n),
		Fields: []audit.Field{
			{Name: "algorithm", Value: audit.Text("SM2")}, {Name: "application", Value: audit.Text("bench")},
			{Name: "campus", Value: audit.Text("本部")}, {Name: "consent.method", Value: audit.Text("app-asserted")},
			{Name: "department", Value: audit.Text("胸外科")}, {Name: "digest.algorithm", Value: audit.Text("SM3")},
			{Name: "digest.value", Value: digest}, {Name: "document.id", Value: audit.Text("ZY20261118000731")},
			{Name: "document.size", Value: audit.Int(2048)}, {Name: "document.type", Value: audit.Text("discharge-summary")},
			{Name: "form", Value: audit.Text("raw")}, {Name: "request.sm3", Value: digest}, {Name: "role", Value: audit.Text("主治医师")},
			{Name: "signer", Value: audit.Text(fmt.Sprintf("D%05d", n%6300))}, {Name: "stamp", Value: audit.Text("none")},
			{Name: "time.bound_us", Value: audit.Int(1000)},
		},
		Payloads: []audit.Attachment{{Name: "signature", MediaType: "application/octet-stream", Data: payload}},
	}
}

// fill appends until the journal has to entries, and says how far it is.
func (g *growthJournal) fill(ctx context.Context, to uint64, said func(uint64)) error {
	every := max(g.size/growthChanges, 1)
	if g.filled == 0 {
		g.filled = to
	}
	var next, failed atomic.Uint64
	next.Store(g.Size())
	var first error
	var once sync.Once
	var wg sync.WaitGroup
	for range 512 {
		wg.Go(func() {
			for n := next.Add(1) - 1; n < to && failed.Load() == 0; n = next.Add(1) - 1 {
				d := g.draft(n)
				if n%every == every-1 {
					d.Kind, d.State = "account.signer", true
				}
				done := g.Expect()
				_, err := g.Append(ctx, d)
				done()
				if err != nil {
					failed.Store(1)
					once.Do(func() { first = err })
				}
				if n%10_000 == 0 {
					said(n)
				}
			}
		})
	}
	wg.Wait()
	return first
}
