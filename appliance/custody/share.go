package custody

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/secretsharing"
	"github.com/emmansun/gmsm/sm3"
)

// SecretSize is how many bytes are shared: one less than a scalar of P-256 has, so that every secret is one.
const SecretSize = 31

const (
	scalarSize = 32
	// MaxHolders bounds the shares of a secret.
	MaxHolders = 16
	// MaxHolderName bounds a holder's name, in bytes; those of all holders fit into a field of the journal.
	MaxHolderName = 4 * 62
)

// A Share is one holder's part of a secret.
type Share struct {
	Purpose string // what is shared: PurposeKEK, PurposeOfficers
	Name    string // of the ceremony
	Set     string // the secret's fingerprint: shares of another set do not go with these
	Holder  string
	// Any Threshold of Of shares restore the secret; Number is this one's, from 1.
	Number, Threshold, Of int

	value [scalarSize]byte
}

// What is shared.
const (
	PurposeKEK      = "kek"      // the secret that the wrapping key comes from
	PurposeOfficers = "officers" // the private half of the officers' pair
)

// Commitments let a share be judged without the others (Feldman). They say nothing about the secret that could be
// computed: it has 248 random bits.
type Commitments [][]byte

// Split shares a secret of SecretSize bytes among holders, any threshold of whom restore it.
func Split(secret []byte, purpose, name string, holders []string, threshold int) ([]Share, Commitments, error) {
	switch {
	case len(secret) != SecretSize:
		return nil, nil, fmt.Errorf("custody: a secret of %d bytes, want %d", len(secret), SecretSize)
	case len(holders) > MaxHolders || threshold < 2 || threshold > len(holders):
		return nil, nil, fmt.Errorf("custody: %d of %d shares: want 2 at least, and %d holders at most", threshold, len(holders), MaxHolders)
	}
	s := group.P256.NewScalar()
	if err := s.UnmarshalBinary(append([]byte{0}, secret...)); err != nil {
		return nil, nil, err
	}
	sharing := secretsharing.New(rand.Reader, uint(threshold-1), s)
	var commitments Commitments
	for _, c := range sharing.CommitSecret() {
		b, err := c.MarshalBinaryCompress()
		if err != nil {
			return nil, nil, err
		}
		commitments = append(commitments, b)
	}
	var shares []Share
	for i, part := range sharing.Share(uint(len(holders))) {
		v, err := part.Value.MarshalBinary()
		if err != nil {
			return nil, nil, err
		}
		share := Share{Purpose: purpose, Name: name, Set: commitments.Set(), Holder: holders[i], Number: i + 1, Threshold: threshold, Of: len(holders)}
		copy(share.value[:], v)
		clear(v)
		if err := share.Check(commitments); err != nil {
			return nil, nil, err
		}
		shares = append(shares, share)
	}
	return shares, commitments, nil
}

// Set names the shares that the commitments are of.
func (c Commitments) Set() string { return Fingerprint(bytes.Join(c, nil)) }

// Check says whether the share is of the set that the commitments are of.
func (s *Share) Check(c Commitments) error {
	bad := func(why string) error {
		return fmt.Errorf("第 %d 份（%s）不属于这一套 (share %d is not of this set): %s", s.Number, s.Holder, s.Number, why)
	}
	if s.Set != c.Set() || s.Threshold != len(c) {
		return bad("set " + s.Set)
	}
	var elements secretsharing.SecretCommitment
	for _, b := range c {
		e := group.P256.NewElement()
		if err := e.UnmarshalBinary(b); err != nil {
			return fmt.Errorf("custody: commitments: %w", err)
		}
		elements = append(elements, e)
	}
	part, err := s.part()
	if err != nil {
		return bad(err.Error())
	}
	if !secretsharing.Verify(uint(s.Threshold-1), part, elements) {
		return bad("its value is wrong")
	}
	return nil
}

func (s *Share) part() (secretsharing.Share, error) {
	if s.Number < 1 || s.Number > MaxHolders {
		return secretsharing.Share{}, errors.New("its number is out of range")
	}
	id, value := group.P256.NewScalar(), group.P256.NewScalar()
	id.SetUint64(uint64(s.Number))
	err := value.UnmarshalBinary(s.value[:])
	return secretsharing.Share{ID: id, Value: value}, err
}

// Combine restores a secret of the purpose from shares of one set. The caller wipes it.
func Combine(shares []Share, purpose string) ([]byte, error) {
	if len(shares) == 0 {
		return nil, errors.New("没有份额 (no shares)")
	}
	first := &shares[0]
	seen := map[int]bool{}
	var parts []secretsharing.Share
	for i := range shares {
		s := &shares[i]
		switch {
		case s.Purpose != purpose:
			return nil, fmt.Errorf("%s 的份额用途为 %s，需要 %s (a share of another purpose)", s.Holder, s.Purpose, purpose)
		case s.Set != first.Set || s.Threshold != first.Threshold:
			return nil, fmt.Errorf("%s 与 %s 的份额不是一套 (shares of two sets)", first.Holder, s.Holder)
		case seen[s.Number]:
			return nil, fmt.Errorf("第 %d 份给了两次 (a share given twice)", s.Number)
		}
		seen[s.Number] = true
		p, err := s.part()
		if err != nil {
			return nil, fmt.Errorf("custody: share %d: %w", s.Number, err)
		}
		parts = append(parts, p)
	}
	if len(parts) < first.Threshold {
		return nil, fmt.Errorf("只有 %d 份，需要 %d 份 (too few shares)", len(parts), first.Threshold)
	}
	secret, err := secretsharing.Recover(uint(first.Threshold-1), parts)
	if err != nil {
		return nil, err
	}
	b, err := secret.MarshalBinary()
	if err != nil {
		return nil, err
	}
	if len(b) != scalarSize || b[0] != 0 {
		clear(b)
		return nil, errors.New("这些份额合不成原来的秘密 (these shares do not make the secret)")
	}
	return b[1:], nil
}

// Wipe overwrites the share's value. Copies that the arithmetic made stay in memory until the process ends.
func (s *Share) Wipe() { clear(s.value[:]) }

// groups is how many hexadecimal digits a line of a share has.
const lineDigits = 16

// String is the share as it is printed for its holder: four lines of digits, each with a check of its own, so that a slip of
// the pen is found in its line.
func (s *Share) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "印鉴 密钥份额 (Yinjian, share of a key)：请封入信封，亲自保管 (keep it in an envelope)\n")
	fmt.Fprintf(&b, "用途 purpose: %s\n仪式 ceremony: %s\n套号 set: %s\n保管人 holder: %s\n", s.Purpose, s.Name, s.Set, s.Holder)
	fmt.Fprintf(&b, "份数 share: %d / %d，任 %d 份可恢复 (any %d restore)\n", s.Number, s.Of, s.Threshold, s.Threshold)
	digits := hex.EncodeToString(s.value[:])
	for i := 0; i < len(digits); i += lineDigits {
		line := digits[i : i+lineDigits]
		fmt.Fprintf(&b, "%d: %s %s %s %s  校验 check: %s\n", i/lineDigits+1, line[:4], line[4:8], line[8:12], line[12:], s.check(i/lineDigits+1, line))
	}
	return b.String()
}

func (s *Share) check(number int, line string) string {
	sum := sm3.Sum(fmt.Appendf(nil, "%s %s %d %d %s", s.Purpose, s.Set, s.Number, number, line))
	return hex.EncodeToString(sum[:2])
}

var (
	reShareHead = regexp.MustCompile(`^(?:\S+ )?(purpose|ceremony|set|holder): (.+)$`)
	reShareNo   = regexp.MustCompile(`^(?:\S+ )?share: (\d+) / (\d+)\D+(\d+)`)
	reShareLine = regexp.MustCompile(`^([1-4]): ([0-9a-f ]+?)\s+(?:校验 check|check): ([0-9a-f]{4})$`)
)

// ParseShare reads what String wrote, or what somebody typed from it.
func ParseShare(text string) (Share, error) {
	var s Share
	lines := map[int][2]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if m := reShareHead.FindStringSubmatch(line); m != nil {
			*map[string]*string{"purpose": &s.Purpose, "ceremony": &s.Name, "set": &s.Set, "holder": &s.Holder}[m[1]] = m[2]
		} else if m := reShareNo.FindStringSubmatch(line); m != nil {
			s.Number, _ = strconv.Atoi(m[1]) // digits; out of range is refused below
			s.Of, _ = strconv.Atoi(m[2])
			s.Threshold, _ = strconv.Atoi(m[3])
		} else if m := reShareLine.FindStringSubmatch(strings.ToLower(line)); m != nil {
			n, _ := strconv.Atoi(m[1])
			lines[n] = [2]string{strings.ReplaceAll(m[2], " ", ""), m[3]}
		}
	}
	if s.Purpose == "" || s.Set == "" || s.Number < 1 || s.Number > s.Of || s.Of > MaxHolders || s.Threshold < 2 || s.Threshold > s.Of {
		return Share{}, errors.New("不是密钥份额，或抬头不全 (not a share, or its head is not whole)")
	}
	for n := 1; n <= 2*scalarSize/lineDigits; n++ {
		line, check := lines[n][0], lines[n][1]
		if len(line) != lineDigits || check != s.check(n, line) {
			s.Wipe()
			return Share{}, fmt.Errorf("第 %d 份的第 %d 行有误，请对照纸面 (line %d of share %d is wrong)", s.Number, n, n, s.Number)
		}
		if _, err := hex.Decode(s.value[(n-1)*lineDigits/2:], []byte(line)); err != nil {
			s.Wipe()
			return Share{}, fmt.Errorf("custody: share %d, line %d: %w", s.Number, n, err)
		}
	}
	return s, nil
}
