/* STATS: the guest's own view of what it uses (proc(5): stat, meminfo). */
#include "guest.h"

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

void send_figures(void)
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
