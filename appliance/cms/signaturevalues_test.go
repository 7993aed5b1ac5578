package cms_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"yinjian/appliance/cms"
)

// SignatureValues finds what Parse finds, in each message of the peers and of ours that Parse takes.
func TestSignatureValues(t *testing.T) {
	names, err := filepath.Glob("testdata/peer/*")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		sd, err := cms.Parse(b)
		if err != nil {
			continue
		}
		var want [][]byte
		for _, si := range sd.SignerInfos {
			want = append(want, si.Signature)
			for _, token := range si.TimeStampTokens() {
				inner, err := cms.Parse(token)
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, inner.SignerInfos[0].Signature)
			}
		}
		got, err := cms.SignatureValues(b)
		if err != nil || len(got) != len(want) {
			t.Errorf("%s: %d values, want %d, %v", name, len(got), len(want), err)
			continue
		}
		for i := range got {
			if !bytes.Equal(got[i], want[i]) {
				t.Errorf("%s: value %d = %x, want %x", name, i, got[i], want[i])
			}
		}
		found += len(got)
	}
	if found == 0 {
		t.Error("no message was read")
	}
}
