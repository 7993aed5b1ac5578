// Package sign makes and judges signatures: rule 1 of ARCHITECTURE.md.
//
// The order of [Service.Sign] is the product's promise: trust in time, disk reserve, certificate status → consent → the
// cipher machine signs → the signature is verified → a token over the signature value → signer and certificate are looked
// at once more → one journal entry that holds both → on disk → reply. What fails before the entry is durable leaves a
// signature that nobody has. The document itself is never stored, also not inside a CMS.
package sign

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

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
	Reserve(ctx context.Context, app *account.Application, signer *account.Signer, digest evidence.Digest, id string, method evidence.Method, assertion string) (*account.Reservation, error)
	Standing(path []*smx509.Certificate, purpose pki.Purpose, at time.Time) (*account.Standing, error)
	AnchorsFor(purpose pki.Purpose) []*smx509.Certificate
	CRLs() []*pki.CRL
}

// A Journal keeps the record. Append returns only after it is on disk.
type Journal interface {
	// Size is the number of entries on disk.
	Size() uint64
	Append(ctx context.Context, d audit.Draft) (audit.Receipt, error)
	// Expect says that an Append may come before done is called.
	Expect() (done func())
	ByRef(ctx context.Context, ref []byte) ([]audit.Record, error)
	Payload(ctx context.Context, e *audit.Entry, name string) ([]byte, error)
	WaitCheckpoint(ctx context.Context, sequence uint64) (audit.Checkpoint, error)
	Cosigned(ctx context.Context, sequence uint64) (audit.Checkpoint, bool)
	InclusionProof(ctx context.Context, sequence, size uint64) ([]audit.Hash, error)
}

// A Stamper issues the token over a signature value. *tsa.Authority is one. One that also has a method Ready is asked before
// anything is signed: its error, a *problem.Problem, refuses the signature.
type Stamper interface {
	Issue(ctx context.Context, req *tsa.Request) (*tsa.Token, error)
	// Chain is the unit's certificate and those above it, the anchor last. One that chooses among several may not know it
	// beforehand, and answers none; its tokens say it in their Origin.
	Chain() []*smx509.Certificate
}

// A Foreteller is a [Stamper] that knows without asking why it would issue no token now: [tsa.ErrTimeNotAvailable], for
// one. Then nothing is signed that would have to be thrown away.
type Foreteller interface{ Ready() error }

// Keys hands out the staff slot's keys and nothing else: TSA, log and CA keys live in other slots.
type Keys interface {
	Key(ctx context.Context, label string, certificate []byte) (*hsm.Key, error)
	// Wrapped answers a custody key.
	Wrapped(w *hsm.WrappedKey) (*hsm.Key, error)
}

// Config is what the service works with.
type Config struct {
	Directory Directory
	Journal   Journal
	Keys      Keys
	Stampers  map[string]Stamper // by the signature's algorithm
	Accuracy  time.Duration      // what the stamping policy promises
	// Caller, if set, answers the application's quota of the cipher machine.
	Caller func(app *account.Application) hsm.Caller
	Clock  interface{ Now() ntp.Reading }
	// Reserve reports an error when too little room is left to sign safely, or a refusal of its own (*problem.Problem).
	Reserve func() error
	// Discarded, if set, is given what the cipher machine signed (signatures, tokens in DER) and no record came of, and
	// why. It must not block.
	Discarded func(reason error, made ...[]byte)
	// Archived, if set, answers the evidence record (RFC 4998, DER) of a signature's entry, nil while it has none.
	Archived func(ctx context.Context, r *audit.Record) ([]byte, error)
	Log      logrus.FieldLogger
	// Anchors and LogKeys are what Verify trusts.
	Trust evidence.Trust
	// AlgorithmEnds are those of evidence.Input, for Verify.
	AlgorithmEnds map[string]time.Time
}

// A Service signs and verifies. Safe for concurrent use.
type Service struct {
	cfg      Config
	inFlight keylock.Locks // by record id: a retry waits for the first
}

// New makes a service.
func New(cfg Config) *Service { return &Service{cfg: cfg} }

// How many fields and payloads an entry has whose signature is alone, chain and CRLs not counted; few have more.
const (
	plainFields   = 23
	plainPayloads = 3
	stampFields   = 2 // and with a token
	stampPayloads = 1
)

// RecordID is SM3(application ‖ 0x00 ‖ key): the same at both campuses.
func RecordID(application, idempotencyKey string) [32]byte {
	return sm3.Sum([]byte(application + "\x00" + idempotencyKey))
}

// hashes of a request that a retry must repeat: everything but consent, which a retry may renew. contentSM3 is that of
// q.Content; not looked at if there is a digest.
func requestHash(q *Request, contentSM3 [32]byte) [32]byte {
	var content []byte
	if q.Digest == nil {
		content = contentSM3[:]
	}
	out := encodings.Get().(*bytes.Buffer)
	defer func() { out.Reset(); encodings.Put(out) }()
	_ = json.NewEncoder(out).Encode(struct { // as Marshal does, and a line feed; cannot fail: plain fields
		Signer, Algorithm, Form, Role string
		Detached                      bool
		Content                       []byte
		Digest                        *Digest
		Document                      Document
	}{q.Signer, q.Algorithm, q.Form, q.Role, q.Detached, content, q.Digest, q.Document})
	return sm3.Sum(bytes.TrimSuffix(out.Bytes(), []byte("\n")))
}

// encodings are buffers for what is hashed and thrown away.
var encodings = sync.Pool{New: func() any { return new(bytes.Buffer) }}

var digestNames = map[string]string{string(hsm.SM2): nameSM3, string(hsm.RSA2048): nameSHA256}

const (
	nameSM3    = "SM3"
	nameSHA256 = "SHA-256"

	formRaw = "raw"
	formCMS = "cms"

	// maxContent is what package cms can hold; what may be sent is for package api to bound, lower.
	maxContent = 1 << 30
	// longest is how long a signature may take from the taking of consent to the journal's queue, whatever ctx says: the
	// verifier allows a minute between the end of consent and the signature's time.
	longest = 45 * time.Second
)

var reSigner = regexp.MustCompile(`^[A-Za-z0-9-]{1,32}$`)

func (q *Request) validate() error {
	if n := len(q.IdempotencyKey); n < 1 || n > 128 || strings.IndexFunc(q.IdempotencyKey, func(r rune) bool { return r <= ' ' || r > '~' }) >= 0 {
		return problem.Invalid("Idempotency-Key", "须为 1–128 个可见 ASCII 字符 (1 to 128 visible ASCII characters)")
	}
	if !reSigner.MatchString(q.Signer) {
		return problem.Invalid("signer", "工号须为 1–32 位字母、数字或连字符 (1 to 32 letters, digits and hyphens)")
	}
	name, ok := digestNames[q.Algorithm]
	if !ok {
		return problem.Invalid("algorithm", "须为 SM2 或 RSA-2048 (must be SM2 or RSA-2048)")
	}
	for _, f := range []struct {
		name, value string
		max         int
	}{{"document.id", q.Document.ID, 128}, {"document.type", q.Document.Type, 64}, {"document.media_type", q.Document.MediaType, 127}, {"role", q.Role, 64}} {
		if err := problem.CheckText(f.name, f.value, f.max); err != nil {
			return err
		}
	}
	if len(q.Content) > maxContent {
		return problem.New(problem.TooLarge, "原文过大 (the content is too large)", "改用 form=cms 并只传摘要 (use form cms and send the digest alone)")
	}
	switch q.Form {
	case formRaw:
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
	case formCMS:
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

// digest is the document's digest under the signature's hash, in memory of its own: the entry has it, which may be written after the
// caller was told that its outcome is unknown, and the request's memory is another one's then.
func (q *Request) digest(contentSM3 [32]byte) []byte {
	if q.Digest != nil {
		return bytes.Clone(q.Digest.Value)
	}
	if q.Algorithm == string(hsm.SM2) {
		return contentSM3[:]
	}
	sum := sha256.Sum256(q.Content)
	return sum[:]
}

// key answers the key to sign with. One in custody is opened by the consent, and by nothing else.
func (s *Service) key(ctx context.Context, key *account.SignerKey, consent *account.Reservation) (*hsm.Key, error) {
	if key.Wrapped == nil {
		k, err := s.cfg.Keys.Key(ctx, key.Label, key.Certificate)
		if err != nil {
			return nil, hsmProblem(err)
		}
		return k, nil
	}
	w := consent.Keys[key.Label]
	if w == nil {
		return nil, problem.New(problem.AuthorizationBad, "签名人的密钥在授权之后更换，该授权不能打开新密钥 (the signer's key is newer than the authorisation, which does not open it)",
			"重新申请授权 (request a new authorisation)")
	}
	return s.cfg.Keys.Wrapped(w)
}

// Sign makes one signature for app, or answers the earlier one of the same Idempotency-Key. A refusal is a
// [*problem.Problem]. ctx bounds the whole; when it ends before the record is on disk, nothing was signed as far as
// anybody can show, and a retry with the same key is right.
func (s *Service) Sign(ctx context.Context, app *account.Application, q *Request) (_ *Result, failed error) {
	if err := account.MaySign(app); err != nil {
		return nil, err
	}
	if err := q.validate(); err != nil {
		return nil, err
	}
	id := RecordID(app.ID, q.IdempotencyKey)
	var contentSM3 [32]byte
	if q.Digest == nil {
		contentSM3 = sm3.Sum(q.Content)
	}
	body := requestHash(q, contentSM3)
	unlock, err := s.inFlight.Lock(ctx, string(id[:]))
	if err != nil {
		return nil, journalProblem(err)
	}
	defer unlock()

	// 1. A retry gets what the first got, whatever happened to consent, certificate or time since.
	defer s.cfg.Journal.Expect()()
	absent := s.cfg.Journal.Size()
	switch earlier, err := s.cfg.Journal.ByRef(ctx, id[:]); {
	case err == nil:
		return s.replay(ctx, &earlier[0].Entry, q, body)
	case !errors.Is(err, audit.ErrNotFound):
		return nil, journalProblem(err)
	}

	// 2. Who signs, and with which certificate.
	signer, key, err := s.cfg.Directory.ActiveSigner(q.Signer, q.Algorithm)
	if err != nil {
		return nil, err
	}
	if err := account.Admits(app, signer); err != nil {
		return nil, err
	}
	cert := key.Path[0]
	test := app.Test || signer.Test

	// 3. Time, room and certificate status: refuse before anything is signed. Without trusted time a certificate cannot be
	// judged, so it is needed also where no timestamp is asked for; how wrong it can be matters to the timestamp alone.
	// Only the word "none" means no timestamp: a policy that is not understood must not loosen anything.
	stamping := app.Stamp != account.StampNone
	stamper := s.cfg.Stampers[q.Algorithm]
	reading := s.cfg.Clock.Now()
	if !reading.Trusted() || stamping && reading.Bound > s.cfg.Accuracy {
		return nil, timeProblem(reading)
	}
	if stamping && stamper == nil {
		return nil, fmt.Errorf("sign: no timestamp unit for %s signatures", q.Algorithm)
	}
	if f, ok := stamper.(Foreteller); ok && stamping {
		if err := f.Ready(); err != nil {
			var p *problem.Problem
			if errors.As(err, &p) { // somebody has stopped it, and says so
				return nil, p
			}
			return nil, stampProblem(err)
		}
	}
	if err := s.cfg.Reserve(); err != nil {
		var p *problem.Problem
		if errors.As(err, &p) {
			return nil, p
		}
		return nil, problem.New(problem.DiskReserve, "存储空间低于保留值，拒绝签名 (too little room is left to sign safely)", "请管理员扩容或归档 (ask an administrator)").With(err)
	}
	if _, err := s.cfg.Directory.Standing(key.Path, pki.StaffSigning, reading.Time); err != nil {
		return nil, err
	}
	if stamping {
		if chain := stamper.Chain(); len(chain) > 0 { // none: whose token it will be is not known yet, and judged afterwards
			if _, err := s.cfg.Directory.Standing(chain, pki.TimeStamping, reading.Time); err != nil {
				return nil, err
			}
		}
	}

	// 4. Consent: one use is taken. It is given back if it is certain that there is no record.
	digest := q.digest(contentSM3)
	consent, err := s.cfg.Directory.Reserve(ctx, app, signer, evidence.Digest{Algorithm: digestNames[q.Algorithm], Value: hex.EncodeToString(digest)}, q.Consent.AuthorizationID, q.Consent.Method, q.Consent.Assertion)
	if err != nil {
		return nil, err
	}
	defer consent.Release() // does nothing after Keep
	consentHash := evidence.HashAuthorization(consent.Stored)
	if end, bounded := ctx.Deadline(); !bounded || time.Until(end) > longest { // interval: a request of the API ends before
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, longest)
		defer cancel()
	}

	// 5. The cipher machine signs; hsm.Key verifies what it gave. A CMS is made detached: that is what is stored, and the
	// content is put into the caller's copy at the end.
	k, err := s.key(ctx, key, consent)
	if err != nil {
		return nil, err
	}
	// The quota is of signatures: the token over one waits its turn in the application's line and is not refused.
	caller := hsm.Caller{Application: app.ID}
	if s.cfg.Caller != nil {
		caller = s.cfg.Caller(app)
	}
	quota := hsm.WithCaller(ctx, caller)
	if stamping {
		ctx = hsm.WithCaller(ctx, hsm.Caller{Application: app.ID})
	}
	chain := key.Chain
	var signed *cms.Signed
	var value []byte  // what the token stamps
	var made [][]byte // and not recorded yet
	defer func() {
		if len(made) > 0 && s.cfg.Discarded != nil {
			s.cfg.Discarded(cmp.Or(failed, errEarlier), made...)
		}
	}()
	if q.Form == formCMS {
		attribute, err := (&pki.SigningContext{
			Application: app.ID, Campus: app.Campus, RecordID: hex.EncodeToString(id[:]), DocumentType: q.Document.Type,
			SignerRole: q.Role, Department: signer.Department, AuthorisationHash: consentHash, Test: test,
		}).Marshal()
		if err != nil {
			return nil, fmt.Errorf("sign: signing context: %w", err)
		}
		p := cms.Params{
			Detached: true, Certificates: append([][]byte{key.Certificate}, chain...), AlgorithmProtection: true,
			SignedAttributes: []cms.Attribute{{Type: pki.OIDSigningContext, Values: [][]byte{attribute}}},
		}
		if q.Digest != nil {
			p.Digest = q.Digest.Value
		} else {
			p.Content = q.Content
		}
		if signed, err = cms.Sign(quota, k, p); err != nil {
			return nil, keyProblem(k, err)
		}
		value = signed.SignatureValue
	} else if value, err = k.SignMessage(quota, q.Content); err != nil {
		return nil, keyProblem(k, err)
	}

	made = append(made, value)

	// 6. The token over the signature value. Without it nothing is recorded when the policy asks for one.
	var token *tsa.Token
	var unit []*smx509.Certificate
	if stamping {
		unit = stamper.Chain()
		stamped, err := imprint(q.Algorithm, value)
		if err != nil {
			return nil, err
		}
		if token, err = stamper.Issue(ctx, &tsa.Request{Imprint: stamped, CertReq: true}); err != nil {
			return nil, stampProblem(err)
		}
		made = append(made, token.DER)
		switch {
		case token.Origin.Path != nil:
			unit = token.Origin.Path
		case !bytes.Equal(stamper.Chain()[0].Raw, unit[0].Raw): // which of the two made the token?
			return nil, problem.New(problem.NotReady, "时间戳单元的证书刚被更换 (the timestamp unit's certificate was replaced meanwhile)", "用同一 Idempotency-Key 重试 (retry with the same key)")
		}
		if signed != nil {
			if err := signed.AddUnsignedAttribute(cms.Attribute{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{token.DER}}); err != nil {
				return nil, fmt.Errorf("sign: %w", err)
			}
		}
		reading = token.Provenance
	} else if reading = s.cfg.Clock.Now(); !reading.Trusted() {
		return nil, timeProblem(reading)
	}
	if signed != nil {
		value = signed.Bytes()
	}

	// 7. The cipher machine may have kept us waiting. Whoever was stopped or revoked meanwhile has not signed, and the
	// certificate must have been good at the time that the token says.
	if _, present, err := s.cfg.Directory.ActiveSigner(q.Signer, q.Algorithm); err != nil {
		return nil, err
	} else if !bytes.Equal(present.Certificate, key.Certificate) {
		return nil, problem.New(problem.NotReady, "签名人证书刚被更换 (the signer's certificate was replaced meanwhile)", "用同一 Idempotency-Key 重试 (retry with the same key)")
	}
	standing, err := s.cfg.Directory.Standing(key.Path, pki.StaffSigning, reading.Time)
	if err != nil {
		return nil, err
	}
	crls, unchecked := slices.Clip(standing.CRLs), standing.Unchecked // what is added below goes into a copy
	if stamping {
		// A token is good only if the unit's certificate is, and whoever judges it needs the lists of its CAs too.
		if standing, err = s.cfg.Directory.Standing(unit, pki.TimeStamping, reading.Time); err != nil {
			return nil, err
		}
		for _, l := range standing.CRLs {
			if !slices.ContainsFunc(crls, func(had []byte) bool { return bytes.Equal(had, l) }) {
				crls = append(crls, l)
			}
		}
		if unchecked == "" {
			unchecked = standing.Unchecked
		}
	}

	// 8. One entry holds signature and token; it is on disk when Append returns.
	size := int64(len(q.Content))
	if q.Digest != nil {
		size = -1
	}
	certHash := audit.Sum(cert.Raw)
	fields, payloads := plainFields, plainPayloads+len(chain)+len(crls)
	if token != nil {
		fields, payloads = fields+stampFields, payloads+stampPayloads
	}
	// Fields are in the order of their names, which saves the journal a copy of them (TestFieldsAreInOrder).
	d := audit.Draft{
		Kind: Kind, Actor: "application/" + app.ID, Object: signer.ID, Ref: id[:], Unique: true, Absent: absent,
		Fields: append(make([]audit.Field, 0, fields), []audit.Field{
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
		}...),
		Payloads: append(make([]audit.Attachment, 0, payloads), []audit.Attachment{
			{Name: "authorization", MediaType: "application/json", Data: consent.Stored},
			{Name: "certificate.0", MediaType: "application/pkix-cert", Data: cert.Raw, Shared: true},
			{Name: "signature", MediaType: map[bool]string{true: "application/cms", false: "application/octet-stream"}[signed != nil], Data: value},
		}...),
	}
	for i, c := range chain {
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "certificate." + strconv.Itoa(i+1), MediaType: "application/pkix-cert", Data: c, Shared: true})
	}
	for i, l := range crls {
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "crl." + strconv.Itoa(i), MediaType: "application/pkix-crl", Data: l, Shared: true})
	}
	if unchecked != "" { // policy "soft" alone
		d.Fields = append(d.Fields, audit.Field{Name: "revocation", Value: audit.Text("not checked")})
	}
	d.Fields = append(d.Fields, []audit.Field{
		{Name: "role", Value: audit.Text(q.Role)},
		{Name: "signer", Value: audit.Text(signer.ID)},
		{Name: "stamp", Value: audit.Text(app.Stamp)},
	}...)
	if token != nil && token.Origin.By != "" {
		d.Fields = append(d.Fields, audit.Field{Name: "stamp.by", Value: audit.Text(token.Origin.By)})
		if token.Origin.Instead != "" {
			d.Fields = append(d.Fields, audit.Field{Name: "stamp.instead", Value: audit.Text(token.Origin.Instead)})
		}
		if strings.HasPrefix(token.Origin.By, "upstream/") { // whose tokens need not hold all certificates, or any
			for i, c := range unit[:len(unit)-1] {
				d.Payloads = append(d.Payloads, audit.Attachment{Name: fmt.Sprintf("stamp.certificate.%d", i), MediaType: "application/pkix-cert", Data: c.Raw, Shared: true})
			}
		}
	}
	d.Fields = append(d.Fields, []audit.Field{
		{Name: "test", Value: audit.Bool(test)},
		{Name: "time.bound_us", Value: audit.Int((reading.Bound + time.Microsecond - 1).Microseconds())}, // up: a bound must hold
		{Name: "time.provenance", Value: audit.Text(reading.Provenance)},
	}...)
	if token != nil {
		d.Payloads = append(d.Payloads, audit.Attachment{Name: "token", MediaType: "application/timestamp-token", Data: token.DER})
		d.Fields = append(d.Fields, audit.Field{Name: "token.serial", Value: audit.Octets(token.Serial.Bytes())})
	}
	receipt, err := s.cfg.Journal.Append(ctx, d)
	switch {
	case errors.Is(err, audit.ErrDuplicateRef):
		// The earlier attempt's answer was lost, and its record is there now. This attempt has none, so its use goes back.
		earlier, rerr := s.cfg.Journal.ByRef(ctx, id[:])
		if rerr != nil {
			return nil, journalProblem(rerr)
		}
		return s.replay(ctx, &earlier[0].Entry, q, body)
	case err != nil:
		if !notWritten(err) {
			consent.Keep() // a consent that is used and lost is asked for again; one that is used twice was never given
		}
		return nil, journalProblem(err)
	}
	made = nil
	consent.Keep()
	r := resultOf(&receipt.Entry)
	if r.Signature, err = q.deliver(value); err != nil {
		return nil, err
	}
	r.Certificates = append([][]byte{cert.Raw}, chain...)
	if token != nil {
		r.Token, r.GenTime, r.Accuracy = token.DER, token.GenTime, token.Accuracy
	}
	return r, nil
}

// errEarlier is why a signature is thrown away whose request had been answered before.
var errEarlier = errors.New("sign: an earlier attempt has the record")

// deliver is the stored signature in the form that was asked for: an attached CMS gets its content back.
func (q *Request) deliver(stored []byte) ([]byte, error) {
	if q.Form != formCMS || q.Detached {
		return stored, nil
	}
	m, err := cms.Parse(stored)
	if err != nil {
		return nil, fmt.Errorf("sign: stored signature: %w", err)
	}
	if m, err = m.WithContent(q.Content); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return m.Bytes(), nil
}

// notWritten reports whether an error of Append means that nothing was or will be written. Of all others, those that
// this release does not know included, the entry may be in the journal.
func notWritten(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, audit.ErrInvalidDraft) ||
		errors.Is(err, audit.ErrClosed) || errors.Is(err, audit.ErrJournalUnwritable)
}

func unusable(detail, next string) error {
	return problem.New(problem.CertificateUnusable, detail, next)
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
func (s *Service) replay(ctx context.Context, e *audit.Entry, q *Request, body [32]byte) (*Result, error) {
	if had, _ := e.Field("request.sm3").(audit.Octets); e.Kind != Kind || !bytes.Equal(had, body[:]) {
		return nil, problem.New(problem.IdempotencyConflict, "同一 Idempotency-Key 曾用于不同的请求 (this key was used for another request)",
			"新的签名用新的键；重试须与首次完全一致 (use a new key, or repeat the first request exactly)")
	}
	r := resultOf(e)
	r.Replayed = true
	payload := func(name string) ([]byte, error) { return s.cfg.Journal.Payload(ctx, e, name) }
	stored, err := payload("signature")
	if err != nil {
		return nil, journalProblem(err)
	}
	if r.Signature, err = q.deliver(stored); err != nil {
		return nil, err
	}
	for i := 0; ; i++ {
		name := fmt.Sprintf("certificate.%d", i)
		if _, ok := e.Payload(name); !ok && i > 0 {
			break
		}
		c, err := payload(name)
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

// keyProblem is hsmProblem for a signature with k. A custody key that this campus's machine cannot open is no machine that is
// away: trying again changes nothing.
func keyProblem(k *hsm.Key, err error) error {
	var rv *hsm.Error
	if k.Wrapped() != nil && (errors.Is(err, hsm.ErrKeyNotFound) || errors.Is(err, hsm.ErrNoWrapping) || errors.As(err, &rv) && rv.RV == hsm.CKR_WRAPPED_KEY_INVALID) {
		return problem.New(problem.KeyElsewhere, "本院区的密码机打不开该托管密钥：没有包装密钥、它不受信任、不是同一把，或密文已损坏 (this campus's cipher machine cannot open the custody key: its wrapping key is missing, not trusted or another one, or the blob is damaged)",
			"请管理员用 ceremony verify 查明，再由保管人的份额恢复 (ask an administrator: find out with ceremony verify, and restore from the custodians' shares)").With(err)
	}
	return hsmProblem(err)
}

func hsmProblem(err error) error {
	var over *hsm.QuotaError
	switch {
	case errors.As(err, &over):
		p := problem.New(problem.RateLimited, "该应用超出签名配额 (the application is over its quota of signatures)",
			"按 Retry-After 稍后用同一 Idempotency-Key 重试；配额由管理员设定 (retry later with the same key; administrators set the quota)").With(err)
		p.After = over.After
		return p
	case errors.Is(err, hsm.ErrNeedsOperator):
		return problem.New(problem.HSMNeedsOperator, "密码机拒绝了口令，已停止尝试 (the cipher machine refused its PIN; nothing is retried)", "请管理员检查密码机口令并重启服务 (ask an administrator)").With(err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, hsm.ErrDeadline):
		return problem.New(problem.Timeout, "等待密码机超时 (timed out waiting for the cipher machine)", "用同一 Idempotency-Key 重试 (retry with the same key)").With(err)
	case errors.Is(err, hsm.ErrKeyNotFound), errors.Is(err, hsm.ErrKeyAmbiguous):
		return problem.New(problem.HSMUnavailable, "密码机中没有该签名人的密钥 (the signer's key is not in the cipher machine)", "请管理员检查是否接错密码机 (ask an administrator: is it the right machine?)").With(err)
	case errors.Is(err, hsm.ErrBadSignature):
		return problem.New(problem.HSMUnavailable, "密码机给出的签名验证不通过，已扣留 (the cipher machine's signature does not verify and was withheld)", "请管理员检查密码机 (ask an administrator)").With(err)
	}
	return problem.New(problem.HSMUnavailable, "密码机暂不可用 (the cipher machine is unavailable)", "稍后用同一 Idempotency-Key 重试 (retry later with the same key)").With(err)
}

func timeProblem(r ntp.Reading) error {
	return problem.New(problem.TimeUntrusted, fmt.Sprintf("时间不可信（%s，误差上限 %v），按策略拒绝签名 (time is not trusted; signing is refused by policy)", r.State, r.Bound.Round(time.Millisecond)),
		"检查时间源；恢复后用同一 Idempotency-Key 重试 (check the time sources; retry with the same key)")
}

func stampProblem(err error) error {
	var p *problem.Problem
	switch {
	case errors.As(err, &p):
		return p
	case errors.Is(err, tsa.ErrTimeNotAvailable):
		return problem.New(problem.TimeUntrusted, "时间不可信，按策略拒绝签名 (time is not trusted; signing is refused by policy)", "检查时间源；恢复后用同一 Idempotency-Key 重试 (check the time sources; retry with the same key)").With(err)
	case errors.Is(err, tsa.ErrCertificateNotValid):
		return unusable("时间戳单元的证书不在有效期内 (the timestamp unit's certificate is not valid now)", "请管理员更换时间戳单元的密钥和证书 (ask an administrator to renew it)")
	}
	return hsmProblem(err)
}
