package stf

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/tsa"
)

// What a request asks of the response (reqType).
const (
	WithCertificate    = 0 // the response carries the authority's certificate
	WithoutCertificate = 1
)

const (
	unknownHash      = "摘要算法须为 SM3（1）或 SHA-256（4） (the hash algorithm must be SM3, 1, or SHA-256, 4)"
	unknownSignature = "签名算法须为 SGD_SM3_SM2（131585）或 SGD_SHA256_RSA（65540） (the signature algorithm must be one of these)"
)

// CreateTSRequest is STF_CreateTSRequest: the DER of a TimeStampReq for data, hashed here, with a nonce of 64 bits.
// reqType is [WithCertificate] or [WithoutCertificate]. ext must be empty: no unit of ours takes an extension.
//
// Errors: [InDataTooLong] above 64 MiB, [InvalidAlg], [InvalidRequest] for another reqType, [UnacceptedExtension],
// [SystemFailure].
func (e *Environment) CreateTSRequest(data []byte, reqType int, ext []byte, hashAlg HashAlgorithm) ([]byte, error) {
	if err := e.usable(); err != nil {
		return nil, err
	}
	var digest [32]byte
	switch {
	case len(data) > maxData:
		return nil, fail(InDataTooLong, "data", fmt.Sprintf("原文超过 %d 字节 (the data is too long)", maxData), nil)
	case reqType != WithCertificate && reqType != WithoutCertificate:
		return nil, fail(InvalidRequest, "req_type", "请求类型须为 0 或 1 (reqType must be 0 or 1)", nil)
	case len(ext) > 0:
		return nil, fail(UnacceptedExtension, "ext", "不接受扩展 (extensions are not accepted)", nil)
	case hashAlg == SM3:
		digest = sm3.Sum(data)
	case hashAlg == SHA256:
		digest = sha256.Sum256(data)
	default:
		return nil, fail(InvalidAlg, "hash_alg", unknownHash, nil)
	}
	imprint, err := tsa.NewImprint(hashAlg.oid(), digest[:])
	if err != nil {
		return nil, fail(SystemFailure, "", "无法生成请求 (no request could be made)", err)
	}
	var nonce [8]byte
	rand.Read(nonce[:]) // never fails (crypto/rand)
	out, err := (&tsa.Request{Imprint: imprint, Nonce: new(big.Int).SetBytes(nonce[:]), CertReq: reqType == WithCertificate}).Bytes()
	if err != nil {
		return nil, fail(SystemFailure, "", "无法生成请求 (no request could be made)", err)
	}
	return out, nil
}

// CreateTSResponse is STF_CreateTSResponse: a unit that signs with sigAlg answers the DER TimeStampReq. A refusal of the
// unit is an error with the code of its PKIFailureInfo, and its TimeStampResp is answered beside the error.
//
// Errors besides: [InDataTooLong] above 16 KiB, [InvalidAlg] when no unit signs so, [ServerError] when the unit does not
// answer, or not this request.
func (e *Environment) CreateTSResponse(ctx context.Context, request []byte, sigAlg SignatureAlgorithm) ([]byte, error) {
	if err := e.usable(); err != nil {
		return nil, err
	}
	switch {
	case len(request) > maxRequest:
		return nil, fail(InDataTooLong, "request", fmt.Sprintf("时间戳请求超过 %d 字节 (the request is too long)", maxRequest), nil)
	case sigAlg != SM3SM2 && sigAlg != SHA256RSA:
		return nil, fail(InvalidAlg, "sig_alg", unknownSignature, nil)
	case e.config.Respond == nil:
		return nil, fail(ServerError, "", "没有时间戳服务 (there is no authority)", nil)
	}
	response, err := e.config.Respond(ctx, sigAlg, request)
	if errors.Is(err, ErrNoUnit) {
		return nil, fail(InvalidAlg, "sig_alg", "没有使用该签名算法的时间戳单元 (no unit signs with this algorithm)", err)
	}
	if err != nil {
		return nil, fail(ServerError, "", "时间戳服务没有应答 (the authority did not answer)", err)
	}
	r, err := tsa.ParseResponse(response)
	if err != nil {
		return nil, fail(ServerError, "", "时间戳服务的应答无法解析 (the authority's answer cannot be read)", err)
	}
	if r.Token == nil {
		return response, rejection(r, "")
	}
	asked, err := tsa.ParseRequest(request)
	if err == nil {
		err = r.Token.Answers(asked)
	}
	if err == nil && AlgorithmOf(r.Token) != sigAlg {
		err = errors.New("signed with another algorithm")
	}
	if err != nil {
		return nil, fail(ServerError, "", "时间戳服务的应答与请求不符 (the answer does not fit the request)", err)
	}
	return response, nil
}
