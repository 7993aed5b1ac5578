// Package tpm seals a secret to a Trusted Platform Module, so that this machine alone opens it, and, where registers are named,
// only as it was started when the secret was sealed.
//
// The object is a sealed data object under the storage root key of the owner hierarchy, made anew from its template each time
// and never kept in the TPM: nothing is written there, and nothing there can be used up. Its policy is PolicyCommandCode(Unseal)
// after PolicyPCR over the SHA-256 bank where registers are named; it has no password, and a failure counts towards no
// lock-out. What goes between process and TPM is encrypted under a session that is salted to the storage root key, which keeps
// out whoever listens at the chip's wires, not whoever answers in its place.
//
// Library: github.com/google/go-tpm. Documents: TPM 2.0 Library, Part 3, revision 1.59 (Create, Load, Unseal, PolicyPCR,
// PolicyCommandCode); TCG TPM v2.0 Provisioning Guidance 1.0 (the template of the storage root key, ECC P-256).
package tpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

var (
	// ErrUnavailable means that there is no TPM at the path, or that it does not answer: this may pass.
	ErrUnavailable = errors.New("hsm/tpm: the TPM cannot be reached")
	// ErrOther means that another TPM sealed it, or this one before it was cleared, or that what was kept is damaged.
	ErrOther = errors.New("hsm/tpm: not what this TPM has sealed")
)

// An EmptyError means that nothing was measured into registers since the machine was started: any other system leaves them so too,
// and a secret that is sealed to them is sealed to nothing.
type EmptyError struct{ PCRs []int }

func (e *EmptyError) Error() string {
	return fmt.Sprintf("hsm/tpm: nothing is measured into the registers: PCR %v", e.PCRs)
}

// A ChangedError means that registers are not what they were when the secret was sealed.
type ChangedError struct{ PCRs []int }

func (e *ChangedError) Error() string {
	return fmt.Sprintf("hsm/tpm: registers differ from those it was sealed to: PCR %v", e.PCRs)
}

const (
	// MaxPCR is the last register that is reset by a restart alone (PC Client Platform TPM Profile 1.05 §4.6: 16 and 23 are for
	// debugging and applications, 17 to 22 are reset by a late launch).
	MaxPCR = 15
	// MaxSecret is the greatest size of a secret, in bytes: what every TPM takes (MAX_SYM_DATA).
	MaxSecret = 128
)

// A Sealed is what is kept of a secret. It is no secret itself.
type Sealed struct {
	PCRs []int `json:"pcrs,omitempty"`
	// Values are the registers' then, in the order of PCRs, to name those that differ; the TPM does not believe them.
	Values  [][]byte `json:"values,omitempty"`
	Public  []byte   `json:"public"`  // TPM2B_PUBLIC
	Private []byte   `json:"private"` // TPM2B_PRIVATE, encrypted by the TPM
}

// Seal seals secret, of 1 to [MaxSecret] bytes, at the TPM whose character device or Unix socket is at path, to the present
// values of the registers pcrs (0 to [MaxPCR]), if any. It opens what it has sealed before it answers. Registers that nobody
// measures into are an [*EmptyError].
func Seal(path string, pcrs []int, secret []byte) (*Sealed, error) {
	if len(secret) == 0 || len(secret) > MaxSecret {
		return nil, fmt.Errorf("hsm/tpm: a secret has 1 to %d bytes", MaxSecret)
	}
	t, err := open(path)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	s := &Sealed{PCRs: slices.Sorted(slices.Values(pcrs))}
	if s.Values, err = registers(t, s.PCRs); err != nil {
		return nil, err
	}
	empty := &EmptyError{}
	for i, v := range s.Values {
		if bytes.Equal(v, make([]byte, len(v))) {
			empty.PCRs = append(empty.PCRs, s.PCRs[i])
		}
	}
	if len(empty.PCRs) > 0 {
		return nil, empty
	}
	digest, err := s.policyDigest(t)
	if err != nil {
		return nil, err
	}
	err = s.under(t, func(parent tpm2.AuthHandle, salted tpm2.AuthOption) error {
		parent.Auth = tpm2.HMAC(tpm2.TPMAlgSHA256, 16, salted, tpm2.AESEncryption(128, tpm2.EncryptIn))
		made, err := tpm2.Create{
			ParentHandle: parent,
			InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret})}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true}, // not UserWithAuth: by the policy alone
			}),
		}.Execute(t)
		if err != nil {
			return answered("TPM2_Create", err)
		}
		s.Public, s.Private = tpm2.Marshal(made.OutPublic), tpm2.Marshal(made.OutPrivate)
		return nil
	})
	if err != nil {
		return nil, err
	}
	again, err := s.unseal(t)
	if err != nil {
		return nil, fmt.Errorf("opening what was sealed: %w", err)
	}
	defer clear(again)
	if !bytes.Equal(again, secret) {
		return nil, errors.New("hsm/tpm: what was sealed opens as something else")
	}
	return s, nil
}

// Open answers the secret. It fails with [ErrUnavailable], [ErrOther] or a [*ChangedError]; nothing is lost by that. The
// caller wipes the secret.
func (s *Sealed) Open(path string) ([]byte, error) {
	t, err := open(path)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return s.unseal(t)
}

func open(path string) (transport.TPMCloser, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	var t transport.TPMCloser
	if st.Mode()&os.ModeSocket != 0 {
		t, err = linuxudstpm.Open(path)
	} else {
		t, err = linuxtpm.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return t, nil
}

// answered tells what the TPM said from its saying nothing.
func answered(what string, err error) error {
	if code := tpm2.TPMRC(0); errors.As(err, &code) {
		return fmt.Errorf("hsm/tpm: %s: %w", what, err)
	}
	return fmt.Errorf("%w: %s: %w", ErrUnavailable, what, err)
}

// under runs do with the storage root key, and an option that salts a session to it.
func (s *Sealed) under(t transport.TPM, do func(parent tpm2.AuthHandle, salted tpm2.AuthOption) error) (err error) {
	srk, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
	if err != nil {
		return answered("TPM2_CreatePrimary", err)
	}
	defer func() { err = errors.Join(err, flush(t, srk.ObjectHandle)) }()
	public, err := srk.OutPublic.Contents()
	if err != nil {
		return err
	}
	return do(tpm2.AuthHandle{Handle: srk.ObjectHandle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)}, tpm2.Salted(srk.ObjectHandle, *public))
}

func flush(t transport.TPM, handle tpm2.TPMHandle) error {
	if _, err := (tpm2.FlushContext{FlushHandle: handle}).Execute(t); err != nil {
		return answered("TPM2_FlushContext", err)
	}
	return nil
}

func selection(pcrs []int) tpm2.TPMLPCRSelection {
	var which []uint
	for _, n := range pcrs {
		which = append(which, uint(n))
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(which...)}}}
}

// registers reads the registers one by one: a TPM may answer fewer than it is asked for.
func registers(t transport.TPM, pcrs []int) ([][]byte, error) {
	var out [][]byte
	for i, n := range pcrs {
		if n < 0 || n > MaxPCR || i > 0 && n == pcrs[i-1] {
			return nil, fmt.Errorf("hsm/tpm: PCR %d: registers 0 to %d, each once", n, MaxPCR)
		}
		got, err := tpm2.PCRRead{PCRSelectionIn: selection([]int{n})}.Execute(t)
		if err != nil {
			return nil, answered("TPM2_PCR_Read", err)
		}
		if len(got.PCRValues.Digests) != 1 {
			return nil, fmt.Errorf("hsm/tpm: PCR %d: the TPM has no bank of SHA-256", n)
		}
		out = append(out, got.PCRValues.Digests[0].Buffer)
	}
	return out, nil
}

// policy is what has to be said in a session before the secret is given out.
func (s *Sealed) policy(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
	if len(s.PCRs) > 0 {
		if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(s.PCRs)}).Execute(t); err != nil {
			return err
		}
	}
	_, err := tpm2.PolicyCommandCode{PolicySession: session, Code: tpm2.TPMCCUnseal}.Execute(t)
	return err
}

// policyDigest has the TPM compute the policy's digest, over the present registers.
func (s *Sealed) policyDigest(t transport.TPM) (_ []byte, err error) {
	session, closeSession, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
	if err != nil {
		return nil, answered("TPM2_StartAuthSession", err)
	}
	defer func() { err = errors.Join(err, closeSession()) }()
	if err := s.policy(t, session.Handle(), session.NonceTPM()); err != nil {
		return nil, answered("TPM2_PolicyPCR", err)
	}
	digest, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(t)
	if err != nil {
		return nil, answered("TPM2_PolicyGetDigest", err)
	}
	return digest.PolicyDigest.Buffer, nil
}

func (s *Sealed) unseal(t transport.TPM) (secret []byte, err error) {
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](s.Public)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOther, err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](s.Private)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOther, err)
	}
	err = s.under(t, func(parent tpm2.AuthHandle, salted tpm2.AuthOption) (err error) {
		object, err := tpm2.Load{ParentHandle: parent, InPrivate: *private, InPublic: *public}.Execute(t)
		if err != nil {
			if err = answered("TPM2_Load", err); !errors.Is(err, ErrUnavailable) {
				err = fmt.Errorf("%w: %w", ErrOther, err) // TPM_RC_INTEGRITY: not under this storage root key
			}
			return err
		}
		defer func() { err = errors.Join(err, flush(t, object.ObjectHandle)) }()
		said, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
			Handle: object.ObjectHandle, Name: object.Name,
			Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, s.policy, salted, tpm2.AESEncryption(128, tpm2.EncryptOut)),
		}}.Execute(t)
		if errors.Is(err, tpm2.TPMRCPolicyFail) {
			return s.changed(t)
		}
		if err != nil {
			return answered("TPM2_Unseal", err)
		}
		secret = said.OutData.Buffer
		return nil
	})
	if err != nil {
		clear(secret)
		return nil, err
	}
	return secret, nil
}

// changed says which registers differ.
func (s *Sealed) changed(t transport.TPM) error {
	now, err := registers(t, s.PCRs)
	if err != nil {
		return err
	}
	e := &ChangedError{}
	for i, n := range s.PCRs {
		if i >= len(s.Values) || !bytes.Equal(now[i], s.Values[i]) {
			e.PCRs = append(e.PCRs, n)
		}
	}
	return e
}

// ForgiveStarts sets back the count by which the TPM at path locks out whoever guesses. Each power cut counts as a guess where an
// object of others was used that is not exempt (TPM 2.0 Library, Part 1, revision 1.59, 19.8.6: after a restart without
// TPM2_Shutdown): a machine whose power goes three times would not open its data. It ends a lock-out, too, and
// is for a TPM on which nothing has a password to guess. It fails where the lockout hierarchy has one.
func ForgiveStarts(path string) error {
	t, err := open(path)
	if err != nil {
		return err
	}
	defer t.Close()
	// The library has no such command: header, the lockout hierarchy, and a session of an empty password (Part 3, 25.2).
	const size = 10 + 4 + 4 + 9
	be := binary.BigEndian
	command := be.AppendUint32(be.AppendUint16(nil, uint16(tpm2.TPMSTSessions)), size)
	command = be.AppendUint32(be.AppendUint32(command, uint32(tpm2.TPMCCDictionaryAttackLockReset)), uint32(tpm2.TPMRHLockout))
	command = be.AppendUint32(be.AppendUint32(command, 9), uint32(tpm2.TPMRSPW))
	answer, err := t.Send(append(command, 0, 0, 0, 0, 0)) // no nonce, no attributes, no password
	if err == nil && len(answer) < 10 {
		err = fmt.Errorf("an answer of %d bytes", len(answer))
	}
	if err == nil {
		if code := tpm2.TPMRC(be.Uint32(answer[6:])); code != tpm2.TPMRCSuccess {
			err = code
		}
	}
	if err != nil {
		return answered("TPM2_DictionaryAttackLockReset", err)
	}
	return nil
}

// Extend adds an event to a register, in every bank the TPM has (TPM 2.0 Library, Part 3, TPM2_PCR_Event): until the machine starts anew
// nothing opens any more that is sealed to the register as it was.
func Extend(path string, pcr int, event string) error {
	t, err := open(path)
	if err != nil {
		return err
	}
	defer t.Close()
	_, err = tpm2.PCREvent{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		EventData: tpm2.TPM2BEvent{Buffer: []byte(event)},
	}.Execute(t)
	if err != nil {
		return answered("TPM2_PCR_Event", err)
	}
	return nil
}
