/*
 * frame.h - building requests and reading replies.
 *
 * A frame is a growing buffer with a reading position. Errors stick: after the first write that finds no memory, or
 * the first read that would go past the end, `bad` is set, writes do nothing and reads answer zero. Callers check
 * once, at the end. Nothing here touches a socket, so the parser can be fuzzed by itself.
 */
#ifndef YINJIAN_FRAME_H
#define YINJIAN_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <p11-kit/pkcs11.h>

struct frame {
    unsigned char *data; /* `local`, or from malloc */
    size_t size;         /* bytes that are there */
    size_t room;         /* bytes that fit */
    size_t at;           /* how far it is read */
    bool bad;
    unsigned char local[1024];
};

/* An empty frame. frame_end must be called on it. */
void frame_start(struct frame *f);

/* A request: room for the length field, and the call. */
void frame_request(struct frame *f, uint32_t call);

/* Gives memory back. With wipe, what was in it is overwritten first. */
void frame_end(struct frame *f, bool wipe);

/* Makes room for size bytes in all; false when there is no memory. */
bool frame_reserve(struct frame *f, size_t size);

void frame_put_u32(struct frame *f, uint32_t v);
void frame_put_u64(struct frame *f, uint64_t v);
void frame_put_string(struct frame *f, const void *data, size_t size);
void frame_put_template(struct frame *f, const CK_ATTRIBUTE *templ, CK_ULONG count);

/*
 * A mechanism. Where frame_takes_gcm says so, the parameter is a CK_GCM_PARAMS or absent, as the caller has checked, and
 * is written as IV, AAD and tag bits.
 */
void frame_put_mechanism(struct frame *f, const CK_MECHANISM *mechanism);

bool frame_takes_gcm(const CK_MECHANISM *mechanism);

uint8_t frame_get_u8(struct frame *f);
uint32_t frame_get_u32(struct frame *f);
uint64_t frame_get_u64(struct frame *f);

/* The next size bytes, NULL when they are not there. They belong to the frame. */
const unsigned char *frame_get_bytes(struct frame *f, size_t size);

/* A string: its bytes and, in *size, how many. NULL when it is not there. */
const unsigned char *frame_get_string(struct frame *f, size_t *size);

/* Copies exactly size bytes into out, zeros when they are not there. */
void frame_copy(struct frame *f, void *out, size_t size);

/* The reading is complete: all was there and nothing is left. */
bool frame_done(const struct frame *f);

#endif
