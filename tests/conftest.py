"""Shared fixtures: engines on throw-away stores, plain system users, and the check that nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkernel.engine import Engine
from labkernel.linux.trees import remove_tree

REPO = Path(__file__).resolve().parent.parent
PLAIN_UID = 23456
BASES: list[Path] = []
"""The throw-away stores of this session, by which its traces are told from another session's."""


@pytest.fixture(scope="session")
def data() -> Path:
    return REPO / "tests" / "data"


def _short_dir(prefix: str) -> Path:
    # Unix socket paths end at about 107 bytes, so stores of tests lie in a short place instead of tmp_path.
    BASES.append(Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp")))
    return BASES[-1]


def _remove(engine: Engine, base: Path) -> None:
    engine.runtime.shutdown(force=True)
    engine.close()
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[Engine]:
    """One engine for tests that only read or that clean up after themselves; its base image is there."""
    base = _short_dir("lk-s-")
    engine = Engine.open(base / "root", runtime_dir=base / "run")
    yield engine
    _remove(engine, base)


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine; containers and volumes a test leaves are removed after it."""
    before = {volume.name for volume in shared_engine.volumes.list()}
    yield shared_engine
    for container in shared_engine.containers.list(all=True):
        container.remove(force=True, v=True)
    for volume in shared_engine.volumes.list():
        if volume.name not in before:
            volume.remove(force=True)


@pytest.fixture
def fresh_engine() -> Iterator[Engine]:
    """An engine of its own, for tests that break things."""
    base = _short_dir("lk-f-")
    fresh = Engine.open(base / "root", runtime_dir=base / "run")
    yield fresh
    _remove(fresh, base)


@pytest.fixture(scope="module")
def module_engine() -> Iterator[Engine]:
    """An engine of a module's own, for tests that share what they break."""
    base = _short_dir("lk-m-")
    own = Engine.open(base / "root", runtime_dir=base / "run")
    yield own
    _remove(own, base)


@pytest.fixture(scope="module")
def vm_lab(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine where it can have virtual machines; a module leaves none of its own behind."""
    for capability in shared_engine.vms.probe():
        if not capability.ok and capability.name != "vm kvm":
            pytest.skip(f"{capability.name}: {capability.cause}")
    yield shared_engine
    for vm in shared_engine.vms.list(all=True):
        vm.remove(force=True, v=True)


@pytest.fixture
def needs(shared_engine: Engine) -> Callable[..., None]:
    """`needs("overlay", "cgroup memory")` skips the test with the probe's own reason."""

    def check(*names: str) -> None:
        found = {capability.name: capability for capability in shared_engine.doctor()}
        for name in names:
            capability = found.get(name)
            assert capability is not None, f"no such capability: {name}; the probe knows {sorted(found)}"
            if not capability.ok:
                pytest.skip(f"{name}: {capability.cause}")

    return check


@pytest.fixture
def many_ids(shared_engine: Engine) -> None:
    """For tests in which containers run as, or own files as, somebody beside the container's root."""
    if shared_engine.driver.id_mapping == "single":
        pytest.skip("containers have one id here: this user has no subordinate ids (/etc/subuid)")


@pytest.fixture(scope="session")
def user_name() -> str:
    """The name of the user of these tests, without which ssh's programs do not work."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        pytest.skip(f"user {os.getuid()} has no name: ssh refuses to work for it")


class PlainUser:
    """Runs commands as a system user without root, with a home and a store of its own."""

    def __init__(self, home: Path, repo: Path) -> None:
        self.home = home
        self.repo = repo
        self.env = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(repo),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LABKERNEL_ROOT": str(home / "root"),
            "LABKERNEL_RUNTIME_DIR": str(home / "run"),
        }

    def argv(self, *command: str) -> list[str]:
        if os.geteuid() != 0:
            return list(command)
        return ["setpriv", f"--reuid={PLAIN_UID}", f"--regid={PLAIN_UID}", "--clear-groups", "--", *command]

    def run(self, *command: str, timeout_s: float = 120, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            self.argv(*command),
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            **kwargs,
        )

    def labkernel(self, *words: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "labkernel.cli", *words, **kwargs)

    def python(self, *words: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, *words, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def plain_user() -> Iterator[PlainUser]:
    """A user without root: as root another uid, otherwise the tests' own. Skips where it cannot read the code."""
    home = _short_dir("lk-u-")
    if os.geteuid() == 0:
        os.chown(home, PLAIN_UID, PLAIN_UID)
    user = PlainUser(home, REPO)
    seen = user.python("-c", "import labkernel")
    if seen.returncode != 0:
        shutil.rmtree(home)
        pytest.skip(f"a plain user cannot read this checkout or its interpreter: {seen.stderr.strip()[-200:]}")
    yield user
    user.python("-c", "import labkernel; labkernel.connect().runtime.shutdown(force=True)")
    # Files of subordinate ids are removed by the engine; what is left belongs to the user, closed directories, too.
    remove_tree(str(home))


@pytest.fixture(autouse=True)
def main_module_stays() -> Iterator[None]:
    """An IPython shell puts a module of its own in the place of __main__; multiprocessing wants the one started."""
    before = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = before


# -- nothing is left behind ------------------------------------------------------------------------------------------


def _processes() -> Iterator[tuple[int, str]]:
    """Pid and words of every live process of the engine and every QEMU."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and any(
            name in words for name in ("labkernel.runtime", "labkernel supervisor of", "qemu-system")
        ):
            yield int(process.name), words


def _groups() -> Iterator[str]:
    # os.walk, unlike Path.glob, bears that others remove their groups meanwhile
    for folder, _names, _files in os.walk("/sys/fs/cgroup"):
        if "labkernel" in folder.split("/"):
            yield folder


def _bridges() -> Iterator[str]:
    for link in Path("/sys/class/net").glob("lk*"):
        try:
            yield f"bridge {link.name}: {(link / 'ifalias').read_text().strip()}"
        except OSError:
            continue


def _traces() -> set[str]:
    """What the engine could leave on a machine: mounts, cgroups, bridges, and processes of its own."""
    found = {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    found |= {f"cgroup {path}" for path in _groups()} | set(_bridges())
    return found | {f"process {pid} {words[:300]}" for pid, words in _processes()}


def _is_ours(trace: str) -> bool:
    """Whether a trace is of this session. Where nothing else runs (CI) every trace is."""
    if os.environ.get("CI"):
        return True
    hashes = {hashlib.sha256(os.fsencode(base / "root")).hexdigest()[:8] for base in BASES}
    return any(str(base) in trace for base in BASES) or any(f"/{each}" in trace for each in hashes)


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    before = _traces()
    yield
    deadline = time.monotonic() + 60
    # Teardown after the answer is the engine's design, so it is waited for, with an end.
    while (left := {trace for trace in _traces() - before if _is_ours(trace)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"the tests left behind: {sorted(left)}"
