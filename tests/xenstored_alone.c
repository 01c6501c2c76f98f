/* Lets Debian's xenstored run on a machine without Xen: what it asks of the hypervisor is answered here.
 *
 * Loaded with LD_PRELOAD. Its clients come through its Unix socket and are domain 0, as in a real dom0; there is no other
 * domain and no event. Everything xenstored itself does (nodes, permissions, transactions, watches) is the real thing.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

static char handle;
static int silence = -1; /* never readable: no event ever comes */

void *xc_interface_open(void *log, void *dombuild, unsigned flags) { return &handle; }
int xc_interface_close(void *xc) { return 0; }
/* Every domain that is introduced lives: xc_dominfo_t of Xen 4.17, 112 bytes, with its number and nothing else. */
int xc_domain_getinfo(void *xc, uint32_t first, unsigned max, void *info)
{
    memset(info, 0, 112);
    memcpy(info, &first, sizeof first);
    return 1;
}

void *xengnttab_open(void *log, unsigned flags) { return &handle; }
int xengnttab_close(void *xgt) { return 0; }
int xengnttab_set_max_grants(void *xgt, uint32_t count) { return 0; }
/* A domain's page for xenstored: blank, so that it never says anything. */
void *xengnttab_map_grant_ref(void *xgt, uint32_t domain, uint32_t reference, int prot)
{
    return mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
int xengnttab_unmap(void *xgt, void *address, uint32_t count) { return munmap(address, 4096); }

void *xenevtchn_open(void *log, unsigned flags) { silence = eventfd(0, 0); return &handle; }
void *xenevtchn_fdopen(void *log, int fd, unsigned flags) { return xenevtchn_open(log, flags); }
int xenevtchn_fd(void *xce) { return silence; }
int xenevtchn_bind_virq(void *xce, unsigned virq) { return 1; }
int xenevtchn_bind_interdomain(void *xce, uint32_t domain, uint32_t port) { return 2; }
int xenevtchn_notify(void *xce, uint32_t port) { return 0; }
int xenevtchn_pending(void *xce) { return -1; }
int xenevtchn_unbind(void *xce, uint32_t port) { return 0; }
int xenevtchn_unmask(void *xce, uint32_t port) { return 0; }

/* /proc/xen/xsd_kva is the page of dom0's kernel, /proc/xen/xsd_port the number of its event channel. */
int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (strncmp(path, "/proc/xen/", strlen("/proc/xen/")))
        return openat(AT_FDCWD, path, flags, mode);
    int fd = memfd_create("xen", MFD_CLOEXEC);
    if (fd >= 0 && (strstr(path, "port") ? pwrite(fd, "7", 1, 0) != 1 : ftruncate(fd, 4096)))
        return -1;
    return fd;
}
