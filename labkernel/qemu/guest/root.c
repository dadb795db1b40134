/* SETUP: the clock, entropy, the root disk and the host's name. */
#include "guest.h"

int make_parents(char *path)
{
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        int rc = mkdir(path, 0755);
        *slash = '/';
        if (rc < 0 && errno != EEXIST && errno != EROFS)
            return -1;
    }
    return mkdir(path, 0755) < 0 && errno != EEXIST ? -1 : 0;
}

void set_clock(const char *text)
{
    struct timespec now = {0};
    char *rest;
    now.tv_sec = strtoll(text, &rest, 10);
    if (*rest == '.')
        now.tv_nsec = strtol(rest + 1, NULL, 10);
    clock_settime(CLOCK_REALTIME, &now);
}

void add_entropy(const char *hex)
{
    /* struct rand_pool_info with its bytes (man 4 random): all restored guests share the template's pool otherwise */
    struct { int bits, size; unsigned char bytes[64]; } pool = {0};
    while (pool.size < 64 && hex[0] && hex[1]) {
        char byte[3] = {hex[0], hex[1], 0};
        pool.bytes[pool.size++] = (unsigned char)strtoul(byte, NULL, 16);
        hex += 2;
    }
    pool.bits = pool.size * 8;
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    ioctl(fd, 0x40085203 /* RNDADDENTROPY */, &pool);
    ioctl(fd, 0x5207 /* RNDRESEEDCRNG */);
    close(fd);
}

const char *enter_root(const char *device)
{
    static char problem[256];
    mkdir("/root", 0755);
    /* noinit_itable: no kernel thread that writes empty inode tables to a disk thrown away in a moment */
    for (int tries = 0; mount(device, "/root", "ext4", 0, "noinit_itable") < 0; tries++) {
        if ((errno != ENOENT && errno != ENXIO) || tries == 2000) {
            snprintf(problem, sizeof problem, "mount %s: %s", device, strerror(errno));
            return problem;
        }
        usleep(1000); /* the block device's node appears late, too */
    }
    if (chdir("/root") < 0)
        return "chdir to the root disk";
    const char *moved[] = {"dev", "proc", "sys"};
    for (int i = 0; i < 3; i++) {
        char from[16];
        snprintf(from, sizeof from, "/%s", moved[i]);
        mkdir(moved[i], 0755);
        if (mount(from, moved[i], NULL, MS_MOVE, NULL) < 0) {
            snprintf(problem, sizeof problem, "mount /%s inside the root: %s", moved[i], strerror(errno));
            return problem;
        }
    }
    if (mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0) {
        snprintf(problem, sizeof problem, "switch to the root disk: %s", strerror(errno));
        return problem;
    }
    mkdir("/dev/pts", 0755);
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5");
    mkdir("/dev/shm", 01777);
    mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=64m");
    symlink("/proc/self/fd", "/dev/fd");
    symlink("/proc/self/fd/0", "/dev/stdin");
    symlink("/proc/self/fd/1", "/dev/stdout");
    symlink("/proc/self/fd/2", "/dev/stderr");
    return NULL;
}

void name_host(const char *name)
{
    char text[512];
    sethostname(name, strlen(name));
    mkdir("/etc", 0755);
    snprintf(text, sizeof text, "%s\n", name);
    write_file("/etc/hostname", text);
    snprintf(text, sizeof text, "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t%s\n", name);
    write_file("/etc/hosts", text);
}

/* After a restore of a running guest: its clock is old, and its entropy that of every other restored one. */
void handle_clock(char *data, char *end)
{
    for (char *record = data; record < end; record += strlen(record) + 1) {
        if (record[0] == 't')
            set_clock(record + 1);
        else if (record[0] == 'r')
            add_entropy(record + 1);
    }
}

void handle_setup(char *data, char *end)
{
    const char *device = "/dev/vda", *name = NULL, *network = NULL, *problem = NULL;
    int readonly = 0;
    handle_clock(data, end);
    for (char *record = data; record < end && !problem; record += strlen(record) + 1) {
        switch (record[0]) {
        case 'd': device = record + 1; break;
        case 'h': name = record + 1; break;
        case 'n': network = record + 1; break;
        case 'o': readonly = 1; break;
        case 'm': problem = open_share(record + 1); break;
        }
    }
    if (network) /* from the initramfs, as long as it is there */
        load_modules("network");
    if (!problem)
        problem = enter_root(device);
    if (!problem) {
        loopback_up();
        if (name)
            name_host(name);
        if (network && !strcmp(network, "wired"))
            problem = plug_cards(data, end);
        else if (network)
            problem = network_up(!strcmp(network, "open"));
    }
    if (!problem)
        problem = mount_shares();
    if (problem) {
        send_text(FAILED, 0, "125 %s", problem);
        return;
    }
    if (readonly) /* only now: the mount points and /etc/hosts had to be made */
        mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, "noinit_itable");
    send_text(READY, 0, "monotonic_us=%lld", monotonic_us());
}
