/* What lies in the initramfs: the kernel's modules, and the way to the host, a virtio-serial port. */
#include "guest.h"

void load_modules(const char *which)
{
    static int folder = -1; /* out of reach by name once the root disk is mounted over it */
    char name[256];
    if (folder < 0)
        folder = open("/modules", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int listing = openat(folder, which, O_RDONLY | O_CLOEXEC);
    FILE *list = listing < 0 ? NULL : fdopen(listing, "r");
    if (!list)
        return; /* a kernel with everything built in; or they are loaded already */
    unlinkat(folder, which, 0);
    while (fgets(name, sizeof name, list)) {
        name[strcspn(name, "\n")] = 0;
        int fd = openat(folder, name, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            fprintf(stderr, "labkernel guest init: module %s: %s\n", name, strerror(errno));
        if (fd >= 0)
            close(fd);
        unlinkat(folder, name, 0); /* the initramfs is memory */
    }
    fclose(list);
}

static int try_port(const char *wanted)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    char path[512], name[64];
    int found = -1;
    while (ports && found < 0 && (entry = readdir(ports))) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t n = read(fd, name, sizeof name - 1);
        close(fd);
        if (n <= 0)
            continue;
        name[n] = 0;
        name[strcspn(name, "\n")] = 0;
        if (strcmp(name, wanted))
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        found = open(path, O_RDWR | O_CLOEXEC);
    }
    if (ports)
        closedir(ports);
    return found;
}

int open_port(const char *name)
{
    /* The name arrives by a control message after the driver is loaded, the node a little later still. */
    for (int tries = 0; tries < 10000; tries++) {
        int found = try_port(name);
        if (found >= 0)
            return found;
        usleep(1000);
    }
    errno = ENODEV;
    die(name);
    return -1;
}
