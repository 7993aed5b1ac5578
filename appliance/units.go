package appliance

import (
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/cms"
	"yinjian/appliance/pki"
	"yinjian/hsm"
	"yinjian/tsa/stamping"
)

// TSA says which timestamp units there are.
type TSA struct {
	// Units are the timestamp units. Without any there are two: "sm2" and "rsa" (RSA-2048).
	Units []Unit `toml:"units,omitempty"`
	// Upstream, if it stands there, is a timestamp device beside our own units.
	Upstream *Upstream `toml:"upstream"`
}

// A Unit is one timestamp unit: one key at a time, one policy.
type Unit struct {
	// 时间戳单元的名称，即地址 `/tsa/名称`，以后不可改：小写字母、数字、连字符；一个也不写即有 `sm2` 与 `rsa` 两个 (a
	// timestamp unit, served at /tsa/NAME; with none written there are `sm2` and `rsa`)
	// 缺省：必填；不写任何单元即有 `sm2`、`rsa`
	Name string `toml:"name"`
	// `sm2`、`rsa2048`、`rsa3072` (the key)
	// 缺省：必填
	Algorithm string `toml:"algorithm"`
	// 时间戳策略 OID，点分写法 (the policy of its tokens)
	// 缺省：必填
	Policy string `toml:"policy"`
	// 其时间戳 accuracy 的上限，10ms 至 `time.accuracy`；误差上限超过它即拒绝 (ceiling of the accuracy field)
	// 缺省：`time.accuracy`
	Accuracy Duration `toml:"accuracy"`
	// `rfc3161`；SM2 单元也可为 `gm0010`（GM/T 0010 的外层标识）或 `gm0010-data`（内层类型写作 data）(identifiers of the
	// outer and inner type)
	// 缺省：`rfc3161`
	Profile string `toml:"profile"`
	// 时间戳写明由谁签发（字段 tsa，取证书主体），供要求它的旧客户端 (tokens name their unit, for clients that want it)
	// 缺省：`false`
	TSAName bool `toml:"tsa_name"`
}

var (
	reUnit         = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`)
	unitAlgorithms = map[string]hsm.Algorithm{"sm2": hsm.SM2, "rsa2048": hsm.RSA2048, "rsa3072": hsm.RSA3072}
	unitProfiles   = map[string]stamping.Terms{
		"rfc3161": {}, "gm0010": {Profile: cms.GM0010}, "gm0010-data": {Profile: cms.GM0010, ContentType: cms.OIDGMData},
	}
)

// units are the configured ones, or those there always were.
func (c *Config) units() []Unit {
	if len(c.TSA.Units) > 0 {
		return c.TSA.Units
	}
	return []Unit{
		{Name: "sm2", Algorithm: "sm2", Policy: pki.OIDPolicyTSASM2.String(), Accuracy: c.Time.Accuracy, Profile: "rfc3161"},
		{Name: "rsa", Algorithm: "rsa2048", Policy: pki.OIDPolicyTSARSA.String(), Accuracy: c.Time.Accuracy, Profile: "rfc3161"},
	}
}

func (c *Config) validateUnits(bad func(key, format string, args ...any)) {
	names := map[string]bool{}
	for i, u := range c.TSA.Units {
		at := fmt.Sprintf("tsa.units[%d].", i)
		if !reUnit.MatchString(u.Name) || strings.HasPrefix(u.Name, "ca-") || names[u.Name] { // tsa-ca-NAME.pem is its CA's file
			bad(at+"name", "须为小写字母、数字、连字符，至多 31 位，不以 ca- 开头，不可重复 (lower-case letters, digits, hyphens, not ca-…, each once)")
		}
		names[u.Name] = true
		if unitAlgorithms[u.Algorithm] == "" {
			bad(at+"algorithm", "须为 sm2、rsa2048 或 rsa3072 (must be sm2, rsa2048 or rsa3072)")
		}
		if _, err := parseOID(u.Policy); err != nil {
			bad(at+"policy", "须为点分对象标识符，如 2.999.2.2 (a dotted object identifier): %v", err)
		}
		if a := time.Duration(u.Accuracy); a < 10*time.Millisecond || a > time.Duration(c.Time.Accuracy) {
			bad(at+"accuracy", "须在 10ms 与 time.accuracy 之间 (between 10ms and time.accuracy)")
		}
		if _, ok := unitProfiles[u.Profile]; !ok || u.Profile != "rfc3161" && u.Algorithm != "sm2" {
			bad(at+"profile", "须为 rfc3161；SM2 单元也可为 gm0010、gm0010-data (must be rfc3161; for SM2 also gm0010, gm0010-data)")
		}
	}
}

func parseOID(text string) (asn1.ObjectIdentifier, error) {
	var oid asn1.ObjectIdentifier
	for arc := range strings.SplitSeq(text, ".") {
		n, err := strconv.ParseUint(arc, 10, 31)
		if err != nil || arc != strconv.FormatUint(n, 10) {
			return nil, errors.New("malformed")
		}
		oid = append(oid, int(n))
	}
	_, err := asn1.Marshal(oid)
	return oid, err
}

func (u *Unit) algorithm() hsm.Algorithm { return unitAlgorithms[u.Algorithm] }

// label is its first key's; those that follow have others.
func (u *Unit) label() string { return "tsa/" + u.Name }

// terms are what its tokens are made under.
func (u *Unit) terms() stamping.Terms {
	policy, err := parseOID(u.Policy)
	if err != nil {
		panic(err) // the configuration was validated
	}
	t := unitProfiles[u.Profile]
	t.Policy, t.Accuracy, t.TSAName = policy, time.Duration(u.Accuracy), u.TSAName
	return t
}

// unitFor is the unit that stamps signatures of an algorithm: the first of that kind of key under the profile that every
// verifier reads; nil: none.
func (a *Appliance) unitFor(alg hsm.Algorithm) *unit {
	for _, u := range a.cfg.units() {
		if u.Profile == "rfc3161" && (u.algorithm() == hsm.SM2) == (alg == hsm.SM2) {
			return a.units[u.Name]
		}
	}
	return nil
}

// unitNames are the names of all units that there are or were, those of the configuration first.
func (a *Appliance) unitNames() []string {
	var names []string
	for _, u := range a.cfg.units() {
		names = append(names, u.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(a.identity.Units)) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// addUnits makes the units known that were configured after the appliance was born: each has a key, and waits for its
// certificate.
func (a *Appliance) addUnits(ctx context.Context) error {
	for _, u := range a.cfg.units() {
		if a.identity.Units[u.Name] != nil {
			continue
		}
		info, _, err := ensureKey(ctx, a.tokens[hsm.TSA], u.label(), u.algorithm(), true)
		if err == nil {
			err = a.directory.AddKey(account.OwnKey{Owner: "tsa:" + u.Name, Label: u.label(), Algorithm: string(u.algorithm()), Class: hsm.TSA, Public: info.Public})
		}
		if err != nil {
			return fmt.Errorf("tsa.units: %s: %w", u.Name, err)
		}
	}
	return nil
}
