/* frame.c - see frame.h. Integers are big-endian. */
#define _GNU_SOURCE
#include "frame.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "protocol.h"

void frame_start(struct frame *f)
{
    f->data = f->local;
    f->size = 0;
    f->room = sizeof f->local;
    f->at = 0;
    f->bad = false;
}

void frame_end(struct frame *f, bool wipe)
{
    if (wipe)
        explicit_bzero(f->data, f->size);
    if (f->data != f->local)
        free(f->data);
    frame_start(f);
}

bool frame_reserve(struct frame *f, size_t size)
{
    unsigned char *grown;
    size_t room;

    if (f->bad)
        return false;
    /* Four bytes more than a frame's limit, for the length field. */
    if (size > (size_t)MAX_FRAME + 4) {
        f->bad = true;
        return false;
    }
    if (size <= f->room)
        return true;
    room = size * 2;
    grown = malloc(room);
    if (grown == NULL) {
        f->bad = true;
        return false;
    }
    memcpy(grown, f->data, f->size);
    /* What is left behind may be a PIN. */
    explicit_bzero(f->data, f->size);
    if (f->data != f->local)
        free(f->data);
    f->data = grown;
    f->room = room;
    return true;
}

static void put(struct frame *f, const void *data, size_t size)
{
    if (f->bad || size > MAX_FRAME || !frame_reserve(f, f->size + size)) {
        f->bad = true;
        return;
    }
    if (size > 0)
        memcpy(f->data + f->size, data, size);
    f->size += size;
}

void frame_put_u32(struct frame *f, uint32_t v)
{
    v = htobe32(v);
    put(f, &v, sizeof v);
}

void frame_request(struct frame *f, uint32_t call)
{
    frame_start(f);
    frame_put_u32(f, 0); /* the length, filled in when the frame is sent */
    frame_put_u32(f, call);
}

void frame_put_u64(struct frame *f, uint64_t v)
{
    v = htobe64(v);
    put(f, &v, sizeof v);
}

void frame_put_string(struct frame *f, const void *data, size_t size)
{
    if (size > MAX_FRAME) {
        f->bad = true;
        return;
    }
    frame_put_u32(f, (uint32_t)size);
    put(f, data, size);
}

void frame_put_template(struct frame *f, const CK_ATTRIBUTE *templ, CK_ULONG count)
{
    CK_ULONG i;

    frame_put_u32(f, (uint32_t)count);
    for (i = 0; i < count && !f->bad; i++) {
        frame_put_u64(f, templ[i].type);
        frame_put_string(f, templ[i].pValue, templ[i].pValue == NULL ? 0 : templ[i].ulValueLen);
    }
}

bool frame_takes_gcm(const CK_MECHANISM *mechanism)
{
    return mechanism->mechanism == MECHANISM_SM4_GCM || mechanism->mechanism == MECHANISM_AES_GCM;
}

void frame_put_mechanism(struct frame *f, const CK_MECHANISM *mechanism)
{
    frame_put_u64(f, mechanism->mechanism);
    if (frame_takes_gcm(mechanism) && mechanism->pParameter != NULL) {
        CK_GCM_PARAMS gcm;

        memcpy(&gcm, mechanism->pParameter, sizeof gcm);
        frame_put_u32(f, (uint32_t)(4 + gcm.ulIvLen + 4 + gcm.ulAADLen + 8));
        frame_put_string(f, gcm.pIv, gcm.ulIvLen);
        frame_put_string(f, gcm.pAAD, gcm.ulAADLen);
        frame_put_u64(f, gcm.ulTagBits);
        return;
    }
    frame_put_string(f, mechanism->pParameter, mechanism->pParameter == NULL ? 0 : mechanism->ulParameterLen);
}

const unsigned char *frame_get_bytes(struct frame *f, size_t size)
{
    const unsigned char *p;

    if (f->bad || size > f->size - f->at) {
        f->bad = true;
        return NULL;
    }
    p = f->data + f->at;
    f->at += size;
    return p;
}

void frame_copy(struct frame *f, void *out, size_t size)
{
    const unsigned char *p = frame_get_bytes(f, size);

    if (p == NULL)
        memset(out, 0, size);
    else
        memcpy(out, p, size);
}

uint8_t frame_get_u8(struct frame *f)
{
    uint8_t v;

    frame_copy(f, &v, sizeof v);
    return v;
}

uint32_t frame_get_u32(struct frame *f)
{
    uint32_t v;

    frame_copy(f, &v, sizeof v);
    return be32toh(v);
}

uint64_t frame_get_u64(struct frame *f)
{
    uint64_t v;

    frame_copy(f, &v, sizeof v);
    return be64toh(v);
}

const unsigned char *frame_get_string(struct frame *f, size_t *size)
{
    uint32_t n = frame_get_u32(f);
    const unsigned char *p = frame_get_bytes(f, n);

    *size = p == NULL ? 0 : n;
    return p;
}

bool frame_done(const struct frame *f)
{
    return !f->bad && f->at == f->size;
}
