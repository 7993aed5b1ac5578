package show

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/audit"
	"yinjian/appliance/cms"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

// A Figure is one number of a verification, as somebody else computes it.
type Figure struct {
	Name string `json:"name"` // "Z_A", "e", "r"
	// How says what it is computed from, in the other figures' names; "" for what is given.
	How   string `json:"how,omitempty"`
	Value string `json:"value"` // hexadecimal, or text
	// Holds says whether two figures that must be equal are, where this is about that.
	Holds *bool `json:"holds,omitempty"`
}

// A Part is a stretch of a verification: a signature, the proof that an entry is in the journal.
type Part struct {
	ID      string   `json:"id"`
	Title   string   `json:"title"` // Chinese first
	Figures []Figure `json:"figures"`
	// DER is the structure of what was signed or proved with, a line for each element.
	DER []string `json:"der,omitempty"`
}

// identity is what Z_A is computed with (GM/T 0009-2012 §10).
const identity = "1234567812345678"

// Magnify shows a bundle's numbers so that each can be computed again from the bundle alone: of the record's signature, of
// each certificate of the chains, of the token, of the path in the journal's tree, and of the checkpoint's signature
// (GM/T 0003.2-2012 §5.5 and §7, RFC 8017 §8.2.2, RFC 9162 §2.1.3.2). document is what was signed, nil when it is not at
// hand; logKey is the journal's, nil when it is unknown. It judges nothing: that is [evidence.Verify].
func Magnify(b *evidence.Bundle, document []byte, logKey crypto.PublicKey) []Part {
	certs := []*smx509.Certificate{}
	for _, raw := range b.Certificates {
		if c, err := pki.ParseCertificate(raw); err == nil {
			certs = append(certs, c)
		}
	}
	entry, _ := audit.ParseEntry(b.Journal.Leaf)
	parts := []Part{signatureOf(b, entry, certs, document)}
	value := b.Signature.Value
	if m, err := cms.Parse(value); err == nil && len(m.SignerInfos) == 1 && b.Signature.Form == "cms" {
		value = m.SignerInfos[0].Signature
	}
	if t, err := tsa.ParseToken(b.Token); len(b.Token) > 0 && err == nil {
		parts = append(parts, tokenOf(t, value, certs))
	}
	for i, c := range certs {
		parts = append(parts, certificateOf(i, c, certs))
	}
	return append(parts, inclusionOf(b), checkpointOf(b, logKey))
}

func given(name, value string) Figure { return Figure{Name: name, Value: value} }

func computed(name, how, value string) Figure { return Figure{Name: name, How: how, Value: value} }

func equal(name, how, a, b string) Figure {
	holds := a == b
	return Figure{Name: name, How: how, Value: map[bool]string{true: "相等 (equal)", false: "不等 (not equal)"}[holds], Holds: &holds}
}

// signatureOf is the record's signature, by the certificate that the leaf names.
func signatureOf(b *evidence.Bundle, entry *audit.Entry, certs []*smx509.Certificate, document []byte) Part {
	p := Part{ID: "signature", Title: "签名 (signature)", DER: Outline(b.Signature.Value)}
	var signer *smx509.Certificate
	if entry != nil {
		want, _ := entry.Field("certificate.sm3").(audit.Octets)
		i := slices.IndexFunc(certs, func(c *smx509.Certificate) bool { sum := audit.Sum(c.Raw); return bytes.Equal(sum[:], want) })
		if i >= 0 {
			signer = certs[i]
		}
	}
	p.Figures = append(p.Figures, given("签名人证书 signer", subject(signer)), given("摘要 digest", b.Record.DigestAlgorithm+" "+b.Record.Digest))
	switch b.Signature.Form {
	case "cms":
		m, err := cms.Parse(b.Signature.Value)
		if err != nil || len(m.SignerInfos) != 1 {
			p.Figures = append(p.Figures, given("CMS", "无法解析 (cannot be parsed)"))
			return p
		}
		p.Figures = append(p.Figures, signerInfo(m.SignerInfos[0], signer)...)
	default:
		if signer != nil {
			p.Figures = append(p.Figures, signatureFigures(signer.PublicKey, document, b.Signature.Value)...)
		}
	}
	return p
}

// signerInfo are the figures of a signature over signed attributes.
func signerInfo(si *cms.SignerInfo, signer *smx509.Certificate) []Figure {
	message := si.SignedAttributesDER()
	figures := []Figure{given("M", hex.EncodeToString(message))}
	figures[0].How = "DER(SET OF signedAttrs)，RFC 5652 §5.4"
	if v, ok := si.Attribute(cms.OIDMessageDigest); ok {
		var digest cryptobyte.String
		if in := cryptobyte.String(v); in.ReadASN1(&digest, der.OCTET_STRING) {
			figures = append(figures, given("messageDigest", hex.EncodeToString(digest)))
		}
	}
	if signer == nil {
		return figures
	}
	return append(figures, signatureFigures(signer.PublicKey, message, si.Signature)...)
}

// signatureFigures are those of a signature value over message; nil: the message is not at hand.
func signatureFigures(pub crypto.PublicKey, message, value []byte) []Figure {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return sm2Figures(pub, message, value)
	case *rsa.PublicKey:
		return rsaFigures(pub, message, value)
	}
	return nil
}

func hex32(n *big.Int) string { return fmt.Sprintf("%064x", n) }

// sm2Figures computes what GM/T 0003.2-2012 §7.1 does. Without the message e is what the signature demands, so that
// whoever has the document can hold his own e against it.
func sm2Figures(pub *ecdsa.PublicKey, message, value []byte) []Figure {
	curve := sm2.P256()
	n := curve.Params().N
	figures := []Figure{given("ID_A", identity), given("x_A", hex32(pub.X)), given("y_A", hex32(pub.Y))}
	za, err := sm2.CalculateZA(pub, []byte(identity))
	if err != nil {
		return append(figures, given("Z_A", err.Error()))
	}
	figures = append(figures, computed("Z_A", "SM3(ENTL_A ‖ ID_A ‖ a ‖ b ‖ x_G ‖ y_G ‖ x_A ‖ y_A)，ENTL_A = 0080", hex.EncodeToString(za)))
	r, s, ok := values(value)
	if !ok {
		return append(figures, given("r, s", "不是 SM2Signature 的 DER (not the DER of an SM2Signature)"))
	}
	t := new(big.Int).Add(r, s)
	t.Mod(t, n)
	x1, y1 := combine(curve, s, t, pub)
	figures = append(figures, given("r", hex32(r)), given("s", hex32(s)), computed("t", "(r + s) mod n", hex32(t)),
		computed("x_1", "(x_1, y_1) = [s]G + [t]P_A", hex32(x1)), computed("y_1", "", hex32(y1)))
	if message == nil {
		e := new(big.Int).Sub(r, x1)
		e.Mod(e, n)
		return append(figures, computed("e", "(r − x_1) mod n；须等于 SM3(Z_A ‖ 原文) mod n (must be SM3(Z_A ‖ document) mod n)", hex32(e)))
	}
	sum := audit.Sum(append(bytes.Clone(za), message...))
	e := new(big.Int).SetBytes(sum[:])
	demanded := new(big.Int).Add(e, x1)
	demanded.Mod(demanded, n)
	return append(figures, computed("e", "SM3(Z_A ‖ M)", hex32(e)), computed("R", "(e + x_1) mod n", hex32(demanded)), equal("R = r", "", hex32(demanded), hex32(r)))
}

// values reads r and s (GM/T 0009-2012 §7.3), each in [1, n-1].
func values(in []byte) (r, s *big.Int, ok bool) {
	text := cryptobyte.String(in)
	var seq cryptobyte.String
	r, s = new(big.Int), new(big.Int)
	n := sm2.P256().Params().N
	ok = text.ReadASN1(&seq, der.SEQUENCE) && text.Empty() && seq.ReadASN1Integer(r) && seq.ReadASN1Integer(s) && seq.Empty()
	return r, s, ok && r.Sign() > 0 && s.Sign() > 0 && r.Cmp(n) < 0 && s.Cmp(n) < 0
}

// combine is [s]G + [t]P, all of it public.
func combine(curve elliptic.Curve, s, t *big.Int, p *ecdsa.PublicKey) (x, y *big.Int) {
	sx, sy := curve.ScalarBaseMult(s.FillBytes(make([]byte, 32)))
	tx, ty := curve.ScalarMult(p.X, p.Y, t.FillBytes(make([]byte, 32)))
	return curve.Add(sx, sy, tx, ty)
}

// rsaFigures opens the signature with the public key: what stands there ends with the DigestInfo of what was signed.
func rsaFigures(pub *rsa.PublicKey, message, value []byte) []Figure {
	size := pub.Size()
	figures := []Figure{given("n", hex.EncodeToString(pub.N.Bytes())), given("e", fmt.Sprint(pub.E)), given("s", hex.EncodeToString(value))}
	opened := new(big.Int).Exp(new(big.Int).SetBytes(value), big.NewInt(int64(pub.E)), pub.N).FillBytes(make([]byte, size))
	figures = append(figures, computed("m", "s^e mod n = 00 01 FF … FF 00 ‖ DigestInfo", hex.EncodeToString(opened)))
	digest := opened[max(0, size-crypto.SHA256.Size()):]
	if message == nil {
		return append(figures, computed("H", "m 的末 32 字节；须等于 SHA-256(原文) (its last 32 bytes; must be SHA-256 of the document)", hex.EncodeToString(digest)))
	}
	h := crypto.SHA256.New()
	h.Write(message)
	sum := hex.EncodeToString(h.Sum(nil))
	return append(figures, computed("H", "SHA-256(M)", sum), equal("H = m 末 32 字节 (last 32 bytes of m)", "", sum, hex.EncodeToString(digest)))
}

func subject(c *smx509.Certificate) string {
	if c == nil {
		return "证据中没有 (not in the evidence)"
	}
	return c.Subject.String()
}

// tokenOf is the timestamp: what it says, that it stamps the signature value, and its own signature.
func tokenOf(t *tsa.Token, value []byte, certs []*smx509.Certificate) Part {
	s := StampOf(t)
	p := Part{ID: "token", Title: "时间戳 (timestamp token)", DER: Outline(t.DER), Figures: []Figure{
		given("genTime", s.GenTime), given("accuracy", s.Accuracy), given("serialNumber", s.Serial), given("policy", s.Policy), given("messageImprint", s.Algorithm+" "+s.Imprint),
	}}
	if s.Algorithm == "SM3" {
		sum := audit.Sum(value)
		p.Figures = append(p.Figures, computed("SM3(签名值 signature value)", "", sum.String()), equal("= messageImprint", "", sum.String(), s.Imprint))
	}
	info := cryptobyte.String(t.Message().Content)
	p.Figures = append(p.Figures, given("TSTInfo", hex.EncodeToString(info)))
	if len(t.Message().SignerInfos) == 1 {
		report, _ := t.Verify(t.Imprint, certs...)
		p.Figures = append(p.Figures, given("签发者 signer", subject(report.Signer)))
		p.Figures = append(p.Figures, signerInfo(t.Message().SignerInfos[0], report.Signer)...)
	}
	return p
}

// certificateOf is one certificate, and its issuer's signature over it where the issuer is at hand.
func certificateOf(i int, c *smx509.Certificate, certs []*smx509.Certificate) Part {
	sum := audit.Sum(c.Raw)
	p := Part{ID: fmt.Sprintf("certificate-%d", i+1), Title: "证书 (certificate) " + c.Subject.CommonName, Figures: []Figure{
		given("subject", c.Subject.String()), given("issuer", c.Issuer.String()), given("serial", pki.SerialHex(c.SerialNumber)),
		given("notBefore", c.NotBefore.UTC().Format(time.RFC3339)), given("notAfter", c.NotAfter.UTC().Format(time.RFC3339)),
		computed("SM3", "SM3(DER)", sum.String()),
	}}
	for _, issuer := range certs {
		if bytes.Equal(issuer.RawSubject, c.RawIssuer) && (len(c.AuthorityKeyId) == 0 || bytes.Equal(c.AuthorityKeyId, issuer.SubjectKeyId)) {
			p.Figures = append(p.Figures, given("签发者公钥 issuer's key", subject(issuer)), computed("M", "DER(TBSCertificate)", hex.EncodeToString(c.RawTBSCertificate)))
			p.Figures = append(p.Figures, signatureFigures(issuer.PublicKey, c.RawTBSCertificate, c.Signature)...)
			return p
		}
	}
	p.Figures = append(p.Figures, given("签发者 issuer", "不在证据中，为信任锚 (not in the evidence: a trust anchor)"))
	return p
}

// inclusionOf walks from the leaf to the root (RFC 9162 §2.1.3.2, with SM3).
func inclusionOf(b *evidence.Bundle) Part {
	j := b.Journal
	p := Part{ID: "inclusion", Title: "日志中的位置 (inclusion in the journal)", DER: Outline(j.Leaf)}
	node := audit.LeafHash(j.Leaf)
	p.Figures = append(p.Figures, given("序号 sequence", fmt.Sprint(j.Sequence)), given("树的大小 tree size", fmt.Sprint(j.TreeSize)),
		computed("h_0", "SM3(00 ‖ 条目 leaf)", node.String()))
	fn, sn := j.Sequence, j.TreeSize-1
	for i, raw := range j.Inclusion {
		if len(raw) != len(audit.Hash{}) {
			return p
		}
		other, how := audit.Hash(raw), ""
		if fn&1 == 1 || fn == sn {
			how = fmt.Sprintf("SM3(01 ‖ p_%d ‖ h_%d)", i+1, i)
			node = audit.NodeHash(other, node)
			for fn&1 == 0 && fn != 0 {
				fn, sn = fn>>1, sn>>1
			}
		} else {
			how = fmt.Sprintf("SM3(01 ‖ h_%d ‖ p_%d)", i, i+1)
			node = audit.NodeHash(node, other)
		}
		fn, sn = fn>>1, sn>>1
		p.Figures = append(p.Figures, given(fmt.Sprintf("p_%d", i+1), other.String()), computed(fmt.Sprintf("h_%d", i+1), how, node.String()))
	}
	if c, err := audit.ParseCheckpoint(j.Checkpoint, j.CheckpointSignature); err == nil {
		p.Figures = append(p.Figures, given("检查点的根 root of the checkpoint", c.Root.String()),
			equal(fmt.Sprintf("h_%d = 根 root", len(j.Inclusion)), "", node.String(), c.Root.String()))
	}
	return p
}

// checkpointOf is the log's signature over its checkpoint.
func checkpointOf(b *evidence.Bundle, logKey crypto.PublicKey) Part {
	p := Part{ID: "checkpoint", Title: "日志检查点 (checkpoint)", Figures: []Figure{
		given("文本 text", string(b.Journal.Checkpoint)), computed("M", "文本的字节 (bytes of the text)", hex.EncodeToString(b.Journal.Checkpoint)),
	}}
	if logKey == nil {
		return p
	}
	p.Figures = append(p.Figures, signatureFigures(logKey, b.Journal.Checkpoint, b.Journal.CheckpointSignature)...)
	return p
}

// The longest outline, in lines, and the longest value in a line, in bytes.
const (
	outlineLines = 400
	outlineValue = 48
)

var tagNames = map[der.Tag]string{
	der.BOOLEAN: "BOOLEAN", der.INTEGER: "INTEGER", der.BIT_STRING: "BIT STRING", der.OCTET_STRING: "OCTET STRING", der.NULL: "NULL",
	der.OBJECT_IDENTIFIER: "OBJECT IDENTIFIER", der.ENUM: "ENUMERATED", der.UTF8String: "UTF8String", der.SEQUENCE: "SEQUENCE", der.SET: "SET",
	der.PrintableString: "PrintableString", der.IA5String: "IA5String", der.UTCTime: "UTCTime", der.GeneralizedTime: "GeneralizedTime",
}

// Outline is the structure of DER, a line for each element: offset, length of the content, type, and what it says.
func Outline(in []byte) []string {
	var lines []string
	outline(in, 0, 0, &lines)
	return lines
}

func outline(in []byte, offset, depth int, lines *[]string) {
	s := cryptobyte.String(in)
	for !s.Empty() && len(*lines) < outlineLines {
		before := len(s)
		var whole, body cryptobyte.String
		var tag der.Tag
		copied := s
		if !copied.ReadAnyASN1Element(&whole, &tag) || !s.ReadAnyASN1(&body, &tag) {
			*lines = append(*lines, fmt.Sprintf("%6d: 不是 DER (not DER)", offset))
			return
		}
		name, known := tagNames[tag]
		if !known {
			name = fmt.Sprintf("[%d]", tag&0x1f)
			if tag&0xc0 == 0 {
				name = fmt.Sprintf("UNIVERSAL %d", tag&0x1f)
			}
		}
		line := fmt.Sprintf("%6d: %s%s, %d", offset, strings.Repeat("  ", depth), name, len(body))
		if tag&0x20 != 0 {
			*lines = append(*lines, line)
			outline(body, offset+len(whole)-len(body), depth+1, lines)
		} else {
			*lines = append(*lines, line+primitive(tag, body))
		}
		offset += before - len(s)
	}
}

// primitive is the value of an element that has no others in it.
func primitive(tag der.Tag, body cryptobyte.String) string {
	switch tag {
	case der.NULL:
		return ""
	case der.OBJECT_IDENTIFIER:
		var oid asn1.ObjectIdentifier
		var b cryptobyte.Builder
		b.AddASN1(tag, func(c *cryptobyte.Builder) { c.AddBytes(body) })
		if in := cryptobyte.String(b.BytesOrPanic()); in.ReadASN1ObjectIdentifier(&oid) {
			return " = " + oid.String()
		}
	case der.UTF8String, der.PrintableString, der.IA5String, der.UTCTime, der.GeneralizedTime:
		return " = " + Plain(strings.ToValidUTF8(string(body), "\uFFFD"))
	}
	if len(body) > outlineValue {
		return " = " + hex.EncodeToString(body[:outlineValue]) + "…"
	}
	return " = " + hex.EncodeToString(body)
}
