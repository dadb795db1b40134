/* Network interfaces: `lo` always, and what QEMU's user-mode network expects when one was asked for. */
#include "guest.h"

/* The addresses of QEMU's user-mode network (QEMU manual, "Using the user mode network stack"). */
#define GUEST_ADDRESS 0x0a00020f   /* 10.0.2.15 */
#define GATEWAY 0x0a000202         /* 10.0.2.2 */
#define NETMASK 0xffffff00

static struct sockaddr address(uint32_t ip)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(ip)};
    struct sockaddr result;
    memcpy(&result, &in, sizeof result);
    return result;
}

void loopback_up(void)
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

/* eth0 with its fixed address; `open`: a way out and a name server, too. Returns what went wrong, or NULL. */
const char *network_up(int open)
{
    static char problem[200];
    struct ifreq request = {0};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), failed = 0;
    strcpy(request.ifr_name, "eth0");
    for (int tries = 0; ioctl(fd, SIOCGIFINDEX, &request) < 0; tries++) {
        if (tries == 2000) {
            close(fd);
            return "the network card did not appear: this kernel may lack virtio_net";
        }
        usleep(1000);
    }
    request.ifr_addr = address(GUEST_ADDRESS);
    failed |= ioctl(fd, SIOCSIFADDR, &request);
    request.ifr_netmask = address(NETMASK);
    failed |= ioctl(fd, SIOCSIFNETMASK, &request);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    failed |= ioctl(fd, SIOCSIFFLAGS, &request);
    if (open && !failed) {
        struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
        route.rt_dst = address(0);
        route.rt_genmask = address(0);
        route.rt_gateway = address(GATEWAY);
        failed |= ioctl(fd, SIOCADDRT, &route);
        mkdir("/etc", 0755);
        write_file("/etc/resolv.conf", "nameserver 10.0.2.3\n");
    }
    snprintf(problem, sizeof problem, "set up eth0: %s", strerror(errno));
    close(fd);
    return failed ? problem : NULL;
}
