/*
 * replies.c - a daemon that answers anything, and a program that calls the module: replies SEED MILLISECONDS
 *
 * Built together with the module's sources and the address and undefined-behaviour sanitizers, which are the judges;
 * what is checked here beside them is that no call answers more than its buffer holds. Buffers are from malloc and of
 * the exact size, so that a byte too many is seen.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <p11-kit/pkcs11.h>

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list);

static uint64_t next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u; /* splitmix64 */

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static unsigned below(uint64_t *state, unsigned n)
{
    return (unsigned)(next(state) % n);
}

static char path[100];
static uint64_t seed;
static uint64_t connections;

static int all(int fd, unsigned char *p, size_t n, int writing)
{
    while (n > 0) {
        ssize_t k = writing ? send(fd, p, n, MSG_NOSIGNAL) : recv(fd, p, n, 0);

        if (k <= 0)
            return 0;
        p += k;
        n -= (size_t)k;
    }
    return 1;
}

static size_t put32(unsigned char *p, size_t at, uint32_t v)
{
    v = htobe32(v);
    memcpy(p + at, &v, 4);
    return at + 4;
}

static size_t put64(unsigned char *p, size_t at, uint64_t v)
{
    v = htobe64(v);
    memcpy(p + at, &v, 8);
    return at + 8;
}

/* A length as an attacker or a broken daemon would choose it. */
static uint32_t odd_length(uint64_t *rnd, uint32_t right)
{
    static const uint32_t odd[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffc, 1u << 20, (1u << 20) + 1};

    return below(rnd, 4) != 0 ? right : odd[below(rnd, sizeof odd / sizeof odd[0])];
}

/* Results in one of the protocol's shapes, more or less. */
static size_t results(uint64_t *rnd, unsigned char *p, size_t room, uint32_t call)
{
    size_t at = 0, i;
    uint32_t n = below(rnd, 40);

    switch (below(rnd, 9)) {
    case 0: /* anything */
        n = below(rnd, 3000);
        for (i = 0; i < n; i++)
            p[at++] = (unsigned char)next(rnd);
        return at;
    case 1:
        return 0;
    case 2: /* a string, perhaps a long one */
        n = below(rnd, 4) == 0 ? below(rnd, (unsigned)room - 4) : below(rnd, 300);
        at = put32(p, at, odd_length(rnd, n));
        memset(p + at, 'x', n);
        return at + n;
    case 3: /* the answers to C_GetAttributeValue */
        at = put32(p, at, odd_length(rnd, 5));
        for (i = 0; i < 5; i++) {
            p[at++] = (unsigned char)below(rnd, 4);
            n = below(rnd, 60);
            at = put32(p, at, odd_length(rnd, n));
            memset(p + at, 'a', n);
            at += n;
        }
        return at;
    case 4: /* a list */
        at = put32(p, at, odd_length(rnd, n));
        for (i = 0; i < n; i++)
            at = put64(p, at, next(rnd));
        return at;
    case 5: /* the sizes of C_SignInit and C_DigestInit */
        return put32(p, 0, odd_length(rnd, below(rnd, 300)));
    case 6: /* what C_Encrypt and C_WrapKey answer: a result, or the room for one */
        p[at++] = (unsigned char)below(rnd, 3);
        if (p[0] == 0)
            return put64(p, at, next(rnd) >> below(rnd, 64));
        n = below(rnd, 300);
        at = put32(p, at, odd_length(rnd, n));
        memset(p + at, 'c', n);
        return at + n;
    default: /* what the call has, as far as a length tells */
        n = call == 5 ? 64 + 32 + 8 + 4 : call == 6 ? 96 + 8 * 11 + 4 + 16 : call == 7 ? 24 : call == 13 ? 32 : 8;
        memset(p, 0, n);
        return n;
    }
}

static void *serve(void *arg)
{
    int fd = (int)(intptr_t)arg;
    uint64_t rnd = seed ^ __atomic_add_fetch(&connections, 1, __ATOMIC_RELAXED) * 0x1234567;
    static const uint64_t codes[] = {CKR_OK, CKR_OK, CKR_OK, CKR_OK, CKR_OK, CKR_BUFFER_TOO_SMALL, CKR_PIN_INCORRECT, ~0ull};
    unsigned char *in = malloc(2u << 20), *out = malloc(2u << 20);
    unsigned char hello[20];
    size_t at;

    if (!all(fd, hello, sizeof hello, 0))
        goto end;
    at = put64(out, put32(out, 0, 8), 0);
    if (below(&rnd, 400) == 0)
        out[below(&rnd, 12)] ^= (unsigned char)next(&rnd);
    if (!all(fd, out, at, 1))
        goto end;
    for (;;) {
        uint32_t size, call = 0;
        uint64_t code = codes[below(&rnd, sizeof codes / sizeof codes[0])];
        unsigned lie = below(&rnd, 60);

        if (!all(fd, in, 4, 0))
            break;
        memcpy(&size, in, 4);
        size = be32toh(size);
        if (size > 2u << 20 || !all(fd, in, size, 0))
            break;
        memcpy(&call, in, 4);
        call = be32toh(call);
        if (call == 10 && below(&rnd, 4) != 0) { /* most sessions are to open */
            code = CKR_OK;
            lie = 59;
        }
        at = put64(out, 4, code);
        at += call == 10 && lie == 59 ? 0 : results(&rnd, out + at, (1u << 20) - 100, call);
        (void)put32(out, 0, (uint32_t)(at - 4));
        if (lie == 0)
            (void)put32(out, 0, odd_length(&rnd, 7));
        if (lie == 1)
            at = below(&rnd, (unsigned)at);
        if (lie == 2)
            out[below(&rnd, (unsigned)at)] ^= (unsigned char)(1 << below(&rnd, 8));
        if (!all(fd, out, at, 1) || lie < 3)
            break;
    }
end:
    free(in);
    free(out);
    close(fd);
    return NULL;
}

static void *listen_loop(void *arg)
{
    int l = (int)(intptr_t)arg;

    for (;;) {
        int fd = accept(l, NULL, NULL);
        pthread_t t;

        if (fd < 0)
            exit(4);
        pthread_create(&t, NULL, serve, (void *)(intptr_t)fd);
        pthread_detach(t);
    }
    return NULL;
}

static void want(int ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "%s (seed %llu)\n", what, (unsigned long long)seed);
    abort();
}

static CK_FUNCTION_LIST_PTR p11;

/* One call on a session, chosen at random, with buffers of random and exact size. */
static void call(uint64_t *rnd, CK_SESSION_HANDLE s)
{
    CK_MECHANISM m = {CKM_SHA256, NULL, 0};
    CK_ULONG size = below(rnd, 5) == 0 ? 0 : below(rnd, 300), got = size, i;
    unsigned char *buffer = malloc(size + 1); /* never NULL; the byte after it is watched by hand */
    unsigned char *out = below(rnd, 6) == 0 ? NULL : buffer;
    CK_SESSION_INFO info;
    CK_OBJECT_HANDLE h, h2;
    CK_RV rv;

    buffer[size] = 0x5a;
    switch (below(rnd, 19)) {
    case 0:
        rv = p11->C_DigestInit(s, &m);
        rv = p11->C_Digest(s, buffer, size / 2, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_Digest answers more than there is room for");
        break;
    case 1:
        rv = p11->C_SignInit(s, &m, 1);
        if (below(rnd, 2) == 0)
            (void)p11->C_SignUpdate(s, buffer, size);
        rv = p11->C_SignFinal(s, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_SignFinal answers more than there is room for");
        break;
    case 2:
        (void)p11->C_SignInit(s, &m, 1);
        rv = p11->C_Sign(s, buffer, size, out, &got); /* in place */
        want(rv != CKR_OK || out == NULL || got <= size, "C_Sign answers more than there is room for");
        break;
    case 3: {
        CK_OBJECT_HANDLE *found = malloc(size * sizeof *found + 1);

        (void)p11->C_FindObjectsInit(s, NULL, 0);
        rv = p11->C_FindObjects(s, found, size, &got);
        want(rv != CKR_OK || got <= size, "C_FindObjects answers more than there is room for");
        (void)p11->C_FindObjectsFinal(s);
        free(found);
        break;
    }
    case 4: {
        CK_ATTRIBUTE a[5];
        CK_ULONG room[5];

        for (i = 0; i < 5; i++) {
            room[i] = below(rnd, 80);
            a[i].type = CKA_LABEL;
            a[i].pValue = below(rnd, 4) == 0 ? NULL : malloc(room[i] + 1);
            a[i].ulValueLen = room[i];
        }
        void *values[5];
        for (i = 0; i < 5; i++)
            values[i] = a[i].pValue;
        (void)p11->C_GetAttributeValue(s, 1, a, 5);
        for (i = 0; i < 5; i++) {
            want(a[i].pValue == values[i], "C_GetAttributeValue changed a pointer");
            want(values[i] == NULL || a[i].ulValueLen == CK_UNAVAILABLE_INFORMATION || a[i].ulValueLen <= room[i],
                 "C_GetAttributeValue answers more than there is room for");
            free(values[i]);
        }
        break;
    }
    case 5:
        (void)p11->C_GenerateRandom(s, buffer, size);
        break;
    case 6:
        (void)p11->C_GetSessionInfo(s, &info);
        break;
    case 7:
        (void)p11->C_Login(s, CKU_USER, buffer, size);
        break;
    case 8:
        (void)p11->C_GenerateKeyPair(s, &m, NULL, 0, NULL, 0, &h, &h2);
        break;
    case 9:
        (void)p11->C_GetObjectSize(s, 1, &got);
        break;
    case 10:
        (void)p11->C_VerifyInit(s, &m, 1);
        (void)p11->C_Verify(s, buffer, size, buffer, size);
        break;
    case 11: {
        CK_SLOT_INFO slot;
        CK_TOKEN_INFO token;
        CK_MECHANISM_INFO mech;

        (void)p11->C_GetSlotInfo(0, &slot);
        (void)p11->C_GetTokenInfo(0, &token);
        (void)p11->C_GetMechanismInfo(0, 1, &mech);
        break;
    }
    case 12:
    case 13: {
        CK_GCM_PARAMS gcm = {.pIv = buffer, .ulIvLen = size / 2, .pAAD = buffer, .ulAADLen = size, .ulTagBits = 128};
        CK_MECHANISM sealed = {0xfffff00b, &gcm, sizeof gcm};

        (void)p11->C_EncryptInit(s, below(rnd, 2) ? &sealed : &m, 1);
        rv = below(rnd, 2) ? p11->C_Encrypt(s, buffer, size, out, &got) : p11->C_EncryptUpdate(s, buffer, size, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_Encrypt answers more than there is room for");
        got = size;
        rv = p11->C_EncryptFinal(s, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_EncryptFinal answers more than there is room for");
        break;
    }
    case 14:
        (void)p11->C_DecryptInit(s, &m, 1);
        rv = p11->C_DecryptUpdate(s, buffer, size / 2, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_DecryptUpdate answers more than there is room for");
        got = size;
        rv = below(rnd, 2) ? p11->C_DecryptFinal(s, out, &got) : p11->C_Decrypt(s, buffer, size, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_DecryptFinal answers more than there is room for");
        break;
    case 15:
        rv = p11->C_WrapKey(s, &m, 1, 2, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_WrapKey answers more than there is room for");
        break;
    case 16:
        (void)p11->C_UnwrapKey(s, &m, 1, buffer, size, NULL, 0, &h);
        (void)p11->C_CopyObject(s, 1, NULL, 0, &h);
        break;
    default: {
        CK_ULONG *list = malloc(size * sizeof *list + 1);

        rv = below(rnd, 2) ? p11->C_GetSlotList(CK_TRUE, out == NULL ? NULL : list, &got)
                           : p11->C_GetMechanismList(0, out == NULL ? NULL : list, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "a list is longer than there is room for");
        free(list);
    }
    }
    want(buffer[size] == 0x5a, "a byte behind the buffer was written");
    free(buffer);
}

static void *caller(void *arg)
{
    uint64_t rnd = seed + 1000 * (uint64_t)(intptr_t)arg;
    struct timespec t0, t;
    unsigned long *ok = malloc(sizeof *ok);
    long limit = atol(getenv("REPLIES_MS"));

    *ok = 0;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    do {
        CK_SESSION_HANDLE s;
        int n;

        if (p11->C_OpenSession(0, CKF_SERIAL_SESSION, NULL, NULL, &s) == CKR_OK) {
            for (n = 0; n < 12; n++)
                call(&rnd, s);
            (void)p11->C_CloseSession(s);
            (*ok)++;
        }
        clock_gettime(CLOCK_MONOTONIC, &t);
    } while ((t.tv_sec - t0.tv_sec) * 1000 + (t.tv_nsec - t0.tv_nsec) / 1000000 < limit);
    return ok;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CK_C_INITIALIZE_ARGS args = {.flags = CKF_OS_LOCKING_OK};
    char setting[200], folder[] = "/tmp/yjreXXXXXX";
    unsigned long sessions = 0;
    pthread_t t, callers[4];
    intptr_t i;
    int l;

    if (argc != 3 || mkdtemp(folder) == NULL)
        return 2;
    seed = strtoull(argv[1], NULL, 10);
    setenv("REPLIES_MS", argv[2], 1);
    snprintf(path, sizeof path, "%s/s", folder);
    strcpy(address.sun_path, path);
    l = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(l, (struct sockaddr *)&address, sizeof address) != 0 || listen(l, 64) != 0)
        return 2;
    pthread_create(&t, NULL, listen_loop, (void *)(intptr_t)l);
    snprintf(setting, sizeof setting, "socket='%s' timeout_ms=300", path);
    args.pReserved = setting;
    C_GetFunctionList(&p11);
    while (p11->C_Initialize(&args) != CKR_OK)
        ;
    for (i = 0; i < 4; i++)
        pthread_create(&callers[i], NULL, caller, (void *)i);
    for (i = 0; i < 4; i++) {
        unsigned long *n;

        pthread_join(callers[i], (void **)&n);
        sessions += *n;
        free(n);
    }
    (void)p11->C_Finalize(NULL);
    unlink(path);
    rmdir(folder);
    printf("%lu sessions\n", sessions);
    return sessions > 0 ? 0 : 5;
}
