package tpm_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"testing"

	"yinjian/hsm/hsmtest"
	"yinjian/hsm/tpm"
)

// A secret is opened by the TPM that sealed it, after its restart too, and by no other; registers that differ are named, and
// what was refused is lost to nobody.
func TestSeal(t *testing.T) {
	t.Parallel()
	chip := hsmtest.StartTPM(t)
	secret := []byte("0123456789abcdef0123456789abcdef")
	for _, pcrs := range [][]int{nil, {11, 7}} {
		chip.Restart(t)
		sealed, err := tpm.Seal(chip.Socket, pcrs, secret)
		if err != nil {
			t.Fatal(err)
		}
		file, err := json.Marshal(sealed)
		if err != nil || bytes.Contains(file, secret) {
			t.Fatalf("%s, %v", file, err)
		}
		opens := func(what string) {
			t.Helper()
			if got, err := sealed.Open(chip.Socket); err != nil || !bytes.Equal(got, secret) {
				t.Errorf("%s, PCR %v: %q, %v", what, pcrs, got, err)
			}
		}
		for range 5 { // nothing stays behind in the TPM, which has room for three objects
			opens("at once")
		}
		chip.Restart(t)
		opens("after a restart")
		chip.Extend(t, 8)
		opens("another register changed")
		chip.Extend(t, 11)
		if pcrs == nil {
			opens("a register changed")
		} else {
			var changed *tpm.ChangedError
			if _, err := sealed.Open(chip.Socket); !errors.As(err, &changed) || !slices.Equal(changed.PCRs, []int{11}) {
				t.Errorf("PCR 11 changed: %v", err)
			}
			chip.Restart(t)
			opens("started again as it was")
			lied := *sealed
			lied.PCRs, lied.Values = nil, nil
			if _, err := lied.Open(chip.Socket); !errors.As(err, &changed) {
				t.Errorf("without naming registers: %v", err)
			}
		}
		other := hsmtest.StartTPM(t)
		if _, err := sealed.Open(other.Socket); !errors.Is(err, tpm.ErrOther) {
			t.Errorf("another TPM: %v", err)
		}
		for i := range sealed.Private {
			damaged := *sealed
			damaged.Private = bytes.Clone(sealed.Private)
			damaged.Private[i] ^= 1
			if _, err := damaged.Open(chip.Socket); !errors.Is(err, tpm.ErrOther) {
				t.Fatalf("damaged at %d: %v", i, err)
			}
		}
		opens("after all of that")
	}
	if _, err := tpm.Seal(chip.Socket, []int{16}, secret); err == nil {
		t.Error("sealed to a register that anybody may reset")
	}
	var empty *tpm.EmptyError
	if _, err := tpm.Seal(chip.Socket, []int{7, 12}, secret); !errors.As(err, &empty) || !slices.Equal(empty.PCRs, []int{12}) {
		t.Errorf("a register that nothing is measured into: %v", err)
	}
	chip.Stop(t)
	if _, err := (&tpm.Sealed{}).Open(chip.Socket); err == nil {
		t.Error("opened without a TPM")
	}
	if _, err := tpm.Seal(chip.Socket, nil, secret); !errors.Is(err, tpm.ErrUnavailable) {
		t.Errorf("without a TPM: %v", err)
	}
}

// What is sealed to a register does not open any more once an event was added to it, until the machine starts again.
func TestExtend(t *testing.T) {
	t.Parallel()
	chip := hsmtest.StartTPM(t)
	secret := []byte("0123456789abcdef0123456789abcdef")
	sealed, err := tpm.Seal(chip.Socket, []int{11}, secret)
	if err != nil {
		t.Fatal(err)
	}
	if err := tpm.Extend(chip.Socket, 11, "opened"); err != nil {
		t.Fatal(err)
	}
	var changed *tpm.ChangedError
	if _, err := sealed.Open(chip.Socket); !errors.As(err, &changed) || !slices.Equal(changed.PCRs, []int{11}) {
		t.Errorf("after an event: %v", err)
	}
	chip.Restart(t)
	if got, err := sealed.Open(chip.Socket); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("after a restart: %v", err)
	}
	chip.Stop(t)
	if err := tpm.Extend(chip.Socket, 11, "opened"); !errors.Is(err, tpm.ErrUnavailable) {
		t.Errorf("without a TPM: %v", err)
	}
}

// Whoever listens between the process and its TPM does not see the secret.
func TestSecretIsNotOnTheWires(t *testing.T) {
	t.Parallel()
	chip := hsmtest.StartTPM(t)
	secret := []byte("0123456789abcdef0123456789abcdef")
	path, heard := chip.Listen(t)
	sealed, err := tpm.Seal(path, []int{7}, secret)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := sealed.Open(path); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%q, %v", got, err)
	}
	if b := heard(); len(b) < 1000 || bytes.Contains(b, secret) {
		t.Errorf("%d bytes were heard, the secret among them: %v", len(b), bytes.Contains(b, secret))
	}
}
