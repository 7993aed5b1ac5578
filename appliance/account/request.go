package account

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/audit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// A Request is a certificate request (PKCS#10, RFC 2986) for a key of ours: the payload of its outcome.
type Request struct {
	Owner     string    `json:"owner"`
	Label     string    `json:"label"`
	Algorithm string    `json:"algorithm"`
	PublicKey []byte    `json:"public_key"` // SubjectPublicKeyInfo, DER
	Subject   string    `json:"subject"`
	CSR       []byte    `json:"csr"` // DER
	NewKey    bool      `json:"new_key,omitempty"`
	Wrapped   *Wrapped  `json:"wrapped,omitempty"` // of a new custody key
	At        time.Time `json:"at"`
}

func (r *Request) parse() error {
	csr, err := smx509.ParseCertificateRequest(r.CSR)
	if err == nil && !bytes.Equal(csr.RawSubjectPublicKeyInfo, r.PublicKey) {
		err = fmt.Errorf("request of %s is for another key", r.Owner)
	}
	return err
}

func (r *Request) set(s *Service, e *audit.Entry) error {
	k := heldKey{owner: r.Owner, label: r.Label, algorithm: r.Algorithm, class: classOf(r.Owner), spki: r.PublicKey, wrapped: r.Wrapped, born: entryTime(e)}
	switch old := s.heldKeyOf(r.Owner, r.Label); {
	case old != nil:
		k = *old
	case !r.NewKey:
		return fmt.Errorf("account: entry %d: request for an unknown key %s of %s", e.Sequence, r.Label, r.Owner)
	case s.isForeign(e) && r.Wrapped == nil:
		k.node = e.Node
	}
	k.request = r
	s.hold(&k)
	return nil
}

func classOf(owner string) hsm.SlotClass {
	switch useOf(owner) {
	case UseTSA:
		return hsm.TSA
	case UseLog:
		return hsm.Log
	case UseTLS:
		return hsm.TLS
	}
	return hsm.Staff
}

// A RequestSpec asks for a certificate request.
type RequestSpec struct {
	For string // "signer:D10023", "signer:D10023/RSA-2048", "tsa:sm2" and other units, "log", "tls"
	// NewKey makes another key pair for roll-over; the present one goes on until the new certificate is imported and
	// valid. A new key that still waits for its first certificate is used again.
	NewKey bool
	// Replace makes a new request in the place of one that waits.
	Replace bool
	Subject string   // "CN=…,O=…"; empty: the owner's present name
	Hosts   []string // TLS: DNS names and addresses; empty: those of the present certificate
}

var errOwnerUnknown = problem.New(problem.NotFound, "没有这个密钥 (no such key)",
	"--for 须为 signer:工号[/算法]、tsa:单元、log 或 tls (see yinjian cert list)")

// RequestCertificate answers a certificate request for a key of ours, signed in the cipher machine. Asked again while the
// certificate is awaited, it answers the same one.
//
// Order: 1. the intent, with the prefix of a new key's label; 2. key and signature; 3. the outcome with the request. After
// a stop in between a new key is destroyed by [Service.Settle]; nobody has seen it.
func (s *Service) RequestCertificate(ctx context.Context, actor string, spec RequestSpec) (*Request, error) {
	owner, algorithm, _ := strings.Cut(spec.For, "/")
	if algorithm == "" && useOf(owner) == UseStaff {
		algorithm = string(hsm.SM2)
	}
	unlock, err := s.beginChange(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.currentOwner(ctx, owner); err != nil {
		return nil, err
	}
	var keys []*heldKey
	s.mu.RLock()
	all := s.held[owner]
	for _, k := range all {
		if (algorithm == "" || k.algorithm == algorithm) && k.destroyed.IsZero() {
			keys = append(keys, k)
		}
	}
	s.mu.RUnlock()
	switch {
	case len(all) == 0 && useOf(owner) == UseStaff:
		return nil, errSignerUnknown
	case len(keys) == 0:
		return nil, errOwnerUnknown
	case spec.NewKey && owner == UseLog:
		return nil, problem.New(problem.Forbidden, "日志密钥不更换：检查点须由同一密钥签署 (the log's key never changes: every checkpoint is signed by one key)",
			"不带 --new-key 申请新证书 (request a certificate for the present key, without --new-key)")
	}
	k := keys[len(keys)-1]
	if spec.NewKey && len(k.certs) > 0 {
		return s.requestNew(ctx, actor, owner, k, spec)
	}
	if k.request != nil && !spec.Replace {
		if spec.Subject != "" {
			if want, err := subjectOf(spec.Subject); err != nil || want.String() != k.request.Subject {
				return nil, problem.New(problem.Exists, "已有待批的证书请求，主题不同 (a request with another subject waits already)",
					"导入其证书，或加 --replace 另作请求 (import its certificate, or replace the request)")
			}
		}
		return k.request, nil
	}
	if k.wrapped != nil {
		// Its private half is sealed: a custody key signs its request when it is made, and another request is another key. Beside
		// one that has a certificate or a request it is for two persons to ask for.
		if !spec.NewKey && (len(k.certs) > 0 || k.request != nil) {
			return nil, problem.New(problem.Forbidden, "托管密钥的另一份请求就是另一把密钥 (another request for a custody key is another key)",
				"加 --new-key，由两人办理 (ask for a new key, which takes two persons)")
		}
		return s.requestNew(ctx, actor, owner, k, spec)
	}
	if k.node != "" {
		return nil, residentElsewhere(k.node)
	}
	i, err := s.intend(ctx, audit.Draft{Kind: kindRequestIntent, Actor: actor, Object: owner}, "request", "")
	if err != nil {
		return nil, err
	}
	signer := k.signer
	if signer == nil {
		token := s.cfg.Slots[k.class]
		if token == nil {
			return nil, fmt.Errorf("account: no %s slot", k.class)
		}
		held, err := hsm.NewKey(ctx, token, k.label, true)
		if err != nil {
			return nil, hsmProblem(err)
		}
		signer = requestSigner(ctx, token, held)
	}
	return s.request(ctx, actor, i, k, signer, spec, false)
}

func (s *Service) requestNew(ctx context.Context, actor, owner string, present *heldKey, spec RequestSpec) (*Request, error) {
	token := s.cfg.Slots[present.class]
	if token == nil || present.signer != nil {
		return nil, problem.New(problem.Forbidden, "该密钥不在密码机内，不能在此换新 (this key is not in the cipher machine; no new one can be made)",
			"先为它配置密码机槽位 (give it a slot of the cipher machine first)")
	}
	if err := s.settle(ctx); err != nil {
		s.cfg.Log.WithError(err).Warning("keys of an interrupted change could not be cleared away")
	}
	unique, err := newID()
	if err != nil {
		return nil, err
	}
	prefix := map[string]string{UseStaff: "staff/" + strings.TrimPrefix(owner, signerOwner), UseTSA: "tsa/" + strings.TrimPrefix(owner, "tsa:"), UseTLS: "tls"}[useOf(owner)] + "/" + unique[:8] + "/"
	d := audit.Draft{Kind: kindRequestIntent, Actor: actor, Object: owner, Fields: []audit.Field{text("slot", string(present.class))}}
	i, err := s.intend(ctx, d, "request", prefix)
	if err != nil {
		return nil, err
	}
	var g *Signer
	if useOf(owner) == UseStaff {
		g, _ = s.Signer(strings.TrimPrefix(owner, signerOwner))
	}
	signer, wrapped, err := s.generate(ctx, present.class, prefix+present.algorithm, present.algorithm, g)
	if err != nil {
		return nil, fmt.Errorf("account: a new key for %s: %w", owner, err)
	}
	if w := signer.Wrapped(); w != nil {
		defer s.forgetKeys([][32]byte{w.Digest()}) // it signs its request, and then not without its owner
	}
	spki, err := smx509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, err
	}
	fresh := &heldKey{owner: owner, label: prefix + present.algorithm, algorithm: present.algorithm, class: present.class, spki: spki, wrapped: wrapped}
	return s.request(ctx, actor, i, fresh, requestSigner(ctx, token, signer), spec, true)
}

// A RequestSigner is a slot whose keys sign no digest, and a certificate request only when they see it whole: info is the
// DER of a CertificationRequestInfo (RFC 2986 §4.1) for the key of that label. The signature is as hsm.Key's.
type RequestSigner interface {
	SignRequest(ctx context.Context, label string, info []byte) ([]byte, error)
}

// requestSigner answers what signs requests for key.
func requestSigner(ctx context.Context, token hsm.Token, key *hsm.Key) crypto.Signer {
	if slot, ok := token.(RequestSigner); ok {
		return wholeSigner{ctx: ctx, slot: slot, key: key}
	}
	return key
}

// A wholeSigner hands a request on as it is. It is a crypto.MessageSigner, which smx509 asks first; its life is one request,
// so it may hold the request's context.
type wholeSigner struct {
	ctx  context.Context
	slot RequestSigner
	key  *hsm.Key
}

func (w wholeSigner) Public() crypto.PublicKey { return w.key.Public() }

func (w wholeSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("account: this slot's keys sign no digests")
}

func (w wholeSigner) SignMessage(_ io.Reader, message []byte, _ crypto.SignerOpts) ([]byte, error) {
	return w.slot.SignRequest(w.ctx, w.key.Info().Label, message)
}

// request signs and journals.
func (s *Service) request(ctx context.Context, actor string, i intent, k *heldKey, signer crypto.Signer, spec RequestSpec, fresh bool) (*Request, error) {
	spki, err := smx509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(spki, k.spki) {
		return nil, problem.New(problem.HSMUnavailable, "密码机中该标签的密钥不是登记的密钥 (the key under this label is not the one that was enrolled)",
			"请管理员检查是否接错密码机 (is it the right machine?)")
	}
	t, err := s.template(k, spec)
	if err != nil {
		return nil, err
	}
	der, err := smx509.CreateCertificateRequest(rand.Reader, t, signer)
	if err != nil {
		return nil, hsmProblem(err)
	}
	csr, err := smx509.ParseCertificateRequest(der)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return nil, fmt.Errorf("account: certificate request of %s: %w", k.owner, err)
	}
	r := Request{
		Owner: k.owner, Label: k.label, Algorithm: k.algorithm, PublicKey: spki, Subject: csr.Subject.String(), CSR: der, NewKey: fresh, Wrapped: k.wrapped,
		At: s.cfg.Clock.Now().Time,
	}
	// The signature over the request is named, so that the use of the key can be told from one that nobody recorded.
	sum, signature := sm3.Sum(der), sm3.Sum(csr.Signature)
	d := audit.Draft{
		Kind: kindRequest, Actor: actor, Object: k.owner,
		Fields: []audit.Field{
			text("intent", i.id), text("act", "request"), text("label", k.label), text("algorithm", k.algorithm), boolean("new_key", fresh),
			octets("csr.sm3", sum[:]), octets("signature.sm3", signature[:]),
		},
		Payloads: []audit.Attachment{{Name: "csr", MediaType: "application/pkcs10", Data: der}},
	}
	if err := s.conclude(ctx, d, i.ref, &r, nil); err != nil {
		return nil, err
	}
	return &r, nil
}

// template is the request's content: the subject, and the extensions that the certificate shall have.
func (s *Service) template(k *heldKey, spec RequestSpec) (*smx509.CertificateRequest, error) {
	t := new(smx509.CertificateRequest)
	var present *smx509.Certificate
	if _, all := s.candidates(k.owner, ""); len(all) > 0 {
		present = all[0].cert.leaf()
	}
	s.mu.RLock()
	g := s.signers[strings.TrimPrefix(k.owner, signerOwner)]
	s.mu.RUnlock()
	switch use := useOf(k.owner); {
	case spec.Subject != "":
		name, err := subjectOf(spec.Subject)
		if err != nil {
			return nil, err
		}
		t.Subject = name
	case use == UseStaff:
		t.Subject = pkix.Name{Country: []string{"CN"}, OrganizationalUnit: []string{g.Department}, CommonName: g.Name, SerialNumber: g.ID}
	default:
		// The birth certificate's organisation says "evaluation", which no other CA should repeat.
		t.Subject = pkix.Name{Country: []string{"CN"}, CommonName: k.owner}
		if present != nil {
			t.Subject.CommonName = present.Subject.CommonName
		}
	}
	usage := byte(0x80) // digitalSignature; RFC 5280 §4.2.1.3 counts from the left
	if use := useOf(k.owner); use == UseStaff || use == UseTSA {
		usage = 0xc0 // and contentCommitment
	}
	bits, err := asn1.Marshal(asn1.BitString{Bytes: []byte{usage}, BitLength: map[byte]int{0x80: 1, 0xc0: 2}[usage]})
	if err != nil {
		return nil, err
	}
	t.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: bits}}
	if ext, ok := pki.ExtKeyUsageExtension(purposes[useOf(k.owner)]); ok {
		t.ExtraExtensions = append(t.ExtraExtensions, ext)
	}
	if useOf(k.owner) != UseTLS {
		if len(spec.Hosts) > 0 {
			return nil, problem.Invalid("hosts", "只有 tls 证书有主机名 (names of hosts are for tls only)")
		}
		return t, nil
	}
	if len(spec.Hosts) == 0 && present != nil {
		t.DNSNames, t.IPAddresses = present.DNSNames, present.IPAddresses
	}
	for _, h := range spec.Hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else if reHost.MatchString(h) && len(h) <= 253 {
			t.DNSNames = append(t.DNSNames, h)
		} else {
			return nil, problem.Invalid("hosts", "%q 不是主机名或地址 (neither a DNS name nor an address)", h)
		}
	}
	return t, nil
}

// subjectOf reads "CN=张三,OU=胸外科,O=某医院,C=CN". A comma in a value is not possible; a hospital's names have none.
func subjectOf(words string) (name pkix.Name, err error) {
	bad := func(why string) (pkix.Name, error) {
		return name, problem.Invalid("subject", "%s；写作 CN=…,OU=…,O=…,L=…,ST=…,C=CN,serialNumber=… (malformed subject)", why)
	}
	var seen []string
	for part := range strings.SplitSeq(words, ",") {
		key, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		key, value = strings.ToUpper(strings.TrimSpace(key)), strings.TrimSpace(value)
		if !ok || problem.CheckText("subject", value, maxName) != nil || len([]rune(value)) > 64 || slices.Contains(seen, key) {
			return bad(fmt.Sprintf("%.40q 有误", part))
		}
		seen = append(seen, key)
		switch key {
		case "CN":
			name.CommonName = value
		case "SERIALNUMBER":
			name.SerialNumber = value
		case "C":
			if len(value) != 2 {
				return bad("C 须为两位国家代码")
			}
			name.Country = []string{value}
		case "ST":
			name.Province = []string{value}
		case "L":
			name.Locality = []string{value}
		case "O":
			name.Organization = []string{value}
		case "OU":
			name.OrganizationalUnit = []string{value}
		default:
			return bad(fmt.Sprintf("未知的项 %.20q", key))
		}
	}
	if name.CommonName == "" {
		return bad("缺少 CN")
	}
	return name, nil
}
