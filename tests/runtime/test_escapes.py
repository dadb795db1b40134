"""A test for each known class of escape that test_safety.py does not have, tried with this engine's own verbs."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import LabkernelError, StartError
from labkernel.imaging.provision import needs_no_mknod
from labkernel.linux import mounts
from labkernel.runtime.spec import without_mknod

IMAGE = "lab/busybox"


@pytest.fixture
def lab(engine: Engine) -> Engine:
    if engine.driver.name not in ("root", "rootless"):
        pytest.skip(f"about root and rootless; this machine's driver is {engine.driver.name}")
    return engine


@pytest.fixture
def crafted(lab: Engine) -> Iterator[Callable[..., str]]:
    """Images of a busybox and links: `crafted(proc="/etc")`; a value of None is a directory."""
    names: list[str] = []

    def make(**links: str | None) -> str:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, target in links.items():
                info = tarfile.TarInfo(name)
                info.type, info.linkname = (tarfile.DIRTYPE, "") if target is None else (tarfile.SYMTYPE, target)
                info.mode = 0o755
                tar.addfile(info)
            shell = tarfile.TarInfo("bin/sh")
            shell.mode = 0o755
            data = Path("/bin/busybox").read_bytes()
            shell.size = len(data)
            tar.addfile(shell, io.BytesIO(data))
        out.seek(0)
        names.append(f"lk-test/escape{len(names)}")
        lab.images.import_tar(out, repository=names[-1])
        return names[-1]

    yield make
    for container in lab.containers.list(all=True):
        container.remove(force=True)
    for name in names:
        lab.images.remove(name, force=True)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that containers may bind."""
    base = Path(tempfile.mkdtemp(prefix="lk-e-", dir="/tmp"))
    base.chmod(0o755)
    yield base
    shutil.rmtree(base)


def run(lab: Engine, script: str, image: str = IMAGE, **settings: object) -> str:
    out: bytes = lab.containers.run(image, ["/bin/sh", "-c", script], remove=True, stderr=True, **settings)
    return out.decode()


# -- mounts ------------------------------------------------------------------------------------------------------------


def test_a_mounts_target_is_exchanged_while_it_is_mounted(lab: Engine, shared: Path) -> None:
    """CVE-2021-30465: a second container mounts below a volume in which the first exchanges a directory and a link
    to the host's root."""
    (shared / "source").mkdir()
    (shared / "source" / "mark").write_text("mounted\n")
    volume = shared / "volume"
    (volume / "a").mkdir(parents=True)
    (volume / "link").symlink_to("/../../../../../../tmp")
    stop = threading.Event()

    def exchange() -> None:
        import ctypes

        libc = ctypes.CDLL(None)
        a, b = os.fsencode(volume / "a"), os.fsencode(volume / "link")
        while not stop.is_set():
            libc.renameat2(-100, a, -100, b, 2)  # RENAME_EXCHANGE

    before = set(os.listdir("/tmp"))
    racer = threading.Thread(target=exchange)
    racer.start()
    try:
        for _ in range(10):
            binds = [f"{volume}:/v", f"{shared / 'source'}:/v/a/inner"]
            try:
                text = run(
                    lab, "cat /v/a/inner/mark /tmp/inner/mark 2>/dev/null; cat /proc/self/mountinfo", volumes=binds
                )
            except LabkernelError:
                continue  # a start that is refused is fine
            assert not any(line.split()[4].startswith("/..") for line in text.splitlines() if " - " in line)
    finally:
        stop.set()
        racer.join()
    made = {name for name in set(os.listdir("/tmp")) - before if name == "inner"}
    assert not made, "a mount point was made on the host"
    assert str(shared / "source") not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
def test_an_image_whose_proc_is_a_link(lab: Engine, crafted: Callable[..., str], name: str) -> None:
    """CVE-2019-19921: then the kernel's file systems, and what hides parts of them, would go elsewhere."""
    image = crafted(**{name: "/elsewhere", "elsewhere": None})
    try:
        text = run(lab, "cat /proc/self/mountinfo", image)
    except StartError:
        return
    places = {line.split()[4]: line.split(" - ")[1].split()[0] for line in text.splitlines()}
    assert places.get("/proc") == "proc" or places.get("/elsewhere") == "proc", places
    assert any(place.endswith(("/proc/sys", "/elsewhere/sys")) for place in places)


@pytest.mark.parametrize("place", ["/proc", "/proc/self", "/sys", "/dev/pts/../../proc"])
def test_a_volume_over_proc(lab: Engine, place: str) -> None:
    """CVE-2019-16884: a volume at /proc would make the confinement's own writes go nowhere. Either it is refused, or
    the process is confined all the same."""
    try:
        text = run(lab, "grep -s -E '^(CapEff|Seccomp):' /proc/self/status; true", volumes=[f"over:{place}"])
    except LabkernelError:
        text = ""
    finally:
        for volume in lab.volumes.list():
            if volume.name == "over":
                volume.remove(force=True)
    if "CapEff" in text:
        assert "00000000a80425fb" in text
        assert "Seccomp:\t2" in text


def test_nothing_is_made_outside_of_a_volume(lab: Engine, crafted: Callable[..., str], shared: Path) -> None:
    """CVE-2024-45310: mount points are made in the image's own tree, never through its links."""
    victim = shared / "victim"
    victim.mkdir()
    image = crafted(data=str(victim), out="/../../../../../../" + str(victim))
    (shared / "source").mkdir()
    for target in ("/data/made", "/out/made", f"{victim}/made"):
        try:
            run(lab, "true", image, volumes=[f"{shared / 'source'}:{target}"])
        except LabkernelError:
            continue
    assert os.listdir(victim) == []


@pytest.mark.parametrize("place", ["data", "etc/hosts", "etc/resolv.conf", "etc/hostname"])
def test_no_file_is_made_through_a_link_that_leads_nowhere(
    lab: Engine, crafted: Callable[..., str], shared: Path, place: str
) -> None:
    """CVE-2024-45310 for files: a link whose target is missing on the machine, where a mount point is to be made."""
    victim = shared / "victim"
    victim.mkdir(mode=0o777)
    victim.chmod(0o777)
    (shared / "source").write_text("mounted\n")
    for target in (f"{victim}/made", f"../../../../../..{victim}/made"):
        image = crafted(**{place: target})
        try:
            run(lab, "true", image, volumes=[f"{shared / 'source'}:/{place}"] if place == "data" else [])
        except LabkernelError:
            continue
    assert os.listdir(victim) == []


SHARING = r"""
import os, shutil, subprocess, sys
from labkernel.engine import Engine
base = sys.argv[1]

def mounts(pid="self"):
    with open(f"/proc/{pid}/mountinfo") as file:
        return {(line.split()[0], line.split()[4]) for line in file}

def places(pid):
    return {place for _, place in mounts(pid)}

def told(what):
    # somebody else's dockerd may share its mounts with this namespace
    known = {place for _, place in before}
    seen = {(id, place) for id, place in mounts() - before if place.startswith(base) or place in known}
    assert not seen, f"{what} is mounted outside: {seen}"

for name in ("data", "data/inner", "tree/bin"):
    os.makedirs(f"{base}/{name}")
for name in ("sh", "sleep"):
    shutil.copy("/bin/busybox", f"{base}/tree/bin/{name}")
lab = Engine.open(f"{base}/root", runtime_dir=f"{base}/run")
before = mounts()
try:
    settings = dict(detach=True, network_mode="none", stop_signal="KILL")
    shares = dict(volumes=[f"{base}/data:/data"], ipc_mode="shareable")
    one = lab.containers.run("lab/busybox", ["sleep", "1000"], **shares, **settings)
    told("a container")
    asked = dict(cap_add=["SYS_ADMIN"], security_opt=["apparmor=unconfined"], **settings)
    slave = lab.containers.run("lab/busybox", ["sleep", "1000"], volumes=[f"{base}/data:/data:rslave"], **asked)
    equal = lab.containers.run("lab/busybox", ["sleep", "1000"], volumes=[f"{base}/data:/data:rshared"], **asked)
    told("containers that share on request")
    for container, out in ((slave, False), (equal, True)):
        assert container.exec_run(["sh", "-c", "mkdir /data/out && mount -t tmpfs own /data/out"]).exit_code == 0
        assert (f"{base}/data/out" in places("self")) == out, "rslave gives out, or rshared does not"
        assert container.exec_run(["sh", "-c", "umount /data/out && rmdir /data/out"]).exit_code == 0
    two = lab.containers.run("lab/busybox", ["sleep", "1000"], ipc_mode=f"container:{one.id}", **settings)
    told("the shared memory of two containers")
    three = lab.containers.create(f"{base}/tree", ["sleep", "1000"], network_mode="none")
    three.start()
    told("a container of a directory")
    still = lab.containers.create("lab/busybox", ["true"], volumes=[f"{base}/data:/data"])
    chunks, _ = still.get_archive("/bin")  # more than a pipe holds, so that it is mounted when the first bytes are here
    assert next(chunks)
    told("a stopped container")
    assert b"".join(chunks)
    lab.builds.build("FROM lab/busybox\nRUN true")
    told("a step of a build")
    subprocess.run(["mount", "-t", "tmpfs", "late", f"{base}/data/inner"], check=True)
    try:
        assert "/data/inner" not in places(one.pid), "what is mounted later comes in"
        assert all("/data/inner" in places(other.pid) for other in (slave, equal)), "what is mounted later stays out"
        where = f"{base}/tree/bin"
        subprocess.run(["mount", "-t", "tmpfs", "late", where], check=True)
        try:
            assert "/bin" not in places(three.pid), "what is mounted later comes in"
        finally:
            subprocess.run(["umount", where], check=True)
    finally:
        subprocess.run(["umount", f"{base}/data/inner"], check=True)
finally:
    for container in lab.containers.list(all=True):
        container.remove(force=True)
    lab.runtime.shutdown(force=True)
    lab.close()
print("nothing")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a user namespace gets nothing back to the machine's mounts anyway")
def test_mounts_of_containers_stay_in_them() -> None:
    """Where the machine's mounts are shared (systemd makes them so) a mount in a new namespace would appear outside,
    and one outside would appear in the containers. Volumes with `rslave` let them in, those with `rshared` out, too."""
    base = Path(tempfile.mkdtemp(prefix="lk-e-", dir="/tmp"))
    line = ["unshare", "--mount", "--propagation", "shared", sys.executable, "-c", SHARING, str(base)]
    try:
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout == "nothing\n", done.stderr
    finally:
        shutil.rmtree(base, ignore_errors=True)


# -- the kernel's files ------------------------------------------------------------------------------------------------


def test_release_agent(lab: Engine) -> None:
    """CVE-2022-0492: a control group's release_agent is a program the kernel runs as the machine's root."""
    text = run(
        lab,
        "mkdir -p /tmp/c; mount -t cgroup -o rdma c /tmp/c; unshare -UrmC mount -t cgroup -o rdma c /tmp/c;"
        "for f in $(find /sys/fs/cgroup -name release_agent); do echo '#!/bin/sh' > $f && echo WRITTEN; done;"
        "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/x && echo MADE; done; true",
    )
    assert "WRITTEN" not in text
    assert "MADE" not in text


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a sysfs")
@pytest.mark.parametrize("why", [errno.ENOSYS, errno.EPERM])
def test_control_groups_are_closed_one_by_one(tmp_path: Path, why: int) -> None:
    """CVE-2022-0492 where a kernel before 5.12, or a filter around the engine, has no mount_setattr."""
    code = (
        "from labkernel.linux import mounts, syscalls; from labkernel.runtime import rootfs\n"
        "syscalls.unshare(syscalls.CLONE_NEWNS); mounts.make_private('/')\n"
        f"def refused(*_, **__): raise OSError({why}, 'refused')\n"
        "rootfs.mount_setattr = refused\n"
        "groups = [line['target'] for line in mounts.read_mountinfo() if line['fstype'] in ('cgroup', 'cgroup2')]\n"
        "if '/sys/fs/cgroup' in groups: groups = {'': '/sys/fs/cgroup'}\n"
        "else: groups = {path: path for path in groups}\n"
        f"where = {str(tmp_path)!r}; rootfs._prepare_sys(where, groups)\n"
        "for line in mounts.read_mountinfo():\n"
        " if line['target'].startswith(where): print(line['fstype'], line['options'])\n"
    )
    lines = [line.split() for line in told_by(code).splitlines()]
    assert len(lines) > 1, "no control groups are mounted here"
    for kind, options in lines:
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.split(",")), kind


def test_a_masked_path_is_exchanged(lab: Engine, crafted: Callable[..., str]) -> None:
    """CVE-2025-31133: what hides a path is /dev/null, opened by name in the container's own /dev, where an image may
    have put a link; here it is the machine's null device."""
    image = crafted(**{"dev": None, "dev/null": "/proc/sys/kernel/core_pattern"})
    script = "cat /proc/interrupts | wc -c; ls -l /dev/null; echo x > /proc/sys/kernel/core_pattern; true"
    text = run(lab, script, image)
    assert text.startswith("0\n")
    assert " 1,   3 " in text
    assert "Read-only file system" in text


def test_the_console_is_exchanged(lab: Engine, crafted: Callable[..., str]) -> None:
    """CVE-2025-52565: the terminal is bound at /dev/console before masking; a link there must not lead it elsewhere."""
    image = crafted(**{"dev": None, "dev/console": "/proc/sysrq-trigger", "dev/pts": "/proc"})
    text = run(lab, "cat /proc/self/mountinfo; ls -l /dev/console", image, tty=True)
    console = [line for line in text.splitlines() if " - devpts" in line]
    assert {line.split()[4] for line in console} <= {"/dev/pts", "/dev/console"}
    assert "sysrq" not in next(line for line in text.splitlines() if "console" in line and " - " not in line)


def test_labels_are_written_to_proc_itself(lab: Engine, shared: Path) -> None:
    """CVE-2025-52881: writes meant for /proc/self/attr or /proc/sys went where a volume or link led them."""
    (shared / "attr").mkdir()
    text = run(
        lab,
        "cat /proc/sys/net/core/somaxconn",
        volumes=[f"{shared / 'attr'}:/proc-attr"],
        sysctls={"net.core.somaxconn": "77"},
    )
    assert text == "77\n"
    with pytest.raises(LabkernelError):
        lab.containers.create(IMAGE, ["true"], sysctls={"net.core/../../kernel.core_pattern": "|/x"})


# -- other ways ----------------------------------------------------------------------------------------------------


def test_abstract_sockets(lab: Engine) -> None:
    """CVE-2020-15257: a runtime's socket in the abstract name space is reached by who shares the host's network."""
    text = run(lab, "cat /proc/net/unix", network_mode="host")
    assert not [line for line in text.splitlines() if "@" in line.rpartition(" ")[2] and "labkernel" in line]


@pytest.mark.parametrize("user", ["0", "1000"])
def test_inheritable_capabilities(lab: Engine, user: str) -> None:
    """CVE-2022-24769: with them a program file with inheritable capabilities gives a user more than it should have."""
    if user != "0" and lab.driver.id_mapping == "single":
        pytest.skip("one id is mapped: there is no other user")
    container = lab.containers.run(IMAGE, ["sleep", "1000"], detach=True, user=user)
    for text in (
        container.exec_run(["grep", "CapInh", "/proc/self/status"]).output,
        container.exec_run(["grep", "CapInh", "/proc/1/status"]).output,
        container.exec_run(["grep", "CapAmb", "/proc/self/status"]).output,
    ):
        assert int(text.split()[1], 16) == 0


def test_cp_loads_nothing_of_the_container(lab: Engine) -> None:
    """CVE-2019-14271: a helper that has entered the container's root loads its libraries. Ours is loaded before; what
    the container puts where libraries are looked for is never opened."""
    container = lab.containers.run(IMAGE, ["sleep", "1000"], detach=True)
    script = "mkdir -p /lib/x86_64-linux-gnu /lib64; for n in libnss_files.so.2 libc.so.6 libnss_compat.so.2; do"
    script += " echo junk > /lib/x86_64-linux-gnu/$n; echo junk > /lib64/$n; done; echo hi > /f; touch -a -d @1 /lib*/*"
    container.exec_run(["sh", "-c", script])
    chunks, _ = container.get_archive("/f")
    assert b"hi" in b"".join(chunks)
    container.put_archive("/", tar_of("g", b"there"))
    assert container.exec_run(["cat", "/g"]).output == b"there"


def tar_of(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_init_is_out_of_reach_of_a_tracer(lab: Engine) -> None:
    """--init is a process of the engine's own interpreter in the container; one with SYS_PTRACE may look into it."""
    script = (
        "sleep 0.1; (: >> /proc/1/exe) 2>&1; ls /proc/1/fd | tr '\\n' ' '; echo;"
        "tr '\\0' '\\n' < /proc/1/environ | cut -d= -f1 | sort | tr '\\n' ' '; echo; readlink /proc/1/cwd /proc/1/root;"
        "ls /proc/1/root; true"
    )
    text = run(lab, script, init=True, cap_add=["SYS_PTRACE"], environment={"OWN": "1"})
    if lab.driver.name != "root":
        # SYS_PTRACE of a user namespace does not reach a process whose memory belongs to the one outside
        assert text.count("ermission denied") >= 4
        assert not {"LABKERNEL_ROOT", "VIRTUAL_ENV", "PYTHONPATH"} & set(text.split())
        return
    refused, fds, names, *rest = text.splitlines()
    assert "Read-only file system" in refused or "Permission denied" in refused or "Text file busy" in refused
    assert set(fds.split()) <= {"0", "1", "2"} or "Permission" in fds
    assert not {"LABKERNEL_ROOT", "VIRTUAL_ENV", "PYTHONPATH"} & set(names.split())
    assert "work" not in rest


def test_who_enters_a_container_is_out_of_its_reach(lab: Engine) -> None:
    """CVE-2019-5736, CVE-2024-21626: an exec begins as a process of the engine with descriptors of the machine; what
    runs inside and waits for it may see that it is there and must not open anything of it."""
    watch = (
        "echo ready; while :; do for p in /proc/[0-9]*; do"
        " case $(readlink $p/exe) in *python*) echo EXE $p;; esac;"
        " for f in $p/fd/*; do case $(readlink $f) in /bin/*|/usr/bin/*|/dev/null|pipe:*|/proc/*|'') ;;"
        " *) echo FD $p $(readlink $f);; esac; done; done; done 2>/dev/null"
    )
    container = lab.containers.run(IMAGE, ["sh", "-c", watch], detach=True, network_mode="none")
    lines = container.logs(stream=True)
    assert next(lines) == b"ready\n"
    for _ in range(100):
        assert container.exec_run(["true"]).exit_code == 0
    container.kill()
    assert b"".join(lines) == b""


SETUPS = {
    "first process": "init._prepare = tell; init.main(theirs, {})",
    "first process, proot": "proot.protocol.receive = tell; proot.main(theirs, {})",
    "exec": "entering._enter = tell; entering._main(theirs, syscalls.SharedNumber(), {}, [])",
    # What a kernel with fs.suid_dumpable=1 does when the ids change (man 5 proc_sys_fs).
    "new identity": (
        "init.set_privileges = lambda *_, **__: syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)\n"
        "init.replace_program = tell; init.execute(theirs, {'args': []}, {}, None, cwd_create=False)"
    ),
}


def told_by(code: str) -> str:
    """What a process of its own says on stdout. It has to end well."""
    line = [sys.executable, "-c", code]
    return subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("way", SETUPS)
def test_who_sets_up_a_container_is_not_dumpable(way: str) -> None:
    """CVE-2019-5736, CVE-2016-9962: else a process of the container, with which it shares the ids and perhaps the pid
    namespace, could open its files in /proc."""
    code = (
        "import os, socket; from labkernel.linux import syscalls; from labkernel.runtime import entering, init, proot\n"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "def tell(*_): os.write(1, b'%d' % syscalls.prctl(3)); os._exit(0)  # PR_GET_DUMPABLE\n"
    )
    assert told_by(code + SETUPS[way]) == "0"


def test_what_enters_keeps_no_descriptor() -> None:
    """CVE-2024-21626, the second fence: what may be left open on the way in is closed before the command's process is
    made, also where it would survive an exec."""
    code = (
        "import os, socket; from labkernel.linux import syscalls; from labkernel.runtime import entering\n"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "def leave_open(*_): os.set_inheritable(os.open('/', os.O_RDONLY), True)\n"
        "def tell(*_): os.write(1, ','.join(os.listdir('/proc/self/fd')).encode()); os._exit(0)\n"
        "entering._enter, entering._become = leave_open, tell; entering._main(theirs, syscalls.SharedNumber(), {}, [])"
    )
    assert told_by(code) == "0,1,2,3,4"  # 3 is the way back, 4 the listing itself


def test_files_are_made_with_the_usual_mask(lab: Engine) -> None:
    """What sets up works without a mask; files that the command makes must not be everybody's."""
    assert run(lab, "umask") == "0022\n"
    container = lab.containers.run(IMAGE, ["sleep", "100"], detach=True, network_mode="none", stop_signal="KILL")
    assert container.exec_run(["sh", "-c", "umask"]).output == b"0022\n"
    container.remove(force=True)


def test_what_is_mounted_below_a_read_only_bind_is_read_only(lab: Engine) -> None:
    """As with docker since 25: else `-v /:/host:ro` gives write access to every other disk."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is no mount here")
    made = Path("/dev/shm/lk-escape")
    text = run(lab, f"touch /host/shm/{made.name}; grep ' /host[/ ]' /proc/self/mountinfo", volumes=["/dev:/host:ro"])
    escaped = made.exists()
    made.unlink(missing_ok=True)
    assert not escaped
    options = [line.split()[5].split(",") for line in text.splitlines() if " - " in line]
    assert len(options) > 1
    assert all("ro" in words for words in options)


@pytest.mark.skipif(os.geteuid() != 0, reason="init gives up capabilities in this process's own namespace")
def test_a_container_has_a_session_keyring_of_its_own() -> None:
    """A keyring belongs to no namespace: keys of who started the engine must not be at hand inside."""
    code = (
        "import ctypes, os, platform; from labkernel.runtime import init\n"
        "libc = ctypes.CDLL(None, use_errno=True); keyctl = {'x86_64': 250, 'aarch64': 219}[platform.machine()]\n"
        "def ring(): return libc.syscall(keyctl, 0, -3, 1)  # KEYCTL_GET_KEYRING_ID of the session, made when missing\n"
        "before = ring()\n"
        "def tell(*_): os.write(1, b'none' if before < 0 else b'same' if ring() == before else b'own'); os._exit(0)\n"
        "init.replace_program = tell; init.execute(None, {'args': []}, {}, None, cwd_create=False)"
    )
    told = told_by(code)
    if told == "none":
        pytest.skip("no keyrings in this kernel, or forbidden here")
    assert told == "own"


def test_a_working_directory_outside_is_the_end(tmp_path: Path) -> None:
    """CVE-2024-21626, the second fence: should a descriptor of the machine ever be left, it does not become the
    working directory."""
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    code = (
        "import os; from labkernel.runtime import init\n"
        "fd = os.open('/', os.O_PATH | os.O_DIRECTORY)\n"
        f"os.chroot({str(tmp_path)!r}); os.fchdir(fd)\n"
        "try: init._change_directory('.', create=False)\n"
        "except (OSError, init.SetupError): print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "refused\n"


def test_a_program_that_is_the_users_own_is_copied(tmp_path: Path) -> None:
    """CVE-2019-5736 where root in the container owns the interpreter, and where the kernel has no open_tree."""
    program = tmp_path / "program"
    program.write_bytes(b"#!/bin/true\n")
    fd = mounts._sealed_copy(str(program))
    try:
        with pytest.raises(OSError) as caught:
            os.write(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY), b"x")
        assert caught.value.errno == errno.EPERM
        with pytest.raises(OSError) as caught:
            os.ftruncate(fd, 0)
        assert caught.value.errno == errno.EPERM
    finally:
        os.close(fd)


def test_a_supervisor_of_a_copy(fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if fresh_engine.driver.name != "root":
        pytest.skip("about the driver root")
    monkeypatch.setattr(mounts, "open_read_only", lambda path: None)
    assert fresh_engine.containers.run(IMAGE, ["echo", "ok"], remove=True) == b"ok\n"
    assert "memfd:labkernel-program" in os.readlink(f"/proc/{fresh_engine.runtime.ensure().pid}/exe")


def test_no_device_nodes_without_a_device_cgroup(lab: Engine) -> None:
    if lab.driver.name != "root":
        pytest.skip("a user namespace makes no device nodes")
    bare = dataclasses.replace(lab.driver, cgroups={**lab.driver.cgroups, "devices": "none"})
    assert needs_no_mknod(bare, {})
    assert not needs_no_mknod(bare, {"cap_add": ["CAP_MKNOD"]})
    assert not needs_no_mknod(bare, {"privileged": True})
    config = {"process": {"capabilities": {"bounding": ["CAP_MKNOD", "CAP_KILL"]}}}
    without_mknod(config)
    assert config["process"]["capabilities"]["bounding"] == ["CAP_KILL"]


# -- what stays inside -------------------------------------------------------------------------------------------------


def test_ten_thousand_log_lines(lab: Engine) -> None:
    """A container that floods its log keeps no other waiting, and its log stays within its bounds."""
    log = {"Type": "json-file", "Config": {"max-size": "100k", "max-file": "2"}}
    script = "i=0; while [ $i -lt 10000 ]; do echo line $i; i=$((i+1)); done; sleep 1000"
    flood = lab.containers.run(IMAGE, ["sh", "-c", script], detach=True, log_config=log)
    assert lab.containers.run(IMAGE, ["echo", "other"], remove=True) == b"other\n"
    wait_until(lambda: b"line 9999\n" in flood.logs(tail=1))
    assert flood.logs(tail=3) == b"line 9997\nline 9998\nline 9999\n"
    sizes = sum(path.stat().st_size for path in flood.directory.glob("log.json*"))
    assert sizes < 2 * (100_000 + 6 * 65536)


def test_a_full_disk_stays_inside(lab: Engine) -> None:
    """A bounded tmpfs takes what it takes; the container goes on, and so does everybody else."""
    script = "cat /dev/zero > /small/file; wc -c < /small/file; echo alive"
    text = run(lab, script, tmpfs={"/small": "size=1m"})
    assert "No space left on device" in text
    assert text.splitlines()[-2:] == ["1048576", "alive"]


# -- CVE-2025-31133: what covers a masked file ------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_null_device_masks_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's /dev/null is bound over masked files; something else there must end the start, not be shown."""
    from labkernel.runtime import rootfs

    (tmp_path / "null").write_text("not the device")
    real = os.stat
    monkeypatch.setattr(rootfs.os, "stat", lambda path: real(tmp_path / "null" if path == "/dev/null" else path))
    mounted: list[object] = []
    monkeypatch.setattr(rootfs, "mount", lambda *words: mounted.append(words))
    fd = os.open(tmp_path / "null", os.O_PATH | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="not the null device"):
            rootfs._mask(fd, -1, "/proc/keys")
    finally:
        os.close(fd)
    assert mounted == []
