package tsa_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
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
	fields := plainInfo{
		Version: 1, Policy: c.Policy, Imprint: raw(imprint), Serial: serial, GenTime: raw(tlv(0x18, []byte(text+"Z"))),
		Accuracy: plainAccuracy{Seconds: accuracy / 1000, Millis: accuracy % 1000}, Ordering: c.Ordering, Nonce: req.Nonce,
	}
	if c.TSAName {
		fields.TSA = raw(tlv(0xa0, tlv(0xa4, u.cert.RawSubject)))
	}
	info := marshal(fields)

	digest, signing, id := plainAlgorithm{OID: cms.OIDSM3}, plainAlgorithm{OID: cms.OIDSM2WithSM3}, plainAlgorithm{OID: cms.OIDSM3}
	if _, ok := u.key.Public().(interface{ Size() int }); ok {
		digest.OID, signing, id = cms.OIDSHA256, plainAlgorithm{cms.OIDSHA256WithRSA, asn1.NullRawValue}, plainAlgorithm{}
	}
	outer, content, version := cms.OIDSignedData, cms.OIDTSTInfo, 3
	if c.Profile == cms.GM0010 {
		outer, version, signing.OID = cms.OIDGMSignedData, 1, cms.OIDSM2Sign
	}
	if c.ContentType != nil {
		content = c.ContentType
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
	none := func(*tsa.Config) {}
	for name, variants := range map[string][]func(*tsa.Config){
		"sm2": {
			none, func(c *tsa.Config) { c.TSAName, c.Ordering = true, true }, func(c *tsa.Config) { c.Profile = cms.GM0010 },
			func(c *tsa.Config) { c.Profile, c.ContentType = cms.GM0010, cms.OIDGMData },
		},
		"rsa": {none, func(c *tsa.Config) { c.TSAName = true }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u, random := units[name](), rand.New(rand.NewPCG(seed, 0))
			key := &keepingKey{softKey: u.key}
			serials, clock := new(memSerials), new(movedClock)
			var serial *big.Int
			serials.give = func(int64) (*big.Int, error) { return serial, nil }
			n := 40
			if name == "rsa" {
				n = 10
			}
			for v, change := range variants {
				c := u.config()
				c.Signer, c.Serials, c.Accuracy, c.Clock = key, serials, time.Hour, clock
				change(&c)
				a := newAuthority(t, c)
				for i := range n {
					serial = randomSerial(random)
					before := clock.Time
					if clock.Reading = randomReading(random); c.Ordering && i > 0 {
						clock.Time = before.Add(time.Duration(random.IntN(5000)+1000) * time.Microsecond)
					}
					req, imprint := randomRequest(t, random)
					got := a.Respond(t.Context(), encode(t, req))
					want, attributes := plainToken(t, u, c, req, imprint, serial, key.signature)
					if !bytes.Equal(key.message, attributes) {
						t.Fatalf("variant %d, %d: signed %x, want %x", v, i, key.message, attributes)
					}
					if !bytes.Equal(got, want) {
						t.Fatalf("variant %d, %d: response %x, want %x", v, i, got, want)
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

func randomSerial(r *rand.Rand) *big.Int {
	n := randomInteger(r, 160)
	return n.Rsh(n, r.UintN(160)).SetBit(n, 0, 1)
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

// TestOpenSSLReadsEncoding: openssl ts -reply -text says of random responses what was meant, and openssl ts -verify takes
// those of an RSA unit.
func TestOpenSSLReadsEncoding(t *testing.T) {
	t.Parallel()
	for name := range units {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u, random, dir := units[name](), rand.New(rand.NewPCG(7, 7)), t.TempDir()
			ca := cmstest.Write(t, filepath.Join(dir, "ca.pem"), cmstest.CertPEM(u.ca, u.cert))
			var serial *big.Int
			clock := new(movedClock)
			for i := range 8 {
				c := u.config()
				c.Serials = &memSerials{give: func(int64) (*big.Int, error) { return serial, nil }}
				c.Clock, c.Accuracy, c.TSAName, c.Ordering = clock, time.Hour, i%2 == 1, i%4 == 1
				serial, clock.Reading = randomSerial(random), randomReading(random)
				req, _ := randomRequest(t, random)
				q := encode(t, req)
				response := newAuthority(t, c).Respond(t.Context(), q)
				file := cmstest.Write(t, filepath.Join(dir, "r.tsr"), response)
				text := cmstest.MustOpenSSL(t, "ts", "-reply", "-in", file, "-text")
				parsed, err := tsa.ParseResponse(response)
				if err != nil {
					t.Fatal(err)
				}
				token := parsed.Token
				want := []string{
					"Status: Granted.", "Serial number: 0x" + hexOf(serial), "Policy OID: " + policy.String(),
					"Time stamp: " + clock.Time.UTC().Truncate(time.Millisecond).Format("Jan _2 15:04:05.999 2006 GMT"),
					"Ordering: " + map[bool]string{true: "yes", false: "no"}[c.Ordering],
					"TSA: " + map[bool]string{true: "DirName:/CN=Test TSU", false: "unspecified"}[c.TSAName],
				}
				if req.Nonce == nil {
					want = append(want, "Nonce: unspecified")
				} else if req.Nonce.Sign() < 0 {
					want = append(want, "Nonce: 0x-"+hexOf(req.Nonce))
				} else {
					want = append(want, "Nonce: 0x"+hexOf(req.Nonce))
				}
				accuracy := "Accuracy: "
				for j, n := range []int64{int64(token.Accuracy / time.Second), int64(token.Accuracy % time.Second / time.Millisecond)} {
					if n == 0 {
						accuracy += "unspecified"
					} else {
						accuracy += "0x" + hexOf(big.NewInt(n))
					}
					accuracy += []string{" seconds, ", " millis, "}[j]
				}
				for _, w := range append(want, accuracy+"unspecified micros") {
					if !strings.Contains(text, w) {
						t.Errorf("%d: openssl's text lacks %q:\n%s", i, w, text)
					}
				}
				if name == "rsa" {
					out := cmstest.MustOpenSSL(t, "ts", "-verify", "-attime", fmt.Sprint(clock.Time.Unix()), "-in", file, "-CAfile", ca, "-untrusted", ca,
						"-queryfile", cmstest.Write(t, filepath.Join(dir, "q.tsq"), q))
					if !strings.Contains(out, "Verification: OK") {
						t.Errorf("%d: openssl says %q", i, out)
					}
				}
			}
		})
	}
}

// hexOf prints whole bytes, as openssl does.
func hexOf(n *big.Int) string {
	if n.Sign() == 0 {
		return "00"
	}
	return fmt.Sprintf("%X", n.Bytes())
}

// steadyClock runs with the monotonic clock.
type steadyClock struct{ start time.Time }

func (c steadyClock) Now() ntp.Reading {
	return ntp.Reading{Time: now.Add(time.Since(c.start)), Bound: time.Millisecond, State: ntp.Trusted}
}

// TestOrdering: no two tokens share a genTime, whoever asks at once, and each is later than all that were out before it was
// asked for.
func TestOrdering(t *testing.T) {
	t.Parallel()
	c := sm2Unit().config()
	c.Clock, c.Ordering = steadyClock{time.Now()}, true // interval
	a := newAuthority(t, c)
	var mu sync.Mutex
	seen := map[time.Time]bool{}
	var latest time.Time
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range 25 {
				mu.Lock()
				before := latest
				mu.Unlock()
				token, err := a.Issue(t.Context(), request(data))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if !token.Ordering || seen[token.GenTime] || !token.GenTime.After(before) {
					t.Errorf("ordering %v, genTime %v, given out before: %v, latest %v", token.Ordering, token.GenTime, seen[token.GenTime], before)
				}
				seen[token.GenTime] = true
				if token.GenTime.After(latest) {
					latest = token.GenTime
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()

	// a clock that stands still gives one token, and nobody waits longer than he wants to
	c.Clock = trusted()
	a = newAuthority(t, c)
	if _, err := a.Issue(t.Context(), request(data)); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if _, err := a.Issue(ctx, request(data)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second token in the millisecond: %v", err)
	}
}
