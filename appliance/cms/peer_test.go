package cms_test

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/pkcs7"
	"github.com/emmansun/gmsm/sm2"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
)

// recordings are the messages that peers have made; TestPeersMessages says how.
func recordings(t testing.TB) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join("testdata", "peer", "*.der"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	return names
}

// TestPeersMessages verifies messages that others made over content.bin. File names say who made them: bc-… Bouncy Castle
// 1.72 by BCCheck sign, openssl-… by openssl cms -sign (3.0). With -update they are made anew.
func TestPeersMessages(t *testing.T) {
	if *update {
		record(t)
	}
	content := cmstest.Read(t, filepath.Join("testdata", "peer", "content.bin"))
	certs := map[string]string{"sm2": "sm2.pem", "rsa": "rsa.pem"}
	for _, name := range recordings(t) {
		t.Run(filepath.Base(name), func(t *testing.T) {
			suite := strings.Split(filepath.Base(name), "-")[1]
			cert := parsePEM(t, cmstest.Read(t, filepath.Join("testdata", "peer", certs[suite])))
			in := cmstest.Read(t, name)
			sd, err := cms.Parse(in)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(sd.Bytes(), in) {
				t.Error("encodes to other bytes")
			}
			if detached := strings.Contains(name, "detached"); detached != (sd.Content == nil) {
				t.Errorf("detached %v, content %q", detached, sd.Content)
			}
			report, err := sd.Verify(content)
			if err != nil || !report.Signer.Equal(cert) {
				t.Errorf("Verify = %v: %v", err, report.Checks)
			}
			if _, err := sd.Verify(append(bytes.Clone(content), '!')); err == nil {
				t.Error("another content verifies")
			}
		})
	}
}

func record(t *testing.T) {
	dir := filepath.Join("testdata", "peer")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	cmstest.Write(t, path("content.bin"), content)
	for name, who := range people {
		who := who()
		cert := cmstest.Write(t, path(name+".pem"), cmstest.CertPEM(who.cert))
		key := cmstest.Write(t, filepath.Join(t.TempDir(), "key.pem"), cmstest.KeyPEM(t, who.key.key))
		cmstest.MustBouncyCastle(t, "sign", key, cert, path("content.bin"), path("bc-"+name+"-attached.der"), "attached")
		cmstest.MustBouncyCastle(t, "sign", key, cert, path("content.bin"), path("bc-"+name+"-detached.der"), "detached")
		if name != "rsa" { // OpenSSL 3.0 cms -sign makes nothing with an SM2 key
			continue
		}
		for variant, flags := range map[string][]string{
			"attached": {"-nodetach"}, "detached": {}, "keyid-attached": {"-nodetach", "-keyid"},
			"noattr-attached": {"-nodetach", "-noattr"}, "cades-detached": {"-cades"},
		} {
			args := []string{"cms", "-sign", "-binary", "-md", "sha256", "-outform", "DER", "-in", path("content.bin"),
				"-signer", cert, "-inkey", key, "-out", path("openssl-rsa-" + variant + ".der")}
			cmstest.MustOpenSSL(t, append(args, flags...)...)
		}
	}
}

func TestBouncyCastleVerifies(t *testing.T) {
	t.Parallel()
	for name, who := range people {
		for variant, p := range map[string]cms.Params{
			"attached":   {Content: content},
			"detached":   {Content: content, Detached: true, AlgorithmProtection: true},
			"by digest":  {Digest: digestOf(name, content), Detached: true},
			"gm0010":     {Content: content, Profile: cms.GM0010},
			"with extra": {Content: content, SignedAttributes: []cms.Attribute{{Type: []int{1, 2, 156, 1, 1}, Values: [][]byte{{0x0c, 1, 'a'}}}}},
		} {
			if name == "rsa" && variant != "attached" && variant != "detached" {
				continue
			}
			t.Run(name+"/"+variant, func(t *testing.T) {
				t.Parallel()
				who, dir := who(), t.TempDir()
				p.Certificates = who.chain()
				signed, err := cms.Sign(t.Context(), who.key, p)
				if err != nil {
					t.Fatal(err)
				}
				message := cmstest.Write(t, filepath.Join(dir, "message"), signed.Bytes())
				cert := cmstest.Write(t, filepath.Join(dir, "cert.pem"), cmstest.CertPEM(who.cert))
				args := []string{"cms", message, cert}
				if p.Detached {
					args = append(args, cmstest.Write(t, filepath.Join(dir, "content"), content))
				}
				cmstest.MustBouncyCastle(t, args...)
				if variant != "attached" {
					return
				}
				// the judge can say no
				bad := bytes.Replace(signed.Bytes(), signed.SignatureValue[len(signed.SignatureValue)-8:], make([]byte, 8), 1)
				if out, err := cmstest.BouncyCastle(t, "cms", cmstest.Write(t, filepath.Join(dir, "bad"), bad), cert); err == nil {
					t.Errorf("a spoiled signature passes: %s", out)
				}
			})
		}
	}
}

func TestOpenSSLVerifiesRSA(t *testing.T) {
	t.Parallel()
	who, dir := rsaPerson(), t.TempDir()
	ca := cmstest.Write(t, filepath.Join(dir, "ca.pem"), cmstest.CertPEM(who.ca))
	contentFile := cmstest.Write(t, filepath.Join(dir, "content"), content)
	for name, p := range map[string]cms.Params{
		"attached":  {Content: content, AlgorithmProtection: true},
		"detached":  {Content: content, Detached: true},
		"by digest": {Digest: digestOf("rsa", content), Detached: true},
	} {
		p.Certificates = who.chain()
		signed, err := cms.Sign(t.Context(), who.key, p)
		if err != nil {
			t.Fatal(err)
		}
		message := cmstest.Write(t, filepath.Join(dir, "message"), signed.Bytes())
		out := filepath.Join(dir, "out")
		args := []string{"cms", "-verify", "-binary", "-inform", "DER", "-in", message, "-CAfile", ca, "-purpose", "any",
			"-attime", "1790000000", "-cades", "-out", out} // -cades: the signing-certificate attribute is checked too
		if p.Detached {
			args = append(args, "-content", contentFile)
		}
		cmstest.MustOpenSSL(t, args...)
		if got := cmstest.Read(t, out); !bytes.Equal(got, content) {
			t.Errorf("%s: openssl read %q", name, got)
		}
		bad := bytes.Replace(signed.Bytes(), digestOf("rsa", content), digestOf("rsa", nil), 1)
		cmstest.Write(t, message, bad)
		if out, err := cmstest.OpenSSL(t, args...); err == nil {
			t.Errorf("%s: a changed digest passes openssl: %s", name, out)
		}
	}
}

// TestOpenSSLVerifiesSM2 is piecewise: OpenSSL 3.0's cms cannot be told the signer's identity, its dgst can.
func TestOpenSSLVerifiesSM2(t *testing.T) {
	t.Parallel()
	who := sm2Person()
	for _, profile := range []cms.Profile{cms.RFC5652, cms.GM0010} {
		dir := t.TempDir()
		signed, err := cms.Sign(t.Context(), who.key, cms.Params{Content: content, Certificates: who.chain(), Profile: profile})
		if err != nil {
			t.Fatal(err)
		}
		sd, err := cms.Parse(signed.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		si := sd.SignerInfos[0]
		// cut from the message itself, [0] made SET
		at := bytes.Index(signed.Bytes(), si.SignedAttributesDER()[1:])
		if at < 1 || signed.Bytes()[at-1] != 0xa0 {
			t.Fatal("the signed attributes are not in the message under [0]")
		}
		attributes := append([]byte{0x31}, signed.Bytes()[at:at+len(si.SignedAttributesDER())-1]...)
		args := func(distid string) []string {
			return []string{"dgst", "-sm3", "-verify", cmstest.Write(t, filepath.Join(dir, "pub.pem"), publicPEM(t, &who.key.key.(*sm2.PrivateKey).PublicKey)),
				"-sigopt", "distid:" + distid, "-signature", cmstest.Write(t, filepath.Join(dir, "sig"), si.Signature),
				cmstest.Write(t, filepath.Join(dir, "attributes"), attributes)}
		}
		cmstest.MustOpenSSL(t, args("1234567812345678")...)
		if out, err := cmstest.OpenSSL(t, args("another")...); err == nil {
			t.Errorf("openssl verifies with another identity: %s", out)
		}
		digest := strings.Fields(cmstest.MustOpenSSL(t, "dgst", "-sm3", "-r", cmstest.Write(t, filepath.Join(dir, "content"), content)))[0]
		if value, ok := si.Attribute(cms.OIDMessageDigest); !ok || digest != hex.EncodeToString(value[2:]) {
			t.Errorf("openssl's SM3 %s, messageDigest %x", digest, value)
		}
	}
}

// TestGMSM: gmsm's pkcs7 (v0.44.0) knows 301.1 only, so it reads profile gm0010; and what it writes is read here.
func TestGMSM(t *testing.T) {
	t.Parallel()
	who := sm2Person()
	signed, err := cms.Sign(t.Context(), who.key, cms.Params{Content: content, Certificates: who.chain(), Profile: cms.GM0010})
	if err != nil {
		t.Fatal(err)
	}
	p7, err := pkcs7.Parse(signed.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if err := p7.Verify(); err != nil || !bytes.Equal(p7.Content, content) {
		t.Errorf("gmsm: Verify = %v, content %q", err, p7.Content)
	}

	for name, make := range map[string]func([]byte) (*pkcs7.SignedData, error){
		"GM/T 0010": pkcs7.NewSMSignedData, "PKCS#7": pkcs7.NewSignedData,
	} {
		sd, err := make(content)
		if err != nil {
			t.Fatal(err)
		}
		sd.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSM3)
		if err := sd.AddSigner(who.cert, who.key.key, pkcs7.SignerInfoConfig{}); err != nil {
			t.Fatal(err)
		}
		theirs, err := sd.Finish()
		if err != nil {
			t.Fatal(err)
		}
		message, err := cms.Parse(theirs)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if report, err := message.Verify(content); err != nil {
			t.Errorf("%s: Verify = %v: %v", name, err, report.Checks)
		}
	}
}
