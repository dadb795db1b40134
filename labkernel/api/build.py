"""The classic builder's protocol: a context as tar, parameters in the query, and docker's stream of steps.

Source: Docker Engine API, ImageBuild, BuildPrune. What docker's CLI and SDKs look for in the stream: `Step N/M : …`,
` ---> Using cache`, `Successfully built ID`, `Successfully tagged NAME`, `aux.ID`, `errorDetail.code`.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..builds import BuildOptions
from ..errors import BuildError, DockerfileError, LabkernelError, UsageError
from .call import Call
from .errors import ApiError
from .records import Emit, error_record, send
from .routes import Route

if TYPE_CHECKING:
    from ..building.result import BuildStep

_BLOCK = 512
# Settings of a RUN's container; 0 is what clients send when they were not asked for.
_NUMBERS = {
    "memswap": "memswap_limit",
    "cpushares": "cpu_shares",
    "cpuperiod": "cpu_period",
    "cpuquota": "cpu_quota",
    "shmsize": "shm_size",
}
_WORDS = {"cpusetcpus": "cpuset_cpus", "cpusetmems": "cpuset_mems"}
_NOT_APPLIED = {"cgroupparent": "--cgroup-parent", "isolation": "--isolation"}


class Steps:
    """Tells the steps of a build in the classic builder's words."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self.failed = ""

    def say(self, text: str) -> None:
        self._emit({"stream": text})

    def __call__(self, step: BuildStep) -> None:
        if step.status == "started":
            self.say(f"Step {step.number}/{step.total} : {step.text}")
            self.say("\n")
        elif step.status == "output":
            decoder = self._decoders.setdefault(step.number, codecs.getincrementaldecoder("utf-8")("replace"))
            text = decoder.decode(bytes(step.output))
            if text:
                self.say(text)
        elif step.status == "cached" and not step.text.upper().startswith("FROM"):
            self.say(" ---> Using cache\n")
        elif step.status == "failed":
            self.failed = step.text
        if step.status in ("cached", "done") and step.layer:
            self.say(f" ---> {step.layer.partition(':')[2][:12]}\n")


def _failure(steps: Steps, err: Exception) -> dict[str, Any]:
    """The last record of a build that failed; a RUN's status is what the CLI ends with."""
    status = getattr(err, "status", None) if isinstance(err, BuildError) else None
    if not status:
        record = error_record(err)
        details = err.details if isinstance(err, LabkernelError) else None
        return {**record, **({"details": details} if details else {})}
    command = steps.failed.partition(" ")[2].strip() or "RUN"
    words = command if command.startswith("[") else f"/bin/sh -c {command}"
    message = f"The command '{words}' returned a non-zero code: {status}"
    return {"errorDetail": {"code": status, "message": message}, "error": message}


async def build(call: Call) -> Any:
    """POST /build."""
    version = call.query("version", "1")
    if version == "2":
        from .buildkit import build as with_session

        return await with_session(call)
    if version not in ("", "1"):
        raise UsageError(f"invalid builder version {version}")
    told: list[Steps] = []

    def work(emit: Emit) -> None:
        quiet = call.flag("q")
        steps = Steps((lambda record: None) if quiet else emit)
        told.append(steps)
        with _prepared(call, steps) as (text, settings):
            result = call.engine.builds.build(text, on_step=steps, **settings)
        for warning in result.warnings:
            steps.say(f"[Warning] {warning}\n")
        if quiet:
            emit({"stream": f"{result.image.id}\n"})
            return
        emit({"aux": {"ID": result.image.id}})
        steps.say(f"Successfully built {result.image.id.partition(':')[2][:12]}\n")
        for name in settings["tags"]:
            steps.say(f"Successfully tagged {name if ':' in name.rpartition('/')[2] else f'{name}:latest'}\n")

    await send(call, work, failure=lambda err: _failure(told[0], err) if told else error_record(err))
    return None


@contextmanager
def _prepared(call: Call, steps: Steps) -> Iterator[tuple[str, dict[str, Any]]]:
    """The Dockerfile and the arguments of `Builds.build`, while the context is there."""
    settings = settings_of(call)
    for key, flag in _NOT_APPLIED.items():
        if call.query(key) not in ("", "0", "default"):
            steps.say(f"[Warning] {flag} is not applied to the steps of a build\n")
    moments: list[int] = []
    with _context(call, moments.append, keep_git=keeps_git(settings)) as found:
        settings["options"] = replace(settings["options"], context_epoch_s=moments[-1] if moments else None)
        if isinstance(found, bytes):
            yield found.decode("utf-8-sig", "replace"), settings
            return
        name = call.query("dockerfile") or "Dockerfile"
        text, path = read_dockerfile(found, name)
        ignore = path.with_name(f"{path.name}.dockerignore")
        if ignore.is_file() and not ignore.is_symlink():
            settings["ignore"] = ignore.read_text(errors="replace")
        settings["context"] = found
        yield text, settings


@contextmanager
def _context(call: Call, told: Callable[[int], None], *, keep_git: bool | None) -> Iterator[Path | bytes]:
    """The directory of the context, or the Dockerfile that came instead of one; `told` is given its moment."""
    from ..building.sources import git_context, is_git, is_url, stream_context, url_context

    remote, layout = call.query("remote"), call.engine.layout
    if remote == "client-session":
        raise UsageError("contexts from a session need BuildKit")
    if remote and is_git(remote):
        with git_context(layout, remote, keep_git=keep_git, told=told) as path:
            yield path
    elif remote and is_url(remote):
        with url_context(layout, remote, told) as found:
            yield found
    elif remote:
        # docker takes `github.com/user/repository` for a repository, too
        source = f"https://{remote}" if remote.startswith("github.com/") else remote
        with git_context(layout, source, keep_git=keep_git, told=told) as path:
            yield path
    else:
        with stream_context(layout, _Ended(call.reader()), told=told) as found:  # type: ignore[arg-type]
            yield found


def keeps_git(settings: Mapping[str, Any]) -> bool | None:
    """Whether the build arguments ask for the .git of a git context; None leaves that to its URL."""
    return settings["build_args"].get("BUILDKIT_CONTEXT_KEEP_GIT_DIR", "").lower() in ("1", "t", "true") or None


class _Ended(io.RawIOBase):
    """A context with the end that a tar has: docker's CLI leaves out the last padding and the two zero blocks when it
    puts a Dockerfile of stdin into the context."""

    def __init__(self, source: io.RawIOBase) -> None:
        self._source = source
        self._count = 0
        self._head = b""
        self._rest: bytes | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._rest is None:
            count = self._source.readinto(buffer) or 0
            if count:
                self._count += count
                if len(self._head) < _BLOCK:
                    self._head += bytes(buffer[: min(count, _BLOCK)])
                return count
            plain = self._head[257:262] == b"ustar"
            self._rest = bytes(-self._count % _BLOCK + 2 * _BLOCK) if plain else b""
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def read_dockerfile(context: Path, name: str) -> tuple[str, Path]:
    clean = posixpath.normpath("/" + name).lstrip("/")
    path = Path(os.path.realpath(context / clean))
    if not path.is_relative_to(context.resolve()):
        raise UsageError(f"forbidden path outside the build context: {name}")
    if clean == "Dockerfile" and not path.exists() and (context / "dockerfile").exists():
        path = context / "dockerfile"
    try:
        return path.read_bytes().decode("utf-8-sig"), path
    except UnicodeDecodeError:
        raise DockerfileError(f"{name}: not UTF-8 text") from None
    except OSError:
        # docker's CLI shows this sentence as it is
        raise ApiError(500, f"Cannot locate specified Dockerfile: {name}") from None


def settings_of(call: Call) -> dict[str, Any]:
    network = call.query("networkmode") or "default"
    if network in ("bridge", ""):
        network = "default"
    if call.flag("squash"):
        raise UsageError("squash is not available: build stages, and COPY --from them")
    extra = [word.replace("=", ":", 1) for given in call.queries("extrahosts") for word in _list(given)]
    options = BuildOptions(
        pull=call.flag("pull"),
        extra_hosts=extra,
        memory_bytes=max(0, call.number("memory") or 0),
        limits=_limits(call),
        platform=call.query("platform") or None,
        stopping=call.on_gone,
    )
    return {
        "tags": [name for name in call.queries("t") if name],
        "build_args": {key: str(value) for key, value in _mapping(call, "buildargs").items() if value is not None},
        "labels": {key: str(value) for key, value in _mapping(call, "labels").items()},
        "target": call.query("target") or None,
        "no_cache": call.flag("nocache"),
        "network": network,
        "options": options,
    }


def _limits(call: Call) -> dict[str, Any]:
    """Raises UsageError."""
    found: dict[str, Any] = {ours: number for key, ours in _NUMBERS.items() if (number := call.number(key))}
    found |= {ours: word for key, ours in _WORDS.items() if (word := call.query(key))}
    ulimits = call.document("ulimits")
    if ulimits:
        try:
            found["ulimits"] = {str(each["Name"]): (int(each["Soft"]), int(each["Hard"])) for each in ulimits}
        except (TypeError, KeyError, ValueError):
            raise UsageError("invalid ulimits: not a list of limits") from None
    return found


def _mapping(call: Call, name: str) -> dict[str, Any]:
    found = call.document(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"invalid {name}: not an object")
    return found


def _list(text: str) -> list[str]:
    """A word, or (as some SDKs send it) a JSON list of words."""
    if text.startswith("["):
        try:
            return [str(item) for item in json.loads(text)]
        except ValueError:
            raise UsageError("invalid extrahosts: not JSON") from None
    return [text] if text else []


def prune(call: Call) -> Any:
    keep_bytes = call.number("reserved-space") or call.number("keep-storage") or 0
    done = call.engine.builds.prune(call.filters(), keep_bytes=keep_bytes)
    return {"CachesDeleted": [record.id for record in done["Records"]], "SpaceReclaimed": done["SpaceReclaimed"]}


def cancel(call: Call) -> Any:
    # A build ends when its connection does; there is none to be cancelled by name.
    if not call.query("id"):
        raise UsageError("build ID not provided")
    return call.answer(200)


ROUTES = (
    Route("POST", "/build", build, bulk=True),
    Route("POST", "/build/prune", prune, since=(1, 31), slow=True),
    Route("POST", "/build/cancel", cancel, since=(1, 39)),
)
