package tsa_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/asn1"
	"fmt"
	"math/big"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/cms"
	"yinjian/ntp"
	"yinjian/tsa"
)

// The structures of RFC 3161, RFC 5652 and RFC 5035 as encoding/asn1 writes them: slow, plain, and not our code.
type (
	plainAlgorithm struct {
		OID        asn1.ObjectIdentifier
		Parameters asn1.RawValue `asn1:"optional"`
	}
	plainAccuracy struct {
		Seconds int `asn1:"optional"`
		Millis  int `asn1:"optional,tag:0"`
	}
	plainInfo struct {
		Version  int
		Policy   asn1.ObjectIdentifier
		Imprint  asn1.RawValue
		Serial   *big.Int
		GenTime  asn1.RawValue
		Accuracy plainAccuracy
		Ordering bool          `asn1:"optional"`
		Nonce    *big.Int      `asn1:"optional"`
		TSA      asn1.RawValue `asn1:"optional"`
	}
	plainIssuerSerial struct {
		Issuer []asn1.RawValue
		Serial *big.Int
	}
	plainCertID struct {
		Hash         plainAlgorithm `asn1:"optional"`
		CertHash     []byte
		IssuerSerial plainIssuerSerial
	}
	plainSigningCertificate struct{ IDs []plainCertID }
	plainAttribute          struct {
		Type   asn1.ObjectIdentifier
		Values []asn1.RawValue `asn1:"set"`
	}
	plainSID struct {
		Issuer asn1.RawValue
		Serial *big.Int
	}
	plainSigner struct {
		Version    int
		SID        plainSID
		Digest     plainAlgorithm
		Attributes asn1.RawValue `asn1:"optional"`
		Algorithm  plainAlgorithm
		Signature  []byte
	}
	plainContent struct {
		Type    asn1.ObjectIdentifier
		Content []byte `asn1:"explicit,optional,tag:0"`
	}
	plainSignedData struct {
		Version      int
		Digests      []plainAlgorithm `asn1:"set"`
		Content      plainContent
		Certificates asn1.RawValue `asn1:"optional"`
		Signers      []plainSigner `asn1:"set"`
	}
	plainMessage struct {
		Type asn1.ObjectIdentifier
		Data plainSignedData `asn1:"explicit,tag:0"`
	}
	plainStatus   struct{ Status int }
	plainResponse struct {
		Status plainStatus
		Token  plainMessage
	}
)

func raw(der []byte) asn1.RawValue { return asn1.RawValue{FullBytes: der} }

// setOf is a SET OF under any tag, in the order of X.690 §11.6.
func setOf(tag byte, elements ...[]byte) []byte {
	elements = slices.Clone(elements)
	slices.SortFunc(elements, bytes.Compare)
	return tlv(tag, elements...)
}

func plainDigest(u *unit, message []byte) []byte {
	if _, ok := u.key.Public().(interface{ Size() int }); ok { // an RSA key
		d := sha256.Sum256(message)
		return d[:]
	}
	d := sm3.Sum(message)
	return d[:]
}

// plainToken is the TimeStampResp that the unit of c should have given for req, when its signer answered signature.
func plainToken(t *testing.T, u *unit, c tsa.Config, req *tsa.Request, imprint []byte, serial *big.Int, signature []byte) (response, attributes []byte) {
	t.Helper()
	reading := c.Clock.Now()
	genTime := reading.Time.UTC().Truncate(time.Millisecond)
	accuracy := int((reading.Bound + reading.Time.Sub(genTime) + time.Millisecond - 1).Milliseconds())
	text := genTime.Format("20060102150405")
	if ms := genTime.Nanosecond() / 1e6; ms > 0 {
		text += string(bytes.TrimRight(fmt.Appendf(nil, ".%03d", ms), "0"))
	}
	info := marshal(plainInfo{
		Version: 1, Policy: c.Policy, Imprint: raw(imprint), Serial: serial, GenTime: raw(tlv(0x18, []byte(text+"Z"))),
		Accuracy: plainAccuracy{Seconds: accuracy / 1000, Millis: accuracy % 1000}, Nonce: req.Nonce,
	})

	digest, signing, id := plainAlgorithm{OID: cms.OIDSM3}, plainAlgorithm{OID: cms.OIDSM2WithSM3}, plainAlgorithm{OID: cms.OIDSM3}
	if _, ok := u.key.Public().(interface{ Size() int }); ok {
		digest.OID, signing, id = cms.OIDSHA256, plainAlgorithm{cms.OIDSHA256WithRSA, asn1.NullRawValue}, plainAlgorithm{}
	}
	outer, content, version := cms.OIDSignedData, cms.OIDTSTInfo, 3
	if c.Profile == cms.GM0010 {
		outer, version, signing.OID = cms.OIDGMSignedData, 1, cms.OIDSM2Sign
	}
	attribute := func(oid asn1.ObjectIdentifier, value []byte) []byte {
		return marshal(plainAttribute{oid, []asn1.RawValue{raw(value)}})
	}
	attributes = setOf(0x31,
		attribute(cms.OIDContentType, marshal(content)),
		attribute(cms.OIDMessageDigest, marshal(plainDigest(u, info))),
		attribute(cms.OIDSigningCertificateV2, marshal(plainSigningCertificate{[]plainCertID{{
			id, plainDigest(u, u.cert.Raw), plainIssuerSerial{[]asn1.RawValue{raw(tlv(0xa4, u.cert.RawIssuer))}, u.cert.SerialNumber},
		}}})))
	data := plainSignedData{
		Version: version, Digests: []plainAlgorithm{digest}, Content: plainContent{content, info},
		Signers: []plainSigner{{
			1, plainSID{raw(u.cert.RawIssuer), u.cert.SerialNumber}, digest, raw(append([]byte{0xa0}, attributes[1:]...)), signing, signature,
		}},
	}
	if req.CertReq {
		data.Certificates = raw(setOf(0xa0, u.cert.Raw, u.ca.Raw))
	}
	return marshal(plainResponse{plainStatus{tsa.StatusGranted}, plainMessage{outer, data}}), attributes
}

// keepingKey keeps what it was given to sign and what it answered.
type keepingKey struct {
	softKey
	message, signature []byte
}

func (k *keepingKey) SignMessage(ctx context.Context, message []byte) (signature []byte, err error) {
	k.message = bytes.Clone(message)
	k.signature, err = k.softKey.SignMessage(ctx, message)
	return k.signature, err
}

// TestEncoding compares whole responses, byte for byte, with what encoding/asn1 makes of the same values; the values are
// drawn from a seed and reach every length that a field may have.
func TestEncoding(t *testing.T) {
	t.Parallel()
	const seed = 20261121
	for name, profiles := range map[string][]cms.Profile{"sm2": {cms.RFC5652, cms.GM0010}, "rsa": {cms.RFC5652}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u, random := units[name](), rand.New(rand.NewPCG(seed, 0))
			key := &keepingKey{softKey: u.key}
			c, serials := u.config(), new(memSerials)
			var serial *big.Int
			serials.give = func(int64) (*big.Int, error) { return serial, nil }
			c.Signer, c.Serials, c.Accuracy = key, serials, time.Hour
			clock := new(movedClock)
			c.Clock = clock
			n := 40
			if name == "rsa" {
				n = 10
			}
			for _, profile := range profiles {
				c.Profile = profile
				a := newAuthority(t, c)
				for i := range n {
					serial = randomInteger(random, 160)
					serial.Add(serial, big.NewInt(1)).Rsh(serial, random.UintN(160)).SetBit(serial, 0, 1)
					clock.Reading = randomReading(random)
					req, imprint := randomRequest(t, random)
					got := a.Respond(t.Context(), encode(t, req))
					want, attributes := plainToken(t, u, c, req, imprint, serial, key.signature)
					if !bytes.Equal(key.message, attributes) {
						t.Fatalf("%v, %d: signed %x, want %x", profile, i, key.message, attributes)
					}
					if !bytes.Equal(got, want) {
						t.Fatalf("%v, %d: response %x, want %x", profile, i, got, want)
					}
				}
			}
		})
	}
}

type movedClock struct{ ntp.Reading }

func (c *movedClock) Now() ntp.Reading { return c.Reading }

func randomInteger(r *rand.Rand, bits uint) *big.Int {
	b := make([]byte, (bits+7)/8)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	n := new(big.Int).SetBytes(b)
	return n.Rsh(n, uint(len(b))*8-bits)
}

// randomReading: any day of the unit's five years, fractions with and without trailing zeros, bounds up to a minute.
func randomReading(r *rand.Rand) ntp.Reading {
	at := epoch.Add(time.Duration(r.Int64N(int64(5 * 365 * 24 * time.Hour))))
	switch r.IntN(4) {
	case 0:
		at = at.Truncate(time.Second)
	case 1:
		at = at.Truncate(100 * time.Millisecond)
	}
	bound := time.Duration(r.Int64N(int64(time.Minute))) >> r.IntN(24)
	if r.IntN(4) == 0 {
		bound = bound.Truncate(time.Second)
	}
	return ntp.Reading{Time: at, Bound: bound + 1, State: ntp.Trusted}
}

// randomRequest: every algorithm, nonces of each length and sign.
func randomRequest(t *testing.T, r *rand.Rand) (*tsa.Request, []byte) {
	t.Helper()
	in := imprint(cms.OIDSM3, 32)
	switch r.IntN(6) {
	case 0:
		in = imprint(sm3Other, 32, null)
	case 1:
		in = imprint(cms.OIDSHA256, 32, null)
	case 2:
		in = imprint(cms.OIDSHA384, 48)
	case 3:
		in = imprint(cms.OIDSHA512, 64)
	}
	req, err := tsa.ParseRequest(tlv(0x30, one, in))
	if err != nil {
		t.Fatal(err)
	}
	if r.IntN(4) > 0 {
		req.Nonce = randomInteger(r, r.UintN(160))
		switch r.IntN(4) {
		case 0:
			req.Nonce.Neg(req.Nonce)
		case 1:
			req.Nonce = new(big.Int).Lsh(big.NewInt(-1), 8*uint(r.IntN(20))+7) // the least of its length
		}
	}
	if r.IntN(2) > 0 {
		req.Policy = policy
	}
	req.CertReq = r.IntN(2) > 0
	return req, in
}
