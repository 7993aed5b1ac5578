package tsa_test

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"math/big"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/ntp"
	"yinjian/tsa"
)

func tlv(tag byte, parts ...[]byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(der.Tag(tag), func(b *cryptobyte.Builder) {
		for _, p := range parts {
			b.AddBytes(p)
		}
	})
	return b.BytesOrPanic()
}

var (
	sm3Other = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 401, 1}
	sha1     = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
	md5      = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 5}
	one      = []byte{2, 1, 1}
	null     = []byte{5, 0}
	isTrue   = []byte{1, 1, 0xff}
)

func imprint(oid asn1.ObjectIdentifier, size int, parameters ...[]byte) []byte {
	algorithm := tlv(0x30, append([][]byte{marshal(oid)}, parameters...)...)
	return tlv(0x30, algorithm, tlv(4, bytes.Repeat([]byte{7}, size)))
}

func TestParseRequest(t *testing.T) {
	t.Parallel()
	sm3Imprint := imprint(cms.OIDSM3, 32)
	longNonce := append([]byte{2, 20, 0x7f}, bytes.Repeat([]byte{9}, 19)...)
	for name, in := range map[string][]byte{
		"SM3":             tlv(0x30, one, sm3Imprint),
		"SM3 NULL":        tlv(0x30, one, imprint(cms.OIDSM3, 32, null)),
		"SM3 other":       tlv(0x30, one, imprint(sm3Other, 32)),
		"SHA-256":         tlv(0x30, one, imprint(cms.OIDSHA256, 32)),
		"SHA-384":         tlv(0x30, one, imprint(cms.OIDSHA384, 48)),
		"SHA-512":         tlv(0x30, one, imprint(cms.OIDSHA512, 64, null)),
		"policy":          tlv(0x30, one, sm3Imprint, marshal(policy)),
		"nonce":           tlv(0x30, one, sm3Imprint, longNonce),
		"nonce 0":         tlv(0x30, one, sm3Imprint, []byte{2, 1, 0}),
		"negative nonce":  tlv(0x30, one, sm3Imprint, []byte{2, 2, 0x80, 1}),
		"nonce -128":      tlv(0x30, one, sm3Imprint, []byte{2, 1, 0x80}),
		"certReq":         tlv(0x30, one, sm3Imprint, isTrue),
		"all":             tlv(0x30, one, sm3Imprint, marshal(policy), longNonce, isTrue),
		"policy, certReq": tlv(0x30, one, sm3Imprint, marshal(policy), isTrue),
	} {
		req, err := tsa.ParseRequest(in)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if out := encode(t, req); !bytes.Equal(out, in) {
			t.Errorf("%s: encodes to %x, want %x", name, out, in)
		}
		if req.Imprint.Algorithm == nil || req.Imprint.Digest[0] != 7 {
			t.Errorf("%s: imprint %v", name, req.Imprint)
		}
	}
	req, err := tsa.ParseRequest(tlv(0x30, one, sm3Imprint, []byte{2, 2, 0x80, 1}))
	if err != nil || req.Nonce.Cmp(big.NewInt(-32767)) != 0 {
		t.Errorf("nonce %v, %v, want -32767", req.Nonce, err)
	}
}

// opensslWords are OpenSSL's for the bits of PKIFailureInfo.
var opensslWords = map[tsa.Failure]string{
	tsa.BadAlg: "unrecognized or unsupported algorithm identifier", tsa.BadRequest: "transaction not permitted or supported",
	tsa.BadDataFormat: "the data submitted has the wrong format", tsa.TimeNotAvailable: "the TSA's time source is not available",
	tsa.UnacceptedPolicy:    "the requested TSA policy is not supported by the TSA",
	tsa.UnacceptedExtension: "the requested extension is not supported by the TSA",
	tsa.SystemFailure:       "the request cannot be handled due to system failure",
}

// TestLargeOIDs: numbers of object identifiers have no end, and those made of UUIDs (2.25, X.667) are met. That they are too
// large for us is no fault of the encoding.
func TestLargeOIDs(t *testing.T) {
	t.Parallel()
	uuid := append(append([]byte{6, 20, 0x69}, 0x83), append(bytes.Repeat([]byte{0xff}, 17), 0x7f)...)
	loose := slices.Concat([]byte{6, 4, 0x69, 0x80}, []byte{0x81, 0x01})
	for name, row := range map[string]struct {
		in   []byte
		want tsa.Failure
	}{
		"policy":          {tlv(0x30, one, imprint(cms.OIDSM3, 32), uuid), tsa.UnacceptedPolicy},
		"algorithm":       {tlv(0x30, one, tlv(0x30, tlv(0x30, uuid), tlv(4, make([]byte, 32)))), tsa.BadAlg},
		"loose policy":    {tlv(0x30, one, imprint(cms.OIDSM3, 32), loose), tsa.BadDataFormat},
		"loose algorithm": {tlv(0x30, one, tlv(0x30, tlv(0x30, loose), tlv(4, make([]byte, 32)))), tsa.BadDataFormat},
	} {
		var fault *tsa.RequestError
		if _, err := tsa.ParseRequest(row.in); !errors.As(err, &fault) || fault.Failure != row.want {
			t.Errorf("%s: %v, want %v", name, err, row.want)
		}
	}
}

// TestEveryFailure: what is sent for each fault, through the authority, as a whole response, and how OpenSSL reads it.
func TestEveryFailure(t *testing.T) {
	t.Parallel()
	good := imprint(cms.OIDSM3, 32)
	body := slices.Concat(one, good)
	extension := tlv(0x30, marshal(asn1.ObjectIdentifier{1, 2, 3}), tlv(4, null))
	critical := tlv(0x30, marshal(asn1.ObjectIdentifier{1, 2, 3}), isTrue, tlv(4, null))
	a := newAuthority(t, sm2Unit().config())
	lost, gone := sm2Unit().config(), sm2Unit().config()
	lost.Clock = fixedClock{Time: now, Bound: time.Millisecond, State: ntp.Suspect}
	gone.Signer = softKey{key: sm2Unit().key.key, fail: errors.New("CKR_DEVICE_REMOVED")}
	for name, row := range map[string]struct {
		in   []byte
		want tsa.Failure
	}{
		"time lost":            {tlv(0x30, body), tsa.TimeNotAvailable},
		"token gone":           {tlv(0x30, body), tsa.SystemFailure},
		"empty":                {nil, tsa.BadDataFormat},
		"garbage":              {[]byte("GET / HTTP/1.1"), tsa.BadDataFormat},
		"oversized":            {tlv(0x30, body, tlv(0xa0, make([]byte, 20000))), tsa.BadDataFormat},
		"trailing byte":        {append(tlv(0x30, body), 0), tsa.BadDataFormat},
		"truncated":            {tlv(0x30, body)[:40], tsa.BadDataFormat},
		"indefinite":           {slices.Concat([]byte{0x30, 0x80}, body, []byte{0, 0}), tsa.BadDataFormat},
		"indefinite inside":    {tlv(0x30, one, slices.Concat([]byte{0x30, 0x80}, good[2:], []byte{0, 0})), tsa.BadDataFormat},
		"length too long":      {[]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff}, tsa.BadDataFormat},
		"another request":      {tlv(0x30, tlv(0x30, marshal(policy))), tsa.BadDataFormat},
		"long length":          {slices.Concat([]byte{0x30, 0x81, byte(len(body))}, body), tsa.BadDataFormat},
		"a set":                {tlv(0x31, body), tsa.BadDataFormat},
		"no version":           {tlv(0x30, good), tsa.BadDataFormat},
		"loose version":        {tlv(0x30, []byte{2, 2, 0, 1}, good), tsa.BadDataFormat},
		"empty version":        {tlv(0x30, []byte{2, 0}, good), tsa.BadDataFormat},
		"version 0":            {tlv(0x30, []byte{2, 1, 0}, good), tsa.BadRequest},
		"version 2":            {tlv(0x30, []byte{2, 1, 2}, good), tsa.BadRequest},
		"version -1":           {tlv(0x30, []byte{2, 1, 0xff}, good), tsa.BadRequest},
		"version 257":          {tlv(0x30, []byte{2, 2, 1, 1}, good), tsa.BadRequest},
		"no imprint":           {tlv(0x30, one), tsa.BadDataFormat},
		"imprint trailing":     {tlv(0x30, one, tlv(0x30, tlv(0x30, marshal(cms.OIDSM3)), tlv(4, make([]byte, 32)), null)), tsa.BadDataFormat},
		"imprint too short":    {tlv(0x30, one, imprint(cms.OIDSM3, 31)), tsa.BadDataFormat},
		"imprint too long":     {tlv(0x30, one, imprint(cms.OIDSHA256, 33)), tsa.BadDataFormat},
		"imprint empty":        {tlv(0x30, one, imprint(cms.OIDSHA512, 0)), tsa.BadDataFormat},
		"imprint constructed":  {tlv(0x30, one, tlv(0x30, tlv(0x30, marshal(cms.OIDSM3)), tlv(0x24, tlv(4, make([]byte, 32))))), tsa.BadDataFormat},
		"SHA-1":                {tlv(0x30, one, imprint(sha1, 20)), tsa.BadAlg},
		"MD5":                  {tlv(0x30, one, imprint(md5, 16)), tsa.BadAlg},
		"unknown algorithm":    {tlv(0x30, one, imprint(asn1.ObjectIdentifier{1, 2, 156, 10197, 6, 1, 4, 2}, 32)), tsa.BadAlg},
		"algorithm parameters": {tlv(0x30, one, imprint(cms.OIDSM3, 32, one)), tsa.BadAlg},
		"policy":               {tlv(0x30, body, marshal(asn1.ObjectIdentifier{1, 2, 3})), tsa.UnacceptedPolicy},
		"policy broken":        {tlv(0x30, body, []byte{6, 1, 0x80}), tsa.BadDataFormat},
		"huge nonce":           {tlv(0x30, body, append([]byte{2, 0x82, 16, 0, 1}, make([]byte, 4095)...)), tsa.BadDataFormat},
		"nonce empty":          {tlv(0x30, body, []byte{2, 0}), tsa.BadDataFormat},
		"nonce of 21 bytes":    {tlv(0x30, body, append([]byte{2, 21, 1}, make([]byte, 20)...)), tsa.BadDataFormat},
		"loose nonce":          {tlv(0x30, body, []byte{2, 2, 0, 1}), tsa.BadDataFormat},
		"loose negative nonce": {tlv(0x30, body, []byte{2, 2, 0xff, 0x80}), tsa.BadDataFormat},
		"certReq FALSE":        {tlv(0x30, body, []byte{1, 1, 0}), tsa.BadDataFormat},
		"certReq 1":            {tlv(0x30, body, []byte{1, 1, 1}), tsa.BadDataFormat},
		"wrong order":          {tlv(0x30, body, isTrue, []byte{2, 1, 5}), tsa.BadDataFormat},
		"unknown field":        {tlv(0x30, body, tlv(0xa1)), tsa.BadDataFormat},
		"extension":            {tlv(0x30, body, tlv(0xa0, extension)), tsa.UnacceptedExtension},
		"critical extension":   {tlv(0x30, body, isTrue, tlv(0xa0, critical)), tsa.UnacceptedExtension},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := a
			switch row.want {
			case tsa.TimeNotAvailable:
				a = newAuthority(t, lost)
			case tsa.SystemFailure:
				a = newAuthority(t, gone)
			}
			reply := a.Respond(t.Context(), row.in)
			wantRejected(t, reply, row.want)
			var fault *tsa.RequestError
			switch _, err := tsa.ParseRequest(row.in); row.want {
			case tsa.UnacceptedPolicy, tsa.TimeNotAvailable, tsa.SystemFailure: // not the parser's to know
				if err != nil {
					t.Errorf("ParseRequest = %v", err)
				}
			default:
				if !errors.As(err, &fault) || fault.Failure != row.want {
					t.Errorf("ParseRequest = %v, want %v", err, row.want)
				}
			}
			text := cmstest.MustOpenSSL(t, "ts", "-reply", "-in", cmstest.Write(t, filepath.Join(t.TempDir(), "r.tsr"), reply), "-text")
			if !strings.Contains(text, "Status: Rejected.") || !strings.Contains(text, "Failure info: "+opensslWords[row.want]) {
				t.Errorf("openssl says %s, want %q", text, opensslWords[row.want])
			}
		})
	}
}

func TestReject(t *testing.T) {
	t.Parallel()
	for _, f := range []tsa.Failure{tsa.BadAlg, tsa.BadRequest, tsa.BadDataFormat, tsa.TimeNotAvailable, tsa.UnacceptedPolicy,
		tsa.UnacceptedExtension, tsa.AddInfoNotAvailable, tsa.SystemFailure} {
		wantRejected(t, tsa.Reject(f, "too much"), f)
	}
	wantRejected(t, tsa.Reject(-3, "too much"), tsa.SystemFailure)
	file := cmstest.Write(t, filepath.Join(t.TempDir(), "r.tsr"), tsa.Reject(tsa.BadRequest, "too much"))
	if text := cmstest.MustOpenSSL(t, "ts", "-reply", "-in", file, "-text"); !strings.Contains(text, "Status description: too much") {
		t.Errorf("openssl says %s", text)
	}
}

// TestImprintBytesComeBack: the token repeats the request's messageImprint to the byte, NULL and other numbers included.
func TestImprintBytesComeBack(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, sm2Unit().config())
	for _, in := range [][]byte{imprint(cms.OIDSM3, 32, null), imprint(sm3Other, 32), imprint(sm3Other, 32, null), imprint(cms.OIDSHA384, 48)} {
		response, err := tsa.ParseResponse(a.Respond(t.Context(), tlv(0x30, one, in)))
		if err != nil || response.Token == nil {
			t.Errorf("%x: %v", in, err)
			continue
		}
		if !bytes.Contains(response.Token.Message().Content, in) {
			t.Errorf("imprint %x is not in the token", in)
		}
	}
}

func TestNewImprint(t *testing.T) {
	t.Parallel()
	if _, err := tsa.NewImprint(sha1, make([]byte, 20)); err == nil {
		t.Error("SHA-1 is accepted")
	}
	if _, err := tsa.NewImprint(cms.OIDSHA256, make([]byte, 31)); err == nil {
		t.Error("31 bytes are accepted")
	}
	if _, err := (&tsa.Request{}).Bytes(); err == nil {
		t.Error("a request without imprint encodes")
	}
	if (tsa.Imprint{}).Equal(tsa.Imprint{}) {
		t.Error("nothing equals nothing")
	}
}

// TestOpenSSLRequests reads what openssl ts -query (3.0) writes: testdata/peer/openssl-*.tsq, recorded by -update.
func TestOpenSSLRequests(t *testing.T) {
	for name, row := range map[string]struct {
		flags          []string
		nonce, certReq bool
		failure        tsa.Failure
		algorithm      asn1.ObjectIdentifier
	}{
		"sm3":      {[]string{"-sm3", "-cert"}, true, true, 0, cms.OIDSM3},
		"sha256":   {[]string{"-sha256", "-no_nonce"}, false, false, 0, cms.OIDSHA256},
		"sha384":   {[]string{"-sha384", "-cert", "-tspolicy", policy.String()}, true, true, 0, cms.OIDSHA384},
		"sha512":   {[]string{"-sha512"}, true, false, 0, cms.OIDSHA512},
		"sha1":     {[]string{"-sha1"}, true, false, tsa.BadAlg, nil},
		"sha3-256": {[]string{"-sha3-256"}, true, false, tsa.BadAlg, nil},
	} {
		path := filepath.Join("testdata", "peer", "openssl-"+name+".tsq")
		if *update {
			cmstest.MustOpenSSL(t, append([]string{"ts", "-query", "-data", dataFile(t), "-out", path}, row.flags...)...)
		}
		in := cmstest.Read(t, path)
		req, err := tsa.ParseRequest(in)
		if row.algorithm == nil {
			var fault *tsa.RequestError
			if !errors.As(err, &fault) || fault.Failure != row.failure {
				t.Errorf("%s: %v, want %v", name, err, row.failure)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !req.Imprint.Algorithm.Equal(row.algorithm) || (req.Nonce != nil) != row.nonce || req.CertReq != row.certReq {
			t.Errorf("%s: %+v", name, req)
		}
		if out := encode(t, req); !bytes.Equal(out, in) {
			t.Errorf("%s: encodes to %x, want %x", name, out, in)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add(tlv(0x30, one, imprint(cms.OIDSM3, 32), marshal(policy), []byte{2, 1, 0x80}, isTrue))
	f.Add(tlv(0x30, one, imprint(sm3Other, 32, null)))
	f.Add(tlv(0x30, one, imprint(cms.OIDSHA512, 64), tlv(0xa0, tlv(0x30))))
	names, _ := filepath.Glob(filepath.Join("testdata", "peer", "*.tsq"))
	for _, name := range names {
		f.Add(cmstest.Read(f, name))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		req, err := tsa.ParseRequest(in)
		if err != nil {
			var fault *tsa.RequestError
			if !errors.As(err, &fault) {
				t.Errorf("error %v is not a RequestError", err)
			}
			return
		}
		if out := encode(t, req); !bytes.Equal(out, in) {
			t.Errorf("encodes to %x, want %x", out, in)
		}
	})
}
