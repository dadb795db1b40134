from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from labkernel.linux.waiting import has_ended, readable

MANY = 1100

BEYOND = f"""
import os, resource, signal
from labkernel.linux.waiting import has_ended, readable
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, {MANY} + 64), hard))
taken = [os.open("/dev/null", os.O_RDONLY) for _ in range({MANY})]
read, write = os.pipe()
assert read > 1023, read
assert readable(read, timeout_s=0) == set()
os.write(write, b"x")
assert readable(read, write, timeout_s=60) == {{read}}
pid = os.fork()
if pid == 0:
    signal.pause()
assert not has_ended(pid, 0)
os.kill(pid, signal.SIGKILL)
assert has_ended(pid, 60)
os.waitpid(pid, 0)
print("done")
"""


def test_only_what_is_ready() -> None:
    pipes = [os.pipe() for _ in range(3)]
    try:
        reading = [read for read, _ in pipes]
        assert readable(*reading, timeout_s=0) == set()
        assert readable(*reading, timeout_s=-1) == set()  # a deadline that has passed already
        os.write(pipes[1][1], b"x")
        assert readable(*reading) == {reading[1]}
    finally:
        for fd in (fd for pair in pipes for fd in pair):
            os.close(fd)


def test_the_end_of_a_pipe_is_readable() -> None:
    read, write = os.pipe()
    os.close(write)
    assert readable(read) == {read}
    os.close(read)


def test_who_has_gone_already_has_ended() -> None:
    process = subprocess.Popen(["true"])
    assert has_ended(process.pid, 60)  # a zombie
    process.wait()
    assert has_ended(process.pid, 0)


def test_descriptors_above_1023() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < MANY + 64:
        pytest.skip(f"at most {hard} descriptors here")
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


def test_an_old_kernels_word_for_who_is_just_being_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 6.13 says EINVAL (seen with 6.1)."""

    def refuse(_pid: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert has_ended(os.getpid(), 0)
