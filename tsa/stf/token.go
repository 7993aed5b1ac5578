package stf

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

// A Validity is what [Environment.VerifyTSValidity] found good, and what it could not look at.
type Validity struct {
	Token  *tsa.Token
	Signer *smx509.Certificate
	Given  bool // the certificate was given, not taken from the token
	// Unchecked are the checks of the certificate that were not made, by their ids in package pki: revocation, for want of a
	// list, or all of them in an environment that cannot judge. While there is one, nobody says that the token is valid.
	Unchecked []string
}

// VerifyTSValidity is STF_VerifyTSValidity: signature and purpose of the token in a response (or of a bare token), its
// algorithms against those given (0: as the token has them), and its certificate at genTime. cert, DER, wins over the one
// in the token; nil takes that. What the token stamps is not looked at, since the operation is not told.
//
// Errors: [Malformat], [InDataTooLong], [InvalidAlg], [InvalidSignature] (of the token or because its certificate was not
// good), [AddInfoNotAvailable] when there is no certificate, the code of a refusal, [SystemFailure].
func (e *Environment) VerifyTSValidity(response []byte, hashAlg HashAlgorithm, sigAlg SignatureAlgorithm, cert []byte) (*Validity, error) {
	if err := e.usable(); err != nil {
		return nil, err
	}
	token, err := tokenOf(response)
	if err != nil {
		return nil, err
	}
	v := &Validity{Token: token, Given: cert != nil}
	var given []*smx509.Certificate
	if v.Given {
		c, err := smx509.ParseCertificate(cert)
		if err != nil {
			return nil, fail(Malformat, "certificate", "给出的证书无法解析 (the given certificate cannot be read)", err)
		}
		given = append(given, c)
	}
	switch {
	case hashAlg != 0 && hashAlg.oid() == nil:
		return nil, fail(InvalidAlg, "hash_alg", unknownHash, nil)
	case sigAlg != 0 && sigAlg != SM3SM2 && sigAlg != SHA256RSA:
		return nil, fail(InvalidAlg, "sig_alg", unknownSignature, nil)
	case hashAlg != 0 && !token.Imprint.Equal(tsa.Imprint{Algorithm: hashAlg.oid(), Digest: token.Imprint.Digest}):
		return nil, fail(InvalidAlg, "hash_alg", "时间戳的摘要算法与所给不同 (the token's hash algorithm is not the one given)", nil)
	case sigAlg != 0 && AlgorithmOf(token) != sigAlg:
		return nil, fail(InvalidAlg, "sig_alg", "时间戳的签名算法与所给不同 (the token's signature algorithm is not the one given)", nil)
	}
	report, err := token.Verify(token.Imprint, given...)
	if report.Signer == nil && !v.Given {
		return nil, fail(AddInfoNotAvailable, "certificate", "时间戳不带证书，也未给出证书 (there is no certificate in the token, and none was given)", err)
	}
	if err != nil {
		return nil, fail(InvalidSignature, "response", "时间戳的签名验证不通过 (the token does not verify)", err)
	}
	v.Signer = report.Signer
	if v.Given && !bytes.Equal(v.Signer.Raw, cert) {
		return nil, fail(InvalidSignature, "response", "时间戳不是所给证书签的 (the token is not signed under the given certificate)", nil)
	}
	if e.config.Judge == nil {
		v.Unchecked = pki.PathChecks()
		return v, nil
	}
	for _, c := range e.config.Judge(v.Signer, token.Certificates(), token.GenTime).Checks {
		switch {
		case c.Status == pki.Passed:
		case c.Status == pki.Failed, c.ID != pki.CheckPathRevocation: // a path that leads to no anchor is no path
			return nil, fail(InvalidSignature, "response", "时间戳的证书在签发时不可信 (the token's certificate was not good when it was issued): "+c.Detail, nil)
		case !slices.Contains(v.Unchecked, c.ID):
			v.Unchecked = append(v.Unchecked, c.ID)
		}
	}
	return v, nil
}

// GetTSInfo is STF_GetTSInfo: who issued the token (the common name of the authority's certificate) and when. A token
// without certificate does not say who: [AddInfoNotAvailable].
func (e *Environment) GetTSInfo(response []byte) (issuer string, issued time.Time, err error) {
	token, signer, err := e.read(response)
	if err != nil {
		return "", time.Time{}, err
	}
	if signer == nil || signer.Subject.CommonName == "" {
		return "", time.Time{}, notTold("TSA 的名称 (the authority's name)", "时间戳不带证书 (the token has no certificate)")
	}
	return signer.Subject.CommonName, token.GenTime, nil
}

// An Item is what [Environment.GetTSDetail] is asked for.
type Item int

// Items, by the standard's numbers.
const (
	TimeOfIssue   Item = 1 // genTime, as GeneralizedTime
	SignerCN      Item = 2
	OriginalData  Item = 3 // of the request: a token has its digest alone, so this is never available
	ServerCert    Item = 4
	CertChain     Item = 5
	SourceOfTime  Item = 6 // who vouched for the time: in our journal, never in a token
	Precision     Item = 7 // the accuracy field, in seconds: "0.038s"
	ResponseType  Item = 8 // how the response was given: in our journal, never in a token
	SignerCountry Item = 9
	SignerOrg     Item = 10
	SignerCity    Item = 11
	SignerEmail   Item = 12
)

const (
	timeLayout    = "20060102150405.999999999Z"
	fromToken     = "token"
	fromJournal   = "journal"
	noCertificate = "时间戳不带证书 (the token has no certificate)"
)

// A Detail is one item: a text, or certificates in DER.
type Detail struct {
	Item         Item
	Text         string
	Certificates [][]byte
	From         string // "token" or "journal": who says so
}

// GetTSDetail is STF_GetTSDetail: one item of a token. Items 1, 2, 4, 5, 7 and 9 to 12 stand in the token, as far as it has
// a certificate and an accuracy; 6 and 8 are answered for tokens that the journal has. Anything else is
// [AddInfoNotAvailable]; a number that is no item is [InvalidItem].
func (e *Environment) GetTSDetail(ctx context.Context, response []byte, item Item) (*Detail, error) {
	if item < TimeOfIssue || item > SignerEmail {
		return nil, fail(InvalidItem, "item", "项目须为 1–12 (the item must be 1 to 12)", nil)
	}
	token, signer, err := e.read(response)
	if err != nil {
		return nil, err
	}
	d := &Detail{Item: item, From: fromToken}
	one := func(values []string) string {
		if len(values) == 0 {
			return ""
		}
		return values[0]
	}
	why := "证书中没有 (not in the certificate)"
	if signer == nil {
		signer, why = new(smx509.Certificate), noCertificate
	}
	switch item {
	case TimeOfIssue:
		d.Text = token.GenTime.Format(timeLayout)
	case SignerCN:
		d.Text = signer.Subject.CommonName
	case OriginalData:
		return nil, notTold("原始请求数据 (the original data)", "时间戳只含其摘要 (a token has its digest alone)")
	case ServerCert:
		if signer.Raw != nil {
			d.Certificates = [][]byte{signer.Raw}
		}
	case CertChain:
		if d.Certificates = chain(signer, token.Certificates()); len(d.Certificates) == 1 {
			return nil, notTold("证书链 (the chain)", "时间戳只带签名证书 (the token has the signer's certificate alone)")
		}
	case SourceOfTime, ResponseType:
		known, err := e.known(ctx, token)
		if err != nil {
			return nil, err
		}
		d.From = fromJournal
		if d.Text = known.TimeSource; item == ResponseType {
			d.Text = known.Transport
		}
		why = "只有本机日志所记的时间戳才知道 (known only for tokens in this appliance's journal)"
	case Precision:
		if token.Accuracy > 0 {
			d.Text = strconv.FormatFloat(token.Accuracy.Seconds(), 'f', -1, 64) + "s"
		}
		why = "时间戳没有 accuracy 字段 (the token has no accuracy field)"
	case SignerCountry:
		d.Text = one(signer.Subject.Country)
	case SignerOrg:
		d.Text = one(signer.Subject.Organization)
	case SignerCity:
		d.Text = one(signer.Subject.Locality)
	case SignerEmail:
		d.Text = one(signer.EmailAddresses)
	}
	if d.Text == "" && len(d.Certificates) == 0 {
		return nil, notTold(fmt.Sprintf("项目 %d (item %d)", item, item), why)
	}
	return d, nil
}

func notTold(what, why string) *Error {
	return fail(AddInfoNotAvailable, "", what+"无从得知 (not available): "+why, nil)
}

// read is the token of a response, and the certificate in it that it is signed under, nil when it has none. What a token
// with a bad signature says is not told.
func (e *Environment) read(response []byte) (*tsa.Token, *smx509.Certificate, error) {
	if err := e.usable(); err != nil {
		return nil, nil, err
	}
	token, err := tokenOf(response)
	if err != nil {
		return nil, nil, err
	}
	report, err := token.Verify(token.Imprint)
	if report.Signer != nil && err != nil {
		return nil, nil, fail(InvalidSignature, "response", "时间戳的签名验证不通过 (the token does not verify)", err)
	}
	if report.Signer == nil && report.Result(cms.CheckSigner) != cms.Passed {
		return nil, nil, fail(Malformat, "response", "时间戳的签名者不是一个 (not exactly one signer)", err)
	}
	return token, report.Signer, nil
}

// chain is the leaf and those above it among others, as far as they go.
func chain(leaf *smx509.Certificate, others []*smx509.Certificate) (out [][]byte) {
	for at := leaf; at != nil && at.Raw != nil && len(out) <= len(others); {
		out = append(out, at.Raw)
		var above *smx509.Certificate
		for _, c := range others {
			if bytes.Equal(c.RawSubject, at.RawIssuer) && !bytes.Equal(c.Raw, at.Raw) && at.CheckSignatureFrom(c) == nil {
				above = c
			}
		}
		at = above
	}
	return out
}

func (e *Environment) known(ctx context.Context, token *tsa.Token) (Known, error) {
	if e.config.Known == nil {
		return Known{}, nil
	}
	k, err := e.config.Known(ctx, token)
	if err != nil {
		return Known{}, fail(SystemFailure, "", "日志暂时无法查询 (the journal could not be asked)", err)
	}
	if k == nil {
		return Known{}, nil
	}
	return *k, nil
}
