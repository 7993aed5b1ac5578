package hsm

import (
	"errors"
	"fmt"
)

// An Error is a PKCS#11 return value that was not CKR_OK.
type Error struct {
	Call string // "C_Sign"
	RV   uint   // CK_RV
}

func (e *Error) Error() string { return fmt.Sprintf("hsm: %s: %s", e.Call, RVName(e.RV)) }

// Is lets errors.Is find [ErrNeedsOperator] in a refused PIN.
func (e *Error) Is(target error) bool {
	return target == ErrNeedsOperator && e.Class() == ClassFatal
}

// Class says what the caller of a failed call should do.
func (e *Error) Class() Class { return ClassOf(e.RV) }

// A Class groups return values by what is to be done about them.
type Class int

const (
	ClassUnknown      Class = iota // not in the table: treated as ClassReconnect by drivers
	ClassPermanent                 // the caller's mistake; no retry
	ClassSession                   // drop this session, open another, retry once
	ClassRefind                    // find the key again, retry once
	ClassLogin                     // log in again (single flight), find keys again
	ClassReconnect                 // close all, C_Finalize, C_Initialize, behind a breaker
	ClassBackpressure              // shrink the pool, wait
	ClassFatal                     // PIN refused: stop and tell a person, never retry
)

func (c Class) String() string {
	return [...]string{"unknown", "permanent", "session", "refind", "login", "reconnect", "backpressure", "fatal"}[c]
}

// PKCS#11 v2.40 return values that are acted on by name (OASIS PKCS #11 Base Specification v2.40 §5.1).
const (
	CKR_OK                    uint = 0x000
	CKR_CANCEL                uint = 0x001
	CKR_HOST_MEMORY           uint = 0x002
	CKR_SLOT_ID_INVALID       uint = 0x003
	CKR_GENERAL_ERROR         uint = 0x005
	CKR_FUNCTION_FAILED       uint = 0x006
	CKR_ARGUMENTS_BAD         uint = 0x007
	CKR_PIN_INCORRECT         uint = 0x0A0
	CKR_PIN_EXPIRED           uint = 0x0A3
	CKR_PIN_LOCKED            uint = 0x0A4
	CKR_USER_ALREADY_LOGGEDIN uint = 0x100
	CKR_WRAPPED_KEY_INVALID   uint = 0x110
)

var rvTable = map[uint]struct {
	name  string
	class Class
}{
	0x000: {"CKR_OK", ClassUnknown},
	0x001: {"CKR_CANCEL", ClassPermanent},
	0x002: {"CKR_HOST_MEMORY", ClassBackpressure},
	0x003: {"CKR_SLOT_ID_INVALID", ClassReconnect},
	0x005: {"CKR_GENERAL_ERROR", ClassReconnect},
	0x006: {"CKR_FUNCTION_FAILED", ClassReconnect},
	0x007: {"CKR_ARGUMENTS_BAD", ClassPermanent},
	0x008: {"CKR_NO_EVENT", ClassPermanent},
	0x009: {"CKR_NEED_TO_CREATE_THREADS", ClassPermanent},
	0x00A: {"CKR_CANT_LOCK", ClassPermanent},
	0x010: {"CKR_ATTRIBUTE_READ_ONLY", ClassPermanent},
	0x011: {"CKR_ATTRIBUTE_SENSITIVE", ClassPermanent},
	0x012: {"CKR_ATTRIBUTE_TYPE_INVALID", ClassPermanent},
	0x013: {"CKR_ATTRIBUTE_VALUE_INVALID", ClassPermanent},
	0x020: {"CKR_DATA_INVALID", ClassPermanent},
	0x021: {"CKR_DATA_LEN_RANGE", ClassPermanent},
	0x030: {"CKR_DEVICE_ERROR", ClassReconnect},
	0x031: {"CKR_DEVICE_MEMORY", ClassBackpressure},
	0x032: {"CKR_DEVICE_REMOVED", ClassReconnect},
	0x050: {"CKR_FUNCTION_CANCELED", ClassSession},
	0x054: {"CKR_FUNCTION_NOT_SUPPORTED", ClassPermanent},
	0x060: {"CKR_KEY_HANDLE_INVALID", ClassRefind},
	0x062: {"CKR_KEY_SIZE_RANGE", ClassPermanent},
	0x063: {"CKR_KEY_TYPE_INCONSISTENT", ClassPermanent},
	0x068: {"CKR_KEY_FUNCTION_NOT_PERMITTED", ClassPermanent},
	0x069: {"CKR_KEY_NOT_WRAPPABLE", ClassPermanent},
	0x06A: {"CKR_KEY_UNEXTRACTABLE", ClassPermanent},
	0x070: {"CKR_MECHANISM_INVALID", ClassPermanent},
	0x071: {"CKR_MECHANISM_PARAM_INVALID", ClassPermanent},
	0x082: {"CKR_OBJECT_HANDLE_INVALID", ClassRefind},
	0x090: {"CKR_OPERATION_ACTIVE", ClassSession},
	0x091: {"CKR_OPERATION_NOT_INITIALIZED", ClassSession},
	0x0A0: {"CKR_PIN_INCORRECT", ClassFatal},
	0x0A1: {"CKR_PIN_INVALID", ClassPermanent},
	0x0A2: {"CKR_PIN_LEN_RANGE", ClassFatal},
	0x0A3: {"CKR_PIN_EXPIRED", ClassFatal},
	0x0A4: {"CKR_PIN_LOCKED", ClassFatal},
	0x0B0: {"CKR_SESSION_CLOSED", ClassSession},
	0x0B1: {"CKR_SESSION_COUNT", ClassBackpressure},
	0x0B3: {"CKR_SESSION_HANDLE_INVALID", ClassSession},
	0x0B4: {"CKR_SESSION_PARALLEL_NOT_SUPPORTED", ClassPermanent},
	0x0B5: {"CKR_SESSION_READ_ONLY", ClassPermanent},
	0x0B6: {"CKR_SESSION_EXISTS", ClassPermanent},
	0x0B7: {"CKR_SESSION_READ_ONLY_EXISTS", ClassPermanent},
	0x0B8: {"CKR_SESSION_READ_WRITE_SO_EXISTS", ClassPermanent},
	0x0C0: {"CKR_SIGNATURE_INVALID", ClassPermanent},
	0x0C1: {"CKR_SIGNATURE_LEN_RANGE", ClassPermanent},
	0x0D0: {"CKR_TEMPLATE_INCOMPLETE", ClassPermanent},
	0x0D1: {"CKR_TEMPLATE_INCONSISTENT", ClassPermanent},
	0x0E0: {"CKR_TOKEN_NOT_PRESENT", ClassReconnect},
	0x0E1: {"CKR_TOKEN_NOT_RECOGNIZED", ClassReconnect},
	0x0E2: {"CKR_TOKEN_WRITE_PROTECTED", ClassPermanent},
	0x0F0: {"CKR_UNWRAPPING_KEY_HANDLE_INVALID", ClassRefind},
	0x0F1: {"CKR_UNWRAPPING_KEY_SIZE_RANGE", ClassPermanent},
	0x0F2: {"CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT", ClassPermanent},
	0x100: {"CKR_USER_ALREADY_LOGGED_IN", ClassPermanent},
	0x101: {"CKR_USER_NOT_LOGGED_IN", ClassLogin},
	0x102: {"CKR_USER_PIN_NOT_INITIALIZED", ClassFatal},
	0x103: {"CKR_USER_TYPE_INVALID", ClassPermanent},
	0x104: {"CKR_USER_ANOTHER_ALREADY_LOGGED_IN", ClassFatal},
	0x110: {"CKR_WRAPPED_KEY_INVALID", ClassPermanent},
	0x112: {"CKR_WRAPPED_KEY_LEN_RANGE", ClassPermanent},
	0x113: {"CKR_WRAPPING_KEY_HANDLE_INVALID", ClassRefind},
	0x114: {"CKR_WRAPPING_KEY_SIZE_RANGE", ClassPermanent},
	0x115: {"CKR_WRAPPING_KEY_TYPE_INCONSISTENT", ClassPermanent},
	0x120: {"CKR_RANDOM_SEED_NOT_SUPPORTED", ClassPermanent},
	0x121: {"CKR_RANDOM_NO_RNG", ClassPermanent},
	0x130: {"CKR_DOMAIN_PARAMS_INVALID", ClassPermanent},
	0x140: {"CKR_CURVE_NOT_SUPPORTED", ClassPermanent},
	0x150: {"CKR_BUFFER_TOO_SMALL", ClassPermanent},
	0x190: {"CKR_CRYPTOKI_NOT_INITIALIZED", ClassReconnect},
	0x191: {"CKR_CRYPTOKI_ALREADY_INITIALIZED", ClassPermanent},
	0x200: {"CKR_FUNCTION_REJECTED", ClassPermanent},
}

// ClassOf groups a return value, by PKCS#11 v2.40 §5.1 and by what SoftHSM2 2.6, NSS 3.87 and opencryptoki 3.8 do.
func ClassOf(rv uint) Class { return rvTable[rv].class }

// RVName is the PKCS#11 name of a return value, or its number where it has none here (vendor range).
func RVName(rv uint) string {
	if r, ok := rvTable[rv]; ok {
		return r.name
	}
	return fmt.Sprintf("CKR 0x%08X", rv)
}

// ClassifyError finds the class of err, [ClassUnknown] when it carries no return value.
func ClassifyError(err error) Class {
	var e *Error
	if errors.As(err, &e) {
		return e.Class()
	}
	return ClassUnknown
}
