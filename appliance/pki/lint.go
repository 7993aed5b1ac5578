package pki

import (
	"github.com/emmansun/gmsm/smx509"
)

// LintLeaf lists the rules that an end-entity certificate breaks: ours, and those on which other software insists
// (RFC 5280 §4.1.2.2 and §4.2, GM/T 0015-2012, and what Adobe, Java and the browsers refuse). It is for certificates we
// issue or import, not for a verdict: a certificate that lints badly may still verify. No problems is nil.
func LintLeaf(cert *smx509.Certificate, purpose Purpose) []Problem {
	ps := purposeProblems(cert, purpose)
	if cert == nil {
		return ps
	}
	add := func(id, detail string) { ps = append(ps, Problem{id, detail}) }
	if cert.Version != 3 {
		add("version", "不是 X.509 v3 (not version 3)")
	}
	switch bits := cert.SerialNumber.BitLen(); { // as INTEGER: BitLen/8+1 bytes, a sign bit included
	case cert.SerialNumber.Sign() <= 0:
		add("serial", "序列号不是正数 (serial not positive)")
	case bits <= 56:
		add("serial", "序列号不足 8 字节 (serial shorter than 8 bytes)")
	case bits > 159:
		add("serial", "序列号超过 20 字节 (serial longer than 20 bytes)")
	}
	if !cert.NotAfter.After(cert.NotBefore) {
		add("validity", "有效期为空 (notAfter not after notBefore)")
	}
	if len(cert.RawSubject) <= 2 || cert.Subject.CommonName == "" {
		add("subject", "主题缺少名称 (no common name)")
	}
	if len(cert.RawIssuer) <= 2 {
		add("issuer", "颁发者为空 (empty issuer)")
	}
	if err := CheckPublicKey(cert.PublicKey); err != nil {
		add("key", "公钥算法或长度不可接受 ("+err.Error()+")")
	}
	switch cert.SignatureAlgorithm {
	case smx509.SM2WithSM3, smx509.SHA256WithRSA, smx509.SHA384WithRSA, smx509.SHA512WithRSA:
	default:
		add("signature_algorithm", "签名算法不可接受 (signature algorithm "+cert.SignatureAlgorithm.String()+")")
	}
	if _, critical, present := extension(cert, oidKeyUsage); present && !critical {
		add("key_usage", "密钥用途不是关键项 (keyUsage not critical)")
	}
	if purpose == StaffSigning && cert.KeyUsage&signBits != signBits {
		add("key_usage", "员工签名证书应含数字签名和抗抵赖 (digitalSignature and contentCommitment expected)")
	}
	if _, _, present := extension(cert, oidBasicConstraints); present && !cert.IsCA {
		// SEQUENCE {} in a leaf says nothing, and old Java and some gateways stumble over it.
		add("basic_constraints", "终端证书不应带空的基本约束 (empty basicConstraints)")
	}
	if len(cert.SubjectKeyId) == 0 {
		add("subject_key_id", "缺少主体密钥标识 (no subjectKeyIdentifier)")
	}
	if len(cert.AuthorityKeyId) == 0 {
		add("authority_key_id", "缺少颁发者密钥标识 (no authorityKeyIdentifier)")
	}
	if len(cert.UnhandledCriticalExtensions) > 0 {
		add("critical", "含未知关键扩展 (unknown critical extension "+cert.UnhandledCriticalExtensions[0].String()+")")
	}
	if purpose == TLSServer && len(cert.DNSNames)+len(cert.IPAddresses) == 0 {
		add("subject_alt_name", "服务器证书缺少名称 (no DNS name or address)")
	}
	return ps
}
