package pki

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"strings"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// A Purpose is the one thing a key is for.
type Purpose string

const (
	// StaffSigning binds a person to a record: contentCommitment (nonRepudiation), with or without digitalSignature,
	// no other usage, and no extended usage that another purpose lives by.
	StaffSigning Purpose = "staff-signing"
	// TimeStamping: extended usage timeStamping, critical and sole (RFC 3161 §2.3).
	TimeStamping Purpose = "time-stamping"
	// LogSigning signs the journal's checkpoints: extended usage [OIDExtKeyUsageLog], critical and sole.
	LogSigning Purpose = "log-signing"
	// TLSServer and TLSClient: digitalSignature with the extended usage.
	TLSServer Purpose = "tls-server"
	TLSClient Purpose = "tls-client"
	// CertificateAuthority: basicConstraints CA and keyCertSign, both critical.
	CertificateAuthority Purpose = "ca"
)

// A Problem is one rule that a certificate breaks.
type Problem struct {
	ID     string `json:"id"`     // stable: "key_usage"
	Detail string `json:"detail"` // Chinese first
}

// A PurposeError says why a certificate cannot serve a purpose.
type PurposeError struct {
	Purpose  Purpose
	Problems []Problem // never empty
}

func (e *PurposeError) Error() string {
	return fmt.Sprintf("pki: certificate not for %s: %s", e.Purpose, joinProblems(e.Problems))
}

func joinProblems(ps []Problem) string {
	var words []string
	for _, p := range ps {
		words = append(words, p.Detail)
	}
	return strings.Join(words, "；")
}

// CheckPurpose answers nil when cert may be used for purpose and for no other of ours, else a [*PurposeError].
func CheckPurpose(cert *smx509.Certificate, purpose Purpose) error {
	if ps := purposeProblems(cert, purpose); len(ps) > 0 {
		return &PurposeError{Purpose: purpose, Problems: ps}
	}
	return nil
}

const (
	signBits = smx509.KeyUsageDigitalSignature | smx509.KeyUsageContentCommitment
	caBits   = smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign
)

func purposeProblems(cert *smx509.Certificate, purpose Purpose) (ps []Problem) {
	if cert == nil {
		return []Problem{{"certificate", "没有证书 (no certificate)"}}
	}
	add := func(id, detail string) { ps = append(ps, Problem{id, detail}) }
	_, _, hasUsage := extension(cert, oidKeyUsage)
	usage := cert.KeyUsage
	if !hasUsage || usage == 0 {
		add("key_usage", "缺少密钥用途 (keyUsage missing)")
	}
	ekus, ekuCritical, err := extKeyUsages(cert)
	if err != nil {
		add("ext_key_usage", "扩展密钥用途无法解析 (extKeyUsage malformed)")
	}
	has := func(id asn1.ObjectIdentifier) bool {
		for _, e := range ekus {
			if e.Equal(id) {
				return true
			}
		}
		return false
	}
	only := func(allowed smx509.KeyUsage) {
		if usage&^allowed != 0 {
			add("key_usage", "密钥用途超出该目的 (keyUsage has other bits)")
		}
	}
	sole := func(id asn1.ObjectIdentifier, word string) {
		if len(ekus) != 1 || !has(id) || !ekuCritical {
			add("ext_key_usage", "扩展密钥用途必须仅为"+word+"且为关键项 (extKeyUsage must be that one, critical)")
		}
	}
	if purpose != CertificateAuthority && cert.BasicConstraintsValid && cert.IsCA {
		add("basic_constraints", "CA 证书不得作为终端证书使用 (a CA certificate)")
	}
	switch purpose {
	case StaffSigning:
		if hasUsage && usage&smx509.KeyUsageContentCommitment == 0 {
			add("key_usage", "缺少抗抵赖用途 (contentCommitment missing)")
		}
		only(signBits)
		for _, other := range []asn1.ObjectIdentifier{oidExtKeyUsageTimestamp, oidExtKeyUsageServer, oidExtKeyUsageOCSP,
			oidExtKeyUsageAny, OIDExtKeyUsageLog} {
			if has(other) {
				add("ext_key_usage", "扩展密钥用途 "+other.String()+" 属于其他目的 (extKeyUsage of another purpose)")
			}
		}
	case TimeStamping:
		if hasUsage && usage&signBits == 0 {
			add("key_usage", "缺少签名用途 (digitalSignature missing)")
		}
		only(signBits)
		sole(oidExtKeyUsageTimestamp, "时间戳")
	case LogSigning:
		if hasUsage && usage&smx509.KeyUsageDigitalSignature == 0 {
			add("key_usage", "缺少签名用途 (digitalSignature missing)")
		}
		only(smx509.KeyUsageDigitalSignature)
		sole(OIDExtKeyUsageLog, "日志签名")
	case TLSServer, TLSClient:
		if hasUsage && usage&smx509.KeyUsageDigitalSignature == 0 {
			add("key_usage", "缺少签名用途 (digitalSignature missing)")
		}
		only(smx509.KeyUsageDigitalSignature | smx509.KeyUsageKeyEncipherment | smx509.KeyUsageKeyAgreement)
		want := oidExtKeyUsageServer
		if purpose == TLSClient {
			want = oidExtKeyUsageClient
		}
		if !has(want) {
			add("ext_key_usage", "缺少 TLS 扩展密钥用途 (extKeyUsage missing)")
		}
		for _, e := range ekus {
			if !e.Equal(oidExtKeyUsageServer) && !e.Equal(oidExtKeyUsageClient) {
				add("ext_key_usage", "扩展密钥用途 "+e.String()+" 属于其他目的 (extKeyUsage of another purpose)")
			}
		}
	case CertificateAuthority:
		if _, critical, _ := extension(cert, oidBasicConstraints); !cert.BasicConstraintsValid || !cert.IsCA || !critical {
			add("basic_constraints", "不是 CA 证书 (basicConstraints CA:TRUE, critical, missing)")
		}
		if hasUsage && usage&smx509.KeyUsageCertSign == 0 {
			add("key_usage", "缺少证书签发用途 (keyCertSign missing)")
		}
	default:
		add("purpose", "未知的用途 (unknown purpose)")
	}
	return ps
}

// extKeyUsages lists the extended key usages, in order, and whether the extension is critical.
func extKeyUsages(cert *smx509.Certificate) (ids []asn1.ObjectIdentifier, critical bool, err error) {
	value, critical, present := extension(cert, oidExtKeyUsage)
	if !present {
		return nil, false, nil
	}
	in := cryptobyte.String(value)
	var list cryptobyte.String
	if !in.ReadASN1(&list, casn1.SEQUENCE) || !in.Empty() || list.Empty() {
		return nil, critical, errMalformed
	}
	for !list.Empty() {
		var id asn1.ObjectIdentifier
		if !list.ReadASN1ObjectIdentifier(&id) {
			return nil, critical, errMalformed
		}
		ids = append(ids, id)
	}
	return ids, critical, nil
}

// purposeOID is the extended usage that a CA's own extKeyUsage, if it has one, must allow; nil for none.
func purposeOID(p Purpose) asn1.ObjectIdentifier {
	switch p {
	case TimeStamping:
		return oidExtKeyUsageTimestamp
	case LogSigning:
		return OIDExtKeyUsageLog
	case TLSServer:
		return oidExtKeyUsageServer
	case TLSClient:
		return oidExtKeyUsageClient
	}
	return nil
}

// ExtKeyUsageExtension is the extension that purpose needs, ready for a template's ExtraExtensions; ok is false for a
// purpose without one. It is critical where the purpose demands it, which smx509's own field cannot say.
func ExtKeyUsageExtension(purpose Purpose) (ext pkix.Extension, ok bool) {
	id := purposeOID(purpose)
	if id == nil {
		return pkix.Extension{}, false
	}
	value, err := asn1.Marshal([]asn1.ObjectIdentifier{id})
	if err != nil {
		panic(err) // our own constant
	}
	return pkix.Extension{Id: oidExtKeyUsage, Critical: purpose == TimeStamping || purpose == LogSigning, Value: value}, true
}
