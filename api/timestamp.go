package api

import (
	"bytes"
	"crypto/rand"
	encasn1 "encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"slices"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/labstack/echo/v4"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/problem"
)

// stamp is RFC 3161 §3.4: the query in, the reply out. A rejection is a reply like any other, with status 200.
func (s *Server) stamp(c echo.Context, requester string, query []byte) error {
	unit := c.Param("unit")
	if !slices.Contains(s.cfg.Stamps.Units(), unit) {
		return unitUnknown("path.unit")
	}
	reply, err := s.cfg.Stamps.Respond(c.Request().Context(), unit, requester, query)
	if err != nil {
		return err
	}
	return c.Blob(http.StatusOK, "application/timestamp-reply", reply)
}

func unitUnknown(field string) *problem.Problem {
	p := problem.New(problem.NotFound, "没有这个时间戳单元 (no such timestamp unit)", "请核对单元名称 (check the unit's name)")
	p.Field = field
	return p
}

// timestamp is the same for callers that have no ASN.1.
func (s *Server) timestamp(c echo.Context, app *account.Application, body []byte) error {
	var w wire.TimestampRequest
	if p := first(decode(body, &w)); p != nil {
		return p
	}
	switch {
	case w.Data != nil && w.Digest != nil:
		return problem.Invalid("digest", "data 与 digest 只能给一个 (give data or digest, not both)")
	case w.Data == nil && w.Digest == nil:
		return missing("digest")
	case w.Digest != nil:
		if p := checkDigest("digest", w.Digest, digestSM3, digestSHA); p != nil {
			return p
		}
	default:
		if p := blob("data", w.Data, 1<<20); p != nil {
			return p
		}
		sum := sm3.Sum(w.Data)
		w.Digest = &wire.Digest{Algorithm: digestSM3, Value: sum[:]}
	}
	units := s.cfg.Stamps.Units()
	if w.Unit == "" && len(units) > 0 {
		w.Unit = units[0]
	}
	if w.Unit != "" {
		if p := pattern("unit", w.Unit, unitName); p != nil {
			return p
		}
	}
	if !slices.Contains(units, w.Unit) {
		return unitUnknown("unit")
	}
	var random [8]byte
	rand.Read(random[:])
	nonce := new(big.Int).SetBytes(random[:])
	query, err := timeStampReq(w.Digest, nonce)
	if err != nil {
		return err
	}
	reply, err := s.cfg.Stamps.Respond(c.Request().Context(), w.Unit, app.ID, query)
	if err != nil {
		return err
	}
	out, err := parseTimeStampResp(reply, w.Digest, nonce)
	if err != nil {
		return err
	}
	out.Unit = w.Unit
	return answer(c, out)
}

var imprintOIDs = map[string]encasn1.ObjectIdentifier{
	digestSM3: {1, 2, 156, 10197, 1, 401},
	digestSHA: {2, 16, 840, 1, 101, 3, 4, 2, 1},
}

// timeStampReq is RFC 3161 §2.4.1 with version 1, a nonce (nil leaves it out) and certReq.
func timeStampReq(d *wire.Digest, nonce *big.Int) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		addImprint(b, d)
		if nonce != nil {
			b.AddASN1BigInt(nonce)
		}
		b.AddASN1Boolean(true)
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("api: encoding TimeStampReq: %w", err)
	}
	return der, nil
}

func addImprint(b *cryptobyte.Builder, d *wire.Digest) {
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(imprintOIDs[d.Algorithm])
			b.AddASN1NULL() // as OpenSSL and most others write it
		})
		b.AddASN1OctetString(d.Value)
	})
}

// PKIFailureInfo bits, RFC 3161 §2.4.2.
const (
	badAlg           = 0
	timeNotAvailable = 14
	systemFailure    = 25
)

// parseTimeStampResp reads our own unit's reply: a rejection becomes a problem, and of a token it is checked that it
// is for what was asked. Its signature is not: the unit has done so before it let the token go.
func parseTimeStampResp(der []byte, asked *wire.Digest, nonce *big.Int) (*wire.Timestamp, error) {
	in := cryptobyte.String(der)
	var resp, info cryptobyte.String
	var status int64
	if !in.ReadASN1(&resp, asn1.SEQUENCE) || !in.Empty() || !resp.ReadASN1(&info, asn1.SEQUENCE) || !info.ReadASN1Integer(&status) {
		return nil, errors.New("api: unit's TimeStampResp is malformed")
	}
	if status != 0 && status != 1 { // granted, grantedWithMods
		return nil, rejection(info, status)
	}
	token := bytes.Clone(resp)
	var content, signed, encap, eContent, tst cryptobyte.String
	octets := asn1.Tag(0).ContextSpecific().Constructed()
	if !resp.ReadASN1(&content, asn1.SEQUENCE) || !resp.Empty() ||
		!content.SkipASN1(asn1.OBJECT_IDENTIFIER) || !content.ReadASN1(&signed, octets) || !signed.ReadASN1(&signed, asn1.SEQUENCE) ||
		!signed.SkipASN1(asn1.INTEGER) || !signed.SkipASN1(asn1.SET) || !signed.ReadASN1(&encap, asn1.SEQUENCE) ||
		!encap.SkipASN1(asn1.OBJECT_IDENTIFIER) || !encap.ReadASN1(&eContent, octets) || !eContent.ReadASN1(&eContent, asn1.OCTET_STRING) ||
		!eContent.ReadASN1(&tst, asn1.SEQUENCE) {
		return nil, errors.New("api: unit's TimeStampToken is malformed")
	}
	out, err := parseTSTInfo(tst, asked, nonce)
	if err != nil {
		return nil, err
	}
	out.Token = token
	return out, nil
}

// parseTSTInfo reads RFC 3161 §2.4.2 up to the nonce.
func parseTSTInfo(tst cryptobyte.String, asked *wire.Digest, nonce *big.Int) (*wire.Timestamp, error) {
	var version int64
	var policy encasn1.ObjectIdentifier
	var imprint, algorithm, value, accuracy cryptobyte.String
	var oid encasn1.ObjectIdentifier
	serial, echoed := new(big.Int), new(big.Int)
	var genTime time.Time
	var hasAccuracy bool
	if !tst.ReadASN1Integer(&version) || version != 1 || !tst.ReadASN1ObjectIdentifier(&policy) ||
		!tst.ReadASN1(&imprint, asn1.SEQUENCE) || !imprint.ReadASN1(&algorithm, asn1.SEQUENCE) ||
		!algorithm.ReadASN1ObjectIdentifier(&oid) || !imprint.ReadASN1(&value, asn1.OCTET_STRING) ||
		!tst.ReadASN1Integer(serial) || !readGeneralizedTime(&tst, &genTime) ||
		!tst.ReadOptionalASN1(&accuracy, &hasAccuracy, asn1.SEQUENCE) || !tst.SkipOptionalASN1(asn1.BOOLEAN) {
		return nil, errors.New("api: unit's TSTInfo is malformed")
	}
	if !oid.Equal(imprintOIDs[asked.Algorithm]) || !bytes.Equal(value, asked.Value) {
		return nil, errors.New("api: unit's token is for another digest")
	}
	if !tst.ReadASN1Integer(echoed) || echoed.Cmp(nonce) != 0 {
		return nil, errors.New("api: unit's token is for another nonce")
	}
	us, ok := accuracyUS(accuracy)
	if !ok {
		return nil, errors.New("api: unit's accuracy is malformed")
	}
	return &wire.Timestamp{
		Serial: serial.Text(16), Policy: policy.String(), GenTime: stampTime(genTime), AccuracyUS: us,
	}, nil
}

// readGeneralizedTime takes the fractions that RFC 3161 allows and cryptobyte does not.
func readGeneralizedTime(in *cryptobyte.String, out *time.Time) bool {
	var raw cryptobyte.String
	if !in.ReadASN1(&raw, asn1.GeneralizedTime) {
		return false
	}
	t, err := time.Parse("20060102150405.999999999Z", string(raw))
	*out = t
	return err == nil
}

func accuracyUS(in cryptobyte.String) (us int64, ok bool) {
	var seconds int64
	if in.PeekASN1Tag(asn1.INTEGER) && !in.ReadASN1Integer(&seconds) {
		return 0, false
	}
	us = seconds * 1e6
	for i, unit := range []int64{1000, 1} { // [0] millis, [1] micros, IMPLICIT
		var part int64
		tag := asn1.Tag(i).ContextSpecific()
		if in.PeekASN1Tag(tag) {
			if !in.ReadASN1Int64WithTag(&part, tag) || part < 1 || part > 999 {
				return 0, false
			}
			us += part * unit
		}
	}
	return us, in.Empty() && seconds >= 0 && seconds < 1e6
}

// rejection is the problem of a PKIStatusInfo whose status was read already.
func rejection(info cryptobyte.String, status int64) error {
	var bits encasn1.BitString
	if !info.SkipOptionalASN1(asn1.SEQUENCE) || !info.Empty() && !info.ReadASN1BitString(&bits) {
		return errors.New("api: unit's PKIStatusInfo is malformed")
	}
	cause := fmt.Errorf("api: unit rejected the query with status %d, failInfo %x", status, bits.Bytes)
	switch {
	case bits.At(timeNotAvailable) == 1:
		return problem.New(problem.TimeUntrusted, "可信时间暂不可用,未签发时间戳 (trusted time not available)", "请等待时间恢复可信后重试 (retry when time is trusted again)").With(cause)
	case bits.At(badAlg) == 1:
		return problem.Invalid("digest.algorithm", "该时间戳单元不接受此摘要算法 (the unit does not take this digest algorithm)").With(cause)
	case bits.At(systemFailure) == 1:
		return problem.New(problem.NotReady, "时间戳单元暂不可用 (the timestamp unit is not available)", retryLater).With(cause)
	}
	return cause
}
