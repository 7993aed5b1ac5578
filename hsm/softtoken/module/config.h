/*
 * config.h - where the daemon's socket is.
 *
 * Looked for in this order:
 *   1. the string in CK_C_INITIALIZE_ARGS.pReserved:  socket='/path' timeout_ms=10000
 *   2. the file beside the module, its name with ".conf" added, one setting a line:  socket=/path
 *   3. the environment variable YINJIAN_P11_SOCKET (not in a program with raised privileges)
 *
 * timeout_ms, 100 to 60000, is how long a call may wait for the daemon; 10000 unless set. The path must be absolute.
 */
#ifndef YINJIAN_CONFIG_H
#define YINJIAN_CONFIG_H

#include <sys/un.h>

#include <p11-kit/pkcs11.h>

struct config {
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    unsigned timeout_ms;
};

/* CKR_ARGUMENTS_BAD for a bad pReserved, CKR_GENERAL_ERROR for a bad file or when no path is to be had. */
CK_RV config_load(struct config *c, const char *reserved);

#endif
