/* config.c - see config.h. */
#define _GNU_SOURCE
#include "config.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <netdb.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_TIMEOUT_MS 10000u
#define MIN_TIMEOUT_MS 100u
#define MAX_TIMEOUT_MS 60000u

static bool set_path(char *path, size_t room, const char *value, size_t size)
{
    if (size == 0 || size >= room || value[0] != '/' || memchr(value, '\0', size) != NULL)
        return false;
    memcpy(path, value, size);
    path[size] = '\0';
    return true;
}

/* A numeric address and a port: nothing is asked that may not answer. */
static bool set_address(struct config *c, const char *value, size_t size)
{
    static const struct addrinfo numeric = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};
    char text[80], *host = text, *port;
    struct addrinfo *found;
    size_t end;

    if (size == 0 || size >= sizeof text || memchr(value, '\0', size) != NULL)
        return false;
    memcpy(text, value, size);
    text[size] = '\0';
    port = strrchr(text, ':');
    if (port == NULL)
        return false;
    *port++ = '\0';
    end = strlen(host);
    if (end > 2 && host[0] == '[' && host[end - 1] == ']') {
        host[end - 1] = '\0';
        host++;
    }
    if (*host == '\0' || *port == '\0' || getaddrinfo(host, port, &numeric, &found) != 0)
        return false;
    memcpy(&c->address, found->ai_addr, found->ai_addrlen);
    c->address_size = found->ai_addrlen;
    freeaddrinfo(found);
    return true;
}

static bool set_timeout(struct config *c, const char *value, size_t size)
{
    unsigned ms = 0;
    size_t i;

    if (size == 0 || size > 5)
        return false;
    for (i = 0; i < size; i++) {
        if (value[i] < '0' || value[i] > '9')
            return false;
        ms = ms * 10 + (unsigned)(value[i] - '0');
    }
    if (ms < MIN_TIMEOUT_MS || ms > MAX_TIMEOUT_MS)
        return false;
    c->timeout_ms = ms;
    return true;
}

static bool set(struct config *c, const char *key, size_t key_size, const char *value, size_t value_size)
{
    if (key_size == 6 && memcmp(key, "socket", 6) == 0)
        return set_path(c->path, sizeof c->path, value, value_size);
    if (key_size == 7 && memcmp(key, "address", 7) == 0)
        return set_address(c, value, value_size);
    if (key_size == 11 && memcmp(key, "credentials", 11) == 0)
        return set_path(c->credentials, sizeof c->credentials, value, value_size);
    if (key_size == 10 && memcmp(key, "timeout_ms", 10) == 0)
        return set_timeout(c, value, value_size);
    return false;
}

/* Words of the form key=value or key='value', parted by spaces. */
static bool parse_words(struct config *c, const char *s)
{
    for (;;) {
        const char *key, *value;
        size_t key_size, value_size;

        s += strspn(s, " \t\n");
        if (*s == '\0')
            return true;
        key = s;
        key_size = strcspn(s, "= \t\n");
        if (key[key_size] != '=')
            return false;
        value = key + key_size + 1;
        if (*value == '\'') {
            value++;
            value_size = strcspn(value, "'");
            if (value[value_size] != '\'')
                return false;
            s = value + value_size + 1;
        } else {
            value_size = strcspn(value, " \t\n");
            s = value + value_size;
        }
        if (!set(c, key, key_size, value, value_size))
            return false;
    }
}

/* Lines of the form key=value. Empty lines, and lines that begin with #, say nothing. */
static bool parse_file(struct config *c, FILE *file)
{
    char line[512];

    while (fgets(line, sizeof line, file) != NULL) {
        size_t size = strlen(line);
        const char *equals;

        if (size == sizeof line - 1 && line[size - 1] != '\n')
            return false; /* too long to be a setting */
        while (size > 0 && strchr(" \t\r\n", line[size - 1]) != NULL)
            line[--size] = '\0';
        if (size == 0 || line[0] == '#')
            continue;
        equals = strchr(line, '=');
        if (equals == NULL)
            return false;
        if (!set(c, line, (size_t)(equals - line), equals + 1, size - (size_t)(equals + 1 - line)))
            return false;
    }
    return !ferror(file);
}

/* The file beside the module. Its absence is no error. */
static bool load_file(struct config *c)
{
    char path[PATH_MAX];
    Dl_info self;
    FILE *file;
    int n;
    bool ok;

    if (dladdr((const void *)(size_t)&config_load, &self) == 0 || self.dli_fname == NULL)
        return true;
    n = snprintf(path, sizeof path, "%s.conf", self.dli_fname);
    if (n < 0 || (size_t)n >= sizeof path)
        return true;
    file = fopen(path, "re");
    if (file == NULL)
        return errno == ENOENT;
    ok = parse_file(c, file);
    fclose(file);
    return ok;
}

/* One daemon, and never another machine's without what both know each other by. */
static bool complete(const struct config *c)
{
    return (c->path[0] != '\0') != (c->address_size != 0) && (c->address_size != 0) == (c->credentials[0] != '\0');
}

static bool configured(const struct config *c)
{
    return c->path[0] != '\0' || c->address_size != 0 || c->credentials[0] != '\0';
}

static bool load_environment(struct config *c)
{
    static const char *const keys[][2] = {
        {"YINJIAN_P11_SOCKET", "socket"}, {"YINJIAN_P11_ADDRESS", "address"}, {"YINJIAN_P11_CREDENTIALS", "credentials"}};
    size_t i;

    for (i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *value = secure_getenv(keys[i][0]);

        if (value != NULL && !set(c, keys[i][1], strlen(keys[i][1]), value, strlen(value)))
            return false;
    }
    return true;
}

CK_RV config_load(struct config *c, const char *reserved)
{
    memset(c, 0, sizeof *c);
    c->timeout_ms = DEFAULT_TIMEOUT_MS;
    if (reserved != NULL && (!parse_words(c, reserved) || (configured(c) && !complete(c))))
        return CKR_ARGUMENTS_BAD;
    if (!configured(c) && !load_file(c))
        return CKR_GENERAL_ERROR;
    if (!configured(c) && !load_environment(c))
        return CKR_GENERAL_ERROR;
    return complete(c) ? CKR_OK : CKR_GENERAL_ERROR;
}
