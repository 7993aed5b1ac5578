package custody_test

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"yinjian/appliance/custody"
)

func secret(t testing.TB) []byte {
	t.Helper()
	b := make([]byte, custody.SecretSize)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

var holders = []string{"张三", "李四", "王五", "赵六", "钱七"}

// TestShares: every three of five restore the secret, no two do, each share is judged by itself, and printed it comes back.
func TestShares(t *testing.T) {
	want := secret(t)
	shares, commitments, err := custody.Split(want, custody.PurposeKEK, "首次", holders, 3)
	if err != nil || len(shares) != 5 {
		t.Fatal(len(shares), err)
	}
	for i := range shares {
		again, err := custody.ParseShare(shares[i].String())
		if err != nil || again != shares[i] {
			t.Fatalf("share %d, printed and read: %v\n%s", i, err, shares[i].String())
		}
		if err := again.Check(commitments); err != nil {
			t.Error(err)
		}
	}
	for mask := range 32 {
		var some []custody.Share
		for i := range shares {
			if mask>>i&1 == 1 {
				some = append(some, shares[i])
			}
		}
		got, err := custody.Combine(some, custody.PurposeKEK)
		if enough := len(some) >= 3; enough != (err == nil) || enough && !bytes.Equal(got, want) {
			t.Errorf("%d shares: %v", len(some), err)
		}
	}
	if _, err := custody.Combine(shares, custody.PurposeOfficers); err == nil {
		t.Error("shares of another purpose were combined")
	}
	if _, err := custody.Combine([]custody.Share{shares[0], shares[0], shares[1]}, custody.PurposeKEK); err == nil {
		t.Error("one share given twice counted twice")
	}
	others, _, err := custody.Split(secret(t), custody.PurposeKEK, "首次", holders, 3)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := custody.Combine([]custody.Share{shares[0], shares[1], others[2]}, custody.PurposeKEK); err == nil {
		t.Error("shares of two sets were combined")
	}
	if err := others[0].Check(commitments); err == nil {
		t.Error("a share of another set passed the check")
	}
	// Two shares and a lie about the threshold give another secret.
	lied := []custody.Share{shares[0], shares[1]}
	for i := range lied {
		lied[i].Threshold = 2
	}
	if got, err := custody.Combine(lied, custody.PurposeKEK); err == nil && bytes.Equal(got, want) {
		t.Error("two shares of three gave the secret")
	}
	for _, m := range []int{0, 1, 6} {
		if _, _, err := custody.Split(want, custody.PurposeKEK, "x", holders, m); err == nil {
			t.Errorf("%d of 5 was accepted", m)
		}
	}
}

// TestShareSlips: a digit that was written down wrongly is found, in its line or by the commitments.
func TestShareSlips(t *testing.T) {
	shares, commitments, err := custody.Split(secret(t), custody.PurposeKEK, "首次", holders, 3)
	if err != nil {
		t.Fatal(err)
	}
	text := shares[1].String()
	found := 0
	for _, line := range regexp.MustCompile(`(?m)^[1-4]: .*$`).FindAllStringIndex(text, -1) {
		digits := line[0] + strings.Index(text[line[0]:line[1]], "校验")
		for i := line[0] + 3; i < digits; i++ {
			if !strings.ContainsRune("0123456789abcdef", rune(text[i])) {
				continue
			}
			wrong := "0"
			if text[i] == '0' {
				wrong = "1"
			}
			s, err := custody.ParseShare(text[:i] + wrong + text[i+1:])
			if err == nil && s.Check(commitments) == nil {
				t.Errorf("digit %q at %d was not missed", text[i], i)
			}
			found++
		}
	}
	if found != 64 {
		t.Errorf("%d digits were tried", found)
	}
}

// TestSeal: what is sealed opens with its key and name alone, and no bit of it can be changed.
func TestSeal(t *testing.T) {
	seed, point := custody.NewPair()
	other, _ := custody.NewPair()
	again, err := custody.PointOf(seed)
	if err != nil || !bytes.Equal(again, point) {
		t.Fatal(err)
	}
	plain := []byte("a wrapped key")
	sealed, err := custody.SealTo(point, plain, "staff/1")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := custody.OpenWith(seed, sealed, "staff/1"); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("OpenWith = %q, %v", got, err)
	}
	if _, err := custody.OpenWith(other, sealed, "staff/1"); err == nil {
		t.Error("opened with another's seed")
	}
	if _, err := custody.OpenWith(seed, sealed, "staff/2"); err == nil {
		t.Error("opened under another's name")
	}
	for i := range sealed {
		b := bytes.Clone(sealed)
		b[i] ^= 0x10
		if _, err := custody.OpenWith(seed, b, "staff/1"); err == nil {
			t.Errorf("opened with byte %d changed", i)
		}
	}
	for n := range sealed {
		if _, err := custody.OpenWith(seed, sealed[:n], "staff/1"); err == nil {
			t.Errorf("opened with %d bytes of it", n)
		}
	}
}

// TestCheckValue: OpenSSL computes the same.
func TestCheckValue(t *testing.T) {
	tool, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	key := custody.KEKOf(secret(t))
	want, err := custody.CheckValue(key)
	if err != nil || len(want) != 6 {
		t.Fatal(want, err)
	}
	zeros := filepath.Join(t.TempDir(), "zeros")
	if err := os.WriteFile(zeros, make([]byte, 16), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "enc", "-sm4-ecb", "-nopad", "-K", hex.EncodeToString(key), "-in", zeros).Output()
	if err != nil || len(out) != 16 {
		t.Fatal(len(out), err)
	}
	if got := strings.ToUpper(hex.EncodeToString(out[:3])); got != want {
		t.Errorf("OpenSSL says %s, we say %s", got, want)
	}
}

// FuzzParseShare: what parses prints to what parses to the same, and nothing panics.
func FuzzParseShare(f *testing.F) {
	shares, commitments, err := custody.Split(make([]byte, custody.SecretSize), custody.PurposeKEK, "首次", holders, 3)
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range shares {
		f.Add(s.String())
	}
	f.Add("share: 99999999999999999999 / 1，任 2")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := custody.ParseShare(text)
		if err != nil {
			return
		}
		if again, err := custody.ParseShare(s.String()); err != nil || again != s {
			t.Errorf("%q printed is %q: %v", text, s.String(), err)
		}
		_ = s.Check(commitments)
		_, _ = custody.Combine([]custody.Share{s, s}, s.Purpose)
	})
}

// FuzzParseMinutes: minutes that parse have a signature that verifies, and nothing panics.
func FuzzParseMinutes(f *testing.F) {
	f.Add([]byte(`{"body":{"version":1,"name":"x","check_key":{"label":"l","point":"","blob":""}},"signature":"MAA="}`))
	f.Add([]byte(`{"body":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := custody.ParseMinutes(b); err == nil {
			if err := m.Verify(); err != nil {
				t.Error(err)
			}
		}
	})
}

// FuzzUnlockFiles: of bundles of locked PINs, a person's or a device's, what is read is written and read again as the same.
func FuzzUnlockFiles(f *testing.F) {
	l := custody.LockedPINs{Format: "yinjian-unlock/1", Threshold: 2, Commitments: make(custody.Commitments, 2), Holders: []custody.UnlockHolder{
		{Name: "张三", Salt: make([]byte, 16), Iterations: 600_000}, {Name: "李四", Salt: make([]byte, 16), Iterations: 600_000},
	}}
	for _, v := range []any{l, custody.DevicePINs{Format: "yinjian-device-pins/1", Locked: make([]byte, 32), Device: json.RawMessage(`{}`)}} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"threshold":-1,"holders":[{}],"iterations":99999999999}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		if l, err := custody.ParseLockedPINs(in); err == nil {
			b, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			again, err := custody.ParseLockedPINs(b)
			if err != nil || !reflect.DeepEqual(l.Names(), again.Names()) || l.Set() != again.Set() {
				t.Errorf("%s is written as %s: %v", in, b, err)
			}
			if _, err := l.Open(nil); err == nil {
				t.Errorf("%s opens without shares", in)
			}
		}
		if d, err := custody.ParseDevicePINs(in); err == nil {
			if _, err := d.Open(make([]byte, custody.SecretSize)); err == nil {
				t.Errorf("%s opens with a secret of nobody's", in)
			}
		}
	})
}
