/* tls.c - see tls.h. */
#define _GNU_SOURCE
#include "tls.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>

/* Of OpenSSL 3: include/openssl/ssl.h, tls1.h, x509_vfy.h. */
#define FILETYPE_PEM 1
#define CTRL_SET_MIN_PROTO_VERSION 123
#define TLS1_3 0x0304
#define VERIFY_PEER 1
#define ERROR_WANT_READ 2
#define FLAG_PARTIAL_CHAIN 0x80000ul /* the daemon's certificate is trusted itself, whoever has issued it */
#define FLAG_NO_CHECK_TIME 0x200000ul

/* What is used of the library; its types stay its own. */
static struct {
    void *(*TLS_client_method)(void);
    void *(*SSL_CTX_new)(const void *);
    void (*SSL_CTX_free)(void *);
    long (*SSL_CTX_ctrl)(void *, int, long, void *);
    int (*SSL_CTX_use_certificate_file)(void *, const char *, int);
    int (*SSL_CTX_use_PrivateKey_file)(void *, const char *, int);
    int (*SSL_CTX_check_private_key)(const void *);
    int (*SSL_CTX_load_verify_locations)(void *, const char *, const char *);
    void (*SSL_CTX_set_verify)(void *, int, void *);
    void *(*SSL_CTX_get0_param)(void *);
    int (*X509_VERIFY_PARAM_set_flags)(void *, unsigned long);
    void *(*SSL_new)(void *);
    void (*SSL_free)(void *);
    void *(*BIO_s_mem)(void);
    void *(*BIO_new)(const void *);
    int (*BIO_free)(void *);
    int (*BIO_read)(void *, void *, int);
    int (*BIO_write)(void *, const void *, int);
    void (*SSL_set_bio)(void *, void *, void *);
    void (*SSL_set_connect_state)(void *);
    int (*SSL_do_handshake)(void *);
    int (*SSL_read)(void *, void *, int);
    int (*SSL_write)(void *, const void *, int);
    int (*SSL_get_error)(const void *, int);
    void (*ERR_clear_error)(void);
} ssl;

static bool loaded;

static void load(void)
{
    static const struct {
        const char *name;
        void *at;
    } wanted[] = {
#define WANT(name) {#name, &ssl.name}
        WANT(TLS_client_method), WANT(SSL_CTX_new), WANT(SSL_CTX_free), WANT(SSL_CTX_ctrl),
        WANT(SSL_CTX_use_certificate_file), WANT(SSL_CTX_use_PrivateKey_file), WANT(SSL_CTX_check_private_key),
        WANT(SSL_CTX_load_verify_locations), WANT(SSL_CTX_set_verify), WANT(SSL_CTX_get0_param),
        WANT(X509_VERIFY_PARAM_set_flags), WANT(SSL_new), WANT(SSL_free), WANT(BIO_s_mem), WANT(BIO_new), WANT(BIO_free),
        WANT(BIO_read), WANT(BIO_write), WANT(SSL_set_bio), WANT(SSL_set_connect_state), WANT(SSL_do_handshake),
        WANT(SSL_read), WANT(SSL_write), WANT(SSL_get_error), WANT(ERR_clear_error),
#undef WANT
    };
    void *library = dlopen("libssl.so.3", RTLD_NOW | RTLD_LOCAL); /* kept: OpenSSL does not unload cleanly */
    size_t i;

    if (library == NULL)
        return;
    for (i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *(void **)wanted[i].at = dlsym(library, wanted[i].name);
        if (*(void **)wanted[i].at == NULL)
            return;
    }
    loaded = true;
}

struct tls {
    int fd;
    const struct tls_wire *wire;
    void *session;
    void *in, *out; /* memory between session and fd, so that our own deadlines and MSG_NOSIGNAL hold; owned by session */
};

void tls_free(struct tls *t)
{
    if (t == NULL)
        return;
    ssl.SSL_free(t->session);
    free(t);
}

/* The file holds a key: nobody but its owner may read it. */
static bool is_private(const char *file)
{
    struct stat s;

    return stat(file, &s) == 0 && (s.st_mode & (S_IRWXG | S_IRWXO)) == 0;
}

/* A context for the file's key and certificates. */
static void *context(const char *credentials)
{
    void *c = is_private(credentials) ? ssl.SSL_CTX_new(ssl.TLS_client_method()) : NULL;

    if (c == NULL)
        return NULL;
    /* Of the file's certificates the first is ours. The daemon's must be good for a server, which ours is not. */
    if (ssl.SSL_CTX_ctrl(c, CTRL_SET_MIN_PROTO_VERSION, TLS1_3, NULL) == 1 &&
        ssl.SSL_CTX_use_certificate_file(c, credentials, FILETYPE_PEM) == 1 &&
        ssl.SSL_CTX_use_PrivateKey_file(c, credentials, FILETYPE_PEM) == 1 && ssl.SSL_CTX_check_private_key(c) == 1 &&
        ssl.SSL_CTX_load_verify_locations(c, credentials, NULL) == 1 &&
        ssl.X509_VERIFY_PARAM_set_flags(ssl.SSL_CTX_get0_param(c), FLAG_PARTIAL_CHAIN | FLAG_NO_CHECK_TIME) == 1) {
        ssl.SSL_CTX_set_verify(c, VERIFY_PEER, NULL);
        return c;
    }
    ssl.SSL_CTX_free(c);
    return NULL;
}

/* Sends what the session has written. */
static bool flush(struct tls *t, long long deadline)
{
    unsigned char block[4096];
    int n;

    while ((n = ssl.BIO_read(t->out, block, sizeof block)) > 0)
        if (!t->wire->send(t->fd, block, (size_t)n, deadline))
            return false;
    return true;
}

/*
 * After a call of the session's that answered result: sends what it wrote and, where it waits for more, receives some.
 * True: the call is to be made again.
 */
static bool again(struct tls *t, int result, long long deadline)
{
    unsigned char block[4096];
    int why = ssl.SSL_get_error(t->session, result);
    size_t n;

    if (!flush(t, deadline) || why != ERROR_WANT_READ)
        return false;
    n = t->wire->receive(t->fd, block, sizeof block, deadline);
    return n > 0 && ssl.BIO_write(t->in, block, (int)n) == (int)n;
}

struct tls *tls_open(int fd, const char *credentials, const struct tls_wire *wire, long long deadline)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct tls *t;
    void *c;
    int result;

    pthread_once(&once, load);
    if (!loaded)
        return NULL;
    ssl.ERR_clear_error();
    c = context(credentials);
    t = calloc(1, sizeof *t);
    if (c == NULL || t == NULL || (t->session = ssl.SSL_new(c)) == NULL) {
        free(t);
        if (c != NULL)
            ssl.SSL_CTX_free(c);
        return NULL;
    }
    ssl.SSL_CTX_free(c); /* the session keeps what it needs */
    t->fd = fd;
    t->wire = wire;
    t->in = ssl.BIO_new(ssl.BIO_s_mem());
    t->out = ssl.BIO_new(ssl.BIO_s_mem());
    if (t->in == NULL || t->out == NULL) {
        ssl.BIO_free(t->in);
        ssl.BIO_free(t->out);
        tls_free(t);
        return NULL;
    }
    ssl.SSL_set_bio(t->session, t->in, t->out);
    ssl.SSL_set_connect_state(t->session);
    do {
        ssl.ERR_clear_error();
        result = ssl.SSL_do_handshake(t->session);
    } while (result != 1 && again(t, result, deadline));
    if (result != 1 || !flush(t, deadline)) {
        tls_free(t);
        return NULL;
    }
    return t;
}

bool tls_send(struct tls *t, const unsigned char *p, size_t n, long long deadline)
{
    while (n > 0) {
        int part = n > 16384 ? 16384 : (int)n;
        int k;

        ssl.ERR_clear_error();
        k = ssl.SSL_write(t->session, p, part);
        if (k <= 0) {
            if (!again(t, k, deadline))
                return false;
            continue;
        }
        if (!flush(t, deadline))
            return false;
        p += k;
        n -= (size_t)k;
    }
    return true;
}

size_t tls_receive(struct tls *t, unsigned char *p, size_t n, long long deadline)
{
    int part = n > 16384 ? 16384 : (int)n;
    int k;

    do {
        ssl.ERR_clear_error();
        k = ssl.SSL_read(t->session, p, part);
    } while (k <= 0 && again(t, k, deadline));
    return k > 0 ? (size_t)k : 0;
}
