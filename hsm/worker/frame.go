package worker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/big"
	"slices"

	"github.com/emmansun/gmsm/sm2"

	"yinjian/hsm"
)

// A frame on the stream, integers big-endian:
//
//	u32 length of what follows | u8 kind | u64 id | body
//
// id correlates a call and its answer; it is 0 in the frames of the start. Byte strings are u32 length and bytes.
type kind uint8

const (
	// Parent to child.
	kindStart kind = iota + 1 // version, class, module, arguments, label, profile, sessions, use log, extension, PIN; once, first
	kindInfo
	kindGenerate
	kindFind
	kindKeys
	kindDestroy
	kindDo
	kindRandom
	kindGenerateWrapped
	kindDoWrapped
	kindForget
	kindExtend // to the child's extension; request and answer are its own
	kindSelfTest
	// Child to parent.
	kindLogin  kind = 0x81 // C_Login is about to be called
	kindReady  kind = 0x82 // u32 sessions
	kindFailed kind = 0x83 // the token could not be opened: error
	kindResult kind = 0x84 // body of the call
	kindError  kind = 0x85 // error
)

// protocolVersion changes with any change here: parent and child are the same binary, but an update may replace it
// while the parent runs.
const protocolVersion = 9

const (
	headerSize = 4 + 1 + 8
	// maxRequest holds the largest Do, 512 KiB, with a wrapped key; maxAnswer some 30,000 keys.
	maxRequest = 512<<10 + maxBlob + 4096
	maxAnswer  = 16 << 20
	maxData    = 512 << 10
	maxString  = 4096
	maxPIN     = 255
	maxBlob    = 8 << 10 // a wrapped key
	// maxExtension holds a list of time servers and units, and more than a request to them.
	maxExtension = 128 << 10
)

var errFrame = errors.New("hsm/worker: malformed frame")

// begin makes room for the header; end writes it.
func begin(k kind, id uint64) []byte {
	b := make([]byte, headerSize, headerSize+256)
	b[4] = byte(k)
	binary.BigEndian.PutUint64(b[5:], id)
	return b
}

func end(b []byte) []byte {
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// readFrame reads one frame of at most most bytes of body. The body is the caller's.
func readFrame(r io.Reader, most int) (kind, uint64, []byte, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[:])
	if n < headerSize-4 || n-(headerSize-4) > uint32(most) {
		return 0, 0, nil, fmt.Errorf("%w: length %d", errFrame, n)
	}
	body := make([]byte, n-(headerSize-4))
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, 0, nil, err
	}
	return kind(h[4]), binary.BigEndian.Uint64(h[5:]), body, nil
}

func addBytes[T string | []byte](b []byte, v T) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(v)))
	return append(b, v...)
}

func addBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

// A scanner takes a body apart. After the first misfit everything it answers is zero, and done answers errFrame.
type scanner struct {
	b   []byte
	bad bool
}

func (s *scanner) take(n int) []byte {
	if s.bad || n > len(s.b) {
		s.bad = true
		return nil
	}
	v := s.b[:n:n]
	s.b = s.b[n:]
	return v
}

func (s *scanner) u8() uint8 {
	if v := s.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (s *scanner) u16() uint16 {
	if v := s.take(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

func (s *scanner) u32() uint32 {
	if v := s.take(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

func (s *scanner) u64() uint64 {
	if v := s.take(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

func (s *scanner) boolean() bool {
	v := s.u8()
	s.bad = s.bad || v > 1
	return v == 1
}

// bytes borrows the body.
func (s *scanner) bytes(most int) []byte {
	n := s.u32()
	if n > uint32(most) {
		s.bad = true
		return nil
	}
	return s.take(int(n))
}

func (s *scanner) string() string { return string(s.bytes(maxString)) }

func (s *scanner) done() error {
	if s.bad || len(s.b) > 0 {
		return errFrame
	}
	return nil
}

// Public keys: none, an SM2 point (65 bytes, uncompressed), or an RSA modulus and exponent.
const (
	publicNone uint8 = iota
	publicSM2
	publicRSA
)

func addKeyInfo(b []byte, k hsm.KeyInfo) ([]byte, error) {
	b = addBytes(b, k.Label)
	b = addBytes(b, k.ID)
	b = addBytes(b, string(k.Algorithm))
	b = addBool(b, k.Sensitive)
	b = addBool(b, k.Extractable)
	b = addBool(b, k.NeverExtractable)
	b = addBool(b, k.Trusted)
	b = addOptional(b, k.AlwaysSensitive)
	b = addOptional(b, k.Local)
	b, err := addPublic(b, k.Label, k.Public)
	if err != nil {
		return nil, err
	}
	if b = addBool(b, k.Uses != nil); k.Uses != nil {
		b = binary.BigEndian.AppendUint64(b, *k.Uses)
	}
	return b, nil
}

// addOptional adds 0 for nil, otherwise 1 and the value.
func addOptional(b []byte, v *bool) []byte {
	if v == nil {
		return append(b, 0)
	}
	return addBool(append(b, 1), *v)
}

func (s *scanner) optional() *bool {
	if !s.boolean() {
		return nil
	}
	v := s.boolean()
	return &v
}

func addPublic(b []byte, label string, public crypto.PublicKey) ([]byte, error) {
	switch p := public.(type) {
	case nil:
		return append(b, publicNone), nil
	case *ecdsa.PublicKey:
		if !sm2.IsSM2PublicKey(p) || !p.Curve.IsOnCurve(p.X, p.Y) {
			return nil, fmt.Errorf("hsm/worker: key %q: not on the SM2 curve", label)
		}
		return append(append(b, publicSM2), elliptic.Marshal(p.Curve, p.X, p.Y)...), nil
	case *rsa.PublicKey:
		if p.E < 2 || p.E > math.MaxInt32 || p.N == nil || p.N.Sign() <= 0 {
			return nil, fmt.Errorf("hsm/worker: key %q: RSA public key", label)
		}
		return binary.BigEndian.AppendUint32(addBytes(append(b, publicRSA), p.N.Bytes()), uint32(p.E)), nil
	default:
		return nil, fmt.Errorf("hsm/worker: key %q: public key of type %T", label, p)
	}
}

func (s *scanner) keyInfo() hsm.KeyInfo {
	k := hsm.KeyInfo{Label: s.string()}
	if id := s.bytes(maxString); len(id) > 0 {
		k.ID = append([]byte(nil), id...)
	}
	k.Algorithm = hsm.Algorithm(s.string())
	k.Sensitive, k.Extractable, k.NeverExtractable, k.Trusted = s.boolean(), s.boolean(), s.boolean(), s.boolean()
	k.AlwaysSensitive, k.Local = s.optional(), s.optional()
	k.Public = s.public()
	if s.boolean() {
		n := s.u64()
		k.Uses = &n
	}
	return k
}

func (s *scanner) public() crypto.PublicKey {
	switch s.u8() {
	case publicNone:
		return nil
	case publicSM2:
		if point := s.take(65); point != nil && point[0] == 4 {
			if pub, err := sm2.NewPublicKey(point); err == nil {
				return pub
			}
		}
	case publicRSA:
		if raw, e := s.bytes(maxString), s.u32(); len(raw) > 0 && raw[0] != 0 && e >= 2 && e <= math.MaxInt32 {
			return &rsa.PublicKey{N: new(big.Int).SetBytes(raw), E: int(e)}
		}
	}
	s.bad = true
	return nil
}

// addWrapped adds digest and label of a wrapped key and, with whole, what it takes to unwrap it.
func addWrapped(b []byte, k *hsm.WrappedKey, whole bool) ([]byte, error) {
	digest := k.Digest()
	b = append(b, digest[:]...)
	b = addBytes(b, k.Label)
	if b = addBool(b, whole); !whole {
		return b, nil
	}
	b = addBytes(b, string(k.Algorithm))
	b, err := addPublic(b, k.Label, k.Public)
	if err != nil {
		return nil, err
	}
	return addBytes(addBytes(b, k.KEK), k.Blob), nil
}

// wrapped answers a key whose blob is a copy. It is nil when the scanner is bad.
func (s *scanner) wrapped() *hsm.WrappedKey {
	var digest [32]byte
	copy(digest[:], s.take(len(digest)))
	label := s.string()
	if !s.boolean() {
		return hsm.WrappedRef(digest, label)
	}
	alg, public, kek, blob := hsm.Algorithm(s.string()), s.public(), s.string(), bytes.Clone(s.bytes(maxBlob))
	if s.bad {
		return nil
	}
	k, err := hsm.NewWrappedKey(label, alg, public, kek, blob)
	if err != nil || k.Digest() != digest {
		s.bad = true
		return nil
	}
	return k
}

func addTokenInfo(b []byte, t hsm.TokenInfo) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(t.Slot))
	for _, v := range []string{t.Label, t.Manufacturer, t.Model, t.Serial, t.Firmware, t.Library} {
		b = addBytes(b, v)
	}
	b = binary.BigEndian.AppendUint64(b, uint64(t.MaxSessions))
	b = addBool(b, t.Initialized)
	b = addBool(b, t.UserPINLocked)
	return addBool(b, t.UserPINFinalTry)
}

func (s *scanner) tokenInfo() hsm.TokenInfo {
	return hsm.TokenInfo{
		Slot: uint(s.u64()), Label: s.string(), Manufacturer: s.string(), Model: s.string(), Serial: s.string(),
		Firmware: s.string(), Library: s.string(), MaxSessions: uint(s.u64()),
		Initialized: s.boolean(), UserPINLocked: s.boolean(), UserPINFinalTry: s.boolean(),
	}
}

// sentinels keep their identity across the pipe; the bit of each is its place, so append only.
var sentinels = []error{hsm.ErrKeyNotFound, hsm.ErrKeyExists, hsm.ErrKeyAmbiguous, hsm.ErrDeadline, hsm.ErrUnavailable,
	hsm.ErrNeedsOperator, hsm.ErrBadSignature, context.Canceled, context.DeadlineExceeded, hsm.ErrNotCached, hsm.ErrNoWrapping, hsm.ErrDeclined}

// A remoteError is an error of the child: its text, and what errors.Is and errors.As found in it there.
type remoteError struct {
	text string
	is   []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.is }

func addError(b []byte, err error) []byte {
	text := err.Error()
	if len(text) > maxString {
		text = text[:maxString]
	}
	b = addBytes(b, text)
	var bits uint16
	for i, s := range sentinels {
		if errors.Is(err, s) {
			bits |= 1 << i
		}
	}
	b = binary.BigEndian.AppendUint16(b, bits)
	var e *hsm.Error
	if !errors.As(err, &e) {
		return addBool(b, false)
	}
	call := e.Call
	if len(call) > 64 {
		call = call[:64]
	}
	b = addBool(b, true)
	b = addBytes(b, call)
	return binary.BigEndian.AppendUint64(b, uint64(e.RV))
}

func (s *scanner) error() error {
	e := &remoteError{text: s.string()}
	bits := s.u16()
	if bits>>len(sentinels) != 0 {
		s.bad = true
	}
	if s.boolean() {
		e.is = append(e.is, &hsm.Error{Call: string(s.bytes(64)), RV: uint(s.u64())})
	}
	for i, sentinel := range sentinels {
		if bits&(1<<i) != 0 {
			e.is = append(e.is, sentinel)
		}
	}
	return e
}

// StartParams is what the child needs to open its token. It is sent once, over the stream.
type StartParams struct {
	// Class says what the token's keys are for: the child performs no other operation (hsm.SlotClass.Check). Start
	// sets it from Config.
	Class                          hsm.SlotClass
	Module, ModuleArgs, TokenLabel string
	// PIN is zeroised in the child when its token is open.
	PIN []byte
	// Profile is the name of a vendor profile.
	Profile     string
	MaxSessions int
	// WrappedKeys is how many wrapped keys the token keeps unwrapped; 0: its own default.
	WrappedKeys int
	// Uses says where signatures are counted. Without a folder they are not, as in tests.
	Uses UseLog
	// Extension is what the child's extension is told at its start.
	Extension []byte
	// BeforeLogin is to be called before each C_Login. It is set in the child, and not sent.
	BeforeLogin func()
}

// A UseLog names the log of a slot's uses, which the child writes; see package uselog.
type UseLog struct {
	Dir  string
	Slot string // the log's name; "": the class's
	// Life names the start of the appliance that the child belongs to.
	Life [32]byte
}

func (p StartParams) validate() error {
	if !slices.Contains(hsm.Classes, p.Class) {
		return fmt.Errorf("hsm/worker: %q is no slot class", p.Class)
	}
	for _, v := range []string{p.Module, p.ModuleArgs, p.TokenLabel, p.Profile, p.Uses.Dir, p.Uses.Slot} {
		if len(v) > maxString {
			return fmt.Errorf("hsm/worker: start parameter of %d bytes, at most %d", len(v), maxString)
		}
	}
	if len(p.PIN) > maxPIN {
		return fmt.Errorf("hsm/worker: PIN of %d bytes, at most %d", len(p.PIN), maxPIN)
	}
	if len(p.Extension) > maxExtension {
		return fmt.Errorf("hsm/worker: an extension's parameters of %d bytes, at most %d", len(p.Extension), maxExtension)
	}
	if p.MaxSessions < 1 || p.MaxSessions > 1024 {
		return fmt.Errorf("hsm/worker: %d sessions, want 1 to 1024", p.MaxSessions)
	}
	if p.WrappedKeys < 0 || p.WrappedKeys > 1<<20 {
		return fmt.Errorf("hsm/worker: %d wrapped keys, want at most %d", p.WrappedKeys, 1<<20)
	}
	return nil
}

// startFrame holds the PIN: the caller zeroises it. Its capacity is enough from the start, so that no copy is left.
func startFrame(p StartParams) []byte {
	b := make([]byte, headerSize, headerSize+7*(maxString+4)+len(p.Extension)+maxPIN+128)
	b[4] = byte(kindStart)
	b = append(b, protocolVersion)
	for _, v := range []string{string(p.Class), p.Module, p.ModuleArgs, p.TokenLabel, p.Profile} {
		b = addBytes(b, v)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(p.MaxSessions))
	b = binary.BigEndian.AppendUint32(b, uint32(p.WrappedKeys))
	b = addBytes(b, p.Uses.Dir)
	b = addBytes(b, p.Uses.Slot)
	b = append(b, p.Uses.Life[:]...)
	b = addBytes(b, p.Extension)
	return end(addBytes(b, p.PIN))
}

// parseStart answers parameters whose PIN borrows body.
func parseStart(body []byte) (StartParams, error) {
	s := scanner{b: body}
	if v := s.u8(); v != protocolVersion {
		return StartParams{}, fmt.Errorf("%w: protocol version %d, want %d", errFrame, v, protocolVersion)
	}
	p := StartParams{Class: hsm.SlotClass(s.string()), Module: s.string(), ModuleArgs: s.string(), TokenLabel: s.string(), Profile: s.string(),
		MaxSessions: int(s.u32()), WrappedKeys: int(s.u32()), Uses: UseLog{Dir: s.string(), Slot: s.string()}}
	copy(p.Uses.Life[:], s.take(len(p.Uses.Life)))
	p.Extension = bytes.Clone(s.bytes(maxExtension)) // what is left of body is cleared with the PIN
	p.PIN = s.bytes(maxPIN)
	if err := s.done(); err != nil {
		return StartParams{}, err
	}
	return p, p.validate()
}
