"""Limits of single devices, shared IPC, and directories in the place of images."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import UsageError
from labkernel.linux.limits import translate
from labkernel.runtime import devicelimits
from labkernel.runtime.settings import normalize
from labkernel.runtime.spec import finalize_resources


def block_device() -> str:
    for entry in sorted(os.scandir("/dev"), key=lambda entry: entry.name):
        if stat.S_ISBLK(entry.stat(follow_symlinks=False).st_mode):
            return entry.path
    pytest.skip("no block device in /dev")


def test_from_words_to_files() -> None:
    path = block_device()
    number = os.stat(path).st_rdev
    device = f"{os.major(number)}:{os.minor(number)}"
    words = {
        "device_read_bps": [f"{path}:1mb"],
        "device_write_iops": [{"Path": path, "Rate": 7}],
        "blkio_weight_device": [f"{path}:300"],
        "oom_kill_disable": True,
    }
    resources = finalize_resources(normalize(words), devices=False)
    assert [(name, value) for _, name, value, _ in translate(resources, version=1)] == [
        ("memory.oom_control", "1"),
        ("blkio.throttle.read_bps_device", f"{device} 1048576"),
        ("blkio.throttle.write_iops_device", f"{device} 7"),
        ("blkio.weight_device", f"{device} 300"),
    ]
    assert ("blkio", "io.max", f"{device} rbps=1048576", "device-read-bps") in translate(resources, version=2)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("device_read_bps", "sda:1mb", "bad format for device path"),
        ("device_read_bps", "/dev/sda", "bad format"),
        ("device_read_iops", "/dev/sda:1mb", "positive number"),
        ("blkio_weight_device", "/dev/sda:9", "invalid weight"),
        ("device_cgroup_rules", "c 1:3", "invalid device cgroup format"),
        ("cgroup_parent", "/a/../b", "invalid cgroup parent"),
        ("runtime", "kata", "unknown or invalid runtime name: kata"),
        ("ipc_mode", "container:", "invalid ipc mode"),
    ],
)
def test_refused(setting: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        normalize({setting: value})
    with pytest.raises(UsageError, match="no block device"):
        devicelimits.block_io({"device_read_bps": [{"Path": "/dev/null", "Rate": 1}]})


def test_device_rules() -> None:
    rules = finalize_resources(normalize({"device_cgroup_rules": ["c 10:* rw"]}))["devices"]
    assert rules[-1] == {"allow": True, "type": "c", "major": 10, "access": "rw"}


def test_limits_in_the_kernel(engine: Engine, needs: Callable[..., None]) -> None:
    needs("cgroup blkio")
    if engine.driver.cgroup_version != 1:
        pytest.skip("the files are those of cgroup version 1")
    path = block_device()
    script = "cat /sys/fs/cgroup/blkio/blkio.throttle.read_bps_device; cat /proc/self/cgroup"
    settings = {"device_read_bps": f"{path}:1mb", "cgroup_parent": "/labkernel-test-parent", "cgroupns": "host"}
    output = engine.containers.run("busybox", ["sh", "-c", script], remove=True, **settings).decode()
    assert " 1048576\n" in output
    assert "/labkernel-test-parent/labkernel/" in output


def test_shared_memory_of_another_container(engine: Engine) -> None:
    if engine.driver.name == "proot":
        pytest.skip("no namespaces")
    donor = engine.containers.run(
        "busybox", ["sh", "-c", "echo shared > /dev/shm/a; sleep 1000"], detach=True, name="donor", ipc_mode="shareable"
    )
    wait_until(lambda: donor.exec_run(["test", "-s", "/dev/shm/a"]).exit_code == 0)
    script = "cat /dev/shm/a; readlink /proc/self/ns/ipc; echo back > /dev/shm/b"
    output = engine.containers.run("busybox", ["sh", "-c", script], remove=True, ipc_mode="container:donor").split()
    theirs = donor.exec_run(["sh", "-c", "readlink /proc/self/ns/ipc; cat /dev/shm/b"]).output.split()
    assert output == [b"shared", theirs[0]]
    assert theirs[1] == b"back"
    engine.containers.run("busybox", ["sleep", "1000"], detach=True, name="closed")
    with pytest.raises(UsageError, match="non-shareable IPC"):
        engine.containers.create("busybox", ["true"], ipc_mode="container:closed")


def test_a_directory_instead_of_an_image(engine: Engine, tmp_path: Path) -> None:
    if engine.driver.name != "root":
        pytest.skip("the directory's owner is not mapped")
    for part in (tmp_path, *tmp_path.parents[:-2]):
        part.chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").write_bytes(Path("/bin/busybox").read_bytes())
    (tmp_path / "bin/sh").chmod(0o755)
    assert engine.containers.run(str(tmp_path), ["/bin/sh", "-c", "echo hi > /made; echo ok"], remove=True) == b"ok\n"
    assert (tmp_path / "made").read_text() == "hi\n"
    over = engine.containers.create(f"{tmp_path}:O", ["/bin/sh", "-c", "echo hi > /over"])
    over.start()
    assert over.wait()["StatusCode"] == 0
    assert not (tmp_path / "over").exists()
    assert over.diff() == [{"Path": "/over", "Kind": 1}]
    assert over.attrs["Config"]["Image"] == f"{tmp_path}:O"
    with pytest.raises(UsageError, match="no image to put a layer on"):
        over.commit("x")
    with pytest.raises(UsageError, match="no such directory"):
        engine.containers.create("/no/such/root", ["true"])
