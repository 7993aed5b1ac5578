// Package profiles reads vendor profiles: TOML files that map what is asked of a PKCS#11 module to one vendor's numbers,
// forms, templates and rules. PKCS#11 v2.40 and 3.x define none for SM2, SM3 and SM4, and the vendors' tables contradict
// each other.
//
// hsm/pkcs11 drives a module by a profile, and hsm/softtoken answers to one, so both sides have the same table. Files are
// decoded strictly: an unknown key, a missing key and values that contradict each other are refused, all at once, with
// file and key named. How to write one is in docs/hsm.md.
package profiles

import (
	"bytes"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

//go:embed *.toml
var shipped embed.FS

// maxFile bounds a profile in bytes.
const maxFile = 64 << 10

// A Profile is one file. Optional values that are missing are zero.
type Profile struct {
	Name    string   `toml:"name"`    // lower-case letters, digits, hyphens
	Sources []string `toml:"sources"` // where the numbers were published
	// Tried is the machine that the profile was tried on, or "no".
	Tried      string                `toml:"tried"`
	Note       string                `toml:"note"`
	Match      Match                 `toml:"match"`
	Machine    Machine               `toml:"machine"`
	Errors     map[string]Number     `toml:"errors"` // a vendor's CKR_* to the one of PKCS#11 that it means
	Keys       map[string]*Key       `toml:"keys"`
	Operations map[string]*Operation `toml:"operations"`
}

// Match says which machines the profile is for: each value that is not empty must occur in what the machine says of
// itself, in whatever case.
type Match struct {
	Library      string   `toml:"library"`      // file name of the module
	Manufacturer string   `toml:"manufacturer"` // manufacturerID of CK_INFO or of CK_TOKEN_INFO
	Description  string   `toml:"description"`  // libraryDescription of CK_INFO
	Model        string   `toml:"model"`        // model of CK_TOKEN_INFO
	Version      []string `toml:"version"`      // libraryVersion of CK_INFO, first and last: ["2.0", "2.6"]
}

// Machine are the rules for sessions and login.
type Machine struct {
	MaxSessions int      `toml:"max_sessions"` // 0: as the token says
	ServiceTime Duration `toml:"service_time"` // of a signature, for the software cipher machine that answers to the profile
	ReadWrite   bool     `toml:"read_write"`   // signing needs CKF_RW_SESSION
	Login       string   `toml:"login"`        // "user" (default) or "none"
	LoginUser   Number   `toml:"login_user"`   // CKU_* of C_Login; 0: CKU_USER
	PINMin      int      `toml:"pin_min"`      // bytes
	PINMax      int      `toml:"pin_max"`
	PINDigits   bool     `toml:"pin_digits"`
	// Avoid are functions that must not be called; see the constants.
	Avoid []string `toml:"avoid"`
	// UseCounter is the attribute (CK_ULONG) of a private key that counts its signatures; 0: there is none.
	UseCounter Number `toml:"use_counter"`
}

// Functions that the appliance can do without.
const (
	GetMechanismList = "C_GetMechanismList" // what the token offers is then not looked at
	GetSessionInfo   = "C_GetSessionInfo"   // a lost login is then seen by its error alone
	GenerateRandom   = "C_GenerateRandom"   // the token's random source is then not available
)

// A Key says how keys of one algorithm are made and recognised.
type Key struct {
	Mechanism   *Number `toml:"mechanism"` // of C_GenerateKey or C_GenerateKeyPair
	KeyType     *Number `toml:"key_type"`
	SendKeyType *bool   `toml:"send_key_type"` // CKA_KEY_TYPE must, or must not, stand in the template
	Optional    bool    `toml:"optional"`      // some models do not have it
	// What follows is for SM2 alone.
	ECParams     Bytes  `toml:"ec_params"`      // CKA_EC_PARAMS
	SendECParams *bool  `toml:"send_ec_params"` // it must, or must not, stand in the template
	Point        string `toml:"point"`
	PointOn      string `toml:"point_on"` // "public", or "both" halves of the pair
	PointX       Number `toml:"point_x"`  // attributes, with PointXY
	PointY       Number `toml:"point_y"`
	// Omit are attributes that must not stand in a template although we usually give them.
	Omit []Number `toml:"omit"`
	// Public and Private are added to the templates, and win over what stands there already. A secret key has Private.
	Public  []Attribute `toml:"public"`
	Private []Attribute `toml:"private"`
}

// Forms of a public point.
const (
	PointOctetString  = "octet-string" // CKA_EC_POINT: DER of an OCTET STRING with 04 ‖ x ‖ y (mechanisms v2.40 §2.3.3)
	PointUncompressed = "uncompressed" // CKA_EC_POINT: 04 ‖ x ‖ y
	PointRaw          = "raw"          // CKA_EC_POINT: x ‖ y
	PointXY           = "xy"           // two attributes, 32 bytes each
	PointAuto         = "auto"         // one of the first three, known by its length
)

// An Attribute is one more entry of a template, with one of the three values.
type Attribute struct {
	Type   *Number `toml:"type"`
	Bool   *bool   `toml:"bool"`
	Number *Number `toml:"number"` // CK_ULONG
	Bytes  *Bytes  `toml:"bytes"`
}

// An Operation says how one operation is asked for.
type Operation struct {
	Mechanism *Number `toml:"mechanism"`
	Input     string  `toml:"input"`
	Parameter string  `toml:"parameter"`
	Output    string  `toml:"output"`
	Padding   string  `toml:"padding"`
	MultiPart bool    `toml:"multipart"` // C_…Update is possible
	Optional  bool    `toml:"optional"`  // some models do not have it
}

// Forms of input, parameter, output and padding.
const (
	InputE          = "e"           // 32 bytes, SM3(ZA ‖ M)
	InputM          = "m"           // the message; for SM2 the token computes ZA
	InputZM         = "zm"          // ZA ‖ M; the token hashes it
	InputDigest     = "digest"      // SHA-256, 32 bytes
	InputDigestInfo = "digest-info" // DER of DigestInfo with SHA-256 (RFC 8017 §9.2)

	ParameterNone      = "none"
	ParameterID        = "id"         // the signer's ID, its bytes alone
	ParameterKeyHandle = "key-handle" // CK_OBJECT_HANDLE
	ParameterIV        = "iv"
	ParameterGCM       = "gcm"          // CK_GCM_PARAMS
	ParameterGCMToken  = "gcm-token-iv" // CK_GCM_PARAMS without an IV: the token draws it and puts it before the ciphertext
	ParameterPSS       = "pss-sha256"   // CK_RSA_PKCS_PSS_PARAMS: SHA-256, MGF1 with SHA-256, salt of 32 bytes

	OutputRaw    = "raw"    // r ‖ s, 64 bytes
	OutputDER    = "der"    // SM2Signature, or SM2Cipher (GM/T 0009-2012 §7.2, §7.3)
	OutputAuto   = "auto"   // raw or DER; not published
	OutputC1C3C2 = "c1c3c2" // GM/T 0003.4-2012 as published
	OutputC1C2C3 = "c1c2c3" // its drafts

	PaddingHost  = "host"
	PaddingToken = "token"
)

// Keys and operations that a profile may name.
const (
	KeySM2     = "sm2"
	KeyRSA2048 = "rsa-2048"
	KeyHMACSM3 = "hmac-sm3"
	KeySM4     = "sm4"
	KeySM1     = "sm1"

	SM2SignE       = "sm2-sign-e"
	SM2SignMessage = "sm2-sign-message"
	RSAPKCS1       = "rsa-pkcs1-sha256"
	RSAPSS         = "rsa-pss-sha256"
	HMACSM3        = "hmac-sm3"
	SM3            = "sm3"
	SM2Encrypt     = "sm2-encrypt"
	SM4ECB         = "sm4-ecb"
	SM4CBC         = "sm4-cbc"
	SM4CBCPad      = "sm4-cbc-pad"
	SM4GCM         = "sm4-gcm"

	// C_WrapKey and C_UnwrapKey. A profile names them where the vendor says that these mechanisms wrap private keys.
	SM4GCMWrap    = "sm4-gcm-wrap"
	SM4CBCPadWrap = "sm4-cbc-pad-wrap"
)

// A rule says which forms an operation may have; none: the key must be missing.
type rule struct {
	input, parameter, output, padding []string
	key                               string // that must be described too
}

var (
	signature = []string{OutputRaw, OutputDER, OutputAuto}
	none      = []string{ParameterNone}
	paddings  = []string{PaddingHost, PaddingToken}
	plainGen  = rule{parameter: none}
	ecb       = rule{parameter: none, padding: paddings}
	cbc       = rule{parameter: []string{ParameterIV}, padding: paddings}
)

var rules = map[string]rule{
	SM2SignE:                {input: []string{InputE}, parameter: none, output: signature, key: KeySM2},
	SM2SignMessage:          {input: []string{InputM, InputZM}, parameter: []string{ParameterNone, ParameterID}, output: signature, key: KeySM2},
	RSAPKCS1:                {input: []string{InputDigestInfo}, parameter: none, key: KeyRSA2048},
	RSAPSS:                  {input: []string{InputDigest}, parameter: []string{ParameterPSS}, key: KeyRSA2048},
	HMACSM3:                 {input: []string{InputM}, parameter: none, key: KeyHMACSM3},
	SM3:                     {input: []string{InputM}, parameter: none},
	"hmac-sm3-digest":       {input: []string{InputM}, parameter: []string{ParameterKeyHandle}}, // C_DigestInit, not C_SignInit
	"sm3-za":                {input: []string{InputM}, parameter: []string{ParameterKeyHandle}}, // C_DigestInit, answers e
	"sm2-keygen-encryption": plainGen,
	SM2Encrypt:              {parameter: none, output: []string{OutputC1C3C2, OutputC1C2C3, OutputDER, OutputAuto}},
	"sm2-wrap":              plainGen,
	SM4ECB:                  ecb,
	"sm4-ecb-pad":           ecb,
	SM4CBC:                  cbc,
	SM4CBCPad:               cbc,
	SM4GCM:                  {parameter: []string{ParameterGCM}},
	SM4GCMWrap:              {parameter: []string{ParameterGCMToken}, key: KeySM4},
	SM4CBCPadWrap:           {parameter: []string{ParameterIV}, key: KeySM4},
	"sm4-mac":               {parameter: []string{ParameterNone, ParameterIV}},
	"sm1-ecb":               ecb,
	"sm1-cbc":               cbc,
}

// CKA_* that the checks name.
const (
	CKAKeyType  = 0x100
	CKAECParams = 0x180
	CKAECPoint  = 0x181
)

// A Number is any 64-bit number: a TOML integer, or a string like "0x8000000080000001" for those above 2^63.
type Number uint64

// UnmarshalText reads a decimal number, or a hexadecimal one after 0x.
func (n *Number) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 0, 64)
	*n = Number(v)
	return taken(b, err)
}

// Bytes are written as hexadecimal digits.
type Bytes []byte

// UnmarshalText reads hexadecimal digits.
func (h *Bytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return taken(b, err)
}

// A Duration is written as "1ms".
type Duration time.Duration

// UnmarshalText reads Go's duration syntax.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return taken(b, err)
}

// Names lists the profiles that are shipped, sorted.
func Names() []string {
	entries, _ := shipped.ReadDir(".") // an embedded folder
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".toml"))
	}
	slices.Sort(names)
	return names
}

// IsPath says whether Load would take s for the path of a file, rather than for a name.
func IsPath(s string) bool { return strings.Contains(s, "/") || strings.HasSuffix(s, ".toml") }

// Load answers the shipped profile of that name, or the one of a file.
func Load(nameOrPath string) (*Profile, error) {
	if !IsPath(nameOrPath) {
		file := nameOrPath + ".toml"
		b, err := shipped.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("没有名为 %q 的厂商档案，可用：%s；或给出文件路径 (no profile has this name; give one of these, or a file's path)",
				nameOrPath, strings.Join(Names(), "、"))
		}
		p, err := Parse(b)
		if err == nil && p.Name != nameOrPath {
			err = fmt.Errorf("name: 须为 %q (must be the file's name)", nameOrPath)
		}
		if err != nil {
			return nil, fmt.Errorf("厂商档案 %s (vendor profile): %w", file, err)
		}
		return p, nil
	}
	info, err := os.Stat(nameOrPath)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxFile) {
		err = fmt.Errorf("须为至多 %d 字节的普通文件 (want a regular file of at most so many bytes)", maxFile)
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(nameOrPath)
	}
	var p *Profile
	if err == nil {
		p, err = Parse(b)
	}
	if err != nil {
		return nil, fmt.Errorf("厂商档案 %s (vendor profile): %w", nameOrPath, err)
	}
	return p, nil
}

// Parse reads a profile. Everything wrong is reported at once, with the key's path.
func Parse(b []byte) (*Profile, error) {
	p := new(Profile)
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(p); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			var errs []error
			for _, e := range strict.Errors {
				row, col := e.Position()
				errs = append(errs, fmt.Errorf("%d:%d: 未知的键 %s (unknown key)", row, col, strings.Join(e.Key(), ".")))
			}
			return nil, errors.Join(errs...)
		}
		var wrong *toml.DecodeError
		if errors.As(err, &wrong) {
			row, col := wrong.Position()
			return nil, fmt.Errorf("%d:%d: %s: 值不能读 (cannot be read): %w", row, col, strings.Join(wrong.Key(), "."), err)
		}
		var bad *valueError
		if errors.As(err, &bad) {
			var all map[string]any
			_ = toml.Unmarshal(b, &all) // it is well-formed: its values were reached
			return nil, fmt.Errorf("%s: 值不能读 (cannot be read): %w", keyOf(all, bad.text), err)
		}
		return nil, fmt.Errorf("不能读 (cannot be read): %w", err)
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	return p, nil
}

// A valueError is a value that its type does not take. The decoder does not say where it stood.
type valueError struct {
	text string
	err  error
}

func (v *valueError) Error() string { return fmt.Sprintf("%q: %v", v.text, v.err) }
func (v *valueError) Unwrap() error { return v.err }

func taken(text []byte, err error) error {
	if err != nil {
		return &valueError{string(text), err}
	}
	return nil
}

// keyOf answers the path of the first key, in order, whose value is written as text.
func keyOf(v any, text string) string {
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			if rest := keyOf(v[k], text); rest != "-" {
				return strings.TrimSuffix(k+"."+rest, ".")
			}
		}
	case []any:
		for i, e := range v {
			if rest := keyOf(e, text); rest != "-" {
				return strings.TrimSuffix(fmt.Sprintf("%d.%s", i, rest), ".")
			}
		}
	default:
		if fmt.Sprint(v) == text {
			return ""
		}
	}
	return "-"
}

// Avoids says whether the function must not be called.
func (p *Profile) Avoids(function string) bool { return slices.Contains(p.Machine.Avoid, function) }
