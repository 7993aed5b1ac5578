/*
 * cryptoki.c - the PKCS#11 v2.40 functions that the software cipher machine has.
 *
 * Each function checks its arguments, writes a request, has it answered, and reads the results. The daemon decides;
 * what is decided here is only what depends on the caller's buffers. The functions that are not offered are in
 * unsupported.c. For evaluation only; not a certified product.
 */
#define _GNU_SOURCE
#include <string.h>

#include "protocol.h"
#include "state.h"

#define EXPORT __attribute__((visibility("default")))

/* One call on a session, from call_begin to call_end. */
struct call {
    struct session *session;
    struct frame request;
    struct frame reply;
    bool secret; /* the request holds a PIN */
};

static CK_RV call_begin(struct call *c, CK_SESSION_HANDLE handle, uint32_t number)
{
    CK_RV rv = state_acquire(handle, &c->session);

    if (rv != CKR_OK)
        return rv;
    c->secret = false;
    frame_request(&c->request, number);
    frame_start(&c->reply);
    return CKR_OK;
}

static CK_RV call_run(struct call *c, bool slow)
{
    if (c->request.bad)
        return CKR_HOST_MEMORY;
    return link_exchange(&c->session->link, &c->request, &c->reply, slow);
}

/*
 * Ends the call. Results that were not read to their end, or ended too early, mean that the two sides do not speak
 * the same protocol: nothing more is believed of this connection.
 */
static CK_RV call_end(struct call *c, CK_RV rv)
{
    if (rv == CKR_OK && !frame_done(&c->reply)) {
        atomic_store(&c->session->link.dead, true);
        rv = CKR_DEVICE_ERROR;
    }
    frame_end(&c->request, c->secret);
    frame_end(&c->reply, false);
    state_release(c->session);
    return rv;
}

/* A call without arguments or results. */
static CK_RV simple_call(CK_SESSION_HANDLE handle, uint32_t number)
{
    struct call c;
    CK_RV rv = call_begin(&c, handle, number);

    if (rv != CKR_OK)
        return rv;
    return call_end(&c, call_run(&c, false));
}

/* Has the daemon drop an operation that was refused here, as a refusal ends it. The session's lock is held. */
static void cancel(struct session *s, enum operation which)
{
    struct frame request, reply;

    frame_request(&request, CALL_CANCEL);
    frame_start(&reply);
    frame_put_u64(&request, which);
    if (!request.bad)
        (void)link_exchange(&s->link, &request, &reply, false);
    frame_end(&request, false);
    frame_end(&reply, false);
    if (which == OPERATION_SIGN)
        s->sign_size = 0;
    if (which == OPERATION_DIGEST)
        s->digest_size = 0;
}

static CK_RV check_template(const CK_ATTRIBUTE *templ, CK_ULONG count)
{
    CK_ULONG i;

    if ((templ == NULL && count > 0) || count > MAX_ATTRIBUTES)
        return CKR_ARGUMENTS_BAD;
    for (i = 0; i < count; i++)
        if ((templ[i].pValue == NULL && templ[i].ulValueLen > 0) || templ[i].ulValueLen > MAX_DATA)
            return CKR_ATTRIBUTE_VALUE_INVALID;
    return CKR_OK;
}

static CK_RV check_mechanism(const CK_MECHANISM *m)
{
    if (m == NULL)
        return CKR_ARGUMENTS_BAD;
    if ((m->pParameter == NULL && m->ulParameterLen > 0) || m->ulParameterLen > MAX_DATA)
        return CKR_MECHANISM_PARAM_INVALID;
    if (frame_takes_gcm(m) && m->pParameter != NULL) {
        CK_GCM_PARAMS gcm;

        if (m->ulParameterLen != sizeof gcm)
            return CKR_MECHANISM_PARAM_INVALID;
        memcpy(&gcm, m->pParameter, sizeof gcm);
        /* What is authenticated beside the data has to fit a frame with it, and a template. */
        if ((gcm.pIv == NULL && gcm.ulIvLen > 0) || gcm.ulIvLen > 256 || (gcm.pAAD == NULL && gcm.ulAADLen > 0) ||
            gcm.ulAADLen > MAX_AAD)
            return CKR_MECHANISM_PARAM_INVALID;
    }
    return CKR_OK;
}

static CK_RV check_data(const void *data, CK_ULONG size)
{
    if (data == NULL && size > 0)
        return CKR_ARGUMENTS_BAD;
    if (size > MAX_DATA)
        return CKR_DATA_LEN_RANGE;
    return CKR_OK;
}

static CK_VERSION get_version(struct frame *f)
{
    CK_VERSION v;

    v.major = frame_get_u8(f);
    v.minor = frame_get_u8(f);
    return v;
}

/* --- general purpose ------------------------------------------------------------------------------------------ */

CK_RV C_Initialize(CK_VOID_PTR pInitArgs)
{
    CK_C_INITIALIZE_ARGS *args = pInitArgs;
    const char *reserved = NULL;

    if (args != NULL) {
        int given = (args->CreateMutex != NULL) + (args->DestroyMutex != NULL) + (args->LockMutex != NULL) +
                    (args->UnlockMutex != NULL);

        if (given != 0 && given != 4)
            return CKR_ARGUMENTS_BAD;
        /* Only the system's own mutexes are used here. */
        if (given == 4 && (args->flags & CKF_OS_LOCKING_OK) == 0)
            return CKR_CANT_LOCK;
        reserved = args->pReserved;
    }
    return state_initialize(reserved);
}

CK_RV C_Finalize(CK_VOID_PTR pReserved)
{
    if (pReserved != NULL)
        return CKR_ARGUMENTS_BAD;
    return state_finalize();
}

static void pad(unsigned char *out, size_t size, const char *text)
{
    size_t n = strlen(text);

    memset(out, ' ', size);
    memcpy(out, text, n < size ? n : size);
}

CK_RV C_GetInfo(CK_INFO_PTR pInfo)
{
    CK_RV rv = state_check();

    if (rv != CKR_OK)
        return rv;
    if (pInfo == NULL)
        return CKR_ARGUMENTS_BAD;
    memset(pInfo, 0, sizeof *pInfo);
    pInfo->cryptokiVersion.major = 2;
    pInfo->cryptokiVersion.minor = 40;
    pad(pInfo->manufacturerID, sizeof pInfo->manufacturerID, "Yinjian EVALUATION ONLY");
    pad(pInfo->libraryDescription, sizeof pInfo->libraryDescription, "Yinjian token - EVALUATION ONLY");
    pInfo->libraryVersion.major = 1;
    pInfo->libraryVersion.minor = 0;
    return CKR_OK;
}

/* --- slots and tokens ----------------------------------------------------------------------------------------- */

/* A call on the control connection whose results are a list of numbers. */
static CK_RV list_call(struct frame *request, CK_ULONG *list, CK_ULONG *count)
{
    struct frame reply;
    uint32_t n, i;
    CK_RV rv;

    frame_start(&reply);
    rv = state_control(request, &reply, true);
    if (rv == CKR_OK) {
        n = frame_get_u32(&reply);
        if (n > MAX_FRAME / 8)
            rv = CKR_DEVICE_ERROR;
        else if (list != NULL && *count < n)
            rv = CKR_BUFFER_TOO_SMALL;
        for (i = 0; rv == CKR_OK && i < n && !reply.bad; i++) {
            uint64_t v = frame_get_u64(&reply);

            if (list != NULL)
                list[i] = v;
        }
        if (rv == CKR_OK && !frame_done(&reply))
            rv = CKR_DEVICE_ERROR;
        if (rv != CKR_DEVICE_ERROR)
            *count = n;
    }
    frame_end(request, false);
    frame_end(&reply, false);
    return rv;
}

CK_RV C_GetSlotList(CK_BBOOL tokenPresent, CK_SLOT_ID_PTR pSlotList, CK_ULONG_PTR pulCount)
{
    struct frame request;

    (void)tokenPresent; /* every slot always holds a token */
    if (pulCount == NULL)
        return CKR_ARGUMENTS_BAD;
    frame_request(&request, CALL_GET_SLOT_LIST);
    return list_call(&request, pSlotList, pulCount);
}

CK_RV C_GetSlotInfo(CK_SLOT_ID slotID, CK_SLOT_INFO_PTR pInfo)
{
    struct frame request, reply;
    CK_RV rv;

    if (pInfo == NULL)
        return CKR_ARGUMENTS_BAD;
    frame_request(&request, CALL_GET_SLOT_INFO);
    frame_start(&reply);
    frame_put_u64(&request, slotID);
    rv = state_control(&request, &reply, true);
    if (rv == CKR_OK) {
        frame_copy(&reply, pInfo->slotDescription, sizeof pInfo->slotDescription);
        frame_copy(&reply, pInfo->manufacturerID, sizeof pInfo->manufacturerID);
        pInfo->flags = frame_get_u64(&reply);
        pInfo->hardwareVersion = get_version(&reply);
        pInfo->firmwareVersion = get_version(&reply);
        if (!frame_done(&reply))
            rv = CKR_DEVICE_ERROR;
    }
    frame_end(&request, false);
    frame_end(&reply, false);
    return rv;
}

CK_RV C_GetTokenInfo(CK_SLOT_ID slotID, CK_TOKEN_INFO_PTR pInfo)
{
    struct frame request, reply;
    CK_RV rv;

    if (pInfo == NULL)
        return CKR_ARGUMENTS_BAD;
    frame_request(&request, CALL_GET_TOKEN_INFO);
    frame_start(&reply);
    frame_put_u64(&request, slotID);
    rv = state_control(&request, &reply, true);
    if (rv == CKR_OK) {
        frame_copy(&reply, pInfo->label, sizeof pInfo->label);
        frame_copy(&reply, pInfo->manufacturerID, sizeof pInfo->manufacturerID);
        frame_copy(&reply, pInfo->model, sizeof pInfo->model);
        frame_copy(&reply, pInfo->serialNumber, sizeof pInfo->serialNumber);
        pInfo->flags = frame_get_u64(&reply);
        pInfo->ulMaxSessionCount = frame_get_u64(&reply);
        pInfo->ulSessionCount = frame_get_u64(&reply);
        pInfo->ulMaxRwSessionCount = frame_get_u64(&reply);
        pInfo->ulRwSessionCount = frame_get_u64(&reply);
        pInfo->ulMaxPinLen = frame_get_u64(&reply);
        pInfo->ulMinPinLen = frame_get_u64(&reply);
        pInfo->ulTotalPublicMemory = frame_get_u64(&reply);
        pInfo->ulFreePublicMemory = frame_get_u64(&reply);
        pInfo->ulTotalPrivateMemory = frame_get_u64(&reply);
        pInfo->ulFreePrivateMemory = frame_get_u64(&reply);
        pInfo->hardwareVersion = get_version(&reply);
        pInfo->firmwareVersion = get_version(&reply);
        frame_copy(&reply, pInfo->utcTime, sizeof pInfo->utcTime);
        if (!frame_done(&reply))
            rv = CKR_DEVICE_ERROR;
    }
    frame_end(&request, false);
    frame_end(&reply, false);
    return rv;
}

CK_RV C_GetMechanismList(CK_SLOT_ID slotID, CK_MECHANISM_TYPE_PTR pMechanismList, CK_ULONG_PTR pulCount)
{
    struct frame request;

    if (pulCount == NULL)
        return CKR_ARGUMENTS_BAD;
    frame_request(&request, CALL_GET_MECHANISM_LIST);
    frame_put_u64(&request, slotID);
    return list_call(&request, pMechanismList, pulCount);
}

CK_RV C_GetMechanismInfo(CK_SLOT_ID slotID, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR pInfo)
{
    struct frame request, reply;
    CK_RV rv;

    if (pInfo == NULL)
        return CKR_ARGUMENTS_BAD;
    frame_request(&request, CALL_GET_MECHANISM_INFO);
    frame_start(&reply);
    frame_put_u64(&request, slotID);
    frame_put_u64(&request, type);
    rv = state_control(&request, &reply, true);
    if (rv == CKR_OK) {
        pInfo->ulMinKeySize = frame_get_u64(&reply);
        pInfo->ulMaxKeySize = frame_get_u64(&reply);
        pInfo->flags = frame_get_u64(&reply);
        if (!frame_done(&reply))
            rv = CKR_DEVICE_ERROR;
    }
    frame_end(&request, false);
    frame_end(&reply, false);
    return rv;
}

CK_RV C_WaitForSlotEvent(CK_FLAGS flags, CK_SLOT_ID_PTR pSlot, CK_VOID_PTR pReserved)
{
    CK_RV rv = state_check();

    (void)pSlot;
    if (rv != CKR_OK)
        return rv;
    if (pReserved != NULL)
        return CKR_ARGUMENTS_BAD;
    /* Tokens do not come and go, so there is nothing to wait for. */
    return (flags & CKF_DONT_BLOCK) != 0 ? CKR_NO_EVENT : CKR_FUNCTION_NOT_SUPPORTED;
}

CK_RV C_InitToken(CK_SLOT_ID slotID, CK_UTF8CHAR_PTR pPin, CK_ULONG ulPinLen, CK_UTF8CHAR_PTR pLabel)
{
    struct frame request, reply;
    CK_RV rv;

    if (pPin == NULL || pLabel == NULL || ulPinLen > MAX_DATA)
        return CKR_ARGUMENTS_BAD;
    frame_request(&request, CALL_INIT_TOKEN);
    frame_start(&reply);
    frame_put_u64(&request, slotID);
    frame_put_string(&request, pPin, ulPinLen);
    frame_put_string(&request, pLabel, 32); /* padded, not terminated */
    rv = state_control(&request, &reply, false);
    frame_end(&request, true);
    frame_end(&reply, false);
    return rv;
}

CK_RV C_InitPIN(CK_SESSION_HANDLE hSession, CK_UTF8CHAR_PTR pPin, CK_ULONG ulPinLen)
{
    struct call c;
    CK_RV rv;

    if (pPin == NULL || ulPinLen > MAX_DATA)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_INIT_PIN);
    if (rv != CKR_OK)
        return rv;
    c.secret = true;
    frame_put_string(&c.request, pPin, ulPinLen);
    return call_end(&c, call_run(&c, true));
}

CK_RV C_SetPIN(CK_SESSION_HANDLE hSession, CK_UTF8CHAR_PTR pOldPin, CK_ULONG ulOldLen, CK_UTF8CHAR_PTR pNewPin,
               CK_ULONG ulNewLen)
{
    struct call c;
    CK_RV rv;

    if (pOldPin == NULL || pNewPin == NULL || ulOldLen > MAX_DATA / 2 || ulNewLen > MAX_DATA / 2)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_SET_PIN);
    if (rv != CKR_OK)
        return rv;
    c.secret = true;
    frame_put_string(&c.request, pOldPin, ulOldLen);
    frame_put_string(&c.request, pNewPin, ulNewLen);
    return call_end(&c, call_run(&c, true));
}

/* --- sessions ------------------------------------------------------------------------------------------------- */

CK_RV C_OpenSession(CK_SLOT_ID slotID, CK_FLAGS flags, CK_VOID_PTR pApplication, CK_NOTIFY Notify,
                    CK_SESSION_HANDLE_PTR phSession)
{
    struct session *s = NULL;
    struct frame request, reply;
    CK_RV rv = state_check();

    (void)pApplication; /* there are no callbacks */
    (void)Notify;
    if (rv != CKR_OK)
        return rv;
    if (phSession == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = state_connect(&s);
    if (rv != CKR_OK)
        return rv;
    s->slot = slotID;
    frame_request(&request, CALL_OPEN_SESSION);
    frame_start(&reply);
    frame_put_u64(&request, slotID);
    frame_put_u64(&request, flags);
    rv = request.bad ? CKR_HOST_MEMORY : link_exchange(&s->link, &request, &reply, false);
    if (rv == CKR_OK && !frame_done(&reply))
        rv = CKR_DEVICE_ERROR;
    frame_end(&request, false);
    frame_end(&reply, false);
    if (rv == CKR_OK)
        rv = state_add(s, phSession);
    if (rv != CKR_OK)
        state_unref(s); /* closes the connection, which ends the daemon's session */
    return rv;
}

CK_RV C_CloseSession(CK_SESSION_HANDLE hSession)
{
    struct session *s;
    struct frame request, reply;
    CK_RV rv = state_check();

    if (rv != CKR_OK)
        return rv;
    s = state_remove(hSession);
    if (s == NULL)
        return CKR_SESSION_HANDLE_INVALID;
    frame_request(&request, CALL_CLOSE_SESSION);
    frame_start(&reply);
    pthread_mutex_lock(&s->link.lock);
    /* Whatever the answer, and if there is none: the session ends with its connection. */
    (void)link_exchange(&s->link, &request, &reply, false);
    pthread_mutex_unlock(&s->link.lock);
    frame_end(&request, false);
    frame_end(&reply, false);
    state_unref(s);
    return CKR_OK;
}

CK_RV C_CloseAllSessions(CK_SLOT_ID slotID)
{
    struct frame request, reply;
    CK_RV rv;

    frame_request(&request, CALL_CLOSE_ALL_SESSIONS);
    frame_start(&reply);
    frame_put_u64(&request, slotID);
    rv = state_control(&request, &reply, true);
    frame_end(&request, false);
    frame_end(&reply, false);
    if (rv == CKR_SLOT_ID_INVALID || rv == CKR_CRYPTOKI_NOT_INITIALIZED)
        return rv;
    /* With the daemon gone its sessions are too. */
    state_drop_slot(slotID);
    return CKR_OK;
}

CK_RV C_GetSessionInfo(CK_SESSION_HANDLE hSession, CK_SESSION_INFO_PTR pInfo)
{
    struct call c;
    CK_RV rv;

    if (pInfo == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_GET_SESSION_INFO);
    if (rv != CKR_OK)
        return rv;
    rv = call_run(&c, false);
    if (rv == CKR_OK) {
        pInfo->slotID = frame_get_u64(&c.reply);
        pInfo->state = frame_get_u64(&c.reply);
        pInfo->flags = frame_get_u64(&c.reply);
        pInfo->ulDeviceError = frame_get_u64(&c.reply);
    }
    return call_end(&c, rv);
}

CK_RV C_Login(CK_SESSION_HANDLE hSession, CK_USER_TYPE userType, CK_UTF8CHAR_PTR pPin, CK_ULONG ulPinLen)
{
    struct call c;
    CK_RV rv;

    if (pPin == NULL || ulPinLen > MAX_DATA)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_LOGIN);
    if (rv != CKR_OK)
        return rv;
    c.secret = true;
    frame_put_u64(&c.request, userType);
    frame_put_string(&c.request, pPin, ulPinLen);
    return call_end(&c, call_run(&c, true));
}

CK_RV C_Logout(CK_SESSION_HANDLE hSession)
{
    return simple_call(hSession, CALL_LOGOUT);
}

/* --- objects -------------------------------------------------------------------------------------------------- */

CK_RV C_CreateObject(CK_SESSION_HANDLE hSession, CK_ATTRIBUTE_PTR pTemplate, CK_ULONG ulCount,
                     CK_OBJECT_HANDLE_PTR phObject)
{
    struct call c;
    CK_RV rv = check_template(pTemplate, ulCount);

    if (rv != CKR_OK)
        return rv;
    if (phObject == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_CREATE_OBJECT);
    if (rv != CKR_OK)
        return rv;
    c.secret = true; /* a template may hold a key */
    frame_put_template(&c.request, pTemplate, ulCount);
    rv = call_run(&c, false);
    if (rv == CKR_OK)
        *phObject = frame_get_u64(&c.reply);
    return call_end(&c, rv);
}

CK_RV C_CopyObject(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE hObject, CK_ATTRIBUTE_PTR pTemplate, CK_ULONG ulCount,
                   CK_OBJECT_HANDLE_PTR phNewObject)
{
    struct call c;
    CK_RV rv = check_template(pTemplate, ulCount);

    if (rv != CKR_OK)
        return rv;
    if (phNewObject == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_COPY_OBJECT);
    if (rv != CKR_OK)
        return rv;
    frame_put_u64(&c.request, hObject);
    frame_put_template(&c.request, pTemplate, ulCount);
    rv = call_run(&c, false);
    if (rv == CKR_OK)
        *phNewObject = frame_get_u64(&c.reply);
    return call_end(&c, rv);
}

CK_RV C_DestroyObject(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE hObject)
{
    struct call c;
    CK_RV rv = call_begin(&c, hSession, CALL_DESTROY_OBJECT);

    if (rv != CKR_OK)
        return rv;
    frame_put_u64(&c.request, hObject);
    return call_end(&c, call_run(&c, false));
}

CK_RV C_GetObjectSize(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE hObject, CK_ULONG_PTR pulSize)
{
    struct call c;
    CK_RV rv;

    if (pulSize == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_GET_OBJECT_SIZE);
    if (rv != CKR_OK)
        return rv;
    frame_put_u64(&c.request, hObject);
    rv = call_run(&c, false);
    if (rv == CKR_OK)
        *pulSize = frame_get_u64(&c.reply);
    return call_end(&c, rv);
}

/* Gives one attribute of the reply to the caller. Answers what C_GetAttributeValue is to answer for it. */
static CK_RV take_attribute(struct frame *reply, CK_ATTRIBUTE *a)
{
    uint8_t status = frame_get_u8(reply);
    size_t size;
    const unsigned char *value = frame_get_string(reply, &size);

    if (value == NULL || status > 2)
        return CKR_DEVICE_ERROR;
    if (status != 0) {
        a->ulValueLen = CK_UNAVAILABLE_INFORMATION;
        return status == 1 ? CKR_ATTRIBUTE_SENSITIVE : CKR_ATTRIBUTE_TYPE_INVALID;
    }
    if (a->pValue != NULL && a->ulValueLen < size) {
        a->ulValueLen = CK_UNAVAILABLE_INFORMATION;
        return CKR_BUFFER_TOO_SMALL;
    }
    if (a->pValue != NULL && size > 0)
        memcpy(a->pValue, value, size);
    a->ulValueLen = size;
    return CKR_OK;
}

CK_RV C_GetAttributeValue(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE hObject, CK_ATTRIBUTE_PTR pTemplate,
                          CK_ULONG ulCount)
{
    struct call c;
    CK_RV rv, refused = CKR_OK;
    CK_ULONG i;
    uint32_t count;

    if ((pTemplate == NULL && ulCount > 0) || ulCount > MAX_ATTRIBUTES)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_GET_ATTRIBUTE_VALUE);
    if (rv != CKR_OK)
        return rv;
    frame_put_u64(&c.request, hObject);
    frame_put_u32(&c.request, (uint32_t)ulCount);
    for (i = 0; i < ulCount; i++)
        frame_put_u64(&c.request, pTemplate[i].type);
    rv = call_run(&c, false);
    if (rv == CKR_OK) {
        count = frame_get_u32(&c.reply);
        if (count != ulCount)
            c.reply.bad = true;
        /* Every attribute is answered, whatever becomes of the others; the first refusal is the call's result. */
        for (i = 0; i < ulCount && !c.reply.bad; i++) {
            CK_RV one = take_attribute(&c.reply, &pTemplate[i]);

            if (refused == CKR_OK)
                refused = one;
        }
    }
    rv = call_end(&c, rv);
    return rv != CKR_OK ? rv : refused;
}

CK_RV C_SetAttributeValue(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE hObject, CK_ATTRIBUTE_PTR pTemplate,
                          CK_ULONG ulCount)
{
    struct call c;
    CK_RV rv = check_template(pTemplate, ulCount);

    if (rv != CKR_OK)
        return rv;
    rv = call_begin(&c, hSession, CALL_SET_ATTRIBUTE_VALUE);
    if (rv != CKR_OK)
        return rv;
    frame_put_u64(&c.request, hObject);
    frame_put_template(&c.request, pTemplate, ulCount);
    return call_end(&c, call_run(&c, false));
}

CK_RV C_FindObjectsInit(CK_SESSION_HANDLE hSession, CK_ATTRIBUTE_PTR pTemplate, CK_ULONG ulCount)
{
    struct call c;
    CK_RV rv = check_template(pTemplate, ulCount);

    if (rv != CKR_OK)
        return rv;
    rv = call_begin(&c, hSession, CALL_FIND_OBJECTS_INIT);
    if (rv != CKR_OK)
        return rv;
    frame_put_template(&c.request, pTemplate, ulCount);
    return call_end(&c, call_run(&c, false));
}

CK_RV C_FindObjects(CK_SESSION_HANDLE hSession, CK_OBJECT_HANDLE_PTR phObject, CK_ULONG ulMaxObjectCount,
                    CK_ULONG_PTR pulObjectCount)
{
    struct call c;
    CK_RV rv;
    uint32_t n, i;

    if ((phObject == NULL && ulMaxObjectCount > 0) || pulObjectCount == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_FIND_OBJECTS);
    if (rv != CKR_OK)
        return rv;
    frame_put_u64(&c.request, ulMaxObjectCount);
    rv = call_run(&c, false);
    if (rv == CKR_OK) {
        n = frame_get_u32(&c.reply);
        if (n > ulMaxObjectCount)
            c.reply.bad = true;
        for (i = 0; i < n && !c.reply.bad; i++)
            phObject[i] = frame_get_u64(&c.reply);
        *pulObjectCount = c.reply.bad ? 0 : n;
    }
    return call_end(&c, rv);
}

CK_RV C_FindObjectsFinal(CK_SESSION_HANDLE hSession)
{
    return simple_call(hSession, CALL_FIND_OBJECTS_FINAL);
}

/* --- operations with data ------------------------------------------------------------------------------------- */

/*
 * Ends an operation whose result goes into the caller's buffer: C_Sign, C_SignFinal, C_Digest, C_DigestFinal. The
 * longest result is known since the operation began, so a length query and a buffer that is too small are answered
 * here, and leave the operation as it is. Everything else ends it.
 */
static CK_RV finish_operation(CK_SESSION_HANDLE handle, uint32_t number, enum operation which, const void *data,
                              CK_ULONG data_size, unsigned char *out, CK_ULONG_PTR out_size)
{
    struct call c;
    CK_ULONG *longest;
    const unsigned char *result;
    size_t size;
    CK_RV rv = call_begin(&c, handle, number);

    if (rv != CKR_OK)
        return rv;
    longest = which == OPERATION_SIGN ? &c.session->sign_size : &c.session->digest_size;
    if (atomic_load(&c.session->link.dead))
        rv = CKR_DEVICE_REMOVED;
    else if (*longest == 0)
        rv = CKR_OPERATION_NOT_INITIALIZED;
    if (rv != CKR_OK)
        return call_end(&c, rv);
    rv = out_size == NULL ? CKR_ARGUMENTS_BAD : check_data(data, data_size);
    if (rv != CKR_OK) {
        cancel(c.session, which);
        return call_end(&c, rv);
    }
    if (out == NULL || *out_size < *longest) {
        *out_size = *longest;
        frame_end(&c.request, false);
        frame_end(&c.reply, false);
        state_release(c.session);
        return out == NULL ? CKR_OK : CKR_BUFFER_TOO_SMALL;
    }
    if (number == CALL_SIGN || number == CALL_DIGEST)
        frame_put_string(&c.request, data, data_size);
    if (c.request.bad)
        cancel(c.session, which); /* no memory: the daemon did not hear of it, and must not wait for it */
    rv = call_run(&c, false);
    if (rv == CKR_OK) {
        result = frame_get_string(&c.reply, &size);
        if (result == NULL || size > *out_size) {
            c.reply.bad = true;
        } else {
            memcpy(out, result, size);
            *out_size = size;
        }
    }
    *longest = 0;
    return call_end(&c, rv);
}

/* C_SignUpdate, C_VerifyUpdate, C_DigestUpdate: the data travels in pieces. */
static CK_RV update_operation(CK_SESSION_HANDLE handle, uint32_t number, enum operation which,
                              const unsigned char *data, CK_ULONG size)
{
    struct call c;
    CK_RV rv = call_begin(&c, handle, number);

    if (rv != CKR_OK)
        return rv;
    if (data == NULL && size > 0) {
        cancel(c.session, which);
        return call_end(&c, CKR_ARGUMENTS_BAD);
    }
    for (;;) {
        CK_ULONG piece = size < CHUNK ? size : CHUNK;

        frame_put_string(&c.request, data, piece);
        if (c.request.bad)
            cancel(c.session, which);
        rv = call_run(&c, false);
        size -= piece;
        if (rv != CKR_OK || size == 0)
            break;
        data += piece;
        frame_end(&c.request, false);
        frame_end(&c.reply, false);
        frame_request(&c.request, number);
    }
    if (rv != CKR_OK && which == OPERATION_SIGN)
        c.session->sign_size = 0;
    if (rv != CKR_OK && which == OPERATION_DIGEST)
        c.session->digest_size = 0;
    return call_end(&c, rv);
}

/* The request of a call with a mechanism and a key; the caller reads the reply and ends the call. */
static CK_RV begin_keyed(struct call *c, CK_SESSION_HANDLE handle, uint32_t number, const CK_MECHANISM *mechanism,
                         CK_OBJECT_HANDLE key)
{
    CK_RV rv = check_mechanism(mechanism);

    if (rv != CKR_OK)
        return rv;
    rv = call_begin(c, handle, number);
    if (rv != CKR_OK)
        return rv;
    frame_put_mechanism(&c->request, mechanism);
    frame_put_u64(&c->request, key);
    return CKR_OK;
}

/* The room in the caller's buffer as the daemon is told of it: a length query has a number of its own. */
static void put_room(struct frame *f, const unsigned char *out, const CK_ULONG *out_size)
{
    CK_ULONG room = *out_size;

    if (room == CK_UNAVAILABLE_INFORMATION) /* no buffer is as long; it must not look like a query */
        room--;
    frame_put_u64(f, out == NULL ? CK_UNAVAILABLE_INFORMATION : room);
}

/*
 * Has a call made whose result goes into the caller's buffer, and whose length only the daemon knows: it is told how
 * much room there is, and answers either with the result or with the room that is needed. Then nothing has happened.
 */
static CK_RV run_into(struct call *c, unsigned char *out, CK_ULONG_PTR out_size)
{
    const unsigned char *result;
    size_t size;
    CK_RV rv = call_run(c, false);

    if (rv != CKR_OK)
        return rv;
    if (frame_get_u8(&c->reply) == 0) {
        CK_ULONG need = frame_get_u64(&c->reply);

        if (!frame_done(&c->reply))
            return CKR_OK; /* call_end sees it */
        *out_size = need;
        return out == NULL ? CKR_OK : CKR_BUFFER_TOO_SMALL;
    }
    result = frame_get_string(&c->reply, &size);
    if (result == NULL || out == NULL || size > *out_size) {
        c->reply.bad = true;
        return CKR_OK;
    }
    if (size > 0)
        memcpy(out, result, size);
    explicit_bzero(c->reply.data, c->reply.size); /* perhaps what was to be kept secret */
    *out_size = size;
    return CKR_OK;
}

/* C_Encrypt and C_Decrypt, and what they are called in parts. data is NULL and data_less true for the last part. */
static CK_RV cipher_call(CK_SESSION_HANDLE handle, uint32_t number, enum operation which, bool data_less,
                         const void *data, CK_ULONG data_size, unsigned char *out, CK_ULONG_PTR out_size)
{
    struct call c;
    CK_RV rv = call_begin(&c, handle, number);

    if (rv != CKR_OK)
        return rv;
    c.secret = true;
    rv = out_size == NULL ? CKR_ARGUMENTS_BAD : check_data(data, data_size);
    if (rv == CKR_DATA_LEN_RANGE && which == OPERATION_DECRYPT)
        rv = CKR_ENCRYPTED_DATA_LEN_RANGE;
    if (rv != CKR_OK) {
        cancel(c.session, which);
        return call_end(&c, rv);
    }
    if (!data_less)
        frame_put_string(&c.request, data, data_size);
    put_room(&c.request, out, out_size);
    if (c.request.bad)
        cancel(c.session, which); /* no memory: the daemon did not hear of it, and must not wait for it */
    return call_end(&c, run_into(&c, out, out_size));
}

/* A call with a mechanism and a key that has no results. */
static CK_RV begin_cipher(CK_SESSION_HANDLE handle, uint32_t number, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    struct call c;
    CK_RV rv = begin_keyed(&c, handle, number, mechanism, key);

    if (rv != CKR_OK)
        return rv;
    return call_end(&c, call_run(&c, false));
}

CK_RV C_EncryptInit(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_OBJECT_HANDLE hKey)
{
    return begin_cipher(hSession, CALL_ENCRYPT_INIT, pMechanism, hKey);
}

CK_RV C_Encrypt(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pData, CK_ULONG ulDataLen, CK_BYTE_PTR pEncryptedData,
                CK_ULONG_PTR pulEncryptedDataLen)
{
    return cipher_call(hSession, CALL_ENCRYPT, OPERATION_ENCRYPT, false, pData, ulDataLen, pEncryptedData,
                       pulEncryptedDataLen);
}

CK_RV C_EncryptUpdate(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pPart, CK_ULONG ulPartLen, CK_BYTE_PTR pEncryptedPart,
                      CK_ULONG_PTR pulEncryptedPartLen)
{
    return cipher_call(hSession, CALL_ENCRYPT_UPDATE, OPERATION_ENCRYPT, false, pPart, ulPartLen, pEncryptedPart,
                       pulEncryptedPartLen);
}

CK_RV C_EncryptFinal(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pLastEncryptedPart, CK_ULONG_PTR pulLastEncryptedPartLen)
{
    return cipher_call(hSession, CALL_ENCRYPT_FINAL, OPERATION_ENCRYPT, true, NULL, 0, pLastEncryptedPart,
                       pulLastEncryptedPartLen);
}

CK_RV C_DecryptInit(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_OBJECT_HANDLE hKey)
{
    return begin_cipher(hSession, CALL_DECRYPT_INIT, pMechanism, hKey);
}

CK_RV C_Decrypt(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pEncryptedData, CK_ULONG ulEncryptedDataLen, CK_BYTE_PTR pData,
                CK_ULONG_PTR pulDataLen)
{
    return cipher_call(hSession, CALL_DECRYPT, OPERATION_DECRYPT, false, pEncryptedData, ulEncryptedDataLen, pData,
                       pulDataLen);
}

CK_RV C_DecryptUpdate(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pEncryptedPart, CK_ULONG ulEncryptedPartLen,
                      CK_BYTE_PTR pPart, CK_ULONG_PTR pulPartLen)
{
    return cipher_call(hSession, CALL_DECRYPT_UPDATE, OPERATION_DECRYPT, false, pEncryptedPart, ulEncryptedPartLen,
                       pPart, pulPartLen);
}

CK_RV C_DecryptFinal(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pLastPart, CK_ULONG_PTR pulLastPartLen)
{
    return cipher_call(hSession, CALL_DECRYPT_FINAL, OPERATION_DECRYPT, true, NULL, 0, pLastPart, pulLastPartLen);
}

CK_RV C_DigestInit(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism)
{
    struct call c;
    CK_RV rv = check_mechanism(pMechanism);

    if (rv != CKR_OK)
        return rv;
    rv = call_begin(&c, hSession, CALL_DIGEST_INIT);
    if (rv != CKR_OK)
        return rv;
    frame_put_mechanism(&c.request, pMechanism);
    rv = call_run(&c, false);
    if (rv == CKR_OK)
        c.session->digest_size = frame_get_u32(&c.reply);
    return call_end(&c, rv);
}

CK_RV C_Digest(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pData, CK_ULONG ulDataLen, CK_BYTE_PTR pDigest,
               CK_ULONG_PTR pulDigestLen)
{
    return finish_operation(hSession, CALL_DIGEST, OPERATION_DIGEST, pData, ulDataLen, pDigest, pulDigestLen);
}

CK_RV C_DigestUpdate(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pPart, CK_ULONG ulPartLen)
{
    return update_operation(hSession, CALL_DIGEST_UPDATE, OPERATION_DIGEST, pPart, ulPartLen);
}

CK_RV C_DigestFinal(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pDigest, CK_ULONG_PTR pulDigestLen)
{
    return finish_operation(hSession, CALL_DIGEST_FINAL, OPERATION_DIGEST, NULL, 0, pDigest, pulDigestLen);
}

CK_RV C_SignInit(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_OBJECT_HANDLE hKey)
{
    struct call c;
    CK_RV rv = begin_keyed(&c, hSession, CALL_SIGN_INIT, pMechanism, hKey);

    if (rv != CKR_OK)
        return rv;
    rv = call_run(&c, false);
    if (rv == CKR_OK)
        c.session->sign_size = frame_get_u32(&c.reply);
    return call_end(&c, rv);
}

CK_RV C_Sign(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pData, CK_ULONG ulDataLen, CK_BYTE_PTR pSignature,
             CK_ULONG_PTR pulSignatureLen)
{
    return finish_operation(hSession, CALL_SIGN, OPERATION_SIGN, pData, ulDataLen, pSignature, pulSignatureLen);
}

CK_RV C_SignUpdate(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pPart, CK_ULONG ulPartLen)
{
    return update_operation(hSession, CALL_SIGN_UPDATE, OPERATION_SIGN, pPart, ulPartLen);
}

CK_RV C_SignFinal(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pSignature, CK_ULONG_PTR pulSignatureLen)
{
    return finish_operation(hSession, CALL_SIGN_FINAL, OPERATION_SIGN, NULL, 0, pSignature, pulSignatureLen);
}

CK_RV C_VerifyInit(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_OBJECT_HANDLE hKey)
{
    struct call c;
    CK_RV rv = begin_keyed(&c, hSession, CALL_VERIFY_INIT, pMechanism, hKey);

    if (rv != CKR_OK)
        return rv;
    return call_end(&c, call_run(&c, false));
}

/* C_Verify and C_VerifyFinal, which has no data. */
static CK_RV verify(CK_SESSION_HANDLE handle, uint32_t number, const void *data, CK_ULONG data_size,
                    const void *signature, CK_ULONG signature_size)
{
    struct call c;
    CK_RV rv = call_begin(&c, handle, number);

    if (rv != CKR_OK)
        return rv;
    rv = check_data(data, data_size);
    if (rv == CKR_OK && signature == NULL)
        rv = CKR_ARGUMENTS_BAD;
    /* No signature is nearly as long as the room a frame leaves beside the longest data. */
    if (rv == CKR_OK && signature_size > 900)
        rv = CKR_SIGNATURE_LEN_RANGE;
    if (rv != CKR_OK) {
        cancel(c.session, OPERATION_VERIFY);
        return call_end(&c, rv);
    }
    if (number == CALL_VERIFY)
        frame_put_string(&c.request, data, data_size);
    frame_put_string(&c.request, signature, signature_size);
    return call_end(&c, call_run(&c, false));
}

CK_RV C_Verify(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pData, CK_ULONG ulDataLen, CK_BYTE_PTR pSignature,
               CK_ULONG ulSignatureLen)
{
    return verify(hSession, CALL_VERIFY, pData, ulDataLen, pSignature, ulSignatureLen);
}

CK_RV C_VerifyUpdate(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pPart, CK_ULONG ulPartLen)
{
    return update_operation(hSession, CALL_VERIFY_UPDATE, OPERATION_VERIFY, pPart, ulPartLen);
}

CK_RV C_VerifyFinal(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pSignature, CK_ULONG ulSignatureLen)
{
    return verify(hSession, CALL_VERIFY_FINAL, NULL, 0, pSignature, ulSignatureLen);
}

/* --- keys and random numbers ---------------------------------------------------------------------------------- */

CK_RV C_GenerateKey(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_ATTRIBUTE_PTR pTemplate,
                    CK_ULONG ulCount, CK_OBJECT_HANDLE_PTR phKey)
{
    struct call c;
    CK_RV rv = check_mechanism(pMechanism);

    if (rv == CKR_OK)
        rv = check_template(pTemplate, ulCount);
    if (rv != CKR_OK)
        return rv;
    if (phKey == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_GENERATE_KEY);
    if (rv != CKR_OK)
        return rv;
    frame_put_mechanism(&c.request, pMechanism);
    frame_put_template(&c.request, pTemplate, ulCount);
    rv = call_run(&c, true);
    if (rv == CKR_OK)
        *phKey = frame_get_u64(&c.reply);
    return call_end(&c, rv);
}

CK_RV C_GenerateKeyPair(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_ATTRIBUTE_PTR pPublicKeyTemplate,
                        CK_ULONG ulPublicKeyAttributeCount, CK_ATTRIBUTE_PTR pPrivateKeyTemplate,
                        CK_ULONG ulPrivateKeyAttributeCount, CK_OBJECT_HANDLE_PTR phPublicKey,
                        CK_OBJECT_HANDLE_PTR phPrivateKey)
{
    struct call c;
    CK_RV rv = check_mechanism(pMechanism);

    if (rv == CKR_OK)
        rv = check_template(pPublicKeyTemplate, ulPublicKeyAttributeCount);
    if (rv == CKR_OK)
        rv = check_template(pPrivateKeyTemplate, ulPrivateKeyAttributeCount);
    if (rv != CKR_OK)
        return rv;
    if (phPublicKey == NULL || phPrivateKey == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = call_begin(&c, hSession, CALL_GENERATE_KEY_PAIR);
    if (rv != CKR_OK)
        return rv;
    frame_put_mechanism(&c.request, pMechanism);
    frame_put_template(&c.request, pPublicKeyTemplate, ulPublicKeyAttributeCount);
    frame_put_template(&c.request, pPrivateKeyTemplate, ulPrivateKeyAttributeCount);
    rv = call_run(&c, true);
    if (rv == CKR_OK) {
        *phPublicKey = frame_get_u64(&c.reply);
        *phPrivateKey = frame_get_u64(&c.reply);
    }
    return call_end(&c, rv);
}

CK_RV C_WrapKey(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_OBJECT_HANDLE hWrappingKey,
                CK_OBJECT_HANDLE hKey, CK_BYTE_PTR pWrappedKey, CK_ULONG_PTR pulWrappedKeyLen)
{
    struct call c;
    CK_RV rv;

    if (pulWrappedKeyLen == NULL)
        return CKR_ARGUMENTS_BAD;
    rv = begin_keyed(&c, hSession, CALL_WRAP_KEY, pMechanism, hWrappingKey);
    if (rv != CKR_OK)
        return rv;
    frame_put_u64(&c.request, hKey);
    put_room(&c.request, pWrappedKey, pulWrappedKeyLen);
    return call_end(&c, run_into(&c, pWrappedKey, pulWrappedKeyLen));
}

CK_RV C_UnwrapKey(CK_SESSION_HANDLE hSession, CK_MECHANISM_PTR pMechanism, CK_OBJECT_HANDLE hUnwrappingKey,
                  CK_BYTE_PTR pWrappedKey, CK_ULONG ulWrappedKeyLen, CK_ATTRIBUTE_PTR pTemplate,
                  CK_ULONG ulAttributeCount, CK_OBJECT_HANDLE_PTR phKey)
{
    struct call c;
    CK_RV rv = check_template(pTemplate, ulAttributeCount);

    if (rv != CKR_OK)
        return rv;
    if (pWrappedKey == NULL || phKey == NULL)
        return CKR_ARGUMENTS_BAD;
    if (ulWrappedKeyLen > MAX_WRAPPED)
        return CKR_WRAPPED_KEY_LEN_RANGE;
    rv = begin_keyed(&c, hSession, CALL_UNWRAP_KEY, pMechanism, hUnwrappingKey);
    if (rv != CKR_OK)
        return rv;
    frame_put_string(&c.request, pWrappedKey, ulWrappedKeyLen);
    frame_put_template(&c.request, pTemplate, ulAttributeCount);
    rv = call_run(&c, false);
    if (rv == CKR_OK)
        *phKey = frame_get_u64(&c.reply);
    return call_end(&c, rv);
}

CK_RV C_SeedRandom(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pSeed, CK_ULONG ulSeedLen)
{
    struct call c;
    CK_RV rv = check_data(pSeed, ulSeedLen);

    if (rv != CKR_OK)
        return rv;
    rv = call_begin(&c, hSession, CALL_SEED_RANDOM);
    if (rv != CKR_OK)
        return rv;
    c.secret = true;
    frame_put_string(&c.request, pSeed, ulSeedLen);
    return call_end(&c, call_run(&c, false));
}

CK_RV C_GenerateRandom(CK_SESSION_HANDLE hSession, CK_BYTE_PTR pRandomData, CK_ULONG ulRandomLen)
{
    CK_RV rv = CKR_OK;

    if (pRandomData == NULL && ulRandomLen > 0)
        return CKR_ARGUMENTS_BAD;
    do {
        CK_ULONG piece = ulRandomLen < CHUNK ? ulRandomLen : CHUNK;
        const unsigned char *bytes;
        struct call c;
        size_t size;

        rv = call_begin(&c, hSession, CALL_GENERATE_RANDOM);
        if (rv != CKR_OK)
            return rv;
        frame_put_u64(&c.request, piece);
        rv = call_run(&c, false);
        if (rv == CKR_OK) {
            bytes = frame_get_string(&c.reply, &size);
            if (bytes == NULL || size != piece)
                c.reply.bad = true;
            else if (size > 0)
                memcpy(pRandomData, bytes, size);
            if (c.reply.bad == false)
                explicit_bzero(c.reply.data, c.reply.size); /* may become someone's key */
        }
        rv = call_end(&c, rv);
        if (piece > 0)
            pRandomData += piece;
        ulRandomLen -= piece;
    } while (rv == CKR_OK && ulRandomLen > 0);
    return rv;
}

/* --- the list ------------------------------------------------------------------------------------------------- */

EXPORT CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR ppFunctionList)
{
    /* In the order of PKCS#11 v2.40, all 68. */
    static CK_FUNCTION_LIST list = {
        {2, 40},
        C_Initialize,
        C_Finalize,
        C_GetInfo,
        C_GetFunctionList,
        C_GetSlotList,
        C_GetSlotInfo,
        C_GetTokenInfo,
        C_GetMechanismList,
        C_GetMechanismInfo,
        C_InitToken,
        C_InitPIN,
        C_SetPIN,
        C_OpenSession,
        C_CloseSession,
        C_CloseAllSessions,
        C_GetSessionInfo,
        C_GetOperationState,
        C_SetOperationState,
        C_Login,
        C_Logout,
        C_CreateObject,
        C_CopyObject,
        C_DestroyObject,
        C_GetObjectSize,
        C_GetAttributeValue,
        C_SetAttributeValue,
        C_FindObjectsInit,
        C_FindObjects,
        C_FindObjectsFinal,
        C_EncryptInit,
        C_Encrypt,
        C_EncryptUpdate,
        C_EncryptFinal,
        C_DecryptInit,
        C_Decrypt,
        C_DecryptUpdate,
        C_DecryptFinal,
        C_DigestInit,
        C_Digest,
        C_DigestUpdate,
        C_DigestKey,
        C_DigestFinal,
        C_SignInit,
        C_Sign,
        C_SignUpdate,
        C_SignFinal,
        C_SignRecoverInit,
        C_SignRecover,
        C_VerifyInit,
        C_Verify,
        C_VerifyUpdate,
        C_VerifyFinal,
        C_VerifyRecoverInit,
        C_VerifyRecover,
        C_DigestEncryptUpdate,
        C_DecryptDigestUpdate,
        C_SignEncryptUpdate,
        C_DecryptVerifyUpdate,
        C_GenerateKey,
        C_GenerateKeyPair,
        C_WrapKey,
        C_UnwrapKey,
        C_DeriveKey,
        C_SeedRandom,
        C_GenerateRandom,
        C_GetFunctionStatus,
        C_CancelFunction,
        C_WaitForSlotEvent,
    };

    if (ppFunctionList == NULL)
        return CKR_ARGUMENTS_BAD;
    *ppFunctionList = &list;
    return CKR_OK;
}
