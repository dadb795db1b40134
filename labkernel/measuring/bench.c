/* The program that measures: the same static binary runs on the host, in a container and in a virtual machine, whatever
 * the image holds (it may hold nothing). It prints `name=value` lines; each experiment runs for a fixed time, not for a
 * fixed count, so that an emulated processor takes no longer than a real one, only does less.
 *
 *   bench run MILLISECONDS NAME…   experiments: cpu syscall exec memory file fsync network
 *   bench idle [MILLISECONDS]      says "ready", then waits so long, or to be killed
 *   bench look                     what this side sees: kernel, uptime, processes, devices, modules, clock, …
 *   bench tree                     a digest of all files of the root: names, modes, contents
 *   bench nothing                  ends at once
 *
 * Errors of single experiments print `name=-` and go on: a place that cannot be written is a result.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST "unknown"
#endif
__attribute__((used)) static const char digest_mark[] = "labkernel-init:" SOURCE_DIGEST;

static const char *self;
static double budget_s = 0.06;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void tell(const char *name, double value)
{
    if (value < 0)
        printf("%s=-\n", name);
    else
        printf("%s=%.9g\n", name, value);
    fflush(stdout);
}

/* nanoseconds for a thousand rounds of integer arithmetic */
static double cpu(void)
{
    volatile uint64_t sink;
    uint64_t x = 88172645463325252ull, rounds = 0;
    double begin = now(), end;
    do {
        for (int i = 0; i < 20000; i++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
        rounds += 20;
    } while ((end = now()) - begin < budget_s);
    sink = x;
    (void)sink;
    return (end - begin) / rounds * 1e9;
}

/* nanoseconds for one system call that does nothing */
static double system_call(void)
{
    uint64_t calls = 0;
    double begin = now(), end;
    do {
        for (int i = 0; i < 500; i++)
            syscall(SYS_getppid);
        calls += 500;
    } while ((end = now()) - begin < budget_s);
    return (end - begin) / calls * 1e9;
}

/* nanoseconds for fork, exec of this program, its end and the wait for it */
static double fork_exec(void)
{
    int count = 0;
    double begin = now(), end;
    do {
        int status;
        pid_t child = fork();
        if (child == 0) {
            execl(self, self, "nothing", (char *)NULL);
            _exit(127);
        }
        if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0)
            return -1;
        count++;
    } while ((end = now()) - begin < budget_s);
    return (end - begin) / count * 1e9;
}

/* nanoseconds until a page of 4 KiB that was never used is there */
static double memory(void)
{
    size_t size = 16u << 20, pages = 0;
    double spent = 0;
    do {
        char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            return -1;
        madvise(at, size, MADV_NOHUGEPAGE);
        double begin = now();
        for (size_t i = 0; i < size && (i & 0xfffff || spent + now() - begin < budget_s); i += 4096, pages++)
            at[i] = 1;
        spent += now() - begin;
        munmap(at, size);
    } while (spent < budget_s);
    return spent / pages * 1e9;
}

static int open_file(char *path, size_t size)
{
    const char *where = getenv("LABKERNEL_BENCH_DIR");
    snprintf(path, size, "%s/.labkernel-bench-%d", where ? where : "", (int)getpid());
    return open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

/* bytes a second written in pieces of 64 KiB and read again, through the page cache */
static double file(void)
{
    static char block[65536];
    char path[256];
    int fd = open_file(path, sizeof path);
    double moved = 0, begin = now(), end = begin;
    if (fd < 0)
        return -1;
    do {
        for (int i = 0; i < 16; i++)
            if (pwrite(fd, block, sizeof block, (off_t)i * sizeof block) != (ssize_t)sizeof block)
                goto failed;
        for (int i = 0; i < 16; i++)
            if (pread(fd, block, sizeof block, (off_t)i * sizeof block) != (ssize_t)sizeof block)
                goto failed;
        moved += 32.0 * sizeof block;
    } while ((end = now()) - begin < budget_s);
    close(fd);
    unlink(path);
    return moved / (end - begin);
failed:
    close(fd);
    unlink(path);
    return -1;
}

/* nanoseconds to write 4 KiB and have them on the disk */
static double sync_file(void)
{
    static char block[4096];
    char path[256];
    int fd = open_file(path, sizeof path), count = 0;
    double begin = now(), end = begin;
    if (fd < 0)
        return -1;
    do {
        if (pwrite(fd, block, sizeof block, (off_t)(count % 64) * sizeof block) != (ssize_t)sizeof block || fsync(fd))
            count = -1;
    } while (count++ >= 0 && (end = now()) - begin < budget_s);
    close(fd);
    unlink(path);
    return count > 0 ? (end - begin) / count * 1e9 : -1;
}

static int listening(struct sockaddr_in *address)
{
    socklen_t length = sizeof *address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)address, sizeof *address) || listen(fd, 1) ||
        getsockname(fd, (struct sockaddr *)address, &length))
        return -1;
    return fd;
}

/* a child that answers each byte by a byte, or only reads */
static int peer(int answering, pid_t *child)
{
    struct sockaddr_in address;
    int one = 1, server = listening(&address), fd;
    if (server < 0 || (*child = fork()) < 0)
        return -1;
    if (*child == 0) {
        static char into[65536];
        int there = accept(server, NULL, NULL);
        setsockopt(there, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        for (ssize_t got; (got = read(there, into, sizeof into)) > 0;)
            if (answering && write(there, into, 1) != 1)
                break;
        _exit(0);
    }
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        kill(*child, SIGKILL);
        waitpid(*child, NULL, 0);
        close(fd);
        fd = -1;
    }
    close(server);
    return fd;
}

/* nanoseconds there and back for one byte (TCP over loopback, inside); then bytes a second */
static void network(void)
{
    static char block[65536];
    double result[2] = {-1, -1};
    for (int kind = 0; kind < 2; kind++) {
        pid_t child;
        int fd = peer(kind == 0, &child);
        double count = 0, begin = now(), end = begin;
        if (fd < 0)
            continue;
        do {
            ssize_t sent = write(fd, block, kind == 0 ? 1 : sizeof block);
            if (sent <= 0 || (kind == 0 && read(fd, block, 1) != 1))
                break;
            count += kind == 0 ? 1 : sent;
        } while ((end = now()) - begin < budget_s);
        close(fd);
        waitpid(child, NULL, 0);
        if (kind == 0 && count > 0)
            result[0] = (end - begin) / count * 1e9;
        else if (count > 0)
            result[1] = count / (now() - begin);
    }
    tell("network_rtt", result[0]);
    tell("network_throughput", result[1]);
}

static void run(int count, char **names)
{
    for (int i = 0; i < count; i++) {
        if (!strcmp(names[i], "cpu")) tell("cpu", cpu());
        else if (!strcmp(names[i], "syscall")) tell("syscall", system_call());
        else if (!strcmp(names[i], "exec")) tell("exec", fork_exec());
        else if (!strcmp(names[i], "memory")) tell("memory", memory());
        else if (!strcmp(names[i], "file")) tell("file", file());
        else if (!strcmp(names[i], "fsync")) tell("fsync", sync_file());
        else if (!strcmp(names[i], "network")) network();
        else fprintf(stderr, "bench: no such experiment: %s\n", names[i]);
    }
    /* getrusage tells the peak of the process that became this one, too; VmHWM is of this program alone */
    char text[4096];
    int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    text[got > 0 ? got : 0] = 0;
    char *at = strstr(text, "VmHWM:");
    tell("peak_kib", at ? atof(at + 6) : -1);
    if (fd >= 0)
        close(fd);
}

/* -- what this side sees */

static void tell_file(const char *name, const char *path)
{
    char text[4096];
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (got < 0)
        printf("%s=(%s)\n", name, strerror(errno));
    else {
        text[got] = 0;
        text[strcspn(text, "\n")] = 0;
        printf("%s=%s\n", name, text);
    }
    if (fd >= 0)
        close(fd);
}

static int count_lines(const char *path)
{
    FILE *stream = fopen(path, "re");
    int lines = 0, c;
    if (!stream)
        return -1;
    while ((c = getc(stream)) != EOF)
        lines += c == '\n';
    fclose(stream);
    return lines;
}

static void look_into(const char *path, const char *name, int (*wanted)(const char *, const char *))
{
    DIR *folder = opendir(path);
    int found = 0;
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        found += wanted(path, entry->d_name);
    if (folder)
        closedir(folder);
    printf("%s=%d\n", name, folder ? found : -1);
}

static int is_process(const char *path, const char *name)
{
    (void)path;
    return name[0] >= '0' && name[0] <= '9';
}

static int is_device(const char *path, const char *name)
{
    char full[512];
    struct stat info;
    snprintf(full, sizeof full, "%s/%s", path, name);
    return !lstat(full, &info) && (S_ISCHR(info.st_mode) || S_ISBLK(info.st_mode));
}

static int is_disk(const char *path, const char *name)
{
    char full[512];
    struct stat info;
    snprintf(full, sizeof full, "%s/%s", path, name);
    return !lstat(full, &info) && S_ISBLK(info.st_mode);
}

static int is_interface(const char *path, const char *name)
{
    (void)path;
    return name[0] != '.';
}

static void look(void)
{
    struct utsname name;
    struct timespec t;
    uname(&name);
    printf("kernel=%s\nhostname=%s\nuid=%d\npid=%d\n", name.release, name.nodename, (int)getuid(), (int)getpid());
    tell_file("boot_id", "/proc/sys/kernel/random/boot_id");
    tell_file("uptime", "/proc/uptime");
    look_into("/proc", "processes", is_process);
    look_into("/dev", "devices", is_device);
    look_into("/dev", "disks", is_disk);
    look_into("/sys/class/net", "interfaces", is_interface);
    printf("modules=%d\n", count_lines("/proc/modules"));
    printf("cpus=%ld\nmemory=%lld\n", sysconf(_SC_NPROCESSORS_ONLN),
           (long long)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE));
    int kmsg = open("/proc/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    char text[8192];
    ssize_t got = kmsg < 0 ? -1 : read(kmsg, text, sizeof text);
    if (got < 0 && errno == EAGAIN)
        got = 0;
    printf("kmsg=%s\n", got < 0 ? strerror(errno) : got ? "its messages can be read" : "opens, empty");
    clock_gettime(CLOCK_REALTIME, &t);
    printf("clock=%lld.%03ld\n", (long long)t.tv_sec, t.tv_nsec / 1000000);
    struct timespec same = {t.tv_sec, t.tv_nsec};
    printf("set_clock=%s\n", clock_settime(CLOCK_REALTIME, &same) ? strerror(errno) : "allowed");
}

/* -- a digest of all files */

static uint64_t hash = 14695981039346656037ull;
static long files;

static void mix(const void *data, size_t size)
{
    const unsigned char *at = data;
    while (size--)
        hash = (hash ^ *at++) * 1099511628211ull;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int left_out(const char *path)
{
    /* what the one or the other puts over an image's files, and never in them */
    static const char *const names[] = {"/dev", "/proc", "/sys", "/run", "/tmp", "/lost+found", "/.dockerenv",
                                        "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(path, names[i]))
            return 1;
    return 0;
}

static void walk(const char *path)
{
    char **names = NULL, full[4096], text[65536];
    size_t count = 0;
    DIR *folder = opendir(*path ? path : "/");
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        names = realloc(names, (count + 1) * sizeof *names);
        names[count++] = strdup(entry->d_name);
    }
    if (folder)
        closedir(folder);
    if (count)
        qsort(names, count, sizeof *names, by_name);
    for (size_t i = 0; i < count; i++) {
        struct stat info;
        snprintf(full, sizeof full, "%s/%s", path, names[i]);
        free(names[i]);
        if (left_out(full) || lstat(full, &info))
            continue;
        files++;
        mix(full, strlen(full) + 1);
        mix(&info.st_mode, sizeof info.st_mode);
        if (S_ISLNK(info.st_mode)) {
            ssize_t got = readlink(full, text, sizeof text);
            mix(text, got > 0 ? got : 0);
        } else if (S_ISREG(info.st_mode)) {
            int fd = open(full, O_RDONLY | O_CLOEXEC);
            for (ssize_t got; fd >= 0 && (got = read(fd, text, sizeof text)) > 0;)
                mix(text, got);
            if (fd >= 0)
                close(fd);
        } else if (S_ISDIR(info.st_mode))
            walk(full);
    }
    free(names);
}

int main(int argc, char **argv)
{
    self = argv[0];
    signal(SIGPIPE, SIG_IGN);
    const char *verb = argc > 1 ? argv[1] : "";
    if (!strcmp(verb, "nothing"))
        return 0;
    printf("began=%.6f\n", now());
    if (!strcmp(verb, "run") && argc > 2) {
        budget_s = atof(argv[2]) / 1000;
        run(argc - 3, argv + 3);
    } else if (!strcmp(verb, "idle")) {
        printf("ready\n");
        fflush(stdout);
        if (argc > 2)
            usleep(atoi(argv[2]) * 1000u);
        else
            pause();
    } else if (!strcmp(verb, "look"))
        look();
    else if (!strcmp(verb, "tree")) {
        walk("");
        printf("files=%ld\ntree=%016llx\n", files, (unsigned long long)hash);
    } else {
        fprintf(stderr, "usage: bench run|idle|look|tree|nothing\n");
        return 2;
    }
    return 0;
}
