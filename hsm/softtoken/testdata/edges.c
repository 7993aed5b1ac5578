/*
 * edges.c - arguments at the edge, against a real daemon: edges SOCKET SLOT PIN
 *
 * Built together with the module's sources and the address and undefined-behaviour sanitizers. The token of the slot
 * holds one SM2 key pair. Bindings of other languages do not let such arguments through.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <p11-kit/pkcs11.h>

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list);

static CK_FUNCTION_LIST_PTR p11;
static int bad;

static void want(CK_RV got, CK_RV expected, const char *what, int line)
{
    if (got == expected)
        return;
    fprintf(stderr, "line %d: %s is %#lx, want %#lx\n", line, what, got, expected);
    bad = 1;
}

#define WANT(call, expected) want((CK_RV)(call), (CK_RV)(expected), #call, __LINE__)

static CK_RV no_mutex(CK_VOID_PTR_PTR m)
{
    (void)m;
    return CKR_OK;
}

static CK_RV no_lock(CK_VOID_PTR m)
{
    (void)m;
    return CKR_OK;
}

int main(int argc, char **argv)
{
    static const CK_OBJECT_CLASS private_class = CKO_PRIVATE_KEY;
    CK_ATTRIBUTE private_key = {CKA_CLASS, (void *)&private_class, sizeof private_class};
    CK_MECHANISM m = {CKM_ECDSA, NULL, 0}, sha = {CKM_SHA256, NULL, 0};
    CK_C_INITIALIZE_ARGS args = {0};
    CK_SESSION_HANDLE s;
    CK_OBJECT_HANDLE key = 0, again = 0;
    CK_ULONG n = 77, size;
    CK_SLOT_ID slot, event = 99;
    char setting[200];
    unsigned char *buffer = malloc(64), *whole = malloc(64), small[4];
    pid_t pid;
    int status;

    if (argc != 4)
        return 2;
    snprintf(setting, sizeof setting, "%s timeout_ms=5000", argv[1]);
    slot = strtoul(argv[2], NULL, 10);
    C_GetFunctionList(&p11);

    WANT(p11->C_Finalize(NULL), CKR_CRYPTOKI_NOT_INITIALIZED);
    WANT(p11->C_CloseAllSessions(slot), CKR_CRYPTOKI_NOT_INITIALIZED);
    WANT(p11->C_GetSlotList(CK_TRUE, NULL, &n), CKR_CRYPTOKI_NOT_INITIALIZED);
    WANT(p11->C_WaitForSlotEvent(CKF_DONT_BLOCK, &event, NULL), CKR_CRYPTOKI_NOT_INITIALIZED);
    args.pReserved = "socket='/unterminated";
    WANT(p11->C_Initialize(&args), CKR_ARGUMENTS_BAD);
    args.pReserved = "no settings at all";
    WANT(p11->C_Initialize(&args), CKR_ARGUMENTS_BAD);
    args.pReserved = setting;
    args.CreateMutex = no_mutex;
    WANT(p11->C_Initialize(&args), CKR_ARGUMENTS_BAD); /* all four or none */
    args.DestroyMutex = args.LockMutex = args.UnlockMutex = no_lock;
    WANT(p11->C_Initialize(&args), CKR_CANT_LOCK); /* the caller's, and only they */
    args.flags = CKF_OS_LOCKING_OK | CKF_LIBRARY_CANT_CREATE_OS_THREADS;
    WANT(p11->C_Initialize(&args), CKR_OK);
    WANT(p11->C_Initialize(&args), CKR_CRYPTOKI_ALREADY_INITIALIZED);
    WANT(p11->C_Finalize(&args), CKR_ARGUMENTS_BAD);

    WANT(p11->C_WaitForSlotEvent(CKF_DONT_BLOCK, &event, NULL), CKR_NO_EVENT);
    WANT(p11->C_WaitForSlotEvent(CKF_DONT_BLOCK, NULL, NULL), CKR_NO_EVENT);
    WANT(p11->C_WaitForSlotEvent(CKF_DONT_BLOCK, &event, &event), CKR_ARGUMENTS_BAD);
    WANT(p11->C_WaitForSlotEvent(0, &event, NULL), CKR_FUNCTION_NOT_SUPPORTED);
    WANT(event, 99);

    WANT(p11->C_OpenSession(slot, 0, NULL, NULL, &s), CKR_SESSION_PARALLEL_NOT_SUPPORTED);
    WANT(p11->C_OpenSession(12345, CKF_SERIAL_SESSION, NULL, NULL, &s), CKR_SLOT_ID_INVALID);
    WANT(p11->C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, NULL), CKR_ARGUMENTS_BAD);
    WANT(p11->C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, &s), CKR_OK);
    WANT(p11->C_CloseSession(s + 1), CKR_SESSION_HANDLE_INVALID);
    WANT(p11->C_CloseSession(0), CKR_SESSION_HANDLE_INVALID);
    WANT(p11->C_Login(s, CKU_USER, NULL, 4), CKR_ARGUMENTS_BAD);
    WANT(p11->C_Login(s, CKU_USER, (CK_UTF8CHAR_PTR)argv[3], ~0ul), CKR_ARGUMENTS_BAD);
    WANT(p11->C_Login(s, CKU_USER, (CK_UTF8CHAR_PTR)argv[3], strlen(argv[3])), CKR_OK);

    /* C_FindObjects with room for none, and with all the room there is. */
    WANT(p11->C_FindObjectsInit(s, NULL, 1), CKR_ARGUMENTS_BAD);
    WANT(p11->C_FindObjectsInit(s, &private_key, ~0ul), CKR_ARGUMENTS_BAD);
    WANT(p11->C_FindObjectsInit(s, &private_key, 1), CKR_OK);
    WANT(p11->C_FindObjects(s, NULL, 0, &n), CKR_OK);
    WANT(n, 0);
    WANT(p11->C_FindObjects(s, &key, 0, &n), CKR_OK);
    WANT(n, 0);
    WANT(p11->C_FindObjects(s, NULL, 1, &n), CKR_ARGUMENTS_BAD);
    WANT(p11->C_FindObjects(s, &key, 1, NULL), CKR_ARGUMENTS_BAD);
    WANT(p11->C_FindObjects(s, &key, 1, &n), CKR_OK);
    WANT(n, 1);
    WANT(p11->C_FindObjects(s, &again, 1, &n), CKR_OK);
    WANT(n, 0);
    WANT(p11->C_FindObjectsFinal(s), CKR_OK);
    WANT(p11->C_FindObjectsFinal(s), CKR_OPERATION_NOT_INITIALIZED);

    /* C_GetAttributeValue: what can be answered is, whatever becomes of the others (base §5.7). */
    {
        CK_OBJECT_CLASS class = 5;
        CK_BBOOL sensitive = 7;
        CK_ATTRIBUTE a[] = {
            {CKA_CLASS, &class, sizeof class},           {CKA_VALUE, small, sizeof small},
            {CKA_EC_PARAMS, small, sizeof small},        {CKA_EC_PARAMS, NULL, 3},
            {CKA_MODULUS, small, sizeof small},          {CKA_SENSITIVE, &sensitive, sizeof sensitive},
        };
        CK_RV rv = p11->C_GetAttributeValue(s, key, a, sizeof a / sizeof a[0]);

        if (rv != CKR_ATTRIBUTE_SENSITIVE && rv != CKR_ATTRIBUTE_TYPE_INVALID && rv != CKR_BUFFER_TOO_SMALL)
            WANT(rv, CKR_ATTRIBUTE_SENSITIVE);
        WANT(class, CKO_PRIVATE_KEY);
        WANT(a[1].ulValueLen, CK_UNAVAILABLE_INFORMATION);
        WANT(a[2].ulValueLen, CK_UNAVAILABLE_INFORMATION);
        WANT(a[3].ulValueLen, 10);
        WANT(a[4].ulValueLen, CK_UNAVAILABLE_INFORMATION);
        WANT(sensitive, CK_TRUE);
        WANT(a[5].ulValueLen, 1);
        WANT(p11->C_GetAttributeValue(s, key, NULL, 1), CKR_ARGUMENTS_BAD);
        WANT(p11->C_GetAttributeValue(s, key, a, ~0ul), CKR_ARGUMENTS_BAD);
        WANT(p11->C_GetAttributeValue(s, key, NULL, 0), CKR_OK);
    }

    /* C_Sign: for its length, too small, and in place. */
    memset(buffer, 7, 64);
    WANT(p11->C_SignInit(s, NULL, key), CKR_ARGUMENTS_BAD);
    WANT(p11->C_SignInit(s, &m, key), CKR_OK);
    size = 0;
    WANT(p11->C_Sign(s, buffer, 32, NULL, &size), CKR_OK);
    WANT(size, 64);
    size = 63;
    WANT(p11->C_Sign(s, buffer, 32, buffer, &size), CKR_BUFFER_TOO_SMALL);
    WANT(size, 64);
    WANT(buffer[0], 7);
    WANT(p11->C_Sign(s, buffer, 32, buffer, &size), CKR_OK);
    WANT(size, 64);
    WANT(p11->C_Sign(s, buffer, 32, buffer, &size), CKR_OPERATION_NOT_INITIALIZED);
    WANT(p11->C_SignInit(s, &m, key), CKR_OK);
    WANT(p11->C_Sign(s, NULL, 32, buffer, &size), CKR_ARGUMENTS_BAD); /* ends the operation */
    WANT(p11->C_SignInit(s, &m, key), CKR_OK);
    WANT(p11->C_Sign(s, buffer, ~0ul, buffer, &size), CKR_DATA_LEN_RANGE);
    WANT(p11->C_SignInit(s, &m, key), CKR_OK);
    WANT(p11->C_Sign(s, buffer, 32, buffer, NULL), CKR_ARGUMENTS_BAD);
    WANT(p11->C_DigestInit(s, &sha), CKR_OK);
    memcpy(whole, "abc", 3);
    size = 64;
    WANT(p11->C_Digest(s, whole, 3, whole, &size), CKR_OK); /* in place */
    WANT(size, 32);
    WANT(memcmp(whole, "\xba\x78\x16\xbf\x8f\x01\xcf\xea", 8), 0); /* FIPS 180-2 B.1 */

    /* C_Encrypt and its like: for the length, too small, in place; a key of the session's. */
    {
        CK_MECHANISM gen = {0xfffff006, NULL, 0}, cbc = {0xfffff00a, buffer, 16}, other;
        CK_GCM_PARAMS gcm = {.pIv = buffer, .ulIvLen = 12, .ulTagBits = 128};
        CK_MECHANISM sealed = {0xfffff00b, &gcm, sizeof gcm};
        CK_OBJECT_HANDLE sm4 = 0, copy = 0;

        WANT(p11->C_GenerateKey(s, &gen, NULL, 0, &sm4), CKR_OK);
        WANT(p11->C_CopyObject(s, sm4, NULL, 0, NULL), CKR_ARGUMENTS_BAD);
        WANT(p11->C_CopyObject(s, sm4, NULL, 1, &copy), CKR_ARGUMENTS_BAD);
        WANT(p11->C_CopyObject(s, sm4, NULL, 0, &copy), CKR_OK);
        memset(buffer, 7, 64);
        WANT(p11->C_EncryptInit(s, NULL, sm4), CKR_ARGUMENTS_BAD);
        WANT(p11->C_EncryptInit(s, &cbc, sm4), CKR_OK);
        size = 5;
        WANT(p11->C_Encrypt(s, buffer, 20, NULL, &size), CKR_OK);
        WANT(size, 32);
        size = 31;
        WANT(p11->C_Encrypt(s, buffer, 20, whole, &size), CKR_BUFFER_TOO_SMALL);
        WANT(size, 32);
        WANT(p11->C_EncryptUpdate(s, buffer, 20, NULL, &size), CKR_OK); /* changes nothing */
        WANT(size, 16);
        size = 15;
        WANT(p11->C_EncryptUpdate(s, buffer, 20, whole, &size), CKR_BUFFER_TOO_SMALL);
        WANT(size, 16);
        WANT(p11->C_Encrypt(s, buffer, 20, whole, &size), CKR_BUFFER_TOO_SMALL);
        memcpy(whole, buffer, 20);
        size = ~0ul;
        WANT(p11->C_Encrypt(s, whole, 20, whole, &size), CKR_OK); /* in place */
        WANT(size, 32);
        WANT(p11->C_Encrypt(s, whole, 20, whole, &size), CKR_OPERATION_NOT_INITIALIZED);
        WANT(p11->C_DecryptInit(s, &cbc, copy), CKR_OK);
        size = 19;
        WANT(p11->C_Decrypt(s, whole, 32, small, &size), CKR_BUFFER_TOO_SMALL);
        WANT(size, 20);
        WANT(p11->C_Decrypt(s, whole, 32, whole, &size), CKR_OK); /* as much room as it takes, less than its bound */
        WANT(size, 20);
        WANT(memcmp(whole, buffer, 20), 0);
        WANT(p11->C_DecryptInit(s, &cbc, copy), CKR_OK);
        WANT(p11->C_Decrypt(s, NULL, 32, whole, &size), CKR_ARGUMENTS_BAD); /* ends the operation */
        WANT(p11->C_DecryptInit(s, &cbc, copy), CKR_OK);
        WANT(p11->C_Decrypt(s, whole, 32, whole, NULL), CKR_ARGUMENTS_BAD);
        WANT(p11->C_DecryptInit(s, &cbc, copy), CKR_OK);
        WANT(p11->C_Decrypt(s, whole, ~0ul, whole, &size), CKR_ENCRYPTED_DATA_LEN_RANGE);
        WANT(p11->C_DecryptFinal(s, whole, &size), CKR_OPERATION_NOT_INITIALIZED);

        WANT(p11->C_EncryptInit(s, &sealed, sm4), CKR_OK);
        size = 64;
        WANT(p11->C_Encrypt(s, NULL, 0, whole, &size), CKR_OK); /* a tag alone */
        WANT(size, 16);
        other = sealed;
        other.ulParameterLen--;
        WANT(p11->C_EncryptInit(s, &other, sm4), CKR_MECHANISM_PARAM_INVALID);
        gcm.ulIvLen = ~0ul;
        WANT(p11->C_EncryptInit(s, &sealed, sm4), CKR_MECHANISM_PARAM_INVALID);
        gcm.ulIvLen = 12;
        gcm.ulAADLen = 1;
        WANT(p11->C_EncryptInit(s, &sealed, sm4), CKR_MECHANISM_PARAM_INVALID);
        gcm.pAAD = buffer;
        gcm.ulAADLen = ~0ul - 8;
        WANT(p11->C_EncryptInit(s, &sealed, sm4), CKR_MECHANISM_PARAM_INVALID);

        WANT(p11->C_WrapKey(s, &cbc, sm4, copy, whole, NULL), CKR_ARGUMENTS_BAD);
        WANT(p11->C_WrapKey(s, &cbc, sm4, copy, NULL, &size), CKR_KEY_FUNCTION_NOT_PERMITTED);
        WANT(p11->C_UnwrapKey(s, &cbc, sm4, NULL, 16, NULL, 0, &again), CKR_ARGUMENTS_BAD);
        WANT(p11->C_UnwrapKey(s, &cbc, sm4, whole, 16, NULL, 0, NULL), CKR_ARGUMENTS_BAD);
        WANT(p11->C_UnwrapKey(s, &cbc, sm4, whole, ~0ul, NULL, 0, &again), CKR_WRAPPED_KEY_LEN_RANGE);
    }

    /* The child of fork has no session and no connection; what it does leaves the parent's alone. */
    pid = fork();
    if (pid == 0) {
        alarm(10);
        WANT(p11->C_GetSlotList(CK_TRUE, NULL, &n), CKR_CRYPTOKI_NOT_INITIALIZED);
        WANT(p11->C_CloseSession(s), CKR_CRYPTOKI_NOT_INITIALIZED);
        WANT(p11->C_Finalize(NULL), CKR_CRYPTOKI_NOT_INITIALIZED);
        WANT(p11->C_Initialize(&args), CKR_OK);
        WANT(p11->C_CloseSession(s), CKR_SESSION_HANDLE_INVALID);
        WANT(p11->C_CloseAllSessions(slot), CKR_OK);
        WANT(p11->C_Finalize(NULL), CKR_OK);
        _exit(bad);
    }
    WANT(waitpid(pid, &status, 0), pid);
    WANT(status, 0);
    WANT(p11->C_SignInit(s, &m, key), CKR_OK);
    size = 64;
    WANT(p11->C_Sign(s, whole, 32, buffer, &size), CKR_OK);

    WANT(p11->C_CloseAllSessions(slot), CKR_OK);
    WANT(p11->C_CloseSession(s), CKR_SESSION_HANDLE_INVALID);
    WANT(p11->C_Finalize(NULL), CKR_OK);
    WANT(p11->C_Finalize(NULL), CKR_CRYPTOKI_NOT_INITIALIZED);
    free(buffer);
    free(whole);
    return bad;
}
