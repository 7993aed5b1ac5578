package main_test

import (
	"archive/zip"
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms/cmstest"
)

// codeSigners have files signed with timestamps from the units: by osslsigncode a program for Windows, by jarsigner a JAR.
// The command lines are those of docs/tsa.md. Neither reads SM2 tokens, and each says so in its own way.
func codeSigners(t *testing.T, m *machine) {
	dir := tempDir(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	caKey, key := cmstest.NewRSAKey(2048), cmstest.NewRSAKey(2048)
	begin := time.Now().Add(-time.Hour)
	ca := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Code CA"}, NotBefore: begin, NotAfter: begin.AddDate(3, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: smx509.KeyUsageCertSign,
	}, nil, caKey.Public(), caKey)
	usage, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 3}}) // codeSigning
	if err != nil {
		t.Fatal(err)
	}
	cert := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Code"}, NotBefore: begin, NotAfter: begin.AddDate(2, 0, 0),
		KeyUsage: smx509.KeyUsageDigitalSignature, ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: usage}},
	}, ca, key.Public(), caKey)
	cmstest.Write(t, in("code.pem"), cmstest.CertPEM(cert))
	cmstest.Write(t, in("code-ca.pem"), cmstest.CertPEM(ca))
	cmstest.Write(t, in("code.key"), cmstest.KeyPEM(t, key))

	t.Run("osslsigncode", func(t *testing.T) {
		need(t, "osslsigncode")
		program := cmstest.Write(t, in("program.exe"), portableExecutable())
		for unit, c := range map[string]struct{ url, verdict string }{"rsa": {m.ends.TSARSA, "ok"}, "sm2": {m.ends.TSASM2, "failed"}} {
			signed := in(unit + ".exe")
			if o := command(t, nil, "osslsigncode", "sign", "-certs", in("code.pem"), "-key", in("code.key"), "-h", "sha256", "-ts", c.url,
				"-in", program, "-out", signed); o.code != 0 {
				t.Errorf("%s: %v", unit, o)
				continue
			}
			verify := func(file, anchor string) outcome {
				return command(t, nil, "osslsigncode", "verify", "-CAfile", in("code-ca.pem"), "-TSA-CAfile", anchor, "-in", file)
			}
			// It takes a signature whose timestamp it does not, as long as the signer's certificate has not ended.
			o := verify(signed, filepath.Join(m.dir, "tsa-ca-"+unit+".pem"))
			if o.code != 0 || !strings.Contains(o.stdout, "Timestamp Server Signature verification: "+c.verdict) {
				t.Errorf("%s: want the timestamp %s: %v", unit, c.verdict, o)
			}
			if unit == "sm2" {
				continue
			}
			if o := verify(signed, in("code-ca.pem")); strings.Contains(o.stdout, "Timestamp Server Signature verification: ok") {
				t.Errorf("verified under another CA: %v", o)
			}
		}
	})
	t.Run("jarsigner", func(t *testing.T) {
		need(t, "jarsigner", "keytool", "openssl")
		const pass = "changeit"
		java := []string{"JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"} // it starts sooner
		var archive bytes.Buffer
		w := zip.NewWriter(&archive)
		f, err := w.Create("record.txt")
		if err == nil {
			_, err = f.Write([]byte("出院小结"))
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		file := cmstest.Write(t, in("file.jar"), archive.Bytes())
		run := func(argv ...string) {
			t.Helper()
			if o := command(t, java, argv...); o.code != 0 {
				t.Fatalf("%v: %v", argv, o)
			}
		}
		run("openssl", "pkcs12", "-export", "-in", in("code.pem"), "-inkey", in("code.key"), "-certfile", in("code-ca.pem"), "-name", "code",
			"-passout", "pass:"+pass, "-out", in("keys.p12"))
		trust := func(alias, anchor string) {
			t.Helper()
			run("keytool", "-importcert", "-noprompt", "-alias", alias, "-file", anchor, "-keystore", in("trust.p12"), "-storetype", "PKCS12", "-storepass", pass)
		}
		sign := func(url, out string) outcome {
			return command(t, java, "jarsigner", "-keystore", in("keys.p12"), "-storetype", "PKCS12", "-storepass", pass,
				"-sigalg", "SHA256withRSA", "-digestalg", "SHA-256", "-tsa", url, "-signedjar", out, file, "code")
		}
		verify := func() outcome {
			return command(t, java, "jarsigner", "-verify", "-strict", "-verbose", "-certs", "-keystore", in("trust.p12"), "-storetype", "PKCS12",
				"-storepass", pass, in("rsa.jar"))
		}
		if o := sign(m.ends.TSARSA, in("rsa.jar")); o.code != 0 {
			t.Fatal(o)
		}
		trust("code", in("code-ca.pem"))
		if o := verify(); o.code == 0 {
			t.Errorf("verified without the timestamp's CA: %v", o)
		}
		trust("tsa", filepath.Join(m.dir, "tsa-ca-rsa.pem"))
		if o := verify(); o.code != 0 || !strings.Contains(o.stdout, "jar verified.") || !strings.Contains(o.stdout, "Timestamped by") {
			t.Error(o)
		}
		if o := sign(m.ends.TSASM2, in("sm2.jar")); o.code == 0 || !strings.Contains(o.stdout, "unable to sign jar") {
			t.Errorf("a timestamp by SM2: %v", o)
		}
		if _, err := os.Stat(in("sm2.jar")); err == nil {
			t.Error("jarsigner left a JAR with a timestamp by SM2")
		}
	})
}

// portableExecutable is the least that passes for a program: PE32, one section, one instruction (ret).
func portableExecutable() []byte {
	const page, header, optional = 512, 64, 64 + 24
	file := make([]byte, 2*page)
	put16 := func(at int, v uint16) { binary.LittleEndian.PutUint16(file[at:], v) }
	put32 := func(at int, v ...uint32) {
		for i, v := range v {
			binary.LittleEndian.PutUint32(file[at+4*i:], v)
		}
	}
	copy(file, "MZ")
	put32(60, header)
	copy(file[header:], "PE\x00\x00")
	put16(header+4, 0x14c) // i386
	put16(header+6, 1)     // sections
	put16(header+20, 224)  // size of the optional header
	put16(header+22, 0x102)
	put16(optional, 0x10b) // PE32
	put32(optional+4, page)
	put32(optional+16, 0x1000, 0x1000, 0x2000)
	put32(optional+28, 0x400000, 0x1000, page) // image base, alignments
	put16(optional+48, 4)                      // subsystem version
	put32(optional+56, 0x2000, page)           // sizes of image and headers
	put16(optional+68, 3)                      // console
	put32(optional+92, 16)                     // data directories
	section := optional + 224
	copy(file[section:], ".text")
	put32(section+8, page, 0x1000, page, page)
	put32(section+36, 0x60000020)
	file[page] = 0xc3
	return file
}
