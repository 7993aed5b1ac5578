/* state.c - see state.h. */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "protocol.h"

/*
 * A handle is a place in the table (its low 12 bits) and a number that grows, so that a handle of a closed session
 * does not come to mean another one.
 */
#define PLACE_BITS 12u

/* Makes C_Initialize and C_Finalize one at a time; taken before the others. */
static pthread_mutex_t life = PTHREAD_MUTEX_INITIALIZER;

/* Guards the table: ready, places and every session's refs. Held for a few instructions, never across an exchange. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool ready;
static atomic_int owner; /* the process that called C_Initialize; 0: none did, or this is a child of it */
static struct {
    struct session *session;
    CK_SESSION_HANDLE handle;
} places[MAX_SESSIONS];
static CK_SESSION_HANDLE last_number;

/* Written by C_Initialize, with life, control.lock and the table's lock held; any one of them is enough to read. */
static struct config config;
static unsigned char app_id[APP_ID_SIZE];

/* Counts C_Initialize, so that a session that was being opened across a C_Finalize is not taken for a new one. */
static unsigned long generation;

/* Lives as long as the module: a call may still wait for its lock when C_Finalize and C_Initialize have gone by. */
static struct link control = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

/* The table must not be half changed in the child. The lock is held for a few instructions only. */
static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork_parent(void)
{
    pthread_mutex_unlock(&lock);
}

/*
 * In a child of fork the locks may be held by threads that do not exist, and the connections belong to the parent:
 * the daemon would see them open after the parent has ended. So the child starts from nothing. The sessions' memory
 * is left, since malloc must not be called here; so is the connection of a session that another thread was just
 * opening or closing, until the child's exec or end.
 */
static void after_fork(void)
{
    size_t i;

    for (i = 0; i < MAX_SESSIONS; i++) {
        if (places[i].session != NULL)
            link_abandon(&places[i].session->link);
        places[i].session = NULL;
    }
    link_abandon(&control);
    ready = false;
    atomic_store(&owner, 0);
    pthread_mutex_init(&life, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&control.lock, NULL);
}

__attribute__((constructor)) static void register_fork_handler(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork);
}

static bool own_process(void)
{
    return atomic_load(&owner) == getpid();
}

CK_RV state_check(void)
{
    bool ok;

    /* A child made by clone() does not run the handler above. */
    if (!own_process())
        return CKR_CRYPTOKI_NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    ok = ready;
    pthread_mutex_unlock(&lock);
    return ok ? CKR_OK : CKR_CRYPTOKI_NOT_INITIALIZED;
}

static bool draw_app_id(unsigned char *out)
{
    ssize_t n;

    do
        n = getrandom(out, APP_ID_SIZE, 0);
    while (n < 0 && errno == EINTR);
    return n == APP_ID_SIZE;
}

CK_RV state_initialize(const char *reserved)
{
    unsigned char fresh_id[APP_ID_SIZE];
    struct config fresh;
    int was = atomic_load(&owner);
    CK_RV rv;

    /* After clone() without the handlers. One thread of the child wins, and it is the only one that may be there. */
    if (was != 0 && was != getpid() && atomic_compare_exchange_strong(&owner, &was, 0))
        after_fork();
    pthread_mutex_lock(&life);
    if (state_check() == CKR_OK) {
        pthread_mutex_unlock(&life);
        return CKR_CRYPTOKI_ALREADY_INITIALIZED;
    }
    rv = config_load(&fresh, reserved);
    if (rv == CKR_OK && !draw_app_id(fresh_id))
        rv = CKR_GENERAL_ERROR;
    if (rv == CKR_OK) {
        pthread_mutex_lock(&control.lock);
        /* A module that says it works while there is no daemon would only move the failure elsewhere. */
        if (link_dial(&control, &fresh, fresh_id) != CKR_OK)
            rv = CKR_DEVICE_ERROR;
        if (rv == CKR_OK) {
            pthread_mutex_lock(&lock);
            config = fresh;
            memcpy(app_id, fresh_id, sizeof app_id);
            generation++;
            atomic_store(&owner, getpid());
            ready = true;
            pthread_mutex_unlock(&lock);
        }
        pthread_mutex_unlock(&control.lock);
    }
    pthread_mutex_unlock(&life);
    return rv;
}

/* Takes every session with slot, or all of them, out of the table and ends it. */
static void drop(bool all, CK_SLOT_ID slot)
{
    size_t i;

    for (i = 0; i < MAX_SESSIONS; i++) {
        struct session *s;

        pthread_mutex_lock(&lock);
        s = places[i].session;
        if (s != NULL && (all || s->slot == slot))
            places[i].session = NULL;
        else
            s = NULL;
        pthread_mutex_unlock(&lock);
        if (s != NULL) {
            link_interrupt(&s->link);
            state_unref(s);
        }
    }
}

void state_drop_slot(CK_SLOT_ID slot)
{
    drop(false, slot);
}

CK_RV state_finalize(void)
{
    struct frame request, reply;

    pthread_mutex_lock(&life);
    if (state_check() != CKR_OK) {
        pthread_mutex_unlock(&life);
        return CKR_CRYPTOKI_NOT_INITIALIZED;
    }
    /* The daemon ends the sessions before it answers, so that whoever comes next finds none. */
    frame_request(&request, CALL_FINALIZE);
    frame_start(&reply);
    pthread_mutex_lock(&control.lock);
    if (control.fd >= 0)
        (void)link_exchange(&control, &request, &reply, false);
    pthread_mutex_lock(&lock);
    ready = false;
    pthread_mutex_unlock(&lock);
    link_close(&control);
    pthread_mutex_unlock(&control.lock);
    frame_end(&request, false);
    frame_end(&reply, false);
    drop(true, 0);
    pthread_mutex_unlock(&life);
    return CKR_OK;
}

CK_RV state_connect(struct session **out)
{
    struct session *s = calloc(1, sizeof *s);
    unsigned char id[APP_ID_SIZE];
    struct config now;
    CK_RV rv;

    if (s == NULL)
        return CKR_HOST_MEMORY;
    link_init(&s->link);
    s->refs = 1;
    pthread_mutex_lock(&lock);
    now = config;
    memcpy(id, app_id, sizeof id);
    s->generation = generation;
    pthread_mutex_unlock(&lock);
    rv = link_dial(&s->link, &now, id);
    if (rv != CKR_OK) {
        state_unref(s);
        return rv;
    }
    *out = s;
    return CKR_OK;
}

CK_RV state_add(struct session *s, CK_SESSION_HANDLE *handle)
{
    CK_RV rv = CKR_SESSION_COUNT;
    size_t i;

    pthread_mutex_lock(&lock);
    if (!ready || s->generation != generation)
        rv = CKR_CRYPTOKI_NOT_INITIALIZED; /* C_Finalize came between */
    for (i = 0; rv == CKR_SESSION_COUNT && i < MAX_SESSIONS; i++) {
        if (places[i].session != NULL)
            continue;
        last_number++;
        places[i].session = s;
        places[i].handle = last_number << PLACE_BITS | i;
        *handle = places[i].handle;
        rv = CKR_OK;
        break;
    }
    pthread_mutex_unlock(&lock);
    return rv;
}

/* The table's session of a handle; the caller holds the table's lock. */
static struct session **find(CK_SESSION_HANDLE handle)
{
    size_t i = handle % MAX_SESSIONS;

    if (places[i].session == NULL || places[i].handle != handle)
        return NULL;
    return &places[i].session;
}

CK_RV state_acquire(CK_SESSION_HANDLE handle, struct session **out)
{
    struct session **s;

    if (!own_process())
        return CKR_CRYPTOKI_NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    if (!ready) {
        pthread_mutex_unlock(&lock);
        return CKR_CRYPTOKI_NOT_INITIALIZED;
    }
    s = find(handle);
    if (s == NULL) {
        pthread_mutex_unlock(&lock);
        return CKR_SESSION_HANDLE_INVALID;
    }
    *out = *s;
    (*out)->refs++;
    pthread_mutex_unlock(&lock);
    pthread_mutex_lock(&(*out)->link.lock);
    return CKR_OK;
}

void state_release(struct session *s)
{
    pthread_mutex_unlock(&s->link.lock);
    state_unref(s);
}

struct session *state_remove(CK_SESSION_HANDLE handle)
{
    struct session **place, *s = NULL;

    pthread_mutex_lock(&lock);
    place = find(handle);
    if (place != NULL) {
        s = *place;
        *place = NULL;
    }
    pthread_mutex_unlock(&lock);
    return s;
}

void state_unref(struct session *s)
{
    unsigned left;

    pthread_mutex_lock(&lock);
    left = --s->refs;
    pthread_mutex_unlock(&lock);
    if (left > 0)
        return;
    link_close(&s->link);
    pthread_mutex_destroy(&s->link.lock);
    free(s);
}

CK_RV state_control(struct frame *request, struct frame *reply, bool again)
{
    CK_RV rv = state_check();
    bool fresh = false;

    if (rv != CKR_OK)
        return rv;
    if (request->bad)
        return CKR_HOST_MEMORY;
    pthread_mutex_lock(&control.lock);
    rv = state_check(); /* C_Finalize may have come first */
    if (rv == CKR_OK && (control.fd < 0 || atomic_load(&control.dead))) {
        fresh = true;
        rv = link_dial(&control, &config, app_id);
    }
    if (rv == CKR_OK) {
        rv = link_exchange(&control, request, reply, !again);
        if (atomic_load(&control.dead) && again && !fresh && !control.hung) {
            frame_end(reply, false);
            rv = link_dial(&control, &config, app_id);
            if (rv == CKR_OK)
                rv = link_exchange(&control, request, reply, false);
        }
    }
    pthread_mutex_unlock(&control.lock);
    return rv;
}
