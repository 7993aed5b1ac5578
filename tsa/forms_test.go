package tsa_test

import (
	"bytes"
	legacy "crypto/sha1"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/hex"
	"math/big"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/pkcs7"
	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/tsa"
)

// A form is one of the ways to write an SM2 token that are met; zero fields are the default form's. Each is put together
// here with encoding/asn1, so that what is judged is the form and not our encoder.
type form struct {
	outer, content asn1.ObjectIdentifier
	version        int
	digest         plainAlgorithm
	signature      plainAlgorithm
	rich           bool // tsa, ordering and milliseconds in TSTInfo
	certID         func(u *unit) plainAttribute
	whole          func(t testing.TB, u *unit, info []byte) []byte // instead of all this
	issuedByUs     func(*tsa.Config)                               // nil: we do not write it

	ours, bouncyMapped, bouncy, openssl, gmsm bool // who takes it; bouncyMapped: told what 301.1 is
}

func withNULL(oid asn1.ObjectIdentifier) plainAlgorithm {
	return plainAlgorithm{oid, asn1.NullRawValue}
}

func issuerSerial(u *unit) plainIssuerSerial {
	return plainIssuerSerial{[]asn1.RawValue{raw(tlv(0xa4, u.cert.RawIssuer))}, u.cert.SerialNumber}
}

func essCertIDv2(hash plainAlgorithm, sum func(u *unit) []byte) func(u *unit) plainAttribute {
	return func(u *unit) plainAttribute {
		value := plainSigningCertificate{[]plainCertID{{hash, sum(u), issuerSerial(u)}}}
		return plainAttribute{cms.OIDSigningCertificateV2, []asn1.RawValue{raw(marshal(value))}}
	}
}

var (
	essSM3    = essCertIDv2(plainAlgorithm{OID: cms.OIDSM3}, func(u *unit) []byte { d := sm3.Sum(u.cert.Raw); return d[:] })
	essSHA256 = essCertIDv2(plainAlgorithm{}, func(u *unit) []byte { d := sha256.Sum256(u.cert.Raw); return d[:] })
)

// essSHA1 is ESSCertID of RFC 2634, with SHA-1.
func essSHA1(u *unit) plainAttribute {
	digest := legacy.Sum(u.cert.Raw)
	value := tlv(0x30, tlv(0x30, tlv(0x30, tlv(4, digest[:]), marshal(issuerSerial(u)))))
	return plainAttribute{cms.OIDSigningCertificate, []asn1.RawValue{raw(value)}}
}

// forms are the rows of the matrix of SM2 tokens. Verdicts: Bouncy Castle 1.72, OpenSSL 3.0's by pieces, gmsm 0.44.0's pkcs7.
func forms() map[string]form {
	gm, gmDigest := cms.OIDGMSignedData, asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 401, 2}
	return map[string]form{
		"501": {issuedByUs: func(*tsa.Config) {},
			ours: true, bouncyMapped: true, bouncy: true, openssl: true},
		"501 rich": {digest: withNULL(cms.OIDSM3), signature: withNULL(cms.OIDSM2WithSM3), rich: true, certID: essSHA256,
			ours: true, bouncyMapped: true, bouncy: true, openssl: true},
		"301.1": {signature: plainAlgorithm{OID: cms.OIDSM2Sign},
			ours: true, bouncyMapped: true, openssl: true, gmsm: true},
		"501 in GM": {outer: gm,
			ours: true, bouncyMapped: true, bouncy: true, openssl: true},
		"gm0010": {outer: gm, version: 1, signature: plainAlgorithm{OID: cms.OIDSM2Sign}, issuedByUs: func(c *tsa.Config) { c.Profile = cms.GM0010 },
			ours: true, bouncyMapped: true, openssl: true, gmsm: true},
		"gm0010-data": {outer: gm, content: cms.OIDGMData, version: 1, signature: plainAlgorithm{OID: cms.OIDSM2Sign},
			issuedByUs: func(c *tsa.Config) { c.Profile, c.ContentType = cms.GM0010, cms.OIDGMData },
			ours:       true, openssl: true, gmsm: true},
		"gm0010-data 401.2": {outer: gm, content: cms.OIDGMData, version: 1, digest: plainAlgorithm{OID: gmDigest}, signature: plainAlgorithm{OID: cms.OIDSM2Sign},
			ours: true, openssl: true},
		"gmsm pkcs7": {whole: gmsmToken,
			ours: true, bouncyMapped: true, openssl: true, gmsm: true},
		"ESSCertID v1": {certID: essSHA1,
			ours: true, bouncyMapped: true, bouncy: true, openssl: true},
		// one more, that nobody shall take: the attributes in another order than DER's
		"unsorted": {certID: func(u *unit) plainAttribute { a := essSM3(u); a.Type = nil; return a }},
	}
}

// gmsmToken is what gmsm's pkcs7 package makes, with what it has to be forced to.
func gmsmToken(t testing.TB, u *unit, info []byte) []byte {
	sd, err := pkcs7.NewSignedData(info)
	if err != nil {
		t.Fatal(err)
	}
	sd.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSM3)
	sd.GetSignedData().ContentInfo.ContentType, sd.GetSignedData().Version = cms.OIDTSTInfo, 3
	ess := essSM3(u)
	if err := sd.AddSignerChain(u.cert, u.key.key, []*smx509.Certificate{u.ca}, pkcs7.SignerInfoConfig{
		ExtraSignedAttributes: []pkcs7.Attribute{{Type: ess.Type, Value: ess.Values[0]}},
	}); err != nil {
		t.Fatal(err)
	}
	token, err := sd.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func (f form) token(t testing.TB, u *unit, req *tsa.Request) []byte {
	t.Helper()
	imprint, err := req.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	var query struct {
		Version int
		Imprint asn1.RawValue
		Nonce   *big.Int
		CertReq bool
	}
	if _, err := asn1.Unmarshal(imprint, &query); err != nil {
		t.Fatal(err)
	}
	fields := plainInfo{
		Version: 1, Policy: policy, Imprint: query.Imprint, Serial: big.NewInt(7), GenTime: raw([]byte("\x18\x0f20261121102030Z")),
		Accuracy: plainAccuracy{Seconds: 1}, Nonce: query.Nonce,
	}
	if f.rich {
		fields.GenTime, fields.Accuracy, fields.Ordering = raw([]byte("\x18\x1320261121102030.123Z")), plainAccuracy{Millis: 38}, true
		fields.TSA = raw(tlv(0xa0, tlv(0xa4, u.cert.RawSubject)))
	}
	info := marshal(fields)
	if f.whole != nil {
		return f.whole(t, u, info)
	}
	certID := f.certID
	if certID == nil {
		certID = essSM3
	}
	or := func(oid, otherwise asn1.ObjectIdentifier) asn1.ObjectIdentifier {
		if oid == nil {
			return otherwise
		}
		return oid
	}
	outer, content := or(f.outer, cms.OIDSignedData), or(f.content, cms.OIDTSTInfo)
	digest, signature, version := f.digest, f.signature, f.version
	digest.OID, signature.OID = or(digest.OID, cms.OIDSM3), or(signature.OID, cms.OIDSM2WithSM3)
	if version == 0 {
		version = 3
	}
	sum, ess := sm3.Sum(info), certID(u)
	unsorted := ess.Type == nil
	if unsorted {
		ess.Type = cms.OIDSigningCertificateV2
	}
	parts := [][]byte{
		marshal(ess),
		marshal(plainAttribute{cms.OIDMessageDigest, []asn1.RawValue{raw(tlv(4, sum[:]))}}),
		marshal(plainAttribute{cms.OIDContentType, []asn1.RawValue{raw(marshal(content))}}),
	}
	attributes := setOf(0x31, parts...)
	if unsorted {
		attributes = tlv(0x31, parts...)
	}
	value, err := u.key.SignMessage(t.Context(), attributes)
	if err != nil {
		t.Fatal(err)
	}
	return marshal(plainMessage{outer, plainSignedData{
		Version: version, Digests: []plainAlgorithm{digest}, Content: plainContent{content, info},
		Certificates: raw(setOf(0xa0, u.cert.Raw, u.ca.Raw)),
		Signers: []plainSigner{{
			1, plainSID{raw(u.cert.RawIssuer), u.cert.SerialNumber}, digest, raw(append([]byte{0xa0}, attributes[1:]...)), signature, value,
		}},
	}})
}

// TestForms: who takes which form of an SM2 token. The verdicts of others are facts about them; a change is worth knowing.
func TestForms(t *testing.T) {
	t.Parallel()
	u := newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key())
	u.cert = u.certificate(func(c *smx509.Certificate) { c.NotAfter = epoch.AddDate(19, 0, 0) }) // gmsm looks at today
	dir, req := t.TempDir(), request(data)
	req.Nonce = big.NewInt(77)
	cert := cmstest.Write(t, filepath.Join(dir, "tsu.pem"), cmstest.CertPEM(u.cert))
	public := cmstest.MustOpenSSL(t, "x509", "-in", cert, "-noout", "-pubkey")
	publicFile := cmstest.Write(t, filepath.Join(dir, "pub.pem"), []byte(public))
	query := cmstest.Write(t, filepath.Join(dir, "q.tsq"), encode(t, req))
	all := forms()
	args := []string{"tsts", query, cert}
	for name, f := range all {
		der := f.token(t, u, req)
		args = append(args, cmstest.Write(t, filepath.Join(dir, name+".tsr"), tlv(0x30, tlv(0x30, []byte{2, 1, 0}), der)))

		// ours
		token, err := tsa.ParseToken(der)
		if err == nil {
			_, err = token.VerifyData(data)
		}
		if err == nil {
			err = token.Answers(req)
		}
		if (err == nil) != f.ours {
			t.Errorf("%s: we say %v", name, err)
		}
		// OpenSSL
		if token != nil {
			if err := opensslPieces(t, token, publicFile); (err == "") != f.openssl {
				t.Errorf("%s: openssl by pieces says %s", name, err)
			}
		}
		// gmsm
		message, err := pkcs7.Parse(der)
		if err == nil {
			err = message.Verify()
		}
		if (err == nil) != f.gmsm {
			t.Errorf("%s: gmsm says %v", name, err)
		}
		// what we write is of this form
		if f.issuedByUs != nil {
			c := u.config()
			f.issuedByUs(&c)
			issued, err := newAuthority(t, c).Issue(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			ours, err := tsa.ParseToken(issued.DER)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := shape(ours), shape(token); got != want {
				t.Errorf("%s: we write %s, want %s", name, got, want)
			}
			if why := opensslPieces(t, ours, publicFile); why != "" {
				t.Errorf("%s: openssl by pieces says of ours %s", name, why)
			}
			if message, err := pkcs7.Parse(issued.DER); err != nil || (message.Verify() == nil) != f.gmsm {
				t.Errorf("%s: gmsm does not say of ours what it says of others: %v", name, err)
			}
		}
	}
	// Bouncy Castle, all at once
	verdicts := cmstest.MustBouncyCastle(t, args...)
	for name, f := range all {
		for way, want := range map[string]bool{"plain": f.bouncy, "mapped": f.bouncyMapped} {
			if got := strings.Contains(verdicts, name+".tsr "+way+" valid\n"); got != want {
				t.Errorf("%s: Bouncy Castle (%s) takes it: %v, want %v\n%s", name, way, got, want, verdicts)
			}
		}
	}
}

// shape names a token's identifiers.
func shape(t *tsa.Token) string {
	m := t.Message()
	si := m.SignerInfos[0]
	out := []string{m.OuterType.String(), m.ContentType.String(), si.DigestAlgorithm.OID.String(), hex.EncodeToString(si.DigestAlgorithm.Parameters),
		si.SignatureAlgorithm.OID.String(), hex.EncodeToString(si.SignatureAlgorithm.Parameters), string(rune('0' + m.Version))}
	for _, a := range si.SignedAttributes {
		out = append(out, a.Type.String())
	}
	return strings.Join(out, " ")
}

// opensslPieces has openssl check a token's signature over the attributes, and the digest of the content: openssl ts -verify
// and cms -verify (3.0) cannot be told the SM2 identity. The answer is why not, or empty.
func opensslPieces(t *testing.T, token *tsa.Token, publicFile string) string {
	t.Helper()
	dir, si := t.TempDir(), token.Message().SignerInfos[0]
	at := bytes.Index(token.DER, si.SignedAttributesDER()[1:])
	if at < 1 || token.DER[at-1] != 0xa0 {
		t.Fatal("the signed attributes are not in the token under [0]")
	}
	attributes := append([]byte{0x31}, token.DER[at:at+len(si.SignedAttributesDER())-1]...)
	out, err := cmstest.OpenSSL(t, "dgst", "-sm3", "-verify", publicFile, "-sigopt", "distid:1234567812345678",
		"-signature", cmstest.Write(t, filepath.Join(dir, "sig"), si.Signature), cmstest.Write(t, filepath.Join(dir, "attributes"), attributes))
	if err != nil {
		return out
	}
	digest := strings.Fields(cmstest.MustOpenSSL(t, "dgst", "-sm3", "-r", cmstest.Write(t, filepath.Join(dir, "info"), token.Message().Content)))[0]
	if value, ok := si.Attribute(cms.OIDMessageDigest); !ok || digest != hex.EncodeToString(value[2:]) {
		return "SM3 " + digest + ", messageDigest " + hex.EncodeToString(value)
	}
	return ""
}
