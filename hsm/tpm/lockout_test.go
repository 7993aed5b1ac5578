package tpm_test

import (
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"yinjian/hsm/hsmtest"
	"yinjian/hsm/tpm"
)

// guarded uses an object that counts towards the lock-out, as systemd's sealed keys of a volume do.
func guarded(t *testing.T, socket string) error {
	t.Helper()
	chip, err := linuxudstpm.Open(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer chip.Close()
	parent, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(chip)
	if err != nil {
		t.Fatal(err)
	}
	under := tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)}
	made, err := tpm2.Create{
		ParentHandle: under,
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			UserAuth: tpm2.TPM2BAuth{Buffer: []byte("pin")}, Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: []byte("secret")})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true}}),
	}.Execute(chip)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tpm2.Load{ParentHandle: under, InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(chip)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth([]byte("pin"))}}.Execute(chip)
	return err
}

// Power cuts, one after the other, lock nobody out who forgives them at each start.
func TestForgiveStarts(t *testing.T) {
	t.Parallel()
	cuts := func(c *hsmtest.TPM, each func()) error {
		for range 8 {
			if err := guarded(t, c.Socket); err != nil {
				return err
			}
			each()
			c.Restart(t) // as after a power cut
		}
		return nil
	}
	c := hsmtest.StartTPM(t)
	if err := cuts(c, func() {}); !errors.Is(err, tpm2.TPMRCLockout) {
		t.Fatalf("the TPM locks nobody out: %v; this test shows nothing", err)
	}
	if err := tpm.ForgiveStarts(c.Socket); err != nil {
		t.Fatal(err)
	}
	c.Restart(t)
	if err := guarded(t, c.Socket); err != nil {
		t.Errorf("forgiven when it had locked: %v", err)
	}
	c = hsmtest.StartTPM(t)
	err := cuts(c, func() {
		if err := tpm.ForgiveStarts(c.Socket); err != nil {
			t.Fatal(err)
		}
	})
	if err != nil {
		t.Error(err)
	}
}
