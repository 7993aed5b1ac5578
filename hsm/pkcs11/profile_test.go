package pkcs11_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm3"
	p11 "github.com/miekg/pkcs11"
	"github.com/pelletier/go-toml/v2"

	"yinjian/hsm"
	"yinjian/hsm/pkcs11"
	"yinjian/hsm/pkcs11/profiles"
)

// as restarts the machine, answering to the profile of that name or file.
func (m *machine) as(t *testing.T, profile string) {
	t.Helper()
	m.kill()
	m.profile = profile
	m.run(t)
}

// exercise makes and uses a key of each algorithm, with labels that begin with prefix.
func exercise(t *testing.T, tok *pkcs11.Token, p pkcs11.Profile, prefix string) {
	t.Helper()
	ctx := t.Context()
	for algorithm := range p.Keys {
		info := generate(t, tok, prefix+string(algorithm), algorithm)
		if !info.Sensitive || info.Extractable || info.Algorithm != algorithm {
			t.Errorf("GenerateKey = %+v", info)
		}
		found, err := tok.FindKey(ctx, info.Label)
		if err != nil || found.Algorithm != algorithm {
			t.Errorf("FindKey = %+v, %v", found, err)
		}
		switch algorithm {
		case hsm.SM2:
			if err := signSM2(ctx, newKey(t, tok, info.Label), "病历"); err != nil {
				t.Error(err)
			}
			if _, ok := p.Operations[hsm.SignSM2M]; ok {
				if err := signSM2M(ctx, tok, info); err != nil {
					t.Errorf("the token hashes: %v", err)
				}
			}
		case hsm.RSA2048:
			if err := signRSA(ctx, tok, info, "one"); err != nil {
				t.Error(err)
			}
			signPSS(t, tok, info.Label)
		case hsm.HMACSM3:
			if mac, err := tok.Do(ctx, info.Label, hsm.MACSM3, []byte("row")); err != nil || len(mac) != 32 {
				t.Errorf("HMAC-SM3 = %x, %v", mac, err)
			}
		}
	}
}

// signSM2M lets the token hash, and gmsm judge.
func signSM2M(ctx context.Context, tok hsm.Token, info hsm.KeyInfo) error {
	message := []byte("a message that is longer than one block of SM3, which has sixty-four bytes")
	sig, err := tok.Do(ctx, info.Label, hsm.SignSM2M, message)
	if err != nil {
		return err
	}
	r, s, err := hsm.NormalizeSM2(sig)
	if err != nil {
		return err
	}
	der, err := hsm.MarshalSM2(r, s)
	if err != nil {
		return err
	}
	if !sm2.VerifyASN1WithSM2(info.Public.(*ecdsa.PublicKey), nil, message, der) {
		return errors.New("gmsm does not verify the signature")
	}
	return nil
}

const quirky = `name = "quirky"
sources = ["this test"]
tried = "no"

[machine]
max_sessions = 3
service_time = "1ms"
read_write = true
login_user = 0x80000007
pin_max = 8
avoid = ["C_GenerateRandom", "C_GetSessionInfo", "C_GetMechanismList"]
use_counter = 0x80000077

[errors]
0x80000082 = 0x82
0x80000060 = 0x60

[keys.sm2]
mechanism = 0x00010009
key_type = "0x8000000000010001"
send_key_type = true
ec_params = "06082a811ccf5501822d"
send_ec_params = false
point = "POINT"
point_on = "both"
POINT_ATTRIBUTES
omit = [0x10A]
private = [{type = 0x80000301, number = 1}]

[operations.sm2-sign-e]
mechanism = 0x00010002
input = "e"
parameter = "none"
output = "der"

[operations.sm2-sign-message]
mechanism = 0x00010004
input = "zm"
parameter = "none"
output = "raw"
`

// quirkyFile writes the profile above with a form of the public point, and with changes.
func quirkyFile(t *testing.T, point string, changes ...string) string {
	t.Helper()
	attributes := ""
	if point == profiles.PointXY {
		attributes = "point_x = 0x80000201\npoint_y = 0x80000202"
	}
	text := strings.NewReplacer("POINT_ATTRIBUTES", attributes, "POINT", point).Replace(quirky)
	text = strings.NewReplacer(changes...).Replace(text)
	file := filepath.Join(t.TempDir(), "quirky.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestQuirks: a profile from a file with everything that vendors do: each form of the point, attributes that must and
// must not be given, a user type, read/write sessions, few sessions, functions that are not there, other return values.
func TestQuirks(t *testing.T) {
	m := newMachine(t)
	for _, point := range []string{profiles.PointOctetString, profiles.PointUncompressed, profiles.PointRaw, profiles.PointXY} {
		file := quirkyFile(t, point)
		m.as(t, file)
		cfg := m.cfg
		cfg.Profile = shipped(file)
		tok := open(t, cfg)
		if n := tok.Sessions(); n != 2 {
			t.Errorf("%d sessions, want 2: one of three is pinned", n)
		}
		exercise(t, tok, cfg.Profile, point)
		keys, err := tok.Keys(t.Context())
		if err != nil || len(keys) == 0 {
			t.Fatalf("Keys = %+v, %v", keys, err)
		}
		last := keys[len(keys)-1]
		if last.Label != point+"SM2" || last.Uses == nil || *last.Uses != 2 {
			t.Errorf("the last key is %+v, want two uses", last)
		}
		if _, err := tok.Random(t.Context(), 8); hsm.ClassifyError(err) != hsm.ClassPermanent {
			t.Errorf("Random = %v, want a refusal", err)
		}
		tok.Close()
	}

	// A key that went while its handle was cached: the vendor's number means CKR_OBJECT_HANDLE_INVALID, or the like.
	file := quirkyFile(t, profiles.PointRaw)
	m.as(t, file)
	cfg := m.cfg
	cfg.Profile = shipped(file)
	tok := open(t, cfg)
	generate(t, tok, "gone", hsm.SM2)
	key := newKey(t, tok, "gone")
	if err := signSM2(t.Context(), key, "x"); err != nil {
		t.Fatal(err)
	}
	other := p11.New(m.module)
	s, err := other.OpenSession(slotOf(t, tok), p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	for _, class := range []uint{p11.CKO_PRIVATE_KEY, p11.CKO_PUBLIC_KEY} {
		if err := other.FindObjectsInit(s, []*p11.Attribute{p11.NewAttribute(p11.CKA_LABEL, "gone"), p11.NewAttribute(p11.CKA_CLASS, class)}); err != nil {
			t.Fatal(err)
		}
		found, _, err := other.FindObjects(s, 1)
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		if err := errors.Join(other.FindObjectsFinal(s), other.DestroyObject(s, found[0])); err != nil {
			t.Fatal(err)
		}
	}
	before := tok.Generation()
	if err := signSM2(t.Context(), key, "x"); !errors.Is(err, hsm.ErrKeyNotFound) || tok.Generation() != before {
		t.Errorf("signing with a key that is gone: %v and %d reconnects, want ErrKeyNotFound and none", err, tok.Generation()-before)
	}
}

// TestUnfit: a profile that is not the machine's is refused, and the error says what does not fit.
func TestUnfit(t *testing.T) {
	m := newMachine(t)
	unfit := func(machine, profile, want string) {
		t.Helper()
		m.as(t, machine)
		cfg := m.cfg
		cfg.Profile = shipped(profile)
		presented := false
		cfg.BeforeLogin = func() { presented = true }
		tok, err := pkcs11.Open(t.Context(), cfg)
		if err == nil {
			// The numbers are there: a first key and signature tell.
			defer tok.Close()
			var info hsm.KeyInfo
			if info, err = tok.GenerateKey(t.Context(), hsm.KeySpec{Label: filepath.Base(machine) + profile, Algorithm: hsm.SM2}); err == nil {
				var key *hsm.Key
				if key, err = hsm.KeyOf(tok, info, true); err == nil {
					_, err = key.SignMessage(t.Context(), []byte("x"))
				}
			}
		} else if presented {
			t.Errorf("%s for %s: the PIN was presented", profile, machine)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s for %s: %v; want %q", profile, machine, err, want)
		}
	}
	unfit("sansec", "tass", "operations.sm2-sign-e: 密码机没有机制 0x80008000")
	unfit("tass", "sansec", "operations.sm2-sign-e: 密码机没有机制 0x80008105")
	unfit("ibm", "westone", "keys.sm2: 密码机没有机制 0x80000001")
	unfit("westone", "neutral", "operations.hmac-sm3: 密码机没有机制 0xfffff009")
	unfit("neutral", "softhsm2", `match.manufacturer: 要求含 "SoftHSM"`)
	// The same numbers in another form.
	unfit("sansec-der", "sansec-xipki", "CKR_TEMPLATE_INCONSISTENT")
	raw := quirkyFile(t, profiles.PointRaw)
	unfit(raw, quirkyFile(t, profiles.PointUncompressed), `keys.sm2.point = "uncompressed"，密码机给出 64 字节`)
	unfit(raw, quirkyFile(t, profiles.PointRaw, `output = "der"`, `output = "raw"`), "output 应为 raw (r‖s, 64)，密码机答 ")
	unfit(quirkyFile(t, profiles.PointRaw, `output = "der"`, `output = "raw"`), raw, "output 应为 der (SM2Signature)，密码机答 64 字节")
	unfit(raw, quirkyFile(t, profiles.PointRaw, "omit = [0x10A]\nprivate = [{type = 0x80000301, number = 1}]", ""), "CKR_TEMPLATE_INCONSISTENT")
	unfit(raw, quirkyFile(t, profiles.PointRaw, "pin_max = 8", "pin_max = 7"), "machine.pin_min、pin_max，未提交给密码机")
	unfit(raw, quirkyFile(t, profiles.PointRaw, "pin_max = 8", "pin_digits = true"), "machine.pin_digits 不容")
	// The number of the mechanism that hashes, in the place of the one that does not.
	unfit(raw, quirkyFile(t, profiles.PointRaw, "0x00010002", "0x00010004", "0x00010004", "0x00010002", `output = "der"`, `output = "raw"`),
		hsm.ErrBadSignature.Error())
}

// TestReadings: what a signature is of is found out, and one that seems to be of two things is not taken for either.
// gmsm signs; a judge that says yes to everything stands for the signature that nobody can make.
func TestReadings(t *testing.T) {
	key, err := sm2.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	message := []byte("32 bytes, as e has them, exactly")
	verify := func(sig []byte) func(e []byte) bool {
		r, s, err := hsm.NormalizeSM2(sig)
		if err != nil {
			t.Fatal(err)
		}
		return func(e []byte) bool { return sm2.Verify(&key.PublicKey, e, r, s) }
	}
	sign := func(data []byte, opts *sm2.SM2SignerOption) []byte {
		sig, err := key.Sign(rand.Reader, data, opts)
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	hashed := sm3.Sum(message)
	for want, sig := range map[string][]byte{
		"e":  sign(message, sm2.NewSM2SignerOption(false, nil)),
		"m":  sign(message, sm2.DefaultSM2SignerOpts),
		"zm": sign(hashed[:], sm2.NewSM2SignerOption(false, nil)),
		"":   sign([]byte("something else"), sm2.DefaultSM2SignerOpts),
	} {
		if got := strings.Join(pkcs11.Readings(&key.PublicKey, message, verify(sig)), " "); got != want {
			t.Errorf("read as %q, want %q", got, want)
		}
	}
	if got := pkcs11.Readings(&key.PublicKey, message, func([]byte) bool { return true }); len(got) != 4 {
		t.Errorf("read as %q, want all four", got)
	}
}

// FuzzProfile reads vendor profiles as an integrator may write them: what is taken is used without harm, and a key more
// that nobody knows is refused, wherever it stands.
func FuzzProfile(f *testing.F) {
	for _, name := range profiles.Names() {
		b, err := os.ReadFile(filepath.Join("profiles", name+".toml"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := profiles.Parse(b)
		if err != nil {
			return
		}
		p := pkcs11.Resolve(file)
		for _, offered := range [][]uint{nil, {0, 1, 0x80000001, 1<<64 - 1}} {
			p.Exercise(profiles.Identity{Library: "/lib/x.so", Manufacturers: []string{"", "x"}, Description: "d"}, offered, []byte("12345678"), 0x80000001)
		}
		var all map[string]any
		if err := toml.Unmarshal(b, &all); err != nil {
			t.Fatalf("what is taken is no TOML: %v", err)
		}
		for name, v := range all {
			table, ok := v.(map[string]any)
			if !ok || name == "errors" { // whose keys are numbers
				continue
			}
			table["zz"] = map[string]any{"zz": 1}
			more, err := toml.Marshal(all)
			delete(table, "zz")
			if err != nil {
				continue
			}
			if _, err := profiles.Parse(more); err == nil {
				t.Fatalf("a key that nobody knows, in %s, is taken", name)
			}
		}
	})
}
