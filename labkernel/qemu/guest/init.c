/*
 * The first process of a labkernel guest: pid 1, and all there is of an init.
 *
 * It loads the modules of the initramfs, opens the virtio-serial port "labkernel.0", says hello, and does what the
 * frames on that port ask for: mount the root disk and shared directories, run commands, pass on signals, tell figures.
 * It leaves out everything a distribution's init does: there are no services, no logins and no network but what the
 * host's SETUP names.
 *
 * Frames, both ways: kind (1 byte), 0, process number (2 bytes, big endian), length (4 bytes, big endian), payload.
 * labkernel/qemu/channel.py is the other end and names every kind. Records inside SETUP and START are strings that
 * end in NUL; their first letter says what they are. Figures are words `name=number`, separated by spaces.
 */
#include "guest.h"

static const char source_digest[] __attribute__((used)) = "labkernel-init:" SOURCE_DIGEST; /* see compiling.py */
struct process processes[MAX_PROCESSES];
int port = -1;
int child_signals = -1;
static int frozen; /* a snapshot is taken: not a byte but what was asked for, until the next CLOCK */

static void handle_frame(unsigned kind, unsigned number, unsigned char *data, unsigned len)
{
    switch (kind) {
    case STDIN: handle_stdin(number, data, len); break;
    case SETUP: handle_setup((char *)data, (char *)data + len); break;
    case START: handle_start(number, (char *)data, (char *)data + len); break;
    case SIGNAL: handle_signal(number, (char *)data); break;
    case STATS: send_figures(); break;
    case POWEROFF: power_off(); break;
    case HOLD: handle_hold(number, (char *)data); break;
    case RESIZE: handle_resize(number, (char *)data); break;
    case CLOCK:
        frozen = 0;
        handle_clock((char *)data, (char *)data + len);
        break;
    case NETWORK: handle_network((char *)data, (char *)data + len); break;
    case FREEZE:
        frozen = 1;
        send_text(FROZEN, 0, "monotonic_us=%lld", monotonic_us());
        break;
    }
}

static void serve_process(unsigned number, struct process *p, const struct pollfd *fds)
{
    if (fds[2].revents)
        check_exec(number, p);
    if (fds[0].revents && p->out >= 0)
        pump_output(number, &p->out, STDOUT);
    if (fds[1].revents && p->err >= 0)
        pump_output(number, &p->err, STDERR);
    if (fds[3].revents)
        pump_input(number, p);
}

static void serve(void)
{
    struct pollfd fds[2 + 4 * MAX_PROCESSES], *of = fds + 2;
    for (;;) {
        fds[0] = (struct pollfd){.fd = port, .events = POLLIN};
        fds[1] = (struct pollfd){.fd = child_signals, .events = POLLIN};
        for (unsigned i = 0; i < MAX_PROCESSES; i++) {
            struct process *p = &processes[i];
            int talks = p->used && !p->held;
            of[4 * i] = (struct pollfd){.fd = talks ? p->out : -1, .events = POLLIN};
            of[4 * i + 1] = (struct pollfd){.fd = talks ? p->err : -1, .events = POLLIN};
            of[4 * i + 2] = (struct pollfd){.fd = p->used ? p->exec_pipe : -1, .events = POLLIN};
            of[4 * i + 3] = (struct pollfd){.fd = p->used && p->in_len ? p->in : -1, .events = POLLOUT};
        }
        if (poll(fds, frozen ? 1 : sizeof fds / sizeof *fds, -1) < 0)
            continue;
        if (frozen) {
            read_frames(handle_frame);
            continue;
        }
        for (unsigned i = 0; i < MAX_PROCESSES; i++)
            serve_process(i, &processes[i], of + 4 * i);
        if (fds[1].revents)
            reap();
        if (fds[0].revents)
            read_frames(handle_frame);
    }
}

int main(int argc, char **argv)
{
    struct utsname host;
    sigset_t signals;
    if (getpid() != 1) {
        fprintf(stderr, "%s is the first process of a virtual machine\n", argc ? argv[0] : "this program");
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
    load_modules("order");
    port = open_port(PORT_NAME);
    uname(&host);
    send_text(HELLO, 0, "protocol=%d kernel=%s machine=%s monotonic_us=%lld", PROTOCOL, host.release, host.machine,
              monotonic_us());
    serve();
    return 0;
}
