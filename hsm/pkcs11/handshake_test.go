package pkcs11_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/worker"
)

// drive is this test binary as the worker of a slot.
func drive() int {
	inherited, err := worker.Inherited()
	var conn io.ReadWriteCloser
	if err == nil {
		conn, err = spoilable(inherited)
	}
	if err == nil {
		err = worker.Serve(context.Background(), conn, func(ctx context.Context, p worker.StartParams) (hsm.Token, error) {
			return pkcs11.Open(ctx, pkcs11.Config{Module: p.Module, ModuleArgs: p.ModuleArgs, TokenLabel: p.TokenLabel, PIN: p.PIN,
				Profile: shipped("neutral"), MaxSessions: p.MaxSessions, WrappedKeys: p.WrappedKeys, BeforeLogin: p.BeforeLogin, Log: quiet()})
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// startWorker drives the machine's token by a process of its own, as the listener's key is driven.
func (m *machine) startWorker(t testing.TB) *worker.Client {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w, err := worker.Start(worker.Config{Command: []string{self, "worker"}, Class: hsm.TLS, Log: quiet(), Params: worker.StartParams{
		Module: m.module, ModuleArgs: m.cfg.ModuleArgs, TokenLabel: m.cfg.TokenLabel, PIN: m.cfg.PIN, Profile: "neutral", MaxSessions: 8,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// handshaker listens with key and answers a function that makes one connection.
func handshaker(t testing.TB, key crypto.Signer, cache tls.ClientSessionCache, version uint16) func() (tls.ConnectionState, error) {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.PSSWithSHA256, tls.PKCS1WithSHA256}}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = c.Write([]byte{1}) // a ticket goes before it
				_ = c.Close()
			}()
		}
	}()
	cfg := &tls.Config{InsecureSkipVerify: true, ServerName: "x", ClientSessionCache: cache, MinVersion: version, MaxVersion: version}
	return func() (tls.ConnectionState, error) {
		c, err := tls.Dial("tcp", ln.Addr().String(), cfg)
		if err != nil {
			return tls.ConnectionState{}, err
		}
		defer c.Close()
		_, err = io.ReadFull(c, make([]byte, 1))
		return c.ConnectionState(), err
	}
}

// TestHandshakes: crypto/tls proves itself with a key in the cipher machine, through the worker, in both versions.
func TestHandshakes(t *testing.T) {
	w := newMachine(t).startWorker(t)
	generate(t, w, "tls/api", hsm.RSA2048)
	key, err := hsm.NewKey(t.Context(), w, "tls/api", true)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if s, err := handshaker(t, key, nil, version)(); err != nil || s.Version != version || !key.Public().(*rsa.PublicKey).Equal(s.PeerCertificates[0].PublicKey) {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
	}
}

// BenchmarkHandshake compares TLS 1.3 handshakes with a key in this process, with one in the cipher machine behind its
// worker (each signature verified afresh, as the appliance does), and resumed, in one run: seven interleaved rounds of
// 200 connections over 8 goroutines each, medians of the rates, and the processor time of a handshake: of this process,
// client and server, and of the worker and the software cipher machine. The rates are a quiet machine's only: a busy one
// gives three processes more than one.
func BenchmarkHandshake(b *testing.B) {
	file, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		b.Fatal(err)
	}
	m := newMachine(b)
	w := m.startWorker(b)
	generate(b, w, "tls/api", hsm.RSA2048)
	slot, err := hsm.NewKey(b.Context(), w, "tls/api", true)
	if err != nil {
		b.Fatal(err)
	}
	ways := []struct {
		name    string
		resumes bool
		connect func() (tls.ConnectionState, error)
	}{
		{"file", false, handshaker(b, file, nil, tls.VersionTLS13)},
		{"machine", false, handshaker(b, slot, nil, tls.VersionTLS13)},
		{"resumed", true, handshaker(b, slot, tls.NewLRUClientSessionCache(1), tls.VersionTLS13)},
	}
	for _, way := range ways { // the first ticket
		if _, err := way.connect(); err != nil {
			b.Fatal(err)
		}
	}
	const rounds = 7
	var rate [3][rounds]float64 // handshakes a second
	var spent [3][2]time.Duration
	made := 0 // handshakes of each way
	for b.Loop() {
		for r := range rounds {
			for i, way := range ways {
				begin, own, machine := time.Now(), processorTime(b, os.Getpid()), processorTime(b, w.State().PID, m.process.Process.Pid)
				var wg sync.WaitGroup
				for range 8 {
					wg.Go(func() {
						for range 25 {
							if s, err := way.connect(); err != nil || s.DidResume != way.resumes {
								b.Errorf("%s: resumed %v, %v", way.name, s.DidResume, err)
								return
							}
						}
					})
				}
				wg.Wait()
				rate[i][r] = 8 * 25 / time.Since(begin).Seconds()
				spent[i][0] += processorTime(b, os.Getpid()) - own
				spent[i][1] += processorTime(b, w.State().PID, m.process.Process.Pid) - machine
			}
			made += 8 * 25
		}
	}
	for i, way := range ways {
		slices.Sort(rate[i][:])
		b.ReportMetric(rate[i][rounds/2], way.name+"/s")
		b.ReportMetric(float64(spent[i][0].Microseconds())/float64(made), way.name+"-own-cpu-us")
		b.ReportMetric(float64(spent[i][1].Microseconds())/float64(made), way.name+"-machine-cpu-us")
	}
}

// processorTime is what the processes have used, to a hundredth of a second (proc(5), fields 14 and 15 of stat).
func processorTime(t testing.TB, pids ...int) (sum time.Duration) {
	t.Helper()
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		var user, system int64
		if f := strings.Fields(rest); len(f) > 12 {
			user, _ = strconv.ParseInt(f[11], 10, 64)
			system, _ = strconv.ParseInt(f[12], 10, 64)
		}
		sum += time.Duration(user+system) * 10 * time.Millisecond
	}
	return sum
}
