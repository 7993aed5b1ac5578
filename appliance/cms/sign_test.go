package cms_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"slices"
	"testing"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
)

var content = []byte("入院记录：患者无发热。\r\n")

func digestOf(name string, data []byte) []byte {
	if name == "rsa" {
		d := sha256.Sum256(data)
		return d[:]
	}
	d := sm3.Sum(data)
	return d[:]
}

func TestSignVerify(t *testing.T) {
	t.Parallel()
	ours := cms.Attribute{Type: asn1.ObjectIdentifier{1, 2, 3, 4}, Values: [][]byte{{0x0c, 1, 'b'}, {0x0c, 1, 'a'}}}
	for name, who := range people {
		for variant, p := range map[string]cms.Params{
			"attached":   {Content: content},
			"empty":      {Content: []byte{}},
			"detached":   {Content: content, Detached: true},
			"digest":     {Digest: digestOf(name, content), Detached: true},
			"protection": {Content: content, AlgorithmProtection: true},
			"extra":      {Content: content, SignedAttributes: []cms.Attribute{ours}},
			"TSTInfo":    {Content: content, ContentType: cms.OIDTSTInfo},
			"gm0010":     {Content: content, Profile: cms.GM0010, AlgorithmProtection: true},
		} {
			if name == "rsa" && p.Profile == cms.GM0010 {
				continue
			}
			t.Run(name+"/"+variant, func(t *testing.T) {
				t.Parallel()
				who := who()
				p.Certificates = who.chain()
				signed, err := cms.Sign(t.Context(), who.key, p)
				if err != nil {
					t.Fatal(err)
				}
				encoded := signed.Bytes()
				sd, err := cms.Parse(encoded)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(sd.Bytes(), encoded) {
					t.Errorf("Bytes() = %x, want %x", sd.Bytes(), encoded)
				}
				si := sd.SignerInfos[0]
				if !bytes.Equal(si.SignedAttributesDER(), signed.SignedAttributesDER) || !bytes.Equal(si.Signature, signed.SignatureValue) {
					t.Error("what was signed is not what the message carries")
				}
				given := content
				if variant == "empty" {
					given = []byte{}
				}
				for _, c := range [][]byte{given, nil} {
					if c == nil && sd.Content == nil {
						continue
					}
					report, err := sd.Verify(c)
					if err != nil {
						t.Errorf("Verify = %v, %v", err, report.Checks)
					}
					if !bytes.Equal(report.Signer.Raw, who.cert.Raw) {
						t.Errorf("signer = %v, want %v", report.Signer.Subject, who.cert.Subject)
					}
					want := cms.NotPresent
					if p.AlgorithmProtection {
						want = cms.Passed
					}
					if got := report.Result(cms.CheckAlgorithmProtection); got != want {
						t.Errorf("algorithm protection %s, want %s", got, want)
					}
				}
				if report, err := sd.VerifyDigest(digestOf(name, given)); err != nil {
					t.Errorf("VerifyDigest = %v, %v", err, report.Checks)
				}
				if _, err := sd.VerifyDigest(digestOf(name, []byte("other"))); !errors.Is(err, cms.ErrMessageDigest) && !errors.Is(err, cms.ErrContentMismatch) {
					t.Errorf("VerifyDigest(other) = %v", err)
				}
				if _, err := sd.Verify([]byte("other")); !errors.Is(err, cms.ErrMessageDigest) && !errors.Is(err, cms.ErrContentMismatch) {
					t.Errorf("Verify(other) = %v", err)
				}
				if _, ok := si.Attribute(cms.OIDSigningTime); ok {
					t.Error("there is a signingTime")
				}
			})
		}
	}
}

// TestLengths: every form of DER's length octets, and OIDs with arcs of every length, are read back as they were meant.
func TestLengths(t *testing.T) {
	t.Parallel()
	who := sm2Person()
	template, err := cms.NewTemplate(who.key, who.chain(), cms.RFC5652)
	if err != nil {
		t.Fatal(err)
	}
	oids := []asn1.ObjectIdentifier{
		cms.OIDTSTInfo, {0, 39}, {2, 47}, {2, 48}, {2, 999, 127, 128, 16383, 16384, 1<<21 - 1, 1 << 21, 1<<28 - 1, 1 << 28, 1<<31 - 1},
	}
	for i, n := range []int{0, 1, 0x7f, 0x80, 0xff, 0x100, 0xffff, 0x10000, 0xffffff, 0x1000000} {
		p := cms.Params{Content: bytes.Repeat([]byte{0x5a}, n), ContentType: oids[i%len(oids)], OmitCertificates: i%2 == 1}
		for round := range 3 { // the second time with the attributes of the first
			p.Content, p.AlgorithmProtection = append([]byte{}, p.Content...), round == 2
			if n > 0 {
				p.Content[n-1]++
			}
			signed, err := template.Sign(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			var whole struct {
				Type asn1.ObjectIdentifier
				Data struct {
					Version int
					Digests asn1.RawValue
					Content struct {
						Type    asn1.ObjectIdentifier
						Content []byte `asn1:"explicit,tag:0"`
					}
					Certificates asn1.RawValue `asn1:"optional,tag:0"`
					Signers      asn1.RawValue
				} `asn1:"explicit,tag:0"`
			}
			out := signed.Bytes()
			if rest, err := asn1.Unmarshal(out, &whole); err != nil || len(rest) > 0 {
				t.Fatalf("%d bytes: %v, %d bytes left", n, err, len(rest))
			}
			if !whole.Data.Content.Type.Equal(p.ContentType) || !bytes.Equal(whole.Data.Content.Content, p.Content) {
				t.Errorf("%d bytes: another content, or its type %v is not %v", n, whole.Data.Content.Type, p.ContentType)
			}
			if after := signed.Append([]byte("before")); string(after) != "before"+string(out) || signed.Len() != len(out) {
				t.Errorf("%d bytes: Append and Len differ from Bytes", n)
			}
			sd, err := cms.Parse(out)
			if err != nil {
				t.Fatalf("%d bytes: %v", n, err)
			}
			report, err := sd.Verify(p.Content, who.cert)
			if err != nil || (report.Result(cms.CheckAlgorithmProtection) == cms.Passed) != p.AlgorithmProtection {
				t.Errorf("%d bytes, protection %v: %v: %v", n, p.AlgorithmProtection, err, report.Checks)
			}
		}
	}
}

func TestSignedAttributesAreSorted(t *testing.T) {
	t.Parallel()
	who := sm2Person()
	p := cms.Params{Content: content, Certificates: who.chain(), AlgorithmProtection: true}
	for i := range 6 { // lengths and identifiers that sort neither way by themselves
		p.SignedAttributes = append(p.SignedAttributes, cms.Attribute{
			Type:   asn1.ObjectIdentifier{1, 2, 3, 9 - i},
			Values: [][]byte{append([]byte{4, byte(17 * (i % 3))}, make([]byte, 17*(i%3))...)},
		})
	}
	signed, err := cms.Sign(t.Context(), who.key, p)
	if err != nil {
		t.Fatal(err)
	}
	var set asn1.RawValue
	if rest, err := asn1.Unmarshal(signed.SignedAttributesDER, &set); err != nil || len(rest) > 0 || set.Tag != asn1.TagSet {
		t.Fatalf("signed attributes are not one SET: %v, tag %d", err, set.Tag)
	}
	var elements [][]byte
	for rest := set.Bytes; len(rest) > 0; {
		var e asn1.RawValue
		if rest, err = asn1.Unmarshal(rest, &e); err != nil {
			t.Fatal(err)
		}
		elements = append(elements, e.FullBytes)
	}
	if len(elements) != 10 || !slices.IsSortedFunc(elements, bytes.Compare) {
		t.Errorf("%d attributes, sorted: %v", len(elements), slices.IsSortedFunc(elements, bytes.Compare))
	}
}

func TestProfileIdentifiers(t *testing.T) {
	t.Parallel()
	who := sm2Person()
	for _, row := range []struct {
		profile         cms.Profile
		outer, sig, typ asn1.ObjectIdentifier
	}{
		{cms.RFC5652, cms.OIDSignedData, cms.OIDSM2WithSM3, cms.OIDData},
		{cms.GM0010, cms.OIDGMSignedData, cms.OIDSM2Sign, cms.OIDGMData},
	} {
		signed, err := cms.Sign(t.Context(), who.key, cms.Params{Content: content, Certificates: who.chain(), Profile: row.profile})
		if err != nil {
			t.Fatal(err)
		}
		sd, err := cms.Parse(signed.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		si := sd.SignerInfos[0]
		if !sd.OuterType.Equal(row.outer) || !sd.ContentType.Equal(row.typ) || sd.Version != 1 ||
			!si.SignatureAlgorithm.OID.Equal(row.sig) || !si.DigestAlgorithm.OID.Equal(cms.OIDSM3) {
			t.Errorf("%v: outer %v, content %v, version %d, signature %v, digest %v", row.profile,
				sd.OuterType, sd.ContentType, sd.Version, si.SignatureAlgorithm.OID, si.DigestAlgorithm.OID)
		}
	}
}

// TestSigningCertificateHash: RFC 5035's DEFAULT sha256 must be left out, SM3 must be named.
func TestSigningCertificateHash(t *testing.T) {
	t.Parallel()
	for name, who := range people {
		who := who()
		signed, err := cms.Sign(t.Context(), who.key, cms.Params{Content: content, Certificates: who.chain()})
		if err != nil {
			t.Fatal(err)
		}
		sd, _ := cms.Parse(signed.Bytes())
		value, ok := sd.SignerInfos[0].Attribute(cms.OIDSigningCertificateV2)
		if !ok {
			t.Fatal("no signingCertificateV2")
		}
		algorithm, _ := asn1.Marshal(map[string]asn1.ObjectIdentifier{"sm2": cms.OIDSM3, "rsa": cms.OIDSHA256}[name])
		if got, want := bytes.Contains(value, algorithm), name == "sm2"; got != want {
			t.Errorf("%s: hashAlgorithm written: %v, want %v", name, got, want)
		}
		if !bytes.Contains(value, append([]byte{4, 32}, digestOf(name, who.cert.Raw)...)) {
			t.Errorf("%s: certHash is not the certificate's digest", name)
		}
	}
}

// brokenSigner answers what a faulty cipher machine may.
type brokenSigner struct {
	cms.Signer
	answer []byte
	err    error
}

func (s brokenSigner) SignMessage(context.Context, []byte) ([]byte, error) { return s.answer, s.err }

func TestSignRefuses(t *testing.T) {
	t.Parallel()
	who, other := sm2Person(), cmstest.NewSM2Key()
	errDevice := errors.New("CKR_DEVICE_REMOVED")
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	attr := func(oid asn1.ObjectIdentifier, values ...[]byte) []cms.Attribute {
		return []cms.Attribute{{Type: oid, Values: values}}
	}
	null, oid := []byte{5, 0}, asn1.ObjectIdentifier{1, 2, 3}
	for name, row := range map[string]struct {
		signer cms.Signer
		p      cms.Params
		want   error // nil: any
	}{
		"no content":            {p: cms.Params{}},
		"content and digest":    {p: cms.Params{Content: content, Digest: digestOf("sm2", content), Detached: true}},
		"digest attached":       {p: cms.Params{Digest: digestOf("sm2", content)}},
		"digest too short":      {p: cms.Params{Digest: make([]byte, 20), Detached: true}},
		"no certificate":        {p: cms.Params{Content: content, Certificates: [][]byte{}}},
		"certificate not DER":   {p: cms.Params{Content: content, Certificates: [][]byte{{1, 2, 3}}}, want: cms.ErrMalformed},
		"another key":           {signer: softKey{other}, p: cms.Params{Content: content}},
		"P-256":                 {signer: softKey{p256}, p: cms.Params{Content: content}, want: cms.ErrUnsupported},
		"short RSA":             {signer: softKey{shortRSA{}}, p: cms.Params{Content: content}, want: cms.ErrUnsupported},
		"attribute of ours":     {p: cms.Params{Content: content, SignedAttributes: attr(cms.OIDMessageDigest, null)}, want: cms.ErrAttributes},
		"signingTime":           {p: cms.Params{Content: content, SignedAttributes: attr(cms.OIDSigningTime, null)}, want: cms.ErrAttributes},
		"attribute twice":       {p: cms.Params{Content: content, SignedAttributes: append(attr(oid, null), attr(oid, null)...)}, want: cms.ErrAttributes},
		"attribute empty":       {p: cms.Params{Content: content, SignedAttributes: attr(oid)}},
		"attribute not DER":     {p: cms.Params{Content: content, SignedAttributes: attr(oid, []byte{4, 0x81, 1, 0})}, want: cms.ErrMalformed},
		"attribute OID invalid": {p: cms.Params{Content: content, SignedAttributes: attr(asn1.ObjectIdentifier{9}, null)}},
		"content type invalid":  {p: cms.Params{Content: content, ContentType: asn1.ObjectIdentifier{1, 99}}},
		"CRL not DER":           {p: cms.Params{Content: content, CRLs: [][]byte{{0x30, 0x80, 0, 0}}}, want: cms.ErrMalformed},
		"device error":          {signer: brokenSigner{who.key, nil, errDevice}, p: cms.Params{Content: content}, want: errDevice},
		"device answers zeros":  {signer: brokenSigner{who.key, make([]byte, 64), nil}, p: cms.Params{Content: content}, want: cms.ErrBadSignature},
		"device answers 0, 1":   {signer: brokenSigner{who.key, tlv(0x30, []byte{2, 1, 0, 2, 1, 1}), nil}, p: cms.Params{Content: content}, want: cms.ErrBadSignature},
		"device answers -1, 1":  {signer: brokenSigner{who.key, tlv(0x30, []byte{2, 1, 0xff, 2, 1, 1}), nil}, p: cms.Params{Content: content}, want: cms.ErrBadSignature},
		"device answers loose":  {signer: brokenSigner{who.key, tlv(0x30, []byte{2, 1, 1, 2, 2, 0, 1}), nil}, p: cms.Params{Content: content}, want: cms.ErrBadSignature},
		"device answers 2^256": {signer: brokenSigner{who.key, tlv(0x30, []byte{2, 1, 1}, tlv(2, []byte{1}, make([]byte, 32))), nil},
			p: cms.Params{Content: content}, want: cms.ErrBadSignature},
		"device answers more": {signer: brokenSigner{who.key, tlv(0x30, []byte{2, 1, 1, 2, 1, 1, 5, 0}), nil}, p: cms.Params{Content: content}, want: cms.ErrBadSignature},
		"unknown profile":     {p: cms.Params{Content: content, Profile: 7}, want: cms.ErrUnsupported},
		"gm0010 with RSA": {signer: rsaPerson().key, want: cms.ErrUnsupported,
			p: cms.Params{Content: content, Profile: cms.GM0010, Certificates: rsaPerson().chain()}},
		"RSA signature too short": {signer: brokenSigner{rsaPerson().key, make([]byte, 255), nil}, want: cms.ErrBadSignature,
			p: cms.Params{Content: content, Certificates: rsaPerson().chain()}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if row.signer == nil {
				row.signer = who.key
			}
			if row.p.Certificates == nil {
				row.p.Certificates = who.chain()
			}
			signed, err := cms.Sign(t.Context(), row.signer, row.p)
			if err == nil || signed != nil || row.want != nil && !errors.Is(err, row.want) {
				t.Errorf("Sign = %v, %v, want %v", signed, err, row.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := cms.Sign(ctx, who.key, cms.Params{Content: content, Certificates: who.chain()}); !errors.Is(err, context.Canceled) {
		t.Errorf("Sign with a cancelled context = %v", err)
	}
}

// shortRSA has a public key below the limit; crypto/rsa itself would not sign with a real one.
type shortRSA struct{ crypto.Signer }

func (shortRSA) Public() crypto.PublicKey { return shortRSAPublic }
