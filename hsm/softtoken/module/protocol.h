/*
 * protocol.h - numbers that the module and the daemon share.
 *
 * The protocol is described in the documentation of the Go package softtoken; calls are numbered as PKCS#11 orders
 * its functions.
 */
#ifndef YINJIAN_PROTOCOL_H
#define YINJIAN_PROTOCOL_H

#define HELLO_MAGIC "YJP1"
#define APP_ID_SIZE 16u

/* The largest frame either side accepts, without its length field. */
#define MAX_FRAME (1u << 20)

/* The longest data that fits a frame beside a signature and the frame's own fields. */
#define MAX_DATA (MAX_FRAME - 1024u)

/* Data of multi-part operations, and random bytes, travel in pieces of this size. */
#define CHUNK (64u << 10)

/* The longest data that SM4-GCM authenticates beside what it encrypts. */
#define MAX_AAD (64u << 10)

/* Longer than any wrapped key is. */
#define MAX_WRAPPED (16u << 10)

/* The most attributes a template, or a list of types, may have. */
#define MAX_ATTRIBUTES 256u

enum {
    CALL_FINALIZE = 2,
    CALL_GET_SLOT_LIST = 4,
    CALL_GET_SLOT_INFO = 5,
    CALL_GET_TOKEN_INFO = 6,
    CALL_GET_MECHANISM_LIST = 7,
    CALL_GET_MECHANISM_INFO = 8,
    CALL_INIT_TOKEN = 9,
    CALL_OPEN_SESSION = 10,
    CALL_CLOSE_SESSION = 11,
    CALL_CLOSE_ALL_SESSIONS = 12,
    CALL_GET_SESSION_INFO = 13,
    CALL_INIT_PIN = 14,
    CALL_SET_PIN = 15,
    CALL_LOGIN = 18,
    CALL_LOGOUT = 19,
    CALL_CREATE_OBJECT = 20,
    CALL_COPY_OBJECT = 21,
    CALL_DESTROY_OBJECT = 22,
    CALL_GET_OBJECT_SIZE = 23,
    CALL_GET_ATTRIBUTE_VALUE = 24,
    CALL_SET_ATTRIBUTE_VALUE = 25,
    CALL_FIND_OBJECTS_INIT = 26,
    CALL_FIND_OBJECTS = 27,
    CALL_FIND_OBJECTS_FINAL = 28,
    CALL_ENCRYPT_INIT = 29,
    CALL_ENCRYPT = 30,
    CALL_ENCRYPT_UPDATE = 31,
    CALL_ENCRYPT_FINAL = 32,
    CALL_DECRYPT_INIT = 33,
    CALL_DECRYPT = 34,
    CALL_DECRYPT_UPDATE = 35,
    CALL_DECRYPT_FINAL = 36,
    CALL_DIGEST_INIT = 37,
    CALL_DIGEST = 38,
    CALL_DIGEST_UPDATE = 39,
    CALL_DIGEST_FINAL = 41,
    CALL_SIGN_INIT = 42,
    CALL_SIGN = 43,
    CALL_SIGN_UPDATE = 44,
    CALL_SIGN_FINAL = 45,
    CALL_VERIFY_INIT = 48,
    CALL_VERIFY = 49,
    CALL_VERIFY_UPDATE = 50,
    CALL_VERIFY_FINAL = 51,
    CALL_GENERATE_KEY = 58,
    CALL_GENERATE_KEY_PAIR = 59,
    CALL_WRAP_KEY = 60,
    CALL_UNWRAP_KEY = 61,
    CALL_SEED_RANDOM = 63,
    CALL_GENERATE_RANDOM = 64,
    CALL_CANCEL = 100
};

/* The argument of CALL_CANCEL. */
enum operation {
    OPERATION_SIGN = 1,
    OPERATION_VERIFY = 2,
    OPERATION_DIGEST = 3,
    OPERATION_ENCRYPT = 4,
    OPERATION_DECRYPT = 5
};

/* The mechanisms whose parameter is CK_GCM_PARAMS, which holds pointers and is flattened: PKCS#11's own, and SM4's. */
#define MECHANISM_AES_GCM 0x1087ul
#define MECHANISM_SM4_GCM 0xfffff00bul

#endif
