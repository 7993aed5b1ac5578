/*
 * stress.c - many threads on the module while its daemon is killed: stress SOCKET SLOT PIN MILLISECONDS
 *
 * Built together with the module's sources and a sanitizer. Threads open, sign, verify, search and close; one
 * finalises and initialises anew; one closes all sessions; with FORK=1 one forks, and the child finalises what it does
 * not have and works by itself. What is checked beside the sanitizer: a signature that was answered verifies, and a
 * refusal is one of those that a lost daemon or session explains. Prints how many signatures verified.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <p11-kit/pkcs11.h>

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list);

static CK_FUNCTION_LIST_PTR p11;
static CK_SLOT_ID slot;
static const char *pin;
static CK_C_INITIALIZE_ARGS args = {.flags = CKF_OS_LOCKING_OK};
static atomic_bool stop;
static atomic_ulong signatures;
static atomic_ulong children;

static int expected(CK_RV rv)
{
    switch (rv) {
    case CKR_OK:
    case CKR_CRYPTOKI_NOT_INITIALIZED:
    case CKR_CRYPTOKI_ALREADY_INITIALIZED:
    case CKR_DEVICE_ERROR:
    case CKR_DEVICE_REMOVED:
    case CKR_SESSION_HANDLE_INVALID:
    case CKR_SESSION_CLOSED:
    case CKR_USER_ALREADY_LOGGED_IN:
    case CKR_USER_NOT_LOGGED_IN:
    case CKR_KEY_HANDLE_INVALID:      /* another thread's C_CloseAllSessions logged out */
    case CKR_OBJECT_HANDLE_INVALID:
    case CKR_OPERATION_NOT_INITIALIZED:
        return 1;
    }
    return 0;
}

static CK_RV see(CK_RV rv, const char *what)
{
    if (!expected(rv)) {
        fprintf(stderr, "%s answers %#lx\n", what, rv);
        abort();
    }
    return rv;
}

/* Encrypts and decrypts with a key of the session's, and a copy of it. */
static void encrypt(CK_SESSION_HANDLE s)
{
    CK_MECHANISM gen = {0xfffff006, NULL, 0}, cbc = {0xfffff00a, NULL, 16};
    unsigned char iv[16] = {1}, plain[40], sealed[48], back[48];
    CK_ULONG sealed_size = sizeof sealed, size = sizeof back;
    CK_OBJECT_HANDLE key, copy;

    cbc.pParameter = iv;
    memset(plain, 7, sizeof plain);
    if (see(p11->C_GenerateKey(s, &gen, NULL, 0, &key), "C_GenerateKey") != CKR_OK ||
        see(p11->C_CopyObject(s, key, NULL, 0, &copy), "C_CopyObject") != CKR_OK ||
        see(p11->C_EncryptInit(s, &cbc, key), "C_EncryptInit") != CKR_OK ||
        see(p11->C_Encrypt(s, plain, sizeof plain, sealed, &sealed_size), "C_Encrypt") != CKR_OK ||
        see(p11->C_DecryptInit(s, &cbc, copy), "C_DecryptInit") != CKR_OK ||
        see(p11->C_Decrypt(s, sealed, sealed_size, back, &size), "C_Decrypt") != CKR_OK)
        return;
    if (size != sizeof plain || memcmp(back, plain, size) != 0) {
        fprintf(stderr, "what was encrypted is decrypted to something else\n");
        abort();
    }
}

static void work(void)
{
    static const CK_OBJECT_CLASS private_class = CKO_PRIVATE_KEY, public_class = CKO_PUBLIC_KEY;
    CK_ATTRIBUTE private_key = {CKA_CLASS, (void *)&private_class, sizeof private_class};
    CK_ATTRIBUTE public_key = {CKA_CLASS, (void *)&public_class, sizeof public_class};
    CK_MECHANISM m = {CKM_ECDSA, NULL, 0};
    CK_OBJECT_HANDLE key, pub;
    CK_SESSION_HANDLE s;
    CK_ULONG n, size;
    unsigned char e[32], sig[64];
    CK_RV rv;

    if (see(p11->C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, &s), "C_OpenSession") != CKR_OK)
        return;
    rv = see(p11->C_Login(s, CKU_USER, (CK_UTF8CHAR_PTR)pin, strlen(pin)), "C_Login");
    if (rv != CKR_OK && rv != CKR_USER_ALREADY_LOGGED_IN)
        goto end;
    if (see(p11->C_GenerateRandom(s, e, sizeof e), "C_GenerateRandom") != CKR_OK ||
        see(p11->C_FindObjectsInit(s, &private_key, 1), "C_FindObjectsInit") != CKR_OK ||
        see(p11->C_FindObjects(s, &key, 1, &n), "C_FindObjects") != CKR_OK || n == 0 ||
        see(p11->C_FindObjectsFinal(s), "C_FindObjectsFinal") != CKR_OK ||
        see(p11->C_FindObjectsInit(s, &public_key, 1), "C_FindObjectsInit") != CKR_OK ||
        see(p11->C_FindObjects(s, &pub, 1, &n), "C_FindObjects") != CKR_OK || n == 0 ||
        see(p11->C_FindObjectsFinal(s), "C_FindObjectsFinal") != CKR_OK)
        goto end;
    size = sizeof sig;
    if (see(p11->C_SignInit(s, &m, key), "C_SignInit") != CKR_OK ||
        see(p11->C_Sign(s, e, sizeof e, sig, &size), "C_Sign") != CKR_OK)
        goto end;
    if (see(p11->C_VerifyInit(s, &m, pub), "C_VerifyInit") != CKR_OK)
        goto end;
    if (see(p11->C_Verify(s, e, sizeof e, sig, size), "C_Verify") == CKR_OK)
        atomic_fetch_add(&signatures, 1);
    encrypt(s);
end:
    (void)see(p11->C_CloseSession(s), "C_CloseSession");
}

static void *worker(void *arg)
{
    (void)arg;
    while (!atomic_load(&stop))
        work();
    return NULL;
}

static void nap(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};

    nanosleep(&t, NULL);
}

static void *disturber(void *arg)
{
    (void)arg;
    for (unsigned i = 0; !atomic_load(&stop); i++) {
        nap(37);
        if (i % 5 == 0) {
            (void)see(p11->C_Finalize(NULL), "C_Finalize");
            while (!atomic_load(&stop) && see(p11->C_Initialize(&args), "C_Initialize") == CKR_DEVICE_ERROR)
                nap(5);
        } else {
            (void)see(p11->C_CloseAllSessions(slot), "C_CloseAllSessions");
        }
    }
    return NULL;
}

static void *forker(void *arg)
{
    (void)arg;
    while (!atomic_load(&stop)) {
        pid_t pid;
        int status;

        nap(23);
        pid = fork();
        if (pid == 0) {
            alarm(20);
            if (p11->C_Finalize(NULL) != CKR_CRYPTOKI_NOT_INITIALIZED)
                _exit(10);
            if (p11->C_Initialize(&args) == CKR_OK) {
                work();
                if (p11->C_Finalize(NULL) != CKR_OK)
                    _exit(11);
            }
            _exit(0);
        }
        if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) {
            fprintf(stderr, "the child of fork ended with status %#x\n", status);
            abort();
        }
        atomic_fetch_add(&children, 1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    char setting[200];
    pthread_t threads[18];
    int i, n = 0;

    if (argc != 5)
        return 2;
    slot = strtoul(argv[2], NULL, 10);
    pin = argv[3];
    snprintf(setting, sizeof setting, "%s timeout_ms=2000", argv[1]);
    args.pReserved = setting;
    C_GetFunctionList(&p11);
    (void)see(p11->C_Initialize(&args), "C_Initialize");
    for (i = 0; i < 16; i++)
        pthread_create(&threads[n++], NULL, worker, NULL);
    pthread_create(&threads[n++], NULL, disturber, NULL);
    if (getenv("FORK") != NULL)
        pthread_create(&threads[n++], NULL, forker, NULL);
    nap(atol(argv[4]));
    atomic_store(&stop, 1);
    for (i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    (void)see(p11->C_Finalize(NULL), "C_Finalize");
    printf("%lu signatures, %lu children\n", atomic_load(&signatures), atomic_load(&children));
    return 0;
}
