// Package sign makes and judges signatures: the procedure of DESIGN §2.1 and §3.
//
// The order of [Service.Sign] is the product's promise: authorise → trust in time, disk reserve, certificate status →
// the cipher machine signs → the signature is verified → a token over the signature value → one journal entry that
// holds both → on disk → reply. What fails before the entry is durable leaves a signature that nobody has.
package sign

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"
	"github.com/sirupsen/logrus"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/keylock"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

// Kind is the journal's kind of a signature's entry.
const Kind = evidence.KindSign

// A Directory answers who may sign with what.
type Directory interface {
	ActiveSigner(id, algorithm string) (*account.Signer, *account.SignerKey, error)
	Reserve(ctx context.Context, app *account.Application, signer *account.Signer, digestHex, id string, method evidence.Method, assertion string) (*account.Reservation, error)
	Certificate(serial string) (*account.CertificateStatus, bool)
	CRL(algorithm string) *account.CRL
	Chain(algorithm string) [][]byte
}

// A Journal keeps the record. Append returns only after it is on disk.
type Journal interface {
	Append(ctx context.Context, d audit.Draft) (audit.Receipt, error)
	ByRef(ctx context.Context, ref []byte) ([]audit.Record, error)
	Payload(ctx context.Context, sm3 audit.Hash) ([]byte, error)
	WaitCheckpoint(ctx context.Context, sequence uint64) (audit.Checkpoint, error)
	InclusionProof(ctx context.Context, sequence, size uint64) ([]audit.Hash, error)
}

// A Stamper issues the token over a signature value. *tsa.Authority is one.
type Stamper interface {
	Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error)
}

// Keys hands out the staff slot's keys and nothing else: TSA, log and CA keys live in other slots.
type Keys interface {
	Key(ctx context.Context, label string, certificate []byte) (*hsm.Key, error)
}

// Config is what the service works with.
type Config struct {
	Directory Directory
	Journal   Journal
	Keys      Keys
	Stampers  map[string]Stamper // by the signature's algorithm
	Accuracy  time.Duration      // what the stamping policy promises
	Clock     interface{ Now() ntp.Reading }
	// Reserve reports an error when too little room is left to sign safely.
	Reserve func() error
	Log     logrus.FieldLogger
	// Anchors and LogKeys are what Verify trusts.
	Trust evidence.Trust
}

// A Service signs and verifies. Safe for concurrent use.
type Service struct {
	cfg      Config
	inFlight keylock.Locks // by record id: a retry waits for the first
}

// New makes a service.
func New(cfg Config) *Service { return &Service{cfg: cfg} }

// RecordID is SM3(application ‖ 0x00 ‖ key): the same at both campuses.
func RecordID(application, idempotencyKey string) [32]byte {
	return sm3.Sum([]byte(application + "\x00" + idempotencyKey))
}

// hashes of a request that a retry must repeat: everything but consent, which a retry may renew.
func requestHash(q *Request) [32]byte {
	var content []byte
	if q.Digest == nil {
		sum := sm3.Sum(q.Content)
		content = sum[:]
	}
	b, _ := json.Marshal(struct {
		Signer, Algorithm, Form, Role string
		Detached                      bool
		Content                       []byte
		Digest                        *Digest
		Document                      Document
	}{q.Signer, q.Algorithm, q.Form, q.Role, q.Detached, content, q.Digest, q.Document}) // cannot fail: plain fields
	return sm3.Sum(b)
}

var digestNames = map[string]string{string(hsm.SM2): "SM3", string(hsm.RSA2048): "SHA-256"}

func (q *Request) validate() error {
	if n := len(q.IdempotencyKey); n < 1 || n > 128 || strings.IndexFunc(q.IdempotencyKey, func(r rune) bool { return r <= ' ' || r > '~' }) >= 0 {
		return problem.Invalid("Idempotency-Key", "须为 1–128 个可见 ASCII 字符 (1 to 128 visible ASCII characters)")
	}
	if q.Signer == "" || len(q.Signer) > 32 {
		return problem.Invalid("signer", "工号须为 1–32 字节 (1 to 32 bytes)")
	}
	name, ok := digestNames[q.Algorithm]
	if !ok {
		return problem.Invalid("algorithm", "须为 SM2 或 RSA-2048 (must be SM2 or RSA-2048)")
	}
	for _, f := range []struct {
		name, value string
		max         int
	}{{"document.id", q.Document.ID, 128}, {"document.type", q.Document.Type, 64}, {"document.media_type", q.Document.MediaType, 127}, {"role", q.Role, 64}} {
		if f.value == "" || len(f.value) > f.max || !utf8.ValidString(f.value) || strings.IndexFunc(f.value, func(r rune) bool { return r < ' ' || r == 0x7f }) >= 0 {
			return problem.Invalid(f.name, "须为 1–%d 字节的可见文字 (1 to %d bytes of text)", f.max, f.max)
		}
	}
	switch q.Form {
	case "raw":
		if !q.Detached {
			return problem.Invalid("detached", "raw 签名总是分离的 (a raw signature is always detached)")
		}
		if q.Digest != nil {
			return problem.New(problem.ContentRequired, "裸签名须给出原文：SM2 的 e = SM3(ZA ‖ M) 无法由 SM3(M) 得到 (a raw signature needs the content)",
				"改传 content，或改用 form=cms (send content, or use form cms)")
		}
		if cms.LooksLikeAttributes(q.Content) {
			return problem.Invalid("content", "原文形如 CMS 签名属性，裸签会伪造属性，拒绝 (content parses as a SET OF Attribute and would forge signed attributes)")
		}
	case "cms":
		if q.Digest != nil && !q.Detached {
			return problem.New(problem.ContentRequired, "附带原文的 CMS 须给出原文 (an attached CMS needs the content)", "改传 content，或 detached=true (send content, or set detached)")
		}
	default:
		return problem.Invalid("form", "须为 raw 或 cms (must be raw or cms)")
	}
	switch {
	case q.Digest == nil && len(q.Content) == 0:
		return problem.Invalid("content", "content 与 digest 须给出其一，且不为空 (give content or digest, not empty)")
	case q.Digest != nil && len(q.Content) > 0:
		return problem.Invalid("digest", "content 与 digest 只能给出其一 (give content or digest, not both)")
	case q.Digest != nil && (q.Digest.Algorithm != name || len(q.Digest.Value) != 32):
		return problem.Invalid("digest", "%s 签名的摘要须为 32 字节的 %s (the digest must be %s, 32 bytes)", q.Algorithm, name, name)
	}
	return nil
}

// digest is the document's digest under the signature's hash.
func (q *Request) digest() []byte {
	if q.Digest != nil {
		return q.Digest.Value
	}
	if q.Algorithm == string(hsm.SM2) {
		sum := sm3.Sum(q.Content)
		return sum[:]
	}
	sum := sha256.Sum256(q.Content)
	return sum[:]
}

// Sign makes one signature for app, or answers the earlier one of the same Idempotency-Key. A refusal is a
// [*problem.Problem]. ctx bounds the whole; when it ends before the record is on disk, nothing was signed as far as
// anybody can show, and a retry with the same key is right.
func (s *Service) Sign(ctx context.Context, app *account.Application, q *Request) (*Result, error) {
	if app.Stopped || !app.Has(account.RightSign) {
		return nil, problem.New(problem.Forbidden, "该应用没有签名权限 (the application may not sign)", "请管理员授权 (ask an administrator)")
	}
	if err := q.validate(); err != nil {
		return nil, err
	}
	id := RecordID(app.ID, q.IdempotencyKey)
	body := requestHash(q)
	defer s.inFlight.Lock(string(id[:]))()

	// 1. A retry gets what the first got, whatever happened to consent, certificate or time since.
	switch earlier, err := s.cfg.Journal.ByRef(ctx, id[:]); {
	case err == nil:
		return s.replay(ctx, &earlier[0].Entry, body)
	case !errors.Is(err, audit.ErrNotFound):
		return nil, journalProblem(err)
	}

	// 2. Who signs, and with which certificate.
	signer, key, err := s.cfg.Directory.ActiveSigner(q.Signer, q.Algorithm)
	if err != nil {
		return nil, err
	}

	// 3. Time, room and certificate status: refuse before anything is signed.
	reading := s.cfg.Clock.Now()
	stamper := s.cfg.Stampers[q.Algorithm]
	if app.Stamp == account.StampRequired {
		if stamper == nil || !reading.Trusted() || reading.Bound > s.cfg.Accuracy {
			return nil, problem.New(problem.TimeUntrusted, fmt.Sprintf("时间不可信（%s，误差上限 %v），按策略拒绝签名 (time is not trusted; signing is refused by policy)", reading.State, reading.Bound.Round(time.Millisecond)),
				"检查时间源；恢复后用同一 Idempotency-Key 重试 (check the time sources; retry with the same key)")
		}
	}
	if err := s.cfg.Reserve(); err != nil {
		return nil, problem.New(problem.DiskReserve, "存储空间低于保留值，拒绝签名 (too little room is left to sign safely)", "请管理员扩容或归档 (ask an administrator)").With(err)
	}
	cert, chain, crls, err := s.certificate(key, q.Algorithm, reading)
	if err != nil {
		return nil, err
	}

	// 4. Consent: one use is taken, and given back unless the record becomes durable.
	digest := q.digest()
	consent, err := s.cfg.Directory.Reserve(ctx, app, signer, hex.EncodeToString(digest), q.Consent.AuthorizationID, q.Consent.Method, q.Consent.Assertion)
	if err != nil {
		return nil, err
	}
	kept := false
	defer func() {
		if !kept {
			consent.Release()
		}
	}()
	consentHash := evidence.HashAuthorization(consent.Stored)

	// 5. The cipher machine signs; hsm.Key verifies what it gave.
	k, err := s.cfg.Keys.Key(ctx, key.Label, key.Certificate)
	if err != nil {
		return nil, hsmProblem(err)
	}
	var signed *cms.Signed
	var value []byte // what the token stamps
	if q.Form == "cms" {
		context := pki.SigningContext{
			Application: app.ID, Campus: app.Campus, RecordID: hex.EncodeToString(id[:]), DocumentType: q.Document.Type,
			SignerRole: q.Role, Department: signer.Department, AuthorisationHash: consentHash, Test: app.Test,
		}
		attribute, err := context.Marshal()
		if err != nil {
			return nil, fmt.Errorf("sign: signing context: %w", err)
		}
		p := cms.Params{
			Detached: q.Detached, Certificates: append([][]byte{key.Certificate}, chain...), AlgorithmProtection: true,
			SignedAttributes: []cms.Attribute{{Type: pki.OIDSigningContext, Values: [][]byte{attribute}}},
		}
		if q.Digest != nil {
			p.Digest = q.Digest.Value
		} else {
			p.Content = q.Content
		}
		if signed, err = cms.Sign(ctx, k, p); err != nil {
			return nil, hsmProblem(err)
		}
		value = signed.SignatureValue
	} else if value, err = k.SignMessage(ctx, q.Content); err != nil {
		return nil, hsmProblem(err)
	}

	// 6. The token over the signature value. Without it nothing is recorded when the policy asks for one.
	var token *tsa.Token
	if app.Stamp == account.StampRequired {
		stamped, err := imprint(q.Algorithm, value)
		if err != nil {
			return nil, err
		}
		if token, err = stamper.Issue(ctx, &tsa.Request{Imprint: stamped, CertReq: true}); err != nil {
			return nil, stampProblem(err)
		}
		if signed != nil {
			if err := signed.AddUnsignedAttribute(cms.Attribute{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{token.DER}}); err != nil {
				return nil, fmt.Errorf("sign: %w", err)
			}
		}
		reading = token.Provenance
	}
	if signed != nil {
		value = signed.Bytes()
	}

	// 7. One entry holds signature and token; it is on disk when Append returns.
	size := int64(len(q.Content))
	if q.Digest != nil {
		size = -1
	}
	certHash := audit.Sum(cert.Raw)
	d := audit.Draft{
		Kind: Kind, Actor: "application/" + app.ID, Object: signer.ID, Ref: id[:], Unique: true,
		Fields: []audit.Field{
			{Name: "algorithm", Value: audit.Text(q.Algorithm)},
			{Name: "application", Value: audit.Text(app.ID)},
			{Name: "campus", Value: audit.Text(app.Campus)},
			{Name: "certificate.sm3", Value: audit.Octets(certHash[:])},
			{Name: "consent.level", Value: audit.Int(consent.Auth.Level)},
			{Name: "consent.method", Value: audit.Text(consent.Auth.Method)},
			{Name: "consent.sm3", Value: audit.Octets(consentHash[:])},
			{Name: "department", Value: audit.Text(signer.Department)},
			{Name: "detached", Value: audit.Bool(q.Detached)},
			{Name: "digest.algorithm", Value: audit.Text(digestNames[q.Algorithm])},
			{Name: "digest.value", Value: audit.Octets(digest)},
			{Name: "document.id", Value: audit.Text(q.Document.ID)},
			{Name: "document.media_type", Value: audit.Text(q.Document.MediaType)},
			{Name: "document.size", Value: audit.Int(size)},
			{Name: "document.type", Value: audit.Text(q.Document.Type)},
			{Name: "form", Value: audit.Text(q.Form)},
			{Name: "request.sm3", Value: audit.Octets(body[:])},
			{Name: "role", Value: audit.Text(q.Role)},
			{Name: "signer", Value: audit.Text(signer.ID)},
			{Name: "stamp", Value: audit.Text(app.Stamp)},
			{Name: "test", Value: audit.Bool(app.Test)},
			{Name: "time.bound_us", Value: audit.Int(reading.Bound.Microseconds())},
			{Name: "time.provenance", Value: audit.Text(reading.Provenance)},
		},
		Payloads: []audit.Attachment{
			{Name: "authorization", MediaType: "application/json", Data: consent.Stored},
			{Name: "certificate.0", MediaType: "application/pkix-cert", Data: cert.Raw},
			{Name: "signature", MediaType: map[bool]string{true: "application/cms", false: "application/octet-stream"}[signed != nil], Data: value},
		},
	}
	for i, c := range chain {
		d.Payloads = append(d.Payloads, audit.Attachment{Name: fmt.Sprintf("certificate.%d", i+1), MediaType: "application/pkix-cert", Data: c})
	}
	for i, c := range crls {
		d.Payloads = append(d.Payloads, audit.Attachment{Name: fmt.Sprintf("crl.%d", i), MediaType: "application/pkix-crl", Data: c})
	}
	if token != nil {
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "token", MediaType: "application/timestamp-token", Data: token.DER})
		d.Fields = append(d.Fields, audit.Field{Name: "token.serial", Value: audit.Octets(token.Serial.Bytes())})
	}
	receipt, err := s.cfg.Journal.Append(ctx, d)
	switch {
	case errors.Is(err, audit.ErrDuplicateRef): // another process of ours cannot be; a lost answer of our own can
		if earlier, err := s.cfg.Journal.ByRef(ctx, id[:]); err == nil {
			return s.replay(ctx, &earlier[0].Entry, body)
		}
		return nil, journalProblem(err)
	case err != nil:
		return nil, journalProblem(err)
	}
	kept = true
	r := resultOf(&receipt.Entry)
	r.Signature, r.Certificates = value, append([][]byte{cert.Raw}, chain...)
	if token != nil {
		r.Token, r.GenTime, r.Accuracy = token.DER, token.GenTime, token.Accuracy
	}
	return r, nil
}

// certificate judges the signer's certificate at the reading: a signature under one that is expired, revoked or of
// unknown status is refused, not merely marked.
func (s *Service) certificate(key *account.SignerKey, algorithm string, now ntp.Reading) (cert *smx509.Certificate, chain, crls [][]byte, err error) {
	cert, err = smx509.ParseCertificate(key.Certificate)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("sign: key %q: certificate: %w", key.Label, err)
	}
	unusable := func(detail, next string) error { return problem.New(problem.CertificateUnusable, detail, next) }
	if now.Time.Before(cert.NotBefore) || now.Time.After(cert.NotAfter) {
		return nil, nil, nil, unusable("签名人证书不在有效期内 (the signer's certificate is not valid now)", "请管理员换发证书 (ask an administrator to renew it)")
	}
	status, ok := s.cfg.Directory.Certificate(pki.SerialHex(cert.SerialNumber))
	if !ok || status.Status != "good" {
		return nil, nil, nil, unusable("签名人证书已吊销 (the signer's certificate is revoked)", "请管理员换发证书 (ask an administrator)")
	}
	crl := s.cfg.Directory.CRL(algorithm)
	if crl == nil || now.Time.After(crl.NextUpdate) {
		return nil, nil, nil, unusable("没有在有效期内的吊销列表，证书状态不明 (no current CRL: the certificate's status is unknown)", "请管理员更新吊销列表 (ask an administrator to publish a CRL)")
	}
	return cert, s.cfg.Directory.Chain(algorithm), [][]byte{crl.DER}, nil
}

// imprint is what the token stamps: SM3 of the signature value for SM2, SHA-256 for RSA.
func imprint(algorithm string, value []byte) (tsa.Imprint, error) {
	if algorithm == string(hsm.SM2) {
		return tsa.ImprintOf(value), nil
	}
	sum := sha256.Sum256(value)
	return tsa.NewImprint(cms.OIDSHA256, sum[:])
}

// replay answers an earlier result, after a check that the retry asks for the same.
func (s *Service) replay(ctx context.Context, e *audit.Entry, body [32]byte) (*Result, error) {
	if had, _ := e.Field("request.sm3").(audit.Octets); !bytes.Equal(had, body[:]) {
		return nil, problem.New(problem.IdempotencyConflict, "同一 Idempotency-Key 曾用于不同的请求 (this key was used for another request)",
			"新的签名用新的键；重试须与首次完全一致 (use a new key, or repeat the first request exactly)")
	}
	r := resultOf(e)
	r.Replayed = true
	payload := func(name string) ([]byte, error) {
		p, ok := e.Payload(name)
		if !ok {
			return nil, audit.ErrNotFound
		}
		return s.cfg.Journal.Payload(ctx, p.SM3)
	}
	var err error
	if r.Signature, err = payload("signature"); err != nil {
		return nil, journalProblem(err)
	}
	for i := 0; ; i++ {
		c, err := payload(fmt.Sprintf("certificate.%d", i))
		if errors.Is(err, audit.ErrNotFound) && i > 0 {
			break
		}
		if err != nil {
			return nil, journalProblem(err)
		}
		r.Certificates = append(r.Certificates, c)
	}
	if _, ok := e.Payload("token"); ok {
		if r.Token, err = payload("token"); err != nil {
			return nil, journalProblem(err)
		}
		t, err := tsa.ParseToken(r.Token)
		if err != nil {
			return nil, fmt.Errorf("sign: stored token of entry %d: %w", e.Sequence, err)
		}
		r.GenTime, r.Accuracy = t.GenTime, t.Accuracy
	}
	return r, nil
}

func resultOf(e *audit.Entry) *Result {
	return &Result{
		RecordID: hex.EncodeToString(e.Ref), Algorithm: e.Text("algorithm"), Form: e.Text("form"),
		Provenance: e.Text("time.provenance"), Node: e.Node, Epoch: e.Epoch.String(), Sequence: e.Sequence,
	}
}

func journalProblem(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, audit.ErrOutcomeUnknown):
		return problem.New(problem.Timeout, "未能在时限内确认落盘，结果未知 (the record could not be confirmed in time)", "用同一 Idempotency-Key 重试 (retry with the same key)").With(err)
	case errors.Is(err, audit.ErrInvalidDraft):
		return problem.Invalid("document", "有字段超出记录格式的限制 (a field is outside the limits of the record)").With(err)
	}
	return problem.New(problem.JournalUnwritable, "日志无法读写，拒绝签名 (the journal cannot be read or written; signing is refused)",
		"请管理员检查存储；恢复后用同一 Idempotency-Key 重试 (ask an administrator; retry with the same key)").With(err)
}

func hsmProblem(err error) error {
	switch {
	case errors.Is(err, hsm.ErrNeedsOperator):
		return problem.New(problem.HSMNeedsOperator, "密码机拒绝了口令，已停止尝试 (the cipher machine refused its PIN; nothing is retried)", "请管理员检查密码机口令并重启服务 (ask an administrator)").With(err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return problem.New(problem.Timeout, "等待密码机超时 (timed out waiting for the cipher machine)", "用同一 Idempotency-Key 重试 (retry with the same key)").With(err)
	}
	return problem.New(problem.HSMUnavailable, "密码机暂不可用 (the cipher machine is unavailable)", "稍后用同一 Idempotency-Key 重试 (retry later with the same key)").With(err)
}

func stampProblem(err error) error {
	if errors.Is(err, tsa.ErrTimeNotAvailable) {
		return problem.New(problem.TimeUntrusted, "时间不可信，按策略拒绝签名 (time is not trusted; signing is refused by policy)", "检查时间源；恢复后用同一 Idempotency-Key 重试 (check the time sources; retry with the same key)").With(err)
	}
	return hsmProblem(err)
}
