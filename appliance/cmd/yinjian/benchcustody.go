package main

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	mrand "math/rand/v2"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance"
	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
)

const (
	benchWrapped      = 100_000 // custody keys
	benchWrappedCache = 10_000  // of them unwrapped at most
	benchWrappedSmall = 4       // so few that none of benchWrappedMiss keys taken in turn is there when its turn comes
	benchWrappedMiss  = 1024
)

// wrappedKeys makes custody keys under a wrapping key that it brings onto the staff token. The blobs are made in this
// process, as the machine would make them: 100,000 key pairs of the machine's would take minutes, and sign no otherwise.
func (b *bench) wrappedKeys() ([]*hsm.WrappedKey, error) {
	kek := make([]byte, pkcs11.KEKSize)
	rand.Read(kek) // never fails (crypto/rand)
	label := fmt.Sprintf("kek/bench-%x", kek[:4])
	profile, err := pkcs11.ProfileByName("neutral")
	if err != nil {
		return nil, err
	}
	module, err := defaultModule()
	if err != nil {
		return nil, err
	}
	cfg := pkcs11.KEKConfig{Module: module, ModuleArgs: "socket='" + appliance.SofttokenSocket(b.dir) + "'", TokenLabel: "yinjian-staff", Profile: profile, Label: label, Value: kek}
	for name, pin := range map[string]*[]byte{"staff.pin": &cfg.UserPIN, "staff.so-pin": &cfg.SOPIN} {
		if *pin, err = appliance.ReadSecret(filepath.Join(b.dir, "secrets", name)); err != nil {
			return nil, err
		}
	}
	if err := pkcs11.InstallKEK(cfg); err != nil {
		return nil, err
	}
	block, err := sm4.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	keys := make([]*hsm.WrappedKey, benchWrapped)
	for i := range keys {
		key, err := sm2.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		der, err := smx509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("staff/bench/%d", i)
		aad, err := hsm.WrappingAAD(name, hsm.SM2, &key.PublicKey)
		if err != nil {
			return nil, err
		}
		nonce := make([]byte, aead.NonceSize())
		rand.Read(nonce) // never fails (crypto/rand)
		if keys[i], err = hsm.NewWrappedKey(name, hsm.SM2, &key.PublicKey, label, aead.Seal(nonce, nonce, der, aad)); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// zipf draws from n with weights 1/1, 1/2, … 1/n: Zipf's law with s = 1.0, which math/rand's sampler does not reach.
func zipf(n int) func() int {
	sums := make([]float64, n)
	sum := 0.0
	for i := range sums {
		sum += 1 / float64(i+1)
		sums[i] = sum
	}
	return func() int {
		i, _ := slices.BinarySearch(sums, mrand.Float64()*sum)
		return min(i, n-1)
	}
}

// custody answers the cases of custody keys: one key that is unwrapped, keys none of which is, and all of them as often as
// Zipf's law has it.
func (b *bench) custody(ctx context.Context) (hit, miss, mixed func(context.Context, int) error, err error) {
	keys, err := b.wrappedKeys()
	if err != nil {
		return nil, nil, nil, err
	}
	large, err := b.staffWorker(benchWrappedCache)
	if err != nil {
		return nil, nil, nil, err
	}
	small, err := b.staffWorker(benchWrappedSmall)
	if err != nil {
		return nil, nil, nil, err
	}
	e := sm3.Sum(nil)
	sign := func(token hsm.Token, key func() *hsm.WrappedKey) func(context.Context, int) error {
		return func(ctx context.Context, _ int) error {
			_, err := token.DoWrapped(ctx, key(), hsm.SignSM2E, e[:])
			return err
		}
	}
	var turn atomic.Int64
	draw := zipf(benchWrapped)
	hit = sign(large, func() *hsm.WrappedKey { return keys[0] })
	miss = sign(small, func() *hsm.WrappedKey { return keys[turn.Add(1)%benchWrappedMiss] })
	mixed = sign(large, func() *hsm.WrappedKey { return keys[draw()] })
	// The cache is as full as it will be before the first round.
	for range 4 * benchWrappedCache {
		if err := mixed(ctx, 0); err != nil {
			return nil, nil, nil, err
		}
	}
	return hit, miss, mixed, nil
}
