// A PKCS#11 module for tests: it passes calls on to another module and does wrong when a control file says so.
//
// C_Initialize's pReserved names "CONTROL=REAL", or "CONTROL=REAL\nARGS": the control file, mapped by this module and by
// the test, the real module, and the real module's own pReserved. The control file holds, for each function of the list,
// eight 64-bit integers.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef unsigned long ul;
typedef struct { unsigned char major, minor; } version;
typedef struct { version v; void *fn[68]; } list;
typedef struct { void *create, *destroy, *lock, *unlock; ul flags; void *reserved; } init_args;

enum { act_answer, act_crash, act_hang, act_logout, act_spoil };

struct control {
	long rv;    // what to answer
	long times; // how often yet
	long after; // 1: do the work first, then answer rv
	long calls; // counted here
	long value; // C_GetTokenInfo: ulMaxSessionCount to report; C_GetSlotList: by how much slots are renumbered; 0: as they are
	long act;   // instead of an answer: crash, never return, log out and do the work, C_Sign: spoil the signature
	long until; // 1: C_Finalize ends it
	long met;   // how often it was done, counted here
};

static list real, mine;
static struct control *control;

// take answers whether this call is one of those that go wrong.
static int take(struct control *c) {
	if (__atomic_load_n(&c->times, __ATOMIC_SEQ_CST) <= 0 || __atomic_fetch_sub(&c->times, 1, __ATOMIC_SEQ_CST) <= 0)
		return 0;
	__atomic_add_fetch(&c->met, 1, __ATOMIC_SEQ_CST);
	return 1;
}

static int before(int i, ul session, ul *rv) {
	struct control *c = &control[i];
	__atomic_add_fetch(&c->calls, 1, __ATOMIC_SEQ_CST);
	if (c->after || c->act == act_spoil || !take(c))
		return 0;
	switch (c->act) {
	case act_crash:
		*(volatile int *)8 = 0;
	case act_hang:
		for (;;)
			pause();
	case act_logout: {
		ul (*f)(ul) = real.fn[19];
		f(session);
		return 0;
	}
	}
	*rv = c->rv;
	return 1;
}

static ul after(int i, ul rv) {
	struct control *c = &control[i];
	if (!c->after || !take(c))
		return rv;
	return c->rv;
}

// The session comes first, in these.
#define WRAP(i, name, params, args, session) \
	static ul name params { \
		ul rv; \
		ul (*f) params = real.fn[i]; \
		return before(i, session, &rv) ? rv : after(i, f args); \
	}

WRAP(15, session_info, (ul session, void *info), (session, info), session)
WRAP(18, login, (ul session, ul user, void *pin, ul len), (session, user, pin, len), session)
WRAP(22, destroy_object, (ul session, ul object), (session, object), session)
WRAP(26, find_init, (ul session, void *attrs, ul n), (session, attrs, n), session)
WRAP(42, sign_init, (ul session, void *mechanism, ul key), (session, mechanism, key), session)
WRAP(59, generate_pair, (ul s, void *m, void *pub, ul np, void *priv, ul nq, ul *a, ul *b), (s, m, pub, np, priv, nq, a, b), s)
WRAP(12, open_session, (ul slot, ul flags, void *app, void *notify, ul *session), (slot - control[4].value, flags, app, notify, session), 0)
WRAP(7, mechanism_list, (ul slot, ul *mechanisms, ul *n), (slot - control[4].value, mechanisms, n), 0)

static ul sign(ul session, void *data, ul len, unsigned char *sig, ul *sig_len) {
	ul rv, (*f)(ul, void *, ul, unsigned char *, ul *) = real.fn[43];
	if (before(43, session, &rv))
		return rv;
	rv = f(session, data, len, sig, sig_len);
	if (rv == 0 && control[43].act == act_spoil && sig != NULL && take(&control[43]))
		sig[*sig_len - 1] ^= 1;
	return after(43, rv);
}

static ul slot_list(unsigned char present, ul *slots, ul *n) {
	ul rv, (*f)(unsigned char, ul *, ul *) = real.fn[4];
	if (before(4, 0, &rv))
		return rv;
	rv = f(present, slots, n);
	for (ul i = 0; rv == 0 && slots != NULL && i < *n; i++)
		slots[i] += control[4].value;
	return after(4, rv);
}

static ul token_info(ul slot, unsigned char *info) {
	ul rv, (*f)(ul, unsigned char *) = real.fn[6];
	if (before(6, 0, &rv))
		return rv;
	rv = f(slot - control[4].value, info);
	if (control[6].value) // label 32, manufacturer 32, model 16, serial 16, flags, ulMaxSessionCount
		memcpy(info + 96 + sizeof(ul), &control[6].value, sizeof(ul));
	return after(6, rv);
}

static ul finalize(void *reserved) {
	ul rv, (*f)(void *) = real.fn[1];
	for (int i = 0; i < 68; i++)
		if (control[i].until)
			__atomic_store_n(&control[i].times, 0, __ATOMIC_SEQ_CST);
	return before(1, 0, &rv) ? rv : after(1, f(reserved));
}

// pending stands in the list until the real module is known.
static ul pending(void) { return 0x190; }

static char *arguments;

static ul initialize(init_args *args) {
	ul rv, (*f)(void *) = NULL, (*get)(list **) = NULL;
	if (control == NULL) {
		char *spec = args && args->reserved ? strdup(args->reserved) : NULL, *path = spec ? strchr(spec, '=') : NULL;
		if (path == NULL)
			return 7;
		*path++ = 0;
		if ((arguments = strchr(path, '\n')) != NULL)
			*arguments++ = 0;
		int fd = open(spec, O_RDWR | O_CLOEXEC);
		if (fd < 0)
			return 7;
		void *m = mmap(NULL, 68 * sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		void *h = dlopen(path, RTLD_NOW | RTLD_LOCAL);
		if (m == MAP_FAILED || h == NULL)
			return 7;
		*(void **)&get = dlsym(h, "C_GetFunctionList");
		list *l;
		if (get == NULL || get(&l) != 0)
			return 7;
		real = *l;
		control = m;
		for (int i = 0; i < 68; i++)
			if (mine.fn[i] == (void *)pending)
				mine.fn[i] = real.fn[i];
	}
	if (before(0, 0, &rv))
		return rv;
	init_args copy = *args;
	copy.reserved = arguments;
	*(void **)&f = real.fn[0];
	return after(0, f(&copy));
}

ul C_GetFunctionList(list **out) {
#ifdef FAULTY_LIST
	return FAULTY_LIST;
#endif
	mine.v = (version){ 2, 40 };
	for (int i = 0; control == NULL && i < 68; i++)
		mine.fn[i] = (void *)pending;
#ifdef MISSING
	mine.fn[MISSING] = NULL;
#endif
	mine.fn[0] = (void *)initialize;
	mine.fn[1] = (void *)finalize;
	mine.fn[4] = (void *)slot_list;
	mine.fn[6] = (void *)token_info;
	mine.fn[7] = (void *)mechanism_list;
	mine.fn[12] = (void *)open_session;
	mine.fn[15] = (void *)session_info;
	mine.fn[18] = (void *)login;
	mine.fn[22] = (void *)destroy_object;
	mine.fn[26] = (void *)find_init;
	mine.fn[42] = (void *)sign_init;
#if MISSING != 43
	mine.fn[43] = (void *)sign;
#endif
	mine.fn[59] = (void *)generate_pair;
	*out = &mine;
	return 0;
}
