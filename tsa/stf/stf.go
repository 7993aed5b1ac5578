// Package stf gives the operations of GM/T 0033's timestamp interface (STF_*) as Go functions over package tsa: making a
// request, having it answered, verifying a token, and asking for its items.
//
// Names, parameters, items and error numbers are those of the 2014 edition as products and headers in the field show them;
// the text of neither edition (2014, 2023) was read, and conformity with GM/T 0033-2023 is not claimed. Of the two
// numberings of errors in the field the one without gaps is used, 0x04000001 to 0x0400000E.
//
// What a token does not say is not made up: an item that neither the token nor the journal knows answers
// [AddInfoNotAvailable]. Transport and who may ask are left to package api.
package stf

import (
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

// Config is what an Environment works with. A nil field makes the operations that need it say so.
type Config struct {
	// Respond has a unit that signs with alg answer a DER TimeStampReq with a DER TimeStampResp, also for a refusal. An
	// error is [ErrNoUnit] or means that nobody answered.
	Respond func(ctx context.Context, alg SignatureAlgorithm, request []byte) ([]byte, error)
	// Known answers what the journal has of a token beyond what stands in it; nil when it has nothing.
	Known func(ctx context.Context, token *tsa.Token) (*Known, error)
	// Judge judges the path of a unit's certificate at a time.
	Judge func(leaf *smx509.Certificate, others []*smx509.Certificate, at time.Time) *pki.PathReport
}

// Known is what a journal says of a token.
type Known struct {
	TimeSource string // who vouched for the time, as the journal's reading has it
	Transport  string // how the response was given: "HTTP"; "" when it was given to nobody as a response
}

// ErrNoUnit means that no unit signs with the algorithm.
var ErrNoUnit = errors.New("stf: no timestamp unit signs with this algorithm")

// An Environment is the handle of one caller. Safe for concurrent use.
type Environment struct {
	config  Config
	cleared atomic.Bool
}

// InitEnvironment is STF_InitEnvironment: it makes the handle that the other operations work with.
func InitEnvironment(c Config) *Environment { return &Environment{config: c} }

// ClearEnvironment is STF_ClearEnvironment: operations after it answer [SystemFailure].
func (e *Environment) ClearEnvironment() { e.cleared.Store(true) }

func (e *Environment) usable() error {
	if e.cleared.Load() {
		return fail(SystemFailure, "", "环境已清除 (the environment was cleared)", nil)
	}
	return nil
}

// A HashAlgorithm is SGD_* of GM/T 0006.
type HashAlgorithm int

// Hash algorithms. SGD_SHA1 (2) is not taken.
const (
	SM3    HashAlgorithm = 1 // SGD_SM3
	SHA256 HashAlgorithm = 4 // SGD_SHA256
)

func (h HashAlgorithm) oid() asn1.ObjectIdentifier {
	switch h {
	case SM3:
		return cms.OIDSM3
	case SHA256:
		return cms.OIDSHA256
	}
	return nil
}

// A SignatureAlgorithm is SGD_* of GM/T 0006.
type SignatureAlgorithm int

// Signature algorithms of timestamp units.
const (
	SHA256RSA SignatureAlgorithm = 0x00010004 // SGD_SHA256_RSA
	SM3SM2    SignatureAlgorithm = 0x00020201 // SGD_SM3_SM2
)

// AlgorithmOf answers a token's signature algorithm, 0 for one that is not among ours.
func AlgorithmOf(token *tsa.Token) SignatureAlgorithm {
	m := token.Message()
	if m == nil || len(m.SignerInfos) != 1 {
		return 0
	}
	si := m.SignerInfos[0]
	digest, signature := si.DigestAlgorithm.OID, si.SignatureAlgorithm.OID
	switch {
	case digest.Equal(cms.OIDSM3) && (signature.Equal(cms.OIDSM2WithSM3) || signature.Equal(cms.OIDSM2Sign)):
		return SM3SM2
	case digest.Equal(cms.OIDSHA256) && (signature.Equal(cms.OIDRSA) || signature.Equal(cms.OIDSHA256WithRSA)):
		return SHA256RSA
	}
	return 0
}

// Limits of what is taken.
const (
	maxData     = 64 << 20 // of CreateTSRequest
	maxRequest  = 16 << 10
	maxResponse = 256 << 10
)

// A Code is one of GM/T 0033's error numbers.
type Code uint32

// Codes by the names of the standard's annex.
const (
	InDataTooLong       Code = 0x04000001 + iota // INDATA_TOOLONG
	NotEnoughMemory                              // NOT_ENOUGH_MEMORY: never answered, for no caller brings a buffer here
	ServerError                                  // SERVER_ERROR
	Malformat                                    // MALFORMAT: the response or certificate is none
	InvalidItem                                  // INVALID_ITEM
	InvalidSignature                             // INVALID_SIGNATURE
	InvalidAlg                                   // INVALID_ALG
	InvalidRequest                               // INVALID_REQUEST
	InvalidDataFormat                            // INVALID_DATAFORMAT
	TimeNotAvailable                             // TIME_NOT_AVAILABLE
	UnacceptedPolicy                             // UNACCEPTED_POLICY
	UnacceptedExtension                          // UNACCEPTED_EXTENSION
	AddInfoNotAvailable                          // ADDINFO_NOT_AVAILBLE, spelt so
	SystemFailure                                // SYSTEM_FAILURE
)

var codeNames = []string{
	"INDATA_TOOLONG", "NOT_ENOUGH_MEMORY", "SERVER_ERROR", "MALFORMAT", "INVALID_ITEM", "INVALID_SIGNATURE", "INVALID_ALG",
	"INVALID_REQUEST", "INVALID_DATAFORMAT", "TIME_NOT_AVAILABLE", "UNACCEPTED_POLICY", "UNACCEPTED_EXTENSION",
	"ADDINFO_NOT_AVAILBLE", "SYSTEM_FAILURE",
}

// String is number and name: "0x04000007 INVALID_ALG".
func (c Code) String() string {
	s := fmt.Sprintf("0x%08X", uint32(c))
	if c >= InDataTooLong && c <= SystemFailure {
		s += " " + codeNames[c-InDataTooLong]
	}
	return s
}

// An Error is what every operation refuses with.
type Error struct {
	Code      Code
	Parameter string // at fault: "data", "req_type", "ext", "hash_alg", "sig_alg", "request", "response", "certificate", "item"; or ""
	Detail    string // safe to show, Chinese first
	Err       error  // cause, for the log
}

func (e *Error) Error() string {
	s := "stf: " + e.Code.String() + ": " + e.Detail
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap is the cause.
func (e *Error) Unwrap() error { return e.Err }

func fail(c Code, parameter, detail string, cause error) *Error {
	return &Error{c, parameter, detail, cause}
}

// failures are PKIFailureInfo's bits by the standard's numbers.
var failures = map[tsa.Failure]Code{
	tsa.BadAlg: InvalidAlg, tsa.BadRequest: InvalidRequest, tsa.BadDataFormat: InvalidDataFormat, tsa.TimeNotAvailable: TimeNotAvailable,
	tsa.UnacceptedPolicy: UnacceptedPolicy, tsa.UnacceptedExtension: UnacceptedExtension, tsa.AddInfoNotAvailable: AddInfoNotAvailable,
	tsa.SystemFailure: SystemFailure,
}

// rejection is the error of a response without token; parameter is "response" for one that the caller brought.
func rejection(r *tsa.Response, parameter string) *Error {
	for _, f := range r.Failures {
		if code, ok := failures[f]; ok {
			return fail(code, parameter, fmt.Sprintf("时间戳服务拒绝了请求 (the authority refused the request): %v %q", f, r.Text), r.Err())
		}
	}
	return fail(ServerError, parameter, fmt.Sprintf("时间戳服务拒绝了请求，未说明原因 (the authority refused the request and did not say why): %q", r.Text), r.Err())
}

// tokenOf reads a TimeStampResp, or a bare TimeStampToken.
func tokenOf(response []byte) (*tsa.Token, error) {
	if len(response) > maxResponse {
		return nil, fail(InDataTooLong, "response", fmt.Sprintf("时间戳响应超过 %d 字节 (the response is too long)", maxResponse), nil)
	}
	r, err := tsa.ParseResponse(response)
	if err == nil && r.Token == nil {
		return nil, rejection(r, "response")
	}
	if err == nil {
		return r.Token, nil
	}
	token, terr := tsa.ParseToken(response)
	if terr != nil {
		return nil, fail(Malformat, "response", "不是时间戳响应 (not a TimeStampResp)", errors.Join(err, terr))
	}
	return token, nil
}
