"""The same probe in a container of ours and in one of real Docker's: what it may do, see and reach has to be the same.

Needs dockerd (Debian's docker.io), which runs with data, sockets and groups of its own.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dockerd import Docker, own_docker

from labkernel.engine import Engine

IMAGE = "lab/busybox"

# Docker 28's profile, which is ours, lets these through: name_to_handle_at, process_vm_readv and process_vm_writev,
# pkey_mprotect, pkey_alloc and pkey_free, and what the kernel got since (cachestat, fchmodat2, map_shadow_stack,
# futex_*, statmount, listmount). Debian's 20.10 does not know them yet. There the tmpfs around its cgroups is writable,
# and /proc/interrupts is not covered by /dev/null, which everybody may write to.
LATER = {f"syscall-{number}" for number in (303, 310, 311, 329, 330, 331, *range(451, 459))}
LATER |= {"mount-/sys/fs/cgroup", "cgroup-made", "write-/proc/interrupts"}

# Prints one `key value` line for each thing looked at; syscall verdicts are errno names.
PROBE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>
static const char *word(int failed) { return failed ? strerrorname_np(errno) : "yes"; }
/* What may be written below /proc and /sys (other processes and what is numbered left out). */
static int visit(const char *path, const struct stat *info, int type, struct FTW *walk) {
  (void)info;
  if (type == FTW_D && walk->level > 5) return FTW_SKIP_SUBTREE;
  if (!strncmp(path, "/proc/", 6) && (strchr("123456789", path[6]) || strstr(path, "self")))
    return type == FTW_D ? FTW_SKIP_SUBTREE : FTW_CONTINUE;
  if (!strcmp(path, "/sys/kernel/slab") || !strcmp(path, "/sys/kernel/debug")) return FTW_SKIP_SUBTREE;
  if (type == FTW_F || type == FTW_D) printf("write-%s %s\n", path, word(access(path, W_OK)));
  return FTW_CONTINUE;
}
static void devices(void) {
  int all[][2] = {{1, 1}, {1, 2}, {1, 3}, {1, 4}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {1, 11}, {4, 0}, {4, 64}, {5, 0},
                  {5, 1}, {5, 2}, {7, 0}, {8, 0}, {10, 200}, {10, 229}, {10, 232}, {10, 237}, {136, 0}, {254, 0}};
  mode_t kinds[] = {S_IFCHR, S_IFBLK};
  char name[64];
  for (int kind = 0; kind < 2; kind++)
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
      snprintf(name, sizeof name, "/tmp/node-%d-%d-%d", kind, all[i][0], all[i][1]);
      printf("mknod-%s %s\n", name, word(mknod(name, kinds[kind] | 0666, makedev(all[i][0], all[i][1]))));
      int modes[] = {O_RDONLY, O_WRONLY};
      for (int way = 0; way < 2; way++) {
        int fd = open(name, modes[way] | O_NONBLOCK | O_NOCTTY);
        /* Let through means anything but the device cgroup's verdict: the machine need not have the device. */
        printf("open-%s-%d %s\n", name, way, fd < 0 && errno == EPERM ? "EPERM" : "through");
        if (fd >= 0) close(fd);
      }
      unlink(name);
    }
}
static void limits(void) {
  for (int n = 0; n < RLIM_NLIMITS; n++) {
    struct rlimit limit;
    getrlimit(n, &limit);
    printf("rlimit-%d %ld %ld\n", n, (long)limit.rlim_cur, (long)limit.rlim_max);
  }
}
/* `probe rings SERIAL`: the session keyring, and whether it is the one with that number. Needs no filter. */
static int rings(const char *theirs) {
  char text[256] = "";
  long serial = syscall(SYS_keyctl, 0, -3, 0);
  syscall(SYS_keyctl, 6, -3, text, sizeof text - 1);
  printf("serial %ld\nown %s\n", serial, serial > 0 && serial != atol(theirs) ? "yes" : "no");
  char *name = strrchr(text, ';');
  if (name) *name = 0;
  printf("keyring %s\n", text);
  return 0;
}
int main(int argc, char **argv) {
  if (argc > 2) return rings(argv[2]);
  nftw("/proc", visit, 16, FTW_PHYS | FTW_ACTIONRETVAL);
  nftw("/sys", visit, 16, FTW_PHYS | FTW_ACTIONRETVAL);
  devices();
  limits();
  /* Calls with arguments that do nothing, one child each: a verdict of EPERM or ENOSYS is the filter's or the
     kernel's, anything else means that it got through. exit, fork and the like are left out. */
  int skip[] = {SYS_exit, SYS_exit_group, SYS_fork, SYS_vfork, SYS_clone, SYS_pause, SYS_rt_sigsuspend,
                SYS_rt_sigreturn,
                SYS_select, SYS_poll, SYS_ppoll, SYS_pselect6, SYS_kill, SYS_tkill, SYS_tgkill, SYS_reboot, SYS_vhangup,
                SYS_sched_yield, SYS_close_range, SYS_munmap, SYS_brk, SYS_sync, SYS_wait4, SYS_waitid, SYS_alarm,
                SYS_setsid, SYS_read, SYS_rt_sigtimedwait, SYS_signalfd, SYS_epoll_wait, SYS_exit, SYS_arch_prctl};
  for (int n = 0; n < 462; n++) {
    int left_out = 0;
    for (unsigned i = 0; i < sizeof skip / sizeof *skip; i++) left_out |= skip[i] == n;
    if (left_out || (n > 334 && n < 424)) continue;
    fflush(stdout);
    int pid = fork();
    if (pid == 0) {
      alarm(2);
      errno = 0;
      long r = syscall(n, -1L, -1L, -1L, -1L, -1L, -1L);
      _exit(r < 0 && errno == EPERM ? 1 : r < 0 && errno == ENOSYS ? 2 : 0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    printf("syscall-%d %s\n", n, WIFEXITED(status) && WEXITSTATUS(status) == 1 ? "EPERM"
           : WIFEXITED(status) && WEXITSTATUS(status) == 2 ? "ENOSYS" : "through");
  }
  return 0;
}
"""
SCRIPT = r"""
grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr ':\t' '  '
for p in /proc/kcore /proc/keys /proc/interrupts /proc/timer_list /proc/latency_stats /proc/sched_debug; do
  [ -e $p ] && echo "size-of-$p $(cat $p 2>/dev/null | wc -c)"; done
for p in /proc/acpi /proc/scsi /proc/asound /sys/firmware /sys/devices/virtual/powercap; do
  [ -e $p ] && echo "entries-of-$p $(ls -A $p 2>/dev/null | wc -l)"; done
for p in /proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward /proc/bus /proc/fs /proc/irq /sys/kernel \
  /sys/fs/cgroup /sys/class /proc/self/attr/exec /dev/null /dev /dev/shm /dev/mqueue; do
  [ -e $p ] && { [ -w $p ] && echo "writable-$p yes" || echo "writable-$p no"; }; done
for m in /proc /proc/sys /proc/bus /proc/irq /proc/fs /sys /sys/fs/cgroup /dev /dev/pts /dev/shm /dev/mqueue; do
  echo "mount-$m $(awk -v m=$m '$2 == m {split($4, o, ","); r = ""; for (i in o)
    if (o[i] ~ /^(ro|rw|nosuid|nodev|noexec)$/) f[o[i]] = 1; n = split("ro rw nosuid nodev noexec", k, " ");
    for (i = 1; i <= n; i++) if (f[k[i]]) r = r k[i] ","; delete f; print $3 ":" r}' /proc/mounts | tail -1)"; done
for d in $(ls /dev | grep -v -E '^(console|core|fd|std)'); do
  echo "device-/dev/$d $(stat -c %A:%t:%T /dev/$d | cut -c1-22)"; done
mknod /tmp/disk b 254 0 && { (: < /tmp/disk) 2>/dev/null && echo "disk open" || echo "disk refused"; }
mknod /tmp/mem c 1 1 && { (: < /tmp/mem) 2>/dev/null && echo "mem open" || echo "mem refused"; }
mknod /tmp/kmsg c 1 11 && { (: < /tmp/kmsg) 2>/dev/null && echo "kmsg open" || echo "kmsg refused"; }
echo "descriptors $(ls /proc/self/fd | grep -v 3 | tr '\n' ' ')"
mkdir /sys/fs/cgroup/x 2>/dev/null && echo "cgroup made" || echo "cgroup refused"
for f in $(ls /sys/fs/cgroup | head -20); do mkdir /sys/fs/cgroup/$f/x 2>/dev/null && echo "cgroup-made $f"; done
rmdir /sys/fs/cgroup/x/x /sys/fs/cgroup/x 2>/dev/null
echo "umask $(umask)"
/probe
"""


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    with own_docker() as found:
        yield found


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("probe")
    for part in (folder, *folder.parents[:-2]):
        part.chmod(0o755)
    (folder / "probe.c").write_text(PROBE)
    subprocess.run([compiler, "-static", "-o", folder / "probe", folder / "probe.c"], check=True)
    return folder / "probe"


@pytest.fixture(scope="module")
def image(shared_engine: Engine, docker: Docker) -> str:
    """Ours, as that daemon calls it."""
    archive = io.BytesIO()
    shared_engine.images.resolve(IMAGE)
    shared_engine.images.save([IMAGE], archive)
    return docker.call("load", data=archive.getvalue()).splitlines()[-1].rpartition(" ")[2]


@pytest.fixture
def lab(engine: Engine) -> Engine:
    if engine.driver.name != "root":
        pytest.skip("Docker runs as root; the driver rootless gives less")
    return engine


def answers(text: str) -> dict[str, str]:
    return {key: " ".join(rest) for key, *rest in (line.split() for line in text.splitlines() if line.strip())}


def compare(mine: dict[str, str], theirs: dict[str, str], known: set[str]) -> None:
    """Where we refuse what that Docker lets through it is no worse; nothing may be the other way round."""
    different = {key: (mine.get(key), theirs.get(key)) for key in mine.keys() | theirs.keys()}
    different = {key: pair for key, pair in different.items() if pair[0] != pair[1]}
    known |= {key for key, (ours, _) in different.items() if ours in ("EPERM", "EROFS", "EACCES", "refused", "no", "0")}
    known |= {key for key, (ours, _) in different.items() if ours is None and key.startswith("write-")}  # not there
    assert {key: pair for key, pair in different.items() if key not in known} == {}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["run", "exec", "user"])
def test_the_sandbox_is_dockers(lab: Engine, docker: Docker, probe: Path, image: str, way: str) -> None:
    bind, script = f"{probe}:/probe:ro", ["sh", "-c", SCRIPT]
    words = ["--rm", "--network", "none", "-v", bind, *(["--user", "1000"] if way == "user" else [])]
    settings: dict[str, Any] = {
        "volumes": [bind],
        "network_mode": "none",
        **({"user": "1000"} if way == "user" else {}),
    }
    if way == "exec":
        container = lab.containers.run(IMAGE, ["sleep", "1000"], detach=True, **settings)
        mine = answers(container.exec_run(script).output.decode())
        docker.call("run", "-d", "--name", "one", *words, image, "sleep", "1000")
        theirs = answers(docker.call("exec", "one", *script))
        docker.call("rm", "-f", "one")
    else:
        mine = answers(lab.containers.run(IMAGE, script, remove=True, **settings).decode())
        theirs = answers(docker.call("run", *words, image, *script))
    assert len(mine) > 1000
    compare(mine, theirs, set(LATER) if docker.version() < (28,) else set())


@pytest.mark.slow
def test_keyrings_are_as_with_docker(lab: Engine, docker: Docker, probe: Path, image: str) -> None:
    """The filter keeps a container from keyrings; without it each has a session keyring of its own."""
    bind, open_ = f"{probe}:/probe:ro", "seccomp=unconfined"
    serial = subprocess.run([probe, "rings", "0"], capture_output=True, text=True, check=True).stdout.split()[1]
    if int(serial) < 0:
        pytest.skip("no keyrings in this kernel, or forbidden here")
    line = ["/probe", "rings", serial]
    settings: dict[str, Any] = {"volumes": [bind], "network_mode": "none", "security_opt": [open_]}
    words = ["run", "--rm", "--network", "none", "-v", bind, "--security-opt", open_, image, *line]
    mine = answers(lab.containers.run(IMAGE, line, remove=True, **settings).decode())
    theirs = answers(docker.call(*words))
    assert mine["own"] == theirs["own"] == "yes"
    # type, owner, group, and who else may do what with it
    (*mine_words, mine_rights), (*their_words, their_rights) = (each["keyring"].split(";") for each in (mine, theirs))
    assert mine_words == their_words == ["keyring", "0", "0"]
    assert int(mine_rights, 16) & ~int(their_rights, 16) == 0
    assert len({mine.pop("serial"), theirs.pop("serial"), serial}) == 3


@pytest.mark.slow
def test_without_root_the_sandbox_is_no_wider(
    docker: Docker, probe: Path, image: str, plain_user: Any, needs: Callable[..., None]
) -> None:
    needs("user namespace")
    bind, script = f"{probe}:/probe:ro", ["sh", "-c", SCRIPT]
    words = ("run", "--rm", "--network", "none", "-v", bind)
    done = plain_user.labkernel(*words, IMAGE, *script)
    mine, theirs = answers(done.stdout), answers(docker.call(*words, image, *script))
    assert len(mine) > 1000, done.stderr
    # A user namespace makes no device node at all, so there is none to be opened.
    nodes = {key for key in mine if key.startswith("mknod-")}
    assert {mine[key] for key in nodes} == {"EPERM"}
    opened = {key for key in theirs if key.startswith("open-/tmp/node-")} | {"disk", "mem", "kmsg"}
    compare(mine, theirs, opened | (LATER if docker.version() < (28,) else set()))
    serial = subprocess.run([probe, "rings", "0"], capture_output=True, text=True, check=True).stdout.split()[1]
    open_ = ("--security-opt", "seccomp=unconfined")
    rings = answers(plain_user.labkernel(*words, *open_, IMAGE, "/probe", "rings", serial).stdout)
    assert int(serial) < 0 or rings["own"] == "yes"
