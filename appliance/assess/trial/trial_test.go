package trial_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"testing"

	"yinjian/appliance/assess/trial"
)

func TestKAT(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, k := range trial.RunKAT() {
		if !k.Passed || k.Source == "" {
			t.Errorf("%+v", k)
		}
		seen[strings.Fields(k.Algorithm)[0]] = true
	}
	for _, name := range []string{"SM2", "SM3", "SM4-ECB", "SM4-CBC", "SM4-GCM", "HMAC-SM3", "RSA-2048", "SHA-256"} {
		if !seen[name] {
			t.Errorf("no test of %s", name)
		}
	}
}

// stream is SHA-256 in counter mode: the same on every run, so that the outcome is no chance.
func stream(n int, seed byte) []byte {
	var out []byte
	for i := uint64(0); len(out) < n; i++ {
		var block [9]byte
		block[0] = seed
		binary.BigEndian.PutUint64(block[1:], i)
		sum := sha256.Sum256(block[:])
		out = append(out, sum[:]...)
	}
	return out[:n]
}

// A source that looks random passes; each of some bad ones fails, and the tests that name it.
func TestRandom(t *testing.T) {
	t.Parallel()
	n := trial.Periodic.Bytes()
	good := false // one of five seeds: a good source fails now and then
	for seed := range byte(5) {
		j, err := trial.Test(trial.Periodic, stream(n, seed))
		if err != nil || len(j.Tests) != 12 || j.Needed != 19 {
			t.Fatalf("%+v, %v", j, err)
		}
		good = good || j.Passed
	}
	if !good {
		t.Error("five good streams failed")
	}
	biased := stream(n, 0)
	for i := range biased {
		if i%16 == 0 {
			biased[i] |= 0xF0
		}
	}
	for name, data := range map[string][]byte{
		"zeros": make([]byte, n), "alternating": bytes.Repeat([]byte{0x55}, n), "biased": biased,
		"a short period": bytes.Repeat(stream(250, 0), n/250), "text": bytes.Repeat([]byte("the quick brown fox jumps over t"), n/32+1)[:n],
	} {
		if j, err := trial.Test(trial.Periodic, data); err != nil || j.Passed {
			t.Errorf("%s: %+v, %v", name, j, err)
		}
	}
	short := make([]byte, n-1)
	rand.Read(short)
	for _, set := range []trial.Set{trial.Periodic, trial.PowerOn, "", "other"} {
		if _, err := trial.Test(set, short); err == nil {
			t.Errorf("%q took %d bytes", set, len(short))
		}
	}
}
