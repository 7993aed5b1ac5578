package softtoken

import "time"

// Numbers of the neutral profile that PKCS#11 does not define. Those up to 0xFFFFF008 are those xipki uses for its
// neutral tokens, CKKNeutralSM4 and what follows CKMNeutralSM4CBC are ours.
const (
	CKKNeutralSM2 = 0xFFFFF001 // CKA_KEY_TYPE of pairs made by CKMNeutralSM2KeyPairGen
	CKKNeutralSM4 = 0xFFFFF002

	CKMNeutralSM2KeyPairGen = 0xFFFFF001
	CKMNeutralSM2           = 0xFFFFF002 // signs e (32 bytes), answers r ‖ s
	CKMNeutralSM2SM3        = 0xFFFFF003 // signs M: the token computes e = SM3(ZA ‖ M); the parameter is the ID
	CKMNeutralSM2Crypt      = 0xFFFFF004 // C1 ‖ C3 ‖ C2, C1 being 04 ‖ x ‖ y (GB/T 32918.4-2016 §6.1)
	CKMNeutralSM3           = 0xFFFFF005
	CKMNeutralSM4KeyGen     = 0xFFFFF006
	CKMNeutralSM4ECB        = 0xFFFFF007
	CKMNeutralSM4CBC        = 0xFFFFF008 // the parameter is the IV, 16 bytes
	CKMNeutralHMACSM3       = 0xFFFFF009
	CKMNeutralSM4CBCPad     = 0xFFFFF00A // the parameter is the IV; padding as CKM_AES_CBC_PAD's
	CKMNeutralSM4GCM        = 0xFFFFF00B // the parameter is CK_GCM_PARAMS: an IV of 12 bytes, a tag of 128 bits
	CKMNeutralSM4CMAC       = 0xFFFFF00C // GB/T 15852.1-2020 MAC algorithm 5, 16 bytes
	CKMNeutralSM2CryptDER   = 0xFFFFF00D // SM2Cipher (GM/T 0009-2012 §7.2)
)

// PKCS#11's own numbers (current mechanisms v2.40).
const (
	ckmRSAPKCSKeyPairGen   = 0x0000
	ckmRSAPKCS             = 0x0001
	ckmRSAPKCSPSS          = 0x000D
	ckmSHA256RSAPKCS       = 0x0040
	ckmSHA256              = 0x0250
	ckmGenericSecretKeyGen = 0x0350
	ckmECKeyPairGen        = 0x1040
	ckmECDSA               = 0x1041

	ckgMGF1SHA256 = 0x0002
)

// An operation is what a mechanism does, whatever its number.
type operation int

const (
	opGenSM2 operation = iota + 1
	opGenRSA
	opGenSecret
	opSM2Sign    // input e
	opSM2SignSM3 // input M
	opSM2SignZM  // input ZA ‖ M
	opRSAPKCS    // input is padded as it comes (RFC 8017 §8.2.1 step 2 without the hash)
	opSHA256RSAPKCS
	opRSAPSS // input is a SHA-256 digest
	opHMACSM3
	opSM3
	opSHA256
	opGenSM4
	opSM2Crypt
	opSM4ECB
	opSM4CBC
	opSM4CBCPad
	opSM4GCM
	opSM4CMAC
)

// A paramForm is how a mechanism's parameter is laid out.
type paramForm int

const (
	paramNone  paramForm = iota
	paramSM2ID           // the signer's ID, raw; none: 1234567812345678 (GM/T 0009-2012 §10)
	paramIV              // 16 bytes
	paramGCM             // CK_GCM_PARAMS, flattened by the module: u32 length | IV | u32 length | AAD | u64 tag bits
	paramPSS             // CK_RSA_PKCS_PSS_PARAMS of TLS 1.3's rsa_pss_rsae_sha256 (RFC 8446 §4.2.3), and nothing else
)

// An encoding is how an SM2 signature or ciphertext is written.
type encoding int

const (
	encRaw encoding = iota // r ‖ s, 64 bytes; C1 ‖ C3 ‖ C2
	encDER                 // SM2Signature (GM/T 0009-2012 §7.3), SM2Cipher (§7.2)
)

// A mechanism is one row of a profile.
type mechanism struct {
	number   uint64
	op       operation
	flags    uint64 // CK_MECHANISM_INFO
	min, max uint64 // key sizes: bits for SM2 and RSA, bytes for secret keys
	param    paramForm
	encoding encoding
}

const ecFlags = ckfECFp | ckfECNamedCurve | ckfECUncompress

// A profile is the set of numbers a token answers to. All that distinguishes vendors stands in it.
type profile struct {
	name       string
	sm2KeyType uint64 // CKA_KEY_TYPE that a vendor's key generation gives
	sm4KeyType uint64
	mechanisms []mechanism

	useCounter  uint64        // attribute that counts a private key's signatures; 0: none
	maxSessions int           // of one application with one token
	service     time.Duration // of a signature
	quirks      *quirks
}

var neutralProfile = &profile{
	name:       "neutral",
	sm2KeyType: CKKNeutralSM2,
	sm4KeyType: CKKNeutralSM4,

	useCounter:  ckaYinjianUses,
	maxSessions: maxSessions,
	mechanisms: []mechanism{
		{number: ckmRSAPKCSKeyPairGen, op: opGenRSA, flags: ckfGenerateKeyPair, min: 2048, max: 3072},
		{number: ckmRSAPKCS, op: opRSAPKCS, flags: ckfSign | ckfVerify, min: 2048, max: 3072},
		{number: ckmSHA256RSAPKCS, op: opSHA256RSAPKCS, flags: ckfSign | ckfVerify, min: 2048, max: 3072},
		{number: ckmRSAPKCSPSS, op: opRSAPSS, param: paramPSS, flags: ckfSign | ckfVerify, min: 2048, max: 3072},
		{number: ckmSHA256, op: opSHA256, flags: ckfDigest},
		{number: ckmGenericSecretKeyGen, op: opGenSecret, flags: ckfGenerate, min: minSecret, max: maxSecret},
		{number: ckmECKeyPairGen, op: opGenSM2, flags: ckfGenerateKeyPair | ecFlags, min: 256, max: 256},
		{number: ckmECDSA, op: opSM2Sign, flags: ckfSign | ckfVerify | ecFlags, min: 256, max: 256},
		{number: CKMNeutralSM2KeyPairGen, op: opGenSM2, flags: ckfGenerateKeyPair | ecFlags, min: 256, max: 256},
		{number: CKMNeutralSM2, op: opSM2Sign, flags: ckfSign | ckfVerify | ecFlags, min: 256, max: 256},
		{number: CKMNeutralSM2SM3, op: opSM2SignSM3, param: paramSM2ID, flags: ckfSign | ckfVerify | ecFlags, min: 256, max: 256},
		{number: CKMNeutralSM3, op: opSM3, flags: ckfDigest},
		{number: CKMNeutralSM4KeyGen, op: opGenSM4, flags: ckfGenerate, min: sm4Size, max: sm4Size},
		{number: CKMNeutralSM4ECB, op: opSM4ECB, flags: ckfEncrypt | ckfDecrypt, min: sm4Size, max: sm4Size},
		{number: CKMNeutralSM4CBC, op: opSM4CBC, param: paramIV, flags: ckfEncrypt | ckfDecrypt, min: sm4Size, max: sm4Size},
		{number: CKMNeutralSM4CBCPad, op: opSM4CBCPad, param: paramIV, flags: ckfEncrypt | ckfDecrypt | ckfWrap | ckfUnwrap, min: sm4Size, max: sm4Size},
		{number: CKMNeutralSM4GCM, op: opSM4GCM, param: paramGCM, flags: ckfEncrypt | ckfDecrypt | ckfWrap | ckfUnwrap, min: sm4Size, max: sm4Size},
		{number: CKMNeutralSM4CMAC, op: opSM4CMAC, flags: ckfSign | ckfVerify, min: sm4Size, max: sm4Size},
		{number: CKMNeutralSM2Crypt, op: opSM2Crypt, flags: ckfEncrypt | ckfDecrypt | ecFlags, min: 256, max: 256},
		{number: CKMNeutralSM2CryptDER, op: opSM2Crypt, encoding: encDER, flags: ckfEncrypt | ckfDecrypt | ecFlags, min: 256, max: 256},
		{number: CKMNeutralHMACSM3, op: opHMACSM3, flags: ckfSign | ckfVerify, min: minSecret, max: maxSecret},
	},
}

// find answers the row of a number, nil when the token does not have it.
func (p *profile) find(number uint64) *mechanism {
	for i := range p.mechanisms {
		if p.mechanisms[i].number == number {
			return &p.mechanisms[i]
		}
	}
	return nil
}

// isSM4KeyType says whether a CKA_KEY_TYPE denotes SM4 here; a profile need not have it.
func (p *profile) isSM4KeyType(v uint64) bool { return p.sm4KeyType != 0 && v == p.sm4KeyType }

// isSM2KeyType says whether a CKA_KEY_TYPE denotes SM2 here: the profile's own, or CKK_EC with the SM2 curve.
func (p *profile) isSM2KeyType(v uint64) bool { return v == ckkEC || v == p.sm2KeyType }
