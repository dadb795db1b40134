"""Automated builds, as Docker Hub has them: what is pushed to a git repository is built and published, with a log.

A local repository calls us from its `post-receive` hook (and `post-commit`, where it has a work tree), so that who
pushes sees the build; any other repository is asked now and then by one watcher process of the store.

    <store>/autobuilds/<id>/autobuild.json    what to build, and under which name to publish it
    <store>/autobuilds/<id>/builds.jsonl      one line per finished build
    <store>/autobuilds/<id>/<number>.log      what the build said

One build of an autobuild runs at a time; what was pushed meanwhile is built after it, as one: the newest commit.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ..building.sources import clone
from ..errors import BuildError, ConflictError, LabkernelError, NotFoundError, StoreError, UsageError
from ..oci import reference
from ..store import servers
from ..store.blobs import temporary_directory
from ..store.locks import Locks

if TYPE_CHECKING:
    from ..building.result import BuildStep
    from ..builds import Builds
    from ..images import Images
    from ..store.layout import Layout
    from .pushes import Pushes

LEAST_POLL_S = 1.0
_MARK = "# Written by labkernel: builds images of what is pushed. `labkernel registry autobuild rm` takes lines away."
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_START_TIMEOUT_S = 15.0
_ASKED_S = 2.0

Echo = Callable[[str], None]


class NoSuchAutobuild(NotFoundError):
    """No automated build has that id or name."""

    kind = "autobuild"
    listing = "registry autobuild ls"


@dataclass(frozen=True)
class Autobuild:
    """What is built. `poll_s` is None where the repository's hook calls us; `branch` None is the repository's own."""

    id: str
    repository: str
    name: str
    branch: str | None = None
    file: str = "Dockerfile"
    directory: str = ""
    build_args: Mapping[str, str] = field(default_factory=dict)
    push: bool = True
    poll_s: float | None = None

    @property
    def trigger(self) -> str:
        return "hook" if self.poll_s is None else f"every {self.poll_s:g} s"


class Build(NamedTuple):
    """A finished build. `status`: `published`, `built` (not pushed on purpose) or `failed`, then with `error`."""

    number: int
    commit: str
    subject: str
    started_at: float
    seconds: float
    status: str
    image: str = ""
    digest: str = ""
    error: str = ""


Log = list[Build]


class Autobuilds:
    """The automated builds of one store."""

    def __init__(
        self, layout: Layout, images: Images, builds: Callable[[], Builds], pushes: Callable[[], Pushes]
    ) -> None:
        self.layout = layout
        self._images = images
        self._builds = builds
        self._pushes = pushes
        self._locks = Locks(layout.locks)
        self._directory = layout.root / "autobuilds"

    # -- what there is ---------------------------------------------------------------------------------------------

    def add(
        self,
        repository: str,
        name: str,
        *,
        branch: str | None = None,
        file: str = "Dockerfile",
        directory: str = "",
        build_args: Mapping[str, str] | None = None,
        push: bool = True,
        poll_s: float | None = None,
    ) -> Autobuild:
        """Build `repository` (a path or an URL) on every push to `branch` and publish the image as `name`.

        A local repository gets a hook, unless `poll_s` says how often to ask it; an URL needs `poll_s`. `file` is the
        Dockerfile's path below `directory` of the repository. What is there now is built by the first `run`.
        Raises UsageError, ConflictError (a hook of somebody else's), InvalidReference.
        """
        wanted = reference.parse_tag(name)
        _check(branch, poll_s)
        is_local = os.path.isdir(os.path.expanduser(repository))
        where = os.path.abspath(os.path.expanduser(repository)) if is_local else repository
        made = Autobuild(
            secrets.token_hex(6), where, str(wanted), branch, file, directory, dict(build_args or {}), push, poll_s
        )
        find_commit(made)  # says what is wrong with the repository before anything is kept
        for other in self.list():
            if (other.repository, other.name, other.branch) == (where, made.name, branch):
                raise ConflictError(
                    f"{wanted.familiar} is built from {where} already", resolution=f"autobuild rm {other.id} first"
                )
        if poll_s is None and not is_local:
            raise UsageError(
                f"{repository} is not on this machine, so it cannot call us",
                resolution="--poll 60 asks it every minute",
            )
        place = self._directory / made.id
        place.mkdir(parents=True)
        (place / "autobuild.json").write_text(json.dumps(asdict(made), indent=1))
        if poll_s is None:
            try:
                for hook in _hooks_of(where):
                    _add_line(hook, made.id, self._line(made))
            except BaseException:
                self.remove(made.id)
                raise
        return made

    def list(self) -> list[Autobuild]:
        """All of them, oldest first."""
        found = []
        places = self._directory.glob("*/autobuild.json") if self._directory.is_dir() else ()
        for path in sorted(places, key=lambda path: path.stat().st_mtime):
            try:
                found.append(Autobuild(**json.loads(path.read_text())))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def get(self, wanted: str) -> Autobuild:
        """By id, unique prefix of an id, name, or repository. Raises NoSuchAutobuild, ConflictError for several."""
        try:
            name = str(reference.parse_tag(wanted))
        except LabkernelError:
            name = wanted
        paths = {wanted, os.path.abspath(os.path.expanduser(wanted))}
        found = [each for each in self.list() if each.name == name or each.repository in paths]
        found = found or [each for each in self.list() if wanted and each.id.startswith(wanted)]
        if not found:
            raise NoSuchAutobuild(wanted)
        if len(found) > 1:
            raise ConflictError(f"{wanted} is meant by {len(found)} autobuilds", resolution="give the id")
        return found[0]

    def remove(self, wanted: str) -> Autobuild:
        """Forget it, its log, and its line in the repository's hook. Images stay."""
        found = self.get(wanted)
        if found.poll_s is None and os.path.isdir(found.repository):
            for hook in _hooks_of(found.repository):
                _remove_line(hook, found.id)
        shutil.rmtree(self._directory / found.id, ignore_errors=True)
        return found

    def log(self, wanted: str) -> Log:
        """Finished builds, oldest first."""
        path = self._directory / self.get(wanted).id / "builds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [Build(**json.loads(line)) for line in lines]

    def output(self, wanted: str, number: int | None = None) -> str:
        """What a build said (the last without `number`), also one that still runs. Raises NoSuchAutobuild."""
        place = self._directory / self.get(wanted).id
        numbers = sorted(int(path.stem) for path in place.glob("*.log") if path.stem.isdigit())
        chosen = number if number is not None else numbers[-1] if numbers else None
        if chosen not in numbers:
            raise NoSuchAutobuild(f"{wanted}: no build {number}" if number is not None else f"{wanted}: no build yet")
        return (place / f"{chosen}.log").read_text(errors="replace")

    # -- building --------------------------------------------------------------------------------------------------

    def run(self, wanted: str, *, echo: Echo = lambda text: None, force: bool = False) -> Build | None:
        """Build what the branch has now, unless its newest commit was built last; None then, and for no branch yet.

        `echo` gets the log as it is written. A failure is recorded and returned, not raised.
        """
        found = self.get(wanted)
        with self._locks.exclusive(f"autobuild-{found.id}"):
            commit = find_commit(found)
            log = self.log(found.id)
            if commit is None or (log and log[-1].commit == commit and not force):
                return None
            number = len(log) + 1
            place = self._directory / found.id
            with (place / f"{number}.log").open("wb", buffering=0) as file:
                done = self._build(found, number, commit, _Journal(file, echo))
            with (place / "builds.jsonl").open("a") as out:
                out.write(json.dumps(done._asdict()) + "\n")
        return done

    def _build(self, found: Autobuild, number: int, commit: str, journal: _Journal) -> Build:
        familiar = reference.parse(found.name).familiar
        started, clock = time.time(), time.monotonic()
        status, image, digest, error, subject = "failed", "", "", "", ""
        journal.line(f"build {number} of {familiar}: commit {commit[:12]} of {found.repository}")
        try:
            with temporary_directory(self.layout, "autobuild") as work:
                context = clone(f"{found.repository}#{commit}:{found.directory}", work, keep_git=True)
                subject = _git("log", "-1", "--format=%s", commit, cwd=work / "work")
                shutil.rmtree(work / "work" / ".git", ignore_errors=True)
                result = self._builds().build(
                    _read_dockerfile(context, found.file),
                    context=context,
                    tags=[found.name],
                    build_args=found.build_args,
                    labels={"org.opencontainers.image.revision": commit},
                    on_step=journal.step,
                )
            image, status = result.image.id, "built"
            if found.push:
                status = "failed"
                digest = self._pushes().push(found.name, notify=journal.line).digest
                status = "published"
        except LabkernelError as err:
            error = err.brief
            journal.line("\n".join(err.render()))
        seconds = time.monotonic() - clock
        at = f" as {familiar}@{digest}" if digest else ""
        journal.line(f"build {number}: {status}{at} in {seconds:.1f} s")
        return Build(number, commit, subject, started, round(seconds, 3), status, image, digest, error)

    # -- polling ---------------------------------------------------------------------------------------------------

    def watch(self, *, echo: Echo = lambda text: None, ended: Callable[[float], bool] | None = None) -> None:
        """Ask the polled repositories, each at its own pace, until none is left or `ended(seconds)`, which sleeps, says
        so. Raises ConflictError when another process of this store does it."""
        sleep = ended or _sleep
        due: dict[str, float] = {}
        with ExitStack() as stack:
            try:
                # Not at once: who asks whether somebody watches holds it for a moment, too, as who waits for this does.
                stack.enter_context(self._locks.exclusive("autobuild-watch", timeout_s=_ASKED_S))
            except StoreError:
                raise ConflictError("another process watches the repositories already") from None
            record = self.layout.runtime_dir / "autobuild-watch.pid"
            record.write_text(str(os.getpid()))
            try:
                while polled := [each for each in self.list() if each.poll_s is not None]:
                    now = time.monotonic()
                    for each in polled:
                        if due.get(each.id, 0.0) <= now:
                            self._try(each, echo)
                            due[each.id] = time.monotonic() + (each.poll_s or LEAST_POLL_S)
                    waits = [due[each.id] - time.monotonic() for each in polled]
                    if sleep(min(max(0.0, min(waits)), LEAST_POLL_S)):
                        return
            finally:
                record.unlink(missing_ok=True)

    def start_watching(self) -> int:
        """Watch in a process of its own, unless one does; its pid. Raises BuildError when it does not start."""
        if (pid := self.watcher()) is not None:
            return pid
        return servers.start(
            self.layout,
            ["registry", "autobuild", "watch"],
            log="autobuild-watch.log",
            find=lambda _: self.watcher(),
            failure=lambda said: BuildError("the watcher did not start", details=said),
            timeout_s=_START_TIMEOUT_S,
        )

    def watcher(self) -> int | None:
        """The pid of the process that watches; None when none does."""
        with self._locks.try_exclusive("autobuild-watch") as free:
            if free:
                return None
        try:
            return int((self.layout.runtime_dir / "autobuild-watch.pid").read_text())
        except (OSError, ValueError):
            return None

    def stop_watching(self) -> bool:
        """End the watcher, once it has done with what it builds; False when there was none."""
        pid = self.watcher()
        if pid is None:
            return False
        try:
            servers.end(pid, timeout_s=_START_TIMEOUT_S, kill=False)
        except ProcessLookupError:
            return False
        return True

    def _try(self, each: Autobuild, echo: Echo) -> None:
        try:
            self.run(each.id, echo=echo)
        except LabkernelError as err:  # a repository that does not answer is asked again
            echo(f"{each.repository}: {err.brief}\n")

    def _line(self, made: Autobuild) -> str:
        words = {
            "LABKERNEL_ROOT": str(self.layout.root),
            "LABKERNEL_RUNTIME_DIR": str(self.layout.runtime_dir),
        }
        env = " ".join(f"{key}={_quoted(value)}" for key, value in words.items())
        # What a hook is given on its stdin belongs to all lines: none of ours reads it.
        return f"{env} {_quoted(sys.executable)} -m labkernel.cli registry autobuild run {made.id} </dev/null || true"


class _Journal:
    """A build's log: to its file, and to who looks on."""

    def __init__(self, file: BinaryIO, echo: Echo) -> None:
        self._file = file
        self._echo = echo

    def text(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "replace"))
        try:
            self._echo(text)
        except OSError:  # who pushed has gone: the build goes on
            self._echo = lambda text: None

    def line(self, text: str) -> None:
        self.text(f"{text}\n")

    def step(self, step: BuildStep) -> None:
        if step.status == "started":
            self.line(f"step {step.number}/{step.total}: {step.text}")
        elif step.status == "cached":
            self.line("  cached")
        elif step.status == "output":
            self.text(bytes(step.output).decode(errors="replace"))


def _check(branch: str | None, poll_s: float | None) -> None:
    if shutil.which("git") is None:
        raise UsageError("there is no git on this machine", resolution="install git")
    if poll_s is not None and poll_s < LEAST_POLL_S:
        raise UsageError(f"polling every {poll_s:g} s", resolution=f"{LEAST_POLL_S:g} s or more")
    if branch is not None and (branch.startswith("-") or branch != branch.strip() or not branch):
        raise UsageError(f"not a branch: {branch!r}")


def find_commit(found: Autobuild) -> str | None:
    """The newest commit of the branch; None where it has none yet. Raises BuildError for what is no repository."""
    ref = f"refs/heads/{found.branch}" if found.branch else "HEAD"
    for line in _git("ls-remote", "--", found.repository, ref).splitlines():
        commit, _, name = line.partition("\t")
        if name == ref and _COMMIT.fullmatch(commit):
            return commit
    return None


def _git(*words: str, cwd: Path | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["git", *words], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise BuildError(
            f"git {words[0]} failed: {said[0] if said else f'status {done.returncode}'}",
            details="\n".join(said[-10:]) or None,
            resolution="give the path or the URL of a git repository",
        )
    return done.stdout.decode(errors="replace").strip()


def _read_dockerfile(context: Path, file: str) -> str:
    path = Path(os.path.realpath(context / file.lstrip("/")))
    if not path.is_relative_to(context.resolve()):
        raise UsageError(f"forbidden path outside the repository: {file}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as err:
        raise BuildError(
            f"the commit has no {file}: {(err.strerror or 'unreadable').lower()}", resolution="--file names another one"
        ) from None
    except UnicodeDecodeError:
        raise BuildError(f"{file} is not UTF-8 text") from None


def _hooks_of(repository: str) -> list[Path]:
    """The hooks that a push, and where there is a work tree a commit, runs."""
    base = Path(repository)
    hooks = base / _git("rev-parse", "--git-path", "hooks", cwd=base)
    bare = _git("rev-parse", "--is-bare-repository", cwd=base) == "true"
    return [hooks / name for name in (("post-receive",) if bare else ("post-receive", "post-commit"))]


def _add_line(hook: Path, id: str, line: str) -> None:
    text = hook.read_text(errors="replace") if hook.exists() else ""
    if text and _MARK not in text:
        raise ConflictError(
            f"{hook} is a hook of its own", resolution=f"--poll 60 needs no hook; or add this line to it: {line}"
        )
    lines = text.splitlines() or ["#!/bin/sh", _MARK]
    _write_hook(hook, [*lines, f"{line}  # {id}"])


def _remove_line(hook: Path, id: str) -> None:
    text = hook.read_text(errors="replace") if hook.exists() else ""
    if _MARK not in text:
        return
    lines = [line for line in text.splitlines() if not line.endswith(f"# {id}")]
    if len(lines) > 2:
        _write_hook(hook, lines)
    else:
        hook.unlink()


def _write_hook(hook: Path, lines: list[str]) -> None:
    try:
        hook.parent.mkdir(parents=True, exist_ok=True)
        temporary = hook.with_name(f".{hook.name}-{secrets.token_hex(4)}")
        temporary.write_text("\n".join([*lines, ""]))
        temporary.chmod(0o755)
        os.replace(temporary, hook)
    except OSError as err:
        raise UsageError(
            f"cannot write {hook}: {err.strerror}", resolution="--poll 60 asks the repository instead"
        ) from err


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
