package pki_test

import (
	"bytes"
	"encoding/hex"
	"reflect"
	"strings"
	"testing"

	"yinjian/appliance/pki"
)

func fullContext() *pki.SigningContext {
	c := &pki.SigningContext{
		Application: "emr", Campus: "east", RecordID: "00ff", DocumentType: "discharge-summary",
		SignerRole: "attending", Department: "心内科", Test: true,
		DelegationGrantHash: new([32]byte), HandwritingHash: new([32]byte),
	}
	for i := range c.AuthorisationHash {
		c.AuthorisationHash[i] = 1
		c.DelegationGrantHash[i], c.HandwritingHash[i] = 2, 3
	}
	return c
}

// The encodings were put together by hand from the ASN.1 in the type's comment.
func TestSigningContextVectors(t *testing.T) {
	t.Parallel()
	minimal := &pki.SigningContext{Application: "emr", Campus: "east", RecordID: "00ff"}
	for i := range minimal.AuthorisationHash {
		minimal.AuthorisationHash[i] = 1
	}
	rep := func(b string) string { return strings.Repeat(b, 32) }
	for name, tt := range map[string]struct {
		c   *pki.SigningContext
		der string
	}{
		"minimal": {minimal, "303c" + "020101" + "0c03656d72" + "0c0465617374" + "0c0430306666" + "0c00" + "0c00" + "0c00" + "0420" + rep("01")},
		"full": {fullContext(), "3081a6" + "020101" + "0c03656d72" + "0c0465617374" + "0c0430306666" +
			"0c11" + hex.EncodeToString([]byte("discharge-summary")) + "0c09" + hex.EncodeToString([]byte("attending")) +
			"0c09" + "e5bf83e58685e7a791" + "0420" + rep("01") + "8020" + rep("02") + "8120" + rep("03") + "8201ff"},
	} {
		got, err := tt.c.Marshal()
		if err != nil || hex.EncodeToString(got) != tt.der {
			t.Errorf("%s: %x, %v\nwant %s", name, got, err, tt.der)
			continue
		}
		back, err := pki.ParseSigningContext(got)
		if err != nil || !reflect.DeepEqual(back, tt.c) {
			t.Errorf("%s: back as %+v, %v", name, back, err)
		}
	}
}

func TestSigningContextRefuses(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*pki.SigningContext){
		"no application":        func(c *pki.SigningContext) { c.Application = "" },
		"no campus":             func(c *pki.SigningContext) { c.Campus = "" },
		"no record":             func(c *pki.SigningContext) { c.RecordID = "" },
		"long department":       func(c *pki.SigningContext) { c.Department = strings.Repeat("科", 43) },
		"long type":             func(c *pki.SigningContext) { c.DocumentType = strings.Repeat("a", 65) },
		"not UTF-8":             func(c *pki.SigningContext) { c.SignerRole = "\xff" },
		"control character":     func(c *pki.SigningContext) { c.SignerRole = "a\nb" },
		"direction of writing":  func(c *pki.SigningContext) { c.Department = "a\u202eb" },
		"line separator":        func(c *pki.SigningContext) { c.Department = "a\u2028b" },
		"zero byte in the name": func(c *pki.SigningContext) { c.Application = "a\x00" },
	} {
		c := fullContext()
		spoil(c)
		if der, err := c.Marshal(); err == nil {
			t.Errorf("%s: written as %x", name, der)
		}
	}
	good, err := fullContext().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([]byte) []byte{
		"trailing byte":     func(d []byte) []byte { return append(d, 0) },
		"version 2":         func(d []byte) []byte { return flip(d, 5, 3) },
		"explicit FALSE":    func(d []byte) []byte { return flip(d, len(d)-1, 0xff) },
		"BER's TRUE":        func(d []byte) []byte { return flip(d, len(d)-1, 1) },
		"unknown field":     func(d []byte) []byte { return flip(d, len(d)-3, 1) },
		"control inside":    func(d []byte) []byte { return bytes.Replace(d, []byte("emr"), []byte("e\tr"), 1) },
		"wrong string type": func(d []byte) []byte { return flip(d, 6, 0x0c^0x13) },
		"truncated":         func(d []byte) []byte { return d[:len(d)-1] },
		"nothing":           func([]byte) []byte { return nil },
		"over the size":     func([]byte) []byte { return make([]byte, 2000) },
		"long form of length": func(d []byte) []byte {
			return append([]byte{0x30, 0x82, 0}, d[2:]...)
		},
	} {
		if c, err := pki.ParseSigningContext(change(append([]byte{}, good...))); err == nil {
			t.Errorf("%s: read as %+v", name, c)
		}
	}
}

func FuzzSigningContext(f *testing.F) {
	full, _ := fullContext().Marshal()
	f.Add(full)
	small, _ := (&pki.SigningContext{Application: "a", Campus: "b", RecordID: "c"}).Marshal()
	f.Add(small)
	f.Fuzz(func(t *testing.T, der []byte) {
		c, err := pki.ParseSigningContext(der)
		if err != nil {
			return
		}
		again, err := c.Marshal()
		if err != nil || !bytes.Equal(again, der) {
			t.Errorf("%x was read and is written as %x, %v", der, again, err)
		}
	})
}
