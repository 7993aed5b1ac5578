package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/spf13/cobra"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance"
	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/ntp/sysclock"
	"yinjian/tsa"
)

//go:embed demo/record.xml
var demoRecord []byte

// demoMark is in a folder that a demo made, and may therefore be made anew by the next one.
const demoMark = ".yinjian-demo"

func demoCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "demo --dir DIR",
		Short: "演示：签名、时间戳、存证、验证、防篡改 (sign, stamp, store, verify, tamper-check a record)",
		Args:  exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			abs, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(c.Context(), 5*time.Minute)
			defer cancel()
			return runDemo(ctx, abs)
		},
	}
	c.Flags().StringVar(&dir, "dir", "out/demo", "输出目录，每次重建 (folder, made anew each time)")
	return c
}

// A demo is one run. Each step prints one line when it is done.
type demo struct {
	dir   string
	clock *sysclock.Clock
	step  int
	begun time.Duration

	server   *exec.Cmd
	serveLog *os.File
	ends     endpoints
	admin    *client.Admin
	roots    *x509.CertPool
	his, emr *client.Client
}

// fresh makes a new appliance in the demo's folder, which an earlier demo may have left.
func (d *demo) fresh(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(d.dir, demoMark)); err == nil {
		unlock, err := appliance.Lock(d.dir) // the folder of an appliance that runs is not pulled away from under it
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		err = os.RemoveAll(d.dir)
		if unlock != nil {
			unlock()
		}
		if err != nil {
			return err
		}
	}
	if err := mayInit(d.dir); err != nil {
		return err
	}
	said := defaultAnswers()
	said.TSAPlain, said.Admin, said.SimulatedBeidou = "127.0.0.1:0", "127.0.0.1:0", true
	if err := runInit(ctx, initOptions{dir: d.dir, answers: said}); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.dir, demoMark), nil, 0o600)
}

func (d *demo) done(zh, en string, args ...any) {
	d.step++
	took := d.clock.Monotonic() - d.begun
	fmt.Printf("[%2d] ✓ %s\n        %s  (%.1f s)\n", d.step, fmt.Sprintf(zh, args...), en, took.Seconds())
	d.begun = d.clock.Monotonic()
}

func runDemo(ctx context.Context, dir string) (err error) {
	clock, err := sysclock.Open()
	if err != nil {
		return err
	}
	d := &demo{dir: dir, clock: clock, begun: clock.Monotonic()}
	fmt.Println("印鉴演示：一份出院小结，从签名到防篡改。软件密码机与证书仅供评估。")
	fmt.Println("Yinjian demo: one discharge summary, from signature to tamper check. Evaluation only.")
	fmt.Println()

	// 1. A new appliance.
	if err := d.fresh(ctx); err != nil {
		return err
	}
	d.done("新设备：配置、口令、软件密码机的五个令牌（签名人、时间戳、日志、CA、TLS）", "a new appliance: configuration, PINs, five tokens in the software cipher machine")

	// 2. Start it.
	defer func() {
		if serr := d.stopServer(); serr != nil && err == nil {
			err = serr
		}
	}()
	if err := d.startServer(ctx); err != nil {
		return err
	}
	st, err := d.state(ctx)
	if err != nil {
		return err
	}
	d.done("设备运行：北斗语句 → gpsd → chrony → 可信时间（误差上限 %.0f ms），密钥与证书已在密码机内生成", "running: BeiDou sentences → gpsd → chrony → trusted time; keys and certificates made", st.Time.BoundMS)

	// 3. Two applications, one doctor.
	if err := d.register(ctx); err != nil {
		return explain(err)
	}
	if err := d.administrators(ctx); err != nil {
		return explain(err)
	}
	d.done("登记两个应用（HIS 本部、EMR 滨海）与医师 D10023（PIN 在密码机内核验）", "two applications and a doctor with a PIN, journalled")

	// 4. Sign.
	raw, cmsSM2, rsa, err := d.sign(ctx)
	if err != nil {
		return explain(err)
	}
	d.done("SM2 裸签名（HIS，PIN 一次性授权）：记录 %s…", "SM2 raw signature by HIS, one-time consent by PIN", raw.RecordID[:16])
	d.done("SM2 CMS 签名（EMR，PIN 限次授权）：签署时间 %s", "SM2 CMS by EMR of the other campus, activation by PIN", cmsSM2.GenTime)
	d.done("RSA-2048 CMS 签名（EMR）：记录 %s…", "RSA-2048 CMS by EMR", rsa.RecordID[:16])

	// 5. Timestamps over the record, as any RFC 3161 client would ask.
	for _, unit := range []string{"sm2", "rsa"} {
		if err := d.stamp(ctx, unit); err != nil {
			return fmt.Errorf("timestamp %s: %w", unit, err)
		}
	}
	d.done("时间戳：/tsa/sm2（SM3）与 /tsa/rsa（SHA-256），RFC 3161", "RFC 3161 tokens over the record from both units")

	// 6. Evidence, judged without the appliance.
	bundle, err := d.evidence(ctx, raw, cmsSM2)
	if err != nil {
		return explain(err)
	}
	trust, err := show.LoadTrust(dir, filepath.Join(dir, "log.pem"))
	if err != nil {
		return err
	}
	report := evidence.Verify(bundle, trust, evidence.Input{Document: demoRecord})
	if report.Verdict != pki.Valid {
		show.Print(os.Stdout, report)
		return fmt.Errorf("the evidence is %s, it should be valid", report.Verdict)
	}
	passed := 0
	for _, c := range report.Checks {
		if c.Status == pki.Passed {
			passed++
		}
	}
	d.done("离线验证证据：有效，%d 项检查通过，未检查的逐项列明", "evidence verified offline: valid, what was not checked is listed", passed)

	// 7. OpenSSL, a stranger, agrees.
	if err := d.openssl(ctx); err != nil {
		return err
	}

	// 8. One byte of the document.
	changed := bytes.Replace(demoRecord, []byte("0/9"), []byte("1/9"), 1) // nodes found cancerous: none, one
	if bytes.Equal(changed, demoRecord) {
		return errors.New("the record has changed and the demo does not know where to tamper")
	}
	report = evidence.Verify(bundle, trust, evidence.Input{Document: changed})
	if err := mustFail(report, evidence.CheckDocument); err != nil {
		return err
	}
	d.done("篡改一：病历改一字节（淋巴结 0/9→1/9）→ 无效，指出“原文已改动”", "tamper 1: one byte of the document → invalid, named")

	// 9. One byte of the projection, while the appliance runs.
	// 10. One byte of the journal, on a copy.
	if err := d.tamperProjection(ctx, raw); err != nil {
		return err
	}
	if err := d.stopServer(); err != nil {
		return err
	}
	if err := d.tamperJournal(ctx, raw); err != nil {
		return err
	}

	fmt.Printf("\n完成 done。文件在 files are in: %s\n", dir)
	fmt.Println("  record.xml signature.der signature.cms signer.pem ca.pem log.pem evidence.json")
	fmt.Println("  token-sm2.tsq/.tsr token-rsa.tsq/.tsr tsa-sm2.pem tsa-rsa.pem tsa-ca-sm2.pem tsa-ca-rsa.pem")
	fmt.Printf("离线验证 verify offline: build/yinjian-verify --anchors %[1]s --log-key %[1]s/log.pem --document %[1]s/record.xml %[1]s/evidence.json\n", dir)
	fmt.Printf("继续运行 run on: make demo-serve   (build/yinjian serve --dir %s)\n", dir)
	return nil
}

func (d *demo) write(name string, data []byte) error {
	return os.WriteFile(filepath.Join(d.dir, name), data, 0o644)
}

func (d *demo) startServer(ctx context.Context, more ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if d.serveLog, err = os.Create(filepath.Join(d.dir, "serve.log")); err != nil {
		return err
	}
	d.server = exec.Command(self, append([]string{"serve", "--once", "--dir", d.dir}, more...)...)
	d.server.Stdout, d.server.Stderr = d.serveLog, d.serveLog
	// A group of its own, so that Ctrl-C here stops it in order; and it does not outlive us: main's goroutine, which
	// starts it, keeps its thread, whose end is what the kernel tells.
	runtime.LockOSThread()
	d.server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := d.server.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func(s *exec.Cmd) { ended <- s.Wait() }(d.server)
	fmt.Println("     … 等待可信时间（gpsd 与 chrony 约需 15–30 秒）waiting for trusted time, some 15 to 30 s")
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		b, err := os.ReadFile(filepath.Join(d.dir, "endpoints.json"))
		if err == nil {
			if err := json.Unmarshal(b, &d.ends); err != nil {
				return err
			}
			break
		}
		select {
		case err := <-ended:
			d.server = nil
			tail, _ := os.ReadFile(filepath.Join(d.dir, "serve.log")) // best effort
			return fmt.Errorf("设备没有启动 (the appliance did not start): %v\n%s", err, lastLines(tail, 15))
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("设备没有在时限内就绪，见 %s/serve.log (not ready in time): %w", d.dir, ctx.Err())
		}
	}
	d.admin = client.NewAdmin(d.ends.Admin)
	return nil
}

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}

// stopServer stops the appliance and waits for its orderly end.
func (d *demo) stopServer() error {
	if d.server == nil || d.server.Process == nil {
		return nil
	}
	s := d.server
	d.server = nil
	_ = s.Process.Signal(syscall.SIGTERM) // it may have ended already
	// The goroutine of startServer collects it; endpoints.json is removed last.
	for range 600 {
		if s.Process.Signal(syscall.Signal(0)) != nil {
			return d.serveLog.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
	_ = s.Process.Kill()
	return errors.New("设备没有在 60 秒内停下 (the appliance did not stop within 60 s)")
}

type demoState struct {
	Time struct {
		BoundMS    float64 `json:"bound_ms"`
		Provenance string  `json:"provenance"`
	} `json:"time"`
}

func (d *demo) state(ctx context.Context) (demoState, error) {
	var s demoState
	b, err := d.admin.State(ctx)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, err
}

func (d *demo) now() time.Time { return d.clock.Realtime() }

func (d *demo) register(ctx context.Context) error {
	roots := x509.NewCertPool()
	b, err := os.ReadFile(d.ends.TLSCA)
	if err != nil {
		return err
	}
	if !roots.AppendCertsFromPEM(b) {
		return errors.New("tls-ca.pem holds no certificate")
	}
	d.roots = roots
	if d.his, err = d.open(ctx, "his-benbu", "医院信息系统 HIS", "本部", account.StampRequired, string(evidence.SignerPIN)); err != nil {
		return err
	}
	if d.emr, err = d.open(ctx, "emr-binhai", "电子病历 EMR", "滨海", account.StampRequired, string(evidence.SignerPIN), string(evidence.AppAsserted)); err != nil {
		return err
	}
	pin, err := demoPIN()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(d.dir, "credentials", "D10023.pin"), []byte(pin+"\n"), 0o600); err != nil {
		return err
	}
	_, err = d.admin.EnrolSigner(ctx, wire.EnrolSigner{
		ID: "D10023", Name: "演示医师", Department: "胸外科", Campus: "本部", Algorithms: []string{"SM2", "RSA-2048"}, PIN: pin,
	})
	return err
}

// administrators sets up the three, so that the console can be looked at. Their passwords stand beside the applications' keys.
func (d *demo) administrators(ctx context.Context) error {
	var req wire.BootstrapAdministrators
	var said strings.Builder
	for _, a := range []wire.AddAdministrator{{ID: "xitong", Name: "演示系统管理员", Role: "system"}, {ID: "anquan", Name: "演示安全管理员", Role: "security"}, {ID: "shenji", Name: "演示审计管理员", Role: "audit"}} {
		n, err := rand.Int(rand.Reader, big.NewInt(1_000_000_000_000))
		if err != nil {
			return err
		}
		a.Password = fmt.Sprintf("Yj-%012d", n)
		req.Administrators = append(req.Administrators, a)
		fmt.Fprintf(&said, "%s\t%s\t%s\n", a.ID, a.Password, a.Name)
	}
	if _, err := d.admin.BootstrapAdministrators(ctx, req); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.dir, "credentials", administratorsFile), []byte(said.String()), 0o600)
}

// administratorsFile has a demo's administrators, a line each: id, password, name.
const administratorsFile = "administrators.txt"

func demoPIN() (string, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(100_000_000))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%08d", n), nil
}

func (d *demo) sign(ctx context.Context) (raw, cmsSM2, rsa *wire.SignResult, err error) {
	pin, err := appliance.ReadSecret(filepath.Join(d.dir, "credentials", "D10023.pin"))
	if err != nil {
		return nil, nil, nil, err
	}
	document := wire.Document{ID: "ZY20261118000731", Type: "discharge-summary", MediaType: "application/xml"}
	digest := sm3.Sum(demoRecord)
	once, err := d.his.Authorize(ctx, &wire.AuthorizationRequest{Signer: "D10023", PIN: string(pin), Digests: [][]byte{digest[:]}})
	if err != nil {
		return nil, nil, nil, err
	}
	raw, err = d.his.Sign(ctx, "demo-raw-"+document.ID, &wire.SignRequest{
		Signer: "D10023", Algorithm: "SM2", Form: "raw", Content: demoRecord, Document: document, Role: "主治医师",
		Consent: wire.Consent{AuthorizationID: once.ID},
	})
	if err != nil {
		return nil, nil, nil, err
	}
	many, err := d.emr.Authorize(ctx, &wire.AuthorizationRequest{Signer: "D10023", PIN: string(pin), Count: 10, Seconds: 600})
	if err != nil {
		return nil, nil, nil, err
	}
	request := func(algorithm string) *wire.SignRequest {
		return &wire.SignRequest{
			Signer: "D10023", Algorithm: algorithm, Form: "cms", Content: demoRecord, Document: document, Role: "主治医师",
			Consent: wire.Consent{AuthorizationID: many.ID},
		}
	}
	if cmsSM2, err = d.emr.Sign(ctx, "demo-cms-"+document.ID, request("SM2")); err != nil {
		return nil, nil, nil, err
	}
	if rsa, err = d.emr.Sign(ctx, "demo-rsa-"+document.ID, request("RSA-2048")); err != nil {
		return nil, nil, nil, err
	}
	pemOf := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	err = errors.Join(
		d.write("record.xml", demoRecord), d.write("signature.der", raw.Signature), d.write("signature.cms", cmsSM2.Signature),
		d.write("signature-rsa.cms", rsa.Signature), d.write("signer.pem", pemOf(raw.Certificates[0])), d.write("signer-rsa.pem", pemOf(rsa.Certificates[0])),
	)
	return raw, cmsSM2, rsa, err
}

// stamp asks a unit for a token over the record over plain HTTP on loopback, and leaves request and answer.
func (d *demo) stamp(ctx context.Context, unit string) error {
	url, algorithm := d.ends.TSASM2, cms.OIDSM3
	digest := sm3.Sum(demoRecord)
	sum := digest[:]
	if unit == "rsa" {
		s := sha256.Sum256(demoRecord)
		url, algorithm, sum = d.ends.TSARSA, cms.OIDSHA256, s[:]
	}
	imprint, err := tsa.NewImprint(algorithm, sum)
	if err != nil {
		return err
	}
	nonce, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63))
	if err != nil {
		return err
	}
	req := &tsa.Request{Imprint: imprint, Nonce: nonce, CertReq: true}
	query, err := req.Bytes()
	if err != nil {
		return err
	}
	reply, err := client.StampPlain(ctx, url, query)
	if err != nil {
		return err
	}
	answer, err := tsa.ParseResponse(reply)
	if err != nil {
		return err
	}
	if answer.Token == nil {
		return fmt.Errorf("refused: %+v", answer)
	}
	if err := answer.Token.Answers(req); err != nil {
		return err
	}
	if _, err := answer.Token.VerifyData(demoRecord); err != nil {
		return err
	}
	return errors.Join(d.write("token-"+unit+".tsq", query), d.write("token-"+unit+".tsr", reply))
}

func (d *demo) evidence(ctx context.Context, raw, cmsSM2 *wire.SignResult) (*evidence.Bundle, error) {
	b, err := d.his.Evidence(ctx, raw.RecordID)
	if err != nil {
		return nil, err
	}
	if err := d.write("evidence.json", b); err != nil {
		return nil, err
	}
	other, err := d.emr.Evidence(ctx, cmsSM2.RecordID)
	if err != nil {
		return nil, err
	}
	if err := d.write("evidence-cms.json", other); err != nil {
		return nil, err
	}
	// The appliance's own verifier must agree.
	for _, e := range [][]byte{b, other} {
		answer, err := d.his.Verify(ctx, &wire.VerifyRequest{Evidence: e, Document: demoRecord})
		if err != nil {
			return nil, err
		}
		var r evidence.Report
		if err := json.Unmarshal(answer, &r); err != nil {
			return nil, err
		}
		if r.Verdict != pki.Valid {
			show.Print(os.Stdout, &r)
			return nil, fmt.Errorf("POST /v1/verify says %s, it should be valid", r.Verdict)
		}
	}
	return evidence.Parse(b)
}

// openssl lets a stranger verify the signature and the RSA token.
func (d *demo) openssl(ctx context.Context) error {
	if _, err := exec.LookPath("openssl"); err != nil {
		fmt.Println("     – 未安装 openssl，跳过第三方验证 (openssl is not installed: not checked by a third party)")
		return nil
	}
	in := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "openssl", args...)
		cmd.Dir = d.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("openssl %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	pub, err := exec.CommandContext(ctx, "openssl", "x509", "-in", filepath.Join(d.dir, "signer.pem"), "-noout", "-pubkey").Output()
	if err != nil {
		return fmt.Errorf("openssl x509: %w", err)
	}
	if err := d.write("signer-key.pem", pub); err != nil {
		return err
	}
	if err := in("dgst", "-sm3", "-verify", "signer-key.pem", "-sigopt", "distid:1234567812345678", "-signature", "signature.der", "record.xml"); err != nil {
		return err
	}
	if err := in("ts", "-verify", "-queryfile", "token-rsa.tsq", "-in", "token-rsa.tsr", "-CAfile", "tsa-ca-rsa.pem"); err != nil {
		return err
	}
	d.done("OpenSSL 独立验证：SM2 签名正确，RSA 时间戳正确", "OpenSSL agrees: SM2 signature and RSA token verify")
	return nil
}

// mustFail wants a report that is invalid because of one check.
func mustFail(r *evidence.Report, id string) error {
	for _, c := range r.Checks {
		if c.ID == id && c.Status == pki.Failed && r.Verdict == pki.Invalid {
			return nil
		}
	}
	show.Print(os.Stdout, r)
	return fmt.Errorf("tampering was not found: %s should have failed", id)
}

// flip changes one bit in the files that match pattern: in the last byte of the first want that follows anchor within a
// row's length. A database may hold stale copies of a page; those are changed too, so that the live row surely is. It
// answers how many places were changed.
func flip(pattern string, anchor, want []byte) (int, error) {
	const row = 2048
	files, err := filepath.Glob(pattern)
	if err != nil {
		return 0, err
	}
	places := 0
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			return places, err
		}
		before := places
		for at := 0; ; {
			i := bytes.Index(b[at:], anchor)
			if i < 0 {
				break
			}
			at += i + len(anchor)
			if j := bytes.Index(b[at:min(at+row, len(b))], want); j >= 0 {
				b[at+j+len(want)-1] ^= 1
				places++
			}
		}
		if places > before {
			if err := os.WriteFile(name, b, 0o600); err != nil {
				return places, err
			}
		}
	}
	return places, nil
}

// shipped waits until the projection has what was signed: it is fed a moment later.
func (d *demo) shipped(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		answer, err := d.admin.State(ctx)
		if err != nil {
			return explain(err)
		}
		var s struct {
			Projection struct{ Lag uint64 }
		}
		if err := json.Unmarshal(answer, &s); err != nil {
			return err
		}
		if s.Projection.Lag == 0 {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the projection is %d entries behind: %w", s.Projection.Lag, ctx.Err())
		}
	}
}

// tamperProjection stops the appliance, changes one byte of the projection, starts again and compares.
func (d *demo) tamperProjection(ctx context.Context, raw *wire.SignResult) error {
	if err := d.shipped(ctx); err != nil {
		return err
	}
	if err := d.stopServer(); err != nil {
		return err
	}
	saved, err := os.ReadFile(filepath.Join(d.dir, "central.db"))
	if err != nil {
		return err
	}
	if n, err := flip(filepath.Join(d.dir, "central.db"), []byte(raw.RecordID), []byte("胸外科")); err != nil || n == 0 {
		return fmt.Errorf("changing the projection: %d places, %v", n, err)
	}
	if err := d.startServer(ctx); err != nil {
		return err
	}
	answer, err := d.admin.Compare(ctx)
	if err != nil {
		return explain(err)
	}
	var r audit.CompareReport
	if err := json.Unmarshal(answer, &r); err != nil {
		return err
	}
	named := ""
	for _, f := range r.Differences {
		if f.Kind == audit.RowChanged && f.Column == "department_name" {
			named = fmt.Sprintf("条目 %d 的 %s 列", f.Sequence, f.Column)
		}
	}
	if named == "" {
		printCompare(os.Stdout, &r)
		return errors.New("tampering with the projection was not found")
	}
	d.done("篡改二：投影库改一字节 → db compare 指出 %s", "tamper 2: one byte of the projection → found and named (row and column)", named)
	if err := d.stopServer(); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.dir, "central.db"), saved, 0o600)
}

// tamperJournal changes one byte in a copy of the journal and lets audit verify find it.
func (d *demo) tamperJournal(ctx context.Context, raw *wire.SignResult) error {
	clean := new(bytes.Buffer)
	if err := auditVerify(ctx, clean, filepath.Join(d.dir, "journal"), filepath.Join(d.dir, "log.pem"), appliance.UsesDir(d.dir), nil, "text"); err != nil {
		return fmt.Errorf("the untouched journal: %w\n%s", err, clean)
	}
	copied := filepath.Join(d.dir, "tampered-journal")
	if err := os.CopyFS(copied, os.DirFS(filepath.Join(d.dir, "journal"))); err != nil {
		return err
	}
	ref, err := hex.DecodeString(raw.RecordID)
	if err != nil {
		return err
	}
	// The record id inside the entry's DER, near its beginning: what comes later can lie on another page, behind other rows.
	if n, err := flip(filepath.Join(copied, "*.db"), append([]byte{0x04, 0x20}, ref[:16]...), ref[16:]); err != nil || n == 0 {
		return fmt.Errorf("changing the journal: %d places, %v", n, err)
	}
	found := new(bytes.Buffer)
	err = auditVerify(ctx, found, copied, filepath.Join(d.dir, "log.pem"), "", nil, "text")
	want := fmt.Sprintf("entry %d ", raw.Sequence)
	if !errors.Is(err, errFound) || !strings.Contains(found.String(), want) {
		return fmt.Errorf("tampering with the journal was not found (%v):\n%s", err, found)
	}
	d.done("篡改三：日志改一字节 → audit verify 指出条目 %d（记录 %s…）", "tamper 3: one byte of the journal → found and named (entry, record)", raw.Sequence, raw.RecordID[:16])
	return os.RemoveAll(copied)
}
