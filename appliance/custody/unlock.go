package custody

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/problem"
)

// PurposeUnlock is the purpose of the shares of a [LockedPINs].
const PurposeUnlock = "unlock"

// A LockedPINs is the cipher machines' PINs as they lie on the disk of an appliance that is unlocked by people: sealed
// (SM4-GCM) under a key from a secret that is shared among the holders; each share is sealed under its holder's passphrase,
// stretched by PBKDF2-HMAC-SM3 (GM/T 0091-2020 §6). Whoever has the disk has to guess as many passphrases as the threshold
// says, each at the price of the stretching.
type LockedPINs struct {
	Format      string         `json:"format"`
	Threshold   int            `json:"threshold"`
	Commitments Commitments    `json:"commitments"`
	Holders     []UnlockHolder `json:"holders"`
	PINs        []byte         `json:"pins"`
}

// An UnlockHolder is one who has a passphrase.
type UnlockHolder struct {
	Name       string `json:"name"`
	Salt       []byte `json:"salt"`
	Iterations int    `json:"iterations"`
	Share      []byte `json:"share"`
}

const (
	unlockFormat = "yinjian-unlock/1"
	saltSize     = 16
	// MinPassphrase is the least length of a passphrase, in bytes; MaxPassphrase the greatest.
	MinPassphrase, MaxPassphrase = 12, 256

	// unlockIterations is written into new bundles: some tenths of a second of one core of 2026.
	unlockIterations             = 400_000
	minIterations, maxIterations = 100_000, 100_000_000
)

// CheckPassphrase says what is wrong with a new passphrase: its length, or characters that nobody sees.
func CheckPassphrase(p []byte) error {
	if len(p) < MinPassphrase || len(p) > MaxPassphrase {
		return fmt.Errorf("口令须为 %d–%d 字节 (a passphrase has %d to %d bytes)", MinPassphrase, MaxPassphrase, MinPassphrase, MaxPassphrase)
	}
	for _, r := range string(p) {
		if problem.Misleads(r) {
			return errors.New("口令含不可见字符 (the passphrase holds characters that are not seen)")
		}
	}
	return nil
}

// CheckUnlock says what is wrong with the holders and with how many of them open the PINs: two at least, and one fewer than
// there are at most, so that somebody may be missing.
func CheckUnlock(holders []string, threshold int) error {
	if len(holders) > MaxHolders || threshold < 2 || threshold >= len(holders) {
		return fmt.Errorf("%d 人中的 %d 人：至少两人解锁，持有人至少多一人，至多 %d 人 (%d of %d: two at least unlock, and there is one holder more; %d holders at most)",
			len(holders), threshold, MaxHolders, threshold, len(holders), MaxHolders)
	}
	for i, name := range holders {
		if err := problem.CheckText("holder", name, MaxHolderName); err != nil {
			return fmt.Errorf("持有人 %q (holder): %w", name, err)
		}
		if slices.Contains(holders[:i], name) {
			return fmt.Errorf("持有人 %s 重复 (a holder is given twice)", name)
		}
	}
	return nil
}

// LockPINs seals pins, by slot, so that any threshold of the holders' passphrases open them. It takes some tenths of a second
// for each holder.
func LockPINs(pins map[string][]byte, holders []string, passphrases [][]byte, threshold int) (*LockedPINs, error) {
	if err := CheckUnlock(holders, threshold); err != nil {
		return nil, err
	}
	if len(passphrases) != len(holders) {
		return nil, fmt.Errorf("custody: %d passphrases of %d holders", len(passphrases), len(holders))
	}
	for i, name := range holders {
		if err := CheckPassphrase(passphrases[i]); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if slices.ContainsFunc(passphrases[:i], func(o []byte) bool { return string(o) == string(passphrases[i]) }) {
			return nil, fmt.Errorf("%s 与他人口令相同 (two holders have the same passphrase)", name)
		}
	}
	secret := make([]byte, SecretSize)
	rand.Read(secret) // never fails (crypto/rand)
	defer clear(secret)
	shares, commitments, err := Split(secret, PurposeUnlock, PurposeUnlock, holders, threshold)
	if err != nil {
		return nil, err
	}
	l := &LockedPINs{Format: unlockFormat, Threshold: threshold, Commitments: commitments}
	for i := range shares {
		defer shares[i].Wipe()
		h := UnlockHolder{Name: holders[i], Salt: make([]byte, saltSize), Iterations: unlockIterations}
		rand.Read(h.Salt)
		key, err := h.key(passphrases[i])
		if err != nil {
			return nil, err
		}
		h.Share, err = Seal(key, shares[i].value[:], l.shareName(i))
		clear(key)
		if err != nil {
			return nil, err
		}
		l.Holders = append(l.Holders, h)
	}
	body, err := json.Marshal(pins)
	if err != nil {
		return nil, err
	}
	defer clear(body)
	key := pinsKey(secret)
	defer clear(key)
	if l.PINs, err = Seal(key, body, l.pinsName()); err != nil {
		return nil, err
	}
	return l, nil
}

func (h *UnlockHolder) key(passphrase []byte) ([]byte, error) {
	// The standard library takes the password as a string, which cannot be wiped afterwards.
	return pbkdf2.Key(sm3.New, string(passphrase), h.Salt, h.Iterations, keySize)
}

func pinsKey(secret []byte) []byte {
	m := hmac.New(sm3.New, secret)
	m.Write([]byte("yinjian/unlock-pins/v1\x00"))
	return m.Sum(nil)[:keySize]
}

// Set names the shares that the bundle needs; with another bundle it is another.
func (l *LockedPINs) Set() string { return l.Commitments.Set() }

func (l *LockedPINs) shareName(i int) string {
	return "yinjian/unlock-share/v1\x00" + l.Set() + "\x00" + strconv.Itoa(i+1)
}

func (l *LockedPINs) pinsName() string { return "yinjian/unlock-pins/v1\x00" + l.Set() }

// ParseLockedPINs reads a bundle.
func ParseLockedPINs(b []byte) (*LockedPINs, error) {
	l := new(LockedPINs)
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("custody: locked PINs: %w", err)
	}
	ok := l.Format == unlockFormat && l.Threshold >= 2 && l.Threshold == len(l.Commitments) && l.Threshold <= len(l.Holders) && len(l.Holders) <= MaxHolders
	for _, h := range l.Holders {
		ok = ok && h.Name != "" && len(h.Salt) == saltSize && h.Iterations >= minIterations && h.Iterations <= maxIterations
	}
	if !ok {
		return nil, errors.New("口令包的内容不对 (custody: this is no bundle of locked PINs)")
	}
	return l, nil
}

// Names are the holders', in order.
func (l *LockedPINs) Names() []string {
	var out []string
	for _, h := range l.Holders {
		out = append(out, h.Name)
	}
	return out
}

// Share opens a holder's share. It fails with [ErrSealed] when the passphrase is wrong.
func (l *LockedPINs) Share(holder string, passphrase []byte) (Share, error) {
	i := slices.IndexFunc(l.Holders, func(h UnlockHolder) bool { return h.Name == holder })
	if i < 0 {
		return Share{}, fmt.Errorf("custody: no holder %q", holder)
	}
	key, err := l.Holders[i].key(passphrase)
	if err != nil {
		return Share{}, err
	}
	defer clear(key)
	value, err := Open(key, l.Holders[i].Share, l.shareName(i))
	if err != nil {
		return Share{}, err
	}
	defer clear(value)
	s := Share{Purpose: PurposeUnlock, Name: PurposeUnlock, Set: l.Set(), Holder: holder, Number: i + 1, Threshold: l.Threshold, Of: len(l.Holders)}
	if len(value) != len(s.value) {
		return Share{}, ErrSealed
	}
	copy(s.value[:], value)
	return s, s.Check(l.Commitments)
}

// Open opens the bundle with as many shares as its threshold says. The caller wipes the PINs.
func (l *LockedPINs) Open(shares []Share) (map[string][]byte, error) {
	secret, err := Combine(shares, PurposeUnlock)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	key := pinsKey(secret)
	defer clear(key)
	body, err := Open(key, l.PINs, l.pinsName())
	if err != nil {
		return nil, err
	}
	defer clear(body)
	var pins map[string][]byte
	if err := json.Unmarshal(body, &pins); err != nil {
		return nil, fmt.Errorf("custody: locked PINs: %w", err)
	}
	return pins, nil
}
