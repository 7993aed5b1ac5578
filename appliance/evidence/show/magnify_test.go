package show_test

import (
	"encoding/hex"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
)

// figure is the one of the name in a part.
func figure(t *testing.T, parts []show.Part, part, name string) show.Figure {
	t.Helper()
	for _, p := range parts {
		for _, f := range p.Figures {
			if p.ID == part && f.Name == name {
				return f
			}
		}
	}
	t.Fatalf("no %s in %s: %+v", name, part, parts)
	return show.Figure{}
}

// opensslSM3 is SM3 by OpenSSL, in hexadecimal.
func opensslSM3(t *testing.T, data []byte) string {
	t.Helper()
	cmd := exec.Command("openssl", "dgst", "-sm3", "-r")
	cmd.Stdin = strings.NewReader(string(data))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))[0]
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The constants of GM/T 0003.5-2012, as a stranger reads them off the standard.
const (
	sm2A  = "fffffffeffffffffffffffffffffffffffffffff00000000fffffffffffffffc"
	sm2B  = "28e9fa9e9d9f5e344d5a9e4bcf6509a7f39789f515ab8f92ddbcbd414d940e93"
	sm2Gx = "32c4ae2c1f1981195f9904466a39c9948fe30bbff2660be1715a4589334c74c7"
	sm2Gy = "bc3736a2f4f6779c59bdcee36b692153d0a9877cc62a474002df32e52139f0a0"
	sm2N  = "fffffffeffffffffffffffffffffffff7203df6b21c6052b53bbf40939d54123"
)

// Each number can be computed again from those that stand beside it, by OpenSSL and by hand; what must be equal is; and in
// what somebody changed it is not.
func TestMagnify(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	logKey, err := show.ReadPublicKey(recorded + "log.pem")
	if err != nil {
		t.Fatal(err)
	}
	document := read(t, "document.xml")
	n, _ := new(big.Int).SetString(sm2N, 16)
	for _, name := range []string{"bundle-cms-sm2.json", "bundle-raw-sm2.json", "bundle-cms-rsa-2048.json", "bundle-raw-rsa-2048.json"} {
		b, err := evidence.Parse(read(t, name))
		if err != nil {
			t.Fatal(err)
		}
		parts := show.Magnify(b, document, logKey)
		compared := 0
		for _, p := range parts {
			for _, f := range p.Figures {
				if f.Holds != nil && !*f.Holds {
					t.Errorf("%s: %s: %s: %+v", name, p.ID, f.Name, f)
				}
				if f.Holds != nil {
					compared++
				}
			}
		}
		if compared < 6 { // signature, imprint, token, two certificates' at least, root, checkpoint
			t.Errorf("%s: only %d comparisons", name, compared)
		}
		if leaf := figure(t, parts, "inclusion", "h_0").Value; leaf != opensslSM3(t, append([]byte{0}, b.Journal.Leaf...)) {
			t.Errorf("%s: h_0 = %s", name, leaf)
		}
		if c := figure(t, parts, "checkpoint", "M").Value; c != hex.EncodeToString(b.Journal.Checkpoint) {
			t.Errorf("%s: M of the checkpoint", name)
		}
		for _, part := range []string{"signature", "token", "checkpoint"} {
			if part != "checkpoint" && strings.Contains(name, "rsa") {
				continue
			}
			value := func(name string) string { return figure(t, parts, part, name).Value }
			number := func(name string) *big.Int { return new(big.Int).SetBytes(unhex(t, value(name))) }
			za := opensslSM3(t, unhex(t, "0080"+hex.EncodeToString([]byte("1234567812345678"))+sm2A+sm2B+sm2Gx+sm2Gy+value("x_A")+value("y_A")))
			if value("Z_A") != za {
				t.Errorf("%s: %s: Z_A = %s, OpenSSL has %s", name, part, value("Z_A"), za)
			}
			message := document
			if part != "signature" || b.Signature.Form == "cms" {
				message = unhex(t, value("M"))
			}
			if e := opensslSM3(t, append(unhex(t, za), message...)); value("e") != e {
				t.Errorf("%s: %s: e = %s, OpenSSL has %s", name, part, value("e"), e)
			}
			sum := new(big.Int).Add(number("r"), number("s"))
			if sum.Mod(sum, n).Cmp(number("t")) != 0 {
				t.Errorf("%s: %s: t", name, part)
			}
			sum.Add(number("e"), number("x_1"))
			if sum.Mod(sum, n).Cmp(number("r")) != 0 {
				t.Errorf("%s: %s: R is not r", name, part)
			}
		}
		if b.Signature.Form == "raw" && b.Signature.Algorithm == "SM2" { // what the signature demands of a document
			alone := show.Magnify(b, nil, nil)
			want := new(big.Int).SetBytes(unhex(t, figure(t, parts, "signature", "e").Value))
			if got := new(big.Int).SetBytes(unhex(t, figure(t, alone, "signature", "e").Value)); got.Cmp(want.Mod(want, n)) != 0 {
				t.Errorf("%s: e without the document = %x", name, got)
			}
			if f := figure(t, show.Magnify(b, []byte("another"), logKey), "signature", "R = r"); *f.Holds {
				t.Errorf("%s: another document: %+v", name, f)
			}
		}
		b.Journal.Leaf[len(b.Journal.Leaf)-1] ^= 1
		changed := show.Magnify(b, document, logKey)
		inclusion := changed[len(changed)-2].Figures
		if last := inclusion[len(inclusion)-1]; last.Holds == nil || *last.Holds {
			t.Errorf("%s: a changed leaf: %+v", name, last)
		}
	}
}

// The outline names the elements that OpenSSL names, at the same places, and does not stumble over what is no DER.
func TestOutline(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	b, err := evidence.Parse(read(t, "bundle-raw-sm2.json"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "leaf.der")
	if err := os.WriteFile(file, b.Signature.Value, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("openssl", "asn1parse", "-inform", "DER", "-in", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	theirs := strings.Split(strings.TrimSpace(string(out)), "\n")
	ours := show.Outline(b.Signature.Value)
	if len(ours) != len(theirs) || len(ours) != 3 {
		t.Fatalf("%q\n%q", ours, theirs)
	}
	for i := range ours {
		at, _, _ := strings.Cut(strings.TrimSpace(theirs[i]), ":")
		if !strings.HasPrefix(strings.TrimSpace(ours[i]), at+":") {
			t.Errorf("%q at %q", ours[i], theirs[i])
		}
	}
	if got := show.Outline([]byte{0x30, 0x05, 0x02}); len(got) != 1 || !strings.Contains(got[0], "not DER") {
		t.Errorf("%q", got)
	}
}
