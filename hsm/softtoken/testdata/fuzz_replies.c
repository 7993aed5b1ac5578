/*
 * fuzz_replies.c - the module's reading of replies, for libFuzzer: what the daemon answers is the input
 *
 * With -DLIBFUZZER (clang -fsanitize=fuzzer,address,undefined) it is a fuzz target; otherwise a program that takes files
 * of inputs, by which the corpus is run in each test. One thread calls, one answers, and everything follows from the
 * input, so that what is found can be repeated. Sanitizers are the judges, and the promises that no call answers more
 * than there is room for and that no other byte is written.
 *
 * Input: the number of calls and whether the hello is spoilt, one byte of call and one of buffer size each, then for
 * each request: a byte that chooses the code, whether the results are one string, and how the frame lies; two bytes of
 * length; and the results, which go on with zeros where the input ends. So a longer answer is one changed byte away.
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
#include <unistd.h>

#include <p11-kit/pkcs11.h>

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MAX_CALLS 8

static CK_FUNCTION_LIST_PTR p11;
static char setting[200];

/* The replies. The caller sets them before it connects; the server's thread alone reads them until the caller is done. */
static struct {
    pthread_mutex_t lock;
    const uint8_t *data;
    size_t size, at;
    int spoilt_hello;
} script = {.lock = PTHREAD_MUTEX_INITIALIZER};

static unsigned script_u8(void)
{
    return script.at < script.size ? script.data[script.at++] : 0;
}

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

/* One reply. Answers 0 when the connection is to end. */
static int reply(int fd, unsigned char *out)
{
    static const uint64_t codes[] = {CKR_OK, CKR_OK, CKR_OK, CKR_OK, CKR_BUFFER_TOO_SMALL, CKR_PIN_INCORRECT, CKR_SESSION_HANDLE_INVALID, ~0ull};
    static const uint32_t lies[] = {0, 7, 0x7fffffff, 0x80000000, 0xffffffff, 1u << 20, (1u << 20) + 1, 8};
    unsigned control, whole = 1;
    uint32_t length;
    uint64_t code;
    size_t n, have, at = 12;

    pthread_mutex_lock(&script.lock);
    control = script_u8();
    n = script_u8() << 8;
    n |= script_u8();
    if (control & 8) {
        length = htobe32((uint32_t)n);
        memcpy(out + at, &length, 4);
        at += 4;
    }
    have = n > script.size - script.at ? script.size - script.at : n;
    memcpy(out + at, script.data + script.at, have);
    memset(out + at + have, 0, n - have);
    script.at += have;
    pthread_mutex_unlock(&script.lock);
    at += n;
    code = htobe64(codes[control & 7]);
    memcpy(out + 4, &code, 8);
    length = htobe32((uint32_t)at - 4);
    if ((control & 0x30) == 0x30) { /* another length than follows */
        length = htobe32(lies[control >> 6]);
        whole = 0;
    } else if ((control & 0x30) == 0x20) { /* cut */
        at = at * (control >> 6) / 4;
        whole = 0;
    }
    memcpy(out, &length, 4);
    return all(fd, out, at, 1) && whole;
}

static void *serve(void *arg)
{
    int fd = (int)(intptr_t)arg;
    unsigned char *in = malloc(2u << 20), *out = malloc(1u << 17), hello[20];
    uint32_t size;
    int spoilt;

    memset(out, 0, 12);
    out[3] = 8;
    pthread_mutex_lock(&script.lock);
    spoilt = script.spoilt_hello;
    if (spoilt)
        out[script_u8() % 12] ^= (unsigned char)script_u8();
    pthread_mutex_unlock(&script.lock);
    if (all(fd, hello, sizeof hello, 0) && all(fd, out, 12, 1) && !spoilt) /* nobody is to wait for more */
        while (all(fd, in, 4, 0)) {
            memcpy(&size, in, 4);
            size = be32toh(size);
            if (size > 2u << 20 || !all(fd, in, size, 0))
                break;
            memcpy(&size, in, 4);
            if (be32toh(size) == 10) { /* C_OpenSession succeeds: there are other calls to look at */
                memset(out, 0, 12);
                out[3] = 8;
                if (!all(fd, out, 12, 1))
                    break;
            } else if (!reply(fd, out)) {
                break;
            }
        }
    free(in);
    free(out);
    close(fd);
    return NULL;
}

static void *listen_loop(void *arg)
{
    pthread_attr_t detached;

    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (;;) {
        pthread_t t;
        int fd = accept((int)(intptr_t)arg, NULL, NULL);

        if (fd < 0 || pthread_create(&t, &detached, serve, (void *)(intptr_t)fd) != 0)
            abort();
    }
    return NULL;
}

static char folder[] = "/tmp/yjfuXXXXXX", path[60];

static void clean(void)
{
    unlink(path);
    rmdir(folder);
}

static void start(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    pthread_t t;
    int l = socket(AF_UNIX, SOCK_STREAM, 0);

    if (mkdtemp(folder) == NULL)
        abort();
    snprintf(path, sizeof path, "%s/s", folder);
    strcpy(address.sun_path, path);
    if (bind(l, (struct sockaddr *)&address, sizeof address) != 0 || listen(l, 64) != 0 ||
        pthread_create(&t, NULL, listen_loop, (void *)(intptr_t)l) != 0)
        abort();
    atexit(clean);
    snprintf(setting, sizeof setting, "socket='%s' timeout_ms=2000", path);
    C_GetFunctionList(&p11);
}

static void want(int ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "%s\n", what);
    abort();
}

/* One call with a buffer of exactly that size. */
static void call(unsigned which, CK_ULONG size, CK_SESSION_HANDLE s)
{
    CK_MECHANISM m = {CKM_SHA256, NULL, 0};
    CK_ULONG got = size, i;
    unsigned char *buffer = malloc(size + 1);
    unsigned char *out = which & 0x80 ? NULL : buffer;
    CK_OBJECT_HANDLE h, h2;
    CK_RV rv = CKR_OK;

    memset(buffer, 0x5a, size + 1);
    switch (which & 0x1f) {
    case 0:
        (void)p11->C_DigestInit(s, &m);
        rv = p11->C_Digest(s, buffer, size / 2, out, &got);
        break;
    case 1:
        (void)p11->C_SignInit(s, &m, 1);
        (void)p11->C_SignUpdate(s, buffer, size);
        rv = p11->C_SignFinal(s, out, &got);
        break;
    case 2:
        (void)p11->C_SignInit(s, &m, 1);
        rv = p11->C_Sign(s, buffer, size, out, &got);
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
        void *values[5];
        CK_ULONG room[5];

        for (i = 0; i < 5; i++) {
            room[i] = (size >> i) & 0x3f;
            a[i].type = CKA_LABEL;
            values[i] = a[i].pValue = i == 2 && which & 0x80 ? NULL : malloc(room[i] + 1);
            a[i].ulValueLen = room[i];
        }
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
    case 6: {
        CK_SESSION_INFO info;

        (void)p11->C_GetSessionInfo(s, &info);
        break;
    }
    case 7:
        (void)p11->C_Login(s, CKU_USER, buffer, size);
        break;
    case 8:
        (void)p11->C_GenerateKeyPair(s, &m, NULL, 0, NULL, 0, &h, &h2);
        break;
    case 9: {
        CK_ULONG n;

        (void)p11->C_GetObjectSize(s, 1, &n);
        break;
    }
    case 10:
        (void)p11->C_VerifyInit(s, &m, 1);
        (void)p11->C_Verify(s, buffer, size, buffer, size);
        break;
    case 11: {
        CK_SLOT_INFO slot;

        (void)p11->C_GetSlotInfo(0, &slot);
        break;
    }
    case 12: {
        CK_TOKEN_INFO token;

        (void)p11->C_GetTokenInfo(0, &token);
        break;
    }
    case 13: {
        CK_MECHANISM_INFO mech;

        (void)p11->C_GetMechanismInfo(0, 1, &mech);
        break;
    }
    case 16:
        (void)p11->C_EncryptInit(s, &m, 1);
        rv = p11->C_Encrypt(s, buffer, size / 2, out, &got);
        break;
    case 17:
        (void)p11->C_DecryptInit(s, &m, 1);
        rv = p11->C_DecryptUpdate(s, buffer, size, out, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "C_DecryptUpdate answers more than there is room for");
        got = size;
        rv = p11->C_DecryptFinal(s, out, &got);
        break;
    case 18:
        rv = p11->C_WrapKey(s, &m, 1, 2, out, &got);
        break;
    case 19:
        (void)p11->C_UnwrapKey(s, &m, 1, buffer, size, NULL, 0, &h);
        (void)p11->C_CopyObject(s, 1, NULL, 0, &h2);
        break;
    case 20: {
        CK_GCM_PARAMS gcm = {.pIv = buffer, .ulIvLen = size / 2, .pAAD = buffer, .ulAADLen = size, .ulTagBits = 128};
        CK_MECHANISM sealed = {0xfffff00b, &gcm, sizeof gcm};

        (void)p11->C_EncryptInit(s, &sealed, 1);
        rv = p11->C_Encrypt(s, buffer, size, out, &got); /* in place */
        break;
    }
    default: {
        CK_ULONG *list = malloc(size * sizeof *list + 1);

        rv = which & 1 ? p11->C_GetSlotList(CK_TRUE, out == NULL ? NULL : list, &got)
                       : p11->C_GetMechanismList(0, out == NULL ? NULL : list, &got);
        want(rv != CKR_OK || out == NULL || got <= size, "a list is longer than there is room for");
        free(list);
    }
    }
    want(((which & 0x1f) > 2 && (which & 0x1f) < 16) || (which & 0x1f) > 20 || rv != CKR_OK || out == NULL || got <= size, "a call answers more than there is room for");
    want(buffer[size] == 0x5a, "a byte behind the buffer was written");
    free(buffer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    CK_C_INITIALIZE_ARGS args = {.flags = CKF_OS_LOCKING_OK};
    CK_SESSION_HANDLE s;
    unsigned i, n;

    pthread_once(&once, start);
    if (size < 1)
        return 0;
    n = data[0] % MAX_CALLS + 1;
    if (size < 1 + 2 * n)
        return 0;
    pthread_mutex_lock(&script.lock);
    script.data = data + 1 + 2 * n;
    script.size = size - 1 - 2 * n;
    script.at = 0;
    script.spoilt_hello = data[0] >= 0xf0;
    pthread_mutex_unlock(&script.lock);

    args.pReserved = setting;
    if (p11->C_Initialize(&args) != CKR_OK)
        return 0;
    if (p11->C_OpenSession(0, CKF_SERIAL_SESSION, NULL, NULL, &s) == CKR_OK) {
        for (i = 0; i < n; i++)
            call(data[1 + 2 * i], data[2 + 2 * i], s);
        (void)p11->C_CloseSession(s);
    }
    (void)p11->C_Finalize(NULL);
    /* A server's thread that still waits for a request of a closed connection must not see the next input's script. */
    pthread_mutex_lock(&script.lock);
    script.size = script.at = 0;
    pthread_mutex_unlock(&script.lock);
    return 0;
}

#ifndef LIBFUZZER
int main(int argc, char **argv)
{
    static unsigned char input[1u << 16];
    int i;

    for (i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        size_t n;

        if (f == NULL)
            return 2;
        n = fread(input, 1, sizeof input, f);
        fclose(f);
        unsigned char *exact = malloc(n + 1); /* so that reading past its end is seen */
        memcpy(exact, input, n);
        (void)LLVMFuzzerTestOneInput(exact, n);
        free(exact);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
#endif
