/*
 * link.h - one connection to the daemon, and one exchange on it.
 *
 * Every wait has an end. A link that failed once stays dead: what the daemon did with the last request is not known,
 * and its answer, should it still come, must not be taken for the answer to another.
 */
#ifndef YINJIAN_LINK_H
#define YINJIAN_LINK_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "config.h"
#include "frame.h"
#include "tls.h"

struct link {
    pthread_mutex_t lock; /* held for one exchange; guards fd */
    int fd;               /* -1: not connected */
    struct tls *tls;      /* NULL: a unix socket */
    atomic_bool dead;
    bool hung; /* it died of a timeout, not of a closed connection */
    unsigned timeout_ms;
};

void link_init(struct link *l);

/*
 * Connects and says hello. CKR_DEVICE_REMOVED when there is no daemon or it does not answer, or what the daemon
 * answered. The caller holds the lock, or no other thread knows the link yet.
 */
CK_RV link_dial(struct link *l, const struct config *c, const unsigned char *app_id);

/*
 * Sends the request and receives the reply, whose results are then to be read from `reply`. Both frames are the
 * caller's to end. slow is for calls that compute for long (key generation, PINs). Answers the daemon's CK_RV, or
 * CKR_DEVICE_REMOVED on a dead link. The caller holds the lock.
 */
CK_RV link_exchange(struct link *l, struct frame *request, struct frame *reply, bool slow);

/*
 * Wakes whoever waits on the link; its exchange fails. No lock is needed, but the caller must know that the link is
 * neither dialled nor closed meanwhile.
 */
void link_interrupt(struct link *l);

/* Closes the connection. The caller holds the lock, or is the last who knows the link. */
void link_close(struct link *l);

/* Closes the connection in a child of fork, where memory must not be touched: what TLS holds is left. */
void link_abandon(struct link *l);

#endif
