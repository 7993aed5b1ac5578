// A PKCS#11 module for tests: it passes calls on to the module REAL, writes each C_Login to the file LOG, and misbehaves in
// the functions that are defined below:
//
//	CRASH=n  SIGSEGV in function n of the list
//	ABORT=n  abort() in it
//	HANG=n   does not return from it
//	NO_SESSION_KEYS  C_GenerateKeyPair refuses session objects
//	TWICE    a second C_Login is answered with CKR_OK
//	FINDS_ALL  C_FindObjectsInit does not look at the template
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ul;
typedef struct { unsigned char major, minor; } version;
typedef struct { version v; void *fn[68]; } list;
typedef struct { ul type; void *value; ul len; } attribute;

static list mine;
static ul (*real_login)(ul, ul, void *, ul);
static ul (*real_find)(ul, attribute *, ul);
static ul (*real_pair)(ul, void *, attribute *, ul, attribute *, ul, ul *, ul *);

static ul crash(void) {
	*(volatile int *)8 = 1;
	return 0;
}

static ul aborts(void) {
	abort();
}

static ul hang(void) {
	for (;;)
		pause();
}

static ul login(ul session, ul user, void *pin, ul len) {
	int fd = open(LOG, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, "x", 1) != 1)
		return 5;
	close(fd);
	ul rv = real_login(session, user, pin, len);
#ifdef TWICE
	return rv == 0x100 ? 0 : rv;
#endif
	return rv;
}

static ul pair(ul s, void *m, attribute *pub, ul np, attribute *priv, ul nq, ul *a, ul *b) {
	for (ul i = 0; i < nq; i++)
		if (priv[i].type == 1 && priv[i].len == 1 && *(char *)priv[i].value == 0)
			return 0xD1; // CKR_TEMPLATE_INCONSISTENT
	return real_pair(s, m, pub, np, priv, nq, a, b);
}

static ul find(ul s, attribute *t, ul n) {
	return real_find(s, NULL, 0);
}

ul C_GetFunctionList(list **out) {
	ul (*get)(list **) = NULL;
	list *l;
	void *h = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
	if (h == NULL || (*(void **)&get = dlsym(h, "C_GetFunctionList")) == NULL || get(&l) != 0)
		return 5;
	mine = *l;
	*(void **)&real_login = mine.fn[18];
	*(void **)&real_pair = mine.fn[59];
	mine.fn[18] = (void *)login;
	*(void **)&real_find = mine.fn[26];
#ifdef FINDS_ALL
	mine.fn[26] = (void *)find;
#endif
#ifdef NO_SESSION_KEYS
	mine.fn[59] = (void *)pair;
#endif
#ifdef CRASH
	mine.fn[CRASH] = (void *)crash;
#endif
#ifdef ABORT
	mine.fn[ABORT] = (void *)aborts;
#endif
#ifdef HANG
	mine.fn[HANG] = (void *)hang;
#endif
	*out = &mine;
	return 0;
}
