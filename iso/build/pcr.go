package build

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// kernelPCR is the register into which systemd-stub measures an image's sections.
const kernelPCR = 11

// measured are those that it measures, in its order (systemd 252, src/fundamental/tpm-pcr.c).
var measured = []string{".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".pcrpkey"}

// predictPCR computes what PCR 11's SHA-256 bank holds when the image with these sections has been started: for each
// section its name with a final zero byte, then its content.
func predictPCR(sections []Section) [sha256.Size]byte {
	var pcr [sha256.Size]byte
	extend := func(b []byte) {
		sum := sha256.Sum256(b)
		pcr = sha256.Sum256(append(pcr[:], sum[:]...))
	}
	for _, name := range measured {
		for _, s := range sections {
			if s.Name == name {
				extend([]byte(name + "\x00"))
				extend(s.Data)
			}
		}
	}
	return pcr
}

// policyPCR is the TPM's policy digest after TPM2_PolicyPCR alone, for that value (TPM 2.0 part 3, §23.7).
func policyPCR(pcr [sha256.Size]byte) []byte {
	values := sha256.Sum256(pcr[:])
	b := make([]byte, sha256.Size) // the policy before
	b = binary.BigEndian.AppendUint32(b, 0x0000017f)
	b = binary.BigEndian.AppendUint32(b, 1)      // one selection
	b = binary.BigEndian.AppendUint16(b, 0x000b) // SHA-256
	b = append(b, 3, 0, 1<<(kernelPCR-8), 0)
	policy := sha256.Sum256(append(b, values[:]...))
	return policy[:]
}

// pcrSignature is the section .pcrsig, in the form of systemd-measure(1): the policy of these sections, signed by
// RSASSA-PKCS1-v1_5 with SHA-256. A volume sealed to the key opens for every image that carries such a signature.
func pcrSignature(sections []Section, key crypto.Signer) ([]byte, error) {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return nil, errors.New("build: PCR policies are signed with RSA, as systemd 252 verifies nothing else")
	}
	policy := policyPCR(predictPCR(sections))
	digest := sha256.Sum256(policy)
	signature, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing the PCR policy: %w", err)
	}
	print := sha256.Sum256(x509.MarshalPKCS1PublicKey(public))
	type entry struct {
		PCRs        []int  `json:"pcrs"`
		Fingerprint string `json:"pkfp"`
		Policy      string `json:"pol"`
		Signature   string `json:"sig"`
	}
	return json.Marshal(map[string][]entry{"sha256": {{[]int{kernelPCR}, hex.EncodeToString(print[:]), hex.EncodeToString(policy),
		base64.StdEncoding.EncodeToString(signature)}}})
}
