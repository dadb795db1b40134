/*
 * Shared directories: the kernel's FUSE requests go to the host as they are, its answers come back as they are.
 *
 * A process of its own does it, with a port of its own: a command that copies from a share to its output may hold the
 * pipe's lock while it waits for the share, and who reads that pipe must not be who serves the share.
 *
 * So the host's file server (fileserver.py) needs no privileges, no daemon and no device of its own, and a guest
 * restored from a template can have any number of them. Source: man 4 fuse, linux/fuse.h.
 */
#include "guest.h"

struct share {
    int fd, directory, readonly;
    char target[1024];
};

static struct share shares[MAX_SHARES];
static int count;
static int frozen; /* see init.c */

/* "d|f rw|ro TARGET": opens a FUSE device for it. Returns what went wrong, or NULL. */
const char *open_share(char *text)
{
    static char problem[300];
    struct share *s = &shares[count];
    char kind, access[3];
    if (count == MAX_SHARES || sscanf(text, "%c %2s %1023[^\001]", &kind, access, s->target) != 3)
        return "too many shared directories, or one that cannot be read";
    if (!count)
        load_modules("share");
    s->fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (s->fd < 0) {
        snprintf(problem, sizeof problem, "shared directories need FUSE in the guest's kernel: %s", strerror(errno));
        return problem;
    }
    s->directory = kind == 'd';
    s->readonly = !strcmp(access, "ro");
    count++;
    return NULL;
}

static int make_point(struct share *s)
{
    char *slash;
    if (s->directory)
        return make_parents(s->target);
    slash = strrchr(s->target, '/');
    if (slash && slash != s->target) {
        *slash = 0;
        make_parents(s->target);
        *slash = '/';
    }
    int fd = open(s->target, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd >= 0)
        close(fd);
    return fd < 0 && errno != EROFS ? -1 : 0;
}

static const char *mount_all(void)
{
    static char problem[1400];
    char options[200];
    for (struct share *s = shares; s < shares + count; s++) {
        snprintf(options, sizeof options, "fd=%d,rootmode=%o,user_id=0,group_id=0,default_permissions,allow_other", s->fd,
                 s->directory ? S_IFDIR : S_IFREG);
        if (make_point(s) < 0 ||
            mount("labkernel", s->target, "fuse", MS_NODEV | MS_NOSUID | (s->readonly ? MS_RDONLY : 0), options) < 0) {
            snprintf(problem, sizeof problem, "mount the shared %s: %s", s->target, strerror(errno));
            return problem;
        }
    }
    return NULL;
}

static void answer(unsigned kind, unsigned number, unsigned char *data, unsigned len)
{
    if (kind == SHARED && number < (unsigned)count && shares[number].fd >= 0)
        (void)!write(shares[number].fd, data, len); /* ENOENT: the request was interrupted meanwhile */
    else if (kind == FREEZE)
        frozen = 1;
    else if (kind == CLOCK)
        frozen = 0;
    if (kind == FREEZE)
        send_text(FROZEN, 0, "monotonic_us=%lld", monotonic_us());
}

static void pass_on(unsigned number, struct share *s)
{
    static unsigned char request[SHARE_CHUNK];
    ssize_t n = read(s->fd, request, sizeof request);
    if (n > 0)
        send_frame(SHARE, number, request, (size_t)n);
    else if (n < 0 && errno == ENODEV)
        close_fd(&s->fd); /* unmounted */
    else if (n < 0 && errno == EPERM)
        usleep(1000); /* opened, but not mounted yet: the device is "ready" all the same */
}

static void serve(void)
{
    struct pollfd fds[1 + MAX_SHARES];
    for (;;) {
        fds[0] = (struct pollfd){.fd = port, .events = POLLIN};
        for (int i = 0; i < count; i++)
            fds[1 + i] = (struct pollfd){.fd = frozen ? -1 : shares[i].fd, .events = POLLIN};
        if (poll(fds, (nfds_t)count + 1, -1) < 0)
            continue;
        for (int i = 0; i < count; i++)
            if (fds[1 + i].revents)
                pass_on((unsigned)i, &shares[i]);
        if (fds[0].revents)
            read_frames(answer);
    }
}

/* Starts the process that serves them, and mounts them. Returns what went wrong, or NULL. */
const char *mount_shares(void)
{
    const char *problem;
    if (!count)
        return NULL;
    pid_t pid = fork();
    if (pid < 0)
        return "fork for the shared directories";
    if (pid == 0) {
        setsid();
        close_fd(&port);
        forget_input();
        port = open_port(SHARE_PORT_NAME);
        serve();
    }
    problem = mount_all();
    for (int i = 0; i < count; i++)
        close_fd(&shares[i].fd);
    return problem;
}
