package pki

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// MaxCRLSize bounds one CRL: a million entries and some.
const MaxCRLSize = 64 << 20

var errMalformed = errors.New("pki: malformed")

// A Reason is a CRL reason code (RFC 5280 §5.3.1).
type Reason int

// Reason codes.
const (
	Unspecified          Reason = 0
	KeyCompromise        Reason = 1
	CACompromise         Reason = 2
	AffiliationChanged   Reason = 3
	Superseded           Reason = 4
	CessationOfOperation Reason = 5
	CertificateHold      Reason = 6
	RemoveFromCRL        Reason = 8
	PrivilegeWithdrawn   Reason = 9
	AACompromise         Reason = 10
)

var reasonWords = map[Reason]string{
	Unspecified:          "未说明原因 unspecified",
	KeyCompromise:        "密钥泄露 keyCompromise",
	CACompromise:         "CA 密钥泄露 cACompromise",
	AffiliationChanged:   "隶属关系变更 affiliationChanged",
	Superseded:           "已被取代 superseded",
	CessationOfOperation: "停止使用 cessationOfOperation",
	CertificateHold:      "暂停 certificateHold",
	RemoveFromCRL:        "从列表移除 removeFromCRL",
	PrivilegeWithdrawn:   "权限撤销 privilegeWithdrawn",
	AACompromise:         "AA 密钥泄露 aACompromise",
}

// String is the reason in words, Chinese first.
func (r Reason) String() string {
	if w, ok := reasonWords[r]; ok {
		return w
	}
	return fmt.Sprintf("原因代码 %d (unknown reason)", int(r))
}

// Known reports whether RFC 5280 assigns the code.
func (r Reason) Known() bool { _, ok := reasonWords[r]; return ok }

// A Revocation is one entry of a CRL.
type Revocation struct {
	Date        time.Time // revocationDate
	Reason      Reason
	HasReason   bool      // false: the entry has no reasonCode, which is not the same as unspecified (RFC 3161 §4)
	InvalidFrom time.Time // invalidityDate (RFC 5280 §5.3.2); zero when absent
}

// A CRL is a revocation list with an index by serial, so that a look-up costs the same in a list of any length.
//
// A full list by the certificate's own issuer, or the partition that the certificate names as its distribution point,
// can clear a certificate. A delta list, a list by reasons or another partition can only show that it is revoked. An
// indirect list and one with critical extensions unknown to us decide nothing. Safe for concurrent use.
type CRL struct {
	list     *smx509.RevocationList
	entries  map[string][]Revocation
	unusable string // why the list may not be relied on at all; "" when it may
	partial  string // why absence from the list says nothing; "" when it does
	scope    distribution
	expired  time.Time // expiredCertsOnCRL: certificates that expired since then stay listed
	// verifiedBy is the last issuer whose key verified the list. Hashing a long list for every certificate would be
	// most of the work of a signature.
	verifiedBy atomic.Pointer[smx509.Certificate]
	// refusedBy is the last one whose key did not: another CA of the list's issuer's name, asked for each of its
	// certificates.
	refusedBy atomic.Pointer[refusal]
}

type refusal struct {
	issuer *smx509.Certificate
	err    error
}

// distribution is what IssuingDistributionPoint says (RFC 5280 §5.2.5).
type distribution struct {
	names            []string // GeneralNames, DER
	onlyUsers, onlyC bool
}

// ParseCRL reads one DER CRL, v2. Bytes left over and extensions given twice are errors; critical extensions that are
// not understood are not, they make every answer "not checked".
func ParseCRL(der []byte) (*CRL, error) {
	if len(der) > MaxCRLSize {
		return nil, fmt.Errorf("pki: CRL of %d bytes, at most %d are read", len(der), MaxCRLSize)
	}
	if err := checkCRLShape(der); err != nil {
		return nil, fmt.Errorf("pki: CRL: %w", err)
	}
	list, err := smx509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("pki: CRL: %w", err)
	}
	if len(list.Raw) != len(der) {
		return nil, errors.New("pki: CRL: bytes left over")
	}
	return newCRL(list)
}

// checkCRLShape refuses bytes after the fields, which smx509 passes over.
func checkCRLShape(der []byte) error {
	in := cryptobyte.String(der)
	var crl, tbs, alg, signature, exts, list cryptobyte.String
	var present bool
	if !in.ReadASN1(&crl, asn1.SEQUENCE) || !in.Empty() ||
		!crl.ReadASN1(&tbs, asn1.SEQUENCE) || !crl.ReadASN1(&alg, asn1.SEQUENCE) ||
		!crl.ReadASN1(&signature, asn1.BIT_STRING) || !crl.Empty() {
		return errors.New("bytes left over after the signature")
	}
	if err := checkAlgorithm(alg); err != nil {
		return err
	}
	if len(signature) < 2 || signature[0] != 0 {
		return errors.New("signature is not a whole number of bytes")
	}
	if !tbs.SkipASN1(asn1.INTEGER) || !tbs.SkipASN1(asn1.SEQUENCE) || !tbs.SkipASN1(asn1.SEQUENCE) || // version, alg, issuer
		!skipTime(&tbs) {
		return errors.New("malformed fields")
	}
	if (tbs.PeekASN1Tag(asn1.UTCTime) || tbs.PeekASN1Tag(asn1.GeneralizedTime)) && !skipTime(&tbs) { // nextUpdate
		return errors.New("malformed nextUpdate")
	}
	if !tbs.SkipOptionalASN1(asn1.SEQUENCE) ||
		!tbs.ReadOptionalASN1(&exts, &present, asn1.Tag(0).ContextSpecific().Constructed()) || !tbs.Empty() {
		return errors.New("bytes left over in the signed part")
	}
	if present {
		if !exts.ReadASN1(&list, asn1.SEQUENCE) || !exts.Empty() {
			return errors.New("malformed extensions")
		}
		return checkExtensions(list)
	}
	return nil
}

func newCRL(list *smx509.RevocationList) (*CRL, error) {
	c := &CRL{list: list, entries: make(map[string][]Revocation, len(list.RevokedCertificateEntries))}
	for _, e := range list.Extensions {
		switch {
		case e.Id.Equal(oidIssuingDistribution):
			c.readScope(e.Value)
		case e.Id.Equal(oidDeltaCRLIndicator):
			c.partial = "增量列表 (delta CRL)"
		case e.Id.Equal(oidAuthorityKeyID), e.Id.Equal(oidCRLNumber):
		case e.Id.Equal(oidExpiredCertsOnCRL):
			in := cryptobyte.String(e.Value)
			if !in.ReadASN1GeneralizedTime(&c.expired) || !in.Empty() {
				return nil, errors.New("pki: CRL: malformed expiredCertsOnCRL")
			}
		default:
			if e.Critical {
				c.spoil("含未知关键扩展 (unknown critical extension " + e.Id.String() + ")")
			}
		}
	}
	for i := range list.RevokedCertificateEntries {
		e := &list.RevokedCertificateEntries[i]
		r := Revocation{Date: e.RevocationTime, Reason: Reason(e.ReasonCode)}
		for _, x := range e.Extensions {
			switch {
			case x.Id.Equal(oidReasonCode):
				r.HasReason = true
			case x.Id.Equal(oidInvalidityDate):
				in := cryptobyte.String(x.Value)
				if !in.ReadASN1GeneralizedTime(&r.InvalidFrom) || !in.Empty() {
					return nil, errors.New("pki: CRL: malformed invalidityDate")
				}
			default:
				// certificateIssuer (indirect lists) is always critical and so lands here too.
				if x.Critical {
					c.spoil("条目含未知关键扩展 (unknown critical entry extension " + x.Id.String() + ")")
				}
			}
		}
		key := serialKey(e.SerialNumber)
		c.entries[key] = append(c.entries[key], r)
	}
	// The index has all that is needed of them; a long list is kept once only.
	list.RevokedCertificates, list.RevokedCertificateEntries = nil, nil
	return c, nil
}

func (c *CRL) spoil(why string) {
	if c.unusable == "" {
		c.unusable = why
	}
}

// readScope reads
//
//	IssuingDistributionPoint ::= SEQUENCE {
//	   distributionPoint          [0] DistributionPointName OPTIONAL,
//	   onlyContainsUserCerts      [1] BOOLEAN DEFAULT FALSE,
//	   onlyContainsCACerts        [2] BOOLEAN DEFAULT FALSE,
//	   onlySomeReasons            [3] ReasonFlags OPTIONAL,
//	   indirectCRL                [4] BOOLEAN DEFAULT FALSE,
//	   onlyContainsAttributeCerts [5] BOOLEAN DEFAULT FALSE }
func (c *CRL) readScope(der []byte) {
	in := cryptobyte.String(der)
	var seq, dp, names cryptobyte.String
	var hasDP bool
	ctx := func(n uint8) asn1.Tag { return asn1.Tag(n).ContextSpecific() }
	if !in.ReadASN1(&seq, asn1.SEQUENCE) || !in.Empty() || !seq.ReadOptionalASN1(&dp, &hasDP, ctx(0).Constructed()) {
		c.spoil("分发点无法解析 (malformed issuing distribution point)")
		return
	}
	if hasDP {
		if !dp.ReadASN1(&names, ctx(0).Constructed()) || !dp.Empty() { // fullName; relative names are not read
			c.spoil("分发点名称无法识别 (distribution point name not understood)")
			return
		}
		for !names.Empty() {
			var n cryptobyte.String
			var tag asn1.Tag
			if !names.ReadAnyASN1Element(&n, &tag) {
				c.spoil("分发点无法解析 (malformed issuing distribution point)")
				return
			}
			c.scope.names = append(c.scope.names, string(n))
		}
		if len(c.scope.names) == 0 {
			c.spoil("分发点无法解析 (malformed issuing distribution point)")
			return
		}
	}
	flag := func(n uint8) (set bool) {
		var v cryptobyte.String
		var present bool
		if !seq.ReadOptionalASN1(&v, &present, ctx(n)) {
			c.spoil("分发点无法解析 (malformed issuing distribution point)")
		}
		if present && (len(v) != 1 || v[0] != 0 && v[0] != 0xff) {
			c.spoil("分发点无法解析 (malformed issuing distribution point)")
		}
		return present && len(v) == 1 && v[0] != 0
	}
	c.scope.onlyUsers = flag(1)
	c.scope.onlyC = flag(2)
	var reasons cryptobyte.String
	var someReasons bool
	if !seq.ReadOptionalASN1(&reasons, &someReasons, ctx(3)) {
		c.spoil("分发点无法解析 (malformed issuing distribution point)")
	}
	if someReasons {
		c.partial = "仅含部分吊销原因 (onlySomeReasons)"
	}
	if flag(4) {
		c.spoil("间接列表 (indirect CRL)")
	}
	if flag(5) {
		c.spoil("仅含属性证书 (attribute certificates only)")
	}
	if !seq.Empty() {
		c.spoil("分发点无法解析 (malformed issuing distribution point)")
	}
}

func serialKey(n *big.Int) string {
	if n.Sign() < 0 {
		return "-" + string(n.Bytes())
	}
	return "+" + string(n.Bytes())
}

// Raw is the list's DER.
func (c *CRL) Raw() []byte { return c.list.Raw }

// RawIssuer is the DER of the issuer's name.
func (c *CRL) RawIssuer() []byte { return c.list.RawIssuer }

// Number is the cRLNumber, nil when absent.
func (c *CRL) Number() *big.Int { return c.list.Number }

// ThisUpdate and NextUpdate bound the list's validity; NextUpdate is zero when absent.
func (c *CRL) ThisUpdate() time.Time { return c.list.ThisUpdate }

// NextUpdate is when the next list is due at the latest; zero when absent.
func (c *CRL) NextUpdate() time.Time { return c.list.NextUpdate }

// Len counts the serial numbers listed.
func (c *CRL) Len() int { return len(c.entries) }

// Lookup is the entries for serial, nil for none. It says nothing of the list's own validity: see [CheckRevocation].
func (c *CRL) Lookup(serial *big.Int) []Revocation { return c.entries[serialKey(serial)] }

// verify checks the list's signature with issuer's key.
func (c *CRL) verify(issuer *smx509.Certificate) error {
	if by := c.verifiedBy.Load(); by != nil && bytes.Equal(by.Raw, issuer.Raw) {
		return nil
	}
	if issuer.KeyUsage&smx509.KeyUsageCRLSign == 0 {
		return errors.New("颁发者无 CRL 签发用途 (issuer lacks cRLSign)")
	}
	if no := c.refusedBy.Load(); no != nil && bytes.Equal(no.issuer.Raw, issuer.Raw) {
		return no.err
	}
	if err := checkSignature(issuer, c.list.SignatureAlgorithm, c.list.RawTBSRevocationList, c.list.Signature); err != nil {
		err = fmt.Errorf("列表签名未通过 (%w)", err)
		c.refusedBy.Store(&refusal{issuer, err})
		return err
	}
	c.verifiedBy.Store(issuer)
	return nil
}

// covers says why the list's silence about cert says nothing, or "".
func (c *CRL) covers(cert *smx509.Certificate) string {
	isCA := cert.BasicConstraintsValid && cert.IsCA
	switch {
	case c.partial != "":
		return c.partial
	case c.scope.onlyUsers && isCA || c.scope.onlyC && !isCA:
		return "列表不含此类证书 (list of another kind of certificate)"
	case len(c.scope.names) == 0:
		return ""
	}
	for _, n := range distributionNames(cert) {
		if slices.Contains(c.scope.names, n) {
			return ""
		}
	}
	return "列表属于另一分发点 (list of another distribution point)"
}

// distributionNames lists the full names, DER, of those distribution points of cert that the issuer itself serves for
// all reasons (RFC 5280 §4.2.1.13).
func distributionNames(cert *smx509.Certificate) (out []string) {
	value, _, _ := extension(cert, oidDistributionPoints)
	in := cryptobyte.String(value)
	var points cryptobyte.String
	if !in.ReadASN1(&points, asn1.SEQUENCE) {
		return nil
	}
	full := asn1.Tag(0).ContextSpecific().Constructed()
	for !points.Empty() {
		var point, dp, names cryptobyte.String
		var has bool
		if !points.ReadASN1(&point, asn1.SEQUENCE) || !point.ReadOptionalASN1(&dp, &has, full) {
			return nil
		}
		if !has || !point.Empty() || !dp.ReadASN1(&names, full) { // reasons or cRLIssuer follow, or a relative name
			continue
		}
		for !names.Empty() {
			var n cryptobyte.String
			var tag asn1.Tag
			if !names.ReadAnyASN1Element(&n, &tag) {
				return nil
			}
			out = append(out, string(n))
		}
	}
	return out
}

// A RevocationQuestion asks whether a certificate was revoked.
type RevocationQuestion struct {
	Certificate *smx509.Certificate
	// Issuer is the certificate's issuer in the path; its key must have signed the list.
	Issuer *smx509.Certificate
	CRLs   []*CRL
	// At is the time in question: when the certificate's key was used.
	At time.Time
	// ListedAt is when a list must be current (thisUpdate ≤ ListedAt ≤ nextUpdate). Zero means At. A later time allows
	// a judgment years after the signature with a fresh list; an earlier one than At is never enough.
	ListedAt time.Time
	Purpose  Purpose
	// StoodAt is when what the key signed is known to have existed already, as an archive timestamp over it proves
	// (RFC 4998): a timestamping certificate revoked later, and not said to be bad since before, does not void it. Zero:
	// nothing is known.
	StoodAt time.Time
}

// CheckRevocation answers from the CRLs, as a check with the ID [CheckPathRevocation].
//
// Failed: a list signed by the issuer has the certificate revoked at or before At; for a timestamping certificate also
// later, unless the reason rules out that its key fell into other hands (RFC 3161 §4), since its tokens are their own
// witnesses of time, or StoodAt precedes the revocation. Passed: a list that is current at ListedAt does not have it, or has it revoked after At, and then
// Detail says so. NotChecked: no list, or none that may be relied on, with the reason. An outdated list can still show
// a revocation, which is for ever unless the certificate was only on hold, but never its absence.
func CheckRevocation(q RevocationQuestion) Check {
	result := Check{ID: CheckPathRevocation, Status: NotChecked}
	if q.Certificate == nil || q.Issuer == nil || q.At.IsZero() {
		result.Detail = "缺少颁发者证书或时间 (no issuer or no time)"
		return result
	}
	who := name(q.Certificate)
	if q.ListedAt.IsZero() {
		q.ListedAt = q.At
	}
	result.Detail = who + "：没有该颁发者的吊销列表 (no CRL of its issuer)"
	var good, doubt answer
	for _, crl := range q.CRLs {
		if crl == nil || !bytes.Equal(crl.list.RawIssuer, q.Certificate.RawIssuer) ||
			!bytes.Equal(crl.list.RawIssuer, q.Issuer.RawSubject) {
			continue
		}
		switch got := crl.answer(q); {
		case got.status == Failed: // no other list can take a revocation back
			return Check{ID: CheckPathRevocation, Status: Failed, Detail: who + "：" + got.detail}
		case got.status == Passed && (good.detail == "" || got.made.After(good.made)):
			good = got
		case got.doubt && (doubt.detail == "" || got.made.After(doubt.made)):
			doubt = got
		case got.status == NotChecked && !got.doubt:
			result.Detail = who + "：" + got.detail
		}
	}
	switch {
	case doubt.detail != "" && !good.made.After(doubt.made):
		result.Detail = who + "：" + doubt.detail
	case good.detail != "":
		result.Status, result.Detail = Passed, who+"："+good.detail
	}
	return result
}

// An answer is one list's word on the question. With doubt, a list that may be relied on for this says that the
// certificate was on hold or its key suspect, which only a newer list can dispel.
type answer struct {
	status Status
	detail string
	doubt  bool
	made   time.Time // thisUpdate
}

func (c *CRL) answer(q RevocationQuestion) answer {
	status, detail, doubt := c.judge(q)
	return answer{status, detail, doubt, c.list.ThisUpdate}
}

func (c *CRL) judge(q RevocationQuestion) (status Status, detail string, doubt bool) {
	if err := c.verify(q.Issuer); err != nil {
		return NotChecked, err.Error(), false
	}
	if c.unusable != "" {
		return NotChecked, "吊销列表不可用：" + c.unusable, false
	}
	later, unsure, held := "", "", false
	for _, r := range c.Lookup(q.Certificate.SerialNumber) {
		after := r.Date.After(q.At)
		switch {
		case r.Reason == RemoveFromCRL: // has no business but in a delta list (RFC 5280 §5.3.1), which we do not apply
			unsure = "列表含 removeFromCRL，状态不明 (removeFromCRL)"
		case r.Reason == CertificateHold && !after:
			later, held = fmt.Sprintf("自 %s 起暂停 (on hold)", stamp(r.Date)), true
		case !after:
			return Failed, fmt.Sprintf("已于 %s 吊销（%s） (revoked)", stamp(r.Date), r.why()), false
		case q.stood(r):
			later = fmt.Sprintf("于 %s 吊销（%s），晚于存档时间戳 %s，此前已盖的时间戳仍有效 (revoked later than the archive timestamp)", stamp(r.Date), r.why(), stamp(q.StoodAt))
		case q.Purpose == TimeStamping && r.Reason == CertificateHold:
			unsure = fmt.Sprintf("时间戳证书自 %s 起暂停，其时间戳暂不可断定 (on hold)", stamp(r.Date))
		case q.Purpose == TimeStamping && !r.sparesTokens():
			return Failed, fmt.Sprintf("时间戳证书于 %s 吊销（%s），其此前签发的时间戳亦不可信 (revoked, tokens void, RFC 3161 §4)", stamp(r.Date), r.why()), false
		case !r.InvalidFrom.IsZero() && !r.InvalidFrom.After(q.At):
			unsure = fmt.Sprintf("于 %s 吊销（%s），且 CA 称自 %s 起已不可信 (invalidityDate precedes)", stamp(r.Date), r.why(), stamp(r.InvalidFrom))
		default:
			later = fmt.Sprintf("于 %s 吊销（%s），晚于所判时刻，签名仍有效 (revoked later, the signature stands)", stamp(r.Date), r.why())
		}
	}
	// What follows rests on the list being complete and current.
	stale := c.covers(q.Certificate)
	switch {
	case stale != "":
	case q.ListedAt.Before(q.At):
		stale = "吊销列表时刻早于所判时刻 (list judged before the time in question)"
	case c.list.NextUpdate.IsZero():
		stale = "吊销列表没有下次更新时间 (no nextUpdate)"
	case q.ListedAt.Before(c.list.ThisUpdate):
		stale = fmt.Sprintf("吊销列表 %s 才签发 (list from the future)", stamp(c.list.ThisUpdate))
	case q.ListedAt.After(c.list.NextUpdate):
		stale = fmt.Sprintf("吊销列表已于 %s 过期 (list expired)", stamp(c.list.NextUpdate))
	}
	switch {
	case held && stale == "":
		return Failed, later, false
	case held:
		return NotChecked, later + "；" + stale, true
	case unsure != "":
		return NotChecked, unsure, true
	case stale != "":
		return NotChecked, stale, false
	case later != "":
		return Passed, later, false
	case q.Certificate.NotAfter.Before(c.list.ThisUpdate) && (c.expired.IsZero() || q.Certificate.NotAfter.Before(c.expired)):
		// RFC 5280 §3.3: an expired certificate may be dropped, so its absence says nothing.
		return NotChecked, "证书在列表签发前已过期，可能已被移出列表 (expired before the list was made)", false
	}
	number := "?"
	if c.list.Number != nil {
		number = SerialHex(c.list.Number)
	}
	return Passed, fmt.Sprintf("未吊销，列表 %s，%s 签发 (not revoked)", number, stamp(c.list.ThisUpdate)), false
}

// stood reports whether a revocation later than At came too late to touch what had been signed.
func (q RevocationQuestion) stood(r Revocation) bool {
	return q.Purpose == TimeStamping && !q.StoodAt.IsZero() && r.Date.After(q.StoodAt) &&
		(r.InvalidFrom.IsZero() || r.InvalidFrom.After(q.StoodAt))
}

// sparesTokens: RFC 3161 §4 (1), the reasons under which tokens made before the revocation stay valid. The reason must
// be given.
func (r Revocation) sparesTokens() bool {
	if !r.HasReason {
		return false
	}
	switch r.Reason {
	case Unspecified, AffiliationChanged, Superseded, CessationOfOperation:
		return true
	}
	return false
}

func (r Revocation) why() string {
	if !r.HasReason {
		return "未给出原因 no reason given"
	}
	return r.Reason.String()
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

// EncodeCRLPEM is DER as PEM.
func EncodeCRLPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}
