"""exec: a command in a running container, made first and started later. Source: Docker Engine API, "Exec".

What was made is remembered as long as the daemon lives; the commands themselves go on without it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import ConflictError, LabkernelError, NotFoundError, UsageError
from .attach import MULTIPLEXED, RAW, Streams, carry
from .call import Call, Host
from .containers import find, size_of
from .detach import DetachKeys
from .routes import Route

if TYPE_CHECKING:
    from ..runtime.client import Attachment

KEPT_S = 300.0
MOST = 10_000


class NoSuchExec(NotFoundError):
    """No exec of that id was made, or it has ended long ago."""

    kind = "exec instance"


class ExecConfig(msgspec.Struct, rename="pascal"):
    """ExecCreate."""

    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    console_size: list[int] | None = None
    detach_keys: str = ""
    tty: bool = False
    env: list[str] | None = None
    cmd: list[str] | None = None
    privileged: bool = False
    user: str = ""
    working_dir: str = ""


class StartConfig(msgspec.Struct, rename="pascal"):
    """ExecStart."""

    detach: bool = False
    tty: bool = False
    console_size: list[int] | None = None


class Exec:
    """One of them. `exit_code` is None until it has ended."""

    def __init__(self, container: str, config: ExecConfig) -> None:
        self.id = secrets.token_hex(32)
        self.container = container
        self.config = config
        self.started = False
        self.running = False
        self.pid = 0
        self.exit_code: int | None = None
        self.ended_at = 0.0
        self.streams: Streams | None = None

    @property
    def attrs(self) -> dict[str, Any]:
        config, words = self.config, self.config.cmd or [""]
        return {
            "ID": self.id,
            "Running": self.running,
            "ExitCode": self.exit_code,
            "ProcessConfig": {
                "tty": config.tty,
                "entrypoint": words[0],
                "arguments": words[1:],
                "privileged": config.privileged,
                **({"user": config.user} if config.user else {}),
            },
            "OpenStdin": config.attach_stdin,
            "OpenStderr": config.attach_stderr,
            "OpenStdout": config.attach_stdout,
            "CanRemove": self.exit_code is not None,
            "ContainerID": self.container,
            "DetachKeys": config.detach_keys,
            "Pid": self.pid,
        }


class Execs:
    """Those of one host. Touched by the loop and by threads; each step is one operation of a dict."""

    def __init__(self, host: Host) -> None:
        self._found: dict[str, Exec] = {}

    def add(self, made: Exec) -> None:
        now = time.monotonic()
        for each in list(self._found.values()):
            if each.ended_at and now - each.ended_at > KEPT_S:
                self._found.pop(each.id, None)
        if len(self._found) >= MOST:
            raise ConflictError(f"{MOST} execs are waiting to be started")
        self._found[made.id] = made

    def get(self, id: str) -> Exec:
        """Raises NoSuchExec."""
        found = self._found.get(id)
        if found is None:
            raise NoSuchExec(id)
        return found

    def ids_of(self, container: str) -> list[str]:
        """Those that wait or run in a container."""
        return [each.id for each in list(self._found.values()) if each.container == container and not each.ended_at]


def create(call: Call) -> Any:
    container = find(call)
    config: ExecConfig = call.body
    if not config.cmd:
        raise UsageError("No exec command specified")
    DetachKeys(config.detach_keys)
    status = container.status
    if status == "paused":
        raise ConflictError(f"Container {container.id} is paused, unpause the container before exec")
    if status != "running":
        raise ConflictError(f"container {container.id} is not running")
    made = Exec(container.id, config)
    call.host.shared(Execs).add(made)
    return call.answer(201, {"Id": made.id})


def inspect(call: Call) -> Any:
    return call.host.shared(Execs).get(call.params["id"]).attrs


def _begin(call: Call, each: Exec, size: list[int] | None) -> Attachment:
    """The process with its streams. Raises ConflictError, StartError."""
    config = each.config
    container = call.engine.containers.get(each.container)
    return container.open_exec(
        config.cmd or [],
        stdin=config.attach_stdin,
        tty=config.tty,
        privileged=config.privileged,
        user=config.user,
        environment=config.env,
        workdir=config.working_dir or None,
        exec_id=each.id,
        console_size=size or config.console_size,
    )


async def start(call: Call) -> Any:
    each = call.host.shared(Execs).get(call.params["id"])
    asked: StartConfig = call.body
    if each.started:
        raise ConflictError(f"exec command {each.id} is already running" if each.running else f"exec {each.id} is over")
    each.started = True
    config = each.config
    if asked.detach:
        streams = await _started(call, each, asked)
        call.host.background(_drain(each, streams))
        return call.answer(200)
    status = (await call.thread(call.engine.containers.get, each.container)).status
    if status != "running":
        each.started = False
        raise ConflictError(f"container {each.container} is not running")
    raw = config.tty
    keys = DetachKeys(config.detach_keys) if raw else None
    # Before the start, as docker: clients take the headers first, and its failure comes as output and exit code.
    with await call.hijack(content_type=RAW if raw or call.version < (1, 42) else MULTIPLEXED) as channel:
        try:
            streams = await _started(call, each, asked)
        except LabkernelError as err:
            text = f"OCI runtime exec failed: exec failed: unable to start container process: {err.brief}: unknown\r\n"
            await channel.send(text.encode() if raw else _framed_error(text))
            return None
        await carry(streams, channel, raw=raw, stdin=config.attach_stdin, keys=keys, closes=not raw)
        if streams.attachment.exit_code is None:
            call.host.background(_drain(each, streams))  # the client left: the command goes on
        else:
            _ended(each, streams)
    return None


def _framed_error(text: str) -> bytes:
    from .attach import framed

    return framed("stdout", text.encode())


async def _started(call: Call, each: Exec, asked: StartConfig) -> Streams:
    try:
        attachment = await call.thread(_begin, call, each, asked.console_size)
    except BaseException as err:
        each.exit_code, each.ended_at = getattr(err, "exit_code", 126), time.monotonic()
        raise
    each.pid, each.running = attachment.pid, True
    each.streams = Streams(attachment)
    return each.streams


async def _drain(each: Exec, streams: Streams) -> None:
    """Read what nobody wants, until the command ends."""
    try:
        while await streams.read():
            pass
    except LabkernelError:
        pass  # the supervisor was killed; its successor knows the container, and no exec of ours
    finally:
        _ended(each, streams)


def _ended(each: Exec, streams: Streams) -> None:
    each.running, each.ended_at = False, time.monotonic()
    each.exit_code = streams.attachment.exit_code
    streams.attachment.close()


async def resize(call: Call) -> Any:
    each = call.host.shared(Execs).get(call.params["id"])
    rows, columns = size_of(call)
    for _ in range(100):  # a client resizes right after its start, which may not be done
        if each.streams is not None or not each.started or each.ended_at:
            break
        await asyncio.sleep(0.02)
    if not each.running or each.streams is None:
        raise ConflictError(f"cannot resize exec {each.id}: it is not running")
    await each.streams.resize(rows, columns)
    return call.answer(200)


ROUTES = (
    Route("POST", "/containers/{name}/exec", create, body=ExecConfig),
    Route("POST", "/exec/{id}/start", start, body=StartConfig),
    Route("POST", "/exec/{id}/resize", resize),
    Route("GET", "/exec/{id}/json", inspect),
)
