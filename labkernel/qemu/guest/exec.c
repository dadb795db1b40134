/* START: from the words of the host to an execve, or to docker's exit code and words for why not. */
#include "guest.h"

void report(int fd, int code, const char *format, ...)
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

static void become(int fd, struct command *c, int terminal)
{
    struct identity who = {0};
    const char *problem = resolve_user(c->user, &who);
    static char home[300];
    int has_home = 0;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    setsid();
    if (terminal >= 0) {
        for (int number = 0; number < 3; number++)
            dup2(terminal, number);
        ioctl(0, TIOCSCTTY, 0);
        fchown(0, who.uid, (gid_t)-1); /* as getty does: programs open /dev/tty's node by its name */
    }
    if (problem)
        report(fd, 125, "%s", problem);
    if (*c->cwd && chdir(c->cwd) < 0 && (errno != ENOENT || make_parents(c->cwd) < 0 || chdir(c->cwd) < 0))
        report(fd, 126, "chdir to cwd (\"%s\"): %s", c->cwd, strerror(errno));
    for (int i = 0; i < c->env_count; i++)
        has_home |= !strncmp(c->envp[i], "HOME=", 5);
    if (!has_home) {
        snprintf(home, sizeof home, "HOME=%s", who.home[0] ? who.home : who.uid ? "/" : "/root");
        c->envp[c->env_count++] = home;
        c->envp[c->env_count] = NULL;
    }
    if (setgroups((size_t)who.group_count, who.groups) < 0 || setgid(who.gid) < 0 || setuid(who.uid) < 0)
        report(fd, 125, "set user: %s", strerror(errno));
    exec_search(fd, c->argv, c->envp);
}

/* A terminal of the guest's own: line discipline, job control and window size are the guest kernel's business. */
static int open_terminal(int *master, const struct command *c)
{
    struct winsize size = {.ws_row = (unsigned short)c->rows, .ws_col = (unsigned short)c->columns};
    char name[64];
    int number, unlock = 0;
    *master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (*master < 0 || ioctl(*master, TIOCSPTLCK, &unlock) < 0 || ioctl(*master, TIOCGPTN, &number) < 0)
        return -1;
    ioctl(*master, TIOCSWINSZ, &size);
    snprintf(name, sizeof name, "/dev/pts/%d", number);
    return open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
}

static int open_streams(int ours[3], int theirs[3], const struct command *c)
{
    int in[2], out[2], err[2];
    if (c->tty) {
        theirs[0] = open_terminal(&ours[0], c);
        theirs[1] = theirs[2] = ours[2] = -1;
        ours[1] = theirs[0] < 0 ? -1 : fcntl(ours[0], F_DUPFD_CLOEXEC, 3);
        return ours[1] < 0 ? -1 : 0;
    }
    if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0)
        return -1;
    memcpy(ours, (int[]){in[1], out[0], err[0]}, 3 * sizeof(int));
    memcpy(theirs, (int[]){in[0], out[1], err[1]}, 3 * sizeof(int));
    for (int i = 0; i < 3; i++)
        fcntl(ours[i], F_SETFL, O_NONBLOCK);
    return 0;
}

static void start_process(unsigned number, struct command *c)
{
    struct process *p = &processes[number];
    int ours[3] = {-1, -1, -1}, theirs[3] = {-1, -1, -1}, done[2] = {-1, -1};
    pid_t pid = -1;
    if (open_streams(ours, theirs, c) == 0 && pipe2(done, O_CLOEXEC) == 0)
        pid = fork();
    if (pid == 0) {
        if (!c->tty) {
            dup2(c->want_in ? theirs[0] : open("/dev/null", O_RDONLY | O_CLOEXEC), 0);
            dup2(theirs[1], 1);
            dup2(theirs[2], 2);
        }
        become(done[1], c, c->tty ? theirs[0] : -1);
    }
    if (pid < 0)
        send_text(FAILED, number, "125 streams and a process: %s", strerror(errno));
    for (int i = 0; i < 3; i++) {
        close_fd(&theirs[i]);
        if (pid < 0)
            close_fd(&ours[i]);
    }
    close_fd(&done[1]);
    if (pid < 0) {
        close_fd(&done[0]);
        return;
    }
    *p = (struct process){
        .used = 1, .pid = pid, .in = ours[0], .out = ours[1], .err = ours[2], .exec_pipe = done[0], .tty = c->tty};
    p->in_buf = malloc(STDIN_WINDOW);
    if (!(c->want_in || c->tty) || !p->in_buf)
        close_fd(&p->in);
}

void handle_start(unsigned number, char *data, char *end)
{
    int args = 0, envs = 0;
    struct command c = {.user = "0", .cwd = "/", .rows = 24, .columns = 80};
    for (char *record = data; record < end; record += strlen(record) + 1) {
        args += record[0] == 'a';
        envs += record[0] == 'e';
    }
    if (number >= MAX_PROCESSES || processes[number].used || !args) {
        send_text(FAILED, number, "125 no process number %u to be had", number);
        return;
    }
    c.argv = calloc((size_t)args + 1, sizeof *c.argv);
    c.envp = calloc((size_t)envs + 2, sizeof *c.envp);
    args = 0;
    for (char *record = data; record < end; record += strlen(record) + 1) {
        switch (record[0]) {
        case 'a': c.argv[args++] = record + 1; break;
        case 'e': c.envp[c.env_count++] = record + 1; break;
        case 'u': c.user = record + 1; break;
        case 'c': c.cwd = record + 1; break;
        case 'i': c.want_in = 1; break;
        case 't':
            c.tty = 1;
            sscanf(record + 1, "%d %d", &c.rows, &c.columns);
            break;
        }
    }
    /* the strings lie in the input buffer: the child has its own copy of it after fork */
    start_process(number, &c);
    free(c.argv);
    free(c.envp);
}
