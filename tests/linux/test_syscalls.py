"""Thin wrappers, tried on the running kernel."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from labkernel.linux import syscalls


def test_openat2_keeps_links_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/name").write_text("inside")
    (root / "absolute").symlink_to("/etc/name")
    (root / "climbing").symlink_to("../../../../../etc/name")
    root_fd = os.open(root, os.O_PATH)
    for name in ("absolute", "climbing", "/etc/name", "../../etc/name"):
        fd = syscalls.openat2(root_fd, name, os.O_RDONLY)
        assert os.read(fd, 100) == b"inside"
        os.close(fd)
    with pytest.raises(OSError) as caught:
        syscalls.openat2(root_fd, "absolute", os.O_RDONLY, resolve=syscalls.RESOLVE_NO_SYMLINKS)
    assert caught.value.errno == errno.ELOOP
    assert caught.value.filename == "absolute"
    os.close(root_fd)


def test_birth_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = time.time_ns() - 1_000_000_000
    path.touch()
    os.utime(path, ns=(1, 1))
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        born = syscalls.birth_time_ns(str(tmp_path / name))
        assert born == 0 or before <= born <= time.time_ns()
    with pytest.raises(FileNotFoundError) as caught:
        syscalls.birth_time_ns(str(tmp_path / "nobody"))
    assert caught.value.filename == str(tmp_path / "nobody")


def test_close_range() -> None:
    first = os.open("/dev/null", os.O_RDONLY)
    fds = [os.dup2(first, first + 200 + n) for n in range(3)]
    syscalls.close_range(first + 200, first + 202)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    os.fstat(first)
    os.close(first)


def test_tee_copies_without_consuming() -> None:
    one, two = os.pipe(), os.pipe()
    os.write(one[1], b"drops")
    assert syscalls.tee(one[0], two[1], 100) == 5
    assert os.read(two[0], 100) == os.read(one[0], 100) == b"drops"
    for fd in (*one, *two):
        os.close(fd)


def test_clone_is_like_fork() -> None:
    # In a fresh single-threaded interpreter, as the wrapper demands.
    code = (
        "import os; from labkernel.linux import syscalls\n"
        "pid, pidfd = syscalls.clone(0)\n"
        "if pid == 0: os._exit(41)\n"
        "info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)\n"
        "assert (info.si_pid, info.si_status) == (pid, 41)\n"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_carry_errno_and_path() -> None:
    with pytest.raises(OSError) as caught:
        syscalls.mount("x", "/no/such/place", "tmpfs")
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
    assert caught.value.filename == "/no/such/place"
    with pytest.raises(OSError, match="Invalid argument"):
        syscalls.prctl(99999)


def test_capget_agrees_with_proc() -> None:
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff"))
    assert syscalls.capget()[0] == int(effective.split()[1], 16)


@pytest.mark.parametrize("ending", ["exec", "exit", "kill"])
def test_vfork_and_leave(ending: str) -> None:
    """The helper ends well however its child ends, and the child's number is known."""
    told = syscalls.SharedNumber()
    answer = os.pipe()
    helper = os.fork()
    if helper == 0:

        def body() -> None:
            os.write(answer[1], b"%d" % os.getpid())
            if ending == "exec":
                os.execv("/bin/sh", ["sh", "-c", "exit 7"])
            elif ending == "kill":
                os.kill(os.getpid(), signal.SIGKILL)

        syscalls.vfork_and_leave(0, body, syscalls.lowest_stack_address(), told)
    assert os.waitpid(helper, 0)[1] == 0
    os.close(answer[1])
    with os.fdopen(answer[0]) as pipe:
        own = int(pipe.read())
    assert told.value == own != helper


def test_a_child_is_known_whose_helper_was_killed() -> None:
    """Nobody would wait for it otherwise, and a pid namespace does not end before each of its processes was waited for
    (man 7 pid_namespaces)."""
    told = syscalls.SharedNumber()
    helper = os.fork()
    if helper == 0:
        number = os.getpid()

        def body() -> None:
            os.kill(number, signal.SIGKILL)
            signal.pause()

        syscalls.vfork_and_leave(syscalls.CLONE_PARENT, body, syscalls.lowest_stack_address(), told)
    assert os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) == -signal.SIGKILL
    os.kill(told.value, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(told.value, 0)[1]) == -signal.SIGKILL


def test_vfork_that_the_kernel_refuses() -> None:
    helper = os.fork()
    if helper == 0:
        try:
            # a thread without its group's memory is no thread (man 2 clone, EINVAL)
            syscalls.vfork_and_leave(0x00010000, lambda: None, syscalls.lowest_stack_address(), syscalls.SharedNumber())
        except OSError as err:
            os._exit(err.errno or 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) == errno.EINVAL
