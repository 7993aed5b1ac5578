/*
 * config.h - where the daemon is.
 *
 * Looked for in this order:
 *   1. the string in CK_C_INITIALIZE_ARGS.pReserved:  socket='/path' timeout_ms=10000
 *   2. the file beside the module, its name with ".conf" added, one setting a line:  socket=/path
 *   3. the environment (not in a program with raised privileges): YINJIAN_P11_SOCKET, or YINJIAN_P11_ADDRESS and
 *      YINJIAN_P11_CREDENTIALS
 *
 * timeout_ms, 100 to 60000, is how long a call may wait for the daemon; 10000 unless set. Paths must be absolute. In
 * the place of socket=, a daemon on another machine:  address=192.0.2.30:7443 credentials='/path/link-client.pem'
 * address is numeric, an IPv6 one in brackets; credentials is the file that the daemon wrote for us (tls.h).
 */
#ifndef YINJIAN_CONFIG_H
#define YINJIAN_CONFIG_H

#include <limits.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <p11-kit/pkcs11.h>

struct config {
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)]; /* "": on another machine, */
    struct sockaddr_storage address;                        /* there; */
    socklen_t address_size;                                 /* 0: nothing is configured */
    char credentials[PATH_MAX];
    unsigned timeout_ms;
};

/* CKR_ARGUMENTS_BAD for a bad pReserved, CKR_GENERAL_ERROR for a bad file or when no path is to be had. */
CK_RV config_load(struct config *c, const char *reserved);

#endif
