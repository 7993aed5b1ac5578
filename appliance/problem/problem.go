// Package problem is the vocabulary of refusals: every "no" of the appliance has a stable code, a reason and a next
// step. Services answer a [*Problem]; api turns it into problem+json (RFC 9457) and the command line into one line.
// Reason and next step are Chinese first, because hospital staff read them; codes are for programs.
package problem

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A Code is stable over releases: clients switch on it.
type Code string

const (
	InvalidRequest        Code = "invalid_request"         // a field is missing, wrong or too long
	ContentRequired       Code = "content_required"        // digest given where content is needed
	TooLarge              Code = "too_large"               // body or field over its limit
	Unauthenticated       Code = "unauthenticated"         // HMAC missing or wrong
	ReplayedRequest       Code = "replayed_request"        // nonce seen before
	ClockSkew             Code = "clock_skew"              // request time outside the window
	Forbidden             Code = "forbidden"               // the application lacks the right
	ApplicationStopped    Code = "application_stopped"     // stopped by an administrator
	SignerUnknown         Code = "signer_unknown"          //
	SignerStopped         Code = "signer_stopped"          //
	SignerTest            Code = "signer_test"             // a test account, and an application of production
	KeyUnknown            Code = "key_unknown"             // the signer has no key of that algorithm
	KeyElsewhere          Code = "key_elsewhere"           // the key is in the other campus's cipher machine alone
	PINWrong              Code = "pin_wrong"               // with tries left
	PINLocked             Code = "pin_locked"              //
	LoginRequired         Code = "login_required"          // nobody has logged in, or the session has ended
	LoginFailed           Code = "login_failed"            // which part was wrong is not told
	PasswordEnded         Code = "password_ended"          // it has to be changed before anything else
	ConsentInsufficient   Code = "consent_insufficient"    // the application's policy asks for more
	AuthorizationBad      Code = "authorization_invalid"   // unknown, foreign, expired, or not for this digest
	AuthorizationSpent    Code = "authorization_spent"     //
	IdempotencyConflict   Code = "idempotency_conflict"    // same key, other body
	NotFound              Code = "not_found"               //
	Exists                Code = "exists"                  //
	CertificateUnusable   Code = "certificate_unusable"    // expired, revoked, or its status cannot be known
	CertificateAwaited    Code = "certificate_awaited"     // the key waits for its certificate
	CertificateMalformed  Code = "certificate_malformed"   // the file is none, or not of a kind that is read
	CertificateKeyUnknown Code = "certificate_key_unknown" // of no key of ours, or of another owner's
	CertificatePurpose    Code = "certificate_purpose"     // does not fit the key's one purpose, or is a CA's
	CertificateEncryption Code = "certificate_encryption"  // the second of a pair: it does not sign
	CertificateUntrusted  Code = "certificate_untrusted"   // no path to an anchor admitted for the purpose
	CertificateExpired    Code = "certificate_expired"     //
	CertificateRevoked    Code = "certificate_revoked"     // a known list says so
	CertificateSubject    Code = "certificate_subject"     // names somebody else
	CertificateWeak       Code = "certificate_weak"        // RSA under 2048 bits, SHA-1, MD5, other algorithms
	CRLMalformed          Code = "crl_malformed"           // the file is none, or of a kind that clears nothing
	CRLUntrusted          Code = "crl_untrusted"           // not by a known CA that may
	CRLOlder              Code = "crl_older"               // not newer than the one at hand
	CRLFuture             Code = "crl_future"              //
	TimestampInvalid      Code = "timestamp_invalid"       // what the caller brought does not verify
	TimeUntrusted         Code = "time_untrusted"          //
	JournalUnwritable     Code = "journal_unwritable"      //
	DiskReserve           Code = "disk_reserve"            // too little room left to sign safely
	HSMUnavailable        Code = "hsm_unavailable"         //
	HSMNeedsOperator      Code = "hsm_needs_operator"      // PIN refused by the cipher machine
	CentreUnavailable     Code = "centre_unavailable"      // the central database, which decides on changes of the directory
	DirectoryBehind       Code = "directory_behind"        // the other campus has changed the object, and its entry is not here
	DirectoryConflict     Code = "directory_conflict"      // the other campus changed the object at the same time
	DirectoryFrozen       Code = "directory_frozen"        // the two campuses do not agree on the object
	DirectoryStale        Code = "directory_stale"         // the copy of the other campus's directory is older than allowed
	RateLimited           Code = "rate_limited"            //
	NotReady              Code = "not_ready"               //
	WrongState            Code = "wrong_state"             // the appliance is in a state where this means nothing
	StartFailed           Code = "start_failed"            // the start went wrong
	JournalRefused        Code = "journal_refused"         // the journal does not continue what it was: a person has to look
	Timeout               Code = "timeout"                 // outcome may be unknown: retry with the same Idempotency-Key
	Internal              Code = "internal"                //
)

// A Problem is a refusal that is safe to show.
type Problem struct {
	Code   Code
	Detail string // reason, Chinese first
	Next   string // what to do, Chinese first
	Field  string // the request's field at fault, if one is: "authorization.id"
	// TriesLeft is set with PINWrong.
	TriesLeft int
	After     time.Duration // with RateLimited, if it is known: sooner it would be refused again
	Err       error         // cause, for the log only
}

func (p *Problem) Error() string {
	s := string(p.Code)
	if p.Field != "" {
		s += " (" + p.Field + ")"
	}
	s += ": " + p.Detail
	if p.Err != nil {
		s += ": " + p.Err.Error()
	}
	return s
}

func (p *Problem) Unwrap() error { return p.Err }

// New answers a refusal.
func New(code Code, detail, next string) *Problem {
	return &Problem{Code: code, Detail: detail, Next: next}
}

// Invalid is [InvalidRequest] for one field; format and args say what is wrong with it.
func Invalid(field, format string, args ...any) *Problem {
	return &Problem{Code: InvalidRequest, Field: field, Detail: fmt.Sprintf(format, args...), Next: "请按接口文档改正该字段后重试 (correct the field and send again)"}
}

// Misleads reports whether a character must not stand in text that people read as evidence or compare by eye, because
// it shows as nothing, as something else, or not alike everywhere:
//
//   - controls, format characters (among them those that turn the direction of writing, U+202E), and every
//     Default_Ignorable code point: zero-width marks, fillers (U+3164), variation selectors, tags;
//   - spaces other than U+0020 and U+3000, line and paragraph separators, the blank braille pattern;
//   - private use, which each font draws as it likes, code points that are no characters, and U+FFFD, which stands for
//     text that somebody lost.
//
// Combining marks stand: Tibetan and Uyghur names have them. A name in the traditional Mongolian script that needs free
// variation selectors, or a Han character that needs an ideographic one, is entered without. What looks alike in two
// scripts (Latin a, Cyrillic а) is not told apart.
func Misleads(r rune) bool {
	switch {
	case ' ' <= r && r <= '~', '\u4E00' <= r && r <= '\u9FFF', r == '\u3000': // most of what comes; the tables would say the same
		return false
	case r == utf8.RuneError, r == '\u2800':
		return true
	}
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Cs, unicode.Z,
		unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector, unicode.Noncharacter_Code_Point)
}

// CheckText refuses, with [InvalidRequest] for the field, a value that people will read as evidence and that is not 1 to
// max bytes of UTF-8, has white space at an end, or holds a character that [Misleads]. What a court reads is what was
// entered. It is nil for a good value. Package pki's signing context asks no more than this.
//
// Normalization (NFC) is not checked: é may come as one code point or as two, is stored as it came, and two spellings of
// one name are two values.
func CheckText(field, value string, max int) error {
	switch {
	case value == "":
		return Invalid(field, "缺少必填内容，须为 1–%d 字节 (missing; 1 to %d bytes)", max, max)
	case len(value) > max:
		return Invalid(field, "长度须为 1–%d 字节，现为 %d 字节；一个汉字占 3 字节 (1 to %d bytes)", max, len(value), max)
	case !utf8.ValidString(value):
		return Invalid(field, "不是有效的 UTF-8 (not UTF-8)")
	case strings.TrimSpace(value) != value:
		return Invalid(field, "首尾不能有空白 (leading or trailing white space)")
	}
	for _, r := range value {
		if Misleads(r) {
			return Invalid(field, "含不允许的字符 %U (character not allowed)", r)
		}
	}
	return nil
}

// With attaches the cause, which is logged and never shown.
func (p *Problem) With(err error) *Problem { q := *p; q.Err = err; return &q }

// CodeOf is the code of err's Problem, Internal for any other error, and "" for nil.
func CodeOf(err error) Code {
	var p *Problem
	switch {
	case err == nil:
		return ""
	case errors.As(err, &p):
		return p.Code
	default:
		return Internal
	}
}
