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

// documentedClients runs the command lines of docs/tsa.md against the units, each as it stands there, and what must fail
// beside it: neither osslsigncode nor jarsigner reads SM2 tokens, and each says so in its own way.
func documentedClients(t *testing.T, m *machine) {
	page, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", "tsa.md"))
	if err != nil {
		t.Fatal(err)
	}
	java, err := judge()
	if err != nil {
		t.Skip(err)
	}
	dir := tempDir(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"record.xml", "tsa-sm2.pem", "tsa-ca-rsa.pem", "tsa-ca-sm2.pem"} {
		cmstest.Write(t, in(name), cmstest.Read(t, filepath.Join(m.dir, name)))
	}
	codeSigner(t, dir)
	// lines runs a program's block; changes are made to it first.
	lines := func(t *testing.T, program string, changes ...string) outcome {
		t.Helper()
		_, block, ok := strings.Cut(string(page), "\n```sh\n# "+program+"\n")
		block, _, ended := strings.Cut(block, "\n```\n")
		if !ok || !ended {
			t.Fatalf("docs/tsa.md has no block %s", program)
		}
		for i := 0; i < len(changes); i += 2 {
			if !strings.Contains(block, changes[i]) {
				t.Fatalf("%s: %q is not in its block", program, changes[i])
			}
			block = strings.ReplaceAll(block, changes[i], changes[i+1])
		}
		cmd := []string{"env", "-C", dir, "sh", "-euc", block}
		return command(t, []string{
			"rsa=" + m.ends.TSARSA, "sm2=" + m.ends.TSASM2, "bccheck=" + strings.Join(java, " "),
			"JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC", // it starts sooner
		}, cmd...)
	}
	for program, words := range map[string][]string{
		"openssl":      {"Status: Granted.", "Verification: OK"},
		"bouncycastle": {"Status: Granted.", "OK serial"},
		"osslsigncode": {"Timestamp Server Signature verification: ok"},
		"jarsigner":    {"jar signed.", "Timestamped by", "jar verified."},
	} {
		t.Run(program, func(t *testing.T) {
			t.Parallel()
			switch program {
			case "osslsigncode":
				need(t, "osslsigncode")
			case "jarsigner":
				need(t, "jarsigner", "keytool")
			}
			o := lines(t, program)
			for _, w := range words {
				if o.code != 0 || !strings.Contains(o.stdout+o.stderr, w) {
					t.Fatalf("want %q: %v", w, o)
				}
			}
			switch program {
			case "openssl":
				if o := lines(t, program, "tsa-ca-rsa.pem", "code-ca.pem", "reply.tsr", "reply2.tsr"); o.code == 0 {
					t.Errorf("verified under another CA: %v", o)
				}
			case "osslsigncode":
				if o := lines(t, program, "tsa-ca-rsa.pem", "code-ca.pem", "signed.exe", "signed2.exe"); strings.Contains(o.stdout, words[0]) {
					t.Errorf("verified under another CA: %v", o)
				}
				o := lines(t, program, "$rsa", "$sm2", "tsa-ca-rsa.pem", "tsa-ca-sm2.pem", "signed.exe", "signed3.exe")
				if o.code != 0 || !strings.Contains(o.stdout, "Timestamp Server Signature verification: failed") {
					t.Errorf("a timestamp by SM2: %v", o)
				}
			case "jarsigner":
				if o := lines(t, program, "-alias tsa -file tsa-ca-rsa.pem", "-alias tsa -file code-ca.pem", "signed.jar", "signed2.jar",
					"trust.p12", "trust2.p12"); o.code == 0 || !strings.Contains(o.stdout, "jar signed.") {
					t.Errorf("verified without the timestamp's CA: %v", o)
				}
				o := lines(t, program, "$rsa", "$sm2", "signed.jar", "signed3.jar")
				if o.code == 0 || !strings.Contains(o.stdout, "unable to sign jar") {
					t.Errorf("a timestamp by SM2: %v", o)
				}
				if _, err := os.Stat(in("signed3.jar")); err == nil {
					t.Error("jarsigner left a JAR with a timestamp by SM2")
				}
			}
		})
	}
}

// codeSigner leaves what is needed to sign programs: a key, its certificate and the CA's, a program and a JAR.
func codeSigner(t *testing.T, dir string) {
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
	for name, content := range map[string][]byte{
		"code.pem": cmstest.CertPEM(cert), "code-ca.pem": cmstest.CertPEM(ca), "code.key": cmstest.KeyPEM(t, key), "program.exe": portableExecutable(),
		"file.jar": archive.Bytes(),
	} {
		cmstest.Write(t, filepath.Join(dir, name), content)
	}
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
