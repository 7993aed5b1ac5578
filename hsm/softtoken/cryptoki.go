package softtoken

import "encoding/binary"

// An rv is a CK_RV (PKCS#11 v2.40 base §5.1).
type rv uint64

const (
	ckrOK                         rv = 0x000
	ckrHostMemory                 rv = 0x002
	ckrSlotIDInvalid              rv = 0x003
	ckrGeneralError               rv = 0x005
	ckrFunctionFailed             rv = 0x006
	ckrArgumentsBad               rv = 0x007
	ckrAttributeReadOnly          rv = 0x010
	ckrAttributeSensitive         rv = 0x011
	ckrAttributeTypeInvalid       rv = 0x012
	ckrAttributeValueInvalid      rv = 0x013
	ckrActionProhibited           rv = 0x01B
	ckrDataLenRange               rv = 0x021
	ckrDeviceError                rv = 0x030
	ckrDeviceMemory               rv = 0x031
	ckrEncryptedDataInvalid       rv = 0x040
	ckrEncryptedDataLenRange      rv = 0x041
	ckrFunctionNotSupported       rv = 0x054
	ckrKeyHandleInvalid           rv = 0x060
	ckrKeyTypeInconsistent        rv = 0x063
	ckrKeyFunctionNotPermitted    rv = 0x068
	ckrKeyNotWrappable            rv = 0x069
	ckrKeyUnextractable           rv = 0x06A
	ckrMechanismInvalid           rv = 0x070
	ckrMechanismParamInvalid      rv = 0x071
	ckrObjectHandleInvalid        rv = 0x082
	ckrOperationActive            rv = 0x090
	ckrOperationNotInitialized    rv = 0x091
	ckrPINIncorrect               rv = 0x0A0
	ckrPINInvalid                 rv = 0x0A1
	ckrPINLenRange                rv = 0x0A2
	ckrPINLocked                  rv = 0x0A4
	ckrSessionCount               rv = 0x0B1
	ckrSessionHandleInvalid       rv = 0x0B3
	ckrSessionParallel            rv = 0x0B4
	ckrSessionReadOnly            rv = 0x0B5
	ckrSessionExists              rv = 0x0B6
	ckrSessionReadOnlyExists      rv = 0x0B7
	ckrSessionReadWriteSOExists   rv = 0x0B8
	ckrSignatureInvalid           rv = 0x0C0
	ckrSignatureLenRange          rv = 0x0C1
	ckrTemplateIncomplete         rv = 0x0D0
	ckrTemplateInconsistent       rv = 0x0D1
	ckrTokenNotRecognized         rv = 0x0E1
	ckrUnwrappingKeyHandleInvalid rv = 0x0F0
	ckrUnwrappingKeyInconsistent  rv = 0x0F2
	ckrUserAlreadyLoggedIn        rv = 0x100
	ckrUserNotLoggedIn            rv = 0x101
	ckrUserPINNotInitialized      rv = 0x102
	ckrUserTypeInvalid            rv = 0x103
	ckrUserAnotherAlreadyLoggedIn rv = 0x104
	ckrWrappedKeyInvalid          rv = 0x110
	ckrWrappedKeyLenRange         rv = 0x112
	ckrWrappingKeyHandleInvalid   rv = 0x113
	ckrWrappingKeyInconsistent    rv = 0x115
	ckrCurveNotSupported          rv = 0x140
	ckrFunctionRejected           rv = 0x200
)

// Object classes (base §4.2), key types (§4.6) and the one certificate type.
const (
	ckoData        = 0
	ckoCertificate = 1
	ckoPublicKey   = 2
	ckoPrivateKey  = 3
	ckoSecretKey   = 4

	ckkRSA           = 0x00
	ckkEC            = 0x03
	ckkGenericSecret = 0x10

	ckcX509 = 0
)

// Attribute types (base §4).
const (
	ckaClass              = 0x000
	ckaToken              = 0x001
	ckaPrivate            = 0x002
	ckaLabel              = 0x003
	ckaApplication        = 0x010
	ckaValue              = 0x011
	ckaObjectID           = 0x012
	ckaCertificateType    = 0x080
	ckaIssuer             = 0x081
	ckaSerialNumber       = 0x082
	ckaTrusted            = 0x086
	ckaCertificateCat     = 0x087
	ckaKeyType            = 0x100
	ckaSubject            = 0x101
	ckaID                 = 0x102
	ckaSensitive          = 0x103
	ckaEncrypt            = 0x104
	ckaDecrypt            = 0x105
	ckaWrap               = 0x106
	ckaUnwrap             = 0x107
	ckaSign               = 0x108
	ckaSignRecover        = 0x109
	ckaVerify             = 0x10A
	ckaVerifyRecover      = 0x10B
	ckaDerive             = 0x10C
	ckaStartDate          = 0x110
	ckaEndDate            = 0x111
	ckaModulus            = 0x120
	ckaModulusBits        = 0x121
	ckaPublicExponent     = 0x122
	ckaPrivateExponent    = 0x123
	ckaCoefficient        = 0x128
	ckaValueLen           = 0x161
	ckaYinjianUses        = 0x80594A01 // vendor range: signatures a private key of the token has made, CK_ULONG
	ckaExtractable        = 0x162
	ckaLocal              = 0x163
	ckaNeverExtractable   = 0x164
	ckaAlwaysSensitive    = 0x165
	ckaKeyGenMechanism    = 0x166
	ckaModifiable         = 0x170
	ckaCopyable           = 0x171
	ckaDestroyable        = 0x172
	ckaECParams           = 0x180
	ckaECPoint            = 0x181
	ckaAlwaysAuthenticate = 0x202
	ckaWrapWithTrusted    = 0x210
)

// Flags of sessions, slots, tokens and mechanisms, session states and user types (base §3).
const (
	ckfRWSession     = 0x2
	ckfSerialSession = 0x4

	ckfTokenPresent = 0x1

	ckfRNG                = 0x1
	ckfLoginRequired      = 0x4
	ckfUserPINInitialized = 0x8
	ckfTokenInitialized   = 0x400
	ckfUserPINCountLow    = 0x10000
	ckfUserPINFinalTry    = 0x20000
	ckfUserPINLocked      = 0x40000
	ckfSOPINCountLow      = 0x100000
	ckfSOPINFinalTry      = 0x200000
	ckfSOPINLocked        = 0x400000

	ckfEncrypt         = 0x100
	ckfDecrypt         = 0x200
	ckfDigest          = 0x400
	ckfSign            = 0x800
	ckfVerify          = 0x2000
	ckfGenerate        = 0x8000
	ckfGenerateKeyPair = 0x10000
	ckfWrap            = 0x20000
	ckfUnwrap          = 0x40000
	ckfECFp            = 0x100000
	ckfECNamedCurve    = 0x800000
	ckfECUncompress    = 0x1000000

	cksROPublic = 0
	cksROUser   = 1
	cksRWPublic = 2
	cksRWUser   = 3
	cksRWSO     = 4

	ckuSO      = 0
	ckuUser    = 1
	ckuContext = 2

	ckUnavailable = ^uint64(0)
)

// ulong is a CK_ULONG as it lies in memory.
func ulong(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }

func boolean(v bool) []byte {
	if v {
		return []byte{1}
	}
	return []byte{0}
}
