/* Running processes: their streams, their signals and their ends. */
#include "guest.h"

struct process *find_process(unsigned number)
{
    return number < MAX_PROCESSES && processes[number].used ? &processes[number] : NULL;
}

void pump_output(unsigned number, int *fd, enum kind kind)
{
    static char chunk[CHUNK]; /* one chunk a turn: what writes without end must not keep signals from being read */
    ssize_t n = read(*fd, chunk, sizeof chunk);
    if (n > 0)
        send_frame(kind, number, chunk, (size_t)n);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        close_fd(fd);
}

static void drain_output(unsigned number, struct process *p, int *fd, enum kind kind)
{
    int waiting = 0;
    if (p->tty) { /* the master counts nothing that is still on its way; the last slave's end gives EIO */
        static char chunk[CHUNK];
        ssize_t n;
        while (*fd >= 0 && (n = read(*fd, chunk, sizeof chunk)) > 0)
            send_frame(kind, number, chunk, (size_t)n);
    }
    while (*fd >= 0 && !p->tty && ioctl(*fd, FIONREAD, &waiting) == 0 && waiting > 0)
        pump_output(number, fd, kind);
    close_fd(fd);
}

void pump_input(unsigned number, struct process *p)
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

void handle_stdin(unsigned number, const unsigned char *data, unsigned len)
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

void check_exec(unsigned number, struct process *p)
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
    drain_output(number, p, &p->out, STDOUT);
    drain_output(number, p, &p->err, STDERR);
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

void reap(void)
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

void handle_signal(unsigned number, const char *text)
{
    struct process *p = find_process(number);
    int sig = atoi(text);
    if (p && sig > 0 && kill(-p->pid, sig) < 0)
        kill(p->pid, sig); /* before its setsid there is no such process group */
}

void handle_hold(unsigned number, const char *text)
{
    struct process *p = find_process(number);
    if (p)
        p->held = atoi(text);
}

void handle_resize(unsigned number, const char *text)
{
    struct process *p = find_process(number);
    struct winsize size = {0};
    if (p && p->tty && p->out >= 0 && sscanf(text, "%hu %hu", &size.ws_row, &size.ws_col) == 2)
        ioctl(p->out, TIOCSWINSZ, &size);
}
