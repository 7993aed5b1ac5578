package build

import (
	"bytes"
	"crypto/sha256"
	"debug/pe"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"yinjian/hsm/hsmtest"
)

const stubFile = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"

// tool skips a test whose judge is not installed.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is missing: packaging/dev/deps.sh image", name)
	}
	return path
}

func stub(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(stubFile)
	if err != nil {
		t.Skip("systemd-boot-efi is missing: packaging/dev/deps.sh image")
	}
	return data
}

func testKeys(t *testing.T) (string, Keys) {
	t.Helper()
	tool(t, "sign-efi-sig-list")
	dir := filepath.Join(t.TempDir(), "keys")
	if err := MakeKeys(dir, time.Unix(1750000000, 0)); err != nil {
		t.Fatal(err)
	}
	keys, err := LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(keys.Enrol) != 3 {
		t.Errorf("%d variables to enrol", len(keys.Enrol))
	}
	return dir, keys
}

// Go's reader of PE finds each section, whole; two judges of Authenticode take the signature and refuse a changed file.
func TestUnifiedKernel(t *testing.T) {
	t.Parallel()
	dir, keys := testKeys(t)
	linux, ram := bytes.Repeat([]byte("kernel"), 3001), []byte("initrd!")
	plain, err := unified(stub(t), linux, ram, []byte("ID=yinjian\n"), "roothash=00", keys.PCR)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := unified(stub(t), linux, ram, []byte("ID=yinjian\n"), "roothash=00", keys.PCR); !bytes.Equal(plain, again) {
		t.Error("the same parts give another image")
	}
	f, err := pe.NewFile(bytes.NewReader(plain))
	if err != nil {
		t.Fatal(err)
	}
	end := uint32(0)
	for _, s := range f.Sections {
		if s.VirtualAddress < end {
			t.Errorf("%s lies over the section before it", s.Name)
		}
		end = s.VirtualAddress + s.VirtualSize
		want, ours := map[string][]byte{".linux": linux, ".initrd": ram, ".osrel": []byte("ID=yinjian\n"), ".cmdline": []byte("roothash=00")}[s.Name]
		if data, err := s.Data(); ours && (err != nil || !bytes.Equal(data[:s.VirtualSize], want)) {
			t.Errorf("%s: %q, %v", s.Name, data, err)
		}
	}
	signed, err := keys.SecureBoot.Sign(plain)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keys.SecureBoot.Sign(signed); err == nil {
		t.Error("a signed file is signed again")
	}
	file := filepath.Join(dir, "signed.efi")
	judges := map[string]func() (string, error){
		"sbverify": func() (string, error) {
			out, err := exec.Command(tool(t, "sbverify"), "--cert", filepath.Join(dir, "db.crt"), file).CombinedOutput()
			if strings.Contains(string(out), "warning") {
				t.Errorf("sbverify: %s", out)
			}
			return string(out), err
		},
		"osslsigncode": func() (string, error) {
			out, err := exec.Command(tool(t, "osslsigncode"), "verify", "-in", file, "-CAfile", filepath.Join(dir, "db.crt")).CombinedOutput()
			return string(out), err
		},
	}
	for name, judge := range judges {
		os.WriteFile(file, signed, 0o600)
		if out, err := judge(); err != nil {
			t.Errorf("%s refuses: %v\n%s", name, err, out)
		}
		changed := bytes.Replace(signed, []byte("roothash=00"), []byte("roothash=01"), 1)
		os.WriteFile(file, changed, 0o600)
		if out, err := judge(); err == nil {
			t.Errorf("%s takes a changed command line: %s", name, out)
		}
	}
}

// The policy's signature is one that OpenSSL takes, over the policy digest that the text names; names and lengths are
// those that systemd reads.
func TestPCRSignature(t *testing.T) {
	t.Parallel()
	dir, keys := testKeys(t)
	text, err := pcrSignature([]Section{{".linux", []byte("l")}, {".cmdline", []byte("c")}}, keys.PCR)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string][]struct {
		PCRs           []int
		PKFP, Pol, Sig string
	}
	if err := json.Unmarshal(text, &got); err != nil || len(got["sha256"]) != 1 {
		t.Fatalf("%s: %v", text, err)
	}
	one := got["sha256"][0]
	policy, _ := hex.DecodeString(one.Pol)
	signature, _ := base64.StdEncoding.DecodeString(one.Sig)
	public, err := publicPEM(keys.PCR.Public())
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	out, err := exec.Command(tool(t, "openssl"), "dgst", "-sha256", "-verify", write("pub", public), "-signature", write("sig", signature), write("pol", policy)).CombinedOutput()
	if err != nil {
		t.Errorf("openssl: %v: %s", err, out)
	}
	der, err := exec.Command("openssl", "rsa", "-pubin", "-in", filepath.Join(dir, "pub"), "-RSAPublicKey_out", "-outform", "DER").Output()
	if sum := sha256.Sum256(der); err != nil || one.PKFP != hex.EncodeToString(sum[:]) || len(one.PCRs) != 1 || one.PCRs[0] != 11 {
		t.Errorf("pkfp %s, pcrs %v: %v", one.PKFP, one.PCRs, err)
	}
	// Order of sections in the file is of no matter, their content is.
	if predictPCR([]Section{{".cmdline", []byte("c")}, {".linux", []byte("l")}}) != predictPCR([]Section{{".linux", []byte("l")}, {".cmdline", []byte("c")}}) {
		t.Error("the order of sections changes what is predicted")
	}
	if predictPCR([]Section{{".linux", []byte("l")}}) == predictPCR([]Section{{".linux", []byte("m")}}) {
		t.Error("another kernel, the same PCR")
	}
}

func TestAddSectionsRefuses(t *testing.T) {
	t.Parallel()
	whole := stub(t)
	many := make([]Section, 30)
	for i := range many {
		many[i].Name = ".x"
	}
	for name, try := range map[string]struct {
		stub []byte
		add  []Section
	}{"no PE": {[]byte("MZ"), nil}, "cut": {whole[:0x180], nil}, "no room for headers": {whole, many}, "long name": {whole, []Section{{".toolonganame", nil}}}} {
		if _, err := addSections(try.stub, try.add); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// Keys that are in a cipher machine sign as files' do: the same signature, since RSASSA-PKCS1-v1_5 has no randomness.
// SoftHSM2 is the machine, with the throw-away keys put into it.
func TestTokenKeys(t *testing.T) { // not parallel: SoftHSM2 reads its place from the environment
	dir, files := testKeys(t)
	soft := hsmtest.NewSoftHSM2(t, "release")
	for _, e := range soft.Env {
		if name, value, _ := strings.Cut(e, "="); name == "SOFTHSM2_CONF" {
			t.Setenv(name, value)
		}
	}
	for i, name := range []string{"db", "pcr"} {
		if out, err := exec.Command("softhsm2-util", "--import", filepath.Join(dir, name+".key"), "--token", "release", "--label", name,
			"--id", strconv.Itoa(i+1)+"0", "--pin", soft.PIN).CombinedOutput(); err != nil {
			t.Fatalf("softhsm2-util: %v: %s", err, out)
		}
		if err := os.Remove(filepath.Join(dir, name+".key")); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("pin", soft.PIN+"\n")
	token := "module = \"" + hsmtest.SoftHSMModule + "\"\nprofile = \"softhsm2\"\ntoken = \"release\"\npin_file = \"pin\"\nsecure_boot = \"db\"\npcr = \"pcr\"\n"
	write("token.toml", token)
	held, err := LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	sections := []Section{{".linux", []byte("l")}}
	sign := func(k Keys) (efi, policy []byte) {
		efi, err := k.SecureBoot.Sign(stub(t))
		if err != nil {
			t.Fatal(err)
		}
		if policy, err = pcrSignature(sections, k.PCR); err != nil {
			t.Fatal(err)
		}
		return efi, policy
	}
	efi, policy := sign(held)
	wantEFI, wantPolicy := sign(files)
	if !bytes.Equal(efi, wantEFI) || !bytes.Equal(policy, wantPolicy) {
		t.Error("the machine's keys sign otherwise than the same keys in files")
	}
	if err := held.Close(); err != nil {
		t.Error(err)
	}
	// The two keys the wrong way round: the certificate would be of another key than what signs.
	write("token.toml", strings.NewReplacer(`"db"`, `"pcr"`, `"pcr"`, `"db"`).Replace(token))
	if _, err := LoadKeys(dir); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("keys confused: %v", err)
	}
}
