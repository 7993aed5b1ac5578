package cms

import (
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// SignatureValues answers the signature of each SignerInfo of a ContentInfo with SignedData, and those of the timestamp
// tokens in their unsigned attributes. It is for those who look for signatures in many messages that were checked
// already: nothing else is parsed, nothing is verified, and the values are parts of in.
func SignatureValues(in []byte) ([][]byte, error) { return signatureValues(in, 0) }

func signatureValues(in []byte, depth int) (values [][]byte, err error) {
	bad := func(what string) error { return fmt.Errorf("cms: %s: %w", what, ErrMalformed) }
	s := cryptobyte.String(in)
	var info, explicit, body, signers cryptobyte.String
	if !s.ReadASN1(&info, der.SEQUENCE) || !s.Empty() || !info.SkipASN1(der.OBJECT_IDENTIFIER) ||
		!info.ReadASN1(&explicit, tagContext0) || !explicit.ReadASN1(&body, der.SEQUENCE) {
		return nil, bad("ContentInfo")
	}
	if !body.SkipASN1(der.INTEGER) || !body.SkipASN1(der.SET) || !body.SkipASN1(der.SEQUENCE) ||
		!body.SkipOptionalASN1(tagContext0) || !body.SkipOptionalASN1(tagContext1) || !body.ReadASN1(&signers, der.SET) {
		return nil, bad("SignedData")
	}
	for !signers.Empty() {
		var si, sid, value, unsigned cryptobyte.String
		var tag der.Tag
		var has bool
		if !signers.ReadASN1(&si, der.SEQUENCE) || !si.SkipASN1(der.INTEGER) || !si.ReadAnyASN1(&sid, &tag) || !si.SkipASN1(der.SEQUENCE) ||
			!si.SkipOptionalASN1(tagContext0) || !si.SkipASN1(der.SEQUENCE) || !si.ReadASN1(&value, der.OCTET_STRING) ||
			!si.ReadOptionalASN1(&unsigned, &has, tagContext1) {
			return nil, bad("SignerInfo")
		}
		values = append(values, value)
		for depth == 0 && !unsigned.Empty() {
			var attribute, set cryptobyte.String
			a := Attribute{}
			if !unsigned.ReadASN1(&attribute, der.SEQUENCE) || !attribute.ReadASN1ObjectIdentifier(&a.Type) || !attribute.ReadASN1(&set, der.SET) {
				return nil, bad("unsigned attribute")
			}
			for a.Type.Equal(OIDSignatureTimeStamp) && !set.Empty() {
				var token cryptobyte.String
				if !set.ReadAnyASN1Element(&token, &tag) {
					return nil, bad("timestamp token")
				}
				more, err := signatureValues(token, depth+1)
				if err != nil {
					return nil, err
				}
				values = append(values, more...)
			}
		}
	}
	return values, nil
}
