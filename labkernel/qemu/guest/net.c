/* Network interfaces: `lo` always, what QEMU's user-mode network expects, or the cards of networks users made. */
#include "guest.h"

/* The addresses of QEMU's user-mode network (QEMU manual, "Using the user mode network stack"). */
#define GUEST_ADDRESS 0x0a00020f   /* 10.0.2.15 */
#define GATEWAY 0x0a000202         /* 10.0.2.2 */
#define NETMASK 0xffffff00
#define RESOLVER 0xa9fe7f0b        /* 169.254.127.11: the monitor answers on every card (cards.py) */

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

/* The index of an interface; a card's driver may still be at work. Returns -1 when it does not come. */
static int find_interface(int fd, struct ifreq *request)
{
    for (int tries = 0; ioctl(fd, SIOCGIFINDEX, request) < 0; tries++) {
        if (tries == 2000)
            return -1;
        usleep(1000);
    }
    return request->ifr_ifindex;
}

static const char no_card[] = "find the network card: this kernel may lack virtio_net";

static int add_route(int fd, uint32_t to, uint32_t mask, uint32_t gateway, char *device, int metric)
{
    struct rtentry route = {.rt_flags = RTF_UP, .rt_dev = device, .rt_metric = (short)metric};
    route.rt_flags |= gateway ? RTF_GATEWAY : 0;
    route.rt_flags |= mask == 0xffffffff ? RTF_HOST : 0;
    route.rt_dst = address(to);
    route.rt_genmask = address(mask);
    route.rt_gateway = address(gateway);
    return ioctl(fd, SIOCADDRT, &route);
}

/* eth0 with its fixed address; `open`: a way out and a name server, too. Returns what went wrong, or NULL. */
const char *network_up(int open)
{
    static char problem[200];
    struct ifreq request = {0};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), failed = 0;
    strcpy(request.ifr_name, "eth0");
    if (find_interface(fd, &request) < 0) {
        close(fd);
        return no_card;
    }
    request.ifr_addr = address(GUEST_ADDRESS);
    failed |= ioctl(fd, SIOCSIFADDR, &request);
    request.ifr_netmask = address(NETMASK);
    failed |= ioctl(fd, SIOCSIFNETMASK, &request);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    failed |= ioctl(fd, SIOCSIFFLAGS, &request);
    if (open && !failed) {
        failed |= add_route(fd, 0, 0, GATEWAY, NULL, 0);
        mkdir("/etc", 0755);
        write_file("/etc/resolv.conf", "nameserver 10.0.2.3\n");
    }
    snprintf(problem, sizeof problem, "set up eth0: %s", strerror(errno));
    close(fd);
    return failed ? problem : NULL;
}

struct card {
    unsigned number, mtu, prefix;
    char mac[18], ip[16], gateway[16]; /* gateway "-": no way out through this card */
};

static uint32_t parse_ip(const char *text)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    sscanf(text, "%u.%u.%u.%u", &a, &b, &c, &d);
    return a << 24 | b << 16 | c << 8 | d;
}

static const char *card_up(int fd, struct card *card)
{
    static char problem[200];
    struct ifreq request = {0};
    uint32_t mask = card->prefix ? ~0u << (32 - card->prefix) : 0;
    unsigned mac[6] = {0};
    int failed = 0;
    snprintf(request.ifr_name, sizeof request.ifr_name, "eth%u", card->number);
    if (find_interface(fd, &request) < 0)
        return no_card;
    /* a restored guest has the template's address, and what was there before a change has to go */
    request.ifr_flags = 0;
    ioctl(fd, SIOCSIFFLAGS, &request);
    sscanf(card->mac, "%x:%x:%x:%x:%x:%x", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5);
    memset(&request.ifr_hwaddr, 0, sizeof request.ifr_hwaddr);
    request.ifr_hwaddr.sa_family = 1; /* ARPHRD_ETHER */
    for (int i = 0; i < 6; i++)
        request.ifr_hwaddr.sa_data[i] = (char)mac[i];
    failed |= ioctl(fd, SIOCSIFHWADDR, &request);
    request.ifr_mtu = (int)card->mtu;
    failed |= ioctl(fd, SIOCSIFMTU, &request);
    request.ifr_addr = address(parse_ip(card->ip));
    failed |= ioctl(fd, SIOCSIFADDR, &request);
    request.ifr_netmask = address(mask);
    failed |= ioctl(fd, SIOCSIFNETMASK, &request);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    failed |= ioctl(fd, SIOCSIFFLAGS, &request);
    failed |= add_route(fd, RESOLVER, 0xffffffff, 0, request.ifr_name, (int)card->number + 1);
    if (card->gateway[0] != '-')
        failed |= add_route(fd, 0, 0, parse_ip(card->gateway), request.ifr_name, 1);
    snprintf(problem, sizeof problem, "set up %s: %s", request.ifr_name, strerror(errno));
    return failed ? problem : NULL;
}

static void card_down(int fd, unsigned number)
{
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "eth%u", number);
    request.ifr_addr = address(0);
    ioctl(fd, SIOCSIFADDR, &request); /* takes the address away */
    request.ifr_flags = 0;
    ioctl(fd, SIOCSIFFLAGS, &request);
}

/* Write a file of /etc, unless somebody has changed what we wrote the last time. */
static void provide(const char *path, const char *text, char *last, size_t size)
{
    char found[4096];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, found, sizeof found - 1);
    if (fd >= 0)
        close(fd);
    found[length > 0 ? length : 0] = 0;
    if (*last && strcmp(found, last))
        return;
    mkdir("/etc", 0755);
    write_file(path, text);
    snprintf(last, size, "%s", text);
}

/* Records `w` (number mac mtu ip prefix gateway) of all cards that are in use, `R` and `H` (/etc/resolv.conf and
 * /etc/hosts): what has changed since the last time is done. Returns what went wrong, or NULL. */
const char *plug_cards(char *data, char *end)
{
    static char now[MAX_CARDS][160], hosts[4096], resolv[4096];
    char *wanted[MAX_CARDS] = {0};
    const char *problem = NULL;
    struct card card;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    for (char *record = data; record < end; record += strlen(record) + 1) {
        if (record[0] == 'w' && (unsigned)atoi(record + 1) < MAX_CARDS)
            wanted[atoi(record + 1)] = record + 1;
        else if (record[0] == 'H')
            provide("/etc/hosts", record + 1, hosts, sizeof hosts);
        else if (record[0] == 'R')
            provide("/etc/resolv.conf", record + 1, resolv, sizeof resolv);
    }
    for (unsigned i = 0; i < MAX_CARDS; i++) {
        if (!wanted[i] && now[i][0])
            card_down(fd, i);
    }
    for (unsigned i = 0; i < MAX_CARDS && !problem; i++) {
        if (wanted[i] && strcmp(wanted[i], now[i])) {
            if (sscanf(wanted[i], "%u %17s %u %15s %u %15s", &card.number, card.mac, &card.mtu, card.ip, &card.prefix,
                       card.gateway) == 6)
                problem = card_up(fd, &card);
        }
    }
    for (unsigned i = 0; i < MAX_CARDS; i++)
        snprintf(now[i], sizeof now[i], "%s", wanted[i] ? wanted[i] : "");
    close(fd);
    return problem;
}

/* Whether a card that the records want is not there: QEMU has just plugged it in, and without ACPI nobody says so. */
static int lacks_card(char *data, char *end)
{
    char path[64];
    for (char *record = data; record < end; record += strlen(record) + 1) {
        snprintf(path, sizeof path, "/sys/class/net/eth%u", (unsigned)atoi(record + 1));
        if (record[0] == 'w' && access(path, F_OK) < 0)
            return 1;
    }
    return 0;
}

void handle_network(char *data, char *end)
{
    if (lacks_card(data, end)) {
        load_modules("network");
        write_file("/sys/bus/pci/rescan", "1");
    }
    const char *problem = plug_cards(data, end);
    send_text(NETWORKED, 0, "%s", problem ? problem : "");
}
