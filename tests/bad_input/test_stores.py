"""A store that cannot be used: somebody else's, read-only, full, corrupt. Each says so and stays as it was."""

from __future__ import annotations

import contextlib
import os
import tarfile
from pathlib import Path

import pytest
from bad_input.world import (
    BUSYBOX,
    IS_ROOT,
    RUN,
    Disk,
    Unchanged,
    differences,
    environment,
    expect_error,
    labkernel,
    open_engine,
    settle,
    stores,
)

from labkernel.engine import Engine
from labkernel.errors import BuildError, CorruptBlob, DiskFull, DriverError, LayerError, StoreError, UsageError


def test_a_store_of_somebody_else(base: Path) -> None:
    if not IS_ROOT:
        pytest.skip("giving a directory away needs root")
    for name in ("root", "run"):
        (base / name).mkdir()
    os.chown(base / "root", 23456, 23456)
    expect_error(labkernel(stores(base / "root", base / "run"), "ps"), 125, "belongs to user 23456, not to you")
    with pytest.raises(StoreError):
        Engine.open(base / "root", runtime_dir=base / "run")
    assert sorted(base.rglob("*")) == [base / "root", base / "run"]


def test_a_runtime_directory_of_somebody_else(base: Path) -> None:
    if not IS_ROOT:
        pytest.skip("giving a directory away needs root")
    (base / "run").mkdir()
    os.chown(base / "run", 23456, 23456)
    expect_error(labkernel(stores(base / "root", base / "run"), "ps"), 125, "belongs to user 23456, not to you")


def test_a_store_that_is_a_file(base: Path) -> None:
    (base / "root").write_text("")
    expect_error(labkernel(stores(base / "root", base / "run"), "ps"), 125, "cannot make the store")
    assert (base / "root").read_text() == ""


def test_a_socket_path_that_is_too_long(base: Path) -> None:
    long = base / ("x" * 100)
    done = labkernel(stores(base / "root", long), *RUN, BUSYBOX, "true")
    expect_error(done, 125, "too long for a unix socket", "LABKERNEL_RUNTIME_DIR")


@pytest.mark.skipif(not IS_ROOT, reason="a read-only disk needs root (mount)")
def test_a_read_only_store(base: Path) -> None:
    with Disk(base / "disk") as disk:
        # a new one
        disk.remount("ro")
        expect_error(labkernel(stores(disk.path / "root", base / "run"), "ps"), 125, "Read-only file system")
        # and one that was made when the disk could be written
        disk.remount("rw")
        with open_engine(disk.path / "root", base / "run") as engine:
            engine.containers.run(BUSYBOX, "true", remove=True)
            engine.containers.create(BUSYBOX, "true", name="kept")
            before = settle(engine)
        disk.remount("ro")
        env = stores(disk.path / "root", base / "run")
        for words in ((*RUN, BUSYBOX, "true"), ("create", BUSYBOX), ("ps", "-a"), ("tag", BUSYBOX, "x"), ("images",)):
            done = labkernel(env, *words)
            assert "Traceback" not in done.stderr, (words, done.stderr)
            if done.returncode:
                assert done.stderr.startswith("labkernel: "), (words, done.stderr)
        assert labkernel(env, *RUN, BUSYBOX, "true").returncode == 125
        disk.remount("rw")
        with open_engine(disk.path / "root", base / "run") as engine:
            assert differences(engine, before) == {}
            assert engine.check() == []
            assert engine.containers.run(BUSYBOX, ["echo", "again"], remove=True) == b"again\n"


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
def test_a_store_without_write_permission(base: Path) -> None:
    (base / "root").mkdir(mode=0o500)
    expect_error(labkernel(stores(base / "root", base / "run"), "ps"), 125, "cannot make the store")


@pytest.mark.parametrize(("name", "brief"), [("wrong", "unknown driver: wrong")])
def test_wrong_driver(lab: Engine, name: str, brief: str) -> None:
    with Unchanged(lab):
        expect_error(labkernel(environment(lab, LABKERNEL_DRIVER=name), "ps"), 125, brief)
        with pytest.raises((UsageError, DriverError)):
            Engine.open(lab.layout.root, driver=name, runtime_dir=lab.layout.runtime_dir)


FULL = {
    "build, as files": f"FROM {BUSYBOX}\nRUN dd if=/dev/urandom of=/big bs=1M count=40\n",
    "build, as a blob": f"FROM {BUSYBOX}\nRUN dd if=/dev/urandom of=/big bs=1M count=7\n",
    "build, from the context": f"FROM {BUSYBOX}\nCOPY big.bin /\n",
}


@pytest.mark.skipif(not IS_ROOT, reason="a small disk of its own needs root (mount)")
def test_disk_full(base: Path) -> None:
    (base / "context").mkdir()
    (base / "context/big.bin").write_bytes(os.urandom(20 << 20))
    with tarfile.open(base / "big.tar", "w") as tar:
        tar.add(base / "context/big.bin", "big.bin")
    with Disk(base / "disk") as disk, open_engine(disk.path / "root", base / "run") as engine:
        engine.containers.run(BUSYBOX, "true", remove=True)
        env = stores(disk.path / "root", base / "run")
        for name, text in FULL.items():
            with Unchanged(engine), pytest.raises(DiskFull, match=r"full|no space left") as caught:
                engine.builds.build(text, context=base / "context", tags=["lk-test/full"])
            assert "LABKERNEL_ROOT" in (caught.value.resolution or ""), name
            (base / "Dockerfile").write_text(text)
            with Unchanged(engine):
                done = labkernel(env, "build", "-q", "-f", str(base / "Dockerfile"), str(base / "context"))
                expect_error(done, 125, "full" if "full" in done.stderr else "no space left", "free some space")
        with Unchanged(engine), pytest.raises(DiskFull):
            engine.images.import_tar(base / "big.tar", repository="lk-test/full")
        with Unchanged(engine):
            expect_error(labkernel(env, "import", str(base / "big.tar"), "x/full"), 125, "no space left on device")
        # it goes on
        engine.builds.build(f"FROM {BUSYBOX}\nRUN echo small > /small\n", tags=["lk-test/small"])
        assert engine.containers.run("lk-test/small", ["cat", "/small"], remove=True) == b"small\n"


@pytest.mark.skipif(not IS_ROOT, reason="a small disk of its own needs root (mount)")
def test_disk_that_is_already_full(base: Path) -> None:
    """No byte is left: each verb says so and leaves no row, no directory; what only removes still works."""
    with Disk(base / "disk") as disk, open_engine(disk.path / "root", base / "run") as engine:
        engine.containers.run(BUSYBOX, "true", remove=True)
        engine.containers.create(BUSYBOX, "true", name="old")
        before = settle(engine)
        ballast = os.open(disk.path / "ballast", os.O_WRONLY | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):
            while True:
                os.write(ballast, bytes(4096))
        os.close(ballast)
        env = stores(disk.path / "root", base / "run")
        for words in ((*RUN, BUSYBOX, "true"), ("create", "--name", "new", BUSYBOX), ("tag", BUSYBOX, "lk-test/new")):
            done = labkernel(env, *words)
            assert "Traceback" not in done.stderr, (words, done.stderr)
            assert done.returncode in (0, 125), (words, done.stderr)
            assert done.returncode == 0 or "no space left" in done.stderr.lower(), (words, done.stderr)
        (disk.path / "ballast").unlink()
        labkernel(env, "rm", "new")
        labkernel(env, "rmi", "lk-test/new")
        assert differences(engine, before) == {}
        assert engine.check() == []


def flip(path: Path) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_corrupt_layer(fresh_engine: Engine) -> None:
    engine = fresh_engine
    image = engine.builds.build(f"FROM {BUSYBOX}\nRUN echo kept > /kept\n", tags=["lk-test/corrupt"]).image
    layer = image.layers[-1]
    flip(engine.layout.blob_path(layer.digest))
    # what is unpacked does not need its blob
    assert engine.containers.run("lk-test/corrupt", ["cat", "/kept"], remove=True) == b"kept\n"
    from labkernel.imaging.removal import forget_unpacked

    forget_unpacked(engine.images)
    engine.containers.run(BUSYBOX, "true", remove=True)
    before = settle(engine)
    done = labkernel(environment(engine), *RUN, "lk-test/corrupt", "true")
    expect_error(done, 125, "corrupt" if "corrupt" in done.stderr else layer.digest[7:19])
    with pytest.raises((CorruptBlob, LayerError)):
        engine.containers.run("lk-test/corrupt", "true", remove=True)
    assert differences(engine, before) == {}
    assert engine.check() == []
    assert [problem.subject for problem in engine.check(verify=True)] == [layer.digest]


def test_a_corrupt_config(fresh_engine: Engine) -> None:
    engine = fresh_engine
    image = engine.builds.build(f"FROM {BUSYBOX}\nENV A=1\n", tags=["lk-test/corrupt"]).image
    engine.runtime.ensure()
    before = settle(engine)
    flip(engine.layout.blob_path(image.id))
    done = labkernel(environment(engine), *RUN, "lk-test/corrupt", "true")
    expect_error(done, 125, image.id[7:19])
    with Engine.open(engine.layout.root, runtime_dir=engine.layout.runtime_dir) as other:
        with pytest.raises(CorruptBlob):
            other.containers.run("lk-test/corrupt", "true", remove=True)
        with pytest.raises((CorruptBlob, BuildError)):
            other.builds.build("FROM lk-test/corrupt\nRUN true\n")
    # one bad image does not hide the good ones, and it can be removed
    for words in (("images",), ("ps", "-a"), ("rmi", "lk-test/corrupt")):
        done = labkernel(environment(engine), *words)
        assert done.returncode == 0, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert differences(engine, before).keys() <= {"images", "tags", str(engine.layout.blobs / "sha256")}
    assert engine.check(verify=True) == []
