package cms_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
)

var shortRSAPublic = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}

// A forged message is built here field by field, without the code under test, so that each field can be wrong alone.
type forged struct {
	who               *person
	outer, eType      asn1.ObjectIdentifier
	content           []byte // nil: detached
	version, siVer    int64
	digests           [][]byte // AlgorithmIdentifiers
	digest, signature []byte   // AlgorithmIdentifiers of the SignerInfo
	ski               bool
	attributes        [][]byte // encoded; nil: none, the content is signed
	unsorted          bool
	unsigned          [][]byte
	certs             [][]byte
	signers           int
	sig               func([]byte) []byte
}

func oidDER(oid asn1.ObjectIdentifier) []byte {
	b, err := asn1.Marshal(oid)
	if err != nil {
		panic(err)
	}
	return b
}

func tlv(tag byte, parts ...[]byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(der.Tag(tag), func(b *cryptobyte.Builder) {
		for _, p := range parts {
			b.AddBytes(p)
		}
	})
	return b.BytesOrPanic()
}

func attribute(oid asn1.ObjectIdentifier, values ...[]byte) []byte {
	return tlv(0x30, oidDER(oid), tlv(0x31, values...))
}

func algorithm(oid asn1.ObjectIdentifier, parameters ...[]byte) []byte {
	return tlv(0x30, append([][]byte{oidDER(oid)}, parameters...)...)
}

func essCert(cert *smx509.Certificate, hash []byte, serial int64) []byte {
	var s cryptobyte.Builder
	if serial == 0 {
		s.AddASN1BigInt(cert.SerialNumber)
	} else {
		s.AddASN1Int64(serial)
	}
	return tlv(0x30, tlv(0x30, tlv(0x30, algorithm(cms.OIDSM3), tlv(4, hash),
		tlv(0x30, tlv(0x30, tlv(0xa4, cert.RawIssuer)), s.BytesOrPanic()))))
}

// genuine is a good message; tests spoil it.
func genuine() *forged {
	who := sm2Person()
	return &forged{
		who: who, outer: cms.OIDSignedData, eType: cms.OIDData, content: content, version: 1, siVer: 1, signers: 1,
		digests: [][]byte{algorithm(cms.OIDSM3)}, digest: algorithm(cms.OIDSM3), signature: algorithm(cms.OIDSM2WithSM3),
		attributes: [][]byte{
			attribute(cms.OIDContentType, oidDER(cms.OIDData)),
			attribute(cms.OIDMessageDigest, tlv(4, digestOf("sm2", content))),
			attribute(cms.OIDSigningCertificateV2, essCert(who.cert, digestOf("sm2", who.cert.Raw), 0)),
			attribute(cms.OIDAlgorithmProtection, protection(cms.OIDSM3, cms.OIDSM2WithSM3)),
		},
		certs: [][]byte{who.cert.Raw, who.ca.Raw},
	}
}

func protection(digest, signature asn1.ObjectIdentifier) []byte {
	return tlv(0x30, algorithm(digest), append([]byte{0xa1}, algorithm(signature)[1:]...))
}

func (f *forged) bytes(t testing.TB) []byte {
	t.Helper()
	sorted := func(e [][]byte) [][]byte {
		e = slices.Clone(e)
		slices.SortFunc(e, bytes.Compare)
		if f.unsorted {
			slices.Reverse(e)
		}
		return e
	}
	attributes := sorted(f.attributes)
	tbs := tlv(0x31, attributes...)
	if f.attributes == nil {
		tbs = f.content
		if tbs == nil {
			tbs = content
		}
	}
	sig, err := f.who.key.SignMessage(t.Context(), tbs)
	if err != nil {
		t.Fatal(err)
	}
	if f.sig != nil {
		sig = f.sig(sig)
	}
	var version, siVersion, serial cryptobyte.Builder
	version.AddASN1Int64(f.version)
	siVersion.AddASN1Int64(f.siVer)
	serial.AddASN1BigInt(f.who.cert.SerialNumber)
	sid := tlv(0x30, f.who.cert.RawIssuer, serial.BytesOrPanic())
	if f.ski {
		sid = tlv(0x80, f.who.cert.SubjectKeyId)
	}
	parts := [][]byte{siVersion.BytesOrPanic(), sid, f.digest}
	if f.attributes != nil {
		parts = append(parts, tlv(0xa0, attributes...))
	}
	parts = append(parts, f.signature, tlv(4, sig))
	if f.unsigned != nil {
		parts = append(parts, tlv(0xa1, sorted(f.unsigned)...))
	}
	signer := tlv(0x30, parts...)
	var content []byte
	if f.content != nil {
		content = tlv(0xa0, tlv(4, f.content))
	}
	sd := [][]byte{version.BytesOrPanic(), tlv(0x31, f.digests...), tlv(0x30, oidDER(f.eType), content)}
	if f.certs != nil {
		sd = append(sd, tlv(0xa0, sorted(f.certs)...))
	}
	sd = append(sd, tlv(0x31, slices.Repeat([][]byte{signer}, f.signers)...))
	return tlv(0x30, oidDER(f.outer), tlv(0xa0, tlv(0x30, sd...)))
}

func without(e [][]byte, i int) [][]byte { return slices.Delete(slices.Clone(e), i, i+1) }

// TestCertificatesInAnyOrder: they are unsigned, peers do not sort them, and nothing depends on their order.
func TestCertificatesInAnyOrder(t *testing.T) {
	t.Parallel()
	who := sm2Person()
	signed, err := cms.Sign(t.Context(), who.key, cms.Params{Content: content, Certificates: who.chain()})
	if err != nil {
		t.Fatal(err)
	}
	one, two := who.chain()[0], who.chain()[1]
	if bytes.Compare(one, two) > 0 {
		one, two = two, one
	}
	in := bytes.Replace(signed.Bytes(), slices.Concat(one, two), slices.Concat(two, one), 1)
	if bytes.Equal(in, signed.Bytes()) {
		t.Fatal("the certificates were not found in their order")
	}
	sd, err := cms.Parse(in)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(sd.Bytes(), in) {
		t.Error("it encodes to other bytes")
	}
	if report, err := sd.Verify(nil); err != nil {
		t.Errorf("Verify = %v: %v", err, report.Checks)
	}
}

// TestVerifyCatches changes one thing at a time and wants that very check to fail.
func TestVerifyCatches(t *testing.T) {
	t.Parallel()
	sneaky := tlv(0x31, attribute(cms.OIDContentType, oidDER(cms.OIDData)), attribute(cms.OIDMessageDigest, tlv(4, make([]byte, 32))))
	other := newPerson(cmstest.NewSM2Key(), cmstest.NewSM2Key())
	for name, row := range map[string]struct {
		spoil func(*forged)
		check string // "" for a good message
		want  error
	}{
		"nothing":         {func(*forged) {}, "", nil},
		"301.1 is read":   {func(f *forged) { f.signature = algorithm(cms.OIDSM2Sign); f.attributes = without(f.attributes, 3) }, "", nil},
		"NULL is nothing": {func(f *forged) { f.signature = algorithm(cms.OIDSM2WithSM3, []byte{5, 0}) }, "", nil},
		"GM outer": {func(f *forged) {
			f.outer, f.eType = cms.OIDGMSignedData, cms.OIDGMData
			f.attributes[0] = attribute(cms.OIDContentType, oidDER(cms.OIDGMData))
		}, "", nil},
		"key identifier":          {func(f *forged) { f.ski, f.siVer, f.version = true, 3, 3 }, "", nil},
		"without protection":      {func(f *forged) { f.attributes = without(f.attributes, 3) }, "", nil},
		"without attributes":      {func(f *forged) { f.attributes = nil }, "", nil},
		"same certificate twice":  {func(f *forged) { f.certs = append(f.certs, f.who.cert.Raw) }, "", nil},
		"two signers":             {func(f *forged) { f.signers = 2 }, cms.CheckSigner, cms.ErrSigners},
		"no signer":               {func(f *forged) { f.signers = 0 }, cms.CheckSigner, cms.ErrSigners},
		"no certificate":          {func(f *forged) { f.certs = nil }, cms.CheckSignerCertificate, cms.ErrSignerCertificate},
		"other's certificate":     {func(f *forged) { f.certs = [][]byte{f.who.ca.Raw} }, cms.CheckSignerCertificate, cms.ErrSignerCertificate},
		"digest algorithm":        {func(f *forged) { f.digest = algorithm(cms.OIDSHA256); f.digests = [][]byte{f.digest} }, cms.CheckAlgorithms, cms.ErrUnsupported},
		"digest with parameters":  {func(f *forged) { f.digest = algorithm(cms.OIDSM3, tlv(4, nil)) }, cms.CheckAlgorithms, cms.ErrUnsupported},
		"digest not listed":       {func(f *forged) { f.digests = nil }, cms.CheckAlgorithms, cms.ErrMalformed},
		"signature algorithm":     {func(f *forged) { f.signature = algorithm(cms.OIDSHA256WithRSA) }, cms.CheckAlgorithms, cms.ErrUnsupported},
		"signature parameters":    {func(f *forged) { f.signature = algorithm(cms.OIDSM2WithSM3, tlv(2, []byte{1})) }, cms.CheckAlgorithms, cms.ErrUnsupported},
		"content":                 {func(f *forged) { f.content = []byte("other") }, cms.CheckContent, cms.ErrContentMismatch},
		"no contentType":          {func(f *forged) { f.attributes = without(f.attributes, 0) }, cms.CheckContentType, cms.ErrAttributes},
		"contentType":             {func(f *forged) { f.attributes[0] = attribute(cms.OIDContentType, oidDER(cms.OIDTSTInfo)) }, cms.CheckContentType, cms.ErrContentType},
		"eContentType":            {func(f *forged) { f.eType, f.version = cms.OIDTSTInfo, 3 }, cms.CheckContentType, cms.ErrContentType},
		"contentType not an OID":  {func(f *forged) { f.attributes[0] = attribute(cms.OIDContentType, []byte{5, 0}) }, cms.CheckContentType, cms.ErrMalformed},
		"no messageDigest":        {func(f *forged) { f.attributes = without(f.attributes, 1) }, cms.CheckMessageDigest, cms.ErrAttributes},
		"messageDigest":           {func(f *forged) { f.attributes[1] = attribute(cms.OIDMessageDigest, tlv(4, make([]byte, 32))) }, cms.CheckMessageDigest, cms.ErrMessageDigest},
		"messageDigest no string": {func(f *forged) { f.attributes[1] = attribute(cms.OIDMessageDigest, []byte{5, 0}) }, cms.CheckMessageDigest, cms.ErrMalformed},
		"messageDigest two values": {func(f *forged) {
			f.attributes[1] = attribute(cms.OIDMessageDigest, tlv(4, make([]byte, 32)), tlv(4, digestOf("sm2", content)))
		}, cms.CheckSignedAttributes, cms.ErrAttributes},
		"messageDigest twice": {func(f *forged) {
			f.attributes = append(f.attributes, attribute(cms.OIDMessageDigest, tlv(4, make([]byte, 32))))
		}, cms.CheckSignedAttributes, cms.ErrAttributes},
		"unknown attribute twice": {func(f *forged) {
			f.attributes = append(f.attributes, attribute(asn1.ObjectIdentifier{1, 2, 3}, []byte{5, 0}), attribute(asn1.ObjectIdentifier{1, 2, 3}, tlv(4)))
		}, cms.CheckSignedAttributes, cms.ErrAttributes},
		"certHash": {func(f *forged) {
			f.attributes[2] = attribute(cms.OIDSigningCertificateV2, essCert(f.who.cert, digestOf("sm2", f.who.ca.Raw), 0))
		}, cms.CheckSigningCertificate, cms.ErrSigningCertificate},
		"issuerSerial's serial": {func(f *forged) {
			f.attributes[2] = attribute(cms.OIDSigningCertificateV2, essCert(f.who.cert, digestOf("sm2", f.who.cert.Raw), 5))
		}, cms.CheckSigningCertificate, cms.ErrSigningCertificate},
		"signingCertificate hash": {func(f *forged) {
			f.attributes[2] = attribute(cms.OIDSigningCertificateV2, tlv(0x30, tlv(0x30, tlv(0x30, algorithm(cms.OIDSHA1), tlv(4, make([]byte, 20))))))
		}, cms.CheckSigningCertificate, cms.ErrUnsupported},
		"signingCertificate v1": {func(f *forged) {
			f.attributes[2] = attribute(cms.OIDSigningCertificate, tlv(0x30, tlv(0x30, tlv(0x30, tlv(4, make([]byte, 20))))))
		}, cms.CheckSigningCertificate, cms.ErrSigningCertificate},
		"signingCertificate empty": {func(f *forged) { f.attributes[2] = attribute(cms.OIDSigningCertificateV2, tlv(0x30, tlv(0x30))) }, cms.CheckSigningCertificate, cms.ErrMalformed},
		"protected digest": {func(f *forged) {
			f.attributes[3] = attribute(cms.OIDAlgorithmProtection, protection(cms.OIDSHA256, cms.OIDSM2WithSM3))
		}, cms.CheckAlgorithmProtection, cms.ErrAlgorithmProtection},
		"protected signature":  {func(f *forged) { f.signature = algorithm(cms.OIDSM2Sign) }, cms.CheckAlgorithmProtection, cms.ErrAlgorithmProtection},
		"protection broken":    {func(f *forged) { f.attributes[3] = attribute(cms.OIDAlgorithmProtection, []byte{5, 0}) }, cms.CheckAlgorithmProtection, cms.ErrMalformed},
		"signature bit":        {func(f *forged) { f.sig = func(s []byte) []byte { s[len(s)-1] ^= 1; return s } }, cms.CheckSignature, cms.ErrBadSignature},
		"signature not DER":    {func(f *forged) { f.sig = func(s []byte) []byte { return append(s, 0) } }, cms.CheckSignature, cms.ErrBadSignature},
		"signature by another": {func(f *forged) { f.who = &person{other.key, f.who.cert, f.who.ca} }, cms.CheckSignature, cms.ErrBadSignature},
		"signature by empty identity": {func(f *forged) {
			tbs := f.attributes
			f.sig = func([]byte) []byte {
				s := slices.Clone(tbs)
				slices.SortFunc(s, bytes.Compare)
				sig, err := f.who.key.key.Sign(rand.Reader, tlv(0x31, s...), sm2.NewSM2SignerOption(true, []byte("another identity")))
				if err != nil {
					panic(err)
				}
				return sig
			}
		}, cms.CheckSignature, cms.ErrBadSignature},
		"content as attributes":       {func(f *forged) { f.content, f.attributes = sneaky, nil }, cms.CheckContent, cms.ErrContentMismatch},
		"TSTInfo without attributes":  {func(f *forged) { f.eType, f.version, f.attributes = cms.OIDTSTInfo, 3, nil }, cms.CheckSignedAttributes, cms.ErrAttributes},
		"bad without attributes":      {func(f *forged) { f.attributes, f.sig = nil, func(s []byte) []byte { s[len(s)-1] ^= 1; return s } }, cms.CheckSignature, cms.ErrBadSignature},
		"detached without attributes": {func(f *forged) { f.attributes, f.content = nil, nil }, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := genuine()
			row.spoil(f)
			sd, err := cms.Parse(f.bytes(t))
			if err != nil {
				t.Fatal(err)
			}
			report, err := sd.Verify(content)
			if row.check == "" {
				if err != nil {
					t.Fatalf("Verify = %v, want nil: %v", err, report.Checks)
				}
				return
			}
			var failed *cms.CheckError
			if !errors.As(err, &failed) || !errors.Is(err, row.want) {
				t.Fatalf("Verify = %v, want %v by %s", err, row.want, row.check)
			}
			if report.Result(row.check) != cms.Failed || failed.ID != row.check {
				t.Errorf("first failure %s, want %s: %v", failed.ID, row.check, report.Checks)
			}
		})
	}
}

// TestAttributesAsContent is the attack that LooksLikeAttributes is for: the signed attributes of a genuine message are
// passed off as the content of a message without attributes. The signature does verify.
func TestAttributesAsContent(t *testing.T) {
	t.Parallel()
	f := genuine()
	attributes := slices.Clone(f.attributes)
	slices.SortFunc(attributes, bytes.Compare)
	f.content, f.attributes = tlv(0x31, attributes...), nil
	sd, err := cms.Parse(f.bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	report, err := sd.Verify(nil)
	if !errors.Is(err, cms.ErrAmbiguousContent) || report.Result(cms.CheckSignature) != cms.Passed {
		t.Errorf("Verify = %v, signature %s", err, report.Result(cms.CheckSignature))
	}
}

func TestLooksLikeAttributes(t *testing.T) {
	t.Parallel()
	one := attribute(cms.OIDContentType, oidDER(cms.OIDData))
	two := attribute(cms.OIDMessageDigest, tlv(4, make([]byte, 32)))
	for name, row := range map[string]struct {
		in   []byte
		want bool
	}{
		"set":           {tlv(0x31, one, two), true},
		"unsorted":      {tlv(0x31, two, one), true},
		"tagged":        {tlv(0xa0, one), true},
		"without value": {tlv(0x31, attribute(cms.OIDData)), true},
		"sequence":      {tlv(0x30, one), false},
		"empty set":     {tlv(0x31), false},
		"trailing":      {append(tlv(0x31, one), 0), false},
		"not attribute": {tlv(0x31, one, tlv(4, nil)), false},
		"text":          {content, false},
		"nothing":       {nil, false},
	} {
		if got := cms.LooksLikeAttributes(row.in); got != row.want {
			t.Errorf("%s: LooksLikeAttributes = %v, want %v", name, got, row.want)
		}
	}
}

func TestVerifyWithoutContent(t *testing.T) {
	t.Parallel()
	f := genuine()
	f.content = nil
	sd, err := cms.Parse(f.bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	report, err := sd.Verify(nil)
	if !errors.Is(err, cms.ErrNoContent) || report.Result(cms.CheckMessageDigest) != cms.NotChecked || report.Result(cms.CheckSignature) != cms.Passed {
		t.Errorf("Verify(nil) = %v: %v", err, report.Checks)
	}
	f.attributes = nil
	if sd, err = cms.Parse(f.bytes(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := sd.VerifyDigest(digestOf("sm2", content)); !errors.Is(err, cms.ErrAttributes) {
		t.Errorf("VerifyDigest without attributes = %v, want %v", err, cms.ErrAttributes)
	}
}

func TestVerifyCertificateFromOutside(t *testing.T) {
	t.Parallel()
	f := genuine()
	f.certs = nil
	sd, err := cms.Parse(f.bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sd.Verify(nil, nil, f.who.ca, f.who.cert); err != nil {
		t.Errorf("Verify = %v", err)
	}
}

// TestVerifyRenewedCertificate: two certificates of one key; the signing-certificate attribute tells which was used, and
// without it nobody can.
func TestVerifyRenewedCertificate(t *testing.T) {
	t.Parallel()
	f := genuine()
	renewed := cmstest.Issue(&smx509.Certificate{
		SerialNumber: big.NewInt(77), Subject: pkix.Name{CommonName: "张医生"}, SubjectKeyId: f.who.cert.SubjectKeyId,
		NotBefore: epoch, NotAfter: epoch.AddDate(5, 0, 0), KeyUsage: smx509.KeyUsageDigitalSignature,
	}, nil, f.who.key.Public(), f.who.key.key)
	f.ski, f.siVer, f.version = true, 3, 3
	f.certs = append(f.certs, renewed.Raw)
	sd, err := cms.Parse(f.bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	report, err := sd.Verify(nil)
	if err != nil || !report.Signer.Equal(f.who.cert) {
		t.Errorf("Verify = %v, %v", report.Signer, err)
	}
	f.attributes = without(f.attributes, 2)
	if sd, err = cms.Parse(f.bytes(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := sd.Verify(nil); !errors.Is(err, cms.ErrSignerCertificate) {
		t.Errorf("Verify = %v, want %v", err, cms.ErrSignerCertificate)
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	good := genuine().bytes(t)
	if _, err := cms.Parse(good); err != nil {
		t.Fatal(err)
	}
	spoiled := func(change func(*forged)) []byte {
		f := genuine()
		change(f)
		return f.bytes(t)
	}
	indefinite := append([]byte{0x30, 0x80}, good[4:]...)
	indefinite = append(indefinite, 0, 0)
	longLength := append([]byte{0x30, 0x83, 0}, good[2:]...)
	if good[1] != 0x82 {
		t.Fatalf("length of the message starts with %#x, the rows above assume 0x82", good[1])
	}
	for name, row := range map[string]struct {
		in   []byte
		want error
	}{
		"nothing":              {nil, cms.ErrMalformed},
		"garbage":              {[]byte("garbage"), cms.ErrMalformed},
		"trailing byte":        {append(slices.Clone(good), 0), cms.ErrMalformed},
		"truncated":            {good[:len(good)-1], cms.ErrMalformed},
		"indefinite length":    {indefinite, cms.ErrMalformed},
		"long length":          {longLength, cms.ErrMalformed},
		"constructed string":   {bytes.Replace(good, tlv(0xa0, tlv(4, content)), tlv(0xa0, append([]byte{0x24}, tlv(4, content)[1:]...)), 1), cms.ErrMalformed},
		"unsorted":             {spoiled(func(f *forged) { f.unsorted = true }), cms.ErrMalformed},
		"unsorted values":      {spoiled(func(f *forged) { f.unsigned = [][]byte{attribute(cms.OIDData, tlv(4, []byte{2}), tlv(4, []byte{1}))} }), cms.ErrMalformed},
		"attributes empty":     {spoiled(func(f *forged) { f.attributes = [][]byte{} }), cms.ErrMalformed},
		"unsigned empty":       {spoiled(func(f *forged) { f.unsigned = [][]byte{} }), cms.ErrMalformed},
		"attribute no value":   {spoiled(func(f *forged) { f.attributes[0] = attribute(cms.OIDContentType) }), cms.ErrMalformed},
		"certificates empty":   {spoiled(func(f *forged) { f.certs = [][]byte{} }), cms.ErrMalformed},
		"certificate broken":   {spoiled(func(f *forged) { f.certs = [][]byte{tlv(0x30)} }), cms.ErrMalformed},
		"other certificate":    {spoiled(func(f *forged) { f.certs = [][]byte{tlv(0xa1)} }), cms.ErrUnsupported},
		"version 0":            {spoiled(func(f *forged) { f.version = 0 }), cms.ErrMalformed},
		"version 3 of data":    {spoiled(func(f *forged) { f.version = 3 }), cms.ErrMalformed},
		"version 1 of TSTInfo": {spoiled(func(f *forged) { f.eType = cms.OIDTSTInfo }), cms.ErrMalformed},
		"signer version":       {spoiled(func(f *forged) { f.siVer = 3 }), cms.ErrMalformed},
		"key id version":       {spoiled(func(f *forged) { f.ski = true }), cms.ErrMalformed},
		"enveloped":            {spoiled(func(f *forged) { f.outer = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3} }), cms.ErrUnsupported},
		"too many signers":     {spoiled(func(f *forged) { f.signers = 65 }), cms.ErrMalformed},
		"deep":                 {deep(200), cms.ErrMalformed},
	} {
		if _, err := cms.Parse(row.in); !errors.Is(err, row.want) {
			t.Errorf("%s: Parse = %v, want %v", name, err, row.want)
		}
	}
}

func deep(n int) []byte {
	in := []byte{}
	for range n {
		in = tlv(0x30, in)
	}
	return in
}

// TestEveryByteMatters flips each bit of a message: none may verify with what the signer signed unless the change is in
// the parts that no signature covers, the CA's certificate.
func TestEveryByteMatters(t *testing.T) {
	t.Parallel()
	f := genuine()
	f.certs = [][]byte{f.who.cert.Raw}
	good := f.bytes(t)
	for i := range good {
		for _, mask := range []byte{1, 0x80} {
			bad := slices.Clone(good)
			bad[i] ^= mask
			sd, err := cms.Parse(bad)
			if err != nil {
				continue
			}
			if _, err := sd.Verify(content); err == nil {
				t.Fatalf("byte %d of %d changed by %#x: still verifies", i, len(good), mask)
			}
		}
	}
}

func TestUnsignedAttributes(t *testing.T) {
	t.Parallel()
	who := sm2Person()
	signed, err := cms.Sign(t.Context(), who.key, cms.Params{Content: content, Certificates: who.chain()})
	if err != nil {
		t.Fatal(err)
	}
	token := tlv(0x30, []byte{5, 0}) // any DER will do here
	for _, a := range []cms.Attribute{
		{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{token}},
		{Type: asn1.ObjectIdentifier{1, 2}, Values: [][]byte{{5, 0}}},
	} {
		if err := signed.AddUnsignedAttribute(a); err != nil {
			t.Fatal(err)
		}
	}
	if err := signed.AddUnsignedAttribute(cms.Attribute{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{{0x30, 0x80}}}); !errors.Is(err, cms.ErrMalformed) {
		t.Errorf("AddUnsignedAttribute(not DER) = %v", err)
	}
	sd, err := cms.Parse(signed.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sd.Verify(nil); err != nil {
		t.Error(err)
	}
	if tokens := sd.SignerInfos[0].TimeStampTokens(); len(tokens) != 1 || !bytes.Equal(tokens[0], token) {
		t.Errorf("tokens = %x", tokens)
	}
	// one more, added to the parsed message
	if err := sd.SignerInfos[0].AddUnsignedAttribute(cms.Attribute{Type: cms.OIDSignatureTimeStamp, Values: [][]byte{token}}); err != nil {
		t.Fatal(err)
	}
	if sd, err = cms.Parse(sd.Bytes()); err != nil || len(sd.SignerInfos[0].TimeStampTokens()) != 2 {
		t.Errorf("after a second token: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	good := genuine()
	f.Add(good.bytes(f))
	good.unsigned = [][]byte{attribute(cms.OIDSignatureTimeStamp, []byte{5, 0})}
	good.ski, good.siVer, good.version = true, 3, 3
	f.Add(good.bytes(f))
	good = genuine()
	good.attributes, good.content, good.certs, good.signers = nil, nil, nil, 2
	f.Add(good.bytes(f))
	for _, name := range recordings(f) {
		f.Add(cmstest.Read(f, name))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		cms.LooksLikeAttributes(in)
		sd, err := cms.Parse(in)
		if err != nil {
			return
		}
		if out := sd.Bytes(); !bytes.Equal(out, in) {
			t.Errorf("Bytes() = %x, want %x", out, in)
		}
		report, err := sd.Verify(nil)
		if (err == nil) != (report.Err() == nil) {
			t.Errorf("Verify = %v, report says %v", err, report.Err())
		}
	})
}
