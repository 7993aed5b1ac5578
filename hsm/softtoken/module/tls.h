/*
 * tls.h - TLS 1.3 to a daemon on another machine, by OpenSSL 3 (libssl.so.3), which is loaded when a program first asks
 * for such a daemon: whoever uses the unix socket needs libc alone.
 *
 * Both sides know each other by their very certificates, which stand in one PEM file: our key, our certificate, the
 * daemon's certificate. Nothing else is looked at, not even the date. A file that others may read is not used.
 */
#ifndef YINJIAN_TLS_H
#define YINJIAN_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct tls;

/* How bytes go out and come in. They answer false, or 0, when the connection or its time has ended. */
struct tls_wire {
    bool (*send)(int fd, const unsigned char *p, size_t n, long long deadline);
    size_t (*receive)(int fd, unsigned char *p, size_t n, long long deadline);
};

/* The handshake on fd; NULL when the library, the file or the daemon does not do. wire must outlive what is answered. */
struct tls *tls_open(int fd, const char *credentials, const struct tls_wire *wire, long long deadline);

bool tls_send(struct tls *t, const unsigned char *p, size_t n, long long deadline);

/* At least one byte and n at most; 0 when the connection or its time has ended. */
size_t tls_receive(struct tls *t, unsigned char *p, size_t n, long long deadline);

/* Gives memory back and says nothing to the daemon; fd stays open. */
void tls_free(struct tls *t);

#endif
