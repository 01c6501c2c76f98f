/* LD_PRELOAD library: makes every flush of a process and its children slower, and counts them.
 *
 * Programs that it starts have it too, whatever environment they are given: manager and keeper start theirs with few
 * variables or none.
 *
 * The file that VTPM_SLOW_FLUSH names is mapped shared when a program starts, and stays mapped in what it forks, also
 * where paths are out of reach. Its first word says by how many microseconds a flush takes longer than the disk needs,
 * the second counts the flushes of all processes. Writing the file turns the slow disk on and off while they run.
 *
 * Waiting is done by poll(2), which a confined instance may call anyway.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct page {
    uint32_t microseconds;
    uint32_t flushes;
};

static volatile struct page *page;
static char variables[2][512];

__attribute__((constructor)) static void map_page(void)
{
    const char *path = getenv("VTPM_SLOW_FLUSH"), *library = getenv("LD_PRELOAD");
    if (!path || !library)
        return;
    snprintf(variables[0], sizeof variables[0], "LD_PRELOAD=%s", library);
    snprintf(variables[1], sizeof variables[1], "VTPM_SLOW_FLUSH=%s", path);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return;
    void *mapped = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped != MAP_FAILED)
        page = mapped;
    close(descriptor);
}

static void *next(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (!found)
        abort();
    return found;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

/* poll(2) has milliseconds: rounded up. */
static void be_slow(void)
{
    if (!page)
        return;
    int keep = errno;
    __atomic_fetch_add(&page->flushes, 1, __ATOMIC_RELAXED);
    int64_t end = now() + page->microseconds, left;
    while ((left = end - now()) > 0)
        poll(NULL, 0, (int)((left + 999) / 1000));
    errno = keep;
}

int fsync(int descriptor)
{
    static int (*real)(int);
    if (!real)
        real = next("fsync");
    int result = real(descriptor);
    be_slow();
    return result;
}

int fdatasync(int descriptor)
{
    static int (*real)(int);
    if (!real)
        real = next("fdatasync");
    int result = real(descriptor);
    be_slow();
    return result;
}

ssize_t pwritev2(int descriptor, const struct iovec *vector, int count, off_t offset, int flags)
{
    static ssize_t (*real)(int, const struct iovec *, int, off_t, int);
    if (!real)
        real = next("pwritev2");
    ssize_t result = real(descriptor, vector, count, offset, flags);
    if (flags & (RWF_DSYNC | RWF_SYNC))
        be_slow();
    return result;
}

/* Python's large-file build calls this name. */
ssize_t pwritev64v2(int descriptor, const struct iovec *vector, int count, off64_t offset, int flags)
{
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    if (!real)
        real = next("pwritev64v2");
    ssize_t result = real(descriptor, vector, count, offset, flags);
    if (flags & (RWF_DSYNC | RWF_SYNC))
        be_slow();
    return result;
}

/* What programs are started with. */

static size_t count(char *const environment[])
{
    size_t number = 0;
    while (environment && environment[number])
        number++;
    return number;
}

/* Fills `made`, which has room for two more, with `environment` and our own variables. */
static void add_ours(char *made[], char *const environment[])
{
    size_t number = 0;
    for (size_t index = 0; index < count(environment); index++)
        if (strncmp(environment[index], "LD_PRELOAD=", 11) && strncmp(environment[index], "VTPM_SLOW_FLUSH=", 16))
            made[number++] = environment[index];
    if (*variables[0]) {
        made[number++] = variables[0];
        made[number++] = variables[1];
    }
    made[number] = NULL;
}

int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                const posix_spawnattr_t *attributes, char *const arguments[], char *const environment[])
{
    int (*real)(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *, char *const[],
                char *const[]) = next("posix_spawn");
    char *made[count(environment) + 3];
    add_ours(made, environment);
    return real(pid, path, actions, attributes, arguments, made);
}

int execve(const char *path, char *const arguments[], char *const environment[])
{
    int (*real)(const char *, char *const[], char *const[]) = next("execve");
    char *made[count(environment) + 3];
    add_ours(made, environment);
    return real(path, arguments, made);
}
