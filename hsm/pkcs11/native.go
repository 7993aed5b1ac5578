package pkcs11

/*
#cgo linux LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

// The few types of PKCS#11 v2.40 that are passed here. On Unix the structures are not packed.
typedef unsigned long ck_ulong;
typedef struct { unsigned char major, minor; } ck_version;
typedef struct { ck_version version; void *fn[68]; } ck_function_list; // order of pkcs11f.h
typedef struct { ck_ulong mechanism; void *parameter; ck_ulong parameter_len; } ck_mechanism;

enum { fn_init_token = 9, fn_init_pin = 10, fn_login = 18, fn_sign_init = 42, fn_sign = 43 };

// used lists the functions that the host side calls: a module that leaves one out is refused instead of jumped into.
static const int used[] = { 0, 1, 2, 4, 6, 7, 9, 10, 12, 13, 15, 18, 19, 22, 24, 26, 27, 28, 42, 43, 58, 59, 64 };

enum { load_ok, load_dlopen, load_symbol, load_list, load_version, load_function };

// load_module opens the module, asks it for its function list and looks whether that list can be used. The handle is
// kept for the life of the process: SoftHSM2 is known to crash when it is unloaded.
static int load_module(const char *path, void **handle, ck_ulong *detail) {
	ck_ulong (*get)(ck_function_list **);
	ck_function_list *list = NULL;
	if ((*handle = dlopen(path, RTLD_NOW | RTLD_LOCAL)) == NULL)
		return load_dlopen;
	*(void **)&get = dlsym(*handle, "C_GetFunctionList");
	if (get == NULL)
		return load_symbol;
	if ((*detail = get(&list)) != 0 || list == NULL)
		return load_list;
	if (list->version.major < 2 || list->version.major > 3) {
		*detail = list->version.major;
		return load_version;
	}
	for (size_t i = 0; i < sizeof used / sizeof used[0]; i++)
		if (list->fn[used[i]] == NULL) {
			*detail = used[i];
			return load_function;
		}
	return load_ok;
}

static ck_ulong login(ck_function_list *list, ck_ulong session, ck_ulong user, unsigned char *pin, ck_ulong len) {
	ck_ulong (*f)(ck_ulong, ck_ulong, unsigned char *, ck_ulong) = list->fn[fn_login];
	return f(session, user, pin, len);
}

static ck_ulong init_token(ck_function_list *list, ck_ulong slot, unsigned char *pin, ck_ulong len,
                           unsigned char *label) {
	ck_ulong (*f)(ck_ulong, unsigned char *, ck_ulong, unsigned char *) = list->fn[fn_init_token];
	return f(slot, pin, len, label);
}

static ck_ulong init_pin(ck_function_list *list, ck_ulong session, unsigned char *pin, ck_ulong len) {
	ck_ulong (*f)(ck_ulong, unsigned char *, ck_ulong) = list->fn[fn_init_pin];
	return f(session, pin, len);
}

// sign does C_SignInit and one C_Sign, in one crossing from Go and without the length query (a second visit to a
// network device, and not understood by every vendor). *stage says which of the two failed.
static ck_ulong sign(ck_function_list *list, ck_ulong session, ck_ulong mechanism, void *param, ck_ulong param_len,
                     ck_ulong key, unsigned char *data, ck_ulong len, unsigned char *out, ck_ulong *out_len,
                     int *stage) {
	ck_ulong (*init)(ck_ulong, ck_mechanism *, ck_ulong) = list->fn[fn_sign_init];
	ck_ulong (*fin)(ck_ulong, unsigned char *, ck_ulong, unsigned char *, ck_ulong *) = list->fn[fn_sign];
	ck_mechanism m = { mechanism, param_len ? param : NULL, param_len };
	ck_ulong rv = init(session, &m, key);
	*stage = 0;
	if (rv != 0)
		return rv;
	*stage = 1;
	return fin(session, data, len, out, out_len);
}

// sign_only is C_Sign of an operation that C_SignInit has begun.
static ck_ulong sign_only(ck_function_list *list, ck_ulong session, unsigned char *data, ck_ulong len, unsigned char *out,
                          ck_ulong *out_len) {
	ck_ulong (*fin)(ck_ulong, unsigned char *, ck_ulong, unsigned char *, ck_ulong *) = list->fn[fn_sign];
	return fin(session, data, len, out, out_len);
}
*/
import "C"

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
)

// maxSignature bounds a signature: RSA-8192 is 1024 bytes.
const maxSignature = 1024

var elfMachines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64,
	"loong64": elf.EM_LOONGARCH, "riscv64": elf.EM_RISCV}

// checkModule refuses a file that is not a PKCS#11 module for this machine, before any of its code runs: dlopen
// executes constructors, and miekg/pkcs11 ignores a C_GetFunctionList that fails and then jumps through nil.
func checkModule(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("module %q: the path must be absolute", path)
	}
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("module: %w", err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("module %s: not a regular file", path)
	}
	if st.Mode().Perm()&0o002 != 0 {
		return fmt.Errorf("module %s: writable by everyone; it is code that will see the PIN", path)
	}
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("module %s: %w", path, err)
	}
	defer f.Close()
	if want, ok := elfMachines[runtime.GOARCH]; f.Type != elf.ET_DYN || ok && f.Machine != want {
		return fmt.Errorf("module %s: %v for %v, want a shared library for %s", path, f.Type, f.Machine, runtime.GOARCH)
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return fmt.Errorf("module %s: %w", path, err)
	}
	for _, s := range symbols {
		if s.Name == "C_GetFunctionList" && s.Section != elf.SHN_UNDEF {
			return nil
		}
	}
	return fmt.Errorf("module %s: no C_GetFunctionList, so not a PKCS#11 module", path)
}

// loadModule maps the module and answers miekg's context beside the function list that context uses.
//
// The list is read out of the context (v1.1.2: a pointer to struct { handle, list }), because p11-kit's client makes
// a new instance at each C_GetFunctionList, so that a list of our own would be another, uninitialised module. That
// the handle found there is the one dlopen gave us proves the layout.
func loadModule(path string) (*p11.Ctx, *C.ck_function_list, error) {
	if err := checkModule(path); err != nil {
		return nil, nil, err
	}
	cpath := C.CString(path)
	defer C.free(unsafe.Pointer(cpath))
	// dlerror's text belongs to the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var handle unsafe.Pointer
	var detail C.ck_ulong
	switch C.load_module(cpath, &handle, &detail) {
	case C.load_ok:
	case C.load_dlopen:
		return nil, nil, fmt.Errorf("module %s: dlopen: %s", path, C.GoString(C.dlerror()))
	case C.load_symbol:
		return nil, nil, fmt.Errorf("module %s: no C_GetFunctionList", path)
	case C.load_list:
		return nil, nil, fmt.Errorf("module %s: %w", path, &hsm.Error{Call: "C_GetFunctionList", RV: rvOr(uint(detail), hsm.CKR_GENERAL_ERROR)})
	case C.load_version:
		return nil, nil, fmt.Errorf("module %s: Cryptoki version %d is not supported, want 2 or 3", path, uint(detail))
	default:
		return nil, nil, fmt.Errorf("module %s: function %d of its list is missing", path, uint(detail))
	}
	ctx := p11.New(path)
	if ctx == nil {
		return nil, nil, fmt.Errorf("module %s: cannot be opened a second time", path)
	}
	inner := *(**struct {
		handle unsafe.Pointer
		list   *C.ck_function_list
	})(unsafe.Pointer(ctx))
	if inner == nil || inner.handle != handle || inner.list == nil {
		return nil, nil, fmt.Errorf("module %s: its function list cannot be had from miekg/pkcs11", path)
	}
	return ctx, inner.list, nil
}

type listPointer = *C.ck_function_list

func rvOr(rv, otherwise uint) uint {
	if rv == hsm.CKR_OK {
		return otherwise
	}
	return rv
}

// initialize calls C_Initialize with CKF_OS_LOCKING_OK and, when args is not empty, pReserved as a C string.
func initialize(ctx *p11.Ctx, args string) error {
	var opts []p11.InitializeOption
	if args != "" {
		// In C memory: a module may look at it from another thread, and miekg passes a structure that holds it.
		c := C.CString(args)
		defer C.free(unsafe.Pointer(c))
		opts = append(opts, p11.InitializeWithFlags(p11.CKF_OS_LOCKING_OK), p11.InitializeWithReserved(unsafe.Pointer(c)))
	}
	return call("C_Initialize", ctx.Initialize(opts...))
}

// call types what miekg answers.
func call(name string, err error) error {
	if err == nil {
		return nil
	}
	if rv, ok := err.(p11.Error); ok {
		return &hsm.Error{Call: name, RV: uint(rv)}
	}
	return fmt.Errorf("hsm: %s: %w", name, err)
}

func rvError(name string, rv C.ck_ulong) error {
	if rv == 0 {
		return nil
	}
	return &hsm.Error{Call: name, RV: uint(rv)}
}

func bytePointer(b []byte) *C.uchar { return (*C.uchar)(unsafe.Pointer(unsafe.SliceData(b))) }

// login, initToken and initPIN take the PIN as bytes that the caller can zeroise; miekg wants strings, whose copies
// stay behind in both heaps.
func (l *library) login(session p11.SessionHandle, user uint, pin []byte) error {
	return rvError("C_Login", C.login(l.list, C.ck_ulong(session), C.ck_ulong(user), bytePointer(pin), C.ck_ulong(len(pin))))
}

func (l *library) initToken(slot uint, soPIN []byte, label string) error {
	padded := make([]byte, labelSize)
	for i := copy(padded, label); i < len(padded); i++ {
		padded[i] = ' '
	}
	return rvError("C_InitToken", C.init_token(l.list, C.ck_ulong(slot), bytePointer(soPIN), C.ck_ulong(len(soPIN)), bytePointer(padded)))
}

func (l *library) initPIN(session p11.SessionHandle, pin []byte) error {
	return rvError("C_InitPIN", C.init_pin(l.list, C.ck_ulong(session), bytePointer(pin), C.ck_ulong(len(pin))))
}

// sign performs C_SignInit and C_Sign with a single-part input.
func (l *library) sign(session p11.SessionHandle, m Mechanism, key p11.ObjectHandle, data []byte) ([]byte, error) {
	if len(data) == 0 {
		data = make([]byte, 1)[:0] // some modules refuse a null pointer, even to nothing
	}
	out := make([]byte, maxSignature)
	n := C.ck_ulong(len(out))
	var stage C.int
	rv := C.sign(l.list, C.ck_ulong(session), C.ck_ulong(m.Type), unsafe.Pointer(unsafe.SliceData(m.Parameter)), C.ck_ulong(len(m.Parameter)),
		C.ck_ulong(key), bytePointer(data), C.ck_ulong(len(data)), bytePointer(out), &n, &stage)
	if rv != 0 {
		name := "C_SignInit"
		if stage == 1 {
			name = "C_Sign"
		}
		return nil, rvError(name, rv)
	}
	if n > maxSignature {
		// The module claims to have written past the end of what it was given.
		return nil, &hsm.Error{Call: "C_Sign", RV: hsm.CKR_GENERAL_ERROR}
	}
	return out[:n:n], nil
}

// signOnly is C_Sign alone.
func (l *library) signOnly(session p11.SessionHandle, data []byte) ([]byte, error) {
	out := make([]byte, maxSignature)
	n := C.ck_ulong(len(out))
	if rv := C.sign_only(l.list, C.ck_ulong(session), bytePointer(data), C.ck_ulong(len(data)), bytePointer(out), &n); rv != 0 {
		return nil, rvError("C_Sign", rv)
	}
	if n > maxSignature {
		return nil, &hsm.Error{Call: "C_Sign", RV: hsm.CKR_GENERAL_ERROR}
	}
	return out[:n:n], nil
}

// Functions that the probe calls where a module has them: places in the list.
const (
	fnSlotInfo      = 5
	fnMechanismInfo = 8
	fnCreateObject  = 20
	fnEncryptInit   = 29
	fnEncrypt       = 30
	fnDecryptInit   = 33
	fnDecrypt       = 34
	fnDigestInit    = 37
	fnDigest        = 38
)

// has says whether the module has a function that is not among those it must have.
func (l *library) has(fn int) bool { return l.list.fn[fn] != nil }
