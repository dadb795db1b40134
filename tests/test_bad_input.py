"""What a user can get wrong, in the terminal, in a notebook and from Python: one clear line, docker's exit code, a
hint, and nothing half done. The world (store, mounts, cgroups, processes) is listed before and after each case."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from labkernel.engine import Engine
from labkernel.errors import (
    BuildError,
    ConflictError,
    CorruptBlob,
    DiskFull,
    DockerfileError,
    DriverError,
    ImageError,
    InvalidReference,
    LabkernelError,
    LayerError,
    NoSuchContainer,
    NoSuchImage,
    StartError,
    StoreError,
    UsageError,
    VMError,
)
from labkernel.linux import cgroups
from labkernel.runtime.driver import cgroup_parent

REPO = Path(__file__).resolve().parent.parent
BUSYBOX = "lab/busybox"
USED = "lk-test/used"
RUN = ("run", "--rm", "--network", "none")
IS_ROOT = os.geteuid() == 0
SETTLE_S = 10.0

World = dict[str, Any]


# -- the world before and after ----------------------------------------------------------------------------------------


def list_world(engine: Engine) -> World:
    """All the engine has: rows, files, mounts on the host, groups and processes beyond the warm pool's."""
    layout = engine.layout
    engine.containers.reconcile()  # rows of containers that have removed themselves go when they are met
    tables = {
        "images": "SELECT id FROM images",
        "tags": "SELECT name FROM tags",
        "containers": "SELECT name FROM containers",
        "volumes": "SELECT name FROM volumes",
        "unpacked": "SELECT diff_id FROM layers",
    }
    world: World = {name: sorted(row[0] for row in engine.db.query(query)) for name, query in tables.items()}
    for path in (layout.containers, layout.layers, layout.tmp, layout.volumes, layout.blobs / "sha256"):
        world[str(path)] = sorted(os.listdir(path))
    world["mounts"] = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4].startswith((f"{layout.root}/", f"{layout.runtime_dir}/"))
    ]
    return {**world, **_list_groups(engine)}


def _list_groups(engine: Engine) -> World:
    """Most groups and processes in any hierarchy: each warm child waits in a group of its own and does not count."""
    warm = engine.runtime.ensure().warm
    groups = processes = 0
    parent = cgroup_parent(engine.layout).strip("/")
    for base in set(cgroups.detect().bases.values()):
        folders = [path for path in Path(base, parent).glob("*") if path.is_dir()]
        members = [line for path in folders for line in _lines(path / "cgroup.procs")]
        groups, processes = max(groups, len(folders) - warm), max(processes, len(members) - warm)
    return {"groups": max(groups, 0), "processes": max(processes, 0)}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def differences(engine: Engine, before: World) -> dict[str, tuple[Any, Any]]:
    """What is not as it was. Teardown follows the answer, so it is waited for, with an end."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = list_world(engine)
        changed = {key: (before[key], after[key]) for key in before if after[key] != before[key]}
        if not changed or time.monotonic() > deadline:
            return changed
        time.sleep(0.05)


def settle(engine: Engine) -> World:
    """The world once the containers that removed themselves are gone, with their groups; none may run."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        world = list_world(engine)
        ids = sorted(row[0] for row in engine.db.query("SELECT id FROM containers"))
        if world[str(engine.layout.containers)] == ids and world["groups"] == world["processes"] == 0:
            return world
        assert time.monotonic() < deadline, world
        time.sleep(0.02)


class Unchanged:
    """`with Unchanged(engine):` the block leaves the world as it was, and the store without a fault."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> None:
        self.before = settle(self.engine)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert differences(self.engine, self.before) == {}
            assert self.engine.check() == []


# -- the three hosts ---------------------------------------------------------------------------------------------------


def environment(engine: Engine, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "PYTHONPATH": str(REPO),
        **more,
    }


def labkernel(env: Mapping[str, str], *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 90}
    return subprocess.run([sys.executable, "-m", "labkernel.cli", *words], **{**settings, "env": env, **more})


def expect_error(done: subprocess.CompletedProcess[str], code: int, brief: str, hint: str | None = "") -> None:
    """`brief` in the one line that begins with `labkernel: `; `hint`: its beginning, None for an error without one."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    briefs = [line for line in lines if line.startswith("labkernel: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(briefs) == 1, done.stderr
    assert brief in briefs[0]
    assert done.returncode == code, done.stderr
    assert len(hints) == (hint is not None), done.stderr
    assert hint is None or hint in hints[0]


@pytest.fixture
def shell(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("LABKERNEL_ROOT", str(engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(engine.layout.runtime_dir))
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    shell.reset(new_session=False)
    shell.extension_manager.load_extension("labkernel")
    yield shell
    shell.extension_manager.unload_extension("labkernel")
    shell.user_ns.pop("lab", None)


@pytest.fixture
def lab(engine: Engine) -> Iterator[Engine]:
    """The engine with all a case needs: the base is unpacked, the supervisor runs, `taken` has its name.

    `taken` is made of an image of its own with one name: of one with two names, `rmi` only removes the name."""
    engine.containers.run(BUSYBOX, "true", remove=True)
    engine.builds.build(f"FROM {BUSYBOX}\nLABEL of=bad-input\n", tags=[USED])
    taken = engine.containers.create(USED, "true", name="taken")
    yield engine
    taken.remove(force=True)
    engine.images.remove(USED, force=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with what the cases name: Dockerfiles, an empty context, broken archives."""
    (tmp_path / "context").mkdir()
    (tmp_path / "misspelt").write_text(MISSPELT)
    (tmp_path / "missing").write_text(MISSING)
    (tmp_path / "garbage.tar").write_bytes(bytes(range(256)) * 200)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = 40_000
        tar.addfile(member, io.BytesIO(b"x" * member.size))
    (tmp_path / "cut.tar").write_bytes(whole.getvalue()[:20_000])
    leaving = io.BytesIO()
    with tarfile.open(fileobj=leaving, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../leaves"))
    (tmp_path / "leaving.tar").write_bytes(leaving.getvalue())
    return tmp_path


# -- the table ---------------------------------------------------------------------------------------------------------

MISSPELT = f"FROM {BUSYBOX}\n\nCOPPY a b\n"
MISSING = f"FROM {BUSYBOX}\nENV A=1\nCOPY nothing.txt /\n"


class Case(NamedTuple):
    """One mistake: the words of the terminal (and of `%docker`), exit code, brief, and the same from Python."""

    words: tuple[str, ...]
    code: int
    brief: str
    error: type[LabkernelError]
    call: Callable[[Engine, Path], Any]
    hint: str | None = ""
    cell: str | None = None


def _run(*command: str, image: str = BUSYBOX, **settings: Any) -> Callable[[Engine, Path], Any]:
    return lambda lab, _folder: lab.containers.run(image, list(command), remove=True, **settings)


def _import(name: str) -> Callable[[Engine, Path], Any]:
    return lambda lab, folder: lab.images.import_tar(folder / name, repository="lk-test/bad")


CASES: dict[str, Case] = {
    "unknown image": Case(
        (*RUN, "nobody/nothing:9", "true"), 125, "nobody/nothing:9", NoSuchImage, _run(image="nobody/nothing:9")
    ),
    "invalid reference": Case(
        (*RUN, "BusyBox"), 125, "must be lowercase", InvalidReference, _run("true", image="BusyBox")
    ),
    "command not found": Case(
        (*RUN, BUSYBOX, "no-such"), 127, '"no-such": executable file not found in $PATH', StartError, _run("no-such")
    ),
    "command's path not found": Case(
        (*RUN, BUSYBOX, "/no/such"), 127, "stat /no/such: no such file", StartError, _run("/no/such")
    ),
    "not executable": Case(
        (*RUN, BUSYBOX, "/etc/passwd"), 126, '"/etc/passwd": permission denied', StartError, _run("/etc/passwd")
    ),
    "a directory": Case((*RUN, BUSYBOX, "/etc"), 126, '"/etc": is a directory', StartError, _run("/etc")),
    "bad flag": Case(
        ("run", "--frob", BUSYBOX), 125, "unknown flag: --frob", UsageError, _run("true", frob=1), hint="--rm"
    ),
    "bad command": Case(
        ("runn", BUSYBOX), 1, "unknown command", UsageError, lambda lab, _: lab.containers.list(filters={"x": 1})
    ),
    "name in use": Case(
        ("run", "--name", "taken", BUSYBOX, "true"),
        125,
        'The container name "/taken" is already in use by container',
        ConflictError,
        _run("true", name="taken"),
        hint="container rm taken",
    ),
    "bad name": Case(
        ("run", "--name", "a b", BUSYBOX, "true"),
        125,
        "Invalid container name (a b)",
        UsageError,
        _run("", name="a b"),
        hint=None,
    ),
    "rename to a name in use": Case(
        ("create", "--name", "taken", BUSYBOX),
        125,
        "already in use",
        ConflictError,
        lambda lab, _: lab.containers.create(BUSYBOX, name="taken"),
    ),
    "no such container": Case(
        ("rm", "nobody"), 1, "No such container: nobody", NoSuchContainer, lambda lab, _: lab.containers.get("nobody")
    ),
    "exec in no such container": Case(
        ("exec", "nobody", "true"),
        1,
        "No such container: nobody",
        NoSuchContainer,
        lambda lab, _: lab.containers.get("nobody"),
    ),
    "exec in a container that does not run": Case(
        ("exec", "taken", "true"),
        1,
        "is not running",
        ConflictError,
        lambda lab, _: lab.containers.get("taken").exec_run("true"),
    ),
    "no such image to remove": Case(
        ("rmi", "nobody/nothing"),
        1,
        "No such image: nobody/nothing",
        NoSuchImage,
        lambda lab, _: lab.images.remove("nobody/nothing"),
    ),
    "image in use": Case(
        ("rmi", USED), 1, "is using", ConflictError, lambda lab, _: lab.images.remove(USED), hint="rm"
    ),
    "Dockerfile syntax": Case(
        ("build", "-q", "-f", "misspelt", "context"),
        1,
        "unknown instruction: COPPY (did you mean COPY?)",
        DockerfileError,
        lambda lab, _: lab.builds.build(MISSPELT),
        hint=None,
        cell=f"%%dockerfile -t lk-test/bad\n{MISSPELT}",
    ),
    "context file missing": Case(
        ("build", "-q", "-f", "missing", "-t", "lk-test/bad", "context"),
        1,
        "stat nothing.txt: file does not exist",
        BuildError,
        lambda lab, folder: lab.builds.build(MISSING, context=folder / "context", tags=["lk-test/bad"]),
        hint="context",
        cell=f"%%dockerfile -t lk-test/bad\n{MISSING}",
    ),
    "no such context": Case(
        ("build", "-f", "missing", "nowhere"),
        1,
        "path 'nowhere' not found",
        LabkernelError,
        lambda lab, folder: lab.builds.build(MISSING, context=folder / "nowhere"),
    ),
    "bad tag of a build": Case(
        ("build", "-q", "-t", "Bad", "-f", "missing", "context"),
        125,
        "must be lowercase",
        InvalidReference,
        lambda lab, folder: lab.builds.build(MISSING, context=folder, tags=["Bad"]),
    ),
    "memory too small": Case(
        (*RUN, "-m", "1k", BUSYBOX), 125, "Minimum memory limit allowed is 6MB", UsageError, _run("x", mem_limit="1k")
    ),
    "memory no number": Case(
        (*RUN, "-m", "12q", BUSYBOX), 125, "invalid size: '12q'", UsageError, _run("x", mem_limit="12q")
    ),
    "too many CPUs": Case(
        (*RUN, "--cpus", "4096", BUSYBOX),
        125,
        "Range of CPUs",
        UsageError,
        _run("x", nano_cpus=4096 * 10**9),
        hint=None,
    ),
    "bad volume": Case(
        (*RUN, "-v", "a:b:c:d", BUSYBOX),
        125,
        "invalid volume specification: 'a:b:c:d'",
        UsageError,
        _run("x", volumes=["a:b:c:d"]),
    ),
    "relative volume target": Case(
        (*RUN, "-v", "x:relative", BUSYBOX),
        125,
        "must be absolute",
        UsageError,
        _run("x", volumes=["x:relative"]),
        hint=None,
    ),
    "unknown user": Case(
        (*RUN, "-u", "nosuch", BUSYBOX, "id"),
        125,
        "unable to find user nosuch",
        StartError,
        _run("id", user="nosuch"),
        hint=None,
    ),
    "unknown group": Case(
        (*RUN, "-u", "0:nosuch", BUSYBOX, "id"),
        125,
        "unable to find group nosuch",
        StartError,
        _run("id", user="0:nosuch"),
        hint=None,
    ),
    "relative workdir": Case(
        (*RUN, "-w", "rel", BUSYBOX, "pwd"),
        125,
        "needs to be an absolute path",
        UsageError,
        _run("x", working_dir="r"),
        hint=None,
    ),
    "workdir is a file": Case(
        (*RUN, "-w", "/etc/passwd", BUSYBOX, "pwd"),
        126,
        "not a directory",
        StartError,
        _run("pwd", working_dir="/etc/passwd"),
    ),
    "unknown network": Case(
        ("run", "--network", "nope", BUSYBOX), 125, "network nope not found", LabkernelError, _run(network="nope")
    ),
    "unknown capability": Case(
        (*RUN, "--cap-add", "NOPE", BUSYBOX),
        125,
        'unknown capability: "CAP_NOPE"',
        UsageError,
        _run(cap_add=["NOPE"]),
        hint=None,
    ),
    "no seccomp profile": Case(
        (*RUN, "--security-opt", "seccomp=/no/such.json", BUSYBOX, "true"),
        125,
        "/no/such.json",
        LabkernelError,
        _run("true", security_opt=["seccomp=/no/such.json"]),
        hint=None,
    ),
    "no env file": Case(
        (*RUN, "--env-file", "/no/such", BUSYBOX), 125, "/no/such", UsageError, _run(environment=["=x"]), hint=None
    ),
    "garbage for a tar": Case(("import", "garbage.tar", "lk-test/bad"), 125, "tar", ImageError, _import("garbage.tar")),
    "tar cut short": Case(("import", "cut.tar", "lk-test/bad"), 125, "ends", LayerError, _import("cut.tar")),
    "tar that leaves its root": Case(
        ("import", "leaving.tar", "lk-test/bad"), 125, "leaves the root", LayerError, _import("leaving.tar"), hint=None
    ),
    "no such tar": Case(
        ("import", "/no/such.tar", "x"), 1, "/no/such.tar", LabkernelError, _import("nowhere.tar"), hint=None
    ),
    "garbage to load": Case(
        ("load", "-i", "garbage.tar"),
        125,
        "damaged",
        ImageError,
        lambda lab, folder: lab.images.load(io.BytesIO((folder / "garbage.tar").read_bytes())),
        hint="import",
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])


@cases
def test_terminal(lab: Engine, folder: Path, case: Case) -> None:
    with Unchanged(lab):
        expect_error(labkernel(environment(lab), *case.words, cwd=folder), case.code, case.brief, case.hint)


@cases
def test_notebook(shell: Any, lab: Engine, folder: Path, capfd: pytest.CaptureFixture[str], case: Case) -> None:
    line = " ".join(f"'{word}'" if " " in word else word for word in case.words)
    with Unchanged(lab):
        capfd.readouterr()
        done = shell.run_cell(case.cell or f"%docker {line}")
        seen = capfd.readouterr()
        text = seen.out + seen.err
        assert isinstance(done.error_in_exec, LabkernelError), text
        assert case.brief in str(done.error_in_exec)
        assert case.brief in text
        assert case.hint is None or "hint: " in text
        assert "Traceback" not in text
        assert ".py" not in text, "a line of a traceback"


@cases
def test_python(lab: Engine, folder: Path, case: Case) -> None:
    with Unchanged(lab), pytest.raises(case.error) as caught:
        case.call(lab, folder)
    assert "\n" not in caught.value.brief
    assert len(caught.value.render()) <= 8


def test_a_dockerfile_error_points_at_the_line_of_the_cell(shell: Any, lab: Engine) -> None:
    for text, wrong in ((MISSPELT, "COPPY a b"), (MISSING, "COPY nothing.txt /")):
        cell = f"%%dockerfile -t lk-test/bad\n{text}"
        line = cell.splitlines().index(wrong) + 1
        err = shell.run_cell(cell).error_in_exec
        assert err.line == line
        assert f"{line} | >>> {wrong}" in err.details
    # the same from the terminal
    done = labkernel(environment(lab), "build", "-", input=MISSPELT, stdin=None)
    assert "3 | >>> COPPY a b" in done.stderr


def test_a_kernel_shows_brief_and_hint_only(lab: Engine, tmp_path: Path) -> None:
    """What a front end gets in `traceback` for an error: a few lines, none with a file or a line of Python."""
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    env = environment(lab, JUPYTER_RUNTIME_DIR=str(tmp_path / "jupyter"), IPYTHONDIR=str(tmp_path / "ipython"))
    manager, client = start_new_kernel(kernel_name="python3", env=env, cwd=str(tmp_path), startup_timeout=60)
    try:
        client.execute_interactive("%load_ext labkernel", timeout=60, output_hook=lambda _message: None)
        for name in ("command not found", "name in use", "Dockerfile syntax", "unknown image"):
            case = CASES[name]
            answer = client.execute_interactive(
                case.cell or f"%docker {' '.join(case.words)}", timeout=60, output_hook=lambda _message: None
            )["content"]
            assert answer["status"] == "error"
            assert case.brief in answer["evalue"]
            assert case.brief in answer["traceback"][0]
            assert not any(".py" in line or "Traceback" in line for line in answer["traceback"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# -- two at once -------------------------------------------------------------------------------------------------------

CREATE = f"""
import sys, labkernel
from labkernel.errors import ConflictError
lab = labkernel.connect()
lab.images.resolve({BUSYBOX!r}); lab.runtime.ensure()
print("ready", flush=True); sys.stdin.readline()
try:
    print("made", lab.containers.create({BUSYBOX!r}, "true", name="wanted-by-two").name)
except ConflictError as err:
    print("refused", err.brief)
"""


def test_two_creates_of_one_name_at_the_same_instant(lab: Engine) -> None:
    before = settle(lab)
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE],
            env=environment(lab),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    answers = [client.communicate(timeout=60) for client in clients]
    assert sorted(out.split()[0] for out, _ in answers) == ["made", "refused", "refused", "refused"], answers
    assert all("already in use" in out for out, _ in answers if out.startswith("refused"))
    lab.containers.get("wanted-by-two").remove()
    assert differences(lab, before) == {}
    assert lab.check() == []


# -- a store that cannot be used ---------------------------------------------------------------------------------------


@pytest.fixture
def base() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="lk-b-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def stores(root: Path, runtime_dir: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "LABKERNEL_ROOT": str(root),
        "LABKERNEL_RUNTIME_DIR": str(runtime_dir),
    }


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


# -- a full disk -------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own; unmounted at the end, lazily, since a supervisor may still be leaving."""

    def __init__(self, path: Path, size: str = "16m") -> None:
        self.path = path
        self.size = size

    def __enter__(self) -> Disk:
        self.path.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "labkernel-test", str(self.path)], check=True
        )
        return self

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)


class open_engine:
    """An engine whose supervisor ends with the block."""

    def __init__(self, root: Path, runtime_dir: Path) -> None:
        self.engine = Engine.open(root, runtime_dir=runtime_dir)

    def __enter__(self) -> Engine:
        return self.engine

    def __exit__(self, *_: object) -> None:
        self.engine.runtime.shutdown(force=True)
        self.engine.close()


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


# -- corrupt blobs -----------------------------------------------------------------------------------------------------


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
    from labkernel.removal import forget_unpacked

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


# -- programs this machine lacks ---------------------------------------------------------------------------------------


def test_no_qemu(lab: Engine, tmp_path: Path) -> None:
    env = environment(lab, PATH=str(tmp_path))
    with Unchanged(lab):
        done = labkernel(env, "vm", "run", BUSYBOX, "true")
        expect_error(done, 125, "QEMU is not installed", "qemu")


def test_no_qemu_in_python(lab: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Unchanged(lab), pytest.raises(VMError):
        lab.vms.run(BUSYBOX, "true")


NO_BUSYBOX = """
import os, sys
from labkernel import basefiles
basefiles.is_static_program = lambda path: False
os.environ["PATH"] = sys.argv[1]
from labkernel.cli import main
sys.argv = ["labkernel", "run", "--rm", "--network", "none", "busybox", "true"]
main()
"""


def test_no_busybox(base: Path, fresh_engine: Engine) -> None:
    """No static busybox, and neither apt nor dpkg-deb to fetch one."""
    fresh_engine.runtime.ensure()
    before = settle(fresh_engine)
    done = subprocess.run(
        [sys.executable, "-c", NO_BUSYBOX, str(base)],
        env=environment(fresh_engine),
        capture_output=True,
        text=True,
        timeout=60,
    )
    expect_error(done, 125, "no static busybox was found on this machine", "apt-get install busybox-static")
    assert differences(fresh_engine, before) == {}
    assert fresh_engine.check() == []
