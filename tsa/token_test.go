package tsa_test

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/appliance/cms/cmstest"
	"yinjian/tsa"
)

// handmade signs a TSTInfo that is put together here, with any certificate for the unit's key.
func (u *unit) handmade(t testing.TB, info []byte, cert *smx509.Certificate, p cms.Params) []byte {
	t.Helper()
	p.Content, p.Certificates = info, [][]byte{cert.Raw}
	if p.ContentType == nil {
		p.ContentType = cms.OIDTSTInfo
	}
	signed, err := cms.Sign(t.Context(), u.key, p)
	if err != nil {
		t.Fatal(err)
	}
	return signed.Bytes()
}

var (
	serial7 = []byte{2, 1, 7}
	genTime = []byte("\x18\x0f20261121102030Z")
)

// fields of a good TSTInfo, for tests to spoil.
func fields() [][]byte {
	return [][]byte{one, marshal(policy), imprint(cms.OIDSM3, 32), serial7, genTime}
}

func TestParseTSTInfo(t *testing.T) {
	t.Parallel()
	u := sm2Unit()
	with := func(at int, value []byte) []byte {
		f := fields()
		f[at] = value
		return tlv(0x30, f...)
	}
	plus := func(more ...[]byte) []byte { return tlv(0x30, append(fields(), more...)...) }
	at := func(s string) []byte { return with(4, tlv(0x18, []byte(s))) }
	millis := func(n byte) []byte { return []byte{0x80, 1, n} }
	extension := tlv(0x30, marshal(asn1.ObjectIdentifier{1, 2, 3}), tlv(4, null))
	critical := tlv(0x30, marshal(asn1.ObjectIdentifier{1, 2, 3}), isTrue, tlv(4, null))
	for name, row := range map[string]struct {
		info []byte
		ok   bool
	}{
		"plain":                 {plus(), true},
		"accuracy":              {plus(tlv(0x30, []byte{2, 1, 1}, millis(9), []byte{0x81, 1, 3})), true},
		"accuracy empty":        {plus(tlv(0x30)), true},
		"ordering":              {plus(isTrue), true},
		"nonce":                 {plus([]byte{2, 1, 0xff}), true},
		"tsa":                   {plus(tlv(0xa0, tlv(0xa4, tlv(0x30)))), true},
		"extension":             {plus(tlv(0xa1, extension)), true},
		"all":                   {plus(tlv(0x30), isTrue, []byte{2, 1, 5}, tlv(0xa0, tlv(0x82, []byte("tsa.example"))), tlv(0xa1, extension)), true},
		"fraction":              {at("20261121102030.123456789Z"), true},
		"leap day":              {at("20280229000000Z"), true},
		"largest serial":        {with(3, append([]byte{2, 21, 0, 0x80}, make([]byte, 19)...)), true},
		"not a sequence":        {tlv(0x31, fields()...), false},
		"trailing":              {append(plus(), 0), false},
		"empty":                 {nil, false},
		"version 2":             {with(0, []byte{2, 1, 2}), false},
		"no policy":             {with(1, nil), false},
		"SHA-1":                 {with(2, imprint(sha1, 20)), false},
		"imprint length":        {with(2, imprint(cms.OIDSM3, 20)), false},
		"negative serial":       {with(3, []byte{2, 1, 0xff}), false},
		"serial of 161 bits":    {with(3, append([]byte{2, 21, 1}, make([]byte, 20)...)), false},
		"loose serial":          {with(3, []byte{2, 2, 0, 7}), false},
		"no genTime":            {with(4, nil), false},
		"UTCTime":               {with(4, tlv(0x17, []byte("261121102030Z"))), false},
		"no Z":                  {at("20261121102030"), false},
		"offset":                {at("20261121102030+0800"), false},
		"no seconds":            {at("202611211020Z"), false},
		"comma":                 {at("20261121102030,5Z"), false},
		"trailing zero":         {at("20261121102030.50Z"), false},
		"point alone":           {at("20261121102030.Z"), false},
		"ten digits":            {at("20261121102030.1234567891Z"), false},
		"30 February":           {at("20260230102030Z"), false},
		"29 February":           {at("20270229102030Z"), false},
		"month 13":              {at("20261321102030Z"), false},
		"hour 24":               {at("20261121240000Z"), false},
		"leap second":           {at("20261231235960Z"), false},
		"letters":               {at("2026112110203oZ"), false},
		"accuracy millis 0":     {plus(tlv(0x30, millis(0))), false},
		"accuracy millis 1000":  {plus(tlv(0x30, []byte{0x80, 2, 3, 0xe8})), false},
		"accuracy negative":     {plus(tlv(0x30, []byte{2, 1, 0xff})), false},
		"accuracy order":        {plus(tlv(0x30, []byte{0x81, 1, 3}, millis(9))), false},
		"accuracy overflow":     {plus(tlv(0x30, []byte{2, 8, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})), false},
		"ordering FALSE":        {plus([]byte{1, 1, 0}), false},
		"nonce too long":        {plus(append([]byte{2, 21, 1}, make([]byte, 20)...)), false},
		"order of fields":       {plus([]byte{2, 1, 5}, isTrue), false},
		"tsa empty":             {plus(tlv(0xa0)), false},
		"critical extension":    {plus(tlv(0xa1, extension, critical)), false},
		"extensions empty":      {plus(tlv(0xa1)), false},
		"extension FALSE":       {plus(tlv(0xa1, tlv(0x30, marshal(policy), []byte{1, 1, 0}, tlv(4, null)))), false},
		"extension not a value": {plus(tlv(0xa1, tlv(0x30, marshal(policy)))), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			info := row.info
			if info == nil {
				info = []byte{}
			}
			token, err := tsa.ParseToken(u.handmade(t, info, u.cert, cms.Params{}))
			if (err == nil) != row.ok {
				t.Fatalf("ParseToken = %v, want success %v", err, row.ok)
			}
			var fault *tsa.RequestError
			if errors.As(err, &fault) {
				t.Errorf("%v is a RequestError, as if a request had come", err)
			}
			if err != nil {
				return
			}
			if report, err := token.VerifyDigest(cms.OIDSM3, bytes.Repeat([]byte{7}, 32)); err != nil {
				t.Errorf("VerifyDigest = %v: %v", err, report.Checks)
			}
		})
	}
	token, err := tsa.ParseToken(u.handmade(t, plus(tlv(0x30, []byte{2, 1, 1}, millis(9), []byte{0x81, 1, 3})), u.cert, cms.Params{}))
	if err != nil || token.Accuracy != time.Second+9*time.Millisecond+3*time.Microsecond {
		t.Errorf("accuracy %v, %v", token.Accuracy, err)
	}
}

// TestVerifyCatches changes one thing at a time and wants that very check to fail.
func TestVerifyCatches(t *testing.T) {
	t.Parallel()
	u, digest := sm2Unit(), bytes.Repeat([]byte{7}, 32)
	other := newUnit(cmstest.NewSM2Key(), cmstest.NewSM2Key())
	extensions := func(e ...pkix.Extension) *smx509.Certificate {
		return u.certificate(func(c *smx509.Certificate) { c.ExtraExtensions = e })
	}
	validity := func(from, to time.Time) *smx509.Certificate {
		return u.certificate(func(c *smx509.Certificate) { c.NotBefore, c.NotAfter = from, to })
	}
	stamped := time.Date(2026, 11, 21, 10, 20, 30, 0, time.UTC)
	info := tlv(0x30, fields()...)
	spoil := func(f func([]byte) []byte) []byte { return f(u.handmade(t, info, u.cert, cms.Params{})) }
	for name, row := range map[string]struct {
		token  []byte
		digest []byte
		check  string
		want   error
	}{
		"good":            {u.handmade(t, info, u.cert, cms.Params{}), digest, "", nil},
		"GM":              {u.handmade(t, info, u.cert, cms.Params{Profile: cms.GM0010}), digest, "", nil},
		"GM data":         {u.handmade(t, info, u.cert, cms.Params{Profile: cms.GM0010, ContentType: cms.OIDGMData}), digest, "", nil},
		"only just valid": {u.handmade(t, info, validity(stamped, stamped), cms.Params{}), digest, "", nil},
		"other digest":    {u.handmade(t, info, u.cert, cms.Params{}), make([]byte, 32), tsa.CheckImprint, tsa.ErrImprint},
		"no digest":       {u.handmade(t, info, u.cert, cms.Params{}), nil, tsa.CheckImprint, tsa.ErrImprint},
		"no purpose":      {u.handmade(t, info, extensions(), cms.Params{}), digest, tsa.CheckPurpose, tsa.ErrPurpose},
		"not critical":    {u.handmade(t, info, extensions(purpose(false, timeStamping)), cms.Params{}), digest, tsa.CheckPurpose, tsa.ErrPurpose},
		"two purposes": {u.handmade(t, info, extensions(purpose(true, timeStamping, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3})), cms.Params{}),
			digest, tsa.CheckPurpose, tsa.ErrPurpose},
		"expired":       {u.handmade(t, info, validity(epoch, stamped.Add(-time.Second)), cms.Params{}), digest, tsa.CheckGenTime, tsa.ErrGenTime},
		"not yet valid": {u.handmade(t, info, validity(stamped.Add(time.Second), stamped.Add(time.Hour)), cms.Params{}), digest, tsa.CheckGenTime, tsa.ErrGenTime},
		"no certificate": {u.handmade(t, info, u.cert, cms.Params{OmitCertificates: true}), digest,
			cms.CheckSignerCertificate, cms.ErrSignerCertificate},
		"serial changed": {spoil(func(b []byte) []byte { return bytes.Replace(b, serial7, []byte{2, 1, 8}, 1) }), digest,
			cms.CheckMessageDigest, cms.ErrMessageDigest},
		"genTime changed": {spoil(func(b []byte) []byte { return bytes.Replace(b, genTime, []byte("\x18\x0f20251121102030Z"), 1) }), digest,
			cms.CheckMessageDigest, cms.ErrMessageDigest},
		"signature changed": {spoil(func(b []byte) []byte { b[len(b)-1] ^= 1; return b }), digest, cms.CheckSignature, cms.ErrBadSignature},
		"certificate swapped": {spoil(func(b []byte) []byte {
			return bytes.Replace(b, u.cert.Raw[len(u.cert.Raw)-20:], other.cert.Raw[len(other.cert.Raw)-20:], 1)
		}),
			digest, cms.CheckSigningCertificate, cms.ErrSigningCertificate},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			token, err := tsa.ParseToken(row.token)
			if err != nil {
				t.Fatal(err)
			}
			report, err := token.VerifyDigest(cms.OIDSM3, row.digest)
			if row.check == "" {
				if err != nil {
					t.Fatalf("VerifyDigest = %v: %v", err, report.Checks)
				}
				return
			}
			if !errors.Is(err, row.want) || report.Result(row.check) != cms.Failed {
				t.Errorf("VerifyDigest = %v, want %v by %s: %v", err, row.want, row.check, report.Checks)
			}
		})
	}
}

// TestParseTokenKnows: a certificate at hand is taken instead of being parsed, if it is the same to the byte.
func TestParseTokenKnows(t *testing.T) {
	t.Parallel()
	u := sm2Unit()
	der := u.token(t, request(data)).DER
	other := u.certificate(nil) // another signature under the same names
	token, err := tsa.ParseToken(der, nil, other, u.cert)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range token.Certificates() {
		if (c == u.cert) != c.Equal(u.cert) || c == other || !c.Equal(u.cert) && !c.Equal(u.ca) {
			t.Errorf("certificate %v, known %v", c.Subject, c == u.cert || c == other)
		}
	}
	if report, err := token.VerifyData(data); err != nil {
		t.Errorf("VerifyData = %v: %v", err, report.Checks)
	}
}

func TestParseTokenRefuses(t *testing.T) {
	t.Parallel()
	u := sm2Unit()
	info := tlv(0x30, fields()...)
	good := u.handmade(t, info, u.cert, cms.Params{})
	for name, in := range map[string][]byte{
		"nothing":       nil,
		"trailing byte": append(slices.Clone(good), 0),
		"data":          u.handmade(t, info, u.cert, cms.Params{ContentType: cms.OIDData}),
		"detached":      u.handmade(t, info, u.cert, cms.Params{Detached: true}),
	} {
		if token, err := tsa.ParseToken(in); err == nil || token != nil {
			t.Errorf("%s: ParseToken = %v, %v", name, token, err)
		}
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	token := sm2Unit().token(t, request(data))
	for name, row := range map[string]struct {
		req  *tsa.Request
		want error
	}{
		"same":        {request(data), nil},
		"policy":      {&tsa.Request{Imprint: tsa.ImprintOf(data), Nonce: big.NewInt(-77), Policy: policy}, nil},
		"other data":  {&tsa.Request{Imprint: tsa.ImprintOf(nil), Nonce: big.NewInt(-77)}, tsa.ErrImprint},
		"no nonce":    {&tsa.Request{Imprint: tsa.ImprintOf(data)}, tsa.ErrNonce},
		"other nonce": {&tsa.Request{Imprint: tsa.ImprintOf(data), Nonce: big.NewInt(77)}, tsa.ErrNonce},
		"other policy": {&tsa.Request{Imprint: tsa.ImprintOf(data), Nonce: big.NewInt(-77), Policy: asn1.ObjectIdentifier{1, 2}},
			tsa.ErrPolicy},
	} {
		if err := token.Answers(row.req); !errors.Is(err, row.want) {
			t.Errorf("%s: Answers = %v, want %v", name, err, row.want)
		}
	}
}

func TestParseResponseRefuses(t *testing.T) {
	t.Parallel()
	token := sm2Unit().token(t, request(data)).DER
	text := tlv(0x30, tlv(0x0c, []byte("no")))
	for name, row := range map[string]struct {
		in []byte
		ok bool
	}{
		"granted":             {tlv(0x30, tlv(0x30, []byte{2, 1, 0}), token), true},
		"grantedWithMods":     {tlv(0x30, tlv(0x30, []byte{2, 1, 1}, text), token), true},
		"waiting":             {tlv(0x30, tlv(0x30, []byte{2, 1, 3})), true},
		"rejected":            {tlv(0x30, tlv(0x30, []byte{2, 1, 2}, text, []byte{3, 2, 5, 0x20})), true},
		"nothing":             {nil, false},
		"trailing":            {append(tlv(0x30, tlv(0x30, []byte{2, 1, 0}), token), 0), false},
		"unknown status":      {tlv(0x30, tlv(0x30, []byte{2, 1, 6})), false},
		"negative status":     {tlv(0x30, tlv(0x30, []byte{2, 1, 0xff})), false},
		"granted, no token":   {tlv(0x30, tlv(0x30, []byte{2, 1, 0})), false},
		"rejected with token": {tlv(0x30, tlv(0x30, []byte{2, 1, 2}), token), false},
		"granted with fault":  {tlv(0x30, tlv(0x30, []byte{2, 1, 0}, []byte{3, 2, 5, 0x20}), token), false},
		"two tokens":          {tlv(0x30, tlv(0x30, []byte{2, 1, 0}), token, token), false},
		"token broken":        {tlv(0x30, tlv(0x30, []byte{2, 1, 0}), tlv(0x30)), false},
		"text empty":          {tlv(0x30, tlv(0x30, []byte{2, 1, 2}, tlv(0x30))), false},
		"text not UTF-8":      {tlv(0x30, tlv(0x30, []byte{2, 1, 2}, tlv(0x30, tlv(0x0c, []byte{0xff})))), false},
		"bits not trimmed":    {tlv(0x30, tlv(0x30, []byte{2, 1, 2}, []byte{3, 2, 0, 0x20})), false},
		"bits trailing":       {tlv(0x30, tlv(0x30, []byte{2, 1, 2}, []byte{3, 2, 5, 0x20}, null)), false},
	} {
		response, err := tsa.ParseResponse(row.in)
		if (err == nil) != row.ok {
			t.Errorf("%s: ParseResponse = %+v, %v", name, response, err)
		}
	}
}

// TestParsersAllocateInProportion: what is sent cannot make us take many times as much memory as it has bytes. It is not
// parallel, for it counts what the whole process allocates.
func TestParsersAllocateInProportion(t *testing.T) {
	u := sm2Unit()
	good := u.token(t, request(data)).DER
	nested := func(n int) (out []byte) {
		for range n {
			out = tlv(0x30, out)
		}
		return out
	}
	info := tlv(0x30, append(fields(), tlv(0xa1, bytes.Repeat(tlv(0x30, marshal(policy), tlv(4)), 20000)))...)
	signedData := func(parts ...[]byte) []byte {
		return tlv(0x30, marshal(cms.OIDSignedData), tlv(0xa0, tlv(0x30, append([][]byte{{2, 1, 3}}, parts...)...)))
	}
	content := tlv(0x30, marshal(cms.OIDTSTInfo))
	for name, in := range map[string][]byte{
		"good":               good,
		"good response":      tlv(0x30, tlv(0x30, []byte{2, 1, 0}), good),
		"zeros":              make([]byte, 1<<20),
		"a request's limit":  tlv(0x30, one, imprint(cms.OIDSM3, 16200)),
		"huge OID":           tlv(0x30, one, tlv(0x30, tlv(0x30, tlv(6, bytes.Repeat([]byte{1}, 16000))), tlv(4, make([]byte, 32)))),
		"huge policy":        tlv(0x30, one, imprint(cms.OIDSM3, 32), tlv(6, bytes.Repeat([]byte{1}, 16000))),
		"deep":               nested(1000),
		"many texts":         tlv(0x30, tlv(0x30, []byte{2, 1, 2}, tlv(0x30, bytes.Repeat(tlv(0x0c), 100000)))),
		"many failures":      tlv(0x30, tlv(0x30, []byte{2, 1, 2}, tlv(3, []byte{0}, bytes.Repeat([]byte{0xff}, 1<<20)))),
		"many algorithms":    signedData(tlv(0x31, bytes.Repeat(null, 100000)), content, tlv(0x31)),
		"many certificates":  signedData(tlv(0x31), content, tlv(0xa0, bytes.Repeat(tlv(0x30), 100000)), tlv(0x31)),
		"many signers":       signedData(tlv(0x31), content, tlv(0x31, bytes.Repeat(tlv(0x30), 100000))),
		"many extensions":    u.handmade(t, info, u.cert, cms.Params{}),
		"length that is not": {0x30, 0x84, 0x7f, 0xff, 0xff, 0xff, 2, 1, 1},
	} {
		for parser, parse := range map[string]func(){
			"ParseRequest":  func() { tsa.ParseRequest(in) },
			"ParseResponse": func() { tsa.ParseResponse(in) },
			"ParseToken":    func() { tsa.ParseToken(in) },
		} {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			parse()
			runtime.ReadMemStats(&after)
			if got, most := after.TotalAlloc-before.TotalAlloc, uint64(80*len(in)+64<<10); got > most {
				t.Errorf("%s of %q, %d bytes, allocates %d, want at most %d", parser, name, len(in), got, most)
			}
		}
	}
}

func FuzzParseToken(f *testing.F) {
	u := sm2Unit()
	f.Add(u.token(f, request(data)).DER)
	for _, form := range forms() {
		f.Add(form.token(f, u, request(data)))
	}
	f.Add(u.handmade(f, tlv(0x30, append(fields(), tlv(0x30), isTrue, []byte{2, 1, 5})...), u.cert, cms.Params{Profile: cms.GM0010}))
	names, _ := filepath.Glob(filepath.Join("testdata", "peer", "*.tsr"))
	for _, name := range names {
		response, err := tsa.ParseResponse(cmstest.Read(f, name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(response.Token.DER)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		token, err := tsa.ParseToken(in)
		if err != nil {
			return
		}
		if !bytes.Equal(token.DER, in) {
			t.Errorf("encodes to %x, want %x", token.DER, in)
		}
		report, err := token.VerifyData(data)
		if (err == nil) != (report.Err() == nil) {
			t.Errorf("VerifyData = %v, report says %v", err, report.Err())
		}
	})
}

func FuzzParseResponse(f *testing.F) {
	f.Add(tlv(0x30, tlv(0x30, []byte{2, 1, 0}), sm2Unit().token(f, request(data)).DER))
	for failure := range opensslWords {
		f.Add(tsa.Reject(failure, "later"))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if r, err := tsa.ParseResponse(in); err == nil && (r.Token != nil) != (r.Err() == nil) {
			t.Errorf("%+v: token and Err disagree", r)
		}
	})
}
