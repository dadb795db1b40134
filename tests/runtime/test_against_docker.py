"""The same probe in a container of ours and in one of real Docker's: what it may do, see and reach has to be the same.

Needs dockerd (Debian's docker.io), which runs with data, sockets and groups of its own.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dockerd import Docker, own_docker

from labkernel.engine import Engine

IMAGE = "lab/busybox"

# Docker 28's profile, which is ours, lets these through: name_to_handle_at, process_vm_readv and process_vm_writev,
# pkey_mprotect, pkey_alloc and pkey_free, and what the kernel got since (cachestat, fchmodat2, map_shadow_stack,
# futex_*, statmount, listmount). Debian's 20.10 does not know them yet. There the tmpfs around its cgroups is writable.
LATER = {f"syscall-{number}" for number in (303, 310, 311, 329, 330, 331, *range(451, 459))}
LATER |= {"mount-/sys/fs/cgroup", "cgroup-made"}

# Prints one `key value` line for each thing looked at; syscall verdicts are errno names.
PROBE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void) {
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
echo "umask $(umask)"
ulimit -c >/dev/null; echo "pid $$"
/probe
"""


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    with own_docker() as found:
        yield found


def answers(text: str) -> dict[str, str]:
    return {key: " ".join(rest) for key, *rest in (line.split() for line in text.splitlines() if line.strip())}


@pytest.mark.slow
def test_the_sandbox_is_dockers(engine: Engine, docker: Docker, tmp_path: Path) -> None:
    if engine.driver.name != "root":
        pytest.skip("Docker runs as root; the driver rootless gives less")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    for part in (tmp_path, *tmp_path.parents[:-2]):
        part.chmod(0o755)
    (tmp_path / "probe.c").write_text(PROBE)
    subprocess.run([compiler, "-static", "-o", tmp_path / "probe", tmp_path / "probe.c"], check=True)
    bind = f"{tmp_path / 'probe'}:/probe:ro"
    ours = engine.containers.run(IMAGE, ["sh", "-c", SCRIPT], remove=True, volumes=[bind], network_mode="none")
    archive = io.BytesIO()
    engine.images.save([IMAGE], archive)
    name = docker.call("load", data=archive.getvalue()).splitlines()[-1].rpartition(" ")[2]
    words = ("run", "--rm", "--network", "none", "-v", bind, name, "sh", "-c", SCRIPT)
    mine, theirs = answers(ours.decode()), answers(docker.call(*words))
    assert len(mine) > 300
    different = {key: (mine.get(key), theirs.get(key)) for key in mine.keys() | theirs.keys()}
    different = {key: pair for key, pair in different.items() if pair[0] != pair[1]}
    # Where we refuse what that Docker lets through it is no worse; nothing may be the other way round.
    known = {key for key, (ours, theirs) in different.items() if ours in ("EPERM", "refused", "no", "0")}
    if docker.version() < (28,):
        known |= LATER
    assert {key: pair for key, pair in different.items() if key not in known} == {}
