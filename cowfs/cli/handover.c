/*
 * cowfs-overlayfs as a program that starts in less than a millisecond: hands its work to the mount service of its user, and where that is not
 * possible, for whatever reason, becomes the command that does it. handover.py is the same in Python, and says more; cowfs/mounting/standby.py
 * describes the conversation. `cowfs podman install` compiles this file where there is a C compiler.
 *
 * Rule: nothing is allocated, nothing is kept, every failure is `return`: main() then executes the command. It runs with the rights of its
 * caller and is never set-id.
 *
 * Given by the compiler's command line: PYTHON, the interpreter; CODE, the file that tells the version of cowfs.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define PATIENCE 5000 /* milliseconds that a service has to answer */
#define NONCE 16

extern char **environ;

/* A connection to the service that listens in a directory, or -1. The nonce that it sent goes to `nonce`. */
static int greeted(const char *directory, const char *code, char *nonce)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/mounts.socket", directory);
    if (length < 0 || (size_t)length >= sizeof address.sun_path)
        return -1;
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return -1;
    struct timeval patience = {.tv_sec = PATIENCE / 1000};
    struct ucred peer;
    socklen_t size = sizeof peer;
    char told[256], expected[200];
    if (setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) == 0 /* of connect(2), where the queue is full */
        && connect(sock, (struct sockaddr *)&address, sizeof address) == 0
        && getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid()) {
        struct pollfd wait = {.fd = sock, .events = POLLIN};
        ssize_t got = poll(&wait, 1, PATIENCE) == 1 ? recv(sock, told, sizeof told - 1, MSG_DONTWAIT) : -1;
        int start = snprintf(expected, sizeof expected, "cowfs-mounts 1 %s ", code);
        if (start > 0 && (size_t)start < sizeof expected && got == start + NONCE + 1 && memcmp(told, expected, start) == 0
            && told[start + NONCE] == '\n') {
            memcpy(nonce, told + start, NONCE);
            patience.tv_sec = 0; /* from here on without end: who has the question may be mounting */
            setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
            return sock;
        }
    }
    close(sock);
    return -1;
}

/* This user's number outside of its user namespace, as cowfs.sys.host.outer_uid has it. */
static unsigned long outer_uid(unsigned long user)
{
    FILE *map = fopen("/proc/self/uid_map", "re");
    unsigned long inside, outside, count, found = user;
    if (map == NULL)
        return user;
    while (fscanf(map, "%lu %lu %lu", &inside, &outside, &count) == 3)
        if (inside <= user && user - inside < count)
            found = outside + user - inside;
    fclose(map);
    return found;
}

/* The places of cowfs.mounting.protocol.directories, in turn. */
static int find_service(const char *code, char *nonce)
{
    char place[108];
    unsigned long user = geteuid();
    int sock = user == 0 ? greeted("/run/cowfs", code, nonce) : -1;
    const char *runtime = getenv("XDG_RUNTIME_DIR"), *temporary = getenv("TMPDIR");
    if (sock < 0 && runtime != NULL && *runtime && snprintf(place, sizeof place, "%s/cowfs", runtime) < (int)sizeof place)
        sock = greeted(place, code, nonce);
    if (temporary == NULL || !*temporary)
        temporary = "/tmp";
    unsigned long owners[] = {outer_uid(user), user};
    for (int i = 0; sock < 0 && i < 2 && (i == 0 || owners[1] != owners[0]); i++)
        if (snprintf(place, sizeof place, "%s/cowfs-%lu", temporary, owners[i]) < (int)sizeof place)
            sock = greeted(place, code, nonce);
    return sock;
}

static int send_all(int sock, const char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(sock, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return -1;
        data += sent, size -= sent;
    }
    return 0;
}

/* Words, each with its NUL, counted (to != -1: and sent). */
static int words(char **list, size_t *size, uint32_t *count, int to)
{
    for (; *list != NULL; list++, ++*count) {
        size_t length = strlen(*list) + 1;
        *size += length;
        if (to != -1 && send_all(to, *list, length) != 0)
            return -1;
    }
    return 0;
}

/* The exit status, once a service has done the work; -1: nobody did or will. */
static int hand_over(char **arguments)
{
    static char *program[] = {"overlayfs", NULL};
    struct stat status;
    char code[100], nonce[NONCE];
    if (stat(CODE, &status) != 0)
        return -1;
    long long mtime = (long long)status.st_mtim.tv_sec * 1000000000LL + status.st_mtim.tv_nsec;
    snprintf(code, sizeof code, "%llu:%llu:%lld", (unsigned long long)status.st_dev, (unsigned long long)status.st_ino, mtime);
    int sock = find_service(code, nonce);
    if (sock < 0)
        return -1;

    size_t size = 0;
    struct {
        char nonce[NONCE];
        uint32_t size, words, variables;
    } head = {.words = 0};
    memcpy(head.nonce, nonce, NONCE);
    words(program, &size, &head.words, -1);
    words(arguments, &size, &head.words, -1);
    words(environ, &size, &head.variables, -1);
    if (size > UINT32_MAX)
        return -1;
    head.size = (uint32_t)size;

    union {
        char room[CMSG_SPACE(3 * sizeof(int))];
        struct cmsghdr align;
    } control;
    memset(&control, 0, sizeof control);
    struct iovec part = {.iov_base = &head, .iov_len = sizeof head};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    struct cmsghdr *streams = CMSG_FIRSTHDR(&message);
    streams->cmsg_level = SOL_SOCKET, streams->cmsg_type = SCM_RIGHTS, streams->cmsg_len = CMSG_LEN(3 * sizeof(int));
    memcpy(CMSG_DATA(streams), (int[]){0, 1, 2}, 3 * sizeof(int));
    uint32_t ignored = 0;
    if (sendmsg(sock, &message, MSG_NOSIGNAL) == (ssize_t)sizeof head && words(program, &size, &ignored, sock) == 0
        && words(arguments, &size, &ignored, sock) == 0 && words(environ, &size, &ignored, sock) == 0) {
        char answer[16];
        ssize_t got;
        do
            got = recv(sock, answer, sizeof answer - 1, 0);
        while (got < 0 && errno == EINTR);
        if (got > 0) {
            char *end;
            answer[got] = 0;
            long told = strtol(answer, &end, 10);
            if (end != answer && *end == '\n' && end[1] == 0 && told >= 0 && told <= 255)
                return close(sock), (int)told;
        }
    }
    close(sock);
    return -1;
}

int main(int count, char **arguments)
{
    int here = 0; /* in the foreground the command serves itself */
    for (int i = 1; i < count; i++)
        here |= !strcmp(arguments[i], "-f") || !strcmp(arguments[i], "-d") || !strcmp(arguments[i], "--debug");
    for (int fd = 0; fd < 3; fd++) /* the lowest free number: nothing else may get a standard stream's */
        if (fcntl(fd, F_GETFD) < 0)
            (void)!open("/dev/null", O_RDWR);
    if (!here) {
        int status = hand_over(count ? arguments + 1 : arguments);
        if (status >= 0)
            return status;
    }
    char *command[count + 5];
    command[0] = PYTHON, command[1] = "-P", command[2] = "-m", command[3] = "cowfs.cli.overlayfs";
    for (int i = 1; i <= count; i++)
        command[i + 3] = arguments[i];
    execv(PYTHON, command);
    perror("cowfs-overlayfs: " PYTHON);
    return 127;
}
