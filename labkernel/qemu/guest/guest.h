/* What the parts of the guest's init share. init.c tells what the program is, channel.py what the frames are. */
#ifndef LABKERNEL_GUEST_H
#define LABKERNEL_GUEST_H
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
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
#define PROTOCOL 3
#define PORT_NAME "labkernel.0"
#define SHARE_PORT_NAME "labkernel.1"
#define MAX_PROCESSES 32
#define MAX_SHARES 16
#define MAX_CARDS 4 /* networks a machine can be in (command.py: CARDS) */
#define MAX_FRAME (1u << 20)
#define CHUNK 32768
#define SHARE_CHUNK (132u << 10) /* a write of 128 KiB with its headers (man 4 fuse; fileserver.py says max_write) */
#define STDIN_WINDOW (256u << 10) /* the host never has more than this unacknowledged (channel.py) */
#define MAX_GROUPS 64
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

enum kind {
    STDIN = 0, STDOUT = 1, STDERR = 2,
    SETUP = 16, START = 17, SIGNAL = 18, STATS = 19, POWEROFF = 20, HOLD = 21, RESIZE = 22, CLOCK = 23, SHARED = 24,
    FREEZE = 25, NETWORK = 26,
    HELLO = 32, READY = 33, STARTED = 34, EXITED = 35, FIGURES = 36, FAILED = 37, CONSUMED = 38, SHARE = 39,
    FROZEN = 40, NETWORKED = 41,
};

struct process {
    int used;
    pid_t pid;
    int in, out, err;    /* our ends of its pipes (with a terminal: its master, twice), -1 when closed */
    int exec_pipe;       /* end of file here means: execve succeeded */
    int in_closing;      /* the host has sent the end of stdin */
    int held;            /* the host has enough output for now */
    int tty;
    char *problem;       /* why execve failed: told when it is reaped, since then its number is free again */
    unsigned in_len;
    unsigned char *in_buf;
};

struct identity {
    uid_t uid;
    gid_t gid;
    int group_count;
    gid_t groups[MAX_GROUPS];
    char home[256];
};

struct command {
    char **argv, **envp, *user, *cwd;
    int env_count, want_in, tty, rows, columns;
};

extern struct process processes[MAX_PROCESSES];
extern int port;          /* the virtio-serial port to the host */
extern int child_signals; /* a signalfd for SIGCHLD */

/* wire.c */
void power_off(void);
void die(const char *what);
void write_all(int fd, const void *data, size_t len);
void write_file(const char *path, const char *text);
void close_fd(int *fd);
typedef void frame_handler(unsigned kind, unsigned number, unsigned char *data, unsigned len);
void read_frames(frame_handler *handle);
void forget_input(void);
void send_frame(enum kind kind, unsigned number, const void *data, size_t len);
void send_text(enum kind kind, unsigned number, const char *format, ...);
long long monotonic_us(void);

/* boot.c */
void load_modules(const char *list);
int open_port(const char *name);

/* root.c */
int make_parents(char *path);
void handle_setup(char *data, char *end);
void handle_clock(char *data, char *end);

/* net.c */
void loopback_up(void);
const char *network_up(int open);
const char *plug_cards(char *data, char *end);
void handle_network(char *data, char *end);

/* share.c */
const char *open_share(char *text);
const char *mount_shares(void);

/* users.c */
int as_number(const char *text, unsigned *value);
const char *resolve_user(char *user, struct identity *who);

/* exec.c */
void handle_start(unsigned number, char *data, char *end);

/* processes.c */
struct process *find_process(unsigned number);
void pump_output(unsigned number, int *fd, enum kind kind);
void pump_input(unsigned number, struct process *p);
void check_exec(unsigned number, struct process *p);
void handle_stdin(unsigned number, const unsigned char *data, unsigned len);
void handle_signal(unsigned number, const char *text);
void handle_hold(unsigned number, const char *text);
void handle_resize(unsigned number, const char *text);
void reap(void);

/* figures.c */
void send_figures(void);

#endif
