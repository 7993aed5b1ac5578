/*
 * state.h - what the module knows between calls: whether it is initialised, its control connection, its sessions.
 */
#ifndef YINJIAN_STATE_H
#define YINJIAN_STATE_H

#include "link.h"

/* The most sessions of one process. */
#define MAX_SESSIONS 4096u

struct session {
    struct link link;
    CK_SLOT_ID slot;
    unsigned refs; /* the table's and those of running calls; guarded by the table's lock */
    unsigned long generation; /* the C_Initialize it belongs to; constant */

    /*
     * The longest result of the running operation, 0 when none runs. Length queries and buffers that are too small
     * are answered from these, so that the daemon signs once. Guarded by link.lock.
     */
    CK_ULONG sign_size;
    CK_ULONG digest_size;
};

CK_RV state_initialize(const char *reserved);
CK_RV state_finalize(void);

/* CKR_CRYPTOKI_NOT_INITIALIZED before C_Initialize, after C_Finalize and in a child of fork. */
CK_RV state_check(void);

/* Opens a connection for a session that is not in the table yet. */
CK_RV state_connect(struct session **out);

/* Puts a session into the table, which takes over the caller's reference. */
CK_RV state_add(struct session *s, CK_SESSION_HANDLE *handle);

/* A session by its handle, with a reference and its lock held. state_release gives both back. */
CK_RV state_acquire(CK_SESSION_HANDLE handle, struct session **out);
void state_release(struct session *s);

/* Takes a session out of the table; the caller gets the table's reference. NULL when there is none. */
struct session *state_remove(CK_SESSION_HANDLE handle);

/* Gives a reference back without a lock. */
void state_unref(struct session *s);

/* Ends all sessions with a slot on this side. */
void state_drop_slot(CK_SLOT_ID slot);

/*
 * One exchange on the control connection, which is dialled anew if it died. With again, a connection that turns out
 * to be closed (a daemon that was restarted) is dialled anew and the request repeated once. What must not be repeated
 * is what computes for long, too: C_InitToken.
 */
CK_RV state_control(struct frame *request, struct frame *reply, bool again);

#endif
