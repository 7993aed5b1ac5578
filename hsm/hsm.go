// Package hsm says what the appliance asks of a cipher machine (密码机), without saying how it is reached.
//
// A [Token] is one PKCS#11 token: hsm/pkcs11 drives one through a module, hsm/worker does so in a process of its
// own, and both satisfy the same interface. A [Key] is one key pair on a token, usable as a crypto.Signer; it
// computes SM2's e = SM3(ZA ‖ M) on the host (GM/T 0003.2-2012 §6.1), reads a raw or a DER answer, and verifies a
// fresh signature before it lets go of it. Errors carry their PKCS#11 name and what to do about them ([Class]).
//
// The package is pure: no cgo, no input or output.
package hsm

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
)

// A SlotClass names what a slot's keys are for. Each class has its own slot, PIN and worker process, so that a key
// has one purpose and a caller that holds the staff slot cannot reach the log's key.
type SlotClass string

const (
	Staff SlotClass = "staff" // signers' keys
	TSA   SlotClass = "tsa"   // timestamp units' keys
	Log   SlotClass = "log"   // the journal's checkpoint key and the MAC keys
	CA    SlotClass = "ca"    // the evaluation CA's keys
	TLS   SlotClass = "tls"   // the listener's key
)

// Classes lists every slot class in the order in which they are opened.
var Classes = []SlotClass{Staff, TSA, Log, CA, TLS}

// operations is what each class's keys are for. PSS proves who answers a TLS handshake and nothing else, so a key that
// signs records cannot be made to answer one, and the listener's key makes no MAC and no SM2 signature.
var operations = map[SlotClass][]Operation{
	Staff: {SignSM2E, SignRSASHA256},
	TSA:   {SignSM2E, SignRSASHA256},
	Log:   {SignSM2E, MACSM3},
	CA:    {SignSM2E, SignRSASHA256},
	TLS:   {SignRSAPSSSHA256, SignRSASHA256}, // the second for TLS 1.2 (RFC 5246 §7.4.3)
}

// Check refuses an operation that keys of this class are not for, with CKR_KEY_FUNCTION_NOT_PERMITTED. hsm/worker
// asks it on both sides of its stream, so that no process that drives a slot performs another class's work.
func (c SlotClass) Check(op Operation) error {
	if slices.Contains(operations[c], op) {
		return nil
	}
	return fmt.Errorf("hsm: keys of slot class %q are not for %s: %w", c, op, &Error{Call: "C_SignInit", RV: 0x68})
}

// CheckUse is Check for a key of that label, by whoever asks past what the class's worker does of itself. Units' keys sign
// nothing that is only handed to them, or a caller could have a token of any date signed: what they are for, tokens and
// certificate requests, their worker makes itself (tsa/stamping). What is left are keys that prove a machine's health.
func (c SlotClass) CheckUse(label string, op Operation) error {
	if err := c.Check(op); err != nil {
		return err
	}
	if c == TSA && !IsHealth(label) {
		return fmt.Errorf("hsm: key %q of slot class %q signs what its own worker makes and nothing else: %w", label, c, &Error{Call: "C_SignInit", RV: 0x68})
	}
	return nil
}

// An Algorithm is a kind of key.
type Algorithm string

const (
	SM2     Algorithm = "SM2"      // key pair on sm2p256v1 (GM/T 0003.5-2012)
	RSA2048 Algorithm = "RSA-2048" // key pair, public exponent 65537
	RSA3072 Algorithm = "RSA-3072" // likewise
	HMACSM3 Algorithm = "HMAC-SM3" // 256-bit secret key for HMAC with SM3
	SM4     Algorithm = "SM4"      // 128-bit secret key that wraps others; none is generated here
)

// An Operation is what a key is asked to do with data.
type Operation string

const (
	// SignSM2E signs e (32 bytes), computed by the caller as SM3(ZA ‖ M). The answer is r ‖ s (64 bytes) or the DER
	// of SM2Signature (GM/T 0009-2012 §7.3), as the module gives it; [NormalizeSM2] reads both.
	SignSM2E Operation = "sm2-e"
	// SignSM2M signs a message of at most 512 KiB: the token hashes, with [DefaultSM2ID]. No slot class does it, for e is
	// unambiguous; it is there to learn what a machine can do. The answer is that of SignSM2E.
	SignSM2M Operation = "sm2-m"
	// SignRSASHA256 signs a SHA-256 digest (32 bytes) with RSASSA-PKCS1-v1_5 (RFC 8017 §8.2).
	SignRSASHA256 Operation = "rsa-pkcs1-sha256"
	// SignRSAPSSSHA256 signs a SHA-256 digest (32 bytes) with RSASSA-PSS, MGF1 with SHA-256 and a salt of 32 bytes:
	// rsa_pss_rsae_sha256 of TLS 1.3 (RFC 8446 §4.2.3, RFC 8017 §8.1).
	SignRSAPSSSHA256 Operation = "rsa-pss-sha256"
	// MACSM3 answers HMAC-SM3 over data (32 bytes).
	MACSM3 Operation = "hmac-sm3"
)

// A KeySpec describes a key to be generated on the token. The key is never extractable, unless it is to be wrapped
// ([Token.GenerateWrapped]).
type KeySpec struct {
	Label     string // CKA_LABEL; unique on the token. A wrapped key's is on no token
	ID        []byte // CKA_ID; empty: 16 random bytes
	Algorithm Algorithm
}

// A KeyInfo describes a key that is on the token.
type KeyInfo struct {
	Label     string
	ID        []byte
	Algorithm Algorithm
	// Public is *ecdsa.PublicKey on sm2.P256() for SM2, *rsa.PublicKey for RSA, and nil for a secret key.
	Public crypto.PublicKey
	// Sensitive, Extractable and NeverExtractable are read back from the token (CKA_SENSITIVE …), not assumed.
	Sensitive, Extractable, NeverExtractable bool
	// Trusted is CKA_TRUSTED of a secret key: the security officer has marked it, and keys may be wrapped under it.
	Trusted bool
	// AlwaysSensitive and Local are what the token says of the key's birth: it was never readable, and was made there. Only
	// Keys sets them; nil: the token does not say.
	AlwaysSensitive, Local *bool
	// Uses is how many signatures the token itself says a private key has made, by whomever. Only Keys sets it, and only
	// where the token counts; nil: not available.
	Uses *uint64
}

// TokenInfo is what the token says of itself (CK_TOKEN_INFO, CK_INFO).
type TokenInfo struct {
	Slot            uint
	Label           string
	Manufacturer    string
	Model           string
	Serial          string
	Firmware        string
	Library         string // libraryDescription and version of the module
	MaxSessions     uint   // 0: unknown or unlimited
	Initialized     bool
	UserPINLocked   bool
	UserPINFinalTry bool
}

// A Token is one logged-in PKCS#11 token.
//
// Methods are safe for concurrent use. ctx bounds the wait for a session. Where the token is driven by a worker
// process it bounds the caller's wait for the answer too (the call is then abandoned, and ctx's error returned), and
// each call has a deadline of its own: one that outlives it costs the worker its life and answers [ErrDeadline]. An
// error carries an [*Error] where PKCS#11 gave a return value.
type Token interface {
	Info(ctx context.Context) (TokenInfo, error)
	// GenerateKey makes a key pair or a secret key. It fails with [ErrKeyExists] when the label is taken. It is
	// never retried by anyone below: a lost answer may have left a key behind.
	GenerateKey(ctx context.Context, spec KeySpec) (KeyInfo, error)
	// FindKey answers the one key with this label, [ErrKeyNotFound], or [ErrKeyAmbiguous].
	FindKey(ctx context.Context, label string) (KeyInfo, error)
	Keys(ctx context.Context) ([]KeyInfo, error)
	DestroyKey(ctx context.Context, label string) error
	// Do performs op on data with the key of that label. The key's handle is cached and found again after a
	// reconnect. A failed operation is tried at most once more, and only for the classes that allow it.
	Do(ctx context.Context, label string, op Operation, data []byte) ([]byte, error)
	// GenerateWrapped makes a key pair that stays on no token: it is generated on this one as session objects, sensitive and
	// extractable under a trusted key alone, wrapped under the key labelled kek, and destroyed. The blob and the public key
	// make a [WrappedKey]; they were tried, by a signature that never leaves, before they are answered. Nothing is left
	// behind by a lost answer. It fails with [ErrNoWrapping] where the machine or its profile cannot, and when kek is not
	// trusted or could leave the token.
	GenerateWrapped(ctx context.Context, spec KeySpec, kek string) (KeyInfo, []byte, error)
	// DoWrapped is Do for a wrapped key. The token keeps a bounded number of keys unwrapped, as session objects that can
	// sign and cannot leave, and evicts those that were not used for longest; a key it does not have it unwraps first.
	// Without a blob in key ([WrappedRef]) it answers [ErrNotCached] then. A blob that is not what the key's description says
	// fails with CKR_WRAPPED_KEY_INVALID, and nothing is signed.
	DoWrapped(ctx context.Context, key *WrappedKey, op Operation, data []byte) ([]byte, error)
	// ForgetWrapped destroys the session object of an unwrapped key, if there is one.
	ForgetWrapped(ctx context.Context, digest [32]byte) error
	// Random answers n bytes of the token's random source, 1 ≤ n ≤ 1024.
	Random(ctx context.Context, n int) ([]byte, error)
	Close() error
}

var (
	ErrKeyNotFound  = errors.New("hsm: no key with this label on the token")
	ErrKeyExists    = errors.New("hsm: a key with this label is on the token already")
	ErrKeyAmbiguous = errors.New("hsm: more than one key with this label on the token")
	// ErrDeadline means that the call did not come back in time; its worker was ended and is being replaced.
	// Whether the token performed the operation is not known.
	ErrDeadline = errors.New("hsm: the cipher machine did not answer in time")
	// ErrUnavailable means that no session can be had just now: the worker is being restarted, or the breaker is
	// open. Trying again later is right. Where a worker ended under a call the token may have performed the operation.
	ErrUnavailable = errors.New("hsm: cipher machine unavailable")
	// ErrNeedsOperator means that a PIN was refused. Nothing is tried again until a person has looked: a loop
	// would lock the token.
	ErrNeedsOperator = errors.New("hsm: PIN refused by the token; enter the right PIN and restart, nothing is retried")
	// ErrBadSignature means that a fresh signature did not verify. It was not released.
	ErrBadSignature = errors.New("hsm: the token returned a signature that does not verify; it was withheld")
	// ErrDeclined means that the worker would not do it now, for a reason that is not its cipher machine's, or that what it
	// did is not used and was accounted for. Another machine's worker may do it.
	ErrDeclined = errors.New("hsm: the worker declined")
	// ErrNotCached means that a wrapped key was named by its digest, and that the token does not have it unwrapped.
	ErrNotCached = errors.New("hsm: the wrapped key is not in the token's cache")
	// ErrNoWrapping means that keys cannot be wrapped here, or not under the key in question.
	ErrNoWrapping = errors.New("hsm: keys cannot be wrapped on this cipher machine")
)
