package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
	"yinjian/ntp/sysclock"
	"yinjian/tsa"
)

const benchText = `每一轮依次测量各项，共 7 轮，交错进行；给出中位数、范围与对原始密码运算的比值。
Each round measures every case once, 7 rounds, interleaved; the table gives medians, ranges and ratios.

  raw       C_Sign of SM2 e through PKCS#11, in this process, on the staff token       (the denominator)
  sign      POST /v1/sign, SM2 raw, 2 KiB content, no stamp: TLS 1.3 kept alive, HMAC-SM3, consent, verified fresh
            signature, journal entry on disk before the reply
  stamped   the same with a timestamp token over the signature (two signatures in the cipher machine for each)
  token     POST /tsa/sm2, plain HTTP, SM3 imprint, one journal entry on disk each

Client, appliance and cipher machine share this machine's processors; differences under 15 % say nothing.`

// benchCommand measures; the Makefile's bench calls it. It is no command for a hospital.
func benchCommand() *cobra.Command {
	var dir string
	var seconds float64
	c := &cobra.Command{
		Use: "bench --dir DIR", Hidden: true, Short: "测量 (measure ratios in one run)", Long: benchText, Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			abs, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			return runBench(c.Context(), abs, time.Duration(seconds*float64(time.Second)))
		},
	}
	c.Flags().StringVar(&dir, "dir", "out/bench", "目录，每次重建 (folder, made anew)")
	c.Flags().Float64Var(&seconds, "seconds", 1, "每项每轮秒数 (seconds of each case in each round)")
	return c
}

type benchCase struct {
	name  string
	conns int
	op    func(ctx context.Context) error
	rates []float64
}

func runBench(ctx context.Context, dir string, each time.Duration) (err error) {
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	d := &demo{dir: dir, clock: clock, begun: clock.Monotonic()}
	if err := d.fresh(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stopServer()) }()
	if err := d.startServer(ctx); err != nil {
		return err
	}
	if err := d.register(ctx); err != nil {
		return explain(err)
	}
	unstamped, err := d.open(ctx, "bench-none", "测量", "本部", account.StampNone, string(evidence.AppAsserted))
	if err != nil {
		return explain(err)
	}
	label, err := d.signerKey(ctx)
	if err != nil {
		return err
	}
	pin, err := appliance.ReadSecret(filepath.Join(dir, "secrets", "staff.pin"))
	if err != nil {
		return err
	}
	module, err := defaultModule()
	if err != nil {
		return err
	}
	token, err := pkcs11.Open(ctx, pkcs11.Config{
		Module: module, ModuleArgs: "socket='" + appliance.SofttokenSocket(dir) + "'", TokenLabel: "yinjian-staff", PIN: pin,
		Profile: pkcs11.Neutral, MaxSessions: 16, Log: newLog(logrus.WarnLevel),
	})
	if err != nil {
		return err
	}
	defer token.Close()

	content := make([]byte, 2048)
	if _, err := rand.Read(content); err != nil {
		return err
	}
	var n atomic.Int64
	run := time.Now().UnixNano() // interval: only makes keys of this run differ from another's
	signWith := func(c *client.Client) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.Sign(ctx, fmt.Sprintf("bench-%d-%d", run, n.Add(1)), &wire.SignRequest{
				Signer: "D10023", Algorithm: "SM2", Form: "raw", Content: content, Role: "主治医师",
				Document: wire.Document{ID: "B1", Type: "bench", MediaType: "application/octet-stream"},
				Consent:  wire.Consent{Method: string(evidence.AppAsserted), Assertion: "测量 bench"},
			})
			return err
		}
	}
	imprint := tsa.ImprintOf(content)
	query, err := (&tsa.Request{Imprint: imprint, CertReq: true}).Bytes()
	if err != nil {
		return err
	}
	ops := []struct {
		name string
		op   func(context.Context) error
	}{
		{"raw", func(ctx context.Context) error {
			_, err := token.Do(ctx, label, hsm.SignSM2E, content[:32])
			return err
		}},
		{"sign", signWith(unstamped)},
		{"stamped", signWith(d.emr)},
		{"token", func(ctx context.Context) error {
			reply, err := client.StampPlain(ctx, d.ends.TSASM2, query)
			if err != nil {
				return err
			}
			r, err := tsa.ParseResponse(reply)
			if err == nil {
				err = r.Err()
			}
			return err
		}},
	}
	var cases []*benchCase
	for _, conns := range []int{1, 16} {
		for _, o := range ops {
			cases = append(cases, &benchCase{name: o.name, conns: conns, op: o.op})
		}
	}
	fmt.Println(benchText)
	fmt.Println()
	const rounds = 7
	for round := range rounds {
		for _, c := range cases {
			rate, err := c.measure(ctx, each)
			if err != nil {
				return fmt.Errorf("%s, %d connections: %w", c.name, c.conns, explain(err))
			}
			c.rates = append(c.rates, rate)
		}
		fmt.Printf("\r第 %d/%d 轮 round", round+1, rounds)
	}
	fmt.Printf("\n\n| case | connections | ops/s median | min – max | ratio to raw (median of rounds) |\n| --- | ---: | ---: | ---: | ---: |\n")
	for _, c := range cases {
		raw := cases[0]
		if c.conns != raw.conns {
			raw = cases[len(ops)]
		}
		ratios := make([]float64, rounds)
		for i := range ratios {
			ratios[i] = c.rates[i] / raw.rates[i]
		}
		fmt.Printf("| %s | %d | %.0f | %.0f – %.0f | %.3f |\n", c.name, c.conns, median(c.rates), slices.Min(c.rates), slices.Max(c.rates), median(ratios))
	}
	return nil
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

// measure runs the operation on conns goroutines for about each and answers operations a second.
func (c *benchCase) measure(ctx context.Context, each time.Duration) (float64, error) {
	begun := time.Now() // interval
	var done atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range c.conns {
		wg.Go(func() {
			for time.Since(begun) < each && failed.Load() == nil {
				if err := c.op(ctx); err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return float64(done.Load()) / time.Since(begun).Seconds(), nil
}

// signerKey is the label of the doctor's SM2 key.
func (d *demo) signerKey(ctx context.Context) (string, error) {
	answer, err := d.admin.ListSigners(ctx)
	if err != nil {
		return "", explain(err)
	}
	var signers []account.Signer
	if err := json.Unmarshal(answer, &signers); err != nil {
		return "", err
	}
	for _, s := range signers {
		for _, k := range s.Keys {
			if k.Algorithm == string(hsm.SM2) {
				return k.Label, nil
			}
		}
	}
	return "", errors.New("no SM2 key is enrolled")
}

// open registers an application and answers a client for it.
func (d *demo) open(ctx context.Context, id, name, campus, stamp string, consent ...string) (*client.Client, error) {
	file := filepath.Join(d.dir, "credentials", id+".json")
	err := register(ctx, d.admin, wire.RegisterApplication{
		ID: id, Name: name, Campus: campus, Stamp: stamp, Consent: consent,
		Rights: []string{account.RightSign, account.RightVerify, account.RightTimestamp},
	}, file)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var c credential
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	key, err := hex.DecodeString(strings.TrimSpace(c.Key))
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{BaseURL: d.ends.API, AppID: id, Key: key, RootCAs: d.roots, Clock: d.now})
}
