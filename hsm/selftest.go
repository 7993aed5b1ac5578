package hsm

import "context"

// A SelfTest is one test of an algorithm that ran inside a token, with a throw-away key or a published vector's.
type SelfTest struct {
	Algorithm string `json:"algorithm"` // "SM3", "SM2 sign/verify" …
	// Result is one of the constants; anything but Passed says why in Detail.
	Result string `json:"result"`
	// Basis says what the answer was held against: a published vector by its source, or a verification outside the token.
	Basis  string `json:"basis"`
	Detail string `json:"detail,omitempty"`
	TookUS int64  `json:"took_us"`
}

// Results of a [SelfTest].
const (
	SelfTestPassed      = "passed"
	SelfTestFailed      = "failed"      // the token answered wrongly
	SelfTestUnavailable = "unavailable" // the machine, or its profile, does not offer it, or would not do it
)

// A SelfTester is a [Token] that can try its algorithms now. Nothing is left on the token, and no key of the appliance's
// is used.
type SelfTester interface {
	SelfTest(ctx context.Context) ([]SelfTest, error)
}
