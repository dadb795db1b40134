"""What a container can see and do as root inside, against Docker's documented defaults, tried from inside.

Sources: Docker documentation, "Runtime privilege and Linux capabilities", "Seccomp security profiles for Docker";
runtime-spec config-linux.md; CVE-2019-5736, CVE-2024-21626, CVE-2016-9962 for what other runtimes once let through.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkernel.engine import Engine
from labkernel.errors import ContainerExit, LabkernelError, StartError

IMAGE = "lab/busybox"
DOCKER_CAPABILITIES = 0x00000000A80425FB

# A program of system calls that busybox has no word for: prints NAME errno (0 for success) for each.
PROBE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#define TRY(name, call) tell(name, (long)(call))
static void tell(const char *name, long r) { printf("%s %s\n", name, r < 0 ? strerrorname_np(errno) : "ok"); }
int main(int argc, char **argv) {
  if (argc > 1) { printf("%d %d\n", getuid(), geteuid()); return 0; }
  char zeros[128] = {0};
  TRY("keyctl", syscall(SYS_keyctl, 0, -3, 0));
  TRY("add_key", syscall(SYS_add_key, "user", "x", "y", 1, -2));
  TRY("bpf", syscall(SYS_bpf, 0, zeros, sizeof zeros));
  TRY("mount", mount("none", "/tmp", "tmpfs", 0, ""));
  TRY("umount", umount2("/proc", MNT_DETACH));
  TRY("unshare-user", unshare(CLONE_NEWUSER));
  TRY("unshare-mount", unshare(CLONE_NEWNS));
  TRY("clone-user", syscall(SYS_clone, CLONE_NEWUSER, 0, 0, 0, 0));
  TRY("clone3", syscall(SYS_clone3, zeros, 64));
  TRY("setns", syscall(SYS_setns, open("/proc/self/ns/net", O_RDONLY), 0));
  TRY("perf_event_open", syscall(SYS_perf_event_open, zeros, 0, -1, -1, 0));
  TRY("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, zeros, 0));
  TRY("userfaultfd", syscall(SYS_userfaultfd, 0));
  TRY("io_uring_setup", syscall(SYS_io_uring_setup, 1, zeros));
  TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, 0, 0));
  TRY("init_module", syscall(SYS_init_module, zeros, 1, ""));
  TRY("reboot", syscall(SYS_reboot, 0, 0, 0, 0));
  TRY("swapon", syscall(SYS_swapon, "/x", 0));
  TRY("settimeofday", syscall(SYS_settimeofday, zeros, 0));
  TRY("syslog", syscall(SYS_syslog, 3, zeros, 1));
  TRY("pivot_root", syscall(SYS_pivot_root, "/", "/"));
  TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
  TRY("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
  TRY("move_mount", syscall(SYS_move_mount, 3, "", AT_FDCWD, "/", 4));
  TRY("sethostname", sethostname("x", 1));
  TRY("vsock", syscall(SYS_socket, 40, 1, 0));
  TRY("getpid", getpid());
  return 0;
}
"""
REFUSED = {
    "EPERM": (  # noqa: SIM905
        "keyctl add_key bpf mount umount unshare-user unshare-mount clone-user setns perf_event_open open_by_handle_at "
        "userfaultfd io_uring_setup kexec_load init_module reboot swapon settimeofday syslog pivot_root fsopen "
        "open_tree move_mount sethostname vsock"
    ).split(),
    # so that the C library falls back to clone
    "ENOSYS": ["clone3"],
}


# Stands in for ld.so: keeps /proc/self/exe open, goes on as another program, and says whether it may write there.
LOADER = r"""
static long sys(long n, long a, long b, long c) {
  long r;
  __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return r;
}
void start(long *stack) {
  char **argv = (char **)(stack + 1);
  if (stack[0] > 1 && argv[1][0] == '2') {
    char text[] = "000 errno\n";
    long n = -sys(21, (long)"/proc/self/fd/9", 2, 0); /* access(W_OK) */
    text[2] += n % 10;
    text[1] += n / 10 % 10;
    sys(1, 1, (long)text, sizeof text - 1);
    sys(231, 0, 0, 0);
  }
  sys(33, sys(2, (long)"/proc/self/exe", 0, 0), 9, 0);
  char *args[] = {"/second", "2", 0};
  sys(59, (long)"/second", (long)args, 0);
  sys(231, 1, 0, 0);
}
__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call start\n");
"""


@pytest.fixture
def lab(engine: Engine) -> Engine:
    if engine.driver.name not in ("root", "rootless"):
        pytest.skip(f"about root and rootless; this machine's driver is {engine.driver.name}")
    return engine


def needs_users(lab: Engine) -> None:
    """Skips where root is the only user there is."""
    if lab.driver.id_mapping == "single":
        pytest.skip("one id is mapped: there is no other user")


def own_namespaces(lab: Engine) -> list[str]:
    """Those a container has to itself; the one of control groups begins at its own group, where it has one."""
    spaces = ["pid", "mnt", "net", "uts", "ipc"]
    return [*spaces, "cgroup"] if any(level == "kernel" for level in lab.driver.cgroups.values()) else spaces


@pytest.fixture
def run(lab: Engine) -> Callable[..., str]:
    def run(script: str, image: str = IMAGE, **settings: object) -> str:
        out: bytes = lab.containers.run(image, ["sh", "-c", script], remove=True, stderr=True, **settings)
        return out.decode()

    return run


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text(PROBE)
    subprocess.run([compiler, "-static", "-o", folder / "probe", folder / "probe.c"], check=True)
    return folder / "probe"


def import_image(lab: Engine, name: str, *members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> str:
    """An image of a busybox and these members (a tar as `labkernel import` takes it)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        shell = tarfile.TarInfo("bin/sh")
        shell.mode = 0o755
        busybox = Path("/bin/busybox").read_bytes()
        shell.size = len(busybox)
        tar.addfile(shell, io.BytesIO(busybox))
    out.seek(0)
    lab.images.import_tar(out, repository=name)
    return name


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.SYMTYPE
    info.linkname = target
    return info


def directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    info.mode = 0o755
    return info


@pytest.fixture
def crafted(lab: Engine) -> Iterator[Callable[..., str]]:
    names: list[str] = []

    def make(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> str:
        names.append(import_image(lab, f"lk-test/crafted{len(names)}", *members))
        return names[-1]

    yield make
    for container in lab.containers.list(all=True):
        container.remove(force=True)
    for name in names:
        lab.images.remove(name, force=True)


# -- privileges --------------------------------------------------------------------------------------------------------


def status(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def test_capabilities_are_dockers(lab: Engine, needs: Callable[..., None]) -> None:
    needs("seccomp", "libseccomp")
    # not through a shell, which ignores SIGQUIT
    found = status(lab.containers.run(IMAGE, ["cat", "/proc/self/status"], remove=True).decode())
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(found[name], 16) == DOCKER_CAPABILITIES, name
    for name in ("CapInh", "CapAmb"):
        assert int(found[name], 16) == 0, name
    # docker's default; `--security-opt no-new-privileges` sets it
    assert found["NoNewPrivs"] == "0"
    assert found["Seccomp"] == "2"
    assert found["Seccomp_filters"] == "1"
    assert found["Groups"] in ("", "0")
    # 32 and 33 are the C library's own, which its posix_spawn leaves ignored
    for name in ("SigBlk", "SigIgn", "SigPnd", "ShdPnd"):
        assert int(found[name], 16) & ~(3 << 31) == 0, name


def test_another_user_has_no_capability(lab: Engine, run: Callable[..., str]) -> None:
    needs_users(lab)
    found = status(run("cat /proc/self/status", user="1000:1000"))
    for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert int(found[name], 16) == 0, name
    assert int(found["CapBnd"], 16) == DOCKER_CAPABILITIES
    assert found["Uid"].split() == ["1000"] * 4
    # Its primary group is among them, too, so that no set-group-id program can drop it (CVE-2022-36109).
    assert found["Groups"].split() == ["1000"]


def test_no_new_privileges_on_request(run: Callable[..., str], lab: Engine) -> None:
    found = status(run("cat /proc/self/status", security_opt=["no-new-privileges"]))
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    container = lab.containers.run(IMAGE, ["sleep", "100"], detach=True, security_opt=["no-new-privileges"])
    found = status(container.exec_run(["cat", "/proc/self/status"]).output.decode())
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("options", [{}, {"tty": True}, {"init": True}, {"user": "1000"}])
def test_an_exec_is_as_confined(lab: Engine, options: dict[str, object]) -> None:
    if options.get("user"):
        needs_users(lab)
    container = lab.containers.run(IMAGE, ["sleep", "100"], detach=True, **options)
    first = status(container.exec_run(["cat", "/proc/1/status"], user="0").output.decode())
    second = status(container.exec_run(["cat", "/proc/self/status"]).output.decode())
    for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp", "Uid", "Gid"):
        assert second[name] == first[name], name
    cgroups = container.exec_run(["sh", "-c", "cat /proc/1/cgroup; echo; cat /proc/self/cgroup"]).output.decode()
    one, _, other = cgroups.partition("\n\n")
    assert one.strip() == other.strip()
    # A session of its own: control-C and the hang-up of a terminal are its own, too.
    pid, _, _, _, group, session = container.exec_run(["cat", "/proc/self/stat"]).output.split()[:6]
    assert pid == group == session
    for space in own_namespaces(lab):
        ask = f"readlink /proc/self/ns/{space}"
        seen = {container.exec_run(["sh", "-c", ask]).output, *container.exec_run(["sh", "-c", ask], user="0")[1:]}
        assert len(seen) == 1, space
        assert seen.pop().decode().strip() != os.readlink(f"/proc/self/ns/{space}")


def test_refused_system_calls(run: Callable[..., str], probe: Path, needs: Callable[..., None]) -> None:
    needs("seccomp", "libseccomp")
    answers = dict(line.split() for line in run("/probe", volumes=[f"{probe}:/probe:ro"]).splitlines())
    assert answers.pop("getpid") == "ok"
    wanted = {name: number for number, names in REFUSED.items() for name in names}
    assert answers == wanted


def test_capabilities_are_the_second_fence(run: Callable[..., str], probe: Path) -> None:
    """Without a filter the kernel's own checks refuse what matters most."""
    script = run("/probe", volumes=[f"{probe}:/probe:ro"], security_opt=["seccomp=unconfined"])
    answers = dict(line.split() for line in script.splitlines())
    for name in ("mount", "umount", "reboot", "swapon", "sethostname"):
        assert answers[name] == "EPERM", name


def test_setuid_programs(lab: Engine, run: Callable[..., str], crafted: Callable[..., str], probe: Path) -> None:
    needs_users(lab)
    program = tarfile.TarInfo("probe")
    program.mode = 0o4755
    image = crafted((program, probe.read_bytes()))
    assert run("/probe ids", image, user="1000") == "1000 0\n"
    assert run("/probe ids", image, user="1000", security_opt=["no-new-privileges"]) == "1000 1000\n"


# -- what is visible ---------------------------------------------------------------------------------------------------

MASKED = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/interrupts", "/proc/latency_stats")
EMPTY = ("/proc/acpi", "/proc/scsi", "/proc/asound", "/sys/firmware", "/sys/devices/virtual/powercap")


def test_masked_paths(run: Callable[..., str]) -> None:
    for path in (path for path in MASKED if os.path.exists(path)):
        assert run(f"wc -c < {path}").strip() == "0", path
    for path in (path for path in EMPTY if os.path.isdir(path)):
        assert run(f"ls -A {path}") == "", path
        assert "Read-only file system" in run(f"touch {path}/x 2>&1; true"), path


@pytest.mark.parametrize(
    "script",
    [
        "echo 1 > /proc/sys/kernel/panic",
        "echo x > /proc/sys/kernel/core_pattern",
        "echo 1 > /proc/sys/vm/drop_caches",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "echo h > /proc/sysrq-trigger",
        "echo 1 > /proc/irq/default_smp_affinity",
        "echo x > /sys/kernel/uevent_helper",
        "echo 1 > /sys/kernel/mm/ksm/run",
        "mkdir /sys/fs/cgroup/new || mkdir /sys/fs/cgroup/memory/new",
        "for f in /sys/fs/cgroup/*/cgroup.procs /sys/fs/cgroup/cgroup.procs; do echo 0 > $f && exit 0; done; exit 1",
        "for f in /sys/fs/cgroup/*/release_agent; do echo /x > $f && exit 0; done; exit 1",
        "for f in /sys/fs/cgroup/devices/devices.allow; do echo a > $f && exit 0; done; exit 1",
        "echo -1000 > /proc/self/oom_score_adj",
    ],
)
def test_the_kernels_settings_are_read_only(lab: Engine, script: str) -> None:
    with pytest.raises(ContainerExit):
        lab.containers.run(IMAGE, ["sh", "-c", f"({script}) 2>/dev/null"], remove=True)


def test_mounts_have_dockers_flags(run: Callable[..., str]) -> None:
    found = {line.split()[4]: line.split()[5].split(",") for line in run("cat /proc/self/mountinfo").splitlines()}
    for path, flags in {
        "/proc": "nosuid nodev noexec",
        "/sys": "ro nosuid nodev noexec",
        "/dev": "nosuid",
        "/dev/pts": "nosuid noexec",
        "/dev/shm": "nosuid nodev noexec",
        "/dev/mqueue": "nosuid nodev noexec",
        "/proc/sys": "ro nosuid nodev noexec",
        "/proc/bus": "ro nosuid nodev noexec",
        "/proc/sysrq-trigger": "ro nosuid nodev noexec",
    }.items():
        if path in found or not path.startswith("/proc/") or os.path.exists(path):  # what this kernel does not have
            assert set(flags.split()) <= set(found[path]), path
    for path in (path for path in found if path.startswith("/sys/fs/cgroup")):
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(found[path]), path
    text = run("cat /proc/self/mountinfo")
    assert "shared:" not in text
    assert "master:" not in text


def test_only_three_descriptors(lab: Engine, run: Callable[..., str]) -> None:
    for options in ({}, {"stdin_open": True}):
        rows = [line.split() for line in run("ls -l /proc/1/fd; true", **options).splitlines()[1:]]
        assert [row[-3] for row in rows] == ["0", "1", "2"], options
        assert {row[-1].partition(":")[0] for row in rows} <= {"pipe", "/dev/null"}, options
    # the engine's own init may be counted (by the machine's root), not read: it is a fork of the supervisor
    if lab.driver.name == "root":
        assert run("ls /proc/1/fd", init=True).split()[:3] == ["0", "1", "2"]
    seen = run("cat /proc/1/environ /proc/1/maps /proc/1/mem; ls /proc/1/cwd/; true", init=True)
    assert seen.count("ermission denied") >= 3
    container = lab.containers.run(IMAGE, ["sleep", "100"], detach=True)
    rows = container.exec_run(["sh", "-c", "ls -l /proc/$$/fd; true"]).output.decode().splitlines()[1:]
    assert [row.split()[-3] for row in rows] == ["0", "1", "2"]


def test_limits_hold_for_who_enters(lab: Engine) -> None:
    limits = {"nofile": (64, 128), "core": (0, 0), "fsize": (1 << 20, 1 << 21)}
    words = [{"Name": name, "Soft": soft, "Hard": hard} for name, (soft, hard) in limits.items()]
    script = "for n in n c f; do ulimit -S$n; ulimit -H$n; done; head -c 3000000 /dev/zero > /big; wc -c < /big"
    container = lab.containers.run(IMAGE, ["sleep", "100"], detach=True, ulimits=words, stop_signal="KILL")
    entered = container.exec_run(["sh", "-c", script], stderr=False).output.split()
    assert entered == [b"64", b"128", b"0", b"0", b"2048", b"4096", b"1048576"]
    started = lab.containers.run(IMAGE, ["sh", "-c", f"{script}; true"], ulimits=words, remove=True)
    assert started.split() == entered


def test_what_the_engine_was_started_with_does_not_go_on(fresh_engine: Engine) -> None:
    """Blocked signals, a mask for files, limits raised for itself: none is the container's."""
    if fresh_engine.driver.name not in ("root", "rootless"):
        pytest.skip("about root and rootless")
    code = (
        "import os, signal, sys; from labkernel.engine import Engine\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGHUP, signal.SIG_IGN); os.umask(0)\n"
        "lab = Engine.open(sys.argv[1], runtime_dir=sys.argv[2]); lab.images.resolve('lab/busybox')\n"
        "line = ['sh', '-c', 'cat /proc/1/status; umask']\n"
        "one = lab.containers.run('lab/busybox', ['sleep', '1000'], detach=True, network_mode='none')\n"
        "sys.stdout.buffer.write(one.exec_run(line).output + one.exec_run(['cat', '/proc/self/status']).output)\n"
        "one.remove(force=True); lab.close()"
    )
    layout = fresh_engine.layout
    line = [sys.executable, "-c", code, str(layout.root), str(layout.runtime_dir)]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    sets = [row.split() for row in done.stdout.splitlines() if row.startswith(("SigBlk", "SigIgn"))]
    assert [name for name, _ in sets] == ["SigBlk:", "SigIgn:"] * 2
    assert all(int(value, 16) & ~(3 << 31) == 0 for _, value in sets), done.stdout
    assert "\n0022\n" in done.stdout


def test_no_environment_of_the_host(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LK_TEST_SECRET", "leaked")
    names = {line.partition("=")[0] for line in run("cat /proc/1/environ | tr '\\0' '\\n'").splitlines()}
    assert names == {"PATH", "HOSTNAME", "HOME"}
    assert "leaked" not in run("cat /proc/*/environ")


@pytest.mark.parametrize("init", [False, True])
def test_the_hosts_processes_are_invisible(run: Callable[..., str], init: bool) -> None:
    script = "for p in /proc/[0-9]*; do echo ${p#/proc/}; done"
    pids = [int(word) for word in run(script, init=init).split()]
    assert max(pids) < 20
    assert len(pids) <= 3
    assert "labkernel" not in run("cat /proc/*/cmdline", init=init).replace("labkernel-init", "")
    with pytest.raises(ContainerExit):
        run(f"kill -0 {os.getpid()} 2>/dev/null")


def test_names_are_its_own(lab: Engine, run: Callable[..., str]) -> None:
    assert run("hostname", hostname="inside").strip() == "inside"
    assert os.uname().nodename != "inside"
    for space in own_namespaces(lab):
        assert run(f"readlink /proc/self/ns/{space}").strip() != os.readlink(f"/proc/self/ns/{space}"), space
    assert set(run("ls /sys/class/net", network_mode="none").split()) == {"lo"}
    assert not [name for name in run("ls /sys/class/net").split() if name not in ("lo", "eth0")]
    if "cgroup" in own_namespaces(lab):
        assert all(line.endswith(":/") for line in run("cat /proc/self/cgroup").split() if not line.startswith("0::"))


def test_dev_holds_what_docker_puts_there(lab: Engine, run: Callable[..., str]) -> None:
    wanted = "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero".split()  # noqa: SIM905
    assert run("ls /dev").split() == wanted
    kinds = run("stat -c '%n %t:%T %a %u:%g' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty")
    # A user namespace makes no nodes: there they are the machine's own, whose root is nobody inside.
    owner = "0:0" if lab.driver.name == "root" else "65534:65534"
    assert kinds.splitlines() == [
        f"/dev/{name} {numbers} 666 {owner}"
        for name, numbers in (
            ("null", "1:3"),
            ("zero", "1:5"),
            ("full", "1:7"),
            ("random", "1:8"),
            ("urandom", "1:9"),
            ("tty", "5:0"),
        )
    ]


def test_devices_of_the_machine(run: Callable[..., str], needs: Callable[..., None]) -> None:
    needs("cgroup devices")
    numbers = {line.split()[3]: line.split()[:2] for line in _partitions()}
    assert numbers, "a machine without disks"
    for major, minor in numbers.values():
        script = f"mknod /dev/d b {major} {minor} && for m in '<' '>'; do eval \"true $m /dev/d\" && echo opened; done"
        seen = run(f"({script}) 2>&1; true")
        assert "opened" not in seen
        assert "Operation not permitted" in seen
    # memory, ports, kernel messages, tun, fuse, kvm
    for major, minor in ((1, 1), (1, 2), (1, 4), (1, 11), (10, 200), (10, 229), (10, 232)):
        assert "opened" not in run(f"(mknod /dev/x c {major} {minor} && true < /dev/x && echo opened) 2>&1; true")


def _partitions() -> list[str]:
    return [line for line in Path("/proc/partitions").read_text().splitlines()[2:] if line.split()]


def test_an_images_device_node_is_no_way_out(run: Callable[..., str], crafted: Callable[..., str]) -> None:
    node = tarfile.TarInfo("disk")
    node.type = tarfile.BLKTYPE
    node.mode = 0o666
    major, minor = map(int, _partitions()[0].split()[:2])
    node.devmajor, node.devminor = major, minor
    # What may make no nodes unpacks an empty file.
    assert "opened" not in run("([ ! -f /disk ] && true < /disk && echo opened) 2>&1; true", crafted(node))


# -- ways out that images and arguments try ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3, 12))
def test_a_working_directory_through_a_descriptor(lab: Engine, crafted: Callable[..., str], number: int) -> None:
    """CVE-2024-21626: WORKDIR as (or as a link to) a descriptor of the host's file system."""
    image = crafted(link("out", f"/proc/self/fd/{number}"))
    for path in ("/out", f"/proc/self/fd/{number}", f"/proc/self/fd/{number}/../../.."):
        try:
            seen = lab.containers.run(image, ["/bin/sh", "-c", "pwd -P; ls /proc/1"], working_dir=path, remove=True)
        except LabkernelError:
            continue
        assert seen.startswith(b"/"), seen
    container = lab.containers.run(image, ["/bin/sh", "-c", "sleep 100"], detach=True)
    with pytest.raises(StartError, match=r"(?i)no such file|not a directory"):
        container.exec_run(["/bin/sh", "-c", "pwd -P"], workdir=f"/proc/self/fd/{number}")


@pytest.mark.parametrize("name", ["proc", "sys", "dev", "etc"])
@pytest.mark.parametrize("target", ["/x", "../../../../../../../tmp", "/proc/1/root/tmp"])
def test_links_where_mounts_go(lab: Engine, crafted: Callable[..., str], name: str, target: str) -> None:
    """An image whose /proc (…) is a link: the mount goes to a place inside the image, or the start fails."""
    image = crafted(link(name, target))
    before = Path("/proc/self/mountinfo").read_text().splitlines()
    listing = sorted(os.listdir("/tmp"))
    try:
        text = lab.containers.run(image, ["/bin/sh", "-c", "true; echo > /proc/sys/kernel/panic"], remove=True)
        pytest.fail(f"/proc/sys could be written: {text!r}")
    except LabkernelError:
        pass
    new = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line not in before]
    known = {line.split()[4] for line in before}  # what somebody else mounts meanwhile is at a place of its own
    assert not [line for line in new if line.split()[4] in known or str(lab.layout.root) in line]
    assert not {name for name in os.listdir("/tmp") if name in ("hostname", "hosts", "resolv.conf", "pts")} - set(
        listing
    )


def test_a_volumes_target_through_a_link(lab: Engine, crafted: Callable[..., str], tmp_path: Path) -> None:
    image = crafted(link("out", str(tmp_path)), link("up", "../../../../.." + str(tmp_path)), directory("d"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_text("from the volume\n")
    for target in ("/out/in", "/up/in", "/d/../../../../in"):
        script, volume = f"read l < {target}/file; echo $l", f"{tmp_path}/source:{target}"
        try:
            seen = lab.containers.run(image, ["/bin/sh", "-c", script], volumes=[volume], remove=True)
            assert seen == b"from the volume\n", target
        except StartError:
            assert target != "/d/../../../../in"  # a link that leads nowhere inside the image may be refused
        assert sorted(os.listdir(tmp_path)) == ["source"], target


def test_the_interpreter_that_sets_up_is_out_of_reach(
    lab: Engine, crafted: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """CVE-2019-5736: a command `/proc/self/exe` (or `#!/proc/self/exe`) runs the engine's own program with the
    image's loader, which could then open it for writing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    loader = Path(os.path.realpath("/lib64/ld-linux-x86-64.so.2"))
    if compiler is None or not loader.exists():
        pytest.skip("needs a C compiler and x86_64's loader")
    folder = tmp_path_factory.mktemp("loader")
    (folder / "evil.c").write_text(LOADER)
    line = [compiler, "-O1", "-nostdlib", "-static-pie", "-fPIE", "-fno-stack-protector"]
    subprocess.run([*line, "-o", folder / "evil", folder / "evil.c"], check=True)
    data = (folder / "evil").read_bytes()
    programs = []
    for name in ("lib64/ld-linux-x86-64.so.2", "second"):
        info = tarfile.TarInfo(name)
        info.mode = 0o755
        programs.append((info, data))
    script = tarfile.TarInfo("script")
    script.mode = 0o755
    image = crafted(*programs, (script, b"#!/proc/self/exe\n"))
    for command in ("/proc/self/exe", "/script"):
        seen = lab.containers.run(image, [command], remove=True)
        # without root the file is somebody else's, or what runs is a sealed copy
        refusals = (errno.EROFS,) if lab.driver.name == "root" else (errno.EROFS, errno.EACCES, errno.EPERM)
        assert int(seen.split()[0]) in refusals, command


def test_the_supervisor_is_out_of_reach_of_a_bound_proc(lab: Engine) -> None:
    """Nothing of the store lies in a container: no socket, no state, no other container's files."""
    text = lab.containers.run(IMAGE, ["sh", "-c", "cat /proc/self/mountinfo; cat /proc/net/unix"], remove=True).decode()
    sources = [line.split()[3] for line in text.splitlines() if len(line.split()) > 6 and " - " in line]
    store = str(lab.layout.root)
    named = [path for path in sources if store in path]
    assert all(path.rpartition("/")[2] in ("hostname", "hosts", "resolv.conf") for path in named), named
    assert "supervisor" not in text


def test_a_memory_hog_does_not_take_its_supervisor(lab: Engine, needs: Callable[..., None]) -> None:
    needs("cgroup memory")
    before = lab.runtime.ensure().pid
    with pytest.raises(ContainerExit):
        lab.containers.run(IMAGE, ["sh", "-c", "exec tail /dev/zero"], mem_limit="16m", remove=True)
    assert lab.runtime.ensure().pid == before


def test_a_fork_bomb_stays_inside(lab: Engine, needs: Callable[..., None]) -> None:
    needs("cgroup pids")
    container = lab.containers.run(
        IMAGE, ["sh", "-c", "b() { b | b & }; b & exec sleep 100"], detach=True, pids_limit=30, auto_remove=False
    )
    assert container.stats()["pids_stats"]["current"] <= 30
    container.kill()
    assert container.wait()["StatusCode"] == 137


def test_files_of_the_store_are_closed_to_others(lab: Engine) -> None:
    for path in (lab.layout.root, lab.layout.runtime_dir, lab.layout.socket):
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0, path
