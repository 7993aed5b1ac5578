package uses_test

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/cms"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/uses"
	"yinjian/hsm"
	"yinjian/hsm/uselog"
	"yinjian/tsa"
)

// Signatures are found in each form in which the product keeps them.
func TestSignaturesIn(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	root := h.CAs[string(hsm.SM2)].Certificate()
	crl := h.Directory.CRL(string(hsm.RSA2048))
	token, err := h.Stampers[string(hsm.SM2)].Issue(t.Context(), &tsa.Request{Imprint: tsa.ImprintOf([]byte("m")), CertReq: true})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := cms.Parse(token.DER)
	if err != nil {
		t.Fatal(err)
	}
	object, err := json.Marshal(map[string]any{"name": "张三", "certificates": [][]byte{root.Raw}, "crl": map[string]any{"der": crl.DER}, "n": 1})
	if err != nil {
		t.Fatal(err)
	}
	raw := []byte{0x30, 0x06, 2, 1, 1, 2, 1, 1}
	one := func(b []byte) []uselog.Hash { return []uselog.Hash{sm3.Sum(b)} }
	for name, tt := range map[string]struct {
		in   []byte
		want []uselog.Hash
	}{
		"certificate": {root.Raw, one(root.Signature)},
		"token":       {token.DER, one(parsed.SignerInfos[0].Signature)},
		"signature":   {raw, one(raw)},
		"no object":   {[]byte(`{"a":"b"}`), nil},
	} {
		if got := uses.SignaturesIn(tt.in); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %x, want %x", name, got, tt.want)
		}
	}
	got := uses.SignaturesIn(object)
	if list := uses.SignaturesIn(crl.DER); len(got) != 2 || !slices.Contains(got, sm3.Sum(root.Signature)) || len(list) != 1 || !slices.Contains(got, list[0]) {
		t.Errorf("object: %x", got)
	}
}
