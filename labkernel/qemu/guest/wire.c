/* Frames to the host, and what every part needs to say something or to end. */
#include "guest.h"

void power_off(void)
{
    sync();
    reboot(RB_AUTOBOOT); /* QEMU runs with -no-reboot and ends; powering off would need ACPI */
    for (;;)
        pause();
}

void die(const char *what)
{
    fprintf(stderr, "labkernel guest init: %s: %s\n", what, strerror(errno));
    power_off();
}

void write_all(int fd, const void *data, size_t len)
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

void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd >= 0) {
        write_all(fd, text, strlen(text));
        close(fd);
    }
}

void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void send_frame(enum kind kind, unsigned number, const void *data, size_t len)
{
    /* One write per frame: virtio-serial makes one descriptor of each, and each costs an exit to QEMU. */
    static unsigned char frame[SHARE_CHUNK + 8];
    if (len > SHARE_CHUNK)
        len = SHARE_CHUNK;
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

void send_text(enum kind kind, unsigned number, const char *format, ...)
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

long long monotonic_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static unsigned char input[MAX_FRAME + 8];
static unsigned input_len;

/* Read what has come and hand on each whole frame. A zero byte follows its payload. */
void read_frames(frame_handler *handle)
{
    unsigned start = 0;
    ssize_t n = read(port, input + input_len, sizeof input - 1 - input_len);
    if (n <= 0) {
        usleep(1000); /* no host at the other end */
        return;
    }
    input_len += (unsigned)n;
    while (input_len - start >= 8) {
        unsigned char *frame = input + start, *end;
        unsigned len = (unsigned)frame[4] << 24 | (unsigned)frame[5] << 16 | (unsigned)frame[6] << 8 | frame[7];
        if (len > MAX_FRAME - 8) {
            errno = EMSGSIZE;
            die("a frame from the host");
        }
        if (input_len - start - 8 < len)
            break;
        end = frame + 8 + len;
        unsigned char after = *end;
        *end = 0;
        handle(frame[0], (unsigned)frame[2] << 8 | frame[3], frame + 8, len);
        *end = after;
        start += 8 + len;
    }
    memmove(input, input + start, input_len - start);
    input_len -= start;
}

/* In a child that takes frames from another port. */
void forget_input(void)
{
    input_len = 0;
}
