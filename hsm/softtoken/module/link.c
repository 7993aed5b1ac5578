/* link.c - see link.h. */
#define _GNU_SOURCE
#include "link.h"

#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

/* Generating an RSA key pair is a matter of luck, and a PIN that is set is stretched and stored: they are given at least this long. */
#define SLOW_TIMEOUT_MS 30000u

static long long now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static bool set_timeout(int fd, int option, unsigned ms)
{
    struct timeval t = {.tv_sec = ms / 1000, .tv_usec = (ms % 1000) * 1000};

    return setsockopt(fd, SOL_SOCKET, option, &t, sizeof t) == 0;
}

/*
 * The socket's own timeout bounds one call; deadline bounds them all, so that neither signals nor a daemon that
 * answers byte by byte make the wait longer than twice the timeout.
 */
static bool send_all(int fd, const unsigned char *p, size_t n, long long deadline)
{
    while (n > 0) {
        ssize_t k = send(fd, p, n, MSG_NOSIGNAL);

        if (k < 0 && errno != EINTR)
            return false;
        if (k > 0) {
            p += k;
            n -= (size_t)k;
        }
        if (n > 0 && now_ms() > deadline)
            return false;
    }
    return true;
}

/* At least one byte, 0 when the connection or its time has ended. */
static size_t receive_some(int fd, unsigned char *p, size_t n, long long deadline)
{
    while (now_ms() <= deadline) {
        ssize_t k = recv(fd, p, n, 0);

        if (k > 0)
            return (size_t)k;
        if (k == 0 || errno != EINTR)
            return 0;
    }
    return 0;
}

static const struct tls_wire wire = {send_all, receive_some};

static bool put(struct link *l, const unsigned char *p, size_t n, long long deadline)
{
    return l->tls != NULL ? tls_send(l->tls, p, n, deadline) : send_all(l->fd, p, n, deadline);
}

static bool get(struct link *l, unsigned char *p, size_t n, long long deadline)
{
    while (n > 0) {
        size_t k = l->tls != NULL ? tls_receive(l->tls, p, n, deadline) : receive_some(l->fd, p, n, deadline);

        if (k == 0)
            return false;
        p += k;
        n -= k;
    }
    return true;
}

void link_init(struct link *l)
{
    pthread_mutex_init(&l->lock, NULL);
    l->fd = -1;
    l->tls = NULL;
    atomic_store(&l->dead, false);
    l->hung = false;
    l->timeout_ms = 0;
}

void link_close(struct link *l)
{
    tls_free(l->tls);
    link_abandon(l);
}

void link_abandon(struct link *l)
{
    int fd = l->fd;

    l->tls = NULL;

    /* First forgotten, then closed: a fork between the two leaks a descriptor and never closes somebody else's. */
    l->fd = -1;
    if (fd >= 0)
        close(fd);
}

void link_interrupt(struct link *l)
{
    if (l->fd >= 0)
        shutdown(l->fd, SHUT_RDWR);
}

/* Receives one reply into f, which is started here. */
static CK_RV receive_reply(struct link *l, struct frame *f, long long deadline)
{
    uint32_t size;

    frame_start(f);
    if (!get(l, (unsigned char *)&size, sizeof size, deadline))
        return CKR_DEVICE_REMOVED;
    size = be32toh(size);
    if (size < 8 || size > MAX_FRAME)
        return CKR_DEVICE_REMOVED;
    if (!frame_reserve(f, size))
        return CKR_HOST_MEMORY;
    if (!get(l, f->data, size, deadline))
        return CKR_DEVICE_REMOVED;
    f->size = size;
    return CKR_OK;
}

CK_RV link_dial(struct link *l, const struct config *c, const unsigned char *app_id)
{
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    const struct sockaddr *address = (const struct sockaddr *)&path;
    socklen_t size = sizeof path;
    unsigned char hello[4 + APP_ID_SIZE];
    struct frame reply;
    long long deadline = now_ms() + c->timeout_ms;
    CK_RV rv;

    memcpy(path.sun_path, c->path, sizeof c->path);
    if (c->path[0] == '\0') {
        address = (const struct sockaddr *)&c->address;
        size = c->address_size;
    }
    memcpy(hello, HELLO_MAGIC, 4);
    memcpy(hello + 4, app_id, APP_ID_SIZE);
    frame_start(&reply);
    link_close(l);
    l->timeout_ms = c->timeout_ms;
    l->fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (l->fd < 0)
        return CKR_HOST_MEMORY;
    rv = CKR_DEVICE_REMOVED;
    /* The timeout for sending also bounds connect(), which waits while the daemon's queue is full. */
    if (!set_timeout(l->fd, SO_SNDTIMEO, c->timeout_ms) || !set_timeout(l->fd, SO_RCVTIMEO, c->timeout_ms))
        goto fail;
    while (connect(l->fd, address, size) != 0)
        if (errno != EINTR || now_ms() > deadline)
            goto fail;
    if (c->path[0] == '\0') {
        int on = 1;

        if (setsockopt(l->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0)
            goto fail;
        l->tls = tls_open(l->fd, c->credentials, &wire, deadline);
        if (l->tls == NULL)
            goto fail;
    }
    if (!put(l, hello, sizeof hello, deadline))
        goto fail;
    rv = receive_reply(l, &reply, deadline);
    if (rv == CKR_OK)
        rv = frame_get_u64(&reply);
    if (rv == CKR_OK && !frame_done(&reply))
        rv = CKR_DEVICE_REMOVED;
    if (rv != CKR_OK)
        goto fail;
    frame_end(&reply, false);
    atomic_store(&l->dead, false);
    return CKR_OK;
fail:
    frame_end(&reply, false);
    link_close(l);
    atomic_store(&l->dead, true);
    return rv;
}

CK_RV link_exchange(struct link *l, struct frame *request, struct frame *reply, bool slow)
{
    bool longer = slow && l->timeout_ms < SLOW_TIMEOUT_MS;
    long long deadline = now_ms() + (longer ? SLOW_TIMEOUT_MS : l->timeout_ms);
    uint32_t size;
    CK_RV rv = CKR_DEVICE_REMOVED;

    if (l->fd < 0 || atomic_load(&l->dead))
        return CKR_DEVICE_REMOVED;
    size = htobe32((uint32_t)(request->size - 4));
    memcpy(request->data, &size, sizeof size);
    if (longer && !set_timeout(l->fd, SO_RCVTIMEO, SLOW_TIMEOUT_MS))
        goto fail;
    if (!put(l, request->data, request->size, deadline))
        goto fail;
    rv = receive_reply(l, reply, deadline);
    if (rv != CKR_OK)
        goto fail;
    if (longer && !set_timeout(l->fd, SO_RCVTIMEO, l->timeout_ms)) {
        rv = CKR_DEVICE_REMOVED;
        goto fail;
    }
    return frame_get_u64(reply);
fail:
    l->hung = now_ms() >= deadline - l->timeout_ms / 2;
    atomic_store(&l->dead, true);
    return rv;
}
