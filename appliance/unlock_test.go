package appliance

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/appliance/custody"
	"yinjian/appliance/problem"
	"yinjian/ntp/sysclock"
)

// A passphrase that comes when the last one needed was just given is kept nowhere and ends nothing, and PINs that were unlocked
// are not those of the file, or of the configuration, that took its place: a start anew asks for them.
func TestUnlockOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/secrets", 0o700); err != nil {
		t.Fatal(err)
	}
	holders, words := []string{"张三", "李四", "王五"}, [][]byte{[]byte("sand-and-water-1"), []byte("horse-battery-2"), []byte("correct-staple-3")}
	locked, err := custody.LockPINs(map[string][]byte{"main/log": []byte("1234")}, holders, words, 2)
	if err == nil {
		err = WriteLockedPINs(dir, locked)
	}
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	h := &house{o: Options{Dir: dir}, log: log, state: api.Starting}
	h.keeper.h = h
	if h.sys, err = sysclock.Open(); err != nil {
		t.Fatal(err)
	}
	cfg := &Config{HSM: HSM{PINSource: PINFromUnlock}}
	opens := func(cfg *Config) chan error {
		done := make(chan error, 1)
		go func() { done <- h.keeper.open(t.Context(), cfg) }()
		return done
	}
	stands := func(want api.State) {
		t.Helper()
		for ctx, end := context.WithTimeout(t.Context(), time.Minute); ; time.Sleep(time.Millisecond) {
			if state, _ := h.Standing(); state == want {
				end()
				return
			}
			if ctx.Err() != nil {
				t.Fatalf("not in state %s", want)
			}
		}
	}
	give := func(i int) error {
		_, err := h.keeper.try("somebody", api.Unlock{Holder: holders[i], Passphrase: string(words[i])})
		return err
	}
	opened := opens(cfg)
	stands(api.Locked)
	if err := errors.Join(give(0), give(1), <-opened); err != nil {
		t.Fatal(err)
	}
	var p *problem.Problem
	if err := give(2); !errors.As(err, &p) || p.Code != problem.WrongState || len(h.keeper.given) != 0 {
		t.Errorf("one more than were needed: %v, and %d are kept", err, len(h.keeper.given))
	}
	if err := <-opens(cfg); err != nil || h.pins == nil {
		t.Errorf("a start anew: %v, PINs known %t", err, h.pins != nil)
	}
	if err := os.Chtimes(LockedPINsFile(dir), time.Time{}, time.UnixMilli(1)); err != nil {
		t.Fatal(err)
	}
	opened = opens(cfg)
	stands(api.Locked)
	if err := errors.Join(give(0), give(2), <-opened); err != nil {
		t.Fatal(err)
	}
	damaged := *locked
	damaged.PINs = append(slices.Clone(locked.PINs[:len(locked.PINs)-1]), locked.PINs[len(locked.PINs)-1]^1)
	if err := WriteLockedPINs(dir, &damaged); err != nil {
		t.Fatal(err)
	}
	opened = opens(cfg)
	stands(api.Locked)
	if err := errors.Join(give(0), give(1)); err == nil || len(h.keeper.given) != 0 {
		t.Errorf("damaged PINs: %v, and %d shares are kept", err, len(h.keeper.given))
	}
	if err := errors.Join(WriteLockedPINs(dir, locked), give(0), give(1), <-opened); err != nil {
		t.Errorf("whole ones in their place: %v", err)
	}
	if err := <-opens(&Config{HSM: HSM{PINSource: PINFromFile}}); err != nil || h.pins != nil {
		t.Errorf("PINs from files: %v, unlocked ones known %t", err, h.pins != nil)
	}
}
