package main_test

import (
	"bytes"
	"encoding/asn1"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"yinjian/appliance/assess"
	"yinjian/appliance/internal/testkit"
)

// TestDemo runs the demonstration and lets strangers judge what it leaves; then the same folder is served, and
// strangers' clients use it. It is not parallel: the demonstration has its time from a simulated receiver, which is not heard in
// time where many tests want the processor.
func TestDemo(t *testing.T) {
	need(t, "gpsd", "chronyd", "openssl", "java", "javac")
	dir := filepath.Join(tempDir(t), "demo")
	o := yinjian(t, "demo", "--dir", dir)
	if o.code != 0 {
		b, _ := os.ReadFile(filepath.Join(dir, "serve.log"))
		t.Fatalf("%v\nserve.log: %s", o, b)
	}

	// 1. What was shown: every step, in both languages.
	for i, want := range []string{
		"新设备", "设备运行", "登记两个应用", "SM2 裸签名", "SM2 CMS 签名", "RSA-2048 CMS 签名", "时间戳", "离线验证证据", "OpenSSL 独立验证",
		"篡改一", "篡改二", "篡改三",
	} {
		line := regexp.MustCompile(`(?m)^\[ ?` + big.NewInt(int64(i+1)).String() + `\] ✓ ` + want + `.*\n {8}[ -~→≤]+$`)
		if !line.MatchString(o.stdout) {
			t.Errorf("no line %d about %s, with English below:\n%s", i+1, want, o.stdout)
		}
	}
	if !regexp.MustCompile(`条目 \d+ 的 department_name 列`).MatchString(o.stdout) || !regexp.MustCompile(`指出条目 \d+（记录 [0-9a-f]{16}`).MatchString(o.stdout) {
		t.Errorf("the tampered places are not named:\n%s", o.stdout)
	}

	// 2. What was left.
	for _, name := range []string{
		"record.xml", "signature.der", "signature.cms", "signer.pem", "ca.pem", "token-sm2.tsq", "token-sm2.tsr", "token-rsa.tsq",
		"token-rsa.tsr", "tsa-sm2.pem", "tsa-rsa.pem", "tsa-ca-sm2.pem", "tsa-ca-rsa.pem", "log.pem", "evidence.json",
	} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "endpoints.json")); err == nil {
		t.Error("endpoints.json says that the appliance runs")
	}
	if t.Failed() {
		return
	}

	// 3. The judges, and then the same with one thing spoiled: a judge that takes that is none.
	t.Run("judges", func(t *testing.T) { judgeDemo(t, dir) })
	t.Run("alone", func(t *testing.T) { // the offline verifier, in a folder with nothing else
		handed := map[string]string{}
		for name, from := range map[string]string{
			"anchors/ca.pem": "ca.pem", "anchors/tsa-ca.pem": "tsa-ca-sm2.pem", "log.pem": "log.pem", "document": "record.xml", "evidence.json": "evidence.json",
		} {
			handed[name] = filepath.Join(dir, from)
		}
		testkit.NewJail(t, "../yinjian-verify", handed).JudgeAlone(t, 200)
	})

	// 4. A second demo starts anew in the same folder, but not where something else lies, nor beside a running one.
	m := serve(t, dir)
	t.Run("assess", func(t *testing.T) { assessDemo(t, dir) })
	t.Run("timestamps", func(t *testing.T) { stampByStrangers(t, m) })
	t.Run("docs/tsa.md", func(t *testing.T) { documentedClients(t, m) })
	t.Run("pkcs11-tool", func(t *testing.T) { useModule(t, m) })
	refused(t, 1, []string{"已在该目录运行"}, "demo", "--dir", dir)
	m.mustBeClean(t)
	m.stop(t)
	other := tempDir(t)
	if err := os.WriteFile(filepath.Join(other, "thesis.txt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, 2, []string{"不是空目录"}, "demo", "--dir", other)
	if _, err := os.Stat(filepath.Join(other, "thesis.txt")); err != nil {
		t.Error("the demo has cleared a folder that was not its own")
	}
}

// assessDemo makes the evaluator's pack as README.md says, and has the static verifier judge it in a folder with nothing else.
func assessDemo(t *testing.T, dir string) {
	out := filepath.Join(tempDir(t), "pack")
	mustRun(t, "assess", "--dir", dir, "--nonce", assessNonce, "--assessor", "测评机构", "--out", out)
	_, r, err := assess.Parse([]byte(readFile(t, out+".json")))
	if err != nil {
		t.Fatal(err)
	}
	for _, it := range r.Items {
		if it.ID == "software.ports" && it.Status != assess.Shown { // the simulated receiver's among them
			t.Errorf("%s is %s: %s", it.ID, it.Status, it.Why)
		}
	}
	handed := map[string]string{"log.pem": filepath.Join(dir, "log.pem"), "pack.json": out + ".json"}
	for _, name := range glob(t, filepath.Join(dir, "*.pem")) {
		handed["anchors/"+filepath.Base(name)] = name
	}
	jail := testkit.NewJail(t, "../yinjian-verify", handed)
	for nonce, want := range map[string]int{assessNonce: 0, "fedcba9876543210": 1} {
		if r, status := jail.Run(t, nil, "--anchors", "/anchors", "--log-key", "/log.pem", "--nonce", nonce, "/pack.json"); status != want {
			t.Errorf("nonce %s: status %d, want %d: %+v", nonce, status, want, r)
		}
	}
}

func judgeDemo(t *testing.T, dir string) {
	java, err := judge()
	if err != nil {
		t.Skip(err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	spoilt := tempDir(t)
	// spoil copies a file with one bit changed at a place that is given by a byte string before it, or at the end.
	spoil := func(name string, after []byte) string {
		b, err := os.ReadFile(in(name))
		if err != nil {
			t.Fatal(err)
		}
		at := len(b) - 1
		if after != nil {
			i := bytes.Index(b, after)
			if i < 0 {
				t.Fatalf("%s has no %q", name, after)
			}
			at = i + len(after)
		}
		b[at] ^= 1
		out := filepath.Join(spoilt, name)
		if err := os.WriteFile(out, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return out
	}
	openssl := func(args ...string) []string { return append([]string{"openssl"}, args...) }
	bc := func(args ...string) []string { return append(append([]string{}, java...), args...) }
	const id = "distid:1234567812345678"
	record, changed := in("record.xml"), spoil("record.xml", []byte("<"))
	der := func(args ...string) []string {
		return openssl(append([]string{"dgst", "-sm3", "-verify", in("signer-key.pem"), "-sigopt", id}, args...)...)
	}
	cmsRSA := func(message, content string) []string {
		return openssl("cms", "-verify", "-inform", "DER", "-in", message, "-content", content, "-binary", "-CAfile", in("ca-rsa.pem"), "-purpose", "any", "-out", os.DevNull)
	}
	for name, c := range map[string]struct{ good, bad []string }{
		"OpenSSL: signature.der, document changed":  {der("-signature", in("signature.der"), record), der("-signature", in("signature.der"), changed)},
		"OpenSSL: signature.der, signature changed": {der("-signature", in("signature.der"), record), der("-signature", spoil("signature.der", nil), record)},
		"OpenSSL: signature.der, other identity": {der("-signature", in("signature.der"), record),
			openssl("dgst", "-sm3", "-verify", in("signer-key.pem"), "-sigopt", "distid:8765432187654321", "-signature", in("signature.der"), record)},
		"OpenSSL: RSA token": {
			openssl("ts", "-verify", "-queryfile", in("token-rsa.tsq"), "-in", in("token-rsa.tsr"), "-CAfile", in("tsa-ca-rsa.pem")),
			openssl("ts", "-verify", "-queryfile", in("token-rsa.tsq"), "-in", spoil("token-rsa.tsr", nil), "-CAfile", in("tsa-ca-rsa.pem"))},
		"OpenSSL: RSA token over the record": {
			openssl("ts", "-verify", "-data", record, "-in", in("token-rsa.tsr"), "-CAfile", in("tsa-ca-rsa.pem")),
			openssl("ts", "-verify", "-data", changed, "-in", in("token-rsa.tsr"), "-CAfile", in("tsa-ca-rsa.pem"))},
		"OpenSSL: RSA token, other CA": {
			openssl("ts", "-verify", "-queryfile", in("token-rsa.tsq"), "-in", in("token-rsa.tsr"), "-CAfile", in("tsa-ca-rsa.pem")),
			openssl("ts", "-verify", "-queryfile", in("token-rsa.tsq"), "-in", in("token-rsa.tsr"), "-CAfile", in("tsa-ca-sm2.pem"))},
		"OpenSSL: signer under CA": {
			openssl("verify", "-x509_strict", "-vfyopt", id, "-CAfile", in("ca.pem"), in("signer.pem")),
			openssl("verify", "-x509_strict", "-vfyopt", id, "-CAfile", in("ca.pem"), in("signer-rsa.pem"))},
		"OpenSSL: TSA under CA": {
			openssl("verify", "-x509_strict", "-purpose", "timestampsign", "-vfyopt", id, "-CAfile", in("tsa-ca-sm2.pem"), in("tsa-sm2.pem")),
			openssl("verify", "-x509_strict", "-purpose", "timestampsign", "-vfyopt", id, "-CAfile", in("ca.pem"), in("signer.pem"))},
		"OpenSSL: RSA CMS, document changed": {cmsRSA(in("signature-rsa.cms"), record), cmsRSA(in("signature-rsa.cms"), changed)},
		"Bouncy Castle: SM2 token": {
			bc("tst", in("token-sm2.tsr"), in("token-sm2.tsq"), in("tsa-sm2.pem")),
			bc("tst", spoil("token-sm2.tsr", nil), in("token-sm2.tsq"), in("tsa-sm2.pem"))},
		"Bouncy Castle: SM2 token for another query": {
			bc("tst", in("token-sm2.tsr"), in("token-sm2.tsq"), in("tsa-sm2.pem")),
			bc("tst", in("token-sm2.tsr"), in("token-rsa.tsq"), in("tsa-sm2.pem"))},
		"Bouncy Castle: SM2 CMS":           {bc("cms", in("signature.cms"), in("signer.pem"), record), bc("cms", in("signature.cms"), in("signer.pem"), changed)},
		"Bouncy Castle: its timestamp":     {bc("cmsts", in("signature.cms"), in("tsa-sm2.pem")), bc("cmsts", spoil("signature.cms", nil), in("tsa-sm2.pem"))},
		"Bouncy Castle: RSA CMS timestamp": {bc("cmsts", in("signature-rsa.cms"), in("tsa-rsa.pem")), bc("cmsts", in("signature-rsa.cms"), in("tsa-sm2.pem"))},
		"yinjian verify": {
			[]string{built.binary, "verify", "--anchors", dir, "--log-key", in("log.pem"), "--document", record, in("evidence.json")},
			[]string{built.binary, "verify", "--anchors", dir, "--log-key", in("log.pem"), "--document", changed, in("evidence.json")}},
		"yinjian verify, CMS": {
			[]string{built.binary, "verify", "--anchors", dir, "--log-key", in("log.pem"), "--document", record, in("evidence-cms.json")},
			[]string{built.binary, "verify", "--anchors", dir, "--log-key", in("signer-key.pem"), "--document", record, in("evidence-cms.json")}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if o := command(t, nil, c.good...); o.code != 0 {
				t.Errorf("%s: %v", strings.Join(c.good, " "), o)
			}
			if o := command(t, nil, c.bad...); o.code == 0 {
				t.Errorf("spoilt and taken: %s: %v", strings.Join(c.bad, " "), o)
			}
		})
	}
}

// stampByStrangers asks both units with OpenSSL's request and curl, over plain HTTP.
func stampByStrangers(t *testing.T, m *machine) {
	need(t, "curl")
	dir := tempDir(t)
	record := filepath.Join(m.dir, "record.xml")
	for unit, c := range map[string]struct{ url, digest string }{"sm2": {m.ends.TSASM2, "-sm3"}, "rsa": {m.ends.TSARSA, "-sha256"}} {
		query, reply := filepath.Join(dir, unit+".tsq"), filepath.Join(dir, unit+".tsr")
		if o := command(t, nil, "openssl", "ts", "-query", "-data", record, c.digest, "-cert", "-out", query); o.code != 0 {
			t.Fatal(o)
		}
		o := command(t, nil, "curl", "-sS", "-f", "--max-time", "30", "-H", "Content-Type: application/timestamp-query", "--data-binary", "@"+query,
			"-w", "%{content_type}", "-o", reply, c.url)
		if o.code != 0 || o.stdout != "application/timestamp-reply" {
			t.Fatalf("%s: %v", unit, o)
		}
		if unit == "rsa" {
			if o := command(t, nil, "openssl", "ts", "-verify", "-queryfile", query, "-in", reply, "-CAfile", filepath.Join(m.dir, "tsa-ca-rsa.pem")); o.code != 0 {
				t.Error(o)
			}
			continue
		}
		java, err := judge()
		if err != nil {
			t.Skip(err)
		}
		if o := command(t, nil, append(append([]string{}, java...), "tst", reply, query, filepath.Join(m.dir, "tsa-sm2.pem"))...); o.code != 0 {
			t.Error(o)
		}
	}
	// What is no query is answered as RFC 3161 has it: a rejection, with status 200.
	o := command(t, nil, "curl", "-sS", "--max-time", "30", "-H", "Content-Type: application/timestamp-query", "--data-binary", "nonsense",
		"-o", filepath.Join(dir, "bad.tsr"), "-w", "%{http_code}", m.ends.TSASM2)
	if o.code != 0 || o.stdout != "200" {
		t.Errorf("nonsense: %v", o)
	}
	if o := command(t, nil, "openssl", "ts", "-reply", "-in", filepath.Join(dir, "bad.tsr"), "-text"); !strings.Contains(o.stdout, "Rejected") || strings.Contains(o.stdout, "TST info:\nVersion") {
		t.Errorf("the answer to nonsense: %v", o)
	}
	// Nothing but timestamps is to be had without TLS.
	for _, path := range []string{"/v1/certs/1", "/health/state", "/admin/v1/state", "/openapi.json"} {
		o := command(t, nil, "curl", "-sS", "--max-time", "30", "-o", os.DevNull, "-w", "%{http_code}", strings.TrimSuffix(m.ends.TSASM2, "/tsa/sm2")+path)
		if o.stdout == "200" {
			t.Errorf("%s is answered over plain HTTP", path)
		}
	}
}

// useModule drives the running software cipher machine with OpenSC's tool, found once by the environment and once by
// the file beside the module.
func useModule(t *testing.T, m *machine) {
	need(t, "pkcs11-tool")
	dir := tempDir(t)
	socket := filepath.Join(m.dir, "softtoken", "p11.sock")
	pin := func(class string) string {
		b, err := os.ReadFile(filepath.Join(m.dir, "secrets", class+".pin"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	tool := func(args ...string) outcome {
		t.Helper()
		o := command(t, []string{"YINJIAN_P11_SOCKET=" + socket}, append([]string{"pkcs11-tool", "--module", built.module}, args...)...)
		if o.code != 0 {
			t.Fatalf("pkcs11-tool %v: %v", args, o)
		}
		return o
	}
	staff := func(args ...string) outcome {
		t.Helper()
		return tool(append([]string{"--token-label", "yinjian-staff", "--login", "--pin", pin("staff")}, args...)...)
	}

	// 1. Slots, each saying what it is.
	slots := tool("--list-slots").stdout
	for _, class := range []string{"staff", "tsa", "log", "ca"} {
		if !strings.Contains(slots, "yinjian-"+class) {
			t.Errorf("no token yinjian-%s:\n%s", class, slots)
		}
		// 2. Each class has its own PIN.
		if class != "staff" {
			o := command(t, []string{"YINJIAN_P11_SOCKET=" + socket}, "pkcs11-tool", "--module", built.module, "--token-label", "yinjian-"+class, "--login", "--pin", pin(class), "--list-objects")
			if o.code != 0 || !strings.Contains(o.stdout, class+"/") && class != "log" {
				t.Errorf("yinjian-%s: %v", class, o)
			}
		}
	}
	if strings.Count(slots, "EVALUATION ONLY") < 4 || strings.Contains(slots, "count low") {
		t.Errorf("slots:\n%s", slots)
	}

	// 3. Objects: private keys show after the login only, and are sensitive and not extractable.
	objects := staff("--list-objects").stdout
	sm2 := regexp.MustCompile(`label: +staff/D10023/[0-9a-f]{8}/SM2\n +ID: +([0-9a-f]{32})\n`).FindStringSubmatch(objects)
	if sm2 == nil {
		t.Fatalf("no SM2 key of the doctor:\n%s", objects)
	}
	if !strings.Contains(objects, "Private Key Object; RSA") || !strings.Contains(objects, "sensitive, always sensitive, never extractable") {
		t.Errorf("objects after the login:\n%s", objects)
	}
	if o := tool("--token-label", "yinjian-staff", "--list-objects"); strings.Contains(o.stdout, "Private Key") {
		t.Errorf("private keys without a login:\n%s", o.stdout)
	}

	// 4. A new RSA pair signs, OpenSSL verifies; the pair is destroyed again.
	data := filepath.Join(dir, "data")
	if err := os.WriteFile(data, documentOf("pkcs11-tool"), 0o600); err != nil {
		t.Fatal(err)
	}
	sig, pub := filepath.Join(dir, "sig"), filepath.Join(dir, "pub.der")
	staff("--keypairgen", "--key-type", "rsa:2048", "--label", "stranger", "--id", "5354")
	staff("--sign", "--mechanism", "SHA256-RSA-PKCS", "--id", "5354", "--input-file", data, "--output-file", sig)
	staff("--read-object", "--type", "pubkey", "--id", "5354", "--output-file", pub)
	verify := []string{"openssl", "dgst", "-sha256", "-verify", pub, "-keyform", "DER", "-signature", sig}
	if o := command(t, nil, append(verify, data)...); o.code != 0 {
		t.Errorf("RSA: %v", o)
	}
	if o := command(t, nil, append(verify, pub)...); o.code == 0 {
		t.Error("RSA: taken over other data")
	}
	staff("--delete-object", "--type", "privkey", "--id", "5354")
	staff("--delete-object", "--type", "pubkey", "--id", "5354")
	if o := staff("--list-objects"); strings.Contains(o.stdout, "stranger") {
		t.Errorf("the pair is still there:\n%s", o.stdout)
	}

	// 5. The doctor's SM2 key signs by the vendor's mechanism (message in, r ‖ s out); OpenSSL verifies with the
	// certificate that the appliance issued. The configuration file leads to the socket this time.
	own := filepath.Join(dir, "module.so")
	b, err := os.ReadFile(built.module)
	if err == nil {
		err = os.WriteFile(own, b, 0o755)
	}
	if err == nil {
		err = os.WriteFile(own+".conf", []byte("# where the cipher machine is\nsocket="+socket+"\n"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	o := command(t, nil, "pkcs11-tool", "--module", own, "--token-label", "yinjian-staff", "--login", "--pin", pin("staff"),
		"--sign", "--mechanism", "0xFFFFF003", "--id", sm2[1], "--input-file", data, "--output-file", sig)
	if o.code != 0 {
		t.Fatal(o)
	}
	raw, err := os.ReadFile(sig)
	if err != nil || len(raw) != 64 {
		t.Fatalf("%d bytes of SM2 signature, %v", len(raw), err)
	}
	der, err := asn1.Marshal([]*big.Int{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
	if err == nil {
		err = os.WriteFile(sig, der, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if o := command(t, nil, "openssl", "dgst", "-sm3", "-verify", filepath.Join(m.dir, "signer-key.pem"), "-sigopt", "distid:1234567812345678", "-signature", sig, data); o.code != 0 {
		t.Errorf("SM2: %v", o)
	}

	// 6. A wrong PIN is counted and said, and the appliance, which is logged in, is not disturbed.
	if o := command(t, []string{"YINJIAN_P11_SOCKET=" + socket}, "pkcs11-tool", "--module", built.module, "--token-label", "yinjian-staff", "--login", "--pin", "wrong-pin", "--list-objects"); o.code == 0 || !strings.Contains(o.stderr, "CKR_PIN_INCORRECT") {
		t.Errorf("wrong PIN: %v", o)
	}
	if o := tool("--list-slots"); !strings.Contains(o.stdout, "user PIN count low") {
		t.Errorf("a wrong PIN does not show:\n%s", o.stdout)
	}
	staff("--list-objects") // the right one clears the count
	if o := tool("--list-slots"); strings.Contains(o.stdout, "user PIN count low") {
		t.Errorf("the right PIN has not cleared the count:\n%s", o.stdout)
	}
}
