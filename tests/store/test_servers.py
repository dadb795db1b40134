"""Processes that outlive who started them. The daemon, the registry and the watcher are tested where they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from labkernel.errors import LabkernelError
from labkernel.linux.waiting import readable
from labkernel.store import servers
from labkernel.store.layout import Layout

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(1000)"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.find(tmp_path / "root", tmp_path / "run")


def failure(said: str | None) -> LabkernelError:
    return LabkernelError("it did not start", details=said)


def test_what_ends_before_it_serves_is_told_with_its_last_words(layout: Layout) -> None:
    with pytest.raises(LabkernelError, match="it did not start") as raised:
        servers.start(layout, ["no-such-verb"], log="x.log", find=lambda pid: None, failure=failure, timeout_s=60)
    assert "no-such-verb" in (raised.value.details or "")


def test_it_is_of_this_store_and_in_a_session_of_its_own(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "ssh://elsewhere")  # would send its commands to another engine

    def environment(pid: int) -> dict[str, str] | None:
        if os.getsid(pid) != pid or b"events" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None  # has not yet become the program
        words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return {**dict(word.split("=", 1) for word in words if word), "PID": str(pid)}

    found = servers.start(layout, ["events"], log="x.log", find=environment, failure=failure, timeout_s=60)
    try:
        assert found["LABKERNEL_ROOT"] == str(layout.root)
        assert found["LABKERNEL_RUNTIME_DIR"] == str(layout.runtime_dir)
        assert "DOCKER_HOST" not in found
    finally:
        assert servers.end(int(found["PID"]), timeout_s=60)


@pytest.fixture
def deaf() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def test_the_one_that_does_not_listen_is_killed_or_left(deaf: subprocess.Popen[bytes]) -> None:
    assert not servers.end(deaf.pid, timeout_s=0.01, kill=False)
    pidfd = os.pidfd_open(deaf.pid)
    servers.end(deaf.pid, timeout_s=0.01)
    assert readable(pidfd, timeout_s=60)
    os.close(pidfd)
    deaf.wait()
    with pytest.raises(ProcessLookupError):
        servers.end(deaf.pid)


def test_a_zombie_has_no_start_time() -> None:
    assert (servers.start_ticks(os.getpid()) or 0) > 0
    process = subprocess.Popen(["sleep", "1000"])
    assert servers.start_ticks(process.pid) is not None
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert servers.start_ticks(process.pid) is None
    process.wait()
    assert servers.start_ticks(process.pid) is None
