"""One build for a BuildKit client, whichever way it asked: files come through its session, what happens goes back as
BuildKit's progress messages, and the result goes into the store, to a registry or back to the client.

Source: BuildKit, the frontend "dockerfile.v0", the exporters, "filesync", "secrets", "auth", "upload".
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..building.sources import git_context, is_git, is_url, stream_context, url_context
from ..building.targets import targets
from ..dockerfile.ignorefile import read_ignorefile
from ..errors import UsageError
from ..imaging.lookups import GivenLogins, login_of
from ..imaging.pulls import Pulls, parse_name
from ..imaging.pushes import Pushes
from ..store.blobs import temporary_directory
from . import protobuf
from .agentforward import forwarded_agents, wanted_agents
from .build import keeps_git, read_dockerfile
from .contexts import named_contexts
from .filesend import send_directory, send_tar
from .filesync import receive
from .session import CallFailed, Session
from .trace import Trace

if TYPE_CHECKING:
    from ..engine import Engine

GET_SECRET = "/moby.buildkit.secrets.v1.Secrets/GetSecret"
CREDENTIALS = "/moby.filesync.v1.Auth/Credentials"
PULL = "/moby.upload.v1.Upload/Pull"
UPLOADED = "http://buildkit-session/"
_LOAD = "[internal] load build definition from {}"
_HUB = "https://index.docker.io/v1/"


@dataclass
class Wanted:
    """A build as its client asked for it. `settings`: arguments of `Builds.build`; `remote`: a context elsewhere;
    `upload`: the context itself, as a tar or a Dockerfile; `local`: how the client calls its own directories;
    `own_dockerfile`: the Dockerfile is the client's even where the context is elsewhere; `not_applied`: flags that a
    step's container is not given."""

    session: Session
    settings: dict[str, Any]
    dockerfile: str = "Dockerfile"
    remote: str = ""
    upload: BinaryIO | None = None
    local: Mapping[str, str] = field(default_factory=lambda: {"context": "context", "dockerfile": "dockerfile"})
    contexts: Mapping[str, str] = field(default_factory=dict)
    own_dockerfile: bool = False
    not_applied: Sequence[str] = ()
    text: str = ""
    """The Dockerfile, once it is here."""


@dataclass(frozen=True)
class Export:
    """Where a result goes. `kind`: image (the store), local, tar, docker or oci; `number`: which of its outputs this is
    to the client."""

    kind: str
    names: Sequence[str] = ()
    push: bool = False
    number: int = 0


@dataclass
class Solved:
    """An image of the store that is nobody's yet."""

    image: str
    warnings: Sequence[str] = ()


class SessionSecrets(Mapping[str, bytes]):
    """Secrets that are asked of the client when a RUN wants them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[str, bytes] = {}

    def __getitem__(self, id: str) -> bytes:
        if id not in self._known:
            if GET_SECRET not in self._session.methods:
                raise KeyError(id)
            try:
                answer = self._session.call(GET_SECRET, protobuf.encode([(1, id)]))
            except CallFailed as err:
                raise KeyError(f"{id}: {err.brief}") from None
            self._known[id] = protobuf.data(protobuf.decode(answer), 1)
        return self._known[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def solve(engine: Engine, wanted: Wanted, trace: Trace) -> Solved:
    """Build. Hold `engine.images.adding()` until the result has been exported."""
    settings = dict(wanted.settings)
    if len(targets(settings["options"].platform)) > 1:
        raise UsageError(
            "a BuildKit client gets one platform at a time here",
            resolution="`labkernel build --platform A,B` makes an index",
        )
    with temporary_directory(engine.layout, "session") as work, ExitStack() as stack:
        text = wanted.text = prepare(engine, wanted, trace, work, settings, stack)
        settings["secrets"] = SessionSecrets(wanted.session)
        with (
            tempfile.TemporaryDirectory(prefix="lk-a-") as sockets,
            forwarded_agents(wanted.session, wanted_agents(text), Path(sockets)) as settings["ssh"],
            named_contexts(engine, wanted, trace, work / "named") as settings["contexts"],
        ):
            try:
                result = engine.builds.build(text, on_step=trace.step, **settings)
            except Exception as err:
                trace.failed(err)
                raise
    warnings = [*result.warnings, *(f"{flag} is not applied to the steps of a build" for flag in wanted.not_applied)]
    if trace.warnings_apart:
        trace.warnings(_LOAD.format(wanted.dockerfile), warnings)
    return Solved(str(result.image.id), warnings)


def export(engine: Engine, session: Session, solved: Solved, outputs: Sequence[Export], trace: Trace) -> dict[str, str]:
    """Carry out all outputs; what there is to say of the result, as BuildKit's exporters say it."""
    said = {"containerimage.config.digest": solved.image, "containerimage.digest": solved.image}
    for output in outputs:
        if output.kind == "image":
            with trace.doing("exporting to image") as key:
                _name(engine, solved.image, output, trace, key)
                _tell_warnings(trace, key, solved)
            said["image.name"] = ",".join(output.names)
            if output.push:
                for name in output.names:
                    said["containerimage.digest"] = _push(engine, session, name, trace)
        else:
            title = "client" if output.kind in ("local", "tar") else f"{output.kind} image format"
            with trace.doing(f"exporting to {title}") as key:
                size = _send(engine, session, solved.image, output)
                trace.status(key, f"copying files {size}B", size, ended=True)
                _tell_warnings(trace, key, solved)
    return said


def _tell_warnings(trace: Trace, key: str, solved: Solved) -> None:
    if not trace.warnings_apart:
        trace.warnings(key, solved.warnings)


def _name(engine: Engine, image: str, output: Export, trace: Trace, key: str) -> None:
    trace.status(key, f"writing image {image}", 0, ended=True)
    for name in output.names:
        engine.images.tag(image, name)
        trace.status(key, f"naming to {name if ':' in name.rpartition('/')[2] else f'{name}:latest'}", 0, ended=True)


def _send(engine: Engine, session: Session, image: str, output: Export) -> int:
    """Send a result to the client; bytes sent."""
    with temporary_directory(engine.layout, "session") as work:
        if output.kind == "local":
            engine.builds.export_directory(image, work / "output")
            return send_directory(session, work / "output", output.number)
        with open(work / "output", "w+b") as file:
            if output.kind == "tar":
                engine.images.export_rootfs(image, file)
            else:
                # A reference, not a tag: naming an archive names nothing in the store.
                engine.images.save([image], file, names=output.names)
            file.seek(0)
            return send_tar(session, file, output.number)


def _push(engine: Engine, session: Session, name: str, trace: Trace) -> str:
    """To the registry of that name, with the client's log-in; the manifest's digest."""
    wanted = parse_name(name)
    with trace.doing(f"pushing {wanted.familiar}"):
        pulls = Pulls(engine.images, credentials=SessionLogins(session))
        return Pushes(engine.images, pulls).push(str(wanted)).digest


class SessionLogins(GivenLogins):
    """The client's log-ins, asked for when a registry is; the user's own for what the client has none for."""

    def __init__(self, session: Session) -> None:
        super().__init__({})
        self._session = session

    def find(self, domain: str) -> Any:
        if domain not in self._given and CREDENTIALS in self._session.methods:
            host = _HUB if domain == "docker.io" else domain
            answer = protobuf.decode(self._session.call(CREDENTIALS, protobuf.encode([(1, host)])))
            login = login_of({"username": protobuf.text(answer, 1), "password": protobuf.text(answer, 2)})
            if login is not None:
                self._given[domain] = login
        return super().find(domain)


def prepare(
    engine: Engine, wanted: Wanted, trace: Trace, work: Path, settings: dict[str, Any], stack: ExitStack
) -> str:
    """Fetch Dockerfile and context below `work`, or for as long as `stack` is open; returns the Dockerfile, and puts
    the rest into `settings`."""
    remote, layout = wanted.remote, engine.layout
    loading, dated = "[internal] load remote build context", _dated(settings)
    if remote.startswith(UPLOADED):
        with trace.doing(loading):
            given = Uploaded(wanted.session, remote.removeprefix(UPLOADED))
            found = stack.enter_context(stream_context(layout, given, told=dated))  # type: ignore[arg-type]
            return _found(found, work, wanted, settings)
    if wanted.upload is not None:
        with trace.doing(loading):
            found = stack.enter_context(stream_context(layout, wanted.upload, told=dated))
            return _found(found, work, wanted, settings)
    if is_git(remote):
        with trace.doing("[internal] load git source"):
            fetched = git_context(layout, remote, keep_git=keeps_git(settings), told=dated)
            return _found(stack.enter_context(fetched), work, wanted, settings)
    if remote not in ("client-session", ""):
        if not is_url(remote):
            raise UsageError(f"not a build context: {remote}")
        with trace.doing(loading):
            return _found(stack.enter_context(url_context(layout, remote, dated)), work, wanted, settings)
    text = _own_dockerfile(wanted, trace, work, settings)
    context = work / "context"
    context.mkdir()
    if _takes_context(text):
        with trace.doing("[internal] load build context") as key:
            exclude = read_ignorefile(settings["ignore"])
            size = receive(wanted.session, wanted.local["context"], context, exclude=exclude)
            trace.status(key, f"transferring context: {size}B", size, ended=True)
    settings["context"] = context
    return text


def _own_dockerfile(wanted: Wanted, trace: Trace, work: Path, settings: dict[str, Any]) -> str:
    """The Dockerfile and the .dockerignore out of the client's directories."""
    with trace.doing(_LOAD.format(wanted.dockerfile)) as key:
        text, path, size = _sent_dockerfile(wanted, work)
        trace.status(key, f"transferring dockerfile: {size}B", size, ended=True)
    with trace.doing("[internal] load .dockerignore"):
        own = path.with_name(f"{path.name}.dockerignore")
        if own.is_file() and not own.is_symlink():
            settings["ignore"] = own.read_text(errors="replace")
        else:
            general = work / "ignore"
            general.mkdir()
            receive(wanted.session, wanted.local["context"], general, follow=[".dockerignore"])
            file = general / ".dockerignore"
            settings["ignore"] = file.read_text(errors="replace") if file.is_file() and not file.is_symlink() else ""
    return text


def _sent_dockerfile(wanted: Wanted, work: Path) -> tuple[str, Path, int]:
    """The client's own Dockerfile: its text, where it lies now, bytes received."""
    name, files = wanted.dockerfile, work / "dockerfile"
    files.mkdir()
    follow = [name, f"{name}.dockerignore", name.lower()]
    size = receive(wanted.session, wanted.local["dockerfile"], files, follow=follow)
    return *read_dockerfile(files, name), size


_COPIES = re.compile(r"COPY|ADD|--MOUNT")


def _takes_context(text: str) -> bool:
    """Whether an instruction of the Dockerfile may read the context; a mere RUN may mount it."""
    return _COPIES.search(text.upper()) is not None


def _dated(settings: dict[str, Any]) -> Callable[[int], None]:
    """Takes the moment of a context, which SOURCE_DATE_EPOCH=context stands for."""

    def told(moment_s: int) -> None:
        settings["options"] = replace(settings["options"], context_epoch_s=moment_s)

    return told


def _found(found: Path | bytes, work: Path, wanted: Wanted, settings: dict[str, Any]) -> str:
    """The Dockerfile of a context that is here now, or came instead of one."""
    if isinstance(found, bytes):
        return found.decode("utf-8-sig", "replace")
    settings["context"] = found
    if wanted.own_dockerfile:
        return _sent_dockerfile(wanted, work)[0]
    return read_dockerfile(found, wanted.dockerfile)[0]


class Uploaded(io.RawIOBase):
    """What the client gives under one path of its session."""

    def __init__(self, session: Session, path: str) -> None:
        self._stream = session.open(PULL, [("urlpath", f"/{path}")])
        self._stream.close()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            message = self._stream.receive()
            if message is None:
                return 0
            self._rest = memoryview(protobuf.data(protobuf.decode(message), 1))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
