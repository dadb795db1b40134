/*
 * The first process of a labkernel guest, and the launcher of QEMU on the host: one static binary, two roles.
 *
 * As pid 1 of a guest it loads the modules of the initramfs, opens the virtio-serial port "labkernel.0", says hello,
 * and does what the frames on that port ask for: mount the root disk, run commands, pass on signals, tell figures.
 * It leaves out everything a distribution's init does: there are no services, no logins and no network set-up but `lo`.
 *
 * Frames, both ways: kind (1 byte), 0, process number (2 bytes, big endian), length (4 bytes, big endian), payload.
 * labkernel/qemu/channel.py is the other end and names every kind. Records inside SETUP and START are strings that
 * end in NUL; their first letter says what they are. Figures are words `name=number`, separated by spaces.
 *
 * As `guest-init --launch PARENT PROGRAM ARG...` on the host it asks the kernel for SIGKILL at its parent's death
 * (man 2 PR_SET_PDEATHSIG; the setting survives execve) and becomes PROGRAM. Python can't do this between fork and
 * exec of a process with threads without the risk of a deadlock.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
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
#define PROTOCOL 1
#define PORT_NAME "labkernel.0"
#define MAX_PROCESSES 32
#define MAX_FRAME (1u << 20)
#define CHUNK 32768
#define STDIN_WINDOW (256u << 10) /* the host never has more than this unacknowledged (channel.py) */
#define MAX_GROUPS 64
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

enum kind {
    STDIN = 0, STDOUT = 1, STDERR = 2,
    SETUP = 16, START = 17, SIGNAL = 18, STATS = 19, POWEROFF = 20,
    HELLO = 32, READY = 33, STARTED = 34, EXITED = 35, FIGURES = 36, FAILED = 37, CONSUMED = 38,
};

struct process {
    int used;
    pid_t pid;
    int in, out, err;    /* our ends of its pipes, -1 when closed */
    int exec_pipe;       /* end of file here means: execve succeeded */
    int in_closing;      /* the host has sent the end of stdin */
    char *problem;       /* why execve failed: told when it is reaped, since then its number is free again */
    unsigned in_len;
    unsigned char *in_buf;
};

static const char source_digest[] __attribute__((used)) = "labkernel-init:" SOURCE_DIGEST; /* see compiling.py */
static struct process processes[MAX_PROCESSES];
static int port = -1;
static int child_signals = -1;
static unsigned char input[MAX_FRAME + 8];
static unsigned input_len;

/* ---- saying things ------------------------------------------------------------------------------------------- */

static void power_off(void)
{
    sync();
    reboot(RB_AUTOBOOT); /* QEMU runs with -no-reboot and ends; powering off would need ACPI */
    for (;;)
        pause();
}

static void die(const char *what)
{
    fprintf(stderr, "labkernel guest init: %s: %s\n", what, strerror(errno));
    power_off();
}

static void write_all(int fd, const void *data, size_t len)
{
    const char *p = data;
    while (len) {
        ssize_t n = write(fd, p, len);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != ENODEV && errno != EPIPE)
                return;
            usleep(1000); /* the host's end is not open (yet): after a restore it opens within a millisecond */
            continue;
        }
        p += n;
        len -= (size_t)n;
    }
}

static void send_frame(enum kind kind, unsigned number, const void *data, size_t len)
{
    /* One write per frame: virtio-serial makes one descriptor of each, and each costs an exit to QEMU. */
    static unsigned char frame[CHUNK + 8];
    if (len > CHUNK)
        len = CHUNK;
    frame[0] = kind;
    frame[1] = 0;
    frame[2] = number >> 8;
    frame[3] = number;
    frame[4] = len >> 24;
    frame[5] = len >> 16;
    frame[6] = len >> 8;
    frame[7] = len;
    memcpy(frame + 8, data, len);
    write_all(port, frame, len + 8);
}

static void send_text(enum kind kind, unsigned number, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    int len = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (len >= (int)sizeof text)
        len = sizeof text - 1;
    send_frame(kind, number, text, (size_t)len);
}

static long long monotonic_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* ---- the initramfs: modules and the port --------------------------------------------------------------------- */

static void load_modules(void)
{
    FILE *list = fopen("/modules/order", "re");
    char name[256], path[300];
    if (!list)
        return; /* a kernel with everything built in */
    while (fgets(name, sizeof name, list)) {
        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            fprintf(stderr, "labkernel guest init: module %s: %s\n", name, strerror(errno));
        if (fd >= 0)
            close(fd);
        unlink(path); /* the initramfs is memory */
    }
    fclose(list);
}

static int try_port(void)
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
        if (strcmp(name, PORT_NAME))
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        found = open(path, O_RDWR | O_CLOEXEC);
    }
    if (ports)
        closedir(ports);
    return found;
}

static void open_port(void)
{
    /* The name arrives by a control message after the driver is loaded, the node a little later still. */
    for (int tries = 0; tries < 10000; tries++) {
        port = try_port();
        if (port >= 0)
            return;
        usleep(1000);
    }
    errno = ENODEV;
    die("no virtio-serial port named " PORT_NAME);
}

/* ---- SETUP: clock, entropy, root ----------------------------------------------------------------------------- */

static int make_parents(char *path)
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

static void set_clock(const char *text)
{
    struct timespec now = {0};
    char *rest;
    now.tv_sec = strtoll(text, &rest, 10);
    if (*rest == '.')
        now.tv_nsec = strtol(rest + 1, NULL, 10);
    clock_settime(CLOCK_REALTIME, &now);
}

static void add_entropy(const char *hex)
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

static void loopback_up(void)
{
    struct ifreq request = {0};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    strcpy(request.ifr_name, "lo");
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (fd >= 0) {
        ioctl(fd, SIOCSIFFLAGS, &request);
        close(fd);
    }
}

static const char *enter_root(const char *device)
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

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd >= 0) {
        write_all(fd, text, strlen(text));
        close(fd);
    }
}

static void name_host(const char *name)
{
    char text[512];
    sethostname(name, strlen(name));
    mkdir("/etc", 0755);
    snprintf(text, sizeof text, "%s\n", name);
    write_file("/etc/hostname", text);
    snprintf(text, sizeof text, "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t%s\n", name);
    write_file("/etc/hosts", text);
}

static void handle_setup(char *data, char *end)
{
    const char *device = "/dev/vda", *name = NULL, *problem;
    int readonly = 0;
    for (char *record = data; record < end; record += strlen(record) + 1) {
        switch (record[0]) {
        case 't': set_clock(record + 1); break;
        case 'r': add_entropy(record + 1); break;
        case 'd': device = record + 1; break;
        case 'h': name = record + 1; break;
        case 'o': readonly = 1; break;
        }
    }
    problem = enter_root(device);
    if (problem) {
        send_text(FAILED, 0, "125 %s", problem);
        return;
    }
    if (name)
        name_host(name);
    if (readonly) /* only now: the mount points and /etc/hosts had to be made */
        mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, "noinit_itable");
    loopback_up();
    send_text(READY, 0, "monotonic_us=%lld", monotonic_us());
}

/* ---- START: users, paths, exec -------------------------------------------------------------------------------- */

struct identity {
    uid_t uid;
    gid_t gid;
    int group_count;
    gid_t groups[MAX_GROUPS];
    char home[256];
};

static int split_line(char *line, char **fields, int wanted)
{
    int count = 0;
    line[strcspn(line, "\n")] = 0;
    while (count < wanted) {
        fields[count++] = line;
        line = strchr(line, ':');
        if (!line)
            break;
        *line++ = 0;
    }
    return count;
}

static int as_number(const char *text, unsigned *value)
{
    char *rest;
    unsigned long number = strtoul(text, &rest, 10);
    if (!*text || *rest || number > 0x7fffffff)
        return 0;
    *value = (unsigned)number;
    return 1;
}

/* getpwnam of a static libc reads nsswitch.conf and wants shared objects; the two files are easy to read. */
static int look_up_user(const char *name, struct identity *who, char *login, size_t login_size)
{
    char line[1024], *field[7];
    unsigned number = 0, uid, gid;
    int numeric = as_number(name, &number), found = 0;
    FILE *file = fopen("/etc/passwd", "re");
    while (file && !found && fgets(line, sizeof line, file)) {
        if (split_line(line, field, 7) < 6 || !as_number(field[2], &uid) || !as_number(field[3], &gid))
            continue;
        if (!strcmp(field[0], name) || (numeric && uid == number)) {
            who->uid = uid;
            who->gid = gid;
            snprintf(who->home, sizeof who->home, "%s", field[5]);
            snprintf(login, login_size, "%s", field[0]);
            found = 1;
        }
    }
    if (file)
        fclose(file);
    if (!found && numeric) {
        who->uid = number;
        who->gid = 0;
        found = 1;
    }
    return found;
}

static int member_of(const char *members, const char *login)
{
    size_t len = strlen(login);
    for (const char *at = members; len && at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, login, len) && (at[len] == ',' || at[len] == 0))
            return 1;
    return 0;
}

static int look_up_groups(const char *wanted, const char *login, struct identity *who)
{
    char line[4096], *field[4];
    unsigned gid, number = 0;
    int numeric = wanted && as_number(wanted, &number), found = !wanted;
    FILE *file = fopen("/etc/group", "re");
    while (file && fgets(line, sizeof line, file)) {
        int count = split_line(line, field, 4);
        if (count < 3 || !as_number(field[2], &gid))
            continue;
        if (wanted && !strcmp(field[0], wanted)) {
            who->gid = gid;
            found = 1;
        }
        /* as docker does: supplementary groups only where no group was asked for */
        if (!wanted && count == 4 && who->group_count < MAX_GROUPS && member_of(field[3], login))
            who->groups[who->group_count++] = gid;
    }
    if (file)
        fclose(file);
    if (!found && numeric) {
        who->gid = number;
        found = 1;
    }
    return found;
}

static const char *resolve_user(char *user, struct identity *who)
{
    static char problem[300];
    char login[256] = "";
    char *group = strchr(user, ':');
    if (group)
        *group++ = 0;
    if (!look_up_user(*user ? user : "0", who, login, sizeof login)) {
        snprintf(problem, sizeof problem, "unable to find user %s: no matching entries in passwd file", user);
        return problem;
    }
    if (!look_up_groups(group && *group ? group : NULL, login, who)) {
        snprintf(problem, sizeof problem, "unable to find group %s: no matching entries in group file", group);
        return problem;
    }
    return NULL;
}

static void report(int fd, int code, const char *format, ...)
{
    char text[700];
    int len = snprintf(text, sizeof text, "%d ", code);
    va_list args;
    va_start(args, format);
    len += vsnprintf(text + len, sizeof text - (size_t)len, format, args);
    va_end(args);
    write_all(fd, text, (size_t)len < sizeof text ? (size_t)len : sizeof text - 1);
    _exit(code);
}

static void exec_error(int fd, const char *name, int code)
{
    if (errno == ENOENT || errno == ENOTDIR)
        report(fd, 127, "exec: \"%s\": stat %s: no such file or directory", name, name);
    if (errno == EACCES)
        report(fd, 126, "exec: \"%s\": permission denied", name);
    if (errno == ENOEXEC)
        report(fd, 126, "exec %s: exec format error", name);
    report(fd, code, "exec %s: %s", name, strerror(errno));
}

static void exec_search(int fd, char **argv, char **envp)
{
    const char *path = DEFAULT_PATH;
    char full[4096];
    int denied = 0;
    struct stat info;
    if (strchr(argv[0], '/')) {
        if (stat(argv[0], &info) == 0 && S_ISDIR(info.st_mode))
            report(fd, 126, "exec: \"%s\": is a directory", argv[0]);
        execve(argv[0], argv, envp);
        exec_error(fd, argv[0], 126);
    }
    for (char **e = envp; *e; e++)
        if (!strncmp(*e, "PATH=", 5))
            path = *e + 5;
    for (const char *at = path; at; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL) {
        int len = (int)strcspn(at, ":");
        snprintf(full, sizeof full, "%.*s%s%s", len, at, len ? "/" : "./", argv[0]);
        if (stat(full, &info) < 0 || S_ISDIR(info.st_mode))
            continue;
        execve(full, argv, envp);
        if (errno == EACCES)
            denied = 1;
        else if (errno != ENOENT && errno != ENOTDIR)
            exec_error(fd, full, 126);
        else
            report(fd, 127, "exec %s: its interpreter is missing", full); /* the file is there: #! or ELF loader */
    }
    if (denied)
        report(fd, 126, "exec: \"%s\": permission denied", argv[0]);
    report(fd, 127, "exec: \"%s\": executable file not found in $PATH", argv[0]);
}

static void become(int fd, char **argv, char **envp, int env_count, char *user, char *cwd)
{
    struct identity who = {0};
    const char *problem = resolve_user(user, &who);
    static char home[300];
    int has_home = 0;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    setsid();
    if (problem)
        report(fd, 125, "%s", problem);
    if (*cwd && chdir(cwd) < 0 && (errno != ENOENT || make_parents(cwd) < 0 || chdir(cwd) < 0))
        report(fd, 126, "chdir to cwd (\"%s\"): %s", cwd, strerror(errno));
    for (int i = 0; i < env_count; i++)
        has_home |= !strncmp(envp[i], "HOME=", 5);
    if (!has_home) {
        snprintf(home, sizeof home, "HOME=%s", who.home[0] ? who.home : who.uid ? "/" : "/root");
        envp[env_count++] = home;
        envp[env_count] = NULL;
    }
    if (setgroups((size_t)who.group_count, who.groups) < 0 || setgid(who.gid) < 0 || setuid(who.uid) < 0)
        report(fd, 125, "set user: %s", strerror(errno));
    exec_search(fd, argv, envp);
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static struct process *find_process(unsigned number)
{
    return number < MAX_PROCESSES && processes[number].used ? &processes[number] : NULL;
}

static void start_process(unsigned number, char **argv, char **envp, int env_count, char *user, char *cwd, int want_in)
{
    struct process *p = &processes[number];
    int in[2], out[2], err[2], done[2];
    if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0 || pipe2(done, O_CLOEXEC) < 0) {
        send_text(FAILED, number, "125 pipe: %s", strerror(errno));
        return;
    }
    pid_t pid = fork();
    if (pid == 0) {
        dup2(want_in ? in[0] : open("/dev/null", O_RDONLY | O_CLOEXEC), 0);
        dup2(out[1], 1);
        dup2(err[1], 2);
        become(done[1], argv, envp, env_count, user, cwd);
    }
    close(in[0]);
    close(out[1]);
    close(err[1]);
    close(done[1]);
    if (pid < 0) {
        close(in[1]);
        close(out[0]);
        close(err[0]);
        close(done[0]);
        send_text(FAILED, number, "125 fork: %s", strerror(errno));
        return;
    }
    *p = (struct process){.used = 1, .pid = pid, .in = in[1], .out = out[0], .err = err[0], .exec_pipe = done[0]};
    p->in_buf = malloc(STDIN_WINDOW);
    if (!want_in || !p->in_buf)
        close_fd(&p->in);
    else
        fcntl(p->in, F_SETFL, O_NONBLOCK);
    fcntl(p->out, F_SETFL, O_NONBLOCK);
    fcntl(p->err, F_SETFL, O_NONBLOCK);
}

static void handle_start(unsigned number, char *data, char *end)
{
    int args = 0, envs = 0, want_in = 0;
    char *user = "0", *cwd = "/";
    for (char *record = data; record < end; record += strlen(record) + 1) {
        args += record[0] == 'a';
        envs += record[0] == 'e';
    }
    if (number >= MAX_PROCESSES || processes[number].used || !args) {
        send_text(FAILED, number, "125 no process number %u to be had", number);
        return;
    }
    char **argv = calloc((size_t)args + 1, sizeof *argv), **envp = calloc((size_t)envs + 2, sizeof *envp);
    args = envs = 0;
    for (char *record = data; record < end; record += strlen(record) + 1) {
        switch (record[0]) {
        case 'a': argv[args++] = record + 1; break;
        case 'e': envp[envs++] = record + 1; break;
        case 'u': user = record + 1; break;
        case 'c': cwd = record + 1; break;
        case 'i': want_in = 1; break;
        }
    }
    /* the strings lie in the input buffer: the child has its own copy of it after fork */
    start_process(number, argv, envp, envs, user, cwd, want_in);
    free(argv);
    free(envp);
}

/* ---- running processes ----------------------------------------------------------------------------------------- */

static void pump_output(unsigned number, int *fd, enum kind kind)
{
    static char chunk[CHUNK]; /* one chunk a turn: what writes without end must not keep signals from being read */
    ssize_t n = read(*fd, chunk, sizeof chunk);
    if (n > 0)
        send_frame(kind, number, chunk, (size_t)n);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        close_fd(fd);
}

static void drain_output(unsigned number, int *fd, enum kind kind)
{
    int waiting = 0;
    while (*fd >= 0 && ioctl(*fd, FIONREAD, &waiting) == 0 && waiting > 0)
        pump_output(number, fd, kind);
    close_fd(fd);
}

static void pump_input(unsigned number, struct process *p)
{
    unsigned done = 0;
    while (p->in >= 0 && done < p->in_len) {
        ssize_t n = write(p->in, p->in_buf + done, p->in_len - done);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (n < 0)
            close_fd(&p->in); /* it does not read any more: the rest is dropped, as a shell's pipe would */
        else
            done += (unsigned)n;
    }
    if (p->in < 0)
        done = p->in_len;
    memmove(p->in_buf, p->in_buf + done, p->in_len - done);
    p->in_len -= done;
    if (done)
        send_text(CONSUMED, number, "bytes=%u", done);
    if (p->in_closing && !p->in_len)
        close_fd(&p->in);
}

static void handle_stdin(unsigned number, const unsigned char *data, unsigned len)
{
    struct process *p = find_process(number);
    if (!p)
        return;
    if (!len)
        p->in_closing = 1;
    if (p->in_buf && len <= STDIN_WINDOW - p->in_len) {
        memcpy(p->in_buf + p->in_len, data, len);
        p->in_len += len;
    }
    pump_input(number, p);
}

static void check_exec(unsigned number, struct process *p)
{
    char problem[700];
    ssize_t n = read(p->exec_pipe, problem, sizeof problem - 1);
    if (n < 0 && errno == EINTR)
        return;
    close_fd(&p->exec_pipe);
    problem[n > 0 ? n : 0] = 0;
    if (n > 0)
        p->problem = strdup(problem);
    else
        send_text(STARTED, number, "pid=%d monotonic_us=%lld", p->pid, monotonic_us());
}

static void end_process(unsigned number, struct process *p, int status, const struct rusage *usage)
{
    if (p->exec_pipe >= 0)
        check_exec(number, p);
    drain_output(number, &p->out, STDOUT);
    drain_output(number, &p->err, STDERR);
    close_fd(&p->in);
    free(p->in_buf);
    p->used = 0;
    if (p->problem) {
        send_text(FAILED, number, "%s", p->problem);
        free(p->problem);
        return;
    }
    send_text(EXITED, number,
              "status=%d signal=%d user_us=%lld system_us=%lld maxrss_kib=%ld minflt=%ld majflt=%ld inblock=%ld "
              "oublock=%ld nvcsw=%ld nivcsw=%ld monotonic_us=%lld",
              WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
              WIFSIGNALED(status) ? WTERMSIG(status) : 0,
              (long long)usage->ru_utime.tv_sec * 1000000 + usage->ru_utime.tv_usec,
              (long long)usage->ru_stime.tv_sec * 1000000 + usage->ru_stime.tv_usec, usage->ru_maxrss,
              usage->ru_minflt, usage->ru_majflt, usage->ru_inblock, usage->ru_oublock, usage->ru_nvcsw,
              usage->ru_nivcsw, monotonic_us());
}

static void reap(void)
{
    struct signalfd_siginfo info;
    struct rusage usage;
    int status;
    pid_t pid;
    while (read(child_signals, &info, sizeof info) > 0)
        ;
    while ((pid = wait4(-1, &status, WNOHANG, &usage)) > 0)
        for (unsigned i = 0; i < MAX_PROCESSES; i++)
            if (processes[i].used && processes[i].pid == pid)
                end_process(i, &processes[i], status, &usage);
}

static void handle_signal(unsigned number, const char *text)
{
    struct process *p = find_process(number);
    int sig = atoi(text);
    if (p && sig > 0 && kill(-p->pid, sig) < 0)
        kill(p->pid, sig); /* before its setsid there is no such process group */
}

static size_t read_text(const char *path, char *to, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, to, size - 1);
    if (fd >= 0)
        close(fd);
    to[n > 0 ? n : 0] = 0;
    return n > 0 ? (size_t)n : 0;
}

static long long meminfo(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    return at ? strtoll(at + strlen(name), NULL, 10) : 0;
}

static void send_figures(void)
{
    char text[8192];
    unsigned long long user = 0, nice = 0, system = 0, idle = 0, iowait = 0, irq = 0, softirq = 0;
    long ticks = sysconf(_SC_CLK_TCK);
    read_text("/proc/stat", text, sizeof text);
    sscanf(text, "cpu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &iowait, &irq, &softirq);
    read_text("/proc/meminfo", text, sizeof text);
    send_text(FIGURES, 0,
              "monotonic_us=%lld user_us=%llu system_us=%llu idle_us=%llu memory_total_kib=%lld memory_free_kib=%lld "
              "memory_available_kib=%lld cached_kib=%lld",
              monotonic_us(), (user + nice) * 1000000 / ticks, (system + irq + softirq) * 1000000 / ticks,
              (idle + iowait) * 1000000 / ticks, meminfo(text, "MemTotal:"), meminfo(text, "MemFree:"),
              meminfo(text, "MemAvailable:"), meminfo(text, "\nCached:"));
}

static void handle_frame(unsigned kind, unsigned number, unsigned char *data, unsigned len)
{
    /* `data` is followed by at least one byte of the buffer that we may overwrite and restore */
    unsigned char after = data[len];
    data[len] = 0;
    switch (kind) {
    case STDIN: handle_stdin(number, data, len); break;
    case SETUP: handle_setup((char *)data, (char *)data + len); break;
    case START: handle_start(number, (char *)data, (char *)data + len); break;
    case SIGNAL: handle_signal(number, (char *)data); break;
    case STATS: send_figures(); break;
    case POWEROFF: power_off(); break;
    }
    data[len] = after;
}

static void read_port(void)
{
    unsigned start = 0;
    ssize_t n = read(port, input + input_len, sizeof input - 1 - input_len);
    if (n <= 0) {
        usleep(1000); /* no host at the other end */
        return;
    }
    input_len += (unsigned)n;
    while (input_len - start >= 8) {
        unsigned char *frame = input + start;
        unsigned len = (unsigned)frame[4] << 24 | (unsigned)frame[5] << 16 | (unsigned)frame[6] << 8 | frame[7];
        if (len > MAX_FRAME - 8) {
            errno = EMSGSIZE;
            die("a frame from the host");
        }
        if (input_len - start - 8 < len)
            break;
        handle_frame(frame[0], (unsigned)frame[2] << 8 | frame[3], frame + 8, len);
        start += 8 + len;
    }
    memmove(input, input + start, input_len - start);
    input_len -= start;
}

static void serve(void)
{
    struct pollfd fds[2 + 4 * MAX_PROCESSES];
    for (;;) {
        int count = 2;
        fds[0] = (struct pollfd){.fd = port, .events = POLLIN};
        fds[1] = (struct pollfd){.fd = child_signals, .events = POLLIN};
        for (unsigned i = 0; i < MAX_PROCESSES; i++, count += 4) {
            struct process *p = &processes[i];
            fds[count] = (struct pollfd){.fd = p->used ? p->out : -1, .events = POLLIN};
            fds[count + 1] = (struct pollfd){.fd = p->used ? p->err : -1, .events = POLLIN};
            fds[count + 2] = (struct pollfd){.fd = p->used ? p->exec_pipe : -1, .events = POLLIN};
            fds[count + 3] = (struct pollfd){.fd = p->used && p->in_len ? p->in : -1, .events = POLLOUT};
        }
        if (poll(fds, (nfds_t)count, -1) < 0)
            continue;
        for (unsigned i = 0; i < MAX_PROCESSES; i++) {
            struct process *p = &processes[i];
            struct pollfd *f = fds + 2 + 4 * i;
            if (f[2].revents)
                check_exec(i, p);
            if (f[0].revents && p->out >= 0)
                pump_output(i, &p->out, STDOUT);
            if (f[1].revents && p->err >= 0)
                pump_output(i, &p->err, STDERR);
            if (f[3].revents)
                pump_input(i, p);
        }
        if (fds[1].revents)
            reap();
        if (fds[0].revents)
            read_port();
    }
}

/* ---- the two roles --------------------------------------------------------------------------------------------- */

static int launch(char **argv)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        perror("prctl");
    if (getppid() != atoi(argv[2]))
        return 1; /* the parent died before the line above */
    execv(argv[3], argv + 3);
    fprintf(stderr, "%s: %s\n", argv[3], strerror(errno));
    return errno == ENOENT ? 127 : 126;
}

int main(int argc, char **argv)
{
    struct utsname host;
    sigset_t signals;
    if (argc >= 4 && !strcmp(argv[1], "--launch"))
        return launch(argv);
    if (getpid() != 1) {
        fprintf(stderr, "usage: %s --launch PARENT-PID PROGRAM [ARG...]\n", argv[0]);
        return 2;
    }
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    int console = open("/dev/console", O_RDWR | O_CLOEXEC);
    for (int fd = 0; console >= 0 && fd < 3; fd++)
        dup2(console, fd);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    child_signals = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    umask(022);
    load_modules();
    open_port();
    uname(&host);
    send_text(HELLO, 0, "protocol=%d kernel=%s machine=%s monotonic_us=%lld", PROTOCOL, host.release, host.machine,
              monotonic_us());
    serve();
    return 0;
}
