"""`labkernel system check`: what is inconsistent in the store, or leaked outside it. Looks only; changes nothing.

Each problem names what it is about and what mends it. A database row whose container directory is gone is no problem
(a container that removed itself; the row is dropped when it is met), nor is a file in `tmp/` that its writer still
locks, nor a cgroup of the warm pool.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import CorruptBlob, LabkernelError
from .linux import cgroups
from .runtime.driver import cgroup_parent
from .store.catalog import HOST_LAYER, Catalog
from .store.locks import is_abandoned, is_locked, try_flock
from .store.servers import start_ticks

if TYPE_CHECKING:
    from .engine import Engine

PRUNE = "`labkernel system prune -f` removes leftovers"
REBUILD = "remove the image and build, load or import it again"
# A container being created has its directory a moment before its row; one being removed the other way round.
SETTLING_S = 60.0
# A supervisor that has just begun removes what its killed predecessor's waiting children leave, once they are gone.
SWEEPING_S = 10.0


class Problem(NamedTuple):
    """One finding: `kind` is `database`, `image`, `layer`, `container`, `vm`, `temporary`, `mount`, `cgroup`, `network`
    or `process`."""

    kind: str
    subject: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: {self.message} ({self.remedy})"


def check(engine: Engine, *, verify: bool = False) -> list[Problem]:
    """Everything that is wrong, worst first. With `verify` every blob is read and hashed, which takes a while."""
    looks = (_database, _images, _layers, _containers, _machines, _temporary, _mounts, _cgroups, _networks)
    found = [problem for look in looks for problem in look(engine)]
    return [*found, *_blobs(engine)] if verify else found


def _database(engine: Engine) -> Iterator[Problem]:
    for line in engine.db.check():
        yield Problem("database", str(engine.layout.database), line, "restore it from a backup, or start a new store")


def _images(engine: Engine) -> Iterator[Problem]:
    catalog = Catalog(engine.db)
    for row in catalog.all():
        named = [(row.id, "config"), (row.manifest, "manifest")]
        named += [(layer.digest, "layer") for layer in catalog.layers(row.id) if layer.media_type != HOST_LAYER]
        for digest, what in named:
            if not engine.blobs.has(digest):
                yield Problem("image", row.id[7:19], f"its {what} {digest} is missing", REBUILD)


def _blobs(engine: Engine) -> Iterator[Problem]:
    for digest in engine.blobs:
        try:
            engine.blobs.verify(digest)
        except CorruptBlob as err:
            yield Problem("image", digest, err.brief, REBUILD)


def _layers(engine: Engine) -> Iterator[Problem]:
    recorded = {row["diff_id"] for row in engine.db.query("SELECT diff_id FROM layers")}
    present = {f"sha256:{path.name}": path for path in engine.layout.layers.iterdir()}
    for diff_id in sorted(recorded - set(present)):
        yield Problem("layer", diff_id[7:19], "recorded as unpacked, but its directory is gone", "use the image again")
    needed = Catalog(engine.db).needed_layers()
    for diff_id in sorted(set(present) - needed - recorded):
        if _is_old(present[diff_id]):
            yield Problem("layer", diff_id[7:19], "unpacked, but nothing names it", PRUNE)


def _containers(engine: Engine) -> Iterator[Problem]:
    rows = {row["id"] for row in engine.db.query("SELECT id FROM containers")}
    for directory in engine.layout.containers.iterdir():
        name = directory.name
        if name not in rows and (is_abandoned(directory) or (_is_old(directory) and not is_locked(directory))):
            yield Problem("container", name[:12], "a directory that no container owns", PRUNE)
    yield from _states(engine.layout.socket.exists(), engine.layout.containers, "container")


def _machines(engine: Engine) -> Iterator[Problem]:
    for directory in engine.vms.leftovers():
        yield Problem("vm", directory.name[:12], "a directory that no machine owns", PRUNE)
    yield from _states(engine.layout.socket.exists(), engine.layout.vm / "machines", "vm")


def _states(supervised: bool, place: Path, kind: str) -> Iterator[Problem]:  # noqa: FBT001
    """What state files say and what runs."""
    remove, look = (
        ("labkernel rm -f", "labkernel ps") if kind == "container" else ("labkernel vm rm -f", "labkernel vm ps")
    )
    for directory in place.iterdir():
        name = directory.name
        try:
            state = json.loads((directory / "state.json").read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as err:
            yield Problem(kind, name[:12], f"its state cannot be read: {err}", f"{remove} {name[:12]}")
            continue
        if state["status"] in ("running", "paused"):
            alive = start_ticks(state["pid"]) == state["pid_start"]
            if alive and not supervised:
                yield Problem("process", str(state["pid"]), f"{kind} {name[:12]} has no supervisor", look)
            if not alive and not _changed_since(directory / "state.json", state):
                yield Problem(kind, name[:12], "said to run, but its process is gone", f"{look} -a")


def _changed_since(path: Path, seen: dict[str, object]) -> bool:
    """Whether the container has ended between the two looks: asked again after the supervisor could have told."""
    time.sleep(0.2)
    try:
        return bool(json.loads(path.read_bytes()) != seen)
    except (OSError, ValueError):
        return True


def _temporary(engine: Engine) -> Iterator[Problem]:
    for path in engine.layout.tmp.iterdir():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if try_flock(fd) and path.exists():
                yield Problem("temporary", path.name, "left by a process that died while writing", PRUNE)
        finally:
            os.close(fd)


def _mounts(engine: Engine) -> Iterator[Problem]:
    roots = (f"{engine.layout.root}/", f"{engine.layout.runtime_dir}/")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(roots):
            yield Problem("mount", point, "mounted on the host, where nothing of ours should be", f"umount {point}")


def _cgroups(engine: Engine) -> Iterator[Problem]:
    """Groups below our parent that no container is in: more than the warm pool waits in is a leak."""
    deadline = time.monotonic() + SWEEPING_S
    try:
        while (found := list(_spare_groups(engine))) and time.monotonic() < deadline:
            if not engine.layout.socket.exists():
                break  # nobody removes them
            time.sleep(0.1)
    except LabkernelError as err:
        yield Problem("process", "supervisor", err.brief, "end it; the next command starts another")
        return
    for path in found:
        yield Problem("cgroup", path, "no container is in it", f"rmdir {path}")


def _spare_groups(engine: Engine) -> Iterator[str]:
    """Paths of groups that neither a container nor the warm pool needs. Raises LabkernelError without a supervisor."""
    hierarchy = cgroups.detect()
    parent = cgroup_parent(engine.layout).strip("/")
    used, warm = set[str](), 0
    if engine.layout.socket.exists():
        warm = engine.runtime.ensure().warm
        for state in engine.runtime.states().values():
            used |= set(((state.get("cgroup") or {}).get("paths") or {}).values())
    for base in sorted(set(hierarchy.bases.values())):
        try:
            groups = [entry.path for entry in os.scandir(f"{base}/{parent}") if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        spare = [path for path in groups if path not in used]
        yield from spare[warm:]


def _networks(engine: Engine) -> Iterator[Problem]:
    from .networking.check import find_leaks

    for name in find_leaks(engine.networks):
        yield Problem("network", name, "no container uses it", PRUNE)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat(follow_symlinks=False).st_mtime > SETTLING_S
    except OSError:
        return False
