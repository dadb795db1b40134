"""Device programs of cgroup v2; for real on an empty v2 hierarchy as well, which filters devices all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from labkernel.linux import cgroups, devices, limits


def test_program_is_whole_instructions() -> None:
    assert len(devices.device_program(limits.DEVICE_RULES)) % 8 == 0


def test_nothing_unreachable_after_a_rule_for_all() -> None:
    program = devices.device_program([{"allow": False, "access": "rwm"}])
    assert len(program) == 8 * 8
    assert program[-8] == 0x95


def test_kernel_enforces_the_program() -> None:
    unified = cgroups.detect().unified
    if unified is None or os.geteuid() != 0:
        pytest.skip("no version 2 hierarchy that this user may write")
    path = Path(unified) / f"labkernel-test-{os.getpid()}"
    path.mkdir()
    try:
        try:
            devices.attach_rules(str(path), limits.DEVICE_RULES)
        except OSError as err:
            pytest.skip(f"no BPF here: {err}")
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            (path / "cgroup.procs").write_text("0")
            words = []
            for device in ("/dev/null", "/dev/urandom", "/dev/mem", "/dev/kmsg"):
                try:
                    os.close(os.open(device, os.O_RDONLY | os.O_NONBLOCK))
                    words.append("yes")
                except FileNotFoundError:
                    words.append("1")
                except OSError as err:
                    words.append(str(err.errno))
            os.write(writing, " ".join(words).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert pipe.read() == "yes yes 1 1"
        os.waitpid(pid, 0)
    finally:
        path.rmdir()
